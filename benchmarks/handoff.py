"""Handing a lock over: from the holder's release until a waiting process has it.

And what the waiter costs meanwhile. Everybody polls as they do by default.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from _handing import LOCKS, OURS, PEER, Waited, Waiter, hand_over, waiters
from _harness import Goal, Outcome, Row, main, ratio, take_turns


def measure(quick: bool, directory: Path) -> Outcome:
    with waiters(1) as waiting:
        samples = take_turns(
            {name: functools.partial(_latency, name, directory, waiting, quick) for name in LOCKS},
            rounds=3 if quick else 40,
        )
        waits = {
            name: _long_waits(name, directory, waiting, 1 if quick else 3, 0.3 if quick else 2.0)
            for name in LOCKS
        }
    outcome = Outcome(base=PEER)
    outcome.add(samples, "ms", 1e3)
    usage = [
        Row(f"{name}, waiter's CPU", [wait.cpu_percent for wait in waits[name]], "%")
        for name in LOCKS
    ]
    outcome.rows += usage
    ours = usage[list(LOCKS).index(OURS)]
    outcome.goals = [
        Goal(f"{OURS}, median until the waiter has it", outcome.rows[0].median, 10, "ms"),
        Goal(f"{OURS}, against {PEER}", ratio(samples, OURS, PEER), 0.5),
        Goal("a waiter's share of one core", ours.median, 2, "%"),
    ]
    return outcome


def _latency(name: str, directory: Path, waiting: list[Waiter], quick: bool) -> float:
    path = _lock_path(name, directory)
    latency, _ = hand_over(name, path, waiting, hold=0.05 if quick else 0.2)
    return latency


def _long_waits(
    name: str, directory: Path, waiting: list[Waiter], times: int, hold: float
) -> list[Waited]:
    path = _lock_path(name, directory)
    return [hand_over(name, path, waiting, hold)[1][0] for _ in range(times)]


def _lock_path(name: str, directory: Path) -> Path:
    return directory / f"{list(LOCKS).index(name)}.lock"


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
