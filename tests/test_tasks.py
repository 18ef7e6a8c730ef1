"""Tasks on real workers and on a made-up client: each result once, whatever happens on the way."""

import asyncio
import ctypes
import doctest
import os
import signal
import sys
import threading
import time
from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import dask
import numpy as np
import pytest
from distributed import as_completed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.cluster import open_cluster
from helpers.parallel import ledger, runners, tasks
from helpers.parallel.ledger import Done, Ledger
from helpers.parallel.search import Job, asha, best_of, draw, run_serially, successive_halving
from helpers.parallel.tasks import run_search, run_tasks


@pytest.fixture(scope="module")
def cluster():
    with open_cluster(workers=2) as cluster:
        yield cluster


@pytest.fixture
def mortal():
    """Workers that may die: new ones for each test."""
    with open_cluster(workers=2) as cluster:
        yield cluster


def values(done):
    """Values by number; fails when a number comes twice."""
    done = list(done)
    assert max(Counter(d.number for d in done).values(), default=1) == 1
    return {d.number: d.value for d in done}


def square(x):
    return x * x


def nap(seconds):
    time.sleep(seconds)
    return seconds


def first_time(flag):
    """True for the first process that asks; a file remembers it."""
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


# ---------------------------------------------------------------- the ledger


def test_the_first_come_is_dealt_out_first_and_priority_before_that():
    book = Ledger(batch=2)
    for number, priority in enumerate([0, 0, 1, 0, 1]):
        book.add(number, (number,), priority)
    batches = []
    while taken := book.take(workers=1):
        batches.append([arguments[0] for arguments in taken[1]])
    assert batches == [[2, 4], [0, 1], [3]] and book.waiting == 0 and len(book) == 5


def test_a_task_that_fails_is_tried_again_until_its_retries_are_used_up():
    book = Ledger(retries=2)
    book.add("a", ())
    for attempt in (1, 2):
        ticket, _ = book.take(1)
        assert book.settle(ticket, [(None, f"no {attempt}", 0.0)]) == []
    ticket, _ = book.take(1)
    assert book.settle(ticket, [(None, "no 3", 0.5)]) == [Done("a", None, "no 3", 3, 0.5)]
    assert len(book) == 0 and book.take(1) is None


def test_a_batch_that_is_given_back_goes_first_and_has_not_failed():
    book = Ledger(retries=0, batch=2)
    for number in range(4):
        book.add(number, (number,))
    ticket, _ = book.take(1)
    book.give_back(ticket)
    assert book.settle(ticket, [(0, None, 0), (1, None, 0)]) == []  # it comes too late
    ticket, batch = book.take(1)
    assert batch == [(0,), (1,)]
    assert [d.attempts for d in book.settle(ticket, [(0, None, 0), (1, None, 0)])] == [1, 1]


def test_a_task_that_does_harm_has_failed_and_the_others_of_its_batch_wait_again():
    book = Ledger(retries=1, batch=3)
    for number in range(5):
        book.add(number, (number,))
    ticket, _ = book.take(1)
    assert book.blame(ticket, 1, "it hung") == [] == book.blame(ticket, 1, "it hung")
    batches = []
    while taken := book.take(1):
        batches.append([number for (number,) in taken[1]])
    assert batches == [[0, 2, 3], [4, 1]]
    assert book.blame(1, 0, "it hung") == []  # task 0 for the first time
    [over] = book.blame(2, 1, "it hung")  # task 1 for the second
    assert (over.number, over.error, over.attempts) == (1, "it hung", 2)


def test_the_ledger_refuses_what_is_impossible():
    with pytest.raises(ValueError, match="retries is -1"):
        Ledger(retries=-1)
    with pytest.raises(ValueError, match='or "guided"'):
        Ledger(batch="many")
    with pytest.raises(ValueError, match="the priority NaN"):
        Ledger().add(1, (), float("nan"))
    book = Ledger()
    book.add(1, ())
    with pytest.raises(ValueError, match="task 1 is there already"):
        book.add(1, ())


