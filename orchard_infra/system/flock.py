"""flock(2), by way of portalocker."""

from __future__ import annotations

import errno
import functools
import importlib
import importlib.util
import sys
import types
from typing import Any

_ALONE = "orchard_infra.system.flock.portalocker"  # its name, without the package around it


def lock_descriptor(fd: int, *, shared: bool = False) -> bool:
    """Take the kernel's lock on an open file, without waiting; False when another one has it.

    It is flock(2) on POSIX: it belongs to the open file description, which forked children share.

    Raises:
        OSError: The file system has no such locks.
    """
    try:
        _lock()(fd, _lock_flags(shared))
    except (BlockingIOError, PermissionError):  # EAGAIN, or EACCES on some network file systems
        return False
    except _portalocker().exceptions.AlreadyLocked:
        return False
    except _portalocker().exceptions.LockException as error:
        cause = next((arg for arg in error.args if isinstance(arg, OSError)), error.__cause__)
        if isinstance(cause, OSError):
            raise cause from None
        raise OSError(errno.ENOLCK, str(error)) from error
    return True


@functools.cache  # who loads it anew, as a test of a plugin does, has other classes of its errors
def _portalocker() -> Any:
    """The module of portalocker that locks files, by itself where that can be had.

    `import portalocker` imports redis as well, and by that asyncio and OpenTelemetry, where these
    are installed: each program would start 0.2 s later, for a lock that we do not use.
    """
    found = None if "portalocker" in sys.modules else importlib.util.find_spec("portalocker")
    if found is not None and found.submodule_search_locations:
        package = types.ModuleType(_ALONE)
        package.__path__ = found.submodule_search_locations
        sys.modules.setdefault(_ALONE, package)
        try:
            return importlib.import_module(f"{_ALONE}.portalocker")
        except ImportError:  # it is laid out in another way now
            pass
    import portalocker

    return portalocker.portalocker


@functools.cache
def _lock() -> Any:
    """What portalocker calls for flock(2). Its own `lock` checks the same two flags at every call,
    which takes longer than the call, and follows whoever has set its LOCKER.
    """
    if sys.platform == "win32":
        return _portalocker().lock
    return _portalocker().FlockLocker().locker


@functools.cache
def _unlock() -> Any:
    if sys.platform == "win32":
        return _portalocker().unlock
    return _portalocker().FlockLocker().unlock


@functools.cache  # arithmetic with enum flags costs more than flock(2)
def _lock_flags(shared: bool) -> Any:
    flags = _portalocker().constants.LockFlags
    return (flags.SHARED if shared else flags.EXCLUSIVE) | flags.NON_BLOCKING


def unlock_descriptor(fd: int) -> None:
    """Give the lock back at once. Closing would not, while a forked child has the descriptor."""
    _unlock()(fd)
