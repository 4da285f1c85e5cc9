"""The manager of this package in an orchestrator that was written for another one.

    python examples/frameworks/orchard_ml.py

`Orchestrator` uses its manager as the RootOrchestrator of orchard-ml does: it is given one; it
prepares when it is entered, and releases when it is left, by the configuration. Nothing of it
has to change.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from orchard_infra import InfraManagerProtocol, InfrastructureManager, current_environments


@dataclass(frozen=True)
class Hardware:
    """As in orchard-ml, where this is a pydantic model with many more fields."""

    project_name: str = "orchard-example"
    allow_process_kill: bool = True

    @property
    def lock_file_path(self) -> Path:
        return Path(f"{self.project_name}.lock")


@dataclass(frozen=True)
class Config:
    hardware: Hardware = field(default_factory=Hardware)


class Orchestrator:
    def __init__(self, cfg: Config, infra_manager: InfraManagerProtocol) -> None:
        self.cfg = cfg
        self.infra = infra_manager
        self.logger = logging.getLogger("orchard")
        self.locked = False

    def __enter__(self) -> Orchestrator:
        try:
            self.infra.prepare_environment(self.cfg, logger=self.logger)
            self.locked = True
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"cannot take the lock: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self.locked:
                self.infra.release_resources(self.cfg, logger=self.logger)
                self.locked = False
        except (OSError, RuntimeError) as problem:
            self.logger.error("cannot release the lock: %s", problem)


def main() -> None:
    with Orchestrator(Config(), infra_manager=InfrastructureManager()):
        env = current_environments()[-1]  # what a with-block would have got
        print(f"prepared in {env.report.prepare_seconds:.3f} s: {env.lock_path.name}")
    print("left behind:", Hardware().lock_file_path.exists())


if __name__ == "__main__":
    main()
