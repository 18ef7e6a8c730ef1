"""Figures and the panel of notebook 07, Task parallelism."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from helpers.classroom.panels import SettingsPanel, choice, workers_slider
from helpers.classroom.plots import COLOURS, HATCHES, plot_curve, show
from helpers.classroom.timeline import LivePicture, Recorder, draw_schedule
from helpers.planner.tasks import makespan, simulate
from helpers.studies import load_study

__all__ = [
    "DealingPanel",
    "Recorder",
    "draw_policies",
    "draw_schedule",
    "draw_searches",
    "load_study",
    "plot_best",
    "plot_curve",
    "plot_rungs",
    "plot_searches",
    "show",
    "watch",
]

LENGTHS = {
    "equal": [0.1] * 12,
    "mixed": [0.05, 0.1, 0.05, 0.05, 0.1, 0.05, 0.15, 0.1, 0.3, 0.2, 0.3, 0.4],
    "one giant": [0.05] * 11 + [0.65],
    "many short": [0.004] * 300,
}
"""Seconds of the panel's naps: 1.2 s together, the mixed ones 1.85 s."""
BATCHES = (1, 4, 25, 100)
MARKS = "osD^vPX"


def draw_policies(events: dict) -> plt.Figure:
    """Timelines below each other, one for each way to deal tasks out.

    Parameters
    ----------
    events : dict of str to list of Event
        Each begins at 0 s.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> figure = draw_policies({p: simulate([1, 2], 2, p) for p in ("static", "dynamic")})
    >>> [ax.get_title() for ax in figure.axes]
    ['static: 2.00 s', 'dynamic: 2.00 s']
    """
    workers = 1 + max(event.rank for those in events.values() for event in those)
    height = len(events) * (0.7 + 0.28 * workers)
    figure = plt.figure(figsize=(7, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(events), sharex=True))
    for ax, (name, those) in zip(axes, events.items()):
        style = dict.fromkeys({event.operation for event in those}, (COLOURS["sky"], ""))
        draw_schedule(those, workers, ax, styles=style)
        ax.get_legend().remove()
        ax.set(title=f"{name.replace('_', ' ')}: {makespan(those):.2f} s", xlabel="", xlim=0)
        ax.title.set_size(10)
    axes[-1].set_xlabel("time (s)")
    return figure


def watch(cluster) -> LivePicture:
    """Show a live picture of what the workers of a cluster do, until its ``stop`` is called.

    Where no kernel runs, words stand in its place.
    """
    live = LivePicture(cluster)
    views = dict(live.widget._repr_mimebundle_())
    views["text/plain"] = (
        "A live picture: a row for each worker, a bar for each task. It moves while the next cell "
        "runs; the figure below that cell shows what it has shown at the end."
    )
    display(views, raw=True)
    return live


def draw_searches(found: dict, until: float) -> plt.Figure:
    """Timelines of searches on simulated workers, below each other; a colour for each budget.

    Parameters
    ----------
    found : dict of str to (list, list of Event)
        By name of the search what `helpers.planner.tasks.simulate_search` returns.
    until : float
        Right edge.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> from helpers.parallel.search import random_search
    >>> from helpers.planner.tasks import simulate_search
    >>> one = simulate_search(random_search("ab", 9), lambda job: (0.5, 2.0), workers=2)
    >>> [ax.get_title() for ax in draw_searches({"random": one}, until=2).axes]
    ['random']
    """
    budgets = sorted({job.budget for results, _ in found.values() for _, job, _ in results})
    colours = [COLOURS[c] for c in ("sky", "green", "orange", "red", "purple", "blue")]
    styles = {f"{b:,} rows": (colour, h) for b, colour, h in zip(budgets, colours, HATCHES)}
    workers = 1 + max(event.rank for _, events in found.values() for event in events)
    height = len(found) * (0.7 + 0.22 * workers)
    figure = plt.figure(figsize=(7.5, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(found), sharex=True))
    for ax, (name, (results, events)) in zip(axes, found.items()):
        budget_of = {(when, job.trial): job.budget for when, job, _ in results}
        named = [
            replace(event, operation=f"{budget_of[event.stop, event.microbatch]:,} rows")
            for event in events
        ]
        draw_schedule(named, workers, ax, styles=styles)
        ax.set(title=name, xlabel="", xlim=(0, until))
        ax.title.set_size(10)
    for ax in axes[1:]:
        ax.get_legend().remove()
    axes[-1].set_xlabel("simulated time (1 = a whole training)")
    return figure


