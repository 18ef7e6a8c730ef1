"""The small GPT in NumPy: gradients against finite differences, parts against the whole."""

import dataclasses
import doctest
import gc
import importlib
import pickle
import threading
import tracemalloc
import weakref

import numpy as np
import pytest

from helpers.nn import (
    GPT,
    Adam,
    Alone,
    KeyValueCache,
    Memory,
    attention,
    attention_grad,
    block,
    block_grad,
    block_grad_input,
    block_grad_weights,
    block_shapes,
    cross_entropy,
    embed,
    embed_grad,
    embedding,
    embedding_grad,
    gelu,
    gelu_grad,
    generate,
    head_loss,
    head_loss_grad,
    layer_norm,
    layer_norm_grad,
    named_views,
    softmax_loss,
)
from helpers.nn import transformer as parts_of_a_transformer

SMALL = GPT(vocabulary=7, context=6, width=8, heads=2, layers=2)


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def integers(high, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape)


def parameters_of(gpt, dtype=np.float64):
    """Parameters large enough that attention is not nearly even, and biases that are not 0."""
    return gpt.initialise(3, dtype) + normal(gpt.size, seed=4, dtype=dtype) / 4


def a_batch(gpt, batch=3, length=5, seed=0):
    """Tokens and targets; some of these do not count."""
    tokens = integers(gpt.vocabulary, batch, length, seed=seed)
    targets = integers(gpt.vocabulary, batch, length, seed=seed + 1)
    targets[0, 3:] = -1
    return tokens, targets


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


def empty_like(parameters):
    """Arrays of the same names and shapes, of which no number must stay."""
    return {name: np.full_like(array, np.nan) for name, array in parameters.items()}


