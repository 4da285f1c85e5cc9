"""Removing files safely: the account of what was removed, and the walk through a directory.

Directories are walked by descriptor. No link is followed at any depth, also when somebody puts one
there during the walk, and nothing is removed from a file system that is mounted inside. The walk
needs six descriptors; with more it is faster in deep trees.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import attrs

from orchard_infra.report import CleanReport
from orchard_infra.system.files import describe_kind, owner_name
from orchard_infra.system.text import printable

_DEPTH = 60  # directories: each open one costs two descriptors
_PASSES = 3
_TOLD = 20  # failures

CAN_WALK = os.scandir in os.supports_fd and os.unlink in os.supports_dir_fd  # not on Windows
DIRECTORY = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)  # and O_RDONLY, 0
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@attrs.define(eq=False, repr=False)
class Removal:
    """Removes files, and keeps account of it. With ``dry`` it only keeps account."""

    dry: bool = False
    removed: list[Path] = attrs.field(factory=list)
    kept: list[Path] = attrs.field(factory=list)
    bytes_freed: int = 0
    failures: list[str] = attrs.field(factory=list)
    _top: int = -1
    _mount: tuple[int, bytes] = (0, b"")
    _lifted: int = 0

    def report(self) -> CleanReport:
        return CleanReport(
            tuple(self.removed), tuple(self.kept), self.bytes_freed, tuple(self.failures)
        )

    def remove_directory(self, path: Path) -> None:
        """Remove a directory of our own and everything in it. A missing one is no failure."""
        try:
            found = os.lstat(path)
            _refuse_unless_ours(found, stat.S_ISDIR(found.st_mode))
            if self.dry:
                self._weigh(path)
                return
            if not CAN_WALK:
                self._remove_by_path(path)
                return
            with opened_directory(path.parent, getattr(os, "O_PATH", os.O_RDONLY)) as parent:
                # A directory on which something is mounted is not ours to empty, at any depth.
                self._mount = _mount_of(parent, os.fstat(parent))
                if self._remove_below(parent, path.name, path, depth=0):
                    self.removed.append(path)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:  # ValueError: NUL, or no such text in file names
            self.fail(path, error)

    def unlink(self, directory: int, name: str, status: os.stat_result) -> None:
        """Remove one file of a directory that is open, and count what that frees."""
        if not self.dry:
            os.unlink(name, dir_fd=directory)
        if status.st_nlink == 1:
            self.bytes_freed += status.st_blocks * 512

    def fail(self, path: Path, error: OSError | ValueError) -> None:
        """Note what could not be removed, and why."""
        reason = error.strerror if isinstance(error, OSError) else error
        self.note(f"{path}: {reason}")

    def note(self, failure: str) -> None:
        """Note a failure. After some, that there are more: nobody reads a thousand lines."""
        if len(self.failures) < _TOLD:
            self.failures.append(printable(failure))
        elif len(self.failures) == _TOLD:
            self.failures.append("and more")

    def _remove_below(self, parent: int, name: str, path: Path, depth: int) -> bool:
        """Remove the directory with this name in ``parent``. Returns whether it is gone."""
        directory = -1
        try:
            directory = _open_own_directory(parent, name)
            status = os.fstat(directory)
            if depth == 0:
                _refuse_unless_ours(status, True)
                self._top = directory
            if _mount_of(directory, status) != self._mount:
                raise OSError(errno.EBUSY, "something is mounted here, and stays")
            if status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
                os.fchmod(directory, stat.S_IRWXU)
            passes = _PASSES
            while passes:
                lifted = self._lifted
                if not self._empty(directory, path, depth):
                    return False
                try:
                    os.rmdir(name, dir_fd=parent)
                    return True
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                if lifted == self._lifted:
                    passes -= 1
            raise OSError(errno.ENOTEMPTY, "somebody keeps writing into it")
        except FileNotFoundError:
            return True
        except OSError as error:
            if no_descriptors(error) and depth > 1:
                raise  # those above have some: the caller moves it there
            self.fail(path, error)
            return False
        finally:
            if directory >= 0:
                os.close(directory)

    def _empty(self, directory: int, path: Path, depth: int) -> bool:
        """Remove what is in a directory, entry by entry as they are read: there may be millions."""
        emptied = True
        with os.scandir(directory) as entries:
            for entry in entries:
                name = entry.name
                try:
                    if not entry.is_dir(follow_symlinks=False):
                        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                        self.unlink(directory, name, status)
                        continue
                    try:
                        if depth < _DEPTH:
                            emptied &= self._remove_below(directory, name, path / name, depth + 1)
                            continue
                    except OSError as error:
                        if not no_descriptors(error):
                            raise
                    # There are no descriptors to go on here: it has its turn at the top.
                    self._lifted += 1
                    lifted = f"{self._lifted}.{os.urandom(4).hex()}"
                    os.rename(name, lifted, src_dir_fd=directory, dst_dir_fd=self._top)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    self.fail(path / name, error)
                    emptied = False
        return emptied

    def _weigh(self, directory: Path) -> None:
        for path, _, names in os.walk(directory):
            for name in names:
                with contextlib.suppress(OSError):
                    status = os.lstat(os.path.join(path, name))
                    if status.st_nlink == 1:
                        self.bytes_freed += status.st_blocks * 512
        self.removed.append(directory)

    def _remove_by_path(self, path: Path) -> None:
        import shutil

        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            raise OSError(errno.ENOTEMPTY, "could not be removed whole")
        self.removed.append(path)


@contextlib.contextmanager
def opened_directory(path: str | Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of a directory that the user or the system has named: links are followed."""
    directory = os.open(path, flags | DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)


