"""How the ranks of one job start and end together: the others follow rank 0.

Rank 0 takes the lock. Another rank goes on when it sees that its own rank 0 has it, and raises what
rank 0 was refused; it never asks `torch.distributed`, which would wait for a rank that has gone.
At the end rank 0 gives the lock back last, so that no second job starts while a rank still writes.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Generator

import attrs

from orchard_infra.errors import EnvironmentLockedError, InfrastructureError
from orchard_infra.launch import Launch, is_same_job
from orchard_infra.locks.acquiring import Pause
from orchard_infra.locks.base import Lock, LockKey, SharedLock
from orchard_infra.runs.record import RUN_ID_VARIABLE, RunRecord, RunState
from orchard_infra.runs.refusals import Refusal, Refusals
from orchard_infra.runs.registry import RegisteredRun, RunRegistry

_LOOK = 0.05  # seconds between two looks
_LOOK_LONGER = 0.5  # the same after the first seconds
_SAY_AGAIN = 30.0  # seconds between two log lines of a rank that waits
_RANK_0_WITHIN = 300.0  # seconds for rank 0 to come at all: it may import for minutes
_GONE = 1.0  # seconds without rank 0's record, after it was seen
_OTHERS_WITHIN = 10.0  # seconds that rank 0 waits at the end for ranks that still run


@attrs.frozen
class Job:
    """The job that a run belongs to, seen from one of its ranks."""

    launch: Launch
    record: RunRecord  # of this rank
    registry: RunRegistry
    logger: logging.Logger

    @property
    def _refusals(self) -> Refusals:
        return Refusals(self.registry.directory)

    # Rank 0.

    def refuse(self, error: EnvironmentLockedError) -> None:
        """Leave the refusal of rank 0 to the other ranks, also to those that come later."""
        if self.record.job is None:
            return
        refusal = Refusal(
            self.record.job, self.record.restart, str(error), error.lock_path, error.holder
        )
        try:
            self._refusals.leave(refusal)
        except OSError as failure:
            self.logger.warning("the other ranks are not told of the refusal: %s", failure)

    def withdraw_refusal(self) -> None:
        """Rank 0 has the lock. Those that other jobs have left are cleared away, too."""
        if self.record.job is not None:
            self._refusals.withdraw(self.record.job)
        self._refusals.collect()

    def wait_for_others(self) -> None:
        """Wait for the ranks of this job on this host that are still in their environment, for a
        bounded time. One that has left it, and goes on, does not count.
        """
        deadline = time.monotonic() + _OTHERS_WITHIN
        while others := [run for run in self._ranks() if run.is_live]:
            if time.monotonic() > deadline:
                told = ", ".join(f"rank {run.record.rank} (pid {run.record.pid})" for run in others)
                self.logger.warning(
                    "the lock is given back although ranks of this job still run: %s; they were "
                    "waited for %g s",
                    told,
                    _OTHERS_WITHIN,
                )
                return
            time.sleep(_LOOK)

    # The other ranks.

    def follow(self, lock: Lock, key: LockKey) -> Generator[Pause, None, None]:
        """Wait until rank 0 has the lock. Every `Pause` that comes out is to be waited for.

        Raises:
            EnvironmentLockedError: Rank 0 was refused; the same error as its own.
            InfrastructureError: Rank 0 ended before it had the lock, or did not come.
        """
        why_alone = self._why_alone(lock, key)
        if why_alone is not None:
            self.logger.info("%s goes on without waiting for rank 0: %s", self._name, why_alone)
            return
        began = time.monotonic()
        say_at = began + 1.0
        last_seen = math.inf
        while not self._is_led(lock, key):
            refusal = self._refusal()
            if refusal is not None:
                error = refusal.error()
                self.logger.error("%s", error, extra={"lock_path": str(key.path)})
                raise error
            now = time.monotonic()
            rank_0 = self._rank_0()
            if rank_0 is not None and not rank_0.is_over:
                last_seen = now  # it waits for the lock itself, as long as it was told to
            elif rank_0 is not None or now > min(last_seen + _GONE, began + _RANK_0_WITHIN):
                # It may have got the lock, or been refused, since we looked.
                if self._is_led(lock, key) or self._refusal() is not None:
                    continue
                raise self._left_alone(rank_0, now - began, key)
            if now >= say_at:
                say_at = now + _SAY_AGAIN
                self.logger.info("%s waits for rank 0 to take the lock %s", self._name, key.path)
            yield Pause(_LOOK if now - began < 10.0 else _LOOK_LONGER)

    @property
    def _name(self) -> str:
        return f"rank {self.launch.rank}"

    def _why_alone(self, lock: Lock, key: LockKey) -> str | None:
        if self.launch.job is None:
            return "nothing here names the job that both belong to"
        if self.launch.is_on_first_node is False and not self._sees_other_hosts(lock, key):
            return f"it is on another host, which does not see {key.path}"
        return None

    @staticmethod
    def _sees_other_hosts(lock: Lock, key: LockKey) -> bool:
        return isinstance(lock, SharedLock) and lock.is_shared(key)

    def _is_led(self, lock: Lock, key: LockKey) -> bool:
        """Whether the lock is held by our rank 0, or by the run inside of which this rank was
        started: Lightning's rank 0 starts the others itself.
        """
        for run in self._ranks():
            if run.record.rank == 0 and run.state is RunState.RUNNING and run.record.lock:
                return True
        holder = lock.holder(key)
        if holder is None:
            return False
        started_in = os.environ.get(RUN_ID_VARIABLE)
        if started_in and holder.run_id in self.registry.lineage(started_in):
            around = self.registry.find(holder.run_id)
            return around is not None and around.is_live
        # From another host there is the lock itself, and nothing else. What a dead one left in it
        # proves nothing: it has to be held now.
        if holder.is_local or not is_same_job(holder.job, self.record.job):
            return False
        now = lock.holder_now(key) if isinstance(lock, SharedLock) else None
        return now is not None and is_same_job(now.job, self.record.job)

    def _ranks(self) -> list[RegisteredRun]:
        """The other ranks of this job, and this start of it, on this host."""
        return [
            run
            for run in self.registry.runs(without=self.record.run_id)
            if is_same_job(run.record.job, self.record.job)
            and run.record.restart == self.record.restart
            and run.record.leader != self.record.leader
        ]

    def _rank_0(self) -> RegisteredRun | None:
        found = [run for run in self._ranks() if run.record.rank == 0]
        return found[-1] if found else None

    def _refusal(self) -> Refusal | None:
        """Rank 0's. One from before an elastic restart is over."""
        refusal = None if self.record.job is None else self._refusals.find(self.record.job)
        if refusal is None or refusal.restart != self.record.restart:
            return None
        return refusal

    def _left_alone(
        self, rank_0: RegisteredRun | None, waited: float, key: LockKey
    ) -> InfrastructureError:
        if rank_0 is not None:
            what = f"rank 0 of this job (pid {rank_0.record.pid}) ended before it had the lock"
        else:
            what = (
                f"rank 0 of this job did not come for the lock within {waited:.0f} s, or has gone"
            )
        return InfrastructureError(
            f"{what} {key.path}, so {self._name} does not start. The output of rank 0 says why"
        )
