"""Jobs of submitit, ended in every way: a local one, and one of a real Slurm."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import psutil
import pytest

from endings import EXAMPLES
from slurm_server import Job, SlurmServer, missing
from support import Script, run_command, run_python, wait_gone, wait_until

EXAMPLE = EXAMPLES / "submitit_train.py"

# The training without our context manager: an environment, and submitit's own handlers.
PLAIN = """
import os, sys, time
from pathlib import Path
import submitit
from orchard_infra import InfrastructureManager, SignalStop, managed_environment
from submitit_train import Training

class Plain(Training):
    def __call__(self, steps):
        manager = InfrastructureManager(stopper=SignalStop("flag"))
        with managed_environment("submitit", manager=manager) as env:
            print(f"pid {os.getpid()} goes on from step {self.load()}", flush=True)
            if steps < 0:
                raise ValueError("no luck")
            while not env.stop_requested:
                time.sleep(0.01)
            print("told", flush=True)
    def checkpoint(self, steps):
        print("checkpoint is called", flush=True)
        return super().checkpoint(steps)

executor = submitit.LocalExecutor("runs/submitit/%j")
executor.update_parameters(timeout_min=60)
training = Plain(Path("checkpoint.json"), 0.01)
executor.submit(training, int(sys.argv[1])).result()
"""


@pytest.fixture(autouse=True)
def submitit(needs: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    needs("submitit")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))


@attrs.frozen
class Submitted:
    """A job that a script has submitted, and waits for."""

    script: Script
    directory: Path

    @property
    def output(self) -> str:
        logs = self.directory.glob("runs/submitit/*/*_log.*")
        return "".join(path.read_text("utf-8") for path in sorted(logs))

    def wait_for(self, text: str, count: int = 1) -> list[str]:
        """So many lines in the job's output that contain it."""

        def lines() -> list[str]:
            found = [line for line in self.output.splitlines() if text in line]
            return found if len(found) >= count else []

        return wait_until(lines, what=lambda: f"{text!r}\n{self.transcript()}")

    def start(self, number: int = 1) -> tuple[int, int]:
        """The pid of the task that was started for the nth time, and where it went on."""
        match = re.search(r"pid (\d+) goes on from step (\d+)", self.wait_for("pid ", number)[-1])
        assert match is not None
        return int(match[1]), int(match[2])

    def transcript(self) -> str:
        return f"{self.script.transcript()}\njob:\n{self.output}"


def lock(runtime_directory: Path) -> Path:
    return runtime_directory / "locks" / "submitit.lock"


@pytest.mark.slow
def test_submitits_signal_saves_requeues_and_goes_on_and_a_sigterm_saves_and_ends(
    tmp_path: Path, runtime_directory: Path
) -> None:
    job = Submitted(run_python(tmp_path, EXAMPLE, "--steps", "100000000"), tmp_path)
    task, step = job.start()
    assert step == 0

    os.kill(task, signal.SIGUSR2)  # as submitit's controller does before a timeout
    task, step = job.start(2)
    assert job.wait_for("saved after step")[0].split()[-1] == str(step)
    job.wait_for("Requeued job")

    os.kill(task, signal.SIGTERM)
    assert job.script.finish() == 0, job.transcript()
    last = job.wait_for("saved after step", 2)[-1].split()[-1]
    assert f"steps {step} to {last}" in job.script.output
    assert len(job.wait_for("pid ")) == 2  # it was not requeued
    assert not lock(runtime_directory).exists()


