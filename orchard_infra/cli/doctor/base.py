"""What the checks share: what a check is, what it examines, and processes to try things with."""

from __future__ import annotations

import contextlib
import enum
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import attrs

from orchard_infra.cli import output
from orchard_infra.config import default_lock_path
from orchard_infra.inspect import command_of

CHILD_TIMEOUT = 120.0  # seconds, for a child process that imports torch from a slow disk


class Level(str, enum.Enum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


Verdict: TypeAlias = tuple[Level, str] | tuple[Level, str, str | None]
"""The level, what was found, and what to do about it."""


@attrs.frozen
class Check:
    """What one check found, and what to do about it."""

    name: str
    level: Level
    text: str
    advice: str | None = None


@attrs.frozen
class Setup:
    """What is examined: the place of the lock, and the environment variables of a run.

    ``lock_file`` is None for the default locks, ``lock_url`` where there is no server.
    """

    lock_file: Path | None
    environ: Mapping[str, str]
    lock_url: str | None = None

    @property
    def lock_directory(self) -> Path:
        if self.lock_file is not None:
            return self.lock_file.parent
        return default_lock_path("doctor").parent


@contextlib.contextmanager
def removed_afterwards(directory: Path) -> Iterator[None]:
    """Remove, at the end, ``directory`` and its parents where they do not exist yet."""
    missing = []
    for path in (directory, *directory.parents):
        if os.path.lexists(path):
            break
        missing.append(path)
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def run_python(code: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run ``code`` in a Python process of its own; what it prints.

    Raises:
        subprocess.CalledProcessError, subprocess.TimeoutExpired
    """
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=CHILD_TIMEOUT,
        env=None if env is None else {**os.environ, **env},
    ).stdout


def short_command(pid: int, width: int) -> str:
    """The command of a process, in at most ``width`` columns."""
    return output.shorten(output.command(command_of(pid).split(" ")), width)
