"""Gossip learning: eight workers that mix their parameters with their neighbours' in each step.

1,000 flights each, dealt at random or sorted by the scheduled hour; 500 steps of 32 rows at rate
0.2. Columns: `shards` ("random", "hour"), `graph` ("none": every worker alone; "all-reduce": every
worker takes the mean of all gradients, so that there is one model only), `decay` (weight decay; for
those alone), `gap` (the spectral gap), `seed`, `numbers` (of a message), `times` (how many steps),
`kilobytes` (that a worker sends in the whole training), `auc` and `log_loss` (held-out days, means
of the workers' models), and `apart` (how far the workers' parameters lie from their mean, relative
to it).
"""

from __future__ import annotations

import numpy as np

from helpers.engine.collectives import all_reduce
from helpers.learning.gossip import (
    graph,
    learn_by_gossip,
    mixing_weights,
    second_eigenvalue,
)
from helpers.learning.soft import sigmoid
from helpers.studies._learning import (
    DTYPE,
    NETWORK,
    Flights,
    floats,
    mean_scores,
    on_ranks,
    sends,
)

SEEDS = (0, 1, 2, 3, 4)
RANKS, ROWS, STEPS, BATCH, RATE = 8, 8000, 500, 32, 0.2
DECAYS = (0.0, 0.01, 0.03, 0.1)


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    flights, table = Flights(), []
    x_test, y_test = floats(flights.test)
    ways = [("none", np.eye(RANKS), decay) for decay in DECAYS]
    for kind in ("ring", "random", "complete"):
        ways.append((kind, mixing_weights(graph(kind, RANKS, degree=4)), 0.0))
    ways.append(("all-reduce", None, 0.0))
    for shards in ("random", "hour"):
        for kind, weights, decay in ways:
            for seed in seeds:
                x, y = flights.sample(ROWS, seed)
                rows = np.arange(ROWS)
                if shards == "hour":
                    rows = np.argsort(x[:, flights.hour], kind="stable")
                parts = np.array_split(rows, RANKS)
                found = np.array(on_ranks(_train, x, y, weights, decay, seed, each=parts))
                said = [sigmoid(NETWORK.predict(w, x_test)[:, 0]) for w in found]
                setting = dict(shards=shards, graph=kind, decay=decay) | _sent(weights)
                measured = mean_scores(y_test, said) | dict(apart=_apart(found))
                table.append(setting | dict(seed=seed) | measured)
    return table


def _sent(weights):
    """The spectral gap, and what a worker sends: its parameters to each neighbour."""
    if weights is None:  # an all-reduce has the mean of all at once, for 2 (p - 1) / p copies
        gap, copies = 1.0, 2 * (RANKS - 1) / RANKS
    else:
        gap = 1 - second_eigenvalue(weights)
        copies = (weights > 0).sum(axis=1).mean() - 1
    times = STEPS if copies else 0
    numbers = NETWORK.size if copies else 0
    return dict(gap=gap) | sends(numbers, times, numbers * times * copies)


def _apart(found):
    """How far the ranks' parameters lie from their mean, relative to it."""
    mean = found.mean(axis=0)
    return float(np.linalg.norm(found - mean, axis=1).mean() / np.linalg.norm(mean))


def _train(rank, x, y, weights, decay, seed, mine):
    random = np.random.default_rng([seed, 2, rank.index])

    def gradient_of(w, _step):
        rows = random.choice(mine, BATCH)
        gradient = NETWORK.loss_and_gradient(w, x[rows], y[rows])[1]
        if weights is None:
            gradient = all_reduce(rank.world, gradient) / rank.size
        return gradient + DTYPE(decay) * w

    start = NETWORK.initialise(seed, DTYPE)
    mixing = np.eye(rank.size) if weights is None else weights
    return learn_by_gossip(rank.world, start, gradient_of, mixing, STEPS, RATE)
