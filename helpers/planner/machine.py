"""How long a layout takes: a training step, and a token of generated text.

Computing takes the operations of a GPT, divided by a speed, and a fixed time for each block;
messages take α + β n; a schedule is simulated (`helpers.planner.pipeline`). The numbers of a
machine are measured on it, or published ones. What is left out: that things go on at the same time,
such as an exchange of gradients behind the backward pass.

Operations: Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters
using Megatron-LM", appendix. Generation: Pope et al. 2022, "Efficiently scaling transformer
inference", section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from helpers.planner.layout import Layout, blocks_of, units
from helpers.planner.pipeline import Costs, simulate


@dataclass(frozen=True)
class Link:
    """What a message takes.

    Attributes
    ----------
    latency : float
        Seconds, α.
    bandwidth : float
        Bytes a second, 1/β.

    Examples
    --------
    >>> Link(latency=1e-3, bandwidth=1e6).all_reduce(1000, ranks=2)
    0.003
    """

    latency: float = 0.0
    bandwidth: float = float("inf")

    def message(self, nbytes: float) -> float:
        """Seconds of one message."""
        return self.latency + nbytes / self.bandwidth

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Seconds by recursive halving and doubling, see `helpers.engine.collectives`."""
        steps = 2 * math.ceil(math.log2(ranks))
        return steps * self.latency + 2 * (ranks - 1) / ranks * nbytes / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """What the ranks of a mesh compute with, and the wires between them.

    Attributes
    ----------
    speed : float
        Operations a second of one rank, as far as it reaches them.
    overhead : float
        Seconds of a block's forward pass, however little it computes.
    backward : float
        How many times as long as a forward pass a backward pass takes.
    data, tensor, pipeline : Link
        The wire of each axis.
    memory_bandwidth : float
        Bytes a second that a rank reads from its memory.
    cores : int, optional
        Ranks that can compute at the same time. Default: all.
    itemsize : int
        Bytes of a number.
    """

    speed: float
    overhead: float = 0.0
    backward: float = 2.0
    data: Link = Link()
    tensor: Link = Link()
    pipeline: Link = Link()
    memory_bandwidth: float = float("inf")
    cores: int | None = None
    itemsize: int = 8


A100 = Machine(
    speed=0.55 * 312e12,
    data=Link(10e-6, 25e9),
    tensor=Link(5e-6, 300e9),
    pipeline=Link(10e-6, 25e9),
    memory_bandwidth=2039e9,
    itemsize=2,
)
"""An NVIDIA A100 with 80 GB in a node of eight, NVLink inside and 200 Gb/s a GPU between nodes.
Peak, memory and wires: NVIDIA's data sheets of the A100 and the DGX A100. The share of the peak is
fitted to table 1 of Narayanan et al. 2021 (tests/test_machine.py); both latencies are assumed."""


def placed(machine: Machine, layout: Layout, order, inside: Link, between: Link, node: int = 8):
    """The machine with each axis on the wire that it gets when ranks fill nodes in this order.

    Parameters
    ----------
    machine : Machine
    layout : Layout
    order : sequence of str
        The axes; neighbours along the first are placed next to each other.
    inside, between : Link
        Within a node and between nodes.
    node : int
        Ranks of a node.

    Returns
    -------
    Machine

    Examples
    --------
    >>> inside, between = A100.tensor, A100.data
    >>> order = "pipeline", "tensor", "data"
    >>> found = placed(A100, Layout(2, 4, 8), order, inside, between)
    >>> found.pipeline == inside, found.tensor == between
    (True, True)
    """
    wires, reach = {}, 1
    for axis in order:
        reach *= getattr(layout, axis)
        wires[axis] = inside if reach <= node else between
    return replace(machine, **wires)


def block_operations(gpt, length: int) -> float:
    """Multiplications and additions of a block's forward pass, for one position of a text.

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> block_operations(GPT(vocabulary=40, context=32, width=64, heads=4, layers=2), length=32)
    106496
    """
    return 24 * gpt.width**2 + 4 * length * gpt.width


