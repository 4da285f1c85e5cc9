"""The lock on a Redis server, as long as nothing breaks. test_redis_faults.py is about the rest."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import itertools
import logging
import pickle
import socket
import sys
import threading
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest

from locking import exit_status, forked
from orchard_infra import RedisLock
from orchard_infra.errors import (
    ConfigurationError,
    InfrastructureError,
    LockLostError,
)
from orchard_infra.locks import redis as redis_lock
from orchard_infra.locks import redis_server as redis_server_module
from orchard_infra.locks.acquiring import acquire
from orchard_infra.locks.base import Held, LockKey
from orchard_infra.locks.redis import RedisLease
from orchard_infra.locks.redis_server import FencedLock, Server
from orchard_infra.locks.urls import URL_VARIABLE
from orchard_infra.runs.record import describe_this_run
from redis_proxy import Proxy
from servers import RedisServer
from support import require_module, run_python, wait_until

require_module("redis")


@pytest.fixture
def key() -> LockKey:
    return LockKey(f"project-{uuid.uuid4().hex[:12]}", Path("unused"))


@pytest.fixture
def lock(redis_server: RedisServer) -> RedisLock:
    # The server may have just been started, after which nobody would be granted anything.
    return RedisLock(redis_server.url, guard=False, poll=0.02)


def take(lock: RedisLock, key: LockKey, **changes: Any) -> RedisLease:
    record = attrs.evolve(describe_this_run(key.project), **changes)
    lease = lock.try_acquire(key, record)
    assert isinstance(lease, RedisLease)
    return lease


def keys_in(server: RedisServer, key: LockKey) -> set[str]:
    return set(server.execute("KEYS", f"*{key.project}*").split())


def test_the_record_is_on_the_server_while_the_lock_is_held(redis_server, lock, key):
    lease = take(lock, key)
    holder = lock.holder(key)
    assert holder == attrs.evolve(lease.record, fence=lease.fence, environment=None)
    assert holder == lock.holder_now(key)
    assert holder in lock.runs()
    assert lock.is_shared(key)
    lease.release()
    assert lock.holder(key) is None
    assert holder not in lock.runs()
    lease.release()  # twice is once


def test_everything_on_the_server_expires(redis_server, lock, key):
    lease = take(lock, key)
    left = {name: int(redis_server.execute("TTL", name)) for name in keys_in(redis_server, key)}
    stem = f"orchard-infra:{{{key.project}}}"
    assert set(left) == {f"{stem}:lock", f"{stem}:holder", f"{stem}:fence"}
    assert 20 < left.pop(f"{stem}:lock") <= 30
    assert 20 < left.pop(f"{stem}:holder") <= 30
    assert 0 < left.pop(f"{stem}:fence") <= 30 * 86_400
    lease.release()
    assert keys_in(redis_server, key) == {f"{stem}:fence"}
    assert int(redis_server.execute("TTL", f"{stem}:fence")) > 0


def test_the_fence_grows_also_when_the_counter_or_the_clock_goes_back(redis_server, lock, key):
    fences = []
    for _ in range(3):
        lease = take(lock, key)
        fences.append(lease.fence)
        lease.release()
    name = f"orchard-infra:{{{key.project}}}:fence"
    redis_server.execute("SET", name, str(10**15))  # granted while the clock was wrong
    lease = take(lock, key)
    fences.append(lease.fence)
    lease.release()
    assert fences == sorted(set(fences))
    assert fences[-1] > 10**15
    redis_server.execute("DEL", name)
    assert take(lock, key).fence > fences[-2]


def test_a_stock_lock_of_redis_py_under_the_same_key_is_respected(redis_server, lock, key):
    import redis

    with contextlib.closing(redis.Redis.from_url(redis_server.url)) as client:
        stock = client.lock(f"orchard-infra:{{{key.project}}}:lock", timeout=30)
        assert stock.acquire(blocking=False)
        assert lock.try_acquire(key, describe_this_run(key.project)) == Held()
        stock.release()
        lease = take(lock, key)
        assert not stock.acquire(blocking=False)
        lease.release()


@pytest.mark.parametrize(
    "name", ["a b", "a*", "{a}", "a}:lock", "a:fence", "\n\r", "ä", "\udcff", "a" * 5000, "%7Ba%7D"]
)
def test_a_project_may_have_any_name(lock, key, name):
    from redis.crc import key_slot

    from orchard_infra.locks.redis_server import keys_of

    odd = attrs.evolve(key, project=key.project + name)
    first, second = take(lock, key), take(lock, odd)
    assert lock.holder(key) != lock.holder(odd)
    assert {lock.holder(key).run_id, lock.holder(odd).run_id} == {
        first.record.run_id,
        second.record.run_id,
    }
    assert len({key_slot(one.encode()) for one in keys_of(odd.project)}) == 1


def test_lock_key_takes_the_place_of_the_project(lock, key):
    lease = take(attrs.evolve(lock, lock_key=f"{key.project}-gpu0"), key)
    take(lock, key).release()
    other = LockKey(f"{key.project}-gpu0", Path("unused"))
    assert isinstance(lock.try_acquire(other, lease.record), Held)


def test_a_lock_pickles_copies_and_compares(redis_server):
    lock = RedisLock(redis_server.url, timeout=None, ttl=60, renew=2, lock_key="x", guard=False)
    for other in (pickle.loads(pickle.dumps(lock)), copy.copy(lock), copy.deepcopy(lock)):
        assert other == lock
        assert hash(other) == hash(lock)
    assert lock != attrs.evolve(lock, ttl=90)


def test_a_pickled_lease_holds_nothing_and_tells_no_password(lock, key):
    secret = attrs.evolve(lock, url=lock.url.replace("redis://", "redis://:@"))
    lease = take(secret, key)
    lease._lock = attrs.evolve(lock, url="redis://:hunter2@127.0.0.1/0")
    pickled = pickle.dumps(lease)
    assert b"hunter2" not in pickled
    powerless = pickle.loads(pickled)
    with pytest.raises(LockLostError, match="pickled copy"):
        powerless.verify()
    with pytest.raises(LockLostError, match="pickled copy"):
        powerless.fence
    powerless.release()
    assert copy.deepcopy(lease) is lease
    lease.verify()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ttl": 0}, "ttl must be"),
        ({"ttl": True}, "ttl must be"),
        ({"renew": 11}, "at most a third of ttl=30"),
        ({"renew": 0}, "renew must be"),
        ({"timeout": -1}, "timeout must be"),
        ({"lock_key": ""}, "lock_key must be"),
        ({"poll": 0}, "poll must be"),
        ({"poll": float("inf")}, "poll"),
    ],
)
def test_values_that_cannot_be_right_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        RedisLock("redis://localhost", **wrong)


def test_the_url_comes_from_the_environment_or_from_a_file(
    redis_server, lock, key, tmp_path, monkeypatch
):
    lease = take(lock, key)
    (tmp_path / "url").write_text(f"{lock.url}\n")
    assert RedisLock(f"file:{tmp_path / 'url'}").holder(key).run_id == lease.record.run_id
    with pytest.raises(ConfigurationError, match=URL_VARIABLE):
        RedisLock().holder(key)
    monkeypatch.setenv(URL_VARIABLE, lock.url)
    assert RedisLock().holder(key).run_id == lease.record.run_id


def test_a_password_of_redis_cli_is_used_and_tls_and_sockets_are(key, monkeypatch, tmp_path):
    with RedisServer(password="hunter2", tls=True) as server:
        lock = RedisLock(server.url, guard=False)
        take(lock, key).release()
        without = RedisLock(server.url.replace(":hunter2@", ""), guard=False)
        assert_refuses(without, key, "needs a password")
        monkeypatch.setenv("REDISCLI_AUTH", "hunter2")
        take(without, key).release()
        take(RedisLock(f"unix://{server.directory}/socket", guard=False), key).release()
        assert_refuses(RedisLock(server.url.partition("?")[0], guard=False), key, "certificate")
        assert_refuses(
            RedisLock(server.url.replace("rediss:", "redis:").partition("?")[0], guard=False),
            key,
            "cannot reach|does not answer",
        )


def test_a_missing_password_is_named_in_the_answer_to_the_try_itself(key):
    """Redis hangs up on who says a lot without one: the next question may meet a dead line."""
    with RedisServer(password="hunter2") as server:
        without = RedisLock(server.url.replace(":hunter2@", ""), guard=False)
        lease = take(RedisLock(server.url, guard=False), key)
        held = lease._held
        with Server(without.url, 5) as stranger:
            stranger.connect()
            attempt = FencedLock(stranger, "x", "y", ttl=9, record="z", guard=True)
            for policy in (None, "noeviction"):  # a first try says more than a later one
                stranger.policy = policy
                with pytest.raises(InfrastructureError, match="needs a password"):
                    attempt.take()
            for ask in (held.renew, held.give_back):
                with pytest.raises(InfrastructureError, match="needs a password"):
                    ask(stranger)
        lease.release()


def assert_refuses(lock: RedisLock, key: LockKey, says: str) -> None:
    """One clear error, and no password: in it, in what it came from, or in the lock."""
    with pytest.raises(InfrastructureError, match=says) as caught:
        lock.try_acquire(key, describe_this_run(key.project))
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter2" not in f"{error!r} {error} {error.args}"
        error = error.__cause__ or error.__context__
    assert "hunter2" not in f"{lock!r} {lock.describe(key)}"


def test_what_cannot_work_is_one_clear_error_without_a_password(redis_server, key, caplog):
    server, address = redis_server, f"{redis_server.address}:{redis_server.port}"
    may_not = server.create_user("reader", "hunter2", "~*", "+@read", "+@connection", "+info")
    no_info = server.create_user("writer", "hunter2", "~*", "+@all", "-info")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        closed = nobody.getsockname()[1]
        for url, says in (
            (f"redis://reader:hunter2-wrong@{address}/0", "refuses the user or password"),
            (f"redis://nobody:hunter2@{address}/0", "refuses the user or password"),
            (f"redis://{address}/99", "no such database"),
            (may_not, "may not use it for a lock.*It needs: ~orchard-infra"),
            (no_info, r"may not use it for a lock.*\+info"),
            (f"redis://:hunter2@127.0.0.1:{closed}/0", "cannot reach.*refused"),
            ("redis://:hunter2@no-such-host.invalid/0", "cannot reach"),
            ("unix:///no/such/socket", "cannot reach"),
            (f"redis://:hun/ter2@{address}/0", "cannot be read"),
            (f"redis://{address}/0?hunter=2", "option that redis-py does not take"),
            ("rediss://:hunter2@127.0.0.1:1/0?ssl_cert_reqs=maybe", "option|cannot reach"),
            ("http://:hunter2@localhost", "should begin with redis://"),
        ):
            assert_refuses(RedisLock(url), key, says)
    take(RedisLock(no_info, guard=False), key).release()
    assert "hunter2" not in caplog.text
    server.execute("ACL", "DELUSER", "reader", "writer")


def test_a_user_with_the_rights_that_an_error_names_needs_no_more(redis_server, key):
    from orchard_infra.locks.redis_server import _RIGHTS

    page = Path(__file__).parents[2] / "docs" / "locks-redis.md"
    assert _RIGHTS in " ".join(page.read_text("utf-8").split())
    redis_server.create_user("locks", "hunter2", "resetchannels", *_RIGHTS.split())
    url = redis_server.url_of("locks", "hunter2", 3)
    redis_server.execute("SCRIPT", "FLUSH")
    lock = RedisLock(url, ttl=3, renew=0.5)  # with the guard
    lease = acquire(attrs.evolve(lock, timeout=60), key, describe_this_run(key.project))
    lease.renew()
    assert lock.holder(key) in lock.runs()
    lease.release()
    redis_server.execute("ACL", "DELUSER", "locks")


def test_a_missing_redis_py_is_named_with_the_command_that_installs_it(key, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "redis" else find(name)
    )
    with pytest.raises(ConfigurationError, match=r'pip install "orchard-infra\[redis\]"'):
        RedisLock("redis://localhost").holder(key)


def test_redis_py_is_not_loaded_before_a_server_is_asked(tmp_path):
    script = run_python(
        tmp_path,
        """
        import sys
        from orchard_infra import RedisLock
        RedisLock("redis://localhost")
        assert "redis" not in sys.modules
        """,
    )
    assert script.finish() == 0, script.transcript()


@contextlib.contextmanager
def answering(answers: Callable[[bytes], bytes]) -> Iterator[str]:
    """Something that looks like a Redis server; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    while data := client.recv(65536):
                        client.sendall(answers(data))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_a_server_that_quotes_the_password_in_its_error_gives_nothing_away(key):
    def quotes(data: bytes) -> bytes:
        said = b"-ERR unknown command 'AUTH', with args beginning with: 'hunter2/'\r\n"
        return said * data.count(b"*")

    with answering(quotes) as url:
        secret = url.replace("redis://", "redis://:hunter2%2F@")
        assert_refuses(RedisLock(secret), key, "unknown command 'AUTH'")


