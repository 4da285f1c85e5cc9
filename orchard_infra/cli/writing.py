"""Writes a file that a user has named: whole, or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` in the place of what is there. A pipe or a device is written to directly.

    Raises:
        OSError: It could not be done; what was there is as it was.
    """
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_bytes(data)
        return
    path = Path(os.path.realpath(path))
    unfinished = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
