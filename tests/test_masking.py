"""Signals that are kept away for a moment, at any instant of it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from orchard_infra.system.masking import (
    child_signals_deferred,
    interruptible,
    keep_away,
    uninterrupted,
)


class Interrupted(Exception):
    """Raised by the handlers of these tests."""


def raise_interrupted(signum: int, frame: object) -> None:
    raise Interrupted(signum)


@pytest.fixture(autouse=True)
def nothing_stays_blocked() -> Iterator[None]:
    before = {s: signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGUSR1, signal.SIGCHLD)}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for signum, handler in before.items():
        signal.signal(signum, handler)
    assert signal.pthread_sigmask(signal.SIG_SETMASK, ()) == set()


def handle(signum: int, handler: Callable[[int, Any], None] = raise_interrupted) -> None:
    signal.signal(signum, handler)


armed = False


def raise_if_armed(signum: int, frame: object) -> None:
    if armed:
        raise Interrupted(signum)


def hit(block: Callable[[], object], *, within: float) -> bool:
    """Whether one SIGALRM at a random instant, for `raise_if_armed`, interrupted the block."""
    global armed
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, within))
            block()
        finally:
            armed = False
    except Interrupted:
        armed = False
        return True
    signal.setitimer(signal.ITIMER_REAL, 0)
    return False


@pytest.mark.parametrize("threads", [0, 1])
def test_a_signal_at_any_instant_leaves_no_signal_blocked(threads):
    """With a thread that receives signals too, the handler runs even where they are blocked."""
    handle(signal.SIGALRM, raise_if_armed)
    ended = threading.Event()
    others = [threading.Thread(target=ended.wait) for _ in range(threads)]
    for thread in others:
        thread.start()

    def block() -> None:
        with uninterrupted(), uninterrupted():
            pass
        sum(range(300))

    hits = stuck = 0
    try:
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            hits += hit(block, within=60e-6)
            stuck += bool(signal.pthread_sigmask(signal.SIG_SETMASK, ()))
    finally:
        ended.set()
        for thread in others:
            thread.join()
    assert hits > 100
    assert stuck == 0


def test_a_signal_inside_is_delivered_at_the_end():
    handle(signal.SIGUSR1)
    seen = []
    with pytest.raises(Interrupted):  # noqa: PT012 - at the end
        with uninterrupted():
            signal.raise_signal(signal.SIGUSR1)
            seen.append("the rest of the block")
        seen.append("unreachable")
    assert seen == ["the rest of the block"]


def test_within_another_one_nothing_is_delivered_yet():
    handle(signal.SIGUSR1)
    seen = []
    with suppress(Interrupted), uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGUSR1)
        seen.append("the outer one goes on")
    assert seen == ["the outer one goes on"]


def test_a_part_of_it_may_be_interrupted():
    handle(signal.SIGUSR1)
    with uninterrupted():
        with uninterrupted(), pytest.raises(Interrupted), interruptible():  # noqa: PT012
            with uninterrupted():
                pass
            signal.raise_signal(signal.SIGUSR1)
            raise AssertionError("unreachable")
        signal.raise_signal(signal.SIGUSR1)
        assert signal.sigpending() == {signal.SIGUSR1}
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def test_a_signal_that_has_waited_is_raised_on_the_way_into_such_a_part():
    handle(signal.SIGUSR1)
    with uninterrupted():
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Interrupted), interruptible():
            raise AssertionError("unreachable")
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_signal_at_any_instant_of_such_a_part_leaves_no_signal_blocked():
    """Nor does it block them later, when what the signal broke off is collected."""
    handle(signal.SIGALRM, raise_if_armed)
    errors: list[BaseException] = []

    def block() -> None:
        with uninterrupted():
            try:
                for _ in range(5):
                    with interruptible():
                        pass
            except Interrupted as error:
                errors.append(error)  # and with it all frames

    hits = stuck = 0
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        hit(block, within=60e-6)
        stuck += bool(signal.pthread_sigmask(signal.SIG_SETMASK, ()))
        hits += len(errors)
        errors.clear()
        stuck += bool(signal.pthread_sigmask(signal.SIG_SETMASK, ()))
    assert hits > 100
    assert stuck == 0


def test_a_mask_of_one_s_own_stays():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    with uninterrupted(), interruptible():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGUSR1}
    assert signal.pthread_sigmask(signal.SIG_SETMASK, ()) == {signal.SIGUSR1}


def test_a_signal_that_few_programs_handle_is_kept_away_once_asked_for():
    keep_away([signal.SIGWINCH, signal.SIGRTMIN])
    with uninterrupted():
        assert signal.SIGRTMIN in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_it_is_cheap():
    """It is entered a dozen times in a cycle that is to take 300 us. With all signals: 100 us."""

    def once() -> float:
        began = time.perf_counter()
        with uninterrupted():
            pass
        return time.perf_counter() - began

    assert min(once() for _ in range(200)) < 50e-6


# SIGCHLD


def end_a_child() -> None:
    subprocess.run([sys.executable, "-S", "-c", ""], check=True)


@pytest.mark.parametrize("failed", [False, True])
def test_a_handler_of_sigchld_is_called_once_after_the_block(failed):
    """Also where another thread receives the signal, which no mask holds back."""
    seen: list[object] = []
    handle(signal.SIGCHLD, lambda signum, frame: seen.append((signum, frame is not None)))
    theirs = signal.getsignal(signal.SIGCHLD)
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    with suppress(KeyError), child_signals_deferred():
        for _ in range(2):
            end_a_child()
        seen.append("the rest of the block")
        if failed:
            raise KeyError
    ended.set()
    thread.join()
    assert seen == ["the rest of the block", (signal.SIGCHLD, True)]
    assert signal.getsignal(signal.SIGCHLD) is theirs


def test_without_a_sigchld_the_handler_is_not_called():
    seen: list[object] = []
    handle(signal.SIGCHLD, lambda *args: seen.append(args))
    with child_signals_deferred():
        pass
    assert seen == []


def test_what_the_handler_raises_is_raised_after_the_block():
    handle(signal.SIGCHLD)
    seen = []
    with pytest.raises(Interrupted), child_signals_deferred():  # noqa: PT012 - at the end
        end_a_child()
        seen.append("the rest of the block")
    assert seen == ["the rest of the block"]
    assert signal.getsignal(signal.SIGCHLD) is raise_interrupted


def test_deferred_within_deferred_it_is_called_once_in_the_end():
    seen: list[object] = []
    handle(signal.SIGCHLD, lambda *args: seen.append("called"))
    with child_signals_deferred():
        with child_signals_deferred():
            end_a_child()
        seen.append("the inner one has ended")
    assert seen == ["the inner one has ended", "called"]


@pytest.mark.parametrize("theirs", [signal.SIG_DFL, signal.SIG_IGN])
def test_who_handles_no_sigchld_keeps_it_so(theirs):
    signal.signal(signal.SIGCHLD, theirs)
    with child_signals_deferred():
        assert signal.getsignal(signal.SIGCHLD) is theirs
    assert signal.getsignal(signal.SIGCHLD) is theirs


def test_a_handler_that_is_installed_inside_stays():
    handle(signal.SIGCHLD)

    def newer(signum: int, frame: object) -> None: ...

    with child_signals_deferred():
        signal.signal(signal.SIGCHLD, newer)
    assert signal.getsignal(signal.SIGCHLD) is newer


def test_another_thread_defers_nothing_and_does_not_fail():
    handle(signal.SIGCHLD)
    seen: list[object] = []

    def work() -> None:
        with child_signals_deferred():
            seen.append(signal.getsignal(signal.SIGCHLD))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [raise_interrupted]


def test_a_signal_at_any_instant_leaves_the_handler_of_sigchld_in_its_place():
    handle(signal.SIGALRM, raise_if_armed)
    handle(signal.SIGCHLD)

    def block() -> None:
        with child_signals_deferred():
            pass
        sum(range(100))

    hits = lost = 0
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        hits += hit(block, within=60e-6)
        lost += signal.getsignal(signal.SIGCHLD) is not raise_interrupted
        handle(signal.SIGCHLD)
    assert hits > 100
    assert lost == 0
