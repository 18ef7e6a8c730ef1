"""Peers "torch" and "ddp": one training step of the small GPT in PyTorch, alone or of two ranks."""

import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.peers.gpt_data import NETWORK, OPTIMISER, lines
from benchmarks.peers.gpt_model import Model
from benchmarks.peers.timing import median_step, report


def main(size, index, interface, _, meet):
    """Measure the step as rank `index` of one or two."""
    index, size = int(index), int(size)
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.set_num_threads(1)
    model = Model(NETWORK, NETWORK.initialise(seed=0, dtype=np.float32))
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=index, world_size=size)
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Fused: the quickest of the ways that PyTorch offers.
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMISER.rate,
        betas=OPTIMISER.betas,
        weight_decay=OPTIMISER.weight_decay,
        fused=True,
    )
    tokens, targets, count = lines(index, size)
    tokens, targets = torch.from_numpy(tokens), torch.from_numpy(targets)

    def step():
        optimiser.zero_grad()
        # DDP takes the mean over the ranks, so the sum is divided by the mean of their counts.
        model(tokens, targets, count / size).backward()
        optimiser.step()

    seconds = median_step(step)
    if size > 1:
        dist.destroy_process_group()
    report(seconds)
    # Now and then a thread of PyTorch that is still there aborts the interpreter at its end.
    os._exit(0)


main(*sys.argv[1:])
