"""flock(2), by way of portalocker."""

from __future__ import annotations

import errno
import functools
import sys
from typing import Any


def lock_descriptor(fd: int, *, shared: bool = False) -> bool:
    """Take the kernel's lock on an open file, without waiting; False when another one has it.

    It is flock(2) on POSIX: it belongs to the open file description, which forked children share.

    Raises:
        OSError: The file system has no such locks.
    """
    try:
        _locker().lock(fd, _lock_flags(shared))
    except _portalocker().AlreadyLocked:
        return False
    except _portalocker().LockException as error:
        cause = next((arg for arg in error.args if isinstance(arg, OSError)), error.__cause__)
        if isinstance(cause, OSError):
            raise cause from None
        raise OSError(errno.ENOLCK, str(error)) from error
    return True


@functools.cache  # who loads it anew, as a test of a plugin does, has other classes of its errors
def _portalocker() -> Any:
    import portalocker  # 50 ms

    return portalocker


@functools.cache
def _locker() -> Any:
    """flock(2) itself. `portalocker.lock` checks the same two flags anew each time, which costs
    five times as much, and follows whoever has set its LOCKER.
    """
    if sys.platform == "win32":
        return _portalocker()
    return _portalocker().portalocker.FlockLocker()


@functools.cache  # arithmetic with enum flags costs more than flock(2)
def _lock_flags(shared: bool) -> Any:
    flags = _portalocker().LockFlags
    return (flags.SHARED if shared else flags.EXCLUSIVE) | flags.NON_BLOCKING


def unlock_descriptor(fd: int) -> None:
    """Give the lock back at once. Closing would not, while a forked child has the descriptor."""
    _locker().unlock(fd)
