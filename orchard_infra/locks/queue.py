"""The queue of those who wait for a lock file: first come, first served.

Each waiter has a ticket, a FIFO that it keeps open for writing. The name of the ticket says when
the waiter came and which process it is. Each waiter has the nearest ticket before its own open for
reading: the kernel hangs that up in the moment when the other one leaves or is killed. So only the
first polls the lock, and nobody needs a thread: 64 that poll take 80 % of a core.

A waiter that is stopped (SIGSTOP, a debugger) keeps its ticket open. Everybody looks at the process
before it, and touches its own ticket, about once a second: who is stopped is passed over, and so is
who has not touched its ticket for a while, because its event loop is blocked, say. It has its place
again as soon as it goes on.

The queue belongs to one user on one machine. It is never needed for exclusion: who cannot use it,
or is passed over, polls beside it.
"""

from __future__ import annotations

import errno
import math
import os
import random
import time
from pathlib import Path

import attrs

from orchard_infra.errors import InfrastructureError
from orchard_infra.system import files, processes
from orchard_infra.system.masking import uninterrupted

_QUEUES = "queues"
_LOOK = (0.6, 0.9)  # seconds between two looks at the waiter before
_SILENT = 5.0  # seconds after which a waiter that does not touch its ticket is passed over
_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


class Place:
    """The place of one waiter, from ``__enter__`` to ``__exit__``. See `base.Place`."""

    def __init__(self, lock_path: Path) -> None:
        self.lock_path = lock_path
        self._directory = ""
        self._came = 0  # monotonic, in nanoseconds
        self._ticket: _Ticket | None = None
        self._before: _Ticket | None = None  # the nearest that waits
        self._look_at = 0.0  # monotonic

    def __enter__(self) -> Place:
        self._came = time.monotonic_ns()
        self._directory = _directory_for(self.lock_path)
        # Where nobody waits a ticket is only taken when the first try has failed: it costs more
        # than the lock.
        self._look_at = 0.0 if os.path.isdir(self._directory) else math.inf
        return self

    def __exit__(self, *error: object) -> None:
        if self._ticket is None:
            return
        with uninterrupted():
            self._watch(None)
            self._ticket.give_back()
            self._ticket = None
            _tidy(self._directory)

    def is_first(self) -> bool:
        """See `base.Place.is_first`."""
        try:
            now = time.monotonic()
            if self._look_at == math.inf:
                self._look_at = 0.0
            elif now >= self._look_at or (self._before is not None and self._before.is_closed()):
                self._look_at = now + random.uniform(*_LOOK)
                with uninterrupted():  # a descriptor could get lost
                    self._look()
        except (OSError, InfrastructureError):
            self._watch(None)  # no place for tickets, no descriptors left, all of them closed ...
        return self._before is None

    def _look(self) -> None:
        if self._ticket is None:
            self._ticket = _Ticket.take(self._directory, self._came)
        self._ticket.touch()
        if self._before is None or not self._before.waits():
            self._watch(self._find(self._ticket))

    def fileno(self) -> int:
        """See `base.Place.fileno`."""
        return -1 if self._before is None else self._before.fd

    def _find(self, ours: _Ticket) -> _Ticket | None:
        """The nearest ticket before ours whose waiter waits. Those of dead ones are removed."""
        for name in sorted(os.listdir(self._directory), reverse=True):
            if name < ours.name:
                ticket = _Ticket.open(self._directory, name)
                if ticket is not None:
                    if ticket.waits():
                        return ticket
                    ticket.remove_if_dead()
                    ticket.close()
        return None

    def _watch(self, ticket: _Ticket | None) -> None:
        before, self._before = self._before, ticket
        if before is not None:
            before.close()


