"""What notebook 06 draws, and its panel.

`plot_lines`, `show` and `load_study` of other modules are names here too, so that the notebook
needs this module alone for all of its figures and its stored study.
"""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from helpers.classroom.panels import SettingsPanel, choice, ranks_slider
from helpers.classroom.plots import COLOURS, HATCHES, draw_predicted, plot_lines, show
from helpers.classroom.timeline import PALE, draw_schedule
from helpers.planner.pipeline import bubble, peak_activations, step_seconds
from helpers.studies import load_study

__all__ = [
    "PipelinePanel",
    "draw_places",
    "draw_timelines",
    "load_study",
    "plot_lines",
    "plot_recomputation",
    "plot_scores",
    "scores",
    "show",
]

STYLES = {
    "forward": (COLOURS["sky"], ""),
    "forward, chunk 1": (COLOURS["sky"], "//"),
    "backward": (COLOURS["orange"], ""),
    "backward, chunk 1": (COLOURS["orange"], "//"),
    "input": (COLOURS["yellow"], ""),
    "weight": (COLOURS["green"], ""),
    "wait": (PALE, ""),
}
LEGEND = {"input": "input gradient", "weight": "weight gradient"}
WIDEST_NUMBER = 0.012
"""A bar that is a smaller part of the picture's width has no room for its micro-batch's number."""


