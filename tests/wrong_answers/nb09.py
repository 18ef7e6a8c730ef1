"""Typical wrong answers to the exercises of notebook 09, and a piece of what the check says."""

import numpy as np


def _spreads(a, b, ddof=1):
    d = np.subtract(a, b)
    return np.std(d, ddof=ddof), np.sqrt(np.var(a, ddof=ddof) + np.var(b, ddof=ddof))


def _metropolis(edges, of=np.maximum, plus=1):
    degree = edges.sum(axis=1)
    weights = edges / (plus + of.outer(degree, degree))
    return weights + np.diag(1 - weights.sum(axis=1))


def _plain_mean(edges):
    own = edges + np.eye(len(edges))
    return own / own.sum(axis=1, keepdims=True)


def _no_diagonal(edges):
    weights = _metropolis(edges)
    return weights - np.diag(np.diag(weights))


def _changes(edges):
    edges[0, 0] = 1
    return edges


def _others(said, me):
    return np.delete(said, me, axis=0)


def _adds_in_place(y, said, me, weight):
    y += weight * _others(said, me).mean(axis=0)
    return y / (1 + weight)


WRONG = {
    "09.1": [
        (lambda a, b: _spreads(a, b)[::-1], "wrong way round"),
        (lambda a, b: _spreads(a, b, 0), "use ddof=1"),
        (
            lambda a, b: (_spreads(a, b)[0], np.std(a, ddof=1) + np.std(b, ddof=1)),
            "do not add up",
        ),
        (lambda a, b: (_spreads(a, b)[0], _spreads(a, b)[1] ** 2), "root of the second"),
        (
            lambda a, b: (abs(np.std(a, ddof=1) - np.std(b, ddof=1)), _spreads(a, b)[1]),
            "subtract seed by seed",
        ),
        (lambda a, b: (np.mean(a) - np.mean(b), _spreads(a, b)[1]), "mean gain"),
        (lambda a, b: _spreads(a, b)[0], "return a pair"),
        (lambda a, b: np.array([1.0, 2.0]), "and b = [0.69"),
        (lambda a, b: a - b, "unsupported operand"),
    ],
    "09.2": [
        (lambda s, r, k: s * (r + (1 - r) / k), "square it"),
        (lambda s, r, k: s**2 / k, "nothing in common"),
        (lambda s, r, k: s**2 * (1 - r + r / k), "changed places"),
        (lambda s, r, k: s**2 * (1 - r) / k, "is missing"),
        (lambda s, r, k: s**2 * r, "falls with k"),
        (lambda s, r, k: s * (r + (1 - r) / k) ** 0.5, "standard deviation: the variance"),
        (lambda s, r, k: 7.0, "it should be"),
        (0.5, "give the function itself"),
    ],
    "09.3": [
        (lambda y, s, me, w: (y + w * s.mean(axis=0)) / (1 + w), "leave the model itself out"),
        (lambda y, s, me, w: y + w * _others(s, me).mean(axis=0), "sum of the weights"),
        (lambda y, s, me, w: (y + w * _others(s, me).sum(axis=0)) / (1 + w), "take their mean"),
        (lambda y, s, me, w: (y + _others(s, me).mean(axis=0)) / 2, "use `weight`"),
        (lambda y, s, me, w: _others(s, me).mean(axis=0), "labels y are missing"),
        (
            lambda y, s, me, w: (w * y + _others(s, me).mean(axis=0)) / (1 + w),
            "belongs to the others",
        ),
        (lambda y, s, me, w: (y + w * s[me]) / (1 + w), "model itself says"),
        (_adds_in_place, "changes what it was given"),
        (lambda y, s, me, w: y, "it should be"),
    ],
    "09.4": [
        (lambda n, h, p: 2 * p * n * h * 8, "nothing to itself"),
        (lambda n, h, p: (p - 1) * n * h * 8, "twice as much"),
        (lambda n, h, p: 2 * (p - 1) * n * h, "each has 8 bytes"),
        (lambda n, h, p: 2 * n * h * 8, "for two parties"),
        (lambda n, h, p: 2 * (p - 1) * h * 8, "for one row"),
        (lambda n, h, p: 2 * p * (p - 1) * n * h * 8 if p > 2 else 2 * (p - 1) * n * h * 8, "talk"),
        (lambda n, h, p: 99, "it should be"),
    ],
    "09.5": [
        (_plain_mean, "not symmetric"),
        (_no_diagonal, "diagonal is missing"),
        (lambda edges: _metropolis(edges, np.minimum), "not the smaller"),
        (lambda edges: _metropolis(edges, plus=0), "the rank itself counts too"),
        (lambda edges: np.full(edges.shape, 1 / len(edges)), "of the complete graph"),
        (lambda edges: edges / 10, "must sum to 1"),
        (lambda edges: np.eye(len(edges)), "row 0 should be"),
        (_changes, "changes the edges"),
    ],
    "09.quiz": [
        ({"1": "a", "2": "c", "3": "a", "4": "b", "5": "b"}, "what it is compared with"),
        ({"1": "b", "2": "b", "3": "a", "4": "b", "5": "b"}, "with correlation 1"),
        ({"1": "b", "2": "c", "3": "c", "4": "b", "5": "b"}, "different columns"),
        ({"1": "b", "2": "c", "3": "a", "4": "a", "5": "b"}, "errors of one view"),
        ({"1": "b", "2": "c", "3": "a", "4": "b", "5": "a"}, "but no sooner"),
        ({"1": "b"}, "a letter for each"),
    ],
}
