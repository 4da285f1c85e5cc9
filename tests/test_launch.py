"""What an environment says of rank, job, launcher and scheduler. Every environment here is one that
the launcher or scheduler in question really sets, shortened to what tells it apart.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from orchard_infra.errors import ConfigurationError
from orchard_infra.launch import Launch, is_same_job
from support import Script, require_module, run_command, run_python

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
    "submitit on this host": (
        {
            "SUBMITIT_LOCAL_GLOBALID": "1",
            "SUBMITIT_LOCAL_LOCALID": "1",
            "SUBMITIT_LOCAL_NTASKS": "2",
        },
        (1, 1, 2, "submitit"),
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


RANKS = ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "NODE_RANK"]


@pytest.mark.parametrize("value", ["", " ", "-1"])
@pytest.mark.parametrize("variable", [*RANKS, "LOCAL_RANK"])
def test_an_empty_rank_and_minus_one_mean_no_rank(variable: str, value: str) -> None:
    assert Launch.from_environ({variable: value}) == Launch()


@pytest.mark.parametrize("value", ["abc", "1.0", "0x1", "None", "-2", "9" * 5000, "\x1b[31m1"])
@pytest.mark.parametrize("variable", RANKS)
def test_a_rank_that_is_no_number_is_an_error_and_not_rank_0(variable: str, value: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Launch.from_environ({variable: value})

    message = str(caught.value)
    shown = f"{variable}={value}" if len(value) < 10 and value.isprintable() else variable
    assert message.startswith(f"{shown} is not a rank")
    assert f"unset {variable} if this process is not part of a distributed job" in message


def test_a_local_rank_that_is_no_number_is_an_error_only_where_it_decides() -> None:
    with pytest.raises(ConfigurationError, match="LOCAL_RANK=one is not a rank"):
        Launch.from_environ({"LOCAL_RANK": "one", "WORLD_SIZE": "2", "MASTER_PORT": "1"})

    assert Launch.from_environ({"LOCAL_RANK": "cuda:1"}) == Launch()
    assert Launch.from_environ({"RANK": "3", "LOCAL_RANK": "one"}).rank == 3


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is not below WORLD_SIZE=0"),
        (
            {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "2"},
            "OMPI_COMM_WORLD_RANK=2 is not below OMPI_COMM_WORLD_SIZE=2",
        ),
        ({"PALS_RANKID": "2", "PMI_SIZE": "2"}, "PALS_RANKID=2 is not below PMI_SIZE=2"),
        (
            {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "4"},
            "SLURM_PROCID=9 is not below SLURM_STEP_NUM_TASKS=4",
        ),
        (
            {"LOCAL_RANK": "2", "NODE_RANK": "0", "WORLD_SIZE": "2"},
            "LOCAL_RANK=2 is not below WORLD_SIZE=2",
        ),
        (
            {"LOCAL_RANK": "1", "NODE_RANK": "3", "WORLD_SIZE": "4"},
            "NODE_RANK=3 is not below WORLD_SIZE=4",
        ),
    ],
)
def test_a_rank_that_is_not_below_its_world_size_is_an_error(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Launch.from_environ(environ)

    assert str(caught.value).startswith(message)
    assert "unset" in str(caught.value)


def test_the_world_size_of_another_launcher_does_not_limit_a_rank() -> None:
    """mpirun on 8 processes inside of a pod that is one of two."""
    environ = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "WORLD_SIZE": "2"}

    assert Launch.from_environ(environ).rank == 5
    assert Launch.from_environ({"RANK": "3", "WORLD_SIZE": "two", "PMI_SIZE": "2"}).rank == 3


def test_a_stray_rank_does_not_hide_the_launcher_behind_it() -> None:
    environ = {"RANK": "", "PMI_RANK": "1", "PMI_SIZE": "two"}

    assert Launch.from_environ(environ) == Launch(1, None, None, "mpiexec")


def test_a_rank_that_an_outer_launcher_left_is_not_asked() -> None:
    assert Launch.from_environ({"RANK": "1", "PMI_RANK": "abc"}).rank == 1


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

    assert launch == Launch(5, 1, 8, "torchrun", "slurm", "- TORCHELASTIC_RUN_ID=x")
    assert launch.reason_not_to_kill() == "this is a Slurm job (SLURM_JOB_ID=42)"


def test_mpirun_inside_slurm_gives_the_rank() -> None:
    """On the other nodes mpirun's daemon is a task of srun, and its ranks inherit its PROCID."""
    environ = {
        **SLURM,
        "SLURM_STEP_NUM_TASKS": "2",
        "OMPI_COMM_WORLD_RANK": "4",
        "OMPI_COMM_WORLD_SIZE": "8",
    }

    assert Launch.from_environ(environ) == Launch(
        4, None, 8, "mpirun", "slurm", "- SLURM_JOB_ID=42"
    )


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


