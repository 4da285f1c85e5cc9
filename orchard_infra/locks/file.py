"""The lock as a file: flock(2), by way of portalocker, on a file that goes away on release.

Removing the file is what makes this subtle. A contender may have opened it just before the
holder removed it, and then it locks a file that has no name while a third one makes a new file:
two holders. So whoever gets the kernel's lock looks whether the path still names the file that
it has locked, and starts over when not; and the holder removes the file while it still has the
lock, never after.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

import attrs

from orchard_infra.errors import EnvironmentLockedError, InfrastructureError, LockLostError
from orchard_infra.locks.base import ClearDead
from orchard_infra.runs.record import (
    RECORD_LIMIT,
    RECORD_START,
    RunRecord,
    leader_is_dead,
    read_record,
    to_json,
)
from orchard_infra.system import files
from orchard_infra.system.flock import lock_descriptor, unlock_descriptor
from orchard_infra.system.masking import uninterrupted
from orchard_infra.system.text import duration, printable

# A waiter asks this often, in seconds: the lock is its own some 6 ms after the release, for 1.5 %
# of a core, most of it for waking up. The kernel's blocking wait has no time limit and cannot see
# that the file is gone.
_POLL = (0.008, 0.014)
_LOOK_AGAIN = 0.25  # seconds between two looks at who holds it: ten times as dear as a try
_SAY_AGAIN = 30.0  # seconds between two log lines of a waiter
_FOREIGN = 4096  # bytes: what a lock file of another program may hold at the most

# On these the name and the file are cached apart from each other, so the check of a removed
# file proves nothing: there it stays, with an empty record.
# fmt: off
_NETWORK_FILE_SYSTEMS = frozenset((
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs",
    "gfs2", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2",
    "smb3", "smbfs", "virtiofs", "wekafs",
))
# fmt: on


def _valid_timeout(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"timeout must be a number of seconds >= 0, or None; not {value!r}")


def _valid_interval(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not value > 0:
        raise ValueError(f"interval must be a number of seconds > 0, not {value!r}")


@attrs.frozen
class FileLock:
    """A lock file, with the record of its holder inside.

    ``timeout``, in seconds, is how long to wait for another run: 0 fails at once, None waits for
    ever. ``interval``, in seconds, is how often a held lock is looked after in the background.
    """

    timeout: float | None = attrs.field(default=0.0, validator=_valid_timeout)
    interval: float = attrs.field(default=5.0, validator=_valid_interval)

    def acquire(
        self, path: Path, record: RunRecord, *, clear_dead: ClearDead, logger: logging.Logger
    ) -> FileLease:
        """See `Locker.acquire`. Missing parent directories are made."""
        began = time.monotonic()
        attempt = _Attempt(path)
        holder = None
        look_next = say_next = began
        try:
            while True:
                if attempt.succeeds():
                    with uninterrupted():
                        return FileLease.take(path, attempt.hand_over(), record, self.interval)
                now = time.monotonic()
                if now >= look_next:
                    look_next = now + _LOOK_AGAIN
                    holder = attempt.holder()
                    if holder is not None:
                        _refuse_own(holder, record, path)
                        if leader_is_dead(holder):
                            _clear(holder, path, clear_dead)
                            if attempt.succeeds_within(1.0):
                                continue
                            holder = attempt.holder()  # somebody was faster, and has signed
                if self.timeout is not None and now - began >= self.timeout:
                    raise _locked(path, holder or attempt.holder_soon(), waited=now - began)
                if now >= say_next:
                    say_next = now + _SAY_AGAIN
                    logger.info(
                        "waiting for the lock %s, held by %s",
                        path,
                        holder.describe() if holder else "an unknown run",
                        extra={"lock_path": str(path), "holder": holder},
                    )
                attempt.pause(self.timeout, began)
        finally:
            attempt.abandon()

    def holder(self, path: Path) -> RunRecord | None:
        """See `Locker.holder`."""
        try:
            fd = files.open_existing(path, os.O_RDONLY)
        except (OSError, InfrastructureError):
            return None
        try:
            found = read_record(fd)
        finally:
            os.close(fd)
        return found[0] if found else None


@attrs.define
class _Attempt:
    """Tries for one lock, again and again, on one descriptor for as long as that is of use."""

    path: Path
    _fd: int = -1
    _locked: bool = False

    def succeeds(self) -> bool:
        """Try once. True: the lock is ours, and its file is the one that the path names."""
        with uninterrupted():
            return self._try()

    def _try(self) -> bool:
        while not self._locked:
            if self._fd < 0 or not files.same_file(self._fd, self.path):
                self.abandon()
                self._fd = self._open()
            try:
                if not lock_descriptor(self._fd):
                    return False
            except OSError as error:
                raise _explain(error, self.path) from error
            # Removed between our open and our lock? Then this lock protects nothing.
            self._locked = files.same_file(self._fd, self.path)
        _refuse_foreign(self._fd, self.path)
        return True

    def succeeds_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self.succeeds():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL[0])
        return True

    def holder(self) -> RunRecord | None:
        found = read_record(self._fd)
        return found[0] if found else None

    def holder_soon(self) -> RunRecord | None:
        """The record of a holder that may only just have taken the lock, and not signed it."""
        deadline = time.monotonic() + 0.1
        while (record := self.holder()) is None and time.monotonic() < deadline:
            time.sleep(_POLL[0])
        return record

    def pause(self, timeout: float | None, began: float) -> None:
        rest = random.uniform(*_POLL)
        if timeout is not None:
            rest = min(rest, max(0.0, began + timeout - time.monotonic()))
        time.sleep(rest)

    def hand_over(self) -> int:
        """The locked descriptor, for a lease."""
        fd, self._fd, self._locked = self._fd, -1, False
        return fd

    def abandon(self) -> None:
        if self._fd >= 0:
            os.close(self.hand_over())

    def _open(self) -> int:
        """Make the file, or open it. Two steps, because O_CREAT on an existing file of somebody
        else in /tmp fails even for root (fs.protected_regular), with a misleading error."""
        may_make_parents = True
        while True:
            try:
                return files.create_exclusive(self.path, 0o644)
            except FileExistsError:
                pass
            except FileNotFoundError as error:
                if not may_make_parents:
                    raise _explain(error, self.path) from error
                may_make_parents = False
                self._make_parents()
                continue
            except OSError as error:
                raise _explain(error, self.path) from error
            try:
                return files.open_existing(self.path, os.O_RDWR)
            except FileNotFoundError:
                continue  # removed meanwhile
            except PermissionError as error:
                raise self._not_ours(error) from error
            except OSError as error:
                raise _explain(error, self.path) from error

    def _make_parents(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _explain(error, self.path) from error

    def _not_ours(self, error: OSError) -> InfrastructureError:
        """Somebody else's lock file: say who has it, where it lets us read that."""
        try:
            fd = files.open_existing(self.path, os.O_RDONLY)
        except OSError:
            return _explain(error, self.path)
        try:
            found = read_record(fd)
            if found and not lock_descriptor(fd):
                return _locked(self.path, found[0], waited=0.0)
            return _explain(error, self.path)
        finally:
            os.close(fd)


