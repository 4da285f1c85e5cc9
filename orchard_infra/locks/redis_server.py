"""A Redis server as the lock sees it: redis-py's Lock, made fenced, and errors in plain words.

This module loads redis-py. `orchard_infra.locks.redis` loads it when a server is first needed.

redis-py's own Lock is one SET and two scripts. Three things are missing there, and added here. A
SET whose reply was lost blocks its own sender for the whole ttl: here the grant is idempotent for a
token. A server that came back without its data grants the lock again: here it does not within the
ttl after its start, and a renewal puts the key back. And nothing tells the present holder's
writes from those of one that slept: here each grant has a greater number, the fence.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
import re
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import attrs
import redis
import redis.lock
from redis import exceptions
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from orchard_infra.errors import ConfigurationError, InfrastructureError
from orchard_infra.locks.urls import Secret, redacted, shown

_T = TypeVar("_T")

PREFIX = "orchard-infra:"  # of every key
_OLDEST = (5, 0)  # the first whose scripts may write after they have asked for the time
_KEPT = 30 * 86_400  # seconds that a fence is kept after its lock was last held

# Each script is given the three keys of one lock: the token of its holder, which redis-py's Lock
# would find there as well; the holder's record; and the fence of the last grant.
#
# A fence that expired, or was lost, is no harm as long as the server's clock goes forward: none is
# below the time of day in milliseconds, and nobody is granted a thousand locks a second.
#
# With its keys and arguments no call has more than ten words. Redis hangs up on a client that says
# more before it has given its password, and then nobody would learn that one is missing.
_START = f"local kept, policy = {_KEPT}, ''"

_LOOK = """
-- As `Server.check` does. Who may not ask for INFO sees nothing
local replication, memory = redis.pcall('INFO', 'replication'), redis.pcall('INFO', 'memory')
if type(replication) == 'string' and string.find(replication, 'role:slave', 1, true) then
    return {3, '', ''}
end
policy = type(memory) == 'string' and string.match(memory, 'maxmemory_policy:([%w-]+)') or ''
"""

_TAKE = """
local token, ttl, record, guard = unpack(ARGV)
local owner = redis.call('GET', KEYS[1])
local fence = redis.call('GET', KEYS[3])
if owner and owner ~= token then
    return {0, redis.call('GET', KEYS[2]) or '', policy}
end
if owner and fence then  -- granted before: the reply was lost
    redis.call('SET', KEYS[1], token, 'PX', ttl)
    redis.call('SET', KEYS[2], record, 'PX', ttl)
    return {1, fence, policy}
end
if tonumber(guard) > 0 then
    local up = string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)')
    if up and tonumber(up) < tonumber(guard) then
        return {2, tostring(guard - up), policy}
    end
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local last = tonumber(fence or 0)
if not (last and last < 2^53 - 1) then  -- spoilt by somebody: as if it were lost
    last = 0
end
fence = string.format('%.0f', math.max(now, last + 1))
redis.call('SET', KEYS[1], token, 'PX', ttl)
redis.call('SET', KEYS[2], record, 'PX', ttl)
redis.call('SET', KEYS[3], fence, 'EX', kept)
return {1, fence, policy}
"""

_ACQUIRE = _START + _TAKE
_LOOK_AND_ACQUIRE = _START + _LOOK + _TAKE

_RENEW = (
    _START
    + """
local token, ttl, record, fence = unpack(ARGV)
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= token then
    return {0, redis.call('GET', KEYS[2]) or ''}
end
local last = redis.call('GET', KEYS[3])
if last and last ~= fence then
    return {0, ''}
end
-- PEXPIRE also works when the server is out of memory.
if owner and redis.call('PEXPIRE', KEYS[1], ttl) == 1 and redis.call('PEXPIRE', KEYS[2], ttl) == 1
    and redis.call('EXPIRE', KEYS[3], kept) == 1 then
    return {1, ''}
