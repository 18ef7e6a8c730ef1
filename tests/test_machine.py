"""Predicted times: limits that are known, and published runs."""

import doctest
import math
from dataclasses import replace

import pytest

from helpers.nn import GPT
from helpers.parallel.schedules import gpipe, interleaved
from helpers.planner import machine
from helpers.planner.layout import Layout
from helpers.planner.machine import (
    A100,
    Link,
    Machine,
    block_operations,
    fit,
    placed,
    step_time,
    token_time,
    tokens_a_second,
)

SMALL = GPT(vocabulary=40, context=32, width=64, heads=4, layers=8)
PLAIN = Machine(speed=1e9)


def headless(gpt):
    """Operations of a step without the head."""
    return gpt.layers * block_operations(gpt, 32)


# ---------------------------------------------------------------- a training step


def test_without_messages_data_and_tensor_ranks_divide_the_time():
    one = step_time(SMALL, Layout(), PLAIN, 64, 32).seconds
    right = 3 * 64 * 32 * (headless(SMALL) + 2 * 64 * 40) / 1e9
    assert math.isclose(one, right)
    for layout in (Layout(data=4), Layout(tensor=4), Layout(data=2, tensor=2)):
        assert math.isclose(step_time(SMALL, layout, PLAIN, 64, 32).seconds, one / 4)


@pytest.mark.parametrize(("chunks", "microbatches"), [(1, 4), (1, 16), (2, 4), (2, 8)])
def test_the_bubble_is_the_published_one(chunks, microbatches):
    gpt = replace(SMALL, vocabulary=1)  # a head that takes next to nothing: equal stages
    schedule = interleaved if chunks > 1 else gpipe
    layout = Layout(pipeline=4, microbatches=microbatches, chunks=chunks, schedule=schedule)
    ideal = step_time(gpt, Layout(), PLAIN, 64, 32).seconds / 4
    found = step_time(gpt, layout, PLAIN, 64, 32).seconds
    assert math.isclose(found / ideal - 1, 3 / (chunks * microbatches), rel_tol=0.01)


def test_recomputing_all_takes_a_third_more_and_overhead_counts_blocks():
    plain = step_time(SMALL, Layout(), PLAIN, 64, 32).seconds
    again = step_time(SMALL, Layout(recompute="full"), PLAIN, 64, 32).seconds
    blocks = 64 * 32 * headless(SMALL) / 1e9
    assert math.isclose(again - plain, blocks)
    slow = step_time(SMALL, Layout(), replace(PLAIN, overhead=0.5), 64, 32).seconds
    assert math.isclose(slow - plain, 3 * 8 * 0.5)


def test_each_wire_costs_where_its_axis_sends():
    nbytes, base = 64 * 32 * 64 * 8, step_time(SMALL, Layout(tensor=2), PLAIN, 64, 32).seconds
    wired = replace(PLAIN, tensor=Link(1e-3, 1e6))
    found = step_time(SMALL, Layout(tensor=2), wired, 64, 32).seconds
    # Four all-reduces a block, and one each for embedding, head and its gradient.
    assert math.isclose(found - base, (4 * 8 + 3) * (2e-3 + nbytes / 1e6), rel_tol=0.03)
    wired = replace(PLAIN, data=Link(1e-3, 1e6))
    found = step_time(SMALL, Layout(data=2), wired, 64, 32)
    assert math.isclose(found.exchange, 2e-3 + 8 * SMALL.size / 1e6)
    assert math.isclose(found.seconds, found.schedule + found.exchange)


def test_fewer_cores_than_ranks_share_the_work():
    layout = Layout(2, 2, 2, microbatches=8)
    free = step_time(SMALL, layout, PLAIN, 64, 32).seconds
    shared = step_time(SMALL, layout, replace(PLAIN, cores=2), 64, 32).seconds
    assert math.isclose(shared, step_time(SMALL, Layout(), PLAIN, 64, 32).seconds / 2)
    assert free < shared
    assert math.isclose(tokens_a_second(SMALL, layout, PLAIN, 64, 32), 64 * 32 / free)


def test_zero_divides_the_update():
    slow = replace(PLAIN, memory_bandwidth=1e6)
    plain, cut = (step_time(SMALL, Layout(data=2, zero=z), slow, 64, 32).update for z in (0, 1))
    assert math.isclose(plain, 7 * 8 * SMALL.size / 1e6) and math.isclose(cut, plain / 2)


