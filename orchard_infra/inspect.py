"""Looking at the runs of this user on this machine, and at their processes. Nothing is changed.

    from orchard_infra.inspect import look, memory_of

    now = look()
    for run in now.runs:
        print(run.record.project, now.state_of(run).value, memory_of(now.members_of(run)))

This is what the command line and other guests use. One `Look` is one moment: take another one to
see what has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import attrs

from orchard_infra.runs.membership import Membership, command_of, is_ours, own_pids
from orchard_infra.runs.record import RUN_ID_VARIABLE, RunRecord, RunState, Survivor
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity

__all__ = [
    "Look",
    "ProcessIdentity",
    "RegisteredRun",
    "RunRecord",
    "RunState",
    "Survivor",
    "command_of",
    "is_ours",
    "look",
    "memory_of",
    "own_pids",
]


def look(registry: RunRegistry | None = None) -> Look:
    """All runs on record, now."""
    return Look((registry or RunRegistry()).runs())


@attrs.frozen
class Look:
    """The runs on record at one moment, the oldest first. Their processes are looked up when they
    are asked for, once.
    """

    runs: tuple[RegisteredRun, ...]

    def state_of(self, run: RegisteredRun) -> RunState:
        """The state of a run, its processes considered.

        The registry alone does not see what a dead run has started by exec: its lock is free.
        """
        return RunState.SURVIVORS if self.survivors_of(run) else run.state

    def survivors_of(self, run: RegisteredRun) -> tuple[Survivor, ...]:
        """The live processes of a run whose program is dead, with what proves it."""
        return self._survivors.get(run.record.run_id, ())

    def members_of(self, run: RegisteredRun) -> tuple[ProcessIdentity, ...]:
        """The live processes of a run. None of one in another pid or time namespace.

        Of a running or waiting one: its leader, what is below that, and what has left the tree. Of
        one that has ended while its program goes on: what it started. Of a dead one: its survivors.
        """
        return self._members.get(run.record.run_id, ())

    def run_of(self, pid: int) -> RegisteredRun | None:
        """The run that a process belongs to, as far as the program of that run lives."""
        return self.membership.live_run_of(pid)

    @functools.cached_property
    def membership(self) -> Membership:
        return Membership(self.runs)

    @functools.cached_property
    def _survivors(self) -> Mapping[str, tuple[Survivor, ...]]:
        found: dict[str, list[Survivor]] = {}
        over = [run for run in self.runs if run.is_over]
        for run, survivor in self.membership.survivors(over):
            found.setdefault(run.record.run_id, []).append(survivor)
        return {run_id: tuple(those) for run_id, those in found.items()}

    @functools.cached_property
    def _members(self) -> Mapping[str, tuple[ProcessIdentity, ...]]:
        found: dict[str, set[ProcessIdentity]] = {
            run.record.run_id: {one.identity for one in self.survivors_of(run)} for run in self.runs
        }
        present = [run for run in self.runs if not run.is_over and run.record.is_local]
        if not present:
            return {run_id: tuple(sorted(those)) for run_id, those in found.items()}
        parents = processes.parents()
        by_id = {run_id: run for run in present for run_id in run.run_ids}
        by_file = {file: run for run in present for file in run.files}
        locked_by = {file: run.record.pid for file, run in by_file.items()}
        for pid in own_pids():
            run_id = processes.started_with(pid, RUN_ID_VARIABLE, by_id)
            run = by_id[run_id] if run_id is not None else None
            if run is None and (file := processes.has_inherited(pid, locked_by)) is not None:
                run = by_file[file]
            identity = processes.identity_of(pid)
            if run is not None and identity is not None and identity != run.record.leader:
                found[run.record.run_id].add(identity)
        for run in present:
            those = found[run.record.run_id]
            those |= run.members.processes
            if run.is_live:
                those.add(run.record.leader)
            those = {one for one in those if processes.is_alive(one)}
            those |= set(processes.below([one.pid for one in those], parents).values())
            if not run.is_live:
                those -= run.members.before
            found[run.record.run_id] = those
        return {run_id: tuple(sorted(those)) for run_id, those in found.items()}


def memory_of(members: Iterable[ProcessIdentity]) -> int:
    """The memory of these processes, in bytes.

    What they share counts once, as far as the system tells (Pss of proc_pid_smaps(5)): by the
    resident memory of each, forked workers would seem as large as their parent.
    """
    import psutil

    total = 0
    for identity in members:
        try:
            process = psutil.Process(identity.pid)
            try:
                used = process.memory_full_info()
                total += getattr(used, "pss", used.rss)
            except psutil.AccessDenied:
                total += process.memory_info().rss
        except (psutil.Error, OSError):
            continue  # it has ended meanwhile
    return total