@pytest.mark.parametrize("outer", [{}, SLURM, {"PMI_RANK": "0", "PMI_SIZE": "1"}])
def test_a_local_rank_that_nobody_could_meet_only_chooses_a_device(outer: dict[str, str]) -> None:
    """``LOCAL_RANK=1 python train.py``: such a run takes the lock. No launcher sets that alone."""
    launch = Launch.from_environ({**outer, "LOCAL_RANK": "1"})

    assert launch == Launch.from_environ(outer)
    assert launch.is_leader
    assert launch.reason_not_to_lock() is None


@pytest.mark.parametrize(
    "meeting_point",
    [
        {"NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        {"MASTER_PORT": "1"},  # Lightning's ddp_spawn and ddp_notebook
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"},  # started by hand, on each device
        {"WORLD_SIZE": "2"},
    ],
)
def test_a_local_rank_with_a_meeting_point_is_a_rank(meeting_point: dict[str, str]) -> None:
    launch = Launch.from_environ({**meeting_point, "LOCAL_RANK": "1"})

    assert (launch.rank, launch.launcher) == (1, "lightning")
    assert launch.reason_not_to_lock() == (
        "this is rank 1 of a distributed job started by lightning, and rank 0 takes it "
        "(LOCAL_RANK=1)"
    )
    assert Launch.from_environ({**meeting_point, "LOCAL_RANK": "0"}).is_leader


def test_the_reason_to_take_no_lock_names_the_rank_also_where_a_scheduler_is_known() -> None:
    environ = {**SLURM, "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}

    assert Launch.from_environ(environ).reason_not_to_lock() == (
        "this is rank 3 of a distributed job started by srun, and rank 0 takes it (SLURM_PROCID=3)"
    )
    assert Launch.from_environ({}).reason_not_to_lock() is None
    assert Launch(rank=2).reason_not_to_lock() == (
        "this is rank 2 of a distributed job, and rank 0 takes it"
    )


STEP = {**SLURM, "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
JOBS = [
    (STEP, "SLURM_JOB_ID=42.3"),
    ({**STEP, "SLURM_HET_JOB_ID": "41"}, "SLURM_HET_JOB_ID=41.3"),
    ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "exp1"}, "TORCHELASTIC_RUN_ID=exp1"),
    ({**STEP, **TORCHRUN, "TORCHELASTIC_RUN_ID": "exp1"}, "TORCHELASTIC_RUN_ID=exp1"),
    # The step is that of the agent: on another node it may be another one.
    ({**STEP, **TORCHRUN}, "SLURM_JOB_ID=42"),
    ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-a-7@1"}, "PMIX_NAMESPACE=prterun-a-7@1"),
    (
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_MCA_ess_base_jobid": "19136"},
        "OMPI_MCA_ess_base_jobid=19136",
    ),
    ({"OMPI_COMM_WORLD_RANK": "1", "PMIX_NAMESPACE": "p@1"}, "PMIX_NAMESPACE=p@1"),
    ({"PMI_RANK": "1", "PMI_JOBID": "42.0"}, "PMI_JOBID=42.0"),
    ({"PALS_RANKID": "1", "PALS_APID": "7-1"}, "PALS_APID=7-1"),
    ({"FLUX_TASK_RANK": "1", "FLUX_JOB_ID": "f2"}, "FLUX_JOB_ID=f2"),
    ({"JSM_NAMESPACE_RANK": "1", "LSB_JOBID": "7"}, "LSB_JOBID=7"),
    ({"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_JOB_ID": "7"}, "SUBMITIT_LOCAL_JOB_ID=7"),
    ({"PMI_RANK": "1", "LSB_JOBID": "7", "LSB_JOBINDEX": "2"}, "LSB_JOBID=7.2"),
    ({"RANK": "1", "RAY_JOB_ID": "01"}, "RAY_JOB_ID=01"),
    # A script has copied the rank of srun for PyTorch, and what else it knows.
    ({**STEP, "RANK": "0", "WORLD_SIZE": "4"}, "SLURM_JOB_ID=42.3"),
]


# What Slurm 22.05 has set for three tasks on two nodes: srun -n3 -N2 --mpi=pmi2
PMI2 = [
    {"PMI_RANK": str(rank), "SLURM_PROCID": str(rank), "SLURM_LOCALID": local, "SLURM_NODEID": node}
    for rank, (local, node) in enumerate([("0", "0"), ("1", "0"), ("0", "1")])
]
OF_STEP = {
    "PMI_JOBID": "1.0",
    "PMI_SIZE": "3",
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
}


def test_a_rank_that_srun_tells_by_pmi_as_well_is_one_of_srun() -> None:
    launches = [Launch.from_environ({**OF_STEP, **task}) for task in PMI2]
    assert [(one.launcher, one.rank, one.local_rank, one.node) for one in launches] == [
        ("srun", 0, 0, 0),
        ("srun", 1, 1, 0),
        ("srun", 2, 0, 1),
    ]
    assert {(one.world_size, one.job) for one in launches} == {(3, launches[0].job)}
    one_task = {**OF_STEP, **PMI2[0], "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}
    assert Launch.from_environ(one_task).rank is None
    by_pmix = {**OF_STEP, **PMI2[2], "PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.1.0"}
    by_pmix = {name: value for name, value in by_pmix.items() if not name.startswith("PMI_")}
    assert Launch.from_environ(by_pmix) == launches[2]


def test_the_ranks_of_an_mpiexec_below_srun_are_its_own() -> None:
    proxy = {**OF_STEP, **PMI2[1]}  # one of three that srun has started; each starts two ranks
    for rank in ("2", "3"):
        launch = Launch.from_environ({**proxy, "PMI_RANK": rank, "PMI_SIZE": "6"})
        assert (launch.launcher, launch.rank, launch.world_size) == ("mpiexec", int(rank), 6)


@pytest.mark.parametrize(("environ", "job"), JOBS)
def test_a_job_has_the_id_that_its_launcher_or_its_scheduler_gave_it(
    environ: dict[str, str], job: str
) -> None:
    assert Launch.from_environ(environ).job == f"- {job}"


@pytest.mark.parametrize(
    "environ", [{}, SLURM, {"LOCAL_RANK": "1"}, TORCHRUN, {"RANK": "1", "MASTER_PORT": "29500"}]
)
def test_no_job_is_made_up(environ: dict[str, str]) -> None:
    """Neither from torchrun's default id, which all have, nor from a port: it changes at a restart.
    A plain run in a batch script is no job of several processes.
    """
    assert Launch.from_environ(environ).job is None


def test_an_id_that_is_no_line_of_text_names_a_job_too() -> None:
    jobs = [
        Launch.from_environ({**TORCHRUN, "TORCHELASTIC_RUN_ID": run_id}).job
        for run_id in ("\x1b[31m", "\udcff", "x" * 5000, "x" * 5001)
    ]

    assert all(job and job.isascii() and job.isprintable() and len(job) < 200 for job in jobs)
    assert len(set(jobs)) == 4


def test_srun_is_the_launcher_where_a_script_copied_its_rank() -> None:
    copied = {**STEP, "SLURM_PROCID": "2", "RANK": "2", "WORLD_SIZE": "4"}
    nested = {**copied, "WORLD_SIZE": "8"}  # another launcher, one per node, which sets RANK only

    assert Launch.from_environ(copied).launcher == "srun"
    assert Launch.from_environ(nested).launcher == "unknown"


def test_the_count_of_restarts_is_shown_and_makes_no_other_job() -> None:
    first = Launch.from_environ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "0"}, "b:1:7@0.5")
    third = Launch.from_environ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}, "b:1:7@0.5")

    assert (first.restart, third.restart) == (0, 2)
    assert first == third
    assert is_same_job(first.job, third.job)
    assert Launch.from_environ({**SLURM, "SLURM_RESTART_COUNT": "1"}).restart == 1
    assert Launch.from_environ({**SLURM, "SLURM_RESTART_COUNT": "x"}).restart is None


