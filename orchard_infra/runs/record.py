"""Who a run is: the record that it leaves in the registry and in its lock."""

from __future__ import annotations

import enum
import functools
import json
import operator
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs

from orchard_infra.errors import InfrastructureError
from orchard_infra.runs.environ import own_environment_digest
from orchard_infra.system import files, processes
from orchard_infra.system.exported import look_up
from orchard_infra.system.processes import ProcessIdentity
from orchard_infra.system.text import duration, printable

RUN_ID_VARIABLE = "ORCHARD_INFRA_RUN_ID"


RECORD_LIMIT = 65536  # bytes: what is larger is not a record


RECORD_START = b'{"orchard_infra": 1,'  # every record begins so, also a torn one

_TEXT_LIMIT = 8192  # characters of one value


class RunState(str, enum.Enum):
    """What the kernel says of a run.

    A run that has ENDED was released, its program goes on, and so do processes that it started.
    ABANDONED is only ever written: the release failed. Such a run is shown as ENDED while its
    program lives, and after that as one that crashed.
    """

    RUNNING = "running"
    WAITING = "waiting"
    ENDED = "ended"
    ABANDONED = "abandoned"
    SURVIVORS = "survivors"
    DEAD = "dead"


# The validators serve also for what was read from a file that anybody may have written. They are
# flat, because every run checks twenty values.


def _wrong(field: attrs.Attribute[Any], rule: str, value: object) -> ValueError:
    return ValueError(f"{field.name} must be {rule}, not {value!r:.80}")


def _text(record: object, field: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, str) or len(value) > _TEXT_LIMIT:
        raise _wrong(field, f"a text of at most {_TEXT_LIMIT} characters", value)


