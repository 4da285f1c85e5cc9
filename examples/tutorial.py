"""The training run of the tutorial: it counts steps, saves its state when it is asked to stop, and
goes on from there when it is started again.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from orchard_infra import (
    EnvironmentLockedError,
    InfrastructureManager,
    SignalStop,
    managed_environment,
)

CHECKPOINT = Path("checkpoint.json")


def load() -> int:
    return json.loads(CHECKPOINT.read_text("utf-8"))["step"] if CHECKPOINT.exists() else 0


def save(step: int, scratch: Path) -> None:
    half_written = scratch / "checkpoint.json"  # goes away with the run if it is broken off
    half_written.write_text(json.dumps({"step": step}), "utf-8")
    os.replace(half_written, CHECKPOINT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.01, help="how long a step takes")
    arguments = parser.parse_args()

    manager = InfrastructureManager(stopper=SignalStop(mode="flag"))
    try:
        with managed_environment("tutorial", manager=manager) as env:
            step = load()
            print(f"pid {os.getpid()} begins at step {step}", flush=True)
            while step < arguments.steps:
                time.sleep(arguments.seconds)  # a training step
                step += 1
                if env.stop_requested:
                    print(f"asked to stop: {env.stop_requested.reason}")
                    break
            env.ensure_held()  # nobody else writes the checkpoint
            save(step, env.tmp_dir)
            print(f"saved step {step}")
    except EnvironmentLockedError:  # the log has said who holds it, and what can be done
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main())
