"""Typical wrong answers to the exercises of notebook 05, and a piece of what the check says."""

import math

import numpy as np


def _rows(x, w, rank, ranks):
    part = len(w) // ranks
    mine = slice(rank * part, (rank + 1) * part)
    return x[:, mine] @ w[mine]


def _columns(x, w, b, rank, ranks):
    part = w.shape[1] // ranks
    mine = slice(rank * part, (rank + 1) * part)
    return x @ w[:, mine] + b[mine]


def _never_gathers(cuts):
    return cuts.count("rows")


def _forgets_the_end(cuts):
    count, whole = 0, True
    for cut in cuts:
        count += 1 if cut == "rows" else not whole
        whole = cut == "rows"
    return count


def _pays_for_cutting(cuts):
    count, whole = 0, True
    for cut in cuts:
        count += 1 + whole * (count > 0) if cut == "rows" else not whole
        whole = cut == "rows"
    return count + (not whole)


def _factors(a, b):
    top = max(a[0], b[0])
    return top, np.exp(a[0] - top), np.exp(b[0] - top)


def _merge(a, b, top=None, result=None):
    high, left, right = _factors(a, b)
    total = left * a[1] + right * b[1]
    whole = left * a[2] + right * b[2]
    return (
        high if top is None else top(a, b),
        total,
        whole if result is None else result(a, b, whole, total),
    )


def _inverse(a, b):
    top, left, right = _factors(a, b)
    return top, a[1] / left + b[1] / right, a[2] / left + b[2] / right


def _overflows(a, b):
    left, right = np.exp(a[0]), np.exp(b[0])
    return 0.0, left * a[1] + right * b[1], left * a[2] + right * b[2]


def _kept(width, length, heads, ranks, sequence):
    outside, inside = 4 * width, 12 * width + heads * length
    return (outside + inside) / ranks if sequence else outside + inside / ranks


WRONG = {
    "05.1": [
        (lambda x, w, b, k, n: _rows(x, w, k, n) + b, "b is added on every rank"),
        (lambda x, w, b, k, n: _rows(x, w, k, n), "nobody adds b"),
        (lambda x, w, b, k, n: x @ w + b, "brings the whole result"),
        (_columns, "they cannot be added up"),
        (lambda x, w, b, k, n: (x @ w + b) / n, "the rank's number is not used"),
        (lambda x, w, b, k, n: _rows(x, w, k, n) + 3 * b * (k == 0), "differs from x @ w + b"),
        (lambda x, w, b, k, n: (x @ w + b) * (k == 0), "of its own rows: x[:, 0:3] @ w[0:3]"),
        (lambda x, w, b, k, n: _rows(x, w, k, n) + b * (n > 1 and k == 0), "on 1 rank, nobody"),
    ],
    "05.2": [
        (_never_gathers, "gather it"),
        (_forgets_the_end, "at the end every rank needs the whole result"),
        (_pays_for_cutting, "to cut it costs nothing"),
        (lambda cuts: 7, "it should be"),
        (len, "can take a cut input as it is"),
    ],
    "05.3": [
        (lambda w, r, b, s: 1 + 6 * w * b * s / r, "round down"),
        (lambda w, r, b, s: math.ceil(1 + 6 * w * b * s / r), "rounded up"),
        (lambda w, r, b, s: int(6 * w * b * s / r), "add the 1 again"),
        (lambda w, r, b, s: int(1 + 6 * w * b / r), "the share is missing"),
        (lambda w, r, b, s: int(1 + 6 * w * b / (s * r)), "multiply by it"),
        (lambda w, r, b, s: int(1 + r * s / (6 * w * b)), "upside down"),
        (lambda w, r, b, s: 77, "it should be"),
    ],
    "05.4": [
        (lambda a, b: (max(a[0], b[0]), a[1] + b[1], a[2] + b[2]), "different tops"),
        (lambda a, b: _merge(a, b, result=lambda a, b, *_: a[2] + b[2]), "by the same factors"),
        (lambda a, b: _merge(a, b, result=lambda a, b, y, t: y / t), "leave the result undivided"),
        (lambda a, b: _merge(a, b, top=lambda a, b: a[0] + b[0]), "not their sum"),
        (lambda a, b: _merge(a, b, top=lambda a, b: 2 * a[0]), "the top of 1001 and 1003"),
        (_inverse, "upside down"),
        (_overflows, "overflow"),
        (lambda a, b: a[0], "return three things"),
        (lambda a, b: (max(a[0], b[0]), 1.0, a[2]), "the new total should be"),
    ],
    "05.5": [
        (lambda w, s, h, n, q: 16 * w + h * s, "divide what is cut"),
        (lambda w, s, h, n, q: _kept(w, s, h, n, False), "are cut too"),
        (lambda w, s, h, n, q: _kept(w, s, h, n, True), "lie whole on every rank"),
        (lambda w, s, h, n, q: 4 * w + 12 * w / n + h * s, "are cut with the heads"),
        (lambda w, s, h, n, q: _kept(w, s, h, n, q) - h * s / n, "weights are missing"),
        (lambda w, s, h, n, q: _kept(w, s, h, n, q) + (s - 1) * h * s / n, "not their square"),
        (lambda w, s, h, n, q: _kept(w, s, h, n, q) + (s - h * s) / n, "multiply by the heads"),
        (lambda w, s, h, n, q: _kept(w, s, h, n, q) + 2 / (n if q else 1), "two deviations"),
        (lambda w, s, h, n, q: 5.0, "it should be"),
    ],
    "05.quiz": [
        ({"1": "a", "2": "b", "3": "a", "4": "c", "5": "b"}, "only after a gather"),
        ({"1": "b", "2": "b", "3": "a", "4": "c", "5": "b"}, "no sum of GELUs"),
        ({"1": "c", "2": "a", "3": "a", "4": "c", "5": "b"}, "every position's vector"),
        ({"1": "c", "2": "c", "3": "a", "4": "c", "5": "b"}, "activations travel"),
        ({"1": "c", "2": "b", "3": "b", "4": "c", "5": "b"}, "the largest array"),
        ({"1": "c", "2": "b", "3": "c", "4": "c", "5": "b"}, "is not enough"),
        ({"1": "c", "2": "b", "3": "a", "4": "a", "5": "b"}, "the bytes are the same"),
        ({"1": "c", "2": "b", "3": "a", "4": "b", "5": "b"}, "what lies between them"),
        ({"1": "c", "2": "b", "3": "a", "4": "c", "5": "a"}, "the mask makes the difference"),
        ({"1": "c", "2": "b", "3": "a", "4": "c", "5": "c"}, "in the ring"),
    ],
}
