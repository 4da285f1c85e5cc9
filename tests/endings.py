"""The ways in which a program can end, made to happen to programs that use real frameworks, and to
the examples.

    script = example(server, tmp_path, "lightning_train.py", "--steps", "100000000")
    script.wait_for("is in training")
    send_signal(script, "Ctrl-C")
    assert script.finish() == 0
"""

from __future__ import annotations

import os
import re
import signal
import textwrap
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from forking import ForkedScript, ForkServer
from support import Script, run_python, wait_gone, wait_until

EXAMPLES = Path(__file__).parents[1] / "examples" / "frameworks"

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

# The example itself, as the leader of a process group, as a shell would have started it.
_AS_MAIN = """
import os, runpy, sys
os.setpgid(0, 0)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

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


def send_signal(script: Script, ending: str) -> None:
    """Begin to end a program that leads a process group."""
    if ending == "Ctrl-C":  # a terminal sends it to the whole group
        os.killpg(script.pid, signal.SIGINT)
    elif ending == "SIGTERM to the group":
        os.killpg(script.pid, signal.SIGTERM)
    elif ending == "SIGTERM":
        script.terminate()
    else:
        assert ending == "kill -9"
        script.kill()


def end(script: Script, ending: str, ready: str = "ready") -> list[int]:
    """Wait until the program is ready, and end it. What it had started, and is still there then."""
    script.wait_for(ready)
    started = psutil.Process(script.pid).children(recursive=True)
    if ending == "normal end":
        script.tell("end")
    elif ending == "exception":
        script.tell("fail")
    else:
        send_signal(script, ending)
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


def example(
    server: ForkServer, tmp_path: Path, name: str, *arguments: str, runs_as: str = "main.py"
) -> ForkedScript:
    """Start an example, in a process group of its own."""
    return server.run_python(tmp_path, _AS_MAIN, str(EXAMPLES / name), *arguments, name=runs_as)


def pid_of(script: Script, rank: int) -> int:
    """The pid of a rank, once it is in training. Lines of several ranks may be mixed up."""
    line = script.wait_for(f"rank {rank} (pid")
    match = re.search(rf"rank {rank} \(pid (\d+)\)", line)
    assert match is not None, line
    return int(match[1])


def stopped_after(script: Script) -> int:
    """After how many steps it was stopped, with a checkpoint."""
    line = script.wait_for("stopped (")
    match = re.search(r"stopped \(.*\) after (\d+) steps", line)
    assert match is not None, line
    return int(match[1])


def ended_on_each_side(
    server: ForkServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    sides: Sequence[str],
    ending: str,
) -> tuple[dict[str, ForkedScript], dict[str, list[int]]]:
    """One training, ended in one way: by the framework alone, in an environment ... All sides train
    at the same time, each in a directory of its own. The scripts, and the pids of the two workers
    that each of them had when it got the signal.
    """
    scripts = {}
    for side in sides:
        (tmp_path / side / "run").mkdir(parents=True, mode=0o700)
        monkeypatch.setenv("ORCHARD_INFRA_DIR", str(tmp_path / side / "run"))
        scripts[side] = server.run_python(tmp_path / side, source, side, ending)
    workers = {}
    for side, script in scripts.items():
        if ending not in ("normal", "exception"):
            script.wait_for("is in training")
            workers[side] = [child.pid for child in psutil.Process(script.pid).children()]
            assert len(workers[side]) == 2
            send_signal(script, ending)
    return scripts, workers
