"""Multi-task learning: tasks that share their first layer, beside tasks alone and one model.

Setting "airlines": the task of each of eight airlines is its own delays, 500 flights each. Setting
"limits": the same 2,000 flights, later than 15, 0 and 45 minutes. 40 epochs at rate 0.2 in batches
of 64. Columns: `setting`, `method` ("alone", "shared", or "one model" for all airlines), `decay`
(weight decay), `seed`, `numbers` (of a message), `times` (how many messages), `kilobytes` (that a
worker sends in the whole training), `auc` and `log_loss` (held-out days; the mean of the airlines,
or of 15 minutes).
"""

from __future__ import annotations

import numpy as np

from helpers.learning.multi_task import learn_tasks, shared_part
from helpers.learning.scores import scores
from helpers.learning.soft import Learner
from helpers.nn import SGD
from helpers.studies._learning import DTYPE, NETWORK, Flights, floats, on_ranks, sends

SEEDS = (0, 1, 2, 3, 4)
ROWS, EPOCHS, BATCH = {"airlines": 500, "limits": 2000}, 40, 64
DECAYS = (0.003, 0.01, 0.03, 0.1, 0.3)
LIMITS = (15, 0, 45)


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    late, delay = Flights(), Flights("arrival delay before departure")
    table = []
    for decay in DECAYS:
        for seed in seeds:
            table += _airlines(late, decay, seed)
            table += _limits(delay, decay, seed)
    return table


def _airlines(flights, decay, seed):
    parts = [floats(part) for part in flights.parts("airline", ROWS["airlines"], seed)]
    keys = flights.keys(flights.test, "airline")
    tests = [floats(flights.test.select(keys == k)) for k in range(len(parts))]
    whole = tuple(np.concatenate(side) for side in zip(*parts))
    for method in ("alone", "shared", "one model"):
        data, epochs = parts, EPOCHS
        if method == "one model":  # as many steps as an airline took
            data, epochs = [whole], EPOCHS // len(parts)
        models = on_ranks(_train, decay, seed, epochs, method == "shared", each=data)
        models = models * (len(parts) // len(models))
        found = [scores(y, m.probabilities(x)) for m, (x, y) in zip(models, tests)]
        mean = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
        setting = dict(setting="airlines", method=method, decay=decay, seed=seed)
        yield setting | _sent(method, "airlines", len(parts)) | mean


def _limits(flights, decay, seed):
    x, delay = flights.sample(ROWS["limits"], seed)
    tasks = [(x, (delay > limit).astype(DTYPE)) for limit in LIMITS]
    x_test, delay_test = floats(flights.test)
    for method in ("alone", "shared"):
        first = on_ranks(_train, decay, seed, EPOCHS, method == "shared", each=tasks)[0]
        found = scores(delay_test > LIMITS[0], first.probabilities(x_test))
        setting = dict(setting="limits", method=method, decay=decay, seed=seed)
        yield setting | _sent(method, "limits", len(tasks)) | found


def _sent(method, setting, tasks):
    """The gradient of the shared layer, by an all-reduce in every step."""
    if method != "shared":
        return sends(0, 0, 0)
    numbers, times = shared_part(NETWORK).stop, EPOCHS * -(-ROWS[setting] // BATCH)
    return sends(numbers, times, numbers * times * 2 * (tasks - 1) / tasks)


def _train(rank, decay, seed, epochs, share, rows):
    learner = Learner(NETWORK, SGD(0.2, weight_decay=decay), seed, BATCH, DTYPE)
    learn_tasks(rank.world, learner, *rows, epochs, seed=seed, share=share)
    return learner
