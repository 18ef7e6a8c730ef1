"""Vertical split learning: a party with the airline's columns and one with the weather.

10,000 flights, 5 epochs at rate 0.2 in batches of 64. Columns: `method` ("airline", "weather": a
party alone; "mean": of their predictions; "together"), `seed`, `auc`, `log_loss` (held-out days).
"""

from __future__ import annotations

import numpy as np

from helpers.learning.scores import scores
from helpers.learning.soft import Learner, sigmoid
from helpers.learning.vertical import learn_split
from helpers.nn import MLP
from helpers.studies._learning import DTYPE, NETWORK, Flights, floats, on_ranks

SEEDS = (0, 1, 2, 3, 4)
ROWS, EPOCHS, BATCH = 10_000, 5, 64
WEATHER = ("temp", "dew", "humidity", "wind", "precip", "pressure", "visibility")


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    flights, table = Flights(), []
    x_test, y_test = floats(flights.test)
    weather = np.array([name.startswith(WEATHER) for name in flights.train.names])
    columns = [np.flatnonzero(~weather), np.flatnonzero(weather)]
    for seed in seeds:
        x, y = flights.sample(ROWS, seed)
        airline, conditions = (_alone(x[:, c], y, seed, x_test[:, c]) for c in columns)
        together = on_ranks(_train, columns, x, y, seed, x_test, ranks=2)[0]
        mean = (airline + conditions) / 2
        found = dict(airline=airline, weather=conditions, mean=mean, together=together)
        table += [dict(method=m, seed=seed) | scores(y_test, p) for m, p in found.items()]
    return table


def _alone(x, y, seed, x_test):
    network = MLP((x.shape[1], *NETWORK.widths[1:]))
    learner = Learner(network, None, seed, BATCH, DTYPE)
    learner.epochs(x, y, EPOCHS)
    return learner.probabilities(x_test)


def _train(rank, columns, x, y, seed, x_test):
    mine = columns[rank.index]
    labels = y if rank.index == 0 else None
    party = learn_split(rank.world, NETWORK, columns, x[:, mine], labels, EPOCHS, BATCH, seed=seed)
    said = party.scores(x_test[:, mine])
    return None if said is None else sigmoid(said)
