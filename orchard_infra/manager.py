"""`InfrastructureManager`: strategies in, an environment out."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, Protocol, runtime_checkable

import attrs

from orchard_infra.artifacts.temporary import Cleaner, TemporaryArtifacts
from orchard_infra.config import HardwareAwareConfig, read_config
from orchard_infra.devices.torch_caches import Flusher, TorchCacheFlusher
from orchard_infra.environment import Environment
from orchard_infra.launch import Launch
from orchard_infra.locks.base import Locker
from orchard_infra.locks.file import FileLock
from orchard_infra.sanitizing.ghosts import GhostSanitizer, Sanitizer
from orchard_infra.session import Session
from orchard_infra.stopping.signals import SignalStop, Stopper

_LOGGER_NAME = "Infrastructure"


@runtime_checkable
class InfraManagerProtocol(Protocol):
    """What `managed_environment` needs of a manager: this package's, a test double, your own."""

    def prepare_environment(
        self, cfg: HardwareAwareConfig, logger: logging.Logger | None = None
    ) -> Any:
        """Make the machine ready for a run. What it returns is what the with-block yields."""
        ...

    def release_resources(
        self, cfg: HardwareAwareConfig, logger: logging.Logger | None = None
    ) -> None:
        """Give back what `prepare_environment` took."""
        ...


@attrs.frozen
class InfrastructureManager:
    """Prepares the environment of a run, and releases it.

    Each field is the strategy for one job; None switches that job off. A manager may serve
    several configurations at a time.
    """

    sanitizer: Sanitizer | None = attrs.field(factory=GhostSanitizer)
    locker: Locker | None = attrs.field(factory=FileLock)
    flusher: Flusher | None = attrs.field(factory=TorchCacheFlusher)
    cleaner: Cleaner | None = attrs.field(factory=TemporaryArtifacts)
    stopper: Stopper | None = attrs.field(factory=SignalStop)
    _sessions: list[Session] = attrs.field(factory=list, init=False, repr=False, eq=False)

    def prepare_environment(
        self, cfg: HardwareAwareConfig | str, logger: logging.Logger | None = None
    ) -> Environment:
        """Make the machine ready for a run; all or nothing.

        Raises:
            ConfigurationError: ``cfg`` cannot be used; nothing was touched.
            EnvironmentLockedError: Another run holds the project.
            InfrastructureError: Something else is in the way; the message names it.
        """
        began = time.perf_counter()
        session = Session(
            cfg=cfg,
            settings=read_config(cfg),
            launch=Launch.from_environ(os.environ),
            logger=logger or logging.getLogger(_LOGGER_NAME),
            sanitizer=self.sanitizer,
            locker=self.locker,
            flusher=self.flusher,
            cleaner=self.cleaner,
            stopper=self.stopper,
        )
        env = session.prepare()
        self._sessions.append(session)
        env.report.prepare_seconds = time.perf_counter() - began
        return env

    def release_resources(
        self, cfg: HardwareAwareConfig | str, logger: logging.Logger | None = None
    ) -> None:
        """Give back what `prepare_environment` took for this configuration.

        Every step is carried out even if another one failed. Calling it twice, in a forked
        child, or without a prepare does nothing. Within an except or finally clause the
        exception in flight counts as the run's own, and is never masked.

        Raises:
            ReleaseError: Steps failed, and the run itself did not. An `OSError`, too.
        """
        session = self._session_of(cfg)
        if session is None or session.pid != os.getpid():
            return
        self._sessions.remove(session)
        if logger is not None:
            session.logger = logger
        session.close(sys.exc_info()[1])

    def _session_of(self, cfg: object) -> Session | None:
        sessions = list(reversed(self._sessions))
        for session in sessions:
            if session.cfg is cfg:
                return session
        lock_path = read_config(cfg).lock_path
        return next((s for s in sessions if s.settings.lock_path == lock_path), None)
