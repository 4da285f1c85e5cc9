"""`orchard-infra status`, with real runs."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from commands import (
    COMMAND,
    OWN_SIZE,
    assert_documented,
    is_first_pid_namespace,
    killed,
    orchard_infra,
    plant,
    queue,
    status_of,
    train,
    wait_for_state,
    without_colours,
)
from support import is_running, run_command, run_python, wait_gone, wait_until

HOSTILE = "evil\x1b[2J\x1b]0;owned\x07[red]\u202ebold[/red]\r\nnext"


def table(tmp_path: Path, columns: int | None, *words: str) -> list[str]:
    env = {"COLUMNS": None if columns is None else str(columns)}
    return orchard_infra(tmp_path, "status", *words, env=env).output.splitlines()


def test_without_a_run_there_is_one_line(tmp_path):
    assert table(tmp_path, 80) == ["No runs."]


def test_every_state_is_told_apart(tmp_path):
    train(tmp_path, "runs")
    queue(tmp_path, "runs")
    killed(tmp_path, "forked", FORK="1")
    killed(tmp_path, "died")  # the last: a run that begins removes the records of dead ones
    wait_for_state(tmp_path, "runs", "running", "waiting")
    states = {(run["project"], run["state"]) for run in status_of(tmp_path)}
    assert states == {
        ("runs", "running"),
        ("runs", "waiting"),
        ("died", "dead"),
        ("forked", "survivors"),
    }
    shown = "\n".join(table(tmp_path, 200))
    for words in ("running", "waiting", "dead", "survivors only"):
        assert words in shown


def test_who_was_started_by_a_dead_run_is_a_survivor_although_the_lock_is_free(tmp_path):
    run = killed(tmp_path, "digits", EXEC="1")
    (row,) = status_of(tmp_path)
    assert row["state"] == "survivors"
    (survivor,) = row["survivors"]
    assert survivor["evidence"] == "started by the run"
    assert row["pids"] == [survivor["pid"]] != [run.pid]
    os.kill(survivor["pid"], signal.SIGKILL)
    wait_gone([survivor["pid"]])
    (row,) = status_of(tmp_path)
    assert row["state"] == "dead"


def test_the_workers_of_one_pool_are_named_in_one_line(tmp_path):
    killed(tmp_path, "digits", FORK="3")
    (row,) = status_of(tmp_path)
    (line,) = [line for line in table(tmp_path, 200) if "forked by the run" in line]
    assert len(row["survivors"]) == 3
    assert all(str(one["pid"]) in line for one in row["survivors"])


def test_at_80_columns_every_line_fits_and_nothing_is_left_out(tmp_path):
    run = train(tmp_path, "digits", "--lr", "3", RANK="0", WORLD_SIZE="2")
    (row,) = status_of(tmp_path)
    lines = table(tmp_path, 80)
    shown = " ".join(line.strip() for line in lines)
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["PROJECT", "STATE", "PID", "AGE", "RANK", "CPU", "MEMORY"]
    assert lines[1].split()[:3] == ["digits", "running", str(run.pid)]
    assert f"{Path(sys.executable).name} " in shown
    # Of a path the end is what tells.
    assert tmp_path.name in shown
    assert f"locks/{Path(row['lock']).name}" in shown


def test_at_200_columns_a_run_is_one_line():
    # tmp_path is named after the test: no command line of ordinary length.
    project = Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"]))
    train(project, "digits", "--lr", "3")
    train(project, "letters")
    header, *lines = table(project, 200)
    assert len(lines) == 2
    assert all(len(line) <= 200 for line in (header, *lines))
    assert header.split()[-3:] == ["COMMAND", "DIRECTORY", "LOCK"]
    assert "--lr 3" in lines[0]
    assert lines[0].endswith("digits.lock")


def test_a_long_project_name_and_a_long_command_do_not_break_the_table(tmp_path):
    train(tmp_path, "p" * 150, *["x" * 200] * 10)
    for columns in (60, 80, 200):
        lines = table(tmp_path, columns)
        assert all(len(line) <= columns for line in lines)
        assert any("running" in line for line in lines)


def test_in_a_pipe_a_run_is_one_whole_line(tmp_path):
    train(tmp_path, "digits", "x" * 300)
    lines = table(tmp_path, None)
    assert len(lines) == 2
    assert "x" * 300 in lines[1]


def test_the_command_behind_the_wrapper_is_what_is_shown(tmp_path):
    wrapped = run_command(
        tmp_path, [COMMAND, "run", "-p", "digits", "--", "sh", "-c", "echo ready; sleep 600"]
    )
    wrapped.wait_for("ready")
    (row,) = status_of(tmp_path)
    assert row["argv"] == ["sh", "-c", "echo ready; sleep 600"]
    assert "sh -c echo ready" in table(tmp_path, 200)[1]


def test_the_record_of_an_older_version_is_shown_as_it_is(tmp_path, runtime_directory):
    argv = ["/usr/bin/python3", "/usr/bin/orchard-infra", "run", "-p", "digits", "--", "make"]
    plant(runtime_directory, argv=argv)
    assert status_of(tmp_path)[0]["argv"] == argv
    assert "python3 /usr/bin/orchard-infra run -p digits -- make" in table(tmp_path, 200)[1]


def test_a_run_that_has_ended_is_shown_for_as_long_as_its_children_live(tmp_path):
    program = run_python(
        tmp_path,
        """
        import os, sys, time
        from orchard_infra import managed_environment
        with managed_environment("digits"):
            for _ in range(2):
                if os.fork() == 0:
                    time.sleep(600)
        print("ready", flush=True)
        sys.stdin.readline()
        """,
    )
    program.wait_for("ready")
    (row,) = status_of(tmp_path)
    assert row["state"] == "ended"
    assert row["pid"] == program.pid
    assert len(row["pids"]) == 2
    assert row["survivors"] == []
    shown = "\n".join(table(tmp_path, 200))
    assert "ended" in shown
    assert "its program goes on, with 2 processes that the run started" in shown
    program.kill()
    program.wait()
    (row,) = status_of(tmp_path)
    assert row["state"] == "survivors"
    assert {one["kind"] for one in row["survivors"]} <= {"worker", "detached"}
    for one in row["survivors"]:
        os.kill(one["pid"], signal.SIGKILL)
    wait_gone(one["pid"] for one in row["survivors"])
    assert status_of(tmp_path) == []  # not dead: it has ended well


def test_a_changed_host_name_changes_nothing(tmp_path, require_tool):
    prefix = (require_tool("unshare"), "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh")
    if run_command(tmp_path, [*prefix, "true"]).finish() != 0:
        pytest.skip("needs a real root")
    run = train(tmp_path, "digits", FORK="1")
    script = orchard_infra(tmp_path, "status", "--json", prefix=prefix)
    (row,) = json.loads(script.output)["runs"]
    assert (row["state"], row["is_local"]) == ("running", True)
    assert len(row["pids"]) == 2
    stopped = orchard_infra(tmp_path, "stop", "digits", prefix=prefix)
    assert "stopped after" in stopped.output
    assert run.finish() == 128 + signal.SIGTERM
    killed(tmp_path, "digits", FORK="1")
    cleaned = orchard_infra(tmp_path, "clean", "--yes", prefix=prefix)
    assert "stopped 1 process" in cleaned.output
    assert status_of(tmp_path) == []


@pytest.mark.parametrize("columns", [80, 200])
def test_a_hostile_record_cannot_act_on_the_terminal(tmp_path, runtime_directory, columns):
    plant(
        runtime_directory,
        project=HOSTILE,
        argv=["python", HOSTILE, "\udcff"],
        cwd="/" + HOSTILE,
        lock="/" + HOSTILE,
        user=HOSTILE,
    )
    shown = "\n".join(table(tmp_path, columns))
    assert all(letter == "\n" or letter.isprintable() for letter in shown)
    assert r"evil\x1b[2J" in shown
    # Its brackets are no markup of ours, and its lines no lines of ours.
    assert "[red]" in shown
    assert not any(line.startswith("next") for line in shown.splitlines())


def test_in_a_terminal_the_escapes_are_our_own(tmp_path, runtime_directory, in_terminal):
    plant(runtime_directory, project=HOSTILE, argv=[HOSTILE])
    terminal = in_terminal(COMMAND, "status")
    terminal.expect_exact("clean --dry-run")
    terminal.expect_exact("\n")
    shown = without_colours(terminal.before)
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_there_is_colour_in_a_terminal_and_in_no_pipe(tmp_path, in_terminal):
    train(tmp_path, "digits")
    terminal = in_terminal(COMMAND, "status")
    terminal.expect_exact("\x1b[32mrunning")
    assert "\x1b" not in "".join(table(tmp_path, 80))


def test_a_pipe_that_is_to_have_colours_is_still_a_pipe(tmp_path):
    train(tmp_path, "digits", "x" * 300)
    script = orchard_infra(tmp_path, "status", env={"FORCE_COLOR": "1", "COLUMNS": None})
    header, line = script.output.splitlines()
    assert "\x1b[32mrunning" in line
    assert "x" * 300 in line
    assert header


def test_no_color_is_honoured(tmp_path, in_terminal):
    train(tmp_path, "digits")
    terminal = in_terminal(COMMAND, "status", env={"NO_COLOR": "1"})
    terminal.expect_exact("digits.lock")
    assert "running" in terminal.before
    assert "\x1b[3" not in terminal.before


def test_a_record_that_cannot_be_written_in_this_encoding_is_escaped(tmp_path):
    directory = tmp_path / "modèle-\u6f22"
    directory.mkdir()
    run = run_python(
        tmp_path,
        """
        from orchard_infra import managed_environment
        with managed_environment("digits"):
            print("ready", flush=True)
            input()
        """,
        cwd=directory,
    )
    run.wait_for("ready")
    script = orchard_infra(tmp_path, "status", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert r"mod\xe8le-\u6f22" in script.output


def test_the_reader_of_a_pipe_may_leave(tmp_path):
    train(tmp_path, "digits")
    script = run_command(
        tmp_path, ["bash", "-c", f"'{COMMAND}' status | head -n 1; exit ${{PIPESTATUS[1]}}"]
    )
    assert script.finish() == 0
    assert script.output.startswith("PROJECT")
    assert script.error_output == ""


def test_a_closed_standard_output_is_no_crash(tmp_path):
    train(tmp_path, "digits")
    script = run_command(tmp_path, ["bash", "-c", f"'{COMMAND}' status >&-"])
    assert script.finish() == 0, script.transcript()
    assert "Traceback" not in script.error_output


def test_only_the_runs_of_a_project(tmp_path):
    train(tmp_path, "digits")
    train(tmp_path, "letters")
    assert [run["project"] for run in status_of(tmp_path, "--project", "letters")] == ["letters"]


def test_the_json_is_what_the_documentation_says(tmp_path, runtime_directory):
    train(tmp_path, "digits", FORK="1", RANK="0", WORLD_SIZE="2")
    killed(tmp_path, "letters", FORK="1")
    plant(runtime_directory, project=HOSTILE, pid_namespace=1)
    script = orchard_infra(tmp_path, "status", "--json")
    assert all(letter == "\n" or letter.isprintable() for letter in script.output)
    found = json.loads(script.output)
    assert_documented(found, "### The JSON of status")
    assert_documented(found["gpu"], "#### gpu")
    assert [run["project"] for run in found["runs"]].count(HOSTILE) == 1
    survivors = []
    for run in found["runs"]:
        assert_documented(run, "#### Each of runs")
        assert run["state"] in ("running", "waiting", "ended", "survivors", "dead")
        survivors += run["survivors"]
    assert survivors
    for survivor in survivors:
        assert_documented(survivor, "#### Each of survivors")


def test_memory_and_processor_time_are_those_of_the_whole_tree(tmp_path):
    size = 80 * 2**20
    run = train(tmp_path, "digits", TAKE=str(size), WORK="1")
    run.wait_for("taken")
    (row,) = status_of(tmp_path, SAMPLE="0.2")
    assert len(row["pids"]) == 3
    assert run.pid in row["pids"]
    assert size < row["memory_bytes"] < 3 * size
    assert row["cpu_percent"] > 5


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real Linux")
def test_memory_that_forks_share_counts_once(tmp_path):
    size = 80 * 2**20
    run = run_python(
        tmp_path,
        """
        import os, sys, time
        from orchard_infra import managed_environment
        with managed_environment("digits"):
            kept = bytearray(int(sys.argv[1]))
            kept[::4096] = b"x" * len(kept[::4096])
            for _ in range(4):
                if os.fork() == 0:
                    time.sleep(600)
            print("ready", flush=True)
            input()
        """,
        str(size),
    )
    run.wait_for("ready")
    (row,) = status_of(tmp_path)
    assert len(row["pids"]) == 5
    assert size < row["memory_bytes"] < 2 * size


def test_a_process_that_left_the_tree_still_counts(tmp_path):
    run = run_python(
        tmp_path,
        """
        import os, sys, time
        from orchard_infra import managed_environment
        with managed_environment("digits"):
            reader, writer = os.pipe()
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.write(writer, str(os.getpid()).encode())
                    time.sleep(600)
                os._exit(0)
            os.wait()
            print("orphan", os.read(reader, 20).decode(), flush=True)
            input()
        """,
    )
    orphan = int(run.wait_for("orphan").split()[1])
    (row,) = status_of(tmp_path)
    assert sorted(row["pids"]) == sorted([run.pid, orphan])


PYNVML = """
    import json, os
    from types import SimpleNamespace

    def nvmlInit():
        if os.environ.get("NVML") == "fails":
            raise RuntimeError("Driver/library version mismatch")

    def nvmlShutdown(): pass
    def nvmlDeviceGetCount(): return 2
    def nvmlDeviceGetHandleByIndex(index): return index
    def nvmlDeviceGetGraphicsRunningProcesses(device): return []
    def nvmlDeviceGetComputeRunningProcesses(device):
        used = json.loads(os.environ["USED"])
        return [SimpleNamespace(pid=int(pid), usedGpuMemory=size) for pid, size in used.items()]