@pytest.mark.parametrize(
    ("most", "done", "left"), [("2", "0", 2), ("2", "2", 0), ("0", "0", 0), ("2", None, None)]
)
def test_the_restarts_that_torchrun_has_left_are_known(
    most: str, done: str | None, left: int | None
) -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": most}
    if done is not None:
        environ["TORCHELASTIC_RESTART_COUNT"] = done
    assert Launch.from_environ(environ).restarts_left == left


def job_of(process: str | None, job_id: str) -> str | None:
    return Launch.from_environ({**TORCHRUN, "TORCHELASTIC_RUN_ID": job_id}, process).job


def test_on_one_host_the_process_of_the_launcher_tells_jobs_apart() -> None:
    one, other = "boot:4026:7@0.5", "boot:4026:8@0.5"

    assert is_same_job(job_of(one, "exp1"), job_of(one, "exp1"))
    assert is_same_job(job_of(one, "none"), job_of(one, "none"))
    # The same command, started twice: both have the id of the command line, or the default.
    assert not is_same_job(job_of(one, "exp1"), job_of(other, "exp1"))
    assert not is_same_job(job_of(one, "none"), job_of(other, "none"))
    # One agent that runs two jobs, and a pid that was used again.
    assert not is_same_job(job_of(one, "exp1"), job_of(one, "exp2"))
    assert not is_same_job(job_of(one, "exp1"), job_of("boot:4026:7@0.6", "exp1"))


