"""Data parallelism is equal to serial training, and all ranks hold the same bits."""

import doctest
import functools
import sys
import time
import tracemalloc
from itertools import pairwise

import cloudpickle
import numpy as np
import pytest

from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.collectives import barrier
from helpers.engine.mesh import Mesh
from helpers.nn import MLP, SGD, Adam, clip_by_global_norm
from helpers.parallel import data, shards, training
from helpers.parallel.data import (
    DataParallel,
    alone,
    average_parameters,
    buckets,
    describe_not_finite,
    shard,
)
from helpers.parallel.training import Batches, train

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers know no tests

NETWORK = MLP((5, 9, 7, 1))
OPTIMISERS = [SGD(0.2), SGD(0.1, momentum=0.9, weight_decay=0.01), Adam(0.01)]
STEPS = 6

# float64: sums of the same numbers in another order. Adam divides by the gradient's size, which
# makes the smallest gradients, and their rounding, count as much as the largest.
TOLERANCE = 1e-12
# float32 keeps 7 digits: each sum over a batch differs by some 1e-7 of its size with its order, and
# Adam turns that into steps of the size of the rate where a gradient is nearly 0.
TOLERANCE_FLOAT32 = 2e-5


def table(rows, network=NETWORK, dtype=np.float64, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, network.widths[0])).astype(dtype)
    y = random.integers(0, 2, rows)
    return x, y


def serial(network, optimiser, batches, steps, largest_norm=None, dtype=np.float64):
    """Parameters and losses of training as it is written without any rank."""
    parameters = network.initialise(seed=0, dtype=dtype)
    state, losses = optimiser.start(network.size, dtype), []
    for step in range(steps):
        rows = batches.numbers(step)
        loss, gradient = network.loss_and_gradient(parameters, batches.x[rows], batches.y[rows])
        if largest_norm is not None:
            clip_by_global_norm(gradient, largest_norm)
        optimiser.step(parameters, gradient, state)
        losses.append(loss)
    return parameters, np.array(losses)


def trained(ranks, batches, optimiser=OPTIMISERS[0], steps=STEPS, client=None, **options):
    """The training of the first rank, once all are known to hold the same bits."""
    program = options.pop("program", train)
    results = spmd.run(
        client, Mesh(data=ranks), program, NETWORK, optimiser, batches, steps
    ).results
    return same_on_all(results)


def with_options(**options):
    """`train` with options, as a program of ranks."""

    def program(rank, *args):
        return train(rank, *args, **options)

    return program


def same_on_all(results):
    first, *others = results
    for other in others:
        assert other.parameters.tobytes() == first.parameters.tobytes()
        assert other.losses.tobytes() == first.losses.tobytes()
    return first


def assert_equal_to_serial(found, expected, tolerance=TOLERANCE):
    parameters, losses = expected
    assert np.abs(found.parameters - parameters).max() <= tolerance
    assert np.abs(found.losses - losses).max() <= tolerance


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 100])
def test_shards_are_those_of_array_split(rows, ranks):
    slices = spmd.run(None, Mesh(data=ranks), lambda rank: shard(rows, rank.data)).results
    expected = np.array_split(np.arange(rows), ranks)
    for found, wanted in zip(slices, expected, strict=True):
        assert np.array_equal(np.arange(rows)[found], wanted)


@pytest.mark.parametrize("rows", [1, 7, 30, 60])
def test_batches_are_the_same_rows_for_any_number_of_ranks(rows):
    batches = Batches(*table(60), rows=rows, seed=3)

    def program(rank):
        return [batches(step, rank.data) for step in range(70)]

    for ranks in (1, 2, 5):
        by_rank = spmd.run(None, Mesh(data=ranks), program).results
        for step, parts in enumerate(zip(*by_rank, strict=True)):
            numbers = batches.numbers(step)
            assert np.array_equal(np.concatenate([x for x, _, _ in parts]), batches.x[numbers])
            assert np.array_equal(np.concatenate([y for _, y, _ in parts]), batches.y[numbers])
            assert {total for _, _, total in parts} == {rows} == {len(numbers)}


