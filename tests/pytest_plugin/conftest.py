"""Runs of pytest in processes of their own, with no plugins but those that a test names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import Script, run_command

# Not by name: tests/conftest.py loads pytester, and the runs of these tests load it not.
RUN = ("-p", "orchard_infra.pytest_plugin", "-p", "no:cacheprovider", "--tb=short")


@pytest.fixture
def run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., pytest.RunResult]:
    """``run("-n", "2")`` runs pytest in the directory of `pytester`, until it ends."""
    # To load all that is installed takes seconds.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def call(*arguments: str) -> pytest.RunResult:
        return pytester.runpytest_subprocess(*RUN, *arguments, timeout=120)

    return call


@pytest.fixture
def start(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Script]:
    """Start pytest with these tests, in a directory of its own, as another checkout has it."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def call(name: str, source: str, *arguments: str) -> Script:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        pytester.makepyfile(**{str(directory / f"test_{name}"): source})
        command = [sys.executable, "-m", "pytest", *RUN, "-rA", *arguments]
        return run_command(tmp_path, command, cwd=directory)

    return call
