"""A small GPT: a decoder-only transformer whose parameters lie in one flat array.

It has the form of GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners", section 2.3). In the flat array stand layer 0 (tables of tokens and of positions), the
blocks 1, 2, …, and last the final norm.
"""

from __future__ import annotations

import math
import operator
import zlib
from dataclasses import dataclass, field

import numpy as np

from helpers.nn.blocks import Memory, block, block_grad, block_shapes, named_views
from helpers.nn.ends import embed, embed_grad, head_loss, head_loss_grad, head_scores
from helpers.nn.network import Network
from helpers.nn.tokens import IGNORE, check_tokens

# Deviation of initial weights, that of GPT-2.
DEVIATION = 0.02


@dataclass(frozen=True)
class GPTWorkspace:
    """Memory for one forward and backward pass, to be used again for the next one.

    Attributes
    ----------
    layers : tuple of Memory
        What each layer keeps for the backward pass: one for the embedding, each block, the head.
    scratch : Memory
        What is needed for a moment only.
    kept : list
        What the last forward pass gave to the backward pass.
    """

    layers: tuple
    scratch: Memory
    kept: list = field(default_factory=list)

    @property
    def nbytes(self):
        """Bytes of all arrays."""
        return sum(memory.nbytes for memory in (*self.layers, self.scratch))


class KeyValueCache:
    """Keys and values of one block for the positions that have been read.

    Parameters
    ----------
    batch, context, heads, size : int
        Texts, positions there is room for, heads, and numbers of a head.
    dtype : dtype

    Examples
    --------
    >>> import numpy as np
    >>> cache = KeyValueCache(batch=1, context=8, heads=2, size=3, dtype="f4")
    >>> keys, values = cache.append(np.ones((1, 5, 2, 3)), np.ones((1, 5, 2, 3)))
    >>> keys.shape, cache.length
    ((1, 5, 2, 3), 5)
    """

    def __init__(self, batch, context, heads, size, dtype):
        self.keys = np.empty((batch, context, heads, size), dtype)
        self.values = np.empty_like(self.keys)
        self.length = 0

    def append(self, keys, values):
        """Take up keys and values of new positions, and give those of all positions as views.

        Raises
        ------
        ValueError
            If there is no room for them, or they have another shape.
        """
        start, stop = self.length, self.length + keys.shape[1]
        batch, context, *rest = self.keys.shape
        if stop > context or keys.shape != (batch, stop - start, *rest):
            raise ValueError(
                f"keys of shape {keys.shape} after {start} positions do not fit a cache of shape "
                f"{self.keys.shape}: make one with gpt.cache for these texts."
            )
        self.keys[:, start:stop], self.values[:, start:stop] = keys, values
        self.length = stop
        return self.keys[:, :stop], self.values[:, :stop]


