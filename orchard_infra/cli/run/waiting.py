"""What a person sees while `run` waits for the lock: a spinner, or a line every half minute."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchard_infra.config import Settings
from orchard_infra.locks.base import LockKey
from orchard_infra.locks.file import FileLock
from orchard_infra.runs.record import RunRecord
from orchard_infra.system.text import duration, printable

if TYPE_CHECKING:
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

_LOOK_AGAIN = 1.0  # seconds between two looks at who holds the lock


class WaitingHandler(logging.Handler):
    """Shows what the library logs around a command.

    The wait for a lock is logged at once and every half minute. The first of these records starts
    the spinner on a terminal. Warnings are one line each.
    """

    def __init__(
        self, settings: Settings, tell: Callable[[str], None], *, is_file: bool = True
    ) -> None:
        super().__init__(logging.INFO)
        self._is_file = is_file  # and can be looked at in no time
        self._holder: RunRecord | None = None
        self._project = settings.project
        self._key = LockKey(settings.project, settings.lock_path)
        self._tell = tell
        self._began = time.monotonic()
        self._live: Live | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "holder"):
            if record.levelno == logging.INFO:
                self._show_waiting(record.holder)
            # A refusal is an error, and told with what to do on the command line.
        elif record.levelno >= logging.WARNING and not record.msg.startswith("stop requested"):
            # A stop is requested here only when the lock is lost, which is a line of its own.
            self._tell(record.getMessage())

    def stop_waiting(self) -> None:
        """Leave nothing of the spinner on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show_waiting(self, holder: RunRecord | None) -> None:
        self._holder = holder
        if self._live is None:
            self._live = self._spin(holder)
        if self._live is None:
            who = holder.describe() if holder else "an unknown run"
            waited = duration(time.monotonic() - self._began)
            self._tell(f"waiting for project {self._project} ({waited}), held by {who}")

    def _spin(self, holder: RunRecord | None) -> Live | None:
        if sys.stderr is None or not sys.stderr.isatty():
            return None
        from rich.live import Live
        from rich.spinner import Spinner

        from orchard_infra.cli.output import console

        terminal = console(stderr=True)
        if terminal.is_dumb_terminal:
            return None
        spinner = Spinner("line")
        shown, program, looked = holder, _program_of(holder), time.monotonic()

        def render() -> Spinner:
            nonlocal shown, program, looked
            if time.monotonic() - looked > _LOOK_AGAIN:
                looked = time.monotonic()
                holder = FileLock().holder(self._key) if self._is_file else self._holder
                if holder != shown:
                    shown, program = holder, _program_of(holder)
            spinner.update(text=self._line(shown, program))
            return spinner

        live = Live(get_renderable=render, console=terminal, refresh_per_second=3, transient=True)
        live.start()
        terminal.show_cursor(True)  # somebody may kill us, or press Ctrl-Z
        return live

    def _line(self, holder: RunRecord | None, program: str) -> Text:
        from rich.text import Text

        waited = duration(time.monotonic() - self._began)
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(printable(self._project), "bold")
        line.append(f": waiting {waited}; ")
        if holder is None:
            line.append("held by an unknown run")
        else:
            age = duration(time.time() - holder.started_at)
            line.append(f"held for {age} by pid {holder.pid} on {printable(holder.host)} ")
            line.append(printable(f"({holder.user}): {program}"))
        return line


def _program_of(holder: RunRecord | None) -> str:
    from orchard_infra.cli.output import command

    return "" if holder is None else command(holder.argv)
