"""Memory that the processes of one host share.

A segment has no name in any file system: it is an anonymous file (``memfd_create``; where that is
missing, a temporary file that is deleted at once) whose descriptor is handed to the peers over a
Unix socket. What has no name cannot be left behind: when the last process that holds it ends,
even by SIGKILL, the memory is free. It also does not count against the size of /dev/shm, which
is 64 MB in many containers. ``multiprocessing.shared_memory`` has neither property: its names
outlive a killed process, and before Python 3.13 its resource tracker removes them too early.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile

import numpy as np

from helpers.limits import usable_memory

ALIGNMENT = 64
"""Bytes of a cache line: parts that two ranks write begin on lines of their own."""


def create(nbytes: int) -> tuple[int, np.ndarray]:
    """A new piece of memory that several processes can map.

    Parameters
    ----------
    nbytes : int
        At least 1.

    Returns
    -------
    fd : int
        The descriptor that a peer needs; whoever called closes it.
    memory : numpy.ndarray, shape (nbytes,), uint8
        It keeps the mapping alive, also after the descriptor is closed.

    Raises
    ------
    OSError
        There is not so much memory (``ENOSPC``). All of it is reserved here, because a process that
        touches shared memory which the system cannot provide later is killed by SIGBUS.

    Examples
    --------
    >>> fd, memory = create(8)
    >>> memory[:] = 7
    >>> int(attach(fd, 8)[3])
    7
    >>> os.close(fd)
    """
    fd = _anonymous_file()
    try:
        reserve(fd, nbytes)
        return fd, attach(fd, nbytes)
    except BaseException:
        os.close(fd)
        raise


def attach(fd: int, nbytes: int) -> np.ndarray:
    """The bytes of a segment, seen through its descriptor: uint8, shape (nbytes,)."""
    return np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)


def reserve(fd: int, nbytes: int) -> None:
    """Make a file `nbytes` long, with every byte really there.

    Raises
    ------
    OSError
        ``ENOSPC``: the machine, the container or the file system has less.
    """
    if nbytes > usable_memory():
        # In a container the reservation itself would succeed, and the process would be killed.
        raise OSError(errno.ENOSPC, "not enough memory")
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
        return
    block = bytes(min(nbytes, 2**20))  # macOS has no such call: zeros that are written are there
    for start in range(0, nbytes, len(block)):
        os.pwrite(fd, block[: nbytes - start], start)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("many-hands", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
