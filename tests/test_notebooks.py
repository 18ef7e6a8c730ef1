"""Each notebook gives again what is stored in it; and that comparison is strict."""

import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.classroom.store import clean, neutral_text, problems
from tests.validation import (
    NOTEBOOKS,
    ROOT,
    clean_environment,
    execute,
    leftovers,
    printed,
    read,
    refused,
    run_nbval,
    tags,
)

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def test_each_number_has_one_notebook_or_is_planned():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers) >= 8
    planned = re.findall(r"^\| (\d\d) \|.*\| planned \|", (ROOT / "README.md").read_text(), re.M)
    assert sorted([*numbers, *planned]) == [f"{number:02}" for number in range(16)]


@each_notebook
def test_stored_outputs_come_again(notebook, short_folder):
    """Strictly, from another working directory, without a network, warnings of ours as errors."""
    passed, report = run_nbval(notebook, short_folder)
    assert passed, report


# ---------------------------------------------------------------- the comparison is strict


def stored(source, *outputs, tags=(), count=1):
    """A code cell as it stands in a stored notebook."""
    return new_code_cell(
        source, outputs=list(outputs), execution_count=count, metadata={"tags": list(tags)}
    )


def shown(**data):
    """An output that displays data; names of types are written with a double underscore."""
    return new_output("display_data", data={k.replace("__", "/"): v for k, v in data.items()})


def text(words, name="stdout"):
    return new_output("stream", name=name, text=words)


ERROR = new_output("error", ename="ValueError", evalue="no", traceback=[])
SVG = "from IPython.display import display, SVG; display({'image/svg+xml': '<svg/>'}, raw=True)"
ALT = "display({'image/png': 'AAAA', 'text/plain': 'a rising line'}, raw=True)"
WARN = "import warnings; warnings.warn_explicit('old', UserWarning, 'f.py', 1, module={!r})"
IGNORE = ["nbval-ignore-output"]
RAISES = ["raises-exception"]

# name: (cell, True when it must pass)
CELLS = {
    "equal": (stored("print(2)", text("2\n")), True),
    "another number": (stored("print(2)", text("3\n")), False),
    "another last digit": (stored("print(0.3000001)", text("0.3000002\n")), False),
    "another SVG": (stored(SVG, shown(**{"image/svg+xml": "<svg></svg>"})), False),
    "the same SVG": (stored(SVG, shown(**{"image/svg+xml": "<svg/>"})), True),
    "another text of a figure": (
        stored(ALT, shown(image__png="AAAA", text__plain="a falling line")),
        False,
    ),
    "another picture, same text": (
        stored(ALT, shown(image__png="BBBB", text__plain="a rising line")),
        True,  # pictures differ between machines; their texts and printed numbers do not
    ),
    "no figure any more": (
        stored("pass", shown(image__png="AAAA", text__plain="a rising line")),
        False,
    ),
    "a result that was not stored": (stored("2"), False),
    "a stored error": (stored("pass", ERROR), False),
    "an error": (stored("1/0"), False),
    "an expected error": (
        stored("raise ValueError('no')", ERROR, tags=RAISES),
        True,
    ),
    "an expected error that does not come": (stored("pass", ERROR, tags=RAISES), False),
    "a new message on stderr": (stored("import sys; print(1, file=sys.stderr)"), False),
    "an ignored difference": (stored("print(2)", text("3\n"), tags=IGNORE), True),
    "an ignored error": (stored("1/0", tags=IGNORE), False),
    "another address": (
        stored(
            "print('tcp://127.0.0.1:5', object())", text("tcp://address <object object at 0x...>\n")
        ),
        True,
    ),
    "a warning of helpers": (stored(WARN.format("helpers.cluster"), tags=IGNORE), False),
    "a warning of others": (stored(WARN.format("others"), tags=IGNORE), True),
    "one address more": (stored("print('tcp://127.0.0.1:5')", text("")), False),
}


@pytest.fixture(scope="module")
def failed_cells(tmp_path_factory):
    """Names of the made-up cells that fail, all in one notebook: after a failure the rest runs."""
    folder = tmp_path_factory.mktemp("strict")
    path = folder / "made-up.ipynb"
    nbformat.write(new_notebook(cells=[cell for cell, _ in CELLS.values()]), path)
    passed, report = run_nbval(path, folder / "run")
    assert not passed
    numbers = {int(number) for number in re.findall(r"^FAILED .*Cell (\d+)", report, re.MULTILINE)}
    return {name for number, name in enumerate(CELLS) if number in numbers}


@pytest.mark.parametrize("name", CELLS)
def test_nbval_is_strict(name, failed_cells):
    assert (name not in failed_cells) is CELLS[name][1]


def test_a_cell_that_was_not_run_is_found_although_nbval_passes_it():
    notebook = clean(new_notebook(cells=[stored("print(1)", text("1\n"))]))
    assert problems(notebook) == []
    notebook.cells[0].outputs, notebook.cells[0].execution_count = [], None
    assert any("not counted 1 to n" in sentence for sentence in problems(notebook))


def test_a_cell_that_runs_too_long_fails(short_folder):
    path = short_folder / "slow.ipynb"
    cells = [stored("import time; time.sleep(30)"), stored("print(1)", text("1\n"), count=2)]
    nbformat.write(new_notebook(cells=cells), path)
    passed, report = run_nbval(path, short_folder / "run", seconds=1)
    assert not passed
    assert "Timeout of 1 seconds exceeded" in report


