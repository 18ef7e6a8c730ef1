"""The collectives give what NumPy gives, for any ranks, shapes and dtypes."""

import sys
import time

import cloudpickle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.collectives import (
    ALGORITHMS,
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    reduce,
    reduce_scatter,
)
from helpers.engine.mesh import Mesh
from helpers.engine.spmd import RankError

cloudpickle.register_pickle_by_value(sys.modules[__name__])

FOLDS = {"sum": np.add, "product": np.multiply, "max": np.maximum, "min": np.minimum}
some_runs = settings(max_examples=40, deadline=None)

ranks = st.integers(1, 9)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)
numbers = st.sampled_from(["<f8", "<f4", "<i8", "<i2", "<u1", "<c16", ">f4"])
rows = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=11)


def on_threads(size, program, each=None):
    return spmd.run(None, Mesh(data=size), program, each=each).results


def small_whole_numbers(seed, shape, dtype):
    """Values whose sums and products are exact in every dtype, so that order does not matter."""
    return np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)


def folded(arrays, operation):
    total = arrays[0].copy()
    for array in arrays[1:]:
        total = FOLDS[operation](total, array)
    return np.asarray(total).astype(arrays[0].dtype)


@pytest.fixture(scope="module")
def client():
    with open_cluster(workers=2) as cluster:
        yield cluster.client


# ---------------------------------------------------------------- all-reduce


@some_runs
@given(ranks, shapes, numbers, st.sampled_from(ALGORITHMS), st.sampled_from(sorted(FOLDS)))
def test_all_reduce_is_the_fold_of_all_arrays(size, shape, dtype, algorithm, operation):
    if dtype == "<c16":
        operation = "sum"  # complex numbers have no order
    arrays = [small_whole_numbers(rank, shape, dtype) for rank in range(size)]
    expected = folded(arrays, operation)

    def program(rank, mine):
        before = mine.copy()
        result = all_reduce(rank.data, mine, operation=operation, algorithm=algorithm)
        assert np.array_equal(mine, before)
        return result

    for result in on_threads(size, program, arrays):
        assert result.dtype == expected.dtype and result.shape == expected.shape
        assert np.array_equal(result, expected)


@some_runs
@given(ranks, st.integers(0, 40), st.sampled_from(ALGORITHMS), st.integers(0, 2**32))
def test_all_ranks_and_all_runs_agree_to_the_last_bit(size, length, algorithm, seed):
    values = (
        np.random.default_rng(seed).normal(size=(size, length)) * 10.0 ** np.arange(size)[:, None]
    )

    def program(rank, mine):
        return all_reduce(rank.data, mine.astype(np.float32), algorithm=algorithm).tobytes()

    first, second = on_threads(size, program, values), on_threads(size, program, values)
    assert len(set(first) | set(second)) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_large_arrays_that_do_not_divide_arrive_whole(client, algorithm, size):
    def program(rank):
        values = np.arange(1_000_003, dtype=np.float32) * (rank.index + 1)
        shared = rank.empty(values.shape, values.dtype)
        shared[:] = values
        plain = all_reduce(rank.data, values, algorithm=algorithm)
        in_place = all_reduce(rank.data, shared, out=shared, algorithm=algorithm)
        assert in_place is shared
        return plain.tobytes() == shared.tobytes(), float(plain[1_000_002])

    results = spmd.run(client, Mesh(data=size), program).results
    assert {same for same, _ in results} == {True}
    expected = np.float32(1_000_002) * sum(range(1, size + 1))
    assert {last for _, last in results} == {results[0][1]}
    assert results[0][1] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("transport", [None, "tcp"])
def test_ways_of_transport_give_the_same_bits(client, transport):
    def program(rank):
        mine = np.random.default_rng(rank.index).normal(size=100_003)
        return all_reduce(rank.data, mine, algorithm="ring")

    expected = on_threads(3, program)[0]
    for result in spmd.run(client, Mesh(data=3), program, transport=transport).results:
        assert result.tobytes() == expected.tobytes()


