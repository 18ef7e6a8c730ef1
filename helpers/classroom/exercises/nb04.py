"""Exercises of notebook 04, Data parallelism at scale."""

from __future__ import annotations

import math

import numpy as np

from helpers.classroom.checks import check_letters, close_to, exercise, known_mistake

# ---------------------------------------------------------------- 04.1: seconds to the target


@exercise(
    "04.1",
    hint="Steps times seconds a step. A rank computes its share of the batch, then all exchange.",
    shows="A larger batch saves steps and exchanges, until its rows cost more than they save.",
)
def seconds_to_target(answer):
    """Exercise 04.1: how long training takes, by batch size and number of ranks."""
    for batch, ranks, s, b, row, exchange in (
        (64, 4, 100, 300, 1e-3, 0.05),
        (1024, 8, 100, 300, 1e-3, 0.05),
        (300, 1, 50, 300, 2e-3, 0.0),
    ):
        steps, compute = s * (1 + b / batch), batch * row / ranks
        right = steps * (compute + exchange)
        got = answer(batch, ranks, s, b, row, exchange)
        mistakes = (
            (steps, "these are the steps; multiply them by the seconds of one step."),
            (steps * (batch * row + exchange), "the ranks share the batch: divide its rows."),
            (steps * compute, "the exchange of each step is missing."),
            (steps * compute + exchange, "there is an exchange in every step, not only one."),
            (
                s * (1 + batch / b) * (compute + exchange),
                "the fraction in the law is upside down: a larger batch needs fewer steps.",
            ),
            (s * (compute + exchange), "more rows than B_crit are needed for so few steps."),
            (steps * (batch * row + exchange) / ranks, "the exchange is not shared: all wait."),
            (
                steps * (batch * ranks * row + exchange),
                "the batch is that of all ranks together; a rank has a part of it.",
            ),
        )
        fault = known_mistake(got, right, mistakes)
        if fault:
            return fault
        if not close_to(got, right):
            return (
                f"for a batch of {batch} on {ranks} ranks, S {s}, B_crit {b}, {row} s a row and "
                f"{exchange} s an exchange it should be {right:.4g} s, not {got}."
            )
    return None


# ---------------------------------------------------------------- 04.2: how often to average


@exercise(
    "04.2",
    hint="A round takes H · compute + exchange. Set exchange ≤ share · round, and solve for H.",
    shows="Twice as slow a network asks for twice as many steps between averagings.",
)
def smallest_every(answer):
    """Exercise 04.2: the smallest H with which the exchange takes a given share of the time."""
    for compute, exchange, share in ((2, 150, 0.1), (1, 7, 0.3), (5, 1, 0.5), (10, 90, 0.1)):
        exact = exchange * (1 - share) / (share * compute)
        right = max(1, math.ceil(exact - 1e-9))
        got = answer(compute, exchange, share)
        mistakes = (
            (exact, "steps are whole: round up, and at least to 1."),
            (math.ceil(exchange / (share * compute)), "the exchange belongs to the round, too."),
            (math.floor(exact), "rounded down, the exchange takes more than its share: round up."),
            (math.floor(exact) + 1, "one step more than needed where it fits exactly: use ceil."),
            (
                math.ceil(exchange / compute),
                "with this H the exchange takes half of the time; use the share.",
            ),
            (
                math.ceil(exact * share / (1 - share) * share),
                "you multiplied by the share; a smaller share needs a larger H.",
            ),
        )
        fault = known_mistake(got, right, mistakes)
        if fault:
            return fault
        if not close_to(got, right):
            return (
                f"for {compute} ms of computing a step, {exchange} ms an exchange and a share of "
                f"{share} it should be {right}, not {got}."
            )
    return None


# ---------------------------------------------------------------- 04.3: error feedback


def _keep_largest(gradient):
    """The compressor of the check: the largest number, 0 elsewhere."""
    result = np.zeros_like(gradient)
    place = np.argmax(np.abs(gradient))
    result[place] = gradient[place]
    return result


_GRADIENTS = np.array([[4.0, 3.0, 0.5], [1.0, 2.0, 0.5], [-2.0, 0.0, 0.5], [0.0, 0.0, 0.5]])