def test_a_job_that_is_cancelled_saves_and_a_killed_one_is_followed_by_the_next(
    tmp_path: Path, runtime_directory: Path
) -> None:
    killed = Submitted(run_python(tmp_path, EXAMPLE, "--steps", "100000000"), tmp_path)
    task, _ = killed.start()
    controller = psutil.Process(task).ppid()
    os.kill(task, signal.SIGKILL)
    wait_gone([controller])  # it starts no other one
    assert lock(runtime_directory).exists()

    again = tmp_path / "again"
    again.mkdir()
    job = Submitted(run_python(again, EXAMPLE, "--steps", "100000000"), again)
    task, _ = job.start()
    # What job.cancel() does, and Ctrl-C. The controller passes it on, and kills 1 s later.
    os.kill(psutil.Process(task).ppid(), signal.SIGINT)
    wait_gone([task])
    job.wait_for("saved after step")
    assert not lock(runtime_directory).exists()


def test_a_ctrl_c_that_the_controller_repeats_is_one_request(tmp_path: Path) -> None:
    script = run_python(tmp_path, EXAMPLE, "--steps", "100000000", "--step-time", "1")
    job = Submitted(script, tmp_path)
    task, _ = job.start()
    os.kill(task, signal.SIGINT)  # from the terminal
    job.wait_for("stop requested: SIGINT")
    os.kill(task, signal.SIGINT)  # from the controller, which got it as well
    job.wait_for("saved after step")
    assert script.finish() == 0, job.transcript()


def test_without_the_context_manager_submitit_decides_what_a_signal_does(
    tmp_path: Path, runtime_directory: Path
) -> None:
    job = Submitted(run_python(tmp_path, PLAIN, "1"), tmp_path)
    task, _ = job.start()
    os.kill(task, signal.SIGTERM)
    job.wait_for("Bypassing signal SIGTERM")
    os.kill(task, signal.SIGUSR2)
    task, _ = job.start(2)  # the lock was given back in between
    job.wait_for("checkpoint is called")
    assert "told" not in job.output

    os.kill(task, signal.SIGINT)
    job.wait_for("told")
    assert job.script.finish() == 0, job.transcript()
    assert not lock(runtime_directory).exists()


def test_an_error_reaches_submitit_and_the_lock_is_free(
    tmp_path: Path, runtime_directory: Path
) -> None:
    job = Submitted(run_python(tmp_path, PLAIN, "-1"), tmp_path)
    assert job.script.finish() == 1
    assert "no luck" in job.script.error_output
    assert "Requeued job" not in job.output
    assert not lock(runtime_directory).exists()


TWO_TASKS = """
import submitit
from orchard_infra import managed_environment

def train():
    with managed_environment("submitit") as env:
        return env.run.rank, env.is_locked, submitit.JobEnvironment().global_rank

executor = submitit.LocalExecutor("runs/submitit/%j")
executor.update_parameters(timeout_min=60, tasks_per_node=2)
print(executor.submit(train).results())
"""


def test_two_tasks_of_one_local_job_are_its_ranks_and_do_not_refuse_each_other(
    tmp_path: Path,
) -> None:
    script = run_python(tmp_path, TWO_TASKS)
    assert script.finish() == 0, script.transcript()
    assert script.output == "[(0, True, 0), (1, False, 1)]\n"


@pytest.fixture
def slurm() -> Iterator[SlurmServer]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with SlurmServer.start() as server:
        yield server


@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
def test_a_job_of_slurm_saves_is_requeued_and_goes_on(
    tmp_path: Path, runtime_directory: Path, slurm: SlurmServer
) -> None:
    command = [sys.executable, str(EXAMPLE), "--cluster=slurm", "--partition=main"]
    script = run_command(tmp_path, [*command, "--steps=100000000"], env=slurm.environ)
    job = Submitted(script, tmp_path)
    number = script.wait_for("job ").split()[-1]
    job.start()

    slurm.run("scancel", "--signal=USR2", number)  # as "--signal=USR2@90" of submitit's script
    job.wait_for("Requeued job")
    Job(slurm, number, tmp_path / "none").start_again()

    _, step = job.start(2)
    assert job.wait_for("saved after step")[0].split()[-1] == str(step)
    slurm.run("scancel", number)  # SIGTERM, and SIGKILL a few seconds later
    job.wait_for("saved after step", 2)
