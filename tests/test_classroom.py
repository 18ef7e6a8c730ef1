"""Checks, figures, timelines, panels and the room check."""

import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.classroom import checks, preflight
from helpers.classroom.panels import WorkerPanel, display_panel
from helpers.classroom.plots import COLOURS, plot_speedup, png, show
from helpers.classroom.timeline import LivePicture, Recorder, draw_schedule, timeline_svg
from helpers.cluster import open_cluster
from helpers.engine.events import Event, events_from_tasks

REPOSITORY = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- answers


@pytest.fixture
def double():
    """A made-up exercise: double a number."""

    @checks.exercise("98.1", hint="Add it to itself.", shows="You can double.")
    def double(answer):
        return None if answer(3) == 6 else "3 must become 6."

    yield "98.1"
    del checks._EXERCISES["98.1"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "not answered yet."),
        (None, "not answered yet."),
        (lambda x: ..., "not answered yet."),
        (lambda x: 2 * x, "correct. You can double."),
        (lambda x: x, "not yet: 3 must become 6. Hint: Add it to itself."),
        (lambda: 6, "not yet: your answer stopped with TypeError"),
        (lambda x: None, "not yet: your function returns nothing"),
        ("six", "not yet: give the function itself, without calling it."),
    ],
)
def test_check_says_what_is_wrong(double, answer, says, capsys):
    checks.check(double, answer)
    assert capsys.readouterr().out.startswith(f"Exercise 98.1: {says}")


def test_an_unknown_exercise_is_named():
    with pytest.raises(KeyError, match="no exercise 00.77; there are 00.1"):
        checks.check("00.77", 1)


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        (0.1 + 0.2, 0.3, True),
        ([1, 2], np.array([1.0, 2.0]), True),
        ([[1, 2]], [1, 2], False),
        (float("nan"), 1.0, False),
        ("x", 1.0, False),
        (1.001, 1.0, False),
    ],
)
def test_close_to(answer, expected, same):
    assert checks.close_to(answer, expected) is same


def test_a_quiz_explains_each_wrong_letter():
    right, why = {"1": "a", "2": "b"}, {"1b": "one.", "2a": "two."}
    assert checks.check_letters({"1": "A ", "2": "b"}, right, why) is None
    both = checks.check_letters({"1": "b", "2": "a"}, right, why)
    assert both == "question 1: one. question 2: two."
    assert "no such choice" in checks.check_letters({"1": "z", "2": "b"}, right, why)
    assert "is not a letter" in checks.check_letters({"1": 3, "2": "b"}, right, why)
    assert "give a letter" in checks.check_letters({"1": "a"}, right, why)


# ---------------------------------------------------------------- events and timelines


EVENTS = [Event(0, "fit", 0.0, 1.0), Event(1, "fit", 0.5, 1.0), Event(1, "transfer", 1.5, 0.2)]


def test_events_of_tasks_are_ordered_and_counted_from_the_first():
    def record(worker, key, nbytes, *steps):
        steps = [dict(zip(("action", "start", "stop"), step, strict=True)) for step in steps]
        return {"worker": worker, "key": key, "nbytes": nbytes, "startstops": steps}

    records = [
        record("b", "add-1", 16, ("transfer", 10.0, 10.5), ("compute", 10.5, 12.0)),
        record("a", "add-2", 8, ("deserialize", 9.0, 9.4), ("compute", 9.5, 9.75)),
        record("elsewhere", "add-3", 8, ("compute", 1.0, 2.0)),
    ]
    events = events_from_tasks(records, ["a", "b"])
    assert events == [
        Event(0, "add", 0.0, 0.25, 8),
        Event(1, "transfer", 0.5, 0.5, 0),
        Event(1, "add", 1.0, 1.5, 16),
    ]
    assert events[2].stop == 2.5
    assert events_from_tasks(records, ["a"], origin=9.0)[0].start == 0.5
    assert events_from_tasks([], ["a"]) == []


