"""A run whose process group is signalled finishes its step and saves its checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from support import require_module, run_command, wait_until

TRAIN = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader
from orchard_infra import InfrastructureManager, SignalStop, managed_environment
from orchard_infra.stopping.shielding import shield_worker

class Digits(torch.utils.data.Dataset):
    def __len__(self):
        return 100_000
    def __getitem__(self, index):
        time.sleep(0.001)
        return index

def train():
    manager = InfrastructureManager(
        stopper=SignalStop(mode="flag"), sanitizer=None, flusher=None, cleaner=None
    )
    loader = DataLoader(Digits(), batch_size=4, num_workers=2, worker_init_fn=shield_worker,
                        multiprocessing_context="fork")
    with managed_environment("digits", manager=manager) as env:
        steps = 0
        for batch in loader:
            steps += 1
            if steps == 2:  # both workers are at work
                print("training", flush=True)
            if env.stop_requested and not steps % 10:  # the end of an epoch, so to speak
                break
        print("saved at step", steps, "of", env.stop_requested.reason, flush=True)

train()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "signum"),
    [
        ("", signal.SIGTERM),
        ("", signal.SIGINT),
        ("", signal.SIGHUP),
        ("torchrun", signal.SIGTERM),
    ],
)
def test_a_signal_to_the_whole_group_does_not_cost_the_checkpoint(
    tmp_path: Path, launcher: str, signum: signal.Signals
) -> None:
    """torchrun signals the group of each of its ranks."""
    require_module("torch")
    (tmp_path / "train.py").write_text(TRAIN)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    run = run_command(
        tmp_path,
        [sys.executable, *(torchrun if launcher else []), "train.py"],
        start_new_session=True,
    )
    run.wait_for("training")

    os.killpg(run.pid, signum)

    wait_until(lambda: "saved at step" in run.output or run.poll() is not None, what=run.transcript)
    run.finish()
    assert f"of {signum.name}" in run.wait_for("saved at step"), run.transcript()
    assert "DataLoader worker" not in run.error_output
