"""`orchard-infra clean`, after runs that were killed, beside runs that live."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from commands import (
    COMMAND,
    OWN_SIZE,
    is_first_pid_namespace,
    killed,
    orchard_infra,
    plant,
    queue,
    status_of,
    train,
    wait_for_state,
)
from orchard_infra.runs.environ import environment_digest
from support import (
    UNDER_ANOTHER_HOST_NAME,
    Script,
    is_running,
    needs_namespaces,
    remove_shared_memory_of_the_dead,
    run_command,
    run_python,
    wait_gone,
    wait_until,
)

# /dev/shm is the whole machine's: what one test leaves there for a moment, another one would see.
pytestmark = pytest.mark.xdist_group("shared memory")

# A run of digits, one that has left its block, or a ghost: a process that has the same command line
# and environment, and is in no run. Which one, a file says when it starts.
SCRIPT = """
    import os, sys, time
    role = open(os.path.join(os.path.dirname(__file__), "role")).read()
    if role == "ghost":
        print("ready", flush=True)
        while True:
            time.sleep(600)
    from orchard_infra import managed_environment
    with managed_environment("digits"):
        if role == "run":
            print("ready", flush=True)
            sys.stdin.read()
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def clean_shared_memory() -> None:
    remove_shared_memory_of_the_dead()


def script(
    tmp_path: Path, *arguments: str, role: str = "run", cwd: Path | None = None, **environ: str
) -> Script:
    (tmp_path / "role").write_text(role)
    # A ghost with a pipe as its input would be at work for the test.
    stdin = subprocess.DEVNULL if role == "ghost" else subprocess.PIPE
    started = run_python(
        tmp_path, SCRIPT, *arguments, name="train.py", env=environ, cwd=cwd, stdin=stdin
    )
    started.wait_for("ready")
    return started


def ghost(tmp_path: Path, *arguments: str, cwd: Path | None = None, **environ: str) -> Script:
    return script(tmp_path, *arguments, role="ghost", cwd=cwd, **environ)


def let_them_age(tmp_path: Path) -> None:
    """Until nobody is so young any more that it might register yet: twice as long as a run took."""
    wait_until(
        lambda: "so young" not in clean(tmp_path, "--dry-run").output, what="processes to age"
    )


def clean(tmp_path: Path, *words: str, expect: int = 0, answer: str = "", **environ: str) -> Script:
    return orchard_infra(
        tmp_path,
        "clean",
        *words,
        expect=expect,
        answer=answer,
        env={"COLUMNS": "200", **environ},
    )


def verdict_on(pid: int, output: str) -> tuple[str, str]:
    """What is to become of a process, and the evidence: a line, and the one below it."""
    lines = output.splitlines()
    for above, line in itertools.pairwise(lines):
        if re.search(rf"; pids? (\d+, )*{pid}\b", line):
            return above.split()[0], line.strip()
    raise AssertionError(f"no pid {pid} in\n{output}")


def test_nothing_to_do_is_a_success(tmp_path):
    assert clean(tmp_path).output == "Nothing to clean up.\n"


def test_live_and_waiting_runs_are_nothing_to_clean_up(tmp_path):
    run = train(tmp_path, "digits", FORK="1", EXEC="1")
    waiter = queue(tmp_path, "digits")
    wait_for_state(tmp_path, "digits", "running", "waiting")
    pids = [pid for row in status_of(tmp_path) for pid in row["pids"]]
    assert "Nothing to clean up." in clean(tmp_path, "--yes").output
    assert {run.pid, waiter.pid} < set(pids)
    assert all(is_running(pid) for pid in pids)
    wait_for_state(tmp_path, "digits", "running", "waiting")


def test_survivors_are_stopped_and_what_the_run_left_is_removed(tmp_path):
    killed(tmp_path, "digits", FORK="2", EXEC="1")
    (row,) = status_of(tmp_path)
    assert len(row["survivors"]) == 3
    said = clean(tmp_path, "--yes").output
    for survivor in row["survivors"]:
        verdict, evidence = verdict_on(survivor["pid"], said)
        assert verdict == "stop"
        assert "survivor of digits" in evidence
        assert survivor["evidence"] in evidence
    wait_gone(row["pids"])
    assert not Path(row["tmp_dir"]).exists()
    assert status_of(tmp_path) == []
    assert "stopped 3 processes" in said
    assert "removed 1 record" in said
    assert re.search(r"removed 1 directory \(8\.\d KiB\)", said)
    assert clean(tmp_path, "--yes").output == "Nothing to clean up.\n"


