"""Text from a GPT that is split over ranks: by tensor, by pipeline stages, and prompts by data.

Every rank keeps the keys and values of its own blocks and heads, for its own prompts, so the cache
is split as the model is (Pope et al. 2022, "Efficiently scaling transformer inference", section 3).
Stages of a pipeline must wait for a token before they can begin the next one of the same text. So
that they need not idle, each works on another part of the prompts in the meantime.

The tokens are those of `helpers.nn.generate` on one process: its random numbers depend on the seed
and on a prompt's number only.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np

from helpers import nn
from helpers.engine.collectives import all_gather, barrier, broadcast
from helpers.nn.generate import check_request, choose, random_numbers
from helpers.nn.tokens import check_tokens
from helpers.parallel import tensor as cuts
from helpers.parallel.pipeline import ON_THE_WAY
from helpers.parallel.shards import cuts as parts_of
from helpers.parallel.shards import positive, shard
from helpers.parallel.stage import Parts, deal

TOKENS = "tokens"


class Generated(NamedTuple):
    """What the ranks wrote, and what it took.

    Attributes
    ----------
    text : integer array of shape (prompts, length + steps)
        All prompts with what follows them, on every rank.
    seconds : array of shape (steps,)
        When each token was there, for all prompts of this rank, from the start. The first counts
        the reading of the prompts.
    held : dict of str to int
        Bytes of this rank: ``parameters`` and ``cache``.
    """

    text: np.ndarray
    seconds: np.ndarray
    held: dict

    @property
    def latency(self):
        """Seconds from one token of a text to the next: the median, without the first token.

        Not a number where there are fewer than two tokens.
        """
        return float(np.median(np.diff(self.seconds))) if len(self.seconds) > 1 else math.nan


def generate(
    rank, gpt, parameters, prompt, steps, temperature=1.0, seed=0, microbatches=None
) -> Generated:
    """Continue prompts of equal length with all ranks of a mesh; all call it together.

    Parameters
    ----------
    rank : Rank
        Its data ranks share out the prompts, its pipeline ranks the blocks, its tensor ranks the
        heads, the units and the vocabulary.
    gpt : GPT
    parameters : array of shape (gpt.size,) or callable
        All parameters, of which this rank takes a copy of its part; or ``parameters(layer)``, the
        flat array of one layer.
    prompt, steps, temperature, seed
        As for `helpers.nn.generate`; the same on all ranks.
    microbatches : int, optional
        In how many parts a rank's prompts go through the pipeline. Default: as many as there are
        stages, or fewer if there are fewer prompts.

    Returns
    -------
    Generated

    Raises
    ------
    ValueError, TypeError
        As for `helpers.nn.generate`, or if the GPT does not split over so many ranks.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> gpt = nn.GPT(vocabulary=6, context=8, width=4, heads=2, layers=2)
    >>> w, prompt = gpt.initialise(seed=0), np.array([[1, 2], [3, 4], [5, 0]])
    >>> run = spmd.run(None, Mesh(tensor=2, pipeline=2), generate, gpt, w, prompt, 5)
    >>> right = nn.generate(gpt, w, prompt, 5)
    >>> [np.array_equal(result.text, right) for result in run.results]
    [True, True, True, True]
    """
    prompt = check_tokens(prompt, gpt.vocabulary)
    check_request(gpt, prompt.shape[1], steps, temperature)
    mine = shard(len(prompt), rank.data)
    part = Writer(rank, gpt, parameters)
    random = random_numbers(mine.stop - mine.start, steps, seed, mine.start)
    text, seconds = part.write(prompt[mine], steps, temperature, random, microbatches)
    text = broadcast(rank.pipeline, text, root=0)
    seconds = broadcast(rank.pipeline, seconds, root=rank.pipeline.size - 1)
    return Generated(all_gather(rank.data, text), seconds, part.held())


class Writer:
    """One rank's part of a GPT, and of the cache of keys and values.

    Parameters
    ----------
    rank, gpt, parameters
        As for `generate`.
    """

    def __init__(self, rank, gpt, parameters):
        self.rank, self.gpt = rank, gpt
        self.pipeline, self.tensor = rank.pipeline, rank.tensor
        layers = deal(gpt, self.pipeline.size)[self.pipeline.rank]
        self.parts = Parts(gpt, layers, self.tensor.size)
        self.parameters = self.parts.cut(_layers_of(gpt, parameters), self.tensor.rank)
        self._p = self.parts.views(self.parameters)
        self._blocks = [layer for layer in layers if 0 < layer <= gpt.layers]
        self.first, self.last = 0 in layers, gpt.layers + 1 in layers
        self._exchange = cuts.TensorParallel(self.tensor)
        self._memory, self._caches = nn.Memory(self.parameters.dtype), []

    def held(self) -> dict[str, int]:
        """Bytes of this rank's parameters, and of its keys and values."""
        caches = [cache for caches in self._caches for cache in caches.values()]
        cached = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
        return {"parameters": self.parameters.nbytes, "cache": cached}

    def write(self, prompt, steps, temperature, random, microbatches=None):
        """Continue prompts; returns the text, known on the first stage, and when tokens came.

        Parameters
        ----------
        prompt : integer array of shape (batch, length)
            Of this rank's data coordinate.
        steps, temperature, microbatches
            As for `generate`.
        random : array of shape (batch, steps)
            From 0 to 1.

        Returns
        -------
        text : integer array of shape (batch, length + steps)
        seconds : array of shape (steps,)
        """
        batch, length = prompt.shape
        text = np.zeros((batch, length + steps), np.int64)
        text[:, :length] = prompt
        number = self.pipeline.size if microbatches is None else microbatches
        # Without prompts nothing is to be done; the ranks that share this part have none either.
        parts = parts_of(batch, min(positive("microbatches", number), batch)) if batch else []
        self._caches = [self._new_cache(part, length + steps) for part in parts]
        barrier(self.rank.world)
        start, seconds = time.monotonic(), np.zeros(steps)
        for step in range(steps):
            at = length + step
            for number, part in enumerate(parts):
                x = self._input(text, part, at, step)
                x = self._through(x, text, part, at, step, number)
                if self.last:
                    text[part, at] = self._next(x, temperature, random[part, step])
                self._hand_on(x, text[part, at])
            seconds[step] = time.monotonic() - start
        if self.first and steps:
            for part in parts:
                self._learn(text, part, length + steps - 1)
        return text, seconds

    # ------------------------------------------------------------ one part of the prompts, one step

    def _input(self, text, part, at, step):
        """What this stage is given: None on the first, which looks at the text itself."""
        if not self.first:
            return self.pipeline.receive(self.pipeline.rank - 1, what="activations")
        if step:
            self._learn(text, part, at - 1)
        return None

    def _learn(self, text, part, at):
        """The token that the last stage has chosen."""
        if not self.last:
            text[part, at] = self.pipeline.receive(self.pipeline.size - 1, what=TOKENS)

    def _through(self, x, text, part, at, step, number):
        """Through the blocks of this stage."""
        about = dict(layer=self.pipeline.rank, microbatch=number)
        with self.rank.record("token" if step else "read", **about):
            if self.first:
                read = slice(at - 1 if step else 0, at)
                start = at - 1 if step else 0
                x = cuts.embed(self._p[0], text[part, read], self.tensor, start)
            for layer in self._blocks:
                heads, cache = self.gpt.heads // self.tensor.size, self._caches[number][layer]
                x, _ = nn.block(*(self._p[layer], x, heads, x, self._memory, self._exchange, cache))
        return x

    def _next(self, x, temperature, random):
        """The tokens that follow, the same on all tensor ranks."""
        head, table = self._p[self.gpt.layers + 1], self._p[self.parts.table]["tokens"]
        last = np.ascontiguousarray(x[:, -1:])
        scores = cuts.head_scores(head, table, last, self.tensor)
        return choose(scores[:, 0], temperature, random)

    def _hand_on(self, x, tokens):
        """To the next stage what came out of this one; from the last to the first the tokens."""
        if not self.last:
            self.pipeline.post(
                x, self.pipeline.rank + 1, what="activations", room=ON_THE_WAY * x.nbytes
            )
        elif not self.first:
            self.pipeline.post(tokens.copy(), 0, what=TOKENS)

    def _new_cache(self, part, positions):
        rows, size = part.stop - part.start, self.gpt.width // self.gpt.heads
        shape = rows, positions, self.gpt.heads // self.tensor.size, size
        return {layer: nn.KeyValueCache(*shape, self.parameters.dtype) for layer in self._blocks}


def _layers_of(gpt, parameters):
    if callable(parameters):
        return parameters
    gpt.check_flat("parameters", parameters)
    return lambda layer: parameters[slice(*gpt.slices[layer])]
