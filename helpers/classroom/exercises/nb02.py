"""Exercises of notebook 02, The textbook's example, repaired."""

from __future__ import annotations

import numpy as np

from helpers.classroom.checks import check_letters, close_to, exercise

# ---------------------------------------------------------------- 02.1: a test for training


def _parts(X, y, n_splits):
    return list(zip(np.array_split(X, n_splits), np.array_split(y, n_splits), strict=True))


def _fresh(model, X, y):
    from sklearn.base import clone

    return clone(model).fit(X, y)


def _right(X, y, model, n_splits):
    return [_fresh(model, *part) for part in _parts(X, y, n_splits)]


def _textbook(X, y, model, n_splits):
    return [model.fit(*part) for part in _parts(X, y, n_splits)]


def _all_learn_all(X, y, model, n_splits):
    return [_fresh(model, X, y) for _ in range(n_splits)]


def _exchanged(X, y, model, n_splits):
    return _right(X, y, model, n_splits)[::-1]


def _middle_exchanged(X, y, model, n_splits):
    results, middle = _right(X, y, model, n_splits), n_splits // 2
    results[middle - 1], results[middle] = results[middle], results[middle - 1]
    return results


def _one_repeated(X, y, model, n_splits):
    parts = _parts(X, y, n_splits)
    return [_fresh(model, *part) for part in [*parts[:-1], *parts[-2:-1]]]


def _one_missing(X, y, model, n_splits):
    return _right(X, y, model, n_splits)[:-1]


def _copies_of_the_last(X, y, model, n_splits):
    from copy import deepcopy

    return [deepcopy(r) for r in _textbook(X, y, model, n_splits)]


_FAULTY = (
    (_textbook, "it passes the textbook's program, in which four results are one object."),
    (
        _copies_of_the_last,
        "it passes a program that returns four copies of the last fit: other objects, one answer.",
    ),
    (
        _all_learn_all,
        "it passes a program in which every model learns from all rows, not from its part.",
    ),
    (_exchanged, "it passes a program that returns the right models in the wrong order."),
    (_one_missing, "it passes a program that leaves out the last part."),
    (
        _middle_exchanged,
        "it passes a program that exchanges two parts in the middle: look at every model.",
    ),
    (
        _one_repeated,
        "it passes a program whose last model learnt from the part before: look at every model.",
    ),
)


@exercise(
    "02.1",
    hint="Give each part known weights of its own; then you know all four answers beforehand.",
    shows="Data with a known answer finds every faulty program that the check tried.",
)
def sound_training(answer):
    """Exercise 02.1: a test that tells a sound training function from a faulty one."""
    if not callable(answer):
        return "give the function itself: check(..., is_sound), without calling it."
    try:
        verdict = answer(_right)
    except AssertionError:
        return (
            "it rejects a right program, with an AssertionError: a clone for each part, in order."
        )
    if not isinstance(verdict, (bool, np.bool_)):
        return f"the test should return True or False; it returned a {type(verdict).__name__}."
    if not verdict:
        return "it rejects a right program: a clone for each part, in the order of the parts."
    for train, sentence in _FAULTY:
        try:
            passed = bool(answer(train))
        except (IndexError, ValueError):  # the reader's test stumbled over it: found, too
            passed = False
        except AssertionError:
            return "it finds a faulty program, but by an error: return False in place of `assert`."
        if passed:
            return sentence
    return None


# ---------------------------------------------------------------- 02.2: merging averages


