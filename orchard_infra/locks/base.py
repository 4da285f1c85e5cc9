"""The contract of a lock: one attempt at a time, and a lease when it succeeds.

Waiting, logging who is waited for, dead holders and re-entry are the same for every lock, and
live in `orchard_infra.locks.acquiring`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

import attrs

from orchard_infra.runs.record import RunRecord


@attrs.frozen
class LockKey:
    """What is locked: a project, and the path that stands for it on this machine."""

    project: str
    path: Path


@attrs.frozen
class Held:
    """The lock is taken. ``holder`` is who left a record in it; None where nobody did (yet).

    ``unchanged``, where there is one, is a look that costs far less than a try: as long as it
    answers True the lock was not released. Its holder may be dead all the same.
    """

    holder: RunRecord | None = None
    unchanged: Callable[[], bool] | None = attrs.field(default=None, eq=False, repr=False)


class Lease(Protocol):
    """A lock that is held by this process. Copies of it are the same object.

    ``record`` is the run that it was taken for. ``interval`` is how often, in seconds, it wants
    to be renewed in the background.

    A lease that is dropped without a release should release itself: a Ctrl-C may come between the
    attempt and the assignment of its result.
    """

    @property
    def record(self) -> RunRecord: ...

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


@runtime_checkable
class Lock(Protocol):
    """A mutex on a project: at most one run holds it.

    ``timeout`` is how long to wait for another run, in seconds: 0 fails at once, None waits for
    ever.
    """

    @property
    def timeout(self) -> float | None: ...

    def try_acquire(self, key: LockKey, record: RunRecord) -> Lease | Held:
        """Try once, without waiting; signals are blocked meanwhile. A lease carries ``record``
        from the first moment.

        Raises:
            InfrastructureError: It cannot be taken at all.
        """
        ...

    def holder(self, key: LockKey) -> RunRecord | None:
        """The record of the run that has the lock now, or had it last; None when unknown."""
        ...


class Place(Protocol):
    """A place in the queue of those who wait for a lock."""

    def is_first(self) -> bool:
        """Whether it is this one's turn to try for the lock. To be asked at least once a second:
        the place of a waiter that does not ask is passed over.
        """
        ...

    def fileno(self) -> int:
        """A descriptor that becomes ready, see poll(2), when it is worth while to ask again before
        the second is over; -1 where there is none.
        """
        ...


@runtime_checkable
class QueuedLock(Lock, Protocol):
    """A lock whose waiters stand in line. The queue is never needed for exclusion."""

    def queue(self, key: LockKey) -> AbstractContextManager[Place]:
        """Stand in line for as long as the block lasts.

        Raises:
            OSError: There is no queue to be had: wait beside it.
            InfrastructureError: The same.
        """
        ...


@runtime_checkable
class SharedLock(Lock, Protocol):
    """A lock that may be seen from other hosts: the ranks of a job find their rank 0 by it."""

    def is_shared(self, key: LockKey) -> bool:
        """Whether other hosts see this lock."""
        ...

    def holder_now(self, key: LockKey) -> RunRecord | None:
        """The record of the run that has the lock now; None where it is free, or not signed."""
        ...
