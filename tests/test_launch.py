"""What an environment says of rank, launcher and scheduler. Every environment here is one that
the launcher or scheduler in question really sets, shortened to what tells it apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchard_infra.launch import Launch

SLURM = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}

SCHEDULERS = [
    ("slurm", SLURM, "this is a Slurm job (SLURM_JOB_ID=42)"),
    ("slurm", {"SLURM_JOBID": "42"}, "this is a Slurm job (SLURM_JOBID=42)"),
    ("pbs", {"PBS_JOBID": "7.head"}, "this is a PBS job (PBS_JOBID=7.head)"),
    ("lsf", {"LSB_JOBID": "7"}, "this is an LSF job (LSB_JOBID=7)"),
    (
        "sge",
        {"JOB_ID": "7", "SGE_TASK_ID": "undefined"},
        "this is a Grid Engine job (JOB_ID=7)",
    ),
    ("htcondor", {"_CONDOR_JOB_AD": "/x/.job.ad"}, "this is an HTCondor job"),
    ("htcondor", {"_CONDOR_SCRATCH_DIR": "/x"}, "this is an HTCondor job"),
    ("flux", {"FLUX_JOB_ID": "f2AbC"}, "this is a Flux job (FLUX_JOB_ID=f2AbC)"),
    ("flux", {"FLUX_ENCLOSING_ID": "f2AbC"}, "this is a Flux job"),
    ("oar", {"OAR_JOB_ID": "7"}, "this is an OAR job (OAR_JOB_ID=7)"),
    ("oar", {"OAR_JOBID": "7"}, "this is an OAR job (OAR_JOBID=7)"),
    ("cobalt", {"COBALT_JOBID": "7"}, "this is a Cobalt job"),
    ("moab", {"MOAB_JOBID": "7"}, "this is a Moab job"),
    ("pjm", {"PJM_JOBID": "7"}, "this is a Fujitsu TCS job"),
    ("sagemaker", {"SM_TRAINING_ENV": "{...}"}, "this is a SageMaker job"),
    ("sagemaker", {"TRAINING_JOB_NAME": "digits-1"}, "this is a SageMaker job"),
    ("vertex", {"CLOUD_ML_JOB_ID": "7"}, "this is a Vertex AI job"),
    ("azureml", {"AZUREML_RUN_ID": "digits_1"}, "this is an Azure ML job"),
    ("aws-batch", {"AWS_BATCH_JOB_ID": "7"}, "this is an AWS Batch job"),
    ("azure-batch", {"AZ_BATCH_JOB_ID": "7"}, "this is an Azure Batch task"),
    ("ray", {"RAY_JOB_ID": "01000000"}, "this is a Ray job (RAY_JOB_ID=01000000)"),
    ("ray", {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "this is a Ray job"),
    ("nomad", {"NOMAD_ALLOC_ID": "5b"}, "this is a Nomad task"),
    (
        "kubernetes",
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        "this is a Kubernetes pod (KUBERNETES_SERVICE_HOST=10.0.0.1)",
    ),
]

# name: environment, rank, local rank, world size, launcher
DISTRIBUTED = {
    "torchrun": (
        {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"},
        (5, 1, 8, "torchrun"),
    ),
    "torchrun with one process": (
        {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        (0, 0, 1, "torchrun"),
    ),
    "accelerate, which runs torchrun": (
        {
            "ACCELERATE_MIXED_PRECISION": "bf16",
            "TORCHELASTIC_RUN_ID": "x",
            "RANK": "1",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "2",
        },
        (1, 1, 2, "accelerate"),
    ),
    "deepspeed": (
        {"CROSS_RANK": "0", "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"},
        (3, 3, 4, "deepspeed"),
    ),
    "a rank and nothing else": ({"RANK": "1"}, (1, None, None, "unknown")),
    "Kubeflow's PyTorchJob": ({"RANK": "0", "WORLD_SIZE": "2"}, (0, None, 2, "unknown")),
    "horovodrun without MPI": (
        {"HOROVOD_RANK": "2", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_SIZE": "4"},
        (2, 0, 4, "horovodrun"),
    ),
    "mpirun of Open MPI": (
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "4",
            "PMIX_RANK": "3",
        },
        (3, 1, 4, "mpirun"),
    ),
    "mpirun of MVAPICH": (
        {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"},
        (1, 1, 2, "mpirun"),
    ),
    "mpiexec of MPICH and Intel MPI": (
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"},
        (3, 1, 4, "mpiexec"),
    ),
    "mpiexec of HPE Cray": (
        {"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", "PMI_RANK": "3", "PMI_SIZE": "4"},
        (3, 1, 4, "mpiexec"),
    ),
    "PMIx alone": ({"PMIX_RANK": "1"}, (1, None, None, "mpiexec")),
    "jsrun": (
        {
            "JSM_NAMESPACE_RANK": "7",
            "JSM_NAMESPACE_LOCAL_RANK": "1",
            "JSM_NAMESPACE_SIZE": "12",
        },
        (7, 1, 12, "jsrun"),
    ),
    "flux run": (
        {"FLUX_TASK_RANK": "2", "FLUX_TASK_LOCAL_ID": "0", "FLUX_JOB_SIZE": "4"},
        (2, 0, 4, "flux run"),
    ),
    "srun": (
        {**SLURM, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"},
        (3, 1, 4, "srun"),
    ),
    "the first task of srun": (
        {**SLURM, "SLURM_STEP_NUM_TASKS": "4"},
        (0, 0, 4, "srun"),
    ),
    "a process that Lightning started": (
        {"LOCAL_RANK": "2", "NODE_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"},
        (2, 2, 4, "lightning"),
    ),
    "the process that started Lightning's others": (
        {"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"},
        (0, 0, 4, "lightning"),
    ),
}


@pytest.mark.parametrize(("scheduler", "environ", "reason"), SCHEDULERS)
def test_each_scheduler_is_recognised_and_switches_killing_off(
    scheduler: str, environ: dict[str, str], reason: str
) -> None:
    launch = Launch.from_environ(environ)

    assert launch.scheduler == scheduler
    assert launch.shared_compute
    assert not launch.may_kill
    assert (launch.reason_not_to_kill() or "").startswith(reason)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_each_launcher_gives_rank_and_size_and_switches_killing_off(name: str) -> None:
    environ, expected = DISTRIBUTED[name]

    launch = Launch.from_environ(environ)

    assert (launch.rank, launch.local_rank, launch.world_size, launch.launcher) == expected
    assert launch.is_leader == (expected[0] == 0)
    assert not launch.may_kill


def test_a_plain_process_leads_and_may_kill() -> None:
    launch = Launch.from_environ({"HOME": "/home/a", "CUDA_VISIBLE_DEVICES": "0"})

    assert launch == Launch()
    assert launch.is_leader
    assert launch.may_kill
    assert not launch.shared_compute
    assert launch.reason_not_to_kill() is None


def test_the_reason_names_the_variable_that_told_us() -> None:
    environ, _ = DISTRIBUTED["torchrun"]

    assert Launch.from_environ(environ).reason_not_to_kill() == (
        "this is rank 5 of a distributed job started by torchrun (RANK=5)"
    )
    assert Launch.from_environ({"RANK": "1"}).reason_not_to_kill() == (
        "this is rank 1 of a distributed job (RANK=1)"
    )


@pytest.mark.parametrize("value", ["\x1b[31m42", "4\n2", "x" * 1000, "\udcff", "\u202e42"])
def test_the_reason_shows_no_value_that_a_terminal_should_not_see(value: str) -> None:
    reason = Launch.from_environ({"SLURM_JOB_ID": value}).reason_not_to_kill()

    assert reason == "this is a Slurm job (SLURM_JOB_ID)"


def test_a_launch_made_by_hand_has_a_reason_too() -> None:
    assert Launch(scheduler="slurm").reason_not_to_kill() == "this is a Slurm job"
    assert Launch(scheduler="ours").reason_not_to_kill() == "this is a ours job"
    assert Launch(launcher="torchrun").reason_not_to_kill() == (
        "this is one process of a distributed job started by torchrun"
    )
    assert not Launch(rank=0).may_kill


@pytest.mark.parametrize("value", ["abc", "", " ", "-1", "1.0", "0x1", "None", "9" * 5000])
@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "NODE_RANK"])
def test_a_stray_rank_is_ignored(variable: str, value: str) -> None:
    assert Launch.from_environ({variable: value}) == Launch()


def test_a_stray_rank_does_not_hide_the_launcher_behind_it() -> None:
    environ = {"RANK": "", "PMI_RANK": "1", "PMI_SIZE": "two"}

    assert Launch.from_environ(environ) == Launch(1, None, None, "mpiexec")


def test_a_world_size_alone_is_no_rank() -> None:
    assert Launch.from_environ({"WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}) == Launch()


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "PBS_JOBID", "KUBERNETES_SERVICE_HOST"])
def test_an_empty_job_id_is_no_scheduler(variable: str) -> None:
    assert not Launch.from_environ({variable: ""}).shared_compute


@pytest.mark.parametrize(
    "environ", [{"JOB_ID": "7"}, {"SGE_ROOT": "/opt/sge"}, {"RAY_ADDRESS": "ray://head:10001"}]
)
def test_what_login_shells_and_other_tools_set_is_no_job(environ: dict[str, str]) -> None:
    assert not Launch.from_environ(environ).shared_compute


def test_the_batch_script_of_slurm_leads_although_the_job_has_several_tasks() -> None:
    """sbatch sets SLURM_PROCID=0 and SLURM_NTASKS for the script, which is no task of a step."""
    launch = Launch.from_environ(SLURM)

    assert launch == Launch(scheduler="slurm")
    assert launch.is_leader


def test_a_step_of_one_task_and_the_shell_of_salloc_are_no_distributed_job() -> None:
    step = Launch.from_environ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"})
    shell = Launch.from_environ({"SLURM_JOB_ID": "42", "SLURM_NTASKS": "4"})

    assert step == shell == Launch(scheduler="slurm")


def test_a_task_of_slurm_follows_also_where_the_size_of_its_step_is_not_told() -> None:
    assert not Launch.from_environ({**SLURM, "SLURM_PROCID": "2"}).is_leader


def test_torchrun_inside_slurm_gives_the_rank_and_slurm_the_scheduler() -> None:
    """srun starts one torchrun per node, and SLURM_PROCID is that one's."""
    launch = Launch.from_environ(
        {**SLURM, "SLURM_STEP_NUM_TASKS": "2", **DISTRIBUTED["torchrun"][0]}
    )

    assert launch == Launch(5, 1, 8, "torchrun", "slurm")
    assert launch.reason_not_to_kill() == "this is a Slurm job (SLURM_JOB_ID=42)"