def _rows(seed, *sizes, d=3):
    """Parts of a made-up data set, as (X_k with a constant column, y_k)."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=d + 1) * 3
    parts = []
    for n in sizes:
        X = np.column_stack([rng.normal(size=(n, d)) + 1, np.ones(n)])
        parts.append((X, X @ w + rng.normal(size=n)))
    return parts


@exercise(
    "02.2",
    hint="n_a · w_a is the sum that stands behind a mean. What is the sum behind the merged one?",
    shows="Merged pairs give the mean of all parts, in any order: a tree of workers can do it.",
)
def merge_two_means(answer):
    """Exercise 02.2: two weighted means become one."""
    w_a, w_b = np.array([1.0, 4.0, -2.0]), np.array([3.0, 0.0, 10.0])
    n_a, n_b = 30, 10
    mean = (n_a * w_a + n_b * w_b) / (n_a + n_b)
    got = answer((w_a.copy(), n_a), (w_b.copy(), n_b))
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        return "return a pair: the merged weights and the number of rows behind them."
    w, n = got
    mistakes = (
        (
            (w_a + w_b) / 2,
            "this is the plain mean; 30 rows should count three times as much as 10.",
        ),
        ((n_b * w_a + n_a * w_b) / (n_a + n_b), "each mean is weighted with the other's rows."),
        (n_a * w_a + n_b * w_b, "this is the sum; divide it by the number of rows of both."),
        ((n_a * w_a + n_b * w_b) / 2, "you divided by 2, not by the number of rows of both."),
    )
    for wrong, sentence in mistakes:
        if close_to(w, wrong, 1e-9):
            return sentence
    if not close_to(w, mean, 1e-9):
        return f"for {w_a} of 30 rows and {w_b} of 10 rows it should be {mean}, not {w}."
    if n != n_a + n_b:
        return f"the merged weights stand for {n_a + n_b} rows, not for {n}: a third part needs it."
    w, n = answer((w_a.copy(), 7), (w_b.copy(), 21))
    if not close_to(w, (w_a + 3 * w_b) / 4, 1e-9) or n != 28:
        return (
            "it is right for parts of 30 and 10 rows only; use the numbers that come in the pairs."
        )
    return None


# ---------------------------------------------------------------- 02.3: bytes


@exercise(
    "02.3",
    hint="How many numbers do both sums have together? What do they share with those of the rows?",
    shows="From three rows more than features on, the sums are smaller than the rows.",
)
def break_even_rows(answer):
    """Exercise 02.3: from how many rows on sums are smaller than rows."""
    d = 2  # here all mistakes differ
    mistakes = {
        d + 2: "with d + 2 rows both are equally large; we ask where the sums are smaller.",
        d + 1: "XᵀX alone has (d + 1)² numbers; Xᵀy adds d + 1 more.",
        (d + 1) * (d + 2) // d + 1: "a row has its target besides its features: d + 1 numbers.",
        (d + 1) * (d + 2): "these are the numbers in the sums; divide by the numbers in a row.",
        (d + 1) ** 2: "these are the numbers in XᵀX; we ask for rows.",
        8 * (d + 3): "8 bytes for each number stand on both sides and cancel.",
    }
    got = answer(d)
    for wrong, sentence in mistakes.items():
        if close_to(got, wrong, 1e-12):
            return sentence
    for d in (50, 1, 37, 1000):
        got = answer(d)
        if not close_to(got, d + 3, 1e-12):
            return _two_counts(d, got)
    return None


def _two_counts(d, n):
    """What the reader's own number of rows would mean."""
    if not close_to(n, np.round(n), 1e-12):
        return f"for d = {d} you say {n}: a number of rows is one whole number."
    rows, sums = int(n) * (d + 1), (d + 1) ** 2 + d + 1
    verdict = "fewer rows would do" if sums < rows else "the sums are not fewer"
    return f"for d = {d} and n = {n} the rows are {rows:,} numbers, the sums {sums:,}: {verdict}."


# ---------------------------------------------------------------- 02.4: R² from sums


@exercise(
    "02.4",
    hint="Multiply out both sums of squares; n and Σy are among the given numbers, too.",
    shows="The quality of a model, too, can be had from sums: no row has to travel.",
)
def r2_from_sums(answer):
    """Exercise 02.4: R² of a linear model from sums over the rows."""
    ((X, y),) = _rows(4, 60)
    w = np.linalg.lstsq(X, y, rcond=None)[0] + np.array([0.3, -0.2, 0.1, 0.4])
    A, c, yy, n = X.T @ X, X.T @ y, float(y @ y), len(y)
    rest, total = float(np.sum((y - X @ w) ** 2)), float(np.sum((y - y.mean()) ** 2))
    wAw, wc = float(w @ A @ w), float(w @ c)
    mistakes = (
        (1 - rest / yy, "the target's mean is missing: compare with Σy² − (Σy)²/n, not with Σy²."),
        (1 - (yy - wc + wAw) / total, "the middle term, wᵀXᵀy, counts twice."),
        (1 - (yy - wc) / total, "that short form holds only for the least-squares w, not for any."),
        (1 - (yy - 2 * wc) / total, "the term wᵀXᵀXw is missing."),
        (rest / total, "this is the share that is not explained; R² is 1 minus it."),
        (1 - rest / (total / n), "you divided by the variance, which is already divided by n."),
        (1 - rest / (yy - c[-1] ** 2), "(Σy)² must be divided by n before it is subtracted."),
        (wAw / total, "the predictions' squares do not show how far they are from the target."),
        (
            1 - (yy - wAw) / total,
            "the explained share is R² only for the least-squares w, not for any.",
        ),
        (
            1 - rest / (yy - c[-1] ** 2 / len(c)),
            "len(Xty) counts the features and the constant; n is the number of rows.",
        ),
        (
            1 - (yy - c @ np.linalg.solve(A, c)) / total,
            "this is the R² of the best weights; use the w that is given.",
        ),
    )
    got = answer(A.copy(), c.copy(), yy, w.copy())
    if np.shape(got) != () and np.size(got) == 1:
        return f"return a number, not an array of the shape {np.shape(got)}."
    for wrong, sentence in mistakes:
        if close_to(got, wrong, 1e-8):
            return sentence
    if not close_to(got, 1 - rest / total, 1e-8):
        return f"for 60 made-up rows it should be {1 - rest / total:.4f}, not {got}."
    return None


