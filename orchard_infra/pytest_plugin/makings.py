"""What this very process has made: the proof without which no file of a test is removed.

Other programs, and other workers of xdist, make entries in the same directories at the same time.
So nothing is concluded from what is new in a directory: Python's audit events say what this
process itself makes, see the table of audit events in Python's documentation.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from types import FrameType
from typing import Any

import attrs

from orchard_infra.system.files import device_and_inode

SHARED_MEMORY = "/dev/shm/"
_DEPTH = 300  # frames that are looked at


@attrs.frozen
class Made:
    """A temporary directory or a shared memory segment that was made, in which thread.

    ``memory`` tells a segment from one that another process makes later with its name.
    ``is_tracked``: the resource tracker of multiprocessing knows of it.
    """

    path: str
    thread: int
    memory: tuple[int, int] | None = None
    is_tracked: bool = False

    def is_there(self) -> bool:
        try:
            found = device_and_inode(os.lstat(self.path))
        except OSError:
            return False
        return self.memory in (None, found)


class Makings:
    """Writes down what is made while it listens, in the order in which it is made."""

    def __init__(self) -> None:
        self.entries: list[Made] = []
        self._pid = os.getpid()
        self._outer: Makings | None = None

    def listen(self) -> None:
        global _listening, _hooked
        self._outer, _listening = _listening, self
        if not _hooked:
            _hooked = True
            sys.addaudithook(_hook)  # stays for ever: it cannot be taken back

    def close(self) -> None:
        global _listening
        if _listening is self:
            _listening = self._outer

    def take(self, mark: int) -> list[Made]:
        """What was made since there were ``mark`` entries, which are forgotten."""
        taken = self.entries[mark:]
        del self.entries[mark:]
        return taken

    def note(self, event: str, argument: object, caller: FrameType) -> None:
        if os.getpid() != self._pid:
            return  # a fork: what it makes is its own
        thread = threading.get_ident()
        if event == "os.truncate":
            memory = _new_shared_memory(caller)
            if memory is not None and type(argument) is int:
                path = os.readlink(f"/proc/self/fd/{argument}")
                if path.startswith(SHARED_MEMORY):
                    file = device_and_inode(os.fstat(argument))
                    self.entries.append(Made(path, thread, file, getattr(memory, "_track", True)))
        elif isinstance(argument, str) and not _is_importing(caller):
            path = os.path.abspath(argument)
            is_temporary = os.path.dirname(path) == os.path.abspath(tempfile.gettempdir())
            # Told before it is made. One that exists is not made, but another name is tried.
            if is_temporary and not os.path.lexists(path):
                self.entries.append(Made(path, thread))


_listening: Makings | None = None
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening is None or event not in ("tempfile.mkdtemp", "os.truncate"):
        return
    try:
        _listening.note(event, arguments[0], sys._getframe(1))
    except Exception:  # raised in here, it would make the test's own call fail
        pass


def _new_shared_memory(frame: FrameType) -> object:
    """The `SharedMemory` that is just making its segment, if that is who calls. It gives a segment
    its size when it makes one, and not when it attaches to somebody's.
    """
    if not frame.f_code.co_filename.endswith("shared_memory.py"):
        return None
    memory = frame.f_locals.get("self")
    return memory if getattr(memory, "_flags", 0) & os.O_EXCL else None


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported. What it makes belongs to the process: libraries make a
    cache for themselves when they are loaded, in the first test that needs them.
    """
    for _ in range(_DEPTH):
        if frame is None or frame.f_code.co_filename.endswith("_pytest/runner.py"):
            return False
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
