"""Batch size: steps that training takes to a target, for many batch sizes and learning rates.

One rank stands for all: synchronous training does not depend on their number. Columns: `batch`
(rows), `rate`, `seed`, `steps` to a loss of 0.495 on a sample of the training rows (empty: not
reached within the limit of that batch size, or diverged). The loss is measured after steps
1, 2, 3, … and then after each 3 per cent more, so steps are rounded up by as much.
"""

from __future__ import annotations

import numpy as np

from helpers.studies._setting import DTYPE, NETWORK, Rows

SEEDS = (0, 1, 2)
TARGET = 0.495
# Batch: the most steps, and the exponents of the rates that are tried, 0.4 · 2ⁿ.
TRIED = {
    16: (6000, (-1, 0, 1)),
    64: (3000, (0, 1, 2)),
    256: (2000, (0, 1, 2, 3, 4)),
    1024: (1500, (0, 1, 2, 3, 4, 5)),
    4096: (1200, (0, 2, 3, 4, 5)),
    16384: (250, (2, 3, 4, 5)),
}
HOPELESS = 1000.0
"""A loss from which no run came back."""


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    rows, table = Rows(), []
    for batch, (most, exponents) in TRIED.items():
        for rate in [0.4 * 2.0**n for n in exponents]:
            for seed in seeds:
                steps = steps_to_target(rows, batch, rate, seed, most)
                table.append(dict(batch=batch, rate=rate, seed=seed, steps=steps))
    return table


def steps_to_target(rows, batch: int, rate: float, seed: int, most: int) -> int | None:
    """Steps to the target, or None if it is not reached."""
    parameters, random = NETWORK.initialise(seed, DTYPE), np.random.default_rng([seed, 3])
    gradient, workspace = np.empty_like(parameters), NETWORK.workspace(batch, DTYPE)
    look = 1
    for step in range(1, most + 1):
        chosen = random.integers(0, len(rows.y), batch)
        loss, _ = NETWORK.loss_and_gradient(
            parameters, rows.X[chosen], rows.y[chosen], out=gradient, workspace=workspace
        )
        if not loss < HOPELESS:
            return None
        parameters -= DTYPE(rate) * gradient
        if step >= look:
            look = max(step + 1, int(step * 1.03))
            if NETWORK.loss_at(parameters, *rows.sample) <= TARGET:
                return step
    return None