def test_mpirun_inside_slurm_gives_the_rank() -> None:
    """On the other nodes mpirun's daemon is a task of srun, and its ranks inherit its PROCID."""
    environ = {
        **SLURM,
        "SLURM_STEP_NUM_TASKS": "2",
        "OMPI_COMM_WORLD_RANK": "4",
        "OMPI_COMM_WORLD_SIZE": "8",
    }

    assert Launch.from_environ(environ) == Launch(4, None, 8, "mpirun", "slurm")


@pytest.mark.parametrize(
    "outer",
    [
        SLURM,
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"RANK": "0"},
    ],
)
def test_what_lightning_starts_inside_another_launcher_does_not_lead(
    outer: dict[str, str],
) -> None:
    """All of them inherit the outer rank 0; only LOCAL_RANK tells them apart."""
    children = [
        Launch.from_environ({**outer, "NODE_RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": rank})
        for rank in "0123"
    ]

    assert [child.is_leader for child in children] == [True, False, False, False]
    assert [child.rank for child in children] == [0, 1, 2, 3]


def test_lightning_on_the_second_node_does_not_lead_whatever_its_local_rank() -> None:
    environ = {"NODE_RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}

    assert not Launch.from_environ(environ).is_leader
    assert not Launch.from_environ({"NODE_RANK": "1"}).is_leader


def test_a_local_rank_in_a_world_of_one_only_chooses_a_device() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "2"}

    assert Launch.from_environ(environ).is_leader
    assert Launch.from_environ({"WORLD_SIZE": "1", "LOCAL_RANK": "2"}).is_leader


