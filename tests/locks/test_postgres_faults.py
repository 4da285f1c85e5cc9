"""What becomes of a lock on a PostgreSQL server when something breaks: nobody has it twice."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hosts import Host, Network
from orchard_infra import (
    Environment,
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
from orchard_infra.locks.keeper import Keeper
from orchard_infra.locks.postgres import PostgresLease
from orchard_infra.runs.record import describe_this_run
from servers import PostgresServer
from support import Script, require_module, run_python, wait_until

require_module("psycopg")

KEY = LockKey("digits", Path("not used"))
# Short, so that the tests need not wait: suspect after 0.5 s, lost after 3 s at the latest. In
# `lock_at` the server has more time for an answer: it may be busy with other tests.
TIMES = "poll=0.05, interval=0.2, answer=0.5, grace=1.0"


def lock_at(url: str, grace: float = 1.0, answer: float = 30.0) -> PostgresLock:
    return PostgresLock(url, poll=0.05, interval=0.2, answer=answer, grace=grace)


def take(lock: PostgresLock) -> PostgresLease:
    lease = lock.try_acquire(KEY, describe_this_run("digits"))
    assert isinstance(lease, PostgresLease), lease
    return lease


def is_held(lock: PostgresLock) -> bool:
    return isinstance(lock.try_acquire(KEY, describe_this_run("digits")), Held)


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    """The URL of a new and empty database on the server that tests share."""
    return postgres.create_database()


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A server that these tests may stop, pause and empty."""
    reason = PostgresServer.missing()
    if reason is not None:
        pytest.skip(reason)
    with PostgresServer() as server:
        yield server


def end_sessions(server: PostgresServer, url: str) -> None:
    """Cut off all clients of a database."""
    server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = "
        f"'{url.rpartition('/')[2]}'"
    )


# Takes the lock, and then writes to a shared file for as long as it believes to hold it. With
# "ask" it makes sure before each line.
WRITER = f"""
    import os, sys, time
    from orchard_infra import InfrastructureManager, LockLostError, PostgresLock
    from orchard_infra import managed_environment

    url, path, name = sys.argv[1:]
    lock = PostgresLock(url, timeout=None, {TIMES})
    print("ready", flush=True)
    with managed_environment("digits", manager=InfrastructureManager(locker=lock)) as env:
        with open(path, "a") as file:
            file.write(f"{{env.fence}} {{name}}\\n")
        print("held", flush=True)
        while not env.lock_lost:
            with open(path, "a") as file:
                file.write(f"{{env.fence}} {{name}}\\n")
            time.sleep(0.01)
        print("lost", flush=True)
"""


def overlap(path: Path) -> int:
    """How many lines were written after one with a greater fence: by a holder of before."""
    greatest, late = 0, 0
    for line in path.read_text().splitlines():
        fence = int(line.partition(" ")[0])
        late += fence < greatest
        greatest = max(greatest, fence)
    return late


# The holder.


FORKER = f"""
    import multiprocessing, sys, time
    from orchard_infra import InfrastructureManager, PostgresLock, managed_environment

    lock = PostgresLock(sys.argv[1], {TIMES})
    with managed_environment("digits", manager=InfrastructureManager(locker=lock)):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        worker.start()
        print(f"worker {{worker.pid}}", flush=True)
        time.sleep(1000)
"""


@pytest.mark.parametrize("tls", [False, True])
def test_a_killed_holder_frees_it_although_a_forked_worker_lives(
    own_server: PostgresServer, tmp_path: Path, tls: bool
) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(PostgresServer(tls=True)) if tls else own_server
        url = server.create_database()
        holder = run_python(tmp_path, FORKER, url)
        worker = int(holder.wait_for("worker").split()[1])
        assert is_held(lock_at(url))

        holder.kill()
        wait_until(lambda: not is_held(lock_at(url)))
        os.kill(worker, 0)  # it lives


def test_a_fork_in_the_middle_of_connecting_has_no_part_in_the_lock(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, children = postgres_server._connect, []
    go_on, end = os.pipe()

    def connect_and_fork(*arguments: object) -> object:
        session = connect(*arguments)  # type: ignore[arg-type]
        if not children:
            # As if it had been forked before the session was known: it keeps its copy.
            file = postgres_server._sockets.pop(session._fd)
            pid = os.fork()
            if pid == 0:
                os.close(end)
                os.read(go_on, 1)
                os._exit(0)
            children.append(pid)
            postgres_server._sockets[session._fd] = file
        return session

    monkeypatch.setattr(postgres_server, "_connect", connect_and_fork)
    lease = take(lock_at(url))
    assert lease._session is not None
    fd = lease._session.fileno()
    os.close(fd)  # the end of this process, as the server sees it

    wait_until(lambda: lock_at(url).holder_now(KEY) is None)
    os.close(end)
    os.waitpid(children[0], 0)
    os.close(go_on)
    lease.release()


@pytest.mark.parametrize("tls", [False, True])
def test_a_forked_child_has_no_power_over_the_lock_and_does_it_no_harm(
    own_server: PostgresServer, tls: bool
) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(PostgresServer(tls=True)) if tls else own_server
        lock = lock_at(server.create_database())
        lease = take(lock)
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = "nothing"
            try:
                lease.verify()
            except LockLostError as error:
                said = str(error)
            lease.release()
            assert lease.watched_fd == -1
            lease._session = None  # closes it, when nobody else has it
            os.write(into, said.encode())
            os._exit(0)
        os.close(into)
        with os.fdopen(out) as answers:
            said = answers.read()
        os.waitpid(pid, 0)

        assert f"held by pid {os.getpid()}, from which this process was forked" in said
        lease.verify()
        assert lease._suspect_since is None
        assert is_held(lock)
        lease.release()
        assert not is_held(lock)


def test_a_holder_that_is_stopped_keeps_it(url: str, tmp_path: Path) -> None:
    path = tmp_path / "shared"
    holder = run_python(tmp_path, WRITER, url, str(path), "A")
    holder.wait_for("held")

    holder.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    while time.monotonic() - began < 3.0:  # longer than until it would be lost
        assert is_held(lock_at(url))
    holder.send_signal(signal.SIGCONT)
    wrote = path.stat().st_size
    wait_until(lambda: path.stat().st_size > wrote + 500)
    assert "lost" not in holder.output


@pytest.mark.parametrize("with_successor", [True, False])
def test_a_holder_that_was_cut_off_while_it_was_stopped_sees_it_at_its_first_question(
    postgres: PostgresServer, url: str, tmp_path: Path, with_successor: bool
) -> None:
    source = """
        import os, signal, sys
        from orchard_infra import InfrastructureManager, LockLostError, PostgresLock
        from orchard_infra import managed_environment

        lock = PostgresLock(sys.argv[1], interval=1000)
        with managed_environment("digits", manager=InfrastructureManager(locker=lock)) as env:
            print("held", flush=True)
            sys.stdin.readline()
            try:
                env.ensure_held()
                print("kept", flush=True)
            except LockLostError as error:
                print(f"lost: {error} {env.lock_lost}", flush=True)
    """
    holder = run_python(tmp_path, source, url)
    holder.wait_for("held")
    holder.send_signal(signal.SIGSTOP)
    end_sessions(postgres, url)
    if with_successor:
        wait_until(lambda: not is_held(lock_at(url)))  # it has it, and gives it back

    holder.tell()
    holder.send_signal(signal.SIGCONT)

    if with_successor:
        said = holder.wait_for("lost")
        assert "another run has taken it" in said
        assert said.endswith("True")
    else:
        holder.wait_for("kept")
    assert holder.finish() == 0, holder.transcript()


# The connection, and the server.


def test_a_connection_that_the_server_ends_is_taken_back(
    postgres: PostgresServer, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    lease = take(lock_at(url))
    keeper = Keeper(lease, pytest.fail, logging.getLogger())
    keeper.start()
    before = lease.watched_fd, lease._session

    end_sessions(postgres, url)

    wait_until(lambda: "was taken back" in caplog.text)
    keeper.stop()
    assert lease._session is not before[1]
    lease.verify()
    assert is_held(lock_at(url))
    held = lock_at(url).holder_now(KEY)
    assert held is not None
    assert held.fence == lease.fence
    lease.release()
    assert not is_held(lock_at(url))


def test_a_lock_that_another_run_took_meanwhile_is_lost_for_good(
    postgres: PostgresServer, url: str
) -> None:
    lock = lock_at(url)
    first = take(lock)
    end_sessions(postgres, url)
    second = take(lock)

    with pytest.raises(LockLostError, match="another run has taken it"):
        first.verify()
    second.release()
    for ask in (first.verify, first.renew, lambda: first.fence):
        with pytest.raises(LockLostError, match="another run has taken it"):
            ask()
    assert first.watched_fd == -1
    first.release()
    take(lock).release()


def test_a_session_that_the_server_still_has_is_ended_and_the_lock_taken_back(
    postgres: PostgresServer, url: str
) -> None:
    lease = take(lock_at(url, grace=60))
    assert lease._session is not None
    # The way there is broken; the server does not know.
    lease._session, kept = None, lease._session
    lease._suspect_since = postgres_server.now()

    wait_until(lambda: _is_confirmed(lease))
    assert lease._session is not kept
    lease.verify()
    assert is_held(lock_at(url))
    lease.release()


def test_a_table_that_was_emptied_or_dropped_does_not_cost_the_lock(
    postgres: PostgresServer, url: str
) -> None:
    lock = lock_at(url)
    lease = take(lock)
    for statement in ("TRUNCATE orchard_infra_locks", "DROP TABLE orchard_infra_locks"):
        postgres.execute(statement, database=url.rpartition("/")[2])
        lease.verify()
        held = lock.holder_now(KEY)
        assert held is not None
        assert (held.run_id, held.fence) == (lease.record.run_id, lease.fence)
    lease.release()


def test_a_socket_that_the_program_closed_is_replaced_and_a_strangers_file_left_alone(
    url: str, tmp_path: Path
) -> None:
    lease = take(lock_at(url, grace=60))
    fd = lease.watched_fd
    os.close(fd)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert file == fd
    theirs = os.fstat(file)

    wait_until(lambda: _is_confirmed(lease))

    assert os.fstat(file) == theirs
    os.close(file)
    lease.release()
    assert not is_held(lock_at(url))


def _is_confirmed(lease: PostgresLease) -> bool:
    with contextlib.suppress(LockSuspectError):
        lease.verify()
        return True
    return False


def test_a_restart_of_the_server_costs_neither_the_holder_nor_who_waits_anything(
    own_server: PostgresServer,
) -> None:
    url = own_server.create_database()
    lock = lock_at(url, grace=60)
    lease = take(lock)
    with lock.connect() as waiter, lock.connect() as rank:
        record = describe_this_run("digits")
        held = waiter.try_acquire(KEY, record)
        assert isinstance(held, Held)
        assert rank.holder_now(KEY) == rank.holder(KEY) == held.holder

        own_server.stop()
        away = waiter.try_acquire(KEY, record)
        assert isinstance(away, Held)
        assert away.holder == held.holder
        assert away.reason is not None
        assert "cannot connect" in away.reason
        assert rank.holder_now(KEY) is rank.holder(KEY) is None
        with pytest.raises(LockSuspectError, match="cannot be confirmed: cannot connect"):
            lease.verify()
        assert lease.interval == 0.2
        own_server.start()

        wait_until(lambda: _is_confirmed(lease))
        assert isinstance(waiter.try_acquire(KEY, record), Held)
        assert rank.holder_now(KEY) == held.holder
        lease.release()
        successor = waiter.try_acquire(KEY, record)
    assert isinstance(successor, PostgresLease)
    assert successor.fence > lease.fence
    successor.release()


def test_a_server_that_comes_back_empty_loses_the_lock_and_says_so(
    own_server: PostgresServer,
) -> None:
    lock = lock_at(own_server.url)
    lease = take(lock)

    own_server.restart(keep_data=False)

    with pytest.raises(LockLostError, match="has lost the record of this run"):
        lease.verify()
    successor = take(lock)
    assert successor.fence > lease._fence
    successor.release()


def test_a_server_that_is_away_for_too_long_costs_the_lock(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = lock_at(own_server.create_database(), grace=100)
    lease = take(lock)
    own_server.stop()
    try:
        with pytest.raises(LockSuspectError):
            lease.verify()
        now = postgres_server.now()
        # The time of day does not matter, but that for which the machine was suspended does.
        monkeypatch.setattr(time, "time", lambda: now + 1e6)
        with pytest.raises(LockSuspectError):
            lease.verify()
        monkeypatch.setattr(postgres_server, "now", lambda: now + 101)
        with pytest.raises(LockLostError, match="it cannot be confirmed: cannot connect"):
            lease.verify()
    finally:
        own_server.start()
    monkeypatch.undo()
    with pytest.raises(LockLostError):
        lease.verify()


def test_a_server_that_is_stopped_holds_up_nobody_for_long(
    own_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = own_server.create_database()
    lock = lock_at(f"{url}?connect_timeout=2", grace=60, answer=0.5)
    lease, other = take(lock), take(PostgresLock(url, lock_key="other"))
    own_server.pause()
    try:
        began = time.monotonic()
        with pytest.raises(LockSuspectError, match="cannot be confirmed"):
            lease.verify()
        threads = [threading.Thread(target=lease.release), threading.Thread(target=other.release)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert time.monotonic() - began < 30  # 6 s on a quiet machine
        # The one was suspect already, the other one was just about to find out.
        assert caplog.text.count("could not be given back") == 2
    finally:
        own_server.resume()
    wait_until(lambda: not is_held(lock))


def is_held_once(mended: Callable[[], object], env: Environment) -> None:
    """`ensure_held` waits until that is done, and then finds the lock held."""
    asked = threading.Thread(target=env.ensure_held)
    asked.start()
    asked.join(0.5)
    assert asked.is_alive()
    mended()
    asked.join(60)
    assert not asked.is_alive()
    assert not env.lock_lost


def test_a_short_pause_of_the_server_costs_nothing(own_server: PostgresServer) -> None:
    lock = PostgresLock(own_server.create_database(), interval=0.1, answer=60)
    with managed_environment("digits", manager=InfrastructureManager(locker=lock)) as env:
        own_server.pause()
        is_held_once(own_server.resume, env)


def test_a_pause_within_the_grace_does_not_hand_the_lock_to_a_waiter(
    own_server: PostgresServer,
) -> None:
    """The server goes on with the holder's session, which must be there then."""
    url = own_server.create_database()
    lock = PostgresLock(url, interval=0.1, answer=0.5, grace=60)
    lease = take(lock)
    waiter = PostgresLock(url, timeout=None, poll=0.05)
    stop = threading.Event()
    granted: list[object] = []

    def wait_for_it() -> None:
        with waiter.connect() as connected:
            while not stop.is_set() and not granted:
                with contextlib.suppress(InfrastructureError):
                    outcome = connected.try_acquire(KEY, describe_this_run("digits"))
                    if not isinstance(outcome, Held):
                        granted.append(outcome)
                        outcome.release()
                stop.wait(0.05)

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    try:
        own_server.pause()
        for _ in range(3):  # each of them gives up waiting for an answer
            with pytest.raises(LockSuspectError, match="does not answer"):
                lease.verify()
        own_server.resume()
        wait_until(lambda: _is_confirmed(lease))
        assert not granted
    finally:
        stop.set()
        thread.join(60)
        lease.release()


def _is_confirmed(lease: PostgresLease) -> bool:
    try:
        lease.verify()
    except LockSuspectError:
        return False
    return True


def test_a_checkpoint_waits_while_the_lock_is_suspect(own_server: PostgresServer) -> None:
    lock = lock_at(own_server.create_database(), grace=60)
    with managed_environment("digits", manager=InfrastructureManager(locker=lock)) as env:
        own_server.stop()
        is_held_once(own_server.start, env)


# Two servers.


@pytest.mark.parametrize("lags", [False, True])
def test_after_a_failover_it_is_taken_back_only_if_the_standby_knows_of_it(lags: bool) -> None:
    reason = PostgresServer.missing()
    if reason is not None:
        pytest.skip(reason)
    with PostgresServer() as primary, primary.standby() as standby:
        hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        lock = lock_at(
            f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write", 60
        )
        alone = lock_at(standby.url)
        take(lock).release()
        wait_until(lambda: alone_fence(standby) == alone_fence(primary))
        with pytest.raises(Exception, match="is a standby"):
            take(alone)
        if lags:
            standby.fall_behind()
        lease = take(lock)
        if not lags:
            wait_until(lambda: alone_fence(standby) == str(lease.fence))

        primary.kill()
        standby.promote()

        if lags:
            with pytest.raises(LockLostError, match="has lost the record of this run"):
                wait_until(lambda: _is_confirmed(lease))
            successor = take(lock)
            assert successor.fence > lease._fence
            successor.release()
        else:
            wait_until(lambda: _is_confirmed(lease))
            assert is_held(alone)
            lease.release()


def alone_fence(server: PostgresServer) -> str:
    with contextlib.suppress(AssertionError):
        return server.execute("SELECT max(fence) FROM orchard_infra_locks")
    return "no table yet"


# Cables that are cut.


@pytest.mark.slow
def test_of_two_hosts_with_a_cut_cable_one_has_it_at_a_time(
    network: Network, tmp_path: Path
) -> None:
    reason = PostgresServer.missing()
    if reason is not None:
        pytest.skip(reason)
    server, alpha, beta = network.hosts
    with PostgresServer(host=server) as database:
        scripts: dict[str, tuple[Script, Script, Path]] = {}
        # Each way the packets are dropped is a case of its own; they are played side by side.
        for host, direction in ((alpha, "to"), (beta, "from")):
            url, path = database.create_database(), tmp_path / direction
            holder = _writer(host, url, path, "A")
            holder.wait_for("held")
            waiter = _writer(server, url, path, "B")
            waiter.wait_for("ready")
            scripts[direction] = holder, waiter, path
        network.cut(alpha, server, "to")
        network.cut(beta, server, "from")

        for holder, waiter, path in scripts.values():
            holder.wait_for("lost")
            assert "B" not in path.read_text()
            waiter.wait_for("held")
            assert overlap(path) == 0
        network.heal()
        for _, waiter, path in scripts.values():
            wrote = path.stat().st_size
            wait_until(lambda path=path, wrote=wrote: path.stat().st_size > wrote + 500)
            assert overlap(path) == 0
            assert "lost" not in waiter.output


def _writer(host: Host, url: str, path: Path, name: str) -> Script:
    return host.run_python(WRITER, url, str(path), name)
