"""One light thread for all that has to happen later, in this process and for all environments.

It sleeps until the next task is due. It starts when the first task is added, again in a forked
child that adds one, and ends a second after the last task is gone: a thread for each environment
cost more than its lock, and one that stays makes ``os.fork`` warn from Python 3.12 on.

Tasks are quick. What may take long (a user's callback, a network) runs in a thread of its own: a
slow one must not expire somebody's lease.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import attrs

from orchard_infra.system.masking import uninterrupted

_Argument = TypeVar("_Argument")
_LINGERS = 1.0  # seconds
_JOIN = 5.0  # seconds that `remove` and `finish` wait for a task that is just running
_LONGEST = 3600.0  # seconds of one sleep: a longer timeout may be more than the platform takes
_logger = logging.getLogger("Infrastructure")


@attrs.define(eq=False, repr=False)
class Task:
    """Something to do at ``due``, in seconds of `time.monotonic`; None: not before it is set.

    ``run`` is called once for each time that it is due. It may set ``due`` anew. So may anybody
    else, a signal handler included, who then calls `wake`. One for ``at_exit`` keeps the thread
    while the exit hooks of other packages run.
    """

    run: Callable[[], object]
    due: float | None = None
    at_exit: bool = False


class _Background:
    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.running: dict[Task, int] = {}  # and in which thread
        self.mail: queue.SimpleQueue[None] = queue.SimpleQueue()  # put() may interrupt itself
        self.lock = threading.Lock()  # never in a signal handler, never while a task runs
        self.thread: threading.Thread | None = None
        self.idle_since = 0.0
        self.wakes_at = 0.0

    def add(self, task: Task) -> bool:
        with uninterrupted(), self.lock:
            self.tasks.append(task)
            if self.thread is not None and self.thread.is_alive():
                # A switch of threads takes longer than all of a lock: only if it must be.
                if task.due is not None and task.due < self.wakes_at:
                    self.mail.put(None)
                return True
            # Named before it starts: if a start was broken off, the thread of it ends at once.
            self.thread = threading.Thread(
                target=self.work, name="orchard-infra-background", daemon=True
            )
            try:
                self.thread.start()
                return True
            except RuntimeError as error:
                # At interpreter exit, in a subinterpreter, or with no thread to be had.
                self.thread = None
                reason = error
        _logger.debug("no background thread: %s", reason)
        return False

    def remove(self, task: Task) -> None:
        with uninterrupted(), self.lock:
            if task in self.tasks:
                self.tasks.remove(task)
            if not self.tasks:
                self.idle_since = time.monotonic()
                if self.wakes_at > self.idle_since + _LINGERS:
                    self.mail.put(None)
        self.wait_for(task)

    def finish(self, task: Task) -> None:
        try:
            if self.claim(task):
                task.run()
        except BaseException:
            if self.runs_here(task):
                task.due = 0.0  # it was interrupted, and is still to be done
            raise
        finally:
            if self.runs_here(task):
                del self.running[task]
                self.mail.put(None)  # it may be due again
        self.wait_for(task)

    def wait_for(self, task: Task) -> None:
        deadline = time.monotonic() + _JOIN
        while task in self.running and not self.runs_here(task) and time.monotonic() < deadline:
            time.sleep(0.001)

    def runs_here(self, task: Task) -> bool:
        return self.running.get(task) == threading.get_ident()

    def claim(self, task: Task) -> bool:
        """Whether the task is due and the caller is the one to carry it out."""
        if task.due is None or task.due > time.monotonic():
            return False
        with uninterrupted(), self.lock:
            if task.due is None or task in self.running or task not in self.tasks:
                return False
            self.running[task] = threading.get_ident()
            task.due = None
            return True

    def end(self) -> None:
        with uninterrupted(), self.lock:
            if any(task.at_exit for task in self.tasks):
                return
            thread, self.thread = self.thread, None
            self.mail.put(None)
        if thread is not None and thread.is_alive():
            thread.join(_LINGERS)

    def work(self) -> None:
        if sys.platform != "win32":
            # One that this thread took would not interrupt a call in which the main thread waits.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            for task in tuple(self.tasks):
                if self.claim(task):
                    try:
                        task.run()
                    except Exception:
                        _logger.exception("a task in the background failed")
                    finally:
                        del self.running[task]
            with self.lock:
                if self.thread is not threading.current_thread():
                    return
                now = time.monotonic()
                if not self.tasks and now >= self.idle_since + _LINGERS:
                    self.thread = None
                    break
                self.wakes_at = wakes_at = self.next_due(now)
            try:
                self.mail.get(timeout=max(0.0, wakes_at - now))
            except queue.Empty:
                pass
        for step in _at_rest:
            step()

    def next_due(self, now: float) -> float:
        if not self.tasks:
            return self.idle_since + _LINGERS
        due = now + _LONGEST
        for task in self.tasks:
            if task not in self.running:
                due = min(due, math.inf if task.due is None else task.due)
        return due


_background = _Background()
_at_rest: list[Callable[[], object]] = []


def _start_anew() -> None:
    """In a forked child the thread is gone, and the tasks are its parent's."""
    global _background
    _background = _Background()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


