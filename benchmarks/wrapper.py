"""The wrapper: `orchard-infra run` around `true`, against importing what it is built on.

Whole processes, from start to end.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

from _harness import Goal, Outcome, main, python, ratio, take_turns, whole_process

WRAPPER = "orchard-infra run -p x -- true"
FLOOR = "import attrs, psutil, portalocker"
BARE = "true"


def measure(quick: bool, directory: Path) -> Outcome:
    # The one beside this interpreter: another one on PATH may be another version.
    command = shutil.which("orchard-infra", path=str(Path(sys.executable).parent))
    what = f"{WRAPPER}, against {FLOOR}"
    if command is None or subprocess.run([command, "--version"], capture_output=True).returncode:
        return Outcome(
            goals=[Goal(what, None, 1.5)],
            notes=["there is no working orchard-infra beside this interpreter: install [cli]"],
        )
    commands = {
        WRAPPER: [command, "run", "-p", "x", "--", "true"],
        FLOOR: python("-c", FLOOR),
        BARE: ["true"],
    }
    samples = take_turns(
        {
            name: functools.partial(whole_process, words, directory)
            for name, words in commands.items()
        },
        rounds=3 if quick else 60,
        warm_up=2,
    )
    outcome = Outcome(base=FLOOR, goals=[Goal(what, ratio(samples, WRAPPER, FLOOR), 1.5)])
    outcome.add(samples, "ms", 1e3)
    return outcome


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
