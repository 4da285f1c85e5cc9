"""`orchard-infra stop`, with runs that stop, that do not, and that are none."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from commands import (
    COMMAND,
    OWN_SIZE,
    killed,
    orchard_infra,
    plant,
    queue,
    status_of,
    train,
    wait_for_state,
)
from support import (
    UNDER_ANOTHER_HOST_NAME,
    Script,
    is_running,
    needs_namespaces,
    run_command,
    run_python,
    wait_gone,
    wait_until,
)

# Hears SIGTERM and goes on; so does its child, in a session of its own.
STUBBORN = """
    import os, signal, sys, time
    from orchard_infra import InfrastructureManager, managed_environment

    with managed_environment("digits", manager=InfrastructureManager(stopper=None)):
        signal.signal(signal.SIGTERM, lambda *_: print("heard", os.getpid(), flush=True))
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.setsid()
            os.write(writer, b"x")
        else:
            os.read(reader, 1)
            print("ready", flush=True)
        while True:
            time.sleep(600)
"""


def stubborn(tmp_path: Path) -> Script:
    run = run_python(tmp_path, STUBBORN, name="stubborn.py")
    run.wait_for("ready")
    return run


def stop(tmp_path: Path, *words: str, expect: int = 0) -> Script:
    return orchard_infra(tmp_path, "stop", *words, expect=expect)


@pytest.mark.parametrize("by", ["project", "pid"])
def test_a_run_saves_and_ends(tmp_path, by):
    run = train(tmp_path, "digits", SAVE="0.2", FORK="1")
    pids = status_of(tmp_path)[0]["pids"]
    script = stop(tmp_path, "digits" if by == "project" else str(run.pid))
    assert "stopping RunStopped" in run.output
    assert "saved" in run.output
    assert run.finish() == 128 + signal.SIGTERM
    assert f"digits (pid {run.pid}): stopped after" in script.output
    wait_gone(pids)
    assert status_of(tmp_path) == []


def test_those_that_wait_go_first_and_never_begin(tmp_path):
    run = train(tmp_path, "digits", SAVE="0.3")
    waiter = queue(tmp_path, "digits")
    wait_for_state(tmp_path, "digits", "running", "waiting")
    stop(tmp_path, "digits")
    assert run.finish() == waiter.finish() == 128 + signal.SIGTERM
    assert "ready" not in waiter.output


def test_by_its_pid_a_waiting_run_is_stopped_and_the_other_goes_on(tmp_path):
    run = train(tmp_path, "digits")
    waiter = queue(tmp_path, "digits")
    wait_for_state(tmp_path, "digits", "running", "waiting")
    stop(tmp_path, str(waiter.pid))
    assert waiter.finish() == 128 + signal.SIGTERM
    assert is_running(run.pid)


def test_what_does_not_stop_is_killed_with_its_tree_after_the_grace(tmp_path):
    run = stubborn(tmp_path)
    pids = status_of(tmp_path)[0]["pids"]
    script = stop(tmp_path, "digits", "--grace", "0.3")
    assert len(pids) == 2
    wait_gone(pids)
    assert run.finish() == -signal.SIGKILL
    assert f"heard {run.pid}" in run.output  # it was asked first
    assert "killed: it did not stop within 0.3 s; 1 process of it killed" in script.output


def test_who_outlives_the_run_is_stopped_as_well(tmp_path):
    # Without a handler SIGTERM ends the leader at once, and its children live on.
    run = run_python(
        tmp_path,
        """
        import os, signal, sys, time
        from orchard_infra import InfrastructureManager, managed_environment
        with managed_environment("digits", manager=InfrastructureManager(stopper=None)):
            for _ in range(2):
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(600)
            os.posix_spawn(sys.executable, [sys.executable, "-c", "input()"], os.environ,
                           setsid=True)
            print("ready", flush=True)
            time.sleep(600)
        """,
    )
    run.wait_for("ready")
    wait_until(lambda: len(status_of(tmp_path)[0]["pids"]) == 4)
    pids = status_of(tmp_path)[0]["pids"]
    script = stop(tmp_path, "digits")
    wait_gone(pids)
    assert "3 processes of it stopped" in script.output


def test_survivors_of_a_dead_run_are_stopped(tmp_path):
    killed(tmp_path, "digits", FORK="2", EXEC="1")
    (row,) = status_of(tmp_path)
    script = stop(tmp_path, "digits")
    assert len(row["pids"]) == 3
    wait_gone(row["pids"])
    assert "was dead already; 3 processes of it stopped" in script.output


def test_a_dead_run_is_nothing_to_stop(tmp_path):
    killed(tmp_path, "digits")
    assert "was dead already; what it left is removed by" in stop(tmp_path, "digits").output


def test_a_stopped_run_hears_that_it_is_asked(tmp_path):
    run = train(tmp_path, "digits")
    run.send_signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(run.pid).status() == psutil.STATUS_STOPPED)
    stop(tmp_path, "digits")
    assert "saved" in run.output
    assert run.finish() == 128 + signal.SIGTERM


def test_a_command_behind_the_wrapper_is_stopped(tmp_path):
    (tmp_path / "train.sh").write_text(
        "trap 'echo saved; exit 3' TERM; echo ready; sleep 600 & wait"
    )
    run = run_command(tmp_path, [COMMAND, "run", "-p", "digits", "--", "bash", "train.sh"])
    run.wait_for("ready")
    pids = status_of(tmp_path)[0]["pids"]
    stop(tmp_path, "digits")
    assert run.finish() == 3
    assert "saved" in run.output
    wait_gone(pids)


def test_the_ranks_that_a_run_started_are_stopped_with_it(tmp_path):
    # Rank 1 has a record of its own, and hears nothing through the one that started it.
    rank = """
        import os, signal, sys, time
        from orchard_infra import managed_environment
        with managed_environment("ddp"):
            print("rank", os.getpid(), flush=True)
            time.sleep(600)
    """
    (tmp_path / "rank.py").write_text("\n".join(line[8:] for line in rank.splitlines()))
    launcher = run_python(
        tmp_path,
        """
        import os, subprocess, sys, time
        from orchard_infra import managed_environment
        with managed_environment("ddp"):
            subprocess.Popen([sys.executable, "rank.py"], start_new_session=True,
                             env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"})
            time.sleep(600)
        """,
        name="launch.py",
    )
    pid = int(launcher.wait_for("rank").split()[1])
    assert {run["pid"] for run in status_of(tmp_path)} == {launcher.pid, pid}
    stop(tmp_path, str(launcher.pid))
    wait_gone([pid])
    assert status_of(tmp_path) == []


def test_a_rank_is_stopped_with_all_ranks_of_its_job_and_no_other_job(tmp_path):
    (tmp_path / "rank.py").write_text(
        "import os, sys, time\n"
        "from orchard_infra import managed_environment\n"
        "with managed_environment(sys.argv[1]):\n"
        "    print('rank', os.environ['RANK'], os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    launcher = """
        import os, subprocess, sys
        for rank in range(2):
            subprocess.Popen(
                [sys.executable, "rank.py", sys.argv[1]], start_new_session=True,
                # What torchrun gives to every job that has no name.
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2",
                     "TORCHELASTIC_RUN_ID": "none"},
            )
        input()
    """
    jobs = [
        run_python(tmp_path, launcher, project, name="launch.py") for project in ("ddp", "other")
    ]
    pids = [[int(job.wait_for(f"rank {rank}").split()[2]) for rank in range(2)] for job in jobs]
    script = stop(tmp_path, str(pids[0][1]))
    wait_gone(pids[0])
    assert script.output.count("ddp (pid") == 2
    assert {run["pid"] for run in status_of(tmp_path)} == set(pids[1])


@pytest.mark.slow
def test_another_run_that_was_started_in_the_run_is_sacred(tmp_path):
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
        import signal, subprocess, sys, time
        from orchard_infra import InfrastructureManager, managed_environment
        with managed_environment("digits", manager=InfrastructureManager(stopper=None)):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            subprocess.Popen([sys.executable, "inner.py"])
            time.sleep(600)
        """,
    )
    inner = int(outer.wait_for("inner").split()[1])
    stop(tmp_path, "digits", "--grace", "0.2")
    assert outer.finish() == -signal.SIGKILL
    assert is_running(inner)
    assert [run["project"] for run in status_of(tmp_path) if run["state"] == "running"] == [
        "letters"
    ]


