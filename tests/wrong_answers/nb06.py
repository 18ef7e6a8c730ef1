"""Typical wrong answers to the exercises of notebook 06, and a piece of what the check says."""

import math
from itertools import combinations, pairwise

from helpers.parallel.schedules import Operation, gpipe, one_by_one, one_f_one_b


def thrice(rank, ranks, microbatches):
    yield from gpipe(rank, ranks, microbatches)
    yield Operation("forward", 0)


def forward_only(rank, ranks, microbatches):
    yield from (Operation("forward", m) for m in range(microbatches))


def one_microbatch(rank, ranks, microbatches):
    yield from one_by_one(rank, ranks, 1)


def letters(rank, ranks, microbatches):
    yield from "FFBB"


def waves_of_three(rank, ranks, microbatches):
    for begin in range(0, microbatches, 3):
        wave = range(begin, min(begin + 3, microbatches))
        yield from (Operation("forward", m) for m in wave)
        yield from (Operation("backward", m) for m in wave)


def quick_on_three_ranks_only(rank, ranks, microbatches):
    yield from (one_f_one_b if ranks < 4 else waves_of_three)(rank, ranks, microbatches)


def as_many_ahead_on_all_ranks(rank, ranks, microbatches):
    ahead = min(2, microbatches)
    yield from (Operation("forward", m) for m in range(ahead))
    for m in range(microbatches):
        if m + ahead < microbatches:
            yield Operation("forward", m + ahead)
        yield Operation("backward", m)


def nothing_yielded(rank, ranks, microbatches):
    for m in range(microbatches):
        Operation("forward", m)


def slowest(costs, places):
    return max(sum(costs[a:b]) for a, b in pairwise([0, *places, len(costs)]))


def all_cuts(costs, stages):
    return combinations(range(1, len(costs)), stages - 1)


def emptied(costs, stages):
    costs.clear()
    return 0


WRONG = {
    "06.1": [
        (lambda p, b: (p - 1) * (1 - b) / b, "micro-batches are whole"),
        (lambda p, b: math.ceil((p - 1) * (1 - b) / b), "take at least 1"),
        (lambda p, b: max(1, int((p - 1) * (1 - b) / b)), "round up"),
        (lambda p, b: max(1, math.floor((p - 1) * (1 - b) / b) + 1), "one more than needed"),
        (lambda p, b: max(1, math.ceil((p - 1) / b)), "subtract p - 1"),
        (lambda p, b: max(1, math.ceil(p * (1 - b) / b)), "not p"),
        (lambda p, b: 7, "it should be 15, not 7"),
    ],
    "06.2": [
        (lambda r, p, m, n: n, "return a pair"),
        (lambda r, p, m, n: (min(m, p - r) * n / m, n), "the wrong way round"),
        (lambda r, p, m, n: (m, min(m, p - r)), "multiply by the bytes of one"),
        (lambda r, p, m, n: (n, (p - r) * n / m), "use min"),
        (lambda r, p, m, n: (n, min(m, p - r - 1) * n / m), "the rank itself counts"),
        (lambda r, p, m, n: (n, min(m, r + 1) * n / m), "the first rank keeps the most"),
        (lambda r, p, m, n: (n, min(m, p) * n / m), "later ranks keep fewer"),
        (lambda r, p, m, n: (m * n, min(m, p - r) * n), "divide it by the micro-batches"),
        (lambda r, p, m, n: (n / m, min(m, p - r) * n / m), "GPipe keeps all micro-batches"),
        (lambda r, p, m, n: (1, 2), "it should be 800 and 400, not 1 and 2"),
    ],
    "06.3": [
        (one_f_one_b, "a rank keeps the activations of 4 micro-batches"),
        (gpipe, "a rank keeps the activations of 8 micro-batches"),
        (one_by_one, "it takes 48 units, and 1F1B"),
        (waves_of_three, "it takes 33 units, and 1F1B"),
        (quick_on_three_ranks_only, "it takes 51 units, and waves of 3 take 51"),
        (as_many_ahead_on_all_ranks, "a rank near the end needs fewer ahead"),
        (nothing_yielded, "it yields its operations"),
        (forward_only, "micro-batch 0 has no backward"),
        (thrice, "forward of micro-batch 0 is there twice"),
        (one_microbatch, "only 1 micro-batches in the lists"),
        (letters, "yield operations"),
    ],
    "06.4": [
        (lambda costs, stages: sum(costs) / stages, "that is the mean"),
        (
            lambda costs, stages: slowest(
                costs, [len(costs) * s // stages for s in range(1, stages)]
            ),
            "equal numbers of layers",
        ),
        (
            lambda costs, stages: max(slowest(costs, cut) for cut in all_cuts(costs, stages)),
            "the worst cut",
        ),
        (
            lambda costs, stages: min(
                min(sum(costs[a:b]) for a, b in pairwise([0, *cut, len(costs)]))
                for cut in all_cuts(costs, stages)
            ),
            "take its maximum",
        ),
        (lambda costs, stages: max(costs), "at least as slow as its slowest layer"),
        (emptied, "changes the list"),
        (lambda costs, stages: 99, "it should be 4, not 99"),
    ],
    "06.quiz": [
        ({"1": "a", "2": "a", "3": "b", "4": "c", "5": "a"}, "question 1: 3 of 4 + 3 steps"),
        ({"1": "b", "2": "b", "3": "b", "4": "c", "5": "a"}, "question 2: that is GPipe"),
        ({"1": "c", "2": "c", "3": "a", "4": "c", "5": "a"}, "question 3: they may be as large"),
        ({"1": "c", "2": "a", "3": "c", "4": "a", "5": "a"}, "question 4: each of them still"),
        ({"1": "c", "2": "a", "3": "b", "4": "b", "5": "b"}, "question 5: it is: it never"),
        ({"1": "c", "2": "a", "3": "b", "4": "c", "5": "c"}, "question 5: it is: that is what"),
        ({"1": "b"}, "give a letter for each of the questions"),
    ],
}
