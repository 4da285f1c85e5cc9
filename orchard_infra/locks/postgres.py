"""The lock on a PostgreSQL server: a session advisory lock, and a row with its fence and holder.

The server frees an advisory lock when the session that has it ends, whatever ends it, and not
before: a holder that is stopped or stalled keeps it, and a killed one loses it at once. Each lease
therefore has a connection of its own for as long as it lives. The row, in one table for all
projects, tells who has the lock, and counts the fences.

When the connection breaks, the lock is *suspect*. The lease takes it back if it can be taken, and
if the row shows that nobody else had it meanwhile; else it is lost for good. A server that can no
longer reach its client ends the session by itself; its keepalives are set so that this happens only
after the lease has given up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from orchard_infra.errors import (
    ConfigurationError,
    InfrastructureError,
    LockLostError,
    LockSuspectError,
)
from orchard_infra.locks.base import Held, LockKey
from orchard_infra.locks.urls import find_url, redacted
from orchard_infra.runs.record import RunRecord, from_json, to_json
from orchard_infra.system import files
from orchard_infra.system.masking import interruptible, uninterrupted
from orchard_infra.system.text import printable

if TYPE_CHECKING:
    import psycopg

T = TypeVar("T")

_DOMAIN = b"orchard_infra lock\0"  # no other program's advisory locks are ours
_OLDEST = 140000  # the first version with idle_session_timeout
_CONNECT = 3  # seconds for a connection
_RETRY = 0.5  # seconds between two tries to take a suspect lock back
_BRIEF = 2.0  # seconds for an answer that is not worth a longer wait
_RESTART = 60.0  # seconds for which a waiter puts up with a server that is away
_FORKS = 20  # connections that are given up because this process was forked meanwhile

_NO_TABLE = "42P01"  # undefined_table, see "PostgreSQL Error Codes"

# A table, in a schema or not; as it stands in SQL, where what is not quoted is in small letters.
_TABLE = re.compile(r"[a-z_][a-z0-9_]{0,62}(\.[a-z_][a-z0-9_]{0,62})?")

_CREATE = """CREATE TABLE IF NOT EXISTS {table} (key text PRIMARY KEY, project text NOT NULL, \
lock bigint NOT NULL, fence bigint NOT NULL, backend integer NOT NULL, since timestamptz NOT NULL, \
owner text NOT NULL)"""
_GRANT = "GRANT SELECT, INSERT, UPDATE ON {table} TO {role}"

# One round trip. The CASE is for poolers, which may send it to another backend: the lock would be
# held there, and nobody could give it back. The time keeps a fence from going back when somebody
# has emptied the table.
_TRY = """
WITH tried AS MATERIALIZED (
    SELECT CASE WHEN pg_backend_pid() = $2::integer THEN pg_try_advisory_lock($1::bigint) END AS got
), signed AS (
    INSERT INTO {table} AS l (key, project, lock, fence, backend, since, owner)
    SELECT $3::text, $4::text, $1::bigint,
        floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint,
        $2::integer, clock_timestamp(), $5::text
    FROM tried WHERE got
    ON CONFLICT (key) DO UPDATE SET fence = greatest(l.fence + 1, excluded.fence),
        project = excluded.project, lock = excluded.lock, backend = excluded.backend,
        since = excluded.since, owner = excluded.owner
    RETURNING fence
)
SELECT got, (SELECT fence FROM signed) FROM tried
"""
_TRY_ALONE = """
SELECT CASE WHEN pg_backend_pid() = $2::integer THEN pg_try_advisory_lock($1::bigint) END
"""
_UNLOCK = "SELECT pg_advisory_unlock($1::bigint)"

# The advisory lock of row l, as pg_locks shows it.
_IS_LOCK = """p.locktype = 'advisory' AND p.objsubid = 1 AND p.granted
    AND p.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (p.classid::bigint << 32 | p.objid::bigint) = {lock}"""

_HOLDER = f"""
SELECT l.owner, l.fence, EXISTS (
    SELECT FROM pg_locks p WHERE p.pid = l.backend AND {_IS_LOCK.format(lock="l.lock")}
) FROM {{table}} l WHERE l.key = $1::text
"""
_RUNS = f"""
SELECT l.owner, l.fence FROM {{table}} l JOIN pg_locks p
ON p.pid = l.backend AND {_IS_LOCK.format(lock="l.lock")} ORDER BY l.since
"""
_CHECK = f"""
SELECT EXISTS (
    SELECT FROM pg_locks p WHERE p.pid = pg_backend_pid() AND p.pid = $2::integer
    AND {_IS_LOCK.format(lock="$1::bigint")}
), (SELECT fence FROM {{table}} WHERE key = $3::text)
"""
_TAKE_BACK = """
UPDATE {table} SET backend = pg_backend_pid() WHERE key = $1::text AND fence = $2::bigint
RETURNING fence
"""
_PUT_BACK = """
INSERT INTO {table} (key, project, lock, fence, backend, since, owner)
VALUES ($1::text, $2::text, $3::bigint, $4::bigint, pg_backend_pid(), clock_timestamp(), $5::text)
ON CONFLICT (key) DO NOTHING
"""
_FENCE = "SELECT fence FROM {table} WHERE key = $1::text"
# Ends our own session of before, which the server has not yet seen to be cut off.
_END_OLD = f"""
SELECT pg_terminate_backend(p.pid) FROM {{table}} l JOIN pg_locks p
ON p.pid = l.backend AND {_IS_LOCK.format(lock="l.lock")}
WHERE l.key = $1::text AND l.fence = $2::bigint AND p.pid <> pg_backend_pid()
"""

_logger = logging.getLogger("Infrastructure")


def _now() -> float:
    """Seconds on a clock that also counts the time for which the machine was suspended."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _valid_timeout(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None:
        _valid_seconds(instance, attribute, value)


