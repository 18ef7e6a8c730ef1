"""How the tests run notebooks: in which environment, with which command, and what stays behind."""

import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))
OFFLINE = ROOT / "tests" / "offline"
SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"
CELL_SECONDS = 60
NOTEBOOK_SECONDS = 240
MARK = "MANY_HANDS_RUN"


def clean_environment(folder):
    """The environment of every kernel of the tests.

    Nothing of the user's own settings (Jupyter, IPython, matplotlib, Dask) reaches it; temporary
    files go to `folder`; there is no network and a warning of helpers is an error (see
    tests/offline); libraries use one thread.

    Parameters
    ----------
    folder : Path
        Made if missing. Short, because some systems limit the length of a socket's path.

    Returns
    -------
    dict
        A copy of this process's environment with these changes.
    """
    folder = Path(folder)
    temporary = folder / "t"
    temporary.mkdir(parents=True, exist_ok=True)
    drop = ("DASK_", "JUPYTER", "IPYTHON", "PYTEST_", "COV_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    environment.update(
        PYTHONPATH=str(OFFLINE),
        PYTHONDONTWRITEBYTECODE="1",
        MANY_HANDS_REFUSED=str(folder / "refused.txt"),
        TMPDIR=str(temporary),
        TEMP=str(temporary),
        TMP=str(temporary),
        JUPYTER_CONFIG_DIR=str(folder / "jupyter-config"),
        JUPYTER_DATA_DIR=str(folder / "jupyter-data"),
        JUPYTER_RUNTIME_DIR=str(folder / "jupyter-runtime"),
        JUPYTER_PREFER_ENV_PATH="1",
        IPYTHONDIR=str(folder / "ipython"),
        MATPLOTLIBRC=str(_matplotlib_defaults()),
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
    )
    environment[MARK] = uuid.uuid4().hex
    return environment


def _matplotlib_defaults():
    import matplotlib

    return Path(matplotlib.get_data_path()) / "matplotlibrc"


def refused(environment):
    """The connections that processes of this environment tried to make and were refused."""
    path = Path(environment["MANY_HANDS_REFUSED"])
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def processes_of(environment):
    """Live processes that were started, at any depth, with this environment."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(MARK) == environment[MARK]
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # it ended in this moment, or belongs to somebody else
    return found


def leftovers(environment, seconds=10):
    """What is still there after at most `seconds`: command lines, and names in the temp folder."""
    end = time.monotonic() + seconds
    while True:
        running = [_command(process) for process in processes_of(environment)]
        files = sorted(path.name for path in Path(environment["TMPDIR"]).iterdir())
        if not (running or files) or time.monotonic() > end:
            return running + files
        time.sleep(0.1)


def _command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return f"process {process.pid}"


def nbval_command(notebook, ini, seconds=CELL_SECONDS):
    """The command that compares a notebook's stored outputs with a new run, strictly.

    Parameters
    ----------
    notebook : Path
    ini : Path
        An empty settings file of pytest; its folder becomes pytest's root, so that no settings of
        another project or of this one change the run.
    seconds : float
        Time limit of one cell.

    Returns
    -------
    list of str
    """
    ini.write_text("[pytest]\n")
    options = ["-c", str(ini), "--rootdir", str(ini.parent), "--noconftest", "-q", "--no-header"]
    options += ["-p", "no:cacheprovider", "--color=no", "--nbval", "--nbval-current-env"]
    options += [f"--nbval-sanitize-with={SANITIZE}", f"--nbval-cell-timeout={seconds:g}"]
    return [sys.executable, "-m", "pytest", *options, str(notebook)]


def run_nbval(notebook, folder, seconds=CELL_SECONDS, before=()):
    """Compare a notebook with a new run, from another working directory.

    The notebook is copied, so that neither pytest nor the kernel works in the notebook's own
    folder: what it needs it must find by itself.

    Parameters
    ----------
    notebook : Path
    folder : Path
        An empty folder for the copy, the settings and temporary files.
    seconds : float
        Time limit of one cell.
    before : sequence of str
        Words before the command, such as ``["taskset", "-c", "0"]``.

    Returns
    -------
    passed : bool
    report : str
        nbval's own report, and a line for each refused connection and each leftover.
    """
    copy = folder / "elsewhere" / notebook.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(notebook.read_bytes())
    environment = clean_environment(folder)
    command = [*before, *nbval_command(copy, folder / "pytest.ini", seconds)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=NOTEBOOK_SECONDS,
    )
    report = [done.stdout]
    report += [f"tried to reach the network: {line}" for line in refused(environment)]
    report += [f"left behind: {item}" for item in leftovers(environment)]
    return done.returncode == 0 and len(report) == 1, "\n".join(report)


def execute(notebook, folder, **options):
    """Run a notebook (a node, not a file) with nbclient in a folder of its own.

    Returns
    -------
    nbformat.NotebookNode
        The same notebook, with new outputs.
    dict
        The environment of its kernel, for `leftovers` and `refused`.
    """
    environment = clean_environment(folder)
    client = kernel_client(notebook, folder, **options)
    client.execute(env=environment)
    return notebook, environment


def kernel_client(notebook, folder, **options):
    """A client of nbclient that runs `notebook` in a folder that is not the notebook's."""
    work = Path(folder) / "elsewhere"
    work.mkdir(parents=True, exist_ok=True)
    settings = {"timeout": CELL_SECONDS, "kernel_name": "python3"} | options
    return NotebookClient(notebook, resources={"metadata": {"path": str(work)}}, **settings)


def read(path):
    """Read a notebook."""
    return nbformat.read(path, as_version=4)


def tags(cell):
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def printed(cell):
    """What a code cell printed and showed as text."""
    texts = []
    for output in cell.outputs:
        # One print may come in several pieces.
        texts.append(output.get("text", ""))
        if "data" in output:
            texts.append(output.data.get("text/plain", "") + "\n")
    return "".join(texts)


CHECK = re.compile(r"^check\(\s*[\"']([^\"']+)[\"']", re.MULTILINE)


def exercise_numbers(notebook):
    """The numbers of the exercises that a notebook checks, in its order."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [number for source in code for number in CHECK.findall(source)]


def solution_code(cell):
    """The Python code of a cell that holds a solution."""
    found = re.search(r"```python\n(.*?)^```", cell.source, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"a solution cell has no ```python block: {cell.source[:60]!r}")
    return found.group(1)


def solved(notebook):
    """A copy of a notebook with each solution in place of its stub.

    The solution replaces all that stands above the first line that starts with ``check(`` in the
    exercise cell before it.
    """
    notebook = nbformat.from_dict(notebook)
    stub = None
    for cell in notebook.cells:
        if cell.cell_type == "code" and "exercise" in tags(cell):
            stub = cell
        elif "solution" in tags(cell):
            if stub is None:
                raise ValueError(f"a solution has no exercise before it: {cell.source[:60]!r}")
            start = re.search(r"^check\(", stub.source, re.MULTILINE)
            if start is None:
                raise ValueError(f"an exercise cell has no check( line: {stub.source[:60]!r}")
            stub.source = solution_code(cell).rstrip() + "\n" + stub.source[start.start() :]
            stub = None
    return notebook
