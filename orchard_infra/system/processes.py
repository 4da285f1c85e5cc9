"""What a process is: identity, liveness, family, and what can be read of it.

Everything here only looks. A process can end between two looks, so every reader answers None
(or nothing) for a process that is gone or not ours to read, and never raises for it.

Linux is read straight from proc(5), since a prepare looks at every process of the machine;
psutil serves every other platform. It is loaded where it is asked: a program that does nothing
under a lock would take a tenth longer.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    import psutil

_Answer = TypeVar("_Answer")

_LINUX = sys.platform == "linux"
_TICKS = os.sysconf("SC_CLK_TCK") if _LINUX else 0
# What a program opens to compute on an accelerator: CUDA, ROCm, TPUs and Gaudi, Ascend. Monitoring
# tools open others: NVML /dev/nvidia0 and /dev/nvidiactl, hl-smi /dev/accel/accel_controlD0,
# npu-smi /dev/davinci_manager.
_COMPUTE_DEVICE = r"/dev/(nvidia-uvm|kfd|accel\d+|accel/accel\d+|davinci\d+)"


class ProcessIdentity(NamedTuple):  # loads three times as fast as an attrs class
    """One process, told from all others that have had or will have its pid.

    ``create_time`` is in seconds: since the boot on Linux (field 22 of ``/proc/PID/stat``), where
    it does not move when the clock is set; since the epoch elsewhere. Compare it for equality
    only, and across machines or time namespaces not at all: the kernel adds the offset of whoever
    reads it, see time_namespaces(7).
    """

    pid: int
    create_time: float


class Stat(NamedTuple):
    """The line of ``/proc/PID/stat`` that identifies a process: see proc(5)."""

    name: str
    state: str
    ppid: int
    create_time: float
    threads: int = 1
    session: int = 0


class Row(NamedTuple):
    """What `table` has of each process. ``session`` is 0 where there are no sessions."""

    ppid: int
    create_time: float
    session: int


def read_stat(pid: int) -> Stat | None:
    """The state, parent and create time of a process; None when there is no such process."""
    if not _LINUX:
        return _ask_psutil(_stat_of, pid)
    data = _read(f"/proc/{pid}/stat")
    if data is None:
        return None
    # The name may hold spaces and parentheses: count from the last parenthesis.
    name_end = data.rfind(b")")
    name = data[data.find(b"(") + 1 : name_end].decode(errors="replace")
    fields = data[name_end + 2 :].split(None, 20)
    return Stat(
        name,
        fields[0].decode(),
        int(fields[1]),
        int(fields[19]) / _TICKS,
        int(fields[17]),
        int(fields[3]),
    )


def identity_of(pid: int) -> ProcessIdentity | None:
    """The identity of the process that has this pid now, also of a defunct one."""
    stat = read_stat(pid)
    return None if stat is None else ProcessIdentity(pid, stat.create_time)


def is_alive(identity: ProcessIdentity) -> bool:
    """Whether this very process still runs. A defunct one does not: it only waits to be reaped."""
    stat = read_stat(identity.pid)
    return stat is not None and stat.create_time == identity.create_time and not is_defunct(stat)


def is_gone(identity: ProcessIdentity) -> bool:
    """Whether this process is *proven* dead: gone, defunct, or its pid belongs to another one.

    A process in another time namespace may be the one that had another create time before: CRIU
    restores a process into a namespace of its own.
    """
    if is_alive(identity):
        return False
    if is_vacant(identity.pid):
        return True
    stat = read_stat(identity.pid)
    if stat is None or stat.create_time == identity.create_time:
        return False
    return time_namespace(identity.pid) in (0, own_time_namespace())


def is_vacant(pid: int) -> bool:
    """Whether it is *proven* that no process runs under this pid; a defunct one does not.

    That /proc does not show it proves nothing: with ``hidepid=2`` it hides the processes of other
    users, and without a free descriptor nothing can be read. kill(2) knows hidden processes, too.
    """
    stat = read_stat(pid)
    if stat is None:
        if not _exists(pid):
            return True
        stat = read_stat(pid)  # it may have started just now
    return stat is not None and is_defunct(stat)


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


@functools.cache
def own_identity() -> ProcessIdentity | None:
    """The identity of this process; None where /proc does not show it."""
    return identity_of(os.getpid())


def session_of(pid: int) -> int | None:
    """The session that a process is in, see setsid(2); None when unknown.

    It is 0 where its leader is outside of this pid namespace, as in a container that was entered
    from the host; and on Windows.

    A process with a session of its own (a daemon, a tracker, a terminal multiplexer) is meant to
    outlive the process that started it.
    """
    stat = read_stat(pid)
    return stat.session if stat is not None else None


def all_pids() -> list[int]:
    """The pids of every process that can be seen from here."""
    if not _LINUX:
        import psutil

        return psutil.pids()
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read_cmdline(pid: int) -> bytes:
    """The arguments of a process as the kernel has them, NUL-terminated; empty when unknown.

    Defunct processes and kernel threads have none. A process may overwrite its own.
    """
    if not _LINUX:
        words = _ask_psutil(lambda process: process.cmdline(), pid) or ()
        return b"".join(os.fsencode(word) + b"\0" for word in words)
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
    """Which of ``values`` the process was started with in ``variable``, or None."""
    value = value_in(raw_environ(pid), variable)
    return value if value is not None and value in values else None


def value_in(environ: bytes | None, variable: str) -> str | None:
    """The value of a variable in what `raw_environ` reads; None where it has none.

    Cheap enough to be asked of every process: next to nothing is decoded.
    """
    name = os.fsencode(f"{variable}=")
    if environ is None or name not in environ:
        return None
    for entry in environ.split(b"\0"):
        if entry.startswith(name):
            return os.fsdecode(entry.removeprefix(name))
    return None


def raw_environ(pid: int) -> bytes | None:
    """What `read_environ` decodes: ``NAME=value`` entries, each ended by a NUL."""
    if not _LINUX:
        environ = _ask_psutil(lambda process: process.environ(), pid)
        if environ is None:
            return None
        return b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environ.items())
    return _read(f"/proc/{pid}/environ")


def read_cwd(pid: int) -> str | None:
    """The working directory of a process; None where we may not know it, or it was removed."""
    if not _LINUX:
        return _ask_psutil(lambda process: process.cwd(), pid) or None
    try:
        cwd = os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return None
    return None if cwd.endswith(" (deleted)") else cwd


def executable_of(pid: int) -> str | None:
    """The file that a process executes; None where we may not know it."""
    if not _LINUX:
        return _ask_psutil(lambda process: process.exe(), pid) or None
    return _link(f"/proc/{pid}/exe") or None


def owner_of(pid: int) -> int | None:
    """The user id that owns a process, by the cheapest look there is; None when it is gone.

    A process that may not be traced shows as root's, see proc(5): good enough to leave out what
    is not ours, and no proof that something is.
    """
    if not _LINUX:
        uids = read_uids(pid)
        return None if uids is None else uids[1]
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def read_uids(pid: int) -> tuple[int, int] | None:
    """The real and effective user ids of a process; None on a platform without, or when gone."""
    if _LINUX:
        status = _read(f"/proc/{pid}/status") or b""
        _, found, rest = status.partition(b"\nUid:")
        ids = rest.split(None, 2)
        return (int(ids[0]), int(ids[1])) if found else None
    uids = _ask_psutil(lambda process: process.uids(), pid)
    return None if uids is None else (uids.real, uids.effective)


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


def sees_our_files(pid: int) -> bool:
    """Whether a path means the same file to a process as to us: same mount namespace, same root.
    False where we may not know.
    """
    if not _LINUX:
        return True
    try:
        return all(
            os.path.samestat(os.stat(f"/proc/self/{what}"), os.stat(f"/proc/{pid}/{what}"))
            for what in ("ns/mnt", "root")
        )
    except OSError:
        return False


@functools.cache
def own_pid_namespace() -> int:
    """`pid_namespace` of this process, which keeps it until its end."""
    return pid_namespace()


def is_own_pid_namespace(namespace: int) -> bool:
    """Whether our own pids are those of this namespace. What is not known (0) is not ours, but
    on a platform without namespaces everything is.
    """
    return namespace == own_pid_namespace() and (namespace != 0 or not _LINUX)


def time_namespace(pid: int | str = "self") -> int:
    """The inode of the time namespace whose clock a process reads; 0 where there is none or we may
    not know.
    """
    try:
        return os.stat(f"/proc/{pid}/ns/time").st_ino
    except OSError:
        return 0


@functools.cache
def own_time_namespace() -> int:
    """`time_namespace` of this process: create times that it reads are on that clock."""
    return time_namespace()


def host_name() -> str:
    """The name of this host, as it is now: DHCP and VPNs change it."""
    if hasattr(os, "uname"):
        return os.uname().nodename  # what gethostname(2) says; the socket module costs 3 ms
    import socket

    return socket.gethostname()


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
    return {pid: (row.ppid, row.create_time) for pid, row in table().items()}


def table() -> dict[int, Row]:
    """Every live process, by pid: one look at each."""
    found: dict[int, Row] = {}
    for pid in all_pids():
        if not _LINUX:
            stat = _ask_psutil(_stat_of, pid)
            if stat is not None and not is_defunct(stat):
                found[pid] = Row(stat.ppid, stat.create_time, stat.session)
            continue
        # As `read_stat` does, without an object for the name and the rest.
        data = _read(f"/proc/{pid}/stat")
        if data is not None:
            fields = data[data.rfind(b")") + 2 :].split(None, 20)
            if fields[0] not in (b"Z", b"X") or int(fields[17]) > 1:
                found[pid] = Row(int(fields[1]), int(fields[19]) / _TICKS, int(fields[3]))
    return found


def below(
    roots: Iterable[int], parents: Mapping[int, tuple[int, float]] | Mapping[int, Row]
) -> dict[int, ProcessIdentity]:
    """What `descendants` finds, from a scan that was made before."""
    children: dict[int, list[int]] = {}
    for pid, looked_at in parents.items():
        children.setdefault(looked_at[0], []).append(pid)
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


def has_children() -> bool:
    """Whether this process has any child, a defunct one included: one system call.

    Most programs that hold a lock for a moment have none, and need not look in /proc for them.
    """
    if not hasattr(os, "waitid"):  # Windows
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    except OSError:
        pass
    return True


def has_live_child() -> bool:
    """Whether this process certainly has a child that lives: one system call, which needs no
    descriptor. Also False while a child waits to be reaped, which hides the others.
    """
    if not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except OSError:
        return False


def tree(pid: int) -> dict[int, ProcessIdentity]:
    """The live processes below one, by the kernel's lists of children.

    Its cost does not grow with the machine as that of `descendants` does. It may miss a process
    while another one exits.
    """
    found: dict[int, ProcessIdentity] = {}
    pending = children_of(pid)
    while pending:
        child = pending.pop()
        stat = None if child in found else read_stat(child)
        if stat is not None and not is_defunct(stat):
            found[child] = ProcessIdentity(child, stat.create_time)
            pending |= children_of(child)
    return found


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


def has_inherited(
    pid: int,
    files: Mapping[tuple[int, int], int],
    *,
    names: Mapping[tuple[int, int], str] | None = None,
) -> tuple[int, int] | None:
    """Which of these files a process has open by way of the process that locked it, or None.

    Each file, named by (device, inode), comes with the pid that locked it, and ``names`` as in
    `has_open`. Whoever opens the file by itself gets a description of its own, without that lock:
    a reader has inherited nothing.
    """
    for fd, file in _open_files(pid):
        if file not in files or (names is not None and _name_of_open(pid, fd) != names[file]):
            continue
        if any(locker in (0, files[file]) for locker in _lockers(pid, fd, b"WRITE")):
            return file
    return None


def has_locked(pid: int, file: tuple[int, int]) -> bool:
    """Whether a process has locked this file itself, shared, and still has it open. A child that
    it forked has the file open, too, but its parent took the lock.
    """
    return any(
        pid in _lockers(pid, fd, b"READ") for fd, opened in _open_files(pid) if opened == file
    )


def holds_accelerator(pid: int) -> bool:
    """Whether a process has an accelerator open for computing, and so memory on it. A process that
    only monitors accelerators has not.
    """
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(re.fullmatch(_COMPUTE_DEVICE, _link(entry.path)) for entry in entries)
    except OSError:
        return False


def _lockers(pid: int, fd: str, kind: bytes) -> Iterator[int]:
    """The processes that took the flock(2) of an open file description. See proc_pid_fdinfo(5);
    it shows 0 for a process that is dead or not to be seen here.
    """
    for line in (_read(f"/proc/{pid}/fdinfo/{fd}") or b"").splitlines():
        match line.split():  # lock: 1: FLOCK ADVISORY WRITE 4242 fe:00:1234 0 EOF
            case [b"lock:", _, b"FLOCK", _, found, locker, *_] if found == kind:
                yield int(locker)


def names_of_open(pid: int) -> Iterator[str]:
    """The name of each open file, without its directory, also of one that was removed."""
    for fd, _ in _open_files(pid):
        yield _name_of_open(pid, fd)


def names_of_locked(pid: int) -> Iterator[str]:
    """The name of each file that a process has locked itself, exclusively, and still has open."""
    for fd, _ in _open_files(pid):
        if pid in _lockers(pid, fd, b"WRITE"):
            yield _name_of_open(pid, fd)


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


def _name_of_open(pid: int, fd: str) -> str:
    return os.path.basename(_link(f"/proc/{pid}/fd/{fd}").removesuffix(" (deleted)"))


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    """Whether there is a process with this pid, also one that /proc hides from us."""
    if not _LINUX:
        import psutil

        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return True


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


def _ask_psutil(question: Callable[[psutil.Process], _Answer], pid: int) -> _Answer | None:
    """What psutil says of a process; None where it does not say, and when the process is gone."""
    import psutil

    try:
        return question(psutil.Process(pid))
    except (psutil.Error, OSError, AttributeError):
        return None


def _stat_of(process: psutil.Process) -> Stat:
    state = {"zombie": "Z", "dead": "X", "stopped": "T"}
    with process.oneshot():
        return Stat(
            process.name(),
            state.get(process.status(), "R"),
            process.ppid(),
            process.create_time(),
            session=_getsid(process.pid),
        )


def _getsid(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (AttributeError, OSError):
        return 0


def _start_anew() -> None:
    """In a forked child, which is another process, maybe in another pid or time namespace."""
    own_identity.cache_clear()
    own_pid_namespace.cache_clear()
    own_time_namespace.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
