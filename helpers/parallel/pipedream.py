"""An asynchronous pipeline: never emptied, its weights kept in several versions (PipeDream).

A synchronous pipeline empties before each update: that is its bubble. This one does not. Each
micro-batch makes an update of its own: a rank updates its stage right after each backward pass and
goes on. With p ranks, rank r is ``p - r - 1`` forward passes ahead, so the gradient that it applies
was begun at weights that many updates old. That is no longer the SGD of a single rank:

    w(t + 1) = w(t) - rate * gradient(w0(t - p + 1), w1(t - p + 2), …, wp-1(t))

A gradient is only one if forward and backward pass see the *same* weights. Therefore each
micro-batch's weights are stashed until its backward pass: rank r keeps p - r versions.

Source: Narayanan et al. 2019, "PipeDream: Generalized pipeline parallelism for DNN training",
sections 3.2 (1F1B) and 3.3 (weight stashing, staleness).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from helpers.parallel.schedules import one_f_one_b


@dataclass(frozen=True, eq=False)
class Trained:
    """What one rank has at the end.

    Attributes
    ----------
    parameters : array of shape (size,)
        Of its stage.
    losses : list of float
        Of each micro-batch, on the last rank; empty on the others.
    staleness : list of int
        For each micro-batch, how many updates of this stage came between its forward pass and the
        update that it made.
    stashed : int
        Bytes of all versions of the parameters, the newest included, at most.
    """

    parameters: np.ndarray
    losses: list
    staleness: list
    stashed: int


def train(rank, stage, parameters, optimiser, steps: int, stashing: bool = True) -> Trained:
    """Train one stage; all ranks of ``rank.pipeline`` call it together.

    Parameters
    ----------
    rank : Rank
    stage : object
        With two pure methods. ``forward(parameters, microbatch, x)`` returns what goes to the next
        stage (the loss, on the last one), and what the backward pass needs; ``x`` is None on the
        first stage. ``backward(parameters, kept, dy)`` returns what goes to the stage before (on
        the first one, whatever it likes), and the gradient; ``dy`` is None on the last stage.
    parameters : array of shape (size,)
        Of this stage; left as they are.
    optimiser : SGD or Adam
        From `helpers.nn`.
    steps : int
        Micro-batches, each with an update of its own.
    stashing : bool
        False: the backward pass takes the newest parameters, and gives no gradient of anything.

    Returns
    -------
    Trained

    Raises
    ------
    ValueError
        The number of steps is no whole number from 1 up.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.nn import SGD
    >>> class Times:
    ...     def forward(self, w, microbatch, x):
    ...         x = np.ones(1) if x is None else x
    ...         return w * x, x
    ...     def backward(self, w, x, dy):
    ...         dy = np.ones(1) if dy is None else dy
    ...         return w * dy, x * dy
    >>> def program(rank):
    ...     found = train(rank, Times(), np.ones(1), SGD(rate=0.1), steps=4)
    ...     return found.staleness, found.stashed
    >>> spmd.run(None, Mesh(pipeline=2), program).results
    [([0, 1, 1, 1], 16), ([0, 0, 0, 0], 8)]
    """
    mine = _Stage(rank, stage, parameters, optimiser, stashing)
    for operation in one_f_one_b(mine.group.rank, mine.group.size, steps):
        getattr(mine, operation.kind)(operation.microbatch)
        mine.count()
    return Trained(mine.parameters, mine.losses, mine.staleness, mine.stashed)


class _Stage:
    """One rank's stage, its newest parameters, and what its micro-batches on the way have seen."""

    def __init__(self, rank, stage, parameters, optimiser, stashing):
        self.rank, self.group, self.stage = rank, rank.pipeline, stage
        self.parameters, self.optimiser, self.stashing = parameters, optimiser, stashing
        self.state = optimiser.start(parameters.size, parameters.dtype)
        self.on_the_way = deque()  # (version, parameters, what the backward pass needs)
        self.losses, self.staleness, self.stashed = [], [], 0

    def forward(self, microbatch):
        group = self.group
        x = group.receive(group.rank - 1) if group.rank else None
        with self.rank.record("forward", layer=group.rank, microbatch=microbatch):
            y, kept = self.stage.forward(self.parameters, microbatch, x)
        self.on_the_way.append((len(self.staleness), self.parameters, kept))
        if group.rank + 1 < group.size:
            group.post(y, group.rank + 1)
        else:
            self.losses.append(float(np.sum(y)))

    def backward(self, microbatch):
        group = self.group
        dy = group.receive(group.rank + 1) if group.rank + 1 < group.size else None
        began, seen, kept = self.on_the_way.popleft()
        with self.rank.record("backward", layer=group.rank, microbatch=microbatch):
            seen = seen if self.stashing else self.parameters
            dx, gradient = self.stage.backward(seen, kept, dy)
            self.parameters = _updated(self.optimiser, self.parameters, gradient, self.state)
        if group.rank:
            group.post(dx, group.rank - 1)
        self.staleness.append(len(self.staleness) - began)

    def count(self):
        """Note the bytes of all versions that are still needed."""
        kept = [old for _, old, _ in self.on_the_way] if self.stashing else []
        versions = {id(old): old.nbytes for old in (*kept, self.parameters)}
        self.stashed = max(self.stashed, sum(versions.values()))


