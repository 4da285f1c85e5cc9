"""Which processes a run consists of, for the commands that show, stop and clean them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import psutil

from orchard_infra.runs.membership import Membership, own_pids
from orchard_infra.runs.record import RUN_ID_VARIABLE, Survivor
from orchard_infra.runs.registry import RegisteredRun
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity


def survivors_of(
    shown: Iterable[RegisteredRun], membership: Membership
) -> dict[str, tuple[Survivor, ...]]:
    """What still lives of those runs that are dead, by run id; only of runs that have any."""
    found: dict[str, list[Survivor]] = {}
    for run, survivor in membership.survivors([run for run in shown if not run.is_live]):
        found.setdefault(run.record.run_id, []).append(survivor)
    return {run_id: tuple(those) for run_id, those in found.items()}


def members_of(
    shown: Sequence[RegisteredRun], survivors: dict[str, tuple[Survivor, ...]]
) -> dict[str, tuple[ProcessIdentity, ...]]:
    """The processes of each run, by run id: the leader's tree and who left it, or what survives of
    a dead one. None of a run in another pid namespace.
    """
    found: dict[str, set[ProcessIdentity]] = {
        run.record.run_id: {one.identity for one in survivors.get(run.record.run_id, ())}
        for run in shown
    }
    live = {run.record.run_id: run for run in shown if run.is_live and run.record.is_local}
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
    """The memory of these processes, in bytes. What they share counts once, as far as the system
    tells (Pss of proc_pid_smaps(5)): the sum of what each has resident would tell forked workers
    to be as large as their parent.
    """
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
            continue  # gone since
    return total
