"""`orchard-infra status`: every run of this user on this machine, one row each."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import attrs
import click
import psutil
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from orchard_infra.cli import output
from orchard_infra.cli.lock_url import lock_url_option
from orchard_infra.errors import InfrastructureError
from orchard_infra.inspect import (
    ProcessIdentity,
    RegisteredRun,
    RunState,
    Survivor,
    look,
    memory_of,
)
from orchard_infra.locks.base import ServerLock
from orchard_infra.locks.urls import find_url, lock_from_url, redacted, shown
from orchard_infra.runs.record import RunRecord
from orchard_infra.runs.registry import RunRegistry
from orchard_infra.system import processes
from orchard_infra.system.text import printable

_SAMPLE = 0.2  # seconds between two looks at the processor time, for one look at the runs
_PATH_WIDTH = 24  # columns for a path, where there are not enough for all
_INTERVAL = 1.0  # seconds between two looks with --watch
_STATE_WORDS = {
    RunState.RUNNING: Text("running", "green"),
    RunState.WAITING: Text("waiting", "yellow"),
    RunState.ENDED: Text("ended", "cyan"),
    RunState.SURVIVORS: Text("survivors only", "red"),
    RunState.DEAD: Text("dead", "dim"),
}


@click.command(
    short_help="Show every run: running, waiting, dead, and its survivors.",
    epilog="""\b
Examples:
  orchard-infra status
  orchard-infra status --watch
  orchard-infra status --lock-url postgresql://db/locks
  orchard-infra status --json | jq '.runs[] | select(.state == "running").pid'
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; docs/cli.md has the schema.")
@click.option("-w", "--watch", is_flag=True, help="Look again every second, until Ctrl-C.")
@click.option(
    "-p",
    "--project",
    metavar="PROJECT",
    shell_complete=output.complete_project,
    help="Only the runs of this project.",
)
@lock_url_option("Show the runs on other hosts, too, that hold a lock on this server.")
@click.pass_context
def status(
    context: click.Context, as_json: bool, watch: bool, project: str | None, lock_url: str | None
) -> None:
    """Show your runs on this machine: running, waiting, dead, and what survives of dead ones.

    Memory and processor time are those of the whole process tree. 100 % is one core. GPU memory is
    shown where pynvml can be imported.
    """
    with output.errors_told():
        survey = Survey(RunRegistry(), project, lock_url)
        console = output.console()
        if not watch:
            found = survey.look()
            _print(found, console, as_json=as_json)
            context.exit(1 if found.server is not None and found.server.why_unknown else 0)
        try:
            if as_json or not output.can_redraw(console):
                while True:
                    _print(survey.look(), console, as_json=as_json, lines=True)
                    time.sleep(_INTERVAL)
            _watch(survey, console)
        except KeyboardInterrupt:
            pass  # it is how one leaves


@attrs.frozen
class Gpu:
    """GPU memory by pid, in bytes; None for a process whose use the driver does not report.

    ``why_unknown`` says why nothing is known, and is None when something is.
    """

    by_pid: dict[int, int | None]
    why_unknown: str | None = None
    library: str | None = "pynvml"

    def of(self, members: Iterable[ProcessIdentity]) -> int | None:
        """What these processes use together; None where that cannot be told."""
        if self.why_unknown is not None:
            return None
        total = 0
        for member in members:
            used = self.by_pid.get(member.pid, 0)
            if used is None:
                return None
            total += used
        return total


@attrs.frozen
class Server:
    """A server that carries locks, without its password; why its runs are unknown, if they are."""

    address: str
    why_unknown: str | None = None


@attrs.frozen
class Row:
    """One run as it is shown. ``cpu`` is in percent of one core, memory in bytes; None: unknown."""

    run: RegisteredRun
    state: RunState
    members: tuple[ProcessIdentity, ...] = ()
    survivors: tuple[Survivor, ...] = ()
    cpu: float | None = None
    memory: int | None = None
    gpu: int | None = None


@attrs.frozen
class Snapshot:
    """All runs at one moment; ``at`` is in epoch seconds."""

    at: float
    rows: tuple[Row, ...]
    gpu: Gpu
    server: Server | None = None


