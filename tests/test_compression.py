"""Compressors: what they keep, what they send, and that error feedback loses nothing."""

import doctest

import numpy as np
import pytest

from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.nn import MLP
from helpers.parallel import compression, power_sgd
from helpers.parallel.compression import (
    EightBit,
    ErrorFeedback,
    Plain,
    Sign,
    TopK,
    mean_gradient,
)
from helpers.parallel.power_sgd import PowerSGD

NETWORK = MLP((9, 8, 5, 1))
SIZE = NETWORK.size
MAKERS = {
    "plain": Plain,
    "top 1": lambda: TopK(1),
    "top 20": lambda: TopK(20),
    "top all": lambda: TopK(SIZE),
    "sign": Sign,
    "8 bits": EightBit,
    "8 bits, blocks of 7": lambda: EightBit(7),
    "PowerSGD 1": lambda: PowerSGD(NETWORK, rank=1),
    "PowerSGD 3": lambda: PowerSGD(NETWORK, rank=3),
    "PowerSGD 8": lambda: PowerSGD(NETWORK, rank=8),
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def gradient_of(*seed, dtype=np.float64, size=SIZE):
    return np.random.default_rng(seed or 0).normal(size=size).astype(dtype)


def through(compressor, gradient):
    return compressor.decompress(compressor.compress(gradient), gradient.size)


# ---------------------------------------------------------------- one rank


@each_maker
@each_dtype
def test_what_comes_out_has_the_shape_and_dtype_of_what_went_in(make, dtype):
    gradient = gradient_of(dtype=dtype)
    before = gradient.copy()
    result = through(make(), gradient)
    assert result.shape == gradient.shape and result.dtype == dtype
    assert np.array_equal(gradient, before)


@each_maker
def test_nothing_comes_out_of_zeros(make):
    assert np.array_equal(through(make(), np.zeros(SIZE)), np.zeros(SIZE))


@each_maker
def test_what_is_left_out_is_never_longer_than_the_gradient(make):
    for seed in range(20):
        gradient = gradient_of(seed)
        left_out = gradient - through(make(), gradient)
        assert np.linalg.norm(left_out) <= np.linalg.norm(gradient) * (1 + 1e-12)


@pytest.mark.parametrize("name", ["plain", "top all", "PowerSGD 8"])
def test_compressors_that_keep_all_are_exact(name):
    gradient = gradient_of()
    np.testing.assert_allclose(through(MAKERS[name](), gradient), gradient, rtol=0, atol=1e-13)


def test_top_k_keeps_the_largest_and_nothing_else():
    gradient = gradient_of(3)
    result = through(TopK(10), gradient)
    kept = np.flatnonzero(result)
    assert len(kept) == 10
    assert np.array_equal(result[kept], gradient[kept])
    assert np.abs(gradient[kept]).min() >= np.abs(np.delete(gradient, kept)).max()


def test_sign_sends_each_sign_and_the_mean_size():
    gradient = gradient_of(4)
    result = through(Sign(), gradient)
    assert np.array_equal(np.sign(result), np.sign(gradient))
    np.testing.assert_allclose(np.abs(result), np.abs(gradient).mean(), rtol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 256])
def test_eight_bits_err_by_half_a_step_at_most(block):
    gradient = gradient_of(5) * np.repeat([1e-6, 1.0, 1e6], [50, 50, SIZE - 100])
    error = np.abs(through(EightBit(block), gradient) - gradient)
    for start in range(0, SIZE, block):
        part = slice(start, start + block)
        assert error[part].max() <= np.abs(gradient[part]).max() / 254 * (1 + 1e-9)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257])
def test_eight_bits_and_signs_take_any_size(size):
    gradient = gradient_of(6, size=size)
    assert np.abs(through(EightBit(), gradient) - gradient).max() <= np.abs(gradient).max() / 253
    assert np.array_equal(through(Sign(), gradient) >= 0, gradient >= 0)


def test_power_sgd_gives_a_matrix_of_low_rank_as_it_is():
    gradient = np.zeros(SIZE)
    w, b = NETWORK.views(gradient)[0]
    w[:] = np.outer(np.arange(9.0), np.arange(8.0) - 3)
    b[:] = 7.0
    np.testing.assert_allclose(through(PowerSGD(NETWORK, 1), gradient), gradient, atol=1e-12)


def test_power_sgd_comes_nearer_to_the_best_matrix_of_its_rank_step_by_step():
    """The same gradient again and again: Q of the last step is a good start."""
    compressor, gradient = PowerSGD(NETWORK, rank=2), gradient_of(8)

    def program(rank):
        return [mean_gradient(rank.data, compressor, gradient).sent for _ in range(60)]

    (sent,) = spmd.run(None, Mesh(data=1), program).results
    w = NETWORK.views(gradient)[0][0]
    u, s, vt = np.linalg.svd(w)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    errors = [np.linalg.norm(NETWORK.views(step)[0][0] - w) for step in sent]
    assert errors[-1] < errors[1] < errors[0]
    np.testing.assert_allclose(errors[-1], np.linalg.norm(best - w), rtol=1e-3)


# ---------------------------------------------------------------- several ranks

STEPS = 6


def train(rank, make, feedback, dtype):
    """Some steps with made-up gradients: what each gave, and what is left at the end."""
    compressor = ErrorFeedback(make()) if feedback else make()
    steps = [
        mean_gradient(rank.data, compressor, gradient_of(rank.index, step, dtype=dtype))
        for step in range(STEPS)
    ]
    return steps, getattr(compressor, "residual", None)


