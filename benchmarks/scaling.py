"""What it costs to start a program on many ranks: an empty program, and nothing else.

Seconds of one ``spmd.run``, from the call until all results are there; the median of several after
one that warms up. Less is better. There are no peers: no other launcher starts its ranks inside
Dask workers that are running.

threads N
    N ranks as threads of two running workers.
processes N
    N workers, one rank each. A worker takes about 0.16 GB and a second of a core to start, so that
    the default stops at 16; ``SCALING_PROCESSES=1,2,4,8,16,32,64`` in the environment goes on.
limit
    A plain Dask task to every one of these workers and all answers gathered, in turn with ours.
"""

import os
import tempfile
import time
from statistics import median

from distributed import Client, LocalCluster

from benchmarks.measure import Case
from benchmarks.peers import launch
from benchmarks.peers.timing import report
from helpers.engine import spmd
from helpers.engine.mesh import Mesh

ROUNDS = 3
REPEATS = 7
START_SECONDS = 300
THREADS = (1, 2, 4, 8, 16, 32, 64)
PROCESSES = (1, 2, 4, 8, 16)


def program(rank):
    """What each rank does: nothing."""


def launch_and_trip(client, ranks):
    """Seconds of an empty program on so many ranks, and of a task to every worker.

    Parameters
    ----------
    client : distributed.Client
    ranks : int

    Returns
    -------
    list of float
        Two medians.
    """
    workers = list(client.nthreads())

    def trip():
        client.gather([client.submit(int, workers=[w], pure=False) for w in workers])

    acts = (lambda: spmd.run(client, Mesh(data=ranks), program), trip)
    seconds = [[_seconds(act) for act in acts] for _ in range(1 + REPEATS)]
    return [median(column) for column in zip(*seconds[1:])]


def _seconds(act):
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def measure(kind, numbers):
    """Measure all numbers of one kind once, in this process, and report them.

    Parameters
    ----------
    kind : {"threads", "processes"}
    numbers : sequence of int
        Ascending: the cluster grows.
    """
    with (
        tempfile.TemporaryDirectory(prefix="mh-", ignore_cleanup_errors=True) as folder,
        LocalCluster(
            n_workers=0,
            threads_per_worker=1,
            dashboard_address=None,
            local_directory=folder,
            memory_limit=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        medians = {}
        for ranks in numbers:
            workers = 2 if kind == "threads" else ranks
            cluster.scale(workers)
            client.wait_for_workers(workers, timeout=START_SECONDS)
            medians[f"{kind} {ranks}"] = launch_and_trip(client, ranks)
    report(medians)


def numbers_of_processes():
    """How many workers are tried: `PROCESSES`, or what SCALING_PROCESSES says.

    Raises
    ------
    RuntimeError
        The variable is not a list of whole numbers from 1 up.
    """
    text = os.environ.get("SCALING_PROCESSES")
    if not text:
        return PROCESSES
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise RuntimeError(
            f"SCALING_PROCESSES must be whole numbers from 1 up, such as 1,2,4, not {text!r}."
        )
    return tuple(sorted({int(word) for word in words}))


def run(rounds=ROUNDS, threads=THREADS, processes=None):
    """Measure all cases.

    Parameters
    ----------
    rounds : int
    threads, processes : sequence of int, optional
        Numbers of ranks. Default of `processes`: `numbers_of_processes`.

    Returns
    -------
    list of Case
    """
    numbers = {"threads": threads, "processes": processes or numbers_of_processes()}
    seen = {}
    for _ in range(rounds):
        for kind, ranks in numbers.items():
            program = f"from benchmarks.scaling import measure; measure({kind!r}, {ranks!r})"
            for name, seconds in launch.python(program).items():
                seen.setdefault(name, []).append(seconds)
    cases = []
    for name, seconds in seen.items():
        ours, limit = map(median, zip(*seconds))
        cases.append(Case(name, ours, {}, limit))
    return cases
