"""Gradients that come late: staleness is counted right, bounds hold, replays repeat to the bit."""

import asyncio
import doctest
import time

import numpy as np
import pytest

from helpers.cluster import open_cluster
from helpers.engine.errors import RankError
from helpers.nn import SGD, Adam
from helpers.parallel import asynchronous
from helpers.parallel.asynchronous import (
    ParameterServer,
    replay,
    stale_sgd,
    train_asynchronously,
)

TARGET = np.array([1.0, -2.0, 3.0])


def slope(parameters, step):
    """The gradient of the squared distance to the target, which changes a little each step."""
    return 2 * (parameters - TARGET) + 0.01 * np.cos(step)


def serial(optimiser, steps):
    parameters = np.zeros(3)
    state = optimiser.start(3)
    for step in range(steps):
        optimiser.step(parameters, slope(parameters, step), state)
    return parameters


# ---------------------------------------------------------------- replays


@pytest.mark.parametrize("optimiser", [SGD(0.1), SGD(0.05, 0.9), Adam(0.1)])
def test_without_delay_it_is_serial_training_to_the_last_bit(optimiser):
    right = serial(optimiser, 20)
    assert np.array_equal(stale_sgd(slope, np.zeros(3), optimiser, 20, delay=0), right)
    assert np.array_equal(replay(slope, np.zeros(3), optimiser, [0] * 20).parameters, right)


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("delay", [0, 1, 2, 7])
def test_workers_that_take_turns_make_a_fixed_delay(delay, damped):
    order = [step % (delay + 1) for step in range(30)]
    optimiser = SGD(0.02, 0.5)
    report = replay(slope, np.zeros(3), optimiser, order, damped)
    delayed = stale_sgd(slope, np.zeros(3), optimiser, 30, delay, damped)
    assert np.array_equal(report.parameters, delayed)
    assert report.staleness.tolist() == [min(step, delay) for step in range(30)]
    assert report.workers.tolist() == order


def test_staleness_is_counted_in_a_scripted_order():
    order = [0, 0, 1, 2, 0, 1, 1]
    report = replay(slope, np.zeros(3), SGD(0.1), order)
    # By hand: updates by others since this worker's own last one, or since the start.
    assert report.staleness.tolist() == [0, 0, 2, 3, 2, 2, 0]
    assert report.lead == 2


def test_each_gradient_is_computed_where_the_worker_last_looked():
    seen = []

    def note(parameters, step):
        seen.append(parameters[0])
        return np.array([1.0])

    replay(note, np.zeros(1), SGD(1.0), [0, 1, 1, 0])
    assert seen == [0.0, 0.0, -2.0, -1.0]


def test_a_damped_step_is_divided_by_one_plus_the_staleness():
    server = ParameterServer(np.zeros(1), SGD(6.0), workers=3, damped=True)
    moves = []
    for worker in range(3):
        before = server.parameters[0]
        server.update(worker, np.ones(1), version=0)
        moves.append(before - server.parameters[0])
    assert moves == [6.0, 3.0, 2.0]


def test_a_large_delay_diverges_and_the_smaller_rate_repairs_it():
    def far(delay, damped):
        return np.abs(stale_sgd(slope, np.zeros(3), SGD(0.3), 200, delay, damped) - TARGET).max()

    assert far(0, damped=False) < 0.02
    assert far(8, damped=False) > 1e3
    assert far(8, damped=True) < 0.1


def test_divergence_ends_in_numbers_that_are_not_finite_and_without_a_warning():
    def steep(parameters, step):
        return 2 * parameters

    wild = stale_sgd(steep, np.ones(3, np.float32), SGD(9.0), 200, delay=3)
    assert not np.isfinite(wild).any()
    assert wild.dtype == np.float32


def test_parameters_that_are_passed_in_are_left_alone():
    start = np.zeros(3)
    stale_sgd(slope, start, SGD(0.1), 5, delay=1)
    replay(slope, start, SGD(0.1), [0, 1])
    assert np.array_equal(start, np.zeros(3))


# ---------------------------------------------------------------- the server


def test_a_worker_too_far_ahead_is_told_to_ask_again_until_the_slowest_has_moved(monkeypatch):
    monkeypatch.setattr(asynchronous, "WAIT_SECONDS", 0.02)
    server = ParameterServer(np.zeros(1), SGD(0.1), workers=2, bound=1)

    async def script():
        one = np.ones(1)
        first = await server.push(0, one, 0)
        held = await server.push(0, one, 1)
        again = asyncio.create_task(server.pull(0))
        await asyncio.sleep(0)
        other = await server.push(1, one, 0)
        return first, held, await again, other

    first, held, again, other = asyncio.run(script())
    assert first[0] == 1
    assert held is None
    assert again[0] == other[0] == 3
    assert server.lead == 2


