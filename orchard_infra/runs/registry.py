"""Runs: the record that says who a run is, and the registry that tells live runs from dead ones.

Every run, a waiting one too, has a record file in the registry's directory, which it holds open
and locked for as long as it lives. The kernel drops that lock when the last process with the
open file description has gone, so:

* lock free: the run is *dead*, whatever else is said;
* lock held, leader alive: *running* or *waiting*;
* lock held, leader dead: forked children of the run still live; there are *survivors*.

Children started by exec do not inherit the descriptor. They carry the run's id in their
environment instead (`RUN_ID_VARIABLE`); setting that to the empty string opts a daemon out.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from pathlib import Path

import attrs

from orchard_infra.errors import InfrastructureError
from orchard_infra.runs.record import (
    RunRecord,
    RunState,
    _is_id,
    _leader_lives,
    from_json,
    leader_is_dead,
    read_record,
    to_json,
)
from orchard_infra.system import files
from orchard_infra.system.flock import lock_descriptor, unlock_descriptor

_SUFFIX = ".run"


@attrs.frozen
class RegisteredRun:
    """A run as the registry has it: who, and in which state."""

    record: RunRecord
    state: RunState
    file: tuple[int, int] = attrs.field(default=(0, 0), repr=False)  # device and inode

    @property
    def file_name(self) -> str:
        """What the record's file is called in the registry's directory."""
        return f"{self.record.run_id}{_SUFFIX}"

    @property
    def is_live(self) -> bool:
        """Running or waiting: sacred, with everything that belongs to it."""
        return self.state in (RunState.RUNNING, RunState.WAITING)


@attrs.define
class Registration:
    """The place of a live run in the registry; this process holds it until `close`."""

    record: RunRecord
    path: Path
    _fd: int
    _file: tuple[int, int]  # device and inode

    def update(self, record: RunRecord, state: RunState) -> None:
        """Say something new of the run. One short write: a reader sees the old or the new.

        Raises:
            InfrastructureError: Nobody could read that, or the descriptor was closed.
        """
        files.write_whole(self._descriptor(), _encode(record, state))
        self.record = record

    def touch(self) -> None:
        """Keep cleaners of old files away."""
        os.utime(self._descriptor())

    def fileno(self) -> int:
        """The descriptor that is locked, for a child that is to keep the run on record."""
        return self._descriptor()

    def close(self) -> None:
        """Leave the registry. In a forked child only the descriptor goes, not the record."""
        if self._fd < 0:
            return
        try:
            if os.getpid() == self.record.pid and _identity(os.lstat(self.path)) == self._file:
                _stay_known(self.path.parent)  # before the record goes: there is no moment between
                self.path.unlink()
        except FileNotFoundError:
            pass
        finally:
            if self._is_open():
                os.close(self._fd)
            self._fd = -1

    def _descriptor(self) -> int:
        if not self._is_open():
            raise InfrastructureError(f"the descriptor of the run's record {self.path} was closed")
        return self._fd

    def _is_open(self) -> bool:
        """A program may close every descriptor; then the number is soon some other file's."""
        try:
            return _identity(os.fstat(self._fd)) == self._file
        except OSError:
            return False


def _default_directory() -> Path:
    return files.runtime_dir() / "runs"


