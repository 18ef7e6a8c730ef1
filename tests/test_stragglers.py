"""Steps that do not wait for the slowest: simulated by hand-checked rules, and really run."""

import doctest
import time
from itertools import pairwise

import numpy as np
import pytest

from helpers.cluster import open_cluster
from helpers.nn import SGD
from helpers.parallel import stragglers
from helpers.parallel.asynchronous import train_asynchronously
from helpers.parallel.stragglers import (
    BackupServer,
    simulate_bounded,
    simulate_synchronous,
    train_with_backup,
)


def random_seconds(steps=30, ranks=4, seed=0):
    return np.random.default_rng(seed).exponential(1.0, (steps, ranks))


def of(schedule, operation):
    return [event for event in schedule.events if event.operation == operation]


# ---------------------------------------------------------------- simulated: synchronous


def test_without_backup_each_step_takes_as_long_as_its_slowest_rank():
    seconds = random_seconds()
    schedule = simulate_synchronous(seconds)
    assert np.allclose(schedule.times, np.cumsum(seconds.max(axis=1)), rtol=1e-12)
    assert of(schedule, "dropped") == []
    assert len(of(schedule, "gradient")) == seconds.size


def test_computing_and_waiting_fill_all_time_without_overlap():
    for backup in range(4):
        schedule = simulate_synchronous(random_seconds(), backup)
        for rank in range(4):
            mine = [event for event in schedule.events if event.rank == rank]
            assert mine[0].start == 0
            assert mine[-1].stop == pytest.approx(schedule.times[-1])
            assert all(a.stop == pytest.approx(b.start) for a, b in pairwise(mine))


@pytest.mark.parametrize("backup", range(4))
def test_each_step_uses_as_many_gradients_as_it_waits_for(backup):
    schedule = simulate_synchronous(random_seconds(), backup)
    assert len(of(schedule, "gradient")) == 30 * (4 - backup)
    assert len(schedule.times) == 30
    assert np.all(np.diff(schedule.times) > 0)


def test_a_rank_that_comes_too_late_goes_on_with_the_step_of_the_others():
    seconds = [[1.0, 1.0, 2.5], [1.0, 1.0, 1.0], [1.0, 1.0, 0.25]]
    schedule = simulate_synchronous(seconds, backup=1)
    slow = [(e.operation, e.start, e.length) for e in schedule.events if e.rank == 2]
    # Dropped at 2.5 s, when the others are at step 2; there its gradient is the first to come.
    assert slow == [("dropped", 0.0, 2.5), ("gradient", 2.5, 0.25), ("wait", 2.75, 0.25)]
    assert schedule.times.tolist() == [1.0, 2.0, 3.0]


def test_more_backup_is_never_slower_in_the_first_step():
    seconds = random_seconds()
    first = [simulate_synchronous(seconds, backup).times[0] for backup in range(4)]
    assert first == sorted(seconds[0], reverse=True)


# ---------------------------------------------------------------- simulated: bounded


def test_with_bound_0_ranks_are_in_lockstep():
    seconds = random_seconds()
    bounded, together = simulate_bounded(seconds, 0), simulate_synchronous(seconds)
    assert np.allclose(bounded.times, together.times, rtol=1e-12)


def test_without_a_bound_nobody_waits():
    seconds = random_seconds()
    schedule = simulate_bounded(seconds)
    assert of(schedule, "wait") == []
    assert schedule.times[-1] == pytest.approx(seconds.sum(axis=0).max())


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_nobody_begins_a_step_too_far_ahead_of_the_slowest(bound):
    gradients = of(simulate_bounded(random_seconds(), bound), "gradient")
    for event in gradients:
        done = [
            sum(e.rank == rank and e.stop <= event.start + 1e-9 for e in gradients)
            for rank in range(4)
        ]
        assert done[event.rank] - min(done) <= bound


def test_a_wider_bound_is_never_slower_and_helps_against_random_delays():
    seconds = random_seconds(200)
    ends = [simulate_bounded(seconds, bound).times[-1] for bound in (0, 1, 2, 4, 8, None)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(ends))
    assert ends[-2] < 0.7 * ends[0]


def test_a_bound_does_not_help_when_one_rank_is_always_slow():
    seconds = np.ones((50, 4))
    seconds[:, 3] = 10
    assert simulate_bounded(seconds, 4).times[-1] == simulate_synchronous(seconds).times[-1] == 500
    assert simulate_synchronous(seconds, backup=1).times[-1] == 50


