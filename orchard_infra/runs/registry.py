"""The registry: which runs there are, and whether the kernel says that they live.

Every run, a waiting one too, has a record file in the registry's directory, which it holds open
and locked for as long as it lives. The kernel drops that lock when the last process with the
open file description has gone, so:

* lock free: the run is *dead*, unless its program has closed every descriptor;
* lock held, leader alive: *running*, *waiting*, or *ended*;
* lock held, leader dead: forked children of the run still live; there are *survivors*.

Children started by exec do not inherit the descriptor. They carry the run's id in their
environment instead (`RUN_ID_VARIABLE`); setting that to the empty string opts a daemon out. The
program also writes down which processes are below it, see `orchard_infra.runs.members`.

The end of a run is not the end of its program. A run whose children live on stays on record as
*ended*, so that nobody takes them for leftovers before the program has exited. All such runs of
one program share the record of the first one: a sweep of a thousand trials with one pool must
not hold a thousand descriptors.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

import attrs

from orchard_infra.errors import InfrastructureError
from orchard_infra.runs import history, members
from orchard_infra.runs.members import FoldedRun, MembersFile, read_members
from orchard_infra.runs.record import (
    RunRecord,
    RunState,
    is_run_id,
    leader_is_dead,
    leader_lives,
    read_record,
    to_json,
)
from orchard_infra.runs.registered import SUFFIX
from orchard_infra.runs.registered import RegisteredRun as RegisteredRun
from orchard_infra.system import files, processes
from orchard_infra.system.flock import lock_descriptor, unlock_descriptor
from orchard_infra.system.processes import ProcessIdentity


@attrs.define(eq=False, repr=False)
class Registration:
    """The place of a run in the registry. This process holds it until `end`, `abandon` or `close`.
    In a forked child these only close the descriptor: the files are the parent's.
    """

    record: RunRecord
    _path: str
    _fd: int
    _file: tuple[int, int]  # device and inode
    _members: MembersFile = attrs.field(init=False)
    # Reentrant: a finalizer may leave another environment while this thread is in here.
    _lock: threading.RLock = attrs.field(factory=threading.RLock, init=False)
    _forks: int = attrs.field(init=False)  # of this process, before this run
    running_at: float | None = attrs.field(default=None, init=False)  # epoch seconds

    def __attrs_post_init__(self) -> None:
        self._members = MembersFile(_members_path(self._path))
        self._forks = _program.forks

    @property
    def path(self) -> Path:
        """The record's file."""
        return Path(self._path)

    def update(self, record: RunRecord, state: RunState) -> None:
        """Say something new of the run. One short write: a reader sees the old or the new.

        Raises:
            InfrastructureError: Nobody could read that, or the descriptor was closed.
        """
        if state is RunState.RUNNING and self.running_at is None:
            self.running_at = time.time()
        files.write_whole(self._descriptor(), _encode(record, state, self.running_at))
        self.record = record

    def note_members(self, also: Iterable[ProcessIdentity] = ()) -> None:
        """Write down the processes below this one, and ``also`` these. Each is written once.

        It costs one system call where there are no children. It may miss a process while another
        one exits. A process below one that was written down is found all the same.

        Raises:
            OSError: They cannot be written.
        """
        self._note(also)

    def _note(self, also: Iterable[ProcessIdentity] = (), *, before: bool = False) -> bool:
        """As `note_members`. Returns whether this process has children, be they defunct."""
        if not self._is_mine():
            return False
        found = list(also)
        has_children = processes.has_children()
        if has_children:
            found += processes.tree(self.record.pid).values()
        if found:
            with self._lock:
                if self._fd >= 0:  # else the run was left meanwhile, in another thread
                    self._members.add(found, before=before)
        return has_children

    def children_left(self, known: Container[int] = ()) -> list[ProcessIdentity]:
        """The live processes that were started since this run was registered, below this process
        or orphaned. They are also written down. See `membership.children_left`.
        """
        from orchard_infra.runs.membership import children_left

        here = RegisteredRun(
            self.record, RunState.RUNNING, self._file, members=self._members.as_read()
        )
        found = children_left(here, known)
        self.note_members(found)
        return found

    def touch(self) -> None:
        """Keep cleaners of old files away."""
        os.utime(self._descriptor())
        self._members.touch()
        first = _program.first_run(os.path.dirname(self._path))
        if first is not None and first is not self:
            first.touch()

    def fileno(self) -> int:
        """The descriptor that is locked, for a child that is to keep the run on record."""
        return self._descriptor()

    def end(self, left: Iterable[ProcessIdentity] = ()) -> None:
        """Leave the registry: the run ended well, and its program goes on.

        The run stays on record as ended while processes live that it started, or that are in
        ``left``. Later ones of this program are added to the record of the first.
        """
        if not self._is_mine() or not (self._is_open() or self._reopen()):
            self.close()
            return
        with _program.lock:
            try:
                has_children = self._note(left)
            except OSError:  # no descriptor or space left: the record stays, as it is
                self._stay(RunState.ENDED)
                return
            directory = os.path.dirname(self._path)
            first = _program.first_run(directory)
            known = first._members.identities if first is not None else ()
            news = [
                member
                for member in self._members.identities
                if member not in known and processes.is_alive(member)
            ]
            if first is None and (news or (has_children and processes.has_live_child())):
                self._keep_as(RunState.ENDED)
                _program.first_runs[directory] = self
            elif first is not None and news:
                self._fold_into(first, news)
            elif _program.forks != self._forks and self._is_held_by_a_fork():
                self._stay(RunState.ENDED)
            else:
                self.close()

    def abandon(self) -> None:
        """Leave the registry because the release failed. The record stays: once this process has
        ended, the run counts as crashed, and the next run cleans up after it.
        """
        if not self._is_mine() or not self._is_open():
            self.close_descriptor()
            return
        with contextlib.suppress(OSError):
            self.note_members()
        self._stay(RunState.ABANDONED)

    def close(self) -> None:
        """Leave the registry, and remove the record."""
        if self._fd < 0:
            return
        if not self._is_mine():
            self.close_descriptor()
            return
        with self._lock:
            try:
                if files.device_and_inode(os.lstat(self._path)) == self._file:
                    # Before the record goes, so that there is no moment between.
                    _stay_known(os.path.dirname(self._path), self.record.pid)
                    os.unlink(self._path)
            except FileNotFoundError:
                pass
            finally:
                self.close_descriptor()
                self._members.remove()

    def close_descriptor(self) -> None:
        """Leave the record where it is, without holding it."""
        if self._is_open():
            os.close(self._fd)
        self._fd = -1

    def _fold_into(self, first: Registration, news: Sequence[ProcessIdentity]) -> None:
        try:
            with first._lock:
                known = self._members.identities
                for before in (True, False):  # what the run has not started stays no child of it
                    first._members.add((m for m in news if known[m] is before), before=before)
                first._members.fold(FoldedRun(self.record.run_id, self._file, self.record.lock))
        except OSError:
            self._stay(RunState.ENDED)
        else:
            self.close()

    def _is_held_by_a_fork(self) -> bool:
        """Whether a forked process holds the record, although no child of ours is known to live.
        Such an orphan would look like a twin to a later run.

        There is none if the lock can be taken once our own descriptor is closed.
        """
        try:
            fd = files.open_existing(self._path, os.O_RDWR)
        except (OSError, InfrastructureError) as error:
            return not isinstance(error, FileNotFoundError)  # with no descriptor left, say
        self.close_descriptor()
        self._fd = fd
        return self._is_open() and not _lock_past_readers(fd, self._path, tries=20)

    def _reopen(self) -> bool:
        """Open the record again, in a program that has closed every descriptor, as daemons do."""
        try:
            self._fd = files.open_existing(self._path, os.O_RDWR)
        except (OSError, InfrastructureError):
            self._fd = -1
            return False
        if not self._is_open():  # it is another file by now
            os.close(self._fd)
            self._fd = -1
            return False
        with contextlib.suppress(OSError):
            lock_descriptor(self._fd)
        return True

    def _keep_as(self, state: RunState) -> None:
        _stay_known(os.path.dirname(self._path), self.record.pid)
        record = self.record
        if state is RunState.ENDED:
            # A directory that was kept after an error is not to be collected with the record.
            record = attrs.evolve(record, tmp_dir=None)
        with contextlib.suppress(OSError, InfrastructureError):  # no space: it stays as it was
            self.update(record, state)

    def _stay(self, state: RunState) -> None:
        self._keep_as(state)
        with self._lock:
            self.close_descriptor()

    def _is_mine(self) -> bool:
        return os.getpid() == self.record.pid

    def _descriptor(self) -> int:
        if not self._is_open():
            raise InfrastructureError(f"the descriptor of the run's record {self._path} was closed")
        return self._fd

    def _is_open(self) -> bool:
        return self._fd >= 0 and files.still_open(self._fd, self._file)


