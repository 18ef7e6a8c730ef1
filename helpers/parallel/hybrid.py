"""All three at once: a GPT trained on a mesh of data, tensor and pipeline ranks.

Along the tensor axis every layer is cut, along the pipeline axis the layers are dealt out, and
along the data axis the rows of a batch are shared. What one rank of a 1 × 1 × 1 mesh would compute
is computed by all together, up to rounding (Narayanan et al. 2021, "Efficient large-scale language
model training on GPU clusters using Megatron-LM", section 3).

A step has four parts: the schedule of the pipeline, whose gradients are added up over the
micro-batches; the sums that complete these gradients; the norm of all of them; the update.
"""

from __future__ import annotations

import inspect
import math
import operator

import numpy as np

from helpers.engine.collectives import all_gather, all_reduce
from helpers.nn.optimisers import clip_by_global_norm
from helpers.nn.tokens import IGNORE
from helpers.parallel import schedules
from helpers.parallel import tensor as cuts
from helpers.parallel.pipeline import run_schedule
from helpers.parallel.sharded import Sharded
from helpers.parallel.shards import cuts as equal_cuts
from helpers.parallel.shards import shard
from helpers.parallel.stage import TABLE, GPTStage, Parts, deal

LARGEST_ZERO = 1
"""With micro-batches the gradients of all are added up first, so that they must be whole here."""


