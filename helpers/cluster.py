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

import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
import zipfile
from pathlib import Path

import dask
import psutil
from distributed import Client, LocalCluster, WorkerPlugin

WORKER_MEMORY = 160 * 2**20
"""Bytes that one worker takes after it imported NumPy, pandas and scikit-learn (measured)."""

WORKERS_PER_CORE = 8
"""More worker processes than this on one core only wait for each other."""

CONNECT_SECONDS = 6
START_SECONDS = 60


# ---------------------------------------------------------------- what this machine offers


def _cgroup_folders(root: Path, membership: Path):
    """Folders of the control groups that hold this process, from its own up to the root.

    A limit may be set at any level, and the tightest one counts. Dask and joblib read only one
    level, so a limit that a batch system or a container sets one level up is lost on them.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root
        if controllers:  # version 1: one tree a controller
            base = next((p for p in (root / controllers, *_v1_names(root, controllers))), root)
        folder = base / path.lstrip("/")
        while folder != base and base in folder.parents:
            yield folder
            folder = folder.parent
        yield base


def _v1_names(root: Path, controllers: str):
    """Other names under which version 1 mounts the same controllers (``cpuacct,cpu``)."""
    names = controllers.split(",")
    yield root / ",".join(reversed(names))
    yield from (root / name for name in names)


def _numbers(file: Path) -> list[int]:
    """The whole numbers in a control file; empty when it is absent or says ``max``."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


def usable_cores(root="/sys/fs/cgroup", membership="/proc/self/cgroup") -> int:
    """Number of cores that this process may use.

    The smallest of: the cores of the machine, the CPU affinity of this process, and the CPU quota
    of its control groups (versions 1 and 2, every level). A quota of 1.5 cores counts as one: a
    second worker would be stopped half of the time.

    Parameters
    ----------
    root, membership : path
        Where control groups are mounted, and the file that names those of this process.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> usable_cores() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    for folder in _cgroup_folders(Path(root), Path(membership)):
        both = _numbers(folder / "cpu.max")
        if not both:
            both = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        if len(both) == 2 and both[0] > 0 and both[1] > 0:
            cores = min(cores, int(both[0] / both[1]))
    return max(1, cores)


def usable_memory(root="/sys/fs/cgroup", membership="/proc/self/cgroup") -> int:
    """Bytes of memory that are free for this process and its workers at this moment.

    The smaller of what the machine has available and what the control groups of this process
    still allow (their limit less what they use; file caches do not count as used).

    Returns
    -------
    int
        Bytes, at least 0.
    """
    free = psutil.virtual_memory().available
    for folder in _cgroup_folders(Path(root), Path(membership)):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            numbers = _numbers(folder / limit) + _numbers(folder / used)
            if len(numbers) == 2:
                free = min(free, numbers[0] - numbers[1] + _memory_stat(folder, cache))
    return max(0, free)


def _memory_stat(folder: Path, name: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


# ---------------------------------------------------------------- what every worker is given


def _course_files() -> bytes:
    """The modules and data of the course as one zip archive, about 6 MB."""
    package = Path(__file__).parent
    data = package.parent / "data"
    files = [(p, f"helpers/{p.relative_to(package).as_posix()}") for p in package.rglob("*.py")]
    files += [(p, f"data/{p.relative_to(data).as_posix()}") for p in data.rglob("*.parquet")]
    files += [(p, f"data/{p.name}") for p in data.glob("SHA256SUMS")]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
        for path, name in sorted(files, key=lambda pair: pair[1]):
            out.write(path, name)
    return archive.getvalue()


def _worker_plugin(files: bytes | None):
    """What a worker does when it joins the course, and what it takes back when it leaves.

    The class is made inside this function on purpose: cloudpickle then sends its code by value,
    and a worker that has never heard of the course can run it.
    """

    class CourseWorker(WorkerPlugin):
        def __init__(self):
            self.files = files

        def setup(self, worker):
            import io
            import os
            import sys
            import tempfile
            import zipfile

            import numpy  # noqa: F401 (loads BLAS, so that its threads can be limited)
            from threadpoolctl import threadpool_limits

            # The variables hold back libraries that are loaded later, the call those loaded now.
            self.variables = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
            self.before = {name: os.environ.get(name) for name in self.variables}
            os.environ.update(dict.fromkeys(self.variables, "1"))
            self.limits = threadpool_limits(limits=1)
            self.folder = None
            if self.files:
                self.folder = tempfile.mkdtemp(prefix="many-hands-", dir=worker.local_directory)
                with zipfile.ZipFile(io.BytesIO(self.files)) as archive:
                    archive.extractall(self.folder)
                sys.path.insert(0, self.folder)
                self.forget(sys.modules)

        def teardown(self, worker):
            import os
            import shutil
            import sys

            for name, value in self.before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            self.limits.restore_original_limits()
            if self.folder:
                sys.path[:] = [path for path in sys.path if path != self.folder]
                self.forget(sys.modules)
                shutil.rmtree(self.folder, ignore_errors=True)

        def forget(self, modules):
            """The next import of helpers finds the reader's version, not one loaded before."""
            for name in [n for n in modules if n == "helpers" or n.startswith("helpers.")]:
                del modules[name]

    return CourseWorker()


