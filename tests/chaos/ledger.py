"""What the journal of a round says of its programs, and what must have become of their children.

A child of a living program lives, whether the program is in a block or not. What a dead program
left is judged by the table of evidence, once a run of the same project has been prepared since:
workers are gone; other programs are gone if their run crashed, and live if it ended well; what
started a session of its own lives, unless it is a fork that still has the lock of the dead run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Literal

import attrs

from chaos.observing import Identity, environ_of, has_gone, is_fork, marked, session_of

FORKED = ("idle", "busy", "stubborn", "frozen", "tree", "echo", "served")
PROGRAMS = ("exec", "exec-tree", "exec-stubborn", "exec-spawner", "exec-daemons")
DETACHED = ("setsid", "exec-setsid")
OTHERS = ("unwinds", "opted-out")
KINDS = (*FORKED, *PROGRAMS, *DETACHED, *OTHERS)

Verdict = Literal["lives", "gone", "either"]
Fate = Literal["open", "unsure", "ended", "abandoned"]


@attrs.define
class Run:
    """One run. ``holding`` says whether it has its lock; "unsure" while that changes hands."""

    run_id: str
    project: str
    tmp_dir: str
    stops_leftovers: bool = False
    fate: Fate = "open"
    holding: Literal["no", "yes", "unsure"] = "no"
    is_leaving: bool = False


@attrs.define
class Child:
    """``run`` is the block that it was started in, ``carries`` what its environment says; None
    where that says nothing of a run. ``locked`` are the runs whose locks it has inherited, if it is
    a fork.
    """

    who: Identity
    kind: str
    run: str | None
    carries: str | None
    locked: tuple[Run, ...] = ()
    is_excused: bool = False  # killed by the arena, or by its own program


@attrs.define
class Program:
    """One contender, as its journal has it."""

    name: str
    deleted: set[str] = attrs.field(factory=set)  # projects whose lock file the arena has deleted
    who: Identity | None = None
    runs: dict[str, Run] = attrs.field(factory=dict)
    children: dict[Identity, Child] = attrs.field(factory=dict)

    @property
    def has_gone(self) -> bool:
        return self.who is not None and has_gone(self.who)

    def is_outlived(self, mark: str) -> bool:
        """Whether there is a live process that is evidence of one of its runs, so that the record
        has to stay. Some were never written down.
        """
        for who in marked(mark):
            child = self.children.get(who)
            if child is not None:
                is_evidence = child.kind != "opted-out"
            elif is_fork(who, mark):
                is_evidence = session_of(who.pid) != os.getsid(0)
            else:
                is_evidence = environ_of(who.pid).get("ORCHARD_INFRA_RUN_ID") in self.runs
            if is_evidence:
                return True
        return False

    def verdict(self, child: Child, *, has_gone: bool) -> Verdict:
        """What a child must be doing, if the program has gone, or not."""
        verdict = self._of_a_dead(child) if has_gone else self._of_a_living(child)
        if verdict == "lives" and child.is_excused:
            return "either"
        return verdict

    def _of_a_living(self, child: Child) -> Verdict:
        if child.kind == "unwinds":
            return "either"
        run = self.runs.get(child.run or "")
        if run is None or not run.stops_leftovers or child.kind == "opted-out":
            return "lives"
        if run.fate == "ended":
            return "gone"
        return "either" if run.is_leaving else "lives"

    def _of_a_dead(self, child: Child) -> Verdict:
        if child.kind in FORKED or child.kind == "unwinds":
            # After the last block it is a worker only if an ended run is on record still.
            return "either" if child.run is None else "gone"
        if child.kind == "opted-out" or (child.kind != "setsid" and child.carries is None):
            return "lives"
        run = self.runs.get(child.run or "")
        if run is not None and run.stops_leftovers and (run.is_leaving or run.fate != "open"):
            if run.fate == "ended":
                return "gone"
            if child.kind in DETACHED:
                return "either"
        if child.kind == "setsid":
            return self._of_a_fork_elsewhere(child)
        if child.kind in DETACHED:
            return "lives"
        fates: dict[Fate, Verdict] = {
            "open": "gone", "abandoned": "gone", "ended": "lives", "unsure": "either",
        }  # fmt: skip
        return fates[self.runs[child.carries or ""].fate]

    def _of_a_fork_elsewhere(self, child: Child) -> Verdict:
        """In a session of its own: it goes only where no run could start beside it."""
        holding = {run.holding for run in child.locked}
        if child.run is None or "unsure" in holding:
            return "either"
        if any(run.project in self.deleted for run in child.locked):
            return "either"  # the lock that it has is no obstacle any more
        if "yes" not in holding:
            return "lives"
        return "gone" if len(child.locked) == 1 else "either"


_FATES: dict[str, Fate] = {
    "ending": "unsure", "closing": "unsure", "abandoning": "unsure",
    "ended": "ended", "closed": "ended", "abandoned": "abandoned",
}  # fmt: skip


@attrs.define
class Ledger:
    """All programs of a round, by name."""

    programs: dict[str, Program] = attrs.field(factory=dict)
    deleted: set[str] = attrs.field(factory=set)

    def enter(self, line: dict[str, Any]) -> None:
        """Take down one line of the journal."""
        event = line["event"]
        program = self.programs.setdefault(line["who"], Program(line["who"], self.deleted))
        run = program.runs.get(line.get("run_id", ""))
        if event == "start":
            program.who = Identity(line["pid"], line["started"])
        elif event == "registering":
            program.runs[line["run_id"]] = Run(
                line["run_id"], line["project"], line["tmp_dir"], line["stops_leftovers"]
            )
        elif event in ("child", "attacked", "tidied"):
            who = Identity(line["pid"], line["started"])
            if event == "child" and who not in program.children:
                locked = tuple(run for run in program.runs.values() if run.holding != "no")
                program.children[who] = Child(
                    who, line["kind"], line["run"], line["carries"], locked
                )
            elif event != "child":
                self.child(who).is_excused = True
        elif run is None:
            return
        elif event == "holds":
            run.holding = "yes"
        elif event == "drops":
            run.holding = "unsure"
        elif event == "dropped":
            run.holding = "no"
        elif event == "releasing":
            run.is_leaving = True
        elif event in _FATES and run.fate in ("open", "unsure"):
            run.fate = _FATES[event]

    def child(self, who: Identity) -> Child:
        return next(child for _, child in self.children() if child.who == who)

    def children(self) -> Iterator[tuple[Program, Child]]:
        for program in self.programs.values():
            for child in tuple(program.children.values()):
                yield program, child

    def run(self, run_id: str) -> Run | None:
        runs = (program.runs.get(run_id) for program in self.programs.values())
        return next(filter(None, runs), None)
