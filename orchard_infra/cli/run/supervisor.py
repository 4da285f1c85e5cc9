"""Running a command as if it ran without the wrapper.

The command stays in our process group, so that the terminal treats it as it would without us:
what is typed (Ctrl-C, Ctrl-Z, Ctrl-\\) the kernel sends to both, once each. Signals that a
process sends to us alone are passed on, and so is the SIGHUP of a closed terminal. All of them are
blocked here and taken one at a time, so that nothing is ever done inside a signal handler, and
none can end us before the command.

On Linux we are the subreaper of all that the command starts (PR_SET_CHILD_SUBREAPER, prctl(2)): a
process that loses its parent becomes our child, double forks and new sessions included. So
whatever is below us once the command has ended is provably its own.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from orchard_infra.cli.run.interrupts import END_SIGNALS
from orchard_infra.cli.run.oom import OomCounter
from orchard_infra.cli.run.terminal import Terminal
from orchard_infra.cli.run.witness import Witness
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity

if TYPE_CHECKING:
    from signal import struct_siginfo

# Faults of our own code, what cannot be blocked, and what Python has set to be ignored.
_NOT_PASSED_ON = frozenset(
    (
        *(signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGABRT),
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP),
        *(signal.SIGSYS, signal.SIGPROF, signal.SIGVTALRM),
    )
)
_JOB_STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
# Those that ask for a graceful end. SIGQUIT (Ctrl-\) asks for an end at once.
_STOP_SIGNALS = frozenset(END_SIGNALS) - {signal.SIGQUIT}
_PR_SET_CHILD_SUBREAPER = 36

_WITNESS_AFTER = 0.05  # seconds: not for a command that has ended by then
_LEAVES_BY_ITSELF = 0.5  # seconds
_HINT_AFTER = 3.0  # seconds after a Ctrl-C
_AGAIN_AFTER = 5.0  # seconds: before that, the same request comes from somebody else as well
_HIGH = 100  # the first descriptor that no script uses by number


@attrs.frozen
class Ending:
    """How a command ended: its exit status as a shell has it, 128 + n for a signal.

    ``stopped_by`` is the signal that asked the command to stop, where that is how it ended: by a
    handler of its own. ``oom`` says where the kernel's out-of-memory killer struck meanwhile, if it
    did.
    """

    status: int
    signal: int | None
    stopped_by: int | None
    oom: str | None


@attrs.define(eq=False, repr=False)  # each method that is made costs the start
class Supervisor:
    """Runs one command. ``tell`` is for lines to the user.

    From `begin` on signals stay blocked in this process, to the very end: releasing the lock is
    not to be interrupted either. ``asked_to_stop`` says that a signal asked the command to stop.
    """

    tell: Callable[[str], None]
    pid: int = 0
    name: str = ""
    asked_to_stop: bool = False
    before: frozenset[ProcessIdentity] = frozenset()  # our children from before an exec
    _passed_on: frozenset[int] = frozenset()
    _mask: set[int] = attrs.field(factory=set)
    _terminal: Terminal | None = None
    _oom: OomCounter = attrs.field(factory=OomCounter)
    _witness: Witness | None = None
    _witness_at: float = math.inf  # monotonic, as the other times
    _hint_at: float = math.inf
    _stop_at: float = -math.inf  # when the last signal that asked to stop came
    _seen_by_group: set[int] = attrs.field(factory=set)
    _stop_signals: list[int] = attrs.field(factory=list)  # that the command does not ignore
    _status: int | None = None

    def begin(self) -> None:
        """Block signals, and become the parent of whatever loses its own below us."""
        self._passed_on = frozenset(
            signum
            for signum in signal.valid_signals()
            if signum not in _NOT_PASSED_ON and signal.getsignal(signum) is not signal.SIG_IGN
        ) - {signal.SIGCHLD}
        # Ignored, as it may have been inherited, it would reap the command for us.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, {*self._passed_on, signal.SIGCHLD, signal.SIGALRM}
        )
        _become_subreaper()
        if not self.reap():  # children from before an exec are not the command's
            self.before = frozenset(processes.descendants([os.getpid()]).values())
        self._terminal = Terminal.controlling()

    def start(
        self, command: Sequence[str], environ: Mapping[str, str], *, hold: Sequence[int] = ()
    ) -> None:
        """Start the command with the signal mask and dispositions that we were started with.

        It gets the descriptors ``hold``, under other numbers.

        Raises:
            OSError: As posix_spawn(3) says.
        """
        held: list[int] = []
        try:
            for fd in hold:
                held.append(_duplicate(fd))
            self.pid = os.posix_spawnp(
                command[0],
                list(command),
                environ,
                setsigmask=self._mask,
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
        finally:
            for fd in held:
                os.close(fd)
        self.name = f"{os.path.basename(command[0])} (pid {self.pid})"

    def wait(self) -> Ending:
        """Wait until the command has ended, and pass signals on meanwhile."""
        self._witness_at = time.monotonic() + _WITNESS_AFTER
        awaited = {*self._passed_on, signal.SIGCHLD}
        while self._status is None:
            due = min(self._witness_at, self._hint_at)
            info = _wait_for_signal(awaited, due - time.monotonic())
            if info is not None:
                self._take(info)
            if self._status is None:
                now = time.monotonic()
                if now >= self._witness_at:
                    self._start_witness()
                if now >= self._hint_at:
                    self._hint()
        code = os.waitstatus_to_exitcode(self._status)
        if -code in _STOP_SIGNALS:  # sent to it by somebody else
            self.asked_to_stop = True
        if code < 0 and self._terminal is not None:
            self._terminal.restore_modes()
        return Ending(
            status=128 - code if code < 0 else code,
            signal=-code if code < 0 else None,
            stopped_by=self._stopped_by(code),
            oom=self._oom.struck() if code != 0 else None,
        )

    def _stopped_by(self, code: int) -> int | None:
        """The signal after which a command ended well, or with the exit status of that signal."""
        if code - 128 in self._stop_signals:
            return code - 128
        return self._stop_signals[0] if code == 0 and self._stop_signals else None

    # After the command.

    def settle(self) -> list[ProcessIdentity]:
        """What is below us a moment after the command has ended: pools and helpers mostly end with
        their program. Signals are listened to until then.
        """
        deadline = time.monotonic() + _LEAVES_BY_ITSELF
        left: list[ProcessIdentity] = []
        while not self.reap():
            left = self.below()
            rest = deadline - time.monotonic()
            # One that was forked by a child that ended during the look was not seen by it. Those
            # from before an exec are there to stay.
            if rest <= 0 or (not left and self.before):
                break
            # A grandchild's end does not show here, its parent's does.
            info = self.wait_for_child(min(rest, 0.02))
            if info is not None:
                self._take_late_signal(info)
        else:
            left = []
        self._finish_listening()
        return left

    def wait_for_child(self, seconds: float) -> struct_siginfo | None:
        """Wait until a child ends, at most so long. Returns a signal that asks us to end, if one
        comes instead.
        """
        awaited = {signal.SIGCHLD, *self._passed_on.intersection(END_SIGNALS)}
        info = _wait_for_signal(awaited, seconds)
        return None if info is None or info.si_signo == signal.SIGCHLD else info

    def _take_late_signal(self, info: struct_siginfo) -> None:
        """Note a signal that came after the command had ended. A sender that signals every process
        of a job, one after the other, may come to us last.
        """
        to_group = _is_for_group(info) or (
            self._witness is not None and self._witness.has_seen(info.si_signo)
        )
        self._note(info.si_signo, to_group=to_group)

    def ends_the_wait(self, info: struct_siginfo) -> bool:
        """Whether a signal says that what is left shall not have any more time.

        Ctrl-C and Ctrl-\\ do. The same request often comes twice, from a scheduler and from a
        launcher, and systemd may send SIGHUP right after SIGTERM.
        """
        if info.si_signo == signal.SIGQUIT:
            return True
        if info.si_signo == signal.SIGHUP:
            return False
        return info.si_code > 0 or time.monotonic() - self._stop_at >= _AGAIN_AFTER

    def has_heard(self, pid: int) -> bool:
        """Whether a process has got a signal that asks to stop, because it went to our whole group.

        A second one would make many programs drop what they save.
        """
        if not self._seen_by_group:
            return False
        try:
            if os.getpgid(pid) != os.getpgrp():
                return False
        except OSError:
            return False
        return not self._seen_by_group.issubset(_ignored_by(pid, while_blocked=False))

    def _finish_listening(self) -> None:
        """End the witness, and drop signals that were for the command."""
        if self._witness is not None:
            self._witness.dismiss()
            self._witness = None
        while signal.sigtimedwait(self._passed_on, 0) is not None:
            pass

    def give_terminal_back(self) -> None:
        if self._terminal is not None:
            self._terminal.take_from_the_dead()

    def below(self) -> list[ProcessIdentity]:
        """The live processes below us, without those that are ours."""
        if not _sees_itself():
            return []
        below = processes.descendants([os.getpid()]).values()
        witness = self._witness.pid if self._witness is not None else 0
        return [i for i in below if i not in self.before and i.pid != witness]

    def reap(self) -> bool:
        """Reap every child that has ended; True when there are none left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self.pid and os.WIFSTOPPED(status):
                self._stop_along(os.WSTOPSIG(status))
            elif pid == self.pid:
                self._status = status
            elif self._witness is not None and pid == self._witness.pid:
                self._witness.forget()
                self._witness = None
                self._witness_at = time.monotonic() + _WITNESS_AFTER

    # Signals.

    def _take(self, info: struct_siginfo) -> None:
        signum = info.si_signo
        if signum == signal.SIGCHLD:
            self.reap()
        elif _is_for_group(info):
            if signum != signal.SIGINT or not self._is_at_prompt():
                if signum == signal.SIGINT and not self.asked_to_stop:
                    self._hint_at = time.monotonic() + _HINT_AFTER
                self._note(signum, to_group=True)
            self._renew_witness()
        else:
            self._pass_on(info)

    def _pass_on(self, info: struct_siginfo) -> None:
        signum = info.si_signo
        if info.si_code <= 0 and self._witness is not None and self._witness.has_seen(signum):
            # For the group (kill %1, timeout) or for all of us (a scheduler, systemd): the
            # command has it. A second SIGTERM makes many programs drop what they save.
            # timeout(1) signals its child, and then its group: by now, that is here as well.
            signal.sigtimedwait({signum}, 0)
            self._note(signum, to_group=True)
            self._renew_witness()
        elif signum != signal.SIGCONT or (self._is_stopped() and not self._is_to_stop()):
            try:
                os.kill(self.pid, signum)  # not reaped yet, so this pid is its own
            except PermissionError:  # a command such as sudo is another user's process
                self.tell(f"signal {signum} cannot be passed on: {self.name} is another user's")
            else:
                self._note(signum, to_group=False)

    def _note(self, signum: int, *, to_group: bool) -> None:
        if signum not in _STOP_SIGNALS:
            return
        now = time.monotonic()
        if to_group:
            self._seen_by_group.add(signum)
        elif now - self._stop_at >= _AGAIN_AFTER:
            self._seen_by_group.clear()  # a new request, and for us alone
        self.asked_to_stop = True
        self._stop_at = now
        # Under nohup(1) it ends well hours later. A shell blocks all signals now and then.
        if signum not in _ignored_by(self.pid, while_blocked=True):
            self._stop_signals.append(signum)

    def _renew_witness(self) -> None:
        """Replace the witness: what it has seen would be taken for the next signal of that kind."""
        if self._witness is not None:
            self._witness.dismiss()
            self._start_witness()

    def _start_witness(self) -> None:
        self._witness = Witness.start()
        self._witness_at = math.inf

    def _is_at_prompt(self) -> bool:
        """Whether the command reads keys: a prompt takes a Ctrl-C for "drop this line"."""
        return self._terminal is not None and self._terminal.is_edited()

    def _hint(self) -> None:
        self._hint_at = math.inf
        if not self._is_at_prompt():
            self.tell(f"waiting for {self.name} to end; Ctrl-\\ ends it at once")

    # Job control.

    def _stop_along(self, signum: int) -> None:
        """Stop as the command did: the shell waits for us, and takes the terminal back then.

        Not for a SIGSTOP, which nobody types: whoever sent that to the command alone may
        continue it alone, and we would never know.
        """
        if signum not in _JOB_STOPS or not self._is_stopped():
            return
        # In this order a stop that is pending already, from the same Ctrl-Z, is the same one.
        os.kill(os.getpid(), signum)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
        signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
        # Continued, by a shell with its whole group, or alone: then the SIGCONT is passed on.

    def _is_stopped(self) -> bool:
        stat = processes.read_stat(self.pid)
        return stat is not None and stat.state == "T"

    def _is_to_stop(self) -> bool:
        """Whether a Ctrl-Z has come since: it also takes a SIGCONT back from the witness."""
        return not signal.sigpending().isdisjoint(_JOB_STOPS)


