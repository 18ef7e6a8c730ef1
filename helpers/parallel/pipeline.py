"""Pipeline parallelism: each rank holds some stages of a model, and works through its schedule.

The executor knows nothing of models. It does what stands in a list of `Operation`, receives before
an operation what that needs, and sends on after it what it gave. Chunk c of rank r is stage
``c * ranks + r`` of the model.

Source: Huang et al. 2019, "GPipe: Efficient training of giant neural networks using pipeline
parallelism", section 2; Narayanan et al. 2021, "Efficient large-scale language model training on
GPU clusters using Megatron-LM", section 2.2.
"""

from __future__ import annotations

import time

from helpers.engine.collectives import barrier
from helpers.engine.events import Event
from helpers.planner.pipeline import GIVES, Costs, find_fault, needs, simulate

ON_THE_WAY = 4
"""So many messages fit between two ranks on one host before the sender has to wait."""


def run_schedule(group, plan, stages, take_turns: bool = False) -> None:
    """Work through this rank's part of a plan; all ranks of the group call it together.

    Parameters
    ----------
    group : Group
        The ranks that hold the stages, as a rule ``rank.pipeline``.
    plan : list of list of Operation
        The operations of all ranks, see `helpers.parallel.schedules.plan`; the same on all ranks.
    stages : sequence of stage
        One for each chunk of this rank. A stage has the methods ``forward(microbatch, x)``, which
        returns what goes to the next stage, and ``backward(microbatch, dy)``, which returns what
        goes to the stage before; for schedules with halves ``input(microbatch, dy)`` and
        ``weight(microbatch)`` in its place. The first stage gets None for ``x``, the last None
        for ``dy``. Arrays that were returned must not be changed afterwards.
    take_turns : bool
        True: only one rank works at any time. Where there are more ranks than cores, an
        operation's time is then its own; the messages are real.

    Raises
    ------
    ValueError
        The plan is one for another number of ranks, or cannot be carried out.

    Examples
    --------
    >>> import numpy as np
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.parallel.schedules import gpipe, plan
    >>> class Double:
    ...     total = 0.0
    ...     def forward(self, microbatch, x):
    ...         return 2 * (np.ones(1) if x is None else x)
    ...     def backward(self, microbatch, dy):
    ...         self.total += 1.0 if dy is None else dy[0]
    ...         return np.array([2.0 if dy is None else 2 * dy[0]])
    >>> def program(rank):
    ...     stage = Double()
    ...     run_schedule(rank.pipeline, plan(gpipe, rank.size, microbatches=3), [stage])
    ...     return float(stage.total)
    >>> spmd.run(None, Mesh(pipeline=2), program).results
    [6.0, 3.0]
    """
    chunks = len(stages)
    if len(plan) != group.size:
        raise ValueError(f"the plan is one for {len(plan)} ranks: this group has {group.size}.")
    fault = find_fault(plan, chunks)
    if fault:
        raise ValueError(f"This schedule cannot be run: {fault}")
    mail = Mail(group, plan, chunks)
    if take_turns:
        for rank, operation in in_turn(plan, chunks):
            if rank == group.rank:
                _carry_out(group, mail, stages, operation)
            mail.fetch_next(rank)
            barrier(group)
    else:
        for operation in plan[group.rank]:
            _carry_out(group, mail, stages, operation)


def _carry_out(group, mail, stages, operation):
    """Receive, compute, send."""
    stage = operation.chunk * group.size + group.rank
    arrived = mail.take(operation, stage)
    compute = getattr(stages[operation.chunk], operation.kind)
    takes = () if operation.kind == "weight" else (arrived,)
    start = time.monotonic()
    given = compute(operation.microbatch, *takes)
    if group.owner.events is not None:
        length, nbytes = time.monotonic() - start, 0 if given is None else given.nbytes
        what = group.owner.index, operation.kind, start, length, nbytes
        group.owner.events.append(Event(*what, layer=stage, microbatch=operation.microbatch))
    mail.send(operation, stage, given)


def in_turn(plan, chunks: int = 1) -> list[tuple]:
    """(rank, operation) of all ranks one after the other, each when what it needs is there.

    Parameters
    ----------
    plan, chunks
        As for `helpers.planner.pipeline.simulate`.

    Examples
    --------
    >>> from helpers.parallel.schedules import one_by_one, plan
    >>> [(rank, operation.kind) for rank, operation in in_turn(plan(one_by_one, 2, 1))]
    [(0, 'forward'), (1, 'forward'), (1, 'backward'), (0, 'backward')]
    """
    left = [iter(operations) for operations in plan]
    events = (event for event in simulate(plan, Costs(), chunks) if event.operation in GIVES)
    return [(event.rank, next(left[event.rank])) for event in events]


class Mail:
    """What comes from other stages, in whatever order this rank needs it.

    A rank sends in the order of its own operations, and everybody knows the plan of all: so it is
    known what comes next from whom. What comes before it is needed waits here.

    Parameters
    ----------
    group : Group
    plan : list of list of Operation
    chunks : int
    """

    def __init__(self, group, plan, chunks):
        self.group, self._last = group, len(plan) * chunks - 1
        self._arrived = {}  # (what, micro-batch, stage that gave it) -> array
        self._coming = {
            source: iter(self._sent_by(source, operations))
            for source, operations in enumerate(plan)
            if source != group.rank
        }

    def take(self, operation, stage):
        """What an operation needs of another stage; it is received if it has not come yet."""
        for need in needs(operation, stage, self._last):
            if need[2] != stage:
                while need not in self._arrived:
                    self._fetch(need[2] % self.group.size)
                return self._arrived.pop(need)
        return None

    def send(self, operation, stage, given):
        """What an operation gave goes to the stage that needs it."""
        to = self._goes_to(operation, stage)
        if to is None:
            return
        need = GIVES[operation.kind], operation.microbatch, stage
        target = to % self.group.size
        if target == self.group.rank:
            self._arrived[need] = given
        else:
            self.group.post(given, target, _label(need), room=ON_THE_WAY * given.nbytes)

    def fetch_next(self, source):
        """Receive what a rank has just sent here in its turn."""
        coming = self._coming.get(source)
        if coming is not None and (need := next(coming)) is not None:
            self._receive(source, need)

    def _fetch(self, source):
        self._receive(source, next(need for need in self._coming[source] if need is not None))

    def _receive(self, source, need):
        self._arrived[need] = self.group.receive(source, what=_label(need))

    def _sent_by(self, source, operations):
        """For each operation of a rank, what it sends here, or None."""
        for operation in operations:
            stage = operation.chunk * self.group.size + source
            to = self._goes_to(operation, stage)
            here = to is not None and to % self.group.size == self.group.rank
            yield (GIVES[operation.kind], operation.microbatch, stage) if here else None

    def _goes_to(self, operation, stage):
        """The stage that needs what an operation gives, if it is another one."""
        if operation.kind == "weight":
            return None
        to = stage + 1 if operation.kind == "forward" else stage - 1
        return to if 0 <= to <= self._last else None


def _label(need):
    what, microbatch, stage = need
    return f"{what} of micro-batch {microbatch} from stage {stage}"