def test_schedule_draws_every_event_and_names_every_operation():
    ax = draw_schedule(EVENTS)
    bars = [patch for patch in ax.patches if patch.get_width() > 0]
    assert sorted(bar.get_width() for bar in bars) == pytest.approx([0.2, 1.0, 1.0])
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"fit", "transfer"}
    assert ax.get_xlabel() == "time (s)"
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in bars}
    assert len(looks) == 2 and len({hatch for _, hatch in looks}) == 2  # never colour alone
    plt.close(ax.figure)


def test_live_svg_shows_bars_busy_workers_and_words():
    svg = timeline_svg(EVENTS, ranks=3, busy=[0], end=2.0)
    assert svg.count("<title>fit: 1.00 s</title>") == 2
    assert svg.count("<title>running now</title>") == 1
    assert "worker 0 works, worker 1 waits, worker 2 waits" in svg
    assert "worker 2" in svg and "worker 3" not in svg


def test_live_svg_shows_the_last_ten_seconds():
    old = Event(0, "old", 1.0, 1.0)
    svg = timeline_svg([old, Event(0, "new", 28.0, 1.0)], ranks=1, end=30.0)
    assert "new" in svg and "old" not in svg
    assert ">20 s<" in svg and ">30 s<" in svg
    assert "&lt;lambda&gt;" in timeline_svg([Event(0, "<lambda>", 0, 1)], ranks=1)


def nap(_):
    time.sleep(0.1)


def test_recorder_and_live_picture_see_the_workers():
    with open_cluster(2) as cluster:
        with Recorder(cluster) as recorder:
            cluster.client.gather(cluster.client.map(nap, range(8)))
        naps = [event for event in recorder.events if event.operation == "nap"]
        assert len(naps) == 8 and {event.rank for event in naps} == {0, 1}
        assert all(0.09 < event.length < 1 for event in naps)
        assert min(event.start for event in recorder.events) == 0

        live = LivePicture(cluster)
        before = live.widget.value
        futures = cluster.client.map(nap, range(8, 16))
        end = time.monotonic() + 5
        while "works" not in live.widget.value and time.monotonic() < end:
            time.sleep(0.05)
        assert "works" in live.widget.value != before
        cluster.client.gather(futures)
        live.stop()
        assert not live._thread.is_alive()


def test_live_picture_ends_with_its_cluster():
    cluster = open_cluster(1)
    live = LivePicture(cluster)
    cluster.close()
    live._thread.join(timeout=5)
    assert not live._thread.is_alive()


# ---------------------------------------------------------------- figures


def test_speedup_is_drawn_from_the_data():
    ax = plot_speedup({1: 4.0, 2: 2.5}, {1: 4.0, 2: 2.0, 4: 1.0}, cores=2)
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert lines["measured"].get_ydata() == pytest.approx([1, 1.6])
    assert lines["predicted"].get_ydata() == pytest.approx([1, 2, 4])
    assert lines["measured"].get_linestyle() == "-"
    assert lines["predicted"].get_linestyle() == "--"
    assert "more workers than cores" in [text.get_text() for text in ax.texts]
    plt.close(ax.figure)
    alone = plot_speedup({1: 4.0}, {1: 4.0, 2: 2.0}, cores=2)
    assert not alone.texts
    plt.close(alone.figure)


def test_speedup_needs_one_worker():
    with pytest.raises(ValueError, match="measured needs the seconds of one worker"):
        plot_speedup({2: 1.0}, {1: 1.0})


def test_a_figure_needs_words():
    figure = plt.figure()
    with pytest.raises(ValueError, match="needs a caption"):
        show(figure, caption="Speed", alt="A figure of the speed-up by workers.")
    with pytest.raises(ValueError, match="needs a caption"):
        show(figure, caption="Figure 1. Speed", alt="speed")
    plt.close(figure)


