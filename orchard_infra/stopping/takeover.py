"""Signal handlers that replace the default ones for a while, and are never in the way.

What there is to know about the operating system and about Python's own signal handling is here;
`orchard_infra.stopping.signals` says what a signal means.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator
from signal import Signals
from types import CodeType, FrameType
from typing import Any

from orchard_infra.stopping import blocked
from orchard_infra.system.masking import is_in_main_thread, keep_away, uninterrupted

# Where a lock changes hands without a `with`.
_LOCKING = {
    threading.__file__: {
        *("acquire", "release", "__enter__", "__exit__", "_acquire_restore", "_release_save"),
        "start",  # which ends as a KeyError
    },
    logging.__file__: {
        *("acquire", "release", "handle", "flush", "close", "setStream", "set_name"),
        *("_acquireLock", "_releaseLock", "_addHandlerRef", "_removeHandlerRef"),
        *("isEnabledFor", "getLogger", "getChildren", "addHandler", "removeHandler"),
        *("_clear_cache", "addLevelName", "basicConfig", "shutdown"),
    },
}
# Python prints what is raised in the callback of a weak reference, and goes on. It drops what is
# raised while it warns of a fork with threads, from Python 3.12 on.
_LOSING_FILES = {
    weakref.__file__,
    weakref.WeakSet.add.__code__.co_filename,
    warnings.__file__,
    warnings.formatwarning.__code__.co_filename,
}
# The way into an environment, and out of it.
_THRESHOLD = {
    *("__enter__", "__aenter__", "open", "prepare_environment", "prepare", "prepare_async"),
    *("__exit__", "__aexit__", "close", "release_resources", "hold"),
}
_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_BUSY = 1.0  # seconds that a handler takes at the most
_LOCKING_LASTS = 1.0  # seconds to wait while locks change hands
_THRESHOLD_LASTS = 0.1  # seconds to wait while an environment is being entered or left

_taken: set[int] = set()  # the signals that this process has ever taken over


class Takeover:
    """Default handlers, replaced from `take_over` until `give_back`; subclasses `act` instead.

    In a forked child, and after it has ended, it passes on what it gets to what was there before.
    Takeovers nest, and may end in any order.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._ended = False
        self._previous: dict[int, Any] = {}
        self._busy_until = 0.0  # monotonic

    @property
    def is_live(self) -> bool:
        """Not ended, and in the process that made it."""
        return not self._ended and self._pid == os.getpid()

    def act(self, signum: int, frame: FrameType | None) -> None:
        """Runs in the handler: no lock, no logging, nothing that may be half-way through itself."""
        raise NotImplementedError

    def put_off(self, signum: int) -> None:
        """Have the signal come again soon: another one is being acted upon, or a fork is under
        way.
        """
        raise NotImplementedError

    def take_over(self, signums: Iterable[Signals]) -> list[Signals]:
        """Replace those handlers that are the default. Returns the signals that have another one.

        Raises:
            ValueError: This is not the main thread of the main interpreter.
        """
        in_c: int | None = None
        others = []
        for signum in signums:
            installed = signal.getsignal(signum)
            if installed == self._handle:
                continue
            current = _living(installed, signum)
            if self in _around(current, signum):
                continue
            if installed is signal.SIG_DFL:
                in_c = _caught_in_c() if in_c is None else in_c
                default = not in_c >> (signum - 1) & 1
            else:
                # One that ended in another thread is still installed, and has nothing around it.
                default = current in (signal.SIG_DFL, signal.default_int_handler)
                default = default or takeover_of(current) is not None
            if not default:
                others.append(signum)
                continue
            if signum not in _taken:
                _taken.add(signum)
                keep_away([signum])
            self._previous[signum] = current  # first: it may be needed the next moment
            signal.signal(signum, self._handle)
        return others

    def give_back(self) -> list[int]:
        """Put back what was there before. Returns signals that arrived meanwhile, unhandled.

        A handler that somebody has put over ours stays. Outside of the main thread nothing can be
        put back; ours pass on what they get.
        """
        try:
            ours = [s for s in self._previous if signal.getsignal(s) == self._handle]
            if not ours or not is_in_main_thread():
                return []
            with uninterrupted():
                with _arrivals() as arrived:
                    for signum in ours:
                        signal.signal(signum, self._living_previous(signum))
                # One that waits would meet the default handler now, and end the program.
                waiting = _take_pending(ours)
            return [signum for signum in ours if signum in arrived or signum in waiting]
        finally:
            self._ended = True

    def around(self, signum: int) -> list[Takeover]:
        """Those around this one that wait for this signal as well, innermost first."""
        return _around(self._living_previous(signum), signum)

    def _living_previous(self, signum: int) -> Any:
        return _living(self._previous.get(signum, signal.SIG_DFL), signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        blocked.answer(signum)
        if self.is_live:
            # Handlers interrupt each other: those of a storm of signals would pile up until
            # Python's recursion limit. A time, since a Ctrl-C may take the way back from us.
            now = time.monotonic()
            if now < self._busy_until:
                self.put_off(signum)
                return
            self._busy_until = now + _BUSY
            try:
                self.act(signum, frame)
            finally:
                self._busy_until = 0.0
            return
        previous = self._living_previous(signum)
        if callable(previous):
            previous(signum, frame)
        elif previous == signal.SIG_DFL:
            # So that the exit status is that of a process which was killed.
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


def takeover_of(handler: Any) -> Takeover | None:
    """The takeover that this handler is one of."""
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Takeover) else None