class Hybrid:
    """Trains one GPT on all ranks of a mesh; every rank makes one and calls `step`.

    Parameters
    ----------
    rank : Rank
    gpt : GPT
    optimiser : SGD or Adam
    seed : int
        For the initial parameters, which are the same for every mesh.
    dtype : dtype
    microbatches : int
        In how many parts a data rank takes its rows through the pipeline.
    schedule : callable
        Of `helpers.parallel.schedules`, or your own.
    chunks : int
        Stages of a rank; more than 1 for `interleaved`.
    places : sequence of int, optional
        Where to cut between the blocks, see `helpers.parallel.stage.deal`.
    zero : {0, 1}
        Stage of ZeRO along the data axis.
    sequence : bool
        Sequence parallelism along the tensor axis.
    recompute : {"none", "selective", "full"}
    largest_norm : float, optional
        The gradient of the whole model is clipped to this length.

    Attributes
    ----------
    stages : list of GPTStage
        This rank's, one for each chunk.
    steps : int
        Steps taken.
    norm : float or None
        The norm of the last step's gradient before it was clipped.

    Raises
    ------
    ValueError
        The mesh does not fit the model, or an argument is out of range.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.nn import GPT, SGD
    >>> gpt = GPT(vocabulary=4, context=6, width=4, heads=2, layers=2)
    >>> tokens = np.arange(24).reshape(4, 6) % 4
    >>> def program(rank):
    ...     trainer = Hybrid(rank, gpt, SGD(rate=0.1), seed=0, microbatches=2)
    ...     return [trainer.step(tokens, tokens) for _ in range(3)]
    >>> serial = spmd.run(None, Mesh(), program).results[0]
    >>> eight = spmd.run(None, Mesh(data=2, tensor=2, pipeline=2), program).results
    >>> all(np.allclose(losses, serial, rtol=1e-12) for losses in eight)
    True
    """

    def __init__(
        self,
        rank,
        gpt,
        optimiser,
        *,
        seed=0,
        dtype=np.float64,
        microbatches=1,
        schedule=schedules.one_f_one_b,
        chunks=1,
        places=None,
        zero=0,
        sequence=False,
        recompute="none",
        largest_norm=None,
    ):
        self.rank, self.gpt, self.steps, self.norm = rank, gpt, 0, None
        self.microbatches, chunks = operator.index(microbatches), operator.index(chunks)
        self._check(zero, largest_norm, schedule, chunks)
        options = {"chunks": chunks} if chunks > 1 else {}
        pipeline = rank.pipeline
        self.plan = schedules.plan(schedule, pipeline.size, self.microbatches, **options)
        dealt = deal(gpt, pipeline.size * chunks, places)
        self._parts = [
            Parts(gpt, dealt[chunk * pipeline.size + pipeline.rank], rank.tensor.size)
            for chunk in range(chunks)
        ]
        self._starts = np.cumsum([0, *(parts.size for parts in self._parts)]).tolist()
        initial = [
            parts.cut(lambda layer: gpt.initialise_layer(layer, seed, dtype), rank.tensor.rank)
            for parts in self._parts
        ]
        units = [
            (start + first, start + last)
            for start, parts in zip(self._starts, self._parts)
            for first, last in parts.slices.values()
        ]
        self.sharded = Sharded(rank.data, np.concatenate(initial), optimiser, zero, units)
        self._sequence, self._largest_norm = sequence, largest_norm
        kinds = dict(tensor=rank.tensor, sequence=sequence, recompute=recompute)
        self.stages = [
            GPTStage(parts, *map(self._chunk(number), self._flats()), **kinds)
            for number, parts in enumerate(self._parts)
        ]
        self._counted = self._counted_here(zero) if largest_norm is not None else None

    # ------------------------------------------------------------ a step

    def step(self, tokens, targets, rate=None) -> float:
        """Take one step along the gradient of the whole batch. All ranks call it together.

        Parameters
        ----------
        tokens, targets : integer array of shape (rows, length)
            The whole batch, the same on all ranks; targets are -1 where none is asked for.
        rate : float, optional
            Instead of the optimiser's own.

        Returns
        -------
        float
            The mean loss of the batch before the step, the same on all ranks.

        Raises
        ------
        ValueError, TypeError
            If the batch has fewer rows than micro-batches, or shapes do not fit.
        """
        for stage in self.stages:
            stage.start(*self._microbatches(tokens, targets))
        run_schedule(self.rank.pipeline, self.plan, self.stages)
        with self.rank.record("complete"):
            self._complete()
        gradient = self.sharded.reduce()
        loss, self.norm = self._loss_and_norm(gradient)
        if self._largest_norm is not None:
            clip_by_global_norm(gradient, self._largest_norm, self.norm)
        with self.rank.record("update"):
            self.sharded.update(rate)
        self.steps += 1
        return loss

    def _microbatches(self, tokens, targets):
        """This data rank's rows in parts, and the number of targets of the whole batch."""
        tokens, targets = np.asarray(tokens), np.asarray(targets)
        if tokens.shape != targets.shape or tokens.ndim != 2:
            raise ValueError(
                f"tokens have shape {tokens.shape} and targets {targets.shape}: give twice "
                "(rows, length)."
            )
        if self._sequence:
            cuts.check_length(tokens.shape[1], self.rank.tensor.size)
        ranks, least = self.rank.data.size, len(tokens) // self.rank.data.size
        if least < self.microbatches:
            raise ValueError(
                f"{len(tokens)} rows do not make {self.microbatches} micro-batches on each of "
                f"{ranks} data ranks: take {ranks * self.microbatches} rows or more."
            )
        mine = shard(len(tokens), self.rank.data)
        parts = equal_cuts(mine.stop - mine.start, self.microbatches)
        divisor = np.count_nonzero(targets != IGNORE)
        mine = [slice(mine.start + part.start, mine.start + part.stop) for part in parts]
        return [tokens[part] for part in mine], [targets[part] for part in mine], divisor

    def _complete(self):
        """The sums that a gradient lacks when the schedule is through."""
        if self._sequence:
            for stage in self.stages:
                views = stage.parts.views(stage.gradient)
                layers = list(stage.parts.layers)
                cuts.complete(self.gpt, layers, [views[n] for n in layers], self.rank.tensor)
        self._tie()

    def _tie(self):
        """The table's gradient: what the embedding and what the head gave, on both of them."""
        first, last, group = self.stages[0], self.stages[-1], self.rank.pipeline
        if TABLE in last.parts.names and group.size == 1:
            both = [_table(first), _table(last)]
            both[0] += both[1]
            both[1][...] = both[0]
        elif group.size > 1 and group.rank in (0, group.size - 1):
            # A sum of two numbers is the same in either order: both copies get the same bits.
            other = group.size - 1 - group.rank
            mine = _table(first if group.rank == 0 else last)
            what = "the tied table's gradient"
            mine += group.exchange(mine, to=other, source=other, what=what)

    def _loss_and_norm(self, gradient):
        """One exchange over all ranks: the loss, and the square of the gradient's length."""
        whole = np.zeros(2)
        if self.rank.tensor.rank == 0:  # the others have the same loss
            whole[0] = sum(stage.loss for stage in self.stages)
        if self._counted is not None:
            whole[1] = np.einsum("i,i,i->", gradient, gradient, self._counted, dtype=np.float64)
        loss, square = all_reduce(self.rank.world, whole)
        return float(loss), math.sqrt(square) if self._counted is not None else None

    def _counted_here(self, zero):
        """1 for each number that the norm counts on this rank, else 0.

        A number that lies on several ranks is counted on the first of them.
        """
        counted = np.ones(self._starts[-1], self.sharded.parameters.dtype)
        coordinate = self.rank.coordinate
        for start, parts in zip(self._starts, self._parts):
            for name, arrays in parts.views(counted[start : start + parts.size]).items():
                for key, array in arrays.items():
                    copy = name == TABLE or key not in cuts.split_names(self.gpt, name)
                    if name == TABLE or (copy and coordinate.tensor > 0):
                        array[...] = 0
        if zero == 0:
            return counted * (coordinate.data == 0)
        return self.sharded.own(counted)

    # ------------------------------------------------------------ what lies where

    def layers(self, kind: str = "parameters") -> dict:
        """Whole layers of this rank's stages; all ranks must ask for them together.

        Parameters
        ----------
        kind : str
            "parameters", or an array of the optimiser's state such as "mean".

        Returns
        -------
        dict of int to array
            For each layer of this rank's stages its flat array, as in ``gpt.slices``.
        """
        flat, found = self._whole(kind), {}
        for start, parts in zip(self._starts, self._parts):
            for layer in parts.layers:
                first, last = parts.slices[layer]
                pieces = _gathered(self.rank.tensor, flat[start + first : start + last])
                found[layer] = cuts.join(self.gpt, layer, pieces)
        return found

    def load(self, layer_of, steps: int) -> None:
        """Set parameters and the optimiser's state, such as those of a checkpoint.

        Parameters
        ----------
        layer_of : callable
            ``layer_of(kind, layer)`` is the flat array of a whole layer, for the kinds of `kinds`.
        steps : int
            Steps that have been taken.
        """
        for kind in self.kinds:
            mine = [
                parts.cut(lambda layer, kind=kind: layer_of(kind, layer), self.rank.tensor.rank)
                for parts in self._parts
            ]
            whole = np.concatenate(mine)
            if kind == "parameters":
                self.sharded.parameters[:] = whole
            else:
                part = whole if self.sharded.stage == 0 else self.sharded.own(whole)
                self.sharded.state[kind][:] = part
        self.steps = self.sharded.state["steps"] = operator.index(steps)

    @property
    def kinds(self) -> list[str]:
        """What training goes on from: "parameters" and the arrays of the optimiser's state."""
        state = self.sharded.state
        return ["parameters", *(k for k, v in state.items() if isinstance(v, np.ndarray))]

    def held(self) -> dict[str, int]:
        """Bytes on this rank, measured: parameters, gradients, state, and activations at most."""
        held = {kind: n for kind, n in self.sharded.held().items() if kind != "unit"}
        return held | {"activations": sum(stage.activation_bytes for stage in self.stages)}

    def _whole(self, kind):
        """An array as long as this rank's parameters, from the parts along the data axis."""
        if kind == "parameters":
            return self.sharded.parameters
        if kind not in self.kinds:
            raise ValueError(f"there is no {kind!r}: choose one of {', '.join(self.kinds)}.")
        part = self.sharded.state[kind]
        return part if self.sharded.stage == 0 else self.sharded.gathered(part)

    def _flats(self):
        return self.sharded.parameters, self.sharded.gradient

    def _chunk(self, number):
        """Cuts the part of a chunk out of this rank's flat array."""
        start, stop = self._starts[number], self._starts[number + 1]
        return lambda flat: flat[start:stop]

    def _check(self, zero, largest_norm, schedule, chunks):
        cuts.check(self.gpt, self.rank.tensor.size)
        if zero not in range(LARGEST_ZERO + 1):
            raise ValueError(
                f"zero is {zero!r}: choose 0 or 1. With micro-batches a rank adds up whole "
                "gradients, so that stages 2 and 3 would save nothing."
            )
        if largest_norm is not None and not largest_norm > 0:
            raise ValueError(f"largest_norm is {largest_norm}: give a positive length, or None.")
        if self.microbatches < 1 or chunks < 1:
            raise ValueError(
                f"microbatches is {self.microbatches} and chunks {chunks}: give 1 or more."
            )
        if chunks > 1 and "chunks" not in inspect.signature(schedule).parameters:
            raise ValueError(
                f"the schedule {schedule.__name__} has one chunk a rank, not {chunks}: "
                "choose schedules.interleaved."
            )


def _table(stage):
    """The gradient of a stage's table of tokens."""
    return stage.parts.views(stage.gradient)[stage.parts.table]["tokens"]


def _gathered(group, part):
    """The parts of all ranks of a group."""
    if group.size == 1:
        return [part]
    return list(all_gather(group, part[np.newaxis], alike=True))
