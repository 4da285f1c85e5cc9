"""Workers that a signal to the whole process group does not take from the run.

Ctrl-C goes to every process of the terminal's foreground group, and so do the signals of torchrun,
timeout(1) and ``kill -- -PGID``. A run that only takes a note of it (``SignalStop(mode="flag")``)
still needs its workers to finish the step and to save its checkpoint.

A worker cannot tell in a handler who sent a signal, and to block signals and wait for them with
sigwaitinfo(2) is no way out: of a worker that imports NumPy before its initializer is called, a
thread of OpenBLAS stays open for them (measured), and programs that the worker starts, ffmpeg
say, would inherit the mask. So a shielded worker leaves the group, by setpgid(2). Nothing else
changes: a signal that is sent to the worker itself does what it always did.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, overload

from orchard_infra.system.masking import uninterrupted

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL = 0.5  # seconds between two looks at the parent, where the kernel cannot tell of its end
_THREAD = "orchard-infra-shield"
_FORK_SERVER = "orchard_infra.stopping.fork_server"


class ShieldWorker:
    """Keeps a worker process in the run when its whole process group is signalled.

    The ready ``worker_init_fn`` of a DataLoader, and initializer of a `multiprocessing.Pool`, a
    `multiprocessing.Manager` or a `concurrent.futures.ProcessPoolExecutor`::

        DataLoader(dataset, num_workers=4, worker_init_fn=shield_worker)
        DataLoader(dataset, num_workers=4, worker_init_fn=shield_worker(seed_worker))
        Pool(4, initializer=shield_worker(load), initargs=("/data",))

    The worker moves to a process group of its own. Ctrl-C, SIGTERM, SIGHUP and any other signal
    to the run's group pass it by, also one that a scheduler warns with. What is sent to the worker
    itself ends it as before: the DataLoader's own shutdown, ``terminate()``, ``kill PID``. It is
    killed when its parent is dead, however that died: by the kernel where the parent's main
    thread started it, else by a thread that waits for that. fork, spawn and forkserver.

    What it costs:

    * Who signals each process by itself still ends the worker: ``pkill -f``, a systemd service
      without ``KillMode=mixed``, Slurm with ``proctrack/linuxproc``.
    * The shield begins when the worker calls it. Until then, that is while a spawned worker
      imports its modules, a signal to the group ends the worker. ``persistent_workers=True`` keeps
      that to the first epoch.
    * Without a flag, a Ctrl-C ends only the main process: ``ProcessPoolExecutor.__exit__`` waits
      for the calls that its workers are in.
    * A worker that cannot release the GIL is terminated as before, and killed with its parent by
      the kernel; where only the thread waits for the parent's end, it lives until it does.
    * A handler that a forked worker has inherited stays. One that does not end the process makes
      ``terminate()`` wait, as it does without a shield; those of `SignalStop` are not inherited.
    * The worker is in the background of the terminal: what it reads from there fails.
    * The fork server is told to leave the group as well, when the first shielded worker is about to
      start. One that is running by then is ended by the signal, and its workers with it: a
      warning says so, and `multiprocessing.set_forkserver_preload` of
      ``["__main__", "orchard_infra.stopping.fork_server"]`` at the start of the program helps.

    Outside of a worker of multiprocessing (a thread pool, the main process) it does nothing, and on
    Windows, where no such signals are, neither.
    """

    def __init__(self, init: Callable[..., object] | None = None) -> None:
        self._init = init

    @overload
    def __call__(self, init: Callable[..., object], /) -> ShieldWorker: ...
    @overload
    def __call__(self, *arguments: Any) -> None: ...
    def __call__(self, *arguments: Any) -> ShieldWorker | None:
        if self._init is None:
            if len(arguments) == 1 and callable(arguments[0]):
                return ShieldWorker(arguments[0])
            _shield()
        else:
            _shield()
            self._init(*arguments)
        return None

    def __repr__(self) -> str:
        return "shield_worker" if self._init is None else f"shield_worker({self._init!r})"

    def __reduce__(self) -> str | tuple[Any, ...]:
        _shield_fork_server()
        return "shield_worker" if self._init is None else (ShieldWorker, (self._init,))


shield_worker = ShieldWorker()


def _shield() -> None:
    multiprocessing = sys.modules.get("multiprocessing.process")
    parent = None if multiprocessing is None else multiprocessing.parent_process()
    # A thread pool calls its initializer in the process of the run: that must stay where it is, or
    # Ctrl-C would never reach it again.
    if parent is None or parent.pid is None or sys.platform == "win32":
        return
    if threading.current_thread() is not threading.main_thread():
        return
    # A program that the worker starts may ask the terminal for keys, as ffmpeg does. It would be
    # stopped for that in the background, and the worker would wait for it for ever. See termios(3).
    for signum in (signal.SIGTTIN, signal.SIGTTOU):
        if signal.getsignal(signum) is signal.SIG_DFL:
            signal.signal(signum, signal.SIG_IGN)
    leave_group()
    starter = os.getppid()  # the parent, or the fork server
    if not die_with(starter) or starter != parent.pid:
        watch = threading.Thread(target=_end_with, args=(parent.pid, starter), name=_THREAD)
        watch.daemon = True
        with uninterrupted():  # signals are for the main thread
            watch.start()


def leave_group() -> None:
    """Move to a process group of our own, unless we lead a session and so have one."""
    try:
        os.setpgid(0, 0)
    except PermissionError:
        pass


def die_with(starter: int) -> bool:
    """Have the kernel kill this process when ``starter``, which has forked it, is dead.

    prctl(2) means the *thread* that forked it. Returns False where that is not the main one, as
    with a pool that replaces a worker: such a thread ends before its process does.
    """
    if sys.platform != "linux" or not _is_child_of_main_thread(starter):
        return False
    import ctypes

    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return False
    if prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        return False
    if os.getppid() != starter:  # it died meanwhile
        _end()
    return True


def _is_child_of_main_thread(starter: int) -> bool:
    try:
        with open(f"/proc/{starter}/task/{starter}/children", "rb") as children:
            return os.getpid() in map(int, children.read().split())
    except OSError:  # CONFIG_PROC_CHILDREN is off, or the process is gone
        return False


def _end_with(parent: int, starter: int) -> None:
    """The thread: end this process when its parent is dead.

    The sentinel of multiprocessing does not tell: children that the parent forked later keep it
    open.
    """
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        _end()
    except (AttributeError, OSError):  # no Linux, or before 5.3
        from orchard_infra.system import processes

        identity = processes.identity_of(parent)
        # What cannot be read proves nothing: this process may have no descriptor left.
        while os.getppid() == starter and not (
            processes.is_gone(identity) if identity else _is_no_pid(parent)
        ):
            time.sleep(_POLL)
            identity = identity or processes.identity_of(parent)
    else:
        if os.getppid() == starter:  # else it may be somebody else who has the pid now
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
    _end()


def _is_no_pid(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return True
    return False


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _shield_fork_server() -> None:
    """Have the fork server leave the group as well, if a worker of its kind is being started.

    A signal to the group would end it, and for multiprocessing all its workers are dead then. Its
    signals cannot be changed any more once it runs, so it has to import a module when it starts.
    """
    context = sys.modules.get("multiprocessing.context")
    spawning = None if context is None else context.get_spawning_popen()
    if getattr(spawning, "method", None) != "forkserver":
        return
    from multiprocessing import forkserver

    server = forkserver._forkserver
    preload = getattr(server, "_preload_modules", ["__main__"])
    if _FORK_SERVER in preload:
        return
    forkserver.set_forkserver_preload([*preload, _FORK_SERVER])
    if getattr(server, "_forkserver_pid", None) is not None:
        logging.getLogger("Infrastructure").warning(
            "multiprocessing's fork server was started before the first shielded worker: a signal "
            "to the process group ends it, and the worker is lost. Start with "
            "multiprocessing.set_forkserver_preload(['__main__', %r])",
            _FORK_SERVER,
        )
