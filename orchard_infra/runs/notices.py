"""What rank 0 of a job leaves for ranks that come later: it did not get the lock, or it is through.

Without it they would sit in ``init_process_group`` until that gives up: a refused job took 34 s to
end. A notice is one file for each job and project, beside the records. The next run on this host
removes it once the launcher's process has gone.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal, get_args

import attrs

from orchard_infra.errors import EnvironmentLockedError, InfrastructureError
from orchard_infra.launch import launcher_of
from orchard_infra.runs.record import RECORD_LIMIT, RunRecord, Survivor, from_json, to_json
from orchard_infra.system import files, processes

SUFFIX = ".notice"
_LASTS = 86400.0  # seconds, where nobody can tell whether the launcher lives


Outcome = Literal["locked", "failed", "left", "stopped"]


@attrs.frozen(eq=False, repr=False)
class Notice:
    """What became of rank 0, whose record this has.

    ``outcome`` is "locked" if another run had the lock; ``holder``, ``survivors``, ``lock_path``
    and ``reason`` are those of its error then. It is "failed" if it did not get the lock for any
    other reason, or had it and ended with an error, and "left" if it ended well; "stopped" if it
    did so because it was asked to stop. ``at`` is in epoch seconds.
    """

    record: RunRecord
    outcome: Outcome
    message: str = ""
    lock_path: str | None = None
    holder: RunRecord | None = None
    survivors: tuple[Survivor, ...] = ()
    reason: str | None = None
    at: float = attrs.field(factory=time.time)

    @classmethod
    def of(cls, error: BaseException, record: RunRecord) -> Notice:
        """Rank 0, with this record, did not get the lock."""
        if isinstance(error, EnvironmentLockedError):
            return cls(
                record,
                "locked",
                str(error),
                lock_path=error.lock_path,
                holder=error.holder,
                survivors=tuple(error.survivors),
                reason=error.reason,
            )
        told = str(error) or type(error).__name__
        if isinstance(error, GeneratorExit):  # a signal has ended the wait, and so the generator
            told = "interrupted while it waited"
        return cls(record, "failed", f"did not get the lock: {told}")

    @classmethod
    def at_end(
        cls, error: BaseException | None, record: RunRecord, *, is_stopped: bool = False
    ) -> Notice:
        """Rank 0, with this record, has left its environment: well, by an error or by `sys.exit`.
        ``is_stopped`` says that it was asked to stop before.
        """
        if error is None or (isinstance(error, SystemExit) and not error.code):
            return cls(record, "stopped" if is_stopped else "left")
        told = f"{type(error).__name__}: {error}".removesuffix(": ")
        return cls(record, "failed", f"has left its environment with {told[:1000]}")

    @property
    def error(self) -> InfrastructureError | None:
        """What another rank is to raise: rank 0's own error, if another run had the lock."""
        if self.outcome in ("left", "stopped"):
            return None
        if self.outcome == "failed":
            return InfrastructureError(f"rank 0 of this job (pid {self.record.pid}) {self.message}")
        return EnvironmentLockedError(
            self.message,
            holder=self.holder,
            survivors=self.survivors,
            lock_path=self.lock_path,
            reason=self.reason,
        )


@attrs.frozen(eq=False, repr=False)
class Notices:
    """The notices in one registry's directory. Each is of a job and of one of its projects."""

    directory: Path

    def leave(self, notice: Notice) -> None:
        """Write it down, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        path = self._path(notice.record)
        unnamed = f"{path}.{os.urandom(4).hex()}"
        fd = files.create_exclusive(unnamed, 0o600)
        try:
            files.write_whole(fd, _to_json(notice))
            os.rename(unnamed, path)
        except BaseException:
            os.unlink(unnamed)
            raise
        finally:
            os.close(fd)

    def find(self, record: RunRecord) -> Notice | None:
        """What rank 0 has left for this rank, of the same job and project."""
        return self._read(self._path(record))

    def collect(self, name: str) -> None:
        """Remove the file of this name if the launcher of its job is gone."""
        path = os.path.join(self.directory, name)
        notice = self._read(path)
        try:
            is_old = time.time() - os.lstat(path).st_mtime > _LASTS
            if is_old or (notice is not None and _launcher_is_dead(notice.record.job)):
                os.unlink(path)
        except OSError:
            pass  # gone since

    def _path(self, record: RunRecord) -> str:
        import hashlib  # loads OpenSSL

        what = os.fsencode(f"{record.job}\0{record.project}")
        digest = hashlib.blake2b(what, digest_size=12).hexdigest()
        return os.path.join(self.directory, digest + SUFFIX)

    def _read(self, path: str) -> Notice | None:
        try:
            fd = files.open_existing(path, os.O_RDONLY)
        except (OSError, InfrastructureError):
            return None
        try:
            notice = _from_json(files.read_bounded(fd, 4 * RECORD_LIMIT))
            return notice if self._path(notice.record) == path else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        finally:
            os.close(fd)


def _to_json(notice: Notice) -> bytes:
    def line(record: RunRecord | None) -> str | None:
        return None if record is None else to_json(record).decode()

    return json.dumps(
        {
            **attrs.asdict(notice, recurse=False),
            "record": line(notice.record),
            "holder": line(notice.holder),
            "survivors": [attrs.asdict(survivor) for survivor in notice.survivors[:100]],
        }
    ).encode()


def _from_json(data: bytes) -> Notice:
    found: dict[str, Any] = json.loads(data)

    def record(name: str) -> RunRecord | None:
        line = found[name]
        return None if line is None else from_json(str(line).encode())[0]

    of_rank_0 = record("record")
    if of_rank_0 is None:
        raise ValueError("a notice of nobody")
    if found["outcome"] not in get_args(Outcome):
        raise ValueError("an outcome that this version does not know")
    return Notice(
        record=of_rank_0,
        message=str(found["message"])[:RECORD_LIMIT],
        outcome=found["outcome"],
        lock_path=None if found["lock_path"] is None else str(found["lock_path"]),
        holder=record("holder"),
        survivors=tuple(Survivor(**survivor) for survivor in found["survivors"]),
        reason=None if found.get("reason") is None else str(found["reason"])[:RECORD_LIMIT],
        at=float(found["at"]),
    )


def _launcher_is_dead(job: str | None) -> bool:
    launcher = launcher_of(job)
    return launcher is not None and not processes.is_alive(launcher)
