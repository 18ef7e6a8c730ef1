"""Exercises of notebook 07, Task parallelism."""

from __future__ import annotations

import math

from helpers.classroom.checks import check_letters, close_to, exercise


def _fault(answer, cases, right, mistakes, words):
    """The sentence on a typical mistake, else on the first wrong case; None if all is right.

    Parameters
    ----------
    answer, right : callable
        The reader's function and the right one.
    cases : sequence of tuple
        Arguments to call them with.
    mistakes : sequence of (callable, str)
        Wrong functions, and what to say on them.
    words : callable
        ``words(case)`` names the arguments.
    """
    got = [answer(*case) for case in cases]
    good = [right(*case) for case in cases]
    if all(close_to(a, b) for a, b in zip(got, good)):
        return None
    for wrong, sentence in mistakes:
        if all(close_to(a, wrong(*case)) for a, case in zip(got, cases)):
            return sentence
    for case, a, b in zip(cases, got, good):
        if not close_to(a, b):
            return f"for {words(case)} it should be {b:g}, not {a}."
    return None


# ---------------------------------------------------------------- 07.1: the end of the queue


def _queue(lengths, workers, overhead):
    free = [0.0] * workers
    for seconds in lengths:
        first = free.index(min(free))
        free[first] += overhead + seconds
    return max(free)


def _in_turn(lengths, workers, overhead):
    """Task t to worker t mod m, whoever is free."""
    return max(sum(overhead + x for x in lengths[w::workers]) for w in range(workers))