def shown(monkeypatch, act):
    """What `act` displays: a list of mime bundles with their metadata."""
    found = []

    def display(data, raw, metadata=None):
        found.append((data, metadata))

    monkeypatch.setattr("helpers.classroom.plots.display", display)
    monkeypatch.setattr("helpers.classroom.panels.display", display)
    act()
    return found


def test_a_figure_is_shown_with_its_words(monkeypatch):
    figure, alt = plt.figure(), "An empty figure, for those who cannot see it."
    (picture, metadata), (caption, _) = shown(
        monkeypatch, lambda: show(figure, caption="Figure 1. Empty.", alt=alt)
    )
    assert picture["text/plain"] == alt == metadata["image/png"]["alt"]
    assert picture["image/png"].startswith("iVBOR")
    assert caption["text/markdown"] == "*Figure 1. Empty.*"
    assert not plt.fignum_exists(figure.number)


def test_colours_are_told_apart_by_colour_blind_readers():
    """Each pair differs for people who lack red or green cones (matrices of Viénot et al. 1999)."""
    to_lms = np.array([[17.88, 43.52, 4.12], [3.46, 27.16, 3.87], [0.03, 0.18, 1.47]])
    lacking = {
        "red": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
        "green": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
    }
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLOURS.values()])
    linear = rgb**2.2
    for matrix in lacking.values():
        seen = (np.linalg.inv(to_lms) @ matrix @ to_lms @ linear.T).T.clip(0, 1) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=2)
        assert distance[~np.eye(len(seen), dtype=bool)].min() > 0.12


# ---------------------------------------------------------------- panels


def test_panel_moves_real_workers(monkeypatch):
    def job(client):
        client.run(nap, 0)  # a worker's first task imports this module; that is not the job
        begin = time.perf_counter()
        client.gather(client.map(nap, range(4), pure=False))
        return time.perf_counter() - begin

    with open_cluster(1) as cluster:
        measured = {}
        panel = WorkerPanel(cluster, job, {1: 0.4, 2: 0.2, 4: 0.1}, measured)
        assert set(measured) == {1}
        assert panel.status.value == f'<span role="status">1 worker: {measured[1]:.2f} s.</span>'
        before = panel.figure.value
        panel.slider.value = 2
        assert cluster.n_workers == 2 and 0.19 < measured[2] < measured[1]
        assert "2 workers" in panel.status.value
        assert panel.figure.value != before
        panel.again.click()
        assert not panel.slider.disabled

        (views, metadata), (caption, _) = shown(monkeypatch, lambda: panel.display("Figure 4. It."))
        assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(views)
        assert "slider" in views["text/plain"] == metadata["image/png"]["alt"]
        assert caption["text/markdown"] == "*Figure 4. It.*"
        link = panel.widget.children[-1].value
        assert cluster.dashboard_link in link

        monkeypatch.setattr(panel, "job", lambda client: 1 / 0)
        panel.again.click()
        assert "That did not work: division by zero" in panel.status.value
        assert not panel.slider.disabled
        panel.stop()
        assert panel.slider.disabled and not panel.live._thread.is_alive()


def test_panel_does_not_keep_the_workers_alive():
    cluster = open_cluster(1)
    panel = WorkerPanel(cluster, lambda client: 1.0, {1: 1.0}, {})
    finalizer = cluster._finalizer
    del cluster
    assert not finalizer.alive
    panel.again.click()
    assert "These workers were stopped" in panel.status.value


def test_display_panel_keeps_widget_and_picture_together(monkeypatch):
    import ipywidgets

    figure = plt.figure()
    picture = png(figure)
    plt.close(figure)
    words = "A slider with a picture beside it."
    act = lambda: display_panel(ipywidgets.IntSlider(), picture, "Figure 1. A slider.", words)  # noqa: E731
    (views, _), _ = shown(monkeypatch, act)
    assert views["text/plain"] == words and "image/png" in views


