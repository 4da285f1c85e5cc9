"""The process in which full cycles are measured: a script, as a training program is.

It is a process of its own because what a cycle costs depends on who asks: one with children of
its own, or that is run by ``python -c``, would make it another measurement.

    python _cycles.py measure ROUNDS CONTENDER ...
    python _cycles.py hold RUNS                     runs of this script, until stdin is closed
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import attrs
import psutil
from _crowd import children, hold
from _harness import keep_quiet, python, take_turns, timed

from orchard_infra import (
    EnvironmentConfig,
    InfrastructureManager,
    RunRegistry,
    RunState,
    managed_environment,
)
from orchard_infra.runs.record import describe_this_run, to_json

DEFAULT = "managed_environment, all defaults"
NO_FLUSH = "managed_environment, no flusher"
DEAD_RUNS = "managed_environment, 100 dead runs"
FIRST_SCAN = "process_iter, first scan"
LATER_SCAN = "process_iter, later scan"
CMDLINES = "every cmdline, open().read()"
CMDLINES_RAW = "every cmdline, os.open, os.read"


def measured(rounds: int, *contenders: str) -> dict[str, list[float]]:
    """Measure them in a fresh process; the samples of each, in seconds."""
    command = python(str(Path(__file__)), "measure", str(rounds), *contenders)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    samples: dict[str, list[float]] = json.loads(output)
    return samples


def sweep(runs: int) -> list[str]:
    """The command line of so many live runs of this very script."""
    return python(str(Path(__file__)), "hold", str(runs))


def _default() -> None:
    with managed_environment("measured"):
        pass


def _no_flush() -> None:
    with managed_environment("measured", manager=InfrastructureManager(flusher=None)):
        pass


def _scan() -> None:
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        process.info  # noqa: B018


def _read_cmdlines() -> None:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    file.read()
            except OSError:
                pass


def _read_cmdlines_raw() -> None:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fd = os.open(f"/proc/{name}/cmdline", os.O_RDONLY)
            except OSError:
                continue
            try:
                os.read(fd, 65536)
            except OSError:
                pass
            finally:
                os.close(fd)


def _first_scan() -> float:
    psutil.process_iter.cache_clear()
    return timed(_scan)()


def _later_scan() -> float:
    _scan()
    return timed(_scan)()


def _after_dead_runs() -> float:
    """As after a power cut: a hundred records that nobody holds."""
    registry = RunRegistry()
    this = describe_this_run("dead")
    registry.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(100):
        # A create time that no process has: whoever has the pid now is somebody else.
        dead = attrs.evolve(this, run_id=f"{number:016x}", create_time=0.0)
        path = registry.directory / f"{dead.run_id}.run"
        path.write_bytes(to_json(dead, RunState.RUNNING))
    return timed(_default)()


_CONTENDERS = {
    DEFAULT: timed(_default),
    NO_FLUSH: timed(_no_flush),
    DEAD_RUNS: _after_dead_runs,
    FIRST_SCAN: _first_scan,
    LATER_SCAN: _later_scan,
    CMDLINES: timed(_read_cmdlines),
    CMDLINES_RAW: timed(_read_cmdlines_raw),
}


def _hold_runs(runs: int) -> None:
    with children() as alive:
        for number in range(runs):
            ready, tell = os.pipe()
            pid = os.fork()
            if pid == 0:
                _be_a_run(number, tell)
            alive.add(pid)
            os.close(tell)
            if not os.read(ready, 1):
                raise RuntimeError("a run ended before it was ready")
            os.close(ready)
        hold(alive)


def _be_a_run(number: int, tell: int) -> NoReturn:
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        manager = InfrastructureManager(sanitizer=None, flusher=None, cleaner=None)
        with managed_environment(EnvironmentConfig(f"sweep-{number}"), manager=manager):
            os.write(tell, b".")
            os.close(tell)
            time.sleep(1800)
    finally:
        os._exit(0)


if __name__ == "__main__":
    keep_quiet()
    if sys.argv[1] == "hold":
        _hold_runs(int(sys.argv[2]))
    else:
        names = sys.argv[3:]
        found = take_turns({name: _CONTENDERS[name] for name in names}, int(sys.argv[2]))
        print(json.dumps(found))
