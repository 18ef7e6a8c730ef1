"""Text from a GPT, token by token, with the keys and values of what was read kept."""

from __future__ import annotations

import math

import numpy as np

from helpers.nn.tokens import check_tokens


def generate(gpt, parameters, prompt, steps, temperature=1.0, seed=0, first=0, cached=True):
    """Continue prompts of equal length: each token is drawn from the softmax of the scores.

    With the cache a step reads one token, without it all of them: the scores are the same but for
    rounding (Pope et al. 2022, "Efficiently Scaling Transformer Inference", section 2).

    Parameters
    ----------
    gpt : GPT
    parameters : array of shape (gpt.size,)
    prompt : integer array of shape (batch, length)
        At least one token each.
    steps : int
        Tokens to add; prompt and steps fit into the context.
    temperature : float
        What scores are divided by: below 1 likely tokens become likelier, with 0 the likeliest is
        always taken.
    seed : int
        Not negative.
    first : int
        The number of the first prompt in a longer list. Random numbers depend on the seed and a
        prompt's number, so that ranks that share out a list write what one rank would.
    cached : bool
        False: read everything again at each step.

    Returns
    -------
    integer array of shape (batch, length + steps)
        The prompts and what follows them.

    Raises
    ------
    ValueError
        If the text would be longer than the context, a prompt is empty, or the temperature is
        negative or not finite.
    TypeError
        If the prompt holds no integers.

    Examples
    --------
    >>> import numpy as np
    >>> from helpers.nn import GPT
    >>> gpt = GPT(vocabulary=5, context=8, width=4, heads=2, layers=1)
    >>> text = generate(gpt, gpt.initialise(seed=0), np.array([[1, 2], [3, 4]]), steps=4)
    >>> text.shape, text[:, :2].tolist()
    ((2, 6), [[1, 2], [3, 4]])
    """
    prompt = check_tokens(prompt, gpt.vocabulary)
    batch, length = prompt.shape
    check_request(gpt, length, steps, temperature)
    # The dtype of the prompt may be too narrow for other tokens.
    text = np.empty((batch, length + steps), np.int64)
    text[:, :length] = prompt
    random = random_numbers(batch, steps, seed, first)
    cache = gpt.cache(batch, parameters.dtype) if cached else None
    read = 0
    for at in range(length, length + steps):
        scores = gpt.logits(parameters, text[:, read:at], cache)[:, -1]
        text[:, at] = choose(scores, temperature, random[:, at - length])
        read = at if cached else 0
    return text


def random_numbers(batch, steps, seed, first):
    """From 0 to 1, one for each prompt and step; arguments as for `generate`."""
    rows = [np.random.default_rng([seed, first + row]).random(steps) for row in range(batch)]
    return np.reshape(rows, (batch, steps))


def choose(scores, temperature, random):
    """A token for each row: where the summed probabilities pass the random number.

    Parameters
    ----------
    scores : array of shape (batch, vocabulary)
    temperature : float
        As for `generate`.
    random : array of shape (batch,)
        From 0 to 1.

    Returns
    -------
    integer array of shape (batch,)
    """
    if temperature == 0:
        return scores.argmax(axis=1)
    scores = scores.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    sums = np.exp(scores / temperature).cumsum(axis=1)
    passed = sums > random[:, np.newaxis] * sums[:, -1:]
    return passed.argmax(axis=1)


def check_request(gpt, length, steps, temperature):
    """Raise unless a prompt of this length can be continued so far, at this temperature."""
    if steps < 0 or length + steps > gpt.context:
        raise ValueError(
            f"a prompt of {length} and {steps} steps: give 0 steps or more, and at most "
            f"{gpt.context} tokens in all."
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}: give 0 or more.")
