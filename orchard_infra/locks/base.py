"""The contract of a lock: one attempt at a time, and a lease when it succeeds.

Waiting, logging who is waited for, dead holders and re-entry are the same for every lock, and
live in `orchard_infra.locks.acquiring`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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

    ``reason`` is why nobody may have it just now, where it is not for a holder: its server has
    just started, say. It is shown to people.

    ``unchanged``, where there is one, is a look that costs far less than a try: as long as it
    answers True the lock was not released. Its holder may be dead all the same.
    """

    holder: RunRecord | None = None
    unchanged: Callable[[], bool] | None = attrs.field(default=None, eq=False, repr=False)
    reason: str | None = None


class Lease(Protocol):
    """A lock that is held by this process. Copies of it are the same object.

    ``record`` is the run that it was taken for. ``interval`` is how often, in seconds, it wants
    to be renewed in the background; it may change from one time to the next.

    ``fence`` is greater than that of every lease on the same key before, see "fencing token":
    whoever writes with the greater one is the present holder. Asking for it may raise
    `LockLostError`, and may wait for a disk.

    A lease that is dropped without a release should release itself: a Ctrl-C may come between the
    attempt and the assignment of its result.
    """

    @property
    def record(self) -> RunRecord: ...

    @property
    def interval(self) -> float: ...

    @property
    def fence(self) -> int: ...

    def verify(self) -> None:
        """Ask whether the lock is still ours.

        Raises:
            LockLostError: It is not, and never will be again.
            LockSuspectError: It cannot be asked for. Within a bounded time it can, or is lost.
        """
        ...

    def renew(self) -> None:
        """Keep it: touch, extend ... It raises the same as `verify`."""
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


class RemoteLease(Lease, Protocol):
    """A lease on a server, where a renewal may take seconds. It is renewed in a thread of its own.

    ``watched_fd`` is a descriptor that becomes readable, see poll(2), when it is worth while to
    renew before the interval is over, because the server has hung up, say; -1 where there is none.
    """

    @property
    def watched_fd(self) -> int: ...


def connected(lock: Lock) -> AbstractContextManager[Lock]:
    """The lock on one connection where it has one, see `ServerLock.connect`; else the lock."""
    connect: Callable[[], AbstractContextManager[Lock]] | None = getattr(lock, "connect", None)
    return nullcontext(lock) if connect is None else connect()


def parts_of(lease: Lease) -> Sequence[Lease]:
    """The leases that one consists of, where it stands for several; else the lease itself."""
    parts: Sequence[Lease] = getattr(lease, "parts", (lease,))
    return parts


def not_free_yet(lease: Lease) -> Sequence[str]:
    """What keeps others from a lock after its release, for people: a server could not be told.

    A lease says it by ``not_free_yet``: a text, or None. It may change from one time to the next.
    """
    reasons = (getattr(part, "not_free_yet", None) for part in parts_of(lease))
    return [reason for reason in reasons if reason]


def is_remote(lease: Lease) -> bool:
    """Whether a lease is a `RemoteLease`. No isinstance: for a protocol that reads each property,
    and a fence may have to be drawn first.
    """
    return hasattr(lease, "watched_fd")


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


@runtime_checkable
class ServerLock(SharedLock, Protocol):
    """A lock on a server that several hosts use.

    ``poll`` is how many seconds a waiter lets pass between two tries, on average.
    """

    @property
    def poll(self) -> float: ...

    def connect(self) -> AbstractContextManager[SharedLock]:
        """The same lock on one connection, for all the tries and looks of one waiter. It is made
        when it is first needed. A lease takes it over; else it is closed with the block.
        """
        ...

    def describe(self, key: LockKey) -> str:
        """Where this lock is, for people, without a password."""
        ...

    def runs(self) -> Sequence[RunRecord]:
        """The records of all runs that hold a lock on this server now, in any project.

        Raises:
            InfrastructureError: The server cannot be asked.
        """
        ...


def describe_lock(lock: Lock, key: LockKey) -> str:
    """Where a lock is, for people: the path of a file, an address without its password."""
    describe = getattr(lock, "describe", None)
    return str(key.path) if describe is None else str(describe(key))
