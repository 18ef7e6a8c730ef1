"""Peer "mpi": Open MPI's Allreduce by mpi4py, in place."""

import sys

import numpy as np
from mpi4py import MPI

from benchmarks.peers.timing import SIZES, check_sum, median_call, report


def main(size):
    """Measure one size as a rank of two."""
    world = MPI.COMM_WORLD
    length, calls, blocks = SIZES[size]
    array = np.full(length, world.rank + 1, np.float32)
    world.Allreduce(MPI.IN_PLACE, array)
    check_sum(array)
    array.fill(0)
    seconds = median_call(
        lambda: world.Allreduce(MPI.IN_PLACE, array), world.Barrier, calls, blocks
    )
    if world.rank == 0:
        report(seconds)


main(*sys.argv[1:])