# ---------------------------------------------------------------- 02.5: forget one part


def _sums(X, y):
    return X.T @ X, X.T @ y


def _refit(X, y):
    """The weights of scikit-learn, whose constant is the last; X holds the column of ones."""
    from sklearn.linear_model import LinearRegression

    fitted = LinearRegression().fit(X[:, :-1], y)
    return np.append(fitted.coef_, fitted.intercept_)


@exercise(
    "02.5",
    hint="What was added can be subtracted. Then ask what is left in the airline's own column.",
    shows="Sums can be taken out again: the model forgets a part exactly, without the rows.",
)
def forget_a_part(answer):
    """Exercise 02.5: the model of all rows but one part, from sums."""
    (X_a, y_a), (X_b, y_b) = _rows(5, 50, 20)
    y_b = y_b + X_b[:, 0] * 4  # the part to forget knows another truth
    kept, gone = _sums(X_a, y_a), _sums(X_b, y_b)
    total = (kept[0] + gone[0], kept[1] + gone[1])
    given = (total[0].copy(), total[1].copy()), (gone[0].copy(), gone[1].copy())
    got = answer(*given)
    if isinstance(got, (tuple, list)) and len(got) == 2:
        return "these are sums; solve them and return the weights."
    right, w_total, w_gone = (np.linalg.solve(*sums) for sums in (kept, total, gone))
    mistakes = (
        (w_total, "nothing is forgotten yet: this is the model of all rows."),
        (w_gone, "this is the model of the part to forget alone."),
        (w_total - w_gone, "you subtracted answers; only sums may be subtracted."),
        (
            (70 * w_total - 20 * w_gone) / 50,
            "a difference of answers, weighted by rows, is only near: subtract sums.",
        ),
        (np.linalg.solve(total[0], kept[1]), "XᵀX still holds the part: subtract both sums."),
        (np.linalg.solve(kept[0], total[1]), "Xᵀy still holds the part: subtract both sums."),
        (
            np.linalg.solve(total[0] + gone[0], total[1] + gone[1]),
            "the part was added once more.",
        ),
    )
    for wrong, sentence in mistakes:
        if close_to(got, wrong, 1e-8):
            return sentence
    if not close_to(got, right, 1e-8):
        return f"without the part the weights are {right.round(3)}; your function says {got}."
    if not np.array_equal(given[0][0], total[0]) or not np.array_equal(given[0][1], total[1]):
        return "your function changes the sums it was given; `a - b` makes new ones, `a -= b` not."
    return _forgets_a_part_with_a_column_of_its_own(answer)


def _forgets_a_part_with_a_column_of_its_own(answer):
    """As an airline has: without its rows, the column is empty."""
    (X_a, y_a), (X_b, y_b) = _rows(6, 50, 20)
    X_a, X_b = (np.insert(X, 1, own, axis=1) for X, own in ((X_a, 0.0), (X_b, 1.0)))
    kept, gone = _sums(X_a, y_a), _sums(X_b, y_b + 2)
    try:
        got = answer((kept[0] + gone[0], kept[1] + gone[1]), gone)
    except np.linalg.LinAlgError:
        got = None
    if got is None or not close_to(got, _refit(X_a, y_a), 1e-8):
        return (
            "a part with a column of its own leaves that column empty, and no single answer is "
            "left: think of section 4.3 and its smallest_solution."
        )
    return None


# ---------------------------------------------------------------- quiz


@exercise(
    "02.quiz",
    hint="Sections 2.4, 3.1, 4.5 and 3.5, in this order.",
    shows="You can tell what a parallel program should return, and when a mean is enough.",
)
def quiz(answers):
    """The quiz of notebook 02."""
    right = {"1": "b", "2": "c", "3": "a", "4": "b"}
    why = {
        "1a": "the wrong program has the same R²; a test that both pass proves nothing.",
        "1c": "a linear model recovers linear data well; here there was nothing to find.",
        "2a": "copying the list copies four references to the same object.",
        "2b": "another order leaves one object, which then holds another part's fit.",
        "3b": "the weights by rows hardly change anything: months have about equal sizes.",
        "3c": "each month has about 20,000 rows, the random parts had 131; days are what it lacks.",
        "4a": "a mean of answers weighs by rows, not by what the rows say about each weight.",
        "4c": "a weight that only one airline's rows tell is lost in a median.",
    }
    return check_letters(answers, right, why)
