"""Pictures of structure: a graph of tasks, who talks to whom, and which worker holds which block.

Nothing here is measured. Each function draws only what it is given.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
from dask.utils import key_split
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from helpers.classroom.plots import COLOURS

WORKERS = (("sky", ""), ("orange", "//"), ("green", ".."), ("purple", "xx"))
"""Colour and hatch of each worker's blocks."""


def box(ax, x, y, text, colour="white", width=0.8, height=0.5):
    """A box with round corners and a text in it; ``(x, y)`` is its middle."""
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=colour,
            edgecolor="black",
        )
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(ax, start, end, style="-|>", colour="black"):
    """An arrow between two points; ``style`` is one of matplotlib's ``arrowstyle``."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle=style, color=colour, mutation_scale=12))


def _levels(dependencies) -> dict:
    """The column of each task: one more than the largest column among its inputs."""
    levels: dict = {}

    def level(key):
        if key not in levels:
            levels[key] = 1 + max((level(other) for other in dependencies[key]), default=-1)
        return levels[key]

    for key in dependencies:
        level(key)
    return levels


def _grid(dependencies):
    """Where each task stands, {key: (x, y)}, and the number of columns and of rows."""
    levels = _levels(dependencies)
    columns = [[k for k in levels if levels[k] == n] for n in range(max(levels.values()) + 1)]
    rows = max(len(column) for column in columns)
    place: dict = {}
    for number, column in enumerate(columns):
        # A task stands at the mean height of its inputs, so that lines do not cross.
        heights = {k: [place[other][1] for other in dependencies[k]] for k in column}
        order = {k: -sum(y) / len(y) if y else n for n, (k, y) in enumerate(heights.items())}
        top = (rows - len(column)) / 2
        for position, key in enumerate(sorted(column, key=order.get)):
            place[key] = (1.6 * number, -(top + position))
    return place, len(columns), rows


def draw_graph(dependencies, ax=None):
    """Draw a graph of tasks: each task right of the tasks whose results it needs.

    Parameters
    ----------
    dependencies : dict
        For each key the keys of its inputs, as ``lazy.dask.get_all_dependencies()`` of a Dask
        collection gives it.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = draw_graph({"read-1": (), "read-2": (), "add-3": ("read-1", "read-2")})
    >>> [text.get_text() for text in ax.texts]
    ['add', 'read', 'read']
    """
    place, columns, rows = _grid(dependencies)
    ax = ax or plt.figure(figsize=(2.2 * columns, 0.7 * rows + 0.3)).subplots()
    for key, inputs in dependencies.items():
        for other in inputs:
            (x0, y0), (x1, y1) = place[other], place[key]
            arrow(ax, (x0 + 0.45, y0), (x1 - 0.45, y1))
    for key in sorted(place, key=str):
        box(ax, *place[key], key_split(key))
    ax.set(xlim=(-0.6, 1.6 * columns - 1.0), ylim=(-rows + 0.4, 0.6))
    ax.axis("off")
    return ax


def draw_system(workers: int, ax=None):
    """Draw who talks to whom: the client, the scheduler and the workers.

    Parameters
    ----------
    workers : int
        How many workers there are.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = ax or plt.figure(figsize=(8.2, 0.9 * workers + 0.9)).subplots()
    middle = (workers - 1) / 2
    box(ax, 0, middle, "client\n(this notebook)", width=1.7, height=0.6)
    box(ax, 3.3, middle, "scheduler\n(which task where)", width=2.0, height=0.6)
    arrow(ax, (0.9, middle), (2.25, middle), "<|-|>")
    ax.text(1.57, middle + 0.1, "tasks,\nresults", ha="center", va="bottom", fontsize=8)
    for worker in range(workers):
        y = workers - 1 - worker
        box(ax, 6.3, y, f"worker {worker}\n(a process)", COLOURS["sky"], 1.6, 0.6)
        arrow(ax, (4.35, middle), (5.45, y), "<|-|>")
        if worker:
            arrow(ax, (6.3, y + 0.68), (6.3, y + 0.32), "<|-|>", COLOURS["red"])
            words = "data, directly\nfrom worker to worker"
            ax.text(6.5, y + 0.5, words, fontsize=8, va="center", color=COLOURS["red"])
    words = "next task,\nwhat is ready"
    ax.text(4.75, workers - 0.85, words, ha="center", va="bottom", fontsize=8)
    ax.set(xlim=(-1.0, 8.7), ylim=(-0.5, workers - 0.2))
    ax.axis("off")
    return ax


