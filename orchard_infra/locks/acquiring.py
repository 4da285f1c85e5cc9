"""Waiting for a lock: the one loop that all locks share.

Who has the lock is logged, dead holders are cleared away, and a run that would wait for itself is
refused. The loop is a generator of pauses, so that a thread can sleep through them and a task
can await them. It never waits in a thread of its own: a cancelled task would get the lock later.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias

import attrs

from orchard_infra.errors import EnvironmentLockedError, InfrastructureError
from orchard_infra.locks.base import (
    Held,
    Lease,
    Lock,
    LockKey,
    Place,
    SharedLock,
    connected,
    describe_lock,
)
from orchard_infra.runs.record import RunRecord, Survivor, leader_is_dead
from orchard_infra.system.masking import uninterrupted
from orchard_infra.system.text import duration, printable

# The first in line looks this often, in seconds: the lock is its own some 6 ms after the release,
# for 1 % of a core. The kernel's blocking wait cannot see that the file was removed.
_POLL = (0.008, 0.014)
_TRY_AGAIN = 0.2  # seconds between two tries where a look is enough to see a release
_WAIT = (0.6, 0.9)  # seconds until one behind it looks again, unless it is woken before
_LOOK_AGAIN = 0.2  # seconds between two looks at whether the holder is dead
_SAY_AGAIN = 30.0  # seconds between two log lines of a waiter
_CLEAR_AGAIN = 30.0  # seconds between two looks for what a dead holder left
_UNSIGNED = 0.1  # seconds for which a new holder may not have signed yet
_RETURNS_WITHIN = 30.0  # seconds for a launcher to start the job again that had the lock
_CLEARED = 1.0  # seconds for which somebody else may have the lock of a dead holder, not signed

ClearDead: TypeAlias = Callable[[RunRecord], Sequence[Survivor]]
_Owner: TypeAlias = tuple["weakref.ref[threading.Thread]", "weakref.ref[Any] | None"]

# Which thread and task of this process has a lock or tries for one, by the id of the run. The
# references have no callbacks: a Ctrl-C that is raised in one is printed and lost.
_owners: dict[str, tuple[_Owner, weakref.ref[Lease] | None]] = {}


@attrs.frozen(eq=False, repr=False)
class Pause:
    """Some seconds to wait, fewer when a descriptor becomes ready meanwhile."""

    seconds: float
    _fd: int = -1
    _refuse: Callable[[], object] | None = None

    def wait(self) -> None:
        """Wait in this thread.

        Raises:
            EnvironmentLockedError: The lock belongs to a task of the event loop that this would
                block, so it would never go free.
        """
        if self._refuse is not None:
            self._refuse()
        if self._fd < 0:
            time.sleep(self.seconds)
            return
        import select

        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.poll(self.seconds * 1000)

    async def wait_async(self) -> None:
        """Wait in this task; the event loop goes on."""
        import asyncio

        if self._fd < 0:
            await asyncio.sleep(self.seconds)
            return
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        try:
            loop.add_reader(self._fd, _set, ready)
        except (NotImplementedError, OSError):  # an event loop that knows sockets only
            await asyncio.sleep(self.seconds)
            return
        try:
            await asyncio.wait([ready], timeout=self.seconds)
        finally:
            loop.remove_reader(self._fd)


def _set(ready: Any) -> None:
    if not ready.done():
        ready.set_result(None)


def acquiring(
    lock: Lock,
    key: LockKey,
    record: RunRecord,
    *,
    timeout: float | None,
    clear_dead: ClearDead,
    logger: logging.Logger,
    keep: Callable[[Lease], object] = lambda lease: None,
    will_return: Callable[[RunRecord], bool] = lambda holder: False,
) -> Generator[Pause, None, Lease]:
    """Take a lock. Every `Pause` that comes out is to be waited for before the next step; the
    lease is what the generator returns. Close it when it is not carried on: nothing is left then.

    ``keep`` is given the lease as soon as there is one, with signals blocked, to have it released
    whatever happens next: a Ctrl-C may come before the generator has returned it.

    ``timeout`` is how long to wait for another run, in seconds: 0 fails at once, None waits for
    ever and never gives up. ``clear_dead`` stops what still lives of a dead holder, where that is
    allowed, and returns what it had to leave. ``will_return`` says whether a run that was seen to
    hold the lock is of a job that its launcher may be about to start again.

    Raises:
        EnvironmentLockedError: Another run has it, or this very thread and task. It is logged.
        InfrastructureError: It cannot be taken at all. It is logged.
    """
    attempt = _Attempt(lock, key, record, timeout, clear_dead, logger, keep, will_return)
    try:
        try:
            attempt.begin()
            # No loop of our own here: in Python 3.13 its jump back is outside of the try, and a
            # Ctrl-C that came just then left the place in the queue behind.
            yield from attempt.pauses()
        finally:
            attempt.end()
        assert attempt.lease is not None
        return attempt.lease
    except BaseException:
        # Also a Ctrl-C that comes after the lock was taken. The traceback keeps the lease alive.
        if attempt.lease is not None:
            attempt.lease.release()
        raise


def acquire(
    lock: Lock,
    key: LockKey,
    record: RunRecord,
    *,
    clear_dead: ClearDead = lambda dead: (),
    logger: logging.Logger | None = None,
) -> Lease:
    """Take a lock in this thread, and wait for it as long as the lock itself says."""
    if logger is None:
        logger = logging.getLogger("Infrastructure")
    taken: list[Lease] = []
    steps = acquiring(
        lock,
        key,
        record,
        timeout=lock.timeout,
        clear_dead=clear_dead,
        logger=logger,
        keep=taken.append,
    )
    try:
        with contextlib.closing(steps):
            for pause in steps:
                pause.wait()
        return taken[0]
    except BaseException:
        for lease in taken:
            lease.release()
        raise


@attrs.define(eq=False, repr=False)
class _Attempt:
    """The state of one `acquiring`."""

    lock: Lock
    key: LockKey
    record: RunRecord
    timeout: float | None
    clear_dead: ClearDead
    logger: logging.Logger
    keep: Callable[[Lease], object]
    will_return: Callable[[RunRecord], bool]
    lease: Lease | None = attrs.field(default=None, init=False)
    _asked: Lock = attrs.field(init=False)  # the lock, or one connection of it
    _owner: _Owner = attrs.field(init=False)
    _place: Place | None = attrs.field(default=None, init=False)
    _leave: contextlib.ExitStack = attrs.field(factory=contextlib.ExitStack, init=False)
    _has_paused: bool = attrs.field(default=False, init=False)
    _tries: bool = attrs.field(default=True, init=False)  # not behind others in the queue
    _began: float = attrs.field(init=False)  # monotonic, as all that follows
    _deadline: float = attrs.field(init=False)
    _unchanged: Callable[[], bool] | None = attrs.field(default=None, init=False)
    _try_at: float = attrs.field(default=0.0, init=False)
    _look_at: float = attrs.field(default=0.0, init=False)
    _clear_at: float = attrs.field(default=0.0, init=False)
    _say_at: float = attrs.field(default=0.0, init=False)
    _may_be_unsigned: bool = attrs.field(default=True, init=False)
    _holder: RunRecord | None = attrs.field(default=None, init=False)
    _reason: str | None = attrs.field(default=None, init=False)  # see `Held.reason`
    _free_since: float | None = attrs.field(default=None, init=False)  # see `_gives_way`
    _cleared: str | None = attrs.field(default=None, init=False)  # a run id
    _survivors: tuple[Survivor, ...] = attrs.field(default=(), init=False)
    _refusal: EnvironmentLockedError | None = attrs.field(default=None, init=False)

    @property
    def name(self) -> str:
        return describe_lock(self.lock, self.key)

    def begin(self) -> None:
        self._owner = _this_owner()
        self._asked = self.lock
        self._began = time.monotonic()
        self._deadline = math.inf if self.timeout is None else self._began + self.timeout
        # Before the attempt: another thread that looks must not find a holder it cannot place.
        _note_owner(self.record.run_id, self._owner, None)
        if self.timeout != 0:
            self._stand_in_line()
        self._asked = self._leave.enter_context(connected(self.lock))

    def end(self) -> None:
        if self.lease is None:
            _owners.pop(self.record.run_id, None)
        else:
            _note_owner(self.record.run_id, self._owner, self.lease)
        self._leave.close()

    def pauses(self) -> Generator[Pause, None, None]:
        """Try until it succeeds, with a pause before each try but the first."""
        while not self.succeeds():
            yield self.pause()

    def succeeds(self) -> bool:
        """Try for the lock, where it is our turn."""
        if self._unchanged is not None and time.monotonic() < self._try_at and self._unchanged():
            return False
        self._unchanged = None
        try:
            self._tries = self._place is None or self._place.is_first()
            if self._tries and self._gives_way():
                return False
            if self._tries:
                with uninterrupted():
                    outcome = self._asked.try_acquire(self.key, self.record)
                    if not isinstance(outcome, Held):
                        self.lease = outcome
                        self.keep(outcome)
                        return True
                self._reason = outcome.reason
                self._consider(outcome.holder)
                if self._has_paused:  # else the place in the queue is not taken yet
                    self._unchanged = outcome.unchanged
                    self._try_at = min(time.monotonic() + _TRY_AGAIN, self._deadline)
            elif time.monotonic() >= min(self._say_at, self._deadline):
                self._consider(self._asked.holder(self.key))
            return False
        except InfrastructureError as error:
            self._log_refusal(error)
            raise

    def pause(self) -> Pause:
        """What there is to wait for until the next try."""
        if not self._has_paused:
            self._has_paused = True
            seconds, fd = 0.0, -1  # the place in the queue is taken at the second look
        elif self._tries or self._place is None:
            seconds, fd = self._poll(), -1
        else:
            seconds, fd = random.uniform(*_WAIT), self._place.fileno()
        left = max(0.0, self._deadline - time.monotonic())
        return Pause(min(seconds, left), fd, self._refuse_blocking if self._refusal else None)

    def _poll(self) -> float:
        seconds = getattr(self.lock, "poll", None)
        return random.uniform(*_POLL) if seconds is None else seconds * random.uniform(0.5, 1.5)

    def _refuse_blocking(self) -> None:
        if self._refusal is not None:
            self._log_refusal(self._refusal)
            raise self._refusal

    def _stand_in_line(self) -> None:
        queue = getattr(self.lock, "queue", None)
        # A job that was started again had the lock: the first in line gives way to it.
        has_returned = self.record.restarts_left is not None and self.record.restart
        if queue is None or has_returned:
            return
        line = queue(self.key)
        self._leave.push(line)  # before it is entered: a Ctrl-C may come between
        try:
            self._place = line.__enter__()
        except (OSError, InfrastructureError) as error:  # no directory for it, no descriptors left
            self.logger.debug("waiting for %s beside the queue: %s", self.name, error)

    def _gives_way(self) -> bool:
        """Whether the lock is free only because its job is between two starts, of which the second
        would be refused. It takes a launcher seconds to start ranks again.

        Raises:
            EnvironmentLockedError: Our own time is over.
        """
        holder, lock = self._holder, self._asked
        if holder is None or not isinstance(lock, SharedLock) or not self.will_return(holder):
            return False
        if lock.holder_now(self.key) is not None:
            self._free_since = None
            return False
        now = time.monotonic()
        if self._free_since is None:
            self._free_since = self._say_at = now
        if now - self._free_since >= _RETURNS_WITHIN:
            return False
        self._reason = f"the job of its last holder (pid {holder.pid}) is being started again"
        if now >= self._deadline:
            raise self._locked(now - self._began)
        self._say(now)
        return True

    def _consider(self, holder: RunRecord | None) -> None:
        """The lock is taken: refuse, clear a dead holder away, or go on waiting.

        Raises:
            EnvironmentLockedError: It is over.
        """
        known, self._holder = self._holder, holder
        now = time.monotonic()
        if holder is None:
            if self._may_be_unsigned and self._reason is None:
                self._may_be_unsigned = False
                self._deadline = max(self._deadline, now + _UNSIGNED)
        elif known is None or holder.run_id != known.run_id or now >= self._look_at:
            self._look_at = now + _LOOK_AGAIN
            self._refuse_own(holder)
            # Also behind others in the queue: they may not be allowed to stop what we may.
            self._clear(holder)
            now = time.monotonic()
        if now >= self._deadline:
            raise self._locked(now - self._began)
        if self.timeout != 0:
            self._say(now)

    def _say(self, now: float) -> None:
        if now >= self._say_at:
            self._say_at = now + _SAY_AGAIN
            self.logger.info(
                "waiting for the lock %s%s",
                self.name,
                f": {self._reason}" if self._reason else f", held by {self._describe_holder()}",
                extra={"lock_path": str(self.key.path), "holder": self._holder},
            )

    def _refuse_own(self, holder: RunRecord) -> None:
        """Refuse to wait for ourselves. Another thread of this process may wait, and so may another
        task, as long as it does not block the event loop.
        """
        self._refusal = None
        if holder.leader != self.record.leader or not holder.is_local:
            return
        thread, task = self._owner
        if holder.run_id in _owners:
            (their_thread, their_task), _ = _owners[holder.run_id]
            if their_thread != thread:
                return
        else:  # taken without `acquiring`: nobody knows by whom
            their_task = None
        already = f"this process (pid {holder.pid}) already holds {self.name}"
        is_other = task is not None and their_task is not None and task != their_task
        if is_other and (self.timeout != 0 or _goes_on(their_task)):
            # Raised only if this task blocks the event loop, without which the other one stands.
            self._refusal = self._refused(
                f"{already}, in another task of this event loop, and would wait for itself. "
                "Use `async with` here, or another project name",
                holder,
            )
            return
        raise self._refused(
            f"{already}: it would wait for itself. Leave the first environment before entering it "
            "again (orchard_infra.current_environments() has it, env.close() leaves it), or use "
            "another project name",
            holder,
        )

    def _clear(self, holder: RunRecord) -> None:
        """Have stopped what a dead holder left; remember what is still there."""
        if not _is_dead(holder):
            self._survivors = ()
            return
        if self._cleared == holder.run_id and time.monotonic() < self._clear_at:
            return
        self._survivors = tuple(self.clear_dead(holder))
        now = time.monotonic()
        self._cleared, self._clear_at = holder.run_id, now + _CLEAR_AGAIN
        # Worth another try, also after the time is over: what had the lock may just have gone.
        self._deadline = max(self._deadline, now + (_UNSIGNED if self._survivors else _CLEARED))

    def _describe_holder(self) -> str:
        if self._holder is None:
            return "an unknown run"
        if self._survivors:
            listed = "; ".join(survivor.describe() for survivor in self._survivors)
            return f"processes that a dead run left: {listed}"
        return self._holder.describe()

    def _locked(self, waited: float) -> EnvironmentLockedError:
        path, holder = self.name, self._holder
        since = f" (waited {duration(waited)})" if waited >= 1 else ""
        if holder is not None and self._survivors:
            listed = "; ".join(survivor.describe() for survivor in self._survivors)
            pids = " ".join(str(survivor.pid) for survivor in self._survivors)
            return self._refused(
                f"the run that holds {path} is dead (pid {holder.pid}, user "
                f"{printable(holder.user)}), but processes of it still live{since}: {listed}. "
                f"Set allow_process_kill=True to have them stopped, or run: kill {pids}",
                holder,
            )
        if self._reason is not None:
            return self._refused(
                f"the lock {path} cannot be taken now{since}: {self._reason}. "
                "Wait for it with timeout=None, or with a number of seconds",
                holder,
            )
        is_file = path == str(self.key.path)
        ask = f"fuser -v {path}" if is_file else "orchard-infra status --lock-url"
        stop = f"find it with: {ask}"
        if holder is None:
            who = "a run that left no readable record"
        elif _is_dead(holder):
            who = f"a process that a dead run left ({holder.describe()})"
        else:
            who = holder.describe()
            stop = f"stop it (kill {holder.pid}{'' if holder.is_local else ' over there'})"
        return self._refused(
            f"the lock {path} is held by {who}{since}. "
            f"Wait for it with timeout=None, {stop}, or use another project name",
            holder,
        )

    def _refused(self, message: str, holder: RunRecord | None) -> EnvironmentLockedError:
        return EnvironmentLockedError(
            message,
            holder=holder,
            survivors=self._survivors,
            lock_path=str(self.key.path),
            reason=self._reason,
        )

    def _log_refusal(self, error: InfrastructureError) -> None:
        holder = getattr(error, "holder", None)
        extra = {"lock_path": str(self.key.path), "holder": holder}
        self.logger.error("%s", error, extra=extra)


def _is_dead(holder: RunRecord) -> bool:
    """Whether the holder of a lock that is held is proven dead. Another boot proves nothing then:
    somebody has the kernel's lock, on another host, say.
    """
    with uninterrupted():  # a descriptor of /proc could get lost
        return holder.is_local and leader_is_dead(holder)


def _this_owner() -> _Owner:
    """This thread, and the asyncio task that runs in it."""
    task = None
    asyncio = sys.modules.get("asyncio")  # who has not loaded it has no task
    if asyncio is not None:
        try:
            task = asyncio.current_task()
        except RuntimeError:  # there is no event loop running
            pass
    return weakref.ref(threading.current_thread()), None if task is None else weakref.ref(task)


def give_back(lease: Lease) -> None:
    """Release a lease, and forget which thread has it.

    A session is a circle of references: until it is collected its lease is there, and with each
    one that is remembered the next attempt takes longer.
    """
    lease.release()
    _owners.pop(lease.record.run_id, None)


def _goes_on(task: weakref.ref[Any] | None) -> bool:
    """Whether an asyncio task may still give its lock back. Each cell of a notebook is a task."""
    running = None if task is None else task()
    return running is not None and not running.done()


def _note_owner(run_id: str, owner: _Owner, lease: Lease | None) -> None:
    for other, (_, taken) in tuple(_owners.items()):
        if taken is not None and taken() is None:
            _owners.pop(other, None)  # released, and forgotten
    try:
        _owners[run_id] = owner, None if lease is None else weakref.ref(lease)
    except TypeError:  # somebody's own lease, which has no room for a reference: it is remembered
        _owners[run_id] = owner, None
