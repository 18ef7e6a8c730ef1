"""Peer "gloo": torch.distributed's all_reduce on CPU tensors, in place."""

import os
import sys

import torch
import torch.distributed as dist

from benchmarks.peers.timing import SIZES, check_sum, median_call, report


def main(size, index, interface, _, meet):
    """Measure one size as rank `index` of two."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=int(index), world_size=2)
    length, calls, blocks = SIZES[size]
    tensor = torch.full((length,), float(dist.get_rank() + 1))
    dist.all_reduce(tensor)
    check_sum(tensor)
    tensor.zero_()
    seconds = median_call(lambda: dist.all_reduce(tensor), dist.barrier, calls, blocks)
    dist.destroy_process_group()
    report(seconds)


main(*sys.argv[1:])
