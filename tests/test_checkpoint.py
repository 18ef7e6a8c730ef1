"""A checkpoint of one mesh is read under any other, and training goes on as if nothing had been."""

import doctest

import numpy as np
import pytest

from helpers.engine import spmd
from helpers.engine.errors import RankError
from helpers.engine.mesh import Mesh
from helpers.nn import GPT, SGD, Adam
from helpers.parallel import checkpoint
from helpers.parallel.checkpoint import load, read, save, steps
from helpers.parallel.hybrid import Hybrid
from helpers.parallel.schedules import interleaved
from helpers.parallel.training import Batches

SMALL = GPT(vocabulary=12, context=6, width=8, heads=4, layers=4)
ADAM = Adam(0.01, weight_decay=0.1)
LINES = np.random.default_rng(0).integers(0, 12, (40, 6))
BEFORE, AFTER = 3, 3

LAYOUTS = {
    "serial": (Mesh(), {}),
    "data, ZeRO 1": (Mesh(data=4), dict(zero=1, microbatches=2)),
    "tensor": (Mesh(tensor=4), dict(sequence=False)),
    "pipeline": (Mesh(pipeline=4), dict(microbatches=2)),
    "all, ZeRO 1": (Mesh(2, 2, 2), dict(zero=1, microbatches=2)),
    "interleaved": (Mesh(pipeline=2), dict(microbatches=2, schedule=interleaved, chunks=2)),
}


def program(rank, folder, begin, end, settings, optimiser=ADAM, gpt=SMALL, dtype=np.float64):
    """Train from one step to another; what came before is in the folder."""
    trainer = Hybrid(rank, gpt, optimiser, seed=1, dtype=dtype, largest_norm=0.5, **settings)
    samples = {"seed": 5, "rows": 16}
    if begin:
        found = load(trainer, folder)
        samples = found.about["samples"]
        assert found.step == trainer.steps == begin
    batches = Batches(LINES, LINES, **samples)
    losses = []
    for step in range(begin, end):
        rows = batches.numbers(step)
        losses.append(trainer.step(LINES[rows], LINES[rows]))
    save(trainer, folder, samples)
    return losses


def losses(name, folder, begin, end, **options):
    mesh, settings = LAYOUTS[name]
    results = spmd.run(None, mesh, program, folder, begin, end, settings, *options.values()).results
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return losses("serial", folder, 0, BEFORE + AFTER), read(folder)


@pytest.mark.parametrize("then", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_training_goes_on_under_any_layout(first, then, tmp_path, uninterrupted):
    right, end = uninterrupted
    found = losses(first, tmp_path, 0, BEFORE) + losses(then, tmp_path, BEFORE, BEFORE + AFTER)
    assert np.abs(np.array(found) - right).max() < 1e-10
    last = read(tmp_path)
    assert last.step == BEFORE + AFTER and last.about == end.about
    for layer, arrays in end.layers.items():
        assert sorted(arrays) == ["mean", "parameters", "square"]
        for kind, array in arrays.items():
            assert np.abs(last.layers[layer][kind] - array).max() < 1e-10


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_read_is_what_was_written_to_the_last_bit(name, tmp_path):
    losses(name, tmp_path / "a", 0, 2)
    (tmp_path / "b").mkdir()
    mesh, settings = LAYOUTS["all, ZeRO 1"]

    def again(rank):
        trainer = Hybrid(rank, SMALL, ADAM, seed=9, **settings)
        load(trainer, tmp_path / "a")
        save(trainer, tmp_path / "b", {"seed": 5, "rows": 16})

    spmd.run(None, mesh, again)
    one, other = read(tmp_path / "a"), read(tmp_path / "b")
    assert one.about == other.about
    for layer, arrays in one.layers.items():
        for kind, array in arrays.items():
            assert np.array_equal(array, other.layers[layer][kind])


def test_samples_come_in_the_same_order_and_none_twice(tmp_path):
    seen = []

    def watch(rank, begin):
        trainer = Hybrid(rank, SMALL, ADAM)
        samples = load(trainer, tmp_path).about["samples"] if begin else {"seed": 3, "rows": 10}
        for step in range(begin, begin + 2):
            rows = Batches(LINES, LINES, **samples).numbers(step)
            if rank.index == 0:
                seen.extend(rows.tolist())
            trainer.step(LINES[rows], LINES[rows])
        save(trainer, tmp_path, samples)

    spmd.run(None, Mesh(data=2), watch, 0)
    spmd.run(None, Mesh(pipeline=2), watch, 2)
    assert sorted(seen) == list(range(40))
    right = [Batches(LINES, LINES, rows=10, seed=3).numbers(step) for step in range(4)]
    assert seen == np.concatenate(right).tolist()


def test_several_are_kept_and_an_older_one_can_be_read(tmp_path):
    def train(rank):
        trainer = Hybrid(rank, SMALL, ADAM)
        for _ in range(4):
            trainer.step(LINES[:8], LINES[:8])
            save(trainer, tmp_path, keep=3)

    spmd.run(None, Mesh(pipeline=2), train)
    assert steps(tmp_path) == [2, 3, 4]

    def back(rank):
        trainer = Hybrid(rank, SMALL, ADAM)
        return load(trainer, tmp_path, step=3).step, trainer.steps, trainer.sharded.state["steps"]

    assert spmd.run(None, Mesh(tensor=2), back).results == [(3, 3, 3)] * 2


def test_a_rank_that_fails_while_others_write_leaves_the_last_good_one(tmp_path, monkeypatch):
    losses("pipeline", tmp_path, 0, 2)
    write_layer = checkpoint.files.write_layer

    def fails_at_layer_3(folder, part, layer, arrays):
        if layer == 3:
            raise OSError(28, "No space left on device")
        return write_layer(folder, part, layer, arrays)

    monkeypatch.setattr(checkpoint.files, "write_layer", fails_at_layer_3)
    with pytest.raises(RankError, match="No space left on device"):
        losses("pipeline", tmp_path, 2, 4)
    monkeypatch.undo()
    assert steps(tmp_path) == [2] and read(tmp_path).step == 2
    assert len(losses("tensor", tmp_path, 2, 4)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(optimiser=SGD(0.1)), "has the kinds .*mean.*this run .'parameters'."),
        (dict(optimiser=ADAM, gpt=GPT(12, 6, 8, 2, 4)), "has the model .*'heads': 4.*'heads': 2"),
        (
            dict(optimiser=ADAM, gpt=SMALL, dtype=np.float32),
            "has the dtype float64, this run float",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(options, words, tmp_path):
    losses("serial", tmp_path, 0, 2)
    with pytest.raises(RankError, match=words):
        losses("tensor" if "gpt" not in options else "serial", tmp_path, 2, 4, **options)


def test_a_folder_without_a_checkpoint_is_said_on_all_ranks(tmp_path):
    with pytest.raises(RankError, match="There is no checkpoint in .*: write one first"):
        spmd.run(None, Mesh(2), lambda rank: load(Hybrid(rank, SMALL, ADAM), tmp_path))


def test_examples():
    found = doctest.testmod(checkpoint)
    assert found.attempted and not found.failed
