"""Co-distillation: workers with rows of their own and shared rows without labels.

Eight airlines, or five blocks of the day, with 500 flights each, and 5,000 flights without labels
that no worker has; 40 epochs at rate 0.2 in batches of 64. Columns: `parts` ("airline" or "hour"),
`method`, `epochs`, `decay` (weight decay), `seed`, `numbers` (of a message), `times` (how many
messages), `kilobytes` (that a worker sends in the whole training), `auc` and `log_loss` (held-out
days, means of the workers' models) and `own_auc` (the same on each worker's own kind of flights).
Methods: "alone" (also with 80 epochs: more training); "together"; "self" (each learns from what it
says itself); "weights" (the mean of all weights after each epoch); "mean" (the mean of the
predictions of those alone); "one model" (trained on the rows of all).
"""

from __future__ import annotations

import numpy as np

from helpers.learning.distillation import average_weights, codistil
from helpers.learning.scores import auc
from helpers.learning.soft import Learner
from helpers.nn import SGD
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
ROWS, PUBLIC, ROUNDS, WARM_UP, BATCH = 500, 5000, 40, 10, 64
PARTS = ("airline", "hour")
DECAYS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
FEW_DECAYS = (0.001, 0.003, 0.01, 0.03)


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    flights = Flights()
    return [row for how in PARTS for seed in seeds for row in _all_methods(flights, how, seed)]


def _all_methods(flights, how, seed):
    x_test, y_test = floats(flights.test)
    tables, nobodys = flights.parts_and_rest(how, ROWS, PUBLIC, seed)
    parts, public = [floats(part) for part in tables], floats(nobodys)[0]
    whole = tuple(np.concatenate(side) for side in zip(*parts))
    keys = flights.keys(flights.test, how)
    # What one worker of an all-reduce sends, in copies of the array.
    copies = 2 * (len(parts) - 1) / len(parts)

    def row(method, decay, said, numbers=0, times=0, epochs=ROUNDS):
        own = [auc(y_test[keys == k], p[keys == k]) for k, p in enumerate(said)]
        setting = dict(parts=how, method=method, epochs=epochs, decay=decay, seed=seed)
        setting |= sends(numbers, times, numbers * times * copies)
        return setting | mean_scores(y_test, said) | dict(own_auc=float(np.mean(own)))

    for decay in DECAYS:
        setting = public, decay, seed
        alone = on_ranks(_train, *setting, ROUNDS, ROUNDS, "all", x_test, each=parts)
        yield row("alone", decay, alone)
        yield row("mean", decay, [np.mean(alone, axis=0)] * len(parts))
        # As many steps as a worker took.
        epochs = ROUNDS // len(parts)
        pooled = on_ranks(_train, *setting, epochs, epochs, "all", x_test, each=[whole])
        yield row("one model", decay, pooled * len(parts), epochs=epochs)
    for decay in FEW_DECAYS:
        for method, teacher in (("together", "all"), ("self", "self")):
            setting = public, decay, seed, ROUNDS, WARM_UP, teacher, x_test
            numbers, times = (PUBLIC, ROUNDS - WARM_UP) if teacher == "all" else (0, 0)
            yield row(method, decay, on_ranks(_train, *setting, each=parts), numbers, times)
        said = on_ranks(_average, decay, seed, x_test, each=parts)
        yield row("weights", decay, said, NETWORK.size, ROUNDS)
    for decay in (0.01, 0.03, 0.1):
        longer = public, decay, seed, 2 * ROUNDS, 2 * ROUNDS, "all", x_test
        yield row("alone", decay, on_ranks(_train, *longer, each=parts), epochs=2 * ROUNDS)


def _train(rank, public, decay, seed, rounds, warm_up, teacher, x_test, rows):
    """One worker's part: what its model says about the held-out days."""
    optimiser = SGD(0.2, weight_decay=decay)
    learner = Learner(NETWORK, optimiser, 100 * seed + rank.index, BATCH, DTYPE)
    codistil(rank.world, learner, *rows, public, rounds, 1.0, warm_up, teacher)
    return learner.probabilities(x_test)


def _average(rank, decay, seed, x_test, rows):
    """The same with weights that travel: all begin with the same ones."""
    optimiser = SGD(0.2, weight_decay=decay)
    learner = Learner(NETWORK, optimiser, 100 * seed + rank.index, BATCH, DTYPE)
    learner.parameters[:] = NETWORK.initialise(100 * seed, DTYPE)
    average_weights(rank.world, learner, *rows, ROUNDS)
    return learner.probabilities(x_test)
