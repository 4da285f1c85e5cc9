"""What a run sees of its environment: the object that a with-block yields."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from orchard_infra.artifacts.temporary import CleanReport
from orchard_infra.devices.torch_caches import FlushReport
from orchard_infra.errors import LockLostError
from orchard_infra.locks.base import Lease
from orchard_infra.runs.record import RunRecord
from orchard_infra.sanitizing.ghosts import SanitizeReport
from orchard_infra.stopping.signals import StopRequest, StopWatch


@attrs.define
class Report:
    """What was done for a run; complete once the block has ended.

    Times are in seconds. ``collected`` is what dead runs had left, ``cleaned`` what this one
    left; both are None where no cleaner was asked. ``failures`` are those of the release.
    """

    prepare_seconds: float = 0.0
    release_seconds: float = 0.0
    sanitized: SanitizeReport = attrs.field(factory=SanitizeReport)
    leftovers: SanitizeReport = attrs.field(factory=SanitizeReport)
    flushed: FlushReport | None = None
    collected: CleanReport | None = None
    cleaned: CleanReport | None = None
    failures: tuple[BaseException, ...] = ()


@attrs.define(eq=False)
class Environment:
    """The environment of one run.

    ``tmp_dir`` goes away with the run; None where no cleaner keeps one. ``joined`` says that this
    process was started by the run that holds the lock, and takes part in it.
    """

    run: RunRecord
    lock_path: Path
    tmp_dir: Path | None = None
    joined: bool = False
    report: Report = attrs.field(factory=Report)
    _logger: logging.Logger = attrs.field(
        factory=lambda: logging.getLogger("Infrastructure"), repr=False
    )
    _lease: Lease | None = attrs.field(default=None, repr=False)
    _watch: StopWatch | None = attrs.field(default=None, repr=False)
    _lost: LockLostError | None = attrs.field(default=None, repr=False)

    @property
    def lock_lost(self) -> bool:
        """Whether the lock was found lost: another run may be writing to the same outputs."""
        return self._lost is not None

    @property
    def stop_requested(self) -> StopRequest | None:
        """Why the run should stop, and since when; None while it may go on.

        For a loop that finishes its step and saves a checkpoint first.
        """
        if self._watch is not None:
            return self._watch.requested
        if self._lost is not None:
            return StopRequest(reason=str(self._lost), at=time.time())
        return None

    def on_stop(self, callback: Callable[[StopRequest], object]) -> None:
        """Have ``callback`` called once a stop is requested, outside of the signal handler.

        Without a stopper it is never called.
        """
        if self._watch is not None:
            self._watch.on_stop(callback)

    def verify(self) -> None:
        """Ask now whether the lock is still ours: before a checkpoint is written, say.

        Raises:
            LockLostError: It is not. `lock_lost` is set and a stop is requested, too.
        """
        if self._lease is None:
            return
        try:
            if self._lost is not None:
                raise self._lost
            self._lease.verify()
        except LockLostError as error:
            self.lose(error)
            raise

    def lose(self, error: LockLostError) -> None:
        """Note that the lock is lost. A run is asked to stop then, and never interrupted."""
        if self._lost is not None:
            return
        self._lost = error
        self._logger.error("%s", error, extra={"lock_path": error.lock_path})
        if self._watch is not None:
            self._watch.request(str(error))
