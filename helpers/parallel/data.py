"""Synchronous data parallelism: each rank its rows, one gradient, one step, the same bits on all.

A rank takes the gradient of the SUM over its rows, divided by the number of rows of the whole
batch (for text: of the tokens that are asked for). These gradients add up to the gradient of the
whole batch, however unequal the shards are; a mean of means would not. The sum goes to all ranks
(all-reduce), and each takes the same step.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
section 3.2 (buckets, overlap with the backward pass, accumulation without exchange).
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from helpers.engine.collectives import ALGORITHMS, all_reduce
from helpers.engine.events import Event
from helpers.nn.optimisers import clip_by_global_norm
from helpers.parallel.shards import (
    alone,
    average_parameters,
    buckets,
    compare,
    cuts,
    positive,
    shard,
)

__all__ = [
    "DataParallel",
    "alone",
    "average_parameters",
    "buckets",
    "describe_not_finite",
    "shard",
]

DIVISOR = "the number of rows of the batch that count"


class DataParallel:
    """Trains one network on all ranks of a group; every rank makes one and calls `step`.

    Parameters
    ----------
    rank : Rank
    model : Network
        An `MLP`, a `GPT`, or another one with the methods of `helpers.nn.Network`.
    optimiser : SGD or Adam
    parameters : float array of shape (size,)
        The same on all ranks; each step changes them in place.
    group : Group, optional
        Who trains together. Default: ``rank.data``.
    bucket_bytes : int, optional
        See `buckets`. Default: one exchange of the whole gradient after the backward pass.
    overlap : bool
        True: a bucket travels in the background while the layers before it are computed. False:
        the backward pass waits for it. With one bucket there is nothing to overlap with.
    microbatches : int
        In how many parts a rank takes its rows. Gradients are accumulated, and exchanged once.
        The workspace shrinks by as much.
    largest_norm : float, optional
        The gradient of the whole batch is clipped to this length.
    algorithm : str, optional
        Of `all_reduce`. With all but "ring" the size of the buckets changes no bit.

    Attributes
    ----------
    parameters : float array of shape (size,)
    gradient : float array of shape (size,)
        After a step: the gradient of the whole batch, clipped. Peers read this memory.
    state : dict
        The optimiser's.
    steps : int
        Steps taken.

    Raises
    ------
    ValueError, TypeError
        If a number is out of its range, or the parameters are not the network's.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.nn import MLP, SGD
    >>> x, y = np.arange(10.0).reshape(5, 2), np.array([0, 1, 0, 1, 1])
    >>> def program(rank):
    ...     mlp, mine = MLP((2, 3, 1)), shard(5, rank.data)
    ...     trainer = DataParallel(rank, mlp, SGD(0.1), mlp.initialise(seed=0))
    ...     trainer.step(x[mine], y[mine], divisor=5)
    ...     return trainer.parameters
    >>> serial, = spmd.run(None, Mesh(data=1), program).results
    >>> first, second = spmd.run(None, Mesh(data=2), program).results
    >>> np.array_equal(first, second), np.allclose(first, serial, rtol=1e-12)
    (True, True)
    """

    def __init__(
        self,
        rank,
        model,
        optimiser,
        parameters,
        *,
        group=None,
        bucket_bytes=None,
        overlap=True,
        microbatches=1,
        largest_norm=None,
        algorithm=None,
    ):
        model.check_flat("parameters", parameters)
        if largest_norm is not None and not largest_norm > 0:
            raise ValueError(f"largest_norm is {largest_norm}: give a positive length, or None.")
        if algorithm is not None and algorithm not in ALGORITHMS:
            raise ValueError(f"no all-reduce is called {algorithm!r}: choose one of {ALGORITHMS}.")
        self.rank, self.model, self.optimiser = rank, model, optimiser
        self.group = rank.data if group is None else group
        self.parameters, self.steps = parameters, 0
        self.state = optimiser.start(model.size, parameters.dtype)
        self.gradient = rank.empty(model.size, parameters.dtype)
        self.microbatches = positive("microbatches", microbatches)
        # What one micro-batch adds; the first of them is written straight into the gradient.
        self._part = np.empty_like(parameters) if self.microbatches > 1 else None
        self._buckets = {b.layer: b for b in buckets(model, bucket_bytes, parameters.dtype)}
        self._overlap = overlap and len(self._buckets) > 1
        self._largest_norm, self._algorithm = largest_norm, algorithm
        self._workspace = model.workspace(dtype=parameters.dtype)

    def step(self, x, y, divisor=None, rate=None):
        """Take one step along the gradient of the whole batch. All ranks call it together.

        Parameters
        ----------
        x : array of n rows
            This rank's part of the batch, perhaps empty: numbers of the dtype of the parameters,
            or for a GPT tokens.
        y : array of n rows
            Their labels or targets.
        divisor : int, optional
            How many targets of all ranks together count: the rows of the whole batch, for a GPT
            its targets that are not -1. Default: they are counted (`Network.counted`), which costs
            a small exchange.
        rate : float, optional
            Instead of the optimiser's own.

        Returns
        -------
        float
            This rank's share of the loss. The shares of all ranks add up to the mean of the batch.

        Raises
        ------
        FloatingPointError
            If a gradient of this rank is NaN or infinite. It is found before it is sent.
        ValueError, TypeError
            If nothing in the batch counts, or shapes or dtypes do not fit. In the first step also
            if the ranks have different parameters, or the divisor is not what they count.
        """
        divisor = self._checked_divisor(x, y, divisor)
        loss, works = self._backward(x, y, divisor)
        for work in works:
            work.wait()
        if self._largest_norm is not None:
            # The whole gradient lies here, so its norm is the one that a single rank would find.
            clip_by_global_norm(self.gradient, self._largest_norm)
        with self.rank.record("update"):
            self.optimiser.step(self.parameters, self.gradient, self.state, rate)
        self.steps += 1
        return loss

    def _checked_divisor(self, x, y, divisor):
        """How many rows of the whole batch count; in the first step the ranks compare more."""
        self.model.check_inputs(self.parameters, x)
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows and y {len(y)}: give as many.")
        if divisor is not None:
            divisor = positive(DIVISOR, divisor)
        if self.steps == 0:
            found = compare(self.group, self.model.counted(y), self.parameters)
            if divisor not in (None, found):
                raise ValueError(
                    f"the divisor is {divisor}, but of the ranks' rows together {found} count."
                )
        elif divisor is None:
            found = int(all_reduce(self.group, np.array(self.model.counted(y), np.int64)))
        else:
            found = divisor
        return positive(DIVISOR, found)

    def _backward(self, x, y, divisor):
        """This rank's share of the loss, and the exchanges that still go on."""
        loss, works = 0.0, []
        # At least one part, so that a rank without rows has a gradient too: zeros.
        parts = cuts(len(x), min(self.microbatches, max(1, len(x))))
        for number, part in enumerate(parts):
            added, layers = self._microbatch(x[part], y[part], divisor, number)
            loss += added
            for layer in layers:
                bucket = self._buckets.get(layer) if number == len(parts) - 1 else None
                if bucket is not None:
                    self._check_finite(bucket, layers)
                    works += self._start(bucket)
        return loss, works

    def _microbatch(self, x, y, divisor, number):
        """The loss of some rows, and the layers whose gradients are complete, one by one."""
        with self.rank.record("forward", microbatch=number):
            loss = self.model.forward(self.parameters, x, y, self._workspace, divisor)
        return loss, self._layers(x, number)

    def _layers(self, x, number):
        """The backward pass of one micro-batch; its gradient is added to those before it."""
        out = self.gradient if number == 0 else self._part
        layers = self.model.backward(self.parameters, x, out, self._workspace)
        for layer in reversed(range(len(self.model.slices))):
            with self.rank.record("backward", layer=layer, microbatch=number):
                next(layers)
                if number > 0:
                    place = slice(*self.model.slices[layer])
                    self.gradient[place] += self._part[place]
            yield layer

    def _check_finite(self, bucket, layers):
        """Raise before anything is sent, if this rank's gradient is not a number somewhere."""
        part = self.gradient[bucket.start : bucket.stop]
        with np.errstate(all="ignore"):
            if np.isfinite(part @ part):
                return
            # Large numbers may overflow when squared, and be harmless. It is rare: look closely.
            if np.isfinite(part).all():
                return
            deque(layers, maxlen=0)  # the layers before it too, so that all can be named
        where = describe_not_finite(self.model, self.gradient)
        raise FloatingPointError(
            f"on rank {self.rank.index}, in step {self.steps}, the gradient is not finite: {where}."
            " Steps count from 0. Look for NaN in this rank's rows, or lower the rate."
        )

    def _start(self, bucket):
        """Begin a bucket's exchange; the list holds it, if it goes on in the background."""
        if self.group.size == 1:
            return []
        part = self.gradient[bucket.start : bucket.stop]
        if self._overlap:
            work = (_exchange, self.group, part, bucket.layer, self._algorithm)
            return [self.rank.background(*work)]
        _exchange(self.group, part, bucket.layer, self._algorithm)
        return []


