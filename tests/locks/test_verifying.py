"""`env.verify` and `env.ensure_held`, where this process has no part in a lock that is not lost."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

from locking import exit_status, forked
from orchard_infra import (
    AllOf,
    FileLock,
    InfrastructureError,
    InfrastructureManager,
    LockLostError,
    managed_environment,
)
from orchard_infra.environment import Environment
from orchard_infra.locks.base import Lease, Lock, LockKey
from orchard_infra.locks.postgres import PostgresLock
from orchard_infra.locks.redis import RedisLock
from orchard_infra.runs.record import RunRecord
from servers import PostgresServer, RedisServer


@pytest.fixture(params=["file", "postgres", "redis", "all of them"])
def lock(request: pytest.FixtureRequest) -> Lock:
    locks: list[Lock] = []
    if request.param in ("file", "all of them"):
        locks.append(FileLock())
    if request.param in ("postgres", "all of them"):
        postgres: PostgresServer = request.getfixturevalue("postgres")
        locks.append(PostgresLock(postgres.create_database()))
    if request.param in ("redis", "all of them"):
        redis: RedisServer = request.getfixturevalue("redis_server")
        redis.execute("FLUSHALL")
        locks.append(RedisLock(redis.url, guard=False))
    return locks[0] if len(locks) == 1 else AllOf(*locks)


def enter(lock: Lock) -> managed_environment:
    manager = InfrastructureManager(locker=lock, sanitizer=None, flusher=None, cleaner=None)
    return managed_environment("digits", manager=manager)


def assert_refused(
    env: Environment, words: str, kind: type[InfrastructureError] = LockLostError
) -> None:
    for ask in (env.verify, env.ensure_held):
        with pytest.raises(InfrastructureError, match=words) as caught:
            ask()
        assert type(caught.value) is kind
    assert not env.lock_lost
    assert env.stop_requested is None


def test_after_the_release_nothing_is_lost_and_nothing_is_asked_to_stop(lock: Lock) -> None:
    with enter(lock) as env:
        env.verify()
    assert_refused(env, "was released")


def test_a_forked_child_is_told_who_has_a_lock_on_a_server_and_has_a_file_itself(
    lock: Lock,
) -> None:
    with enter(lock) as env:

        def asks() -> None:
            if isinstance(lock, FileLock):
                env.verify()
                env.ensure_held()
            else:
                assert_refused(env, f"is held by pid {env.run.pid}", InfrastructureError)

        with forked(asks) as child:
            assert exit_status(child) == 0
        env.verify()
        assert not env.lock_lost


def test_a_lock_that_was_lost_before_the_release_stays_lost() -> None:
    with enter(FileLock()) as env:
        env.lock_path.unlink()
        with pytest.raises(LockLostError):
            env.verify()
    with pytest.raises(LockLostError, match="removed or replaced"):
        env.verify()
    assert env.lock_lost


@attrs.define
class Interrupted:
    """A lease that another thread releases while it is asked."""

    record: RunRecord
    release_now: Callable[[], None] = lambda: None
    interval: float = 60.0
    fence: int = 1

    def verify(self) -> None:
        self.release_now()
        raise LockLostError("the lock was released")

    renew = verify

    def release(self) -> None: ...


class InterruptedLock:
    timeout = 0.0

    def try_acquire(self, key: LockKey, record: RunRecord) -> Lease:
        return Interrupted(record)

    def holder(self, key: LockKey) -> RunRecord | None:
        return None


def test_a_release_while_the_server_is_asked_is_no_loss() -> None:
    env = enter(InterruptedLock()).open()
    lease = env._lease
    assert isinstance(lease, Interrupted)
    lease.release_now = env.close
    assert_refused(env, "was released")
