"""Running a command as if nothing stood before it, and leaving nothing of it behind.

The command stays in our process group, so that the terminal treats it as it would without us:
what is typed (Ctrl-C, Ctrl-Z, Ctrl-\\) the kernel sends to both, once each. Signals that a
process sends to us alone are passed on. All of them are blocked here and taken one at a time, so
that nothing is ever done inside a signal handler, and none can end us before the command.

On Linux we are the subreaper of all that the command starts (PR_SET_CHILD_SUBREAPER, prctl(2)):
who loses its parent becomes our child, double forks and new sessions included. So whoever is
below us once the command has ended is provably its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs

from orchard_infra.cli.memory import OomCounter
from orchard_infra.cli.terminal import Terminal
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity

# Faults of our own code, what cannot be blocked, and what Python has set to be ignored.
_NOT_OURS_TO_PASS = frozenset(
    (
        *(signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGABRT),
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP),
        *(signal.SIGSYS, signal.SIGPROF, signal.SIGVTALRM),
    )
)
_STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PR_SET_CHILD_SUBREAPER = 36

_WITNESS_AFTER = 0.05  # seconds
_SENT_TO_ALL_WITHIN = 0.05  # seconds
_AGAIN_WITHIN = 10.0  # seconds from one Ctrl-C to the next that escalates
_HINT_AFTER = 2.0  # seconds after a Ctrl-C
_AT_ITS_PROMPT_WITHIN = 0.5  # seconds after a Ctrl-C, for a program that drops a line for it
_LEAVES_BY_ITSELF = 0.25  # seconds
_LATECOMERS_GRACE = 1.0  # seconds, at the least
_HIGH = 100  # the first descriptor that no script uses by number


@attrs.frozen
class Ending:
    """How a command ended: its exit status as a shell has it, 128 + n for a signal.

    ``oom`` says where the kernel's out-of-memory killer struck meanwhile, if it did.
    """

    status: int
    signal: int | None
    oom: str | None


@attrs.frozen
class Leftover:
    """A process that outlived the command. ``fate``: stopped, killed, denied, stuck, left."""

    pid: int
    command: str
    fate: str
    reason: str = ""


class Interrupted(Exception):
    """A signal that asks us to end came where nothing but ourselves had to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have Ctrl-C, SIGTERM and SIGHUP raise `Interrupted` once; what is ignored stays ignored."""

    def interrupt(signum: int, frame: object) -> None:
        for other in watched:
            signal.signal(other, signal.SIG_IGN)  # the way out is not interrupted
        raise Interrupted(signum)

    watched = [s for s in _ENDS if signal.getsignal(s) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, interrupt) for signum in watched}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@attrs.define(eq=False)
class Supervisor:
    """Runs one command. ``tell`` is for lines to the user; ``grace`` is in seconds.

    ``reason_to_spare(pid)`` says why a process below us is none of the command's, None if it is.
    From `begin` on signals stay blocked in this process, to the very end: releasing the lock is
    not to be interrupted either.
    """

    tell: Callable[[str], None]
    grace: float
    reason_to_spare: Callable[[int], str | None]
    pid: int = 0
    _name: str = ""
    _passed: frozenset[int] = frozenset()
    _mask: set[int] = attrs.field(factory=set)
    _before: frozenset[ProcessIdentity] = frozenset()
    _terminal: Terminal | None = None
    _oom: OomCounter = attrs.field(factory=OomCounter)
    _witness: _Witness | None = None
    _call_at: float = math.inf
    _status: int | None = None
    _presses: int = 0
    _pressed: float = 0.0
    _hinted: bool = False

    def begin(self) -> None:
        """Block signals, and become the parent of whatever loses its own below us."""
        self._passed = frozenset(
            signum
            for signum in signal.valid_signals()
            if signum not in _NOT_OURS_TO_PASS and signal.getsignal(signum) is not signal.SIG_IGN
        ) - {signal.SIGCHLD}
        # Ignored, as it may have been inherited, it would reap the command for us.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*self._passed, signal.SIGCHLD})
        _become_subreaper()
        if not self._reap():  # children from before an exec are not the command's
            self._before = frozenset(processes.descendants([os.getpid()]).values())
        self._terminal = Terminal.controlling()

    def start(
        self, command: Sequence[str], environ: Mapping[str, str], *, hold: Sequence[int] = ()
    ) -> None:
        """Start the command with the signal mask and dispositions that we were started with.

        It gets the descriptors ``hold``, under other numbers.

        Raises:
            OSError: As posix_spawn(3) says.
        """
        held = [_duplicate(fd) for fd in hold]
        try:
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
        self._name = f"{os.path.basename(command[0])} (pid {self.pid})"

    def wait(self, tend: Callable[[], None], interval: float) -> Ending:
        """Until the command has ended; ``tend`` is called every ``interval`` seconds."""
        next_tend = time.monotonic() + interval
        # Not for a command that has ended by then.
        self._call_at = time.monotonic() + _WITNESS_AFTER
        awaited = {*self._passed, signal.SIGCHLD}
        while self._status is None:
            now = time.monotonic()
            timeout = min(next_tend, self._call_at) - now
            if self._presses:
                timeout = min(timeout, 0.25)
            info = signal.sigtimedwait(awaited, max(0.0, timeout))
            if info is None:
                pass
            elif info.si_signo == signal.SIGCHLD:
                self._reap()
            elif info.si_code > 0:  # by the kernel, and so to the whole group
                if info.si_signo == signal.SIGINT and self._terminal is not None:
                    self._press()
                self._renew_witness()
            else:
                self._pass_on(info.si_signo)
            now = time.monotonic()
            if now >= self._call_at and self._status is None:
                self._call_witness()
            if now >= next_tend:
                next_tend = now + interval
                tend()
            self._watch_presses()
        if self._witness is not None:
            self._witness.dismiss()
            self._witness = None
        code = os.waitstatus_to_exitcode(self._status)
        if code < 0 and self._terminal is not None:
            self._terminal.restore_modes()
        return Ending(
            status=128 - code if code < 0 else code,
            signal=-code if code < 0 else None,
            oom=self._oom.struck() if code != 0 else None,
        )

    def clear(self) -> list[Leftover]:
        """Stop what outlived the command: asked first, killed after the grace."""
        self._forget_signals()
        left = self._wait_for_leavers()
        if not left:
            self._give_terminal_back()
            return []
        from orchard_infra.runs.membership import command_of

        commands = {identity: command_of(identity.pid) for identity in left}
        spared = {i: reason for i in left if (reason := self.reason_to_spare(i.pid))}
        found = [Leftover(i.pid, commands[i], "left", reason) for i, reason in spared.items()]
        targets = [i for i in left if i not in spared]
        if targets:
            names = "; ".join(f"pid {i.pid} ({commands[i]})" for i in targets[:5])
            more = f" and {len(targets) - 5} more" if len(targets) > 5 else ""
            self.tell(f"stopping what outlived {self._name}: {names}{more}")
            found += self._stop(targets, commands)
        for leftover in found:
            if leftover.fate == "left":
                self.tell(f"left alone: pid {leftover.pid} ({leftover.command}), {leftover.reason}")
            elif leftover.fate != "stopped":
                fate = {
                    "killed": f"killed after {self.grace:g} s",
                    "denied": "may not be signalled",
                    "stuck": "does not end: uninterruptible sleep",
                }[leftover.fate]
                self.tell(f"{fate}: pid {leftover.pid} ({leftover.command})")
        self._give_terminal_back()
        return found

    def survey(self) -> list[Leftover]:
        """What outlived the command, when that is to be left alone."""
        from orchard_infra.runs.membership import command_of

        self._give_terminal_back()
        return [Leftover(i.pid, command_of(i.pid), "left", "asked to") for i in self._below()]

    def _stop(
        self, targets: list[ProcessIdentity], commands: dict[ProcessIdentity, str]
    ) -> list[Leftover]:
        from orchard_infra.runs.membership import command_of
        from orchard_infra.system.killing import StopOutcome, stop_processes

        deadline = time.monotonic() + self.grace

        def not_yet(pid: int) -> bool:
            return self._is_spared(pid) or _tracks_resources(pid)

        def stop(
            who: Sequence[ProcessIdentity], spare: Callable[[int], bool], least: float
        ) -> StopOutcome:
            grace = max(least, deadline - time.monotonic())
            try:
                with self._impatient():
                    return stop_processes(who, grace=grace, spare=spare)
            except Interrupted as signalled:
                self.tell(f"{signalled}: not waiting any longer")
                return stop_processes(who, grace=0.0, spare=spare)

        fates: dict[ProcessIdentity, str] = {}
        # More than once: who is started meanwhile by somebody who ends, shows up here later.
        for round_ in range(4):
            if round_ == 0:
                outcome = stop(targets, not_yet, 0.0)
            else:
                outcome = stop(targets, self._is_spared, _LATECOMERS_GRACE)
            self._reap()
            for fate in ("stopped", "killed", "denied", "stuck"):
                for identity in getattr(outcome, fate):
                    fates[identity] = fate
                    commands.setdefault(identity, "started meanwhile")
            targets = [
                identity
                for identity in self._below()
                if fates.get(identity) not in ("denied", "stuck")
                and not self._is_spared(identity.pid)
            ]
            if not targets:
                break
            commands.update((i, command_of(i.pid)) for i in targets if i not in commands)
        return [Leftover(i.pid, commands[i], fate) for i, fate in fates.items()]

    def _reap(self) -> bool:
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
                self._call_at = time.monotonic() + _WITNESS_AFTER

    def _stop_along(self, signum: int) -> None:
        """Stop as the command did: the shell waits for us, and takes the terminal back then.

        Not for a SIGSTOP, which nobody types: whoever sent that to the command alone may
        continue it alone, and we would never know.
        """
        if signum not in _STOPS or not self._is_stopped():
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
        return not signal.sigpending().isdisjoint(_STOPS)

    def _pass_on(self, signum: int) -> None:
        if self._witness is not None and self._witness.has_seen(signum):
            # For the group (kill %1, timeout) or for all of us (a scheduler, systemd): the
            # command has it. A second SIGTERM makes many programs drop what they save.
            # timeout(1) signals its child, and then its group: by now, that is here as well.
            signal.sigtimedwait({signum}, 0)
            self._renew_witness()
        elif signum != signal.SIGCONT or (self._is_stopped() and not self._is_to_stop()):
            os.kill(self.pid, signum)  # not reaped yet, so this pid is its own

    def _renew_witness(self) -> None:
        """What the old one has seen would be taken for the next signal of that kind."""
        if self._witness is not None:
            self._witness.dismiss()
            self._call_witness()

    def _call_witness(self) -> None:
        self._witness = _Witness.call()
        self._call_at = math.inf

    def _press(self) -> None:
        """Ctrl-C. The first is the command's own affair; if it stays, the next ones are ours."""
        assert self._terminal is not None
        if self._terminal.is_edited():
            self._presses = 0  # a prompt takes it for "drop this line"
            return
        now = time.monotonic()
        self._presses = self._presses + 1 if now - self._pressed < _AGAIN_WITHIN else 1
        self._pressed = now
        if self._presses > 1 and self._deals_with_it():
            self._presses = 0
        elif self._presses == 1:
            self._hinted = False
        elif self._presses == 2:
            self.tell(f"Ctrl-C again: sending SIGTERM to {self._name} and all below; next: SIGKILL")
            for identity in self._below():
                if not self._is_spared(identity.pid) and processes.is_alive(identity):
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(identity.pid, signal.SIGTERM)
        else:
            from orchard_infra.system.killing import stop_processes

            self.tell(f"Ctrl-C for the third time: killing {self._name} and all below")
            stop_processes(self._below(), grace=0.0, spare=self._is_spared)

    def _deals_with_it(self) -> bool:
        """Whether it ends, or comes back to its prompt, while we look: a busy machine is slow."""
        assert self._terminal is not None
        deadline = time.monotonic() + _AT_ITS_PROMPT_WITHIN
        while time.monotonic() < deadline:
            if self._terminal.is_edited():
                return True
            signal.sigtimedwait({signal.SIGCHLD}, 0.02)
            self._reap()
            if self._status is not None:
                return True
        return False

    def _watch_presses(self) -> None:
        if not self._presses:
            return
        waited = time.monotonic() - self._pressed
        if self._terminal is None or self._terminal.is_edited() or waited > _AGAIN_WITHIN:
            self._presses = 0  # back at its prompt: it has dealt with it
        elif self._presses == 1 and waited > _HINT_AFTER and not self._hinted:
            self._hinted = True
            self.tell(f"waiting for {self._name} to end; Ctrl-C again: SIGTERM, and then SIGKILL")

    def _is_spared(self, pid: int) -> bool:
        if any(identity.pid == pid for identity in self._before):
            return True
        return self.reason_to_spare(pid) is not None

    def _below(self) -> list[ProcessIdentity]:
        if not _sees_itself():
            return []
        below = processes.descendants([os.getpid()]).values()
        witness = self._witness.pid if self._witness is not None else 0
        return [i for i in below if i not in self._before and i.pid != witness]

    def _wait_for_leavers(self) -> list[ProcessIdentity]:
        """Who is still there after a moment: pools and helpers mostly leave with their program."""
        deadline = time.monotonic() + _LEAVES_BY_ITSELF
        while not self._reap():
            left = self._below()
            rest = deadline - time.monotonic()
            # One that was forked by a child that ended during the look was not seen by it; those
            # from before an exec are there to stay.
            if rest <= 0 or (not left and self._before):
                return left
            # A grandchild's end does not show here, its parent's does.
            signal.sigtimedwait({signal.SIGCHLD}, min(rest, 0.02))
        return []

    def _forget_signals(self) -> None:
        """What came by now was for the command, and has ended it or not."""
        while signal.sigtimedwait(self._passed, 0) is not None:
            pass

    @contextlib.contextmanager
    def _impatient(self) -> Iterator[None]:
        ends = self._passed.intersection(_ENDS)
        with interruptible():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, ends)

    def _give_terminal_back(self) -> None:
        if self._terminal is not None:
            self._terminal.take_from_the_dead()


