"""Formatting that the commands share."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

import click
from click.shell_completion import CompletionItem
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from orchard_infra.errors import InfrastructureError
from orchard_infra.runs.registry import RunRegistry
from orchard_infra.system.text import printable

UNLIMITED = 100_000  # columns of what is no terminal: one line an item, for grep and awk
NARROWEST = 40  # columns: below that, lines are left to be cut by the terminal
FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h
DETAIL = "dim"  # style of what is said beside the point


def console(*, stderr: bool = False) -> Console:
    """A console for text from anywhere: nothing in it is taken for markup or an emoji.

    Colours only on a terminal, and not with NO_COLOR. A pipe is as wide as it is asked to be by
    COLUMNS, and else never wraps.
    """
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # Under LANG=C somebody's directory name must not end the command.
        stream.reconfigure(errors="backslashreplace")
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not _is_tty(stream) and not os.environ.get("COLUMNS", "").isdigit():
        made.width = UNLIMITED
    return made


def can_redraw(console: Console) -> bool:
    """Whether lines can be overwritten: on a terminal that can move its cursor.

    FORCE_COLOR makes rich take a pipe for a terminal. It asks for colours, not for a spinner.
    """
    stream = sys.stderr if console.stderr else sys.stdout
    return _is_tty(stream) and not console.is_dumb_terminal


def _is_tty(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def width_of(console: Console, width: int | None = None) -> int:
    """How many columns there are to write to."""
    return max(console.width if width is None else width, NARROWEST)


def write(console: Console, line: Text | str = "") -> None:
    """Print one line as it is: neither wrapped nor cut."""
    console.print(line, no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)


def wrapped(console: Console, text: str, *, indent: int = 0, style: str = "") -> list[Text]:
    """Text of our own, which may quote others', in as many lines as it takes."""
    room = width_of(console) - indent
    if console.width >= UNLIMITED:
        return [Text(" " * indent + printable(text), style=style)]
    lines = Text(printable(text), style=style).wrap(console, room)
    for line in lines:
        line.rstrip()
    return [Text.assemble(" " * indent, line) for line in lines]


def shorten(text: str, width: int) -> str:
    """``text`` in at most so many columns, wide characters counted, nothing that acts on a
    terminal left in it.

    >>> shorten("python train.py --lr 3", 14)
    'python trai...'
    """
    text = printable(text)
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(width - 3, 0)).rstrip() + "..."[: max(width, 0)]


def shorten_path(path: str, width: int, home: str | None = None) -> str:
    """A path in at most so many columns: its end tells most, so the beginning goes.

    >>> shorten_path("/scratch/me/experiments/digits", 20, home="/home/me")
    '...xperiments/digits'
    """
    path = printable(path)
    home = os.path.expanduser("~") if home is None else home
    if home not in ("", "/") and (path == home or path.startswith(home + "/")):
        path = "~" + path[len(home) :]
    if cell_len(path) <= width:
        return path
    while path and cell_len(path) > max(width - 3, 0):
        path = path[1:]
    return "..."[: max(width, 0)] + path


def command(argv: Sequence[str]) -> str:
    """A command line for a table, without the directory of its program.

    >>> command(["/opt/conda/envs/digits/bin/python", "train.py", "--lr", "3"])
    'python train.py --lr 3'
    """
    if not argv:
        return ""
    return " ".join((argv[0].rpartition("/")[2], *argv[1:]))[:1000]


def size(bytes_: int | None) -> str:
    """A number of bytes for a person.

    >>> size(1288490188)
    '1.2 GiB'
    """
    if bytes_ is None:
        return "unknown"
    value = float(bytes_)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def age(seconds: float) -> str:
    """A length of time in at most six columns, for a table.

    >>> age(7509)
    '2h05m'
    """
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def count(number: int, one: str, many: str | None = None) -> str:
    """
    >>> count(2, "process", "processes"), count(1, "record")
    ('2 processes', '1 record')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Turn an error of the library into one line on stderr and exit status 1."""
    try:
        yield
    except InfrastructureError as error:
        raise click.ClickException(printable(str(error))) from error


def complete_project(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> Sequence[CompletionItem]:
    """The projects that have a run on record, for a shell that completes."""
    try:
        projects = {run.record.project: run for run in RunRegistry().runs()}
    except InfrastructureError:
        return []
    return [
        CompletionItem(name, help=f"{run.state.value}, pid {run.record.pid}")
        for name, run in sorted(projects.items())
        if name.startswith(incomplete) and name.isprintable()
    ]
