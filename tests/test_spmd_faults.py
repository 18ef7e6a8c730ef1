"""Whatever goes wrong on a rank: all ranks end soon, one error says why, and nothing is left."""

import _thread
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import cloudpickle
import dask
import numpy as np
import psutil
import pytest
from distributed import Client, Future, LocalCluster

from helpers.cluster import open_cluster
from helpers.engine import spmd, workers
from helpers.engine.collectives import (
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
from tests.conftest import Present
from tests.test_cluster import wait_until

cloudpickle.register_pickle_by_value(sys.modules[__name__])

MOST_SECONDS = 10
"""From a fault to the end of all ranks."""
TWO = Mesh(data=2)
EXCHANGES = {
    "all_reduce": lambda group: all_reduce(group, np.ones(5)),
    "all_reduce of 4 MB": lambda group: all_reduce(group, np.ones(500_000)),
    "all_reduce ring": lambda group: all_reduce(group, np.ones(500_000), algorithm="ring"),
    "all_reduce tree": lambda group: all_reduce(group, np.ones(5), algorithm="tree"),
    "all_reduce halving": lambda group: all_reduce(group, np.ones(5), algorithm="halving"),
    "all_reduce naive": lambda group: all_reduce(group, np.ones(5), algorithm="naive"),
    "reduce_scatter": lambda group: reduce_scatter(group, np.ones(6)),
    "all_gather": lambda group: all_gather(group, np.ones(6)),
    "broadcast": lambda group: broadcast(group, None if group.rank == 0 else np.ones(3), root=1),
    "reduce": lambda group: reduce(group, np.ones(6)),
    "all_to_all": lambda group: all_to_all(group, [np.ones(2)] * group.size),
    "barrier": barrier,
    "receive": lambda group: group.receive(1 - group.rank),
    "background": lambda group: group.owner.background(all_reduce, group, np.ones(500_000)).wait(),
}


# ---------------------------------------------------------------- what the tests look at


def left_on_worker(dask_worker=None):
    """What a run could leave in a worker process."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue  # the one of this listing
    inet = psutil.Process().net_connections("inet")
    return {
        "endpoints": len(dask_worker.extensions.get(workers.NAME, {})),
        "threads": sum(t.name.startswith(("many-hands", "<Rank")) for t in threading.enumerate()),
        "segments": sum("memfd:many-hands" in link for link in links),
        "unix sockets": len(psutil.Process().net_connections("unix")),
        "listeners": sum(c.status == psutil.CONN_LISTEN for c in inet),
    }


def add_up(rank):
    return float(all_reduce(rank.data, np.full(3, rank.index + 1.0))[0])


def go_on_for_ever(rank):
    while True:
        all_reduce(rank.data, np.ones(1000))
        time.sleep(0.001)


@pytest.fixture(scope="module")
def cluster(no_leak_of_module):
    # Dask looks 15 s after a death whether the worker is back, and gives its nanny up if it is not:
    # that is so too when the successor was killed in this moment.
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"}),
        open_cluster(workers=2) as cluster,
    ):
        spmd.run(cluster.client, TWO, add_up)  # warm: what Dask opens once is open now
        yield cluster


@pytest.fixture(autouse=True)
def no_leak(cluster):
    """As in all tests; but a worker that was killed has a successor, which is not left over."""
    before = Present()
    yield

    def left():
        now = Present()
        for pid in cluster.client.run(os.getpid).values():
            now.processes.pop(pid, None)
        return now.new_since(before)

    wait_until(lambda: not left(), 5)


def two_workers(client):
    """Wait until both workers are there, and would be started anew if they were killed now.

    A nanny gives up a worker that dies before the nanny has noticed that it is running.
    """

    def ready():
        nannies = client.run(of_nanny, nanny=True, on_error="ignore").values()
        return [*nannies] == [("running", "running")] * 2 and len(client.nthreads()) == 2

    wait_until(ready, 30)


def of_nanny(dask_worker=None):
    return dask_worker.status.name, dask_worker.process and dask_worker.process.status.name


@pytest.fixture
def client(cluster):
    """The client of two workers; afterwards both must be as they were, and work at once."""
    client = cluster.client
    two_workers(client)
    before = client.run(left_on_worker)
    yield client
    assert spmd.run(client, TWO, add_up).results == [3.0, 3.0]
    assert not left_behind(client, before)
    here = [thread.name for thread in threading.enumerate()]
    assert not [name for name in here if name.startswith(("many-hands", "<Rank"))]


def left_behind(client, before, seconds=5):
    """What surviving workers hold beyond what they held before; it may take a moment to go."""
    end = time.monotonic() + seconds
    while True:
        now = client.run(left_on_worker, on_error="ignore")
        more = [
            f"{now[worker][kind] - count} {kind} on {worker}"
            for worker, counts in before.items()
            if worker in now
            for kind, count in counts.items()
            if now[worker][kind] > count
        ]
        if not more or time.monotonic() > end:
            return more
        time.sleep(0.05)


def failed(client, program, *args, mesh=TWO, seconds=MOST_SECONDS, **options):
    """The error of a run that must fail, and soon; no rank's thread is left when it comes."""
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        spmd.run(client, mesh, program, *args, **options)
    assert time.monotonic() - begin < seconds
    left = client.run(left_on_worker, on_error="ignore").values()
    assert not [counts for counts in left if counts["threads"] or counts["endpoints"]]
    return caught.value


def signal_soon(seconds, number=signal.SIGKILL):
    """Send this very process a signal in a moment, whatever it does then."""
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


# ---------------------------------------------------------------- a rank that raises


def test_the_caller_gets_the_error_of_the_rank_with_the_line_of_the_program(client):
    def program(rank):
        if rank.index == 1:
            return [4, 5, int("six")]  # the line that is to be named
        return add_up(rank)

    error = failed(client, program, seconds=4)
    assert str(error).startswith("rank 1 of 2: ValueError: invalid literal for int()")
    assert isinstance(error.__cause__, ValueError)
    assert 'return [4, 5, int("six")]  # the line that is to be named' in str(error)
    assert "On rank 1:" in str(error) and "in program" in str(error)


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_rank_raises_while_the_other_is_in(client, name):
    def program(rank):
        if rank.index == 1:
            time.sleep(0.05)
            raise ZeroDivisionError("on purpose")
        return EXCHANGES[name](rank.data)

    error = failed(client, program, seconds=4)
    assert str(error).startswith("rank 1 of 2: ZeroDivisionError: on purpose")


@pytest.mark.parametrize("size", [3, 5])
def test_one_of_many_ranks_raises_and_all_others_end(client, size):
    def program(rank):
        for step in range(1000):
            if (rank.index, step) == (size - 2, 5):
                raise LookupError("step 5")
            all_reduce(rank.data, np.ones(2000), algorithm="ring")

    error = failed(client, program, mesh=Mesh(data=size), seconds=4)
    assert str(error).startswith(f"rank {size - 2} of {size}: LookupError: step 5")


def test_an_error_that_cannot_be_pickled_is_told_in_words(client):
    class Stubborn(Exception):
        def __reduce__(self):
            raise RuntimeError("no")

    def program(rank):
        raise Stubborn("so it is")

    assert "Stubborn: so it is" in str(failed(client, program, seconds=4))


def test_a_program_that_ends_the_interpreter_is_an_error_of_its_rank(client):
    error = failed(client, lambda rank: sys.exit(3) if rank.index else add_up(rank), seconds=4)
    assert str(error).startswith("rank 1 of 2: SystemExit: 3")


def test_an_error_in_the_background_is_found_although_nobody_waits_for_it(client):
    def program(rank):
        rank.background(lambda group: 1 // (1 - group.rank), rank.data)
        return 7

    assert "ZeroDivisionError" in str(failed(client, program, seconds=4))


# ---------------------------------------------------------------- ranks that do not fit together


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (lambda g: barrier(g), lambda g: all_gather(g, np.ones(2)), "barrier"),
        (lambda g: all_reduce(g, np.ones(3)), lambda g: all_gather(g, np.ones(3)), "all_gather"),
        (
            lambda g: all_reduce(g, np.ones(3)),
            lambda g: all_reduce(g, np.ones(3, np.float32)),
            "float32",
        ),
        (lambda g: all_reduce(g, np.ones(3)), lambda g: all_reduce(g, np.ones(4)), r"[4]"),
        (
            lambda g: all_reduce(g, np.ones(9**6)),
            lambda g: all_reduce(g, np.ones(9**6 + 1)),
            str(9**6 + 1),
        ),
        (
            lambda g: all_reduce(g, np.ones(3), operation="sum"),
            lambda g: all_reduce(g, np.ones(3), operation="max"),
            "max",
        ),
        (
            lambda g: all_reduce(g, np.ones(3), algorithm="ring"),
            lambda g: all_reduce(g, np.ones(3), algorithm="tree"),
            "tree",
        ),
        (
            lambda g: (all_reduce(g, np.ones(3)), barrier(g)),
            lambda g: (barrier(g), all_reduce(g, np.ones(3))),
            "barrier",
        ),
        (
            lambda g: broadcast(g, np.ones(2), root=0),
            lambda g: broadcast(g, np.ones(2), root=1),
            "broadcast",
        ),
        (lambda g: reduce_scatter(g, np.ones(4)), lambda g: reduce_scatter(g, np.ones(6)), "[6]"),
        (lambda g: g.send(np.ones(3), 1), lambda g: g.receive(0, np.ones(2)), "room"),
    ],
    ids="name kind dtype shape large operation algorithm order root parts out".split(),
)
def test_exchanges_that_do_not_fit_are_found_and_named(client, first, second, words):
    def program(rank):
        return (second if rank.index else first)(rank.data)

    text = str(failed(client, program, seconds=4))
    assert any(word in text for word in ("Mismatch", "ended its program", "without receiving"))
    assert words in text


