"""The lock on a PostgreSQL server: a session advisory lock, and a row with its fence and holder.

The server frees an advisory lock when the session that has it ends, whatever ends it, and not
before: a holder that is stopped or stalled keeps it, and a killed one loses it at once. Each lease
therefore has a connection of its own for as long as it lives. The row, in one table for all
projects, says who has the lock, and counts the fences.

When the connection breaks, the lock is *suspect*. The lease takes it back if it can be taken, and
if the row shows that nobody else had it meanwhile; else it is lost for good. A server that can no
longer reach its client ends the session by itself; its keepalives are set so that this happens only
after the lease has given up.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import attrs

from orchard_infra.errors import InfrastructureError, LockLostError, LockSuspectError
from orchard_infra.locks import postgres_server as server
from orchard_infra.locks.base import Held, LockKey
from orchard_infra.locks.checks import check_lock_key, check_seconds, check_timeout, check_url
from orchard_infra.locks.postgres_server import (
    Names,
    Refused,
    Session,
    Silent,
    Unavailable,
    Unreachable,
)
from orchard_infra.locks.urls import find_url, record_for_others
from orchard_infra.runs.record import RunRecord, from_json
from orchard_infra.system import processes
from orchard_infra.system.masking import interruptible, uninterrupted
from orchard_infra.system.text import printable

T = TypeVar("T")

_AGAIN = 0.5  # seconds between two tries to take a suspect lock back
_BRIEF = 2.0  # seconds for an answer that is not worth a longer wait
_RESTART = 60.0  # seconds for which those who wait put up with a server that is away
_MARGIN = 10.0  # seconds between a lease's giving up and the server's

# A table, in a schema or not, as it stands in SQL without quotes.
_TABLE = re.compile(r"[a-z_][a-z0-9_]{0,62}(\.[a-z_][a-z0-9_]{0,62})?")

_logger = logging.getLogger("Infrastructure")


def _check_table(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not (isinstance(value, str) and _TABLE.fullmatch(value)):
        raise ValueError(
            f"table must be name or schema.name, of small letters, digits and _; not {value!r}"
        )


_SECONDS = [check_seconds, attrs.validators.le(3600.0)]


@attrs.frozen
class PostgresLock:
    """A lock on a PostgreSQL server that several hosts use.

    >>> from orchard_infra import PostgresLock
    >>> PostgresLock("postgresql://ada:secret@db.example/locks", timeout=60)
    PostgresLock(timeout=60, lock_key=None, table='orchard_infra_locks')

    ``url`` is anything that libpq takes: a URL, ``host=... dbname=...`` or ``service=...``. None is
    what ``ORCHARD_INFRA_LOCK_URL`` says; file:PATH is the first line of that file. All hosts use
    the same database. ``timeout``, in seconds, is how long to wait for another run: 0 fails at
    once, None waits for ever. ``lock_key`` takes the place of the project's name. ``table`` is
    created when it is missing.

    A waiter tries every ``poll`` seconds. A held lock is looked after every ``interval`` seconds,
    and suspect when the server does not answer within ``answer`` seconds. When it cannot be
    confirmed for another ``grace`` seconds it is lost. The server ends a session that it cannot
    reach 10 s after that.
    """

    url: str | None = attrs.field(default=None, repr=False, validator=check_url)
    timeout: float | None = attrs.field(default=0.0, validator=check_timeout)
    lock_key: str | None = attrs.field(default=None, validator=check_lock_key)
    table: str = attrs.field(default="orchard_infra_locks", validator=_check_table)
    poll: float = attrs.field(default=0.5, validator=_SECONDS, kw_only=True, repr=False)
    interval: float = attrs.field(default=5.0, validator=_SECONDS, kw_only=True, repr=False)
    answer: float = attrs.field(default=5.0, validator=_SECONDS, kw_only=True, repr=False)
    grace: float = attrs.field(default=10.0, validator=_SECONDS, kw_only=True, repr=False)

    def try_acquire(self, key: LockKey, record: RunRecord) -> PostgresLease | Held:
        """See `Lock.try_acquire`."""
        with self.connect() as connection:
            return connection.try_acquire(key, record)

    def holder(self, key: LockKey) -> RunRecord | None:
        """See `Lock.holder`.

        Raises:
            InfrastructureError: The server cannot be asked.
        """
        with self.connect() as connection:
            return connection.holder(key)

    def holder_now(self, key: LockKey) -> RunRecord | None:
        """See `SharedLock.holder_now`.

        Raises:
            InfrastructureError: The server cannot be asked.
        """
        with self.connect() as connection:
            return connection.holder_now(key)

    def is_shared(self, key: LockKey) -> bool:
        """See `SharedLock.is_shared`."""
        return True

    def runs(self) -> Sequence[RunRecord]:
        """See `ServerLock.runs`."""
        with self.connect() as connection:
            return connection.runs()

    def connect(self) -> PostgresConnection:
        """See `ServerLock.connect`."""
        return PostgresConnection(self)

    def describe(self, key: LockKey) -> str:
        """See `ServerLock.describe`."""
        try:
            where = server.shown(server.parse(find_url(self.url)))
        except InfrastructureError:
            where = "PostgreSQL"
        return f"{printable(self._name(key))[:200]} at {where}"

    def _name(self, key: LockKey) -> str:
        return key.project if self.lock_key is None else self.lock_key

    def _open(
        self, name: str | None, answer: float | None = None, within: float | None = None
    ) -> Session:
        shown = f"orchard_infra {os.getpid()}@{processes.host_name()}"
        return server.connect(
            find_url(self.url),
            table=self.table,
            silence=self.interval + self.answer + self.grace + _MARGIN,
            answer=self.answer if answer is None else answer,
            within=within,
            name=shown if name is None else f"{shown} {name}",
        )


class _Away(Exception):
    """The server does not answer just now; it says why."""


@attrs.define(eq=False)
class PostgresConnection:
    """A `PostgresLock` on one connection, which is made when it is first needed.

    A server that has answered before may be away for a minute, to be restarted, say: a waiter goes
    on waiting, and so do the ranks that wait for their rank 0.
    """

    _lock: PostgresLock
    _session: Session | None = attrs.field(default=None, init=False)
    _latest: Held = attrs.field(factory=Held, init=False)
    _has_answered: bool = attrs.field(default=False, init=False)
    _away_since: float | None = attrs.field(default=None, init=False)

    def __enter__(self) -> PostgresConnection:
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
        """See `Lock.try_acquire`."""
        name = self._lock._name(key)
        names = Names.of(name)

        def attempt(session: Session) -> PostgresLease | Held:
            got, fence = session.try_lock(names, record_for_others(record))
            if got:
                return PostgresLease(key, record, self._lock, fence, session)
            holder, is_held = _read(session, names)
            return Held(holder if is_held else None)

        with uninterrupted():
            try:
                outcome = self._ask_patiently(attempt, name)
            except _Away as away:
                return attrs.evolve(self._latest, reason=str(away))
            if isinstance(outcome, Held):
                self._latest = outcome
            else:
                self._session = None  # it is the lease's
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
        found = self._ask(lambda session: session.holders(), None)
        records = (_record(owner, fence) for owner, fence in found)
        return [record for record in records if record is not None]

    def _look(self, key: LockKey) -> tuple[RunRecord | None, bool]:
        name = self._lock._name(key)
        try:
            return self._ask_patiently(lambda session: _read(session, Names.of(name)), name)
        except _Away:
            return None, False

    def _ask_patiently(self, question: Callable[[Session], T], name: str) -> T:
        """What is answered.

        Raises:
            _Away: The server does not answer just now, but has before, and not too long ago.
            InfrastructureError: There is no answer to be had.
        """
        try:
            answer = self._ask(question, name)
        except Unavailable as error:
            if self._away_since is None:
                self._away_since = server.now()
            if not self._has_answered or server.now() - self._away_since >= _RESTART:
                raise
            raise _Away(str(error)) from None
        self._has_answered, self._away_since = True, None
        return answer

    def _ask(self, question: Callable[[Session], T], name: str | None) -> T:
        """What is answered. A connection that has broken since the last time is made again."""
        try:
            if self._session is not None:
                try:
                    return question(self._session)
                except Unreachable:
                    self._close()
            self._session = self._lock._open(name)
            return question(self._session)
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

    A copy is the lease itself. A pickled one, and one in a forked child, holds nothing. One that is
    dropped closes its connection, so that the server frees the lock.
    """

    _key: LockKey
    record: RunRecord
    _lock: PostgresLock
    _fence: int = 0  # 0: a pickled copy, which never held anything
    _session: Session | None = None
    not_free_yet: str | None = attrs.field(default=None, init=False)  # see base
    _pid: int = attrs.field(factory=os.getpid, init=False)
    _suspect_since: float | None = attrs.field(default=None, init=False)
    _confirmed_at: float = attrs.field(factory=server.now, init=False)
    _lost: LockLostError | None = attrs.field(default=None, init=False)
    _released: bool = attrs.field(default=False, init=False)
    _mutex: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def __copy__(self) -> PostgresLease:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PostgresLease:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return PostgresLease, (self._key, self.record, attrs.evolve(self._lock, url=None))

    @property
    def interval(self) -> float:
        """See `Lease.interval`. It is shorter while the lock is suspect."""
        interval = self._lock.interval
        return interval if self._suspect_since is None else min(_AGAIN, interval)

    @property
    def watched_fd(self) -> int:
        """See `RemoteLease.watched_fd`: the socket. The server says when it leaves."""
        session = self._session
        return -1 if session is None or self._pid != os.getpid() else session.fileno()

    @property
    def fence(self) -> int:
        """See `Lease.fence`. It was drawn together with the lock.

        Raises:
            LockLostError: The lock is lost.
        """
        if self._lost is not None:
            raise self._lost
        if self._fence == 0:
            self._refuse_without_lock()
        return self._fence

    def verify(self) -> None:
        """See `Lease.verify`. The server is asked; within some seconds it answers, or is given up.

        Raises:
            LockLostError: It is lost, or this is a copy in another process.
            LockSuspectError: The server does not answer.
        """
        self._confirm()

    def renew(self) -> None:
        """See `Lease.renew`. What `verify` has just confirmed is not asked for again."""
        self._confirm(unless_recent=True)

    def release(self) -> None:
        """See `Lease.release`. A server that cannot be reached frees the lock by itself."""
        is_over = self._released and self._session is None
        if is_over or self._fence == 0 or self._pid != os.getpid():
            return
        with uninterrupted():
            self._released = True
            # Another thread that is just asking the server gives the lock back when it has done.
            if self._mutex.acquire(timeout=_BRIEF):
                try:
                    self._give_back()
                finally:
                    self._mutex.release()
            elif self._session is not None:
                self.not_free_yet = f"{self._where} is given back when its server has answered"

    def _give_back(self) -> None:
        session, self._session = self._session, None
        failure = None
        if session is not None:
            try:
                # Closing alone frees it too, but some time after the release.
                session.unlock(self._names, within=_BRIEF)
            except InfrastructureError as error:
                failure = str(error)
            finally:
                session.close()
        elif self._lost is None:
            failure = "its server could not be reached"
        self.not_free_yet = None
        if failure is not None:
            self.not_free_yet = (
                f"{self._where} is freed by its server when that sees that the connection is closed"
            )
            _logger.warning("the lock could not be given back: %s; %s", failure, self.not_free_yet)

    def _confirm(self, *, unless_recent: bool = False) -> None:
        self._refuse_without_lock()
        # Signals wait for the mutex, for some seconds: a Ctrl-C between its acquisition and the
        # next line would keep it for ever.
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
                if self._released and self._session is not None:  # `release` did not wait for us
                    self._give_back()
                self._mutex.release()

    def _refuse_without_lock(self) -> None:
        if self._fence == 0:
            raise self._error(
                f"this is a pickled copy of the lease on {self._where}: only the process that took "
                "the lock can verify it"
            )
        if self._pid != os.getpid():
            raise self._error(
                f"the lock {self._where} is held by pid {self._pid}, from which this process was "
                "forked: only that one can verify it"
            )
        if self._lost is not None:
            raise self._lost
        if self._released:
            raise self._error(f"the lock {self._where} was released")

    def _is_recent(self) -> bool:
        """Whether another thread has just verified it: the answer wakes the one that renews."""
        session = self._session
        is_recent = server.now() - self._confirmed_at < self._lock.interval / 2
        return session is not None and is_recent and not session.has_input()

    def _ask_server(self) -> None:
        """Confirm the lock, or take it back.

        Raises:
            LockLostError: Another run may have it.
            LockSuspectError: Nobody knows.
        """
        session = self._session
        if session is not None:
            try:
                self._check(session)
                self._confirmed_at, self._suspect_since = server.now(), None
                return
            except Unreachable as error:
                # From now on, however long the first try to take it back lasts.
                since = self._suspect_since = self._suspect_since or server.now()
                # A server that stood still goes on with this session, and the lock in it. Without
                # it a waiter would be faster than we.
                if isinstance(error, Silent) and server.now() - since < self._lock.grace:
                    raise self._suspect(str(error)) from None
                self._session = None
                session.close()
                _logger.debug("the lock %s is suspect: %s", self._where, error)
            except Refused as error:
                # The session is kept, and with it the lock, if it is there.
                since = self._suspect_since = self._suspect_since or server.now()
                if server.now() - since < self._lock.grace:
                    raise self._suspect(str(error)) from None
                raise self._lose(f"it cannot be confirmed: {error}") from None
        try:
            self._take_back()
        except LockLostError:
            raise
        except InfrastructureError as error:
            why = str(error)
        else:
            return
        suspect_since = self._suspect_since
        if suspect_since is not None and server.now() - suspect_since >= self._lock.grace:
            raise self._lose(f"it cannot be confirmed: {why}")
        raise self._suspect(why)

    def _check(self, session: Session) -> None:
        try:
            is_held, fence = session.check(self._names)
            if is_held and fence is None:
                # Somebody has emptied or dropped the table. The lock was held all the time.
                session.sign_again(self._names, self._fence, record_for_others(self.record))
        except Refused as error:
            # A locked table, or a right that was taken away, does not cost the lock: as long as
            # this session has it, nobody else can have signed the row.
            is_held, fence = session.has_lock(self._names), None
            _logger.debug("only the lock %s itself was confirmed: %s", self._where, error)
        if not is_held:
            raise self._lose("its server says that this run does not hold it")
        if fence is not None and fence != self._fence:
            raise self._lose(f"its fence is {fence}, and not {self._fence}")

    def _take_back(self) -> None:
        """Take the lock in a new session, if nobody had it meanwhile.

        Raises:
            LockLostError: Somebody had it, or the server has lost its data.
            InfrastructureError: It cannot be taken now.
        """
        names = self._names
        session = self._lock._open(self._lock._name(self._key), _BRIEF, within=server.CONNECT)
        try:
            got, _ = session.try_lock(names)
            if got and session.take_over(names, self._fence):
                self._session, self._confirmed_at = session, server.now()
                since, self._suspect_since = self._suspect_since, None
                _logger.info(
                    "the lock %s was taken back after %.1f s: the connection broke, and nobody "
                    "else had the lock meanwhile",
                    self._where,
                    0.0 if since is None else server.now() - since,
                )
                return
            fence = session.fence(names)
            if fence is None or fence < self._fence:  # emptied, or a standby that lagged
                raise self._lose("its server has lost the record of this run")
            if fence > self._fence:
                raise self._lose("the connection broke, and another run has taken it")
            session.end_holder(names, self._fence)
            raise InfrastructureError("its server has yet to end the session that broke")
        finally:
            if self._session is not session:
                session.close()

    @property
    def _names(self) -> Names:
        return Names.of(self._lock._name(self._key))

    @property
    def _where(self) -> str:
        return self._lock.describe(self._key)

    def _lose(self, why: str) -> LockLostError:
        session, self._session = self._session, None
        if session is not None:
            session.close()
        self._lost = self._error(
            f"the lock {self._where} is lost: {why}. Another run may have started; stop this one"
        )
        return self._lost

    def _error(self, message: str) -> LockLostError:
        return LockLostError(message, lock_path=str(self._key.path))

    def _suspect(self, why: str) -> LockSuspectError:
        return LockSuspectError(
            f"the lock {self._where} cannot be confirmed: {why}. It is lost unless it can be "
            f"within {self._lock.grace:g} s",
            lock_path=str(self._key.path),
        )


def _read(session: Session, names: Names) -> tuple[RunRecord | None, bool]:
    """The record in the row, and whether its run has the lock now."""
    found = session.holder(names)
    if found is None:
        return None, False
    owner, fence, is_held = found
    return _record(owner, fence), is_held


def _record(owner: str, fence: int) -> RunRecord | None:
    try:
        return attrs.evolve(from_json(owner.encode())[0], fence=fence)
    except ValueError:
        return None
