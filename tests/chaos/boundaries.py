"""Where a run can be hit from within: before and after each step of prepare and release.

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

import orchard_infra.artifacts.sweeping
import orchard_infra.artifacts.temporary
import orchard_infra.locks.file
import orchard_infra.locks.queue
import orchard_infra.runs.registry
import orchard_infra.session
from chaos.observing import Journal
from orchard_infra import (
    FileLock,
    GhostSanitizer,
    RunRegistry,
    SignalStop,
    TemporaryArtifacts,
    managed_environment,
)
from orchard_infra.artifacts.removing import Removal
from orchard_infra.devices.torch_caches import TorchCacheFlusher
from orchard_infra.environment import Environment
from orchard_infra.exits import Exits
from orchard_infra.locks.acquiring import Pause, _Attempt
from orchard_infra.locks.file import FileLease
from orchard_infra.locks.keeper import Keeper
from orchard_infra.locks.queue import Place, _Ticket
from orchard_infra.runs.members import MembersFile
from orchard_infra.runs.registry import Registration
from orchard_infra.sanitizing import exiting
from orchard_infra.sanitizing.leftovers import Block
from orchard_infra.session import Session
from orchard_infra.stopping.signals import SignalWatch
from orchard_infra.stopping.takeover import Takeover
from orchard_infra.system import background, files, killing, reserve

# The steps of prepare and release, and the ones that they consist of. A name that the package has
# no more is an error here, so that nothing goes uncovered in silence.
_STEPS: tuple[tuple[Any, str], ...] = (
    (managed_environment, "__enter__"),
    (managed_environment, "_new_session"),
    (Session, "_run_to_join"),
    (Session, "_make_environment"),
    (reserve, "hold"),
    (Environment, "_begin"),
    (background, "add"),
    (Exits, "enter"),
    (Exits, "callback"),
    (SignalStop, "around"),
    (SignalWatch, "__enter__"),
    (SignalWatch, "_start"),
    (Takeover, "take_over"),
    (Environment, "before_release"),
    (RunRegistry, "register"),
    (files, "private_directory"),
    (files, "create_exclusive"),
    (files, "open_existing"),
    (files, "write_whole"),
    (orchard_infra.runs.registry, "lock_descriptor"),
    (orchard_infra.session, "export"),
    (_Attempt, "begin"),
    (_Attempt, "succeeds"),
    (_Attempt, "pause"),
    (_Attempt, "_clear"),
    (_Attempt, "end"),
    (Pause, "wait"),
    (FileLock, "try_acquire"),
    (FileLease, "_make"),
    (FileLease, "_hold"),
    (FileLease, "_sign"),
    (orchard_infra.locks.file, "lock_descriptor"),
    (Place, "__enter__"),
    (Place, "is_first"),
    (Place, "_look"),
    (_Ticket, "take"),
    (Keeper, "start"),
    (Registration, "update"),
    (Registration, "note_members"),
    (MembersFile, "add"),
    (GhostSanitizer, "around"),
    (GhostSanitizer, "clear_dead"),
    (GhostSanitizer, "sanitize"),
    (GhostSanitizer, "_stop_survivors"),
    (GhostSanitizer, "stop"),
    (GhostSanitizer, "_stop_look_alikes"),
    (killing, "stop_processes"),
    (Block, "begin"),
    (TemporaryArtifacts, "around"),
    (orchard_infra.artifacts.temporary, "sweep"),
    (orchard_infra.artifacts.sweeping, "collect"),
    (Environment, "put_on_record"),
    (RunRegistry, "dead_runs"),
    (TorchCacheFlusher, "around"),
    (Session, "_forget_dead_runs"),
    (RunRegistry, "remove"),
    (RunRegistry, "collect_unnamed"),
    (Session, "_ready"),
    (managed_environment, "__exit__"),
    (Session, "close"),
    (Session, "_leave"),
    (reserve, "let_go"),
    (SignalWatch, "hold"),
    (GhostSanitizer, "_look_back"),
    (exiting, "let_exit"),
    (Block, "children"),
    (Exits, "close"),
    (Exits, "attempt"),
    (TorchCacheFlusher, "flush"),
    (TemporaryArtifacts, "_clean"),
    (Removal, "remove_directory"),
    (background, "remove"),
    (Keeper, "stop"),
    (FileLease, "release"),
    (orchard_infra.locks.file, "unlock_descriptor"),
    (Session, "_leave_registry"),
    (Registration, "end"),
    (Registration, "close"),
    (SignalWatch, "_end"),
    (Takeover, "give_back"),
    (Environment, "_end"),
    (background, "finish"),
    (Place, "__exit__"),
    (_Ticket, "give_back"),
    (orchard_infra.locks.queue, "_tidy"),
    (Session, "_give_up"),
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
        carry_out = vars(Exits)["_carry_out"]

        def _carry_out(exits: Exits, name: str, step: Callable[[], object]) -> bool:
            done: bool = carry_out(exits, name, self._around(f"undo {name}", step))
            return done

        Exits._carry_out = _carry_out  # type: ignore[method-assign]

    def come_by(self, name: str) -> None:
        # Neither a forked child nor another thread is at a step of the run.
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
