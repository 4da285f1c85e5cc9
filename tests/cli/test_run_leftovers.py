"""`orchard-infra run`: nothing of a command outlives it, and nobody else is harmed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchard_infra.cli.run.oom import OomCounter
from support import Script, is_running, run_command, wait_gone, wait_until
from wrapping import COMMAND, Wrapper, child_of, send

# Starts a daemon the classic way, which ignores SIGTERM if asked to; prints its pid.
DAEMON = """
    import os, signal, sys
    if os.fork():
        os.wait()
        sys.exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("daemon", os.getpid(), flush=True)
    os.closerange(0, 1000)
    while True:
        signal.pause()
"""


def daemon_of(script: Script) -> int:
    return int(script.wait_for("daemon").split()[1])


@pytest.mark.parametrize("how", ["sleep 1000 &", "setsid sleep 1000 &", "(setsid sleep 1000 &)"])
def test_what_is_started_in_the_background_ends_with_the_command(
    wrapper: Wrapper, how: str
) -> None:
    script = wrapper.run("--grace", "0.2", "--report", "report.json", "--", "bash", "-c", how)

    assert script.returncode == 0
    assert "outlived bash" in script.error_output or "the session of bash" in script.error_output
    [leftover] = wrapper.report()["leftovers"]
    assert leftover["fate"] == "stopped"
    assert not is_running(leftover["pid"])


def test_a_daemon_that_has_closed_everything_ends_with_the_command(wrapper: Wrapper) -> None:
    script = wrapper.run("--grace", "0.2", "--", sys.executable, wrapper.script(DAEMON))

    assert script.returncode == 0
    assert not is_running(daemon_of(script))


def test_what_does_not_listen_is_killed_after_the_grace(wrapper: Wrapper) -> None:
    script = wrapper.run("--grace", "0.1", "--", sys.executable, wrapper.script(DAEMON), "stubborn")

    assert script.returncode == 0
    assert not is_running(daemon_of(script))
    assert f"did not end: pid {daemon_of(script)}" in script.error_output


def test_a_second_signal_ends_the_grace(wrapper: Wrapper) -> None:
    script = wrapper.start(
        "--grace", "1000", "--", sys.executable, wrapper.script(DAEMON), "stubborn"
    )
    pid = daemon_of(script)
    wait_until(lambda: "waiting 1000 s for" in script.error_output, what=script.transcript)

    send(script, signal.SIGTERM)

    assert script.finish() == 0
    assert not is_running(pid)
    assert "not waiting any longer" in script.error_output


def test_the_background_is_kept_when_asked_for_and_does_not_keep_the_lock(
    wrapper: Wrapper,
) -> None:
    script = wrapper.run("--keep-background", "--", sys.executable, wrapper.script(DAEMON))

    assert script.returncode == 0
    assert is_running(daemon_of(script))
    assert wrapper.run("true").returncode == 0
    assert is_running(daemon_of(script))
    os.kill(daemon_of(script), signal.SIGKILL)


def test_a_daemon_that_opted_out_is_left_and_named(wrapper: Wrapper) -> None:
    line = f"ORCHARD_INFRA_RUN_ID= {sys.executable} {wrapper.script(DAEMON)}"
    script = wrapper.run("sh", "-c", line)

    assert script.returncode == 0
    assert is_running(daemon_of(script))
    assert f"left alone: pid {daemon_of(script)}" in script.error_output
    os.kill(daemon_of(script), signal.SIGKILL)


def start_inner_run(wrapper: Wrapper, how: str) -> tuple[Script, int]:
    """A run of another project that a command starts in the background; its command's pid."""
    inner = f"{how} setsid {COMMAND} run -p other -- sh -c 'echo inner $$; exec sleep 1000'"
    outer = wrapper.start("--grace", "0.3", "--", "bash", "-c", f"{inner} & read line")
    pid = int(outer.wait_for("inner").split()[1])
    outer.tell()
    assert outer.finish() == 0
    return outer, pid


