"""A full cycle with all defaults, on a machine with 1,500 other processes.

Prepare looks at the command line of every process for ghosts of this script. It is compared to
one psutil.process_iter scan, which is the least that a search by name costs, and to reading every
command line once. All processes are our own here. Nine in ten are `sleep`, one in ten is another
Python script.
"""

from __future__ import annotations

import sys
from pathlib import Path

from _crowd import crowd
from _cycles import CMDLINES, CMDLINES_RAW, DEFAULT, FIRST_SCAN, LATER_SCAN, NO_FLUSH, measured
from _harness import Goal, Outcome, main, process_count, ratio

CROWD = 1500


def measure(quick: bool, directory: Path) -> Outcome:
    size = 100 if quick else CROWD
    with crowd(sleeping=size * 9 // 10, pythons=size // 10):
        found = process_count()
        samples = measured(
            3 if quick else 15, DEFAULT, NO_FLUSH, FIRST_SCAN, LATER_SCAN, CMDLINES, CMDLINES_RAW
        )
    outcome = Outcome(base=LATER_SCAN)
    outcome.add(samples, "ms", 1e3)
    outcome.notes = [f"{found} processes on the machine"]
    for name in (DEFAULT, NO_FLUSH):
        outcome.goals += [
            Goal(f"{name}, against {other}", ratio(samples, name, other), limit)
            for other, limit in ((FIRST_SCAN, 0.5), (LATER_SCAN, 0.5), (CMDLINES, 2.5))
        ]
    return outcome


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
