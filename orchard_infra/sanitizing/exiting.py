"""Daemonic children that ignore SIGTERM do not keep the interpreter from exiting.

At its exit Python sends SIGTERM to the daemonic children of `multiprocessing`, and then waits for
them without a limit: a worker that ignores SIGTERM, or that hangs, keeps the program there for
ever. So those that still live a grace period after the exit has begun are killed.

The background thread does that, and it must be there before: Python 3.12 starts no thread once
the exit has begun, and the main thread is the one that waits. It also frees a pool whose lock has
died with a worker, whether it ends now or then: that kills nobody and needs no permission.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import attrs

from orchard_infra.system import background, pool_locks, processes
from orchard_infra.system.background import Task
from orchard_infra.system.masking import uninterrupted
from orchard_infra.system.pool_locks import StuckPool
from orchard_infra.system.processes import ProcessIdentity

_LOOK = pool_locks.PATIENCE  # seconds between two looks whether such children still live
_FIRST = 100  # before the finalizers of multiprocessing itself, of which the first has 15


@attrs.define(eq=False, repr=False)
class _Watch:
    grace: float | None  # None: nobody has allowed to kill
    exit_began: float | None = None
    stuck_pool: StuckPool = attrs.field(factory=StuckPool)
    task: Task = attrs.field(init=False)
    finalizer: Any = None
    stop_processes: Callable[..., object] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.task = Task(self.look, time.monotonic() + _LOOK, at_exit=True)

    def begin(self) -> None:
        from multiprocessing.util import Finalize

        from orchard_infra.system import killing  # now: at the exit nothing may be loaded any more

        self.stop_processes = killing.stop_processes
        self.finalizer = Finalize(None, self.note_exit, exitpriority=_FIRST)
        background.add(self.task)
        if _is_exiting():  # too late for that: it waits for the children
            self.note_exit()

    def note_exit(self) -> None:
        """Called by multiprocessing in the main thread, before it ends its children."""
        self.exit_began = time.monotonic()
        self._plan()
        background.wake()

    def look(self) -> None:
        """Called by the background thread."""
        global _watch
        children = _daemonic_children()
        is_needed = self.stuck_pool.look() or pool_locks.has_pools() or self.exit_began is not None
        with uninterrupted(), _lock:
            if not children and not is_needed:
                if _watch is self:
                    _watch = None
                self.finalizer.cancel()
                background.remove(self.task)
                return
        self._plan()
        if self.exit_began is None:
            return
        if self.grace is not None and time.monotonic() >= self.exit_began + self.grace:
            pids = {child.pid for child in children}
            self.stop_processes(children, grace=0.0, spare=lambda pid: pid not in pids)

    def _plan(self) -> None:
        due = (now := time.monotonic()) + _LOOK
        if self.exit_began is not None and self.grace is not None:
            end = self.exit_began + self.grace
            due = min(due, end) if now < end else due
        self.task.due = due


_watch: _Watch | None = None
_lock = threading.Lock()


def let_exit(grace: float | None) -> None:
    """Kill the daemonic children of this process that still live ``grace`` seconds after the exit
    of the interpreter has begun; None kills none. Does nothing, and costs nothing, if there are
    neither children nor pools now.
    """
    global _watch
    if not _daemonic_children() and not pool_locks.has_pools():
        return
    with uninterrupted(), _lock:
        if _watch is None:
            _watch = _Watch(grace)
            _watch.begin()
        if grace is not None:
            _watch.grace = grace


def let_exit_now(grace: float | None) -> None:
    """The same, if the exit has begun already: for a program that ends without leaving its block,
    and whose exit hook that waits for the children comes before ours.
    """
    if _is_exiting():
        let_exit(grace)


def _is_exiting() -> bool:
    return getattr(sys.modules.get("multiprocessing.util"), "_exiting", False) is True


def _daemonic_children() -> list[ProcessIdentity]:
    """The live daemonic children that this process has started by `multiprocessing`.

    `multiprocessing.active_children` would also reap those that have ended: a `Process.join` that
    waits for one of them in another thread would then find no exit code.
    """
    module = sys.modules.get("multiprocessing.process")
    found = []
    for child in tuple(getattr(module, "_children", ())):
        try:
            pid = child.pid if child.daemon else None
        except ValueError:  # it was closed
            continue
        stat = None if pid is None else processes.read_stat(pid)
        # The pid may be somebody else's by now: it has to be a child, or one of a forkserver.
        if pid is None or stat is None or processes.is_defunct(stat):
            continue
        if os.getpid() in itertools.islice(processes.ancestors(pid), 2):
            found.append(ProcessIdentity(pid, stat.create_time))
    return found


def _start_anew() -> None:
    """In a forked child. Another thread may have held the lock at the fork, and the children are
    its parent's.
    """
    global _watch, _lock
    _watch, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
