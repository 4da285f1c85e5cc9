"""Ghosts: processes of earlier runs, found by proof and stopped by proof.

A process that looks like this run may be a stranger's three-day job. So there is a short list of
what counts as evidence, each with its own default:

==================  =====================================================  =====================
evidence            what it is                                             if killing is allowed
==================  =====================================================  =====================
survivor: worker    a fork or a multiprocessing worker of a dead program   stopped
survivor: program   another program that a crashed run started, in the     stopped
                    session of that run
survivor: detached  it has a session of its own, or its run ended well     reported; stopped if it
                                                                           holds an accelerator
twin                same user, program, arguments, directory and           stopped
                    environment, in no live run, older than this run
relative            same program, other arguments, environment or input    reported
defunct             dead and not reaped                                    reported, with the
                                                                           parent that should reap
==================  =====================================================  =====================

Nothing outweighs the registry: a process of a live or waiting run is spared whatever it looks
like. Where killing is not allowed, the same processes are reported and left alone. What this run
started itself is another matter, see `orchard_infra.sanitizing.leftovers`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import attrs

from orchard_infra.environment import Environment
from orchard_infra.launch import is_other_element, is_same_job, launcher_of, scheduler_job
from orchard_infra.report import Finding, SanitizeReport
from orchard_infra.runs.membership import (
    Membership,
    command_of,
    has_a_record_open,
    has_led_a_run,
    is_kin,
    is_ours,
    kin,
    leads_a_run,
    led_a_run_itself,
)
from orchard_infra.runs.record import RUN_ID_VARIABLE, RunRecord, RunState, Survivor
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.sanitizing import exiting
from orchard_infra.sanitizing.helpers import is_forkserver, is_tracker
from orchard_infra.sanitizing.leftovers import Block
from orchard_infra.sanitizing.twins import Look, Progress, Scan
from orchard_infra.system import pool_locks, processes
from orchard_infra.system.masking import interruptible
from orchard_infra.system.processes import ProcessIdentity

_FEW = 20
_ENOUGH = 1.0  # seconds of the processor to register: the first to start compiles the modules
_PATIENT = 10.0  # seconds, at most, that a young process has to register
_LOOKS = 5  # at what processes have started while others were stopped
_TRACKERS = 1.0  # seconds that resource trackers have to clean up and end
_LEFT_WELL = "its run ended well, and the program goes on"
_DETACHED = "has a session of its own, or its run ended well"


@attrs.frozen
class GhostSanitizer:
    """Stops ghosts of earlier runs on proof, and reports what a run leaves to its program.

    ``match="script"`` takes relatives for ghosts, too: a sweep that has not registered yet looks
    just like one, so that is for machines that run one script at a time. ``grace`` is how long,
    in seconds, all of them together have between SIGTERM and SIGKILL. ``dry_run`` reports
    without a signal. ``spare(pid)`` excludes a process. ``patience``, in seconds, is how long to
    wait for survivors that may not be stopped: idle DataLoader workers leave within five.

    ``leftovers="stop"`` is for batch programs that end with their block: what the block started
    is stopped at its end, if the configuration allows killing. By default it goes on, because the
    program does: a pool is used again, a tracker still uploads.
    """

    match: Literal["command", "script"] = attrs.field(
        default="command", validator=attrs.validators.in_(("command", "script"))
    )
    grace: float = attrs.field(default=5.0, validator=attrs.validators.ge(0))
    dry_run: bool = False
    spare: Callable[[int], bool] | None = attrs.field(default=None, kw_only=True)
    patience: float = attrs.field(default=6.0, kw_only=True, validator=attrs.validators.ge(0))
    leftovers: Literal["report", "stop"] = attrs.field(
        default="report", kw_only=True, validator=attrs.validators.in_(("report", "stop"))
    )

    @contextlib.contextmanager
    def around(self, env: Environment) -> Iterator[None]:
        """See `orchard_infra.environment.Strategy`."""
        if self.leftovers == "stop":  # loaded now: at the end there may be no descriptor left
            import orchard_infra.system.killing  # noqa: F401
        if env.is_leader:
            with interruptible():  # it may take the whole grace period
                self.sanitize(env)
        # A program may end without leaving its block, and Python wait for its children before that.
        env.meanwhile(functools.partial(exiting.let_exit_now, self._grace_at_exit(env)))
        env.before_release(functools.partial(self._look_back, env, Block.begin()))
        yield

    # Processes of earlier runs.

    def sanitize(self, env: Environment) -> None:
        """Stop survivors of this project's dead runs, then look-alikes, as far as allowed. What
        became of them is in ``env.report.sanitized``.
        """

        def survivors() -> list[tuple[RegisteredRun, Survivor]]:
            runs = env.registry.runs()
            dead = [run for run in runs if run.is_over and _is_same_project(run, env.run)]
            return list(Membership(runs).survivors(dead))

        report, known = self._stop_survivors(survivors, env)
        me = Look.at_myself() if env.command is None else Look.at(os.getpid(), env.command)
        if me is not None:
            report += self._stop_look_alikes(me, known, env)
        env.report.sanitized += report
        _log(report, env.logger)

    def clear_dead(self, dead: RunRecord, env: Environment) -> Sequence[Survivor]:
        """Stop what holds the lock of a dead run, where that is allowed; returns what is left.

        Processes that end by themselves are waited for. A fork that has started a session of its
        own is stopped here if it has the lock open: no run of the project would ever start again.
        """
        run = env.registry.find(dead.run_id) or RegisteredRun(dead, RunState.DEAD)
        may_stop = not self.dry_run and (
            env.reason_not_to_kill is None
            or _own_job(env) is not None
            or _is_of_own_job(run.record, env)
        )
        deadline = time.monotonic() + min(self.patience, 0.5 if may_stop else self.patience)

        def survivors() -> list[tuple[RegisteredRun, Survivor]]:
            return list(Membership(env.registry.runs()).survivors([run]))

        while found := survivors():
            while any(processes.is_alive(survivor.identity) for _, survivor in found):
                if time.monotonic() >= deadline:
                    if may_stop:
                        report, _ = self._stop_survivors(survivors, env, env.lock_path)
                        env.report.sanitized += report
                        _log(report, env.logger)
                        found = survivors()
                    return tuple(survivor for _, survivor in found)
                time.sleep(0.02)
        return ()

    def look_alikes_of(
        self, run: RegisteredRun, members: Membership, registry: RunRegistry
    ) -> list[Finding]:
        """Look-alikes of a run's program, seen from outside. Only looks.

        A dead run has left less to compare: in doubt a process is its relative.
        """
        me = Look.at_run(run.record)
        if me is None:
            return []
        # The time that this program needs from its start until it registers.
        started = time.time() - _age(run.record.leader)
        settled = min(max(2.0, 2 * (run.record.started_at - started)), 60.0)
        found = []
        for finding in self._look_around(me, members, registry):
            if finding.evidence == "twin" and _age(finding.identity) < settled:
                finding = attrs.evolve(
                    finding, evidence="look-alike", reason="so young that it may register yet"
                )
            # That one live run looks like another one, or like itself, is nothing to tell.
            if not run.is_live or members.live_run_of(finding.pid) is None:
                found.append(finding)
        return found

    def stop(
        self,
        ghosts: Sequence[Finding],
        registry: RunRegistry,
        *,
        reason_not_to_kill: str | None = None,
        also_spare: Iterable[ProcessIdentity] = (),
    ) -> SanitizeReport:
        """Stop processes that were found, with their trees. A process that belongs to a live run by
        now is spared.
        """
        if self.dry_run:
            reason_not_to_kill = "dry run"
        if reason_not_to_kill is not None or not ghosts:
            reason = f"not stopped: {reason_not_to_kill}"
            return SanitizeReport(spared=tuple(attrs.evolve(g, reason=reason) for g in ghosts))
        from orchard_infra.system.killing import stop_processes  # a run mostly finds no ghost

        outcome = stop_processes(
            [ghost.identity for ghost in ghosts],
            grace=self.grace,
            spare=self._spared(ghosts, registry, also_spare),
            last=is_forkserver,
        )
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

    def _spared(
        self,
        ghosts: Sequence[Finding],
        registry: RunRegistry,
        also_spare: Iterable[ProcessIdentity],
    ) -> Callable[[int], bool]:
        """Which processes in the trees of these ghosts are left alone, with all below them."""
        me = os.getpid()
        untouchable = {me, *processes.ancestors(me), *(who.pid for who in also_spare)}
        leader = processes.identity_of(me)
        members = Membership(tuple(run for run in registry.runs() if run.record.leader != leader))
        targets = {ghost.pid for ghost in ghosts}
        sessions = {processes.session_of(pid) for pid in targets}
        directory = registry.directory_file()

        def spare(pid: int) -> bool:
            return (
                pid in untouchable
                or not is_ours(pid)
                or members.live_run_of(pid) is not None
                or bool(self._excluded(pid))
                or is_tracker(pid)
                # A daemon or a terminal multiplexer below: others may use it.
                or (
                    pid not in targets
                    and (
                        processes.session_of(pid) not in sessions
                        or led_a_run_itself(pid, directory)
                    )
                )
                or leads_a_run(pid)  # in a registry that is not ours
            )

        return spare

    def _excluded(self, pid: int) -> str:
        """Why a process is not to be stopped, by its own wish or the caller's."""
        if processes.started_with(pid, RUN_ID_VARIABLE, ("",)) is not None:
            return f"opted out with an empty {RUN_ID_VARIABLE}"
        if self.spare is not None and self.spare(pid):
            return "excluded by the caller"
        return ""

    def _stop_survivors(
        self,
        look: Callable[[], list[tuple[RegisteredRun, Survivor]]],
        env: Environment,
        lock_path: Path | None = None,
    ) -> tuple[SanitizeReport, set[ProcessIdentity]]:
        """Stop survivors, as far as that is allowed: the report, and all that were found."""
        in_the_way = _files_at(lock_path)
        own_job = _own_job(env)
        spared: dict[ProcessIdentity, Finding] = {}
        trackers: set[ProcessIdentity] = set()

        def is_detached(survivor: Survivor) -> bool:
            return survivor.kind == "detached" and not (
                processes.holds_accelerator(survivor.pid)
                or processes.has_open(survivor.pid, in_the_way)
            )

        def reason_to_spare(run: RunRecord, survivor: Survivor) -> str:
            if is_detached(survivor):
                return f"{survivor.evidence}; {_DETACHED}"
            reason = env.reason_not_to_kill
            if reason is None or _is_of_own_job(run, env):
                return ""
            if own_job is not None and _job_of(survivor.pid) == own_job:
                return ""
            return f"not stopped: {reason}"

        def ghosts() -> list[Finding]:
            found = []
            for run, survivor in look():
                finding = _finding(survivor)
                reason = reason_to_spare(run.record, survivor)
                if is_tracker(survivor.pid):
                    trackers.add(survivor.identity)
                elif reason:
                    spared[finding.identity] = attrs.evolve(finding, reason=reason)
                else:
                    found.append(finding)
            return found

        report, known = self._stop_again(ghosts, env.registry, None)
        if report.stopped or report.killed:
            _wait_for(trackers, _TRACKERS)
        report += SanitizeReport(spared=tuple(spared.values()))
        return report, {*known, *spared, *trackers}

    def _stop_look_alikes(
        self, me: Look, known: set[ProcessIdentity], env: Environment
    ) -> SanitizeReport:
        members = Membership(env.registry.runs())
        suspects = [
            finding
            for finding in self._look_around(me, members, env.registry)
            if finding.identity not in known
        ]
        if suspects:
            siblings = _ranks_beside(env)
            suspects = [finding for finding in suspects if finding.pid not in siblings]
        wanted = ("twin", "relative") if self.match == "script" else ("twin",)
        guilty = [finding for finding in suspects if finding.evidence in wanted]
        guilty, cleared = self._settle(guilty, env)
        spared = [f for f in suspects if f not in guilty and f.evidence != "defunct"]
        # What has ended meanwhile is in nobody's way: ranks and workers come and go.
        spared = [f for f in spared if processes.is_alive(f.identity)]
        spared = list({finding.pid: finding for finding in (*spared, *cleared)}.values())
        report = self.stop(guilty, env.registry, reason_not_to_kill=env.reason_not_to_kill)
        return report + SanitizeReport(
            spared=tuple(spared), defunct=tuple(f for f in suspects if f.evidence == "defunct")
        )

    def _look_around(self, me: Look, members: Membership, registry: RunRegistry) -> list[Finding]:
        alike, unnamed = Scan(me).look()
        defunct = list(filter(None, (_defunct(pid, me) for pid in unnamed)))
        # For a few, a walk upwards from each is cheaper than a scan of the machine.
        kindred = kin() if len(alike) + len(defunct) > _FEW else None

        def is_near(pid: int) -> bool:
            return is_kin(pid) if kindred is None else pid in kindred

        found = [
            self._judge(look, me, members, registry) for look in alike if not is_near(look.pid)
        ]
        return found + [finding for finding in defunct if not is_near(finding.pid)]

    def _judge(self, other: Look, me: Look, members: Membership, registry: RunRegistry) -> Finding:
        pid = other.pid

        def finding(evidence: str, reason: str) -> Finding:
            return Finding(pid, other.create_time, command_of(pid), evidence, reason)

        run = members.live_run_of(pid)
        if run is not None:
            state = f"{run.state.value} run of project {run.record.project}"
            return finding("look-alike", f"belongs to a {state} (pid {run.record.pid})")
        if has_led_a_run(pid, registry):
            return finding("look-alike", _LEFT_WELL)
        if has_a_record_open(pid):  # somebody has removed the registry, or it has another one
            return finding("look-alike", "belongs to a run that is not in this registry")
        if self.spare is not None and self.spare(pid):
            return finding("look-alike", "excluded by the caller")
        if is_other_element(me.environ or {}, other.environ or {}):
            return finding("look-alike", "another element of the same array of jobs")
        difference = other.difference(me)
        if difference:
            return finding("relative", difference)
        if other.create_time > me.create_time:
            return finding("look-alike", "started after this run: no ghost, it may register yet")
        return finding("twin", "same program, arguments, directory and environment")

    def _settle(
        self, guilty: list[Finding], env: Environment
    ) -> tuple[list[Finding], list[Finding]]:
        """Give young suspects the time to register: two runs that start together must not stop
        each other. They need about as long as this process needed to come here.
        """
        if env.reason_not_to_kill is not None or self.dry_run or not guilty:
            return guilty, []
        began = time.monotonic()
        settled = min(max(2.0, 2 * _age(env.run.leader)), _PATIENT)
        progress = Progress(max(_ENOUGH, 2 * time.process_time()))
        cleared: dict[int, Finding] = {}
        while True:
            members = Membership(env.registry.runs())
            for finding in guilty:
                run = members.live_run_of(finding.pid)
                if run is not None:
                    reason = f"belongs to a {run.state.value} run of {run.record.project}"
                elif has_led_a_run(finding.pid, env.registry):
                    reason = _LEFT_WELL  # it registered, ran and left meanwhile
                else:
                    continue
                cleared[finding.pid] = attrs.evolve(finding, evidence="look-alike", reason=reason)
            left = [f for f in guilty if f.pid not in cleared and processes.is_alive(f.identity)]
            young = [
                f
                for f in left
                if (age := _age(f.identity)) < settled
                or (age < _PATIENT and progress.is_on_its_way(f.identity))
            ]
            if not young or time.monotonic() - began > _PATIENT:
                return left, list(cleared.values())
            time.sleep(0.05)

    # Processes of this run.

    def _grace_at_exit(self, env: Environment) -> float | None:
        return self.grace if env.allow_process_kill and not self.dry_run else None

    def _look_back(self, env: Environment, block: Block) -> None:
        exiting.let_exit(self._grace_at_exit(env))
        if self.leftovers == "report":
            env.report.leftovers = SanitizeReport(spared=tuple(block.children()))
        else:
            # Provably our own, so they may be stopped on shared compute as well.
            reason = None if env.allow_process_kill else "allow_process_kill is False"
            env.report.leftovers = self._stop_leftovers(env, block, reason)
        _log(env.report.leftovers, env.logger)

    def _stop_leftovers(
        self, env: Environment, block: Block, reason_not_to_kill: str | None
    ) -> SanitizeReport:
        spared: dict[ProcessIdentity, Finding] = {}
        ended: set[int] = set()

        def leftovers() -> list[Finding]:
            # A child that ends during a look may just have started others, which that look missed.
            while True:
                children = processes.children_of(os.getpid())
                ghosts, others = block.leftovers(env, self._excluded)
                spared.update((finding.identity, finding) for finding in others)
                news = {pid for pid in children - ended if not processes.is_running(pid)}
                if ghosts or not news:
                    if reason_not_to_kill is None and not self.dry_run:
                        pool_locks.end_pools({ghost.pid for ghost in ghosts})
                    return ghosts
                ended.update(news)

        report, _ = self._stop_again(leftovers, env.registry, reason_not_to_kill, spared)
        return report + SanitizeReport(spared=tuple(spared.values()))

    def _stop_again(
        self,
        look: Callable[[], list[Finding]],
        registry: RunRegistry,
        reason_not_to_kill: str | None,
        also_spare: Iterable[ProcessIdentity] = (),
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
            report += self.stop(
                ghosts, registry, reason_not_to_kill=reason_not_to_kill, also_spare=also_spare
            )
            if self.dry_run or reason_not_to_kill is not None:
                break
        return report, known


def _is_same_project(run: RegisteredRun, mine: RunRecord) -> bool:
    """Whether both are runs of one project: they meet at one lock, if they have any."""
    if run.record.rank:  # not 0: it followed its rank 0, and took no lock
        return run.record.project == mine.project
    if mine.lock is None:
        return run.record.lock is None and run.record.project == mine.project
    return mine.lock in run.locks


def _finding(survivor: Survivor) -> Finding:
    return Finding(
        survivor.pid, survivor.create_time, survivor.command, "survivor", survivor.evidence
    )


def _own_job(env: Environment) -> str | None:
    """The scheduler's job that this run is a part of: what it has left may be stopped on shared
    compute, too. None if there is none, or nothing may be stopped.
    """
    return scheduler_job(os.environ) if env.allow_process_kill else None


def _is_of_own_job(run: RunRecord, env: Environment) -> bool:
    """Whether a run was one of the distributed job that this run is a rank of: the start before an
    elastic restart. What that left may be stopped although the ranks that live never are. False if
    nothing may be stopped.
    """
    return env.allow_process_kill and is_same_job(run.job, env.run.job)


def _ranks_beside(env: Environment) -> Collection[int]:
    """What the launcher of this job has started: its ranks look like this one. They may not have
    registered yet, and are no ghosts.
    """
    launcher = launcher_of(env.run.job)
    return () if launcher is None else processes.tree(launcher.pid)


def _job_of(pid: int) -> str | None:
    return scheduler_job(processes.read_environ(pid) or {})


def _files_at(path: Path | None) -> frozenset[tuple[int, int]]:
    """The file there, by device and inode, if there is one."""
    try:
        found = os.stat(path) if path is not None else None
    except OSError:
        found = None
    return frozenset() if found is None else frozenset([(found.st_dev, found.st_ino)])


def _wait_for(identities: Iterable[ProcessIdentity], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(processes.is_alive, identities)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _defunct(pid: int, me: Look) -> Finding | None:
    if hasattr(os, "geteuid") and processes.owner_of(pid) != os.geteuid():
        return None
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


def _age(identity: ProcessIdentity) -> float:
    """How long a process has lived, in seconds."""
    return processes.now() - identity.create_time


# What is told of whom: a process that may be in the way is a warning, one that goes on as it
# should is nothing that anybody must be told.
_QUIET = {"look-alike": logging.DEBUG, "leftover": logging.DEBUG, "defunct": logging.DEBUG}


def _log(report: SanitizeReport, logger: logging.Logger) -> None:
    for outcome in ("stopped", "killed", "denied", "spared", "defunct"):
        for finding in getattr(report, outcome):
            level = _QUIET.get(finding.evidence, logging.WARNING)
            if outcome == "denied":
                level = logging.WARNING
            elif _DETACHED in finding.reason:
                level = min(level, logging.INFO)
            logger.log(
                level,
                "%s process: %s",
                outcome,
                finding.describe(),
                extra={"finding": finding},
            )
    if report.defunct:
        parents = ", ".join(str(pid) for pid in sorted({one.parent or 0 for one in report.defunct}))
        logger.info(
            "%d defunct processes wait for their parents (pid %s) to reap them",
            len(report.defunct),
            parents,
        )
