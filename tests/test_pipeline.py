"""The executor of pipelines: every schedule gives the gradients of one rank alone."""

import doctest
import sys
import time
from itertools import pairwise

import cloudpickle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.errors import RankError
from helpers.engine.mesh import Mesh
from helpers.parallel import pipeline
from helpers.parallel.pipeline import in_turn, run_schedule
from helpers.parallel.schedules import (
    Operation,
    gpipe,
    interleaved,
    one_by_one,
    one_f_one_b,
    plan,
    zero_bubble,
)
from helpers.planner.pipeline import Costs, needs, peak_activations, simulate

cloudpickle.register_pickle_by_value(sys.modules[__name__])

SCHEDULES = {
    "one_by_one": (one_by_one, 1),
    "gpipe": (gpipe, 1),
    "one_f_one_b": (one_f_one_b, 1),
    "interleaved": (interleaved, 2),
    "zero_bubble": (zero_bubble, 1),
}


class Linear:
    """A stage that multiplies by a matrix; it fails if an operation comes too early or twice."""

    def __init__(self, w, x):
        self.w, self.x, self.kept, self.later = w, x, {}, {}
        self.gradient = np.zeros_like(w)

    def forward(self, microbatch, x):
        self.kept[microbatch] = self.x[microbatch] if x is None else x
        return self.kept[microbatch] @ self.w

    def input(self, microbatch, dy):
        if dy is None:
            dy = np.ones((len(self.kept[microbatch]), self.w.shape[1]))
        self.later[microbatch] = dy
        return dy @ self.w.T

    def weight(self, microbatch):
        self.gradient += self.kept.pop(microbatch).T @ self.later.pop(microbatch)

    def backward(self, microbatch, dy):
        dx = self.input(microbatch, dy)
        self.weight(microbatch)
        return dx


def matrices(stages, width):
    random = np.random.default_rng(0)
    return [random.normal(size=(width, width)) / np.sqrt(width) for _ in range(stages)]


def batch(microbatches, rows, width):
    return np.random.default_rng(1).normal(size=(microbatches, rows, width))


def program(rank, schedule, chunks, microbatches, rows=3, width=5, take_turns=False):
    group = rank.pipeline
    ws, x = matrices(group.size * chunks, width), batch(microbatches, rows, width)
    stages = [Linear(ws[chunk * group.size + group.rank], x) for chunk in range(chunks)]
    options = {"chunks": chunks} if chunks > 1 else {}
    run_schedule(group, plan(schedule, group.size, microbatches, **options), stages, take_turns)
    assert not any(stage.kept or stage.later for stage in stages)
    return [stage.gradient for stage in stages]


def serial(stages, microbatches, rows=3, width=5):
    xs = [batch(microbatches, rows, width).reshape(-1, width)]
    ws, gradients = matrices(stages, width), []
    for w in ws:
        xs.append(xs[-1] @ w)
    dy = np.ones_like(xs[-1])
    for w, x in zip(ws[::-1], xs[-2::-1]):
        gradients.append(x.T @ dy)
        dy = dy @ w.T
    return gradients[::-1]


