"""Mutual learning: two and four networks on the same rows, beside one alone with tuned settings.

5,000 flights in batches of 64. Columns: `method` ("alone"; "together"; "mean": of the predictions
of two that were trained alone), `models`, `epochs` (20; 40: more training), `rate`, `decay` (weight
decay), `seed`, `numbers` (of a message), `times` (how many messages), `kilobytes` (that one model
sends in the whole training), `auc` and `log_loss` (held-out days, means of the models).
"""

from __future__ import annotations

import numpy as np

from helpers.learning.mutual import learn_mutually
from helpers.learning.soft import Learner
from helpers.nn import SGD
from helpers.studies._learning import DTYPE, NETWORK, Flights, floats, mean_scores, on_ranks, sends

SEEDS = (0, 1, 2, 3, 4)
ROWS, EPOCHS, BATCH = 5000, 20, 64
RATES, DECAYS = (0.05, 0.1, 0.2, 0.4), (0.0, 0.003, 0.006, 0.01, 0.03)
# Half of a blended target is what the other says: with the same rate and decay two together learn
# from labels as slowly as one alone at half the rate: tune both before you compare.
TRIED = [("alone", 1, 1, rate, decay) for rate in RATES for decay in DECAYS]
TRIED += [("together", 2, 1, rate, decay) for rate in RATES for decay in DECAYS]
TRIED += [("together", 4, 1, *setting) for setting in ((0.2, 0.0), (0.2, 0.003), (0.4, 0.003))]
LONGER = [(rate, decay) for rate in (0.05, 0.1) for decay in (0.006, 0.01)]
TRIED += [("alone", 1, 2, *setting) for setting in LONGER]
LONGER = [(rate, decay) for rate in (0.1, 0.2) for decay in (0.003, 0.006)]
TRIED += [("together", 2, 2, *setting) for setting in LONGER]
TRIED += [("mean", 2, 1, *setting) for setting in ((0.2, 0.0), (0.1, 0.003), (0.1, 0.006))]


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    flights, table = Flights(), []
    x_test, y_test = floats(flights.test)
    for method, models, longer, rate, decay in TRIED:
        epochs = longer * EPOCHS
        sent = sends(0, 0, 0)
        if method == "together":
            sent = sends(BATCH, epochs * -(-ROWS // BATCH), (models - 1) * epochs * ROWS)
        for seed in seeds:
            rows = flights.sample(ROWS, seed)
            weight = 1.0 if method == "together" else 0.0
            learners = on_ranks(_train, *rows, epochs, weight, rate, decay, seed, ranks=models)
            said = [learner.probabilities(x_test) for learner in learners]
            if method == "mean":
                said = [np.mean(said, axis=0)]
            setting = dict(method=method, models=models, epochs=epochs, rate=rate, decay=decay)
            table.append(setting | dict(seed=seed) | sent | mean_scores(y_test, said))
    return table


def _train(rank, x, y, epochs, weight, rate, decay, seed):
    optimiser = SGD(rate, weight_decay=decay)
    learner = Learner(NETWORK, optimiser, 100 * seed + rank.index, BATCH, DTYPE)
    learn_mutually(rank.world, learner, x, y, epochs, weight, seed=seed)
    return learner
