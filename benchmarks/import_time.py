"""Import: the package against the four modules that it cannot do without.

Whole processes, from start to end. The package itself loads next to nothing until one of its
names is asked for, so what counts is the import of a name that needs all of it.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

from _harness import Goal, Outcome, main, python, ratio, take_turns, whole_process

BARE = "import orchard_infra"
PACKAGE = "from orchard_infra import managed_environment"
FLOOR = "import attrs, psutil, logging, pathlib"
FORBIDDEN = (
    "asyncio",
    "click",
    "importlib.metadata",
    "portalocker",
    "psycopg",
    "redis",
    "rich",
    "torch",
)


def measure(quick: bool, directory: Path) -> Outcome:
    statements = (BARE, PACKAGE, FLOOR, "pass")
    samples = take_turns(
        {
            code: functools.partial(whole_process, python("-c", code), directory)
            for code in statements
        },
        rounds=3 if quick else 60,
        warm_up=2,
    )
    loaded = sorted(_loaded_by(PACKAGE).intersection(FORBIDDEN))
    outcome = Outcome(base=FLOOR)
    outcome.add(samples, "ms", 1e3)
    outcome.goals = [
        Goal(f"{code}, against {FLOOR}", ratio(samples, code, FLOOR), 1.3)
        for code in (BARE, PACKAGE)
    ]
    outcome.goals.append(Goal("heavy modules that it loads", len(loaded), 0, "modules"))
    outcome.notes = [f"loads {', '.join(loaded) or 'none'} of: {', '.join(FORBIDDEN)}"]
    return outcome


def _loaded_by(code: str) -> set[str]:
    """The modules that ``-X importtime`` lists."""
    command = python("-X", "importtime", "-c", code)
    report = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    return set(re.findall(r"\|\s+([\w.]+)$", report, re.MULTILINE))


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
