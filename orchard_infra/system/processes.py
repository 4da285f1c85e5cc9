"""What a process is: identity, liveness, family, and what can be read of it.

Everything here only looks. A process can end between two looks, so every reader answers None
(or nothing) for a process that is gone or not ours to read, and never raises for it.

Linux is read straight from proc(5), since a prepare looks at every process of the machine;
psutil serves every other platform, and every question that is asked about few processes.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Set
from pathlib import Path

import attrs
import psutil

_LINUX = sys.platform == "linux"
_TICKS = os.sysconf("SC_CLK_TCK") if _LINUX else 0


@attrs.frozen(order=True)
class ProcessIdentity:
    """One process, told from all others that have had or will have its pid.

    ``create_time`` is in seconds: since the boot on Linux (field 22 of ``/proc/PID/stat``), where
    it does not move when the clock is set; since the epoch elsewhere. Compare it for equality
    only, and across machines not at all.
    """

    pid: int
    create_time: float


@attrs.frozen
class Stat:
    """The line of ``/proc/PID/stat`` that identifies a process: see proc(5)."""

    name: str
    state: str
    ppid: int
    create_time: float
    threads: int = 1


def read_stat(pid: int) -> Stat | None:
    """The state, parent and create time of a process; None when there is no such process."""
    if not _LINUX:
        return _psutil_stat(pid)
    data = _read(f"/proc/{pid}/stat")
    if data is None:
        return None
    # The name may hold spaces and parentheses: count from the last parenthesis.
    name_end = data.rfind(b")")
    name = data[data.find(b"(") + 1 : name_end].decode(errors="replace")
    fields = data[name_end + 2 :].split(None, 20)
    return Stat(name, fields[0].decode(), int(fields[1]), int(fields[19]) / _TICKS, int(fields[17]))


def identity_of(pid: int) -> ProcessIdentity | None:
    """The identity of the process that has this pid now, also of a defunct one."""
    stat = read_stat(pid)
    return None if stat is None else ProcessIdentity(pid, stat.create_time)


def is_alive(identity: ProcessIdentity) -> bool:
    """Whether this very process still runs. A defunct one does not: it only waits to be reaped."""
    stat = read_stat(identity.pid)
    return stat is not None and stat.create_time == identity.create_time and not is_defunct(stat)


def is_running(pid: int) -> bool:
    """Whether there is a process with this pid now, and it is more than defunct."""
    stat = read_stat(pid)
    return stat is not None and not is_defunct(stat)


def is_defunct(stat: Stat) -> bool:
    """Whether the process is dead and not yet reaped (states Z and X of proc(5)).

    A process shows its first thread's state, and may live on in the others without that one.
    """
    return stat.state in ("Z", "X") and stat.threads <= 1


def now() -> float:
    """The present, on the clock of `ProcessIdentity.create_time`, no finer than its tick."""
    if not _LINUX:
        return time.time()
    return math.floor(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS) / _TICKS


def all_pids() -> list[int]:
    """The pids of every process that can be seen from here."""
    if not _LINUX:
        return psutil.pids()
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read_cmdline(pid: int) -> bytes:
    """The arguments of a process as the kernel has them, NUL-terminated; empty when unknown.

    Defunct processes and kernel threads have none. A process may overwrite its own.
    """
    if not _LINUX:
        return b"".join(os.fsencode(word) + b"\0" for word in _psutil_cmdline(pid))
    return _read(f"/proc/{pid}/cmdline") or b""


def split_cmdline(cmdline: bytes) -> tuple[str, ...]:
    """The argument vector, empty arguments included, undecodable bytes as surrogates."""
    if not cmdline:
        return ()
    return tuple(os.fsdecode(word) for word in cmdline.removesuffix(b"\0").split(b"\0"))


def read_environ(pid: int) -> dict[str, str] | None:
    """The environment a process was *started* with; None where we may not read it.

    What a program puts into its own environment later shows in the processes that it starts by
    exec, not here and not in its forked children.
    """
    data = raw_environ(pid)
    if data is None:
        return None
    pairs = (os.fsdecode(entry).partition("=") for entry in data.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def started_with(pid: int, variable: str, values: Container[str]) -> str | None:
    """Which of ``values`` the process was started with in ``variable``, or None.

    Cheap enough to be asked of every process: next to nothing is decoded.
    """
    data = raw_environ(pid)
    name = os.fsencode(f"{variable}=")
    if data is None or name not in data:
        return None
    for entry in data.split(b"\0"):
        if entry.startswith(name):
            value = os.fsdecode(entry.removeprefix(name))
            return value if value in values else None
    return None


def raw_environ(pid: int) -> bytes | None:
    """What `read_environ` decodes: ``NAME=value`` entries, each ended by a NUL."""
    if not _LINUX:
        environ = _psutil_environ(pid)
        if environ is None:
            return None
        return b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environ.items())
    return _read(f"/proc/{pid}/environ")


def read_cwd(pid: int) -> str | None:
    """The working directory of a process; None where we may not know it, or it was removed."""
    try:
        if not _LINUX:
            return psutil.Process(pid).cwd() or None
        cwd = os.readlink(f"/proc/{pid}/cwd")
    except (psutil.Error, OSError):
        return None
    return None if cwd.endswith(" (deleted)") else cwd


def owner_of(pid: int) -> int | None:
    """The user id that owns a process, by the cheapest look there is; None when it is gone.

    A process that may not be traced shows as root's, see proc(5): good enough to leave out what
    is not ours, and no proof that something is.
    """
    try:
        if not _LINUX:
            return int(psutil.Process(pid).uids().effective)
        return os.stat(f"/proc/{pid}").st_uid
    except (psutil.Error, OSError, AttributeError):
        return None


def read_uids(pid: int) -> tuple[int, int] | None:
    """The real and effective user ids of a process; None on a platform without, or when gone."""
    try:
        uids = psutil.Process(pid).uids()
    except (psutil.Error, OSError, AttributeError):
        return None
    return uids.real, uids.effective


def pid_namespace(pid: int | str = "self") -> int:
    """The inode of the process's pid namespace; 0 where there is none or we may not know.

    Our own is 0, too, when /proc is that of another namespace (`unshare --pid` without a mount):
    its numbers are not those that kill(2) takes.
    """
    try:
        if pid == "self" and os.readlink("/proc/self") != str(os.getpid()):
            return 0
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return 0


def is_own_pid_namespace(namespace: int) -> bool:
    """Whether our own pids are those of this namespace. What is not known (0) is not ours, but
    on a platform without namespaces everything is.
    """
    return namespace == pid_namespace() and (namespace != 0 or not _LINUX)


@functools.cache
def boot_id() -> str:
    """The kernel's name for this boot; empty where it has none. See random(4)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def ancestors(pid: int) -> Iterator[int]:
    """The parent of a process, its parent, and so on up to the first process."""
    seen = {pid}
    stat = read_stat(pid)
    while stat is not None and stat.ppid not in seen and stat.ppid > 0:
        yield stat.ppid
        seen.add(stat.ppid)
        stat = read_stat(stat.ppid)


