"""Networks in NumPy: gradients against finite differences, shards against the whole batch."""

import dataclasses
import doctest
import importlib
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import log_loss, mean_squared_error

from helpers.nn import (
    MLP,
    SGD,
    Adam,
    clip_by_global_norm,
    linear,
    linear_grad,
    linear_grad_input,
    linear_grad_weights,
    logistic_loss,
    relu,
    relu_grad,
    softmax_loss,
    squared_loss,
    state_bytes,
)

ROWS = 12
NETWORKS = [
    MLP((5, 7, 6, 1)),
    MLP((5, 1)),
    MLP((5, 7, 4), loss="softmax"),
    MLP((5, 7, 6, 1), loss="squared"),
    MLP((5, 7, 3), loss="squared"),
]
OPTIMISERS = [
    SGD(0.1),
    SGD(0.1, momentum=0.9, weight_decay=0.02),
    Adam(0.1, betas=(0.8, 0.99), epsilon=1e-6, weight_decay=0.02),
]
each_network = pytest.mark.parametrize("mlp", NETWORKS, ids=str)
each_optimiser = pytest.mark.parametrize("optimiser", OPTIMISERS, ids=str)


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def targets(mlp, rows, seed=1):
    """Labels or numbers that a network of this loss could learn."""
    random = np.random.default_rng(seed)
    if mlp.loss == "logistic":
        return random.integers(0, 2, rows)
    if mlp.loss == "softmax":
        return random.integers(0, mlp.widths[-1], rows)
    return random.normal(size=(rows, mlp.widths[-1]))


def parameters_of(mlp, dtype=np.float64):
    """Parameters whose biases are not 0."""
    return mlp.initialise(3, dtype) + normal(mlp.size, seed=4, dtype=dtype) / 10


