"""Files and directories in places where somebody else can plant a trap.

Lock files and run records live in directories such as /tmp. Nothing here follows a link at the
last component, opens what is not a regular file, or trusts a directory that another user can
write to.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from orchard_infra.errors import InfrastructureError
from orchard_infra.system.origin import from_origin

_Path = TypeVar("_Path", str, Path)

RUNTIME_DIR_VARIABLE = "ORCHARD_INFRA_DIR"

# O_NONBLOCK: opening a FIFO that somebody planted must not hang.
_SAFE = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The one directory of this user for default locks and run records. Nothing is created.

    ``/tmp/orchard-infra-<uid>``, and not below TMPDIR or XDG_RUNTIME_DIR: two jobs that each have
    a TMPDIR of their own must still meet, and a nohup run must outlive a logout. The variable
    ORCHARD_INFRA_DIR names another one.

    >>> runtime_dir({"ORCHARD_INFRA_DIR": "/scratch/locks"}).as_posix()
    '/scratch/locks'
    """
    chosen = environ.get(RUNTIME_DIR_VARIABLE)
    if chosen:
        return _chosen_dir(chosen if os.path.isabs(chosen) else from_origin(chosen, environ))
    if sys.platform == "win32":
        local = environ.get("LOCALAPPDATA") or os.path.expanduser("~")
        return Path(local) / "orchard-infra"
    return _own_dir(os.geteuid())


# Short runs ask several times each, and a path costs as much to make as a system call.
@functools.lru_cache(maxsize=8)
def _chosen_dir(chosen: str) -> Path:
    return Path(os.path.normpath(chosen))


@functools.lru_cache(maxsize=8)
def _own_dir(uid: int) -> Path:
    return Path("/tmp") / f"orchard-infra-{uid}"


def private_directory(path: _Path) -> _Path:
    """Make ``path`` with mode 0700 where it is missing, and refuse it where it is not ours.

    Raises:
        InfrastructureError: It is a link or no directory, belongs to somebody else, others can
            write to it, or it cannot be made.
    """
    try:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            try:
                Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
            except FileExistsError:
                pass  # here, or further up: what it is, and whether it is here, is seen next
            found = os.lstat(path)
    except OSError as error:
        raise InfrastructureError(
            f"cannot make the directory {path}: {error.strerror}. "
            f"Set {RUNTIME_DIR_VARIABLE} to a directory of your own"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise InfrastructureError(f"{path} is {describe_kind(found.st_mode)}, not a directory")
    if sys.platform != "win32":
        if found.st_uid != os.geteuid():
            raise InfrastructureError(
                f"{path} belongs to {owner_name(found.st_uid)}, not to you. "
                f"Set {RUNTIME_DIR_VARIABLE} to a directory of your own"
            )
        if found.st_mode & 0o022:
            raise InfrastructureError(
                f"other users can write to {path} (mode {stat.S_IMODE(found.st_mode):04o}). "
                f"Run chmod 700 on it, or set {RUNTIME_DIR_VARIABLE} to another directory"
            )
    return path


def open_existing(path: str | Path, flags: int) -> int:
    """Open a regular file that exists; its descriptor.

    Raises:
        FileNotFoundError: There is none.
        InfrastructureError: What is there is a link, a FIFO, a directory, a device ...
        OSError: As open(2) says.
    """
    # Looked at first, because opening a device can already have an effect.
    _refuse_unless_regular(path, os.lstat(path).st_mode)
    try:
        fd = os.open(path, flags | _SAFE)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InfrastructureError(f"{path} is a symbolic link; it is not followed") from error
        raise
    try:
        _refuse_unless_regular(path, os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def create_exclusive(path: str | Path, mode: int) -> int:
    """Make a file that does not exist yet; its descriptor, open for reading and writing.

    Raises:
        FileExistsError: Something has that name, be it a dangling link.
        OSError: As open(2) says.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, mode)


def open_to_append(path: str | Path, mode: int) -> tuple[int, int]:
    """Open a file of our own to append to it, or make it: its descriptor, and its size in bytes.

    Raises:
        InfrastructureError: What is there is no file of ours, see `is_foreign`.
        OSError: As open(2) says.
    """
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _SAFE, mode)
    status = os.fstat(fd)
    if is_foreign(status):
        os.close(fd)
        raise InfrastructureError(f"{path} is not a regular file of ours; it is left as it is")
    return fd, status.st_size


def is_foreign(status: os.stat_result) -> bool:
    """Whether this is no regular file, belongs to somebody else, or has another name elsewhere:
    appending to a hard link changes the file that it was planted for.
    """
    owner = os.geteuid() if hasattr(os, "geteuid") else status.st_uid
    return not stat.S_ISREG(status.st_mode) or status.st_uid != owner or status.st_nlink > 1


def device_and_inode(status: os.stat_result) -> tuple[int, int]:
    """What tells a file from all others that exist now. Once it is gone its inode is given away."""
    return status.st_dev, status.st_ino


def working_directory() -> str | None:
    """The working directory; None where it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def same_file(fd: int, path: str | Path) -> bool:
    """Whether ``path`` still names the file that is open as ``fd``, and anything is open there."""
    try:
        return device_and_inode(os.lstat(path)) == device_and_inode(os.fstat(fd))
    except OSError:
        return False


def still_open(fd: int, file: tuple[int, int]) -> bool:
    """Whether ``fd`` is still the file with this device and inode. A program may close every
    descriptor, as daemons do, and then the number is soon that of some other file.
    """
    try:
        return device_and_inode(os.fstat(fd)) == file
    except OSError:
        return False


def read_bounded(fd: int, limit: int) -> bytes:
    """At most ``limit`` bytes from the start of a file, wherever its offset stands."""
    if hasattr(os, "pread"):
        return os.pread(fd, limit, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    return os.read(fd, limit)


def write_whole(fd: int, data: bytes) -> None:
    """Replace the contents of an open file, wherever its offset stands."""
    if hasattr(os, "pwrite"):
        written = os.pwrite(fd, data, 0)
    else:
        os.lseek(fd, 0, os.SEEK_SET)
        written = os.write(fd, data)
    while written < len(data):
        os.lseek(fd, written, os.SEEK_SET)
        written += os.write(fd, data[written:])
    if os.fstat(fd).st_size > len(data):  # five times as fast as cutting off nothing
        os.ftruncate(fd, len(data))


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data`` where the file's offset stands, or at its end with O_APPEND."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@functools.lru_cache(maxsize=64)
def file_system_of(device: int) -> str:
    """The type of the file system with this device number, such as "ext4" or "nfs4".

    Empty where that cannot be told: no Linux, or a file system that numbers its files by volume
    (btrfs, overlay). See proc_pid_mountinfo(5).
    """
    wanted = f"{os.major(device)}:{os.minor(device)}".encode()
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                fields, _, types = line.partition(b" - ")
                if fields.split(b" ", 3)[2] == wanted:
                    return types.split(b" ", 1)[0].decode()
    except OSError:
        pass
    return ""


def describe_kind(mode: int) -> str:
    """What ``st_mode`` says a file is, in words."""
    for test, words in (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return words
    return "a regular file"


@functools.lru_cache(maxsize=64)
def owner_name(uid: int) -> str:
    """A user's name and number, for a message; the number alone where it has no name."""
    try:
        import pwd
    except ImportError:
        return f"uid {uid}"
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _refuse_unless_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise InfrastructureError(f"{path} is {describe_kind(mode)}, not a regular file")