class StepTime(NamedTuple):
    """Seconds of a training step, and of its parts.

    Attributes
    ----------
    seconds : float
        The whole.
    schedule, exchange, update : float
        The pipeline's schedule with its tensor exchanges, the sum of gradients, the optimiser.
    events : list of Event
        The schedule, simulated; rank r is the pipeline rank.
    """

    seconds: float
    schedule: float
    exchange: float
    update: float
    events: list


def step_time(gpt, layout: Layout, machine: Machine, batch: int, length: int) -> StepTime:
    """Predict a training step with Adam.

    Parameters
    ----------
    gpt : GPT
    layout : Layout
    machine : Machine
    batch, length : int
        Rows of all data ranks together, and tokens of a row.

    Returns
    -------
    StepTime

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=40, context=32, width=64, heads=4, layers=2)
    >>> one, two = (step_time(gpt, Layout(data=d), Machine(speed=1e9), 64, 32) for d in (1, 2))
    >>> round(one.seconds / two.seconds, 6)
    2.0
    """
    costs = step_costs(gpt, layout, machine, batch, length)
    events = simulate(layout.plan(), costs, layout.chunks)
    numbers = [sum(units(gpt, layout, rank)) for rank in range(layout.pipeline)]
    exchange = machine.data.all_reduce(machine.itemsize * max(numbers), layout.data)
    if layout.pipeline > 1:
        table = gpt.vocabulary // layout.tensor * gpt.width
        exchange += machine.pipeline.message(machine.itemsize * table)
    share = layout.data if layout.zero else 1
    # Parameters, gradient and two moments are read, and three of them written.
    update = 7 * machine.itemsize * max(numbers) / share / machine.memory_bandwidth
    schedule = max(event.stop for event in events)
    seconds = schedule + exchange + update
    if machine.cores and layout.ranks > machine.cores:
        work = sum(e.length for e in events if e.operation != "wait") * layout.data * layout.tensor
        seconds = max(seconds, work / machine.cores + exchange + update)
    return StepTime(seconds, schedule, exchange, update, events)


def step_costs(gpt, layout: Layout, machine: Machine, batch: int, length: int) -> Costs:
    """What the operations of a layout's schedule cost; arguments as for `step_time`."""
    positions = layout.rows(batch) * length
    nbytes = positions * gpt.width * machine.itemsize
    rank = positions / layout.tensor / machine.speed
    head = 2 * gpt.width * gpt.vocabulary * rank
    exchange = machine.tensor.all_reduce(nbytes, layout.tensor)
    again = layout.recompute == "full"
    forward, backward = [], []
    for stage in range(layout.stages):
        blocks, last = blocks_of(gpt, layout, stage), stage == layout.stages - 1
        compute = blocks * (machine.overhead + block_operations(gpt, length) * rank)
        ends = exchange * ((stage == 0) + last)
        forward.append(compute + last * head + 2 * blocks * exchange + ends * (stage == 0))
        back = machine.backward * (compute + last * head) + again * compute
        backward.append(back + (2 + 2 * again) * blocks * exchange + last * exchange)
    sent = nbytes // layout.tensor if layout.sequence else nbytes
    link = dict(latency=machine.pipeline.latency, byte_seconds=1 / machine.pipeline.bandwidth)
    halves = tuple(each / 2 for each in backward)
    about = dict(forward=tuple(forward), backward=tuple(backward), input=halves, weight=halves)
    return Costs(**about, **link, nbytes=sent)


def tokens_a_second(gpt, layout: Layout, machine: Machine, batch: int, length: int) -> float:
    """Tokens of all ranks together that a training step gets through in a second."""
    return batch * length / step_time(gpt, layout, machine, batch, length).seconds


class TokenTime(NamedTuple):
    """What generated text takes.

    Attributes
    ----------
    latency : float
        Seconds from one token of a text to the next.
    throughput : float
        Tokens a second of all texts together.
    """

    latency: float
    throughput: float