def test_a_replica_an_old_server_and_one_that_loads_are_refused(redis_server, key):
    def old(data: bytes) -> bytes:
        if b"INFO" not in data:
            return b"-ERR unknown command\r\n" * data.count(b"*")
        info = b"redis_version:4.0.14\r\nrole:master\r\n"
        return b"$%d\r\n%s\r\n" % (len(info), info)

    def loading(data: bytes) -> bytes:
        return b"-LOADING Redis is loading the dataset in memory\r\n" * data.count(b"*")

    with answering(old) as url:
        assert_refuses(RedisLock(url), key, "Redis 4.0.14, which is too old")
    with answering(loading) as url:
        assert_refuses(RedisLock(url), key, "still loading")
    with redis_server.replica() as replica:
        assert_refuses(RedisLock(replica.url), key, "read-only replica")


def test_a_replica_that_takes_writes_is_refused_by_the_try_itself(redis_server, key):
    with redis_server.replica() as replica:
        replica.execute("CONFIG", "SET", "replica-read-only", "no")
        assert_refuses(RedisLock(replica.url, guard=False), key, "read-only replica of 127.0.0.1")
        assert not keys_in(replica, key)


def test_taking_and_giving_back_are_one_question_each(lock, key, monkeypatch):
    import redis

    take(lock, key).release()  # the server knows the scripts now
    asked: list[str] = []
    ask = redis.Redis.execute_command

    def noting(self: redis.Redis, *words: Any, **options: Any) -> Any:
        asked.append(words[0])
        return ask(self, *words, **options)

    monkeypatch.setattr(redis.Redis, "execute_command", noting)
    lease = take(lock, key)
    assert asked == ["EVALSHA"]
    assert isinstance(lock.try_acquire(key, describe_this_run(key.project)), Held)
    assert asked == ["EVALSHA"] * 2
    lease.release()
    assert asked == ["EVALSHA"] * 3


