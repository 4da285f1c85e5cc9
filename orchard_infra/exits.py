"""The ways back of context managers that do not know each other."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

from orchard_infra.system.masking import uninterrupted

_T = TypeVar("_T")


class Exits:
    """The ways back of strategies of different authors, in reverse order.

    A bare `contextlib.ExitStack` lets one that fails hide the error of the body from those around
    it, and one that swallows an error swallow the body's. Here each ``__exit__`` is given the
    body's own error; what it returns is ignored, and what it raises is collected in ``failures``.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self.error: BaseException | None = None
        self.failures: list[BaseException] = []
        self._stack = contextlib.ExitStack()

    def enter(self, name: str, manager: AbstractContextManager[_T]) -> _T:
        """Enter a context manager. A Ctrl-C that comes meanwhile is raised when it is entered, and
        not half-way.
        """
        entered = False

        def leave() -> None:
            if entered:
                self.attempt(name, functools.partial(self._leave, manager))

        with uninterrupted():
            self._stack.callback(leave)  # first: between the two nothing could undo it
            value = manager.__enter__()
            entered = True
        return value

    def callback(self, name: str, step: Callable[[], object]) -> None:
        self._stack.callback(self.attempt, name, step)

    def attempt(self, name: str, step: Callable[[], object]) -> bool:
        """Carry out a step of the release; whether it went well."""
        try:
            step()
            return True
        except BaseException as failure:  # also a Ctrl-C: the other steps come first
            if failure is not self.error:
                self.failures.append(failure)
                if isinstance(failure, Exception):
                    self.logger.error("release: %s: %s", name, failure, extra={"step": name})
            return False

    def close(self, error: BaseException | None) -> None:
        self.error = error
        self._stack.close()

    def _leave(self, manager: AbstractContextManager[Any]) -> None:
        error = self.error
        if error is None:
            manager.__exit__(None, None, None)
            return
        traceback: TracebackType | None = error.__traceback__
        try:
            manager.__exit__(type(error), error, traceback)
        finally:
            error.__traceback__ = traceback  # contextlib lengthens it each time
