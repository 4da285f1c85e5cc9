"""What a lock asks a PostgreSQL server, on a connection of its own, and its errors in plain words.

psycopg makes the connection. What is asked then goes through psycopg's wrapper of libpq, because
there each wait can have an end: a server that is stopped, or a cable that is cut, must not hold up
the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from orchard_infra.errors import ConfigurationError, InfrastructureError
from orchard_infra.locks.urls import Secret, redacted
from orchard_infra.runs.record import RECORD_LIMIT
from orchard_infra.system import files
from orchard_infra.system.clock import now as now
from orchard_infra.system.masking import interruptible
from orchard_infra.system.text import printable

if TYPE_CHECKING:
    import psycopg

_DOMAIN = b"orchard_infra lock\0"  # no other program's advisory locks are ours
_OLDEST = 140000  # the first version with idle_session_timeout
CONNECT = 3  # seconds for a connection
_FORKS = 20  # connections that are given up because this process was forked meanwhile

# See "PostgreSQL Error Codes".
_PRIVILEGE = ("42501", "3F000")  # insufficient_privilege, invalid_schema_name
_NO_TABLE = "42P01"  # undefined_table
# duplicate_table, duplicate_object, unique_violation
_CREATED_MEANWHILE = ("42P07", "42710", "23505")
_READ_ONLY = "25006"  # read_only_sql_transaction
_ROW_IS_LOCKED = "55P03"  # lock_not_available
# Errors that may not come again: a cancelled statement, a deadlock, a server that is full.
_NOT_NOW = ("40", "53", "57014", _ROW_IS_LOCKED, _READ_ONLY)

# A server that refuses a connection says why by a number, but libpq passes on only its words. Where
# they are not English the refusal is taken for a server that is away, of which one tires.
_REFUSALS = re.compile(
    "|".join(
        (
            "authentication failed",
            "no password supplied",
            r"no pg_hba\.conf entry",
            r"pg_hba\.conf rejects",
            "not permitted to log in",
            "permission denied",
            "(?:database|role) .* does not exist",
            "not currently accepting connections",
            "configuration parameter",
            "value for parameter",
            "does not support SSL",
            "certificate",
        )
    )
)

_CREATE = """CREATE TABLE IF NOT EXISTS {table} (key text PRIMARY KEY, project text NOT NULL, \
lock bigint NOT NULL, fence bigint NOT NULL, backend integer NOT NULL, since timestamptz NOT NULL, \
owner text NOT NULL)"""
_GRANT = "GRANT SELECT, INSERT, UPDATE ON {table} TO {role}"

# A pooler may send each statement to another backend. There the lock would be held for ever.
_LOCK = """
SELECT CASE WHEN pg_backend_pid() = $2::integer THEN pg_try_advisory_lock($1::bigint) END AS got
"""
# Lock and sign in one round trip. The time keeps a fence from going back when somebody has emptied
# the table.
_LOCK_AND_SIGN = f"""
WITH tried AS MATERIALIZED ({_LOCK}), signed AS (
    INSERT INTO {{table}} AS l (lock, backend, key, project, fence, since, owner)
    SELECT $1::bigint, $2::integer, $3::text, $4::text,
        floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint, clock_timestamp(), $5::text
    FROM tried WHERE got
    ON CONFLICT (key) DO UPDATE SET fence = greatest(l.fence + 1, excluded.fence),
        lock = excluded.lock, backend = excluded.backend, project = excluded.project,
        since = excluded.since, owner = excluded.owner
    RETURNING fence
)
SELECT got, (SELECT fence FROM signed) FROM tried
"""
_UNLOCK = "SELECT pg_advisory_unlock($1::bigint)"

# Whether row p of pg_locks is the advisory lock {lock}, see "pg_locks".
_IS_LOCK = """p.locktype = 'advisory' AND p.objsubid = 1 AND p.granted
    AND p.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (p.classid::bigint << 32 | p.objid::bigint) = {lock}"""
# The session that has signed row l has the lock.
_IS_HELD = f"p.pid = l.backend AND {_IS_LOCK.format(lock='l.lock')}"

# Whoever may write to the table may put a gigabyte there. What is longer than that is no record.
_OWNER = f"left(l.owner, {RECORD_LIMIT + 1})"
_HOLDER = f"""
SELECT {_OWNER}, l.fence, EXISTS (SELECT FROM pg_locks p WHERE {_IS_HELD})
FROM {{table}} l WHERE l.key = $1::text
"""
_HOLDERS = f"""
SELECT {_OWNER}, l.fence FROM {{table}} l JOIN pg_locks p ON {_IS_HELD} ORDER BY l.since
"""
_HAS_LOCK = f"""
SELECT EXISTS (
    SELECT FROM pg_locks p WHERE p.pid = pg_backend_pid() AND p.pid = $2::integer
    AND {_IS_LOCK.format(lock="$1::bigint")}
)"""
_CHECK = _HAS_LOCK + ", (SELECT fence FROM {table} WHERE key = $3::text)"
_SIGN_AGAIN = """
INSERT INTO {table} (lock, backend, key, project, fence, since, owner)
VALUES ($1::bigint, $2::integer, $3::text, $4::text, $5::bigint, clock_timestamp(), $6::text)
ON CONFLICT (key) DO NOTHING
"""
_TAKE_OVER = """
UPDATE {table} SET backend = $3::integer WHERE key = $1::text AND fence = $2::bigint RETURNING fence
"""
_FENCE = "SELECT fence FROM {table} WHERE key = $1::text"
_END_HOLDER = f"""
SELECT pg_terminate_backend(p.pid) FROM {{table}} l JOIN pg_locks p ON {_IS_HELD}
WHERE l.key = $1::text AND l.fence = $2::bigint AND p.pid <> pg_backend_pid()
"""


@attrs.frozen
class Names:
    """What stands for a lock on the server: its number, the key of its row, a name to read."""

    lock: int
    key: str
    shown: str

    @classmethod
    def of(cls, name: str) -> Names:
        digest = hashlib.sha256(_DOMAIN + name.encode("utf-8", "surrogatepass")).digest()
        # ASCII, because the database may have any encoding.
        shown = json.dumps(printable(name))[1:-1][:200]
        return cls(int.from_bytes(digest[:8], "big", signed=True), digest.hex(), shown)


class Unavailable(InfrastructureError):
    """The server may answer the same question later."""


class Unreachable(Unavailable):
    """The server cannot be reached, or does not answer."""


class Silent(Unreachable):
    """It has not answered in time, and may only be slow: the connection is still there."""


class Refused(InfrastructureError):
    """The server reports an error. ``sqlstate`` says which."""

    def __init__(self, message: str, sqlstate: str = "") -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class NotNow(Refused, Unavailable):
    """It is full, read-only for a while, or somebody has the table locked."""


# Sockets of our sessions, each with its device and inode: libpq may have closed one by itself.
_sockets: dict[int, tuple[int, int]] = {}
_forks = 0  # of this process, so far
_abandoned: list[object] = []  # connections of libpq whose socket this program has closed


def connect(
    url: str, *, table: str, silence: float, answer: float, within: float | None = None, name: str
) -> Session:
    """A session on the server. It is closed when it is dropped.

    The server ends it after ``silence`` seconds without a sign of life. ``answer`` is how long to
    wait for each answer, and ``within`` for the connection, where the URL does not matter.
    ``name`` is for administrators, who see it in pg_stat_activity.

    Raises:
        InfrastructureError: There is none to be had, or none that could hold a lock.
    """
    given = parse(url)
    settings = _settings(given, silence, name)
    if within is not None:
        settings["connect_timeout"] = str(max(2, round(within)))
    for _ in range(_FORKS):
        forks = _forks
        session = _connect(settings, shown(given), table, answer)
        if forks == _forks:
            try:
                session.refuse_unsuitable()
            except BaseException:
                session.close()
                raise
            return session
        # A child that was forked meanwhile has the socket, and would keep the lock alive. After
        # the goodbye to the server that socket is worth nothing.
        session.close()
    raise InfrastructureError(
        f"cannot connect to {shown(given)}: this program forked {_FORKS} times meanwhile"
    )


def _connect(settings: Mapping[str, str], where: str, table: str, answer: float) -> Session:
    psycopg = import_psycopg()
    failure: InfrastructureError
    connection: Any = None
    try:
        with interruptible():
            connection = psycopg.connect(autocommit=True, prepare_threshold=None, **settings)
        return Session(connection, where, table, answer)
    except (psycopg.Error, UnicodeError, OSError) as error:
        failure = _connection_error(error, where, settings)
    except BaseException as error:
        if hasattr(connection, "pgconn"):  # else the session has it, and closes it
            connection.close()
        # The variables of psycopg hold the password.
        raise error.with_traceback(None) from None
    # Outside of the handler: psycopg's own error, in its context, may show more than ours.
    raise failure


class Session:
    """A connection to the server, which nobody else uses. It closes itself when it is dropped.

    All methods raise

    * `Unreachable`: The connection is broken, or there was no answer in time. What the server has
      done is unknown: close the session.
    * `InfrastructureError`: The server reports an error; `Unavailable` where it may pass.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], where: str, table: str, answer: float
    ) -> None:
        self._pgconn = connection.pgconn
        # psycopg complains of an open connection that is dropped. Here that is a way to close it.
        del connection.pgconn
        self._fd = self._pgconn.socket
        self._file = files.device_and_inode(os.fstat(self._fd))
        self._pid = os.getpid()
        self._table, self._answer = table, answer
        self._backend = self._pgconn.backend_pid
        self.where = where
        _sockets[self._fd] = self._file

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # the interpreter may be half gone, or the session never completed
            pass

    def refuse_unsuitable(self) -> None:
        """Refuse a server whose locks would not lock. What it says at the start is enough."""
        other = self._parameter("crdb_version")
        if other is not None:  # the same protocol, but advisory locks that do nothing
            raise InfrastructureError(f"{self.where} is no PostgreSQL, but {printable(other)}")
        version = self._pgconn.server_version
        if version < _OLDEST:
            raise _too_old(self.where, f"is PostgreSQL {version // 10000}")
        if self._parameter("in_hot_standby") == "on":
            raise _standby(self.where)

    def try_lock(self, names: Names, owner: str | None = None) -> tuple[bool, int]:
        """Whether the lock was free, and is ours now. With ``owner``, sign the row with it, and
        draw the fence. The table is created when it is missing.
        """
        parameters: list[str | int] = [names.lock, self._backend]
        if owner is None:
            [(got,)] = self._ask(_LOCK, *parameters)
            fence = None
        else:
            parameters += [names.key, names.shown, owner]
            try:
                [(got, fence)] = self._ask(_LOCK_AND_SIGN, *parameters)
            except Refused as error:
                if error.sqlstate != _NO_TABLE:
                    raise
                self.create_table()
                [(got, fence)] = self._ask(_LOCK_AND_SIGN, *parameters)
        if got is None:
            raise _pooler(self.where)
        return got == "t", int(fence or 0)

    def create_table(self) -> None:
        try:
            self._ask(_CREATE)
        except Refused as error:
            # IF NOT EXISTS does not help two who create it in the same instant.
            if error.sqlstate not in _CREATED_MEANWHILE:
                raise

    def unlock(self, names: Names, within: float) -> None:
        self._ask(_UNLOCK, names.lock, within=within)

    def holder(self, names: Names) -> tuple[str, int, bool] | None:
        """Who has signed the row, with which fence, and whether that session has the lock now."""
        for owner, fence, is_held in self._look(_HOLDER, names.key):
            return owner or "", int(fence or 0), is_held == "t"
        return None

    def holders(self) -> Sequence[tuple[str, int]]:
        """Who has a lock now, in any project, and with which fence."""
        return [(owner or "", int(fence or 0)) for owner, fence in self._look(_HOLDERS)]

    def check(self, names: Names) -> tuple[bool, int | None]:
        """Whether this very session has the lock, and the fence of its row, where there is one."""
        parameters = (names.lock, self._backend, names.key)
        rows = self._look(_CHECK, *parameters)
        if not rows:
            self.create_table()
            rows = self._ask(_CHECK, *parameters)
        [(is_held, fence)] = rows
        return is_held == "t", None if fence is None else int(fence)

    def has_lock(self, names: Names) -> bool:
        """Whether this very session has the lock. For this no right to the table is needed."""
        [(is_held,)] = self._ask(_HAS_LOCK, names.lock, self._backend)
        return is_held == "t"

    def sign_again(self, names: Names, fence: int, owner: str) -> None:
        """Put back the row of a lock that this session has."""
        self._ask(
            _SIGN_AGAIN, names.lock, self._backend, names.key, names.shown, fence, owner
        )  # fmt: skip

    def fence(self, names: Names) -> int | None:
        """The fence in the row; None where there is no row."""
        for (fence,) in self._look(_FENCE, names.key):
            return int(fence or 0)
        return None

    def take_over(self, names: Names, fence: int) -> bool:
        """Make the row this session's, if it has that fence still; whether it has."""
        return bool(self._look(_TAKE_OVER, names.key, fence, self._backend))

    def end_holder(self, names: Names, fence: int) -> None:
        """End the session that has the lock with this fence, if there is one still: our own of
        before, which the server has not yet seen to be cut off.
        """
        try:
            self._look(_END_HOLDER, names.key, fence)
        except Refused:  # the user has another role than before
            pass

    def fileno(self) -> int:
        """The socket; -1 where this program has closed it."""
        return self._fd if files.still_open(self._fd, self._file) else -1

    def has_input(self) -> bool:
        """Whether the server has said something, or has hung up."""
        return _wait(self._fd, 0.0)

    def close(self) -> None:
        """End the session, without waiting. In a forked child it does nothing."""
        if self._pid != os.getpid():
            return
        if self.fileno() >= 0:
            self._pgconn.finish()
        else:
            # By now the number may be that of another file, which libpq would close.
            _abandoned.append(self._pgconn)
        # After the goodbye to the server: a child that was forked before lets its copy go, too.
        if _sockets.get(self._fd) == self._file:
            del _sockets[self._fd]

    def _parameter(self, name: str) -> str | None:
        value = self._pgconn.parameter_status(name.encode())
        return None if value is None else value.decode("utf-8", "replace")

    def _look(self, statement: str, *parameters: str | int) -> list[tuple[str | None, ...]]:
        """As `_ask`. Where the table does not exist there are no rows."""
        try:
            return self._ask(statement, *parameters)
        except Refused as error:
            if error.sqlstate != _NO_TABLE:
                raise
            return []

    def _ask(
        self, statement: str, *parameters: str | int, within: float | None = None
    ) -> list[tuple[str | None, ...]]:
        """The rows that a statement returns, as texts."""
        psycopg = import_psycopg()
        deadline = now() + (self._answer if within is None else within)
        values = [str(value).encode() for value in parameters]
        results: list[Any] = []
        failure: InfrastructureError | None = None
        with interruptible():
            if self.fileno() < 0:
                raise Unreachable(f"this program has closed the connection to {self.where}")
            try:
                self._results(deadline)  # of a question that a Ctrl-C broke off
                self._pgconn.send_query_params(
                    statement.format(table=self._table).encode(), values
                )  # fmt: skip
                results = self._results(deadline)
            except (psycopg.Error, OSError) as error:
                failure = _broken(self.where, str(error))
        if failure is not None:
            raise failure
        for result in results:
            if result.status == psycopg.pq.ExecStatus.FATAL_ERROR:
                raise self._refused(result)
        return _rows(results[-1])

    def _results(self, deadline: float) -> list[Any]:
        found: list[Any] = []
        while True:
            unsent = self._pgconn.flush()
            if unsent or self._pgconn.is_busy():
                if not _wait(self._fd, max(0.0, deadline - now()), bool(unsent)):
                    raise Silent(f"{self.where} does not answer")
                self._pgconn.consume_input()
                continue
            result = self._pgconn.get_result()
            if result is None:
                return found
            found.append(result)

    def _refused(self, result: Any) -> InfrastructureError:
        field = import_psycopg().pq.DiagnosticField
        sqlstate = (result.error_field(field.SQLSTATE) or b"").decode()
        message = (result.error_field(field.MESSAGE_PRIMARY) or b"").decode("utf-8", "replace")
        if sqlstate.startswith(("08", "57P")):  # a lost connection, a server that is shut down
            return _broken(self.where, message)
        kind = NotNow if sqlstate.startswith(_NOT_NOW) else Refused
        return kind(self._explained(sqlstate, _plain(message)), sqlstate)

    def _explained(self, sqlstate: str, message: str) -> str:
        """An error of the server, and what to do about it."""
        if sqlstate in _PRIVILEGE:
            role = self._pgconn.user.decode("utf-8", "replace")
            quoted = '"' + role.replace('"', '""') + '"'
            create = _CREATE.format(table=self._table)
            grant = _GRANT.format(table=self._table, role=quoted)
            return (
                f"the role {role} may not use the table {self._table} on {self.where}: {message}. "
                f"Have an administrator run there: {create}; {grant};"
            )
        if sqlstate == _READ_ONLY:
            return f"{self.where} is read-only, and the lock needs to write: {message}"
        if sqlstate == _ROW_IS_LOCKED:
            return f"somebody's transaction keeps {self._table} locked on {self.where}: {message}"
        if sqlstate.startswith("42"):
            return (
                f"the table {self._table} on {self.where} is not as it should be: {message}. "
                "Use another table=, or have it dropped while no run has a lock"
            )
        return f"{self.where} refuses the lock: {message} ({sqlstate})"