# Table 1 of Narayanan et al. 2021: layers, hidden, heads, tensor, pipeline, GPUs, batch, TFLOP/s a
# GPU. Full recomputation; the micro-batch is not published, and taken as one sequence.
PUBLISHED = {
    "3.6B": (30, 3072, 32, 2, 1, 64, 512, 138),
    "7.5B": (36, 4096, 32, 4, 1, 128, 512, 142),
    "18B": (40, 6144, 48, 8, 1, 256, 1024, 135),
    "39B": (48, 8192, 64, 8, 2, 512, 1536, 138),
    "76B": (60, 10240, 80, 8, 4, 1024, 1792, 140),
    "310B": (96, 16384, 128, 8, 16, 1920, 2160, 155),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_are_predicted_within_a_sixth(name):
    layers, width, heads, tensor, pipeline, ranks, batch, published = PUBLISHED[name]
    gpt, data = GPT(51_200, 2048, width, heads, layers), ranks // tensor // pipeline
    layout = Layout(data, tensor, pipeline, microbatches=batch // data, recompute="full")
    seconds = step_time(gpt, layout, A100, batch, 2048).seconds
    # Their equation 3, which counts the second forward pass.
    whole = 96 * batch * 2048 * layers * width**2
    operations = whole * (1 + 2048 / 6 / width + 51_200 / 16 / layers / width)
    assert abs(operations / seconds / ranks / 1e12 / published - 1) < 1 / 6


def test_tensor_ranks_belong_inside_of_a_node():
    gpt, layout = GPT(51_200, 2048, 10_240, 80, 60), Layout(32, 8, 4, 56, recompute="full")
    seconds = {}
    for first in ("tensor", "pipeline", "data"):
        order = [first, *(axis for axis in ("tensor", "pipeline", "data") if axis != first)]
        there = placed(A100, layout, order, A100.tensor, A100.data)
        assert (there.tensor == A100.tensor) == (first == "tensor")
        seconds[first] = step_time(gpt, layout, there, 1792, 2048).seconds
    assert seconds["tensor"] < 0.7 * min(seconds["pipeline"], seconds["data"])


# ---------------------------------------------------------------- generation


LARGE = GPT(vocabulary=50_000, context=2048, width=4096, heads=32, layers=32)


def test_a_rank_that_reads_its_weights_takes_as_long_for_many_texts():
    one, many = (token_time(LARGE, Layout(), A100, n, length=0) for n in (1, 64))
    weights = 2 * (32 * 12 * 4096**2 + 50_000 * 4096)
    assert math.isclose(one.latency, weights / 2039e9, rel_tol=1e-6)
    assert many.latency < 1.001 * one.latency and many.throughput > 63 * one.throughput
    most = token_time(LARGE, Layout(), A100, 4096, length=0)
    assert most.latency > 5 * one.latency  # then computing takes longer than reading


def test_a_long_text_must_read_its_cache():
    short, long = (token_time(LARGE, Layout(), A100, 32, length=n).latency for n in (0, 2000))
    cache = 32 * 32 * 2 * 2000 * 4096 * 2
    assert math.isclose(long - short, cache / 2039e9, rel_tol=1e-6)


def test_tensor_ranks_shorten_the_latency_and_pipeline_ranks_only_the_queue():
    alone = token_time(LARGE, Layout(), A100, 8, 0)
    tensor = token_time(LARGE, Layout(tensor=8), A100, 8, 0)
    pipeline = token_time(LARGE, Layout(pipeline=8), A100, 8, 0)
    data = token_time(LARGE, Layout(data=8), A100, 8, 0)
    assert tensor.latency < 0.6 * alone.latency
    assert pipeline.latency >= alone.latency and data.latency <= alone.latency
    assert math.isclose(data.throughput, 8 / data.latency)


def test_generation_shares_cores_too():
    slow = Machine(speed=1e9, cores=2)
    one = token_time(SMALL, Layout(), slow, 8, 0).latency
    assert math.isclose(token_time(SMALL, Layout(2, 2, 2), slow, 8, 0).latency, one / 2)


# ---------------------------------------------------------------- fitted


def test_speed_and_overhead_are_found_again():
    points = [(8, n, 8 * 1e-4 + n / 3e9) for n in (1e6, 1e7, 1e8)]
    speed, overhead = fit(points)
    assert math.isclose(speed, 3e9, rel_tol=1e-6) and math.isclose(overhead, 1e-4, rel_tol=1e-6)
    with pytest.raises(ValueError, match="One point does not tell speed and overhead apart"):
        fit(points[:1])


def test_a_disturbed_clock_gives_no_negative_speed_or_overhead():
    for points in ([(1, 100, 4.0), (1, 200, 2.0)], [(1, 100, 1.0), (1, 200, 4.0)]):
        speed, overhead = fit(points)
        assert overhead == 0 and 25 <= speed <= 100  # between the two points' own


def test_examples():
    found = doctest.testmod(machine)
    assert found.attempted and not found.failed