def test_a_task_may_lose_four_workers_and_innocent_ones_of_its_batch_none():
    book = Ledger(retries=0, batch=3)
    for number in range(4):
        book.add(number, (number,))
    ticket, _ = book.take(1)
    assert book.lose(ticket, "gone") == [] == book.lose(ticket, "gone")
    order = [book.take(1) for _ in range(4)]
    assert [batch for _, batch in order] == [[(3,)], [(0,)], [(1,)], [(2,)]]  # alone, and last
    (_, _), (first, _), (second, _), (third, _) = order
    assert [d.value for d in book.settle(first, [("a", None, 0)])] == ["a"]
    assert [d.value for d in book.settle(third, [("c", None, 0)])] == ["c"]
    for _ in range(3):
        assert book.lose(second, "gone") == []
        second, _ = book.take(1)
    words = "it was lost with 4 workers: gone"
    assert book.lose(second, "gone") == [Done(1, None, words, 1)]


EVENTS = ["take", "settle", "fail", "give back", "lose", "blame"]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 2), st.data())
def test_in_any_order_of_events_each_task_is_over_once(n, batch, retries, data):
    book, over, tickets = Ledger(retries, batch), [], []
    for number in range(n):
        book.add(number, (number,))
    for _ in range(60):  # events of every kind, with tickets old and new
        what = data.draw(st.sampled_from(EVENTS))
        if what == "take" and (taken := book.take(2)):
            tickets.append(taken)
        elif tickets and what != "take":
            ticket, arguments = data.draw(st.sampled_from(tickets))
            if what == "give back":
                book.give_back(ticket)
            elif what == "blame":
                over += book.blame(ticket, data.draw(st.integers(0, len(arguments) - 1)), "harm")
            elif what == "lose":
                over += book.lose(ticket, "harm")
            else:
                error = "no" if what == "fail" else None
                over += book.settle(ticket, [(a[0], error, 0.0) for a in arguments])
    for ticket in list(book.running):
        book.give_back(ticket)
    while taken := book.take(2):
        over += book.settle(taken[0], [(a[0], None, 0.0) for a in taken[1]])
    assert Counter(d.number for d in over) == Counter(range(n))
    assert all(d.value == d.number for d in over if d.error is None)
    assert all(d.attempts <= retries + 1 for d in over) and len(book) == 0


# ---------------------------------------------------------------- a made-up client


class MadeUpFuture:
    def __init__(self, value, status="finished"):
        self.value, self.status = value, status

    def __await__(self):
        yield from ()
        return self.value


class MadeUpRunner:
    """A real runner, whose batches meet fates: seldom ones on a real cluster, frequent here."""

    def __init__(self, client, worker, inner):
        self.client, self.worker, self.inner = client, worker, inner
        self.hangs = None

    async def run(self, ticket, batch):
        fate = next(self.client.fates, "answers")
        if fate == "hangs":
            self.hangs = ticket, len(batch) - 1, 1e9
            await asyncio.Event().wait()
        if fate == "waits":  # until somebody looks after the workers; may be called off
            await self.client.look.wait()
        if fate in ("dies", "is silent", "is late", "data lost"):
            self.client.kill(self.worker)
        if fate == "data lost" and self.client.placed:
            self.client.placed[-1].status = "lost"
        if fate == "is silent":
            await asyncio.Event().wait()
        if fate == "is late":  # by then its batch is somebody else's
            await self.client.look.wait()
        if fate in ("dies", "data lost"):
            raise OSError("the connection is gone")
        return self.inner.run(ticket, batch)

    async def call_off(self, ticket):
        return await self.inner.call_off(ticket)

    async def leave(self):
        await self.inner.leave()

    def running(self):
        if self.hangs:
            self.client.kill(self.worker)  # it will be started anew
        return SimpleNamespace(result=lambda timeout: self.hangs)


