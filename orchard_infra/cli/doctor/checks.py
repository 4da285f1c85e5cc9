"""The checks of `orchard-infra doctor`, in their order.

Each check tries what a run would do, where it can be tried. Nothing is changed: what a check makes
it removes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from subprocess import SubprocessError
from typing import TypeAlias

import psutil

from orchard_infra.cli.doctor import (
    launch,
    locks,
    processes,
    servers,
    shared_memory,
    signals,
    slurm,
    torch,
)
from orchard_infra.cli.doctor.base import Check, Level, Setup, Verdict
from orchard_infra.cli.doctor.tmp_cleaners import check_tmp_cleaner
from orchard_infra.errors import InfrastructureError

CheckFunction: TypeAlias = Callable[[Setup], Verdict]

OF_A_SERVER: dict[str, CheckFunction] = {
    "lock server": servers.check_server,
    "server latency": servers.check_latency,
    "server settings": servers.check_settings,
    "server clock": servers.check_clock,
    "server lock": servers.check_server_lock,
}

CHECKS: dict[str, CheckFunction] = {
    "lock directory": locks.check_lock_directory,
    "flock": locks.check_flock,
    "lock file": locks.check_lock_file,
    **OF_A_SERVER,
    "tmp cleaner": check_tmp_cleaner,
    "runs": processes.check_runs,
    "launch": launch.check_launch,
    "Slurm job": slurm.check_slurm_job,
    "container": launch.check_container,
    "orphans": processes.check_orphans,
    "shared memory": shared_memory.check_shared_memory,
    "torch": torch.check_torch,
    "torch extensions": torch.check_torch_extensions,
    "MASTER_PORT": launch.check_master_port,
    "signals": signals.check_signals,
}


def examine(setup: Setup, names: Collection[str] = ()) -> Iterator[tuple[str, Callable[[], Check]]]:
    """The name of each check, and a function that carries it out. ``names`` are those that are
    wanted, none for all.
    """
    for name, check in CHECKS.items():
        wanted = name in names if names else True
        if not wanted or (name == "lock file" and setup.lock_file is None):
            continue
        if name in OF_A_SERVER and setup.lock_url is None:
            continue

        def carry_out(name: str = name, check: CheckFunction = check) -> Check:
            try:
                return Check(name, *check(setup))
            except (
                OSError, InfrastructureError, psutil.Error, ValueError, SubprocessError,
            ) as error:  # fmt: skip
                return Check(name, Level.WARNING, f"could not be checked: {error}")

        yield name, carry_out
