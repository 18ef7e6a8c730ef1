"""Gossip learning: eight workers that mix their parameters with their neighbours' in each step.

1,000 flights each, dealt at random or sorted by the scheduled hour; 500 steps of 32 rows at rate
0.2. Columns: `shards` ("random", "hour"), `graph` ("none": every worker alone), `gap` (the spectral
gap), `seed`, `auc` and `log_loss` (held-out days, means of the workers' models), and `apart` (how
far the workers' parameters lie from their mean, relative to it).
"""

from __future__ import annotations

import numpy as np

from helpers.learning.gossip import (
    graph,
    learn_by_gossip,
    mixing_weights,
    second_eigenvalue,
)
from helpers.learning.soft import sigmoid
from helpers.studies._learning import DTYPE, NETWORK, Flights, floats, mean_scores, on_ranks

SEEDS = (0, 1, 2, 3, 4)
RANKS, ROWS, STEPS, BATCH, RATE = 8, 8000, 500, 32, 0.2


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    flights, table = Flights(), []
    x_test, y_test = floats(flights.test)
    graphs = {"none": np.eye(RANKS)}
    for kind in ("ring", "random", "complete"):
        graphs[kind] = mixing_weights(graph(kind, RANKS, degree=4))
    for shards in ("random", "hour"):
        for kind, weights in graphs.items():
            for seed in seeds:
                x, y = flights.sample(ROWS, seed)
                rows = np.arange(ROWS)
                if shards == "hour":
                    rows = np.argsort(x[:, flights.hour], kind="stable")
                parts = np.array_split(rows, RANKS)
                found = np.array(on_ranks(_train, x, y, weights, seed, each=parts))
                said = [sigmoid(NETWORK.predict(w, x_test)[:, 0]) for w in found]
                setting = dict(shards=shards, graph=kind, gap=1 - second_eigenvalue(weights))
                measured = mean_scores(y_test, said) | dict(apart=_apart(found))
                table.append(setting | dict(seed=seed) | measured)
    return table


def _apart(found):
    """How far the ranks' parameters lie from their mean, relative to it."""
    mean = found.mean(axis=0)
    return float(np.linalg.norm(found - mean, axis=1).mean() / np.linalg.norm(mean))


def _train(rank, x, y, weights, seed, mine):
    random = np.random.default_rng([seed, 2, rank.index])

    def gradient_of(w, _step):
        rows = random.choice(mine, BATCH)
        return NETWORK.loss_and_gradient(w, x[rows], y[rows])[1]

    start = NETWORK.initialise(seed, DTYPE)
    return learn_by_gossip(rank.world, start, gradient_of, weights, STEPS, RATE)
