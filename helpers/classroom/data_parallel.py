"""What notebook 03 draws, and its panel.

`draw_schedule`, `plot_lines`, `plot_rows` and `show` of the other modules are names here too, so
that the notebook needs this module alone for all of its figures.
"""

from __future__ import annotations

import time
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from helpers.classroom.panels import SettingsPanel, choice, ranks_slider
from helpers.classroom.plots import COLOURS, HATCHES, plot_lines, plot_rows, show
from helpers.classroom.timeline import draw_schedule
from helpers.engine import spmd
from helpers.engine.events import Event
from helpers.engine.mesh import Mesh

__all__ = [
    "DataParallelPanel",
    "SimulatedNetwork",
    "draw_exchanges",
    "draw_schedule",
    "last_arrival",
    "plot_exchange_times",
    "plot_lines",
    "plot_rows",
    "plot_shares",
    "show",
    "time_shares",
    "within",
]

COMPUTE = ("forward", "backward", "update")
SHARES = ("compute", "exchange", "waiting")
MARKERS = ("o", "^", "s", "D")
BATCHES, WIDTHS = (512, 2048, 8192), (64, 256, 512)
SETTINGS_SHOWN = 6
SETTLING = "warm-up"
TRAVELS = ("sends", "receives", "sends and receives")
READY = np.zeros(1, np.uint8)


class SimulatedNetwork:
    """A group of ranks whose messages take as long as on a network.

    The arrays are really exchanged. Besides, both sides of a message sleep for the time that it
    would be on its way, which needs no core: so more ranks than cores can be shown at work. A
    message begins when both sides are ready.

    Parameters
    ----------
    group : Group
    latency : float
        Seconds a message.
    bandwidth : float
        Bytes a second.

    Examples
    --------
    >>> def program(rank):
    ...     group, other = SimulatedNetwork(rank.world, 0.001, 1e9), 1 - rank.index
    ...     return group.exchange(np.array([rank.index]), other, other).tolist()
    >>> spmd.run(None, Mesh(data=2), program).results
    [[1], [0]]
    """

    near = False

    def __init__(self, group, latency: float, bandwidth: float):
        self.group, self.latency, self.bandwidth = group, latency, bandwidth
        self.rank, self.size = group.rank, group.size

    def send(self, array, to: int) -> None:
        """Send an array when the other side is ready."""
        self.group.receive(to)
        self.group.send(array, to)
        self._travel("sends", array.nbytes)

    def receive(self, source: int, out=None):
        """Receive the next array of a rank."""
        self.group.send(READY, source)
        array = self.group.receive(source, out)
        self._travel("receives", array.nbytes)
        return array

    def exchange(self, array, to: int, source: int, out=None):
        """Send one array and receive another at the same time."""
        self.group.exchange(READY, source, to)
        received = self.group.exchange(array, to, source, out)
        self._travel("sends and receives", max(array.nbytes, received.nbytes))
        return received

    def _travel(self, operation, nbytes):
        with self.group.owner.record(operation, nbytes=nbytes):
            time.sleep(self.latency + nbytes / self.bandwidth)


def within(events, operation: str, number: int = -1) -> list:
    """What happened on each rank inside of one of its events.

    Parameters
    ----------
    events : list of Event
    operation : str
        The name of the events that contain others.
    number : int
        Which of them, counted on each rank; default: the last.

    Returns
    -------
    list of Event
        Those inside, without the one that contains them. Time 0 is when the first rank began.

    Examples
    --------
    >>> events = [Event(0, "pass", 2, 3), Event(0, "backward", 2.5, 1), Event(0, "forward", 0, 1)]
    >>> [(e.operation, e.start) for e in within(events, "pass")]
    [('backward', 0.5)]
    """
    around = {}
    for event in sorted(events, key=lambda e: e.start):
        if event.operation == operation:
            around.setdefault(event.rank, []).append(event)
    around = {rank: found[number] for rank, found in around.items()}
    begin = min(event.start for event in around.values())
    return [
        replace(e, start=e.start - begin)
        for e in events
        if e.rank in around
        and e.operation != operation
        and around[e.rank].start <= e.start <= around[e.rank].stop
    ]


