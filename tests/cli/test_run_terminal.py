"""`orchard-infra run` in a terminal: keys, job control, size, and the spinner."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from support import is_running, wait_until
from wrapping import COMMAND, LISTENER, Wrapper, is_stopped, wait_for_witness

RUN = (COMMAND, "run", "-p", "digits")
PROMPT = "bash-prompt> "

InTerminal = Callable[..., Any]


def listen(wrapper: Wrapper, in_terminal: InTerminal, *names: str) -> Any:
    """A command in a terminal that says which of these signals it gets; USR2 ends it."""
    child = in_terminal(*RUN, "--", sys.executable, wrapper.script(LISTENER), *names, "USR2")
    child.expect("ready (\\d+)\r\n")
    return child


@pytest.fixture
def shell(in_terminal: InTerminal) -> Any:
    """An interactive bash, which has job control."""
    child = in_terminal("bash", "--norc", "--noprofile", "-i", env={"PS1": PROMPT})
    child.expect_exact(PROMPT)
    child.sendline("set +o emacs; bind 'set enable-bracketed-paste off' 2>/dev/null")
    child.expect_exact(PROMPT)
    return child


def ended(child: Any) -> int:
    import pexpect

    child.expect(pexpect.EOF)
    child.wait()
    assert child.signalstatus is None
    return int(child.exitstatus)


def test_the_command_has_the_terminal(in_terminal: InTerminal) -> None:
    program = "import sys; print([s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)])"
    child = in_terminal(*RUN, "--", sys.executable, "-c", program)

    child.expect_exact("[True, True, True]")
    assert ended(child) == 0


def test_what_is_typed_reaches_the_command(in_terminal: InTerminal) -> None:
    child = in_terminal(*RUN, "--", "sh", "-c", "read line; echo heard $line")
    child.sendline("hello")

    child.expect_exact("heard hello")
    assert ended(child) == 0


# Ctrl-C


def test_ctrl_c_reaches_the_command_once(wrapper: Wrapper, in_terminal: InTerminal) -> None:
    child = listen(wrapper, in_terminal, "INT")
    pid = int(child.match[1])

    child.sendintr()
    child.expect_exact("got SIGINT")
    # Passed on after whatever might still be passed on of the Ctrl-C.
    psutil.Process(child.pid).send_signal(signal.SIGUSR2)
    child.expect("(.*)got SIGUSR2")

    assert "SIGINT" not in child.match[1]
    assert ended(child) == 7
    assert not is_running(pid)


def test_after_a_ctrl_c_the_same_signal_is_still_passed_on(
    wrapper: Wrapper, in_terminal: InTerminal
) -> None:
    child = listen(wrapper, in_terminal, "INT")
    witness = wait_for_witness(child.pid)
    child.sendintr()
    child.expect_exact("got SIGINT")
    wait_for_witness(child.pid, after=witness)  # while it is pending there is only one

    psutil.Process(child.pid).send_signal(signal.SIGINT)

    child.expect_exact("got SIGINT")
    psutil.Process(child.pid).send_signal(signal.SIGUSR2)
    assert ended(child) == 7


def test_ctrl_c_ends_a_command_that_does_not_handle_it(in_terminal: InTerminal) -> None:
    child = in_terminal(*RUN, "--", "sh", "-c", "echo ready; exec sleep 1000")
    child.expect_exact("ready")

    child.sendintr()

    assert ended(child) == 130
    assert "orchard-infra" not in child.before


def test_some_seconds_after_a_ctrl_c_one_hint_says_how_to_end_it(
    wrapper: Wrapper, in_terminal: InTerminal
) -> None:
    child = listen(wrapper, in_terminal, "INT")

    for _ in range(2):
        child.sendintr()
        child.expect_exact("got SIGINT")
    child.expect_exact("to end; Ctrl-\\ ends it at once")
    child.sendintr()
    child.expect_exact("got SIGINT")
    child.sendcontrol("\\")

    assert ended(child) == 128 + signal.SIGQUIT
    assert "orchard-infra: waiting" not in child.before


def test_ctrl_c_at_a_prompt_is_no_request_to_stop(in_terminal: InTerminal) -> None:
    child = in_terminal(*RUN, "--", sys.executable, "-q", "-i", env={"PYTHON_BASIC_REPL": "1"})
    for _ in range(4):
        child.expect_exact(">>> ")
        child.sendintr()
        child.expect_exact("KeyboardInterrupt")

    child.expect_exact(">>> ")
    child.sendline("raise SystemExit(3)")
    assert ended(child) == 3


def test_a_shell_in_it_has_its_own_jobs(in_terminal: InTerminal) -> None:
    child = in_terminal(*RUN, "--", "bash", "--norc", "-i", env={"PS1": PROMPT})
    child.expect_exact(PROMPT)
    for _ in range(3):
        child.sendline("sleep 1000")
        child.expect_exact("sleep 1000")
        shell_pid = psutil.Process(child.pid).children()[0].pid
        wait_until(lambda pid=shell_pid: _sleepers(pid))
        child.sendintr()
        child.expect_exact(PROMPT)

    child.sendline("exit 4")
    assert ended(child) == 4


def _sleepers(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children()
    return [process for process in found if process.name() == "sleep"]


def test_ctrl_backslash_reaches_the_command_once(wrapper: Wrapper, in_terminal: InTerminal) -> None:
    child = listen(wrapper, in_terminal, "QUIT")

    child.sendcontrol("\\")
    child.expect_exact("got SIGQUIT")
    psutil.Process(child.pid).send_signal(signal.SIGUSR2)

    assert ended(child) == 7
    assert "SIGQUIT" not in child.before


# Job control


def test_ctrl_z_and_fg_work(wrapper: Wrapper, shell: Any) -> None:
    program = wrapper.script(LISTENER)
    shell.sendline(f"{' '.join(RUN)} -- {sys.executable} {program} INT USR2; echo status $?")
    shell.expect("ready (\\d+)\r\n")
    pid = int(shell.match[1])

    for _ in range(2):
        shell.sendcontrol("z")
        shell.expect_exact("Stopped")
        shell.expect_exact(PROMPT)
        assert is_stopped(pid)
        assert is_stopped(psutil.Process(pid).ppid())
        shell.sendline("fg")
        shell.expect_exact(RUN[0])
        wait_until(lambda: not is_stopped(pid))

    shell.sendintr()
    shell.expect_exact("got SIGINT")
    psutil.Process(pid).send_signal(signal.SIGUSR2)
    shell.expect_exact(PROMPT)
    shell.sendline("echo the status was $?")
    shell.expect_exact("the status was 7")


def test_a_stopped_command_runs_on_in_the_background(wrapper: Wrapper, shell: Any) -> None:
    program = wrapper.script(LISTENER)
    shell.sendline(f"{' '.join(RUN)} -- {sys.executable} {program} TERM USR2")
    shell.expect("ready (\\d+)\r\n")
    pid = int(shell.match[1])
    shell.sendcontrol("z")
    shell.expect_exact(PROMPT)

    shell.sendline("bg")
    shell.expect_exact(PROMPT)
    wait_for_witness(psutil.Process(pid).ppid())
    shell.sendline("kill %1")
    shell.expect_exact("got SIGTERM")
    psutil.Process(pid).send_signal(signal.SIGUSR2)
    shell.sendline("wait %1; echo the status was $?")
    shell.expect("the status was (\\d+)\r\n")

    assert shell.match[1] == "7"
    assert "got SIGTERM" not in shell.before


def test_a_background_command_that_reads_stops_until_it_is_in_the_foreground(shell: Any) -> None:
    shell.sendline(f"{' '.join(RUN)} -- sh -c 'read line; echo heard $line' &")
    shell.expect(r"\[1\] (\d+)")
    wrapper_pid = int(shell.match[1])
    wait_until(lambda: is_stopped(wrapper_pid))

    shell.sendline("fg")
    shell.expect_exact("read line")
    shell.sendline("hello")
    shell.expect_exact("heard hello")
    shell.expect_exact(PROMPT)
    assert not is_running(wrapper_pid)


def test_a_resize_reaches_the_command_once(wrapper: Wrapper, in_terminal: InTerminal) -> None:
    child = listen(wrapper, in_terminal, "WINCH")

    child.setwinsize(40, 100)
    child.expect_exact("got SIGWINCH")
    psutil.Process(child.pid).send_signal(signal.SIGUSR2)

    assert ended(child) == 7
    assert "SIGWINCH" not in child.before


def test_a_killed_editor_leaves_a_usable_terminal(wrapper: Wrapper, shell: Any) -> None:
    program = wrapper.script(
        """
        import os, signal, tty
        tty.setraw(0)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    command = f"{' '.join(RUN)} -- {sys.executable} {program}"
    shell.sendline(f"bash -c '{command}; stty -a'")

    shell.expect(r"\s(-?)icanon")
    assert shell.match[1] == ""


