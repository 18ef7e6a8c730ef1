"""The figures and the panel of notebook 09, and the claims of its stored studies."""

import doctest
import importlib

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.classroom import collaborative as lesson
from helpers.classroom.exercises import nb09
from helpers.cluster import open_cluster
from helpers.engine.collectives import all_reduce
from helpers.learning.gossip import graph
from helpers.parallel.counted import count
from helpers.studies import _learning, load_study
from tests.made_again import made_again

ONES = ("parts", "setting", "shards", "graph", "method", "models", "epochs", "rate", "decay")


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
    many = lesson.draw_graph(graph("ring", 16))
    assert len(many.lines[0].get_xdata()) == 16 and not many.texts  # too small to read
    plt.close(many.figure)


def test_what_is_sent_needs_a_setting_that_is_there():
    study = load_study("gossip")
    numbers, times, kilobytes = lesson.sent(study, shards="hour", graph="ring")
    assert kilobytes == pytest.approx(2 * numbers * times * 4 / 1000)
    with pytest.raises(ValueError, match="the study has no row with .*star"):
        lesson.sent(study, graph="star")


# ---------------------------------------------------------------- the panel


def program(rank, rows, weight, part):
    if rows == 1000:
        raise ArithmeticError("no numbers today")
    return float(all_reduce(rank.data, np.ones(1))[0]) + weight / 10 + part


def test_the_panel_trains_on_the_ranks_of_its_slider_and_keeps_each_setting(monkeypatch):
    with open_cluster(2) as cluster:
        panel = lesson.TogetherPanel(cluster, program, range(8), {(8, 500, 0.0): 0.5})
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


# ---------------------------------------------------------------- an exercise


@pytest.mark.parametrize("form", [tuple, list, np.array])
def test_a_pair_may_be_any_sequence_of_two(form):
    def right(a, b):
        a, b = np.array(a), np.array(b)
        return form([np.std(a - b, ddof=1), np.sqrt(np.var(a, ddof=1) + np.var(b, ddof=1))])

    assert nb09.spreads(right) is None
    assert "return a pair" in nb09.spreads(lambda a, b: [[1.0, 2.0], [3.0]])


# ---------------------------------------------------------------- what the studies say is sent


class Table:
    """Stands for a table of flights: rows are their numbers."""

    airline = np.array(_learning.AIRLINES * 20)

    def __len__(self):
        return len(self.airline)

    def select(self, rows):
        return rows


def test_the_shared_rows_of_a_study_belong_to_none_of_its_workers():
    flights = object.__new__(_learning.Flights)
    flights.train = Table()
    parts, public = flights.parts_and_rest("airline", 10, 50, seed=3)
    assert [set(Table.airline[part]) for part in parts] == [{a} for a in _learning.AIRLINES]
    every = np.concatenate([*parts, public])
    assert len(set(every.tolist())) == len(every) == 8 * 10 + 50


SMALL = {
    # Each study as small as it may be, with what stays as it is: who sends what, and to whom.
    "mutual": dict(EPOCHS=1, ROWS=200),
    "distillation": dict(ROWS=60, PUBLIC=50, ROUNDS=8, WARM_UP=3, DECAYS=(0.1,), FEW_DECAYS=(0.1,)),
    "few_labels": {},
    "multi_task": dict(ROWS={"airlines": 100, "limits": 100}, EPOCHS=8, DECAYS=(0.1,)),
    "vertical": dict(ROWS=300, EPOCHS=1, DECAYS=(0.0,)),
    "gossip": dict(ROWS=400, STEPS=3, DECAYS=(0.0,)),
    "ensembles": dict(ROWS=300, STUMPS=(1, 3), TREES=(1, 16)),
}


