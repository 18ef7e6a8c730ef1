"""Run notebooks and store their outputs in a clean form.

A stored notebook is read on GitHub and in print, and nbval compares it with a new run. Both need
outputs that do not depend on the person or the machine: no address, no port, no path, no state of
widgets, cells counted 1 to n. ::

    python -m helpers.classroom.store notebooks/00-start-here.ipynb     # run, clean, write
    python -m helpers.classroom.store --check notebooks/*.ipynb         # only say what is not clean
"""

import argparse
import copy
import hashlib
import os
import re
import socket
import sys
import tempfile
from pathlib import Path

import nbformat

REPOSITORY = Path(__file__).resolve().parents[2]

# What differs between machines, and the neutral words that replace it. nbval must do the same with
# the outputs of its run: tests/nbval_sanitize.cfg holds this list too, and a test compares the two.
NEUTRAL = (
    ("cell_file", r"(?:[^\s'\"<>(]*[/\\])?ipykernel_\d+[/\\]\d+\.py", r"notebook-cell.py"),
    ("packages", r"[^\s'\"<>(]*[/\\]site-packages[/\\]", r"site-packages/"),
    (
        "course_path",
        (
            r"(?<![\w/:.\\])(?:[A-Za-z]:)?(?:[/\\][^\s/\\'\"<>:|]+)+[/\\]"
            r"(?=(?:notebooks|helpers|data|docs)\b)"
        ),
        r"course/",
    ),
    (
        "temporary",
        r"(?<![\w/:.\\])/(?:private/)?(?:tmp|var/tmp|var/folders)/[^\s'\"<>:,)]+",
        r"temporary-folder",
    ),
    (
        "home",
        r"(?<![\w/:.\\])(?:(?:[A-Za-z]:)?[/\\](?:home|Users)[/\\][^\s/\\'\"<>:]+|/root(?![\w-]))",
        r"~",
    ),
    ("address", r"\b(tcp|tls|ucx|inproc|wss?)://[^\s'\"<>,;)\]}]+", r"\1://address"),
    (
        "web_address",
        r"\b(https?)://(?:localhost|(?:\d{1,3}\.){3}\d{1,3}|\[[0-9a-fA-F:]+\])(?::\d+)?",
        r"\1://address",
    ),
    ("host_and_port", r"\b(?:localhost|(?:\d{1,3}\.){3}\d{1,3}):\d+", r"address"),
    ("memory_address", r"\b0x[0-9a-fA-F]{6,16}\b", r"0x..."),
)
METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
KEPT_CELL_METADATA = ("tags", "slideshow")
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURES = ("image/png", "image/jpeg")
CELL_SECONDS = 120


class StoreError(RuntimeError):
    """A notebook could not be stored; the message is one sentence for its author."""


def neutral_text(text):
    """Replace addresses, ports and paths in a text by neutral words.

    Parameters
    ----------
    text : str

    Returns
    -------
    str
        The same text when there was nothing to replace.

    Examples
    --------
    >>> neutral_text("worker at tcp://127.0.0.1:40123")
    'worker at tcp://address'
    """
    for _, pattern, replacement in NEUTRAL:
        text = re.sub(pattern, replacement, text)
    return text


def clean(notebook):
    """Return a clean copy of a notebook.

    Parameters
    ----------
    notebook : nbformat.NotebookNode

    Returns
    -------
    nbformat.NotebookNode
        Counts 1 to n, neutral outputs, no state of widgets, no timing, only the metadata that a
        reader's program needs. Cleaning a clean notebook changes nothing.
    """
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen, count = {}, 0
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in KEPT_CELL_METADATA if cell.metadata.get(key)}
        )
        cell["id"] = _stable_id(cell, seen)
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = _clean_outputs(cell.outputs, count)
    return notebook


def _stable_id(cell, seen):
    # From the text, so that converting or running a notebook again changes no other cell's id.
    digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
    seen[digest] = seen.get(digest, 0) + 1
    return digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


def _clean_outputs(outputs, count):
    kept = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
            continue
        if WIDGET in output.get("data", {}) and _has_substitute(output.data):
            # Without its kernel a widget is an error message; the picture or the words are not.
            del output.data[WIDGET]
        if output.output_type == "execute_result":
            output.execution_count = count
        kept.append(output)
    return [_neutral(output) for output in kept]


def _has_substitute(data):
    """True when a picture or words of its own, not IntSlider(value=…), stand beside a widget."""
    return "image/png" in data or not re.match(r"\w*\(|$", data.get("text/plain", ""))


def _neutral(value, key=None):
    if isinstance(value, str):
        return value if key in PICTURES else neutral_text(value)
    if isinstance(value, dict):
        return nbformat.from_dict({name: _neutral(item, name) for name, item in value.items()})
    if isinstance(value, list):
        return [_neutral(item, key) for item in value]
    return value


