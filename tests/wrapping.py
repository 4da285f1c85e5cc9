"""What the tests of `orchard-infra run` share: the command, started as a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import attrs
import psutil

from support import Script, run_command, wait_until

COMMAND = str(Path(sys.executable).with_name("orchard-infra"))


@attrs.frozen
class Wrapper:
    """Starts `orchard-infra run` in ``tmp_path``."""

    tmp_path: Path

    def start(self, *arguments: str, project: str = "digits", **popen: Any) -> Script:
        """``arguments`` are options, then the command; a ``--`` is put where there is none."""
        words = arguments if "--" in arguments else ("--", *arguments)
        return run_command(self.tmp_path, [COMMAND, "run", "-p", project, *words], **popen)

    def run(self, *arguments: str, **options: Any) -> Script:
        """The same, and wait for its end."""
        script = self.start(*arguments, **options)
        assert script.stdin is not None
        script.stdin.close()
        script.finish()
        return script

    def script(self, text: str, name: str = "train.py") -> str:
        """A Python program for it to run; its name."""
        (self.tmp_path / name).write_text(textwrap.dedent(text), "utf-8")
        return name

    def report(self, name: str = "report.json") -> dict[str, Any]:
        found = json.loads((self.tmp_path / name).read_text("utf-8"))
        assert isinstance(found, dict)
        return found


def child_of(script: Script) -> psutil.Process:
    """The command that a wrapper runs."""
    return _child(script.pid, is_witness=False)


def wait_for_witness(pid: int, *, after: int = 0) -> int:
    """Until the wrapper can tell a signal for the whole group from one for itself.

    Returns the pid of the witness; it is another one ``after`` the one that has seen a signal.
    """
    return _child(pid, is_witness=True, but=after).pid


def _child(pid: int, *, is_witness: bool, but: int = 0) -> psutil.Process:
    def find() -> psutil.Process | None:
        for child in psutil.Process(pid).children():
            try:
                if (COMMAND in child.cmdline()) == is_witness and child.pid != but:
                    return child
            except psutil.NoSuchProcess:
                pass
        return None

    found = wait_until(find)
    assert found is not None
    return found


# Says which signals it gets, and when it is ready. USR2 ends it, after what came with it. Taken
# one at a time: in a handler, the next one would come before the first has been told.
LISTENER = r"""
    import os, signal, sys

    awaited = {getattr(signal, "SIG" + name) for name in sys.argv[1:]}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    print("ready", os.getpid(), flush=True)
    while True:
        signum = signal.sigwait(awaited)
        if signum == signal.SIGUSR2 and signal.sigpending() & awaited - {signum}:
            os.kill(os.getpid(), signum)
            signum = signal.sigwait(awaited - {signum})
        os.write(1, f"got {signal.Signals(signum).name}\n".encode())
        if signum == signal.SIGUSR2:
            os._exit(7)
"""


def is_stopped(pid: int) -> bool:
    return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def is_pending(pid: int, signum: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = re.findall(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)
    return bool(int(mask, 16) >> (signum - 1) & 1)


def send(script: Script, *signals: signal.Signals) -> None:
    for signum in signals:
        os.kill(script.pid, signum)
