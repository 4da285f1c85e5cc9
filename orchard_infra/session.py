"""One environment from prepare to release: every strategy entered in order, and left again.

The order of the steps is here and nowhere else. ``with``, ``async with``, the decorator, prepare
and release by hand and `orchard-infra run` all use it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import attrs

from orchard_infra.config import Settings
from orchard_infra.environment import Environment, Strategy
from orchard_infra.errors import InfrastructureError, ReleaseError
from orchard_infra.exits import Exits
from orchard_infra.following import Job, next_turn
from orchard_infra.launch import Launch, is_same_job
from orchard_infra.locks import queue
from orchard_infra.locks.acquiring import Pause, acquiring, give_back
from orchard_infra.locks.base import (
    Lease,
    Lock,
    LockKey,
    SharedLock,
    describe_lock,
    is_remote,
    parts_of,
)
from orchard_infra.locks.keeper import Keeper
from orchard_infra.runs import history
from orchard_infra.runs.membership import Membership
from orchard_infra.runs.record import (
    RUN_ID_VARIABLE,
    RunRecord,
    RunState,
    Survivor,
    describe_this_run,
)
from orchard_infra.runs.registry import RegisteredRun, Registration, RunRegistry
from orchard_infra.stopping.signals import stop_error, stopped_by
from orchard_infra.system import background, ending, processes, reserve
from orchard_infra.system.background import Task
from orchard_infra.system.exported import export, look_up
from orchard_infra.system.masking import child_signals_deferred, interruptible, uninterrupted
from orchard_infra.telling import tell_prepared, tell_released

_CALLBACKS = 30.0  # seconds that the release waits for callbacks of `on_stop`
_TEND = 5.0  # seconds, at most, between two looks at the run's files and processes
_open: list[Session] = []  # in the order in which they were prepared


@attrs.define(eq=False, repr=False)
class Session:
    """One environment of one manager. `prepare` it once, `close` it once.

    ``cfg`` is what the settings were read from. ``timeout`` is how long to wait for the lock, in
    seconds. ``command`` is what the run executes, where that is not this process. ``by_hand`` marks
    one that `InfrastructureManager.release_resources` may find.
    """

    settings: Settings
    launch: Launch
    logger: logging.Logger
    sanitizer: Strategy | None = None
    locker: Lock | None = None
    flusher: Strategy | None = None
    cleaner: Strategy | None = None
    stopper: Strategy | None = None
    extras: Sequence[Strategy] = ()
    timeout: float | None = 0.0
    command: tuple[str, ...] | None = None
    cfg: object = None
    by_hand: bool = False
    error_at_prepare: BaseException | None = None  # in flight then, so not the run's own
    command_ending: tuple[int, int | None] | None = None  # exit status, and signal if that ended it
    is_opened: bool = attrs.field(default=False, init=False)  # by `managed_environment.open`
    pid: int = attrs.field(factory=os.getpid, init=False)
    thread: int = attrs.field(factory=threading.get_ident, init=False)
    env: Environment = attrs.field(init=False)
    _key: LockKey = attrs.field(init=False)
    _exits: Exits = attrs.field(init=False)
    _registration: Registration | None = attrs.field(default=None, init=False)
    _reserves: bool = attrs.field(default=False, init=False)
    _prepared: bool = attrs.field(default=False, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._exits = Exits(self.logger)
        self._key = LockKey(self.settings.project, self.settings.lock_path)

    # Into the environment.

    def prepare(self) -> Environment:
        """Enter everything, or nothing: what was taken is given back when a later step fails."""
        steps = self._prepare()
        try:
            for pause in steps:
                pause.wait()
        except BaseException as error:
            steps.throw(error)  # there, what was entered is left
            raise
        return self.env

    async def prepare_async(self) -> Environment:
        """The same, without blocking the event loop while it waits for the lock."""
        steps = self._prepare()
        try:
            for pause in steps:
                await pause.wait_async()
        except BaseException as error:
            steps.throw(error)
            raise
        return self.env

    def _prepare(self) -> Generator[Pause, None, None]:
        began = time.perf_counter()
        steps = self._enter()
        try:
            yield from _uninterrupted_steps(steps)  # no loop here: see `acquiring`
            self.env.report.prepare_seconds = time.perf_counter() - began
            tell_prepared(self.env)
        except BaseException as error:
            try:
                self._give_up(steps, error)
            finally:
                if not self._closed:  # a second Ctrl-C came before that could begin
                    self._give_up(steps, error)
            raise

    def _enter(self) -> Generator[Pause, None, None]:
        registry = RunRegistry()
        joined = self._run_to_join(registry)
        self.env = env = self._make_environment(registry, joined)
        with uninterrupted():
            reserve.hold()
            self._reserves = True
            env._begin()
            self._exits.callback("stop requests", env._end)
        if self.stopper is not None:
            self._exits.enter("signal handlers", self.stopper.around(env), is_short=True)
        if joined is None:
            yield from self._enter_run()
        else:
            self.logger.info(
                "joined the run of project %s that started this process (pid %d)",
                joined.project,
                joined.pid,
            )
        self._enter_strategy("device caches", self.flusher)
        for extra in self.extras:
            self._enter_strategy(type(extra).__name__, extra)
        self._ready()

    def _enter_run(self) -> Generator[Pause, None, None]:
        env, registry = self.env, self.env.registry
        with uninterrupted():
            registration = registry.register(env.run)
            self._registration = env._registration = registration
            self._exits.callback("run record", self._leave_registry)
            self._exits.callback("run id", export(RUN_ID_VARIABLE, env.run.run_id))
        if self.locker is not None:
            name = env._lock_name = describe_lock(self.locker, self._key)
            job = Job(self.launch, env.run, self._key, name, registry, self.logger)
            if env.is_leader:
                steps = self._take_lock(self.locker, job)
            else:
                steps = job.follow(self.locker, self.timeout)
            yield from self._until_stopped(steps)
        registration.update(env.run, RunState.RUNNING)
        with uninterrupted():
            task = Task(lambda: None, time.monotonic() + self._interval)
            task.run = functools.partial(self._tend, task)
            background.add(task)
            self._exits.callback("background task", functools.partial(background.remove, task))
        self._enter_strategy("processes", self.sanitizer)
        self._enter_strategy("temporary artifacts", self.cleaner)
        if env.is_leader:
            self._forget_dead_runs(registry)

    def _enter_strategy(self, name: str, strategy: Strategy | None) -> None:
        if strategy is not None:
            is_foreign = not type(strategy).__module__.startswith("orchard_infra.")
            self._exits.enter(name, strategy.around(self.env), is_foreign=is_foreign)

    def _until_stopped(self, steps: Generator[Pause, None, None]) -> Generator[Pause, None, None]:
        """Wait no longer once a signal has asked the run to stop. One that has not begun sees no
        flag, and has nothing to save.
        """
        with contextlib.closing(steps):
            for pause in steps:
                request = self.env.stop_requested
                if request is not None and request.signal is not None:
                    raise stop_error(request.signal)
                yield pause

    def _take_lock(self, lock: Lock, job: Job) -> Generator[Pause, None, None]:
        env = self.env

        def keep(lease: Lease) -> None:
            self._exits.callback("lock", functools.partial(self._give_back, lease))
            env._lease = lease
            for part in parts_of(lease):
                keeper = Keeper(part, env.lose, self.logger)
                self._exits.callback("lock keeper", keeper.stop)
                keeper.start()

        began = time.perf_counter()
        try:
            yield from acquiring(
                lock,
                self._key,
                env.run,
                timeout=self.timeout,
                clear_dead=env.clear_dead,
                logger=self.logger,
                keep=keep,
                will_return=job.will_return,
            )
        except BaseException as error:
            job.refuse(error)
            raise
        lease = env._lease
        if lease is not None and any(map(is_remote, parts_of(lease))):
            # A server has given it with the lock; a file draws its fence when it is asked for.
            env.run = attrs.evolve(env.run, fence=lease.fence)
        self._exits.callback("ranks of this job", functools.partial(self._leave_last, job))
        env.report.waited_seconds = time.perf_counter() - began

    def _give_back(self, lease: Lease) -> None:
        self.env._released = True  # before: who asks meanwhile must not take it for a loss
        give_back(lease)

    def _leave_last(self, job: Job) -> None:
        if job.may_have_ranks():
            is_stopped = self.env.stop_requested is not None
            leave = functools.partial(job.leave, self._exits.error, is_stopped=is_stopped)
            self._exits.attempt("ranks of this job", leave)

    def _ready(self) -> None:
        with uninterrupted():
            _open.append(self)
            self._prepared = True
            _close_at_exit()

    def _give_up(self, steps: Generator[Pause, None, None], error: BaseException) -> None:
        """Leave what was entered, and raise a signal that came meanwhile. A caller that catches the
        error of a lock, and tries again, would never know of that signal.
        """
        with uninterrupted():
            self._exits.attempt("wait for the lock", steps.close)
            self._leave(error)
        self._raise_held(error)

    # Out of it.

    @property
    def is_closed(self) -> bool:
        """Whether the release has begun. It is carried out to its end then."""
        return self._closed

    def close(self, error: BaseException | None = None) -> None:
        """Leave everything. A second call does nothing, and nor does one in a forked child, where
        the environment is that of the parent.

        ``error`` is what the body ended with. Nothing is raised in its place, except for a signal
        that asks the program to stop: a sweep that catches the errors of its trials must end then.

        Raises:
            ReleaseError: Steps failed, and the body did not.
            BaseException: A signal arrived meanwhile, and was held until now.
        """
        if self.is_closed or not self._prepared or self.pid != os.getpid():
            return
        began = time.perf_counter()
        raised_by_handler = self._leave(error)
        report, failures = self.env.report, self._exits.failures
        report.release_seconds = time.perf_counter() - began
        report.failures = tuple(failures)
        tell_released(self.env)
        self._raise_held(error)
        if failures and error is None:
            told = "; ".join(f"{type(f).__name__}: {f}" for f in failures)
            raise ReleaseError(
                f"the environment was released, but not all of it: {told}", failures=failures
            ) from failures[0]
        if raised_by_handler is not None and error is None:
            raise raised_by_handler

    def _leave(self, error: BaseException | None) -> BaseException | None:
        """Leave everything. Returns what the program's own handler of SIGCHLD raised after that."""
        exits = self._exits
        with uninterrupted():
            if self._closed:
                return None
            self._closed = True
            try:
                with child_signals_deferred():
                    if self._reserves:
                        reserve.let_go()
                        # A stopper waits for them itself.
                        if self.stopper is None and self.env.stop_requested is not None:
                            wait = functools.partial(self.env.wait_for_callbacks, _CALLBACKS)
                            exits.attempt("callbacks", wait)
                        for step in tuple(self.env._before_release):
                            if not exits.attempt("before the release", step):
                                # A signal may have come just before the step that holds them.
                                exits.attempt("before the release", step)
                    exits.close(error)
            except Exception as failure:
                self.logger.error("the handler of SIGCHLD, after the release: %s", failure)
                return failure
            finally:
                if self in _open:
                    _open.remove(self)
        return None

    def _raise_held(self, error: BaseException | None) -> None:
        """Raise the signal that came during the release, unless the run was ended by its like."""
        failures = self._exits.failures
        interrupts = [f for f in failures if not isinstance(f, Exception)]
        # A notebook that catches a Ctrl-C does not mean to catch a SIGTERM, and a sweep that
        # catches the exits of its trials means neither.
        news = [one for one in interrupts if type(one) is not type(error)]
        if not news:
            return
        stop = next((one for one in news if not isinstance(one, KeyboardInterrupt)), news[0])
        stop.__context__ = error
        if isinstance(error, Exception) and isinstance(stop, SystemExit):
            # An exit prints no traceback. When a rank fails, its launcher signals the others, and
            # what it failed of would be told by nobody.
            self.logger.error("the run had failed before it was stopped", exc_info=error)
        raise stop

    def _leave_registry(self) -> None:
        """Put on record how the run ended: well, or with a release that failed, so that the next
        run has to clean up.
        """
        registration = self._registration
        if registration is None:
            return
        if self._prepared:
            self._write_history(registration)
        if self._release_failed():
            registration.abandon()
        elif self._prepared:
            registration.end()
        else:
            registration.close()

    def _write_history(self, registration: Registration) -> None:
        """Write down how the run ended. First: if we are killed now, this line is what counts."""
        env, stop = self.env, self.env.stop_requested
        history.note_end(
            os.fspath(env.registry.directory),
            env.run,
            env.report,
            running_at=registration.running_at,
            error=self._exits.error,
            command=self.command_ending,
            lock_lost=env.lock_lost,
            stop_requested=stop is not None,
            stop_signal=None if stop is None else stop.signal,
            release_failed=self._release_failed(),
        )

    def _release_failed(self) -> bool:
        report = self.env.report
        left = (report.flushed, report.cleaned)
        return bool(self._exits.failures) or any(one is not None and one.failures for one in left)

    def descriptors(self) -> list[int]:
        """The descriptors that keep the run on record and its lock held. A child that holds them,
        too, keeps the lock when this process is killed and the child goes on.
        """
        lease = self.env._lease
        parts = () if lease is None else parts_of(lease)
        holders = (self._registration, *parts)
        files = [one.fileno() for one in holders if one is not None and hasattr(one, "fileno")]
        # The connection of a server that keeps the lock for as long as somebody has it open.
        return [*files, *(fd for part in parts if (fd := getattr(part, "watched_fd", -1)) >= 0)]

    # What the steps need.

    def _count_turn(self) -> int:
        """Which environment of this project this is for this process, a rank of a job perhaps."""
        is_within = any(session._key == self._key for session in open_sessions())
        return next_turn(self.settings.project, is_within=is_within)

    def _make_environment(self, registry: RunRegistry, joined: RunRecord | None) -> Environment:
        locks = self.locker is not None and self.launch.is_leader
        reason = None if self.settings.allow_process_kill else "allow_process_kill is False"
        env = Environment(
            run=joined
            or describe_this_run(
                self.settings.project,
                lock=str(self.settings.lock_path) if locks else None,
                rank=self.launch.rank,
                argv=self.command,
                job=self.launch.job,
                restart=self.launch.restart,
                restarts_left=self.launch.restarts_left,
                turn=self._count_turn(),
            ),
            lock_path=self.settings.lock_path,
            tmp_dir=Path(joined.tmp_dir) if joined is not None and joined.tmp_dir else None,
            joined=joined is not None,
            is_leader=self.launch.is_leader,
            logger=self.logger,
            registry=registry,
            allow_process_kill=self.settings.allow_process_kill,
            reason_not_to_kill=reason or self.launch.reason_not_to_kill(),
            command=self.command,
            launch=self.launch,
            clear_dead=self._clear_dead,
            closer=self.close,
            find_fence=self._find_fence,
        )
        env.report.skipped = tuple(self._skipped(env))
        return env

    def _skipped(self, env: Environment) -> Iterator[str]:
        if self.locker is None:
            yield "no lock: there is no locker"
        elif not env.is_leader:
            yield f"no lock: {self.launch.reason_not_to_lock()}"
        if self.sanitizer is not None and env.reason_not_to_kill is not None:
            yield f"no process is stopped: {env.reason_not_to_kill}"

    def _run_to_join(self, registry: RunRegistry) -> RunRecord | None:
        """The live run that holds our lock and started this process, if that is so.

        Without this a child of a run would wait for its own parent.
        """
        started_in = look_up(RUN_ID_VARIABLE)
        if not started_in or self.locker is None or not self.launch.is_leader:
            return None
        holder = self.locker.holder(self._key)
        if holder is None or holder.run_id not in registry.lineage(started_in):
            return None
        run = registry.find(holder.run_id)
        if run is None or not run.is_live or holder.leader == processes.identity_of(os.getpid()):
            return None
        return run.record

    def _is_led_by(self, holder: RunRecord) -> bool:
        lineage = self.env.registry.lineage(self.env.run.parent)
        return holder.run_id in lineage or is_same_job(holder.job, self.env.run.job)

    def _find_fence(self) -> int | None:
        """The fence of the lock that this process takes part in, and does not hold itself."""
        record: RunRecord | None = self.env.run
        if not self.env.joined and self.locker is not None:
            look = self.locker.holder_now if isinstance(self.locker, SharedLock) else None
            record = (look or self.locker.holder)(self._key)
            if record is not None and not self._is_led_by(record):
                return None
        if record is None or record.fence is not None:
            return None if record is None else record.fence
        run = self.env.registry.find(record.run_id)
        return None if run is None else run.record.fence

    def _clear_dead(self, dead: RunRecord) -> Sequence[Survivor]:
        with interruptible():  # it may take the whole grace period
            return self._stop_or_name_survivors(dead)

    def _stop_or_name_survivors(self, dead: RunRecord) -> Sequence[Survivor]:
        clear = getattr(self.sanitizer, "clear_dead", None)
        if clear is not None:
            found: Sequence[Survivor] = clear(dead, self.env)
            return found
        registry = self.env.registry
        run = registry.find(dead.run_id) or RegisteredRun(dead, RunState.DEAD)
        return [one for _, one in Membership(registry.runs()).survivors([run])]

    def _forget_dead_runs(self, registry: RunRegistry) -> None:
        """Remove the records of dead runs of which nothing is left. As long as something is left,
        the record proves whose it is.
        """
        for run in self.env.dead_runs:
            if not os.path.lexists(run.record.tmp_dir or ""):
                registry.remove(run)
        registry.collect_unnamed(self.env._on_record)
        queue.collect()

    @property
    def _interval(self) -> float:
        lease = self.env._lease
        return _TEND if lease is None else min(_TEND, lease.interval)

    def _tend(self, task: Task) -> None:
        """In the background: keep cleaners of old files away, and write down our processes, in case
        this one is killed.
        """
        task.due = time.monotonic() + self._interval
        registration, tmp_dir = self._registration, self.env.tmp_dir
        # A full disk, no descriptors, or somebody who has removed them: it may be better next time.
        with contextlib.suppress(OSError, InfrastructureError):
            if registration is not None:
                registration.touch()
                registration.note_members()
        with contextlib.suppress(OSError):
            if tmp_dir is not None:
                os.utime(tmp_dir, follow_symlinks=False)
        for step in tuple(self.env._meanwhile):
            step()


