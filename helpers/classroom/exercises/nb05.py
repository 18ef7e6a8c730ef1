"""Exercises of notebook 05, Tensor parallelism."""

from __future__ import annotations

import math

import numpy as np

from helpers.classroom.checks import check_letters, close_to, exercise, known_mistake

# ---------------------------------------------------------------- 05.1: a layer cut by rows


def _layer():
    random = np.random.default_rng(5)
    return random.normal(size=(3, 6)), random.normal(size=(6, 4)), random.normal(size=4)


@exercise(
    "05.1",
    hint="Rank k takes its rows of w, and the columns of x that meet them; b only where rank is 0.",
    shows="A sum over ranks counts everything as often as there are ranks that bring it.",
)
def contribution(answer):
    """Exercise 05.1: what a rank brings to a layer that is cut by rows."""
    x, w, b = _layer()
    for ranks in (2, 3, 1):
        where = f"on {ranks} rank{'s' * (ranks > 1)}"
        got = [np.asarray(answer(x, w, b, rank, ranks)) for rank in range(ranks)]
        if any(part.shape != (3, 4) for part in got):
            shapes = ", ".join(str(part.shape) for part in got)
            return (
                f"{where} your parts have the shapes {shapes}: each must have that of "
                "x @ w, (3, 4), or they cannot be added up. Cut the rows of w, not the columns."
            )
        right = x @ w + b
        mistakes = (
            (right + (ranks - 1) * b, "b is added on every rank, so the sum has it too often."),
            (right - b, "nobody adds b: one rank has to."),
            (ranks * right, "every rank brings the whole result: cut x and w."),
        )
        total = sum(got)
        fault = known_mistake(total, right, mistakes)
        if fault:
            return f"{where}, {fault}"
        if not close_to(total, right):
            off = np.abs(total - right).max()
            return (
                f"{where} the sum of the parts differs from x @ w + b by {off:.3g}: does each rank "
                "take its rows of w, the columns of x that meet them, and does one of them add b?"
            )
        if ranks > 1 and close_to(got[1], got[0]):
            return "all ranks bring the same: the rank's number is not used."
        for rank, brought in enumerate(got):
            mine = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
            product = x[:, mine] @ w[mine]
            allowed = product, product + b, product + b / ranks
            if not any(close_to(brought, parts) for parts in allowed):
                return (
                    f"{where} the sum is right, but rank {rank} does not bring the product of its "
                    f"own rows: x[:, {mine.start}:{mine.stop}] @ w[{mine.start}:{mine.stop}]."
                )
    return None


# ---------------------------------------------------------------- 05.2: how many exchanges


def _count(cuts):
    exchanges, whole = 0, True
    for cut in cuts:
        if cut == "columns":
            exchanges += not whole  # an all-gather: each column needs all of the input
            whole = False
        else:
            exchanges += 1  # an all-reduce; cutting what is whole costs nothing
            whole = True
    return exchanges + (not whole)


@exercise(
    "05.2",
    hint="Keep one fact in a variable: is what comes in whole on every rank, or cut by columns?",
    shows="Only columns then rows, again and again, needs one exchange for two matrices.",
)
def exchanges(answer):
    """Exercise 05.2: exchanges of the forward pass through a chain of cut matrices."""
    chains = (
        ["rows", "rows"],
        ["columns", "columns", "rows", "rows"],
        ["columns", "rows"],
        ["columns"],
        ["rows"],
        ["columns", "columns"],
        ["rows", "columns"],
        ["columns", "rows"] * 3,
        [],
    )
    for cuts in chains:
        right, got = _count(cuts), answer(list(cuts))
        if got == right:
            continue
        words = f"for {cuts} it should be {right}, not {got}"
        if cuts and cuts[-1] == "columns" and got == right - 1:
            return f"{words}: at the end every rank needs the whole result, so gather it."
        if cuts == ["rows", "rows"] and got == 3:
            return f"{words}: after an all-reduce the result is whole; to cut it costs nothing."
        if got == len(cuts):
            return (
                f"{words}: a matrix cut by rows can take a cut input as it is; and count the "
                "forward pass alone."
            )
        if got == cuts.count("rows"):
            return f"{words}: a matrix cut by columns needs its whole input, so gather it first."
        return f"{words}."
    return None