class MadeUpClient:
    """A client and its workers, without processes: all happens while somebody calls or looks."""

    def __init__(self, fates, workers=2, runner=MadeUpRunner):
        self.runner = runner
        self.fates, self.placed = iter(fates), []
        self.names = count()
        self.workers = [f"worker {next(self.names)}" for _ in range(workers)]
        self.events, self.loop = asyncio.new_event_loop(), self
        self.look = asyncio.Event()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for task in asyncio.all_tasks(self.events):
            task.cancel()
        self.add_callback(asyncio.sleep, 0)
        self.events.close()

    def add_callback(self, call, *arguments):
        self.events.create_task(call(*arguments))
        self.go_on()

    def go_on(self):
        for _ in range(5):
            self.events.run_until_complete(asyncio.sleep(0))

    def kill(self, worker):
        if worker in self.workers:
            self.workers[self.workers.index(worker)] = f"worker {next(self.names)}"

    def nthreads(self):
        self.look.set()
        self.look = asyncio.Event()
        self.go_on()
        return dict.fromkeys(self.workers, 1)

    def scatter(self, values, **_options):
        self.placed.append(MadeUpFuture(*values))
        return self.placed[-1:]

    def submit(self, cls, function, placed, *, actor, workers, key):
        inner = cls(function, placed.value if placed is not None else None)
        return MadeUpFuture(self.runner(self, *workers, inner))

    async def cancel(self, futures, force):
        pass


@pytest.fixture
def impatient(monkeypatch):
    """Look after workers all the time; and blame nobody for the death of a worker."""
    monkeypatch.setattr(tasks, "LOOK_SECONDS", 1e-4)
    monkeypatch.setattr(ledger, "LOST", 100)


FATES = ["answers", "waits", "dies", "is silent", "is late", "data lost", "hangs"]
anyhow = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@anyhow
@given(st.integers(0, 15), st.lists(st.sampled_from(FATES), max_size=25), st.integers(1, 4))
def test_no_result_is_lost_or_given_twice_whatever_happens_to_batches(impatient, n, fates, batch):
    with MadeUpClient(fates) as client:
        add = lambda x, y: x + y  # noqa: E731
        limit = 1e-3 if "hangs" in fates else None
        done = run_tasks(client, add, range(n), 10, batch=batch, retries=25, limit=limit)
        assert values(done) == {k: k + 10 for k in range(n)}


@anyhow
@given(st.integers(1, 15), st.lists(st.sampled_from(FATES), max_size=25))
def test_a_search_finds_the_same_whatever_happens_to_its_jobs(impatient, n, fates):
    def train(config, budget):
        return (config * 7 % 11) + 1 / budget

    with MadeUpClient(fates) as client:
        search = successive_halving(range(n), 1, 9, 3)
        found = list(run_search(client, search, train, retries=25, limit=1e-3))
    serial = run_serially(successive_halving(range(n), 1, 9, 3), train)
    assert sorted((r.job, r.loss) for r in found) == sorted(serial)


def test_every_idle_worker_gets_what_lies_ready_also_when_one_was_asked_in_vain(impatient):
    class Held(MadeUpRunner):
        """Holds its first batch until it is let go; what waits behind it may be called off."""

        async def run(self, ticket, batch):
            if self.worker in client.held and not client.held[self.worker].is_set():
                await client.held[self.worker].wait()
            return self.inner.run(ticket, batch)

    with MadeUpClient([], workers=3, runner=Held) as client:
        client.held = {"worker 0": asyncio.Event(), "worker 1": asyncio.Event()}
        done = run_tasks(client, square, range(5))  # 0 and 3, 1 and 4, 2
        found = {next(done).number for _ in range(3)}
        assert found == {2, 3, 4}  # worker 2 alone has done all but what the others hold
        for event in client.held.values():
            event.set()
        assert {d.number for d in done} == {0, 1}


