"""One record for what a rank or a worker did, and when; measured or simulated.

Everything that is drawn as a timeline in the course is a list of `Event`: tasks that Dask ran,
messages between ranks, and the steps of a simulated schedule.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One thing that one rank did.

    Attributes
    ----------
    rank : int
        Which rank or worker, counted from 0.
    operation : str
        What it did: the name of the function, or ``send``, ``wait``, ``transfer`` …
    start, length : float
        Seconds; ``start`` is counted from the start of the run.
    nbytes : int
        Bytes of the result or of the message; 0 when nobody counted.
    layer, microbatch : int, optional
        Which layer of a model and which micro-batch, where that has a meaning.
    lane : int
        0 for what a rank's program does itself, 1 for communication in its background.
    """

    rank: int
    operation: str
    start: float
    length: float
    nbytes: int = 0
    layer: int | None = None
    microbatch: int | None = None
    lane: int = 0

    @property
    def stop(self) -> float:
        """Seconds from the start of the run to the end of this event."""
        return self.start + self.length


def events_from_tasks(records, workers, origin: float | None = None) -> list[Event]:
    """Events of the tasks that Dask ran.

    Parameters
    ----------
    records : iterable of dict
        What ``client.get_task_stream()`` returns.
    workers : list of str
        Addresses; the position of an address is the rank. Tasks of other workers are left out.
    origin : float, optional
        Clock time (s) that counts as zero. Default: the start of the first event.

    Returns
    -------
    list of Event
        In order of their start. A transfer of a task's input to its worker is an event called
        ``transfer``; the time of running is an event with the name of the task's function.

    Examples
    --------
    >>> step = {"action": "compute", "start": 5.0, "stop": 5.5}
    >>> record = {"worker": "a", "key": "fit-0", "nbytes": 8, "startstops": [step]}
    >>> events_from_tasks([record], ["a"])  # doctest: +ELLIPSIS
    [Event(rank=0, operation='fit', start=0.0, length=0.5, nbytes=8, layer=None, ...)]
    """
    from dask.utils import key_split  # here, so that a simulator needs no Dask

    rank = {address: number for number, address in enumerate(workers)}
    found = []
    for record in records:
        if record["worker"] not in rank:
            continue
        for step in record["startstops"]:
            if step["action"] not in ("compute", "transfer"):
                continue
            computes = step["action"] == "compute"
            name = key_split(record["key"]) if computes else "transfer"
            nbytes = int(record.get("nbytes") or 0) if computes else 0
            found.append((step["start"], step["stop"], rank[record["worker"]], name, nbytes))
    if not found:
        return []
    found.sort()
    zero = found[0][0] if origin is None else origin
    return [
        Event(rank=r, operation=name, start=start - zero, length=stop - start, nbytes=nbytes)
        for start, stop, r, name, nbytes in found
    ]
