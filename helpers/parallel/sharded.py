"""Sharded training: each rank keeps a part of what all ranks would keep alike.

In plain data parallelism every rank holds all parameters, all gradients and all of the optimiser's
state. ZeRO cuts these into parts, in three stages (Rajbhandari et al. 2020, "ZeRO: memory
optimizations toward training trillion parameter models", section 5); PyTorch calls stage 3 FSDP,
fully sharded data parallel.

=====  ==========  =========  =====  ============================================================
stage  parameters  gradients  state  exchanges in a step, for n bytes of parameters
=====  ==========  =========  =====  ============================================================
0      whole       whole      whole  all-reduce of gradients: 2n
1      whole       whole      part   reduce-scatter of gradients, all-gather of parameters: 2n
2      whole       part       part   the same, gradients as soon as they are there: 2n
3      part        part       part   parameters are gathered twice, gradients scattered once: 3n
=====  ==========  =========  =====  ============================================================

The flat array of parameters is cut into units, as a rule its layers, and each unit into parts as
`numpy.array_split` cuts. Stages 2 and 3 hold one whole unit at a time beside the parts.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np

from helpers.engine.collectives import all_gather, all_reduce, reduce_scatter
from helpers.nn.layers import (
    check_dtypes,
    linear,
    linear_grad_input,
    linear_grad_weights,
    relu,
    relu_grad,
)
from helpers.nn.mlp import LOSSES
from helpers.nn.optimisers import clip_by_global_norm

STAGES = (0, 1, 2, 3)
KINDS = ("parameters", "gradients", "state")


class Sharded:
    """One rank's share of the training state at a stage of ZeRO.

    Parameters
    ----------
    group : Group
        The ranks that share the state, for example ``rank.data``.
    parameters : float array of shape (size,)
        Where training starts, the same on all ranks. Copied.
    optimiser : SGD or Adam
        From `helpers.nn`.
    stage : {0, 1, 2, 3}
        0 is plain data parallelism.
    units : sequence of (start, stop), optional
        Neighbouring slices that cover the flat array, such as ``mlp.slices``. Default: one unit.

    Raises
    ------
    ValueError
        There is no such stage, or the units do not cover the parameters one after the other.
    TypeError
        The parameters are no floating-point array.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.nn import SGD
    >>> def program(rank):
    ...     shared = Sharded(rank.data, np.arange(5.0), SGD(rate=1.0), stage=3)
    ...     shared.give(0, np.ones(5))
    ...     shared.step()
    ...     return shared.whole().tolist(), shared.held()["parameters"]
    >>> spmd.run(None, Mesh(data=2), program).results
    [([-2.0, -1.0, 0.0, 1.0, 2.0], 24), ([-2.0, -1.0, 0.0, 1.0, 2.0], 16)]
    """

    def __init__(self, group, parameters, optimiser, stage: int, units=None):
        check_dtypes(parameters=parameters)
        _check_stage(stage)
        self.group, self.optimiser, self.stage = group, optimiser, stage
        self.units = _checked_units(units, parameters.size)
        self.dtype = parameters.dtype
        self._mine = [_part(unit, group.rank, group.size) for unit in self.units]
        self._parameters = parameters.copy() if stage < 3 else self.own(parameters)
        owned = sum(stop - start for start, stop in self._mine)
        self._gradient = np.zeros(parameters.size if stage < 2 else owned, self.dtype)
        self.state = optimiser.start(parameters.size if stage == 0 else owned, self.dtype)
        self._largest_unit = 0
        self._part_of_sum = None

    # ------------------------------------------------------------ while a step computes

    @contextmanager
    def unit(self, number: int):
        """All parameters of a unit, for as long as they are needed.

        In stage 3 they are gathered from all ranks, and dropped at the end: all ranks must ask for
        the same units in the same order.

        Parameters
        ----------
        number : int
            Counts the units from 0.

        Yields
        ------
        float array
            Do not change it.
        """
        if self.stage < 3:
            yield self._parameters[slice(*self.units[number])]
            return
        gathered = self._gathered(number, self._parameters)
        self._largest_unit = max(self._largest_unit, gathered.nbytes)
        yield gathered

    def give(self, number: int, gradient) -> None:
        """Hand over this rank's gradient of a unit; the ranks' gradients are added.

        Parameters
        ----------
        number : int
            Counts the units from 0. All ranks hand over the units in the same order.
        gradient : float array
            Of the unit's size. For a mean over all rows, its loss was divided by the rows of all
            ranks.

        Raises
        ------
        ValueError
            It has another size than the unit.
        """
        start, stop = self.units[number]
        if gradient.shape != (stop - start,):
            raise ValueError(
                f"unit {number} has {stop - start} parameters, its gradient has shape "
                f"{gradient.shape}: give one number for each."
            )
        if self.stage < 2:
            self._gradient[start:stop] = gradient
        else:
            self._largest_unit = max(self._largest_unit, gradient.nbytes)
            self._gradient[self._place(number)] = reduce_scatter(self.group, gradient)

    def step(self, rate: float | None = None, clip: float | None = None) -> float | None:
        """Update this rank's part, once the gradients of all units have been handed over.

        Parameters
        ----------
        rate : float, optional
            Instead of the optimiser's own.
        clip : float, optional
            The largest norm of the whole gradient that is allowed; a longer one is scaled down.

        Returns
        -------
        float or None
            With `clip`, the norm of the whole gradient before.

        Raises
        ------
        ValueError
            With `clip`, the norm is not finite; or a number is out of range.
        """
        gradient = self.reduce()
        norm = None
        if clip is not None:
            alone = self.stage == 0
            norm = math.sqrt(squares(gradient)) if alone else global_norm(self.group, gradient)
            clip_by_global_norm(gradient, clip, norm)
        self.update(rate)
        return norm

    def reduce(self) -> np.ndarray:
        """Add up the ranks' gradients; the first half of `step`.

        Returns
        -------
        float array
            This rank's part of the sum, the whole of it in stage 0. What `update` uses: scale it in
            place to clip it.
        """
        if self.stage == 0:
            self._part_of_sum = all_reduce(self.group, self._gradient, out=self._gradient)
        else:
            self._part_of_sum = self._own_gradient()
        return self._part_of_sum

    def update(self, rate: float | None = None) -> None:
        """Update the parameters with what `reduce` gave; the second half of `step`."""
        parameters = self._parameters if self.stage == 0 else self._own_parameters()
        self.optimiser.step(parameters, self._part_of_sum, self.state, rate=rate)
        self._part_of_sum = None
        if self.stage in (1, 2):
            self._spread(parameters)

    def whole(self) -> np.ndarray:
        """A copy of all parameters; all ranks must ask for it together."""
        if self.stage < 3:
            return self._parameters.copy()
        return self.gathered(self._parameters)

    @property
    def parameters(self) -> np.ndarray:
        """What this rank keeps of the parameters: all of them below stage 3, else its part."""
        return self._parameters

    @property
    def gradient(self) -> np.ndarray:
        """What this rank keeps of the gradient: all of it below stage 2, else its part.

        Below stage 2 it can also be written here, in place of `give`.
        """
        return self._gradient

    def own(self, whole) -> np.ndarray:
        """This rank's part of an array as long as all parameters."""
        return np.concatenate([whole[start:stop] for start, stop in self._mine])

    def gathered(self, part) -> np.ndarray:
        """The whole array, from the parts of all ranks; all ranks must ask for it together."""
        units = range(len(self.units))
        return np.concatenate([self._gathered(number, part) for number in units])

    # ------------------------------------------------------------ memory

    def held(self) -> dict[str, int]:
        """Bytes that this rank keeps from step to step, measured.

        Returns
        -------
        dict
            ``parameters``, ``gradients`` and ``state``; and ``unit``, the largest unit that was
            whole for a moment in stages 2 and 3, which was freed again.
        """
        moments = [value for value in self.state.values() if isinstance(value, np.ndarray)]
        kept = {"parameters": [self._parameters], "gradients": [self._gradient], "state": moments}
        return {kind: memory_of(arrays) for kind, arrays in kept.items()} | {
            "unit": self._largest_unit
        }

    # ------------------------------------------------------------ parts of units

    def _place(self, number):
        """Where this rank's part of a unit lies among its parts."""
        before = sum(stop - start for start, stop in self._mine[:number])
        start, stop = self._mine[number]
        return slice(before, before + stop - start)

    def _own_gradient(self):
        if self.stage >= 2:
            return self._gradient
        units = [self._gradient[start:stop] for start, stop in self.units]
        return np.concatenate([reduce_scatter(self.group, unit) for unit in units])

    def _own_parameters(self):
        if self.stage == 3:
            return self._parameters
        return self.own(self._parameters)

    def _gathered(self, number, part):
        """All of a unit, from the parts of all ranks."""
        start, stop = self.units[number]
        alike = (stop - start) % self.group.size == 0
        return all_gather(self.group, part[self._place(number)], alike)

    def _spread(self, parts):
        """Every rank's new part goes to all."""
        for number, unit in enumerate(self.units):
            self._parameters[slice(*unit)] = self._gathered(number, parts)


