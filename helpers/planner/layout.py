"""What a layout of data, tensor and pipeline ranks costs a rank: memory, and bytes that travel.

The formulas are those of the helpers of this course, to the byte, for a GPT with a tied table of
tokens. What they rest on: Narayanan et al. 2021, "Efficient large-scale language model training on
GPU clusters using Megatron-LM", section 3; Korthikanti et al. 2022, "Reducing activation
recomputation in large transformer models", section 4; Rajbhandari et al. 2020, "ZeRO", section 5.
The time that a layout takes: `helpers.planner.machine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from helpers.parallel import schedules
from helpers.planner.pipeline import Costs, peak_activations, simulate
from helpers.planner.stages import activation_bytes


@dataclass(frozen=True)
class Layout:
    """How a model is laid out on ranks, and how it is trained there.

    Attributes
    ----------
    data, tensor, pipeline : int
        Ranks along each axis.
    microbatches : int
        In how many parts a data rank takes its rows through the pipeline.
    schedule : callable
        Of `helpers.parallel.schedules`.
    chunks : int
        Stages of a pipeline rank.
    zero : {0, 1}
        Stage of ZeRO along the data axis.
    sequence : bool
        Sequence parallelism along the tensor axis.
    recompute : {"none", "selective", "full"}

    Examples
    --------
    >>> layout = Layout(data=2, tensor=2, pipeline=2, microbatches=4)
    >>> layout.ranks, str(layout)
    (8, '2 × 2 × 2')
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    microbatches: int = 1
    schedule: Callable = schedules.one_f_one_b
    chunks: int = 1
    zero: int = 0
    sequence: bool = False
    recompute: str = "none"

    def __str__(self):
        return f"{self.data} × {self.tensor} × {self.pipeline}"

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.data * self.tensor * self.pipeline

    @property
    def stages(self) -> int:
        """Stages of the model."""
        return self.pipeline * self.chunks

    def plan(self) -> list:
        """The operations of all pipeline ranks."""
        options = {"chunks": self.chunks} if self.chunks > 1 else {}
        return schedules.plan(self.schedule, self.pipeline, self.microbatches, **options)

    def rows(self, batch: int) -> int:
        """Rows of the largest micro-batch, of a batch of all data ranks together."""
        return math.ceil(math.ceil(batch / self.data) / self.microbatches)


