"""Signals that ask the wrapper itself to end, while it has no command to pass them on to."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Interrupted(Exception):
    """A signal that asks us to end arrived while no command was running."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have Ctrl-C, SIGTERM, SIGHUP and SIGQUIT raise `Interrupted` once. A signal that is ignored
    stays ignored.
    """

    def interrupt(signum: int, frame: object) -> None:
        for other in watched:
            signal.signal(other, signal.SIG_IGN)  # the way out is not interrupted
        raise Interrupted(signum)

    watched = [s for s in END_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, interrupt) for signum in watched}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
