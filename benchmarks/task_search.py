"""A search for hyper-parameters as independent tasks on two workers, of 10 ms, 100 ms and 1 s.

Seconds from the start of the search to its last result, in a fresh process for each run. Workers
are up and have run a small search before; placing the data counts. Each task trains an MLP 36-64-1
in batches of 256 rows of January, with a rate of its own. How many steps take 10 ms, 100 ms or 1 s
is measured first, on one core. All sides must find the same losses, to the last bit.

ours
    ``run_tasks`` on two Dask workers. Tasks of 10 and 100 ms are sent in guided batches; those of
    1 s one by one, and so are those of 100 ms in a case of their own.
loky
    joblib's `Parallel` with its own settings: it batches by itself, and maps large arrays.
ray
    One remote call a task, the data put into its store once.
limit
    Two bare processes, each with every second task and nothing to share.
"""

import multiprocessing
import time
from importlib.util import find_spec

import numpy as np

from benchmarks.measure import Case, interleaved
from benchmarks.peers import launch
from benchmarks.peers.timing import report
from helpers.cluster import open_cluster
from helpers.datasets import load_table
from helpers.nn import MLP, SGD
from helpers.parallel.tasks import run_tasks

ROUNDS = 5
WORKERS = 2
CASES = {
    "10 ms": (0.01, 400, "guided"),
    "100 ms": (0.1, 60, "guided"),
    "100 ms, one by one": (0.1, 60, 1),
    "1 s": (1.0, 8, 1),
}
"""Seconds of a task, how many there are, and how many of them ours sends at once."""
NETWORK = MLP((36, 64, 1))
BATCH = 256
WARM_UP = 20


def rows():
    """The rows of all tasks: about 4 MB."""
    table = load_table("late", month=1).train
    return table.X.astype(np.float32), table.y.astype(np.float32)


def train(task, data):
    """One task: ``(rate, steps)``; returns the loss of the last batch."""
    (rate, steps), (X, y) = task, data
    w, random = NETWORK.initialise(0, np.float32), np.random.default_rng(0)
    sgd, state = SGD(rate), {"steps": 0}
    for _ in range(steps):
        batch = random.integers(len(y), size=BATCH)
        loss, gradient = NETWORK.loss_and_gradient(w, X[batch], y[batch])
        sgd.step(w, gradient, state)
    return loss


def configurations(n, steps):
    """So many tasks, each with a rate of its own."""
    return [(0.01 * 1.01**k, steps) for k in range(n)]


# ---------------------------------------------------------------- the sides


def _report(search, n, steps):
    """Run a search twice, first a small one, and report the second."""
    search(configurations(WARM_UP, 1))
    start = time.perf_counter()
    losses = search(configurations(n, steps))
    report([time.perf_counter() - start, list(losses)])


def ours(n, steps, batch):
    """Measure ours once, in this process, and report it; the other sides in the same way."""
    data = rows()
    with open_cluster(workers=WORKERS) as cluster:

        def search(tasks):
            done = run_tasks(cluster.client, train, tasks, shared=data, batch=batch)
            values = {result.number: result.value for result in done}
            return [values[number] for number in range(len(tasks))]

        _report(search, n, steps)


def loky(n, steps, batch):
    """Joblib with its default backend."""
    from joblib import Parallel, delayed

    data = rows()

    def search(tasks):
        return Parallel(n_jobs=WORKERS, backend="loky")(delayed(train)(t, data) for t in tasks)

    _report(search, n, steps)


def with_ray(n, steps, batch):
    """Ray on two CPUs."""
    import ray

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    data, remote = rows(), ray.remote(train)

    def search(tasks):
        placed = ray.put(data)
        return ray.get([remote.remote(task, placed) for task in tasks])

    _report(search, n, steps)
    ray.shutdown()


def limit(n, steps, batch):
    """Two bare processes that begin together; the later end counts."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(WORKERS), context.Queue()
    processes = [
        context.Process(target=_bare, args=(number, n, steps, barrier, found))
        for number in range(WORKERS)
    ]
    for process in processes:
        process.start()
    parts = dict(found.get() for _ in processes)
    for process in processes:
        process.join()
    losses = np.empty(n)
    for number, (_, part) in parts.items():
        losses[number::WORKERS] = part
    report([max(seconds for seconds, _ in parts.values()), losses.tolist()])


def _bare(number, n, steps, barrier, found):
    """One of the bare processes: every second task."""
    data = rows()
    for task in configurations(WARM_UP, 1):
        train(task, data)
    barrier.wait()
    start = time.perf_counter()
    losses = [train(task, data) for task in configurations(n, steps)[number::WORKERS]]
    found.put((number, (time.perf_counter() - start, losses)))


SIDES = {"ours": ours, "loky": loky, "ray": with_ray, "limit": limit}


def calibrate(steps=300):
    """Report the seconds of one step on one core, the quickest of several runs."""
    data, seconds = rows(), []
    for _ in range(5):
        start = time.perf_counter()
        train((0.1, steps), data)
        seconds.append((time.perf_counter() - start) / steps)
    report(min(seconds))


def run(rounds=ROUNDS, cases=CASES):
    """Measure all cases.

    Parameters
    ----------
    rounds : int
    cases : dict, optional
        Seconds of a task, their number, and the size of our batches, by name.

    Returns
    -------
    list of Case
        With ``more["of_limit"]``: the limit divided by ours.

    Raises
    ------
    RuntimeError
        A side failed, or found other losses than ours.
    """
    sides = dict(SIDES)
    if not find_spec("ray"):
        print("Note: ray is left out: it is not installed (benchmarks/requirements.in).")
        del sides["ray"]
    return [_case(name, *case, sides, rounds) for name, case in cases.items()]


def _case(name, seconds, n, batch, sides, rounds):
    step = launch.python("from benchmarks.task_search import calibrate; calibrate()")
    steps, found = max(1, round(seconds / step)), {}

    def measure(side):
        program = (
            "from benchmarks.task_search import SIDES\n"
            f"if __name__ == '__main__': SIDES[{side!r}]({n}, {steps}, {batch!r})"
        )
        took, losses = launch.python(program)
        if losses != found.setdefault("losses", losses):
            raise RuntimeError(f"{side} found other losses than ours, so it was not measured.")
        return took

    medians = interleaved({side: lambda side=side: measure(side) for side in sides}, rounds)
    least = medians.pop("limit")
    more = {"of_limit": least / medians["ours"]}
    return Case(name, medians.pop("ours"), medians, least, more)