def test_batches_visit_every_row_once_a_round_in_a_new_order():
    batches = Batches(*table(60), rows=7)
    seen = np.concatenate([batches.numbers(step) for step in range(18)])
    rounds = [seen[:60], seen[60:120]]
    assert all(np.array_equal(np.sort(numbers), np.arange(60)) for numbers in rounds)
    assert not np.array_equal(*rounds)
    assert len(batches._orders) == 2  # an order of many rows is large: older ones are dropped
    # Steps may be asked for in any order, as when a training goes on from a checkpoint.
    fresh = Batches(*table(60), rows=7)
    assert np.array_equal(fresh.numbers(17), batches.numbers(17))
    assert np.array_equal(fresh.numbers(8), batches.numbers(8))
    assert not np.array_equal(Batches(*table(60), rows=7, seed=1).numbers(0), batches.numbers(0))


# ---------------------------------------------------------------- equal to serial


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=str)
@pytest.mark.parametrize("ranks", range(1, 9))
def test_any_number_of_ranks_trains_as_one_in_float64(ranks, optimiser):
    for rows in (24, 25):  # one of them divides by 1, 2, 3, 4, 6 and 8, the other only by 1 and 5
        batches = Batches(*table(90), rows=rows)
        expected = serial(NETWORK, optimiser, batches, STEPS)
        assert_equal_to_serial(trained(ranks, batches, optimiser), expected)


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=str)
def test_float32_differs_from_serial_by_rounding_only(optimiser):
    batches = Batches(*table(90, dtype=np.float32), rows=25)
    expected = serial(NETWORK, optimiser, batches, STEPS, dtype=np.float32)
    for ranks in (1, 2, 5, 8):
        found = trained(ranks, batches, optimiser, program=with_options(dtype=np.float32))
        assert found.parameters.dtype == np.float32
        assert_equal_to_serial(found, expected, TOLERANCE_FLOAT32)


def test_one_rank_alone_has_the_bits_of_serial_training():
    batches = Batches(*table(90), rows=25)
    parameters, losses = serial(NETWORK, Adam(0.01), batches, STEPS)
    found = trained(1, batches, Adam(0.01))
    assert np.array_equal(found.parameters, parameters)
    assert np.array_equal(found.losses, losses)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_batch_smaller_than_the_ranks_leaves_empty_shards_that_do_no_harm(rows):
    batches = Batches(*table(20), rows=rows)
    expected = serial(NETWORK, OPTIMISERS[1], batches, STEPS)
    for ranks in (3, 8):
        for options in ({}, {"bucket_bytes": 8, "microbatches": 3}):
            found = trained(ranks, batches, OPTIMISERS[1], program=with_options(**options))
            assert_equal_to_serial(found, expected)


@pytest.mark.parametrize(
    "network",
    [MLP((5, 1)), MLP((5, 6, 3), loss="softmax"), MLP((5, 6, 1), loss="squared")],
    ids=str,
)
def test_every_loss_trains_as_serial_with_unequal_and_empty_shards(network):
    x, y = table(23, network)
    cuts = [0, 2, 2, 20, 23]
    parameters = network.initialise(seed=0)
    for _ in range(STEPS):
        parameters -= 0.1 * network.loss_and_gradient(parameters, x, y)[1]

    def program(rank, counted):
        mine = slice(cuts[rank.index], cuts[rank.index + 1])
        trainer = DataParallel(rank, network, SGD(0.1), network.initialise(seed=0))
        for _ in range(STEPS):
            trainer.step(x[mine], y[mine], divisor=None if counted else 23)
        return trainer.parameters

    for counted in (True, False):
        found = spmd.run(None, Mesh(data=4), program, counted).results
        assert all(np.array_equal(found[0], other) for other in found[1:])
        assert np.abs(found[0] - parameters).max() <= TOLERANCE


