"""`orchard-infra doctor`: whether runs can be protected here, found out by trying."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from orchard_infra.cli import output
from orchard_infra.cli.doctor.base import Check, Level, Setup
from orchard_infra.cli.doctor.checks import CHECKS, examine
from orchard_infra.cli.lock_url import lock_url_option
from orchard_infra.config import check_lock_path

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
_LEVEL_WIDTH = 9
_NAME_WIDTH = 18


@click.command(
    short_help="Check whether runs can be protected here.",
    epilog="""\b
Examples:
  orchard-infra doctor
  orchard-infra doctor flock signals
  orchard-infra doctor --lock-file /scratch/me/digits.lock
  orchard-infra doctor --lock-url postgresql://db/locks
  orchard-infra doctor --json | jq '.checks[] | select(.status != "ok")'

Exits with 1 when there is a problem; warnings alone exit with 0.
""",
)
@click.option(
    "--lock-file",
    metavar="PATH",
    type=click.Path(),
    help="Examine this lock's place, too, not that of the default ones.",
)
@lock_url_option("Examine this server of locks, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; docs/cli.md has the schema.")
@click.argument("names", metavar="[CHECK]...", nargs=-1, type=click.Choice(tuple(CHECKS)))
@click.pass_context
def doctor(
    context: click.Context,
    names: tuple[str, ...],
    lock_file: str | None,
    lock_url: str | None,
    as_json: bool,
) -> None:
    """Check whether runs can be protected here, and say what to do where they cannot.

    Tries what a run does: two processes that want one lock, an orphan, a signal, torch in a
    process of its own. Changes nothing. With names of checks, only those are made.
    """
    with output.errors_told():
        path = None if lock_file is None else check_lock_path(lock_file, "--lock-file")
        setup = Setup(lock_file=path, environ=os.environ, lock_url=lock_url)
        console, progress = output.console(), output.console(stderr=True)
        animated = output.can_redraw(progress)
        checks = []
        for name, carry_out in examine(setup, names):
            shown = progress.status(f"checking {name}") if animated else contextlib.nullcontext()
            with shown:
                check = carry_out()
            checks.append(check)
            if not as_json:
                _show(check, console)
        if as_json:
            click.echo(json.dumps(to_json(checks), indent=2))
        else:
            output.write(console)
            output.write(console, _summary(checks))
    context.exit(1 if _worst(checks) is Level.PROBLEM else 0)


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """What ``--json`` prints. Its schema is in docs/cli.md; new fields may be added to it."""
    return {
        "version": 1,
        "status": _worst(checks).value,
        "checks": [
            {
                "name": check.name,
                "status": check.level.value,
                "text": check.text,
                "advice": check.advice,
            }
            for check in checks
        ],
    }


def _worst(checks: Sequence[Check]) -> Level:
    return max((check.level for check in checks), key=list(Level).index, default=Level.OK)


def _show(check: Check, console: Console) -> None:
    """One line: level, name, what was found; below it, what to do."""
    style = _STYLES[check.level]
    indent = _LEVEL_WIDTH + _NAME_WIDTH
    first, *more = output.wrapped(console, check.text, indent=indent)
    level, name = f"{check.level.value:{_LEVEL_WIDTH}}", f"{check.name:{_NAME_WIDTH}}"
    output.write(console, Text.assemble((level, style), name, first[indent:]))
    for line in more:
        output.write(console, line)
    if check.advice is not None:
        for line in output.wrapped(console, f"-> {check.advice}", indent=indent, style="bold"):
            output.write(console, line)


def _summary(checks: Sequence[Check]) -> Text:
    levels = [check.level for check in checks]
    problems, warnings = levels.count(Level.PROBLEM), levels.count(Level.WARNING)
    if not problems and not warnings:
        return Text("Runs are protected here.", "green")
    told = [output.count(problems, "problem")] * bool(problems)
    told += [output.count(warnings, "warning")] * bool(warnings)
    return Text(f"{' and '.join(told)}.", _STYLES[_worst(checks)])
