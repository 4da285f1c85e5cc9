"""The ranks of one step, on two nodes that are hosts to each other, start and stop together."""

from __future__ import annotations

import textwrap

import pytest

from slurm_server import can_isolate
from support import run_python

pytestmark = pytest.mark.xdist_group("slurm")

needs_hosts = pytest.mark.skipif(
    not can_isolate(), reason="needs a real root, to make hosts of nodes"
)

HOLDER = """
    import sys
    from orchard_infra import EnvironmentConfig, managed_environment
    config = EnvironmentConfig("slurm-train", lock_file_path=sys.argv[1])
    with managed_environment(config):
        print("ready", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another run that has the lock."""
    lock = tmp_path / "runs" / "slurm-train" / "train.lock"
    lock.parent.mkdir(parents=True)
    run = run_python(tmp_path, HOLDER, str(lock), name="holder.py")
    run.wait_for("ready")
    return run


@needs_hosts
def test_a_rank_on_another_host_waits_until_rank_0_has_the_lock(submit, holder, training):
    job = submit("ranks.sbatch", train="--steps 20 --step-time 0.05", hosts=True)
    job.wait_for("waiting for the lock")
    job.wait_for("rank 1 waits for rank 0")
    assert "training from step" not in job.output

    holder.stdin.close()

    job.wait_for("training from step", 2)
    assert job.wait() == "COMPLETED", job.transcript()
    assert training.saved_step == 20
    assert not training.records


SAY = """
    import sys, psutil
    from orchard_infra.launch import this_launch
    launch = this_launch()
    started_by = "nobody"
    if launch.job:
        pid = launch.job.split()[0].rpartition(":")[2].partition("@")[0]
        started_by = psutil.Process(int(pid)).name()
    print(sys.argv[1], launch.launcher, launch.rank, launch.world_size, launch.node, started_by)
    print(sys.argv[1], "is", launch.job)
"""


def test_ranks_of_a_step_are_one_job_and_all_else_is_a_plain_run(slurm, tmp_path):
    (tmp_path / "say.py").write_text(textwrap.dedent(SAY))
    job = slurm.submit(
        tmp_path,
        "#!/bin/bash\n"
        "python say.py batch\n"
        "srun -n1 -N1 python say.py one\n"
        "srun -n2 -N1 python say.py two\n"
        "srun -n2 -N1 bash -c 'python say.py shell; true'\n"
        "srun -n2 -N2 python say.py nodes\n"
        "srun -n2 -N1 --mpi=pmi2 python say.py pmi2\n",
        *("--nodes=2", "--ntasks=4"),
    )

    assert job.wait() == "COMPLETED", job.transcript()
    said = [line for line in job.output.splitlines() if not line.startswith("srun:")]
    jobs = [line for line in said if " is " in line]
    assert sorted(line for line in said if line not in jobs) == [
        "batch None None None None nobody",
        "nodes srun 0 2 0 slurmstepd",
        "nodes srun 1 2 1 slurmstepd",
        "one None None None None nobody",
        "pmi2 srun 0 2 0 slurmstepd",
        "pmi2 srun 1 2 0 slurmstepd",
        "shell srun 0 2 0 slurmstepd",
        "shell srun 1 2 0 slurmstepd",
        "two srun 0 2 0 slurmstepd",
        "two srun 1 2 0 slurmstepd",
    ]
    # On one node the ranks agree wholly, on two by the id; no two steps are the same.
    by_step = {step: {line for line in jobs if line.startswith(step)} for step in ("two", "shell")}
    assert [len(found) for found in by_step.values()] == [1, 1], jobs
    ids = [line.split()[-1] for line in jobs if not line.endswith("None")]
    assert sorted({one.split("=")[1] for one in ids}) == [
        f"{job.id}.{step}" for step in range(1, 5)
    ], jobs