def test_a_search_without_workers_gives_up(impatient, monkeypatch):
    monkeypatch.setattr(tasks, "WAIT_SECONDS", 0.05)
    with MadeUpClient([], workers=0) as client, pytest.raises(RuntimeError, match="No worker has"):
        list(run_tasks(client, square, [1]))


# ---------------------------------------------------------------- real workers


@pytest.mark.parametrize("batch", [1, 3, "guided"])
def test_every_item_has_its_result(cluster, batch):
    assert values(run_tasks(cluster.client, square, range(20), batch=batch)) == {
        k: k * k for k in range(20)
    }


def test_shared_data_is_there_and_is_sent_once(cluster):
    X = np.arange(200_000.0)

    def size_of(scale, pair):  # a tuple and what is in it arrive as they were
        array, nothing = pair
        return scale * array.sum() if nothing is None else None

    found = values(run_tasks(cluster.client, size_of, [1, 2, 3], shared=(X, None)))
    assert found == {0: X.sum(), 1: 2 * X.sum(), 2: 3 * X.sum()}


def test_results_come_as_they_are_ready_and_not_in_order(cluster):
    done = run_tasks(cluster.client, nap, [0.6, 0.01, 0.02])
    assert [d.number for d in done][-1] == 0


def test_a_higher_priority_starts_first(cluster):
    order = [
        d.number
        for d in run_tasks(cluster.client, nap, [0.05] * 12, priorities=[0] * 11 + [9], ahead=1)
    ]
    assert order.index(11) < 3


def test_a_failing_task_says_why_and_the_others_go_on(cluster):
    done = {d.number: d for d in run_tasks(cluster.client, lambda x: 1 / x, [1, 0, 2], retries=1)}
    assert done[1] == Done(1, None, "ZeroDivisionError: division by zero", 2, done[1].seconds)
    assert (done[0].value, done[2].value) == (1, 0.5)


def test_a_result_that_cannot_travel_fails_alone(cluster):
    def lock_or_number(x):
        return threading.Lock() if x == 1 else x

    done = {d.number: d for d in run_tasks(cluster.client, lock_or_number, range(4), retries=0)}
    assert "cannot pickle" in done[1].error
    assert {n: d.value for n, d in done.items() if d.error is None} == {0: 0, 2: 2, 3: 3}


class Two(Exception):
    """An error that can be pickled, but not unpickled."""

    def __init__(self, a, b):
        super().__init__(a)


def all_kinds(x):
    if x == 1:
        sys.exit(3)
    if x == 2:
        raise asyncio.CancelledError
    if x == 3:
        raise ValueError("Input contains NaN.\nSee the guide.")
    return Two(1, 2) if x == 4 else x


def test_every_kind_of_error_is_the_error_of_its_task(cluster):
    done = {d.number: d for d in run_tasks(cluster.client, all_kinds, range(6), retries=0)}
    assert done[1].error == "SystemExit: 3" and done[2].error == "CancelledError"
    assert done[3].error == "ValueError: Input contains NaN. See the guide."
    assert "missing 1 required positional argument" in done[4].error
    assert (done[0].value, done[5].value) == (0, 5)


def fails_once(x, folder):
    if x == 2 and first_time(f"{folder}/failed"):
        raise OSError("a hiccup")
    return x


def test_a_hiccup_is_tried_again(cluster, tmp_path):
    done = {
        d.number: d for d in run_tasks(cluster.client, fails_once, range(4), shared=str(tmp_path))
    }
    assert {n: d.attempts for n, d in done.items()} == {0: 1, 1: 1, 2: 2, 3: 1}
    assert all(d.error is None and d.value == n for n, d in done.items())


def dies_once(x, folder):
    time.sleep(0.02)
    if x == 3 and first_time(f"{folder}/died"):
        os._exit(1)
    Path(folder, f"ran-{x}-{os.getpid()}-{time.time_ns()}").touch()
    return x


