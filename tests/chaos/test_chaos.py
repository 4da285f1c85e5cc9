"""Programs are broken at random instants and at every step, and what must hold, holds.

`make chaos KILLS=10000` plays for long, `make chaos SEED=n KILLS=1` plays the one round again
that a failure has named. The same seed makes the same round; the instants are real, so one that
depends on them may have to be played more than once.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.arena import Arena, Round
from chaos.conftest import Extent
from chaos.plans import Attack, Block, Plan, one_run, plans_without_locks, queue_plans, random_plans

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

# A boundary within a loop is come by again and again, at the same point of the run.
_OCCURRENCES = 3
HITS = ("KILL", "TERM", "INT", "STOP")


def boundaries_of(arena: Arena, plans: list[Plan]) -> list[tuple[str, int]]:
    """The boundaries that the last program comes by, when nothing hits it there."""
    plans[-1].trace = True
    [played] = arena.play([arena.new_round(0, plans)])
    arena.assert_no_violation()
    last = next(c for c in played.contenders if c.plan is plans[-1])
    found = [boundary for boundary in last.boundaries if boundary[1] <= _OCCURRENCES]
    names = {name for name, _ in found}
    for must in ("before SignalWatch.__enter__", "after FileLock.try_acquire", "before undo lock"):
        assert must in names, f"{must} was not come by: {sorted(names)}"
    return found


def lone_run() -> list[Plan]:
    return [one_run("run", "a", children=("busy", "exec"))]


def run_that_stops_its_children() -> list[Plan]:
    return [one_run("run", "a", children=("busy", "exec", "setsid"), leftovers="stop")]


def second_run_of_a_program() -> list[Plan]:
    """With a worker of the first one, which it uses and then leaves."""
    blocks = [Block("a", children=("echo", "exec")), Block("a", children=("idle",), style="hand")]
    return [Plan("run", blocks, goes_on=0.02)]


def run_after_a_killed_one() -> list[Plan]:
    """The second one finds processes that hold the lock, and others that do not."""
    killed = one_run("killed", "a", children=("stubborn", "setsid", "exec-tree"), body=60.0)
    killed.attacks.append(Attack("working", 0.0, "KILL"))
    return [killed, one_run("run", "a", children=("idle",), follows="killed")]


def run_that_waits() -> list[Plan]:
    return [one_run("first", "a", body=0.15), one_run("run", "a", start_at=0.08)]


CASES: tuple[Callable[[], list[Plan]], ...] = (
    lone_run,
    run_that_stops_its_children,
    second_run_of_a_program,
    run_after_a_killed_one,
    run_that_waits,
)


def test_a_program_can_be_hit_at_every_boundary_of_its_steps(arena, extent):
    """In each kind of run at those that come first in it, and in a long one at those that depend on
    others again, with every hit: else the seed says which one it is.
    """
    rounds, seen = [], set()
    for plans in CASES:
        for number, boundary in enumerate(boundaries_of(arena, plans())):
            is_new = boundary not in seen
            seen.add(boundary)
            if extent.is_long:
                hits = HITS if is_new or plans in (run_after_a_killed_one, run_that_waits) else ()
            else:
                is_first = is_new and boundary[1] == 1
                hits = (HITS[(number + extent.seed) % len(HITS)],) if is_first else ()
            for what in hits:
                hit = plans()
                name, occurrence = boundary
                hit[-1].boundary = {"boundary": name, "occurrence": occurrence, "what": what}
                rounds.append(arena.new_round(extent.seed, hit))
    played = arena.play(rounds)
    print(arena.figure)
    arena.assert_no_violation()
    hit = [any(c.plan.boundary and c.hits for c in round_.contenders) for round_ in played]
    # Few depend on when other threads and programs do what they do.
    assert sum(hit) > 0.9 * len(hit)


@pytest.mark.parametrize(("leftovers", "ending"), [("stop", "normal"), ("report", "_exit")])
def test_children_that_start_while_others_are_being_stopped_are_found(arena, leftovers, ending):
    """Of a parent that has just ended, they are in no tree that was looked at."""
    restless = ("exec-spawner",) * 3
    arena.play(
        arena.new_round(
            0,
            [one_run("run", "a", children=restless, body=0.2, ending=ending, leftovers=leftovers)],
        )
        for _ in range(12)
    )
    arena.assert_no_violation()


def test_waiters_are_served_in_order_although_others_are_killed_and_stopped(arena, extent):

    def rounds() -> Iterator[Round]:
        for seed in range(extent.seed, extent.seed + (300 if extent.is_long else 10)):
            yield arena.new_round(seed, queue_plans(seed), is_ordered=True)

    arena.play(rounds(), at_once=3)
    print(arena.figure)
    arena.assert_no_violation()


def test_programs_can_be_hit_at_any_instant(arena, extent):
    boundaries = sorted({b for plans in CASES for b in boundaries_of(arena, plans())})

    def rounds() -> Iterator[Round]:
        end = time.monotonic() + extent.seconds
        reported = 0
        for seed in itertools.count(extent.seed):
            if arena.figure.kills >= extent.kills or time.monotonic() > end:
                return
            if arena.figure.kills // 500 > reported:
                reported = arena.figure.kills // 500
                print(arena.figure, flush=True)
            yield arena.new_round(seed, random_plans(seed, boundaries))

    arena.play(rounds(), at_once=1 if extent.kills == 1 else 6)
    tell(arena, extent)
    arena.assert_no_violation()
    assert arena.figure.kills >= min(extent.kills, 20)


def test_a_deleted_lock_file_is_noticed_and_breaks_nothing_else(arena, extent):
    """A lock without its file excludes nobody, so that two hold it then is no violation here."""

    def rounds() -> Iterator[Round]:
        for number in range(count):
            plans, deletions = plans_without_locks(extent.seed + number)
            yield arena.new_round(
                extent.seed + number, plans, deletions=deletions, exclusion_may_end=True
            )

    count = 300 if extent.is_long else 20
    arena.play(rounds())
    print(arena.figure)
    arena.assert_no_violation()
    assert arena.figure.hits["deleted lock"] >= count


def tell(arena: Arena, extent: Extent) -> None:
    """Print what it came to; ORCHARD_CHAOS_JSON names a file that gets it, too."""
    figure = arena.figure
    print(f"chaos from SEED={extent.seed}: {figure}", flush=True)
    path = os.environ.get("ORCHARD_CHAOS_JSON")
    if path:
        Path(path).write_text(json.dumps({"seed": extent.seed, **figure.as_json()}, indent=2))
