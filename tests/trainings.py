"""Starts the examples of frameworks, and ends them.

script = example(server, tmp_path, "lightning_train.py", "--steps", "100000000")
script.wait_for("is in training")
end(script, "Ctrl-C")
assert script.finish() == 0
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from forking import ForkedScript, ForkServer
from support import Script

EXAMPLES = Path(__file__).parents[1] / "examples" / "frameworks"
# The example itself, as the leader of a process group, as a shell would have started it.
_AS_MAIN = """
import os, runpy, sys
os.setpgid(0, 0)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_SIGNALS = {
    "Ctrl-C": (os.killpg, signal.SIGINT),  # a terminal signals the whole group
    "SIGTERM": (os.kill, signal.SIGTERM),
    "SIGTERM to the group": (os.killpg, signal.SIGTERM),
    "kill -9": (os.kill, signal.SIGKILL),
}


def example(
    server: ForkServer, tmp_path: Path, name: str, *arguments: str, runs_as: str = "main.py"
) -> ForkedScript:
    """Start an example, in a process group of its own."""
    return server.run_python(tmp_path, _AS_MAIN, str(EXAMPLES / name), *arguments, name=runs_as)


def end(script: Script, how: str) -> None:
    """End it by a signal. It leads a process group."""
    send, signum = _SIGNALS[how]
    send(script.pid, signum)