def problems(notebook):
    """List what makes a notebook unfit to be stored, one sentence each.

    Parameters
    ----------
    notebook : nbformat.NotebookNode

    Returns
    -------
    list of str
        Empty for a clean notebook that was run from top to bottom.
    """
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells are not counted 1 to n: run it from top to bottom")
    for number, cell in enumerate(code, start=1):
        for output in cell.outputs:
            found += _output_problems(number, cell, output)
    cleaned = clean(notebook)
    if not found and cleaned != notebook:
        found.append(f"it is not in the clean form ({_first_difference(notebook, cleaned)})")
    return found


def _output_problems(number, cell, output):
    tags = cell.metadata.get("tags", [])
    if output.output_type == "error" and "raises-exception" not in tags:
        yield f"code cell {number} stores an error ({output.ename}) and has no tag raises-exception"
    data = output.get("data", {})
    if WIDGET in data and not _has_substitute(data):
        yield (
            f"code cell {number} shows a widget without a picture or words beside it: "
            "show it with helpers.classroom.panels.display_panel"
        )
    text = "\n".join(_strings(output))
    for word in _private_words():
        if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text):
            yield f"code cell {number} shows a name of this machine ({word})"


def _strings(value, key=None):
    """Every text in an output but its pictures."""
    if isinstance(value, str) and key not in PICTURES:
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)


def _private_words():
    """Paths and names that belong to this machine or person only."""
    words = {str(REPOSITORY), str(Path.home()), socket.gethostname()}
    return sorted(word for word in words if len(word) > 3 and word not in ("localhost", "/root"))


def _first_difference(before, after):
    if before.metadata != after.metadata:
        return "the notebook's metadata"
    for position, (old, new) in enumerate(zip(before.cells, after.cells, strict=True), start=1):
        for part in ("id", "metadata", "outputs"):
            if old.get(part) != new.get(part):
                return f"the {part} of cell {position}"
    return "the format's version"


def execute(path, seconds=CELL_SECONDS, report=print):
    """Run a notebook from top to bottom in a fresh kernel, in its own folder.

    Parameters
    ----------
    path : str or Path
    seconds : float, default 120
        Time limit of one cell.
    report : callable, optional
        Called with one line of progress for each code cell.

    Returns
    -------
    nbformat.NotebookNode
        The notebook with new outputs; the file is not changed.

    Raises
    ------
    StoreError
        When a cell raises, takes too long, or the kernel dies.
    """
    # Imported here because neutral_text and problems need no kernel.
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    path = Path(path)
    notebook = read(path)
    order = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    current = {"number": 0}

    def started(cell, cell_index):
        if cell.cell_type != "code":
            return
        current["number"] = order.index(cell_index) + 1
        first = (cell.source.strip().splitlines() or ["(empty)"])[0]
        report(f"{path.name} {current['number']}/{len(order)}: {first[:60]}")

    client = NotebookClient(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.resolve().parent)}},
        record_timing=False,
        on_cell_start=started,
        extra_arguments=["--log-level=ERROR"],  # no word about the transport, which is local
    )
    try:
        client.execute()
    except CellExecutionError as error:
        why = f"raised {error.ename}: {_one_line(error.evalue)}"
    except CellTimeoutError:
        why = f"ran longer than {seconds:g} s"
    except DeadKernelError:
        why = "ended the kernel"
    else:
        return notebook
    raise StoreError(f"{path}: code cell {current['number']} {why}; nothing was written.")


def _one_line(text):
    return " ".join(text.split())[:300]


def read(path):
    """Read a notebook file; StoreError when it is missing or no notebook."""
    try:
        return nbformat.read(path, as_version=4)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, nbformat.ValidationError, nbformat.reader.NotJSONError):
        raise StoreError(f"{path}: is not a Jupyter notebook.") from None


def write(path, notebook):
    """Write a notebook in one step: a reader sees the old file or the new one, never half."""
    path = Path(path)
    text = nbformat.writes(notebook).rstrip("\n") + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", text=False)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def store(path, seconds=CELL_SECONDS, report=print):
    """Execute a notebook and write it with clean outputs.

    Raises
    ------
    StoreError
        When a cell fails or its output cannot be made clean. The file then stays as it was.
    """
    notebook = clean(execute(path, seconds, report))
    nbformat.validate(notebook)
    found = problems(notebook)
    if found:
        raise StoreError(f"{path}: {'; '.join(found)}; nothing was written.")
    write(path, notebook)
    report(f"{path}: stored.")


def main(arguments=None):
    """Store or check the notebooks named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.classroom.store", description="Store clean outputs in notebooks."
    )
    parser.add_argument("notebooks", nargs="+", metavar="NOTEBOOK")
    parser.add_argument("--check", action="store_true", help="only say which are not clean")
    parser.add_argument("--seconds", type=float, default=CELL_SECONDS, help="limit of one cell")
    options = parser.parse_args(arguments)
    failed = False
    for path in options.notebooks:
        try:
            if options.check:
                sentences = [f"{path}: {sentence}." for sentence in problems(read(path))]
            else:
                store(path, options.seconds, report=lambda line: print(line, flush=True))
                sentences = []
        except StoreError as error:
            sentences = [str(error)]
        for sentence in sentences:
            print(sentence, file=sys.stderr)
        failed = failed or bool(sentences)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
