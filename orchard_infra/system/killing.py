"""Stopping processes: whole trees, one grace period for all of them, each signal on proof.

A pid may belong to a stranger by the time it is signalled. Where the kernel has pidfds (see
pidfd_open(2)), a process is opened first, then its identity is compared, and signals go to what
was opened. Elsewhere the identity is compared right before each signal. Process groups are never
signalled: a shell without job control puts strangers into one group.

A process that has ended is not reaped. The status of a child belongs to whoever started it (a
`Popen`, a pool, `os.waitpid` in the user's program). A defunct process counts as gone here.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs

from orchard_infra.system import processes
from orchard_infra.system.masking import uninterrupted
from orchard_infra.system.processes import ProcessIdentity

# A kernel, a sandbox or a limit that does not give us a pidfd. Anything else says that there is
# no such process, or that the number is that of a thread.
_NO_PIDFD = frozenset(
    (errno.ENOSYS, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV)
)
_SIGCONT = getattr(signal, "SIGCONT", None)
_SIGCHLD = getattr(signal, "SIGCHLD", None)
_SIGSTOP = getattr(signal, "SIGSTOP", None)
_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has one way to end a process
_POLL = 0.02  # seconds between looks at processes for which there is no pidfd
_FREEZE = 1.0  # seconds, at most: it takes milliseconds
_ROOM = 3  # descriptors that are left for looks at /proc
_HELPERS = 1.0  # seconds that helpers have to end once they have nobody left to serve


@attrs.frozen
class StopOutcome:
    """What became of the processes, trees included. Spared processes are in none of these.

    ``stopped`` ended after SIGTERM, ``killed`` after SIGKILL. ``denied`` may not be signalled:
    those of another user, and always this process, its ancestors and the first process.
    ``stuck`` were still there when the wait was over: they are in uninterruptible sleep (state D)
    and end when the kernel lets them. ``gone`` ended, or lost their pid to another process,
    before any signal.
    """

    stopped: tuple[ProcessIdentity, ...] = ()
    killed: tuple[ProcessIdentity, ...] = ()
    denied: tuple[ProcessIdentity, ...] = ()
    stuck: tuple[ProcessIdentity, ...] = ()
    gone: tuple[ProcessIdentity, ...] = ()


def stop_processes(
    targets: Iterable[ProcessIdentity],
    *,
    grace: float,
    spare: Callable[[int], bool],
    last: Callable[[int], bool] | None = None,
    kill_wait: float = 2.0,
) -> StopOutcome:
    """Stop processes with their trees: SIGTERM, one ``grace`` for all, SIGKILL for the rest.

    Takes at most ``grace`` plus ``kill_wait`` (both in seconds) and two seconds, and no longer
    than the processes do. ``spare(pid)`` leaves a process alone, with all that is below it, also
    when that is a target itself; it is asked once for each process. ``last(pid)`` names helpers:
    they are asked once all others have ended, since they serve them (a forkserver is the parent
    of its workers, and without it nobody finds those that it is just starting).

    A child whose parent ends before the child was seen is an orphan. Nothing here can tell it
    from a stranger: look for other evidence (the run's id in its environment) and call again.
    """
    hunt = _Hunt(spare, last or _nobody)
    try:
        hunt.begin(targets)
        with hunt.unheard():
            hunt.terminate(grace)
            hunt.kill(kill_wait)
            hunt.terminate(_HELPERS, helpers=True)
            hunt.kill(kill_wait, helpers=True)
        return hunt.outcome()
    finally:
        hunt.close()


def _nobody(pid: int) -> bool:
    return False


@attrs.define(eq=False, repr=False)
class _Member:
    """A process that is to end."""

    identity: ProcessIdentity
    pidfd: int | None
    is_own_child: bool
    is_helper: bool
    asked: bool = False
    frozen: bool = False
    killed: bool = False
    denied: bool = False
    ended: bool = False

    @property
    def is_left(self) -> bool:
        return not (self.ended or self.denied)

    def send(self, signum: int) -> None:
        try:
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, signum)
            elif processes.is_alive(self.identity):
                os.kill(self.identity.pid, signum)
            else:
                self.ended = True
        except ProcessLookupError:
            self.ended = True
        except PermissionError:
            self.denied = True

    def state(self) -> str:
        """The letter of proc(5), or Z when it is gone."""
        stat = processes.read_stat(self.identity.pid)
        if stat is None or stat.create_time != self.identity.create_time:
            return "Z"
        return stat.state


@attrs.define(eq=False, repr=False)
class _Hunt:
    spare: Callable[[int], bool]
    last: Callable[[int], bool]
    members: dict[ProcessIdentity, _Member] = attrs.field(factory=dict)
    refused: list[ProcessIdentity] = attrs.field(factory=list)
    gone: list[ProcessIdentity] = attrs.field(factory=list)
    _me: int = attrs.field(factory=os.getpid)
    _untouchable: frozenset[int] = attrs.field(init=False)
    _spared: dict[ProcessIdentity, bool] = attrs.field(factory=dict)
    _opened: dict[int, _Member] = attrs.field(factory=dict)
    # Only Linux has pidfds, and not in a Python that was built with old headers.
    _may_open: bool = attrs.field(factory=lambda: hasattr(os, "pidfd_open"))

    def __attrs_post_init__(self) -> None:
        self._untouchable = frozenset((self._me, *processes.ancestors(self._me)))

    def begin(self, targets: Iterable[ProcessIdentity]) -> None:
        """Find every process there is to stop, before the first one is signalled."""
        roots = []
        for target in dict.fromkeys(targets):
            # kill(2) takes 0 and negative numbers for whole groups.
            if target.pid <= 1 or target.pid in self._untouchable:
                self.refused.append(target)
            elif processes.is_alive(target):
                roots.append(target)
            else:
                self.gone.append(target)
        self._add_trees(roots)

    @contextlib.contextmanager
    def unheard(self) -> Iterator[None]:
        """Hold SIGCHLD back while children of this process end.

        The handler of torch's DataLoader raises when a worker is killed, wherever the main thread
        is at that moment. Here it would end the stopping half-way.
        """
        handler = signal.getsignal(_SIGCHLD) if _SIGCHLD is not None else None
        in_main_thread = threading.current_thread() is threading.main_thread()
        ours = any(member.is_own_child for member in self.members.values())
        if _SIGCHLD is None or not (callable(handler) and in_main_thread and ours):
            yield
            return
        signal.signal(_SIGCHLD, signal.SIG_DFL)
        try:
            yield
        finally:
            signal.signal(_SIGCHLD, handler)

    def terminate(self, grace: float, *, helpers: bool = False) -> None:
        """Ask all to end, and wait. Children that appear meanwhile are asked as well: a fork may
        be in progress, and a handler may start a process to save its state.
        """
        deadline = time.monotonic() + grace
        pause = _POLL
        look = 0.0
        while True:
            self._ask(helpers)
            now = time.monotonic()
            if now >= deadline or not self._left(helpers):
                return
            if now >= look:
                self._add_trees_below_those_left()
                pause *= 2
                look = time.monotonic() + min(pause, 0.5)
                continue
            self._wait(min(look, deadline) - now)

    def kill(self, wait: float, *, helpers: bool = False) -> None:
        """Kill what is left, and wait once."""
        if not self._left(helpers):
            return
        self._freeze(helpers)
        with uninterrupted():
            for member in self._left(helpers):
                member.killed = True
                member.send(_SIGKILL)
        deadline = time.monotonic() + wait
        while self._left(helpers) and (rest := deadline - time.monotonic()) > 0:
            self._wait(rest)

    def outcome(self) -> StopOutcome:
        members = self.members.values()
        ended = [m for m in members if m.ended]
        return StopOutcome(
            stopped=tuple(m.identity for m in ended if m.asked and not m.killed),
            killed=tuple(m.identity for m in ended if m.killed),
            denied=(*self.refused, *(m.identity for m in members if m.denied and not m.ended)),
            stuck=tuple(m.identity for m in members if m.is_left),
            gone=(*self.gone, *(m.identity for m in ended if not m.asked)),
        )

    def close(self) -> None:
        """Leave no process frozen, in case of an exception, and no descriptor open."""
        for member in self.members.values():
            if member.frozen and not member.killed and _SIGCONT is not None:
                member.send(_SIGCONT)
            self._reap_adopted(member)
            if member.pidfd is not None:
                os.close(member.pidfd)

    def _ask(self, helpers: bool) -> None:
        new = [member for member in self._left(helpers) if not member.asked]
        for member in new:
            member.asked = True
            member.send(signal.SIGTERM)
            if member.ended:
                member.asked = False
        if _SIGCONT is None:
            return
        for member in new:
            # A stopped process gets its SIGTERM only when it is continued. The SIGTERM was sent
            # first, so that it does not go on with its work before.
            if member.is_left and member.state() == "T":
                member.send(_SIGCONT)

    def _freeze(self, helpers: bool) -> None:
        """Stop all of them (SIGSTOP) and look for children until there are no new ones.

        A process that forks in a loop would have another child between any look and its end.
        """
        deadline = time.monotonic() + _FREEZE
        while _SIGSTOP is not None:
            for member in self._left(helpers):
                if not member.frozen:
                    member.frozen = True
                    member.send(_SIGSTOP)
            at_rest = all(member.state() in "TtDZX" for member in self._left(helpers))
            known = len(self.members)
            self._add_trees_below_those_left()
            if (at_rest and len(self.members) == known) or time.monotonic() > deadline:
                return

    def _left(self, helpers: bool) -> list[_Member]:
        """Those that have not ended: without the helpers, whose turn comes last, or with them."""
        members = self.members.values()
        return [member for member in members if member.is_left and member.is_helper <= helpers]

    def _wait(self, seconds: float) -> None:
        """Until one of them ends, at most so long."""
        unopened = [m for m in self._left(helpers=True) if m.pidfd is None]
        if unopened:
            seconds = min(seconds, _POLL)
        if not self._opened:
            time.sleep(seconds)
        else:
            poller = select.poll()
            for pidfd in self._opened:
                poller.register(pidfd, select.POLLIN)
            for pidfd, _ in poller.poll(math.ceil(seconds * 1000)):
                self._opened.pop(pidfd).ended = True
        for member in unopened:
            member.ended = not processes.is_alive(member.identity)

    def _add_trees_below_those_left(self) -> None:
        self._add_trees(member.identity for member in self._left(helpers=True))

    def _add_trees(self, roots: Iterable[ProcessIdentity]) -> None:
        """Add these processes and all below them, except what is spared and what is below that."""
        rows = processes.parents()
        children = _children(rows)
        found: dict[ProcessIdentity, None] = {}
        spared: list[ProcessIdentity] = []
        pending = list(roots)
        while pending:
            identity = pending.pop()
            if self._is_spared(identity):
                spared.append(identity)
            elif identity not in found:
                found[identity] = None
                row = rows.get(identity.pid)
                # It may have ended since it was looked at. The children of the process that got
                # its pid are somebody else's.
                if row is None or row[1] == identity.create_time:
                    pending += children.get(identity.pid, ())
        while spared:
            identity = spared.pop()
            found.pop(identity, None)
            spared += children.pop(identity.pid, ())
        for identity in found:
            if identity not in self.members:
                self._add(identity)

    def _is_spared(self, identity: ProcessIdentity) -> bool:
        if identity not in self._spared:
            pid = identity.pid
            self._spared[identity] = pid in self._untouchable or self.spare(pid)
        return self._spared[identity]

    def _add(self, identity: ProcessIdentity) -> None:
        try:
            pidfd = self._open(identity.pid)
        except OSError:
            self.gone.append(identity)
            return
        # Opened before this look: if it is still the process that we mean, it is the one we opened.
        stat = processes.read_stat(identity.pid)
        if stat is None or stat.create_time != identity.create_time:
            if pidfd is not None:
                os.close(pidfd)
            self.gone.append(identity)
            return
        member = _Member(
            identity,
            pidfd,
            is_own_child=stat.ppid == self._me,
            is_helper=self.last(identity.pid),
        )
        self.members[identity] = member
        if pidfd is not None:
            self._opened[pidfd] = member

    def _open(self, pid: int) -> int | None:
        """A pidfd; None where there are none to be had.

        Raises:
            OSError: There is no such process.
        """
        if not self._may_open:
            return None
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in _NO_PIDFD:
                return None
            raise
        if _has_room_beside(pidfd):
            return pidfd
        os.close(pidfd)
        self._may_open = False
        return None

    def _reap_adopted(self, member: _Member) -> None:
        """Reap a process that became our child by losing its parent: nobody else ever will.

        That happens where this program is the first process of a container.
        """
        if member.is_own_child or not member.ended:
            return
        pid = member.identity.pid
        stat = processes.read_stat(pid)
        if stat is None or stat.create_time != member.identity.create_time:
            return
        if stat.ppid == self._me and processes.is_defunct(stat):
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


def _children(rows: Mapping[int, tuple[int, float]]) -> dict[int, list[ProcessIdentity]]:
    """The processes of a scan, by the pid of their parent."""
    children: dict[int, list[ProcessIdentity]] = {}
    for pid, (ppid, create_time) in rows.items():
        children.setdefault(ppid, []).append(ProcessIdentity(pid, create_time))
    return children


def _has_room_beside(fd: int) -> bool:
    """Whether a few more descriptors can be opened. Without one to read /proc with, every process
    would look as if it had ended.
    """
    opened: list[int] = []
    try:
        for _ in range(_ROOM):
            opened.append(os.dup(fd))
        return True
    except OSError:
        return False
    finally:
        for more in opened:
            os.close(more)
