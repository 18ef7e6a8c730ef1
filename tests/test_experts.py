"""The mixture of experts: gradients, capacity, balance; and on ranks, equal to serial."""

import doctest
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.engine import spmd
from helpers.engine.collectives import all_reduce
from helpers.engine.errors import RankError
from helpers.engine.mesh import Mesh
from helpers.nn import Adam, expert_gpt, experts, routing
from helpers.nn.experts import expert_shapes, mixture, mixture_grad
from helpers.nn.routing import balance, capacity, route
from helpers.parallel import experts as on_ranks
from helpers.parallel.shards import shard

WAYS = [(1, math.inf), (1, 1.0), (2, math.inf), (2, 0.75)]
each_way = pytest.mark.parametrize(("choices", "factor"), WAYS)


def a_mixture(width=6, number=4, groups=4, tokens=7, seed=0, dtype=np.float64):
    """Parameters, input, and the gradient of a loss by the output."""
    random = np.random.default_rng(seed)
    shapes = expert_shapes(width, number, columns=5)
    parameters = {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    x, dy = random.normal(size=(2, groups, tokens, width)).astype(dtype)
    return parameters, x, dy


def empty_like(parameters):
    return {name: np.full_like(array, np.nan) for name, array in parameters.items()}


def differences(function, x, step=1e-6):
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        here = x[index]
        x[index] = here + step
        up = function()
        x[index] = here - step
        gradient[index] = (up - function()) / (2 * step)
        x[index] = here
    return gradient


# ---------------------------------------------------------------- values and gradients


@each_way
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_gradients_equal_finite_differences(choices, factor, weight):
    parameters, x, dy = a_mixture(width=4, number=3, groups=2, tokens=5)

    def loss():
        y, even, _ = mixture(parameters, x, choices, factor)
        return np.sum(y * dy) + weight * even

    _, _, kept = mixture(parameters, x, choices, factor)
    gradient = empty_like(parameters)
    dx = mixture_grad(parameters, kept, dy, gradient, weight)
    if factor < 1 or (choices, factor) == (1, 1.0):
        assert kept.route.dropped > 0
    for name, array in parameters.items():
        assert np.allclose(gradient[name], differences(loss, array), atol=1e-7), name
    assert np.allclose(dx, differences(loss, x), atol=1e-7)


@each_way
def test_values_are_those_of_a_loop_over_tokens(choices, factor):
    parameters, x, _ = a_mixture()
    y, _, kept = mixture(parameters, x, choices, factor)
    right, dropped = by_loop(parameters, x, choices, factor)
    assert np.allclose(y, right, atol=1e-12)
    assert kept.route.dropped == dropped


def by_loop(p, x, choices, factor):
    """The same, token by token, with room counted in a list; written without the helpers."""
    number, y, dropped = p["router"].shape[1], np.zeros_like(x), 0
    for group in range(len(x)):
        room = [capacity(x.shape[1], number, choices, factor)] * number
        for choice in range(choices):
            for token in range(x.shape[1]):
                row = x[group, token]
                e = np.exp(row @ p["router"])
                best = np.argsort(-e)[:choices]
                gate = e[best[choice]] / (e.sum() if choices == 1 else e[best].sum())
                expert = best[choice]
                if not room[expert]:
                    dropped += 1
                    continue
                room[expert] -= 1
                z = row @ p["up_w"][expert] + p["up_b"][expert]
                z = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
                y[group, token] += gate * (z @ p["down_w"][expert] + p["down_b"][expert])
    return y, dropped


@each_way
def test_a_torch_mixture_gives_the_same(choices, factor):
    torch = pytest.importorskip("torch")
    parameters, x, dy = a_mixture()
    _, even, kept = mixture(parameters, x, choices, factor)
    gradient = empty_like(parameters)
    dx = mixture_grad(parameters, kept, dy, gradient, weight=0.3)

    p = {name: torch.tensor(array, requires_grad=True) for name, array in parameters.items()}
    xt = torch.tensor(x, requires_grad=True)
    probabilities = torch.softmax(xt @ p["router"], dim=2)
    top, best = probabilities.topk(choices, dim=2)
    gates = top if choices == 1 else top / top.sum(dim=2, keepdim=True)
    number, room = p["router"].shape[1], capacity(x.shape[1], 4, choices, factor)
    y = 0
    for choice in range(choices):
        one_hot = torch.nn.functional.one_hot(best[:, :, choice], number)
        before = sum(
            torch.nn.functional.one_hot(best[:, :, c], number).sum(1, keepdim=True)
            for c in range(choice)
        )
        place = ((one_hot.cumsum(1) - 1 + before) * one_hot).sum(2)
        for expert in range(number):
            gelu = torch.nn.functional.gelu
            z = gelu(xt @ p["up_w"][expert] + p["up_b"][expert], approximate="tanh")
            answer = z @ p["down_w"][expert] + p["down_b"][expert]
            chosen = (best[:, :, choice] == expert) & (place < room)
            y = y + answer * (gates[:, :, choice] * chosen)[:, :, None]
    first = torch.nn.functional.one_hot(best[:, :, 0], number).double().mean(1)
    loss = number * (first * probabilities.mean(1)).sum(1).mean()
    ((y * torch.tensor(dy)).sum() + 0.3 * loss).backward()
    assert np.isclose(even, loss.item(), rtol=1e-12)
    assert np.allclose(dx, xt.grad.numpy(), atol=1e-11)
    for name, array in gradient.items():
        assert np.allclose(array, p[name].grad.numpy(), atol=1e-11), name


def test_float32_stays_float32():
    parameters, x, dy = a_mixture(dtype=np.float32)
    y, _, kept = mixture(parameters, x, choices=2)
    gradient = empty_like(parameters)
    dx = mixture_grad(parameters, kept, dy, gradient, weight=0.01)
    assert {y.dtype, dx.dtype, *(a.dtype for a in gradient.values())} == {np.dtype("f4")}
    wide = {name: array.astype("f8") for name, array in parameters.items()}
    assert np.allclose(y, mixture(wide, x.astype("f8"), choices=2)[0], atol=1e-4)


# ---------------------------------------------------------------- capacity and balance


@given(
    groups=st.integers(1, 4),
    tokens=st.integers(1, 9),
    number=st.integers(1, 5),
    choices=st.integers(1, 2),
    factor=st.sampled_from([0.3, 1.0, 1.25, math.inf]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_no_expert_takes_more_than_its_capacity(groups, tokens, number, choices, factor, seed):
    choices = min(choices, number)
    random = np.random.default_rng(seed)
    x, router = random.normal(size=(groups, tokens, 3)), random.normal(size=(3, number))
    found = route(x, router, choices, factor)
    most = capacity(tokens, number, choices, factor)
    assert found.load.sum() == groups * tokens * choices
    assert np.array_equal(found.counts, np.minimum(found.load, most).sum(axis=0))
    assert found.dropped == found.load.sum() - found.counts.sum()
    assert np.count_nonzero(found.gates) == found.counts.sum()


def test_of_a_full_expert_the_first_tokens_and_the_first_choices_stay():
    x = np.array([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    router = np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]])  # all want experts 0 and 1
    found = route(x, router, choices=2, factor=0.75)
    assert capacity(4, 3, 2, 0.75) == 2
    assert (found.gates > 0).tolist() == [[[True] * 4, [False] * 4]]


def test_the_balance_loss_is_one_when_even_and_the_number_of_experts_when_one_has_all():
    even = np.eye(4)[np.newaxis] * 50
    assert np.isclose(balance(route(even, np.eye(4))), 1)
    one = np.ones((1, 8, 4))
    assert np.isclose(balance(route(one, np.eye(4)[:, :1] * [[50, 0, 0, 0]])), 4)


def test_following_the_balance_loss_spreads_the_tokens():
    parameters, x, dy = a_mixture(groups=2, tokens=32)
    parameters["router"][:, 0] += 2
    x[..., 0] += 2  # all tokens agree a little, and so do the scores
    before = route(x, parameters["router"]).load.sum(axis=0)
    for _ in range(300):
        _, _, kept = mixture(parameters, x)
        gradient = empty_like(parameters)
        mixture_grad(parameters, kept, 0 * dy, gradient, weight=1.0)
        parameters["router"] -= 0.3 * gradient["router"]
    after = route(x, parameters["router"]).load.sum(axis=0)
    assert before.max() > 2.5 * before.mean() and after.max() < 1.7 * after.mean()


# ---------------------------------------------------------------- on ranks


def program(rank, choices, factor, weight=0.3):
    parameters, x, dy = a_mixture(groups=4)
    mine, groups = on_ranks.cut(parameters, rank.data), np.split(np.arange(4), rank.size)
    x, dy = x[groups[rank.index]], dy[groups[rank.index]]
    journey = on_ranks.journeys(rank.data)
    y, even, kept = mixture(mine, x, choices, factor, divisor=4, journey=journey)
    gradient = empty_like(mine)
    dx = mixture_grad(mine, kept, dy, gradient, weight)
    sent = sum(e.nbytes for e in rank.events)
    all_reduce(rank.data, gradient["router"], out=gradient["router"])
    found = kept.route
    return y, even, dx, gradient, found.counts, sent, kept.journey.counts, found.dropped


@each_way
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_give_what_one_gives(ranks, choices, factor):
    parameters, x, dy = a_mixture(groups=4)
    right, even, kept = mixture(parameters, x, choices, factor)
    gradient = empty_like(parameters)
    right_dx = mixture_grad(parameters, kept, dy, gradient, weight=0.3)

    results = spmd.run(None, Mesh(data=ranks), program, choices, factor, record=True).results
    y, evens, dx, gradients, counts, sent, loads, dropped = zip(*results)
    assert np.abs(np.concatenate(y) - right).max() < 1e-10
    assert np.abs(np.concatenate(dx) - right_dx).max() < 1e-10
    assert abs(sum(evens) - even) < 1e-10
    for name, whole in gradient.items():
        parts = [g[name] for g in gradients]
        found = parts[0] if name == "router" else np.concatenate(parts)
        assert np.abs(found - whole).max() < 1e-10, name
    assert list(sent) == on_ranks.predicted_bytes(np.array(counts), width=6)
    assert np.array_equal(np.concatenate(loads), kept.route.counts)  # rows that were computed
    assert sum(dropped) == kept.route.dropped


def test_a_rank_without_tokens_for_others_and_an_expert_without_tokens_are_no_trouble():
    def lonely(rank):
        parameters, x, dy = a_mixture(groups=4)
        parameters["router"][:] = 0
        parameters["router"][:, 1] = 50  # all go to expert 1, on rank 0
        mine, x = on_ranks.cut(parameters, rank.data), np.abs(x[: 2 - rank.index])
        journey = on_ranks.journeys(rank.data)
        _, _, kept = mixture(mine, x, factor=math.inf, journey=journey)
        gradient = empty_like(mine)
        mixture_grad(mine, kept, dy[: 2 - rank.index], gradient)
        return kept.journey.counts.tolist(), [np.isfinite(g).all() for g in gradient.values()]

    first, second = spmd.run(None, Mesh(data=2), lonely).results
    assert first == ([0, 21], [True] * 5) and second == ([0, 0], [True] * 5)


# ---------------------------------------------------------------- a GPT with a mixture

GPT = expert_gpt.ExpertGPT(vocabulary=7, context=5, width=8, heads=2, experts=4, lines=2)
LINES = np.random.default_rng(0).integers(0, 7, (2, 8, 5))


def test_the_gradient_of_a_gpt_with_experts_equals_finite_differences():
    gpt = replace(GPT, choices=2, factor=0.9, weight=0.3)
    parameters = (
        gpt.initialise(0) + np.random.default_rng(1).normal(size=gpt.initialise(0).size) / 5
    )
    found = gpt.loss_and_gradient(parameters, *LINES)
    assert found.route.dropped > 0

    def loss():
        there = gpt.loss_and_gradient(parameters, *LINES)
        return there.loss + gpt.weight * there.balance

    some = np.random.default_rng(2).permutation(parameters.size)[:150]
    for place in some:
        here, differ = parameters[place], []
        for step in (1e-5, -1e-5):
            parameters[place] = here + step
            differ.append(loss())
        parameters[place] = here
        assert np.isclose((differ[0] - differ[1]) / 2e-5, found.gradient[place], atol=2e-8)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_gpt_with_its_experts_on_ranks_trains_as_on_one(ranks):
    def train(rank, steps=5):
        mine = on_ranks.experts_of(rank.data, GPT.experts)
        parameters, here = GPT.initialise(0, mine), 4 // rank.size
        tokens, targets = (part[shard(8, rank.data)] for part in LINES)
        state, losses = Adam(0.01).start(parameters.size), []
        for _ in range(steps):
            journey = on_ranks.journeys(rank.data)
            found = GPT.loss_and_gradient(parameters, tokens, targets, 40, 4, journey)
            shared = found.gradient[GPT.shared(here)]
            all_reduce(rank.data, shared, out=shared)
            Adam(0.01).step(parameters, found.gradient, state)
            losses.append(all_reduce(rank.data, [found.loss, found.balance]).tolist())
        return losses, parameters

    (losses, whole), *_ = spmd.run(None, Mesh(), train).results
    results = spmd.run(None, Mesh(data=ranks), train).results
    experts_on = [p[GPT.shared(4 // ranks).stop :] for _, p in results]
    for found, parameters in results:
        assert np.abs(np.array(found) - losses).max() < 1e-10
        assert np.abs(parameters[GPT.shared()] - whole[GPT.shared()]).max() < 1e-10
    there = np.concatenate([GPT.views(p, 4 // ranks)["up_w"] for _, p in results])
    assert np.abs(there - GPT.views(whole)["up_w"]).max() < 1e-10
    assert sum(map(len, experts_on)) == len(whole) - GPT.shared().stop


def test_a_batch_that_makes_no_whole_groups_is_refused():
    with pytest.raises(ValueError, match="7 lines do not make groups of 2"):
        GPT.loss_and_gradient(GPT.initialise(0), LINES[0, :7], LINES[1, :7])


# ---------------------------------------------------------------- wrong use


def test_experts_that_do_not_split_are_refused():
    with pytest.raises(RankError, match="6 experts do not split over 4 ranks: take 4 or 8"):
        spmd.run(None, Mesh(data=4), lambda rank: on_ranks.experts_of(rank.data, 6))


def test_wrong_arguments_are_refused():
    parameters, x, dy = a_mixture()
    with pytest.raises(ValueError, match="choices is 3: a token goes to 1 expert, or at most 2"):
        route(x, parameters["router"], choices=3)
    with pytest.raises(ValueError, match="at most 1 here"):
        route(x, parameters["router"][:, :1], choices=2)
    with pytest.raises(ValueError, match="capacity factor is 0: give a positive number"):
        route(x, parameters["router"], factor=0)
    with pytest.raises(ValueError, match=r"give \(groups, tokens, width\)"):
        route(x[0], parameters["router"])
    with pytest.raises(TypeError, match="dtypes differ"):
        route(x.astype("f4"), parameters["router"])
    _, _, kept = mixture(parameters, x)
    with pytest.raises(ValueError, match="dy has shape"):
        mixture_grad(parameters, kept, dy[:1], empty_like(parameters))


@pytest.mark.parametrize("module", [experts, routing, expert_gpt, on_ranks])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
