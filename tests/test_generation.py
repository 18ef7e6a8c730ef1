"""Ranks that share a GPT write what one process writes, and keep what the formula says."""

import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.engine import spmd
from helpers.engine.errors import RankError
from helpers.engine.mesh import Mesh
from helpers.nn import GPT
from helpers.nn import generate as on_one
from helpers.parallel import generation
from helpers.parallel.generation import generate

SMALL = GPT(vocabulary=12, context=10, width=8, heads=4, layers=4)
MESHES = [
    Mesh(d, t, p)
    for d in (1, 2, 4, 8)
    for t in (1, 2, 4)
    for p in (1, 2, 4)
    if d * t * p in (1, 2, 4, 8)
]


def parameters_of(gpt, dtype=np.float64):
    """Parameters large enough that the scores of tokens differ."""
    noise = np.random.default_rng(4).normal(size=gpt.size)
    return (gpt.initialise(3) + noise / 4).astype(dtype)


def prompts(number, length=3, gpt=SMALL):
    return np.random.default_rng(1).integers(0, gpt.vocabulary, (number, length))


def written(mesh, prompt, steps, dtype=np.float64, gpt=SMALL, **settings):
    arguments = gpt, parameters_of(gpt, dtype), prompt, steps
    return spmd.run(None, mesh, generate, *arguments, *settings.values()).results


# ---------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m.data}x{m.tensor}x{m.pipeline}")
def test_every_mesh_writes_what_one_process_writes(mesh):
    prompt, w = prompts(6), parameters_of(SMALL)
    for temperature in (1.0, 0.0):
        right = on_one(SMALL, w, prompt, 7, temperature, seed=5)
        for result in written(mesh, prompt, 7, temperature=temperature, seed=5):
            assert np.array_equal(result.text, right)
            assert result.seconds.shape == (7,) and (np.diff(result.seconds) >= 0).all()


def test_the_text_depends_on_the_seed_and_on_the_temperature():
    texts = [
        written(Mesh(tensor=2), prompts(4), 7, temperature=temperature, seed=seed)[0].text
        for temperature, seed in ((1.0, 0), (1.0, 1), (0.0, 0))
    ]
    assert not np.array_equal(texts[0], texts[1]) and not np.array_equal(texts[0], texts[2])


@given(
    sizes=st.sampled_from([(1, 1, 1), (2, 1, 2), (1, 2, 2), (3, 1, 1), (1, 1, 3), (2, 2, 1)]),
    number=st.integers(1, 5),
    length=st.integers(1, 4),
    steps=st.integers(0, 6),
    microbatches=st.sampled_from([None, 1, 2, 7]),
)
@settings(deadline=None, max_examples=25)
def test_prompts_of_any_number_and_length(sizes, number, length, steps, microbatches):
    prompt = prompts(number, length)
    right = on_one(SMALL, parameters_of(SMALL), prompt, steps, seed=2)
    about = dict(temperature=1.0, seed=2, microbatches=microbatches)
    for result in written(Mesh(*sizes), prompt, steps, **about):
        assert np.array_equal(result.text, right)


def test_a_function_gives_the_layers_that_a_rank_needs():
    w, asked = parameters_of(SMALL), {}

    def program(rank):
        asked[rank.index] = []

        def layer_of(layer):
            asked[rank.index].append(layer)
            return w[slice(*SMALL.slices[layer])]

        return generate(rank, SMALL, layer_of, prompts(2), 4).text

    for text in spmd.run(None, Mesh(pipeline=2), program).results:
        assert np.array_equal(text, on_one(SMALL, w, prompts(2), 4))
    assert asked == {0: [0, 1, 2], 1: [3, 4, 5, 0]}  # the last stage has a copy of the table


def test_float32_writes_nearly_always_the_same():
    prompt = prompts(16)
    right = on_one(SMALL, parameters_of(SMALL, np.float32), prompt, 7)
    first, *_ = written(Mesh(tensor=2, pipeline=2), prompt, 7, np.float32)
    assert np.mean(first.text == right) > 0.95  # a sum in another order may tip a choice


# ---------------------------------------------------------------- memory and time


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m.data}x{m.tensor}x{m.pipeline}")
def test_parameters_and_cache_are_split_and_their_bytes_are_those_of_the_formula(mesh):
    number, positions = 8, 3 + 5
    results = written(mesh, prompts(number), 5)
    size = SMALL.width // SMALL.heads
    head_of_a_block = 2 * positions * size * 8  # a prompt's keys and values
    for result in results:
        prompts_here, heads_here = number // mesh.data, SMALL.heads // mesh.tensor
        blocks_here = SMALL.layers // mesh.pipeline
        assert result.held["cache"] == head_of_a_block * prompts_here * heads_here * blocks_here
    assert sum(result.held["cache"] for result in results) == head_of_a_block * 8 * 4 * 4
    if mesh.tensor == mesh.data == 1:
        copy = 0 if mesh.pipeline == 1 else 8 * SMALL.vocabulary * SMALL.width
        assert sum(r.held["parameters"] for r in results) == 8 * SMALL.size + copy


def test_the_latency_is_that_of_a_token_after_the_first():
    seconds = np.array([1.0, 1.1, 1.3, 1.4])
    about = generation.Generated(np.zeros((1, 4)), seconds, {})
    assert math.isclose(about.latency, 0.1)
    assert math.isnan(about._replace(seconds=seconds[:1]).latency)


def test_stages_work_on_different_prompts_at_the_same_time():
    gpt = GPT(vocabulary=12, context=10, width=8, heads=4, layers=2)

    def program(rank):
        return generate(rank, gpt, parameters_of(gpt), prompts(4, gpt=gpt), 5).text

    events = spmd.run(None, Mesh(pipeline=2), program, record=True).events
    tokens = [e for e in events if e.operation == "token"]
    assert {(e.layer, e.microbatch) for e in tokens} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert len(tokens) == 2 * 2 * 4 and sum(e.operation == "read" for e in events) == 4


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("mesh", "prompt", "steps", "words"),
    [
        (Mesh(tensor=3), prompts(2), 3, "3 ranks do not divide 4 heads"),
        (Mesh(pipeline=5), prompts(2), 3, "take 1 to 4 stages"),
        (Mesh(), prompts(2), 8, "at most 10 tokens in all"),
        (Mesh(), prompts(2) + 10, 3, "vocabulary"),
    ],
)
def test_what_cannot_be_is_said(mesh, prompt, steps, words):
    with pytest.raises(RankError, match=words):
        written(mesh, prompt, steps)


def test_examples():
    found = doctest.testmod(generation)
    assert found.attempted and not found.failed
