"""The exercises of notebook 09: what is right, and what each typical mistake is told."""

from __future__ import annotations

import numpy as np

from helpers.classroom.checks import check_letters, close_to, exercise

# ---------------------------------------------------------------- 09.1: paired


def _paired(a, b, ddof=1):
    return float(np.std(np.asarray(a) - np.asarray(b), ddof=ddof))


def _unpaired(a, b, ddof=1):
    return float(np.sqrt(np.var(a, ddof=ddof) + np.var(b, ddof=ddof)))


@exercise(
    "09.1",
    hint="np.std of the differences; then the root of the two np.var added up; ddof=1 in both.",
    shows="What both methods share, such as easy rows, falls out of a paired difference.",
)
def spreads(answer):
    """Exercise 09.1: the spread of a difference, paired and not."""
    random = np.random.default_rng(0)
    base = random.normal(size=6)
    cases = (
        ([0.70, 0.66, 0.72, 0.68, 0.69], [0.69, 0.65, 0.71, 0.67, 0.68]),
        ((base + random.normal(size=6) / 5).tolist(), base.tolist()),
    )
    for a, b in cases:
        got = answer(list(a), list(b))
        if not _is_pair(got):
            return "return a pair: the paired spread, and the one without pairs."
        right = [_paired(a, b), _unpaired(a, b)]
        mistakes = (
            (right[::-1], "the pair is the wrong way round: first the paired spread."),
            ([_paired(a, b, 0), _unpaired(a, b, 0)], "use ddof=1: five numbers, four are free."),
            (
                [right[0], np.std(a, ddof=1) + np.std(b, ddof=1)],
                "standard deviations do not add up, variances do.",
            ),
            ([right[0], right[1] ** 2], "the root of the second number is missing."),
            ([right[0] ** 2, right[1] ** 2], "these are variances: take the roots."),
            (
                [abs(np.std(a, ddof=1) - np.std(b, ddof=1)), right[1]],
                "first subtract seed by seed, then take the spread of the differences.",
            ),
            ([np.mean(a) - np.mean(b), right[1]], "the first is the mean gain, not its spread."),
        )
        for wrong, sentence in mistakes:
            if _same(got, wrong) and not _same(wrong, right):
                return sentence
        if not _same(got, right):
            words = ", ".join(f"{number:.4f}" for number in right)
            return f"for a = {np.round(a, 2)} and b = {np.round(b, 2)} it should be {words}."
    return None


def _is_pair(got):
    """Two numbers, in a tuple, a list or an array."""
    try:
        return np.shape(got) == (2,)
    except ValueError:  # a list whose items have different lengths
        return False


def _same(got, right):
    """Close, where 0 may come out as a rounding error."""
    try:
        return bool(np.allclose(np.asarray(got, float), right, rtol=1e-6, atol=1e-9))
    except (TypeError, ValueError):
        return False


# ---------------------------------------------------------------- 09.2: variance of an ensemble


@exercise(
    "09.2",
    hint="Sigma is a standard deviation; the formula has its square.",
    shows="More models remove only the part in which they differ.",
)
def variance(answer):
    """Exercise 09.2: the variance of the mean of K models."""
    for sigma, rho, k in ((2.0, 0.5, 10), (0.3, 0.0, 4), (1.5, 1.0, 7), (2.0, 0.4, 1)):
        got, s = answer(sigma, rho, k), sigma**2
        right = s * (rho + (1 - rho) / k)
        mistakes = (
            (sigma * (rho + (1 - rho) / k), "sigma is a standard deviation: square it."),
            (s / k, "this holds for errors that have nothing in common (rho = 0) only."),
            (s * (rho + (1 - rho)) / k, "only the second part is divided by k."),
            (s * ((1 - rho) + rho / k), "rho and 1 - rho have changed places."),
            (s * (1 - rho) / k, "the first part, rho times sigma squared, is missing."),
            (s * rho, "the second part is missing: it falls with k, but it is there."),
            (right**0.5, "this is the standard deviation: the variance is asked for."),
        )
        for wrong, sentence in mistakes:
            if close_to(got, wrong) and not close_to(wrong, right):
                return sentence
        if not close_to(got, right):
            return f"for sigma {sigma}, rho {rho} and {k} models it should be {right:g}, not {got}."
    return None


# ---------------------------------------------------------------- 09.3: the target of a model


@exercise(
    "09.3",
    hint="np.delete(opinions, me, axis=0) leaves the others; divide by the sum of the weights.",
    shows="One target does for two losses, since the loss is linear in it.",
)
def target(answer):
    """Exercise 09.3: labels and what the others say, in one target."""
    y = np.array([1.0, 0.0, 1.0])
    said = np.array([[0.9, 0.2, 0.4], [0.5, 0.1, 0.8], [0.1, 0.6, 0.3], [0.7, 0.7, 0.2]])
    for me, weight in ((0, 1.0), (2, 3.0), (3, 0.0)):
        given = y.copy(), said.copy()
        got = answer(y, said, me, weight)
        if not (np.array_equal(y, given[0]) and np.array_equal(said, given[1])):
            return "your function changes what it was given: make new arrays."
        others = np.delete(said, me, axis=0)
        right = (y + weight * others.mean(axis=0)) / (1 + weight)
        mistakes = (
            (
                (y + weight * said.mean(axis=0)) / (1 + weight),
                "leave the model itself out of the mean: it has nothing to teach itself.",
            ),
            (y + weight * others.mean(axis=0), "divide by the sum of the weights, 1 + weight."),
            (
                (y + weight * others.sum(axis=0)) / (1 + weight),
                "this is the sum of the others; take their mean.",
            ),
            ((y + others.mean(axis=0)) / 2, "use `weight`: here both count alike."),
            (others.mean(axis=0), "the labels y are missing."),
            (
                (weight * y + others.mean(axis=0)) / (1 + weight),
                "the weight belongs to the others, not to the labels.",
            ),
            ((y + weight * said[me]) / (1 + weight), "this is what the model itself says."),
        )
        for wrong, sentence in mistakes:
            if close_to(got, wrong) and not close_to(wrong, right):
                return sentence
        if not close_to(got, right):
            return f"for model {me} and weight {weight:g} it should be {right.round(3)}."
    return None


