"""One program on every rank (SPMD): Dask places, starts, watches and ends it.

One Dask task for each worker in use holds that worker's ranks, each in a thread; as a rule that is
one rank a worker. The tasks leave Dask's thread pool at once (`distributed.secede`), so that two
runs on one cluster can never wait for each other's places. The ranks then exchange arrays
directly, without Dask: a task's round trip costs milliseconds, a message here some ten
microseconds.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
import uuid
from asyncio import CancelledError
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from contextlib import suppress
from dataclasses import dataclass

import cloudpickle
from distributed import Client, get_worker, secede, wait
from distributed.comm.addressing import get_address_host

from helpers.engine.errors import RankError
from helpers.engine.events import Event
from helpers.engine.hosts import KINDS, Outcome, Plan, run_ranks
from helpers.engine.mesh import Mesh
from helpers.engine.transport import (
    UNCLAIMED_SECONDS,
    Address,
    Endpoint,
    Security,
    host_identity,
)
from helpers.limits import usable_memory

__all__ = ["RankError", "Run", "run"]

RANKS_A_WORKER = 64
OPEN_SECONDS = 6.0
"""A worker that does not answer for so long, or for the run's patience if that is longer, is not
waited for at the launch."""
ASK_SECONDS = 0.5
"""How often the caller looks whether all workers are still there."""
TELL_SECONDS = 1.0
END_SECONDS = 1.6
"""So long the caller waits for the ranks to end, once the run has failed."""
RESTART_SECONDS = 5.0
CLOCK_CALLS = 5
DIED = "its worker has died (killed, or out of memory)"
NOT_STOPPED = "its worker did not answer or could not be stopped; it is started anew if it can be"
CANCELLED = "its task was cancelled, as when the cluster is restarted or closed"
NAME = "many-hands"


@dataclass(frozen=True)
class Run:
    """What a run gave.

    Attributes
    ----------
    results : list
        What the program returned, by rank.
    events : list of Event
        What was recorded, in order of start; 0 is when the first rank began.
    seconds : float
        From the first rank's beginning to the last one's end.
    """

    results: list
    events: list[Event]
    seconds: float


def run(
    client: Client | None,
    mesh: Mesh,
    program: Callable,
    *args,
    each: Sequence | None = None,
    record: bool = False,
    patience: float = 6.0,
    transport: str | None = None,
) -> Run:
    """Run a program on every rank of a mesh and return the results of all.

    Parameters
    ----------
    client : distributed.Client or None
        Whose workers hold the ranks, in blocks of neighbours; more ranks than workers share
        workers as threads. None: the ranks are threads of this process, without Dask.
    mesh : Mesh
    program : callable
        ``program(rank, *args)`` with a `Rank`; an ordinary function that can be pickled.
    *args
        The same for all ranks. Futures of `client` arrive as their results.
    each : sequence, optional
        One further argument for each rank.
    record : bool
        Record events.
    patience : float
        Seconds that a rank waits for a sign of another one, once all ranks have begun.
    transport : {None, "tcp"}
        None: the quickest way between each two ranks. "tcp": TCP between all processes.

    Returns
    -------
    Run

    Raises
    ------
    RankError
        A rank raised, or a worker died or stopped answering, or a message was sent that nobody
        received. All ranks have ended then.
    ValueError, TypeError
        The run is impossible as asked.

    Examples
    --------
    >>> run(None, Mesh(data=2), lambda rank: rank.index * 10).results
    [0, 10]
    """
    _check(mesh, program, each, patience, transport)
    arguments = [args if each is None else (*args, each[rank]) for rank in range(mesh.size)]
    if client is None:
        return _collect(_run_here(Plan(mesh, patience, record), program, arguments), {})
    # All results come to this process: together they may fill half of its memory.
    plan = Plan(mesh, patience, record, usable_memory() // 2 // mesh.size)
    return _run_there(client, plan, program, arguments, transport == "tcp")


def _check(mesh, program, each, patience, transport):
    if not isinstance(mesh, Mesh):
        raise TypeError(f"run needs a Mesh such as Mesh(data=2), not {mesh!r}.")
    if not callable(program):
        raise TypeError(f"run needs a program, a function of a rank, not {program!r}.")
    if each is not None and len(each) != mesh.size:
        raise ValueError(f"each needs one item for each of {mesh.size} ranks, not {len(each)}.")
    if not patience > 0:
        raise ValueError(f"patience must be a number of seconds above 0, not {patience!r}.")
    if transport not in (None, "tcp"):
        raise ValueError(f"transport must be None or 'tcp', not {transport!r}.")


# ---------------------------------------------------------------- in this process


def _run_here(plan, program, arguments):
    if plan.mesh.size > RANKS_A_WORKER:
        raise ValueError(
            f"{plan.mesh.size} ranks are too many for one process: at most {RANKS_A_WORKER}."
        )
    endpoint = Endpoint(Security(b""))
    endpoint.address = Address("here", host_identity(), "", ("", 0), time.monotonic())
    ranks = list(range(plan.mesh.size))
    endpoint.table = [endpoint.address for _ in ranks]
    try:
        outcomes = run_ranks(endpoint, plan, ranks, program, dict(enumerate(arguments)))
        _check_all_read(outcomes, endpoint.unread())
        return outcomes
    finally:
        endpoint.close()


# ---------------------------------------------------------------- on Dask workers


def _run_there(client, plan, program, arguments, only_tcp):
    packed = _pickled(program)
    workers = _workers(client)
    place = _placement(plan.mesh.size, workers)
    number, secret = uuid.uuid4().hex, os.urandom(32)
    futures = {}
    try:
        seconds = max(OPEN_SECONDS, plan.patience)
        addresses = _ask(client, list(place), _open, number, secret, only_tcp, seconds=seconds)
        _check_opened(client, list(place), addresses, seconds)
        table = [addresses[worker] for worker, ranks in place.items() for _ in ranks]
        for worker, ranks in place.items():
            theirs = {rank: arguments[rank] for rank in ranks}
            key = f"spmd-{number[:8]}-{ranks[0]}"
            futures[worker] = client.submit(
                *(_host, number, worker, plan, packed, table, list(ranks)),
                *[argument for rank in ranks for argument in theirs[rank]],
                workers=[worker],
                allow_other_workers=False,
                key=key,
                pure=False,
                priority=10,
            )
        outcomes = _gather(client, plan, number, place, futures)
        well = all(outcome.kind == "result" for outcome in outcomes)
        behind = _clocks(client, addresses) if well else {}
    finally:
        unread = _tell(client, list(place), _close, number)
        for future in futures.values():
            future.release()
    _check_all_read(outcomes, [item for found in unread.values() for item in found or ()])
    return _collect(outcomes, {rank: behind.get(a.process, 0.0) for rank, a in enumerate(table)})


def _pickled(program):
    try:
        return cloudpickle.dumps(program)
    except Exception as error:
        name = getattr(program, "__name__", repr(program))
        raise TypeError(
            f"The program {name!r} cannot be sent to the workers: {error}. Open files, locks and "
            "connections inside the program, do not bring them along."
        ) from None


def _workers(client):
    """The addresses of the workers in use, in the order of their names."""
    # Not scheduler_info: its answer is a copy that is renewed, and emptied, in the background.
    info = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    if not info:
        raise ValueError("The cluster has no worker: start one, then run the cell again.")
    in_use = getattr(client, "in_use", None) or info
    here = [address for address in info if address in in_use]
    return sorted(
        here, key=lambda address: (len(str(info[address]["name"])), str(info[address]["name"]))
    )


def _placement(ranks, workers):
    """Which ranks each worker holds: blocks of neighbours, as equal as can be."""
    if ranks > RANKS_A_WORKER * len(workers):
        raise ValueError(
            f"{ranks} ranks are too many for {len(workers)} worker{'s' * (len(workers) != 1)}: "
            f"at most {RANKS_A_WORKER} ranks share one. Take a smaller mesh or more workers."
        )
    used = workers[: min(ranks, len(workers))]
    cuts = [number * ranks // len(used) for number in range(len(used) + 1)]
    return {worker: range(a, b) for worker, a, b in zip(used, cuts[:-1], cuts[1:], strict=True)}


def _check_opened(client, workers, addresses, seconds):
    for worker in workers:
        answer = addresses.get(worker)
        if isinstance(answer, Address):
            continue
        if answer is not None:
            if worker in _missing(client, workers):
                raise RankError(f"The worker {worker} has died (killed, or out of memory).")
            raise RankError(f"The worker {worker} could not open its end of the run: {answer!r}")
        raise RankError(f"The worker {worker} did not answer for {seconds:g} s.")


async def _open(number, secret, only_tcp, dask_worker=None):
    """Runs in a worker's event loop: be ready for the connections of a run."""
    tls = dask_worker.address.startswith("tls://")
    security = Security(secret)
    if tls:
        settings = dask_worker.security
        security.dialler = settings.get_connection_args("worker")["ssl_context"]
        security.listener = settings.get_listen_args("worker")["ssl_context"]
    host = get_address_host(dask_worker.address)
    endpoint = Endpoint(security, host, only_tcp, started=math.inf)
    try:
        address = endpoint.listen()
    except BaseException:
        endpoint.close()
        raise
    _endpoints(dask_worker)[number] = endpoint
    dask_worker.loop.call_later(UNCLAIMED_SECONDS, _expire, dask_worker, number)
    return address