def draw_timelines(timelines: dict, ranks: int, units: bool = False):
    """Draw timelines of one model below each other, with one scale and the same colours.

    The number in a bar is that of the micro-batch. Of what is no operation only waiting is drawn.

    Parameters
    ----------
    timelines : dict of str to list of Event
        ``{title: events}``, of one step each. Say in the title whether it is measured.
    ranks : int
    units : bool
        True: times are not seconds but units of some kind.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> from helpers.engine.events import Event
    >>> figure = draw_timelines({"predicted": [Event(0, "forward", 0, 0.01, 0, 0, 3)]}, ranks=1)
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['3']
    """
    size = (9, 0.5 + len(timelines) * (0.55 + 0.24 * ranks))
    figure, axes = plt.subplots(
        len(timelines), 1, figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    scale = 1 if units else 1e3  # else in milliseconds
    shown = {
        title: [_scaled(e, scale, ranks) for e in events if e.operation in STYLES]
        for title, events in timelines.items()
    }
    longest = max(event.stop for events in shown.values() for event in events)

    def words(event):
        wide = event.length > WIDEST_NUMBER * longest
        return str(event.microbatch) if wide and event.microbatch is not None else ""

    for ax, (title, events) in zip(axes[:, 0], shown.items(), strict=True):
        draw_schedule(events, ranks, ax, name="rank", styles=STYLES, words=words)
        ax.set(xlabel="", xlim=(0, 1.01 * longest))
        ax.set_title(title, fontsize=9, loc="left")
        ax.tick_params(labelsize=8)
        ax.get_legend().remove()
    axes[-1, 0].set_xlabel("time (units)" if units else "time (ms)")
    _one_legend(figure)
    return figure


def _scaled(event, scale, ranks):
    chunk = (event.layer or 0) // ranks
    name = f"{event.operation}, chunk {chunk}" if chunk else event.operation
    times = dict(start=scale * event.start, length=scale * event.length)
    return replace(event, operation=name, lane=0, **times)


def _one_legend(figure):
    """One legend for all, right of the uppermost timeline."""
    found = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(LEGEND.get(label, label), handle)
    style = dict(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, borderaxespad=0)
    figure.axes[0].legend(found.values(), found.keys(), **style)


def draw_places(places: dict):
    """Draw which rank holds which block: a row for each rank, the arrays' names in the boxes.

    Parameters
    ----------
    places : dict of int to dict of int to str
        ``{rank: {layer: words}}``.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> [text.get_text() for text in draw_places({0: {0: "w0"}, 1: {1: "w1"}}).axes[0].texts]
    ['w0', 'w1']
    """
    layers = 1 + max(layer for blocks in places.values() for layer in blocks)
    figure = plt.figure(figsize=(0.9 * layers + 1.2, 0.42 * len(places) + 0.7))
    ax = figure.subplots()
    colours = [COLOURS[name] for name in ("sky", "orange", "green", "purple")]
    for rank, blocks in places.items():
        for layer, words in blocks.items():
            colour = colours[rank % len(colours)]
            ax.add_patch(Rectangle((layer + 0.05, rank - 0.4), 0.9, 0.8, color=colour, alpha=0.6))
            ax.text(layer + 0.5, rank, words, ha="center", va="center", fontsize=8)
    ax.set(xlim=(0, layers), ylim=(len(places) - 0.5, -0.5), xlabel="block of the model")
    ax.set_xticks(np.arange(layers) + 0.5, range(layers))
    ax.set_yticks(range(len(places)), [f"rank {rank}" for rank in places])
    return figure


def plot_scores(measured: dict, predicted: dict, ranks: int, chunks: dict | None = None):
    """Draw bubble and peak activations of schedules: bars measured, dashed lines predicted.

    Parameters
    ----------
    measured, predicted : dict of str to list of Event
        One step of each schedule, under the same names.
    ranks : int
    chunks : dict of str to int, optional
        Chunks a rank, by the schedule's name, where there are several. The activations of a chunk
        count as that part of those of a whole stage.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.4), layout="constrained", width_ratios=[1, 1.4]
    )
    names = list(measured)
    for place, name in enumerate(names):
        style = dict(color=COLOURS["sky"], edgecolor="black")
        left.bar(place, bubble(measured[name], ranks), 0.6, **style)
        draw_predicted(left, place, 0.8, bubble(predicted[name], ranks), place == 0)
        parts = (chunks or {}).get(name, 1)
        peaks = [
            [kept / parts for kept in peak_activations(events[name], ranks)]
            for events in (measured, predicted)
        ]
        width = 0.8 / ranks
        for rank, (seen, expected) in enumerate(zip(*peaks, strict=True)):
            x = place + width * (rank - (ranks - 1) / 2)
            colour = [COLOURS[c] for c in ("sky", "orange", "green", "purple")][rank % 4]
            label = f"rank {rank}, measured" if place == 0 else None
            style = dict(color=colour, edgecolor="black", hatch=HATCHES[rank % 8], label=label)
            right.bar(x, seen, width, **style)
            draw_predicted(right, x, width, expected, place == rank == 0)
    left.set(title="Bubble: idle share of the ranks' time", ylim=0)
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set(title="Activations kept at most", ylabel="micro-batches of a whole stage")
    for ax in (left, right):
        ax.set_xticks(range(len(names)), [n.replace("-", "-\n") for n in names], fontsize=8)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return figure


def plot_recomputation(measured: dict, predicted: dict, ax=None):
    """Draw memory against time for each way to recompute.

    Parameters
    ----------
    measured, predicted : dict of str to (float, float)
        ``{way: (seconds of a step, bytes of activations of rank 0)}``.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_recomputation({"full": (0.2, 4e6)}, {"full": (0.25, 4e6)})
    >>> [text.get_text() for text in ax.texts]
    ['full']
    """
    ax = ax or plt.figure(figsize=(6, 3.6)).subplots()
    for points, name, style in (
        (predicted, "predicted", dict(marker="s", linestyle="--", fillstyle="none", color="red")),
        (measured, "measured", dict(marker="o", linestyle="-", color="blue")),
    ):
        seconds, nbytes = zip(*points.values(), strict=True)
        style["color"] = COLOURS[style["color"]]
        ax.plot([1e3 * s for s in seconds], [n / 1e6 for n in nbytes], label=name, **style)
    for name, (seconds, nbytes) in measured.items():
        where = dict(xytext=(6, 6), textcoords="offset points", fontsize=9)
        ax.annotate(name, (1e3 * seconds, nbytes / 1e6), **where)
    ax.set(xlabel="time of a step (ms)", ylabel="activations of rank 0 (MB)")
    ax.set_ylim(0, 1.15 * max(n for _, n in measured.values()) / 1e6)
    ax.margins(x=0.15)
    ax.legend(fontsize=8)
    return ax


class PipelinePanel(SettingsPanel):
    """Sliders for stages, micro-batches and the schedule; the timeline of each, and its scores.

    Whenever a slider has moved, the schedule runs on real ranks, and the figure shows the simulated
    timeline above the measured one.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster
    measure : callable
        ``measure(schedule, ranks, microbatches)`` runs one, and returns the simulated events of a
        step, the measured ones, and words that say how they were measured.
    schedules : dict of str to callable
        To choose from, by name.
    microbatches : sequence of int
        To choose from.
    most : int
        Ranks at most.
    """

    alt = (
        "A panel with sliders for the number of stages, the number of micro-batches and the "
        "schedule. Below them the simulated timeline of one step above the measured one, and in "
        "their titles the time of the step, the idle share, and the activations kept at most."
    )
    working = "The ranks work …"

    def __init__(self, cluster, measure, schedules, microbatches=(1, 2, 4, 8), most=4):
        self.measure, self.schedules = measure, dict(schedules)
        self.stages = ranks_slider(cluster, most)
        self.stages.description = "Stages"
        self.microbatches = choice("Micro-batches", tuple(microbatches), microbatches[-1])
        self.schedule = choice("Schedule", tuple(self.schedules))
        super().__init__(cluster, (self.stages, self.microbatches, self.schedule))

    def try_setting(self) -> str:
        """Run the schedule, and note both timelines."""
        ranks, name = self.stages.value, self.schedule.value
        found = self.measure(self.schedules[name], ranks, self.microbatches.value)
        predicted, measured, how = found
        self.timelines = {
            f"simulated: {scores(predicted, ranks)}": predicted,
            f"{how}: {scores(measured, ranks)}": measured,
        }
        seconds = step_seconds(measured), step_seconds(predicted)
        words = f"{1e3 * seconds[0]:.0f} ms a step, predicted {1e3 * seconds[1]:.0f} ms"
        return f"{name}, {ranks} stage{'s' * (ranks != 1)}: {words}."

    def draw(self) -> plt.Figure:
        """The simulated timeline above the measured one."""
        return draw_timelines(self.timelines, self.stages.value)


def scores(events, ranks: int) -> str:
    """Time, bubble and peak activations of one step in words.

    Examples
    --------
    >>> from helpers.engine.events import Event
    >>> step = [Event(0, "forward", 0, 0.01, 0, 0, 0), Event(0, "backward", 0.01, 0.01, 0, 0, 0)]
    >>> scores(step, ranks=1)
    '20 ms, bubble 0 %, activations kept at most 1'
    """
    peaks = ", ".join(map(str, peak_activations(events, ranks)))
    idle = round(100 * bubble(events, ranks))
    return f"{1e3 * step_seconds(events):.0f} ms, bubble {idle} %, activations kept at most {peaks}"
