"""What an error of a server means: not now, or not at all. It must not depend on the moment.

A newcomer is told at once. A waiter that was answered before waits for what may pass, and is told
at once what will not. A holder is in doubt until it can ask again, whatever the error.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from orchard_infra import LockSuspectError, PostgresLock, RedisLock
from orchard_infra.errors import InfrastructureError, LockLostError
from orchard_infra.locks import postgres_server
from orchard_infra.locks.base import Held, Lease, Lock, LockKey
from orchard_infra.locks.keeper import Keeper
from orchard_infra.locks.postgres import PostgresLease
from orchard_infra.locks.redis import RedisLease
from orchard_infra.locks.urls import lock_from_url
from orchard_infra.runs.record import describe_this_run
from servers import PostgresServer, RedisServer
from support import require_module, wait_until

require_module("redis")
require_module("psycopg")


def some_key() -> LockKey:
    return LockKey(f"project-{uuid.uuid4().hex[:12]}", Path("unused"))


def try_for(lock: Any, key: LockKey, **changes: Any) -> Any:
    return lock.try_acquire(key, attrs.evolve(describe_this_run(key.project), **changes))


def take(lock: Any, key: LockKey) -> Any:
    lease = try_for(lock, key)
    assert not isinstance(lease, Held), lease
    return lease


@attrs.define
class Scene:
    """Somebody holds one lock; somebody else was answered, and waits for another one, now free."""

    lock: Lock
    lease: Lease
    waiter: Lock
    key: LockKey


@contextlib.contextmanager
def waiting(lock: Any) -> Iterator[Scene]:
    key = some_key()
    before = take(lock, key)
    lease = take(lock, some_key())
    with lock.connect() as waiter:
        assert isinstance(try_for(waiter, key, run_id="w"), Held)
        before.release()
        yield Scene(lock, lease, waiter, key)
    lease.release()


def assert_only_in_doubt(lease: Lease) -> None:
    """A holder that cannot be confirmed: never an error of another kind."""
    with contextlib.suppress(LockSuspectError):
        lease.verify()


def assert_waited_for(scene: Scene, says: str) -> None:
    outcome = try_for(scene.waiter, scene.key, run_id="w")
    assert isinstance(outcome, Held)
    assert says in (outcome.reason or "")
    assert_only_in_doubt(scene.lease)
    # Whoever has never been answered is told at once what is wrong.
    with pytest.raises(InfrastructureError) as caught:
        try_for(scene.lock, some_key())
    assert "hunter2" not in str(caught.value)


def assert_passed(scene: Scene) -> None:
    wait_until(lambda: is_confirmed(scene.lease))
    wait_until(lambda: not isinstance(try_for(scene.waiter, scene.key, run_id="w"), Held))
    take(scene.lock, some_key()).release()


def is_confirmed(lease: Lease) -> bool:
    try:
        lease.verify()
    except LockSuspectError:
        return False
    return True


def assert_refused(scene: Scene, says: str) -> None:
    """The waiter is told at once, like whoever comes first."""
    for lock in (scene.waiter, scene.lock):
        said = wait_until(lambda lock=lock: refusal(lock, scene.key))
        assert says in said
        assert "hunter2" not in said
    assert_only_in_doubt(scene.lease)


def refusal(lock: Lock, key: LockKey) -> str:
    """Why the lock is refused. Empty where the line has just broken: it is made again."""
    try:
        outcome = try_for(lock, key, run_id="w")
    except InfrastructureError as error:
        return str(error)
    # Redis ends the connections of a user that is gone a moment after it has said so.
    assert isinstance(outcome, Held)
    assert "cannot reach" in (outcome.reason or "")
    return ""


# Redis.


@pytest.fixture(scope="module")
def own_redis() -> Iterator[RedisServer]:
    reason = RedisServer.missing()
    if reason is not None:
        pytest.skip(reason)
    with RedisServer(settings=["busy-reply-threshold 50"]) as server:
        yield server


@pytest.fixture
def admin(own_redis: RedisServer) -> Iterator[Any]:
    """A connection that is there before the server turns everybody away."""
    import redis

    with redis.Redis(unix_socket_path=str(own_redis.directory / "socket")) as client:
        client.ping()
        yield client


def disconnect_redis_clients(admin: Any) -> None:
    admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


@contextlib.contextmanager
def out_of_memory(server: RedisServer, admin: Any) -> Iterator[str]:
    admin.config_set("maxmemory", 1)
    try:
        yield "maxmemory"
    finally:
        admin.config_set("maxmemory", 0)


@contextlib.contextmanager
def without_replicas(server: RedisServer, admin: Any) -> Iterator[str]:
    admin.config_set("min-replicas-to-write", 1)
    try:
        yield "replicas"
    finally:
        admin.config_set("min-replicas-to-write", 0)


@contextlib.contextmanager
def busy(server: RedisServer, admin: Any) -> Iterator[str]:
    import redis

    def is_busy() -> bool:
        try:
            admin.ping()
        except redis.ResponseError:
            return True
        return False

    with socket.create_connection((server.address, server.port)) as client:
        client.sendall(b"EVAL 'while true do end' 0\r\n")
        wait_until(is_busy)
        try:
            yield "busy"
        finally:
            admin.execute_command("SCRIPT KILL")


@contextlib.contextmanager
def cut_off_from_the_primary(server: RedisServer, admin: Any) -> Iterator[str]:
    admin.config_set("replica-serve-stale-data", "no")
    admin.replicaof("127.0.0.1", 1)
    try:
        yield "MASTER is down"
    finally:
        admin.replicaof("NO", "ONE")
        admin.config_set("replica-serve-stale-data", "yes")


@contextlib.contextmanager
def demoted(server: RedisServer, admin: Any) -> Iterator[str]:
    admin.replicaof("127.0.0.1", 1)
    try:
        yield "read-only replica"
    finally:
        admin.replicaof("NO", "ONE")


@contextlib.contextmanager
def full(server: RedisServer, admin: Any) -> Iterator[str]:
    admin.config_set("maxclients", 1)  # that is us
    disconnect_redis_clients(admin)
    try:
        yield "cannot reach"  # its words may get lost with the line
    finally:
        admin.config_set("maxclients", 1000)


@pytest.mark.parametrize(
    "trouble",
    [out_of_memory, without_replicas, busy, cut_off_from_the_primary, demoted, full],
)
def test_a_redis_server_that_cannot_just_now_is_waited_for_by_whom_it_has_answered(
    own_redis: RedisServer, admin: Any, trouble: Callable[..., Any]
) -> None:
    with waiting(RedisLock(own_redis.url, guard=False)) as scene:
        with trouble(own_redis, admin) as says:
            assert_waited_for(scene, says)
        assert_passed(scene)


@contextlib.contextmanager
def another_password(server: RedisServer, admin: Any) -> Iterator[str]:
    admin.config_set("requirepass", "hunter2")
    disconnect_redis_clients(admin)
    try:
        yield "needs a password"
    finally:
        admin.config_set("requirepass", "")


@contextlib.contextmanager
def user_deleted(server: RedisServer, admin: Any) -> Iterator[str]:
    admin.acl_deluser("locks")
    yield "refuses the user or password"


@contextlib.contextmanager
def rights_taken_away(server: RedisServer, admin: Any) -> Iterator[str]:
    admin.execute_command("ACL", "SETUSER", "locks", "-set")
    yield "may not use it for a lock"


@pytest.mark.parametrize("trouble", [another_password, user_deleted, rights_taken_away])
def test_what_a_redis_server_will_not_do_is_said_at_once_also_to_a_waiter(
    own_redis: RedisServer, admin: Any, trouble: Callable[..., Any]
) -> None:
    url = own_redis.url
    if trouble is not another_password:
        url = own_redis.create_user("locks", "hunter2", "~*", "+@all")
    with waiting(RedisLock(url, guard=False)) as scene:
        with trouble(own_redis, admin) as says:
            assert_refused(scene, says)
        own_redis.create_user("locks", "hunter2", "~*", "+@all")
        wait_until(lambda: is_confirmed(scene.lease))


@pytest.mark.parametrize(
    ("said", "kind", "says"),
    [
        ("ERR Error running script (call to f_1): @user_script:9: @user_script: 9: -OOM command "
         "not allowed when used memory > 'maxmemory'.", "Unavailable", "no writes just now"),
        ("ERR Error running script (call to f_1): @user_script:9: @user_script: 9: -READONLY You "
         "can't write against a read only replica.", "Unavailable", "read-only replica"),
        ("ERR Error running script (call to f_1): @user_script:9: @user_script: 9: The user "
         "executing the script can't access at least one of the keys mentioned in the command "
         "arguments", "NoPermission", "It needs:"),
        ("ERR ACL failure in script: User locks has no permissions to run the 'set' command "
         "script: 1, on @user_script:9.", "NoPermission", "It needs:"),
        ("MOVED 7186 127.0.0.1:30001", "InfrastructureError", "Redis Cluster"),
        ("CLUSTERDOWN Hash slot not served", "InfrastructureError", "Redis Cluster"),
        ("LOADING Redis is loading the dataset in memory", "Unavailable", "still loading"),
        ("MASTERDOWN Link with MASTER is down", "Unavailable", "no writes just now"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "Unavailable", "just now"),
    ],
)  # fmt: skip
def test_the_same_error_of_redis_is_known_in_the_words_of_each_version(
    said: str, kind: str, says: str
) -> None:
    """As redis-py passes them on: some without the first word, some as a kind of another one."""
    from redis.connection import DefaultParser

    from orchard_infra.locks import redis_server

    error = DefaultParser.parse_error(said)
    explained = redis_server._explain(error, "redis://127.0.0.1/0")
    assert type(explained).__name__ == kind
    assert says in str(explained)


def test_a_missing_password_is_named_also_where_the_question_was_too_long_to_be_heard() -> None:
    """Redis hangs up on who says more than 16 kB without a password."""
    with RedisServer(password="hunter2") as server:
        lock = RedisLock(server.url.replace(":hunter2@", ""), guard=False)
        with pytest.raises(InfrastructureError, match="needs a password"):
            try_for(lock, some_key(), argv=("python", *["x" * 8000] * 4))


def test_a_line_that_breaks_before_the_first_answer_is_made_again(own_redis: RedisServer) -> None:
    """As a proxy breaks it that has found another server meanwhile."""
    with breaking_once((own_redis.address, own_redis.port)) as address:
        lease = take(RedisLock(f"redis://{address}/0", guard=False), some_key())
        lease.verify()
        lease.release()


@contextlib.contextmanager
def breaking_once(target: tuple[str, int]) -> Iterator[str]:
    """Passes all on to a server, but hangs up at the first question for a lock."""
    listener = socket.create_server(("127.0.0.1", 0))
    has_broken = False

    def pass_on(client: socket.socket) -> None:
        nonlocal has_broken
        with client, socket.create_connection(target) as server:
            while data := client.recv(65536):
                if b"EVAL" in data and not has_broken:
                    has_broken = True
                    return
                server.sendall(data)
                client.sendall(server.recv(65536))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                pass_on(listener.accept()[0])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        assert has_broken
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_a_first_answer_has_more_time_than_a_renewal_with_a_short_ttl(
    own_redis: RedisServer, admin: Any
) -> None:
    lock = RedisLock(own_redis.url, ttl=1, renew=0.1, guard=False)
    admin.execute_command("CLIENT", "PAUSE", round(3000 * lock.patience))
    take(lock, some_key()).release()


def test_an_impossible_name_of_a_host_is_one_clear_error() -> None:
    host = f"{'a' * 70}.example"
    for url in (f"redis://:hunter2@{host}/0", f"postgresql://ada:hunter2@{host}/locks"):
        with pytest.raises(InfrastructureError, match=r"cannot (reach|connect to)") as caught:
            try_for(lock_from_url(url), some_key())
        assert "hunter2" not in str(caught.value)


# PostgreSQL.


@attrs.frozen
class Site:
    """A database of its own with a role of its own, which may do what a lock needs."""

    server: PostgresServer
    database: str
    role: str
    admission: str  # what pg_hba.conf says without us

    def lock(self, **settings: Any) -> PostgresLock:
        url = self.server.url_of(self.role, "hunter2", self.database)
        # Somebody's transaction does not hold up the test for three seconds.
        return PostgresLock(f"{url}?options=-c%20lock_timeout%3D100", **{"grace": 60, **settings})

    def execute(self, sql: str) -> str:
        return self.server.execute(sql, database=self.database)

    def disconnect(self) -> None:
        self.server.execute(
            "SELECT count(pg_terminate_backend(pid, 60000)) FROM pg_stat_activity "
            f"WHERE usename = '{self.role}'"
        )

    def admit(self, method: str) -> None:
        """How the role proves itself; empty is as the server had it before."""
        ours = f"host all {self.role} 0.0.0.0/0 {method}"
        self._load([ours, self.admission] if method else [self.admission])

    def _load(self, admission: list[str]) -> None:
        self.server._write("pg_hba.conf", admission)
        before = self.server.execute("SELECT pg_conf_load_time()")
        self.server.execute("SELECT pg_reload_conf()")
        wait_until(lambda: self.server.execute("SELECT pg_conf_load_time()") != before)


@pytest.fixture
def site(postgres: PostgresServer) -> Iterator[Site]:
    name = f"r{uuid.uuid4().hex[:12]}"
    postgres.create_database(name)
    postgres.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'hunter2'")
    postgres.execute("GRANT ALL ON SCHEMA public TO PUBLIC", database=name)
    admission = (postgres.directory / "data" / "pg_hba.conf").read_text("utf-8")
    site = Site(postgres, name, name, admission)
    yield site
    if (postgres.directory / "data" / "pg_hba.conf").read_text("utf-8") != admission:
        site.admit("")
    postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")
    postgres.execute(f"DROP ROLE {name}")


@contextlib.contextmanager
def too_many_connections(site: Site) -> Iterator[str]:
    site.execute(f"ALTER ROLE {site.role} CONNECTION LIMIT 0")
    site.disconnect()
    try:
        yield "too many connections"
    finally:
        site.execute(f"ALTER ROLE {site.role} CONNECTION LIMIT -1")


@contextlib.contextmanager
def table_locked(site: Site) -> Iterator[str]:
    import psycopg

    with psycopg.connect(site.server.url_of(site.role, "hunter2", site.database)) as other:
        other.execute("LOCK TABLE orchard_infra_locks")
        yield "somebody's transaction keeps"


@contextlib.contextmanager
def read_only(site: Site) -> Iterator[str]:
    site.execute(f"ALTER ROLE {site.role} SET default_transaction_read_only = on")
    site.disconnect()
    try:
        yield "is read-only"
    finally:
        site.execute(f"ALTER ROLE {site.role} RESET ALL")
        site.disconnect()


@pytest.mark.parametrize("trouble", [too_many_connections, table_locked, read_only])
def test_a_postgresql_server_that_cannot_just_now_is_waited_for_by_whom_it_has_answered(
    site: Site, trouble: Callable[..., Any]
) -> None:
    with waiting(site.lock()) as scene:
        with trouble(site) as says:
            assert_waited_for(scene, says)
        assert_passed(scene)


@contextlib.contextmanager
def rejected(site: Site) -> Iterator[str]:
    site.admit("reject")
    site.disconnect()
    try:
        yield "pg_hba.conf rejects"
    finally:
        site.admit("")


@contextlib.contextmanager
def password_changed(site: Site) -> Iterator[str]:
    site.execute(f"ALTER ROLE {site.role} PASSWORD 'hunter2-new'")
    site.admit("scram-sha-256")
    site.disconnect()
    try:
        yield "authentication failed"
    finally:
        site.admit("")


@contextlib.contextmanager
def password_expired(site: Site) -> Iterator[str]:
    site.execute(f"ALTER ROLE {site.role} VALID UNTIL '2001-01-01'")
    site.admit("scram-sha-256")
    site.disconnect()
    try:
        yield "authentication failed"
    finally:
        site.admit("")


@contextlib.contextmanager
def login_forbidden(site: Site) -> Iterator[str]:
    site.execute(f"ALTER ROLE {site.role} NOLOGIN")
    site.disconnect()
    try:
        yield "not permitted to log in"
    finally:
        site.execute(f"ALTER ROLE {site.role} LOGIN")


@contextlib.contextmanager
def database_renamed(site: Site) -> Iterator[str]:
    site.server.execute(f"ALTER DATABASE {site.database} ALLOW_CONNECTIONS false")
    site.disconnect()
    site.server.execute(f"ALTER DATABASE {site.database} RENAME TO {site.database}_x")
    try:
        yield "does not exist"
    finally:
        site.server.execute(f"ALTER DATABASE {site.database}_x RENAME TO {site.database}")
        site.server.execute(f"ALTER DATABASE {site.database} ALLOW_CONNECTIONS true")


@contextlib.contextmanager
def revoked(site: Site) -> Iterator[str]:
    site.execute(f"REVOKE ALL ON orchard_infra_locks FROM {site.role}")
    try:
        yield "may not use the table"
    finally:
        site.execute(f"GRANT ALL ON orchard_infra_locks TO {site.role}")


@pytest.mark.parametrize(
    "trouble",
    [rejected, password_changed, password_expired, login_forbidden, database_renamed, revoked],
)
def test_what_a_postgresql_server_will_not_do_is_said_at_once_also_to_a_waiter(
    site: Site, trouble: Callable[..., Any]
) -> None:
    with waiting(site.lock()) as scene:
        with trouble(site) as says:
            assert_refused(scene, says)
        wait_until(lambda: is_confirmed(scene.lease))


def test_a_refusal_by_one_of_two_addresses_does_not_speak_for_the_other_one(site: Site) -> None:
    port = site.server.port
    url = f"postgresql://{site.role}@127.0.0.1:{port},127.0.0.1:1/none"
    with pytest.raises(postgres_server.Unreachable, match="cannot connect"):
        try_for(PostgresLock(url), some_key())


@pytest.mark.parametrize("trouble", [table_locked, revoked])
def test_a_table_that_cannot_be_read_does_not_cost_the_lock(
    site: Site, trouble: Callable[..., Any]
) -> None:
    lease = take(site.lock(grace=0.01), some_key())
    assert isinstance(lease, PostgresLease)
    fence = lease.fence
    with trouble(site):
        for _ in range(3):
            lease.verify()
            lease.renew()
        assert lease.fence == fence
    lease.verify()
    lease.release()


def test_a_server_that_answers_with_errors_only_costs_the_lock_when_the_grace_is_over(
    site: Site,
) -> None:
    key = some_key()
    lock = site.lock(grace=60)
    lease = take(lock, key)
    assert isinstance(lease, PostgresLease)
    site.execute("REVOKE SELECT ON pg_locks FROM PUBLIC")
    site.execute(f"REVOKE ALL ON orchard_infra_locks FROM {site.role}")
    with pytest.raises(LockSuspectError, match="permission denied"):
        lease.verify()
    assert lease.watched_fd >= 0  # the session is kept, and with it the lock
    lease._lock = attrs.evolve(lock, grace=0.001)
    with pytest.raises(LockLostError, match="permission denied"):
        wait_until(lambda: is_confirmed(lease))
    lease.release()


def test_a_renewal_that_the_server_refuses_is_told_once(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    url = own_redis.create_user("keeper", "hunter2", "~*", "+@all")
    lease = take(RedisLock(url, ttl=3600, renew=0.01, guard=False), some_key())
    tried, renew = [], RedisLease.renew

    def count(self: RedisLease) -> None:
        tried.append(caplog.text.count("nobody knows whether this run"))
        renew(self)

    monkeypatch.setattr(RedisLease, "renew", count)
    keeper = Keeper(lease, lambda error: None, logging.getLogger("Infrastructure"))
    keeper.start()
    own_redis.execute("ACL", "DELUSER", "keeper")
    wait_until(lambda: tried[-4:] == [1, 1, 1, 1])
    keeper.stop()
    assert "hunter2" not in caplog.text
    lease.release()
