"""What the notebook says of halving, Hyperband and ASHA holds in the stored study."""

import numpy as np
import pytest

from helpers.parallel import search
from helpers.planner.tasks import simulate_search
from helpers.studies import load_study
from helpers.studies.search import MOST, SEEDS, TRIALS

NEAR = 0.005


@pytest.fixture(scope="module")
def curves():
    table = load_study("search")
    index = ["rate", "seed", "trial"]
    return table.pivot(index=index, columns="samples", values="valid_loss").fillna(np.inf)


def replay(curves, rate, seed, make):
    """Work as a share of the full search, and how much worse than the best trial it chooses."""
    losses = curves.loc[rate, seed]
    trials = np.random.default_rng(seed).permutation(TRIALS).tolist()
    results, _ = simulate_search(
        make(trials), lambda job: (losses.at[job.config, job.budget], job.budget), workers=8
    )
    loss = search.best_of((job, loss) for _, job, loss in results)[1]
    work = search.work_of(job for _, job, _ in results) / (TRIALS * MOST)
    return work, loss - losses[MOST].min()


def halving_from(least):
    return lambda trials: search.successive_halving(trials, least, MOST, 4)


def test_every_trial_has_every_budget(curves):
    assert len(curves) == 2 * len(SEEDS) * TRIALS
    assert not curves.isna().to_numpy().any()


def test_with_a_falling_rate_halving_comes_near_the_best_for_less_than_a_fifth(curves):
    found = [replay(curves, "falling", seed, halving_from(16384)) for seed in SEEDS]
    assert all(work < 0.2 for work, _ in found)
    assert all(apart <= NEAR for _, apart in found)


def test_it_begins_too_small_where_early_ranks_mislead(curves):
    small = [replay(curves, "falling", s, halving_from(4096))[1] for s in SEEDS]
    larger = [replay(curves, "falling", s, halving_from(16384))[1] for s in SEEDS]
    assert np.mean(small) > np.mean(larger) + 0.001


def correlation(curves, rate, budget):
    ranks = curves.loc[rate].groupby("seed").rank()
    return ranks[budget].corr(ranks[MOST])


def test_a_constant_rate_makes_early_ranks_poor(curves):
    for budget in (4096, 16384):
        assert correlation(curves, "falling", budget) > 0.75
        assert correlation(curves, "constant", budget) < 0.7


def test_the_choice_is_better_than_the_median_on_new_days_too_but_by_less(curves):
    table = load_study("search")
    tests = table.pivot(index=["rate", "seed", "trial"], columns="samples", values="test_loss")
    gains = []
    for seed in SEEDS:
        by, new = curves.loc["falling", seed][MOST], tests.loc["falling", seed][MOST]
        gains.append([column.median() - column[by.idxmin()] for column in (by, new)])
    chosen_by, on_new = np.mean(gains, axis=0)
    assert 0 < on_new < chosen_by
