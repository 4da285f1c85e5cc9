"""Locks on servers, ours and the bare ones, as `_handing` hands them over.

Every class can be pickled, so that a waiting process makes its own. "Bare" is what the server or
its client library offers, without a record, a fence, a watch or an answer to a fault.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import portalocker
from _handing import PATIENCE

from orchard_infra.locks.acquiring import acquire
from orchard_infra.locks.base import Lease, Lock, LockKey
from orchard_infra.runs.record import describe_this_run


@attrs.define
class _Ours:
    """One of our locks, with the loop that waits for it."""

    url: str
    path: Path
    _lease: Lease | None = None

    def acquire(self) -> None:
        record = describe_this_run(self.path.stem, lock=str(self.path))
        self._lease = acquire(self._lock(), LockKey(self.path.stem, self.path), record)

    def release(self) -> None:
        assert self._lease is not None
        self._lease.release()

    def _lock(self) -> Lock:
        raise NotImplementedError


class OurFile(_Ours):
    def _lock(self) -> Lock:
        from orchard_infra import FileLock

        return FileLock(timeout=PATIENCE)


class OurPostgres(_Ours):
    def _lock(self) -> Lock:
        from orchard_infra.locks.postgres import PostgresLock

        return PostgresLock(self.url, timeout=PATIENCE)


class OurRedis(_Ours):
    def _lock(self) -> Lock:
        from orchard_infra.locks.redis import RedisLock

        # Without the guard, which lets nobody in for a while after the start of the server.
        return RedisLock(self.url, timeout=PATIENCE, guard=False)


@attrs.define
class _Bare:
    """A bare lock. The connection is opened when it is first needed."""

    url: str
    path: Path
    _connection: Any = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class BarePostgres(_Bare):
    """An advisory lock on an open connection. The server itself wakes the waiter."""

    def acquire(self) -> None:
        if self._connection is None:
            import psycopg

            self._connection = psycopg.connect(
                self.url, autocommit=True, prepare_threshold=None, connect_timeout=3
            )
        self._ask("pg_advisory_lock")

    def release(self) -> None:
        self._ask("pg_advisory_unlock")

    def _ask(self, function: str) -> None:
        text = f"SELECT {function}(hashtextextended(%s, 0))"
        self._connection.execute(text, (self.path.stem,)).fetchone()


class BarePostgresAnew(BarePostgres):
    """The same with a connection for each time, as whoever has the lock needs his own."""

    def release(self) -> None:
        super().release()
        self.close()


class BareRedis(_Bare):
    """redis-py's lock, which looks every 0.1 s, on an open connection."""

    _lock: Any = None

    def acquire(self) -> None:
        import redis

        if self._connection is None:
            self._connection = redis.Redis.from_url(self.url)
        self._lock = self._connection.lock(f"bare:{self.path.stem}", timeout=30.0)
        assert self._lock.acquire(blocking_timeout=PATIENCE)

    def release(self) -> None:
        self._lock.release()


class BareRedisAnew(BareRedis):
    """The same with a connection for each time."""

    def release(self) -> None:
        super().release()
        self.close()


class PortalockerRedis(_Bare):
    """portalocker's lock: a channel on the server that its holder listens to."""

    _lock: Any = None

    def acquire(self) -> None:
        import redis

        if self._connection is None:
            self._connection = redis.Redis.from_url(
                self.url, health_check_interval=10, decode_responses=True
            )
        self._lock = portalocker.RedisLock(
            f"portalocker:{self.path.stem}", self._connection, timeout=PATIENCE
        )
        self._lock.acquire()

    def release(self) -> None:
        self._lock.release()