# ---------------------------------------------------------------- the room check


def test_room_check_of_this_machine(capsys):
    lines = preflight.room_check()
    assert [line.name for line in lines] == [
        "python packages cores memory ports proxy disk data widgets worker".split()
    ][0]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(lines)
    assert all(re.match(r"(ok|warn|fail) +\w+ +\S", words) for words in printed)
    assert not [line for line in lines if line.level == "fail"]


def test_room_check_in_a_terminal_says_fail_by_its_exit_status(tmp_path):
    program = (
        "import sys, runpy; from pathlib import Path; import helpers.datasets.files as d;"
        f"d.data_folder = lambda: Path({str(tmp_path)!r});"
        "runpy.run_module('helpers.classroom.preflight', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert run.returncode == 1
    assert re.search(r"^fail data +.*SHA256SUMS.*git checkout", run.stdout, re.MULTILINE)
    good = [sys.executable, "-m", "helpers.classroom.preflight"]
    assert subprocess.run(good, capture_output=True, cwd="/").returncode == 0


def test_other_and_missing_packages(monkeypatch, tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("numpy==1.0\n    # via x\nabsent-package==1 ; python_version > '3'\n")
    wanted = preflight.pins(file)
    assert wanted == {"numpy": "1.0", "absent-package": "1"}
    monkeypatch.setattr(preflight, "pins", lambda: wanted)
    line = preflight.check_packages()
    assert (line.level, line.seen) == ("fail", "missing: absent-package")
    monkeypatch.setattr(preflight, "pins", lambda: {"numpy": "1.0"})
    line = preflight.check_packages()
    assert line.level == "warn" and line.seen.endswith("instead of 1.0")
    assert "python3 -m helpers lab" in line.advice


def test_pins_of_other_platforms_do_not_count(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("pywin-only==3 ; sys_platform == 'never'\nnumpy==1.0\n")
    assert preflight.pins(file) == {"numpy": "1.0"}


@pytest.mark.parametrize(
    ("free", "level"), [(0.2, "fail"), (0.5, "warn"), (1.5, "ok")], ids=["little", "some", "much"]
)
def test_memory_levels(monkeypatch, free, level):
    monkeypatch.setattr("helpers.cluster.usable_memory", lambda: int(free * 2**30))
    assert preflight.check_memory().level == level


def test_one_core_is_a_warning(monkeypatch):
    monkeypatch.setattr("helpers.cluster.usable_cores", lambda: 1)
    line = preflight.check_cores()
    assert line.level == "warn" and "all notebooks run" in line.advice


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({}, "ok"),
        ({"HTTP_PROXY": "http://proxy:1"}, "warn"),
        ({"https_proxy": "http://proxy:1", "no_proxy": "example.org, localhost"}, "ok"),
    ],
)
def test_proxy(monkeypatch, settings, level):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert preflight.check_proxy().level == level


def test_a_full_disk_and_a_closed_port(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    assert preflight.check_disk().level == "fail"
    monkeypatch.setattr("socket.create_server", refuse)
    assert preflight.check_ports().level == "fail"


def test_old_python_fails(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert preflight.check_python().advice == "install Python 3.11 or newer"


def test_a_worker_that_does_not_start_is_a_line(monkeypatch):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:9")
    monkeypatch.setattr("helpers.cluster.CONNECT_SECONDS", 1)
    line = preflight.check_worker()
    assert line.level == "fail" and "No Dask scheduler answers" in line.seen


def test_widgets_of_different_ages(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "8.1.9")
    assert preflight.check_widgets().level == "warn"


def test_an_unforeseen_failure_becomes_a_line(capsys):
    def check_sanity():
        raise ZeroDivisionError("oh")

    (line,) = preflight.room_check([check_sanity])
    assert (line.name, line.level, line.seen) == ("sanity", "fail", "ZeroDivisionError: oh")
