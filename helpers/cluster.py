"""Open, join, resize and describe a Dask cluster.

One call, `open_cluster`, serves everywhere. Without further settings it starts worker processes on
this machine. When the environment variable ``DASK_SCHEDULER_ADDRESS`` names a scheduler, the same
call joins that cluster instead and sends the course's modules and data to its workers, which may
share no folder with the reader. TLS comes from Dask's own configuration
(``distributed.comm.tls``), see https://distributed.dask.org/en/stable/tls.html.

Every worker has one thread, and its BLAS library is held to one thread too: otherwise the
libraries of several workers compete for the same cores, and measured speed-ups mean nothing.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
import weakref

import dask
from distributed import Client, LocalCluster, Nanny

from helpers.limits import usable_cores, usable_memory
from helpers.shipping import give_to_workers, send_course

__all__ = ["Cluster", "open_cluster", "usable_cores", "usable_memory"]

WORKER_MEMORY = 160 * 2**20
"""Bytes that one worker takes after it imported NumPy, pandas and scikit-learn (measured)."""

WORKERS_PER_CORE = 8
"""More worker processes than this on one core only wait for each other."""

KEPT = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 2**22,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 2**20,
}
"""For the C library of workers, bytes: how much of what was freed it keeps, and from which size on
an array is taken from the system, and given back at once."""

CALM = {
    "distributed.worker.profile.interval": "1s",
    "distributed.worker.memory.monitor-interval": "200ms",
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
}
"""How often a worker looks at its own stack and memory, and each process at its own event loop and
machine. Dask's 10, 100, 20 and 500 ms take a fortieth of every core from the work (measured)."""

CONNECT_SECONDS = 6
START_SECONDS = 60


class _CourseClient(Client):
    """A client whose tasks go only to the workers in use.

    On a cluster that was joined we may not stop other people's workers. "Use two of its five
    workers" therefore means: send the tasks to those two.
    """

    in_use: list[str] | None = None

    def workers_now(self) -> dict[str, dict]:
        """What the scheduler knows of all workers at this moment, by address.

        Not `scheduler_info`: its answer is a copy that is renewed, and now and then emptied, in
        the background.
        """
        return self.sync(self.scheduler.identity, n_workers=-1)["workers"]

    def _graph_to_futures(self, *args, workers=None, **kwargs):
        return super()._graph_to_futures(*args, workers=workers or self.in_use, **kwargs)

    def scatter(self, data, workers=None, **kwargs):
        return super().scatter(data, workers=workers or self.in_use, **kwargs)


# ---------------------------------------------------------------- the cluster


def open_cluster(workers: int | None = None) -> Cluster:
    """Start worker processes on this machine, or join the cluster named in the environment.

    Parameters
    ----------
    workers : int, optional
        How many workers to use. Default: on this machine, one a usable core; on a cluster that
        is joined, all it has.

    Returns
    -------
    Cluster
        Also a context manager: ``with open_cluster(2) as cluster: …``.

    Raises
    ------
    ValueError
        The number of workers is impossible; the message says what is possible.
    RuntimeError
        The workers did not start, or nobody answers at ``DASK_SCHEDULER_ADDRESS``.

    Examples
    --------
    >>> with open_cluster(workers=2) as cluster:  # doctest: +SKIP
    ...     cluster.client.submit(sum, [1, 2, 3]).result()
    6
    """
    address = os.environ.get("DASK_SCHEDULER_ADDRESS") or dask.config.get("scheduler-address", None)
    return _JoinedCluster(address, workers) if address else _LocalCluster(workers)


