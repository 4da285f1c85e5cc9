"""A number in a file that only grows: the fences of a lock file."""

from __future__ import annotations

import os
import time

from orchard_infra.errors import InfrastructureError
from orchard_infra.system import files
from orchard_infra.system.flock import lock_descriptor
from orchard_infra.system.masking import uninterrupted

_MODE = 0o644
_DIGITS = 20  # and a newline: more is no counter of ours
_GREATEST = 2**63 - 1
_TRIES = 1000  # one each millisecond; to draw takes some 0.1 ms


def draw(path: str) -> int:
    """One more than ever before, and at least the time of day in milliseconds, so that a counter
    which somebody has removed does not begin again. The file is made where it is missing.

    Only the holder of the lock draws. The file is locked all the same: one who has just lost the
    lock may draw at the same time as its successor, and never gets the same number.

    Raises:
        InfrastructureError: It cannot be read or written, or holds something else.
    """
    try:
        with uninterrupted():
            fd = _open(path)
            try:
                _lock(fd, path)
                last = _parse(files.read_bounded(fd, _DIGITS + 2), path)
                fence = max(last + 1, time.time_ns() // 1_000_000)
                files.write_whole(fd, f"{fence}\n".encode())
                return fence
            finally:
                os.close(fd)
    except OSError as error:
        raise InfrastructureError(
            f"cannot count the runs in {path}: {error.strerror}. env.fence needs a file there that "
            "this user may write"
        ) from error


def _open(path: str) -> int:
    while True:
        try:
            return files.open_existing(path, os.O_RDWR)
        except FileNotFoundError:
            try:
                return files.create_exclusive(path, _MODE)
            except FileExistsError:
                continue  # somebody was faster


def _lock(fd: int, path: str) -> None:
    # Who may read the file may lock it, and never let go.
    for _ in range(_TRIES):
        if lock_descriptor(fd):
            return
        time.sleep(0.001)
    raise InfrastructureError(f"cannot count the runs in {path}: another process keeps it locked")


def _parse(data: bytes, path: str) -> int:
    # Empty: made just now, or by a run that was killed before it had written. A power loss leaves
    # zeros.
    text = data.strip(b" \t\r\n\0")
    if text and not (text.isdigit() and len(text) < _DIGITS and int(text) < _GREATEST):
        raise InfrastructureError(
            f"{path} is no counter of runs: it holds {data[:40]!r}. Move it away, or use another "
            "lock path"
        )
    return int(text or 0)
