"""Survivors: the live processes of programs that are dead, and what kind of process each is.

===========  ==================================================================================
detached     it is in another session than the program was, or below such a process; or it is
             another program that a run started which ended well
worker       a fork of the program, or a worker of multiprocessing or loky
program      another program that a run started which crashed
===========  ==================================================================================

A tree is looked at as a whole, from one scan, and before anything is stopped: for some processes
the only evidence is that they are below another one. Everything below a detached process is
detached: the shells of a tmux server that was started in a run carry the run's id.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import attrs

from orchard_infra.runs.environ import environment_digest
from orchard_infra.runs.membership import command_of, kin, leads_a_run, led_a_run_itself
from orchard_infra.runs.pools import Role, role_of
from orchard_infra.runs.record import RUN_ID_VARIABLE, RunRecord, RunState, Survivor, clip
from orchard_infra.runs.registered import RegisteredRun
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity, Row

_Kind = Literal["worker", "program", "detached"]
_FORKED = "forked by the run"
_STARTED = "started by the run"
_WRITTEN_DOWN = "written down by the run"


def find_survivors(
    dead: Iterable[RegisteredRun], live_run_of: Callable[[int], RegisteredRun | None]
) -> Iterator[tuple[RegisteredRun, Survivor]]:
    """The survivors of these runs, as far as they are over; helpers of others come last."""
    boot_id = processes.boot_id()
    # Of another boot nothing has survived. After a power cut there may be many of those.
    runs = [run for run in dead if run.is_over and run.record.boot_id in (boot_id, "")]
    if not runs:
        return
    found = _Search(runs, live_run_of).members()
    for member in sorted(found, key=lambda member: (member.is_helper, member.identity)):
        # It is still the process that the scan saw. So the evidence that was read in between is
        # about this process, and not about another one that got its pid.
        if processes.is_alive(member.identity):
            yield member.run, member.describe()


@attrs.frozen(repr=False)
class _Member:
    run: RegisteredRun
    identity: ProcessIdentity
    cmdline: bytes
    evidence: str
    kind: _Kind
    role: Role | None
    is_helper: bool = False

    def describe(self) -> Survivor:
        identity = self.identity
        return Survivor(
            identity.pid,
            identity.create_time,
            command_of(identity.pid),
            self.evidence,
            self.kind,
            self.is_helper,
        )


class _Search:
    def __init__(
        self,
        runs: list[RegisteredRun],
        live_run_of: Callable[[int], RegisteredRun | None],
    ) -> None:
        self.live_run_of = live_run_of
        self.uid = os.geteuid() if hasattr(os, "geteuid") else None
        self.by_id = {run_id: run for run in runs for run_id in run.run_ids}
        self.written_down = {
            identity: run
            for run in runs
            if run.record.is_local
            for identity in run.members.processes
        }
        # Open files are expensive to look at. Only a lock that is held has a holder to look for;
        # whether the former records of folded runs are held is not known.
        self.held: dict[tuple[int, int], RegisteredRun] = {}
        self.names: dict[tuple[int, int], str] = {}
        for run in runs:
            files = run.files
            if run.state is not RunState.SURVIVORS:
                files.pop(run.file)
            self.held.update(dict.fromkeys(files, run))
            self.names.update(files)
        self.locked_by = {file: run.record.pid for file, run in self.held.items()}
        # A process that is older than the program was not started by it.
        self.since = min(run.record.create_time for run in runs)
        self.table: Mapping[int, Row] = processes.table()
        self.near = kin(self.table)
        self.known: dict[int, _Member | None] = {}
        self.spared: set[int] = set()

    def members(self) -> list[_Member]:
        found = [member for pid in self.table if (member := self.look(pid)) is not None]
        parents = {
            member.identity.pid: self.table[member.identity.pid].ppid
            for member in found
            if member.role == "forkserver"
        }
        # A worker of a forkserver shows the server's command line, and is its child.
        servers = {parent for pid, parent in parents.items() if parent in parents}
        servers = {pid for pid in servers if parents[pid] not in parents}
        return [
            attrs.evolve(member, is_helper=True)
            if member.role == "tracker" or member.identity.pid in servers
            else member
            for member in found
        ]

    def look(self, pid: int) -> _Member | None:
        """What is known of a process. The processes above it are looked at first."""
        path = []
        while pid in self.table and pid not in self.known and pid not in path:
            path.append(pid)
            pid = self.table[pid].ppid
        for pid in reversed(path):
            self.known[pid] = self._look(pid, self.table[pid])
        return self.known.get(path[0] if path else pid)

    def _look(self, pid: int, row: Row) -> _Member | None:
        above = self.known.get(row.ppid)
        if above is not None and above.identity.create_time > row.create_time:
            above = None  # the pid of its parent was used again since
        if row.create_time < self.since or pid in self.near:
            return None
        if self.uid is not None and processes.owner_of(pid) != self.uid:
            return None
        identity = ProcessIdentity(pid, row.create_time)
        environ = processes.raw_environ(pid)
        run_id = processes.value_in(environ, RUN_ID_VARIABLE)
        if run_id == "" or row.ppid in self.spared:
            self.spared.add(pid)  # it opted out, with everything below it
            return None
        run, evidence = self._evidence(pid, identity, run_id)
        if run is None and above is not None:
            run, evidence = above.run, f"child of pid {row.ppid}, which belongs to the run"
        if run is None:
            return None
        if (
            self.live_run_of(pid) is not None
            or led_a_run_itself(pid, run.directory)
            or leads_a_run(pid)  # in a registry that is not ours
        ):
            self.spared.add(pid)
            return None
        cmdline = processes.read_cmdline(pid)
        role = role_of(cmdline)
        is_detached = self._left_session(pid, row, run) or (
            above is not None and above.kind == "detached"
        )
        is_worker = (
            evidence == _FORKED
            or role is not None
            or (above is not None and above.kind == "worker" and above.cmdline == cmdline)
            or (evidence != _STARTED and _is_fork(run.record, cmdline, environ))
        )
        if evidence == _WRITTEN_DOWN and (is_detached or not is_worker):
            if identity in run.members.before:
                # Another program, which the run did not start. It is left alone with its workers.
                self.spared.add(pid)
                return None
            is_detached = True  # it was started without the run's environment on purpose
        kind: _Kind = "worker"
        if is_detached or (run.was_released and not is_worker):
            kind = "detached"
        elif not is_worker:
            kind = "program"
        return _Member(run, identity, cmdline, evidence, kind, role)

    def _evidence(
        self, pid: int, identity: ProcessIdentity, run_id: str | None
    ) -> tuple[RegisteredRun | None, str]:
        if self.held:
            file = processes.has_inherited(pid, self.locked_by, names=self.names)
            if file is not None:
                return self.held[file], _FORKED
        started_in = self.by_id.get(run_id or "")
        written_by = self.written_down.get(identity)
        if written_by is None or (started_in is not None and _is_inside(started_in, written_by)):
            return started_in, _STARTED
        return written_by, _WRITTEN_DOWN

    def _left_session(self, pid: int, row: Row, run: RegisteredRun) -> bool:
        """Whether a process is in another session than its program was."""
        if run.record.session is not None:
            return row.session != run.record.session
        # A record of the version before: was that session started within the run?
        if row.session in (0, pid):
            return row.session == pid
        return row.session not in self.table or self.look(row.session) is not None


def _is_inside(run: RegisteredRun, other: RegisteredRun) -> bool:
    """Whether a run is the inner one of two, so that its id counts. In a run within another one,
    a fork shows the id that its program was started with. Of the runs of one program each writes
    down what the others started.
    """
    if run.record.leader == other.record.leader:
        return True
    return run.record.started_at >= other.record.started_at


def _is_fork(record: RunRecord, cmdline: bytes, environ: bytes | None) -> bool:
    """Whether it shows the command line and the initial environment of the program itself."""
    if clip(processes.split_cmdline(cmdline)) != record.argv:
        return False
    if record.environment is None:
        return True
    return environment_digest(environ, record.run_id) == record.environment
