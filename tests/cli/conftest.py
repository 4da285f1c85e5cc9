"""The command as a user has it: a process, or a process in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from commands import command_server
from support import PATIENCE, environment, require_module
from wrapping import Wrapper


@pytest.fixture(scope="session", autouse=True)
def commands_are_forked() -> Iterator[None]:
    with command_server():
        yield


@pytest.fixture
def wrapper(tmp_path: Path) -> Wrapper:
    return Wrapper(tmp_path)


@pytest.fixture
def in_terminal(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a command in a terminal of its own; a `pexpect.spawn`."""
    require_module("pexpect")
    import pexpect

    started = []

    def start(*command: str, env: Mapping[str, str | None] | None = None) -> Any:
        child = pexpect.spawn(
            command[0],
            list(command[1:]),
            cwd=str(tmp_path),
            env=environment({"TERM": "xterm", **(env or {})}),
            encoding="utf-8",
            timeout=PATIENCE,
            dimensions=(24, 120),
        )
        child.delaybeforesend = None
        started.append(child)
        return child

    yield start
    for child in started:
        child.close(force=True)
