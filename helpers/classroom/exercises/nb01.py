"""Exercises of notebook 01, From one machine to many."""

from __future__ import annotations

import numpy as np

from helpers.classroom.checks import check_letters, close_to, exercise


@exercise(
    "01.1",
    hint="How many FLOP has the run? How many do all accelerators together do in one second?",
    shows="16,384 accelerators turn thousands of years into about ten weeks.",
)
def training_days(answer):
    """Exercise 01.1: days of a training run on many accelerators."""
    run = (2e9, 3e11, 100, 1e14, 0.5)  # as in the last sentence below
    days = 6 * 2e9 * 3e11 / (100 * 1e14 * 0.5) / 86400
    mistakes = {
        1 / 3: "you counted 2 FLOP for each parameter and token; the way back costs 4 more.",
        0.5: "the share of the peak is missing: half of the peak takes twice as long.",
        100: "the number of accelerators is missing, or you took one of them.",
        86400: "this is in seconds; the answer should be in days.",
        1440: "this is in minutes; the answer should be in days.",
        24: "this is in hours; the answer should be in days.",
        1e14: "the peak is missing: how many FLOP does one accelerator do in a second?",
        0.25: "you multiplied by the share; an accelerator that reaches less takes longer.",
        1 / 365.25: "this is in years; the answer should be in days.",
    }
    got = answer(*run)
    for factor, sentence in mistakes.items():
        if close_to(got, factor * days, 1e-3):
            return sentence
    if not close_to(got, days, 1e-6):
        if close_to(got, days, 0.07):
            return "nearly: return the exact number, without rounding."
        return (
            "2e9 parameters, 3e11 tokens, 100 accelerators of 1e14 FLOP/s and a share of 0.5 "
            f"should take {days:.2f} days; your function says {got!r}."
        )
    return None


class Future:
    """Stands for a future in the check of a tree: its value, and the longest chain behind it."""

    def __init__(self, value, chain, owner):
        self.value, self.chain, self.owner = value, chain, owner

    def result(self, timeout=None):
        self.owner.asked += 1
        return self.value


class _Counter:
    """Stands for a client: runs each call at once and notes the shape of the graph."""

    def __init__(self):
        self.calls, self.asked, self.widest = 0, 0, 0

    def part(self, value):
        return Future(value, 0, self)

    def submit(self, function, *args, **options):
        inputs = [c for arg in args for c in (arg if isinstance(arg, (list, tuple)) else [arg])]
        claims = [claim for claim in inputs if isinstance(claim, Future)]
        self.calls += 1
        self.widest = max(self.widest, len(claims))
        plain = [_value(arg) for arg in args]
        return Future(function(*plain), 1 + max((c.chain for c in claims), default=0), self)

    def gather(self, claims):
        return [claim.result() for claim in claims]

    def map(self, function, *columns, **options):
        return [self.submit(function, *row) for row in zip(*columns)]


def _value(arg):
    if isinstance(arg, (list, tuple)):
        return [_value(item) for item in arg]
    return arg.value if isinstance(arg, Future) else arg


@exercise(
    "01.2",
    hint="Draw the tree for five parts: which are added first, and what becomes of the fifth?",
    shows="The sum of n parts needs n - 1 additions, but only about log2(n) of them in a row.",
)
def tree_sum(answer):
    """Exercise 01.2: a sum of futures in a tree."""
    for n, longest in ((8, 3), (1, 0), (5, 3), (13, 4)):
        client = _Counter()
        parts = [client.part(2**k) for k in range(n)]
        total = answer(client, list(parts))
        if client.asked:
            return "your function waits for results; it should only pass futures on."
        if not isinstance(total, Future):
            return f"return one future; your function returned a {type(total).__name__}."
        if client.widest > 2:
            return "one task gets more than two parts: then all of them travel to one worker."
        missing = [k for k in range(n) if not int(total.value) >> k & 1]
        if missing and total.value < 2**n:
            return f"of {n} parts, number {missing[0]} (counted from 0) is not in the sum."
        if total.value != 2**n - 1:
            return f"some of the {n} parts are in the sum more than once."
        if total.chain > longest:
            return (
                f"{n} parts are added in a chain of {total.chain} additions, one after another; "
                f"in a tree the longest chain has {longest}."
            )
    return None


@exercise(
    "01.3",
    hint="For each matrix: is it cut, or does every worker get a copy?",
    shows="Cut what is large and copy what is small.",
)
def bytes_sent(answer):
    """Exercise 01.3: bytes sent under data and under task distribution."""
    n, d, m, p, size = 1000, 30, 4, 5, 4
    X, W, Y = size * n * d, size * d * m, size * n * m
    got = answer(n, d, m, p, size)
    if np.shape(got) != (2,):
        return "return two numbers: bytes under data distribution, bytes under task distribution."
    mistakes = {
        (p * X + W, X + p * W): "the two numbers are exchanged: data distribution comes first.",
        (X + W, X + W): "every matrix is counted once; one of the two goes to every worker.",
        (p * (X + W), p * (X + W)): "every matrix is counted p times; one of the two is cut.",
        ((X + p * W) / size, (p * X + W) / size): "these are numbers of values, not of bytes.",
        ((X + p * W) * 8 / size, (p * X + W) * 8 / size): "a value has `itemsize` bytes, not 8.",
        (X + p * W, p * X + p * W): "task distribution cuts W: each worker gets other columns.",
        (p * X + p * W, p * X + W): "data distribution cuts X: each worker gets other rows.",
        ((X + p * W) / 1e9, (p * X + W) / 1e9): "these are GB; the answer should be in bytes.",
        (X + p * W + Y, p * X + W + Y): "Y is not sent to the workers: they compute it.",
    }
    for wrong, sentence in mistakes.items():
        if close_to(got, wrong):
            return sentence
    if not close_to(got, (X + p * W, p * X + W)):
        return f"for n, d, m, p, itemsize = {n, d, m, p, size} it should be {X + p * W, p * X + W}."
    return None


