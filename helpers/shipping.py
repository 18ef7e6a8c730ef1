"""What the workers of a cluster are given: one BLAS thread each, the course's modules and data.

Workers that were started on this machine find the modules and data where the reader has them.
Those of a cluster that was joined may share no folder with the reader: the files are sent to
them, and to the scheduler, which must understand the tasks it passes on. They are taken back when
the reader's client leaves, also when it was killed.

The plugin classes are made inside functions on purpose: cloudpickle then sends their code by
value, and a worker that has never heard of the course can run it.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from distributed import SchedulerPlugin, WorkerPlugin


def give_to_workers(client) -> None:
    """Hold the BLAS libraries of all workers, present and future, to one thread."""
    client.register_plugin(_worker_plugin(None), name="many-hands")


def send_course(client, name: str) -> None:
    """Send modules and data to the scheduler and to all workers, present and future.

    Parameters
    ----------
    client : distributed.Client
        When it leaves, the scheduler takes everything back.
    name : str
        Tells apart several readers of one cluster.
    """
    client.register_plugin(_scheduler_plugin(_archive(data=False), client.id, name), name=name)
    client.register_plugin(_worker_plugin(_archive(data=True)), name=name)


def _archive(data: bool) -> bytes:
    """The modules, and if asked the data, of the course as one zip archive (about 6 MB)."""
    package = Path(__file__).parent
    top = package.parent
    files = list(package.rglob("*.py"))
    if data:
        files += [p for p in (top / "data").rglob("*") if p.is_file() and p.suffix != ".py"]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
        for path in sorted(files):
            out.write(path, path.relative_to(top).as_posix())
    return archive.getvalue()


def _course_folder(files: bytes):
    """A folder with the course's files on the receiving machine, found by ``import helpers``."""

    class CourseFolder:
        def unpack(self, within):
            import io
            import sys
            import tempfile
            import zipfile

            self.path = tempfile.mkdtemp(prefix="many-hands-", dir=within)
            with zipfile.ZipFile(io.BytesIO(files)) as archive:
                archive.extractall(self.path)
            sys.path.insert(0, self.path)
            self.forget_modules()

        def remove(self):
            import shutil
            import sys

            sys.path[:] = [path for path in sys.path if path != self.path]
            self.forget_modules()
            shutil.rmtree(self.path, ignore_errors=True)

        def forget_modules(self):
            """The next import finds the version that stands first now, not one loaded before."""
            import sys

            for name in [n for n in sys.modules if n.split(".")[0] == "helpers"]:
                del sys.modules[name]

    return CourseFolder()


def _scheduler_plugin(files: bytes, client_id: str, name: str):
    """The modules for the scheduler; care for dead workers; the end of the visit."""

    folder = _course_folder(files)

    class CourseScheduler(SchedulerPlugin):
        def start(self, scheduler):
            self.scheduler = scheduler
            folder.unpack(scheduler.local_directory)

        def transition(self, key, start, finish, *args, **kwargs):
            if finish == "no-worker":
                self.scheduler.loop.add_callback(self.let_others_run, key)

        def let_others_run(self, key):
            """When all workers that a reader uses have died, the others take over the tasks."""
            task = self.scheduler.tasks.get(key)
            if task is None or task.state != "no-worker" or not task.worker_restrictions:
                return
            wanted_by = {c.client_key for t in (task, *task.dependents) for c in t.who_wants}
            if client_id in wanted_by and task.worker_restrictions.isdisjoint(
                self.scheduler.workers
            ):
                task.worker_restrictions = None
                self.scheduler.transitions({key: "processing"}, stimulus_id=f"{name}-{key}")

        def remove_client(self, scheduler, client):
            if client == client_id:
                folder.remove()
                scheduler.remove_plugin(name)
                scheduler.loop.add_callback(scheduler.unregister_worker_plugin, None, name)

        async def close(self):
            folder.remove()

    return CourseScheduler()


def _worker_plugin(files: bytes | None):
    """One BLAS thread, and the course's files if there are any to send."""

    folder = _course_folder(files) if files else None

    class CourseWorker(WorkerPlugin):
        def setup(self, worker):
            import os

            import numpy  # noqa: F401 (loads BLAS, so that its threads can be limited)
            from threadpoolctl import threadpool_limits

            # The variables hold back libraries that are loaded later, the call those loaded now.
            # (VECLIB: Apple's library, which threadpoolctl cannot see.)
            names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
            names += ["VECLIB_MAXIMUM_THREADS"]
            self.before = {name: os.environ.get(name) for name in names}
            os.environ.update(dict.fromkeys(names, "1"))
            self.limits = threadpool_limits(limits=1)
            if folder:
                folder.unpack(worker.local_directory)
            else:
                self.ignore_interrupts()

        def ignore_interrupts(self):
            """Jupyter sends an interrupt to a kernel and all its processes; it is not for us."""
            import signal
            import threading

            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)

        def teardown(self, worker):
            import os

            for name, value in self.before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            self.limits.restore_original_limits()
            if folder:
                folder.remove()

    return CourseWorker()