@pytest.mark.parametrize("elsewhere", ["other:4026:7@0.5", "boot:4027:7@0.5", None])
def test_between_hosts_and_containers_the_id_names_the_job(elsewhere: str | None) -> None:
    here = "boot:4026:7@0.5"

    assert is_same_job(job_of(here, "exp1"), job_of(elsewhere, "exp1"))
    assert not is_same_job(job_of(here, "exp1"), job_of(elsewhere, "exp2"))
    assert not is_same_job(job_of(here, "none"), job_of(elsewhere, "none"))
    assert not is_same_job(None, None)
    assert not is_same_job(job_of(here, "exp1"), None)


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


# A rank that says how it was launched, as JSON in a line, and ends when it is told to.
RANK = """
import json, os, sys
from orchard_infra.launch import this_launch

def tell(**more):
    launch = this_launch()
    told = json.dumps({"rank": launch.rank, "launcher": launch.launcher, "job": launch.job,
                       "leads": launch.is_leader, "restart": launch.restart, **more})
    os.write(1, told.encode() + b"\\n")  # print writes the end of the line by itself

"""


def told(script: Script) -> list[dict[str, object]]:
    assert script.finish() == 0, script.transcript()
    return [json.loads(line) for line in script.output.splitlines() if line.startswith("{")]


def same_job(tellings: list[dict[str, object]]) -> bool:
    jobs = [telling["job"] for telling in tellings]
    return all(isinstance(job, str) and is_same_job(job, str(jobs[0])) for job in jobs)


