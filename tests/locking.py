"""What the tests of the locks share: taking one, and processes that hold or wait for one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from orchard_infra.locks.acquiring import ClearDead, acquire
from orchard_infra.locks.base import LockKey
from orchard_infra.locks.file import FileLease, FileLock
from orchard_infra.runs.record import RunRecord, describe_this_run
from orchard_infra.system import processes
from support import wait_until

# Holds a lock with FileLock alone until it is told to go on.
HOLDER = """
    import logging, sys
    from pathlib import Path
    from orchard_infra.locks.acquiring import acquire
    from orchard_infra.locks.base import LockKey
    from orchard_infra.locks.file import FileLock
    from orchard_infra.runs.record import describe_this_run

    logging.basicConfig(level=logging.INFO)
    key = LockKey("digits", Path(sys.argv[1]))
    timeout = None if sys.argv[2] == "None" else float(sys.argv[2])
    lease = acquire(FileLock(timeout), key, describe_this_run("digits"))
    print("held", flush=True)
    sys.stdin.readline()
    lease.release()
    print("released", flush=True)
"""


def key_of(path: Path) -> LockKey:
    return LockKey("digits", path)


def take(
    path: Path,
    timeout: float | None = 0.0,
    record: RunRecord | None = None,
    clear_dead: ClearDead = lambda dead: (),
) -> FileLease:
    """Take a lock file in this process, in this thread."""
    lease = acquire(
        FileLock(timeout),
        key_of(path),
        record or describe_this_run("digits"),
        clear_dead=clear_dead,
    )
    assert isinstance(lease, FileLease)
    return lease


def take_elsewhere(path: Path, timeout: float | None = 0.0) -> FileLease:
    """Take it as another process of this machine would: its record names another leader."""
    this = describe_this_run("digits")
    parent = processes.identity_of(os.getppid())
    assert parent is not None
    other = attrs.evolve(this, pid=parent.pid, create_time=parent.create_time)
    return take(path, timeout, other)


def holder_of(path: Path) -> RunRecord | None:
    """The record in a lock file."""
    return FileLock().holder(key_of(path))


def is_held_by(path: Path, record: RunRecord) -> bool:
    """Whether a lock file carries the record of this very run."""
    holder = holder_of(path)
    return holder is not None and holder.run_id == record.run_id


@contextlib.contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """A forked child that does ``work`` and exits with 0 if that raises nothing; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def exit_status(pid: int) -> int:
    """Wait for the end of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@attrs.define
class Line:
    """Forked processes that wait for one lock, in the order in which they came.

    Each writes its number to ``log`` when it has the lock, holds it for ``hold`` seconds and gives
    it back.
    """

    path: Path
    log: Path
    hold: float = 0.0
    pids: list[int] = attrs.field(factory=list)

    def join(self, number: int) -> None:
        """So many more waiters, one after the other."""
        for _ in range(number):
            mine = len(self.pids)
            came = len(tickets())
            pid = os.fork()
            if pid == 0:
                self._wait(mine)
            self.pids.append(pid)
            wait_until(lambda came=came: len(tickets()) > came, what="its place in the queue")

    def served(self) -> list[int]:
        """The numbers of those that have had the lock, in order."""
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    def send(self, number: int, signum: int) -> None:
        os.kill(self.pids[number], signum)
        if signum == signal.SIGKILL:
            os.waitpid(self.pids[number], 0)

    def close(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _wait(self, mine: int) -> None:
        try:
            lease = take(self.path, None)
            fd = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(fd, f"{mine}\n".encode())
            time.sleep(self.hold)
            lease.release()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)


def tickets() -> list[Path]:
    """The tickets of everybody who waits for a lock in this test's runtime directory."""
    return sorted(Path(os.environ["ORCHARD_INFRA_DIR"]).glob("queues/*/*"))


@contextlib.contextmanager
def line(tmp_path: Path, waiters: int, hold: float = 0.0) -> Iterator[tuple[Line, FileLease]]:
    """A line of waiters behind a lock that this process holds, and its lease."""
    path = tmp_path / "x.lock"
    lease = take(path)
    waiting = Line(path, tmp_path / "served", hold)
    try:
        waiting.join(waiters)
        yield waiting, lease
    finally:
        lease.release()
        waiting.close()
