"""However Slurm ends a job, its run is asked to stop, saves, gives the lock back, and goes on.

The scripts are those in examples/slurm. Time limits are not among these tests: Slurm rounds them
up to a minute. benchmarks/slurm_endings.py has them.
"""

from __future__ import annotations

import re
import time

import pytest

from slurm_server import KILL_WAIT, SlurmServer
from support import wait_until

pytestmark = pytest.mark.xdist_group("slurm")

RANKS = {"train.sbatch": 1, "ranks.sbatch": 2}
WRAPPER = "orchard-infra run -p wrapped -- python train.py"
BLOCKER = "#!/bin/bash\nsleep 60"  # a job that others make way for


def assert_stopped_and_saved(job, training, since: float) -> None:
    """The run saw its signal, saved a checkpoint and gave everything back before SIGKILL."""
    job.wait_for("saved after step")
    wait_until(lambda: not training.is_locked and not training.records, timeout=KILL_WAIT)
    assert time.monotonic() - since < KILL_WAIT
    assert "stop requested: SIGTERM" in job.output
    assert f"saved after step {training.saved_step}\n" in job.output
    assert training.saved_step > 0


def assert_goes_on(job, training) -> None:
    """The requeued job goes on from its checkpoint, without waiting for anybody."""
    saved = training.saved_step
    job.start_again()
    job.wait_for(f"training from step {saved}\n")
    assert "waiting for the lock" not in job.output


def test_a_job_that_ends_by_itself_leaves_nothing(submit, training):
    job = submit("train.sbatch", train="--steps 5 --step-time 0.01")

    assert job.wait() == "COMPLETED", job.transcript()
    assert training.saved_step == 5
    assert not training.is_locked
    assert not training.records


@pytest.mark.parametrize("script", ["train.sbatch", "ranks.sbatch"])
def test_a_job_that_is_cancelled_saves_and_does_not_come_back(submit, training, script):
    job = submit(script)
    job.wait_for("training from step", RANKS[script])
    since = time.monotonic()

    job.cancel()

    assert_stopped_and_saved(job, training, since)
    assert job.wait() == "CANCELLED", job.transcript()
    assert job.facts["Restarts"] == "0"


def test_a_job_that_is_requeued_goes_on_from_its_checkpoint(submit, training):
    job = submit("train.sbatch")
    job.wait_for("training from step")
    since = time.monotonic()

    job.requeue()

    assert_stopped_and_saved(job, training, since)
    assert_goes_on(job, training)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.sbatch", "ranks.sbatch"])
def test_a_job_that_is_preempted_goes_on_from_its_checkpoint(
    submit, slurm, tmp_path, training, script
):
    """Slurm sends SIGTERM to the steps of such a job twice, some milliseconds apart."""
    job = submit(script, train="--step-time 0.3")
    job.wait_for("training from step", RANKS[script])

    blocker = slurm.submit(tmp_path, BLOCKER, "--partition=high", "--nodes=2", "--exclusive")

    job.wait_for("stop requested")
    assert_stopped_and_saved(job, training, time.monotonic())
    blocker.cancel()
    assert_goes_on(job, training)


def test_a_job_that_ends_within_its_grace_period_puts_itself_back(
    submit, slurm, tmp_path, training
):
    """To Slurm such a job has ended by itself, although it was about to be preempted."""
    job = submit("ranks.sbatch", "--partition=patient", slowly=True)
    job.wait_for("training from step", 2)

    blocker = slurm.submit(tmp_path, BLOCKER, "--partition=high", "--nodes=2", "--exclusive")

    job.wait_for("stop requested")
    assert_stopped_and_saved(job, training, time.monotonic())
    # Rank 1 has failed while rank 0 saved, which is no reason to end that one before it has.
    assert "Exited with exit code 143" in job.output
    assert "Terminating StepId" not in job.output
    blocker.cancel()
    assert_goes_on(job, training)


