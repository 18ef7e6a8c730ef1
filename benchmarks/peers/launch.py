"""Start the ranks of one side: two processes here, in two network namespaces, or by mpiexec.

A network namespace of Linux has its own interfaces, addresses and routes. Two of them joined by a
pair of virtual Ethernet interfaces (veth) are two hosts for TCP: everything between them goes
through the kernel's network stack, and nothing can take a short cut through loopback.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import ROOT, quiet_environment

PATIENCE = 300


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes
    ----------
    prefix : tuple of str
        What stands before the command.
    address, interface : str
        How the other rank reaches it.
    """

    prefix: tuple = ()
    address: str = "127.0.0.1"
    interface: str = "lo" if sys.platform == "linux" else "lo0"


# ---------------------------------------------------------------- which peers are there


def mpiexec():
    """Path of the mpiexec that belongs to this Python, else of the system's; None without one."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def missing(peer):
    """Why a peer cannot be measured here: one sentence, or None when it can.

    Parameters
    ----------
    peer : {"gloo", "ddp", "mpi"}
    """
    if peer == "mpi" and not (find_spec("mpi4py") and mpiexec()):
        return "mpi is left out: mpi4py or mpiexec is not installed (benchmarks/requirements.in)."
    if peer != "mpi" and not find_spec("torch"):
        return f"{peer} is left out: torch is not installed (benchmarks/requirements.in)."
    return None


def present(peers):
    """Those peers that can be measured; a note is printed for each of the others."""
    reasons = {peer: missing(peer) for peer in peers}
    for reason in filter(None, reasons.values()):
        print(f"Note: {reason}")
    return [peer for peer in peers if reasons[peer] is None]


# ---------------------------------------------------------------- network namespaces


@contextmanager
def namespaces():
    """Two network namespaces joined by a veth pair; removed at the end, also after a failure.

    Yields
    ------
    list of Place

    Raises
    ------
    RuntimeError
        They cannot be made here: not Linux, not root, or no ``ip`` command.
    """
    names = [f"mh-{os.getpid()}-{side}" for side in "ab"]
    interfaces = [f"mh{os.getpid()}{side}" for side in "ab"]
    addresses = ["10.98.0.1", "10.98.0.2"]
    try:
        for name in names:
            _ip("netns", "add", name)
        first = ["link", "add", interfaces[0], "netns", names[0]]
        _ip(*first, "type", "veth", "peer", "name", interfaces[1], "netns", names[1])
        for name, interface, address in zip(names, interfaces, addresses):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield [
            Place(("ip", "netns", "exec", *place[:1]), *place[1:])
            for place in zip(names, addresses, interfaces)
        ]
    finally:
        for name in names:
            _ip("netns", "del", name, check=False)


def _ip(*arguments, check=True):
    try:
        result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        if check:
            raise RuntimeError("Network namespaces need Linux's ip command (iproute2).") from None
        return
    if check and result.returncode:
        raise RuntimeError(f"No network namespace can be made here: {result.stderr.strip()}")


@contextmanager
def two_places():
    """Two namespaces where they can be made, else loopback twice.

    Yields
    ------
    places : list of Place
    name : str
        "TCP" or "TCP loopback", for the name of the case.
    """
    with ExitStack() as stack:
        try:
            places, name = stack.enter_context(namespaces()), "TCP"
        except RuntimeError as error:
            print(f"Note: {error} TCP goes over loopback instead.")
            places, name = [Place(), Place()], "TCP loopback"
        yield places, name


# ---------------------------------------------------------------- processes


def environment():
    """The environment of every measured process: it finds the course's modules."""
    return quiet_environment() | {"PYTHONPATH": str(ROOT), "MKL_NUM_THREADS": "1"}