def describe_not_finite(model, gradient):
    """Where a gradient is NaN or infinite, in words.

    Parameters
    ----------
    model : Network
    gradient : float array of shape (size,)

    Returns
    -------
    str
        Empty, if it is finite everywhere.

    Examples
    --------
    >>> from helpers.nn import MLP
    >>> describe_not_finite(MLP((2, 1, 1)), np.array([1.0, np.nan, np.nan, 0.0, -np.inf]))
    'layer 0 has 2 NaN, layer 1 has 1 infinite'
    """
    found = []
    for layer, place in enumerate(model.slices):
        part = gradient[slice(*place)]
        counts = {"NaN": np.isnan(part).sum(), "infinite": np.isinf(part).sum()}
        words = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        found += [f"layer {layer} has {words}"] if words else []
    return ", ".join(found)


# ---------------------------------------------------------------- small parts


def _exchange(group, part, layer, algorithm):
    """The all-reduce of a bucket, and a record of it on the lane where it ran."""
    start = time.monotonic()
    all_reduce(group, part, out=part, algorithm=algorithm)
    if group.owner.events is not None:
        length, lane = time.monotonic() - start, group.lane
        event = Event(group.owner.index, "all_reduce", start, length, part.nbytes, layer, lane=lane)
        group.owner.events.append(event)