@needs_namespaces
def test_what_a_run_left_is_found_under_another_host_name_than_it_was_started_under(tmp_path):
    run = killed(tmp_path, "digits", FORK="1")
    (row,) = status_of(tmp_path)
    (survivor,) = row["pids"]
    script = run_command(tmp_path, [*UNDER_ANOTHER_HOST_NAME, COMMAND, "clean", "--yes"])
    assert script.finish() == 0, script.transcript()
    assert f"pid {survivor}" in script.output
    wait_gone([survivor])
    assert status_of(tmp_path) == []
    assert not is_running(run.pid)


def test_a_dry_run_shows_it_all_and_changes_nothing(tmp_path):
    killed(tmp_path, "digits", FORK="2")
    before = status_of(tmp_path)
    said = clean(tmp_path, "--dry-run").output
    assert "survivor of digits" in said
    assert before[0]["tmp_dir"] in said
    assert "This would stop 2 processes" in said
    assert "remove 1 record and 1 directory (8.0 KiB)" in said
    (row,) = status_of(tmp_path)
    assert row["pids"] == before[0]["pids"]
    assert Path(row["tmp_dir"]).exists()


def test_it_asks_first(tmp_path, in_terminal):
    killed(tmp_path, "digits", FORK="1")
    (row,) = status_of(tmp_path)
    for answer, status in (("n", 1), ("y", 0)):
        terminal = in_terminal(COMMAND, "clean", env=OWN_SIZE)
        terminal.expect(r"Stop 1 process .* and remove 1 record and 1 directory .*\? \[y/N\]")
        assert is_running(row["pids"][0])
        terminal.sendline(answer)
        terminal.expect_exact("Nothing was done." if answer == "n" else "removed 1 record")
        assert terminal.wait() == status
    wait_gone(row["pids"])


def test_where_nobody_answers_nothing_is_done(tmp_path):
    killed(tmp_path, "digits", FORK="1")
    said = clean(tmp_path, expect=1)
    assert "nobody answered" in said.error_output
    assert len(status_of(tmp_path)[0]["pids"]) == 1


@pytest.fixture
def tracker(tmp_path):
    """The pid of what a killed run had started in a session of its own."""
    run = run_python(
        tmp_path,
        """
        import os, subprocess, sys, time
        from orchard_infra import managed_environment
        with managed_environment("digits"):
            sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
            tracker = subprocess.Popen(sleep, start_new_session=True)
            if os.fork() == 0:
                time.sleep(600)
            print("tracker", tracker.pid, flush=True)
            input()
        """,
    )
    pid = int(run.wait_for("tracker").split()[1])
    run.kill()
    run.wait()
    return pid


def test_a_detached_survivor_is_stopped_only_on_request(tmp_path, tracker):
    said = clean(tmp_path, "--yes").output
    assert verdict_on(tracker, said)[0] == "keep"
    assert "Detached processes of dead runs" in said
    assert "stopped 1 process" in said  # the fork
    assert is_running(tracker)
    (row,) = status_of(tmp_path)  # the record is the evidence against it
    assert [one["kind"] for one in row["survivors"]] == ["detached"]
    assert "with --detached" in clean(tmp_path, "--yes").output
    said = clean(tmp_path, "--yes", "--detached").output
    assert verdict_on(tracker, said)[0] == "stop"
    wait_gone([tracker])
    assert status_of(tmp_path) == []


def test_detached_survivors_have_a_question_of_their_own(tmp_path, tracker, in_terminal):
    def answered(detached: str) -> Any:
        """Yes to whatever else there is: other tests may have left shared memory behind."""
        terminal = in_terminal(COMMAND, "clean", env=OWN_SIZE)
        questions = [r"[Ss]top (also )?1 detached process .*\? \[y/N\]", r"\? \[y/N\]"]
        while terminal.expect(questions) == 1:
            terminal.sendline("y")
        terminal.sendline(detached)
        return terminal

    terminal = answered("n")
    terminal.expect_exact("stopped 1 process")  # the fork
    terminal.wait()
    assert is_running(tracker)
    terminal = answered("y")
    terminal.expect_exact("removed 1 record")
    wait_gone([tracker])