def _endpoints(worker) -> dict[str, Endpoint]:
    return worker.extensions.setdefault(NAME, {})


def _expire(worker, number):
    """The caller died between opening and starting a run, or before it closed one."""
    endpoint = _endpoints(worker).get(number)
    if endpoint is None or endpoint.ports:
        return
    left = endpoint.heard + UNCLAIMED_SECONDS - time.monotonic()
    if left > 0:  # the caller is there: its ranks wait for their arguments, or for a busy worker
        worker.loop.call_later(left, _expire, worker, number)
        return
    _endpoints(worker).pop(number, None)
    endpoint.close()


def _host(number, address, plan, packed, table, ranks, *arguments):
    """The Dask task: runs in a worker, and holds its ranks."""
    worker = get_worker()
    if worker.address != address:
        raise RuntimeError("the worker of these ranks has died")  # and Dask tries another one
    secede()
    endpoint = _endpoints(worker).get(number)
    if endpoint is None:
        raise RuntimeError("nothing was heard of the caller of this run for too long")
    endpoint.table = table
    share = len(arguments) // len(ranks)
    theirs = {
        rank: arguments[place * share : (place + 1) * share] for place, rank in enumerate(ranks)
    }
    key = worker.get_current_task()
    try:
        program = cloudpickle.loads(packed)
    except Exception as error:
        message = f"the program cannot be unpacked on its worker: {error!r}"
        return [Outcome(rank, "raised", message=message) for rank in ranks]
    outcomes = run_ranks(endpoint, plan, ranks, program, theirs, lambda: _is_cancelled(worker, key))
    if _is_cancelled(worker, key):  # nobody is left who would close it
        _endpoints(worker).pop(number, None)
        endpoint.close()
    else:
        worker.loop.add_callback(worker.loop.call_later, UNCLAIMED_SECONDS, _expire, worker, number)
    return outcomes


