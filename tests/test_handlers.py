"""Signal handlers that interrupt each other, and the moments at which they raise nothing.

What this means for real programs is in e2e/test_signals_alone.py.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from orchard_infra.stopping.takeover import Takeover, is_bad_moment


class Storm(Takeover):
    """Is hit by another signal while it acts upon one, and again."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.seen: list[tuple[str, int]] = []

    def act(self, signum: int, frame: FrameType | None) -> None:
        self.seen.append(("act", self.depth))
        self.depth += 1
        if len(self.seen) < 10:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR2)
        self.depth -= 1

    def put_off(self, signum: int) -> None:
        self.seen.append(("put off", self.depth))


def test_a_signal_that_comes_while_one_is_acted_upon_is_put_off():
    storm = Storm()
    storm.take_over([signal.SIGUSR1, signal.SIGUSR2])
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert storm.seen == [("act", 0), ("put off", 1), ("put off", 1)]
        signal.raise_signal(signal.SIGUSR2)
        assert storm.seen[3:] == [("act", 0), ("put off", 1), ("put off", 1)]
    finally:
        storm.give_back()


def test_an_exception_out_of_a_handler_does_not_make_it_deaf():
    class Raises(Storm):
        def act(self, signum: int, frame: FrameType | None) -> None:
            raise KeyError(signum)

    raises = Raises()
    raises.take_over([signal.SIGUSR1])
    try:
        for _ in range(2):
            with pytest.raises(KeyError):
                signal.raise_signal(signal.SIGUSR1)
    finally:
        raises.give_back()


def test_after_one_that_ended_in_another_thread_the_next_one_takes_over_all_the_same():
    class Calm(Storm):
        def act(self, signum: int, frame: FrameType | None) -> None:
            self.seen.append(("act", 0))

    first, second = Calm(), Calm()
    first.take_over([signal.SIGUSR1])
    ending = threading.Thread(target=first.give_back)
    ending.start()
    ending.join()
    assert second.take_over([signal.SIGUSR1]) == []
    signal.raise_signal(signal.SIGUSR1)
    assert second.seen
    second.give_back()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def stack(*codes: Any) -> Any:
    """Frames that run these functions, the innermost first."""
    frame = None
    for function in reversed(codes):
        frame = SimpleNamespace(f_code=function.__code__, f_back=frame)
    return frame


def steps() -> None:
    """A user's function."""


@pytest.mark.parametrize(
    ("functions", "bad"),
    [
        ([steps], False),
        ([logging.Handler.handle, steps], True),
        ([logging.StreamHandler.flush, steps], True),
        ([logging.Logger.isEnabledFor, steps], True),
        ([threading.Thread.start, steps], True),
        # With the lock in its hands, but within a try that lets go of it.
        ([logging.StreamHandler.emit, logging.Handler.handle, steps], False),
        # A handler that has put off its own signal is about to return into this.
        ([Takeover._handle, logging.Handler.release, steps], True),
        ([Takeover._handle, Takeover._handle, logging.Handler.release, steps], True),
        ([Takeover._handle, steps, logging.Handler.handle], False),
    ],
)
def test_while_a_lock_changes_hands_nothing_is_raised_for_a_second(functions, bad):
    assert is_bad_moment(stack(*functions), waited=0.0) is bad
    assert is_bad_moment(stack(*functions), waited=0.9) is bad
    assert not is_bad_moment(stack(*functions), waited=1.1)
