"""Typical wrong answers to the exercises of notebook 03, and a piece of what the check says."""

import numpy as np


def with_nan(means, sizes):
    return sum(n * g for g, n in zip(means, sizes)) / sum(sizes)


def only_neighbours(group, x):
    partner = group.rank ^ 1
    x += group.exchange(x, partner, partner)
    return x


def without_adding(group, x):
    distance = 1
    while distance < group.size:
        group.exchange(x, group.rank ^ distance, group.rank ^ distance)
        distance *= 2
    return x


def replacing(group, x):
    distance = 1
    while distance < group.size:
        x[:] = group.exchange(x, group.rank ^ distance, group.rank ^ distance)
        distance *= 2
    return x


def not_in_place(group, x):
    distance = 1
    while distance < group.size:
        x = x + group.exchange(x, group.rank ^ distance, group.rank ^ distance)
        distance *= 2
    return x


def two_rounds(group, x):
    for distance in (1, 2):
        if distance < group.size:
            x += group.exchange(x, group.rank ^ distance, group.rank ^ distance)
    return x


def in_steps_of_one(group, x):
    for distance in range(1, group.size):
        x += group.exchange(x, group.rank ^ distance, group.rank ^ distance)
    return x


def one_round_too_many(group, x):
    distance = 1
    while distance <= group.size:
        if group.size > 1:
            partner = group.rank ^ distance
            x += group.exchange(x, partner, partner)
        distance *= 2
    return x


def with_plus(group, x):
    distance = 1
    while distance < group.size:
        partner = (group.rank + distance) % group.size
        x += group.exchange(x, partner, partner)
        distance *= 2
    return x


def not_in_place_and_no_return(group, x):
    distance = 1
    while distance < group.size:
        x = x + group.exchange(x, group.rank ^ distance, group.rank ^ distance)
        distance *= 2


def no_overlap(ready, nbytes, alpha, beta):
    return ready[-1] + sum(alpha + beta * n for n in nbytes)


def without_latency(ready, nbytes, alpha, beta):
    free = 0.0
    for at, n in zip(ready, nbytes):
        free = max(free, at) + beta * n
    return free


def all_at_once(ready, nbytes, alpha, beta):
    return max(at + alpha + beta * n for at, n in zip(ready, nbytes))


WRONG = {
    "03.1": [
        (lambda means, sizes: np.mean(means, axis=0), "mean of the means"),
        (lambda means, sizes: sum(means), "sum of the means"),
        (lambda means, sizes: sum(n * g for g, n in zip(means, sizes)), "sum over all rows"),
        (
            lambda means, sizes: sum(n * g for g, n in zip(means, sizes)) / len(sizes),
            "number of shards",
        ),
        (lambda means, sizes: sum(g / n for g, n in zip(means, sizes) if n), "multiply"),
        (with_nan, "without rows spoils it"),
        (lambda means, sizes: means[0], "it should be"),
    ],
    "03.2": [
        (lambda p, n: (p - 1) * n / p, "one half only"),
        (lambda p, n: 2 * (p - 1) * n, "not the whole array"),
        (lambda p, n: (p - 1) * n, "two halves of p − 1 steps"),
        (lambda p, n: 2 * n, "a rank's own part stays"),
        (lambda p, n: 2 * p * n, "only a part is sent"),
        (lambda p, n: 2 * n / p, "bytes of two steps"),
        (lambda p, n: n, "for p = 5"),
    ],
    "03.3": [
        (only_neighbours, "the sum of two"),
        (without_adding, "still has its own"),
        (replacing, "add them, do not replace"),
        (not_in_place, "x itself is not changed"),
        (two_rounds, "lack some ranks"),
        (in_steps_of_one, "count twice"),
        (one_round_too_many, "does not exist"),
        (with_plus, "partners must choose each other"),
        (not_in_place_and_no_return, "x is as it was"),
        (7, "give a function"),
    ],
    "03.4": [
        (no_overlap, "this is no overlap"),
        (lambda ready, nbytes, alpha, beta: sum(alpha + beta * n for n in nbytes), "before it is"),
        (
            lambda ready, nbytes, alpha, beta: ready[0] + sum(alpha + beta * n for n in nbytes),
            "idle in between",
        ),
        (
            lambda ready, nbytes, alpha, beta: ready[-1] + alpha + beta * nbytes[-1],
            "still be busy",
        ),
        (without_latency, "pays the latency"),
        (all_at_once, "carries one at a time"),
        (
            lambda ready, nbytes, alpha, beta: ready[-1] + alpha + beta * sum(nbytes),
            "do not travel as one",
        ),
        (lambda ready, nbytes, alpha, beta: 1.0, "it is"),
    ],
    "03.quiz": [
        ({"1": "a", "2": "c", "3": "a", "4": "c"}, "a lost message"),
        ({"1": "b", "2": "a", "3": "a", "4": "c"}, "three times as much"),
        ({"1": "b", "2": "c", "3": "b", "4": "c"}, "126 messages"),
        ({"1": "b", "2": "c", "3": "a", "4": "b"}, "hardly change anything"),
        ({"1": "b"}, "a letter for each"),
    ],
}
