"""Signals that ask a run to stop, turned into something that a run can act on.

By default SIGTERM ends Python at once: no ``finally``, no ``__exit__``. `SignalStop` makes it an
exception in the main thread, or a flag that a loop looks at.

A handler interrupts the main thread anywhere, inside of a logging call or with a lock in its
hands. So the handlers here set attributes, put a message into a queue whose ``put`` may be
interrupted by itself, and raise. Whatever is to be said or called is left to a thread.
"""

from __future__ import annotations

import logging
import math
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from signal import Signals
from types import FrameType
from typing import Any, Literal, Protocol

import attrs

from orchard_infra.stopping.takeover import Takeover, is_bad_moment, is_forking, takeover_of
from orchard_infra.system.masking import uninterrupted

_JOIN = 5.0  # seconds that the end of a watch waits for its thread
_AGAIN = 0.1  # seconds until a signal that a blocking call slept through is sent again
_SOON = 0.02  # seconds until one that came at a bad moment is
_THREAD = "orchard-infra-stop"
_END = object()


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


@attrs.frozen
class StopRequest:
    """Why a run should stop, and since when (epoch seconds). ``signal`` is None if it was none."""

    reason: str
    at: float
    signal: Signals | None = None


class StopWatch(Protocol):
    """What `Stopper.arm` returns: a watch for one run, from then until `disarm`."""

    @property
    def requested(self) -> StopRequest | None:
        """The first request to stop; None while there is none."""
        ...

    def on_stop(self, callback: Callable[[StopRequest], object]) -> None:
        """Have ``callback`` called in another thread once a stop is requested, or now if it is.

        Callbacks are called one after the other, in the order in which they were given.
        """
        ...

    def request(self, reason: str) -> None:
        """Ask the run to stop, from any thread. Nothing is raised into it."""
        ...

    def hold(self) -> None:
        """The release begins: keep what arrives from now on, for a bounded time."""
        ...

    def disarm(self) -> BaseException | None:
        """End the watch. Returns what a signal that was held is to raise, and raises nothing."""
        ...


class Stopper(Protocol):
    """Lets a run know that it is to stop."""

    def arm(self, logger: logging.Logger) -> StopWatch:
        """Begin to watch. All or nothing, also when a signal arrives meanwhile."""
        ...


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

    ``mode="raise"`` raises `RunStopped` in the main thread. Ctrl-C is left to Python.
    ``mode="flag"`` only sets ``env.stop_requested`` at the first signal or Ctrl-C. It raises at
    the second one, or when ``deadline`` seconds have passed: `RunStopped`, or `KeyboardInterrupt`
    for Ctrl-C.

    ``signals`` are those that ask to stop; add SIGUSR1 or SIGUSR2 where a scheduler warns with
    them. What arrives while a `RunStopped` is under way, or during the release, waits for the
    end of the release, but no longer than ``hold_limit`` seconds. It is raised then, wherever the
    main thread is, and so is all that comes later: a release that hangs can be interrupted.

    Only default handlers are replaced, and put back at the end. A handler of somebody else
    (Lightning, submitit, a notebook, or one that a C library installed) stays, and so does an
    ignored signal (nohup). In a forked child signals do what they did before.

    Outside of the main thread there are no handlers, only `StopWatch.request`. On Windows there
    is no SIGHUP, and a deadline does not interrupt a blocking call; neither is tested.
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

    def __attrs_post_init__(self) -> None:
        if self.deadline is not None and self.mode != "flag":
            raise ValueError('a deadline is for mode="flag"; otherwise a signal raises at once')

    def arm(self, logger: logging.Logger) -> SignalWatch:
        """See `Stopper.arm`. In the main thread, before threads or loops rely on the handlers.

        Raises:
            RunStopped: A signal arrived meanwhile. The handlers are those of before.
        """
        watch = SignalWatch(self, logger)
        try:
            watch.start()
        except BaseException:
            watch.disarm()
            raise
        return watch


