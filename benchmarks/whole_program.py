"""A program that does nothing under a lock, against importing what the package is built on.

Whole processes, from start to end: import, prepare, release and exit.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from _harness import Goal, Outcome, main, python, ratio, take_turns, whole_process

PROGRAM = 'from orchard_infra import managed_environment\nwith managed_environment("x"): pass'
FLOOR = "import attrs, psutil, portalocker"
WHAT = 'with managed_environment("x"): pass'


def measure(quick: bool, directory: Path) -> Outcome:
    programs = {WHAT: PROGRAM, FLOOR: FLOOR, "pass": "pass"}
    samples = take_turns(
        {
            name: functools.partial(whole_process, python("-c", code), directory)
            for name, code in programs.items()
        },
        rounds=3 if quick else 60,
        warm_up=2,
    )
    goal = Goal(f"{WHAT}, against {FLOOR}", ratio(samples, WHAT, FLOOR), 1.25)
    outcome = Outcome(base=FLOOR, goals=[goal])
    outcome.add(samples, "ms", 1e3)
    return outcome


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
