"""Lightning, protected: one run at a time, and a checkpoint when it is asked to stop.

    python examples/frameworks/lightning_train.py
    python examples/frameworks/lightning_train.py --devices 2    # ddp, two processes on the CPU

Ctrl-C, or `kill`: the step is finished, and the next start goes on there.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from orchard_infra import (
    EnvironmentLockedError,
    InfrastructureManager,
    SignalStop,
    managed_environment,
    shield_worker,
)
from orchard_infra.integrations.lightning import StopCallback


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.layer(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def on_train_start(self) -> None:
        self.first_epoch = self.current_epoch
        print(f"rank {self.global_rank} goes on from step {self.global_step}", flush=True)

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == self.first_epoch:
            print(f"rank {self.global_rank} (pid {os.getpid()}) is in training", flush=True)


def points(workers: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    inputs = torch.randn(64, 8)
    dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    # A Ctrl-C goes to the workers as well: shielded, they live until the step is finished.
    return DataLoader(
        dataset,
        batch_size=16,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=shield_worker,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader")
    arguments = parser.parse_args()
    # A signal sets a flag. If no step has ended 60 s later, it is raised.
    manager = InfrastructureManager(stopper=SignalStop("flag", deadline=60.0))
    try:
        with managed_environment("lightning", manager=manager) as env:
            stop = StopCallback(env, Path("runs", "lightning", "stopped.ckpt"))
            trainer = Trainer(
                accelerator="cpu",
                devices=arguments.devices,
                strategy="ddp" if arguments.devices > 1 else "auto",
                max_epochs=-1,
                max_steps=arguments.steps,
                callbacks=[stop],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(Line(), points(arguments.workers), ckpt_path=stop.resume_from)
            if trainer.is_global_zero:
                if not stop.stopped:
                    stop.checkpoint.unlink(missing_ok=True)
                how = f"stopped ({env.stop_requested.reason})" if stop.stopped else "finished"
                print(f"{how} after {trainer.global_step} steps")
    except EnvironmentLockedError as error:
        print(error, file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main())