def factorisations(ranks: int, gpt) -> list[tuple[int, int, int]]:
    """All (data, tensor, pipeline) of so many ranks that fit a GPT.

    Parameters
    ----------
    ranks : int
    gpt : GPT
        The tensor ranks must divide its heads and its vocabulary; a pipeline rank needs a block.

    Returns
    -------
    list of tuple

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> factorisations(4, GPT(vocabulary=40, context=8, width=8, heads=4, layers=2))
    [(1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
    """
    found = []
    for data in range(1, ranks + 1):
        for tensor in range(1, ranks // data + 1):
            pipeline, rest = divmod(ranks, data * tensor)
            fits = gpt.heads % tensor == gpt.vocabulary % tensor == rest == 0
            if fits and 1 <= pipeline <= gpt.layers:
                found.append((data, tensor, pipeline))
    return found


def units(gpt, layout: Layout, pipeline: int = 0) -> list[int]:
    """How many numbers each layer has on one rank, in order; ZeRO cuts each by itself.

    Parameters
    ----------
    gpt : GPT
    layout : Layout
    pipeline : int
        The rank's coordinate on the pipeline axis.

    Returns
    -------
    list of int
        The last stage has a copy of the table of tokens, if it has not the embedding itself.

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=40, context=32, width=64, heads=4, layers=2)
    >>> units(gpt, Layout(tensor=2, pipeline=2), pipeline=1)
    [25184, 128, 1280]
    >>> sum(units(gpt, Layout())) == gpt.size
    True
    """
    width, table = gpt.width, gpt.vocabulary // layout.tensor * gpt.width
    # Of a block 12 squares of the width and 7 widths are cut; 6 widths lie on all tensor ranks.
    block = (12 * width**2 + 7 * width) // layout.tensor + 6 * width
    found = []
    for stage in range(pipeline, layout.stages, layout.pipeline):
        last = stage == layout.stages - 1
        found += [table + gpt.context * width] * (stage == 0)
        found += [block] * blocks_of(gpt, layout, stage)
        found += [2 * width] * last + [table] * (last and stage > 0)
    return found


def memory(
    gpt,
    layout: Layout,
    batch: int,
    length: int,
    pipeline: int = 0,
    data: int = 0,
    moments: int = 2,
    itemsize: int = 8,
) -> dict[str, int]:
    """Bytes that one rank keeps.

    Parameters
    ----------
    gpt : GPT
    layout : Layout
    batch, length : int
        Rows of all data ranks together, and tokens of a row.
    pipeline, data : int
        The rank's coordinates.
    moments : int
        Arrays in the optimiser's state: 0 for SGD, 1 with momentum, 2 for Adam.
    itemsize : int
        Bytes of a number.

    Returns
    -------
    dict of str to int
        ``parameters``, ``gradients``, ``state``; and ``activations``, at most, if each micro-batch
        has as many rows, and a backward pass is in one piece.

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=40, context=32, width=64, heads=4, layers=2)
    >>> memory(gpt, Layout(), batch=64, length=32)["state"] == 2 * 8 * gpt.size
    True
    """
    numbers = units(gpt, layout, pipeline)
    whole = sum(numbers)
    ranks = layout.data if layout.zero else 1
    own = sum(number // ranks + (data < number % ranks) for number in numbers)
    return {
        "parameters": itemsize * whole,
        "gradients": itemsize * whole,
        "state": itemsize * moments * (own if layout.zero else whole),
        "activations": _activations(gpt, layout, batch, length, pipeline, itemsize),
    }


def _activations(gpt, layout, batch, length, pipeline, itemsize):
    """Of one rank: those of each of its stages at their most."""
    events = simulate(layout.plan(), Costs(), layout.chunks)
    about = layout.rows(batch) * length, gpt.width, length, gpt.heads, layout.recompute
    cut, total = (itemsize, layout.tensor, layout.sequence), 0
    for stage in range(pipeline, layout.stages, layout.pipeline):
        mine = [event for event in events if event.layer == stage]
        kept = peak_activations(mine, layout.pipeline)[pipeline]
        scored = gpt.vocabulary if stage == layout.stages - 1 else 0
        total += activation_bytes(kept, blocks_of(gpt, layout, stage), *about, scored, *cut)
    return total


def sent_bytes(
    gpt,
    layout: Layout,
    batch: int,
    length: int,
    pipeline: int = 0,
    itemsize: int = 8,
) -> dict[str, int]:
    """Bytes that one rank sends in a training step, along each axis.

    An all-reduce of n bytes over p ranks sends ``2 (p - 1) / p * n``, as ring and halving do; a
    reduce-scatter and an all-gather send half of that.

    Parameters
    ----------
    gpt, layout, batch, length, itemsize
        As for `memory`; each micro-batch has as many rows.
    pipeline : int
        The rank's coordinate on the pipeline axis.

    Returns
    -------
    dict of str to int
        ``data``, ``tensor``, ``pipeline``. Besides, all ranks add up two numbers, loss and norm.

    Examples
    --------
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=40, context=32, width=64, heads=4, layers=2)
    >>> sent_bytes(gpt, Layout(data=2), batch=64, length=32)["data"] == 8 * gpt.size
    True
    >>> sent_bytes(gpt, Layout(pipeline=2, microbatches=4), batch=64, length=32)["pipeline"]
    1069056
    """
    positions = layout.rows(batch) * length
    activations = positions * gpt.width * itemsize
    return {
        "data": _all_reduce(itemsize * sum(units(gpt, layout, pipeline)), layout.data),
        "tensor": _tensor_bytes(gpt, layout, pipeline, positions, activations, itemsize),
        "pipeline": _pipeline_bytes(gpt, layout, pipeline, activations, itemsize),
    }


def _tensor_bytes(gpt, layout, pipeline, positions, activations, itemsize):
    ranks, total, norms = layout.tensor, 0, 0
    half = _all_reduce(activations, ranks) // 2
    forward, backward = (4, 6) if layout.sequence else (4, 4)
    again = forward if layout.recompute == "full" else 0
    for stage in range(pipeline, layout.stages, layout.pipeline):
        blocks = blocks_of(gpt, layout, stage)
        total += blocks * (forward + backward + again) * half
        norms += 4 * blocks * gpt.width
        if stage == 0:  # the embedding
            total += 2 * half
        if stage == layout.stages - 1:
            # The scores are not gathered: three numbers a position are. With the sequence cut, what
            # enters the head is gathered, and what comes back is scattered.
            total += 2 * half + 3 * _all_reduce(positions * itemsize, ranks)
            norms += 2 * gpt.width
    completed = _all_reduce(norms * itemsize, ranks) if layout.sequence else 0
    return layout.microbatches * total + completed


def _pipeline_bytes(gpt, layout, pipeline, activations, itemsize):
    if layout.pipeline == 1:
        return 0
    stages = range(pipeline, layout.stages, layout.pipeline)
    messages = sum((stage < layout.stages - 1) + (stage > 0) for stage in stages)
    each = activations // layout.tensor if layout.sequence else activations
    table = gpt.vocabulary // layout.tensor * gpt.width * itemsize
    ends = pipeline in (0, layout.pipeline - 1)
    return layout.microbatches * messages * each + ends * table


def _all_reduce(nbytes, ranks):
    return 2 * (ranks - 1) * nbytes // ranks


def blocks_of(gpt, layout: Layout, stage: int) -> int:
    """Blocks of a stage; all have as many, or one more."""
    return gpt.layers * (stage + 1) // layout.stages - gpt.layers * stage // layout.stages
