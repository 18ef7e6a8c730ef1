"""Models that learn together on ranks give what one process gives, and the oracles' scores."""

import doctest
import importlib

import numpy as np
import pytest
from sklearn import metrics

from helpers import learning
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.learning.distillation import average_weights, codistil
from helpers.learning.multi_task import learn_tasks, shared_part
from helpers.learning.mutual import learn_mutually, others_mean
from helpers.learning.scores import auc, log_loss, scores
from helpers.learning.soft import Learner, blend, cross_entropy, loss_and_gradient, sigmoid
from helpers.learning.vertical import Party, learn_split
from helpers.nn import MLP, SGD, Adam
from helpers.parallel.counted import CountedGroup

NETWORK = MLP((5, 7, 1))
ROWS = 48


def rows(seed=0, n=ROWS):
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 5))
    return x, (x[:, 0] + x[:, 1] * x[:, 2] + random.normal(size=n) > 0).astype(float)


def on_ranks(p, program, *args, **options):
    return spmd.run(None, Mesh(data=p), program, *args, **options).results


@pytest.mark.parametrize("name", learning.__all__)
def test_examples_in_the_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"helpers.learning.{name}"))
    assert found.attempted and not found.failed


def test_an_unknown_method_is_refused_with_those_that_exist():
    with pytest.raises(AttributeError, match="no 'magic': choose boosting, distillation"):
        _ = learning.magic
    assert learning.soft.sigmoid is sigmoid


# ---------------------------------------------------------------- soft labels


def test_soft_labels_of_0_and_1_are_hard_labels():
    x, y = rows()
    w = NETWORK.initialise(3)
    hard, soft = NETWORK.loss_and_gradient(w, x, y), loss_and_gradient(NETWORK, w, x, y)
    assert soft[0] == pytest.approx(hard[0], rel=1e-14)
    np.testing.assert_allclose(soft[1], hard[1], rtol=1e-12, atol=1e-16)


def test_the_gradient_of_soft_labels_is_that_of_finite_differences():
    x, _ = rows()
    w, target = NETWORK.initialise(3), np.random.default_rng(1).random(ROWS)
    _, gradient = loss_and_gradient(NETWORK, w, x, target, divisor=10)
    for place in range(0, NETWORK.size, 5):
        step = np.zeros(NETWORK.size)
        step[place] = 1e-5
        ends = [loss_and_gradient(NETWORK, w + s * step, x, target, 10)[0] for s in (1, -1)]
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_a_blend_has_the_gradient_of_two_losses():
    z, random = np.linspace(-3, 3, 9), np.random.default_rng(0)
    own, others = random.integers(0, 2, 9).astype(float), random.random(9)
    both = cross_entropy(z, own)[1] + 3 * cross_entropy(z, others)[1]
    np.testing.assert_allclose(4 * cross_entropy(z, blend(own, others, 3))[1], both, rtol=1e-12)


def test_scores_of_1000_do_not_overflow():
    value, dz = cross_entropy(np.array([1000.0, -1000.0]), np.array([0.0, 1.0]))
    assert value == 1000 and dz.tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("target", "words"),
    [([0.5], "give one for each"), ([0.5, 1.5], "outside of 0 to 1"), ([[0.1, 0.2]], "one for")],
)
def test_targets_that_cannot_be_are_refused(target, words):
    with pytest.raises(ValueError, match=words):
        cross_entropy(np.zeros(2), np.array(target))
    with pytest.raises(ValueError, match="weight is -1: give 0 or more"):
        blend(np.ones(2), np.ones(2), -1)


def test_a_learner_steps_as_its_optimiser_and_depends_on_its_seed_alone():
    x, y = rows()
    learner, w = Learner(NETWORK, SGD(0.1), seed=4), NETWORK.initialise(4)
    loss, gradient = NETWORK.loss_and_gradient(w, x, y)
    assert learner.step(x, y) == pytest.approx(loss, rel=1e-14)
    np.testing.assert_allclose(learner.parameters, w - 0.1 * gradient, rtol=1e-12)
    found = []
    for seed in (1, 1, 2):
        again = Learner(NETWORK, Adam(0.01), seed=seed, batch=7)
        again.epochs(x, y, 2)
        found.append(again.probabilities(x))
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("digits", [1, 2, 12])
def test_scores_are_those_of_scikit_learn(digits):
    random = np.random.default_rng(digits)
    y, p = random.integers(0, 2, 200), random.random(200).round(digits)  # ties, too
    p = np.clip(p, 0.01, 0.99)
    assert auc(y, p) == pytest.approx(metrics.roc_auc_score(y, p), rel=1e-12)
    assert log_loss(y, p) == pytest.approx(metrics.log_loss(y, p), rel=1e-12)
    assert scores(y, p) == {"auc": auc(y, p), "log_loss": log_loss(y, p)}