def test_the_workers_of_a_forkserver_are_named_and_stopped(tmp_path, runtime_directory):
    run = run_python(
        tmp_path,
        """
        import multiprocessing, time
        from orchard_infra import managed_environment
        if __name__ == "__main__":
            context = multiprocessing.get_context("forkserver")
            context.Process(target=print).start()  # the server is there before the block
            with managed_environment("digits"):
                workers = [context.Process(target=time.sleep, args=(600,)) for _ in range(2)]
                for worker in workers:
                    worker.start()
                print("workers", *(worker.pid for worker in workers), flush=True)
                time.sleep(600)
        """,
    )
    workers = [int(pid) for pid in run.wait_for("workers").split()[1:]]
    (row,) = status_of(tmp_path)
    assert set(workers) < set(row["pids"])
    wait_until(lambda: are_written_down(runtime_directory, workers))
    run.kill()
    run.wait()
    said = clean(tmp_path, "--yes").output
    for worker in workers:
        assert verdict_on(worker, said)[0] == "stop"
    wait_gone(workers)
    assert status_of(tmp_path) == []


def are_written_down(directory: Path, pids: list[int]) -> bool:
    written = "".join(path.read_text() for path in (directory / "runs").glob("*.members"))
    return all(f"\n{pid} " in f"\n{written}" for pid in pids)


def test_a_survivor_that_ignores_sigterm_is_killed(tmp_path):
    run = run_python(
        tmp_path,
        """
        import os, signal, time
        from orchard_infra import managed_environment
        with managed_environment("digits"):
            reader, writer = os.pipe()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.write(writer, b"x")
                time.sleep(600)
            os.read(reader, 1)
            print("ready", flush=True)
            input()
        """,
    )
    run.wait_for("ready")
    run.kill()
    run.wait()
    (row,) = status_of(tmp_path)
    assert "killed 1 process" in clean(tmp_path, "--yes", "--grace", "0.2").output
    wait_gone(row["pids"])


def test_a_twin_of_a_live_run_is_stopped_and_the_run_goes_on(tmp_path):
    twin = ghost(tmp_path, "--lr", "3")
    run = script(tmp_path, "--lr", "3")
    let_them_age(tmp_path)
    said = clean(tmp_path, "--yes").output
    verdict, evidence = verdict_on(twin.pid, said)
    assert verdict == "stop"
    assert "twin of digits" in evidence
    assert "same program, arguments, directory and environment" in evidence
    assert twin.finish() == -signal.SIGTERM
    assert is_running(run.pid)


def test_a_twin_of_a_dead_run_that_is_older_than_it_is_stopped(tmp_path):
    twin = ghost(tmp_path, "--lr", "3")
    run = script(tmp_path, "--lr", "3")
    run.kill()
    run.wait()
    let_them_age(tmp_path)
    verdict, evidence = verdict_on(twin.pid, clean(tmp_path, "--yes").output)
    assert verdict == "stop"
    assert "same program, arguments, directory and environment" in evidence
    assert twin.finish() == -signal.SIGTERM


@pytest.mark.parametrize("alive", [True, False])
def test_what_only_looks_like_a_twin_is_kept_and_told_why(tmp_path, alive):
    (tmp_path / "elsewhere").mkdir()
    other_arguments = ghost(tmp_path, "--lr", "4")
    other_seed = ghost(tmp_path, "--lr", "3", SEED="2")
    elsewhere = ghost(tmp_path, "--lr", "3", cwd=tmp_path / "elsewhere")
    run = script(tmp_path, "--lr", "3")
    younger = ghost(tmp_path, "--lr", "3")
    if not alive:
        run.kill()
        run.wait()
    said = clean(tmp_path, "--yes").output
    for process, reason in (
        (other_arguments, "relative of digits (pid %d): other arguments"),
        (other_seed, "relative of digits (pid %d): other environment" + " (SEED)" * alive),
        (elsewhere, "relative of digits (pid %d): other working directory"),
        (younger, "look-alike of digits (pid %d): started after this run"),
    ):
        verdict, evidence = verdict_on(process.pid, said)
        assert verdict == "keep"
        assert reason % run.pid in evidence
        assert is_running(process.pid)