class Cluster:
    """Workers that are running, and the client that gives them work.

    Attributes
    ----------
    client : distributed.Client
        Sends tasks to the workers in use.
    joined : bool
        True when the workers belong to a cluster that was joined.
    """

    client: Client
    joined: bool

    @property
    def workers(self) -> list[str]:
        """Addresses of the workers in use, in a fixed order."""
        raise NotImplementedError

    @property
    def n_workers(self) -> int:
        """How many workers are in use."""
        return len(self.workers)

    @property
    def cores(self) -> int:
        """Cores that the workers can share: beyond them, more workers take turns."""
        raise NotImplementedError

    @property
    def max_workers(self) -> int:
        """The largest number that `scale` accepts now."""
        raise NotImplementedError

    def scale(self, workers: int) -> None:
        """Change the number of workers in use, while everything else goes on.

        Results that lie on a worker that leaves are moved to another one first, but not while an
        actor lives on it: Dask then leaves everything where it is.
        """
        raise NotImplementedError

    @property
    def dashboard_link(self) -> str | None:
        """Address of Dask's dashboard, as the reader's browser reaches it.

        Behind a JupyterHub (Binder too) the page goes through jupyter-server-proxy.
        """
        link = self.client.dashboard_link
        prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
        if not link or not prefix or "/proxy/" in link:
            return link
        host, port = link.split("://")[1].split("/")[0].rsplit(":", 1)
        here = host in ("127.0.0.1", "localhost")
        return f"{prefix}proxy/{port if here else f'{host}:{port}'}/status"

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Leave the cluster; stop the workers that were started here. May be called twice."""
        self._finalizer()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __repr__(self) -> str:
        # No address and no port: notebooks are stored with what is printed here.
        if self.closed:
            return "<Cluster: closed>"
        where = "of a cluster that was joined" if self.joined else "on this machine"
        number = self.n_workers
        return f"<Cluster: {number} worker{'s' * (number != 1)} {where}, one thread each>"


class _KeepingNanny(Nanny):
    """Starts a worker that keeps some memory which was freed, for the next array of that size.

    Dask's own setting gives back to the system whatever is over 64 KiB, and so takes each array of
    128 KiB and more anew, page by page. A step of a GPT of four blocks on two ranks
    takes a third more processor time with it (measured). More is not kept, so that a notebook
    fits into a gigabyte. The worker also looks at itself less often, see `CALM`.
    """

    def __init__(self, *args, **kwargs):
        with dask.config.set(KEPT | CALM):
            # A copy: a worker starts later, when Dask's own settings hold again.
            super().__init__(*args, config=copy.deepcopy(dask.config.config), **kwargs)


class _LocalCluster(Cluster):
    joined = False

    def __init__(self, workers: int | None):
        workers = min(usable_cores(), self.max_workers) if workers is None else workers
        workers = _checked(workers, self.max_workers, self._why_no_more())
        folder = tempfile.mkdtemp(prefix="many-hands-")
        sweeper = _start_sweeper(folder)
        self._local = self.client = None
        try:
            # First without workers: an interrupt from here on finds the cluster in our hands.
            # The temporary files are those of the scheduler, too.
            with dask.config.set({"temporary_directory": folder} | CALM):
                self._local = LocalCluster(
                    worker_class=_KeepingNanny,
                    n_workers=0,
                    threads_per_worker=1,
                    dashboard_address="127.0.0.1:0",
                    scheduler_port=0,
                    local_directory=folder,
                    memory_limit=_memory_limit(workers),
                    silence_logs=logging.CRITICAL,
                )
            # Straight to the workers: what they send need not pass through the scheduler.
            self.client = _CourseClient(self._local, direct_to_workers=True)
            self._local.scale(workers)
            self._wait_for(workers)
            give_to_workers(self.client)
        except BaseException:
            _stop(self.client, self._local, folder, sweeper)
            raise
        # Runs on close(), when the object is forgotten, and when the interpreter ends.
        self._finalizer = weakref.finalize(self, _stop, self.client, self._local, folder, sweeper)

    @property
    def workers(self):
        info = self.client.workers_now()
        return sorted(info, key=lambda address: int(info[address]["name"]))

    @property
    def cores(self):
        return usable_cores()

    @property
    def max_workers(self):
        running = len(self._local.workers) if getattr(self, "_local", None) else 0
        by_memory = running + usable_memory() // WORKER_MEMORY
        return int(max(1, min(WORKERS_PER_CORE * usable_cores(), by_memory)))

    def _why_no_more(self):
        cores, free = usable_cores(), usable_memory() / 2**30
        return (
            f"this machine has {cores} usable core{'s' * (cores != 1)} and {free:.1f} GiB of free "
            f"memory, and a worker needs about {WORKER_MEMORY / 2**30:.2f} GiB"
        )

    def scale(self, workers):
        workers = _checked(workers, max(self.max_workers, self.n_workers), self._why_no_more())
        if leaving := self.workers[workers:]:
            # Dask would only close them, with all that lies on them.
            self.client.retire_workers(leaving, close_workers=False)
        self._local.scale(workers)
        self._wait_for(workers)

    def _wait_for(self, workers):
        end = time.monotonic() + START_SECONDS
        while {len(self.client.workers_now()), len(self._local.workers)} != {workers}:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"{workers} workers did not start within {START_SECONDS} s: "
                    "close other programs, ask for fewer workers, and run the cell again."
                )
            time.sleep(0.02)


class _JoinedCluster(Cluster):
    joined = True

    def __init__(self, address: str, workers: int | None):
        self.client = _connect(address)
        try:
            if not self._all():
                raise RuntimeError(
                    f"The cluster at {address} has no worker: start one with "
                    f"`dask worker {address}`, then run the cell again."
                )
            self.scale(self.max_workers if workers is None else workers)
            send_course(self.client, name=f"many-hands-{uuid.uuid4().hex[:8]}")
        except BaseException:
            self.client.close()
            raise
        self._finalizer = weakref.finalize(self, _quietly, self.client.close)

    def _all(self):
        return sorted(self.client.workers_now())

    @property
    def workers(self):
        return [w for w in self._all() if not self.client.in_use or w in self.client.in_use]

    @property
    def cores(self):
        # Its hosts cannot be asked for their limits; who started a worker gave it its threads.
        return sum(self.client.nthreads().values())

    @property
    def max_workers(self):
        return len(self._all())

    def scale(self, workers):
        every = self._all()
        why = f"the cluster that was joined has {len(every)} worker{'s' * (len(every) != 1)}"
        workers = _checked(workers, len(every), why)
        self.client.in_use = None if workers == len(every) else every[:workers]


def _checked(workers, most: int, why: str) -> int:
    """The number of workers, or one sentence that says which numbers are possible."""
    whole = isinstance(workers, int) and not isinstance(workers, bool)
    if not whole and hasattr(workers, "__index__") and not isinstance(workers, bool):
        workers, whole = workers.__index__(), True  # NumPy's integers
    if not whole or workers < 1:
        raise ValueError(f"workers must be a whole number from 1 to {most}, not {workers!r}.")
    if workers > most:
        raise ValueError(f"{workers:,} workers are too many: {why}, so ask for 1 to {most}.")
    return workers


def _memory_limit(workers: int) -> int:
    """Bytes after which Dask restarts a worker: its share of what is free now."""
    return max(WORKER_MEMORY * 2, usable_memory() // max(workers, usable_cores()))


def _connect(address: str) -> _CourseClient:
    try:
        return _CourseClient(address, timeout=CONNECT_SECONDS, set_as_default=True)
    except (OSError, ValueError, TypeError) as error:
        cause = str(error).split("\n")[0].split(" after ")[0]
        raise RuntimeError(
            f"No Dask scheduler answers at {address} (DASK_SCHEDULER_ADDRESS): start it, correct "
            f"the address, or unset the variable to use this machine. Cause: {cause}"
        ) from None


# ---------------------------------------------------------------- leaving nothing behind


def _start_sweeper(folder: str) -> subprocess.Popen:
    """A small process that removes the workers' folder when this process dies.

    Nothing in this process runs after a SIGKILL, for example when a kernel is restarted in the
    middle of a long cell. The workers notice by themselves; their files need somebody else. The
    sweeper waits for the end of its standard input, which comes when this process is gone.
    """
    program = (
        "import shutil, sys, time; sys.stdin.read(); folder = sys.argv[1]\n"
        "for _ in range(30): shutil.rmtree(folder, ignore_errors=True); time.sleep(0.1)"
    )
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal is not meant for it
    )


def _stop(client, local, folder: str, sweeper: subprocess.Popen) -> None:
    for part in (client, local):
        if part is not None:
            _quietly(part.close)
    shutil.rmtree(folder, ignore_errors=True)
    sweeper.kill()
    sweeper.stdin.close()
    sweeper.wait()


def _quietly(act) -> None:
    """Go on with the cleaning when one part of it fails: the scheduler may be gone already."""
    try:
        act()
    except Exception as error:
        logging.getLogger(__name__).debug("while closing: %r", error)
