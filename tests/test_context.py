"""Ring attention over ranks equals attention over the whole text, and moves what is predicted."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.engine import spmd
from helpers.engine.errors import RankError
from helpers.engine.mesh import Mesh
from helpers.nn import Memory, attention, attention_grad
from helpers.parallel import context
from helpers.parallel.context import places, ring_attention, ring_attention_grad, ring_bytes, work


def vectors(batch, length, heads, size, seed=0, dtype=np.float64):
    """Queries, keys, values, and a gradient by the output."""
    shape = (4, batch, length, heads, size)
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def program(rank, arrays, balanced, backward=True):
    """A rank's part of attention, forward and backward, and what it holds."""
    mine = places(arrays.shape[2], rank.index, rank.size, balanced)
    q, k, v, dy = arrays[:, :, mine]
    memory = Memory(arrays.dtype)
    y, kept = ring_attention(q, k, v, rank.world, balanced, memory=memory)
    forward = memory.nbytes
    gradients = ring_attention_grad(dy, kept, rank.world, memory) if backward else ()
    return (y, *gradients), kept.nbytes, forward


def on_ranks(ranks, *args, **options):
    return spmd.run(None, Mesh(data=ranks), program, *args, **options)


def whole(arrays, run, balanced):
    """The results of all ranks, back in the order of the text."""
    ranks, length = len(run.results), arrays.shape[2]
    found = np.empty((4, *arrays.shape[1:]), arrays.dtype)
    for rank, (parts, *_) in enumerate(run.results):
        for array, part in zip(found, parts, strict=True):
            array[:, places(length, rank, ranks, balanced)] = part
    return found


def serial(arrays):
    q, k, v, dy = arrays
    y, weights = attention(q, k, v)
    return np.stack([y, *attention_grad(dy, q, k, v, y, weights)])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("balanced", [False, True], ids=["in a row", "balanced"])
def test_values_and_gradients_equal_those_of_the_whole_text(ranks, balanced):
    arrays = vectors(2, 24, 3, 5)
    found = whole(arrays, on_ranks(ranks, arrays, balanced), balanced)
    assert np.abs(found - serial(arrays)).max() < 1e-10


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.integers(1, 5),
    size=st.integers(1, 4),
    heads=st.integers(1, 3),
    batch=st.integers(1, 2),
    part=st.integers(1, 4),
    balanced=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape_equals_the_whole_text(ranks, size, heads, batch, part, balanced, seed):
    arrays = 3 * vectors(batch, part * ranks * (2 if balanced else 1), heads, size, seed)
    found = whole(arrays, on_ranks(ranks, arrays, balanced), balanced)
    right = serial(arrays)
    assert np.abs(found - right).max() < 1e-10 * max(1, np.abs(right).max())


def test_scores_too_large_for_the_exponential_do_no_harm():
    arrays = vectors(1, 8, 1, 2)
    arrays[:2] *= 100
    found = whole(arrays, on_ranks(2, arrays, False), False)
    assert np.isfinite(found).all()
    assert np.allclose(found, serial(arrays), rtol=1e-9, atol=1e-9)


def test_float32_stays_float32():
    arrays = vectors(1, 16, 2, 4, dtype=np.float32)
    run = on_ranks(2, arrays, True)
    assert all(part.dtype == np.float32 for parts, *_ in run.results for part in parts)
    assert np.abs(whole(arrays, run, True) - serial(arrays.astype("f8"))).max() < 1e-5


def test_every_run_gives_the_same_bits():
    arrays = vectors(2, 12, 2, 3)
    first, second = (whole(arrays, on_ranks(3, arrays, True), True) for _ in range(2))
    assert np.array_equal(first, second)


