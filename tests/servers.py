"""Real PostgreSQL and Redis servers for tests and benchmarks.

    with PostgresServer() as server:
        psycopg.connect(server.url)
        server.restart(keep_data=False)

Each has a directory and a port of its own, so that several can run side by side. It answers when
the block begins, and nothing is left when it ends, even if the owner is killed meanwhile. Tests
that do no harm to a server share one for each worker of pytest-xdist, the fixtures ``postgres``
and ``redis_server``; isolate them by `PostgresServer.create_database` or `RedisServer.database`.
Tests that stop, pause or empty a server start their own.

``host=`` puts a server on one of the hosts of tests/hosts.py.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import glob
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote

import psutil
import pytest

import keeping
from support import TEST_MARK, is_running, wait_gone, wait_until

if TYPE_CHECKING:
    from typing_extensions import Self

    from hosts import Host

_PATIENCE = 120.0  # seconds for a server to answer, or to end
# Below the ports that the kernel gives to outgoing connections: a restarted server finds its own
# port free again.
_PORTS = (10_000, 30_000)
PATH = os.pathsep.join(
    (
        *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True),
        os.environ.get("PATH", os.defpath),
        "/usr/sbin",
        "/sbin",
    )
)


def program(name: str) -> str | None:
    """Where a program is, also outside of PATH, where Debian keeps some; None where it is not."""
    return shutil.which(name, path=PATH)


class _Keeper:
    """The directory of a server, and the process that removes it when its owner is gone."""

    def __init__(self) -> None:
        # pytest's own temporary directories are closed to other users, and PostgreSQL is one.
        parent = next(
            path for path in (tempfile.gettempdir(), "/tmp", "/var/tmp") if _is_open_to_all(path)
        )
        self.directory = Path(tempfile.mkdtemp(prefix=f"oi-server-{os.getpid()}-", dir=parent))
        self.directory.chmod(0o755)
        environment = {**os.environ, "LC_ALL": "C", "PATH": PATH}
        environment.pop(TEST_MARK, None)  # it is not of one test
        owned = (str(os.getpid()), str(self.directory))
        process = subprocess.Popen(
            # A child of nobody: see tests/keeping.py.
            [*["setsid", "--fork"], sys.executable, *["-I", "-S"], keeping.__file__, *owned],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd="/",
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        if not self._stdout.readline():
            shutil.rmtree(self.directory)
            raise AssertionError("nobody watches over the server: tests/keeping.py did not start")
        process.wait()
        self._owner = os.getpid()
        atexit.register(self.close)

    def start(self, command: Sequence[str]) -> int:
        """Start a command in the directory; its pid. Its output goes to the file "log"."""
        self._stdin.write(json.dumps(list(command)).encode() + b"\n")
        self._stdin.flush()
        return int(self._stdout.readline())

    def close(self) -> None:
        if os.getpid() != self._owner:  # a forked child, which inherited the atexit function
            return
        atexit.unregister(self.close)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(b"null\n")
            self._stdin.flush()
        if self._stdout.readline() != b"gone\n":  # somebody has killed it
            keeping.clean_up(str(self.directory))
        self._stdin.close()
        self._stdout.close()


class _Server(ABC):
    """One server. The methods wait until what they ask for has happened."""

    name: ClassVar[str]
    programs: ClassVar[Sequence[str]]

    def __init__(
        self,
        *,
        host: Host | None = None,
        password: str | None = None,
        tls: bool = False,
        settings: Sequence[str] = (),
    ) -> None:
        self.host = host
        self.password = password
        self.tls = tls
        self.settings = settings
        self.address = "127.0.0.1" if host is None else host.address
        self.port = 0
        self.pid = 0
        self._secrets: set[str] = set()

    @classmethod
    def missing(cls) -> str | None:
        """Why no such server can be started here; None where one can."""
        if not hasattr(os, "pidfd_open") or not os.path.isdir("/proc/self"):
            return f"needs {cls.name} on Linux: not on this system"
        absent = [name for name in cls.programs if program(name) is None]
        if absent:
            return f"needs {cls.name} ({', '.join(absent)}): run scripts/install-test-servers"
        return None

    def __enter__(self) -> Self:
        self._keeper = _Keeper()
        try:
            self._prepare()
            for attempt in itertools.count():
                self.port = _some_port(self.address if self.host is None else None)
                try:
                    self.start()
                    break
                except AddressInUse:
                    if attempt == 10:
                        raise
        except BaseException:
            self._keeper.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._keeper.close()

    @property
    def directory(self) -> Path:
        """Everything of this server. It is gone when the block has ended."""
        return self._keeper.directory

    @property
    def log(self) -> str:
        """What the server has said so far."""
        try:
            return (self.directory / "log").read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    @property
    def certificate(self) -> Path:
        """Its certificate, which is also the authority to trust, where ``tls`` is on."""
        return self.directory / "server.crt"

    @property
    def processes(self) -> list[int]:
        """The pids of the server and of all its children; the server's own is the first."""
        pids = set(keeping.processes_in(str(self.directory)))
        if is_running(self.pid):
            # PostgreSQL leaves its directory for a moment when it starts.
            pids.add(self.pid)
        return sorted(pids, key=lambda pid: (pid != self.pid, pid))

    @property
    def cpu_time(self) -> float:
        """Seconds that it has computed so far, with its children that live."""
        total = 0.0
        for pid in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                total += times.user + times.system
                if pid == self.pid:
                    total += times.children_user + times.children_system
        return total

    def start(self) -> None:
        """Start it again after a `stop` or `kill`, with what is in its directory."""
        spoken = len(self.log)
        self.pid = self._keeper.start([*self._entering(), *self._command()])

        def answers() -> bool:
            if self._answers():
                return True
            if not is_running(self.pid):
                said = self.log[spoken:]
                if "in use" in said:
                    raise AddressInUse(said)
                raise AssertionError(f"{self.name} did not start:\n{said}")
            return False

        wait_until(answers, _PATIENCE, what=lambda: f"{self.name}:\n{self.log[spoken:][-4000:]}")

    def stop(self) -> None:
        """Stop it at once, as an administrator in a hurry does: clients are cut off."""
        self._signal_and_wait(signal.Signals[self._stop_signal])

    def kill(self) -> None:
        """Kill all its processes, as a power failure does. `start` brings it back."""
        self._signal_and_wait(signal.SIGKILL)

    def restart(self, *, keep_data: bool = True) -> None:
        """Stop it and start it on the same port, with its data or without."""
        self.stop()
        if not keep_data:
            self._empty()
        self.start()

    def pause(self) -> None:
        """Stop all its processes in their tracks: connections stay, nobody is answered."""

        def all_are_stopped() -> bool:
            # The server's own first: it makes no more children then. It may have made one since
            # its processes were listed, so this is asked until all are stopped.
            going = [pid for pid in self.processes if not _is_stopped(pid)]
            for pid in going:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            return not going

        wait_until(all_are_stopped)

    def resume(self) -> None:
        for pid in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    @abstractmethod
    def _prepare(self) -> None:
        """Make what is needed once, before the first start."""

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    @abstractmethod
    def _empty(self) -> None:
        """Remove the data of a server that is stopped."""

    _stop_signal: ClassVar[str]

    def _signal_and_wait(self, number: signal.Signals) -> None:
        pids = self.processes
        if is_running(self.pid):
            os.kill(self.pid, number)
            with contextlib.suppress(AssertionError):
                wait_gone([self.pid], timeout=10.0)
        # A child that is paused, or is about to notice that its parent has gone.
        keeping.kill_in(str(self.directory))
        wait_gone(pids)

    def _entering(self) -> list[str]:
        return [] if self.host is None else self.host.enter_network

    def _make_certificate(self) -> None:
        call(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
            " -subj /CN=test -keyout server.key -out server.crt",
            *("-addext", f"subjectAltName=IP:{self.address},DNS:localhost"),
            cwd=self.directory,
        )


