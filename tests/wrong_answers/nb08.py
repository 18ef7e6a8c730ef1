"""Typical wrong answers to the exercises of notebook 08, and a piece of what the check says."""

import math

import numpy as np

from helpers.classroom.exercises.nb08 import D, P, T, _groups


def _without_itself(rank, data, tensor, pipeline):
    groups = _groups(rank, data, tensor, pipeline)
    return {axis: [n for n in members if n != rank] for axis, members in groups.items()}


def _backwards(rank, data, tensor, pipeline):
    groups = _groups(rank, data, tensor, pipeline)
    return {axis: members[::-1] for axis, members in groups.items()}


def _one_axis_wrong(rank, data, tensor, pipeline):
    groups = _groups(rank, data, tensor, pipeline)
    return groups | {"pipeline": [rank, *range(900, 899 + pipeline)]}


def _sum(parts, power=1):
    return sum(np.sum(array**2) / copies**power for array, copies in parts)


def _clip(square, largest):
    return min(1.0, largest / np.sqrt(square)) if square else 1.0


def _of_lengths(parts, largest):
    return _clip(sum(np.linalg.norm(a) / copies for a, copies in parts) ** 2, largest)


def _room(asked, factor):
    return math.ceil(factor * sum(asked) / len(asked))


def _cache(texts, positions, blocks, width, mesh, itemsize, axes=(0, 1, 2)):
    whole = 2 * texts * positions * blocks * width * itemsize
    return whole / math.prod(mesh[axis] for axis in axes)


WRONG = {
    "08.1": [
        (lambda r, d, t, p: _groups(r, d, t, p, (D, T, P)), "data is counted fastest"),
        (lambda r, d, t, p: _groups(r, d, t, p, (P, D, T)), "pipeline is counted fastest"),
        (lambda r, d, t, p: _groups(r, d, t, p, (T, P, D)), "data is counted before pipeline"),
        (_without_itself, "the rank itself belongs"),
        (_backwards, "in the order of their coordinate"),
        (_one_axis_wrong, "the pipeline group should be"),
        (lambda r, d, t, p: [0, 1], "return a dict"),
        (lambda r, d, t, p: dict(data=0, tensor=1, pipeline=2), "a list of rank numbers"),
    ],
    "08.2": [
        (lambda parts, most: _clip(_sum(parts, 0), most), "the copies are all counted"),
        (lambda parts, most: _clip(_sum(parts, 2), most), "before they are squared"),
        (_of_lengths, "lengths do not add up"),
        (lambda parts, most: min(1, most / _sum(parts)) if _sum(parts) else 1.0, "square root"),
        (lambda parts, most: most / max(1e-9, np.sqrt(_sum(parts))), "stays as it is"),
        (lambda parts, most: float(np.sqrt(_sum(parts))), "this is the length"),
        (lambda parts, most: [1.0], "return one number"),
        (lambda parts, most: min(1.0, most / math.sqrt(_sum(parts))), "do not divide by it"),
        (lambda parts, most: _clip(_sum(parts, -1), most), "do not multiply"),
        (lambda parts, most: 0.123, "it should be"),
    ],
    "08.3": [
        (lambda names, s, n, room: min(names, key=s), "does not fit"),
        (lambda names, s, n, room: min(names, key=n), "time decides"),
        (
            lambda names, s, n, room: min(
                [x for x in names if n(x) < room] or ["none fits"], key=s
            ),
            "is faster and fits too",
        ),
        (
            lambda names, s, n, room: min([x for x in names if n(x) <= room] or [""], key=s),
            "nothing",
        ),
        (
            lambda names, s, n, room: max(
                [x for x in names if n(x) <= room], key=n, default="none fits"
            ),
            "fills the room best",
        ),
        (lambda names, s, n, room: [x for x in names if n(x) <= room], "return one layout"),
        (lambda names, s, n, room: "z", "it should be"),
    ],
    "08.4": [
        (lambda asked, f: sum(n - _room(asked, f) for n in asked), "do not make up for others"),
        (lambda asked, f: sum(min(n, _room(asked, f)) for n in asked), "that are kept"),
        (
            lambda asked, f: sum(max(0, n - int(f * sum(asked) / len(asked))) for n in asked),
            "round the capacity up",
        ),
        (lambda asked, f: sum(max(0, n - f * sum(asked) / len(asked)) for n in asked), "whole"),
        (lambda asked, f: sum(max(0, n - math.ceil(f * sum(asked))) for n in asked), "even share"),
        (
            lambda asked, f: sum(max(0, n - math.ceil(sum(asked) / len(asked))) for n in asked),
            "factor is missing",
        ),
        (lambda asked, f: sum(n > _room(asked, f) for n in asked), "full experts"),
        (
            lambda asked, f: sum(max(0, n - round(f * sum(asked) / len(asked))) for n in asked),
            "not to the nearest",
        ),
        (
            lambda asked, f: sum(max(0, n - math.ceil(f * _room(asked, 1))) for n in asked),
            "multiply the share by the factor first",
        ),
        (
            lambda asked, f: sum(max(0, n - f * _room(asked, 1)) for n in asked),
            "share is not rounded",
        ),
        (lambda asked, f: 99, "it should be"),
    ],
    "08.5": [
        (lambda *case: _cache(*case) / 2, "keys and values"),
        (lambda *case: _cache(*case, axes=()), "all ranks together"),
        (lambda *case: _cache(*case, axes=(1,)), "shared out and blocks"),
        (lambda *case: _cache(*case, axes=(1, 2)), "data ranks share out"),
        (lambda *case: _cache(*case, axes=(0, 1)), "pipeline ranks share out"),
        (lambda *case: _cache(*case, axes=(0, 2)), "tensor ranks share out"),
        (lambda *case: _cache(*case) / case[-1], "multiply by their bytes"),
        (lambda *case: _cache(*case) / case[1], "every one is kept"),
        (lambda *case: 7.0, "it should be"),
    ],
    "08.quiz": [
        ({"1": "a", "2": "a", "3": "c", "4": "b", "5": "b", "6": "a"}, "the loss even falls"),
        ({"1": "c", "2": "a", "3": "c", "4": "b", "5": "b", "6": "a"}, "not the exchange here"),
        ({"1": "b", "2": "b", "3": "c", "4": "b", "5": "b", "6": "a"}, "starts earlier"),
        ({"1": "b", "2": "c", "3": "c", "4": "b", "5": "b", "6": "a"}, "the direction stays"),
        ({"1": "b", "2": "a", "3": "a", "4": "b", "5": "b", "6": "a"}, "once a step"),
        ({"1": "b", "2": "a", "3": "b", "4": "b", "5": "b", "6": "a"}, "between stages only"),
        ({"1": "b", "2": "a", "3": "c", "4": "a", "5": "b", "6": "a"}, "hold whole layers"),
        ({"1": "b", "2": "a", "3": "c", "4": "c", "5": "b", "6": "a"}, "moments belong to it"),
        ({"1": "b", "2": "a", "3": "c", "4": "b", "5": "a", "6": "a"}, "a limit for each expert"),
        ({"1": "b", "2": "a", "3": "c", "4": "b", "5": "c", "6": "a"}, "around the mixture"),
        ({"1": "b", "2": "a", "3": "c", "4": "b", "5": "b", "6": "b"}, "pass all stages"),
        ({"1": "b", "2": "a", "3": "c", "4": "b", "5": "b", "6": "c"}, "write other texts"),
        ({"1": "b"}, "give a letter for each"),
    ],
}
