"""A server that has the package imported, and forks contenders.

It takes commands as lines of JSON from stdin, and tells what became of them on stdout. A signal
goes through it as well: only the parent knows that a pid is still that of its child.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncio  # noqa: F401 what contenders and the package import when they need it

import portalocker  # noqa: F401

from chaos import contender
from chaos.children import rename_this_process


def main() -> None:
    poller = select.poll()
    poller.register(0, select.POLLIN)
    children: dict[int, int] = {}  # pidfd: pid
    rest = b""
    while True:
        for fd, _ in poller.poll():
            if fd == 0:
                data = os.read(0, 65536)
                if not data:
                    for pid in children.values():
                        os.kill(pid, signal.SIGKILL)
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    _obey(json.loads(line), children, poller)
            else:
                pid = children.pop(fd)
                poller.unregister(fd)
                os.close(fd)
                _tell("end", pid=pid, status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _obey(command: dict[str, Any], children: dict[int, int], poller: select.poll) -> None:
    if "signal" in command:
        if command["pid"] in children.values():
            os.kill(command["pid"], command["signal"])
        else:
            _tell("missed", what=command["what"])
        return
    pid = os.fork()
    if not pid:
        try:
            _become(command)
        finally:
            os._exit(71)
    fd = os.pidfd_open(pid)
    children[fd] = pid
    poller.register(fd, select.POLLIN)
    _tell("started", pid=pid, id=command["id"])


def _become(command: dict[str, Any]) -> None:
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, 1024)
    if "exec" in command:
        os.execvp(command["exec"][0], command["exec"])
    rename_this_process([sys.executable, "-c", "#"])
    os._exit(contender.begin(json.loads(Path(command["plan"]).read_text())))


def _tell(event: str, **facts: Any) -> None:
    os.write(1, json.dumps({"event": event, **facts}).encode() + b"\n")


if __name__ == "__main__":
    gc.freeze()
    main()