class AddressInUse(Exception):
    """Another process has taken the port in the meantime."""


class PostgresServer(_Server):
    """PostgreSQL. Its superuser is "postgres", which needs a password where one is given.

    ``settings`` are lines of postgresql.conf, which count more than ours.
    """

    name = "PostgreSQL"
    programs = ("initdb", "postgres", "psql", "pg_basebackup", "setpriv", "setsid", "openssl")
    _stop_signal = "SIGQUIT"  # an "immediate" shutdown, see pg_ctl(1)
    _primary: PostgresServer | None = None

    @property
    def url(self) -> str:
        return self.url_of("postgres", self.password)

    def url_of(self, user: str, password: str | None = None, database: str = "postgres") -> str:
        """The URL for another user, or another database."""
        login = quote(user, safe="")
        if password is not None:
            login += ":" + quote(password, safe="")
        url = f"postgresql://{login}@{self.address}:{self.port}/{quote(database, safe='')}"
        if self.tls:
            certificate = quote(str(self.certificate), safe="/")
            url += f"?sslmode=verify-full&sslrootcert={certificate}"
        return url

    def create_database(self, name: str | None = None) -> str:
        """A new and empty database; the URL of it."""
        name = name or f"test_{secrets.token_hex(6)}"
        self.execute(f'CREATE DATABASE "{name}"')
        return self.url_of("postgres", self.password, name)

    def create_role(
        self,
        name: str,
        password: str | None = None,
        *,
        options: str = "",
        database: str = "postgres",
    ) -> str:
        """A role that may log in, and nothing else; its URL. ``options`` as in CREATE ROLE."""
        self.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC", database=database)
        with_password = "" if password is None else f" PASSWORD {_quoted(password)}"
        self.execute(f'CREATE ROLE "{name}" LOGIN{with_password} {options}')
        return self.url_of(name, password, database)

    def execute(self, sql: str, *, database: str = "postgres") -> str:
        """What psql prints, as the superuser, through a socket that no cut cable touches."""
        return call(
            "psql -XAtq -v ON_ERROR_STOP=1 -U postgres -f -",
            *("-h", str(self.directory), "-p", str(self.port), "-d", database),
            input=sql,
        )

    def disconnect_clients(self) -> int:
        """Close all connections of clients from the server's side; how many there were."""
        return int(
            self.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        )

    def standby(self, *, host: Host | None = None) -> PostgresServer:
        """An asynchronous streaming replica, to be entered as a context manager.

        It follows through a socket that no cut cable touches, until it is to `fall_behind`.
        """
        standby = PostgresServer(
            host=host or self.host, password=self.password, tls=self.tls, settings=self.settings
        )
        standby._primary = self
        return standby

    def fall_behind(self) -> None:
        """A standby: receive nothing more from its primary."""
        self.execute("ALTER SYSTEM SET primary_conninfo = ''")
        self.execute("SELECT pg_reload_conf()")
        wait_until(lambda: self.execute("SELECT count(*) FROM pg_stat_wal_receiver") == "0")

    def promote(self) -> None:
        """Make a primary of a standby."""
        assert self.execute("SELECT pg_promote(true, 30)") == "t", self.log

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _prepare(self) -> None:
        user = _postgres_user()
        if user is not None:
            # Unix sockets and keys, too, belong to the user that the server runs as.
            shutil.chown(self.directory, user)
        if self.tls:
            self._make_certificate()
            if user is not None:
                shutil.chown(self.directory / "server.key", user)
        self._fill()

    def _fill(self) -> None:
        if self._primary is None:
            _copy(_template() / "data", self._data)
        else:
            call(
                "pg_basebackup -U postgres -c fast -X stream --no-sync -R",
                *("-D", str(self._data)),
                *("-h", str(self._primary.directory), "-p", str(self._primary.port)),
                cwd=self.directory,
                lead=_as_postgres(),
            )
        method = "trust" if self.password is None else "scram-sha-256"
        host = "hostssl" if self.tls else "host"
        hba = ["local all all trust", "local replication all trust"]
        hba += [f"{host} {database} all 0.0.0.0/0 {method}" for database in ("all", "replication")]
        self._write("pg_hba.conf", hba)
        conf = [
            f"listen_addresses = '{self.address}'",
            f"unix_socket_directories = '{self.directory}'",
            # Nothing in /dev/shm, where a killed server would leave it.
            "dynamic_shared_memory_type = mmap",
            "shared_buffers = 16MB",
            "fsync = off",  # a killed server needs none, only a machine does that loses its power
            "autovacuum = off",
            "password_encryption = scram-sha-256",
        ]
        if self.tls:
            conf += ["ssl = on", f"ssl_cert_file = '{self.certificate}'"]
            conf += [f"ssl_key_file = '{self.directory / 'server.key'}'"]
        self._write("postgresql.conf", [*conf, *self.settings])

    def _write(self, name: str, lines: Sequence[str]) -> None:
        path = self._data / name
        path.write_text("\n".join(lines) + "\n", "utf-8")

    def start(self) -> None:
        super().start()
        if self.password is not None and self._primary is None:
            self.execute(f"ALTER ROLE postgres PASSWORD {_quoted(self.password)}")

    def _command(self) -> list[str]:
        postgres = program("postgres") or "postgres"
        return [*_as_postgres(), postgres, "-D", str(self._data), "-p", str(self.port)]

    def _answers(self) -> bool:
        # What pg_ctl(1) looks at: the pid is the first line and the state the eighth.
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return int(lines[0]) == self.pid and lines[7].strip() in ("ready", "standby")
        except (OSError, IndexError, ValueError):
            return False

    def _empty(self) -> None:
        shutil.rmtree(self._data)
        self._fill()