def test_a_job_that_was_killed_goes_on_at_once_from_its_last_checkpoint(submit, training):
    job = submit("train.sbatch", train="--steps 6000 --step-time 0.002")
    job.wait_for("training from step")
    wait_until(lambda: training.saved_step > 0)

    job.cancel("--signal=KILL", "--batch")

    assert job.wait() == "FAILED"
    assert training.is_locked
    job.requeue()
    job.start_again()
    job.wait_for("training from step", 2)
    assert "waiting for the lock" not in job.output
    assert re.findall(r"training from step (\d+)", job.output)[1] != "0"


@pytest.mark.slow
def test_the_slices_of_an_array_go_on_where_the_last_one_stopped(submit, training):
    array = submit("array.sbatch", "--array=1-2%1")
    first, second = array.element(1), array.element(2)
    first.wait_for("training from step")

    first.cancel()

    assert_stopped_and_saved(first, training, time.monotonic())
    saved = training.saved_step
    second.wait_for("training from step")
    assert f"training from step {saved}\n" in second.output


def test_elements_of_an_array_that_start_together_run_one_after_the_other(submit, training):
    array = submit("array.sbatch", "--array=1-2", train="--steps 30 --step-time 0.02")
    elements = [array.element(1), array.element(2)]

    assert [element.wait() for element in elements] == ["COMPLETED"] * 2
    output = "".join(element.output for element in elements)
    assert re.findall(r"training from step (\d+)", output) in (["0", "30"], ["30", "0"])
    assert output.count("waiting for the lock") == 1


@pytest.mark.parametrize("script", ["python train.py\n", "python train.py | cat\n"])
def test_a_program_that_the_shell_only_waits_for_is_killed_without_a_signal(
    submit, slurm, training, script
):
    """The script is one of those that docs/slurm.md warns of."""
    if slurm.proctrack != "cgroup":
        pytest.skip("needs a real cgroup freezer")
    job = submit(f"#!/bin/bash\n{script}")
    job.wait_for("training from step")
    since = time.monotonic()

    job.cancel()

    assert job.wait() == "CANCELLED"
    assert time.monotonic() - since < KILL_WAIT
    assert "stop requested" not in job.output
    assert training.saved_step == 0


def test_a_job_that_requeues_itself_blindly_cannot_be_cancelled(submit, training):
    """So docs/slurm.md warns of it."""
    job = submit(
        "#!/bin/bash\n#SBATCH --requeue --open-mode=append\ntrap : TERM\n"
        "srun python train.py || scontrol requeue $SLURM_JOB_ID\n"
    )
    job.wait_for("training from step")

    job.cancel()

    wait_until(lambda: job.state == "PENDING", what=job.transcript)


@pytest.mark.parametrize("start", ["exec", "srun"])
def test_a_command_under_the_wrapper_saves_as_well(submit, training, start):
    job = submit(f"#!/bin/bash\ntrap : TERM\n{start} {WRAPPER}\n")
    job.wait_for("training from step")
    since = time.monotonic()

    job.cancel()

    assert_stopped_and_saved(job, training, since)
    assert job.wait() == "CANCELLED", job.transcript()


@pytest.mark.parametrize("script", ["train.sbatch", f"#!/bin/bash\nexec {WRAPPER}\n"])
def test_under_linuxproc_a_job_that_is_cancelled_saves_as_well(submit, training, linuxproc, script):
    """That one signals every process of a job's tree."""
    job = submit(script, server=linuxproc)
    job.wait_for("training from step")
    since = time.monotonic()

    job.cancel()

    assert_stopped_and_saved(job, training, since)
    assert job.wait() == "CANCELLED", job.transcript()


@pytest.fixture(scope="module")
def linuxproc():
    with SlurmServer.start(nodes=1, proctrack="linuxproc") as server:
        yield server


def test_without_append_a_requeue_empties_the_output(submit):
    """So docs/slurm.md warns of it."""
    job = submit("train.sbatch", "--open-mode=truncate")
    job.wait_for("training from step 0\n")

    job.requeue()
    job.start_again()

    job.wait_for("training from step")
    wait_until(lambda: "saved after step" not in job.output)
    assert "training from step 0\n" not in job.output
