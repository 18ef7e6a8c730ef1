"""What every side of a benchmark does in the same way: sizes, data, and the median of a call."""

import json
import time
from statistics import median

import numpy as np

SIZES = {
    # float32 elements; calls in a block; blocks. One array is the gradient of a small network,
    # the other stays in no cache.
    "328 KB": (82_000, 20, 50),
    "32 MB": (8_388_608, 2, 15),
}
PINGS = {
    # Bytes of a message; calls in a block; blocks.
    "1 byte": (1, 200, 30),
    "328 KB": (328_000, 20, 30),
    "32 MB": (33_554_432, 1, 10),
}
LAYERS = (64, 256, 256, 1)
BATCH = 8192
LEARNING_RATE = 0.1
WARM_UP_STEPS, STEPS = 10, 30
WIDTH, ROWS = 256, 2048
"""Of the MLP block that is cut over tensor ranks: 256-1024-256, one row a position."""
PIPELINE_LAYERS, PIPELINE_WIDTH = 8, 256
PIPELINE_BATCH, MICROBATCHES = 4096, 8


def median_call(call, barrier, calls, blocks):
    """Median seconds of one call: blocks of calls, each after a barrier; one block warms up.

    Parameters
    ----------
    call, barrier : callable
        Without arguments. All ranks call this function with the same numbers.
    calls : int
        How often `call` runs in a block. The block's time is divided by it, so that ranks that
        leave the barrier at different moments matter less.
    blocks : int
        How many blocks are timed.

    Returns
    -------
    float
        Seconds, as this rank saw them.
    """
    seconds = []
    for _ in range(1 + blocks):
        barrier()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - start) / calls)
    return median(seconds[1:])


def median_step(step):
    """Median seconds of one training step, after some steps that warm up.

    Parameters
    ----------
    step : callable
        Without arguments; the ranks keep in step by what it exchanges.

    Returns
    -------
    float
    """
    for _ in range(WARM_UP_STEPS):
        step()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def check_sum(array):
    """Two ranks gave 1s and 2s: refuse to time a sum that is wrong.

    Raises
    ------
    RuntimeError
        An element is not 3.
    """
    if not (array == 3).all():
        raise RuntimeError("The sum is wrong, so it was not measured.")


def batch(index, size):
    """One rank's part of the global batch, the same for all sides.

    Parameters
    ----------
    index, size : int
        Number of the rank, and of all ranks.

    Returns
    -------
    x : ndarray, float32, (BATCH / size, 64)
    y : ndarray, float32, (BATCH / size,)
        0 or 1.
    """
    x = np.random.default_rng(0).standard_normal((BATCH, LAYERS[0]), np.float32)
    y = (x[:, :8].sum(1) > 0).astype(np.float32)
    part = slice(index * BATCH // size, (index + 1) * BATCH // size)
    return x[part], y[part]


def pipeline_batch():
    """The batch of the benchmark of pipelines: what the network gets, and what it should give.

    Returns
    -------
    x, y : ndarray, float32, (PIPELINE_BATCH, PIPELINE_WIDTH)
    """
    random = np.random.default_rng(0)
    x = random.standard_normal((PIPELINE_BATCH, PIPELINE_WIDTH), np.float32)
    return x, np.sin(x[:, ::-1])


def positions():
    """What an MLP block is given, the same for all ranks and all sides.

    Returns
    -------
    x, dy : ndarray, float32, (ROWS, WIDTH)
        The input, and a gradient by the output.
    """
    return np.random.default_rng(0).standard_normal((2, ROWS, WIDTH), np.float32)


def report(value):
    """Print what a fresh process measured, as the last line that `launch.measured` reads."""
    print(json.dumps(value), flush=True)