_SLIPS = (
    (
        lambda g, r, keep: (g + r - keep(g + r), keep(g + r)),
        "the pair is the wrong way round: first what is sent, then the residual.",
    ),
    (
        lambda g, r, keep: (keep(g), g - keep(g)),
        "the residual is never used: add it to the gradient before you compress.",
    ),
    (
        lambda g, r, keep: (keep(g + r), g - keep(g + r)),
        "the new residual forgets the old one: subtract what was sent from gradient + residual.",
    ),
    (
        lambda g, r, keep: (keep(g + r), g + r),
        "what was sent stays in the residual, so it will be sent twice: subtract it.",
    ),
    (
        lambda g, r, keep: (keep(g + r), keep(g + r) - g - r),
        "the residual has the wrong sign: it is what was left out, not what was sent too much.",
    ),
    (
        lambda g, r, keep: (g + r, np.zeros_like(g)),
        "all of it is sent: `keep` has to choose what travels.",
    ),
    (
        lambda g, r, keep: (keep(g) + r, g - keep(g)),
        "the residual travels whole: add it before `keep`, not after.",
    ),
    (
        lambda g, r, keep: (keep(g), r + g - keep(g)),
        "the residual grows and never travels: compress gradient + residual.",
    ),
)


def _replay(step):
    """What a function sends and keeps for the made-up gradients."""
    residual, steps = np.zeros(3), []
    for gradient in _GRADIENTS:
        sent, residual = step(gradient.copy(), residual, _keep_largest)
        steps.append((sent, residual.copy()))
    return np.array(steps)


@exercise(
    "04.3",
    hint="First gradient + residual; then compress that; what is left of it is the new residual.",
    shows="What was sent and what is left add up to all gradients: nothing is lost, only late.",
)
def error_feedback(answer):
    """Exercise 04.3: one step of error feedback, for any compressor."""
    gradient, residual = np.array([4.0, 3.0, 0.5]), np.array([0.0, 2.0, 0.0])
    given = gradient.copy(), residual.copy()
    got = answer(gradient, residual, _keep_largest)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        return "return a pair: what is sent, and the new residual."
    if not (np.array_equal(gradient, given[0]) and np.array_equal(residual, given[1])):
        return "your function changes what it was given: `a + b` makes a new array, `a += b` not."
    right = _replay(lambda g, r, keep: (keep(g + r), g + r - keep(g + r)))
    steps = _replay(answer)
    for slip, sentence in _SLIPS:
        if close_to(steps, _replay(slip)):
            return sentence
    if not close_to(steps, right):
        at = next(n for n in range(len(right)) if not close_to(steps[n], right[n]))
        return (
            f"in step {at + 1} of the check it should send {right[at, 0]} and keep "
            f"{right[at, 1]}, not {steps[at, 0]} and {steps[at, 1]}."
        )
    return None


# ---------------------------------------------------------------- 04.4: bytes of a rank


@exercise(
    "04.4",
    hint="Stage 1 divides the 12 by the ranks, stage 2 also one of the 2s, stage 3 also the other.",
    shows="Most of the memory is the optimiser's, so stage 1 alone brings most of the saving.",
)
def bytes_per_rank(answer):
    """Exercise 04.4: what a rank keeps at each stage of ZeRO, in mixed precision with Adam."""
    for size, ranks in ((1000, 4), (7e9, 64), (1000, 1)):
        for stage in range(4):
            right = _kept(size, ranks, stage)
            got = answer(size, ranks, stage)
            mistakes = (
                (size * 16, "all 16 bytes are whole: divide what the stage divides."),
                (size * 16 / ranks, "all 16 bytes are divided; that is right in stage 3 only."),
                (right / size, "this is for one parameter: multiply by their number."),
                (right * ranks, "this is what all ranks keep together; one rank is asked for."),
                (_kept(size, ranks, stage + 1), "this is the memory of the next stage."),
                (_kept(size, ranks, stage - 1), "this is the memory of the stage before."),
            )
            fault = known_mistake(got, right, mistakes)
            if fault:
                return f"in stage {stage} with {ranks} ranks, {fault}"
            if not close_to(got, right):
                return (
                    f"for {size:g} parameters on {ranks} ranks in stage {stage} it should be "
                    f"{right:g} bytes, not {got}."
                )
    return None


