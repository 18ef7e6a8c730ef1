"""Figures of the course, drawn only from the data passed in.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; no figure uses
colour alone. What was measured is drawn solid, what was predicted dashed.
"""

from __future__ import annotations

import base64
import io

import matplotlib.pyplot as plt
from IPython.display import display

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
        Cores of the machine: beyond them a grey ground says that nothing was measured there.
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
        ax.text((cores + most) / 2, 0.25, "more than this machine has", ha="center", fontsize=8)
    ax.set(xlabel="workers", ylabel="speed-up (times)", ylim=(0, most + 0.5))
    ax.set_xlim(0.7, most + 0.3)
    ax.set_xticks(range(1, most + 1))
    ax.legend(loc="upper left", fontsize=8)
    return ax
