"""Costs of a pipeline fitted to events, timelines put together, and layers dealt out to stages."""

import doctest
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.engine import spmd
from helpers.engine.events import Event
from helpers.engine.mesh import Mesh
from helpers.nn import GPT
from helpers.parallel.pipeline import run_schedule
from helpers.parallel.schedules import (
    gpipe,
    interleaved,
    one_by_one,
    one_f_one_b,
    plan,
    zero_bubble,
)
from helpers.parallel.stage import GPTStage, Parts, deal
from helpers.planner import costs, stages, timelines
from helpers.planner.costs import message_times
from helpers.planner.pipeline import (
    Costs,
    activation_bytes,
    assemble,
    balance,
    bubble,
    fit,
    kept_numbers,
    peak_activations,
    quickest_step,
    simulate,
    step_of,
    step_seconds,
    typical_step,
    with_recomputation,
)

seconds = st.floats(0.5, 5)


def repeated(events, times, pause=0.5):
    """The same step several times over, one after the other."""
    whole = step_seconds(events) + pause
    return [replace(e, start=e.start + 3 + n * whole) for n in range(times) for e in events]


# ---------------------------------------------------------------- fit


@given(
    schedule=st.sampled_from([one_by_one, gpipe, one_f_one_b]),
    p=st.integers(2, 5),
    m=st.integers(2, 6),
    forward=st.lists(seconds, min_size=5, max_size=5),
    backward=st.lists(seconds, min_size=5, max_size=5),
    latency=st.floats(0, 0.3),
    steps=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_costs_come_back_out_of_the_events_that_they_made(
    schedule, p, m, forward, backward, latency, steps
):
    true = Costs(forward=forward, backward=backward, latency=latency, nbytes=800)
    events = repeated(simulate(plan(schedule, p, m), true), steps)
    found = fit(events)
    assert found.forward == pytest.approx(forward[:p])
    assert found.backward == pytest.approx(backward[:p])
    assert found.latency == pytest.approx(latency, abs=1e-9)
    assert found.nbytes == 800


def test_halves_are_fitted_each_for_itself_and_what_did_not_occur_has_no_time():
    true = Costs(forward=1.0, input=2.0, weight=0.5)
    found = fit(simulate(plan(zero_bubble, 2, 3), true))
    assert (found.input, found.weight, found.backward) == ((2.0, 2.0), (0.5, 0.5), None)
    assert found.seconds("backward", 1) == 2.5
    whole = fit(simulate(plan(gpipe, 2, 3), true))
    assert whole.backward == (2.5, 2.5) and whole.input != whole.input  # not a number


def test_a_kind_that_does_not_occur_is_taken_from_another_run():
    whole = simulate(plan(gpipe, 2, 3), Costs(forward=1.0, backward=2.0))
    halves = simulate(plan(zero_bubble, 2, 3), Costs(forward=9.0, input=0.5, weight=0.25))
    found = fit(whole, halves)
    assert (found.forward, found.backward) == ((1.0, 1.0), (2.0, 2.0))
    assert (found.input, found.weight) == ((0.5, 0.5), (0.25, 0.25))


def test_several_chunks_are_several_stages():
    true = Costs(forward=(1.0, 2.0, 3.0, 4.0), input=0.0, weight=1.0)
    assert fit(simulate(plan(interleaved, 2, 2), true, chunks=2)).forward == true.forward


def test_two_sizes_of_messages_tell_latency_and_bandwidth_apart():
    def run(nbytes):
        true = Costs(latency=0.25, byte_seconds=0.001, nbytes=nbytes)
        return simulate(plan(one_f_one_b, 3, 6), true)

    alone, found = fit(run(100)), fit(run(100), run(300))
    assert (alone.latency, alone.byte_seconds) == (pytest.approx(0.35), 0)
    assert (found.latency, found.byte_seconds) == (pytest.approx(0.25), pytest.approx(0.001))
    assert alone.transfer == pytest.approx(found.transfer) and found.nbytes == 100


def test_one_hiccup_changes_nothing():
    events = simulate(plan(gpipe, 2, 9), Costs(forward=1.0, backward=2.0, latency=0.25))
    slow = [replace(e, length=50.0) if e.microbatch == 4 else e for e in events]
    assert fit(slow).forward == (1.0, 1.0) and fit(slow).backward == (2.0, 2.0)


def test_a_message_that_nobody_waited_for_is_not_timed():
    """Rank 1 is slow: what comes to it lies there, and says nothing about the connection."""
    events = simulate(plan(gpipe, 2, 5), Costs(forward=(1.0, 9.0), backward=1.0, latency=0.25))
    to_second = [e for e in events if e.operation == "forward" and e.rank == 1]
    assert len(to_second) == 5
    (first, back) = message_times(events)
    assert (first, back) == ((0, pytest.approx(0.25)), (0, pytest.approx(0.25)))


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "No event is an operation of a schedule: forward"),
        ([Event(0, "wait", 0, 1)], "No event is an operation"),
        ([Event(0, "forward", 0.5, 1)], "forward at 0.5 s has no stage or no micro-batch"),
    ],
)
def test_events_of_no_schedule_are_refused(events, words):
    for use in (fit, step_seconds, step_of, lambda e: bubble(e, 1)):
        with pytest.raises(ValueError, match=words):
            use(events)


