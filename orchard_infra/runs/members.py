"""The members file, beside a run's record: the processes of a program, written down while it lives.

Workers of a forkserver carry no run id and hold no file of the run if that server was started
before the run. After a kill -9 of the program nothing tells them from strangers. So a run writes
down the processes below it, when it begins and from time to time: one line each, appended.

    4242 81234.56 inside     a process that was below the program
    4240 81200.01 before     one that was there before the run began
    {"run_id": "ab12", ...}  a run of this program that has ended, and shares this file since
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import attrs

from orchard_infra.errors import InfrastructureError
from orchard_infra.runs.record import RUN_ID_VARIABLE, is_run_id
from orchard_infra.system import files, processes
from orchard_infra.system.processes import ProcessIdentity

SUFFIX = ".members"
_LIMIT = 2**20  # bytes that are read
_GROWN = 1000  # lines: a longer file is written anew without those that are of no use any more
_LINE = rb"(\d{1,10}) (\d{1,12}(?:\.\d{1,20})?) (inside|before)"  # a torn line is none


class FoldedRun(NamedTuple):
    """A run that has ended and is on the record of an earlier run of its program. ``file`` is the
    device and inode of its own former record, which forked children may still hold.
    """

    run_id: str
    file: tuple[int, int]
    lock: str | None = None


class Members(NamedTuple):
    """What a members file says. ``before`` are those that were there before the run began."""

    processes: frozenset[ProcessIdentity] = frozenset()
    before: frozenset[ProcessIdentity] = frozenset()
    folded: tuple[FoldedRun, ...] = ()


NOBODY = Members()


def read_members(path: str) -> Members:
    """What is in the file; nothing where there is none, or it is not ours. Lines that are torn, or
    of a newer version, are passed over.
    """
    try:
        fd = files.open_existing(path, os.O_RDONLY)
    except (OSError, InfrastructureError):
        return NOBODY
    try:
        if hasattr(os, "geteuid") and os.fstat(fd).st_uid != os.geteuid():
            return NOBODY
        lines = files.read_bounded(fd, _LIMIT).split(b"\n")[:-1]
    except OSError:
        return NOBODY
    finally:
        os.close(fd)
    found, before, folded = set(), set(), []
    for line in lines:
        match = re.fullmatch(_LINE, line)
        if match is not None:
            identity = ProcessIdentity(int(match[1]), float(match[2]))
            found.add(identity)
            if match[3] == b"before":
                before.add(identity)
        elif line.startswith(b"{"):
            run = _to_folded(line)
            if run is not None:
                folded.append(run)
    return Members(frozenset(found), frozenset(before), tuple(folded))


def _to_folded(line: bytes) -> FoldedRun | None:
    try:
        fields = json.loads(line)
        device, inode = fields["file"]
        run_id, lock = fields["run_id"], fields.get("lock")
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not (is_run_id(run_id) and type(device) is type(inode) is int):
        return None
    return FoldedRun(run_id, (device, inode), lock if isinstance(lock, str) else None)


@attrs.define(eq=False, repr=False)
class MembersFile:
    """The file as its program writes it. It is there only once there is something to write.

    It is opened for each writing, so that a thousand runs do not hold a thousand descriptors.
    """

    path: str
    identities: dict[ProcessIdentity, bool] = attrs.field(factory=dict)  # True: before the run
    folded: dict[str, FoldedRun] = attrs.field(factory=dict)
    is_written: bool = False
    compact_at: int = _GROWN
    _is_torn: bool = False

    def add(self, identities: Iterable[ProcessIdentity], *, before: bool = False) -> None:
        """Write down those that are not yet.

        Raises:
            OSError: They cannot be written.
        """
        new = [identity for identity in identities if identity not in self.identities]
        if new:
            self._append(b"".join(_line(identity, before) for identity in new))
            self.identities.update(dict.fromkeys(new, before))
            self._keep_small()

    def fold(self, run: FoldedRun) -> None:
        """Write down another run of this program.

        Raises:
            OSError: It cannot be written.
        """
        if run.run_id not in self.folded:
            self._append(_folded_line(run))
            self.folded[run.run_id] = run
            self._keep_small()

    def as_read(self) -> Members:
        """What a reader of this file finds."""
        before = (identity for identity, was_before in self.identities.items() if was_before)
        return Members(frozenset(self.identities), frozenset(before), tuple(self.folded.values()))

    def alive(self) -> list[ProcessIdentity]:
        """Those that live."""
        return [identity for identity in self.identities if processes.is_alive(identity)]

    def touch(self) -> None:
        """Keep cleaners of old files away."""
        if self.is_written:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path)

    def remove(self) -> None:
        if self.is_written:
            self.is_written = False
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def _append(self, data: bytes) -> None:
        try:
            fd = files.open_existing(self.path, os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:
            fd = files.create_exclusive(self.path, 0o600)
            data = self._contents() + data  # somebody has removed it
            self.is_written = True
        try:
            files.write_all(fd, b"\n" * self._is_torn + data)
            self._is_torn = False
        except BaseException:
            self._is_torn = True  # else the next line would be a part of this one
            raise
        finally:
            os.close(fd)

    def _contents(self) -> bytes:
        lines = [_line(identity, before) for identity, before in self.identities.items()]
        return b"".join(lines + [_folded_line(run) for run in self.folded.values()])

    def _keep_small(self) -> None:
        """Write a file that has grown anew, without processes that are gone and without runs whose
        id no process carries.
        """
        if len(self.identities) + len(self.folded) < self.compact_at:
            return
        living = self.alive()
        ids = _run_ids_in_use(self.folded.__contains__) if self.folded else set()
        identities = {identity: self.identities[identity] for identity in living}
        # What was forked inside of a folded run holds the record of the first one, too.
        folded = {run_id: run for run_id, run in self.folded.items() if run_id in ids}
        smaller = MembersFile(self.path, identities, folded)
        if _replace(self.path, smaller._contents()):
            self.identities, self.folded = identities, folded
        self.compact_at = max(_GROWN, 2 * (len(self.identities) + len(self.folded)))


def _line(identity: ProcessIdentity, before: bool) -> bytes:
    return f"{identity.pid} {identity.create_time} {'before' if before else 'inside'}\n".encode()


def _folded_line(run: FoldedRun) -> bytes:
    return json.dumps(run._asdict()).encode() + b"\n"


def _run_ids_in_use(is_wanted: Callable[[Any], bool]) -> set[str]:
    found = set()
    for pid in processes.all_pids():
        run_id = processes.value_in(processes.raw_environ(pid), RUN_ID_VARIABLE)
        if run_id is not None and is_wanted(run_id):
            found.add(run_id)
    return found


def _replace(path: str, data: bytes) -> bool:
    """Replace the file by another one, in one step for every reader; whether that worked."""
    directory, name = os.path.split(path)
    unnamed = os.path.join(directory, f".{name}.{os.urandom(4).hex()}")
    try:
        fd = files.create_exclusive(unnamed, 0o600)
        try:
            files.write_all(fd, data)
        finally:
            os.close(fd)
        os.rename(unnamed, path)
    except OSError:  # no space, say, or somebody took it for what a crash had left
        with contextlib.suppress(OSError):
            os.unlink(unnamed)
        return False
    return True
