"""The arena: rounds of contenders, what hits them and when, and what must hold after each.

A round is made from its seed alone. It ends with a sweep, one more run for each of its locks that
is left alone; after that nothing of the round may be left on the machine.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from chaos.observing import (
    Identity,
    all_identities,
    command_of,
    identity,
    lives,
    read_bytes,
    read_journal,
    send,
)

_HERE = Path(__file__).resolve().parent
_EXEC = [sys.executable, str(_HERE / "contender.py")]

# Exit statuses of a contender that nobody had to kill: see contender.py.
_FINE, _FAILED, _EXITED, _LOCKED = 0, 3, 4, 75
_BY_SIGNAL = {"TERM": 143, "INT": 130, "HUP": 129}

# What ends a run, or may. SIGSTOP, a killed worker and a deleted lock file come on top.
ENDINGS = ("KILL", "TERM", "INT", "HUP", "_exit", "exception", "sys.exit")
CHILDREN = (
    "idle", "busy", "stubborn", "setsid", "tree", "frozen", "unwinds", "exec", "exec-setsid",
    "exec-tree", "exec-stubborn", "exec-spawner", "opted-out",
)  # fmt: skip

GRACE = 0.15  # seconds between SIGTERM and SIGKILL for what a run has left
PATIENCE = 0.1
# How long the next run may take to start: patience, grace, what `stop_processes` waits for the
# killed ones, and the load of everybody else's tests.
START = PATIENCE + GRACE + 2.0 + 40.0
_ROUND = 90.0  # seconds
_LOST = "loses its lock"


@attrs.define
class Attack:
    """``what`` happens to a contender ``delay`` seconds after an event of its journal."""

    after: str
    delay: float
    what: str
    lasts: float = 0.0  # of a SIGSTOP
    due: float | None = None


@attrs.define
class Contender:
    name: str
    project: str
    timeout: float | None = None
    children: tuple[str, ...] = ()
    body: float = 0.0
    ending: str = "normal"
    mode: str = "raise"
    boundary: dict[str, Any] | None = None
    attacks: list[Attack] = attrs.field(factory=list)
    start_at: float = 0.0  # seconds after the round began
    follows: str | None = None  # starts when that one has ended
    by_exec: bool = False
    trace: bool = False
    loses_lock: bool = False
    is_sweeper: bool = False

    pid: int | None = None
    status: int | None = None
    started: float | None = None
    ended: float | None = None
    run_id: str | None = None
    tmp_dir: str | None = None
    events: dict[str, float] = attrs.field(factory=dict)
    hits: list[str] = attrs.field(factory=list)
    family: dict[Identity, str] = attrs.field(factory=dict)
    resume_at: list[float] = attrs.field(factory=list)
    boundaries: list[tuple[str, int]] = attrs.field(factory=list)

    @property
    def is_healthy(self) -> bool:
        return not self.hits and self.ending == "normal"

    @property
    def was_killed(self) -> bool:
        return "KILL" in self.hits or "_exit" in self.hits

    def describe(self) -> str:
        told = ("timeout", "children", "body", "ending", "mode", "boundary", "by_exec", "status")
        facts = ", ".join(f"{name} {getattr(self, name)}" for name in told)
        return f"{self.name} for {self.project}: {facts}, hit by {self.hits or 'nothing'}"


@attrs.define
class Figure:
    """What a chaos run comes to."""

    rounds: int = 0
    runs: int = 0
    children: int = 0
    hits: Counter[str] = attrs.field(factory=Counter)
    boundaries: set[str] = attrs.field(factory=set)
    violations: list[str] = attrs.field(factory=list)
    starts: list[float] = attrs.field(factory=list)  # seconds, each after a run that was hit
    began: float = attrs.field(factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def kills(self) -> int:
        """How many runs were told or forced to end."""
        return sum(self.hits[what] for what in ENDINGS)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {what}" for what, count in sorted(self.hits.items()))
        slowest = max(self.starts, default=0.0)
        return (
            f"{self.kills} kills, {self.runs} runs, {len(self.violations)} violations; "
            f"{self.rounds} rounds in {self.seconds:.0f} s, {self.children} child processes, "
            f"hit within prepare and release at {len(self.boundaries)} boundaries; "
            f"slowest start after a dead run {slowest:.2f} s\n({kinds})"
        )

    def as_json(self) -> dict[str, Any]:
        ordered = sorted(self.starts) or [0.0]
        return {
            "kills": self.kills,
            "runs": self.runs,
            "violations": self.violations,
            "rounds": self.rounds,
            "children": self.children,
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
            raise AssertionError("the zygote has ended")
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
    deletions: list[float] = attrs.field(factory=list)  # of all lock files, seconds from the start
    exclusion_may_end: bool = False
    violations: list[str] = attrs.field(factory=list)
    is_over: bool = False
    deleted: int = 0
    began: float = 0.0
    sweeping: bool = False
    _since: float = 0.0  # of the contest, or the sweep
    _offset: int = 0
    _overdue: bool = False
    _zygote: Zygote = attrs.field(init=False)

    @property
    def projects(self) -> list[str]:
        return sorted({contender.project for contender in self.contenders})

    def lock_path(self, project: str) -> Path:
        return Path(os.environ["ORCHARD_INFRA_DIR"], "locks", f"{project}.lock")

    def begin(self, zygote: Zygote) -> None:
        self.began = self._since = time.monotonic()
        self.directory.mkdir()
        self._zygote = zygote

    def tick(self) -> None:
        """Read what has happened, and do what is due."""
        now = time.monotonic()
        self._read_journal()
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
        if all(contender.status is not None for contender in self.contenders):
            self._read_journal()
            if self.sweeping:
                self._finish()
            else:
                self._sweep()
        elif now > self._since + _ROUND and not self._overdue:
            self._overdue = True
            left = [c.name for c in self.contenders if c.status is None]
            self.violation(f"still running after {_ROUND:.0f} s: {', '.join(left)}")
            for contender in self.contenders:
                if contender.started is None:
                    contender.started, contender.status = now, 0
                elif contender.pid is not None:
                    contender.hits.append("KILL")
                    self._zygote.signal(contender.pid, "KILL")

    def end_of(self, contender: Contender, status: int) -> None:
        contender.status = status
        contender.ended = time.monotonic()
        self._read_journal()
        self._judge(contender)

    def violation(self, text: str) -> None:
        self.violations.append(text)

    def story(self) -> str:
        """All that is known, for whoever has to find the cause."""
        lines = [f"round with SEED={self.seed}", *self.violations]
        lines += [f"  {contender.describe()}" for contender in self.contenders]
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
        first = next((c for c in self.contenders if c.name == contender.follows), None)
        if first is not None and first.status is None:
            return False
        return now >= self.began + contender.start_at

    def _start(self, contender: Contender) -> None:
        plan = {
            "name": contender.name,
            "project": contender.project,
            "directory": str(self.directory),
            "mark": self.mark,
            "timeout": contender.timeout,
            "children": contender.children,
            "body": contender.body,
            "ending": contender.ending,
            "mode": contender.mode,
            "boundary": contender.boundary,
            "trace": contender.trace,
            "loses_lock": contender.loses_lock,
            "exclusion_may_end": self.exclusion_may_end,
            "grace": GRACE,
            "patience": PATIENCE,
            "interval": 0.05,
        }
        path = self.directory / f"{contender.name}.plan"
        path.write_text(json.dumps(plan))
        command = {"exec": [*_EXEC, str(path)]} if contender.by_exec else {"plan": str(path)}
        log = self.directory / f"{contender.name}.log"
        self._zygote.start(f"{self.mark}/{contender.name}", log, **command)
        contender.started = time.monotonic()

    def _attack(self, contender: Contender, now: float) -> None:
        assert contender.pid is not None
        while contender.resume_at and now >= contender.resume_at[0]:
            contender.resume_at.pop(0)
            self._zygote.signal(contender.pid, "CONT")
        for attack in contender.attacks:
            if attack.due is None and attack.after in contender.events:
                attack.due = contender.events[attack.after] + attack.delay
        for attack in [a for a in contender.attacks if a.due is not None and now >= a.due]:
            contender.attacks.remove(attack)
            if attack.what == "worker":
                workers = [who for who, kind in contender.family.items() if kind != "opted-out"]
                if workers and send(workers[0], signal.SIGKILL):
                    contender.hits.append("worker")
            elif attack.what == _LOST:
                self._delete(contender.project)
            else:
                # Noted first: it may never be known whether it came before the end.
                contender.hits.append(attack.what)
                self._zygote.signal(contender.pid, attack.what)
                if attack.what == "STOP":
                    contender.resume_at.append(now + attack.lasts)

    def _delete(self, project: str) -> None:
        try:
            self.lock_path(project).unlink()
            self.deleted += 1
        except FileNotFoundError:
            pass

    def _read_journal(self) -> None:
        lines, self._offset = read_journal(self.directory / "journal", self._offset)
        by_name = {contender.name: contender for contender in self.contenders}
        for line in lines:
            contender = by_name[line["who"]]
            event = line["event"]
            contender.events.setdefault(event, line["at"])
            if event == "registering":
                contender.run_id, contender.tmp_dir = line["run_id"], line["tmp_dir"]
            elif event == "child":
                contender.family[Identity(line["pid"], line["started"])] = line["kind"]
            elif event == "hit":
                contender.hits.append(line["what"])
                if line["what"] == "STOP":
                    contender.resume_at.append(time.monotonic() + 0.1)
            elif event == "boundary":
                contender.boundaries.append((line["boundary"], line["occurrence"]))
            elif event == "unexpected":
                self.violation(f"{contender.name} failed:\n{line['traceback']}")
            elif event == "violation":
                self.violation(f"{contender.name}: {line['text']}")
            elif event == "leaving" and contender.ending != "normal":
                contender.hits.append(contender.ending)

    # What must hold.

    def _judge(self, contender: Contender) -> None:
        self._judge_status(contender)
        if contender.was_killed:
            return
        # However it was ended: what runs code of its own leaves nothing for the next one.
        if contender.run_id is not None:
            run_id = contender.run_id
            for path in (self._record(run_id), Path(contender.tmp_dir or "/nothing")):
                if path.exists():
                    self.violation(f"{contender.name} ended by itself and left {path}")
            if f'"{run_id}"'.encode() in read_bytes(self.lock_path(contender.project)):
                self.violation(f"{contender.name} ended by itself and left its lock file")
        for child, kind in contender.family.items():
            if kind != "opted-out" and lives(child):
                self.violation(f"{contender.name} ended by itself and left {kind} {child}")

    def _judge_status(self, contender: Contender) -> None:
        status, hits = contender.status, set(contender.hits)
        allowed = {_FINE, _FAILED if "exception" in hits else _FINE}
        if "sys.exit" in hits:
            allowed.add(_EXITED)
        if "_exit" in hits:
            allowed.add(9)
        if contender.timeout is not None and not contender.is_sweeper:
            allowed.add(_LOCKED)
        if "INT" in hits:
            allowed.add(71)  # between two lines of zygote.py
            if contender.by_exec and "start" not in contender.events:
                allowed.add(1)  # within the start of the interpreter
        for what in hits & {"KILL", "TERM", "INT", "HUP"}:
            allowed.add(-int(signal.Signals["SIG" + what]))
            allowed.add(_BY_SIGNAL.get(what, 0))
        if contender.is_healthy:
            allowed &= {_FINE, _LOCKED}
        if status not in allowed:
            hit = ", ".join(contender.hits) or "nothing"
            self.violation(f"{contender.name} ended with {status}, hit by {hit}")

    def _sweep(self) -> None:
        """Let a run enter each lock, in peace: what dead ones have left goes now, or stays."""
        self.sweeping = True
        self._since = time.monotonic()
        self.deletions.clear()
        for number, project in enumerate(self.projects):
            self.contenders.append(
                Contender(f"sweeper{number}", project, timeout=0.0, is_sweeper=True)
            )

    def _finish(self) -> None:
        self.is_over = True
        for contender in self.contenders:
            for what in (self._record(contender.run_id or "x"), Path(contender.tmp_dir or "/x")):
                if what.exists():
                    self.violation(f"{what} of {contender.name} is left after the sweep")
            took = contender.events.get("in", 0.0) - contender.events.get("start", 0.0)
            if contender.is_sweeper and took > START:
                self.violation(f"the next run of {contender.project} took {took:.2f} s to start")
            if contender.pid is not None and identity(contender.pid) is None:
                memory = Path(f"/dev/shm/pym-{contender.pid}-chaos")
                if memory.exists():
                    self.violation(f"{memory} is left after the sweep")
                    memory.unlink(missing_ok=True)
        for project in self.projects:
            if self.lock_path(project).exists():
                self.violation(f"the lock of {project} is left after the sweep")
        self._look_for_processes()

    def _look_for_processes(self) -> None:
        family = {who: kind for c in self.contenders for who, kind in c.family.items()}
        daemons = [who for who, kind in family.items() if kind == "opted-out"]
        for who in daemons:
            if not send(who, signal.SIGKILL) and not self._took_the_daemon(who):
                self.violation(f"a daemon that had opted out is gone: {who}")
        for who in set(self._marked()) - set(daemons):
            environ = read_bytes(f"/proc/{who.pid}/environ").split(b"\0")
            if b"ORCHARD_INFRA_RUN_ID=" not in environ:  # else a daemon that was never written down
                kind = family.get(who, "child, or contender")
                self.violation(f"{who} ({kind}) is left after the sweep: {command_of(who.pid)}")
            send(who, signal.SIGKILL)

    def _took_the_daemon(self, who: Identity) -> bool:
        """Whether it was hit as a worker on purpose."""
        return any("worker" in c.hits and who in c.family for c in self.contenders)

    def _marked(self) -> Iterator[Identity]:
        mark = self.mark.encode()
        for who in all_identities():
            environ = read_bytes(f"/proc/{who.pid}/environ").split(b"\0")
            name = read_bytes(f"/proc/{who.pid}/comm").strip()
            if name == mark or b"CHAOS_MARK=" + mark in environ:
                yield who

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
        self._start_bystanders()

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

    def new_round(self, seed: int, contenders: list[Contender], **options: Any) -> Round:
        mark = f"{self._mark}-{next(self._numbers)}"
        for contender in contenders:
            contender.project = f"{mark}-{contender.project}"
        return Round(seed, self.directory / mark, mark, list(contenders), **options)

    def assert_no_violation(self) -> None:
        """Raise with the whole story of the rounds that had one."""
        assert not self._stories, "\n\n".join(self._stories)

    def close(self) -> None:
        """Look after the bystanders, and send them home."""
        try:
            for name, who in self._bystanders.items():
                if not lives(who):
                    self._blame(f"the bystander {name} has died: {who}")
            for pid, (_, contender) in self._by_pid.items():
                self._zygote.signal(pid, "KILL")
                contender.hits.append("KILL")
        finally:
            for who in self._bystanders.values():
                send(who, signal.SIGKILL)
            self._zygote.close()

    def _start_bystanders(self) -> None:
        """Two live runs of other projects with children, a script that runs the same program
        without being in a run, and a process that has nothing to do with any of this."""
        log = self.directory / "bystanders.log"
        children = ("busy", "setsid", "exec", "exec-setsid")
        lasting = {"body": 1e6, "children": children}
        neighbours = self.new_round(
            0,
            [
                Contender("forked", "one", **lasting),
                Contender("executed", "two", by_exec=True, **lasting),
            ],
        )
        neighbours.begin(self._zygote)
        self._zygote.start("relative", log, exec=[*_EXEC, "--wait"])
        self._zygote.start("stranger", log, exec=["sleep", "100000"])
        deadline = time.monotonic() + 60.0
        while len(self._bystanders) < 2 or not all(
            len(c.family) == 5 and "working" in c.events for c in neighbours.contenders
        ):
            assert time.monotonic() < deadline, neighbours.story()
            self._receive([neighbours])
            neighbours.tick()
        for contender in neighbours.contenders:
            assert contender.pid is not None
            self._add_bystander(contender.name, contender.pid)
            for who, kind in contender.family.items():
                self._bystanders[f"{kind} {who.pid} of {contender.name}"] = who

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
        for contender in round_.contenders:
            figure.runs += 1
            figure.children += len(contender.family)
            figure.hits.update(contender.hits)
            if contender.boundary is not None and contender.hits:
                figure.boundaries.add(contender.boundary["boundary"])
            if contender.is_sweeper and "in" in contender.events:
                figure.starts.append(contender.events["in"] - contender.events["start"])
        figure.hits["deleted lock"] += round_.deleted
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


def random_round(arena: Arena, seed: int, boundaries: list[tuple[str, int]]) -> Round:
    """A round at random; the same seed gives the same one."""
    rng = random.Random(seed)
    projects = ["a", "b"][: rng.choice([1, 1, 1, 2])]
    contenders = [
        _random_contender(rng, f"c{number}", rng.choice(projects), boundaries)
        for number in range(rng.randint(2, 5))
    ]
    return arena.new_round(seed, contenders)


def round_without_locks(arena: Arena, seed: int) -> Round:
    """A round in which lock files are deleted: under one run that has to notice, and at random."""
    rng = random.Random(seed)
    loser = Contender(
        "loser",
        "a",
        children=tuple(rng.choices(CHILDREN, k=rng.choice([0, 1, 2]))),
        mode=rng.choice(["raise", "flag"]),
        loses_lock=True,
    )
    loser.attacks.append(Attack("working", rng.uniform(0.0, 0.2), _LOST))
    others = [
        _random_contender(rng, f"c{number}", rng.choice(["a", "b"]), [])
        for number in range(rng.randint(1, 4))
    ]
    deletions = sorted(rng.uniform(0.0, 1.0) for _ in range(rng.randint(0, 6)))
    return arena.new_round(seed, [loser, *others], deletions=deletions, exclusion_may_end=True)


def _random_contender(
    rng: random.Random, name: str, project: str, boundaries: list[tuple[str, int]]
) -> Contender:
    contender = Contender(
        name,
        project,
        timeout=rng.choice([None, None, None, 0.0, 1.0]),
        children=tuple(rng.choices(CHILDREN, k=rng.choice([0, 1, 1, 2, 3]))),
        body=rng.choice([0.0, rng.uniform(0.0, 0.15)]),
        mode=rng.choice(["raise", "raise", "flag"]),
        start_at=rng.uniform(0.0, 0.3),
        by_exec=rng.random() < 0.12,
    )
    fate = rng.random()
    if fate < 0.40:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            contender.attacks.append(_random_attack(rng))
    elif fate < 0.75 and boundaries:
        boundary, occurrence = rng.choice(boundaries)
        what = rng.choice(["KILL", "KILL", "TERM", "INT", "HUP", "STOP", "_exit"])
        contender.boundary = {"boundary": boundary, "occurrence": occurrence, "what": what}
        if rng.random() < 0.2:
            contender.attacks.append(_random_attack(rng))
    elif fate < 0.87:
        contender.ending = rng.choice(["exception", "sys.exit", "_exit"])
    return contender  # the rest are healthy


def _random_attack(rng: random.Random) -> Attack:
    after = rng.choice(["start", "start", "holds", "in", "working", "leaving"])
    return Attack(
        after,
        delay=rng.choice([0.0, rng.uniform(0.0, 0.03), rng.uniform(0.0, 0.3)]),
        what=rng.choice(["KILL", "KILL", "TERM", "TERM", "INT", "HUP", "STOP", "STOP", "worker"]),
        lasts=rng.uniform(0.01, 0.4),
    )