"""


@pytest.fixture
def driver(tmp_path):
    """The environment of a machine whose NVIDIA driver has two GPUs."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "pynvml.py").write_text(textwrap.dedent(PYNVML))
    return {"PYTHONPATH": str(tmp_path / "driver"), "USED": "{}"}


@pytest.mark.skipif(not is_first_pid_namespace(), reason="needs a real machine, no container")
def test_gpu_memory_is_that_of_the_tree_on_all_devices(tmp_path, driver):
    run = train(tmp_path, "digits", FORK="1")
    train(tmp_path, "letters")
    (row, _) = status_of(tmp_path)
    used = dict.fromkeys(row["pids"], 100 * 2**20)
    with_gpu, without = status_of(tmp_path, **driver | {"USED": json.dumps(used)})
    assert len(used) == 2
    assert with_gpu["pid"] == run.pid
    assert with_gpu["gpu_memory_bytes"] == 2 * 2 * 100 * 2**20
    assert without["gpu_memory_bytes"] == 0


@pytest.mark.skipif(not is_first_pid_namespace(), reason="needs a real machine, no container")
def test_gpu_memory_that_the_driver_does_not_tell_is_unknown(tmp_path, driver):
    run = train(tmp_path, "digits")
    (row,) = status_of(tmp_path, **driver | {"USED": json.dumps({run.pid: None})})
    assert row["gpu_memory_bytes"] is None


