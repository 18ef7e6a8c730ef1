"""What is stored in a notebook depends neither on the machine nor on who ran it."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbval.plugin import get_sanitize_patterns

from helpers.classroom import store
from helpers.classroom.store import NEUTRAL, WIDGET, clean, neutral_text, problems
from tests.validation import SANITIZE


def quiet(line):
    """Take a line of progress and say nothing."""


def write(path, *sources, **metadata):
    cells = [new_code_cell(source, metadata=metadata) for source in sources]
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title"), *cells]), path)
    return path


# ---------------------------------------------------------------- neutral words


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("at tcp://127.0.0.1:40123, ready", "at tcp://address, ready"),
        ("tls://10.0.0.7:8786", "tls://address"),
        ("see http://127.0.0.1:8787/status", "see http://address/status"),
        ("http://localhost:8888/lab", "http://address/lab"),
        ("listening on 127.0.0.1:4000", "listening on address"),
        ("<object object at 0x7f5b4b63c150>", "<object object at 0x...>"),
        ("/tmp/ipykernel_77/12345.py:3: UserWarning", "notebook-cell.py:3: UserWarning"),
        (r"C:\T\ipykernel_7\1.py:3: W", "notebook-cell.py:3: W"),
        ("File /home/ann/hands/helpers/cluster.py:7", "File course/helpers/cluster.py:7"),
        ('"/srv/a b', '"/srv/a b'),
        ("/home/ann/x.txt", "~/x.txt"),
        (r"C:\Users\ann\x.txt", r"~\x.txt"),
        ("/root/.venv/lib/python3.11/site-packages/dask/base.py", "site-packages/dask/base.py"),
        ("wrote /tmp/tmpab12/file, done", "wrote temporary-folder, done"),
        ("/square/root and 3/4", "/square/root and 3/4"),
        (
            "https://github.com/a/b/blob/main/docs/glossary.md",
            "https://github.com/a/b/blob/main/docs/glossary.md",
        ),
        ("R² 0.0853, 12:30, version 1.2.3", "R² 0.0853, 12:30, version 1.2.3"),
    ],
)
def test_what_belongs_to_a_machine_becomes_neutral(before, after):
    assert neutral_text(before) == after
    assert neutral_text(after) == after


def test_nbval_uses_the_same_neutral_words():
    patterns = get_sanitize_patterns(SANITIZE.read_text())
    assert patterns == [(pattern, replacement) for _, pattern, replacement in NEUTRAL]


# ---------------------------------------------------------------- clean


def widget_output(text, **more):
    view = {"model_id": "ab12", "version_major": 2, "version_minor": 0}
    return new_output("display_data", data={WIDGET: view, "text/plain": text} | more)


def test_state_of_widgets_and_foreign_metadata_are_dropped():
    notebook = new_notebook(
        metadata={
            "widgets": {"state": 1},
            "jupytext": {"a": 1},
            "language_info": {"name": "python", "version": "3"},
        },
        cells=[
            new_code_cell(
                "x",
                metadata={"execution": {"t": "1"}, "tags": ["exercise"], "lines_to_next_cell": 2},
            )
        ],
    )
    after = clean(notebook)
    assert after.metadata == store.METADATA
    assert after.cells[0].metadata == {"tags": ["exercise"]}
    assert "widgets" in notebook.metadata  # the caller's notebook is not changed


@pytest.mark.parametrize(
    ("text", "more"),
    [("IntSlider(value=0)", {"image/png": "AAAA"}), ("A link to the dashboard.", {})],
)
def test_a_widget_is_stored_as_the_picture_or_words_beside_it(text, more):
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[widget_output(text, **more)])])
    [output] = clean(notebook).cells[0].outputs
    assert output.data == {"text/plain": text} | more
    assert problems(clean(notebook)) == []


@pytest.mark.parametrize("text", ["IntSlider(value=0)", ""])
def test_a_widget_without_picture_and_words_is_a_fault(text):
    notebook = clean(new_notebook(cells=[new_code_cell("x", outputs=[widget_output(text)])]))
    assert "without a picture or words" in problems(notebook)[0]


def test_counts_run_from_one_and_streams_are_joined():
    outputs = [new_output("stream", name="stdout", text=text) for text in ("a\n", "b\n")]
    outputs.append(new_output("execute_result", data={"text/plain": "2"}, execution_count=9))
    cells = [
        new_code_cell("a", execution_count=7),
        new_code_cell("b", execution_count=9, outputs=outputs),
    ]
    first, second = clean(new_notebook(cells=cells)).cells
    assert (first.execution_count, second.execution_count) == (1, 2)
    assert second.outputs[0].text == "a\nb\n"
    assert second.outputs[1].execution_count == 2


def test_a_new_cell_changes_no_other_cells_id():
    sources = ["a = 1", "b = 2", "a = 1"]
    ids = [cell.id for cell in clean(new_notebook(cells=[new_code_cell(s) for s in sources])).cells]
    more = clean(new_notebook(cells=[new_code_cell(s) for s in ["new", *sources]]))
    assert [cell.id for cell in more.cells[1:]] == ids
    assert len(set(ids)) == 3


def test_a_name_of_this_machine_is_a_fault(monkeypatch):
    monkeypatch.setattr(store.socket, "gethostname", lambda: "anns-laptop")
    output = new_output("stream", name="stdout", text="first\nanns-laptop is ready\n")
    notebook = clean(new_notebook(cells=[new_code_cell("x", outputs=[output])]))
    assert problems(notebook) == ["code cell 1 shows a name of this machine (anns-laptop)"]


def test_problems_names_what_is_not_clean():
    notebook = clean(new_notebook(cells=[new_code_cell("x")]))
    notebook.cells[0].outputs = [new_output("stream", name="stdout", text="tcp://127.0.0.1:1")]
    assert problems(notebook) == ["it is not in the clean form (the outputs of cell 1)"]
    notebook.cells[0].outputs = []
    notebook.metadata["widgets"] = {}
    assert problems(notebook) == ["it is not in the clean form (the notebook's metadata)"]


# ---------------------------------------------------------------- run and write


def test_a_notebook_is_run_in_its_folder_and_stored_clean(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    path = write(
        folder / "made-up.ipynb",
        "import os; print('tcp://127.0.0.1:9', os.path.basename(os.getcwd()))",
        "1 + 1",
    )
    lines = []
    store.store(path, report=lines.append)
    notebook = nbformat.read(path, 4)
    assert notebook.cells[1].outputs[0].text == "tcp://address a folder\n"
    assert notebook.cells[2].outputs[0].data["text/plain"] == "2"
    assert problems(notebook) == []
    assert lines[1] == "made-up.ipynb 2/2: 1 + 1"
    first = path.read_bytes()
    store.store(path, report=quiet)
    assert path.read_bytes() == first
    assert [item.name for item in folder.iterdir()] == ["made-up.ipynb"]


def test_an_error_is_told_in_one_sentence_and_nothing_is_written(tmp_path):
    path = write(tmp_path / "bad.ipynb", "1", "int('x')")
    before = path.read_bytes()
    with pytest.raises(store.StoreError) as caught:
        store.store(path, report=quiet)
    assert str(caught.value) == (
        f"{path}: code cell 2 raised ValueError: invalid literal for int() with base 10: 'x'; "
        "nothing was written."
    )
    assert path.read_bytes() == before


def test_an_expected_error_is_stored(tmp_path):
    path = write(tmp_path / "expected.ipynb", "int('x')", tags=["raises-exception"])
    store.store(path, report=quiet)
    assert nbformat.read(path, 4).cells[1].outputs[0].ename == "ValueError"


def test_a_cell_that_takes_too_long_is_told(tmp_path):
    path = write(tmp_path / "slow.ipynb", "import time; time.sleep(60)")
    with pytest.raises(store.StoreError, match="code cell 1 ran longer than 1 s; nothing was"):
        store.store(path, seconds=1, report=quiet)


def test_a_notebook_that_cannot_be_made_clean_is_not_written(tmp_path, monkeypatch):
    path = write(tmp_path / "private.ipynb", "print('anns-laptop')")
    before = path.read_bytes()
    monkeypatch.setattr(store.socket, "gethostname", lambda: "anns-laptop")
    with pytest.raises(store.StoreError, match="shows a name of this machine"):
        store.store(path, report=quiet)
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "old.ipynb", "1")
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store.write(path, clean(nbformat.read(path, 4)))
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["old.ipynb"]


@pytest.mark.parametrize(
    ("content", "sentence"), [(None, "cannot be read"), ("no json", "is not a Jupyter notebook")]
)
def test_a_file_that_is_no_notebook_is_told(content, sentence, tmp_path, capsys):
    path = tmp_path / "x.ipynb"
    if content:
        path.write_text(content)
    assert store.main(["--check", str(path)]) == 1
    assert sentence in capsys.readouterr().err


def test_check_says_which_notebooks_are_not_clean(tmp_path):
    good, bad = tmp_path / "good.ipynb", write(tmp_path / "bad.ipynb", "1")
    store.write(good, clean(nbformat.read(bad, 4)))
    command = [sys.executable, "-m", "helpers.classroom.store", "--check", str(good), str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(store.REPOSITORY))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{bad}: its cells are not counted 1 to n: run it from top to bottom."
    ]
