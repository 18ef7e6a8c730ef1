"""Ensembles on workers give what scikit-learn gives; boosting on ranks what one rank gives."""

import numpy as np
import pytest
from sklearn.ensemble import (
    BaggingClassifier,
    HistGradientBoostingClassifier,
    StackingClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.naive_bayes import GaussianNB
from sklearn.tree import DecisionTreeClassifier

from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.learning.boosting import best_split, bin_edges, boost, histograms, to_bins
from helpers.learning.ensembles import (
    bagging,
    bootstrap_samples,
    folds,
    mean_probability,
    stacking,
)


@pytest.fixture(scope="module")
def client():
    with open_cluster(workers=2) as cluster:
        yield cluster.client


def rows(n=300, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 4))
    return x, (x[:, 0] + x[:, 1] * x[:, 2] + random.normal(size=n) > 0).astype(float)


# ---------------------------------------------------------------- bagging and stacking


def test_bagging_is_that_of_scikit_learn(client):
    x, y = rows()
    oracle = BaggingClassifier(DecisionTreeClassifier(), n_estimators=6, random_state=3).fit(x, y)
    seeds = [tree.random_state for tree in oracle.estimators_]
    models = bagging(client, DecisionTreeClassifier(), x, y, oracle.estimators_samples_, seeds)
    fresh = rows(seed=1)[0]
    right = oracle.predict_proba(fresh)[:, 1]
    np.testing.assert_allclose(mean_probability(models, fresh), right, rtol=1e-12)


def test_bagging_takes_data_that_lie_on_the_workers_and_leaves_its_model_alone(client):
    x, y = rows()
    model, samples = GaussianNB(), bootstrap_samples(len(x), 3, seed=1)
    placed = bagging(client, model, *client.scatter([x, y]), samples)
    sent = bagging(client, model, x, y, samples)
    assert np.array_equal(mean_probability(placed, x), mean_probability(sent, x))
    assert not hasattr(model, "theta_")
    with pytest.raises(ValueError, match="3 samples and 2 seeds"):
        bagging(client, model, x, y, samples, seeds=[1, 2])


def test_stacking_is_that_of_scikit_learn(client):
    x, y = rows()
    models = [DecisionTreeClassifier(max_depth=3, random_state=0), GaussianNB()]
    named = [("tree", models[0]), ("bayes", models[1])]
    oracle = StackingClassifier(
        named, LogisticRegression(), cv=KFold(4), stack_method="predict_proba"
    ).fit(x, y)
    parts = [part for _, part in KFold(4).split(x)]
    stack = stacking(client, models, LogisticRegression(), x, y, parts)
    fresh = rows(seed=1)[0]
    right = oracle.predict_proba(fresh)[:, 1]
    np.testing.assert_allclose(stack.probabilities(fresh), right, rtol=1e-10)
    assert [part.tolist() for part in parts] == [part.tolist() for part in folds(len(x), 4)]


def test_folds_in_any_order_give_every_row_its_own_prediction(client):
    """The last model sees what each row got, wherever its fold stands in the list."""
    x, y = rows(90)
    parts = folds(90, 3)
    a, b = (
        stacking(client, [GaussianNB()], LogisticRegression(), x, y, order)
        for order in (parts, parts[::-1])
    )
    assert np.allclose(a.probabilities(x), b.probabilities(x), rtol=1e-12)


def test_samples_and_folds_that_cannot_be_are_refused(client):
    x, y = rows(20)
    with pytest.raises(ValueError, match="every row exactly once"):
        stacking(client, [GaussianNB()], LogisticRegression(), x, y, [[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="9 folds of 3 rows: give 2 to 3"):
        folds(3, 9)
    with pytest.raises(ValueError, match="0 samples of 5 rows"):
        bootstrap_samples(5, 0, seed=0)
    assert bootstrap_samples(5, 2, seed=0, size=9).max() <= 4


# ---------------------------------------------------------------- boosting


def boosted(rank, bins, y, stumps, rate=0.3):
    mine = np.array_split(np.arange(len(y)), rank.size)[rank.index]
    return boost(rank.world, bins[mine], y[mine], stumps, rate, number=16)


def boost_on(p, bins, y, stumps, rate=0.3):
    return spmd.run(None, Mesh(data=p), boosted, bins, y, stumps, rate).results


@pytest.mark.parametrize("p", [2, 3])
def test_boosting_on_ranks_finds_the_stumps_of_one_rank(p):
    x, y = rows(301)
    bins = to_bins(x, bin_edges(x, 16))
    (one,), ranks = boost_on(1, bins, y, 30), boost_on(p, bins, y, 30)
    for model in ranks:
        assert model == ranks[0]
        assert [s[:2] for s in model.stumps] == [s[:2] for s in one.stumps]
        np.testing.assert_allclose(model.scores(bins), one.scores(bins), rtol=1e-11, atol=1e-13)


def test_boosting_is_that_of_scikit_learn():
    """Its histogram boosting, told to grow stumps; it sums gradients in float32."""
    x, y = rows(500)
    bins = to_bins(x, bin_edges(x, 16))
    oracle = HistGradientBoostingClassifier(
        max_iter=40, learning_rate=0.2, max_leaf_nodes=2, min_samples_leaf=1, early_stopping=False
    ).fit(bins.astype(float), y)
    (model,) = boost_on(1, bins, y, 40, 0.2)
    right = oracle.predict_proba(bins.astype(float))[:, 1]
    assert np.abs(model.probabilities(bins) - right).max() < 1e-4


def test_the_best_split_is_the_best_of_all():
    x, y = rows(80)
    bins = to_bins(x, bin_edges(x, 8))
    gradient, curvature = 0.4 - y, np.full(80, 0.24)
    sums = histograms(bins, np.array([gradient, curvature]), 8)
    gains = {}
    for feature in range(4):
        for place in range(7):
            low = bins[:, feature] <= place
            if 0 < low.sum() < 80:
                gains[feature, place] = sum(
                    gradient[side].sum() ** 2 / curvature[side].sum() for side in (low, ~low)
                )
    feature, place, low, high = best_split(sums)
    assert gains[feature, place] == pytest.approx(max(gains.values()), rel=1e-12)
    side = bins[:, feature] <= place
    assert low == pytest.approx(-gradient[side].sum() / curvature[side].sum(), rel=1e-12)
    assert high == pytest.approx(-gradient[~side].sum() / curvature[~side].sum(), rel=1e-12)


def test_bins_hold_their_edges_and_few_values_get_a_bin_each():
    x = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [5.0, 1.0]])
    edges = bin_edges(x, 4)
    assert to_bins(x, edges).tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert to_bins(np.array([[-9.0, 0.0], [9.0, 9.0]]), edges).tolist() == [[0, 0], [3, 0]]
    many = np.random.default_rng(0).normal(size=(5000, 1))
    counts = np.bincount(to_bins(many, bin_edges(many, 32))[:, 0])
    assert len(counts) == 32 and counts.max() < 1.1 * 5000 / 32


def test_boosting_refuses_what_cannot_be_learnt():
    bins = np.zeros((10, 2), np.uint8)
    with pytest.raises(spmd.RankError, match="all labels are alike"):
        boost_on(2, bins, np.ones(10), 3)
    with pytest.raises(spmd.RankError, match="no split leaves rows on both sides"):
        boost_on(1, bins, np.arange(10) % 2, 3)
    with pytest.raises(ValueError, match="1 bins: give 2 to 256"):
        bin_edges(np.zeros((3, 1)), 1)
