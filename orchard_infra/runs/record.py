"""Who a run is: the record that it leaves in the registry and in its lock."""

from __future__ import annotations

import enum
import functools
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from orchard_infra.errors import InfrastructureError
from orchard_infra.system import files, processes
from orchard_infra.system.processes import ProcessIdentity
from orchard_infra.system.text import duration, printable

RUN_ID_VARIABLE = "ORCHARD_INFRA_RUN_ID"


RECORD_LIMIT = 65536  # bytes: what is larger is not a record


RECORD_START = b'{"orchard_infra": 1,'  # every record begins so, also a torn one


class RunState(str, enum.Enum):
    """What the kernel says of a run."""

    RUNNING = "running"
    WAITING = "waiting"
    SURVIVORS = "survivors"
    DEAD = "dead"


@attrs.frozen
class RunRecord:
    """Who a run is. ``create_time`` is that of `ProcessIdentity`; ``started_at`` is in epoch
    seconds; ``lock`` and ``tmp_dir`` are paths, where there are any; ``parent`` is the id of the
    run inside which this one was started.
    """

    run_id: str
    project: str
    pid: int
    create_time: float
    host: str
    boot_id: str
    pid_namespace: int
    user: str
    uid: int
    argv: tuple[str, ...]
    cwd: str
    started_at: float
    lock: str | None = None
    tmp_dir: str | None = None
    rank: int | None = None
    parent: str | None = None

    @property
    def leader(self) -> ProcessIdentity:
        """The process that entered the environment."""
        return ProcessIdentity(self.pid, self.create_time)

    @property
    def is_local(self) -> bool:
        """Whether the pid means anything here: same host, same boot, same pid namespace."""
        return (
            self.boot_id == processes.boot_id()
            and processes.is_own_pid_namespace(self.pid_namespace)
            and self.host == socket.gethostname()
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
    """A live process that belongs to a run whose leader is dead, and what proves it."""

    pid: int
    create_time: float
    command: str
    evidence: str

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.create_time)

    def describe(self) -> str:
        return printable(f"pid {self.pid} ({self.evidence}): {self.command}")


def describe_this_run(
    project: str,
    *,
    lock: str | None = None,
    rank: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> RunRecord:
    """The record of a run that this process is about to begin."""
    pid = os.getpid()
    identity = processes.identity_of(pid)
    if identity is None:
        raise InfrastructureError(f"cannot identify this process: /proc/{pid}/stat is not readable")
    uid = os.geteuid() if hasattr(os, "geteuid") else 0
    parent = environ.get(RUN_ID_VARIABLE)
    return RunRecord(
        run_id=os.urandom(8).hex(),
        project=project,
        pid=pid,
        create_time=identity.create_time,
        host=socket.gethostname(),
        boot_id=processes.boot_id(),
        pid_namespace=processes.pid_namespace(),
        user=files.owner_name(uid).partition(" (")[0],
        uid=uid,
        argv=_clip(sys.orig_argv),
        cwd=_cut(_working_directory()),
        started_at=time.time(),
        lock=lock,
        rank=rank,
        parent=parent if _is_id(parent) else None,
    )


def to_json(record: RunRecord, state: RunState | None = None) -> bytes:
    """A record as one line of JSON."""
    line = _to_json(record)
    if state is not None:
        line = f'{line[:-1]}, "state": "{state.value}"}}'
    return line.encode() + b"\n"


@functools.lru_cache(maxsize=8)  # written three times in every run: twice here, once in the lock
def _to_json(record: RunRecord) -> str:
    return json.dumps({"orchard_infra": 1, **attrs.asdict(record, recurse=False)})


def from_json(data: bytes) -> tuple[RunRecord, RunState | None]:
    """Read what `to_json` wrote.

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
        values: dict[str, Any] = {}
        for field in attrs.fields(RunRecord):
            value = fields.get(field.name, field.default)
            if not _TYPES[field.name](value):
                raise ValueError(f"{field.name} is {value!r:.80}")
            values[field.name] = tuple(value) if field.name == "argv" else value
        return RunRecord(**values), None if state is None else RunState(state)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_record(fd: int) -> tuple[RunRecord, RunState | None] | None:
    """The record in an open file, or None where there is none that can be read."""
    try:
        return from_json(files.read_bounded(fd, RECORD_LIMIT + 1))
    except (ValueError, OSError):
        return None


def leader_is_dead(record: RunRecord) -> bool:
    """Whether the process that led this run is *proven* dead.

    From another boot of this very host, or gone from our own pid namespace. A record of another
    host, or of another container, proves nothing here.
    """
    if record.host != socket.gethostname():
        return False
    if record.boot_id != processes.boot_id():
        return bool(record.boot_id)
    return record.is_local and not processes.is_alive(record.leader)


def _leader_lives(record: RunRecord) -> bool:
    return record.is_local and processes.is_alive(record.leader)


def _clip(words: Iterable[str], limit: int = 4096) -> tuple[str, ...]:
    """As many words as fit into ``limit`` bytes of JSON, and a part of the next."""
    words = tuple(words)
    if len(json.dumps(words)) <= limit:  # mostly: a fraction of the time
        return words
    kept: list[str] = []
    for word in words:
        kept.append(_cut(word, limit))
        limit -= len(json.dumps(kept[-1])) + 2
        if limit <= 0 or kept[-1] != word:
            break
    return tuple(kept)


def _cut(text: str, limit: int = 4096) -> str:
    """As much of a text as fits into ``limit`` bytes of JSON, escapes and all."""
    text = text[:limit]
    while len(json.dumps(text)) > limit + 2:
        text = text[: len(text) * 2 // 3]
    return text


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 8192


def _is_id(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 64 and value.isalnum() and value.isascii()


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12  # type: ignore[operator]


def _is_words(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_text(word) for word in value)


def _optional(check: Any) -> Any:
    return lambda value: value is None or check(value)


_TYPES: dict[str, Any] = {
    "run_id": _is_id,
    "project": _is_text,
    "pid": lambda value: _is_whole(value) and 0 < value < 2**31,
    "create_time": _is_number,
    "host": _is_text,
    "boot_id": _is_text,
    "pid_namespace": _is_whole,
    "user": _is_text,
    "uid": _is_whole,
    "argv": _is_words,
    "cwd": _is_text,
    "started_at": _is_number,
    "lock": _optional(_is_text),
    "tmp_dir": _optional(_is_text),
    "rank": _optional(_is_whole),
    "parent": _optional(_is_text),
}