end
redis.call('SET', KEYS[1], token, 'PX', ttl)
redis.call('SET', KEYS[2], record, 'PX', ttl)
redis.call('SET', KEYS[3], fence, 'EX', kept)
return {2, ''}
"""
)

# The fence goes up: a renewal that was under way, and comes later, must not put the key back.
_RELEASE = (
    _START
    + """
local token = ARGV[1]
if redis.call('GET', KEYS[1]) ~= token then
    return 0
end
redis.call('DEL', KEYS[1], KEYS[2])
if redis.call('EXISTS', KEYS[3]) == 1 then
    redis.call('INCR', KEYS[3])
    redis.call('EXPIRE', KEYS[3], kept)
end
return 1
"""
)


class Unavailable(InfrastructureError):
    """The server cannot be asked just now: it does not answer, it loads its data ..."""


class Unreachable(Unavailable):
    """There is no connection, or no answer came."""


class Silent(Unreachable):
    """No answer came in time. The connection may still be there."""


@attrs.frozen
class Taken:
    """Why a lock was not granted: who has it, or how many seconds the server is too young."""

    holder: bytes = b""
    seconds: int | None = None


@attrs.frozen
class Renewed:
    """How a renewal went. ``was_restored``: the server had lost the lock, and has it again."""

    is_ours: bool
    was_restored: bool = False
    holder: bytes = b""


def keys_of(name: str) -> tuple[str, str, str]:
    """The keys of one lock: token, record and fence.

    Every character that means something to Redis is escaped, so that no two names share a key. The
    braces put the three keys of one lock on one server, wherever keys are spread over several.
    """
    stem = f"{PREFIX}{{{quote(name, safe='', errors='surrogatepass')}}}"
    return f"{stem}:lock", f"{stem}:holder", f"{stem}:fence"


class Server:
    """One server, and a connection to it for each thread that asks it at the same time.

    ``seconds`` is how long a connection may take to be made, and an answer to come. ``policy`` is
    what the server does when its memory is full, its maxmemory-policy: empty where it does not say,
    and None until `check`, or a try to take a lock, has found that it can carry locks.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url = url
        self.seconds = seconds
        self.policy: str | None = None
        self._client: redis.Redis | None = _client(url, seconds)
        self._pid = os.getpid()
        _servers.add(self)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def client(self) -> redis.Redis:
        if self._client is None:
            raise Unavailable(f"the connection to {shown(self.url)} was closed")
        return self._client

    def connect(self) -> None:
        """Connect now. It fails before the server was asked to do anything.

        Raises:
            ConfigurationError: The URL has an option that redis-py does not take.
            InfrastructureError: The same as `ask`.
        """
        try:
            self.ask(self._use_connection)
            return
        except (TypeError, ValueError, InfrastructureError):
            wrong = self._wrong_option()
            if wrong is None:
                raise
        raise wrong

    def _use_connection(self) -> None:
        pool: Any = self.client.connection_pool
        command = () if redis.VERSION >= (5, 3) else ("PING",)  # it is not sent
        pool.release(pool.get_connection(*command))

    # No traceback of ours has a pool among its variables: some versions of redis-py fail to show
    # one that has such an option.
    def _wrong_option(self) -> ConfigurationError | None:
        pool = self.client.connection_pool
        try:
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError, redis.RedisError) as error:
            return _wrong_option(error, self.url)
        return None

    def hang_up(self) -> None:
        """Close the connections. The next question makes a new one."""
        self.client.connection_pool.disconnect()

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None and os.getpid() == self._pid:
            client.connection_pool.disconnect()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[Server]:
        """This server, for a question that must be over in so many seconds: on a connection of its
        own where the usual one would wait for longer.
        """
        if seconds >= self.seconds:
            yield self
        else:
            with Server(self.url, seconds) as hurried:
                yield hurried

    def ask(self, question: Callable[[], _T]) -> _T:
        """What ``question`` returns, which asks the server.

        Raises:
            Unavailable: It may answer later.
            InfrastructureError: It will not as long as nobody changes something.
        """
        try:
            return question()
        except exceptions.LockError:
            raise
        except (redis.RedisError, OSError, UnicodeError) as error:
            problem = _explain(error, self.url)
        # Not within the handler: an error that is kept as the context of ours may quote a password.
        raise problem

    def check(self) -> None:
        """Look whether the server can carry locks.

        Raises:
            InfrastructureError: It cannot.
        """
        try:
            info: dict[str, Any] = self.ask(self.client.info)
        except NoPermission:
            self.policy = ""  # the script for the guard will say so, where that is wanted
            return
        where = shown(self.url)
        numbers = re.match(r"(\d+)\.(\d+)", str(info.get("redis_version", "")))
        version = tuple(map(int, numbers.groups())) if numbers else ()  # unknown: it is tried
        if version and version < _OLDEST:
            raise InfrastructureError(
                f"{where} is Redis {info['redis_version']}, which is too old for a lock: 5.0 or "
                "later is needed"
            )
        if info.get("role") == "slave":
            raise InfrastructureError(
                f"{where} is a read-only replica of {info.get('master_host')}:"
                f"{info.get('master_port')}: the lock's URL should name the primary"
            )
        self.policy = str(info.get("maxmemory_policy", ""))

    @property
    def warning(self) -> str | None:
        """What people should know about the server."""
        if self.policy in (None, "", "noeviction"):
            return None
        return (
            f"{shown(self.url)} may drop locks when its memory is full: maxmemory-policy is "
            f"{self.policy}, and should be noeviction"
        )

    def look(self, name: str) -> tuple[bytes, bytes] | None:
        """The record of who has a lock now, and its fence; None where it is free."""
        token, record, fence = self.ask(lambda: _awaited(self.client.mget(keys_of(name))))
        return None if token is None else (record or b"", fence or b"")

    def held(self) -> Iterator[tuple[bytes, bytes]]:
        """The records and fences of all locks that are held now."""

        def look() -> list[tuple[bytes, bytes]]:
            found: dict[bytes, tuple[bytes, bytes]] = {}
            for key in self.client.scan_iter(match=f"{PREFIX}{{*}}:holder", count=1000):
                stem = key[: -len(b"holder")]
                token, record, fence = _awaited(
                    self.client.mget([stem + b"lock", key, stem + b"fence"])
                )
                # Else released meanwhile; or a record that somebody has put there without a lock.
                if token is not None and record is not None:
                    found[key] = record, fence or b""
            return list(found.values())

        return iter(self.ask(look))


