"""Exercises of notebook 03, Data parallelism."""

from __future__ import annotations

import numpy as np

from helpers.classroom.checks import check_letters, close_to, exercise
from helpers.engine import spmd
from helpers.engine.mesh import Mesh

PATIENCE = 1.0
"""Seconds after which a rank of a wrong answer that waits in vain gives up."""

# ---------------------------------------------------------------- 03.1: means of gradients


@exercise(
    "03.1",
    hint="Make each mean a sum again, add the sums, divide once; leave out what has no rows.",
    shows="Sums of shards add up; means do not, and an empty shard adds nothing.",
)
def combine_means(answer):
    """Exercise 03.1: the mean gradient of all rows from those of the shards."""
    random = np.random.default_rng(1)
    means, sizes = [random.normal(size=3) for _ in range(3)], [10, 30, 60]
    sums = [n * g for g, n in zip(means, sizes, strict=True)]
    right = sum(sums) / 100
    mistakes = (
        (
            np.mean(means, axis=0),
            "this is the mean of the means: a row of a small shard counts more.",
        ),
        (sum(means), "this is the sum of the means: give each its number of rows as a weight."),
        (sum(sums), "this is the sum over all rows; divide it by the number of all rows."),
        (sum(sums) / 3, "you divided by the number of shards; divide by the number of all rows."),
        (
            sum(g / n for g, n in zip(means, sizes, strict=True)),
            "you divided each mean by its rows; multiply, since a mean times n is a sum.",
        ),
    )
    got = answer([g.copy() for g in means], list(sizes))
    for wrong, sentence in mistakes:
        if close_to(got, wrong, 1e-9):
            return sentence
    if not close_to(got, right, 1e-9):
        return f"for shards of 10, 30 and 60 rows it should be {right.round(3)}, not {got}."
    with np.errstate(all="ignore"):
        got = answer([np.full(3, np.nan), *means], [0, *sizes])
    if not close_to(got, right, 1e-9):
        return "a shard without rows spoils it: 0 times nan is nan, so leave such a shard out."
    return None


# ---------------------------------------------------------------- 03.2: bytes of a ring


@exercise(
    "03.2",
    hint="There are two halves of p − 1 steps; in each step a rank sends one part of p.",
    shows="However many ranks there are, each sends less than twice the array.",
)
def bytes_of_a_ring(answer):
    """Exercise 03.2: bytes that one rank sends in a ring all-reduce."""
    p, n = 5, 1000.0
    mistakes = {
        (p - 1) * n / p: "this is one half only; after it the finished parts go round.",
        2 * (p - 1) * n: "in each step a rank sends one part, n / p bytes, not the whole array.",
        (p - 1) * n: "in each step a rank sends one part, and there are two halves of p − 1 steps.",
        2 * n: "nearly: each half has p − 1 steps, not p, since a rank's own part stays.",
        2 * p * n: "each half has p − 1 steps, and in each step only a part is sent.",
        2 * n / p: "these are the bytes of two steps; there are 2 (p − 1).",
    }
    got = answer(p, n)
    for wrong, sentence in mistakes.items():
        if close_to(got, wrong, 1e-9):
            return sentence
    for p, n in ((5, 1000.0), (2, 8.0), (64, 4e9), (1, 100.0)):
        right, got = 2 * (p - 1) * n / p, answer(p, n)
        if not close_to(got, right, 1e-9) and not (right == 0 and got == 0):
            return f"for p = {p} and n = {n:g} it is {right:g} bytes, not {got}."
    return None


# ---------------------------------------------------------------- 03.3: recursive doubling


def _summed(rank, answer):
    """What the reader's function makes of this rank's array; returned or in place."""
    x = np.array([1.0, 10.0**rank.index])
    returned = answer(rank.data, x)
    return x, returned


def _run_doubling(answer, ranks):
    """(in place, returned) by rank, with the reader's function on real ranks."""
    reader = getattr(answer, "__wrapped__", answer)
    run = spmd.run(None, Mesh(data=ranks), _summed, reader, patience=PATIENCE)
    return run.results


@exercise(
    "03.3",
    hint="Partner k ^ d for d = 1, 2, 4, …, as long as d < group.size; exchange, then add.",
    shows="log₂ p exchanges are enough, since what a rank knows doubles each time.",
)
def recursive_doubling(answer):
    """Exercise 03.3: all-reduce by recursive doubling, on real ranks."""
    if not callable(answer):
        return "give a function of a group and an array."
    answer = _not_open(answer)
    for ranks in (2, 4, 8):
        try:
            results = _run_doubling(answer, ranks)
        except spmd.RankError as error:
            return _why_it_failed(error, ranks)
        fault = _fault_of_sums(results, ranks)
        if fault:
            return fault
    return None


def _not_open(answer):
    """Call the reader's function once on a group of one rank, where nothing is exchanged.

    The check's wrapper then says when it is still open. A function that works in place may return
    nothing, which the wrapper would not accept. A partner that does not exist is explained later,
    with more ranks.
    """
    reader = getattr(answer, "__wrapped__", answer)

    def one(rank):
        try:
            if reader(rank.data, np.array([1.0])) is not None:
                answer(rank.data, np.array([1.0]))
        except Exception as error:
            return error
        return None

    (error,) = spmd.run(None, Mesh(data=1), one).results
    if error is not None and not isinstance(error, ValueError):
        raise error
    return answer