def gradient_by_layers(mlp, sharded: Sharded, x, y, divisor=None) -> float:
    """The loss, with every layer's gradient handed over as soon as it is known.

    A layer's parameters are asked for when its turn comes, once forward and once backward. In
    stage 3 a rank so never holds more than one whole layer.

    Parameters
    ----------
    mlp : MLP
    sharded : Sharded
        Made with ``units=mlp.slices``.
    x, y, divisor
        As for `MLP.loss_and_gradient`: this rank's rows, and the number of all ranks' rows.

    Returns
    -------
    float
        This rank's part of the loss.

    Raises
    ------
    ValueError
        The units are not the layers of this network, or shapes do not fit.
    """
    if sharded.units != list(mlp.slices):
        raise ValueError("The units are not this network's layers: make it with units=mlp.slices.")
    outputs = [x]
    for layer, shape in enumerate(mlp.shapes):
        with sharded.unit(layer) as flat:
            z = linear(outputs[-1], *_weights_and_biases(flat, shape))
        outputs.append(relu(z, out=z) if layer < len(mlp.shapes) - 1 else z)
    loss, dy = LOSSES[mlp.loss](outputs[-1], y, divisor)
    for layer, shape in reversed(list(enumerate(mlp.shapes))):
        gradient = np.empty(math.prod(shape) + shape[1], x.dtype)
        linear_grad_weights(dy, outputs[layer], *_weights_and_biases(gradient, shape))
        sharded.give(layer, gradient)
        if layer:
            with sharded.unit(layer) as flat:
                dy = linear_grad_input(dy, _weights_and_biases(flat, shape)[0])
            dy = relu_grad(dy, outputs[layer], out=dy)
    return loss