# ---------------------------------------------------------------- 09.4: bytes of split learning


@exercise(
    "09.4",
    hint="A row has `hidden` numbers of 8 bytes at each of the other parties; they go up and down.",
    shows="Split learning pays for secrecy, not for bytes, where rows are narrow.",
)
def split_bytes(answer):
    """Exercise 09.4: what travels in one epoch of split learning."""
    for rows, hidden, parties in ((1000, 64, 2), (500, 16, 4), (10, 3, 3), (10, 3, 1)):
        got, one = answer(rows, hidden, parties), rows * hidden * 8
        right = 2 * (parties - 1) * one
        mistakes = (
            (2 * parties * one, "the party with the labels sends nothing to itself."),
            ((parties - 1) * one, "activations go up and gradients come down: twice as much."),
            (right / 8, "these are numbers; each has 8 bytes."),
            (right / 2 * 1, "activations go up and gradients come down: twice as much."),
            (2 * one, "this is for two parties; each of the others sends and receives."),
            (right / rows if rows else 0, "this is for one row."),
            (2 * parties * (parties - 1) * one, "the others do not talk to each other."),
        )
        for wrong, sentence in mistakes:
            if close_to(got, wrong) and not close_to(wrong, right):
                return sentence
        if not close_to(got, right):
            return (
                f"for {rows} rows, {hidden} hidden units and {parties} parties it should be "
                f"{right:,} bytes, not {got}."
            )
    return None


# ---------------------------------------------------------------- 09.5: weights of gossip


def _weights(edges, of=np.maximum, plus=1):
    degree = edges.sum(axis=1)
    weights = edges / (plus + of.outer(degree, degree))
    return weights + np.diag(1 - weights.sum(axis=1))


@exercise(
    "09.5",
    hint="Count the neighbours; go through all pairs; the diagonal is 1 minus the rest of the row.",
    shows="Symmetric weights whose rows sum to 1 keep the mean of all.",
)
def weights_of(answer):
    """Exercise 09.5: Metropolis weights of any graph."""
    chain = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    star = np.zeros((5, 5), int)
    star[0, 1:] = star[1:, 0] = 1
    star[1, 2] = star[2, 1] = 1
    for edges in (star, chain):
        given = edges.copy()
        got = np.asarray(answer(edges), float)
        if not np.array_equal(edges, given):
            return "your function changes the edges: make a new array."
        right, p = _weights(edges), len(edges)
        own = edges + np.eye(p)
        mistakes = (
            (own / own.sum(axis=1, keepdims=True), "a plain mean of neighbours is not symmetric."),
            (right - np.diag(np.diag(right)), "the diagonal is missing: what a rank keeps."),
            (_weights(edges, np.minimum), "take the larger number of neighbours, not the smaller."),
            (_weights(edges, plus=0), "1 + the larger number: the rank itself counts too."),
            (np.full((p, p), 1 / p), "these are the weights of the complete graph."),
        )
        for wrong, sentence in mistakes:
            if close_to(got, wrong):
                return sentence
        if not close_to(got, right):
            if got.shape == right.shape and not np.allclose(got.sum(axis=1), 1):
                return f"each row must sum to 1; yours sum to {got.sum(axis=1).round(3)}."
            return f"for {p} ranks row 0 should be {right[0].round(3)}, not what you gave."
    return None


# ---------------------------------------------------------------- the quiz


@exercise(
    "09.quiz",
    hint="Sections 3, 2, 4, 5 and 8.",
    shows="Ask who knows something that the others do not, and compare with one good model.",
)
def quiz(answers):
    """The quiz of notebook 09."""
    right = {"1": "b", "2": "c", "3": "a", "4": "b", "5": "b"}
    why = {
        "1a": "a sixth seed makes it surer, but does not change what it is compared with.",
        "1c": "that matters once there is a gain over a good model alone.",
        "2a": "the mean of ten equal answers is that answer.",
        "2b": "with correlation 1 the formula gives the variance of one model.",
        "3b": "bagging over all patients needs all patients in one place.",
        "3c": "split learning is for different columns of the same patients.",
        "4a": "errors of one view become labels of the other; see Figure 5, left.",
        "4c": "it changes the labels from which both learn.",
        "5a": "they would agree on more decimals, but no sooner: the graph is the same.",
        "5c": "the rate changes what is learnt, not how fast ranks agree.",
    }
    return check_letters(answers, right, why)
