"""Pytest fixtures: `infra_config`, a factory of isolated configurations, and `managed_env`.

pytest loads this in every project that has the package installed, so it imports nothing until a
fixture is used. Both fixtures are safe under pytest-xdist: all their files are below ``tmp_path``.
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

    ``infra_config(project_name="test")`` has its lock and its run record below ``tmp_path``, and
    does not allow killing. It takes the other arguments of `EnvironmentConfig` as well.
    """
    from orchard_infra.config import EnvironmentConfig

    monkeypatch.setenv("ORCHARD_INFRA_DIR", str(_directory(tmp_path)))

    def make(project_name: str = "test", **options: object) -> EnvironmentConfig:
        return EnvironmentConfig(project_name, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def managed_env(
    infra_config: Callable[..., EnvironmentConfig], tmp_path: Path
) -> Iterator[Environment]:
    """The environment around one test: prepared before it, released after it.

    It installs no signal handlers, and ``tmp_dir`` is below ``tmp_path``.
    """
    from orchard_infra.artifacts.temporary import TemporaryArtifacts
    from orchard_infra.managed import managed_environment
    from orchard_infra.manager import InfrastructureManager

    manager = InfrastructureManager(
        # A CI that cancels a job sends SIGTERM. As an exception it would fail the test that is just
        # running, and pytest would go on to the next one.
        stopper=None,
        # No later run looks for what a killed test left: the record of it is below tmp_path, too.
        cleaner=TemporaryArtifacts(base=_directory(tmp_path)),
    )
    with managed_environment(infra_config(), manager=manager) as env:
        yield env


def _directory(tmp_path: Path) -> Path:
    directory = tmp_path / "orchard-infra"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory
