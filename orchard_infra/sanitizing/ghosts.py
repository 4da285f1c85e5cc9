"""Ghosts: processes of earlier runs, found by proof and stopped by proof.

A process that looks like this run may be a stranger's three-day job. So there is a short list of
what counts as evidence, each with its own default:

===========  ==========================================================  =====================
evidence     what it is                                                  when killing is allowed
===========  ==========================================================  =====================
survivor     belongs to a dead run (see `orchard_infra.membership`)      stopped
leftover     was started inside this run's block and outlives it         stopped
twin         same user, program, arguments, directory and devices,       stopped
             in no live run, older than this run
relative     same program, and anything else differs                     spared, with a warning
defunct      dead and not reaped                                         named with its parent
===========  ==========================================================  =====================

Nothing outweighs the registry: a process of a live or waiting run is spared whatever it looks
like. Where killing is not allowed the same processes are reported, and left alone.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal, Protocol

import attrs

from orchard_infra.runs.membership import (
    Membership,
    command_of,
    has_led_a_run,
    is_ours,
    kin,
    orphans_of,
    own_pids,
)
from orchard_infra.runs.record import RUN_ID_VARIABLE, RunRecord, RunState, Survivor
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.sanitizing.programs import Program, might_be_python, parse_command, resolve
from orchard_infra.system import processes
from orchard_infra.system.killing import stop_processes
from orchard_infra.system.processes import ProcessIdentity
from orchard_infra.system.text import printable

# What decides which device a program sees. CUDA, ROCm, Intel, Ascend, containers of NVIDIA's.
_DEVICE_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "ASCEND_RT_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
)
# Helpers of the multiprocessing module. They end with the process that they serve, and stopping
# them first makes it complain of leaked semaphores.
_MULTIPROCESSING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
_LOOKS = 5  # at what processes have started while others were stopped


_LEFT_WELL = "its run ended well, and the program goes on"


@attrs.frozen
class Finding:
    """One process: which evidence there is against it, and why it was or was not stopped.

    ``parent`` is the pid of the process that should reap a defunct one.
    """

    pid: int
    create_time: float
    command: str
    evidence: str
    reason: str = ""
    parent: int | None = None

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.create_time)

    def describe(self) -> str:
        """One line, safe for a terminal."""
        reason = f", {self.reason}" if self.reason else ""
        return printable(f"pid {self.pid} ({self.evidence}{reason}): {self.command}")


@attrs.frozen
class SanitizeReport:
    """What became of the processes that were looked at.

    ``stopped`` left when asked, ``killed`` had to be; ``denied`` could not be signalled, or did
    not go even then (uninterruptible sleep).
    """

    stopped: tuple[Finding, ...] = ()
    killed: tuple[Finding, ...] = ()
    spared: tuple[Finding, ...] = ()
    defunct: tuple[Finding, ...] = ()
    denied: tuple[Finding, ...] = ()

    def __add__(self, other: SanitizeReport) -> SanitizeReport:
        return SanitizeReport(
            *(getattr(self, name) + getattr(other, name) for name in attrs.fields_dict(type(self)))
        )


@attrs.frozen
class Scene:
    """All that a sanitizer is told: whose run it is, who else is on record, what it may do.

    ``why_not`` says why nothing may be stopped; None when it may be. ``began`` is when the run
    did, on the clock of `ProcessIdentity`; ``before`` are the descendants it had by then. ``argv``
    is what the run executes, where that is a command and not this very process.
    """

    record: RunRecord
    registry: RunRegistry
    why_not: str | None
    logger: logging.Logger
    began: float
    before: frozenset[ProcessIdentity] = frozenset()
    argv: tuple[str, ...] | None = None


class Sanitizer(Protocol):
    """Deals with processes of earlier runs, and of this one when it ends."""

    def sanitize(self, scene: Scene) -> SanitizeReport:
        """Called under the lock, before the run begins."""
        ...

    def stop_survivors(self, dead: RunRecord, scene: Scene) -> tuple[Survivor, ...]:
        """Called when a dead run's processes hold the lock; returns those that still live."""
        ...

    def stop_leftovers(self, scene: Scene) -> SanitizeReport:
        """Called when the run ends: what was started inside the block and still lives."""
        ...