def _wait_for_signal(signums: Collection[int], seconds: float) -> struct_siginfo | None:
    """One of these signals, all of which are blocked, as SIGALRM is; None after so many seconds.

    `signal.sigtimedwait` returns random memory as a signal, in all versions of Python, when the
    process is stopped during the wait and goes on after the time is over. Here a timer ends it.
    """
    if seconds == math.inf:
        return signal.sigwaitinfo(signums)
    info = signal.sigtimedwait(signums, 0)
    if info is not None or seconds <= 0:
        return info
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        while True:
            info = signal.sigwaitinfo({*signums, signal.SIGALRM})
            if info.si_signo == signal.SIGALRM and info.si_code > 0:  # the kernel's: the timer
                return None
            if info.si_signo in signums:
                return info
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _is_for_group(info: struct_siginfo) -> bool:
    """Whether the kernel itself sent a signal, and so to our whole group.

    Except for a terminal that hangs up: of its session, the leader alone gets SIGHUP and SIGCONT,
    and the foreground group only when the leader has ended (`tty_signal_session_leader` in the
    kernel's drivers/tty/tty_jobctrl.c).
    """
    if info.si_code <= 0:  # SI_USER and the like: a process sent it
        return False
    hangs_up = info.si_signo in (signal.SIGHUP, signal.SIGCONT)
    return not (hangs_up and os.getsid(0) == os.getpid())


def _ignored_by(pid: int, *, while_blocked: bool) -> set[int]:
    """Which of the signals that ask to stop a process ignores. One that it blocks is kept for it:
    ``while_blocked`` says whether such a one counts, too.
    """
    masks = {b"SigIgn": 0, b"SigBlk": 0}
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                name, _, mask = line.partition(b":")
                if name in masks:
                    masks[name] = int(mask, 16)
    except OSError:
        pass
    ignored = masks[b"SigIgn"] & ~(0 if while_blocked else masks[b"SigBlk"])
    return {signum for signum in END_SIGNALS if ignored >> (signum - 1) & 1}


def _sees_itself() -> bool:
    """False with the /proc of another pid namespace: its numbers are other people's here."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def _become_subreaper() -> None:
    import ctypes

    zero = ctypes.c_ulong(0)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), zero, zero, zero)


def _duplicate(fd: int) -> int:
    """An inheritable twin of a descriptor, out of the way of scripts that say ``exec 3>file``."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD, _HIGH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EMFILE):
            raise
        return fcntl.fcntl(fd, fcntl.F_DUPFD, 3)
