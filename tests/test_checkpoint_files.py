"""A checkpoint's files: whole or not there, checked when read, each trouble said in a sentence."""

import doctest
import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers.parallel import checkpoint_files as files
from helpers.parallel.checkpoint_files import CheckpointError, read, steps, write

LAYERS = {
    layer: {"parameters": np.arange(size) / 3, "mean": np.arange(size) / 7}
    for layer, size in enumerate((5, 9, 2))
}


def written(folder, *numbers, **options):
    for number in numbers:
        write(folder, number, LAYERS, about={"seed": 7, "note": "é"}, **options)
    return folder


def same(found, layers=LAYERS):
    assert sorted(found.layers) == sorted(layers)
    for layer, arrays in layers.items():
        assert sorted(found.layers[layer]) == sorted(arrays)
        for name, array in arrays.items():
            there = found.layers[layer][name]
            assert np.array_equal(there, array) and there.dtype == array.dtype


def test_what_was_written_is_read(tmp_path):
    folder = written(tmp_path / "new" / "folder", 12)
    found = read(folder)
    same(found)
    assert (found.step, found.about) == (12, {"seed": 7, "note": "é"})
    same(read(folder, layers=[1]), {1: LAYERS[1]})
    assert json.loads((folder / "step-00000012.json").read_text())["files"][2]["layer"] == 2


def test_the_newest_is_read_and_so_many_are_kept(tmp_path):
    assert steps(tmp_path / "nowhere") == []
    folder = written(tmp_path, 10, 20, 30)
    assert steps(folder) == [20, 30] and read(folder).step == 30 and read(folder, 20).step == 20
    assert len(list(folder.iterdir())) == 4
    written(folder, 40, keep=1)
    assert steps(folder) == [40]


def test_who_goes_back_says_so_and_nobody_overwrites_a_longer_run(tmp_path):
    folder = written(tmp_path, 10, 20)
    with pytest.raises(CheckpointError, match="has a checkpoint of step 20, later than .* step 15"):
        written(folder, 15)
    assert steps(folder) == [10, 20]
    files.forget(folder, after=10)
    written(folder, 15)
    assert steps(folder) == [10, 15] and len(list(folder.iterdir())) == 4


def test_the_same_step_can_be_written_again(tmp_path):
    folder = written(tmp_path, 5)
    other = {0: {"parameters": np.ones(1)}}
    write(folder, 5, other)
    same(read(folder), other)
    assert len(list(folder.iterdir())) == 2  # nothing is left of the first


# ---------------------------------------------------------------- interrupted


WRITER = """
import sys
import numpy as np
from helpers.parallel.checkpoint_files import write
for step in range(1, 10**6):
    layers = {n: {"parameters": np.full(20_000, float(step))} for n in range(4)}
    write(sys.argv[1], step, layers, about={"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("moment", [0.0, 0.003, 0.007, 0.011])
def test_a_killed_writer_leaves_a_good_checkpoint(tmp_path, moment):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()) as process:
        for _ in range(3):
            process.stdout.readline()
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        said = [3, *map(int, process.stdout.read().split())]
    found = read(tmp_path)
    assert found.step in (said[-1], said[-1] + 1)  # it may have been killed before it could say it
    assert found.about == {"step": found.step} and len(found.layers) == 4
    assert all((a["parameters"] == found.step).all() for a in found.layers.values())
    written(tmp_path, found.step + 1)  # and what it left behind is cleared away
    there = sorted(path.name for path in tmp_path.iterdir())
    assert len(there) == 4 and not any(name.startswith(".") for name in there)


@pytest.mark.parametrize("name", ["layer-001.npz", "step-00000002.json"])
def test_a_full_disk_is_one_sentence_and_the_last_good_one_stays(tmp_path, monkeypatch, name):
    folder, sync = written(tmp_path, 1), os.fsync

    def no_room(handle):
        if f".{name}" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to see which file is written")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(CheckpointError) as caught:
        written(folder, 2)
    monkeypatch.undo()
    words = str(caught.value)
    assert words.startswith("The checkpoint of step 2 was not written, the disk is full (")
    assert words.endswith("): that of step 1 is still there.") and "\n" not in words
    assert steps(folder) == [1]
    same(read(folder))
    written(folder, 2)
    assert len(list(folder.iterdir())) == 4


SMALL_DISK = """
import resource, signal, sys
import numpy as np
from helpers.parallel.checkpoint_files import CheckpointError, write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write(sys.argv[1], 2, {0: {"parameters": np.ones(10_000)}})
except CheckpointError as error:
    print(error)
"""


def test_a_file_that_truly_finds_no_room(tmp_path):
    folder = written(tmp_path, 1)
    command = [sys.executable, "-c", SMALL_DISK, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "was not written, the disk is full" in done.stdout
    assert done.stdout.strip().endswith("that of step 1 is still there.")
    same(read(folder))


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="was not written, .*: there is none before it"):
        written(tmp_path / "file", 1)


# ---------------------------------------------------------------- missing and damaged


def change(folder, name, act):
    (path,) = folder.glob(f"**/{name}") if "json" not in name else [folder / name]
    act(path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "act", "words"),
    [
        ("layer-001.npz", os.unlink, "layer-001.npz is missing"),
        ("layer-001.npz", flip, "layer-001.npz is not what was written"),
        ("layer-002.npz", lambda path: path.write_bytes(b""), "layer-002.npz is not what was"),
        ("step-00000020.json", lambda path: path.write_text("{"), "json cannot be read"),
        ("step-00000020.json", lambda path: path.write_text("[1]"), "json cannot be read"),
    ],
)
def test_damage_is_found_and_the_way_back_named(tmp_path, name, act, words):
    folder = written(tmp_path, 10)
    change(folder, "layer-001.npz", lambda path: None)
    (part,) = [path for path in folder.iterdir() if path.is_dir()]
    written(folder, 20)
    place = (
        folder if "json" in name else next(p for p in folder.iterdir() if p.is_dir() and p != part)
    )
    act(place / name)
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    message = str(caught.value)
    assert "The checkpoint of step 20 is damaged" in message and words in message
    assert message.endswith("go back to step 10.") and "\n" not in message
    same(read(folder, 10))
    act((part if "json" not in name else folder) / name.replace("20", "10"))
    with pytest.raises(CheckpointError, match="there is none before it, start anew"):
        read(folder, 10)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint in .*: write one first"):
        read(tmp_path)
    folder = written(tmp_path, 10, 20)
    with pytest.raises(
        CheckpointError, match="no checkpoint of step 15: there are those of 10, 20"
    ):
        read(folder, 15)
    with pytest.raises(CheckpointError, match="has no layer 3"):
        read(folder, layers=[3])
    path = folder / "step-00000020.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="has the format 2: this program reads 1"):
        read(folder)


def test_python_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle=False"):
        write(tmp_path, 1, {0: {"parameters": np.array([{}], dtype=object)}})
    assert steps(tmp_path) == []


def test_examples():
    found = doctest.testmod(files)
    assert found.attempted and not found.failed
