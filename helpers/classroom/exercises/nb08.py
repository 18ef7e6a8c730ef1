"""Exercises of notebook 08, All three at once."""

from __future__ import annotations

import numpy as np

from helpers.classroom.checks import check_letters, close_to, exercise

# ---------------------------------------------------------------- 08.1: the groups of a rank


T, D, P = AXES = "tensor", "data", "pipeline"


def _groups(rank, data, tensor, pipeline, order=AXES):
    """The groups of a rank; `order` begins with the coordinate that is counted fastest."""
    sizes, found, step = {D: data, T: tensor, P: pipeline}, {}, 1
    for axis in order:
        first = rank - rank // step % sizes[axis] * step
        found[axis] = [first + place * step for place in range(sizes[axis])]
        step *= sizes[axis]
    return found


@exercise(
    "08.1",
    hint="rank = (p * data + d) * tensor + t. Find t, d, p with divmod; then let one of them run.",
    shows="Tensor ranks are neighbours in number, so that they come to lie in one node.",
)
def partners(answer):
    """Exercise 08.1: the three groups of a rank on a mesh."""
    for rank, sizes in ((5, (2, 2, 2)), (9, (3, 2, 2)), (0, (1, 4, 1)), (13, (2, 4, 3))):
        right, got = _groups(rank, *sizes), answer(rank, *sizes)
        if not isinstance(got, dict) or set(got) != set(right):
            return 'return a dict with the keys "data", "tensor" and "pipeline".'
        try:
            got = {axis: [int(member) for member in members] for axis, members in got.items()}
        except (TypeError, ValueError):
            return "each group is a list of rank numbers."
        if got == right:
            continue
        where = f"for rank {rank} of {sizes[0]} × {sizes[1]} × {sizes[2]}"
        if got == _groups(rank, *sizes, order=(D, T, P)):
            return f"{where}: here data is counted fastest; it must be tensor, then data."
        if got == _groups(rank, *sizes, order=(P, T, D)) or got == _groups(
            rank, *sizes, order=(P, D, T)
        ):
            return f"{where}: here pipeline is counted fastest; it must be the slowest."
        if got == _groups(rank, *sizes, order=(T, P, D)):
            return f"{where}: data is counted before pipeline, not after it."
        if any(rank not in members for members in got.values()):
            return f"{where}: the rank itself belongs to each of its groups."
        if {a: sorted(m) for a, m in got.items()} == right:
            return f"{where}: the members stand in the order of their coordinate."
        wrong = next(axis for axis in right if got[axis] != right[axis])
        return f"{where} the {wrong} group should be {right[wrong]}, not {got[wrong]}."
    return None


# ---------------------------------------------------------------- 08.2: the global norm


@exercise(
    "08.2",
    hint="Divide the squares of each array by its copies, add up, take the root; a short gradient "
    "keeps the factor 1.",
    shows="Every mesh now clips alike: no number is counted twice.",
)
def scale(answer):
    """Exercise 08.2: the factor that clips a gradient of which parts lie on several ranks."""
    cut, whole = np.array([3.0, 0.0]), np.array([2.0, 2.0])
    cases = (
        ([(cut, 1), (whole, 2), (whole, 2)], 1.0),
        ([(cut, 1), (2 * cut, 1)] + [(whole, 4)] * 4, 2.5),
        ([(cut / 10, 2)] * 2, 1.0),
        ([(0 * cut, 1)], 1.0),
    )
    for parts, largest in cases:
        squares = [np.sum(array**2) for array, _ in parts]
        once = sum(s / copies for s, (_, copies) in zip(squares, parts))
        right = min(1.0, largest / np.sqrt(once)) if once else 1.0
        zeros = "a gradient of zeros has the length 0: do not divide by it."
        try:
            with np.errstate(all="ignore"):
                got = answer([(array.copy(), copies) for array, copies in parts], largest)
        except ZeroDivisionError:
            return zeros
        if not close_to(got, got) or np.ndim(got):
            return "return one number, the factor for all gradients."
        if not np.isfinite(got):
            return zeros
        lengths = sum(np.sqrt(s) / copies for s, (_, copies) in zip(squares, parts))
        mistakes = (
            (sum(squares), "the copies are all counted: divide each array's squares by its own."),
            (
                sum(s / copies**2 for s, (_, copies) in zip(squares, parts)),
                "divide the squares by the copies, not the numbers before they are squared.",
            ),
            (
                sum(s * copies for s, (_, copies) in zip(squares, parts)),
                "divide by the copies, do not multiply by them.",
            ),
            (lengths**2, "lengths do not add up, their squares do."),
            (once**2, "the square root is missing."),
        )
        for wrong, sentence in mistakes:
            if (
                wrong
                and close_to(got, min(1.0, largest / np.sqrt(wrong)))
                and not close_to(got, right)
            ):
                return sentence
        if once and close_to(got, largest / np.sqrt(once)) and not close_to(got, right):
            return "a gradient that is short enough stays as it is: the factor is at most 1."
        if once and close_to(got, np.sqrt(once)):
            return "this is the length; the factor is largest / length, at most 1."
        if not close_to(got, right):
            return (
                f"for parts {parts} and the length {largest} it should be {right:.4g}, not {got}."
            )
    return None


