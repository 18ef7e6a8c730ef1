"""Stragglers: time against the loss when one rank of four is ten times as slow.

The time is simulated (a gradient takes 5 ms, on the last rank 50 ms), the training is real:
gradients are used in the order in which the simulation has them come. Batch 32 a rank, 1,600
gradients at most. Columns: `shards` (how the rows were dealt out: at random, by the hour, by the
label), `method`, `seed`, `seconds` (simulated), `from_slow` (how many gradients of the slow rank
were used), `train_loss` (on a sample of the training rows) and `test_loss` (held-out days).
"""

from __future__ import annotations

import numpy as np

from helpers.nn import SGD
from helpers.parallel.asynchronous import replay
from helpers.parallel.stragglers import simulate_bounded, simulate_synchronous
from helpers.studies._setting import DTYPE, NETWORK, RANKS, Rows

SEEDS = (0, 1, 2)
SHARDS = ("random", "hour", "label")
GRADIENTS, BATCH, RATE = 1600, 32, 0.4
SLOW = RANKS - 1
METHODS = {"synchronous": 0, "one backup": 1, "bound 4": 4, "asynchronous": None}


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    rows, table = Rows(), []
    for how in SHARDS:
        for method in METHODS:
            for seed in seeds:
                setting = dict(shards=how, method=method, seed=seed)
                seconds, from_slow, parameters = _train(rows, rows.shards(how, seed), method, seed)
                setting |= dict(seconds=seconds, from_slow=from_slow)
                table.append(setting | rows.losses(NETWORK, parameters))
    return table


def _train(rows, shards, method, seed):
    """Simulated seconds, how many gradients came from the slow rank, and the parameters."""
    random = [np.random.default_rng([seed, 2, rank]) for rank in range(RANKS)]

    def gradient_of(rank, parameters):
        batch = random[rank].choice(shards[rank], BATCH)
        return NETWORK.loss_and_gradient(parameters, rows.X[batch], rows.y[batch])[1]

    start = NETWORK.initialise(seed, DTYPE)
    if method in ("synchronous", "one backup"):
        return _together(gradient_of, start, METHODS[method])
    return _one_by_one(gradient_of, start, METHODS[method])


def _together(gradient_of, parameters, backup):
    seconds = _table(GRADIENTS // RANKS)
    used = range(RANKS - backup)  # the slow rank is the last, and never among the first three
    for _ in seconds:
        mean = np.mean([gradient_of(rank, parameters) for rank in used], axis=0)
        parameters -= DTYPE(RATE) * mean
    times = simulate_synchronous(seconds, backup).times
    return times[-1], 0 if backup else len(seconds), parameters


def _one_by_one(gradient_of, parameters, bound):
    events = simulate_bounded(_table(GRADIENTS), bound).events
    gradients = [event for event in events if event.operation == "gradient"]
    used = sorted(gradients, key=lambda event: (event.stop, event.rank))[:GRADIENTS]
    order = [event.rank for event in used]
    optimiser = SGD(RATE / RANKS)  # one gradient moves as much as its share of a mean
    report = replay(lambda p, step: gradient_of(order[step], p), parameters, optimiser, order)
    return used[-1].stop, order.count(SLOW), report.parameters


def _table(steps):
    """Seconds of each rank for each step."""
    seconds = np.full((steps, RANKS), 0.005)
    seconds[:, SLOW] *= 10
    return seconds