def test_a_mean_of_the_means_of_unequal_shards_would_be_wrong():
    x, y = table(20)
    parameters = NETWORK.initialise(seed=0)
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    whole = NETWORK.loss_and_gradient(parameters, x, y)[1]
    means = np.mean([NETWORK.loss_and_gradient(parameters, *part)[1] for part in parts], axis=0)
    sums = sum(NETWORK.loss_and_gradient(parameters, *part, divisor=20)[1] for part in parts)
    assert np.abs(sums - whole).max() <= 1e-15
    assert np.abs(means - whole).max() > 1e-3


def test_the_same_run_twice_gives_the_same_bits():
    batches = Batches(*table(90), rows=25)
    program = with_options(bucket_bytes=200)
    first, second = (trained(5, batches, Adam(0.01), program=program) for _ in range(2))
    assert first.parameters.tobytes() == second.parameters.tobytes()
    assert first.losses.tobytes() == second.losses.tobytes()


def test_the_loop_goes_on_where_it_stopped_and_follows_a_schedule():
    batches = Batches(*table(90), rows=25)

    def program(rank, steps, parameters=None):
        return train(
            *(rank, NETWORK, SGD(9.0), batches, steps),
            parameters=None if parameters is None else parameters.copy(),
            rate=lambda step: 0.2,
        )

    whole = same_on_all(spmd.run(None, Mesh(data=2), program, 3).results)
    expected = serial(NETWORK, SGD(0.2), batches, 3)
    assert_equal_to_serial(whole, expected)
    none = same_on_all(spmd.run(None, Mesh(data=2), program, 0, whole.parameters).results)
    assert np.array_equal(none.parameters, whole.parameters) and none.losses.size == 0


# ---------------------------------------------------------------- buckets and overlap


def test_buckets_hold_whole_layers_and_cover_the_gradient_once():
    for bucket_bytes in (None, 1, 63, 64, 65, 500, 10**9):
        found = buckets(NETWORK, bucket_bytes)
        assert found[0].stop == NETWORK.size and found[-1].start == 0
        assert all(a.start == b.stop for a, b in pairwise(found))
        assert all(NETWORK.slices[bucket.layer][0] == bucket.start for bucket in found)
        for bucket in found[:-1]:
            assert (bucket.stop - bucket.start) * 8 >= bucket_bytes
    assert len(buckets(NETWORK, 1)) == 3
    assert len(buckets(NETWORK)) == len(buckets(NETWORK, 10**9)) == 1
    # The last layer holds 8 numbers: 64 bytes in float64, 32 in float32.
    assert [b.layer for b in buckets(NETWORK, 64)] == [2, 1, 0]
    assert [b.layer for b in buckets(NETWORK, 64, np.float32)] == [1, 0]


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("algorithm", [None, "naive", "tree", "halving"])
def test_no_size_of_buckets_and_no_overlap_changes_a_bit(ranks, algorithm):
    batches = Batches(*table(90), rows=25)
    found = {
        trained(
            *(ranks, batches, Adam(0.01)),
            program=with_options(bucket_bytes=nbytes, overlap=overlap, algorithm=algorithm),
        ).parameters.tobytes()
        for nbytes in (None, 1, 100, 600)
        for overlap in (True, False)
    }
    assert len(found) == 1


def test_a_ring_gives_the_serial_result_to_rounding():
    batches = Batches(*table(90), rows=25)
    expected = serial(NETWORK, Adam(0.01), batches, STEPS)
    for nbytes in (None, 100):
        program = with_options(bucket_bytes=nbytes, algorithm="ring")
        assert_equal_to_serial(trained(3, batches, Adam(0.01), program=program), expected)


def recorded(bucket_bytes, overlap=True, ranks=2, **options):
    """Events of two steps."""
    x, y = table(30)

    def program(rank):
        mine = shard(30, rank.data)
        trainer = DataParallel(
            *(rank, NETWORK, SGD(0.1), NETWORK.initialise(0)),
            **{"bucket_bytes": bucket_bytes, "overlap": overlap, **options},
        )
        for _ in range(2):
            trainer.step(x[mine], y[mine], 30)

    return spmd.run(None, Mesh(data=ranks), program, record=True).events


