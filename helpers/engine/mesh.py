"""Ranks, named by where they stand: a data, a tensor and a pipeline coordinate.

The number of a rank counts the tensor coordinate fastest, then data, then pipeline. Neighbours
along the tensor axis, which exchange most, are therefore neighbours in number too, and are placed
on the same worker or host as long as possible (Narayanan et al. 2021, "Efficient large-scale
language model training on GPU clusters using Megatron-LM", section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

AXES = ("data", "tensor", "pipeline")


class Coordinate(NamedTuple):
    """Where a rank stands; each number counts from 0."""

    data: int
    tensor: int
    pipeline: int


@dataclass(frozen=True)
class Mesh:
    """How many ranks there are along each axis.

    Attributes
    ----------
    data, tensor, pipeline : int
        At least 1. The number of all ranks is their product.

    Raises
    ------
    ValueError
        A number is not a whole number from 1 up.

    Examples
    --------
    >>> mesh = Mesh(data=2, tensor=2, pipeline=2)
    >>> mesh.size
    8
    >>> mesh.coordinate(5)
    Coordinate(data=0, tensor=1, pipeline=1)
    >>> mesh.members(5, "data")
    (5, 7)
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self):
        for axis in AXES:
            number = getattr(self, axis)
            if isinstance(number, bool) or not hasattr(number, "__index__") or number < 1:
                raise ValueError(f"Mesh: {axis} must be a whole number from 1 up, not {number!r}.")

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.data * self.tensor * self.pipeline

    def coordinate(self, index: int) -> Coordinate:
        """Where the rank with this number stands."""
        self._check(index)
        rest, tensor = divmod(index, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(data, tensor, pipeline)

    def index(self, data: int = 0, tensor: int = 0, pipeline: int = 0) -> int:
        """The number of the rank that stands there."""
        for axis, place in zip(AXES, (data, tensor, pipeline), strict=True):
            if not 0 <= place < getattr(self, axis):
                most = getattr(self, axis) - 1
                raise ValueError(f"{axis} coordinate {place} is outside this mesh: 0 to {most}.")
        return (pipeline * self.data + data) * self.tensor + tensor

    def members(self, index: int, axis: str) -> tuple[int, ...]:
        """The ranks on the line along `axis` through one rank, in the order of that axis.

        Parameters
        ----------
        index : int
        axis : str
            "data", "tensor", "pipeline", or "world" for all ranks.
        """
        self._check(index)
        if axis == "world":
            return tuple(range(self.size))
        if axis not in AXES:
            raise ValueError(f"There is no axis {axis!r}: choose data, tensor, pipeline or world.")
        here = self.coordinate(index)
        line = range(getattr(self, axis))
        return tuple(self.index(**here._replace(**{axis: place})._asdict()) for place in line)

    def _check(self, index):
        if not 0 <= index < self.size:
            raise ValueError(f"There is no rank {index}: this mesh has ranks 0 to {self.size - 1}.")
