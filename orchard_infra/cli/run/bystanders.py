"""Which processes below the wrapper are none of the command's."""

from __future__ import annotations

import os

import attrs

from orchard_infra.environment import Environment
from orchard_infra.inspect import Look
from orchard_infra.runs.record import RUN_ID_VARIABLE
from orchard_infra.system import processes


@attrs.define
class Bystanders:
    """Processes below us that are none of the command's: they opted out of this run.

    A run that was started inside this one is a part of it, as a rank of a job is, whatever its
    project. One that was started with another run's id, or with none, is not, if it is live. The
    runs that we are in ourselves do not count: all that we start is in them.
    """

    env: Environment
    _outer: set[str] | None = None

    def describe(self, pid: int) -> str | None:
        """Why this process is a bystander; None when it is not."""
        if processes.started_with(pid, RUN_ID_VARIABLE, ("",)) is not None:
            return f"it opted out with an empty {RUN_ID_VARIABLE}"
        registry, run_id = self.env.registry, self.env.run.run_id
        runs = registry.runs()
        if self._outer is None:
            around = Look(runs).run_of(os.getppid())
            self._outer = {
                *registry.lineage(run_id),
                *registry.lineage(around.record.run_id if around else None),
            }
        others = tuple(
            run
            for run in runs
            if run.record.run_id not in self._outer
            and run_id not in registry.lineage(run.record.run_id)
        )
        other = Look(others).run_of(pid) if others else None
        if other is None:
            return None
        return f"it belongs to a run of project {other.record.project} ({other.state.value})"
