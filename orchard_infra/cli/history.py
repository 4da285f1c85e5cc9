"""`orchard-infra history`: runs that have ended, how, and how long they waited and ran."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click
from rich.text import Text

from orchard_infra.cli import output
from orchard_infra.errors import InfrastructureError
from orchard_infra.inspect import RegisteredRun, RunState
from orchard_infra.runs import history as file
from orchard_infra.runs.record import RunRecord, from_json
from orchard_infra.runs.registry import RunRegistry
from orchard_infra.system import files, processes

_SHOWN = 30  # runs in a table, where nobody says how many
_STYLES = {
    "normal": "green",
    "exit": "red",
    "exception": "red",
    "signal": "yellow",
    "stopped": "yellow",
    "lost lock": "magenta",
    "killed": "magenta",
}
_LIVE = (RunState.RUNNING.value, RunState.WAITING.value)  # how a run is that has not ended
_MOST_SECONDS = 1e11  # the year 5138: what is later is no time


@click.command(
    short_help="Show runs that have ended: how, and how long they waited and ran.",
    epilog="""\b
Examples:
  orchard-infra history
  orchard-infra history -p digits -n 5
  orchard-infra history --html runs.html
  orchard-infra history --json | jq '.runs[] | select(.how != "normal").command'
""",
)
@click.option(
    "-p",
    "--project",
    metavar="PROJECT",
    shell_complete=output.complete_project,
    help="Only the runs of this project.",
)
@click.option(
    *("-n", "--last"),
    "number",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Only the last N runs. A table has {_SHOWN} if this is not given.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; docs/history.md has the schema.")
@click.option(
    "--html",
    "picture",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a timeline there, for a browser: these runs, and those that are live now.",
)
def history(project: str | None, number: int | None, as_json: bool, picture: Path | None) -> None:
    """Show your runs on this machine that have ended, the last one at the bottom.

    A run that was killed is listed as soon as somebody has looked: this command, the next run, or
    `clean`. When it ended is known to a few seconds (~).
    """
    if as_json and picture is not None:
        raise click.UsageError("--json and --html exclude each other.")
    with output.errors_told():
        registry = RunRegistry()
        # First: a run that ends meanwhile is then among both, and not in neither.
        live = live_runs(registry, project) if picture is not None else []
        ended = ended_runs(registry, project)
    of_all = len(ended)
    if number is None and not as_json and picture is None:
        number = _SHOWN
    ended = ended[-number:] if number is not None else ended
    if as_json:
        click.echo(json.dumps(to_json(ended), indent=2))
    elif picture is not None:
        own_lines = {run.record.run_id for run in ended}
        _draw([*ended, *(run for run in live if run.record.run_id not in own_lines)], picture)
    else:
        console = output.console()
        for line in table(ended, output.width_of(console)):
            output.write(console, line)
        if len(ended) < of_all:
            told = f"{of_all - len(ended)} earlier runs are not shown: -n {of_all} shows all"
            output.write(console, Text(told, output.DETAIL))


@attrs.frozen
class Entry:
    """One run. Times are in epoch seconds, sizes in bytes.

    ``how`` is one of `runs.history.HOW`. Of a run that was killed, ``alive_at`` is the last sign of
    life, and ``ended_at`` when it was found dead. ``running_at`` is None where it is not known when
    the run got its lock. Of a run that is live ``how`` is "running" or "waiting", and ``ended_at``
    is now; so is ``running_at`` where it still waits.
    """

    record: RunRecord
    how: str
    ended_at: float
    running_at: float | None = None
    alive_at: float | None = None
    error: str | None = None
    signal: str | None = None
    exit_status: int | None = None
    release_failed: bool = False
    device_bytes: int = 0
    temporary_bytes: int = 0
    collected_bytes: int = 0
    ghosts_stopped: int = 0
    leftovers_stopped: int = 0
    left_running: int = 0

    @classmethod
    def of(cls, record: RunRecord, fields: Mapping[str, object]) -> Entry:
        """A run with these fields, of whatever types they are.

        Raises:
            ValueError: One that is needed is missing or wrong.
        """
        how, ended_at = fields.get("how"), _time(fields, "ended_at")
        if how not in file.HOW or ended_at is None:
            raise ValueError("not the end of a run")
        running_at, alive_at = _time(fields, file.RUNNING_AT), _time(fields, "alive_at")
        ended_at = max(ended_at, record.started_at)  # a clock may have been set back
        if running_at is not None:
            running_at = min(max(running_at, record.started_at), ended_at)
        if alive_at is not None:
            alive_at = min(max(alive_at, running_at or record.started_at), ended_at)
        return cls(
            record=record,
            how=str(how),
            ended_at=ended_at,
            running_at=running_at,
            alive_at=alive_at if how == "killed" else None,
            error=_word(fields, "error"),
            signal=_word(fields, "signal"),
            exit_status=_whole(fields, "exit_status"),
            release_failed=fields.get("release_failed") is True,
            **{
                name: _whole(fields, name) or 0
                for name in (
                    "device_bytes",
                    "temporary_bytes",
                    "collected_bytes",
                    "ghosts_stopped",
                    "leftovers_stopped",
                    "left_running",
                )
            },
        )

    @property
    def is_live(self) -> bool:
        return self.how in _LIVE

    @property
    def last_seen_at(self) -> float:
        """When it ended, as well as that is known."""
        return self.ended_at if self.alive_at is None else self.alive_at

    @property
    def waited_seconds(self) -> float | None:
        return None if self.running_at is None else self.running_at - self.record.started_at

    @property
    def ran_seconds(self) -> float | None:
        """From its lock to its end; of a run that was killed, to its last sign of life."""
        return None if self.running_at is None else self.last_seen_at - self.running_at

    @property
    def outcome(self) -> str:
        """How it ended, in a word or two."""
        if self.how == "exit":
            return f"exit {self.exit_status}"
        return {"exception": self.error, "signal": self.signal}.get(self.how) or self.how

    @property
    def ran(self) -> str:
        """How long it ran, for a person."""
        if self.ran_seconds is None:
            return "unknown"
        if self.how == RunState.WAITING.value:
            return "-"
        return "~" * (self.alive_at is not None) + output.age(self.ran_seconds)

    @property
    def waited(self) -> str:
        """How long it waited, for a person; a dash where it hardly did."""
        seconds = self.waited_seconds
        if seconds is None:
            return "unknown"
        return "-" if seconds < 1 else output.age(seconds)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was freed, stopped and left, and what went wrong."""
        told = []
        if self.release_failed:
            told.append("the release failed")
        for number, what in (
            (self.device_bytes, "of device memory freed"),
            (self.temporary_bytes, "of temporary files removed"),
            (self.collected_bytes, "of dead runs removed"),
        ):
            if number > 0:
                told.append(f"{output.size(number)} {what}")
        for number, what in (
            (self.ghosts_stopped, "of earlier runs stopped"),
            (self.leftovers_stopped, "of its own stopped"),
            (self.left_running, "left running"),
        ):
            if number:
                told.append(f"{output.count(number, 'process', 'processes')} {what}")
        return tuple(told)