def test_out_may_have_gaps_and_be_the_array_itself():
    def program(rank):
        table = np.zeros((4, 6))
        column = table[:, 1]
        all_reduce(rank.data, np.arange(4.0), out=column)
        ones = np.ones(3)
        assert all_reduce(rank.data, ones, out=ones) is ones
        return table.sum(), ones.tolist()

    assert on_threads(3, program) == [(18.0, [3.0, 3.0, 3.0])] * 3


def test_background_and_foreground_do_not_mix():
    def program(rank):
        works = [
            rank.background(all_reduce, rank.data, np.full(5, k + rank.index)) for k in range(20)
        ]
        front = [all_reduce(rank.data, np.full(5, 100 + k)) for k in range(20)]
        return [int(work.wait()[0]) for work in works], [int(array[0]) for array in front]

    expected = [3 * k + 3 for k in range(20)], [300 + 3 * k for k in range(20)]
    assert on_threads(3, program) == [expected] * 3


def test_works_that_nobody_waits_for_are_carried_out():
    def program(rank):
        mine = np.ones(4)
        rank.background(all_reduce, rank.data, mine, out=mine)
        return mine

    assert [result.tolist() for result in on_threads(2, program)] == [[2.0] * 4] * 2


# ---------------------------------------------------------------- the others


@some_runs
@given(ranks, rows, numbers, st.sampled_from([None, "ring"]))
def test_reduce_scatter_gives_the_parts_of_array_split(size, shape, dtype, algorithm):
    arrays = [small_whole_numbers(rank, shape, dtype) for rank in range(size)]
    expected = np.array_split(folded(arrays, "sum"), size)

    def program(rank, mine):
        return reduce_scatter(rank.data, mine, algorithm=algorithm)

    for result, part in zip(on_threads(size, program, arrays), expected, strict=True):
        assert result.dtype == part.dtype and np.array_equal(result, part)


@pytest.mark.parametrize("algorithm", [None, "ring"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_along_another_axis_it_is_the_same_moved(axis, algorithm):
    def program(rank):
        whole = np.random.default_rng(rank.index).normal(size=(4, 5, 6))
        mine = reduce_scatter(rank.data, whole, algorithm=algorithm, axis=axis)
        alike = len({part.shape[axis] for part in np.array_split(whole, 3, axis)}) == 1
        return mine, all_gather(rank.data, mine, alike, axis=axis), all_reduce(rank.data, whole)

    results = spmd.run(None, Mesh(data=3), program).results
    for number, (mine, gathered, total) in enumerate(results):
        part = np.array_split(total, 3, axis)[number]
        assert np.allclose(mine, part, rtol=1e-12) and np.allclose(gathered, total, rtol=1e-12)
        assert mine.flags.c_contiguous


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_gather_of_arrays_that_are_alike_gives_the_same(ranks):
    def program(rank):
        mine = np.arange(6.0).reshape(2, 3) + 10 * rank.index
        whole = all_gather(rank.data, mine, alike=True)
        mine[:] = -1  # what was gathered is a copy
        return whole, all_gather(rank.data, np.full((2, 3), 7.0), alike=True)

    expected = np.concatenate([np.arange(6.0).reshape(2, 3) + 10 * n for n in range(ranks)])
    for whole, again in spmd.run(None, Mesh(data=ranks), program).results:
        assert np.array_equal(whole, expected)
        assert np.array_equal(again, np.full((2 * ranks, 3), 7.0))


@some_runs
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), numbers)
def test_all_gather_joins_rows_of_unequal_numbers(lengths, dtype):
    arrays = [small_whole_numbers(k, (length, 3), dtype) for k, length in enumerate(lengths)]

    def program(rank, mine):
        return all_gather(rank.data, mine)

    for result in on_threads(len(arrays), program, arrays):
        assert result.dtype == dtype and np.array_equal(result, np.concatenate(arrays))


@some_runs
@given(ranks, shapes, numbers, st.data())
def test_gathering_the_scattered_is_all_reduce(size, shape, dtype, data):
    shape = (data.draw(st.integers(0, 9)), *shape)
    arrays = [small_whole_numbers(rank, shape, dtype) for rank in range(size)]

    def program(rank, mine):
        return all_gather(rank.data, reduce_scatter(rank.data, mine)), all_reduce(rank.data, mine)

    for gathered, reduced in on_threads(size, program, arrays):
        assert np.array_equal(gathered, reduced)


