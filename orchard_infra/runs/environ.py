"""The environment that a program was started with: what of it tells two runs apart.

``SEED=1 python sweep.py`` and ``SEED=2 python sweep.py`` are different runs, so environments are
compared as a whole, except for variables that differ between two shells of one user. Values may
be secret. A record keeps a keyed digest, never a value.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from orchard_infra.system import processes

# Variables that differ between two terminals, logins or services of one user, and that no
# program's results depend on. DISPLAY is not here: some simulators choose a GPU by it. Nor is what
# a program may be told by: WINDOW (of screen) and LINES are parameters, SSH_ORIGINAL_COMMAND is a
# task. A pattern is for a prefix that belongs to one program: TERM_PENALTY is a parameter, too.
IGNORED_VARIABLES = (
    "_",  # the path of the command, set by a shell
    "COLORTERM",
    "GPG_TTY",
    "INVOCATION_ID",  # systemd
    "JOURNAL_STREAM",  # systemd
    "OLDPWD",
    "ORCHARD_INFRA_RUN_ID",
    "PWD",  # the working directory is compared by itself
    "SHLVL",
    "SSH_AGENT_PID",
    "SSH_ASKPASS",
    "SSH_AUTH_SOCK",
    "SSH_CLIENT",
    "SSH_CONNECTION",
    "SSH_TTY",
    "STY",  # screen
    "SYSTEMD_EXEC_PID",
    "TERM",
    "TERMCAP",
    "TERMINAL_EMULATOR",  # JetBrains
    "TERMINATOR_DBUS_NAME",
    "TERMINATOR_DBUS_PATH",
    "TERMINATOR_UUID",
    "TERMINFO",
    "TERMINFO_DIRS",
    "TERM_FEATURES",
    "TERM_PROGRAM",
    "TERM_PROGRAM_VERSION",
    "TERM_SESSION_ID",
    "TMUX*",
    "VSCODE_*",
    "WINDOWID",
    "XDG_SESSION_ID",
)
_ignored = frozenset(name.encode() for name in IGNORED_VARIABLES if not name.endswith("*"))
_ignored_prefixes = tuple(name[:-1].encode() for name in IGNORED_VARIABLES if name.endswith("*"))


def comparable(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that tell two runs apart.

    >>> comparable({"SEED": "1", "PWD": "/home/me", "SSH_TTY": "/dev/pts/3"})
    {'SEED': '1'}
    """
    return {n: value for n, value in environ.items() if not _is_ignored(os.fsencode(n))}


def environment_digest(source: int | bytes | Mapping[str, str] | None, run_id: str) -> str | None:
    """A digest of the variables that tell two runs apart, keyed by the id of a run.

    Two environments have the same digest under one key when they are the same. ``source`` is a
    pid, the bytes that `processes.raw_environ` reads, or a mapping. None where the environment
    cannot be read, which includes one that a process has overwritten with zeros.
    """
    if isinstance(source, Mapping):
        source = b"".join(os.fsencode(f"{name}={source[name]}") + b"\0" for name in source)
    elif isinstance(source, int):
        source = processes.raw_environ(source)
    return None if source is None else _keyed(_hash(source), run_id)


def own_environment_digest(run_id: str) -> str | None:
    """The digest of the environment that this process was started with."""
    return _keyed(_own_hash(), run_id)


@functools.cache  # a program of a thousand short runs has one initial environment
def _own_hash() -> bytes:
    return _hash(processes.raw_environ(os.getpid()) or b"")


def _hash(raw: bytes) -> bytes:
    """A hash of the entries that count, sorted: shells export in any order. Empty for none."""
    entries = (entry for entry in raw.split(b"\0") if entry)
    counting = sorted(e for e in entries if not _is_ignored(e.partition(b"=")[0]))
    return _blake2b()(b"\0".join(counting)).digest() if counting else b""


def _is_ignored(name: bytes) -> bool:
    return name in _ignored or name.startswith(_ignored_prefixes)


def _keyed(hashed: bytes, run_id: str) -> str | None:
    if not hashed:
        return None
    digest: str = _blake2b()(hashed, key=run_id.encode()[:64], digest_size=16).hexdigest()
    return digest


def _blake2b() -> Any:
    try:
        from _blake2 import blake2b  # what hashlib has, without the 2 ms that importing it takes
    except ImportError:
        from hashlib import blake2b
    return blake2b
