"""What notebook 08 draws, and its panel.

`draw_timelines`, `plot_lines`, `plot_memory`, `show` and `load_study` of other modules, and the
planner's `layout`, `machine` and `pipeline`, are names here too, so that the notebook needs this
module alone for all of its figures, predictions and stored studies.
"""

from __future__ import annotations

from dataclasses import replace

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from helpers.classroom.data_parallel_at_scale import plot_memory
from helpers.classroom.panels import SettingsPanel, choice
from helpers.classroom.pipeline_parallel import draw_timelines
from helpers.classroom.plots import COLOURS, HATCHES, draw_predicted, plot_lines, show
from helpers.classroom.timeline import draw_schedule
from helpers.parallel import schedules
from helpers.planner import layout, machine, pipeline
from helpers.studies import load_study

__all__ = [
    "MeshPanel",
    "draw_mesh",
    "draw_timelines",
    "layout",
    "load_study",
    "machine",
    "pipeline",
    "plot_bytes",
    "plot_lines",
    "plot_load",
    "plot_memory",
    "plot_placements",
    "plot_trade",
    "show",
]

AXES = ("tensor", "pipeline", "data")
STYLES = {
    "forward": (COLOURS["sky"], ""),
    "backward": (COLOURS["orange"], ""),
    "complete": (COLOURS["purple"], "xx"),
    "update": (COLOURS["red"], "\\\\"),
}
SCHEDULES = {
    "1F1B": schedules.one_f_one_b,
    "GPipe": schedules.gpipe,
    "one by one": schedules.one_by_one,
}


def draw_mesh(held: list, figure=None):
    """Draw which rank of a mesh holds what: a panel for each data rank, a box for each rank.

    Parameters
    ----------
    held : list of (Coordinate, str, str)
        By rank: where it stands, what it holds of the model, and which rows are its own.
    figure : matplotlib.figure.Figure, optional

    Returns
    -------
    matplotlib.figure.Figure
        In each panel the stages of the pipeline stand side by side, the tensor ranks below each
        other.

    Examples
    --------
    >>> from helpers.engine.mesh import Coordinate
    >>> figure = draw_mesh([(Coordinate(0, 0, 0), "layers 0-2", "rows 0-3")])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['rank 0', 'layers 0-2']
    """
    data, tensor, stages = (1 + max(where[axis] for where, *_ in held) for axis in range(3))
    size = (1.0 + 2.3 * stages * min(data, 2), 0.5 + (0.5 + 0.75 * tensor) * -(-data // 2))
    figure = figure or plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(-(-data // 2), min(data, 2), squeeze=False).ravel()
    colours = [COLOURS[name] for name in ("sky", "orange", "green", "purple")]
    for ax in axes[data:]:
        ax.set_axis_off()
    for rank, (where, words, rows) in enumerate(held):
        ax, x, y = axes[where.data], where.pipeline, where.tensor
        style = dict(facecolor=colours[x % 4], alpha=(0.5, 0.2)[y % 2], edgecolor="black")
        ax.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, **style))
        ax.text(x + 0.5, y + 0.26, f"rank {rank}", ha="center", va="center", weight="bold", size=9)
        ax.text(x + 0.5, y + 0.64, words, ha="center", va="center", size=8)
        ax.set_title(f"data {where.data}: {rows}", fontsize=9)
    for ax in axes[:data]:
        ax.set(xlim=(0, stages), ylim=(tensor, 0))
        ax.set_xticks(np.arange(stages) + 0.5, [f"pipeline {n}" for n in range(stages)])
        ax.set_yticks(np.arange(tensor) + 0.5, [f"tensor {n}" for n in range(tensor)])
        ax.tick_params(length=0, labelsize=8)
    return figure


def plot_bytes(measured: dict, predicted: dict, ax=None):
    """Draw the bytes of a step on each axis: bars measured, dashed lines predicted.

    Parameters
    ----------
    measured, predicted : dict of str to dict of str to int
        ``{name: {axis: bytes}}``, of one rank, under the same names.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> sent = {"2 × 2 × 2": {"data": 1000, "tensor": 5000, "pipeline": 2000}}
    >>> ax = plot_bytes(sent, sent)
    >>> [float(bar.get_height()) for bar in ax.patches]
    [5.0, 2.0, 1.0]
    """
    ax = ax or plt.figure(figsize=(7, 3.4)).subplots()
    for place, (name, sent) in enumerate(measured.items()):
        for number, axis in enumerate(AXES):
            x, label = place + 0.27 * (number - 1), axis if place == 0 else None
            style = dict(color=[COLOURS[c] for c in ("orange", "sky", "green")][number])
            style |= dict(hatch=HATCHES[number], edgecolor="black", label=label)
            ax.bar(x, sent[axis] / 1e3, 0.24, **style)
            height = predicted[name][axis] / 1e3
            draw_predicted(ax, x, 0.26, height, label=place == number == 0)
    ax.set_xticks(range(len(measured)), list(measured))
    ax.set_ylabel("bytes that a rank sends (kB)")
    ax.legend(fontsize=8)
    return ax


def plot_placements(times: dict, ax=None):
    """Draw predicted times as horizontal bars, in parts: the schedule, and what comes after it.

    Parameters
    ----------
    times : dict of str to StepTime
        By the words for a placement.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> time = machine.StepTime(5.0, schedule=4.0, exchange=1.0, update=0.0, events=[])
    >>> ax = plot_placements({"tensor inside": time})
    >>> [float(bar.get_width()) for bar in ax.patches]
    [4.0, 1.0]
    """
    ax = ax or plt.figure(figsize=(7, 0.6 * len(times) + 1)).subplots()
    kinds = {"schedule": ("sky", "schedule, with tensor and pipeline messages")}
    kinds["exchange"] = ("green", "sum of the gradients along the data axis")
    for number, (kind, (colour, words)) in enumerate(kinds.items()):
        for y, time in enumerate(times.values()):
            left = 0 if kind == "schedule" else time.schedule
            style = dict(color=COLOURS[colour], hatch=HATCHES[number], edgecolor="black")
            ax.barh(y, getattr(time, kind), 0.6, left, label=words if y == 0 else None, **style)
    for y, time in enumerate(times.values()):
        ax.text(time.seconds, y, f"  {time.seconds:.0f} s", va="center", fontsize=8)
    ax.set(yticks=range(len(times)), ylim=(len(times) - 0.5, -0.5), xlabel="time of a step (s)")
    ax.set_yticklabels(times)
    ax.margins(x=0.1)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.35), ncols=2)
    return ax


