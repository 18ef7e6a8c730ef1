"""Figures of the course, drawn only from the data passed in.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; no figure uses
colour alone. What was measured is drawn solid, what was predicted dashed.
"""

from __future__ import annotations

import base64
import io

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}
"""The eight colours of Okabe and Ito."""

MEASURED = dict(linestyle="-", marker="o", color=COLOURS["blue"], label="measured")
PREDICTED = dict(linestyle="--", marker="s", fillstyle="none", color=COLOURS["red"])
PREDICTED |= dict(label="predicted")

MODEL = dict(linestyle="", marker="o", color=COLOURS["blue"], label="a model")
LIMIT = dict(linestyle="-", marker="s", color=COLOURS["red"], label="one accelerator")

HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")


def png(figure) -> bytes:
    """The figure as PNG, at the size that fits a notebook's column."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=96, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def show(figure, caption: str, alt: str) -> None:
    """Display a figure with a caption, and with words for those who cannot see it.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        It is closed afterwards, so that it does not appear a second time.
    caption : str
        Starts with "Figure 1." and says whether values are measured or predicted.
    alt : str
        What the figure shows, in one or two sentences. Screen readers read it out, and it
        stands in place of the picture where pictures are not drawn.

    Raises
    ------
    ValueError
        Caption or text is missing.
    """
    if not caption.startswith("Figure") or len(alt) < 20:
        raise ValueError("A figure needs a caption 'Figure N. …' and a text of what it shows.")
    picture = {"image/png": base64.b64encode(png(figure)).decode(), "text/plain": alt}
    plt.close(figure)
    display(picture, raw=True, metadata={"image/png": {"alt": alt}})
    display({"text/markdown": f"*{caption}*", "text/plain": caption}, raw=True)


def plot_speedup(measured: dict, predicted: dict, cores: int | None = None, ax=None):
    """Draw how many times faster a job is with more workers.

    Parameters
    ----------
    measured : dict of int to float
        Seconds that the job took, by number of workers; must hold 1 worker.
    predicted : dict of int to float
        Seconds that were predicted, by number of workers; must hold 1 worker.
    cores : int, optional
        Cores that the workers can share: beyond them, on a grey area, workers take turns.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_speedup({1: 4.0, 2: 2.1}, {1: 4.0, 2: 2.0, 4: 1.0}, cores=2)
    >>> ax.get_ylabel()
    'speed-up (times)'
    """
    for name, seconds in (("measured", measured), ("predicted", predicted)):
        if 1 not in seconds:
            raise ValueError(f"{name} needs the seconds of one worker: speed-up compares with it.")
    ax = ax or plt.figure(figsize=(6, 3.6)).subplots()
    for seconds, style in ((predicted, PREDICTED), (measured, MEASURED)):
        workers = sorted(seconds)
        ax.plot(workers, [seconds[1] / seconds[n] for n in workers], **style)
    most = max([*measured, *predicted])
    ax.plot([1, most], [1, most], ":", color="grey", label="ideal: n workers, n times as fast")
    if cores and cores < most:
        ax.axvspan(cores + 0.08, most + 0.3, color="0.93", zorder=0)
        ax.text((cores + most) / 2, 0.25, "more workers than cores", ha="center", fontsize=8)
    ax.set(xlabel="workers", ylabel="speed-up (times)", ylim=(0, most + 0.5))
    ax.set_xlim(0.7, most + 0.3)
    ax.set_xticks(range(1, most + 1))
    ax.legend(loc="upper left", fontsize=8)
    return ax


def draw_predicted(ax, x: float, width: float, height: float, label: bool = False) -> None:
    """Draw a dashed line across a bar, at the height that was predicted for it.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    x, width : float
        The line's middle and its length.
    height : float
    label : bool
        True: the legend names it. Once in a figure is enough.
    """
    name, ends = "predicted" if label else None, [x - width / 2, x + width / 2]
    ax.plot(ends, [height] * 2, "--", color=COLOURS["black"], linewidth=2.2, label=name)


def plot_bars(measured: dict, predicted: dict, ax=None):
    """Draw a bar for each measured value, and a dashed line where it was predicted.

    Parameters
    ----------
    measured, predicted : dict of str to float
        Values by name. A name without a prediction gets no line.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_bars({"loop": 1.0, "threads": 1.9}, {"threads": 2})
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['loop', 'threads']
    """
    ax = ax or plt.figure(figsize=(5, 3.2)).subplots()
    colours = [COLOURS[name] for name in ("sky", "orange", "green", "purple", "yellow", "blue")]
    for x, value in enumerate(measured.values()):
        style = {"color": colours[x % len(colours)], "hatch": HATCHES[x % len(HATCHES)]}
        ax.bar(x, value, edgecolor="black", label="measured" if x == 0 else None, **style)
    for x, name in enumerate(measured):
        if name in predicted:
            draw_predicted(ax, x, 0.9, predicted[name])
    ax.set_xticks(range(len(measured)), list(measured))
    return ax


def plot_curve(measured: dict, predicted: dict, ax=None):
    """Draw measured values, solid, beside predicted curves, dashed, on a logarithmic axis.

    Parameters
    ----------
    measured : dict of float to float
        Values by their place on the horizontal axis.
    predicted : dict of str to dict of float to float
        One or two curves by name, at the same places. The area between two is shaded.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_curve({1: 0.4, 10: 1.2}, {"predicted": {1: 0.5, 3: 0.8, 10: 1.3}})
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['predicted', 'measured']
    """
    ax = ax or plt.figure(figsize=(6.5, 3.8)).subplots()
    for (name, curve), dashes in zip(predicted.items(), ("--", (0, (2, 2))), strict=False):
        style = PREDICTED | {"marker": "", "linestyle": dashes, "label": name}
        ax.semilogx(list(curve), list(curve.values()), **style)
    if len(predicted) == 2:
        low, high = predicted.values()
        ax.fill_between(list(low), list(low.values()), list(high.values()), color="0.93", zorder=0)
    ax.semilogx(list(measured), list(measured.values()), **MEASURED)
    ax.legend(loc="lower right")
    return ax


def plot_lines(lines: dict, ax=None, dashed=(), log: str = "xy", marks: bool = True):
    """Draw several lines by name; those that were predicted or fitted are dashed.

    Parameters
    ----------
    lines : dict of str to mapping of float to float
        ``{name: {x: y}}``; a pandas Series will do. At most seven.
    ax : matplotlib.axes.Axes, optional
    dashed : sequence of str
        Names of lines that were not measured.
    log : str
        Which axes are logarithmic: "x", "y", "xy" or "". With "x0" the horizontal axis is, and has
        a place for 0.
    marks : bool
        False: no mark at each value.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_lines({"seen": {1: 4.0, 2: 2.0}, "law": {1: 4.0, 2: 2.0}}, dashed=["law"])
    >>> [line.get_linestyle() for line in ax.lines]
    ['-', '--']
    """
    ax = ax or plt.figure(figsize=(6.5, 3.8)).subplots()
    colours = [COLOURS[c] for c in ("blue", "orange", "green", "purple", "red", "sky", "black")]
    for (name, line), colour, marker in zip(lines.items(), colours, "os^Dv<>"):
        style = dict(linestyle="--", fillstyle="none") if name in dashed else dict(linestyle="-")
        style |= dict(color=colour, marker=marker if marks else "", label=name)
        ax.plot(list(line.keys()), [line[x] for x in line.keys()], **style)  # noqa: SIM118
    if "0" in log:
        ax.set_xscale("symlog", linthresh=1)
    elif "x" in log:
        ax.set_xscale("log")
    if "y" in log:
        ax.set_yscale("log")
    for axis in [ax.xaxis] * ("x" in log) + [ax.yaxis] * ("y" in log):
        # Plain numbers in place of powers of ten; with less than two decades also 2 and 5 times.
        low, high = sorted(axis.get_view_interval())
        if "0" not in log and high < 100 * low:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize=8)
    return ax


def plot_growth(dates, values, names, ax=None, limit=False):
    """Draw how values grew over the years: one mark each, on a logarithmic axis.

    Parameters
    ----------
    dates, values, names : sequences of the same length
        The name stands left of its circle (the newest: right of it), or right below its square; an
        empty one is no name.
    ax : matplotlib.axes.Axes, optional
    limit : bool
        True for what one accelerator can do (squares on a line), False for models (circles).

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> from datetime import date
    >>> plot_growth([date(2020, 5, 1)], [1.75e11], ["GPT-3"]).get_yscale()
    'log'
    """
    ax = ax or plt.figure(figsize=(5.5, 4.4)).subplots()
    ax.semilogy(dates, values, **(LIMIT if limit else MODEL))
    left = dict(xytext=(-5, 0), ha="right", va="center", fontsize=8)
    right = left | dict(xytext=(5, 0), ha="left")
    below = dict(xytext=(0, -4), ha="left", va="top", fontsize=7)
    # White around the letters keeps them readable on a line.
    style = {"textcoords": "offset points", "color": ax.lines[-1].get_color()}
    style["path_effects"] = [withStroke(linewidth=2, foreground="white")]
    for name, date, value in zip(names, dates, values):
        where = below if limit else right if date == max(dates) else left
        ax.annotate(name, (date, value), **where, **style)
    ax.set_xlabel("year")
    ax.margins(y=0.1)
    return ax


def plot_rows(table: dict, limits: tuple[float, float], ax=None):
    """Draw values as points in rows; one left of the axis as a triangle, with its number.

    Parameters
    ----------
    table : dict of str to dict of str to float
        ``{row: {kind: value}}``, with the same kinds in every row.
    limits : tuple of float
        Left and right end of the axis.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_rows({"by month": {"mean": -9.8, "weighted": 0.5}}, limits=(0, 1))
    >>> [text.get_text() for text in ax.texts]
    ['−9.8']
    """
    ax = ax or plt.figure(figsize=(6, 0.6 * len(table) + 0.8)).subplots()
    kinds = list(next(iter(table.values())))
    styles = [("o", COLOURS["blue"]), ("s", COLOURS["orange"]), ("D", COLOURS["green"])]
    low, high = limits
    for y, values in enumerate(table.values()):
        for place, (kind, (marker, colour)) in enumerate(zip(kinds, styles)):
            value, height = values[kind], y + 0.22 * (place - (len(kinds) - 1) / 2)
            label, style = kind if y == 0 else None, {"color": colour, "markersize": 8}
            ax.plot([], [], marker, label=label, linestyle="", **style)
            if value >= low:
                ax.plot(value, height, marker, **style)
            else:
                ax.plot(low, height, "<", clip_on=False, **style)
                words = f"{value:.1f}".replace("-", "−")
                ax.text(low + (high - low) / 30, height, words, va="center", fontsize=8)
    for border in range(1, len(table)):
        ax.axhline(border - 0.5, color="0.85", linewidth=0.8, zorder=0)
    ax.set(xlim=limits, ylim=(len(table) - 0.4, -0.6))
    ax.set_yticks(range(len(table)), list(table))
    return ax
