"""A clock that goes on while the machine is suspended."""

from __future__ import annotations

import time

# That of macOS which goes on during sleep has the name of the one that does not on Linux.
_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


def now() -> float:
    """Seconds since some moment, with those for which the machine was suspended."""
    return time.clock_gettime(_CLOCK) if _CLOCK is not None else time.monotonic()
