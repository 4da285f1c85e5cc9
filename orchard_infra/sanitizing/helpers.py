"""Helper processes that Python starts by itself, beside the workers that a program asks for.

A *resource tracker* removes shared memory once all processes that it serves have ended, and ends
then. A *forkserver* is the parent of its workers, which show the very same command line.
"""

from __future__ import annotations

from orchard_infra.runs.pools import role_of
from orchard_infra.system import processes


def is_tracker(pid: int) -> bool:
    """Whether this process is a resource tracker. It ends by itself, and is never stopped."""
    return role_of(processes.read_cmdline(pid)) == "tracker"


def is_forkserver(pid: int) -> bool:
    """Whether this process is a forkserver, and not one of its workers."""
    if role_of(processes.read_cmdline(pid)) != "forkserver":
        return False
    stat = processes.read_stat(pid)
    return stat is not None and role_of(processes.read_cmdline(stat.ppid)) != "forkserver"


def is_helper(pid: int) -> bool:
    """Whether this process only serves others."""
    return is_tracker(pid) or is_forkserver(pid)
