"""The lock as a file: flock(2), by way of portalocker, on a file that goes away on release.

Removing the file is what makes this subtle. A contender may have opened it just before the
holder removed it, and then it locks a file that has no name while a third one makes a new file:
two holders. So whoever gets the kernel's lock checks that the path still names the file that it
has locked, and starts over when not; and the holder removes the file while it still has the lock,
never after.

A new file gets its name by link(2) once it is locked and signed, so nobody ever sees one that is
empty. On network file systems the name and the file are cached apart from each other, and the
check of a removed file proves nothing: there the file stays, with a record that says "free".
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from orchard_infra.errors import InfrastructureError, LockLostError
from orchard_infra.locks import counter, queue
from orchard_infra.locks.base import Held, LockKey
from orchard_infra.locks.checks import check_seconds, check_timeout
from orchard_infra.runs.record import RECORD_LIMIT, RECORD_START, RunRecord, from_json, to_json
from orchard_infra.system import files
from orchard_infra.system.flock import lock_descriptor, unlock_descriptor
from orchard_infra.system.masking import uninterrupted

_MODE = 0o644  # others may read who has the lock
_LOCK_NAMES = (".lock", ".lck", ".pid")
_PID = rb"\s*\d{1,10}\s*"  # a list of numbers is somebody's data
_FREE = RECORD_START + b' "free": true}\n'

# fmt: off
_NETWORK_FILE_SYSTEMS = frozenset((
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs",
    "gfs2", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2",
    "smb3", "smbfs", "virtiofs", "wekafs",
))
# fmt: on


@attrs.frozen
class FileLock:
    """A lock file, with the record of its holder inside.

    ``timeout``, in seconds, is how long to wait for another run: 0 fails at once, None waits for
    ever. ``interval``, in seconds, is how often a held lock is looked after in the background.
    """

    timeout: float | None = attrs.field(default=0.0, validator=check_timeout)
    interval: float = attrs.field(default=5.0, validator=check_seconds)

    def try_acquire(self, key: LockKey, record: RunRecord) -> FileLease | Held:
        """See `Lock.try_acquire`. Missing parent directories are made."""
        path = os.fspath(key.path)
        try:
            with uninterrupted():
                while True:
                    try:
                        fd = files.open_existing(path, os.O_RDWR)
                    except FileNotFoundError:
                        lease = FileLease(key.path, record, self.interval)
                        if lease._make(path):
                            return lease
                        continue  # somebody was faster
                    except PermissionError as error:
                        held = _held_by_another_user(path, error)
                        if held is None:
                            continue  # released meanwhile
                        return held
                    try:
                        if not lock_descriptor(fd):
                            return _held(fd, path)
                        # Removed between our open and our lock? Then this lock protects nothing.
                        if files.same_file(fd, path):
                            refuse_foreign(fd, key.path)
                            lease = FileLease(key.path, record, self.interval)
                            lease._hold(fd)
                            fd = -1
                            lease._sign()
                            return lease
                    finally:
                        if fd >= 0:
                            os.close(fd)
        except OSError as error:
            raise _explain(error, key.path) from error
        except BaseException:
            # No mask holds off a signal that another thread receives. Nobody knows of the lock yet.
            self._take_back(path, record)
            raise

    def _take_back(self, path: str, record: RunRecord) -> None:
        """Remove the file if this attempt has made it. Its descriptor is lost, and still locked;
        but nobody else will open a file without a name.
        """
        with contextlib.suppress(OSError, InfrastructureError):
            fd = files.open_existing(path, os.O_RDONLY)
            try:
                found = _record_in(fd)
                is_ours = found is not None and found.run_id == record.run_id
                if is_ours and not _stays(os.fstat(fd).st_dev):
                    os.unlink(path)
            finally:
                os.close(fd)

    def holder(self, key: LockKey) -> RunRecord | None:
        """See `Lock.holder`."""
        with uninterrupted():
            try:
                fd = files.open_existing(key.path, os.O_RDONLY)
            except (OSError, InfrastructureError):
                return None
            try:
                return _record_in(fd)
            finally:
                os.close(fd)

    def is_shared(self, key: LockKey) -> bool:
        """See `SharedLock.is_shared`: the file is on a network file system, or will be."""
        for directory in key.path.parents:  # the nearest may not be made yet
            with contextlib.suppress(OSError):
                return _stays(os.stat(directory).st_dev)
        return False

    def holder_now(self, key: LockKey) -> RunRecord | None:
        """See `SharedLock.holder_now`. Where the lock is free, this has it for an instant."""
        try:
            fd = files.open_existing(key.path, os.O_RDONLY)
        except (OSError, InfrastructureError):
            return None
        try:
            record = _record_in(fd)
            if record is None or not lock_descriptor(fd, shared=True):
                return record
            unlock_descriptor(fd)
            return None
        except OSError:
            return None
        finally:
            os.close(fd)

    def queue(self, key: LockKey) -> queue.Place:
        """See `QueuedLock.queue`."""
        return queue.Place(key.path)


@attrs.define(eq=False, repr=False)
class FileLease:
    """A lock file that is held by this process.

    A copy is the lease itself: `copy.deepcopy` or `dataclasses.asdict` of an object that contains
    one must not release the lock when the copy is dropped. A pickled one holds nothing.
    """

    path: Path
    record: RunRecord
    interval: float
    _fd: int = attrs.field(default=-1, init=False)
    _file: tuple[int, int] = attrs.field(default=(0, 0), init=False)  # device and inode
    _stays: bool = attrs.field(default=False, init=False)  # the file does, after the release
    _pid: int = attrs.field(default=0, init=False)  # 0: it never held anything
    _fences: list[int] = attrs.field(factory=list, init=False)  # the first that was drawn counts

    def __copy__(self) -> FileLease:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FileLease:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FileLease, (self.path, self.record, self.interval)

    def __del__(self) -> None:
        # A signal may raise between `try_acquire` and the caller's assignment.
        try:
            self.release()
        except Exception:  # the interpreter may be half gone, or the lease never completed
            pass

    def verify(self) -> None:
        """See `Lease.verify`. The file must still be there, and be the same one."""
        self.fileno()
        if not files.still_open(self._fd, self._file):
            raise self._lost(
                f"the descriptor of the lock {self.path} was closed by this program, and the lock "
                "went free with it; another run may have started. Leave open what it did not open"
            )
        if not _is_at(self.path, self._file):
            raise self._lost(
                f"the lock {self.path} was removed or replaced while this run held it; another "
                "run may have started. Stop this run, and find out what removes *.lock files"
            )

    @property
    def fence(self) -> int:
        """See `Lease.fence`. It is drawn when it is first asked for, from a counter beside the
        lock, ``NAME.fence``, which stays. A counter that was removed does no harm: a fence is
        never below the time of day in milliseconds.

        Raises:
            LockLostError: The lock is lost.
            InfrastructureError: The counter cannot be used; or this is a forked child, and its
                parent had not asked before.
        """
        if not self._fences:
            self.verify()  # one who draws after a loss would be ahead of its successor
            if os.getpid() != self._pid:
                raise InfrastructureError(
                    "the fence of this run is not known in a forked child, which must not draw "
                    "another one: ask for env.fence before the process is forked"
                )
            # Two threads may draw at the same time: an append is atomic, and both get the first.
            self._fences.append(counter.draw(f"{self.path}.fence"))
        return self._fences[0]

    def renew(self) -> None:
        """See `Lease.renew`. A new modification time keeps cleaners of old files away."""
        self.verify()
        os.utime(self._fd)

    def fileno(self) -> int:
        """The descriptor that is locked, for a child that is to keep the lock.

        Raises:
            LockLostError: It was released, or this is a copy from another process.
        """
        if self._fd >= 0:
            return self._fd
        if self._pid == 0:
            raise self._lost(
                f"this is a pickled copy of the lease on {self.path}: only the process that took "
                "the lock can verify it"
            )
        raise self._lost(f"the lock {self.path} was released")

    def release(self) -> None:
        """See `Lease.release`. A lock that was lost is let go, and the new file left alone.

        Raises:
            OSError: The file cannot be removed. The kernel's lock is free all the same.
        """
        if self._fd < 0:
            return
        with uninterrupted():
            fd, self._fd = self._fd, -1
            if not files.still_open(fd, self._file):
                return  # the lock went with it, and what is at its path may be another run's by now
            try:
                # A forked child has the descriptor, too. What it holds is its parent's.
                if os.getpid() == self._pid and _is_at(self.path, self._file):
                    if self._stays:
                        files.write_whole(fd, _FREE)
                    else:
                        os.unlink(self.path)
            finally:
                if os.getpid() == self._pid:
                    # By closing alone it would stay locked while a forked child has it open.
                    unlock_descriptor(fd)
                os.close(fd)

    def _make(self, path: str) -> bool:
        """Make the file, locked and signed; False where there is one by now."""
        directory = os.path.dirname(path) or "."
        try:
            device = os.stat(directory).st_dev
        except FileNotFoundError:
            os.makedirs(directory, exist_ok=True)
            device = os.stat(directory).st_dev
        # The last way raises what is really wrong, be it a full disk or a directory of others.
        ways = (_make_in_place,) if _stays(device) else _WAYS
        for make in ways:
            try:
                self._hold(make(path, to_json(self.record)))
                return True
            except FileExistsError:
                return False
            except OSError:
                if make is ways[-1]:
                    raise
        return False

    def _sign(self) -> None:
        """Write our record into a file that was there before; undone when that fails."""
        try:
            files.write_whole(self._fd, to_json(self.record))
        except BaseException:
            self.release()
            raise

    def _hold(self, fd: int) -> None:
        stat = os.fstat(fd)
        self._file = files.device_and_inode(stat)
        self._stays = _stays(stat.st_dev)
        self._pid = os.getpid()
        self._fd = fd

    def _lost(self, message: str) -> LockLostError:
        return LockLostError(message, lock_path=str(self.path))


def _make_unnamed(path: str, data: bytes) -> int:
    """A new, locked file that gets its name when it is complete. Nothing is left of it when this
    process is killed before.
    """
    flags = os.O_RDWR | getattr(os, "O_TMPFILE", 0) | os.O_CLOEXEC
    fd = os.open(os.path.dirname(path) or ".", flags, _MODE)
    try:
        lock_descriptor(fd)
        files.write_whole(fd, data)
        # With src_dir_fd, which is not used otherwise, Python has the link in /proc followed.
        os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _make_hidden(path: str, data: bytes) -> int:
    """The same where a file cannot be without a name, as on overlayfs until Linux 6.1."""
    hidden = os.path.join(os.path.dirname(path), f".orchard-infra-{os.urandom(6).hex()}")
    fd = files.create_exclusive(hidden, _MODE)
    try:
        try:
            lock_descriptor(fd)
            files.write_whole(fd, data)
            os.link(hidden, path)
        finally:
            os.unlink(hidden)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _make_in_place(path: str, data: bytes) -> int:
    """The same where there are no links. For a moment the file is there, and nobody has it."""
    fd = files.create_exclusive(path, _MODE)
    try:
        if not lock_descriptor(fd) or not files.same_file(fd, path):
            raise FileExistsError  # somebody has found it, and was faster
        files.write_whole(fd, data)
    except FileExistsError:
        os.close(fd)
        raise
    except BaseException:
        os.unlink(path)
        os.close(fd)
        raise
    return fd


_WAYS: tuple[Callable[[str, bytes], int], ...] = (_make_in_place,)
if hasattr(os, "link") and sys.platform != "win32":
    _WAYS = (_make_hidden, _make_in_place)
if hasattr(os, "O_TMPFILE"):
    _WAYS = (_make_unnamed, _make_hidden, _make_in_place)


@functools.lru_cache(maxsize=8)
def _stays(device: int) -> bool:
    """Whether a lock file on this device is kept: other hosts write there, or, on Windows, an
    open file cannot be removed.
    """
    return sys.platform == "win32" or files.file_system_of(device) in _NETWORK_FILE_SYSTEMS


def _held(fd: int, path: str) -> Held:
    """What a file says that somebody else has locked."""
    stat = os.fstat(fd)
    if _stays(stat.st_dev):
        return Held(_record_in(fd))
    # Whoever releases the lock removes its file.
    file = files.device_and_inode(stat)
    return Held(_record_in(fd), functools.partial(_is_at, path, file))


def _is_at(path: str | Path, file: tuple[int, int]) -> bool:
    """Whether the path names the file with this device and inode."""
    try:
        return files.device_and_inode(os.lstat(path)) == file
    except OSError:
        return False


def _record_in(fd: int) -> RunRecord | None:
    try:
        return _read(files.read_bounded(fd, RECORD_LIMIT + 1))
    except OSError:
        return None


@functools.lru_cache(maxsize=8)  # a waiter reads the same one ninety times a second
def _read(data: bytes) -> RunRecord | None:
    try:
        return None if data == _FREE else from_json(data)[0]
    except ValueError:
        return None


def _held_by_another_user(path: str, error: PermissionError) -> Held | None:
    """What another user's file says, if that lets us read it; None where it has just been removed.

    Raises:
        PermissionError: It is not locked, and not ours to remove.
    """
    try:
        fd = files.open_existing(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError:
        raise error from None
    try:
        if not lock_descriptor(fd, shared=True):
            return _held(fd, path)
        if files.same_file(fd, path):
            raise error
        return None
    finally:
        os.close(fd)


def refuse_foreign(fd: int, path: Path) -> None:
    """Never write into a file that is not a lock: a mistyped path may name somebody's results."""
    stat = os.fstat(fd)
    if hasattr(os, "geteuid") and stat.st_uid != os.geteuid():
        raise InfrastructureError(
            f"the lock file {path} belongs to {files.owner_name(stat.st_uid)} and no run holds it. "
            "Ask its owner to remove it, or choose another lock_file_path"
        )
    data = files.read_bounded(fd, RECORD_LIMIT + 1)
    if data.startswith(RECORD_START):
        return
    # A power loss leaves zeros, or a part of a record; other programs leave an empty file or a pid.
    text = data.strip(b"\0")
    broken = RECORD_START.startswith(text) or not text.strip() or re.fullmatch(_PID, text)
    if not broken or len(data) > RECORD_LIMIT:
        raise InfrastructureError(
            f"{path} exists and is no lock file ({stat.st_size} bytes that are no run record); "
            "it was not touched. Choose another lock_file_path, or remove the file"
        )
    if not path.name.endswith(_LOCK_NAMES):
        raise InfrastructureError(
            f"{path} exists and is no lock file: there is no run record in it, and its name does "
            f"not end in {', '.join(_LOCK_NAMES[:-1])} or {_LOCK_NAMES[-1]}. It was not touched. "
            "Choose another lock_file_path, or remove the file"
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