def test_a_server_that_may_evict_locks_is_named_once(key, caplog):
    with RedisServer(settings=["maxmemory-policy allkeys-lru"]) as server:
        lock = RedisLock(server.url, guard=False)
        for _ in range(2):
            take(lock, key).release()
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "maxmemory-policy is allkeys-lru, and should be noeviction" in warnings[0]


def test_a_grant_whose_reply_was_lost_is_taken_up_by_the_next_try(redis_server, lock, key):
    with Proxy(redis_server.port) as proxy, attrs.evolve(lock, url=proxy.url).connect() as cable:
        record = describe_this_run(key.project)
        assert cable.holder_now(key) is None
        proxy.swallow = b"*3"
        outcome = cable.try_acquire(key, record)
        assert isinstance(outcome, Held)
        assert "cannot reach" in outcome.reason
        assert proxy.lost == 1
        assert lock.holder(key).run_id == record.run_id  # the server has granted it all the same
        lease = cable.try_acquire(key, record)
        assert isinstance(lease, RedisLease)
        lease.verify()
        lease.release()


def test_a_waiter_that_gives_up_after_a_lost_reply_leaves_nothing(redis_server, lock, key):
    with Proxy(redis_server.port) as proxy, attrs.evolve(lock, url=proxy.url).connect() as cable:
        assert cable.holder_now(key) is None
        proxy.swallow = b"*3"
        assert isinstance(cable.try_acquire(key, describe_this_run(key.project)), Held)
        assert proxy.lost == 1
        assert lock.holder(key) is not None
        cable.close()
        assert lock.holder(key) is None


