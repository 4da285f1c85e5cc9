"""The password of a lock's server is in no traceback, no pickle and no record on a server."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from locking import key_of
from orchard_infra import PostgresLock, RedisLock
from orchard_infra.locks.base import Held, ServerLock
from orchard_infra.runs.record import describe_this_run
from servers import PostgresServer, RedisServer
from support import require_module

require_module("psycopg")
require_module("redis")

SECRET = "hush4711"
NOBODY = "127.0.0.1:1"


def error_of(lock: ServerLock) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        lock.try_acquire(key_of(Path("digits.lock")), describe_this_run("digits"))
    return caught.value


def with_variables(error: BaseException) -> str:
    """A traceback as pytest and Sentry show it, but for the frames of this file."""
    told, seen = [], error
    while seen is not None:
        frames = seen.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        formatted = traceback.TracebackException(type(seen), seen, frames, capture_locals=True)
        told += formatted.format(chain=False)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "".join(told)


@pytest.mark.parametrize(
    ("make", "url"),
    [
        (PostgresLock, f"postgresql://ada:{SECRET}@{NOBODY}/locks"),
        (PostgresLock, f"host=127.0.0.1 port=1 user=ada password={SECRET}"),
        (PostgresLock, f"postgresql://ada:a{SECRET}/{SECRET}@{NOBODY}/locks"),
        (PostgresLock, f"postgresql://ada:{SECRET}%@{NOBODY}/locks"),
        (RedisLock, f"redis://:{SECRET}@{NOBODY}/0"),
        (RedisLock, f"redis://:{SECRET}@127.0.0.1:port/0"),
        (RedisLock, f"redis://:{SECRET}@{NOBODY}/0?nonsense=3"),
        (RedisLock, f"redis://{NOBODY}/0?password={SECRET}"),
    ],
)
@pytest.mark.parametrize("way", ["argument", "variable", "file"])
def test_a_traceback_with_variables_does_not_show_it(
    make: Callable[[str | None], ServerLock],
    url: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if way == "variable":
        monkeypatch.setenv("ORCHARD_INFRA_LOCK_URL", url)
    (tmp_path / "url").write_text(url)
    error = error_of(make({"argument": url, "variable": None}.get(way, f"file:{tmp_path}/url")))
    assert SECRET not in with_variables(error)


@pytest.mark.parametrize("make", [PostgresLock, RedisLock])
def test_a_ctrl_c_while_it_connects_does_not_show_it(make: Callable[[str], ServerLock]) -> None:
    scheme = "redis" if make is RedisLock else "postgresql"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            lock = make(f"{scheme}://ada:{SECRET}@127.0.0.1:{silent.getsockname()[1]}/0")
            signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)  # again, if nobody was connecting yet
            error = error_of(lock)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert isinstance(error, KeyboardInterrupt)
    assert SECRET not in with_variables(error)


@pytest.fixture(params=["postgres", "redis"])
def lock(request: pytest.FixtureRequest) -> ServerLock:
    if request.param == "postgres":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        return PostgresLock(postgres.create_database(), lock_key=os.urandom(4).hex())
    redis: RedisServer = request.getfixturevalue("redis_server")
    return RedisLock(redis.url, lock_key=os.urandom(4).hex(), guard=False)


def test_a_record_on_a_server_does_not_tell_those_of_the_command(lock: ServerLock) -> None:
    command = ["train", "--db", "redis://:hush@cache/0", "password=a"]
    key, record = key_of(Path("digits.lock")), describe_this_run("digits", argv=command)
    lease = lock.try_acquire(key, record)
    assert not isinstance(lease, Held)

    listed = [run for run in lock.runs() if run.run_id == record.run_id]
    found = [lock.holder(key), lock.holder_now(key), *listed]
    lease.release()

    assert len(found) == 3
    for one in found:
        assert one is not None
        assert one.argv == ("train", "--db", "redis://:***@cache/0", "password=***")
    assert lease.record is record


def test_a_pickled_lease_has_no_address(lock: ServerLock) -> None:
    lease = lock.try_acquire(key_of(Path("digits.lock")), describe_this_run("digits"))
    assert not isinstance(lease, Held)
    assert b"://" not in pickle.dumps(lease).replace(b" on redis://", b"")
    lease.release()