@pytest.mark.parametrize("batch", [1, 4])
def test_a_worker_that_dies_loses_no_result_and_gives_none_twice(mortal, tmp_path, batch):
    done = run_tasks(mortal.client, dies_once, range(12), shared=str(tmp_path), batch=batch)
    assert values(done) == {k: k for k in range(12)}
    runs = Counter(path.name.split("-")[1] for path in tmp_path.glob("ran-*"))
    assert len(runs) == 12  # some may have run twice, but each was counted once


def hangs_once(x, folder):
    if x == 1 and first_time(f"{folder}/hung"):
        time.sleep(600)
    time.sleep(0.02)
    return x


def test_a_task_that_hangs_is_ended_and_tried_again(mortal, tmp_path):
    start = time.monotonic()
    done = list(run_tasks(mortal.client, hangs_once, range(8), shared=str(tmp_path), limit=0.5))
    assert values(done) == {k: k for k in range(8)}
    assert {d.number: d.attempts for d in done}[1] == 2
    assert time.monotonic() - start < 20


def test_a_task_that_always_hangs_is_given_up(mortal):
    done = {
        d.number: d for d in run_tasks(mortal.client, nap, [600, 0.01, 0.01], limit=0.4, retries=0)
    }
    assert done[0].error == "it took longer than 0.4 s"
    assert done[1].error is None and done[2].error is None


def always_dies(x):
    if x == 1:
        os._exit(1)
    return x


@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_given_up_and_its_batch_is_not(mortal):
    done = {
        d.number: d for d in run_tasks(mortal.client, always_dies, range(4), batch=4, retries=0)
    }
    assert done[1].error.startswith("it was lost with 4 workers")
    assert {n: d.value for n, d in done.items() if d.error is None} == {0: 0, 2: 2, 3: 3}


def test_the_only_worker_dies_with_the_shared_data(tmp_path):
    with open_cluster(workers=1) as alone:
        done = run_tasks(alone.client, dies_once, range(6), shared=str(tmp_path))
        assert values(done) == {k: k for k in range(6)}


def nap_and_tell(seconds, folder):
    Path(folder, f"{time.time_ns()}-{os.getpid()}").touch()
    time.sleep(seconds)
    return seconds


def test_who_stops_early_leaves_nothing_running(cluster, tmp_path):
    naps = [0.01] * 2 + [0.5] * 40
    for done in run_tasks(cluster.client, nap_and_tell, naps, shared=str(tmp_path), ahead=4):
        if done.number == 1:
            break
    begun = len(list(tmp_path.iterdir()))
    time.sleep(1.2)
    # Two batches run, and four or more lie ready: these are called off.
    assert len(list(tmp_path.iterdir())) <= begun + 1 and begun <= 4
    assert not actors(cluster.client)


def actors(client):
    """How many actors the scheduler knows."""
    return client.run_on_scheduler(
        lambda dask_scheduler: sum(task.actor for task in dask_scheduler.tasks.values())
    )


def test_an_interrupt_leaves_nothing_running(cluster, tmp_path):
    main, naps = threading.get_ident(), [0.4] * 100
    threading.Timer(1.0, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(cluster.client, nap_and_tell, naps, shared=str(tmp_path)))
    begun = len(list(tmp_path.iterdir()))
    time.sleep(1.0)
    assert len(list(tmp_path.iterdir())) <= begun + 1  # none of the two that lay ready
    assert not actors(cluster.client)
    assert values(run_tasks(cluster.client, square, range(3))) == {0: 0, 1: 1, 2: 4}


def test_a_call_takes_less_than_half_of_the_processor_time_of_a_dask_task(cluster):
    def by_dask(n):
        futures = [cluster.client.submit(square, k, pure=False) for k in range(n)]
        return [value for _, value in as_completed(futures, with_results=True)]

    def by_runners(n):
        return list(run_tasks(cluster.client, square, range(n)))

    def seconds(way):  # of all threads of this process: the client and the scheduler
        start = time.process_time()
        assert len(way(150)) == 150
        return time.process_time() - start

    by_dask(20), by_runners(20)
    assert min(seconds(by_runners) for _ in range(3)) < min(seconds(by_dask) for _ in range(3)) / 2


