"""The ways in which a program can end, made to happen to programs that use real frameworks."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

import psutil

from support import Script, run_python, wait_gone, wait_until

ENDINGS = ("normal end", "exception", "Ctrl-C", "SIGTERM", "SIGTERM to the group", "kill -9")

# What a program with an environment exits with, unless a framework has its own way.
STATUS = {
    "normal end": 0,
    "exception": 1,
    "Ctrl-C": -signal.SIGINT,
    "SIGTERM": 128 + signal.SIGTERM,
    "SIGTERM to the group": 128 + signal.SIGTERM,
    "kill -9": -signal.SIGKILL,
}

BEGIN = """
import contextlib, os, select, signal, sys, time
from types import SimpleNamespace
from orchard_infra import (
    EnvironmentConfig, InfrastructureManager, SignalStop, current_environments, managed_environment
)

def protected(name="digits"):
    allowed = os.environ.get("KILL") != "no"
    return managed_environment(EnvironmentConfig(name, allow_process_kill=allowed))

def wait_for_the_end():
    print("ready", flush=True)
    # Not by input(): a Ctrl-C right before it blocks would wait with it.
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        pass
    if input() == "fail":
        raise ValueError("the body failed")

"""


def start(tmp_path: Path, source: str, *arguments: str, **environ: str) -> Script:
    """A program that begins with ``BEGIN``, in a process group of its own."""
    source = BEGIN + textwrap.dedent(source)
    return run_python(tmp_path, source, *arguments, env=environ, start_new_session=True)


def end(script: Script, ending: str, ready: str = "ready") -> list[int]:
    """Wait until the program is ready, and end it. What it had started, and is still there then."""
    script.wait_for(ready)
    started = psutil.Process(script.pid).children(recursive=True)
    if ending == "normal end":
        script.tell("end")
    elif ending == "exception":
        script.tell("fail")
    elif ending == "Ctrl-C":  # a terminal sends it to the whole group
        os.killpg(script.pid, signal.SIGINT)
    elif ending == "SIGTERM":
        script.terminate()
    elif ending == "SIGTERM to the group":
        os.killpg(script.pid, signal.SIGTERM)
    else:
        script.kill()
    script.finish()
    return [process.pid for process in started if process.is_running()]


def is_released(script: Script, runtime_directory: Path, ending: str) -> bool:
    """Whether the lock is as ``ending`` leaves it: there after kill -9 alone, for the next run."""
    locks = [*runtime_directory.glob("locks/*.lock")]
    assert bool(locks) == (ending == "kill -9"), script.transcript()
    return True


def runs_again(script: Script, runtime_directory: Path) -> bool:
    """Whether ``script``, a second start of the program, runs to its normal end."""
    script.wait_for("ready")
    script.tell("end")
    assert script.finish() == 0, script.transcript()
    wait_until(
        lambda: not [*runtime_directory.glob("locks/*.lock")], what="the lock to be released"
    )
    return True


def all_gone(pids: list[int]) -> bool:
    """Whether these end by themselves."""
    wait_gone(pids)
    return True
