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

import os
import select
import signal
import subprocess
import sys
import threading
import time

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
    pipes: tuple[int, int] | None = None  # to ask an echo, and to hear it
    process: subprocess.Popen[bytes] | None = None


class Children:
    """All that a contender has started, and still needs."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._needed: list[_Child] = []
        # A fork in another thread would keep the pipe open by which a `Popen` is told of the exec.
        self._starting = threading.Lock()

    def start(self, kind: str, run_id: str | None) -> None:
        """Start one in the run with this id; None after the last block. Returns in the contender
        only, except for one that unwinds.
        """
        with self._starting:
            if kind in _COMMANDS:
                self._execute(kind, run_id)
            else:
                self._fork(kind, run_id)

    def _fork(self, kind: str, run_id: str | None) -> None:
        asks = os.pipe() if kind == "echo" else None
        hears = os.pipe() if kind == "echo" else None
        pid = os.fork()
        if pid:
            pipes = None if asks is None or hears is None else (asks[1], hears[0])
            for end in (asks[0], hears[1]) if asks and hears else ():
                os.close(end)
            if kind != "setsid":  # that one only makes others, and ends
                who = self._note(pid, kind, run_id)
                if who is not None and kind != "unwinds":
                    self._needed.append(_Child(who, kind, run_id, pipes))
            return
        if kind == "unwinds":
            self._note(os.getpid(), kind, run_id)
            raise SystemExit(0)
        try:
            self._be(kind, run_id, None if asks is None or hears is None else (asks[0], hears[1]))
        finally:
            os._exit(0)

    def forget(self, run_id: str) -> None:
        """The release of this run has stopped its children."""
        for child in [child for child in self._needed if child.run_id == run_id]:
            self._drop(child)

    def use(self) -> None:
        """Look that all are there, and that those answer which can."""
        for child in list(self._needed):
            answers = self._ask(child) if child.pipes is not None else lives(child.who)
            if not answers:
                self._drop(child)
                self._journal.write("lost", pid=child.who.pid, started=child.who.started)

    def tidy(self) -> None:
        """End them, as a program does that closes its pool."""
        for child in list(self._needed):
            self._journal.write("tidied", pid=child.who.pid, started=child.who.started)
            send(child.who, signal.SIGKILL)
            if child.process is not None:
                child.process.wait()
            self._drop(child)

    def _drop(self, child: _Child) -> None:
        self._needed.remove(child)
        for end in child.pipes or ():
            os.close(end)

    @property
    def pipes(self) -> int:
        """How many descriptors of pipes this program has for them."""
        return sum(2 for child in self._needed if child.pipes is not None)

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

    def _be(self, kind: str, run_id: str | None, pipes: tuple[int, int] | None) -> None:
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
        if pipes is not None:
            while os.read(pipes[0], 1):
                os.write(pipes[1], b"x")
        while kind == "idle" and os.getppid() == parent:
            time.sleep(0.02)
        if kind != "idle":
            _wait_for_ever()

    def _ask(self, child: _Child) -> bool:
        asks, hears = child.pipes or (-1, -1)
        try:
            os.write(asks, b"x")
        except BrokenPipeError:
            return False
        ready = select.select([hears], [], [], ANSWER_WITHIN)[0]
        return bool(ready) and os.read(hears, 1) == b"x"

    def _note(
        self, pid: int, kind: str, run_id: str | None, carries: str | None = None
    ) -> Identity | None:
        who = identity(pid)
        if who is not None:
            self._journal.write(
                "child", pid=pid, started=who.started, kind=kind, run=run_id, carries=carries
            )
        return who


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
