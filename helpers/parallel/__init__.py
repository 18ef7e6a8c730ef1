"""Ways to train on several ranks: each module is one idea."""

from helpers.parallel import (
    asynchronous,
    compression,
    data,
    least_squares,
    local,
    power_sgd,
    precision,
    sharded,
    shards,
    stragglers,
    training,
)

__all__ = [
    "asynchronous",
    "compression",
    "data",
    "least_squares",
    "local",
    "power_sgd",
    "precision",
    "sharded",
    "shards",
    "stragglers",
    "training",
]
