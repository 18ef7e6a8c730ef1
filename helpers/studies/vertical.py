"""Vertical split learning: a party with the airline's columns and one with the weather.

10,000 flights, 5 epochs at rate 0.2 in batches of 64. Columns: `method` ("airline", "weather": a
party alone; "mean": of their predictions; "stacked": a logistic model of what both say out of fold;
"together"), `decay` (weight decay), `seed`, `numbers` (of a message), `times` (how many messages),
`kilobytes` (that a party sends in the whole training), `auc`, `log_loss` (held-out days).
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression

from helpers.learning.ensembles import folds
from helpers.learning.scores import scores
from helpers.learning.soft import Learner, sigmoid
from helpers.learning.vertical import learn_split
from helpers.nn import MLP, SGD
from helpers.studies._learning import DTYPE, NETWORK, Flights, floats, on_ranks, sends

SEEDS = (0, 1, 2, 3, 4)
ROWS, EPOCHS, BATCH = 10_000, 5, 64
DECAYS = (0.0, 0.003, 0.01, 0.03, 0.1)
FOLDS = 3
WEATHER = ("temp", "dew", "humidity", "wind", "precip", "pressure", "visibility")


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    flights, table = Flights(), []
    x_test, y_test = floats(flights.test)
    weather = np.array([name.startswith(WEATHER) for name in flights.train.names])
    columns = [np.flatnonzero(~weather), np.flatnonzero(weather)]
    for decay in DECAYS:
        for seed in seeds:
            said = _all_methods(columns, *flights.sample(ROWS, seed), decay, seed, x_test)
            for method, p in said.items():
                setting = dict(method=method, decay=decay, seed=seed) | _sent(method)
                table.append(setting | scores(y_test, p))
    return table


def _sent(method):
    """Activations of a batch to the party with the labels, or their gradient from it."""
    if method != "together":
        return sends(0, 0, 0)
    width = NETWORK.widths[1]
    return sends(BATCH * width, EPOCHS * -(-ROWS // BATCH), EPOCHS * ROWS * width)


def _all_methods(columns, x, y, decay, seed, x_test):
    airline, weather = (_alone(x[:, c], y, decay, seed, x_test[:, c]) for c in columns)
    each = np.stack([airline, weather], axis=1)
    seen_by_none = np.empty((len(y), 2))
    for part in folds(len(y), FOLDS):
        rest = np.setdiff1d(np.arange(len(y)), part)
        for k, c in enumerate(columns):
            said = _alone(x[rest][:, c], y[rest], decay, seed, x[part][:, c])
            seen_by_none[part, k] = said
    last = LogisticRegression().fit(_logits(seen_by_none), y)
    return dict(
        airline=airline,
        weather=weather,
        mean=each.mean(axis=1),
        stacked=last.predict_proba(_logits(each))[:, 1],
        together=on_ranks(_train, columns, x, y, decay, seed, x_test, ranks=2)[0],
    )


def _logits(p):
    p = np.clip(np.asarray(p, float), 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def _alone(x, y, decay, seed, x_test):
    network = MLP((x.shape[1], *NETWORK.widths[1:]))
    learner = Learner(network, SGD(0.2, weight_decay=decay), seed, BATCH, DTYPE)
    learner.epochs(x, y, EPOCHS)
    return learner.probabilities(x_test)


def _train(rank, columns, x, y, decay, seed, x_test):
    mine = columns[rank.index]
    labels = y if rank.index == 0 else None
    options = dict(batch=BATCH, seed=seed, decay=decay)
    party = learn_split(rank.world, NETWORK, columns, x[:, mine], labels, EPOCHS, **options)
    said = party.scores(x_test[:, mine])
    return None if said is None else sigmoid(said)