def test_what_lies_ready_behind_a_long_task_goes_to_an_idle_worker(cluster):
    start = time.monotonic()
    assert len(list(run_tasks(cluster.client, nap, [1.5, 0.01, 0.7, 0.01]))) == 4
    assert time.monotonic() - start < 2.1  # one after the other would be 2.2 s


def test_workers_may_join_and_leave_in_the_middle(mortal):
    def where(_):
        time.sleep(0.05)
        return os.getpid()

    running, seen = run_tasks(mortal.client, where, range(120), retries=0), []
    for workers in (3, 1):
        seen.append({next(running).value for _ in range(10)})
        mortal.scale(workers)
        time.sleep(1.1)  # until somebody looks
        seen.append({next(running).value for _ in range(30)})
    rest = list(running)
    assert len(seen[1]) == 3 and len(rest) == 40 and all(d.error is None for d in rest)
    assert len({d.value for d in rest}) == 1


def test_a_worker_that_is_busy_with_an_older_search_holds_nobody_up(cluster):
    abandoned = run_tasks(cluster.client, nap, [4, 0.01])
    assert next(abandoned).number == 1
    abandoned.close()
    start = time.monotonic()
    assert values(run_tasks(cluster.client, square, range(5))) == {k: k * k for k in range(5)}
    assert time.monotonic() - start < 3.5


class NotHere:
    """Its pickle asks for a module that no worker has."""

    def __reduce__(self):
        return __import__, ("no_such_module",)

    def __call__(self, item):
        return item


def test_a_limit_helps_against_what_an_older_search_has_left_on_all_workers(mortal):
    abandoned = run_tasks(mortal.client, nap, [0.01, 600, 600], ahead=1)
    assert next(abandoned).number == 0
    time.sleep(0.3)  # until both hang
    abandoned.close()
    start = time.monotonic()
    done = list(run_tasks(mortal.client, square, range(4), limit=0.5, retries=0))
    assert values(done) == {k: k * k for k in range(4)}
    assert time.monotonic() - start < 15


def test_a_limit_holds_for_each_item_and_not_for_its_batch(mortal):
    items = [0.2] * 4 + [600] + [0.2] * 3
    done = {
        d.number: d for d in run_tasks(mortal.client, nap, items, batch=8, limit=0.5, retries=0)
    }
    assert done[4].error == "it took longer than 0.5 s"
    assert [d.error for n, d in done.items() if n != 4] == [None] * 7


def test_workers_that_have_no_time_are_told_of(cluster, monkeypatch):
    monkeypatch.setattr(tasks, "WAIT_SECONDS", 0.5)
    others = [cluster.client.submit(nap, 4, pure=False, workers=[w]) for w in cluster.workers]
    time.sleep(0.2)
    with pytest.warns(UserWarning, match="no worker has had time"):
        assert values(run_tasks(cluster.client, square, [3])) == {0: 9}
    cluster.client.gather(others)


def test_the_settings_of_dask_are_left_alone(cluster):
    for _ in range(3):
        with dask.config.set(scheduler="threads"):
            list(run_tasks(cluster.client, square, range(3)))
            assert dask.config.get("scheduler") == "threads"


def test_functions_and_items_that_cannot_travel_are_told(cluster):
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        list(run_tasks(cluster.client, square, [1], shared=NotHere()))
    with pytest.raises(RuntimeError, match="cannot load the function.*no_such_module"):
        list(run_tasks(cluster.client, NotHere(), [1]))
    [done] = run_tasks(cluster.client, square, [NotHere()], retries=0)
    assert "no_such_module" in done.error
    with pytest.raises(TypeError, match="cannot pickle"):
        list(run_tasks(cluster.client, square, [threading.Lock()]))
    with pytest.raises(TypeError, match="cannot pickle"):
        list(run_tasks(cluster.client, threading.Lock().acquire, [1]))
    assert values(run_tasks(cluster.client, square, [3])) == {0: 9}


