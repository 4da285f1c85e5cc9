"""Locks that are handed from a holder to waiting processes, ours and those of the peers."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import attrs
import filelock
import portalocker

from orchard_infra import EnvironmentConfig, FileLock, InfrastructureManager, managed_environment
from orchard_infra.locks.acquiring import acquire
from orchard_infra.locks.base import Held, Lease, LockKey
from orchard_infra.runs.record import RunRecord, describe_this_run

PATIENCE = 60.0  # seconds that everybody is told to wait for a lock


class Lock(Protocol):
    """What all of them can do."""

    def acquire(self) -> object: ...
    def release(self) -> object: ...


MakeLock = Callable[[Path], Lock]


class _Polling:
    """A file lock without a queue: every waiter tries all the time."""

    timeout = PATIENCE

    def try_acquire(self, key: LockKey, record: RunRecord) -> Lease | Held:
        return FileLock().try_acquire(key, record)

    def holder(self, key: LockKey) -> RunRecord | None:
        return FileLock().holder(key)


@attrs.define
class _OurLock:
    path: Path
    _lock: FileLock | _Polling = attrs.field(factory=lambda: FileLock(timeout=PATIENCE))
    _lease: Lease | None = None

    def acquire(self) -> None:
        record = describe_this_run("handoff", lock=str(self.path))
        self._lease = acquire(self._lock, LockKey("handoff", self.path), record)

    def release(self) -> None:
        assert self._lease is not None
        self._lease.release()


@attrs.define
class _OurEnvironment:
    path: Path
    _block: managed_environment | None = None

    def acquire(self) -> None:
        manager = InfrastructureManager(
            sanitizer=None,
            locker=FileLock(timeout=PATIENCE),
            flusher=None,
            cleaner=None,
            stopper=None,
        )
        cfg = EnvironmentConfig("handoff", lock_file_path=self.path)
        self._block = managed_environment(cfg, manager=manager)
        self._block.__enter__()

    def release(self) -> None:
        assert self._block is not None
        self._block.__exit__(None, None, None)


OURS = "FileLock"
ENVIRONMENT = "managed_environment, lock only"
POLLING = "FileLock, everybody polls"
PEER = "filelock.FileLock"

LOCKS: dict[str, MakeLock] = {
    OURS: _OurLock,
    ENVIRONMENT: _OurEnvironment,
    PEER: lambda path: filelock.FileLock(str(path), timeout=PATIENCE),
    "portalocker.Lock": lambda path: portalocker.Lock(str(path), timeout=PATIENCE),
    "portalocker.TemporaryFileLock": lambda path: portalocker.TemporaryFileLock(
        str(path), timeout=PATIENCE, fail_when_locked=False
    ),
}


_BY_NAME: dict[str, MakeLock] = {
    **LOCKS,
    POLLING: lambda path: _OurLock(path, _Polling()),
}


def _make(name: str | MakeLock) -> MakeLock:
    return _BY_NAME[name] if isinstance(name, str) else name


@attrs.frozen
class Waited:
    """When a waiter got the lock and gave it back, on the monotonic clock, and what the wait took,
    in seconds.
    """

    acquired_at: float
    released_at: float
    cpu: float
    wall: float

    @property
    def cpu_percent(self) -> float:
        return 100 * self.cpu / self.wall


@attrs.frozen
class Waiter:
    """A process that waits for locks when it is told to."""

    pid: int
    _commands: Connection

    def start(self, name: str | MakeLock, path: Path, hold: float = 0.0) -> None:
        """Have it wait, for one of `LOCKS`, for `POLLING`, or for what a function that can be
        pickled makes; back when it is about to.
        """
        self._commands.send((name, path, hold))
        self._commands.recv()

    def finish(self) -> Waited:
        """Once it has had the lock, and has given it back."""
        waited: Waited = self._commands.recv()
        return waited


@contextlib.contextmanager
def waiters(number: int, method: str = "spawn") -> Iterator[list[Waiter]]:
    """So many waiting processes, fresh ones. Forked ones start sooner."""
    context = multiprocessing.get_context(method)
    pipes = [context.Pipe() for _ in range(number)]
    started = [context.Process(target=_wait, args=(theirs,), daemon=True) for _, theirs in pipes]
    for process in started:
        process.start()
    try:
        yield [
            Waiter(process.pid or 0, ours)
            for process, (ours, _) in zip(started, pipes, strict=True)
        ]
    finally:
        for ours, _ in pipes:
            ours.send(None)
        for process in started:
            process.join()


def hand_over(
    name: str | MakeLock, path: Path, to: list[Waiter], hold: float
) -> tuple[float, list[Waited]]:
    """Hold a lock for some time, then hand it to waiters, who pass it on among themselves.

    Seconds from the beginning of the release until the first of them had it, and what each says.
    """
    lock = _make(name)(path)
    lock.acquire()
    for waiter in to:
        waiter.start(name, path)
    # Not in step with anybody's polling.
    time.sleep(hold * random.uniform(0.5, 1.5))
    released_at = time.monotonic()
    lock.release()
    waited = [waiter.finish() for waiter in to]
    return min(w.acquired_at for w in waited) - released_at, waited


@contextlib.contextmanager
def held(name: str, path: Path) -> Iterator[Lock]:
    """A lock that this process has, for a block that gives it back."""
    lock = _make(name)(path)
    lock.acquire()
    yield lock


def _wait(commands: Connection) -> None:
    while (command := commands.recv()) is not None:
        name, path, hold = command
        lock = _make(name)(path)
        commands.send("waiting")
        cpu, began = time.process_time(), time.monotonic()
        lock.acquire()
        now = time.monotonic()
        cpu = time.process_time() - cpu
        time.sleep(hold)
        released_at = time.monotonic()
        lock.release()
        commands.send(Waited(now, released_at, cpu, now - began))
