"""What every side of `gpt_tokens` trains: network, settings, and lines of the flight log."""

import numpy as np

from helpers.datasets import text
from helpers.nn import GPT, Adam

NETWORK = GPT(vocabulary=len(text.ALPHABET), context=text.LENGTH, width=64, heads=4, layers=2)
OPTIMISER = Adam(0.001, betas=(0.9, 0.95), weight_decay=0.01)
LINES = 64
TOKENS = LINES * text.LENGTH


def lines(index, size):
    """One rank's part of the batch, the same for all sides.

    Parameters
    ----------
    index, size : int
        Number of the rank, and of all ranks.

    Returns
    -------
    tokens, targets : ndarray, int64, (LINES / size, 32)
    count : int
        Targets of the whole batch that count.
    """
    codes = text.load_log(month=1).train.codes[:LINES]
    tokens, targets = (array.astype(np.int64) for array in text.inputs_and_targets(codes))
    part = slice(index * LINES // size, (index + 1) * LINES // size)
    return tokens[part], targets[part], NETWORK.counted(targets)