def _kept(size, ranks, stage):
    """Bytes of a rank: state, gradients and parameters are divided from stages 1, 2 and 3 on."""
    kinds = enumerate((12, 2, 2))
    return size * sum(each / ranks if place < stage else each for place, each in kinds)


# ---------------------------------------------------------------- 04.5: clip what is divided


@exercise(
    "04.5",
    hint="The squares of the parts' lengths add up; all parts are multiplied by one number.",
    shows="One number a rank has to travel, and the clipped gradient is that of a single rank.",
)
def clip_parts(answer):
    """Exercise 04.5: clip a gradient whose parts lie on several ranks."""
    cases = (
        ([np.array([3.0, 1.0]), np.array([4.0])], 1.5),
        ([np.array([0.3]), np.array([0.4, 0.0])], 1.0),
        ([np.array([6.0]), np.zeros(0), np.array([0.0, 8.0])], 2.0),
        ([np.zeros(2), np.zeros(1)], 1.0),
    )
    for parts, largest in cases:
        given = [part.copy() for part in parts]
        with np.errstate(all="ignore"):
            got = answer(given, largest)
        if not isinstance(got, (list, tuple)) or len(got) != len(parts):
            return "return a list with one clipped part for each part."
        if any(not np.array_equal(a, b) for a, b in zip(given, parts)):
            return "your function changes the parts that it was given: make new arrays."
        length = np.sqrt(sum(np.sum(part**2) for part in parts))
        factor = min(1.0, largest / length) if length else 1.0
        right = np.concatenate([factor * part for part in parts])
        got = np.concatenate([np.ravel(part) for part in got])
        mistakes = (
            (
                np.concatenate([_clip(part, largest) for part in parts]),
                "each part is clipped by its own length; the length of the whole counts.",
            ),
            (
                np.concatenate([part * largest / length for part in parts]) if length else got + 1,
                "a gradient that is short enough must stay as it is: multiply by at most 1.",
            ),
            (
                np.concatenate(parts) * min(1.0, largest / _sum_of_lengths(parts)),
                "lengths do not add up, their squares do.",
            ),
            (
                np.concatenate(parts) * min(1.0, largest / length**2) if length else got + 1,
                "the square root is missing: this divides by the square of the length.",
            ),
            (
                np.concatenate([np.clip(part, -largest, largest) for part in parts]),
                "each number is cut by itself; all have to be multiplied by the same factor.",
            ),
        )
        if not np.all(np.isfinite(got)):
            return "a gradient of zeros has the length 0: do not divide by it."
        for wrong, sentence in mistakes:
            if close_to(got, wrong) and not close_to(wrong, right):
                return sentence
        if not close_to(got, right):
            return f"for parts {parts} and the length {largest} it should be {right}, not {got}."
    return None


def _clip(part, largest):
    length = np.linalg.norm(part)
    return part * min(1.0, largest / length) if length else part


def _sum_of_lengths(parts):
    return sum(np.linalg.norm(part) for part in parts) or 1.0


# ---------------------------------------------------------------- the quiz


@exercise(
    "04.quiz",
    hint="Sections 1, 2, 3, 5 and 6.",
    shows="Each remedy saves one thing and costs another: know both before you use it.",
)
def quiz(answers):
    """The quiz of notebook 04."""
    right = {"1": "b", "2": "b", "3": "b", "4": "b", "5": "a"}
    why = {
        "1a": "that holds far below the critical batch; see Figure 1 beyond 1,024 rows.",
        "1c": "apart from noise a larger batch needs no more steps at its best rate.",
        "2a": "that holds for parts that are alike; see the line by label in Figure 3.",
        "2c": "an averaging sends all parameters once, whatever H is.",
        "3a": "that holds for one worker; the other seven send while one computes.",
        "3c": "the rate decides what staleness does, not how large it is.",
        "4a": "stage 2 costs no more bytes than stage 1, and divides the gradients too.",
        "4c": "stage 3 gathers the parameters twice: half as many bytes again.",
        "5b": "once the others are 4 steps ahead, they wait for the slow one in each step.",
        "5c": "backup workers drop gradients; a bound drops nothing.",
    }
    return check_letters(answers, right, why)
