"""Which processes belong to which run: the proof that is needed before anything is stopped.

A process belongs to a run when it leads it, descends from its leader, was started with the
run's id in its environment, or holds the run's own record file open, as forked children do.
The lock file proves nothing: whoever waits for the lock has it open, too. Nor does an open record
file alone prove guilt, since whoever reads the registry has it open for a moment: a survivor has
inherited the very description that the leader locked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import attrs

from orchard_infra import processes
from orchard_infra.processes import ProcessIdentity
from orchard_infra.runs import RUN_ID_VARIABLE, RegisteredRun, RunState, Survivor


@attrs.frozen
class Membership:
    """What the registry says, applied to processes. One is made for each look at the machine."""

    runs: tuple[RegisteredRun, ...]

    def live_run_of(self, pid: int) -> RegisteredRun | None:
        """The live run that a process belongs to: such a process is never touched.

        Its ancestors are asked as well: a child with a cleaned environment still belongs.
        """
        live = {run.record.run_id: run for run in self.runs if run.is_live}
        if not live:
            return None
        leaders = {run.record.leader: run for run in live.values() if run.record.is_local}
        files = {run.file: run for run in live.values()}
        for member in (pid, *processes.ancestors(pid)):
            identity = processes.identity_of(member)
            if identity in leaders:
                return leaders[identity]
            run_id = processes.started_with(member, RUN_ID_VARIABLE, live)
            if run_id is not None:
                return live[run_id]
            file = processes.has_open(member, frozenset(files))
            if file is not None:
                return files[file]
        return None

    def survivors(self, dead: Iterable[RegisteredRun]) -> Iterator[tuple[RegisteredRun, Survivor]]:
        """The live processes of runs whose leader is dead, with what proves it."""
        by_id = {run.record.run_id: run for run in dead}
        if not by_id:
            return
        # Only a lock that is still held has a holder to look for, and looking is dear.
        held = {run.file: run for run in by_id.values() if run.state is RunState.SURVIVORS}
        locked_by = {file: run.record.pid for file, run in held.items()}
        near = kin()
        for pid in own_pids():
            if pid in near:
                continue
            run_id = processes.started_with(pid, RUN_ID_VARIABLE, by_id)
            if run_id is not None:
                run, evidence = by_id[run_id], "started by the run"
            else:
                file = processes.has_inherited(pid, locked_by) if held else None
                if file is None:
                    continue
                run, evidence = held[file], "forked by the run"
            identity = processes.identity_of(pid)
            if identity and processes.is_alive(identity) and not self.live_run_of(pid):
                yield run, Survivor(pid, identity.create_time, command_of(pid), evidence)


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
    return processes.pid_namespace(pid) == processes.pid_namespace()


def command_of(pid: int) -> str:
    """What a process runs, for a person; its name where it has no command line."""
    words = processes.split_cmdline(processes.read_cmdline(pid))
    if words:
        return " ".join(words)[:400]
    stat = processes.read_stat(pid)
    return f"[{stat.name}]" if stat else "(gone)"


def orphans_of(run: RegisteredRun | None, run_id: str) -> Iterator[ProcessIdentity]:
    """Processes of a live run of our own that are not below it any more: double forks, setsid.

    Those started by exec carry its id. The others are forks of this very process, and so show
    its own initial environment, or none where their title was rewritten: only they are asked
    which files they have open.
    """
    own = processes.raw_environ(os.getpid())
    files = {run.file: run.record.pid} if run else {}
    marker = f"{RUN_ID_VARIABLE}={run_id}".encode()
    for pid in own_pids():
        environ = processes.raw_environ(pid)
        if environ is None:
            continue
        belongs = marker in environ.split(b"\0") if marker in environ else False
        forked = environ == own or not environ.strip(b"\0")
        if belongs or (forked and files and processes.has_inherited(pid, files)):
            identity = processes.identity_of(pid)
            if identity is not None and processes.is_alive(identity):
                yield identity
