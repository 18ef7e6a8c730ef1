"""A worker that joins from outside, as one on another machine would."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 30


@contextmanager
def guest_worker(cluster, command):
    """Start a worker process by a command, let it join, and end it in any case.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster
        A cluster on this machine. On one that was joined nothing is started.
    command : list of str
        The command of ``dask worker``, as one would type it on the other machine.

    Yields
    ------
    str or None
        The guest's address; None on a cluster that was joined.

    Raises
    ------
    RuntimeError
        The guest did not join.

    Examples
    --------
    >>> with guest_worker(cluster, ["dask", "worker", scheduler]) as guest:  # doctest: +SKIP
    ...     cluster.client.submit(sum, [1, 2], workers=[guest]).result()
    3
    """
    if cluster.joined:
        print("No guest is started: all workers of this cluster joined over the network.")
        yield None
        return
    before = set(cluster.workers)
    # Within the cluster's own folder, which is removed with the cluster, even after a kill.
    folder = _folder_of(cluster)
    # A number as name, because the cluster sorts its workers by it; one that scale() never gives.
    options = [f"--name={1000 + os.getpid()}", f"--local-directory={folder}"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
    try:
        guest = _wait_for_guest(cluster, before, process)
        yield guest
        cluster.client.retire_workers([guest])  # it hands over what it holds, and ends
        process.wait(timeout=START_SECONDS)
    finally:
        process.kill()
        process.wait()


def _folder_of(cluster) -> Path:
    def folder(dask_worker):
        return dask_worker.local_directory

    found = cluster.client.run(folder, workers=cluster.workers[:1])
    return Path(next(iter(found.values()))).parent


def _wait_for_guest(cluster, before: set, process) -> str:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        if new := set(cluster.workers) - before:
            return new.pop()
        time.sleep(0.02)
    ended = process.poll()
    why = "did not join in time" if ended is None else f"ended with status {ended}"
    raise RuntimeError(f"The guest worker {why}: check the command, then run the cell again.")
