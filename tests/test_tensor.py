"""A GPT cut over tensor ranks computes what the whole one computes, and moves what is predicted."""

import doctest
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.engine import spmd
from helpers.engine.errors import RankError
from helpers.engine.mesh import Mesh
from helpers.nn import GPT, Adam, Memory, block, block_grad, named_views
from helpers.nn import ends as serial_ends
from helpers.parallel import tensor, tensor_cuts, tensor_ends, tensor_exchange
from helpers.parallel.tensor import SequenceParallel, TensorParallel

GPT_2 = GPT(vocabulary=12, context=10, width=16, heads=4, layers=2)
EXCHANGES = {"tensor": TensorParallel, "sequence": SequenceParallel}
RANKS = (1, 2, 4)


def on_ranks(ranks, program, *args, **options):
    return spmd.run(None, Mesh(tensor=ranks), program, *args, **options)


def parameters_of(gpt, dtype=np.float64):
    """Parameters far enough from the start that no bias is 0 and attention is not even."""
    noise = np.random.default_rng(4).normal(size=gpt.size) / 4
    return (gpt.initialise(3) + noise).astype(dtype)


def text(gpt, batch=3, length=8):
    """Tokens and targets; some of these do not count."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, gpt.vocabulary, (batch, length))
    targets = random.integers(0, gpt.vocabulary, (batch, length))
    targets[0, length // 2 :] = -1
    return tokens, targets


def parts_of(gpt, flat, rank, ranks):
    """A rank's parts of all layers: flat arrays, and views by name."""
    layers = range(gpt.layers + 2)
    flats = [tensor.cut(gpt, n, flat[slice(*gpt.slices[n])], rank, ranks) for n in layers]
    return flats, views_of(gpt, flats, ranks)


def views_of(gpt, flats, ranks):
    return [named_views(flat, tensor.shapes(gpt, n, ranks)) for n, flat in enumerate(flats)]


def loss_and_gradient(gpt, views, gradients, tokens, targets, exchange):
    """The whole model on the ranks of a group; the gradient of a rank's part is written."""
    group, heads = exchange.group, gpt.heads // exchange.group.size
    table, scratch = views[0]["tokens"], Memory(views[0]["tokens"].dtype)
    x = tensor.embed(views[0], tokens, group, exchange=exchange)
    kept = []
    for parameters in views[1:-1]:
        x, keeps = block(parameters, x, heads, memory=Memory(x.dtype), exchange=exchange)
        kept.append(keeps)
    loss, keeps = tensor.head_loss(views[-1], table, x, targets, group, exchange=exchange)
    into = gradients[-1], gradients[0]["tokens"]
    dx = tensor.head_loss_grad(views[-1], table, keeps, *into, group, exchange=exchange)
    for n in range(gpt.layers, 0, -1):
        dx = block_grad(views[n], kept[n - 1], dx, gradients[n], None, scratch, exchange)
    tensor.embed_grad(tokens, dx, gradients[0], group, add=True, exchange=exchange)
    if isinstance(exchange, SequenceParallel):
        tensor.complete(gpt, range(gpt.layers + 2), gradients, group)
    return loss


def whole_model(rank, gpt, kind, dtype=np.float64, algorithm=None):
    """One pass of a rank: the loss, and the flat gradients of its parts."""
    flats, views = parts_of(gpt, parameters_of(gpt, dtype), rank.index, rank.size)
    gradients = [np.full_like(flat, np.nan) for flat in flats]
    exchange = EXCHANGES[kind](rank.tensor, algorithm)
    into = views_of(gpt, gradients, rank.size)
    return loss_and_gradient(gpt, views, into, *text(gpt), exchange), gradients


def joined(gpt, results):
    """The flat array of the whole model from the parts of all ranks."""
    layers = range(gpt.layers + 2)
    return np.concatenate([tensor.join(gpt, n, [r[n] for r in results]) for n in layers])


@cache
def results_of(ranks, gpt, kind, dtype=np.float64):
    return on_ranks(ranks, whole_model, gpt, kind, dtype).results


