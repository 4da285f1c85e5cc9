"""What a stopper is made of, and what it leaves behind: nothing."""

from __future__ import annotations

import logging
import os
import pickle
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchard_infra import RunStopped, SignalStop, Stopper, StopRequest, StopWatch
from orchard_infra.errors import InfrastructureError

LOGGER = logging.getLogger("stopping")
WATCHED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No handler, thread, descriptor or blocked signal outlives a watch."""
    # Tests that are run by nohup or in the background ignore these.
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = _state()
    yield
    after = _state()
    signal.signal(signal.SIGHUP, hang_up)
    signal.signal(signal.SIGINT, ctrl_c)
    assert after == before


def _state() -> tuple[object, ...]:
    return (
        [signal.getsignal(signum) for signum in WATCHED],
        [thread.name for thread in threading.enumerate() if "orchard" in thread.name],
        len(os.listdir("/proc/self/fd")),
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    )


def signal_when_installed(monkeypatch: pytest.MonkeyPatch, *signums: int) -> None:
    """Send ourselves signals right after the first handler has been installed."""
    install, pending = signal.signal, list(signums)

    def patched(signum: int, handler: Callable[..., object]) -> object:
        previous = install(signum, handler)
        if pending and signum == pending[0]:
            monkeypatch.setattr(signal, "signal", install)
            for each in pending:
                os.kill(os.getpid(), each)
        return previous

    monkeypatch.setattr(signal, "signal", patched)


def test_run_stopped_is_an_exit_that_says_which_signal_it_was():
    stopped = RunStopped(signal.SIGTERM)
    assert isinstance(stopped, SystemExit)
    assert not isinstance(stopped, (Exception, InfrastructureError))
    assert (stopped.code, stopped.signum) == (143, signal.SIGTERM)
    assert str(stopped) == "stopped by SIGTERM"


def test_run_stopped_survives_pickling():
    again = pickle.loads(pickle.dumps(RunStopped(signal.SIGHUP)))
    assert (again.code, again.signum) == (129, signal.SIGHUP)


def test_a_request_is_true_so_that_a_loop_can_ask_for_it():
    assert StopRequest("", at=0.0)


def test_by_default_the_signals_are_those_that_end_a_job_and_a_terminal():
    assert SignalStop().signals == (signal.SIGTERM, signal.SIGHUP)


def test_signals_may_be_numbers_in_any_collection():
    assert SignalStop(signals=[int(signal.SIGUSR1)]).signals == (signal.SIGUSR1,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "flags"}, "mode"),
        ({"deadline": 1.0}, 'mode="flag"'),
        ({"mode": "flag", "deadline": -1.0}, "deadline"),
        ({"hold_limit": -1.0}, "hold_limit"),
        ({"signals": (signal.SIGKILL,)}, "SIGKILL cannot be caught"),
        ({"signals": (signal.SIGSTOP,)}, "SIGSTOP cannot be caught"),
        ({"signals": (999,)}, "999"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        SignalStop(**options)


def test_a_stopper_of_one_s_own_needs_no_base_class():
    class Watch:
        requested = None

        def on_stop(self, callback: Callable[[StopRequest], object]) -> None: ...
        def request(self, reason: str) -> None: ...
        def hold(self) -> None: ...
        def disarm(self) -> BaseException | None:
            return None

    class Mine:
        def arm(self, logger: logging.Logger) -> StopWatch:
            return Watch()

    stopper: Stopper = Mine()
    assert stopper.arm(LOGGER).disarm() is None


def test_a_request_from_a_thread_sets_the_flag_and_raises_nothing():
    watch = SignalStop().arm(LOGGER)
    heard: list[StopRequest] = []
    watch.on_stop(heard.append)
    for reason in ("the lock is lost", "again"):
        thread = threading.Thread(target=watch.request, args=(reason,))
        thread.start()
        thread.join()
    watch.hold()
    assert watch.requested is not None
    assert watch.requested.reason == "the lock is lost"
    assert watch.requested.signal is None
    assert abs(watch.requested.at - time.time()) < 60
    assert heard == [watch.requested]
    assert watch.disarm() is None


def test_a_watch_that_hears_nothing_says_nothing(caplog):
    caplog.set_level(logging.DEBUG)
    watch = SignalStop("flag", deadline=1e9).arm(LOGGER)
    watch.hold()
    assert watch.disarm() is None
    assert watch.requested is None
    assert caplog.messages == []


def test_the_thread_of_a_watch_takes_no_signal_away_from_the_main_thread():
    """One that it took would not interrupt a call in which the main thread waits."""
    watch = SignalStop().arm(LOGGER)
    thread = next(t for t in threading.enumerate() if "orchard" in t.name)
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    watch.disarm()
    assert blocked >> (signal.SIGTERM - 1) & 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_many_watches_leave_nothing_behind():
    for _ in range(50):
        watch = SignalStop("flag", deadline=float("inf")).arm(LOGGER)
        watch.disarm()


def test_ending_a_watch_twice_does_no_harm():
    watch = SignalStop().arm(LOGGER)
    watch.hold()
    watch.hold()
    assert watch.disarm() is None
    handlers = _state()
    watch.hold()
    assert watch.disarm() is None
    assert _state() == handlers


def test_two_watches_of_one_stopper_know_nothing_of_each_other():
    stopper = SignalStop("flag")
    first = stopper.arm(LOGGER)
    first.request("only the first")
    first.disarm()
    second = stopper.arm(LOGGER)
    assert second.requested is None
    second.disarm()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_watch_begins_stops_the_run_and_puts_everything_back(
    monkeypatch, signum
):
    signal_when_installed(monkeypatch, signum, signal.SIGTERM)
    with pytest.raises(RunStopped) as caught:  # noqa: PT012 - in here or soon after
        watch = SignalStop().arm(LOGGER)
        try:
            time.sleep(60)
        finally:
            watch.disarm()
    assert caught.value.signum in (signum, signal.SIGTERM)


def test_a_signal_while_the_watch_begins_may_be_a_flag(monkeypatch):
    signal_when_installed(monkeypatch, signal.SIGTERM)
    watch = SignalStop("flag").arm(LOGGER)
    assert watch.requested is not None
    watch.disarm()


def test_an_exception_while_the_watch_begins_puts_everything_back(monkeypatch):
    install = signal.signal

    def interrupted(signum: int, handler: object) -> object:
        if signum == signal.SIGHUP:
            monkeypatch.setattr(signal, "signal", install)
            raise KeyboardInterrupt
        return install(signum, handler)  # type: ignore[arg-type]

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SignalStop().arm(LOGGER)


@pytest.mark.parametrize("mode", ["raise", "flag"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_watch_ends_is_returned(monkeypatch, mode, signum):
    watch = SignalStop(mode, signals=(signal.SIGTERM,)).arm(LOGGER)
    install = signal.signal

    def patched(number: int, handler: object) -> object:
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            monkeypatch.setattr(signal, "signal", install)
            os.kill(os.getpid(), signum)
        return install(number, handler)  # type: ignore[arg-type]

    monkeypatch.setattr(signal, "signal", patched)
    late = watch.disarm()
    assert isinstance(late, KeyboardInterrupt if signum == signal.SIGINT else RunStopped)


def test_a_signal_that_python_forgets_while_the_handler_changes_is_returned(monkeypatch):
    """Python writes it to the wakeup descriptor and then ignores it, "due to race condition"."""
    watch = SignalStop(signals=(signal.SIGUSR1,)).arm(LOGGER)
    install = signal.signal

    def patched(number: int, handler: object) -> object:
        result = install(number, handler)  # type: ignore[arg-type]
        if number == signal.SIGUSR1:
            wakeup = signal.set_wakeup_fd(-1)
            os.write(wakeup, bytes([number, signal.SIGCHLD]))
            signal.set_wakeup_fd(wakeup)
        return result

    monkeypatch.setattr(signal, "signal", patched)
    late = watch.disarm()
    assert isinstance(late, RunStopped)
    assert late.signum == signal.SIGUSR1


def test_an_event_loop_is_told_of_signals_that_came_meanwhile(monkeypatch):
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    try:
        test_a_signal_that_python_forgets_while_the_handler_changes_is_returned(monkeypatch)
        assert signal.set_wakeup_fd(-1) == write
        assert os.read(read, 100) == bytes([signal.SIGUSR1, signal.SIGCHLD])
    finally:
        signal.set_wakeup_fd(-1)
        os.close(read)
        os.close(write)


def test_a_watch_ends_also_where_no_descriptor_is_left():
    watch = SignalStop().arm(LOGGER)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        late = watch.disarm()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert late is None


def test_where_no_thread_can_be_started_signals_are_not_watched(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    watch = SignalStop("flag").arm(LOGGER)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    watch.request("the lock is lost")
    assert watch.requested is not None
    assert watch.disarm() is None
    assert caplog.messages == ["signals are not watched: can't start new thread"]
