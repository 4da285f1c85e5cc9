"""What the chaos tests know of processes and files, without asking the package that they test."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_EXITING = 0x4  # PF_EXITING of the kernel's flags


class Identity(NamedTuple):
    """A process, told from others that had its pid: the start time is in ticks since the boot."""

    pid: int
    started: int


def identity(pid: int) -> Identity | None:
    """Who has this pid now; None for nobody, and for a process that is only not yet reaped."""
    fields = _stat(pid)
    if fields is None or (fields[0] in (b"Z", b"X") and int(fields[17]) <= 1):
        return None
    return Identity(pid, int(fields[19]))


def lives(who: Identity) -> bool:
    """Whether this process still runs code of its own.

    On a busy machine a killed one is on its way out for a while: some of its files are closed,
    and their locks free, before it shows as defunct. See `has_gone`.
    """
    fields = _stat(who.pid)
    return identity(who.pid) == who and fields is not None and not int(fields[6]) & _EXITING


def has_gone(who: Identity) -> bool:
    """Whether everything that this process held has been given back."""
    return identity(who.pid) != who


def send(who: Identity, signum: int) -> bool:
    """Signal this very process; whether it was there."""
    try:
        handle = os.pidfd_open(who.pid)
    except OSError:
        return False
    try:
        if not lives(who):
            return False
        signal.pidfd_send_signal(handle, signum)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def session_of(pid: int) -> int | None:
    """The session of a process, see setsid(2)."""
    fields = _stat(pid)
    return None if fields is None else int(fields[3])


def environ_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; that of a fork is its program's."""
    entries = read_bytes(f"/proc/{pid}/environ").decode(errors="replace").split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if "=" in entry)


def all_identities() -> list[Identity]:
    """The live processes of this user."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                found.append(identity(int(name)))
        except OSError:
            continue
    return [who for who in found if who is not None]


def marked(mark: str) -> Iterator[Identity]:
    """The live processes of one round, those that nobody had the time to write down included."""
    for who in all_identities():
        if is_fork(who, mark) or environ_of(who.pid).get("CHAOS_MARK") == mark:
            yield who


def is_fork(who: Identity, mark: str) -> bool:
    """Whether a process was forked by a contender of this round, or is one."""
    return read_bytes(f"/proc/{who.pid}/comm").strip() == mark.encode()


def read_bytes(path: str | Path) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def command_of(pid: int) -> str:
    words = read_bytes(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace")
    return words.strip() or read_bytes(f"/proc/{pid}/comm").decode(errors="replace").strip()


class Journal:
    """A file to which many processes add lines; what a killed one has written, stays."""

    def __init__(self, path: Path, name: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._name = name

    def write(self, event: str, **facts: Any) -> None:
        line = {"at": time.monotonic(), "who": self._name, "event": event, **facts}
        os.write(self._fd, json.dumps(line).encode() + b"\n")


def read_journal(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines after ``offset``, and where they end."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole, newline, _ = data.rpartition(b"\n")
    lines = [json.loads(line) for line in whole.split(b"\n")] if newline else []
    return lines, offset + len(whole) + len(newline)


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat after the name, see proc(5): the state is the first."""
    data = read_bytes(f"/proc/{pid}/stat")
    return data[data.rfind(b")") + 2 :].split() or None
