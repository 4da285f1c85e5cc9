"""A lock on a PostgreSQL server that does well: keys, fences, privileges, errors, interrupts."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import attrs
import pytest

from orchard_infra import (
    ConfigurationError,
    Held,
    InfrastructureError,
    InfrastructureManager,
    LockKey,
    LockLostError,
    LockSuspectError,
    PostgresLock,
    managed_environment,
)
from orchard_infra.locks import postgres_server
from orchard_infra.locks.base import ServerLock
from orchard_infra.locks.postgres import PostgresLease
from orchard_infra.runs.record import describe_this_run
from orchard_infra.system.masking import uninterrupted
from servers import PostgresServer, _as_postgres, _some_port, program
from support import require_module, run_command, run_python, wait_until

require_module("psycopg")
PASSWORD = "s3cret/p@ss:word"


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    """The URL of a new and empty database."""
    return postgres.create_database()


def key_of(project: str = "digits") -> LockKey:
    return LockKey(project, Path("not used"))


def take(lock: PostgresLock, key: LockKey | None = None) -> PostgresLease:
    lease = lock.try_acquire(key or key_of(), describe_this_run((key or key_of()).project))
    assert isinstance(lease, PostgresLease), lease
    return lease


def database_of(url: str) -> str:
    return url.rpartition("/")[2]


def sessions(server: PostgresServer, url: str) -> int:
    """How many clients are connected to a database."""
    return int(
        server.execute(
            f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database_of(url)}'"
        )
    )


def test_it_compares_copies_pickles_and_does_not_show_its_url(url: str) -> None:
    # No other word of this test's command line, which the record of the run tells.
    lock = PostgresLock(f"{url}?password=hunter2", timeout=3)
    lease = take(PostgresLock(url))

    assert isinstance(lock, ServerLock)
    assert pickle.loads(pickle.dumps(lock)) == copy.deepcopy(lock) == lock
    assert lock != PostgresLock(url, timeout=3)
    assert "hunter2" not in repr(lock) + repr(lease)
    assert url not in repr(lock)
    assert copy.deepcopy(lease) is lease
    with pytest.raises(LockLostError, match="pickled copy"):
        pickle.loads(pickle.dumps(lease)).verify()
    lease.release()


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": -1},
        {"timeout": True},
        {"lock_key": ""},
        {"table": "a; DROP TABLE b"},
        {"table": "a.b.c"},
        {"grace": 0},
        {"poll": float("nan")},
        {"answer": 3601},
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PostgresLock(**wrong)


def test_the_url_comes_from_the_environment_or_from_a_file(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "url"
    file.write_text(f"{url}\n")
    with pytest.raises(ConfigurationError, match="ORCHARD_INFRA_LOCK_URL"):
        take(PostgresLock())

    monkeypatch.setenv("ORCHARD_INFRA_LOCK_URL", url)
    lease = take(PostgresLock())

    held = PostgresLock(f"file:{file}").try_acquire(key_of(), lease.record)
    assert isinstance(held, Held)
    lease.release()


def test_passwords_come_in_the_ways_of_libpq(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PostgresServer(password=PASSWORD) as server:
        without = server.url_of("postgres")
        address = f"127.0.0.1:{server.port}"
        escaped = PASSWORD.replace(":", "\\:")
        passfile = tmp_path / "pgpass"
        passfile.write_text(f"{address}:*:postgres:{escaped}\n")
        passfile.chmod(0o600)
        services = tmp_path / "services"
        services.write_text(
            f"[locks]\nhost=127.0.0.1\nport={server.port}\nuser=postgres\ndbname=postgres\n"
            f"password={PASSWORD}\n"
        )
        with pytest.raises(InfrastructureError, match="password"):
            take(PostgresLock(without))
        wrong = server.url_of("postgres", "wr0ng/p@ss:word")
        with pytest.raises(InfrastructureError, match="password authentication failed") as refused:
            take(PostgresLock(wrong))
        assert_hidden(refused.value, "wr0ng", wrong)

        take(PostgresLock(server.url)).release()
        with monkeypatch.context() as patch:
            patch.setenv("PGPASSFILE", str(passfile))
            take(PostgresLock(without)).release()
        with monkeypatch.context() as patch:
            patch.setenv("PGPASSWORD", PASSWORD)
            take(PostgresLock(without)).release()
        monkeypatch.setenv("PGSERVICEFILE", str(services))
        lock = PostgresLock("service=locks")
        take(lock).release()
        assert lock.describe(key_of()) == "digits at the PostgreSQL service locks"


def test_the_password_is_nowhere_to_be_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with PostgresServer(password=PASSWORD) as server:
        manager = InfrastructureManager(locker=PostgresLock(server.url))
        with managed_environment("digits", manager=manager) as env:
            record = repr(env.run) + repr(env)
            with (
                contextlib.suppress(InfrastructureError),
                managed_environment("digits", manager=manager),
            ):
                pass
        row = server.execute("SELECT * FROM orchard_infra_locks")
        said = server.log

    assert "waiting" not in caplog.text
    registered = [
        path.read_text() for path in Path(os.environ["ORCHARD_INFRA_DIR"]).rglob("*.json")
    ]
    for text in (record, row, said, caplog.text, *capfd.readouterr(), *registered):
        for secret in (PASSWORD, quote(PASSWORD, safe=""), PASSWORD.partition("/")[0]):
            assert secret not in text


def assert_hidden(error: BaseException, *secrets: str) -> None:
    """No secret in an error, in its causes and contexts, or in what is printed of them."""
    texts = ["".join(traceback.format_exception(error))]
    while error is not None:
        texts += [str(error), repr(error), repr(error.__dict__)]
        assert type(error).__module__.startswith("orchard_infra"), error
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    for secret in secrets:
        assert secret not in "\n".join(texts)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("postgresql://ada:hush@127.0.0.1:{port}/nowhere", "does not exist"),
        ("postgresql://ada:hush@127.0.0.1:1/locks", "refused"),
        ("postgresql://ada:hu/sh@127.0.0.1/locks", "cannot be read"),
        ("postgresql://ada:hu%zzsh@127.0.0.1/locks", "cannot be read"),
        ("postgresql://ada:hush@127.0.0.1/locks?hush", "cannot be read"),
        ("postgresql//ada:hush@127.0.0.1/locks", "cannot be read"),
        ("mysql://ada:hush@127.0.0.1/locks", "cannot be read"),
        ("host=127.0.0.1 port=1 password=hush", "refused"),
        ("postgresql://ada:hush@no-such-host.invalid/locks", "no-such-host.invalid"),
        ("postgresql://ada:hush@127.0.0.1:{port}/x?options=-c%20nothing%3D1", "nothing|not exist"),
        ("postgresql://ada:hush@127.0.0.1:{port}/x?sslmode=verify-full", "certificate|SSL"),
    ],
)
def test_an_address_that_is_wrong_is_one_clear_error(
    postgres: PostgresServer, wrong: str, sentence: str
) -> None:
    lock = PostgresLock(wrong.format(port=postgres.port))

    for ask in (lambda: take(lock), lambda: lock.holder_now(key_of()), lock.runs):
        with pytest.raises(InfrastructureError, match=sentence) as caught:
            ask()
        assert_hidden(caught.value, "hush", "sh@")
    assert "hu" not in lock.describe(key_of())


def test_nothing_is_started_where_the_lock_cannot_be_had(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = InfrastructureManager(locker=PostgresLock("postgresql://ada:hush@127.0.0.1:1/locks"))

    with (
        pytest.raises(InfrastructureError, match="cannot connect to postgresql://ada@"),
        managed_environment("digits", manager=manager),
    ):
        raise AssertionError("it was started")

    assert "hush" not in caplog.text


def test_a_server_that_never_answers_is_given_up_within_the_timeout_for_connections() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(InfrastructureError, match="timeout"):
            take(PostgresLock(f"postgresql://ada@127.0.0.1:{port}/locks?connect_timeout=2"))
        assert time.monotonic() - began < 20


def test_without_psycopg_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)

    with pytest.raises(ConfigurationError, match=r"pip install 'orchard-infra\[postgres\]'"):
        take(PostgresLock("postgresql://127.0.0.1/locks"))


def test_psycopg_is_loaded_only_when_a_lock_is_used(tmp_path: Path) -> None:
    script = run_python(
        tmp_path,
        """
        import sys
        from orchard_infra import PostgresLock
        print(PostgresLock("postgresql://127.0.0.1/locks"))
        assert "psycopg" not in sys.modules
        """,
    )
    assert script.finish() == 0, script.transcript()


def test_a_server_that_is_too_old_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_server, "_OLDEST", 990000)

    with pytest.raises(InfrastructureError, match=r"is PostgreSQL \d+: the lock needs 99 or later"):
        take(PostgresLock(url))


def test_a_server_that_does_not_know_our_settings_is_too_old() -> None:
    said = 'FATAL:  unrecognized configuration parameter "idle_session_timeout"'
    error = postgres_server._connection_error(Exception(said), "postgresql://db/", {})

    assert str(error) == "postgresql://db/ is too old: the lock needs 14 or later"


@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("tolerant", [True, False])
def test_a_pooler_that_shares_sessions_is_refused(
    postgres: PostgresServer, url: str, tmp_path: Path, mode: str, tolerant: bool
) -> None:
    pgbouncer = program("pgbouncer")
    if pgbouncer is None:
        pytest.skip("needs pgbouncer: run scripts/install-test-servers")
    port = _some_port("127.0.0.1")
    config = postgres.directory / f"pgbouncer-{port}.ini"
    config.write_text(
        f"[databases]\n* = host=127.0.0.1 port={postgres.port} user=postgres\n[pgbouncer]\n"
        f"listen_addr=127.0.0.1\nlisten_port={port}\nauth_type=any\nunix_socket_dir=\n"
        f"pool_mode={mode}\n" + ("ignore_startup_parameters=options\n" if tolerant else "")
    )
    pooler = run_command(tmp_path, [*_as_postgres(), pgbouncer, str(config)], cwd=Path("/"))
    through = url.replace(f":{postgres.port}/", f":{port}/")

    def refused() -> InfrastructureError:
        with pytest.raises(InfrastructureError) as caught:
            take(PostgresLock(through))
        return caught.value

    said = wait_until(
        lambda: "refused" not in (error := str(refused())) and error, what=pooler.transcript
    )
    assert "pooler" in said
    held = postgres.execute(
        "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database "
        f"WHERE locktype = 'advisory' AND datname = '{database_of(url)}'"
    )
    assert held == "0"
    pooler.stop()


def test_the_table_may_be_created_by_several_at_the_same_time(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [key_of(f"project {number}") for number in range(6)]
    together = threading.Barrier(len(keys))
    create = postgres_server.Session.create_table

    def create_together(session: postgres_server.Session) -> None:
        together.wait(60)
        create(session)

    monkeypatch.setattr(postgres_server.Session, "create_table", create_together)
    for lock in [PostgresLock(postgres.create_database()) for _ in range(3)]:
        with ThreadPoolExecutor(len(keys)) as pool:
            leases = list(pool.map(functools.partial(take, lock), keys))

        assert {record.project for record in lock.runs()} == {key.project for key in keys}
        for lease in leases:
            lease.release()


def test_a_role_that_may_not_create_tables_is_told_the_sql(postgres: PostgresServer) -> None:
    url = postgres.create_database()
    database = database_of(url)
    lock = PostgresLock(postgres.create_role(f"ada {database}", database=database))

    assert lock.holder_now(key_of()) is None
    assert lock.runs() == []
    with pytest.raises(InfrastructureError) as caught:
        take(lock)
    said = str(caught.value)
    assert f"the role ada {database} may not use the table orchard_infra_locks" in said
    sql = said.partition("run there: ")[2]
    postgres.execute(sql.rpartition("GRANT")[0], database=database)
    with pytest.raises(InfrastructureError, match="permission denied for table"):
        take(lock)
    postgres.execute(sql, database=database)

    lease = take(lock)
    lease.verify()
    lease.release()


def test_a_database_that_is_read_only_is_one_clear_error(url: str) -> None:
    take(PostgresLock(url)).release()
    read_only = f"{url}?options=-c%20default_transaction_read_only%3Don"

    with pytest.raises(InfrastructureError, match="is read-only, and the lock needs to write"):
        take(PostgresLock(read_only))


def test_a_table_of_something_else_is_not_touched(postgres: PostgresServer, url: str) -> None:
    database = database_of(url)
    postgres.execute("CREATE TABLE orchard_infra_locks AS SELECT 1 AS one", database=database)

    with pytest.raises(InfrastructureError, match="Use another table="):
        take(PostgresLock(url))
    postgres.execute("CREATE SCHEMA mine", database=database)
    take(PostgresLock(url, table="mine.locks")).release()

    assert postgres.execute("SELECT * FROM orchard_infra_locks", database=database) == "1"
    assert postgres.execute("SELECT count(*) FROM mine.locks", database=database) == "1"


def test_a_transaction_that_keeps_the_row_does_not_keep_us_waiting_for_ever(
    postgres: PostgresServer, url: str
) -> None:
    import psycopg

    lock = PostgresLock(f"{url}?options=-c%20lock_timeout%3D200")
    take(lock).release()
    with psycopg.connect(url) as other:
        other.execute("UPDATE orchard_infra_locks SET fence = fence")
        with pytest.raises(InfrastructureError, match="somebody's transaction keeps"):
            take(lock)
        other.rollback()

    take(lock).release()  # and the lock itself was not left held


@pytest.mark.parametrize(
    "name", ["", "a\0b", "\ud800", "ä\u202e", "x" * 4096, "%s {table} '; --", "𝄞\x1b[2J"]
)
def test_a_project_may_have_any_name(url: str, name: str) -> None:
    lock, key = PostgresLock(url), key_of(name)
    lease = lock.try_acquire(key, attrs.evolve(describe_this_run("p"), project=name))
    assert isinstance(lease, PostgresLease)

    assert [record.project for record in lock.runs()] == [name]
    assert lock.describe(key).isprintable()
    take(lock, key_of(f"{name}.")).release()
    held = lock.try_acquire(key, lease.record)
    assert isinstance(held, Held)
    assert held.holder is not None
    assert held.holder.project == name
    lease.release()


def test_a_lock_key_takes_the_place_of_the_project(url: str) -> None:
    lease = take(PostgresLock(url, lock_key="shared"), key_of("one"))

    other = PostgresLock(url, lock_key="shared")
    held = other.try_acquire(key_of("two"), describe_this_run("two"))
    assert isinstance(held, Held)
    assert held.holder is not None
    assert held.holder.run_id == lease.record.run_id
    take(PostgresLock(url), key_of("one")).release()
    lease.release()


def test_a_fence_never_goes_back(postgres: PostgresServer, url: str) -> None:
    lock, database = PostgresLock(url), database_of(url)

    def draw() -> int:
        lease = take(lock)
        lease.release()
        return lease.fence

    fences = [draw(), draw()]
    postgres.execute("TRUNCATE orchard_infra_locks", database=database)
    fences.append(draw())
    postgres.execute("DROP TABLE orchard_infra_locks", database=database)
    fences.append(draw())
    # The server's clock was ahead by a day, and was put right.
    postgres.execute("UPDATE orchard_infra_locks SET fence = fence + 86400000", database=database)
    fences += [draw(), draw()]

    assert fences == sorted(set(fences))
    assert fences[5] == fences[4] + 1
    # The database was restored from a backup.
    postgres.execute(f"UPDATE orchard_infra_locks SET fence = {fences[0]}", database=database)
    assert draw() > fences[3]
    assert abs(fences[0] / 1000 - time.time()) < 3600


def test_the_holder_is_told_now_and_afterwards(url: str) -> None:
    lock = PostgresLock(url)
    assert lock.holder(key_of()) is None
    lease = take(lock)

    held = lock.try_acquire(key_of(), describe_this_run("digits"))
    now, runs = lock.holder_now(key_of()), lock.runs()
    lease.release()

    assert isinstance(held, Held)
    assert held.holder == now
    assert list(runs) == [now]
    assert now == attrs.evolve(lease.record, environment=None, fence=lease.fence)
    assert lock.holder_now(key_of()) is None
    assert lock.holder(key_of()) == now
    assert list(lock.runs()) == []
    assert lock.is_shared(key_of())


def test_a_lock_that_another_program_has_is_not_ascribed_to_the_last_run(url: str) -> None:
    import psycopg

    lock = PostgresLock(url)
    take(lock).release()
    number = postgres_server.Names.of("digits").lock
    with psycopg.connect(url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [number])

        assert lock.try_acquire(key_of(), describe_this_run("digits")) == Held(None)
        assert lock.holder_now(key_of()) is None


def test_administrators_see_who_it_is_and_their_settings_count(
    postgres: PostgresServer, url: str
) -> None:
    def shown() -> str:
        return postgres.execute(
            "SELECT application_name FROM pg_stat_activity WHERE datname = "
            f"'{database_of(url)}' AND state = 'idle'"
        )

    def setting(lease: PostgresLease, name: str) -> str | None:
        assert lease._session is not None
        return lease._session._ask(f"SELECT setting FROM pg_settings WHERE name = '{name}'")[0][0]

    lease = take(PostgresLock(url), key_of("größe"))
    assert shown() == f"orchard_infra {os.getpid()}@{socket.gethostname()} gr\\xf6\\xdfe"
    assert setting(lease, "tcp_user_timeout") == "30000"
    assert setting(lease, "tcp_keepalives_idle") == "15"
    lease.release()
    wait_until(lambda: not shown())

    mine = "application_name=mine&options=-c%20tcp_user_timeout%3D9000"
    lease = take(PostgresLock(f"{url}?{mine}"))
    assert shown() == "mine"
    assert setting(lease, "tcp_user_timeout") == "9000"
    assert setting(lease, "tcp_keepalives_interval") == "5"
    lease.release()


def test_a_waiter_has_one_connection_and_the_lease_takes_it_over(
    postgres: PostgresServer, url: str
) -> None:
    lock, record = PostgresLock(url), describe_this_run("digits")
    holder = take(lock)

    with lock.connect() as waiter:
        backends = set()
        for _ in range(3):
            assert isinstance(waiter.try_acquire(key_of(), record), Held)
            assert waiter.holder_now(key_of()) is not None
            assert waiter._session is not None
            backends.add(waiter._session._backend)
        assert sessions(postgres, url) == 2
        holder.release()
        lease = waiter.try_acquire(key_of(), record)
    assert isinstance(lease, PostgresLease)
    assert lease._session is not None
    assert {lease._session._backend} == backends
    lease.verify()
    lease.release()
    wait_until(lambda: sessions(postgres, url) == 0)


def test_it_is_free_when_the_release_returns(url: str) -> None:
    lock, record = PostgresLock(url), describe_this_run("digits")
    for _ in range(20):
        lease = take(lock)
        with lock.connect() as waiter:
            assert isinstance(waiter.try_acquire(key_of(), record), Held)
            lease.release()
            lease = waiter.try_acquire(key_of(), record)  # type: ignore[assignment]
            assert isinstance(lease, PostgresLease)
        lease.release()


def test_verifying_and_renewing_at_the_same_time_is_safe(url: str) -> None:
    lease = take(PostgresLock(url))

    def ask(number: int) -> None:
        for _ in range(50):
            lease.verify() if number % 2 else lease.renew()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    lease.release()
    with pytest.raises(LockLostError, match="was released"):
        lease.verify()


def test_the_socket_does_not_reach_other_programs(url: str) -> None:
    lease = take(PostgresLock(url))

    assert lease.watched_fd >= 0
    assert not os.get_inheritable(lease.watched_fd)
    lease.release()
    assert lease.watched_fd == -1


def test_a_lock_that_is_lost_stops_the_run(postgres: PostgresServer, url: str) -> None:
    lock = PostgresLock(url, interval=0.1)
    with managed_environment("digits", manager=InfrastructureManager(locker=lock)) as env:
        fence = env.fence
        postgres.execute("UPDATE orchard_infra_locks SET fence = 1", database=database_of(url))
        wait_until(lambda: env.lock_lost)
        assert env.stop_requested is not None
        with pytest.raises(LockLostError, match=f"its fence is 1, and not {fence}"):
            env.ensure_held()
        with pytest.raises(LockLostError):
            env.fence


Line = tuple[str, int]


def lines_of(step: Callable[[], object], interrupt_at: Line | None = None) -> list[Line]:
    """Carry out ``step``; the lines of the lock that it went through, and none twice. A Ctrl-C
    comes before ``interrupt_at`` is reached for the first time.
    """
    lines: dict[Line, None] = {}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        path = frame.f_code.co_filename
        if not Path(path).name.startswith("postgres"):
            return None
        line = path, frame.f_lineno
        if event == "line" and line not in lines:
            lines[line] = None
            if line == interrupt_at:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(before)
    return list(lines)


def interrupted_at_every_line(step: Callable[[], object], undo: Callable[[], object]) -> int:
    """Carry out ``step`` once for each of its lines, with a Ctrl-C there, and ``undo`` each time;
    in how many of them it was raised.
    """
    raised = 0
    lines = lines_of(step)
    undo()
    for line in lines:
        try:
            lines_of(step, line)
        except KeyboardInterrupt:
            raised += 1
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        undo()
    return raised


def test_a_ctrl_c_at_any_line_of_taking_it_leaves_nothing(
    postgres: PostgresServer, url: str
) -> None:
    lock, other = PostgresLock(url), PostgresLock(url)
    taken: list[PostgresLease] = []
    take(lock).release()

    def take_it() -> None:
        with uninterrupted():  # as the loop that waits does
            taken.append(take(lock))

    def give_back() -> None:
        while taken:
            taken.pop().release()
        wait_until(lambda: other.holder_now(key_of()) is None)

    assert interrupted_at_every_line(take_it, give_back) > 50
    wait_until(lambda: sessions(postgres, url) == 0)


def test_a_ctrl_c_at_any_line_of_verifying_does_not_cost_the_lock(url: str) -> None:
    lease = take(PostgresLock(url))
    session = lease._session

    assert interrupted_at_every_line(lease.verify, lease.verify) > 20
    assert lease._session is session
    lease.release()


def test_a_ctrl_c_at_any_line_of_taking_it_back_only_delays_that(
    postgres: PostgresServer, url: str
) -> None:
    lock = PostgresLock(url, grace=60)
    lease = take(lock)

    def break_and_verify() -> None:
        with socket.socket(fileno=os.dup(lease.watched_fd)) as broken:
            broken.shutdown(socket.SHUT_RDWR)
        lease.verify()

    def is_confirmed() -> bool:
        with contextlib.suppress(LockSuspectError):
            lease.verify()
            return True
        return False

    def confirm() -> None:
        wait_until(is_confirmed)
        assert lease.interval == lock.interval

    assert interrupted_at_every_line(break_and_verify, confirm) > 50
    wait_until(lambda: sessions(postgres, url) == 1)
    held = lock.holder_now(key_of())
    assert held is not None
    assert held.fence == lease.fence
    lease.release()


def test_a_ctrl_c_at_any_line_of_the_release_frees_it_all_the_same(url: str) -> None:
    lock = PostgresLock(url)
    leases = [take(lock)]

    def take_again() -> None:
        leases[0].release()
        wait_until(lambda: lock.holder_now(key_of()) is None)
        leases[0] = take(lock)

    assert interrupted_at_every_line(lambda: leases[0].release(), take_again) > 20
    leases[0].release()


CONTENDER = """
    import sys
    from pathlib import Path
    from orchard_infra import LockKey, PostgresLock
    from orchard_infra.locks.acquiring import acquire
    from orchard_infra.runs.record import describe_this_run

    url, path = sys.argv[1:]
    lock = PostgresLock(url, timeout=None, poll=0.02)
    key = LockKey("digits", Path("not used"))
    record = describe_this_run("digits")
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(25):
        lease = acquire(lock, key, record)
        with open(path, "a+") as file:
            file.seek(0)
            before = file.read()
            file.write(f"{lease.fence} in\\n")
            file.flush()
            lease.verify()
            file.seek(0)
            assert file.read() == f"{before}{lease.fence} in\\n"
            file.write(f"{lease.fence} out\\n")
        lease.release()
"""


def test_of_many_that_contend_one_has_it_at_a_time(
    postgres: PostgresServer, url: str, tmp_path: Path
) -> None:
    path = tmp_path / "shared"
    path.touch()
    scripts = [run_python(tmp_path, CONTENDER, url, str(path)) for _ in range(8)]
    for script in scripts:
        script.wait_for("ready")
    for script in scripts:
        script.tell()
    for script in scripts:
        assert script.finish() == 0, script.transcript()

    lines = path.read_text().split("\n")[:-1]
    fences = [int(line.partition(" ")[0]) for line in lines[::2]]
    assert lines == [f"{fence} {way}" for fence in fences for way in ("in", "out")]
    assert fences == sorted(set(fences))
    assert len(fences) == 200
    wait_until(lambda: sessions(postgres, url) == 0)
