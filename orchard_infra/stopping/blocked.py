"""A main thread that does not come back to Python, seen from another thread.

Python runs its handlers in the main thread, between two steps of Python. A main thread that hangs
in C, in a collective whose peer has gone, never comes to that: the process is deaf for SIGTERM.

* That a signal has come is known all the same: the half of Python's handler that is written in C
  writes the signal's number to a wakeup fd at once, see `signal.set_wakeup_fd`.
* Whether the main thread has come back since is asked by a pending call, which Python carries out
  where it would run a handler: Py_AddPendingCall of Python's C API. The call is sem_post(3). A
  function in Python could be interrupted by a handler, and what that raises would be lost.
* A call that waits in Python's own way (`time.sleep`, a lock, a socket) runs handlers, and no
  pending calls. So a handler that has run is an answer as well.

A main thread that keeps the GIL keeps every other thread away, too: nothing can be done then.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from typing import Any

import attrs


class _Question:
    """Asks the main thread to answer when it comes back to Python."""

    def __init__(self) -> None:
        import ctypes

        libc = ctypes.CDLL(None)
        self._answer: Any = (ctypes.c_long * 16)()  # a sem_t is at most 32 bytes
        self._take = libc.sem_trywait
        self._answered = False
        if libc.sem_init(self._answer, 0, 0) != 0:  # macOS has none without a name
            raise OSError("sem_init(3) is not supported")
        post = ctypes.cast(libc.sem_post, ctypes.c_void_p)
        if ctypes.pythonapi.Py_AddPendingCall(post, ctypes.byref(self._answer)) != 0:
            raise OSError("too many pending calls")

    def is_answered(self) -> bool:
        self._answered = self._answered or self._take(self._answer) == 0
        return self._answered


@attrs.define(eq=False, repr=False)
class _Unanswered:
    """A signal that has come. ``seconds`` are those that this process has run since."""

    since: float  # monotonic, as all times here
    question: _Question
    seconds: float = 0.0


class _Listener:
    """Knows which signals the main thread has not answered to. There is one wakeup fd in a process,
    so there is one listener.
    """

    def __init__(self) -> None:
        self.users = 0
        self.pipe: tuple[int, int] | None = None
        self.answers: dict[int, float] = {}  # when a handler ran, by signal
        self.looked_at = -math.inf
        self.unanswered: dict[int, _Unanswered] = {}
        # What was asked must stay where it is until it is answered: sem_post(3) writes to it.
        self.asked: list[_Question] = []

    def open(self) -> None:
        """Take the wakeup fd, unless somebody has it.

        Raises:
            OSError: Somebody has it, or there are no descriptors left.
            ValueError: This is not the main thread of the main interpreter.
        """
        if self.pipe is not None:  # left by a close in another thread, and still in its place
            return
        read, write = os.pipe()
        try:
            for end in (read, write):
                os.set_blocking(end, False)
            theirs = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            if theirs != -1:
                signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
                with contextlib.suppress(OSError):  # nothing came between the two
                    os.write(theirs, os.read(read, 4096))
                raise OSError("an event loop, or somebody else, has the wakeup fd")
        except BaseException:
            os.close(read)
            os.close(write)
            raise
        self.pipe = read, write
        self.looked_at = time.monotonic()

    def close(self) -> None:
        if self.pipe is None:
            return
        try:
            current = signal.set_wakeup_fd(-1)
        except ValueError:  # another thread. A pipe that is closed may be anybody's file later,
            return  #         and signals would be written into that.
        if current not in (-1, self.pipe[1]):
            signal.set_wakeup_fd(current, warn_on_full_buffer=False)
        for end in self.pipe:
            os.close(end)
        self.pipe = None
        self.unanswered.clear()

    def look(self, at_most: float) -> dict[int, float]:
        now, before = time.monotonic(), self.looked_at
        self.looked_at = now  # before it is read: what comes now is seen now or the next time
        for one in self.unanswered.values():
            # A process that was stopped (SIGSTOP, a suspended job) has not been deaf meanwhile.
            one.seconds += min(now - before, at_most)
        for signum in self._arrived():
            if signum not in self.unanswered and self._answered_at(signum) <= before:
                # Where nothing can be asked, nobody is deaf: a false kill is worse than a hang.
                with contextlib.suppress(OSError, ImportError, AttributeError):
                    question = _Question()
                    self.asked.append(question)
                    self.unanswered[signum] = _Unanswered(now, question)
        for signum, one in tuple(self.unanswered.items()):
            if one.question.is_answered() or self._answered_at(signum) >= one.since:
                del self.unanswered[signum]
        self.asked = [question for question in self.asked if not question.is_answered()]
        return {signum: one.seconds for signum, one in self.unanswered.items()}

    def _arrived(self) -> set[int]:
        found: set[int] = set()
        while self.pipe is not None:
            try:
                some = os.read(self.pipe[0], 4096)
            except OSError:  # there are no more
                break
            found.update(some)
            if not some:
                break
        return found

    def _answered_at(self, signum: int) -> float:
        return self.answers.get(signum, -math.inf)


_listener = _Listener()


def listen() -> None:
    """From now on `unanswered` may be asked. For the main thread, with signals kept away.

    Raises:
        OSError: Somebody else has the wakeup fd, or there are no descriptors left.
        ValueError: This is not the main thread of the main interpreter.
    """
    _listener.open()
    _listener.users += 1


def stop_listening() -> None:
    """One that has called `listen` is done."""
    _listener.users -= 1
    if _listener.users == 0:
        _listener.close()


def answer(signum: int) -> None:
    """To be called first in a handler of Python's."""
    _listener.answers[signum] = time.monotonic()


def unanswered(at_most: float) -> dict[int, float]:
    """Signals that have come while the main thread was in C and has stayed there, with the seconds
    since; ``at_most`` as many as that are counted from one look to the next. To be asked now and
    then, from one and the same other thread.
    """
    return _listener.look(at_most)


def where_main_thread_is() -> str:
    """The innermost place in Python, for a person."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "nowhere in Python"
    code = frame.f_code
    return f"in {code.co_name} ({code.co_filename}:{frame.f_lineno})"


def end_by_default(signum: int) -> None:
    """End this process as the signal would, had nobody ever handled it.

    `signal.signal` refuses outside of the main thread; that of libc does not.
    """
    import ctypes

    libc_signal = ctypes.CDLL(None).signal
    libc_signal.argtypes, libc_signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc_signal(signum, None)  # SIG_DFL
    os.kill(os.getpid(), signum)
    # The kernel drops that for the first process of a container, and while every thread blocks it.
    time.sleep(1.0)
    os._exit(128 + signum)


def _start_anew() -> None:
    """In a forked child: its signals are not its parent's, who would be taken for deaf."""
    global _listener
    listener, _listener = _listener, _Listener()
    _listener.asked = listener.asked  # its calls are still pending here
    with contextlib.suppress(OSError):
        listener.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