# ---------------------------------------------------------------- 08.3: the planner in small


@exercise(
    "08.3",
    hint="First keep those that fit, then take min(..., key=seconds).",
    shows="Memory decides what is possible, time what is chosen.",
)
def best(answer):
    """Exercise 08.3: the fastest of the layouts that fit."""
    seconds = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 2.5, "e": 1.5}
    nbytes = {"a": 10, "b": 90, "c": 40, "d": 20, "e": 15}
    rooms = ((50, "e"), (100, "b"), (90, "b"), (20, "e"), (15, "e"), (14, "a"), (5, "none fits"))
    for room, right in rooms:
        got = answer(list(seconds), seconds.get, nbytes.get, room)
        if not isinstance(got, str):
            return f"return one layout, or the words, not {got!r}."
        if got == right:
            continue
        where = f"with room for {room} bytes"
        if got in nbytes and nbytes[got] > room:
            return f"{where}: {got!r} needs {nbytes[got]}, it does not fit."
        if right == "none fits":
            return f'{where} nothing fits: return "none fits".'
        if got in nbytes and nbytes[got] == min(nbytes.values()):
            return f"{where}: {got!r} needs the least memory; among those that fit, time decides."
        if got in nbytes and nbytes[got] == max(n for n in nbytes.values() if n <= room):
            return f"{where}: {got!r} fills the room best; among those that fit, time decides."
        if got in seconds and seconds[got] > seconds[right]:
            return f"{where}: {got!r} fits, but {right!r} is faster and fits too."
        return f"{where} it should be {right!r}, not {got!r}."
    return None


# ---------------------------------------------------------------- 08.4: dropped tokens


@exercise(
    "08.4",
    hint="The room of an expert is ceil(factor * tokens / experts); add up what is beyond.",
    shows="The more unevenly tokens fall, the more are dropped at one capacity.",
)
def dropped(answer):
    """Exercise 08.4: how many tokens find their expert full."""
    for asked, factor in (
        ([10, 2, 4, 0], 1.25),
        ([4, 4, 4, 4], 1.0),
        ([7, 3, 1], 1.0),
        ([16, 0, 0, 0], 2.0),
        ([5, 5], 1.5),
        ([4, 0, 0], 1.0),
        ([9, 3, 1], 1.25),
    ):
        room = int(np.ceil(factor * sum(asked) / len(asked)))
        exact = factor * sum(asked) / len(asked)
        share = int(np.ceil(sum(asked) / len(asked)))
        right = sum(max(0, n - room) for n in asked)
        got = answer(list(asked), factor)
        mistakes = (
            (sum(n - room for n in asked), "experts with room to spare do not make up for others."),
            (sum(min(n, room) for n in asked), "these are the ones that are kept."),
            (
                sum(max(0, n - round(exact)) for n in asked),
                "round the capacity up, not to the nearest whole number.",
            ),
            (sum(max(0, n - int(exact)) for n in asked), "round the capacity up, not down."),
            (
                sum(max(0, n - int(np.ceil(share * factor))) for n in asked),
                "multiply the share by the factor first, then round up: once, at the end.",
            ),
            (
                sum(max(0, n - share * factor) for n in asked),
                "the even share is not rounded; the capacity is, at the end.",
            ),
            (sum(max(0, n - exact) for n in asked), "the capacity is a whole number: round it up."),
            (
                sum(max(0, n - int(np.ceil(factor * sum(asked)))) for n in asked),
                "an even share is the tokens divided by the experts.",
            ),
            (
                sum(max(0, n - share) for n in asked),
                "the capacity factor is missing.",
            ),
            (sum(n > room for n in asked), "this counts the full experts, not the dropped tokens."),
        )
        for wrong, sentence in mistakes:
            if close_to(got, wrong) and wrong != right:
                return sentence
        if not close_to(got, right):
            return f"for {asked} and the factor {factor} it should be {right}, not {got}."
    return None