# ---------------------------------------------------------------- equal to serial


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", EXCHANGES)
def test_loss_and_gradient_of_a_whole_gpt_equal_those_of_one_rank(kind, ranks):
    right_loss, right = GPT_2.loss_and_gradient(parameters_of(GPT_2), *text(GPT_2))
    found = results_of(ranks, GPT_2, kind)
    assert np.abs(joined(GPT_2, [gradients for _, gradients in found]) - right).max() < 1e-10
    assert {loss for loss, _ in found} == {found[0][0]}
    assert found[0][0] == pytest.approx(right_loss, rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", EXCHANGES)
def test_what_lies_whole_on_all_ranks_has_the_same_gradient_to_the_last_bit(kind, ranks):
    found = [gradients for _, gradients in results_of(ranks, GPT_2, kind)]
    looked_at = 0
    for n in range(GPT_2.layers + 2):
        views = [named_views(each[n], tensor.shapes(GPT_2, n, ranks)) for each in found]
        for name in set(views[0]) - set(tensor.split_names(GPT_2, n)):
            assert all(np.array_equal(view[name], views[0][name]) for view in views), (n, name)
            looked_at += 1
    assert looked_at == 1 + 2 * 6 + 2


@pytest.mark.parametrize("kind", EXCHANGES)
def test_every_run_gives_the_same_bits(kind):
    again = on_ranks(4, whole_model, GPT_2, kind).results
    for (loss, gradients), (old_loss, old) in zip(again, results_of(4, GPT_2, kind), strict=True):
        assert loss == old_loss
        assert all(map(np.array_equal, gradients, old))


def test_sequence_parallelism_computes_what_tensor_parallelism_computes():
    plain, sequence = (
        joined(GPT_2, [g for _, g in results_of(4, GPT_2, kind)]) for kind in EXCHANGES
    )
    assert np.abs(plain - sequence).max() < 1e-12


@pytest.mark.parametrize("kind", EXCHANGES)
def test_float32_stays_float32_and_is_as_near_as_rounding_allows(kind):
    right_loss, right = GPT_2.loss_and_gradient(parameters_of(GPT_2), *text(GPT_2))
    found = results_of(4, GPT_2, kind, np.float32)
    gradient = joined(GPT_2, [gradients for _, gradients in found])
    assert gradient.dtype == np.float32
    assert np.abs(gradient - right).max() < 2e-5
    assert found[0][0] == pytest.approx(right_loss, rel=1e-5)


def five_steps(rank, gpt, kind, optimiser):
    """Five steps of training on a rank's part: its parameters after them."""
    flats, views = parts_of(gpt, parameters_of(gpt), rank.index, rank.size)
    gradients = [np.empty_like(flat) for flat in flats]
    into, exchange = views_of(gpt, gradients, rank.size), EXCHANGES[kind](rank.tensor)
    states = [optimiser.start(flat.size, flat.dtype) for flat in flats]
    for _ in range(5):
        loss_and_gradient(gpt, views, into, *text(gpt), exchange)
        for flat, gradient, state in zip(flats, gradients, states, strict=True):
            optimiser.step(flat, gradient, state)
    return flats


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", EXCHANGES)
def test_five_steps_of_training_equal_serial_training(kind, ranks):
    optimiser, right = Adam(0.01, weight_decay=0.1), parameters_of(GPT_2)
    start, state = right.copy(), optimiser.start(right.size, right.dtype)
    for _ in range(5):
        _, gradient = GPT_2.loss_and_gradient(right, *text(GPT_2))
        optimiser.step(right, gradient, state)
    found = joined(GPT_2, on_ranks(ranks, five_steps, GPT_2, kind, optimiser).results)
    assert np.abs(found - right).max() < 1e-10
    assert np.abs(right - start).max() > 0.01


@pytest.mark.parametrize("kind", EXCHANGES)
def test_a_block_gives_serial_values_and_the_gradient_by_its_input(kind):
    gpt, ranks = GPT_2, 4
    flat = parameters_of(gpt)[slice(*gpt.slices[1])]
    x, dy = np.random.default_rng(1).normal(size=(2, 3, 8, gpt.width))
    whole = named_views(flat, gpt.shapes[1])
    right, kept = block(whole, x, gpt.heads)
    right_dx = block_grad(whole, kept, dy, {n: np.empty_like(a) for n, a in whole.items()})

    def program(rank):
        exchange = EXCHANGES[kind](rank.tensor)
        shapes = tensor.shapes(gpt, 1, ranks)
        mine = named_views(tensor.cut(gpt, 1, flat, rank.index, ranks), shapes)
        place = exchange.positions(8)
        part = np.ascontiguousarray(x[:, place]), np.ascontiguousarray(dy[:, place])
        y, kept = block(mine, part[0], gpt.heads // ranks, exchange=exchange)
        gradient = {n: np.empty_like(a) for n, a in mine.items()}
        return y, block_grad(mine, kept, part[1], gradient, exchange=exchange)

    found = on_ranks(ranks, program).results
    for value, expected in zip(zip(*found, strict=True), (right, right_dx), strict=True):
        if kind == "sequence":
            value = [np.concatenate(value, axis=1)]
        assert all(np.abs(each - expected).max() < 1e-12 for each in value)


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.sampled_from(RANKS),
    heads=st.sampled_from([4, 8]),
    size=st.integers(1, 3),
    batch=st.integers(1, 3),
    part=st.integers(1, 3),
    times=st.integers(1, 3),
    kind=st.sampled_from(sorted(EXCHANGES)),
)
def test_any_shape_equals_serial(ranks, heads, size, batch, part, times, kind):
    length = 4 * part
    gpt = GPT(4 * times, context=length + 1, width=heads * size, heads=heads, layers=1)
    parameters, (tokens, targets) = parameters_of(gpt), text(gpt, batch, length)

    def program(rank):
        flats, views = parts_of(gpt, parameters, rank.index, rank.size)
        gradients = [np.empty_like(flat) for flat in flats]
        into, exchange = views_of(gpt, gradients, rank.size), EXCHANGES[kind](rank.tensor)
        return loss_and_gradient(gpt, views, into, tokens, targets, exchange), gradients

    right_loss, right = gpt.loss_and_gradient(parameters, tokens, targets)
    found = on_ranks(ranks, program).results
    gradient = joined(gpt, [gradients for _, gradients in found])
    assert np.abs(gradient - right).max() < 1e-10 * max(1, np.abs(right).max())
    assert found[0][0] == pytest.approx(right_loss, rel=1e-11)


# ---------------------------------------------------------------- the two ends


@pytest.mark.parametrize("ranks", RANKS)
def test_gathered_scores_are_those_of_the_whole_table(ranks):
    first, last = (GPT_2.views(parameters_of(GPT_2))[n] for n in (0, -1))
    x = np.random.default_rng(1).normal(size=(2, 5, GPT_2.width))
    z, _, _ = serial_ends.head_scores(last, first["tokens"], x, Memory("f8"))

    def program(rank):
        table = np.split(first["tokens"], rank.size)[rank.index]
        return tensor.head_scores(last, table, x, rank.tensor)

    for scores in on_ranks(ranks, program).results:
        assert scores.shape == (2, 5, GPT_2.vocabulary)
        assert np.abs(scores.reshape(z.shape) - z).max() < 1e-12


@pytest.mark.parametrize("kind", EXCHANGES)
def test_an_embedding_that_starts_later_has_later_positions(kind):
    first = GPT_2.views(parameters_of(GPT_2))[0]
    tokens, _ = text(GPT_2)
    right = serial_ends.embed(first, tokens, start=2)

    def program(rank):
        exchange = EXCHANGES[kind](rank.tensor)
        mine = first | {"tokens": np.split(first["tokens"], rank.size)[rank.index]}
        out = np.empty_like(right[:, exchange.positions(8)], order="C")
        x = tensor.embed(mine, tokens, rank.tensor, start=2, out=out, exchange=exchange)
        return x is out, np.abs(x - right[:, exchange.positions(8)]).max()

    for is_out, distance in on_ranks(2, program).results:
        assert is_out and distance < 1e-13


def test_tokens_and_targets_may_be_small_integers():
    gpt = GPT(vocabulary=400, context=4, width=2, heads=2, layers=1)
    first, last = (gpt.views(parameters_of(gpt))[n] for n in (0, -1))
    tokens, targets = np.array([[3, 250]], np.uint8), np.array([[-1, 100]], np.int8)
    right = serial_ends.embed(first, tokens)
    right_loss, _ = serial_ends.head_loss(last, first["tokens"], right, targets)

    def program(rank):
        mine = first | {"tokens": np.split(first["tokens"], rank.size)[rank.index]}
        x = tensor.embed(mine, tokens, rank.tensor)
        return x, tensor.head_loss(last, mine["tokens"], x, targets, rank.tensor)[0]

    for x, loss in on_ranks(2, program).results:
        assert np.abs(x - right).max() < 1e-15
        assert loss == pytest.approx(right_loss, rel=1e-12)


def test_scores_too_large_for_the_exponential_do_no_harm():
    targets = np.array([[0, 3]])
    norm = {"scale": np.full(2, 1e4), "shift": np.zeros(2)}
    table, x = np.array([[1.0, -1], [-1, 1], [0, 0], [1, -1]]), np.array([[[1.0, 2], [2, 1]]])
    right, _ = serial_ends.head_loss(norm, table, x, targets)

    def program(rank):
        mine = np.split(table, rank.size)[rank.index]
        return tensor.head_loss(norm, mine, x, targets, rank.tensor)[0]

    assert on_ranks(2, program).results == pytest.approx([right] * 2, rel=1e-12)


def test_logits_never_travel():
    """Of the head three numbers a position travel forward, and one vector a position backward."""
    _, targets = text(GPT_2)
    first, last = (GPT_2.views(parameters_of(GPT_2))[n] for n in (0, -1))
    x = np.random.default_rng(1).normal(size=(*targets.shape, GPT_2.width))

    def program(rank):
        table = np.split(first["tokens"], rank.size)[rank.index]
        tensor.head_loss(last, table, x, targets, rank.tensor)

    events = [e for e in on_ranks(4, program, record=True).events if e.operation == "all_reduce"]
    assert [e.nbytes for e in events] == [8 * targets.size] * (3 * 4)


# ---------------------------------------------------------------- bytes


def sent(events, rank=0):
    """Bytes that a rank really sent to another one."""
    kinds = ("send", "exchange")
    return sum(e.nbytes for e in events if e.rank == rank and e.operation in kinds)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", EXCHANGES)
def test_a_block_sends_the_bytes_of_the_formula(kind, ranks):
    """Two all-reduces forward and two backward, or as many halves of them."""
    gpt, (batch, length) = GPT_2, (3, 8)

    def program(rank, backward):
        exchange = EXCHANGES[kind](rank.tensor, "ring")
        _, views = parts_of(gpt, parameters_of(gpt), rank.index, ranks)
        x = np.ones((batch, length, gpt.width))[:, exchange.positions(length)].copy()
        y, kept = block(views[1], x, gpt.heads // ranks, exchange=exchange)
        if backward:
            gradient = {n: np.empty_like(a) for n, a in views[1].items()}
            block_grad(views[1], kept, y, gradient, exchange=exchange)

    n = 8 * batch * length * gpt.width
    for backward in (False, True):
        events = on_ranks(ranks, program, backward, record=True).events
        half = n * (ranks - 1) // ranks
        right = tensor.block_bytes(n, ranks, kind == "sequence")
        assert right == {"forward": 4 * half, "backward": right["backward"]}
        assert sent(events) == right["forward"] + (right["backward"] if backward else 0)


# ---------------------------------------------------------------- cut and join


@pytest.mark.parametrize("ranks", RANKS)
def test_parts_joined_are_the_whole(ranks):
    flat = parameters_of(GPT_2)
    parts = [parts_of(GPT_2, flat, rank, ranks)[0] for rank in range(ranks)]
    assert np.array_equal(joined(GPT_2, parts), flat)
    for n, part in enumerate(parts[0]):
        assert part.size == sum(np.prod(s) for s in tensor.shapes(GPT_2, n, ranks).values())
        assert not np.shares_memory(part, flat)


def test_a_rank_has_queries_keys_and_values_of_the_same_heads():
    whole = GPT_2.views(parameters_of(GPT_2))[1]["qkv_w"]
    _, views = parts_of(GPT_2, parameters_of(GPT_2), rank=1, ranks=4)
    size = GPT_2.width // GPT_2.heads
    expected = [whole[:, start : start + size] for start in (size, 16 + size, 32 + size)]
    assert np.array_equal(views[1]["qkv_w"], np.hstack(expected))


@pytest.mark.parametrize("ranks", RANKS)
def test_the_parts_that_are_cut_have_each_number_once(ranks):
    for n in range(GPT_2.layers + 2):
        cut_names, part = tensor.split_names(GPT_2, n), tensor.shapes(GPT_2, n, ranks)
        for name, shape in GPT_2.shapes[n].items():
            times = ranks if name in cut_names else 1
            assert np.prod(shape) == times * np.prod(part[name])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("gpt", "ranks", "words"),
    [
        (GPT(40, 8, 12, 4, 1), 3, "3 ranks do not divide 4 heads and a vocabulary of 40"),
        (GPT(40, 8, 12, 4, 1), 3, "choose 1, 2 or 4"),
        (GPT(41, 8, 12, 4, 1), 2, "do not divide a vocabulary of 41: choose 1."),
        (GPT(40, 8, 12, 4, 1), 0, "choose 1, 2 or 4"),
        (GPT(40, 8, 12, 4, 1), 8, "8 ranks do not divide 4 heads: choose 1, 2 or 4"),
    ],
)
def test_odd_numbers_of_ranks_are_refused_with_those_that_would_do(gpt, ranks, words):
    with pytest.raises(ValueError, match=words):
        tensor.check(gpt, ranks)
    with pytest.raises(ValueError, match=words):
        tensor.shapes(gpt, 1, ranks)


def test_a_length_that_does_not_split_is_refused_with_one_that_would():
    with pytest.raises(ValueError, match="take a multiple of 4, such as 8 or 12"):
        tensor.check_length(10, 4)
    with pytest.raises(ValueError, match="such as 4\\."):
        tensor.check_length(3, 4)

    def program(rank):
        SequenceParallel(rank.tensor).leave(np.ones((1, 3, 2)))

    with pytest.raises(RankError, match="3 positions do not split over 2 ranks"):
        on_ranks(2, program)


def test_wrong_tokens_and_targets_are_refused():
    norm, table, x = {"scale": np.ones(2), "shift": np.ones(2)}, np.ones((2, 2)), np.ones((1, 3, 2))

    def loss(targets, **options):
        return lambda rank: tensor.head_loss(norm, table, x, targets, rank.tensor, **options)

    for targets, words in (
        (np.array([[0, 1, 4]]), "they must lie in 0 to 3"),
        (np.array([[0, 1, -2]]), "or be -1"),
        (np.array([[0.0, 1, 1]]), "give integers"),
        (np.array([[0, 1]]), "they need that of the text"),
        (np.array([[-1, -1, -1]]), "give a positive one"),
    ):
        with pytest.raises(RankError, match=words):
            on_ranks(2, loss(targets))
    with pytest.raises(RankError, match="the divisor is -1"):
        on_ranks(2, loss(np.array([[0, 1, 1]]), divisor=-1))

    first = {"tokens": table, "positions": np.ones((4, 2))}
    for tokens, start, words in (([[4]], 0, "in 0 to 3"), ([[0, 0]], 3, "the context has 4")):
        with pytest.raises(RankError, match=words):
            on_ranks(2, lambda r, t=tokens, s=start: tensor.embed(first, np.array(t), r.tensor, s))


def test_the_examples_in_the_docstrings():
    for module in (tensor_cuts, tensor_ends, tensor_exchange):
        found = doctest.testmod(module)
        assert found.attempted > 0 and found.failed == 0