# ---------------------------------------------------------------- 05.3: when it eats the gain


@exercise(
    "05.3",
    hint="Solve (p - 1) · rate / (6 · width · bandwidth) ≤ share for p, and round down.",
    shows="Tensor parallelism belongs on the fastest wire that there is.",
)
def most_ranks(answer):
    """Exercise 05.3: the most ranks with which the exchange costs little enough."""
    cases = (
        (12288, 156e12, 300e9, 0.1),
        (12288, 156e12, 25e9, 0.1),
        (4096, 156e12, 300e9, 0.25),
        (1000, 6e9, 1e6, 1.0),
        (12288, 156e12, 1.25e9, 0.05),
    )
    for width, rate, bandwidth, share in cases:
        exact = 1 + 6 * width * bandwidth * share / rate
        right, got = math.floor(exact + 1e-9), answer(width, rate, bandwidth, share)
        mistakes = (
            (exact, "ranks are whole: round down."),
            (math.ceil(exact), "rounded up, the exchange takes more than its share."),
            (math.floor(exact - 1), "the formula has p - 1: add the 1 again."),
            (math.floor(1 + 6 * width * bandwidth / rate), "the share is missing."),
            (
                math.floor(1 + 6 * width * bandwidth / (share * rate)),
                "a smaller share allows fewer ranks: multiply by it.",
            ),
            (
                math.floor(1 + rate * share / (6 * width * bandwidth)),
                "the fraction is upside down: a faster wire allows more ranks.",
            ),
        )
        fault = known_mistake(got, right, mistakes)
        if fault:
            return fault
        if not close_to(got, right):
            return (
                f"for width {width}, {rate:g} operations a second, {bandwidth:g} bytes a second "
                f"and a share of {share} it should be {right}, not {got}."
            )
    return None


# ---------------------------------------------------------------- 05.4: merge two parts


def _part(scores, values):
    top = scores.max()
    weights = np.exp(scores - top)
    return top, weights.sum(), weights @ values


def _merged(a, b, sign=1):
    top = max(a[0], b[0])
    left, right = np.exp(sign * (a[0] - top)), np.exp(sign * (b[0] - top))
    return top, left * a[1] + right * b[1], left * a[2] + right * b[2]


@exercise(
    "05.4",
    hint="New top: the larger one. Both totals and both results shrink by exp(old top - new top).",
    shows="So no rank needs all scores: a vocabulary, or a text, can lie on many ranks.",
)
def merge(answer):
    """Exercise 05.4: merge the softmax of two blocks of scores."""
    random = np.random.default_rng(3)
    cases = [
        (3 * random.normal(size=4), random.normal(size=4) + shift, random.normal(size=(8, 2)))
        for shift in (0.0, 5.0, -5.0)
    ]
    huge = np.array([1000.0, 1001.0]), np.array([1003.0, 990.0]), random.normal(size=(4, 2))
    for first, second, values in (huge, *cases):
        a, b = _part(first, values[: len(first)]), _part(second, values[len(first) :])
        with np.errstate(all="ignore"):
            got = answer(a, b)
        if not isinstance(got, (tuple, list)) or len(got) != 3:
            return "return three things: the top, the total and the result."
        flat = np.concatenate([np.ravel(np.asarray(part, float)) for part in got])
        right = np.concatenate([np.ravel(part) for part in _merged(a, b)])
        if not np.isfinite(flat).all():
            return "large scores overflow: take the exponential of differences only."
        mistakes = (
            (
                np.r_[max(a[0], b[0]), a[1] + b[1], a[2] + b[2]],
                "the two parts have different tops: shrink one of them before you add.",
            ),
            (
                np.r_[right[:2], a[2] + b[2]],
                "the total is right, but the results must shrink by the same factors.",
            ),
            (
                np.r_[right[:2], right[2:] / right[1]],
                "leave the result undivided: more blocks may come.",
            ),
            (
                np.concatenate([np.ravel(part) for part in _merged(a, b, -1)]),
                "the factors are upside down: exp(old top - new top) is at most 1.",
            ),
            (np.r_[a[0] + b[0], right[1:]], "the new top is the larger of the two, not their sum."),
        )
        fault = known_mistake(flat, right, mistakes)
        if fault:
            return fault
        if not close_to(flat[0], right[0]):
            return (
                f"the top of {a[0]:.6g} and {b[0]:.6g} should be {right[0]:.6g}, not {flat[0]:.6g}."
            )
        if not close_to(flat, right):
            return (
                f"for tops {a[0]:.6g} and {b[0]:.6g}, totals {a[1]:.4g} and {b[1]:.4g}, the new "
                f"total should be {right[1]:.4g} (yours {flat[1]:.4g}); the result shrinks alike."
            )
    return None