@attrs.frozen
class GhostSanitizer:
    """Stops ghosts on proof.

    ``match="script"`` takes relatives for ghosts, too: a sweep that has not registered yet looks
    just like one, so that is for machines that run one script at a time. ``grace`` is how long,
    in seconds, all of them together have between SIGTERM and SIGKILL. ``dry_run`` reports
    without a signal. ``spare(pid)`` excludes a process. ``patience``, in seconds, is how long to
    wait for survivors that may not be stopped: idle DataLoader workers leave within five.
    """

    match: Literal["command", "script"] = attrs.field(
        default="command", validator=attrs.validators.in_(("command", "script"))
    )
    grace: float = attrs.field(default=5.0, validator=attrs.validators.ge(0))
    dry_run: bool = False
    spare: Callable[[int], bool] | None = attrs.field(default=None, kw_only=True)
    patience: float = attrs.field(default=6.0, kw_only=True, validator=attrs.validators.ge(0))

    def sanitize(self, scene: Scene) -> SanitizeReport:
        """See `Sanitizer.sanitize`: survivors of this project's dead runs, then look-alikes."""

        def survivors() -> list[Finding]:
            runs = scene.registry.runs()
            dead = [run for run in runs if not run.is_live and run.record.lock == scene.record.lock]
            return _as_ghosts(survivor for _, survivor in Membership(runs).survivors(dead))

        report, known = self._stop_again(survivors, scene)
        members = Membership(scene.registry.runs())
        suspects = [f for f in self.look_alikes(scene, members) if f.identity not in known]
        guilty = [finding for finding in suspects if finding.evidence == "twin"]
        if self.match == "script":
            guilty += [finding for finding in suspects if finding.evidence == "relative"]
        guilty, cleared = self._settle(guilty, scene)
        spared = cleared + [f for f in suspects if f not in guilty and f.evidence != "defunct"]
        spared = list({finding.pid: finding for finding in spared}.values())
        report += self._stop(guilty, scene)
        report += SanitizeReport(
            spared=tuple(spared), defunct=tuple(f for f in suspects if f.evidence == "defunct")
        )
        _log(report, scene.logger)
        return report

    def look_alikes(self, scene: Scene, members: Membership) -> list[Finding]:
        """Twins, relatives and defunct processes, with the reason for each. Only looks."""
        me = _Look.at_myself() if scene.argv is None else _Look.at(os.getpid(), scene.argv)
        return [] if me is None else self._look_around(me, members, scene.registry)

    def look_alikes_of(
        self,
        run: RegisteredRun,
        members: Membership,
        registry: RunRegistry,
        argv: Sequence[str] | None = None,
    ) -> list[Finding]:
        """Look-alikes of a run's program, seen from outside. Only looks.

        ``argv`` is what the run executes, where that is not what its record says. A dead run has
        left less to compare: in doubt a process is its relative.
        """
        me = _Look.at_run(run.record, run.record.argv if argv is None else argv)
        if me is None:
            return []
        # So long this program needs, from its start, to register.
        started = time.time() - _age(run.record.leader)
        settled = min(max(2.0, 2 * (run.record.started_at - started)), 60.0)
        found = []
        for finding in self._look_around(me, members, registry):
            if finding.evidence == "twin" and _age(finding.identity) < settled:
                finding = attrs.evolve(
                    finding, evidence="look-alike", reason="so young that it may register yet"
                )
            elif finding.evidence == "twin" and not run.is_live:
                # Its devices are not on record: a process that chose some is no twin of it.
                reason = "same program, arguments and directory, and older than the dead run"
                finding = attrs.evolve(finding, reason=reason)
            # That one live run looks like another one, or like itself, is nothing to tell.
            if not run.is_live or members.live_run_of(finding.pid) is None:
                found.append(finding)
        return found

    def stop(self, ghosts: Sequence[Finding], scene: Scene) -> SanitizeReport:
        """Stop what was found, trees included, unless the scene forbids it. What belongs to a live
        run by now is spared.
        """
        return self._stop(list(ghosts), scene)

    def _look_around(self, me: _Look, members: Membership, registry: RunRegistry) -> list[Finding]:
        kindred = functools.cache(kin)  # mostly there is nobody to compare it with
        found = []
        for pid in own_pids():
            if pid == me.pid:
                continue
            cmdline = processes.read_cmdline(pid)
            if not cmdline:
                finding = _defunct(pid, me)
            elif might_be_python(cmdline):
                finding = self._judge(pid, cmdline, me, members, registry)
            else:
                continue
            if finding is not None and finding.pid not in kindred():
                found.append(finding)
        return found

    def _judge(
        self, pid: int, cmdline: bytes, me: _Look, members: Membership, registry: RunRegistry
    ) -> Finding | None:
        argv = processes.split_cmdline(cmdline)
        other = _Look.at(pid, argv) if me.may_be_run_by(pid, argv) else None
        if other is None or other.program is None or me.program is None:
            return None
        if (other.program.kind, other.program.target) != (me.program.kind, me.program.target):
            return None
        if not is_ours(pid):
            return None

        def finding(evidence: str, reason: str) -> Finding:
            return Finding(pid, other.create_time, command_of(pid), evidence, reason)

        run = members.live_run_of(pid)
        if run is not None:
            state = f"{run.state.value} run of project {run.record.project}"
            return finding("look-alike", f"belongs to a {state} (pid {run.record.pid})")
        if has_led_a_run(pid, registry):
            return finding("look-alike", _LEFT_WELL)
        if self.spare is not None and self.spare(pid):
            return finding("look-alike", "excluded by the caller")
        difference = other.difference(me)
        if difference:
            return finding("relative", difference)
        if other.create_time > me.create_time:
            return finding("look-alike", "started after this run: no ghost, it may register yet")
        return finding("twin", "same program, arguments, directory and devices")

    def _settle(self, guilty: list[Finding], scene: Scene) -> tuple[list[Finding], list[Finding]]:
        """Give young suspects the time to register: two runs that start together must not shoot
        each other. They need about as long as this process needed to come here.
        """
        if scene.why_not is not None or self.dry_run or not guilty:
            return guilty, []
        began = time.monotonic()
        own_age = _age(scene.record.leader)
        settled = min(max(2.0, 2 * own_age), 10.0)
        cleared: dict[int, Finding] = {}
        while True:
            members = Membership(scene.registry.runs())
            for finding in guilty:
                run = members.live_run_of(finding.pid)
                if run is not None:
                    reason = f"belongs to a {run.state.value} run of {run.record.project}"
                elif has_led_a_run(finding.pid, scene.registry):
                    reason = _LEFT_WELL  # it registered, ran and left meanwhile
                else:
                    reason = ""
                if reason:
                    cleared[finding.pid] = attrs.evolve(
                        finding, evidence="look-alike", reason=reason
                    )
            left = [f for f in guilty if f.pid not in cleared and processes.is_alive(f.identity)]
            young = [f for f in left if _age(f.identity) < settled]
            if not young or time.monotonic() - began > settled:
                return left, list(cleared.values())
            time.sleep(0.05)

    def stop_survivors(self, dead: RunRecord, scene: Scene) -> tuple[Survivor, ...]:
        """See `Sanitizer.stop_survivors`. Those that leave by themselves are waited for."""
        run = scene.registry.find(dead.run_id) or RegisteredRun(dead, RunState.DEAD)
        may_stop = scene.why_not is None and not self.dry_run
        deadline = time.monotonic() + min(self.patience, 0.5 if may_stop else self.patience)

        def survivors() -> tuple[Survivor, ...]:
            members = Membership(scene.registry.runs())
            return tuple(survivor for _, survivor in members.survivors([run]))

        while left := survivors():
            while any(processes.is_alive(survivor.identity) for survivor in left):
                if time.monotonic() >= deadline:
                    if not may_stop:
                        return left
                    report, _ = self._stop_again(lambda: _as_ghosts(survivors()), scene)
                    _log(report, scene.logger)
                    return survivors()
                time.sleep(0.02)
        return ()

    def stop_leftovers(self, scene: Scene) -> SanitizeReport:
        """See `Sanitizer.stop_leftovers`. Daemons that opted out are spared, and so are
        processes of other live runs, even if they were started in here.
        """
        spared: dict[ProcessIdentity, Finding] = {}
        ended: set[int] = set()

        def leftovers() -> list[Finding]:
            # Who ends during a look may just have made others, which that look did not see.
            while True:
                children = processes.children_of(os.getpid())
                ghosts, others = self._leftovers(scene)
                spared.update((finding.identity, finding) for finding in others)
                news = {pid for pid in children - ended if not processes.is_running(pid)}
                if ghosts or not news:
                    return ghosts
                ended.update(news)

        report, _ = self._stop_again(leftovers, scene, spared)
        _log(report, scene.logger)
        return report + SanitizeReport(spared=tuple(spared.values()))

    def _leftovers(self, scene: Scene) -> tuple[list[Finding], list[Finding]]:
        """What was started inside the block: what is to be stopped of it, and what is not."""
        own = scene.registry.find(scene.record.run_id)
        me = os.getpid()
        above = {me, *processes.ancestors(me)}
        parents = processes.parents()
        found = {
            identity
            for identity in processes.below([me], parents).values()
            if identity not in scene.before and identity.create_time >= scene.began
        }
        started = [pid for pid, (_, create_time) in parents.items() if create_time >= scene.began]
        found.update(orphans_of(own, scene.record.run_id, started))
        ghosts, spared = [], []
        runs = scene.registry.runs()
        others = Membership(tuple(r for r in runs if r.record.leader != scene.record.leader))
        # With two environments in one process, only the id tells whose child it is.
        shares_process = any(
            r.is_live and r.record.leader == scene.record.leader and r != own for r in runs
        )
        for identity in sorted(found):
            pid = identity.pid
            if pid in above or not is_ours(pid) or _serves_multiprocessing(pid):
                continue
            leftover = Finding(pid, identity.create_time, command_of(pid), "leftover")
            run = others.live_run_of(pid)
            environ = processes.read_environ(pid) or {}
            if run is not None:
                reason = f"leads or belongs to a live run of {run.record.project}"
            elif _opted_out(pid):
                reason = f"opted out with an empty {RUN_ID_VARIABLE}"
            elif shares_process and environ.get(RUN_ID_VARIABLE) != scene.record.run_id:
                reason = "may belong to another run of this process"
            elif self.spare is not None and self.spare(pid):
                reason = "excluded by the caller"
            else:
                ghosts.append(leftover)
                continue
            spared.append(attrs.evolve(leftover, reason=reason))
        return ghosts, spared

    def _stop_again(
        self,
        look: Callable[[], list[Finding]],
        scene: Scene,
        also_spare: Collection[ProcessIdentity] = (),
    ) -> tuple[SanitizeReport, set[ProcessIdentity]]:
        """Stop what is found until nothing new is: the report, and all that was found.

        A child that was started just before its parent ended was in no tree that was looked at.
        """
        report = SanitizeReport()
        known: set[ProcessIdentity] = set()
        for _ in range(_LOOKS):
            ghosts = [finding for finding in look() if finding.identity not in known]
            if not ghosts:
                break
            known.update(finding.identity for finding in ghosts)
            report += self._stop(ghosts, scene, also_spare={who.pid for who in also_spare})
            if self.dry_run or scene.why_not is not None:
                break
        return report, known

    def _stop(
        self, ghosts: list[Finding], scene: Scene, also_spare: Iterable[int] = ()
    ) -> SanitizeReport:
        """Stop them with their trees, or say why not."""
        why_not = "dry run" if self.dry_run else scene.why_not
        if why_not is not None or not ghosts:
            reason = f"not stopped: {why_not}"
            return SanitizeReport(spared=tuple(attrs.evolve(g, reason=reason) for g in ghosts))
        members = Membership(
            tuple(run for run in scene.registry.runs() if run.record.leader != scene.record.leader)
        )
        me = os.getpid()
        untouchable = {me, *processes.ancestors(me), *also_spare}

        def spare(pid: int) -> bool:
            return (
                pid in untouchable
                or not is_ours(pid)
                or members.live_run_of(pid) is not None
                or _opted_out(pid)  # also below a process that is stopped
                or (self.spare is not None and self.spare(pid))
            )

        outcome = stop_processes([g.identity for g in ghosts], grace=self.grace, spare=spare)
        named = {ghost.identity: ghost for ghost in ghosts}

        def findings(identities: Iterable[ProcessIdentity], reason: str = "") -> Iterator[Finding]:
            for identity in identities:
                ghost = named.get(identity) or Finding(
                    identity.pid, identity.create_time, "", "part of a stopped tree"
                )
                yield attrs.evolve(ghost, reason=reason or ghost.reason)

        return SanitizeReport(
            stopped=tuple(findings(outcome.stopped)),
            killed=tuple(findings(outcome.killed)),
            denied=(
                *findings(outcome.denied, "may not be signalled"),
                *findings(outcome.stuck, "does not end: uninterruptible sleep"),
            ),
        )


