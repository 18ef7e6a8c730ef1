"""Typical wrong answers to the exercises of notebook 01, and a piece of what the check says."""

import math
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np

DAY = 24 * 3600


def chain_sum(client, parts):
    return reduce(lambda a, b: client.submit(add, a, b), parts)


def pairs_without_the_rest(client, parts):
    while len(parts) > 1:
        parts = [client.submit(add, a, b) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


def list_of_futures(client, parts):
    return [client.submit(add, a, b) for a, b in zip(parts[::2], parts[1::2])]


def with_overlap(client, parts):
    while len(parts) > 1:
        parts = [client.submit(add, a, b) for a, b in pairwise(parts)]
    return parts[0]


def while_handing_out(tasks, seconds, workers, overhead):
    free = [0.0] * workers
    for task in range(tasks):
        first = free.index(min(free))
        free[first] = max(free[first], (task + 1) * overhead) + seconds
    return max(free)


def relu(a):
    return np.maximum(a, 0)


WRONG = {
    "01.1": [
        (lambda n, t, a, peak, share: 2 * n * t / (a * peak * share) / DAY, "the way back"),
        (lambda n, t, a, peak, share: 6 * n * t / (a * peak) / DAY, "share of the peak is missing"),
        (lambda n, t, a, peak, share: 6 * n * t / (a * peak * share), "in seconds"),
        (lambda n, t, a, peak, share: 6 * n * t / (a * peak * share) / 3600, "in hours"),
        (lambda n, t, a, peak, share: 6 * n * t / (peak * share) / DAY, "number of accelerators"),
        (lambda n, t, a, peak, share: 6 * n * t * share / (a * peak) / DAY, "multiplied by"),
        (lambda n, t, a, peak, share: 6 * n * t / (a * peak * share) / 60, "in minutes"),
        (lambda n, t, a, peak, share: 6 * n * t / (a * share) / DAY, "the peak is missing"),
        (lambda n, t, a, peak, share: round(6 * n * t / (a * peak * share) / DAY), "rounding"),
        (lambda n, t, a, peak, share: n * t, "should take 8.33 days"),
        (67.5, "give the function itself"),
    ],
    "01.2": [
        (chain_sum, "in a chain of 7 additions"),
        (lambda client, parts: client.submit(sum, parts), "more than two parts"),
        (lambda client, parts: sum(client.gather(parts)), "waits for results"),
        (pairs_without_the_rest, "of 5 parts, number 4"),
        (list_of_futures, "returned a list"),
        (with_overlap, "more than once"),
    ],
    "01.3": [
        (lambda n, d, m, p, s: (s * (p * n * d + d * m), s * (n * d + p * d * m)), "exchanged"),
        (lambda n, d, m, p, s: (s * (n * d + d * m),) * 2, "is counted once"),
        (lambda n, d, m, p, s: (p * s * (n * d + d * m),) * 2, "is counted p times"),
        (lambda n, d, m, p, s: (n * d + p * d * m, p * n * d + d * m), "not of bytes"),
        (lambda n, d, m, p, s: (8 * (n * d + p * d * m), 8 * (p * n * d + d * m)), "not 8"),
        (lambda n, d, m, p, s: s * (n * d + p * d * m), "return two numbers"),
        (lambda n, d, m, p, s: (s * n * d, s * p * n * d), "it should be (122400, 600480)"),
        (
            lambda n, d, m, p, s: np.array([n * d + p * d * m, p * n * d + d * m]) * s / 1e9,
            "these are GB",
        ),
        (
            lambda n, d, m, p, s: (
                s * (n * d + p * d * m + n * m),
                s * (p * n * d + d * m + n * m),
            ),
            "Y is not sent",
        ),
    ],
    "01.4": [
        (lambda X0, X1, W0, W1: relu(X0 @ W0) + relu(X1 @ W1), "relu is applied to each part"),
        (lambda X0, X1, W0, W1: X0 @ W0 + X1 @ W1, "relu is missing"),
        (lambda X0, X1, W0, W1: relu(X0 @ W0 + X1 @ W1) / 2, "you averaged the parts"),
        (lambda X0, X1, W0, W1: np.hstack([X0 @ W0, X1 @ W1]), "not put side by side"),
        (lambda X0, X1, W0, W1: relu(X0 @ W0), "worker 1 is missing"),
        (lambda X0, X1, W0, W1: (relu(X0 @ W0) + relu(X1 @ W1)) / 2, "average of two sub-models"),
        (lambda X0, X1, W0, W1: relu(np.hstack([X0, X1]) @ np.vstack([W0, W1])), "together again"),
    ],
    "01.5": [
        (lambda n, t, p, h: n * h + n * t / p, "a task is never divided"),
        (lambda n, t, p, h: math.ceil(n / p) * t, "the overhead is missing"),
        (lambda n, t, p, h: h + math.ceil(n / p) * t, "the overhead once"),
        (lambda n, t, p, h: math.ceil(n / p) * (t + h), "one scheduler for all"),
        (lambda n, t, p, h: n * (h + t), "not divided between the workers"),
        (lambda n, t, p, h: n * h + n // p * t, "the last round is missing"),
        (while_handing_out, "count cautiously"),
    ],
    "01.quiz": [
        ({"1": "a", "2": "b", "3": "b", "4": "c"}, "delayed sends nothing"),
        ({"1": "c", "2": "a", "3": "b", "4": "c"}, "nothing is rewritten"),
        ({"1": "c", "2": "c", "3": "b", "4": "c"}, "memories of their own"),
        ({"1": "c", "2": "b", "3": "a", "4": "c"}, "an ensemble"),
        ({"1": "c", "2": "b", "3": "c", "4": "c"}, "the rows are cut"),
        ({"1": "c", "2": "b", "3": "b", "4": "a"}, "more workers wait"),
        ({"1": "c", "2": "b", "3": "b", "4": "x"}, "no such choice"),
        ("cbbc", "give a letter for each"),
    ],
}
