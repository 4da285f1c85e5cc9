"""Which processes belong to which run: the proof that is needed before anything is stopped.

A process belongs to a run when it leads the run, was started with the run's id in its environment,
holds the run's own record file open (as forked children do), was written down by the run, or is
below such a process.

The lock file proves nothing: a process that waits for the lock has it open, too. An open record
file protects a process, but does not prove that it is a survivor: a reader of the registry has it
open for a moment. A survivor has inherited the open file description that the leader locked.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from typing import Protocol

import attrs

from orchard_infra.runs.record import RUN_ID_VARIABLE, RunRecord, Survivor, is_run_id
from orchard_infra.runs.registered import SUFFIX, RegisteredRun
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity, Row

_File = tuple[int, int]  # device and inode


@attrs.frozen(eq=False, repr=False)
class _Evidence:
    """The evidence for membership of some runs, in tables to look processes up in."""

    ids: dict[str, RegisteredRun]
    leaders: dict[ProcessIdentity, RegisteredRun]
    files: dict[_File, RegisteredRun]
    names: dict[_File, str]  # the inode of a file that is gone may be another's by now
    written_down: dict[ProcessIdentity, RegisteredRun]

    @classmethod
    def of(cls, runs: Iterable[RegisteredRun]) -> _Evidence:
        found = cls({}, {}, {}, {}, {})
        for run in runs:
            found.ids.update(dict.fromkeys(run.run_ids, run))
            found.files.update(dict.fromkeys(run.files, run))
            found.names.update(run.files)
            if run.record.is_local:
                found.written_down.update(dict.fromkeys(run.members.processes, run))
                if run.is_live or run.record.leader not in found.leaders:
                    found.leaders[run.record.leader] = run
        return found


@attrs.frozen(eq=False, repr=False)
class Membership:
    """What the registry says, applied to processes. One is made for each look at the machine."""

    runs: tuple[RegisteredRun, ...]

    def live_run_of(self, pid: int) -> RegisteredRun | None:
        """The run that a process belongs to, if that is live, or has ended and its program lives:
        such a process is never touched.

        Its ancestors are asked as well: a child with a cleaned environment still belongs.
        """
        evidence = self._evidence
        if not evidence.ids:
            return None
        for member in (pid, *processes.ancestors(pid)):
            identity = processes.identity_of(member)
            if identity is None:
                continue
            if identity in evidence.leaders:
                return evidence.leaders[identity]
            run_id = processes.started_with(member, RUN_ID_VARIABLE, evidence.ids)
            if run_id is not None:
                return evidence.ids[run_id]
            if identity in evidence.written_down:
                return evidence.written_down[identity]
            file = processes.has_open(member, evidence.files.keys(), names=evidence.names)
            if file is not None:
                return evidence.files[file]
        return None

    @functools.cached_property  # asked for once for each suspect, of which a sweep has many
    def _evidence(self) -> _Evidence:
        return _Evidence.of(run for run in self.runs if not run.is_over)

    def survivors(self, dead: Iterable[RegisteredRun]) -> Iterator[tuple[RegisteredRun, Survivor]]:
        """The live processes of runs whose program is dead, with what proves it and what kind of
        process it is; helpers of others come last. See `orchard_infra.runs.survivors`.
        """
        dead = list(dead)
        if not dead:
            return iter(())
        from orchard_infra.runs.survivors import find_survivors

        return find_survivors(dead, self.live_run_of)


class _Registry(Protocol):
    def directory_file(self) -> _File | None: ...


def has_led_a_run(pid: int, registry: _Registry) -> bool:
    """Whether a process, or one above it, led a run that was released, and goes on since.

    It keeps the registry's directory open. That it looks like another run is no reason to take it
    for a ghost: it is writing its results.
    """
    file = registry.directory_file()
    if file is None:
        return False
    files = frozenset([file])
    return any(processes.has_open(process, files) for process in (pid, *processes.ancestors(pid)))


def led_a_run_itself(pid: int, directory: _File | None) -> bool:
    """Whether a process led a run that was released, and goes on since: it may be writing its
    results. It has locked the registry's ``directory``. Its forks have that open as well, but took
    no lock: they are not spared with it.
    """
    return directory is not None and processes.has_locked(pid, directory)


def has_a_record_open(pid: int) -> bool:
    """Whether a process has a run's record open, be it in a registry that somebody has removed."""
    return any(map(_is_record, processes.names_of_open(pid)))


def _is_record(name: str) -> bool:
    return name.endswith(SUFFIX) and is_run_id(name.removesuffix(SUFFIX))


def leads_a_run(pid: int) -> bool:
    """Whether a process leads a run now, be it in a registry that is not ours: it has locked the
    record itself. A fork of a leader has that open as well, but took no lock.
    """
    return any(_is_record(name) for name in processes.names_of_locked(pid))


def kin(table: Mapping[int, Row] | None = None) -> set[int]:
    """This process, its ancestors, its descendants, and those of the process it was forked from.

    The workers of one pool show the same command line, and are no twins of each other. ``table``
    is that of `processes.table`, if there is one already.
    """
    above, root = _above()
    parents = processes.parents() if table is None else table
    return {os.getpid(), *above, *processes.below([root], parents)}


def is_kin(pid: int) -> bool:
    """Whether a process is in `kin`, without a scan: for a few of them."""
    above, root = _above()
    return pid in above or root in (pid, *processes.ancestors(pid))


def _above() -> tuple[list[int], int]:
    """The ancestors of this process, and the oldest process that it may be a fork of."""
    root = os.getpid()
    cmdline = processes.read_cmdline(root)
    above = list(processes.ancestors(root))
    for pid in above:
        if processes.read_cmdline(pid) != cmdline:
            break
        root = pid
    return above, root


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


def children_left(
    run: RegisteredRun | RunRecord, known: Container[int] = ()
) -> list[ProcessIdentity]:
    """The live processes that a live run has started: below its leader, or orphans by now.

    Those that the leader had when it registered do not count. Orphans are not looked for among
    the pids in ``known``, those that were there before: on a large machine that saves most of the
    time. A process may be missed while another one exits.
    """
    record = run if isinstance(run, RunRecord) else run.record
    before: Collection[ProcessIdentity] = ()
    if not isinstance(run, RunRecord):
        before = run.members.before
    below = processes.tree(record.pid)
    found = [identity for identity in below.values() if identity not in before]
    others = (
        pid for pid in own_pids() if pid not in known and pid not in below and pid != record.pid
    )
    file = None if isinstance(run, RunRecord) else run
    return sorted({*found, *orphans_of(file, record.run_id, others)})


def orphans_of(
    run: RegisteredRun | None, run_id: str, pids: Iterable[int] | None = None
) -> Iterator[ProcessIdentity]:
    """Processes of a live run of our own that are not below it any more: double forks, setsid.

    ``pids`` are those to look at, if it is known which processes started after the run.

    Those started by exec carry its id. The others are forks of this very process, and so show
    its own initial environment, or none where their title was rewritten: only they are asked
    which files they have open.
    """
    own = processes.raw_environ(os.getpid())
    files = {run.file: run.record.pid} if run else {}
    for pid in own_pids() if pids is None else pids:
        identity = processes.identity_of(pid)
        if identity is None:
            continue
        environ = processes.raw_environ(pid)
        if environ is None:
            continue
        belongs = processes.value_in(environ, RUN_ID_VARIABLE) == run_id
        if not belongs and files and (environ == own or not environ.strip(b"\0")):
            belongs = processes.has_inherited(pid, files) is not None
        # It is still the process whose identity was read first, so the evidence is about it.
        if belongs and processes.is_alive(identity):
            yield identity
