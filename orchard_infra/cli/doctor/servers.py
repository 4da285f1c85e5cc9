"""Whether a server can carry locks: reached, asked, and one lock taken and given back."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from orchard_infra.cli.doctor.base import Level, Setup, Verdict
from orchard_infra.errors import InfrastructureError
from orchard_infra.locks.base import Held, LockKey, ServerLock
from orchard_infra.locks.urls import find_url, lock_from_url, redacted, shown
from orchard_infra.runs.record import describe_this_run

_ROUND_TRIPS = 7
_SLOW = 0.05  # seconds for one round trip
_SKEW = 5.0  # seconds between two clocks


@attrs.frozen
class _Postgres:
    """A session as a lock has it."""

    ask: Callable[[str], list[tuple[str | None, ...]]]

    def name(self) -> str:
        return f"PostgreSQL {self._one('SHOW server_version')}"

    def ping(self) -> None:
        self._one("SELECT 1")

    def clock(self) -> float:
        return float(self._one("SELECT extract(epoch FROM clock_timestamp())"))

    def judge_settings(self) -> Verdict:
        # Twice the same backend, and the one that the connection was made with: no pooler.
        backends = {self._one("SELECT pg_backend_pid()") for _ in range(3)}
        names = "tcp_keepalives_idle tcp_keepalives_interval tcp_keepalives_count tcp_user_timeout"
        values = {name: self._one(f"SHOW {name}") for name in names.split()}
        told = ", ".join(f"{name} {value}" for name, value in values.items())
        if len(backends) > 1:
            return (
                Level.PROBLEM,
                "a pooler gives each statement to another session, and a lock belongs to one",
                "Give the server's own address, or a pool with pool_mode = session",
            )
        if self._one("SELECT inet_server_addr() IS NULL") == "t":
            return Level.OK, "no pooler; a local socket, which needs no keepalives"
        if "0" in (values["tcp_keepalives_count"], values["tcp_user_timeout"]):
            return (
                Level.WARNING,
                f"no pooler; the server may not notice that a host was cut off ({told})",
                "A host that vanishes may keep its lock for hours",
            )
        return Level.OK, f"no pooler; the server ends what it cannot reach ({told})"

    def _one(self, statement: str) -> str:
        [(value,)] = self.ask(statement)
        return str(value)


@attrs.frozen
class _Redis:
    """A connection as a lock has it. ``seconds`` is the time to live of its locks."""

    client: Any
    ask: Callable[[Callable[[], Any]], Any]
    seconds: float

    def name(self) -> str:
        return f"Redis {self._info().get('redis_version')}"

    def ping(self) -> None:
        self.ask(self.client.ping)

    def clock(self) -> float:
        seconds, microseconds = self.ask(self.client.time)
        return float(seconds) + float(microseconds) / 1e6

    def judge_settings(self) -> Verdict:
        info = self._info()
        up, policy = int(info.get("uptime_in_seconds", 0)), info.get("maxmemory_policy", "")
        keeps = bool(info.get("aof_enabled"))
        told = [f"up for {up} s", f"maxmemory-policy {policy}"]
        told.append("an append-only file" if keeps else "no append-only file")
        replicas = int(info.get("connected_slaves", 0))
        if replicas:
            told.append(f"replicas: {replicas}, of which one that lags forgets locks in a failover")
        text = ", ".join(told)
        if policy != "noeviction":
            return (
                Level.WARNING,
                f"locks may be evicted when the memory is full ({text})",
                "Set maxmemory-policy noeviction",
            )
        if not keeps:
            return (
                Level.WARNING,
                f"a restart may forget locks ({text}), and grants none for {self.seconds:g} s then",
                "Set appendonly yes",
            )
        return Level.OK, text

    def _info(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.ask(self.client.info)
        return found


@contextmanager
def _connected(setup: Setup) -> Iterator[_Postgres | _Redis]:
    from orchard_infra.locks.postgres import PostgresLock
    from orchard_infra.locks.redis import RedisLock

    lock = _lock(setup)
    if isinstance(lock, PostgresLock):
        session = lock._open("doctor")
        try:
            yield _Postgres(session._ask)
        finally:
            session.close()
    else:
        assert isinstance(lock, RedisLock)
        with lock._server() as server:
            server.check()
            yield _Redis(server.client, server.ask, lock.ttl)


def _lock(setup: Setup) -> ServerLock:
    assert setup.lock_url is not None
    return lock_from_url(setup.lock_url)


def _checked(check: Callable[[Setup], Verdict]) -> Callable[[Setup], Verdict]:
    """A server that cannot be used at all is a problem, and no check that could not be made."""

    def checked(setup: Setup) -> Verdict:
        try:
            return check(setup)
        except InfrastructureError as error:
            return Level.PROBLEM, redacted(str(error)), None

    return checked


@_checked
def check_server(setup: Setup) -> Verdict:
    began = time.perf_counter()
    with _connected(setup) as server:
        seconds = time.perf_counter() - began
        where = shown(find_url(setup.lock_url))
        return Level.OK, f"{server.name()} at {where}, connected in {1000 * seconds:.0f} ms"


@_checked
def check_latency(setup: Setup) -> Verdict:
    with _connected(setup) as server:
        trips = []
        for _ in range(_ROUND_TRIPS):
            began = time.perf_counter()
            server.ping()
            trips.append(time.perf_counter() - began)
    middle = statistics.median(trips)
    text = f"{1000 * middle:.1f} ms for a round trip, {1000 * max(trips):.1f} ms at most"
    if middle > _SLOW:
        return Level.WARNING, text, "Use a server that is nearer: each look at the lock takes that"
    return Level.OK, text


@_checked
def check_settings(setup: Setup) -> Verdict:
    with _connected(setup) as server:
        return server.judge_settings()


@_checked
def check_clock(setup: Setup) -> Verdict:
    with _connected(setup) as server:
        server.ping()
        before = time.time()
        theirs = server.clock()
        after = time.time()
    ahead = theirs - (before + after) / 2
    text = f"the server's clock is {abs(ahead):.2f} s {'ahead' if ahead >= 0 else 'behind'}"
    if abs(ahead) > _SKEW:
        return (
            Level.WARNING,
            f"{text}; ages of runs are shown wrong",
            "Synchronise the clocks (NTP)",
        )
    return Level.OK, text


@_checked
def check_server_lock(setup: Setup) -> Verdict:
    """Whether this user may take a lock, of a project that nobody has."""
    lock = _lock(setup)
    record = describe_this_run("doctor")
    # One key for each host: a server keeps the fence of every key, for a long time.
    key = LockKey(f"doctor of {record.user} on {record.host}", Path(os.devnull))
    began = time.perf_counter()
    lease = lock.try_acquire(key, record)
    if isinstance(lease, Held):
        return Level.WARNING, f"nothing is granted yet: {lease.reason or 'it is held'}", None
    try:
        taken = time.perf_counter() - began
        if not isinstance(lock.try_acquire(key, attrs.evolve(record, run_id="other")), Held):
            return Level.PROBLEM, "a lock was granted twice", "Use another server"
        found = lock.holder_now(key)
        if found is None or found.run_id != record.run_id:
            return Level.PROBLEM, "the record of the holder is not found", "Use another server"
        lease.verify()
    finally:
        lease.release()
    if lock.holder_now(key) is not None:
        return Level.PROBLEM, "a lock that was released is still held", "Use another server"
    return Level.OK, f"taken in {1000 * taken:.0f} ms, refused to others meanwhile, and given back"
