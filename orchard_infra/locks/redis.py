"""The lock on a Redis server: a key that expires, renewed while its holder lives.

A holder that sleeps, or is cut off, loses such a lock by the mere passing of time, so it must know
by its own clock. That is the boot clock, which goes on while a machine is suspended, and it starts
*before* the renewal is sent: the server starts counting later, and frees the key later. After

* ``ttl - min(10 s, ttl / 3)`` without a renewal the lock is lost if the server does not confirm it
  now. What is left until the key expires is the time that the run has for its graceful stop;
* ``0.9 x ttl`` it is lost in any case, and the server is not even asked: a program that was
  stopped, or a machine that was suspended, finds this out at the first question.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from orchard_infra.errors import (
    ConfigurationError,
    InfrastructureError,
    LockLostError,
    LockSuspectError,
)
from orchard_infra.locks.base import Held, LockKey
from orchard_infra.locks.checks import (
    check_lock_key,
    check_seconds,
    check_timeout,
    check_url,
    is_number,
)
from orchard_infra.locks.urls import REDIS_SCHEMES, find_url, record_for_others, shown
from orchard_infra.runs.record import RunRecord, from_json
from orchard_infra.system.clock import now as _now
from orchard_infra.system.masking import interruptible, uninterrupted
from orchard_infra.system.text import printable

if TYPE_CHECKING:
    from orchard_infra.locks.redis_server import FencedLock, Renewed, Server

_T = TypeVar("_T")

_logger = logging.getLogger("Infrastructure")

_PATIENCE = 5.0  # seconds for a connection, and for an answer, where the ttl allows it
_HURRIED = 1.0  # the same where nobody should be kept waiting for a server that is gone
_AGAIN = 1.0  # seconds until the next try to renew while the server does not answer
_STOPPING = 10.0  # seconds of the ttl that are left for a graceful stop
_SURE = 0.9  # of the ttl: two clocks do not tick alike

_warned: set[str] = set()


def _check_ttl(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not (is_number(value) and 1 <= value <= 86_400):
        raise ValueError(f"ttl must be a number of seconds from 1 to 86400, not {value!r}")


def _check_renew(instance: RedisLock, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not (is_number(value) and 0 < value <= instance.ttl / 3):
        raise ValueError(
            f"renew must be a number of seconds > 0, and at most a third of ttl={instance.ttl:g}, "
            f"that is {instance.ttl / 3:g}: one renewal may fail, and the next one must come in "
            f"time; not {value!r}"
        )


@attrs.frozen
class RedisLock:
    """A lock on a Redis server that several hosts use.

    >>> from orchard_infra import RedisLock
    >>> RedisLock("redis://:secret@cache.example/0", timeout=60)
    RedisLock(timeout=60, ttl=30.0, renew=5.0, lock_key=None, guard=True, poll=1.0)

    ``url`` is redis://, rediss:// (TLS) or unix://, with the options of redis-py; None is what
    ``ORCHARD_INFRA_LOCK_URL`` says; file:PATH is the first line of that file. ``timeout``, in
    seconds, is how long to wait for another run: 0 fails at once, None waits for ever.

    The lock frees itself ``ttl`` seconds after the last sign of life of its holder, which gives
    one every ``renew`` seconds. All runs of a project should use the same ``ttl``. ``lock_key``
    takes the place of the project's name. ``guard`` has nobody granted the lock within ``ttl``
    seconds after the start of the server, which may have come back without its data. ``poll`` is
    how many seconds a waiter lets pass between two tries, on average.
    """

    url: str | None = attrs.field(default=None, repr=False, validator=check_url)
    timeout: float | None = attrs.field(default=0.0, validator=check_timeout)
    ttl: float = attrs.field(default=30.0, validator=_check_ttl)
    renew: float = attrs.field(default=5.0, validator=_check_renew)
    lock_key: str | None = attrs.field(default=None, validator=check_lock_key)
    guard: bool = attrs.field(default=True, validator=attrs.validators.instance_of(bool))
    poll: float = attrs.field(default=1.0, validator=[check_seconds, attrs.validators.lt(math.inf)])

    def try_acquire(self, key: LockKey, record: RunRecord) -> RedisLease | Held:
        """See `Lock.try_acquire`."""
        with self.connect() as connected:
            return connected.try_acquire(key, record)

    def holder(self, key: LockKey) -> RunRecord | None:
        """See `Lock.holder`. Nothing is left of who had it before."""
        return self.holder_now(key)

    def is_shared(self, key: LockKey) -> bool:
        """See `SharedLock.is_shared`."""
        return True

    def holder_now(self, key: LockKey) -> RunRecord | None:
        """See `SharedLock.holder_now`. None, too, where the server does not answer just now."""
        with self.connect() as connected:
            return connected.holder_now(key)

    @contextlib.contextmanager
    def connect(self) -> Iterator[RedisConnection]:
        """See `ServerLock.connect`."""
        connection = RedisConnection(self)
        try:
            yield connection
        finally:
            connection.close()

    def describe(self, key: LockKey) -> str:
        """See `ServerLock.describe`."""
        try:
            where = shown(find_url(self.url))
        except ConfigurationError:
            where = "a Redis server without a URL"
        return f"{printable(self.name_of(key))[:200]} on {where}"

    def runs(self) -> Sequence[RunRecord]:
        """See `ServerLock.runs`."""
        with self._server() as server:
            read = (_read(record, fence) for record, fence in server.held())
            return [record for record in read if record is not None]

    def name_of(self, key: LockKey) -> str:
        """What is locked: the project, unless there is a ``lock_key``."""
        return self.lock_key or key.project

    @property
    def patience(self) -> float:
        """Seconds for a connection, and for an answer: time is left for more than one renewal."""
        return min(_PATIENCE, self.ttl / 6)

    def _server(self) -> Server:
        """A connection.

        Raises:
            ConfigurationError: redis-py is not installed, or the URL is not understood.
            InfrastructureError: The server cannot be reached, or refuses.
        """
        url = find_url(self.url)
        scheme = url.partition(":")[0].lower()
        if scheme not in REDIS_SCHEMES:
            # A text without a scheme is not quoted: it may be a password that went astray.
            given = f", and not with {scheme[:20]}://" if "://" in url else ""
            raise ConfigurationError(
                "the URL of a RedisLock should begin with redis://, rediss:// or unix://" + given
            )
        if importlib.util.find_spec("redis") is None:
            raise ConfigurationError(
                'RedisLock needs redis-py: run pip install "orchard-infra[redis]"'
            )
        from orchard_infra.locks.redis_server import Server

        server = Server(url, self.patience)
        try:
            server.connect()
        except BaseException:
            server.close()
            raise
        return server


@attrs.define(eq=False)
class RedisConnection:
    """A `RedisLock` on one connection, for all tries of one waiter.

    Once the server has said who has the lock, a time without answers is waited through like a time
    for which somebody has it: a waiter outlives a restart of the server. A connection alone is no
    answer: a proxy gives one, too, and so does the kernel for a server that is stopped.
    """

    lock: RedisLock
    _server: Server | None = attrs.field(default=None, init=False)
    _has_answered: bool = attrs.field(default=False, init=False)
    _try: FencedLock | None = attrs.field(default=None, init=False)
    _for: tuple[str, str] | None = attrs.field(default=None, init=False)  # what _try is about
    _may_be_granted: bool = attrs.field(default=False, init=False)  # nobody knows: a reply is lost

    @property
    def timeout(self) -> float | None:
        return self.lock.timeout

    @property
    def poll(self) -> float:
        return self.lock.poll

    def try_acquire(self, key: LockKey, record: RunRecord) -> RedisLease | Held:
        """See `Lock.try_acquire`."""
        with uninterrupted():
            try:
                # Nothing is left to undo where a Ctrl-C ends this: what may have been granted has
                # our token, and `close` gives it back.
                with interruptible():
                    server = self._open()
                    attempt = self._attempt(server, key, record)
                    before = _now()
                    self._may_be_granted = True
                    is_ours = self._take(server, attempt)
                self._has_answered = True
            except InfrastructureError as error:
                if self._has_answered and _may_pass(error):
                    return Held(reason=str(error))
                raise
            if not is_ours:
                self._may_be_granted = False
                return _held_by(attempt, self.lock.ttl)
            lease = RedisLease(self.describe(key), record, self.lock, server, attempt, before)
            self._may_be_granted, self._try, self._server = False, None, None
            return lease

    def holder(self, key: LockKey) -> RunRecord | None:
        """See `Lock.holder`."""
        return self.holder_now(key)

    def is_shared(self, key: LockKey) -> bool:
        """See `SharedLock.is_shared`."""
        return True

    def holder_now(self, key: LockKey) -> RunRecord | None:
        """See `SharedLock.holder_now`."""
        with uninterrupted(), interruptible():
            try:
                server = self._open()
                if server.policy is None:
                    _check(server)
                found = server.look(self.lock.name_of(key))
                self._has_answered = True
            except InfrastructureError as error:
                if not _may_pass(error):
                    raise
                _logger.debug("nobody knows who holds %s: %s", self.describe(key), error)
                return None
            return None if found is None else _read(*found)

    def describe(self, key: LockKey) -> str:
        """See `ServerLock.describe`."""
        return self.lock.describe(key)

    def close(self) -> None:
        """Close it, unless a lease has taken it over."""
        server, attempt = self._server, self._try
        if server is None:
            return
        self._server = self._try = None
        if self._may_be_granted and attempt is not None:
            self._may_be_granted = False
            # A Ctrl-C, or a lost reply. In vain it is no harm: it expires.
            with contextlib.suppress(InfrastructureError), server.within(_HURRIED) as hurried:
                attempt.give_back(hurried)
        server.close()

    def _open(self) -> Server:
        if self._server is None:
            self._server = self._patiently(self.lock._server)
        return self._server

    def _patiently(self, ask: Callable[[], _T]) -> _T:
        """What is answered. With a short ttl a renewal has less time than a first answer, for which
        nobody loses a lock.
        """
        from orchard_infra.locks.redis_server import Silent

        until = _now() + _PATIENCE
        while True:
            try:
                return ask()
            except Silent:
                if self._has_answered or _now() >= until:
                    raise

    def _take(self, server: Server, attempt: FencedLock) -> bool:
        """Try once. The first answer also says whether the server can carry locks: a question of
        its own would cost as much as the try.
        """
        from orchard_infra.locks.redis_server import Silent, Unreachable

        try:
            is_ours = self._patiently(attempt.take)
        except InfrastructureError as error:
            if server.policy is not None or isinstance(error, Silent):
                raise
            # Redis hangs up on who says a lot before the password, and what it has said then may
            # be lost with the line. A short question on a new one finds out what is wrong.
            server.hang_up()
            _check(server)
            if not isinstance(error, Unreachable):
                raise
            is_ours = attempt.take()  # nothing is: only that line has broken
        _warn_once(server)
        return is_ours

    def _attempt(self, server: Server, key: LockKey, record: RunRecord) -> FencedLock:
        """The same one, with the same token, for all tries of one run."""
        from orchard_infra.locks.redis_server import FencedLock

        name = self.lock.name_of(key)
        if self._try is None or self._for != (name, record.run_id):
            self._try = FencedLock(
                server,
                name,
                f"{record.run_id}:{os.urandom(8).hex()}",
                ttl=self.lock.ttl,
                record=record_for_others(record),
                guard=self.lock.guard,
            )
            self._for = name, record.run_id
        return self._try


@attrs.define(eq=False)
class RedisLease:
    """A lock on a Redis server that is held by this process.

    A copy is the lease itself. A pickled one, and one in a forked child, holds nothing.
    """

    name: str  # where the lock is, for people
    record: RunRecord
    _lock: RedisLock
    _server: Server | None = attrs.field(default=None, repr=False)
    _held: FencedLock | None = attrs.field(default=None, repr=False)
    _renewed: float = 0.0  # on the boot clock, before the last good renewal was sent
    not_free_yet: str | None = attrs.field(default=None, init=False, repr=False)  # see base
    _pid: int = attrs.field(factory=os.getpid, init=False, repr=False)
    _suspect: bool = attrs.field(default=False, init=False)
    _over: str | None = attrs.field(default=None, init=False)  # why it will never be held again

    def __copy__(self) -> RedisLease:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RedisLease:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return RedisLease, (self.name, self.record, attrs.evolve(self._lock, url=None))

    def __del__(self) -> None:
        # A signal may raise between `try_acquire` and the caller's assignment.
        try:
            self.release()
        except Exception:  # the interpreter may be half gone
            pass

    @property
    def interval(self) -> float:
        """See `Lease`."""
        return min(_AGAIN, self._lock.renew) if self._suspect else self._lock.renew

    @property
    def watched_fd(self) -> int:
        """See `RemoteLease`. A server that hangs up does not take the lock away."""
        return -1

    @property
    def fence(self) -> int:
        """See `Lease.fence`. The server is only asked when the last renewal is too long ago."""
        if self._left() <= 0:
            self.verify()
        held = self._ours()
        return held.fence

    def verify(self) -> None:
        """See `Lease.verify`. Any thread may ask. A lock that is confirmed is renewed as well."""
        held = self._ours()
        before = _now()
        try:
            answer = self._ask(held)
        except InfrastructureError as error:
            self._suspect = True
            raise self._unconfirmed(str(error)) from None
        if not answer.is_ours:
            by = _read(answer.holder, b"")
            raise self._lose(
                f"the lock {self.name} is lost: it was granted to another run"
                + ("" if by is None else f", {by.describe()}")
            )
        self._renewed = max(self._renewed, before)
        self._suspect = False
        if answer.was_restored:
            _logger.warning(
                "the server had lost the lock %s; it was put back, nobody had it meanwhile",
                self.name,
            )
        self._ours()  # this program may have been stopped while it waited for the answer

    def renew(self) -> None:
        """See `Lease.renew`."""
        self.verify()

    def release(self) -> None:
        """See `Lease.release`. Where the server does not answer, the lock frees itself."""
        held, server = self._held, self._server
        if held is None or server is None or os.getpid() != self._pid:
            return
        seconds = self._lock.patience if not self._suspect and self._left() > 0 else _HURRIED
        self._over = self._over or f"the lock {self.name} was released"
        with uninterrupted():
            try:
                with server.within(seconds) as asked:
                    held.give_back(asked)
            except InfrastructureError as error:
                self.not_free_yet = f"{self.name} frees itself within {self._lock.ttl:g} s"
                _logger.warning(
                    "the lock could not be given back, %s: %s", self.not_free_yet, error
                )
            # Last: a release that a Ctrl-C of another thread has broken off can be called again.
            self._held = self._server = None
            server.close()

    def _left(self) -> float:
        """Seconds until the server has to confirm it."""
        ttl = self._lock.ttl
        return self._renewed + ttl - min(_STOPPING, ttl / 3) - _now()

    def _ours(self) -> FencedLock:
        """The lock, as far as this process knows by itself.

        Raises:
            LockLostError: It is lost, was released, or belongs to another process.
        """
        held = self._held
        if held is None and self._over is None:
            self._over = (
                f"this is a pickled copy of the lease on {self.name}: only the process that took "
                "the lock can verify it"
            )
        elif os.getpid() != self._pid:
            raise LockLostError(
                f"the lock {self.name} is held by the process that this one was forked from",
                lock_path=self.name,
            )
        elif self._over is None and _now() - self._renewed >= _SURE * self._lock.ttl:
            raise self._lose(
                f"the lock {self.name} is lost: its last renewal was {_now() - self._renewed:.1f} s"
                f" ago, and the server keeps it for {self._lock.ttl:g} s. This program, or its "
                "machine, did not run meanwhile"
            )
        if self._over is not None or held is None:
            raise LockLostError(str(self._over), lock_path=self.name)
        return held

    def _lose(self, message: str) -> LockLostError:
        self._over = self._over or message
        return LockLostError(self._over, lock_path=self.name)

    def _ask(self, held: FencedLock) -> Renewed:
        # A loss must be known in time, however slowly the server answers.
        left = max(self._left(), min(_HURRIED, self._lock.patience))
        with held.server.within(left) as server:
            return held.renew(server)

    def _unconfirmed(self, why: str) -> LockLostError | LockSuspectError:
        left, since = self._left(), _now() - self._renewed
        if left <= 0:
            return self._lose(
                f"the lock {self.name} is lost: it could not be renewed for {since:.1f} s, and is "
                f"free for others after {self._lock.ttl:g} s: {why}"
            )
        return LockSuspectError(
            f"nobody knows whether this run still holds the lock {self.name}, which counts as lost "
            f"in {left:.1f} s: {why}",
            lock_path=self.name,
        )


def _check(server: Server) -> None:
    server.check()
    _warn_once(server)


def _warn_once(server: Server) -> None:
    warning = server.warning
    if warning is not None and warning not in _warned:
        _warned.add(warning)
        _logger.warning("%s", warning)


def _may_pass(error: InfrastructureError) -> bool:
    """Whether the server may answer the same question later."""
    if isinstance(error, ConfigurationError):
        return False
    from orchard_infra.locks.redis_server import Unavailable

    return isinstance(error, Unavailable)


def _held_by(attempt: FencedLock, ttl: float) -> Held:
    taken = attempt.taken
    if taken.seconds is None:
        return Held(_read(taken.holder, b""))
    return Held(
        reason=f"its server has just started, and may have lost who held it; in {taken.seconds} s "
        f"every holder of before, with a ttl of {ttl:g} s, has renewed it or knows that it is lost"
    )


def _read(record: bytes, fence: bytes) -> RunRecord | None:
    """A record from the server, with the fence that belongs to it."""
    try:
        found, _ = from_json(record)
        return attrs.evolve(found, fence=int(fence)) if fence else found
    except ValueError:
        return None
