"""How the ranks of one job start and end together: the others follow rank 0.

Rank 0 takes the lock. Another rank goes on when it sees that its own rank 0 has it, and raises what
rank 0 was refused; it never asks `torch.distributed`, which would wait for a rank that has gone.
At the end rank 0 gives the lock back last, so that no second job starts while a rank still writes.

A rank that enters several environments, one for each trial of a sweep, follows rank 0 from one to
the next: each has a turn, and rank 0 has to be in the same one, or further.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence

import attrs

from orchard_infra.errors import EnvironmentLockedError, InfrastructureError
from orchard_infra.launch import (
    Launch,
    is_known_elsewhere,
    is_plain,
    is_same_job,
    launcher_of,
    processes_of_rank_0,
)
from orchard_infra.locks.acquiring import Pause
from orchard_infra.locks.base import Lock, LockKey, SharedLock, connected
from orchard_infra.runs.notices import Notice, Notices
from orchard_infra.runs.record import RunRecord, RunState
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity

_LOOK = 0.05  # seconds between two looks
_LOOK_LONGER = 0.5  # the same after the first seconds
_LOOK_AROUND = 1.0  # seconds between two looks for the process of rank 0
_SAY_AFTER = 1.0  # seconds until a rank says that it waits
_SAY_AGAIN = 30.0  # seconds between two log lines of a rank that waits
_RANK_0_WITHIN = 600.0  # seconds for rank 0 to come: it may load data for minutes before
_ABSENT = 30.0  # seconds for which a launcher may not have started rank 0 yet
_SETTLED = 1.0  # seconds until a notice from before the start of a rank is taken to be up to date
_ELSEWHERE = 10.0  # seconds until a rank 0 of which nothing is seen is taken to be elsewhere
_OTHERS_WITHIN = 10.0  # seconds that rank 0 waits at the end for ranks that still run
_AFTER_AN_ERROR = 2.0  # the same if rank 0 failed: its launcher must hear of that, and end the rest

_turns: dict[str, int] = {}  # how many environments of a project this process has come to


def next_turn(project: str, *, is_within: bool) -> int:
    """The turn of this process for one more environment of a project. One that is entered within
    another one of that project has the same turn.
    """
    turn = _turns.get(project, 0) + (not is_within)
    _turns[project] = turn
    return turn


@attrs.frozen(eq=False, repr=False)
class Job:
    """The job that a run belongs to, seen from one of its ranks. ``lock_name`` is for people."""

    launch: Launch
    record: RunRecord  # of this rank
    key: LockKey
    lock_name: str
    registry: RunRegistry
    logger: logging.Logger

    @property
    def _notices(self) -> Notices:
        return Notices(self.registry.directory)

    # Rank 0.

    def refuse(self, error: BaseException) -> None:
        """Rank 0 did not get the lock. Tell the other ranks, also those that come later."""
        self._leave(Notice.of(error, self.record))

    def may_have_ranks(self) -> bool:
        """Whether there may be other ranks. It is to be asked at the end: Lightning makes a rank of
        a plain process while that is in its environment.
        """
        return self.record.job is not None or not is_plain()

    def leave(self, error: BaseException | None, *, is_stopped: bool = False) -> None:
        """Rank 0 leaves last: this returns when the other ranks on this host have left their
        environments, or a bounded time has passed. A rank that has left, and whose program goes on,
        does not count. ``error`` is what rank 0 ended with; ``is_stopped`` says that it was asked
        to stop.
        """
        notice = Notice.at_end(error, self.record, is_stopped=is_stopped)
        seconds = _AFTER_AN_ERROR if isinstance(error, Exception) else _OTHERS_WITHIN
        try:
            self._wait_for_others(seconds)
        finally:
            self._leave(notice)

    def _leave(self, notice: Notice) -> None:
        if self.record.job is None:
            return
        try:
            self._notices.leave(notice)
        except (OSError, ValueError) as failure:
            self.logger.warning("the other ranks are not told of rank 0: %s", failure)

    def _wait_for_others(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while others := [run for run in self._other_runs() if self._is_led_by_us(run)]:
            if time.monotonic() > deadline:
                told = ", ".join(f"rank {run.record.rank} (pid {run.record.pid})" for run in others)
                self.logger.warning(
                    "the lock is given back although ranks of this job still run: %s; they were "
                    "waited for %g s",
                    told,
                    seconds,
                )
                return
            time.sleep(_LOOK)

    def _is_led_by_us(self, run: RegisteredRun) -> bool:
        """Whether a run is that of a rank which is in the environment of this rank 0, or is about
        to see that it may enter it.
        """
        if not run.is_live or not run.record.rank:
            return False
        if not self._meets(run) or (run.record.turn or 0) > (self.record.turn or 0):
            return False
        # Lightning's rank 0 was a plain process when it came to its environment.
        within = self.record.run_id in self.registry.lineage(run.record.parent)
        return within or self._is_of_this_job(run)

    # Runs of other jobs.

    def will_return(self, holder: RunRecord) -> bool:
        """Whether the launcher of a run that had the lock may start its job again: `torchrun
        --max-restarts`. It does not after a rank 0 that has ended by itself, and well. One that was
        asked to stop may have been so because another rank had failed.
        """
        # Another user's notices are not to be seen here.
        if not holder.restarts_left or holder.uid != self.record.uid:
            return False
        if is_same_job(holder.job, self.record.job):
            return False
        launcher = launcher_of(holder.job)
        if launcher is None or not processes.is_alive(launcher):
            return False
        notice = self._notices.find(holder)
        if notice is None or notice.record.started_at < holder.started_at:
            return True  # it was killed, and has left none
        return notice.outcome != "left"

    # The other ranks.

    def follow(self, lock: Lock, timeout: float | None = 0.0) -> Generator[Pause, None, None]:
        """Wait until rank 0 has the lock. Every `Pause` that comes out is to be waited for.

        Rank 0 waits for the lock as long as ``timeout`` says, and this rank with it.

        Raises:
            EnvironmentLockedError: Rank 0 was refused; the same error as its own.
            InfrastructureError: Rank 0 ended before it had the lock, or did not come.
        """
        with connected(lock) as lock:
            yield from self._follow(lock, timeout)

    def _follow(self, lock: Lock, timeout: float | None) -> Generator[Pause, None, None]:
        began = time.monotonic()
        say_at = _SAY_AFTER
        look = max(_LOOK, (getattr(lock, "poll", None) or 0.0) / 2)
        rank_0 = _Rank0(self)
        why_alone = self._why_alone(lock)
        while why_alone is None:
            waited = time.monotonic() - began
            rank_0.look()
            if self._is_led(lock, rank_0.runs):
                return
            rank_0.look_around()
            notice = self._notice(rank_0, waited)
            if notice is None:
                failure = self._failure(lock, rank_0, waited, timeout)
            else:
                failure = notice.error or self._refused_alone(lock)
            if failure is not None:
                self.logger.error("%s", failure, extra={"lock_path": str(self.key.path)})
                raise failure
            if notice is not None:
                self.logger.warning(
                    "%s came late: rank 0 has left its environment, and nobody has the lock %s",
                    self._name,
                    self.lock_name,
                )
                return
            if waited >= say_at:
                say_at = waited + _SAY_AGAIN
                self.logger.info("%s waits for rank 0 to take %s", self._name, self.lock_name)
            why_alone = self._why_elsewhere(lock, rank_0) if waited > _ELSEWHERE else None
            yield Pause(look if waited < _ELSEWHERE else _LOOK_LONGER)
        self.logger.info("%s goes on without waiting for rank 0: %s", self._name, why_alone)

    @property
    def _name(self) -> str:
        return f"rank {self.launch.rank}"

    def _why_alone(self, lock: Lock) -> str | None:
        if self.launch.job is None:
            return "nothing here names the job that both belong to"
        if self.launch.is_on_first_node is False and not self._can_follow_lock(lock):
            if self._sees_lock(lock):
                return "it is on another host, and the job has no id that both hosts know"
            return f"it is on another host, which does not see {self.lock_name}"
        return None

    def _why_elsewhere(self, lock: Lock, rank_0: _Rank0) -> str | None:
        """Why it makes no sense to go on waiting, although nothing is known of any failure."""
        if rank_0.is_waiting:
            return None
        if rank_0.project is not None:
            return f"that one is in project {rank_0.project} meanwhile"
        if self._should_be_here or rank_0.known or self._can_follow_lock(lock):
            return None
        return "nothing of it is to be seen on this host"

    @property
    def _should_be_here(self) -> bool:
        """Whether the launcher starts rank 0 on this host. A person may start each rank in another
        shell; Lightning's rank 0 is there before the others.
        """
        by_hand = self.launch.launcher in ("unknown", "lightning")
        return self.launch.is_on_first_node is True and not by_hand

    def _can_follow_lock(self, lock: Lock) -> bool:
        """Whether a rank on another host than rank 0's can see by the lock that rank 0 has it."""
        return self._sees_lock(lock) and is_known_elsewhere(self.launch.job)

    def _sees_lock(self, lock: Lock) -> bool:
        return isinstance(lock, SharedLock) and lock.is_shared(self.key)

    def _is_led(self, lock: Lock, runs: Sequence[RegisteredRun]) -> bool:
        """Whether the lock is held by our rank 0, or by the run inside of which this rank was
        started: Lightning's rank 0 starts the others itself.
        """
        for run in runs:
            if run.state is RunState.RUNNING and run.record.lock and self._has_come(run.record):
                self._catch_up(run.record)
                return True
        holder = lock.holder(self.key)
        if holder is None:
            return False
        if holder.run_id in self.registry.lineage(self.record.parent):
            around = self.registry.find(holder.run_id)
            return around is not None and around.is_live
        # From another host there is the lock itself, and nothing else. What a dead one left in it
        # proves nothing: it has to be held now.
        if holder.is_local or not is_same_job(holder.job, self.record.job):
            return False
        now = lock.holder_now(self.key) if isinstance(lock, SharedLock) else None
        if now is None or not is_same_job(now.job, self.record.job) or not self._has_come(now):
            return False
        self._catch_up(now)
        return True

    def _has_come(self, rank_0: RunRecord) -> bool:
        """Whether rank 0 is in the environment that this rank is to enter, or further."""
        return (rank_0.turn or 0) >= (self.record.turn or 0)

    def _catch_up(self, rank_0: RunRecord) -> None:
        """A rank that came late to an environment may be in a later one of rank 0 now."""
        turn = _turns.get(self.record.project, 0)
        _turns[self.record.project] = max(turn, rank_0.turn or 0)

    def _notice(self, rank_0: _Rank0, waited: float) -> Notice | None:
        """What rank 0 has left for this environment, if it has."""
        notice = self._notices.find(self.record)
        if notice is None or not self._has_come(notice.record):
            return None
        if notice.at < rank_0.since:
            # It may be of an earlier start: before an elastic restart, or of ranks that a person
            # starts again from the same shell. Then there is another rank 0 by now.
            is_last = rank_0.can_be_seen and rank_0.known <= {notice.record.leader}
            if not is_last or waited < _SETTLED:
                return None
        return notice

    def _refused_alone(self, lock: Lock) -> InfrastructureError | None:
        """Rank 0 has given the lock back; another run may have it by now."""
        now = lock.holder_now(self.key) if isinstance(lock, SharedLock) else None
        if now is None or is_same_job(now.job, self.record.job):
            return None
        return EnvironmentLockedError(
            f"rank 0 of this job has left its environment, and the lock {self.lock_name} is held "
            f"by {now.describe()} since",
            holder=now,
            lock_path=str(self.key.path),
        )

    def _failure(
        self, lock: Lock, rank_0: _Rank0, waited: float, timeout: float | None
    ) -> InfrastructureError | None:
        """Why rank 0 will not come, or why this rank does not wait for it any longer."""
        if rank_0.is_waiting:
            return None
        if rank_0.has_gone:
            pids = ", ".join(str(process.pid) for process in sorted(rank_0.known))
            return self._left_alone(
                f"rank 0 of this job (pid {pids}) ended before it had the lock {self.lock_name}"
            )
        if self._should_be_here and rank_0.is_absent and waited > _ABSENT:
            return self._left_alone(f"rank 0 of this job was not started within {waited:.0f} s")
        if not rank_0.known and waited > _ABSENT and self._can_follow_lock(lock):
            # On another host: it is not seen to wait, only who has the lock instead.
            holder = lock.holder_now(self.key) if isinstance(lock, SharedLock) else None
            if holder is not None:
                return self._refused_elsewhere(holder, waited, timeout)
        if waited > _RANK_0_WITHIN:
            return self._left_alone(
                f"rank 0 of this job did not take the lock {self.lock_name} within {waited:.0f} s"
            )
        return None

    def _left_alone(self, what: str) -> InfrastructureError:
        return InfrastructureError(
            f"{what}, so {self._name} does not start. The output of rank 0 says why"
        )

    def _refused_elsewhere(
        self, holder: RunRecord, waited: float, timeout: float | None
    ) -> InfrastructureError | None:
        if timeout is None or waited <= _ABSENT + timeout:
            return None
        return EnvironmentLockedError(
            f"the lock {self.lock_name} is held by {holder.describe()}, and rank 0 of this job "
            f"did not get it within {waited:.0f} s",
            holder=holder,
            lock_path=str(self.key.path),
        )

    # Runs of the same job.

    def _other_runs(self) -> list[RegisteredRun]:
        return list(self.registry.runs(without=self.record.run_id))

    def _is_of_this_job(self, run: RegisteredRun) -> bool:
        """Whether a run is that of another rank of this job."""
        return run.record.leader != self.record.leader and is_same_job(
            run.record.job, self.record.job
        )

    def _meets(self, run: RegisteredRun) -> bool:
        """Whether a run is one of the same project."""
        record = run.record
        return record.project == self.record.project or record.lock == str(self.key.path)


