"""What notebook 05 draws, and its panel.

`plot_memory`, `show`, `block_step` and `exchange_seconds` of other modules are names here too, so
that the notebook needs this module alone for all of these.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

from helpers.classroom.data_parallel_at_scale import plot_memory
from helpers.classroom.diagrams import WORKERS, arrow, block, box
from helpers.classroom.panels import SettingsPanel, choice
from helpers.classroom.plots import COLOURS, HATCHES, draw_predicted, show
from helpers.classroom.tensor_parallel_programs import block_step, exchange_seconds
from helpers.engine import spmd
from helpers.engine.mesh import Mesh

__all__ = [
    "TensorParallelPanel",
    "block_step",
    "bytes_sent",
    "draw_pair",
    "draw_pieces",
    "exchange_seconds",
    "plot_gain",
    "plot_memory",
    "plot_work",
    "show",
]

RANKS, WIDTHS = (1, 2, 4), (64, 128, 256)
GAP = 0.6
TRIED_SHOWN = 6
BEGIN_WITH = ((1, 128, False), (4, 128, False), (4, 128, True))
"""Ranks, width and sequence parallelism that the panel tries before the first setting."""


def draw_pieces(wholes: dict, held: list, ax=None):
    """Draw arrays, and which rank holds which piece of each.

    Parameters
    ----------
    wholes : dict of str to (int, int)
        Rows and columns of each array; an array of one axis has one row.
    held : list of dict
        For each rank, ``{name: index}`` with what stands in brackets when the piece is cut from the
        whole: a slice of rows and one of columns. A list of such, where there are several pieces.
        What several ranks hold is drawn white, with all of their numbers.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> halves = [{"w": np.s_[:, :1]}, {"w": np.s_[:, 1:]}]
    >>> [text.get_text() for text in draw_pieces({"w": (2, 2)}, halves).texts]
    ['0', '1', 'w']
    """
    ax = ax or plt.figure(figsize=(1.6 * len(wholes), 2.4)).subplots()
    largest = max(max(shape) for shape in wholes.values())
    left, lowest = 0.0, 0.0
    for name, (rows, columns) in wholes.items():
        # A thin array is drawn a little thicker than it is, so that its rank can be read.
        x, y = (2.4 * max(size / largest, 0.16) for size in (columns, rows))
        for place, owners in _owners(name, (rows, columns), held).items():
            row, row_stop, column, column_stop = place
            colour, hatch = WORKERS[owners[0]] if len(owners) == 1 else ("", "")
            block(
                *(ax, left + x * column / columns, -y * row / rows),
                *(x * (column_stop - column) / columns, y * (row_stop - row) / rows),
                *(COLOURS.get(colour, "white"), hatch, ",".join(map(str, owners))),
            )
        ax.text(left + x / 2, 0.12, name, ha="center", va="bottom", fontsize=10, weight="bold")
        left, lowest = left + x + GAP, min(lowest, -y)
    ax.set(xlim=(-0.1, left - GAP + 0.1), ylim=(lowest - 0.1, 0.6))
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


def _owners(name, shape, held):
    """Which ranks hold each piece of an array: {(row, row_stop, column, column_stop): ranks}."""
    found = {}
    for rank, pieces in enumerate(held):
        indices = pieces.get(name, [])
        for index in indices if isinstance(indices, list) else [indices]:
            place = [end for cut, size in zip(index, shape) for end in cut.indices(size)[:2]]
            found.setdefault(tuple(place), []).append(rank)
    return found


def bytes_sent(events, rank: int = 0) -> int:
    """Bytes that a rank sent, counted message by message.

    Parameters
    ----------
    events : list of Event
        Of a run over TCP in which every exchange was a ring: a ring sends by `Group.exchange`.
    rank : int

    Examples
    --------
    >>> from helpers.engine.events import Event
    >>> bytes_sent([Event(rank, "exchange", 0, 1, nbytes=100) for rank in range(2)])
    100
    """
    return sum(e.nbytes for e in events if e.rank == rank and e.operation == "exchange")


def draw_pair(ax=None):
    """Draw the pair on two ranks: a matrix cut by columns, then one cut by rows, between f and g.

    Parameters
    ----------
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = ax or plt.figure(figsize=(9.5, 3.1)).subplots()
    box(ax, 0, 0, "x")
    for place, (name, words) in {
        1.35: ("f", "forward: nothing\nbackward: all-reduce"),
        8.1: ("g", "forward: all-reduce\nbackward: nothing"),
    }.items():
        box(ax, place, 0, name, COLOURS["yellow"], width=0.5)
        ax.text(place, -1.35, words, ha="center", va="top", fontsize=8)
    for rank, y in enumerate((0.75, -0.75)):
        colour = COLOURS[WORKERS[rank][0]]
        names = (f"· $w_{{1,{rank}}}$", "GELU", f"· $w_{{2,{rank}}}$")
        for x, name in zip((3.0, 4.75, 6.5), names):
            box(ax, x, y, name, colour, width=1.1)
        for start, end in ((1.62, 2.42), (3.58, 4.17), (5.33, 5.92), (7.08, 7.83)):
            outer = (0 if start < 2 else y, 0 if end > 7.5 else y)
            arrow(ax, (start, outer[0]), (end, outer[1]))
        ax.text(4.75, y + 0.45 if rank == 0 else y - 0.45, f"rank {rank}", ha="center", va="center")
    arrow(ax, (0.42, 0), (1.08, 0))
    arrow(ax, (8.37, 0), (9.0, 0))
    box(ax, 9.45, 0, "y")
    ax.set(xlim=(-0.6, 10.1), ylim=(-2.1, 1.4))
    ax.axis("off")
    return ax