def _blocks(lengths, workers, overhead):
    n, ends = len(lengths), range(workers)
    parts = [lengths[n * w // workers : n * (w + 1) // workers] for w in ends]
    return max(sum(overhead + x for x in part) for part in parts)


_QUEUES = (
    ([5, 1, 1, 1, 4, 2, 3], 2, 0.25),
    ([3, 1, 1, 1, 1, 1, 6], 3, 0.5),
    ([9, 8, 1, 1], 2, 0.5),
    ([1, 2, 3, 4], 1, 0.0),
    ([7], 4, 1.0),
    ([], 2, 0.5),
)


@exercise(
    "07.1",
    hint="Keep a list of when each worker is free. The smallest of them grows by each task.",
    shows="Nobody waits while a task is left: that is why a queue is never very bad.",
)
def end_of_the_queue(answer):
    """Exercise 07.1: the makespan of list scheduling, with an overhead."""
    given = [1, 2, 3]
    answer(given, 2, 0.0)
    if given != [1, 2, 3]:
        return "your function changes the list that it was given."
    mistakes = (
        (lambda x, m, o: _queue(x, m, 0), "the overhead is missing: each task has one."),
        (lambda x, m, o: _queue(x, m, 0) + o, "there is an overhead for each task, not only one."),
        (
            lambda x, m, o: (sum(x) + o * len(x)) / m,
            "this is the fair share; tasks are never divided.",
        ),
        (lambda x, m, o: sum(x) + o * len(x), "this is the work of all; the workers share it."),
        (
            lambda x, m, o: _queue(sorted(x, reverse=True), m, o),
            "this is longest first; keep the order of the list.",
        ),
        (
            lambda x, m, o: _queue(sorted(x), m, o),
            "this is shortest first; keep the order of the list.",
        ),
        (_in_turn, "here the tasks go round in turn; the next one goes to whoever is free first."),
        (_blocks, "these are static blocks, not a queue."),
    )
    return _fault(
        lambda x, m, o: answer(list(x), m, o),
        _QUEUES,
        _queue,
        mistakes,
        lambda case: "tasks of {} s on {} workers with {} s of overhead".format(*case),
    )


# ---------------------------------------------------------------- 07.2: the best batch


def _batches(lengths, b):
    return [sum(lengths[k : k + b]) for k in range(0, len(lengths), b)]


def _least(lengths, time_of):
    return min(range(1, len(lengths) + 1), key=time_of)


def _best_batch(lengths, workers, overhead):
    return _least(lengths, lambda b: _queue(_batches(lengths, b), workers, overhead))


def _last_of_the_best(lengths, workers, overhead):
    def key(b):
        return _queue(_batches(lengths, b), workers, overhead), -b

    return _least(lengths, key)


def _as_if_equal(lengths, workers, overhead):
    return math.ceil(len(lengths) / workers)


_UNEQUAL = [4, 4, 4, 4, 60, 4, 4, 4, 40, 4, 4, 4, 4, 4, 30, 4, 4, 4, 4, 4, 4, 4, 4, 20]


@exercise(
    "07.2",
    hint="Make the list of batches, each the sum of its tasks, and give it to `end` of 07.1.",
    shows="Equal tasks: one batch a worker. Unequal ones: smaller batches, until overhead counts.",
)
def best_batch(answer):
    """Exercise 07.2: the batch with the shortest predicted time."""
    cases = (
        ([4] * 64, 2, 2),
        (_UNEQUAL, 2, 2),
        (_UNEQUAL, 3, 2),
        (_UNEQUAL, 2, 50),
        (list(range(20)), 4, 1),
        ([1, 1, 1, 1], 3, 0),
        ([5], 3, 1),
    )
    mistakes = (
        (lambda x, m, o: len(x), "with all tasks in one batch one worker does them all."),
        (lambda x, m, o: 1, "batches of one pay the whole overhead; try larger ones."),
        (_as_if_equal, "one batch a worker is best for equal tasks; here lengths differ."),
        (
            lambda x, m, o: _least(x, lambda b: _queue(_batches(x, b), m, 0)),
            "the overhead is missing: each batch has one.",
        ),
        (
            lambda x, m, o: _least(x, lambda b: _queue(_batches(x, b), m, b * o)),
            "a batch has one overhead, not one for each of its tasks.",
        ),
        (
            lambda x, m, o: _least(x, lambda b: sum(_batches(x, b)) + o * len(_batches(x, b))),
            "this is the work of all; the workers share it.",
        ),
        (_last_of_the_best, "if several are equally good, return the smallest."),
    )
    return _fault(
        lambda x, m, o: answer(list(x), m, o),
        cases,
        _best_batch,
        mistakes,
        lambda case: "tasks of {} ms on {} workers with {} ms of overhead".format(*case),
    )


# ---------------------------------------------------------------- 07.3: the work of halving


def _rungs(trials, least, most, factor, fewest=1):
    found, budget = [], least
    while budget <= most:
        found.append((trials, budget))
        trials, budget = max(fewest, trials // factor), budget * factor
    return found


def _over_rungs(work):
    """A function that adds up ``work(trials, budget, case)`` over the rungs."""
    return lambda *case: sum(work(n, budget, case) for n, budget in _rungs(*case))


@exercise(
    "07.3",
    hint="On each rung: how many trials are left, times the budget of the rung. Add the rungs up.",
    shows="All rungs cost about the same: their number decides what share of a full search it is.",
)
def work_of_halving(answer):
    """Exercise 07.3: rows trained on by successive halving."""
    cases = (
        (27, 100, 2700, 3),
        (64, 4, 256, 4),
        (10, 1, 8, 2),
        (5, 10, 10, 2),
        (11, 1, 4, 4),
        (4, 1, 16, 2),
    )
    right = _over_rungs(lambda n, b, case: n * b)
    mistakes = (
        (
            lambda t, least, most, f: t * most,
            "this is the full search: all trials with the whole budget.",
        ),
        (lambda t, least, most, f: t * least, "this is the first rung alone."),
        (
            _over_rungs(lambda n, b, case: n * b * (b * case[3] <= case[2])),
            "the last rung, with the whole budget, is missing.",
        ),
        (
            _over_rungs(lambda n, b, case: case[0] * b),
            "poor trials are stopped: fewer on each rung.",
        ),
        (
            lambda t, least, most, f: sum(n * b for n, b in _rungs(t, least, most, f, fewest=0)),
            "at least one trial goes on, up to the whole budget.",
        ),
        (_over_rungs(lambda n, b, case: n * case[1]), "the budget grows from rung to rung."),
        (_over_rungs(lambda n, b, case: n), "these are the jobs; each costs its budget."),
        (
            lambda *case: right(*case) / (case[0] * case[2]),
            "give the work itself, not its share of the full search.",
        ),
        (
            _over_rungs(lambda n, b, case: n * (b - b // case[3] * (b > case[1]))),
            "here every rung goes on from the last; each job trains from the beginning.",
        ),
    )
    return _fault(
        answer,
        cases,
        right,
        mistakes,
        lambda case: "{} trials, budgets from {} to {} and factor {}".format(*case),
    )


# ---------------------------------------------------------------- 07.4: who may go on


_RUNGS = (
    # losses of the rung, who has gone on already, factor
    ({0: 0.5, 1: 0.4}, set(), 3),
    ({0: 0.5, 1: 0.4, 2: 0.6}, set(), 3),
    ({0: 0.5, 1: 0.4, 2: 0.6, 3: 0.7, 4: 0.3}, {1}, 3),
    ({0: 0.5, 1: 0.4, 2: 0.6, 3: 0.7, 4: 0.3, 5: 0.9}, {1}, 3),
    ({0: 0.5, 1: 0.4, 2: 0.6, 3: 0.7, 4: 0.3, 5: 0.9}, {1, 4}, 3),
    ({7: 0.2, 3: 0.1, 9: 0.3, 8: 0.4}, {3}, 2),
    ({0: 0.1, 1: 0.4, 2: 0.6}, set(), 3),
    ({0: 0.5, 1: 0.4, 2: 0.6, 3: 0.7, 4: 0.3, 5: 0.9}, set(), 3),
    ({}, set(), 2),
)


def _promotable(losses, gone, factor, size=None, first=min):
    size = len(losses) // factor if size is None else size
    best = sorted(losses, key=losses.get)[:size]
    left = [trial for trial in best if trial not in gone]
    return first(left, key=losses.get) if left else "nobody"


@exercise(
    "07.4",
    hint="Sort the trials by loss, take the first len(losses) // factor, leave out who has gone.",
    shows="Nobody waits for a rung to be full: that is all that is asynchronous about ASHA.",
)
def promotable(answer):
    """Exercise 07.4: which trial of a rung may go on, by ASHA's rule."""
    share_is_left_out = all(
        answer(dict(losses), set(gone), factor) == _promotable(losses, gone, factor, len(losses))
        for losses, gone, factor in _RUNGS
    )
    for losses, gone, factor in _RUNGS:
        given = dict(losses), set(gone)
        got = answer(given[0], given[1], factor)
        if given != (losses, gone):
            return "your function changes what it was given."
        right = _promotable(losses, gone, factor)
        if got == right:
            continue
        where = f"for the losses {losses}, gone {gone or '{}'} and factor {factor}: "
        rest = {trial: loss for trial, loss in losses.items() if trial not in gone}
        up = -(-len(losses) // factor)
        if got in gone:
            return where + "this trial has gone on already; nobody goes twice."
        if rest and got == max(rest, key=rest.get):
            return where + "this is the trial with the largest loss; a smaller loss is better."
        if share_is_left_out:
            return where + "the best that is left need not be in the best share of the rung."
        if got == _promotable(losses, gone, factor, size=up):
            return where + "the best share is rounded down: among few results nobody goes on yet."
        if got == _promotable(rest, set(), factor):
            return where + "the share is one of all trials of the rung, also of those gone."
        if got == _promotable(losses, gone, factor, first=max):
            return where + "of those that may go on, the best one goes."
        if got == "nobody":
            return where + f"trial {right} is in the best share and may go on now; nobody waits."
        return where + f"it should be {right!r}, not {got!r}."
    return None


# ---------------------------------------------------------------- 07.5: each result once


_DELIVERIES = (
    [("a", 1.0, None), ("b", 2.0, None)],
    [("a", 1.0, None), ("a", 9.0, None), ("b", 2.0, None)],
    [("a", "?", "its worker died"), ("b", 2.0, None), ("a", 1.0, None)],
    [("b", 0.0, None), ("a", "?", "no"), ("a", "?", "no")],
    [("b", 0.0, None), ("b", 3.0, None)],
    [("a", 1.0, None), ("a", "?", "its worker died")],
    [],
)


def _once(deliveries):
    found = {}
    for task, value, error in deliveries:
        if error is None and task not in found:
            found[task] = value
    return found


def _good(deliveries):
    return [(task, value) for task, value, error in deliveries if error is None]


def _of_the_first_try(deliveries):
    first = {}
    for task, value, error in deliveries:
        first.setdefault(task, (value, error))
    return {task: value for task, (value, error) in first.items() if error is None}


def _of_the_last_try(deliveries):
    found = {}
    for task, value, error in deliveries:
        if error is not None:
            found.pop(task, None)
        else:
            found.setdefault(task, value)
    return found


_SLIPS = (
    (
        lambda d: dict(_good(d)),
        "a late second result replaces the first; the first one counts.",
    ),
    (
        lambda d: {task: sum(v for t, v in _good(d) if t == task) for task, _ in _good(d)},
        "the results of one task are added up: it is counted twice.",
    ),
    (
        lambda d: {task: [v for t, v in _good(d) if t == task] for task, _ in _good(d)},
        "some task has a list of results; the first one alone counts.",
    ),
    (
        lambda d: _once([one for one in d if one[1]]),
        "the value 0 is a result, too: ask whether `error is None`.",
    ),
    (_of_the_first_try, "a task that failed at first and then succeeded is missing."),
    (
        _of_the_last_try,
        "a good result is lost since an error came later; what has been fetched stays.",
    ),
)


@exercise(
    "07.5",
    hint="Go through the deliveries in order; take one only if it is no error and its task is new.",
    shows="With this rule a task may run as often as it likes: its result counts once.",
)
def each_result_once(answer):
    """Exercise 07.5: the first good result of each task."""
    got = [answer(list(deliveries)) for deliveries in _DELIVERIES]
    if not all(isinstance(found, dict) for found in got):
        return "return a dict: {task: value}."
    if any("?" in found.values() for found in got):
        return "a task that has failed is there with its value: leave errors out."
    for slip, sentence in _SLIPS:
        if got == [slip(deliveries) for deliveries in _DELIVERIES]:
            return sentence
    for deliveries, found in zip(_DELIVERIES, got):
        if found != _once(deliveries):
            return f"for {deliveries} it should be {_once(deliveries)}, not {found}."
    return None


# ---------------------------------------------------------------- the quiz


@exercise(
    "07.quiz",
    hint="Sections 2, 3, 4 and 6.",
    shows="The tasks are simple; what is hard are the last one, the poor one and the lost one.",
)
def quiz(answers):
    """The quiz of notebook 07."""
    right = {"1": "c", "2": "a", "3": "b", "4": "b", "5": "c"}
    why = {
        "1a": "blocks are fixed beforehand: the giant's block also has other tasks.",
        "1b": "a queue gets to the giant in the order of the list, maybe at the very end.",
        "2b": "in batches of 100 there are three messages, not 250.",
        "2c": "it sees them: a batch is a task of Dask.",
        "3a": "halving trains the survivors longest; the cost is not in question here.",
        "3c": "it is not about the workers: halving is misled on a single one as well.",
        "4a": "the rungs are the same; who waits differs.",
        "4c": "ASHA decides with fewer results, so it errs a little more often.",
        "5a": "the worker has died, not its task: the others can run it.",
        "5b": "the task may be run twice; its result counts once.",
    }
    return check_letters(answers, right, why)