# ---------------------------------------------------------------- bytes, memory, work


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("balanced", [False, True], ids=["in a row", "balanced"])
def test_a_rank_sends_the_bytes_of_the_formula(ranks, balanced):
    arrays = vectors(2, 24, 3, 5)
    right = ring_bytes(arrays[0].nbytes // ranks, ranks)
    for backward in (False, True):
        events = on_ranks(ranks, arrays, balanced, backward, record=True).events
        for rank in range(ranks):
            sent = sum(e.nbytes for e in events if e.rank == rank and e.operation == "exchange")
            assert sent == right["forward"] + (right["backward"] if backward else 0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("balanced", [False, True], ids=["in a row", "balanced"])
def test_a_rank_holds_the_bytes_of_the_formula(ranks, balanced):
    arrays = vectors(2, 24, 3, 5)
    part, chunk = 24 // ranks, 24 // ranks // (2 if balanced else 1)
    for _, kept, scores in on_ranks(ranks, arrays, balanced).results:
        assert kept == 4 * arrays[0].nbytes // ranks + 8 * 2 * 3 * part
        assert scores == 8 * 2 * 3 * chunk**2


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_causal_mask_gives_the_last_rank_most_work_unless_it_is_balanced(ranks):
    plain = [work(rank, ranks) for rank in range(ranks)]
    balanced = [work(rank, ranks, True) for rank in range(ranks)]
    assert sum(plain) == pytest.approx(0.5) and sum(balanced) == pytest.approx(0.5)
    assert plain[-1] / plain[0] == pytest.approx(2 * ranks - 1)
    assert max(balanced) == min(balanced) == 0.5 / ranks


class Counting(Memory):
    """Counts the scores that are computed in it."""

    count = 0

    def take(self, name, shape):
        self.count += np.prod(shape)
        return super().take(name, shape)


@pytest.mark.parametrize("balanced", [False, True], ids=["in a row", "balanced"])
def test_the_scores_computed_are_those_of_the_formula(balanced):
    """Of a chunk with itself all are computed, and half count."""
    arrays, ranks = vectors(1, 24, 1, 1), 3

    def counted(rank):
        q, k, v, _ = arrays[:, :, places(24, rank.index, ranks, balanced)]
        memory = Counting("f8")
        ring_attention(q, k, v, rank.world, balanced, memory=memory)
        return memory.count

    for rank, count in enumerate(spmd.run(None, Mesh(data=ranks), counted).results):
        held = len(context.chunks(rank, ranks, balanced))
        chunk = 24 // ranks // held
        assert count == work(rank, ranks, balanced) * 24**2 + held * chunk**2 / 2


# ---------------------------------------------------------------- what lies where, what is refused


@pytest.mark.parametrize("balanced", [False, True], ids=["in a row", "balanced"])
def test_each_position_lies_on_one_rank(balanced):
    found = np.concatenate([places(24, rank, 3, balanced) for rank in range(3)])
    assert sorted(found) == list(range(24))


def test_odd_sizes_are_refused_with_one_that_would_do():
    with pytest.raises(ValueError, match="take a multiple of 4, such as 8"):
        places(10, 0, 4)
    with pytest.raises(ValueError, match="into 4 chunks: take a multiple of 4, such as 4"):
        places(6, 0, 2, balanced=True)
    with pytest.raises(ValueError, match="such as 4"):
        places(3, 0, 4)
    q = np.ones((1, 3, 1, 2))
    with pytest.raises(ValueError, match="take an even number"):
        ring_attention(q, q, q, None, balanced=True)
    with pytest.raises(ValueError, match="all need the same"):
        ring_attention(q, q[:, :2], q, None)
    with pytest.raises(TypeError, match="dtypes differ"):
        ring_attention(q, q.astype("f4"), q, None)

    def wrong(rank):
        _, kept = ring_attention(q, q, q, rank.world)
        ring_attention_grad(q[:, :2], kept, rank.world)

    with pytest.raises(RankError, match="the attention was given"):
        spmd.run(None, Mesh(data=2), wrong)


def test_the_examples_in_the_docstrings():
    found = doctest.testmod(context)
    assert found.attempted > 0 and found.failed == 0
