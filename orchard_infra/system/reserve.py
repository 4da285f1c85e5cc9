"""A few file descriptors in reserve, for a release in a process that has none left.

A body that died of EMFILE often still holds its descriptors: the traceback keeps its variables
alive. Without a descriptor nothing can be removed, looked up or put on record.
"""

from __future__ import annotations

import os
import threading

from orchard_infra.system import background, files
from orchard_infra.system.masking import uninterrupted

# What a removal takes at most when it is short of them, see `orchard_infra.artifacts.removing`.
_COUNT = 6

# Reentrant: a finalizer may end another environment while this thread holds the lock.
_lock = threading.RLock()
_descriptors: list[int] = []
_file: tuple[int, int] | None = None
_environments = 0


def hold() -> None:
    """One more environment is open: keep a reserve. None is kept where there is none to be had.

    It stays until the background thread rests: making one costs as much as taking a lock.
    """
    global _environments, _file
    with uninterrupted(), _lock:
        _environments += 1
        if _descriptors and _is_ours(_descriptors[0]):
            return
        _close()
        try:
            # A pipe of our own, because it can be told from anything else with that number.
            _descriptors.extend(os.pipe())
            status = os.fstat(_descriptors[0])
            _file = status.st_dev, status.st_ino
            while len(_descriptors) < _COUNT:
                _descriptors.append(os.dup(_descriptors[0]))
        except OSError:
            pass


def let_go() -> None:
    """The release of one environment begins: it may use the reserve.

    The reserve is kept, unless this process has no descriptors left.
    """
    global _environments
    with uninterrupted(), _lock:
        _environments = max(0, _environments - 1)
        if _is_short():
            _close()


def _rest() -> None:
    with uninterrupted(), _lock:
        if _environments == 0:
            _close()


def _is_short() -> bool:
    more: list[int] = []
    try:
        for _ in _descriptors:
            more.append(os.dup(_descriptors[0]))
    except OSError:
        return True
    finally:
        for fd in more:
            os.close(fd)
    return False


def _close() -> None:
    while _descriptors:
        fd = _descriptors.pop()
        if _is_ours(fd):
            os.close(fd)


def _is_ours(fd: int) -> bool:
    # A program that closes all descriptors (a daemon does) has other files there by now.
    return _file is not None and files.still_open(fd, _file)


def _start_anew() -> None:
    """In a forked child the environments are its parent's. Another thread may have held the lock
    at the fork: nobody would ever unlock it here.
    """
    global _lock, _environments
    _lock = threading.RLock()
    _environments = 0
    _close()


background.at_rest(_rest)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
