"""Gradient compression: bytes sent against the loss, with and without error feedback.

Four ranks take 1,000 steps of 32 rows each at rate 0.2; gradients are float32. Columns: `method`,
`shards` (how the rows were dealt out: at random, or by the label), `feedback` (0 or 1), `seed`,
`nbytes` (a rank's, in one step), `train_loss` (on a sample of the training rows) and `test_loss`
(held-out days).
"""

from __future__ import annotations

import itertools

import numpy as np

from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.parallel.compression import EightBit, ErrorFeedback, Plain, Sign, TopK, mean_gradient
from helpers.parallel.power_sgd import PowerSGD
from helpers.studies._setting import DTYPE, NETWORK, RANKS, Rows

SEEDS = (0, 1, 2)
STEPS, BATCH, RATE = 1000, 32, 0.2
METHODS = {
    "none": lambda: Plain(),
    "8 bits": lambda: EightBit(),
    "sign": lambda: Sign(),
    "top 1 %": lambda: TopK(NETWORK.size // 100),
    "top 0.1 %": lambda: TopK(NETWORK.size // 1000),
    "PowerSGD, rank 1": lambda: PowerSGD(NETWORK, rank=1),
    "PowerSGD, rank 4": lambda: PowerSGD(NETWORK, rank=4),
}


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    rows, table = Rows(), []
    for how, methods in (("random", METHODS), ("label", ("none", "top 1 %"))):
        for method, feedback in itertools.product(methods, (0, 1)):
            if method == "none" and feedback:
                continue  # nothing is left out
            for seed in seeds:
                table.append(_run(rows, how, method, feedback, seed))
    return table


def _run(rows, how, method, feedback, seed) -> dict:
    """One row of the table."""
    shards = rows.shards(how, seed)
    run = spmd.run(None, Mesh(data=RANKS), _train, rows, method, feedback, seed, each=shards)
    nbytes, parameters = run.results[0]
    setting = dict(method=method, shards=how, feedback=feedback, seed=seed, nbytes=nbytes)
    return setting | rows.losses(NETWORK, parameters)


def _train(rank, rows, method, feedback, seed, mine):
    """One rank's part of a run: bytes of the last step, and the parameters."""
    compressor = METHODS[method]()
    if feedback:
        compressor = ErrorFeedback(compressor)
    parameters = NETWORK.initialise(seed, DTYPE)
    random = np.random.default_rng([seed, 2, rank.index])
    gradient, workspace = np.empty_like(parameters), NETWORK.workspace(BATCH, DTYPE)
    for _ in range(STEPS):
        batch = random.choice(mine, BATCH)
        NETWORK.loss_and_gradient(
            parameters, rows.X[batch], rows.y[batch], out=gradient, workspace=workspace
        )
        exchanged = mean_gradient(rank.data, compressor, gradient)
        parameters -= DTYPE(RATE) * exchanged.mean
    return exchanged.nbytes, parameters