class Waiting(MLP):
    """A network that begins to compute a layer only when the one after it has been exchanged."""

    def backward(self, parameters, x, out, workspace, exchanged):
        for layer in super().backward(parameters, x, out, workspace):
            yield layer
            end = time.monotonic() + 5
            while layer > 0 and not exchanged(layer) and time.monotonic() < end:
                time.sleep(0.001)


def test_late_layers_are_exchanged_before_early_layers_are_computed():
    x, y = table(30)

    def program(rank):
        def exchanged(layer):
            sent = [e for e in rank.events if (e.operation, e.layer) == ("all_reduce", layer)]
            return len(sent) > trainer.steps

        network = Waiting(NETWORK.widths)
        backward = functools.partial(network.backward, exchanged=exchanged)
        object.__setattr__(network, "backward", backward)
        mine = shard(30, rank.data)
        trainer = DataParallel(rank, network, SGD(0.1), network.initialise(0), bucket_bytes=1)
        for _ in range(2):
            trainer.step(x[mine], y[mine], 30)

    events = spmd.run(None, Mesh(data=2), program, record=True).events
    for rank in (0, 1):
        mine = [event for event in events if event.rank == rank]
        sent = [event for event in mine if event.operation == "all_reduce"]
        backward = [event for event in mine if event.operation == "backward"]
        assert [e.layer for e in sent] == [e.layer for e in backward] == [2, 1, 0] * 2
        assert {event.lane for event in sent} == {1}
        assert {event.lane for event in backward} == {0}
        assert [event.nbytes for event in sent] == [8 * 8, 70 * 8, 54 * 8] * 2
        for place in (0, 1, 3, 4):
            assert backward[place].stop <= sent[place].start
            assert sent[place].stop < backward[place + 1].stop  # else it waited 5 s in vain
        assert max(event.length for event in backward) < 5


def test_without_overlap_the_exchange_stands_between_the_layers():
    events = [e for e in recorded(bucket_bytes=1, overlap=False) if e.rank == 0]
    named = ("forward", "backward", "all_reduce", "update")
    steps = [(e.operation, e.layer) for e in events if e.operation in named]
    backward = [(name, layer) for layer in (2, 1, 0) for name in ("backward", "all_reduce")]
    assert steps == [("forward", None), *backward, ("update", None)] * 2
    assert {event.lane for event in events} == {0}


def test_one_bucket_is_exchanged_after_the_backward_pass_without_a_second_thread():
    events = recorded(bucket_bytes=None)
    assert {event.lane for event in events} == {0}
    assert sum(event.operation == "all_reduce" for event in events) == 4  # 2 ranks, 2 steps


def test_a_rank_alone_exchanges_nothing():
    events = recorded(bucket_bytes=1, ranks=1)
    assert {event.operation for event in events} == {"forward", "backward", "update"}


# ---------------------------------------------------------------- accumulation and clipping


@pytest.mark.parametrize("microbatches", [2, 3, 100])
@pytest.mark.parametrize("bucket_bytes", [None, 1])
def test_micro_batches_add_up_to_the_whole_batch(microbatches, bucket_bytes):
    batches = Batches(*table(90), rows=25)
    expected = serial(NETWORK, OPTIMISERS[1], batches, STEPS)
    program = with_options(microbatches=microbatches, bucket_bytes=bucket_bytes)
    for ranks in (1, 2, 4):
        assert_equal_to_serial(trained(ranks, batches, OPTIMISERS[1], program=program), expected)