@pytest.fixture(params=[16_384, 8], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """All parts of a transformer, with few numbers a chunk too."""
    monkeypatch.setattr(parts_of_a_transformer, "CHUNK", request.param)


# ---------------------------------------------------------------- parts of a transformer


@pytest.mark.usefixtures("chunks")
def test_the_gradient_of_the_layer_norm_equals_finite_differences():
    x, scale, shift, dy = normal(5, 4), normal(4, seed=1), normal(4, seed=2), normal(5, 4, seed=3)
    y, kept = layer_norm(x, scale, shift)
    assert np.allclose((y - shift) / scale, kept[0], rtol=1e-12)
    assert np.allclose(kept[0].mean(axis=1), 0) and np.allclose(kept[0].std(axis=1), 1, rtol=1e-3)

    def loss(x, scale, shift):
        return np.sum(dy * layer_norm(x, scale, shift)[0])

    dscale, dshift, dx = layer_norm_grad(dy, scale, kept)
    assert agree(dscale, differences(lambda scale: loss(x, scale, shift), scale))
    assert agree(dshift, differences(lambda shift: loss(x, scale, shift), shift))
    assert agree(dx, differences(lambda x: loss(x, scale, shift), x))


@pytest.mark.usefixtures("chunks")
def test_the_gradient_of_gelu_equals_finite_differences():
    x, dy, slope = 3 * normal(6, 4), normal(6, 4, seed=1), np.empty((6, 4))
    y = gelu(x, slope=slope)
    assert np.array_equal(y, gelu(x))
    assert agree(gelu_grad(dy, slope), differences(lambda x: np.sum(dy * gelu(x)), x))


def test_gelu_is_what_its_formula_says_and_stable():
    x = np.linspace(-6, 6, 50)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    assert np.allclose(gelu(x), expected, rtol=1e-12, atol=1e-15)
    slope = np.empty(2, "f4")
    assert gelu(np.array([-1e4, 1e4], "f4"), slope=slope).tolist() == [0, 1e4]
    assert slope.tolist() == [0, 1]


@pytest.mark.usefixtures("chunks")
def test_the_gradient_of_attention_equals_finite_differences():
    q, k, v, dy = (normal(3, 4, 2, 3, seed=seed) for seed in range(4))
    y, weights = attention(q, k, v)

    def loss(q, k, v):
        return np.sum(dy * attention(q, k, v)[0])

    dq, dk, dv = attention_grad(dy, q, k, v, y, weights)
    assert agree(dq, differences(lambda q: loss(q, k, v), q))
    assert agree(dk, differences(lambda k: loss(q, k, v), k))
    assert agree(dv, differences(lambda v: loss(q, k, v), v))


def test_attention_is_what_its_formula_says_position_by_position():
    q, k, v = (normal(2, 4, 2, 3, seed=seed) for seed in range(3))
    y, weights = attention(q, k, v)
    for text, at, head in np.ndindex(2, 4, 2):
        scores = k[text, : at + 1, head] @ q[text, at, head] / np.sqrt(3)
        shares = np.exp(scores) / np.exp(scores).sum()
        assert np.allclose(weights[text, head, at, : at + 1], shares, rtol=1e-12)
        assert not weights[text, head, at, at + 1 :].any()
        assert np.allclose(y[text, at, head], shares @ v[text, : at + 1, head], rtol=1e-12)


def test_the_last_queries_get_what_all_queries_get():
    q, k, v = (normal(2, 5, 2, 3, seed=seed) for seed in range(3))
    y, weights = attention(q, k, v)
    last_y, last_weights = attention(q[:, 3:], k, v)
    assert np.allclose(last_y, y[:, 3:], rtol=1e-12)
    assert np.allclose(last_weights, weights[:, :, 3:], rtol=1e-12)


def test_attention_is_stable_for_large_scores():
    q = k = np.full((1, 2, 1, 1), 1e3, "f4")
    _, weights = attention(q, k, normal(1, 2, 1, 1, dtype="f4"))
    assert weights[0, 0].tolist() == [[1, 0], [0.5, 0.5]]


def test_the_gradient_of_the_embedding_equals_finite_differences():
    tokens, dy = integers(5, 3, 4), normal(3, 4, 2)
    table, positions = normal(5, 2, seed=1), normal(6, 2, seed=2)
    dtable, dpositions = embedding_grad(dy, tokens, np.empty((5, 2)), np.empty((6, 2)))
    by_table = differences(lambda table: np.sum(dy * embedding(tokens, table, positions)), table)
    by_positions = differences(lambda p: np.sum(dy * embedding(tokens, table, p)), positions)
    assert agree(dtable, by_table) and agree(dpositions, by_positions)
    twice, _ = embedding_grad(dy, tokens, dtable.copy(), dpositions, add=True)
    assert np.allclose(twice, 2 * dtable, rtol=1e-12)


@pytest.mark.parametrize("divisor", [None, 5])
def test_the_gradient_of_the_cross_entropy_equals_finite_differences(divisor):
    z, targets = normal(6, 4), np.array([0, 3, -1, 1, -1, 2], np.int8)
    value, dz = cross_entropy(z, targets, divisor)
    assert agree(dz, differences(lambda z: cross_entropy(z, targets, divisor)[0], z))
    assert not dz[targets == -1].any()
    expected, expected_dz = softmax_loss(z[targets >= 0], targets[targets >= 0], divisor)
    assert np.isclose(value, expected, rtol=1e-12)
    assert np.allclose(dz[targets >= 0], expected_dz, rtol=1e-12)


def test_a_batch_in_which_nothing_counts_has_a_loss_of_0():
    value, dz = cross_entropy(normal(3, 4), np.full(3, -1))
    assert value == 0 and not dz.any()
    value, dz = cross_entropy(normal(0, 4), np.empty(0, int))
    assert value == 0 and dz.shape == (0, 4)


@pytest.mark.usefixtures("chunks")
def test_parts_write_into_given_arrays_the_same_numbers():
    def given(*shape):
        return np.full(shape, np.nan)

    x, scale, shift, dy = normal(5, 4), normal(4, seed=1), normal(4, seed=2), normal(5, 4, seed=3)
    y, kept = layer_norm(x, scale, shift)
    out, normed = given(5, 4), given(5, 4)
    result, (result_normed, _) = layer_norm(x, scale, shift, out, normed)
    assert result is out and result_normed is normed and np.array_equal(out, y)
    outs = given(4), given(4), dy.copy()  # dx in the place of dy
    results = layer_norm_grad(outs[2], scale, kept, *outs)
    assert all(left is right for left, right in zip(results, outs))
    assert all(np.array_equal(*pair) for pair in zip(outs, layer_norm_grad(dy, scale, kept)))
    slope, expected_slope = x.copy(), given(5, 4)  # the slope in the place of x
    assert np.array_equal(gelu(slope, out, slope=slope), gelu(x, slope=expected_slope))
    assert np.array_equal(slope, expected_slope)
    z, targets = normal(3, 4), np.array([1, -1, 0])
    expected = cross_entropy(z, targets)
    assert cross_entropy(z, targets, out=z)[0] == expected[0] and np.array_equal(z, expected[1])


def test_parts_change_nothing_that_they_are_given():
    arrays = [normal(2, 3, 2, 4, seed=seed) for seed in range(4)]
    copies = [array.copy() for array in arrays]
    q, k, v, dy = arrays
    y, weights = attention(q, k, v)
    kept = y.copy(), weights.copy()
    attention_grad(dy, q, k, v, y, weights)
    assert all(np.array_equal(*pair) for pair in zip((*arrays, y, weights), (*copies, *kept)))


# ---------------------------------------------------------------- stages


def test_the_gradient_of_a_block_equals_finite_differences():
    flat, x, dy = parameters_of(SMALL), normal(2, 4, 8), normal(2, 4, 8, seed=1)
    start, stop = SMALL.slices[1]
    flat, shapes = flat[start:stop].copy(), block_shapes(8)
    gradient = np.full_like(flat, np.nan)

    def loss(flat, x):
        return np.sum(dy * block(named_views(flat, shapes), x, heads=2)[0])

    before = x.copy(), dy.copy(), flat.copy()
    parameters = named_views(flat, shapes)
    _, kept = block(parameters, x, heads=2)
    dx = block_grad(parameters, kept, dy, named_views(gradient, shapes))
    assert all(np.array_equal(*pair) for pair in zip(before, (x, dy, flat)))
    assert agree(gradient, differences(lambda flat: loss(flat, x), flat))
    assert agree(dx, differences(lambda x: loss(flat, x), x))


def test_a_block_in_given_memory_and_in_place_gives_the_same_numbers():
    parameters = SMALL.views(parameters_of(SMALL))[2]
    memory, scratch, gradient = Memory("f8"), Memory("f8"), empty_like(parameters)
    for batch, length in ((3, 5), (2, 4), (1, 6), (3, 5)):
        x, dy = normal(batch, length, 8), normal(batch, length, 8, seed=1)
        y, kept = block(parameters, x, 2)
        expected = empty_like(parameters)
        dx = block_grad(parameters, kept, dy, expected)
        assert block(parameters, x, 2, out=x, memory=memory)[0] is x and np.array_equal(x, y)
        _, kept = block(parameters, normal(batch, length, 8), 2, memory=memory)
        assert block_grad(parameters, kept, dy, gradient, dy, scratch) is dy
        assert np.array_equal(dy, dx)
        assert all(np.array_equal(gradient[name], expected[name]) for name in parameters)


def test_memory_is_free_as_soon_as_nobody_holds_it():
    gc.disable()
    try:
        memory = Memory("f8")
        gone = weakref.ref(memory)
        block(SMALL.views(parameters_of(SMALL))[1], normal(2, 4, 8), 2, memory=memory)
        del memory
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("keep_weights", [True, False])
def test_the_two_halves_of_a_gradient_are_the_whole(keep_weights):
    parameters = SMALL.views(parameters_of(SMALL))[1]
    x, dy = normal(2, 4, 8), normal(2, 4, 8, seed=1)
    scratch = Memory("f8")
    memory, others = Memory("f8", scratch), Memory("f8", scratch)
    _, kept = block(parameters, x, heads=2)
    expected, gradient = empty_like(parameters), empty_like(parameters)
    expected_dx = block_grad(parameters, kept, dy, expected)
    _, kept = block(parameters, x, 2, memory=memory, keep_weights=keep_weights)
    assert (kept.attend.weights is not None) == keep_weights
    dx, later = block_grad_input(parameters, kept, dy, memory=memory)
    # Other micro-batches come between the two halves; they share the scratch memory only.
    _, other = block(parameters, dy, 2, memory=others, keep_weights=keep_weights)
    block_grad(parameters, other, x, empty_like(parameters), memory=others)
    block_grad_weights(kept, later, gradient)
    assert np.array_equal(dx, expected_dx)
    assert all(np.array_equal(gradient[name], expected[name]) for name in expected)


def test_weights_that_are_computed_again_take_no_memory_in_between():
    parameters, x = SMALL.views(parameters_of(SMALL))[1], normal(2, 4, 8)
    kept, again = (Memory("f8", Memory("f8")) for _ in range(2))
    block(parameters, x, 2, memory=kept)
    block(parameters, x, 2, memory=again, keep_weights=False)
    batch, heads, length = 2, 2, 4
    assert kept.nbytes - again.nbytes == 8 * batch * heads * length * length


def test_the_gradient_of_the_head_equals_finite_differences():
    x, table = normal(2, 3, 4), normal(5, 4, seed=1)
    norm = {"scale": normal(4, seed=2), "shift": normal(4, seed=3)}
    targets = np.array([[0, 4, -1], [2, 2, 1]])
    _, kept = head_loss(norm, table, x, targets, divisor=4)
    gradient, dtable = empty_like(norm), np.full_like(table, np.nan)
    dx = head_loss_grad(norm, table, kept, gradient, dtable)

    def loss(norm=norm, table=table, x=x):
        return head_loss(norm, table, x, targets, divisor=4)[0]

    assert agree(dx, differences(lambda x: loss(x=x), x))
    assert agree(dtable, differences(lambda table: loss(table=table), table))
    for name in norm:
        expected = differences(lambda array, name=name: loss({**norm, name: array}), norm[name])
        assert agree(gradient[name], expected)


def test_stages_in_a_row_are_the_whole_and_the_tied_tables_gradients_add_up():
    """As in a pipeline whose first and last stage hold a table each."""
    flat, (tokens, targets) = parameters_of(SMALL), a_batch(SMALL)
    loss, gradient = SMALL.loss_and_gradient(flat, tokens, targets)
    first, *blocks, last = SMALL.views(flat)
    d_first, *d_blocks, d_last = map(empty_like, (first, *blocks, last))
    x, kept = embed(first, tokens), []
    for each in blocks:
        x, of_block = block(each, x, SMALL.heads)
        kept.append(of_block)
    table = first["tokens"].copy()
    value, of_head = head_loss(last, table, x, targets)
    d_output_table = np.full_like(table, np.nan)
    dx = head_loss_grad(last, table, of_head, d_last, d_output_table)
    for each, of_block, d_each in zip(blocks[::-1], kept[::-1], d_blocks[::-1]):
        dx = block_grad(each, of_block, dx, d_each)
    embed_grad(tokens, dx, d_first)
    assert value == loss
    expected = SMALL.views(gradient)
    assert np.allclose(d_first["tokens"] + d_output_table, expected[0]["tokens"], rtol=1e-12)
    assert np.array_equal(d_first["positions"], expected[0]["positions"])
    for ours, theirs in zip((*d_blocks, d_last), expected[1:]):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_heads_and_columns_on_two_ranks_add_up_to_the_whole_block():
    parameters = SMALL.views(parameters_of(SMALL))[1]
    x, dy = normal(2, 4, 8), normal(2, 4, 8, seed=1)
    y, kept = block(parameters, x, heads=2)
    whole = empty_like(parameters)
    dx = block_grad(parameters, kept, dy, whole)
    results = on_two_ranks(lambda rank, both: a_rank(shard(parameters, rank), x, dy, both))
    for rank, (rank_y, rank_dx, gradient) in enumerate(results):
        assert agree(rank_y, y, 1e-12) and agree(rank_dx, dx, 1e-12)
        expected = shard(whole, rank)
        assert all(agree(gradient[name], expected[name], 1e-12) for name in gradient)


def shard(parameters, rank):
    """One of two heads, and half of the perceptron's columns; norms and last biases are whole."""
    head, columns = np.s_[4 * rank : 4 * rank + 4], np.s_[16 * rank : 16 * rank + 16]
    part = dict(parameters)
    part["qkv_w"] = parameters["qkv_w"].reshape(8, 3, 8)[:, :, head].reshape(8, 12)
    part["qkv_b"] = parameters["qkv_b"].reshape(3, 8)[:, head].reshape(12)
    part["out_w"] = parameters["out_w"][head]
    part["up_w"], part["up_b"] = parameters["up_w"][:, columns], parameters["up_b"][columns]
    part["down_w"] = parameters["down_w"][columns]
    assert {name: a.shape for name, a in part.items()} == block_shapes(8, inner=4, columns=16)
    return part


def a_rank(parameters, x, dy, exchange):
    y, kept = block(parameters, x, heads=1, exchange=exchange)
    gradient = empty_like(parameters)
    return y, block_grad(parameters, kept, dy, gradient, exchange=exchange), gradient


def on_two_ranks(program):
    """What a program returns on two threads that can sum their arrays."""
    barrier, arrays, results = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def run(rank):
        class Sum(Alone):
            """As in tensor parallelism: the parts of a sum are added where they come out."""

            def leave(self, array):
                arrays[rank] = array.copy()
                barrier.wait()
                np.add(*arrays, out=array)
                barrier.wait()
                return array

            enter_grad = leave

        results[rank] = program(rank, Sum())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ---------------------------------------------------------------- the network


def test_the_gradient_of_the_network_equals_finite_differences():
    parameters, (tokens, targets) = parameters_of(SMALL), a_batch(SMALL)
    before = parameters.copy()
    loss, gradient = SMALL.loss_and_gradient(parameters, tokens, targets)
    assert loss == SMALL.loss_at(parameters, tokens, targets)
    assert np.array_equal(parameters, before)
    numbers = np.random.default_rng(0).permutation(SMALL.size)[:300]

    def loss_with(some):
        changed = parameters.copy()
        changed[numbers] = some
        return SMALL.loss_at(changed, tokens, targets)

    assert agree(gradient[numbers], differences(loss_with, parameters[numbers]), 1e-6)


def test_the_gradient_of_the_tied_table_equals_finite_differences():
    parameters, (tokens, targets) = parameters_of(SMALL), a_batch(SMALL)
    _, gradient = SMALL.loss_and_gradient(parameters, tokens, targets)
    size = SMALL.vocabulary * SMALL.width

    def loss_with(table):
        return SMALL.loss_at(np.concatenate([table, parameters[size:]]), tokens, targets)

    assert agree(gradient[:size], differences(loss_with, parameters[:size]), 1e-6)


def test_logits_and_loss_belong_together_and_no_position_sees_a_later_one():
    parameters, (tokens, targets) = parameters_of(SMALL), a_batch(SMALL)
    z = SMALL.logits(parameters, tokens)
    assert z.shape == (3, 5, 7)
    loss, _ = cross_entropy(z.reshape(-1, 7), targets.ravel())
    assert np.isclose(loss, SMALL.loss_at(parameters, tokens, targets), rtol=1e-12)
    changed = tokens.copy()
    changed[:, 3:] = (tokens[:, 3:] + 1) % 7
    assert np.array_equal(SMALL.logits(parameters, changed)[:, :3], z[:, :3])


def test_positions_that_do_not_count_give_no_gradient():
    parameters, (tokens, targets) = parameters_of(SMALL), a_batch(SMALL)
    tokens[tokens == 6] = 0
    targets[:, 3:] = -1
    _, gradient = SMALL.loss_and_gradient(parameters, tokens, targets)
    padded = tokens.copy()
    padded[:, 3:] = 6  # what stands in padding does not matter
    _, again = SMALL.loss_and_gradient(parameters, padded, targets)
    assert agree(again, gradient, 1e-12)
    assert not SMALL.views(gradient)[0]["positions"][3:].any()
    _, short = SMALL.loss_and_gradient(parameters, tokens[:, :3], targets[:, :3])
    assert agree(short, gradient, 1e-12)


def test_gradients_of_unequal_shards_add_up_to_that_of_the_batch():
    parameters, (tokens, targets) = parameters_of(SMALL), a_batch(SMALL, batch=5)
    loss, gradient = SMALL.loss_and_gradient(parameters, tokens, targets)
    count = np.count_nonzero(targets >= 0)
    parts = [
        SMALL.loss_and_gradient(parameters, tokens[rows], targets[rows], divisor=count)
        for rows in (np.s_[:2], np.s_[2:2], np.s_[2:])
    ]
    assert parts[1][0] == 0 and not parts[1][1].any()
    assert abs(sum(part[0] for part in parts) - loss) < 1e-12
    assert agree(sum(part[1] for part in parts), gradient, 1e-12)


def test_given_memory_changes_no_number():
    parameters, workspace = parameters_of(SMALL), SMALL.workspace()
    out = np.full(SMALL.size, np.nan)
    for batch, length in ((3, 5), (2, 6), (4, 4), (0, 5), (3, 5)):
        tokens = integers(7, batch, length, seed=batch)
        loss, gradient = SMALL.loss_and_gradient(parameters, tokens, tokens, 9, out, workspace)
        expected, expected_gradient = SMALL.loss_and_gradient(parameters, tokens, tokens, 9)
        assert gradient is out and loss == expected
        assert np.array_equal(gradient, expected_gradient)


def test_float32_stays_float32():
    tokens, targets = a_batch(SMALL)
    narrow, workspace = parameters_of(SMALL, np.float32), SMALL.workspace(np.float32)
    loss, gradient = SMALL.loss_and_gradient(narrow, tokens, targets, workspace=workspace)
    wide = narrow.astype(np.float64)
    expected, expected_gradient = SMALL.loss_and_gradient(wide, tokens, targets)
    assert gradient.dtype == SMALL.logits(narrow, tokens).dtype == np.float32
    kept = workspace.kept[0]
    attended, perceived = kept
    assert attended.weights.dtype == attended.norm[1].dtype == perceived.slope.dtype == np.float32
    assert type(loss) is float and np.isclose(loss, expected, rtol=1e-5)
    assert agree(gradient, expected_gradient, 1e-5)


def test_backward_names_a_layer_when_its_slice_is_complete():
    parameters, (tokens, targets) = parameters_of(SMALL), a_batch(SMALL)
    workspace, out = SMALL.workspace(), np.full(SMALL.size, np.nan)
    loss, expected = SMALL.loss_and_gradient(parameters, tokens, targets)
    assert SMALL.forward(parameters, tokens, targets, workspace) == loss
    named = []
    for layer in SMALL.backward(parameters, tokens, out, workspace):
        named.append(layer)
        start, stop = SMALL.slices[layer]
        assert np.array_equal(out[start:stop], expected[start:stop])
        assert layer == 0 or np.isnan(out[SMALL.slices[1][0] : start]).all()
        if layer:
            out[start:stop] *= 2  # sent, summed, scaled: the later layers do not mind
    assert named == [3, 2, 1, 0]


def test_slices_and_views_cover_the_flat_array_once():
    flat = np.arange(float(SMALL.size))
    layers = SMALL.views(flat)
    assert len(layers) == len(SMALL.slices) == 4
    for layer, (start, stop) in zip(layers, SMALL.slices):
        pieces = np.concatenate([array.ravel() for array in layer.values()])
        assert np.array_equal(pieces, flat[start:stop])
    assert SMALL.slices[0][0] == 0 and SMALL.slices[-1][1] == SMALL.size
    layers[1]["down_b"] += 10_000
    assert flat[SMALL.slices[1][1] - 1] > 10_000 > flat[SMALL.slices[1][1]]
    assert GPT(40, 32, 64, 4, 2).size == 40 * 64 + 32 * 64 + 2 * 49_984 + 2 * 64


def test_initial_weights_do_not_depend_on_who_makes_them_or_when():
    whole = SMALL.initialise(seed=7)
    assert np.array_equal(whole, SMALL.initialise(seed=7))
    assert not np.array_equal(whole, SMALL.initialise(seed=8))
    for layer in (2, 0, 3, 1):  # in any order, and other random numbers do not matter
        np.random.default_rng(0).normal()
        start, stop = SMALL.slices[layer]
        assert np.array_equal(SMALL.initialise_layer(layer, seed=7), whole[start:stop])
    longer = dataclasses.replace(SMALL, context=9)
    assert np.array_equal(longer.initialise_layer(1, seed=7), SMALL.initialise_layer(1, seed=7))
    assert np.array_equal(SMALL.initialise(7, np.float32), whole.astype("f4"))
    _, one, two, _ = SMALL.views(whole)
    assert not np.array_equal(one["qkv_w"], two["qkv_w"])


def test_initial_weights_are_the_same_in_every_process():
    """A name must not be hashed with Python's hash, which each process salts."""
    assert SMALL.initialise(seed=0)[:2].round(6).tolist() == [-0.017209, -0.02226]


def test_initial_weights_have_the_scale_of_gpt_2():
    gpt = GPT(vocabulary=100, context=50, width=64, heads=4, layers=8)
    first, one, *_, last = gpt.views(gpt.initialise(seed=0))
    for name in ("qkv_w", "up_w"):
        assert abs(one[name].std() / 0.02 - 1) < 0.05
    for name in ("out_w", "down_w"):
        assert abs(one[name].std() / 0.005 - 1) < 0.05
    assert abs(first["tokens"].std() / 0.02 - 1) < 0.05
    assert (last["scale"] == 1).all() and (one["norm_1_scale"] == 1).all()
    zeros = ("norm_1_shift", "norm_2_shift", "qkv_b", "out_b", "up_b", "down_b")
    assert not last["shift"].any() and not any(one[name].any() for name in zeros)


def test_a_network_is_equal_hashable_and_can_be_sent():
    gpt = GPT(np.int64(7), 6, 8, 2, 2)
    assert gpt == SMALL == pickle.loads(pickle.dumps(gpt)) and hash(gpt) == hash(SMALL)
    assert type(gpt.vocabulary) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        gpt.width = 16


def test_a_step_in_given_memory_allocates_little():
    gpt = GPT(vocabulary=40, context=32, width=32, heads=2, layers=2)
    parameters, workspace = gpt.initialise(0, np.float32), gpt.workspace(np.float32)
    tokens, out = integers(40, 64, 32), np.empty_like(parameters)

    def step():
        gpt.loss_and_gradient(parameters, tokens, tokens, out=out, workspace=workspace)

    step()
    nbytes = workspace.nbytes
    tracemalloc.start()
    try:
        step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert workspace.nbytes == nbytes
    assert peak < nbytes / 12


def test_a_few_steps_learn_a_pattern():
    gpt = GPT(vocabulary=4, context=8, width=16, heads=2, layers=2)
    text = (np.arange(9) + np.arange(4)[:, np.newaxis]) % 4  # each token is followed by the next
    parameters, workspace = gpt.initialise(0, np.float32), gpt.workspace(np.float32)
    adam = Adam(rate=0.01, weight_decay=0.1)
    state, out = adam.start(gpt.size, np.float32), np.empty_like(parameters)
    losses = []
    for _ in range(60):
        loss, _ = gpt.loss_and_gradient(
            parameters, text[:, :-1], text[:, 1:], out=out, workspace=workspace
        )
        losses.append(loss)
        adam.step(parameters, out, state)
    assert abs(losses[0] - np.log(4)) < 0.1 and losses[-1] < 0.05
    written = generate(gpt, parameters, np.array([[1], [2]]), steps=7, temperature=0)
    assert written.tolist() == [[1, 2, 3, 0, 1, 2, 3, 0], [2, 3, 0, 1, 2, 3, 0, 1]]


# ---------------------------------------------------------------- generation


def test_scores_with_the_cache_equal_those_without():
    parameters, tokens = parameters_of(SMALL), integers(7, 3, 6)
    cache, z = SMALL.cache(batch=3), SMALL.logits(parameters, tokens)
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        piece = SMALL.logits(parameters, tokens[:, start:stop], cache)
        assert np.allclose(piece, z[:, start:stop], rtol=1e-10, atol=1e-12)
        assert cache[0].length == cache[1].length == stop


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0])
def test_text_with_the_cache_equals_text_without(temperature):
    gpt = GPT(vocabulary=7, context=20, width=8, heads=2, layers=2)
    parameters, prompt = parameters_of(gpt), integers(7, 4, 3)
    with_cache = generate(gpt, parameters, prompt, 17, temperature, seed=5)
    without = generate(gpt, parameters, prompt, 17, temperature, seed=5, cached=False)
    assert with_cache.shape == (4, 20) and np.array_equal(with_cache, without)
    assert np.array_equal(with_cache[:, :3], prompt)
    other = generate(gpt, parameters, prompt, 17, temperature, seed=6)
    assert np.array_equal(other, with_cache) == (temperature == 0)


