"""The way into an environment and out of it: every strategy, every ending, at every instant."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import attrs
import pytest

from orchard_infra import (
    Environment,
    Held,
    InfrastructureManager,
    Lease,
    LockKey,
    RegisteredRun,
    ReleaseError,
    RunRecord,
    RunRegistry,
    RunState,
    current_environments,
    managed_environment,
)
from orchard_infra.session import Session
from support import run_python

JOBS = ("stopper", "sanitizer", "cleaner", "flusher", "first extra", "second extra")


@attrs.define
class Journal:
    """What the strategies of one test saw."""

    entered: list[str] = attrs.field(factory=list)
    left: list[str] = attrs.field(factory=list)
    told: dict[str, BaseException | None] = attrs.field(factory=dict)

    @contextmanager
    def well(self, name: str) -> Iterator[None]:
        self.entered.append(name)
        try:
            yield
        except BaseException as error:
            self.told[name] = error
            raise
        else:
            self.told[name] = None
        finally:
            self.left.append(name)

    @contextmanager
    def swallows(self, name: str) -> Iterator[None]:
        self.entered.append(name)
        try:
            yield
            self.told[name] = None
        except BaseException as error:
            self.told[name] = error
        self.left.append(name)

    @contextmanager
    def fails(self, name: str) -> Iterator[None]:
        with self.well(name):
            yield
        raise OSError(5, f"{name} failed")

    @contextmanager
    def fails_whatever(self, name: str) -> Iterator[None]:
        try:
            with self.well(name):
                yield
        finally:
            raise OSError(5, f"{name} failed")

    @contextmanager
    def is_interrupted(self, name: str) -> Iterator[None]:
        try:
            with self.well(name):
                yield
        finally:
            raise KeyboardInterrupt

    @contextmanager
    def returns(self, name: str) -> Iterator[None]:
        try:
            with self.well(name):
                yield
        finally:
            return  # noqa: B012

    @contextmanager
    def yields_twice(self, name: str) -> Iterator[None]:
        try:
            with self.well(name):
                yield
        finally:
            yield


@attrs.frozen
class Named:
    """A strategy of a test."""

    name: str
    manner: Callable[[str], AbstractContextManager[None]]

    def around(self, env: Environment) -> AbstractContextManager[None]:
        return self.manner(self.name)


@attrs.define
class JournalLock:
    journal: Journal
    fail: bool = False
    timeout: float | None = 0.0
    interval: float = 60.0
    record: RunRecord | None = None

    def try_acquire(self, key: LockKey, record: RunRecord) -> Lease | Held:
        self.journal.entered.append("lock")
        self.record = record
        return self  # type: ignore[return-value]

    def holder(self, key: LockKey) -> None:
        return None

    def verify(self) -> None: ...

    def renew(self) -> None: ...

    def release(self) -> None:
        self.journal.left.append("lock")
        if self.fail:
            raise OSError(5, "lock failed")


def manager_of(journal: Journal, **manners: str) -> InfrastructureManager:
    """Every strategy behaves well, except for those whose manner is given."""

    def named(job: str) -> Named:
        return Named(job, getattr(journal, manners.get(job.replace(" ", "_"), "well")))

    return InfrastructureManager(
        stopper=named("stopper"),
        locker=JournalLock(journal, fail="lock" in manners),
        sanitizer=named("sanitizer"),
        cleaner=named("cleaner"),
        flusher=named("flusher"),
        extras=(named("first extra"), named("second extra")),
    )


def runs_that_go_on() -> list[RegisteredRun]:
    """Those on record, but for ended ones: those stay while this process has children, such as the
    servers of other tests.
    """
    return [run for run in RunRegistry().runs() if run.state is not RunState.ENDED]


ENTERED = ["stopper", "lock", "sanitizer", "cleaner", "flusher", "first extra", "second extra"]
BODIES = (
    None,
    ValueError("body"),
    KeyboardInterrupt(),
    SystemExit(3),
    GeneratorExit(),
    StopIteration(7),
    StopAsyncIteration(),
    RuntimeError("generator raised StopIteration"),
)
MIXTURES: tuple[dict[str, str], ...] = (
    {},
    *({job.replace(" ", "_"): "swallows"} for job in JOBS),
    *({job.replace(" ", "_"): "fails_whatever"} for job in JOBS),
    {"lock": "fails"},
    {"flusher": "returns"},
    {"second_extra": "yields_twice"},
    {"cleaner": "fails_whatever", "second_extra": "fails_whatever", "lock": "fails"},
)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
@pytest.mark.parametrize("manners", MIXTURES, ids=str)
def test_every_strategy_is_left_and_told_the_body_s_own_end(manners, body, caplog):
    journal = Journal()
    caught: BaseException | None = None
    try:
        with managed_environment("digits", manager=manager_of(journal, **manners)) as env:
            if body is not None:
                raise body
    except BaseException as error:
        caught = error
    assert journal.entered == ENTERED
    assert journal.left == ENTERED[::-1]
    assert set(journal.told.values()) == {body}
    failing = "fails" in str(manners) or "yields_twice" in str(manners)
    if body is not None:
        assert caught is body
        assert not failing or "failed" in caplog.text or "stop" in caplog.text
    elif failing:
        assert isinstance(caught, ReleaseError)
        assert caught.failures == env.report.failures
        assert isinstance(caught, OSError)
    else:
        assert caught is None
    assert current_environments() == ()


@pytest.mark.parametrize("body", [None, ValueError("body")], ids=["ends well", "fails"])
@pytest.mark.parametrize("job", JOBS)
def test_a_ctrl_c_within_a_step_of_the_release_breaks_no_other_step_and_is_not_lost(job, body):
    journal = Journal()
    manager = manager_of(journal, **{job.replace(" ", "_"): "is_interrupted"})
    caught: BaseException | None = None
    try:
        with managed_environment("digits", manager=manager):
            if body is not None:
                raise body
    except KeyboardInterrupt as error:
        caught = error
    assert caught is not None
    assert caught.__context__ is body
    assert journal.left == ENTERED[::-1]
    assert set(journal.told.values()) == {body}


@pytest.mark.parametrize("failing", ENTERED)
def test_what_was_entered_is_left_when_a_later_step_cannot_be_entered(failing):
    journal = Journal()

    @contextmanager
    def refuses(name: str) -> Iterator[None]:
        raise OSError(28, f"{name} is full")
        yield

    manager = manager_of(journal)
    place = ENTERED.index(failing)
    if failing == "lock":
        manager = attrs.evolve(manager, locker=RefusingLock(journal))
    elif failing.endswith("extra"):
        extras = list(manager.extras)
        extras[place - 5] = Named(failing, refuses)
        manager = attrs.evolve(manager, extras=tuple(extras))
    else:
        manager = attrs.evolve(manager, **{failing: Named(failing, refuses)})
    with pytest.raises(OSError, match=f"{failing} is full") as caught:
        managed_environment("digits", manager=manager).__enter__()
    assert journal.left == ENTERED[:place][::-1]
    assert set(journal.told.values()) <= {caught.value}
    assert not runs_that_go_on()


def test_a_second_ctrl_c_before_the_first_is_dealt_with_leaves_nothing_entered(monkeypatch):
    journal = Journal()
    give_up, calls = Session._give_up, []

    def interrupted(session: Session, *arguments: Any) -> None:
        calls.append(session)
        if len(calls) == 1:
            raise KeyboardInterrupt
        give_up(session, *arguments)

    @contextmanager
    def ctrl_c(name: str) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Session, "_give_up", interrupted)
    manager = manager_of(journal)
    manager = attrs.evolve(manager, extras=(*manager.extras, Named("last", ctrl_c)))
    with pytest.raises(KeyboardInterrupt):
        managed_environment("digits", manager=manager).__enter__()
    assert journal.left == ENTERED[::-1]
    assert not runs_that_go_on()


def test_a_second_ctrl_c_right_after_all_was_prepared_leaves_nothing_entered(monkeypatch):
    journal = Journal()
    prepare, close, calls = Session.prepare, Session.close, []

    def prepared(session: Session) -> None:
        prepare(session)
        raise KeyboardInterrupt

    def interrupted(session: Session, error: BaseException | None = None) -> None:
        calls.append(session)
        if len(calls) == 1:
            raise KeyboardInterrupt
        close(session, error)

    monkeypatch.setattr(Session, "prepare", prepared)
    monkeypatch.setattr(Session, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        managed_environment("digits", manager=manager_of(journal)).__enter__()
    assert journal.left == ENTERED[::-1]
    assert not runs_that_go_on()


class RefusingLock(JournalLock):
    def try_acquire(self, key: LockKey, record: RunRecord) -> Lease | Held:
        raise OSError(28, "lock is full")


def test_steps_before_the_release_come_first_and_cannot_break_it():
    journal = Journal()

    @attrs.frozen
    class Saves:
        @contextmanager
        def around(self, env: Environment) -> Iterator[None]:
            env.before_release(lambda: journal.left.append("first step"))
            env.before_release(lambda: 1 / 0)
            env.before_release(lambda: journal.left.append("last step"))
            yield

    manager = attrs.evolve(manager_of(journal), extras=(Saves(),))
    with pytest.raises(ReleaseError, match="division"):  # noqa: SIM117
        with managed_environment("digits", manager=manager):
            pass
    assert journal.left[:2] == ["first step", "last step"]
    assert journal.left[-1] == "stopper"


def test_inside_an_exit_stack_whose_inner_member_suppressed_the_error_the_run_did_not_fail():
    journal = Journal()
    manager = manager_of(journal, flusher="fails")

    def sweep() -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(managed_environment("digits", manager=manager))
            stack.enter_context(contextlib.suppress(ValueError))
            raise ValueError

    with pytest.raises(ReleaseError):
        sweep()
    assert set(journal.told.values()) == {None}


def test_an_error_that_was_in_flight_before_the_block_is_not_the_body_s():
    journal = Journal()
    try:
        raise KeyError("from before")
    except KeyError:
        with managed_environment("digits", manager=manager_of(journal)):
            pass
        manager = manager_of(Journal())
        manager.prepare_environment("digits")
        manager.release_resources("digits")
    assert set(journal.told.values()) == {None}


@pytest.mark.parametrize(
    "field", ["sanitizer", "flusher", "cleaner", "stopper", "extras", "locker"]
)
def test_what_is_no_strategy_is_refused_when_the_manager_is_made(field):
    class Flush:
        def flush(self) -> None: ...

    wrong: Any = (Flush(),) if field == "extras" else Flush()
    wanted = "try_acquire" if field == "locker" else r"around\(env\)"
    with pytest.raises(TypeError, match=f"{field} must .*{wanted}"):
        InfrastructureManager(**{field: wrong})


# --- at every instant ---

INTERRUPTED = """
    import contextlib, os, random, signal, sys, time, traceback
    from orchard_infra import *
    from orchard_infra import current_environments

    held = set()

    class Around:
        def __init__(self, name):
            self.name = name
        @contextlib.contextmanager
        def around(self, env):
            try:  # first: a strategy of a user is entered with its signals on
                held.add(self.name)
                yield
            finally:
                held.discard(self.name)

    class ByClass(Around):
        def around(self, env):
            return self
        def __enter__(self):
            try:
                held.add(self.name)
            except BaseException:  # as a strategy without a generator has to do by itself
                held.discard(self.name)
                raise
        def __exit__(self, *end):
            held.discard(self.name)

    def interrupt(signum, frame):
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGALRM, interrupt)
    manager = InfrastructureManager(
        sanitizer=Around("sanitizer"),
        flusher=ByClass("flusher"),
        extras=(Around("a"), ByClass("b")),
    )
    taken_over = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    runs = os.path.join(os.environ["ORCHARD_INFRA_DIR"], "runs")
    handlers = [signal.getsignal(s) for s in taken_over]

    def cycle():
        with managed_environment("digits", manager=manager):
            pass

    began = time.perf_counter()
    for _ in range(20):
        cycle()
    lasts = (time.perf_counter() - began) / 20
    interrupted = left = 0
    where = None
    random.seed(int(sys.argv[1]))
    end = time.monotonic() + 50  # a busy machine is slower, and has to come as far
    while interrupted < 600 and time.monotonic() < end:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-6, lasts * 1.2))
            cycle()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt as error:
            interrupted += 1
            where = error
        except BaseException as error:
            print("raised", repr(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        # A signal between the end of the block and the release leaves that to the exit hook.
        for env in current_environments():
            env.close()
        # The record of a run whose release was interrupted is evidence, and stays.
        records = [run.state for run in RunRegistry().runs() if run.is_live]
        found = [*held, *signal.pthread_sigmask(signal.SIG_BLOCK, ()), *records]
        found += [name for name in ("ORCHARD_INFRA_RUN_ID",) if name in os.environ]
        if [signal.getsignal(s) for s in taken_over] != handlers:
            found.append("handlers")
        if found:
            left += 1
            print("left", found)
            traceback.print_exception(where)
            break
    print("interrupted", interrupted > 300, interrupted, "left", left)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
def test_an_interrupt_at_any_instant_leaves_nothing_entered(tmp_path, seed):
    run = run_python(tmp_path, INTERRUPTED, seed)
    assert run.finish() == 0, run.transcript()
    last = run.output.splitlines()[-1]
    assert last.startswith("interrupted True"), run.transcript()
    assert last.endswith("left 0"), run.transcript()


# --- what a person is told ---


def test_a_prepare_and_a_release_are_told_once_each(caplog):
    caplog.set_level(logging.DEBUG, "Infrastructure")
    with managed_environment("digits") as env:
        pass
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(told) == 2
    assert told[0].startswith("prepared project digits in ")
    assert f"lock {env.lock_path} acquired" in told[0]
    assert "no process is stopped: allow_process_kill is False" in told[0]
    assert told[1].startswith("released project digits in ")
    assert f"lock {env.lock_path} released" in told[1]


def test_a_follower_says_that_it_took_no_lock_and_why(tmp_path):
    source = """
        import logging
        from orchard_infra import managed_environment
        logging.basicConfig(level=logging.INFO)
        with managed_environment("digits"):
            print("in", flush=True)
            input()
        """
    ranks = [
        run_python(tmp_path, source, env={"RANK": rank, "WORLD_SIZE": "2"}) for rank in ("0", "1")
    ]
    for run in ranks:
        run.wait_for("in")
    for run in reversed(ranks):
        run.tell()
        assert run.finish() == 0, run.transcript()
    assert "no lock: " in ranks[1].error_output
    assert "RANK=1" in ranks[1].error_output
    assert "acquired" in ranks[0].error_output


def test_a_refusal_is_in_the_log_before_it_is_raised(caplog):
    with managed_environment("digits"):
        with pytest.raises(RuntimeError) as caught:
            managed_environment("digits").__enter__()
        errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert errors == [str(caught.value)]


def test_a_logger_that_knows_no_extra_is_told_all_the_same():
    told: list[str] = []

    class Plain:
        def info(self, message: str) -> None:
            told.append(message)

        def error(self, message: str) -> None:
            raise RuntimeError("the disk of the log is full")

        debug = warning = info

    journal = Journal()
    with pytest.raises(ReleaseError, match="flusher failed"):  # noqa: SIM117
        with managed_environment(
            "digits", manager=manager_of(journal, flusher="fails"), logger=Plain()
        ):
            pass
    assert told[0].startswith("prepared project digits")
    assert journal.left == ENTERED[::-1]


# --- a stop is never lost ---

SWEEP = """
    import os, signal, sys, time
    from contextlib import contextmanager
    from orchard_infra import *

    class Slow:
        @contextmanager
        def around(self, env):
            try:
                yield
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

    manager = InfrastructureManager(extras=(Slow(),))
    for trial in range(3):
        try:
            with managed_environment("sweep", manager=manager):
                print("trial", trial, flush=True)
                raise ValueError('a failing trial')
        except (ValueError, SystemExit) as failure:
            if isinstance(failure, RunStopped):
                raise
    print("not stopped", flush=True)
"""


@pytest.mark.parametrize(
    "error", ["ValueError('a failing trial')", "SystemExit(0)", "SystemExit(3)"]
)
def test_a_sigterm_during_the_release_of_a_failing_trial_stops_the_sweep(tmp_path, error):
    run = run_python(tmp_path, SWEEP.replace("ValueError('a failing trial')", error))
    assert run.finish() == 128 + signal.SIGTERM, run.transcript()
    assert run.output.splitlines() == ["trial 0"]


def test_a_program_that_a_strategy_starts_can_be_terminated(tmp_path):
    """It would inherit the mask under which strategies are entered, and never see the signal."""
    run = run_python(
        tmp_path,
        """
        import subprocess
        from contextlib import contextmanager
        from orchard_infra import *

        class Monitor:
            @contextmanager
            def around(self, env):
                child = subprocess.Popen(["sleep", "1000"])
                try:
                    yield
                finally:
                    child.terminate()
                    print("ended by", -child.wait(30), flush=True)

        for field in ("flusher", "extras"):
            strategy = (Monitor(),) if field == "extras" else Monitor()
            with managed_environment("digits", manager=InfrastructureManager(**{field: strategy})):
                pass
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["ended by 15", "ended by 15"]


def test_a_handler_of_child_signals_that_raises_skips_no_step_and_is_called_once_afterwards(
    tmp_path,
):
    run = run_python(
        tmp_path,
        """
        import os, signal, subprocess, threading, time
        from contextlib import contextmanager
        from orchard_infra import *
        called = []

        def worker_died(signum, frame):
            called.append(signum)
            raise RuntimeError("DataLoader worker is killed")

        class KillsWorkers:
            @contextmanager
            def around(self, env):
                try:
                    yield
                finally:
                    for _ in range(3):
                        subprocess.Popen(["true"]).wait()
                    print("within", len(called), flush=True)

        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        signal.signal(signal.SIGCHLD, worker_died)
        manager = InfrastructureManager(extras=(KillsWorkers(), KillsWorkers()))
        try:
            with managed_environment("digits", manager=manager) as env:
                pass
        except RuntimeError as error:
            print(error, flush=True)
        print("after", len(called), env.lock_path.exists(), flush=True)
        print(signal.getsignal(signal.SIGCHLD) is worker_died, flush=True)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == [
        "within 0",
        "within 0",
        "DataLoader worker is killed",
        "after 1 False",
        "True",
    ]