def test_a_hidden_attempt_to_reach_the_network_fails(short_folder):
    path = short_folder / "network.ipynb"
    source = (
        "import urllib.request\n"
        "try:\n    urllib.request.urlopen('http://example.org')\nexcept OSError:\n    pass"
    )
    nbformat.write(new_notebook(cells=[stored(source)]), path)
    passed, report = run_nbval(path, short_folder / "run")
    assert not passed
    assert "tried to reach the network: socket.getaddrinfo example.org" in report


# ---------------------------------------------------------------- slow: other ways to run


@pytest.mark.slow
@each_notebook
def test_twice_in_one_kernel(notebook, short_folder):
    """Run All a second time: no error, and the same outputs where they are compared at all."""
    once = read(notebook)
    length = len(once.cells)
    again = nbformat.from_dict(once)
    for cell in again.cells:
        cell["id"] += "-b"
    twice = nbformat.from_dict(once | {"cells": once.cells + again.cells})
    run, environment = execute(twice, short_folder)
    differ = [
        f"{first.source[:60]!r}: {printed(first)!r} and then {printed(second)!r}"
        for first, second in zip(run.cells[:length], run.cells[length:], strict=True)
        if first.cell_type == "code"
        and "nbval-ignore-output" not in tags(first)
        and neutral_text(printed(first)) != neutral_text(printed(second))
    ]
    assert not differ, "\n".join(differ)
    assert leftovers(environment) == []


ONE_CORE = (
    "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin cores")
@each_notebook
def test_with_one_usable_core(notebook, short_folder):
    passed, report = run_nbval(
        notebook, short_folder, before=[sys.executable, "-I", "-c", ONE_CORE]
    )
    assert passed, report


@pytest.mark.slow
@each_notebook
def test_with_papermill_from_another_directory(notebook, short_folder):
    environment = clean_environment(short_folder)
    result = short_folder / "result.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3"]
    done = subprocess.run(
        [*command, str(notebook), str(result)],
        cwd=short_folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    code = [cell for cell in read(result).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert refused(environment) == []
    assert leftovers(environment) == []


# ---------------------------------------------------------------- the kernel ends in mid-work

OPEN = "from helpers.cluster import open_cluster\ncluster = open_cluster(2)"
WORK = """
import time
futures = cluster.client.map(time.sleep, {seconds}, pure=False)
print("at work")
cluster.client.gather(futures)
"""
LONG_TASKS = WORK.format(seconds=[60, 60])
SHORT_TASKS = WORK.format(seconds=[0.2] * 300)


class Kernel:
    """A kernel that opened a cluster and is in the middle of a long cell."""

    def __init__(self, folder, work):
        self.environment = clean_environment(folder)
        self.manager, self.client = start_new_kernel(
            kernel_name="python3", env=self.environment, cwd=str(folder)
        )
        self.run(OPEN)
        self.long_cell = self.client.execute(work)
        self._wait_for_words("at work")
        time.sleep(0.5)

    def run(self, code):
        """Run a cell to its end and return what it gave; its error is raised."""
        reply = self.client.execute_interactive(
            code, user_expressions={"it": "value"}, timeout=60, output_hook=lambda _: None
        )["content"]
        assert reply["status"] == "ok", reply.get("evalue")
        return reply["user_expressions"]["it"].get("data", {}).get("text/plain")

    def _wait_for_words(self, words):
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if words in message["content"].get("text", ""):
                return

    def reply_of_long_cell(self):
        """The status of the long cell, once it is known."""
        while True:
            reply = self.client.get_shell_msg(timeout=30)
            if reply["parent_header"].get("msg_id") == self.long_cell:
                return reply["content"]

    def others(self, seconds=10):
        """What is left besides the kernel and Python's own helper, after at most some seconds."""
        end = time.monotonic() + seconds
        while True:
            left = leftovers(self.environment, 0)
            own = ("ipykernel", "multiprocessing.resource_tracker")
            left = [item for item in left if not any(word in item for word in own)]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.1)

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()
        self.manager.context.destroy(linger=0)


@pytest.fixture
def busy_kernel(request, short_folder):
    kernel = Kernel(short_folder, getattr(request, "param", LONG_TASKS))
    yield kernel
    kernel.close()
    assert leftovers(kernel.environment) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_kernel_leaves_nothing(busy_kernel):
    assert len(busy_kernel.others(0)) >= 3  # two workers and their folder, so that this can fail
    busy_kernel.manager.signal_kernel(signal.SIGKILL)
    assert busy_kernel.others() == []


def test_a_kernel_restarted_in_a_cell_leaves_nothing(busy_kernel):
    busy_kernel.manager.restart_kernel(now=True)
    assert busy_kernel.others() == []


# A task that runs already is not stopped by the interrupt; those that wait are forgotten.
@pytest.mark.parametrize("busy_kernel", [SHORT_TASKS], ids=["short tasks"], indirect=True)
def test_an_interrupted_cell_leaves_a_cluster_that_works(busy_kernel):
    busy_kernel.manager.interrupt_kernel()
    assert busy_kernel.reply_of_long_cell()["ename"] == "KeyboardInterrupt"
    busy_kernel.run("del futures")
    assert busy_kernel.run("value = cluster.client.submit(sum, [1, 2]).result(timeout=30)") == "3"
    busy_kernel.run("cluster.close()")
    assert busy_kernel.others() == []
