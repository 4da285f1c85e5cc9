"""`orchard-infra run`: exit statuses, streams, the lock, and the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import (
    is_running,
    run_command,
    run_python,
    wait_gone,
    wait_until,
)
from wrapping import COMMAND, LISTENER, Wrapper, child_of, send

HOLDER = """
    import sys
    from orchard_infra import managed_environment
    with managed_environment("digits") as env:
        print("inside", env.joined, env.run.run_id, flush=True)
        sys.stdin.readline()
"""


# Exit statuses


@pytest.mark.parametrize("status", [0, 1, 75, 255])
def test_the_exit_status_is_that_of_the_command(wrapper: Wrapper, status: int) -> None:
    assert wrapper.run("sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("name", ["HUP", "KILL", "SEGV", "TERM"])
def test_the_exit_status_is_128_and_the_signal_that_ended_the_command(
    wrapper: Wrapper, name: str
) -> None:
    script = wrapper.run("sh", "-c", f"kill -{name} $$")

    assert script.returncode == 128 + signal.Signals[f"SIG{name}"]
    assert f"was ended by SIG{name}" in script.error_output


def test_a_command_that_is_not_there_is_127(wrapper: Wrapper) -> None:
    for command in ("no-such-command", "./no-such-command"):
        script = wrapper.run(command)
        assert script.returncode == 127
        assert script.error_output == f"orchard-infra: {command}: command not found\n"


def test_a_command_that_cannot_be_executed_is_126(wrapper: Wrapper) -> None:
    plain, no_binary = wrapper.tmp_path / "plain", wrapper.tmp_path / "no-binary"
    plain.write_text("echo no\n")
    no_binary.write_text("echo no\n")
    no_binary.chmod(0o755)

    for command, why in (
        ("./plain", "Permission denied"),
        (".", "Permission denied"),
        ("./plain/x", "Not a directory"),
        ("./no-binary", "neither a binary nor a script with a #! line"),
    ):
        script = wrapper.run(command)
        assert script.returncode == 126, command
        assert why in script.error_output
        assert script.output == ""


def test_a_lock_that_cannot_be_used_is_125(wrapper: Wrapper, tmp_path: Path) -> None:
    script = run_command(tmp_path, [COMMAND, "run", "--lock-file", str(tmp_path), "--", "true"])

    assert script.finish() == 125
    assert "a directory" in script.error_output
    assert "Traceback" not in script.error_output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--", "true"],
        ["-p", "a", "--lock-file", "b", "--", "true"],
        ["-p", "a", "--"],
        ["-p", "", "--", "true"],
        ["-p", "a", "--wait", "soon", "--", "true"],
        ["-p", "a", "--wait", "nan", "--", "true"],
        ["-p", "a", "--grace", "-1", "--", "true"],
        ["-p", "a", "--locked-exit", "256", "--", "true"],
        ["-p", "a", "--no-such-option", "--", "true"],
    ],
)
def test_a_wrong_command_line_is_2_and_runs_nothing(tmp_path: Path, arguments: list[str]) -> None:
    script = run_command(tmp_path, [COMMAND, "run", *arguments])

    assert script.finish() == 2
    assert "Usage: orchard-infra run" in script.error_output


def test_the_help_fits_a_screen_and_has_examples(tmp_path: Path) -> None:
    script = run_command(tmp_path, [COMMAND, "run", "--help"], env={"COLUMNS": "80"})

    assert script.finish() == 0
    lines = script.output.splitlines()
    assert len(lines) <= 35
    assert max(map(len, lines)) <= 80
    assert "orchard-infra run -p digits -- python train.py" in script.output


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path) -> None:
    script = run_python(
        tmp_path,
        """
        import sys
        sys.modules["click"] = None
        from orchard_infra.cli import main
        sys.exit(main())
        """,
    )

    assert script.finish() == 2
    assert script.error_output.count("\n") == 1
    assert 'pip install "orchard-infra[cli]"' in script.error_output


# What the command gets


def test_arguments_arrive_as_they_were_given(wrapper: Wrapper) -> None:
    words = ["", "a b", "$HOME", "--wait", "-p", "--", "*"]
    script = wrapper.run("--", sys.executable, "-c", "import sys; print(sys.argv[1:])", *words)

    assert script.returncode == 0, script.transcript()
    assert script.output == f"{words}\n"


def test_options_end_at_the_command_also_without_a_double_dash(tmp_path: Path) -> None:
    script = run_command(tmp_path, [COMMAND, "run", "-p", "a", "echo", "--wait", "-p"])

    assert script.finish() == 0
    assert script.output == "--wait -p\n"


def test_standard_input_is_the_commands_own(wrapper: Wrapper) -> None:
    script = wrapper.start("sed", "-u", "s/^/heard /")
    script.tell("one")
    script.wait_for("heard one")
    assert script.stdin is not None
    script.stdin.close()

    assert script.finish() == 0


# What a process inherits besides its environment.
_INHERITED = """
    import os
    # The C library has two signals to itself; posix_spawn(3) ignores them for the new program.
    own = 1 << 31 | 1 << 32
    for line in open("/proc/self/status"):
        name, _, value = line.partition(":")
        if name in ("SigBlk", "SigIgn", "SigPnd"):
            print(name, hex(int(value, 16) & ~own))
    print(sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if fd < 100))
    print(os.nice(0), oct(os.umask(0)), os.getcwd())
