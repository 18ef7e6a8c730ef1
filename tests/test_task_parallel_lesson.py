"""Figures and the panel of notebook 07 draw what they are given."""

import doctest
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.classroom import task_parallel as lesson
from helpers.cluster import open_cluster
from helpers.parallel.search import Job, run_serially, successive_halving
from helpers.planner.tasks import POLICIES, makespan, simulate


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_each_policy_has_a_timeline_with_its_makespan():
    events = {policy: simulate([1, 2, 3, 4], 2, policy) for policy in POLICIES}
    figure = lesson.draw_policies(events)
    assert [ax.get_title() for ax in figure.axes] == [
        f"{policy}: {makespan(those):.2f} s" for policy, those in events.items()
    ]
    for ax, those in zip(figure.axes, events.values()):
        bars = sorted((bar.get_x(), bar.get_width()) for bar in ax.patches)
        assert bars == sorted((event.start, event.length) for event in those)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["worker 0", "worker 1"]


def test_a_trials_line_ends_where_it_was_stopped():
    losses = [0.5, 0.3, 0.4, 0.7]
    search = successive_halving(range(4), 1, 4, 2)
    ax = lesson.plot_rungs(run_serially(search, lambda trial, budget: losses[trial] / budget))
    ends = [line.get_xdata().tolist()[-1] for line in ax.lines]
    assert ends == [1, 4, 2, 1]
    widths = [line.get_linewidth() for line in ax.lines]
    assert widths.index(max(widths)) == 1
    assert [text.get_text() for text in ax.texts] == ["trial 1"]


def test_a_trial_that_diverged_stays_within_the_figure():
    results = [(Job(t, None, 1), loss) for t, loss in enumerate([0.5, 0.6, np.inf])]
    ax = lesson.plot_rungs(results)
    assert all(np.isfinite(line.get_ydata()).all() for line in ax.lines)


def test_searches_are_points_of_work_and_difference():
    found = {"a": [(0.1, 0.002), (0.1, 0.01)], "b": [(1.0, 0.0)]}
    ax = lesson.plot_searches(found, near=0.005)
    for line, (name, points) in zip(ax.lines, found.items()):
        assert line.get_label() == name
        assert list(zip(line.get_xdata(), line.get_ydata())) == points
    assert ax.lines[2].get_ydata()[0] == 0.005


def nap(seconds):
    time.sleep(seconds)


def test_the_panel_naps_on_real_workers_and_shows_both(monkeypatch):
    monkeypatch.setattr(lesson, "LENGTHS", {"equal": [0.01] * 4, "mixed": [0.02, 0.01]})
    calls = []
    with open_cluster(workers=2) as cluster:

        def measure(policy, lengths):
            calls.append((policy, len(lengths)))
            with lesson.Recorder(cluster) as recorder:
                cluster.client.gather(cluster.client.map(nap, lengths, pure=False))
            return 0.5, recorder.events

        panel = lesson.DealingPanel(cluster, measure)
        panel.policy.value = "dynamic"
        panel.lengths.value = "equal"
        assert calls == [("static", 2), ("dynamic", 2), ("dynamic", 4)]
        assert "dynamic, equal: measured 0.50 s, simulated 0.02 s" in panel.status.value
        titles = [ax.get_title() for ax in panel.draw().axes]
        assert [title.split(":")[0] for title in titles] == ["measured", "simulated"]
        assert len(panel.events) == 4
    panel.policy.value = "static"
    assert "These workers were stopped" in panel.status.value


def test_the_examples():
    assert doctest.testmod(lesson).failed == 0
