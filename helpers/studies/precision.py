"""Mixed precision: float16 with and without a loss scale and a master copy, against float32.

Two settings, each of which makes one danger visible. "small steps": Adam at rate 3e-5 takes 1,200
steps of 64 rows. "small gradients": the loss counts 2**-22 times, as one of many terms of a loss
may; SGD takes 600 steps at rate 0.1 times 2**22. Two ranks. Columns: `setting`, `method`, `seed`,
`skipped` (steps left out), `train_loss` (on a sample of the training rows) and `test_loss`
(held-out days).
"""

from __future__ import annotations

import numpy as np

from helpers.engine import spmd
from helpers.engine.collectives import all_reduce
from helpers.engine.mesh import Mesh
from helpers.nn import SGD, Adam
from helpers.parallel.precision import LossScale, MixedPrecision
from helpers.studies._setting import DTYPE, NETWORK, Rows

SEEDS = (0, 1, 2)
RANKS, BATCH = 2, 64
SETTINGS = {
    "small steps": (Adam(3e-5), 1200, 1.0),
    "small gradients": (SGD(0.1 * 2.0**22), 600, 2.0**-22),
}
METHODS = ("float32", "mixed", "no loss scale", "no master copy")


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    rows, table = Rows(), []
    for setting in SETTINGS:
        for method in METHODS:
            for seed in seeds:
                ranks = spmd.run(None, Mesh(data=RANKS), _train, rows, setting, method, seed)
                skipped, parameters = ranks.results[0]
                row = dict(setting=setting, method=method, seed=seed, skipped=skipped)
                table.append(row | rows.losses(NETWORK, parameters))
    return table


def _train(rank, rows, setting, method, seed):
    """One rank's part of a run: steps left out, and the parameters."""
    optimiser, steps, weight = SETTINGS[setting]
    start, random = NETWORK.initialise(seed, DTYPE), np.random.default_rng([seed, 2, rank.index])

    def gradient(parameters, divisor):
        batch = random.integers(0, len(rows.y), BATCH // rank.size)
        x, y = rows.X[batch], rows.y[batch]
        return NETWORK.loss_and_gradient(parameters, x, y, divisor / weight)[1]

    if method == "float32":
        return 0, _train_float32(rank, start, optimiser, steps, gradient)
    scale = LossScale(1.0, patience=steps + 1) if method == "no loss scale" else LossScale()
    mixed = MixedPrecision(rank.data, start, optimiser, scale)
    for _ in range(steps):
        if method == "no master copy":
            mixed.master = mixed.parameters()  # what float16 did not keep is forgotten
        mixed.step(gradient(mixed.parameters(), mixed.divisor(BATCH)))
    return mixed.skipped, mixed.parameters()


def _train_float32(rank, parameters, optimiser, steps, gradient):
    state = optimiser.start(parameters.size, DTYPE)
    for _ in range(steps):
        found = gradient(parameters, BATCH)
        optimiser.step(parameters, all_reduce(rank.data, found, out=found), state)
    return parameters
