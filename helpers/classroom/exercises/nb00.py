"""Right and wrong answers of notebook 00, Start here."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np

from helpers.classroom.checks import check_letters, close_to, exercise
from helpers.datasets import load_flights


@exercise(
    "00.1",
    hint="Each worker takes one task at a time. How many rounds do the tasks need?",
    shows="More workers help only when they shorten the number of rounds: 12 tasks need three "
    "rounds on 4 workers and also on 5.",
)
def seconds_of_job(answer):
    """Exercise 00.1: seconds of equal tasks on some workers."""
    if close_to(answer(12, 0.5, 5), 12 * 0.5 / 5):
        return "you divided the work evenly, but a task cannot be cut: a worker runs it whole."
    if close_to(answer(12, 0.5, 5), 2 * 0.5):
        return "you rounded down: two rounds of 5 workers run 10 of the 12 tasks."
    if close_to(answer(12, 0.5, 5), 3):
        return "you counted the rounds; each of them takes the seconds of one task."
    for tasks, seconds, workers in ((12, 0.5, 5), (12, 0.2, 4), (1, 2.0, 8), (0, 1.0, 3)):
        expected = -(-tasks // workers) * seconds
        if not close_to(answer(tasks, seconds, workers), expected):
            return (
                f"{tasks} tasks of {seconds} s on {workers} workers take {expected:g} s, "
                f"your function says {answer(tasks, seconds, workers)!r}."
            )
    return None


@exercise(
    "00.2",
    hint="Speed-up is the time of one worker divided by the time of n. Efficiency is the share "
    "of it that n perfect workers would have reached.",
    shows="An efficiency of 1 means that nothing was lost.",
)
def efficiency(answer):
    """Exercise 00.2: efficiency of n workers."""
    got = answer(8.0, 2.5, 4)
    if close_to(got, 8.0 / 2.5):
        return "that is the speed-up, 3.2; divide it by the number of workers."
    if close_to(got, 2.5 / 8.0) or close_to(got, 2.5 / 8.0 / 4):
        return "your fraction is upside down: the time of one worker stands above."
    if close_to(got, 2.5 * 4 / 8.0):
        return "all is upside down: an efficiency above 1 would mean that workers work twice."
    if close_to(got, 80.0):
        return "an efficiency is a share between 0 and 1, not a percentage."
    if close_to(got, 8.0 / 2.5 * 4):
        return "you multiplied by the number of workers: more workers lower the efficiency."
    if not close_to(got, 0.8):
        return f"8 s on one worker and 2.5 s on four give 0.8, your function says {got!r}."
    if not close_to(answer(3.0, 3.0, 1), 1.0):
        return "one worker compared with itself has an efficiency of 1."
    if not close_to(answer(10.0, 3.0, 8), 10 / 24):
        return "right for 8 s, 2.5 s and 4 workers, but not for 10 s, 3 s and 8 workers."
    return None


@exercise(
    "00.3",
    hint="load_flights(origin=origin) gives the flights of one airport; a flight without "
    "arr_delay (it was cancelled or diverted) is not late.",
    shows="If you let the workers count, only three numbers came back to the notebook.",
)
def late_flights(answer):
    """Exercise 00.3: late flights by origin, counted by workers."""
    flights = load_flights()
    late = flights.groupby("origin", observed=True)["arr_delay"]
    expected = late.agg(lambda delay: int((delay > 15).sum())).to_dict()
    if not isinstance(answer, dict) or set(answer) != set(expected):
        return 'give a dict with one number for each of "EWR", "JFK" and "LGA".'
    if any(hasattr(value, "result") for value in answer.values()):
        return "the values are futures, not numbers yet: gather them."
    if answer in (late.size().to_dict(), late.count().to_dict()):
        return "you counted all flights of each airport, also those in time."
    if answer == late.agg(lambda delay: int((delay >= 15).sum())).to_dict():
        return "a flight that is exactly 15 minutes late counts as in time: use >, not >=."
    if answer == late.agg(lambda delay: int((delay > 0).sum())).to_dict():
        return "you counted every delay; late means more than 15 minutes."
    if answer == late.agg(lambda delay: int((~(delay <= 15)).sum())).to_dict():
        return "flights that never arrived (their delay is NaN) slipped into your count."
    departure = flights["dep_delay"].groupby(flights["origin"], observed=True)
    if answer == departure.agg(lambda delay: int((delay > 15).sum())).to_dict():
        return "you counted late departures (dep_delay); the question is about arrivals."
    if all(0 < value < 1 for value in answer.values()):
        return "these are shares; give the numbers of flights."
    wrong = [origin for origin in expected if answer[origin] != expected[origin]]
    return f"the count of {wrong[0]} is not right." if wrong else None


@exercise(
    "00.4",
    hint="Which days are there? Draw from these, with replacement. A day drawn twice brings its "
    "flights twice.",
    shows="Flights of one day share weather and queues. Whole days, drawn anew, give the honest, "
    "wider interval.",
)
def resample_days(answer):
    """Exercise 00.4: one bootstrap mean that draws whole days.

    Three days with 1, 2 and 3 flights: from the mean one can tell which days were drawn, and how
    often each, and whether all flights of a day came with it.
    """
    sizes, level = np.array([1, 2, 3]), np.array([1.0, 21.0, 410.0])
    day, delay = np.repeat([3, 8, 20], sizes), np.array([1.0, 20.0, 22.0, 400.0, 410.0, 420.0])

    def means_of(days, drawn):
        """The means that `drawn` draws out of `days` days can give: {mean: ways}."""
        ways = Counter()
        for choice in product(range(days), repeat=drawn):
            picked = list(choice)
            ways[round(float(np.average(level[picked], weights=sizes[picked])), 6)] += 1
        return ways

    got = [answer(delay, day, np.random.default_rng(seed)) for seed in range(600)]
    if np.shape(got) != (600,) or np.isnan(got).any():
        return "return one number: the mean delay of all flights of the days drawn."
    again = [answer(delay, day, np.random.default_rng(seed)) for seed in range(20)]
    if again != got[:20]:
        return "the same seed must give the same mean: draw with the generator rng, and no other."
    seen, expected = Counter(np.round(got, 6).tolist()), means_of(3, 3)
    if len(seen) == 1:
        return "your mean is the same for every seed: draw with replacement."
    strange = set(seen) - set(expected)
    of_days = {round(float(level[list(c)].mean()), 6) for c in product(range(3), repeat=3)}
    if strange and strange <= set(means_of(3, 2)):
        all_days = round(float(delay.mean()), 6) in seen  # impossible with two days
        if all_days:
            return "a day that is drawn twice must count twice."
        return "draw as many days as there are days: here 3."
    if strange and strange <= of_days:
        return "you averaged the days' means: a day with more flights must count for more."
    if strange:
        return "it seems that single flights are drawn: draw days, and take all their flights."
    share = seen[max(expected)] / 600  # the busiest day three times: one way of 27
    if not 0.01 < share < 0.08:
        return "each day must be as likely as the others: draw from np.unique(day)."
    return None


@exercise(
    "00.quiz",
    hint="Sections 2, 4, 4 and 5, in this order.",
    shows="You are ready for notebook 01.",
)
def quiz(answers):
    """The quiz of notebook 00."""
    right = {"1": "b", "2": "c", "3": "a", "4": "b"}
    why = {
        "1a": "a thread lives inside one process; a worker is a process of its own.",
        "1c": "a core is hardware; the operating system decides which process runs on it.",
        "2a": "the data were loaded before the clock started, on every worker.",
        "2b": "the tasks were the same: same months, same seeds.",
        "3b": "twelve tasks on six workers take two rounds; twelve workers need only one.",
        "3c": "with twelve workers each has one task, and a thirteenth finds none.",
        "4a": "the answers agree to the last digit: a seed belongs to the task, not the worker.",
        "4c": "order does not matter here: each task is independent of the others.",
    }
    return check_letters(answers, right, why)
