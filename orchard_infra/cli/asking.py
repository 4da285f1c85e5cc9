"""Asking one process to stop, on proof that it is the right one."""

from __future__ import annotations

import contextlib
import os
import signal

from orchard_infra.inspect import ProcessIdentity, is_ours
from orchard_infra.system import processes


def ask_to_stop(identity: ProcessIdentity) -> bool:
    """Send SIGTERM to this very process, if it is ours; whether it was sent."""
    pidfd = None
    try:
        # Opened before the look: if it is still the process we mean, it is the one we opened.
        with contextlib.suppress(AttributeError, OSError):  # no Linux, an old one, or gone
            pidfd = os.pidfd_open(identity.pid)
        if not processes.is_alive(identity) or not is_ours(identity.pid):
            return False
        _send(identity.pid, pidfd, signal.SIGTERM)
        stat = processes.read_stat(identity.pid)
        if stat is not None and stat.state == "T":  # stopped by Ctrl-Z: it gets no signal so
            _send(identity.pid, pidfd, signal.SIGCONT)
        return True
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _send(pid: int, pidfd: int | None, signum: signal.Signals) -> None:
    if pidfd is None:
        os.kill(pid, signum)
    else:
        signal.pidfd_send_signal(pidfd, signum)
