"""Float16 to keep and to send: overflow is found by all ranks, small numbers are saved."""

import doctest
from functools import partial

import numpy as np
import pytest

from helpers.engine import spmd
from helpers.engine.errors import RankError
from helpers.engine.mesh import Mesh
from helpers.nn import MLP, SGD, Adam
from helpers.parallel import precision
from helpers.parallel.precision import LossScale, MixedPrecision, all_reduce_half, to_half


def on_ranks(ranks, program, *args, each=None, **settings):
    program = partial(program, **settings)
    return spmd.run(None, Mesh(data=ranks), program, *args, each=each).results


def alone(act):
    """A value that needs a group of one rank."""
    return on_ranks(1, lambda rank: act(rank.data))[0]


# ---------------------------------------------------------------- the scale


def test_the_scale_is_halved_on_overflow_and_doubled_after_good_steps():
    scale, seen = LossScale(8.0, patience=3), []
    for finite in (True, True, False, True, True, True, True, False, True):
        scale.update(finite)
        seen.append(scale.scale)
    assert seen == [8, 8, 4, 4, 4, 8, 8, 4, 4]


def test_a_gradient_that_is_never_finite_ends_with_a_sentence():
    scale = LossScale(2.0**-13)
    scale.update(False)
    with pytest.raises(FloatingPointError, match="lower the rate"):
        scale.update(False)


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"scale": np.inf}, {"patience": 0}])
def test_an_impossible_scale_is_refused(settings):
    with pytest.raises(ValueError, match="give a"):
        LossScale(**settings)


# ---------------------------------------------------------------- the exchange


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("size", [0, 1, 7, 64])
def test_the_sum_is_that_of_float32_rounded_once_on_all_ranks(size, ranks):
    arrays = to_half(np.random.default_rng(size).normal(size=(ranks, size)))
    right = to_half(arrays.astype(np.float32).sum(axis=0, dtype=np.float32))
    found = on_ranks(ranks, lambda rank, mine: all_reduce_half(rank.data, mine), each=list(arrays))
    assert all(total.dtype == np.float16 for total in found)
    assert all(np.array_equal(total, found[0]) for total in found)
    assert np.allclose(found[0], right, rtol=1e-3, atol=1e-6)


def test_small_terms_are_not_lost_beside_large_ones():
    # Added in float16, 2048 + 1 stays 2048: seven ones would be lost.
    terms = [np.full(3, 2048 if rank == 0 else 1, np.float16) for rank in range(8)]
    found = on_ranks(8, lambda rank, mine: all_reduce_half(rank.data, mine), each=terms)
    assert found[0].tolist() == [2056.0] * 3


def test_half_the_bytes_are_sent():
    from helpers.engine.collectives import all_reduce

    def sent(act):
        run = spmd.run(None, Mesh(data=2), act, record=True)
        return sum(e.nbytes for e in run.events if e.operation == "exchange")

    half = sent(lambda rank: all_reduce_half(rank.data, np.ones(1000, np.float16)))
    full = sent(lambda rank: all_reduce(rank.data, np.ones(1000, np.float32), algorithm="ring"))
    assert full == 8000
    assert half == full / 2


def test_what_is_not_flat_float16_is_refused():
    for wrong in (np.ones(3, np.float32), np.ones((2, 2), np.float16)):
        with pytest.raises(RankError, match="give a flat float16 array"):
            alone(lambda group, wrong=wrong: all_reduce_half(group, wrong))


# ---------------------------------------------------------------- steps

NETWORK = MLP((6, 16, 1))
X = np.random.default_rng(1).normal(size=(48, 6)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.float32)


def train(rank, optimiser, steps, scale=2.0**10, weight=1.0, spoil=None):
    """Losses need no seed: all ranks start alike and share the rows."""
    mixed = MixedPrecision(
        rank.data, NETWORK.initialise(0, np.float32), optimiser, LossScale(scale)
    )
    mine = np.array_split(np.arange(48), rank.size)[rank.index]
    taken = []
    for step in range(steps):
        divisor = mixed.divisor(48) / weight
        gradient = NETWORK.loss_and_gradient(mixed.parameters(), X[mine], Y[mine], divisor)[1]
        if spoil == (rank.index, step):
            gradient[3] = 1e6  # too large for float16, on this rank only
        taken.append(mixed.step(gradient))
    return mixed.master, mixed.half, taken, mixed.scale.scale, mixed.skipped