@each_maker
@each_dtype
@pytest.mark.parametrize("feedback", [False, True])
def test_all_ranks_get_the_mean_of_what_was_sent_to_the_last_bit(make, feedback, dtype):
    run = spmd.run(None, Mesh(data=3), train, make, feedback, dtype)
    for step in range(STEPS):
        each = [steps[step] for steps, _ in run.results]
        assert all(np.array_equal(exchanged.mean, each[0].mean) for exchanged in each[1:])
        assert each[0].mean.dtype == dtype
        mean = np.mean([exchanged.sent for exchanged in each], axis=0)
        tolerance = 1e-5 if dtype == np.float32 else 1e-12
        np.testing.assert_allclose(each[0].mean, mean, rtol=0, atol=tolerance)


@each_maker
@each_dtype
def test_with_error_feedback_all_is_sent_or_still_there(make, dtype):
    """Sum of sent + residual = sum of gradients, up to rounding, on each rank."""
    run = spmd.run(None, Mesh(data=3), train, make, True, dtype)
    for rank, (steps, residual) in enumerate(run.results):
        sent = np.sum([exchanged.sent for exchanged in steps], axis=0)
        total = np.sum([gradient_of(rank, step, dtype=dtype) for step in range(STEPS)], axis=0)
        rounding = 100 * np.finfo(dtype).eps
        np.testing.assert_allclose(sent + residual, total, rtol=0, atol=rounding)


def test_without_error_feedback_the_rest_is_lost():
    steps, residual = spmd.run(None, Mesh(data=1), train, MAKERS["top 1"], False, float).results[0]
    sent = np.sum([exchanged.sent for exchanged in steps], axis=0)
    total = np.sum([gradient_of(0, step) for step in range(STEPS)], axis=0)
    assert residual is None
    assert np.abs(sent - total).max() > 1


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("plain", 4 * SIZE),
        ("top 20", 20 * (4 + 4)),
        ("sign", -(-SIZE // 8) + 4),
        ("8 bits", SIZE + 4),
        ("8 bits, blocks of 7", SIZE + 4 * -(-SIZE // 7)),
        # Matrices 9 x 8 and 8 x 5; the others are 8 and 5 biases, and the last layer's 5 + 1.
        ("PowerSGD 1", 4 * (9 + 8 + 8 + 5 + 8 + 5 + 6)),
        ("PowerSGD 8", 4 * (8 * (9 + 8) + 5 * (8 + 5) + 8 + 5 + 6)),
    ],
)
@pytest.mark.parametrize("feedback", [False, True])
def test_bytes_counted_are_those_of_the_arrays_sent(name, nbytes, feedback):
    run = spmd.run(None, Mesh(data=2), train, MAKERS[name], feedback, np.float32)
    payload = MAKERS[name]().compress(gradient_of(dtype=np.float32))
    assert sum(array.nbytes for array in payload) == nbytes
    assert {exchanged.nbytes for steps, _ in run.results for exchanged in steps} == {nbytes}


def test_the_engine_sends_no_more_bytes_than_are_counted():
    """Of a gathered payload, one message to the one other rank."""

    def program(rank):
        exchanged = mean_gradient(rank.data, TopK(20), gradient_of(rank.index))
        return exchanged.nbytes

    run = spmd.run(None, Mesh(data=2), program, record=True)
    assert run.results == [240, 240]
    assert {event.nbytes for event in run.events if event.nbytes} == {240}


# ---------------------------------------------------------------- impossible demands


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: TopK(0), ValueError, "k is 0: give the number of numbers that travel, 1 or more"),
        (lambda: TopK(-3), ValueError, "k is -3"),
        (lambda: TopK(0.01), TypeError, "k is 0.01: .* whole number"),
        (lambda: TopK(True), TypeError, "k is True"),
        (lambda: EightBit(0), ValueError, "block is 0"),
        (lambda: PowerSGD(NETWORK, 0), ValueError, "rank is 0"),
        (lambda: PowerSGD(NETWORK, 1.5), TypeError, "rank is 1.5"),
        (lambda: PowerSGD(NETWORK, 9), ValueError, "rank is 9, but no matrix .* more than 8"),
        (lambda: PowerSGD(MLP((4, 1)), 1), ValueError, "no matrix .* more than 0"),
    ],
)
def test_impossible_compressors_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


@each_maker
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize(
    ("gradient", "error", "says"),
    [
        (np.full(SIZE, np.nan), ValueError, "not finite"),
        (np.append(np.ones(SIZE - 1), np.inf), ValueError, "not finite"),
        (np.ones(SIZE, int), TypeError, "give floats"),
        (np.ones((SIZE, 1)), ValueError, "one axis"),
        (np.ones(0), ValueError, "one axis with numbers"),
        ([1.0] * SIZE, TypeError, "NumPy array"),
    ],
)
def test_impossible_gradients_are_refused(make, feedback, gradient, error, says):
    compressor = ErrorFeedback(make()) if feedback else make()
    with pytest.raises(error, match=says):
        compressor.compress(gradient)


def test_more_numbers_than_there_are_cannot_be_kept():
    with pytest.raises(ValueError, match="k is 6, but the gradient has 5 numbers"):
        TopK(6).compress(np.ones(5))


def test_a_gradient_of_another_network_is_refused():
    feedback = ErrorFeedback(Sign())
    feedback.compress(np.ones(5))
    with pytest.raises(ValueError, match="has 4 numbers, the residual 5"):
        feedback.compress(np.ones(4))
    with pytest.raises(ValueError, match="needs one contiguous array"):
        PowerSGD(NETWORK, 1).compress(np.ones(4))


def test_large_finite_numbers_are_no_fault():
    """Their sum overflows, they themselves do not."""
    gradient = np.full(SIZE, 1e308)
    assert np.array_equal(through(TopK(SIZE), gradient), gradient)


@pytest.mark.parametrize("module", [compression, power_sgd])
def test_examples_in_the_documentation(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
