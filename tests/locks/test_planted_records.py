"""What somebody else has written to a lock's server harms nobody who reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from locking import key_of
from orchard_infra import EnvironmentLockedError, PostgresLock, RedisLock
from orchard_infra.locks.acquiring import acquire
from orchard_infra.locks.base import Held, ServerLock
from orchard_infra.runs.record import describe_this_run, to_json
from servers import PostgresServer, RedisServer
from support import require_module

require_module("psycopg")
require_module("redis")

KEY = key_of(Path("digits.lock"))
FIELDS = json.loads(to_json(describe_this_run("digits")))


def changed(**fields: object) -> str:
    return json.dumps({**FIELDS, "boot_id": "of another host", **fields})


@attrs.frozen
class Planted:
    """A lock, and how to write the record of its holder."""

    lock: ServerLock
    plant: Callable[[str], object]


@pytest.fixture(params=["postgres", "redis"])
def planted(request: pytest.FixtureRequest) -> Planted:
    name = os.urandom(4).hex()
    if request.param == "redis":
        redis: RedisServer = request.getfixturevalue("redis_server")
        import redis as client

        key = f"orchard-infra:{{{name}}}:holder"
        return Planted(
            RedisLock(redis.url, lock_key=name, guard=False),
            lambda text: client.Redis.from_url(redis.url).set(key, text, ex=60),
        )
    postgres: PostgresServer = request.getfixturevalue("postgres")
    url = postgres.create_database()

    def plant(text: str) -> None:
        import psycopg

        with psycopg.connect(url, autocommit=True) as other:
            other.execute("UPDATE orchard_infra_locks SET owner = %s", [text])

    return Planted(PostgresLock(url, lock_key=name), plant)


def test_what_is_no_record_is_an_unknown_holder(planted: Planted) -> None:
    lock, record = planted.lock, describe_this_run("digits")
    lease = lock.try_acquire(KEY, record)
    assert not isinstance(lease, Held)
    start = '{"orchard_infra": 1, '
    for text in (
        "",
        "held by ada",
        start + '"free": true}',
        start + '"a": ' + "[" * 50_000,
        start + '"a": "' + "x" * 20_000_000 + '"}',
        start + '"pid": ' + "9" * 5000 + "}",
        start + '"pid": NaN}',
        changed(argv={"a": 1}),
        changed(pid="1"),
        changed(project=None),
        changed(state={"a": 1}),
        changed(run_id="../../x"),
    ):
        planted.plant(text)
        outcome = lock.try_acquire(KEY, attrs.evolve(record, run_id="another"))
        assert isinstance(outcome, Held), text[:80]
        assert (outcome.holder, lock.holder(KEY), lock.holder_now(KEY)) == (None, None, None)
        assert all(run.run_id != record.run_id for run in lock.runs())
    lease.release()


def test_a_record_without_a_lock_is_no_run(redis_server: RedisServer) -> None:
    lock = RedisLock(redis_server.url, lock_key=os.urandom(4).hex(), guard=False)
    lease = lock.try_acquire(KEY, describe_this_run("digits"))
    assert not isinstance(lease, Held)
    name = f"orchard-infra:{{{lock.lock_key}}}:"
    text = redis_server.execute("GET", f"{name}holder")
    lease.release()
    redis_server.execute("SET", f"{name}holder", text)
    try:
        assert all(run.run_id != lease.record.run_id for run in lock.runs())
    finally:
        redis_server.execute("DEL", f"{name}holder")


def test_no_text_of_a_record_acts_on_a_terminal(planted: Planted) -> None:
    lease = planted.lock.try_acquire(KEY, describe_this_run("digits"))
    evil = "\x1b]0;x\x07\n\x9b2J\u202e\ud800"
    planted.plant(changed(project=evil, host=evil, user=evil, argv=[evil], cwd=evil))
    with pytest.raises(EnvironmentLockedError) as caught:
        acquire(planted.lock, KEY, describe_this_run("digits"))
    assert str(caught.value).isprintable()
    assert not isinstance(lease, Held)
    lease.release()


@pytest.mark.parametrize("text", ["text", "nan", "inf", "1e300", "9" * 30, str(2**63 - 1)])
def test_a_fence_that_was_spoilt_on_redis_grows_again(redis_server: RedisServer, text: str) -> None:
    lock = RedisLock(redis_server.url, lock_key=os.urandom(4).hex(), guard=False)
    name = f"orchard-infra:{{{lock.lock_key}}}:fence"
    fences = []
    for spoils in (False, True, False):
        if spoils:
            redis_server.execute("SET", name, text)
        lease = lock.try_acquire(KEY, describe_this_run("digits"))
        assert not isinstance(lease, Held)
        fences.append(lease.fence)
        lease.release()
        assert lock.holder_now(KEY) is None
    assert fences == sorted(set(fences))
