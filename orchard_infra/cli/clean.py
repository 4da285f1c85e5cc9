"""`orchard-infra clean`: stop and remove what dead runs left, and show the proof for each.

The exit status is

===  =======================================================================
  0  everything was cleaned up, there was nothing to do, or it was a dry run
  1  something could not be stopped or removed, or the answer was no
  2  the command line is wrong
===  =======================================================================
"""

from __future__ import annotations

import os
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import attrs
import click
from rich.console import Console
from rich.text import Text

from orchard_infra.artifacts import sweeping
from orchard_infra.cli import output
from orchard_infra.inspect import (
    Look,
    RegisteredRun,
    Survivor,
    command_of,
    look,
    memory_of,
)
from orchard_infra.launch import Launch
from orchard_infra.report import CleanReport, Finding, SanitizeReport
from orchard_infra.runs.registry import RunRegistry
from orchard_infra.sanitizing.ghosts import GhostSanitizer
from orchard_infra.system import processes
from orchard_infra.system.text import printable

_HELPERS_END = 2.0  # seconds for helpers, once the processes that they serve are gone
_TOLD = {"defunct": "leader"}
_INDENT = 10  # columns
_LISTED = 20  # files
_WEIGHT = ("twin", "relative", "look-alike")  # evidence, the strongest first