# What is cut in each placement: of X, of W, and of Y = X W.
_CUTS = {
    "rows": ("rows", None, "rows"),
    "inner": ("columns", "rows", "sum"),
    "columns": (None, "columns", "columns"),
}


def draw_placement(cut: str, ax=None):
    """Draw which of two workers holds which block of the product Y = X W.

    Parameters
    ----------
    cut : {"rows", "inner", "columns"}
        What is divided between the workers: the rows of X; the columns of X with the rows of W;
        or the columns of W.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        There is no such cut.
    """
    if cut not in _CUTS:
        raise ValueError(f"cut must be one of {', '.join(_CUTS)}, not {cut!r}.")
    ax = ax or plt.figure(figsize=(3.4, 3)).subplots()
    shapes = (("Y", 0, 1.0, 3.0), ("X", 2.1, 1.5, 3.0), ("W", 4.5, 1.0, 1.5))
    for (name, left, width, height), parts in zip(shapes, _places(cut), strict=True):
        _blocks(ax, left, width, height, parts)
        ax.text(left + width / 2, 0.25, name, ha="center", fontsize=11, weight="bold")
    ax.text(1.55, -1.5, "=", ha="center", va="center", fontsize=13)
    ax.text(4.05, -1.5, "·", ha="center", va="center", fontsize=16)
    ax.set(xlim=(-0.1, 5.6), ylim=(-3.15, 0.75))
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


def _places(cut):
    of_x, of_w, of_y = _CUTS[cut]
    return of_y, of_x, of_w


def _blocks(ax, left, width, height, cut):
    """One matrix: divided by rows or columns, whole on both workers, or a sum of two."""
    if cut in ("rows", "columns"):
        for worker in range(2):
            colour, hatch = WORKERS[worker]
            w, h = (width, height / 2) if cut == "rows" else (width / 2, height)
            x, y = (left, -worker * h) if cut == "rows" else (left + worker * w, 0)
            block(ax, x, y, w, h, COLOURS[colour], hatch, str(worker))
    else:
        block(ax, left, 0, width, height, "white", "", "0\n+\n1" if cut == "sum" else "0\nand\n1")


def block(ax, x, y, width, height, colour, hatch, text):
    """A rectangle with a text in its middle; ``(x, y)`` is its lower left corner."""
    ax.add_patch(
        Rectangle((x, y - height), width, height, facecolor=colour, hatch=hatch, edgecolor="black")
    )
    ax.text(
        x + width / 2,
        y - height / 2,
        text,
        ha="center",
        va="center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )


def draw_references(targets, ax=None):
    """Draw a list whose places refer to objects, several of them perhaps to the same one.

    Parameters
    ----------
    targets : list of int
        For each place of the list, the number of the object that it refers to.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = draw_references([0, 0])
    >>> [text.get_text() for text in ax.texts]
    ['results[0]', 'results[1]', 'model A']
    """
    ax = ax or plt.figure(figsize=(4, 0.5 * len(targets) + 0.3)).subplots()
    objects = sorted(set(targets))
    height = {number: -sum(p for p, t in enumerate(targets) if t == number) for number in objects}
    for place in range(len(targets)):
        box(ax, 0, -place, f"results[{place}]", width=1.5, height=0.6)
    for number in objects:
        y = height[number] / targets.count(number)
        box(ax, 3.4, y, f"model {chr(65 + number)}", COLOURS["sky"], 1.4, 0.6)
        for place, target in enumerate(targets):
            if target == number:
                arrow(ax, (0.82, -place), (2.62, y))
    ax.set(xlim=(-0.9, 4.3), ylim=(-len(targets) + 0.5, 0.5))
    ax.axis("off")
    return ax
