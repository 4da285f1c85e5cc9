"""Signals that ask a run to stop, turned into something that a run can act on.

By default SIGTERM ends Python at once: no ``finally``, no ``__exit__``. `SignalStop` makes it an
exception in the main thread, or a flag that a loop looks at.

A handler interrupts the main thread anywhere, inside of a logging call or with a lock in its
hands. So the handlers here set attributes, wake the background thread in a way that may be
interrupted by itself, and raise. Whatever is to be said or called is left to that thread.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from signal import Signals
from types import FrameType, TracebackType
from typing import Any, Literal

import attrs

from orchard_infra.environment import Environment
from orchard_infra.stopping import blocked
from orchard_infra.stopping.takeover import Takeover, is_bad_moment, is_forking, takeover_of
from orchard_infra.system import background, pool_locks
from orchard_infra.system.background import Task
from orchard_infra.system.masking import is_in_main_thread, uninterrupted
from orchard_infra.system.pool_locks import StuckPool

_AGAIN = 0.1  # seconds until a signal that a blocking call slept through is sent again
_SOON = 0.02  # seconds until one that came at a bad moment is
_ONE_REQUEST = 5.0  # seconds in which the same signal again means nothing new, in a job
_RANK_BLOCKED = 30.0  # seconds that a rank may be deaf, the default
_POOLS = 5.0  # seconds between two looks at a pool that may hang, while no signal has come
_LOOK = 1.0  # seconds between two looks at a main thread that may be deaf


class RunStopped(SystemExit):
    """A signal asked the run to stop. ``signum`` says which; the exit status is 128 + signum.

    A `SystemExit`, so that ``except Exception`` does not swallow it, asyncio lets it through and
    no traceback is printed.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {Signals(self.signum).name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.signum,)


def stop_error(signum: int) -> BaseException:
    """What a run is left with when this signal has asked it to stop."""
    return KeyboardInterrupt() if signum == signal.SIGINT else RunStopped(signum)