def token_time(
    gpt, layout: Layout, machine: Machine, prompts: int, length: int, microbatches=None
) -> TokenTime:
    """Predict generation, one token after the other, with a cache of keys and values.

    Parameters
    ----------
    gpt : GPT
    layout : Layout
        Its data ranks share out the prompts.
    machine : Machine
    prompts : int
        Of all data ranks together.
    length : int
        Positions that have been read already.
    microbatches : int, optional
        In how many parts prompts go through the pipeline. Default: one a stage.

    Returns
    -------
    TokenTime

    Examples
    --------
    A rank that must read all weights for each token takes as long for two texts as for one:

    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=50_000, context=2048, width=4096, heads=32, layers=32)
    >>> one, two = (token_time(gpt, Layout(), A100, n, length=0) for n in (1, 2))
    >>> round(two.latency / one.latency, 3), round(two.throughput / one.throughput, 3)
    (1.0, 2.0)
    """
    here = -(-prompts // layout.data)
    parts = min(layout.pipeline if microbatches is None else microbatches, here)
    rows = here / parts
    stages = [_token_on_stage(gpt, layout, machine, rows, length, s) for s in range(layout.stages)]
    hop = machine.pipeline.message(rows * gpt.width * machine.itemsize)
    way = sum(stages) + layout.pipeline * hop * (layout.pipeline > 1)
    # Either the stages are busy all the time, or a text waits until it has gone all the way round.
    latency = max(parts * max(stages), way)
    if machine.cores and layout.ranks > machine.cores:
        work = parts * sum(stages) * layout.data * layout.tensor
        latency = max(latency, work / machine.cores)
    return TokenTime(latency, prompts / latency)


def _token_on_stage(gpt, layout, machine, rows, length, stage):
    blocks, width = blocks_of(gpt, layout, stage), gpt.width
    last = stage == layout.stages - 1
    operations = rows * block_operations(gpt, length + 1) / layout.tensor
    # Each weight is read once for all rows; of the cache each row reads its own.
    numbers = (12 * width**2 + 2 * rows * length * width) / layout.tensor
    read = numbers * machine.itemsize / machine.memory_bandwidth
    block = machine.overhead + max(operations / machine.speed, read)
    exchange = machine.tensor.all_reduce(rows * width * machine.itemsize, layout.tensor)
    table = gpt.vocabulary * width / layout.tensor
    head = max(
        2 * rows * table / machine.speed, table * machine.itemsize / machine.memory_bandwidth
    )
    ends = exchange * ((stage == 0) + last)
    return blocks * (block + 2 * exchange) + last * head + ends


def fit(points) -> tuple[float, float]:
    """Speed and overhead of a rank, from forward passes of different sizes.

    Parameters
    ----------
    points : sequence of (blocks, operations, seconds)
        Of one pass each: how many blocks it went through, and their multiplications and additions.

    Returns
    -------
    speed, overhead : float
        As for `Machine`; weighed so that relative errors are small. Neither is below zero: where
        the points ask for that (a clock was disturbed), all of the time counts as operations.

    Raises
    ------
    ValueError
        There are fewer than two points.

    Examples
    --------
    >>> fit([(1, 1000, 3.0), (1, 2000, 4.0)])
    (1000.0, 2.0)
    """
    blocks, operations, seconds = np.array(points, float).T
    if len(seconds) < 2:
        raise ValueError("One point does not tell speed and overhead apart: give two or more.")
    equations = np.column_stack([operations, blocks]) / seconds[:, np.newaxis]
    slope, overhead = np.linalg.lstsq(equations, np.ones(len(seconds)), rcond=None)[0]
    if slope <= 0 or overhead < 0:
        alone = equations[:, 0]
        slope, overhead = alone.sum() / (alone @ alone), 0.0
    return round(float(1 / slope), 6), round(float(overhead), 12)
