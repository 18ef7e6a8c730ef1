"""A stage of a GPT: some of its layers, forward and backward for one micro-batch at a time.

A stage is what the executor of pipelines works on (`helpers.parallel.pipeline`). Its layers may be
cut over tensor ranks (`helpers.parallel.tensor`). What a micro-batch's backward pass needs is kept
in a memory of its own until then: these are the activations, of which a schedule keeps more or
fewer.

Three ways to keep less and compute more (Chen et al. 2016, "Training deep nets with sublinear
memory cost"; Korthikanti et al. 2022, "Reducing activation recomputation in large transformer
models", sections 4 and 5):

===========  ===============================================  =====================================
recompute    kept of a block                                  computed again
===========  ===============================================  =====================================
none         everything that the gradient needs               nothing
selective    all but the attention weights                    the attention weights
full         what went into the block                         the block's forward pass
===========  ===============================================  =====================================
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from helpers import nn
from helpers.nn.blocks import Memory
from helpers.parallel import tensor as cuts

RECOMPUTE = ("none", "selective", "full")
TABLE = "table"
"""Where a stage has the head and not the embedding, its copy of the table of tokens."""


def deal(gpt, stages: int, places: Sequence[int] | None = None) -> list[range]:
    """Which layers of a GPT lie on which stage.

    Parameters
    ----------
    gpt : GPT
    stages : int
        1 to the number of blocks.
    places : sequence of int, optional
        Where to cut between the blocks: ``stages + 1`` numbers from 0 to the number of blocks, as
        `helpers.planner.pipeline.balance` gives them. Default: equal numbers of blocks.

    Returns
    -------
    list of range
        Numbers of layers: 0 is the embedding, on the first stage; the last is the head's norm.

    Raises
    ------
    ValueError
        There are fewer blocks than stages, or the places do not fit.

    Examples
    --------
    >>> gpt = nn.GPT(vocabulary=4, context=4, width=2, heads=1, layers=4)
    >>> deal(gpt, stages=2)
    [range(0, 3), range(3, 6)]
    """
    if not 1 <= stages <= gpt.layers:
        raise ValueError(
            f"{gpt.layers} blocks do not make {stages} stages: a stage needs a block of its own, "
            f"so take 1 to {gpt.layers} stages."
        )
    if places is None:
        places = [gpt.layers * stage // stages for stage in range(stages + 1)]
    places = [int(place) for place in places]
    rising = all(start < stop for start, stop in pairwise(places))
    if len(places) != stages + 1 or (places[0], places[-1]) != (0, gpt.layers) or not rising:
        raise ValueError(
            f"places {places} do not cut {gpt.layers} blocks into {stages} stages: give "
            f"{stages + 1} rising numbers from 0 to {gpt.layers}."
        )
    dealt = [range(start + 1, stop + 1) for start, stop in pairwise(places)]
    dealt[0] = range(0, dealt[0].stop)
    dealt[-1] = range(dealt[-1].start, gpt.layers + 2)
    return dealt


class Parts:
    """Which parameters of a GPT a stage holds, and where they lie in its flat array.

    Parameters
    ----------
    gpt : GPT
    layers : range
        See `deal`.
    ranks : int
        Tensor ranks over which each layer is cut.

    Attributes
    ----------
    names : list
        The numbers of the layers; and `TABLE` where the stage needs a copy of the table.
    shapes, slices : dict
        For each of them the shapes of its arrays by name, and its (start, stop).
    size : int

    Examples
    --------
    >>> gpt = nn.GPT(vocabulary=4, context=4, width=2, heads=1, layers=2)
    >>> first, last = (Parts(gpt, layers, ranks=1) for layers in deal(gpt, stages=2))
    >>> first.slices, last.names, first.size + last.size == gpt.size + 4 * 2
    ({0: (0, 16), 1: (16, 90)}, [2, 3, 'table'], True)
    """

    def __init__(self, gpt, layers: range, ranks: int = 1):
        self.gpt, self.layers, self.ranks = gpt, layers, ranks
        self.names = list(layers)
        self.shapes = {layer: cuts.shapes(gpt, layer, ranks) for layer in layers}
        if gpt.layers + 1 in layers and 0 not in layers:
            self.names.append(TABLE)
            self.shapes[TABLE] = {"tokens": cuts.shapes(gpt, 0, ranks)["tokens"]}
        self.slices, self.size = {}, 0
        for name in self.names:
            count = sum(int(np.prod(shape)) for shape in self.shapes[name].values())
            self.slices[name] = (self.size, self.size + count)
            self.size += count

    def views(self, flat) -> dict:
        """For each part its arrays by name, as views into a flat array of shape (size,)."""
        return {
            name: nn.named_views(flat[slice(*self.slices[name])], self.shapes[name])
            for name in self.names
        }

    def cut(self, layer_of, rank: int = 0) -> np.ndarray:
        """This stage's flat array, from whole layers.

        Parameters
        ----------
        layer_of : callable
            ``layer_of(layer)`` is the flat array of a whole layer.
        rank : int
            The number on the tensor axis.

        Returns
        -------
        array of shape (size,)
        """
        pieces = []
        for name, (start, stop) in self.slices.items():
            layer = 0 if name == TABLE else name
            piece = cuts.cut(self.gpt, layer, layer_of(layer), rank, self.ranks)
            pieces.append(piece[: stop - start])  # of the tables the copy has the first
        return np.concatenate(pieces)

    @property
    def table(self):
        """The part in which the table of tokens lies; None where the stage has none."""
        return 0 if 0 in self.layers else TABLE if TABLE in self.names else None


class GPTStage:
    """Some layers of a GPT, with the methods that `run_schedule` calls.

    Parameters
    ----------
    parts : Parts
    parameters, gradient : array of shape (parts.size,)
        Views are taken of both; ``gradient`` is written by the first micro-batch of a step, and
        added to by the others.
    tensor : Group, optional
        The ranks over which each layer is cut. Default: layers are whole.
    sequence : bool
        Sequence parallelism on these ranks.
    recompute : {"none", "selective", "full"}

    Attributes
    ----------
    loss : float
        The sum over the micro-batches of this step, on the last stage.

    Raises
    ------
    ValueError
        There is no such way to recompute, or an array does not fit.

    Examples
    --------
    >>> gpt = nn.GPT(vocabulary=5, context=4, width=8, heads=2, layers=1)
    >>> parts = Parts(gpt, range(0, 3))
    >>> stage = GPTStage(parts, gpt.initialise(seed=0), np.empty(gpt.size))
    >>> tokens = np.array([[0, 1, 2], [2, 1, 0]])
    >>> stage.start([tokens[:1], tokens[1:]], [tokens[:1], tokens[1:]], divisor=6)
    >>> for microbatch in range(2):
    ...     stage.forward(microbatch, None)
    ...     stage.backward(microbatch, None)
    >>> bool(np.isclose(stage.loss, gpt.loss_at(stage.parameters, tokens, tokens)))
    True
    """

    def __init__(self, parts, parameters, gradient, tensor=None, sequence=False, recompute="none"):
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute is {recompute!r}: choose one of {', '.join(RECOMPUTE)}.")
        self.parts, self.gpt = parts, parts.gpt
        self.parameters, self.gradient, self.recompute = parameters, gradient, recompute
        self._p, self._g = parts.views(parameters), parts.views(gradient)
        self._added = np.empty_like(gradient)  # what one micro-batch adds
        self._a = parts.views(self._added)
        self.group = tensor if tensor is not None and tensor.size > 1 else None
        self._exchange = nn.ALONE
        if self.group is not None:
            kind = cuts.SequenceParallel if sequence else cuts.TensorParallel
            self._exchange = kind(self.group)
        self._heads = self.gpt.heads // parts.ranks
        self._blocks = [n for n in parts.layers if 0 < n <= self.gpt.layers]
        self.scratch = Memory(parameters.dtype)
        # For one block at a time: its gradient, and its forward pass where that is computed again.
        self._again = Memory(parameters.dtype, self.scratch)
        self._free, self._slots, self.loss = [], {}, 0.0

    # ------------------------------------------------------------ a step

    def start(self, tokens, targets, divisor) -> None:
        """Begin a step.

        Parameters
        ----------
        tokens, targets : list of integer array of shape (rows, length)
            One for each micro-batch. Only the first stage looks at tokens, the last at targets.
        divisor : number
            How many targets count in the whole batch.
        """
        self._tokens, self._targets, self._divisor = tokens, targets, divisor
        self._free += self._slots.values()
        self._slots, self._written, self.loss = {}, set(), 0.0

    def forward(self, microbatch, x):
        """The forward pass of these layers; returns None on the last stage."""
        slot = self._slots[microbatch] = self._free.pop() if self._free else self._new_slot()
        if 0 in self.parts.layers:
            x = self._embed(self._tokens[microbatch])
        slot.shape = x.shape
        for layer in self._blocks:
            if self.recompute == "full":
                # The block writes over what came in, which is all that is kept of it.
                slot.memory[layer].take("x", x.shape)[...] = x
                self._block(layer, x, self._again)
            else:
                slot.kept[layer] = self._block(layer, x, slot.memory[layer])
        if self.gpt.layers + 1 not in self.parts.layers:
            return x
        loss, slot.kept["head"] = self._head_loss(x, self._targets[microbatch], slot.memory["head"])
        self.loss += loss
        return None

    def backward(self, microbatch, dy):
        """The backward pass of these layers; returns None on the first stage."""
        slot = self._slots.pop(microbatch)
        dx = self._start_back(slot, dy)
        for layer in reversed(self._blocks):
            kept, memory = self._kept(slot, layer)
            dx = nn.block_grad(self._p[layer], kept, dx, self._a[layer], dx, memory, self._exchange)
        return self._finish(microbatch, slot, dx)

    def input(self, microbatch, dy):
        """The half of the backward pass for which the stage before waits."""
        slot = self._slots[microbatch]
        dx = self._start_back(slot, dy)
        for layer in reversed(self._blocks):
            kept, memory = self._kept(slot, layer, slot.memory[layer])
            out = np.empty_like(dx)
            dx, slot.later[layer] = nn.block_grad_input(
                self._p[layer], kept, dx, out, memory, self._exchange
            )
            slot.kept[layer] = kept
        slot.dx = dx
        return dx if 0 not in self.parts.layers else None

    def weight(self, microbatch):
        """The half of the backward pass for which nobody waits."""
        slot = self._slots.pop(microbatch)
        for layer in reversed(self._blocks):
            kept, later = slot.kept[layer], slot.later.pop(layer)
            nn.block_grad_weights(kept, later, self._a[layer])
        self._finish(microbatch, slot, slot.dx)
        slot.dx = None

    # ------------------------------------------------------------ memory

    @property
    def activation_bytes(self) -> int:
        """Bytes that are kept for micro-batches between forward and backward, at their most."""
        slots = [*self._free, *self._slots.values()]
        return sum(memory.nbytes for slot in slots for memory in slot.memory.values())

    # ------------------------------------------------------------ parts of a pass

    def _new_slot(self):
        places = [*self._blocks, *(["head"] if self.gpt.layers + 1 in self.parts.layers else [])]
        return Slot({place: Memory(self.parameters.dtype, self.scratch) for place in places})

    def _block(self, layer, x, memory):
        keep_weights = self.recompute != "selective"
        inputs = self._p[layer], x, self._heads, x, memory, self._exchange
        return nn.block(*inputs, keep_weights=keep_weights)[1]

    def _kept(self, slot, layer, memory=None):
        """What the gradient of a block needs, computed again if it was not kept."""
        if self.recompute != "full":
            return slot.kept[layer], memory or self._again
        memory = memory or self._again
        x = slot.memory[layer].take("x", slot.shape)
        return self._block(layer, x, memory), memory

    def _embed(self, tokens):
        if self.group is None:
            return nn.embed(self._p[0], tokens)
        return cuts.embed(self._p[0], tokens, self.group, exchange=self._exchange)

    def _head_loss(self, x, targets, memory):
        last, table = self._p[self.gpt.layers + 1], self._p[self.parts.table]["tokens"]
        if self.group is None:
            return nn.head_loss(last, table, x, targets, self._divisor, memory)
        about = self.group, self._divisor, memory, self._exchange
        return cuts.head_loss(last, table, x, targets, *about)

    def _start_back(self, slot, dy):
        """The gradient by what came out of the last block."""
        if "head" not in slot.kept:
            return dy
        last, table = self._p[self.gpt.layers + 1], self._p[self.parts.table]["tokens"]
        if self.group is None:
            dx, d_norm = nn.head_loss_grad_input(last, table, slot.kept["head"])
        else:
            about = self.group, None, self._exchange
            dx, d_norm = cuts.head_loss_grad_input(last, table, slot.kept["head"], *about)
        slot.later["head"] = d_norm
        return dx

    def _finish(self, microbatch, slot, dx):
        """The weights of both ends; and all that this micro-batch adds is added."""
        if "head" in slot.kept:
            ends = self._a[self.gpt.layers + 1], self._a[self.parts.table]["tokens"]
            nn.head_loss_grad_weights(slot.kept.pop("head"), slot.later.pop("head"), *ends)
        if 0 in self.parts.layers:
            add, tokens = self.gpt.layers + 1 in self.parts.layers, self._tokens[microbatch]
            if self.group is None:
                nn.embed_grad(tokens, dx, self._a[0], add, self.scratch)
            else:
                about = self.group, add, self.scratch, self._exchange
                cuts.embed_grad(tokens, dx, self._a[0], *about)
            dx = None
        if self._written:
            self.gradient += self._added
        else:
            self.gradient[:] = self._added
        self._written.add(microbatch)
        self._free.append(slot)
        return dx


class Slot:
    """What one micro-batch keeps on a stage between its forward and its backward pass."""

    def __init__(self, memory):
        self.memory, self.kept, self.later = memory, {}, {}
        self.shape = self.dx = None
