"""Local SGD: with one step between averagings it is synchronous SGD; all ranks stay one model."""

import doctest

import numpy as np
import pytest

from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.nn import MLP
from helpers.parallel import local
from helpers.parallel.local import local_sgd
from helpers.parallel.shards import average_parameters

NETWORK = MLP((5, 7, 1))
STEPS, BATCH, RATE = 12, 6, 0.3


def rows_of(rank, n=40):
    """Made-up rows of one rank."""
    random = np.random.default_rng([7, rank])
    x = random.normal(size=(n, 5))
    return x, (x[:, 0] + 0.3 * rank > 0).astype(float)


def batch_of(rank, number):
    x, y = rows_of(rank)
    chosen = np.random.default_rng([rank, number]).integers(0, len(y), BATCH)
    return x[chosen], y[chosen]


def train(rank, every, rows=1, steps=STEPS):
    """One rank's parameters at the end, how often they were averaged, and the state on the way."""
    parameters, seen = NETWORK.initialise(seed=1), []

    def step(number):
        if number % every == 0:
            seen.append(parameters.copy())
        _, gradient = NETWORK.loss_and_gradient(parameters, *batch_of(rank.index, number))
        parameters[:] -= RATE * gradient

    times = local_sgd(rank.data, parameters, step, steps, every, rows)
    return parameters, times, seen


def synchronous(ranks):
    """The parameters of synchronous SGD, by one process with the batches of all ranks."""
    parameters = NETWORK.initialise(seed=1)
    for number in range(STEPS):
        parts = [batch_of(rank, number) for rank in range(ranks)]
        x, y = (np.concatenate(arrays) for arrays in zip(*parts))
        parameters -= RATE * NETWORK.loss_and_gradient(parameters, x, y)[1]
    return parameters


def alone(rank, steps):
    """The parameters of a rank that never meets another one."""
    parameters = NETWORK.initialise(seed=1)
    for number in range(steps):
        parameters -= RATE * NETWORK.loss_and_gradient(parameters, *batch_of(rank, number))[1]
    return parameters


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_with_one_step_between_averagings_it_is_synchronous_sgd(ranks):
    run = spmd.run(None, Mesh(data=ranks), train, 1)
    for parameters, times, _ in run.results:
        np.testing.assert_allclose(parameters, synchronous(ranks), rtol=0, atol=1e-12)
        assert times == STEPS


@pytest.mark.parametrize("every", [2, 5, 12, 100])
def test_all_ranks_are_equal_to_the_last_bit_after_each_averaging(every):
    run = spmd.run(None, Mesh(data=3), train, every)
    first, times, seen = run.results[0]
    assert times == -(-STEPS // every) == len(seen)
    for parameters, _, also_seen in run.results[1:]:
        assert np.array_equal(parameters, first)
        assert all(np.array_equal(a, b) for a, b in zip(also_seen, seen, strict=True))
    assert np.abs(first - synchronous(3)).max() > 1e-5  # it is another method


def test_averaged_once_it_is_the_mean_of_lone_workers():
    run = spmd.run(None, Mesh(data=3), train, STEPS)
    mean = np.mean([alone(rank, STEPS) for rank in range(3)], axis=0)
    np.testing.assert_allclose(run.results[2][0], mean, rtol=0, atol=1e-12)


def test_ranks_count_by_their_rows():
    def program(rank, rows):
        return train(rank, STEPS, rows)[0]

    run = spmd.run(None, Mesh(data=2), program, each=[3, 1])
    weighted = (3 * alone(0, STEPS) + alone(1, STEPS)) / 4
    np.testing.assert_allclose(run.results[0], weighted, rtol=0, atol=1e-12)


def test_a_rank_without_rows_follows_the_others():
    def program(rank, rows):
        return train(rank, 3, rows)[0]

    run = spmd.run(None, Mesh(data=2), program, each=[5, 0])
    np.testing.assert_allclose(run.results[1], alone(0, STEPS), rtol=0, atol=1e-12)


def test_no_step_leaves_all_as_it_is():
    (parameters, times, _), *_ = spmd.run(None, Mesh(data=2), train, 4, 1, 0).results
    assert np.array_equal(parameters, NETWORK.initialise(seed=1)) and times == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(every=0), "every is 0: give 1 or more"),
        (dict(every=-4), "every is -4: give 1 or more"),
        (dict(every=2.0), "every is 2.0: give a whole number"),
        (dict(steps=-1), "steps is -1: give 0 or more"),
        (dict(rows=-1), "rows is -1: give 0 or more"),
        (dict(rows=0), "No rank has a row"),
    ],
)
def test_impossible_numbers_are_refused(change, says):
    def program(rank):
        settings = dict(steps=3, every=2, rows=1) | change
        return local_sgd(rank.data, np.zeros(2), lambda number: None, **settings)

    with pytest.raises(spmd.RankError, match=says):
        spmd.run(None, Mesh(data=2), program)


def test_an_average_of_whole_numbers_is_refused():
    def program(rank):
        return average_parameters(rank.data, np.array([1, 2]), rows=1)

    with pytest.raises(spmd.RankError, match="give floats"):
        spmd.run(None, Mesh(data=2), program)


def test_examples_in_the_documentation():
    result = doctest.testmod(local)
    assert result.attempted > 0 and result.failed == 0