def test_a_rank_that_ends_early_is_missed(client):
    def program(rank):
        return rank.data.receive(1) if rank.index == 0 else "early"

    error = failed(client, program, seconds=5)
    assert "PeerLost" in str(error) and "ended its program" in str(error)
    assert str(error).startswith("rank 0 of 2")


def test_one_exchange_more_than_the_other_rank_is_found(client):
    def program(rank):
        for _ in range(3 - rank.index):
            all_reduce(rank.data, np.ones(4))

    assert "ended its program" in str(failed(client, program, seconds=5))


def test_two_ranks_that_both_wait_get_an_answer_when_patience_ends(client):
    begin = time.monotonic()
    error = failed(client, lambda rank: rank.data.receive(1 - rank.index), patience=1.0, seconds=5)
    assert time.monotonic() - begin > 0.9
    assert "Unanswered" in str(error) and "patience" in str(error)
    assert "receive from rank" in str(error)


# ---------------------------------------------------------------- ranks that do not stop


def test_an_endless_loop_is_stopped_when_another_rank_raises(client):
    def program(rank):
        if rank.index == 1:
            raise OSError("disk full")
        while True:
            pass

    pids = set(client.run(os.getpid).values())
    assert "disk full" in str(failed(client, program))
    assert set(client.run(os.getpid).values()) == pids, "a loop in Python needs no new worker"


