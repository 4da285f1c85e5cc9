"""What a block has started, and what of it is still there when the block ends.

The end of a block is not the end of the program: its pools, trackers and helpers go on, and are
only named. `GhostSanitizer(leftovers="stop")` is for programs that want them gone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import attrs

from orchard_infra.environment import Environment
from orchard_infra.report import Finding
from orchard_infra.runs.membership import (
    Membership,
    command_of,
    is_ours,
    led_a_run_itself,
    orphans_of,
)
from orchard_infra.runs.record import RUN_ID_VARIABLE
from orchard_infra.sanitizing.helpers import is_helper
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity

_GOES_ON = "goes on with the program"


@attrs.frozen(eq=False, repr=False)
class Block:
    """When a block began, on the clock of `ProcessIdentity`, and the descendants from before."""

    began: float
    before: frozenset[ProcessIdentity]

    @classmethod
    def begin(cls) -> Block:
        return cls(processes.now(), frozenset(_descendants().values()))

    def children(self) -> list[Finding]:
        """What the block has started and is not gone, by a cheap look at our descendants alone."""
        return [
            Finding(pid, identity.create_time, command_of(pid), "leftover", _GOES_ON)
            for pid, identity in sorted(_descendants().items())
            if self._is_new(identity) and not is_helper(pid)
        ]

    def leftovers(
        self, env: Environment, excluded: Callable[[int], str]
    ) -> tuple[list[Finding], list[Finding]]:
        """What is to be stopped of that, and what is not. Orphans are looked for, too.

        ``excluded(pid)`` says why a process is not to be stopped, or nothing.
        """
        own = env.registry.find(env.run.run_id)
        me = os.getpid()
        above = {me, *processes.ancestors(me)}
        parents = processes.parents()
        found = {i for i in processes.below([me], parents).values() if self._is_new(i)}
        young = [pid for pid, (_, create_time) in parents.items() if create_time >= self.began]
        found.update(orphans_of(own, env.run.run_id, young))
        runs = env.registry.runs()
        others = Membership(tuple(r for r in runs if r.record.leader != env.run.leader))
        # With two environments in one process, only the id tells whose child it is.
        shares_process = any(
            run.is_live
            and run.record.leader == env.run.leader
            and run.record.run_id != env.run.run_id
            for run in runs
        )
        directory = env.registry.directory_file()
        ghosts, spared = [], []
        for identity in sorted(found):
            pid = identity.pid
            if pid in above or not is_ours(pid) or is_helper(pid):
                continue
            leftover = Finding(pid, identity.create_time, command_of(pid), "leftover")
            run = others.live_run_of(pid)
            if run is not None:
                reason = f"leads or belongs to a live run of {run.record.project}"
            elif any(led_a_run_itself(one, directory) for one in (pid, *_between(pid))):
                reason = "led a run of its own"
            elif (starter := self._older_starter(pid)) is not None:
                reason = f"was started by pid {starter}, which is older than the block and needs it"
            elif shares_process and not processes.started_with(
                pid, RUN_ID_VARIABLE, (env.run.run_id,)
            ):
                reason = "may belong to another run of this process"
            else:
                reason = excluded(pid)
            if reason:
                spared.append(attrs.evolve(leftover, reason=reason))
            else:
                ghosts.append(leftover)
        return ghosts, spared

    def _older_starter(self, pid: int) -> int | None:
        """A process from before the block that has started this one by itself, as the worker of an
        earlier pool does. A forkserver starts what it is told to.
        """
        for above in _between(pid):
            if processes.identity_of(above) in self.before and not is_helper(above):
                return above
        return None

    def _is_new(self, identity: ProcessIdentity) -> bool:
        return identity.create_time >= self.began and identity not in self.before


def _descendants() -> dict[int, ProcessIdentity]:
    """Those of this process. Mostly there are none, and one system call says so."""
    return processes.tree(os.getpid()) if processes.has_children() else {}


def _between(pid: int) -> Iterator[int]:
    """The processes between a descendant and this one."""
    return itertools.takewhile(lambda pid: pid != os.getpid(), processes.ancestors(pid))
