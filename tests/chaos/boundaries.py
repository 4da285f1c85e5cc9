"""Where a run can be hit from within: before and after every step of prepare and release.

All of it is done to the package from outside, in the process of one contender.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import orchard_infra.locks.file
import orchard_infra.locks.keeper
import orchard_infra.runs
import orchard_infra.sanitizing.ghosts
import orchard_infra.session
import orchard_infra.system.files
from chaos.observing import Journal
from orchard_infra import FileLock, GhostSanitizer, RunRegistry, SignalStop, TemporaryArtifacts
from orchard_infra.devices.torch_caches import TorchCacheFlusher
from orchard_infra.locks.file import FileLease, _Attempt
from orchard_infra.locks.keeper import Keeper
from orchard_infra.runs.registry import Registration
from orchard_infra.session import Session
from orchard_infra.stopping.signals import SignalWatch

# The steps that a session takes and the ones that they consist of. A name that the package has
# no more is an error here, so that nothing goes uncovered in silence.
_STEPS: tuple[tuple[Any, str], ...] = (
    (SignalStop, "arm"),
    (SignalWatch, "take_over"),
    (Session, "_run_to_join"),
    (Session, "_describe"),
    (Session, "_begin"),
    (RunRegistry, "register"),
    (orchard_infra.files, "private_directory"),
    (orchard_infra.files, "create_exclusive"),
    (orchard_infra.files, "open_existing"),
    (orchard_infra.files, "write_whole"),
    (orchard_infra.runs, "lock_descriptor"),
    (Session, "_put_run_id"),
    (Session, "_lock"),
    (FileLock, "acquire"),
    (orchard_infra.locks.file, "lock_descriptor"),
    (_Attempt, "hand_over"),
    (FileLease, "take"),
    (Keeper, "start"),
    (Session, "_sanitize"),
    (GhostSanitizer, "sanitize"),
    (GhostSanitizer, "look_alikes"),
    (GhostSanitizer, "stop_survivors"),
    (orchard_infra.sanitizing, "stop_processes"),
    (Session, "_collect"),
    (TemporaryArtifacts, "collect"),
    (RunRegistry, "remove"),
    (RunRegistry, "collect_unnamed"),
    (Registration, "update"),
    (TemporaryArtifacts, "open"),
    (Session, "_undo"),
    (Session, "close"),
    (SignalWatch, "hold"),
    (GhostSanitizer, "stop_leftovers"),
    (TorchCacheFlusher, "flush"),
    (TemporaryArtifacts, "close"),
    (Keeper, "stop"),
    (FileLease, "release"),
    (orchard_infra.locks.file, "unlock_descriptor"),
    (Registration, "close"),
    (SignalWatch, "disarm"),
    (SignalWatch, "give_back"),
)


class Boundaries:
    """Counts the boundaries that a process comes by, and hits it at one of them.

    ``hit`` says where: ``{"boundary": "after FileLock.acquire", "occurrence": 1, "what": "KILL"}``.
    """

    def __init__(self, journal: Journal, hit: dict[str, Any] | None, *, trace: bool) -> None:
        self._journal = journal
        self._hit = hit
        self._trace = trace
        self._pid = os.getpid()
        self._seen: Counter[str] = Counter()

    def install(self) -> None:
        for owner, attribute in _STEPS:
            function = inspect.getattr_static(owner, attribute)
            name = f"{owner.__name__.rpartition('.')[2]}.{attribute}"
            if isinstance(function, classmethod):
                wrapped: Any = classmethod(self._around(name, function.__func__))
            else:
                wrapped = self._around(name, function)
            setattr(owner, attribute, wrapped)
        undo = vars(Session)["_undo"]

        def _undo(session: Session, name: str, step: Callable[[], object]) -> None:
            undo(session, name, self._around(f"undo {name}", step))

        Session._undo = _undo  # type: ignore[method-assign]

    def come_by(self, name: str) -> None:
        # Neither a forked child nor the keeper's thread is at a step of the run.
        if os.getpid() != self._pid or threading.current_thread() is not threading.main_thread():
            return
        self._seen[name] += 1
        if self._trace:
            self._journal.write("boundary", boundary=name, occurrence=self._seen[name])
        hit = self._hit
        if hit and (hit["boundary"], hit["occurrence"]) == (name, self._seen[name]):
            self._hit = None
            self._journal.write("hit", what=hit["what"], boundary=name)
            if hit["what"] == "_exit":
                os._exit(9)
            signal.raise_signal(signal.Signals["SIG" + hit["what"]])

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.come_by(f"before {name}")
            result = [function(*args, **kwargs)]
            try:
                self.come_by(f"after {name}")
            except BaseException:
                result.clear()  # the traceback keeps this frame, and nothing may hang on to it
                raise
            return result.pop()

        return wrapper
