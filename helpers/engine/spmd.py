"""One program on every rank (SPMD): Dask places, starts, watches and ends it.

One Dask task for each worker in use holds that worker's ranks, each in a thread; as a rule that is
one rank a worker. The tasks leave Dask's thread pool at once (`distributed.secede`), so that two
runs on one cluster can never wait for each other's places. The ranks then exchange arrays
directly, without Dask: a task's round trip costs milliseconds, a message here some ten
microseconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Callable, Sequence
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
ASK_SECONDS = 0.5
"""How often the caller looks whether all workers are still there."""
TELL_SECONDS = 1.0
END_SECONDS = 1.6
"""So long the caller waits for the ranks to end, once the run has failed."""
RESTART_SECONDS = 5.0
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
        Seconds that a rank waits for a sign of another one.
    transport : {None, "tcp"}
        None: the quickest way between each two ranks. "tcp": TCP between all processes.

    Returns
    -------
    Run

    Raises
    ------
    RankError
        A rank raised, or a worker died or stopped answering. All ranks have ended then.
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
    plan = Plan(mesh, patience, record, usable_memory() // 2)
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
        return run_ranks(endpoint, plan, ranks, program, dict(enumerate(arguments)))
    finally:
        endpoint.close()


# ---------------------------------------------------------------- on Dask workers


def _run_there(client, plan, program, arguments, only_tcp):
    packed = _pickled(program)
    workers = _workers(client)
    place = _placement(plan.mesh.size, workers)
    number, secret = uuid.uuid4().hex, os.urandom(32)
    asked = time.monotonic()
    addresses = client.run(_open, number, secret, only_tcp, workers=list(place), on_error="return")
    answered = time.monotonic()
    futures = {}
    try:
        _check_opened(addresses)
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
    finally:
        _tell(client, list(place), _close, number)
        for future in futures.values():
            future.release()
    middle = (asked + answered) / 2
    here = host_identity()
    # Processes of this host read the same clock; another host's is set by its answer.
    behind = {a.process: 0.0 if a.host == here else a.clock - middle for a in table}
    return _collect(outcomes, {rank: behind[a.process] for rank, a in enumerate(table)})


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


def _check_opened(addresses):
    for worker, answer in addresses.items():
        if isinstance(answer, BaseException):
            raise RankError(f"The worker {worker} could not open its end of the run: {answer!r}")


async def _open(number, secret, only_tcp, dask_worker=None):
    """Runs in a worker's event loop: be ready for the connections of a run."""
    tls = dask_worker.address.startswith("tls://")
    security = Security(secret)
    if tls:
        settings = dask_worker.security
        security.dialler = settings.get_connection_args("worker")["ssl_context"]
        security.listener = settings.get_listen_args("worker")["ssl_context"]
    endpoint = Endpoint(security, get_address_host(dask_worker.address), only_tcp)
    address = endpoint.listen()
    _endpoints(dask_worker)[number] = endpoint
    dask_worker.loop.call_later(UNCLAIMED_SECONDS, _expire, dask_worker, number)
    return address


def _endpoints(worker) -> dict[str, Endpoint]:
    return worker.extensions.setdefault(NAME, {})


def _expire(worker, number):
    """The caller died between opening and starting a run, or before it closed one."""
    endpoint = _endpoints(worker).get(number)
    if endpoint is not None and not endpoint.ports:
        _endpoints(worker).pop(number, None)
        endpoint.close()


def _host(number, address, plan, packed, table, ranks, *arguments):
    """The Dask task: runs in a worker, and holds its ranks."""
    worker = get_worker()
    if worker.address != address:
        raise RuntimeError("the worker of these ranks has died")  # and Dask tries another one
    secede()
    endpoint = _endpoints(worker)[number]
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


def _finish(number, ranks, dask_worker=None):
    endpoint = _endpoints(dask_worker).get(number)
    if endpoint is not None:
        endpoint.finish(ranks)


async def _close(number, dask_worker=None):
    endpoint = _endpoints(dask_worker).pop(number, None)
    if endpoint is not None:
        endpoint.end("the run is over")
        await asyncio.to_thread(endpoint.close)


