"""Answers that check themselves.

A notebook calls ``check("02.1", answer)``. What a right answer is stands in
``helpers/classroom/exercises/nb02.py``: a function with the decorator `exercise` that returns
None for a right answer, and for a wrong one a sentence that says what is wrong.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Exercise:
    """One exercise: what is checked, the hint for a wrong answer, what a right one shows.

    `nothing` is said to a function that returns nothing.
    """

    number: str
    find_fault: Callable[[object], str | None]
    hint: str
    shows: str
    nothing: str = "your function returns nothing: end it with `return` and the value."


_EXERCISES: dict[str, Exercise] = {}


def exercise(number: str, hint: str, shows: str, **words: str):
    """Register the function below as the check of exercise `number` (such as ``"02.1"``)."""

    def register(find_fault):
        _EXERCISES[number] = Exercise(number, find_fault, hint, shows, **words)
        return find_fault

    return register


def exercises_of(notebook: str) -> dict[str, Exercise]:
    """The exercises of notebook ``"02"``, by number. Empty when it has none."""
    name = f"helpers.classroom.exercises.nb{notebook}"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    return {n: e for n, e in _EXERCISES.items() if n.split(".")[0] == notebook}


def check(number: str, answer) -> None:
    """Say whether an answer is right, and if not, what is wrong with it.

    Never raises for a wrong answer, so that a notebook with open exercises runs to its end.

    Parameters
    ----------
    number : str
        Number of the exercise, such as ``"02.1"``.
    answer : object
        A value, or a function that the check calls. ``...`` means: not answered yet.

    Raises
    ------
    KeyError
        There is no exercise of this number.

    Examples
    --------
    >>> check("02.1", ...)
    Exercise 02.1: not answered yet.
    """
    known = exercises_of(number.split(".")[0])
    if number not in known:
        raise KeyError(f"There is no exercise {number}; there are {', '.join(sorted(known))}.")
    print(f"Exercise {number}: {_verdict(known[number], answer)}")


class _NotAnswered(Exception):
    """The reader's function returned ``...``."""


class _ReturnsNothing(Exception):
    """The reader's function has no ``return``."""


def _verdict(exercise: Exercise, answer) -> str:
    if _is_open(answer):
        return "not answered yet."
    if inspect.isroutine(answer):
        answer = _watched(answer)
    try:
        fault = exercise.find_fault(answer)
    except _NotAnswered:
        return "not answered yet."
    except _ReturnsNothing:
        fault = exercise.nothing
    except Exception as error:  # the reader's code failed, or gave a value of another kind
        fault = f"your answer stopped with {type(error).__name__}: {error}."
        if not callable(answer) and "not callable" in str(error):
            fault = "give the function itself, without calling it."
    if fault is None:
        return f"correct. {exercise.shows}"
    return f"not yet: {fault} Hint: {exercise.hint}"


def _is_open(answer) -> bool:
    if isinstance(answer, dict):
        return any(_is_open(value) for value in answer.values())
    if isinstance(answer, (list, tuple)):
        return any(_is_open(value) for value in answer)
    return answer is ... or answer is None


def _watched(function):
    """The reader's function, which tells apart "not written yet" from "wrong"."""

    @functools.wraps(function)
    def watched(*args, **kwargs):
        value = function(*args, **kwargs)
        if value is None:
            raise _ReturnsNothing
        if _is_open(value):
            raise _NotAnswered
        return value

    return watched


def close_to(answer, expected, tolerance: float = 1e-6) -> bool:
    """True when a number or array has the shape of `expected` and its values.

    `tolerance` is relative to the largest expected value.
    """
    expected = np.asarray(expected, dtype=float)
    try:
        answer = np.asarray(answer, dtype=float)
    except (TypeError, ValueError):
        return False
    if answer.shape != expected.shape:
        return False
    scale = max(1e-300, float(np.max(np.abs(expected), initial=0)))
    return bool(np.all(np.abs(answer - expected) <= tolerance * scale))


def known_mistake(got, right, mistakes) -> str | None:
    """The sentence on a typical mistake, where that differs from the right answer.

    Parameters
    ----------
    got, right : number or array
        What the reader's function gave, and what it should give.
    mistakes : sequence of (number or array, str)
        What a typical mistake gives, and what is wrong then.
    """
    for wrong, sentence in mistakes:
        if close_to(got, wrong) and not close_to(wrong, right):
            return sentence
    return None


def check_letters(answers, right: dict[str, str], why: dict[str, str]) -> str | None:
    """Check a quiz: letters by number of the question.

    Parameters
    ----------
    answers : dict
        What the reader chose, such as ``{"1": "b", "2": "a"}``.
    right : dict
        The right letters.
    why : dict
        For each wrong choice (such as ``"1a"``), a sentence that says why it is wrong.

    Returns
    -------
    str or None
        None when all are right, else a sentence on each wrong choice.
    """
    if not isinstance(answers, dict) or set(answers) != set(right):
        return f'give a letter for each of the questions {", ".join(right)}, as {{"1": "a", …}}.'
    faults = []
    for number, letter in answers.items():
        letter = str(letter).strip().lower()
        if not re.fullmatch("[a-z]", letter):
            faults.append(f"question {number}: {letter!r} is not a letter.")
        elif letter != right[number]:
            faults.append(f"question {number}: {why.get(number + letter, 'no such choice.')}")
    return " ".join(faults) or None
