"""The figures and the panel of notebook 09, and the claims of its stored studies."""

import doctest
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.classroom import collaborative as lesson
from helpers.cluster import open_cluster
from helpers.engine.collectives import all_reduce
from helpers.learning.gossip import graph
from helpers.studies import load_study, run_study

ONES = ("models", "rate", "decay", "parts", "setting", "method", "shards", "graph")


def test_examples_in_the_docstrings():
    found = doctest.testmod(lesson)
    assert found.attempted and not found.failed


# ---------------------------------------------------------------- figures


def test_every_seed_is_a_mark_and_the_bar_stands_at_their_mean():
    ax = lesson.plot_seeds({"alone": [0.6, 0.7], "control": [0.5, 0.9, 0.7]}, controls=["control"])
    marks, bars = ax.lines[::2][:2], ax.lines[1::2][:2]
    assert [line.get_xdata().tolist() for line in marks] == [[0.6, 0.7], [0.5, 0.9, 0.7]]
    assert [bar.get_xdata()[0] for bar in bars] == pytest.approx([0.65, 0.7])
    assert [line.get_marker() for line in marks] == ["o", "s"]  # not by colour alone
    low, high = ax.get_ylim()
    assert low > high  # the first method stands on top
    plt.close(ax.figure)


def test_a_graph_is_drawn_with_all_its_edges_and_ranks():
    edges = graph("random", 7, seed=1)
    ax = lesson.draw_graph(edges)
    assert len(ax.collections[0].get_segments()) == edges.sum() // 2
    assert [text.get_text() for text in ax.texts] == list("0123456")
    (circles,) = ax.lines
    places = np.column_stack(circles.get_data())
    assert np.allclose(np.linalg.norm(places, axis=1), 1)
    plt.close(ax.figure)


# ---------------------------------------------------------------- the panel


def program(rank, rows, weight):
    if rows == 1000:
        raise ArithmeticError("no numbers today")
    return float(all_reduce(rank.data, np.ones(1))[0]) + weight / 10 + rank.index


def test_the_panel_trains_on_the_ranks_of_its_slider_and_keeps_each_setting(monkeypatch):
    with open_cluster(2) as cluster:
        panel = lesson.TogetherPanel(cluster, program, {(8, 500, 0.0): 0.5})
        assert panel.tried == {(8, 500, 0.0): 0.5, (4, 250, 1.0): pytest.approx(5.6)}
        before = panel.figure.value
        panel.workers.value = 2
        assert panel.tried[2, 250, 1.0] == pytest.approx(2.6) and panel.figure.value != before
        assert "2 workers of 250 rows, weight 1: AUC 2.600" in panel.status.value
        panel.rows.value = 1000
        assert "no numbers today" in panel.status.value and not panel.rows.disabled

        figure = panel.draw()
        (ax,) = figure.axes
        drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
        assert list(drawn) == ["alone", "listen 0.5", "listen 1", "listen 2"]
        assert drawn["alone"] == [0.5] and drawn["listen 1"] == pytest.approx([5.6, 2.6])
        assert [text.get_text() for text in ax.texts] == ["8", "4", "2"]
        plt.close(figure)

        seen = []
        monkeypatch.setattr("helpers.classroom.panels.display", lambda data, **_: seen.append(data))
        panel.display("Figure 8. It.")
        assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(seen[0])
    panel.rows.value = 100
    assert "These workers were stopped" in panel.status.value


# ---------------------------------------------------------------- what the studies claim


def scores(table):
    """AUC by method (rows) and seed (columns)."""
    return table.set_index([*(c for c in table if c in ONES), "seed"]).auc.unstack("seed")


def gain(together, alone):
    """The mean of the paired differences, and in how many seeds they are above 0."""
    difference = together - alone
    assert len(difference) == 5
    return difference.mean(), int((difference > 0).sum())


def best(rows):
    """The setting with the best mean."""
    return rows.loc[rows.mean(axis=1).idxmax()]


