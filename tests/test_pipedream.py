"""The asynchronous pipeline equals its serial simulation, and no other training."""

import doctest

import numpy as np
import pytest

from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.nn import GPT, SGD, Adam
from helpers.parallel import pipedream
from helpers.parallel.pipedream import Versioned, replay, stashed_bytes, train
from helpers.parallel.stage import GPTStage, Parts, deal

WIDTH, ROWS = 5, 7
OPTIMISERS = [SGD(0.3), SGD(0.1, momentum=0.9), Adam(0.01)]


class Tanh:
    """One stage: ``tanh(x @ w + b)``; the last one gives the mean squared error."""

    def __init__(self, number, stages):
        self.first, self.last = number == 0, number == stages - 1

    @staticmethod
    def views(flat):
        return flat[: WIDTH**2].reshape(WIDTH, WIDTH), flat[WIDTH**2 :]

    @staticmethod
    def data(microbatch):
        x = np.random.default_rng(microbatch).normal(size=(ROWS, WIDTH))
        return x, np.sin(x[:, ::-1])

    def forward(self, parameters, microbatch, x):
        w, b = self.views(parameters)
        inputs, targets = self.data(microbatch)
        x = inputs if self.first else x
        y = np.tanh(x @ w + b)
        kept = x, y, targets
        return (np.mean((y - targets) ** 2) if self.last else y), kept

    def backward(self, parameters, kept, dy):
        w, _ = self.views(parameters)
        x, y, targets = kept
        dy = 2 * (y - targets) / y.size if self.last else dy
        dz = dy * (1 - y**2)
        return dz @ w.T, np.concatenate([(x.T @ dz).ravel(), dz.sum(axis=0)])


def stages_of(p):
    return [Tanh(number, p) for number in range(p)]


def start(p):
    size = WIDTH**2 + WIDTH
    return [np.random.default_rng([9, r]).normal(size=size, scale=0.5) for r in range(p)]


def program(rank, optimiser, steps, stashing):
    p = rank.size
    return train(rank, Tanh(rank.index, p), start(p)[rank.index], optimiser, steps, stashing)


def pipeline(p, optimiser=OPTIMISERS[0], steps=12, stashing=True, client=None):
    return spmd.run(client, Mesh(pipeline=p), program, optimiser, steps, stashing).results


# ---------------------------------------------------------------- what it is equal to


@pytest.mark.parametrize("stashing", [True, False])
@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: repr(o)[:20])
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_it_equals_the_serial_simulation_with_the_same_delays(p, optimiser, stashing):
    found = pipeline(p, optimiser, stashing=stashing)
    parameters, losses = replay(stages_of(p), start(p), optimiser, 12, stashing)
    for mine, expected in zip(found, parameters, strict=True):
        assert np.abs(mine.parameters - expected).max() <= 1e-12
    assert np.allclose(found[-1].losses, losses, rtol=1e-12, atol=0)
    assert all(mine.losses == [] for mine in found[:-1])


def test_on_real_workers_it_is_the_same():
    with open_cluster(2) as cluster:
        there = pipeline(4, client=cluster.client)
    for mine, other in zip(there, pipeline(4), strict=True):
        assert np.array_equal(mine.parameters, other.parameters)
        assert mine.staleness == other.staleness


def serial(p, steps, rate):
    """Plain gradient descent on one rank: no delay, no version but the newest."""
    parameters, stages = start(p), stages_of(p)
    for microbatch in range(steps):
        x, kept = None, []
        for stage, w in zip(stages, parameters, strict=True):
            x, needed = stage.forward(w, microbatch, x)
            kept.append(needed)
        dy, gradients = None, []
        for stage, w, needed in zip(stages[::-1], parameters[::-1], kept[::-1], strict=True):
            dy, gradient = stage.backward(w, needed, dy)
            gradients.insert(0, gradient)
        parameters = [w - rate * g for w, g in zip(parameters, gradients, strict=True)]
    return parameters


def test_without_delays_the_simulation_is_plain_gradient_descent():
    found, _ = replay(stages_of(3), start(3), SGD(0.3), 12, delays=[0, 0, 0])
    for mine, expected in zip(found, serial(3, 12, 0.3), strict=True):
        assert np.abs(mine - expected).max() < 1e-13


def test_one_stage_is_plain_gradient_descent_and_several_are_not():
    (alone,) = pipeline(1)
    assert np.abs(alone.parameters - serial(1, 12, 0.3)[0]).max() < 1e-13
    for p in (2, 4):
        for mine, other in zip(pipeline(p), serial(p, 12, 0.3), strict=True):
            assert np.abs(mine.parameters - other).max() > 1e-3


