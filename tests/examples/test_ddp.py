"""The data-parallel example: a stop of one rank ends all, and the next start goes on."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from support import Script, require_module, run_command

DDP = Path(__file__).parents[2] / "examples" / "ddp.py"


def start(tmp_path: Path, *arguments: str) -> Script:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return run_command(tmp_path, [*command, str(DDP), *arguments], env={"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_after_a_checkpoint_where_the_next_start_goes_on(
    tmp_path: Path,
) -> None:
    require_module("torch")
    job = start(tmp_path, "--steps", "100000000", "--workers", "1")
    line = job.wait_for("rank 1 (pid")
    pid = re.search(r"rank 1 \(pid (\d+)", line)  # both may have written at once
    assert pid is not None

    os.kill(int(pid[1]), signal.SIGTERM)

    assert job.finish(120) == 0, job.transcript()
    stopped = job.wait_for("stopped: rank 1 of this job was asked to stop after")
    steps = int(stopped.split()[-2])
    assert (tmp_path / "runs" / "ddp" / "ddp.pt").exists()

    job = start(tmp_path, "--steps", str(steps + 3))
    assert job.finish(120) == 0, job.transcript()
    assert f"finished after {steps + 3} steps" in job.output
    assert job.output.count("has taken its first step") == 2  # after those of before
    assert not (tmp_path / "runs" / "ddp" / "ddp.pt").exists()