def ensembles(table):
    found = scores(table)
    tuned = best(found[found.index.str.startswith("tree")])
    for method, least in (("16 trees", 0.02), ("100 stumps", 0.03)):
        mean, seeds = gain(found.loc[method], tuned)
        assert mean > least and seeds == 5
    members = best(found.loc[["logistic", "neighbours", "16 trees"]])
    mean, _ = gain(found.loc["stacked"], members)
    assert mean > 0.002
    assert abs(gain(found.loc["stacked"], found.loc["mean of three"])[0]) < 0.005  # no gain


def mutual(table):
    found = scores(table)
    mean, seeds = gain(found.loc[2, 0.2, 0.0], found.loc[1, 0.2, 0.0])
    assert mean > 0.005 and seeds >= 4
    half = found.loc[1, 0.1, 0.0]
    assert gain(found.loc[2, 0.2, 0.0], half)[0] < mean / 2
    assert abs(gain(best(found.loc[2]), best(found.loc[1]))[0]) < 0.003  # no gain


def distillation(table):
    for parts, least in (("airline", 0.01), ("hour", 0.03)):
        found = scores(table[table.parts == parts]).loc[parts]
        together = found.loc["together", 0.003]
        for control in (best(found.loc["alone"]), found.loc["self", 0.003]):
            mean, seeds = gain(together, control)
            assert mean > least and seeds == 5
        assert abs(gain(found.loc["self", 0.003], best(found.loc["alone"]))[0]) < 0.015
        assert gain(best(found.loc["one model"]), together)[0] > 0.01  # shared rows are better
    own = table.groupby(["parts", "method", "decay"]).own_auc.mean()["airline"]
    assert own["together", 0.003] > own["alone"].max() + 0.004


def few_labels(table):
    found = scores(table)
    wanted, control = "co-training, both views", "both views"
    mean, seeds = gain(found.loc["columns", wanted], found.loc["columns", control])
    assert mean < -0.01 and seeds == 0  # it harms
    mean, seeds = gain(found.loc["pairs", wanted], found.loc["pairs", control])
    assert mean > 0.06 and seeds == 5
    pseudo = found.loc["columns", "pseudo-labels, all columns"]
    assert abs(gain(pseudo, found.loc["columns", "all columns"])[0]) < 0.01  # no gain


def multi_task(table):
    found = scores(table)
    shared = best(found.loc["airlines", "shared"])
    mean, seeds = gain(shared, best(found.loc["airlines", "alone"]))
    assert mean > 0.005 and seeds == 5
    assert gain(shared, best(found.loc["airlines", "one model"]))[0] < -0.002  # one is better
    limits = found.loc["limits"]
    assert 0 < gain(best(limits.loc["shared"]), best(limits.loc["alone"]))[0] < 0.008  # small


def vertical(table):
    found = scores(table)
    for control, least in (("weather", 0.05), ("airline", 0.03)):
        mean, seeds = gain(found.loc["together"], found.loc[control])
        assert mean > least and seeds == 5
    assert 0 < gain(found.loc["together"], found.loc["mean"])[0] < 0.02


def gossip(table):
    found = scores(table)
    for shards, least in (("random", 0.01), ("hour", 0.03)):
        rows = found.loc[shards]
        mean, seeds = gain(rows.loc["ring"], rows.loc["none"])
        assert mean > least and seeds == 5
        assert gain(rows.loc["complete"], rows.loc["ring"])[0] < 0.01


CLAIMS = (ensembles, mutual, distillation, few_labels, multi_task, vertical, gossip)
run_again = cache(run_study)


@pytest.mark.parametrize("claims", CLAIMS, ids=lambda claims: claims.__name__)
def test_the_stored_study_shows_what_the_notebook_claims(claims):
    claims(load_study(claims.__name__))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("claims", CLAIMS, ids=lambda claims: claims.__name__)
def test_the_study_shows_it_again(claims):
    claims(run_again(claims.__name__))
