"""One command between prepare and release: the lock, the ghosts of earlier runs, the report."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from orchard_infra.cli.supervise import Interrupted, Supervisor, interruptible
from orchard_infra.cli.waiting import WaitingHandler
from orchard_infra.config import Settings
from orchard_infra.errors import EnvironmentLockedError, InfrastructureError, LockLostError
from orchard_infra.launch import Launch
from orchard_infra.locks.file import FileLease, FileLock
from orchard_infra.runs.record import (
    RUN_ID_VARIABLE,
    RunRecord,
    RunState,
    Survivor,
    describe_this_run,
)
from orchard_infra.runs.registry import RegisteredRun, Registration, RunRegistry
from orchard_infra.system import processes
from orchard_infra.system.text import duration, printable

if TYPE_CHECKING:
    from orchard_infra.sanitizing.ghosts import Scene

CANNOT_SET_UP = 125
CANNOT_EXECUTE = 126
NOT_FOUND = 127

# Who presses Ctrl-C, or closes the pipe with `| head`, knows how it ended.
_NOT_WORTH_A_WORD = (signal.SIGINT, signal.SIGPIPE)


@attrs.define(eq=False)
class ProtectedCommand:
    """One command from prepare to release; ``report`` is what there is to tell of it."""

    settings: Settings
    timeout: float | None
    grace: float
    keep_background: bool
    locked_exit: int
    command: tuple[str, ...]
    report: dict[str, Any] = attrs.field(factory=dict)
    _lease: FileLease | None = None

    def carry_out(self) -> int:
        """Everything; the exit status."""
        self.report.update(
            orchard_infra_run=1,
            outcome="failed",
            exit_status=None,
            signal=None,
            oom_killed=None,
            message=None,
            project=self.settings.project,
            lock=str(self.settings.lock_path),
            lock_lost=False,
            run_id=None,
            joined=False,
            command=list(self.command),
            cwd=_working_directory(),
            pid=None,
            started_at=time.time(),
            waited_seconds=0.0,
            command_seconds=0.0,
            leftovers=[],
            holder=None,
        )
        began = time.monotonic()
        try:
            with interruptible(), contextlib.ExitStack() as steps:
                status = self._carry_out(steps, began)
        except EnvironmentLockedError as error:
            status = self.locked_exit
            self._conclude("locked", self._why_locked(error, time.monotonic() - began))
            if error.holder is not None:
                self.report["holder"] = attrs.asdict(error.holder)
        except Interrupted as signalled:
            status = 128 + signalled.signum
            self._conclude("interrupted", f"{signalled} before the command was started")
        except (InfrastructureError, OSError) as error:
            status = CANNOT_SET_UP
            self._conclude("failed", str(error))
        self.report["exit_status"] = status
        self.report["ended_at"] = time.time()
        return status

    def _carry_out(self, steps: contextlib.ExitStack, began: float) -> int:
        registry = RunRegistry()
        launch = Launch.from_environ(os.environ)
        environ = dict(os.environ)
        held: list[int] = []
        tend: Callable[[], None] = _nothing
        joined = _run_to_join(registry, self.settings.lock_path) if launch.is_leader else None
        if joined is not None:
            run_id = joined.run_id
        else:
            record = describe_this_run(
                self.settings.project,
                lock=str(self.settings.lock_path) if launch.is_leader else None,
                rank=launch.rank,
            )
            environ[RUN_ID_VARIABLE] = run_id = record.run_id
            registration = registry.register(record)
            steps.callback(registration.close)
            held.append(registration.fileno())
            tend = functools.partial(self._tend, registration)
            if launch.is_leader:
                self._lease = self._prepare(record, registry, launch)
                steps.callback(self._release)
                held.append(self._lease.fileno())
            registration.update(record, RunState.RUNNING)
        self.report["joined"] = joined is not None
        self.report["run_id"] = run_id
        self.report["waited_seconds"] = round(time.monotonic() - began, 3)
        supervisor = Supervisor(tell, self.grace, _Bystanders(registry, run_id).describe)
        supervisor.begin()
        return self._supervise(supervisor, environ, held, tend)

    def _prepare(self, record: RunRecord, registry: RunRegistry, launch: Launch) -> FileLease:
        """The lock, and what dead runs have left."""
        why_not = None if self.settings.allow_process_kill else "--allow-process-kill is not given"
        gc.enable()  # waiting may take days
        logger = logging.Logger("orchard-infra", logging.INFO)
        shown = WaitingHandler(self.settings.project, self.settings.lock_path, tell)
        logger.addHandler(shown)
        house = _House(
            record,
            registry,
            why_not or launch.reason_not_to_kill(),
            self.grace,
            self.command,
            logger,
        )
        try:
            lease = FileLock(self.timeout).acquire(
                self.settings.lock_path, record, clear_dead=house.stop_survivors, logger=logger
            )
        finally:
            shown.close()
        try:
            house.clean()
        except BaseException:
            lease.release()
            raise
        return lease

    def _supervise(
        self,
        supervisor: Supervisor,
        environ: dict[str, str],
        held: list[int],
        tend: Callable[[], None],
    ) -> int:
        began = time.monotonic()
        try:
            supervisor.start(self.command, environ, hold=held)
        except (OSError, ValueError) as error:
            self._conclude("not started", f"{self.command[0]}: {_why_not_started(error)}")
            return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_EXECUTE
        gc.enable()
        self.report["pid"] = supervisor.pid
        ending = supervisor.wait(tend, 5.0 if self._lease is None else self._lease.interval)
        self.report["command_seconds"] = round(time.monotonic() - began, 3)
        message = None
        if ending.oom is not None:
            message = (
                f"{_shown(self.command)} ended with {_how(ending.status, ending.signal)}, and the "
                f"kernel's out-of-memory killer struck {ending.oom} meanwhile"
            )
            self.report["oom_killed"] = ending.oom
        elif ending.signal is not None and ending.signal not in _NOT_WORTH_A_WORD:
            message = (
                f"{_shown(self.command)} (pid {supervisor.pid}) was ended by "
                f"{_how(ending.status, ending.signal)}"
            )
        self._conclude("ended" if ending.signal is None else "signaled", message)
        if ending.signal is not None:
            self.report["signal"] = _signal_name(ending.signal)
        leftovers = supervisor.survey() if self.keep_background else supervisor.clear()
        self.report["leftovers"] = [attrs.asdict(leftover) for leftover in leftovers]
        return ending.status

    def _conclude(self, outcome: str, message: str | None) -> None:
        self.report["outcome"] = outcome
        self.report["message"] = message
        if message is not None:
            tell(message)

    def _tend(self, registration: Registration) -> None:
        """Look after the lock now and then; say once when it is lost."""
        try:
            registration.touch()
            if self._lease is not None and not self.report["lock_lost"]:
                self._lease.renew()
        except LockLostError as error:
            self.report["lock_lost"] = True
            tell(str(error))
        except (InfrastructureError, OSError):
            pass  # a full disk or a stale handle for a while: the lock may well be ours still

    def _release(self) -> None:
        assert self._lease is not None
        try:
            self._lease.release()
        except OSError as error:
            tell(f"the lock was released, but {self.settings.lock_path} not removed: {error}")

    def _why_locked(self, error: EnvironmentLockedError, waited: float) -> str:
        lock = f"project {self.settings.project} is locked ({self.settings.lock_path})"
        if error.survivors:
            listed = "; ".join(survivor.describe() for survivor in error.survivors)
            pids = " ".join(str(survivor.pid) for survivor in error.survivors)
            return (
                f"{lock}: the run that held it is dead, but processes of it still live: {listed}. "
                f"Stop them with --allow-process-kill, or: kill {pids}"
            )
        since = f" after waiting {duration(waited)}" if waited >= 1 else ""
        if error.holder is None:
            return f"{lock}{since}, nobody knows by whom; look with: fuser -v {error.lock_path}"
        return (
            f"{lock}{since} by {error.holder.describe()}. Wait for it with --wait, stop it with: "
            f"orchard-infra stop {error.holder.pid}, or use another project name"
        )


@attrs.frozen
class _House:
    """What is done about dead runs and their ghosts, before a command starts.

    The modules that do it are loaded where there is something to do.
    """

    record: RunRecord
    registry: RunRegistry
    why_not: str | None
    grace: float
    command: tuple[str, ...]
    logger: logging.Logger
    began: float = attrs.field(factory=processes.now)

    def stop_survivors(self, dead: RunRecord) -> tuple[Survivor, ...]:
        from orchard_infra.sanitizing.ghosts import GhostSanitizer

        return GhostSanitizer(grace=self.grace).stop_survivors(dead, self._scene())

    def clean(self) -> None:
        runs = self.registry.runs()
        others = any(not r.is_live and r.record.lock == self.record.lock for r in runs)
        if others or "python" in os.path.basename(self.command[0]):
            from orchard_infra.sanitizing.ghosts import GhostSanitizer

            GhostSanitizer(grace=self.grace).sanitize(self._scene())
        dead = [run for run in runs if run.state is RunState.DEAD]
        if dead:
            self._collect(runs, dead)

    def _scene(self) -> Scene:
        from orchard_infra.sanitizing.ghosts import Scene

        return Scene(
            record=self.record,
            registry=self.registry,
            why_not=self.why_not,
            logger=self.logger,
            began=self.began,
            argv=self.command,
        )

    def _collect(self, runs: tuple[RegisteredRun, ...], dead: list[RegisteredRun]) -> None:
        """Remove what dead runs left: first their files, last the record that proves them dead."""
        from orchard_infra.artifacts.temporary import TemporaryArtifacts
        from orchard_infra.runs.membership import Membership

        outlived = {run.record.run_id for run, _ in Membership(runs).survivors(dead)}
        dead = [run for run in dead if run.record.run_id not in outlived]
        TemporaryArtifacts().collect([run.record for run in dead])
        for run in dead:
            self.registry.remove(run)
        self.registry.collect_unnamed()


@attrs.define
class _Bystanders:
    """Processes below us that are none of the command's: they opted out of this run.

    A run that was started inside this one is a part of it, as a rank of a job is, whatever its
    project. One that was started with another run's id, or with none, is not, if it is live. The
    runs that we are in ourselves do not count: all that we start is in them.
    """

    registry: RunRegistry
    run_id: str
    _outer: set[str] | None = None

    def describe(self, pid: int) -> str | None:
        """Why this process is a bystander; None when it is not."""
        from orchard_infra.runs.membership import Membership

        if processes.started_with(pid, RUN_ID_VARIABLE, ("",)) is not None:
            return f"it opted out with an empty {RUN_ID_VARIABLE}"
        runs = self.registry.runs()
        if self._outer is None:
            around = Membership(runs).live_run_of(os.getppid())
            self._outer = {
                *self.registry.lineage(self.run_id),
                *self.registry.lineage(around.record.run_id if around else None),
            }
        others = tuple(
            run
            for run in runs
            if run.record.run_id not in self._outer
            and self.run_id not in self.registry.lineage(run.record.run_id)
        )
        run = Membership(others).live_run_of(pid) if others else None
        if run is None:
            return None
        return f"it belongs to a {run.state.value} run of project {run.record.project}"


def tell(text: str) -> None:
    """One line to the user, and never an error: stderr may be closed, or a pipe that is."""
    try:
        os.write(2, f"orchard-infra: {printable(text)}\n".encode(errors="backslashreplace"))
    except OSError:
        pass


def _run_to_join(registry: RunRegistry, lock_path: Path) -> RunRecord | None:
    """The live run that holds our lock and started this process, if that is so.

    Without this a wrapper within a wrapper would wait for its own parent.
    """
    started_in = os.environ.get(RUN_ID_VARIABLE)
    if not started_in:
        return None
    holder = FileLock().holder(lock_path)
    if holder is None or holder.run_id not in registry.lineage(started_in):
        return None
    run = registry.find(holder.run_id)
    return run.record if run is not None and run.is_live else None


def _why_not_started(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "command not found"
    if isinstance(error, OSError):
        if error.errno == errno.ENOEXEC:
            return "cannot be executed: neither a binary nor a script with a #! line"
        return f"cannot be executed: {error.strerror}"
    return f"cannot be executed: {error}"  # such as an empty name


def _how(status: int, signum: int | None) -> str:
    if signum is None:
        return f"exit status {status}"
    return f"{_signal_name(signum)} (exit status {status})"


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"


def _shown(command: Sequence[str]) -> str:
    words = " ".join(command)
    return words if len(words) <= 80 else f"{words[:77]}..."


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


def _nothing() -> None:
    """What is done for a lock that is an outer run's."""
