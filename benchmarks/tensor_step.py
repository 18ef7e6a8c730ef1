"""An MLP block cut over two tensor ranks: forward and backward, with both exchanges.

A block 256-1024-256 with GELU on 2048 positions, float32: the first matrix cut by columns, the
second by rows, one all-reduce of 2 MB forward and one backward; one BLAS thread a rank. At this
size computing is most of the step (see the limit): a smaller block would measure the exchange, a
larger one nothing but the two libraries' matrix products. Seconds of one step, the median of 30
after some that warm up, as rank 0 sees them. Less is better.

ours
    Two Dask workers; what is added up lies in memory that both can read.
torch
    PyTorch's tensor parallelism (DTensor: ColwiseParallel, RowwiseParallel) over gloo.
limit
    The same two ranks of ours without the exchange: half of the columns each.
serial
    One rank of ours with all columns.

Before it is timed, ours is checked: the result and all gradients are those of one rank with all
columns, to 1e-4 of the largest.
"""

import numpy as np

from benchmarks.measure import Case, interleaved
from benchmarks.peers import launch
from benchmarks.peers.timing import ROWS, WIDTH, median_step, positions, report
from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.nn.blocks import ALONE
from helpers.nn.layers import linear, linear_grad
from helpers.nn.transformer import gelu, gelu_grad
from helpers.parallel.tensor import TensorParallel

ROUNDS = 7
TOLERANCE = 1e-4


def weights(rank, ranks):
    """A rank's part of the block: columns of the first matrix, rows of the second.

    Returns
    -------
    list of ndarray, float32
        w_1, b_1, w_2; and b_2, which lies on all ranks.
    """
    random = np.random.default_rng(1)
    shapes = ((WIDTH, 4 * WIDTH), (4 * WIDTH,), (4 * WIDTH, WIDTH), (WIDTH,))
    w_1, b_1, w_2, b_2 = (random.standard_normal(shape, np.float32) / 16 for shape in shapes)
    mine = slice(rank * 4 * WIDTH // ranks, (rank + 1) * 4 * WIDTH // ranks)
    return [np.ascontiguousarray(w) for w in (w_1[:, mine], b_1[mine], w_2[mine], b_2)]


class Block:
    """A rank's part of the block, with the memory of a step.

    Parameters
    ----------
    rank, ranks : int
    exchange : Alone
        What is added up over the ranks.
    empty : callable
        ``empty(shape, dtype)`` makes the arrays that are added up.

    Attributes
    ----------
    y, dx : ndarray, float32, (1, ROWS, WIDTH)
        The result, and the gradient by the input.
    gradients : list of ndarray
        By what `weights` gives.
    """

    def __init__(self, rank, ranks, exchange, empty=np.empty):
        self.weights, self.exchange = weights(rank, ranks), exchange
        self.x, self.dy = positions()
        self.y, self.dx = (empty((1, ROWS, WIDTH), np.float32) for _ in range(2))
        self.gradients = [np.empty_like(w) for w in self.weights]
        columns = self.weights[0].shape[1]
        self.slope, self.active, self.d_up = np.empty((3, ROWS, columns), np.float32)

    def step(self):
        """Forward and backward."""
        w_1, b_1, w_2, b_2 = self.weights
        linear(self.x, w_1, b_1, out=self.slope)
        gelu(self.slope, out=self.active, slope=self.slope)
        np.matmul(self.active, w_2, out=self.y[0])
        self.exchange.leave(self.y)
        self.y += b_2
        linear_grad(self.dy, self.active, w_2, *self.gradients[2:], self.d_up)
        gelu_grad(self.d_up, self.slope, out=self.d_up)
        linear_grad(self.d_up, self.x, w_1, *self.gradients[:2], self.dx[0])
        self.exchange.enter_grad(self.dx)


def program(rank, exchanging):
    """What each rank of ours does: check, then measure.

    Parameters
    ----------
    rank : Rank
    exchanging : bool
        False leaves the exchange, and the check, out.

    Returns
    -------
    float
        Median seconds of one step.
    """
    exchange = TensorParallel(rank.tensor) if exchanging else ALONE
    block = Block(rank.index, rank.size, exchange, rank.empty)
    if exchanging:
        check(block, rank.index, rank.size)
    return median_step(block.step)


def check(block, rank, ranks):
    """Take a step, and compare all that it gives with what one rank with all columns gives.

    Raises
    ------
    RuntimeError
        Something differs by more than 1e-4 of its largest number.
    """
    whole = Block(0, 1, ALONE)
    block.step()
    whole.step()
    mine = slice(rank * 4 * WIDTH // ranks, (rank + 1) * 4 * WIDTH // ranks)
    dw_1, db_1, dw_2, db_2 = whole.gradients
    right = [whole.y, whole.dx, dw_1[:, mine], db_1[mine], dw_2[mine], db_2]
    for found, expected in zip([block.y, block.dx, *block.gradients], right, strict=True):
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"The block differs from that of one rank by {difference:.2g} of its largest "
                "number, so the step was not measured."
            )


def ours(ranks, exchanging):
    """Measure ours once, in this process, on so many workers, and report it."""
    with open_cluster(workers=ranks) as cluster:
        report(spmd.run(cluster.client, Mesh(tensor=ranks), program, exchanging).results[0])


def _ours(ranks, exchanging):
    program = f"from benchmarks.tensor_step import ours; ours({ranks}, {exchanging})"
    return launch.python(program)


def run(rounds=ROUNDS):
    """Measure the step.

    Parameters
    ----------
    rounds : int

    Returns
    -------
    list of Case
        One, with ``more["serial"]``, seconds.
    """
    sides = {"ours": lambda: _ours(2, True), "limit": lambda: _ours(2, False)}
    if launch.present(["torch"]):
        sides["torch"] = lambda: launch.ranks("benchmarks.peers.tensor_step")
    sides["serial"] = lambda: _ours(1, False)
    medians = interleaved(sides, rounds)
    more = {"serial": medians.pop("serial")}
    return [Case("256-1024-256", medians.pop("ours"), medians, medians.pop("limit"), more)]
