"""Keeping signals away while a step and its way back are put together."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import signal
from collections.abc import Iterator

# Not the ones by which the kernel reports a fault of the thread itself.
_FAULTS = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
_SIGNALS = frozenset(map(int, signal.valid_signals())).difference(
    int(getattr(signal, name)) for name in _FAULTS if hasattr(signal, name)
)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """What arrives inside is raised at the end of it.

    An exception out of a signal handler, be it a Ctrl-C, may come between any two lines: after a
    lock was taken, and before anybody knows of it. Only for what never waits, and starts no
    process: that would inherit the mask, see sigprocmask(2). So does a thread that is started
    inside, which is right: signals are for the main thread.

    A thread that somebody else has started may still get the signal, and then it is raised here.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # Past signal.pthread_sigmask, which makes an enum of each of them: 100 us.
    before = _signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        _signal.pthread_sigmask(signal.SIG_SETMASK, before)
