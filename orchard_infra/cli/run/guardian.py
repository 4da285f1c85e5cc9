"""What stops the command when the wrapper is killed or fails, and its lock is on a server.

The command inherits the descriptor of a lock file, and so keeps the lock. Nobody renews a lock on a
server once the wrapper is gone: another host could start while the command still writes. The
guardian is a child that waits for the end of the wrapper, in a session of its own, so that a signal
to the whole process group spares it. It costs a page or two of memory, and no time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

import attrs

LONGEST = 10.0  # seconds for SIGTERM to work: a lease of 30 s has 22 s left, at the least
_ROUNDS = 3  # a process that ends may just have started another one


@attrs.define(eq=False, repr=False)
class Guardian:
    """Waits for the end of this process. Start it before the command."""

    _pidfd: int
    _pid: int
    _pipe: int

    @classmethod
    def start(cls, run_id: str, grace: float) -> Guardian:
        """
        Raises:
            OSError: No process can be started: then there should be no command either.
        """
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                # It must not hold the lock, nor a pipe that somebody reads to its end.
                os.closerange(3, reads)
                os.closerange(reads + 1, 1 << 20)
                null = os.open(os.devnull, os.O_RDWR)
                for standard in (0, 1):
                    os.dup2(null, standard)
                if os.read(reads, 1) == b"":
                    _become_stopper(run_id, grace)
            finally:
                os._exit(0)
        os.close(reads)
        return cls(os.pidfd_open(pid), pid, writes)

    def dismiss(self) -> None:
        """The wrapper ends by itself: there is nothing to stop."""
        with contextlib.suppress(ProcessLookupError):  # somebody has killed it
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # it was reaped with others
            os.waitpid(self._pid, 0)
        os.close(self._pidfd)
        os.close(self._pipe)


def _become_stopper(run_id: str, grace: float) -> None:
    """Start anew: what a fork has inherited of threads and descriptors is not to be trusted."""
    from orchard_infra.runs.record import RUN_ID_VARIABLE

    environ = {name: value for name, value in os.environ.items() if name != RUN_ID_VARIABLE}
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    code = f"from {__name__} import stop; stop({run_id!r}, {grace!r})"
    os.execve(sys.executable, [sys.executable, "-c", code], environ)


def stop(run_id: str, grace: float) -> None:
    """Stop all that lives of a run whose wrapper is dead, but for runs that are no part of it."""
    from pathlib import Path

    from orchard_infra.cli.run.bystanders import Bystanders
    from orchard_infra.environment import Environment
    from orchard_infra.runs.membership import Membership
    from orchard_infra.runs.registry import RunRegistry
    from orchard_infra.system.killing import stop_processes

    registry = RunRegistry()
    run = registry.find(run_id)
    if run is None or not run.is_over:
        return
    bystanders = Bystanders(Environment(run=run.record, lock_path=Path(run.record.lock or "")))

    def spare(pid: int) -> bool:
        return pid == os.getpid() or bystanders.describe(pid) is not None

    stopped = 0
    for _ in range(_ROUNDS):
        found = Membership(registry.runs()).survivors([run])
        targets = [survivor.identity for _, survivor in found if not spare(survivor.pid)]
        if not targets:
            break
        outcome = stop_processes(targets, grace=grace, spare=spare)
        stopped += len(outcome.stopped) + len(outcome.killed)
    if stopped:
        from orchard_infra.cli.run.protected import tell

        tell(
            f"the wrapper of project {run.record.project} (pid {run.record.pid}) is gone, and its "
            f"lock on a server ends with it: {stopped} of its processes were stopped"
        )
