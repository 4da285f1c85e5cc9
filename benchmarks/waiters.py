"""Many waiters for one lock: what they cost together, their order, and how soon each is served.

They come one after the other while the lock is held. After a while it is released, and each waiter
holds it for a moment before it passes it on. For comparison the same without a queue, where
everybody polls and whoever comes first takes it.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
import psutil
from _handing import OURS, POLLING, Waited, Waiter, held, waiters
from _harness import Goal, Outcome, Row, main


@attrs.frozen
class _Found:
    cpu_percent: float
    out_of_order: int
    handoffs: list[float]  # milliseconds


def measure(quick: bool, directory: Path) -> Outcome:
    number = 8 if quick else 64
    outcome = Outcome()
    found: dict[str, list[_Found]] = {}
    with waiters(number, "fork") as waiting:
        for turn in range(1 if quick else 3):
            for name in (OURS, POLLING):
                path = directory / f"{turn}.lock"
                found.setdefault(name, []).append(_serve(name, path, waiting, quick))
    for name, turns in found.items():
        handoffs = [one for turn in turns for one in turn.handoffs]
        disorder = [float(turn.out_of_order) for turn in turns]
        usage = [turn.cpu_percent for turn in turns]
        outcome.rows += [
            Row(f"{name}: CPU of {number} together", usage, "%"),
            Row(f"{name}: waiters served out of order", disorder, ""),
            Row(f"{name}: from one to the next", handoffs, "ms"),
        ]
    ours = found[OURS]
    handoffs = [one for turn in ours for one in turn.handoffs]
    outcome.goals = [
        Goal(
            f"CPU of {number} waiters together",
            statistics.median(turn.cpu_percent for turn in ours),
            5,
            "% of a core",
        ),
        Goal("waiters served out of order", max(turn.out_of_order for turn in ours), 0, ""),
        Goal("median until the next one has it", statistics.median(handoffs), 10, "ms"),
    ]
    return outcome


def _serve(name: str, path: Path, waiting: Sequence[Waiter], quick: bool) -> _Found:
    with held(name, path) as lock:
        for waiter in waiting:
            waiter.start(name, path, hold=0.02)
            time.sleep(0.01)  # it is about to wait: let it come
        time.sleep(0.5)
        before, began = _cpu(waiting), time.monotonic()
        time.sleep(0.5 if quick else 5.0)
        percent = 100 * (_cpu(waiting) - before) / (time.monotonic() - began)
        released_at = time.monotonic()
        lock.release()
    served = sorted(
        ((waiter.finish(), place) for place, waiter in enumerate(waiting)),
        key=lambda pair: pair[0].acquired_at,
    )
    order = [place for _, place in served]
    before_it = [released_at, *(waited.released_at for waited, _ in served)]
    return _Found(
        cpu_percent=percent,
        out_of_order=sum(one > other for one, other in itertools.pairwise(order)),
        handoffs=_handoffs([waited for waited, _ in served], before_it),
    )


def _handoffs(served: Sequence[Waited], released: Sequence[float]) -> list[float]:
    return [
        1e3 * (waited.acquired_at - released_at)
        for waited, released_at in zip(served, released, strict=False)
    ]


def _cpu(waiting: Sequence[Waiter]) -> float:
    """Seconds that all of them have used."""
    return sum(_cpu_of(waiter.pid) for waiter in waiting)


def _cpu_of(pid: int) -> float:
    total = 0
    try:
        # In nanoseconds: the clock ticks of /proc/PID/stat are as long as what is measured.
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                total += int(file.read().split()[0])
    except OSError:
        total = 0
    if total:
        return total / 1e9
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
