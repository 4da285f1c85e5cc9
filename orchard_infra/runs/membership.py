"""Which processes belong to which run: the proof that is needed before anything is stopped.

A process belongs to a run when it leads it, descends from its leader, was started with the
run's id in its environment, or holds the run's own record file open, as forked children do.
The lock file proves nothing: whoever waits for the lock has it open, too. Nor does an open record
file alone prove guilt, since whoever reads the registry has it open for a moment: a survivor has
inherited the very description that the leader locked.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, TypeVar

import attrs

from orchard_infra.runs.record import RUN_ID_VARIABLE, RunState, Survivor
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity

_Proof = TypeVar("_Proof")
_Live: TypeAlias = tuple[
    dict[str, RegisteredRun],  # by id
    dict[ProcessIdentity, RegisteredRun],  # by leader
    dict[tuple[int, int], RegisteredRun],  # by record file
    dict[tuple[int, int], str],  # the names of those files
]


@attrs.frozen
class Membership:
    """What the registry says, applied to processes. One is made for each look at the machine."""

    runs: tuple[RegisteredRun, ...]

    def live_run_of(self, pid: int) -> RegisteredRun | None:
        """The live run that a process belongs to: such a process is never touched.

        Its ancestors are asked as well: a child with a cleaned environment still belongs.
        """
        live, leaders, files, names = self._live
        if not live:
            return None
        for member in (pid, *processes.ancestors(pid)):
            identity = processes.identity_of(member)
            if identity in leaders:
                return leaders[identity]
            run_id = processes.started_with(member, RUN_ID_VARIABLE, live)
            if run_id is not None:
                return live[run_id]
            file = processes.has_open(member, files.keys(), names=names)
            if file is not None:
                return files[file]
        return None

    @functools.cached_property  # asked for once for each suspect, of which a sweep has many
    def _live(self) -> _Live:
        live = {run.record.run_id: run for run in self.runs if run.is_live}
        leaders = {run.record.leader: run for run in live.values() if run.record.is_local}
        files = {run.file: run for run in live.values()}
        return live, leaders, files, {file: run.file_name for file, run in files.items()}

    def survivors(self, dead: Iterable[RegisteredRun]) -> Iterator[tuple[RegisteredRun, Survivor]]:
        """The live processes of runs whose leader is dead, with what proves it."""
        by_id = {run.record.run_id: run for run in dead}
        if not by_id:
            return
        # Only a lock that is still held has a holder to look for, and looking is dear.
        held = {run.file: run for run in by_id.values() if run.state is RunState.SURVIVORS}
        locked_by = {file: run.record.pid for file, run in held.items()}
        near = kin()

        def membership(pid: int) -> tuple[RegisteredRun, str] | None:
            run_id = processes.started_with(pid, RUN_ID_VARIABLE, by_id)
            if run_id is not None:
                return by_id[run_id], "started by the run"
            file = processes.has_inherited(pid, locked_by) if held else None
            return None if file is None else (held[file], "forked by the run")

        for pid in own_pids():
            proven = None if pid in near else _proven(pid, membership)
            if proven is not None and not self.live_run_of(pid):
                identity, (run, evidence) = proven
                yield run, Survivor(pid, identity.create_time, command_of(pid), evidence)


def has_led_a_run(pid: int, registry: RunRegistry) -> bool:
    """Whether a process, or one above it, led a run that was released, and goes on since.

    It keeps the registry's directory open. That it looks like another run is no reason to take it
    for a ghost: it is writing its results.
    """
    file = registry.directory_file()
    if file is None:
        return False
    files = frozenset([file])
    return any(processes.has_open(process, files) for process in (pid, *processes.ancestors(pid)))


def kin() -> set[int]:
    """This process, its ancestors, its descendants, and those of the process it was forked from.

    The workers of one pool show the same command line, and are no twins of each other.
    """
    me = os.getpid()
    cmdline = processes.read_cmdline(me)
    above = list(processes.ancestors(me))
    root = me
    for pid in above:
        if processes.read_cmdline(pid) != cmdline:
            break
        root = pid
    return {me, *above, *processes.descendants([root])}


def own_pids() -> Iterator[int]:
    """The processes that might be ours, by a look that costs one stat(2) each."""
    uid = os.geteuid() if hasattr(os, "geteuid") else None
    for pid in processes.all_pids():
        if uid is None or processes.owner_of(pid) == uid:
            yield pid


def is_ours(pid: int) -> bool:
    """Whether a process has our user ids and lives in our pid namespace.

    Root, too, counts as one user among others here.
    """
    if hasattr(os, "getuid") and processes.read_uids(pid) != (os.getuid(), os.geteuid()):
        return False
    return processes.is_own_pid_namespace(processes.pid_namespace(pid))


def command_of(pid: int) -> str:
    """What a process runs, for a person; its name where it has no command line."""
    words = processes.split_cmdline(processes.read_cmdline(pid))
    if words:
        return " ".join(words)[:400]
    stat = processes.read_stat(pid)
    return f"[{stat.name}]" if stat else "(gone)"


def orphans_of(
    run: RegisteredRun | None, run_id: str, pids: Iterable[int] | None = None
) -> Iterator[ProcessIdentity]:
    """Processes of a live run of our own that are not below it any more: double forks, setsid.

    ``pids`` are those to look at, where that is known: who started before the run is none of it.

    Those started by exec carry its id. The others are forks of this very process, and so show
    its own initial environment, or none where their title was rewritten: only they are asked
    which files they have open.
    """
    own = processes.raw_environ(os.getpid())
    files = {run.file: run.record.pid} if run else {}
    marker = f"{RUN_ID_VARIABLE}={run_id}".encode()

    def belongs(pid: int) -> bool | None:
        environ = processes.raw_environ(pid)
        if environ is None:
            return None
        if marker in environ and marker in environ.split(b"\0"):
            return True
        forked = environ == own or not environ.strip(b"\0")
        return True if forked and files and processes.has_inherited(pid, files) else None

    for pid in own_pids() if pids is None else pids:
        proven = _proven(pid, belongs)
        if proven is not None:
            yield proven[0]


def _proven(
    pid: int, prove: Callable[[int], _Proof | None]
) -> tuple[ProcessIdentity, _Proof] | None:
    """What is proven of a live process, and which process that is.

    The pid may be another's by the time the identity is read. So the proof has to hold twice.
    """
    proof = prove(pid)
    if proof is None:
        return None
    identity = processes.identity_of(pid)
    if identity is None or prove(pid) != proof or not processes.is_alive(identity):
        return None
    return identity, proof
