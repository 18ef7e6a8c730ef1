"""Labels that models make: as written out for one process, and useful only where they are sound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.learning.few_labels import co_train, most_certain, pseudo_labels
from helpers.learning.scores import auc


def fit(x, y):
    model = LogisticRegression().fit(x, y)
    return lambda rows: model.predict_proba(rows)[:, 1]


def two_views(n, seed, width=6, strength=0.9):
    """Two views that are independent, given the label, each good by itself."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, n).astype(float)
    sides = [random.normal(size=(n, width)) + strength * (2 * y[:, None] - 1) for _ in range(2)]
    return sides, y


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 9), st.integers(0, 9))
def test_the_surest_rows_are_the_ends_of_the_order(p, positive, negative):
    p = np.array(p)
    if positive + negative > len(p):
        with pytest.raises(ValueError, match="are to be named: too many"):
            most_certain(p, positive, negative)
        return
    rows, labels = most_certain(p, positive, negative)
    assert len(set(rows.tolist())) == positive + negative and labels.sum() == positive
    rest = np.delete(p, rows)
    if len(rest):
        assert all(p[rows[:positive]] >= rest.max()) and all(p[rows[positive:]] <= rest.min())


def test_pseudo_labels_are_those_that_the_model_gave():
    (x, _), y = two_views(60, 0)
    seen = []

    def spy(rows, labels):
        seen.append((rows.copy(), labels.copy()))
        return fit(rows, labels)

    pseudo_labels(spy, x[:10], y[:10], x[10:], rounds=2, positive=3, negative=4)
    assert [len(labels) for _, labels in seen] == [10, 17, 24]
    first = fit(x[:10], y[:10])
    rows, labels = most_certain(first(x[10:]), 3, 4)
    assert np.array_equal(seen[1][0][10:], x[10:][rows]) and np.array_equal(seen[1][1][10:], labels)
    assert len(np.unique(seen[2][0], axis=0)) == 24  # no row twice


def trained(rank, views, y, few, rounds):
    x = views[rank.index]
    return co_train(rank.world, fit, x[:few], y[:few], x[few:], rounds, 3, 3)(x)


def in_one_process(views, y, few, rounds):
    left, rows, labels = list(range(few, len(y))), list(range(few)), list(y[:few])
    for _ in range(rounds):
        named = {}
        for x in views:
            p = fit(x[rows], labels)(x[left])
            for place, label in zip(*most_certain(p, 3, 3)):
                named.setdefault(left[place], label)
        rows, labels = rows + sorted(named), labels + [named[row] for row in sorted(named)]
        left = [row for row in left if row not in named]
    return [fit(x[rows], labels)(x) for x in views]


def test_co_training_on_ranks_is_that_of_one_process():
    views, y = two_views(120, 1)
    ranks = spmd.run(None, Mesh(data=2), trained, views, y, 12, 4).results
    for found, right in zip(ranks, in_one_process(views, y, 12, 4)):
        np.testing.assert_allclose(found, right, rtol=1e-9)


def test_co_training_helps_where_its_assumption_holds():
    gains = []
    for seed in range(5):
        views, y = two_views(600, seed, width=12, strength=0.4)
        alone = [fit(x[:12], y[:12])(x) for x in views]
        together = spmd.run(None, Mesh(data=2), trained, views, y, 12, 20).results
        gains += [auc(y, b) - auc(y, a) for a, b in zip(alone, together)]
    assert np.mean(gains) > 0.03


def test_rows_that_run_out_are_noticed():
    views, y = two_views(20, 1)
    with pytest.raises(spmd.RankError, match="are to be named: too many"):
        spmd.run(None, Mesh(data=2), trained, views, y, 12, 4)