def differences(function, x, step=1e-5):
    """The gradient of a function of one array, by central differences."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def agree(left, right, relative=1e-7):
    """Is the distance of two gradients small beside their length?"""
    return np.linalg.norm(left - right) <= relative * np.linalg.norm(right)


# ---------------------------------------------------------------- layers


def test_a_linear_layer_worked_by_hand():
    x, w, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0], [10.0]]), np.array([0.5])
    assert linear(x, w, b).tolist() == [[21.5], [43.5]]
    dw, db, dx = linear_grad(np.array([[1.0], [2.0]]), x, w)
    assert dw.tolist() == [[7.0], [10.0]] and db.tolist() == [3.0]
    assert dx.tolist() == [[1.0, 10.0], [2.0, 20.0]]


def test_the_rectifier_worked_by_hand():
    y = relu(np.array([[-1.0, 0.0, 2.0]]))
    assert y.tolist() == [[0.0, 0.0, 2.0]]
    assert relu_grad(np.array([[5.0, 6.0, 7.0]]), y).tolist() == [[0.0, 0.0, 7.0]]


@pytest.mark.parametrize("d_out", [1, 3])
def test_the_gradient_of_a_linear_layer_equals_finite_differences(d_out):
    x, w, b, dy = normal(6, 4), normal(4, d_out, seed=1), normal(d_out, seed=2), normal(6, d_out)
    dw, db, dx = linear_grad(dy, x, w)
    assert agree(dw, differences(lambda w: np.sum(dy * linear(x, w, b)), w))
    assert agree(db, differences(lambda b: np.sum(dy * linear(x, w, b)), b))
    assert agree(dx, differences(lambda x: np.sum(dy * linear(x, w, b)), x))


def test_the_gradient_of_the_rectifier_equals_finite_differences():
    x, dy = normal(6, 4), normal(6, 4, seed=1)
    assert agree(relu_grad(dy, relu(x)), differences(lambda x: np.sum(dy * relu(x)), x))


def test_layers_write_into_given_arrays_the_same_numbers():
    x, w, b, dy = normal(6, 4), normal(4, 3, seed=1), normal(3, seed=2), normal(6, 3)
    y = np.full((6, 3), np.nan)
    assert linear(x, w, b, out=y) is y and np.array_equal(y, linear(x, w, b))
    given = [np.full_like(array, np.nan) for array in (w, b, x)]
    results = linear_grad(dy, x, w, *given)
    assert all(result is array for result, array in zip(results, given))
    assert all(np.array_equal(*pair) for pair in zip(given, linear_grad(dy, x, w)))
    out, mask = dy.copy(), np.empty((6, 3), bool)
    expected = relu_grad(dy, y)
    assert relu_grad(out, y, out=out, mask=mask) is out and np.array_equal(out, expected)
    assert np.array_equal(mask, y > 0)
    assert relu(y, out=y) is y and y.min() == 0


def test_the_parts_of_the_linear_gradient_are_the_whole():
    x, w, dy = normal(6, 4), normal(4, 3, seed=1), normal(6, 3)
    dw, db, dx = linear_grad(dy, x, w)
    only_dw, only_db, no_dx = linear_grad(dy, x, w, need_dx=False)
    assert no_dx is None and np.array_equal(only_dw, dw) and np.array_equal(only_db, db)
    assert all(np.array_equal(*pair) for pair in zip(linear_grad_weights(dy, x), (dw, db)))
    assert np.array_equal(linear_grad_input(dy, w), dx)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: linear(normal(2, 3), normal(4, 5), normal(5)), ValueError, "both need two axes"),
        (lambda: linear(normal(3), normal(3, 5), normal(5)), ValueError, "both need two axes"),
        (lambda: linear(normal(2, 3), normal(3, 5), normal(1)), ValueError, r"b has shape \(1,\)"),
        (lambda: linear([[1.0]], normal(1, 5), normal(5)), TypeError, "x is a list"),
        (
            lambda: linear(normal(2, 3), normal(3, 5, dtype="f4"), normal(5)),
            TypeError,
            r"dtypes differ \(x float64, w float32, b float64\)",
        ),
        (lambda: linear_grad(normal(3, 5), normal(2, 3), normal(3, 5)), ValueError, "as many rows"),
        (lambda: linear_grad_input(normal(2, 5), normal(3, 4)), ValueError, r"w.T \(4, 3\)"),
        (lambda: relu(np.array([1, 2])), TypeError, "dtype int64"),
        (lambda: relu(normal(2), out=normal(3)), ValueError, "the result has shape"),
        (lambda: relu(normal(2), out=normal(2, dtype="f4")), TypeError, "array of float64"),
        (lambda: relu(normal(2), out=[0.0, 0.0]), TypeError, "out is list"),
        (lambda: relu_grad(normal(2, 1), normal(2)), ValueError, "must be the same"),
    ],
)
def test_layers_refuse_what_does_not_fit(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


# ---------------------------------------------------------------- losses


def loss_cases():
    random = np.random.default_rng(5)
    yield logistic_loss, normal(ROWS), random.integers(0, 2, ROWS).astype(np.uint8)
    yield logistic_loss, normal(ROWS, 1), random.integers(0, 2, ROWS).astype(bool)
    yield squared_loss, normal(ROWS), normal(ROWS, seed=6)
    yield squared_loss, normal(ROWS, 1), normal(ROWS, seed=6)
    yield squared_loss, normal(ROWS, 3), normal(ROWS, 3, seed=6)
    yield softmax_loss, normal(ROWS, 4), random.integers(0, 4, ROWS).astype(np.uint8)


each_loss = pytest.mark.parametrize(("loss", "z", "y"), list(loss_cases()))


@each_loss
@pytest.mark.parametrize("divisor", [None, 5])
def test_gradients_of_losses_equal_finite_differences(loss, z, y, divisor):
    _, dz = loss(z, y, divisor)
    assert dz.shape == z.shape
    assert agree(dz, differences(lambda z: loss(z, y, divisor)[0], z))


@each_loss
def test_losses_write_their_gradient_into_a_given_array(loss, z, y):
    out, before = np.full_like(z, np.nan), z.copy()
    value, dz = loss(z, y, out=out)
    expected, expected_dz = loss(z, y)
    assert dz is out and value == expected and np.array_equal(dz, expected_dz)
    assert np.array_equal(z, before)


@each_loss
def test_losses_of_shards_add_up_to_that_of_the_batch(loss, z, y):
    value, dz = loss(z, y)
    parts = [loss(z[rows], y[rows], divisor=ROWS) for rows in (np.s_[:5], np.s_[5:5], np.s_[5:])]
    assert abs(sum(part[0] for part in parts) - value) < 1e-12
    assert np.allclose(np.concatenate([part[1] for part in parts]), dz, rtol=0, atol=1e-15)


@each_loss
def test_no_rows_have_a_loss_of_0(loss, z, y):
    for divisor in (None, 7):
        value, dz = loss(z[:0], y[:0], divisor)
        assert value == 0.0 and dz.shape == z[:0].shape


@each_loss
def test_losses_keep_float32(loss, z, y):
    value, dz = loss(z.astype("f4"), y, divisor=np.float64(ROWS))
    assert type(value) is float and dz.dtype == np.float32
    assert np.allclose(dz, loss(z, y)[1], rtol=1e-5, atol=1e-7)


def test_losses_equal_those_of_scikit_learn():
    z, y = 3 * normal(50), np.random.default_rng(1).integers(0, 2, 50)
    assert np.isclose(logistic_loss(z, y)[0], log_loss(y, 1 / (1 + np.exp(-z))), rtol=1e-12)
    assert np.isclose(squared_loss(z, y)[0], mean_squared_error(y, z), rtol=1e-12)
    scores, labels = normal(50, 4), np.random.default_rng(1).integers(0, 4, 50)
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    expected = log_loss(labels, chances, labels=range(4))
    assert np.isclose(softmax_loss(scores, labels)[0], expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_the_dtype_of_labels_changes_no_number(dtype):
    z, y = normal(4), np.array([0.0, 1.0, 1.0, 0.0])
    for loss in (logistic_loss, squared_loss):
        value, dz = loss(z, y.astype(dtype))
        expected, expected_dz = loss(z, y)
        assert value == expected and np.array_equal(dz, expected_dz)


def test_two_outputs_of_softmax_are_the_logistic_loss_of_their_difference():
    z, y = normal(20, 2), np.random.default_rng(1).integers(0, 2, 20)
    value, dz = softmax_loss(z, y)
    expected, slope = logistic_loss(z[:, 1] - z[:, 0], y)
    assert np.isclose(value, expected, rtol=1e-12)
    assert np.allclose(dz, np.column_stack([-slope, slope]), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_losses_are_stable_for_large_scores(dtype):
    z, y = np.array([1000, -1000, 1000, -1000], dtype), np.array([1, 0, 0, 1])
    value, dz = logistic_loss(z, y)
    assert value == 500 and dz.tolist() == [0, 0, 0.25, -0.25]
    assert np.isclose(logistic_loss(z[:1] / 20, [1])[0], np.exp(-50), rtol=1e-5, atol=0)
    value, dz = softmax_loss(np.array([[1000, -1000], [1000, -1000]], dtype), np.array([0, 1]))
    assert value == 1000 and dz.tolist() == [[0, 0], [0.5, -0.5]]


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: logistic_loss(normal(3, 2), [0, 1, 0]), ValueError, r"needs \(n,\) or \(n, 1\)"),
        (lambda: logistic_loss(normal(3), [0, 1]), ValueError, "one target for each output"),
        (lambda: logistic_loss(normal(3), [0, 1, 2]), ValueError, "neither 0 nor 1"),
        (lambda: logistic_loss(normal(3), [0, 1, np.nan]), ValueError, "neither 0 nor 1"),
        (lambda: logistic_loss(normal(1), [1], divisor=0), ValueError, "divisor is 0"),
        (lambda: logistic_loss(normal(1), [1], divisor=np.inf), ValueError, "divisor is inf"),
        (lambda: logistic_loss(np.array([1, 2]), [0, 1]), TypeError, "z has dtype int64"),
        (lambda: squared_loss(normal(3, 2), normal(3)), ValueError, "one target for each output"),
        (lambda: squared_loss(normal(1, 3), normal(3)), ValueError, "one target for each output"),
        (lambda: squared_loss(normal(2, 2, 2), normal(2, 2, 2)), ValueError, "squared loss needs"),
        (lambda: softmax_loss(normal(3), np.zeros(3, int)), ValueError, r"\(n, classes\)"),
        (lambda: softmax_loss(normal(2, 3), np.array([0, 3])), ValueError, "go from 0 to 3"),
        (lambda: softmax_loss(normal(2, 3), np.array([-1, 0])), ValueError, "go from -1 to 0"),
        (lambda: softmax_loss(normal(2, 3), np.zeros(2)), TypeError, "give integers"),
    ],
)
def test_losses_refuse_what_does_not_fit(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


# ---------------------------------------------------------------- the network


@each_network
def test_the_gradient_of_a_network_equals_finite_differences(mlp):
    parameters, x, y = parameters_of(mlp), normal(ROWS, 5), targets(mlp, ROWS)
    loss, gradient = mlp.loss_and_gradient(parameters, x, y)
    assert loss == mlp.loss_at(parameters, x, y)
    assert agree(gradient, differences(lambda p: mlp.loss_at(p, x, y), parameters))


@each_network
def test_gradients_of_unequal_shards_add_up_to_that_of_the_batch(mlp):
    parameters, x, y = parameters_of(mlp), normal(ROWS, 5), targets(mlp, ROWS)
    loss, gradient = mlp.loss_and_gradient(parameters, x, y)
    parts = [
        mlp.loss_and_gradient(parameters, x[rows], y[rows], divisor=ROWS)
        for rows in (np.s_[:5], np.s_[5:5], np.s_[5:])
    ]
    assert parts[1][0] == 0 and not parts[1][1].any()
    assert abs(sum(part[0] for part in parts) - loss) < 1e-12
    assert agree(sum(part[1] for part in parts), gradient, relative=1e-12)


@each_network
def test_given_memory_changes_no_number(mlp):
    parameters, workspace = parameters_of(mlp), mlp.workspace(rows=ROWS)
    out = np.full(mlp.size, np.nan)
    for rows in (ROWS, 5, 0, ROWS):  # fewer rows, and then as many as before
        x, y = normal(rows, 5, seed=rows), targets(mlp, rows)
        before = parameters.copy(), x.copy()
        loss, gradient = mlp.loss_and_gradient(parameters, x, y, 9, out, workspace)
        expected, expected_gradient = mlp.loss_and_gradient(parameters, x, y, divisor=9)
        assert gradient is out and loss == expected
        assert np.array_equal(gradient, expected_gradient)
        assert np.array_equal(parameters, before[0]) and np.array_equal(x, before[1])


def test_a_network_worked_by_hand():
    mlp = MLP((1, 2, 1), loss="squared")
    #                      w0          b0         w1          b1
    parameters = np.array([1.0, -1.0, 0.0, 0.5, 2.0, 3.0, 1.0])
    x, y = np.array([[2.0], [-1.0]]), np.array([4.0, 5.0])
    # Hidden: (2, 0) and (0, 1.5). Outputs 5 and 5.5; errors 1 and 0.5; their slopes 2 and 1.
    assert mlp.predict(parameters, x).tolist() == [[5.0], [5.5]]
    loss, gradient = mlp.loss_and_gradient(parameters, x, y, divisor=1)
    assert loss == 1.25
    assert gradient.tolist() == [8.0, -3.0, 4.0, 3.0, 4.0, 1.5, 3.0]


@each_network
def test_float32_stays_float32(mlp):
    x, y = normal(ROWS, 5), targets(mlp, ROWS)
    wide, narrow = parameters_of(mlp), parameters_of(mlp, np.float32)
    workspace = mlp.workspace(ROWS, np.float32)
    loss, gradient = mlp.loss_and_gradient(narrow, x.astype("f4"), y, workspace=workspace)
    expected, expected_gradient = mlp.loss_and_gradient(wide, x, y)
    assert gradient.dtype == mlp.predict(narrow, x.astype("f4")).dtype == np.float32
    assert all(array.dtype == np.float32 for array in workspace.outputs + workspace.gradients)
    assert np.isclose(loss, expected, rtol=1e-5) and agree(gradient, expected_gradient, 1e-5)


def test_backward_names_a_layer_when_its_slice_is_complete():
    mlp, x = MLP((5, 7, 6, 1)), normal(ROWS, 5)
    parameters, workspace, y = parameters_of(mlp), mlp.workspace(ROWS), targets(mlp, ROWS)
    loss, expected = mlp.loss_and_gradient(parameters, x, y)
    out = np.full(mlp.size, np.nan)
    assert mlp.forward(parameters, x, y, workspace) == loss
    named = []
    for layer in mlp.backward(parameters, x, out, workspace):
        named.append(layer)
        start, _ = mlp.slices[layer]
        assert np.isnan(out[:start]).all() and np.array_equal(out[start:], expected[start:])
        out[start:] = expected[start:] * 2  # sent, summed, scaled: the later layers do not mind
        expected = np.concatenate([expected[:start], out[start:]])
    assert named == [2, 1, 0]


def test_slices_and_views_cover_the_flat_array_once():
    mlp = MLP((3, 4, 2), loss="softmax")
    assert mlp.size == 26 and mlp.slices == ((0, 16), (16, 26))
    flat = np.arange(26.0)
    (w0, b0), (w1, b1) = mlp.views(flat)
    assert (w0.shape, b0.shape, w1.shape, b1.shape) == ((3, 4), (4,), (4, 2), (2,))
    assert np.array_equal(np.concatenate([a.ravel() for a in (w0, b0, w1, b1)]), flat)
    w1 += 100
    assert flat[16:24].min() == 116 and flat[24] == 24


def test_initial_weights_depend_on_seed_and_layer_only():
    deep, shallow = MLP((3, 4, 5, 1)), MLP((3, 4, 1))
    np.random.default_rng(0).normal()  # other random numbers do not matter
    first, again = deep.initialise(seed=7), deep.initialise(seed=7)
    assert np.array_equal(first, again)
    start, stop = deep.slices[0]
    assert np.array_equal(first[start:stop], shallow.initialise(seed=7)[start:stop])
    assert not np.array_equal(first, deep.initialise(seed=8))
    (w0, _), (w1, _) = MLP((4, 4, 4), loss="squared").views(MLP((4, 4, 4), "squared").initialise(7))
    assert not np.array_equal(w0, w1)
    assert np.array_equal(w0, np.random.default_rng([7, 0]).normal(scale=0.5**0.5, size=(4, 4)))
    assert np.array_equal(deep.initialise(7, np.float32), first.astype("f4"))


def test_initial_weights_have_the_scale_of_he_and_biases_are_0():
    mlp = MLP((200, 300, 1))
    for w, b in mlp.views(mlp.initialise(seed=0)):
        assert abs(w.std() / np.sqrt(2 / len(w)) - 1) < 0.15 and not b.any()


def test_a_network_is_equal_hashable_and_can_be_sent():
    mlp = MLP([5, np.int64(7), 1], loss="squared")
    assert mlp == MLP((5, 7, 1), "squared") == pickle.loads(pickle.dumps(mlp))
    assert hash(mlp) == hash(MLP((5, 7, 1), "squared")) and type(mlp.widths[1]) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        mlp.loss = "softmax"


def test_a_workspace_grows_with_the_batch_and_not_back():
    mlp = MLP((5, 4, 1))
    parameters, x, y = parameters_of(mlp), normal(9, 5), np.arange(9) % 2
    workspace = mlp.workspace()
    for rows in (2, 9, 3):
        loss, gradient = mlp.loss_and_gradient(parameters, x[:rows], y[:rows], workspace=workspace)
        expected = mlp.loss_and_gradient(parameters, x[:rows], y[:rows])
        assert loss == expected[0] and np.array_equal(gradient, expected[1])
    assert [array.shape for array in workspace.outputs] == [(9, 4), (9, 1)]
    assert workspace.masks[0].shape == (9, 4) and workspace.masks[0].dtype == bool


def test_a_step_in_given_memory_allocates_only_a_few_numbers_a_row():
    mlp, rows = MLP((20, 64, 64, 1)), 2000
    parameters, x = mlp.initialise(0, np.float32), normal(rows, 20, dtype="f4")
    y, workspace = targets(mlp, rows), mlp.workspace(rows, np.float32)
    out, optimiser = np.empty_like(parameters), Adam(0.1)
    state = optimiser.start(mlp.size, np.float32)

    def step():
        mlp.loss_and_gradient(parameters, x, y, out=out, workspace=workspace)
        optimiser.step(parameters, out, state)

    step()
    tracemalloc.start()
    try:
        step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < rows * 64  # bytes; one array of activations would take four times as many


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: MLP((3,)), ValueError, "at least the numbers of inputs and outputs"),
        (lambda: MLP((3, 0, 1)), ValueError, "1 or more each"),
        (lambda: MLP((3, 1), loss="hinge"), ValueError, "no loss is called 'hinge': choose one of"),
        (lambda: MLP((3, 2)), ValueError, "logistic loss needs 1 output, not 2"),
        (lambda: MLP((3, 1), loss="softmax"), ValueError, "at least 2"),
        (lambda: MLP((3, 1)).views(normal(5)), ValueError, r"needs one contiguous array of shape"),
        (lambda: MLP((3, 1)).views(normal(8)[::2]), ValueError, "contiguous"),
        (lambda: MLP((3, 1)).predict(normal(3), normal(2, 3)), ValueError, r"parameters of shape"),
        (lambda: MLP((3, 1)).predict(normal(4), normal(2, 4)), ValueError, r"needs \(rows, 3\)"),
        (lambda: MLP((3, 1)).predict(normal(4), normal(3)), ValueError, r"needs \(rows, 3\)"),
        (
            lambda: MLP((3, 1)).predict(normal(4, dtype="f4"), normal(2, 3)),
            TypeError,
            r"dtypes differ \(parameters float32, x float64\)",
        ),
        (
            lambda: MLP((3, 1)).loss_and_gradient(normal(4), normal(2, 3), [0, 1], out=normal(5)),
            ValueError,
            r"out has shape \(5,\)",
        ),
        (
            lambda: MLP((3, 1)).backward(
                normal(4), normal(2, 3), normal(4), MLP((3, 1)).workspace(1)
            ),
            ValueError,
            "holds 1 rows, the batch has 2: run forward with this batch first",
        ),
        (
            lambda: MLP((3, 1)).loss_and_gradient(
                normal(4), normal(2, 3), [0, 1], workspace=MLP((3, 2, 1)).workspace(2)
            ),
            ValueError,
            "was made for",
        ),
        (
            lambda: MLP((3, 1)).loss_and_gradient(
                normal(4), normal(2, 3), [0, 1], workspace=MLP((3, 1)).workspace(2, np.float32)
            ),
            ValueError,
            "was made for",
        ),
        (
            lambda: MLP((3, 1)).backward(
                normal(4), normal(2, 3), normal(4, dtype="f4"), MLP((3, 1)).workspace(2)
            ),
            TypeError,
            "dtypes differ",
        ),
    ],
)
def test_a_network_refuses_what_does_not_fit(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


# ---------------------------------------------------------------- optimisers


def test_momentum_worked_by_hand():
    sgd, parameters = SGD(rate=0.5, momentum=0.5, weight_decay=1.0), np.array([2.0])
    state = sgd.start(size=1)
    sgd.step(parameters, np.array([2.0]), state)  # g = 2 + 2, velocity 4
    assert parameters.tolist() == [0.0] and state["velocity"].tolist() == [4.0]
    sgd.step(parameters, np.array([2.0]), state)  # g = 2 + 0, velocity 2 + 2
    assert parameters.tolist() == [-2.0] and state["steps"] == 2


def test_adam_equals_its_published_formula():
    adam, parameters = OPTIMISERS[2], normal(30)
    state, expected = adam.start(30), parameters.copy()
    mean = square = np.zeros(30)
    for step in range(1, 6):
        gradient = normal(30, seed=step)
        adam.step(parameters, gradient, state)
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        change = mean / (1 - 0.8**step) / (np.sqrt(square / (1 - 0.99**step)) + 1e-6)
        expected = expected - 0.1 * (change + 0.02 * expected)
        assert np.allclose(parameters, expected, rtol=1e-12, atol=1e-14)


@each_optimiser
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_owner_of_a_slice_gets_the_bits_of_the_whole(optimiser, dtype):
    size = 40_003  # several blocks, none of them like a slice
    whole, dealt = normal(size, dtype=dtype), normal(size, dtype=dtype)
    state = optimiser.start(size, dtype)
    owners = [np.s_[:7], np.s_[7:20_000], np.s_[20_000:20_000], np.s_[20_000:]]
    states = [optimiser.start(len(dealt[owner]), dtype) for owner in owners]
    for step in range(3):
        gradient = normal(size, seed=step, dtype=dtype)
        before = gradient.copy()
        optimiser.step(whole, gradient, state)
        for owner, part in zip(owners, states):
            optimiser.step(dealt[owner], gradient[owner], part)
        assert np.array_equal(gradient, before)
    assert np.array_equal(whole, dealt) and whole.dtype == dtype
    assert not np.array_equal(whole, normal(size, dtype=dtype))


@each_optimiser
def test_float32_updates_follow_those_of_float64(optimiser):
    narrow, wide = normal(50, dtype="f4"), normal(50, dtype="f4").astype("f8")
    states = optimiser.start(50, np.float32), optimiser.start(50)
    for step in range(5):
        gradient = normal(50, seed=step, dtype="f4")
        optimiser.step(narrow, gradient, states[0], rate=np.float64(0.05))
        optimiser.step(wide, gradient.astype("f8"), states[1], rate=0.05)
    arrays = [value for value in states[0].values() if isinstance(value, np.ndarray)]
    assert all(array.dtype == np.float32 for array in arrays)
    assert np.allclose(narrow, wide, rtol=1e-5, atol=1e-6)


def test_settings_from_numpy_do_not_widen_float32():
    plain, scalar = normal(50, dtype="f4"), normal(50, dtype="f4")
    for optimiser in OPTIMISERS[1:]:
        fields = dataclasses.asdict(optimiser)
        fields.update({name: np.float64(v) for name, v in fields.items() if name != "betas"})
        other = type(optimiser)(**fields)
        states = [each.start(50, np.float32) for each in (optimiser, other)]
        for step in range(3):
            gradient = normal(50, seed=step, dtype="f4")
            optimiser.step(plain, gradient, states[0])
            other.step(scalar, gradient, states[1])
        assert np.array_equal(plain, scalar)


@each_optimiser
def test_a_rate_that_is_given_stands_in_for_the_optimisers_own(optimiser):
    slow = dataclasses.replace(optimiser, rate=0.001)
    left, right = normal(10), normal(10)
    states = optimiser.start(10), slow.start(10)
    for step in range(3):
        optimiser.step(left, normal(10, seed=step), states[0], rate=0.001)
        slow.step(right, normal(10, seed=step), states[1])
    assert np.array_equal(left, right)
    still = normal(10)
    optimiser.step(still, normal(10, seed=9), optimiser.start(10), rate=0)
    assert np.array_equal(still, normal(10))


def test_bytes_of_states_are_counted():
    assert state_bytes(SGD(0.1).start(100)) == 0
    assert state_bytes(SGD(0.1, momentum=0.9).start(100)) == 800
    assert state_bytes(Adam(0.1).start(100, np.float32)) == 800


def test_a_network_learns_what_a_line_cannot():
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (400, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)  # exclusive or: no line parts the classes
    mlp, adam = MLP((2, 16, 1)), Adam(rate=0.02)
    parameters, workspace = mlp.initialise(seed=0), mlp.workspace(400)
    state, out = adam.start(mlp.size), np.empty(mlp.size)
    for _ in range(300):
        mlp.loss_and_gradient(parameters, x, y, out=out, workspace=workspace)
        adam.step(parameters, out, state)
    right = (mlp.predict(parameters, x)[:, 0] > 0) == y
    assert right.mean() > 0.95


def test_clipping_shortens_what_is_too_long_only():
    gradient = np.array([3.0, 4.0])
    assert clip_by_global_norm(gradient, largest=10) == 5 and gradient.tolist() == [3, 4]
    assert clip_by_global_norm(gradient, largest=2.5) == 5 and gradient.tolist() == [1.5, 2.0]


def test_parts_of_a_gradient_are_clipped_like_the_whole():
    whole, parts = normal(20, dtype="f4"), np.split(normal(20, dtype="f4"), [7])
    norm = clip_by_global_norm(whole, largest=1.0)
    for part in parts:
        assert clip_by_global_norm(part, largest=1.0, norm=norm) == norm
    assert np.array_equal(np.concatenate(parts), whole) and whole.dtype == np.float32
    assert np.isclose(np.linalg.norm(whole), 1)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: SGD(-0.1), ValueError, "rate is -0.1: give 0 or more"),
        (lambda: SGD(np.nan), ValueError, "rate is nan"),
        (lambda: SGD(0.1, momentum=1), ValueError, "momentum is 1"),
        (lambda: SGD(0.1, weight_decay=-1), ValueError, "weight_decay is -1"),
        (lambda: Adam(0.1, betas=(0.9, 1.0)), ValueError, "beta_2 is 1.0"),
        (lambda: Adam(0.1, betas=(0.9,)), ValueError, "give two numbers"),
        (lambda: Adam(0.1, epsilon=-1e-8), ValueError, "epsilon is -1e-08"),
        (
            lambda: SGD(0.1).step(normal(3), normal(3), SGD(0.1).start(3), rate=-1),
            ValueError,
            "rate is -1",
        ),
        (
            lambda: SGD(0.1).step(normal(3), normal(3), Adam(0.1).start(3)),
            ValueError,
            "of the same optimiser",
        ),
        (
            lambda: Adam(0.1).step(normal(3), normal(3), Adam(0.1).start(4)),
            ValueError,
            "all need one axis of the same length",
        ),
        (
            lambda: SGD(0.1).step(normal(3), normal(1), SGD(0.1).start(3)),
            ValueError,
            r"parameters \(3,\), gradient \(1,\)",
        ),
        (
            lambda: SGD(0.1).step(normal(3, 1), normal(3, 1), SGD(0.1).start(3)),
            ValueError,
            "one axis",
        ),
        (
            lambda: Adam(0.1).step(normal(3), normal(3, dtype="f4"), Adam(0.1).start(3)),
            TypeError,
            "dtypes differ",
        ),
        (lambda: clip_by_global_norm(normal(3), 0), ValueError, "give a positive length"),
        (lambda: clip_by_global_norm(normal(3), 1, np.nan), ValueError, "training has diverged"),
        (lambda: clip_by_global_norm([1.0], 1), TypeError, "gradient is a list"),
    ],
)
def test_optimisers_refuse_what_does_not_fit(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


# ---------------------------------------------------------------- the package


@pytest.mark.parametrize("name", ["layers", "losses", "mlp", "optimisers"])
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(f"helpers.nn.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_networks_need_nothing_but_numpy():
    code = (
        "import sys, numpy; before = set(sys.modules); import helpers.nn; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} "
        "- set(sys.stdlib_module_names)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "['helpers']", run.stderr
