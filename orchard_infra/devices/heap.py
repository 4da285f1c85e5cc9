"""The heap of this process: giving free pages back to the system."""

from __future__ import annotations

import os
import sys


def trim() -> None:
    """Give the free pages of the glibc heap back, see malloc_trim(3).

    With another C library, or on another system than Linux, nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    # musl has no malloc_trim. ctypes releases the GIL during the call.
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))


def resident_bytes() -> int | None:
    """How much memory of this process is resident; None where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # another system
        import psutil

    try:
        return int(psutil.Process().memory_info().rss)
    except (psutil.Error, OSError):
        return None