@attrs.define
class Survey:
    """Looks at the runs, again and again: processor time is what was used between two looks.

    Raises:
        ConfigurationError: ``lock_url`` cannot be used.
    """

    registry: RunRegistry
    project: str | None = None
    lock_url: str | None = None
    _lock: ServerLock | None = attrs.field(default=None, init=False)
    _seconds: dict[ProcessIdentity, float] = attrs.field(factory=dict)
    _sampled_at: float | None = None

    def __attrs_post_init__(self) -> None:
        if self.lock_url is not None:
            self._lock = lock_from_url(self.lock_url)

    def look(self) -> Snapshot:
        server, records = self._ask_server()
        now = look(self.registry)
        shown = [
            run
            for run in now.runs
            if self.project in (None, run.record.project)
            # A run that ended well has died of nothing, although its record is still there: its
            # children outlived the program by a moment, as ranks of Lightning and Ray's servers do.
            and not (run.was_released and now.state_of(run) is RunState.DEAD)
        ]
        members = {run.record.run_id: now.members_of(run) for run in shown}
        if self._sampled_at is None and any(members.values()):
            self._sample(members)
            time.sleep(_SAMPLE)
        cpu = self._sample(members)
        gpu = read_gpu()
        rows = []
        for run in shown:
            run_id = run.record.run_id
            # The processes of another pid or time namespace cannot be told from here.
            known = run.record.is_local or run.is_over
            rows.append(
                Row(
                    run=run,
                    state=now.state_of(run),
                    members=members[run_id],
                    survivors=now.survivors_of(run),
                    cpu=cpu[run_id] if known else None,
                    memory=memory_of(members[run_id]) if known else None,
                    gpu=gpu.of(members[run_id]) if known else None,
                )
            )
        on_record = {run_id for run in now.runs for run_id in run.run_ids}
        for record in records:
            # One that is on record here is shown from here, where more is known of it.
            if record.run_id not in on_record and self.project in (None, record.project):
                rows.append(Row(RegisteredRun(record, RunState.RUNNING), RunState.RUNNING))
        rows.sort(key=lambda row: row.run.record.started_at)
        return Snapshot(time.time(), tuple(rows), gpu, server)

    def _ask_server(self) -> tuple[Server | None, Sequence[RunRecord]]:
        if self._lock is None:
            return None, ()
        address = shown(find_url(self.lock_url))
        try:
            return Server(address), self._lock.runs()
        except InfrastructureError as error:
            return Server(address, redacted(str(error))), ()

    def _sample(self, members: Mapping[str, Iterable[ProcessIdentity]]) -> dict[str, float | None]:
        """The processor time that each run used since the last sample, in percent of one core."""
        now = time.monotonic()
        seconds = {
            identity: spent
            for identity in {one for those in members.values() for one in those}
            if (spent := _cpu_seconds(identity)) is not None
        }
        before, began = self._seconds, self._sampled_at
        self._seconds, self._sampled_at = seconds, now
        if began is None or now <= began:
            return dict.fromkeys(members)
        passed = now - began

        def used(identity: ProcessIdentity) -> float:
            if identity not in seconds or not (identity in before or _is_younger(identity, passed)):
                return 0.0
            return seconds[identity] - before.get(identity, 0.0)

        return {run_id: 100 * sum(map(used, those)) / passed for run_id, those in members.items()}


def to_json(look: Snapshot) -> dict[str, Any]:
    """What ``--json`` prints. Its schema is in docs/cli.md; new fields may be added to it."""
    return {
        "version": 1,
        "at": look.at,
        "host": processes.host_name(),
        "gpu": {"library": look.gpu.library, "unknown_because": look.gpu.why_unknown},
        "lock_server": look.server
        and {"address": look.server.address, "unknown_because": look.server.why_unknown},
        "runs": [_row_to_json(row, look.at) for row in look.rows],
    }


def _row_to_json(row: Row, now: float) -> dict[str, Any]:
    record = row.run.record
    return {
        "run_id": record.run_id,
        "project": record.project,
        "state": row.state.value,
        "pid": record.pid,
        "rank": record.rank,
        "host": record.host,
        "user": record.user,
        "is_local": record.is_local,
        "parent": record.parent,
        "argv": list(record.argv),
        "cwd": record.cwd,
        "lock": record.lock,
        "tmp_dir": record.tmp_dir,
        "started_at": record.started_at,
        "age_seconds": max(0.0, now - record.started_at),
        "pids": [member.pid for member in row.members],
        "cpu_percent": None if row.cpu is None else round(row.cpu, 1),
        "memory_bytes": row.memory,
        "gpu_memory_bytes": row.gpu,
        "survivors": [
            {
                "pid": one.pid,
                "command": one.command,
                "evidence": one.evidence,
                "kind": one.kind,
            }
            for one in row.survivors
        ],
    }


