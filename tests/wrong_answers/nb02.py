"""Typical wrong answers to the exercises of notebook 02, and a piece of what the check says."""

import numpy as np
from sklearn.linear_model import LinearRegression


def _data():
    rng = np.random.default_rng(0)
    X = rng.random((80, 3))
    known = rng.random((4, 3))
    return X, known, np.concatenate([X[20 * k : 20 * k + 20] @ known[k] for k in range(4)])


def _results(train):
    X, _, y = _data()
    return train(X, y, LinearRegression(), 4)


def only_objects(train):
    return len({id(r) for r in _results(train)}) == 4


def right_of_one_truth(train):
    X, known, _ = _data()
    results = train(X, X @ known[0], LinearRegression(), 4)
    return all(np.allclose(r.coef_, known[0]) for r in results)


def only_different(train):
    results = _results(train)
    return len({tuple(r.coef_.ravel().round(6)) for r in results}) == len(results)


def without_the_length(train):
    _, known, _ = _data()
    return all(np.allclose(r.coef_, w) for r, w in zip(_results(train), known))


def _same(r, w):
    return np.allclose(r.coef_, w)


def only_first_and_last(train):
    _, known, _ = _data()
    results = _results(train)
    return len(results) == 4 and _same(results[0], known[0]) and _same(results[3], known[3])


def all_but_the_last(train):
    _, known, _ = _data()
    results = _results(train)
    return len(results) == 4 and all(map(_same, results[:3], known[:3]))


def with_assert(train):
    _, known, _ = _data()
    for r, w in zip(_results(train), known):
        np.testing.assert_allclose(r.coef_, w, atol=1e-9)
    return True


def rejects_with_assert(train):
    raise AssertionError


def best_weights(A, c, yy, w):
    w = np.linalg.solve(A, c)
    return 1 - (yy - w @ c) / (yy - c[-1] ** 2 / A[-1, -1])


def by_rows(total, part):
    n, n_part = total[0][-1, -1], part[0][-1, -1]
    return (n * solve(total) - n_part * solve(part)) / (n - n_part)


def in_place(total, part):
    total[0][:] -= part[0]
    total[1][:] -= part[1]
    return solve(total)


def solve(sums):
    return np.linalg.solve(*sums)


WRONG = {
    "02.1": [
        (right_of_one_truth, "four results are one object"),
        (lambda train: False, "rejects a right program"),
        (only_objects, "four copies of the last fit"),
        (only_different, "in the wrong order"),
        (without_the_length, "leaves out the last part"),
        (only_first_and_last, "exchanges two parts in the middle"),
        (all_but_the_last, "learnt from the part before"),
        (with_assert, "in place of `assert`"),
        (rejects_with_assert, "with an AssertionError"),
        (lambda train: "sound", "it returned a str"),
        (True, "without calling it"),
    ],
    "02.2": [
        (lambda a, b: ((a[0] + b[0]) / 2, a[1] + b[1]), "plain mean"),
        (lambda a, b: ((b[1] * a[0] + a[1] * b[0]) / 40, 40), "the other's rows"),
        (lambda a, b: (a[1] * a[0] + b[1] * b[0], 40), "this is the sum"),
        (lambda a, b: ((a[1] * a[0] + b[1] * b[0]) / 2, 40), "divided by 2"),
        (lambda a, b: (a[1] * a[0] + b[1] * b[0]) / (a[1] + b[1]), "return a pair"),
        (lambda a, b: ((a[1] * a[0] + b[1] * b[0]) / 40, 20), "stand for 40 rows"),
        (lambda a, b: (np.hstack([a[0], b[0]]), 40), "it should be"),
        (lambda a, b: (0.75 * a[0] + 0.25 * b[0], 40), "30 and 10 rows only"),
    ],
    "02.3": [
        (lambda d: d + 2, "equally large"),
        (lambda d: d + 1, "adds d + 1 more"),
        (lambda d: (d + 1) * (d + 2) // d + 1, "besides its features"),
        (lambda d: (d + 1) * (d + 2), "numbers in the sums"),
        (lambda d: (d + 1) ** 2, "we ask for rows"),
        (lambda d: 8 * (d + 3), "cancel"),
        (lambda d: 53, "for d = 1 and n = 53"),
        (lambda d: d + 4, "fewer rows would do"),
        (lambda d: d, "the sums are not fewer"),
        (lambda d: d + 2.5, "one whole number"),
    ],
    "02.4": [
        (lambda A, c, yy, w: 1 - (yy - 2 * w @ c + w @ A @ w) / yy, "mean is missing"),
        (
            lambda A, c, yy, w: 1 - (yy - w @ c + w @ A @ w) / (yy - c[-1] ** 2 / A[-1, -1]),
            "counts twice",
        ),
        (lambda A, c, yy, w: 1 - (yy - w @ c) / (yy - c[-1] ** 2 / A[-1, -1]), "short form"),
        (lambda A, c, yy, w: 1 - (yy - 2 * w @ c) / (yy - c[-1] ** 2 / A[-1, -1]), "is missing"),
        (
            lambda A, c, yy, w: (yy - 2 * w @ c + w @ A @ w) / (yy - c[-1] ** 2 / A[-1, -1]),
            "not explained",
        ),
        (
            lambda A, c, yy, w: 1 - (yy - 2 * w @ c + w @ A @ w) / (yy - c[-1] ** 2),
            "divided by n before",
        ),
        (
            lambda A, c, yy, w: 1 - (yy - w @ A @ w) / (yy - c[-1] ** 2 / A[-1, -1]),
            "the explained share",
        ),
        (
            lambda A, c, yy, w: 1 - (yy - 2 * w @ c + w @ A @ w) / (yy - c[-1] ** 2 / len(c)),
            "counts the features",
        ),
        (best_weights, "of the best weights"),
        (lambda A, c, yy, w: np.array([0.9]), "return a number"),
        (lambda A, c, yy, w: 1.0, "it should be"),
    ],
    "02.5": [
        (lambda total, part: solve(total), "nothing is forgotten"),
        (lambda total, part: solve(part), "to forget alone"),
        (lambda total, part: solve(total) - solve(part), "subtracted answers"),
        (lambda total, part: np.linalg.solve(total[0], total[1] - part[1]), "XᵀX still holds"),
        (lambda total, part: np.linalg.solve(total[0] - part[0], total[1]), "Xᵀy still holds"),
        (
            lambda total, part: np.linalg.solve(total[0] + part[0], total[1] + part[1]),
            "added once more",
        ),
        (lambda total, part: (total[0] - part[0], total[1] - part[1]), "these are sums"),
        (by_rows, "is only near"),
        (in_place, "makes new ones"),
        (
            lambda total, part: np.linalg.solve(total[0] - part[0], total[1] - part[1]),
            "a column of its own",
        ),
    ],
    "02.quiz": [
        ({"1": "a", "2": "c", "3": "a", "4": "b"}, "both pass proves nothing"),
        ({"1": "b", "2": "a", "3": "a", "4": "b"}, "copies four references"),
        ({"1": "b", "2": "c", "3": "b", "4": "b"}, "months have about equal sizes"),
        ({"1": "b", "2": "c", "3": "a", "4": "c"}, "is lost in a median"),
        ({"1": "b", "2": "c"}, "a letter for each"),
    ],
}
