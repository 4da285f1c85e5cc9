"""Each benchmark runs, and writes what benchmarks/README.md says that it writes."""

import json
from pathlib import Path

import pytest

from support import run_python, wait_gone

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py"))

ONE_GOAL = """
    import sys
    from pathlib import Path

    sys.path.insert(0, {benchmarks!r})
    from _harness import Goal, Outcome, Row, main

    def measure(quick, directory):
        rows = [Row("it", [1.0, 3.0, 2.0], "s")]
        return Outcome(rows=rows, goals=[Goal("it is fast", {value!r}, 2)])

    sys.exit(main("one_goal.py", "One goal.", measure))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_quick_run_writes_the_documented_json(tmp_path: Path, name: str) -> None:
    target = tmp_path / "figures.json"
    script = run_python(
        tmp_path, BENCHMARKS / f"{name}.py", "--quick", "--json", str(target), cwd=tmp_path
    )

    assert script.finish(timeout=240.0) == 0, script.transcript()
    figures = json.loads(target.read_text("utf-8"))
    assert set(figures) == {"benchmark", "quick", "machine", "rows", "goals", "notes"}
    assert (figures["benchmark"], figures["quick"]) == (name, True)
    assert set(figures["machine"]) == {"python", "system", "cpus", "versions"}
    for row in figures["rows"]:
        assert set(row) == {"name", "unit", "median", "p10", "p90", "samples"}
        assert row["p10"] <= row["median"] <= row["p90"]
        assert row["samples"] >= 1
        assert row["name"] in script.output
    for goal in figures["goals"]:
        assert set(goal) == {"what", "value", "limit", "unit", "met"}
        expected = None if goal["value"] is None else goal["value"] <= goal["limit"]
        assert goal["met"] is expected
        assert goal["what"] in script.output
    assert figures["rows"] or figures["notes"], "nothing was measured, and no reason is given"


def test_a_missed_goal_fails_a_strict_run_only(tmp_path: Path) -> None:
    source = ONE_GOAL.format(benchmarks=str(BENCHMARKS), value=2.5)
    lax = run_python(tmp_path, source)
    strict = run_python(tmp_path, source, "--strict")

    assert lax.finish() == 0, lax.transcript()
    assert strict.finish() == 1, strict.transcript()
    assert "at most 2 x: NO" in lax.output
    assert "at most 2 x: NO" in strict.output


@pytest.mark.parametrize(("value", "said"), [(1.5, "at most 2 x: yes"), (None, "not measured")])
def test_a_goal_that_is_met_or_cannot_be_measured_fails_nothing(
    tmp_path: Path, value: float | None, said: str
) -> None:
    script = run_python(
        tmp_path, ONE_GOAL.format(benchmarks=str(BENCHMARKS), value=value), "--strict"
    )

    assert script.finish() == 0, script.transcript()
    assert said in script.output


def test_every_benchmark_is_described_in_the_readme() -> None:
    text = (BENCHMARKS / "README.md").read_text("utf-8")

    assert SCRIPTS
    assert [name for name in SCRIPTS if f"`{name}.py`" not in text] == []


def test_a_crowd_ends_with_the_benchmark_that_made_it(tmp_path: Path) -> None:
    script = run_python(
        tmp_path,
        f"""
        import os, signal, sys

        import psutil

        sys.path.insert(0, {str(BENCHMARKS)!r})
        from _crowd import crowd

        with crowd(sleeping=2, pythons=2, stubborn=1):
            print("crowd", *(p.pid for p in psutil.Process().children(recursive=True)), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    pids = [int(pid) for pid in script.wait_for("crowd").split()[1:]]
    script.finish()

    assert len(pids) == 1 + 2 + 2 + 1
    wait_gone(pids)