class _Block(np.ndarray):
    """A block of a matrix that notices when the whole matrix is put together again."""

    together = False

    def __array_function__(self, function, types, args, kwargs):
        value = super().__array_function__(function, types, args, kwargs)
        if function in (np.concatenate, np.block) and np.shape(value) in ((7, 5), (5, 3)):
            _Block.together = True
        return value


def _block(matrix):
    return matrix.copy().view(_Block)


@exercise(
    "01.4",
    hint="Is relu(3) + relu(-2) the same as relu(3 - 2)?",
    shows="A function that is not linear needs the complete sum: here workers must talk.",
)
def divided_layer(answer):
    """Exercise 01.4: a layer with relu, divided by its inner dimension."""
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(7, 5)), rng.normal(size=(5, 3))
    a, b = X[:, :2] @ W[:2], X[:, 2:] @ W[2:]
    right = np.maximum(a + b, 0)
    _Block.together = False
    got = answer(_block(X[:, :2]), _block(X[:, 2:]), _block(W[:2]), _block(W[2:]))
    if _Block.together:
        return "you put a divided matrix together again; no worker has room for the whole."
    got = np.asarray(got)
    if np.shape(got) != right.shape:
        return (
            f"7 flights and 3 outputs should give the shape {right.shape}, not {np.shape(got)}: "
            "partial products are added, not put side by side."
        )
    mistakes = (
        (np.maximum(a, 0) + np.maximum(b, 0), "relu is applied to each part; it is not linear."),
        (a + b, "the sum is right, but relu is missing."),
        (np.maximum((a + b) / 2, 0), "you averaged the parts; a divided model adds them."),
        ((np.maximum(a, 0) + np.maximum(b, 0)) / 2, "this is the average of two sub-models."),
        (np.maximum(a, 0), "the part of worker 1 is missing."),
        (np.maximum(b, 0), "the part of worker 0 is missing."),
    )
    for wrong, sentence in mistakes:
        if close_to(got, wrong, 1e-9):
            return sentence
    if not close_to(got, right, 1e-9):
        return f"the largest difference from the serial layer is {np.max(np.abs(got - right)):.2g}."
    return None


@exercise(
    "01.5",
    hint="How many rounds are there? What does each task cost besides?",
    shows="Finer cuts shorten the last round, but each task costs its overhead.",
)
def predicted_seconds(answer):
    """Exercise 01.5: time of a job with overhead, on several workers."""
    tasks, seconds, workers, overhead = 10, 3.0, 4, 0.01
    right = tasks * overhead + 3 * seconds
    mistakes = {
        tasks * overhead + tasks * seconds / workers: (
            "a task is never divided: 10 tasks on 4 workers take 3 rounds, not 2.5."
        ),
        3 * seconds: "the overhead is missing.",
        overhead + 3 * seconds: "you counted the overhead once; each task costs it.",
        3 * (seconds + overhead): (
            "you divided the overhead between the workers; there is one scheduler for all."
        ),
        tasks * (overhead + seconds): "the work is not divided between the workers.",
        tasks * overhead + 2 * seconds: "the last round is missing: 10 tasks on 4 workers take 3.",
        workers * overhead + 3 * seconds: "each task costs the overhead, not each worker.",
        2 * overhead + 3 * seconds: (
            "you let the first tasks run while others are still handed out; that is closer to the "
            "truth, but here we count cautiously."
        ),
    }
    got = answer(tasks, seconds, workers, overhead)
    for wrong, sentence in mistakes.items():
        if close_to(got, wrong, 1e-9):
            return sentence
    for case in ((tasks, seconds, workers, overhead), (7, 1.0, 2, 0.1), (8, 0.5, 8, 0.002)):
        expected = case[0] * case[3] + -(-case[0] // case[2]) * case[1]
        got = answer(*case)
        if not close_to(got, expected, 1e-9):
            return f"for {case} it should be {expected:.3f} s; your function says {got!r}."
    assert close_to(right, 9.1, 1e-9)
    return None


@exercise(
    "01.quiz",
    hint="The questions follow sections 2, 4, 3 and 5.",
    shows="You can tell a graph from a run, messages from memory, a part from a sub-model.",
)
def quiz(answers):
    """The quiz of notebook 01."""
    return check_letters(
        answers,
        right={"1": "c", "2": "b", "3": "b", "4": "c"},
        why={
            "1a": "delayed sends nothing; compute() does.",
            "1b": "delayed does not call the function, neither here nor elsewhere.",
            "2a": "messages are sent in the same way to another machine: nothing is rewritten.",
            "2c": "two processes have memories of their own; that is why they send messages.",
            "3a": "that is an ensemble of two sub-models.",
            "3c": "that is data distribution: the rows are cut, not the model.",
            "4a": "the scheduler needs 2 ms for a task of 1 ms; more workers wait for it longer.",
            "4b": "the overhead lies in the scheduler, whatever the workers are.",
        },
    )