def _tell(client, workers, act, *args) -> set[str]:
    """Call a function in these workers; returns those that answered soon."""

    async def ask():
        calls = {
            asyncio.ensure_future(client.run(act, *args, workers=[worker])): worker
            for worker in workers
        }
        # Not wait_for: it would wait for the end of the cancellation, which a worker that is
        # stopped delays for minutes.
        done, late = await asyncio.wait(calls, timeout=TELL_SECONDS)
        for call in late:
            call.add_done_callback(lambda call: call.cancelled() or call.exception())
            call.cancel()
        return {calls[call] for call in done if call.exception() is None}

    return client.sync(ask) if workers else set()


# ---------------------------------------------------------------- watching a run


def _gather(client, plan, number, place, futures) -> list[Outcome]:
    """The outcomes of all ranks; when one fails, the others are ended."""
    try:
        dead = _wait(client, plan, number, place, futures)
    except BaseException:  # an interrupt in the notebook
        _tell(client, list(place), _end, number, "the run was interrupted")
        _wait_for_end(futures.values())
        _stop_stuck(client, _unfinished(futures))
        raise
    outcomes = []
    for worker, ranks in place.items():
        outcomes += _outcomes_of(futures[worker], ranks, worker in dead)
    stuck = {o.rank for o in outcomes if o.kind == "stuck"}
    _stop_stuck(client, [w for w, ranks in place.items() if w not in dead and stuck & {*ranks}])
    return outcomes


def _wait(client, plan, number, place, futures):
    """Wait until all tasks have ended, or one has failed and the others had time to end.

    Returns the workers that have died.
    """
    heard = dict.fromkeys(place, time.monotonic())
    while waiting := _unfinished(futures):
        try:
            wait([futures[worker] for worker in waiting], ASK_SECONDS, "FIRST_COMPLETED")
        except TimeoutError:
            # Is everybody there? Whoever still waits for a rank that has ended, waits in vain.
            over = [rank for w, ranks in place.items() if w not in waiting for rank in ranks]
            answered = _tell(client, waiting, _finish, number, over)
            heard.update(dict.fromkeys(answered, time.monotonic()))
        else:
            if not _failed(futures):
                continue
        dead = _missing(client, place)
        silent = [w for w in waiting if time.monotonic() - heard[w] > plan.patience]
        if dead or silent or _failed(futures):
            left = [worker for worker in waiting if worker not in dead and worker not in silent]
            _tell(client, left, _end, number, "the run has failed on another rank")
            _wait_for_end([futures[worker] for worker in left])
            return _missing(client, place)
    return _missing(client, place) if _failed(futures) else set()


def _missing(client, place):
    alive = client.nthreads(list(place))
    return {worker for worker in place if worker not in alive}


def _unfinished(futures):
    return [worker for worker, future in futures.items() if not future.done()]


def _failed(futures):
    return any(
        future.status == "error" or any(o.kind != "result" for o in future.result())
        for future in futures.values()
        if future.done()
    )


def _wait_for_end(futures):
    left = [future for future in futures if not future.done()]
    if left:
        with suppress(TimeoutError):
            wait(left, END_SECONDS)


def _stop_stuck(client, workers):
    """Kill the workers whose ranks cannot be stopped; their nannies start them anew.

    Where there is no nanny the rank's thread goes on, and the message says so.
    """
    if not workers:
        return
    before = len(client.nthreads())

    async def ask():
        calls = [client.run(_kill, workers=[w], nanny=True, on_error="ignore") for w in workers]
        await asyncio.wait(map(asyncio.ensure_future, calls), timeout=TELL_SECONDS)

    client.sync(ask)
    end = time.monotonic() + RESTART_SECONDS
    while time.monotonic() < end:
        alive = client.nthreads()
        if len(alive) >= before and not any(worker in alive for worker in workers):
            return
        time.sleep(0.05)


def _kill(dask_worker=None):
    """Runs in a nanny. SIGKILL, because a stopped process hears nothing else."""
    os.kill(dask_worker.pid, signal.SIGKILL)


def _outcomes_of(future, ranks, dead) -> list[Outcome]:
    if future.done() and future.status == "finished":
        return future.result()
    if dead:
        message = "its worker has died (killed, or out of memory)"
        return [Outcome(rank, "raised", message=message) for rank in ranks]
    if future.done():
        message = f"its worker could not run it: {future.exception()!r}"
        return [Outcome(rank, "raised", message=message) for rank in ranks]
    message = "its worker did not answer or could not be stopped, and was started anew"
    return [Outcome(rank, "stuck", message=message) for rank in ranks]


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