def _text_or_none(record: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not (isinstance(value, str) and len(value) <= _TEXT_LIMIT):
        raise _wrong(field, "a text or None", value)


def _words(record: object, field: attrs.Attribute[Any], value: object) -> None:
    if type(value) is not tuple or not all(
        isinstance(word, str) and len(word) <= _TEXT_LIMIT for word in value
    ):
        raise _wrong(field, "a sequence of texts", value)


def _run_id(record: object, field: attrs.Attribute[Any], value: object) -> None:
    if not is_run_id(value):
        raise _wrong(field, "1 to 64 letters and digits", value)


def _pid(record: object, field: attrs.Attribute[Any], value: object) -> None:
    if type(value) is not int or not 0 < value < 2**31:
        raise _wrong(field, "a pid", value)


def _whole(record: object, field: attrs.Attribute[Any], value: object) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _wrong(field, "a whole number >= 0", value)


def _whole_or_none(record: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None and (type(value) is not int or not 0 <= value < 2**63):
        raise _wrong(field, "a whole number or None", value)


def _seconds(record: object, field: attrs.Attribute[Any], value: object) -> None:
    if not (type(value) is float or type(value) is int) or not 0 <= value < 1e12:
        raise _wrong(field, "a number of seconds >= 0", value)


def is_run_id(value: object) -> bool:
    """Whether this may be the id of a run, and so a part of a file's name."""
    return isinstance(value, str) and len(value) <= 64 and value.isalnum() and value.isascii()


def _to_words(value: object) -> object:
    return tuple(value) if type(value) is list else value


@attrs.frozen
class RunRecord:
    """Who a run is. ``create_time`` is that of `ProcessIdentity`; ``started_at`` is in epoch
    seconds; ``lock`` and ``tmp_dir`` are paths, where there are any; ``parent`` is the id of the
    run inside which this one was started.

    ``session`` is the session of the leader, see setsid(2). ``environment`` is a keyed digest of
    the environment that the leader was started with; it is in the registry only, which nobody
    else can read. ``host`` is for display: a host name may change while a run goes on. ``job`` is
    that of `Launch`, as are ``restart`` and ``restarts_left``. ``turn`` counts the environments
    of its project that its process has come to: the third one of each rank of a job is one and the
    same. ``fence`` is that of the lease, where it is known from the start. ``time_namespace`` is
    the one whose clock ``create_time`` is on; a record of the version before has none.
    """

    run_id: str = attrs.field(validator=_run_id)
    project: str = attrs.field(validator=_text)
    pid: int = attrs.field(validator=_pid)
    create_time: float = attrs.field(validator=_seconds)
    host: str = attrs.field(validator=_text)
    boot_id: str = attrs.field(validator=_text)
    pid_namespace: int = attrs.field(validator=_whole)
    user: str = attrs.field(validator=_text)
    uid: int = attrs.field(validator=_whole)
    argv: tuple[str, ...] = attrs.field(converter=_to_words, validator=_words)
    cwd: str = attrs.field(validator=_text)
    started_at: float = attrs.field(validator=_seconds)
    lock: str | None = attrs.field(default=None, validator=_text_or_none)
    tmp_dir: str | None = attrs.field(default=None, validator=_text_or_none)
    rank: int | None = attrs.field(default=None, validator=_whole_or_none)
    parent: str | None = attrs.field(default=None, validator=_text_or_none)
    session: int | None = attrs.field(default=None, validator=_whole_or_none)
    environment: str | None = attrs.field(default=None, validator=_text_or_none, repr=False)
    job: str | None = attrs.field(default=None, validator=_text_or_none)
    restart: int | None = attrs.field(default=None, validator=_whole_or_none)
    turn: int | None = attrs.field(default=None, validator=_whole_or_none)
    fence: int | None = attrs.field(default=None, validator=_whole_or_none)
    time_namespace: int | None = attrs.field(default=None, validator=_whole_or_none)
    restarts_left: int | None = attrs.field(default=None, validator=_whole_or_none)

    @property
    def leader(self) -> ProcessIdentity:
        """The process that entered the environment."""
        return ProcessIdentity(self.pid, self.create_time)

    @property
    def is_local(self) -> bool:
        """Whether pid and create time mean anything here: same boot, same namespaces."""
        return self.has_our_pids and self.time_namespace in (None, processes.own_time_namespace())

    @property
    def has_our_pids(self) -> bool:
        """Whether the pid means anything here: same boot, same pid namespace.

        DHCP and VPNs change a host name while a run goes on. It only counts where the kernel has
        no name for its boot.
        """
        boot_id = processes.boot_id()
        return (
            self.boot_id == boot_id
            and processes.is_own_pid_namespace(self.pid_namespace)
            and (boot_id != "" or self.host == processes.host_name())
        )

    def describe(self, now: float | None = None) -> str:
        """Who that is, for a person: one line, safe for a terminal."""
        age = (time.time() if now is None else now) - self.started_at
        where = f" in {self.cwd}" if self.cwd else ""
        return printable(
            f"pid {self.pid} on {self.host} (user {self.user}), started {duration(age)} ago: "
            f"{' '.join(self.argv)}{where}"
        )


@attrs.frozen
class Survivor:
    """A live process that belongs to a run whose leader is dead, and what proves it.

    ``kind`` is "worker" for a fork or a multiprocessing worker of the dead program, "program" for
    another program that a crashed run started in its session, and "detached" for one that started
    a session of its own, or whose run was released: that one may well be meant to go on.
    ``is_helper`` says that it only serves others (a resource tracker, a forkserver): it ends by
    itself when they have, and complains if it is stopped before.
    """

    pid: int
    create_time: float
    command: str
    evidence: str
    kind: Literal["worker", "program", "detached"] = "worker"
    is_helper: bool = False

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.create_time)

    def describe(self) -> str:
        detached = ", detached" if self.kind == "detached" else ""
        return printable(f"pid {self.pid} ({self.evidence}{detached}): {self.command}")


def describe_this_run(
    project: str,
    *,
    lock: str | None = None,
    rank: int | None = None,
    environ: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
    job: str | None = None,
    restart: int | None = None,
    restarts_left: int | None = None,
    turn: int | None = None,
) -> RunRecord:
    """The record of a run that this process is about to begin. ``argv`` is what the run executes,
    where that is a command and not this very process.

    Raises:
        InfrastructureError: This process cannot be identified, or nobody could read the record.
    """
    identity = processes.own_identity()
    if identity is None:
        stat = f"/proc/{os.getpid()}/stat"
        raise InfrastructureError(f"cannot identify this process: {stat} is not readable")
    uid = os.geteuid() if hasattr(os, "geteuid") else 0
    run_id = os.urandom(8).hex()
    parent = look_up(RUN_ID_VARIABLE) if environ is None else environ.get(RUN_ID_VARIABLE)
    try:
        return RunRecord(
            run_id=run_id,
            project=project,
            pid=identity.pid,
            create_time=identity.create_time,
            host=processes.host_name(),
            boot_id=processes.boot_id(),
            pid_namespace=processes.own_pid_namespace(),
            user=files.owner_name(uid).partition(" (")[0],
            uid=uid,
            argv=clip(sys.orig_argv if argv is None else argv),
            cwd=cut(files.working_directory() or ""),
            started_at=time.time(),
            lock=lock,
            rank=rank,
            parent=parent if is_run_id(parent) else None,
            session=os.getsid(0) if hasattr(os, "getsid") else None,
            environment=own_environment_digest(run_id),
            job=job,
            restart=restart,
            turn=turn,
            time_namespace=processes.own_time_namespace(),
            restarts_left=restarts_left,
        )
    except ValueError as error:
        raise InfrastructureError(f"the run cannot be recorded: {error}") from error


_NAMES = tuple(field.name for field in attrs.fields(RunRecord))
_NAMES_FOR_ALL = tuple(name for name in _NAMES if name != "environment")
_values_for_all = operator.attrgetter(*_NAMES_FOR_ALL)


def to_json(
    record: RunRecord, state: RunState | None = None, *, with_environment: bool = False
) -> bytes:
    """A record as one line of JSON, for a file that others may read.

    ``with_environment`` is for a file that only its owner can read: a digest of few and short
    values can be guessed.

    Raises:
        ValueError: It is longer than a record may be.
    """
    line = _to_json(record)[:-1]
    if with_environment and record.environment is not None:
        line += f', "environment": {_quoted(record.environment)}'
    if state is not None:
        line += f', "state": "{state.value}"'
    if len(line) >= RECORD_LIMIT - 64:  # it is ASCII; the longest state must fit as well
        raise ValueError(f"the record is longer than {RECORD_LIMIT} bytes")
    return line.encode() + b"}\n"


def _quoted(text: str) -> str:
    return f'"{text}"' if text.isalnum() and text.isascii() else json.dumps(text)


# Written three times in every run: twice in the registry, once in the lock.
_latest: tuple[RunRecord | None, str] = None, ""


def _to_json(record: RunRecord) -> str:
    global _latest
    latest, line = _latest
    if latest is not record:
        values = zip(_NAMES_FOR_ALL, _values_for_all(record), strict=True)
        line = json.dumps({"orchard_infra": 1, **dict(values)})
        _latest = record, line
    return line


def from_json(data: bytes) -> tuple[RunRecord, RunState | None]:
    """Read what `to_json` wrote. Fields that a newer version may have added are passed over.

    Raises:
        ValueError: It is anything else: torn, binary, huge, deeply nested, of wrong types.
    """
    if len(data) > RECORD_LIMIT:
        raise ValueError(f"longer than {RECORD_LIMIT} bytes")
    if not data.startswith(RECORD_START):
        raise ValueError("not a run record")
    try:
        fields = json.loads(data.partition(b"\n")[0])
        state = fields.get("state")
        values = {name: fields[name] for name in _NAMES if name in fields}
        return RunRecord(**values), None if state is None else RunState(state)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except TypeError as error:  # a field is missing
        raise ValueError(str(error)) from None


def read_record(fd: int) -> tuple[RunRecord, RunState | None] | None:
    """The record in an open file, or None where there is none that can be read."""
    try:
        return from_json(files.read_bounded(fd, RECORD_LIMIT + 1))
    except (ValueError, OSError):
        return None


def leader_is_dead(record: RunRecord, *, lock_is_free: bool = False) -> bool:
    """Whether the process that led this run is *proven* dead.

    It is when it is gone from our own pid namespace. A record of another boot may be that of
    another host, which shares this file system: only with ``lock_is_free``, the kernel's lock on
    the record's file being free, does it prove anything. One of another container never does. In
    another time namespace create times differ: there only a pid that nobody has is proof.
    """
    boot_id = processes.boot_id()
    if record.boot_id != boot_id:
        return lock_is_free and record.boot_id != "" and boot_id != ""
    if record.is_local:
        return processes.is_gone(record.leader)
    return record.has_our_pids and processes.is_vacant(record.pid)


def leader_lives(record: RunRecord) -> bool:
    """Whether the process that led this run is known to live. In another time namespace, whether
    any process has its pid: nobody can tell which one.
    """
    if record.is_local:
        return processes.is_alive(record.leader)
    return record.has_our_pids and not processes.is_vacant(record.pid)


def clip(words: Iterable[str], limit: int = 4096) -> tuple[str, ...]:
    """As many words as fit into ``limit`` bytes of JSON, and a part of the next."""
    return _clipped(tuple(words), limit)


@functools.lru_cache(maxsize=8)
def _clipped(words: tuple[str, ...], limit: int) -> tuple[str, ...]:
    if len(json.dumps(words)) <= limit:  # mostly: a fraction of the time
        return words
    kept: list[str] = []
    for word in words:
        kept.append(cut(word, limit))
        limit -= len(json.dumps(kept[-1])) + 2
        if limit <= 0 or kept[-1] != word:
            break
    return tuple(kept)


def cut(text: str, limit: int = 4096) -> str:
    """As much of a text as fits into ``limit`` bytes of JSON, escapes and all."""
    if len(text) * 12 <= limit:  # the longest escape is that of a surrogate pair
        return text
    text = text[:limit]
    while len(json.dumps(text)) > limit + 2:
        text = text[: len(text) * 2 // 3]
    return text
