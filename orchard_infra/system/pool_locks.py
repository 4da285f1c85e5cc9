"""A `multiprocessing.Pool` whose workers died at a bad moment does not hang the program.

When SIGTERM ends the workers, as a signal to the whole process group does, one of them dies with
the lock of the queue of tasks: an idle worker holds it while it waits for one. Another dies with
the lock of the queue of results, or in the middle of a message. Python then waits without a limit
before it ends the pool. A program without a handler ends by the same signal. One that unwinds,
because of our handler or its own, would stay there for ever.

In Python 3.12 the thread of the pool that replaces such workers dies itself if the exit has begun
meanwhile. The other threads of the pool, and the program, would wait for its last word for ever.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Container, Iterator, Mapping
from types import FrameType
from typing import Any

PATIENCE = 1.0  # seconds between two looks: a pool whose workers are well ends in milliseconds
_DRAINED = 2**28  # bytes of tasks that one look reads at most: leases have to be renewed, too
_REFILL = 0.05  # seconds in which whoever writes a long task writes more of it


class StuckPool:
    """Frees the main thread when two looks, `PATIENCE` apart, find it at the end of one pool."""

    def __init__(self) -> None:
        self._seen: int | None = None

    def look(self) -> bool:
        """Whether it may be stuck: look again soon. Called by the background thread."""
        frame = _end_of_pool()
        seen, self._seen = self._seen, None if frame is None else id(frame)
        if frame is None or self._seen != seen:
            return frame is not None
        try:
            _free(frame.f_locals)
        except (KeyError, AttributeError, ValueError, OSError):
            pass  # another Python, a pool of threads, or it went on just now
        return True


def _end_of_pool() -> FrameType | None:
    """The call of `Pool._terminate_pool` that the main thread is in."""
    pool = getattr(sys.modules.get("multiprocessing.pool"), "Pool", None)
    code = getattr(getattr(pool, "_terminate_pool", None), "__code__", None)
    frame = sys._current_frames().get(threading.main_thread().ident or 0) if code else None
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _free(pool: Mapping[str, Any]) -> None:
    """Do what a pool waits for that is ending; ``pool`` has the variables of `_terminate_pool`."""
    living = [worker for worker in pool["pool"] if worker.exitcode is None]
    if living:
        # This is what Python does next. While one lives the lock may be its own: with the lock
        # taken away from it, two would read one queue, and each would get a part of a message.
        for worker in living:
            worker.terminate()
        return
    inqueue, outqueue = pool["inqueue"], pool["outqueue"]
    task_handler, result_handler = pool["task_handler"], pool["result_handler"]
    if not pool["worker_handler"].is_alive():
        # This is its last act, which it has skipped if it died: Python 3.12 refuses to fork, and
        # so to replace a worker, once the exit has begun. A second None is not even read.
        pool["taskqueue"].put(None)
    freed = _release_orphan(outqueue._wlock)
    # Where a worker died in the middle of a message, `recv` would take its rest for the next one.
    if not task_handler.is_alive() or _drain(inqueue):
        freed |= _release_orphan(inqueue._rlock)
    if freed:
        logging.getLogger("Infrastructure").info(
            "a worker of multiprocessing.Pool has died with the lock of its queue: released it"
        )
    elif not task_handler.is_alive() and result_handler.is_alive() and _is_joining():
        # It waits for the rest of a message whose writer is dead. This tells it the end.
        outqueue._writer.close()


def _drain(queue: Any) -> bool:
    """Read what tasks there are, which nobody will do; whether there were none."""
    drained = 0
    # Once the main thread has the lock it reads them itself.
    while not queue._rlock._semlock._count() and drained < _DRAINED and queue._reader.poll(_REFILL):
        drained += len(os.read(queue._reader.fileno(), 2**16))
    return drained == 0


def _release_orphan(lock: Any) -> bool:
    """Release a lock that no thread of this process holds, and no living worker."""
    if lock._semlock._count():
        return False
    is_orphan = not lock.acquire(False)
    lock.release()
    return is_orphan


def _is_joining() -> bool:
    """Whether the main thread waits for a thread to end."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code is not threading.Thread.join.__code__:
        frame = frame.f_back
    return frame is not None


def has_pools() -> bool:
    """Whether this process has a `multiprocessing.Pool` that was not closed."""
    return any(True for _ in _pools())


def _pools() -> Iterator[Any]:
    module, util = sys.modules.get("multiprocessing.pool"), sys.modules.get("multiprocessing.util")
    if module is None or util is None:
        return
    end = module.Pool._terminate_pool.__func__
    for one in tuple(util._finalizer_registry.values()):
        if getattr(one._callback, "__func__", None) is end and (pool := one._weakref()) is not None:
            yield pool


def end_pools(pids: Container[int]) -> None:
    """Mark the pools, all of whose workers are about to be stopped, as terminated.

    Such a pool would make new workers, and what is asked of it later would wait without a limit:
    the lock of its queue dies with a worker. Its own thread sees the mark when the first one ends.
    """
    for pool in _pools():
        try:
            workers = [worker.pid for worker in tuple(pool._pool)]
            if workers and all(pid in pids for pid in workers):
                pool._state = pool._worker_handler._state = "TERMINATE"
        except (AttributeError, ValueError):  # another Python, or a pool of threads
            continue