def last_arrival(ready, nbytes, alpha: float, beta: float) -> float:
    """When the last bucket has arrived: the rule of exercise 03.4.

    Parameters
    ----------
    ready, nbytes : sequence of float
        When each bucket is ready (s), and its bytes; the network carries one at a time, in order.
    alpha, beta : float
        Seconds a message, and seconds a byte.

    Examples
    --------
    >>> last_arrival([1.0, 1.5, 9.0], [10, 10, 10], alpha=0.5, beta=0.05)
    10.0
    """
    free = 0.0
    for at, n in zip(ready, nbytes):
        free = max(free, at) + alpha + beta * n
    return free


def draw_exchanges(schedules: dict, ranks: int):
    """Draw timelines of exchanges below each other, with one scale and the same colours.

    Parameters
    ----------
    schedules : dict of str to list of Event
        ``{title: events}``, recorded through a `SimulatedNetwork`; other events are left out.
    ranks : int

    Returns
    -------
    matplotlib.figure.Figure
    """
    size = (8, 0.8 + 1.9 * len(schedules))
    figure, axes = plt.subplots(len(schedules), 1, figsize=size, sharex=True, layout="constrained")
    for ax, (title, events) in zip(axes, schedules.items()):
        # One event of no length of each kind: colours and legends are the same in all.
        every = [Event(0, operation, 0.0, 0.0) for operation in TRAVELS]
        every += [e for e in events if e.operation in TRAVELS]
        draw_schedule(_in_milliseconds(every), ranks, ax, name="rank").set(title=title, xlabel="")
        if ax is not axes[0]:
            ax.get_legend().remove()
    axes[-1].set(xlabel="time (ms)", xlim=0)
    return figure


def _in_milliseconds(events):
    return [replace(e, start=1e3 * e.start, length=1e3 * e.length) for e in events]


def time_shares(events) -> dict[str, float]:
    """Where the time of a training step goes: a mean over ranks and steps.

    Parameters
    ----------
    events : list of Event
        Of a run whose program records "forward", "backward" and "update" for what it computes,
        "all_reduce" around its exchange, and perhaps "warm-up" around steps that do not count.

    Returns
    -------
    dict of str to float
        Seconds of one step: "compute"; "exchange", the part of it in which a rank moves and adds
        numbers; and "waiting" for other ranks within the exchange.

    Raises
    ------
    ValueError
        No step was recorded.

    Examples
    --------
    >>> from helpers.engine.events import Event
    >>> step = [Event(0, "forward", 0, 2), Event(0, "all_reduce", 2, 1), Event(0, "wait", 2, 0.75)]
    >>> time_shares(step)
    {'compute': 2.0, 'exchange': 0.25, 'waiting': 0.75}
    """
    begin = max((e.stop for e in events if e.operation == SETTLING), default=0.0)
    counted = [e for e in events if e.start >= begin and e.lane == 0]
    steps = sum(e.operation == "forward" for e in counted)
    if not steps:
        raise ValueError("No step was recorded: run with record=True, and record forward.")
    exchanges = [e for e in counted if e.operation == "all_reduce"]
    waits = [e for e in counted if e.operation == "wait" and _within(e, exchanges)]
    compute = [e for e in counted if e.operation in COMPUTE]
    spent = [_seconds(some) / steps for some in (compute, exchanges, waits)]
    return {"compute": spent[0], "exchange": max(0.0, spent[1] - spent[2]), "waiting": spent[2]}


def _within(event, others) -> bool:
    return any(e.rank == event.rank and e.start <= event.start <= e.stop for e in others)


def _seconds(events) -> float:
    return float(sum(e.length for e in events))


def plot_exchange_times(measured: dict, predicted: dict, ax=None):
    """Draw how long exchanges take by size: measured solid, predicted dashed.

    Parameters
    ----------
    measured, predicted : dict of str to dict of int to float
        ``{algorithm: {bytes: seconds}}``. An algorithm without a prediction gets no dashed line.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_exchange_times({"ring": {8: 1e-4, 800: 2e-4}}, {"ring": {8: 1e-4, 800: 1e-4}})
    >>> [line.get_label() for line in ax.lines]
    ['ring', 'ring, predicted']
    """
    ax = ax or plt.figure(figsize=(5.5, 3.8)).subplots()
    colours = [COLOURS[name] for name in ("blue", "orange", "green", "purple")]
    for name, marker, colour in zip(measured, MARKERS, colours):
        style = dict(color=colour, marker=marker)
        ax.loglog(
            measured[name].keys(), [1e3 * s for s in measured[name].values()], label=name, **style
        )
        if name in predicted:
            style |= dict(linestyle="--", fillstyle="none", label=f"{name}, predicted")
            ax.loglog(predicted[name].keys(), [1e3 * s for s in predicted[name].values()], **style)
    ax.set(xlabel="bytes of the array", ylabel="time (ms)")
    ax.legend(fontsize=7)
    return ax


