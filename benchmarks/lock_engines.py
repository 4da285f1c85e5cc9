"""Locks on servers: a cycle, handing over, and what waiting costs the waiter and the server.

Ours beside the bare locks of the same servers and portalocker.RedisLock, on PostgreSQL and Redis
servers of its own on loopback. A bare lock has no record, no fence, no watch and no answer to a
fault. Ours has a connection of its own for each run that holds it, so it is held against a bare
lock that opens one, too; the table also has bare locks on a connection that stays open.
Everybody waits as they do by default.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
from _engines import (
    BarePostgres,
    BarePostgresAnew,
    BareRedis,
    BareRedisAnew,
    OurFile,
    OurPostgres,
    OurRedis,
    PortalockerRedis,
)
from _handing import MakeLock, Waiter, hand_over, waiters
from _harness import Contender, Goal, Outcome, Row, main, ratio, take_turns, timed

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from servers import PostgresServer, RedisServer

FILE = "FileLock"
POSTGRES = "PostgresLock"
REDIS = "RedisLock"
BARE_POSTGRES = "pg_advisory_lock, open"
BARE_POSTGRES_ANEW = "pg_advisory_lock, connecting"
BARE_REDIS = "redis.lock.Lock, open"
BARE_REDIS_ANEW = "redis.lock.Lock, connecting"
PORTALOCKER = "portalocker.RedisLock"

SLOW = {PORTALOCKER}  # a cycle takes a tenth of a second


@attrs.frozen
class Engine:
    """A lock, and the server that it is on."""

    make: MakeLock
    server: PostgresServer | RedisServer | None = None


def measure(quick: bool, directory: Path) -> Outcome:
    outcome = Outcome()
    with _engines(outcome.notes) as engines, waiters(1) as waiting:
        cycles = take_turns(
            {name: _cycle(name, engine, directory, quick) for name, engine in engines.items()},
            rounds=3 if quick else 30,
        )
        latencies = take_turns(
            {
                name: functools.partial(_latency, engine, directory, waiting, quick)
                for name, engine in engines.items()
                if "connecting" not in name
            },
            rounds=1 if quick else 12,
            warm_up=0 if quick else 1,
        )
        costs = [
            row
            for name, engine in engines.items()
            if "connecting" not in name
            for row in _costs(name, engine, directory, waiting, quick)
        ]
    outcome.add(cycles, "ms", 1e3)
    for name, taken in latencies.items():
        outcome.rows.append(Row(f"{name}, handing over", [s * 1e3 for s in taken], "ms"))
    outcome.rows += costs
    outcome.goals = list(_goals(cycles))
    for ours, bare in ((POSTGRES, BARE_POSTGRES), (REDIS, BARE_REDIS), (REDIS, PORTALOCKER)):
        if ours in cycles:
            times = ratio(cycles, ours, bare)
            outcome.notes.append(f"a cycle of {ours}: {times:.2f} x {bare}")
    return outcome


@contextlib.contextmanager
def _engines(notes: list[str]) -> Iterator[Mapping[str, Engine]]:
    """The locks that can be measured here; why others cannot is noted."""
    engines = {FILE: Engine(functools.partial(OurFile, ""))}
    with contextlib.ExitStack() as stack:
        reason = PostgresServer.missing()
        if reason is None:
            postgres = stack.enter_context(PostgresServer())
            for name, kind in (
                (POSTGRES, OurPostgres),
                (BARE_POSTGRES_ANEW, BarePostgresAnew),
                (BARE_POSTGRES, BarePostgres),
            ):
                engines[name] = Engine(functools.partial(kind, postgres.url), postgres)
        else:
            notes.append(reason)
        reason = RedisServer.missing()
        if reason is None:
            # As Redis comes: what is written is on the disk within a second.
            redis = stack.enter_context(RedisServer(settings=("appendfsync everysec",)))
            for name, kind in (
                (REDIS, OurRedis),
                (BARE_REDIS_ANEW, BareRedisAnew),
                (BARE_REDIS, BareRedis),
                (PORTALOCKER, PortalockerRedis),
            ):
                engines[name] = Engine(functools.partial(kind, redis.url), redis)
        else:
            notes.append(reason)
        yield engines


def _cycle(name: str, engine: Engine, directory: Path, quick: bool) -> Contender:
    lock = engine.make(directory / "cycle.lock")

    def once() -> None:
        lock.acquire()
        lock.release()

    return timed(once, 1 if name in SLOW else 3 if quick else 20)


def _latency(engine: Engine, directory: Path, waiting: list[Waiter], quick: bool) -> float:
    latency, _ = hand_over(
        engine.make, directory / "handing.lock", waiting, hold=0.05 if quick else 0.5
    )
    return latency


def _costs(
    name: str, engine: Engine, directory: Path, waiting: list[Waiter], quick: bool
) -> Iterator[Row]:
    """The share of a core that a waiter takes, and that the server takes for it."""
    waiter, server = [], []
    idle = _server_load(engine, 0.3 if quick else 2.0)
    for _ in range(1 if quick else 3):
        before, began = _cpu(engine), time.monotonic()
        _, (waited,) = hand_over(
            engine.make, directory / "costs.lock", waiting, hold=0.3 if quick else 5.0
        )
        waiter.append(waited.cpu_percent)
        load = 100 * (_cpu(engine) - before) / (time.monotonic() - began)
        server.append(max(load - idle, 0.0))
    yield Row(f"{name}, waiter's CPU", waiter, "%")
    if engine.server is not None:
        yield Row(f"{name}, server's CPU", server, "%")


def _server_load(engine: Engine, seconds: float) -> float:
    """Percent of a core that the server takes when nobody waits."""
    if engine.server is None:
        return 0.0
    before = _cpu(engine)
    time.sleep(seconds)
    return 100 * (_cpu(engine) - before) / seconds


def _cpu(engine: Engine) -> float:
    return 0.0 if engine.server is None else engine.server.cpu_time


def _goals(cycles: Mapping[str, list[float]]) -> Iterator[Goal]:
    for ours, bare in ((POSTGRES, BARE_POSTGRES_ANEW), (REDIS, BARE_REDIS_ANEW)):
        value = ratio(cycles, ours, bare) if ours in cycles else None
        yield Goal(f"a cycle of {ours}, against {bare}", value, 1.5)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
