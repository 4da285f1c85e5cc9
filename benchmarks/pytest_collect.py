"""pytest --co: with the plugin, without it, and while it looks for leaks.

Whole processes, from start to end. The plugin is loaded in every project of an environment that
has the package, so what it costs there is paid by people who do not use it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from _harness import Goal, Outcome, main, python, ratio, take_turns, whole_process

WITH = "pytest --co"
WITHOUT = "pytest --co -p no:orchard_infra"
WATCHING = "pytest --co --infra-leaks=warn"
LIGHT = "orchard_infra modules that it loads, beside the plugin and the version"
TESTS = "def test_nothing():\n    pass\n"
LOADED = """
import sys

def pytest_unconfigure():
    with open("loaded", "w") as file:
        file.write("\\n".join(sys.modules))
"""


def measure(quick: bool, directory: Path) -> Outcome:
    # Other plugins of this environment would be measured, too.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    tests = directory / "tests"
    tests.mkdir()
    (tests / "pytest.ini").write_text("[pytest]\n", "utf-8")
    (tests / "test_it.py").write_text(TESTS, "utf-8")
    options = {
        WITH: ["-p", "orchard_infra.pytest_plugin"],
        WITHOUT: [],
        WATCHING: ["-p", "orchard_infra.pytest_plugin", "--infra-leaks=warn"],
    }
    common = ["-m", "pytest", "--co", "-qq", "-p", "no:cacheprovider", str(tests)]
    commands = {
        name: ["sh", "-c", '"$@" > /dev/null', "-", *python(*common, *more)]
        for name, more in options.items()
    }
    samples = take_turns(
        {
            name: functools.partial(whole_process, command, directory)
            for name, command in commands.items()
        },
        rounds=3 if quick else 40,
        warm_up=2,
    )
    loaded = _loaded(directory, tests, [*common, *options[WITH]])
    ours = {name for name in loaded if name.partition(".")[0] == "orchard_infra"}
    ours -= {"orchard_infra", "orchard_infra._version", "orchard_infra.pytest_plugin"}
    heavy = loaded & {"torch", "psutil", "attrs", "portalocker", "click", "rich"}
    outcome = Outcome(base=WITHOUT)
    outcome.add(samples, "ms", 1e3)
    outcome.goals = [
        Goal(f"{WITH}, against {WITHOUT}", ratio(samples, WITH, WITHOUT), 1.1),
        Goal(LIGHT, len(ours), 0, "modules"),
        Goal("heavy modules that it loads", len(heavy), 0, "modules"),
    ]
    return outcome


def _loaded(directory: Path, tests: Path, arguments: list[str]) -> set[str]:
    (tests / "conftest.py").write_text(LOADED, "utf-8")
    subprocess.run(python(*arguments), cwd=directory, check=True, stdout=subprocess.DEVNULL)
    return set((directory / "loaded").read_text("utf-8").split())


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
