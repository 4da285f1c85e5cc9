"""Stopping processes that ignore SIGTERM: one grace period for all of them, then SIGKILL.

`stop_processes` and the recipe in psutil's documentation (terminate, wait_procs, kill,
wait_procs) are given processes of another parent. A managed_environment with
`GhostSanitizer(leftovers="stop")` has to stop children when it ends. What is shown is the time
beyond the grace period.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from _crowd import crowd, fork_sleeper
from _harness import Goal, Outcome, main, take_turns

from orchard_infra import (
    EnvironmentConfig,
    GhostSanitizer,
    InfrastructureManager,
    managed_environment,
)
from orchard_infra.system import processes
from orchard_infra.system.killing import stop_processes

NUMBERS = (1, 8, 64)
PARTS = ("stop_processes", "psutil's recipe", 'managed_environment, leftovers="stop"')


def measure(quick: bool, directory: Path) -> Outcome:
    grace = 0.2 if quick else 1.0
    contenders = {
        f"{name}, {number}": functools.partial(stop, number, grace)
        for number in NUMBERS
        for name, stop in zip(PARTS, (_ours, _psutils, _leftovers), strict=True)
    }
    samples = take_turns(contenders, rounds=1 if quick else 7, warm_up=0)
    outcome = Outcome()
    outcome.add(samples, "ms", 1e3)
    outcome.notes = [f"the grace period is {grace:g} s, and not counted"]
    worst = {name: max(samples[f"{name}, {NUMBERS[-1]}"]) for name in PARTS}
    outcome.goals = [
        Goal(f"{name}, {NUMBERS[-1]}, beyond the grace period, at worst", worst[name], 2, "s")
        for name in (PARTS[0], PARTS[2])
    ]
    return outcome


def _ours(number: int, grace: float) -> float:
    def stop(pids: Sequence[int]) -> None:
        found = [identity for pid in pids if (identity := processes.identity_of(pid))]
        stop_processes(found, grace=grace, spare=lambda pid: False)

    return _time_to_end(stop, number) - grace


def _psutils(number: int, grace: float) -> float:
    def stop(pids: Sequence[int]) -> None:
        found = [psutil.Process(pid) for pid in pids]
        for process in found:
            process.terminate()
        _, alive = psutil.wait_procs(found, timeout=grace)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=30.0)  # what a busy machine takes is measured, not failed

    return _time_to_end(stop, number) - grace


def _time_to_end(stop: Callable[[Sequence[int]], None], number: int) -> float:
    with crowd(stubborn=number) as pids:
        began = time.perf_counter()
        stop(pids)
        taken = time.perf_counter() - began
        _check(pids)
    return taken


def _leftovers(number: int, grace: float) -> float:
    manager = InfrastructureManager(
        sanitizer=GhostSanitizer(grace=grace, leftovers="stop"),
        flusher=None,
        cleaner=None,
        stopper=None,
    )
    cfg = EnvironmentConfig("stubborn", allow_process_kill=True)
    with managed_environment(cfg, manager=manager):
        pids = [fork_sleeper(ignoring=signal.SIGTERM) for _ in range(number)]
        began = time.perf_counter()
    taken = time.perf_counter() - began
    _check(pids)
    for pid in pids:
        os.waitpid(pid, 0)
    return taken - grace


def _check(pids: Sequence[int]) -> None:
    for pid in pids:
        stat = processes.read_stat(pid)
        if stat is not None and not processes.is_defunct(stat):
            raise RuntimeError(f"{pid} is still there")


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
