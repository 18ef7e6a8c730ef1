"""One program on every rank (SPMD): Dask places, starts, watches and ends it.

One Dask task for each worker in use holds that worker's ranks, each in a thread; as a rule that is
one rank a worker. The tasks leave Dask's thread pool at once (`distributed.secede`), so that two
runs on one cluster can never wait for each other's places. The ranks then exchange arrays
directly, without Dask: a task's round trip costs milliseconds, a message here some ten
microseconds.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cloudpickle
from distributed import Client

from helpers.engine.errors import RankError
from helpers.engine.events import Event
from helpers.engine.hosts import KINDS, Outcome, Plan, run_ranks
from helpers.engine.mesh import Mesh
from helpers.engine.transport import Address, Endpoint, Security, host_identity
from helpers.engine.watching import OPEN_SECONDS, ask_workers, missing, outcomes_of, tell
from helpers.engine.workers import close_run, hold_ranks, open_run
from helpers.limits import usable_memory

__all__ = ["RankError", "Run", "run"]

RANKS_A_WORKER = 64
CLOCK_CALLS = 5


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
        addresses = ask_workers(
            client, list(place), open_run, number, secret, only_tcp, seconds=seconds
        )
        _check_opened(client, list(place), addresses, seconds)
        table = [addresses[worker] for worker, ranks in place.items() for _ in ranks]
        for worker, ranks in place.items():
            theirs = {rank: arguments[rank] for rank in ranks}
            key = f"spmd-{number[:8]}-{ranks[0]}"
            futures[worker] = client.submit(
                *(hold_ranks, number, worker, plan, packed, table, list(ranks)),
                *[argument for rank in ranks for argument in theirs[rank]],
                workers=[worker],
                allow_other_workers=False,
                key=key,
                pure=False,
                priority=10,
            )
        outcomes = outcomes_of(client, plan, number, place, futures)
        well = all(outcome.kind == "result" for outcome in outcomes)
        behind = _clocks(client, addresses) if well else {}
    finally:
        unread = tell(client, list(place), close_run, number)
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
            if worker in missing(client, workers):
                raise RankError(f"The worker {worker} has died (killed, or out of memory).")
            raise RankError(f"The worker {worker} could not open its end of the run: {answer!r}")
        raise RankError(f"The worker {worker} did not answer for {seconds:g} s.")


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
            found = tell(client, [worker], time.monotonic)
            answered = time.monotonic()
            if worker not in found:
                break
            readings.append((answered - asked, found[worker] - (asked + answered) / 2))
        if readings:
            ahead[address.process] = min(readings)[1]
    return ahead


# ---------------------------------------------------------------- what a run gave


def _check_all_read(outcomes, unread):
    """A message that nobody received belongs to an exchange that another rank did not call."""
    if not unread or any(outcome.kind != "result" for outcome in outcomes):
        return
    source, target, what = min(unread)
    raise RankError(
        f"rank {target} of {len(outcomes)}: it ended without receiving what rank {source} sent in "
        f"{what}: all ranks of a group must call the same exchanges, in one order."
    )


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
