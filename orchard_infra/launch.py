"""How this process was launched: its rank, the launcher and the scheduler.

Plain functions of an environment mapping. Nothing is imported, run or connected to in order to
find out. Two mistakes matter here: two processes that both think they lead, and a kill on a
machine that is not ours alone. So in doubt a process is a follower, and nothing is killed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import attrs


class _Scheduler(NamedTuple):
    name: str
    phrase: str  # "this is ..."
    variables: tuple[str, ...]  # any of them, set and not empty
    beside: str = ""  # and one whose name begins so, where the variable's own name says little


# The first match wins: what may run inside another one stands before it (Ray and the cloud
# services run on Kubernetes).
_SCHEDULERS = (
    # sbatch(1), srun(1), salloc(1); the second one is the name before Slurm 2
    _Scheduler("slurm", "a Slurm job", ("SLURM_JOB_ID", "SLURM_JOBID")),
    # qsub(1) of PBS Professional, OpenPBS and Torque; NQSV sets it as well
    _Scheduler("pbs", "a PBS job", ("PBS_JOBID",)),
    # IBM Spectrum LSF reference, "Environment variables set for job execution"
    _Scheduler("lsf", "an LSF job", ("LSB_JOBID",)),
    # submit(1) of Grid Engine. JOB_ID alone may be anybody's, SGE_ROOT alone is a login shell.
    _Scheduler("sge", "a Grid Engine job", ("JOB_ID",), beside="SGE_"),
    # HTCondor manual, "Services for running jobs: environment variables"
    _Scheduler("htcondor", "an HTCondor job", ("_CONDOR_JOB_AD", "_CONDOR_SCRATCH_DIR")),
    # flux-environment(7): the second one is all that the initial program of a batch job has
    _Scheduler("flux", "a Flux job", ("FLUX_JOB_ID", "FLUX_ENCLOSING_ID")),
    # oarsub(1)
    _Scheduler("oar", "an OAR job", ("OAR_JOB_ID", "OAR_JOBID")),
    # qsub(1) of Cobalt
    _Scheduler("cobalt", "a Cobalt job", ("COBALT_JOBID",)),
    # Moab Workload Manager, msub: "Exported variables"
    _Scheduler("moab", "a Moab job", ("MOAB_JOBID",)),
    # pjsub(1) of Fujitsu's Technical Computing Suite
    _Scheduler("pjm", "a Fujitsu TCS job", ("PJM_JOBID",)),
    # sagemaker-training-toolkit, ENVIRONMENT_VARIABLES.md; the others are set in every container
    _Scheduler(
        "sagemaker",
        "a SageMaker job",
        ("TRAINING_JOB_NAME", "TRAINING_JOB_ARN", "SM_TRAINING_ENV"),
    ),
    # Vertex AI, "Environment variables for custom training"
    _Scheduler("vertex", "a Vertex AI job", ("CLOUD_ML_JOB_ID",)),
    # azureml-mlflow and azureml-core read them to find the job that they run in
    _Scheduler("azureml", "an Azure ML job", ("AZUREML_RUN_ID",)),
    # AWS Batch user guide, "Job environment variables"
    _Scheduler("aws-batch", "an AWS Batch job", ("AWS_BATCH_JOB_ID",)),
    # Azure Batch, "Azure Batch runtime environment variables"
    _Scheduler("azure-batch", "an Azure Batch task", ("AZ_BATCH_JOB_ID",)),
    # Ray: src/ray/raylet/worker_pool.cc for workers, dashboard/modules/job for a job's driver.
    # RAY_ADDRESS is no sign: people set it on the laptop that they submit from.
    _Scheduler("ray", "a Ray job", ("RAY_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR")),
    # Nomad, "Runtime environment settings"
    _Scheduler("nomad", "a Nomad task", ("NOMAD_ALLOC_ID",)),
    # Kubernetes, "Service: environment variables": in every pod, also without service links
    _Scheduler("kubernetes", "a Kubernetes pod", ("KUBERNETES_SERVICE_HOST",)),
)


class _Ranks(NamedTuple):
    launcher: str
    rank: str
    local_rank: tuple[str, ...]
    world_size: tuple[str, ...]


# The first one that is set wins: the innermost launcher, which has set its variables last. Of
# an outer one every process inherits the same rank, and two of rank 0 would both lead.
_RANKS = (
    # PyTorch, "Environment variable initialization" and "torchrun: Environment Variables"; so do
    # accelerate, deepspeed, Ray Train, Kubeflow, and scripts that call init_process_group
    _Ranks("unknown", "RANK", ("LOCAL_RANK",), ("WORLD_SIZE",)),
    # horovod/runner/gloo_run.py; under mpirun Horovod goes by the variables of Open MPI
    _Ranks("horovodrun", "HOROVOD_RANK", ("HOROVOD_LOCAL_RANK",), ("HOROVOD_SIZE",)),
    # Open MPI, "Environment variables set for MPI applications"
    _Ranks(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
    ),
    # MVAPICH2 user guide, "Utilities: MV2_COMM_WORLD_LOCAL_RANK"
    _Ranks(
        "mpirun", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_SIZE",)
    ),
    # mpiexec(1) of HPE Cray PALS
    _Ranks("mpiexec", "PALS_RANKID", ("PALS_LOCAL_RANKID",), ("PALS_SIZE", "PMI_SIZE")),
    # Hydra (MPICH, Intel MPI), and every launcher that speaks PMI-1 or PMI-2: srun --mpi=pmi2
    _Ranks("mpiexec", "PMI_RANK", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("PMI_SIZE",)),
    # OpenPMIx; there is no variable for the size
    _Ranks("mpiexec", "PMIX_RANK", (), ()),
    # jsrun of LSF's job step manager
    _Ranks("jsrun", "JSM_NAMESPACE_RANK", ("JSM_NAMESPACE_LOCAL_RANK",), ("JSM_NAMESPACE_SIZE",)),
    # flux-environment(7)
    _Ranks("flux run", "FLUX_TASK_RANK", ("FLUX_TASK_LOCAL_ID",), ("FLUX_JOB_SIZE",)),
    # srun(1), and see below. Not SLURM_NTASKS: that is also what the batch script may start.
    _Ranks("srun", "SLURM_PROCID", ("SLURM_LOCALID",), ("SLURM_STEP_NUM_TASKS",)),
)

# Who set RANK, by what else they set.
_LAUNCHERS_OF_RANK = (
    # accelerate/utils/launch.py. Only beside a rank: transformers' TrainingArguments sets it in
    # plain runs, too.
    ("accelerate", "ACCELERATE_MIXED_PRECISION"),
    # torch/distributed/elastic/agent/server/local_elastic_agent.py
    ("torchrun", "TORCHELASTIC_RUN_ID"),
    # deepspeed/launcher/launch.py
    ("deepspeed", "CROSS_RANK"),
)


@attrs.frozen
class Launch:
    """How a process was launched, as far as its environment says.

    ``rank`` is the rank in the whole job, and None outside of a distributed one; under a launcher
    that tells only local ranks (Lightning's) it is a lower bound, and right for the first node.
    ``launcher`` is None outside of a distributed job, "unknown" where ranks are set and nothing
    says by whom. ``scheduler`` names the shared compute this process runs on, if it does.
    """

    rank: int | None = None
    local_rank: int | None = None
    world_size: int | None = None
    launcher: str | None = None
    scheduler: str | None = None
    _evidence: str = attrs.field(default="", eq=False)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Launch:
        """Read it off an environment. Values that are no number, or negative, count as unset.

        Under srun, mpirun and their like one process per task is taken for a rank of one job.
        Independent runs started that way (a sweep as one step) are told apart by unsetting the
        launcher's rank for each of them.
        """
        launch = _with_lightning(_launch_of_ranks(environ), environ)
        scheduler, evidence = _find_scheduler(environ)
        if scheduler is None:
            return launch
        return attrs.evolve(launch, scheduler=scheduler, evidence=evidence)

    @property
    def is_leader(self) -> bool:
        """Whether this process locks, sanitizes and cleans up for its job."""
        return self.rank is None or self.rank == 0

    @property
    def shared_compute(self) -> bool:
        """Whether the machine is a scheduler's, who cleans up after jobs and has other users."""
        return self.scheduler is not None

    @property
    def may_kill(self) -> bool:
        """Whether processes may be stopped that this run has not started itself."""
        return self.reason_not_to_kill() is None

    def reason_not_to_kill(self) -> str | None:
        """Why nothing is killed here, naming the variable that says so; None when it may be."""
        if self.scheduler is not None:
            phrases = {scheduler.name: scheduler.phrase for scheduler in _SCHEDULERS}
            reason = f"this is {phrases.get(self.scheduler, f'a {self.scheduler} job')}"
        elif self.launcher is not None or self.rank is not None:
            who = "one process" if self.rank is None else f"rank {self.rank}"
            by = "" if self.launcher in (None, "unknown") else f" started by {self.launcher}"
            reason = f"this is {who} of a distributed job{by}"
        else:
            return None
        return f"{reason} ({self._evidence})" if self._evidence else reason


def _find_scheduler(environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The scheduler's name and the variable that says so."""
    for name, _, variables, beside in _SCHEDULERS:
        found = next((variable for variable in variables if environ.get(variable)), None)
        if found and (not beside or any(other.startswith(beside) for other in environ)):
            return name, _shown(environ, found)
    return None, ""


def _launch_of_ranks(environ: Mapping[str, str]) -> Launch:
    for launcher, variable, local_ranks, world_sizes in _RANKS:
        rank = _number(environ, variable)
        if rank is None:
            continue
        world_size = _first_number(environ, world_sizes)
        if launcher == "srun" and rank == 0 and (world_size or 1) == 1:
            # The batch script itself and a step of one task (an interactive shell) have
            # SLURM_PROCID=0, too, and are no rank of anything.
            continue
        if launcher == "unknown":
            marks = (name for name, mark in _LAUNCHERS_OF_RANK if mark in environ)
            launcher = next(marks, launcher)
        local_rank = _first_number(environ, local_ranks)
        evidence = _shown(environ, variable)
        return Launch(rank, local_rank, world_size, launcher, evidence=evidence)
    return Launch()


def _with_lightning(launch: Launch, environ: Mapping[str, str]) -> Launch:
    """The rank among the processes that Lightning started, if it did.

    It runs the script again for every further device, with LOCAL_RANK, NODE_RANK, WORLD_SIZE and
    no RANK in its environment (lightning/fabric/strategies/launchers/subprocess_script.py). What
    an outer launcher has set they all inherit, so that its rank 0 is several processes.
    """
    local_rank = _number(environ, "LOCAL_RANK")
    node_rank = _number(environ, "NODE_RANK")
    world_size = _number(environ, "WORLD_SIZE")
    if launch.rank is None and (local_rank is not None or node_rank is not None):
        # The number of processes on the nodes before is not known: at least one each.
        rank = (node_rank or 0) + (local_rank or 0)
        found = "LOCAL_RANK" if local_rank is not None and not node_rank else "NODE_RANK"
        launcher = "lightning"
    elif launch.rank == 0 and local_rank:
        rank, found, launcher = local_rank, "LOCAL_RANK", launch.launcher or "lightning"
    else:
        return launch
    if world_size == 1:
        return launch  # LOCAL_RANK is how some choose a GPU by hand
    return Launch(rank, local_rank, world_size, launcher, evidence=_shown(environ, found))


def _first_number(environ: Mapping[str, str], variables: Iterable[str]) -> int | None:
    numbers = (_number(environ, variable) for variable in variables)
    return next((number for number in numbers if number is not None), None)


def _number(environ: Mapping[str, str], variable: str) -> int | None:
    try:
        number = int(environ.get(variable, ""))
    except ValueError:
        return None
    # -1 is how some scripts say "not distributed".
    return number if number >= 0 else None


def _shown(environ: Mapping[str, str], variable: str) -> str:
    """``NAME=value`` for a message; the bare name where the value is long or not for a terminal."""
    value = environ.get(variable, "")
    return f"{variable}={value}" if len(value) <= 40 and value.isprintable() else variable
