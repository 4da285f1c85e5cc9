"""Starts the examples of frameworks, and ends them.

script = example(server, tmp_path, "lightning_train.py", "--steps", "100000000")
script.wait_for("is in training")
end(script, "Ctrl-C")
assert script.finish() == 0
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from forking import ForkedScript, ForkServer
from support import Script

EXAMPLES = Path(__file__).parents[1] / "examples" / "frameworks"
# The example itself, as the leader of a process group, as a shell would have started it.
_AS_MAIN = """
import os, runpy, sys
os.setpgid(0, 0)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_SIGNALS = {
    "Ctrl-C": (os.killpg, signal.SIGINT),  # a terminal signals the whole group
    "SIGTERM": (os.kill, signal.SIGTERM),
    "SIGTERM to the group": (os.killpg, signal.SIGTERM),
    "kill -9": (os.kill, signal.SIGKILL),
}


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


def end(script: Script, how: str) -> None:
    """End it by a signal. It leads a process group."""
    send, signum = _SIGNALS[how]
    send(script.pid, signum)


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
            end(script, ending)
    return scripts, workers
