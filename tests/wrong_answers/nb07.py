"""Typical wrong answers to the exercises of notebook 07, and a piece of what the check says."""

import math


def _queue(lengths, workers, overhead):
    free = [0.0] * workers
    for seconds in lengths:
        first = free.index(min(free))
        free[first] += overhead + seconds
    return max(free)


def _pops(lengths, workers, overhead):
    free = [0.0] * workers
    while lengths:
        free[free.index(min(free))] += overhead + lengths.pop(0)
    return max(free)


def _round(lengths, workers, overhead):
    return max(sum(x + overhead for x in lengths[w::workers]) for w in range(workers))


def _blocks(lengths, workers, overhead):
    n = len(lengths)
    parts = [lengths[n * w // workers : n * (w + 1) // workers] for w in range(workers)]
    return max(sum(x + overhead for x in part) for part in parts)


def _best_batch(lengths, workers, overhead, each=False, last=False):
    def key(b):
        batches = [sum(lengths[k : k + b]) for k in range(0, len(lengths), b)]
        return _queue(batches, workers, overhead * (b if each else 1)), -b * last

    return min(range(1, len(lengths) + 1), key=key)


def _rungs(trials, least, most, factor, fewest=1, down=int):
    found = []
    while least <= most:
        found.append((trials, least))
        trials, least = max(fewest, down(trials / factor)), least * factor
    return found


def _best(losses, gone, size, key=None):
    best = sorted(losses, key=key or losses.get)[:size]
    return next((trial for trial in best if trial not in gone), "nobody")


def _last(losses, gone, size):
    best = [trial for trial in sorted(losses, key=losses.get)[:size] if trial not in gone]
    return best[-1] if best else "nobody"


def _rest(losses, gone):
    return {trial: loss for trial, loss in losses.items() if trial not in gone}


def _changes(losses, gone, factor):
    found = _best(losses, gone, len(losses) // factor)
    gone.add(found)
    return found


def _good(deliveries):
    return [(task, value) for task, value, error in deliveries if error is None]


def _with_errors(deliveries):
    found = {}
    for task, value, _ in deliveries:
        found.setdefault(task, value)
    return found


def _sums(deliveries):
    found = {}
    for task, value in _good(deliveries):
        found[task] = found.get(task, 0) + value
    return found


def _lists(deliveries):
    found = {}
    for task, value in _good(deliveries):
        found.setdefault(task, []).append(value)
    return found


def _first_try(deliveries):
    first = {}
    for task, value, error in deliveries:
        first.setdefault(task, (value, error))
    return {task: value for task, (value, error) in first.items() if error is None}


def _truthy(deliveries):
    found = {}
    for task, value in _good(deliveries):
        if value and task not in found:
            found[task] = value
    return found


def _forgets(deliveries):
    found = {}
    for task, value, error in deliveries:
        if error is None:
            found.setdefault(task, value)
        else:
            found.pop(task, None)
    return found


WRONG = {
    "07.1": [
        (lambda x, m, o: _queue(x, m, 0), "the overhead is missing"),
        (lambda x, m, o: _queue(x, m, 0) + o, "not only one"),
        (lambda x, m, o: (sum(x) + o * len(x)) / m, "fair share"),
        (lambda x, m, o: sum(x) + o * len(x), "the workers share it"),
        (lambda x, m, o: _queue(sorted(x, reverse=True), m, o), "longest first"),
        (lambda x, m, o: _queue(sorted(x), m, o), "shortest first"),
        (_round, "go round in turn"),
        (_blocks, "static blocks"),
        (_pops, "changes the list"),
        (lambda x, m, o: max(x, default=0), "it should be"),
    ],
    "07.2": [
        (lambda x, m, o: len(x), "one worker does them all"),
        (lambda x, m, o: 1, "try larger ones"),
        (lambda x, m, o: math.ceil(len(x) / m), "lengths differ"),
        (lambda x, m, o: _best_batch(x, m, 0), "overhead is missing"),
        (lambda x, m, o: _best_batch(x, m, o, each=True), "one overhead"),
        (lambda x, m, o: _best_batch(x, m, o, last=True), "return the smallest"),
        (lambda x, m, o: min(len(x), math.ceil(len(x) / m) + 1), "it should be"),
    ],
    "07.3": [
        (lambda n, a, z, f: n * z, "the full search"),
        (lambda n, a, z, f: n * a, "first rung alone"),
        (lambda n, a, z, f: sum(t * b for t, b in _rungs(n, a, z, f)[:-1]), "whole budget, is"),
        (lambda n, a, z, f: sum(n * b for _, b in _rungs(n, a, z, f)), "stopped"),
        (lambda n, a, z, f: sum(t * a for t, _ in _rungs(n, a, z, f)), "the budget grows"),
        (lambda n, a, z, f: sum(t for t, _ in _rungs(n, a, z, f)), "these are the jobs"),
        (
            lambda n, a, z, f: sum(t * b for t, b in _rungs(n, a, z, f)) / (n * z),
            "give the work itself",
        ),
        (
            lambda n, a, z, f: sum(t * (b - b // f * (b > a)) for t, b in _rungs(n, a, z, f)),
            "from the beginning",
        ),
        (lambda n, a, z, f: sum(t * b for t, b in _rungs(n, a, z, f, 0)), "at least one"),
        (lambda n, a, z, f: sum(t * b for t, b in _rungs(n, a, z, f, down=round)), "it should be"),
        (lambda n, a, z, f: n * a * f, "it should be"),
    ],
    "07.4": [
        (lambda x, gone, f: _best(_rest(x, gone), set(), len(x)), "need not be in the best share"),
        (lambda x, gone, f: _best(x, gone, len(x) // f) or "nobody", "may go on now"),
        (lambda x, gone, f: _last(x, gone, len(x) // f), "the best one goes"),
        (lambda x, gone, f: _best(x, set(), len(x) // f), "nobody goes twice"),
        (lambda x, gone, f: _best(x, gone, len(x), lambda t: -x[t]), "largest loss"),
        (lambda x, gone, f: _best(x, gone, -(-len(x) // f)), "rounded down"),
        (lambda x, gone, f: _best(r := _rest(x, gone), set(), len(r) // f), "also of those gone"),
        (lambda x, gone, f: "nobody", "nobody waits"),
        (_changes, "changes what it was given"),
    ],
    "07.5": [
        (lambda d: dict(_good(d)), "replaces the first"),
        (_with_errors, "leave errors out"),
        (_sums, "added up"),
        (_lists, "a list of results"),
        (_first_try, "is missing"),
        (_truthy, "the value 0 is a result"),
        (_forgets, "an error came later"),
        (lambda d: len(_good(d)), "return a dict"),
    ],
    "07.quiz": [
        ({"1": "a", "2": "a", "3": "b", "4": "b", "5": "c"}, "fixed beforehand"),
        ({"1": "b", "2": "a", "3": "b", "4": "b", "5": "c"}, "order of the list"),
        ({"1": "c", "2": "b", "3": "b", "4": "b", "5": "c"}, "three messages, not 250"),
        ({"1": "c", "2": "c", "3": "b", "4": "b", "5": "c"}, "a batch is a task of Dask"),
        ({"1": "c", "2": "a", "3": "a", "4": "b", "5": "c"}, "not in question"),
        ({"1": "c", "2": "a", "3": "b", "4": "a", "5": "c"}, "the rungs are the same"),
        ({"1": "c", "2": "a", "3": "b", "4": "c", "5": "c"}, "errs a little more"),
        ({"1": "c", "2": "a", "3": "b", "4": "b", "5": "a"}, "the others can run it"),
        ({"1": "c", "2": "a", "3": "b", "4": "b", "5": "b"}, "counts once"),
        ({"1": "c"}, "give a letter"),
    ],
}