def is_bad_moment(frame: FrameType | None, *, waited: float) -> bool:
    """Whether what is raised here would get lost, or break something.

    Python prints what is raised in ``__del__``, in the callback of a weak reference or around a
    fork, and goes on; the DataLoader waits for its workers in a ``__del__``. What is raised while
    a lock changes hands ends as "release unlocked lock", or leaves it locked: a program that logs
    all the time has one good moment in a few. On the way into or out of an environment it would
    leave that half-way. Both are tried again and again, but not for ever: ``waited``, in seconds,
    says for how long already.

    A `sys.unraisablehook` that sends again what was dropped would be shorter. But others replace
    the hook while an environment is open (with pytest 8.3, a stop was lost to it), and a
    destructor would be left half-way.
    """
    if _fork.under_way:
        return True
    is_interrupted = True
    while frame is not None:
        code = frame.f_code
        if is_interrupted and waited < _LOCKING_LASTS and _is_locking(code):
            return True
        is_interrupted = code is Takeover._handle.__code__  # one that is just on its way back
        if code.co_name == "__del__" or code.co_filename in _LOSING_FILES:
            return True
        if code is _Fork.before.__code__ or (waited < _THRESHOLD_LASTS and _is_threshold(code)):
            return True
        frame = frame.f_back
    return False


def _is_locking(code: CodeType) -> bool:
    return code.co_name in _LOCKING.get(code.co_filename, ())


def _is_threshold(code: CodeType) -> bool:
    return code.co_name in _THRESHOLD and code.co_filename.startswith(_PACKAGE)


def _take_pending(signums: list[int]) -> list[int]:
    """Take those of these signals that are blocked and wait, so that they are never delivered."""
    if sys.platform == "win32":
        return []
    taken = []
    for signum in signal.sigpending().intersection(signums):
        # Another thread may have got it meanwhile.
        if not hasattr(signal, "sigtimedwait") or signal.sigtimedwait([signum], 0) is not None:
            taken.append(int(signum))
    return taken


@contextlib.contextmanager
def _arrivals() -> Iterator[list[int]]:
    """Afterwards, the signals that arrived, as written down by the C half of Python's handlers.

    Python forgets one that arrives within `signal.signal`, after it looked for the last time and
    before the default handler is in place: "ignored due to race condition".
    """
    arrived: list[int] = []
    if sys.platform == "win32":  # wants a socket
        yield arrived
        return
    try:
        read, write = os.pipe()
    except OSError:  # no descriptor is left
        yield arrived
        return
    for end in (read, write):
        os.set_blocking(end, False)
    loop = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield arrived
    finally:
        signal.set_wakeup_fd(loop, warn_on_full_buffer=False)
        try:
            arrived += os.read(read, 4096)
            if loop != -1:  # an event loop waits for them, too
                os.write(loop, bytes(arrived))
        except OSError:  # none came, or the loop has more than enough to wake it
            pass
        os.close(read)
        os.close(write)