def plot_gain(measured: dict, predicted: dict, ax=None):
    """Draw speed-ups by width: measured solid, predicted dashed in the same colour.

    Parameters
    ----------
    measured, predicted : dict of str to dict of int to float
        ``{name: {width: times faster}}``. What was only predicted has no solid line.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_gain({"TCP": {16: 0.5, 32: 0.9}}, {"TCP": {16: 0.6, 32: 1.1}})
    >>> [line.get_label() for line in ax.lines if not line.get_label().startswith("_")]
    ['TCP, measured', 'TCP, predicted']
    """
    ax = ax or plt.figure(figsize=(6.5, 3.8)).subplots()
    ax.axhline(1, color="0.6", linewidth=1)
    for name, colour, marker in zip(predicted, ("blue", "orange", "green", "purple"), "os^D"):
        style = dict(color=COLOURS[colour], marker=marker)
        if name in measured:
            line = measured[name]
            ax.plot(list(line), list(line.values()), "-", label=f"{name}, measured", **style)
        line, style = predicted[name], style | dict(fillstyle="none")
        ax.plot(list(line), list(line.values()), "--", label=f"{name}, predicted", **style)
    ax.set_xscale("log", base=2)
    places = sorted({x for line in predicted.values() for x in line})
    ax.set_xticks(places, [f"{x:,}" for x in places])
    ax.set_ylabel("times faster than one rank")
    ax.legend(fontsize=8)
    return ax


def plot_work(measured: dict, predicted: dict, ax=None):
    """Draw how much each rank has to do: bars measured, lines predicted.

    Parameters
    ----------
    measured, predicted : dict of str to sequence of float
        ``{way: share of each rank}``; the shares of a way add up to 1.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_work({"in a row": [0.25, 0.75]}, {"in a row": [0.25, 0.75]})
    >>> [float(bar.get_height()) for bar in ax.patches]
    [0.25, 0.75]
    """
    ax = ax or plt.figure(figsize=(6, 3.2)).subplots()
    thick = 0.8 / len(measured)
    for number, (name, shares) in enumerate(measured.items()):
        places = np.arange(len(shares)) + (number - (len(measured) - 1) / 2) * thick
        style = dict(color=COLOURS[("sky", "orange")[number]], hatch=HATCHES[number])
        ax.bar(places, shares, 0.92 * thick, edgecolor="black", label=name, **style)
        for place, share in zip(places, predicted[name]):
            last = number == len(measured) - 1 and place == places[-1]
            draw_predicted(ax, place, thick, share, label=last)
    ax.set_xticks(range(len(shares)))
    ax.set(xlabel="rank", ylabel="share of the work")
    ax.legend(fontsize=8)
    return ax


