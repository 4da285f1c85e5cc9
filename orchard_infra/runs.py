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
import enum
import errno
import functools
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from orchard_infra import files, processes
from orchard_infra.errors import InfrastructureError
from orchard_infra.processes import ProcessIdentity

RUN_ID_VARIABLE = "ORCHARD_INFRA_RUN_ID"
RECORD_LIMIT = 65536  # bytes: what is larger is not a record
RECORD_START = b'{"orchard_infra": 1,'  # every record begins so, also a torn one
_SUFFIX = ".run"


class RunState(str, enum.Enum):
    """What the kernel says of a run."""

    RUNNING = "running"
    WAITING = "waiting"
    SURVIVORS = "survivors"
    DEAD = "dead"


@attrs.frozen
class RunRecord:
    """Who a run is. ``create_time`` is that of `ProcessIdentity`; ``started_at`` is in epoch
    seconds; ``lock`` and ``tmp_dir`` are paths, where there are any; ``parent`` is the id of the
    run inside which this one was started.
    """

    run_id: str
    project: str
    pid: int
    create_time: float
    host: str
    boot_id: str
    pid_namespace: int
    user: str
    uid: int
    argv: tuple[str, ...]
    cwd: str
    started_at: float
    lock: str | None = None
    tmp_dir: str | None = None
    rank: int | None = None
    parent: str | None = None

    @property
    def leader(self) -> ProcessIdentity:
        """The process that entered the environment."""
        return ProcessIdentity(self.pid, self.create_time)

    @property
    def is_local(self) -> bool:
        """Whether the pid means anything here: same host, same boot, same pid namespace."""
        return (
            self.boot_id == processes.boot_id()
            and processes.is_own_pid_namespace(self.pid_namespace)
            and self.host == socket.gethostname()
        )

    def describe(self, now: float | None = None) -> str:
        """Who that is, for a person: one line, safe for a terminal."""
        age = (time.time() if now is None else now) - self.started_at
        where = f" in {self.cwd}" if self.cwd else ""
        return printable(
            f"pid {self.pid} on {self.host} (user {self.user}), started {duration(age)} ago: "
            f"{' '.join(self.argv)}{where}"
        )


@attrs.frozen
class Survivor:
    """A live process that belongs to a run whose leader is dead, and what proves it."""

    pid: int
    create_time: float
    command: str
    evidence: str

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.create_time)

    def describe(self) -> str:
        return printable(f"pid {self.pid} ({self.evidence}): {self.command}")