class FencedLock(redis.lock.Lock):
    """redis-py's Lock on a server that may lose its data, or its replies.

    ``fence`` is that of the grant; ``taken`` says why there was none. The first try on a server
    also looks whether that can carry locks.
    """

    def __init__(
        self, server: Server, name: str, token: str, *, ttl: float, record: str, guard: bool
    ) -> None:
        self.keys = keys_of(name)
        # Not thread-local: a token that only one thread knows cannot be renewed in another one.
        super().__init__(server.client, self.keys[0], timeout=ttl, thread_local=False)
        self.server = server
        self.token = token
        self.record = record
        # The server rounds its uptime, and what it rounds.
        self.guard = math.ceil(ttl) + 1 if guard else 0
        self.fence = 0
        self.taken = Taken()
        self.renewed = Renewed(True)

    def register_scripts(self) -> None:
        """Nothing: theirs keep the first client in the class, with its connections, for ever."""

    def take(self) -> bool:
        """Try once. Again after an error is right: one that was granted before is ours."""
        return bool(self.server.ask(lambda: self.acquire(blocking=False, token=self.token)))

    def renew(self, server: Server | None = None) -> Renewed:
        """Set the time that it has left back to the ttl, where it is ours."""
        server = server or self.server
        one = copy.copy(self)  # several threads may ask at the same time
        one.redis = server.client
        try:
            server.ask(one.reacquire)
        except exceptions.LockNotOwnedError:
            pass
        return one.renewed

    def give_back(self, server: Server | None = None) -> None:
        """Free it, if it is ours."""
        server = server or self.server
        server.ask(lambda: _run(server.client, _RELEASE, self.keys, self.token))

    def do_acquire(self, token: Any) -> bool:
        milliseconds = round(1000 * float(self.timeout or 0))
        looks = self.server.policy is None
        script = _LOOK_AND_ACQUIRE if looks else _ACQUIRE
        state, answer, policy = _run(
            self.redis, script, self.keys, *(token, milliseconds, self.record, self.guard)
        )
        if state == 3:
            raise exceptions.ReadOnlyError("it is a replica")
        if looks:
            self.server.policy = policy.decode(errors="replace")
        if state == 1:
            self.fence = int(answer)
            return True
        self.taken = Taken(answer) if state == 0 else Taken(seconds=math.ceil(float(answer)))
        return False

    def do_reacquire(self) -> Any:
        milliseconds = round(1000 * float(self.timeout or 0))
        state, answer = _run(
            self.redis, _RENEW, self.keys, *(self.token, milliseconds, self.record, self.fence)
        )
        self.renewed = Renewed(state != 0, was_restored=state == 2, holder=answer)
        if state == 0:
            raise exceptions.LockNotOwnedError("the lock is held by somebody else")
        return True