@pytest.mark.slow
def test_the_ranks_of_a_real_torchrun_agree_on_their_job_also_after_an_elastic_restart(
    tmp_path: Path,
) -> None:
    """Two at a time with the default id, and with a script between agent and rank."""
    require_module("torch")
    (tmp_path / "rank.py").write_text(
        RANK + "tell()\nsys.exit(this_launch().restart == 0 and this_launch().rank == 1)\n"
    )
    (tmp_path / "rank.sh").write_text(f"export LOCAL_RANK=0\n{sys.executable} rank.py; exit $?\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    command = [*torchrun, "--max-restarts=1", "--nproc-per-node=2", "--no-python"]
    jobs = [
        run_command(
            tmp_path,
            [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "sh", "rank.sh"],
        )
        for _ in "ab"
    ]

    for tellings in map(told, jobs):
        assert {(telling["rank"], telling["restart"]) for telling in tellings} >= {
            (0, 1),
            (1, 0),
            (1, 1),
        }
        assert {telling["launcher"] for telling in tellings} == {"torchrun"}
        assert same_job(tellings)
    assert not is_same_job(*[str(told(job)[0]["job"]) for job in jobs])


def test_ranks_of_multiprocessing_agree_on_their_job(tmp_path: Path) -> None:
    """They set RANK themselves, or have it set, as torch.multiprocessing.spawn's children do."""
    script = run_python(
        tmp_path,
        RANK
        + """
def rank(number):
    os.environ.update(RANK=str(number), WORLD_SIZE="2")
    tell()

if __name__ == "__main__":
    import multiprocessing
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        ranks = [context.Process(target=rank, args=(number,)) for number in range(2)]
        [process.start() for process in ranks]
        [process.join() for process in ranks]
""",
    )

    tellings = told(script)
    assert sorted(telling["rank"] for telling in tellings) == [0, 0, 0, 1, 1, 1]
    assert same_job(tellings)


# lightning/fabric/strategies/launchers/subprocess_script.py, without Lightning
LIGHTNING = """
import subprocess
if "LOCAL_RANK" not in os.environ:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", NODE_RANK="0", LOCAL_RANK="0",
                      WORLD_SIZE="2")
    subprocess.run([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": "1"}, check=True)
tell()
"""


@pytest.mark.parametrize(
    "outer",
    [
        {},
        {"NODE_RANK": "0"},
        {"RANK": "0"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_the_process_that_lightning_started_first_is_the_launcher_of_the_others(
    tmp_path: Path, outer: dict[str, str]
) -> None:
    script = run_python(tmp_path, RANK + LIGHTNING, env=outer)

    tellings = told(script)
    assert [(telling["rank"], telling["leads"]) for telling in tellings] == [(1, False), (0, True)]
    assert same_job(tellings)


def test_a_script_between_launcher_and_rank_changes_nothing(tmp_path: Path) -> None:
    """mpiexec starts a shell for each rank, which copies the rank for PyTorch and goes on."""
    (tmp_path / "rank.py").write_text(RANK + "tell()\n")
    (tmp_path / "rank.sh").write_text(
        "export RANK=$PMI_RANK WORLD_SIZE=$PMI_SIZE LOCAL_RANK=0\n"
        "$PYTHON rank.py  # not exec: the shell stays\n"
    )
    launch = """
        import os, subprocess, sys
        ranks = [
            subprocess.Popen(["sh", "rank.sh"],
                             env={**os.environ, "PMI_RANK": str(rank), "PMI_SIZE": "2",
                                  "PYTHON": sys.executable})
            for rank in range(2)
        ]
        sys.exit(max(rank.wait() for rank in ranks))
    """
    launchers = [run_python(tmp_path, launch, name="mpiexec.py") for _ in "ab"]

    one, other = map(told, launchers)
    assert sorted(telling["rank"] for telling in one) == [0, 1]
    assert {telling["launcher"] for telling in one} == {"mpiexec"}
    assert same_job(one)
    assert same_job(other)
    assert not same_job([*one, *other])


def test_a_launcher_inside_of_a_rank_has_jobs_of_its_own(tmp_path: Path) -> None:
    """A rank of torchrun that runs torchrun: the inner rank 0 has all of the outer one's marks
    but one."""
    (tmp_path / "rank.py").write_text(RANK + "tell()\n")
    agent = """
        import os, subprocess, sys
        for number in range(2):
            own = f"/tmp/{os.getpid()}/{number}/error.json"
            command = [sys.executable, *(sys.argv[1:] or ["rank.py"])]
            subprocess.run(command, check=True,
                           env={**os.environ, "RANK": str(number), "WORLD_SIZE": "2",
                                "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": own})
    """
    outer = run_python(tmp_path, agent, "agent.py", name="agent.py")

    of_rank_0, of_rank_1 = (lambda all_: (all_[:2], all_[2:]))(told(outer))
    assert same_job(of_rank_0)
    assert same_job(of_rank_1)
    assert not same_job([*of_rank_0, *of_rank_1])