def test_the_terminal_comes_back_from_a_killed_shell(wrapper: Wrapper, shell: Any) -> None:
    shell.sendline(
        f"bash -c '{' '.join(RUN)} -- bash --norc -i; read line; echo heard $line again'"
    )
    shell.expect(r"bash-[\d.]+[#$] ")
    shell.sendline("kill -KILL $$")
    shell.expect_exact("SIGKILL")
    shell.sendline("hello")

    shell.expect_exact("heard hello again")
    shell.expect_exact(PROMPT)
    assert shell.isalive()


# Waiting


def test_a_spinner_says_who_holds_the_project_and_leaves_nothing(
    wrapper: Wrapper, in_terminal: InTerminal
) -> None:
    first = wrapper.start("sh", "-c", "echo ready; read line")
    first.wait_for("ready")
    child = in_terminal(*RUN, "--wait", "--", "echo", "mine")

    child.expect(rf"digits.*: waiting 0 s; held for \d+ s by pid {first.pid} on .*: sh -c echo")
    child.expect(r"waiting 1 s;")
    first.tell()

    child.expect_exact("mine")
    assert ended(child) == 0
    assert re.search(r"\x1b\[2K.*$", child.before) is None
    assert first.finish() == 0


def test_ctrl_c_ends_the_wait(wrapper: Wrapper, in_terminal: InTerminal) -> None:
    first = wrapper.start("sh", "-c", "echo ready; read line")
    first.wait_for("ready")
    child = in_terminal(*RUN, "--wait", "--", "echo", "never")
    child.expect_exact("waiting")

    child.sendintr()

    assert ended(child) == 130
    assert "never" not in child.before
    assert "Traceback" not in child.before
