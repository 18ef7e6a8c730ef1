"""The sums of parts give scikit-learn's line, however the rows are cut."""

import doctest

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from helpers.cluster import open_cluster
from helpers.datasets import TASKS, load_table
from helpers.parallel import least_squares
from helpers.parallel.least_squares import Moments, add_up, fit_flights, solve


def made_up(n=400, d=5, seed=0):
    """Rows of which a line explains a part."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, X @ rng.normal(size=d) + 3 + rng.normal(size=n)


def fit_parts(X, y, cuts):
    """The line from the sums of parts, which end at the given rows."""
    return solve(add_up(map(Moments.of, np.split(X, cuts), np.split(y, cuts))))


def assert_like_sklearn(fit, X, y):
    line = LinearRegression().fit(X, y)
    expected = np.append(line.coef_, line.intercept_)
    apart = np.abs(np.append(fit.coef, fit.intercept) - expected).max()
    assert apart <= 1e-9 * np.abs(expected).max()
    assert fit.r2 == pytest.approx(line.score(X, y), abs=1e-9)
    assert fit.residual == pytest.approx(np.sum((y - line.predict(X)) ** 2), rel=1e-9, abs=1e-9)
    assert fit.rank == line.rank_


# ---------------------------------------------------------------- equal to scikit-learn


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("month", [1, 7])  # in July one airline has no flight: its column is empty
def test_a_month_in_random_parts_has_the_line_of_scikit_learn(task, month):
    table = load_table(task, month=month)
    cuts = np.sort(np.random.default_rng(month).integers(len(table), size=9))
    assert_like_sklearn(fit_parts(table.X, table.y, cuts), table.X, table.y)


@pytest.mark.parametrize("seed", range(8))
def test_any_cut_into_unequal_and_empty_parts_gives_the_same_line(seed):
    X, y = made_up(seed=seed)
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(len(X) + 1, size=rng.integers(1, 30)))
    assert_like_sklearn(fit_parts(X, y, [0, *cuts, *cuts[-1:]]), X, y)


def test_parts_of_one_row_give_the_same_line():
    X, y = made_up(60)
    assert_like_sklearn(fit_parts(X, y, range(1, 60)), X, y)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_with_fewer_rows_than_columns_the_smallest_weights_are_found(n):
    X, y = made_up(n)
    line = LinearRegression().fit(X, y)
    fit = fit_parts(X, y, [1])
    assert np.append(fit.coef, fit.intercept) == pytest.approx(
        np.append(line.coef_, line.intercept_), abs=1e-9
    )
    assert fit.rank == n - 1


def test_collinear_and_constant_columns_get_the_smallest_weights():
    X, y = made_up()
    extra = [X[:, 0] + X[:, 1], 1000 * X[:, 2], np.full(len(X), 1e8 / 3), np.zeros(len(X))]
    X = np.column_stack([*extra, X])
    fit, constant = fit_parts(X, y, [7, 200]), [2, 3]
    assert fit.rank == 5 and not fit.coef[constant].any()
    # scikit-learn may give a constant column a weight of 1e-16 by rounding. Times 3e7 that is 1e-8
    # in its intercept, so it is asked without the constant columns, and for its predictions.
    varying = fit._replace(coef=np.delete(fit.coef, constant))
    assert_like_sklearn(varying, np.delete(X, constant, axis=1), y)
    predicted = LinearRegression().fit(X, y).predict(X)
    assert np.abs(X @ fit.coef + fit.intercept - predicted).max() < 1e-9
    # One column in two very unequal units: nearly all the weight goes to the large one.
    weights = fit_parts(X[:, [1, 6]], y, [9]).coef
    assert weights[0] / weights[1] == pytest.approx(1000)


def test_columns_without_any_variation_leave_the_mean():
    fit = fit_parts(np.ones((4, 2)), np.array([1.0, 2.0, 3.0, 6.0]), [1])
    assert (fit.intercept, fit.r2, fit.rank) == (3, 0, 0)
    assert not fit.coef.any()


def test_a_target_that_never_varies_is_explained():
    X, y = made_up()
    fit = fit_parts(X, np.full(len(y), 1e8 + 0.1), [50])
    assert fit.r2 == 1
    assert fit.intercept == pytest.approx(1e8 + 0.1)
    assert np.abs(fit.coef).max() < 1e-9


def test_units_do_not_decide_which_columns_count():
    X, y = made_up()
    units = 10.0 ** np.array([-7, -3, 0, 3, 7])
    fit = fit_parts(X * units, y, [100])
    assert fit.coef * units == pytest.approx(fit_parts(X, y, [100]).coef, rel=1e-9)
    assert fit.rank == 5


# ---------------------------------------------------------------- numbers


def test_a_huge_offset_ruins_sums_about_zero_and_not_these():
    X, y = made_up()
    far = X + 1e8
    near = far - 1e8  # exactly: what rounding to 1e8 has left of X
    true = fit_parts(near, y, [100])
    fit = fit_parts(far, y, [100, 101, 300])
    assert fit.coef == pytest.approx(true.coef, abs=1e-8)  # a mean is known to 1e-8
    assert fit.intercept + fit.coef.sum() * 1e8 == pytest.approx(true.intercept, abs=1e-6)
    assert fit.r2 == pytest.approx(true.r2, abs=1e-9)
    mean = far.mean(axis=0)
    naive = far.T @ far - len(far) * np.outer(mean, mean)
    naive_xy = far.T @ y - len(far) * mean * y.mean()
    error = np.abs(np.linalg.lstsq(naive, naive_xy, rcond=None)[0] - true.coef).max()
    assert error > 0.1  # all digits are gone


def test_narrow_numbers_are_summed_in_double_precision():
    X, y = made_up(3000)
    X, y = np.float32(X + 1000), np.float32(y)
    fit = fit_parts(X, y, [1000])
    assert fit.coef.dtype == np.float64
    assert_like_sklearn(fit, np.float64(X), np.float64(y))
    whole = np.arange(6, dtype=np.int8).reshape(3, 2)
    assert Moments.of(whole, [True, False, True]).scatter[0, 0] == 8


def test_adding_is_associative_and_commutative_to_rounding():
    X, y = made_up()
    a, b, c = map(Moments.of, np.split(X + 5, [3, 250]), np.split(y, [3, 250]))
    one = (a + b) + c
    for other in (a + (b + c), (c + a) + b):
        assert other.n == one.n == 400
        assert other.mean == pytest.approx(one.mean, rel=1e-14)
        assert other.scatter == pytest.approx(one.scatter, rel=1e-12, abs=1e-11)


def test_an_empty_part_changes_no_bit():
    X, y = made_up(50)
    some, none = Moments.of(X, y), Moments.of(X[:0], y[:0])
    for total in (some + none, none + some, none + none + some):
        assert total.n == 50
        assert np.array_equal(total.mean, some.mean)
        assert np.array_equal(total.scatter, some.scatter)


def test_the_moments_are_means_and_covariances():
    X, y = made_up()
    total = add_up([Moments.of(X[:9], y[:9]), Moments.of(X[9:], y[9:])])
    Z = np.column_stack([X, y])
    assert total.mean == pytest.approx(Z.mean(axis=0))
    assert total.scatter / (total.n - 1) == pytest.approx(np.cov(Z.T))


def test_parts_that_arrive_one_by_one_are_not_kept():
    alive = []

    class Counted(Moments):
        def __del__(self):
            alive.remove(id(self))

    def arriving():
        for seed in range(20):
            part = Counted.of(*made_up(30, seed=seed))
            alive.append(id(part))
            assert len(alive) <= 3  # this one, the one before, and the first as the sum so far
            yield part

    assert add_up(arriving()).n == 600


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("X", "y", "sentence"),
    [
        (np.ones((3, 2)), np.ones(4), r"In shard 8 X has shape \(3, 2\) and y has shape \(4,\)"),
        (np.ones(3), np.ones(3), r"X has shape \(3,\).*give X as \(n, d\) and y as \(n,\)\."),
        (np.ones((3, 2)), np.ones((3, 1)), r"y has shape \(3, 1\)"),
        ([[1, 2], [1, np.nan]], [1, 2], "In shard 8 column 1 of X has a value that is NaN"),
        ([[np.inf, 2], [-np.inf, 1]], [1, 2], "In shard 8 column 0 of X has .* or infinite"),
        ([[1, 2], [1, 3]], [1, np.nan], "In shard 8 y has a value that is NaN or infinite"),
    ],
)
def test_rows_that_cannot_be_summed_are_named(X, y, sentence):
    with pytest.raises(ValueError, match=sentence):
        Moments.of(X, y, name="shard 8")


def test_parts_with_other_columns_are_named():
    parts = [Moments.of(*made_up(9, d)) for d in (3, 3, 4)]
    with pytest.raises(ValueError, match="Part 2 has 4 columns, those before it have 3: give all"):
        add_up(parts)
    with pytest.raises(ValueError, match="The parts have 4 and 3 columns: give all the same"):
        parts[2] + parts[0]
    with pytest.raises(TypeError):
        parts[0] + 1


def test_nothing_to_fit_gets_one_sentence():
    with pytest.raises(ValueError, match="There are no parts to add up: give at least one."):
        add_up([])
    with pytest.raises(ValueError, match="There are no rows to fit: give at least one."):
        solve(Moments.of(np.empty((0, 3)), []))


# ---------------------------------------------------------------- on workers


def test_two_workers_fit_the_months_they_load():
    with open_cluster(workers=2) as cluster:
        fit = fit_flights(cluster.client, TASKS[0], month=[1, 2])
        again = fit_flights(cluster.client, TASKS[0], month=[2, 1])
        with pytest.raises(ValueError, match="month must be a number from 1 to 12"):
            fit_flights(cluster.client, TASKS[0], month=13)
        with pytest.raises(ValueError, match="task must be one of"):
            fit_flights(cluster.client, "early", month=1)
    table = load_table(TASKS[0], month=[1, 2])
    assert_like_sklearn(fit, table.X, table.y)
    # The months are added in their order, whoever was first: the same bits every time.
    assert np.array_equal(fit.coef, again.coef)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_all_flights_have_the_line_of_scikit_learn(task):
    table = load_table(task)
    with open_cluster(workers=2) as cluster:
        assert_like_sklearn(fit_flights(cluster.client, task), table.X, table.y)


def test_the_examples_in_the_docstrings_are_right():
    failed, tried = doctest.testmod(least_squares)
    assert failed == 0
    assert tried >= 5