def test_a_first_reply_that_is_lost_costs_nothing(redis_server, lock, key):
    with Proxy(redis_server.port) as proxy:
        proxy.swallow = b"*3"
        lease = take(attrs.evolve(lock, url=proxy.url), key)
        assert proxy.lost == 1
        lease.verify()
        lease.release()


def test_a_waiter_outlives_a_restart_of_the_server(key):
    with RedisServer() as server, RedisLock(server.url, guard=False).connect() as waiter:
        lock = RedisLock(server.url, guard=False)
        record = describe_this_run(key.project)
        lease = take(lock, key)
        assert isinstance(waiter.try_acquire(key, record), Held)
        server.stop()
        outcome = waiter.try_acquire(key, record)
        assert isinstance(outcome, Held)
        assert "cannot reach" in outcome.reason
        server.start()
        assert waiter.try_acquire(key, record).holder.run_id == lease.record.run_id
        lease.release()
        assert isinstance(waiter.try_acquire(key, record), RedisLease)


def test_any_thread_may_verify_while_another_one_renews(lock, key):
    lease = take(lock, key)
    errors = []

    def ask() -> None:
        try:
            for _ in range(50):
                lease.verify()
                assert lease.fence
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    lease.release()


def test_a_forked_child_has_neither_power_nor_a_connection(redis_server, lock, key):
    others = connections_of(redis_server)
    lease = take(lock, key)

    def child() -> None:
        with pytest.raises(LockLostError, match="forked"):
            lease.verify()
        with pytest.raises(LockLostError, match="forked"):
            lease.fence
        lease.release()
        ports = [c.raddr.port for c in psutil.Process().net_connections("tcp") if c.raddr]
        assert redis_server.port not in ports
        # It may ask by itself.
        assert lock.holder(key).run_id == lease.record.run_id

    ours = connections_of(redis_server) - others
    assert len(ours) == 1
    with forked(child) as pid:
        assert exit_status(pid) == 0
    lease.verify()
    assert connections_of(redis_server) - others == ours  # the parent's own one still serves
    lease.release()


