"""What the benchmarks share: contenders that take turns, goals, a table and JSON.

A busy machine makes any single figure worthless, but it slows down all contenders alike. So they
are measured in rounds: each comes once in a round, in an order that is drawn anew. What is
compared is the median of the ratios within the rounds, never one median with one of another day.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

Contender = Callable[[], float]  # does its work once, and says how long that took


@attrs.frozen
class Row:
    """One line of the table: what was measured, and all that was measured of it."""

    name: str
    samples: Sequence[float]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: float) -> float:
        ordered = sorted(self.samples)
        return ordered[round((len(ordered) - 1) * percent / 100)]


@attrs.frozen
class Goal:
    """What is aimed at. ``value`` is None where it could not be measured here."""

    what: str
    value: float | None
    limit: float
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value <= self.limit


@attrs.define
class Outcome:
    """What a benchmark found. ``base`` names the row that the others are compared to."""

    rows: list[Row] = attrs.field(factory=list)
    goals: list[Goal] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)
    base: str | None = None

    def add(self, samples: Mapping[str, list[float]], unit: str, scale: float = 1.0) -> None:
        """One row for each contender."""
        self.rows += [
            Row(name, [sample * scale for sample in taken], unit) for name, taken in samples.items()
        ]


def take_turns(
    contenders: Mapping[str, Contender], rounds: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Measure every contender once in each round; the samples of each, by name."""
    turns = random.Random(20)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        order = list(contenders)
        turns.shuffle(order)
        for name in order:
            taken = contenders[name]()
            if number >= 0:
                samples[name].append(taken)
    return samples


def ratio(samples: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """How many times as long ``one`` takes as ``other``: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(samples[one], samples[other], strict=True))


def timed(work: Callable[[], object], times: int = 1) -> Contender:
    """A contender that does ``work`` so many times, and gives the seconds for one of them."""

    def contend() -> float:
        with without_gc():
            began = time.perf_counter()
            for _ in range(times):
                work()
            return (time.perf_counter() - began) / times

    return contend


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """No collection in the middle of a measurement: it would hit whoever comes by."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keep_quiet() -> None:
    """Nothing of what is logged goes to the terminal: that would be measured, too."""
    logging.getLogger("Infrastructure").addHandler(logging.NullHandler())


def process_count() -> int:
    """How many processes can be seen on this machine."""
    return sum(name.isdigit() for name in os.listdir("/proc"))


def main(script: str, doc: str | None, measure: Callable[[bool, Path], Outcome]) -> int:
    """Run a benchmark from the command line; its exit status.

    ``measure`` gets whether it is to be quick, and an empty directory. Locks and run records are
    kept in there as well, so that nothing is seen of the runs on this machine.
    """
    name = Path(script).stem
    parser = argparse.ArgumentParser(
        prog=name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few and small rounds: a trial run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a goal is missed")
    arguments = parser.parse_args()
    keep_quiet()
    with tempfile.TemporaryDirectory(prefix="oi-bench-") as directory:
        os.environ["ORCHARD_INFRA_DIR"] = directory
        os.environ.pop("ORCHARD_INFRA_RUN_ID", None)
        outcome = measure(arguments.quick, Path(directory))
    title = (doc or name).strip().partition("\n")[0]
    print(f"{title}\n")
    if outcome.rows:
        print(_table(outcome))
    for note in outcome.notes:
        print(f"  {note}")
    for goal in outcome.goals:
        print(f"  goal: {_in_words(goal)}")
    if arguments.json is not None:
        figures = _as_json(name, arguments.quick, outcome)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    missed = any(goal.met is False for goal in outcome.goals)
    return int(missed and arguments.strict)


def _table(outcome: Outcome) -> str:
    base = next((row for row in outcome.rows if row.name == outcome.base), None)
    lines = [["", "median", "10 % - 90 %", "" if base is None else f"x {base.name}"]]
    for row in outcome.rows:
        spread = f"{_short(row.percentile(10))} - {_short(row.percentile(90))}"
        times = ""
        if base is not None and row.unit == base.unit:
            times = f"{_relative(row, base):.2f}"
        lines.append([row.name, f"{_short(row.median)} {row.unit}", spread, times])
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _relative(row: Row, base: Row) -> float:
    if len(row.samples) == len(base.samples):  # of the same rounds
        return ratio({"row": row.samples, "base": base.samples}, "row", "base")
    return row.median / base.median


def _in_words(goal: Goal) -> str:
    if goal.value is None:
        return f"{goal.what}: not measured (at most {goal.limit:g} {goal.unit})"
    answer = "yes" if goal.met else "NO"
    return (
        f"{goal.what}: {_short(goal.value)} {goal.unit}, at most {goal.limit:g} {goal.unit}: "
        f"{answer}"
    )


def _short(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _as_json(name: str, quick: bool, outcome: Outcome) -> dict[str, Any]:
    return {
        "benchmark": name,
        "quick": quick,
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
            "cpus": os.cpu_count(),
            "versions": _versions("orchard-infra", "attrs", "psutil", "portalocker", "filelock"),
        },
        "rows": [
            {
                "name": row.name,
                "unit": row.unit,
                "median": row.median,
                "p10": row.percentile(10),
                "p90": row.percentile(90),
                "samples": len(row.samples),
            }
            for row in outcome.rows
        ],
        "goals": [
            {
                "what": goal.what,
                "value": goal.value,
                "limit": goal.limit,
                "unit": goal.unit,
                "met": goal.met,
            }
            for goal in outcome.goals
        ],
        "notes": outcome.notes,
    }


def _versions(*distributions: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def whole_process(command: Sequence[str], directory: Path) -> float:
    """Seconds from the start of a process to its end, and it must end well.

    Everybody's bytecode is kept below ``directory``: what was installed comes with bytecode, and
    a checkout may come without, or with PYTHONDONTWRITEBYTECODE set.
    """
    environ = {**os.environ, "PYTHONPYCACHEPREFIX": str(directory / "bytecode")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    subprocess.run(command, check=True, env=environ)
    return time.perf_counter() - began


def python(*arguments: str) -> list[str]:
    """The command line of this interpreter."""
    return [sys.executable, *arguments]