@pytest.mark.parametrize("name", SMALL)
def test_kilobytes_of_a_study_are_those_that_its_ranks_send(name, monkeypatch):
    study, sent = importlib.import_module(f"helpers.studies.{name}"), []

    def counted(program, *args, **options):
        def on_a_rank(rank, *given):
            group = count(rank)["world"]
            return program(rank, *given), group.sent

        results = _learning.on_ranks(on_a_rank, *args, **options)
        sent.append(np.mean([bytes_sent for _, bytes_sent in results]) / 1000)
        return [result for result, _ in results]

    monkeypatch.setattr(study, "on_ranks", counted)
    for constant, value in SMALL[name].items():
        monkeypatch.setattr(study, constant, value)
    if name == "mutual":
        monkeypatch.setattr(study, "TRIED", study.TRIED[::7] + study.TRIED[-8:])
    table = study.run(seeds=(0,))
    if name == "ensembles":  # bagging and stacking send no arrays between ranks
        table = [row for row in table if row["method"] == f"{max(study.STUMPS)} stumps"]
    if name == "vertical":  # to ask the network about the held-out days sends activations, too
        sent = [kilobytes - _learning.TEST_ROWS * 64 * 4 / 2 / 1000 for kilobytes in sent]
    said = {round(row["kilobytes"], 6) for row in table} - {0}
    assert said and said == {float(round(kilobytes, 6)) for kilobytes in sent} - {0}


# ---------------------------------------------------------------- what the studies claim


def scores(table):
    """AUC by setting (rows) and seed (columns)."""
    return lesson.by_seed(table, *(c for c in ONES if c in table))


def gain(together, alone):
    """The mean of the paired differences, and in how many seeds they are above 0."""
    difference = together - alone
    assert len(difference) == 5
    return difference.mean(), int((difference > 0).sum())


def inside(rows, *levels):
    """The best row, which must not be at the edge of what was tried, in any of these columns."""
    found = lesson.best(rows)
    names = rows.index.names
    for level in levels:
        tried = sorted(rows.index.unique(level))
        at = found.name[names.index(level)] if len(names) > 1 else found.name
        assert tried[0] < at < tried[-1], f"the best {level}, {at}, is at the edge of {tried}"
    return found


def ensembles(table):
    found = scores(table)
    tuned = lesson.best(found[found.index.str.startswith("tree")])
    for method, least in (("16 trees", 0.02), ("100 stumps", 0.03)):
        mean, seeds = gain(found.loc[method], tuned)
        assert mean > least and seeds == 5
    assert abs(gain(found.loc["16 trees"], found.loc["logistic"])[0]) < 0.006  # no gain
    bagged = lesson.best(found[found.index.str.fullmatch(r"\d+ trees")])
    assert bagged.name == "32 trees"  # the edge of what was tried
    mean, seeds = gain(bagged, found.loc["logistic"])
    assert 0.003 < mean < 0.01 and seeds == 5
    assert gain(bagged, found.loc["neighbours"])[1] < 5  # no gain over this one
    members = lesson.best(found.loc[["logistic", "neighbours", "16 trees"]])
    mean, seeds = gain(found.loc["100 stumps"], members)
    assert mean > 0.003 and seeds == 5
    mean, seeds = gain(found.loc["stacked"], members)
    assert mean > 0.002 and seeds == 5
    assert abs(gain(found.loc["stacked"], found.loc["mean of three"])[0]) < 0.005  # no gain


def mutual(table):
    found = scores(table)
    alone, together = found.loc["alone", 1], found.loc["together"]
    mean, seeds = gain(together.loc[4, 20, 0.2, 0.0], alone.loc[20, 0.2, 0.0])
    assert mean > 0.005 and seeds == 5
    half = alone.loc[20, 0.1, 0.0]
    two = together.loc[2, 20, 0.2, 0.0]
    assert gain(two, half)[0] < gain(two, alone.loc[20, 0.2, 0.0])[0] / 2
    best = inside(alone.loc[20], "rate", "decay")
    assert abs(gain(inside(together.loc[2, 20], "rate", "decay"), best)[0]) < 0.003  # no gain
    longer = lesson.best(alone.loc[40])
    assert gain(longer, best)[0] > 0  # more training does as well, and better
    assert gain(lesson.best(together), longer)[1] < 5
    mean = lesson.best(found.loc["mean", 2])
    assert gain(mean, lesson.best(together.loc[2, 20]))[0] > 0
    assert gain(mean, best)[1] == 5 and gain(mean, longer)[1] < 5
    assert gain(lesson.best(together.loc[4, 20]), best)[1] < 5  # nor do four gain


