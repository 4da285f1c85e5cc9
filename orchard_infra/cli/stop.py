"""`orchard-infra stop`: ask a run to stop, and kill it with all that belongs to it if it does not.

The exit status is

===  ===========================================================================
  0  nothing of the run lives any more, whether it stopped or was killed
  1  something of it still lives, or it is not one that can be stopped from here, or it
     has ended and only its program goes on
  2  the command line is wrong
  3  there is no such run
130  interrupted by Ctrl-C: what was asked to stop goes on stopping
===  ===========================================================================
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import attrs
import click
from rich.console import Console
from rich.text import Text

from orchard_infra.cli import output
from orchard_infra.cli.asking import ask_to_stop
from orchard_infra.inspect import (
    Look,
    ProcessIdentity,
    RegisteredRun,
    RunState,
    command_of,
    is_ours,
    look,
)
from orchard_infra.launch import is_same_job
from orchard_infra.runs.record import RUN_ID_VARIABLE
from orchard_infra.runs.registry import RunRegistry
from orchard_infra.system import processes
from orchard_infra.system.killing import StopOutcome, stop_processes
from orchard_infra.system.text import printable

NO_SUCH_RUN = 3
INTERRUPTED = 128 + signal.SIGINT
_POLL = 0.05  # seconds
_SETTLES = 0.5  # seconds in which workers leave by themselves once their parent has
_SAY_AGAIN = 10.0  # seconds between two lines of progress where there is no terminal


@click.command(
    short_help="Ask a run to stop; kill it if it does not.",
    epilog="""\b
Examples:
  orchard-infra stop digits
  orchard-infra stop 4711 --grace 300

