"""Data-parallel training in two processes on the CPU (gloo), under one lock.

    orchard-infra run -p ddp -- torchrun --nproc-per-node 2 examples/ddp.py

The wrapper holds the lock, and stops every rank however torchrun ends. Each rank joins the
wrapper's run. Without the wrapper rank 0 takes the lock itself, and the other ranks follow it.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from orchard_infra import managed_environment


def train(steps: int) -> float:
    """Fit a line to noise-free points, of which each rank has its share. Returns the last loss."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    inputs = torch.randn(64, 8)[dist.get_rank() :: dist.get_world_size()]
    targets = inputs.sum(dim=1, keepdim=True)
    loss = torch.zeros(())
    for step in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        if step == 0:
            print(
                f"rank {dist.get_rank()} (pid {os.getpid()}) has taken its first step", flush=True
            )
    dist.all_reduce(loss.detach_())
    return loss.item() / dist.get_world_size()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", default="ddp")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        print("start it with: torchrun --nproc-per-node 2 examples/ddp.py", file=sys.stderr)
        return 2
    with managed_environment(arguments.project) as env:
        dist.init_process_group("gloo")
        try:
            loss = train(arguments.steps)
            if dist.get_rank() == 0:
                print(f"joined: {env.joined}, loss {loss:.4f}")
        finally:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