@attrs.frozen
class _Look:
    """What is compared when two processes may be twins."""

    pid: int
    create_time: float
    program: Program | None
    cwd: str | None
    relative: bool  # the script was named relative to some directory
    environ: dict[str, str]
    unsure: str = ""  # what is not known of this process, so that it has no twins

    @classmethod
    def at(cls, pid: int, argv: Sequence[str]) -> _Look | None:
        stat = processes.read_stat(pid)
        typed = parse_command(argv)
        if stat is None or typed is None:
            return None
        cwd = processes.read_cwd(pid)
        return cls(
            pid=pid,
            create_time=stat.create_time,
            program=resolve(typed, cwd),
            cwd=cwd,
            relative=typed.kind == "script" and not os.path.isabs(typed.target),
            environ=processes.read_environ(pid) or {},
        )

    @classmethod
    def at_myself(cls) -> _Look | None:
        """What this process runs; None where that is nothing that others may run, too."""
        me = cls.at(os.getpid(), sys.orig_argv)
        if me is None or me.program is None:
            return None
        # After a chdir a relative script resolves to somebody else's; only this process knows
        # for itself what it really runs.
        ran = getattr(sys.modules.get("__main__"), "__file__", None)
        if me.relative and ran is not None and os.path.realpath(ran) != me.program.target:
            return None
        return me

    @classmethod
    def at_run(cls, record: RunRecord, argv: Sequence[str]) -> _Look | None:
        """What a run on record executes, as far as that is certain."""
        typed = parse_command(argv)
        if typed is None or not record.is_local:
            return None
        if processes.is_alive(record.leader):
            look = cls.at(record.pid, argv)
            if look is None or look.create_time != record.create_time:
                return None
            return None if look.relative and not look.has_not_moved() else look
        absolute = typed.kind == "script" and os.path.isabs(typed.target)
        return cls(
            pid=record.pid,
            create_time=record.create_time,
            program=resolve(typed, record.cwd),
            cwd=record.cwd,
            relative=not absolute,
            environ={},
            unsure="" if absolute else "nobody knows in which directory the dead run was started",
        )

    def may_be_run_by(self, pid: int, argv: Sequence[str]) -> bool:
        """A first look by one stat(2): the same module, or a path that leads to the same file."""
        typed = parse_command(argv)
        if typed is None or self.program is None or typed.kind != self.program.kind:
            return False
        if typed.kind == "module":
            return typed.target == self.program.target
        return _file_at(pid, typed.target) == _file_at(self.pid, self.program.target)

    def has_not_moved(self) -> bool:
        """Whether it still is in the directory that it was started in."""
        started_in = self.environ.get("PWD")
        return started_in is not None and os.path.realpath(started_in) == self.cwd

    def difference(self, me: _Look) -> str:
        """Why this is no twin of mine; empty when it is one."""
        if self.program is None or me.program is None or self.cwd is None:
            return "cannot be read whole"
        if self.program.arguments != me.program.arguments:
            return "other arguments"
        if self.cwd != me.cwd:
            return "other working directory"
        # It, too, may have changed its directory since: then "train.py" was another file.
        same_start = self.environ.get("PWD") == me.environ.get("PWD")
        if self.relative and not self.has_not_moved() and not same_start:
            return "started in another directory"
        if any(self.environ.get(name) != me.environ.get(name) for name in _DEVICE_VARIABLES):
            return "other visible devices"
        return me.unsure