def _rows(result: Any) -> list[tuple[str | None, ...]]:
    def text(row: int, column: int) -> str | None:
        value = result.get_value(row, column)
        return None if value is None else value.decode("utf-8", "replace")

    return [
        tuple(text(row, column) for column in range(result.nfields))
        for row in range(result.ntuples)
    ]  # fmt: skip


def _wait(fd: int, seconds: float, or_writable: bool = False) -> bool:
    """Wait until a socket has something to read, or for the other side; whether it has."""
    if not hasattr(select, "poll"):
        return any(select.select([fd], [fd] if or_writable else [], [], seconds))
    poll = select.poll()
    poll.register(fd, select.POLLIN | (select.POLLOUT if or_writable else 0))
    return bool(poll.poll(seconds * 1000))


def _count_fork() -> None:
    global _forks
    _forks += 1


def _let_go() -> None:
    """In a forked child: close its copies of the sockets, without a word to the server. A child
    that outlives its parent would keep the session alive, and with it the lock.
    """
    for fd, file in tuple(_sockets.items()):
        if not files.still_open(fd, file):
            continue
        try:
            null = os.open(os.devnull, os.O_RDWR)
        except OSError:
            os.close(fd)
            continue
        # The number stays taken, so that libpq's own copy of it never means another file.
        os.dup2(null, fd, inheritable=False)
        os.close(null)
    _sockets.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_count_fork, after_in_child=_let_go)


