"""Warm-up: a deep network at large learning rates, with and without a slow start.

An MLP with five hidden layers takes 200 steps of 1,024 rows. Columns: `rate`, `warm_up` (steps in
which the rate rises from 0 in equal parts), `seed`, `highest` (the largest loss of a batch) and
`train_loss` at the end (on a sample of the training rows; empty: diverged).
"""

from __future__ import annotations

import numpy as np

from helpers.nn import MLP
from helpers.studies._setting import DTYPE, Rows

SEEDS = (0, 1, 2, 3, 4)
DEEP = MLP((36, 64, 64, 64, 64, 64, 1))
RATES, WARM_UPS = (0.8, 1.6, 3.2), (0, 20)
STEPS, BATCH = 200, 1024
HOPELESS = 100.0


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    rows = Rows()
    return [
        dict(rate=rate, warm_up=warm_up, seed=seed) | _train(rows, rate, warm_up, seed)
        for rate in RATES
        for warm_up in WARM_UPS
        for seed in seeds
    ]


def _train(rows, rate: float, warm_up: int, seed: int) -> dict:
    """One run: the highest loss of a batch, and the loss at the end."""
    parameters, random = DEEP.initialise(seed, DTYPE), np.random.default_rng([seed, 4])
    gradient, workspace = np.empty_like(parameters), DEEP.workspace(BATCH, DTYPE)
    highest = 0.0
    for step in range(STEPS):
        chosen = random.integers(0, len(rows.y), BATCH)
        loss, _ = DEEP.loss_and_gradient(
            parameters, rows.X[chosen], rows.y[chosen], out=gradient, workspace=workspace
        )
        highest = max(highest, loss)
        if not loss < HOPELESS:
            return dict(highest=highest, train_loss=None)
        now = rate * min(1, (step + 1) / warm_up) if warm_up else rate
        parameters -= DTYPE(now) * gradient
    return dict(highest=highest, train_loss=rows.losses(DEEP, parameters)["train_loss"])
