"""What is installed is what pyproject.toml says."""

import importlib.metadata
import re
import sys
from importlib.resources import files
from pathlib import Path

import orchard_infra
from support import run_command

ROOT = Path(__file__).parent.parent


def test_the_version_comes_from_one_place() -> None:
    assert importlib.metadata.version("orchard-infra") == orchard_infra.__version__


def test_the_package_is_marked_as_typed() -> None:
    assert (files(orchard_infra) / "py.typed").is_file()


def test_the_oldest_dependencies_that_are_tested_are_the_oldest_that_are_allowed() -> None:
    required = importlib.metadata.requires("orchard-infra") or []
    allowed = {line.replace(">=", "==") for line in required if "extra ==" not in line}
    # The clients of the servers as well: there each version is a little different.
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    clients = re.findall(r'^(?:postgres|redis) = \["(.+?)"\]', project, re.MULTILINE)
    allowed |= {line.replace(">=", "==") for line in clients}
    text = (ROOT / "requirements-floors.txt").read_text("utf-8")
    tested = {line for line in text.splitlines() if line and not line.startswith("#")}

    # psutil>=6 in the one is psutil==6.0.0 in the other.
    assert {re.sub(r"(\.0)+$", "", line) for line in tested} == allowed


def test_torch_has_no_upper_bound_for_users() -> None:
    required = importlib.metadata.requires("orchard-infra") or []
    [torch] = [line for line in required if line.startswith("torch")]

    assert re.match(r"torch>=[\d.]+\s*;", torch)


def test_the_command_is_installed(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("orchard-infra")
    script = run_command(tmp_path, [str(command), "--version"])

    assert script.finish() == 0, script.transcript()
    assert orchard_infra.__version__ in script.output
