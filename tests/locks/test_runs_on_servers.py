"""`managed_environment` with a lock on a server: waiting, losing it, and saving under a fence."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from urllib.parse import urlsplit

import attrs
import pytest

from orchard_infra import (
    AllOf,
    EnvironmentLockedError,
    FileLock,
    InfrastructureManager,
    LockLostError,
    SignalStop,
    managed_environment,
)
from orchard_infra.locks.base import Lock
from orchard_infra.locks.postgres import PostgresLock
from orchard_infra.locks.redis import RedisLock
from redis_proxy import Proxy
from servers import PostgresServer, RedisServer
from support import run_python, wait_until


@attrs.frozen
class Case:
    """A lock on a server, the source of the same one, and how somebody else gets it."""

    lock: Lock
    source: str
    take_away: Callable[[], object]

    @property
    def manager(self) -> InfrastructureManager:
        return InfrastructureManager(locker=self.lock, stopper=SignalStop(mode="flag"))


@pytest.fixture(params=["postgres", "redis", "file and postgres"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "redis":
        redis: RedisServer = request.getfixturevalue("redis_server")
        redis.execute("FLUSHALL")

        def give_to_another() -> None:
            redis.execute("INCR", "orchard-infra:{digits}:fence")  # it was granted to another run
            redis.execute("DEL", "orchard-infra:{digits}:lock", "orchard-infra:{digits}:holder")

        return Case(
            RedisLock(redis.url, ttl=30.0, renew=0.2, guard=False),
            f"RedisLock({redis.url!r}, ttl=30.0, renew=0.2, guard=False)",
            give_to_another,
        )
    postgres: PostgresServer = request.getfixturevalue("postgres")
    url = postgres.create_database()
    lock: Lock = PostgresLock(url, interval=0.2)
    source = f"PostgresLock({url!r}, interval=0.2)"
    if request.param != "postgres":
        lock, source = AllOf(FileLock(), lock), f"AllOf(FileLock(), {source})"
    sql = "UPDATE orchard_infra_locks SET fence = fence + 1"
    return Case(lock, source, lambda: postgres.execute(sql, database=url.rpartition("/")[2]))


HOLDER = """
    import sys
    from orchard_infra import *
    from orchard_infra.locks.postgres import PostgresLock
    from orchard_infra.locks.redis import RedisLock
    with managed_environment("digits", manager=InfrastructureManager(locker=eval(sys.argv[1]))):
        print("holds it", flush=True)
        sys.stdin.readline()
"""


def test_a_run_waits_for_another_one_as_long_as_it_is_told(case: Case, tmp_path) -> None:
    holder = run_python(tmp_path, HOLDER, case.source)
    holder.wait_for("holds it")
    for timeout in (0.0, 0.3):
        with pytest.raises(EnvironmentLockedError, match=f"pid {holder.pid}") as caught:
            managed_environment("digits", manager=case.manager, timeout=timeout).open()
        assert caught.value.holder is not None
        assert caught.value.holder.pid == holder.pid
    holder.tell()
    with managed_environment("digits", manager=case.manager, timeout=60) as env:
        assert env.fence == env.run.fence
        env.ensure_held()


def test_a_run_that_loses_its_lock_stops_by_saving_under_its_own_fence(
    case: Case, tmp_path
) -> None:
    saved = []
    with managed_environment("digits", manager=case.manager) as env:
        name = env.fenced(tmp_path / "model.pt")
        case.take_away()
        # A loop that looks once a step.
        wait_until(lambda: env.stop_requested is not None, what="the request to stop")
        assert env.lock_lost
        with pytest.raises(LockLostError):
            env.ensure_held()
        name.write_text("the last step")
        saved.append(name)
    with managed_environment("digits", manager=case.manager, timeout=60) as env:
        saved.append(env.fenced(tmp_path / "model.pt"))
    assert saved[0] < saved[1]
    assert saved[0].read_text() == "the last step"


def test_a_forked_child_that_goes_on_does_not_hold_up_the_release(case: Case, tmp_path) -> None:
    # It has copies of all descriptors, also of those by which the thread that renews is ended.
    program = run_python(
        tmp_path,
        """
        import os, sys, threading
        from orchard_infra import *
        from orchard_infra.locks.postgres import PostgresLock
        from orchard_infra.locks.redis import RedisLock
        manager = InfrastructureManager(locker=eval(sys.argv[1]))
        reads, writes = os.pipe()
        with managed_environment("digits", manager=manager) as env:
            if os.fork() == 0:
                os.close(writes)
                os.read(reads, 1)
                os._exit(0)
            keepers = [t for t in threading.enumerate() if t.name == "orchard-infra-lock"]
        print([k.is_alive() for k in keepers], env.lock_lost, env.stop_requested, flush=True)
        """,
        # So that no renewal ends it either.
        case.source.replace("interval=0.2", "interval=60").replace(
            "ttl=30.0, renew=0.2", "ttl=180"
        ),
    )
    program.wait_for("[False] False None")


def behind(proxy: Proxy, url: str) -> str:
    """The same server, by way of a proxy."""
    port = urlsplit(proxy.url).port
    return re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", url)


@pytest.mark.parametrize("kind", ["postgres", "redis"])
def test_a_lock_whose_server_cannot_be_told_is_not_said_to_be_released(
    kind: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lock: Lock
    if kind == "redis":
        redis: RedisServer = request.getfixturevalue("redis_server")
        redis.execute("FLUSHALL")
        proxy, expected = Proxy(redis.port), "frees itself within 60 s"
        lock = RedisLock(behind(proxy, redis.url), ttl=60, renew=20, guard=False)
    else:
        postgres: PostgresServer = request.getfixturevalue("postgres")
        proxy, expected = Proxy(postgres.port), "is freed by its server when"
        lock = PostgresLock(behind(proxy, postgres.create_database()), interval=60)
    manager = InfrastructureManager(locker=AllOf(FileLock(), lock))
    with contextlib.ExitStack() as cable:
        cable.enter_context(proxy)
        with managed_environment("digits", manager=manager) as env:
            env.verify()
            cable.close()
    told = caplog.records[-1].getMessage()
    assert "released project digits" in told
    assert f"lock {env.lock_name} not free yet: " in told
    assert expected in told
    assert not env.lock_lost


def test_a_lock_that_was_lost_is_not_said_to_be_released(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with managed_environment("digits") as env:
        env.lock_path.unlink()
        with pytest.raises(LockLostError):
            env.verify()
    assert f"lock {env.lock_path} was lost before" in caplog.records[-1].getMessage()
