"""A `multiprocessing.Pool` whose lock has died with a worker does not hang the program.

An idle worker holds the lock of the queue of tasks while it waits for one. When SIGTERM ends that
worker, as a signal to the whole process group does, nobody ever gives the lock back; and Python
takes it, without a limit, before it ends the other workers. A program without a handler ends by the
same signal. One that unwinds, because of our handler or its own, would stay there for ever.
"""

from __future__ import annotations

import logging
import sys
import threading

import attrs

PATIENCE = 1.0  # seconds between two looks: live workers hand the lock over within milliseconds


@attrs.define(eq=False, repr=False)
class StuckPool:
    """Frees the main thread when two looks, `PATIENCE` apart, find it waiting for such a lock."""

    _seen: tuple[int, int] | None = None

    def look(self) -> bool:
        """Whether it may be waiting: look again soon. Called by the background thread."""
        module = sys.modules.get("multiprocessing.pool")
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        end = getattr(getattr(module, "Pool", None), "_help_stuff_finish", None)
        if frame is None or frame.f_code is not getattr(end, "__code__", None):
            self._seen = None
            return False
        # It takes the lock and drains the queue. The same instruction twice is the lock.
        here = id(frame), frame.f_lasti
        if here != self._seen:
            self._seen = here
            return True
        self._seen = None
        try:
            # The workers are ended next, so that none can use the lock at the same time for long.
            frame.f_locals["inqueue"]._rlock.release()
        except (KeyError, AttributeError, ValueError):  # another Python, or it went on just now
            return False
        logging.getLogger("Infrastructure").info(
            "a worker of multiprocessing.Pool has died with the lock of its queue: released it"
        )
        return False


def has_pools() -> bool:
    """Whether this process has a `multiprocessing.Pool` that was not closed."""
    pool, util = sys.modules.get("multiprocessing.pool"), sys.modules.get("multiprocessing.util")
    if pool is None or util is None:
        return False
    end = pool.Pool._terminate_pool.__func__
    finalizers = tuple(util._finalizer_registry.values())
    return any(getattr(one._callback, "__func__", None) is end for one in finalizers)