def descendants(roots: Iterable[int]) -> dict[int, ProcessIdentity]:
    """The live processes below ``roots`` (their children, and theirs), without the roots.

    Read from one scan of all parents. The per-process list of children in proc(5) is cheaper,
    but may miss a child while another one exits, and who is missed here may be shot later.
    """
    return below(roots, parents())


def parents() -> dict[int, tuple[int, float]]:
    """The parent and the create time of every live process, by pid: one look at each."""
    found: dict[int, tuple[int, float]] = {}
    for pid in all_pids():
        if not _LINUX:
            stat = _psutil_stat(pid)
            if stat is not None and not is_defunct(stat):
                found[pid] = stat.ppid, stat.create_time
            continue
        # As `read_stat` does, without an object for each: this is what a release waits for.
        data = _read(f"/proc/{pid}/stat")
        if data is not None:
            fields = data[data.rfind(b")") + 2 :].split(None, 20)
            if fields[0] not in (b"Z", b"X") or int(fields[17]) > 1:
                found[pid] = int(fields[1]), int(fields[19]) / _TICKS
    return found


def below(
    roots: Iterable[int], parents: Mapping[int, tuple[int, float]]
) -> dict[int, ProcessIdentity]:
    """What `descendants` finds, from a scan that was made before."""
    children: dict[int, list[int]] = {}
    for pid, (ppid, _) in parents.items():
        children.setdefault(ppid, []).append(pid)
    found: dict[int, ProcessIdentity] = {}
    pending = list(roots)
    while pending:
        for child in children.get(pending.pop(), ()):
            if child not in found:
                found[child] = ProcessIdentity(child, parents[child][1])
                pending.append(child)
    return found


