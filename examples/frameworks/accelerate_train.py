"""A plain loop with accelerate, protected: one run at a time, and a checkpoint at a stop.

    accelerate launch --cpu --num_processes 2 examples/frameworks/accelerate_train.py

A signal to any process, or Ctrl-C: all stop at the same step, and the next start goes on there.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from orchard_infra import (
    EnvironmentLockedError,
    InfrastructureManager,
    SignalStop,
    managed_environment,
    shield_worker,
)


class Progress:
    """How far the training is: accelerate saves and loads it with the rest."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader")
    options = parser.parse_args()
    # A process that hangs in a collective for 10 s after a signal, because another one is gone, is
    # ended; the launcher would wait for it for 30 s.
    manager = InfrastructureManager(stopper=SignalStop("flag", blocked_limit=10.0))
    try:
        with managed_environment("accelerate", manager=manager) as env:
            # Within the environment: one that is refused does not wait for the others to meet.
            accelerator = Accelerator(cpu=True)
            inputs = torch.randn(64, 8)
            loader = DataLoader(
                TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)),
                batch_size=16,
                num_workers=options.workers,
                persistent_workers=options.workers > 0,
                worker_init_fn=shield_worker,  # they outlive a Ctrl-C, until the step is finished
            )
            model = torch.nn.Linear(8, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            progress = Progress()
            accelerator.register_for_checkpointing(progress)
            checkpoint = Path("runs", "accelerate")
            if checkpoint.exists():
                accelerator.load_state(str(checkpoint))
            first, stopped = progress.step, False
            who = f"rank {accelerator.process_index}"
            print(f"{who} goes on from step {first}", flush=True)
            while progress.step < options.steps and not stopped:
                for batch, targets in loader:
                    # Collective: all leave at the same step, whichever was asked to stop.
                    stopped = env.agree_to_stop()
                    if stopped or progress.step >= options.steps:
                        break
                    optimizer.zero_grad()
                    accelerator.backward(torch.nn.functional.mse_loss(model(batch), targets))
                    optimizer.step()
                    progress.step += 1
                    if progress.step == first + 4:
                        print(f"{who} (pid {os.getpid()}) is in training", flush=True)
            if stopped:
                save(accelerator, checkpoint)
            elif accelerator.is_main_process:
                shutil.rmtree(checkpoint, ignore_errors=True)
            how = f"stopped ({env.stop_requested.reason})" if stopped else "finished"
            accelerator.print(f"{how} after {progress.step} steps")
            accelerator.end_training()
    except EnvironmentLockedError as error:
        print(error, file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


def save(accelerator: Accelerator, checkpoint: Path) -> None:
    """Write it beside the one of before: a process may be killed meanwhile."""
    half_written = checkpoint.with_suffix(".tmp")
    accelerator.save_state(str(half_written))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(checkpoint, ignore_errors=True)
        half_written.rename(checkpoint)


if __name__ == "__main__":
    sys.exit(main())