def _why_it_failed(error, ranks):
    first = str(error).split("\n")[0]
    if "Unanswered" in first:
        return (
            f"with {ranks} ranks one waits for a message that nobody sends: partners must choose "
            "each other, so use k ^ d for sending and for receiving."
        )
    if "There is no rank" in first:
        return f"with {ranks} ranks it names a partner that does not exist: stop at group.size."
    return f"with {ranks} ranks it stopped: {first.rstrip('.')}."


def _fault_of_sums(results, ranks):
    right = np.array([ranks, sum(10.0**k for k in range(ranks))])
    sums = [np.asarray(x if returned is None else returned) for x, returned in results]
    if all(close_to(s, right) for s in sums):
        if not all(close_to(x, right) for x, _ in results):
            return "the sum is returned, but x itself is not changed: use `x += …`."
        return None
    counts = [float(np.ravel(s)[0]) for s in sums]
    if all(returned is None and list(x) == [1, 10.0**k] for k, (x, returned) in enumerate(results)):
        return "nothing is returned, and x is as it was: change x itself, with `x += …`."
    if all(count == 1 for count in counts):
        if ranks > 2 or all(close_to(s, [1, 10.0**k]) for k, s in enumerate(sums)):
            return "every rank still has its own numbers: add what the exchange returns."
        return "every rank now has its partner's numbers: add them, do not replace."
    if all(count == 2 for count in counts):
        return f"with {ranks} ranks each has the sum of two: go on with the distances 2, 4, …"
    if all(count < ranks for count in counts):
        return (
            f"with {ranks} ranks the sums lack some ranks: go on while the distance < group.size."
        )
    return (
        f"with {ranks} ranks some numbers count twice: {counts[0]:g} arrays were added on rank 0."
    )


# ---------------------------------------------------------------- 03.4: the last bucket


def _last(ready, nbytes, alpha, beta):
    free = 0.0
    for at, n in zip(ready, nbytes, strict=True):
        free = max(free, at) + alpha + beta * n
    return free


@exercise(
    "03.4",
    hint="Keep one number: when the network is free. A bucket starts at the later of two times.",
    shows="Whoever can predict the end of the last bucket can choose the buckets' size.",
)
def last_bucket(answer):
    """Exercise 03.4: when the last bucket has arrived."""
    ready, nbytes, alpha, beta = [1.0, 2.0, 9.0, 9.7], [30, 20, 40, 10], 0.5, 0.1
    each = [alpha + beta * n for n in nbytes]
    no_latency = _last(ready, nbytes, 0.0, beta)
    mistakes = (
        (ready[-1] + sum(each), "no bucket travels while others are computed: this is no overlap."),
        (sum(each), "a bucket cannot start before it is ready."),
        (ready[0] + sum(each), "the network may be idle in between, until the next one is ready."),
        (ready[-1] + each[-1], "the network may still be busy with the buckets before."),
        (
            max(r + e for r, e in zip(ready, each, strict=True)),
            "the network carries one at a time.",
        ),
        (no_latency, "each bucket pays the latency alpha too."),
        (ready[-1] + alpha + beta * sum(nbytes), "the buckets do not travel as one."),
    )
    got = answer(list(ready), list(nbytes), alpha, beta)
    for wrong, sentence in mistakes:
        if close_to(got, wrong, 1e-9):
            return sentence
    cases = [(ready, nbytes), ([0.0], [7]), ([1.0, 1.1, 1.2], [100, 1, 1]), ([0, 5, 50], [1, 9, 2])]
    for at, sizes in cases:
        right, got = _last(at, sizes, alpha, beta), answer(list(at), list(sizes), alpha, beta)
        if not close_to(got, right, 1e-9):
            return (
                f"for ready = {at}, nbytes = {sizes}, α = 0.5, β = 0.1 it is {right:g}, not {got}."
            )
    return None


# ---------------------------------------------------------------- quiz


@exercise(
    "03.quiz",
    hint="Sections 2, 2, 3 and 6, in this order.",
    shows="You know what travels between ranks, what it costs, and what must be equal.",
)
def quiz(answers):
    """The quiz of notebook 03."""
    right = {"1": "b", "2": "c", "3": "a", "4": "c"}
    why = {
        "1a": "a lost message would stop the run, or change the first digits.",
        "1c": "the rate is the same in both runs; float32 has seven digits.",
        "2a": "a row of the small shard would count three times as much as one of the large.",
        "2b": "that would be too long a step: the sum of two means is no mean.",
        "3b": "at 1 kilobyte the bytes cost nothing, and the ring has 126 messages in a row.",
        "3c": "rank 0 would receive 63 messages one after another, and send as many.",
        "4a": "equal sizes do not help: within a month season and constant cannot be told apart.",
        "4b": "weights by rows hardly change anything, since months have about equal sizes.",
    }
    return check_letters(answers, right, why)
