"""One command as one run: the session around it, and the report of what happened."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import attrs

from orchard_infra.cli.run.interrupts import Interrupted, interruptible
from orchard_infra.cli.run.supervisor import Supervisor
from orchard_infra.cli.run.waiting import WaitingHandler
from orchard_infra.config import Settings
from orchard_infra.environment import Environment
from orchard_infra.errors import EnvironmentLockedError, InfrastructureError, ReleaseError
from orchard_infra.launch import this_launch
from orchard_infra.locks.base import Lock, LockKey
from orchard_infra.locks.file import FileLock
from orchard_infra.report import Finding, SanitizeReport
from orchard_infra.runs.record import RunRecord, Survivor
from orchard_infra.session import Session
from orchard_infra.system import files
from orchard_infra.system.processes import ProcessIdentity
from orchard_infra.system.text import duration, printable

if TYPE_CHECKING:
    from orchard_infra.cli.run.guardian import Guardian

CANNOT_SET_UP = 125
CANNOT_EXECUTE = 126
NOT_FOUND = 127

# Whoever presses Ctrl-C, or closes the pipe with `| head`, knows how it ended.
_NOT_WORTH_A_WORD = (signal.SIGINT, signal.SIGPIPE)


@attrs.define(eq=False, repr=False)  # each method that is made costs the start
class ProtectedCommand:
    """Runs one command in a session. ``report`` is what ``--report`` writes."""

    settings: Settings
    timeout: float | None
    grace: float
    stop_grace: float | None
    keep_background: bool
    locked_exit: int
    command: tuple[str, ...]
    lock_url: str | None = None
    report: dict[str, Any] = attrs.field(factory=dict)

    def carry_out(self) -> int:
        """Prepare, run, release; the exit status."""
        self.report.update(
            orchard_infra_run=1,
            outcome="failed",
            exit_status=None,
            signal=None,
            oom_killed=None,
            message=None,
            project=self.settings.project,
            lock=str(self.settings.lock_path),
            lock_server=None,
            lock_lost=False,
            fence=None,
            run_id=None,
            joined=False,
            command=list(self.command),
            cwd=files.working_directory(),
            pid=None,
            started_at=time.time(),
            waited_seconds=0.0,
            command_seconds=0.0,
            leftovers=[],
            holder=None,
        )
        began = time.monotonic()
        try:
            status = self._carry_out(began)
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

    def _carry_out(self, began: float) -> int:
        supervisor = Supervisor(tell)
        locker = self._locker()
        session = self._session(locker)
        guardian = None
        is_abandoned = False
        with interruptible():
            try:
                with _shown(session):
                    env = session.prepare()
                    if self.lock_url is not None and env.is_locked:
                        guardian = _start_guardian(locker, env.run.run_id, self.grace)
                    supervisor.begin()  # from here on nothing interrupts us
                self.report["joined"] = env.joined
                self.report["run_id"] = env.run.run_id
                self.report["fence"] = env.run.fence
                self.report["waited_seconds"] = round(time.monotonic() - began, 3)
                status = self._supervise(supervisor, session)
                self.report["lock_lost"] = env.lock_lost
                return status
            except BaseException as error:
                if supervisor.pid == 0:
                    raise
                # The command may be running, and nobody looks after it any more. It is as if we
                # were killed: it has the lock file, and the guardian stops it where there is one.
                is_abandoned = True
                self._conclude("failed", _why_abandoned(error, supervisor.name, guardian))
                return CANNOT_SET_UP
            finally:
                if not is_abandoned:
                    if guardian is not None:
                        guardian.dismiss()
                    # What fails there was logged, and so told.
                    with contextlib.suppress(ReleaseError):
                        session.close()

    def _locker(self) -> Lock:
        """The file, and the lock on the server where there is one: a run on this host that does not
        know of the server is refused by the file.
        """
        if self.lock_url is None:
            return FileLock()
        from orchard_infra.locks.all_of import AllOf
        from orchard_infra.locks.urls import lock_from_url

        server = lock_from_url(self.lock_url)
        self.report["lock_server"] = server.describe(self._key)
        return AllOf(FileLock(), server)

    @property
    def _key(self) -> LockKey:
        return LockKey(self.settings.project, self.settings.lock_path)

    def _session(self, locker: Lock) -> Session:
        logger = logging.Logger("orchard-infra", logging.INFO)
        return Session(
            settings=self.settings,
            launch=this_launch(),
            logger=logger,
            sanitizer=_Sanitizer(self.grace),
            locker=locker,
            cleaner=_Sweeper(),
            timeout=self.timeout,
            command=self.command,
        )

    def _supervise(self, supervisor: Supervisor, session: Session) -> int:
        began = time.monotonic()
        try:
            supervisor.start(self.command, os.environ, hold=session.descriptors())
        except (OSError, ValueError) as error:
            self._conclude("not started", f"{self.command[0]}: {_why_not_started(error)}")
            status = NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_EXECUTE
            session.command_ending = status, None
            return status
        gc.enable()
        self.report["pid"] = supervisor.pid
        if self.lock_url is not None:
            # Another host may begin. To ourselves: as any other SIGTERM it is passed on once, and
            # what outlives the command is waited for.
            session.env.on_stop(lambda request: os.kill(os.getpid(), signal.SIGTERM))
        ending = supervisor.wait()
        session.command_ending = ending.status, ending.signal or ending.stopped_by
        self.report["command_seconds"] = round(time.monotonic() - began, 3)
        message = None
        if ending.oom is not None:
            message = (
                f"{_shortened(self.command)} ended with {_how(ending.status, ending.signal)}, and "
                f"the kernel's out-of-memory killer struck {ending.oom} meanwhile"
            )
            self.report["oom_killed"] = ending.oom
        elif ending.signal is not None and ending.signal not in _NOT_WORTH_A_WORD:
            message = (
                f"{_shortened(self.command)} (pid {supervisor.pid}) was ended by "
                f"{_how(ending.status, ending.signal)}"
            )
        self._conclude("ended" if ending.signal is None else "signaled", message)
        if ending.signal is not None:
            self.report["signal"] = _signal_name(ending.signal)
        left = supervisor.settle()
        if left:
            self._clear(left, supervisor, session.env)
        supervisor.give_terminal_back()
        return ending.status

    def _clear(
        self, left: Sequence[ProcessIdentity], supervisor: Supervisor, env: Environment
    ) -> None:
        from orchard_infra.cli.run.bystanders import Bystanders
        from orchard_infra.cli.run.reaper import Reaper

        bystanders = Bystanders(env)
        reaper = Reaper(supervisor, tell, self.grace, self.stop_grace, bystanders.describe)
        leftovers = reaper.survey(left) if self.keep_background else reaper.clear(left)
        self.report["leftovers"] = [attrs.asdict(leftover) for leftover in leftovers]
        env.report.leftovers = SanitizeReport(
            **{
                fate: tuple(Finding(one.pid, 0.0, one.command, "leftover") for one in those)
                for fate, name in (("stopped", "stopped"), ("killed", "killed"), ("spared", "left"))
                if (those := [one for one in leftovers if one.fate == name])
            }
        )

    def _conclude(self, outcome: str, message: str | None) -> None:
        self.report["outcome"] = outcome
        self.report["message"] = message
        if message is not None:
            tell(message)

    def _why_locked(self, error: EnvironmentLockedError, waited: float) -> str:
        where = str(self.settings.lock_path)
        if self.report["lock_server"] is not None:
            where = f"{where} and {self.report['lock_server']}"
        lock = f"project {self.settings.project} is locked ({where})"
        if error.survivors:
            listed = "; ".join(survivor.describe() for survivor in error.survivors)
            pids = " ".join(str(survivor.pid) for survivor in error.survivors)
            return (
                f"{lock}: the run that held it is dead, but processes of it still live: {listed}. "
                f"Stop them with --allow-process-kill, or: kill {pids}"
            )
        since = f" after waiting {duration(waited)}" if waited >= 1 else ""
        if error.reason is not None:
            return f"{lock}: it cannot be taken now{since}: {error.reason}. Wait for it with --wait"
        if error.holder is None:
            return f"{lock}{since}, nobody knows by whom; look with: fuser -v {error.lock_path}"
        there = "" if error.holder.is_local else f" on {printable(error.holder.host)}"
        return (
            f"{lock}{since} by {error.holder.describe()}. Wait for it with --wait, stop it with: "
            f"orchard-infra stop {error.holder.pid}{there}, or use another project name"
        )


@contextlib.contextmanager
def _shown(session: Session) -> Iterator[None]:
    """Show what the session logs: the wait while it prepares, warnings also afterwards."""
    gc.enable()  # waiting may take days
    handler = WaitingHandler(session.settings, tell, is_file=isinstance(session.locker, FileLock))
    session.logger.addHandler(handler)
    try:
        yield
    finally:
        handler.stop_waiting()


def _why_abandoned(error: BaseException, command: str, guardian: Guardian | None) -> str:
    becomes = "goes on without it" if guardian is None else "is stopped, for its lock ends with it"
    return f"the wrapper failed, and what lives of {command} {becomes}: {error!r}"


def _start_guardian(locker: Lock | None, run_id: str, grace: float) -> Guardian:
    from orchard_infra.cli.run.guardian import LONGEST, Guardian

    # A lease that nobody renews any more ends by itself, and the command must have ended before.
    ttls = [ttl / 3 for lock in getattr(locker, "locks", ()) if (ttl := getattr(lock, "ttl", None))]
    return Guardian.start(run_id, min(grace, LONGEST, *ttls))


@attrs.frozen(eq=False, repr=False)
class _Sanitizer:
    """`GhostSanitizer`, loaded where it may have something to do: most commands are started on a
    clean machine, and must start fast.
    """

    grace: float

    def around(self, env: Environment) -> AbstractContextManager[object]:
        if env.reason_not_to_kill is not None and not env.allow_process_kill:
            env.reason_not_to_kill = "--allow-process-kill is not given"
        if not env.is_leader or not self._may_find_ghosts(env):
            return contextlib.nullcontext()
        from orchard_infra.sanitizing.ghosts import GhostSanitizer

        return GhostSanitizer(grace=self.grace).around(env)

    def clear_dead(self, dead: RunRecord, env: Environment) -> Sequence[Survivor]:
        from orchard_infra.sanitizing.ghosts import GhostSanitizer

        return GhostSanitizer(grace=self.grace).clear_dead(dead, env)

    def _may_find_ghosts(self, env: Environment) -> bool:
        assert env.command is not None
        if "python" in os.path.basename(env.command[0]):  # only such commands have twins
            return True
        return any(run.is_over for run in env.registry.runs(without=env.run.run_id))


class _Sweeper:
    """Removes what dead runs left, and makes no directory: the command has an environment of its
    own, or none.
    """

    @contextlib.contextmanager
    def around(self, env: Environment) -> Iterator[None]:
        if env.dead_runs:
            from orchard_infra.artifacts.sweeping import sweep

            sweep(env)
        yield


def tell(text: str) -> None:
    """Print one line for the user. Never fails: stderr may be closed, or a broken pipe."""
    try:
        os.write(2, f"orchard-infra: {printable(text)}\n".encode(errors="backslashreplace"))
    except OSError:
        pass


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


def _shortened(command: Sequence[str]) -> str:
    words = " ".join(command)
    return words if len(words) <= 80 else f"{words[:77]}..."