def stopped_by(error: BaseException) -> int | None:
    """The signal of which `stop_error` made this error; None for any other one."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    return error.signum if isinstance(error, RunStopped) else None


def _to_signals(signals: Iterable[int]) -> tuple[Signals, ...]:
    return tuple(Signals(signum) for signum in signals)


def _default_signals() -> tuple[Signals, ...]:
    return _to_signals(getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n))


def _catchable(instance: object, attribute: attrs.Attribute[Any], signals: Iterable[int]) -> None:
    for signum in signals:
        if signum in (getattr(signal, "SIGKILL", None), getattr(signal, "SIGSTOP", None)):
            raise ValueError(f"{Signals(signum).name} cannot be caught")


@attrs.frozen
class SignalStop:
    """Turns signals into a graceful stop.

    ``mode="raise"`` raises `RunStopped` in the main thread. Ctrl-C is left to Python, except in a
    rank of a job, see below.
    ``mode="flag"`` only sets ``env.stop_requested`` at the first signal or Ctrl-C. It raises at
    the second one, or when ``deadline`` seconds have passed: `RunStopped`, or `KeyboardInterrupt`
    for Ctrl-C. A run that still waits for its lock has no loop that would see the flag: there the
    first one raises.

    ``signals`` are those that ask to stop; add SIGUSR1 or SIGUSR2 where a scheduler warns with
    them. A signal that arrives while a `RunStopped` is under way, or during the release, waits for
    the end of the release, but no longer than ``hold_limit`` seconds. It is raised then, wherever
    the main thread is, and so is every later one: a release that hangs can be interrupted.

    A stop is never lost. One that arrived during the release of a run that failed is raised after
    it, with the error of the run as its context: a sweep that catches the errors of its trials
    ends all the same.

    In a rank of a distributed job the same signal again, within 5 s, is no second one: a launcher
    passes on what its ranks got as well, and so do schedulers. There ``mode="raise"`` takes Ctrl-C
    over, too, and raises `KeyboardInterrupt` once. A process of a scheduler's job that is no rank
    is spared the second signal in the same way, but not the second Ctrl-C: that is a person. (In a
    job of submitit's LocalExecutor it is the controller, see `stop_before_requeue`.)

    Handlers run in Python only. A main thread that hangs in C, in a collective whose peer has gone,
    is deaf. If it has not come back to Python ``blocked_limit`` seconds after a signal, the default
    action of the signal ends the process; what it leaves is cleared up by the next prepare. None
    means 30 s for ranks of a job with ``mode="raise"``, and never for all others; `math.inf` means
    never. A single call into C that takes longer is ended, too. One that comes back to Python now
    and then is not, nor one that waits in Python's own way (`time.sleep`, a lock, a socket). It
    works on Linux, while nobody else, such as an event loop, has Python's wakeup fd (see
    `signal.set_wakeup_fd`), and if the main thread does not keep the GIL.

    Only default handlers are replaced, and put back at the end. A handler of somebody else
    (Lightning, submitit, a notebook, or one that a C library installed) stays, and so does an
    ignored signal (nohup). In a forked child signals do what they did before.

    Outside of the main thread there are no handlers, only `Environment.request_stop`. On Windows
    there is no SIGHUP, and a deadline does not interrupt a blocking call; neither is tested.
    """

    mode: Literal["raise", "flag"] = attrs.field(
        default="raise", validator=attrs.validators.in_(("raise", "flag"))
    )
    deadline: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.ge(0))
    )
    signals: tuple[Signals, ...] = attrs.field(
        factory=_default_signals, converter=_to_signals, validator=_catchable
    )
    hold_limit: float = attrs.field(default=30.0, validator=attrs.validators.ge(0))
    blocked_limit: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.gt(0))
    )

    def __attrs_post_init__(self) -> None:
        if self.deadline is not None and self.mode != "flag":
            raise ValueError('a deadline is for mode="flag"; otherwise a signal raises at once')

    def around(self, env: Environment) -> SignalWatch:
        """See `Strategy.around`. To be entered in the main thread, before threads or event loops
        rely on the handlers.
        """
        return SignalWatch(self, env)


class SignalWatch(Takeover):
    """The live side of `SignalStop`, for one environment.

    Where environments nest, the innermost one decides whether a signal raises; the flags of those
    around it are set as well. When it ends they get what it held, or took for a mere flag.
    """

    def __init__(self, config: SignalStop, env: Environment) -> None:
        super().__init__()
        self.config = config
        self.env = env
        self._signalled: int | None = None
        self._raised = False
        self._under_way: Callable[[], object] = lambda: None
        self._holding = False
        self._hold_until = 0.0  # monotonic, as all times here
        self._tried_since = math.inf
        self._held: list[int] = []
        self._deadline = math.inf
        self._again = math.inf  # when what is held is sent again
        self._heeded: dict[int, float] = {}  # when, by signal
        self._nudged: set[int] = set()  # signals sent to a deaf main thread
        self._listens = False
        self._task = Task(self._signal_if_due)
        self._lookout = Task(self._look_at_main_thread)
        self._pools = Task(self._look_at_pools, time.monotonic() + _POOLS)
        self._stuck_pool = StuckPool()

    def __enter__(self) -> None:
        """Take over the default handlers, all or none, also when a signal arrives meanwhile.

        Raises:
            RunStopped: A signal arrived meanwhile.
        """
        try:
            self._start()
        except BaseException:
            self._end()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the handlers back. Watches may end in any order.

        Raises:
            BaseException: `RunStopped`, or `KeyboardInterrupt`, for the first signal that was held
                and that no watch around this one takes for a flag; not if the run ended with one
                already. Nothing a second time, or in a child.
        """
        held = self._end()
        if held is not None and type(held) is not kind:
            raise held

    def hold(self) -> None:
        """The release begins: keep what arrives from now on, Ctrl-C included, for a bounded time.

        Waits for callbacks that still run.
        """
        if not self.is_live or (self._holding and self._hold_until < math.inf):
            return
        with uninterrupted():
            self._hold_until = math.inf
            self._holding = True
            if is_in_main_thread():
                try:
                    self.take_over((*self.config.signals, signal.SIGINT))
                except ValueError:  # a subinterpreter
                    pass
        if not self.env.wait_for_callbacks(self.config.hold_limit):
            self.env.logger.warning("a callback of on_stop still runs; the release goes on")
        self._hold_until = time.monotonic() + self.config.hold_limit
        if self._held:
            self._again = self._hold_until
            self._schedule()

    def _start(self) -> None:
        self.env.before_release(self.hold)
        self.env._signals_raise = self.config.mode == "raise"
        takes_ctrl_c = self.config.mode == "flag" or self._is_rank
        ctrl_c = (signal.SIGINT,) if takes_ctrl_c else ()
        problem: object = None
        if not is_in_main_thread():
            problem = "signals reach the main thread only"
        elif not (background.add(self._task) and background.add(self._pools)):
            problem = "no thread can be started"
        else:
            try:
                for signum in self.take_over((*self.config.signals, *ctrl_c)):
                    self.env.logger.debug("%s has another handler, which stays", signum.name)
                self._listen()
            except ValueError as error:  # a subinterpreter
                problem = error
        if problem is not None:
            self.env.logger.debug("signals are not watched: %s", problem)

    def _end(self) -> BaseException | None:
        if not self.is_live:
            return None
        try:
            self.hold()
        finally:  # a last signal may have come before it could be held
            self._hold_until = math.inf
            background.remove(self._task)  # nothing is sent any more: it would end the process
            background.remove(self._pools)
            if self._listens:
                background.remove(self._lookout)
                blocked.stop_listening()
            self._held += [signum for signum in self.give_back() if signum not in self._held]
            late = self._deliver()
        return late

    @property
    def _is_rank(self) -> bool:
        return self.env.launch.launcher is not None or self.env.run.job is not None

    @property
    def _blocked_limit(self) -> float:
        limit = self.config.blocked_limit
        if limit is not None:
            return limit
        return _RANK_BLOCKED if self._is_rank and self.config.mode == "raise" else math.inf

    def _listen(self) -> None:
        """Begin to look whether the main thread is deaf."""
        if self._blocked_limit == math.inf or sys.platform != "linux":
            return
        try:
            blocked.listen()
        except OSError as error:
            self.env.logger.debug("blocked_limit is not watched: %s", error)
            return
        self._listens = True
        self._lookout.due = time.monotonic() + self._look_every
        background.add(self._lookout)

    # What runs in a handler.

    def act(self, signum: int, frame: FrameType | None) -> None:
        """See `Takeover.act`."""
        watches = [self, *self._around(signum)]
        if self._is_repeated(signum, watches):
            for watch in watches:
                if signum in watch._held:  # it was put off
                    watch._held.remove(signum)
            return
        for watch in watches:
            if watch._must_hold(signum):
                watch._hold_back(signum, watch._hold_until if watch._holding else math.inf)
                return
        if not any(watch._holding for watch in watches):
            first = self._signalled is None
            for watch in watches:
                watch._note(signum)
            if first and self.config.mode == "flag":
                self._heed(signum, watches)
                return
        now = time.monotonic()
        self._tried_since = min(self._tried_since, now)
        if is_bad_moment(frame, waited=now - self._tried_since):
            self.put_off(signum)
            return
        self._tried_since = math.inf
        for watch in watches:
            watch._deadline = watch._again = math.inf
            if signum in watch._held:
                watch._held.remove(signum)
        raise self._exception(signum)

    def put_off(self, signum: int) -> None:
        """See `Takeover.put_off`."""
        self._hold_back(signum, time.monotonic() + _SOON)

    def _around(self, signum: int) -> list[SignalWatch]:
        return [watch for watch in self.around(signum) if isinstance(watch, SignalWatch)]

    def _is_repeated(self, signum: int, watches: Iterable[SignalWatch]) -> bool:
        """Whether this one means nothing new. slurmstepd and the launcher both send it; the second
        one cost the checkpoint.
        """
        launch = self.env.launch
        once = self._is_rank or (launch.shared_compute and signum != signal.SIGINT)
        once = once or any(watch.env._signals_come_twice for watch in watches)
        if not once and signum not in self._nudged:
            return False
        deadline = self.config.deadline  # when it passes, the signal is sent again
        lasts = _ONE_REQUEST if deadline is None else min(_ONE_REQUEST, deadline)
        return time.monotonic() < self._heeded.get(signum, -math.inf) + lasts

    @staticmethod
    def _heed(signum: int, watches: Iterable[SignalWatch]) -> None:
        now = time.monotonic()
        for watch in watches:
            watch._heeded[signum] = now

    def _must_hold(self, signum: int) -> bool:
        # A launcher passes on the signal that its children got as well. The second one would break
        # a finally clause, or hit between the end of the block and the release.
        stopping = signum != signal.SIGINT and self._under_way() is not None
        return (self._holding or stopping) and time.monotonic() < self._hold_until

    def _hold_back(self, signum: int, until: float) -> None:
        self._again = until
        if signum not in self._held:
            self._held.append(signum)
        self._schedule()

    def _note(self, signum: int) -> None:
        if self._signalled is not None:
            return
        self._signalled = signum
        self.env.request_stop(Signals(signum).name, Signals(signum))
        if self.config.deadline is not None:
            self._deadline = time.monotonic() + self.config.deadline
            self._schedule()

    def _exception(self, signum: int) -> BaseException:
        """What the signal raises, with it noted that it is under way."""
        watches = [watch for watch in (self, *self._around(signum)) if not watch._holding]
        for watch in watches:
            watch._raised = True
            watch._hold_until = time.monotonic() + watch.config.hold_limit
            watch._under_way = lambda: True  # first: the next signal may interrupt us here
        self._heed(signum, watches)
        self._pools.due = time.monotonic() + pool_locks.PATIENCE
        background.wake()
        error = stop_error(signum)
        under_way = weakref.ref(error) if isinstance(error, RunStopped) else lambda: None
        for watch in watches:
            watch._under_way = under_way
        return error

    def _next_due(self) -> float:
        due = self._again if self._held else math.inf
        return due if self._is_past_deadlines() else min(due, self._deadline)

    def _is_past_deadlines(self) -> bool:
        return self._holding or self._raised

    def _schedule(self) -> None:
        while True:
            due = self._next_due()
            self._task.due = None if due == math.inf else due
            if due == self._next_due():  # else a handler has come between
                break
        if due < math.inf:
            background.wake()

    # The rest runs in the open.

    def _deliver(self) -> BaseException | None:
        """Deliver the signals that were held back. What was a mere flag here may be more to the
        watch around.
        """
        raised: BaseException | None = None
        for signum in tuple(self._held):
            self.env.logger.info("held until the end of the release: %s", Signals(signum).name)
            around = self._around(signum)
            try:
                if not around:
                    raise self._exception(signum)
                around[0].act(signum, None)
            except BaseException as error:
                if raised is None or isinstance(raised, KeyboardInterrupt):  # a SIGTERM asks more
                    raised = error.with_traceback(None)
        if raised is None and self._signalled is not None and not self._raised:
            around = self._around(self._signalled)
            if around and around[0].config.mode == "raise":
                raised = around[0]._exception(self._signalled)
        return raised

    def _signal_if_due(self) -> None:
        """In the background thread: interrupt the main thread, be it in a blocking call, with a
        signal that was put off, or with the one whose deadline has passed.
        """
        now, held = time.monotonic(), tuple(self._held)
        is_forking_now = is_forking()
        # Once more if need be: a signal that comes right before a call blocks waits with it.
        later = now + (_SOON if is_forking_now else _AGAIN)
        signum: int | None = None
        if held and now >= self._again:
            signum, self._again = held[0], later
        elif now >= self._deadline and not self._is_past_deadlines():
            signum, self._deadline = self._signalled, later
        if signum is not None and not is_forking_now:
            handler = signal.getsignal(signum)
            takeover = takeover_of(handler)
            if signum in held and handler is signal.default_int_handler:
                self._held.remove(signum)  # it was put off by a fork, and is Python's again
            elif takeover is None or not takeover.is_live:
                signum, self._again, self._deadline = None, math.inf, math.inf
        self._schedule()
        if signum is None or is_forking_now:
            return
        if sys.platform == "win32":
            import _thread

            _thread.interrupt_main(signum)
        else:
            signal.pthread_kill(threading.main_thread().ident or 0, signum)

    def _look_at_pools(self) -> None:
        """In the background thread: a signal may have ended workers of the block as well, and then
        ``with Pool()`` would never end. Ctrl-C may be Python's own, so it looks all the time.
        """
        soon = self._stuck_pool.look() or self._raised
        self._pools.due = time.monotonic() + (pool_locks.PATIENCE if soon else _POOLS)

    @property
    def _look_every(self) -> float:
        return min(_LOOK, self._blocked_limit / 4)

    def _look_at_main_thread(self) -> None:
        """In the background thread: end a process whose main thread is deaf."""
        self._lookout.due = time.monotonic() + self._look_every
        unanswered = blocked.unanswered(at_most=self._look_every)
        self._nudged &= unanswered.keys()
        for signum, seconds in unanswered.items():
            # A handler that somebody has put over ours is their affair.
            if takeover_of(signal.getsignal(signum)) is not self:
                continue
            if signum not in self._nudged and seconds >= self._blocked_limit - self._look_every:
                # Once more, to that very thread: if another one got the first, a call in which
                # Python waits was not interrupted.
                self._nudged.add(signum)
                signal.pthread_kill(threading.main_thread().ident or 0, signum)
            elif seconds >= self._blocked_limit:
                self._end_deaf(signum, seconds)

    def _end_deaf(self, signum: int, seconds: float) -> None:
        told = threading.Thread(
            target=self.env.logger.error,
            args=(
                "%s ends this process by its default action: for %.0f s the main thread has not "
                "come back to Python, it is %s. The next run clears up",
                *(Signals(signum).name, seconds, blocked.where_main_thread_is()),
            ),
            daemon=True,
        )
        try:
            told.start()
            told.join(1.0)  # the main thread may hang in a log handler
        except RuntimeError:  # no thread is to be had
            pass
        blocked.end_by_default(signum)
