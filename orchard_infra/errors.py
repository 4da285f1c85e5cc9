"""What can go wrong, as one tree.

::

    InfrastructureError (RuntimeError)
    |-- ConfigurationError       the configuration cannot be used; nothing was touched
    |-- EnvironmentLockedError   another run holds the project: .holder, .survivors, .lock_path
    |-- LockLostError            the lock was held and no longer is: .lock_path
    |-- LockSuspectError         the server of the lock cannot be asked just now: .lock_path
    `-- ReleaseError (OSError)   steps of the release failed: .failures, .errno, .filename

Each of them is a `RuntimeError`, so callers that catch ``(OSError, RuntimeError)`` around a run
keep working. They pickle with their data, so they cross a process pool complete: an argument that
is not in ``args`` has a default, and travels as state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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

    ``holder`` is the record of the run that holds it, or None when the lock contains no readable
    record. ``survivors`` are the live processes of a holder whose program is dead: the lock is
    free once they end. ``reason`` says why it cannot be taken where nobody is known to hold it: its
    server does not answer, or has just started.
    """

    def __init__(
        self,
        message: str,
        *,
        holder: RunRecord | None = None,
        survivors: Iterable[Survivor] = (),
        lock_path: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.holder = holder
        self.survivors = tuple(survivors)
        self.lock_path = lock_path
        self.reason = reason


class LockLostError(InfrastructureError):
    """The lock was held and no longer is: another run may be writing to the same outputs."""

    def __init__(self, message: str, *, lock_path: str | None = None) -> None:
        super().__init__(message)
        self.lock_path = lock_path


class LockSuspectError(InfrastructureError):
    """The lock was held, and nobody knows just now whether it still is: its server does not answer.

    It does not last: within a time that each lock states, it is known to be held or to be lost.
    `Environment.ensure_held` waits for that.
    """

    def __init__(self, message: str, *, lock_path: str | None = None) -> None:
        super().__init__(message)
        self.lock_path = lock_path


class ReleaseError(InfrastructureError, OSError):
    """Steps of the release failed; the other steps were carried out.

    ``failures`` holds the exceptions in the order in which they happened. It is an `OSError` too,
    because callers expect one when a lock file cannot be removed. ``errno``, ``strerror`` and
    ``filename`` are those of the first failure that has an ``errno``, or None. ``str(error)`` is
    the message all the same.
    """

    def __init__(self, message: str, *, failures: Iterable[BaseException] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)

    # Properties, and not the fields of `OSError`: those change the message when they are set, and
    # a pickle loses them.
    @property
    def errno(self) -> int | None:  # type: ignore[override]
        return getattr(self._first_os_error, "errno", None)

    @property
    def strerror(self) -> str | None:  # type: ignore[override]
        return getattr(self._first_os_error, "strerror", None)

    @property
    def filename(self) -> Any:
        return getattr(self._first_os_error, "filename", None)

    @property
    def _first_os_error(self) -> OSError | None:
        errors = (error for error in self.failures if isinstance(error, OSError))
        return next((error for error in errors if error.errno is not None), None)
