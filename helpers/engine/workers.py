"""A worker's side of a run: it opens its end, holds its ranks, answers its caller, and closes."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time

import cloudpickle
from distributed import get_worker, secede
from distributed.comm.addressing import get_address_host

from helpers.engine.hosts import Outcome, run_ranks
from helpers.engine.transport import UNCLAIMED_SECONDS, Endpoint, Security

NAME = "many-hands"


async def open_run(number, secret, only_tcp, dask_worker=None):
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
    endpoints(dask_worker)[number] = endpoint
    dask_worker.loop.call_later(UNCLAIMED_SECONDS, _expire, dask_worker, number)
    return address


def endpoints(worker) -> dict[str, Endpoint]:
    return worker.extensions.setdefault(NAME, {})


def _expire(worker, number):
    """The caller died between opening and starting a run, or before it closed one."""
    endpoint = endpoints(worker).get(number)
    if endpoint is None or endpoint.ports:
        return
    left = endpoint.heard + UNCLAIMED_SECONDS - time.monotonic()
    if left > 0:  # the caller is there: its ranks wait for their arguments, or for a busy worker
        worker.loop.call_later(left, _expire, worker, number)
        return
    endpoints(worker).pop(number, None)
    endpoint.close()


def hold_ranks(number, address, plan, packed, table, ranks, *arguments):
    """The Dask task: runs in a worker, and holds its ranks."""
    worker = get_worker()
    if worker.address != address:
        raise RuntimeError("the worker of these ranks has died")  # and Dask tries another one
    secede()
    endpoint = endpoints(worker).get(number)
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
        endpoints(worker).pop(number, None)
        endpoint.close()
    else:
        worker.loop.add_callback(worker.loop.call_later, UNCLAIMED_SECONDS, _expire, worker, number)
    return outcomes


def _is_cancelled(worker, key):
    """True when nobody wants the task any more: its client has gone."""
    task = worker.state.tasks.get(key)
    return task is None or task.state in ("cancelled", "forgotten", "released")


def look_at_run(number, over, all_began, dask_worker=None):
    """The caller's regular call: these ranks have ended. Returns whether those here have begun."""
    endpoint = endpoints(dask_worker).get(number)
    if endpoint is None:
        return False
    endpoint.heard = time.monotonic()
    endpoint.finish(over)
    if all_began:
        endpoint.all_began()
    return endpoint.begun


def end_run(number, cause, dask_worker=None):
    endpoint = endpoints(dask_worker).get(number)
    if endpoint is not None:
        endpoint.end(cause)


async def close_run(number, dask_worker=None):
    """Returns which messages nobody has received."""
    endpoint = endpoints(dask_worker).pop(number, None)
    if endpoint is None:
        return []
    endpoint.end("the run is over")
    unread = endpoint.unread()
    await asyncio.to_thread(endpoint.close)
    return unread


def kill_worker(dask_worker=None):
    """Runs in a nanny. SIGKILL, because a stopped process hears nothing else."""
    os.kill(dask_worker.pid, signal.SIGKILL)
