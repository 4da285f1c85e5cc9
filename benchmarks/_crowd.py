"""A machine that is full of other people's processes: sleeping ones, here.

Most of them are `sleep`. Some are Python processes: a look at the machine has to find out that
they run another script. As a program it holds them until its stdin is closed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from _harness import python

_LIFETIME = 1800  # seconds, in case that nobody is left to end them


@contextlib.contextmanager
def crowd(
    *, sleeping: int = 0, pythons: int = 0, stubborn: int = 0, runs: int = 0
) -> Iterator[tuple[int, ...]]:
    """Keep so many processes for the length of a block. Yields the pids of the stubborn ones.

    ``runs`` is how many live runs are on record, all of them led by one process.
    """
    numbers = [str(number) for number in (sleeping, pythons, stubborn, runs)]
    with holding(python(str(Path(__file__)), *numbers)) as line:
        yield tuple(map(int, line.split()[1:]))


@contextlib.contextmanager
def holding(command: Sequence[str]) -> Iterator[str]:
    """Run a program that says "ready ..." and then waits for the end of its stdin; that line."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if not line.startswith("ready"):
            raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")
        try:
            yield line
        finally:
            process.stdin.close()
            process.stdout.read()


@contextlib.contextmanager
def children() -> Iterator[set[int]]:
    """A set for the pids of children, which end with the block, whatever happens in it."""
    alive: set[int] = set()
    try:
        yield alive
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for pid in alive:  # ours, and not reaped: nobody else can have the pid
            os.kill(pid, signal.SIGKILL)
        for pid in alive:
            os.waitpid(pid, 0)


def hold(alive: set[int], *say: int) -> None:
    """Say that we are ready, and wait until stdin is closed. Children that end are reaped."""
    _reap_into(alive)
    print("ready", *say, flush=True)
    sys.stdin.read()


def _reap_into(alive: set[int]) -> None:
    """From now on take every child that ends out of ``alive``."""

    def reap(number: int, frame: object) -> None:
        for pid in list(alive):
            try:
                ended, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue
            if ended:
                alive.discard(pid)

    signal.signal(signal.SIGCHLD, reap)


def fork_sleeper(*, ignoring: signal.Signals | None = None) -> int:
    """A forked child that does nothing, deaf to one signal if asked; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            if ignoring is not None:
                signal.signal(ignoring, signal.SIG_IGN)
            # Without this, a reader of our output would wait for the end of this child, too.
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            signal.alarm(_LIFETIME)
            while True:
                signal.pause()
        finally:
            os._exit(0)
    return pid


def _register(runs: int) -> None:
    import attrs

    from orchard_infra import RunRegistry
    from orchard_infra.runs.record import describe_this_run

    registry = RunRegistry()
    for number in range(runs):
        # Never closed: the records stay live for as long as this process does, and go with the
        # directory that they are in.
        registry.register(attrs.evolve(describe_this_run(f"held-{number}"), lock="/nowhere"))


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("sleeping", "pythons", "stubborn", "runs"):
        parser.add_argument(name, type=int)
    wanted = parser.parse_args()
    sleep = shutil.which("sleep") or "/bin/sleep"
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
    with children() as alive:
        for _ in range(wanted.sleeping):
            command = ["sleep", str(_LIFETIME)]
            alive.add(os.posix_spawn(sleep, command, os.environ, file_actions=null))
        for _ in range(wanted.pythons):
            alive.add(fork_sleeper())
        stubborn = [fork_sleeper(ignoring=signal.SIGTERM) for _ in range(wanted.stubborn)]
        alive.update(stubborn)
        if wanted.runs:
            _register(wanted.runs)
        hold(alive, *stubborn)


if __name__ == "__main__":
    _main()