Exits with 0 when nothing of the run lives any more, with 3 when there is no such run.
""",
)
@click.argument("target", metavar="PROJECT|PID", shell_complete=output.complete_project)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="S",
    help="Seconds to stop in, before it is killed.",
)
@click.pass_context
def stop(context: click.Context, target: str, grace: float) -> None:
    """Ask a run to stop: it finishes its step, saves, and releases what it holds.

    A PROJECT means all of its runs, those that wait for its lock first; a PID means the run that
    this process leads, with all ranks of its job on this host. What has not ended after the grace
    is killed, with all that belongs to it. A run that has ended is not stopped with its program.
    """
    with output.errors_told():
        registry = RunRegistry()
        runs = _named(registry.runs(), target)
        if not runs:
            click.echo(f"Error: {printable(_why_none(registry, target))}", err=True)
            context.exit(NO_SUCH_RUN)
        stopping = Stopping(registry, runs, grace, output.console(stderr=True))
        try:
            results = stopping.carry_out()
        except KeyboardInterrupt:
            told = "Interrupted. What was asked to stop goes on stopping; nothing more is killed."
            click.echo(told, err=True)
            context.exit(INTERRUPTED)
    console = output.console()
    for result in results:
        output.write(console, Text(printable(result.text), "" if result.is_gone else "red"))
    context.exit(0 if all(result.is_gone for result in results) else 1)


@attrs.frozen
class Result:
    """How the stop of one run went; ``text`` is for a person."""

    text: str
    is_gone: bool = True


@attrs.define
class _Target:
    """A run to stop. ``members`` are all its processes that were ever seen."""

    run: RegisteredRun
    members: set[ProcessIdentity]
    asked: bool = False
    ended_after: float | None = None  # seconds; None: its leader was still there at the end

    @property
    def name(self) -> str:
        return f"{self.run.record.project} (pid {self.run.record.pid})"

    def left(self) -> list[ProcessIdentity]:
        return sorted(member for member in self.members if processes.is_alive(member))


Progress = Callable[[Sequence[_Target], float], None]


@attrs.define
class Stopping:
    """One try to stop these runs, together: they share the grace."""

    registry: RunRegistry
    runs: Sequence[RegisteredRun]
    grace: float
    console: Console
    _enclosing: set[str] = attrs.field(factory=set, init=False)

    def carry_out(self) -> list[Result]:
        results = [
            Result(_why_not_from_here(run), is_gone=False)
            for run in self.runs
            if not run.is_over and not run.record.is_local
        ]
        targets = self._targets()
        began = time.monotonic()
        for target in targets:
            target.asked = target.run.is_live and ask_to_stop(target.run.record.leader)
        with self._progress(targets) as show:
            self._wait_for_leaders(targets, began, show)
            outcome = self._stop_the_rest(targets, began + self.grace)
        results += [self._result(target, outcome) for target in targets]
        self._forget(targets)
        return results + [
            Result(_why_not_with_its_program(run), is_gone=False)
            for run in self.runs
            if _has_only_ended(run) and processes.is_alive(run.record.leader)
        ]

    def _forget(self, targets: Sequence[_Target]) -> None:
        """Drop the records of runs that ended well, and of which nothing lives any more."""
        ids = {target.run.record.run_id for target in targets}
        for run in self.registry.dead_runs():
            if run.record.run_id in ids and run.was_released:
                self.registry.remove(run)

    def _targets(self) -> list[_Target]:
        """Runs that wait for a lock come first: else one of them would start when it goes free."""
        here = [run for run in self.runs if run.is_over or (run.is_live and run.record.is_local)]
        now = look(self.registry)
        for run in here:
            above = set(processes.ancestors(run.record.pid))
            self._enclosing.update(self.registry.lineage(run.record.run_id))
            self._enclosing.update(
                other.record.run_id
                for other in now.runs
                if not other.is_over and other.record.is_local and other.record.pid in above
            )
        targets = [_Target(run, set()) for run in here]
        self._look_again(targets)
        return sorted(targets, key=lambda target: target.run.state is not RunState.WAITING)

    def _wait_for_leaders(self, targets: Sequence[_Target], began: float, show: Progress) -> None:
        while True:
            waited = time.monotonic() - began
            waited_for = []
            for target in targets:
                if processes.is_alive(target.run.record.leader):
                    waited_for.append(target)
                elif target.ended_after is None:
                    target.ended_after = waited
            if not waited_for or waited >= self.grace:
                return
            show(waited_for, waited)
            time.sleep(min(_POLL, self.grace - waited))

    def _stop_the_rest(self, targets: Sequence[_Target], deadline: float) -> StopOutcome:
        """Ask the processes that outlived their leader. They have what is left of the grace."""
        settled = min(deadline, time.monotonic() + _SETTLES)
        while any(target.left() for target in targets) and time.monotonic() < settled:
            time.sleep(_POLL)
        self._look_again(targets)
        rest = max(0.0, deadline - time.monotonic())
        outcome = self._stop(targets, rest)
        self._look_again(targets)
        if any(target.left() for target in targets):  # started while the others ended
            late = self._stop(targets, 0.0)
            outcome = _sum(outcome, late)
        return outcome

    def _look_again(self, targets: Sequence[_Target]) -> None:
        """Find processes that have come since, also of a run whose record is gone by now."""
        runs = {run.record.run_id: run for run in self.registry.runs()}
        for target in targets:
            run = runs.get(target.run.record.run_id, target.run)
            if run.is_live and not processes.is_alive(run.record.leader):
                run = attrs.evolve(run, state=RunState.SURVIVORS)
            runs[run.record.run_id] = run
        now = Look(tuple(runs.values()))
        is_spared = self._spare()
        for target in targets:
            new = set(now.members_of(runs[target.run.record.run_id])) - target.members
            target.members |= {member for member in new if not is_spared(member.pid)}

    def _stop(self, targets: Sequence[_Target], grace: float) -> StopOutcome:
        left = [member for target in targets for member in target.left()]
        return stop_processes(left, grace=grace, spare=self._spare())

    def _spare(self) -> Callable[[int], bool]:
        """Which processes to spare: daemons that opted out, and other live runs, even if they were
        started in one of these.

        A run within another one is below its leader, too: that does not make it the other's.
        """
        ours = {run.record.run_id for run in self.runs} | self._enclosing
        leaders = {run.record.leader for run in self.runs}
        others = Look(
            tuple(
                run
                for run in self.registry.runs()
                # The earlier runs of a program end with it.
                if run.record.run_id not in ours and run.record.leader not in leaders
            )
        )

        def opted_out(pid: int) -> bool:
            return processes.started_with(pid, RUN_ID_VARIABLE, ("",)) is not None

        # What a daemon forks shows the daemon's own environment.
        daemons = any(opted_out(run.record.pid) for run in self.runs)

        def is_spared(pid: int) -> bool:
            if not daemons and opted_out(pid):
                return True
            return not is_ours(pid) or others.run_of(pid) is not None

        return is_spared

    def _result(self, target: _Target, outcome: StopOutcome) -> Result:
        leader = target.run.record.leader
        killed = [one for one in outcome.killed if one in target.members]
        stopped = [one for one in outcome.stopped if one in target.members]
        if leader in killed:
            told = f"killed: it did not stop within {self.grace:g} s"
        elif not target.run.is_live:
            told = "was dead already"
            if not target.members:
                told += "; what it left is removed by orchard-infra clean"
        elif target.ended_after is not None:
            told = f"stopped after {target.ended_after:.1f} s"
        elif leader in stopped:
            told = "stopped"
        else:
            told = "not stopped: it may not be signalled, or does not end (uninterruptible sleep)"
        for others, what in ((stopped, "stopped"), (killed, "killed")):
            number = len([one for one in others if one != leader])
            if number:
                told += f"; {output.count(number, 'process', 'processes')} of it {what}"
        rest = target.left()
        if leader not in target.members and processes.is_alive(leader):
            rest.insert(0, leader)
        if rest:
            listed = ", ".join(f"pid {one.pid} ({command_of(one.pid)})" for one in rest[:5])
            told += f"; still there: {listed}"
        return Result(f"{target.name}: {told}", is_gone=not rest)

    @contextlib.contextmanager
    def _progress(self, targets: Sequence[_Target]) -> Iterator[Progress]:
        for target in targets:
            if target.asked:
                line = printable(f"{target.name}: asked to stop")
                output.write(self.console, Text(line, output.DETAIL))
        with contextlib.ExitStack() as stack:
            status = None
            if output.can_redraw(self.console):
                status = stack.enter_context(self.console.status(Text("stopping")))
            said = 0.0

            def show(waited_for: Sequence[_Target], waited: float) -> None:
                nonlocal said
                if status is None and waited - said < _SAY_AGAIN:
                    return
                said = waited
                names = ", ".join(target.name for target in waited_for)
                left = sum(len(target.left()) for target in waited_for)
                line = (
                    f"{waited:.0f} of {self.grace:g} s, "
                    f"{output.count(left, 'process', 'processes')} left: {names}"
                )
                if status is None:
                    output.write(self.console, printable(line))
                else:
                    width = output.width_of(self.console) - 4
                    status.update(Text(output.shorten(line, width)))

            yield show


def _named(runs: Sequence[RegisteredRun], target: str) -> list[RegisteredRun]:
    """The runs that a person means: those of a project, or the one that a process leads, with the
    other ranks of its job on this host.
    """
    found = [run for run in runs if str(run.record.pid) == target and run.record.is_local]
    if not found:
        return [run for run in runs if run.record.project == target]
    # A rank that is asked alone leaves the others in a collective.
    jobs = [run.record.job for run in found]
    for run in runs:
        same_job = any(is_same_job(run.record.job, job) for job in jobs)
        if same_job and run.is_live and run.record.is_local and run not in found:
            found.append(run)
    # The ranks that it has started are runs of the same project; runs are sorted by age.
    for run in runs:
        outer = next((one for one in found if one.record.run_id == run.record.parent), None)
        if outer is not None and outer.record.project == run.record.project and run not in found:
            found.append(run)
    return found


def _why_none(registry: RunRegistry, target: str) -> str:
    now = look(registry)
    if target.isdecimal() and len(target) < 10:
        pid = int(target)
        run = now.run_of(pid)
        if run is not None:
            record = run.record
            return (
                f"pid {pid} leads no run; it belongs to one of project {record.project}. "
                f"Stop that with: orchard-infra stop {record.pid}"
            )
        return f"pid {pid} leads no run of yours, and a process that is in no run is not touched"
    projects = sorted({run.record.project for run in now.runs})
    known = f"There are runs of: {', '.join(projects)}" if projects else "There are no runs"
    return f"no run of project {target}. {known}"


def _why_not_from_here(run: RegisteredRun) -> str:
    record = run.record
    return (
        f"{record.project} (pid {record.pid}): runs on {record.host}, in another pid or time "
        "namespace or since another boot; it can only be stopped from there"
    )


def _has_only_ended(run: RegisteredRun) -> bool:
    """Whether a run has ended, while its program goes on."""
    return not run.is_live and not run.is_over


def _why_not_with_its_program(run: RegisteredRun) -> str:
    record = run.record
    return (
        f"{record.project} (pid {record.pid}): has ended, and its program goes on, which is not "
        f"stopped; if you mean the program: kill {record.pid}"
    )


def _sum(one: StopOutcome, other: StopOutcome) -> StopOutcome:
    names = attrs.fields_dict(StopOutcome)
    return StopOutcome(**{name: getattr(one, name) + getattr(other, name) for name in names})
