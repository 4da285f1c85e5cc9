"""One light thread for all that has to happen later, in this process and for all environments.

It sleeps until the next task is due. It starts when the first task is added, again in a forked
child that adds one, and ends a second after the last task is gone: a thread for each environment
cost more than its lock, and one that stays makes ``os.fork`` warn from Python 3.12 on.

Tasks are quick. What may take long (a user's callback, a network) runs in a thread of its own: a
slow one must not expire somebody's lease.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import attrs

from orchard_infra.system.masking import uninterrupted

_Argument = TypeVar("_Argument")
_LINGERS = 1.0  # seconds
_JOIN = 5.0  # seconds that `remove` waits for a task that is just running
_logger = logging.getLogger("Infrastructure")


@attrs.define(eq=False)
class Task:
    """Something to do at ``due``, in seconds of `time.monotonic`; None: not before it is set.

    ``run`` is called once for each time that it is due. It may set ``due`` anew; so may a signal
    handler, which then calls `wake`.
    """

    run: Callable[[], object]
    due: float | None = None


class _Background:
    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.running: Task | None = None
        self.mail: queue.SimpleQueue[None] = queue.SimpleQueue()  # put() may interrupt itself
        self.lock = threading.Lock()  # never in a signal handler
        self.thread: threading.Thread | None = None

    def add(self, task: Task) -> None:
        with uninterrupted(), self.lock:
            self.tasks.append(task)
            if self.thread is None:
                thread = threading.Thread(
                    target=self.work, name="orchard-infra-background", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:
                    # At interpreter exit, or with no thread to be had: nothing happens by itself.
                    _logger.debug("no background thread: %s", error)
                    return
                self.thread = thread
        self.mail.put(None)

    def remove(self, task: Task) -> None:
        task.due = None
        with uninterrupted(), self.lock:
            if task in self.tasks:
                self.tasks.remove(task)
        if self.thread is threading.current_thread():
            return
        deadline = time.monotonic() + _JOIN
        while self.running is task and time.monotonic() < deadline:
            time.sleep(0.001)

    def work(self) -> None:
        idle_since: float | None = None
        while True:
            now = time.monotonic()
            for task in tuple(self.tasks):
                due = task.due
                if due is not None and due <= now:
                    self.running = task
                    task.due = None
                    try:
                        if task in self.tasks:  # else it was removed meanwhile
                            task.run()
                    except Exception:
                        _logger.exception("a task in the background failed")
                    finally:
                        self.running = None
            wait = None
            if self.tasks:
                idle_since = None
                dues = [task.due for task in tuple(self.tasks) if task.due is not None]
                if dues:
                    wait = min(max(0.0, min(dues) - time.monotonic()), 3600.0)
            else:
                idle_since = idle_since or now
                wait = max(0.0, idle_since + _LINGERS - now)
                if wait == 0.0:
                    with self.lock:
                        if not self.tasks:
                            self.thread = None
                            return
            try:
                self.mail.get(timeout=wait)
            except queue.Empty:
                pass


_background = _Background()


def _start_anew() -> None:
    """In a forked child the thread is gone, and the tasks are its parent's."""
    global _background
    _background = _Background()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def add(task: Task) -> None:
    """Have ``task`` done when it is due, until it is removed."""
    _background.add(task)


def remove(task: Task) -> None:
    """Forget ``task``. When this returns it is not running (it is waited for, 5 s)."""
    _background.remove(task)


def wake() -> None:
    """Look again which task is due. May be called in a signal handler."""
    _background.mail.put(None)


class Callbacks(Generic[_Argument]):
    """Callbacks of a user, called one after the other in a thread of their own, once.

    The thread is started when there is something to call. What a callback raises is logged.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._waiting: list[tuple[Callable[[_Argument], object], Any]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, callback: Callable[[_Argument], object]) -> None:
        """It is called with the signal mask that its giver has now: the thread blocks all signals,
        and so would the children that a callback starts.
        """
        mask = signal_mask()
        with uninterrupted(), self._lock:
            self._waiting.append((callback, mask))

    def call(self, argument: _Argument) -> None:
        """Call those that were not called yet. Never in a signal handler."""
        with uninterrupted(), self._lock:
            if not self._waiting or self._thread is not None:
                return
            thread = threading.Thread(
                target=self._work, args=(argument,), name="orchard-infra-callbacks", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                self._logger.warning("callbacks are not called: %s", error)
                return
            self._thread = thread

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
                if not self._waiting:
                    self._thread = None
                    return
                callback, mask = self._waiting.pop(0)
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
