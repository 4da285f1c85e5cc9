"""What rank 0 of a job was refused, for the other ranks: they refuse with the same words.

Without this they would sit in ``init_process_group`` until it gives up: a refused job took 34 s to
end. A refusal is one file for each job beside the records. It goes when rank 0 gets the lock after
all, and when the launcher's process has gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import attrs

from orchard_infra.errors import EnvironmentLockedError, InfrastructureError
from orchard_infra.runs.record import RECORD_LIMIT, RunRecord, from_json, to_json
from orchard_infra.system import files, processes
from orchard_infra.system.processes import ProcessIdentity

_SUFFIX = ".refused"
_LASTS = 86400.0  # seconds, where nobody can tell whether the launcher lives


@attrs.frozen
class Refusal:
    """Why rank 0 was refused; ``restart`` is the count of its job, ``at`` is in epoch seconds."""

    job: str
    restart: int | None
    message: str
    lock_path: str | None
    holder: RunRecord | None
    at: float = attrs.field(factory=time.time)

    def error(self) -> EnvironmentLockedError:
        """The error that rank 0 raised, for another rank to raise."""
        return EnvironmentLockedError(self.message, holder=self.holder, lock_path=self.lock_path)


@attrs.frozen
class Refusals:
    """The refusals in one registry's directory."""

    directory: Path

    def leave(self, refusal: Refusal) -> None:
        """Write it down, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        holder = None if refusal.holder is None else to_json(refusal.holder).decode()
        data = json.dumps({**attrs.asdict(refusal, recurse=False), "holder": holder}).encode()
        path = self._path(refusal.job)
        unnamed = f"{path}.{os.urandom(4).hex()}"
        fd = files.create_exclusive(unnamed, 0o600)
        try:
            files.write_whole(fd, data)
            os.rename(unnamed, path)
        except BaseException:
            os.unlink(unnamed)
            raise
        finally:
            os.close(fd)

    def find(self, job: str) -> Refusal | None:
        """What rank 0 of this job was refused last, if it was."""
        return self._read(self._path(job))

    def withdraw(self, job: str) -> None:
        """Rank 0 of this job got the lock."""
        try:
            os.unlink(self._path(job))
        except OSError:
            pass

    def collect(self) -> None:
        """Remove those of jobs whose launcher is gone."""
        try:
            names = [name for name in os.listdir(self.directory) if _SUFFIX in name]
        except OSError:
            return
        for name in names:
            path = os.path.join(self.directory, name)
            refusal = self._read(path)
            try:
                is_old = time.time() - os.lstat(path).st_mtime > _LASTS
                if is_old or (refusal is not None and _launcher_is_dead(refusal.job)):
                    os.unlink(path)
            except OSError:
                continue  # gone since

    def _path(self, job: str) -> str:
        digest = hashlib.blake2b(os.fsencode(job), digest_size=12).hexdigest()
        return os.path.join(self.directory, digest + _SUFFIX)

    def _read(self, path: str) -> Refusal | None:
        try:
            fd = files.open_existing(path, os.O_RDONLY)
        except (OSError, InfrastructureError):
            return None
        try:
            found = json.loads(files.read_bounded(fd, 2 * RECORD_LIMIT))
            holder = found["holder"]
            refusal = Refusal(
                job=str(found["job"]),
                restart=None if found["restart"] is None else int(found["restart"]),
                message=str(found["message"])[:RECORD_LIMIT],
                lock_path=None if found["lock_path"] is None else str(found["lock_path"]),
                holder=None if holder is None else from_json(str(holder).encode())[0],
                at=float(found["at"]),
            )
            return refusal if self._path(refusal.job) == path else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        finally:
            os.close(fd)


def _launcher_is_dead(job: str) -> bool:
    """Whether the launcher's process that a job names is gone from this host. See `Launch.job`."""
    host, _, process = job.partition(" ")[0].rpartition(":")
    if host != f"{processes.boot_id()}:{processes.pid_namespace()}":
        return False
    pid, _, create_time = process.partition("@")
    try:
        return not processes.is_alive(ProcessIdentity(int(pid), float(create_time)))
    except ValueError:
        return False