@dataclass(frozen=True)
class GPT(Network):
    """A small GPT: embeddings, blocks, a final norm, and an output tied to the embedding.

    Parameters
    ----------
    vocabulary : int
        Different tokens.
    context : int
        Positions at most.
    width : int
        Numbers of a position.
    heads : int
        Heads of attention; the width is a multiple of them.
    layers : int
        Blocks.

    Raises
    ------
    ValueError
        If a number is not positive, or the width does not split over the heads.

    Examples
    --------
    >>> import numpy as np
    >>> gpt = GPT(vocabulary=5, context=4, width=8, heads=2, layers=1)
    >>> gpt.size, gpt.slices
    (960, ((0, 72), (72, 944), (944, 960)))
    >>> parameters = gpt.initialise(seed=0)
    >>> tokens, targets = np.array([[0, 1, 2]]), np.array([[1, 2, -1]])
    >>> loss, gradient = gpt.loss_and_gradient(parameters, tokens, targets)
    >>> gpt.loss_at(parameters - 0.1 * gradient, tokens, targets) < loss
    True
    """

    vocabulary: int
    context: int
    width: int
    heads: int
    layers: int

    def __post_init__(self):
        for name in ("vocabulary", "context", "width", "heads", "layers"):
            number = operator.index(getattr(self, name))
            object.__setattr__(self, name, number)
            if number < 1:
                raise ValueError(f"{name} is {number}: give 1 or more.")
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} does not split over {self.heads} heads: give a multiple."
            )

    @property
    def shapes(self):
        """For each layer, the shapes of its arrays by name."""
        width = self.width
        first = {"tokens": (self.vocabulary, width), "positions": (self.context, width)}
        last = {"scale": (width,), "shift": (width,)}
        return (first, *[block_shapes(width)] * self.layers, last)

    @property
    def sizes(self):
        """For each layer, the number of its parameters."""
        return [sum(map(math.prod, shapes.values())) for shapes in self.shapes]

    def views(self, flat):
        """The arrays of each layer by name, as views into a flat array.

        Parameters
        ----------
        flat : contiguous float array of shape (size,)
            Parameters or a gradient.

        Returns
        -------
        list of dict
            One for the embedding, each block, and the final norm. Writing into them writes into
            ``flat``.

        Raises
        ------
        ValueError, TypeError
            If ``flat`` has another size, is not contiguous, or holds no floats.
        """
        self.check_flat("the flat array", flat)
        layers = zip(self.slices, self.shapes)
        return [named_views(flat[start:stop], shapes) for (start, stop), shapes in layers]

    def initialise(self, seed, dtype=np.float64):
        """New parameters, see `initialise_layer`.

        Parameters
        ----------
        seed : int
            Not negative.
        dtype : dtype
            Of the parameters.

        Returns
        -------
        array of shape (size,)
        """
        flat = np.empty(self.size, dtype)
        for layer, (start, stop) in enumerate(self.slices):
            flat[start:stop] = self.initialise_layer(layer, seed, dtype)
        return flat

    def initialise_layer(self, layer, seed, dtype=np.float64):
        """New parameters of one layer: normal weights, scales of 1, and all else 0.

        An array depends on the seed, the layer's number, its name and its shape: however layers
        are dealt out to ranks, training starts from the same point. The deviation is 0.02; for
        the two arrays of a block that add to what came in it is divided by ``sqrt(2 * layers)``
        (Radford et al. 2019, section 2.3). Those of float32 are those of float64, rounded.

        Parameters
        ----------
        layer : int
            0 for the embedding, then the blocks, then the final norm.
        seed : int
            Not negative.
        dtype : dtype

        Returns
        -------
        array of one axis
        """
        start, stop = self.slices[layer]
        flat = np.zeros(stop - start, dtype)
        for name, array in named_views(flat, self.shapes[layer]).items():
            if name.endswith("scale"):
                array[:] = 1
            elif array.ndim == 2:
                depth = 2 * self.layers if name in ("out_w", "down_w") else 1
                # A name becomes a number that is the same in each process, as hash is not.
                random = np.random.default_rng([seed, layer, zlib.crc32(name.encode())])
                array[:] = random.normal(scale=DEVIATION / math.sqrt(depth), size=array.shape)
        return flat

    def workspace(self, dtype=np.float64):
        """Memory for batches of any shape, see `GPTWorkspace`; the first pass fills it."""
        scratch = Memory(dtype)
        layers = tuple(Memory(dtype, scratch) for _ in range(self.layers + 2))
        return GPTWorkspace(layers, scratch)

    def cache(self, batch, dtype=np.float64):
        """Empty memory for the keys and values of some texts: one `KeyValueCache` a block."""
        shape = (batch, self.context, self.heads, self.width // self.heads)
        return [KeyValueCache(*shape, dtype) for _ in range(self.layers)]

    def logits(self, parameters, tokens, cache=None):
        """The scores of the token that comes next, at each position.

        Parameters
        ----------
        parameters : array of shape (size,)
        tokens : integer array of shape (batch, length)
        cache : list of KeyValueCache, optional
            From `cache`: what was read before. These tokens then follow, and are taken up.

        Returns
        -------
        array of shape (batch, length, vocabulary)
            Logarithms of probabilities, up to a constant for each position.

        Raises
        ------
        ValueError, TypeError
            If shapes do not fit, or a token is not in the vocabulary.
        """
        first, *blocks, last = self.views(parameters)
        caches = cache or [None] * self.layers
        # Nothing is kept for a gradient, so all blocks share one memory.
        memory = Memory(parameters.dtype)
        x = embed(first, tokens, start=cache[0].length if cache else 0)
        for each, past in zip(blocks, caches):
            block(each, x, self.heads, out=x, memory=memory, cache=past)
        z, _, _ = head_scores(last, first["tokens"], x, memory)
        return z.reshape(*x.shape[:2], self.vocabulary)

    def loss_at(self, parameters, tokens, targets, divisor=None):
        """The loss at these parameters, a float. Arguments as for `forward`."""
        workspace = self.workspace(parameters.dtype)
        return self.forward(parameters, tokens, targets, workspace, divisor)

    def counted(self, targets):
        """How many of these targets count: all but -1."""
        return int(np.count_nonzero(np.asarray(targets) != IGNORE))

    def check_inputs(self, parameters, tokens):
        """Raise unless parameters and tokens are those of this network."""
        self.check_flat("parameters", parameters)
        check_tokens(tokens, self.vocabulary)

    def forward(self, parameters, tokens, targets, workspace, divisor=None):
        """The loss; what `backward` needs is left in the workspace.

        Parameters
        ----------
        parameters : array of shape (size,)
        tokens : integer array of shape (batch, length)
        targets : integer array of the same shape
            The token that comes next at each position, or -1 where none is asked for.
        workspace : GPTWorkspace
        divisor : number, optional
            As for `loss_and_gradient`.

        Returns
        -------
        float

        Raises
        ------
        ValueError, TypeError
            If shapes do not fit, dtypes differ, or a token is not in the vocabulary.
        """
        first, *blocks, last = self.views(parameters)
        self._check_workspace(workspace, parameters.dtype)
        tokens = check_tokens(tokens, self.vocabulary)
        _, *memories, head = workspace.layers
        x = workspace.layers[0].take("x", (*tokens.shape, self.width))
        embed(first, tokens, out=x)
        workspace.kept.clear()
        for each, memory in zip(blocks, memories):
            _, kept = block(each, x, self.heads, out=x, memory=memory)
            workspace.kept.append(kept)
        loss, kept = head_loss(last, first["tokens"], x, targets, divisor, head)
        workspace.kept.append(kept)
        return loss

    def backward(self, parameters, tokens, out, workspace):
        """Write the gradient, and yield each layer's number; see `Network.backward`.

        Do not change the part of layer 0 in ``out`` before the end: the output writes its share of
        the table's gradient there first.

        Examples
        --------
        >>> import numpy as np
        >>> gpt = GPT(vocabulary=5, context=4, width=8, heads=2, layers=1)
        >>> parameters, workspace = gpt.initialise(seed=0), gpt.workspace()
        >>> tokens, gradient = np.array([[0, 1, 2]]), np.empty(gpt.size)
        >>> loss = gpt.forward(parameters, tokens, tokens, workspace)
        >>> list(gpt.backward(parameters, tokens, gradient, workspace))
        [2, 1, 0]
        """
        self.check_gradient(parameters, out)
        self._check_workspace(workspace, parameters.dtype)
        tokens = check_tokens(tokens, self.vocabulary)
        if not workspace.kept or workspace.kept[-1].shape[:2] != tokens.shape:
            raise ValueError("backward needs what forward keeps: run forward with these tokens.")
        return self._layers_backward(parameters, tokens, out, workspace)

    def _layers_backward(self, parameters, tokens, out, workspace):
        """The backward pass, checked arguments."""
        layers, gradients = self.views(parameters), self.views(out)
        *kept, head_kept = workspace.kept
        last, scratch = self.layers + 1, workspace.scratch
        tables = layers[0]["tokens"], gradients[0]["tokens"]
        dx = scratch.take("dx", head_kept.shape)
        head_loss_grad(layers[last], tables[0], head_kept, gradients[last], tables[1], out=dx)
        yield last
        for layer in range(self.layers, 0, -1):
            block_grad(layers[layer], kept[layer - 1], dx, gradients[layer], dx, scratch)
            yield layer
        embed_grad(tokens, dx, gradients[0], add=True, memory=scratch)
        yield 0

    def _check_workspace(self, workspace, dtype):
        if len(workspace.layers) != self.layers + 2 or workspace.scratch.dtype != dtype:
            raise ValueError(
                f"the workspace was made for another number of layers or another dtype than "
                f"{self.layers} and {dtype}: take one from gpt.workspace(dtype)."
            )
