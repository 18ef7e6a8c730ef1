"""Checkpoints that know no layout: written under one mesh, read under another.

A checkpoint holds each layer whole: its parameters and what the optimiser remembers of them. How
many ranks wrote it, and which of them had what, does not stand in it. So a run can go on with more
ranks or fewer, and with another mesh of them (as in Lian et al. 2024, "Universal checkpointing").

Each layer is put together from its tensor ranks, and its moments from the data ranks where ZeRO has
cut them; then one rank of each pipeline stage writes the layers of its stage. All ranks need the
same folder, on one machine or on a shared file system (`helpers.parallel.checkpoint_files`).
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from helpers.engine.collectives import all_gather, barrier, broadcast
from helpers.parallel import checkpoint_files as files
from helpers.parallel.checkpoint_files import Checkpoint, CheckpointError, forget, read, steps

__all__ = ["Checkpoint", "CheckpointError", "forget", "load", "read", "save", "steps"]


def save(trainer, folder, samples=None, keep=files.KEEP) -> None:
    """Write a checkpoint of what a mesh has trained; all ranks call it together.

    Parameters
    ----------
    trainer : Hybrid
    folder : path
        The same on all ranks.
    samples : dict, optional
        From what the order of samples follows, such as ``{"seed": 0, "rows": 64}``; anything that
        JSON can hold. With the number of steps it says which samples come next.
    keep : int
        So many checkpoints stay, this one included.

    Raises
    ------
    CheckpointError
        It could not be written, or the folder has one of a later step, as after going back: see
        `forget`. The last good checkpoint is there still.

    Examples
    --------
    >>> import tempfile
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.nn import GPT, SGD
    >>> from helpers.parallel.hybrid import Hybrid
    >>> gpt = GPT(vocabulary=4, context=6, width=4, heads=2, layers=2)
    >>> tokens = np.arange(24).reshape(4, 6) % 4
    >>> def program(rank, folder, begin, end):
    ...     trainer = Hybrid(rank, gpt, SGD(rate=0.1, momentum=0.9))
    ...     if begin:
    ...         load(trainer, folder)
    ...     losses = [trainer.step(tokens, tokens) for _ in range(begin, end)]
    ...     save(trainer, folder)
    ...     return losses
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     whole = spmd.run(None, Mesh(), program, folder, 0, 4).results[0]
    ...     forget(folder, after=0)
    ...     start = spmd.run(None, Mesh(tensor=2, pipeline=2), program, folder, 0, 2).results[0]
    ...     rest = spmd.run(None, Mesh(data=2), program, folder, 2, 4).results[0]
    >>> np.allclose(start + rest, whole, rtol=1e-9)
    True
    """
    rank, gpt = trainer.rank, trainer.gpt
    kinds = {kind: trainer.layers(kind) for kind in trainer.kinds}
    first = rank.index == 0
    part = _told(rank, files.begin(folder, trainer.steps) if first else None)
    records = []
    if rank.coordinate.data == rank.coordinate.tensor == 0:
        for layer in kinds["parameters"]:
            arrays = {kind: layers[layer] for kind, layers in kinds.items()}
            records.append(files.write_layer(folder, part, layer, arrays))
    # One line of JSON for each file: the first rank gets them all, and only then completes it.
    lines = "".join(json.dumps(record) + "\n" for record in records)
    lines = all_gather(rank.world, np.frombuffer(lines.encode(), np.uint8))
    if first:
        records = [json.loads(line) for line in lines.tobytes().decode().splitlines()]
        files.commit(folder, trainer.steps, part, records, _about(trainer, gpt, samples), keep)
    barrier(rank.world)


def load(trainer, folder, step=None) -> Checkpoint:
    """Go on from a checkpoint, whatever mesh has written it; all ranks call it together.

    Parameters
    ----------
    trainer : Hybrid
        Its parameters and its optimiser's state are set.
    folder : path
    step : int, optional
        Default: the newest.

    Returns
    -------
    Checkpoint
        With the layers of this rank's stages; ``about["samples"]`` is what `save` was given.

    Raises
    ------
    CheckpointError
        It is missing or damaged, or of another model, dtype or optimiser.

    Examples
    --------
    See `save`.
    """
    rank = trainer.rank
    if step is None:
        # All ranks read the same one, also if a newer one is completed in this moment.
        newest = (files.steps(folder) or [-1])[-1] if rank.index == 0 else -1
        step = int(broadcast(rank.world, np.array(newest)))
        step = None if step < 0 else step
    names = {name for stage in trainer.stages for name in stage.parts.names}
    layers = sorted({name if isinstance(name, int) else 0 for name in names})
    found = files.read(folder, step, layers)
    _check(trainer, found)
    trainer.load(lambda kind, layer: found.layers[layer][kind], found.step)
    return found


def _about(trainer, gpt, samples):
    return {
        "model": {"name": type(gpt).__name__, **dataclasses.asdict(gpt)},
        "dtype": trainer.sharded.dtype.name,
        "kinds": trainer.kinds,
        "samples": samples,
    }


def _check(trainer, found):
    """Raise unless a checkpoint is one of this model, this dtype and this optimiser."""
    mine = _about(trainer, trainer.gpt, None)
    for what in ("model", "dtype", "kinds"):
        if found.about.get(what) != mine[what]:
            raise CheckpointError(
                f"The checkpoint of step {found.step} has the {what} {found.about.get(what)}, "
                f"this run {mine[what]}: give the same."
            )


def _told(rank, words):
    """A text of the first rank, on all ranks."""
    data = np.frombuffer(words.encode(), np.uint8) if rank.index == 0 else None
    return broadcast(rank.world, data).tobytes().decode()