def _awaited(answer: Any) -> Any:
    """An answer of a client that is not asynchronous: redis-py has one type for both."""
    return answer


_shas = {
    script: hashlib.sha1(script.encode()).hexdigest()
    for script in (_ACQUIRE, _LOOK_AND_ACQUIRE, _RENEW, _RELEASE)
}


def _run(client: Any, script: str, keys: tuple[str, ...], *arguments: Any) -> Any:
    try:
        return client.evalsha(_shas[script], len(keys), *keys, *arguments)
    except exceptions.NoScriptError:  # the server has started since, or never seen it
        return client.eval(script, len(keys), *keys, *arguments)


def _client(url: str, seconds: float) -> redis.Redis:
    """A client that makes no connection before it is asked something.

    Raises:
        ConfigurationError: The URL is not understood.
    """
    options: dict[str, Any] | None = None
    try:
        options = parse_url(url)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError):
        pass  # what it says may quote a part of the password
    if options is None:
        raise ConfigurationError(
            "the lock's URL cannot be read. It should look like redis://user:password@host:6379/0, "
            "rediss:// for TLS, or unix:///path?db=0; in a password, escape other characters than "
            "letters and digits, see urllib.parse.quote"
        )
    for name in {"password", "ssl_password"} & options.keys():
        options[name] = Secret(options[name])
    for name in ("retry_on_error", "retry_on_timeout", "health_check_interval"):
        options.pop(name, None)
    options.update(
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
        # redis-py would send a command again whose reply was lost, whatever that command is.
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        decode_responses=False,
    )
    password = os.environ.get("REDISCLI_AUTH")  # redis-cli's own way
    if password and not options.get("password"):
        options["password"] = Secret(password)
    wrong = None
    try:
        pool = redis.ConnectionPool(**options)
    except (TypeError, ValueError, redis.RedisError) as error:
        wrong = _wrong_option(error, url)
    if wrong is not None:
        raise wrong
    return redis.Redis(connection_pool=pool)


def _wrong_option(error: Exception, url: str) -> ConfigurationError:
    return ConfigurationError(
        f"the lock's URL {shown(url)} has an option that redis-py does not take: "
        f"{_said(error, url)}"
    )


class NoPermission(InfrastructureError):
    """The server's user may not do what a lock needs."""