def test_micro_batches_need_less_memory_and_are_exchanged_once():
    events = recorded(bucket_bytes=None, microbatches=4)
    first = [event for event in events if event.rank == 0]
    assert sum(event.operation == "all_reduce" for event in first) == 2  # in each step one
    assert [e.microbatch for e in first if e.operation == "forward"] == [0, 1, 2, 3] * 2

    def rows_of_workspace(rank, microbatches):
        x, y = table(64)
        parameters = NETWORK.initialise(0)
        trainer = DataParallel(rank, NETWORK, SGD(0.1), parameters, microbatches=microbatches)
        trainer.step(x, y)
        return len(trainer._workspace.outputs[0])

    found = [spmd.run(None, Mesh(), rows_of_workspace, parts).results[0] for parts in (1, 4)]
    assert found == [64, 16]


def test_clipping_finds_the_norm_of_the_whole_gradient():
    batches = Batches(*table(90), rows=25)
    expected = serial(NETWORK, SGD(0.5), batches, STEPS, largest_norm=0.05)
    unclipped = serial(NETWORK, SGD(0.5), batches, STEPS)
    assert np.abs(expected[0] - unclipped[0]).max() > 1e-3  # the limit is felt
    for options in ({}, {"bucket_bytes": 1}, {"microbatches": 2}):
        program = with_options(largest_norm=0.05, **options)
        for ranks in (1, 3, 8):
            assert_equal_to_serial(trained(ranks, batches, SGD(0.5), program=program), expected)


def test_steps_after_the_first_ask_for_no_memory_for_rows():
    network = MLP((8, 64, 1))
    x, y = table(4096, network)

    def program(rank):
        trainer = DataParallel(rank, network, SGD(0.1), network.initialise(0))
        trainer.step(x, y, 4096)
        gradient, workspace = trainer.gradient, trainer._workspace
        tracemalloc.start()
        trainer.step(x, y, 4096)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert trainer.gradient is gradient and trainer._workspace is workspace
        return most

    most = spmd.run(None, Mesh(), program).results[0]
    # Only the loss allocates, some numbers a row; one array of (4096, 64) would be 2 MiB.
    assert most < 4096 * 8 * 20


# ---------------------------------------------------------------- averaging


def test_averaged_parameters_are_weighted_by_rows():
    rows = [3, 0, 10]
    own = np.random.default_rng(0).normal(size=(3, 50))

    def program(rank, dtype):
        mine = own[rank.index].astype(dtype)
        if rank.index == 1:
            mine[:] = np.nan  # a rank without rows has no say, whatever it holds
        mean = average_parameters(rank.data, mine, rows[rank.index])
        assert average_parameters(rank.data, mine, np.int64(rows[rank.index]), out=mine) is mine
        assert np.array_equal(mine, mean)
        return mean

    expected = (3 * own[0] + 10 * own[2]) / 13
    for dtype, tolerance in ((np.float64, 1e-15), (np.float32, 1e-6)):
        found = spmd.run(None, Mesh(data=3), program, dtype).results
        assert all(np.array_equal(found[0], other) for other in found)
        assert found[0].dtype == dtype
        assert np.abs(found[0] - expected).max() <= tolerance


def test_ranks_that_train_alone_are_averaged_once_at_the_end():
    x, y = table(90)

    def program(rank):
        mine = shard(90, rank.data)
        batches = Batches(x[mine], y[mine], rows=10)
        own = train(rank, NETWORK, SGD(0.1), batches, STEPS, group=alone(rank), bucket_bytes=1)
        count = len(x[mine])
        return own.parameters, average_parameters(rank.data, own.parameters, count)

    results = spmd.run(None, Mesh(data=4), program).results
    own, means = zip(*results, strict=True)
    expected = sum(w * p for w, p in zip([23, 23, 22, 22], own)) / 90
    assert np.abs(means[0] - expected).max() <= 1e-15
    assert all(np.array_equal(means[0], mean) for mean in means)
    assert not np.array_equal(own[0], own[1])
    lone, _ = serial(NETWORK, SGD(0.1), Batches(x[:23], y[:23], rows=10), STEPS)
    assert np.array_equal(own[0], lone)


# ---------------------------------------------------------------- gradients that are no numbers


