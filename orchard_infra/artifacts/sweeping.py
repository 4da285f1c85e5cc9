"""What dead runs left: their directories, and the shared memory of dead processes.

Files are removed on proof, as processes are stopped on proof.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from orchard_infra.artifacts.removing import CAN_WALK, Removal, is_open, is_ours, opened_directory
from orchard_infra.environment import Environment
from orchard_infra.report import CleanReport
from orchard_infra.system import processes
from orchard_infra.system.masking import interruptible
from orchard_infra.system.text import printable

_PREFIX = "orchard-infra-"
_SHARED_MEMORY = "/dev/shm"
# Names that contain the pid of the process that made the file: tensors that torch shares under its
# file_system strategy, the registration of LLVM's OpenMP runtime, arenas of multiprocessing.
# Other names (psm_*, sem.*, nccl-*) do not say whose they are.
_WITH_PID = re.compile(r"(torch_|__KMP_REGISTERED_LIB_|pym-)(\d{1,10})[_-]\w+", re.ASCII)
_TORCH_MANAGER = "torch_shm_manager"[:15]  # as much of a name as the kernel keeps
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of Linux


class DeadRun(Protocol):
    """What must be known of a run that is proven dead. A `RunRecord` will do."""

    @property
    def run_id(self) -> str: ...

    @property
    def tmp_dir(self) -> str | None: ...


def sweep(env: Environment, *, private_shm: bool = False) -> None:
    """Remove what dead runs left, once for each job. The result is in ``env.report.collected``."""
    if not env.is_leader:
        return
    with interruptible():  # a directory may hold millions of files
        report = collect([run.record for run in env.dead_runs], private_shm=private_shm)
    env.report.collected = report
    tell(env.logger, "what dead runs left", report)


def collect(dead: Iterable[DeadRun], *, private_shm: bool = False) -> CleanReport:
    """Remove the directories of these runs, and the shared memory of dead processes.

    Shared memory is removed when the process that made it, whose pid is in its name, is dead in
    every container, no process on this machine has it open or mapped, and no manager of torch
    lives that may keep it for a receiver. What looks dead and is not proven so is ``kept``.
    """
    return _collect(dead, Removal(), private_shm)


def would_collect(dead: Iterable[DeadRun], *, private_shm: bool = False) -> CleanReport:
    """What `collect` would do now. Nothing is removed: ``removed`` names what would be."""
    return _collect(dead, Removal(dry=True), private_shm)


def directory_name(run_id: str) -> str:
    """The name of the directory of a run.

    Raises:
        ValueError: This is not the id of a run.
    """
    # A number would make the name of a user's runtime directory.
    if not (run_id.isascii() and run_id.isalnum()) or (run_id.isdecimal() and len(run_id) <= 10):
        raise ValueError(f"not the id of a run: {run_id!r}")
    return _PREFIX + run_id


def tell(logger: logging.Logger, what: str, report: CleanReport) -> None:
    """Log what was not removed, and at DEBUG what was."""
    for failure in report.failures:
        logger.warning("%s: %s", what, failure)
    if logger.isEnabledFor(logging.DEBUG):
        for path in report.removed:
            logger.debug("%s: removed %s", what, printable(str(path)))
        for path in report.kept:
            logger.debug("%s: kept %s", what, printable(str(path)))


def _collect(dead: Iterable[DeadRun], removal: Removal, private_shm: bool) -> CleanReport:
    for run in dead:
        if run.tmp_dir is not None and _is_directory_of(run.run_id, run.tmp_dir):
            removal.remove_directory(Path(run.tmp_dir))
    _remove_shared_memory(removal, may=private_shm or _sees_every_process())
    return removal.report()


def _is_directory_of(run_id: str, tmp_dir: str) -> bool:
    try:
        return os.path.isabs(tmp_dir) and os.path.basename(tmp_dir) == directory_name(run_id)
    except ValueError:
        return False


def _remove_shared_memory(removal: Removal, *, may: bool) -> None:
    """Remove the shared memory of dead processes, as far as they are proven dead."""
    if not CAN_WALK:
        return
    try:
        with opened_directory(_SHARED_MEMORY) as directory:
            # Listed before we look who lives: a process that starts now makes files of its own.
            found = list(filter(None, map(_WITH_PID.fullmatch, os.listdir(directory))))
            # Mostly they belong to processes that can be seen to live: no need to look at all.
            found = [match for match in found if not processes.is_running(int(match[2]))]
            if found:
                _remove_of_the_dead(removal, directory, found, may=may)
    except OSError:
        return  # there is none, or we may not look into it


def _remove_of_the_dead(
    removal: Removal, directory: int, found: list[re.Match[str]], *, may: bool
) -> None:
    alive, torch_manager_lives = _living()
    for match in found:
        kind, pid = match.groups()
        name = match.string
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if int(pid) in alive or not is_ours(status, stat.S_ISREG(status.st_mode)):
                continue
            in_flight = kind == "torch_" and torch_manager_lives
            if may and not in_flight and is_open(directory, name) is False:
                removal.unlink(directory, name, status)
                removal.removed.append(Path(_SHARED_MEMORY, name))
            else:
                removal.kept.append(Path(_SHARED_MEMORY, name))
        except FileNotFoundError:
            continue
        except OSError as error:
            removal.fail(Path(_SHARED_MEMORY, name), error)


def _living() -> tuple[set[int], bool]:
    """Every pid in use, in our pid namespace and in those inside it, and whether a manager of
    torch's shared memory lives. See NSpid in proc_pid_status(5).
    """
    pids: set[int] = set()
    manager_lives = False
    for pid in processes.all_pids():
        stat = processes.read_stat(pid)
        if stat is None or processes.is_defunct(stat):
            continue
        pids.add(pid)
        manager_lives |= stat.name == _TORCH_MANAGER
        try:
            with open(f"/proc/{pid}/status", "rb") as lines:
                inner = next((line for line in lines if line.startswith(b"NSpid:")), b"")
        except OSError:
            continue
        pids.update(map(int, inner.split()[1:]))
    return pids, manager_lives


def _sees_every_process() -> bool:
    """Whether a pid that is not to be seen here is in use nowhere on this machine."""
    return processes.pid_namespace() == _INITIAL_PID_NAMESPACE