def import_psycopg() -> Any:
    try:
        import psycopg
    except ImportError as error:  # also where psycopg finds no libpq
        reason = str(error).partition("\n")[0]
    else:
        return psycopg
    raise ConfigurationError(
        f"PostgresLock needs psycopg ({reason}): pip install 'orchard-infra[postgres]'"
    )


def parse(url: str) -> Mapping[str, str]:
    """The parts of a URL, or of a connection string of libpq.

    Raises:
        ConfigurationError: It is neither, or psycopg is missing.
    """
    psycopg = import_psycopg()
    from psycopg.conninfo import conninfo_to_dict

    try:
        # Each of them: where a character is not escaped, a part of the password is in any of them.
        given = {name: Secret(value) for name, value in conninfo_to_dict(url).items()}
        # A password with a / or ? in it: its parts are in the port and in the database's name.
        if re.fullmatch(r"[\d,]*", given.get("port", "")) and "@" not in given.get("dbname", ""):
            return given
        reason = "a part of the password seems to be in the port, or in the database"
    except (psycopg.Error, UnicodeError, ValueError) as error:
        # What libpq quotes may be a part of the password.
        reason = re.sub(r'"[^"]*"?', "...", _plain(str(error)))
    raise ConfigurationError(
        f"the lock's URL cannot be read ({reason}): it should look like "
        "postgresql://user@host:5432/database; in a password, write %40 for @, %2F for /, %3A for "
        ":, %3F for ? and %25 for %"
    )


