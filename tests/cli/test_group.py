"""`orchard-infra` itself: help, version, completion."""

from __future__ import annotations

from pathlib import Path

import pytest

import orchard_infra
from support import run_command
from wrapping import COMMAND


def test_the_help_fits_a_screen_and_has_examples(tmp_path: Path) -> None:
    script = run_command(tmp_path, [COMMAND, "--help"], env={"COLUMNS": "80"})

    assert script.finish() == 0
    lines = script.output.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for command in ("run", "status", "history", "stop", "clean", "doctor"):
        assert any(line.strip().startswith(f"{command} ") for line in lines)
    assert "orchard-infra run -p digits -- python train.py" in script.output


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    script = run_command(tmp_path, [COMMAND, "--version"])

    assert script.finish() == 0
    assert script.output == f"orchard-infra {orchard_infra.__version__}\n"


def test_an_unknown_command_is_a_usage_error(tmp_path: Path) -> None:
    script = run_command(tmp_path, [COMMAND, "start"])

    assert script.finish() == 2
    assert "No such command 'start'" in script.error_output


@pytest.mark.parametrize(
    ("words", "offered"), [("orchard-infra st", "status"), ("orchard-infra run --wa", "--wait")]
)
def test_a_shell_completes_commands_and_options(tmp_path: Path, words: str, offered: str) -> None:
    script = run_command(
        tmp_path,
        [COMMAND],
        env={
            "_ORCHARD_INFRA_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
    )

    assert script.finish() == 0
    assert f"plain,{offered}" in script.output.split()