class _Rank0:
    """What a waiting rank has seen of rank 0 on its own host.

    ``runs`` are those of rank 0 in this project. ``project`` is another one, which rank 0 is in
    and this rank is not. ``known`` are the processes of rank 0, as far as they have lived while
    this one has; ``can_be_seen`` says that they would be found before they have a record.
    ``since`` is when this process was started, in epoch seconds.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.runs: list[RegisteredRun] = []
        self.project: str | None = None
        self.known: set[ProcessIdentity] = set()
        self.can_be_seen = False
        self.has_gone = False
        self.since = time.time() - (processes.now() - job.record.create_time)
        self._look_around_at = 0.0

    def look(self) -> None:
        """Look at the records. Whether it has gone is asked first: then all that it has left to
        the others is there.
        """
        self._ask_whether_it_has_gone()
        job, mine = self._job, self._job.record
        runs = job._other_runs()
        own_projects = {run.record.project for run in runs if run.record.leader == mine.leader}
        self.runs, self.project = [], None
        for run in runs:
            if run.record.rank != 0 or not job._is_of_this_job(run):
                continue
            # One that was over before this process began is that of an earlier start of the job.
            if run.is_live or run.record.started_at > self.since:
                self.known.add(run.record.leader)
            if job._meets(run):
                self.runs.append(run)
            elif run.state is RunState.RUNNING and run.record.project not in own_projects:
                self.project = run.record.project

    def look_around(self) -> None:
        """Look for its process, which may not have come to its record yet; now and then."""
        now = time.monotonic()
        if now < self._look_around_at:
            return
        self._look_around_at = now + _LOOK_AROUND
        found = processes_of_rank_0(self._job.launch)
        self.can_be_seen = found is not None
        self.known |= found or set()

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for the lock itself, as long as it was told to."""
        return any(run.state is RunState.WAITING for run in self.runs)

    @property
    def is_absent(self) -> bool:
        """Whether it would be seen, and never was."""
        return self.can_be_seen and not self.known

    def _ask_whether_it_has_gone(self) -> None:
        def lives() -> bool:
            return any(processes.is_alive(process) for process in self.known)

        if self.known and not lives():
            self._look_around_at = 0.0
            self.look_around()  # a process that was started meanwhile may be the one
            self.has_gone = not lives()