def test_a_run_within_a_run_is_stopped_alone(tmp_path):
    (tmp_path / "inner.py").write_text(
        "import os, signal, time\n"
        "from orchard_infra import InfrastructureManager, managed_environment\n"
        "with managed_environment('letters', manager=InfrastructureManager(stopper=None)):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
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
            print("it has gone", flush=True)
            input()
        """,
    )
    outer.wait_for("inner")
    # Its ancestors lead another live run: that must not make it untouchable.
    stop(tmp_path, "letters", "--grace", "0.2")
    outer.wait_for("it has gone")
    assert is_running(outer.pid)


def test_a_daemon_that_opted_out_is_left_alone(tmp_path):
    run = run_python(
        tmp_path,
        """
        import os, subprocess, sys, time
        from orchard_infra import managed_environment
        with managed_environment("digits"):
            daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                                      env={**os.environ, "ORCHARD_INFRA_RUN_ID": ""})
            print("daemon", daemon.pid, flush=True)
            time.sleep(600)
        """,
    )
    daemon = int(run.wait_for("daemon").split()[1])
    stop(tmp_path, "digits")
    run.finish()
    assert is_running(daemon)


def test_a_run_that_has_ended_is_not_stopped_with_its_program(tmp_path):
    program = run_python(
        tmp_path,
        """
        import multiprocessing
        from orchard_infra import managed_environment
        if __name__ == "__main__":
            with managed_environment("digits"):
                pool = multiprocessing.get_context("fork").Pool(1)
            print("ready", flush=True)
            input()
        """,
    )
    program.wait_for("ready")
    for word in ("digits", str(program.pid)):
        script = stop(tmp_path, word, expect=1)
        assert "has ended, and its program goes on" in script.output
        assert f"kill {program.pid}" in script.output
    assert is_running(program.pid)
    assert len(status_of(tmp_path)[0]["pids"]) == 1


def test_earlier_runs_of_a_program_end_with_it(tmp_path):
    program = run_python(
        tmp_path,
        """
        import multiprocessing, time
        from orchard_infra import managed_environment
        if __name__ == "__main__":
            with managed_environment("digits"):
                pool = multiprocessing.get_context("fork").Pool(1)
            with managed_environment("digits"):
                print("ready", flush=True)
                time.sleep(600)
        """,
    )
    program.wait_for("ready")
    pids = {pid for row in status_of(tmp_path) for pid in row["pids"]}
    stop(tmp_path, "digits")
    wait_gone(pids)
    assert status_of(tmp_path) == []


def test_there_is_no_such_run(tmp_path):
    train(tmp_path, "digits")
    script = stop(tmp_path, "letters", expect=3)
    assert script.error_output == "Error: no run of project letters. There are runs of: digits\n"


def test_a_process_that_is_in_no_run_is_not_touched(tmp_path):
    stranger = run_python(tmp_path, "print('ready', flush=True)\ninput()", name="stranger.py")
    stranger.wait_for("ready")
    script = stop(tmp_path, str(stranger.pid), expect=3)
    assert "in no run is not touched" in script.error_output
    assert is_running(stranger.pid)


def test_the_pid_of_a_worker_leads_to_its_run(tmp_path):
    run = train(tmp_path, "digits", FORK="1")
    (worker,) = set(status_of(tmp_path)[0]["pids"]) - {run.pid}
    script = stop(tmp_path, str(worker), expect=3)
    assert f"orchard-infra stop {run.pid}" in script.error_output
    assert is_running(worker)
    assert is_running(run.pid)


@pytest.mark.parametrize("by", ["project", "pid"])
def test_who_got_the_pid_of_a_dead_run_is_not_touched(tmp_path, runtime_directory, by):
    stranger = run_python(tmp_path, "print('ready', flush=True)\ninput()", name="stranger.py")
    stranger.wait_for("ready")
    plant(runtime_directory, project="digits", pid=stranger.pid, create_time=1.0)
    stop(tmp_path, "digits" if by == "project" else str(stranger.pid))
    assert is_running(stranger.pid)


@needs_namespaces
def test_a_run_is_stopped_under_another_host_name_than_it_was_started_under(tmp_path):
    run = train(tmp_path, "digits")
    script = run_command(tmp_path, [*UNDER_ANOTHER_HOST_NAME, COMMAND, "stop", "digits"])
    assert script.finish() == 0, script.transcript()
    assert run.finish() == 128 + signal.SIGTERM
    assert f"digits (pid {run.pid}): stopped after" in script.output


def test_a_run_elsewhere_can_only_be_stopped_there(tmp_path, runtime_directory):
    stranger = run_python(
        tmp_path,
        """
        import fcntl, sys
        file = open(sys.argv[1], "r+")
        fcntl.flock(file, fcntl.LOCK_EX)
        print("ready", flush=True)
        sys.stdin.read()
        """,
        str(plant(runtime_directory, project="digits", pid_namespace=1, pid=os.getpid())),
    )
    stranger.wait_for("ready")
    script = stop(tmp_path, "digits", expect=1)
    assert "it can only be stopped from there" in script.output
    assert is_running(stranger.pid)


def test_a_wrong_grace_is_refused_before_anything_is_signalled(tmp_path):
    run = train(tmp_path, "digits")
    stop(tmp_path, "digits", "--grace", "-1", expect=2)
    assert is_running(run.pid)
    assert "stopping" not in run.output


def test_its_name_cannot_act_on_the_terminal(tmp_path, runtime_directory):
    plant(runtime_directory, project="evil\x1b[2J[red]")
    script = stop(tmp_path, "letters", expect=3)
    assert r"evil\x1b[2J[red]" in script.error_output
    script = stop(tmp_path, "evil\x1b[2J[red]")
    assert r"evil\x1b[2J[red] (pid" in script.output
    assert "\x1b" not in script.transcript()


def test_in_a_terminal_it_shows_how_far_it_is(tmp_path, in_terminal):
    run = stubborn(tmp_path)
    terminal = in_terminal(COMMAND, "stop", "digits", "--grace", "1.5", env=OWN_SIZE)
    terminal.expect_exact(f"digits (pid {run.pid}): asked to stop")
    terminal.expect_exact("of 1.5 s, 2 processes left")
    terminal.expect_exact("killed: it did not stop within 1.5 s")
    assert terminal.wait() == 0


def test_ctrl_c_leaves_it_to_the_run_to_stop(tmp_path, in_terminal):
    run = stubborn(tmp_path)
    terminal = in_terminal(COMMAND, "stop", "digits", env=OWN_SIZE)
    terminal.expect_exact("processes left")
    terminal.sendcontrol("c")
    terminal.expect_exact("goes on stopping; nothing more is killed")
    assert terminal.wait() == 128 + signal.SIGINT
    assert is_running(run.pid)


def test_a_run_may_be_stopped_from_within(tmp_path):
    run = run_python(
        tmp_path,
        """
        import json, subprocess, sys
        from orchard_infra import managed_environment
        with managed_environment("digits"):
            subprocess.run(json.loads(sys.argv[1]))
        """,
        json.dumps([COMMAND, "stop", "digits"]),
    )
    assert run.finish() == 128 + signal.SIGTERM


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs a real root")
def test_root_stops_no_run_of_somebody_else(tmp_path, runtime_directory):
    # A record that looks like root's own, of a process that is not.
    other = run_command(
        tmp_path,
        [sys.executable, "-c", "import os; os.setuid(65534); print('ready', flush=True); input()"],
    )
    other.wait_for("ready")
    stat = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()
    plant(
        runtime_directory,
        project="digits",
        pid=other.pid,
        create_time=int(stat[19]) / os.sysconf("SC_CLK_TCK"),
    )
    script = stop(tmp_path, "digits", "--grace", "0.2", expect=1)
    assert "not stopped" in script.output
    assert is_running(other.pid)