def holds_everything(x):
    """Without releasing the lock of the interpreter, so that the worker cannot even answer."""
    ctypes.PyDLL(None).sleep(0 if x else 60)
    return x


def test_a_worker_that_cannot_answer_is_given_up_too(mortal):
    start = time.monotonic()
    done = {
        d.number: d
        for d in run_tasks(mortal.client, holds_everything, [0, 1, 2], limit=0.3, retries=0)
    }
    assert done[0].error == "it took longer than 0.3 s"
    assert done[1].value == 1 and done[2].value == 2 and time.monotonic() - start < 8


def test_a_worker_that_cannot_answer_is_replaced(mortal):
    before = set(mortal.workers)
    list(run_tasks(mortal.client, holds_everything, [0, 1], limit=0.3, retries=0))
    end = time.monotonic() + 15
    while len(set(mortal.workers) - before) < 1 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(set(mortal.workers) - before) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(limit=0), "limit is 0"),
        (dict(ahead=0), "ahead is 0"),
        (dict(ahead=1.5), "ahead is 1.5"),
        (dict(priorities=[1, 2]), "1 items have 2 priorities"),
        (dict(batch=0), 'or "guided"'),
        (dict(retries=-1), "retries is -1"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(cluster, options, words):
    with pytest.raises(ValueError, match=words):
        list(run_tasks(cluster.client, square, [1], **options))


# ---------------------------------------------------------------- searches on real workers


def made_up_loss(config, budget):
    return abs(np.log10(config["rate"])) + 1 / budget


def test_halving_on_workers_equals_halving_alone(cluster):
    configs = draw({"rate": (1e-3, 1e3)}, 27, seed=3)
    serial = run_serially(successive_halving(configs, 1, 27, 3), made_up_loss)
    found = list(run_search(cluster.client, successive_halving(configs, 1, 27, 3), made_up_loss))
    key = lambda pair: (pair[0].budget, pair[0].trial)  # noqa: E731
    assert sorted(((r.job, r.loss) for r in found), key=key) == sorted(serial, key=key)


def test_asha_on_workers_runs_each_job_once_and_finds_the_best(cluster):
    configs = draw({"rate": (1e-3, 1e3)}, 27, seed=3)
    found = list(run_search(cluster.client, asha(configs, 1, 27, 3), made_up_loss))
    jobs = Counter((r.job.trial, r.job.budget) for r in found)
    assert max(jobs.values()) == 1 and sum(budget == 1 for _, budget in jobs) == 27
    best = min(range(27), key=lambda trial: made_up_loss(configs[trial], 1))
    assert best_of((r.job, r.loss) for r in found)[0].trial == best


def fails_or_diverges(config, budget, folder):
    if config == 0:
        raise ValueError("no")
    if config == 1:
        return float("nan")
    return dies_once(config, folder)


def test_a_search_goes_on_when_trials_fail_diverge_or_kill_their_worker(mortal, tmp_path):
    search = successive_halving(range(9), 1, 9, 3)
    found = list(
        run_search(mortal.client, search, fails_or_diverges, shared=str(tmp_path), retries=0)
    )
    losses = {(r.job.trial, r.job.budget): r.loss for r in found}
    assert len(losses) == len(found) == 9 + 3 + 1
    assert losses[0, 1] == losses[1, 1] == np.inf
    assert next(r.error for r in found if r.job.trial == 0) == "ValueError: no"
    assert best_of([(r.job, r.loss) for r in found])[0] == Job(2, 2, 9)


def test_a_search_that_waits_for_nothing_is_told(cluster):
    def never():
        yield None

    with pytest.raises(RuntimeError, match="waits for a result"):
        list(run_search(cluster.client, never(), made_up_loss))


def test_the_examples():
    for module in (ledger, runners):
        tried = doctest.testmod(module)
        assert tried.attempted and not tried.failed