@attrs.define
class _Witness:
    """A process of our group that does nothing but show whether a signal came to all of it.

    A signal says who sent it, and not to whom else. Whatever is sent to the witness stays
    pending there, and shows in ``/proc/PID/status`` (proc(5)). It ends with us, also when we are
    killed: the pipe that it reads from closes.
    """

    pid: int
    _pipe: int

    @classmethod
    def call(cls) -> _Witness | None:
        """None where no more processes are allowed: then every signal is passed on."""
        reads, writes = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(reads)
            os.close(writes)
            return None
        if pid == 0:
            try:
                # Not even the lock is to be held here, nor a pipe that somebody reads to its end.
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                os.closerange(0, reads)
                os.closerange(reads + 1, 1 << 20)
                os.read(reads, 1)
            finally:
                os._exit(0)
        os.close(reads)
        return cls(pid, writes)

    def has_seen(self, signum: int) -> bool:
        """Whether the same signal has come here; it is given a moment to come."""
        deadline = time.monotonic() + _SENT_TO_ALL_WITHIN
        while not (seen := self._is_pending(signum)) and time.monotonic() < deadline:
            time.sleep(0.002)
        return seen

    def _is_pending(self, signum: int) -> bool:
        try:
            with open(f"/proc/{self.pid}/status", "rb") as status:
                for line in status:
                    name, _, mask = line.partition(b":")
                    if name in (b"SigPnd", b"ShdPnd") and int(mask, 16) >> (signum - 1) & 1:
                        return True
        except OSError:
            pass
        return False

    def dismiss(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # our own child, and not reaped yet
        os.waitpid(self.pid, 0)
        self.forget()

    def forget(self) -> None:
        os.close(self._pipe)


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


def _tracks_resources(pid: int) -> bool:
    """A helper of Python's that unlinks what dead workers leave, and ends with the last one."""
    return b"multiprocessing.resource_tracker" in processes.read_cmdline(pid)