def test_an_endless_loop_is_found_by_who_waits_for_it(client):
    def program(rank):
        while rank.index:
            pass
        return rank.data.receive(1)

    error = failed(client, program, patience=1.0)
    assert str(error).startswith("rank 0 of 2: Unanswered")


@pytest.mark.slow
def test_a_rank_that_cannot_be_stopped_gets_a_new_worker(client):
    def program(rank):
        if rank.index == 1:
            raise OSError("disk full")
        time.sleep(100)

    pids = set(client.run(os.getpid).values())
    error = failed(client, program)
    assert str(error).startswith("rank 1 of 2: OSError: disk full")
    assert "rank 0 was in: something that cannot be stopped" in str(error)
    assert len(set(client.run(os.getpid).values()) & pids) == 1


@pytest.mark.slow
def test_a_rank_that_holds_on_against_everything_gets_a_new_worker(client):
    def program(rank):
        if rank.index == 1:
            raise OSError("disk full")
        while True:
            try:
                time.sleep(0.01)
            except BaseException:  # the worst that a reader can write
                continue

    assert "disk full" in str(failed(client, program))


@pytest.mark.slow
@pytest.mark.parametrize("patience", [2.0, 6.0])
def test_a_worker_that_is_stopped_is_found(client, patience):
    def program(rank):
        if rank.index == 1:
            signal_soon(0.2, signal.SIGSTOP)
        go_on_for_ever(rank)

    begin = time.monotonic()
    failed(client, program, patience=patience, seconds=MOST_SECONDS + 4)
    assert time.monotonic() - begin < MOST_SECONDS + 4  # 4 for the new worker to start
    assert not [p for p in psutil.Process().children(recursive=True) if p.status() == "stopped"]