def plot_load(loads: dict, room: float, ax=None):
    """Draw how many tokens ask for each expert, and how many an expert takes.

    Parameters
    ----------
    loads : dict of str to array of shape (experts,)
        Tokens of a group that ask for an expert, by name; at most three.
    room : float
        The capacity.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_load({"without": [8, 0], "with": [3, 5]}, room=5)
    >>> [int(bar.get_height()) for bar in ax.patches]
    [8, 0, 3, 5]
    """
    ax = ax or plt.figure(figsize=(7, 3.2)).subplots()
    width, colours = 0.8 / len(loads), ("red", "blue", "green")
    for number, ((name, load), colour) in enumerate(zip(loads.items(), colours)):
        places = np.arange(len(load)) + width * (number - (len(loads) - 1) / 2)
        style = dict(color=COLOURS[colour], hatch=HATCHES[number], edgecolor="black", label=name)
        ax.bar(places, load, width, **style)
    ax.axhline(room, linestyle="--", color="black", label="capacity")
    ax.set_xticks(range(len(load)), [f"expert {n}" for n in range(len(load))], fontsize=8)
    ax.set_ylabel("tokens that ask for it")
    ax.legend(fontsize=8)
    return ax


def plot_trade(measured: dict, predicted: dict, ax=None):
    """Draw latency against throughput: a line for each split, a point for each number of texts.

    Parameters
    ----------
    measured, predicted : dict of str to dict of int to TokenTime
        ``{split: {texts: what they take}}``. Measured lines are solid, predicted ones dashed.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> time = {1: machine.TokenTime(latency=0.001, throughput=1000.0)}
    >>> ax = plot_trade({"1 × 1 × 1": time}, {"1 × 1 × 1": time})
    >>> [line.get_linestyle() for line in ax.lines]
    ['-', '--']
    """
    ax = ax or plt.figure(figsize=(6.5, 4)).subplots()
    names = list(dict.fromkeys([*measured, *predicted]))
    colours = [COLOURS[c] for c in ("blue", "orange", "green", "purple", "red", "sky")]
    for name, colour, marker in zip(names, colours, "os^Dv<"):
        for lines, dashed in ((measured, False), (predicted, True)):
            if name not in lines:
                continue
            style = dict(linestyle="--" if dashed else "-", color=colour, marker=marker)
            style |= dict(fillstyle="none" if dashed else "full")
            label = f"{name}, predicted" if dashed else name
            x = [1e3 * time.latency for time in lines[name].values()]
            y = [time.throughput for time in lines[name].values()]
            ax.loglog(x, y, label=label, **style)
            if name == names[0] and dashed == (name not in measured):
                for texts, at in zip(lines[name], zip(x, y)):
                    ax.annotate(f"{texts}", at, (6, -10), textcoords="offset points", size=8)
    ax.set(xlabel="time from token to token (ms)", ylabel="tokens a second, all texts")
    for axis, subs in ((ax.xaxis, (1, 2, 5)), (ax.yaxis, (1,))):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return ax