class Faulty(MLP):
    """A network whose gradient is spoilt: on one rank, in one layer, in one step."""

    def backward(self, parameters, x, out, workspace):
        for layer in super().backward(parameters, x, out, workspace):
            if np.isnan(x).any():  # the step and the rank are chosen by a row with NaN
                start, stop = self.slices[layer]
                out[start:stop] = 0.0
                out[start + 2] = np.nan if layer == 1 else 0.0
            yield layer


def fails(ranks, spoilt, step, client=None, network=None, value=np.nan, **options):
    """The message of a run in which one rank has a value that is no number."""
    network = network or NETWORK
    x, y = table(60)
    whole = Batches(x, y, rows=20)

    def batches(number, group):
        xs, ys, rows = whole(number, group)
        if (number, group.rank) == (step, spoilt):
            xs[0, 0] = value
        return xs, ys, rows

    def program(rank):
        return train(rank, network, SGD(0.1), batches, 10, **options)

    with pytest.raises(spmd.RankError) as failed:
        spmd.run(client, Mesh(data=ranks), program)
    assert isinstance(failed.value.__cause__, FloatingPointError)
    return str(failed.value).splitlines()[0]


@pytest.mark.parametrize("options", [{}, {"bucket_bytes": 1}, {"microbatches": 3}], ids=str)
@pytest.mark.parametrize(("ranks", "spoilt", "step"), [(1, 0, 0), (2, 1, 3), (5, 2, 9)])
def test_a_gradient_that_is_nan_is_named_by_rank_layer_and_step(ranks, spoilt, step, options):
    start = time.monotonic()
    message = fails(ranks, spoilt, step, network=Faulty((5, 9, 7, 1)), **options)
    assert time.monotonic() - start < 5
    assert f"on rank {spoilt}, in step {step}, the gradient is not finite" in message
    assert "layer 1 has 1 NaN. " in message
    assert "layer 0" not in message and "layer 2" not in message


def test_a_row_with_nan_spoils_all_layers_and_all_are_named():
    message = fails(3, spoilt=1, step=2, bucket_bytes=1)
    assert "on rank 1, in step 2" in message
    assert all(f"layer {layer} has" in message for layer in range(3))


def test_nothing_is_sent_of_a_gradient_that_is_nan():
    x, y = table(20)
    seen = {}

    def program(rank):
        trainer = DataParallel(rank, NETWORK, SGD(0.1), NETWORK.initialise(0))
        trainer.step(x, y, 40)
        seen[rank.index] = trainer
        barrier(rank.data)
        trainer.step(x * (np.nan if rank.index else 1), y, 40)

    with pytest.raises(spmd.RankError, match="rank 1 of 2"):
        spmd.run(None, Mesh(data=2), program)
    for trainer in seen.values():
        assert np.isfinite(trainer.parameters).all() and trainer.steps == 1
    assert np.isfinite(seen[0].gradient).all()


def test_large_gradients_whose_squares_overflow_are_no_error():
    network = MLP((1, 1), loss="squared")

    def program(rank):
        x, y = np.full((1, 1), 1e15, np.float32), np.full(1, -1e15, np.float32)
        parameters = network.initialise(0, np.float32)
        trainer = DataParallel(rank, network, SGD(0.0), parameters)
        trainer.step(x, y)
        return trainer.gradient.copy()

    found = spmd.run(None, Mesh(data=2), program).results[0]
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 1e25  # whose square is no float32


def test_infinite_numbers_are_told_from_nan():
    gradient = np.zeros(NETWORK.size)
    assert describe_not_finite(NETWORK, gradient) == ""
    gradient[[0, 1, -1]] = np.nan, np.inf, -np.inf
    words = describe_not_finite(NETWORK, gradient)
    assert words == "layer 0 has 1 NaN and 1 infinite, layer 2 has 1 infinite"


# ---------------------------------------------------------------- wrong use


