"""Stale gradients: delay against the loss, with and without momentum and a smaller rate.

One process stands for all: each gradient is as many updates old as `delay` says. 1,000 steps of
128 rows. Columns: `momentum`, `rate`, `damped` (1: the rate is divided by 1 + delay), `delay`,
`seed`, `train_loss` (on a sample of the training rows; empty: not a number) and `test_loss`
(held-out days).
"""

from __future__ import annotations

import numpy as np

from helpers.nn import SGD
from helpers.parallel.asynchronous import stale_sgd
from helpers.studies._setting import DTYPE, NETWORK, Rows

SEEDS = (0, 1, 2)
DELAYS = (0, 1, 4, 16, 64)
SETTINGS = ((0.9, 0.05), (0.0, 0.2))
STEPS, BATCH = 1000, 128


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    rows, table = Rows(), []
    for momentum, rate in SETTINGS:
        for damped in (0, 1):
            for delay in DELAYS:
                for seed in seeds:
                    parameters = _train(rows, SGD(rate, momentum), delay, bool(damped), seed)
                    setting = dict(momentum=momentum, rate=rate, damped=damped, delay=delay)
                    losses = rows.losses(NETWORK, parameters)
                    table.append(setting | {"seed": seed} | losses)
    return table


def _train(rows, optimiser, delay, damped, seed):
    """The parameters after a run."""
    random = np.random.default_rng([seed, 2])

    def gradient(parameters, _step):
        batch = random.integers(0, len(rows.y), BATCH)
        return NETWORK.loss_and_gradient(parameters, rows.X[batch], rows.y[batch])[1]

    return stale_sgd(gradient, NETWORK.initialise(seed, DTYPE), optimiser, STEPS, delay, damped)