@pytest.mark.parametrize("ranks", [1, 5])
def test_no_step_takes_no_time(ranks):
    nothing = np.zeros((0, ranks))
    for schedule in (simulate_synchronous(nothing), simulate_bounded(nothing, 1)):
        assert schedule.events == []
        assert len(schedule.times) == 0


# ---------------------------------------------------------------- the server


def test_the_first_gradients_make_the_step_and_the_late_one_is_dropped():
    server = BackupServer(np.zeros(1), SGD(1.0), workers=3, backup=1)
    server.update(2, np.array([3.0]), 0)
    assert server.parameters.tolist() == [0.0]
    server.update(0, np.array([1.0]), 0)
    server.update(1, np.array([100.0]), 0)
    assert server.parameters.tolist() == [-2.0]
    assert server.used == [[0, 2]]
    assert server.dropped == [0, 1, 0]
    assert server.version == 1


def test_the_order_of_arrival_does_not_change_a_bit():
    random = np.random.default_rng(0)
    gradients = random.normal(size=(4, 50))
    found = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        server = BackupServer(np.zeros(50), SGD(0.3), workers=4)
        for worker in order:
            server.update(worker, gradients[worker], 0)
        found.append(server.parameters)
    assert all(np.array_equal(parameters, found[0]) for parameters in found)
    assert np.abs(found[0] + 0.3 * gradients.mean(axis=0)).max() < 1e-15


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: simulate_synchronous([1.0, 2.0]), "a table of finite numbers"),
        (lambda: simulate_bounded([[1.0, np.nan]]), "a table of finite numbers"),
        (lambda: simulate_bounded([[1.0, -1.0]]), "negative time"),
        (lambda: simulate_bounded([[1.0]], bound=-1), "bound must be"),
        (lambda: simulate_synchronous([[1.0, 2.0]], backup=2), "nobody is left to wait for"),
        (lambda: simulate_synchronous([[1.0, 2.0]], backup=0.5), "backup must be"),
        (lambda: BackupServer(np.zeros(1), SGD(1.0), 2, backup=2), "give 0 to 1"),
        (lambda: BackupServer(np.zeros(1), SGD(1.0), 2).update(0, np.ones(1), 1), "version 1"),
        (lambda: train_with_backup(None, None, None, None, 2, 5, backup=3), "nobody is left"),
        (lambda: train_with_backup(None, None, None, None, 2, -5), "steps must be"),
    ],
)
def test_wrong_use_gets_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- really run


@pytest.fixture(scope="module")
def client():
    with open_cluster(workers=2) as cluster:
        yield cluster.client


def begin(rank):
    """Worker k pulls towards k; the last one is slow."""
    pause = 0.06 if rank.index == rank.size - 1 else 0.01

    def gradient(parameters, step):
        time.sleep(pause)
        return parameters - rank.index

    return gradient


def test_without_backup_it_is_synchronous_training_of_all_workers(client):
    run = train_with_backup(client, begin, np.zeros(1), SGD(0.5), workers=3, steps=8)
    right = np.zeros(1)
    for _ in range(8):
        right -= 0.5 * np.mean([right - k for k in range(3)], axis=0)
    assert np.abs(run.report.parameters - right).max() < 1e-12
    assert run.report.used.tolist() == [[0, 1, 2]] * 8
    assert run.report.dropped.tolist() == [0, 0, 0]


def test_a_backup_worker_saves_the_time_and_costs_the_slow_workers_data(client):
    steps = 12
    slow = train_with_backup(client, begin, np.zeros(1), SGD(0.5), 3, steps)
    quick = train_with_backup(client, begin, np.zeros(1), SGD(0.5), 3, steps, backup=1)
    assert slow.seconds > steps * 0.06
    assert quick.seconds < 0.7 * slow.seconds
    assert np.bincount(quick.report.used.ravel(), minlength=3)[2] < steps / 2
    assert quick.report.dropped[2] >= 1
    assert slow.report.parameters[0] == pytest.approx(1.0, abs=0.01)
    assert quick.report.parameters[0] < 0.9


def test_asynchronous_workers_do_not_wait_for_a_slow_one(client):
    slow = train_asynchronously(client, begin, np.zeros(1), SGD(0.05), 3, updates=36, bound=0)
    quick = train_asynchronously(client, begin, np.zeros(1), SGD(0.05), 3, updates=36)
    assert quick.seconds < 0.7 * slow.seconds


def test_the_examples_in_its_documentation_are_right():
    result = doctest.testmod(stragglers)
    assert result.attempted > 0
    assert result.failed == 0