def refused(program, *args, ranks=2):
    """The first line of the error of a run, and its cause."""
    with pytest.raises(spmd.RankError) as failed:
        spmd.run(None, Mesh(data=ranks), program, *args)
    return str(failed.value).splitlines()[0], type(failed.value.__cause__)


def one_step(rank, x, y, divisor=None, **options):
    seed = options.pop("seed", 0)
    parameters = NETWORK.initialise(seed, options.pop("dtype", np.float64))
    return DataParallel(rank, NETWORK, SGD(0.1), parameters, **options).step(x, y, divisor)


def test_a_shard_of_another_width_is_refused_with_the_rank_named():
    x, y = table(4)

    def program(rank):
        one_step(rank, x[:, : 3 if rank.index == 1 else 5], y)

    message, cause = refused(program, ranks=3)
    assert "rank 1 of 3: ValueError: x has shape (4, 3): this network needs (rows, 5)" in message
    assert cause is ValueError


def test_ranks_that_start_from_different_parameters_are_refused():
    x, y = table(4)
    message, cause = refused(lambda rank: one_step(rank, x, y, seed=rank.index // 2), ranks=4)
    assert "ranks 2, 3 start with other parameters than rank 0: initialise all with" in message
    assert cause is ValueError


@pytest.mark.parametrize("divisor", [None, 0])
def test_a_batch_without_rows_is_refused(divisor):
    x, y = table(0)
    message, cause = refused(one_step, x, y, divisor)
    later = "the number of rows of the batch that count is 0: give 1 or more"
    assert later in message
    assert cause is ValueError

    def program(rank):
        trainer = DataParallel(rank, NETWORK, SGD(0.1), NETWORK.initialise(0))
        trainer.step(*table(3))
        trainer.step(x, y, divisor)

    assert later in refused(program)[0]
    none = "the number of rows of the batch is 0: give 1 or more"
    assert none in refused(lambda rank: shard(0, rank.data))[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divisor": 7}, "the divisor is 7, but of the ranks' rows together 8 count"),
        ({"divisor": 8.0}, "the number of rows of the batch that count is 8.0: give a whole"),
        ({"bucket_bytes": 0}, "bucket_bytes is 0: give 1 or more"),
        ({"bucket_bytes": 1.5}, "bucket_bytes is 1.5: give a whole number"),
        ({"microbatches": 0}, "microbatches is 0: give 1 or more"),
        ({"microbatches": True}, "microbatches is True: give a whole number"),
        ({"largest_norm": 0}, "largest_norm is 0: give a positive length, or None"),
        ({"largest_norm": np.nan}, "largest_norm is nan: give a positive length, or None"),
        ({"algorithm": "star"}, "no all-reduce is called 'star': choose one of"),
        ({"dtype": np.float32}, "dtypes differ (parameters float32, x float64)"),
    ],
    ids=str,
)
def test_impossible_settings_get_one_sentence(options, words):
    x, y = table(4)
    message, cause = refused(lambda rank: one_step(rank, x, y, **options))
    assert words in message
    assert issubclass(cause, ValueError | TypeError)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.ones(4), np.ones(4), "x has shape (4,): this network needs (rows, 5)"),
        (np.ones((4, 3)), np.ones(4), "this network needs (rows, 5)"),
        (np.ones((4, 5)), np.ones(3), "x has 4 rows and y 3: give as many"),
        (np.ones((4, 5)), np.ones(5), "x has 4 rows and y 5: give as many"),
        (np.ones((4, 5)), np.full(4, 2), "a label is neither 0 nor 1"),
        (np.ones((4, 5), int), np.ones(4), "x has dtype int64: give floats"),
    ],
)
def test_rows_that_do_not_fit_get_one_sentence(x, y, words):
    assert words in refused(one_step, x, y)[0]


def test_parameters_of_another_network_are_refused():
    def program(rank):
        DataParallel(rank, NETWORK, SGD(0.1), np.zeros(3))

    assert "needs one contiguous array of shape" in refused(program)[0]


