"""What is on record and alive, and what becomes of processes whose parent ends."""

from __future__ import annotations

import os
import time

from orchard_infra.cli.doctor.base import Level, Setup, Verdict, run_python
from orchard_infra.inspect import look
from orchard_infra.runs.record import RunState
from orchard_infra.system import processes

_WORDS = {RunState.SURVIVORS: "dead with live processes"}


def check_runs(setup: Setup) -> Verdict:
    now = look()
    states = [now.state_of(run) for run in now.runs]
    told = [
        f"{states.count(state)} {_WORDS.get(state, state.value)}"
        for state in RunState
        if state in states
    ]
    text = ", ".join(told) if told else "none on record"
    if RunState.SURVIVORS in states:
        return Level.WARNING, text, "orchard-infra clean"
    return Level.OK, text


def check_orphans(setup: Setup) -> Verdict:
    """Make an orphan that ends, and look whether anybody reaps it."""
    if not hasattr(os, "fork"):
        return Level.OK, "not on this platform"
    pid, parent = map(int, run_python(_ORPHAN).split())
    deadline = time.monotonic() + _REAPED_WITHIN
    while (found := processes.read_stat(pid)) is not None and time.monotonic() < deadline:
        if found.ppid != parent and not processes.is_defunct(found):
            break  # another process has the pid by now
        time.sleep(0.01)
    adopter = processes.read_stat(parent)
    who = f"pid {parent} ({adopter.name if adopter else 'gone since'})"
    if found is not None and processes.is_defunct(found):
        return (
            Level.WARNING,
            f"{who} adopts orphans and does not reap them: they stay as defunct processes",
            "Start the container with --init, or the program with orchard-infra run",
        )
    return Level.OK, f"adopted and reaped by {who}"


_REAPED_WITHIN = 3.0  # seconds: some adopters look for dead children every other second only

_ORPHAN = """
import os, time
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.001)
    print(os.getpid(), os.getppid(), flush=True)
os._exit(0)
"""
