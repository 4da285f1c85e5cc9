"""`env.agree_to_stop`, the question to all ranks once a step, against a bare all_reduce.

Four ranks on the CPU, connected by gloo. A bare all_reduce of one number is the least that any
answer costs. "Beside" is a default group that cannot work in main memory, as with NCCL.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from _harness import Goal, Outcome, main, ratio
from _ranks import BARE, WHOLE, measured

RANKS = 4
GROUPS = {"gloo": "", "cuda:gloo": ", beside"}


def measure(quick: bool, directory: Path) -> Outcome:
    outcome = Outcome(base=BARE)
    for group, suffix in GROUPS.items():
        what = f"{WHOLE}{suffix}, against {BARE}{suffix}"
        value = None
        if importlib.util.find_spec("torch") is not None:
            samples = measured(
                2 if quick else RANKS, group, 5 if quick else 60, 20 if quick else 50, directory
            )
            outcome.add({f"{name}{suffix}": taken for name, taken in samples.items()}, "us", 1e6)
            value = ratio(samples, WHOLE, BARE)
        outcome.goals.append(Goal(what, value, 1.2))
    if not outcome.rows:
        outcome.notes = ["there is no torch for this interpreter"]
    return outcome


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
