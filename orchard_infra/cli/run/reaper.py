"""What outlives the command: who it is, how it is stopped, and how long it has.

The command is the program, so nothing below it is left when it has ended:

* At its normal end the rest is stopped. A process that started a session of its own (a tracker
  that uploads, a daemon) first has the grace to leave by itself.
* After a signal that asks to stop, whatever is left is asked itself, and has as long as the one
  who sent the signal gives: nothing is killed here. A shell script ends at once from SIGTERM, and
  the trainer below it still saves. Docker, systemd, Slurm and `orchard-infra stop` kill the
  wrapper with all that belongs to it when their own grace is over.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from orchard_infra.cli.run.interrupts import END_SIGNALS, Interrupted, interruptible
from orchard_infra.cli.run.supervisor import Supervisor
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity

if TYPE_CHECKING:
    from orchard_infra.system.killing import StopOutcome

_LATECOMERS_GRACE = 1.0  # seconds, at the least
_ROUNDS = 4  # a process that ends may just have started another one
_POLL = (0.02, 1.0)  # seconds between two looks, the first and the longest
_NAMED = 5  # processes in a line


@attrs.frozen
class Leftover:
    """A process that outlived the command.

    ``fate``: ended (by itself), stopped, killed, denied, stuck, left.
    """

    pid: int
    command: str
    fate: str
    reason: str = ""


@attrs.define(eq=False)
class Reaper:
    """Clears up after the command of a `Supervisor`.

    ``grace`` is in seconds. ``stop_grace`` limits what a process has after a stop signal; None is
    no limit. ``reason_to_spare(pid)`` says why a process below us is none of the command's.
    """

    supervisor: Supervisor
    tell: Callable[[str], None]
    grace: float
    stop_grace: float | None
    reason_to_spare: Callable[[int], str | None]
    _commands: dict[ProcessIdentity, str] = attrs.field(factory=dict, init=False)
    _fates: dict[ProcessIdentity, str] = attrs.field(factory=dict, init=False)
    _spared: frozenset[ProcessIdentity] = attrs.field(default=frozenset(), init=False)
    _began: float = attrs.field(factory=time.monotonic, init=False)
    _hurried: bool = attrs.field(default=False, init=False)

    def survey(self, left: Sequence[ProcessIdentity]) -> list[Leftover]:
        """What outlived the command, when that is to be left alone."""
        self._note_commands(left)
        return [Leftover(i.pid, self._commands[i], "left", "asked to") for i in left]

    def clear(self, left: Sequence[ProcessIdentity]) -> list[Leftover]:
        """Stop what outlived the command."""
        self._note_commands(left)
        spared = {i: reason for i in left if (reason := self.reason_to_spare(i.pid))}
        found = [Leftover(i.pid, self._commands[i], "left", why) for i, why in spared.items()]
        self._spared = frozenset(spared)
        targets = [i for i in left if i not in spared]
        if targets:
            if self.supervisor.asked_to_stop:
                self._wait_as_asked(targets)
            else:
                self._stop_attached(targets)
                self._wait_for_detached()
            self._stop_the_rest()
            found += [Leftover(i.pid, self._commands[i], fate) for i, fate in self._fates.items()]
        for leftover in found:
            self._tell_fate(leftover)
        return found

    # After a stop signal.

    def _wait_as_asked(self, targets: Sequence[ProcessIdentity]) -> None:
        """Ask each process, once, and wait until they have ended."""
        supervisor = self.supervisor
        limit = math.inf if self.stop_grace is None else time.monotonic() + self.stop_grace
        detached_until = self._began + self.grace
        asked: set[ProcessIdentity] = set()
        denied: set[ProcessIdentity] = set()
        pause = _POLL[0]
        self.tell(
            f"{supervisor.name} was asked to stop; waiting for what outlived it: "
            f"{self._listed(targets)}"
        )
        while left := [i for i in self._left() if i not in denied]:
            now = time.monotonic()
            if now >= limit:
                return
            for identity in self._unasked(left, asked):
                if now < detached_until and self._is_detached(identity.pid):
                    continue
                asked.add(identity)
                pause = _POLL[0]
                if not supervisor.has_heard(identity.pid) and not self._ask(identity):
                    denied.add(identity)
            info = supervisor.wait_for_child(min(pause, limit - now))
            if info is not None and supervisor.ends_the_wait(info):
                self._hurry(info.si_signo)
                return
            pause = min(2 * pause, _POLL[1])
            self._note_ended(asked, "stopped")
        self._note_ended(asked, "stopped")

    def _unasked(
        self, left: Iterable[ProcessIdentity], asked: set[ProcessIdentity]
    ) -> list[ProcessIdentity]:
        """Those to ask now. A helper that a process has started since it was asked (to copy a
        checkpoint, say) is its own affair for as long as it lives.
        """
        alive = {identity.pid for identity in asked if processes.is_alive(identity)}
        new = [identity for identity in left if identity not in asked]
        return [i for i in new if alive.isdisjoint(processes.ancestors(i.pid))] if alive else new

    def _ask(self, identity: ProcessIdentity) -> bool:
        from orchard_infra.cli.asking import ask_to_stop

        return ask_to_stop(identity) or not processes.is_alive(identity)

    # At the normal end.

    def _stop_attached(self, targets: Sequence[ProcessIdentity]) -> None:
        attached = [i for i in targets if not self._is_detached(i.pid)]
        detached = [i for i in targets if i not in attached]
        if attached:
            self.tell(f"stopping what outlived {self.supervisor.name}: {self._listed(attached)}")
            self._stop(attached, self.grace, self._is_spared_for_now)
        if detached:
            self.tell(
                f"waiting {self.grace:g} s for what has left the session of "
                f"{self.supervisor.name}: {self._listed(detached)}"
            )

    def _wait_for_detached(self) -> None:
        deadline = self._began + self.grace
        pause = _POLL[0]
        while not self._hurried and (left := self._left()):
            rest = deadline - time.monotonic()
            if rest <= 0 or not any(self._is_detached(i.pid) for i in left):
                return
            info = self.supervisor.wait_for_child(min(pause, rest))
            if info is not None:
                self._hurry(info.si_signo)
            pause = min(2 * pause, 0.25)
            self._note_ended(self._commands, "ended")

    def _is_spared_for_now(self, pid: int) -> bool:
        """Spare also helpers, which end once nobody needs them, and what may leave by itself."""
        from orchard_infra.sanitizing.helpers import is_tracker

        return self._is_spared(pid) or self._is_detached(pid) or is_tracker(pid)

    # At any end.

    def _stop_the_rest(self) -> None:
        grace = 0.0 if self._hurried or self.supervisor.asked_to_stop else self.grace
        for _ in range(_ROUNDS):
            left = [i for i in self._left() if self._fates.get(i) not in ("denied", "stuck")]
            if not left:
                break
            self._note_commands(left)
            self._stop(left, grace, self._is_spared)
            grace = 0.0 if self._hurried else _LATECOMERS_GRACE
        self._note_ended(self._commands, "ended")

    def _stop(
        self, targets: Sequence[ProcessIdentity], grace: float, spare: Callable[[int], bool]
    ) -> None:
        from orchard_infra.sanitizing.helpers import is_forkserver
        from orchard_infra.system.killing import stop_processes

        def stop(seconds: float) -> StopOutcome:
            return stop_processes(targets, grace=seconds, spare=spare, last=is_forkserver)

        try:
            with self._impatient():
                outcome = stop(0.0 if self._hurried else grace)
        except Interrupted as signalled:
            self._hurry(signalled.signum)
            outcome = stop(0.0)
        self.supervisor.reap()
        for fate in ("stopped", "killed", "denied", "stuck"):
            for identity in getattr(outcome, fate):
                self._fates[identity] = fate
                self._commands.setdefault(identity, "started meanwhile")

    def _left(self) -> list[ProcessIdentity]:
        self.supervisor.reap()
        left = [i for i in self.supervisor.below() if not self._is_spared(i.pid)]
        self._note_commands(left)
        return left

    def _is_spared(self, pid: int) -> bool:
        if any(identity.pid == pid for identity in self.supervisor.before):
            return True
        return self.reason_to_spare(pid) is not None

    def _is_detached(self, pid: int) -> bool:
        """Whether it has started a session of its own, in that of the command or ours."""
        try:
            return os.getsid(pid) not in (os.getsid(0), self.supervisor.pid)
        except OSError:
            return False

    def _hurry(self, signum: int) -> None:
        if not self._hurried:
            self.tell(f"{signal.Signals(signum).name}: not waiting any longer")
        self._hurried = True

    @contextlib.contextmanager
    def _impatient(self) -> Iterator[None]:
        """Have a signal that asks us to end raise `Interrupted`."""
        ends = [s for s in END_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        with interruptible():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, ends)

    # Telling.

    def _note_commands(self, identities: Iterable[ProcessIdentity]) -> None:
        from orchard_infra.inspect import command_of

        for identity in identities:
            if identity not in self._commands:
                self._commands[identity] = command_of(identity.pid)

    def _note_ended(self, identities: Iterable[ProcessIdentity], fate: str) -> None:
        for identity in identities:
            known = identity in self._fates or identity in self._spared
            if not known and not processes.is_alive(identity):
                self._fates[identity] = fate

    def _listed(self, identities: Sequence[ProcessIdentity]) -> str:
        names = "; ".join(f"pid {i.pid} ({self._commands[i]})" for i in identities[:_NAMED])
        more = len(identities) - _NAMED
        return f"{names} and {more} more" if more > 0 else names

    def _tell_fate(self, leftover: Leftover) -> None:
        who = f"pid {leftover.pid} ({leftover.command})"
        if leftover.fate == "left":
            self.tell(f"left alone: {who}, {leftover.reason}")
        elif leftover.fate in _FATES:
            self.tell(f"{_FATES[leftover.fate]}: {who}")


_FATES: Mapping[str, str] = {
    "killed": "killed, since it did not end",
    "denied": "may not be signalled",
    "stuck": "does not end, uninterruptible sleep",
}