def _is_cancelled(worker, key):
    """True when nobody wants the task any more: its client has gone."""
    task = worker.state.tasks.get(key)
    return task is None or task.state in ("cancelled", "forgotten", "released")


def _end(number, cause, dask_worker=None):
    endpoint = _endpoints(dask_worker).get(number)
    if endpoint is not None:
        endpoint.end(cause)


def _look(number, over, all_began, dask_worker=None):
    """The caller's regular call: these ranks have ended. Returns whether those here have begun."""
    endpoint = _endpoints(dask_worker).get(number)
    if endpoint is None:
        return False
    endpoint.heard = time.monotonic()
    endpoint.finish(over)
    if all_began:
        endpoint.all_began()
    return endpoint.begun


async def _close(number, dask_worker=None):
    """Returns which messages nobody has received."""
    endpoint = _endpoints(dask_worker).pop(number, None)
    if endpoint is None:
        return []
    endpoint.end("the run is over")
    unread = endpoint.unread()
    await asyncio.to_thread(endpoint.close)
    return unread


def _tell(client, workers, act, *args) -> dict:
    """Call a function in these workers; returns what those answered that answered soon."""
    answers = _ask(client, workers, act, *args, seconds=TELL_SECONDS)
    return {w: answer for w, answer in answers.items() if not isinstance(answer, Exception)}


def _ask(client, workers, act, *args, seconds) -> dict:
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


def _clocks(client, addresses) -> dict[str, float]:
    """By how much the clock of each process is ahead of this one's, s.

    Processes of this host read the same clock. Another host's is asked several times; its answer
    belongs to the middle of the shortest call.
    """
    here = host_identity()
    ahead = {address.process: 0.0 for address in addresses.values()}
    for worker, address in addresses.items():
        if address.host == here:
            continue
        readings = []
        for _ in range(CLOCK_CALLS):
            asked = time.monotonic()
            found = _tell(client, [worker], time.monotonic)
            answered = time.monotonic()
            if worker not in found:
                break
            readings.append((answered - asked, found[worker] - (asked + answered) / 2))
        if readings:
            ahead[address.process] = min(readings)[1]
    return ahead


