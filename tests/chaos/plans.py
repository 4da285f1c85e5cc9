"""What happens in a round: its contenders, and what hits them and when. At random, from a seed."""

from __future__ import annotations

import random
from typing import Any

import attrs

from chaos.ledger import KINDS

# What ends a program, or may. SIGSTOP, a killed worker and a deleted lock file come on top.
ENDINGS = ("KILL", "TERM", "INT", "HUP", "_exit", "exception", "sys.exit")
LOST = "loses its lock"
GRACE = 0.15  # seconds between SIGTERM and SIGKILL for what a run has left
PATIENCE = 0.1

# These cost much, and a few are enough.
_DEAR = ("exec-spawner", "exec-daemons", "served")
_KINDS = tuple(kind for kind in KINDS for _ in range(1 if kind in _DEAR else 4))


@attrs.define
class Block:
    """One run of a program. ``after`` is when one beside the others begins, in seconds."""

    project: str
    timeout: float | None = None
    children: tuple[str, ...] = ()
    body: float = 0.0
    ending: str = "normal"
    style: str = "with"
    leftovers: str = "report"
    after: float = 0.0


@attrs.define
class Attack:
    """``what`` happens to a contender ``delay`` seconds after an event of its journal."""

    after: str
    delay: float
    what: str
    lasts: float = 0.0  # of a SIGSTOP
    due: float | None = None


@attrs.define
class Plan:
    """One program: its runs, one after the other, and one beside them in another thread. It
    ``goes_on`` for some seconds after the last one, or ``lingers`` until all others have ended and
    the next runs of its projects have been. Then it may end its children, or leave them.
    """

    name: str
    blocks: list[Block]
    beside: Block | None = None
    mode: str = "raise"
    boundary: dict[str, Any] | None = None
    attacks: list[Attack] = attrs.field(factory=list)
    start_at: float = 0.0  # seconds after the round began
    follows: str | None = None  # starts when that one has ended
    goes_on: float = 0.0
    later: tuple[str, ...] = ()  # children that it starts then
    lingers: bool = False
    tidies: bool = False
    raises_on_child: bool = False  # has a handler of SIGCHLD as torch has for its DataLoader
    by_exec: bool = False
    trace: bool = False
    loses_lock: bool = False
    is_sweeper: bool = False

    @property
    def all_blocks(self) -> list[Block]:
        return self.blocks if self.beside is None else [*self.blocks, self.beside]

    @property
    def starts_children(self) -> bool:
        return bool(self.later) or any(block.children for block in self.all_blocks)

    @property
    def endings(self) -> set[str]:
        return {block.ending for block in self.all_blocks} - {"normal"}

    def __str__(self) -> str:
        told = attrs.asdict(self, filter=lambda a, value: a.name != "name" and value != a.default)
        return f"{self.name}: {told}"


def one_run(name: str, project: str, **options: Any) -> Plan:
    """A program with one run; options of either go where they belong."""
    of_block = {name: options.pop(name) for name in list(options) if name in _BLOCK}
    return Plan(name, [Block(project, **of_block)], **options)


_BLOCK = attrs.fields_dict(Block)


def random_plans(seed: int, boundaries: list[tuple[str, int]]) -> list[Plan]:
    """Some programs that contend for one lock or two; the same seed gives the same."""
    rng = random.Random(seed)
    projects = ["a", "b"][: rng.choice([1, 1, 1, 2])]
    return [
        _random_plan(rng, f"c{number}", projects, boundaries) for number in range(rng.randint(2, 5))
    ]


def plans_without_locks(seed: int) -> tuple[list[Plan], list[float]]:
    """Programs whose lock files are deleted: under one that has to notice, and at random."""
    rng = random.Random(seed)
    loser = one_run(
        "loser",
        "a",
        children=tuple(rng.choices(KINDS, k=rng.choice([0, 1, 2]))),
        style=rng.choice(["with", "with", "async", "hand"]),
        mode=rng.choice(["raise", "flag"]),
        loses_lock=True,
    )
    loser.attacks.append(Attack("working", rng.uniform(0.0, 0.2), LOST))
    others = [
        _random_plan(rng, f"c{number}", ["a", "b"], []) for number in range(rng.randint(1, 4))
    ]
    deletions = sorted(rng.uniform(0.0, 1.0) for _ in range(rng.randint(0, 6)))
    return [loser, *others], deletions


