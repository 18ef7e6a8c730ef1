"""Ensembles: bagging, boosting and stacking, beside the best of their members alone.

4,000 flights. The fits are those of scikit-learn (the tests show that the course's give the same),
but for boosting, which is the course's own. Columns: `method`, `seed`, `numbers` (of a message),
`times` (how many messages), `kilobytes` (what one of two workers gets and sends in the whole
training), `auc`, `log_loss` (held-out days). Methods: "tree, depth N"; "N trees" (bagging, depth
8); "N stumps" (boosting, rate 0.3); "logistic", "neighbours", "16 trees": what is stacked; "mean of
three"; "stacked".

What travels: for bagging the rows to each worker, and its half of the trees, as pickles; for
stacking the rows, half of the out-of-fold predictions and half of the models; for boosting the
histograms, by an all-reduce of two ranks that hold half of the rows each.
"""

from __future__ import annotations

import pickle

import numpy as np
from sklearn.ensemble import BaggingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier

from helpers.learning.boosting import bin_edges, boost, to_bins
from helpers.learning.scores import scores
from helpers.studies._learning import Flights, on_ranks, sends

SEEDS = (0, 1, 2, 3, 4)
ROWS, DEPTH = 4000, 8
DEPTHS, TREES, STUMPS = (2, 3, 4, 6, DEPTH), (1, 2, 4, 8, 16, 32), (1, 10, 100, 200)
BINS, WORKERS = 32, 2


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    flights, table = Flights(), []
    x_test, y_test = flights.test.X, flights.test.y
    for seed in seeds:
        rows = flights.train.sample(ROWS, seed)
        said, sent = {}, {}
        bag = _trees(rows, x_test, seed, said, sent)
        _boosted(rows, x_test, said, sent)
        _stacked(rows, x_test, seed, bag, said, sent)
        for method, p in said.items():
            setting = dict(method=method, seed=seed) | sent.get(method, sends(0, 0, 0))
            table.append(setting | scores(y_test, p))
    return table


def _tree(depth):
    return DecisionTreeClassifier(max_depth=depth, random_state=0)


def _bag(trees, seed):
    return BaggingClassifier(_tree(DEPTH), n_estimators=trees, random_state=seed)


def _says(model, rows, x_test):
    return model.fit(rows.X, rows.y).predict_proba(x_test)[:, 1]


def _size(models):
    """Bytes of fitted models on their way from a worker."""
    return sum(len(pickle.dumps(model)) for model in models)


def _with_rows(rows, nbytes):
    """What a worker gets and sends: all rows, float64, and its share of so many bytes."""
    numbers = rows.X.size + rows.y.size
    return sends(numbers, 1, numbers + nbytes / WORKERS / 8, size=8)


def _trees(rows, x_test, seed, said, sent):
    """Trees alone and bagged; returns the bagged ones."""
    said |= {f"tree, depth {depth}": _says(_tree(depth), rows, x_test) for depth in DEPTHS}
    bag = _bag(max(TREES), seed).fit(rows.X, rows.y).estimators_
    each = np.array([tree.predict_proba(x_test)[:, 1] for tree in bag])
    for n in TREES:
        said[f"{n} trees"] = each[:n].mean(axis=0)
        sent[f"{n} trees"] = _with_rows(rows, _size(bag[:n]))
    return bag


def _boosted(rows, x_test, said, sent):
    edges = bin_edges(rows.X, BINS)
    bins, test_bins = to_bins(rows.X, edges), to_bins(x_test, edges)
    halves = list(zip(np.array_split(bins, WORKERS), np.array_split(rows.y, WORKERS)))

    def program(rank, half):
        return boost(rank.world, *half, max(STUMPS), rate=0.3, number=BINS)

    model = on_ranks(program, each=halves)[0]
    copies = 2 * (WORKERS - 1) / WORKERS
    for n in STUMPS:
        short = model._replace(stumps=model.stumps[:n])
        said[f"{n} stumps"] = short.probabilities(test_bins)
        # Two counts at the beginning; then two sums for each feature and bin, for each stump.
        numbers = 2 * bins.shape[1] * BINS
        sent[f"{n} stumps"] = sends(numbers, n, (2 + n * numbers) * copies, size=8)


def _stacked(rows, x_test, seed, bag, said, sent):
    """The members, their plain mean and the stack; 16 of the bagged trees are a member."""
    models = {
        "logistic": LogisticRegression(C=0.1, max_iter=500),
        "neighbours": KNeighborsClassifier(100),
    }
    said |= {name: _says(model, rows, x_test) for name, model in models.items()}
    members = np.column_stack([*(said[name] for name in models), said["16 trees"]])
    columns = np.column_stack(
        [
            cross_val_predict(model, rows.X, rows.y, cv=KFold(4), method="predict_proba")[:, 1]
            for model in (*models.values(), _bag(16, seed))
        ]
    )
    last = LogisticRegression().fit(columns, rows.y)
    said["mean of three"] = members.mean(axis=1)
    said["stacked"] = last.predict_proba(members)[:, 1]
    whole = _size([*models.values(), *bag[:16]])
    sent["mean of three"] = _with_rows(rows, whole)
    sent["stacked"] = _with_rows(rows, whole + columns.nbytes)
