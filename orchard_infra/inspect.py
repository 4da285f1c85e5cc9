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

    @property
    def membership(self) -> Membership:
        return Membership(self.runs)

    def state_of(self, run: RegisteredRun) -> RunState:
        """The state of a run, its processes considered.

        The registry alone does not see what a dead run has started by exec: its lock is free.
        """
        return RunState.SURVIVORS if self.survivors_of(run) else run.state

    def survivors_of(self, run: RegisteredRun) -> tuple[Survivor, ...]:
        """The live processes of a run whose leader is dead, with what proves it."""
        return self._survivors.get(run.record.run_id, ())

    def members_of(self, run: RegisteredRun) -> tuple[ProcessIdentity, ...]:
        """The live processes of a run: its leader, those below it and those that have left the
        tree, or the survivors of a dead one. None of a run in another pid namespace.
        """
        return self._members.get(run.record.run_id, ())

    def run_of(self, pid: int) -> RegisteredRun | None:
        """The live run that a process belongs to."""
        return self.membership.live_run_of(pid)

    @functools.cached_property
    def _survivors(self) -> Mapping[str, tuple[Survivor, ...]]:
        found: dict[str, list[Survivor]] = {}
        dead = [run for run in self.runs if not run.is_live]
        for run, survivor in self.membership.survivors(dead):
            found.setdefault(run.record.run_id, []).append(survivor)
        return {run_id: tuple(those) for run_id, those in found.items()}

    @functools.cached_property
    def _members(self) -> Mapping[str, tuple[ProcessIdentity, ...]]:
        found: dict[str, set[ProcessIdentity]] = {
            run.record.run_id: {one.identity for one in self.survivors_of(run)} for run in self.runs
        }
        live = {run.record.run_id: run for run in self.runs if run.is_live and run.record.is_local}
        for run_id, run in live.items():
            if processes.is_alive(run.record.leader):
                found[run_id].add(run.record.leader)
                found[run_id].update(processes.descendants([run.record.pid]).values())
        if live:
            locked_by = {run.file: run.record.pid for run in live.values()}
            by_file = {run.file: run_id for run_id, run in live.items()}
            for pid in own_pids():
                started_in = processes.started_with(pid, RUN_ID_VARIABLE, live)
                if started_in is None and (file := processes.has_inherited(pid, locked_by)):
                    started_in = by_file[file]
                identity = processes.identity_of(pid)
                if started_in is not None and identity is not None and processes.is_alive(identity):
                    found[started_in].add(identity)
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