class RedisServer(_Server):
    """Redis, with an append-only file that is written before a command is answered. A killed server
    needs no fsync, only a machine does that loses its power.

    ``settings`` are lines of redis.conf, which count more than ours.
    """

    name = "Redis"
    programs = ("redis-server", "redis-cli", "setsid", "openssl")
    _stop_signal = "SIGTERM"
    _primary: RedisServer | None = None

    @property
    def url(self) -> str:
        return self.database(0)

    def database(self, number: int) -> str:
        """The URL of one of the 16 databases."""
        return self.url_of(None, self.password, number)

    def url_of(self, user: str | None, password: str | None = None, database: int = 0) -> str:
        """The URL for another user, see `create_user`."""
        login = ""
        if password is not None:
            login = f"{quote(user or '', safe='')}:{quote(password, safe='')}@"
        scheme = "rediss" if self.tls else "redis"
        url = f"{scheme}://{login}{self.address}:{self.port}/{database}"
        if self.tls:
            url += f"?ssl_ca_certs={quote(str(self.certificate), safe='/')}"
        return url

    def create_user(self, name: str, password: str, *rules: str) -> str:
        """A user that may do only what ``rules`` say, see ACL SETUSER; the URL for it."""
        self.execute("ACL", "SETUSER", name, "on", f">{password}", *rules)
        return self.url_of(name, password)

    def execute(self, *command: str) -> str:
        """What redis-cli prints, through a socket that no cut cable touches."""
        login = {} if self.password is None else {"REDISCLI_AUTH": self.password}
        socket_path = str(self.directory / "socket")
        return call("redis-cli -e --no-auth-warning -s", socket_path, *command, env=login)

    def disconnect_clients(self) -> int:
        """Close all connections of clients from the server's side; how many there were."""
        return int(self.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"))

    def replica(self, *, host: Host | None = None) -> RedisServer:
        """An asynchronous replica, to be entered as a context manager."""
        replica = RedisServer(
            host=host or self.host, password=self.password, tls=self.tls, settings=self.settings
        )
        replica._primary = self
        return replica

    def fall_behind(self) -> None:
        """A replica: receive nothing more from its primary."""
        self.execute("REPLICAOF", "127.0.0.1", "1")  # where nobody listens
        wait_until(lambda: "master_link_status:down" in self.execute("INFO", "replication"))

    def promote(self) -> None:
        """Make a primary of a replica."""
        self.execute("REPLICAOF", "NO", "ONE")

    def _prepare(self) -> None:
        if self.tls:
            self._make_certificate()

    def _command(self) -> list[str]:
        # A file, because passwords in a command line can be read by everybody.
        conf = self.directory / "redis.conf"
        conf.touch(0o600)
        port = [f"port {self.port}"]
        if self.tls:
            authority = (self._primary or self).certificate
            port = ["port 0", f"tls-port {self.port}", "tls-auth-clients no", "tls-replication yes"]
            port += [f"tls-cert-file {self.certificate}", f"tls-ca-cert-file {authority}"]
            port += [f"tls-key-file {self.directory / 'server.key'}"]
        lines = [
            f"bind {self.address}",
            *port,
            f"unixsocket {self.directory / 'socket'}",
            f"dir {self.directory}",
            'save ""',
            "appendonly yes",
            "appendfsync no",
            "protected-mode no",
            "repl-diskless-sync-delay 0",
            "maxmemory-policy noeviction",
        ]
        if self.password is not None:
            lines += [f'requirepass "{self.password}"', f'masterauth "{self.password}"']
        if self._primary is not None:
            lines.append(f"replicaof {self._primary.address} {self._primary.port}")
        conf.write_text("\n".join([*lines, *self.settings]) + "\n", "utf-8")
        return ["redis-server", str(conf)]

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_PATIENCE)
                connection.connect(str(self.directory / "socket"))
                connection.sendall(b"PING\r\n")
                answer = connection.recv(100)
        except OSError:
            return False
        if not answer.startswith((b"+PONG", b"-NOAUTH")):  # not "-LOADING"
            return False
        return self._primary is None or "master_link_status:up" in self.execute(
            "INFO", "replication"
        )

    def _empty(self) -> None:
        shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)
        for path in self.directory.glob("*.[ar]*[fb]"):
            if path.suffix in (".aof", ".rdb"):
                path.unlink()