def _weights_and_biases(flat, shape):
    """A layer's numbers, seen as weights (d_in, d_out) and biases (d_out,)."""
    middle = math.prod(shape)
    return flat[:middle].reshape(shape), flat[middle:]


def global_norm(group, part) -> float:
    """The length of a gradient whose parts lie on the ranks of a group.

    Parameters
    ----------
    group : Group
    part : float array
        This rank's part, each number on one rank only.

    Returns
    -------
    float
        The same on all ranks. Squares are added in float64.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> program = lambda rank: global_norm(rank.data, np.array([3.0 + rank.index]))
    >>> spmd.run(None, Mesh(data=2), program).results
    [5.0, 5.0]
    """
    return float(np.sqrt(all_reduce(group, np.array(squares(part)))))


def predicted_bytes(size, ranks, rank, stage, moments=2, itemsize=4, units=None) -> dict[str, int]:
    """Bytes that a rank keeps at a stage of ZeRO, by the formula (the paper's figure 1).

    A kind of number that is whole takes ``size * itemsize`` bytes, one that is cut takes this
    rank's part of them; the optimiser's state counts `moments` times.

    Parameters
    ----------
    size : int
        The number of parameters.
    ranks, rank : int
        How many share the state, and which of them is meant.
    stage : {0, 1, 2, 3}
    moments : int
        Arrays in the optimiser's state: 0 for SGD, 1 with momentum, 2 for Adam.
    itemsize : int
        Bytes a number.
    units
        As for `Sharded`. Every unit is cut by itself, so parts may differ by one number a unit.

    Returns
    -------
    dict
        ``parameters``, ``gradients``, ``state``.

    Raises
    ------
    ValueError
        There is no such stage or rank, or the units do not fit.

    Examples
    --------
    >>> predicted_bytes(size=1000, ranks=4, rank=0, stage=2)
    {'parameters': 4000, 'gradients': 1000, 'state': 2000}
    """
    _check_stage(stage)
    if not 0 <= rank < ranks:
        raise ValueError(f"There is no rank {rank} among {ranks}: give 0 to {ranks - 1}.")
    parts = [_part(unit, rank, ranks) for unit in _checked_units(units, size)]
    part = sum(stop - start for start, stop in parts)
    cut_from = {"parameters": 3, "gradients": 2, "state": 1}
    numbers = {kind: part if stage >= cut_from[kind] else size for kind in KINDS}
    arrays = {"parameters": 1, "gradients": 1, "state": moments}
    return {kind: numbers[kind] * arrays[kind] * itemsize for kind in KINDS}


def memory_of(arrays) -> int:
    """Bytes of memory behind some arrays, each piece counted once.

    A slice keeps all of the array alive that it was cut from, so that array counts.

    Examples
    --------
    >>> whole = np.zeros(1000)
    >>> memory_of([whole[:10]]), memory_of([whole[:10].copy()]), memory_of([whole, whole])
    (8000, 80, 8000)
    """
    behind = [_behind(array) for array in arrays]
    return sum(array.nbytes for array in {id(array): array for array in behind}.values())


def _behind(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def squares(array) -> float:
    """The sum of squares of an array of one axis in float64, without a copy in float64."""
    return float(np.einsum("i,i->", array, array, dtype=np.float64))


def _part(unit, rank, ranks):
    """A rank's part of a unit, cut as `numpy.array_split` cuts: (start, stop)."""
    start, stop = unit
    small, longer = divmod(stop - start, ranks)
    first = start + rank * small + min(rank, longer)
    return first, first + small + (rank < longer)


def _checked_units(units, size):
    units = [(0, size)] if units is None else [tuple(map(int, unit)) for unit in units]
    starts, stops = [start for start, _ in units], [stop for _, stop in units]
    in_order = all(start <= stop for start, stop in units)
    if [*starts, size] != [0, *stops] or not in_order:
        raise ValueError(
            f"units {units} must follow each other from 0 to {size}, the number of parameters."
        )
    return units


def _check_stage(stage):
    if isinstance(stage, bool) or stage not in STAGES:
        raise ValueError(f"There is no stage {stage!r}: choose 0 (plain), 1, 2 or 3.")
