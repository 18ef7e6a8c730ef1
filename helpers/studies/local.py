"""Local SGD: steps between averagings against the loss, on equal and on unequal shards.

Four ranks take 1,024 steps of 64 rows each at rate 0.2. Columns: `shards` (how the rows were dealt
out: at random, by the scheduled hour, by the label), `every` (steps between averagings, H), `seed`,
`averagings`, `train_loss` (on a sample of the training rows) and `test_loss` (held-out days).
"""

from __future__ import annotations

import numpy as np

from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.parallel.local import local_sgd
from helpers.studies._setting import DTYPE, NETWORK, RANKS, Rows

SEEDS = (0, 1, 2)
EVERY = (1, 4, 16, 64, 256, 1024)
SHARDS = ("random", "hour", "label")
STEPS, BATCH, RATE = 1024, 64, 0.2


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    rows, table = Rows(), []
    for how in SHARDS:
        for every in EVERY:
            for seed in seeds:
                shards = rows.shards(how, seed)
                ranks = spmd.run(None, Mesh(data=RANKS), _train, rows, every, seed, each=shards)
                averagings, parameters = ranks.results[0]
                setting = dict(shards=how, every=every, seed=seed, averagings=averagings)
                table.append(setting | rows.losses(NETWORK, parameters))
    return table


def _train(rank, rows, every, seed, mine):
    """One rank's part of a run."""
    parameters = NETWORK.initialise(seed, DTYPE)
    random = np.random.default_rng([seed, 2, rank.index])
    gradient, workspace = np.empty_like(parameters), NETWORK.workspace(BATCH, DTYPE)

    def step(_number):
        batch = random.choice(mine, BATCH)
        NETWORK.loss_and_gradient(
            parameters, rows.X[batch], rows.y[batch], out=gradient, workspace=workspace
        )
        parameters[:] -= DTYPE(RATE) * gradient

    return local_sgd(rank.data, parameters, step, STEPS, every), parameters