class _CourseClient(Client):
    """A client whose tasks go only to the workers in use.

    On a cluster that was joined we may not stop other people's workers. "Use two of its five
    workers" therefore means: send the tasks to those two. Should all of them die, the tasks go
    to the others rather than wait for ever.
    """

    in_use: list[str] | None = None

    def _graph_to_futures(self, *args, workers=None, allow_other_workers=None, **kwargs):
        if self.in_use and not workers:
            workers, allow_other_workers = list(self.in_use), True
        return super()._graph_to_futures(
            *args, workers=workers, allow_other_workers=allow_other_workers, **kwargs
        )

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
    def max_workers(self) -> int:
        """The largest number that `scale` accepts now."""
        raise NotImplementedError

    def scale(self, workers: int) -> None:
        """Change the number of workers in use, while everything else goes on.

        Results that lie on a worker that leaves are moved to another one first.
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

    def close(self) -> None:
        """Leave the cluster; stop the workers that were started here. May be called twice."""
        self._finalizer()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __repr__(self) -> str:
        # No address and no port: notebooks are stored with what is printed here.
        if not self._finalizer.alive:
            return "<Cluster: closed>"
        where = "of a cluster that was joined" if self.joined else "on this machine"
        number = self.n_workers
        return f"<Cluster: {number} worker{'s' * (number != 1)} {where}, one thread each>"


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
            self._local = LocalCluster(
                n_workers=0,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",
                scheduler_port=0,
                local_directory=folder,
                memory_limit=_memory_limit(workers),
                silence_logs=logging.CRITICAL,
            )
            self.client = _CourseClient(self._local)
            self._local.scale(workers)
            self._wait_for(workers)
            self.client.register_plugin(_worker_plugin(None), name="many-hands")
        except BaseException:
            _stop(self.client, self._local, folder, sweeper)
            raise
        # Runs on close(), when the object is forgotten, and when the interpreter ends.
        self._finalizer = weakref.finalize(self, _stop, self.client, self._local, folder, sweeper)

    @property
    def workers(self):
        info = self.client.scheduler_info()["workers"]
        return sorted(info, key=lambda address: int(info[address]["name"]))

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
        self._local.scale(workers)
        self._wait_for(workers)

    def _wait_for(self, workers):
        end = time.monotonic() + START_SECONDS
        while {len(self.client.scheduler_info()["workers"]), len(self._local.workers)} != {workers}:
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
        name = f"many-hands-{uuid.uuid4().hex[:8]}"  # several readers may share the cluster
        try:
            if not self._all():
                raise RuntimeError(
                    f"The cluster at {address} has no worker: start one with "
                    f"`dask worker {address}`, then run the cell again."
                )
            self.scale(self.max_workers if workers is None else workers)
            self.client.register_plugin(_worker_plugin(_course_files()), name=name)
        except BaseException:
            self.client.close()
            raise
        self._finalizer = weakref.finalize(self, _leave, self.client, name)

    def _all(self):
        return sorted(self.client.scheduler_info()["workers"])

    @property
    def workers(self):
        return [w for w in self._all() if not self.client.in_use or w in self.client.in_use]

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


def _leave(client, plugin: str) -> None:
    _quietly(lambda: client.unregister_worker_plugin(plugin))
    _quietly(client.close)


def _quietly(act) -> None:
    """Go on with the cleaning when one part of it fails: the scheduler may be gone already."""
    try:
        act()
    except Exception as error:
        logging.getLogger(__name__).debug("while closing: %r", error)