def children_of(pid: int) -> set[int]:
    """The children of a process, by a cheap look that may miss one while another one exits."""
    if _LINUX:
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            return set()
        lists = [_read(f"/proc/{pid}/task/{thread}/children") for thread in threads]
        known = [children for children in lists if children is not None]
        # Else a thread has ended meanwhile, or the kernel is without CONFIG_PROC_CHILDREN.
        if len(known) == len(lists):
            return set(map(int, b" ".join(known).split()))
    return {child for child in all_pids() if (stat := read_stat(child)) and stat.ppid == pid}


def has_open(
    pid: int,
    files: Set[tuple[int, int]],
    *,
    names: Mapping[tuple[int, int], str] | None = None,
) -> tuple[int, int] | None:
    """Which of these files, named by (device, inode), a process has open; None for none of them.

    The link under ``/proc/PID/fd`` leads to the file itself, also when its name is gone. With
    ``names`` the file has to have that name as well: the number of an inode goes to a new file as
    soon as the old one is removed.
    """
    for fd, file in _open_files(pid):
        if file in files and (names is None or _name_of_open(pid, fd) == names[file]):
            return file
    return None


def has_inherited(pid: int, files: Mapping[tuple[int, int], int]) -> tuple[int, int] | None:
    """Which of these files a process has open by way of the process that locked it, or None.

    Each file, named by (device, inode), comes with the pid that locked it. Whoever opens the file
    by itself gets a description of its own, without that lock: a reader has inherited nothing.
    See proc_pid_fdinfo(5); the pid that it shows is 0 when that process is not to be seen here.
    """
    for fd, file in _open_files(pid):
        if file not in files:
            continue
        for line in (_read(f"/proc/{pid}/fdinfo/{fd}") or b"").splitlines():
            match line.split():  # lock: 1: FLOCK ADVISORY WRITE 4242 fe:00:1234 0 EOF
                case [b"lock:", _, b"FLOCK", _, b"WRITE", locker, *_]:
                    if int(locker) in (0, files[file]):
                        return file
    return None


def _open_files(pid: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The number of each open descriptor, with the device and inode of its file."""
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                try:
                    stat = os.stat(entry.path)
                except OSError:
                    continue
                yield entry.name, (stat.st_dev, stat.st_ino)
    except OSError:
        return


def _name_of_open(pid: int, fd: str) -> str | None:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/fd/{fd}").removesuffix(" (deleted)"))
    except OSError:
        return None


def _read(path: str) -> bytes | None:
    """A whole file of proc(5), by raw reads: `open` costs five times as much."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.read(fd, 65536)
        if len(data) < 2048:  # a list stops short of a page when its next entry does not fit
            return data
        chunks = [data]
        while data:
            data = os.read(fd, 65536)
            chunks.append(data)
        return b"".join(chunks)
    except OSError:
        return None
    finally:
        os.close(fd)


def _psutil_stat(pid: int) -> Stat | None:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            state = {psutil.STATUS_ZOMBIE: "Z", psutil.STATUS_DEAD: "X", psutil.STATUS_STOPPED: "T"}
            return Stat(
                process.name(),
                state.get(process.status(), "R"),
                process.ppid(),
                process.create_time(),
            )
    except (psutil.Error, OSError):
        return None


def _psutil_cmdline(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except (psutil.Error, OSError):
        return []


def _psutil_environ(pid: int) -> dict[str, str] | None:
    try:
        return psutil.Process(pid).environ()
    except (psutil.Error, OSError):
        return None
