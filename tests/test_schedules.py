"""Schedules of pipelines, and the simulator that predicts what they cost."""

import doctest
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.parallel import schedules
from helpers.parallel.schedules import (
    Operation,
    gpipe,
    interleaved,
    one_by_one,
    one_f_one_b,
    plan,
    zero_bubble,
)
from helpers.planner import pipeline
from helpers.planner.pipeline import Costs, bubble, find_fault, needs, peak_activations, simulate

PLAIN = (one_by_one, gpipe, one_f_one_b, zero_bubble)
EQUAL = Costs(forward=1.0, input=1.0, weight=1.0)
SIZES = [(p, m) for p in range(1, 9) for m in (1, 2, 3, 4, 7, 8, 16, 32)]


def forward(microbatch, chunk=0):
    return Operation("forward", microbatch, chunk)


def backward(microbatch, chunk=0):
    return Operation("backward", microbatch, chunk)


# ---------------------------------------------------------------- what the schedules are


def test_of_three_ranks_one_f_one_b_is_the_picture_of_the_paper():
    letters = ["".join(op.kind[0] for op in ops) for ops in plan(one_f_one_b, 3, 4)]
    assert letters == ["fffbfbbb", "ffbfbfbb", "fbfbfbfb"]


def test_interleaved_goes_in_groups_through_the_chunks():
    (first, _) = plan(interleaved, ranks=2, microbatches=4, chunks=2)
    order = [(op.microbatch, op.chunk) for op in first if op.kind == "forward"]
    assert order == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    back = [(op.microbatch, op.chunk) for op in first if op.kind == "backward"]
    assert back == [(0, 1), (1, 1), (0, 0), (1, 0), (2, 1), (3, 1), (2, 0), (3, 0)]


def test_interleaved_with_one_chunk_is_one_f_one_b():
    for ranks, microbatches in SIZES:
        once = plan(interleaved, ranks, microbatches, chunks=1)
        assert once == plan(one_f_one_b, ranks, microbatches)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: list(gpipe(0, 0, 2)), "ranks must be a whole number from 1 up, not 0"),
        (lambda: list(gpipe(0, 2, True)), "microbatches must be"),
        (lambda: list(gpipe(2, 2, 1)), "There is no rank 2: there are 0 to 1"),
        (lambda: list(interleaved(0, 4, 6)), "take 4 or 8"),
        (lambda: list(interleaved(0, 4, 3)), "take 4 or 8|take 4 or 4"),
        (lambda: list(interleaved(0, 2, 2, chunks=0)), "a rank has 1 or more"),
    ],
)
def test_wrong_numbers_get_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------- the published formulas


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubble_and_memory_are_those_of_the_formulas(p, m):
    def found(schedule, number=1, **options):
        events = simulate(plan(schedule, p, m, **options), EQUAL, number)
        return bubble(events, p), peak_activations(events, p)

    fill = (p - 1) / (m + p - 1)
    left = [min(m, p - rank) for rank in range(p)]
    assert found(one_by_one) == (pytest.approx((p - 1) / p), [1] * p)
    assert found(gpipe) == (pytest.approx(fill), [m] * p)
    assert found(one_f_one_b) == (pytest.approx(fill), left)
    idle, peak = found(zero_bubble)
    assert peak == [min(m, p)] * p
    if m >= p:
        assert idle == pytest.approx((p - 1) / (3 * m + p - 1))
    else:
        assert (p - 1) / (3 * m + p - 1) <= idle < max(fill, 1e-9)
    for v in (2, 3) if m % p == 0 else ():
        idle, peak = found(interleaved, v, chunks=v)
        assert idle == pytest.approx((p - 1) / (v * m + p - 1))
        assert peak == [min(v * m, 2 * (p - r - 1) + (v - 1) * p + 1) for r in range(p)]


# ---------------------------------------------------------------- what happens before what

seconds = st.floats(0.01, 5)


@given(
    schedule=st.sampled_from(PLAIN),
    p=st.integers(1, 8),
    m=st.integers(1, 12),
    costs=st.builds(Costs, forward=seconds, input=seconds, weight=seconds, latency=st.floats(0, 2)),
)
@settings(max_examples=80, deadline=None)
def test_nothing_begins_before_what_it_needs_has_come(schedule, p, m, costs):
    events = [e for e in simulate(plan(schedule, p, m), costs) if e.operation != "wait"]
    ends = {}
    for e in events:
        ends[pipeline.GIVES[e.operation], e.microbatch, e.layer] = e.stop
    for e in events:
        for need in needs(Operation(e.operation, e.microbatch), e.layer, p - 1):
            travels = costs.latency if need[2] != e.layer else 0.0
            assert e.start >= ends[need] + travels - 1e-9
    for rank in range(p):
        mine = sorted((e.start, e.stop) for e in events if e.rank == rank)
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(mine, mine[1:]))  # noqa: RUF007


