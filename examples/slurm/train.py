"""A training loop that a scheduler may stop at any time. It goes on from its checkpoint.

    sbatch examples/slurm/train.sbatch      # one process
    sbatch examples/slurm/ranks.sbatch      # one rank on each of two nodes

It needs no torch, so that it can be tried anywhere. What is worth copying is the ``with`` block,
and what surrounds ``env.stop_requested``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

from orchard_infra import (
    EnvironmentConfig,
    InfrastructureManager,
    SignalStop,
    managed_environment,
)


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    config = EnvironmentConfig(
        options.project,
        # On a file system that all nodes see: two jobs may run on different ones.
        lock_file_path=options.output / "train.lock",
    )
    # A signal only sets a flag. A loop that has not looked at it after 20 s is interrupted: Slurm
    # sends SIGKILL after KillWait, which is 30 s unless your site has changed it.
    manager = InfrastructureManager(stopper=SignalStop(mode="flag", deadline=20.0))
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.output / "checkpoint.json"
    with managed_environment(config, manager=manager, timeout=options.wait) as env:
        done = load(checkpoint)
        print(f"training from step {done}", flush=True)
        while done < options.steps and not env.stop_requested:
            time.sleep(options.step_time)  # one step of the training
            done += 1
            if done % 100 == 0 and env.is_leader:
                save(checkpoint, done)
        if env.is_leader:
            save(checkpoint, done)
            print(f"saved after step {done}", flush=True)
    stop = env.stop_requested
    if done < options.steps and stop is not None:
        print(f"stopped by {stop.reason}: start again to go on")
        return 128 + stop.signal if stop.signal else 1
    return 0


def load(checkpoint: Path) -> int:
    """How many steps are done."""
    if not checkpoint.exists():
        return 0
    done: int = json.loads(checkpoint.read_text("utf-8"))["done"]
    return done


def save(checkpoint: Path, done: int) -> None:
    """Write the checkpoint so that there is always a whole one, whenever the node fails."""
    half_written = checkpoint.with_suffix(".tmp")
    with open(half_written, "w", encoding="utf-8") as file:
        json.dump({"done": done}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half_written, checkpoint)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count steps, one run of a project at a time.")
    parser.add_argument("--project", default="slurm-train", help="one run of it at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/slurm-train"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--step-time", type=float, default=0.1, metavar="SECONDS")
    parser.add_argument(
        "--wait", type=float, default=60.0, metavar="SECONDS", help="for a run that holds the lock"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