def call(
    command: str,
    *arguments: str,
    lead: Sequence[str] = (),
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",
) -> str:
    """What a command prints; ``arguments`` follow the words of it. `AssertionError` if it fails."""
    done = subprocess.run(
        [*lead, *command.split(), *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": PATH, "LC_ALL": "C", **(env or {})},
        input=input,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return True


def _is_open_to_all(path: str) -> bool:
    try:
        return all(os.stat(part).st_mode & 0o001 for part in (Path(path), *Path(path).parents))
    except OSError:
        return False


def _some_port(address: str | None) -> int:
    """A port that was free a moment ago; on another host, any."""
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        if address is None:
            return port
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port


def _postgres_user() -> str | None:
    """Who runs PostgreSQL, which refuses to be run by root; None for the present user."""
    if os.geteuid() != 0:
        return None
    import pwd

    try:
        pwd.getpwnam("postgres")
    except KeyError:
        return "nobody"
    return "postgres"


def _as_postgres() -> list[str]:
    user = _postgres_user()
    if user is None:
        return []
    import pwd

    entry = pwd.getpwnam(user)
    return ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]


@functools.cache
def _template() -> Path:
    """A new cluster, made once in a process: copying it takes a tenth of the time."""
    keeper = _Keeper()
    user = _postgres_user()
    if user is not None:
        shutil.chown(keeper.directory, user)
    call(
        "initdb -U postgres -A trust -E UTF8 --locale=C --no-sync --no-instructions -D data",
        cwd=keeper.directory,
        lead=_as_postgres(),
    )
    return keeper.directory


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that the tests of a worker share: leave it as it was."""
    reason = PostgresServer.missing()
    if reason is not None:
        pytest.skip(reason)
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A Redis server that the tests of a worker share: leave it as it was."""
    reason = RedisServer.missing()
    if reason is not None:
        pytest.skip(reason)
    with RedisServer() as server:
        yield server