@attrs.define(eq=False, repr=False)
class _Ticket:
    """A FIFO that is open: our own for writing, that of another one for reading."""

    path: str
    name: str
    fd: int
    pid: int
    namespace: int
    _file: tuple[int, int]

    @classmethod
    def take(cls, directory: str, came: int) -> _Ticket:
        """Ours. Its name sorts by the time at which we came, in nanoseconds."""
        files.private_directory(files.runtime_dir())
        files.private_directory(files.runtime_dir() / _QUEUES)
        pid, namespace = os.getpid(), processes.pid_namespace()
        while True:
            name = f"{came:020d}.{pid}.{namespace}"
            path = os.path.join(directory, name)
            try:
                os.mkdir(directory, 0o700)
            except FileExistsError:
                pass
            try:
                os.mkfifo(path, 0o600)
            except FileNotFoundError:
                continue  # the last waiter has just removed the directory
            except FileExistsError:
                came += 1  # another thread of ours came in the same instant
                continue
            try:
                fd = os.open(path, os.O_RDWR | _FLAGS)
            except BaseException:
                os.unlink(path)
                raise
            return cls(path, name, fd, pid, namespace, files.device_and_inode(os.fstat(fd)))

    @classmethod
    def open(cls, directory: str, name: str) -> _Ticket | None:
        """That of another one, None where it is gone."""
        _, *numbers = name.split(".")
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            return None
        path = os.path.join(directory, name)
        try:
            fd = os.open(path, os.O_RDONLY | _FLAGS)
        except FileNotFoundError:
            return None
        pid, namespace = map(int, numbers)
        return cls(path, name, fd, pid, namespace, files.device_and_inode(os.fstat(fd)))

    def is_closed(self) -> bool:
        """Whether nobody has it open for writing: its waiter has left, or is dead."""
        self._check()
        try:
            return not os.read(self.fd, 1)
        except BlockingIOError:
            return False

    def waits(self) -> bool:
        """Whether its waiter is alive, runs, and still stands in line."""
        if self.is_closed():
            return False
        stat = os.fstat(self.fd)
        if stat.st_nlink == 0 or _age(stat) > _SILENT:
            return False  # left, but a forked child still has the ticket open; or silent
        if not processes.is_own_pid_namespace(self.namespace):
            return True
        process = processes.read_stat(self.pid)
        return process is not None and process.state not in "TtZX"

    def remove_if_dead(self) -> bool:
        """Remove it where nobody will: its waiter was killed."""
        if processes.is_own_pid_namespace(self.namespace):
            dead = not processes.is_running(self.pid)
        else:
            dead = False
        # The number may be another process's by now. A ticket is closed for an instant when new.
        if not dead and not (self.is_closed() and _age(os.fstat(self.fd)) > _SILENT):
            return False
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        return True

    def touch(self) -> None:
        self._check()
        os.utime(self.fd)

    def give_back(self) -> None:
        """Remove our own. In a forked child it is its parent's, and stays."""
        if os.getpid() == self.pid:
            try:
                os.unlink(self.path)
            except OSError:
                pass
        self.close()

    def _check(self) -> None:
        if not files.still_open(self.fd, self._file):
            raise OSError(errno.EBADF, "the descriptor of a ticket was closed")

    def close(self) -> None:
        if files.still_open(self.fd, self._file):
            os.close(self.fd)


def _directory_for(lock_path: Path) -> str:
    """Where the tickets of this lock are: the same, whichever way its path is written."""
    if not hasattr(os, "mkfifo"):
        raise OSError(errno.ENOSYS, "there are no FIFOs on this platform")
    parent = os.stat(lock_path.parent)
    name = f"{parent.st_dev:x}-{parent.st_ino:x}-{lock_path.name}"
    return os.path.join(files.runtime_dir(), _QUEUES, name)


def collect() -> None:
    """Remove the tickets of killed waiters from queues in which nobody waits who will."""
    queues = f"{files.runtime_dir()}/{_QUEUES}"
    try:
        names = os.listdir(queues)
    except OSError:  # mostly nobody has ever waited
        return
    for name in names:
        _tidy(os.path.join(queues, name))


def _tidy(directory: str) -> None:
    """Who leaves last removes the directory, with the tickets of those who were killed."""
    try:
        os.rmdir(directory)
        return
    except OSError:
        pass
    try:
        for name in sorted(os.listdir(directory), reverse=True):
            ticket = _Ticket.open(directory, name)
            if ticket is None:
                continue
            try:
                if not ticket.remove_if_dead():
                    return
            finally:
                ticket.close()
        os.rmdir(directory)
    except OSError:
        pass


def _age(stat: os.stat_result) -> float:
    """Seconds since a ticket was touched, in whichever direction the clock was set since."""
    return abs(time.time() - stat.st_mtime)
