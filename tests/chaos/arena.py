"""The arena: plays rounds of contenders, and looks after each at what must hold.

A round is made from its seed alone. When its contenders have ended, all but those that linger,
each of its locks gets one more run that is left alone: the sweep. Then nothing that died may have
left anything, and what lives on has all its children. Those that linger end then, and are swept
up in their turn.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import attrs

from chaos.ledger import Child, Ledger, Program
from chaos.observing import (
    Identity,
    Journal,
    command_of,
    environ_of,
    identity,
    is_fork,
    lives,
    marked,
    read_bytes,
    read_journal,
    send,
    session_of,
)
from chaos.plans import ENDINGS, GRACE, LOST, PATIENCE, Plan, one_run

_HERE = Path(__file__).resolve().parent
_EXEC = [sys.executable, str(_HERE / "contender.py")]

# Exit statuses of a contender that nobody had to kill: see contender.py.
_FINE, _FAILED, _EXITED, _LOCKED = 0, 3, 4, 75
_BY_SIGNAL = {"TERM": 143, "INT": 130, "HUP": 129}

# How long the next run may take to start: patience, grace, what `stop_processes` waits for the
# killed ones, and the load of everybody else's tests.
START = PATIENCE + GRACE + 2.0 + 20.0
_HANDOFF = 3.0  # seconds in which a free lock has its next holder, although waiters are stopped
_ROUND = 90.0  # seconds
_RUN_ID = "ORCHARD_INFRA_RUN_ID"


@attrs.define
class Contender:
    """One program of a round while it is played."""

    plan: Plan
    program: Program
    pid: int | None = None
    status: int | None = None
    started: float | None = None
    events: dict[str, float] = attrs.field(factory=dict)  # when it was first
    hits: list[str] = attrs.field(factory=list)
    resume_at: list[float] = attrs.field(factory=list)
    boundaries: list[tuple[str, int]] = attrs.field(factory=list)

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def is_healthy(self) -> bool:
        return not self.hits and not self.plan.endings

    @property
    def lingers(self) -> bool:
        return "lingers" in self.events

    @property
    def was_killed(self) -> bool:
        """Not ended by code of its own; 71 is a Ctrl-C outside of all of it, see zygote.py."""
        return self.status is not None and (self.status < 0 or self.status in (9, 71))


@attrs.define
class Figure:
    """What a chaos run comes to."""

    rounds: int = 0
    programs: int = 0
    runs: int = 0
    children: int = 0
    outlived: int = 0
    hits: Counter[str] = attrs.field(factory=Counter)
    boundaries: set[str] = attrs.field(factory=set)
    violations: list[str] = attrs.field(factory=list)
    starts: list[float] = attrs.field(factory=list)  # seconds, each after a program that was hit
    began: float = attrs.field(factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def kills(self) -> int:
        """How many programs were told or forced to end."""
        return sum(self.hits[what] for what in ENDINGS)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {what}" for what, count in sorted(self.hits.items()))
        slowest = max(self.starts, default=0.0)
        return (
            f"{self.kills} kills, {self.runs} runs of {self.programs} programs, "
            f"{len(self.violations)} violations; "
            f"{self.rounds} rounds in {self.seconds:.0f} s, {self.children} child processes, "
            f"{self.outlived} of which rightly outlived their run, "
            f"hit within prepare and release at {len(self.boundaries)} boundaries; "
            f"slowest start after a dead run {slowest:.2f} s\n({kinds})"
        )

    def as_json(self) -> dict[str, Any]:
        ordered = sorted(self.starts) or [0.0]
        return {
            "kills": self.kills,
            "programs": self.programs,
            "runs": self.runs,
            "violations": self.violations,
            "rounds": self.rounds,
            "children": self.children,
            "children_that_rightly_outlived_their_run": self.outlived,
            "hits": dict(sorted(self.hits.items())),
            "boundaries_hit": len(self.boundaries),
            "start_after_a_dead_run_seconds": {
                "median": round(ordered[len(ordered) // 2], 3),
                "slowest": round(ordered[-1], 3),
            },
            "seconds": round(self.seconds, 1),
        }


class Zygote:
    """The client side of zygote.py, with the bystanders: they live as long as it does."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # "-c", because what is forked from it shows its command line: nobody's twin.
        program = f"import runpy; runpy.run_path({str(_HERE / 'zygote.py')!r}, run_name='__main__')"
        with open(directory / "zygote.err", "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=directory,
            )
        self._rest = b""

    def start(self, ident: str, log: Path, **command: Any) -> None:
        self._command(id=ident, log=str(log), **command)

    def signal(self, pid: int, what: str) -> None:
        self._command(pid=pid, signal=int(signal.Signals[f"SIG{what}"]), what=what)

    def events(self, timeout: float) -> list[dict[str, Any]]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            return []
        data = os.read(self._process.stdout.fileno(), 65536)
        if not data:
            raise AssertionError(
                "the zygote has ended: " + (self._directory / "zygote.err").read_text()[-2000:]
            )
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _command(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()


@attrs.define(eq=False)
class Round:
    """Some contenders on few locks."""

    seed: int
    directory: Path
    mark: str
    contenders: list[Contender]
    ledger: Ledger
    deletions: list[float] = attrs.field(factory=list)  # of all lock files, seconds from the start
    exclusion_may_end: bool = False
    is_ordered: bool = False  # those who wait are served in the order in which they came
    violations: list[str] = attrs.field(factory=list)
    is_over: bool = False
    deleted: int = 0
    outlived: int = 0
    began: float = 0.0
    _phase: Literal["contest", "sweep", "farewell"] = "contest"
    _sweeps: int = 0
    _since: float = 0.0  # of the contest, or the sweep
    _offset: int = 0
    _told_at: float = 0.0  # that it takes too long
    _journal: Journal = attrs.field(init=False)
    _zygote: Zygote = attrs.field(init=False)

    @property
    def projects(self) -> list[str]:
        blocks = (block for c in self.contenders for block in c.plan.all_blocks)
        return sorted({block.project for block in blocks})

    def lock_path(self, project: str) -> Path:
        return Path(os.environ["ORCHARD_INFRA_DIR"], "locks", f"{project}.lock")

    def begin(self, zygote: Zygote) -> None:
        self.began = self._since = time.monotonic()
        self.directory.mkdir()
        self._zygote = zygote
        self._journal = Journal(self.directory / "journal", "arena")

    def tick(self) -> None:
        """Read what has happened, and do what is due."""
        now = time.monotonic()
        self.read_journal()
        for contender in self.contenders:
            if contender.started is None:
                if self._may_start(contender, now):
                    self._start(contender)
            elif contender.pid is not None and contender.status is None:
                self._attack(contender, now)
        while self.deletions and now >= self.began + self.deletions[0]:
            self.deletions.pop(0)
            for project in self.projects:
                self._delete(project)
        left = [c for c in self.contenders if c.status is None]
        lingers = self._phase != "farewell" and all(c.lingers and not c.resume_at for c in left)
        if not left or lingers:
            self.read_journal()
            self._go_on(left)
        elif now > self._since + _ROUND:
            self._end_overdue(left, now)

    def _end_overdue(self, left: list[Contender], now: float) -> None:
        if not self._told_at:
            self._told_at = now
            names = ", ".join(c.name for c in left)
            self.violation(f"still running after {_ROUND:.0f} s: {names}; the logs show where")
        what = "KILL" if now > self._told_at + 1.0 else "QUIT"  # which has its stacks printed
        for contender in left:
            if contender.started is None:
                contender.started, contender.status = now, 0
            elif contender.pid is not None and what not in contender.hits:
                contender.hits.append(what)
                self._zygote.signal(contender.pid, what)

    def end_of(self, contender: Contender, status: int) -> None:
        contender.status = status
        self.read_journal()
        self._judge(contender)

    def violation(self, text: str) -> None:
        self.violations.append(text)

    def story(self) -> str:
        """All that is known, for whoever has to find the cause."""
        lines = [f"round with SEED={self.seed}", *self.violations]
        for c in self.contenders:
            lines.append(f"  {c.plan}; status {c.status}, hit by {c.hits or 'nothing'}")
        for event in read_journal(self.directory / "journal")[0]:
            at, who, what = event.pop("at"), event.pop("who"), event.pop("event")
            if what != "boundary":
                facts = " ".join(f"{name}={value}" for name, value in event.items())
                lines.append(f"  {at - self.began:8.4f} {who} {what} {facts}"[:2000])
        for log in sorted(self.directory.glob("*.log")):
            text = log.read_text(errors="replace").strip()
            if text:
                lines.append(f"  --- {log.name}\n{text[-4000:]}")
        return "\n".join(lines)

    def _may_start(self, contender: Contender, now: float) -> bool:
        first = next((c for c in self.contenders if c.name == contender.plan.follows), None)
        if first is not None and first.status is None:
            return False
        return now >= self.began + contender.plan.start_at

    def _start(self, contender: Contender) -> None:
        plan = {
            **attrs.asdict(contender.plan),
            "directory": str(self.directory),
            "mark": self.mark,
            "exclusion_may_end": self.exclusion_may_end,
            "grace": GRACE,
            "patience": PATIENCE,
            "interval": 0.05,
        }
        path = self.directory / f"{contender.name}.plan"
        path.write_text(json.dumps(plan))
        command = {"exec": [*_EXEC, str(path)]} if contender.plan.by_exec else {"plan": str(path)}
        log = self.directory / f"{contender.name}.log"
        self._zygote.start(f"{self.mark}/{contender.name}", log, **command)
        contender.started = time.monotonic()

    def _attack(self, contender: Contender, now: float) -> None:
        assert contender.pid is not None
        while contender.resume_at and now >= contender.resume_at[0]:
            contender.resume_at.pop(0)
            self._zygote.signal(contender.pid, "CONT")
        attacks = contender.plan.attacks
        for attack in attacks:
            if attack.due is None and attack.after in contender.events:
                attack.due = contender.events[attack.after] + attack.delay
        for attack in [a for a in attacks if a.due is not None and now >= a.due]:
            attacks.remove(attack)
            if self._sweeps:
                continue  # those that linger are left alone by then
            if attack.what == "worker":
                self._attack_child(contender)
            elif attack.what == LOST:
                self._delete(contender.plan.blocks[0].project)
            else:
                # Noted first: it may never be known whether it came before the end.
                contender.hits.append(attack.what)
                self._zygote.signal(contender.pid, attack.what)
                if attack.what == "STOP":
                    contender.resume_at.append(now + attack.lasts)

    def _attack_child(self, contender: Contender) -> None:
        for child in contender.program.children.values():
            if child.kind != "opted-out" and lives(child.who):
                # Written down before: somebody may look for it in the next instant.
                self._journal.write("attacked", pid=child.who.pid, started=child.who.started)
                send(child.who, signal.SIGKILL)
                contender.hits.append("worker")
                return

    def _delete(self, project: str) -> None:
        try:
            self.lock_path(project).unlink()
            self.ledger.deleted.add(project)
            self.deleted += 1
        except FileNotFoundError:
            pass

    def read_journal(self) -> None:
        """Take down what was written since the last time."""
        lines, self._offset = read_journal(self.directory / "journal", self._offset)
        by_name = {contender.name: contender for contender in self.contenders}
        for line in lines:
            self.ledger.enter(line)
            event, contender = line["event"], by_name.get(line["who"])
            if contender is None:
                continue
            contender.events.setdefault(event, line["at"])
            if event == "hit":
                contender.hits.append(line["what"])
                if line["what"] == "STOP":
                    contender.resume_at.append(time.monotonic() + 0.1)
            elif event == "boundary":
                contender.boundaries.append((line["boundary"], line["occurrence"]))
            elif event == "unexpected":
                self.violation(f"{contender.name} failed:\n{line['traceback']}")
            elif event == "violation":
                self.violation(f"{contender.name}: {line['text']}")
            elif event == "lost":
                child = self.ledger.child(Identity(line["pid"], line["started"]))
                if contender.program.verdict(child, has_gone=False) == "lives":
                    self.violation(f"{contender.name} lives, and lost its {child.kind} {child.who}")
            elif event == "leaving" and line["ending"] != "normal":
                contender.hits.append(line["ending"])

    def _judge(self, contender: Contender) -> None:
        self._judge_status(contender)
        if contender.was_killed:
            return
        # However it was ended: who runs code of its own to the end leaves no file but evidence. A
        # Ctrl-C that another thread receives is held off by no mask: a record may get lost then.
        loses_record = contender.plan.beside is not None and "INT" in contender.hits
        for run in contender.program.runs.values():
            if run.fate == "abandoned":
                if contender.is_healthy:
                    self.violation(f"a release of {contender.name} failed, and nothing hit it")
                continue
            left = [Path(run.tmp_dir)]
            # Children that nobody had the time to write down may be evidence of it.
            if not contender.plan.starts_children and not loses_record:
                left.append(self._record(run.run_id))
            for path in left:
                if path.exists():
                    self.violation(f"{contender.name} ended by itself and left {path}")
            if f'"{run.run_id}"'.encode() in read_bytes(self.lock_path(run.project)):
                self.violation(f"{contender.name} ended by itself and left its lock file")

    def _judge_status(self, contender: Contender) -> None:
        status, hits, plan = contender.status, set(contender.hits), contender.plan
        allowed = {_FINE}
        if "exception" in hits or plan.raises_on_child:
            allowed.add(_FAILED)
        if "sys.exit" in hits:
            allowed.add(_EXITED)
        if "_exit" in hits:
            allowed.add(9)
        if not plan.is_sweeper and any(b.timeout is not None for b in plan.blocks):
            allowed.add(_LOCKED)
        if "INT" in hits:
            allowed.add(71)  # between two lines of zygote.py
            if plan.by_exec and "start" not in contender.events:
                allowed.add(1)  # within the start of the interpreter
        for what in hits & {"KILL", "TERM", "INT", "HUP"}:
            allowed.add(-int(signal.Signals["SIG" + what]))
            allowed.add(_BY_SIGNAL.get(what, 0))
        if contender.is_healthy:
            allowed &= {_FINE, _LOCKED}
        if status not in allowed:
            hit = ", ".join(contender.hits) or "nothing"
            self.violation(f"{contender.name} ended with {status}, hit by {hit}")

    # The sweep, and what must hold after it.

    def _go_on(self, lingering: list[Contender]) -> None:
        """All have ended but these, which linger."""
        if self._phase in ("contest", "farewell"):
            self._sweep()
            return
        self._check_after_sweep(lingering)
        if lingering:
            (self.directory / "end").touch()
            self._phase, self._since = "farewell", time.monotonic()
        else:
            self._finish()

    def _sweep(self) -> None:
        """Let a run enter each lock, in peace: what dead ones have left goes now, or stays."""
        self._phase = "sweep"
        self._sweeps += 1
        self._since = time.monotonic()
        self.deletions.clear()
        for number, project in enumerate(self.projects):
            plan = one_run(f"sweeper{self._sweeps}.{number}", project, timeout=0.0, is_sweeper=True)
            self.contenders.append(self._enlist(plan))

    def enlist(self, plans: Iterable[Plan]) -> None:
        """Have these programs take part."""
        self.contenders += map(self._enlist, plans)

    def _enlist(self, plan: Plan) -> Contender:
        return Contender(
            plan,
            self.ledger.programs.setdefault(plan.name, Program(plan.name, self.ledger.deleted)),
        )

    def _check_after_sweep(self, lingering: list[Contender]) -> None:
        living = {contender.name for contender in lingering}
        for program, child in self.ledger.children():
            verdict = program.verdict(child, has_gone=program.name not in living)
            alive = lives(child.who)
            if verdict == ("gone" if alive else "lives"):
                what = "is left" if alive else "is gone"
                of = "lives" if program.name in living else "has ended"
                self.violation(
                    f"{child.kind} {child.who} of {program.name}, which {of}, {what} "
                    f"after the sweep: {command_of(child.who.pid)}"
                )
        for program in self.ledger.programs.values():
            if program.name not in living:
                self._check_files_of(program)
        for contender in self.contenders:
            took = contender.events.get("in", 0.0) - contender.events.get("start", 0.0)
            if contender.plan.is_sweeper and took > START:
                self.violation(f"{contender.name} took {took:.2f} s to start")

    def _check_files_of(self, program: Program) -> None:
        files = [(self._record(run.run_id), Path(run.tmp_dir)) for run in program.runs.values()]
        left = [path for path in itertools.chain(*files) if path.exists()]
        if left and not program.is_outlived(self.mark):
            names = ", ".join(map(str, left))
            self.violation(f"left of {program.name} after the sweep: {names}")
        if program.who is not None and identity(program.who.pid) is None:
            memory = Path(f"/dev/shm/pym-{program.who.pid}-chaos")
            if memory.exists():
                self.violation(f"{memory} of {program.name} is left after the sweep")
                memory.unlink(missing_ok=True)

    def _finish(self) -> None:
        self.is_over = True
        for project in self.projects:
            lock = self.lock_path(project)
            if lock.exists():
                self.violation(f"the lock of {project} is left after the sweep")
            for queue in (lock.parent.parent / "queues").glob(f"*-{lock.name}"):
                tickets = sorted(path.name for path in queue.glob("*"))
                self.violation(f"the queue of {project} is left after the sweep: {tickets}")
        if self.is_ordered:
            self._check_order()
        self._clear()

    def _check_order(self) -> None:
        """Who took a ticket before another one arrived has the lock before that one."""
        healthy = [
            c for c in self.contenders if c.is_healthy and "holds" in c.events and c.plan.blocks
        ]
        for first, second in itertools.permutations(healthy, 2):
            if "waits" not in first.events or "arrives" not in second.events:
                continue
            came_before = first.events["waits"] < second.events["arrives"]
            if came_before and first.events["holds"] > second.events["holds"]:
                self.violation(f"{second.name} came after {first.name}, and was served before it")
        free_since = 0.0
        waiting = [c for c in healthy if "waits" in c.events]
        for line in read_journal(self.directory / "journal")[0]:
            if line["event"] == "dropped":
                free_since = line["at"]
            elif line["event"] == "holds" and free_since:
                waits = (c for c in waiting if c.events["waits"] < free_since < c.events["holds"])
                if line["at"] - free_since > _HANDOFF and any(waits):
                    took = line["at"] - free_since
                    self.violation(f"the lock was free for {took:.1f} s although runs waited")

    def _clear(self) -> None:
        """Count what rightly lives on, and end all of it."""
        noted: dict[Identity, Child] = {child.who: child for _, child in self.ledger.children()}
        left = set(marked(self.mark))
        deadline = time.monotonic() + 2.0
        while left - set(noted) and time.monotonic() < deadline:
            unexplained = [who for who in left if who not in noted and not self._may_live(who)]
            if not unexplained:
                break
            time.sleep(0.05)  # it may be on its way out
            left = set(marked(self.mark))
        for who in left:
            if who not in noted and not self._may_live(who) and lives(who):
                self.violation(f"{who} is left after the sweep: {command_of(who.pid)}")
            self.outlived += send(who, signal.SIGKILL)
        deadline = time.monotonic() + 5.0
        while (left := set(marked(self.mark))) and time.monotonic() < deadline:
            for who in left:  # a shell may have started another one just before its end
                send(who, signal.SIGKILL)
            time.sleep(0.01)

    def _may_live(self, who: Identity) -> bool:
        """Whether what nobody had the time to write down may have outlived its run."""
        if session_of(who.pid) != os.getsid(0):
            return True
        run = self.ledger.run(self._run_of(who) or "")
        return not is_fork(who, self.mark) and (run is None or run.fate in ("ended", "unsure"))

    def _run_of(self, who: Identity) -> str | None:
        return environ_of(who.pid).get(_RUN_ID)

    def _record(self, run_id: str) -> Path:
        return Path(os.environ["ORCHARD_INFRA_DIR"], "runs", f"{run_id}.run")


class Arena:
    """Plays rounds, some at a time, beside bystanders that must outlive all of them."""

    def __init__(self, directory: Path, give_up_after: int = 1) -> None:
        self.directory = directory
        self.figure = Figure()
        self._give_up_after = give_up_after  # rounds with a violation
        self._zygote = Zygote(directory)
        self._mark = f"oc{os.urandom(2).hex()}"
        self._by_pid: dict[int, tuple[Round, Contender]] = {}
        self._numbers = itertools.count()
        self._stories: list[str] = []
        self._bystanders: dict[str, Identity] = {}
        self._neighbours = self._start_bystanders()

    def play(self, rounds: Iterable[Round], at_once: int = 6) -> list[Round]:
        """Play all of them, or until it is time to give up. Returns those that were played."""
        waiting = iter(rounds)
        playing: list[Round] = []
        played: list[Round] = []
        more = True
        while True:
            while more and len(playing) < at_once:
                following = next(waiting, None)
                if following is None or len(self._stories) >= self._give_up_after:
                    more = False
                    break
                following.begin(self._zygote)
                playing.append(following)
            if not playing:
                return played
            self._receive(playing)
            for round_ in list(playing):
                round_.tick()
                if round_.is_over:
                    playing.remove(round_)
                    played.append(round_)
                    self._account(round_)

    def new_round(self, seed: int, plans: Iterable[Plan], **options: Any) -> Round:
        mark = f"{self._mark}-{next(self._numbers)}"
        round_ = Round(seed, self.directory / mark, mark, [], Ledger(), **options)
        plans = list(plans)
        for block in (block for plan in plans for block in plan.all_blocks):
            block.project = f"{mark}-{block.project}"
        round_.enlist(plans)
        return round_

    def assert_no_violation(self) -> None:
        """Raise with the whole story of the rounds that had one."""
        assert not self._stories, "\n\n".join(self._stories)

    def close(self) -> None:
        """Look at what all of them together have left, and end the bystanders."""
        try:
            if not self._stories:
                self.play([self.new_round(0, [one_run("last", "last")])])
                self._check_registry()
            for name, who in self._bystanders.items():
                if not lives(who):
                    self._blame(f"the bystander {name} has died: {who}")
        finally:
            for who in self._bystanders.values():
                send(who, signal.SIGKILL)
            self._zygote.close()
            # After a violation nobody has looked after these, and later tests would find them.
            for memory in Path("/dev/shm").glob("pym-*-chaos"):
                if identity(int(memory.name.split("-")[1])) is None:
                    memory.unlink(missing_ok=True)

    def _check_registry(self) -> None:
        """All contenders are dead, and so is what outlived them: nobody is on record any more."""
        self._neighbours.read_journal()
        programs = self._neighbours.ledger.programs.values()
        known = {run_id for program in programs for run_id in program.runs}
        directory = Path(os.environ["ORCHARD_INFRA_DIR"])
        for path in sorted((*directory.glob("runs/*"), *directory.glob("queues/*"))):
            if path.name.partition(".")[0] not in (*known, "history"):
                members = "" if path.is_dir() else read_bytes(path).decode(errors="replace")
                self._blame(f"left when all runs were over: {path.name}\n{members[:2000]}")

    def _start_bystanders(self) -> Round:
        """Two live runs of other projects with children, a program that has left its run and
        goes on with its children, a script that runs the same program without being in a run,
        and a process that has nothing to do with any of this.
        """
        log = self.directory / "bystanders.log"
        children = ("busy", "setsid", "exec", "exec-setsid", "echo")
        ended = one_run("ended", "three", children=(*children, "served"), goes_on=1e6)
        neighbours = self.new_round(
            0,
            [
                one_run("forked", "one", body=1e6, children=children),
                one_run("executed", "two", body=1e6, children=children, by_exec=True),
                ended,
            ],
        )
        neighbours.begin(self._zygote)
        self._zygote.start("relative", log, exec=[*_EXEC, "--wait"])
        self._zygote.start("stranger", log, exec=["sleep", "100000"])
        deadline = time.monotonic() + 60.0
        while len(self._bystanders) < 2 or not all(
            len(c.program.children) >= 6 and {"working", "goes on"} & c.events.keys()
            for c in neighbours.contenders
        ):
            if time.monotonic() > deadline or neighbours.violations:
                raise AssertionError(neighbours.story())
            self._receive([neighbours])
            neighbours.tick()
        for contender in neighbours.contenders:
            assert contender.pid is not None
            self._add_bystander(contender.name, contender.pid)
            for who, child in contender.program.children.items():
                self._bystanders[f"{child.kind} {who.pid} of {contender.name}"] = who
        return neighbours

    def _add_bystander(self, name: str, pid: int) -> None:
        who = identity(pid)
        assert who is not None, name
        self._bystanders[name] = who

    def _receive(self, playing: list[Round]) -> None:
        for event in self._zygote.events(timeout=0.003):
            if event["event"] == "missed":  # it had ended before it was hit
                if event["what"] in self.figure.hits:
                    self.figure.hits[event["what"]] -= 1
                continue
            pid = event["pid"]
            if event["event"] == "started":
                mark, _, name = event["id"].partition("/")
                if not name:
                    self._add_bystander(mark, pid)
                    continue
                round_ = next(r for r in playing if r.mark == mark)
                contender = next(c for c in round_.contenders if c.name == name)
                contender.pid = pid
                self._by_pid[pid] = (round_, contender)
            elif pid in self._by_pid:
                round_, contender = self._by_pid.pop(pid)
                round_.end_of(contender, event["status"])

    def _account(self, round_: Round) -> None:
        figure = self.figure
        figure.rounds += 1
        figure.outlived += round_.outlived
        for contender in round_.contenders:
            figure.programs += 1
            figure.runs += len(contender.program.runs)
            figure.children += len(contender.program.children)
            figure.hits.update(contender.hits)
            if contender.plan.boundary is not None and contender.hits:
                figure.boundaries.add(contender.plan.boundary["boundary"])
            if contender.plan.is_sweeper and "in" in contender.events:
                figure.starts.append(contender.events["in"] - contender.events["start"])
        figure.hits["deleted lock"] += round_.deleted
        self._neighbours.read_journal()
        round_.violations += self._neighbours.violations
        self._neighbours.violations.clear()
        for name, who in list(self._bystanders.items()):
            if not lives(who):
                round_.violation(f"the bystander {name} has died: {who}")
                del self._bystanders[name]
        figure.violations += round_.violations
        if round_.violations:
            self._stories.append(round_.story())
            print(self._stories[-1], flush=True)  # now, for who watches a long run
        else:
            shutil.rmtree(round_.directory)

    def _blame(self, text: str) -> None:
        self.figure.violations.append(text)
        self._stories.append(text)