def test_scores_of_what_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="all labels are alike"):
        auc([1, 1], [0.2, 0.3])
    for score in (auc, log_loss):
        with pytest.raises(ValueError, match="2 labels and 1 predictions"):
            score([0, 1], [0.5])
    assert np.isfinite(log_loss([0, 1], [1.0, 0.0]))


# ---------------------------------------------------------------- mutual learning


def mutual(rank, epochs, weight):
    x, y = rows()
    learner = Learner(NETWORK, SGD(0.2), seed=rank.index, batch=10)
    losses = learn_mutually(rank.world, learner, x, y, epochs, weight, seed=5)
    return learner.parameters, losses


def mutual_in_one_process(p, epochs, weight):
    """The same, written out once more for one process."""
    x, y = rows()
    models, random = [NETWORK.initialise(k) for k in range(p)], np.random.default_rng([5, 2])
    for _ in range(epochs):
        order = random.permutation(ROWS)
        for start in range(0, ROWS, 10):
            b = order[start : start + 10]
            said = [sigmoid(NETWORK.predict(w, x[b])[:, 0]) for w in models]
            for k, w in enumerate(models):
                others = np.mean([said[j] for j in range(p) if j != k], axis=0)
                target = (y[b] + weight * others) / (1 + weight)
                w -= 0.2 * loss_and_gradient(NETWORK, w, x[b], target)[1]
    return models


@pytest.mark.parametrize("p", [2, 3])
def test_mutual_learning_on_ranks_is_that_of_one_process(p):
    models = mutual_in_one_process(p, 3, 1.5)
    for (parameters, losses), expected in zip(on_ranks(p, mutual, 3, 1.5), models):
        np.testing.assert_allclose(parameters, expected, rtol=1e-12, atol=1e-14)
        assert len(losses) == 3 * 5


def test_without_weight_mutual_learning_is_every_model_alone():
    (first, _), (second, _) = on_ranks(2, mutual, 2, 0.0)
    ((alone, _),) = on_ranks(1, mutual, 2, 0.0)
    assert np.array_equal(first, alone) and not np.allclose(first, second)


def test_a_rank_without_others_listens_to_itself():
    assert on_ranks(1, lambda rank: others_mean(rank.world, np.ones(2)).tolist()) == [[1, 1]]
    three = on_ranks(3, lambda rank: others_mean(rank.world, np.array([3.0 * rank.index]))[0])
    assert np.allclose(three, [4.5, 3, 1.5])


# ---------------------------------------------------------------- co-distillation


def distilled(rank, rounds, warm_up, teacher):
    x, y = rows(seed=rank.index, n=20 + rank.index)
    learner = Learner(NETWORK, SGD(0.2), seed=rank.index, batch=8)
    codistil(rank.world, learner, x, y, rows(9)[0], rounds, 1.5, warm_up, teacher)
    return learner.parameters


def distilled_in_one_process(p, rounds, warm_up, teacher):
    public, models, found = rows(9)[0], [], []
    for k in range(p):
        models.append(Learner(NETWORK, SGD(0.2), seed=k, batch=8))
        models[k].epochs(*rows(seed=k, n=20 + k), warm_up)
    for _ in range(rounds - warm_up):
        said = [model.probabilities(public) for model in models]
        for k, model in enumerate(models):
            x, y = rows(seed=k, n=20 + k)
            who = {"all": range(p), "self": [k], "others": [j for j in range(p) if j != k]}[teacher]
            target = np.mean([said[j] for j in who], axis=0)
            order = model.random.permutation(len(x))
            for start in range(0, len(x), 8):
                own = order[start : start + 8]
                more = model.random.integers(len(public), size=round(1.5 * len(own)))
                both = np.concatenate([x[own], public[more]])
                model.step(both, np.concatenate([y[own], target[more]]))
    found = [model.parameters for model in models]
    return found


