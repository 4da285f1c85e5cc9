"""What has become of runs: one line of JSON for each run that has ended, beside the records.

A line is the run's record with more fields: how it ended, when it began to run, when it ended, and
what was freed and stopped. A run writes its own line when it is released. Of one that was killed,
whoever removes its dead record writes the line.

There are two files of bounded size. When the newer one is full, it takes the place of the older
one. The history is a convenience: it never fails or delays a release.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from signal import Signals
from typing import Any

import attrs

from orchard_infra.errors import InfrastructureError
from orchard_infra.report import Report
from orchard_infra.runs.record import RECORD_LIMIT, RunRecord, clip, cut, to_json
from orchard_infra.system import files
from orchard_infra.system.flock import lock_descriptor

NAME = "history.jsonl"
OLDER_NAME = "history.older.jsonl"
LIMIT = 2**21  # bytes of each file: some three thousand runs
LINE_LIMIT = 4096  # bytes of a line
RUNNING_AT = "running_at"  # a field of a record's file: when the run had its lock, in epoch seconds

# How a run ended. "exit" is an exit status other than 0; "stopped" a request to stop that was no
# signal; "killed" was found dead.
HOW = ("normal", "exit", "exception", "signal", "stopped", "lost lock", "killed")

Fields = dict[str, object]


def note_end(
    directory: str,
    record: RunRecord,
    report: Report,
    *,
    running_at: float | None,
    error: BaseException | None = None,
    command: tuple[int, int | None] | None = None,
    lock_lost: bool = False,
    stop_requested: bool = False,
    stop_signal: int | None = None,
    release_failed: bool = False,
) -> None:
    """Write down how a run ended that was released, and what was done for it. Never fails.

    ``error`` is what its body ended with. ``command`` has the exit status of the command that the
    run executed, and the signal that ended it, where there was a command.
    """
    now = time.time()
    # Whatever goes wrong: a full disk, no descriptors, no directory, something else of that name.
    with contextlib.suppress(Exception):
        fields = _how_it_ended(error, command, stop_requested, stop_signal)
        if lock_lost:  # said before anything else: another run may have written to the same outputs
            fields["how"] = "lost lock"
        fields[RUNNING_AT] = now if running_at is None else running_at
        fields["ended_at"] = now
        if release_failed:
            fields["release_failed"] = True
        fields.update(_what_was_done(report))
        _append(directory, _to_line(record, fields))


def _what_was_done(report: Report) -> Fields:
    fields: Fields = {}
    flushed, cleaned, collected = report.flushed, report.cleaned, report.collected
    if flushed is not None and flushed.devices:
        fields["device_bytes"] = sum(device.freed for device in flushed.devices)
    if cleaned is not None and cleaned.bytes_freed:
        fields["temporary_bytes"] = cleaned.bytes_freed
    if collected is not None and collected.bytes_freed:
        fields["collected_bytes"] = collected.bytes_freed
    for name, found in (("ghosts", report.sanitized), ("leftovers", report.leftovers)):
        if number := len(found.stopped) + len(found.killed):
            fields[f"{name}_stopped"] = number
    if report.leftovers.spared:
        fields["left_running"] = len(report.leftovers.spared)
    return fields


def _how_it_ended(
    error: BaseException | None,
    command: tuple[int, int | None] | None,
    stop_requested: bool,
    stop_signal: int | None,
) -> Fields:
    if isinstance(error, KeyboardInterrupt):
        return {"how": "signal", "signal": "SIGINT"}
    if error is not None and not isinstance(error, SystemExit):
        return {"how": "exception", "error": cut(type(error).__name__, 200)}
    status, signum = command or (_exit_status(error), None)
    if command is None and stop_signal is not None and status in (0, 128 + stop_signal):
        signum = stop_signal
    if signum is not None:
        return {"how": "signal", "signal": _signal_name(signum)}
    if status:
        return {"how": "exit", "exit_status": status}
    return {"how": "stopped"} if stop_requested else {"how": "normal"}


def _exit_status(error: SystemExit | None) -> int:
    """The status that the interpreter exits with, if nobody catches this."""
    if error is None or error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _signal_name(signum: int) -> str:
    try:
        return Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"


def note_killed(directory: str, record: RunRecord, fd: int) -> None:
    """Write down that a run was found dead, whose record's file is open as ``fd``. Never fails."""
    with contextlib.suppress(Exception):
        _append(directory, _to_line(record, killed(record, fd)))


