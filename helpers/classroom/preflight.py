"""The room check: is this machine ready for the course?

Run it in notebook 00, or in a terminal, for every machine of a classroom::

    python -m helpers.classroom.preflight

Each line says ok, warn or fail, and what to do. The exit status is 1 when a line says fail and 0
otherwise, for a teacher's script. The module itself needs nothing but Python, so that it can
report what is missing.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 11)
MEMORY_WISHED = 1.0  # GiB: a kernel and two workers with the course's data
DISK_WISHED = 0.5  # GiB: scratch files of workers
INSTALL_AGAIN = "run `python3 -m helpers lab` in the course's folder"


@dataclass(frozen=True)
class Line:
    """One line of the report: what was checked, ok / warn / fail, what was seen, what to do."""

    name: str
    level: str
    seen: str
    advice: str = ""

    def __str__(self) -> str:
        words = f"{self.level:<5}{self.name:<10}{self.seen}"
        return f"{words}: {self.advice}" if self.advice else words


def check_python() -> Line:
    """Is Python new enough?"""
    seen = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return Line("python", "fail", seen, f"install Python {wanted} or newer")
    return Line("python", "ok", seen)


def pins(file: Path = REPOSITORY / "requirements.txt") -> dict[str, str]:
    """Versions that requirements.txt asks for on this platform, by package."""
    from packaging.requirements import Requirement

    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            wanted = Requirement(line.split("#")[0].strip())
            if wanted.marker is None or wanted.marker.evaluate():
                found[wanted.name] = str(wanted.specifier).removeprefix("==")
    return found


def check_packages() -> Line:
    """Are the packages there, in the versions of requirements.txt?"""
    try:
        wanted = pins()
    except ImportError:
        return Line("packages", "fail", "the packages are not installed", INSTALL_AGAIN)
    except OSError:
        advice = "run the check in a complete copy of the course"
        return Line("packages", "warn", "no requirements.txt to compare with", advice)
    missing, other = [], []
    for name, version in wanted.items():
        try:
            seen = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
        else:
            if seen != version:
                other.append(f"{name} {seen} instead of {version}")
    if missing:
        return Line("packages", "fail", f"missing: {_few(missing)}", INSTALL_AGAIN)
    if other:
        return Line("packages", "warn", f"other versions: {_few(other)}", INSTALL_AGAIN)
    return Line("packages", "ok", f"{len(wanted)} packages, versions as pinned")


def check_cores() -> Line:
    """How many cores may the course use?"""
    from helpers.cluster import usable_cores

    cores = usable_cores()
    if cores == 1:
        advice = "all notebooks run, but more workers will not be faster here"
        return Line("cores", "warn", "1 usable core", advice)
    return Line("cores", "ok", f"{cores} usable cores")


def check_memory() -> Line:
    """Is there memory for a kernel and two workers?"""
    from helpers.cluster import WORKER_MEMORY, usable_memory

    free = usable_memory()
    seen = f"{free / 2**30:.1f} GiB free"
    if free < 2 * WORKER_MEMORY:
        return Line("memory", "fail", seen, "close other programs: two workers do not fit")
    if free < MEMORY_WISHED * 2**30:
        return Line(
            "memory", "warn", seen, f"close other programs: {MEMORY_WISHED:.0f} GiB is good"
        )
    return Line("memory", "ok", seen)


def check_ports() -> Line:
    """May a program on this machine listen, and another one reach it?"""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return Line("ports", "ok", "programs on this machine reach each other")
    except OSError as error:
        advice = "allow connections to 127.0.0.1 in the firewall"
        return Line("ports", "fail", f"no local connection ({error})", advice)


def check_proxy() -> Line:
    """Would a proxy come between the browser, the kernel and the workers?"""
    names = ("http_proxy", "https_proxy", "all_proxy")
    named = [n for n in names if os.environ.get(n) or os.environ.get(n.upper())]
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if named and not {"127.0.0.1", "localhost", "*"} & set(re.split(r"[\s,]+", spared)):
        advice = "set no_proxy=localhost,127.0.0.1, or use the pictures inside the notebooks"
        return Line("proxy", "warn", f"{named[0]} is set", advice)
    return Line("proxy", "ok", "none in the way")


def check_disk() -> Line:
    """Is there room for the workers' scratch files?"""
    folder = tempfile.gettempdir()
    try:
        with tempfile.NamedTemporaryFile(prefix="many-hands-") as file:
            file.write(b"x" * 4096)
            file.flush()
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        advice = "free some disk space, or set TMPDIR to a folder that can be written"
        return Line("disk", "fail", f"the folder for temporary files refuses ({error})", advice)
    if free < DISK_WISHED:
        return Line("disk", "warn", f"{free:.1f} GiB free", "free some disk space")
    return Line("disk", "ok", f"{free:.0f} GiB free")