@given(p=st.integers(1, 6), groups=st.integers(1, 4), v=st.integers(1, 3), latency=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_every_interleaved_schedule_runs_and_waits_are_counted(p, groups, v, latency):
    operations = plan(interleaved, p, p * groups, chunks=v)
    assert find_fault(operations, v) is None
    events = simulate(operations, Costs(latency=latency), v)
    for rank in range(p):
        mine = [e for e in events if e.rank == rank]
        assert sum(e.length for e in mine) == pytest.approx(max(e.stop for e in mine))


def test_unequal_stages_wait_for_the_slowest_one():
    costs = Costs(forward=(1.0, 3.0), input=(1.0, 3.0), weight=(0.0, 0.0))
    events = simulate(plan(gpipe, 2, 4), costs)
    assert max(e.stop for e in events) == 1 + 4 * 3 + 4 * 3 + 1


def test_a_message_takes_latency_and_bytes():
    costs = Costs(latency=0.5, byte_seconds=0.25, nbytes=2)
    events = simulate(plan(gpipe, 2, 1), costs)
    second = next(e for e in events if e.rank == 1 and e.operation == "forward")
    assert second.start == 1 + 0.5 + 0.25 * 2


# ---------------------------------------------------------------- faults, in words

FAULTS = [
    ([], "no operation at all"),
    ([[forward(0)]], "rank 0: micro-batch 0 has no backward"),
    ([[backward(0)]], "micro-batch 0 has no forward"),
    ([[backward(0), forward(0)]], "backward of micro-batch 0 comes before its forward"),
    ([[forward(0), forward(0), backward(0)]], "forward of micro-batch 0 is there twice"),
    ([[forward(1), backward(1)]], "micro-batch 0 has no forward"),
    ([[forward(0), Operation("input", 0)]], "has the input half .* not the weight half"),
    (
        [[forward(0), Operation("weight", 0), Operation("input", 0)]],
        "weight of micro-batch 0 comes before its input",
    ),
    ([[forward(0), backward(0), Operation("weight", 0)]], "take the whole or the two halves"),
    ([[forward(0), Operation("sideways", 0)]], "no operation 'sideways'"),
    ([[forward(0, 1), backward(0, 1)]], "of a chunk or micro-batch that does not exist"),
    (
        [[forward(0), backward(0), forward(1), backward(1)], [forward(1), backward(1)]],
        "rank 1: micro-batch 0 has no forward",
    ),
    (  # rank 1 wants micro-batch 1 first, rank 0 sends it only after the gradient of micro-batch 0
        [
            [forward(0), backward(0), forward(1), backward(1)],
            [forward(1), backward(1), forward(0), backward(0)],
        ],
        "wait for each other: rank 0 waits with its backward of micro-batch 0 for the gradient of "
        r"micro-batch 0 from stage 1 \(rank 1\); rank 1 waits with its forward of micro-batch 1",
    ),
]


@pytest.mark.parametrize(("operations", "words"), FAULTS)
def test_a_fault_is_found_before_it_runs_and_said_in_words(operations, words):
    fault = find_fault(operations)
    assert fault is not None and "\n" not in fault
    with pytest.raises(ValueError, match=f"This schedule cannot be run: .*{words}"):
        simulate(operations, EQUAL)


def test_a_schedule_of_the_reader_is_run_like_ours():
    def lifo(rank, ranks, microbatches):
        yield from map(forward, range(microbatches))
        yield from map(backward, reversed(range(microbatches)))

    events = simulate(plan(lifo, 3, 4), EQUAL)
    assert bubble(events, 3) >= (3 - 1) / (4 + 3 - 1)


# ---------------------------------------------------------------- small things


def test_no_dask_is_loaded_for_schedules_and_simulator():
    code = (
        "import sys, helpers.planner.pipeline, helpers.parallel.schedules; "
        "sys.exit('dask' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_module_of_parallel_gets_a_sentence():
    from helpers import parallel

    assert parallel.schedules is schedules
    with pytest.raises(AttributeError, match="has no 'moon': choose asynchronous, "):
        _ = parallel.moon


@pytest.mark.parametrize("module", [schedules, pipeline])
def test_the_examples_in_the_documentation_are_right(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed
