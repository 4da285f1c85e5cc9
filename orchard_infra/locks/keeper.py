"""The keeper: one light thread that looks after a held lock while the run is busy."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import attrs

from orchard_infra.errors import LockLostError
from orchard_infra.locks.base import Lease


@attrs.define
class Keeper:
    """Renews a lease every ``lease.interval`` seconds, and says once when it is lost.

    ``also`` is called as often; it keeps other files of the run from looking old. The thread is
    gone in a forked child, which is right: the child keeps nothing.
    """

    lease: Lease
    on_lost: Callable[[LockLostError], object]
    also: Callable[[], object]
    logger: logging.Logger
    _ended: threading.Event = attrs.field(factory=threading.Event, init=False)
    _thread: threading.Thread = attrs.field(init=False)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._keep, name="orchard-infra-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; it may be in the middle of a renewal, which is waited for (5 s)."""
        self._ended.set()
        self._thread.join(5.0)

    def _keep(self) -> None:
        while not self._ended.wait(self.lease.interval):
            try:
                self.lease.renew()
                self.also()
            except LockLostError as error:
                self.on_lost(error)
                return
            except Exception:
                # A full disk or a stale handle for a while: the lock may well be ours still.
                self.logger.warning("the lock could not be renewed", exc_info=True)
