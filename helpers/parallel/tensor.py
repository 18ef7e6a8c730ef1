"""Tensor parallelism: every layer of a GPT cut over the ranks of a group, equal to the whole.

A pair of matrices is cut so that nothing has to travel between them: the first by columns, the
second by rows. What each rank then holds is a part of a sum, and one all-reduce adds it up (Shoeybi
et al. 2019, "Megatron-LM: Training multi-billion parameter language models using model
parallelism", section 3). Attention is cut by heads, a perceptron by its units, the table of tokens
by the vocabulary; norms and the biases that are added after the sum lie on all ranks.

=====================  ===============================  ===============================
where                  `TensorParallel`                 `SequenceParallel`
=====================  ===============================  ===============================
enter, forward         nothing                          all-gather along the positions
leave, forward         all-reduce                       reduce-scatter
leave, backward        nothing                          all-gather
enter, backward        all-reduce                       reduce-scatter, and all-gather again
=====================  ===============================  ===============================

Between ``leave`` and the next ``enter`` all ranks would hold the same numbers. Sequence parallelism
cuts these by positions too (Korthikanti et al. 2022, "Reducing activation recomputation in large
transformer models", section 4.2.2).
"""

from __future__ import annotations

from helpers.parallel.tensor_cuts import (
    block_bytes,
    check,
    check_length,
    complete,
    cut,
    join,
    partial_names,
    shapes,
    split_names,
)
from helpers.parallel.tensor_ends import (
    embed,
    embed_grad,
    head_loss,
    head_loss_grad,
    head_loss_grad_input,
    head_scores,
)
from helpers.parallel.tensor_exchange import SequenceParallel, TensorParallel

__all__ = [
    "SequenceParallel",
    "TensorParallel",
    "block_bytes",
    "check",
    "check_length",
    "complete",
    "cut",
    "embed",
    "embed_grad",
    "head_loss",
    "head_loss_grad",
    "head_loss_grad_input",
    "head_scores",
    "join",
    "partial_names",
    "shapes",
    "split_names",
]