@attrs.frozen
class RunRegistry:
    """All runs of this user on this machine, in ``directory`` (the default is the runtime
    directory's).
    """

    directory: Path = attrs.field(factory=_default_directory, converter=Path)

    def register(self, record: RunRecord) -> Registration:
        """Enter a run as waiting.

        The file gets its name only once it is locked: who sees it sees a live run.

        Raises:
            InfrastructureError: The directory cannot be used, or the record not be read back.
        """
        data = _encode(record, RunState.WAITING)
        files.private_directory(self.directory.parent)
        files.private_directory(self.directory)
        path = self.directory / f"{record.run_id}{_SUFFIX}"
        while True:
            unnamed = self.directory / f".{record.run_id}.{os.urandom(4).hex()}"
            try:
                fd = files.create_exclusive(unnamed, 0o600)
            except OSError as error:
                raise InfrastructureError(
                    f"cannot write to {self.directory}: {error.strerror}. "
                    f"Set {files.RUNTIME_DIR_VARIABLE} to a directory that can be written to"
                ) from error
            try:
                if not lock_descriptor(fd):
                    raise FileNotFoundError  # soon: somebody has locked it, to collect it
                files.write_whole(fd, data)
                unnamed.rename(path)
            except FileNotFoundError:
                os.close(fd)  # collected before it was locked: once more
            except OSError as error:
                os.close(fd)
                unnamed.unlink(missing_ok=True)
                raise InfrastructureError(
                    f"cannot write the run's record to {path}: {error.strerror}"
                ) from error
            except BaseException:
                os.close(fd)
                unnamed.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise
            else:
                return Registration(record, path, fd, _identity(os.fstat(fd)))

    def runs(self, *, without: str | None = None) -> tuple[RegisteredRun, ...]:
        """Every run on record, the oldest first; one can be left out by its id."""
        own = f"{without}{_SUFFIX}"
        paths = (path for path in self._paths() if path.name.endswith(_SUFFIX))
        found = (self._look(path) for path in paths if path.name != own)
        return tuple(sorted(filter(None, found), key=lambda run: run.record.started_at))

    def directory_file(self) -> tuple[int, int] | None:
        """Device and inode of the directory. Who has it open has led a run, and left it well."""
        try:
            return _identity(os.stat(self.directory))
        except OSError:
            return None

    def find(self, run_id: str) -> RegisteredRun | None:
        """The run with this id."""
        if not _is_id(run_id):
            return None
        return self._look(self.directory / f"{run_id}{_SUFFIX}")

    def lineage(self, run_id: str | None) -> tuple[str, ...]:
        """A run's id, that of the run it was started in, and so on outwards."""
        ids: list[str] = []
        while run_id and run_id not in ids:
            ids.append(run_id)
            run = self.find(run_id)
            run_id = run.record.parent if run else None
        return tuple(ids)

    def remove(self, run: RegisteredRun) -> bool:
        """Remove the record of a run that is dead; whether it was."""
        return self._remove_unlocked(self.directory / run.file_name)

    def collect_unnamed(self) -> None:
        """Remove what a crash inside `register` left: files that never got their name."""
        for path in self._paths():
            if path.name.startswith("."):
                self._remove_unlocked(path)

    def _paths(self) -> list[Path]:
        try:
            return [self.directory / name for name in os.listdir(self.directory)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InfrastructureError(
                f"cannot read {self.directory}: {error.strerror}. "
                f"Set {files.RUNTIME_DIR_VARIABLE} to a directory of your own"
            ) from error

    def _look(self, path: Path) -> RegisteredRun | None:
        try:
            fd = files.open_existing(path, os.O_RDWR)
        except (OSError, InfrastructureError):
            return None
        try:
            found = read_record(fd)
            stat = os.fstat(fd)
            if found is None or (hasattr(os, "geteuid") and stat.st_uid != os.geteuid()):
                return None
            record, state = found
            return RegisteredRun(
                record=record, state=_state(record, state, fd), file=_identity(stat)
            )
        finally:
            os.close(fd)

    def _remove_unlocked(self, path: Path) -> bool:
        try:
            fd = files.open_existing(path, os.O_RDWR)
        except (OSError, InfrastructureError):
            return False
        try:
            if not _lock_past_readers(fd, path):
                return False
            found = read_record(fd)
            if found is not None and _leader_lives(found[0]):
                return False
            path.unlink(missing_ok=True)
            return True
        except OSError:
            return False
        finally:
            os.close(fd)


class _OpenDirectory:
    """A directory, open for as long as this object is there."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._file = _identity(os.fstat(self._fd))

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            # The program may have closed every descriptor, and have another file there by now.
            if _identity(os.fstat(self._fd)) == self._file:
                os.close(self._fd)


@functools.lru_cache(maxsize=4)
def _stay_known(directory: Path) -> _OpenDirectory | None:
    """Hold the registry's directory open until this process ends.

    A program goes on after its block: it writes results, or starts the next run. By then it is in
    no live run, and to a run of the same command it would look like a twin. This descriptor tells
    it from one, see `RunRegistry.directory_file`; the kernel takes it away with the process.
    """
    try:
        return _OpenDirectory(directory)
    except OSError:
        return None


def _state(record: RunRecord, stated: RunState | None, fd: int) -> RunState:
    try:
        # Shared, so that two readers at once do not take each other for the run.
        if lock_descriptor(fd, shared=sys.platform != "win32"):
            unlock_descriptor(fd)
            # A program that closes every descriptor (a daemon does) drops its lock, and lives.
            if not _leader_lives(record):
                return RunState.DEAD
    except OSError:
        # A file system without locks: only the process itself can tell.
        return RunState.DEAD if leader_is_dead(record) else stated or RunState.RUNNING
    if leader_is_dead(record):
        return RunState.SURVIVORS
    return stated or RunState.RUNNING


def _lock_past_readers(fd: int, path: Path) -> bool:
    """Lock the file at this path exclusively, although readers hold it for an instant now and
    then; on a busy machine one may be put aside with its lock held.
    """
    for _ in range(200):
        locked = lock_descriptor(fd)
        if locked or not files.same_file(fd, path):
            return locked and files.same_file(fd, path)
        time.sleep(0.001)
    return False


def _encode(record: RunRecord, state: RunState) -> bytes:
    """A record as it is written. One that cannot be read back would hide a live run."""
    try:
        _check_readable(record)
        return to_json(record, state)
    except (TypeError, ValueError) as error:
        raise InfrastructureError(f"the run cannot be recorded: {error}") from error


@functools.lru_cache(maxsize=8)
def _check_readable(record: RunRecord) -> None:
    from_json(to_json(record, RunState.SURVIVORS))  # the state with the longest name


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