@pytest.mark.slow
def test_a_worker_that_is_stopped_before_the_launch_is_found(client):
    stopped = max(client.run(os.getpid).values())
    os.kill(stopped, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        with pytest.raises(RankError):
            spmd.run(client, TWO, add_up)
        assert time.monotonic() - begin < MOST_SECONDS + 4
    finally:
        if psutil.pid_exists(stopped):
            os.kill(stopped, signal.SIGCONT)


# ---------------------------------------------------------------- workers that die


def test_a_worker_is_killed_in_a_collective(client):
    def program(rank):
        if rank.index == 1:
            signal_soon(0.2)
        go_on_for_ever(rank)

    error = failed(client, program)
    assert str(error).startswith("rank 1 of 2: its worker has died")
    assert "rank 0 was in: all_reduce sum" in str(error)


@pytest.mark.slow
def test_a_worker_is_killed_while_it_computes(client):
    def program(rank):
        if rank.index == 0:
            signal_soon(0.2)
        x = np.random.default_rng(0).normal(size=(500, 500))
        while True:
            x = np.tanh(x @ x)

    assert str(failed(client, program)).startswith("rank 0 of 2: its worker has died")


@pytest.mark.slow
def test_all_workers_are_killed_at_once(client):
    def program(rank):
        os.kill(os.getpid(), signal.SIGKILL)

    assert "its worker has died" in str(failed(client, program))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["_workers", "_check_opened", "outcomes_of"])
def test_a_worker_is_killed_during_the_launch(client, monkeypatch, step):
    real = getattr(spmd, step)
    victim = max(client.run(os.getpid).values())

    def kill_then(*args):
        found = real(*args) if step == "_workers" else None
        os.kill(victim, signal.SIGKILL)
        return found if step == "_workers" else real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(spmd, step, kill_then)
        error = failed(client, go_on_for_ever)
    assert "worker" in str(error)


@pytest.mark.slow
def test_a_worker_is_killed_after_its_rank_has_ended(client):
    def program(rank):
        if rank.index == 1:
            signal_soon(0.8)
            return "done"
        time.sleep(2.5)
        return "late"

    assert spmd.run(client, TWO, program).results == ["late", "done"]  # it was fetched at once


