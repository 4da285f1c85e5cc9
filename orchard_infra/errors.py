"""What can go wrong, as one tree.

::

    InfrastructureError (RuntimeError)
    |-- ConfigurationError       the configuration cannot be used; nothing was touched
    |-- EnvironmentLockedError   another run holds the project: .holder, .survivors, .lock_path
    |-- LockLostError            the lock was held and is not any more: .lock_path
    `-- ReleaseError (OSError)   steps of the release failed: .failures

All of them are a `RuntimeError`, so callers that catch ``(OSError, RuntimeError)`` around a run
keep working. They pickle with their data, so they cross a process pool whole: what is not in
``args`` has a default, and travels as state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchard_infra.runs.record import RunRecord, Survivor


class InfrastructureError(RuntimeError):
    """The environment of a run could not be set up, kept or torn down."""


class ConfigurationError(InfrastructureError):
    """The configuration cannot be used; nothing was touched.

    The message names the attribute's full path (``cfg.hardware.lock_file_path``) and what was
    found there.
    """


class EnvironmentLockedError(InfrastructureError):
    """The project is taken.

    ``holder`` is the record of the run that holds it, or None when the lock carries no readable
    record. ``survivors`` are the live processes of a holder that is itself dead: the lock goes
    free when they end.
    """

    def __init__(
        self,
        message: str,
        *,
        holder: RunRecord | None = None,
        survivors: Iterable[Survivor] = (),
        lock_path: str | None = None,
    ) -> None:
        super().__init__(message)
        self.holder = holder
        self.survivors = tuple(survivors)
        self.lock_path = lock_path


class LockLostError(InfrastructureError):
    """The lock was held and is not any more: another run may be writing to the same outputs."""

    def __init__(self, message: str, *, lock_path: str | None = None) -> None:
        super().__init__(message)
        self.lock_path = lock_path


class ReleaseError(InfrastructureError, OSError):
    """Steps of the release failed; the other steps were carried out.

    ``failures`` holds the exceptions in the order in which they happened. An `OSError` too, as
    the release of a lock file that cannot be removed always was.
    """

    def __init__(self, message: str, *, failures: Iterable[BaseException] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)