def test_a_look_alike_that_may_still_register_is_kept(tmp_path, runtime_directory):
    young = ghost(tmp_path)
    # This run needed twenty seconds to register. So may others that were started like it.
    run_id = "0123456789abcdef"
    plant(
        runtime_directory,
        run_id=run_id,
        project="digits",
        argv=[sys.executable, str(tmp_path / "train.py")],
        cwd=str(tmp_path),
        create_time=time.clock_gettime(time.CLOCK_BOOTTIME),
        started_at=time.time() + 20,
        environment=environment_digest(psutil.Process(young.pid).environ(), run_id),
    )
    verdict, evidence = verdict_on(young.pid, clean(tmp_path, "--yes").output)
    assert verdict == "keep"
    assert "so young that it may register yet" in evidence
    assert is_running(young.pid)


def test_nobody_is_the_twin_of_a_dead_run_with_a_relative_script(tmp_path, runtime_directory):
    # It may have changed its directory since it was started: then train.py was another file.
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "role").write_text("ghost")
    look_alike = run_command(tmp_path, [sys.executable, "train.py"], env={"PWD": str(tmp_path)})
    look_alike.wait_for("ready")
    started = time.clock_gettime(time.CLOCK_BOOTTIME)
    plant(
        runtime_directory,
        project="digits",
        argv=[sys.executable, "train.py"],
        cwd=str(tmp_path),
        create_time=started,
        started_at=time.time(),
    )
    let_them_age(tmp_path)
    verdict, evidence = verdict_on(look_alike.pid, clean(tmp_path, "--yes").output)
    assert verdict == "keep"
    assert "nobody knows in which directory the dead run was started" in evidence
    assert is_running(look_alike.pid)


def test_a_run_from_before_the_last_boot_has_no_twins(tmp_path, runtime_directory):
    # Its create time is on another clock: everybody would be older than it.
    look_alike = ghost(tmp_path)
    path = plant(
        runtime_directory,
        project="digits",
        argv=[sys.executable, str(tmp_path / "train.py")],
        cwd=str(tmp_path),
        boot_id="00000000-0000-4000-8000-000000000000",
        create_time=1e9,
    )
    said = clean(tmp_path, "--yes").output
    assert str(look_alike.pid) not in said
    assert is_running(look_alike.pid)
    assert not path.exists()


def test_the_processes_of_a_restarted_run_are_kept(tmp_path):
    # The same command, killed and started again: the usual thing.
    first = script(tmp_path)
    first.kill()
    first.wait()
    second = script(tmp_path)
    said = clean(tmp_path, "--yes").output
    assert "stop " not in said
    assert is_running(second.pid)


def test_who_goes_on_after_its_run_is_no_twin_of_the_next(tmp_path):
    writing = script(tmp_path, role="after its block")
    script(tmp_path)
    let_them_age(tmp_path)
    verdict, evidence = verdict_on(writing.pid, clean(tmp_path, "--yes").output)
    assert verdict == "keep"
    assert "its run ended well" in evidence
    assert is_running(writing.pid)


def test_a_leader_that_nobody_reaps_is_told_with_its_parent(tmp_path):
    run = train(tmp_path, "digits")
    run.kill()
    os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)
    # Wide: the command line of the test runner is a part of it.
    verdict, evidence = verdict_on(run.pid, clean(tmp_path, "--dry-run", COLUMNS="900").output)
    assert verdict == "keep"
    assert f"leader of digits (pid {run.pid}): dead, to be reaped by pid {os.getpid()}" in evidence


def test_runs_that_look_alike_and_live_are_nothing_to_tell(tmp_path):
    train(tmp_path, "digits", FORK="1")
    queue(tmp_path, "digits")
    wait_for_state(tmp_path, "digits", "running", "waiting")
    assert clean(tmp_path, "--dry-run").output == "Nothing to clean up.\n"


def test_nothing_is_stopped_on_shared_compute_and_the_evidence_stays(tmp_path):
    killed(tmp_path, "digits", FORK="1")
    killed(tmp_path, "letters")
    rows = {row["project"]: row for row in status_of(tmp_path)}
    (survivor,) = rows["digits"]["pids"]
    said = clean(tmp_path, "--yes", SLURM_JOB_ID="7").output
    assert "None is stopped: this is a Slurm job (SLURM_JOB_ID=7)" in said
    assert verdict_on(survivor, said)[0] == "keep"
    assert is_running(survivor)
    # What is dead for good may be removed there as well.
    assert [row["project"] for row in status_of(tmp_path)] == ["digits"]
    assert Path(rows["digits"]["tmp_dir"]).exists()
    assert not Path(rows["letters"]["tmp_dir"]).exists()


