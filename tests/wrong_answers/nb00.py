"""Typical wrong answers of notebook 00, and what the check must say of each."""

import math

import numpy as np

from helpers.datasets import load_flights


def count(is_late, column="arr_delay"):
    flights = load_flights()
    delays = flights[column].groupby(flights["origin"], observed=True)
    return {origin: int(is_late(delay).sum()) for origin, delay in delays}


def single_flights(delay, day, rng):
    return rng.choice(delay, len(delay)).mean()


def mean_of_day_means(delay, day, rng):
    days = np.unique(day)
    return np.mean([delay[day == one].mean() for one in rng.choice(days, len(days))])


def without_replacement(delay, day, rng):
    return np.concatenate([delay[day == one] for one in rng.permutation(np.unique(day))]).mean()


def one_day_too_few(delay, day, rng):
    days = np.unique(day)
    drawn = rng.choice(days, len(days) - 1)
    return np.concatenate([delay[day == one] for one in drawn]).mean()


def each_day_once(delay, day, rng):
    days = np.unique(day)
    return delay[np.isin(day, rng.choice(days, len(days)))].mean()


def busy_days_more_often(delay, day, rng):
    drawn = rng.choice(day, len(np.unique(day)))
    return np.concatenate([delay[day == one] for one in drawn]).mean()


def flights_drawn_again(delay, day, rng):
    days = np.unique(day)
    drawn = np.concatenate([delay[day == one] for one in rng.choice(days, len(days))])
    return rng.choice(drawn, len(drawn)).mean()


def own_generator(delay, day, rng):
    drawn = np.random.default_rng().choice(np.unique(day), len(np.unique(day)))
    return np.concatenate([delay[day == one] for one in drawn]).mean()


WRONG = {
    "00.1": [
        (lambda tasks, seconds, workers: tasks * seconds / workers, "a task cannot be cut"),
        (lambda tasks, seconds, workers: tasks // workers * seconds, "you rounded down"),
        (lambda tasks, seconds, workers: math.ceil(tasks / workers), "you counted the rounds"),
        (lambda tasks, seconds, workers: tasks * seconds, "your function says 6.0"),
    ],
    "00.2": [
        (lambda one, n, workers: one / n, "that is the speed-up"),
        (lambda one, n, workers: n / one, "upside down"),
        (lambda one, n, workers: one / n * workers, "you multiplied"),
        (lambda one, n, workers: 100 * one / n / workers, "not a percentage"),
        (lambda one, n: one / n, "stopped with TypeError"),
        (lambda one, n, workers: n * workers / one, "work twice"),
        (lambda one, n, workers: 0.8 if workers > 1 else 1.0, "but not for 10 s"),
        (0.8, "without calling it"),
    ],
    "00.3": [
        (count(lambda delay: delay.notna()), "you counted all flights"),
        (count(lambda delay: delay >= 15), "use >, not >="),
        (count(lambda delay: delay > 0), "you counted every delay"),
        (count(lambda delay: ~(delay <= 15)), "flights that never arrived"),
        ([28_000, 24_000, 24_000], "give a dict"),
        (count(lambda delay: delay > 15, "dep_delay"), "late departures"),
        ({"EWR": 0.25, "JFK": 0.22, "LGA": 0.23}, "these are shares"),
        ({"EWR": 1, "JFK": 2, "LGA": 3}, "the count of EWR"),
    ],
    "00.4": [
        (single_flights, "single flights are drawn"),
        (mean_of_day_means, "you averaged the days' means"),
        (without_replacement, "the same for every seed"),
        (one_day_too_few, "as many days as there are days"),
        (each_day_once, "must count twice"),
        (busy_days_more_often, "as likely as the others"),
        (own_generator, "the same seed must give the same mean"),
        (lambda delay, day, rng: delay, "return one number"),
        (lambda delay, day, rng: None, "returns nothing"),
    ],
    "00.quiz": [
        ({"1": "a", "2": "c", "3": "a", "4": "b"}, "a thread lives inside one process"),
        ({"1": "b", "2": "a", "3": "a", "4": "b"}, "before the clock started"),
        ({"1": "b", "2": "c", "3": "b", "4": "b"}, "twelve tasks on six workers"),
        (["b", "c", "a", "b"], "give a letter for each"),
    ],
}