# ---------------------------------------------------------------- one step of several


def test_one_step_of_several_is_taken_out_with_what_happened_meanwhile():
    once = simulate(plan(one_f_one_b, 3, 4), Costs(latency=0.5))
    for number in (0, 1, -1):
        step = step_of(repeated(once, 3), number)
        assert [e.operation for e in step] == [e.operation for e in once]
        assert [e.start for e in step] == pytest.approx([e.start for e in once])
        assert bubble(step, 3) == pytest.approx(bubble(once, 3))


def test_of_the_steps_that_count_the_typical_one_is_in_the_middle_the_quickest_first():
    events, begin = [], 0.0
    for length in (90.0, 1.0, 8.0, 3.0):  # the first one does not count
        events += [
            replace(e, start=e.start + begin)
            for e in simulate(plan(gpipe, 2, 2), Costs(forward=length, backward=1.0))
        ]
        begin += 1000
    assert step_seconds(typical_step(events)) == 3 * 3 + 3
    assert step_seconds(quickest_step(events)) == 3 * 1 + 3
    assert step_seconds(quickest_step(events, warm_up=2)) == 3 * 3 + 3
    with pytest.raises(ValueError, match="no step after 4 of warm-up: take more steps"):
        typical_step(events, warm_up=4)


def test_waiting_is_cut_to_the_step():
    events = [
        Event(0, "forward", 5.0, 1.0, layer=0, microbatch=0),
        Event(1, "wait", 1.0, 5.0),
        Event(1, "forward", 6.0, 1.0, layer=1, microbatch=0),
        Event(1, "wait", 7.0, 9.0),
    ]
    waits = [(e.start, e.length) for e in step_of(events) if e.operation == "wait"]
    assert waits == [(0.0, 1.0)]


# ---------------------------------------------------------------- assemble