# ---------------------------------------------------------------- watching a run


def _gather(client, plan, number, place, futures) -> list[Outcome]:
    """The outcomes of all ranks; when one fails, the others are ended."""
    found = {}  # worker -> the outcomes of its ranks
    try:
        left = _wait(client, plan, number, place, futures, found)
    except BaseException:  # an interrupt in the notebook
        _tell(client, list(place), _end, number, "the run was interrupted")
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
            answered = _tell(client, waiting, _look, number, over, all_begun)
            begun.update(w for w in place if answered.get(w) or w in found)
            if not all_begun and len(begun) == len(place):
                all_begun = True
                answered |= _tell(client, waiting, _look, number, over, all_begun)
            heard.update(dict.fromkeys(answered, time.monotonic()))
            dead = _missing(client, waiting)
            silent = [w for w in waiting if time.monotonic() - heard[w] > plan.patience]
        if failed or dead or silent:
            dead |= _missing(client, waiting)
            left = [worker for worker in waiting if worker not in dead and worker not in silent]
            _tell(client, left, _end, number, "the run has failed on another rank")
            _wait_for_end([futures[worker] for worker in left])
            dead, not_stopped = _missing(client, waiting), []
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
        if _missing(client, [worker]):
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


def _no_matter(call):
    """Look at how a call has ended, so that asyncio does not complain that nobody did."""
    return call.cancelled() or call.exception()


def _all_of(ranks, kind, message) -> list[Outcome]:
    return [Outcome(rank, kind, message=message) for rank in ranks]


def _check_all_read(outcomes, unread):
    """A message that nobody received belongs to an exchange that another rank did not call."""
    if not unread or any(outcome.kind != "result" for outcome in outcomes):
        return
    source, target, what = min(unread)
    raise RankError(
        f"rank {target} of {len(outcomes)}: it ended without receiving what rank {source} sent in "
        f"{what}: all ranks of a group must call the same exchanges, in one order."
    )


def _missing(client, place):
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
            asyncio.ensure_future(client.run(_kill, workers=[worker], nanny=True))
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
    end = time.monotonic() + RESTART_SECONDS
    while killed and time.monotonic() < end:
        alive = client.nthreads()
        gone = len(workers) - len(killed)
        if len(alive) >= before - gone and not any(worker in alive for worker in killed):
            return
        time.sleep(0.05)


def _kill(dask_worker=None):
    """Runs in a nanny. SIGKILL, because a stopped process hears nothing else."""
    os.kill(dask_worker.pid, signal.SIGKILL)


def _collect(outcomes: list[Outcome], behind: dict[int, float]) -> Run:
    """The run's results, or its error."""
    if any(outcome.kind != "result" for outcome in outcomes):
        raise _error(outcomes)
    began = {o.rank: o.began - behind.get(o.rank, 0.0) for o in outcomes}
    zero = min(began.values())
    events = [
        _moved(event, behind.get(outcome.rank, 0.0) + zero)
        for outcome in outcomes
        for event in outcome.events
    ]
    seconds = max(o.ended - behind.get(o.rank, 0.0) for o in outcomes) - zero
    return Run([o.value for o in outcomes], sorted(events, key=lambda e: e.start), seconds)


def _moved(event: Event, by: float) -> Event:
    values = {name: getattr(event, name) for name in Event.__dataclass_fields__}
    return Event(**values | {"start": event.start - by})


def _error(outcomes: list[Outcome]) -> RankError:
    """One error that names the first cause, and says what the other ranks were doing."""
    failed = [outcome for outcome in outcomes if outcome.kind != "result"]
    first = min(failed, key=lambda o: (KINDS.index(o.kind), o.ended))
    text = f"rank {first.rank} of {len(outcomes)}: {first.message}"
    if first.trace:
        text += f"\n\nOn rank {first.rank}:\n{first.trace}"
    others = [o for o in failed if o is not first and (o.doing or o.kind == "stuck")]
    if others:
        lines = [
            f"  rank {o.rank} was in: {o.doing or 'something that cannot be stopped'}"
            for o in others
        ]
        text += "\nWhen the run ended:\n" + "\n".join(lines)
    error = RankError(text)
    if isinstance(first.value, BaseException):
        error.__cause__ = first.value
    return error
