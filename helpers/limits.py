"""What this machine offers: cores and memory, counting the limits of containers.

Dask and joblib ask similar questions. They read one level of control groups only; a limit that a
batch system sets one level up is lost on them, and workers then wait for cores they never get.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil


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
