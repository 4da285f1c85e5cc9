"""Half-written outputs of a run: files that match a pattern, and that the run has written."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

import attrs

from orchard_infra.artifacts.removing import (
    CAN_WALK,
    DIRECTORY,
    NOFOLLOW,
    Removal,
    is_open,
    is_ours,
    opened_directory,
)
from orchard_infra.system import processes

_DEPTH = 60  # directories: each open one costs a descriptor
# The clock by which a file system dates its files moves in steps of up to 10 ms.
_TICK = 0.01


def patterns(value: str | Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """Convert one pattern, or several. A single string is one: its letters would make "*"."""
    return (value,) if isinstance(value, str) else tuple(os.fspath(pattern) for pattern in value)


def check_patterns(
    _: object, attribute: attrs.Attribute[tuple[str, ...]], value: tuple[str, ...]
) -> None:
    for pattern in value:
        *above, last = PurePath(pattern).parts or ("",)
        first = next((index for index, part in enumerate(above) if _is_magic(part)), len(above))
        named = re.sub(r"\[.[^\]]*\]|[*?.]", "", last)
        if not named or pattern.endswith(("/", os.sep)) or "\0" in pattern or ".." in above[first:]:
            raise ValueError(
                f"{attribute.name}: {pattern!r} does not say which files it is for. It has to "
                "end in a name with more to it than wildcards, such as *.tmp or out/**/*.part"
            )


def remove_outputs(removal: Removal, cwd: str | None, pattern: str, since: float) -> None:
    """Remove the files that match ``pattern`` below ``cwd``, are ours, and were written after
    ``since`` (seconds since the epoch).
    """
    *parts, last = PurePath(pattern).parts
    root = Path()
    while parts and not _is_magic(parts[0]):
        root /= parts.pop(0)
    if not root.is_absolute():
        if cwd is None:
            removal.note(f"{pattern}: the working directory was deleted before the run began")
            return
        root = cwd / root
    if not CAN_WALK:
        removal.note(f"{pattern}: patterns need a POSIX system")
        return
    try:
        with opened_directory(root) as directory:
            _remove_matches(removal, directory, root, [*parts, last], since - _TICK, depth=0)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        removal.fail(root, error)


def _remove_matches(
    removal: Removal, directory: int, path: Path, parts: list[str], since: float, depth: int
) -> None:
    head, *rest = parts
    deeper = rest
    if head == "**":
        _remove_matches(removal, directory, path, rest, since, depth)
        head, deeper = "*", parts
    with os.scandir(directory) as entries:
        names = [
            (entry.name, entry.is_dir(follow_symlinks=False))
            for entry in entries
            if fnmatchcase(entry.name, head)
            and (head.startswith(".") or not entry.name.startswith("."))
        ]
    for name, is_directory in names:
        try:
            if not deeper:
                _remove_output(removal, directory, name, path / name, since)
            elif is_directory:
                if depth == _DEPTH:
                    raise OSError(errno.ELOOP, "too deep, not searched")
                below = os.open(name, DIRECTORY | NOFOLLOW, dir_fd=directory)
                try:
                    _remove_matches(removal, below, path / name, deeper, since, depth + 1)
                finally:
                    os.close(below)
        except FileNotFoundError:
            continue
        except OSError as error:
            removal.fail(path / name, error)


def _remove_output(removal: Removal, directory: int, name: str, path: Path, since: float) -> None:
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if not is_ours(status, stat.S_ISREG(status.st_mode)) or status.st_mtime < since:
        return
    # A frame of the exception may hold it open in this very process.
    here = frozenset([(status.st_dev, status.st_ino)])
    if is_open(directory, name) and not processes.has_open(os.getpid(), here):
        removal.kept.append(path)
        return
    removal.unlink(directory, name, status)
    removal.removed.append(path)


def _is_magic(part: str) -> bool:
    return any(letter in part for letter in "*?[")
