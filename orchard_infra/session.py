"""One environment between prepare and release: the steps there, and each one's way back."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from orchard_infra.artifacts.temporary import Cleaner
from orchard_infra.config import Settings
from orchard_infra.devices.torch_caches import Flusher
from orchard_infra.environment import Environment
from orchard_infra.errors import ReleaseError
from orchard_infra.launch import Launch
from orchard_infra.locks.base import Locker
from orchard_infra.locks.keeper import Keeper
from orchard_infra.runs.membership import Membership
from orchard_infra.runs.record import (
    RUN_ID_VARIABLE,
    RunRecord,
    RunState,
    Survivor,
    describe_this_run,
)
from orchard_infra.runs.registry import Registration, RunRegistry
from orchard_infra.sanitizing.ghosts import Sanitizer, Scene
from orchard_infra.stopping.signals import Stopper, StopWatch
from orchard_infra.system import processes
from orchard_infra.system.masking import uninterrupted


@attrs.define(eq=False)
class Session:
    """Carries out the strategies of a manager for one run, in order, and back again.

    On the way back every step is carried out even if another one failed; what failed is told
    at the end, and never hides the run's own exception.
    """

    cfg: object
    settings: Settings
    launch: Launch
    logger: logging.Logger
    sanitizer: Sanitizer | None
    locker: Locker | None
    flusher: Flusher | None
    cleaner: Cleaner | None
    stopper: Stopper | None
    pid: int = attrs.field(factory=os.getpid)
    env: Environment = attrs.field(init=False)
    _steps: contextlib.ExitStack = attrs.field(factory=contextlib.ExitStack)
    _failures: list[BaseException] = attrs.field(factory=list)
    _watch: StopWatch | None = None
    _held_signal: BaseException | None = None
    _error: BaseException | None = None
    _error_at_prepare: BaseException | None = attrs.field(factory=lambda: sys.exc_info()[1])

    def prepare(self) -> Environment:
        """All or nothing: what was taken is given back when a later step fails."""
        try:
            self._prepare()
            return self.env
        except BaseException as error:
            try:
                self._hold()
            finally:
                self._steps.close()
            if self._held_signal is not None and isinstance(error, Exception):
                # Who waits for the lock by trying again would never know of the signal.
                raise self._held_signal from error
            raise

    def _prepare(self) -> None:
        registry = RunRegistry()
        if self.stopper is not None:
            with uninterrupted():
                self._watch = self.stopper.arm(self.logger)
                self._undo("signal handlers", self._disarm)
        joined = self._run_to_join(registry)
        if joined is not None:
            self._begin(joined, joined=True)
            self._undo("device caches", self._flush)
            self._close_at_exit()
            return
        scene = self._describe(registry)
        self._begin(scene.record)
        with uninterrupted():
            registration = registry.register(scene.record)
            self._undo("run record", registration.close)
            self._put_run_id(scene.record.run_id)
        if self.launch.is_leader:
            self._lock(scene, registration)
            self._sanitize(scene)
        registration.update(scene.record, RunState.RUNNING)
        self._open_tmp_dir()
        self._undo("device caches", self._flush)
        self._undo("leftover children", functools.partial(self._stop_leftovers, scene))
        self._close_at_exit()

    def close(self, error: BaseException | None) -> None:
        """Run every step back. Then raise what is to be raised, unless the run failed itself.

        Raises:
            ReleaseError: Steps failed.
            BaseException: A signal arrived meanwhile, and was held until now.
        """
        if self.pid != os.getpid():  # a forked child that unwinds: all of it is its parent's
            return
        began = time.perf_counter()
        self._error = None if error is self._error_at_prepare else error
        try:
            self._hold()
        finally:  # a last signal may have come before it could be held
            self._steps.close()
        self.env.report.release_seconds = time.perf_counter() - began
        self.env.report.failures = tuple(self._failures)
        if self._error is not None:
            return
        interrupt = next((f for f in self._failures if not isinstance(f, Exception)), None)
        if interrupt is not None:
            raise interrupt
        if self._held_signal is not None:
            raise self._held_signal
        if self._failures:
            told = "; ".join(f"{type(f).__name__}: {f}" for f in self._failures)
            raise ReleaseError(
                f"the environment was released, but not all of it: {told}", failures=self._failures
            ) from self._failures[0]

    def _close_at_exit(self) -> None:
        """For a run that is prepared by hand, and for a signal that comes before the release."""
        with uninterrupted():
            atexit.register(self.close, None)
            self._undo("exit hook", lambda: atexit.unregister(self.close))

    def _hold(self) -> None:
        if self._watch is None:
            return
        try:
            self._watch.hold()
        except BaseException:  # a signal came just before it could be held; so may the next one
            self._watch.hold()
            raise

    def _undo(self, name: str, step: Callable[[], object]) -> None:
        """Have ``step`` carried out on the way back, whatever becomes of the others."""

        def carry_out() -> None:
            try:
                step()
            except BaseException as failure:  # also a Ctrl-C: the other steps come first
                self._failures.append(failure)
                self.logger.error(
                    "release of the environment: %s: %s", name, failure, extra={"step": name}
                )

        self._steps.callback(carry_out)

    def _begin(self, record: RunRecord, *, joined: bool = False) -> None:
        self.env = Environment(
            run=record,
            lock_path=self.settings.lock_path,
            tmp_dir=Path(record.tmp_dir) if record.tmp_dir else None,
            joined=joined,
            logger=self.logger,
            watch=self._watch,
        )

    def _run_to_join(self, registry: RunRegistry) -> RunRecord | None:
        """The live run that holds our lock and started this process, if that is so.

        Without this a child of a run would wait for its own parent.
        """
        started_in = os.environ.get(RUN_ID_VARIABLE)
        if not started_in or self.locker is None or not self.launch.is_leader:
            return None
        holder = self.locker.holder(self.settings.lock_path)
        if holder is None or holder.run_id not in registry.lineage(started_in):
            return None
        run = registry.find(holder.run_id)
        if run is None or not run.is_live or holder.leader == processes.identity_of(os.getpid()):
            return None
        return run.record

    def _describe(self, registry: RunRegistry) -> Scene:
        began = processes.now()
        me = os.getpid()
        counts = self.sanitizer is not None and processes.children_of(me)
        children = processes.descendants([me]) if counts else {}
        locks = self.locker is not None and self.launch.is_leader
        record = describe_this_run(
            self.settings.project,
            lock=str(self.settings.lock_path) if locks else None,
            rank=self.launch.rank,
        )
        if self.cleaner is not None:
            record = attrs.evolve(record, tmp_dir=str(self.cleaner.tmp_dir_for(record.run_id)))
        return Scene(
            record=record,
            registry=registry,
            why_not=self._not_allowed() or self.launch.reason_not_to_kill(),
            logger=self.logger,
            began=began,
            before=frozenset(children.values()),
        )

    def _not_allowed(self) -> str | None:
        return None if self.settings.allow_process_kill else "allow_process_kill is False"

    def _put_run_id(self, run_id: str) -> None:
        """Mark the processes that the run will start as its own."""
        outer = os.environ.get(RUN_ID_VARIABLE)
        os.environ[RUN_ID_VARIABLE] = run_id

        def restore() -> None:
            if os.environ.get(RUN_ID_VARIABLE) != run_id:
                return  # another environment has put its own since
            if outer is None:
                del os.environ[RUN_ID_VARIABLE]
            else:
                os.environ[RUN_ID_VARIABLE] = outer

        self._undo("run id", restore)

    def _lock(self, scene: Scene, registration: Registration) -> None:
        if self.locker is None:
            return

        def clear_dead(dead: RunRecord) -> tuple[Survivor, ...]:
            return () if self.sanitizer is None else self.sanitizer.stop_survivors(dead, scene)

        lease = None
        try:
            # May wait, so a signal can come; a lease that gets lost on the way releases itself.
            lease = self.locker.acquire(
                self.settings.lock_path, scene.record, clear_dead=clear_dead, logger=self.logger
            )
            self._undo("lock", lease.release)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        self.env._lease = lease
        keeper = Keeper(lease, self.env.lose, self._stay_fresh(registration), self.logger)
        with uninterrupted():
            keeper.start()
            self._undo("keeper", keeper.stop)

    def _stay_fresh(self, registration: Registration) -> Callable[[], None]:
        tmp_dir = self.env.tmp_dir

        def touch() -> None:
            registration.touch()
            if tmp_dir is not None:
                with contextlib.suppress(FileNotFoundError):  # not made yet
                    os.utime(tmp_dir, follow_symlinks=False)

        return touch

    def _sanitize(self, scene: Scene) -> None:
        if self.sanitizer is not None:
            self.env.report.sanitized = self.sanitizer.sanitize(scene)
        self._collect(scene.registry)

    def _collect(self, registry: RunRegistry) -> None:
        """Remove what dead runs left: first their files, last the record that proves them dead.

        A run of which processes still live keeps its record, the evidence against them.
        """
        runs = registry.runs(without=self.env.run.run_id)
        dead = [run for run in runs if run.state is RunState.DEAD]
        if dead:
            outlived = {run.record.run_id for run, _ in Membership(runs).survivors(dead)}
            dead = [run for run in dead if run.record.run_id not in outlived]
        if self.cleaner is not None:
            collected = self.cleaner.collect([run.record for run in dead])
            self.env.report.collected = collected
            for failure in collected.failures:
                self.logger.warning("what a dead run left: %s", failure)
            # A record says where its run's directory is: it stays for as long as that does.
            dead = [run for run in dead if not os.path.lexists(run.record.tmp_dir or "")]
        for run in dead:
            registry.remove(run)
        registry.collect_unnamed()

    def _open_tmp_dir(self) -> None:
        cleaner, tmp_dir = self.cleaner, self.env.tmp_dir
        if cleaner is None or tmp_dir is None:
            return

        def clean() -> None:
            report = cleaner.close(tmp_dir, failed=self._failed(), since=self.env.run.started_at)
            self.env.report.cleaned = report
            for failure in report.failures:
                self.logger.warning("temporary artifacts: %s", failure)

        with uninterrupted():
            cleaner.open(tmp_dir)
            self._undo("temporary artifacts", clean)

    def _failed(self) -> bool:
        """A generator that is closed early did not fail, and neither did an exit with 0."""
        if isinstance(self._error, SystemExit):
            return self._error.code not in (None, 0)
        return self._error is not None and not isinstance(self._error, GeneratorExit)

    def _flush(self) -> None:
        if self.flusher is None:
            return
        report = self.flusher.flush(self._error)
        self.env.report.flushed = report
        for failure in report.failures:
            self.logger.warning("device caches: %s", failure)

    def _stop_leftovers(self, scene: Scene) -> None:
        if self.sanitizer is None:
            return
        # Provably ours, so they may be stopped on shared compute as well.
        self.env.report.leftovers = self.sanitizer.stop_leftovers(
            attrs.evolve(scene, why_not=self._not_allowed())
        )

    def _disarm(self) -> None:
        if self._watch is not None:
            self._held_signal = self._watch.disarm()