def test_stages_of_a_gpt_can_be_trained_so_too():
    gpt = GPT(vocabulary=7, context=6, width=8, heads=2, layers=3)
    texts = list(np.random.default_rng(0).integers(7, size=(8, 4, 6)))

    def made(rank):
        parts = Parts(gpt, deal(gpt, 3)[rank])
        flat = parts.cut(lambda layer: gpt.initialise_layer(layer, seed=1))
        stage = GPTStage(parts, flat.copy(), np.empty_like(flat))
        stage.start(texts, texts, divisor=24)
        return Versioned(stage), flat

    def train_gpt(rank):
        return train(rank, *made(rank.index), Adam(0.01), 8)

    found = spmd.run(None, Mesh(pipeline=3), train_gpt).results
    parameters, losses = replay(*zip(*map(made, range(3)), strict=True), Adam(0.01), 8)
    assert np.allclose(found[-1].losses, losses, rtol=1e-12, atol=0) and losses[-1] < losses[0]
    for mine, expected in zip(found, parameters, strict=True):
        assert np.abs(mine.parameters - expected).max() <= 1e-12


# ---------------------------------------------------------------- staleness and stash


@pytest.mark.parametrize("p", [1, 2, 4])
def test_staleness_grows_up_to_the_number_of_ranks_behind(p):
    for rank, mine in enumerate(pipeline(p, steps=9)):
        assert mine.staleness == [min(m, p - rank - 1) for m in range(9)]


@pytest.mark.parametrize("p", [1, 2, 4, 6])
def test_the_bytes_of_all_versions_are_those_of_the_formula(p):
    nbytes = 8 * (WIDTH**2 + WIDTH)
    for rank, mine in enumerate(pipeline(p, steps=2 * p + 3)):
        assert mine.stashed == stashed_bytes(rank, p, nbytes) == (p - rank) * nbytes
    assert {mine.stashed for mine in pipeline(p, steps=2 * p + 3, stashing=False)} == {nbytes}


class Recorded(Tanh):
    """Keeps what its backward passes were given and gave."""

    def __init__(self, number, stages):
        super().__init__(number, stages)
        self.seen, self.at, self.gave = [], [], []

    def forward(self, parameters, microbatch, x):
        self.seen.append(parameters.copy())
        return super().forward(parameters, microbatch, x)

    def backward(self, parameters, kept, dy):
        dx, gradient = super().backward(parameters, kept, dy)
        self.at.append(parameters.copy())
        self.gave.append(gradient)
        return dx, gradient


def loss_at(parameters, microbatch):
    x = None
    for stage, w in zip(stages_of(len(parameters)), parameters, strict=True):
        x, _ = stage.forward(w, microbatch, x)
    return x


def slope(parameters, r, microbatch, direction, step=1e-6):
    """The derivative of the loss along a direction of one stage's parameters."""
    moved = [
        [w + sign * step * direction * (s == r) for s, w in enumerate(parameters)]
        for sign in (1, -1)
    ]
    return (loss_at(moved[0], microbatch) - loss_at(moved[1], microbatch)) / (2 * step)


@pytest.mark.parametrize("stashing", [True, False])
def test_only_with_stashing_the_gradient_is_that_of_a_loss(stashing):
    """By finite differences, at the weights that the micro-batch's forward pass has seen."""
    stages = [Recorded(number, 3) for number in range(3)]
    replay(stages, start(3), SGD(0.5), 8, stashing)
    direction = np.random.default_rng(1).normal(size=WIDTH**2 + WIDTH)
    seen = [stage.seen[-1] for stage in stages]
    errors = [
        abs(stage.gave[-1] @ direction - slope(seen, r, 7, direction))
        for r, stage in enumerate(stages)
    ]
    if stashing:
        assert max(errors) < 1e-8
        assert all(np.array_equal(a, b) for s in stages for a, b in zip(s.seen, s.at, strict=True))
    else:
        # A stage of one layer needs its own weights only for what it hands back. The last one is
        # never behind; so what stage 1 hands back is wrong, and shows in stage 0.
        assert errors[0] > 1e-4
        assert max(errors[1:]) < 1e-8


# ---------------------------------------------------------------- small things


def test_parameters_that_were_given_stay_as_they_are():
    given = start(2)
    replay(stages_of(2), given, SGD(0.3), 5)
    assert all(np.array_equal(a, b) for a, b in zip(given, start(2), strict=True))


def test_it_never_empties_so_that_two_ranks_are_rarely_idle():
    run = spmd.run(None, Mesh(pipeline=3), program, SGD(0.1), 6, True, record=True)
    order = [
        "".join(e.operation[0] for e in run.events if e.rank == r and e.layer == r)
        for r in range(3)
    ]
    assert order == ["fffbfbfbfbbb", "ffbfbfbfbfbb", "fb" * 6]


def test_wrong_numbers_get_one_sentence():
    with pytest.raises(ValueError, match="There is no rank 3: there are 0 to 2"):
        stashed_bytes(3, 3, 8)
    with pytest.raises(spmd.RankError, match="microbatches must be a whole number from 1 up"):
        pipeline(2, steps=0)


def test_the_examples_in_the_documentation_are_right():
    failed, tried = doctest.testmod(pipedream)
    assert tried and not failed