# ---------------------------------------------------------------- 08.5: the cache


@exercise(
    "08.5",
    hint="Two times width numbers for each text, position and block; divide by all three axes.",
    shows="With long texts the cache is larger than the model, and all three axes divide it.",
)
def cache_bytes(answer):
    """Exercise 08.5: bytes of the cache of keys and values on one rank."""
    for case in (
        (8, 100, 16, 64, (2, 4, 8), 4),
        (1, 2048, 32, 4096, (1, 8, 1), 2),
        (16, 10, 6, 12, (4, 1, 3), 8),
        (4, 50, 8, 32, (1, 1, 1), 4),
    ):
        texts, positions, blocks, width, mesh, itemsize = case
        whole = 2 * texts * positions * blocks * width * itemsize
        data, tensor, pipeline = mesh
        right = whole / (data * tensor * pipeline)
        got = answer(*case)
        mistakes = (
            (right / 2, "there are keys and values: twice as much."),
            (whole, "this is the cache of all ranks together."),
            (whole / tensor, "texts are shared out and blocks are dealt out too."),
            (whole / (tensor * pipeline), "the data ranks share out the texts."),
            (whole / (data * tensor), "the pipeline ranks share out the blocks."),
            (whole / (data * pipeline), "the tensor ranks share out the heads."),
            (right / itemsize, "these are numbers; multiply by their bytes."),
            (right / positions, "a position of the text is missing: every one is kept."),
        )
        for wrong, sentence in mistakes:
            if close_to(got, wrong) and not close_to(wrong, right):
                return sentence
        if not close_to(got, right):
            return f"for {case} it should be {right:g} bytes, not {got}."
    return None


# ---------------------------------------------------------------- the quiz


@exercise(
    "08.quiz",
    hint="Sections 3, 5, 6, 7, 8 and 9.",
    shows="On a mesh the sums decide what is learnt, and the wires how fast.",
)
def quiz(answers):
    """The quiz of notebook 08."""
    right = {"1": "b", "2": "a", "3": "c", "4": "b", "5": "b", "6": "a"}
    why = {
        "1a": "a crash would be a relief: shapes fit, and the loss even falls.",
        "1c": "each data rank sums its table along the data axis; that is not the exchange here.",
        "2b": "the norm grows with the mesh, so clipping starts earlier, not later.",
        "2c": "the direction stays; it is only shortened too much, and differently on every mesh.",
        "3a": "the data axis sends once a step and waits for nothing in between.",
        "3b": "a pipeline sends between stages only, once each way for each micro-batch.",
        "4a": "the files hold whole layers; no rank's number stands in them.",
        "4c": "Adam's moments belong to it: without them the next steps differ.",
        "5a": "capacity is a limit for each expert; free room elsewhere does not help.",
        "5c": "the token goes on around the mixture, unchanged: nothing is lost but its expert.",
        "6b": "every text must pass all stages for each of its tokens: the way stays as long.",
        "6c": "copies of the model write other texts; one text's next token takes as long.",
    }
    return check_letters(answers, right, why)
