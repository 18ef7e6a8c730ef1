"""What the studies of data parallelism have in common: rows, network, shards and the measure."""

from __future__ import annotations

import numpy as np

from helpers.datasets import load_table
from helpers.nn import MLP

MONTHS = tuple(range(1, 7))
"""Half of the year: the notebook's two workers hold it within the memory of a small machine."""
RANKS = 4
NETWORK = MLP((36, 64, 1))
MEASURED_ROWS = 16_384
DTYPE = np.float32


class Rows:
    """Flights to learn from, and a fixed sample of them on which the loss is measured.

    The held-out days (`test`) are not learnt from. Their loss wobbles by 0.01 from step to step
    while that of the training rows falls steadily, so effects on optimisation are shown on these.
    """

    def __init__(self):
        table = load_table("late", month=MONTHS)
        train, test = table.train, table.test
        self.X, self.y = train.X.astype(DTYPE), train.y.astype(DTYPE)
        self.test = test.X.astype(DTYPE), test.y.astype(DTYPE)
        chosen = np.random.default_rng(2013).permutation(len(self.y))[:MEASURED_ROWS]
        self.sample = self.X[chosen], self.y[chosen]
        self._hour = train.X[:, train.names.index("scheduled hour")]

    def shards(self, how: str, seed: int) -> list[np.ndarray]:
        """The numbers of each rank's rows: "random", sorted by "hour", or sorted by "label"."""
        mixed = np.random.default_rng([seed, 1]).permutation(len(self.y))
        keys = {"random": np.arange(len(mixed)), "hour": self._hour[mixed], "label": self.y[mixed]}
        return np.array_split(mixed[np.argsort(keys[how], kind="stable")], RANKS)

    def losses(self, network: MLP, parameters) -> dict[str, float]:
        """The mean loss of the sample and of the held-out days; NaN once training diverged."""
        with np.errstate(over="ignore", invalid="ignore"):
            return {
                "train_loss": network.loss_at(parameters, *self.sample),
                "test_loss": network.loss_at(parameters, *self.test),
            }