class _Fork:
    """Around a fork: the child gets the handlers of before, and no signal between is lost.

    In a child, Python forgets what arrived before it was set up: of 300 children that were
    terminated as soon as they were started, none died, while a handler was installed.
    """

    def __init__(self) -> None:
        self.under_way: list[bool] = []
        self.ctrl_c: list[Any] = []  # its handler, while another one is in its place
        self.masks: list[set[int]] = []  # one, of what is blocked meanwhile, or none

    def register(self) -> None:
        os.register_at_fork(before=self.before, after_in_child=self.in_child)
        # To unblock comes twice, for a handler of somebody else's that raises on the way into the
        # first call: Python prints that, goes on, and the signals would stay blocked.
        for step in (self.unblock, self.unblock, self.give_ctrl_c_back, self.under_way.clear):
            os.register_at_fork(after_in_parent=step, after_in_child=step)

    def before(self) -> None:
        self.under_way.append(True)
        taken = _taken_over()
        self.put_ctrl_c_off(taken)
        mask = set(taken)
        if mask:
            mask -= signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.masks[:] = [mask] if mask else []
        signal.pthread_sigmask(signal.SIG_BLOCK, mask)

    def unblock(self) -> None:
        for mask in self.masks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, mask)

    def put_ctrl_c_off(self, taken: list[int]) -> None:
        """Python prints a Ctrl-C in a hook and goes on, be it the one that unlocks logging."""
        takeover = takeover_of(signal.getsignal(taken[0])) if taken else None
        if takeover is None or not takeover.is_live or not is_in_main_thread():
            return
        handler = signal.getsignal(signal.SIGINT)
        if handler is signal.default_int_handler:
            self.ctrl_c.append(handler)
            signal.signal(signal.SIGINT, lambda signum, frame: takeover.put_off(signum))

    def give_ctrl_c_back(self) -> None:
        if self.ctrl_c and is_in_main_thread():
            signal.signal(signal.SIGINT, self.ctrl_c.pop())

    def in_child(self) -> None:
        for signum in _taken_over():
            signal.signal(signum, _living(signal.getsignal(signum), signum))


_fork = _Fork()
if hasattr(os, "register_at_fork"):
    _fork.register()


def is_forking() -> bool:
    """Whether the main thread might put off a signal that is sent to it now, or lose a Ctrl-C."""
    if _fork.under_way:
        return True
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename in _LOSING_FILES:
            return True
        frame = frame.f_back
    return False


def _taken_over() -> list[int]:
    return [s for s in tuple(_taken) if takeover_of(signal.getsignal(s)) is not None]


def _around(handler: Any, signum: int) -> list[Takeover]:
    found = []
    while (takeover := takeover_of(handler)) is not None:
        found.append(takeover)
        handler = takeover._living_previous(signum)
    return found


def _living(handler: Any, signum: int) -> Any:
    """The handler; for one of a takeover that has ended, what was there before."""
    while (takeover := takeover_of(handler)) is not None and not takeover.is_live:
        handler = takeover._previous.get(signum, signal.SIG_DFL)
    return handler


def _caught_in_c() -> int:
    """A bit for each signal that has a handler, be it one that Python does not know of: SigCgt in
    proc(5).

    `faulthandler.register` installs such a one, and so do MPI and the preemption notice of JAX.
    """
    try:
        with open("/proc/self/status", "rb", buffering=0) as status:
            words = status.read(8192).partition(b"SigCgt:")[2].split(maxsplit=1)
    except OSError:
        return 0
    return int(words[0], 16) if words else 0