def test_a_driver_that_does_not_answer_is_said_to(tmp_path, driver):
    train(tmp_path, "digits")
    script = orchard_infra(tmp_path, "status", env=driver | {"NVML": "fails", "COLUMNS": "120"})
    assert "GPU" in script.output.splitlines()[0]
    assert "unknown" in script.output.splitlines()[1]
    assert "version mismatch" in script.output


def test_without_the_library_nothing_is_said_of_gpus(tmp_path):
    train(tmp_path, "digits")
    # A module that cannot be imported, whatever is installed here.
    (tmp_path / "pynvml.py").write_text("raise ImportError")
    script = orchard_infra(tmp_path, "status", env={"PYTHONPATH": str(tmp_path)})
    assert "GPU" not in script.output


@pytest.fixture
def in_pid_namespace(tmp_path, require_tool):
    """What puts a command into a pid namespace of its own; needs root."""
    prefix = (require_tool("unshare"), "--pid", "--fork", "--mount-proc", "--kill-child")
    probe = run_command(tmp_path, [*prefix, "true"])
    if probe.finish() != 0:
        pytest.skip("needs a real root")
    return prefix


def test_in_a_container_gpu_memory_is_not_guessed(tmp_path, driver, in_pid_namespace):
    script = orchard_infra(tmp_path, "status", "--json", env=driver, prefix=in_pid_namespace)
    assert "this container" in json.loads(script.output)["gpu"]["unknown_because"]