@given(
    schedule=st.sampled_from([gpipe, one_f_one_b, zero_bubble]),
    p=st.integers(1, 5),
    m=st.integers(1, 6),
    lengths=st.lists(seconds, min_size=15, max_size=15),
    latency=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_operations_timed_in_turns_make_the_timeline_of_ranks_with_cores(
    schedule, p, m, lengths, latency
):
    true = Costs(*(tuple(lengths[5 * n : 5 * n + 5]) for n in range(3)), latency=latency)
    operations = plan(schedule, p, m)
    expected = simulate(operations, true)
    work = [e for e in expected if e.operation != "wait"]
    in_turns = [replace(e, start=10.0 * n) for n, e in enumerate(work)]  # one at a time
    assert assemble(operations, in_turns, Costs(latency=latency)) == expected


def test_of_several_steps_the_median_of_each_operation_counts():
    operations = plan(gpipe, 1, 1)
    events = [
        Event(0, kind, float(n), length, layer=0, microbatch=0)
        for kind in ("forward", "backward")
        for n, length in enumerate((1.0, 2.0, 90.0))
    ]
    assert step_seconds(assemble(operations, events, Costs())) == 4.0


def test_an_operation_that_was_not_timed_is_named():
    operations = plan(gpipe, 2, 2)
    events = [e for e in simulate(operations, Costs()) if (e.rank, e.microbatch) != (1, 1)]
    with pytest.raises(ValueError, match="rank 1: forward of micro-batch 1 is not among"):
        assemble(operations, events, Costs())
    with pytest.raises(ValueError, match=r"cannot be run: rank 0: micro-batch 0 has no backward"):
        assemble([operations[0][:1]], events, Costs())


# ---------------------------------------------------------------- balance


def slowest(layers, cuts):
    return max(sum(layers[a:b]) for a, b in pairwise(cuts))


@given(layers=st.lists(st.sampled_from([0, 1, 2, 3, 7]) | st.floats(0, 9), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_no_other_way_to_cut_has_a_quicker_slowest_stage(layers):
    for number in range(1, len(layers) + 1):
        found = balance(layers, number)
        assert found[0] == 0 and found[-1] == len(layers) and len(found) == number + 1
        assert all(a < b for a, b in pairwise(found))
        inside = combinations(range(1, len(layers)), number - 1)
        best = min(slowest(layers, (0, *cuts, len(layers))) for cuts in inside)
        assert slowest(layers, found) == pytest.approx(best)


@pytest.mark.parametrize(
    ("layers", "number", "words"),
    [
        ([1, 1], 3, "2 layers do not make 3 stages: take 1 to 2"),
        ([1, 1], 0, "take 1 to 2"),
        ([1, -1], 1, "finite numbers from 0 up"),
        ([float("nan")], 1, "finite numbers"),
        ([float("inf"), 1], 1, "finite numbers"),
    ],
)
def test_what_cannot_be_cut_is_refused(layers, number, words):
    with pytest.raises(ValueError, match=words):
        balance(layers, number)


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
def test_the_bytes_that_stages_keep_are_those_of_the_formula(schedule, recompute):
    gpt = GPT(vocabulary=7, context=6, width=8, heads=2, layers=4)
    operations, tokens = plan(schedule, 2, 5), [np.zeros((3, 6), int)] * 5
    peaks = peak_activations(simulate(operations, Costs()), 2)

    def program(rank):
        parts = Parts(gpt, deal(gpt, 2)[rank.index])
        stage = GPTStage(parts, np.zeros(parts.size), np.zeros(parts.size), recompute=recompute)
        stage.start(tokens, tokens, divisor=90)
        run_schedule(rank.pipeline, operations, [stage])
        return stage.activation_bytes

    for rank, found in enumerate(spmd.run(None, Mesh(pipeline=2), program).results):
        shape = dict(blocks=2, positions=18, width=8, length=6, heads=2, recompute=recompute)
        assert found == activation_bytes(peaks[rank], vocabulary=7 * rank, **shape)


def test_an_unknown_way_to_recompute_is_refused():
    with pytest.raises(ValueError, match="recompute is 'half': choose one of none, selective"):
        kept_numbers(8, 6, 2, "half")


def test_what_is_computed_again_makes_the_backward_pass_longer():
    halves = Costs(forward=(1.0, 2.0), input=1.0, weight=1.0)
    again = with_recomputation(halves, halves.forward)
    assert again.seconds("input", 1) == 3.0 and again.seconds("backward", 1) == 4.0
    assert again.weight == halves.weight and again.forward == halves.forward
    whole = with_recomputation(Costs(forward=1.0, backward=(2.0, 4.0)), 0.5)
    assert whole.backward == (2.5, 4.5)


@pytest.mark.parametrize("module", [costs, stages, timelines])
def test_the_examples_in_the_documentation_are_right(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed
