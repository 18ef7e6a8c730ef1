"""How the caller of a run watches its workers, and ends all of it when one of them fails."""

from __future__ import annotations

import asyncio
import os
import time
from asyncio import CancelledError
from concurrent.futures import CancelledError as FutureCancelledError
from contextlib import suppress

from distributed import wait

from helpers.engine.hosts import Outcome
from helpers.engine.workers import end_run, kill_worker, look_at_run

OPEN_SECONDS = 6.0
"""A worker that does not answer for so long, or for the run's patience if that is longer, is not
waited for."""
ASK_SECONDS = 0.5
"""How often the caller looks whether all workers are still there."""
TELL_SECONDS = 1.0
END_SECONDS = 1.6
"""So long the caller waits for the ranks to end, once the run has failed."""
RESTART_SECONDS = 5.0
DIED = "its worker has died (killed, or out of memory)"
NOT_STOPPED = "its worker did not answer or could not be stopped; it is started anew if it can be"
CANCELLED = "its task was cancelled, as when the cluster is restarted or closed"


def outcomes_of(client, plan, number, place, futures) -> list[Outcome]:
    """The outcomes of all ranks; when one fails, the others are ended."""
    found = {}  # worker -> the outcomes of its ranks
    try:
        left = _wait(client, plan, number, place, futures, found)
    except BaseException:  # an interrupt in the notebook
        tell(client, list(place), end_run, number, "the run was interrupted")
        _wait_for_end(futures.values())
        _stop_stuck(client, [w for w in place if not futures[w].done()])
        raise
    stuck = [w for w, outcomes in found.items() if any(o.kind == "stuck" for o in outcomes)]
    _stop_stuck(client, [*stuck, *(worker for worker in left if worker not in stuck)])
    return [outcome for worker in place for outcome in found[worker]]


def _wait(client, plan, number, place, futures, found):
    """Wait until all tasks have ended, or one has failed and the others had time to end.

    What becomes of the ranks of each worker is put into `found`. Returns the workers that have
    neither ended their task nor died.
    """
    heard, begun, all_begun = dict.fromkeys(place, time.monotonic()), set(), False
    while waiting := [worker for worker in place if worker not in found]:
        with suppress(TimeoutError, FutureCancelledError):
            wait([futures[worker] for worker in waiting], ASK_SECONDS, "FIRST_COMPLETED")
        done = [worker for worker in waiting if futures[worker].done()]
        for worker in done:
            found[worker] = _fetched(client, plan, worker, futures[worker], place[worker])
        waiting = [worker for worker in waiting if worker not in found]
        failed = any(o.kind != "result" for outcomes in found.values() for o in outcomes)
        dead, silent = set(), []
        if not done:
            # Is everybody there? Whoever still waits for a rank that has ended, waits in vain.
            over = [rank for worker in found for rank in place[worker]]
            answered = tell(client, waiting, look_at_run, number, over, all_begun)
            begun.update(w for w in place if answered.get(w) or w in found)
            if not all_begun and len(begun) == len(place):
                all_begun = True
                answered |= tell(client, waiting, look_at_run, number, over, all_begun)
            heard.update(dict.fromkeys(answered, time.monotonic()))
            dead = missing(client, waiting)
            silent = [w for w in waiting if time.monotonic() - heard[w] > plan.patience]
        if failed or dead or silent:
            dead |= missing(client, waiting)
            left = [worker for worker in waiting if worker not in dead and worker not in silent]
            tell(client, left, end_run, number, "the run has failed on another rank")
            _wait_for_end([futures[worker] for worker in left])
            dead, not_stopped = missing(client, waiting), []
            for worker in waiting:
                if worker in dead:
                    found[worker] = _all_of(place[worker], "raised", DIED)
                elif futures[worker].done():
                    found[worker] = _fetched(client, plan, worker, futures[worker], place[worker])
                else:
                    not_stopped.append(worker)
                    kind = "lost" if worker in silent else "stuck"
                    found[worker] = _all_of(place[worker], kind, NOT_STOPPED)
            return not_stopped
    return []


def _fetched(client, plan, worker, future, ranks) -> list[Outcome]:
    """What a task that has ended says of its ranks."""
    if future.status == "error":
        if missing(client, [worker]):
            return _all_of(ranks, "raised", DIED)
        return _all_of(ranks, "raised", f"its worker could not run it: {future.exception()!r}")
    try:
        return client.sync(_fetch, client, worker, future, max(OPEN_SECONDS, plan.patience))
    except (CancelledError, FutureCancelledError):
        return _all_of(ranks, "raised", CANCELLED)
    except _WorkerLost as error:
        return _all_of(ranks, "raised", str(error))
    except Exception as error:
        return _all_of(ranks, "raised", f"its result cannot be unpacked here: {error!r}")


async def _fetch(client, worker, future, patience):
    """A task's result. Dask alone would wait for ever when the result's worker dies on the way: it
    then runs the task again, and that is bound to this worker."""
    task = asyncio.ensure_future(client.gather(future, asynchronous=True))
    heard = time.monotonic()
    try:
        while True:
            await asyncio.wait([task], timeout=ASK_SECONDS)
            if task.done():
                return task.result()
            if worker not in await client.scheduler.ncores(workers=[worker]):
                raise _WorkerLost(DIED)
            sign = asyncio.ensure_future(client.run(os.getpid, workers=[worker]))
            sign.add_done_callback(_no_matter)
            done, _ = await asyncio.wait([sign, task], timeout=TELL_SECONDS)
            if sign in done:
                heard = time.monotonic()
            elif time.monotonic() - heard > patience:
                raise _WorkerLost(f"its worker did not answer for {patience:g} s")
    finally:
        task.add_done_callback(_no_matter)
        task.cancel()


class _WorkerLost(Exception):
    """A worker died, or fell silent, with a result that was not yet fetched."""


def _all_of(ranks, kind, message) -> list[Outcome]:
    return [Outcome(rank, kind, message=message) for rank in ranks]


def missing(client, place):
    alive = client.nthreads(list(place))
    return {worker for worker in place if worker not in alive}


def _wait_for_end(futures):
    left = [future for future in futures if not future.done()]
    if left:
        with suppress(TimeoutError, FutureCancelledError):
            wait(left, END_SECONDS)


def _stop_stuck(client, workers):
    """Kill the workers whose ranks cannot be stopped; their nannies start them anew.

    Where there is no nanny, or it cannot be reached, the rank's thread goes on.
    """
    if not workers:
        return
    before = len(client.nthreads())

    async def ask():
        calls = [
            asyncio.ensure_future(client.run(kill_worker, workers=[worker], nanny=True))
            for worker in workers
        ]
        done, _ = await asyncio.wait(calls, timeout=TELL_SECONDS)
        for call in calls:
            call.add_done_callback(_no_matter)
        return {
            w
            for w, call in zip(workers, calls, strict=True)
            if call in done and not call.exception()
        }

    killed = client.sync(ask)
    until = time.monotonic() + RESTART_SECONDS
    while killed and time.monotonic() < until:
        alive = client.nthreads()
        gone = len(workers) - len(killed)
        if len(alive) >= before - gone and not any(worker in alive for worker in killed):
            return
        time.sleep(0.05)


def tell(client, workers, act, *args) -> dict:
    """Call a function in these workers; returns what those answered that answered soon."""
    answers = ask_workers(client, workers, act, *args, seconds=TELL_SECONDS)
    return {w: answer for w, answer in answers.items() if not isinstance(answer, Exception)}


def ask_workers(client, workers, act, *args, seconds) -> dict:
    """Call a function in these workers; returns the answers and errors that came in time."""

    async def ask():
        calls = {
            asyncio.ensure_future(client.run(act, *args, workers=[worker])): worker
            for worker in workers
        }
        # Not wait_for: it would wait for the end of the cancellation, which a worker that is
        # stopped delays for minutes.
        done, late = await asyncio.wait(calls, timeout=seconds)
        for call in late:
            call.add_done_callback(_no_matter)
            call.cancel()
        return {calls[c]: c.exception() or c.result()[calls[c]] for c in done}

    return client.sync(ask) if workers else {}


def _no_matter(call):
    """Look at how a call has ended, so that asyncio does not complain that nobody did."""
    return call.cancelled() or call.exception()
