"""A run as the registry has it: who, in which state, and which processes are written down."""

from __future__ import annotations

import attrs

from orchard_infra.runs.members import NOBODY, Members
from orchard_infra.runs.record import RunRecord, RunState

SUFFIX = ".run"


@attrs.frozen
class RegisteredRun:
    """A run on record.

    ``file`` is the device and inode of the record's file. ``was_released`` says that the run ended
    well, and only its program had to go on: what that leaves need not be in the way. ``members``
    are the processes that the program has written down, and the later runs of it that share this
    record. ``directory`` is the device and inode of the registry's directory.
    """

    record: RunRecord
    state: RunState
    file: tuple[int, int] = attrs.field(default=(0, 0), repr=False)
    was_released: bool = False
    members: Members = attrs.field(default=NOBODY, repr=False)
    directory: tuple[int, int] | None = attrs.field(default=None, repr=False)

    @property
    def file_name(self) -> str:
        """What the record's file is called in the registry's directory."""
        return f"{self.record.run_id}{SUFFIX}"

    @property
    def is_live(self) -> bool:
        """Running or waiting: never touched, with everything that belongs to it."""
        return self.state in (RunState.RUNNING, RunState.WAITING)

    @property
    def is_over(self) -> bool:
        """Whether its program is dead. Before that, its processes are never touched."""
        return self.state in (RunState.SURVIVORS, RunState.DEAD)

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Its id, and those of the later runs on this record."""
        return self.record.run_id, *(run.run_id for run in self.members.folded)

    @property
    def locks(self) -> tuple[str | None, ...]:
        """The lock of each of these runs."""
        return self.record.lock, *(run.lock for run in self.members.folded)

    @property
    def files(self) -> dict[tuple[int, int], str]:
        """The record files that its forked children may hold: device and inode, and the name."""
        found = {run.file: f"{run.run_id}{SUFFIX}" for run in self.members.folded}
        return {self.file: self.file_name, **found}
