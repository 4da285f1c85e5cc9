"""The keeper: looks after a held lock in the background while the run is busy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import attrs

from orchard_infra.errors import LockLostError
from orchard_infra.locks.base import Lease
from orchard_infra.system import background
from orchard_infra.system.background import Task


@attrs.define(eq=False)
class Keeper:
    """Renews a lease every ``lease.interval`` seconds, and says once when it is lost.

    It shares the one background thread of the process, so ``on_lost`` must be quick. A forked
    child has no such thread, which is right: the child keeps nothing.
    """

    lease: Lease
    on_lost: Callable[[LockLostError], object]
    logger: logging.Logger
    _task: Task = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._task = Task(self._keep)

    def start(self) -> None:
        self._task.due = time.monotonic() + self.lease.interval
        background.add(self._task)

    def stop(self) -> None:
        """Stop renewing. A renewal that is just under way is waited for, for a bounded time."""
        background.remove(self._task)

    def _keep(self) -> None:
        try:
            self.lease.renew()
        except LockLostError as error:
            self.on_lost(error)
            return
        except Exception:
            # A full disk or a stale handle for a while: the lock may well be ours still.
            self.logger.warning("the lock could not be renewed", exc_info=True)
        self._task.due = time.monotonic() + self.lease.interval
