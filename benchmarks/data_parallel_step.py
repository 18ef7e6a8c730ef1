"""One step of data-parallel training on two ranks: gradient, exchange, new parameters.

A network 64-256-256-1 with a logistic loss, float32, a global batch of 8192 (4096 a rank), plain
gradient descent; one BLAS thread a rank. Seconds of one step, the median of 30 after some that
warm up, as rank 0 sees them. Less is better.

ours
    Two Dask workers; the gradient lies in memory that both can read.
ddp
    PyTorch's DistributedDataParallel over gloo: same network, same data.
limit
    The same two ranks of ours without the exchange.
serial
    One rank of ours with the whole batch.

Before it is timed, ours is checked: after five steps its parameters are those of one rank with the
whole batch, to 1e-5.
"""

import numpy as np

from benchmarks.measure import Case, interleaved
from benchmarks.peers import launch
from benchmarks.peers.timing import BATCH, LAYERS, LEARNING_RATE, batch, median_step, report
from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.collectives import all_reduce
from helpers.engine.mesh import Mesh
from helpers.nn.mlp import MLP

ROUNDS = 7
CHECKED_STEPS = 5
TOLERANCE = 1e-5


def trainer(part, gradient, exchange):
    """The training of one rank.

    Parameters
    ----------
    part : tuple
        What `batch` returned for this rank.
    gradient : ndarray, float32, flat
        Memory for the gradient.
    exchange : callable
        Called with the gradient of the rank's part, to make it that of the whole batch, in place.

    Returns
    -------
    step : callable
        Without arguments: one step.
    parameters : ndarray, float32, flat
        What a step changes in place.
    """
    mlp, (x, y) = MLP(LAYERS), part
    parameters = mlp.initialise(seed=0, dtype=np.float32)
    workspace = mlp.workspace(len(x), np.float32)
    change = np.empty_like(parameters)

    def step():
        mlp.loss_and_gradient(parameters, x, y, BATCH, out=gradient, workspace=workspace)
        exchange(gradient)
        np.multiply(gradient, np.float32(LEARNING_RATE), out=change)
        np.subtract(parameters, change, out=parameters)

    return step, parameters


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

    def exchange(gradient):
        if exchanging:
            all_reduce(rank.data, gradient, out=gradient)

    gradient = rank.empty(MLP(LAYERS).size, np.float32)
    step, parameters = trainer(batch(rank.index, rank.size), gradient, exchange)
    if exchanging:
        check(step, parameters)
    return median_step(step)


def check(step, parameters):
    """Take some steps, and compare the parameters with those of one rank with the whole batch.

    Raises
    ------
    RuntimeError
        They differ by more than 1e-5.
    """
    gradient = np.empty_like(parameters)
    serial_step, expected = trainer(batch(0, 1), gradient, exchange=lambda gradient: None)
    for _ in range(CHECKED_STEPS):
        step()
        serial_step()
    difference = np.abs(parameters - expected).max()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"After {CHECKED_STEPS} steps the parameters differ from those of one rank by "
            f"{difference:.2g}, so the step was not measured."
        )


def ours(ranks, exchanging):
    """Measure ours once, in this process, on so many workers, and report it."""
    with open_cluster(workers=ranks) as cluster:
        report(spmd.run(cluster.client, Mesh(data=ranks), program, exchanging).results[0])


def _ours(ranks, exchanging):
    program = f"from benchmarks.data_parallel_step import ours; ours({ranks}, {exchanging})"
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
    if launch.present(["ddp"]):
        sides["ddp"] = lambda: launch.ranks("benchmarks.peers.ddp_step")
    sides["serial"] = lambda: _ours(1, False)
    medians = interleaved(sides, rounds)
    more = {"serial": medians.pop("serial")}
    return [Case("64-256-256-1", medians.pop("ours"), medians, medians.pop("limit"), more)]