@pytest.mark.slow
def test_a_worker_is_killed_while_its_result_is_fetched(client):
    class Slow:
        def __reduce__(self):
            time.sleep(2)  # once on the rank, to see whether it can be sent; once for the caller
            return (int, ())

    def program(rank):
        if rank.index == 1:
            signal_soon(3)
            return Slow()

    assert "rank 1 of 2: its worker has died" in str(failed(client, program, seconds=12))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_kills_at_random_moments(client, seed):
    """Ten kills each: the run fails with one sentence, or was over and its results are right."""
    draw = random.Random(seed)
    slowest, sentences = 0, []
    for _ in range(10):
        two_workers(client)
        victim, delay = draw.choice(sorted(client.run(os.getpid).values())), draw.uniform(0, 0.3)
        size, length = draw.randint(2, 4), draw.choice([3, 5_000, 300_000])
        algorithm = draw.choice([None, "ring", "tree", "halving", "naive"])

        def program(rank, length=length, algorithm=algorithm):
            end, total = time.monotonic() + 0.4, np.full(length, rank.index + 1.0)
            while True:
                given = np.append(total[1:], float(time.monotonic() > end))
                found = all_reduce(rank.data, given, algorithm=algorithm)
                if found[-1]:  # all ranks see the same number, and stop at the same step
                    return found[0] / sum(range(1, rank.size + 1))
                total[:] = rank.index + 1.0

        killer = threading.Timer(delay, os.kill, (victim, signal.SIGKILL))
        begin = time.monotonic()
        killer.start()
        try:
            assert spmd.run(client, Mesh(data=size), program).results == [1.0] * size
        except RankError as error:
            sentences.append(str(error))
        slowest = max(slowest, time.monotonic() - begin - delay)
        killer.join()
        wait_until(lambda victim=victim: not psutil.pid_exists(victim), 5)
        assert slowest < MOST_SECONDS
        assert spmd.run(client, Mesh(data=size), add_up).results == [size * (size + 1) / 2] * size
    print(f"seed {seed}: {len(sentences)} of 10 runs failed; the slowest took {slowest:.1f} s")
    assert len(sentences) >= 3
    assert all("worker" in sentence for sentence in sentences)


# ---------------------------------------------------------------- tasks that are lost


def test_tasks_that_are_cancelled_end_the_run(client):
    def cancel():
        keys = [key for key in client.futures if key.startswith("spmd-")]
        client.cancel([Future(key, client) for key in keys], force=True)

    timer = threading.Timer(0.7, cancel)
    timer.start()
    error = failed(client, go_on_for_ever)
    timer.join()
    assert "its task was cancelled, as when the cluster is restarted or closed" in str(error)


def test_a_result_that_cannot_be_unpacked_by_the_caller_is_an_error_of_its_rank(client):
    class Brittle:
        def __reduce__(self):
            return int, ("not a number",)

    error = failed(client, lambda rank: Brittle() if rank.index else 1, seconds=4)
    assert str(error).startswith("rank 1 of 2: its result cannot be unpacked here: ValueError")


def test_a_program_that_cannot_be_unpacked_by_a_worker_is_an_error(client):
    class Brittle:
        def __call__(self, rank):
            return 1

        def __reduce__(self):
            return int, ("not a number",)

    assert "the program cannot be unpacked on its worker" in str(failed(client, Brittle()))


def test_a_worker_that_cannot_open_its_end_is_named(client):
    def deaf():
        spmd.Endpoint.real = spmd.Endpoint.listen

        def listen(endpoint):
            raise OSError("no port is free")

        spmd.Endpoint.listen = listen

    def hearing():
        spmd.Endpoint.listen = spmd.Endpoint.real

    worker = min(client.nthreads())
    client.run(deaf, workers=[worker])
    try:
        error = failed(client, add_up, seconds=4)
    finally:
        client.run(hearing, workers=[worker])
    assert f"The worker {worker} could not open its end of the run" in str(error)
    assert "no port is free" in str(error)


# ---------------------------------------------------------------- interrupts


@pytest.mark.parametrize("program", [go_on_for_ever, lambda rank: rank.data.receive(rank.index)])
def test_an_interrupt_ends_all_ranks(client, program):
    threading.Timer(0.5, _thread.interrupt_main).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        spmd.run(client, TWO, program, patience=60)
    assert time.monotonic() - begin < 5
    left = client.run(left_on_worker).values()
    assert not [counts for counts in left if counts["threads"] or counts["endpoints"]]