def test_accelerate_without_ranks_is_a_plain_process() -> None:
    """transformers sets the variable in every process that makes a TrainingArguments."""
    assert Launch.from_environ({"ACCELERATE_MIXED_PRECISION": "no"}).may_kill


def test_ray_and_the_cloud_services_are_named_rather_than_the_kubernetes_below() -> None:
    below = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}

    assert Launch.from_environ({**below, "RAY_JOB_ID": "01"}).scheduler == "ray"
    assert Launch.from_environ({**below, "CLOUD_ML_JOB_ID": "7"}).scheduler == "vertex"


def test_nothing_but_the_mapping_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "42")

    assert Launch.from_environ({}) == Launch()


def test_the_ranks_of_a_real_torchrun_are_read(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    script = tmp_path / "train.py"
    script.write_text(
        "import json, os\n"
        "with open('rank-' + os.environ['RANK'], 'w') as file:\n"
        "    json.dump(dict(os.environ), file)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    subprocess.run([*command, str(script)], cwd=tmp_path, check=True, capture_output=True)

    launches = [
        Launch.from_environ(json.loads((tmp_path / f"rank-{rank}").read_text())) for rank in (0, 1)
    ]
    assert launches == [Launch(0, 0, 2, "torchrun"), Launch(1, 1, 2, "torchrun")]
