"""Typical wrong answers to the exercises of notebook 04, and a piece of what the check says."""

import math

import numpy as np


def _steps(batch, s, b):
    return s * (1 + b / batch)


def _changes_the_residual(gradient, residual, keep):
    residual += gradient
    sent = keep(residual)
    return sent, residual - sent


def _zero(size, ranks, stage):
    kept = 12 / (ranks if stage >= 1 else 1) + 2 / (ranks if stage >= 2 else 1)
    return size * (kept + 2 / (ranks if stage >= 3 else 1))


def _length(parts):
    return np.sqrt(sum(np.sum(part**2) for part in parts))


def _clip(part, largest):
    return part * min(1, largest / (np.linalg.norm(part) or 1))


def _clips_in_place(parts, largest):
    for part in parts:
        part *= 0.5
    return parts


WRONG = {
    "04.1": [
        (lambda n, p, s, b, row, x: _steps(n, s, b), "these are the steps"),
        (lambda n, p, s, b, row, x: _steps(n, s, b) * (n * row + x), "divide its rows"),
        (lambda n, p, s, b, row, x: _steps(n, s, b) * n / p * row, "exchange of each step"),
        (lambda n, p, s, b, row, x: _steps(n, s, b) * n / p * row + x, "not only one"),
        (lambda n, p, s, b, row, x: s * (1 + n / b) * (n / p * row + x), "upside down"),
        (lambda n, p, s, b, row, x: s * (n / p * row + x), "more rows than B_crit"),
        (lambda n, p, s, b, row, x: _steps(n, s, b) * (n * row + x) / p, "is not shared"),
        (lambda n, p, s, b, row, x: _steps(n, s, b) * (n * p * row + x), "of all ranks together"),
        (lambda n, p, s, b, row, x: 1.0, "it should be"),
        (12.5, "give the function itself"),
    ],
    "04.2": [
        (lambda c, x, share: x * (1 - share) / (share * c), "round up"),
        (lambda c, x, share: math.ceil(x / (share * c)), "belongs to the round"),
        (lambda c, x, share: int(x * (1 - share) / (share * c)), "rounded down"),
        (lambda c, x, share: math.floor(x * (1 - share) / (share * c)) + 1, "use ceil"),
        (lambda c, x, share: math.ceil(x / c), "half of the time"),
        (lambda c, x, share: math.ceil(x * share / c), "a smaller share needs a larger H"),
        (lambda c, x, share: 3, "it should be"),
    ],
    "04.3": [
        (lambda g, r, keep: (keep(g), g - keep(g)), "never used"),
        (lambda g, r, keep: (keep(g + r), g - keep(g + r)), "forgets the old one"),
        (lambda g, r, keep: (keep(g + r), g + r), "sent twice"),
        (lambda g, r, keep: (keep(g + r), keep(g + r) - g - r), "wrong sign"),
        (lambda g, r, keep: (g + r, np.zeros(3)), "all of it is sent"),
        (lambda g, r, keep: (keep(g) + r, g - keep(g)), "travels whole"),
        (lambda g, r, keep: (keep(g), r + g - keep(g)), "never travels"),
        (lambda g, r, keep: (g + r - keep(g + r), keep(g + r)), "wrong way round"),
        (lambda g, r, keep: keep(g + r), "return a pair"),
        (_changes_the_residual, "changes what it was given"),
        (lambda g, r, keep: (2 * keep(g + r), r), "in step 1 of the check"),
    ],
    "04.4": [
        (lambda n, p, stage: 16 * n, "divide what the stage divides"),
        (lambda n, p, stage: 16 * n / p, "right in stage 3 only"),
        (lambda n, p, stage: _zero(1, p, stage), "multiply by their number"),
        (lambda n, p, stage: p * _zero(n, p, stage), "all ranks keep together"),
        (lambda n, p, stage: _zero(n, p, stage + 1), "of the next stage"),
        (lambda n, p, stage: _zero(n, p, (0, 1, 1, 3)[stage]), "of the stage before"),
        (lambda n, p, stage: 5, "it should be"),
    ],
    "04.5": [
        (lambda parts, largest: [_clip(part, largest) for part in parts], "its own length"),
        (
            lambda parts, largest: [part * largest / (_length(parts) or 1) for part in parts],
            "must stay as it is",
        ),
        (
            lambda parts, largest: [
                part * min(1, largest / (sum(np.linalg.norm(p) for p in parts) or 1))
                for part in parts
            ],
            "lengths do not add up",
        ),
        (
            lambda parts, largest: [
                part * min(1, largest / (_length(parts) ** 2 or 1)) for part in parts
            ],
            "square root is missing",
        ),
        (
            lambda parts, largest: [np.clip(part, -largest, largest) for part in parts],
            "each number is cut by itself",
        ),
        (lambda parts, largest: np.concatenate(parts), "return a list"),
        (lambda parts, largest: [part.copy() for part in parts], "it should be"),
        (_clips_in_place, "changes the parts"),
        (
            lambda parts, largest: [
                part / _length(parts) * min(_length(parts), largest) for part in parts
            ],
            "do not divide by it",
        ),
    ],
    "04.quiz": [
        ({"1": "a", "2": "b", "3": "b", "4": "b", "5": "a"}, "far below the critical batch"),
        ({"1": "b", "2": "a", "3": "b", "4": "b", "5": "a"}, "parts that are alike"),
        ({"1": "b", "2": "b", "3": "a", "4": "b", "5": "a"}, "holds for one worker"),
        ({"1": "b", "2": "b", "3": "b", "4": "c", "5": "a"}, "half as many bytes again"),
        ({"1": "b", "2": "b", "3": "b", "4": "b", "5": "c"}, "a bound drops nothing"),
        ({"1": "b"}, "a letter for each"),
    ],
}
