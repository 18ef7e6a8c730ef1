"""The benchmarks of the engine measure what they say, and its targets are met."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import all_reduce, data_parallel_step, scaling, tensor_step
from benchmarks.peers import launch
from benchmarks.peers.timing import BATCH, LAYERS, batch, check_sum, median_call, median_step
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.nn.blocks import ALONE
from helpers.nn.mlp import MLP
from helpers.parallel.tensor import TensorParallel

LAUNCH_SECONDS, LAUNCH_SECONDS_A_RANK = 0.05, 0.01
TWO_CORES = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the targets are for two cores")


def needs(*peers):
    reasons = [reason for peer in peers if (reason := launch.missing(peer))]
    return pytest.mark.skipif(bool(reasons), reason=" ".join(reasons) or "all are here")


def namespaces_present():
    run = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    return {line.split()[0] for line in run.stdout.splitlines()}


# ---------------------------------------------------------------- time of a call


def test_the_median_of_a_call_leaves_the_barrier_and_the_first_block_out(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += 100 if len(order) <= 1 else len(order)

    def barrier():
        order.append("barrier")
        clock[0] += 1000

    # Blocks of two calls that take 100 (warm-up), 2, 3, and 4 seconds each.
    assert median_call(call, barrier, calls=2, blocks=3) == 3
    assert len(order) == 4


def test_the_median_of_a_step_leaves_the_first_ones_out():
    steps = []
    seconds = median_step(lambda: steps.append(time.sleep(0.02 if len(steps) < 10 else 0)))
    assert len(steps) == 40
    assert seconds < 0.01


def test_the_batch_is_dealt_out_without_loss():
    x, y = batch(0, 1)
    parts = [batch(index, 2) for index in (0, 1)]
    assert x.shape == (BATCH, LAYERS[0]) and x.dtype == y.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), x)
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), y)
    assert set(y) == {0, 1}


def test_a_wrong_sum_is_not_measured():
    check_sum(np.full(3, 3.0))
    with pytest.raises(RuntimeError, match="The sum is wrong"):
        check_sum(np.array([3.0, 3.0, 2.0]))


# ---------------------------------------------------------------- processes and places


def test_the_first_of_several_processes_reports():
    say = [sys.executable, "-c", "print('chatter'); print([1, 2.5])"]
    other = [sys.executable, "-c", "print(7)"]
    assert launch.measured(say, other) == [1, 2.5]


def test_a_rank_that_fails_ends_the_other_and_says_why():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="A measured program failed: .*division by zero"):
        launch.measured(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            [sys.executable, "-c", "1 / 0"],
        )
    assert time.monotonic() - start < 20


def test_a_rank_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="longer than"):
        launch.python("import time; time.sleep(60)")


def test_a_program_that_prints_nothing_is_told():
    with pytest.raises(RuntimeError, match="printed nothing"):
        launch.python("pass")


def test_a_missing_peer_is_left_out_with_a_note(monkeypatch, capsys):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert launch.present(["gloo", "mpi"]) == []
    gloo, mpi = capsys.readouterr().out.splitlines()
    assert gloo.startswith("Note: gloo is left out") and mpi.startswith("Note: mpi is left out")


@pytest.fixture
def namespaces_work():
    try:
        with launch.namespaces():
            pass
    except RuntimeError as error:
        pytest.skip(str(error))


def test_namespaces_are_removed_after_a_failure(namespaces_work):
    def fail_inside(seen):
        with launch.two_places() as (places, name):
            seen.update(place.prefix[-1] for place in places)
            assert name == "TCP" and seen <= namespaces_present()
            raise KeyError("inside")

    names = set()
    with pytest.raises(KeyError, match="inside"):
        fail_inside(names)
    assert len(names) == 2 and not names & namespaces_present()


def test_namespaces_that_are_half_made_are_removed_and_loopback_serves(
    namespaces_work, monkeypatch, capsys
):
    run = launch._ip

    def failing(*arguments, check=True):
        if "addr" in arguments:
            raise RuntimeError("No address.")
        run(*arguments, check=check)

    monkeypatch.setattr(launch, "_ip", failing)
    with launch.two_places() as (places, name):
        assert name == "TCP loopback"
        assert [place.address for place in places] == ["127.0.0.1"] * 2
        assert not [n for n in namespaces_present() if n.startswith(f"mh-{os.getpid()}-")]
    assert capsys.readouterr().out == "Note: No address. TCP goes over loopback instead.\n"


def test_without_the_ip_command_loopback_serves(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with launch.two_places() as (_, name):
        assert name == "TCP loopback"
    assert "need Linux's ip command" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["memory", "tcp"])
def test_the_limits_are_measured_by_two_processes(kind):
    assert 0 < launch.ranks("benchmarks.peers.bare", kind, "328 KB") < 0.1


# ---------------------------------------------------------------- ours


def test_ours_adds_up_and_is_timed_between_threads_too():
    run = spmd.run(None, Mesh(data=2), all_reduce.program, "328 KB", False)
    assert all(0 < seconds < 1 for seconds in run.results)


def test_a_step_that_forgets_the_exchange_is_not_measured():
    gradient = np.empty(MLP(LAYERS).size, np.float32)
    alone = data_parallel_step.trainer(batch(0, 2), gradient, lambda gradient: None)
    with pytest.raises(RuntimeError, match="parameters differ"):
        data_parallel_step.check(*alone)
    whole = data_parallel_step.trainer(batch(0, 1), gradient, lambda gradient: None)
    data_parallel_step.check(*whole)
    assert np.isfinite(whole[1]).all()


def test_a_block_that_forgets_an_exchange_is_not_measured():
    alone = tensor_step.Block(0, 2, ALONE)
    with pytest.raises(RuntimeError, match="The block differs from that of one rank"):
        tensor_step.check(alone, 0, 2)
    tensor_step.check(tensor_step.Block(0, 1, ALONE), 0, 1)

    def checked(rank):
        block = tensor_step.Block(rank.index, rank.size, TensorParallel(rank.tensor))
        tensor_step.check(block, rank.index, rank.size)
        return np.abs(block.y).max() > 0

    assert all(spmd.run(None, Mesh(tensor=2), checked).results)


def test_scaling_measures_every_number_of_ranks():
    cases = scaling.run(1, threads=(1, 3), processes=(1, 2))
    assert [case.name for case in cases] == "threads 1,threads 3,processes 1,processes 2".split(",")
    assert all(case.ours > 0 and case.limit > 0 for case in cases)


def test_the_numbers_of_processes_can_be_set(monkeypatch):
    monkeypatch.delenv("SCALING_PROCESSES", raising=False)
    assert scaling.numbers_of_processes() == scaling.PROCESSES
    monkeypatch.setenv("SCALING_PROCESSES", "8, 2,2")
    assert scaling.numbers_of_processes() == (2, 8)


@pytest.mark.parametrize("text", ["0", "2,,4", "-1", "two"])
def test_a_wrong_list_of_processes_gets_one_sentence(text, monkeypatch):
    monkeypatch.setenv("SCALING_PROCESSES", text)
    with pytest.raises(RuntimeError, match="must be whole numbers from 1 up"):
        scaling.numbers_of_processes()


# ---------------------------------------------------------------- the targets


@pytest.mark.slow
@pytest.mark.timeout(1200)
@TWO_CORES
@needs("gloo", "mpi")
def test_all_reduce_is_as_quick_as_its_targets():
    cases = {case.name: case for case in all_reduce.run(5)}
    small, large = cases.pop("328 KB"), cases.pop("32 MB")
    assert 5 * small.ours <= small.peers["gloo"], small
    assert 5 * large.ours <= large.peers["gloo"], large
    assert small.ours <= small.peers["mpi"], small
    assert 2 * large.ours <= large.peers["mpi"], large
    assert len(cases) == 2
    for case in cases.values():
        assert case.ours <= case.peers["gloo"], case


@pytest.mark.slow
@pytest.mark.timeout(600)
@TWO_CORES
@needs("ddp")
def test_the_data_parallel_step_is_as_quick_as_its_targets():
    [case] = data_parallel_step.run(7)
    assert 1.25 * case.ours <= case.peers["ddp"], case
    assert 0.97 * case.ours <= case.limit, case


@pytest.mark.slow
@pytest.mark.timeout(600)
@TWO_CORES
@needs("torch")
def test_the_tensor_parallel_step_is_as_quick_as_its_target():
    [case] = tensor_step.run(7)
    assert 1.2 * case.ours <= case.peers["torch"], case
    assert case.ours < case.more["serial"], case


@pytest.mark.slow
@pytest.mark.timeout(900)
@TWO_CORES
def test_a_launch_is_as_quick_as_its_target():
    for case in scaling.run(3):
        ranks = int(case.name.split()[1])
        assert case.ours <= LAUNCH_SECONDS + LAUNCH_SECONDS_A_RANK * ranks, case
