"""The children of a contender: forks, other programs, and such that go their own way.

idle           a worker that ends when it has lost its program, as those of a DataLoader do
busy           one that does not
stubborn       one that ignores the signals that ask to end
frozen         one that is stopped
tree           one with two more below it
unwinds        a fork that leaves the blocks of its parent
echo           a worker that its program needs as long as it lives
setsid         two forks in a session of their own, that init has adopted
exec           another program
exec-tree      a shell with two more below it
exec-stubborn  a shell that ignores the signals that ask to end
exec-spawner   a shell that starts one orphan after the other
exec-setsid    another program in a session of its own
exec-daemons   a shell that starts one of those after the other
opted-out      another program that is in no run, by its own wish
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import attrs

from chaos.observing import Identity, Journal, identity, lives, read_bytes, send

RUN_ID = "ORCHARD_INFRA_RUN_ID"
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SLEEP = ("sleep", "1000")
_REPEAT = "i=0; while [ $i -lt 20 ]; do i=$((i+1)); %s; sleep 0.04; done; exec sleep 1000"
_COMMANDS = {
    "exec": _SLEEP,
    "exec-setsid": _SLEEP,
    "opted-out": _SLEEP,
    "exec-tree": ("sh", "-c", "sleep 1000 & sleep 1000 & wait"),
    "exec-stubborn": ("sh", "-c", "trap '' TERM INT HUP; while :; do sleep 1000; done"),
    "exec-spawner": ("sh", "-c", _REPEAT % "(sleep 1000 &)"),
    "exec-daemons": ("sh", "-c", _REPEAT % "(setsid sleep 1000 &)"),
}
ANSWER_WITHIN = 20.0  # seconds, on a machine that is full


@attrs.define
class _Child:
    who: Identity
    kind: str
    run_id: str | None
    connection: Connection | None = None  # to ask an echo, and to hear it
    process: Any = None


class Children:
    """All that a contender has started, and still needs."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._needed: list[_Child] = []
        self._told: set[Identity] = set()
        # A fork in another thread would keep the pipe open by which a `Popen` is told of the exec.
        self._starting = threading.Lock()

    def start(self, kind: str, run_id: str | None) -> None:
        """Start one in the run with this id; None after the last block. Returns in the contender
        only, except for one that unwinds.
        """
        with self._starting:
            if kind in _COMMANDS:
                self._execute(kind, run_id)
            elif kind == "served":
                self._serve(run_id)
            else:
                self._fork(kind, run_id)

    def forget(self, run_id: str) -> None:
        """The release of this run has stopped its children."""
        self._needed = [child for child in self._needed if child.run_id != run_id]

    def use(self) -> None:
        """Look that all are there, and that those answer which can."""
        for child in list(self._needed):
            answers = lives(child.who) if child.connection is None else _answers(child.connection)
            if not answers:
                self._needed.remove(child)
                self._journal.write("lost", pid=child.who.pid, started=child.who.started)

    def tidy(self) -> None:
        """End them, as a program does that closes its pool."""
        for child in list(self._needed):
            self._journal.write("tidied", pid=child.who.pid, started=child.who.started)
            send(child.who, signal.SIGKILL)
            if child.process is not None:
                child.process.wait()
            self._needed.remove(child)

    def leave(self) -> None:
        """The program is about to end: Python ends those of multiprocessing."""
        for child in self._needed:
            if child.kind == "served":
                self._journal.write("tidied", pid=child.who.pid, started=child.who.started)

    def has(self, kind: str) -> bool:
        return any(child.kind == kind for child in self._needed)

    def was_killed(self) -> bool:
        """Whether one was killed by a signal, and this is the first question after that."""
        for child in self._needed:
            try:
                status = os.waitid(os.P_PID, child.who.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # of the forkserver
                continue
            if (
                status is not None
                and status.si_code == os.CLD_KILLED
                and child.who not in self._told
            ):
                self._told.add(child.who)
                return True
        return False

    def _execute(self, kind: str, run_id: str | None) -> None:
        environ = dict(os.environ)
        if kind == "opted-out":
            environ[RUN_ID] = ""
        process = subprocess.Popen(
            _COMMANDS[kind], env=environ, start_new_session=kind == "exec-setsid"
        )
        who = self._note(process.pid, kind, run_id, environ.get(RUN_ID) or None)
        if who is not None:
            self._needed.append(_Child(who, kind, run_id, process=process))

    def _serve(self, run_id: str | None) -> None:
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        process = context.Process(target=echo, args=(theirs,), daemon=True)
        process.start()
        assert process.pid is not None
        who = self._note(process.pid, "served", run_id)
        theirs.close()
        if who is not None:
            self._needed.append(_Child(who, "served", run_id, ours))

    def _fork(self, kind: str, run_id: str | None) -> None:
        ours, theirs = multiprocessing.Pipe() if kind == "echo" else (None, None)
        pid = os.fork()
        if pid:
            if theirs is not None:
                theirs.close()
            if kind != "setsid":  # that one only makes others, and ends
                who = self._note(pid, kind, run_id)
                if who is not None and kind != "unwinds":
                    self._needed.append(_Child(who, kind, run_id, ours))
            return
        if kind == "unwinds":
            self._note(os.getpid(), kind, run_id)
            # Else its exit hook ends those of the parent.
            multiprocessing.process._children.clear()  # type: ignore[attr-defined]
            raise SystemExit(0)
        try:
            self._be(kind, run_id, theirs)
        finally:
            os._exit(0)

    def _be(self, kind: str, run_id: str | None, connection: Connection | None) -> None:
        parent = os.getppid()
        if kind in ("setsid", "tree"):
            if kind == "setsid":
                os.setsid()
            for _ in range(2):
                if not os.fork():
                    self._note(os.getpid(), kind, run_id)
                    _wait_for_ever()
            if kind == "setsid":
                os._exit(0)
        self._note(os.getpid(), kind, run_id)
        if kind == "stubborn":
            for signum in _STOPPING:
                signal.signal(signum, signal.SIG_IGN)
        if kind == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        if connection is not None:
            echo(connection)
        while kind == "idle" and os.getppid() == parent:
            time.sleep(0.02)
        if kind != "idle":
            _wait_for_ever()

    def _note(
        self, pid: int, kind: str, run_id: str | None, carries: str | None = None
    ) -> Identity | None:
        who = identity(pid)
        if who is not None:
            self._journal.write(
                "child", pid=pid, started=who.started, kind=kind, run=run_id, carries=carries
            )
        return who


def echo(connection: Connection) -> None:
    """Answer as long as somebody asks, and stay then, as one that does not see its program die."""
    try:
        while True:
            connection.send_bytes(connection.recv_bytes())
    except (EOFError, OSError):
        _wait_for_ever()


def _answers(connection: Connection) -> bool:
    try:
        connection.send_bytes(b"x")
        return connection.poll(ANSWER_WITHIN) and connection.recv_bytes() == b"x"
    except (EOFError, OSError):
        return False


def _wait_for_ever() -> None:
    while True:
        time.sleep(1000)


def rename_this_process(words: list[str]) -> None:
    """Show another command line, of the same length: that of a program of its own.

    What is forked from one server shows the server's, and workers of one pool are never touched.
    """
    fields = read_bytes("/proc/self/stat").rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
    text = "\0".join(words).encode()
    padding = end - start - len(text) - 1
    assert padding >= 0, f"too long for {end - start} bytes: {words}"
    words[-1] += "#" * padding
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write("\0".join(words).encode() + b"\0")
    sys.orig_argv[:] = words
