"""The GPT is trained by several ranks as by one, and writes flights within seconds."""

import os
import sys
import time

import cloudpickle
import numpy as np
import pytest

from helpers.cluster import open_cluster
from helpers.datasets import text
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.nn import GPT, SGD, Adam, Network, clip_by_global_norm
from helpers.parallel.data import DataParallel, buckets, shard
from helpers.parallel.training import Batches, train
from helpers.studies import gpt as study
from helpers.studies import load_study

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers know no tests

SMALL = GPT(vocabulary=11, context=8, width=8, heads=2, layers=2)
OPTIMISERS = [SGD(0.2, momentum=0.9), Adam(0.01, betas=(0.9, 0.95), weight_decay=0.1)]
STEPS = 5
TOLERANCE = 1e-10  # float64: the same sums in another order


def texts(rows, seed=0):
    """Random lines of unequal length, as tokens and targets; behind a line's end nothing counts."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, SMALL.vocabulary, (rows, SMALL.context + 1))
    targets = codes[:, 1:].copy()
    targets[np.arange(SMALL.context) >= random.integers(1, SMALL.context + 1, (rows, 1))] = -1
    return codes[:, :-1], targets


def batches_of(rows, lines=40):
    return Batches(*texts(lines), rows=rows, counted=SMALL.counted)


def serial(optimiser, batches, largest_norm=None):
    """Parameters and losses of training as it is written without any rank."""
    parameters, state, losses = SMALL.initialise(seed=0), optimiser.start(SMALL.size), []
    for step in range(STEPS):
        rows = batches.numbers(step)
        loss, gradient = SMALL.loss_and_gradient(parameters, batches.x[rows], batches.y[rows])
        if largest_norm is not None:
            clip_by_global_norm(gradient, largest_norm)
        optimiser.step(parameters, gradient, state)
        losses.append(loss)
    return parameters, np.array(losses)


def trained(ranks, optimiser, batches, client=None, **options):
    """The training of the first rank, once all are known to hold the same bits."""

    def program(rank):
        return train(rank, SMALL, optimiser, batches, STEPS, **options)

    first, *others = spmd.run(client, Mesh(data=ranks), program).results
    for other in others:
        assert other.parameters.tobytes() == first.parameters.tobytes()
        assert other.losses.tobytes() == first.losses.tobytes()
    return first


def assert_equal_to_serial(found, expected):
    parameters, losses = expected
    assert np.abs(found.parameters - parameters).max() <= TOLERANCE
    assert np.abs(found.losses - losses).max() <= TOLERANCE


# ---------------------------------------------------------------- equal to serial


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_trains_a_gpt_as_one(ranks, optimiser):
    for rows in (12, 13):  # one of them divides by all numbers of ranks, the other by none
        batches = batches_of(rows)
        assert_equal_to_serial(trained(ranks, optimiser, batches), serial(optimiser, batches))


@pytest.mark.parametrize(
    "options",
    [
        {"bucket_bytes": 1},
        {"bucket_bytes": 1, "overlap": False},
        {"bucket_bytes": 3000, "algorithm": "ring"},
        {"microbatches": 3},
        {"microbatches": 3, "bucket_bytes": 1},
        {"largest_norm": 0.3, "microbatches": 2, "bucket_bytes": 1},
    ],
    ids=str,
)
def test_buckets_micro_batches_and_clipping_change_nothing(options):
    batches = batches_of(13)
    expected = serial(OPTIMISERS[1], batches, options.get("largest_norm"))
    for ranks in (1, 2, 3, 4):
        assert_equal_to_serial(trained(ranks, OPTIMISERS[1], batches, **options), expected)


def test_the_limit_of_the_norm_is_felt():
    batches = batches_of(13)
    apart = serial(OPTIMISERS[0], batches)[0] - serial(OPTIMISERS[0], batches, 0.3)[0]
    assert np.abs(apart).max() > 1e-3


def test_no_size_of_buckets_and_no_overlap_changes_a_bit():
    found = {
        trained(
            *(3, OPTIMISERS[1], batches_of(13)), bucket_bytes=nbytes, overlap=overlap
        ).parameters.tobytes()
        for nbytes in (None, 1, 3000)
        for overlap in (True, False)
    }
    assert len(found) == 1


@pytest.mark.parametrize("rows", [1, 2])
def test_ranks_without_a_line_do_no_harm(rows):
    batches = batches_of(rows)
    expected = serial(OPTIMISERS[0], batches)
    for options in ({}, {"bucket_bytes": 1, "microbatches": 3}):
        assert_equal_to_serial(trained(4, OPTIMISERS[0], batches, **options), expected)


def test_two_workers_train_a_gpt_as_one():
    batches = batches_of(13)
    expected = serial(OPTIMISERS[1], batches)
    with open_cluster(workers=2) as cluster:
        for options in ({}, {"bucket_bytes": 1, "microbatches": 2}):
            found = trained(2, OPTIMISERS[1], batches, client=cluster.client, **options)
            assert_equal_to_serial(found, expected)


def test_a_bucket_travels_as_soon_as_its_layers_are_computed():
    batches = batches_of(13)

    def program(rank):
        train(rank, SMALL, SGD(0.1), batches, 2, bucket_bytes=1)

    events = spmd.run(None, Mesh(data=2), program, record=True).events
    mine = [event for event in events if event.rank == 0]
    sent = [event for event in mine if event.operation == "all_reduce" and event.lane == 1]
    backward = [event for event in mine if event.operation == "backward"]
    assert (
        [event.layer for event in sent] == [event.layer for event in backward] == [3, 2, 1, 0] * 2
    )
    sizes = [8 * (stop - start) for start, stop in reversed(SMALL.slices)]
    assert [event.nbytes for event in sent] == sizes * 2
    for computed, exchanged in zip(backward, sent, strict=True):
        assert computed.stop <= exchanged.start


# ---------------------------------------------------------------- what the sum is divided by


def test_the_divisor_is_the_number_of_targets_that_count():
    tokens, targets = texts(13)
    batches = Batches(tokens, targets, rows=13, counted=SMALL.counted)
    parts = spmd.run(None, Mesh(data=3), lambda rank: batches(0, rank.data)).results
    assert {divisor for _, _, divisor in parts} == {(targets >= 0).sum()} != {targets.size}
    assert sum(SMALL.counted(part) for _, part, _ in parts) == (targets >= 0).sum()


def test_ranks_count_when_they_are_not_told():
    tokens, targets = texts(13)

    def program(rank, told):
        mine = shard(13, rank.data)
        trainer = DataParallel(rank, SMALL, SGD(0.2), SMALL.initialise(0))
        divisor = SMALL.counted(targets) if told else None
        shares = [trainer.step(tokens[mine], targets[mine], divisor) for _ in range(3)]
        return shares, trainer.parameters.tobytes()

    for ranks in (1, 3):
        told, counted = (spmd.run(None, Mesh(data=ranks), program, told) for told in (True, False))
        assert told.results == counted.results


def test_a_mean_of_the_means_of_lines_of_unequal_length_would_be_wrong():
    tokens, targets = texts(2)
    targets[0, 1:] = -1
    parameters = SMALL.initialise(0)
    _, whole = SMALL.loss_and_gradient(parameters, tokens, targets)
    lines = [(tokens[[line]], targets[[line]]) for line in (0, 1)]
    means = np.mean([SMALL.loss_and_gradient(parameters, *line)[1] for line in lines], axis=0)
    count = SMALL.counted(targets)
    sums = sum(SMALL.loss_and_gradient(parameters, *line, count)[1] for line in lines)
    assert np.abs(sums - whole).max() <= 1e-15
    assert np.abs(means - whole).max() > 1e-3


def test_a_shard_in_which_no_target_counts_does_no_harm():
    tokens, targets = texts(4)
    targets[2:] = -1
    _, whole = SMALL.loss_and_gradient(SMALL.initialise(0), tokens, targets)

    def program(rank):
        mine = shard(4, rank.data)
        trainer = DataParallel(rank, SMALL, SGD(0.0), SMALL.initialise(0))
        trainer.step(tokens[mine], targets[mine])
        return trainer.gradient.copy()

    found = spmd.run(None, Mesh(data=2), program).results[0]
    assert np.abs(found - whole).max() <= TOLERANCE


# ---------------------------------------------------------------- wrong use


def refused(program):
    with pytest.raises(spmd.RankError) as failed:
        spmd.run(None, Mesh(data=2), program)
    return str(failed.value).splitlines()[0]


def first_step(tokens, targets, divisor=None):
    def program(rank):
        DataParallel(rank, SMALL, SGD(0.1), SMALL.initialise(0)).step(tokens, targets, divisor)

    return program


def test_a_divisor_that_counts_lines_instead_of_targets_is_refused():
    tokens, targets = texts(13)
    batches = Batches(tokens, targets, rows=13)  # which counts the rows
    message = refused(lambda rank: train(rank, SMALL, SGD(0.1), batches, 1))
    count = (targets >= 0).sum()
    assert f"the divisor is 13, but of the ranks' rows together {count} count" in message


def test_what_does_not_fit_a_gpt_gets_one_sentence():
    tokens, targets = texts(3)
    nothing = "the number of rows of the batch that count is 0: give 1 or more"
    assert nothing in refused(first_step(tokens, np.full_like(targets, -1)))
    assert "tokens have dtype float64: give integers" in refused(first_step(tokens + 0.0, targets))
    assert "they must lie in 0 to 10" in refused(first_step(tokens + 11, targets))
    assert "x has 3 rows and y 2: give as many" in refused(first_step(tokens, targets[:2]))
    assert "targets have shape (3, 7)" in refused(first_step(tokens, targets[:, 1:]))


def test_a_gradient_that_is_nan_is_named_by_layer():
    tokens, targets = texts(3)

    def program(rank):
        parameters = SMALL.initialise(0)
        parameters[SMALL.slices[2][0]] = np.nan  # in the last block: nothing is left of the loss
        DataParallel(rank, SMALL, SGD(0.1), parameters, bucket_bytes=1).step(tokens, targets)

    message = refused(program)
    assert "in step 0, the gradient is not finite: layer 0 has " in message
    assert all(f"layer {layer} has " in message for layer in range(4))


class Line(Network):
    """A line through points: what is asked of a network, and nothing more."""

    sizes = (2,)

    def views(self, flat):
        return [(flat[:1], flat[1:])]

    def initialise(self, seed, dtype=np.float64):
        return np.zeros(2, dtype)

    def check_inputs(self, parameters, x):
        self.check_flat("parameters", parameters)

    def workspace(self, *, dtype=np.float64):
        return {}

    def forward(self, parameters, x, y, workspace, divisor=None):
        workspace["errors"] = (parameters[0] * x + parameters[1] - y) / (divisor or len(x))
        return float(workspace["errors"] @ (parameters[0] * x + parameters[1] - y))

    def backward(self, parameters, x, out, workspace):
        out[:] = 2 * workspace["errors"] @ x, 2 * workspace["errors"].sum()
        yield 0


def test_whatever_has_the_methods_of_a_network_is_trained():
    x = np.arange(9.0)
    batches = Batches(x, 2 * x - 1, rows=9)
    run = spmd.run(None, Mesh(data=2), train, Line(), SGD(0.02), batches, 2000)
    assert run.results[0].parameters == pytest.approx([2, -1])
    assert [bucket.layer for bucket in buckets(SMALL, 1)] == [3, 2, 1, 0]

    class Half(Network):
        sizes = (3,)

    with pytest.raises(TypeError, match="abstract"):
        Half()


# ---------------------------------------------------------------- it learns to write flights


def test_the_stored_curve_rises_from_nothing_to_nearly_all():
    for _, curve in load_study("gpt").groupby("seed"):
        assert tuple(curve.step) == study.LOOKS
        assert curve.real.iloc[0] == 0 and curve.real.iloc[-1] > 0.85
        assert (curve.real <= curve.well_formed).all()
        assert curve.test_loss.is_monotonic_decreasing
        assert (curve.real[curve.step >= 300] >= 0.5).all()


def test_the_rate_rises_and_falls_in_straight_lines():
    rates = np.array([study.rate(step, 100) for step in range(100)])
    assert rates.max() == study.OPTIMISER.rate == rates[20]
    assert np.allclose(np.diff(rates[:20]), 0.01 / 20)
    assert np.allclose(np.diff(rates[20:]), -0.01 / 80)
    assert rates[-1] == pytest.approx(0.01 / 80)


def test_what_a_rank_writes_does_not_depend_on_who_else_writes():
    parameters = study.NETWORK.initialise(0, np.float32)
    whole = study.written(parameters, slice(0, 5), seed=3)
    assert whole == [
        line for part in (slice(0, 2), slice(2, 5)) for line in study.written(parameters, part, 3)
    ]
    assert whole != study.written(parameters, slice(0, 5), seed=4)


def live(rank, steps, seed):
    """What notebook 08 does: every rank reads the log, and all train together."""
    learnt = text.inputs_and_targets(text.load_log().train.codes)
    batches = Batches(*learnt, rows=study.LINES, seed=seed, counted=study.NETWORK.counted)
    return train(
        *(rank, study.NETWORK, study.OPTIMISER, batches, steps),
        seed=seed,
        dtype=np.float32,
        rate=lambda step: study.rate(step, steps),
    )


@pytest.fixture(scope="module")
def client():
    with open_cluster(workers=2) as cluster:
        yield cluster.client


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the targets are for two cores")
@pytest.mark.parametrize("seed", study.SEEDS)
@pytest.mark.parametrize(
    ("steps", "seconds", "share"), [(200, 15, 0.3), (400, 30, 0.5), (800, 60, 0.75)]
)
def test_so_many_lines_are_real_within_so_many_seconds(client, steps, seconds, share, seed):
    start = time.monotonic()
    training = spmd.run(client, Mesh(data=2), live, steps, seed).results[0]
    took = time.monotonic() - start
    found = text.score(study.written(training.parameters, slice(0, 1000), seed))
    print(f"seed {seed}, {steps} steps: {took:.1f} s, {found}")
    assert found.real >= share
    assert took <= seconds
