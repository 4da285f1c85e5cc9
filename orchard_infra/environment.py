"""What a run sees of its environment, and what a strategy is given."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from signal import Signals
from typing import Any, Protocol

import attrs

from orchard_infra.errors import InfrastructureError, LockLostError, LockSuspectError
from orchard_infra.launch import Launch
from orchard_infra.locks.base import Lease, is_remote, parts_of
from orchard_infra.report import Report
from orchard_infra.runs.record import RunRecord, RunState, Survivor
from orchard_infra.runs.registry import RegisteredRun, Registration, RunRegistry
from orchard_infra.system import background
from orchard_infra.system.background import Callbacks, Task

_CONFIRM = 0.2  # seconds between two questions whether the lock is held


class Strategy(Protocol):
    """One job that is done around a run. `InfrastructureManager` takes one for each job.

    The body of the ``with`` runs within what ``around`` returns, which is told of its end: the
    error that the run ended with arrives in ``__exit__``, whatever other strategies raised. What
    ``__exit__`` returns is ignored, so no strategy can swallow an error of the run.
    """

    def around(self, env: Environment) -> AbstractContextManager[object]: ...


@attrs.frozen
class StopRequest:
    """Why a run should stop, and since when (epoch seconds). ``signal`` is None if it was none."""

    reason: str
    at: float
    signal: Signals | None = None


def _default_logger() -> logging.Logger:
    return logging.getLogger("Infrastructure")


@attrs.define(eq=False)
class Environment:
    """The environment of one run.

    ``tmp_dir`` goes away with the run; None where no cleaner keeps one. ``joined`` says that this
    process was started by the run that holds the lock, and takes part in it. ``is_leader`` is False
    in a rank other than 0 of a distributed job, which neither locks nor sanitizes.

    A copy of an environment is the environment itself: `copy.deepcopy` of an object that contains
    one, or `dataclasses.asdict`, must not give its lock away. In another process a pickled one
    holds nothing, and cannot be released.

    For strategies: ``registry`` has all runs on record. ``allow_process_kill`` is what the
    configuration says; ``reason_not_to_kill`` says why no process of an earlier run may be stopped,
    shared compute included, and is None when it may be. ``command`` is what the run executes where
    that is not this very process. ``launch`` is how this process was launched; unlike ``run.job``
    it is right in a process that joined a run, too.
    """

    run: RunRecord
    lock_path: Path
    tmp_dir: Path | None = None
    joined: bool = False
    is_leader: bool = True
    report: Report = attrs.field(factory=Report)
    logger: logging.Logger = attrs.field(factory=_default_logger, repr=False)
    registry: RunRegistry = attrs.field(factory=RunRegistry, repr=False)
    allow_process_kill: bool = attrs.field(default=False, repr=False)
    reason_not_to_kill: str | None = attrs.field(default="allow_process_kill is False", repr=False)
    command: tuple[str, ...] | None = attrs.field(default=None, repr=False)
    launch: Launch = attrs.field(factory=Launch, repr=False)
    _lease: Lease | None = attrs.field(default=None, repr=False)
    _registration: Registration | None = attrs.field(default=None, repr=False)
    _clear_dead: Callable[[RunRecord], Sequence[Survivor]] | None = attrs.field(
        default=None, repr=False
    )
    _closer: Callable[[], None] | None = attrs.field(default=None, repr=False)
    _find_fence: Callable[[], int | None] | None = attrs.field(default=None, repr=False)
    _lock_name: str | None = attrs.field(default=None, repr=False)
    _pid: int = attrs.field(factory=os.getpid, init=False, repr=False)
    _released: bool = attrs.field(default=False, init=False, repr=False)  # the lock, or just about
    _before_release: list[Callable[[], object]] = attrs.field(factory=list, init=False, repr=False)
    _meanwhile: list[Callable[[], object]] = attrs.field(factory=list, init=False, repr=False)
    _dead: Sequence[RegisteredRun] | None = attrs.field(default=None, init=False, repr=False)
    _on_record: Sequence[str] = attrs.field(default=(), init=False, repr=False)  # names of files
    _lost: LockLostError | None = attrs.field(default=None, init=False, repr=False)
    _requested: StopRequest | None = attrs.field(default=None, init=False, repr=False)
    _signals_raise: bool = attrs.field(default=False, init=False, repr=False)  # so says the stopper
    # Whether who started this process passes each signal of its group on to it: it comes twice.
    _signals_come_twice: bool = attrs.field(default=False, init=False, repr=False)
    _agreed: bool = attrs.field(default=False, init=False, repr=False)
    _callbacks: Callbacks[StopRequest] = attrs.field(init=False, repr=False)
    _announcement: Task = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._callbacks = Callbacks(self.logger)
        self._announcement = Task(self._announce)

    def __copy__(self) -> Environment:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Environment:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _snapshot, (
            self.run, self.lock_path, self.tmp_dir, self.joined, self.is_leader, self.report,
        )  # fmt: skip

    # For the run.

    @property
    def is_locked(self) -> bool:
        """Whether this process took the project's lock: not for a rank other than 0, say."""
        return self._lease is not None

    @property
    def lock_name(self) -> str:
        """Where the lock is, for people: a path, or a server's address without its password."""
        return self._lock_name or str(self.lock_path)

    @property
    def lock_lost(self) -> bool:
        """Whether the lock was found lost: another run may be writing to the same outputs."""
        return self._lost is not None

    @property
    def stop_requested(self) -> StopRequest | None:
        """Why the run should stop, and since when; None while it may go on.

        For a loop that finishes its step and saves a checkpoint first.
        """
        return self._requested

    def agree_to_stop(self) -> bool:
        """Whether any rank of this job was asked to stop: the same answer on all of them.

        Collective: every rank calls it, once a step or every n steps. As soon as one was asked, it
        is True on all of them at the same call, so that no rank is left alone in the middle of a
        step. From then on it is True without asking anybody, and `stop_requested` is set, too.

        It asks the default group of `torch.distributed`, with one number in main memory. A group
        that cannot do that, such as one of NCCL alone, gets one of gloo beside it at the first
        call. Without an initialised group it is `stop_requested`.

        Raises:
            InfrastructureError: The stopper has ``mode="raise"``; or a rank has ended, or did not
                call this within the group's timeout.
        """
        if self._signals_raise:
            raise InfrastructureError(
                'agree_to_stop needs InfrastructureManager(stopper=SignalStop(mode="flag")): with '
                'mode="raise" a rank that gets a signal leaves its loop, and the other ranks would '
                "wait for it"
            )
        if not self._agreed:
            from orchard_infra.system.collective import any_rank

            asked = any_rank(self._requested is not None)
            if asked is None:
                return False
            self._agreed = True
            self.request_stop(f"rank {asked} of this job was asked to stop")
        return True

    def on_stop(self, callback: Callable[[StopRequest], object]) -> None:
        """Have ``callback`` called in another thread once a stop is requested, or now if it is.

        Callbacks are called one after the other, in the order in which they were given. The
        release waits for them, for a bounded time; what they raise is logged.
        """
        self._callbacks.add(callback)
        if self._requested is not None:
            self._callbacks.call(self._requested)

    def request_stop(self, reason: str, signum: Signals | None = None) -> None:
        """Ask the run to stop, from any thread or signal handler. Nothing is raised into it.

        The first request counts, later ones change nothing. The body sees it in `stop_requested`.
        """
        if self._note_request(reason, signum):
            self._announce_soon()

    def _note_request(self, reason: str, signum: Signals | None = None) -> bool:
        """Whether it is the first one, and so is to be announced."""
        is_first = self._requested is None
        if is_first:
            self._requested = StopRequest(reason, time.time(), signum)
        return is_first

    def _announce_soon(self) -> None:
        # In a signal handler nothing may be logged or locked: the background thread does it.
        self._announcement.due = 0.0
        background.wake()

    def verify(self) -> None:
        """Ask now whether the lock is still ours.

        Raises:
            LockLostError: It is not. `lock_lost` is set and a stop is requested, too, unless this
                environment has ended and released it.
            LockSuspectError: The server of the lock does not answer; see `ensure_held`.
            InfrastructureError: This is a forked child of the process that has a lock on a server.
                Nothing is lost by that, and nothing is asked to stop.
        """
        if self._lease is None:
            return
        if self._lost is not None:
            raise self._lost
        self._refuse_to_verify()
        try:
            self._lease.verify()
        except LockLostError as error:
            self._refuse_to_verify()  # released by another thread meanwhile: that is no loss
            self.lose(error)
            raise

    def _refuse_to_verify(self) -> None:
        lease = self._lease
        if os.getpid() != self._pid and lease is not None and any(map(is_remote, parts_of(lease))):
            raise InfrastructureError(
                f"the lock {self.lock_name} is held by pid {self._pid}, from which this process "
                "was forked: only that one can verify it"
            )
        if self._released:
            raise LockLostError(
                f"the lock {self.lock_name} was released: this environment has ended",
                lock_path=str(self.lock_path),
            )

    def ensure_held(self) -> None:
        """Return when the lock is known to be ours: called before a checkpoint is put in place.

        Where the server of the lock does not answer, this waits until it does, or until the lock is
        lost: each lock states after how many seconds. A file is simply asked. A rank other than
        0 and a joined process, which hold no lock themselves, are not kept waiting.

        Raises:
            LockLostError: Another run may have it, see `verify`.
            InfrastructureError: The parent has it, see `verify`.
        """
        while True:
            try:
                self.verify()
                return
            except LockSuspectError as error:
                self.logger.debug("waiting for the lock to be confirmed: %s", error)
            time.sleep(_CONFIRM)

    @property
    def fence(self) -> int:
        """A number that grows with each run of this project: its fencing token.

        Of two files that carry one, that with the greater number is of the later holder of the
        lock. What is written under a fixed name has no such protection: a write that is under way
        when the lock is lost cannot be recalled.

        Raises:
            LockLostError: The lock is lost, so a successor may have a greater one already.
            InfrastructureError: There is no lock, or rank 0 has it and this rank cannot see it.
        """
        if self._lost is not None:
            raise self._lost
        if self.run.fence is not None:  # also in a forked child, which cannot ask a server
            return self.run.fence
        if self._lease is not None:
            fence = self._lease.fence
            self.put_on_record(fence=fence)
            return fence
        found = None if self._find_fence is None else self._find_fence()
        if found is None:
            raise InfrastructureError(
                f"project {self.run.project} has no fence here: this process does not hold its "
                "lock. Ask for env.fence in the process that does (rank 0), and send it on"
            )
        return found

    def fenced(self, path: str | os.PathLike[str]) -> Path:
        """A name for an output that no later run of this project uses, and no earlier one has used.

        The fence stands before the suffix, in 16 digits, so that names sort in the order of runs.

        >>> from orchard_infra import managed_environment
        >>> with managed_environment("digits") as env:
        ...     name = env.fenced("runs/model.pt")
        >>> name.parent.as_posix(), name.stem.partition(".")[0], name.suffix
        ('runs', 'model', '.pt')
        >>> int(name.stem.partition(".")[2]) == env.run.fence
        True

        Raises:
            LockLostError: The lock is lost.
            InfrastructureError: There is no fence, see `fence`.
        """
        plain = Path(path)
        if plain.name in ("", ".."):
            raise InfrastructureError(f"{os.fspath(path)!r} names no file that could get a fence")
        return plain.with_name(f"{plain.stem}.{self.fence:016d}{plain.suffix}")

    def close(self) -> None:
        """Release this environment, and no other one. A second call does nothing.

        For one that was made by `managed_environment.open` or `prepare_environment`.

        Raises:
            ReleaseError: Steps failed.
        """
        if self._closer is not None:
            self._closer()

    # For strategies.

    def wait_for_callbacks(self, seconds: float) -> bool:
        """Wait for the callbacks of `on_stop` if a stop was requested; whether all have returned.

        A request that has come just now is announced first.
        """
        if self._requested is None:
            return True
        background.finish(self._announcement)
        return self._callbacks.wait(seconds)

    def before_release(self, step: Callable[[], object]) -> None:
        """Have ``step`` carried out when the body has ended, before any strategy is left."""
        self._before_release.append(step)

    def meanwhile(self, step: Callable[[], object]) -> None:
        """Have a quick ``step`` carried out in the background every few seconds of the run."""
        self._meanwhile.append(step)

    def lose(self, error: LockLostError) -> None:
        """Note that the lock is lost, and ask the run to stop. It is not interrupted."""
        if self._lost is not None:
            return
        is_first = self._note_request(str(error))  # before: who sees the loss sees the request, too
        self._lost = error
        self.logger.error("%s", error)
        if is_first:
            self._announce_soon()

    def clear_dead(self, dead: RunRecord) -> Sequence[Survivor]:
        """Stop what still lives of a run whose leader is dead, where that is allowed. Returns what
        had to be left.
        """
        return () if self._clear_dead is None else self._clear_dead(dead)

    def put_on_record(self, **changes: Any) -> None:
        """Change fields of the run's record, as `attrs.evolve` does, for everybody to read."""
        self.run = attrs.evolve(self.run, **changes)
        if self._registration is not None:
            self._registration.update(self.run, RunState.RUNNING)

    @property
    def dead_runs(self) -> Sequence[RegisteredRun]:
        """Runs that are over and of which no process lives: what they left may be removed.

        They are looked up once. When the environment is ready, their records are removed as well,
        except for those of runs whose directory is still there.
        """
        if self._dead is None:
            self._on_record = self.registry.names()
            self._dead = self.registry.dead_runs(without=self.run.run_id, names=self._on_record)
        return self._dead

    def _announce(self) -> None:
        request = self._requested
        if request is not None:
            self.logger.warning("stop requested: %s", request.reason)
            self._callbacks.call(request)

    def _begin(self) -> None:
        background.add(self._announcement)

    def _end(self) -> None:
        background.remove(self._announcement)
        if self._announcement.due is not None:  # a request that came during the release is told
            self._announce()


def _snapshot(
    run: RunRecord,
    lock_path: Path,
    tmp_dir: Path | None,
    joined: bool,
    is_leader: bool,
    report: Report,
) -> Environment:
    return Environment(run, lock_path, tmp_dir, joined, is_leader, report)