class MeshPanel(SettingsPanel):
    """Sliders for the three axes, micro-batches and the schedule; what a step takes there.

    Whenever a slider has moved, the program trains on real ranks. The figure shows the timeline of
    a step, memory and bytes of each rank, and tokens a second, beside the prediction.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster
    measure : callable
        ``measure(layout)`` trains for some steps, and returns a dict with ``events`` of one step,
        lists of what each rank ``held`` and ``sent``, and ``tokens`` a second.
    predict : callable
        ``predict(layout)`` returns the same without events.
    largest : int
        Ranks at most.
    rows : int
        Lines of a batch: each micro-batch needs one.
    """

    alt = (
        "A panel with sliders for data, tensor and pipeline ranks, micro-batches and the schedule. "
        "Below them a timeline of one training step, bars of the memory of each rank and of the "
        "bytes that it sends on each axis, with dashed lines at what was predicted."
    )

    def __init__(self, cluster, measure, predict, largest: int = 8, rows: int = 32):
        self.measure, self.predict, self.largest, self.rows = measure, predict, largest, rows
        self.sizes = [
            choice(axis, values, value)
            for axis, values, value in (
                ("Data", (1, 2, 4, 8), 1),
                ("Tensor", (1, 2, 4), 1),
                ("Pipeline", (1, 2, 4, 8), 2),
            )
        ]
        self.microbatches = choice("Micro-batches", (1, 2, 4, 8), 4)
        self.schedule = widgets.Dropdown(options=list(SCHEDULES), description="Schedule")
        super().__init__(cluster, (*self.sizes, self.microbatches, self.schedule))

    @property
    def layout(self) -> layout.Layout:
        """What the sliders stand at."""
        sizes = [size.value for size in self.sizes]
        schedule = SCHEDULES[self.schedule.value]
        return layout.Layout(*sizes, self.microbatches.value, schedule)

    def try_setting(self) -> str:
        """Train on this mesh, and compare with the prediction."""
        chosen = self.layout
        if chosen.ranks > self.largest:
            return f"{chosen.ranks} ranks are too many here: choose {self.largest} or fewer."
        if chosen.data * chosen.microbatches > self.rows:
            return (
                f"{self.rows} lines do not make {chosen.microbatches} micro-batches on each of "
                f"{chosen.data} data ranks: choose fewer."
            )
        self.seen, self.expected = self.measure(chosen), self.predict(chosen)
        self.drawn = chosen
        return (
            f"{chosen}, {self.schedule.value}: {self.seen['tokens']:,.0f} tokens a second, "
            f"predicted {self.expected['tokens']:,.0f}."
        )

    def draw(self) -> plt.Figure:
        """The timeline; below it memory and bytes."""
        figure = plt.figure(figsize=(10, 3.6 + 0.32 * self.drawn.ranks), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=[1.2 + 0.32 * self.drawn.ranks, 2.6])
        ax = upper.subplots()
        draw_step(self.seen["events"], self.drawn.ranks, ax)
        words = [f"{each['tokens']:,.0f}" for each in (self.seen, self.expected)]
        ax.set_title(f"{self.drawn}: {words[0]} tokens a second (measured), {words[1]} (predicted)")
        left, right = lower.subplots(1, 2)
        plot_memory(*(_by_rank(each["held"]) for each in (self.seen, self.expected)), left)
        plot_bytes(*(_by_rank(each["sent"]) for each in (self.seen, self.expected)), right)
        for ax in (left, right):
            ax.set(xlabel="rank", xlim=(-0.7, max(2, self.drawn.ranks) - 0.3))
            ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
        return figure


def _by_rank(items: list) -> dict:
    return {str(rank): item for rank, item in enumerate(items)}


def draw_step(events, ranks: int, ax):
    """Draw one training step of a mesh in milliseconds, a row for each rank.

    Parameters
    ----------
    events : list of Event
        Of one step; only what a rank computes is drawn.
    ranks : int
    ax : matplotlib.axes.Axes

    Returns
    -------
    matplotlib.axes.Axes
    """
    begin = min(event.start for event in events)
    shown = [
        replace(event, start=1e3 * (event.start - begin), length=1e3 * event.length, lane=0)
        for event in events
        if event.operation in STYLES
    ]
    styles = {kind: style for kind, style in STYLES.items() if kind in {e.operation for e in shown}}
    draw_schedule(shown, ranks, ax, name="rank", styles=styles)
    ax.set(xlabel="time (ms)", xlim=0)
    return ax
