"""A lock-only cycle: taken and given back, uncontended, against portalocker and filelock.

Ours makes and writes the run's record, enters the run into the registry, says twice how far it
is, checks that the locked file is the one that the path names, and removes both files. The
others lock a file; TemporaryFileLock checks and removes it, too.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import filelock
import portalocker
from _harness import Goal, Outcome, main, ratio, take_turns, timed

from orchard_infra import (
    EnvironmentConfig,
    FileLock,
    InfrastructureManager,
    RunRegistry,
    RunState,
    managed_environment,
)
from orchard_infra.runs.record import describe_this_run

PEER = "portalocker.TemporaryFileLock"
PIECES = "FileLock + RunRegistry"
WHOLE = "managed_environment, lock only"


def measure(quick: bool, directory: Path) -> Outcome:
    logger = logging.getLogger("Infrastructure")
    manager = InfrastructureManager(sanitizer=None, flusher=None, cleaner=None, stopper=None)
    cfg = EnvironmentConfig("whole", lock_file_path=directory / "whole.lock")
    locker, registry, path = FileLock(), RunRegistry(), directory / "pieces.lock"

    def pieces() -> None:
        record = describe_this_run("pieces", lock=str(path))
        registration = registry.register(record)
        lease = locker.acquire(path, record, clear_dead=lambda dead: (), logger=logger)
        registration.update(record, RunState.RUNNING)
        lease.verify()
        lease.release()
        registration.close()

    def whole() -> None:
        with managed_environment(cfg, manager=manager):
            pass

    def temporary_file_lock() -> None:
        with portalocker.TemporaryFileLock(str(directory / "temporary.lock"), timeout=0):
            pass

    def portalocker_lock() -> None:
        with portalocker.Lock(str(directory / "portalocker.lock"), timeout=0):
            pass

    def file_lock() -> None:
        with filelock.FileLock(str(directory / "filelock.lock"), timeout=0):
            pass

    work = {
        PEER: temporary_file_lock,
        "portalocker.Lock": portalocker_lock,
        "filelock.FileLock": file_lock,
        PIECES: pieces,
        WHOLE: whole,
    }
    times = 20 if quick else 100
    samples = take_turns(
        {name: timed(cycle, times) for name, cycle in work.items()}, rounds=5 if quick else 40
    )
    outcome = Outcome(base=PEER)
    outcome.add(samples, "us", 1e6)
    outcome.goals = [
        Goal(f"{name}, against {PEER}", ratio(samples, name, PEER), 3) for name in (PIECES, WHOLE)
    ]
    return outcome


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