_RIGHTS = (
    f"~{PREFIX}* +eval +evalsha +get +set +mget +del +exists +incr +expire +pexpire +time +info "
    "+scan +select"
)
_MAY_NOT = (  # 5 and 6, or 7.0; 6; and 7.2 and later
    "can't run this command",
    "can't access at least one of the keys",
    "ACL failure in script",
)
_NOT_NOW = ("OOM", "MISCONF", "NOREPLICAS", "MASTERDOWN", "BUSY", "TRYAGAIN")
_CLUSTER = ("MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN")

# redis-py cuts the first word off what the server says, of more and more kinds from one version to
# the next. The first that fits counts: some are kinds of another one.
_CODES = (
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.BusyLoadingError, "LOADING"),
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.NoPermissionError, "NOPERM"),
    (exceptions.MasterDownError, "MASTERDOWN"),
    (exceptions.TryAgainError, "TRYAGAIN"),
    (exceptions.MovedError, "MOVED"),
    (exceptions.AskError, "ASK"),
    (exceptions.ClusterCrossSlotError, "CROSSSLOT"),
    (exceptions.ClusterError, "CLUSTERDOWN"),
)
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -([A-Z]+) ")  # before Redis 7


def _code(error: Exception, said: str) -> str:
    """The word that says what kind of an error of the server it is, whatever wrapped it."""
    wrapped = _IN_SCRIPT.search(said)
    if wrapped is not None:
        return wrapped[1]
    known = (code for kind, code in _CODES if isinstance(error, kind))
    return next(known, said.partition(" ")[0])


def _explain(error: Exception, url: str) -> InfrastructureError:
    """Every error of redis-py, translated in one place, and without a password."""
    where, said = shown(url), _said(error, url)
    code = _code(error, said)
    # Some of these are a `redis.ConnectionError` as well, so the order matters.
    if code == "LOADING":
        return Unavailable(f"{where} has started, and is still loading its data")
    if isinstance(error, exceptions.AuthenticationError) or code in ("NOAUTH", "WRONGPASS"):
        what = "needs a password" if "required" in said.lower() else "refuses the user or password"
        return InfrastructureError(
            f"{where} {what}: {said}. It is looked for in the lock's URL, and in REDISCLI_AUTH"
        )
    if code == "NOPERM" or any(text in said for text in _MAY_NOT):
        return NoPermission(
            f"the user of {where} may not use it for a lock: {said}. It needs: {_RIGHTS}"
        )
    if code == "READONLY":
        return Unavailable(
            f"{where} is a read-only replica: the lock's URL should name the primary"
        )
    if isinstance(error, exceptions.TimeoutError):
        return Silent(f"{where} does not answer: {said}")
    if isinstance(error, (exceptions.ConnectionError, OSError)):
        return Unreachable(f"cannot reach {where}: {said}")
    if isinstance(error, UnicodeError):  # a name of a host with an impossible part
        return InfrastructureError(f"cannot reach {where}: {said}")
    if code in _CLUSTER:
        return InfrastructureError(
            f"{where} is a node of a Redis Cluster, where the lock may be on another one: {said}. "
            "Use a single server, with or without replicas"
        )
    if "DB index" in said:
        return InfrastructureError(f"{where} has no such database: {said}")
    if code in _NOT_NOW:
        return Unavailable(f"{where} accepts no writes just now: {said}")
    return InfrastructureError(f"{where} cannot carry a lock: {said}")


def _said(error: Exception, url: str) -> str:
    """What an error says, in one line."""
    text = redacted(" ".join(str(error).split())).rstrip(".") or type(error).__name__
    for part in _secrets(url):
        text = text.replace(part, "***")
    return text[:300]


def _secrets(url: str) -> Iterator[str]:
    try:
        password = urlsplit(url).password
    except ValueError:
        password = None
    for secret in (password, unquote(password or ""), os.environ.get("REDISCLI_AUTH")):
        if secret:
            yield secret


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _forget() -> None:
    """In a forked child: let go of the parent's connections, without a word to the server."""
    for server in tuple(_servers):
        if server._client is not None:
            server._client.connection_pool.reset()  # a connection that is dropped closes itself


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
