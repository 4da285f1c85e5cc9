"""`orchard-infra run`: signals reach the command, each of them once."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from support import Script, is_running, run_command, run_python, wait_gone, wait_until
from wrapping import (
    COMMAND,
    LISTENER,
    Wrapper,
    child_of,
    is_pending,
    is_stopped,
    send,
    wait_for_witness,
)

FORWARDED = ["INT", "TERM", "HUP", "QUIT", "USR1", "WINCH", "ALRM"]


def listen(wrapper: Wrapper, *names: str, **popen: object) -> Script:
    """A command that says which of these signals it gets; USR2 ends it."""
    program = wrapper.script(LISTENER)
    script = wrapper.start(sys.executable, program, *names, "USR2", **popen)
    script.wait_for("ready")
    return script


def heard(script: Script) -> list[str]:
    return [line.split()[1] for line in script.output.splitlines() if line.startswith("got ")]


@pytest.mark.parametrize("name", FORWARDED)
def test_a_signal_to_the_wrapper_is_passed_on(wrapper: Wrapper, name: str) -> None:
    script = listen(wrapper, name)

    for _ in range(2):
        send(script, signal.Signals[f"SIG{name}"])
        wait_until(lambda: heard(script), what=script.transcript)
    send(script, signal.SIGUSR2)

    assert script.finish() == 7
    assert set(heard(script)) == {f"SIG{name}", "SIGUSR2"}


def test_a_signal_that_the_command_may_not_be_sent_does_not_end_the_wrapper(tmp_path: Path) -> None:
    """A command such as sudo is a process of another user."""
    source = """
        import os, signal, sys
        from orchard_infra.cli import main
        def refuse(pid, signum, kill=os.kill):
            if signum == signal.SIGUSR1:
                raise PermissionError(1, "Operation not permitted")
            kill(pid, signum)
        os.kill = refuse
        sys.argv = ["orchard-infra", "run", "-p", "digits", "--", *sys.argv[1:]]
        main()
    """
    script = run_python(tmp_path, source, "sh", "-c", "echo ready; read line; exit 3")
    script.wait_for("ready")
    script.send_signal(signal.SIGUSR1)
    wait_until(lambda: "cannot be passed on" in script.error_output, what=script.transcript)
    script.tell()
    assert script.finish() == 3, script.transcript()


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1"])
def test_a_signal_to_the_whole_group_comes_once(wrapper: Wrapper, name: str) -> None:
    script = listen(wrapper, name, start_new_session=True)
    wait_for_witness(script.pid)

    os.killpg(script.pid, signal.Signals[f"SIG{name}"])
    # What is passed on comes in order: after this one nothing more can come of the first.
    send(script, signal.SIGUSR2)

    assert script.finish() == 7
    assert heard(script) == [f"SIG{name}", "SIGUSR2"]


def test_a_signal_to_each_process_comes_once_again_and_again(wrapper: Wrapper) -> None:
    script = listen(wrapper, "TERM")
    witness = 0
    for count in range(1, 4):
        witness = wait_for_witness(script.pid, after=witness)
        # A scheduler signals every process of a job, one after the other.
        for process in psutil.Process(script.pid).children():
            process.terminate()
        send(script, signal.SIGTERM)
        wait_until(lambda count=count: len(heard(script)) == count, what=script.transcript)
    send(script, signal.SIGUSR2)

    assert script.finish() == 7
    assert heard(script) == ["SIGTERM"] * 3 + ["SIGUSR2"]


def test_the_wrapper_outlives_every_signal_but_sigkill(wrapper: Wrapper) -> None:
    script = listen(wrapper, *FORWARDED)

    for name in FORWARDED:
        send(script, signal.Signals[f"SIG{name}"])
    wait_until(lambda: len(set(heard(script))) == len(FORWARDED), what=script.transcript)

    assert script.poll() is None
    assert wrapper.run("true").returncode == os.EX_TEMPFAIL


def test_a_signal_while_another_one_is_dealt_with_is_not_taken_by_a_thread(
    wrapper: Wrapper,
) -> None:
    # The wrapper has a thread that renews the lock. One that took the signal would end it.
    script = listen(wrapper, "USR1", "RTMIN")
    wait_for_witness(script.pid)

    send(script, signal.SIGUSR1, signal.SIGRTMIN)  # the first takes a moment

    wait_until(lambda: len(heard(script)) == 2, what=script.transcript)
    assert set(heard(script)) == {"SIGUSR1", "SIGRTMIN"}
    send(script, signal.SIGUSR2)
    assert script.finish() == 7


def test_a_stop_and_a_continue_to_the_wrapper_alone_take_the_command_along(
    wrapper: Wrapper,
) -> None:
    # In a group of its own below ours: to one that nobody could continue, as a job is that has
    # outlived its shell, the kernel sends no SIGTSTP.
    script = listen(wrapper, preexec_fn=os.setpgrp)
    command = child_of(script)

    send(script, signal.SIGTSTP)
    wait_until(lambda: is_stopped(script.pid) and is_stopped(command.pid))
    send(script, signal.SIGCONT)
    wait_until(lambda: not is_stopped(script.pid) and not is_stopped(command.pid))

    send(script, signal.SIGUSR2)
    assert script.finish() == 7


def test_a_stop_right_after_a_continue_is_not_undone(wrapper: Wrapper) -> None:
    """A Ctrl-Z that comes while the wrapper looks who else has got the SIGCONT."""
    script = listen(wrapper, preexec_fn=os.setpgrp)
    command = child_of(script)
    wait_for_witness(script.pid)

    send(script, signal.SIGCONT)
    wait_until(lambda: not is_pending(script.pid, signal.SIGCONT))
    os.killpg(script.pid, signal.SIGTSTP)

    wait_until(lambda: is_stopped(script.pid) and is_stopped(command.pid))
    os.killpg(script.pid, signal.SIGCONT)
    send(script, signal.SIGUSR2)
    assert script.finish() == 7


def test_a_command_that_is_stopped_for_a_while_does_not_stop_the_wrapper(wrapper: Wrapper) -> None:
    script = listen(wrapper)
    command = child_of(script)

    command.suspend()
    wait_until(lambda: is_stopped(command.pid))
    command.resume()
    command.send_signal(signal.SIGUSR2)

    assert script.finish() == 7


def test_an_ignored_sighup_stays_ignored(wrapper: Wrapper) -> None:
    program = wrapper.script(LISTENER)
    line = f"trap '' HUP; exec {COMMAND} run -p digits -- {sys.executable} {program} HUP USR2"
    script = run_command(wrapper.tmp_path, ["sh", "-c", line])
    script.wait_for("ready")
    wait_for_witness(script.pid)

    send(script, signal.SIGHUP, signal.SIGUSR2)

    assert script.finish() == 7
    assert heard(script) == ["SIGUSR2"]


def test_timeout_around_it_is_one_signal(wrapper: Wrapper) -> None:
    program = wrapper.script(LISTENER)
    script = run_command(
        wrapper.tmp_path,
        [
            *("timeout", "--signal=TERM", "1000", COMMAND, "run", "-p", "digits", "--"),
            *(sys.executable, program, "TERM", "USR2"),
        ],
    )
    pid = int(script.wait_for("ready").split()[1])
    wrapper_pid = psutil.Process(pid).ppid()
    wait_for_witness(wrapper_pid)

    send(script, signal.SIGTERM)  # it passes that on to its child and to its whole group
    wait_until(lambda: heard(script), what=script.transcript)
    os.kill(wrapper_pid, signal.SIGUSR2)

    assert script.finish() == 7
    assert heard(script) == ["SIGTERM", "SIGUSR2"]


def test_the_witness_ends_with_a_killed_wrapper(wrapper: Wrapper) -> None:
    script = listen(wrapper)
    wait_for_witness(script.pid)
    children = [child.pid for child in psutil.Process(script.pid).children()]
    command = child_of(script)

    script.kill()
    script.wait()

    wait_gone(set(children) - {command.pid})
    assert is_running(command.pid)
    command.kill()


WAITS = """
    import signal, sys
    from orchard_infra.cli.run.supervisor import _wait_for_signal

    awaited = {signal.SIGUSR1, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, {*awaited, signal.SIGALRM})
    print("waits", flush=True)
    print("got", _wait_for_signal(awaited, 0.3), flush=True)
    print("got", _wait_for_signal(awaited, 60).si_signo, flush=True)
    print("got", _wait_for_signal(awaited, 0), flush=True)
"""


def test_a_stop_that_outlasts_a_wait_for_signals_makes_none_up(tmp_path: Path) -> None:
    # The wrapper sent its command a signal out of random memory, or gave up and left it behind.
    script = run_python(tmp_path, WAITS)
    script.wait_for("waits")

    send(script, signal.SIGSTOP)
    wait_until(lambda: is_stopped(script.pid))
    time.sleep(0.4)
    send(script, signal.SIGCONT)
    script.wait_for("got None")
    send(script, signal.SIGUSR1)

    assert script.finish() == 0
    assert script.output.split("waits\n")[1] == f"got None\ngot {int(signal.SIGUSR1)}\ngot None\n"
