"""`orchard-infra doctor` warns of batch scripts that cost a checkpoint."""

from __future__ import annotations

import json
import os

import pytest

from slurm_server import EXAMPLES
from support import require_module
from wrapping import COMMAND

# Answers as scontrol does, of a job whose script is the file beside it.
SCONTROL = """#!/bin/sh
case "$1 $2" in
    "show config") echo "JobFileAppend           = ${FILE_APPEND:-0}" ;;
    show*) echo "JobId=7 JobName=x Requeue=$REQUEUE Restarts=0 BatchFlag=1 JobState=RUNNING" ;;
    write*) cat "$(dirname "$0")/script" ;;
esac
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """What the check says of a script: not as a command, and not in a job, of which there would be
    thirty.
    """
    require_module("click")
    from orchard_infra.cli.doctor.base import Setup
    from orchard_infra.cli.doctor.checks import examine

    directory = tmp_path / "bin"
    directory.mkdir()
    scontrol = directory / "scontrol"
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")

    def judge(script: str, requeue: bool = False, **environ: str):
        (directory / "script").write_text(script)
        monkeypatch.setenv("REQUEUE", str(int(requeue)))
        setup = Setup(None, {"SLURM_JOB_ID": "7", **environ})
        ((_, check),) = examine(setup, ["Slurm job"])
        return check()

    return judge


def batch(*commands: str, signal: str | None = "B:TERM@120", mode: str = "append") -> str:
    options = [f"#SBATCH --signal={signal}"] if signal else []
    return "\n".join(("#!/bin/bash", *options, f"#SBATCH --open-mode={mode}", *commands, ""))


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.sbatch")))
def test_the_examples_are_right(judge, name):
    check = judge((EXAMPLES / name).read_text(), requeue=True)
    assert check.level == "ok", check
    assert "passes signals on" in check.text


@pytest.mark.parametrize(
    "script",
    [
        batch("module load python/3.11", "source env/bin/activate", "exec python train.py"),
        batch("python -m pip install -e .", "python prepare.py", "exec python train.py"),
        batch("cd here && OMP_NUM_THREADS=1 exec torchrun --nproc-per-node=2 train.py"),
        batch("exec numactl --cpunodebind=0 python3.11 train.py"),
        batch("exec apptainer exec --nv image.sif python train.py"),
        batch("exec orchard-infra run -p digits -- python train.py"),
        batch("srun python train.py", signal="TERM@120"),
        batch("if ! srun -n 2 python train.py | tee log; then exit 1; fi", signal="TERM@120"),
        batch("orchard-infra doctor", "srun python train.py", signal="TERM@120"),
        batch("srun --ntasks=2 \\", "    python train.py", signal="SIGTERM"),
        batch("trap 'kill -TERM $!' TERM", "python train.py &", "wait", "wait"),
        batch("trap : TERM", "srun python train.py", signal="R:15@60"),
        batch("trap stop USR1", "srun python train.py &", "wait", signal="B:USR1@60"),
    ],
)
def test_a_script_that_passes_signals_on_is_right(judge, script):
    check = judge(script)
    assert check.level == "ok", check
    assert "passes signals on" in check.text


@pytest.mark.parametrize(
    ("script", "text", "advice"),
    [
        (batch("python train.py"), "line 4 (python train.py) gets no signal", "exec or with srun"),
        (batch("exec python train.py | tee log"), "gets no signal", "exec or with srun"),
        (batch("cd here && time python train.py"), "gets no signal", "exec or with srun"),
        (batch("conda run -n env python train.py"), "gets no signal", "exec or with srun"),
        (batch("python train.py &", "wait"), "gets no signal", "exec or with srun"),
        (batch("trap : TERM", "python train.py &", "wait"), "gets no signal", "exec or with srun"),
        (batch("exec python train.py", signal="TERM@120"), "does not get it", "B:TERM@120"),
        (batch("srun python train.py"), "is for the shell alone", "--signal=TERM@120, without B:"),
        (batch("trap : TERM", "srun python a.py"), "is for the shell alone", "without B:"),
        (batch("exec python train.py", signal="B:USR1@60"), "kills a program", "SIGUSR1"),
        (batch("srun python train.py", signal="SIGUSR2"), "kills a program", "SIGUSR2"),
        (batch("exec python train.py", signal=None), "without --signal", "--signal=B:TERM@120"),
        (batch("srun python train.py", signal=None), "without --signal", "--signal=TERM@120"),
    ],
)
def test_a_script_that_costs_the_checkpoint_is_a_warning(judge, script, text, advice):
    check = judge(script)
    assert check.level == "warning", check
    assert text in check.text
    assert advice in check.advice


def test_output_that_a_requeue_empties_is_a_warning(judge, monkeypatch):
    script = batch("exec python train.py", mode="truncate")
    assert judge(script).level == "ok"
    check = judge(script, requeue=True)
    assert check.level == "warning"
    assert "emptied when the job is requeued" in check.text
    assert "--open-mode=append" in check.advice
    assert judge(script, requeue=True, SBATCH_OPEN_MODE="append").level == "ok"
    monkeypatch.setenv("FILE_APPEND", "1")  # what the site has chosen
    assert judge(script, requeue=True).level == "ok"


def test_a_job_that_requeues_itself_blindly_is_a_warning(judge):
    again = "srun python train.py || scontrol requeue $SLURM_JOB_ID"
    check = judge(batch(again, signal="TERM@60"))
    assert check.level == "warning"
    assert "a job that is cancelled comes back" in check.text
    assert "JobState=RUNNING" in check.advice


def test_what_is_no_job_or_starts_nothing_known_is_no_warning(judge, tmp_path):
    assert judge("", SLURM_JOB_ID="").text == "not in a Slurm job"
    check = judge(batch("./run.sh", "echo python train.py"))
    assert check.level == "ok"
    assert "no training program was recognised" in check.text


@pytest.mark.xdist_group("slurm")
def test_in_a_real_job_its_script_is_found(slurm, tmp_path):
    command = f"'{COMMAND}' doctor --json 'Slurm job'"
    wrong = f"#!/bin/bash\n#SBATCH --requeue\n{command}\nif false; then python train.py; fi\n"
    right = wrong.replace("python", "exec python")
    chosen = {"SBATCH_SIGNAL": "B:TERM@60", "SBATCH_OPEN_MODE": "append"}

    jobs = [slurm.submit(tmp_path, wrong), slurm.submit(tmp_path, right, env=chosen)]

    assert [job.wait() for job in jobs] == ["COMPLETED"] * 2, jobs[0].transcript()
    first, second = (json.loads(job.output)["checks"][0] for job in jobs)
    assert f"the script of job {jobs[0].id}: line 4 (python train.py)" in first["text"]
    assert "emptied when the job is requeued" in first["text"]
    assert second["status"] == "ok", second