def check_data() -> Line:
    """Are the flights there, unchanged?"""
    from helpers.datasets import verify

    problems = verify()
    if problems:
        return Line("data", "fail", problems[0])  # the sentence says what to do
    return Line("data", "ok", "all files there, checksums right")


def check_widgets() -> Line:
    """Will sliders appear in the browser?

    The kernel's part and the browser's part of ipywidgets are two packages; they must both be
    there, and their protocol versions must agree.
    """
    try:
        kernel_part = importlib.metadata.version("ipywidgets").split(".")[0]
        browser_part = importlib.metadata.version("jupyterlab_widgets").split(".")[0]
    except importlib.metadata.PackageNotFoundError as error:
        return Line("widgets", "fail", f"{error.name} is missing", INSTALL_AGAIN)
    if int(browser_part) != int(kernel_part) - 5:  # ipywidgets 8 belongs to jupyterlab_widgets 3
        seen = f"ipywidgets {kernel_part} with jupyterlab_widgets {browser_part}"
        return Line("widgets", "warn", seen, INSTALL_AGAIN)
    folders = [Path(sys.prefix), Path.home() / ".local"]
    place = "share/jupyter/labextensions/@jupyter-widgets/jupyterlab-manager/package.json"
    if not any((folder / place).is_file() for folder in folders):
        return Line("widgets", "warn", "JupyterLab may not draw sliders", INSTALL_AGAIN)
    return Line("widgets", "ok", "sliders will be drawn; if you see none, reload the page")


def check_worker() -> Line:
    """Does a worker start, work and stop?"""
    from helpers.cluster import open_cluster

    try:
        with open_cluster(workers=1) as cluster:
            answer = cluster.client.submit(sum, [1, 2, 3], pure=False).result(timeout=20)
    except Exception as error:
        advice = "read the sentence; then look at the lines above"
        return Line("worker", "fail", str(error) or type(error).__name__, advice)
    if answer != 6:
        return Line("worker", "fail", "a worker computed 1 + 2 + 3 wrongly", INSTALL_AGAIN)
    where = "joined cluster" if cluster.joined else "this machine"
    return Line("worker", "ok", f"one started, worked and stopped ({where})")


CHECKS: tuple[Callable[[], Line], ...] = (
    check_python,
    check_packages,
    check_cores,
    check_memory,
    check_ports,
    check_proxy,
    check_disk,
    check_data,
    check_widgets,
    check_worker,
)


def room_check(checks=CHECKS) -> list[Line]:
    """Run all checks, print a line for each, and return the lines.

    A check that fails in an unforeseen way becomes a line that says fail.
    """
    lines = []
    for check in checks:
        try:
            line = check()
        except Exception as error:  # a broken installation can break anything
            name = check.__name__.removeprefix("check_")
            line = Line(name, "fail", f"{type(error).__name__}: {error}", INSTALL_AGAIN)
        print(line, flush=True)
        lines.append(line)
    return lines


def _few(names, most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


if __name__ == "__main__":
    sys.exit(any(line.level == "fail" for line in room_check()))