def test_an_interrupt_ends_ranks_that_are_threads_of_this_process():
    threading.Timer(0.3, _thread.interrupt_main).start()
    before = len(os.listdir("/proc/self/fd"))
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        spmd.run(None, Mesh(data=3), go_on_for_ever)
    assert time.monotonic() - begin < 5
    assert not [t for t in threading.enumerate() if t.name.startswith("<Rank")]
    assert len(os.listdir("/proc/self/fd")) <= before


CALLER = """
    import sys
    import time
    import numpy as np
    from distributed import Client
    from helpers.engine import spmd
    from helpers.engine.collectives import all_reduce
    from helpers.engine.mesh import Mesh

    def program(rank):
        while True:
            all_reduce(rank.data, np.ones(1000))
            time.sleep(0.01)

    client = Client(sys.argv[1])
    print("ready", flush=True)
    spmd.run(client, Mesh(data=2), program)
"""


def busy(client):
    """True while ranks or endpoints are on any worker."""
    found = client.run(left_on_worker).values()
    return any(counts["threads"] or counts["endpoints"] for counts in found)


@pytest.mark.slow
def test_ranks_end_when_their_caller_is_killed(client):
    command = [sys.executable, "-c", textwrap.dedent(CALLER), client.scheduler.address]
    caller = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert caller.stdout.readline() == b"ready\n"
        wait_until(lambda: busy(client), 20)
        time.sleep(0.5)
    finally:
        caller.kill()
        caller.wait()
        caller.stdout.close()
    begin = time.monotonic()
    wait_until(lambda: not busy(client), MOST_SECONDS)
    print(f"gone {time.monotonic() - begin:.1f} s after the caller")


def test_an_endpoint_that_nobody_claims_closes_itself(client):
    def hurry(seconds):
        workers.UNCLAIMED_SECONDS = seconds

    client.run(hurry, 0.5)
    try:
        client.run(spmd.open_run, "nobody", b"secret", False)
        assert busy(client)
        wait_until(lambda: not busy(client), 5)
    finally:
        client.run(hurry, 30.0)


def test_arguments_that_take_long_are_waited_for(client):
    def hurry(seconds):
        workers.UNCLAIMED_SECONDS = seconds

    client.run(hurry, 1.0)
    try:
        slow = client.submit(lambda: time.sleep(2.2) or 5, pure=False)
        run = spmd.run(client, TWO, lambda rank, number: add_up(rank) + number, slow)
        assert run.results == [8.0, 8.0]
    finally:
        client.run(hurry, 30.0)


# ---------------------------------------------------------------- several runs, many ranks


def test_runs_at_the_same_time_in_opposite_orders_all_finish(client, monkeypatch):
    real = spmd._workers

    def order(client):
        backwards = threading.current_thread().name.startswith("backwards")
        return real(client)[:: -1 if backwards else 1]

    monkeypatch.setattr(spmd, "_workers", order)
    found = []

    def several():
        for _ in range(5):
            found.append(spmd.run(client, TWO, add_up).results)

    names = ["forwards 1", "backwards 1", "forwards 2", "backwards 2"]
    threads = [threading.Thread(target=several, name=name) for name in names]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[3.0, 3.0]] * 20
    assert time.monotonic() - begin < 30