def read_gpu() -> Gpu:
    """What the NVIDIA driver reports of the processes. It is asked only through pynvml."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old one asks to be replaced
            pynvml: Any = import_module("pynvml")
    except ImportError:
        return Gpu({}, "pynvml cannot be imported (package nvidia-ml-py)", library=None)
    try:
        pynvml.nvmlInit()
    except Exception as error:  # no driver, or one that does not match
        return Gpu({}, f"the NVIDIA driver does not answer: {error}")
    try:
        if processes.pid_namespace() != output.FIRST_PID_NAMESPACE:
            return Gpu({}, "the driver's pids are not those of this container")
        return Gpu(_gpu_memory(pynvml))
    except Exception as error:
        return Gpu({}, f"the NVIDIA driver does not tell: {error}")
    finally:
        pynvml.nvmlShutdown()


def _gpu_memory(pynvml: Any) -> dict[int, int | None]:
    by_pid: dict[int, int | None] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        device = pynvml.nvmlDeviceGetHandleByIndex(index)
        used = {one.pid: one for one in pynvml.nvmlDeviceGetGraphicsRunningProcesses(device)}
        # A process may be in both lists, with the same memory.
        used.update({one.pid: one for one in pynvml.nvmlDeviceGetComputeRunningProcesses(device)})
        for pid, one in used.items():
            known = by_pid.get(pid, 0)
            missing = one.usedGpuMemory is None or known is None
            by_pid[pid] = None if missing else known + one.usedGpuMemory
    return by_pid


def _cpu_seconds(identity: ProcessIdentity) -> float | None:
    try:
        times = psutil.Process(identity.pid).cpu_times()
    except (psutil.Error, OSError):
        return None
    if processes.identity_of(identity.pid) != identity:
        return None
    return float(times.user + times.system)


def _is_younger(identity: ProcessIdentity, seconds: float) -> bool:
    return processes.now() - identity.create_time <= seconds


def _print(look: Snapshot, console: Console, *, as_json: bool, lines: bool = False) -> None:
    if as_json:
        click.echo(json.dumps(to_json(look), indent=None if lines else 2))
        return
    for line in table(look, output.width_of(console)):
        output.write(console, line)


def _watch(survey: Survey, console: Console) -> None:
    from rich.live import Live

    view = _View(survey.look())
    with Live(view, console=console, screen=True, auto_refresh=True, refresh_per_second=4):
        while True:
            time.sleep(_INTERVAL)
            view.look = survey.look()


@attrs.define
class _View:
    """The last snapshot, drawn anew for each refresh: the terminal may have been resized."""

    look: Snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        clock = time.strftime("%H:%M:%S", time.localtime(self.look.at))
        yield Text(f"{clock}  Ctrl-C ends", style=output.DETAIL, no_wrap=True)
        yield Text("")
        for line in table(self.look, output.width_of(console, options.max_width)):
            line.no_wrap = True
            line.overflow = "crop"
            yield line


def table(look: Snapshot, width: int) -> Iterator[Text]:
    """The runs in lines of at most ``width`` columns.

    Where there is room a run is one line; elsewhere its command, directory and lock follow below.
    """
    if not look.rows:
        yield Text("No runs.")
        yield from _notes(look, width)
        return
    header, *rows = _columns(look)
    widths = [max(cell.cell_len for cell in column) for column in zip(header, *rows, strict=True)]
    over = sum(widths) + 2 * len(widths) - 2 - width
    if over > 0:  # a project's name may be long; the numbers are short
        widths[0] = max(8, widths[0] - over)
    room = width - sum(widths) - 2 * len(widths)
    wide = room >= 90
    details = [_details(row) for row in look.rows]
    detail_widths = _share(room - 4, ("COMMAND", "DIRECTORY", "LOCK"), details) if wide else []
    if wide:
        titles = ("COMMAND", "DIRECTORY", "LOCK")
        header = [*header, *(Text(title, "bold") for title in titles)]
    yield _line(header, [*widths, *detail_widths])
    for row, cells, detail in zip(look.rows, rows, details, strict=True):
        if wide:
            command, cwd, lock = detail
            cells = [
                *cells,
                Text(output.shorten(command, detail_widths[0])),
                Text(output.shorten_path(cwd, detail_widths[1])),
                Text(output.shorten_path(lock, detail_widths[2])),
            ]
        yield _line(cells, [*widths, *detail_widths])
        yield from _below(row, detail, width, whole=not wide)
    yield from _notes(look, width)


def _columns(look: Snapshot) -> list[list[Text]]:
    """The cells of the columns that are never left out for want of room, header first."""
    ranks = any(row.run.record.rank is not None for row in look.rows)
    gpu = look.gpu.library is not None
    titles = ["PROJECT", "STATE", "PID", "AGE", *["RANK"] * ranks, "CPU", "MEMORY", *["GPU"] * gpu]
    lines = [[Text(title, "bold") for title in titles]]
    for row in look.rows:
        record = row.run.record
        lines.append(
            [
                Text(output.shorten(record.project, 40)),
                _STATE_WORDS[row.state].copy(),
                Text(str(record.pid)),
                Text(output.age(look.at - record.started_at)),
                *[Text("-" if record.rank is None else str(record.rank))] * ranks,
                Text(_percent(row)),
                Text(_bytes(row, row.memory)),
                *[Text(_bytes(row, row.gpu))] * gpu,
            ]
        )
    return lines


def _percent(row: Row) -> str:
    if row.state is RunState.DEAD:
        return "-"
    return "unknown" if row.cpu is None else f"{row.cpu:.0f}%"


def _bytes(row: Row, number: int | None) -> str:
    return "-" if row.state is RunState.DEAD else output.size(number)


def _details(row: Row) -> tuple[str, str, str]:
    record = row.run.record
    return output.command(record.argv), record.cwd, record.lock or "-"


def _share(room: int, titles: Sequence[str], details: Sequence[Sequence[str]]) -> list[int]:
    """Widths for a command and two paths that together need more than there is.

    The paths give way first, down to what tells most of them; then the widest.
    """
    # Printed as they will be, since an escape takes more room than what it stands for.
    wanted = [
        max(len(title), *(cell_len(printable(row[at])) for row in details))
        for at, title in enumerate(titles)
    ]
    while sum(wanted) > room:
        paths = [at for at in (1, 2) if wanted[at] > _PATH_WIDTH] or range(len(wanted))
        wanted[max(paths, key=wanted.__getitem__)] -= 1
    return wanted


def _line(cells: Sequence[Text], widths: Sequence[int]) -> Text:
    line = Text()
    for cell, width in zip(cells, widths, strict=True):
        if cell.cell_len > width:
            cell = Text(output.shorten(cell.plain, width), cell.style)
        line.append_text(cell)
        line.append(" " * (width - cell.cell_len + 2))
    line.rstrip()
    return line


def _below(row: Row, detail: tuple[str, str, str], width: int, *, whole: bool) -> Iterator[Text]:
    """The lines about a run that follow its own line."""
    shown, cwd, lock = detail
    record = row.run.record
    if whole:
        yield Text(f"  {output.shorten(shown, width - 2)}", output.DETAIL)
        where, held = (
            f"in {output.shorten_path(cwd, 999)}",
            f"lock {output.shorten_path(lock, 999)}",
        )
        if len(where) + len(held) + 4 <= width:
            yield Text(f"  {where}, {held}", output.DETAIL)
        else:
            yield Text(f"  in {output.shorten_path(cwd, width - 5)}", output.DETAIL)
            yield Text(f"  lock {output.shorten_path(lock, width - 7)}", output.DETAIL)
    if not record.is_local and not row.run.is_over:
        here = record.boot_id == processes.boot_id()
        where = "in another pid or time namespace" if here else f"on {record.host}"
        yield Text(f"  {output.shorten(f'{where}: its processes are unknown here', width - 2)}")
    # The workers of one pool show one command line.
    alike: dict[tuple[str, str, str], list[str]] = {}
    for survivor in row.survivors:
        key = survivor.evidence, survivor.kind, survivor.command
        alike.setdefault(key, []).append(str(survivor.pid))
    for (evidence, kind, command), pids in alike.items():
        named = f"pid{'s' * (len(pids) > 1)} {', '.join(pids)}"
        detached = ", detached" if kind == "detached" else ""
        text = f"{named}, {evidence}{detached}: {output.command(command.split(' '))}"
        yield Text(f"  {output.shorten(text, width - 2)}", "yellow" if detached else "red")
    if row.state is RunState.ENDED:
        told = f"its program goes on, with {output.count(len(row.members), 'process', 'processes')}"
        yield Text(f"  {output.shorten(told + ' that the run started', width - 2)}", output.DETAIL)


def _notes(look: Snapshot, width: int) -> Iterator[Text]:
    notes = []
    if look.server is not None and look.server.why_unknown is not None:
        notes.append(f"Runs on other hosts are unknown: {look.server.why_unknown}")
    if look.rows and look.gpu.library is not None and look.gpu.why_unknown is not None:
        notes.append(f"GPU memory is unknown: {look.gpu.why_unknown}")
    if any(row.state in (RunState.SURVIVORS, RunState.DEAD) for row in look.rows):
        notes.append("What dead runs left: orchard-infra clean --dry-run")
    if notes:
        yield Text("")
    for note in notes:
        yield Text(output.shorten(note, width), output.DETAIL)