class _Program:
    """What this process keeps on record for its ended runs: the first one, by directory."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.forks = 0
        self.first_runs: dict[str, Registration] = {}

    def first_run(self, directory: str) -> Registration | None:
        first = self.first_runs.get(directory)
        if first is None or (first._is_open() and files.same_file(first._fd, first._path)):
            return first
        # The program has closed every descriptor, or somebody has removed the record.
        del self.first_runs[directory]
        return None

    def leave(self) -> None:
        """At the exit of the interpreter: remove the records if no child lives any more."""
        for first in tuple(self.first_runs.values()):
            if not first._members.alive() and not processes.has_live_child():
                with contextlib.suppress(OSError):
                    if not first._is_held_by_a_fork():
                        first.close()


_program = _Program()
# Registered early, to run late: exit hooks of pools that are imported later join their workers.
atexit.register(lambda: _program.leave())


# Descriptors of records that a thread of this process is looking at.
_looked_at: set[int] = set()


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int | None]:
    """The record at this path, open for a look; None where there is no file to look at."""
    try:
        fd = files.open_existing(path, os.O_RDWR)
    except (OSError, InfrastructureError):
        yield None
        return
    _looked_at.add(fd)
    try:
        yield fd
    finally:
        _looked_at.discard(fd)
        os.close(fd)


def _start_anew() -> None:
    """In a forked child. The record is its parent's. It stays open, as proof whose fork this is.

    What another thread was just looking at does not: it would prove that this is a fork of a run
    to which it does not belong.
    """
    global _program
    _program = _Program()
    for fd in tuple(_looked_at):
        with contextlib.suppress(OSError):
            os.close(fd)
    _looked_at.clear()


def _count() -> None:
    _program.forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_count, after_in_child=_start_anew)


def _default_directory() -> Path:
    return _directory_below(files.runtime_dir())


@functools.lru_cache(maxsize=8)  # a program of a thousand short runs looks it up for each
def _directory_below(runtime_dir: Path) -> Path:
    return runtime_dir / "runs"


def _to_path(path: str | Path) -> Path:
    return path if isinstance(path, Path) else Path(path)


@attrs.frozen
class RunRegistry:
    """All runs of this user on this machine, in ``directory`` (the default is the runtime
    directory's).
    """

    directory: Path = attrs.field(factory=_default_directory, converter=_to_path)

    def register(self, record: RunRecord) -> Registration:
        """Enter a run as waiting.

        The file gets its name only once it is locked: a reader that sees it sees a live run.

        Raises:
            InfrastructureError: The directory cannot be used, or the record not be read back.
        """
        data = _encode(record, RunState.WAITING)
        directory = os.fspath(self.directory)
        files.private_directory(os.path.dirname(directory))
        files.private_directory(directory)
        path = f"{directory}/{record.run_id}{SUFFIX}"
        while True:
            unnamed = f"{directory}/.{record.run_id}.{os.urandom(4).hex()}"
            try:
                fd = files.create_exclusive(unnamed, 0o600)
            except OSError as error:
                raise InfrastructureError(
                    f"cannot write to {directory}: {error.strerror}. "
                    f"Set {files.RUNTIME_DIR_VARIABLE} to a directory that can be written to"
                ) from error
            try:
                if not lock_descriptor(fd):
                    raise FileNotFoundError  # soon: a collector has locked it
                files.write_whole(fd, data)
                os.rename(unnamed, path)
                registration = Registration(record, path, fd, files.device_and_inode(os.fstat(fd)))
                registration._note(before=True)
                return registration
            except FileNotFoundError:
                os.close(fd)  # collected before it was locked: once more
            except OSError as error:
                os.close(fd)
                _unlink(unnamed, path, _members_path(path))
                raise InfrastructureError(
                    f"cannot write the run's record to {path}: {error.strerror}"
                ) from error
            except BaseException:
                os.close(fd)
                _unlink(unnamed, path, _members_path(path))
                raise

    def runs(self, *, without: str | None = None) -> tuple[RegisteredRun, ...]:
        """Every run on record, the oldest first; one can be left out by its id."""
        return self._runs(self.names(), without)

    def _runs(self, names: Iterable[str], without: str | None) -> tuple[RegisteredRun, ...]:
        own = f"{without}{SUFFIX}"
        wanted = [name for name in names if name.endswith(SUFFIX) and name != own]
        if not wanted:
            return ()
        directory = self.directory_file()
        found = (self._look(name, directory) for name in wanted)
        return tuple(sorted(filter(None, found), key=lambda run: run.record.started_at))

    def dead_runs(
        self, *, without: str | None = None, names: Iterable[str] | None = None
    ) -> tuple[RegisteredRun, ...]:
        """Runs that are over, and of which no process lives: what they left may be removed.

        ``names`` is what `names` has found, where somebody has looked already.
        """
        runs = self._runs(self.names() if names is None else names, without)
        dead = [run for run in runs if run.state is RunState.DEAD]
        if not dead:
            return ()
        from orchard_infra.runs.membership import Membership

        outlived = {run.record.run_id for run, _ in Membership(runs).survivors(dead)}
        return tuple(run for run in dead if run.record.run_id not in outlived)

    def directory_file(self) -> tuple[int, int] | None:
        """Device and inode of the directory. A program that has it open led a run that ended well,
        or was forked by one that did; see `membership.has_led_a_run`.
        """
        try:
            return files.device_and_inode(os.stat(self.directory))
        except OSError:
            return None

    def find(self, run_id: str) -> RegisteredRun | None:
        """The run with this id."""
        if not is_run_id(run_id):
            return None
        return self._look(f"{run_id}{SUFFIX}", self.directory_file())

    def lineage(self, run_id: str | None) -> tuple[str, ...]:
        """A run's id, that of the run it was started in, and so on outwards."""
        ids: list[str] = []
        while run_id and run_id not in ids:
            ids.append(run_id)
            run = self.find(run_id)
            run_id = run.record.parent if run else None
        return tuple(ids)

    def remove(self, run: RegisteredRun) -> bool:
        """Remove the record of a run that is dead; whether it was."""
        removed = self._remove_unlocked(run.file_name)
        if removed:
            _unlink(_members_path(self._path_of(run.file_name)))
        return removed

    def collect_unnamed(self, names: Sequence[str] | None = None) -> None:
        """Remove what a crash left: records that never got their name, lists without a record.

        ``names`` is what `names` has found, where somebody has looked already.
        """
        names = self.names() if names is None else names
        for name in names:
            if name.startswith("."):
                self._remove_unlocked(name)
            elif ".notice" in name:
                from orchard_infra.runs.notices import Notices

                Notices(self.directory).collect(name)
            elif name.endswith(members.SUFFIX):
                # The record is there before its list, and goes before it.
                record = name.removesuffix(members.SUFFIX) + SUFFIX
                if record not in names and not os.path.lexists(self._path_of(record)):
                    with contextlib.suppress(OSError):
                        os.unlink(self._path_of(name))

    def names(self) -> list[str]:
        """The files in the directory.

        Raises:
            InfrastructureError: It cannot be read.
        """
        try:
            return os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InfrastructureError(
                f"cannot read {self.directory}: {error.strerror}. "
                f"Set {files.RUNTIME_DIR_VARIABLE} to a directory of your own"
            ) from error

    def _path_of(self, name: str) -> str:
        return f"{os.fspath(self.directory)}/{name}"

    def _look(self, name: str, directory: tuple[int, int] | None) -> RegisteredRun | None:
        path = self._path_of(name)
        with _opened(path) as fd:
            found = None if fd is None else read_record(fd)
            if fd is None or found is None:
                return None
            stat = os.fstat(fd)
            if hasattr(os, "geteuid") and stat.st_uid != os.geteuid():
                return None
            record, stated = found
            return RegisteredRun(
                record=record,
                state=_state(record, stated, fd),
                file=files.device_and_inode(stat),
                was_released=stated is RunState.ENDED,
                members=read_members(_members_path(path)),
                directory=directory,
            )

    def _remove_unlocked(self, name: str) -> bool:
        path = self._path_of(name)
        with _opened(path) as fd:
            try:
                if fd is None or not _lock_past_readers(fd, path):
                    return False
                found = read_record(fd)
                if found is not None and leader_lives(found[0]):
                    return False
                if found is not None and found[1] in (RunState.RUNNING, None) and name[0] != ".":
                    # Under the lock, so that only one of several cleaners does; before the record
                    # goes, so that a kill here loses nothing: a second line is passed over.
                    history.note_killed(os.fspath(self.directory), found[0], fd)
                os.unlink(path)
                return True
            except OSError:
                return False


class _OpenDirectory:
    """A directory, open for as long as this object is there."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._file = files.device_and_inode(os.fstat(self._fd))
        with contextlib.suppress(OSError):
            # The kernel shows who took a lock: so a process that led a run is told from its forks.
            lock_descriptor(self._fd, shared=True)

    def __del__(self) -> None:
        # On a busy machine the last steps of an exit take seconds, and a run that had just been
        # refused was stopped in them as a twin of the holder.
        if sys.is_finalizing():
            return
        with contextlib.suppress(AttributeError, OSError):
            # The program may have closed every descriptor, and have another file there by now.
            if files.still_open(self._fd, self._file):
                os.close(self._fd)


@functools.lru_cache(maxsize=4)
def _stay_known(directory: str, pid: int) -> _OpenDirectory | None:
    """Hold the registry's directory open until this process ends.

    A program goes on after its block: it writes results, or starts the next run. By then it is in
    no live run, and to a run of the same command it would look like a twin. This descriptor tells
    it from one, see `RunRegistry.directory_file`; the kernel takes it away with the process.
    ``pid`` is that of this process: a forked child that leads a run opens one of its own.
    """
    try:
        return _OpenDirectory(directory)
    except OSError:
        return None


def _state(record: RunRecord, stated: RunState | None, fd: int) -> RunState:
    if stated is RunState.ABANDONED:
        stated = RunState.ENDED
    try:
        # Shared, so that two readers at once do not take each other for the run.
        if lock_descriptor(fd, shared=sys.platform != "win32"):
            unlock_descriptor(fd)
            # A program that closes every descriptor (a daemon does) drops its lock, and lives.
            if not leader_lives(record):
                return RunState.DEAD
    except OSError:
        # A file system without locks: only the process itself can tell.
        return RunState.DEAD if leader_is_dead(record) else stated or RunState.RUNNING
    if leader_is_dead(record):
        return RunState.SURVIVORS
    return stated or RunState.RUNNING


def _lock_past_readers(fd: int, path: str, tries: int = 200) -> bool:
    """Lock the file at this path exclusively, although readers hold it for an instant now and
    then; on a busy machine one may be put aside with its lock held.
    """
    for _ in range(tries):
        locked = lock_descriptor(fd)
        if locked or not files.same_file(fd, path):
            return locked and files.same_file(fd, path)
        time.sleep(0.001)
    return False


def _encode(record: RunRecord, state: RunState, running_at: float | None = None) -> bytes:
    try:
        line = to_json(record, state, with_environment=True)
    except ValueError as error:
        raise InfrastructureError(f"the run cannot be recorded: {error}") from error
    if running_at is None:
        return line
    return line[:-2] + f', "{history.RUNNING_AT}": {running_at}}}\n'.encode()


def _members_path(path: str) -> str:
    return path.removesuffix(SUFFIX) + members.SUFFIX


def _unlink(*paths: str) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