def shown(given: Mapping[str, str]) -> str:
    """The address, put together of its parts, so that no password can slip in."""
    if given.get("service"):
        return printable(f"the PostgreSQL service {given['service']}")
    user = f"{given['user']}@" if given.get("user") else ""
    host = given.get("host") or given.get("hostaddr") or os.environ.get("PGHOST", "")
    port = f":{given['port']}" if given.get("port") else ""
    return printable(f"postgresql://{user}{host}{port}/{given.get('dbname', '')}")


def _settings(
    given: Mapping[str, str], silence: float, name: str, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """How to connect. What the URL says counts more than what is set here."""
    settings = {
        # The client's side: a black hole is found in eight seconds, and a firewall does not forget
        # the connection.
        "keepalives": "1",
        "keepalives_idle": "5",
        "keepalives_interval": "2",
        "keepalives_count": "3",
        "tcp_user_timeout": "8000",
        "fallback_application_name": ascii(name)[1:-1][:63],
        **given,
    }
    if "PGCONNECT_TIMEOUT" not in environ:
        settings.setdefault("connect_timeout", str(CONNECT))
    options = {
        # The server's side. Its defaults keep the lock of a host that was cut off for hours.
        "tcp_keepalives_idle": max(1, round(silence / 2)),
        "tcp_keepalives_interval": max(1, round(silence / 6)),
        "tcp_keepalives_count": 3,
        "tcp_user_timeout": round(silence * 1000),
        "idle_session_timeout": 0,
        "statement_timeout": 0,
        "lock_timeout": 3000,  # somebody's open transaction may keep the row
        "default_transaction_isolation": "read\\ committed",
    }
    ours = " ".join(f"-c {name}={value}" for name, value in options.items())
    theirs = given.get("options", environ.get("PGOPTIONS", ""))
    settings["options"] = f"{ours} {theirs}".strip()  # of two, the last one counts
    return settings


def _connection_error(
    error: Exception, where: str, settings: Mapping[str, str]
) -> InfrastructureError:
    """Every way in which a connection cannot be made, in plain words."""
    said = _plain(str(error))
    for name, value in settings.items():
        if "password" in name and value:
            said = said.replace(value, "***")
    if "idle_session_timeout" in said:
        return _too_old(where, "is too old")
    if "startup parameter" in said:
        return _pooler(where)
    kind = InfrastructureError if _is_refusal(error) else Unreachable
    return kind(f"cannot connect to {where}: {said}")


def _is_refusal(error: Exception) -> bool:
    """Whether the server, or each of several addresses, will not have us as long as nobody changes
    something.
    """
    if not isinstance(error, import_psycopg().OperationalError):
        return not isinstance(error, OSError)  # libpq does not understand what it was given
    said = str(error)
    _, *each = re.split("connection to server (?:at|on) ", said)
    return "timeout expired" not in said and all(map(_REFUSALS.search, each or [said]))


def _broken(where: str, said: str) -> Unreachable:
    return Unreachable(f"the connection to {where} broke: {_plain(said)}")


def _too_old(where: str, what: str) -> InfrastructureError:
    return InfrastructureError(f"{where} {what}: the lock needs {_OLDEST // 10000} or later")


def _standby(where: str) -> Unavailable:
    return Unavailable(  # in a failover it is about to be the primary
        f"{where} is a standby, which has no locks of its own: give the address of the primary, or "
        "all addresses with target_session_attrs=read-write"
    )


def _pooler(where: str) -> InfrastructureError:
    return InfrastructureError(
        f"a connection pooler answers at {where}, such as PgBouncer. It shares sessions among its "
        "clients, so that the lock would not lock: give the address of the server itself"
    )


def _plain(text: str) -> str:
    """A message on one line, safe for a terminal, and without a password."""
    return printable(redacted(" ".join(text.split())))
