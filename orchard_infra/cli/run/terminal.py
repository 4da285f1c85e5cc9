"""The terminal of a command: what must be as it was, once the command has gone."""

from __future__ import annotations

import os
import termios
from typing import Any

import attrs


@attrs.define(eq=False, repr=False)
class Terminal:
    """The controlling terminal, and how it was when the command got it."""

    _fd: int
    _modes: list[Any] | None  # None: it was somebody else's then

    @classmethod
    def controlling(cls) -> Terminal | None:
        """None where there is none."""
        try:
            fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError:
            return None
        terminal = cls(fd, None)
        if terminal._is_ours():
            terminal._modes = terminal._read_modes()
        return terminal

    def is_edited(self) -> bool:
        """Whether a program reads keys rather than lines: a prompt with history, an editor."""
        modes = self._read_modes()
        return modes is not None and not modes[3] & termios.ICANON

    def restore_modes(self) -> None:
        """After a command that was killed: a shell does so for a job that ends by a signal."""
        if self._modes is None or not self._is_ours() or self._read_modes() == self._modes:
            return
        try:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._modes)
        except termios.error:
            pass

    def take_from_the_dead(self) -> None:
        """Take it back from a process group that is gone, such as that of a killed shell.

        Never from a live one: that may be the shell that has put us into the background.
        """
        if self._modes is None or self._is_ours():
            return
        try:
            os.killpg(os.tcgetpgrp(self._fd), 0)
        except ProcessLookupError:
            os.tcsetpgrp(self._fd, os.getpgrp())
        except OSError:
            pass

    def _is_ours(self) -> bool:
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return False

    def _read_modes(self) -> list[Any] | None:
        try:
            return termios.tcgetattr(self._fd)
        except termios.error:
            return None
