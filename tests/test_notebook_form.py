"""Each notebook has the form that a reader can rely on; each rule is shown to find its fault."""

import ast
import json
import re
from statistics import median

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.classroom.store import METADATA, clean, problems
from tests.validation import NOTEBOOKS, read, tags

KNOWN_TAGS = {"exercise", "solution", "nbval-ignore-output", "raises-exception"}
MEDIAN_LINES = 6
MOST_LINES = 25
MOST_CODE_IN_A_ROW = 3
MOST_HELPER_NAMES = 8
MOST_BYTES = 1_500_000
HEADINGS = {
    "what you will do": r"you will (?:do|learn)",
    "the time needed": r"\b\d+ min",
    "a summary": r"^#{2,3} .*summary",
    "where it is used": r"^#{2,3} .*used in practice",
    "sources": r"^#{2,3} .*sources",
    "a link to the glossary": r"\]\(\.\./docs/glossary\.md#[\w-]+\)",
}
RULES = {}


def rule(find_faults):
    """Register a function that yields one sentence for each fault of a notebook."""
    RULES[find_faults.__name__] = find_faults
    return find_faults


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def name_of(cell):
    return repr(cell.source.strip().split("\n")[0][:60])


def tree_of(cell):
    """The syntax tree of a cell, without the lines that only IPython understands."""
    lines = [line for line in cell.source.split("\n") if not line.lstrip().startswith(("%", "!"))]
    return ast.parse("\n".join(lines))


def lines_of(cell):
    """How many lines of code a cell has: neither empty ones nor comments count."""
    lines = [line.strip() for line in cell.source.split("\n")]
    return sum(bool(line) and not line.startswith("#") for line in lines)


@rule
def stored_clean(notebook):
    """Counts run from 1 to n, no state of widgets, no address, path or name, no error."""
    yield from problems(notebook)


@rule
def kernel_is_python3(notebook):
    """Any Jupyter finds the kernel, also nbval without an option."""
    if notebook.metadata.get("kernelspec") != METADATA["kernelspec"]:
        yield f"the kernelspec is {notebook.metadata.get('kernelspec')}"
    if "widgets" in notebook.metadata:
        yield "it holds the state of widgets, which hides the static pictures"


@rule
def outputs_are_stored(notebook):
    """At least a third of the cells show something, and every cell ends with a plain statement.

    A notebook whose outputs were removed passes nbval when the counts were removed too.
    """
    code = code_cells(notebook)
    shown = sum(bool(cell.outputs) for cell in code)
    if shown * 3 < len(code):
        yield f"only {shown} of {len(code)} code cells have an output"
    for cell in code:
        if any(output.get("name") == "stderr" for output in cell.outputs):
            yield f"{name_of(cell)} stores a message on stderr"
        if "print(" in _top_level(cell) and not cell.outputs:
            yield f"{name_of(cell)} prints, but no output is stored"


def _top_level(cell):
    return "\n".join(line for line in cell.source.split("\n") if not line.startswith((" ", "#")))


@rule
def tags_are_known(notebook):
    """A misspelt tag would silently do nothing."""
    for cell in notebook.cells:
        for tag in set(tags(cell)) - KNOWN_TAGS:
            yield f"{name_of(cell)} has the unknown tag {tag!r}"
        if re.search(r"^\s*#\s*(?:NBVAL_|PYTEST_VALIDATE)", cell.source, re.M):
            yield f"{name_of(cell)} tells nbval by a comment: use a tag"


@rule
def what_varies_is_asserted(notebook):
    """A cell whose output is not compared asserts something, or the next code cell does."""
    code = code_cells(notebook)
    for cell, after in zip(code, [*code[1:], None], strict=True):
        if "nbval-ignore-output" in tags(cell) and not (_asserts(cell) or _asserts(after)):
            yield f"{name_of(cell)} is not compared and nothing is asserted about it"


def _asserts(cell):
    return cell is not None and any(isinstance(n, ast.Assert) for n in ast.walk(tree_of(cell)))


@rule
def cells_are_short(notebook):
    lengths = [lines_of(cell) for cell in code_cells(notebook)]
    if median(lengths) > MEDIAN_LINES:
        yield f"half of its code cells have more than {median(lengths):g} lines"
    for cell, length in zip(code_cells(notebook), lengths, strict=True):
        if length > MOST_LINES:
            yield f"{name_of(cell)} has {length} lines"


