"""Temporary artifacts: a run's own directory, its half-written outputs, what dead runs left.

Files are removed on proof, as processes are stopped on proof. Directories are walked by
descriptor: no link is followed at any depth, also when somebody puts one there meanwhile, and
nothing is removed from a file system that is mounted inside.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Protocol

import attrs

from orchard_infra.errors import InfrastructureError
from orchard_infra.system import processes
from orchard_infra.system.files import describe_kind, owner_name
from orchard_infra.system.text import printable

_PREFIX = "orchard-infra-"
_SHARED_MEMORY = "/dev/shm"
# Names with the pid of the process that made the file: tensors that torch shares under its
# file_system strategy, the registration of LLVM's OpenMP runtime, arenas of multiprocessing.
# Others (psm_*, sem.*, nccl-*) do not say whose they are.
_WITH_PID = re.compile(r"(torch_|__KMP_REGISTERED_LIB_|pym-)(\d{1,10})[_-]\w+", re.ASCII)
_TORCH_MANAGER = "torch_shm_manager"[:15]  # as much of a name as the kernel keeps
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of Linux
_DEPTH = 60  # directories: each open one costs two descriptors
_PASSES = 3
_TOLD = 20  # failures

_CAN_WALK = os.scandir in os.supports_fd and os.unlink in os.supports_dir_fd  # not on Windows
_DIRECTORY = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)  # and O_RDONLY, 0
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class DeadRun(Protocol):
    """What `Cleaner.collect` needs of a run that is proven dead: a `RunRecord` will do."""

    @property
    def run_id(self) -> str: ...

    @property
    def tmp_dir(self) -> str | None: ...


@attrs.frozen
class CleanReport:
    """What was removed (directories count as one), what was left on purpose, the disk space or
    memory that came free in bytes, and what could not be removed, in words.
    """

    removed: tuple[Path, ...] = ()
    kept: tuple[Path, ...] = ()
    bytes_freed: int = 0
    failures: tuple[str, ...] = ()


class Cleaner(Protocol):
    """Provides a run's directory for temporary artifacts, and removes what runs leave."""

    def tmp_dir_for(self, run_id: str) -> Path:
        """Where the directory of this run will be. Nothing is made: it goes on record first."""
        ...

    def open(self, tmp_dir: Path) -> None:
        """Make the directory.

        Raises:
            InfrastructureError: It cannot be made, or something is there already.
        """
        ...

    def close(self, tmp_dir: Path, *, failed: bool, since: float) -> CleanReport:
        """Remove what `open` made, and what else a run leaves that began at ``since`` (seconds
        since the epoch). Called once for each `open`, also for one that was interrupted.
        """
        ...

    def collect(self, dead: Iterable[DeadRun]) -> CleanReport:
        """Remove what runs left that ended without a `close`. Called before a run begins."""
        ...


@attrs.frozen
class _Opened:
    pid: int
    cwd: str | None
    outer_tmpdir: str | None


