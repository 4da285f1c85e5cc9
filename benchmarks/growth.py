"""How it all grows: with processes on the machine, runs on record, runs of one script, waiters.

The first three are full cycles with all defaults. "Runs of the same script" is a sweep: each of
its processes looks like a ghost until the registry has been asked. Dead runs are what a power cut
leaves; the next run has to clear them away.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from _crowd import crowd, holding
from _cycles import CMDLINES, DEAD_RUNS, DEFAULT, LATER_SCAN, measured, sweep
from _handing import OURS, hand_over, waiters
from _harness import Outcome, Row, main


def measure(quick: bool, directory: Path) -> Outcome:
    rounds = 2 if quick else 7
    outcome = Outcome()
    for name, number, machine, contenders in _machines(quick):
        with machine:
            samples = measured(rounds, *contenders)
        outcome.rows += [
            Row(f"{contender}: {number} {name}", [1e3 * seconds for seconds in taken], "ms")
            for contender, taken in samples.items()
        ]
    outcome.rows += _waiting(quick, directory)
    return outcome


def _machines(
    quick: bool,
) -> Iterator[tuple[str, int, AbstractContextManager[object], tuple[str, ...]]]:
    """What there is more and more of, how many, the machine, and whom to measure on it."""
    for number in (0, 50) if quick else (0, 500, 1000, 2000, 4000):
        machine = crowd(sleeping=number * 9 // 10, pythons=number // 10)
        yield "more processes", number, machine, (DEFAULT, LATER_SCAN, CMDLINES)
    for number in (0, 10) if quick else (0, 10, 100, 1000):
        yield "runs on record", number, crowd(runs=number), (DEFAULT,)
    for number in (0, 4) if quick else (0, 8, 16, 32, 64):
        yield "runs of the same script", number, holding(sweep(number)), (DEFAULT,)
    yield "more processes", 0, crowd(), (DEAD_RUNS,)


def _waiting(quick: bool, directory: Path) -> list[Row]:
    rows = []
    for number in (1, 2) if quick else (1, 4, 16, 64):
        first: list[float] = []
        each: list[float] = []
        usage: list[float] = []
        with waiters(number) as waiting:
            for _ in range(3 if quick else 15):
                path = directory / f"{random.getrandbits(32)}.lock"
                latency, waited = hand_over(OURS, path, waiting, hold=0.1 if quick else 0.3)
                first.append(1e3 * latency)
                passed_on = max(w.acquired_at for w in waited) - min(w.acquired_at for w in waited)
                each.append(1e3 * passed_on / max(1, number - 1))
                usage.append(sum(w.cpu_percent for w in waited))
        rows.append(Row(f"until the first of {number} waiters has it", first, "ms"))
        if number > 1:
            rows.append(Row(f"from one of {number} waiters to the next", each, "ms"))
        rows.append(Row(f"CPU of all {number} waiters", usage, "%"))
    return rows


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
