"""Few labels: pseudo-labels and co-training, where their assumption holds and where it does not.

Setting "columns": 500 flights with labels, 20,000 without; one view is the weather and the season,
the other the schedule. Setting "pairs": 20 pairs of flights that are both late or both not late
(departure delay known), 6,000 pairs without labels; a view is one flight of the pair, so that the
views are independent, given the label. Columns: `setting`, `method`, `seed`, `numbers` (of a
message), `times` (how many messages), `kilobytes` (that a model sends in the whole training),
`auc`, `log_loss` (of the held-out days, means of both views where each is meant). "Both views" is
the mean of what both say; "all labels" are the true ones of all rows.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression

from helpers.learning.few_labels import co_train, pseudo_labels
from helpers.studies._learning import Flights, mean_scores, on_ranks, sends

SEEDS = (0, 1, 2, 3, 4)
NAMED = dict(rounds=20, positive=12, negative=38)
LATE = 15
WEATHER = (
    "day of year",
    "temp",
    "dew",
    "humidity",
    "wind",
    "precip",
    "pressure",
    "visibility",
)


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    by_columns, by_pairs = Flights(), Flights("arrival delay at take-off")
    table = []
    for seed in seeds:
        table += _compare("columns", seed, *_columns(by_columns, seed))
        table += _compare("pairs", seed, *_pairs(by_pairs, seed))
    return table


def _compare(setting, seed, few, views, y, test_views, y_test):
    """All methods; `views` and `test_views` are two arrays each, `few` the rows with labels."""
    x, x_test = np.hstack(views), np.hstack(test_views)
    alone = [_fit(view[:few], y[:few])(t) for view, t in zip(views, test_views)]
    each = list(zip(views, test_views))
    together = on_ranks(_co_train, y[:few], few, each=each)
    taught = [_fit(view, y)(t) for view, t in zip(views, test_views)]
    every = _fit(x[:few], y[:few])(x_test)
    guessed = pseudo_labels(_fit, x[:few], y[:few], x[few:], **NAMED)(x_test)
    said = {
        "one view": alone,
        "both views": [np.mean(alone, axis=0)],
        "co-training, one view": together,
        "co-training, both views": [np.mean(together, axis=0)],
        "all columns": [every],
        "pseudo-labels, all columns": [guessed],
        "both views, all labels": [np.mean(taught, axis=0)],
    }
    numbers = 2 * (NAMED["positive"] + NAMED["negative"])  # a row's number and its label
    for method, predictions in said.items():
        sent = sends(0, 0, 0)
        if method.startswith("co-training"):
            sent = sends(numbers, NAMED["rounds"], numbers * NAMED["rounds"], size=8)
        setting_of = dict(setting=setting, method=method, seed=seed)
        yield setting_of | sent | mean_scores(y_test, predictions)


def _columns(flights, seed):
    table, names = flights.train.sample(20_500, seed=50 + seed), flights.train.names
    weather = np.array([name.startswith(WEATHER) for name in names])
    views, test_views = ([t.X[:, weather], t.X[:, ~weather]] for t in (table, flights.test))
    return 500, views, table.y, test_views, flights.test.y


def _pairs(flights, seed):
    views, y = pairs(flights.train, 6020, [seed, 1])
    test_views, y_test = pairs(flights.test, 6000, [seed, 2])
    return 20, views, y, test_views, y_test


def pairs(table, n, seed):
    """Pairs of flights of the same kind: two arrays of features, and whether both are late."""
    random, late = np.random.default_rng(seed), table.y > LATE
    y = random.random(n) < late.mean()
    rows = [np.flatnonzero(~late), np.flatnonzero(late)]
    picks = [np.where(y, random.choice(rows[1], n), random.choice(rows[0], n)) for _ in range(2)]
    return [table.X[pick] for pick in picks], y.astype(float)


def _fit(x, y):
    model = LogisticRegression(C=0.3, max_iter=1000).fit(x, y)
    return lambda rows: model.predict_proba(rows)[:, 1]


def _co_train(rank, y, few, view):
    x, x_test = view
    return co_train(rank.world, _fit, x[:few], y, x[few:], **NAMED)(x_test)
