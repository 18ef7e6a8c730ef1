"""Timelines: what each worker did and when, as a figure and as a live picture in the notebook.

The live picture travels over the notebook's own connection. It needs no further port, so it also
works where proxies hide Dask's dashboard.
"""

from __future__ import annotations

import html
import threading
import time
import weakref

import matplotlib.pyplot as plt

from helpers.classroom.plots import COLOURS, HATCHES
from helpers.engine.events import Event, events_from_tasks

WINDOW_SECONDS = 10.0
REFRESH_SECONDS = 0.3
PALE = "#d9d9d9"
LEFT, WIDTH, ROW = 70, 560, 24  # pixels of the live picture: names, time, one row


def _styles(events) -> dict[str, tuple[str, str]]:
    """A colour and a hatch for each operation, in order of first appearance; waiting is pale."""
    names = list(dict.fromkeys(e.operation for e in events if e.operation != "wait"))
    palette = [c for name, c in COLOURS.items() if name not in ("black", "yellow")]
    styles = {
        name: (palette[i % len(palette)], HATCHES[(i // len(palette) + i) % len(HATCHES)])
        for i, name in enumerate(names)
    }
    if any(e.operation == "wait" for e in events):
        styles["wait"] = PALE, ""
    return styles


def draw_schedule(
    events, ranks: int | None = None, ax=None, name: str = "worker", styles=None, words=None
):
    """Draw what each rank did: one row a rank, time to the right.

    What goes on in a rank's background (lane 1) stands as a thin bar below what its program does.

    Parameters
    ----------
    events : list of Event
        Measured or simulated.
    ranks : int, optional
        Number of rows; default: as many as there are ranks among the events.
    ax : matplotlib.axes.Axes, optional
    name : str
        What a row is called; its number follows.
    styles : dict of str to (str, str), optional
        Colour and hatch of each operation that is drawn, in the order of the legend. Default: all
        operations, each with a colour of its own.
    words : callable, optional
        ``words(event)`` is written into its bar.

    Returns
    -------
    matplotlib.axes.Axes
        Its title is free: say there whether the events are measured or simulated.

    Examples
    --------
    >>> ax = draw_schedule([Event(0, "fit", 0.0, 1.0), Event(1, "fit", 0.2, 1.1)])
    >>> ax.get_xlabel()
    'time (s)'
    """
    ranks = ranks or max((event.rank for event in events), default=0) + 1
    ax = ax or plt.figure(figsize=(7, 0.8 + 0.45 * ranks)).subplots()
    rows = _rows_of_lanes(events)
    for operation, (colour, hatch) in (styles or _styles(events)).items():
        label = operation
        for event in (e for e in events if e.operation == operation):
            shift, height = rows[event.lane]
            ax.barh(
                event.rank + shift,
                event.length,
                left=event.start,
                height=height,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=label,
            )
            label = None
            if words:
                middle = event.start + event.length / 2, event.rank + shift
                ax.annotate(words(event), middle, ha="center", va="center", size=7, clip_on=True)
    ax.set(xlabel="time (s)", yticks=range(ranks), ylim=(ranks - 0.5, -0.5))
    ax.set_yticklabels([f"{name} {rank}" for rank in range(ranks)])
    if events:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, borderaxespad=0)
    return ax


def _rows_of_lanes(events) -> dict[int, tuple[float, float]]:
    """Where a bar's middle lies below its rank's, and how high it is, for each lane."""
    if any(event.lane for event in events):
        return {0: (-0.13, 0.5), 1: (0.27, 0.24)}
    return {0: (0.0, 0.7)}


def timeline_svg(events, ranks: int, busy=(), end: float | None = None) -> str:
    """The same picture as `draw_schedule`, as SVG text that is cheap enough to renew often.

    Parameters
    ----------
    events : list of Event
    ranks : int
        Number of rows.
    busy : iterable of int
        Ranks that are at work at time `end`: the open end of their row is drawn hatched.
    end : float, optional
        Right edge (s); default: the end of the last event. The picture shows the
        `WINDOW_SECONDS` before it.
    """
    stops = dict.fromkeys(range(ranks), 0.0)
    for event in events:
        stops[event.rank] = max(stops.get(event.rank, 0.0), event.stop)
    end = max(stops.values(), default=0.0) if end is None else end
    begin = max(0.0, end - WINDOW_SECONDS)
    colours = {name: style[0] for name, style in _styles(events).items()}
    bars = [
        (e.rank, e.start, e.stop, colours[e.operation], f"{e.operation}: {e.length:.2f} s")
        for e in events
        if e.rank < ranks
    ]
    bars += [(rank, stops[rank], end, "url(#busy)", "running now") for rank in busy]
    parts = [_svg_row(rank) for rank in range(ranks)]
    parts += [_svg_bar(*bar, begin, end) for bar in bars]
    right, height = LEFT + WIDTH, ranks * ROW + 22
    words = ", ".join(f"worker {rank} {'works' if rank in busy else 'waits'}" for rank in stops)
    return (
        f'<svg viewBox="0 0 {right + 10} {height}" width="100%" '
        f'style="max-width:{right + 10}px" role="img" aria-label="{words}">'
        '<defs><pattern id="busy" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="3" height="6" fill="#E69F00"/></pattern></defs>'
        f"{''.join(parts)}"
        f'<text x="{LEFT}" y="{height - 6}" font-size="11" fill="currentColor">{begin:.0f} s</text>'
        f'<text x="{right}" y="{height - 6}" font-size="11" text-anchor="end" '
        f'fill="currentColor">{begin + WINDOW_SECONDS:.0f} s</text></svg>'
    )


def _svg_row(rank: int) -> str:
    """The name of a row and the line below it."""
    y = (rank + 1) * ROW
    return (
        f'<text x="0" y="{y - 8}" font-size="12" fill="currentColor">worker {rank}</text>'
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="#ccc"/>'
    )


def _svg_bar(rank, start, stop, fill, title, begin, end) -> str:
    """One bar, cut at the edges of the window from `begin` to `end`; nothing outside of it."""
    start, stop = max(start, begin), min(stop, end)
    if stop <= start:
        return ""
    scale = WIDTH / WINDOW_SECONDS
    return (
        f'<rect x="{LEFT + (start - begin) * scale:.1f}" y="{rank * ROW + 3}" '
        f'width="{max((stop - start) * scale, 1):.1f}" height="{ROW - 6}" fill="{fill}" '
        f'stroke="white"><title>{html.escape(title)}</title></rect>'
    )


class Recorder:
    """Records the tasks that the workers of a cluster run.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster

    Attributes
    ----------
    events : list of Event
        Set at the end of the ``with`` block; time 0 is the start of the first event.

    Examples
    --------
    >>> with Recorder(cluster) as recorder:  # doctest: +SKIP
    ...     cluster.client.map(fit, months)
    >>> recorder.draw()  # doctest: +SKIP
    """

    def __init__(self, cluster):
        self.cluster = cluster
        self.events: list[Event] = []

    def __enter__(self):
        self.cluster.client.get_task_stream()  # the scheduler records from the first call on
        self.begin = time.time()
        return self

    def __exit__(self, *exc_info):
        self.events = self.read(origin=None)

    def draw(self, operation: str | None = None):
        """Draw the events, or those of one operation, with `draw_schedule`: measured events."""
        wanted = [e for e in self.events if operation in (None, e.operation)]
        return draw_schedule(wanted, ranks=self.cluster.n_workers)

    def read(self, origin: float | None) -> list[Event]:
        """Events so far; times in seconds since clock time `origin`, or since the first event."""
        records = self.cluster.client.get_task_stream(start=self.begin)
        return events_from_tasks(records, self.cluster.workers, origin)


class LivePicture:
    """A widget that shows what each worker is doing, renewed while cells run.

    A thread of its own asks the scheduler and writes the picture; it ends with `stop`, with the
    cluster, or with the kernel.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster

    Attributes
    ----------
    widget : ipywidgets.HTML
        Display it where the picture should stand.
    """

    def __init__(self, cluster):
        import ipywidgets

        self.widget = ipywidgets.HTML()
        # The picture must not keep a cluster alive that nobody uses any more.
        self._recorder = Recorder(weakref.proxy(cluster)).__enter__()
        self._ended = threading.Event()
        self.refresh()
        self._thread = threading.Thread(target=self._renew, name="live picture", daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Draw the picture of this moment."""
        cluster = self._recorder.cluster
        workers = cluster.workers
        tasks = cluster.client.processing(workers)
        busy = [rank for rank, address in enumerate(workers) if tasks.get(address)]
        begin = self._recorder.begin
        events, now = self._recorder.read(origin=begin), time.time() - begin
        self.widget.value = timeline_svg(events, len(workers), busy, now)

    def stop(self) -> None:
        """End the thread; the last picture stays."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _renew(self):
        while not self._ended.wait(REFRESH_SECONDS):
            try:
                self.refresh()
            except ReferenceError:  # the cluster is gone
                return
            except Exception:  # it was closed, or its workers change in this moment
                if self._recorder.cluster.closed:
                    return
