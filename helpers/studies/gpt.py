"""The small GPT on the flight log: how its loss falls, and how many of its lines become real.

Two ranks take 1,000 steps of 64 lines of the training days, with AdamW, a short warm-up and a
linear decay of the rate. Columns: `seed`, `step` (steps taken), `train_loss` (mean of the batches
since the row before), `test_loss` (on lines of the held-out days; both in nats a token),
`well_formed` and `real` (shares of 500 sampled lines, see `helpers.datasets.text.score`). Seconds
are not stored: they are those of the machine.
"""

from __future__ import annotations

import numpy as np

from helpers.datasets import text
from helpers.engine import spmd
from helpers.engine.collectives import all_reduce
from helpers.engine.mesh import Mesh
from helpers.nn import GPT, Adam, generate
from helpers.parallel.data import DataParallel, shard
from helpers.parallel.training import Batches

SEEDS = (0, 1, 2)
RANKS, STEPS, LINES = 2, 1000, 64
NETWORK = GPT(vocabulary=len(text.ALPHABET), context=text.LENGTH, width=64, heads=4, layers=2)
OPTIMISER = Adam(0.01, betas=(0.9, 0.95), weight_decay=0.01)
WARM_UP = 20
DTYPE = np.float32
LOOKS = (1, 50, 100, 150, 200, 300, 400, 500, 600, 800, STEPS)
SAMPLED, MEASURED_LINES = 500, 1024


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    log, table = text.load_log(), []
    chosen = np.random.default_rng(2013).permutation(len(log.test))[:MEASURED_LINES]
    learnt = text.inputs_and_targets(log.train.codes)
    test = text.inputs_and_targets(log.test.codes[chosen])
    for seed in seeds:
        ranks = spmd.run(None, Mesh(data=RANKS), _train, learnt, test, seed)
        table += [dict(seed=seed) | row for row in ranks.results[0]]
    return table


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0: up to the optimiser's own, then down to 0."""
    return OPTIMISER.rate * min((step + 1) / WARM_UP, (steps - step) / (steps - WARM_UP))


def written(parameters, lines: slice, seed: int) -> list[str]:
    """Some of the lines that a network writes; they depend on the seed and on their numbers."""
    start = np.zeros((lines.stop - lines.start, 1), np.uint8)  # an end mark: a line begins
    steps = text.LENGTH - 1
    return text.decode(
        generate(NETWORK, parameters, start, steps, seed=seed, first=lines.start)[:, 1:]
    )


def _train(rank, learnt, test, seed) -> list[dict]:
    """One rank's part of a run: a row for each look."""
    batches = Batches(*learnt, rows=LINES, seed=seed, counted=NETWORK.counted)
    trainer = DataParallel(rank, NETWORK, OPTIMISER, NETWORK.initialise(seed, DTYPE))
    losses, rows = [], []
    for step in range(STEPS):
        losses.append(trainer.step(*batches(step, rank.data), rate(step, STEPS)))
        if trainer.steps in LOOKS:
            mine = np.array([np.mean(losses), *_look(rank, trainer.parameters, test, seed)])
            train_loss, test_loss, well_formed, real = all_reduce(rank.data, mine).tolist()
            found = dict(train_loss=train_loss, test_loss=test_loss)
            rows.append(dict(step=trainer.steps) | found | dict(well_formed=well_formed, real=real))
            losses = []
    return rows


def _look(rank, parameters, test, seed) -> tuple[float, float, float]:
    """This rank's part of the held-out loss, and of the two shares of sampled lines."""
    tokens, targets = test
    mine, lines = shard(len(tokens), rank.data), shard(SAMPLED, rank.data)
    divisor = NETWORK.counted(targets)
    loss = NETWORK.loss_at(parameters, tokens[mine], targets[mine], divisor)
    score = text.score(written(parameters, lines, seed))
    part = score.lines / SAMPLED
    return loss, part * score.well_formed, part * score.real
