"""`orchard-infra run` when its terminal is closed: a window, an ssh connection, a tmux server."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import sys
import termios
from pathlib import Path

import attrs
import pytest

from support import Script, run_command, wait_gone, wait_until
from wrapping import COMMAND, LISTENER, Wrapper

# Below a shell script, which ends at once from a signal.
SAVER = """
    import os, signal, sys, time
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM})
    print("ready", os.getpid(), flush=True)
    print("got", signal.Signals(signal.sigwait({signal.SIGHUP, signal.SIGTERM})).name, flush=True)
    time.sleep(0.5)
    print("saved", flush=True)
"""


@attrs.define
class Terminal:
    """A terminal whose session a command leads; the output of the command goes to files."""

    script: Script
    _master: int

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self._master)


def in_terminal_of_its_own(tmp_path: Path, *command: str) -> Terminal:
    master, slave = pty.openpty()

    def lead() -> None:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        os.dup2(slave, 0)

    script = run_command(tmp_path, command, preexec_fn=lead, pass_fds=(slave,))
    os.close(slave)
    return Terminal(script, master)


def heard(script: Script) -> list[str]:
    return [line.split()[1] for line in script.output.splitlines() if line.startswith("got ")]


def test_a_closed_terminal_is_passed_on_by_the_leader_of_its_session(wrapper: Wrapper) -> None:
    words = ("--", sys.executable, wrapper.script(LISTENER), "HUP", "USR2")
    terminal = in_terminal_of_its_own(wrapper.tmp_path, COMMAND, "run", "-p", "digits", *words)
    pid = int(terminal.script.wait_for("ready").split()[1])

    terminal.close()
    wait_until(lambda: heard(terminal.script), what=terminal.script.transcript)
    os.kill(pid, 12)  # SIGUSR2 ends it, after whatever else has come

    assert terminal.script.finish() == 7
    assert heard(terminal.script) == ["SIGHUP", "SIGUSR2"]


def test_a_trainer_below_a_script_saves_when_its_terminal_is_closed(wrapper: Wrapper) -> None:
    line = f"{sys.executable} {wrapper.script(SAVER)}; true"
    command = (COMMAND, "run", "-p", "digits", "--grace", "0.1", "--", "bash", "-c", line)
    terminal = in_terminal_of_its_own(wrapper.tmp_path, *command)
    terminal.script.wait_for("ready")

    terminal.close()

    assert terminal.script.finish() == 129
    assert heard(terminal.script) == ["SIGTERM"]
    assert "saved" in terminal.script.output
    assert wrapper.run("true").returncode == 0


def test_below_a_shell_without_job_control_the_signal_comes_once(wrapper: Wrapper) -> None:
    # The shell leads the session, and ends at once: then the kernel signals the whole group.
    program = wrapper.script(LISTENER)
    line = f"{COMMAND} run -p digits -- {sys.executable} {program} HUP USR2; true"
    terminal = in_terminal_of_its_own(wrapper.tmp_path, "bash", "-c", line)
    pid = int(terminal.script.wait_for("ready").split()[1])

    terminal.close()
    wait_until(lambda: heard(terminal.script), what=terminal.script.transcript)
    os.kill(pid, 12)
    wait_gone([pid])

    assert heard(terminal.script) == ["SIGHUP", "SIGUSR2"]


def test_below_an_interactive_shell_the_command_is_told(wrapper: Wrapper) -> None:
    program = wrapper.script(SAVER)
    terminal = in_terminal_of_its_own(wrapper.tmp_path, "bash", "--norc", "--noprofile", "-i")
    terminal.type(f"{COMMAND} run -p digits -- {sys.executable} {program}")
    pid = int(terminal.script.wait_for("ready").split()[1])

    terminal.close()
    wait_gone([pid])

    assert heard(terminal.script) == ["SIGHUP"]
    wait_until(lambda: wrapper.run("true").returncode == 0)


@pytest.mark.parametrize("how", ["command", "shell"])
def test_when_a_tmux_server_ends_the_command_is_told(wrapper: Wrapper, how: str) -> None:
    if shutil.which("tmux") is None:
        pytest.skip("needs a real tmux")
    tmux = ("tmux", "-S", str(wrapper.tmp_path / "socket"), "-f", "/dev/null")
    program = wrapper.script(SAVER)
    line = f"{COMMAND} run -p digits -- {sys.executable} {program} > {wrapper.tmp_path}/out 2>&1"
    if how == "shell":
        server = [*tmux, "new-session", "-d", "bash --norc --noprofile -i"]
    else:
        server = [*tmux, "new-session", "-d", f"exec {line}"]
    assert run_command(wrapper.tmp_path, server).finish() == 0
    if how == "shell":
        typed = [*tmux, "send-keys", line, "Enter"]
        assert run_command(wrapper.tmp_path, typed).finish() == 0
    out = wrapper.tmp_path / "out"
    wait_until(lambda: out.exists() and out.read_text().startswith("ready"))

    assert run_command(wrapper.tmp_path, [*tmux, "kill-server"]).finish() == 0

    wait_until(lambda: "saved" in out.read_text(), what=lambda: out.read_text())
    assert "got SIGHUP" in out.read_text()
    wait_until(lambda: wrapper.run("true").returncode == 0)
