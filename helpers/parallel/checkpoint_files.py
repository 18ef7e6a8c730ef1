"""The files of a checkpoint, which know no layout; see `helpers.parallel.checkpoint`.

A checkpoint holds each layer of a model whole, in one file a layer: its parameters and what the
optimiser remembers of them. How many ranks wrote it, and which of them had what, does not stand in
it.

::

    folder/
        step-00000040.json           what belongs together, with the checksum of each file
        step-00000040-5f0c7a1e/
            layer-000.npz            parameters, mean, square: arrays of one axis
            layer-001.npz
            …

An interrupted write never destroys the last good checkpoint: files are written under a temporary
name, forced to the disk, and renamed, which the file system does whole or not at all; the .json
comes last, and a checkpoint exists when its .json does. (What a file system promises there, and
what not: Pillai et al. 2014, "All file systems are not created equal".)
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

FORMAT = 1
KEEP = 2
"""How many checkpoints stay; older ones are removed once a new one is complete."""
NAME = re.compile(r"step-(\d{8})\.json")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; one sentence says why, and what to do."""


class Checkpoint(NamedTuple):
    """What was read.

    Attributes
    ----------
    step : int
        Steps that had been taken.
    about : dict
        What the writer noted: the model, the optimiser's settings, the seed of the samples.
    layers : dict of int to dict of str to array
        For each layer its arrays: ``parameters`` and those of the optimiser's state.
    """

    step: int
    about: dict
    layers: dict


def write(folder, step, layers, about=None, keep=KEEP) -> None:
    """Write a checkpoint from one process that has all layers.

    Parameters
    ----------
    folder : path
        Made if it is missing.
    step : int
        Steps that have been taken.
    layers : dict of int to dict of str to array
        For each layer its arrays.
    about : dict, optional
        What else is needed to go on; anything that JSON can hold.
    keep : int
        So many checkpoints stay, this one included.

    Raises
    ------
    CheckpointError
        The disk is full, or the folder cannot be written to, or it has checkpoints of later steps.
        The last good checkpoint is there still.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(folder, 40, {0: {"parameters": np.arange(3.0)}}, about={"seed": 1})
    ...     found = read(folder)
    >>> found.step, found.about, found.layers[0]["parameters"].tolist()
    (40, {'seed': 1}, [0.0, 1.0, 2.0])
    """
    part = begin(folder, step)
    records = [write_layer(folder, part, layer, arrays) for layer, arrays in layers.items()]
    commit(folder, step, part, records, about, keep)


def begin(folder, step) -> str:
    """Make the folder for the files of one checkpoint; returns its name.

    What earlier writes left unfinished is removed: one run at a time writes into a folder.

    Raises
    ------
    CheckpointError
        As for `write`.
    """
    folder = Path(folder)
    later = [other for other in steps(folder) if other > step]
    if later:
        raise CheckpointError(
            f"{folder} has a checkpoint of step {later[-1]}, later than this one of step {step}: "
            "take another folder, or give up the later ones with forget."
        )
    part = f"{_name(step)}-{uuid.uuid4().hex[:8]}"
    with _explained(folder, step):
        _remove_unfinished(folder)
        (folder / part).mkdir(parents=True)
    return part


