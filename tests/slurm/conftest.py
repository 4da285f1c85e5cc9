"""One real Slurm for all tests, which run in one worker."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from slurm_server import EXAMPLES, Job, SlurmServer, missing

# What makes hosts of virtual nodes: each has a registry of its own, and the lock is on a file
# system that all of them share. Each other's processes they do not see anyway.
_HOSTS = """
import os
if "SLURMD_NODENAME" in os.environ:
    os.environ["ORCHARD_INFRA_DIR"] += "-" + os.environ["SLURMD_NODENAME"]
from orchard_infra.locks import file
file._stays = lambda device: True
"""

# A checkpoint that takes a while, long after the other ranks have ended.
_SLOWLY = """
import os, time
fsync = os.fsync
os.fsync = lambda fd: (time.sleep(1.5), fsync(fd))
"""


@pytest.fixture(scope="session")
def slurm_server() -> Iterator[SlurmServer]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with SlurmServer.start(nodes=2) as server:
        yield server


@pytest.fixture
def slurm(slurm_server: SlurmServer) -> Iterator[SlurmServer]:
    """The server; all jobs of the test have ended, and the nodes are free, when the next begins."""
    yield slurm_server
    slurm_server.cancel_all()


@pytest.fixture
def submit(slurm: SlurmServer, tmp_path: Path) -> Callable[..., Job]:
    """Submit one of the examples, or the text of a script. Options count before those in it.

    ``train`` are arguments for train.py. ``hosts`` makes hosts of the nodes, ``slowly`` makes a
    checkpoint take longer. ``server`` is another one than the shared one.
    """
    shutil.copy(EXAMPLES / "train.py", tmp_path)
    for name, code in (("hosts", _HOSTS), ("slowly", _SLOWLY)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sitecustomize.py").write_text(code)

    def submit(
        script: str,
        *options: str,
        train: str = "--steps 600 --step-time 0.05",
        hosts: bool = False,
        slowly: bool = False,
        server: SlurmServer = slurm,
    ) -> Job:
        text = (EXAMPLES / script).read_text() if script.endswith(".sbatch") else script
        paths = [str(tmp_path / "hosts")] * hosts + [str(tmp_path / "slowly")] * slowly
        paths.append(os.environ.get("PYTHONPATH", ""))
        env = {"PYTHONPATH": os.pathsep.join(paths)}
        text = text.replace("python train.py", f"python train.py {train}")
        return server.submit(tmp_path, text, *options, env=env)

    return submit


@pytest.fixture
def training(tmp_path: Path, runtime_directory: Path) -> Training:
    return Training(tmp_path / "runs" / "slurm-train", runtime_directory)


@attrs.frozen
class Training:
    """What examples/slurm/train.py leaves."""

    output: Path
    runtime_directory: Path

    @property
    def saved_step(self) -> int:
        """The step of the checkpoint; 0 without one."""
        try:
            found: int = json.loads((self.output / "checkpoint.json").read_text())["done"]
            return found
        except FileNotFoundError:
            return 0

    @property
    def is_locked(self) -> bool:
        return (self.output / "train.lock").exists()

    @property
    def records(self) -> list[Path]:
        """Records of runs, also of those on other hosts."""
        directory = self.runtime_directory
        return [*directory.parent.glob(f"{directory.name}*/runs/*.run")]