@attrs.define
class FileLease:
    """A lock file that is held by this process."""

    path: Path
    record: RunRecord
    interval: float
    _fd: int
    _file: tuple[int, int]  # device and inode
    _stays: bool  # on a network file system

    @classmethod
    def take(cls, path: Path, fd: int, record: RunRecord, interval: float) -> FileLease:
        """Sign a lock that has just been taken; undone when that fails."""
        stat = os.fstat(fd)
        file = stat.st_dev, stat.st_ino
        lease = cls(path, record, interval, fd, file, _is_on_network(fd))
        try:
            files.write_whole(fd, to_json(record))
        except BaseException as error:
            lease.release()
            if isinstance(error, OSError):
                raise _explain(error, path) from error
            raise
        return lease

    def __del__(self) -> None:
        # A signal may raise between the end of `acquire` and the caller's assignment.
        try:
            self.release()
        except OSError:
            pass

    def verify(self) -> None:
        """See `Lease.verify`. The file must still be there, and be the same one."""
        if self._fd < 0:
            raise LockLostError(f"the lock {self.path} was released", lock_path=str(self.path))
        if not self._is_open():
            raise LockLostError(
                f"the descriptor of the lock {self.path} was closed by this program, and the lock "
                "went free with it; another run may have started. Leave open what it did not open",
                lock_path=str(self.path),
            )
        if not files.same_file(self._fd, self.path):
            raise LockLostError(
                f"the lock {self.path} was removed or replaced while this run held it; another "
                "run may have started. Stop this run, and find out what removes *.lock files",
                lock_path=str(self.path),
            )

    def renew(self) -> None:
        """See `Lease.renew`. A new modification time keeps cleaners of old files away."""
        self.verify()
        os.utime(self._fd)

    def fileno(self) -> int:
        """The descriptor that is locked, for a child that is to keep the lock.

        Raises:
            LockLostError: It was released.
        """
        if self._fd < 0:
            raise LockLostError(f"the lock {self.path} was released", lock_path=str(self.path))
        return self._fd

    def release(self) -> None:
        """See `Lease.release`. A lock that was lost is let go, and the new file left alone.

        Raises:
            OSError: The file cannot be removed. The kernel's lock is free all the same.
        """
        if self._fd < 0:
            return
        is_open = self._is_open()
        fd, self._fd = self._fd, -1
        if not is_open:
            return  # the lock went with it, and what is at its path may be another run's by now
        try:
            # A forked child has the descriptor, too. What it holds is its parent's.
            if os.getpid() == self.record.pid and files.same_file(fd, self.path):
                if self._stays:
                    os.ftruncate(fd, 0)
                else:
                    os.unlink(self.path)
        finally:
            if os.getpid() == self.record.pid:
                # By closing alone it would stay locked while a forked child has the descriptor.
                unlock_descriptor(fd)
            os.close(fd)

    def _is_open(self) -> bool:
        """A program may close every descriptor; then the number is soon some other file's."""
        try:
            stat = os.fstat(self._fd)
        except OSError:
            return False
        return (stat.st_dev, stat.st_ino) == self._file


