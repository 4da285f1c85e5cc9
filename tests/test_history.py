"""What has become of a run is written down once, however it ended, and at no risk for it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from orchard_infra import (
    Environment,
    EnvironmentLockedError,
    InfrastructureManager,
    LockLostError,
    ReleaseError,
    SignalStop,
    managed_environment,
)
from orchard_infra.cli.history import ended_runs
from orchard_infra.report import Report
from orchard_infra.runs import history
from orchard_infra.runs.record import RunRecord, RunState, clip, describe_this_run
from orchard_infra.runs.registry import RunRegistry
from orchard_infra.system.flock import lock_descriptor
from support import run_python, wait_until

PLAIN = InfrastructureManager(sanitizer=None, flusher=None, cleaner=None, stopper=None)

HOLDER = """
    import sys
    from orchard_infra import managed_environment
    with managed_environment("digits", timeout=None):
        print("ready", flush=True)
        sys.stdin.readline()
"""


def lines(runtime_directory: Path) -> list[dict[str, Any]]:
    """What is on file, oldest first; it must be readable to the last byte."""
    found = []
    for name in (history.OLDER_NAME, history.NAME):
        path = runtime_directory / "runs" / name
        if path.exists():
            found += [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    return found


def fail() -> None:
    raise ValueError("no such file")


def lose_lock(env: Environment) -> None:
    env.lock_path.unlink()
    with pytest.raises(LockLostError):
        env.verify()


ENDINGS: dict[str, tuple[Callable[..., object], dict[str, object]]] = {
    "a normal end": (lambda env: None, {"how": "normal"}),
    "sys.exit()": (lambda env: sys.exit(), {"how": "normal"}),
    "sys.exit(0)": (lambda env: sys.exit(0), {"how": "normal"}),
    "sys.exit(3)": (lambda env: sys.exit(3), {"how": "exit", "exit_status": 3}),
    "sys.exit(text)": (lambda env: sys.exit("gone"), {"how": "exit", "exit_status": 1}),
    "an exception": (lambda env: fail(), {"how": "exception", "error": "ValueError"}),
    "Ctrl-C": (
        lambda env: signal.raise_signal(signal.SIGINT),
        {"how": "signal", "signal": "SIGINT"},
    ),
    "SIGTERM": (
        lambda env: signal.raise_signal(signal.SIGTERM),
        {"how": "signal", "signal": "SIGTERM"},
    ),
    "a request to stop": (lambda env: env.request_stop("enough"), {"how": "stopped"}),
    "a lost lock": (lambda env: lose_lock(env), {"how": "lost lock"}),
}


@pytest.mark.parametrize(("act", "expected"), ENDINGS.values(), ids=ENDINGS)
def test_how_a_run_ended_is_written_down(runtime_directory, act, expected):
    manager = attrs.evolve(PLAIN, stopper=SignalStop())
    before = time.time()
    try:
        with managed_environment("digits", manager=manager) as env:
            run = env.run
            act(env)
    except (SystemExit, ValueError, KeyboardInterrupt):
        pass
    (line,) = lines(runtime_directory)
    assert {name: line.get(name) for name in ("how", "error", "signal", "exit_status")} == {
        **dict.fromkeys(("how", "error", "signal", "exit_status")),
        **expected,
    }
    assert (line["run_id"], line["project"], line["pid"]) == (run.run_id, "digits", os.getpid())
    assert before <= line["started_at"] <= line["running_at"] <= line["ended_at"] <= time.time()


def test_a_stop_that_the_loop_has_seen_itself_is_a_stop_by_its_signal(runtime_directory):
    manager = attrs.evolve(PLAIN, stopper=SignalStop(mode="flag"))
    with managed_environment("digits", manager=manager) as env:
        signal.raise_signal(signal.SIGTERM)
        wait_until(lambda: env.stop_requested)
    (line,) = lines(runtime_directory)
    assert (line["how"], line["signal"]) == ("signal", "SIGTERM")


def test_what_was_removed_is_written_down_and_nobody_else_can_read_it(runtime_directory):
    with managed_environment("digits", manager=InfrastructureManager(stopper=None)) as env:
        (env.tmp_dir / "scratch.bin").write_bytes(b"x" * 100_000)
    (line,) = lines(runtime_directory)
    assert line["temporary_bytes"] >= 100_000
    assert (runtime_directory / "runs" / history.NAME).stat().st_mode & 0o777 == 0o600
    assert "environment" not in line


def test_a_release_that_failed_is_told(runtime_directory):
    @attrs.frozen
    class Broken:
        def around(self, env):
            env.before_release(fail)
            return open(os.devnull)

    manager = attrs.evolve(PLAIN, extras=(Broken(),))
    with pytest.raises(ReleaseError), managed_environment("digits", manager=manager):
        pass
    (line,) = lines(runtime_directory)
    assert line["release_failed"] is True


def test_a_run_that_was_refused_or_that_joined_is_no_line(tmp_path, runtime_directory):
    holder = run_python(tmp_path, HOLDER)
    holder.wait_for("ready")
    with pytest.raises(EnvironmentLockedError), managed_environment("digits"):
        pass
    holder.tell()
    assert holder.finish() == 0
    with managed_environment("digits", manager=PLAIN):
        joined = run_python(tmp_path, HOLDER)  # started by this run
        joined.wait_for("ready")
        joined.tell()
        assert joined.finish() == 0, joined.transcript()
    assert [line["pid"] for line in lines(runtime_directory)] == [holder.pid, os.getpid()]


def test_how_long_a_run_waited_and_ran_is_told_apart(tmp_path, runtime_directory):
    holder = run_python(tmp_path, HOLDER)
    holder.wait_for("ready")
    waiter = run_python(tmp_path, HOLDER)
    wait_until(lambda: [r for r in RunRegistry().runs() if r.state is RunState.WAITING])
    holder.tell()
    waiter.wait_for("ready")
    waiter.tell()
    assert waiter.finish() == 0
    first, second = lines(runtime_directory)
    assert second["pid"] == waiter.pid
    assert first["ended_at"] - 0.5 <= second["running_at"]  # the lock goes before the record
    assert second["started_at"] < first["ended_at"]


def test_a_killed_run_gets_one_line_also_when_several_clean_up_at_once(tmp_path, runtime_directory):
    run = run_python(tmp_path, HOLDER)
    run.wait_for("ready")
    run.kill()
    run.wait()
    registry = RunRegistry()
    (dead,) = registry.runs()
    reader, writer = os.pipe()
    cleaners = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)  # all begin when the other end is closed
            os._exit(int(registry.remove(dead)))
        cleaners.append(pid)
    os.close(writer)
    removed = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in cleaners]
    os.close(reader)
    assert sorted(removed) == [0, 0, 0, 1]
    (line,) = lines(runtime_directory)
    assert (line["how"], line["pid"]) == ("killed", run.pid)
    assert line["started_at"] <= line["running_at"] <= line["alive_at"] <= line["ended_at"]


def test_the_next_run_writes_down_that_the_last_one_was_killed(tmp_path, runtime_directory):
    run = run_python(tmp_path, HOLDER)
    run.wait_for("ready")
    run.kill()
    run.wait()
    with managed_environment("digits", manager=InfrastructureManager(stopper=None)):
        pass
    assert [line["how"] for line in lines(runtime_directory)] == ["killed", "normal"]


def test_who_was_killed_between_its_line_and_its_end_is_listed_once_in_its_own_words(
    tmp_path, runtime_directory
):
    run = run_python(tmp_path, HOLDER)
    run.wait_for("ready")
    registry = RunRegistry()
    (found,) = registry.runs()
    history.note_end(str(registry.directory), found.record, Report(), running_at=None)
    run.kill()
    run.wait()
    assert [one.how for one in ended_runs(registry)] == ["normal"]
    assert registry.remove(*registry.runs())
    assert [one.how for one in ended_runs(registry)] == ["normal"]


def test_a_child_that_ends_with_the_block_of_its_parent_writes_nothing(runtime_directory):
    with managed_environment("digits", manager=PLAIN):
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
    if pid == 0:
        os._exit(0)
    assert len(lines(runtime_directory)) == 1


# The file.


def record(**changes: Any) -> RunRecord:
    return attrs.evolve(describe_this_run("digits"), **changes)


def note(directory: Path, one: RunRecord | None = None) -> None:
    one = record() if one is None else one
    history.note_end(str(directory), one, Report(), running_at=one.started_at)


def test_writers_at_the_same_time_lose_nothing_that_there_is_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "LIMIT", 40_000)
    writers, each = 6, 120
    pids = []
    for number in range(writers):
        pid = os.fork()
        if pid == 0:
            for turn in range(each):
                note(tmp_path, record(run_id=f"{number}x{turn}"))
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    older, newer = (tmp_path / name for name in (history.OLDER_NAME, history.NAME))
    size = len(newer.read_bytes().split(b"\n\n")[0])
    for path in (older, newer):
        assert path.stat().st_size <= history.LIMIT + writers * history.LINE_LIMIT
    # An almost empty file has not been moved over the full one.
    assert older.stat().st_size >= history.LIMIT - writers * size
    ids = [json.loads(line)["run_id"] for line in history.read(str(tmp_path))]
    assert len(ids) == len(set(ids))
    for number in range(writers):  # of each writer the last ones, in order, without a gap
        turns = [int(one.partition("x")[2]) for one in ids if one.startswith(f"{number}x")]
        assert turns == list(range(each))[each - len(turns) :]


def test_who_finds_the_file_full_too_late_moves_nothing(tmp_path):
    # By hand: between two writers this is a matter of microseconds.
    path, older = tmp_path / history.NAME, tmp_path / history.OLDER_NAME
    path.write_text("full")
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    first = os.open(path, os.O_WRONLY | os.O_APPEND)
    lock_descriptor(first)
    assert not history._make_room(str(tmp_path), str(path), fd)  # the first one is about to
    assert path.read_text() == "full"
    path.rename(older)
    path.write_text("new")
    os.close(first)
    assert history._make_room(str(tmp_path), str(path), fd)  # it is where it belongs already
    os.close(fd)
    assert (older.read_text(), path.read_text()) == ("full", "new")


def test_a_full_file_that_cannot_be_moved_keeps_its_newer_half(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "LIMIT", 20_000)
    (tmp_path / history.OLDER_NAME).mkdir()  # a file cannot take its place
    for turn in range(100):
        note(tmp_path, record(run_id=f"turn{turn}"))
    assert (tmp_path / history.NAME).stat().st_size <= history.LIMIT
    turns = [json.loads(line)["run_id"] for line in list(history.read(str(tmp_path)))[1:]]
    assert len(turns) > 10
    assert turns == [f"turn{turn}" for turn in range(100)][-len(turns) :]


def test_a_line_is_short_whatever_the_run_is_called(tmp_path):
    long = record(
        argv=clip("\U0001f4a5" * 300 for _ in range(13)),
        cwd="/" + "ü" * 600,
        project="p" * 8000,
        job="j" * 8000,
        lock="/" + "l" * 4000,
    )
    note(tmp_path, long)
    note(tmp_path, record(argv=("python", "x" * 3900), cwd="/" + "y" * 500))
    first, second = history.read(str(tmp_path))
    assert max(len(first), len(second)) < history.LINE_LIMIT
    assert json.loads(first)["run_id"] == long.run_id
    assert json.loads(second)["argv"][0] == "python"
    assert json.loads(second)["cwd"] == "/" + "y" * 500  # cut only where that is not enough


def test_a_torn_line_costs_only_itself(runtime_directory):
    directory = runtime_directory / "runs"
    with managed_environment("digits", manager=PLAIN):
        pass
    path = directory / history.NAME
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2] + b"\0" * 50)
    with managed_environment("letters", manager=PLAIN):
        pass
    assert [one.record.project for one in ended_runs(RunRegistry())] == ["digits", "letters"]


@pytest.mark.parametrize(
    "junk",
    [
        b"[" * 100_000,
        b'{"orchard_infra": 1, ' + b'"a": [' * 50_000,
        b'null\n1\n"a"\n{}\n\xff\xfe\n' + b"\0" * 5000,
        b'{"orchard_infra": 1, "how": NaN, "ended_at": 1e999}',
        b"9" * 10_000,
    ],
    ids=["deep", "deep record", "others", "no numbers", "long number"],
)
def test_what_cannot_be_read_is_passed_over(runtime_directory, junk):
    with managed_environment("digits", manager=PLAIN):
        pass
    path = runtime_directory / "runs" / history.NAME
    good = json.loads(path.read_bytes())
    wrong = [
        {**good, "how": "eaten"},
        {**good, "run_id": "../../x"},
        {**good, "ended_at": "now"},
        {**good, "ended_at": float("nan")},
        {**good, "pid": -1},
    ]
    also = {**good, "run_id": "abc", "running_at": 1e300, "device_bytes": "all", "error": ["x"]}
    path.write_bytes(
        junk + b"\n" + b"\n".join(json.dumps(one).encode() for one in (*wrong, good, also))
    )
    assert [one.record.run_id for one in ended_runs(RunRegistry())] == [good["run_id"], "abc"]


PRECIOUS = b"precious\n"


def plant_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def plant_hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def plant_fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def plant_directory(path: Path, victim: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("plant", [plant_link, plant_hard_link, plant_fifo, plant_directory])
def test_something_else_of_that_name_harms_no_run_and_is_left_alone(
    tmp_path, runtime_directory, plant
):
    victim = tmp_path / "seed.txt"
    victim.write_bytes(PRECIOUS)
    (runtime_directory / "runs").mkdir(mode=0o700)
    path = runtime_directory / "runs" / history.NAME
    plant(path, victim)
    before = path.lstat().st_mode
    with managed_environment("digits", manager=PLAIN) as env:
        pass
    assert not env.report.failures
    assert victim.read_bytes() == PRECIOUS
    assert path.lstat().st_mode == before
    assert ended_runs(RunRegistry()) == []


def test_a_file_that_cannot_grow_harms_no_run(tmp_path, runtime_directory):
    (runtime_directory / "runs").mkdir(mode=0o700)
    path = runtime_directory / "runs" / history.NAME
    path.write_bytes(b"\n" * 65536)
    path.chmod(0o600)
    run = run_python(
        tmp_path,
        """
        import resource
        from orchard_infra import managed_environment
        # write(2) fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (32768, 32768))
        with managed_environment("digits") as env:
            pass
        print("failures:", env.report.failures, "left:", env.lock_path.exists())
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert "failures: () left: False" in run.output
    assert path.read_bytes() == b"\n" * 65536