@atexit.register
def _end_at_exit() -> None:
    """After the exit hooks of environments, which were registered later. A subinterpreter that
    ends with a thread is a fatal error of Python's.
    """
    _background.end()


def add(task: Task) -> bool:
    """Have ``task`` done when it is due, until it is removed. Whether there is a thread that will:
    at interpreter exit none can be started, from Python 3.12 on.
    """
    return _background.add(task)


def remove(task: Task) -> None:
    """Forget ``task``. When this returns it is not running (it is waited for, 5 s)."""
    _background.remove(task)


def finish(task: Task) -> None:
    """If ``task`` is due, do it now, in this thread. When this returns it is not running."""
    _background.finish(task)


def at_rest(step: Callable[[], object]) -> None:
    """Have ``step`` carried out each time that the thread ends, a second after the last task: for
    what costs too much to be made and dropped for each of many short environments.

    A task may have been added again by then.
    """
    _at_rest.append(step)


def wake() -> None:
    """Look again which task is due. May be called in a signal handler."""
    _background.mail.put(None)


class Callbacks(Generic[_Argument]):
    """Callbacks of a user, called one after the other in a thread of their own, once.

    The thread is started when there is something to call. What a callback raises is logged.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._waiting: deque[tuple[Callable[[_Argument], object], Any]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, callback: Callable[[_Argument], object]) -> None:
        """It is called with the signal mask that its giver has now: the thread blocks signals, and
        so would the children that a callback starts.
        """
        self._waiting.append((callback, signal_mask()))

    def call(self, argument: _Argument) -> None:
        """Call those that were not called yet. Never in a signal handler."""
        with uninterrupted(), self._lock:
            if not self._waiting or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(
                target=self._work, args=(argument,), name="orchard-infra-callbacks", daemon=True
            )
            try:
                self._thread.start()
                return
            except RuntimeError as error:
                self._thread = None
                reason = error
        self._logger.warning("callbacks of on_stop are not called: %s", reason)

    def wait(self, seconds: float) -> bool:
        """Wait for those that run; whether they have all returned by then."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(seconds)
        return not thread.is_alive()

    def _work(self, argument: _Argument) -> None:
        while True:
            with self._lock:
                if self._thread is not threading.current_thread():
                    return  # its start was broken off, and another one has taken its place
                if not self._waiting:
                    self._thread = None
                    return
                callback, mask = self._waiting.popleft()
            before = signal_mask(mask)
            try:
                callback(argument)
            except BaseException:  # also a sys.exit: it would end this thread, and nothing else
                self._logger.exception("a callback of on_stop failed")
            finally:
                signal_mask(before)


def signal_mask(mask: set[Any] | None = None) -> set[Any]:
    """The signals that this thread blocks; from now on those of ``mask``, if there is one."""
    if sys.platform == "win32":
        return set()
    if mask is None:
        return signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return signal.pthread_sigmask(signal.SIG_SETMASK, mask)
