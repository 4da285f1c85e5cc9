"""A forked child that does what it is told, for checks that need another process."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator

import attrs


@attrs.frozen
class Line:
    """One end of a line between two processes. What is said is one line of text."""

    _reads: int
    _writes: int
    _buffer: bytearray = attrs.field(factory=bytearray)

    def say(self, text: str) -> None:
        os.write(self._writes, text.encode() + b"\n")

    def hear(self, seconds: float) -> str:
        """The next line.

        Raises:
            AssertionError: None came in time, or the other process has ended.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._reads], [], [], left)[0]:
                raise AssertionError(f"another process did not answer within {seconds:g} s")
            data = os.read(self._reads, 65536)
            if not data:
                raise AssertionError("another process ended before it answered")
            self._buffer.extend(data)
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer[:] = rest
        return line.decode()

    def close(self) -> None:
        os.close(self._reads)
        os.close(self._writes)


@attrs.define(eq=False)
class Child:
    """A forked child. ``line`` leads to it."""

    pid: int
    line: Line
    _is_reaped: bool = False

    def kill(self) -> None:
        """As ``kill -9``, and wait for its end."""
        if not self._is_reaped:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def finish(self, seconds: float) -> None:
        """Wait for its end.

        Raises:
            AssertionError: It failed, with the error that it has printed, or goes on for too long.
        """
        deadline = time.monotonic() + seconds
        while not self._is_reaped:
            if self._reap(os.WNOHANG):
                break
            if time.monotonic() > deadline:
                raise AssertionError(f"another process did not end within {seconds:g} s")
            time.sleep(0.002)

    def _reap(self, options: int = 0) -> bool:
        pid, status = os.waitpid(self.pid, options)
        if pid == 0:
            return False
        self._is_reaped = True
        code = os.waitstatus_to_exitcode(status)
        if code > 0:
            raise AssertionError("another process failed; its error is on stderr")
        return True


@contextlib.contextmanager
def forked(work: Callable[[Line], object]) -> Iterator[Child]:
    """A child that does ``work(line)`` and ends. It is killed if it lives when the block ends."""
    to_child, to_parent = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(to_child[1])
            os.close(to_parent[0])
            work(Line(to_child[0], to_parent[1]))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(to_child[0])
    os.close(to_parent[1])
    child = Child(pid, Line(to_parent[0], to_child[1]))
    try:
        yield child
    finally:
        child.kill()
        child.line.close()