def killed(record: RunRecord, fd: int) -> Fields:
    """The fields of a run that was found dead: it ended after ``alive_at``, its last sign of life,
    and not after ``ended_at``.
    """
    fields: Fields = {"how": "killed"}
    began = record.started_at
    running_at = running_since(fd)
    if running_at is not None:
        fields[RUNNING_AT] = began = running_at
    found_at = time.time()
    touched_at = os.fstat(fd).st_mtime  # by `Registration.touch`, every few seconds
    fields["alive_at"] = max(began, min(touched_at, found_at))
    fields["ended_at"] = max(began, found_at)
    return fields


def running_since(fd: int) -> float | None:
    """When the run whose record's file is open as ``fd`` had its lock. It is not in the record of
    an older version.
    """
    try:
        running_at = json.loads(files.read_bounded(fd, RECORD_LIMIT)).get(RUNNING_AT)
    except (ValueError, RecursionError):
        return None
    return running_at if isinstance(running_at, float) else None


def read(directory: str) -> Iterator[bytes]:
    """The lines, the oldest first, a torn one perhaps among them. Some may come twice: while this
    reads, the newer file may take the place of the older one.
    """
    # The newer one first: in the other order a rotation in between would hide a whole file.
    newer = _read(f"{directory}/{NAME}")
    for data in (_read(f"{directory}/{OLDER_NAME}"), newer):
        yield from filter(None, data.split(b"\n"))


def _read(path: str) -> bytes:
    """The end of a file, if that is a file of ours."""
    try:
        fd = files.open_existing(path, os.O_RDONLY)
    except (OSError, InfrastructureError):
        return b""
    try:
        if files.is_foreign(os.fstat(fd)):
            return b""
        os.lseek(fd, max(0, os.fstat(fd).st_size - 2 * LIMIT), os.SEEK_SET)
        return os.read(fd, 2 * LIMIT)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _to_line(record: RunRecord, fields: Fields) -> bytes:
    # Made of the record's own JSON: that was made before, and costs more than all the rest.
    more = b", " + json.dumps(fields)[1:].encode() + b"\n"
    line = to_json(record)[:-2] + more
    if len(line) >= LINE_LIMIT:
        line = to_json(attrs.evolve(record, argv=clip(record.argv, 1000)))[:-2] + more
    if len(line) >= LINE_LIMIT:
        short: dict[str, Any] = {
            field.name: cut(value, 200)
            for field in attrs.fields(RunRecord)
            if isinstance(value := getattr(record, field.name), str)
        }
        line = to_json(attrs.evolve(record, argv=clip(record.argv, 1000), **short))[:-2] + more
    # It begins with a newline, so that one before it that was torn costs only itself.
    return b"\n" + line


def _append(directory: str, line: bytes) -> None:
    path = f"{directory}/{NAME}"
    fd, size = files.open_to_append(path, 0o600)
    try:
        if size + len(line) > LIMIT and _make_room(directory, path, fd):
            os.close(fd)
            fd = -1
            fd, _ = files.open_to_append(path, 0o600)
        os.write(fd, line)  # in one piece: two writers at a time do not mix their lines
    finally:
        if fd >= 0:
            os.close(fd)


def _make_room(directory: str, path: str, fd: int) -> bool:
    """Put the full file, open as ``fd``, in the place of the older one; whether it is gone from its
    own.
    """
    # Two writers may find it full at a time: the later one must not move the new file, which is
    # almost empty, over the full one. So a file is moved only by whoever has the lock on it.
    try:
        if not lock_descriptor(fd):
            return False  # it is being moved: this line still goes into it
    except OSError:
        pass  # a file system without locks
    if files.same_file(fd, path):
        try:
            os.replace(path, f"{directory}/{OLDER_NAME}")
        except OSError:  # Windows moves no open file; it must not grow without end
            newest = _read(path)[-LIMIT // 2 :]
            os.ftruncate(fd, 0)
            os.write(fd, newest)
            return False
    return True
