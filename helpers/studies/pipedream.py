"""Asynchronous pipelines: four stages of a GPT, with and without stashed weights, by rate.

A GPT of four blocks and width 32 learns the flight log of January, 320 micro-batches of 16 lines,
with Adam. Each block is a stage; the head has a table of its own. One process stands for all ranks.
Columns: `method`, `rate`, `seed`, `train_loss` (mean of the last 64 micro-batches, before their
update; empty: not a number). Methods: "one rank" (an update after each micro-batch), "stashed" and
"not stashed" (the asynchronous pipeline), "flushed" (the synchronous pipeline: an update after
eight micro-batches).
"""

from __future__ import annotations

import numpy as np

from helpers.datasets import load_log
from helpers.datasets.text import inputs_and_targets
from helpers.nn import GPT, Adam
from helpers.parallel.pipedream import Versioned, replay
from helpers.parallel.stage import GPTStage, Parts, deal

SEEDS = (0, 1, 2)
RATES = (0.0005, 0.001, 0.002, 0.004, 0.008)
MODEL = GPT(vocabulary=40, context=32, width=32, heads=4, layers=4)
STAGES, MICROBATCHES, LINES, COUNTED = 4, 320, 16, 64
FLUSHED = 8
METHODS = ("one rank", "stashed", "not stashed", "flushed")


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    codes, table = load_log(month=1).train.codes, []
    for method in METHODS:
        for rate in RATES:
            for seed in seeds:
                losses = _train(codes, method, Adam(rate), seed)
                loss = float(np.mean(losses[-COUNTED:]))
                table.append(dict(method=method, rate=rate, seed=seed, train_loss=loss))
    return table


def _train(codes, method, optimiser, seed):
    """The losses of all micro-batches."""
    stages, parameters = _stages(codes, seed)
    with np.errstate(over="ignore", invalid="ignore"):
        if method == "flushed":
            return _flushed(stages, parameters, optimiser)
        delays = [0] * STAGES if method == "one rank" else None
        stashing = method != "not stashed"
        return replay(stages, parameters, optimiser, MICROBATCHES, stashing, delays)[1]


def _stages(codes, seed):
    """The stages, ready for all micro-batches, and their parameters."""
    random = np.random.default_rng([seed, 6])
    rows = random.integers(len(codes), size=(MICROBATCHES, LINES))
    tokens, targets = zip(*(inputs_and_targets(codes[chosen]) for chosen in rows), strict=True)
    characters = sum(map(MODEL.counted, targets)) / MICROBATCHES  # of a micro-batch, on average
    stages, parameters = [], []
    for layers in deal(MODEL, STAGES):
        parts = Parts(MODEL, layers)
        flat = parts.cut(lambda layer: MODEL.initialise_layer(layer, seed, np.float32))
        stage = GPTStage(parts, flat.copy(), np.empty_like(flat))
        stage.start(tokens, targets, divisor=characters)
        stages.append(Versioned(stage))
        parameters.append(flat)
    return stages, parameters


def _flushed(stages, parameters, optimiser):
    """Each update with the mean gradient of several micro-batches, all at the same weights."""
    states = [optimiser.start(p.size, p.dtype) for p in parameters]
    losses, sums = [], [np.zeros_like(p) for p in parameters]
    for microbatch in range(MICROBATCHES):
        passed, kept = None, []
        for stage, flat in zip(stages, parameters, strict=True):
            passed, needed = stage.forward(flat, microbatch, passed)
            kept.append(needed)
        losses.append(float(passed))
        passed = None
        for r in reversed(range(STAGES)):
            passed, gradient = stages[r].backward(parameters[r], kept[r], passed)
            sums[r] += gradient / np.float32(FLUSHED)
        if (microbatch + 1) % FLUSHED == 0:
            for flat, gradient, state in zip(parameters, sums, states, strict=True):
                optimiser.step(flat, gradient, state)
                gradient[:] = 0
    return losses
