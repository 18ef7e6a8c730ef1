"""Searching hyper-parameters: the loss of 32 trials at four budgets, on five seeds.

With all losses at hand any search can be replayed. Each seed draws its own configurations (of
`SPACE`), weights and batches. With the rate "falling" each training is one of its own, and its rate
falls to 0; with "constant" a short training is the beginning of a longer one. Columns: `rate`,
`seed`, `trial`, `samples` (the budget), `valid_loss` (on held-out days, by which a search chooses)
and `test_loss` (on other held-out days, which no search sees).
"""

from __future__ import annotations

import numpy as np

from helpers.datasets import load_table
from helpers.nn import MLP, SGD
from helpers.parallel.search import budgets, draw
from helpers.studies._setting import DTYPE, MONTHS

SEEDS = (0, 1, 2, 3, 4)
TRIALS = 32
LEAST, MOST, FACTOR = 4096, 262_144, 4
SPACE = {
    "rate": (0.003, 3.0),
    "width": [8, 16, 32, 64],
    "batch": [128, 256, 512],
    "momentum": [0.0, 0.9],
    "decay": (1e-6, 1e-2),
}


def run(seeds=SEEDS) -> list[dict]:
    """The rows of the study's table."""
    train, valid, test = _data()
    table = []
    for rate in ("falling", "constant"):
        for seed in seeds:
            for trial, config in enumerate(draw(SPACE, TRIALS, seed)):
                for samples, network, parameters in _trainings(rate, config, train, seed):
                    setting = dict(rate=rate, seed=seed, trial=trial, samples=samples)
                    with np.errstate(over="ignore", invalid="ignore"):
                        setting["valid_loss"] = network.loss_at(parameters, *valid)
                        setting["test_loss"] = network.loss_at(parameters, *test)
                    table.append(setting)
    return table


def _data():
    """Rows to learn from, those by which a search chooses, and those it never sees: whole days."""
    table = load_table("late", month=MONTHS)
    rows = table.train
    chooses = rows.day % 5 == 1
    parts = rows.select(~chooses), rows.select(chooses), table.test
    return [(part.X.astype(DTYPE), part.y.astype(DTYPE)) for part in parts]


def _trainings(rate, config, rows, seed):
    """Samples, network and parameters at each budget."""
    rungs = budgets(LEAST, MOST, FACTOR)
    network = MLP((rows[0].shape[1], config["width"], 1))
    if rate == "constant":
        yield from ((n, network, w) for n, w in _fit(network, config, rows, seed, rungs))
        return
    for most in rungs:
        *_, (_, parameters) = _fit(network, config, rows, seed, [most], falls=True)
        yield most, network, parameters


def _fit(network, config, rows, seed, rungs, falls=False):
    """Train up to the last budget; samples and parameters at each."""
    X, y = rows
    size, steps = config["batch"], rungs[-1] // config["batch"]
    optimiser = SGD(config["rate"], config["momentum"], config["decay"])
    parameters, state = network.initialise(seed, DTYPE), optimiser.start(network.size, DTYPE)
    gradient, workspace = np.empty_like(parameters), network.workspace(size, DTYPE)
    random = np.random.default_rng(seed)
    for step in range(steps):
        batch = random.integers(len(y), size=size)
        now = config["rate"] * (1 - step / steps if falls else 1)
        with np.errstate(over="ignore", invalid="ignore"):
            network.loss_and_gradient(
                parameters, X[batch], y[batch], out=gradient, workspace=workspace
            )
            optimiser.step(parameters, gradient, state, now)
        if (step + 1) * size in rungs:
            yield (step + 1) * size, parameters


OPTUNA_TRIALS, OPTUNA_SAMPLES = 40, 16_384


def best_with_optuna(seeds=SEEDS) -> dict[str, list[float]]:
    """The best validation loss of 40 trials of 16,384 rows each, for each seed.

    "TPE": each trial is asked of Optuna's sampler, and its loss told. "at random": the control,
    with the same number of trials. Optuna has to be installed; it is no part of the course's
    environment, so the result stands in `WITH_OPTUNA`.
    """
    train, valid, _ = _data()

    def loss_of(config, seed):
        network = MLP((train[0].shape[1], config["width"], 1))
        *_, (_, parameters) = _fit(network, config, train, seed, [OPTUNA_SAMPLES], falls=True)
        with np.errstate(over="ignore", invalid="ignore"):
            loss = network.loss_at(parameters, *valid)
        return float(loss) if np.isfinite(loss) else 1e9

    found = {"TPE": [], "at random": []}
    for seed in seeds:
        found["TPE"].append(_best_of_tpe(lambda config, seed=seed: loss_of(config, seed), seed))
        configs = draw(SPACE, OPTUNA_TRIALS, seed)
        found["at random"].append(min(loss_of(config, seed) for config in configs))
    return found


def _best_of_tpe(loss_of, seed):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    asked = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(OPTUNA_TRIALS):
        trial = asked.ask()
        config = {
            name: trial.suggest_float(name, *values, log=True)
            if isinstance(values, tuple)
            else trial.suggest_categorical(name, values)
            for name, values in SPACE.items()
        }
        asked.tell(trial, loss_of(config))
    return asked.best_value


WITH_OPTUNA = {
    "TPE": (0.5139, 0.5166, 0.5178, 0.5158, 0.5173),
    "at random": (0.5146, 0.5147, 0.5188, 0.5180, 0.5211),
}
"""What `best_with_optuna` found with Optuna 5.0.0, to four decimals."""