def test_only_the_runs_of_a_project(tmp_path):
    killed(tmp_path, "letters", FORK="1")
    killed(tmp_path, "digits", FORK="1")
    clean(tmp_path, "--yes", "--project", "digits")
    (row,) = status_of(tmp_path)
    assert (row["project"], row["state"]) == ("letters", "survivors")


def test_a_live_run_that_a_dead_one_started_is_kept(tmp_path):
    (tmp_path / "inner.py").write_text(
        "import os, time\n"
        "from orchard_infra import managed_environment\n"
        "with managed_environment('letters'):\n"
        "    print('inner', os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    outer = run_python(
        tmp_path,
        """
        import subprocess, sys
        from orchard_infra import managed_environment
        with managed_environment("digits"):
            subprocess.run([sys.executable, "inner.py"])
        """,
    )
    inner = int(outer.wait_for("inner").split()[1])
    outer.kill()
    outer.wait()
    clean(tmp_path, "--yes")
    assert is_running(inner)
    assert [row["project"] for row in status_of(tmp_path)] == ["letters"]


def test_what_cannot_be_removed_is_told_and_fails(tmp_path, runtime_directory):
    results = tmp_path / "orchard-infra-0123456789abcdef"
    results.write_text("results")
    plant(runtime_directory, run_id="0123456789abcdef", tmp_dir=str(results))
    assert "a regular file is there" in clean(tmp_path, "--dry-run").output
    assert "not removed" in clean(tmp_path, "--yes", expect=1).output
    assert results.read_text() == "results"


def test_a_record_cannot_name_what_is_removed(tmp_path, runtime_directory):
    precious = tmp_path / "precious"
    precious.mkdir()
    plant(runtime_directory, tmp_dir=str(precious))
    assert "precious" not in clean(tmp_path, "--yes").output
    assert precious.is_dir()


@pytest.mark.parametrize("columns", ["80", "200"])
def test_nothing_of_a_record_or_a_command_acts_on_the_terminal(
    tmp_path, runtime_directory, columns
):
    evil = "evil\x1b[2J\x07[red]\u202e\r"
    killed(tmp_path, "digits", evil, FORK="1")
    plant(runtime_directory, project=evil, argv=["python", evil], cwd=evil)
    said = clean(tmp_path, "--dry-run", COLUMNS=columns).output
    assert all(letter == "\n" or letter.isprintable() for letter in said)
    assert r"evil\x1b[2J" in said
    assert "[red]" in said
    assert all(len(line) <= int(columns) for line in said.splitlines())


def test_a_closed_or_early_closed_output_does_no_harm(tmp_path):
    killed(tmp_path, "digits", FORK="1")
    script = run_command(tmp_path, ["bash", "-c", f"'{COMMAND}' clean --yes >&-"])
    assert script.finish() == 0, script.transcript()
    assert status_of(tmp_path) == []


@pytest.fixture
def own_shared_memory(tmp_path, require_tool):
    """What gives a command a /dev/shm of its own, since other tests clean up this one's."""
    prefix = (require_tool("unshare"), "--mount", "sh", "-c")
    probe = run_command(tmp_path, [*prefix, "mount -t tmpfs tmpfs /dev/shm"])
    if probe.finish() != 0:
        pytest.skip("needs a real root")
    return (*prefix, 'mount -t tmpfs tmpfs /dev/shm; eval "$PLANT"; "$@"; ls /dev/shm', "sh")


@pytest.mark.skipif(not is_first_pid_namespace(), reason="needs a real machine, no container")
def test_shared_memory_of_the_dead_is_removed_and_that_of_the_living_kept(
    tmp_path, own_shared_memory
):
    dead = run_command(tmp_path, ["true"])
    dead.finish()
    plant_files = "; ".join(
        f"head -c 100000 /dev/zero > /dev/shm/{name}"
        for name in (f"torch_{dead.pid}_1_0", f"torch_{os.getpid()}_1_0", "results")
    )
    for words, what in (("--dry-run", "This would remove"), ("--yes", "removed")):
        said = orchard_infra(
            tmp_path,
            *("clean", words),
            prefix=own_shared_memory,
            env={"PLANT": plant_files, "COLUMNS": "200"},
        ).output
        assert f"{what} 1 file of shared memory (100 KiB)" in said
        left = said.splitlines()[-3:] if words == "--dry-run" else said.splitlines()[-2:]
        assert f"torch_{os.getpid()}_1_0" in left
        assert "results" in left
        assert (f"torch_{dead.pid}_1_0" in left) == (words == "--dry-run")