def plot_best(by: dict) -> plt.Figure:
    """The best loss so far, in steps: a panel for each way to count what was spent.

    Parameters
    ----------
    by : dict of str to dict of str to mapping of float to float
        For each panel the label of its horizontal axis, and ``{search: {spent: loss}}``.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> figure = plot_best({"time": {"random": {1: 0.5, 2: 0.4}}, "work": {"random": {1: 0.5}}})
    >>> [ax.get_xlabel() for ax in figure.axes]
    ['time', 'work']
    """
    figure = plt.figure(figsize=(8, 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(by), sharey=True))
    for ax, (label, searches) in zip(axes, by.items()):
        looks = zip([COLOURS[c] for c in ("blue", "orange", "green", "purple")], "osD^")
        for (name, line), (colour, marker) in zip(searches.items(), looks):
            style = dict(where="post", marker=marker, markersize=4, color=colour, label=name)
            ax.step(list(line), list(line.values()), **style)
        ax.set_xlabel(label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle("Best whole training so far", fontsize=11)
    axes[0].set_ylabel("best loss so far")
    axes[0].legend(fontsize=8)
    return figure


def plot_rungs(results, ax=None):
    """Draw the loss of each trial of a search by budget: a line ends where its trial was stopped.

    Parameters
    ----------
    results : iterable of (Job, float)
        Of one search; a loss above the axis counts as its upper edge.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> from helpers.parallel.search import Job
    >>> ax = plot_rungs([(Job(0, {}, 1), 0.5), (Job(0, {}, 4), 0.4), (Job(1, {}, 1), 0.6)])
    >>> [line.get_xdata().tolist() for line in ax.lines]
    [[1, 4], [1]]
    """
    ax = ax or plt.figure(figsize=(6.5, 3.8)).subplots()
    losses = {}
    for job, loss in sorted(results, key=lambda pair: (pair[0].trial, pair[0].budget)):
        losses.setdefault(job.trial, {})[job.budget] = loss
    most = max(max(line) for line in losses.values())
    finite = [loss for line in losses.values() for loss in line.values() if np.isfinite(loss)]
    top = np.quantile(finite, 0.9) + 0.3 * (np.quantile(finite, 0.9) - min(finite)) or 1.0
    for trial, line in losses.items():
        goes_far = max(line) == most
        style = dict(color=COLOURS["blue"], linewidth=2.2, zorder=3) if goes_far else {}
        style = {"color": "0.6", "linewidth": 0.8, **style, "marker": "o", "markersize": 3}
        ax.plot(list(line), [min(loss, top) for loss in line.values()], **style)
        if goes_far:
            end = most, line[most]
            ax.annotate(f"trial {trial}", end, (6, 0), textcoords="offset points", size=8)
    ax.set_xscale("log")
    rungs = sorted({budget for line in losses.values() for budget in line})
    ax.set_xticks(rungs, [f"{rung:,}" for rung in rungs])
    ax.minorticks_off()
    ax.set(xlabel="budget (rows trained on)", ylabel="loss on the validation days")
    ax.margins(x=0.12)
    return ax


def plot_searches(found: dict, near: float, ax=None):
    """Draw what searches cost, against how much worse than the best trial their choice is.

    Parameters
    ----------
    found : dict of str to list of (float, float, …)
        By name of the search: its work as a share of the full search, and the difference of its
        loss to the best, for each seed; what comes after is not drawn.
    near : float
        Differences up to this one count as near; a line is drawn there.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_searches({"full": [(1.0, 0.0)], "halving": [(0.06, 0.002)]}, near=0.005)
    >>> ax.get_xlabel()
    'work (share of the full search)'
    """
    ax = ax or plt.figure(figsize=(8, 3.8), layout="constrained").subplots()
    colours = [COLOURS[c] for c in ("blue", "orange", "green", "purple", "red", "sky", "black")]
    for (name, points), colour, marker in zip(found.items(), colours, MARKS):
        work, apart = np.array(points).T[:2]
        style = dict(linestyle="", marker=marker, color=colour, alpha=0.75, label=name)
        ax.plot(work, apart, **style)
    ax.axhline(near, linestyle=":", color="grey")
    label = dict(transform=ax.get_yaxis_transform(), size=8, ha="right", va="bottom")
    ax.text(0.99, near, f"{near:g} worse", **label)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    low, high = ax.get_xlim()
    ax.set_xticks([x for x in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1) if low <= x <= high])
    ax.minorticks_off()
    ax.set(xlabel="work (share of the full search)", ylabel="loss above the best trial's")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return ax


class DealingPanel(SettingsPanel):
    """Controls for workers, the way of dealing, lengths of naps and batches; on real workers.

    Whenever a control has moved, the naps run, and the figure shows the run measured above the run
    simulated.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster
    measure : callable
        ``measure(policy, lengths)`` runs naps and returns seconds and events.
    overhead : float
        Seconds of each task beside its nap, for the simulation.
    """

    alt = (
        "A panel with controls for the number of workers, the way of dealing naps out, their "
        "lengths and how many make a batch. Below them two timelines of the workers: the naps as "
        "they were measured, and as they were simulated."
    )
    working = "The workers nap …"

    def __init__(self, cluster, measure, overhead):
        self.measure, self.overhead = measure, overhead
        # Naps need no core: more workers than cores are no trouble here.
        self.workers = workers_slider(cluster, most=8)
        self.policy = choice("Deal", ("static", "dynamic", "longest first"), "static")
        self.lengths = choice("Lengths", tuple(LENGTHS), "mixed")
        self.batch = choice("Batch", BATCHES, 1)
        super().__init__(cluster, (self.workers, self.policy, self.lengths, self.batch))

    def try_setting(self) -> str:
        """Nap, and note how long it took."""
        self.cluster.scale(self.workers.value)
        lengths, size = LENGTHS[self.lengths.value], self.batch.value
        # The naps of a batch follow each other: they are one long nap.
        batches = [sum(lengths[k : k + size]) for k in range(0, len(lengths), size)]
        setting = batches, self.workers.value, self.policy.value
        seconds, self.events = self.measure(self.policy.value, batches)
        simulated = simulate(*setting, overhead=self.overhead)
        self.simulated = [event for event in simulated if event.operation == "task"]
        best = sum(lengths) / self.workers.value
        return (
            f"{self.policy.value}, {self.lengths.value}, batches of {size}: measured "
            f"{seconds:.2f} s, simulated {makespan(self.simulated):.2f} s; the fair share of a "
            f"worker is {best:.2f} s."
        )

    def draw(self) -> plt.Figure:
        """The run, measured and simulated."""
        return draw_policies({"measured": self.events, "simulated": self.simulated})