def _valid_seconds(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not value >= 0 or (value == 0 and attribute.name != "timeout"):  # type: ignore[operator]
        raise ValueError(f"{attribute.name} must be a number of seconds, not {value!r}")


def _valid_table(instance: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if not _TABLE.fullmatch(value):
        raise ValueError(
            f"table must be a name in small letters, digits and _, or schema.name; not {value!r}"
        )


def _valid_key(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not (isinstance(value, str) and value):
        raise ValueError(f"lock_key must be a text that is not empty, or None; not {value!r}")


@attrs.frozen
class PostgresLock:
    """A lock on a PostgreSQL server, for runs on several hosts. It needs the extra "postgres".

    ``url`` is anything that libpq takes: a URL, ``host=... dbname=...``, ``service=...``. None
    reads ORCHARD_INFRA_LOCK_URL; ``file:PATH`` names a file with the URL in it. All hosts use one
    and the same database. No pooler may stand between, except for one that only forwards bytes.

    ``timeout``, in seconds, is how long to wait for another run: 0 fails at once, None waits for
    ever. ``lock_key`` stands for the project's name where the two should differ. ``table`` is
    created when it is missing.

    The other times are in seconds, too. A waiter tries every ``poll``. A held lock is looked after
    every ``interval``, and suspect when the server does not answer within ``answer``; unless it
    does within another ``grace``, the lock is lost. The server ends a session that it cannot
    reach after the sum of these three and 10 s more.
    """

    url: str | None = attrs.field(default=None, repr=False)
    timeout: float | None = attrs.field(default=0.0, validator=_valid_timeout)
    lock_key: str | None = attrs.field(default=None, validator=_valid_key)
    table: str = attrs.field(default="orchard_infra_locks", validator=_valid_table)
    poll: float = attrs.field(default=0.5, validator=_valid_seconds, kw_only=True)
    interval: float = attrs.field(default=5.0, validator=_valid_seconds, kw_only=True)
    answer: float = attrs.field(default=5.0, validator=_valid_seconds, kw_only=True)
    grace: float = attrs.field(default=10.0, validator=_valid_seconds, kw_only=True)

    def try_acquire(self, key: LockKey, record: RunRecord) -> PostgresLease | Held:
        """See `Lock.try_acquire`. The table is created when it is missing."""
        with self.connect() as connected:
            return connected.try_acquire(key, record)

    def holder(self, key: LockKey) -> RunRecord | None:
        """See `Lock.holder`.

        Raises:
            InfrastructureError: The server cannot be asked.
        """
        with self.connect() as connected:
            return connected.holder(key)

    def holder_now(self, key: LockKey) -> RunRecord | None:
        """See `SharedLock.holder_now`.

        Raises:
            InfrastructureError: The server cannot be asked.
        """
        with self.connect() as connected:
            return connected.holder_now(key)

    def is_shared(self, key: LockKey) -> bool:
        """See `SharedLock.is_shared`: it is."""
        return True

    def runs(self) -> Sequence[RunRecord]:
        """See `ServerLock.runs`."""
        with self.connect() as connected:
            return connected.runs()

    def connect(self) -> ConnectedPostgresLock:
        """See `ServerLock.connect`."""
        return ConnectedPostgresLock(self)

    def describe(self, key: LockKey) -> str:
        """See `ServerLock.describe`."""
        name = key.project if self.lock_key is None else self.lock_key
        return f"{printable(name)[:200]} on {self._server()}"

    def _server(self) -> str:
        """The server's address, put together of its parts, so that no password can slip in."""
        try:
            given = _parse(find_url(self.url))
        except InfrastructureError:
            return "PostgreSQL"
        if given.get("service"):
            return f"the PostgreSQL service {printable(given['service'])}"
        user = f"{given['user']}@" if given.get("user") else ""
        host = given.get("host") or given.get("hostaddr") or os.environ.get("PGHOST", "")
        port = f":{given['port']}" if given.get("port") else ""
        return printable(f"postgresql://{user}{host}{port}/{given.get('dbname', '')}")

    def _names(self, key: LockKey) -> _Names:
        name = key.project if self.lock_key is None else self.lock_key
        digest = hashlib.sha256(_DOMAIN + name.encode("utf-8", "surrogatepass")).digest()
        # ASCII, because the database may have any encoding.
        shown = json.dumps(printable(name))[1:-1][:200]
        return _Names(digest.hex(), int.from_bytes(digest[:8], "big", signed=True), shown)

    def _sql(self, statement: str, **names: str) -> str:
        return statement.format(table=self.table, **names)

    def _create_table(self, session: _Session) -> None:
        try:
            session.ask(self._sql(_CREATE))
        except _Refused as error:
            # IF NOT EXISTS does not help two who create it in the same instant.
            if error.sqlstate not in ("42P07", "23505"):  # duplicate_table, unique_violation
                raise

    def _open(self, key: LockKey | None, answer: float, within: float | None = None) -> _Session:
        """A session on the server. It is closed when it is dropped.

        Raises:
            InfrastructureError: There is none to be had, or none that could hold a lock.
        """
        for _ in range(_FORKS):
            forks = _forks
            session = self._connect(key, answer, within)
            if forks == _forks:
                break
            # A child that was forked meanwhile has the socket, and would keep the lock. After
            # the goodbye to the server it is worth nothing.
            session.close()
        else:
            raise InfrastructureError(
                f"cannot connect to {session.where}: this program forks all the time meanwhile"
            )
        try:
            session.begin()
        except BaseException:
            session.close()
            raise
        return session

    def _connect(self, key: LockKey | None, answer: float, within: float | None) -> _Session:
        psycopg = _import_psycopg()
        settings = _settings(_parse(find_url(self.url)), key, self)
        if within is not None:
            settings["connect_timeout"] = str(max(2, round(within)))
        where, failure = self._server(), None
        with interruptible():
            try:
                return _Session(
                    psycopg.connect(autocommit=True, prepare_threshold=None, **settings),
                    where,
                    self.table,
                    answer,
                )
            except (psycopg.Error, UnicodeError, OSError) as error:
                failure = _connection_error(error, where, settings)
        # Outside of the handler: an error that carries psycopg's own would show what that shows.
        raise failure


@attrs.frozen
class _Names:
    """What stands for a project on the server: the row's key, the lock's number, a name to read."""

    key: str
    lock: int
    shown: str


@attrs.define(eq=False)
class ConnectedPostgresLock:
    """A `PostgresLock` on one connection, which is made when it is first needed."""

    _lock: PostgresLock
    _session: _Session | None = attrs.field(default=None, init=False)
    _held: Held | None = attrs.field(default=None, init=False)  # what the latest try has shown
    _away_since: float | None = attrs.field(default=None, init=False)

    def __enter__(self) -> ConnectedPostgresLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def timeout(self) -> float | None:
        return self._lock.timeout

    @property
    def poll(self) -> float:
        return self._lock.poll

    def try_acquire(self, key: LockKey, record: RunRecord) -> PostgresLease | Held:
        """See `Lock.try_acquire`. A server that was there before may be away for a minute, to be
        restarted, say: a waiter goes on waiting.
        """
        with uninterrupted():
            try:
                outcome = self._asking(lambda session: self._try(session, key, record), key)
            except _Unreachable:
                self._away_since = self._away_since or _now()
                if self._held is None or _now() - self._away_since >= _RESTART:
                    raise
                return self._held
            self._away_since = None
            if isinstance(outcome, Held):
                self._held = outcome
            else:
                self._session = None  # the lease has it now
            return outcome

    def holder(self, key: LockKey) -> RunRecord | None:
        """See `Lock.holder`."""
        return self._look(key)[0]

    def holder_now(self, key: LockKey) -> RunRecord | None:
        """See `SharedLock.holder_now`."""
        record, is_held = self._look(key)
        return record if is_held else None

    def is_shared(self, key: LockKey) -> bool:
        """See `SharedLock.is_shared`."""
        return True

    def runs(self) -> Sequence[RunRecord]:
        """See `ServerLock.runs`."""

        def ask(session: _Session) -> Sequence[RunRecord]:
            rows = session.look(self._lock._sql(_RUNS))
            return [record for row in rows if (record := _record(*row)) is not None]

        return self._asking(ask, None)

    def _look(self, key: LockKey) -> tuple[RunRecord | None, bool]:
        """The record in the row, and whether its run has the lock now."""
        return self._asking(lambda session: self._read(session, key), key)

    def _read(self, session: _Session, key: LockKey) -> tuple[RunRecord | None, bool]:
        rows = session.look(self._lock._sql(_HOLDER), self._lock._names(key).key)
        if not rows:
            return None, False
        [(owner, fence, is_held)] = rows
        return _record(owner, fence), is_held == "t"

    def _try(self, session: _Session, key: LockKey, record: RunRecord) -> PostgresLease | Held:
        names = self._lock._names(key)
        parameters = (names.lock, session.backend, names.key, names.shown, _owner(record))
        try:
            rows = session.ask(self._lock._sql(_TRY), *parameters)
        except _Refused as error:
            if error.sqlstate != _NO_TABLE:
                raise
            self._lock._create_table(session)
            rows = session.ask(self._lock._sql(_TRY), *parameters)
        got, fence = rows[0]
        if got is None:
            raise session.pooler()
        if got == "t":
            return PostgresLease(key, record, self._lock, int(fence or 0), session)
        holder, is_held = self._read(session, key)
        return Held(holder if is_held else None)

    def _asking(self, ask: Callable[[_Session], T], key: LockKey | None) -> T:
        """What ``ask`` answers. A connection that has broken since the last time is made again."""
        try:
            if self._session is not None:
                try:
                    return ask(self._session)
                except _Unreachable:
                    self._close()
            self._session = self._lock._open(key, self._lock.answer)
            return ask(self._session)
        except BaseException:
            # Also a Ctrl-C: the server may just have granted what nobody will hear of.
            self._close()
            raise

    def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


@attrs.define(eq=False)
class PostgresLease:
    """An advisory lock that is held by this process, and the connection that it lives in.

    A copy is the lease itself. A pickled one, and one in a forked child, holds nothing.
    """

    _key: LockKey
    record: RunRecord
    _lock: PostgresLock
    _fence: int = 0  # 0: a pickled copy, which never held anything
    _session: _Session | None = None
    _pid: int = attrs.field(factory=os.getpid, init=False)
    _suspect_since: float | None = attrs.field(default=None, init=False)
    _lost: LockLostError | None = attrs.field(default=None, init=False)
    _released: bool = attrs.field(default=False, init=False)
    _mutex: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _confirmed_at: float = attrs.field(factory=_now, init=False)

    def __copy__(self) -> PostgresLease:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PostgresLease:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return PostgresLease, (self._key, self.record, self._lock)

    # A lease that is dropped needs no __del__: its session closes, and the server frees the lock.

    @property
    def interval(self) -> float:
        """See `Lease.interval`: short while the lock is suspect."""
        if self._suspect_since is None:
            return self._lock.interval
        return min(_RETRY, self._lock.interval)

    @property
    def watched_fd(self) -> int:
        """See `RemoteLease.watched_fd`: the socket, on which the server says that it leaves."""
        session = self._session
        return -1 if session is None or self._pid != os.getpid() else session.fileno()

    @property
    def fence(self) -> int:
        """See `Lease.fence`. It was drawn together with the lock.

        Raises:
            LockLostError: The lock is lost.
        """
        if self._lost is not None or self._fence == 0:
            self._refuse_without_lock()
        return self._fence

    def verify(self) -> None:
        """See `Lease.verify`: the server is asked. It answers, or is given up, within seconds."""
        self._confirm()

    def renew(self) -> None:
        """See `Lease.renew`: the same as `verify`, unless that was just done."""
        self._confirm(unless_recent=True)

    def release(self) -> None:
        """See `Lease.release`. Where the server cannot be reached it frees the lock by itself."""
        if self._released or self._session is None or self._pid != os.getpid():
            self._released = True
            return
        with uninterrupted():
            self._released = True
            # Whoever asks the server just now closes the session instead, when that is over.
            if self._mutex.acquire(timeout=_BRIEF):
                try:
                    self._give_back()
                finally:
                    self._mutex.release()

    def _give_back(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        try:
            # Closing would free it too, but only some time after the release.
            if self._suspect_since is None:
                session.ask(_UNLOCK, self._names.lock, seconds=_BRIEF)
        except InfrastructureError as error:
            _logger.warning(
                "the lock %s could not be given back: %s. The server frees it when it sees that "
                "this connection is closed",
                self._where,
                error,
            )
        finally:
            session.close()

    def _confirm(self, *, unless_recent: bool = False) -> None:
        self._refuse_without_lock()
        # Signals wait for the mutex, for some seconds at most. A Ctrl-C between its acquisition
        # and the next line would keep it for ever.
        with uninterrupted():
            if not self._mutex.acquire(timeout=self._lock.answer):
                raise self._suspect("another thread waits for an answer of the server")
            try:
                self._refuse_without_lock()
                if unless_recent and self._is_recent():
                    return
                with interruptible():
                    self._ask_server()
            finally:
                if self._released:  # while we were asking
                    self._give_back()
                self._mutex.release()

    def _refuse_without_lock(self) -> None:
        if self._fence == 0:
            raise self._error(
                f"this is a pickled copy of the lease on {self._where}: only the process that "
                "took the lock can verify it"
            )
        if self._pid != os.getpid():
            raise self._error(
                f"this process was forked from the one that holds the lock {self._where} (pid "
                f"{self._pid}), and has no part in it: verify the lock there"
            )
        if self._lost is not None:
            raise self._lost
        if self._released:
            raise self._error(f"the lock {self._where} was released")

    def _is_recent(self) -> bool:
        """Whether it was confirmed just now: by `verify` in another thread, whose answer has woken
        the one that renews.
        """
        session = self._session
        return (
            session is not None
            and _now() - self._confirmed_at < self._lock.interval / 2
            and not session.has_input()
        )

    def _ask_server(self) -> None:
        """Confirm the lock, or take it back.

        Raises:
            LockLostError: Somebody else may have it.
            LockSuspectError: Nobody knows.
        """
        session = self._session
        if session is not None:
            try:
                self._check(session)
                self._confirmed_at = _now()
                return
            except _Unreachable as error:
                # From now on, however long it takes to see whether it can be taken back.
                self._suspect_since = _now()
                self._session = None
                session.close()
                _logger.debug("the lock %s is suspect: %s", self._where, error)
        try:
            self._take_back()
        except InfrastructureError as error:
            if self._lost is not None:
                raise self._lost from None
            since = _now() if self._suspect_since is None else self._suspect_since
            if _now() - since >= self._lock.grace:
                self._lose(f"its server could not be asked for too long: {error}")
            raise self._suspect(str(error)) from None

    def _check(self, session: _Session) -> None:
        names = self._names
        parameters = (names.lock, session.backend, names.key)
        rows = session.look(self._lock._sql(_CHECK), *parameters)
        if not rows:
            self._lock._create_table(session)
            rows = session.ask(self._lock._sql(_CHECK), *parameters)
        [(is_held, fence)] = rows
        if is_held != "t":
            self._lose("the server says that this session does not hold it")
        if fence is None:
            # Somebody has emptied or dropped the table. The lock itself was held all the time.
            owner = _owner(self.record)
            session.ask(
                self._lock._sql(_PUT_BACK), names.key, names.shown, names.lock, self._fence, owner
            )
        elif int(fence) != self._fence:
            self._lose(f"its fence is {fence}, and not {self._fence} any more")

    def _take_back(self) -> None:
        """Take the lock again, in a new session, if nobody had it meanwhile."""
        names = self._names
        session = self._lock._open(self._key, _BRIEF, within=_CONNECT)
        try:
            [(got,)] = session.ask(_TRY_ALONE, names.lock, session.backend)
            if got == "t" and session.look(self._lock._sql(_TAKE_BACK), names.key, self._fence):
                since, self._suspect_since = self._suspect_since, None
                self._session, self._confirmed_at = session, _now()
                _logger.info(
                    "the lock %s was taken back after %.1f s without a connection: nobody else "
                    "had it",
                    self._where,
                    0.0 if since is None else _now() - since,
                )
                return
            found = session.look(self._lock._sql(_FENCE), names.key)
            fence = found[0][0] if found else None
            if fence is None:
                self._lose("after a loss of the connection its server has no record of this run")
            elif int(fence) != self._fence:
                self._lose("after a loss of the connection another run has taken it")
            with contextlib.suppress(_Refused):  # another role's session
                session.ask(self._lock._sql(_END_OLD), names.key, self._fence)
            raise InfrastructureError("the server has not yet seen the end of the old connection")
        finally:
            if self._session is not session:
                session.close()

    @property
    def _names(self) -> _Names:
        return self._lock._names(self._key)

    @property
    def _where(self) -> str:
        return self._lock.describe(self._key)

    def _lose(self, why: str) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
        self._lost = self._error(
            f"the lock {self._where} was lost: {why}. Another run may have started; stop this one"
        )
        raise self._lost

    def _error(self, message: str) -> LockLostError:
        return LockLostError(message, lock_path=str(self._key.path))

    def _suspect(self, why: str) -> LockSuspectError:
        return LockSuspectError(
            f"the lock {self._where} cannot be confirmed: {why}. Unless it is within "
            f"{self._lock.grace:g} s, it is lost",
            lock_path=str(self._key.path),
        )


# Sockets of our sessions, each with its device and inode: libpq may have closed one by itself.
_sockets: dict[int, tuple[int, int]] = {}
_forks = 0  # of this process, so far
_abandoned: list[object] = []  # connections of libpq whose socket this program has closed


class _Session:
    """A connection to the server, which nobody else uses. It closes itself when it is dropped.

    psycopg makes the connection; what is asked goes through its wrapper of libpq, because there a
    wait can have an end.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], where: str, table: str, answer: float
    ) -> None:
        self._pgconn = connection.pgconn
        # A psycopg connection that is dropped while it is open says so; dropping one is a way
        # to close it here.
        del connection.pgconn
        self._fd = self._pgconn.socket
        self._file = files.device_and_inode(os.fstat(self._fd))
        self._pid = os.getpid()
        self.where, self.table, self.answer = where, table, answer
        self.backend = self._pgconn.backend_pid
        _sockets[self._fd] = self._file

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # the interpreter may be half gone, or the session never completed
            pass

    def begin(self) -> None:
        """Refuse a server whose locks would not lock.

        Raises:
            InfrastructureError: It is one.
        """
        version = self._pgconn.server_version
        if version < _OLDEST:
            raise InfrastructureError(
                f"{self.where} is PostgreSQL {version // 10000}: the lock needs version "
                f"{_OLDEST // 10000} or later"
            )
        [(backend, is_standby, name)] = self.ask(
            "SELECT pg_backend_pid(), pg_is_in_recovery(), version()"
        )
        # Others speak the same protocol, and have advisory locks that do nothing.
        if not (name or "").startswith("PostgreSQL "):
            raise InfrastructureError(f"{self.where} is no PostgreSQL, but {printable(name or '')}")
        if backend != str(self.backend):
            raise self.pooler()
        if is_standby == "t":
            raise InfrastructureError(
                f"{self.where} is a standby, which has no locks of its own: give the address of "
                "the primary, or all addresses with target_session_attrs=read-write"
            )

    def pooler(self) -> InfrastructureError:
        return InfrastructureError(
            f"a connection pooler stands before {self.where}, such as PgBouncer, and shares one "
            "session among its clients, so that the lock would not lock: give the address of the "
            "server itself"
        )

    def fileno(self) -> int:
        """The socket; -1 where this program has closed it."""
        return self._fd if files.still_open(self._fd, self._file) else -1

    def has_input(self) -> bool:
        """Whether the server has said something, or has hung up."""
        return _wait(self._fd, select.POLLIN, 0.0)

    def ask(
        self, statement: str, *parameters: str | int, seconds: float | None = None
    ) -> list[tuple[str | None, ...]]:
        """The rows that a statement returns, as texts.

        Raises:
            _Unreachable: The connection is broken, or there was no answer in time. What the
                server has done is unknown: close the session.
            _Refused: The server reports an error.
        """
        import psycopg

        deadline = _now() + (self.answer if seconds is None else seconds)
        failure: InfrastructureError | None = None
        with interruptible():
            if self.fileno() < 0:
                raise _Unreachable(f"this program has closed the connection to {self.where}")
            try:
                self._results(deadline)  # of a question that a Ctrl-C broke off
                values = [str(value).encode() for value in parameters]
                self._pgconn.send_query_params(statement.encode(), values)
                results = self._results(deadline)
            except (psycopg.Error, OSError) as error:
                reason = _plain(str(error))
                failure = _Unreachable(f"the connection to {self.where} broke: {reason}")
        if failure is not None:
            raise failure
        for result in results:
            if result.status == psycopg.pq.ExecStatus.FATAL_ERROR:
                raise self._refused(result)
        last = results[-1]
        return [
            tuple(
                None if (value := last.get_value(row, column)) is None else value.decode()
                for column in range(last.nfields)
            )
            for row in range(last.ntuples)
        ]

    def look(self, statement: str, *parameters: str | int) -> list[tuple[str | None, ...]]:
        """The same; no rows where the table does not exist."""
        try:
            return self.ask(statement, *parameters)
        except _Refused as error:
            if error.sqlstate != _NO_TABLE:
                raise
            return []

    def _results(self, deadline: float) -> list[Any]:
        found: list[Any] = []
        while True:
            unsent = self._pgconn.flush()
            if unsent or self._pgconn.is_busy():
                events = select.POLLIN | (select.POLLOUT if unsent else 0)
                if not _wait(self._fd, events, max(0.0, deadline - _now())):
                    raise _Unreachable(f"{self.where} does not answer")
                self._pgconn.consume_input()
                continue
            result = self._pgconn.get_result()
            if result is None:
                return found
            found.append(result)

    def _refused(self, result: Any) -> InfrastructureError:
        import psycopg

        def field(name: str) -> str:
            value = result.error_field(psycopg.pq.DiagnosticField[name])
            return _plain((value or b"").decode("utf-8", "replace"))

        sqlstate, message = field("SQLSTATE"), field("MESSAGE_PRIMARY")
        # The classes of lost connections, and of a server that is shut down.
        if sqlstate.startswith(("08", "57P")):
            return _Unreachable(f"the connection to {self.where} broke: {message}")
        return _Refused(self._explained(sqlstate, message), sqlstate)

    def _explained(self, sqlstate: str, message: str) -> str:
        """An error of the server, and what to do about it."""
        if sqlstate in ("42501", "3F000"):  # insufficient_privilege, invalid_schema_name
            role = self._pgconn.user.decode("utf-8", "replace")
            quoted = '"' + role.replace('"', '""') + '"'
            create = _CREATE.format(table=self.table)
            grant = _GRANT.format(table=self.table, role=quoted)
            return (
                f"the role {role} may not use the table {self.table} on {self.where}: {message}. "
                f"Have its owner, or an administrator, run: {create}; {grant};"
            )
        if sqlstate == "25006":  # read_only_sql_transaction
            return f"{self.where} is read-only ({message}): the lock needs to write to it"
        if sqlstate.startswith("42"):
            return (
                f"the table {self.table} on {self.where} is not one of this version: {message}. "
                "Use another table=, or have it dropped while no run holds a lock"
            )
        return f"{self.where} refuses the lock: {message} ({sqlstate})"

    def close(self) -> None:
        """End the session, without waiting. In a forked child it does nothing."""
        if self._pid != os.getpid() or self._pgconn.status == 1:  # ConnStatus.BAD
            _forget(self._fd, self._file)
        elif files.still_open(self._fd, self._file):
            self._pgconn.finish()
            _forget(self._fd, self._file)  # later: a fork may come between
        else:
            # By now the number may be that of another file, which libpq would close.
            _abandoned.append(self._pgconn)


def _wait(fd: int, events: int, seconds: float) -> bool:
    """Wait for a descriptor; whether it became ready."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(seconds * 1000))


def _forget(fd: int, file: tuple[int, int]) -> None:
    if _sockets.get(fd) == file:
        del _sockets[fd]


def _count_fork() -> None:
    global _forks
    _forks += 1


def _let_go() -> None:
    """In a forked child: close its copies of the sockets, without a word to the server. A child
    that outlives its parent would keep the session alive, and with it the lock.
    """
    for fd, file in tuple(_sockets.items()):
        if files.still_open(fd, file):
            try:
                null = os.open(os.devnull, os.O_RDWR)
            except OSError:
                os.close(fd)
                continue
            # The number stays taken, so that libpq's own copy of it never means another file.
            os.dup2(null, fd, inheritable=False)
            os.close(null)
    _sockets.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_count_fork, after_in_child=_let_go)


class _Unreachable(InfrastructureError):
    """The server cannot be reached, or does not answer."""


class _Refused(InfrastructureError):
    """The server reports an error. ``sqlstate`` says which."""

    def __init__(self, message: str, sqlstate: str = "") -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


def _import_psycopg() -> Any:
    try:
        import psycopg
    except ImportError as error:  # also where psycopg finds no libpq
        reason = str(error).partition("\n")[0]
    else:
        return psycopg
    raise ConfigurationError(
        f"PostgresLock needs psycopg ({reason}): pip install 'orchard-infra[postgres]'"
    )


def _parse(url: str) -> dict[str, str]:
    """The parts of a URL, or of a connection string of libpq.

    Raises:
        ConfigurationError: It is neither, or psycopg is missing.
    """
    psycopg = _import_psycopg()
    from psycopg.conninfo import conninfo_to_dict

    try:
        return {name: str(value) for name, value in conninfo_to_dict(url).items()}
    except (psycopg.Error, UnicodeError, ValueError) as error:
        # What libpq quotes may be a part of the password.
        reason = re.sub(r'"[^"]*"?', "...", _plain(str(error)))
    raise ConfigurationError(
        f"the lock's URL cannot be read ({reason}): it should look like "
        "postgresql://user@host:5432/database; in a password, write %40 for @, %2F for /, %3A for "
        ": and %25 for %"
    )


def _settings(
    given: Mapping[str, str],
    key: LockKey | None,
    lock: PostgresLock,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """How to connect. What the URL says counts more than what is set here."""
    # The server must not free the lock before its holder has given up.
    silence = round(lock.interval + lock.answer + lock.grace + 10)
    options = {
        "tcp_keepalives_idle": max(1, silence // 2),
        "tcp_keepalives_interval": max(1, silence // 6),
        "tcp_keepalives_count": 3,
        "tcp_user_timeout": silence * 1000,
        "idle_session_timeout": 0,
        "statement_timeout": 0,
        # Somebody's open transaction may have the row.
        "lock_timeout": 3000,
        "default_transaction_isolation": "read\\ committed",
    }
    settings = {
        "keepalives": "1",
        "keepalives_idle": "5",
        "keepalives_interval": "2",
        "keepalives_count": "3",
        "tcp_user_timeout": "8000",
        **given,
    }
    if "PGCONNECT_TIMEOUT" not in environ:
        settings.setdefault("connect_timeout", str(_CONNECT))
    # For administrators, in pg_stat_activity. PGAPPNAME and the URL may say something else.
    project = "" if key is None else f" {key.project}"
    name = f"orchard_infra {os.getpid()}@{os.uname().nodename}{project}"
    settings.setdefault("fallback_application_name", ascii(name)[1:-1][:63])
    theirs = given.get("options", environ.get("PGOPTIONS", ""))
    ours = " ".join(f"-c {name}={value}" for name, value in options.items())
    settings["options"] = f"{ours} {theirs}".strip()  # of two, the last one counts
    return settings


def _connection_error(
    error: Exception, where: str, settings: Mapping[str, str]
) -> InfrastructureError:
    """Every way in which a connection cannot be made, translated in one place."""
    said = _plain(str(error))
    for name, value in settings.items():
        if "password" in name and value:
            said = said.replace(value, "***")
    if "idle_session_timeout" in said or "tcp_user_timeout" in said:
        return InfrastructureError(
            f"{where} is too old: the lock needs PostgreSQL {_OLDEST // 10000} or later"
        )
    if "startup parameter" in said:
        return InfrastructureError(
            f"a connection pooler stands before {where} ({said}): give the address of the server "
            "itself"
        )
    return _Unreachable(f"cannot connect to {where}: {said}")


def _plain(text: str) -> str:
    """A message on one line, safe for a terminal, and without a password."""
    return printable(redacted(" ".join(text.split())))


def _owner(record: RunRecord) -> str:
    """The record as it is shown to the other hosts. A URL in the command may have a password."""
    argv = tuple(map(redacted, record.argv))
    if argv != record.argv:
        record = attrs.evolve(record, argv=argv)
    return to_json(record).decode()


def _record(owner: str | None, fence: str | None) -> RunRecord | None:
    try:
        record, _ = from_json((owner or "").encode())
        return attrs.evolve(record, fence=int(fence or 0))
    except ValueError:
        return None
