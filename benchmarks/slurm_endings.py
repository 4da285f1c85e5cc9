"""What becomes of a run when Slurm ends its job: a real Slurm on loopback, and each ending.

For each is shown when the run was asked to stop, when its checkpoint was saved (which takes a
second) and the lock given back, counted from the end's cause, and how soon a requeued run trains
once Slurm has started it. Time limits count from the start of the job, and are one minute, the
least that Slurm knows. The tables in docs/slurm.md are from here.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
from _harness import Goal, Outcome, Row, main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from slurm_server import EXAMPLES, KILL_WAIT, Job, SlurmServer, missing  # noqa: E402
from support import wait_until  # noqa: E402

WARNING = 30  # seconds between the warning of a time limit and the limit, a minute
BLOCKER = "#!/bin/bash\nsleep 600"
FORMS = {path.name: path.read_text() for path in sorted(EXAMPLES.glob("*.sbatch"))}
HEAD = "#!/bin/bash\n#SBATCH --requeue\n#SBATCH --open-mode=append\n"


@attrs.frozen
class Case:
    """One ending of one script, given before what the script says: ``options`` of sbatch."""

    ending: str
    form: str  # a name of FORMS, or the lines of a script
    options: tuple[str, ...] = ()
    rounds: int = 3

    @property
    def name(self) -> str:
        return ", ".join((self.ending, self.form_name, *self.options))

    @property
    def form_name(self) -> str:
        return self.form if self.form in FORMS else "; ".join(self.form.strip().splitlines())

    @property
    def script(self) -> str:
        return FORMS.get(self.form, HEAD + self.form)

    @property
    def ranks(self) -> int:
        return 2 if self.form == "ranks.sbatch" else 1


@attrs.frozen
class Result:
    """Seconds since the cause of the end; None for what did not happen.

    ``trains_again`` counts from the start of the process of the requeued run.
    """

    asked: float | None
    saved: float | None
    released: float | None
    state: str
    trains_again: float | None
    goes_on: bool | None  # from the step that was saved

    @property
    def seconds_to_release(self) -> float | None:
        if self.asked is None or self.released is None:
            return None
        return self.released - self.asked


RIGHT = [
    Case("normal end", "train.sbatch"),
    Case("scancel", "train.sbatch"),
    Case("scancel", "ranks.sbatch"),
    Case("scontrol requeue", "train.sbatch"),
    Case("scontrol requeue", "ranks.sbatch"),
    Case("preemption", "train.sbatch"),
    Case("preemption", "ranks.sbatch"),
    Case("preemption with grace", "ranks.sbatch", ("--partition=patient",)),
    Case("slice of an array", "array.sbatch", ("--array=1-2%1",)),
    Case("preemption with grace", "train.sbatch", ("--partition=patient",), rounds=1),
    Case("time limit", "train.sbatch", (f"--signal=B:TERM@{WARNING}",), rounds=1),
    Case("time limit", "ranks.sbatch", (f"--signal=TERM@{WARNING}",), rounds=1),
]
WRONG = [
    Case("scancel", "python train.py"),
    Case("scancel", "python train.py | tee log"),
    Case("scancel", "trap : TERM\nsrun python train.py || scontrol requeue $SLURM_JOB_ID\n"),
    Case("time limit", "exec python train.py", rounds=1),
    Case("time limit", "exec python train.py", (f"--signal=TERM@{WARNING}",), rounds=1),
    Case("time limit", "exec python train.py", (f"--signal=B:USR1@{WARNING}",), rounds=1),
    Case("time limit", "srun python train.py", (f"--signal=B:TERM@{WARNING}",), rounds=1),
    Case(
        "time limit", "trap : TERM\nsrun python train.py", (f"--signal=B:TERM@{WARNING}",), rounds=1
    ),
    Case("time limit", "exec srun python train.py", (f"--signal=B:TERM@{WARNING}",), rounds=1),
    Case("time limit", "python train.py", (f"--signal=B:TERM@{WARNING}",), rounds=1),
]


@attrs.frozen
class Events:
    """What the runs of one job have written down."""

    directory: Path

    def all(self, event: str, start: int = 0) -> list[dict[str, Any]]:
        """Those of one start of the job, the oldest first."""
        found = [
            json.loads(line)
            for path in self.directory.glob("events-*")
            for line in path.read_text("utf-8").splitlines()
        ]
        found = [one for one in found if (one["event"], one["start"]) == (event, start)]
        return sorted(found, key=lambda one: one["at"])

    def last(self, event: str, start: int = 0) -> float | None:
        found = self.all(event, start)
        return found[-1]["at"] if found else None


def _wait(events: Callable[[], object], job: Job, timeout: float = 60.0) -> None:
    wait_until(events, timeout, what=job.transcript, interval=0.05)


def measure(quick: bool, directory: Path) -> Outcome:
    reason = missing()
    if reason is not None:
        return Outcome(notes=[f"not measured: {reason}"])
    right, wrong = (RIGHT[1:2], WRONG[:1]) if quick else (RIGHT, WRONG)
    with SlurmServer.start(nodes=2) as server, ThreadPoolExecutor(16) as side_by_side:

        def run(case: Case) -> list[Result]:
            rounds = 1 if quick else case.rounds
            return [end_once(server, case, directory) for _ in range(rounds)]

        slow = [case for case in (*right, *wrong) if case.ending == "time limit"]
        waiting = {case: side_by_side.submit(run, case) for case in slow}
        results = {case: waiting[case].result() for case in slow}
        # One after the other: a job that others make way for stops whatever runs.
        results |= {case: run(case) for case in (*right, *wrong) if case not in results}
    outcome = Outcome()
    for case in (*right, *wrong):
        for what in ("asked", "saved", "released", "trains again"):
            samples = [getattr(result, what.replace(" ", "_")) for result in results[case]]
            if samples and None not in samples:
                outcome.rows.append(Row(f"{case.name}: {what}", samples, "s"))
    outcome.notes = [
        f"proctrack/{server.proctrack}, KillWait {KILL_WAIT} s; a checkpoint takes 1 s",
        "",
        *_table(right, results),
        "",
        *_table(wrong, results),
        "",
    ]
    for case in right:
        if case.ending != "normal end":
            taken = [result.seconds_to_release for result in results[case]]
            worst = None if None in taken else max(taken)
            outcome.goals.append(
                Goal(f"{case.name}: from the signal to the lock given back", worst, KILL_WAIT, "s")
            )
    return outcome


def end_once(server: SlurmServer, case: Case, below: Path) -> Result:
    """Have one job end, and see what becomes of it."""
    directory = Path(tempfile.mkdtemp(dir=below))
    (directory / "oi").mkdir(mode=0o700)
    shutil.copy(ROOT / "benchmarks" / "_slurm_train.py", directory / "train.py")
    env = {"ORCHARD_INFRA_DIR": str(directory / "oi")}
    if case.ending == "normal end":
        env["STEPS"] = "50"
    limit = ("--time=1",) if case.ending == "time limit" else ()
    submitted = server.submit(directory, case.script, *case.options, *limit, env=env)
    job = submitted.element(1) if case.form == "array.sbatch" else submitted
    events = Events(directory)
    _wait(lambda: len(events.all("training")) == case.ranks, job)
    began = _end(server, case, job, events)
    wait_until(
        lambda: job.is_over() or job.state == "PENDING", 120.0, what=job.transcript, interval=0.2
    )
    state = "queued again" if job.state == "PENDING" else job.state
    first = {what: events.last(what) for what in ("asked", "saved", "released")}
    saved = events.all("saved")
    again: dict[str, Any] | None = None
    if case.form == "array.sbatch":
        _wait(lambda: len(events.all("training")) == 2, job)
        again, started = events.all("training")[1], events.all("started")[1]["at"]
    elif state == "queued again":
        job.start_again()
        _wait(lambda: len(events.all("training", 1)) == case.ranks, job)
        again, started = events.all("training", 1)[-1], events.all("started", 1)[0]["at"]
    submitted.cancel()
    return Result(
        **{what: None if at is None else at - began for what, at in first.items()},
        state=state,
        trains_again=again and again["at"] - started,
        goes_on=again and again["step"] == (saved[-1]["step"] if saved else 0),
    )


def _end(server: SlurmServer, case: Case, job: Job, events: Events) -> float:
    """End a job. Returns since when to count."""
    if case.ending == "normal end":
        trained = events.all("training")[0]["at"]
        job.wait()
        return trained + 50 * 0.02
    if case.ending == "time limit":
        return events.all("started")[0]["at"]
    time.sleep(0.5)
    began = time.time()
    if case.ending == "scontrol requeue":
        job.requeue()
    elif case.ending.startswith("preemption"):
        options = ("--partition=high", "--nodes=2", "--exclusive")
        blocker = server.submit(events.directory, BLOCKER, *options)
        _wait(lambda: events.all("asked"), job, 90.0)
        # When Slurm comes to it is its own affair, so this counts from the signal.
        began = events.all("asked")[0]["at"]
        blocker.cancel()
    else:
        job.cancel()
    return began


def _table(cases: Sequence[Case], results: Mapping[Case, Sequence[Result]]) -> list[str]:
    """The worst of each case, in Markdown."""
    lines = [
        "| ending | script | asked to stop | saved | lock free | the job | goes on |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        found = results[case]
        script = " with ".join(f"`{part}`" for part in (case.form_name, *case.options))
        script = script.replace("|", r"\|")
        cells = [case.ending, script]
        for what in ("asked", "saved", "released"):
            seconds = [getattr(result, what) for result in found]
            ends_itself = what == "asked" and case.ending == "normal end"
            absent = "" if ends_itself else "never"
            cells.append(absent if None in seconds else f"{max(seconds):.1f} s")
        cells.append(" / ".join(sorted({result.state for result in found})))
        again = [result.trains_again for result in found]
        if None in again:
            cells.append("")
        else:
            where = "at its step" if all(result.goes_on for result in found) else "from an old step"
            cells.append(f"{max(again):.1f} s, {where}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