def _patterns(value: str | Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    # A single string is one pattern, and not one for each of its letters: that makes "*".
    return (value,) if isinstance(value, str) else tuple(os.fspath(pattern) for pattern in value)


def _check_patterns(
    _: object, attribute: attrs.Attribute[tuple[str, ...]], value: tuple[str, ...]
) -> None:
    for pattern in value:
        *above, last = PurePath(pattern).parts or ("",)
        first = next((index for index, part in enumerate(above) if _is_magic(part)), len(above))
        named = re.sub(r"\[.[^\]]*\]|[*?.]", "", last)
        if not named or pattern.endswith(("/", os.sep)) or "\0" in pattern or ".." in above[first:]:
            raise ValueError(
                f"{attribute.name}: {pattern!r} does not say which files it is for. It has to "
                "end in a name with more to it than wildcards, such as *.tmp or out/**/*.part"
            )


@attrs.frozen
class TemporaryArtifacts:
    """One directory for each run, removed however the run ends.

    ``keep_on_error`` keeps it when the run failed. That is for a run that saw its own end: what a
    killed one left is removed by whoever prepares next.

    ``set_tmpdir`` makes it the TMPDIR of the processes that the run starts by exec. Off by
    default: caches move, and a path so long breaks AF_UNIX sockets. This process and its
    forks keep the temporary directory that they have.

    ``patterns`` are globs of half-written outputs, relative to the working directory in which the
    run began: ``*.tmp``, ``checkpoints/**/*.part``. When the run ends, well or not (what is
    complete has its final name by then), matches are removed that are regular files of our own,
    were modified since the run began, and are open in no other process. Names that begin
    with a dot match only a pattern that does, too. Links are followed up to the first
    wildcard, not after it.

    ``base`` is where the directory is made; the default is that of `tempfile`.

    ``private_shm`` says that this container shares ``/dev/shm`` with no other one. Inside a
    container, a pid that is not to be seen may well be alive outside, so shared memory of dead
    processes is removed there only on your word.
    """

    keep_on_error: bool = False
    set_tmpdir: bool = False
    patterns: tuple[str, ...] = attrs.field(
        default=(), converter=_patterns, validator=_check_patterns
    )
    base: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    private_shm: bool = attrs.field(default=False, kw_only=True)
    _opened: dict[Path, _Opened] = attrs.field(factory=dict, init=False, repr=False, eq=False)

    def tmp_dir_for(self, run_id: str) -> Path:
        """See `Cleaner.tmp_dir_for`: ``orchard-infra-<run id>`` in ``base``.

        Raises:
            InfrastructureError: There is no directory for temporary files.
        """
        return Path(os.path.abspath(self.base or _system_tmp())) / _name_for(run_id)

    def open(self, tmp_dir: Path) -> None:
        """See `Cleaner.open`. The directory is new, and no other user can look into it."""
        if self.set_tmpdir:
            _system_tmp()  # tempfile remembers it, and so keeps this process out of our directory
        # Before it is made, so that `close` finds it if a signal comes between.
        self._opened[tmp_dir] = _Opened(os.getpid(), _cwd(), os.environ.get("TMPDIR"))
        try:
            os.mkdir(tmp_dir, 0o700)
        except OSError as error:
            del self._opened[tmp_dir]
            if isinstance(error, FileExistsError):
                reason = "something has that name already; it stays untouched"
            else:
                reason = f"{error.strerror}. Set TMPDIR or base= to a directory of your own"
            raise InfrastructureError(
                f"cannot make the directory for temporary artifacts, {tmp_dir}: {reason}"
            ) from error
        if self.set_tmpdir:
            os.environ["TMPDIR"] = str(tmp_dir)

    def close(self, tmp_dir: Path, *, failed: bool, since: float) -> CleanReport:
        """See `Cleaner.close`. What this object has not made it does not remove, and a forked
        child removes nothing. Raises nothing for a file that cannot be removed.
        """
        opened = self._opened.get(tmp_dir)
        if opened is None or opened.pid != os.getpid():
            return CleanReport()
        del self._opened[tmp_dir]
        if self.set_tmpdir and os.environ.get("TMPDIR") == str(tmp_dir):
            if opened.outer_tmpdir is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = opened.outer_tmpdir
        sweep = _Sweep()
        if failed and self.keep_on_error:
            sweep.kept += [tmp_dir] if tmp_dir.is_dir() else []
        else:
            sweep.remove_directory(tmp_dir)
        for pattern in self.patterns:
            sweep.remove_outputs(opened.cwd, pattern, since)
        return sweep.report()

    def collect(self, dead: Iterable[DeadRun]) -> CleanReport:
        """See `Cleaner.collect`: directories of these runs, and shared memory of dead processes.

        Shared memory goes when the process that made it, whose pid is in its name, is dead in
        every container, nobody on this machine has it open or mapped, and no manager of torch
        lives that may keep it for a receiver. What looks dead and is not proven so is ``kept``.
        """
        return self._collect(dead, _Sweep())

    def would_collect(self, dead: Iterable[DeadRun]) -> CleanReport:
        """What `collect` would do now. Nothing is removed; ``removed`` names what would be."""
        return self._collect(dead, _Sweep(dry=True))

    def _collect(self, dead: Iterable[DeadRun], sweep: _Sweep) -> CleanReport:
        for run in dead:
            if run.tmp_dir is not None and _is_name_for(run.run_id, run.tmp_dir):
                sweep.remove_directory(Path(run.tmp_dir))
        sweep.remove_shared_memory(may=self.private_shm or _sees_every_process())
        return sweep.report()


@attrs.define(eq=False)
class _Sweep:
    """Removes, and keeps account of it; ``dry`` only keeps account."""

    dry: bool = False
    removed: list[Path] = attrs.field(factory=list)
    kept: list[Path] = attrs.field(factory=list)
    bytes_freed: int = 0
    failures: list[str] = attrs.field(factory=list)
    _top: int = -1
    _mount: tuple[int, bytes] = (0, b"")
    _moved: int = 0

    def report(self) -> CleanReport:
        return CleanReport(
            tuple(self.removed), tuple(self.kept), self.bytes_freed, tuple(self.failures)
        )

    def remove_directory(self, path: Path) -> None:
        """Remove a directory of our own with all that is in it. A missing one is no failure."""
        try:
            found = os.lstat(path)
            _refuse_unless_ours(found, stat.S_ISDIR(found.st_mode))
            if self.dry:
                self._weigh(path)
                return
            if not _CAN_WALK:
                self._remove_by_path(path)
                return
            with _opened_directory(path.parent, getattr(os, "O_PATH", os.O_RDONLY)) as parent:
                # A directory on which something is mounted is not ours to empty, at any depth.
                self._mount = _mount_of(parent, os.fstat(parent))
                if self._remove_below(parent, path.name, path, depth=0):
                    self.removed.append(path)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:  # ValueError: NUL, or no such text in file names
            self._fail(path, error)

    def remove_outputs(self, cwd: str | None, pattern: str, since: float) -> None:
        """Remove what matches a pattern and was written since then by ourselves."""
        *parts, last = PurePath(pattern).parts
        root = Path()
        while parts and not _is_magic(parts[0]):
            root /= parts.pop(0)
        if not root.is_absolute():
            if cwd is None:
                self.failures.append(f"{pattern}: the run began in a directory that was gone")
                return
            root = cwd / root
        if not _CAN_WALK:
            self.failures.append(f"{printable(pattern)}: patterns need a POSIX system")
            return
        try:
            with _opened_directory(root) as directory:
                self._remove_matches(directory, root, [*parts, last], since, depth=0)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            self._fail(root, error)

    def remove_shared_memory(self, *, may: bool) -> None:
        """Remove the shared memory of dead processes, as far as that is proven."""
        if not _CAN_WALK:
            return
        try:
            with _opened_directory(_SHARED_MEMORY) as directory:
                # Listed before we look who lives: who comes now makes files of its own.
                found = list(filter(None, map(_WITH_PID.fullmatch, os.listdir(directory))))
                if found:
                    self._remove_of_the_dead(directory, found, may=may)
        except OSError:
            return  # there is none, or it is not for us

    def _remove_of_the_dead(self, directory: int, found: list[re.Match[str]], *, may: bool) -> None:
        # Mostly they belong to processes that can be seen to live: no need to look at all.
        found = [match for match in found if not processes.is_running(int(match[2]))]
        if not found:
            return
        alive, torch_manager_lives = _living()
        for match in found:
            kind, pid = match.groups()
            name = match.string
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if int(pid) in alive or not _is_ours(status, stat.S_ISREG(status.st_mode)):
                    continue
                in_flight = kind == "torch_" and torch_manager_lives
                if may and not in_flight and _is_open(directory, name) is False:
                    self._unlink(directory, name, status)
                    self.removed.append(Path(_SHARED_MEMORY, name))
                else:
                    self.kept.append(Path(_SHARED_MEMORY, name))
            except FileNotFoundError:
                continue
            except OSError as error:
                self._fail(Path(_SHARED_MEMORY, name), error)

    def _remove_below(self, parent: int, name: str, path: Path, depth: int) -> bool:
        """Remove the directory with this name in ``parent``; whether it is gone."""
        try:
            directory = _open_own_directory(parent, name)
        except FileNotFoundError:
            return True
        except OSError as error:
            self._fail(path, error)
            return False
        try:
            status = os.fstat(directory)
            if depth == 0:
                _refuse_unless_ours(status, True)
                self._top = directory
            if _mount_of(directory, status) != self._mount:
                raise OSError(errno.EBUSY, "something is mounted here, and stays")
            if status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
                os.fchmod(directory, stat.S_IRWXU)
            passes = _PASSES
            while passes:
                moved = self._moved
                if not self._empty(directory, path, depth):
                    return False
                try:
                    os.rmdir(name, dir_fd=parent)
                    return True
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                if moved == self._moved:
                    passes -= 1
            raise OSError(errno.ENOTEMPTY, "somebody keeps writing into it")
        except FileNotFoundError:
            return True
        except OSError as error:
            self._fail(path, error)
            return False
        finally:
            os.close(directory)

    def _empty(self, directory: int, path: Path, depth: int) -> bool:
        """Remove what is in a directory, entry by entry as they are read: there may be millions."""
        emptied = True
        with os.scandir(directory) as entries:
            for entry in entries:
                name = entry.name
                try:
                    if not entry.is_dir(follow_symlinks=False):
                        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                        self._unlink(directory, name, status)
                    elif depth < _DEPTH:
                        emptied &= self._remove_below(directory, name, path / name, depth + 1)
                    else:
                        # Too deep to go on with open descriptors: it has its turn at the top.
                        self._moved += 1
                        lifted = f"{self._moved}.{os.urandom(4).hex()}"
                        os.rename(name, lifted, src_dir_fd=directory, dst_dir_fd=self._top)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    self._fail(path / name, error)
                    emptied = False
        return emptied

    def _remove_matches(
        self, directory: int, path: Path, parts: list[str], since: float, depth: int
    ) -> None:
        head, *rest = parts
        deeper = rest
        if head == "**":
            self._remove_matches(directory, path, rest, since, depth)
            head, deeper = "*", parts
        with os.scandir(directory) as entries:
            names = [
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if fnmatchcase(entry.name, head)
                and (head.startswith(".") or not entry.name.startswith("."))
            ]
        for name, is_directory in names:
            try:
                if not deeper:
                    self._remove_output(directory, name, path / name, since)
                elif is_directory:
                    if depth == _DEPTH:
                        raise OSError(errno.ELOOP, "too deep, not searched")
                    below = os.open(name, _DIRECTORY | _NOFOLLOW, dir_fd=directory)
                    try:
                        self._remove_matches(below, path / name, deeper, since, depth + 1)
                    finally:
                        os.close(below)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._fail(path / name, error)

    def _remove_output(self, directory: int, name: str, path: Path, since: float) -> None:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not _is_ours(status, stat.S_ISREG(status.st_mode)) or status.st_mtime < since:
            return
        # A frame of the exception may hold it open in this very process.
        here = frozenset([(status.st_dev, status.st_ino)])
        if _is_open(directory, name) and not processes.has_open(os.getpid(), here):
            self.kept.append(path)
            return
        self._unlink(directory, name, status)
        self.removed.append(path)

    def _unlink(self, directory: int, name: str, status: os.stat_result) -> None:
        if not self.dry:
            os.unlink(name, dir_fd=directory)
        if status.st_nlink == 1:
            self.bytes_freed += status.st_blocks * 512

    def _weigh(self, directory: Path) -> None:
        for path, _, names in os.walk(directory):
            for name in names:
                with contextlib.suppress(OSError):
                    status = os.lstat(os.path.join(path, name))
                    if status.st_nlink == 1:
                        self.bytes_freed += status.st_blocks * 512
        self.removed.append(directory)

    def _remove_by_path(self, path: Path) -> None:
        import shutil

        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            raise OSError(errno.ENOTEMPTY, "could not be removed whole")
        self.removed.append(path)

    def _fail(self, path: Path, error: OSError | ValueError) -> None:
        reason = error.strerror if isinstance(error, OSError) else error
        if len(self.failures) < _TOLD:
            self.failures.append(printable(f"{path}: {reason}"))
        elif len(self.failures) == _TOLD:
            self.failures.append("and more")


@contextlib.contextmanager
def _opened_directory(path: str | Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of a directory that the user or the system has named: links are followed."""
    directory = os.open(path, flags | _DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)


def _open_own_directory(parent: int, name: str) -> int:
    """Open a directory, not a link, even where its mode keeps its owner out."""
    try:
        return os.open(name, _DIRECTORY | _NOFOLLOW, dir_fd=parent)
    except PermissionError:
        if not hasattr(os, "O_PATH"):
            raise
    # Changed by descriptor: chmod by name would follow a link.
    handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{handle}", stat.S_IRWXU)
    finally:
        os.close(handle)
    return os.open(name, _DIRECTORY | _NOFOLLOW, dir_fd=parent)


def _mount_of(directory: int, status: os.stat_result) -> tuple[int, bytes]:
    """What tells one mount from another: the device, and the number of the mount.

    A directory that is mounted from the same file system (mount --bind) has the same device.
    """
    try:
        with open(f"/proc/self/fdinfo/{directory}", "rb") as lines:
            number = next((line for line in lines if line.startswith(b"mnt_id:")), b"")
    except OSError:
        number = b""
    return status.st_dev, number


def _is_open(directory: int, name: str) -> bool | None:
    """Whether any process of this machine has a file open or mapped; None when that is unknown.

    The kernel grants a write lease on a file that nobody else has open, and a mapping keeps a
    file open: see F_SETLEASE in fcntl(2). It knows of every user and every container.
    """
    try:
        import fcntl

        signum, lease = fcntl.F_SETSIG, fcntl.F_SETLEASE
    except (ImportError, AttributeError):  # no Linux
        return None
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | _NOFOLLOW, dir_fd=directory)
    except BlockingIOError:  # somebody else has a lease on it
        return True
    except OSError:
        return None
    try:
        # Whoever opens the file right now makes the kernel tell us: by SIGIO, which kills.
        fcntl.fcntl(fd, signum, signal.SIGURG)
        fcntl.fcntl(fd, lease, fcntl.F_WRLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


def _living() -> tuple[set[int], bool]:
    """Every pid in use, in our pid namespace and in those inside it, and whether a manager of
    torch's shared memory lives. See NSpid in proc_pid_status(5).
    """
    pids: set[int] = set()
    manager_lives = False
    for pid in processes.all_pids():
        stat = processes.read_stat(pid)
        if stat is None or processes.is_defunct(stat):
            continue
        pids.add(pid)
        manager_lives |= stat.name == _TORCH_MANAGER
        try:
            with open(f"/proc/{pid}/status", "rb") as lines:
                inner = next((line for line in lines if line.startswith(b"NSpid:")), b"")
        except OSError:
            continue
        pids.update(map(int, inner.split()[1:]))
    return pids, manager_lives


def _sees_every_process() -> bool:
    """Whether a pid that is not to be seen here is in use nowhere on this machine."""
    return processes.pid_namespace() == _INITIAL_PID_NAMESPACE


def _is_ours(status: os.stat_result, right_kind: bool) -> bool:
    return right_kind and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())


def _refuse_unless_ours(status: os.stat_result, is_directory: bool) -> None:
    if not is_directory:
        raise OSError(
            errno.ENOTDIR, f"{describe_kind(status.st_mode)} is there in place of the directory"
        )
    if not _is_ours(status, True):
        raise OSError(errno.EPERM, f"belongs to {owner_name(status.st_uid)}, not to you")


def _name_for(run_id: str) -> str:
    # A number would make the name of a user's runtime directory.
    if not (run_id.isascii() and run_id.isalnum()) or (run_id.isdecimal() and len(run_id) <= 10):
        raise ValueError(f"not the id of a run: {run_id!r}")
    return _PREFIX + run_id


def _is_name_for(run_id: str, tmp_dir: str) -> bool:
    try:
        return os.path.isabs(tmp_dir) and os.path.basename(tmp_dir) == _name_for(run_id)
    except ValueError:
        return False


def _is_magic(part: str) -> bool:
    return any(letter in part for letter in "*?[")


def _system_tmp() -> str:
    import tempfile  # 10 ms

    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise InfrastructureError(
            "there is no directory for temporary files that can be written to: "
            "set TMPDIR or base= to one"
        ) from error


def _cwd() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None