@some_runs
@given(ranks, shapes, numbers, st.data())
def test_broadcast_and_reduce_know_their_root(size, shape, dtype, data):
    root = data.draw(st.integers(0, size - 1))
    arrays = [small_whole_numbers(rank, shape, dtype) for rank in range(size)]

    def program(rank, mine):
        given = mine if rank.index == root else None
        return broadcast(rank.data, given, root), reduce(rank.data, mine, root)

    for number, (sent, total) in enumerate(on_threads(size, program, arrays)):
        assert sent.dtype == dtype and np.array_equal(sent, arrays[root])
        if number == root:
            assert np.array_equal(total, folded(arrays, "sum"))
        else:
            assert total is None


@some_runs
@given(ranks, numbers)
def test_all_to_all_turns_the_table(size, dtype):
    def program(rank):
        parts = [np.full(to + 1, 10 * rank.index + to, dtype) for to in range(size)]
        return all_to_all(rank.data, parts)

    for number, found in enumerate(on_threads(size, program)):
        expected = [np.full(number + 1, 10 * source + number, dtype) for source in range(size)]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nobody_leaves_a_barrier_before_all_have_come():
    def program(rank, came):
        for number in range(30):
            came[rank.index] = number
            barrier(rank.data)
            assert min(came) >= number
            barrier(rank.data)
        return True

    assert spmd.run(None, Mesh(data=5), program, [0] * 5).results == [True] * 5


def test_groups_along_the_axes_sum_their_own_members(client):
    def program(rank):
        mine = np.array([2.0**rank.index])
        groups = rank.data, rank.tensor, rank.pipeline, rank.world
        return [float(all_reduce(group, mine)[0]) for group in groups]

    mesh = Mesh(data=2, tensor=2, pipeline=2)
    for where in (None, client):
        for number, sums in enumerate(spmd.run(where, mesh, program).results):
            for axis, total in zip(("data", "tensor", "pipeline", "world"), sums, strict=True):
                assert total == sum(2.0**member for member in mesh.members(number, axis))


# ---------------------------------------------------------------- two ranks


@some_runs
@given(hnp.arrays(st.sampled_from(["<f8", "S3", "<M8[s]", "?", "<f2"]), shapes, fill=st.nothing()))
def test_any_array_arrives_as_it_was_sent(array):
    def program(rank):
        if rank.index:
            return rank.world.receive(0)
        rank.world.send(array, 1)

    _, received = on_threads(2, program)
    assert received.dtype == array.dtype and received.shape == array.shape
    assert received.tobytes() == array.tobytes()


def test_fields_and_long_arrays_cross_between_processes(client):
    def program(rank):
        table = np.zeros(3, [("day", "<i4"), ("delay", "<f8", 2)])
        table["day"] = [1, 2, 3]
        sent = [table, np.arange(3_000_000), np.array(2.5), np.empty((0, 4)), np.ones(20_000)[::2]]
        if rank.index:
            return all(np.array_equal(rank.world.receive(0), array) for array in sent)
        for array in sent:
            rank.world.send(array, 1)

    for transport in (None, "tcp"):
        assert spmd.run(client, Mesh(data=2), program, transport=transport).results[1]


def test_exchange_of_more_than_the_buffers_hold_does_not_deadlock(client):
    def program(rank):
        mine = np.full(4_000_000, rank.index, np.float64)
        other = 1 - rank.index
        return float(rank.world.exchange(mine, other, other).mean())

    for transport in (None, "tcp"):
        assert spmd.run(client, Mesh(data=2), program, transport=transport).results == [1.0, 0.0]