def connections_of(server: RedisServer) -> set[str]:
    """The ids of those by TCP: that of redis-cli is none."""
    clients = server.execute("CLIENT", "LIST").splitlines()
    return {client.partition(" ")[0] for client in clients if "addr=127.0.0.1:" in client}


def test_a_lease_that_is_dropped_frees_the_lock(lock, key):
    lease = take(lock, key)
    del lease
    gc.collect()
    assert lock.holder(key) is None


def test_an_interrupt_at_any_line_leaves_nothing_on_the_server(lock, key):
    """At each line of the lock, one after the other, as when another thread took the signal."""
    ours = (redis_lock.__file__, redis_lock.__file__.replace("redis.py", "redis_server.py"))
    take(lock, key).release()  # what is loaded and cached by the first one is

    def interrupt_at(number: int) -> bool:
        """Whether there was such a line."""
        seen = itertools.count(1)
        done = False

        def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
            nonlocal done
            if frame.f_code.co_filename not in ours:
                return None
            if event == "line" and not done and next(seen) == number:
                done = True
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            lease = acquire(lock, key, describe_this_run(key.project))
            sys.settrace(before)
            lease.release()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        return done

    numbers = itertools.count(1)
    while interrupt_at(number := next(numbers)):
        gc.collect(0)
        assert lock.holder(key) is None, f"line number {number} of those that were run"
    assert number > 50


def test_a_release_that_was_broken_off_at_any_line_can_be_called_again(lock, key):
    """No mask holds off a signal that another thread receives: its handler runs here."""
    codes = {
        redis_lock.RedisLease.release.__code__,
        redis_server_module.FencedLock.give_back.__code__,
    }
    for number in itertools.count(1):
        seen = itertools.count(1)

        def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
            if frame.f_code not in codes:
                return None
            if event == "line" and next(seen) == number:  # noqa: B023
                raise KeyboardInterrupt
            return trace

        lease = take(lock, key)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            lease.release()
        except KeyboardInterrupt:
            sys.settrace(before)
            lease.release()
        else:
            break
        finally:
            sys.settrace(before)
        assert lock.holder(key) is None, f"line number {number} of those that were run"
    assert number > 10


def test_a_ctrl_c_ends_the_wait_for_a_server_that_does_not_answer(tmp_path, key):
    with answering(lambda data: b"") as url:
        script = run_python(
            tmp_path,
            """
            import sys
            from pathlib import Path
            from orchard_infra import LockKey, RedisLock
            from orchard_infra.locks.acquiring import acquire
            from orchard_infra.runs.record import describe_this_run
            print("asking", flush=True)
            lock, record = RedisLock(sys.argv[1], ttl=3600), describe_this_run("x")
            acquire(lock, LockKey("x", Path("x")), record)
            """,
            url,
        )
        script.wait_for("asking")
        wait_until(lambda: psutil.Process(script.pid).net_connections("tcp"))
        script.send_signal(2)
        assert script.finish() != 0
        assert "KeyboardInterrupt" in script.error_output
        assert "does not answer" not in script.error_output  # it did not wait for that
