"""`InfrastructureManager`: which strategy does which job."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import attrs

from orchard_infra.artifacts.temporary import TemporaryArtifacts
from orchard_infra.config import HardwareAwareConfig, Settings, read_config, read_lock_path
from orchard_infra.devices.torch_caches import TorchCacheFlusher
from orchard_infra.environment import Environment, Strategy
from orchard_infra.errors import ConfigurationError
from orchard_infra.launch import this_launch
from orchard_infra.locks.base import Lock
from orchard_infra.locks.checks import is_number
from orchard_infra.locks.file import FileLock
from orchard_infra.sanitizing.ghosts import GhostSanitizer
from orchard_infra.session import Session, open_sessions
from orchard_infra.stopping.signals import SignalStop
from orchard_infra.system.log import as_logger


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


class LockersTimeout:
    """The type of `LOCKERS_TIMEOUT`."""

    def __repr__(self) -> str:
        return "LOCKERS_TIMEOUT"


LOCKERS_TIMEOUT = LockersTimeout()  # wait as long as the locker says: None is "for ever"


def _is_strategy(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not callable(getattr(value, "around", None)):
        raise TypeError(
            f"{attribute.name} must be a strategy, an object with a method around(env) that "
            f"returns a context manager, or None to switch it off; not {value!r}"
        )


def _is_lock(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not callable(getattr(value, "try_acquire", None)):
        raise TypeError(
            f"{attribute.name} must be a lock, an object with a method try_acquire(key, record) "
            f"such as FileLock(), or None to take no lock; not {value!r}"
        )


def _are_strategies(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    for one in value:
        if one is None:
            raise TypeError(f"{attribute.name} must contain strategies only, and None is not one")
        _is_strategy(instance, attribute, one)


def _to_tuple(extras: Iterable[Strategy]) -> tuple[Strategy, ...]:
    return tuple(extras)


@attrs.frozen
class InfrastructureManager:
    """Prepares the environment of a run, and releases it.

    Each field is the strategy for one job; None switches that job off. ``extras`` are entered last
    and left first, on every rank and in processes that join the run, see `Environment.is_leader`
    and `Environment.joined`. A manager holds no live state: it may serve any number of runs at a
    time, and can be pickled, copied and compared.
    """

    sanitizer: Strategy | None = attrs.field(factory=GhostSanitizer, validator=_is_strategy)
    locker: Lock | None = attrs.field(factory=FileLock, validator=_is_lock)
    flusher: Strategy | None = attrs.field(factory=TorchCacheFlusher, validator=_is_strategy)
    cleaner: Strategy | None = attrs.field(factory=TemporaryArtifacts, validator=_is_strategy)
    stopper: Strategy | None = attrs.field(factory=SignalStop, validator=_is_strategy)
    extras: tuple[Strategy, ...] = attrs.field(
        default=(), kw_only=True, converter=_to_tuple, validator=_are_strategies
    )

    def session(
        self,
        cfg: object,
        logger: Any = None,
        *,
        timeout: float | LockersTimeout | None = LOCKERS_TIMEOUT,
        command: tuple[str, ...] | None = None,
        by_hand: bool = False,
    ) -> Session:
        """A session for one run, not prepared yet. Nothing is touched.

        ``timeout``, in seconds, takes the place of the locker's own. ``command`` is what the run
        executes, where that is not this process.

        Raises:
            ConfigurationError: ``cfg`` cannot be used, or ``timeout`` has no locker to be for.
        """
        if self.locker is None and not isinstance(timeout, LockersTimeout):
            raise ConfigurationError(
                f"timeout={timeout!r} is how long to wait for the lock, and this manager has no "
                "locker: leave it out, or give the manager one"
            )
        if isinstance(timeout, LockersTimeout):
            timeout = getattr(self.locker, "timeout", 0.0)
        elif timeout is not None and not (is_number(timeout) and timeout >= 0):
            raise ConfigurationError(
                f"timeout must be a number of seconds >= 0, or None for ever; not {timeout!r}"
            )
        return Session(
            settings=cfg if isinstance(cfg, Settings) else read_config(cfg),
            launch=this_launch(),
            logger=as_logger(logger),
            sanitizer=self.sanitizer,
            locker=self.locker,
            flusher=self.flusher,
            cleaner=self.cleaner,
            stopper=self.stopper,
            extras=self.extras,
            timeout=timeout,
            command=command,
            cfg=cfg,
            by_hand=by_hand,
        )

    def prepare_environment(
        self, cfg: HardwareAwareConfig | str, logger: logging.Logger | None = None
    ) -> Environment:
        """Make the machine ready for a run, entirely or not at all. `release_resources`, or
        `Environment.close`, releases it.

        Raises:
            ConfigurationError: ``cfg`` cannot be used; nothing was touched.
            EnvironmentLockedError: Another run holds the project.
            InfrastructureError: Something else is in the way; the message names it.
        """
        session = self.session(cfg, logger, by_hand=True)
        session.error_at_prepare = sys.exc_info()[1]
        return session.prepare()

    def release_resources(
        self, cfg: HardwareAwareConfig | str, logger: logging.Logger | None = None
    ) -> None:
        """Give back what a `prepare_environment` took, of this manager or of another one.

        It is found by the very ``cfg``, else by the path of its lock: ``cfg`` needs
        ``.hardware.lock_file_path`` only. Of several, the newest of this thread is released. Every
        step is carried out even if another one failed. Calling it twice, in a forked child, or
        without a prepare does nothing. Within an except or finally clause the exception in flight
        counts as the run's own, and is never masked.

        Raises:
            ConfigurationError: ``cfg`` has no path of a lock.
            ReleaseError: Steps failed, and the run itself did not. An `OSError`, too.
        """
        session = _prepared_for(cfg)
        if session is None:
            as_logger(logger).debug("nothing to release: no environment was prepared for this cfg")
            return
        if logger is not None:
            session.logger = as_logger(logger)
        error = sys.exc_info()[1]
        session.close(None if error is session.error_at_prepare else error)


def _prepared_for(cfg: object) -> Session | None:
    me = threading.get_ident()
    sessions = [session for session in reversed(open_sessions()) if session.by_hand]
    sessions.sort(key=lambda session: session.thread != me)  # those of this thread come first
    for session in sessions:
        if session.cfg is cfg:
            return session
    lock = read_lock_path(cfg)
    for session in sessions:
        if session.settings.lock_path == lock.path:
            return session
    real = os.path.realpath(lock.path)  # of /tmp on a Mac, or of a home behind a link
    for session in sessions:
        if os.path.realpath(session.settings.lock_path) == real:
            return session
    for session in sessions:
        if session.settings.lock_path_given == lock.given:
            return session
    return None