def test_a_run_that_was_started_inside_ends_with_the_command(wrapper: Wrapper) -> None:
    _, pid = start_inner_run(wrapper, "")

    assert not is_running(pid)
    assert wrapper.run("true", project="other").returncode == 0


def test_a_live_run_that_is_no_part_of_this_one_is_left_and_named(wrapper: Wrapper) -> None:
    outer, pid = start_inner_run(wrapper, "env -u ORCHARD_INFRA_RUN_ID")

    assert is_running(pid)
    assert "a run of project other (running)" in outer.error_output
    assert wrapper.run("true", project="other").returncode == os.EX_TEMPFAIL
    os.kill(pid, signal.SIGTERM)
    wait_gone([pid])


@pytest.mark.parametrize("how", ["", "env -u ORCHARD_INFRA_RUN_ID "])
def test_within_another_run_what_is_left_is_still_stopped(wrapper: Wrapper, how: str) -> None:
    inner = f"{how}{COMMAND} run -p inner -- bash -c 'sleep 1000 & echo child $!'"
    outer = wrapper.start("sh", "-c", f"{inner}; echo over; read line")
    outer.wait_for("over")

    assert not is_running(int(outer.wait_for("child").split()[1]))
    outer.tell()
    assert outer.finish() == 0


def test_children_from_before_an_exec_are_not_the_commands(wrapper: Wrapper) -> None:
    wrapped = f"{COMMAND} run -p digits --grace 0.2 -- sh -c 'setsid sleep 999 &'"
    line = f"sleep 1000 & echo mine $!; exec {wrapped}"
    script = run_command(wrapper.tmp_path, ["bash", "-c", line])

    assert script.finish() == 0
    pid = int(script.wait_for("mine").split()[1])
    assert is_running(pid)
    assert "sleep 999" in script.error_output
    assert "sleep 1000" not in script.error_output
    os.kill(pid, signal.SIGKILL)


def test_helpers_that_leave_by_themselves_are_not_worth_a_word(wrapper: Wrapper) -> None:
    program = wrapper.script(
        """
        import multiprocessing
        if __name__ == "__main__":
            multiprocessing.get_context("spawn").Process(target=print, args=("worked",)).start()
        """
    )
    script = wrapper.run(sys.executable, program)

    assert script.returncode == 0
    assert script.error_output == ""


def test_a_killed_pool_leaves_neither_workers_nor_shared_memory(wrapper: Wrapper) -> None:
    program = wrapper.script(
        """
        import os, signal
        from multiprocessing import Process, shared_memory
        if __name__ == "__main__":
            memory = shared_memory.SharedMemory(create=True, size=100)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            for _ in range(2):
                Process(target=signal.pause).start()
            print("memory", memory.name, flush=True)
            signal.pause()
        """
    )
    script = wrapper.start("--grace", "0.2", "--", sys.executable, program)
    name = script.wait_for("memory").split()[1]
    assert (Path("/dev/shm") / name).exists()
    command = child_of(script)
    pids = [command.pid, *(child.pid for child in command.children(recursive=True))]
    assert len(pids) == 4

    command.kill()

    assert script.finish() == 137
    assert not any(is_running(pid) for pid in pids)
    assert not (Path("/dev/shm") / name).exists()


# Process 1 of a container

IN_CONTAINER = ("unshare", "--fork", "--pid", "--mount-proc")


@pytest.fixture
def container(wrapper: Wrapper, require_tool: Callable[[str], str]) -> Callable[..., Script]:
    """Starts the wrapper as the first process of a pid namespace."""
    require_tool("unshare")
    rootless = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    prefix = (*IN_CONTAINER, *rootless)
    if run_command(wrapper.tmp_path, [*prefix, "true"]).finish() != 0:
        pytest.skip("needs permission to make a pid namespace")

    def start(*command: str) -> Script:
        words = [*prefix, "--kill-child", COMMAND, "run", "-p", "digits", "--", *command]
        return run_command(wrapper.tmp_path, words)

    return start