@click.command(
    short_help="Stop and remove what dead runs left.",
    epilog="""\b
Examples:
  orchard-infra clean --dry-run
  orchard-infra clean --project digits --yes

Exits with 1 when something could not be cleaned up, or the answer was no.
""",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be done.")
@click.option("-y", "--yes", is_flag=True, help="Do it without asking.")
@click.option(
    "--detached",
    is_flag=True,
    help="Stop also survivors that may be meant to go on; see docs/cli.md.",
)
@click.option(
    "-p",
    "--project",
    metavar="PROJECT",
    shell_complete=output.complete_project,
    help="Only for runs of this project. Shared memory is of no project.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    metavar="S",
    help="Seconds between SIGTERM and SIGKILL.",
)
@click.pass_context
def clean(
    context: click.Context,
    dry_run: bool,
    yes: bool,
    detached: bool,
    project: str | None,
    grace: float,
) -> None:
    """Stop and remove what dead runs left: processes, records, directories, shared memory.

    Shows first what proves that each of them is a leftover, and why what only looks like one is
    spared; then asks. Detached survivors have a question of their own, and --yes leaves them
    alone without --detached. Live runs, and all that belongs to them, are never touched.
    """
    with output.errors_told():
        console = output.console()
        cleaning = Cleaning(RunRegistry(), project, GhostSanitizer(grace=grace))
        plan = cleaning.plan(detached=detached)
        for line in describe(plan, console):
            output.write(console, line)
        if plan.is_empty and (yes or dry_run or not plan.may_ask_for_detached):
            output.write(console, plan.why_empty())
            return
        output.write(console)
        if dry_run:
            for line in output.wrapped(console, f"This would {plan.summary()}."):
                output.write(console, line)
            return
        if not yes:
            plan = _ask(cleaning, plan)
        success = True
        for told, is_good in cleaning.carry_out(plan):
            success = success and is_good
            output.write(console, Text(printable(told), "" if is_good else "red"))
    context.exit(0 if success else 1)


@attrs.frozen
class Ghost:
    """A process to stop or to spare: the run that it belongs to or resembles, and its memory."""

    run: RegisteredRun
    finding: Finding
    memory: int = 0  # bytes


@attrs.frozen
class Plan:
    """What would be stopped and removed.

    ``ghosts`` are stopped, ``detached`` only ``with_detached``. ``files`` is what would be removed.
    ``why_not`` says why no process is stopped, if that is so. Nothing of a run is removed while
    processes of it live.
    """

    ghosts: tuple[Ghost, ...] = ()
    detached: tuple[Ghost, ...] = ()
    with_detached: bool = False
    spared: tuple[Ghost, ...] = ()
    dead: tuple[RegisteredRun, ...] = ()
    files: CleanReport = attrs.field(factory=CleanReport)
    why_not: str | None = None
    at: float = attrs.field(factory=time.time)

    @property
    def stoppable(self) -> tuple[Ghost, ...]:
        if self.why_not is not None:
            return ()
        return self.ghosts + self.detached if self.with_detached else self.ghosts

    @property
    def removable(self) -> tuple[RegisteredRun, ...]:
        """The dead runs of which nothing lives once this plan is carried out."""
        kept = {g.run.record.run_id for g in self.ghosts + self.detached if g not in self.stoppable}
        return tuple(run for run in self.dead if run.record.run_id not in kept)

    @property
    def is_empty(self) -> bool:
        return not (self.stoppable or self.removable or self.files.removed)

    @property
    def may_ask_for_detached(self) -> bool:
        return bool(self.detached) and not self.with_detached and self.why_not is None

    def why_empty(self) -> str:
        if self.detached and self.why_not is None:
            return "Nothing to clean up; detached processes are stopped with --detached."
        if self.ghosts or self.detached:
            return "Nothing can be cleaned up from here: see above."
        return "Nothing to clean up."

    def summary(self) -> str:
        parts = []
        if self.stoppable:
            memory = output.size(sum(ghost.memory for ghost in self.stoppable))
            parts.append(
                f"stop {output.count(len(self.stoppable), 'process', 'processes')} ({memory})"
            )
        things = []
        if self.removable:
            things.append(output.count(len(self.removable), "record"))
        if self.files.removed:
            things.append(f"{_kinds(self.files)} ({output.size(self.files.bytes_freed)})")
        if things:
            parts.append(f"remove {' and '.join(things)}")
        return " and ".join(parts)


@attrs.frozen
class Cleaning:
    """Cleans up after the runs of this user, or those of one project."""

    registry: RunRegistry
    project: str | None
    sanitizer: GhostSanitizer

    def plan(self, *, detached: bool) -> Plan:
        """Look, and change nothing."""
        now = look(self.registry)
        shown = [run for run in now.runs if self.project in (None, run.record.project)]
        dead = tuple(run for run in shown if run.is_over)
        survivors = [(run, one) for run in dead for one in now.survivors_of(run)]
        known = {one.pid for _, one in survivors}
        alike = [ghost for ghost in self._look_alikes(shown, now) if ghost.finding.pid not in known]
        twins = [ghost for ghost in alike if ghost.finding.evidence == "twin"]
        ghosts = [Ghost(run, _finding(one)) for run, one in survivors if not _may_go_on(one)]
        left = [Ghost(run, _finding(one)) for run, one in survivors if _may_go_on(one)]
        plan = Plan(
            ghosts=tuple(map(_weigh, ghosts + twins)),
            detached=tuple(map(_weigh, left)),
            with_detached=detached,
            spared=(*(one for one in alike if one not in twins), *_defunct_leaders(dead)),
            dead=dead,
            why_not=Launch.from_environ(os.environ).reason_not_to_kill(),
        )
        return self._with_files(plan)

    def with_detached(self, plan: Plan) -> Plan:
        """The same plan, detached processes included."""
        return self._with_files(attrs.evolve(plan, with_detached=True))

    def _with_files(self, plan: Plan) -> Plan:
        removable = [run.record for run in plan.removable]
        return attrs.evolve(plan, files=sweeping.would_collect(removable))

    def carry_out(self, plan: Plan) -> Iterator[tuple[str, bool]]:
        """Stop and remove. One line for each kind of thing, and whether it went well."""
        if plan.stoppable:
            report = self.sanitizer.stop(
                [ghost.finding for ghost in plan.stoppable],
                self.registry,
                reason_not_to_kill=plan.why_not,
            )
            yield from _tell_stopped(report, plan)
        # What still lives of a run keeps its record, the evidence against it.
        planned = {run.record.run_id for run in plan.removable}
        dead = self._without_survivors(planned)
        files = sweeping.collect([run.record for run in dead])
        removed = [run for run in dead if self.registry.remove(run)]
        self.registry.collect_unnamed()
        if removed:
            yield f"removed {output.count(len(removed), 'record')}", True
        if files.removed:
            yield f"removed {_kinds(files)} ({output.size(files.bytes_freed)})", True
        for failure in files.failures:
            yield f"not removed: {failure}", False
        if len(removed) < len(planned):
            left = output.count(len(planned) - len(removed), "record")
            yield f"{left} kept: not everything of that run is gone", False

    def _without_survivors(self, run_ids: Container[str]) -> list[RegisteredRun]:
        """The runs, out of these, of which nothing lives. Helpers of Python end by themselves, a
        moment after the processes that they serve.
        """
        deadline = time.monotonic() + _HELPERS_END
        while True:
            now = look(self.registry)
            dead = [run for run in now.runs if run.is_over and run.record.run_id in run_ids]
            left = [one for run in dead for one in now.survivors_of(run)]
            if not any(one.is_helper for one in left) or time.monotonic() > deadline:
                return [run for run in dead if not now.survivors_of(run)]
            time.sleep(0.02)

    def _look_alikes(self, runs: Sequence[RegisteredRun], now: Look) -> list[Ghost]:
        """Each process once, with the strongest evidence that there is against it."""
        found: dict[int, Ghost] = {}
        for run in runs:
            for finding in self.sanitizer.look_alikes_of(run, now.membership, self.registry):
                known = found.get(finding.pid)
                if finding.evidence == "defunct":
                    continue  # nobody knows what it ran: see `_defunct_leaders`
                if known is None or _weight(finding) < _weight(known.finding):
                    found[finding.pid] = Ghost(run, finding)
        return list(found.values())


def describe(plan: Plan, console: Console) -> Iterator[Text]:
    """The plan for a person."""
    width = output.width_of(console)
    if plan.ghosts:
        yield Text("Processes of dead runs, and twins", "bold")
        if plan.why_not is not None:
            yield from output.wrapped(
                console, f"None is stopped: {plan.why_not}", indent=2, style="yellow"
            )
        verdict = Text("stop", "red") if plan.why_not is None else Text("keep", "yellow")
        yield from _describe_ghosts(plan.ghosts, verdict, console)
    if plan.detached:
        yield Text("Detached processes of dead runs", "bold")
        told = "Each has left the session of its run, or was left by a run that ended well. "
        if plan.why_not is not None:
            told += f"None is stopped: {plan.why_not}"
        elif not plan.with_detached:
            told += "Stopped only if you say so, or with --detached"
        yield from output.wrapped(console, told, indent=2, style="yellow")
        stopped = plan.why_not is None and plan.with_detached
        verdict = Text("stop", "red") if stopped else Text("keep", "yellow")
        yield from _describe_ghosts(plan.detached, verdict, console)
    if plan.spared:
        yield Text("Look-alikes", "bold")
        yield from _describe_ghosts(plan.spared, Text("keep", "green"), console)
    if plan.dead:
        yield Text("Records of dead runs", "bold")
        for run in plan.dead:
            record = run.record
            verdict = Text("remove", "red") if run in plan.removable else Text("keep", "yellow")
            ago = output.age(plan.at - record.started_at)
            line = (
                f"{record.project}, pid {record.pid}, began {ago} ago: "
                f"{output.command(record.argv)}"
            )
            yield _entry(verdict, line, width)
    yield from _describe_files("Directories and shared memory", "remove", plan.files.removed, width)
    yield from _describe_files(
        "Shared memory that is not proven dead", "keep", plan.files.kept, width
    )
    for failure in plan.files.failures:
        yield from output.wrapped(console, f"cannot be removed: {failure}", indent=2, style="red")


def _describe_ghosts(ghosts: Iterable[Ghost], verdict: Text, console: Console) -> Iterator[Text]:
    """Processes with the same verdict share a line, such as the workers of a pool."""
    alike: dict[tuple[str, ...], list[Ghost]] = {}
    for ghost in ghosts:
        finding = ghost.finding
        key = (ghost.run.record.run_id, finding.evidence, finding.reason, finding.command)
        alike.setdefault(key, []).append(ghost)
    for group in alike.values():
        finding, record = group[0].finding, group[0].run.record
        command = output.command(finding.command.split(" "))
        yield _entry(verdict, command, output.width_of(console))
        evidence = _TOLD.get(finding.evidence, finding.evidence)
        memory = sum(ghost.memory for ghost in group)
        told = f"{evidence} of {record.project} (pid {record.pid}): "
        told += output.shorten(finding.reason, 150)
        told += f"; {output.size(memory)}" * bool(memory)
        told += "; pids " if len(group) > 1 else "; pid "
        told += ", ".join(str(ghost.finding.pid) for ghost in group)
        yield from output.wrapped(console, told, indent=_INDENT, style=output.DETAIL)


def _entry(verdict: Text, text: str, width: int) -> Text:
    space = " " * (_INDENT - 2 - verdict.cell_len)
    return Text.assemble("  ", verdict, space, output.shorten(text, width - _INDENT))


def _describe_files(title: str, verdict: str, paths: Sequence[Path], width: int) -> Iterator[Text]:
    if not paths:
        return
    yield Text(title, "bold")
    for path in paths[:_LISTED]:
        shown = output.shorten_path(str(path), width - _INDENT)
        yield _entry(Text(verdict, "red" if verdict == "remove" else "yellow"), shown, width)
    if len(paths) > _LISTED:
        yield Text(f"{'':{_INDENT}}and {len(paths) - _LISTED} more", output.DETAIL)


def _kinds(files: CleanReport) -> str:
    """
    >>> _kinds(CleanReport(removed=(Path("/tmp/a"), Path("/dev/shm/b"), Path("/dev/shm/c"))))
    '1 directory and 2 files of shared memory'
    """
    shared = sum(path.parent == Path("/dev/shm") for path in files.removed)
    directories = len(files.removed) - shared
    kinds = [output.count(directories, "directory", "directories")] * bool(directories)
    kinds += [output.count(shared, "file of shared memory", "files of shared memory")] * bool(
        shared
    )
    return " and ".join(kinds)


def _tell_stopped(report: SanitizeReport, plan: Plan) -> Iterator[tuple[str, bool]]:
    memory = {ghost.finding.identity: ghost.memory for ghost in plan.ghosts + plan.detached}
    for what, findings in (("stopped", report.stopped), ("killed", report.killed)):
        if findings:
            freed = output.size(sum(memory.get(finding.identity, 0) for finding in findings))
            yield f"{what} {output.count(len(findings), 'process', 'processes')} ({freed})", True
    for finding in report.denied:
        yield f"not stopped: {finding.describe()}", False


def _ask(cleaning: Cleaning, plan: Plan) -> Plan:
    """The plan that the user agrees to. Detached processes have a question of their own."""
    try:
        if not plan.is_empty:
            question = plan.summary()
            _confirm(f"{question[0].upper()}{question[1:]}?")
        if plan.may_ask_for_detached:
            also = "Stop" if plan.is_empty else "Stop also"
            number = output.count(len(plan.detached), "detached process", "detached processes")
            memory = output.size(sum(ghost.memory for ghost in plan.detached))
            if click.confirm(f"{also} {number} ({memory})?"):
                return cleaning.with_detached(plan)
            if plan.is_empty:
                _stop_here("Nothing was done.")
    except click.Abort:
        _stop_here("\nNothing was done: nobody answered. With --yes it is done unasked.", err=True)
    return plan


def _confirm(question: str) -> None:
    if not click.confirm(question):
        _stop_here("Nothing was done.")


def _stop_here(told: str, *, err: bool = False) -> NoReturn:
    click.echo(told, err=err)
    raise click.exceptions.Exit(1)


def _defunct_leaders(dead: Iterable[RegisteredRun]) -> Iterator[Ghost]:
    """Leaders that are dead and not reaped: they hold nothing but their pid."""
    for run in dead:
        leader = run.record.leader
        stat = processes.read_stat(leader.pid) if run.record.is_local else None
        if stat is None or stat.create_time != leader.create_time:
            continue
        if processes.is_defunct(stat):
            why = f"dead, to be reaped by pid {stat.ppid}, {command_of(stat.ppid)}"
            finding = Finding(leader.pid, leader.create_time, f"[{stat.name}]", "defunct", why)
            yield Ghost(run, finding)


def _may_go_on(survivor: Survivor) -> bool:
    """Whether a survivor may be somebody's data: a tracker that uploads, a shell in tmux. One that
    holds an accelerator is in everybody's way.
    """
    return survivor.kind == "detached" and not processes.holds_accelerator(survivor.pid)


def _finding(survivor: Survivor) -> Finding:
    return Finding(
        survivor.pid, survivor.create_time, survivor.command, "survivor", survivor.evidence
    )


def _weigh(ghost: Ghost) -> Ghost:
    return attrs.evolve(ghost, memory=memory_of([ghost.finding.identity]))


def _weight(finding: Finding) -> int:
    return _WEIGHT.index(finding.evidence)
