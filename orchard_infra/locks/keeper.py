"""The keeper: looks after a held lock in the background while the run is busy."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import cast

from orchard_infra.errors import LockLostError, LockSuspectError
from orchard_infra.locks.base import Lease, RemoteLease, is_remote
from orchard_infra.system import background
from orchard_infra.system.background import Task

_STOP_WITHIN = 10.0  # seconds for a renewal that is under way when the run ends


class Keeper:
    """Renews a lease every ``lease.interval`` seconds, and says once when it is lost.

    It shares the one background thread of the process, so ``on_lost`` must be quick. A lease on a
    server is renewed in a thread of its own: a server that does not answer must not hold up the
    others, nor a slow callback of theirs let it expire. A forked child has no such thread, which is
    right: the child keeps nothing.
    """

    def __init__(
        self, lease: Lease, on_lost: Callable[[LockLostError], object], logger: logging.Logger
    ) -> None:
        self.lease = lease
        self.on_lost = on_lost
        self.logger = logger
        self._task = Task(self._keep)
        self._thread: threading.Thread | None = None
        self._wake = -1  # the end of a pipe, written to once
        self._suspect = False
        self._is_stopping = False
        self._is_over = False

    def start(self) -> None:
        if is_remote(self.lease):
            wakes, self._wake = os.pipe()
            self._thread = threading.Thread(
                target=self._keep_remote,
                args=(cast(RemoteLease, self.lease), wakes),
                name="orchard-infra-lock",
                daemon=True,
            )
            self._thread.start()
        else:
            self._task.due = time.monotonic() + self.lease.interval
            background.add(self._task)

    def stop(self) -> None:
        """Stop renewing. A renewal that is just under way is waited for, for a bounded time."""
        if self._thread is None:
            background.remove(self._task)
            return
        self._is_stopping = True
        # A forked child that lives has a copy of this end, so closing it alone wakes nobody.
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself: the lock is lost
            os.write(self._wake, b"\0")
        os.close(self._wake)
        self._thread.join(_STOP_WITHIN)
        self._is_over = True

    def _keep(self) -> None:
        if self._renews():
            self._task.due = time.monotonic() + self.lease.interval

    def _keep_remote(self, lease: RemoteLease, wake: int) -> None:
        if sys.platform != "win32":
            # One that this thread took would not interrupt a call in which the main thread waits.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with contextlib.closing(os.fdopen(wake, "rb", buffering=0)):
            while True:
                _wait(wake, lease.watched_fd, lease.interval)
                if self._is_stopping or not self._renews():
                    return

    def _renews(self) -> bool:
        """Renew once; whether it is worth while to go on."""
        try:
            self.lease.renew()
        except LockLostError as error:
            if not self._is_over:  # else it was given back while this renewal took its time
                self.on_lost(error)
            return False
        except LockSuspectError as error:
            if not self._suspect:
                self.logger.warning("%s", error)
            self._suspect = True
        except Exception:
            # A full disk or a stale handle for a while: the lock may well be ours still.
            if not self._suspect:
                self.logger.warning("the lock could not be renewed", exc_info=True)
            self._suspect = True
        else:
            if self._suspect:
                self.logger.info("the lock is confirmed: it was held all the time")
            self._suspect = False
        return True


def _wait(wake: int, watched: int, seconds: float) -> None:
    """Wait until it is time to renew, or until one of the descriptors is ready."""
    import select

    if sys.platform == "win32":
        time.sleep(min(seconds, 0.5))
        return
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    if watched >= 0:
        poll.register(watched, select.POLLIN)
    poll.poll(max(0.0, seconds) * 1000)