# ---------------------------------------------------------------- 05.5: what a block keeps


@exercise(
    "05.5",
    hint="4 · width lie outside of the cut matrices, 12 · width and the weights inside of them.",
    shows="Whatever is not divided remains: of GPT-3 on 8 ranks, more than half of what is kept.",
)
def numbers_kept(answer):
    """Exercise 05.5: numbers that a block keeps for each position."""
    for width, length, heads, ranks in ((64, 32, 4, 4), (64, 32, 4, 1), (12288, 2048, 96, 8)):
        for sequence in (False, True):
            outside, inside = 4 * width, 12 * width + heads * length
            right = (outside + inside) / ranks if sequence else outside + inside / ranks
            got = answer(width, length, heads, ranks, sequence)
            mistakes = (
                (outside + inside, "this is for one rank: divide what is cut."),
                (outside + inside / ranks, "with sequence parallelism the 4 · width are cut too."),
                ((outside + inside) / ranks, "without it the 4 · width lie whole on every rank."),
                (
                    outside + 12 * width / ranks + heads * length,
                    "the attention weights are cut with the heads.",
                ),
                (right - heads * length / ranks, "the attention weights are missing."),
                (
                    right + (length - heads * length) / ranks,
                    "each head keeps `length` weights for a position: multiply by the heads.",
                ),
                (
                    right + 2 / (ranks if sequence else 1),
                    "leave the two deviations of the norms out.",
                ),
                (
                    right + (length - 1) * heads * length / ranks,
                    "for one position a head keeps `length` weights, not their square.",
                ),
            )
            fault = known_mistake(got, right, mistakes)
            if fault:
                return fault
            if not close_to(got, right):
                return (
                    f"for width {width}, length {length}, {heads} heads, {ranks} ranks and "
                    f"sequence={sequence} it should be {right:g}, not {got}."
                )
    return None


# ---------------------------------------------------------------- the quiz


@exercise(
    "05.quiz",
    hint="Sections 2, 3, 5, 6 and 7.",
    shows="Cut so that nothing has to travel in between, and say what travels in the end.",
)
def quiz(answers):
    """The quiz of notebook 05."""
    right = {"1": "c", "2": "b", "3": "a", "4": "c", "5": "b"}
    why = {
        "1a": "the second matrix would get a part of its input columns only after a gather.",
        "1b": "cut by rows each rank has a part of a sum, and GELU of a sum is no sum of GELUs.",
        "2a": "the bytes do not depend on the width alone: every position's vector travels.",
        "2c": "gradients of cut matrices stay where they are; activations travel.",
        "3b": "gathered scores would be the largest array of the whole model.",
        "3c": "the largest score alone is not enough: the sum and the target's score are needed.",
        "4a": "a reduce-scatter and an all-gather are one all-reduce: the bytes are the same.",
        "4b": "the products are the same; it is what lies between them that is cut.",
        "5a": "the keys and values are equally long everywhere; the mask makes the difference.",
        "5c": "all ranks are in the ring; what they have to compute differs.",
    }
    return check_letters(answers, right, why)
