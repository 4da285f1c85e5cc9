"""A stack of context managers that do not know each other, and must not harm each other."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from orchard_infra.system.masking import interruptible, uninterrupted

_T = TypeVar("_T")
_TRIES = 100  # to begin a step: a signal that waited is raised before it has begun


class Exits:
    """Leaves strategies of different authors in reverse order.

    In a bare `contextlib.ExitStack` one that fails hides the error of the body from those around
    it, and one that swallows an error swallows the body's. Here each ``__exit__`` is given the
    body's own error; what it returns is ignored, and what it raises is collected in ``failures``.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self.error: BaseException | None = None
        self.failures: list[BaseException] = []
        self._steps: list[Callable[[], object]] = []

    def enter(
        self,
        name: str,
        manager: AbstractContextManager[_T],
        *,
        is_short: bool = False,
        is_foreign: bool = False,
    ) -> _T:
        """Enter a context manager. A Ctrl-C that comes meanwhile is raised once it is entered, and
        not half-way. One that ``is_short`` is not interrupted on the way back either.

        One that ``is_foreign`` gets its signals also on the way in: a program that it starts would
        inherit the mask, and never see a SIGTERM.
        """
        entered: list[_T] = []
        carry_out = self._carry_out if is_short else self.attempt

        def leave() -> None:
            if not entered:
                # A signal may have come when a generator function was through with its first half.
                close = getattr(getattr(manager, "gen", None), "close", None)
                if close is not None:
                    self.attempt(name, close)
                return
            error = self.error
            if error is None:
                carry_out(name, functools.partial(manager.__exit__, None, None, None))
                return
            traceback = error.__traceback__
            carry_out(name, functools.partial(manager.__exit__, type(error), error, traceback))
            error.__traceback__ = traceback  # contextlib lengthens it each time

        with uninterrupted():
            self._steps.append(leave)  # first: between the two nothing could undo it
            with interruptible() if is_foreign else uninterrupted():
                # All in C: no signal is acted upon after it was entered, and before that is noted.
                entered.extend(map(type(manager).__enter__, (manager,)))
        return entered[0]

    def callback(self, name: str, step: Callable[[], object]) -> None:
        """Have a short step carried out on the way back, uninterrupted."""
        self._steps.append(functools.partial(self._carry_out, name, step))

    def attempt(self, name: str, step: Callable[[], object]) -> bool:
        """Carry out a step of the release that may take long; whether it went well. A signal may
        end the step, but nothing between two steps: see `close`.
        """
        started = False

        def carry_out() -> None:
            nonlocal started
            with interruptible():
                started = True
                step()

        for _ in range(_TRIES):
            went_well = self._carry_out(name, carry_out)
            if started:
                return went_well
        return self._carry_out(name, step)

    def _carry_out(self, name: str, step: Callable[[], object]) -> bool:
        try:
            with uninterrupted():  # again, if an exception out of the step before has ended that
                step()
            return True
        except BaseException as failure:  # also a Ctrl-C: the other steps come first
            if failure is not self.error:
                self.failures.append(failure)
                if isinstance(failure, Exception):
                    self.logger.error("release: %s: %s", name, failure, extra={"step": name})
            return False

    def close(self, error: BaseException | None) -> None:
        """Leave everything. To be called within `uninterrupted`: a Ctrl-C between two steps would
        leave out all that are still to come.
        """
        self.error = error
        while self._steps:
            try:
                self._steps.pop()()
            except BaseException as failure:  # the logger's, or one that came between two steps
                self.failures.append(failure)