def test_as_the_first_process_it_reaps_and_gives_the_status(
    container: Callable[..., Script], wrapper: Wrapper
) -> None:
    program = wrapper.script(
        """
        import os, sys, time
        assert os.getppid() == 1, os.getppid()
        if os.fork() == 0:
            if os.fork():
                os._exit(0)
            while os.getppid() != 1:
                time.sleep(0.001)
            os._exit(0)
        os.wait()
        deadline = time.monotonic() + 30
        while True:
            states = {}
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    states[pid] = open(f"/proc/{pid}/stat").read().split()[2]
                except OSError:
                    pass  # reaped between the two looks
            if len(states) == 3 and "Z" not in states.values():  # and the witness
                break
            assert time.monotonic() < deadline, states
            time.sleep(0.01)
        sys.exit(5)
        """
    )
    script = container(sys.executable, program)

    assert script.finish() == 5, script.transcript()


def test_as_the_first_process_it_passes_signals_on(
    container: Callable[..., Script], wrapper: Wrapper
) -> None:
    script = container("sh", "-c", "trap 'echo got TERM; exit 6' TERM; echo ready; read line")
    script.wait_for("ready")
    [first] = psutil.Process(script.pid).children()

    first.terminate()

    assert script.finish() == 6, script.transcript()
    assert "got TERM" in script.output


# The out-of-memory killer


@pytest.mark.parametrize(
    ("cgroup", "events", "where"),
    [
        ("0::/jobs/1\n", "sys/fs/cgroup/jobs/1/memory.events", "in this memory cgroup"),
        ("0::/../..\n", "sys/fs/cgroup/memory.events", "in this memory cgroup"),
        (
            "4:cpu,memory:/jobs/1\n0::/\n",
            "sys/fs/cgroup/memory/jobs/1/memory.oom_control",
            "in this memory cgroup",
        ),
        ("0::/\n", "proc/vmstat", "on this machine"),
    ],
)
def test_an_oom_kill_is_read_where_the_kernel_counts_it(
    tmp_path: Path, cgroup: str, events: str, where: str
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    counter_file = tmp_path / events
    counter_file.parent.mkdir(parents=True, exist_ok=True)
    counter_file.write_text("oom 7\noom_kill 3\noom_group_kill 0\n")
    counter = OomCounter(tmp_path)

    assert counter.struck() is None
    counter_file.write_text("oom 9\noom_kill 4\noom_group_kill 0\n")
    assert counter.struck() == where


def test_where_the_kernel_tells_nothing_there_was_no_oom_kill(tmp_path: Path) -> None:
    assert OomCounter(tmp_path).struck() is None


def test_a_command_that_the_oom_killer_ends_is_said_to_be(wrapper: Wrapper) -> None:
    groups = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    parent = next((g for g in groups if (g / "cgroup.procs").exists()), None)
    own = None
    if parent is not None and os.access(parent, os.W_OK):
        own = parent / f"orchard-infra-test-{os.getpid()}"
        try:
            own.mkdir()
        except OSError:
            own = None
    limit = own and next(
        (f for n in ("memory.max", "memory.limit_in_bytes") if (f := own / n).exists()), None
    )
    if own is None or limit is None:
        assert shutil.which("true")  # a machine where no memory cgroup can be made
        return
    try:
        limit.write_text(str(150 << 20))
        # The killer takes the one with the highest score: it must not be the wrapper.
        program = wrapper.script(
            """
            open("/proc/self/oom_score_adj", "w").write("1000")
            memory = []
            while True:
                memory.append(b"x" * (1 << 20))
            """
        )
        inside = f"echo $$ > {own}/cgroup.procs"
        wrapped = f"{COMMAND} run -p digits -- {sys.executable} {program}"
        script = run_command(wrapper.tmp_path, ["sh", "-c", f"{inside}; exec {wrapped}"])
        assert script.finish() == 137, script.transcript()
        assert "out-of-memory killer struck in this memory cgroup" in script.error_output
    finally:
        wait_until(lambda: not (own / "cgroup.procs").read_text())
        own.rmdir()
