"""What the tests with real frameworks share.

def test_a_trainer_stops(tmp_path, needs):
    needs("transformers")
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def needs() -> Callable[..., None]:
    """Skips the test where a module is not installed, without importing it: torch takes seconds.

    With CI=true that skip is a failure, as every other one.
    """

    def require(*modules: str) -> None:
        for name in modules:
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"needs the module {name}, not installed: make test-frameworks")

    return require


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No framework asks a network, and none takes all cores of a busy machine."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
