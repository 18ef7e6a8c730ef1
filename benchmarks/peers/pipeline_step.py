"""Peer "torch": one training step of torch.distributed.pipelining over gloo."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from benchmarks.peers.timing import (
    LEARNING_RATE,
    MICROBATCHES,
    PIPELINE_LAYERS,
    PIPELINE_WIDTH,
    median_step,
    pipeline_batch,
    report,
)

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


class Shift(nn.Module):
    """Adds a learnt vector to each row."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(PIPELINE_WIDTH))

    def forward(self, x):
        return x + self.shift


def main(schedule, index, interface, _, meet):
    """Measure the step as rank `index` of two."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.set_num_threads(1)
    torch.manual_seed(0)
    index = int(index)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=index, world_size=2)
    layers = [Shift()] if index == 0 else []
    for _ in range(PIPELINE_LAYERS // 2):
        layers += [nn.Linear(PIPELINE_WIDTH, PIPELINE_WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers)
    optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    stage = PipelineStage(model, index, 2, torch.device("cpu"))
    pipeline = SCHEDULES[schedule](stage, MICROBATCHES, loss_fn=nn.MSELoss())
    x, y = map(torch.from_numpy, pipeline_batch())

    def step():
        optimiser.zero_grad()
        if index == 0:
            pipeline.step(x)
        else:
            pipeline.step(target=y)
        optimiser.step()

    seconds = median_step(step)
    dist.destroy_process_group()
    report(seconds)
    # Now and then a thread of PyTorch that is still there aborts the interpreter at its end.
    os._exit(0)


main(*sys.argv[1:])
