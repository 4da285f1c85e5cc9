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

from orchard_infra import Environment, RunStopped, SignalStop, StopRequest
from orchard_infra.errors import InfrastructureError
from orchard_infra.runs.record import describe_this_run
from orchard_infra.system import background
from orchard_infra.system.masking import uninterrupted

WATCHED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
RUN = describe_this_run("stopping")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No handler, task, descriptor or blocked signal outlives an environment."""
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
        len(background._background.tasks),
        len(os.listdir("/proc/self/fd")),
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    )


class Armed:
    """An environment with a stopper and nothing else, entered and left as a session does it."""

    def __init__(self, stopper: SignalStop) -> None:
        self.env = Environment(run=RUN, lock_path=Path("none"))
        self.around = stopper.around(self.env)
        try:
            with uninterrupted():
                self.env._begin()
                self.around.__enter__()
        except BaseException:
            self.leave()
            raise

    def hold(self) -> None:
        for step in self.env._before_release:
            step()

    def leave(self, error: BaseException | None = None) -> BaseException | None:
        """Returns what the stopper raises."""
        self.hold()
        try:
            self.around.__exit__(error and type(error), error, None)  # type: ignore[arg-type]
        except BaseException as late:
            return late
        finally:
            self.env._end()
        return None


def signal_when_installed(monkeypatch: pytest.MonkeyPatch, *signums: int) -> None:
    """Send ourselves signals right after the first handler has been installed."""
    install, pending = signal.signal, list(signums)

    def patched(signum: int, handler: Callable[..., object]) -> object:
        previous = install(signum, handler)
        if pending and signum == pending[0]:
            monkeypatch.setattr(signal, "signal", install)
            for each in pending:
                signal.raise_signal(each)
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
        ({"blocked_limit": 0.0}, "blocked_limit"),
        ({"signals": (signal.SIGKILL,)}, "SIGKILL cannot be caught"),
        ({"signals": (signal.SIGSTOP,)}, "SIGSTOP cannot be caught"),
        ({"signals": (999,)}, "999"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        SignalStop(**options)


def test_a_request_from_a_thread_sets_the_flag_and_raises_nothing():
    armed = Armed(SignalStop())
    heard: list[StopRequest] = []
    armed.env.on_stop(heard.append)
    for reason in ("the lock is lost", "again"):
        thread = threading.Thread(target=armed.env.request_stop, args=(reason,))
        thread.start()
        thread.join()
    armed.hold()
    request = armed.env.stop_requested
    assert request is not None
    assert request.reason == "the lock is lost"
    assert request.signal is None
    assert abs(request.at - time.time()) < 60
    assert heard == [request]
    assert armed.leave() is None


def test_a_stopper_that_hears_nothing_says_nothing(caplog):
    caplog.set_level(logging.DEBUG)
    armed = Armed(SignalStop("flag", deadline=1e9))
    assert armed.leave() is None
    assert armed.env.stop_requested is None
    assert caplog.messages == []


def test_many_environments_leave_nothing_behind():
    for _ in range(50):
        assert Armed(SignalStop("flag", deadline=float("inf"))).leave() is None


def test_to_leave_twice_does_no_harm():
    armed = Armed(SignalStop())
    armed.hold()
    assert armed.leave() is None
    state = _state()
    assert armed.leave() is None
    assert _state() == state


def test_two_environments_of_one_stopper_know_nothing_of_each_other():
    stopper = SignalStop("flag")
    first = Armed(stopper)
    first.env.request_stop("only the first")
    first.leave()
    second = Armed(stopper)
    assert second.env.stop_requested is None
    second.leave()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("masked", [True, False])
def test_a_signal_on_the_way_in_stops_the_run_and_puts_everything_back(monkeypatch, signum, masked):
    """Masked, as a session enters it; and as it is when another thread receives the signal."""
    if not masked:
        monkeypatch.setitem(globals(), "uninterrupted", threading.RLock)
    signal_when_installed(monkeypatch, signum, signal.SIGTERM)
    with pytest.raises(RunStopped) as caught:  # noqa: PT012 - in here or soon after
        armed = Armed(SignalStop())
        try:
            time.sleep(60)
        finally:
            armed.leave()
    assert caught.value.signum in (signum, signal.SIGTERM)


def test_a_signal_on_the_way_in_may_be_a_flag(monkeypatch):
    signal_when_installed(monkeypatch, signal.SIGTERM)
    armed = Armed(SignalStop("flag"))
    assert armed.env.stop_requested is not None
    armed.leave()


def test_an_exception_on_the_way_in_puts_everything_back(monkeypatch):
    install = signal.signal

    def interrupted(signum: int, handler: object) -> object:
        if signum == signal.SIGHUP:
            monkeypatch.setattr(signal, "signal", install)
            raise KeyboardInterrupt
        return install(signum, handler)  # type: ignore[arg-type]

    monkeypatch.setattr(signal, "signal", interrupted)
    env = Environment(run=RUN, lock_path=Path("none"))
    with pytest.raises(KeyboardInterrupt), SignalStop().around(env):
        raise AssertionError("unreachable")


@pytest.mark.parametrize("mode", ["raise", "flag"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_handlers_go_back_is_raised(monkeypatch, mode, signum):
    armed = Armed(SignalStop(mode, signals=(signal.SIGTERM,)))
    install = signal.signal

    def patched(number: int, handler: object) -> object:
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            monkeypatch.setattr(signal, "signal", install)
            signal.raise_signal(signum)
        return install(number, handler)  # type: ignore[arg-type]

    monkeypatch.setattr(signal, "signal", patched)
    late = armed.leave()
    assert isinstance(late, KeyboardInterrupt if signum == signal.SIGINT else RunStopped)


def test_a_signal_that_python_forgets_while_the_handler_changes_is_raised(monkeypatch):
    """Python writes it to the wakeup descriptor and then ignores it, "due to race condition"."""
    armed = Armed(SignalStop(signals=(signal.SIGUSR1,)))
    install = signal.signal

    def patched(number: int, handler: object) -> object:
        result = install(number, handler)  # type: ignore[arg-type]
        if number == signal.SIGUSR1:
            wakeup = signal.set_wakeup_fd(-1)
            os.write(wakeup, bytes([number, signal.SIGCHLD]))
            signal.set_wakeup_fd(wakeup)
        return result

    monkeypatch.setattr(signal, "signal", patched)
    late = armed.leave()
    assert isinstance(late, RunStopped)
    assert late.signum == signal.SIGUSR1


def test_an_event_loop_is_told_of_signals_that_came_meanwhile(monkeypatch):
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    try:
        test_a_signal_that_python_forgets_while_the_handler_changes_is_raised(monkeypatch)
        assert signal.set_wakeup_fd(-1) == write
        assert os.read(read, 100) == bytes([signal.SIGUSR1, signal.SIGCHLD])
    finally:
        signal.set_wakeup_fd(-1)
        os.close(read)
        os.close(write)


def test_the_handlers_go_back_also_where_no_descriptor_is_left():
    armed = Armed(SignalStop())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        late = armed.leave()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert late is None


def test_where_no_thread_can_be_started_signals_are_not_watched(monkeypatch, caplog):
    background._background.end()  # one that serves an earlier test
    caplog.set_level(logging.DEBUG)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    armed = Armed(SignalStop("flag"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    armed.env.request_stop("the lock is lost")
    assert armed.env.stop_requested is not None
    assert armed.leave() is None
    assert "signals are not watched: no thread can be started" in caplog.messages
    assert "stop requested: the lock is lost" in caplog.messages


# A stop is never lost


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "error", [None, ValueError("the trial failed"), SystemExit(3), GeneratorExit()]
)
def test_what_comes_during_the_release_is_raised_whatever_the_run_ended_with(signum, error):
    armed = Armed(SignalStop())
    armed.hold()
    signal.raise_signal(signum)
    late = armed.leave(error)
    assert isinstance(late, KeyboardInterrupt if signum == signal.SIGINT else RunStopped)


@pytest.mark.parametrize("mode", ["raise", "flag"])
def test_a_run_that_was_stopped_is_not_stopped_again_by_what_came_twice(mode):
    """A launcher passes on the signal that its children got as well."""
    armed = Armed(SignalStop(mode))
    armed.hold()
    signal.raise_signal(signal.SIGTERM)
    assert armed.leave(RunStopped(signal.SIGTERM)) is None


def test_a_ctrl_c_and_a_sigterm_are_two_stops():
    """Who catches the one, a notebook say, does not catch the other."""
    armed = Armed(SignalStop())
    armed.hold()
    signal.raise_signal(signal.SIGTERM)
    assert isinstance(armed.leave(KeyboardInterrupt()), RunStopped)