def test_a_run_in_another_container_is_shown_and_not_guessed_about(tmp_path, in_pid_namespace):
    (tmp_path / "inside.py").write_text(
        "from orchard_infra import managed_environment\n"
        "with managed_environment('digits'):\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
    )
    inside = run_command(tmp_path, [*in_pid_namespace, sys.executable, "inside.py"])
    inside.wait_for("ready")
    (row,) = status_of(tmp_path)
    assert row["state"] == "running"
    assert row["is_local"] is False
    assert row["pids"] == []
    assert row["memory_bytes"] is row["cpu_percent"] is row["gpu_memory_bytes"] is None
    shown = "\n".join(table(tmp_path, 80))
    assert "unknown" in shown
    assert "in another pid or time namespace" in shown


def test_watching_follows_the_runs_and_the_size_of_the_terminal(tmp_path, in_terminal):
    run = train(tmp_path, "digits")
    terminal = in_terminal(COMMAND, "status", "--watch", env=OWN_SIZE)
    terminal.expect_exact("Ctrl-C ends")
    terminal.expect_exact("running")
    # In 120 columns the lock has a line of its own, in 200 a column.
    terminal.setwinsize(24, 200)
    terminal.expect_exact("COMMAND")
    run.tell("go on")
    assert run.stdin is not None
    run.stdin.close()
    run.finish()
    terminal.expect_exact("No runs.")
    terminal.sendcontrol("c")
    # The cursor is back, and the screen of before.
    terminal.expect_exact("\x1b[?25h")
    terminal.expect_exact("\x1b[?1049l")
    assert terminal.wait() == 0