def ended_runs(registry: RunRegistry, project: str | None = None) -> list[Entry]:
    """The runs that have ended, in the order of their ends.

    Raises:
        InfrastructureError: The directory of records cannot be read.
    """
    found: dict[str, Entry] = {}
    for run in (*_written(os.fspath(registry.directory)), *_found_dead(registry)):
        # The first line is the run's own: it was killed between that and the end of its record.
        if project in (None, run.record.project):
            found.setdefault(run.record.run_id, run)
    return sorted(found.values(), key=lambda run: run.last_seen_at)


def _written(directory: str) -> Iterator[Entry]:
    for line in file.read(directory):
        try:
            record, _ = from_json(line)
            yield Entry.of(record, json.loads(line))
        except (ValueError, RecursionError):
            pass  # torn, or of somebody else


def _found_dead(registry: RunRegistry) -> Iterator[Entry]:
    """Runs that were killed, and whose record is still there."""
    for run in registry.runs():
        if run.is_over and not run.was_released:
            ended = _look(registry.directory, run)
            if ended is not None and ended.running_at is not None:  # else it only ever waited
                yield ended


def _look(directory: Path, run: RegisteredRun) -> Entry | None:
    with _record_of(directory, run) as fd:
        try:
            return None if fd is None else Entry.of(run.record, file.killed(run.record, fd))
        except (OSError, ValueError):
            return None


def live_runs(registry: RunRegistry, project: str | None = None) -> list[Entry]:
    """The runs that are running or waiting, the oldest first.

    Raises:
        InfrastructureError: The directory of records cannot be read.
    """
    found = []
    for run in registry.runs():
        if not run.is_live or project not in (None, run.record.project):
            continue
        now = max(time.time(), run.record.started_at)  # a clock may have been set back
        running_at: float | None = now
        if run.state is RunState.RUNNING:
            with _record_of(registry.directory, run) as fd:
                running_at = None if fd is None else file.running_since(fd)
            if running_at is not None:
                running_at = min(max(running_at, run.record.started_at), now)
        found.append(Entry(run.record, run.state.value, now, running_at))
    return found


@contextlib.contextmanager
def _record_of(directory: Path, run: RegisteredRun) -> Iterator[int | None]:
    """The file of a run's record, open to be read; None if it was removed meanwhile."""
    try:
        fd = files.open_existing(directory / run.file_name, os.O_RDONLY)
    except (OSError, InfrastructureError):
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _time(fields: Mapping[str, object], name: str) -> float | None:
    value = fields.get(name)
    is_time = isinstance(value, (int, float)) and 0 <= value < _MOST_SECONDS
    return float(value) if is_time else None  # type: ignore[arg-type]