def _open_own_directory(parent: int, name: str) -> int:
    """Open a directory, not a link, even where its mode keeps its owner out."""
    try:
        return os.open(name, DIRECTORY | NOFOLLOW, dir_fd=parent)
    except PermissionError:
        if not hasattr(os, "O_PATH"):
            raise
    # Changed by descriptor: chmod by name would follow a link.
    handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{handle}", stat.S_IRWXU)
    finally:
        os.close(handle)
    return os.open(name, DIRECTORY | NOFOLLOW, dir_fd=parent)


def _mount_of(directory: int, status: os.stat_result) -> tuple[int, bytes]:
    """What tells one mount from another: the device, and the number of the mount.

    A directory that is mounted from the same file system (mount --bind) has the same device.
    """
    try:
        with open(f"/proc/self/fdinfo/{directory}", "rb") as lines:
            number = next((line for line in lines if line.startswith(b"mnt_id:")), b"")
    except OSError as error:
        if no_descriptors(error):
            raise
        number = b""
    return status.st_dev, number


def is_open(directory: int, name: str) -> bool | None:
    """Whether any process on this machine has a file open or mapped. None when that is unknown.

    The kernel grants a write lease on a file that nobody else has open, and a mapping keeps a
    file open: see F_SETLEASE in fcntl(2). It knows of every user and every container.
    """
    try:
        import fcntl

        signum, lease = fcntl.F_SETSIG, fcntl.F_SETLEASE
    except (ImportError, AttributeError):  # no Linux
        return None
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | NOFOLLOW, dir_fd=directory)
    except BlockingIOError:  # somebody else has a lease on it
        return True
    except OSError as error:
        if no_descriptors(error):
            raise
        return None
    try:
        # Whoever opens the file right now makes the kernel tell us: by SIGIO, which kills.
        fcntl.fcntl(fd, signum, signal.SIGURG)
        fcntl.fcntl(fd, lease, fcntl.F_WRLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


def is_ours(status: os.stat_result, right_kind: bool) -> bool:
    return right_kind and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())


def _refuse_unless_ours(status: os.stat_result, is_directory: bool) -> None:
    if not is_directory:
        raise OSError(
            errno.ENOTDIR, f"{describe_kind(status.st_mode)} is there in place of the directory"
        )
    if not is_ours(status, True):
        raise OSError(errno.EPERM, f"belongs to {owner_name(status.st_uid)}, not to you")


def no_descriptors(error: OSError) -> bool:
    """Whether this process, or the whole system, has no file descriptors left."""
    return error.errno in (errno.EMFILE, errno.ENFILE)
