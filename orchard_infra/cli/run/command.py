"""`orchard-infra run`: any command under the lock of a project.

The exit status is that of the command, 128 + n when signal n ended it, and else

===  ==============================================================================
  2  the command line is wrong
 75  another run has the project (EX_TEMPFAIL of sysexits.h; ``--locked-exit``)
125  the lock cannot be used, the environment not be set up, or the wrapper failed
126  the command was found, and cannot be executed
127  the command was not found
===  ==============================================================================
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from orchard_infra.cli.lock_url import lock_url_option
from orchard_infra.config import Settings, check_lock_path, check_project_name, default_lock_path
from orchard_infra.errors import ConfigurationError
from orchard_infra.system.text import printable

_EXAMPLES = """\b
Examples:
  orchard-infra run -p digits -- python train.py --lr 0.1
  orchard-infra run -p digits --wait -- torchrun --nproc-per-node 2 train.py
  orchard-infra run --lock-file data/a.lock --report run.json -- ./train.sh
  orchard-infra run -p digits --lock-url postgresql://db/locks -- ./train.sh
"""


def _project(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return None if value is None else check_project_name(value, "the project's name")
    except ConfigurationError as error:
        raise click.BadParameter(printable(str(error))) from error


def _lock_path(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    try:
        return None if value is None else check_lock_path(value, "it")
    except ConfigurationError as error:
        raise click.BadParameter(printable(str(error))) from error


def _seconds(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """None is for ever, as it is for `FileLock`."""
    if value is None:
        return 0.0
    if value == _FOREVER:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise click.BadParameter(f"{value!r} is no number of seconds; is a '--' missing?")
    return seconds


def _complete_project(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> Sequence[Any]:
    from orchard_infra.cli.output import complete_project

    return complete_project(ctx, parameter, incomplete)


_FOREVER = "for ever"


@click.command(
    epilog=_EXAMPLES,
    context_settings={"allow_interspersed_args": False, "max_content_width": 100},
    short_help="Run a command under a lock, and leave nothing behind.",
)
@click.option(
    *("-p", "--project"),
    metavar="PROJECT",
    callback=_project,
    shell_complete=_complete_project,
    help="Whose lock to hold while the command runs.",
)
@click.option(
    "--lock-file", metavar="PATH", callback=_lock_path, help="Hold this lock, in place of -p."
)
@lock_url_option("Hold the lock on this server, too, against other hosts.")
@click.option(
    "--wait",
    is_flag=False,
    flag_value=_FOREVER,
    metavar="[SECONDS]",
    callback=_seconds,
    help="Wait for another run to end; without a number, for ever.",
)
@click.option(
    "--allow-process-kill", is_flag=True, help="Stop proven leftovers of dead runs first."
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    metavar="S",
    help="Seconds between SIGTERM and SIGKILL.",
)
@click.option(
    "--stop-grace",
    type=click.FloatRange(min=0),
    metavar="S",
    help="The same after a stop signal; without it, until the sender kills.",
)
@click.option("--keep-background", is_flag=True, help="Leave what outlives the command.")
@click.option(
    "--locked-exit",
    type=click.IntRange(0, 255),
    default=75,
    show_default=True,
    metavar="N",
    help="Exit status when another run has the project.",
)
@click.option(
    "--report",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write what happened there, as JSON.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD ...")
def run(
    project: str | None,
    lock_file: Path | None,
    lock_url: str | None,
    wait: float | None,
    allow_process_kill: bool,
    grace: float,
    stop_grace: float | None,
    keep_background: bool,
    locked_exit: int,
    report: Path | None,
    command: tuple[str, ...],
) -> None:
    """Run CMD under the lock of a project, and leave nothing of it behind.

    CMD has the terminal, gets the signals and gives the exit status, as if it ran alone: 128 + n
    for a signal, 126 or 127 if it cannot be run, 75 if another run has the project.
    """
    if (project is None) == (lock_file is None):
        raise click.UsageError("Say which lock to hold: either -p PROJECT or --lock-file PATH.")
    if sys.platform != "linux":
        raise click.ClickException("run works on Linux only; use managed_environment in Python")
    from orchard_infra.cli.run.protected import ProtectedCommand, tell

    _occupy_standard_descriptors()
    if lock_file is None:
        assert project is not None
        lock_file = default_lock_path(project)
    protected = ProtectedCommand(
        settings=Settings(
            project=_name_of(lock_file) if project is None else project,
            allow_process_kill=allow_process_kill,
            lock_path=lock_file,
        ),
        timeout=wait,
        grace=grace,
        stop_grace=stop_grace,
        keep_background=keep_background,
        locked_exit=locked_exit,
        command=command,
        lock_url=lock_url,
    )
    # Where it is to be is found out now: the working directory may go away.
    report_path = None if report is None else Path(os.path.abspath(report))
    status = protected.carry_out()
    if report_path is not None:
        failure = _write_report(report_path, protected.report)
        if failure is not None:
            tell(f"cannot write the report {report_path}: {failure}")
    _exit(status)


def _write_report(path: Path, report: dict[str, Any]) -> str | None:
    """Write the report; why it could not be done."""
    import json

    from orchard_infra.cli.writing import replace_file

    try:
        replace_file(path, json.dumps(report, indent=2).encode() + b"\n")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _exit(status: int) -> NoReturn:
    """Exit without the interpreter's clean-up, which is a tenth of the wrapper's time."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def _name_of(lock_path: Path) -> str:
    """A project name for a lock that was given by its path."""
    return printable(lock_path.stem)[:200].strip() or "?"


def _occupy_standard_descriptors() -> None:
    """Open whichever of 0, 1, 2 is closed: else the lock file would get that number, and a message
    would be printed into it.

    What is opened here is closed in the command, which finds them as we did.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