def _whole(fields: Mapping[str, object], name: str) -> int | None:
    value = fields.get(name)
    return value if type(value) is int and abs(value) < 2**63 else None


def _word(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    return value[:200] if isinstance(value, str) else None


def to_json(ended: Iterable[Entry]) -> dict[str, Any]:
    """What ``--json`` prints. Its schema is in docs/history.md; new fields may be added to it."""
    return {
        "version": 1,
        "at": time.time(),
        "host": processes.host_name(),
        "runs": [_run_to_json(run) for run in ended],
    }


def _run_to_json(run: Entry) -> dict[str, Any]:
    record = run.record
    return {
        "run_id": record.run_id,
        "project": record.project,
        "how": run.how,
        "error": run.error,
        "signal": run.signal,
        "exit_status": run.exit_status,
        "release_failed": run.release_failed,
        "started_at": record.started_at,
        "running_at": run.running_at,
        "alive_at": run.alive_at,
        "ended_at": run.ended_at,
        "waited_seconds": run.waited_seconds,
        "ran_seconds": run.ran_seconds,
        "pid": record.pid,
        "rank": record.rank,
        "job": record.job,
        "host": record.host,
        "user": record.user,
        "parent": record.parent,
        "argv": list(record.argv),
        "cwd": record.cwd,
        "lock": record.lock,
        "device_bytes_freed": run.device_bytes,
        "temporary_bytes_removed": run.temporary_bytes,
        "bytes_of_dead_runs_removed": run.collected_bytes,
        "ghosts_stopped": run.ghosts_stopped,
        "leftovers_stopped": run.leftovers_stopped,
        "left_running": run.left_running,
    }


def table(ended: Sequence[Entry], width: int, now: float | None = None) -> Iterator[Text]:
    """The runs, one line each, of at most ``width`` columns; where there is no room for what was
    freed and stopped, it follows below.
    """
    if not ended:
        yield Text("No run has ended yet.")
        return
    titles, rows = _columns(ended, time.time() if now is None else now)
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    name = titles.index("PROJECT")
    room = width - sum(widths) - 2 * len(widths)
    if room < 16:  # a project's name may be long; the rest is short
        widths[name] = max(8, widths[name] - (16 - room))
        room = width - sum(widths) - 2 * len(widths)
    commands = [output.command(run.record.argv) for run in ended]
    notes = ["; ".join(run.notes) for run in ended]
    wide = room > max(map(len, commands)) + 2 + max(map(len, notes))
    if wide and any(notes):
        commands = [
            f"{command:{max(map(len, commands))}}  {note}".rstrip()
            for command, note in zip(commands, notes, strict=True)
        ]
    yield _line([*titles, "COMMAND"], [*widths, room], ["bold"] * (len(widths) + 1))
    for run, cells, command, note in zip(ended, rows, commands, notes, strict=True):
        styles = [""] * (len(widths) + 1)
        styles[titles.index("HOW")] = _STYLES[run.how]
        yield _line([*cells, command], [*widths, room], styles)
        if note and not wide:
            indent = " " * (widths[0] + 2)
            yield Text(indent + output.shorten(note, width - len(indent)), output.DETAIL)


def _columns(ended: Sequence[Entry], now: float) -> tuple[list[str], list[list[str]]]:
    ranks = any(run.record.rank is not None for run in ended)
    hosts = len({run.record.host for run in ended}) > 1
    titles = ["ENDED", "PROJECT", "HOW", "WAITED", "RAN", "PID", *["RANK"] * ranks]
    rows = []
    for run in ended:
        record = run.record
        rows.append(
            [
                _when(run.last_seen_at, now),
                output.shorten(record.project, 24),
                output.shorten(run.outcome, 20),
                run.waited,
                run.ran,
                str(record.pid),
                *["-" if record.rank is None else str(record.rank)] * ranks,
                *[output.shorten(record.host, 16)] * hosts,
            ]
        )
    return titles + ["HOST"] * hosts, rows


def _when(at: float, now: float) -> str:
    """The time of day; before today, the day as well.

    >>> _when(0.0, 1e9)[:4]
    '1970'
    """
    then, today = time.localtime(at), time.localtime(now)
    if then[:3] == today[:3]:
        return time.strftime("%H:%M:%S", then)
    return time.strftime("%m-%d %H:%M" if then[0] == today[0] else "%Y-%m-%d", then)


def _line(cells: Sequence[str], widths: Sequence[int], styles: Sequence[str]) -> Text:
    line = Text()
    for cell, width, style in zip(cells, widths, styles, strict=True):
        text = Text(output.shorten(cell, width), style)
        line.append_text(text)
        line.append(" " * (width - text.cell_len + 2))
    line.rstrip()
    return line


def _draw(runs: Sequence[Entry], path: Path) -> None:
    from orchard_infra.cli.timeline import render
    from orchard_infra.cli.writing import replace_file

    try:
        replace_file(path, render(runs).encode())
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"wrote {output.count(len(runs), 'run')} to {path}")