@pytest.mark.parametrize("teacher", ["all", "others", "self"])
def test_codistillation_on_ranks_is_that_of_one_process(teacher):
    expected = distilled_in_one_process(3, 4, 1, teacher)
    for parameters, right in zip(on_ranks(3, distilled, 4, 1, teacher), expected):
        np.testing.assert_allclose(parameters, right, rtol=1e-12, atol=1e-14)


def test_codistillation_that_only_warms_up_is_training_alone():
    (first, _), (alone,) = on_ranks(2, distilled, 2, 2, "all"), on_ranks(1, distilled, 2, 2, "all")
    assert np.array_equal(first, alone)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(teacher="moon"), "no teacher 'moon': choose all, others, self"),
        (dict(weight=-1), "weight is -1"),
        (dict(warm_up=3), "3 of 2 rounds to warm up: give 0 to 2"),
    ],
)
def test_codistillation_refuses_what_cannot_be(options, words):
    x, y = rows()
    with pytest.raises(spmd.RankError, match=words):
        on_ranks(1, lambda rank: codistil(rank.world, Learner(NETWORK), x, y, x, 2, **options))


def averaged(rank, rounds):
    x, y = rows(seed=rank.index, n=20 + rank.index)
    learner = Learner(NETWORK, SGD(0.2), seed=rank.index, batch=8)
    learner.parameters[:] = NETWORK.initialise(7)
    average_weights(rank.world, learner, x, y, rounds)
    return learner.parameters


