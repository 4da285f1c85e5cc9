"""Scripts forked from a server that has imported the package: they start in 5 ms, not in 200.

    @pytest.fixture(scope="module", autouse=True)
    def fork_server():
        with ForkServer("orchard_infra") as server:
            yield server

    def test_something(tmp_path, fork_server):
        script = fork_server.run_python(tmp_path, '''print("ready")''')
        script.wait_for("ready")

A script ends as any Python does: by its exit status, an uncaught error, or a signal. For what has
to happen before the package is imported, or before Python is, there is `support.run_python`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LARGEST = 1 << 20  # bytes of a message


def _serve(channel: socket.socket) -> dict[str, Any]:
    """Fork a child for each request, and tell how it ended. Returns in the child."""
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    children: dict[int, int] = {}  # pidfd: pid
    while True:
        for fd, _ in poller.poll():
            if fd in children:
                pid = children.pop(fd)
                poller.unregister(fd)
                os.close(fd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                channel.send(json.dumps([pid, status]).encode())
                continue
            message = channel.recv(_LARGEST)
            if not message:
                for pid in children.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            pid = os.fork()
            if not pid:
                for inherited in (channel.detach(), *children):
                    os.close(inherited)
                request: dict[str, Any] = json.loads(message)
                return request
            channel.send(json.dumps(pid).encode())
            child = os.pidfd_open(pid)
            children[child] = pid
            poller.register(child, select.POLLIN)


def _become(request: dict[str, Any]) -> str:
    """Take on the directory, environment, arguments and files of a script. Returns its path."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    tempfile.tempdir = None  # it was found by the environment of the server
    for fd, (path, flags) in enumerate(request["files"]):
        opened = os.open(path, flags)
        os.dup2(opened, fd)
        os.close(opened)
    script: str = request["argv"][0]
    sys.argv[:] = request["argv"]
    sys.path[0] = os.path.dirname(script)
    return script


if __name__ == "__main__":
    import gc
    import importlib
    import runpy

    for _module in sys.argv[2:]:
        importlib.import_module(_module)
    gc.freeze()
    runpy.run_path(_become(_serve(socket.socket(fileno=int(sys.argv[1])))), run_name="__main__")
    sys.exit()

from support import Script, _free_log, _started, environment  # noqa: E402  a server needs none of it


class ForkedScript(Script):
    """A script as `support.run_python` returns it, whose parent is the server."""

    def __init__(self, server: ForkServer, request: dict[str, Any], log: Path) -> None:
        self._stdout_path = log.with_suffix(".out")
        self._stderr_path = log.with_suffix(".err")
        fifo = log.with_suffix(".in")
        os.mkfifo(fifo)
        self._child_created = False  # for the destructor of `Popen`: there is nothing to reap
        self.stdin = open(os.open(fifo, os.O_RDWR), "wb")  # noqa: SIM115
        self.stdout = self.stderr = None
        self.args = request["argv"]
        self.returncode: int | None = None
        self._server = server
        write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        files = [(fifo, os.O_RDONLY), (self._stdout_path, write), (self._stderr_path, write)]
        for path, _ in files[1:]:
            path.touch()
        request["files"] = [(str(path), flags) for path, flags in files]
        try:
            self.pid = server.fork(request)
        except BaseException:
            self.stdin.close()
            raise
        _started.append(self)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.status_of(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._server.status_of(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode


class ForkServer:
    """Has imported ``modules``, and forks scripts until it is closed."""

    def __init__(self, *modules: str) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", __file__, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
            )
        self._ended: dict[int, int] = {}

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.close()
        self._process.wait(30)

    def run_python(
        self, tmp_path: Path, source: str, *arguments: str, name: str = "script.py"
    ) -> ForkedScript:
        """Start a script, as `support.run_python` does."""
        path, text = tmp_path / name, textwrap.dedent(source)
        if not path.exists():  # writing it again would empty it under a script that starts
            path.write_text(text, "utf-8")
        elif path.read_text("utf-8") != text:
            raise AssertionError(f"{name} already holds another text: give this one its own name=")
        request = {
            "argv": [str(path), *arguments],
            "cwd": str(tmp_path),
            "environ": environment(),
        }
        return ForkedScript(self, request, _free_log(tmp_path))

    def fork(self, request: dict[str, Any]) -> int:
        self._channel.send(json.dumps(request).encode())
        for answer in self._answers(None):
            if isinstance(answer, int):
                return answer
        raise AssertionError("the server does not answer")

    def status_of(self, pid: int, timeout: float | None) -> int | None:
        """The exit status of a script, None if it runs for longer than ``timeout`` seconds."""
        if pid not in self._ended:
            for _ in self._answers(timeout):
                if pid in self._ended:
                    break
        return self._ended.get(pid)

    def _answers(self, timeout: float | None) -> Iterator[Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            rest = 60.0 if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._channel], [], [], rest)[0]:
                return
            message = self._channel.recv(_LARGEST)
            assert message, "the server has ended"
            answer = json.loads(message)
            if isinstance(answer, list):
                self._ended[answer[0]] = answer[1]
            yield answer