def describe_this_run(
    project: str,
    *,
    lock: str | None = None,
    rank: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> RunRecord:
    """The record of a run that this process is about to begin."""
    pid = os.getpid()
    identity = processes.identity_of(pid)
    if identity is None:
        raise InfrastructureError(f"cannot identify this process: /proc/{pid}/stat is not readable")
    uid = os.geteuid() if hasattr(os, "geteuid") else 0
    parent = environ.get(RUN_ID_VARIABLE)
    return RunRecord(
        run_id=os.urandom(8).hex(),
        project=project,
        pid=pid,
        create_time=identity.create_time,
        host=socket.gethostname(),
        boot_id=processes.boot_id(),
        pid_namespace=processes.pid_namespace(),
        user=files.owner_name(uid).partition(" (")[0],
        uid=uid,
        argv=_clip(sys.orig_argv),
        cwd=_cut(_working_directory()),
        started_at=time.time(),
        lock=lock,
        rank=rank,
        parent=parent if _is_id(parent) else None,
    )


def to_json(record: RunRecord, state: RunState | None = None) -> bytes:
    """A record as one line of JSON."""
    line = _to_json(record)
    if state is not None:
        line = f'{line[:-1]}, "state": "{state.value}"}}'
    return line.encode() + b"\n"


@functools.lru_cache(maxsize=8)  # written three times in every run: twice here, once in the lock
def _to_json(record: RunRecord) -> str:
    return json.dumps({"orchard_infra": 1, **attrs.asdict(record, recurse=False)})


def from_json(data: bytes) -> tuple[RunRecord, RunState | None]:
    """Read what `to_json` wrote.

    Raises:
        ValueError: It is anything else: torn, binary, huge, deeply nested, of wrong types.
    """
    if len(data) > RECORD_LIMIT:
        raise ValueError(f"longer than {RECORD_LIMIT} bytes")
    if not data.startswith(RECORD_START):
        raise ValueError("not a run record")
    try:
        fields = json.loads(data.partition(b"\n")[0])
        state = fields.get("state")
        values: dict[str, Any] = {}
        for field in attrs.fields(RunRecord):
            value = fields.get(field.name, field.default)
            if not _TYPES[field.name](value):
                raise ValueError(f"{field.name} is {value!r:.80}")
            values[field.name] = tuple(value) if field.name == "argv" else value
        return RunRecord(**values), None if state is None else RunState(state)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_record(fd: int) -> tuple[RunRecord, RunState | None] | None:
    """The record in an open file, or None where there is none that can be read."""
    try:
        return from_json(files.read_bounded(fd, RECORD_LIMIT + 1))
    except (ValueError, OSError):
        return None


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


def leader_is_dead(record: RunRecord) -> bool:
    """Whether the process that led this run is *proven* dead.

    From another boot of this very host, or gone from our own pid namespace. A record of another
    host, or of another container, proves nothing here.
    """
    if record.host != socket.gethostname():
        return False
    if record.boot_id != processes.boot_id():
        return bool(record.boot_id)
    return record.is_local and not processes.is_alive(record.leader)


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


def lock_descriptor(fd: int, *, shared: bool = False) -> bool:
    """Take the kernel's lock on an open file, without waiting; False when another one has it.

    It is flock(2) on POSIX: it belongs to the open file description, which forked children share.

    Raises:
        OSError: The file system has no such locks.
    """
    import portalocker  # 50 ms

    try:
        portalocker.lock(fd, _lock_flags(shared))
    except portalocker.AlreadyLocked:
        return False
    except portalocker.LockException as error:
        cause = next((arg for arg in error.args if isinstance(arg, OSError)), error.__cause__)
        if isinstance(cause, OSError):
            raise cause from None
        raise OSError(errno.ENOLCK, str(error)) from error
    return True


@functools.cache  # arithmetic with enum flags costs more than flock(2)
def _lock_flags(shared: bool) -> Any:
    from portalocker import LockFlags

    return (LockFlags.SHARED if shared else LockFlags.EXCLUSIVE) | LockFlags.NON_BLOCKING


def unlock_descriptor(fd: int) -> None:
    """Give the lock back at once. Closing would not, while a forked child has the descriptor."""
    import portalocker

    portalocker.unlock(fd)


def printable(text: str) -> str:
    """``text`` without anything that could act on a terminal: escapes, controls, bidi marks.

    >>> printable("train\\x1b[2J.py")
    'train\\\\x1b[2J.py'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def duration(seconds: float) -> str:
    """A length of time for a person.

    >>> duration(7509)
    '2 h 5 min'
    """
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


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


def _leader_lives(record: RunRecord) -> bool:
    return record.is_local and processes.is_alive(record.leader)


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


def _clip(words: Iterable[str], limit: int = 4096) -> tuple[str, ...]:
    """As many words as fit into ``limit`` bytes of JSON, and a part of the next."""
    words = tuple(words)
    if len(json.dumps(words)) <= limit:  # mostly: a fraction of the time
        return words
    kept: list[str] = []
    for word in words:
        kept.append(_cut(word, limit))
        limit -= len(json.dumps(kept[-1])) + 2
        if limit <= 0 or kept[-1] != word:
            break
    return tuple(kept)


def _cut(text: str, limit: int = 4096) -> str:
    """As much of a text as fits into ``limit`` bytes of JSON, escapes and all."""
    text = text[:limit]
    while len(json.dumps(text)) > limit + 2:
        text = text[: len(text) * 2 // 3]
    return text


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 8192


def _is_id(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 64 and value.isalnum() and value.isascii()


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12  # type: ignore[operator]


def _is_words(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_text(word) for word in value)


def _optional(check: Any) -> Any:
    return lambda value: value is None or check(value)


_TYPES: dict[str, Any] = {
    "run_id": _is_id,
    "project": _is_text,
    "pid": lambda value: _is_whole(value) and 0 < value < 2**31,
    "create_time": _is_number,
    "host": _is_text,
    "boot_id": _is_text,
    "pid_namespace": _is_whole,
    "user": _is_text,
    "uid": _is_whole,
    "argv": _is_words,
    "cwd": _is_text,
    "started_at": _is_number,
    "lock": _optional(_is_text),
    "tmp_dir": _optional(_is_text),
    "rank": _optional(_is_whole),
    "parent": _optional(_is_text),
}
