"""What `slurm_endings.py` has Slurm run as ``train.py``: it writes down when what happens to it.

A checkpoint takes a second. `orchard_infra` is used as in examples/slurm/train.py.
"""

import json
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

SAVING = 1.0  # seconds
RANK = os.environ.get("SLURM_PROCID", "0")
CHECKPOINT = Path("checkpoint")
STEPS = int(os.environ.get("STEPS", "1000000"))

if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
    # The nodes are one machine. Make hosts of them: the file system is one that all of them share.
    from orchard_infra.locks import file

    file._stays = lambda device: True
    os.environ["ORCHARD_INFRA_DIR"] += os.environ["SLURM_NODEID"]


def note(event: str, **more: object) -> None:
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    line = {"event": event, "at": time.time(), "start": start, "rank": RANK, **more}
    # One write each: two elements of an array append to the same file.
    with open(f"events-{RANK}", "a", encoding="utf-8") as events:
        events.write(json.dumps(line) + "\n")


def main() -> int:
    note("started")
    config = EnvironmentConfig("train", lock_file_path="train.lock")
    manager = InfrastructureManager(stopper=SignalStop(mode="flag", deadline=20.0))
    with managed_environment(config, manager=manager, timeout=60.0) as env:
        done = int(CHECKPOINT.read_text()) if CHECKPOINT.exists() else 0
        note("training", step=done)
        while done < STEPS and not env.stop_requested:
            time.sleep(0.02)
            done += 1
        if env.stop_requested:
            note("asked")
        if env.is_leader:
            time.sleep(SAVING)
            CHECKPOINT.with_suffix(".tmp").write_text(str(done))
            os.replace(CHECKPOINT.with_suffix(".tmp"), CHECKPOINT)
            note("saved", step=done)
    note("released")
    stop = env.stop_requested
    return 128 + stop.signal if stop and stop.signal else 0


if __name__ == "__main__":
    sys.exit(main())