def in_float32(optimiser, steps, weight=1.0):
    parameters = NETWORK.initialise(0, np.float32)
    state = optimiser.start(parameters.size, np.float32)
    for _ in range(steps):
        _, gradient = NETWORK.loss_and_gradient(parameters, X, Y, 48 / weight)
        optimiser.step(parameters, gradient, state)
    return parameters


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("optimiser", [SGD(0.2), SGD(0.1, 0.9), Adam(0.01)])
def test_it_follows_float32_and_all_ranks_are_equal(optimiser, ranks):
    right = NETWORK.loss_at(in_float32(optimiser, 60), X, Y)
    found = on_ranks(ranks, train, optimiser, 60)
    for master, half, taken, _, skipped in found:
        assert np.array_equal(master, found[0][0])
        assert half.dtype == np.float16
        assert np.array_equal(half, to_half(master))
        assert all(taken) and skipped == 0
        assert NETWORK.loss_at(half.astype(np.float32), X, Y) == pytest.approx(right, abs=0.005)


@pytest.mark.parametrize("culprit", [0, 1, 3])
def test_an_overflow_on_one_rank_leaves_out_the_step_on_all(culprit):
    found = on_ranks(4, train, SGD(0.2), 5, spoil=(culprit, 2))
    for master, _, taken, scale, skipped in found:
        assert taken == [True, True, False, True, True]
        assert skipped == 1
        assert scale == 2.0**9
        assert np.array_equal(master, found[0][0])
        assert np.isfinite(master).all()


def test_a_step_that_is_left_out_changes_neither_parameters_nor_state():
    before, _, _, _, _ = on_ranks(2, train, Adam(0.01), 3)[0]
    after, _, taken, _, _ = on_ranks(2, train, Adam(0.01), 4, spoil=(1, 3))[0]
    assert taken == [True, True, True, False]
    assert np.array_equal(before, after)


def test_a_sum_that_is_too_large_is_found_though_each_part_was_finite():
    def program(rank):
        start = np.zeros(2, np.float32)
        mixed = MixedPrecision(rank.data, start, SGD(1.0), LossScale(1.0))
        return mixed.step(np.full(2, 40_000, np.float32)), mixed.scale.scale

    assert on_ranks(1, program) == [(True, 1.0)]
    assert on_ranks(2, program) == [(False, 0.5)] * 2


def test_without_a_scale_small_gradients_vanish_and_with_it_they_do_not():
    weight = 2.0**-26
    optimiser = SGD(0.2 / weight)
    start = NETWORK.initialise(0, np.float32)
    right = in_float32(optimiser, 40, weight)
    lost = on_ranks(2, train, optimiser, 40, scale=1.0, weight=weight)[0][0]
    kept = on_ranks(2, train, optimiser, 40, scale=2.0**20, weight=weight)[0][0]
    assert np.array_equal(lost, start)
    assert np.abs(right - start).max() > 0.05
    assert np.abs(kept - right).max() < 0.01


def test_without_a_master_copy_small_changes_are_lost():
    def program(rank, keep):
        mixed = MixedPrecision(rank.data, np.ones(1, np.float32), SGD(1.0), LossScale(1.0))
        for _ in range(100):
            if not keep:
                mixed.master = mixed.parameters()
            mixed.step(np.array([2.0**-13], np.float32))
        return float(mixed.half[0])

    assert on_ranks(1, program, True) == [np.float16(1 - 100 * 2.0**-13)]
    assert on_ranks(1, program, False) == [1.0]


def test_the_bytes_are_those_of_float16_and_of_a_float32_copy():
    mixed = alone(lambda group: MixedPrecision(group, np.zeros(1000, np.float32), Adam(0.1)))
    assert mixed.half.nbytes == 2000
    assert mixed.master.nbytes == 4000


def test_parameters_of_another_kind_are_refused():
    with pytest.raises(RankError, match="the master copy is float32"):
        alone(lambda group: MixedPrecision(group, np.zeros(3), SGD(0.1)))


def test_the_examples_in_its_documentation_are_right():
    result = doctest.testmod(precision)
    assert result.attempted > 0
    assert result.failed == 0