def _uninterrupted_steps(steps: Generator[Pause, None, None]) -> Generator[Pause, None, None]:
    """Take all steps between two pauses uninterrupted; what takes long lets signals in."""
    while True:
        with uninterrupted():
            pause = next(steps, None)
        if pause is None:
            return
        yield pause


def open_sessions() -> tuple[Session, ...]:
    """The sessions of this process that are prepared and not closed, the oldest first."""
    me = os.getpid()
    return tuple(session for session in _open if session.pid == me)


def current_environments() -> tuple[Environment, ...]:
    """The environments that this process is in, the oldest first.

    For a notebook that has lost the handle of one: ``current_environments()[-1].close()``.
    """
    return tuple(session.env for session in open_sessions())


@functools.cache
def _close_at_exit() -> None:
    """For runs that were prepared by hand, and for a signal that comes before the release."""
    atexit.register(_close_all)


def _close_all() -> None:
    failures: list[BaseException] = []
    for session in reversed(open_sessions()):
        try:
            session.close()
        except BaseException as failure:  # the others are closed all the same
            failures.append(failure)
    stops = [signum for one in failures if (signum := stopped_by(one)) is not None]
    if stops and ending.end_by(next((one for one in stops if one != signal.SIGINT), stops[0])):
        failures = [failure for failure in failures if stopped_by(failure) is None]
    if failures:
        raise failures[0]