def test_batches_that_cannot_be_drawn_are_refused():
    x, y = table(10)
    for rows in (0, 11, -1):
        with pytest.raises(ValueError, match=f"a batch of {rows} rows: .* give 1 to 10"):
            Batches(x, y, rows)
    with pytest.raises(ValueError, match="x has 10 rows and y 9: give as many"):
        Batches(x, y[:9], 3)
    with pytest.raises(TypeError):
        Batches(x, y, 2.5)


def test_averages_of_nothing_are_refused():
    def program(rank, rows):
        average_parameters(rank.data, np.ones(3), rows)

    assert "No rank has a row: there is nothing to average" in refused(program, 0)[0]
    assert "rows is -1: give 0 or more" in refused(program, -1)[0]
    numbers = refused(lambda rank: average_parameters(rank.data, np.ones(3, int), 1))
    assert "parameters has dtype int64: give floats" in numbers[0]


# ---------------------------------------------------------------- on workers


@pytest.fixture(scope="module")
def client():
    with open_cluster(workers=2) as cluster:
        yield cluster.client


@pytest.mark.parametrize("options", [{}, {"bucket_bytes": 100, "microbatches": 2}], ids=str)
def test_two_and_five_ranks_on_two_workers_train_as_one(client, options):
    batches = Batches(*table(90), rows=25)
    expected = serial(NETWORK, Adam(0.01), batches, STEPS)
    for ranks in (2, 5):
        program = with_options(**options)
        found = trained(ranks, batches, Adam(0.01), client=client, program=program)
        assert_equal_to_serial(found, expected)
        # Threads and processes add in the same order.
        here = trained(ranks, batches, Adam(0.01), program=program)
        assert found.parameters.tobytes() == here.parameters.tobytes()


def test_processes_give_the_same_bits_with_any_buckets_and_in_every_run(client):
    batches = Batches(*table(90, dtype=np.float32), rows=25)
    found = {
        trained(
            *(2, batches),
            client=client,
            program=with_options(bucket_bytes=nbytes, dtype=np.float32),
        ).parameters.tobytes()
        for nbytes in (None, None, 1, 300)
    }
    assert len(found) == 1


def test_nan_on_a_worker_is_named_within_seconds(client):
    start = time.monotonic()
    message = fails(2, 1, 4, client=client, network=Faulty((5, 9, 7, 1)), bucket_bytes=1)
    assert time.monotonic() - start < 10
    assert "on rank 1, in step 4, the gradient is not finite: layer 1 has 1 NaN" in message
    batches = Batches(*table(20), rows=6)
    assert len(trained(2, batches, client=client).losses) == STEPS  # the cluster is usable at once


# ---------------------------------------------------------------- PyTorch


def test_pytorch_takes_the_same_steps():
    torch = pytest.importorskip("torch")
    x, y = table(40)
    batches = Batches(x, y, rows=16)
    found = trained(3, batches, SGD(0.1, momentum=0.9), program=with_options(largest_norm=0.3))
    parameters = NETWORK.initialise(seed=0)
    flat = [
        torch.tensor(a.copy(), requires_grad=True) for w in NETWORK.views(parameters) for a in w
    ]
    optimiser = torch.optim.SGD(flat, lr=0.1, momentum=0.9)
    for step in range(STEPS):
        rows = batches.numbers(step)
        z = torch.tensor(x[rows])
        for layer in range(3):
            z = (z.relu() if layer else z) @ flat[2 * layer] + flat[2 * layer + 1]
        labels = torch.tensor(y[rows], dtype=torch.float64)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flat, 0.3)
        optimiser.step()
    expected = np.concatenate([tensor.detach().numpy().ravel() for tensor in flat])
    # PyTorch adds 1e-6 to the norm before it divides by it.
    assert np.abs(found.parameters - expected).max() <= 1e-5


@pytest.mark.parametrize("module", [data, shards, training], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_are_right(module):
    failed, tried = doctest.testmod(module)
    assert failed == 0
    assert tried >= 7