def test_prompts_on_several_ranks_are_continued_as_on_one():
    gpt = GPT(vocabulary=7, context=12, width=8, heads=2, layers=1)
    parameters, prompts = parameters_of(gpt), np.ones((5, 2), int)
    whole = generate(gpt, parameters, prompts, steps=10)
    parts = [generate(gpt, parameters, prompts[i : i + 2], 10, first=i) for i in (0, 2, 4)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len({tuple(text) for text in whole.tolist()}) == 5  # equal prompts, different texts


def test_tokens_are_drawn_as_often_as_their_probability_says():
    gpt = GPT(vocabulary=3, context=2, width=4, heads=1, layers=1)
    parameters = parameters_of(gpt)
    z = gpt.logits(parameters, np.array([[1]]))[0, 0] / 0.7
    drawn = generate(gpt, parameters, np.ones((4000, 1), int), steps=1, temperature=0.7)[:, 1]
    shares = np.bincount(drawn, minlength=3) / 4000
    assert np.allclose(shares, np.exp(z) / np.exp(z).sum(), rtol=0, atol=0.04)


def test_no_steps_no_prompts_and_narrow_integers_are_no_mistake():
    parameters = parameters_of(SMALL)
    prompt = np.array([[1, 2]])
    narrow = generate(SMALL, parameters, prompt.astype(np.uint8), steps=4)
    assert np.array_equal(narrow, generate(SMALL, parameters, prompt, steps=4))
    assert narrow.dtype == np.int64
    assert generate(SMALL, parameters, np.array([[1, 2]]), steps=0).tolist() == [[1, 2]]
    assert generate(SMALL, parameters, np.empty((0, 2), int), steps=3).shape == (0, 5)


# ---------------------------------------------------------------- wrong use


ONE = GPT(vocabulary=3, context=4, width=2, heads=1, layers=1)
TEXT = np.zeros((1, 2), int)


def flat(dtype=np.float64):
    return ONE.initialise(0, dtype)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: layer_norm(normal(2, 3), normal(2), normal(3)), ValueError, r"scale \(2,\)"),
        (
            lambda: layer_norm(normal(2, 3), normal(3), normal(3, dtype="f4")),
            TypeError,
            "dtypes differ",
        ),
        (
            lambda: layer_norm_grad(
                normal(3, 3), normal(3), layer_norm(normal(2, 3), normal(3), normal(3))[1]
            ),
            ValueError,
            r"gave rows of \(2, 3\)",
        ),
        (lambda: gelu(np.array([1, 2])), TypeError, "dtype int64"),
        (lambda: gelu(normal(2), slope=normal(3)), ValueError, r"slope has shape \(3,\)"),
        (lambda: gelu_grad(normal(2), normal(2, 1)), ValueError, "must be the same"),
        (lambda: attention(*[normal(2, 3, 4)] * 3), ValueError, "all need"),
        (
            lambda: attention(normal(1, 3, 1, 1), *[normal(1, 2, 1, 1)] * 2),
            ValueError,
            "no more queries",
        ),
        (
            lambda: attention(normal(1, 2, 1, 1, dtype="f4"), *[normal(1, 2, 1, 1)] * 2),
            TypeError,
            "dtypes differ",
        ),
        (
            lambda: attention_grad(
                normal(1, 1, 1, 1), *[normal(1, 2, 1, 1)] * 4, normal(1, 1, 2, 2)
            ),
            ValueError,
            "they must be the same",
        ),
        (
            lambda: attention_grad(*[normal(1, 2, 1, 1)] * 5, normal(1, 1, 2, 3)),
            ValueError,
            "without a cache",
        ),
        (lambda: embedding(TEXT, normal(3, 2), normal(3, 3)), ValueError, "give .vocabulary"),
        (lambda: embedding(TEXT, normal(3, 2), normal(1, 2)), ValueError, "goes to position 2"),
        (lambda: embedding(TEXT + 3, normal(3, 2), normal(4, 2)), ValueError, "lie in 0 to 2"),
        (lambda: embedding(TEXT - 1, normal(3, 2), normal(4, 2)), ValueError, "go from -1 to -1"),
        (lambda: embedding(TEXT / 1, normal(3, 2), normal(4, 2)), TypeError, "give integers"),
        (lambda: embedding(TEXT[0], normal(3, 2), normal(4, 2)), ValueError, "give .batch, length"),
        (
            lambda: embedding_grad(normal(1, 3, 2), TEXT, normal(3, 2), normal(4, 2)),
            ValueError,
            r"dy has shape \(1, 3, 2\)",
        ),
        (
            lambda: embedding_grad(normal(1, 2, 2), TEXT, normal(3, 2), normal(1, 2)),
            ValueError,
            "goes to position 2",
        ),
        (lambda: cross_entropy(normal(2, 3), np.array([0, 3])), ValueError, "or be -1"),
        (lambda: cross_entropy(normal(2, 3), np.array([0, -2])), ValueError, "from -2 to 0"),
        (lambda: cross_entropy(normal(2, 3), np.zeros(2)), TypeError, "give integers"),
        (lambda: cross_entropy(normal(2, 3), np.zeros(3, int)), ValueError, r"y \(3,\)"),
        (lambda: cross_entropy(normal(1, 3), np.array([0]), 0), ValueError, "divisor is 0"),
        (lambda: GPT(3, 4, 6, 4, 1), ValueError, "width 6 does not split over 4 heads"),
        (lambda: GPT(3, 4, 6, 2, 0), ValueError, "layers is 0: give 1 or more"),
        (lambda: ONE.views(normal(5)), ValueError, "needs one contiguous array"),
        (lambda: ONE.views(flat().astype(int)), TypeError, "give floats"),
        (lambda: named_views(normal(3), {"w": (2,)}), ValueError, r"contiguous one of \(2,\)"),
        (lambda: ONE.logits(flat(), TEXT + 3), ValueError, "lie in 0 to 2"),
        (lambda: ONE.logits(flat(), TEXT[:, :0]), ValueError, "at least one token each"),
        (lambda: ONE.logits(flat(), np.zeros((1, 5), int)), ValueError, "the context has 4"),
        (lambda: ONE.logits(flat("f4"), TEXT, ONE.cache(1)), TypeError, "dtypes differ"),
        (lambda: ONE.logits(flat(), TEXT, ONE.cache(2)), ValueError, "do not fit a cache"),
        (lambda: ONE.loss_at(flat(), TEXT, TEXT[:, :1]), ValueError, "need that of the text"),
        (
            lambda: ONE.loss_and_gradient(flat(), TEXT, TEXT, out=normal(5)),
            ValueError,
            r"out has shape \(5,\)",
        ),
        (
            lambda: ONE.loss_and_gradient(flat(), TEXT, TEXT, workspace=ONE.workspace("f4")),
            ValueError,
            "take one from gpt.workspace",
        ),
        (
            lambda: ONE.loss_and_gradient(flat(), TEXT, TEXT, workspace=SMALL.workspace()),
            ValueError,
            "another number of layers",
        ),
        (
            lambda: ONE.backward(flat(), TEXT, flat(), ONE.workspace()),
            ValueError,
            "run forward",
        ),
        (
            lambda: ONE.backward(flat(), TEXT, flat("f4"), ONE.workspace()),
            TypeError,
            "dtypes differ",
        ),
        (
            lambda: block(ONE.views(flat())[1], normal(1, 2, 3), 1),
            ValueError,
            r"of \(batch, length, 2\)",
        ),
        (
            lambda: block(ONE.views(flat())[1], normal(1, 2, 2), 4),
            ValueError,
            "do not split over 4 heads",
        ),
        (
            lambda: block(ONE.views(flat())[1], normal(1, 2, 2, dtype="f4"), 1),
            TypeError,
            "dtypes differ",
        ),
        (
            lambda: block(ONE.views(flat())[1], normal(1, 2, 2), 1, out=normal(1, 2, 4)[:, :, ::2]),
            ValueError,
            "out is not contiguous",
        ),
        (
            lambda: block_grad(
                ONE.views(flat())[1],
                block(ONE.views(flat())[1], normal(1, 2, 2), 1)[1],
                normal(1, 3, 2),
                ONE.views(flat())[1],
            ),
            ValueError,
            "the block was given",
        ),
        (
            lambda: head_loss(ONE.views(flat())[2], normal(3, 3), normal(1, 2, 2), TEXT),
            ValueError,
            "the same width",
        ),
        (
            lambda: KeyValueCache(1, 2, 1, 1, "f8").append(*[normal(1, 3, 1, 1)] * 2),
            ValueError,
            "do not fit a cache",
        ),
        (lambda: generate(ONE, flat(), TEXT, 3), ValueError, "at most 4 tokens in all"),
        (lambda: generate(ONE, flat(), TEXT, -1), ValueError, "give 0 steps or more"),
        (lambda: generate(ONE, flat(), TEXT[:, :0], 1), ValueError, "at least one token each"),
        (lambda: generate(ONE, flat(), TEXT, 1, -1), ValueError, "temperature is -1"),
        (lambda: generate(ONE, flat(), TEXT / 1, 1), TypeError, "give integers"),
    ],
)
def test_wrong_use_is_refused(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.parametrize("name", ["transformer", "tokens", "blocks", "ends", "gpt", "generate"])
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(f"helpers.nn.{name}"))
    assert result.attempted > 0 and result.failed == 0
