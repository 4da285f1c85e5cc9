"""Environment variables that several environments of one process set, in any order.

The environments of two threads may overlap: A begins, B begins, A ends, B ends. If each one put
back what it had found, B would leave behind the value of A, which is gone.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable

import attrs

from orchard_infra.system.masking import uninterrupted


@attrs.define(eq=False, repr=False)
class _Setting:
    value: str
    found: str | None  # the value to put back


# Reentrant: a finalizer may end another environment while this thread holds the lock.
_lock = threading.RLock()
_settings: dict[str, list[_Setting]] = {}


def look_up(name: str) -> str | None:
    """The value of an environment variable, None where it is not set.

    `os.environ.get` raises and catches two exceptions then, and every environment asks three times.
    """
    if os.supports_bytes_environ:
        names = getattr(os.environb, "_data", os.environb)  # the dict inside
        if name.encode() not in names:
            return None
    return os.environ.get(name)


def export(name: str, value: str) -> Callable[[], None]:
    """Set an environment variable. Returns a function that withdraws the value again.

    The withdrawal puts back the value of before, or that of the latest setting which still
    stands. It changes nothing where somebody else has changed the variable meanwhile, nor in a
    forked child. The second call does nothing.

    Raises:
        ValueError: The name or the value contains a NUL, or the name an equals sign.
    """
    with uninterrupted(), _lock:
        setting = _Setting(value, look_up(name))
        os.environ[name] = value
        _settings.setdefault(name, []).append(setting)
    return functools.partial(_withdraw, name, setting)


def _withdraw(name: str, setting: _Setting) -> None:
    with uninterrupted(), _lock:
        settings = _settings.get(name, [])
        if setting not in settings:
            return
        index = settings.index(setting)
        del settings[index]
        if index < len(settings):
            # A later setting stands. It must not bring this value back, unless it is another one
            # that somebody else has set between the two.
            later = settings[index]
            if later.found == setting.value:
                later.found = setting.found
        elif os.environ.get(name) == setting.value:
            if setting.found is None:
                del os.environ[name]
            else:
                os.environ[name] = setting.found
        if not settings:
            del _settings[name]


def _start_anew() -> None:
    """The settings are those of the parent's environments, which go on. Another thread may have
    held the lock at the fork: nobody would ever unlock it here.
    """
    global _lock
    _lock = threading.RLock()
    _settings.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