def _updated(optimiser, parameters, gradient, state):
    """The next version; the one before stays as it is, for those who still need it."""
    parameters = parameters.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        optimiser.step(parameters, gradient, state)
    return parameters


class Versioned:
    """A stage as `helpers.parallel.stage` has it, in the form that `train` and `replay` want.

    Parameters
    ----------
    stage : GPTStage
        It has begun a step whose micro-batches are those of the whole training. Where the head is
        not on the first stage, it has a copy of the table of tokens: here that goes its own way.

    Examples
    --------
    >>> from helpers.nn import GPT, SGD
    >>> from helpers.parallel.stage import GPTStage, Parts
    >>> gpt, tokens = GPT(vocabulary=5, context=4, width=8, heads=2, layers=1), np.arange(4)[None]
    >>> stage = GPTStage(Parts(gpt, range(3)), np.empty(gpt.size), np.empty(gpt.size))
    >>> stage.start([tokens] * 9, [tokens] * 9, divisor=4)
    >>> _, losses = replay([Versioned(stage)], [gpt.initialise(0)], SGD(rate=0.5), steps=9)
    >>> losses[0] > losses[-1]
    True
    """

    def __init__(self, stage):
        self.stage = stage

    def forward(self, parameters, microbatch, x):
        """What goes to the next stage, or the loss; and the micro-batch's number."""
        self.stage.parameters[:], before = parameters, self.stage.loss
        y = self.stage.forward(microbatch, x)
        return self.stage.loss - before if y is None else y, microbatch

    def backward(self, parameters, microbatch, dy):
        """What goes to the stage before, and the gradient of this micro-batch alone."""
        self.stage.parameters[:], self.stage.gradient[:] = parameters, 0
        dx = self.stage.backward(microbatch, dy)
        return dx, self.stage.gradient.copy()


def replay(stages, parameters, optimiser, steps: int, stashing: bool = True, delays=None):
    """The same training in one process, with every delay put in by hand.

    Parameters
    ----------
    stages : sequence of stage
        As for `train`, in order.
    parameters : sequence of array
        Of each stage.
    optimiser, steps, stashing
        As for `train`.
    delays : sequence of int, optional
        How many updates old each stage's weights are in a forward pass. Default: those of the
        asynchronous pipeline, ``p - r - 1``. With zeros it is the SGD of a single rank.

    Returns
    -------
    parameters : list of array
    losses : list of float

    Examples
    --------
    >>> from helpers.nn import SGD
    >>> class Square:
    ...     def forward(self, w, microbatch, x):
    ...         return w**2, w
    ...     def backward(self, w, kept, dy):
    ...         return None, 2 * kept
    >>> replay([Square()], [np.ones(1)], SGD(rate=0.25), steps=3)[1]
    [1.0, 0.25, 0.0625]
    """
    last = len(stages) - 1
    delays = [last - r for r in range(len(stages))] if delays is None else delays
    states = [optimiser.start(p.size, p.dtype) for p in parameters]
    # The newest version stands at the end, and the oldest that is still needed at the front.
    versions = [deque([p], maxlen=delay + 1) for p, delay in zip(parameters, delays, strict=True)]
    losses = []
    for microbatch in range(steps):
        seen, kept, passed = [known[0] for known in versions], [], None
        for stage, old in zip(stages, seen, strict=True):
            passed, needed = stage.forward(old, microbatch, passed)
            kept.append(needed)
        losses.append(float(np.sum(passed)))
        passed = None
        for r in range(last, -1, -1):
            old = seen[r] if stashing else versions[r][-1]
            passed, gradient = stages[r].backward(old, kept[r], passed)
            versions[r].append(_updated(optimiser, versions[r][-1], gradient, states[r]))
    return [known[-1] for known in versions], losses


def stashed_bytes(rank: int, ranks: int, nbytes: int) -> int:
    """Bytes of the versions that a rank keeps once the pipeline is full: `ranks - rank` of them.

    Examples
    --------
    >>> [stashed_bytes(rank, ranks=4, nbytes=100) for rank in range(4)]
    [400, 300, 200, 100]
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"There is no rank {rank}: there are 0 to {ranks - 1}.")
    return (ranks - rank) * nbytes
