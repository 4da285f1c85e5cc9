"""Data-parallel training in several processes on the CPU (gloo), under one lock.

    torchrun --standalone --nproc-per-node 4 examples/ddp.py
    orchard-infra run -p ddp -- torchrun --standalone --nproc-per-node 4 examples/ddp.py

Rank 0 takes the lock, and the other ranks follow it. In the second form the wrapper takes it, and
stops every rank however torchrun ends. A signal to any rank, or Ctrl-C, ends all of them at the
same step, after a checkpoint. The next start goes on there, and so does an elastic restart
(--max-restarts).
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from orchard_infra import (
    EnvironmentLockedError,
    InfrastructureManager,
    SignalStop,
    managed_environment,
    shield_worker,
)

SAVE_EVERY = 100  # steps


class Training:
    """Fit a line to noise-free points, of which each rank has its share."""

    def __init__(self, checkpoint: Path, workers: int) -> None:
        torch.manual_seed(0)
        inputs = torch.randn(64, 8)
        points = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
        self.sampler = DistributedSampler[tuple[torch.Tensor, ...]](points)
        self.loader = DataLoader(
            points,
            batch_size=16,
            sampler=self.sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=shield_worker,  # they outlive a Ctrl-C, until the step is finished
        )
        self.model = DistributedDataParallel(torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.checkpoint = checkpoint
        self.step = 0
        self.loss = torch.zeros(())

    def resume(self) -> None:
        """Every rank reads the same file, before rank 0 may write to it."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        dist.barrier()

    def save(self) -> None:
        """Replace the checkpoint in one step: a rank may be killed in the middle of it."""
        if dist.get_rank() != 0:
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        half_written = self.checkpoint.with_suffix(".tmp")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, half_written)
        os.replace(half_written, self.checkpoint)

    def run(self, steps: int, agree_to_stop: Callable[[], bool]) -> bool:
        """Train until ``steps`` are taken, or the ranks agree to stop; whether it is finished."""
        rank, first = dist.get_rank(), self.step
        while True:
            self.sampler.set_epoch(self.step)
            for inputs, targets in self.loader:
                # Collective: all ranks leave at the same step, whichever was asked to stop.
                if agree_to_stop():
                    self.save()
                    return False
                if self.step >= steps:
                    return True
                self.optimizer.zero_grad()
                self.loss = torch.nn.functional.mse_loss(self.model(inputs), targets)
                self.loss.backward()
                self.optimizer.step()
                if self.step == first:
                    print(f"rank {rank} (pid {os.getpid()}) has taken its first step", flush=True)
                self.step += 1
                if self.step % SAVE_EVERY == 0:
                    self.save()

    def mean_loss(self) -> float:
        loss = self.loss.detach().clone()
        dist.all_reduce(loss)
        return float(loss) / dist.get_world_size()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", default="ddp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader, for each rank")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        print("start it with: torchrun --nproc-per-node 4 examples/ddp.py", file=sys.stderr)
        return 2
    # A rank that hangs in a collective for 10 s after a signal, because another one is gone, is
    # ended; torchrun would wait for it for 30 s.
    manager = InfrastructureManager(stopper=SignalStop("flag", blocked_limit=10.0))
    try:
        with managed_environment(arguments.project, manager=manager) as env:
            # Within the environment: a job that is refused does not wait for its ranks to meet.
            dist.init_process_group("gloo")
            try:
                checkpoint = Path("runs", arguments.project, "ddp.pt")
                training = Training(checkpoint, arguments.workers)
                training.resume()
                finished = training.run(arguments.steps, env.agree_to_stop)
                loss = training.mean_loss()
            finally:
                dist.destroy_process_group()
            if env.run.rank == 0 or env.joined:
                if finished:
                    checkpoint.unlink(missing_ok=True)
                how = "finished" if finished else f"stopped: {env.stop_requested.reason}"
                print(f"{how} after {training.step} steps", flush=True)
                print(f"joined: {env.joined}, loss {loss:.4f}", flush=True)
    except EnvironmentLockedError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    # A stop is no failure to torchrun: one would be started again.
    return 0


if __name__ == "__main__":
    sys.exit(main())
