"""Peer "ddp": one training step of PyTorch's DistributedDataParallel over gloo."""

import os
import sys
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.peers.timing import LAYERS, LEARNING_RATE, batch, median_step, report


def main(index, interface, _, meet):
    """Measure the step as rank `index` of two."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=int(index), world_size=2)
    layers = []
    for inputs, outputs in pairwise(LAYERS):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    # The buckets hold the gradients themselves: the quickest way that DDP offers.
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(*layers[:-1]), gradient_as_bucket_view=True
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loss = nn.BCEWithLogitsLoss()
    x, y = map(torch.from_numpy, batch(int(index), 2))

    def step():
        optimiser.zero_grad()
        loss(model(x)[:, 0], y).backward()
        optimiser.step()

    seconds = median_step(step)
    dist.destroy_process_group()
    report(seconds)
    # Now and then a thread of PyTorch that is still there aborts the interpreter at its end.
    os._exit(0)


main(*sys.argv[1:])