def queue_plans(seed: int) -> list[Plan]:
    """One that has the lock, and many that wait for it, of which some are hit."""
    rng = random.Random(seed)
    holder = one_run("holder", "a", body=0.4)
    waiters = []
    for number in range(rng.randint(4, 8)):
        waiter = one_run(
            f"w{number}",
            "a",
            style=rng.choice(["with", "async", "hand"]),
            body=rng.choice([0.0, 0.02]),
            mode=rng.choice(["raise", "flag"]),
            start_at=0.05 + 0.02 * number,
            by_exec=rng.random() < 0.1,
        )
        if rng.random() < 0.5:
            what = rng.choice(["KILL", "KILL", "STOP", "STOP", "TERM", "INT", "HUP"])
            after = rng.choice(["arrives", "waits", "waits"])
            lasts = rng.choice([rng.uniform(0.05, 0.5), rng.uniform(0.5, 2.5), 4.0])
            waiter.attacks.append(Attack(after, rng.uniform(0.0, 0.4), what, lasts))
        waiters.append(waiter)
    if seed % 5 == 0:
        # The first in line does not run when the lock comes free, nor long after.
        waiters[0].attacks = [Attack("waits", 0.0, "STOP", 4.5)]
    return [holder, *waiters]


def _random_plan(
    rng: random.Random, name: str, projects: list[str], boundaries: list[tuple[str, int]]
) -> Plan:
    plan = Plan(
        name,
        [_random_block(rng, projects) for _ in range(rng.choice([1, 1, 1, 2, 3]))],
        mode=rng.choice(["raise", "raise", "flag"]),
        start_at=rng.uniform(0.0, 0.3),
        tidies=rng.random() < 0.3,
        by_exec=rng.random() < 0.12,
    )
    if rng.random() < 0.12:
        plan.beside = _random_block(rng, [f"beside-{name}", *projects])
        plan.beside.after = rng.choice([0.0, rng.uniform(0.0, 0.05)])
        if plan.beside.style == "async":
            plan.beside.style = "with"
        for block in plan.all_blocks:  # whose children are whose cannot always be told
            block.leftovers = "report"
            block.ending = "normal" if block.ending == "sys.exit" else block.ending
    plan.raises_on_child = rng.random() < 0.15 and all(b.style != "async" for b in plan.all_blocks)
    if rng.random() < 0.4:
        plan.goes_on = rng.uniform(0.02, 0.3)
        plan.lingers = rng.random() < 0.3
        plan.later = tuple(rng.choices(["exec", "echo", "setsid"], k=rng.choice([0, 0, 1])))
    fate = rng.random()
    if fate < 0.45:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            plan.attacks.append(_random_attack(rng))
    elif fate < 0.75 and boundaries:
        boundary, occurrence = rng.choice(boundaries)
        what = rng.choice(["KILL", "KILL", "TERM", "INT", "HUP", "STOP", "_exit"])
        plan.boundary = {"boundary": boundary, "occurrence": occurrence, "what": what}
        if rng.random() < 0.2:
            plan.attacks.append(_random_attack(rng))
    elif fate < 0.87:
        plan.blocks[-1].ending = rng.choice(["exception", "sys.exit", "_exit"])
    return plan  # the rest are healthy


def _random_block(rng: random.Random, projects: list[str]) -> Block:
    return Block(
        rng.choice(projects),
        timeout=rng.choice([None, None, None, 0.0, 1.0]),
        children=tuple(rng.choices(_KINDS, k=rng.choice([0, 1, 1, 2, 3]))),
        body=rng.choice([0.0, rng.uniform(0.0, 0.15)]),
        ending=rng.choice(["normal"] * 9 + ["exception"]),
        style=rng.choice(["with", "with", "with", "hand", "async"]),
        leftovers=rng.choice(["report"] * 4 + ["stop"]),
    )


def _random_attack(rng: random.Random) -> Attack:
    after = rng.choice(
        ["start", "start", "waits", "holds", "in", "working", "leaving", "goes on", "lingers"]
    )
    return Attack(
        after,
        delay=rng.choice([0.0, rng.uniform(0.0, 0.03), rng.uniform(0.0, 0.3)]),
        what=rng.choice(["KILL", "KILL", "TERM", "TERM", "INT", "HUP", "STOP", "worker", "worker"]),
        lasts=rng.uniform(0.01, 0.4),
    )