def test_a_run_fails_and_the_one_beside_it_goes_on(client):
    def slow(rank):
        for _ in range(20):
            total = add_up(rank)
            time.sleep(0.05)
        return total

    found = []
    beside = threading.Thread(target=lambda: found.append(spmd.run(client, TWO, slow).results))
    beside.start()
    time.sleep(0.2)
    with pytest.raises(RankError, match="ZeroDivisionError"):
        spmd.run(client, TWO, lambda rank: 1 // (1 - rank.index))
    beside.join(30)
    assert found == [[3.0, 3.0]]


def test_a_run_waits_for_workers_that_are_busy(client):
    def wait_here():
        time.sleep(2)

    worker = max(client.nthreads())
    task = client.submit(wait_here, workers=[worker], pure=False)
    assert spmd.run(client, TWO, add_up, patience=1.0).results == [3.0, 3.0]
    assert task.result() is None


@pytest.mark.parametrize("size", [3, 5, 16])
def test_more_ranks_than_workers_share_them(client, size):
    total = size * (size + 1) / 2
    assert spmd.run(client, Mesh(data=size), add_up).results == [total] * size


def test_eight_ranks_on_one_worker(client):
    client.in_use = [min(client.nthreads())]
    try:
        run = spmd.run(client, Mesh(data=8), lambda rank: (os.getpid(), add_up(rank)))
        assert len({pid for pid, _ in run.results}) == 1
        assert {total for _, total in run.results} == {36.0}
        with pytest.raises(ValueError, match="65 ranks are too many for 1 worker: at most 64"):
            spmd.run(client, Mesh(data=65), add_up)
    finally:
        client.in_use = None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all_reduce", "all_to_all"])
def test_sixty_four_ranks_on_two_workers_all_meet(client, name):
    def program(rank):
        return EXCHANGES[name](rank.data) is not None

    assert spmd.run(client, Mesh(data=64), program, patience=60).results == [True] * 64


def test_a_rank_that_holds_the_interpreter_is_waited_for_as_long_as_patience_says(client):
    def program(rank):
        if rank.index == 1:
            time.sleep(0.3)  # so that the other dials while this one computes
            sum(range(250_000_000))  # one step of Python: no other thread runs until it ends
        return add_up(rank)

    assert spmd.run(client, TWO, program, patience=60).results == [3.0, 3.0]


# ---------------------------------------------------------------- impossible demands


def test_a_program_that_cannot_be_pickled_is_refused(client):
    lock = threading.Lock()

    def program(rank):
        return lock.locked()

    with pytest.raises(TypeError, match="The program 'program' cannot be sent to the workers"):
        spmd.run(client, TWO, program)


def test_an_argument_that_cannot_be_pickled_is_refused(client):
    with pytest.raises(TypeError, match="cannot be sent|serialize"):
        spmd.run(client, TWO, lambda rank, lock: 1, threading.Lock())


def test_a_result_that_cannot_be_pickled_is_refused(client):
    error = failed(client, lambda rank: threading.Lock(), seconds=4)
    assert "returns something that cannot be sent to the caller" in str(error)
    assert isinstance(error.__cause__, TypeError)


def test_a_result_larger_than_memory_is_refused(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(spmd, "usable_memory", lambda: 20 * 2**20)
        error = failed(client, lambda rank: np.zeros(2_000_000), seconds=4)
    assert "the program returns 0.01 GiB, but the caller has room for" in str(error)
    assert isinstance(error.__cause__, MemoryError)


def test_results_that_are_together_larger_than_memory_are_refused(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(spmd, "usable_memory", lambda: 20 * 2**20)
        error = failed(client, lambda rank: np.zeros(1_000_000), mesh=Mesh(data=4), seconds=4)
    assert isinstance(error.__cause__, MemoryError)


def test_a_cluster_without_workers_is_refused(tmp_path):
    with (
        dask.config.set(temporary_directory=str(tmp_path)),
        LocalCluster(n_workers=0, dashboard_address=None, silence_logs=50) as empty,
        Client(empty, set_as_default=False) as client,
        pytest.raises(ValueError, match="The cluster has no worker: start one"),
    ):
        spmd.run(client, TWO, add_up)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": 2}, "run needs a Mesh such as"),
        ({"program": 3}, "run needs a program"),
        ({"each": [1]}, "each needs one item for each of 2 ranks, not 1"),
        ({"patience": 0}, "patience must be a number of seconds above 0"),
        ({"patience": float("nan")}, "patience must be a number of seconds above 0"),
        ({"transport": "carrier pigeon"}, "transport must be None or"),
    ],
)
def test_wrong_use_gets_one_sentence(options, words):
    given = {"mesh": TWO, "program": add_up} | options
    with pytest.raises((TypeError, ValueError), match=words):
        spmd.run(None, given.pop("mesh"), given.pop("program"), **given)
