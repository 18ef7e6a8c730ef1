"""What happens in one process that holds ranks: their threads, their watch, and their end."""

from __future__ import annotations

import contextvars
import ctypes
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cloudpickle

from helpers.engine.errors import PeerLost, RunEnded, Unanswered
from helpers.engine.events import Event
from helpers.engine.mesh import Mesh
from helpers.engine.ranks import Rank
from helpers.engine.transport import Endpoint

LOOK_SECONDS = 0.25
ASK_SECONDS = 0.4
"""After the end of a run a rank gets so long to notice, then it is interrupted …"""
GIVE_UP_SECONDS = 1.2
"""… and after so long it is reported as not to be stopped."""

KINDS = ("raised", "unanswered", "lost", "ended", "stuck", "result")
"""How a program can end; the earlier ones tell more about the cause of a failure."""


@dataclass(frozen=True)
class Plan:
    """What all processes of a run are told.

    Attributes
    ----------
    mesh : Mesh
    patience : float
        Seconds.
    record : bool
    most_bytes : int, optional
        The largest result that the caller can take. None: it is in the same process.
    """

    mesh: Mesh
    patience: float = 6.0
    record: bool = False
    most_bytes: int | None = None


@dataclass
class Outcome:
    """How one rank's program ended.

    Attributes
    ----------
    rank : int
    kind : str
        One of `KINDS`.
    value : object
        The program's result, or the error, when it can be pickled.
    message, trace : str
        The error in words, and where it was raised.
    doing : str or None
        What the rank waited in when it ended.
    began, ended : float
        `time.monotonic` of this host, s.
    events : list of Event
    """

    rank: int
    kind: str = "stuck"
    value: Any = None
    message: str = "it did not stop"
    trace: str = ""
    doing: str | None = None
    began: float = 0.0
    ended: float = 0.0
    events: list[Event] = field(default_factory=list)


def run_ranks(
    endpoint: Endpoint,
    plan: Plan,
    ranks: list[int],
    program: Callable,
    arguments: dict[int, tuple],
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """Run a program on some ranks, each in a thread, until all have ended.

    Parameters
    ----------
    endpoint : Endpoint
        Its table of addresses is complete.
    plan : Plan
    ranks : list of int
        Those of this process.
    program : callable
        ``program(rank, *arguments[rank.index])``.
    arguments : dict of int to tuple
    cancelled : callable
        Asked now and then; True ends the run.

    Returns
    -------
    list of Outcome
        In the order of `ranks`. It never raises what a program raises.
    """
    endpoint.patience, endpoint.begun = plan.patience, True
    outcomes = [Outcome(index) for index in ranks]
    done = threading.Semaphore(0)
    threads = []
    # All ranks first: a message may come before its receiver's thread has begun.
    members = [Rank(index, plan.mesh, endpoint, plan.patience, plan.record) for index in ranks]
    for rank, outcome in zip(members, outcomes, strict=True):
        work = (_run_one, rank, outcome, plan, program, arguments[rank.index], done)
        # The context tells Dask's get_worker and actors in which worker they are.
        run = contextvars.copy_context().run
        threads.append(threading.Thread(target=run, args=work, daemon=True, name=f"{rank}"))
    for thread in threads:
        thread.start()
    try:
        _watch(endpoint, threads, done, cancelled)
    except BaseException:  # an interrupt, when the ranks run in the reader's own process
        endpoint.end("the run was interrupted")
        _watch(endpoint, threads, done, cancelled)
        raise
    return outcomes


def _run_one(rank, outcome, plan, program, arguments, done):
    try:
        _run_program(rank, outcome, plan, program, arguments)
        _end_rank(rank, outcome)
    except RunEnded:  # the one interrupt came outside the program: nothing else can come any more
        if outcome.kind not in ("result", "raised"):
            outcome.kind, outcome.message = "ended", "RunEnded: the run has ended"
        _end_rank(rank, outcome)
    finally:
        done.release()


def _run_program(rank, outcome, plan, program, arguments):
    outcome.began = outcome.ended = time.monotonic()
    try:
        outcome.value = program(rank, *arguments)
        rank.finish_background()
        _check_result(outcome.value, plan)
        outcome.kind = "result"
    except BaseException as error:
        outcome.ended = time.monotonic()
        _describe(outcome, error, rank)
        _let_go(error)
    else:
        outcome.ended = time.monotonic()


def _end_rank(rank, outcome):
    """Close what a rank has opened, and tell the others; it may be called again."""
    endpoint, ended_well = rank.endpoint, outcome.kind == "result"
    outcome.events = rank.events or []
    if not ended_well:
        endpoint.end(f"rank {rank.index} failed: {outcome.message}")
    rank.close(farewell=ended_well)
    endpoint.finish([rank.index])
    if not ended_well:
        endpoint.drop(rank.index)


def _let_go(error):
    """Free what the program had in its variables: the traceback would keep it."""
    for _ in range(100):  # errors may refer to each other in a circle
        if error is None:
            return
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _describe(outcome, error, rank):
    kinds = {RunEnded: "ended", PeerLost: "lost", Unanswered: "unanswered"}
    outcome.kind = kinds.get(type(error), "raised")
    outcome.doing = rank.doing
    outcome.message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    # The reader's own lines, and the first of ours that they called.
    inner = [place for place, frame in enumerate(frames) if _is_ours(frame)]
    last = next((place for place in inner if place > 0), len(frames))
    lines = traceback.format_list(frames[1 : last + 1]) + traceback.format_exception_only(error)
    outcome.trace = "".join(lines)
    try:
        outcome.value = cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        outcome.value = None  # its words and its traceback are enough


def _is_ours(frame):
    return os.path.dirname(frame.filename) == os.path.dirname(__file__)


def _check_result(value, plan):
    if plan.most_bytes is None:  # the caller is in this process: nothing is sent
        return
    from dask.sizeof import sizeof

    nbytes = sizeof(value)
    if nbytes > plan.most_bytes:
        raise MemoryError(
            f"the program returns {nbytes / 2**30:.2f} GiB, but the caller has room for "
            f"{plan.most_bytes / 2**30:.2f} GiB: return less, or write it to a file."
        )
    try:
        cloudpickle.dumps(value, protocol=5, buffer_callback=lambda buffer: None)
    except Exception as error:
        raise TypeError(
            f"the program returns something that cannot be sent to the caller ({error}): return "
            "numbers, text or arrays."
        ) from None


def _watch(endpoint, threads, done, cancelled):
    """Wait until all threads have ended; push those that do not stop when the run has ended."""
    left, ended_at, asked = len(threads), None, False
    while left:
        if done.acquire(timeout=LOOK_SECONDS):
            left -= 1
            continue
        if endpoint.ended is None and cancelled():
            endpoint.end("the caller has gone")
        if endpoint.ended is None:
            continue
        now = time.monotonic()
        ended_at = ended_at or now
        if now - ended_at > GIVE_UP_SECONDS:
            return
        if now - ended_at > ASK_SECONDS and not asked:
            asked = True
            for thread in threads:
                _interrupt(thread)
    for thread in threads:
        thread.join()


def _interrupt(thread):
    """Raise `RunEnded` in another thread, at its next step in Python."""
    if thread.is_alive() and thread.ident:
        number = ctypes.c_ulong(thread.ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(RunEnded))
