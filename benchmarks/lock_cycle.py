"""A lock-only cycle: taken and given back, uncontended, against portalocker and filelock.

"FileLock" checks that the locked file is the one that the path names, writes a record that was
made before, and removes the file. "FileLock + RunRegistry" makes the record, enters the run into
the registry and takes it out again as well. The others lock a file; TemporaryFileLock checks and
removes it, too.
"""

from __future__ import annotations

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
from orchard_infra.locks.acquiring import acquire
from orchard_infra.locks.base import LockKey
from orchard_infra.runs.record import describe_this_run

PEER = "portalocker.TemporaryFileLock"
LOCK = "FileLock"
PIECES = "FileLock + RunRegistry"
WHOLE = "managed_environment, lock only"


def measure(quick: bool, directory: Path) -> Outcome:
    manager = InfrastructureManager(sanitizer=None, flusher=None, cleaner=None, stopper=None)
    cfg = EnvironmentConfig("whole", lock_file_path=directory / "whole.lock")
    locker, registry, path = FileLock(), RunRegistry(), directory / "pieces.lock"
    key = LockKey("pieces", path)
    this = describe_this_run("lock", lock=str(path))

    def lock() -> None:
        acquire(locker, key, this).release()

    def pieces() -> None:
        record = describe_this_run("pieces", lock=str(path))
        registration = registry.register(record)
        lease = acquire(locker, key, record)
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
        LOCK: lock,
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
        Goal(f"{name}, against {PEER}", ratio(samples, name, PEER), limit)
        for name, limit in ((LOCK, 1.5), (WHOLE, 4))
    ]
    return outcome


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