def _as_ghosts(survivors: Iterable[Survivor]) -> list[Finding]:
    return [Finding(s.pid, s.create_time, s.command, "survivor", s.evidence) for s in survivors]


def _file_at(pid: int, path: str) -> tuple[int, int] | None:
    """The file, by device and inode, to which a path leads for a process; None for none."""
    try:
        if not os.path.isabs(path):
            path = os.path.join(processes.read_cwd(pid) or "/nowhere", path)
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _defunct(pid: int, me: _Look) -> Finding | None:
    stat = processes.read_stat(pid)
    if stat is None or not processes.is_defunct(stat):
        return None
    mine = processes.read_stat(me.pid)
    if mine is None or stat.name != mine.name:
        return None
    return Finding(
        pid,
        stat.create_time,
        f"[{stat.name}]",
        "defunct",
        f"to be reaped by pid {stat.ppid}: {command_of(stat.ppid)}",
        parent=stat.ppid,
    )


def _opted_out(pid: int) -> bool:
    """Whether it was started with an empty run id: a daemon that is to outlive the run."""
    return (processes.read_environ(pid) or {}).get(RUN_ID_VARIABLE) == ""


def _serves_multiprocessing(pid: int) -> bool:
    command = command_of(pid)
    return any(name in command for name in _MULTIPROCESSING)


def _age(identity: ProcessIdentity) -> float:
    """How long a process has lived, in seconds."""
    return processes.now() - identity.create_time


def _log(report: SanitizeReport, logger: logging.Logger) -> None:
    for outcome, level in (
        ("stopped", logging.WARNING),
        ("killed", logging.WARNING),
        ("denied", logging.WARNING),
        ("spared", logging.WARNING),
        ("defunct", logging.INFO),
    ):
        for finding in getattr(report, outcome):
            quiet = finding.evidence == "look-alike"
            logger.log(
                logging.DEBUG if quiet else level,
                "%s process: %s",
                outcome,
                finding.describe(),
                extra={"finding": finding},
            )
