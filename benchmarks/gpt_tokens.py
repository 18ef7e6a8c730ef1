"""Training the small GPT on one rank and on two: seconds a step, and tokens a second.

Width 64, 4 heads, 2 layers, float32, a batch of 64 lines of the flight log with 32 tokens each
(padding counts: it is computed too), AdamW; one BLAS thread a rank. Seconds of one step, the median
of 30 after some that warm up, as rank 0 sees them. Less is better. The columns after the limit are
tokens a second, where more is better.

ours
    One rank, or two Dask workers, with `DataParallel`.
torch, ddp
    The same network from PyTorch's layers, on one rank, and on two with DistributedDataParallel
    over gloo.
limit
    The matrix products of a step alone.

Before it is timed, ours is checked: after five steps the loss is that of the plain loop over the
whole batch, to 1e-5.
"""

import numpy as np

from benchmarks.measure import Case, interleaved
from benchmarks.peers import launch
from benchmarks.peers.gpt_data import NETWORK, OPTIMISER, TOKENS, lines
from benchmarks.peers.timing import median_step, report
from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.collectives import all_reduce, barrier
from helpers.engine.mesh import Mesh
from helpers.parallel.data import DataParallel

ROUNDS = 7
CHECKED_STEPS = 5
TOLERANCE = 1e-5
PEERS = {1: "torch", 2: "ddp"}


def train(rank):
    """What each rank of ours does: check, then measure.

    Parameters
    ----------
    rank : Rank

    Returns
    -------
    float
        Median seconds of one step.
    """
    tokens, targets, count = lines(rank.index, rank.size)
    parameters = NETWORK.initialise(seed=0, dtype=np.float32)
    trainer = DataParallel(rank, NETWORK, OPTIMISER, parameters)

    def step():
        return trainer.step(tokens, targets, count)

    for _ in range(CHECKED_STEPS):
        share = step()
    check(float(all_reduce(rank.data, np.array(share))))
    return median_step(step)


def check(loss):
    """Compare the loss of the last checked step with that of a plain loop over the whole batch.

    Raises
    ------
    RuntimeError
        They differ by more than 1e-5.
    """
    tokens, targets, _ = lines(0, 1)
    parameters = NETWORK.initialise(seed=0, dtype=np.float32)
    state = OPTIMISER.start(NETWORK.size, np.float32)
    for _ in range(CHECKED_STEPS):
        expected, gradient = NETWORK.loss_and_gradient(parameters, tokens, targets)
        OPTIMISER.step(parameters, gradient, state)
    if not abs(loss - expected) <= TOLERANCE:
        raise RuntimeError(
            f"In step {CHECKED_STEPS} the loss is {loss:.6f}, that of a plain loop {expected:.6f}, "
            "so the step was not measured."
        )


def multiply(rank):
    """The matrix products of a step alone, on all ranks at once.

    Parameters
    ----------
    rank : Rank

    Returns
    -------
    float
        Median seconds.
    """
    triples = products(len(lines(rank.index, rank.size)[0]))

    def step():
        for left, right, out in triples:
            np.matmul(left, right, out=out)

    barrier(rank.data)
    return median_step(step)


def products(texts):
    """All products of a step for so many texts: a list of (left, right, out), float32.

    Each product ``y = x @ w`` of the forward pass has two in the backward pass,
    ``dx = dy @ w.T`` and ``dw = x.T @ dy``.
    """
    width, context = NETWORK.width, NETWORK.context
    rows, heads = texts * context, (texts * NETWORK.heads,)
    size = width // NETWORK.heads
    block = [((), rows, width, 3 * width), ((), rows, width, width)]
    block += [((), rows, width, 4 * width), ((), rows, 4 * width, width)]
    block += [(heads, context, size, context), (heads, context, context, size)]
    forward = [*block * NETWORK.layers, ((), rows, width, NETWORK.vocabulary)]
    found = []
    for many, n, d_in, d_out in forward:
        x, w, y = (
            np.ones((*many, *shape), np.float32) for shape in ((n, d_in), (d_in, d_out), (n, d_out))
        )
        found += [(x, w, y), (y, w.swapaxes(-1, -2), x.copy()), (x.swapaxes(-1, -2), y, w.copy())]
    return found


def ours(ranks, program):
    """Measure once, in this process, with one rank here or with several workers, and report it."""
    if ranks == 1:
        report(spmd.run(None, Mesh(data=1), program).results[0])
        return
    with open_cluster(workers=ranks) as cluster:
        report(spmd.run(cluster.client, Mesh(data=ranks), program).results[0])


def _ours(ranks, program):
    return launch.python(
        f"from benchmarks import gpt_tokens as here; here.ours({ranks}, here.{program})"
    )


def _peer(ranks):
    places = (launch.Place(),) * ranks
    return launch.ranks("benchmarks.peers.gpt_step", str(ranks), places=places)


def run(rounds=ROUNDS):
    """Measure the step on one rank and on two.

    Parameters
    ----------
    rounds : int

    Returns
    -------
    list of Case
        With tokens a second in ``more``.
    """
    present = launch.present(PEERS.values())
    return [_case(ranks, peer in present, rounds) for ranks, peer in PEERS.items()]


def _case(ranks, with_peer, rounds):
    sides = {"ours": lambda: _ours(ranks, "train"), "limit": lambda: _ours(ranks, "multiply")}
    if with_peer:
        sides[PEERS[ranks]] = lambda: _peer(ranks)
    medians = interleaved(sides, rounds)
    speed = {f"{name} tokens/s": TOKENS / seconds for name, seconds in medians.items()}
    name = "1 rank" if ranks == 1 else f"{ranks} ranks"
    return Case(name, medians.pop("ours"), medians, medians.pop("limit"), speed)
