"""`orchard_infra.inspect`: runs and their processes, seen from another program."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from commands import killed, train
from orchard_infra import inspect
from orchard_infra.inspect import RunState, look, memory_of
from support import is_running, run_python, wait_gone


def test_a_live_run_is_seen_with_all_its_processes(tmp_path: Path) -> None:
    run = train(tmp_path, "digits", FORK="1", EXEC="1")
    now = look()
    [seen] = now.runs
    assert now.state_of(seen) is RunState.RUNNING
    members = now.members_of(seen)
    assert run.pid in [member.pid for member in members]
    assert len(members) == 3
    assert memory_of(members) > memory_of(members[:1]) > 0
    for member in members:
        owner = now.run_of(member.pid)
        assert owner is not None
        assert owner.record.run_id == seen.record.run_id
    assert now.run_of(os.getpid()) is None
    assert now.survivors_of(seen) == ()


def test_the_survivors_of_a_dead_run_are_its_members(tmp_path: Path) -> None:
    killed(tmp_path, "digits", FORK="2")
    now = look()
    [seen] = now.runs
    survivors = now.survivors_of(seen)
    assert now.state_of(seen) is RunState.SURVIVORS
    assert {one.kind for one in survivors} == {"worker"}
    assert [one.identity for one in survivors] == list(now.members_of(seen))
    assert all("train.py" in inspect.command_of(one.pid) for one in survivors)


def test_a_look_is_one_moment_and_changes_nothing(tmp_path: Path) -> None:
    run = train(tmp_path, "digits", FORK="1")
    before = look()
    members = before.members_of(before.runs[0])
    assert all(is_running(member.pid) for member in members)
    run.kill()
    run.wait()
    wait_gone([run.pid])
    assert before.members_of(before.runs[0]) == members
    assert look().state_of(look().runs[0]) is RunState.SURVIVORS


def test_it_is_documented_and_loads_nothing_heavy(tmp_path: Path) -> None:
    assert all(getattr(inspect, name).__doc__ for name in inspect.__all__)
    script = run_python(
        tmp_path,
        """
        import sys
        import orchard_infra.inspect
        heavy = ("torch", "rich", "click", "asyncio", "orchard_infra.session")
        print([name for name in heavy if name in sys.modules])
        """,
    )
    assert script.finish() == 0
    assert script.output == "[]\n"
    assert "orchard_infra.inspect" in sys.modules