@rule
def prose_between_code(notebook):
    row = 0
    for cell in notebook.cells:
        row = row + 1 if cell.cell_type == "code" else 0
        if row == MOST_CODE_IN_A_ROW + 1:
            yield f"{name_of(cell)} is code cell number {row} without prose between"


@rule
def pictures_have_words(notebook):
    """Every picture has a text that replaces it, and a caption."""
    for position, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if not any(kind.startswith("image/") for kind in data):
                continue
            text = data.get("text/plain", "")
            if len(text) <= 20 or re.match(r"<\S+ |\w+\(", text):
                yield f"{name_of(cell)} shows a picture whose text is {text[:40]!r}"
            if not _captioned(notebook.cells, position):
                yield f"{name_of(cell)} shows a picture without a caption 'Figure N. …'"


def _captioned(cells, position):
    beside = [cell.source for cell in cells[position + 1 : position + 2]]
    beside += [o.get("data", {}).get("text/markdown", "") for o in cells[position].outputs]
    return any(re.search(r"\*Figure \d+\.", text) for text in beside)


@rule
def few_names_from_helpers(notebook):
    names = set()
    for cell in code_cells(notebook):
        for node in ast.walk(tree_of(cell)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers"):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {a.name for a in node.names if a.name.startswith("helpers")}
    if "*" in names:
        yield "it imports * from helpers"
    if len(names) > MOST_HELPER_NAMES:
        yield f"it imports {len(names)} names from helpers: {', '.join(sorted(names))}"


@rule
def light_enough(notebook):
    size = len(nbformat.writes(notebook).encode())
    if size > MOST_BYTES:
        yield f"it has {size:,} bytes"


@rule
def opener_and_closer(notebook):
    text = prose(notebook)
    if not notebook.cells[0].source.startswith("# "):
        yield "it does not begin with its title"
    for what, pattern in HEADINGS.items():
        if not re.search(pattern, text, re.IGNORECASE | re.MULTILINE):
            yield f"it lacks {what}"
    sources = re.split(r"^#{2,3} .*sources", text, flags=re.I | re.M)[-1]
    if not re.search(r"\b(?:19|20)\d\d\b", sources):
        yield "its sources name no year"


@rule
def no_output_widget(notebook):
    """nbval cannot compare what is printed inside of one."""
    for cell in code_cells(notebook):
        if found := re.search(r"\b(?:Output\(|interact\w*\(|clear_output|display_id)", cell.source):
            yield f"{name_of(cell)} uses {found.group().rstrip('(')}"


PATH_CALLS = ("open", "Path", "read_csv", "read_parquet", "load", "loadtxt", "savefig", "save")


@rule
def no_working_directory(notebook):
    """It runs in VS Code and papermill too, whose working directory is another one."""
    for cell in code_cells(notebook):
        if re.search(r"^\s*[%!]|\bgetcwd\b|\bchdir\b|sys\.path\b|\b__file__\b", cell.source, re.M):
            yield f"{name_of(cell)} depends on the shell, the working directory or sys.path"
        for node in ast.walk(tree_of(cell)):
            if isinstance(node, ast.Call) and _called(node) in PATH_CALLS and _relative(node):
                yield f"{name_of(cell)} opens the relative path {node.args[0].value!r}"


def _called(node):
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def _relative(node):
    first = node.args[0] if node.args else None
    is_text = isinstance(first, ast.Constant) and isinstance(first.value, str)
    return is_text and not first.value.startswith(("/", "http"))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(name, notebook):
    assert list(RULES[name](read(notebook))) == []


# ---------------------------------------------------------------- each rule finds its fault

OPENER = (
    "# Title\n\nYou will do this in 20 min. See [worker](../docs/glossary.md#worker).\n\n"
    "## Summary\n\n## Where this is used in practice\n\n## Sources\n\nAuthor (2021)."
)
ALT = "A line that rises from one to four workers."


def picture(alt=ALT):
    return new_output("display_data", data={"image/png": "AAAA", "text/plain": alt})


CAPTION = new_output("display_data", data={"text/markdown": "*Figure 1. Measured.*"})


def printed(words):
    return new_output("stream", name="stdout", text=words)


def good():
    """A notebook without a fault."""
    cells = [
        new_markdown_cell(OPENER),
        new_code_cell("from helpers.classroom.plots import show\nshow()"),
        new_code_cell("print(1)", metadata={"tags": ["nbval-ignore-output"]}),
        new_markdown_cell("One word."),
        new_code_cell("assert 1 < 2"),
    ]
    cells[1].outputs = [picture(), CAPTION]
    cells[2].outputs = [printed("1\n")]
    return clean(new_notebook(cells=cells))


def replaced(position, source, *outputs, tag=None):
    """A change: another code cell, well stored."""

    def change(notebook):
        cell = new_code_cell(source, outputs=list(outputs))
        cell.metadata = {"tags": [tag]} if tag else {}
        notebook.cells[position] = nbformat.from_dict(cell)
        return clean(notebook)

    return change


def edited(old, new):
    """A change of the notebook's file: one text for another."""

    def change(notebook):
        text = json.dumps(notebook)
        assert old in text
        return nbformat.from_dict(json.loads(text.replace(old, new)))

    return change


LONG = "\n".join(["x = 1"] * 26)
NAMES = ", ".join("abcdefghi")
FAULTS = [
    ("stored_clean", edited('"execution_count": 2', '"execution_count": 7'), "not counted"),
    ("stored_clean", edited('"text": "1\\n"', '"text": "tcp://1.2.3.4:5"'), "not in the clean"),
    ("kernel_is_python3", edited('"python3"', '"conda-ann"'), "kernelspec"),
    (
        "kernel_is_python3",
        edited('"metadata": {"kern', '"metadata": {"widgets": {}, "kern'),
        "state",
    ),
    ("outputs_are_stored", replaced(2, "print(1)"), "prints, but no output"),
    (
        "outputs_are_stored",
        replaced(2, "x", new_output("stream", name="stderr", text="Warning")),
        "stderr",
    ),
    ("tags_are_known", replaced(2, "x", tag="nbval-ignore-outputs"), "unknown tag"),
    ("tags_are_known", replaced(2, "# NBVAL_SKIP\nx"), "by a comment"),
    ("what_varies_is_asserted", edited("assert 1 < 2", "1 < 2"), "nothing is asserted"),
    ("cells_are_short", replaced(2, LONG), "has 26 lines"),
    (
        "prose_between_code",
        lambda n: n.cells.insert(1, n.cells[1]) or n.cells.insert(1, n.cells[1]),
        "code cell number 4",
    ),
    ("pictures_have_words", edited(ALT, "<Figure size 640x480 with 1 Axes>"), "whose text is"),
    ("pictures_have_words", edited(ALT, "short"), "whose text is"),
    ("pictures_have_words", edited("*Figure 1.", "*Picture."), "without a caption"),
    ("few_names_from_helpers", replaced(4, "from helpers.nn import *"), "imports *"),
    ("few_names_from_helpers", replaced(4, f"from helpers.nn import {NAMES}"), "10 names"),
    ("light_enough", edited("One word.", "word " * 310_000), "bytes"),
    ("opener_and_closer", edited("# Title", "Title"), "does not begin"),
    ("opener_and_closer", edited("20 min", "no time"), "lacks the time"),
    ("opener_and_closer", edited("## Summary", "## End"), "lacks a summary"),
    ("opener_and_closer", edited("(2021)", ""), "no year"),
    ("no_output_widget", replaced(2, "widgets.Output()"), "uses Output"),
    ("no_output_widget", replaced(2, "@interact(x=1)\ndef f(x): pass"), "uses interact"),
    ("no_working_directory", replaced(2, "%cd .."), "depends on the shell"),
    ("no_working_directory", replaced(2, "open('data/x.csv')"), "relative path"),
    ("no_working_directory", replaced(2, "import sys; sys.path.append('..')"), "sys.path"),
]


@pytest.mark.parametrize("name", RULES)
def test_a_good_notebook_has_no_fault(name):
    assert list(RULES[name](good())) == []


@pytest.mark.parametrize(("name", "change", "words"), FAULTS)
def test_a_fault_is_found(name, change, words):
    notebook = good()
    changed = change(notebook)
    assert any(words in fault for fault in RULES[name](changed or notebook))


def test_every_rule_is_shown_to_find_a_fault():
    assert {name for name, _, _ in FAULTS} == set(RULES)


def test_long_cells_and_missing_outputs_are_found_in_the_median():
    cells = [new_code_cell("\n".join(["x = 1"] * 7)) for _ in range(4)]
    notebook = new_notebook(cells=[new_markdown_cell(OPENER), *cells])
    assert "half of its code cells have more than 7" in next(RULES["cells_are_short"](notebook))
    assert "only 0 of 4" in next(RULES["outputs_are_stored"](notebook))