def plot_shares(shares: dict, ax=None):
    """Draw where the time of a step goes, one stacked bar a setting.

    Parameters
    ----------
    shares : dict of str to dict of str to float
        ``{setting: seconds by kind}``, from `time_shares`.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_shares({"2 ranks": {"compute": 0.02, "exchange": 0.001, "waiting": 0.004}})
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['compute', 'exchange', 'waiting']
    """
    ax = ax or plt.figure(figsize=(5, 3.2)).subplots()
    colours = [COLOURS[name] for name in ("sky", "orange", "yellow")]
    below = dict.fromkeys(shares, 0.0)
    for kind, colour, hatch in zip(SHARES, colours, HATCHES):
        heights = [1e3 * values[kind] for values in shares.values()]
        style = dict(color=colour, hatch=hatch, edgecolor="black", label=kind)
        ax.bar(range(len(shares)), heights, 0.6, bottom=list(below.values()), **style)
        below = {name: below[name] + height for name, height in zip(shares, heights)}
    ax.set_xticks(range(len(shares)), list(shares))
    ax.set(ylabel="time of a step (ms)", ylim=(0, 1.05 * max([*below.values(), 1e-3])))
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, borderaxespad=0)
    return ax


class DataParallelPanel(SettingsPanel):
    """Sliders for ranks, batch and width of a network, and what a step of training takes.

    Whenever a slider has moved, the program trains on real ranks, and the figure shows a timeline
    of the last step and where the time of each setting went.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster
    program : callable
        ``program(rank, batch, width)`` takes some steps, recorded as `time_shares` asks, and
        returns the seconds of one.
    """

    alt = (
        "A panel with sliders for the number of ranks, the rows of a batch and the width of a "
        "network. Below them a timeline of one training step, and a stacked bar for each setting "
        "that was tried: compute, exchange and waiting."
    )

    def __init__(self, cluster, program):
        self.program, self.tried = program, {}
        self.ranks = ranks_slider(cluster)
        self.batch, self.width = choice("Batch", BATCHES), choice("Width", WIDTHS)
        super().__init__(cluster, (self.ranks, self.batch, self.width))

    @property
    def setting(self) -> str:
        """The setting of the sliders in words: ranks, batch, width."""
        ranks = self.ranks.value
        return (
            f"{ranks} rank{'s' * (ranks != 1)}\nbatch {self.batch.value}\nwidth {self.width.value}"
        )

    def try_setting(self) -> str:
        """Train for some steps, and note where the time went."""
        ranks = self.ranks.value
        arguments = (self.program, self.batch.value, self.width.value)
        run = spmd.run(self.cluster.client, Mesh(data=ranks), *arguments, record=True)
        self.tried.pop(self.setting, None)  # a setting that is tried again comes last
        self.tried[self.setting] = time_shares(run.events)
        self.tried = dict(list(self.tried.items())[-SETTINGS_SHOWN:])
        self.events = _last_step(run.events)
        rows = self.batch.value / max(run.results)
        return f"A step took {1e3 * max(run.results):.1f} ms: {rows:,.0f} rows a second."

    def draw(self) -> plt.Figure:
        """One step as a timeline, and the stacked bars of the settings."""
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
        draw_schedule(_in_milliseconds(self.events), self.ranks.value, left, name="rank")
        left.set(title="One step (measured)", xlabel="time (ms)")
        left.xaxis.set_major_locator(MaxNLocator(5))
        plot_shares(self.tried, right).tick_params(axis="x", labelsize=7)
        right.set_title("Where the time of a step goes (measured)")
        return figure


def _last_step(events):
    """The events of the last step, with what lies within an exchange; time 0 is its start."""
    begin = min(
        max(e.start for e in events if e.operation == "forward" and e.rank == rank)
        for rank in {e.rank for e in events}
    )
    shown = (*COMPUTE, "meet", "wait", "exchange")
    return [
        type(e)(e.rank, e.operation, e.start - begin, e.length, lane=e.lane)
        for e in events
        if e.start >= begin and e.operation in shown
    ]
