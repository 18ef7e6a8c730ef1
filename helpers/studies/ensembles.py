"""Ensembles: bagging, boosting and stacking, beside the best of their members alone.

4,000 flights. The fits are those of scikit-learn (the tests show that the course's give the same),
but for boosting, which is the course's own. Columns: `method`, `seed`, `auc`, `log_loss` (held-out
days). Methods: "tree, depth N"; "N trees" (bagging, depth 8); "N stumps" (boosting, rate 0.3);
"logistic", "neighbours", "16 trees": what is stacked; "mean of three"; "stacked".
"""

from __future__ import annotations

import numpy as np
from sklearn.ensemble import BaggingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier

from helpers.learning.boosting import bin_edges, boost, to_bins
from helpers.learning.scores import scores
from helpers.studies._learning import Flights, on_ranks

SEEDS = (0, 1, 2, 3, 4)
ROWS, DEPTH = 4000, 8
DEPTHS, TREES, STUMPS = (2, 3, 4, 6, DEPTH), (2, 4, 8, 16, 32), (1, 10, 100, 200)


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    flights, table = Flights(), []
    x_test, y_test = flights.test.X, flights.test.y
    for seed in seeds:
        rows = flights.train.sample(ROWS, seed)
        said = {**_trees(rows, x_test, seed), **_boosted(rows, x_test)}
        said |= _stacked(rows, x_test, said["16 trees"], seed)
        table += [dict(method=m, seed=seed) | scores(y_test, p) for m, p in said.items()]
    return table


def _tree(depth):
    return DecisionTreeClassifier(max_depth=depth, random_state=0)


def _bag(trees, seed):
    return BaggingClassifier(_tree(DEPTH), n_estimators=trees, random_state=seed)


def _says(model, rows, x_test):
    return model.fit(rows.X, rows.y).predict_proba(x_test)[:, 1]


def _trees(rows, x_test, seed):
    said = {f"tree, depth {depth}": _says(_tree(depth), rows, x_test) for depth in DEPTHS}
    bag = _bag(max(TREES), seed).fit(rows.X, rows.y)
    each = np.array([tree.predict_proba(x_test)[:, 1] for tree in bag.estimators_])
    return said | {f"{n} trees": each[:n].mean(axis=0) for n in TREES}


def _boosted(rows, x_test):
    edges = bin_edges(rows.X)
    bins, test_bins = to_bins(rows.X, edges), to_bins(x_test, edges)
    (model,) = on_ranks(
        lambda rank: boost(rank.world, bins, rows.y, max(STUMPS), rate=0.3), ranks=1
    )
    cut = {n: model._replace(stumps=model.stumps[:n]) for n in STUMPS}
    return {f"{n} stumps": short.probabilities(test_bins) for n, short in cut.items()}


def _stacked(rows, x_test, bagged, seed):
    """The members, their plain mean and the stack; `bagged` is what 16 trees say."""
    models = {
        "logistic": LogisticRegression(C=0.1, max_iter=500),
        "neighbours": KNeighborsClassifier(100),
    }
    said = {name: _says(model, rows, x_test) for name, model in models.items()}
    members = np.column_stack([*said.values(), bagged])
    columns = np.column_stack(
        [
            cross_val_predict(model, rows.X, rows.y, cv=KFold(4), method="predict_proba")[:, 1]
            for model in (*models.values(), _bag(16, seed))
        ]
    )
    stacked = LogisticRegression().fit(columns, rows.y).predict_proba(members)[:, 1]
    return said | {"mean of three": members.mean(axis=1), "stacked": stacked}
