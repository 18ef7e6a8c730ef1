"""What notebook 04 draws, and its panel.

`draw_schedule`, `plot_lines`, `show` and `load_study` of other modules are names here too, so that
the notebook needs this module alone for all of its figures and stored studies.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import StrMethodFormatter

from helpers.classroom.panels import SettingsPanel, choice, ranks_slider
from helpers.classroom.plots import COLOURS, HATCHES, draw_predicted, plot_lines, show
from helpers.classroom.timeline import draw_schedule
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.studies import load_study

__all__ = [
    "LocalStepsPanel",
    "draw_schedule",
    "load_study",
    "plot_compression",
    "plot_counts",
    "plot_lines",
    "plot_memory",
    "show",
]

EVERY = (1, 4, 16, 64, 128)
STYLES = {
    # How rows are dealt: name, colour, mark, and a shift so that points do not hide each other.
    "random": ("at random", "blue", "o", 0.94),
    "hour": ("by hour", "orange", "s", 1.0),
    "label": ("by label", "red", "D", 1.06),
}


def plot_counts(values, ax=None, most: int | None = None):
    """Draw how often each whole number occurs.

    Parameters
    ----------
    values : array of int
        0 or more each.
    ax : matplotlib.axes.Axes, optional
    most : int, optional
        Right end of the axis; larger numbers are counted there. Default: the largest number.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_counts([0, 2, 2, 9], most=4)
    >>> [int(bar.get_height()) for bar in ax.patches]
    [1, 0, 2, 0, 1]
    """
    ax = ax or plt.figure(figsize=(5, 3.2)).subplots()
    most = max(values) if most is None else most
    counts = np.bincount(np.minimum(values, most), minlength=most + 1)
    ax.bar(range(most + 1), counts, color=COLOURS["blue"])
    return ax


def plot_compression(means, ax=None, below=()):
    """Draw bytes against loss for each method, alone and with error feedback.

    Parameters
    ----------
    means : pandas.DataFrame
        Rows (feedback, method), feedback 0 or 1; columns ``nbytes`` and ``train_loss``. A method
        that occurs with feedback 0 only gets one point.
    ax : matplotlib.axes.Axes, optional
    below : sequence of str
        Methods whose name stands below their point, where another is above.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_tuples([(0, "none"), (0, "sign"), (1, "sign")])
    >>> table = pd.DataFrame({"nbytes": [800, 25, 25], "train_loss": [0.5, 0.6, 0.51]}, index)
    >>> [text.get_text() for text in plot_compression(table).texts if text.get_text()]
    ['none', 'sign']
    """
    ax = ax or plt.figure(figsize=(7.5, 4.2)).subplots()
    alone = means.loc[0]
    fed = means.loc[1] if 1 in means.index.get_level_values(0) else alone.iloc[:0]
    columns = ["nbytes", "train_loss"]
    ax.semilogx(*alone[columns].T.to_numpy(), "o", color=COLOURS["red"], label="alone")
    style = dict(color=COLOURS["blue"], label="with error feedback")
    ax.semilogx(*fed[columns].T.to_numpy(), "s", **style)
    arrow = dict(arrowstyle="->", color="0.5", shrinkA=4, shrinkB=4)
    for method in alone.index:
        begin = tuple(alone.loc[method, columns])
        where = dict(xytext=(0, -16 if method in below else 7), textcoords="offset points")
        ax.annotate(method, begin, ha="center", size=8, **where)
        if method in fed.index:
            ax.annotate("", tuple(fed.loc[method, columns]), begin, arrowprops=arrow)
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    ax.set(xlabel="payload of a rank in a step (bytes)", ylabel="log loss")
    ax.margins(x=0.12, y=0.14)
    ax.legend(fontsize=8)
    return ax


def plot_memory(measured: dict, predicted: dict, ax=None):
    """Draw stacked bars of what was measured, and a line at the height that was predicted.

    Parameters
    ----------
    measured, predicted : dict of str to dict of str to int
        ``{bar: {kind: bytes}}`` with the same bars and kinds.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> held = {"stage 0": {"parameters": 4_000_000, "state": 8_000_000}}
    >>> ax = plot_memory(held, held)
    >>> [float(bar.get_height()) for bar in ax.patches]
    [4.0, 8.0]
    """
    ax = ax or plt.figure(figsize=(6, 3.8)).subplots()
    below = np.zeros(len(measured))
    colours = [COLOURS[name] for name in ("sky", "orange", "green", "purple")]
    for kind, colour, hatch in zip(next(iter(measured.values())), colours, HATCHES):
        heights = np.array([kinds[kind] / 1e6 for kinds in measured.values()])
        style = dict(color=colour, hatch=hatch, edgecolor="black", label=kind)
        ax.bar(range(len(measured)), heights, 0.6, bottom=below, **style)
        below += heights
    for place, name in enumerate(measured):
        height = sum(predicted[name].values()) / 1e6
        draw_predicted(ax, place, 0.8, height, label=place == 0)
    ax.set_xticks(range(len(measured)), list(measured))
    ax.set_ylabel("memory of a rank (MB)")
    ax.legend(fontsize=8)
    return ax


class LocalStepsPanel(SettingsPanel):
    """Sliders for ranks, steps between averagings and how rows are dealt; the loss of each.

    Whenever a slider has moved, the program trains on real ranks, and the figure gets one more
    point: averagings saved against the loss.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster
    program : callable
        ``program(rank, how, every)`` trains, and returns the loss and the seconds that it took;
        `how` is "random", "hour" or "label".
    tried : dict of (str, int, int) to float
        Losses that are known already, by how rows were dealt, ranks, and steps between averagings.
    """

    alt = (
        "A panel with sliders for the number of ranks, the steps between averagings, and how rows "
        "are dealt out. Below them a figure with one point for each setting that was tried: steps "
        "between averagings against the loss."
    )

    def __init__(self, cluster, program, tried):
        self.program, self.tried = program, dict(tried)
        self.ranks = ranks_slider(cluster, most=8)
        self.every, self.how = choice("H", EVERY, 16), choice("Dealt", tuple(STYLES), "random")
        super().__init__(cluster, (self.ranks, self.every, self.how))

    def try_setting(self) -> str:
        """Train, and note the loss."""
        setting = self.how.value, self.ranks.value, self.every.value
        how, ranks, every = setting
        run = spmd.run(self.cluster.client, Mesh(data=ranks), self.program, how, every)
        loss, seconds = run.results[0]
        self.tried[setting] = loss
        setting = f"{ranks} rank{'s' * (ranks != 1)}, H = {every}, {STYLES[how][0]}"
        return f"{setting}: loss {loss:.3f} after {seconds:.1f} s."

    def draw(self) -> plt.Figure:
        """One point for each setting; its number is that of the ranks."""
        figure = plt.figure(figsize=(7, 3.6), layout="constrained")
        ax = figure.subplots()
        for how, (name, colour, marker, shift) in STYLES.items():
            points = [(r, e * shift, loss) for (h, r, e), loss in self.tried.items() if h == how]
            style = dict(linestyle="", color=COLOURS[colour], label=name)
            ax.plot([e for _, e, _ in points], [loss for *_, loss in points], marker, **style)
            for ranks, every, loss in points:
                ax.annotate(str(ranks), (every, loss), (5, 3), textcoords="offset points", size=8)
        ax.set_xscale("log", base=2)
        ax.set_xticks(EVERY, [str(e) for e in EVERY])
        ax.set(xlim=(0.8, 160), xlabel="H, steps between averagings", ylabel="log loss")
        ax.set_title("Loss of each setting; the numbers are ranks (measured)")
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
        return figure