def test_after_the_last_update_nothing_changes_and_everybody_is_sent_home():
    server = ParameterServer(np.zeros(1), SGD(1.0), workers=2, updates=1)

    async def script():
        return await server.push(0, np.ones(1), 0), await server.push(1, np.ones(1), 0)

    assert asyncio.run(script()) == ((1, None), (1, None))
    report = asyncio.run(server.report())
    assert report.parameters.tolist() == [-1.0]
    assert report.workers.tolist() == [0]


def test_the_server_hands_out_copies():
    server = ParameterServer(np.zeros(2), SGD(1.0), workers=1)
    _, parameters = asyncio.run(server.pull(0))
    parameters += 5
    assert server.parameters.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ParameterServer(np.zeros(1), SGD(1.0), workers=0), "workers must be"),
        (lambda: ParameterServer(np.zeros(1), SGD(1.0), 1, bound=-1), "bound must be"),
        (lambda: ParameterServer(np.zeros(1), SGD(1.0), 1, updates=2.5), "updates must be"),
        (lambda: stale_sgd(slope, np.zeros(3), SGD(1.0), steps=-1, delay=0), "steps must be"),
        (lambda: stale_sgd(slope, np.zeros(3), SGD(1.0), steps=1, delay=True), "delay must be"),
        (lambda: replay(slope, np.zeros(3), SGD(1.0), [0, -1]), "There is no worker -1"),
        (lambda: server().update(2, np.zeros(3), 0), "they are 0 to 1"),
        (lambda: server().update(0, np.zeros(3), 1), "version 1 does not exist"),
        (lambda: server().update(0, np.zeros(4), 0), "same length"),
        (lambda: train_asynchronously(None, None, None, None, 0, 5), "workers must be"),
        (lambda: train_asynchronously(None, None, None, None, 2, -1), "updates must be"),
    ],
)
def test_wrong_use_gets_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def server():
    return ParameterServer(np.zeros(3), SGD(1.0), workers=2)


# ---------------------------------------------------------------- really run


@pytest.fixture(scope="module")
def client():
    with open_cluster(workers=2) as cluster:
        yield cluster.client


def begin(rank):
    """The same data on each worker; the last one is slow."""
    pause = 0.02 if rank.index == rank.size - 1 else 0.002

    def gradient(parameters, step):
        time.sleep(pause)
        return 2 * (parameters - np.array([1.0, -2.0, 3.0]))

    return gradient


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_an_actor_train_together(client, workers):
    run = train_asynchronously(client, begin, np.zeros(3), SGD(0.05), workers, updates=60)
    report = run.report
    assert np.abs(report.parameters - TARGET).max() < 0.1
    assert len(report.staleness) == len(report.workers) == 60
    assert set(report.workers.tolist()) == set(range(workers))
    assert 0 <= report.staleness.mean() <= 2 * workers
    assert {event.operation for event in run.events} == {"gradient", "server"}
    assert run.events[0].start == 0
    assert run.seconds == pytest.approx(max(event.stop for event in run.events))


def test_the_staleness_of_each_update_is_what_the_order_of_updates_says(client):
    report = train_asynchronously(client, begin, np.zeros(3), SGD(0.05), 4, updates=50).report
    again = replay(slope, np.zeros(3), SGD(0.05), report.workers)
    assert report.staleness.tolist() == again.staleness.tolist()


def test_a_bound_holds_with_a_slow_worker_and_without_one_it_is_exceeded(client):
    free = train_asynchronously(client, begin, np.zeros(3), SGD(0.05), 2, updates=60).report
    held = train_asynchronously(client, begin, np.zeros(3), SGD(0.05), 2, 60, bound=2).report
    assert held.lead <= 3  # a worker waits after the step that brought it beyond the bound
    assert free.lead > 3
    slow_of_free, slow_of_held = (np.mean(report.workers == 1) for report in (free, held))
    assert slow_of_held > slow_of_free


def fails(rank):
    def gradient(parameters, step):
        if rank.index == 1 and step == 3:
            raise ZeroDivisionError("no such row")
        return np.zeros(3)

    return gradient


def test_a_worker_that_fails_ends_the_others_who_wait_for_it(client):
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2: ZeroDivisionError: no such row"):
        train_asynchronously(client, fails, np.zeros(3), SGD(0.05), 2, updates=500, bound=0)
    assert time.monotonic() - began < 10
    report = train_asynchronously(client, begin, np.zeros(3), SGD(0.05), 2, updates=4).report
    assert len(report.workers) == 4


def test_no_update_at_all_is_a_run_too(client):
    run = train_asynchronously(client, begin, np.ones(3), SGD(0.05), 2, updates=0)
    assert run.report.parameters.tolist() == [1.0, 1.0, 1.0]
    assert run.report.staleness.tolist() == []


def test_the_examples_in_its_documentation_are_right():
    result = doctest.testmod(asynchronous)
    assert result.attempted > 0
    assert result.failed == 0
