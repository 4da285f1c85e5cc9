"""How this process was launched: its rank, its job, the launcher and the scheduler.

`Launch.from_environ` is a plain function of an environment mapping. Nothing is imported, run or
connected to in order to find out. `this_launch` also looks for the launcher's process. Two
mistakes matter here: two processes that both think they lead, and a kill on a machine that is not
ours alone. So in doubt a process is a follower, and nothing is killed.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import attrs

from orchard_infra.errors import ConfigurationError

if TYPE_CHECKING:
    from orchard_infra.system.processes import ProcessIdentity

# Names of a job: alternatives, the first one that is set counts. The first variable of one has
# to be set, the others are added where they are.
_Names = tuple[tuple[str, ...], ...]


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


# What names a job to all of its hosts, for launchers that have no id of their own.
_JOBS_OF_SCHEDULERS: dict[str, _Names] = {
    # Each component of a heterogeneous job has a SLURM_JOB_ID of its own.
    "slurm": (("SLURM_HET_JOB_ID",), ("SLURM_JOB_ID",), ("SLURM_JOBID",)),
    "pbs": (("PBS_JOBID",),),
    "lsf": (("LSB_JOBID", "LSB_JOBINDEX"),),  # all elements of an array have the same LSB_JOBID
    "sge": (("JOB_ID", "SGE_TASK_ID"),),  # and the same JOB_ID
    "flux": (("FLUX_JOB_ID",),),
    "oar": (("OAR_JOB_ID",), ("OAR_JOBID",)),
    "cobalt": (("COBALT_JOBID",),),
    "moab": (("MOAB_JOBID",),),
    "sagemaker": (("TRAINING_JOB_NAME",),),
    "vertex": (("CLOUD_ML_JOB_ID",),),
    "azureml": (("AZUREML_RUN_ID",),),
    "ray": (("RAY_JOB_ID",),),
}


# An array of jobs, and which element of it this is: sbatch(1), qsub(1) of PBS, the IBM Spectrum LSF
# reference, submit(1) of Grid Engine.
_ARRAYS = (
    ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
    ("PBS_ARRAY_ID", "PBS_ARRAY_INDEX"),
    ("LSB_JOBID", "LSB_JOBINDEX"),
    ("JOB_ID", "SGE_TASK_ID"),
)


class _Ranks(NamedTuple):
    launcher: str
    rank: str
    local_rank: tuple[str, ...]
    world_size: tuple[str, ...]
    job: _Names = ()


# The first one that is set wins: the innermost launcher, which has set its variables last. Of
# an outer one every process inherits the same rank, and two of rank 0 would both lead.
_RANKS = (
    # PyTorch, "Environment variable initialization" and "torchrun: Environment Variables"; so do
    # accelerate, deepspeed, Ray Train, Kubeflow, and scripts that call init_process_group
    _Ranks("unknown", "RANK", ("LOCAL_RANK",), ("WORLD_SIZE",), (("TORCHELASTIC_RUN_ID",),)),
    # horovod/runner/gloo_run.py; under mpirun Horovod goes by the variables of Open MPI
    _Ranks("horovodrun", "HOROVOD_RANK", ("HOROVOD_LOCAL_RANK",), ("HOROVOD_SIZE",)),
    # Open MPI, "Environment variables set for MPI applications"; the job's id up to version 4 is
    # from orte/mca/odls/base/odls_base_default_fns.c, from version 5 on PRRTE sets PMIX_NAMESPACE
    _Ranks(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        (("OMPI_MCA_ess_base_jobid",), ("PMIX_NAMESPACE",)),
    ),
    # MVAPICH2 user guide, "Utilities: MV2_COMM_WORLD_LOCAL_RANK"
    _Ranks(
        "mpirun",
        "MV2_COMM_WORLD_RANK",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        (("PMI_JOBID",),),
    ),
    # mpiexec(1) of HPE Cray PALS
    _Ranks(
        "mpiexec",
        "PALS_RANKID",
        ("PALS_LOCAL_RANKID",),
        ("PALS_SIZE", "PMI_SIZE"),
        (("PALS_APID",),),
    ),
    # Hydra (MPICH, Intel MPI), which has no id, and every launcher that speaks PMI-1 or PMI-2;
    # for srun see `_is_of_srun`
    _Ranks(
        "mpiexec",
        "PMI_RANK",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("PMI_SIZE",),
        (("PMI_JOBID",),),
    ),
    # OpenPMIx; there is no variable for the size
    _Ranks("mpiexec", "PMIX_RANK", (), (), (("PMIX_NAMESPACE",),)),
    # jsrun of LSF's job step manager
    _Ranks(
        "jsrun",
        "JSM_NAMESPACE_RANK",
        ("JSM_NAMESPACE_LOCAL_RANK",),
        ("JSM_NAMESPACE_SIZE",),
        (("PMIX_NAMESPACE",), ("LSB_JOBID",)),
    ),
    # flux-environment(7)
    _Ranks(
        "flux run",
        "FLUX_TASK_RANK",
        ("FLUX_TASK_LOCAL_ID",),
        ("FLUX_JOB_SIZE",),
        (("FLUX_JOB_ID",),),
    ),
    # submitit/local/local.py, and see below; a job of its SlurmExecutor is one of srun
    _Ranks(
        "submitit",
        "SUBMITIT_LOCAL_GLOBALID",
        ("SUBMITIT_LOCAL_LOCALID",),
        ("SUBMITIT_LOCAL_NTASKS",),
        (("SUBMITIT_LOCAL_JOB_ID",),),
    ),
    # srun(1), and see below. Not SLURM_NTASKS: that is also what the batch script may start.
    # The older names of the ids are from Slurm 1 and are still set.
    _Ranks(
        "srun",
        "SLURM_PROCID",
        ("SLURM_LOCALID",),
        ("SLURM_STEP_NUM_TASKS",),
        (
            ("SLURM_HET_JOB_ID", "SLURM_STEP_ID"),
            ("SLURM_JOB_ID", "SLURM_STEP_ID"),
            ("SLURM_JOBID", "SLURM_STEPID"),
        ),
    ),
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

# Which host of the job this is, counted from 0, by launcher.
_NODES = {
    "torchrun": ("GROUP_RANK",),  # local_elastic_agent.py
    "accelerate": ("GROUP_RANK",),
    "deepspeed": ("CROSS_RANK",),  # deepspeed/launcher/launch.py
    "lightning": ("NODE_RANK",),  # subprocess_script.py
    "srun": ("SLURM_NODEID",),  # srun(1)
    "mpiexec": ("PALS_NODEID",),  # mpiexec(1) of HPE Cray PALS
}

# How often a job was started again: torchrun --max-restarts, and sbatch(1) after a requeue.
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")

# What ranks need to find each other. A LOCAL_RANK without any of them is how some choose a GPU.
_MEETING_POINT = ("MASTER_PORT", "MASTER_ADDR", "NODE_RANK", "WORLD_SIZE")


@attrs.frozen
class Launch:
    """How a process was launched, as far as its environment says.

    ``rank`` is the rank in the whole job, and None outside of a distributed one; under a launcher
    that tells only local ranks (Lightning's) it is a lower bound, and right for the first node.
    ``launcher`` is None outside of a distributed job, "unknown" where ranks are set and nothing
    says by whom. ``scheduler`` names the shared compute this process runs on, if it does.

    ``job`` is what all ranks of one job have in common and no other job has; compare it by
    `is_same_job` only. It stays the same through elastic restarts. None outside of a distributed
    job, and where nothing names it. ``restart`` counts the restarts of the job, for display,
    and ``restarts_left`` is how often torchrun would start it again. ``node`` is which of the job's
    hosts this one is, where the launcher says so.
    """

    rank: int | None = None
    local_rank: int | None = None
    world_size: int | None = None
    launcher: str | None = None
    scheduler: str | None = None
    job: str | None = None
    restart: int | None = attrs.field(default=None, eq=False)
    restarts_left: int | None = attrs.field(default=None, eq=False)
    node: int | None = None
    _evidence: str = attrs.field(default="", eq=False)  # of the scheduler, else of the rank
    _rank_from: str = attrs.field(default="", eq=False)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], started_by: str | None = None) -> Launch:
        """Read it off an environment, and nothing else.

        ``started_by`` names the launcher's process for ``job``; `this_launch` finds it.

        A rank that is empty or -1 counts as unset, and so does a world size that is no number.
        Under srun, mpirun and their like one process per task is taken for a rank of one job.
        Independent runs started that way (a sweep as one step) are told apart by unsetting the
        launcher's rank for each of them.

        Raises:
            ConfigurationError: A rank is no number, or not below the world size.
        """
        ranks, job = _launch_of_ranks(environ)
        ranks = _with_lightning(ranks, environ)
        scheduler, evidence = _find_scheduler(environ)
        launch = attrs.evolve(
            ranks,
            scheduler=scheduler,
            restart=_first_number(environ, _RESTARTS),
            restarts_left=_restarts_left(environ),
            node=_first_number(environ, _NODES.get(ranks.launcher or "", ())),
            evidence=evidence or ranks._rank_from,
        )
        if launch.launcher is None:
            return launch
        job_id = _name_of(environ, (*job, *_JOBS_OF_SCHEDULERS.get(scheduler or "", ())))
        if job_id is None and started_by is None:
            return launch
        return attrs.evolve(launch, job=f"{started_by or '-'} {job_id or '-'}")

    @property
    def is_leader(self) -> bool:
        """Whether this process locks, sanitizes and cleans up for its job."""
        return self.rank is None or self.rank == 0

    @property
    def is_on_first_node(self) -> bool | None:
        """Whether this is the host of rank 0; None where nothing says so."""
        if self.rank is None or self.rank == 0:
            return True
        if self.node is not None:
            return self.node == 0
        if self.local_rank is None:
            return None
        # Of the first host's ranks each is its local rank, unless they are dealt out like cards.
        return True if self.rank == self.local_rank else False if self.local_rank == 0 else None

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
            reason = f"this is {self._place()}"
        else:
            return None
        return f"{reason} ({self._evidence})" if self._evidence else reason

    def reason_not_to_lock(self) -> str | None:
        """Why this process takes no lock, naming the variable that says so; None for a leader."""
        if self.is_leader:
            return None
        reason = f"this is {self._place()}, and rank 0 takes it"
        return f"{reason} ({self._rank_from})" if self._rank_from else reason

    def _place(self) -> str:
        who = "one process" if self.rank is None else f"rank {self.rank}"
        by = "" if self.launcher in (None, "unknown") else f" started by {self.launcher}"
        return f"{who} of a distributed job{by}"


def this_launch() -> Launch:
    """How this process was launched. ``job`` names the launcher's process on this host as well.

    Raises:
        ConfigurationError: See `Launch.from_environ`.
    """
    if is_plain():
        return Launch()
    environ = dict(os.environ)  # which encodes and decodes at every look
    launch = Launch.from_environ(environ)
    if launch.launcher is None:
        return launch
    return Launch.from_environ(environ, started_by=_launcher_process(launch))


def is_plain() -> bool:
    """Whether our environment tells of no rank and no scheduler: a cheap look, for every run."""
    # The dict inside, with names as bytes: to go through the mapping itself takes five times as
    # long, and more than locking a file where there are many variables.
    if os.supports_bytes_environ:
        names = getattr(os.environb, "_data", os.environb)
    else:
        names = map(os.fsencode, os.environ)
    return _telling_variables().isdisjoint(names)


@functools.cache
def _telling_variables() -> frozenset[bytes]:
    """Without any of these an environment tells nothing: mostly one look at its names is enough."""
    return frozenset(
        os.fsencode(name)
        for name in (
            *(variable for scheduler in _SCHEDULERS for variable in scheduler.variables),
            *(ranks.rank for ranks in _RANKS),
            *("LOCAL_RANK", "NODE_RANK"),
            *_RESTARTS,
        )
    )


def scheduler_job(environ: Mapping[str, str]) -> str | None:
    """The job of a scheduler that a process was started in; None outside of any, and where the
    scheduler does not name it.
    """
    scheduler, _ = _find_scheduler(environ)
    name = _name_of(environ, _JOBS_OF_SCHEDULERS.get(scheduler or "", ()))
    return None if name is None else f"{scheduler} {name}"


def is_other_element(environ: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two processes were started in two elements of one array of jobs."""
    return any(
        environ.get(array, "") == other.get(array) != ""
        and environ.get(element, "") != other.get(element, "") != ""
        for array, element in _ARRAYS
    )


def is_same_job(job: str | None, other: str | None) -> bool:
    """Whether two values of `Launch.job` name the same job.

    On one host the launcher's process decides: two launchers that were given the same id, or the
    default one, run two jobs. Each host of a job has a launcher's process of its own, so between
    hosts the id has to do.
    """
    if job is None or other is None:
        return False
    process, _, job_id = job.partition(" ")
    other_process, _, other_id = other.partition(" ")
    if _host_of(process) == _host_of(other_process) != "-":
        return (process, job_id) == (other_process, other_id)
    return job_id == other_id != "-"


def is_known_elsewhere(job: str | None) -> bool:
    """Whether a job has an id, by which its ranks on other hosts know it."""
    return job is not None and job.partition(" ")[2] != "-"


def launcher_of(job: str | None) -> ProcessIdentity | None:
    """The launcher's process that a job names, alive or dead; None where there is none, and where
    that is on another host.
    """
    from orchard_infra.system import processes

    host, _, process = (job or "").partition(" ")[0].rpartition(":")
    if host != _this_host():
        return None
    pid, _, create_time = process.partition("@")
    try:
        return processes.ProcessIdentity(int(pid), float(create_time))
    except ValueError:
        return None


def processes_of_rank_0(launch: Launch) -> set[ProcessIdentity] | None:
    """The processes of rank 0 of this job on this host, by the environment that they were started
    with; a shell around it is one, too. None where that cannot be seen: the launcher has gone, or
    it sets ranks inside of the processes.
    """
    from orchard_infra.system import processes

    launcher = launcher_of(launch.job)
    if launcher is None or not processes.is_alive(launcher):
        return None
    if launch.launcher == "lightning" and _runs_our_interpreter(launcher.pid):
        return {launcher}  # its rank 0 has started the others

    def was_started_as(rank: int | None, pid: int) -> bool:
        other = _quietly(processes.read_environ(pid) or {})
        return (other.launcher, other.rank) == (launch.launcher, rank)

    if not was_started_as(launch.rank, os.getpid()):
        return None
    below = processes.tree(launcher.pid).values()
    return {process for process in below if was_started_as(0, process.pid)}


def _runs_our_interpreter(pid: int) -> bool:
    """Whether it may be the process of Lightning that started this one: not so a shell, in which a
    person sets ``LOCAL_RANK`` for each rank.
    """
    from orchard_infra.system import processes

    executable = processes.executable_of(pid)
    return executable is None or executable == processes.executable_of(os.getpid())


def _host_of(process: str) -> str:
    return process.rpartition(":")[0] or "-"


def _this_host() -> str:
    from orchard_infra.system import processes

    # Create times of another time namespace cannot be compared, as if it were another host.
    return f"{processes.boot_id()}:{processes.pid_namespace()}:{processes.own_time_namespace()}"


def _launcher_process(launch: Launch) -> str | None:
    """The launcher's process on this host, so named that all ranks below it agree.

    It is the nearest ancestor that was not itself started as this rank: a shell script, sudo or
    numactl between them has inherited the rank, the launcher has not. torchrun's agent lives
    through elastic restarts. What a process has in /proc is the environment that it was started
    with, so a variable that is missing there was set later, by a launcher inside of the process.
    """
    from orchard_infra.system import processes

    started_with = processes.read_environ(os.getpid()) or {}
    own = _quietly(started_with)
    inside = {
        name
        for name in ("RANK", "LOCAL_RANK", "NODE_RANK")
        if os.environ.get(name) != started_with.get(name)
    }
    by_lightning = (launch.launcher == "lightning" and "LOCAL_RANK" in inside) or (
        inside == {"LOCAL_RANK", "NODE_RANK"}  # below an outer launcher, which has set RANK
    )
    if own.launcher is None or own.rank != launch.rank or by_lightning:
        # torch.multiprocessing.spawn and its like: the parent is the launcher.
        multiprocessing = sys.modules.get("multiprocessing.process")
        parent = None if multiprocessing is None else multiprocessing.parent_process()
        if parent is not None:
            return _identified(parent.pid)
        if by_lightning:  # its rank 0 is the launcher of the others
            return _identified(os.getpid())
        mark = _mark_of_rank(launch, os.environ)
    else:
        mark = _mark_of_rank(own, started_with)
    for pid in processes.ancestors(os.getpid()):
        environ = processes.read_environ(pid)
        if environ is None or _mark_of_rank(_quietly(environ), environ) != mark:
            return _identified(pid)
    return None


def _mark_of_rank(launch: Launch, environ: Mapping[str, str]) -> tuple[object, ...]:
    # The file, which torchrun gives to each rank, tells a torchrun inside of another one's rank.
    return launch.launcher, launch.rank, environ.get("TORCHELASTIC_ERROR_FILE")


def _identified(pid: int | None) -> str | None:
    """``BOOT:PID NAMESPACE:TIME NAMESPACE:PID@CREATE TIME``: unlike a pid alone, of one process
    ever.
    """
    from orchard_infra.system import processes

    identity = None if pid is None else processes.identity_of(pid)
    if identity is None:
        return None
    return f"{_this_host()}:{identity.pid}@{identity.create_time}"


def _quietly(environ: Mapping[str, str]) -> Launch:
    try:
        return Launch.from_environ(environ)
    except ConfigurationError:
        return Launch()


def _find_scheduler(environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The scheduler's name and the variable that says so."""
    for name, _, variables, beside in _SCHEDULERS:
        found = next((variable for variable in variables if environ.get(variable)), None)
        if found and (not beside or any(other.startswith(beside) for other in environ)):
            return name, _shown(environ, found)
    return None, ""


def _launch_of_ranks(environ: Mapping[str, str]) -> tuple[Launch, _Names]:
    """The launch as its ranks tell it, and the variables that name the launcher's job."""
    for found in _RANKS:
        rank = _rank(environ, found.rank)
        if rank is None or (found.launcher == "mpiexec" and _is_of_srun(environ, found.rank)):
            continue
        world_size = _first_number(environ, found.world_size)
        if found.launcher in ("srun", "submitit") and rank == 0 and (world_size or 1) == 1:
            # The batch script itself and a step of one task (an interactive shell) have
            # SLURM_PROCID=0, too, and are no rank of anything. So has each job of submitit.
            continue
        if world_size is not None and rank >= world_size:
            size = next(name for name in found.world_size if _number(environ, name) is not None)
            raise ConfigurationError(
                f"{_shown(environ, found.rank)} is not below {_shown(environ, size)}: ranks count "
                f"from 0. Correct the one that is wrong, or unset {found.rank} if this process is "
                "not part of a distributed job."
            )
        launcher, job = found.launcher, found.job
        if launcher == "unknown":
            marks = (name for name, mark in _LAUNCHERS_OF_RANK if mark in environ)
            launcher = next(marks, launcher)
        if launcher == "unknown":
            launcher, job = _translated(environ, rank, world_size)
        local_rank = _first_number(environ, found.local_rank)
        shown = _shown(environ, found.rank)
        return Launch(rank, local_rank, world_size, launcher, rank_from=shown), job
    return Launch(), ()


def _is_of_srun(environ: Mapping[str, str], rank: str) -> bool:
    """Whether srun has set this rank of PMI or PMIx beside its own ``SLURM_PROCID``: then it names
    the job by its step (src/plugins/mpi/pmi2 and pmix of Slurm; measured with ``--mpi=pmi2``).

    An mpiexec below srun sets ranks of its own, and inherits the rest.
    """
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    names = (environ.get("PMI_JOBID"), environ.get("PMIX_NAMESPACE"))
    is_same_rank = environ[rank] == environ.get("SLURM_PROCID")
    is_same_size = environ.get("PMI_SIZE") in (None, environ.get("SLURM_STEP_NUM_TASKS"))
    return is_same_rank and is_same_size and (step in names or f"slurm.pmix.{step}" in names)


def _translated(
    environ: Mapping[str, str], rank: int, world_size: int | None
) -> tuple[str, _Names]:
    """Whose rank a script has copied to RANK, as in ``RANK=$SLURM_PROCID``.

    Only where rank and size are the same: a torchrun-like launcher that runs below srun has rank
    0 in common with it, and is another job.
    """
    for other in _RANKS[1:]:
        if world_size is not None and (rank, world_size) == (
            _number(environ, other.rank),
            _first_number(environ, other.world_size),
        ):
            return other.launcher, other.job
    return "unknown", ()


def _with_lightning(launch: Launch, environ: Mapping[str, str]) -> Launch:
    """The rank among the processes that Lightning started, if it did.

    It runs the script again for every further device, with LOCAL_RANK, NODE_RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT in its environment, and no RANK
    (lightning/fabric/strategies/launchers/subprocess_script.py). Its processes that are forked or
    spawned have only LOCAL_RANK and MASTER_PORT (multiprocessing.py in the same folder). What an
    outer launcher has set they all inherit, so that its rank 0 is several processes.
    """
    if launch.rank not in (None, 0) or not any(environ.get(name) for name in _MEETING_POINT):
        return launch
    world_size = _number(environ, "WORLD_SIZE")
    if world_size == 1:
        return launch  # LOCAL_RANK is how some choose a GPU by hand
    local_rank = _rank(environ, "LOCAL_RANK")
    # Where an outer launcher has rank 0, NODE_RANK may be what it was told before it began to
    # deal ranks: torchrun's rendezvous gives them out anew.
    node_rank = _rank(environ, "NODE_RANK") if launch.rank is None else None
    if local_rank is None and node_rank is None:
        return launch
    if launch.rank == 0 and not local_rank:
        return launch
    # The number of processes on the nodes before is not known: at least one each.
    rank = (node_rank or 0) + (local_rank or 0)
    found = "LOCAL_RANK" if local_rank is not None and not node_rank else "NODE_RANK"
    if world_size is not None and rank >= world_size:
        raise ConfigurationError(
            f"{_shown(environ, found)} is not below {_shown(environ, 'WORLD_SIZE')}: ranks count "
            f"from 0. Correct the one that is wrong, or unset {found} if this process is not part "
            "of a distributed job."
        )
    return Launch(rank, local_rank, world_size, "lightning", rank_from=_shown(environ, found))


def _name_of(environ: Mapping[str, str], names: _Names) -> str | None:
    """``VARIABLE=value`` for the first alternative that is set, short and fit for a record."""
    for first, *more in names:
        value = environ.get(first)
        if not value or value == "none":  # torchrun's default, the same for everybody
            continue
        value = ".".join([value, *filter(None, map(environ.get, more))])
        if len(value) > 128 or not value.isascii() or not value.isprintable():
            import hashlib  # loads OpenSSL

            value = hashlib.sha256(os.fsencode(value)).hexdigest()
        return f"{first}={value}"
    return None


def _rank(environ: Mapping[str, str], variable: str) -> int | None:
    """The rank; None where it is unset, empty or -1, as some scripts say "not distributed".

    Raises:
        ConfigurationError: It is none. To take it for rank 0 would make another leader.
    """
    value = environ.get(variable, "").strip()
    if value in ("", "-1"):
        return None
    rank = _number(environ, variable)
    if rank is None:
        raise ConfigurationError(
            f"{_shown(environ, variable)} is not a rank, that is a whole number from 0 on. "
            f"Correct it, or unset {variable} if this process is not part of a distributed job."
        )
    return rank


def _restarts_left(environ: Mapping[str, str]) -> int | None:
    # local_elastic_agent.py
    most = _number(environ, "TORCHELASTIC_MAX_RESTARTS")
    done = _number(environ, "TORCHELASTIC_RESTART_COUNT")
    return None if most is None or done is None else max(0, most - done)


def _first_number(environ: Mapping[str, str], variables: Iterable[str]) -> int | None:
    numbers = (_number(environ, variable) for variable in variables)
    return next((number for number in numbers if number is not None), None)


def _number(environ: Mapping[str, str], variable: str) -> int | None:
    try:
        number = int(environ.get(variable, ""))
    except ValueError:
        return None
    return number if number >= 0 else None


def _shown(environ: Mapping[str, str], variable: str) -> str:
    """``NAME=value`` for a message; the bare name where the value is long or not for a terminal."""
    value = environ.get(variable, "")
    return f"{variable}={value}" if len(value) <= 40 and value.isprintable() else variable