def test_the_sender_may_change_its_array_at_once(client):
    def program(rank):
        if rank.index:
            return [int(rank.world.receive(0)[-1]) for _ in range(20)]
        array = np.zeros(50_000, np.int64)
        for number in range(20):
            array[:] = number
            rank.world.send(array, 1)

    for where in (None, client):
        assert spmd.run(where, Mesh(data=2), program).results[1] == list(range(20))


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (lambda rank: all_reduce(rank.data, [object()]), "not of Python objects"),
        (lambda rank: all_reduce(rank.data, [1], operation="mean"), "no operation 'mean'"),
        (lambda rank: all_reduce(rank.data, [1], algorithm="star"), "no algorithm 'star'"),
        (lambda rank: all_reduce(rank.data, np.ones(2), out=np.ones(3)), "give an array of this"),
        (lambda rank: reduce_scatter(rank.data, 1.0), "a single number has none"),
        (lambda rank: all_to_all(rank.data, [np.ones(1)]), "one array for each of the 2 ranks"),
        (lambda rank: rank.data.send(np.ones(1), 2), "no rank 2 in this group: it has 0 to 1"),
        (lambda rank: rank.data.receive(-1), "no rank -1 in this group"),
        (lambda rank: rank.empty(3, object), "not Python objects"),
        (lambda rank: all_gather(rank.data, np.ones((1, 2 + rank.index))), "rows of one kind"),
        (lambda rank: all_gather(rank.data, np.ones(2), axis=1), "this array has axes 0 to 0"),
    ],
)
def test_wrong_use_gets_one_sentence(program, sentence):
    with pytest.raises(RankError, match=sentence):
        on_threads(2, program)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda g: all_reduce(g, np.ones(3)), lambda g: all_reduce(g, np.ones(4))),
        (lambda g: all_reduce(g, np.ones(3)), lambda g: all_reduce(g, np.ones(3, "f4"))),
        (lambda g: all_reduce(g, np.ones(3)), lambda g: all_reduce(g, np.ones(3), operation="max")),
        (lambda g: all_reduce(g, np.ones(3)), lambda g: all_gather(g, np.ones(3))),
        (lambda g: all_gather(g, np.ones(3), True), lambda g: all_gather(g, np.ones(2), True)),
        (lambda g: all_reduce(g, np.ones(3)), lambda g: barrier(g)),
        (lambda g: broadcast(g, np.ones(3)), lambda g: broadcast(g, np.ones(3), root=1)),
        (lambda g: all_to_all(g, [np.ones(1)] * 2), lambda g: all_gather(g, np.ones(1))),
    ],
)
def test_calls_that_do_not_fit_together_are_found(client, first, second):
    def program(rank):
        (second if rank.index else first)(rank.data)
        barrier(rank.data)

    for where in (None, client):
        with pytest.raises(RankError, match="this rank is in"):
            spmd.run(where, Mesh(data=2), program, patience=3)


# ---------------------------------------------------------------- meetings that are repeated


@pytest.fixture(scope="module")
def three():
    """Three processes, so that a meeting has several others."""
    with open_cluster(workers=3) as cluster:
        yield cluster.client


def test_the_same_exchange_again_and_again_with_arrays_that_come_and_go(three):
    """What is known from the last meeting must not outlive the arrays that it speaks of."""

    def program(rank):
        wrong = 0
        lasting = rank.zeros(500)
        for turn in range(120):
            passing = rank.zeros(500)  # as a rule at the address of the last one, freed by now
            given = {0: lasting, 1: passing, 2: np.zeros(500)}[(turn // 3 + rank.index) % 3]
            given[:] = turn + rank.index
            all_reduce(rank.data, given, out=given)
            wrong += int((given != 3 * turn + 3).sum())
            parts = reduce_scatter(rank.data, given)
            wrong += int((parts != 9 * turn + 9).sum())
            barrier(rank.data)
        return wrong

    assert spmd.run(three, Mesh(data=3), program).results == [0, 0, 0]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_repeated_meeting_waits_for_whoever_is_late(three, late):
    def program(rank):
        x = rank.zeros(100)
        for turn in range(6):
            if rank.index == late and turn % 2:
                time.sleep(0.02)
            x[:] = 1
            all_reduce(rank.data, x, out=x)
        return x.tolist() == [3.0] * 100

    assert spmd.run(three, Mesh(data=3), program).results == [True] * 3


def test_another_exchange_after_many_equal_ones_is_found(three):
    def program(rank):
        x = rank.zeros(100)
        for _ in range(20):
            all_reduce(rank.data, x, out=x)
        (barrier if rank.index == 1 else lambda group: all_reduce(group, x, out=x))(rank.data)

    with pytest.raises(spmd.RankError, match="barrier"):
        spmd.run(three, Mesh(data=3), program)
