"""Pytest fixtures: `infra_config`, a factory of isolated configurations, and `managed_env`.

Loaded by pytest in every project that has this package installed, so it imports nothing until a
fixture is used. Both are safe under pytest-xdist: all that they touch is below ``tmp_path``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from orchard_infra.config import EnvironmentConfig
    from orchard_infra.environment import Environment


@pytest.fixture
def infra_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., EnvironmentConfig]:
    """A factory of configurations that meet no run outside of the test.

    ``infra_config(project_name="test")`` has its lock, and its run record, below ``tmp_path``,
    and does not allow killing. What the arguments of `EnvironmentConfig` say goes first.
    """
    from orchard_infra.config import EnvironmentConfig

    monkeypatch.setenv("ORCHARD_INFRA_DIR", str(tmp_path / "orchard-infra"))

    def make(project_name: str = "test", **options: object) -> EnvironmentConfig:
        return EnvironmentConfig(project_name, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def managed_env(infra_config: Callable[..., EnvironmentConfig]) -> Iterator[Environment]:
    """The environment around one test: prepared before it, released after it."""
    from orchard_infra.managed import managed_environment

    with managed_environment(infra_config()) as env:
        yield env
