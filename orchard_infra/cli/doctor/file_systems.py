"""Which file system a path is on, and what that means for a lock there."""

from __future__ import annotations

import os
from pathlib import Path

import attrs

from orchard_infra.cli.doctor.base import Level, Verdict


@attrs.frozen
class FileSystem:
    """The file system that a path is on, from proc_pid_mountinfo(5)."""

    type: str
    mount_point: str
    options: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.type or "an unknown file system"

    def judge(self) -> Verdict:
        """What to expect of a lock here, given that flock(2) excludes between two processes."""
        text = f"excludes between two processes on {self.name}, mounted at {self.mount_point}"
        if self.type in ("nfs", "nfs4"):
            # nfs(5): Linux sends flock(2) to the server as a lock of the whole file.
            shown = sorted(
                option
                for option in self.options
                if option.startswith(("vers=", "local_lock=")) or option in ("lock", "nolock")
            )
            text += f" ({', '.join(shown)})" * bool(shown)
            if self.options & {"nolock", "local_lock=all", "local_lock=flock"}:
                return self._this_host_only(text)
            return Level.OK, f"{text}; between hosts as well, if the server keeps locks"
        if self.type == "lustre":
            # mount.lustre(8): flock, localflock, noflock.
            if "localflock" in self.options:
                return self._this_host_only(f"{text} (localflock)")
            return Level.OK, f"{text}; between hosts as well"
        if self.type == "overlay":
            return Level.OK, f"{text}; other containers, and the host, do not see this file"
        if self.type.startswith("fuse.") or self.type in ("9p", "virtiofs", "cifs", "smb3"):
            return Level.OK, f"{text}; whether other hosts see the lock was not tried"
        return Level.OK, text

    def _this_host_only(self, text: str) -> Verdict:
        return (
            Level.WARNING,
            f"{text}: a run on another host does not see the lock",
            "Run on one host only, or choose a lock_file_path on another file system",
        )


def read_mountinfo() -> str:
    """The mounts that this process sees; empty where there is no such file."""
    try:
        return Path("/proc/self/mountinfo").read_text("utf-8", errors="surrogateescape")
    except OSError:
        return ""


def file_system_at(path: Path, mountinfo: str) -> FileSystem:
    """The file system of ``path``: that of the nearest mount point above it.

    The device number does not identify every file system: see `files.file_system_of`.
    """
    where = os.path.realpath(path)
    best = FileSystem("", "/")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        try:
            mount_point = _unescape(left.split(" ")[4])
            options = left.split(" ")[5].split(",")
            kind, _, super_options = right.split(" ", 2)
        except (IndexError, ValueError):
            continue
        above = mount_point.rstrip("/") + "/"
        # A later mount hides an earlier one at the same place.
        if (where + "/").startswith(above) and len(mount_point) >= len(best.mount_point):
            best = FileSystem(kind, mount_point, frozenset((*options, *super_options.split(","))))
    return best


def _unescape(field: str) -> str:
    """A field of mountinfo, where spaces and the like are written in octal."""
    for octal, char in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        field = field.replace(octal, char)
    return field