def measured(*commands, prepare=None):
    """Run commands side by side and return what the first one reports.

    Parameters
    ----------
    *commands : sequence of str
    prepare : dict, optional
        More environment variables.

    Returns
    -------
    object
        The last line that the first command prints, read as JSON.

    Raises
    ------
    RuntimeError
        A command failed, or all together took longer than five minutes.
    """
    with tempfile.TemporaryDirectory(prefix="mh-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        settings = environment() | {"TMPDIR": name, "TEMP": name, "TMP": name} | (prepare or {})
        with running(commands, folder, settings) as processes:
            _await(processes, folder)
        lines = (folder / "0.stdout").read_text().splitlines()
    if not lines:
        raise RuntimeError("A measured program printed nothing.")
    return json.loads(lines[-1])


@contextmanager
def running(commands, folder, settings):
    """Processes of which none outlives the block.

    What number N prints goes to the files ``N.stdout`` and ``N.stderr`` of a folder.

    Parameters
    ----------
    commands : sequence of sequences of str
    folder : Path
    settings : dict
        The environment.

    Yields
    ------
    list of subprocess.Popen
    """
    processes = []
    try:
        for number, command in enumerate(commands):
            with ExitStack() as stack:
                files = {
                    name: stack.enter_context(open(folder / f"{number}.{name}", "w"))
                    for name in ("stdout", "stderr")
                }
                processes.append(subprocess.Popen(command, cwd=ROOT, env=settings, **files))
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(processes, folder):
    end = time.monotonic() + PATIENCE
    while None in (statuses := [process.poll() for process in processes]):
        if any(statuses):
            break
        if time.monotonic() > end:
            raise RuntimeError(f"A measured program took longer than {PATIENCE} s.")
        time.sleep(0.05)
    for number, process in enumerate(processes):
        if process.returncode:
            lines = (folder / f"{number}.stderr").read_text().strip().splitlines()
            raise RuntimeError(f"A measured program failed: {(lines or ['it said nothing'])[-1]}")


def ranks(module, *arguments, places=(Place(), Place())):
    """Two processes of a module, one a rank, and what rank 0 reports.

    Each gets the arguments, then its number, its own interface, rank 0's address, and the name of
    a file in which the ranks may meet.
    """
    with tempfile.TemporaryDirectory(prefix="mh-", ignore_cleanup_errors=True) as folder:
        commands = []
        for index, place in enumerate(places):
            command = [*place.prefix, sys.executable, "-m", module, *arguments]
            command += [str(index), place.interface, places[0].address, f"{folder}/meet"]
            commands.append(command)
        return measured(*commands)


def mpi_ranks(module, *arguments):
    """Two processes of a module under mpiexec, and what it prints."""
    options = ["--allow-run-as-root", "--oversubscribe", "-n", "2"]
    # Shared memory only: no network interface is looked for.
    return measured(
        [mpiexec(), *options, sys.executable, "-m", module, *arguments],
        prepare={"OMPI_MCA_btl": "self,sm"},
    )


def python(program, place=None):
    """Run a Python program given as text, and return what it reports."""
    return measured([*(place or Place()).prefix, sys.executable, "-c", program])


@contextmanager
def dask_across(places):
    """A Dask scheduler at the first place and a worker with one thread at each.

    Yields
    ------
    str
        Path of the scheduler file: ``Client(scheduler_file=...)`` joins.
    """
    cli = [sys.executable, "-m"]
    with tempfile.TemporaryDirectory(prefix="mh-", ignore_cleanup_errors=True) as name:
        file = f"{name}/scheduler.json"
        shared = ["--no-dashboard", "--scheduler-file", file, "--host"]
        worker = [*cli, "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny"]
        worker += ["--local-directory", name]
        scheduler = [*cli, "distributed.cli.dask_scheduler", "--port", "0"]
        commands = [[*places[0].prefix, *scheduler, *shared, places[0].address]]
        commands += [[*place.prefix, *worker, *shared, place.address] for place in places]
        with running(commands, Path(name), environment()):
            yield file