def test_watching_without_a_terminal_writes_one_look_after_the_other(tmp_path):
    run = train(tmp_path, "digits")
    watch = run_command(tmp_path, [COMMAND, "status", "--watch", "--json"])

    def looks() -> list[list[str]]:
        whole = watch.output.rpartition("\n")[0]
        return [[run["state"] for run in json.loads(line)["runs"]] for line in whole.splitlines()]

    wait_until(lambda: ["running"] in looks(), what=watch.transcript)
    run.kill()
    run.wait()
    wait_until(lambda: looks()[-1] == ["dead"], what=watch.transcript)
    watch.send_signal(signal.SIGINT)
    assert watch.finish() == 0
    assert "Traceback" not in watch.error_output


def test_looking_disturbs_no_run(tmp_path):
    run = train(tmp_path, "digits", FORK="1")
    pids = status_of(tmp_path)[0]["pids"]
    for _ in range(3):
        assert status_of(tmp_path)[0]["state"] == "running"
    assert all(is_running(pid) for pid in pids)
    assert run.pid in pids


def test_a_directory_that_is_no_directory_is_an_error_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    script = orchard_infra(
        tmp_path, "status", env={"ORCHARD_INFRA_DIR": str(tmp_path / "file")}, expect=1
    )
    assert len(script.error_output.splitlines()) == 1
    assert script.error_output.startswith("Error: cannot read")


def test_a_shell_completes_the_projects(tmp_path):
    train(tmp_path, "digits")
    train(tmp_path, "letters")
    script = run_command(
        tmp_path,
        [COMMAND],
        env={
            "_ORCHARD_INFRA_COMPLETE": "bash_complete",
            "COMP_WORDS": "orchard-infra status --project dig",
            "COMP_CWORD": "3",
        },
    )
    script.finish()
    assert script.output.splitlines() == ["plain,digits"]