class TensorParallelPanel(SettingsPanel):
    """Controls for ranks, width and sequence parallelism; time, bytes and memory of a block.

    Whenever one has moved, the block runs on real ranks, forward and backward, and the figure shows
    it beside what was predicted. All messages go over TCP, so that the bytes sent are counted.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster
    program : callable
        ``program(rank, width, sequence)`` takes some steps, recorded as "step", with exchanges as
        rings, and returns the seconds of one and the bytes that this rank keeps for the backward
        pass.
    predict : callable
        ``predict(ranks, width, sequence)`` returns seconds, bytes that a rank sends in a step, and
        bytes that it keeps.
    """

    alt = (
        "A panel with sliders for the number of ranks, the width of a block, and sequence "
        "parallelism off or on. Below them three plots of bars for the settings that were tried: "
        "milliseconds of a step, megabytes that a rank sends, and megabytes that it keeps. A "
        "dashed line at each bar is what was predicted."
    )
    working = "The ranks compute …"
    figures = ("milliseconds", "MB sent", "MB kept")

    def __init__(self, cluster, program, predict):
        self.program, self.predict, self.tried = program, predict, {}
        self.ranks = choice("Ranks", RANKS, 2)
        self.width = choice("Width", WIDTHS, 128)
        self.sequence = choice("Sequence", ("whole", "cut"), "whole")
        for setting in BEGIN_WITH:
            self._run(cluster, *setting)
        super().__init__(cluster, (self.ranks, self.width, self.sequence))

    def try_setting(self) -> str:
        """Run the block, and note what was measured and what was predicted."""
        setting = self.ranks.value, self.width.value, self.sequence.value == "cut"
        measured, told = self._run(self.cluster, *setting)
        return (
            f"{measured['milliseconds']:.1f} ms a step (predicted {told['milliseconds']:.1f}); a "
            f"rank sends {measured['MB sent']:.2f} MB and keeps {measured['MB kept']:.2f} MB."
        )

    def _run(self, cluster, ranks, width, sequence):
        """What was measured, and what was predicted, in the units of the figure."""
        arguments = (Mesh(tensor=ranks), self.program, width, sequence)
        run = spmd.run(cluster.client, *arguments, record=True, transport="tcp")
        steps = sum(e.rank == 0 and e.operation == "step" for e in run.events)
        seconds, kept = (max(found) for found in zip(*run.results))
        measured = self._in_units(seconds, bytes_sent(run.events) / max(1, steps), kept)
        told = self._in_units(*self.predict(ranks, width, sequence))
        words = f"{ranks} × {width}\n{'cut' if sequence else 'whole'}"
        self.tried.pop(words, None)  # a setting that is tried again comes last
        self.tried[words] = measured, told
        self.tried = dict(list(self.tried.items())[-TRIED_SHOWN:])
        return measured, told

    def _in_units(self, seconds, sent, kept):
        return dict(zip(self.figures, (1e3 * seconds, sent / 1e6, kept / 1e6)))

    def draw(self) -> plt.Figure:
        """Three plots: each setting's bar, and a line where it was predicted."""
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
        places = range(len(self.tried))
        for ax, name, colour in zip(axes, self.figures, ("sky", "orange", "green")):
            heights = [measured[name] for measured, _ in self.tried.values()]
            ax.bar(places, heights, 0.6, color=COLOURS[colour], edgecolor="black", label="measured")
            for place, (_, told) in zip(places, self.tried.values()):
                draw_predicted(ax, place, 0.8, told[name], label=place == 0)
            ax.set_xticks(places, list(self.tried), fontsize=7)
            ax.set_ylabel(name)
        axes[1].set_xlabel("ranks × width; the positions whole or cut between the matrices")
        axes[0].legend(fontsize=8)
        return figure
