"""Each solution is right, each typical wrong answer is told what is wrong with it."""

import importlib.util
import re

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.classroom.checks import check, exercises_of
from tests.validation import (
    NOTEBOOKS,
    ROOT,
    execute,
    exercise_numbers,
    leftovers,
    printed,
    read,
    refused,
    solved,
    tags,
)

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
# Each notebook is run with its stored answers by the quick suite; with its solutions too, that
# would take more than the 20 minutes a build has. The first three stand for the others there.
each_notebook_the_later_ones_slowly = pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem >= "03" else [])
        for path in NOTEBOOKS
    ],
)
MINUTES = re.compile(r"^#{2,4} .*\(\d+ min\)", re.MULTILINE)


def wrong_answers(number):
    """The typical wrong answers of notebook ``"02"``: {exercise: [(answer, words), …]}."""
    path = ROOT / "tests" / "wrong_answers" / f"nb{number}.py"
    if not path.exists():
        return {}
    spec = importlib.util.spec_from_file_location(f"wrong_answers_{number}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WRONG


def verdicts(notebook):
    """The lines that the checks of an executed notebook printed, by exercise."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for number, verdict in re.findall(r"^Exercise (\S+): (.*)$", printed(cell), re.M):
                found.setdefault(number, []).append(verdict)
    return found


# ---------------------------------------------------------------- solutions


@each_notebook_the_later_ones_slowly
def test_every_solution_is_right_and_the_notebook_runs_with_them(notebook, short_folder):
    """From another working directory, offline, warnings of helpers as errors."""
    run, environment = execute(solved(read(notebook)), short_folder)
    assert not_correct(run) == []
    assert refused(environment) == []
    assert leftovers(environment) == []


@pytest.mark.slow
@pytest.mark.parametrize("notebook", [path for path in NOTEBOOKS if path.stem.startswith("02")])
def test_solutions_are_right_after_run_all_too(notebook, short_folder):
    """Readers run all cells first and then go back to the exercises: names must still hold."""
    whole = read(notebook)
    late = [cell for cell in solved(read(notebook)).cells if "exercise" in tags(cell)]
    for cell in late:
        cell["id"] += "-b"
    run, _ = execute(nbformat.from_dict(whole | {"cells": whole.cells + late}), short_folder)
    run.cells = run.cells[len(whole.cells) :]
    assert not_correct(run) == []


def not_correct(run):
    """A sentence for each exercise of a run notebook that its check does not call correct."""
    found = verdicts(run)
    return [
        f"{number}: {found.get(number, 'its check printed nothing')}"
        for number in exercise_numbers(run)
        if not found.get(number)
        or not all(verdict.startswith("correct") for verdict in found[number])
    ]


@each_notebook
def test_without_solutions_every_exercise_is_open(notebook):
    run = read(notebook)
    found = verdicts(run)
    assert sorted(found) == sorted(set(exercise_numbers(run)))
    for number, lines in found.items():
        assert all(line.startswith("not answered yet") for line in lines), f"{number}: {lines}"


# ---------------------------------------------------------------- wrong answers

WRONG = [
    pytest.param(exercise, answer, words, id=f"{exercise}-{position}")
    for path in NOTEBOOKS
    for exercise, cases in wrong_answers(path.name[:2]).items()
    for position, (answer, words) in enumerate(cases, start=1)
]


def verdict_on(exercise, answer, capsys):
    """What the check prints about one answer."""
    capsys.readouterr()
    check(exercise, answer)
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(("exercise", "answer", "words"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(exercise, answer, words, capsys):
    verdict = verdict_on(exercise, answer, capsys)
    assert words
    assert words in verdict
    assert verdict.startswith(f"Exercise {exercise}: not yet")
    assert "correct." not in verdict
    assert "\n" not in verdict


@each_notebook
def test_every_exercise_names_three_wrong_answers_apart(notebook, capsys):
    number = notebook.name[:2]
    wrong = wrong_answers(number)
    assert sorted(wrong) == sorted(exercises_of(number))
    for exercise, cases in wrong.items():
        said = {verdict_on(exercise, answer, capsys) for answer, _ in cases}
        assert len(cases) >= 3, f"{exercise} has {len(cases)} wrong answers, it needs three"
        assert len(said) == len(cases), f"{exercise}: two wrong answers get the same sentence"


# ---------------------------------------------------------------- form of the exercises


def form_faults(notebook, number):
    """One sentence for each fault in the form of a notebook's exercises."""
    faults = []
    numbers = exercise_numbers(notebook)
    registered = sorted(exercises_of(number))
    if sorted(numbers) != registered:
        faults.append(f"checks {sorted(numbers)}, but registered are {registered}")
    if sum(not n.endswith("quiz") for n in numbers) < 4:
        faults.append("has fewer than four exercises")
    if f"{number}.quiz" not in numbers:
        faults.append("has no quiz")
    for position, cell in enumerate(notebook.cells):
        checks = exercise_numbers(new_notebook(cells=[cell]))
        if bool(checks) != ("exercise" in tags(cell)):
            faults.append(f"{cell.source[:50]!r}: tag `exercise` and a check( line go together")
        if checks:
            before, after = _around(notebook.cells, position)
            faults += [f"{checks[0]}: {fault}" for fault in _faults_around(checks, before, after)]
    return faults


def _around(cells, position):
    """The prose before an exercise, and the prose from it to the next code cell."""
    start = end = position
    while start > 0 and cells[start - 1].cell_type == "markdown":
        start -= 1
    while end + 1 < len(cells) and cells[end + 1].cell_type == "markdown":
        end += 1
    return cells[start:position], cells[position + 1 : end + 1]


def _faults_around(checks, before, after):
    if not any(MINUTES.search(cell.source) for cell in before):
        yield "no heading with its minutes, such as '(5 min)', stands before it"
    text = "\n".join(cell.source for cell in after)
    if "<summary>Hint" not in text and not checks[0].endswith("quiz"):
        yield "no hint follows it"
    solutions = [cell for cell in after if "solution" in tags(cell)]
    if len(solutions) != 1 or "<summary>Solution" not in solutions[0].source:
        yield "no collapsed solution follows it"


@each_notebook
def test_the_exercises_have_their_form(notebook):
    assert form_faults(read(notebook), notebook.name[:2]) == []


# ---------------------------------------------------------------- the tests above can fail

SOLUTION = (
    "<details><summary>Solution</summary>\n\n```python\nanswer = {answer}\n```\n\n"
    "Because.\n\n</details>"
)
STUB = "answer = ...\nother = 1\ncheck('99.1', answer)"


def made_up(answer="2", heading="### Exercise 99.1 · Two (5 min)", stub=STUB, hint="Hint"):
    """A small notebook whose check stands in the notebook itself."""
    define = (
        "def check(number, answer):\n"
        "    print(f'Exercise {number}:', 'correct.' if answer == 2 else 'not yet: no')"
    )
    return new_notebook(
        cells=[
            new_code_cell(define),
            new_markdown_cell(heading),
            new_code_cell(stub, metadata={"tags": ["exercise"]}),
            new_markdown_cell(f"<details><summary>{hint}</summary>Think.</details>"),
            new_markdown_cell(SOLUTION.format(answer=answer), metadata={"tags": ["solution"]}),
        ]
    )


def test_a_solution_replaces_all_above_the_check():
    notebook = made_up()
    after = solved(notebook)
    assert after.cells[2].source == "answer = 2\ncheck('99.1', answer)"
    assert notebook.cells[2].source == STUB


@pytest.mark.parametrize(("answer", "right"), [("2", True), ("3", False)])
def test_a_wrong_solution_is_found(answer, right, short_folder):
    run, _ = execute(solved(made_up(answer)), short_folder)
    assert (not_correct(run) == []) is right


def test_a_solution_that_raises_is_found(short_folder):
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(solved(made_up("1 / 0")), short_folder)


def test_a_solution_without_code_or_exercise_is_found():
    without_code = made_up()
    without_code.cells[-1].source = "<details><summary>Solution</summary>Two.</details>"
    with pytest.raises(ValueError, match="no ```python block"):
        solved(without_code)
    alone = made_up()
    del alone.cells[2]
    with pytest.raises(ValueError, match="no exercise before it"):
        solved(alone)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"heading": "### Exercise 99.1 · Two"}, "no heading with its minutes"),
        ({"hint": "More"}, "no hint follows it"),
        ({"stub": "answer = ..."}, "tag `exercise` and a check( line go together"),
    ],
)
def test_a_fault_of_form_is_found(change, fault):
    assert any(fault in sentence for sentence in form_faults(made_up(**change), "99"))


def test_a_missing_solution_quiz_and_registration_are_found():
    notebook = nbformat.from_dict(made_up())
    del notebook.cells[-1]
    faults = "; ".join(form_faults(notebook, "99"))
    for words in ("no collapsed solution", "has no quiz", "fewer than four", "registered are []"):
        assert words in faults
