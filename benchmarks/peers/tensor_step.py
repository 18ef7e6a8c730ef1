"""Peer "torch": an MLP block with PyTorch's tensor parallelism over gloo."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from benchmarks.peers.timing import WIDTH, median_step, positions, report


def main(index, interface, _, meet):
    """Measure forward and backward as rank `index` of two."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=int(index), world_size=2)
    up, down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
    block = nn.Sequential(up, nn.GELU(approximate="tanh"), down)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(block, init_device_mesh("cpu", (2,)), plan)
    x, dy = map(torch.from_numpy, positions())
    x.requires_grad_()

    def step():
        block.zero_grad()
        x.grad = None
        block(x).backward(dy)

    seconds = median_step(step)
    dist.destroy_process_group()
    report(seconds)
    # Now and then a thread of PyTorch that is still there aborts the interpreter at its end.
    os._exit(0)


main(*sys.argv[1:])
