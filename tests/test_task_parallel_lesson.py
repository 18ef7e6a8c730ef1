"""Figures and the panel of notebook 07 draw what they are given."""

import doctest
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.classroom import task_parallel as lesson
from helpers.classroom.exercises import nb07
from helpers.cluster import open_cluster
from helpers.parallel.search import Job, run_serially, successive_halving
from helpers.planner.tasks import POLICIES, makespan, simulate, simulate_search


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


def test_a_search_is_drawn_with_a_colour_for_each_budget():
    def trial(job):
        return job.config, job.budget * (5 if job.trial == 0 else 1)

    losses = [0.5, 0.3, 0.4, 0.7]
    found = simulate_search(successive_halving(losses, 1, 4, 2), trial, workers=2)
    figure = lesson.draw_searches({"halving": found}, until=7)
    [ax] = figure.axes
    assert ax.get_xlim() == (0, 7)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        f"{budget} rows" for budget in (1, 2, 4)
    ]
    assert sorted(bar.get_width() for bar in ax.patches) == [1, 1, 1, 2, 2, 4, 5]
    colour_of = {}
    for bar in ax.patches:
        colour_of.setdefault(bar.get_facecolor(), set()).add(bar.get_width())
    assert sorted(map(sorted, colour_of.values())) == [[1, 5], [2], [4]]


def test_the_best_so_far_goes_in_steps():
    by = {"time": {"a": {1: 0.5, 2: 0.4}, "b": {2: 0.6}}, "work": {"a": {1: 0.5}, "b": {3: 0.6}}}
    figure = lesson.plot_best(by)
    assert [ax.get_xlabel() for ax in figure.axes] == list(by)
    for ax, lines in zip(figure.axes, by.values()):
        for line, (name, points) in zip(ax.lines, lines.items()):
            assert line.get_label() == name and line.get_drawstyle() == "steps-post"
            assert dict(zip(line.get_xdata(), line.get_ydata())) == points


def test_the_live_picture_has_words_beside_it(monkeypatch):
    shown = []
    monkeypatch.setattr(lesson, "display", lambda views, raw: shown.append(views))
    with open_cluster(workers=1) as cluster:
        live = lesson.watch(cluster)
        live.stop()
    [views] = shown
    assert "application/vnd.jupyter.widget-view+json" in views
    assert views["text/plain"].startswith("A live picture")


def nap(seconds):
    time.sleep(seconds)


def test_the_panel_naps_on_real_workers_and_shows_both(monkeypatch):
    monkeypatch.setattr(lesson, "LENGTHS", {"equal": [0.01] * 4, "mixed": [0.02, 0.01]})
    monkeypatch.setattr(lesson, "BATCHES", (1, 3))
    calls = []
    with open_cluster(workers=2) as cluster:

        def measure(policy, lengths):
            calls.append((policy, len(lengths)))
            with lesson.Recorder(cluster) as recorder:
                cluster.client.gather(cluster.client.map(nap, lengths, pure=False))
            return 0.5, recorder.events

        panel = lesson.DealingPanel(cluster, measure, overhead=0.001)
        panel.policy.value = "dynamic"
        panel.lengths.value = "equal"
        assert calls == [("static", 2), ("dynamic", 2), ("dynamic", 4)]
        assert "dynamic, equal, batches of 1: measured 0.50 s" in panel.status.value
        assert "simulated 0.02 s" in panel.status.value
        titles = [ax.get_title() for ax in panel.draw().axes]
        assert [title.split(":")[0] for title in titles] == ["measured", "simulated"]
        assert len(panel.events) == len(panel.simulated) == 4
        panel.batch.value = 3  # two batches: of three naps and of one
        assert calls[-1] == ("dynamic", 2)
        assert "batches of 3" in panel.status.value and len(panel.simulated) == 2
        assert [event.length for event in panel.simulated] == pytest.approx([0.03, 0.01])
        panel.workers.value = 3
        assert cluster.n_workers == 3 and "fair share of a worker is 0.01 s" in panel.status.value
    panel.policy.value = "static"
    assert "These workers were stopped" in panel.status.value


def test_the_solution_of_07_2_says_what_is_best():
    """The text below it names these two numbers."""
    best = {overhead: nb07._best_batch(nb07._UNEQUAL, 2, overhead) for overhead in (2, 50)}
    assert best == {2: 7, 50: 12}


def test_the_examples():
    assert doctest.testmod(lesson).failed == 0