"""


@pytest.mark.parametrize("before", ["", "trap '' HUP INT USR1;"])
def test_signals_and_descriptors_are_as_without_the_wrapper(wrapper: Wrapper, before: str) -> None:
    program = f"{sys.executable} {wrapper.script(_INHERITED)}"
    outputs = []
    for command in (program, f"{COMMAND} run -p digits -- {program}"):
        script = run_command(wrapper.tmp_path, ["sh", "-c", f"{before} exec {command}"])
        assert script.finish() == 0, script.transcript()
        outputs.append(script.output)

    assert "SigIgn" in outputs[0]
    assert outputs[0] == outputs[1]


def test_a_pipe_that_closes_ends_the_command_as_ever(wrapper: Wrapper) -> None:
    script = run_command(
        wrapper.tmp_path,
        ["bash", "-c", f"{COMMAND} run -p digits -- yes | head -n 1; echo ${{PIPESTATUS[0]}}"],
    )

    assert script.finish() == 0
    assert script.output == "y\n141\n"
    assert script.error_output == ""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_stay_closed_and_nothing_lands_in_the_lock(
    wrapper: Wrapper, closed: str
) -> None:
    program = wrapper.script(
        """
        import os, pathlib
        state = []
        for fd in range(3):
            try:
                os.fstat(fd)
                state.append("open")
            except OSError:
                state.append("closed")
        pathlib.Path("found").write_text(" ".join(state))
        """
    )
    line = f"exec {COMMAND} run --lock-file here.lock -- {sys.executable} {program} {closed}"
    script = run_command(wrapper.tmp_path, ["sh", "-c", line])

    assert script.finish() == 0, script.transcript()
    expected = ["open"] * 3
    for part in closed.split():
        expected[{"<&-": 0, ">&-": 1, "2>&-": 2}[part]] = "closed"
    assert (wrapper.tmp_path / "found").read_text().split() == expected
    assert not (wrapper.tmp_path / "here.lock").exists()


def test_messages_for_a_closed_descriptor_land_in_no_record(
    wrapper: Wrapper, runtime_directory: Path
) -> None:
    program = wrapper.script(
        """
        import os, pathlib, signal
        def asked(signum, frame):
            pathlib.Path("asked").touch()
        signal.signal(signal.SIGTERM, asked)
        if os.fork():
            os._exit(0)
        while True:
            signal.pause()
        """
    )
    wrapped = f"{COMMAND} run -p digits --grace 1000 -- {sys.executable} {program}"
    script = run_command(wrapper.tmp_path, ["sh", "-c", f"exec {wrapped} 2>&-"])
    wait_until((wrapper.tmp_path / "asked").exists, what=script.transcript)

    records = [path for path in runtime_directory.rglob("*.*") if path.is_file()]

    assert len(records) == 2
    for record in records:
        assert json.loads(record.read_text())["project"] == "digits"
    send(script, signal.SIGTERM)
    assert script.finish() == 0


def test_messages_into_a_closed_pipe_do_no_harm(wrapper: Wrapper) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    script = subprocess.run(
        [COMMAND, "run", "-p", "digits", "--", "sh", "-c", "kill -KILL $$"],
        stderr=writes,
        check=False,
    )
    os.close(writes)

    assert script.returncode == 137


def test_it_works_without_a_terminal_and_in_another_session(wrapper: Wrapper) -> None:
    script = wrapper.run("sh", "-c", "echo fine; echo well >&2", start_new_session=True)

    assert script.returncode == 0
    assert (script.output, script.error_output) == ("fine\n", "well\n")


# The lock


def test_another_run_is_refused_and_told_who_has_the_project(wrapper: Wrapper) -> None:
    first = wrapper.start("sh", "-c", "echo ready; read line")
    first.wait_for("ready")

    second = wrapper.run("echo", "never")

    assert second.returncode == os.EX_TEMPFAIL
    assert second.output == ""
    assert f"pid {first.pid}" in second.error_output
    assert "read line" in second.error_output
    assert f"orchard-infra stop {first.pid}" in second.error_output
    assert wrapper.run("--locked-exit", "3", "--", "true").returncode == 3
    assert wrapper.run("true", project="other").returncode == 0
    first.tell()
    assert first.finish() == 0
    assert wrapper.run("true").returncode == 0


def test_it_excludes_python_programs_with_the_same_project(wrapper: Wrapper) -> None:
    holder = run_python(wrapper.tmp_path, HOLDER)
    holder.wait_for("inside")

    assert wrapper.run("true").returncode == os.EX_TEMPFAIL
    holder.tell()
    assert holder.finish() == 0

    first = wrapper.start("sh", "-c", "echo ready; read line")
    first.wait_for("ready")
    assert run_python(wrapper.tmp_path, HOLDER).finish() == 1


def test_a_managed_environment_in_the_command_joins(wrapper: Wrapper) -> None:
    program = wrapper.script(HOLDER)
    script = wrapper.start(
        "--report", "report.json", "--", "sh", "-c", f"{sys.executable} {program}"
    )

    assert "inside True" in script.wait_for("inside")
    script.tell()
    assert script.finish() == 0, script.transcript()
    assert wrapper.report()["run_id"] in script.output


def test_a_wrapper_in_the_command_joins(wrapper: Wrapper) -> None:
    inner = [COMMAND, "run", "-p", "digits", "--report", "inner.json", "--"]
    script = wrapper.run("--report", "outer.json", "--", *inner, "sh", "-c", "exit 4")

    assert script.returncode == 4, script.transcript()
    outer, within = wrapper.report("outer.json"), wrapper.report("inner.json")
    assert (outer["joined"], within["joined"]) == (False, True)
    assert outer["run_id"] == within["run_id"]


def test_a_rank_that_does_not_lead_takes_no_lock(wrapper: Wrapper) -> None:
    leader = wrapper.start("sh", "-c", "echo ready; read line", env={"RANK": "0"})
    leader.wait_for("ready")

    assert wrapper.run("true", env={"RANK": "1"}).returncode == 0
    assert wrapper.run("true", env={"RANK": "0"}).returncode == os.EX_TEMPFAIL


def test_waiting_gets_the_lock_when_it_is_free(wrapper: Wrapper) -> None:
    first = wrapper.start("sh", "-c", "echo ready; read line")
    first.wait_for("ready")
    for_ever = wrapper.start("--wait", "--", "echo", "mine")
    wait_until(lambda: "waiting for project digits" in for_ever.error_output)
    assert f"pid {first.pid}" in for_ever.error_output

    assert wrapper.run("--wait", "0.1", "--", "true").returncode == os.EX_TEMPFAIL
    first.tell()

    assert for_ever.finish() == 0
    assert for_ever.output == "mine\n"


def test_a_stopped_waiter_leaves_no_record(wrapper: Wrapper, runtime_directory: Path) -> None:
    first = wrapper.start("sh", "-c", "echo ready; read line")
    first.wait_for("ready")
    waiter = wrapper.start("--wait", "--report", "report.json", "--", "echo", "never")
    wait_until(lambda: "waiting for project" in waiter.error_output)

    send(waiter, signal.SIGTERM)

    assert waiter.finish() == 143
    assert wrapper.report()["outcome"] == "interrupted"
    assert len(list((runtime_directory / "runs").iterdir())) == 1
    first.tell()
    assert first.finish() == 0


# Killed


def test_a_killed_wrapper_leaves_the_lock_with_its_command(wrapper: Wrapper) -> None:
    first = wrapper.start(sys.executable, wrapper.script(LISTENER), "USR2")
    pid = int(first.wait_for("ready").split()[1])

    first.kill()
    first.wait()

    second = wrapper.start("true")
    assert second.finish() == os.EX_TEMPFAIL
    assert f"pid {pid}" in second.error_output
    assert "kill" in second.error_output
    assert is_running(pid)
    os.kill(pid, signal.SIGUSR2)
    wait_gone([pid])
    assert wrapper.run("true").returncode == 0


def test_the_command_of_a_killed_wrapper_is_stopped_when_that_is_allowed(wrapper: Wrapper) -> None:
    first = wrapper.start(sys.executable, wrapper.script(LISTENER))
    pid = int(first.wait_for("ready").split()[1])

    first.kill()
    first.wait()
    second = wrapper.run("--allow-process-kill", "--", "echo", "mine")

    assert (second.returncode, second.output) == (0, "mine\n"), second.transcript()
    assert not is_running(pid)
    assert f"pid {pid}" in second.error_output


def test_after_both_are_killed_the_next_run_begins_at_once(
    wrapper: Wrapper, runtime_directory: Path
) -> None:
    first = wrapper.start(sys.executable, wrapper.script(LISTENER))
    pid = int(first.wait_for("ready").split()[1])

    first.kill()
    os.kill(pid, signal.SIGKILL)
    first.wait()
    wait_gone([pid])

    assert wrapper.run("true").returncode == 0
    assert not list((runtime_directory / "runs").glob("*.run"))


def test_a_killed_command_is_named_and_takes_its_children_along(wrapper: Wrapper) -> None:
    script = wrapper.start("bash", "-c", "sleep 1000 & echo child $!; wait")
    child = int(script.wait_for("child").split()[1])
    command = child_of(script)

    command.kill()

    assert script.finish() == 137
    assert not is_running(child)
    assert f"(pid {command.pid}) was ended by SIGKILL" in script.error_output
    assert wrapper.run("true").returncode == 0


def test_a_lock_that_is_removed_is_told(wrapper: Wrapper, runtime_directory: Path) -> None:
    script = wrapper.start("--report", "report.json", "--", "sh", "-c", "echo ready; read line")
    script.wait_for("ready")
    (runtime_directory / "locks" / "digits.lock").unlink()

    wait_until(lambda: "was removed or replaced" in script.error_output)

    script.tell()
    assert script.finish() == 0
    assert wrapper.report()["lock_lost"] is True


# Ghosts


def test_a_twin_of_the_command_is_told_and_stopped_only_when_allowed(wrapper: Wrapper) -> None:
    program = wrapper.script("import sys; print('ready', flush=True); sys.stdin.readline()")
    # With a pipe as its input it would be at work for the test.
    ours, terminal = os.openpty()
    twin = run_python(wrapper.tmp_path, wrapper.tmp_path / program, stdin=terminal)
    os.close(terminal)
    twin.wait_for("ready")
    command = [sys.executable, str(wrapper.tmp_path / program)]

    spared = wrapper.run(*command)
    assert spared.returncode == 0
    assert f"spared process: pid {twin.pid} (twin" in spared.error_output
    assert twin.poll() is None

    stopping = wrapper.run("--allow-process-kill", "--", *command)
    assert stopping.returncode == 0
    assert f"stopped process: pid {twin.pid}" in stopping.error_output
    assert twin.finish() == -signal.SIGTERM
    os.close(ours)


# The report


def test_the_report_tells_what_happened(wrapper: Wrapper) -> None:
    script = wrapper.run(
        *("--report", "report.json", "--", "sh", "-c", "sleep 1000 & kill -TERM $$")
    )

    report = wrapper.report()
    assert script.returncode == 143
    assert report["outcome"] == "signaled"
    assert (report["exit_status"], report["signal"]) == (143, "SIGTERM")
    assert report["command"] == ["sh", "-c", "sleep 1000 & kill -TERM $$"]
    [leftover] = report["leftovers"]
    assert (leftover["fate"], leftover["command"]) == ("stopped", "sleep 1000")
    assert report["ended_at"] >= report["started_at"] > 0
    assert sorted(p.name for p in wrapper.tmp_path.iterdir() if "report" in p.name) == [
        "report.json"
    ]


def test_the_report_of_a_refused_run_names_the_holder(wrapper: Wrapper) -> None:
    first = wrapper.start("sh", "-c", "echo ready; read line")
    first.wait_for("ready")

    wrapper.run("--report", "report.json", "--", "true")

    report = wrapper.report()
    assert (report["outcome"], report["exit_status"]) == ("locked", 75)
    assert report["holder"]["pid"] == first.pid


def test_a_report_goes_through_a_link_and_into_a_pipe(wrapper: Wrapper) -> None:
    (wrapper.tmp_path / "link.json").symlink_to("target.json")

    assert wrapper.run("--report", "link.json", "--", "true").returncode == 0
    assert (wrapper.tmp_path / "link.json").is_symlink()
    assert wrapper.report("target.json")["exit_status"] == 0
    piped = run_command(
        wrapper.tmp_path,
        ["bash", "-c", f"{COMMAND} run -p digits --report /dev/stderr -- true 2>&1 | cat"],
    )
    assert piped.finish() == 0
    assert '"exit_status": 0' in piped.output


def test_a_report_that_cannot_be_written_does_not_change_the_status(wrapper: Wrapper) -> None:
    script = wrapper.run("--report", "no/such/directory/report.json", "--", "sh", "-c", "exit 9")

    assert script.returncode == 9
    assert "cannot write the report" in script.error_output


# How fast


def test_a_run_loads_nothing_that_it_does_not_need(wrapper: Wrapper) -> None:
    script = run_python(
        wrapper.tmp_path,
        """
        import sys
        import orchard_infra.cli.group
        import orchard_infra.cli.run.command
        import orchard_infra.cli.run.protected
        heavy = ("rich", "torch", "asyncio", "orchard_infra.manager", "orchard_infra.sanitizing")
        print([name for name in heavy if name in sys.modules])
        """,
    )

    assert script.finish() == 0
    assert script.output == "[]\n"