def _clear(holder: RunRecord, path: Path, clear_dead: ClearDead) -> None:
    survivors = tuple(clear_dead(holder))
    if not survivors:
        return
    listed = "; ".join(survivor.describe() for survivor in survivors)
    pids = " ".join(str(survivor.pid) for survivor in survivors)
    raise EnvironmentLockedError(
        f"the run that holds {path} is dead (pid {holder.pid}, user {printable(holder.user)}), "
        f"but processes of it still live: {listed}. "
        f"Set allow_process_kill=True to have them stopped, or run: kill {pids}",
        holder=holder,
        survivors=survivors,
        lock_path=str(path),
    )


def _refuse_own(holder: RunRecord, record: RunRecord, path: Path) -> None:
    if holder.leader == record.leader and holder.is_local:
        raise EnvironmentLockedError(
            f"this process (pid {holder.pid}) already holds {path}: it would wait for itself. "
            "Leave the first environment before entering it again, or use another project name",
            holder=holder,
            lock_path=str(path),
        )


def _refuse_foreign(fd: int, path: Path) -> None:
    """Never write into a file that is not a lock: a mistyped path may name somebody's results."""
    stat = os.fstat(fd)
    if hasattr(os, "geteuid") and stat.st_uid != os.geteuid():
        raise InfrastructureError(
            f"the lock file {path} belongs to {files.owner_name(stat.st_uid)} and no run holds it. "
            "Ask its owner to remove it, or choose another lock_file_path"
        )
    start = files.read_bounded(fd, _FOREIGN)
    ours = start.startswith(RECORD_START) or RECORD_START.startswith(start)
    # A zeroed file is a record that a power loss took; a number is another program's pid file.
    blank = stat.st_size <= RECORD_LIMIT and not start.strip(b"\0 \t\r\n0123456789")
    if not (ours or blank):
        raise InfrastructureError(
            f"{path} exists and is no lock file ({stat.st_size} bytes that are no run record); "
            "it was not touched. Choose another lock_file_path, or remove the file"
        )


def _locked(path: Path, holder: RunRecord | None, *, waited: float) -> EnvironmentLockedError:
    if holder is not None and leader_is_dead(holder):
        who = f"a process that a dead run left ({holder.describe()})"
        stop = f"find it with: fuser -v {path}"
    elif holder is None:
        who, stop = "a run that left no readable record", f"find it with: fuser -v {path}"
    else:
        who = holder.describe()
        stop = f"stop it (kill {holder.pid}{'' if holder.is_local else ' over there'})"
    since = f" (waited {duration(waited)})" if waited >= 1 else ""
    return EnvironmentLockedError(
        f"the lock {path} is held by {who}{since}. "
        f"Wait for it with FileLock(timeout=None), {stop}, or use another project name",
        holder=holder,
        lock_path=str(path),
    )


def _explain(error: OSError, path: Path) -> InfrastructureError:
    """Every error of the operating system on a lock file, translated in one place."""
    what = error.strerror or str(error)
    if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
        hint = "this file system has no working flock(2); choose a lock_file_path on another one"
    elif error.errno in (errno.EACCES, errno.EPERM):
        try:
            owner = files.owner_name(os.lstat(path).st_uid)
            hint = f"it belongs to {owner}; choose another lock_file_path"
        except OSError:
            hint = "choose a lock_file_path in a directory that you can write to"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space there, or choose a lock_file_path on another file system"
    else:
        hint = "choose another lock_file_path"
    return InfrastructureError(f"cannot lock {path}: {what}; {hint}")


def _is_on_network(fd: int) -> bool:
    """Whether the file system of an open file is one that other hosts write to, too."""
    return files.file_system_of(os.fstat(fd).st_dev) in _NETWORK_FILE_SYSTEMS