def distillation(table):
    for parts, least in (("airline", 0.01), ("hour", 0.03)):
        found = scores(table[table.parts == parts]).loc[parts]
        together, alone = lesson.best(found.loc["together"]), found.loc["alone"]
        for control in (inside(alone.loc[40], "decay"), lesson.best(found.loc["self"])):
            mean, seeds = gain(together, control)
            assert mean > least and seeds == 5
        mean, seeds = gain(together, lesson.best(alone.loc[80]))
        assert mean > least and seeds == 5
        assert gain(lesson.best(found.loc["one model"]), together)[0] > 0.01  # shared rows
    for score, parts in (("auc", "airline"), ("auc", "hour"), ("own_auc", "airline")):
        found = lesson.by_seed(table, "parts", "method", "epochs", "decay", score=score).loc[parts]
        together, alone = lesson.best(found.loc["together"]), lesson.best(found.loc["alone"])
        mean, seeds = gain(together, alone)
        assert mean > 0.004 and seeds == 5
        mean, seeds = gain(lesson.best(found.loc["weights"]), together)
        assert mean > 0.005 and seeds == 5  # the rival is better
        assert gain(lesson.best(found.loc["self"]), alone)[0] < 0  # and soft labels alone worse


def few_labels(table):
    found = scores(table)
    wanted, control = "co-training, both views", "both views"
    mean, seeds = gain(found.loc["columns", wanted], found.loc["columns", control])
    assert mean < -0.01 and seeds == 0  # it harms
    mean, seeds = gain(found.loc["pairs", wanted], found.loc["pairs", control])
    assert mean > 0.06 and seeds == 5
    for setting in ("columns", "pairs"):  # no gain that one may claim
        pseudo = found.loc[setting, "pseudo-labels, all columns"]
        assert gain(pseudo, found.loc[setting, "all columns"])[1] < 5


def multi_task(table):
    found = scores(table)
    shared = inside(found.loc["airlines", "shared"], "decay")
    mean, seeds = gain(shared, inside(found.loc["airlines", "alone"], "decay"))
    assert mean > 0.005 and seeds == 5
    mean, seeds = gain(shared, inside(found.loc["airlines", "one model"], "decay"))
    assert mean < -0.002 and seeds == 0  # one is better
    limits = found.loc["limits"]
    mean, _ = gain(lesson.best(limits.loc["shared"]), lesson.best(limits.loc["alone"]))
    assert 0 < mean < 0.008  # small


def vertical(table):
    found = scores(table)
    together = inside(found.loc["together"], "decay")
    for control, least in (("weather", 0.05), ("airline", 0.03)):
        mean, seeds = gain(together, inside(found.loc[control], "decay"))
        assert mean > least and seeds == 5
    for control in ("mean", "stacked"):  # not clear
        assert abs(gain(together, inside(found.loc[control], "decay"))[0]) < 0.01


def gossip(table):
    found = scores(table)
    for shards, least in (("random", 0.01), ("hour", 0.03)):
        rows = found.loc[shards]
        ring, exact = (rows.loc[kind, 0.0] for kind in ("ring", "all-reduce"))
        mean, seeds = gain(ring, inside(rows.loc["none"], "decay"))
        assert mean > least and seeds == 5
        mean, seeds = gain(ring, exact)
        assert -0.01 < mean < 0 and seeds == 0  # a small price
        complete, random = (rows.loc[kind, 0.0] for kind in ("complete", "random"))
        assert 0.3 * mean > gain(complete, exact)[0] > 0.7 * mean  # half of it without a neighbour
        assert -0.0005 < gain(random, complete)[0] < 0
    sent = {kind: lesson.sent(table, graph=kind)[2] for kind in ("ring", "all-reduce", "complete")}
    assert sent["all-reduce"] < sent["ring"] < sent["complete"]


CLAIMS = (ensembles, mutual, distillation, few_labels, multi_task, vertical, gossip)


@pytest.mark.parametrize("claims", CLAIMS, ids=lambda claims: claims.__name__)
def test_the_stored_study_shows_what_the_notebook_claims(claims):
    claims(load_study(claims.__name__))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("claims", CLAIMS, ids=lambda claims: claims.__name__)
def test_the_study_shows_it_again(claims):
    claims(made_again(claims.__name__))
