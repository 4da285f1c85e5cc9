"""Whether a signal came to the wrapper alone, or to its whole process group."""

from __future__ import annotations

import os
import signal
import time

import attrs

_SENT_TO_ALL_WITHIN = 0.05  # seconds


@attrs.define(eq=False, repr=False)
class Witness:
    """A process of our group that only shows whether a signal came to the whole group.

    A signal says who sent it, and not to whom else. Whatever is sent to the witness stays
    pending there, and shows in ``/proc/PID/status`` (proc(5)). It ends with us, also when we are
    killed: the pipe that it reads from closes.
    """

    pid: int
    _pipe: int

    @classmethod
    def start(cls) -> Witness | None:
        """None where no more processes are allowed: then every signal is passed on."""
        try:
            reads, writes = os.pipe()
        except OSError:
            return None
        try:
            pid = os.fork()
        except OSError:
            os.close(reads)
            os.close(writes)
            return None
        if pid == 0:
            try:
                # It must not hold the lock, nor a pipe that somebody reads to its end.
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                os.closerange(0, reads)
                os.closerange(reads + 1, 1 << 20)
                os.read(reads, 1)
            finally:
                os._exit(0)
        os.close(reads)
        return cls(pid, writes)

    def has_seen(self, signum: int) -> bool:
        """Whether the same signal has come to the witness; it is given a moment to come."""
        deadline = time.monotonic() + _SENT_TO_ALL_WITHIN
        while not (seen := self._is_pending(signum)) and time.monotonic() < deadline:
            time.sleep(0.002)
        return seen

    def _is_pending(self, signum: int) -> bool:
        try:
            with open(f"/proc/{self.pid}/status", "rb") as status:
                for line in status:
                    name, _, mask = line.partition(b":")
                    if name in (b"SigPnd", b"ShdPnd") and int(mask, 16) >> (signum - 1) & 1:
                        return True
        except OSError:
            pass
        return False

    def dismiss(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # our own child, and not reaped yet
        os.waitpid(self.pid, 0)
        self.forget()

    def forget(self) -> None:
        """For one that has ended by itself and was reaped."""
        os.close(self._pipe)