@attrs.define(eq=False, repr=False)
class SignalWatch(Takeover):
    """The live side of `SignalStop`.

    Where environments nest, the innermost one decides whether a signal raises; the flags of those
    around it are set as well. When it ends they get what it held, or took for a mere flag.
    """

    config: SignalStop
    logger: logging.Logger
    requested: StopRequest | None = attrs.field(default=None, init=False)
    _signalled: int | None = attrs.field(default=None, init=False)
    _raised: bool = attrs.field(default=False, init=False)
    _under_way: Callable[[], object] = attrs.field(default=lambda: None, init=False)
    _holding: bool = attrs.field(default=False, init=False)
    _hold_until: float = attrs.field(default=0.0, init=False)  # monotonic, as is _due
    _tried_since: float = attrs.field(default=math.inf, init=False)
    _held: list[int] = attrs.field(factory=list, init=False)
    _due: float | None = attrs.field(default=None, init=False)  # when to signal ourselves
    _mail: queue.SimpleQueue[Any] = attrs.field(factory=queue.SimpleQueue, init=False)
    _sending: threading.Lock = attrs.field(factory=threading.Lock, init=False)  # not in handlers
    _thread: threading.Thread | None = attrs.field(default=None, init=False)

    def start(self) -> None:
        """Take over the default handlers."""
        ctrl_c = (signal.SIGINT,) if self.config.mode == "flag" else ()
        try:
            self._thread = threading.Thread(target=self._attend, name=_THREAD, daemon=True)
            with uninterrupted():  # a signal that the thread took would not wake the main thread
                self._thread.start()
            for signum in self.take_over((*self.config.signals, *ctrl_c)):
                self.logger.debug("%s has another handler, which stays", signum.name)
        except (ValueError, RuntimeError) as error:  # RuntimeError: no thread can be started
            self.logger.debug("signals are not watched: %s", error)

    def on_stop(self, callback: Callable[[StopRequest], object]) -> None:
        """See `StopWatch.on_stop`. In mode "raise" they run while the main thread unwinds.

        The release waits for them, at most ``hold_limit`` seconds. What they raise is logged.
        """
        # The thread blocks all signals, and so would the children of a callback. It is called
        # with the mask of its giver.
        self._mail.put((callback, _signal_mask(None)))

    def request(self, reason: str) -> None:
        """See `StopWatch.request`."""
        if self.requested is None:
            self.requested = StopRequest(reason, time.time())
        self._mail.put(None)

    def hold(self) -> None:
        """See `StopWatch.hold`. Covers Ctrl-C as well, and waits for callbacks that still run."""
        if self._holding or not self.is_live:
            return
        with uninterrupted():
            self._hold_until = math.inf
            self._holding = True
            try:
                self.take_over((*self.config.signals, signal.SIGINT))
            except ValueError:  # not in the main thread
                pass
        if self.requested is not None and self._thread_to_wait_for() is not None:
            self._wait_for_callbacks()
        self._hold_until = time.monotonic() + self.config.hold_limit
        self._due = self._hold_until if self._held else None
        self._mail.put(None)

    def disarm(self) -> BaseException | None:
        """See `StopWatch.disarm`. Nested watches may end in any order.

        Returns `RunStopped`, or `KeyboardInterrupt`, for the first signal that was held and that
        no watch around this one takes for a flag. Does nothing a second time, or in a child.
        """
        if not self.is_live:
            return None
        self.hold()
        self._hold_until = math.inf
        with self._sending:
            self._due = None
            self._mail.put(_END)
        thread = self._thread_to_wait_for()
        if thread is not None:
            thread.join(_JOIN)
        self._held += [signum for signum in self.give_back() if signum not in self._held]
        return self._deliver()

    # What runs in a handler.

    def act(self, signum: int, frame: FrameType | None) -> None:
        """See `Takeover.act`."""
        watches = [self, *self._around(signum)]
        for watch in watches:
            if watch._must_hold(signum):
                watch._hold_back(signum, watch._hold_until if watch._holding else None)
                return
        if not any(watch._holding for watch in watches):
            first = self._signalled is None
            for watch in watches:
                watch._note(signum)
            if first and self.config.mode == "flag":
                return
        now = time.monotonic()
        self._tried_since = min(self._tried_since, now)
        if is_bad_moment(frame, waited=now - self._tried_since):
            self.put_off(signum)
            return
        self._tried_since = math.inf
        for watch in watches:
            watch._due = None
            if signum in watch._held:
                watch._held.remove(signum)
        raise self._exception(signum)

    def put_off(self, signum: int) -> None:
        """See `Takeover.put_off`."""
        self._hold_back(signum, time.monotonic() + _SOON)

    def _around(self, signum: int) -> list[SignalWatch]:
        return [watch for watch in self.around(signum) if isinstance(watch, SignalWatch)]

    def _must_hold(self, signum: int) -> bool:
        # A launcher passes on the signal that its children got as well. The second one would break
        # a finally clause, or hit between the end of the block and the release.
        stopping = signum != signal.SIGINT and self._under_way() is not None
        return (self._holding or stopping) and time.monotonic() < self._hold_until

    def _hold_back(self, signum: int, until: float | None) -> None:
        if signum not in self._held:
            self._held.append(signum)
        self._due = until
        self._mail.put(None)

    def _note(self, signum: int) -> None:
        if self._signalled is not None:
            return
        self._signalled = signum
        if self.requested is None:
            self.requested = StopRequest(Signals(signum).name, time.time(), Signals(signum))
        if self.config.deadline is not None:
            self._due = time.monotonic() + self.config.deadline
        self._mail.put(None)

    def _exception(self, signum: int) -> BaseException:
        """What the signal raises, with it noted that it is under way."""
        watches = [watch for watch in (self, *self._around(signum)) if not watch._holding]
        for watch in watches:
            watch._raised = True
            watch._hold_until = time.monotonic() + watch.config.hold_limit
            watch._under_way = lambda: True  # first: the next signal may interrupt us here
        error = KeyboardInterrupt() if signum == signal.SIGINT else RunStopped(signum)
        under_way = weakref.ref(error) if isinstance(error, RunStopped) else lambda: None
        for watch in watches:
            watch._under_way = under_way
        return error

    # The rest runs in the open.

    def _thread_to_wait_for(self) -> threading.Thread | None:
        """None if it could not be started, or is us."""
        thread = self._thread
        if thread is None or not thread.is_alive() or thread is threading.current_thread():
            return None
        return thread

    def _wait_for_callbacks(self) -> None:
        done = threading.Event()
        self._mail.put(done)
        if not done.wait(self.config.hold_limit):
            self.logger.warning("a callback of on_stop still runs; the release goes on")

    def _deliver(self) -> BaseException | None:
        """As if they came now. What was a mere flag here may be more to the watch around."""
        raised: BaseException | None = None
        for signum in tuple(self._held):
            self.logger.info("held until the end of the release: %s", Signals(signum).name)
            around = self._around(signum)
            try:
                if not around:
                    raise self._exception(signum)
                around[0].act(signum, None)
            except BaseException as error:
                raised = raised or error.with_traceback(None)
        if raised is None and self._signalled is not None and not self._raised:
            around = self._around(self._signalled)
            if around and around[0].config.mode == "raise":
                raised = around[0]._exception(self._signalled)
        return raised

    def _attend(self) -> None:
        """The thread: it says and calls what a handler must not, and signals when it is due."""
        callbacks: list[tuple[Callable[[StopRequest], object], set[Any]]] = []
        announced = False
        while True:
            due = self._due
            rest = None if due is None else min(max(0.0, due - time.monotonic()), 3600.0)
            try:
                message = self._mail.get(timeout=rest)
            except queue.Empty:
                message = None
            if isinstance(message, tuple):
                callbacks.append(message)
            request = self.requested
            if request is not None:
                if not announced:
                    announced = True
                    self.logger.warning(
                        "stop requested: %s", request.reason, extra={"stop_request": request}
                    )
                while callbacks:
                    self._call(*callbacks.pop(0), request)
            if isinstance(message, threading.Event):
                message.set()
            if message is _END:
                return
            self._signal_if_due()

    def _call(
        self, callback: Callable[[StopRequest], object], mask: set[Any], request: StopRequest
    ) -> None:
        before = _signal_mask(mask)
        try:
            callback(request)
        except BaseException:  # also a sys.exit: it would end this thread, and nothing else
            self.logger.exception("a callback of on_stop failed")
        finally:
            _signal_mask(before)

    def _signal_if_due(self) -> None:
        """Interrupt the main thread, be it in a blocking call, with the signal that waits."""
        with self._sending:  # not while the watch ends: the default handler would end the process
            now = time.monotonic()
            if self._due is None or now < self._due:
                return
            if is_forking():
                self._due = now + _SOON
                return
            # Once more if need be: a signal that comes right before a call blocks waits with it.
            self._due = now + _AGAIN
            signum = [*self._held, None if self._holding else self._signalled][0]
            handler = signal.getsignal(signum) if signum else None
            takeover = takeover_of(handler)
            if signum in self._held and handler is signal.default_int_handler:
                self._held.remove(signum)  # it was put off by a fork, and is Python's again
                self._due = self._due if self._held else None
            elif takeover is None or not takeover.is_live:
                signum = self._due = None
            if signum is None:
                return
            if sys.platform == "win32":
                import _thread

                _thread.interrupt_main(signum)
            else:
                signal.pthread_kill(threading.main_thread().ident or 0, signum)


def _signal_mask(mask: set[Any] | None) -> set[Any]:
    """The signals that this thread blocks; from now on those of ``mask``, if there is one."""
    if sys.platform == "win32":
        return set()
    if mask is None:
        return signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return signal.pthread_sigmask(signal.SIG_SETMASK, mask)