def check(results, chunks, *sizes):
    ranks = len(results)
    for stage, expected in enumerate(serial(ranks * chunks, *sizes)):
        found = results[stage % ranks][stage // ranks]
        assert np.allclose(found, expected, rtol=1e-11, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("take_turns", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_schedule_gives_the_gradients_of_one_rank(ranks, name, take_turns):
    schedule, chunks = SCHEDULES[name]
    given_to = schedule, chunks, 2 * ranks, 3, 5, take_turns
    run = spmd.run(None, Mesh(pipeline=ranks), program, *given_to)
    check(run.results, chunks, 2 * ranks)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(1, 3),
    st.booleans(),
)
def test_any_number_of_ranks_and_micro_batches(name, ranks, microbatches, rows, take_turns):
    schedule, chunks = SCHEDULES[name]
    if chunks > 1:
        microbatches *= ranks
    given_to = schedule, chunks, microbatches, rows, 4, take_turns
    run = spmd.run(None, Mesh(pipeline=ranks), program, *given_to)
    check(run.results, chunks, microbatches, rows, 4)


def test_messages_larger_than_what_fits_on_the_way_block_no_ring():
    """The last rank of interleaved chunks sends to the first: a ring that could wait for itself."""
    with open_cluster(workers=3) as cluster:
        for name in ("interleaved", "gpipe"):
            schedule, chunks = SCHEDULES[name]
            sizes = 9, 4_000, 60  # 2 MB a message
            run = spmd.run(cluster.client, Mesh(pipeline=3), program, schedule, chunks, *sizes)
            check(run.results, chunks, *sizes)


def test_events_are_those_of_the_plan_in_the_order_of_each_rank():
    given_to = one_f_one_b, 1, 4
    run = spmd.run(None, Mesh(pipeline=2), program, *given_to, record=True)
    expected = plan(one_f_one_b, 2, 4)
    for rank, operations in enumerate(expected):
        mine = [e for e in run.events if e.rank == rank and e.layer is not None]
        assert [(e.operation, e.microbatch) for e in mine] == [
            (operation.kind, operation.microbatch) for operation in operations
        ]
        assert all(event.layer == rank and event.length > 0 for event in mine)
    sent = {e.nbytes for e in run.events if e.operation in ("forward", "backward") and e.nbytes}
    assert sent == {3 * 5 * 8}
    simulated = simulate(expected, Costs())
    assert peak_activations(run.events, 2) == peak_activations(simulated, 2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_operation_begins_before_what_it_needs_has_ended(name):
    """Happens-before, in measured events of real ranks."""
    schedule, chunks = SCHEDULES[name]
    ranks = 3
    run = spmd.run(None, Mesh(pipeline=ranks), program, schedule, chunks, 6, record=True)
    gives = {"forward": "output", "backward": "gradient", "input": "gradient"}
    work = [event for event in run.events if event.layer is not None]
    ready = {
        (gives[e.operation], e.microbatch, e.layer): e.stop for e in work if e.operation in gives
    }
    for event in work:
        operation = Operation(event.operation, event.microbatch, event.layer // ranks)
        for need in needs(operation, event.layer, ranks * chunks - 1):
            assert ready[need] <= event.start


def test_in_turns_only_one_rank_works_at_a_time():
    given_to = gpipe, 1, 6, 50, 40, True
    run = spmd.run(None, Mesh(pipeline=3), program, *given_to, record=True)
    work = sorted((e for e in run.events if e.layer is not None), key=lambda e: e.start)
    assert len(work) == 3 * 12
    assert all(one.stop <= other.start for one, other in pairwise(work))
    order = [(rank, op.kind, op.microbatch) for rank, op in in_turn(plan(gpipe, 3, 6))]
    assert [(e.rank, e.operation, e.microbatch) for e in work] == order


def test_a_plan_that_cannot_be_run_is_refused_before_it_runs():
    def wrong(rank, ranks, microbatches):
        yield Operation("backward", 0)
        yield Operation("forward", 0)

    began = time.monotonic()
    with pytest.raises(RankError, match="comes before its forward"):
        spmd.run(None, Mesh(pipeline=2), program, wrong, 1, 1)
    assert time.monotonic() - began < 5


def test_a_plan_for_other_ranks_is_refused():
    def other(rank):
        run_schedule(rank.pipeline, plan(gpipe, 3, 2), [Linear(np.eye(2), [])])

    with pytest.raises(RankError, match="one for 3 ranks: this group has 2"):
        spmd.run(None, Mesh(pipeline=2), other)


def test_a_stage_that_fails_ends_the_run_with_its_cause():
    class Broken(Linear):
        def backward(self, microbatch, dy):
            raise FloatingPointError("no number")

    def broken(rank):
        kind = Broken if rank.index == 1 else Linear
        stage = kind(np.eye(2), batch(4, 1, 2))
        run_schedule(rank.pipeline, plan(one_f_one_b, 3, 4), [stage])

    with pytest.raises(RankError, match="rank 1 of 3.*no number"):
        spmd.run(None, Mesh(pipeline=3), broken)


def test_examples_in_docstrings_hold():
    result = doctest.testmod(pipeline)
    assert result.attempted > 0 and result.failed == 0