def test_averaged_weights_on_ranks_are_those_of_one_process():
    models = [Learner(NETWORK, SGD(0.2), seed=k, batch=8) for k in range(3)]
    mean = NETWORK.initialise(7)
    for _ in range(3):
        for k, model in enumerate(models):
            model.parameters[:] = mean
            model.epochs(*rows(seed=k, n=20 + k))
        mean = np.mean([model.parameters for model in models], axis=0)
    for parameters in on_ranks(3, averaged, 3):
        np.testing.assert_allclose(parameters, mean, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- multi-task


def tasks_of(p):
    x, _ = rows()
    return x, [(x[:, 0] + x[:, 1 + k] > 0).astype(float) for k in range(p)]


def multi_task(rank, p, epochs, share):
    x, labels = tasks_of(p)
    learner = Learner(NETWORK, SGD(0.2), seed=1, batch=10)
    learn_tasks(rank.world, learner, x, labels[rank.index], epochs, seed=5, share=share)
    return learner.parameters


def test_shared_layers_learn_from_all_tasks_as_in_one_process():
    p, (x, labels) = 3, tasks_of(3)
    models, random = [NETWORK.initialise(1) for _ in range(p)], np.random.default_rng([5, 2])
    shared = shared_part(NETWORK)
    for _ in range(2):
        order = random.permutation(ROWS)
        for start in range(0, ROWS, 10):
            b = order[start : start + 10]
            found = [NETWORK.loss_and_gradient(w, x[b], y[b])[1] for w, y in zip(models, labels)]
            mean = np.mean([g[shared] for g in found], axis=0)
            for w, g in zip(models, found):
                g[shared] = mean
                w -= 0.2 * g
    ranks = on_ranks(p, multi_task, p, 2, True)
    for parameters, right in zip(ranks, models):
        np.testing.assert_allclose(parameters, right, rtol=1e-11, atol=1e-14)
        assert np.array_equal(parameters[shared], ranks[0][shared])
    assert not np.allclose(ranks[0], ranks[1])  # the heads are their own


def test_tasks_that_do_not_share_are_trained_alone():
    first, second = on_ranks(2, multi_task, 2, 2, False)
    (alone,) = on_ranks(1, multi_task, 1, 2, True)
    assert np.allclose(first, alone, rtol=1e-13)
    assert not np.allclose(first[shared_part(NETWORK)], second[shared_part(NETWORK)])


# ---------------------------------------------------------------- vertical split

COLUMNS = [[0, 3], [1], [4, 2]]


def split(rank, columns, epochs):
    x, y = rows()
    mine = x[:, columns[rank.index]]
    party = learn_split(
        rank.world, NETWORK, columns, mine, None if rank.index else y, epochs, batch=10, seed=2
    )
    return party.scores(mine), party.first


@pytest.mark.parametrize("columns", [[[0, 1, 2, 3, 4]], [[0, 1, 2], [3, 4]], COLUMNS])
def test_split_learning_is_central_training(columns):
    x, y = rows()
    w, random = NETWORK.initialise(2), np.random.default_rng([2, 2])
    for _ in range(40):
        order = random.permutation(ROWS)
        for start in range(0, ROWS, 10):
            b = order[start : start + 10]
            w -= 0.2 * NETWORK.loss_and_gradient(w, x[b], y[b])[1]
    results = on_ranks(len(columns), split, columns, 40)
    np.testing.assert_allclose(results[0][0], NETWORK.predict(w, x)[:, 0], rtol=1e-11, atol=1e-12)
    for part, (_, first) in zip(columns, results):
        assert np.abs(first - NETWORK.views(w)[0][0][part]).max() < 1e-12
    assert all(found is None for found, _ in results[1:])


def test_weight_decay_of_split_learning_is_that_of_sgd():
    x, y = rows()

    def program(rank):
        mine, labels = x[:, COLUMNS[rank.index]], None if rank.index else y
        options = dict(epochs=4, batch=10, seed=2, decay=0.05)
        return learn_split(rank.world, NETWORK, COLUMNS, mine, labels, **options).scores(mine)

    w, random, sgd = NETWORK.initialise(2), np.random.default_rng([2, 2]), SGD(0.2, 0.0, 0.05)
    state = sgd.start(NETWORK.size)
    for _ in range(4):
        order = random.permutation(ROWS)
        for start in range(0, ROWS, 10):
            b = order[start : start + 10]
            sgd.step(w, NETWORK.loss_and_gradient(w, x[b], y[b])[1], state)
    right = NETWORK.predict(w, x)[:, 0]
    np.testing.assert_allclose(on_ranks(3, program)[0], right, rtol=1e-11, atol=1e-12)


def test_only_activations_and_their_gradient_travel():
    """So many bytes as the activations have, up and down; nothing that has the columns' size."""

    def program(rank):
        x, y = rows()
        party_x = x[:, COLUMNS[rank.index]]
        first = NETWORK.views(NETWORK.initialise(0))[0][0][COLUMNS[rank.index]]
        rest = [np.zeros(7), np.ones((7, 1)), np.zeros(1)] if rank.index == 0 else None
        party = Party(CountedGroup(rank.world), first.copy(), rest)
        party.step(party_x, None if rank.index else y)
        return party.group.sent

    one = ROWS * 7 * 8
    assert on_ranks(3, program) == [2 * one, one, one]


def test_split_learning_refuses_what_it_cannot_split():
    x, y = rows()
    for network, columns, words in (
        (MLP((5, 4, 3, 1)), [[0, 1, 2, 3, 4]], "has one hidden layer"),
        (NETWORK, [[0, 1, 2, 3]], "columns 0 to 4 must each belong to one party"),
        (NETWORK, [[0, 1, 2, 3, 4, 4]], "must each belong to one party"),
    ):
        with pytest.raises(spmd.RankError, match=words):
            on_ranks(1, lambda rank, n=network, c=columns: learn_split(rank.world, n, c, x, y, 1))
    with pytest.raises(spmd.RankError, match="belongs to rank 0"):
        on_ranks(1, lambda rank: Party(rank.world, np.zeros((5, 7))))


# ---------------------------------------------------------------- on workers of a cluster


def test_processes_give_what_threads_give():
    from helpers.cluster import open_cluster

    with open_cluster(workers=2) as cluster:
        run = spmd.run(cluster.client, Mesh(data=3), distilled, 3, 1, "all")
        vertical = spmd.run(cluster.client, Mesh(data=3), split, COLUMNS, 2)
    here = on_ranks(3, distilled, 3, 1, "all")
    for there, right in zip(run.results, here):
        np.testing.assert_allclose(there, right, rtol=1e-12)
    right = on_ranks(3, split, COLUMNS, 2)[0][0]
    np.testing.assert_allclose(vertical.results[0][0], right, rtol=1e-12)
