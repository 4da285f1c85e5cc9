"""Keeping signals away while a step and its way back are put together."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import FrameType

if sys.platform != "win32":
    try:  # that of signal makes an enum of each signal: 4 us each time that they are unblocked
        from _signal import pthread_sigmask  # type: ignore[import-not-found]
    except ImportError:
        from signal import pthread_sigmask

# Signals whose handlers raise in some program or other.
_HANDLED = (
    *("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGCHLD"),
    *("SIGUSR1", "SIGUSR2", "SIGXCPU"),
)
_signals = frozenset(int(getattr(signal, name)) for name in _HANDLED if hasattr(signal, name))
_outer = threading.local()  # .mask is what `uninterrupted` puts back in this thread


def keep_away(signums: Iterable[int]) -> None:
    """From now on, have `uninterrupted` block these signals as well."""
    global _signals
    _signals |= frozenset(map(int, signums))


class _Nested:
    """Within another `uninterrupted` the signals are blocked already."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


_nested = _Nested()


def uninterrupted() -> AbstractContextManager[None]:
    """Signals that arrive inside the block are delivered when it ends.

    An exception from a signal handler, such as a Ctrl-C, may come between any two lines: after a
    lock was taken, and before anybody knows of it. Only for code that never waits, and starts no
    process: a child would inherit the mask, see sigprocmask(2). A thread that is started inside
    inherits it too, which is right: signals are for the main thread.

    A thread that somebody else has started may still receive the signal. Its handler then runs in
    the main thread, inside the block.
    """
    if sys.platform == "win32" or getattr(_outer, "mask", None) is not None:
        return _nested
    return _masked()


# A generator: one that an exception leaves suspended is closed, and puts the mask back.
@contextlib.contextmanager
def _masked() -> Iterator[None]:
    before = None
    try:
        # Read first: a Ctrl-C between the block and the assignment would leave signals blocked.
        before = _outer.mask = pthread_sigmask(signal.SIG_BLOCK, ())
        pthread_sigmask(signal.SIG_BLOCK, _signals)
        yield
    finally:
        if before is not None:
            try:
                _put_back(before)
            except BaseException:
                _put_back(before)  # a handler raised on the way into the first call
                raise


def _put_back(mask: set[int] | set[signal.Signals]) -> None:
    _outer.mask = None
    if sys.platform != "win32":
        pthread_sigmask(signal.SIG_SETMASK, mask)


class interruptible:
    """Inside of `uninterrupted`: a part that may take long, and that a signal may end.

    Only for code of which nothing is left to undo when an exception ends it at any line. After such
    an exception signals may not be kept away any more, until the next `uninterrupted`.
    """

    # No generator: one that an exception leaves suspended would block the signals when it is
    # collected, at some later time.

    def __enter__(self) -> None:
        self._mask = getattr(_outer, "mask", None)
        if self._mask is not None:
            try:
                _put_back(self._mask)
            except BaseException:  # from the handler of a signal that has waited
                self.__exit__()
                raise

    def __exit__(self, *error: object) -> None:
        if self._mask is not None and sys.platform != "win32":
            pthread_sigmask(signal.SIG_BLOCK, _signals)
            _outer.mask = self._mask


@contextlib.contextmanager
def child_signals_deferred() -> Iterator[None]:
    """A Python handler of SIGCHLD is called once after the block, if the signal came inside.

    torch's handler raises when a worker of a DataLoader was killed, and would break off whatever
    the main thread is doing. A mask does not hold SIGCHLD back: any other thread may receive it,
    and the handler then runs in the main thread all the same.

    Outside of the main thread nothing is deferred, because no handler runs there. What the
    handler raises is raised at the end of the block.
    """
    chld: int | None = getattr(signal, "SIGCHLD", None)
    theirs = None if chld is None else signal.getsignal(chld)
    if chld is None or not callable(theirs) or not is_in_main_thread():
        yield
        return
    arrived: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        arrived.append(signum)

    def put_back() -> None:
        if signal.getsignal(chld) is note:  # else somebody has installed another one since
            signal.signal(chld, theirs)

    try:
        with contextlib.suppress(ValueError):  # a subinterpreter: nothing is deferred
            signal.signal(chld, note)
        yield
    finally:
        try:
            put_back()
        finally:
            put_back()  # again, if a handler raised on the way into the first call
        if arrived:
            theirs(chld, sys._getframe())


def is_in_main_thread() -> bool:
    """Whether this is the thread in which Python runs signal handlers."""
    return threading.get_ident() == threading.main_thread().ident