def write_layer(folder, part, layer, arrays) -> dict:
    """Write one layer; returns the record of its file, for `commit`.

    Different ranks may write different layers of one checkpoint at the same time.

    Parameters
    ----------
    folder : path
    part : str
        What `begin` gave.
    layer : int
    arrays : dict of str to array

    Returns
    -------
    dict
        ``layer``, ``file``, ``nbytes`` and ``sha256``.

    Raises
    ------
    CheckpointError
        As for `write`.
    """
    memory = io.BytesIO()
    np.savez(memory, allow_pickle=False, **arrays)
    data, name = memory.getbuffer(), f"layer-{layer:03d}.npz"
    with _explained(folder, _step_of(part)):
        _write_whole(Path(folder) / part / name, data)
    return dict(layer=layer, file=name, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def commit(folder, step, part, records, about=None, keep=KEEP) -> None:
    """Complete a checkpoint whose files are all written; only now it exists.

    Parameters
    ----------
    folder, step, about, keep
        As for `write`.
    part : str
        What `begin` gave.
    records : list of dict
        What `write_layer` gave, for each layer.

    Raises
    ------
    CheckpointError
        As for `write`.
    """
    folder = Path(folder)
    files = sorted(records, key=lambda record: record["layer"])
    content = dict(format=FORMAT, step=step, part=part, about=about or {}, files=files)
    with _explained(folder, step):
        _sync(folder / part)
        _write_whole(folder / f"{_name(step)}.json", json.dumps(content, indent=1).encode())
    for old in steps(folder)[: -max(1, keep)]:
        (folder / f"{_name(old)}.json").unlink(missing_ok=True)
    _remove_unfinished(folder)


def steps(folder) -> list[int]:
    """The steps of all checkpoints of a folder that were completed, in order."""
    if not Path(folder).is_dir():
        return []
    found = (NAME.fullmatch(path.name) for path in Path(folder).iterdir())
    return sorted(int(match[1]) for match in found if match)


def forget(folder, after) -> None:
    """Remove the checkpoints of all steps after one, to go on from there.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (10, 20):
    ...         write(folder, step, {})
    ...     forget(folder, after=10)
    ...     steps(folder)
    [10]
    """
    for step in steps(folder):
        if step > after:
            (Path(folder) / f"{_name(step)}.json").unlink(missing_ok=True)
    _remove_unfinished(Path(folder))


def read(folder, step=None, layers=None) -> Checkpoint:
    """Read a checkpoint, or some of its layers; every file is checked.

    Parameters
    ----------
    folder : path
    step : int, optional
        Default: the newest.
    layers : iterable of int, optional
        Which layers this rank needs. Default: all.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        There is none, or a file is missing or damaged; the sentence names the one before it.

    Examples
    --------
    See `write`.
    """
    folder, there = Path(folder), steps(folder)
    if not there:
        raise CheckpointError(f"There is no checkpoint in {folder}: write one first.")
    step = there[-1] if step is None else step
    if step not in there:
        listed = ", ".join(map(str, there))
        raise CheckpointError(
            f"There is no checkpoint of step {step}: there are those of {listed}."
        )
    content = _content(folder, step)
    records = {record["layer"]: record for record in content["files"]}
    wanted = sorted(records) if layers is None else list(layers)
    for layer in wanted:
        if layer not in records:
            raise CheckpointError(f"The checkpoint of step {step} has no layer {layer}.")
    found = {layer: _read_layer(folder, content, records[layer]) for layer in wanted}
    return Checkpoint(step, content["about"], found)


def _content(folder, step):
    try:
        content = json.loads((folder / f"{_name(step)}.json").read_bytes())
        known = content["format"] == FORMAT
        if known and isinstance(content["part"], str) and content["step"] == step:
            return content
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(folder, step, f"{_name(step)}.json cannot be read") from None
    raise CheckpointError(
        f"The checkpoint of step {step} has the format {content['format']!r}: this program reads "
        f"{FORMAT}."
    )


def _read_layer(folder, content, record):
    name, step = record["file"], content["step"]
    try:
        data = (folder / content["part"] / name).read_bytes()
    except OSError:
        raise _damaged(folder, step, f"{name} is missing") from None
    if len(data) != record["nbytes"] or hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise _damaged(folder, step, f"{name} is not what was written")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _damaged(folder, step, how):
    before = [other for other in steps(folder) if other < step]
    way = f"go back to step {before[-1]}" if before else "there is none before it, start anew"
    return CheckpointError(f"The checkpoint of step {step} is damaged, {how}: {way}.")


# ---------------------------------------------------------------- files


def _write_whole(path, data):
    """Write a file so that under its name there is all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder):
    """Force the names in a folder to the disk, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_unfinished(folder):
    """Remove the files of checkpoints that do not exist: given up, or never completed."""
    if not folder.is_dir():
        return
    complete = {}
    for step in steps(folder):
        with suppress(CheckpointError):
            complete[_name(step)] = _content(folder, step)["part"]
    # What belongs to a .json that cannot be read is left for whoever wants to look at it.
    unreadable = {_name(step) for step in steps(folder)} - set(complete)
    for path in folder.iterdir():
        name = path.name.rpartition("-")[0]
        if re.fullmatch(r"step-\d{8}-[0-9a-f]{8}", path.name):
            if path.name != complete.get(name) and name not in unreadable:
                shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\.step-\d{8}\.json\.[0-9a-f]{8}", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def _explained(folder, step):
    """Turn an error of the system into one sentence."""
    try:
        yield
    except OSError as error:
        there = steps(folder) if os.access(folder, os.R_OK) else []
        kept = f"that of step {there[-1]} is still there" if there else "there is none before it"
        reason = "the disk is full" if error.errno in FULL else (error.strerror or str(error))
        raise CheckpointError(
            f"The checkpoint of step {step} was not written, {reason} ({folder}): {kept}."
        ) from error


def _name(step):
    return f"step-{step:08d}"


def _step_of(part):
    return int(part.split("-")[1])
