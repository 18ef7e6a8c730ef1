"""What notebook 09 draws, how it compares, and its panel.

`plot_lines`, `show`, `load_study` and `CountedGroup` of other modules are names here too, so that
the notebook needs this module alone for all of its figures, stored studies and counted bytes.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection

from helpers.classroom.panels import SettingsPanel, choice
from helpers.classroom.plots import COLOURS, plot_lines, show
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.parallel.counted import CountedGroup
from helpers.studies import load_study

__all__ = [
    "CountedGroup",
    "TogetherPanel",
    "best",
    "by_seed",
    "draw_graph",
    "load_study",
    "plot_lines",
    "plot_seeds",
    "sent",
    "show",
]

WORKERS, ROWS, WEIGHTS = (2, 4, 8), (100, 250, 500, 1000), (0.0, 0.5, 1.0, 2.0)
STYLES = {
    # Weight of what the others say: colour, mark, and a shift so that points are not hidden.
    0.0: ("red", "o", 0.94),
    0.5: ("orange", "^", 0.98),
    1.0: ("green", "s", 1.02),
    2.0: ("blue", "D", 1.06),
}


def by_seed(study, *columns, score="auc"):
    """The scores of a study: one row for each setting, one column for each seed.

    Parameters
    ----------
    study : pandas.DataFrame
        As `load_study` gives it.
    columns : str
        Which columns of the study name a setting.
    score : str
        Which column holds the score.

    Returns
    -------
    pandas.DataFrame

    Examples
    --------
    >>> import pandas as pd
    >>> study = pd.DataFrame(dict(way=["a", "a", "b"], seed=[0, 1, 0], auc=[0.6, 0.7, 0.5]))
    >>> by_seed(study, "way").loc["a"].tolist()
    [0.6, 0.7]
    """
    return study.set_index([*columns, "seed"])[score].unstack("seed")


def best(rows):
    """The row of `by_seed` whose mean over the seeds is the largest; its name is the setting.

    Examples
    --------
    >>> import pandas as pd
    >>> best(pd.DataFrame({0: [0.6, 0.8], 1: [0.9, 0.8]}, index=["a", "b"])).name
    'b'
    """
    return rows.loc[rows.mean(axis=1).idxmax()]


def sent(study, **where):
    """What one worker sends in a training: numbers of a message, how many of them, and kilobytes.

    Parameters
    ----------
    study : pandas.DataFrame
        With columns `numbers`, `times` and `kilobytes`.
    **where
        Columns and the values that they must have.

    Returns
    -------
    tuple of int, int and float
        Means of all rows that fit.

    Examples
    --------
    >>> import pandas as pd
    >>> rows = dict(way=["a", "b"], numbers=[5, 9], times=[2, 1], kilobytes=[0.04, 0.036])
    >>> sent(pd.DataFrame(rows), way="a")
    (5, 2, 0.04)
    """
    for column, value in where.items():
        study = study[study[column] == value]
    if not len(study):
        raise ValueError(f"the study has no row with {where}.")
    numbers, times, kilobytes = study[["numbers", "times", "kilobytes"]].mean()
    return int(numbers), int(times), float(kilobytes)


def plot_seeds(scores: dict, ax=None, controls=()):
    """Draw one row for each method: a circle for each seed, and a bar at their mean.

    Parameters
    ----------
    scores : dict of str to sequence of float
        The scores of a method, one for each seed.
    ax : matplotlib.axes.Axes, optional
    controls : sequence of str
        Methods that are controls: hollow squares.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_seeds({"alone": [0.6, 0.62], "together": [0.65, 0.66]})
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['alone', 'together']
    """
    ax = ax or plt.figure(figsize=(6.5, 0.45 * len(scores) + 0.9)).subplots()
    for y, (name, values) in enumerate(scores.items()):
        values = np.asarray(values, float)
        colour = COLOURS["orange" if name in controls else "blue"]
        style = dict(marker="s", fillstyle="none") if name in controls else dict(marker="o")
        ax.plot(values, np.full(len(values), y), linestyle="", color=colour, **style)
        ax.plot([values.mean()] * 2, [y - 0.32, y + 0.32], color="black", linewidth=2)
    for border in range(1, len(scores)):
        ax.axhline(border - 0.5, color="0.85", linewidth=0.8, zorder=0)
    ax.set(ylim=(len(scores) - 0.4, -0.6))
    ax.set_yticks(range(len(scores)), list(scores))
    return ax


def draw_graph(edges, ax=None):
    """Draw who talks to whom: the ranks on a circle, and a line for each edge.

    Up to ten ranks have their number in their circle; more would be too small to read.

    Parameters
    ----------
    edges : array of bool, shape (p, p)
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = draw_graph(np.array([[False, True], [True, False]]))
    >>> len(ax.collections[0].get_segments()), [text.get_text() for text in ax.texts]
    (1, ['0', '1'])
    """
    ax = ax or plt.figure(figsize=(2.4, 2.4)).subplots()
    angle = 2 * np.pi * np.arange(len(edges)) / len(edges)
    x, y = np.sin(angle), np.cos(angle)
    ends = np.argwhere(np.triu(edges))
    lines = np.stack([x[ends], y[ends]], axis=2)
    ax.add_collection(LineCollection(lines, colors="0.6", linewidths=1, zorder=1))
    few = len(edges) <= 10
    size = 13 if few else 8
    ax.plot(x, y, "o", color=COLOURS["sky"], markersize=size, markeredgecolor="black", zorder=2)
    for rank in range(len(edges) if few else 0):
        place = dict(ha="center", va="center", size=size / 1.8, zorder=3)
        ax.text(x[rank], y[rank], str(rank), **place)
    ax.set(aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
    ax.set_axis_off()
    return ax


class TogetherPanel(SettingsPanel):
    """Sliders for workers, rows of each, and how much a worker listens; the score of each setting.

    Whenever a slider has moved, the program trains on real ranks, and the figure gets one more
    point.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster
    program : callable
        ``program(rank, rows, weight, part)`` trains this rank's model on so many rows of its own
        part, and returns its score. With weight 0 it listens to nobody.
    parts : sequence
        What each rank has, and no other rank is given; at least as many as the most workers.
    tried : dict of (int, int, float) to float
        Mean scores that are known already, by workers, rows of each, and weight.
    """

    alt = (
        "A panel with sliders for the number of workers, the rows of each, and how much each "
        "listens to the others. Below them a figure with one point for each setting that was "
        "tried: rows of a worker against the mean AUC of the workers' models."
    )

    def __init__(self, cluster, program, parts, tried=()):
        self.program, self.parts, self.tried = program, parts, dict(tried)
        self.workers = choice("Workers", WORKERS, 4)
        self.rows, self.weight = choice("Rows", ROWS, 250), choice("Listen", WEIGHTS, 1.0)
        super().__init__(cluster, (self.workers, self.rows, self.weight))

    def try_setting(self) -> str:
        """Train, and note the mean score."""
        workers, rows, weight = setting = self.workers.value, self.rows.value, self.weight.value
        mesh, mine = Mesh(data=workers), self.parts[:workers]
        run = spmd.run(self.cluster.client, mesh, self.program, rows, weight, each=mine)
        self.tried[setting] = float(np.mean(run.results))
        words = f"{workers} workers of {rows} rows, weight {weight:g}"
        return f"{words}: AUC {self.tried[setting]:.3f} after {run.seconds:.1f} s."

    def draw(self) -> plt.Figure:
        """One point for each setting; its number is that of the workers."""
        figure = plt.figure(figsize=(7, 3.6), layout="constrained")
        ax = figure.subplots()
        for weight, (colour, marker, shift) in STYLES.items():
            points = [(n, r * shift, auc) for (n, r, w), auc in self.tried.items() if w == weight]
            name = f"listen {weight:g}" if weight else "alone"
            style = dict(linestyle="", color=COLOURS[colour], label=name)
            ax.plot([r for _, r, _ in points], [auc for *_, auc in points], marker, **style)
            for workers, rows, auc in points:
                ax.annotate(str(workers), (rows, auc), (5, 3), textcoords="offset points", size=8)
        ax.set_xscale("log")
        ax.set_xticks(ROWS, [str(r) for r in ROWS])
        ax.minorticks_off()
        ax.margins(y=0.15)
        ax.yaxis.set_major_formatter("{x:.3f}")
        ax.set(xlim=(80, 1300), xlabel="rows of a worker", ylabel="AUC, mean of the workers")
        ax.set_title("Score of each setting; the numbers are workers (measured)")
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
        return figure
