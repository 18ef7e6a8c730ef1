"""What the notebook says of halving, Hyperband and ASHA holds in the stored study."""

import numpy as np
import pytest

from helpers.parallel import search
from helpers.planner.tasks import simulate_search
from helpers.studies import load_study
from helpers.studies.search import MOST, SEEDS, TRIALS, WITH_OPTUNA, best_with_optuna

NEAR = 0.005


@pytest.fixture(scope="module")
def curves():
    table = load_study("search")
    index = ["rate", "seed", "trial"]
    return table.pivot(index=index, columns="samples", values="valid_loss")


def replay(curves, rate, seed, order, make):
    """Work as a share of the full search, and how much worse than the best trial its choice is.

    A choice that was not trained with all rows is trained once more.
    """
    losses = curves[rate, seed]
    trials = np.random.default_rng([seed, order]).permutation(TRIALS).tolist()
    results, _ = simulate_search(
        make(trials), lambda job: (losses[job.config][job.budget], job.budget), workers=8
    )
    choice, _ = search.best_of([(job, loss) for _, job, loss in results])
    work = search.work_of(job for _, job, _ in results) + MOST * (choice.budget != MOST)
    best = min(loss[MOST] for loss in losses.values())
    return work / (TRIALS * MOST), losses[choice.config][MOST] - best


def halving_from(least):
    return lambda trials: search.successive_halving(trials, least, MOST, 4)


def asha(trials):
    return search.asha(trials, 4096, MOST, 4)


def hyperband(trials):
    return search.hyperband(trials, 16384, MOST, 4)


def means(curves, rate, make):
    """Over seeds and 20 orders: mean work, mean distance from the best, share of near ones."""
    tables = {(rate, seed): curves.loc[rate, seed].to_dict("index") for seed in SEEDS}
    found = [replay(tables, rate, seed, order, make) for seed in SEEDS for order in range(20)]
    return (*np.mean(found, axis=0), np.mean([apart <= NEAR for _, apart in found]))


def picked(curves, rate, trials):
    """How much worse than the best the best of so many random trials is, in the mean."""
    apart = []
    for seed in SEEDS:
        whole, random = curves.loc[rate, seed][MOST].to_numpy(), np.random.default_rng(seed)
        picks = [whole[random.permutation(TRIALS)[:trials]].min() for _ in range(500)]
        apart.append(np.mean(picks) - whole.min())
    return np.mean(apart)


def test_every_trial_has_every_budget(curves):
    assert len(curves) == 2 * len(SEEDS) * TRIALS
    assert not curves.isna().to_numpy().any()


def test_halving_comes_near_the_best_in_four_of_five_for_less_than_a_tenth(curves):
    work, apart, near = means(curves, "falling", halving_from(4096))
    assert work < 0.1
    assert near == 4 / 5
    assert 1.5 * apart < picked(curves, "falling", 3)


def test_with_three_rungs_it_is_no_better_than_random_search(curves):
    work, apart, _ = means(curves, "falling", halving_from(16384))
    assert work == 6 / TRIALS
    assert abs(apart - picked(curves, "falling", 6)) < 0.001


def test_asha_with_its_choice_trained_to_the_end_is_as_good_as_halving(curves):
    work, apart, near = means(curves, "falling", asha)
    assert work < 0.1 and near > 0.6
    assert abs(apart - means(curves, "falling", halving_from(4096))[1]) < 0.0005
    assert 1.5 * apart < picked(curves, "falling", 3)


@pytest.mark.parametrize("rate", ["falling", "constant"])
def test_hyperband_is_no_better_than_random_search_of_the_same_work(curves, rate):
    work, apart, _ = means(curves, rate, hyperband)
    assert 8 / TRIALS < work < 9 / TRIALS
    assert abs(apart - picked(curves, rate, 9)) < 0.001


def test_in_one_large_search_asha_saves_waiting_but_random_search_is_ahead(curves):
    losses = curves.loc["falling"].to_dict("index")
    first, busy, best = {}, {}, {}
    searches = {"halving": halving_from(4096), "asha": asha}
    searches["random"] = lambda trials: search.random_search(trials, MOST)
    for name, make in searches.items():
        found = []
        for order in range(20):
            trials = list(losses)
            np.random.default_rng(order).shuffle(trials)

            def trial(job):
                slow = 5 if job.trial % 8 == 3 else 1
                return losses[job.config][job.budget], slow * job.budget / MOST

            results, events = simulate_search(make(trials), trial, workers=8)
            whole = [(when, loss) for when, job, loss in results if job.budget == MOST]
            begin = min(whole)[0]
            at_work = sum(min(e.stop, begin) - e.start for e in events if e.start < begin)
            at_8 = min(loss for when, loss in whole if when <= 8)
            found.append((begin, at_work / (8 * begin), at_8))
        first[name], busy[name], best[name] = np.mean(found, axis=0)
    assert first["asha"] < 0.6 * first["halving"]
    assert busy["asha"] > 0.95 and busy["halving"] < 0.6
    assert best["random"] < best["asha"] < best["halving"]


def correlation(curves, rate, budget):
    ranks = curves.loc[rate].groupby("seed").rank()
    return ranks[budget].corr(ranks[MOST])


def test_a_constant_rate_makes_early_ranks_poor_and_halving_worse_than_random_search(curves):
    assert abs(correlation(curves, "falling", 4096) - 0.8) < 0.05
    assert correlation(curves, "constant", 4096) < correlation(curves, "falling", 4096) - 0.3
    _, apart, near = means(curves, "constant", halving_from(4096))
    assert near == 1 / 5
    assert apart > picked(curves, "constant", 3)
    assert apart > means(curves, "constant", halving_from(16384))[1] > picked(curves, "constant", 6)


def test_the_choice_is_better_than_the_median_on_new_days_too_but_by_less(curves):
    table = load_study("search")
    tests = table.pivot(index=["rate", "seed", "trial"], columns="samples", values="test_loss")
    gains = []
    for rate in ("falling", "constant"):
        for seed in SEEDS:
            by, new = curves.loc[rate, seed][MOST], tests.loc[rate, seed][MOST]
            gains.append([column.median() - column[by.idxmin()] for column in (by, new)])
    chosen_by, on_new = np.transpose(gains)
    assert min(on_new) > 0
    assert sum(on_new < chosen_by) == 9


@pytest.mark.slow
def test_the_stored_result_of_optuna_is_found_again():
    pytest.importorskip("optuna")
    for name, five in best_with_optuna().items():
        assert five == pytest.approx(WITH_OPTUNA[name], abs=2e-4)


def test_optuna_is_better_in_four_of_five():
    gain = np.subtract(WITH_OPTUNA["at random"], WITH_OPTUNA["TPE"])
    assert sum(gain > 0) == 4
