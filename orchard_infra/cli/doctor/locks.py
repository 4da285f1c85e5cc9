"""Whether a lock can be made where a run would make it, and whether it excludes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from orchard_infra.cli.doctor.base import (
    CHILD_TIMEOUT,
    Level,
    Setup,
    Verdict,
    removed_afterwards,
)
from orchard_infra.cli.doctor.file_systems import file_system_at, read_mountinfo
from orchard_infra.errors import InfrastructureError
from orchard_infra.locks.file import refuse_foreign
from orchard_infra.runs.record import RunState, leader_is_dead, read_record
from orchard_infra.runs.registry import RunRegistry
from orchard_infra.system import files
from orchard_infra.system.flock import lock_descriptor, unlock_descriptor

_ANOTHER = "Choose another lock_file_path"
_ELSEWHERE = f"Set {files.RUNTIME_DIR_VARIABLE} to a directory of your own"


def check_lock_directory(setup: Setup) -> Verdict:
    directory = setup.lock_directory
    advice = _ELSEWHERE if setup.lock_file is None else _ANOTHER
    with removed_afterwards(directory):
        if setup.lock_file is None:
            try:
                files.private_directory(files.runtime_dir(setup.environ))
            except InfrastructureError as error:
                return Level.PROBLEM, str(error), None
        failure = _try_a_lock(directory)
        if failure is not None:
            return Level.PROBLEM, failure, advice
        found = os.stat(directory)
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o022 and not mode & stat.S_ISVTX:
        return (
            Level.WARNING,
            f"others may remove your locks from {directory} (mode {mode:04o})",
            f"chmod go-w {directory}",
        )
    if mode & 0o022:
        return Level.OK, f"{directory} is everybody's, but others cannot remove your locks"
    owner = files.owner_name(found.st_uid) if hasattr(os, "geteuid") else "you"
    mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    return Level.OK, f"{directory} is {'yours' if mine else f'of {owner}'} (mode {mode:04o})"


def check_flock(setup: Setup) -> Verdict:
    directory = setup.lock_directory
    advice = "Choose a lock_file_path on another file system"
    excludes: list[bool] = []
    with removed_afterwards(directory):
        failure = _try_a_lock(directory, lambda path, fd: excludes.extend(_exclusion(path, fd)))
        file_system = file_system_at(directory, read_mountinfo())
    if failure is not None:
        return Level.PROBLEM, failure, advice
    what = f"flock(2) on {file_system.name} at {directory}"
    refused_while_held, taken_once_free = excludes
    if not refused_while_held:
        return Level.PROBLEM, f"{what} does not exclude another process", advice
    if not taken_once_free:
        return Level.PROBLEM, f"{what} stays locked after a release", advice
    return file_system.judge()


def check_lock_file(setup: Setup) -> Verdict:
    path = setup.lock_file
    assert path is not None
    for run in RunRegistry().runs():
        if run.record.lock == str(path) and run.state is RunState.RUNNING:
            return Level.OK, f"held by {run.record.describe()}"
    try:
        # As a run opens it: a file that cannot be written to is no lock.
        fd = files.open_existing(path, os.O_RDWR)
    except FileNotFoundError:
        return _judge_missing(path)
    except InfrastructureError as error:
        return Level.PROBLEM, str(error), _ANOTHER
    except OSError as error:
        return Level.PROBLEM, f"{path} cannot be opened: {error.strerror}", _ANOTHER
    try:
        return _judge_existing(path, fd)
    finally:
        os.close(fd)


def _judge_missing(path: Path) -> Verdict:
    """Whether a run could make its lock there: found out by making another file beside it."""
    with removed_afterwards(path.parent):
        failure = _try_a_lock(path.parent)
    if failure is not None:
        return Level.PROBLEM, failure, _ANOTHER
    return Level.OK, f"{path} is free"


def _judge_existing(path: Path, fd: int) -> Verdict:
    found = read_record(fd)
    if found is not None:
        record, _ = found
        if leader_is_dead(record):
            return (
                Level.WARNING,
                f"left by a run that is dead ({record.describe()})",
                "orchard-infra clean; the next run takes it over",
            )
        return Level.OK, f"held, or left, by {record.describe()}"
    try:
        refuse_foreign(fd, path)
    except InfrastructureError as error:
        return Level.PROBLEM, str(error), None
    return Level.OK, f"{path} is free"


def _try_a_lock(
    directory: Path, use: Callable[[Path, int], object] = lambda path, fd: None
) -> str | None:
    """Make, write, lock and remove a file, as a run does with its lock, under another name.

    No lock of a run is taken, because a run that starts in that very instant would find it held.
    ``use`` is called with the file while it is locked. Returns why it cannot be done, or None.
    """
    path = directory / f".doctor-{os.urandom(6).hex()}"
    fd = -1
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"cannot make {directory}: {error.strerror}"
        try:
            fd = files.create_exclusive(path, 0o600)
            # A full file system may still make files, and has no room for a record.
            files.write_whole(fd, b"{}\n")
            os.fsync(fd)
        except OSError as error:
            return f"no lock can be made in {directory}: {error.strerror}"
        try:
            lock_descriptor(fd)
        except OSError as error:
            name = file_system_at(directory, read_mountinfo()).name
            return f"{name} at {directory} has no working flock(2): {error.strerror}"
        use(path, fd)
    finally:
        if fd >= 0:
            os.close(fd)
            path.unlink(missing_ok=True)
    return None


def _exclusion(path: Path, fd: int) -> tuple[bool, bool]:
    """Whether another process is refused a lock that we hold, and gets it once it is free."""
    with subprocess.Popen(
        [sys.executable, "-c", _LOCKER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as other:
        assert other.stdout is not None
        try:
            refused = other.stdout.readline() == b"refused\n"
            unlock_descriptor(fd)
            answer, _ = other.communicate(b"\n", timeout=CHILD_TIMEOUT)
        except BaseException:
            other.kill()
            raise
    return refused, answer == b"taken\n"


_LOCKER = """
import os, sys
from orchard_infra.system.flock import lock_descriptor
fd = os.open(sys.argv[1], os.O_RDWR)
for _ in range(2):
    print("taken" if lock_descriptor(fd) else "refused", flush=True)
    sys.stdin.readline()
"""
