"""Runs are broken at random instants and at every step, and what must hold, holds.

`make chaos KILLS=10000` plays for long, `make chaos SEED=n KILLS=1` plays the one round again
that a failure has named. The same seed makes the same round; the instants are real, so one that
depends on them may have to be played more than once.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.arena import Arena, Attack, Contender, Round, random_round, round_without_locks
from chaos.conftest import Extent

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

# A boundary within a loop is come by again and again, at the same point of the run.
_OCCURRENCES = 3
HITS = ("KILL", "TERM", "INT")


def boundaries_of(arena: Arena, contenders: list[Contender]) -> list[tuple[str, int]]:
    """The boundaries that the last contender comes by, when nothing hits it there."""
    contenders[-1].trace = True
    arena.play([arena.new_round(0, contenders)])
    arena.assert_no_violation()
    found = [b for b in contenders[-1].boundaries if b[1] <= _OCCURRENCES]
    names = {name for name, _ in found}
    for must in ("before SignalStop.arm", "after FileLock.acquire", "before undo lock"):
        assert must in names, f"{must} was not come by: {sorted(names)}"
    return found


def lone_run() -> list[Contender]:
    return [Contender("run", "a", children=("busy", "exec"))]


def run_after_a_killed_one() -> list[Contender]:
    """The second one finds processes that hold the lock, and others that do not."""
    killed = Contender("killed", "a", children=("stubborn", "setsid", "exec-tree"), body=60.0)
    killed.attacks.append(Attack("working", 0.0, "KILL"))
    return [killed, Contender("run", "a", children=("idle",), follows="killed")]


@pytest.mark.parametrize("what", HITS)
def test_a_run_can_be_hit_at_every_boundary_of_its_steps(arena, what):
    def rounds() -> Iterator[Round]:
        for boundary, occurrence in boundaries_of(arena, lone_run()):
            contenders = lone_run()
            contenders[-1].boundary = {"boundary": boundary, "occurrence": occurrence, "what": what}
            yield arena.new_round(0, contenders)

    played_rounds = arena.play(list(rounds()))
    print(arena.figure)
    for played in played_rounds:
        assert what in played.contenders[0].hits
    arena.assert_no_violation()


def test_a_run_can_be_hit_at_every_boundary_while_it_clears_up_after_a_dead_one(arena, extent):
    alone = boundaries_of(arena, lone_run())
    boundaries = boundaries_of(arena, run_after_a_killed_one())
    rounds = []
    for number, (boundary, occurrence) in enumerate(boundaries):
        if extent.is_long:
            hits = HITS
        elif (boundary, occurrence) in alone:
            hits = ()
        else:  # all of them at each take long: the seed says which one it is
            hits = (HITS[(number + extent.seed) % len(HITS)],)
        for what in hits:
            contenders = run_after_a_killed_one()
            contenders[-1].boundary = {"boundary": boundary, "occurrence": occurrence, "what": what}
            rounds.append(arena.new_round(extent.seed, contenders))
    arena.play(rounds)
    arena.assert_no_violation()


@pytest.mark.parametrize("ending", ["normal", "_exit"])
def test_children_that_start_while_others_are_being_stopped_are_found(arena, ending):
    """Of a parent that has just ended, they are in no tree that was looked at."""
    restless = ("exec-spawner",) * 3
    arena.play(
        arena.new_round(0, [Contender("run", "a", children=restless, body=0.2, ending=ending)])
        for _ in range(12)
    )
    arena.assert_no_violation()


def test_runs_can_be_hit_at_any_instant(arena, extent, request):
    boundaries = sorted(
        {*boundaries_of(arena, lone_run()), *boundaries_of(arena, run_after_a_killed_one())}
    )

    def rounds() -> Iterator[Round]:
        end = time.monotonic() + extent.seconds
        reported = 0
        for seed in itertools.count(extent.seed):
            if arena.figure.kills >= extent.kills or time.monotonic() > end:
                return
            if arena.figure.kills // 500 > reported:
                reported = arena.figure.kills // 500
                print(arena.figure, flush=True)
            yield random_round(arena, seed, boundaries)

    arena.play(rounds(), at_once=1 if extent.kills == 1 else 6)
    tell(arena, extent)
    arena.assert_no_violation()
    assert arena.figure.kills >= min(extent.kills, 20)


def test_a_deleted_lock_file_is_noticed_and_breaks_nothing_else(arena, extent):
    """A lock without its file excludes nobody, so that two hold it then is no violation here."""
    rounds = 300 if extent.is_long else 20
    arena.play(round_without_locks(arena, extent.seed + number) for number in range(rounds))
    print(arena.figure)
    arena.assert_no_violation()
    assert arena.figure.hits["deleted lock"] >= rounds


def tell(arena: Arena, extent: Extent) -> None:
    """Print what it came to; ORCHARD_CHAOS_JSON names a file that gets it, too."""
    figure = arena.figure
    print(f"chaos from SEED={extent.seed}: {figure}", flush=True)
    path = os.environ.get("ORCHARD_CHAOS_JSON")
    if path:
        Path(path).write_text(json.dumps({"seed": extent.seed, **figure.as_json()}, indent=2))
