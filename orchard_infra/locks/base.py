"""What a lock is to the manager: a locker that gives a lease, or says who has it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from orchard_infra.runs.record import RunRecord, Survivor

ClearDead = Callable[[RunRecord], Sequence[Survivor]]


class Lease(Protocol):
    """A lock that is held. It can be verified, lost and released.

    ``interval`` is how often, in seconds, it wants to be renewed in the background.
    """

    @property
    def interval(self) -> float: ...

    def verify(self) -> None:
        """Ask whether the lock is still ours; `LockLostError` when it is not."""
        ...

    def renew(self) -> None:
        """Keep it: touch, extend ... `LockLostError` when it is lost."""
        ...

    def release(self) -> None:
        """Give it back. Twice is once; in a forked child it does nothing."""
        ...


class Locker(Protocol):
    """A mutex on a project, at most one run holds it."""

    def acquire(
        self, path: Path, record: RunRecord, *, clear_dead: ClearDead, logger: logging.Logger
    ) -> Lease:
        """Take the lock that ``path`` names and leave ``record`` in it.

        ``clear_dead`` is called with the record of a holder whose leader is dead. It stops what
        still lives of that run, where it may, and returns what it had to leave.

        Raises:
            EnvironmentLockedError: Another run holds it, or the survivors of one do.
            InfrastructureError: It cannot be taken at all.
        """
        ...

    def holder(self, path: Path) -> RunRecord | None:
        """The record of the run that has the lock now, or had it last; None when unknown."""
        ...
