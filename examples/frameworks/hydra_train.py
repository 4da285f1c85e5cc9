"""Hydra, protected: one job of a kind at a time, and a checkpoint when a job is asked to stop.

    python examples/frameworks/hydra_train.py
    python examples/frameworks/hydra_train.py -m lr=0.1,0.2
    python examples/frameworks/hydra_train.py -m lr=0.1,0.2 hydra/launcher=joblib

The outer environment is that of the whole program: a signal to it ends the sweep, workers of a
launcher included. The inner one is that of a job. Its lock is in ``locks`` where the program was
started, also with ``hydra.job.chdir=True``.
"""

from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

from orchard_infra import (
    EnvironmentConfig,
    InfrastructureManager,
    SignalStop,
    managed_environment,
)


@dataclass
class Job:
    lr: float = 0.1
    steps: int = 100


ConfigStore.instance().store("job", node=Job)
manager = InfrastructureManager(stopper=SignalStop("flag", deadline=10.0))


@managed_environment("hydra-sweep")
@hydra.main(version_base="1.3", config_path=None, config_name="job")
def main(job: Job) -> float:
    config_of_hydra: Any = HydraConfig.get()
    number = config_of_hydra.job.get("num") or 0  # a sweep counts its jobs
    config = EnvironmentConfig("hydra-job", lock_file_path=f"locks/job-{number}.lock")
    with managed_environment(config, manager=manager) as env:
        print(f"job {number} with lr {job.lr}, lock {env.lock_path}", flush=True)
        weight = 1.0
        for _ in range(job.steps):
            weight -= job.lr * weight
            if env.stop_requested:
                print(f"saved a checkpoint: {env.stop_requested.reason}", flush=True)
                break
    return weight  # after a signal not reached: now the outer environment ends the sweep


if __name__ == "__main__":
    main()
