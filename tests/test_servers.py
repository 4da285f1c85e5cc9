"""What the tests of the network locks stand on does what they count on: servers and hosts."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import hosts
from hosts import Network
from servers import PostgresServer, RedisServer
from support import is_running, require_module, run_python, wait_gone, wait_until

# Sends what it is told to whom it is told, and prints whatever arrives.
TALKER = """
    import socket, sys, threading
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as talker:
        talker.bind(("", 7000))
        def listen():
            while True:
                print("heard", talker.recv(100).decode(), flush=True)
        threading.Thread(target=listen, daemon=True).start()
        print("ready", flush=True)
        for line in sys.stdin:
            address, text = line.split()
            talker.sendto(text.encode(), (address, 7000))
            print("said", text, flush=True)
"""


@pytest.fixture(scope="module", params=[PostgresServer, RedisServer])
def server(request: pytest.FixtureRequest) -> Iterator[PostgresServer | RedisServer]:
    """A server that may be treated badly, as long as it runs again in the end."""
    reason = request.param.missing()
    if reason is not None:
        pytest.skip(reason)
    with request.param() as server:
        yield server


def write(server: PostgresServer | RedisServer) -> None:
    if isinstance(server, RedisServer):
        server.execute("SET", "it", "here")
    else:
        server.execute("DROP TABLE IF EXISTS t; CREATE TABLE t AS SELECT 'here' AS it")


def read(server: PostgresServer | RedisServer) -> str:
    if isinstance(server, RedisServer):
        return server.execute("GET", "it")
    return server.execute("SELECT CASE WHEN to_regclass('t') IS NULL THEN '' ELSE 'here' END")


def test_a_server_of_each_kind_answers(postgres: PostgresServer, redis_server: RedisServer) -> None:
    assert postgres.execute("SELECT 1 + 1") == "2"
    assert redis_server.execute("PING") == "PONG"


def test_a_shared_server_is_nobodys_child(server: PostgresServer | RedisServer) -> None:
    below = {process.pid for process in psutil.Process().children(recursive=True)}

    assert not below & set(server.processes), "the end of a test would stop it"


def test_a_restart_keeps_the_data_or_not_as_asked(server: PostgresServer | RedisServer) -> None:
    write(server)
    before = server.pid, server.url

    server.restart()
    assert read(server) == "here"
    server.restart(keep_data=False)
    assert read(server) == ""

    assert server.pid != before[0]
    assert server.url == before[1]
    assert not is_running(before[0])


def test_a_killed_server_comes_back_with_its_data(server: PostgresServer | RedisServer) -> None:
    write(server)
    pids = server.processes

    server.kill()
    assert not any(is_running(pid) for pid in pids)
    server.start()

    assert read(server) == "here"


def test_a_paused_server_answers_when_it_goes_on(
    server: PostgresServer | RedisServer, tmp_path: Path
) -> None:
    write(server)
    server.pause()
    try:
        states = {psutil.Process(pid).status() for pid in server.processes}
    finally:
        server.resume()

    assert states == {psutil.STATUS_STOPPED}
    assert read(server) == "here"


def test_a_password_and_an_encrypted_connection_are_asked_for() -> None:
    require_module("psycopg")
    require_module("redis")
    import psycopg
    import redis

    _skip_unless_possible()
    secret = "it's @ secret/"
    with PostgresServer(password=secret, tls=True) as postgres:
        with psycopg.connect(postgres.url) as connection:
            assert connection.pgconn.ssl_in_use
        poor = postgres.create_role("poor", "its own")
        with (
            psycopg.connect(poor) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute("CREATE TABLE t ()")
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(postgres.url_of("postgres", "wrong"))
        with pytest.raises(psycopg.OperationalError, match="no encryption"):
            psycopg.connect(postgres.url.partition("?")[0], sslmode="disable")
        assert secret not in _command_lines(postgres.processes)

    with RedisServer(password=secret, tls=True) as server:
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        poor = server.create_user("poor", "its own", "~*", "+get", "+client")
        with (
            redis.Redis.from_url(poor) as client,
            pytest.raises(redis.exceptions.NoPermissionError),
        ):
            client.set("a", "b")
        with pytest.raises(redis.exceptions.AuthenticationError):
            redis.Redis.from_url(server.url_of(None, "wrong")).ping()
        assert secret not in _command_lines(server.processes)


def test_a_replica_that_has_fallen_behind_lacks_the_latest(
    server: PostgresServer | RedisServer,
) -> None:
    server.restart(keep_data=False)
    replica = server.replica() if isinstance(server, RedisServer) else server.standby()
    with replica:
        replica.fall_behind()
        write(server)
        replica.promote()
        assert read(server) == "here"
        assert read(replica) == ""
        write(replica)
        assert read(replica) == "here"


def test_nothing_is_left_when_the_owner_is_killed(tmp_path: Path) -> None:
    _skip_unless_possible()
    if hosts.missing() is not None:
        pytest.skip(str(hosts.missing()))
    owner = run_python(
        tmp_path,
        """
        import sys
        from pathlib import Path
        sys.path[:0] = sys.argv[1:]
        from hosts import Network
        from servers import PostgresServer, RedisServer
        with Network(Path.cwd(), "one", "two") as network, PostgresServer() as postgres:
            with RedisServer(host=network["one"]) as redis:
                postgres.pause()  # one that is stopped does not end by itself
                inside = network["two"].run_command(["sleep", "1000"])
                print("pids", *postgres.processes, *redis.processes, inside.inner_pid)
                *_, segment, _ = (postgres.directory / "data/postmaster.pid").read_text().split()
                print("segment", segment)
                print("directories", postgres.directory, redis.directory)
                print("ready")
                input()
        """,
        str(Path(__file__).parent),
    )
    owner.wait_for("ready")
    pids = [int(pid) for pid in owner.wait_for("pids").split()[1:]]
    directories = [Path(name) for name in owner.wait_for("directories").split()[1:]]
    segment = owner.wait_for("segment").split()[1]
    assert segment in _segments()
    assert all(is_running(pid) for pid in pids)
    assert all(path.is_dir() for path in directories)

    owner.kill()

    wait_gone(pids)
    wait_until(lambda: not any(path.exists() for path in directories))
    wait_until(lambda: not list(directories[0].parent.glob(f"oi-server-{owner.pid}-*")))
    assert segment not in _segments()


def test_a_cut_cable_loses_packets_silently_in_the_directions_asked_for(network: Network) -> None:
    _, alpha, beta = network.hosts
    talkers = {host: host.run_python(TALKER) for host in (alpha, beta)}
    for talker in talkers.values():
        talker.wait_for("ready")

    def exchange(word: str) -> None:
        for host, other in ((alpha, beta), (beta, alpha)):
            talkers[host].tell(f"{other.address} {word}")
            talkers[host].wait_for(f"said {word}")  # so it was sent without an error

    for word, direction in (("first", "to"), ("second", "from"), ("third", "both")):
        network.cut(alpha, beta, direction)  # type: ignore[arg-type]
        exchange(word)
        network.heal()
    exchange("last")

    # What comes later on the same cable has not overtaken what was lost.
    for talker in talkers.values():
        talker.wait_for("heard last")
    heard = {
        host: [line for line in talker.output.splitlines() if line.startswith("heard")]
        for host, talker in talkers.items()
    }
    assert heard[beta] == ["heard second", "heard last"]
    assert heard[alpha] == ["heard first", "heard last"]


def test_a_slow_cable_takes_its_time_and_keeps_the_order(network: Network) -> None:
    _, alpha, beta = network.hosts
    talkers = {host: host.run_python(TALKER) for host in (alpha, beta)}
    for talker in talkers.values():
        talker.wait_for("ready")

    def time_for(word: str) -> float:
        began = time.monotonic()
        talkers[alpha].tell(f"{beta.address} {word}")
        talkers[beta].wait_for(f"heard {word}")
        return time.monotonic() - began

    with network.delay(alpha, beta, 0.3):
        assert time_for("slow") >= 0.3
        network.cut(alpha, beta, "to")
        for word in ("lost", "too"):
            talkers[alpha].tell(f"{beta.address} {word}")
            talkers[alpha].wait_for(f"said {word}")
        for word in ("one", "two"):
            talkers[beta].tell(f"{alpha.address} {word}")
        talkers[alpha].wait_for("heard two")  # by then the others have arrived, too
        assert "heard one\nheard two" in talkers[alpha].output
        network.heal()
    words = (f"word-{number}" for number in itertools.count())
    wait_until(lambda: time_for(next(words)) < 0.3)
    assert "lost" not in talkers[beta].output


def test_a_server_on_a_host_is_reached_from_the_others(network: Network) -> None:
    require_module("redis")
    if RedisServer.missing() is not None:
        pytest.skip(str(RedisServer.missing()))
    server, alpha, _ = network.hosts
    ask = "import redis, sys; print(redis.Redis.from_url(sys.argv[1]).client_info()['addr'])"
    with RedisServer(host=server) as redis_server:
        there = alpha.run_command([sys.executable, "-c", ask, redis_server.url])
        assert there.finish() == 0, there.transcript()
        assert there.output.startswith(f"{alpha.address}:")
        assert redis_server.execute("PING") == "PONG"


def test_hosts_are_different_machines_to_what_runs_on_them(network: Network) -> None:
    source = """
        import os, socket
        print(socket.gethostname(), open("/proc/sys/kernel/random/boot_id").read().strip(),
              os.readlink("/proc/self/ns/pid"), os.environ["ORCHARD_INFRA_DIR"],
              os.stat("/dev/shm").st_dev)
    """
    scripts = [host.run_python(source) for host in network.hosts]
    assert [script.finish() for script in scripts] == [0, 0, 0]

    facts = [script.output.split() for script in scripts]
    assert [names[0] for names in facts] == ["server", "alpha", "beta"]
    for of_each in zip(*facts, strict=True):
        assert len(set(of_each)) == 3


def test_a_process_on_a_host_gets_its_signals(network: Network) -> None:
    _, alpha, _ = network.hosts
    script = alpha.run_python("print('ready'); input()")
    script.wait_for("ready")

    script.send_signal(signal.SIGSTOP)
    inner = psutil.Process(script.inner_pid)
    wait_until(lambda: inner.status() == psutil.STATUS_STOPPED)
    script.send_signal(signal.SIGCONT)
    wait_until(lambda: inner.status() != psutil.STATUS_STOPPED)
    script.terminate()

    assert script.finish() == -signal.SIGTERM


def test_a_power_failure_ends_a_host_with_all_its_processes(network: Network) -> None:
    _, alpha, beta = network.hosts
    on_alpha, on_beta = (host.run_command(["cat"]) for host in (alpha, beta))
    pids = [on_alpha.inner_pid, on_beta.inner_pid]

    alpha.power_off()

    assert on_alpha.finish() == -signal.SIGKILL
    assert [is_running(pid) for pid in pids] == [False, True]


def _skip_unless_possible() -> None:
    for kind in (PostgresServer, RedisServer):
        reason = kind.missing()
        if reason is not None:
            pytest.skip(reason)


def _command_lines(pids: list[int]) -> str:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # of a client that has gone
            found.append(Path(f"/proc/{pid}/cmdline").read_text())
    return "\n".join(found)


def _segments() -> list[str]:
    """The ids of the shared memory of System V."""
    return [line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
