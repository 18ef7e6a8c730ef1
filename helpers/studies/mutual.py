"""Mutual learning: two and four networks on the same rows, beside one alone with tuned settings.

5,000 flights, 20 epochs in batches of 64. Columns: `models` (1: alone), `rate`, `decay` (weight
decay), `seed`, `auc` and `log_loss` (held-out days, means of the models).
"""

from __future__ import annotations

from helpers.learning.mutual import learn_mutually
from helpers.learning.soft import Learner
from helpers.nn import SGD
from helpers.studies._learning import DTYPE, NETWORK, Flights, floats, mean_scores, on_ranks

SEEDS = (0, 1, 2, 3, 4)
ROWS, EPOCHS, BATCH = 5000, 20, 64
# Half of a blended target is what the other says: with the same rate and decay two together learn
# from labels as slowly as one alone at half the rate: tune both before you compare.
TRIED = [(m, r, d) for m in (1, 2) for r in (0.1, 0.2) for d in (0.0, 0.003, 0.006, 0.01)]
TRIED += [(4, 0.2, 0.0)]


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    flights, table = Flights(), []
    x_test, y_test = floats(flights.test)
    for models, rate, decay in TRIED:
        for seed in seeds:
            rows = flights.sample(ROWS, seed)
            learners = on_ranks(_train, *rows, rate, decay, seed, ranks=models)
            said = [learner.probabilities(x_test) for learner in learners]
            setting = dict(models=models, rate=rate, decay=decay, seed=seed)
            table.append(setting | mean_scores(y_test, said))
    return table


def _train(rank, x, y, rate, decay, seed):
    optimiser = SGD(rate, weight_decay=decay)
    learner = Learner(NETWORK, optimiser, 100 * seed + rank.index, BATCH, DTYPE)
    weight = 0.0 if rank.size == 1 else 1.0
    learn_mutually(rank.world, learner, x, y, EPOCHS, weight, seed=seed)
    return learner
