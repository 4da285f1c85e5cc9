"""Several locks that are held together: a file against runs on this host, a server against others.

The locks are taken in the order in which they are named, and given back in reverse. An attempt
that finds a later one held gives the earlier ones back before it returns, so a waiter holds nothing
while it waits, and two that name their locks in different orders cannot wait for each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NoReturn, cast

import attrs

from orchard_infra.errors import (
    ConfigurationError,
    InfrastructureError,
    LockLostError,
    LockSuspectError,
)
from orchard_infra.locks.base import (
    Held,
    Lease,
    Lock,
    LockKey,
    Place,
    QueuedLock,
    SharedLock,
    connected,
    describe_lock,
)
from orchard_infra.locks.checks import check_timeout
from orchard_infra.runs.record import RunRecord
from orchard_infra.system.masking import uninterrupted

_FIRST: Any = object()  # as long as the first of the locks says


def _check_locks(instance: object, attribute: attrs.Attribute[Any], locks: Sequence[Any]) -> None:
    if not locks:
        raise ValueError("AllOf needs at least one lock")
    for lock in locks:
        if isinstance(lock, AllOf):
            raise TypeError("AllOf takes single locks: name those of the inner AllOf beside others")
        if isinstance(lock, type) or not callable(getattr(lock, "try_acquire", None)):
            raise TypeError(f"AllOf takes locks, such as FileLock(); not {lock!r:.80}")


@attrs.frozen(init=False)
class AllOf:
    """Several locks as one: it is held when all of them are, and lost when one of them is.

    >>> from orchard_infra import FileLock
    >>> AllOf(FileLock(timeout=60)).timeout
    60

    Put the lock that most hosts see last: its fence is that of the whole, and the ranks of a job
    on other hosts ask it who holds the lock. ``timeout``, in seconds, is that of the first lock
    unless it is given: 0 fails at once, None waits for ever.
    """

    locks: tuple[Lock, ...] = attrs.field(validator=_check_locks)
    timeout: float | None = attrs.field(validator=check_timeout)

    def __init__(self, *locks: Lock, timeout: float | object | None = _FIRST) -> None:
        if timeout is _FIRST:
            timeout = getattr(locks[0], "timeout", 0.0) if locks else 0.0
        self.__attrs_init__(locks, cast("float | None", timeout))

    def try_acquire(self, key: LockKey, record: RunRecord) -> AllOfLease | Held:
        """See `Lock.try_acquire`."""
        lease = AllOfLease(record)
        outcome: Lease | Held | None = None
        try:
            with uninterrupted():
                for lock in self.locks:
                    outcome = lock.try_acquire(key, record)
                    if isinstance(outcome, Held):
                        lease.release()
                        self._refuse_itself(key, record, outcome)
                        return outcome
                    lease._parts.append(outcome)
                return lease
        except BaseException:
            # Also a Ctrl-C that another thread received, which no mask holds off. The traceback
            # would keep the locks that are taken by now. A second Ctrl-C may break off the release
            # of one of them, and leaves the others to be released.
            with uninterrupted(), contextlib.ExitStack() as stack:
                stack.callback(lease.release)
                if outcome is not None and not isinstance(outcome, Held):
                    stack.callback(outcome.release)
            raise

    def _refuse_itself(self, key: LockKey, record: RunRecord, held: Held) -> None:
        """Two names of one lock: it would wait for itself for ever."""
        if held.holder is not None and held.holder.run_id == record.run_id:
            raise ConfigurationError(
                f"two of these locks are one and the same: {self.describe(key)}. "
                "Name each of them once"
            )

    def holder(self, key: LockKey) -> RunRecord | None:
        """See `Lock.holder`: who holds all of them, else who stands in the way of that."""
        found = self.holder_now(key)
        for lock in self.locks:
            if found is not None:
                break
            found = lock.holder(key)
        return found

    def is_shared(self, key: LockKey) -> bool:
        """See `SharedLock.is_shared`."""
        return any(isinstance(lock, SharedLock) and lock.is_shared(key) for lock in self.locks)

    def holder_now(self, key: LockKey) -> RunRecord | None:
        """See `SharedLock.holder_now`. Who has the last one has taken all others before it."""
        looks = [lock for lock in self.locks if isinstance(lock, SharedLock)]
        shared = [lock for lock in looks if lock.is_shared(key)]
        for lock in (shared or looks)[-1:]:
            return lock.holder_now(key)
        return None

    def queue(self, key: LockKey) -> AbstractContextManager[Place]:
        """See `QueuedLock.queue`: that of the first lock that has one."""
        for lock in self.locks:
            if isinstance(lock, QueuedLock):
                return lock.queue(key)
        return _NoQueue()

    @property
    def poll(self) -> float | None:
        """See `ServerLock.poll`: the longest of all. None where no lock has one."""
        return max((p for lock in self.locks if (p := getattr(lock, "poll", None))), default=None)

    @contextlib.contextmanager
    def connect(self) -> Iterator[AllOf]:
        """See `ServerLock.connect`."""
        with contextlib.ExitStack() as stack:
            locks = [stack.enter_context(connected(lock)) for lock in self.locks]
            yield AllOf(*locks, timeout=self.timeout)

    def describe(self, key: LockKey) -> str:
        """See `ServerLock.describe`."""
        return " and ".join(describe_lock(lock, key) for lock in self.locks)

    def runs(self) -> Sequence[RunRecord]:
        """See `ServerLock.runs`: those on all servers, each once."""
        servers = [lock.runs() for lock in self.locks if hasattr(lock, "runs")]
        found = {record.run_id: record for records in servers for record in records}
        return tuple(found.values())


@attrs.define(eq=False)
class AllOfLease:
    """Locks that this process holds together. The keeper renews each of its ``parts`` alone.

    A copy is the lease itself, and a pickled one holds nothing.
    """

    record: RunRecord
    _parts: list[Lease] = attrs.field(factory=list)

    def __copy__(self) -> AllOfLease:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AllOfLease:
        return self

    def __del__(self) -> None:
        try:
            self.release()
        except Exception:  # the interpreter may be half gone, or the lease never completed
            pass

    @property
    def parts(self) -> Sequence[Lease]:
        """The leases that this one consists of, in the order in which they were taken."""
        return tuple(self._parts)

    @property
    def interval(self) -> float:
        """See `Lease.interval`: the shortest of all."""
        return min(part.interval for part in self._parts)

    @property
    def fence(self) -> int:
        """See `Lease.fence`: that of the last lock, which is taken when the others are."""
        return self._parts[-1].fence

    def verify(self) -> None:
        """See `Lease.verify`. One that is lost counts for more than one that cannot be asked."""
        self._ask_all([part.verify for part in self._parts])

    def renew(self) -> None:
        """See `Lease.renew`."""
        self._ask_all([part.renew for part in self._parts])

    def _ask_all(self, questions: Sequence[Callable[[], None]]) -> None:
        # All of them, also after a loss: each learns by this of its own, and lets go.
        lost: LockLostError | None = None
        suspect: LockSuspectError | None = None
        for ask in questions:
            try:
                ask()
            except LockLostError as error:
                lost = lost or error
            except LockSuspectError as error:
                suspect = suspect or error
        if lost is not None:
            raise lost
        if suspect is not None:
            raise suspect

    def release(self) -> None:
        """See `Lease.release`. In reverse order, and each, whatever becomes of the others.

        Raises:
            Exception: One of them could not be released. All others were.
        """
        with uninterrupted(), contextlib.ExitStack() as stack:
            for part in self._parts:
                stack.callback(part.release)


class _NoQueue:
    """The queue of locks that have none: its waiters wait beside each other."""

    def __enter__(self) -> NoReturn:
        raise InfrastructureError("none of these locks has a queue")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass
