"""Jobs of real launchers: torchrun, mpirun and Lightning start, restart and end their ranks."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support import Script, require_module, run_command, run_python, wait_gone

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
MPIRUN = ["--allow-run-as-root", "--oversubscribe", "-n", "2"]

SOON = 30.0  # seconds on a busy machine; torchrun alone takes 34 s to end a refused job

PRELUDE = """
import logging, os, signal, sys, time
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from orchard_infra import *
from orchard_infra.launch import this_launch

RANK = this_launch().rank or 0
RESTART = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

def tell(*words):
    os.write(1, f"[{time.monotonic():.3f}] rank {RANK} {' '.join(map(str, words))}\\n".encode())

def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
"""

RUN = (
    PRELUDE
    + """
tell("comes")
try:
    with managed_environment("digits"):
        tell("in")
        wait_for("end")
        tell("leaves")
    tell("out")
except EnvironmentLockedError as error:
    tell(f"refused by pid {error.holder.pid}")
    wait_for("told")  # torchrun sends SIGTERM to the other rank when this one has failed
    raise
"""
)


def start(tmp_path: Path, command: list[str], source: str = RUN) -> Script:
    (tmp_path / "train.py").write_text(source)
    return run_command(tmp_path, [*command, "train.py"], env={"OMP_NUM_THREADS": "1"})


def at(script: Script, rank: int, what: str) -> float:
    """When it happened to a rank, on the machine's monotonic clock."""
    match = re.search(r"\[([\d.]+)\]", script.wait_for(f"rank {rank} {what}"))
    assert match, script.transcript()
    return float(match[1])


@pytest.fixture(params=["torchrun", "mpirun"])
def launcher(request: pytest.FixtureRequest, require_tool: Callable[[str], str]) -> list[str]:
    """The command that starts two ranks of a script which follows."""
    if request.param == "torchrun":
        require_module("torch")
        return TORCHRUN
    return [require_tool("mpirun"), *MPIRUN, sys.executable]


@pytest.mark.slow
def test_the_ranks_of_a_launcher_start_and_end_together(
    tmp_path: Path, launcher: list[str]
) -> None:
    job = start(tmp_path, launcher)
    entered = [at(job, rank, "in") for rank in (0, 1)]
    (tmp_path / "end").touch()

    assert job.finish() == 0, job.transcript()
    assert entered[1] - max(entered[0], at(job, 1, "comes")) < SOON
    assert at(job, 0, "out") >= at(job, 1, "leaves")
    assert job.output.count(" acquired") == 1
    assert "no lock: this is rank 1 of a distributed job" in job.output
    assert "WARNING" not in job.output


@pytest.mark.slow
def test_a_job_of_a_launcher_that_is_refused_ends_within_seconds(
    tmp_path: Path, launcher: list[str]
) -> None:
    (tmp_path / "holder.py").write_text(RUN)
    holder = run_command(tmp_path, [sys.executable, "holder.py"])
    holder.wait_for("in")

    job = start(tmp_path, launcher)

    refused = [at(job, rank, f"refused by pid {holder.pid}") for rank in (0, 1)]
    assert refused[1] - max(refused[0], at(job, 1, "comes")) < SOON
    (tmp_path / "told").touch()
    told = time.monotonic()
    assert job.finish() != 0
    assert time.monotonic() - told < SOON


# In its first generation rank 0 is killed from outside, in the second one rank 1 raises, the third
# one is well. Who goes leaves a fork that ignores SIGTERM and has the lock or a record open.
ELASTIC = (
    PRELUDE
    + """
tell("comes", RESTART)
cfg = EnvironmentConfig("digits", allow_process_kill=True)
manager = InfrastructureManager(sanitizer=GhostSanitizer(grace=0.5))
with managed_environment(cfg, manager=manager):
    if RESTART < 2:
        fork = os.fork()
        if not fork:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        tell("fork", fork)
    tell("in", RESTART)
    if (RANK, RESTART) == (1, 1):
        wait_for("raise")
        raise RuntimeError("no luck")
    wait_for("end")
    tell("out")
"""
)

WAITS = (
    PRELUDE
    + """
with managed_environment("digits", timeout=None):
    tell("in")
"""
)


@pytest.mark.slow
def test_an_elastic_restart_takes_over_its_own_lock_and_stops_what_was_left(tmp_path: Path) -> None:
    require_module("torch")
    job = start(tmp_path, [*TORCHRUN, "--max-restarts=2"], ELASTIC)
    for rank in (0, 1):
        at(job, rank, "in 0")
    waiter = run_python(tmp_path, WAITS, name="waits.py")
    waiter.wait_for("waiting for the lock")
    forks = [int(pid) for pid in re.findall(r"fork (\d+)", job.output)]

    os.kill(_parent_of(forks, job, rank=0), signal.SIGKILL)
    for rank in (0, 1):
        at(job, rank, "in 1")
    wait_gone(forks)
    forks = [int(pid) for pid in re.findall(r"fork (\d+)", job.output)]
    (tmp_path / "raise").touch()
    for rank in (0, 1):
        at(job, rank, "in 2")

    wait_gone(forks)
    (tmp_path / "end").touch()
    assert job.finish() == 0, job.transcript()
    for restart in (1, 2):
        assert at(job, 0, f"in {restart}") - at(job, 0, f"comes {restart}") < SOON
    assert "rank 0 did not" not in job.output
    assert waiter.finish() == 0, waiter.transcript()
    assert at(waiter, 0, "in") > at(job, 0, "out")


def _parent_of(forks: list[int], job: Script, *, rank: int) -> int:
    match = re.search(rf"rank {rank} fork (\d+)", job.output)
    assert match is not None
    assert int(match[1]) in forks
    stat = Path(f"/proc/{match[1]}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


LIGHTNING = (
    PRELUDE
    + """
import warnings
warnings.simplefilter("ignore")
import torch
from lightning.pytorch import LightningModule, Trainer

class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 1))

RANK = int(os.environ.get("LOCAL_RANK", 0))
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
with managed_environment("digits"):
    tell("in")
    trainer.fit(Line())
    tell("trained on", trainer.world_size)
    time.sleep(0.3 * RANK)
    tell("leaves")
tell("out")
with managed_environment("digits"):  # both are known to be ranks by now
    tell("tests")
    open(f"{RANK} tests", "w").close()
    wait_for("1 tests")  # rank 1 comes while rank 0 is in
    time.sleep(0.3 * RANK)
    tell("tested")
tell("ends")
"""
)


@pytest.mark.slow
def test_lightning_trains_with_ranks_that_it_starts_within_the_run_of_rank_0(
    tmp_path: Path,
) -> None:
    require_module("lightning")
    job = run_python(tmp_path, LIGHTNING, env={"OMP_NUM_THREADS": "1"})

    assert job.finish(120) == 0, job.transcript()
    for rank in (0, 1):
        job.wait_for(f"rank {rank} trained on 2")
    assert at(job, 0, "out") >= at(job, 1, "leaves")
    assert at(job, 1, "tests") < at(job, 0, "tested")
    assert at(job, 0, "ends") >= at(job, 1, "tested")
    assert "WARNING" not in job.output
