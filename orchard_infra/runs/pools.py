"""What the processes of multiprocessing and loky look like from outside.

Their workers carry the program's name nowhere: a worker of a forkserver shows the server's command
line, one that was spawned shows a line of Python. Helpers serve the others: a *resource tracker*
removes shared memory once all processes that it serves have ended, and ends then; a *forkserver*
ends when the last process that may ask it for a worker has.
"""

from __future__ import annotations

import re
from typing import Literal

Role = Literal["worker", "forkserver", "tracker"]

# python -c "from multiprocessing.spawn import spawn_main; spawn_main(...)" --multiprocessing-fork
# python -c "from multiprocessing.resource_tracker import main;main(7)"
# python -c "from multiprocessing.forkserver import main; main(...)", and so do its workers
# python -c "from joblib.externals.loky.backend.resource_tracker import main; main(9, False)"
# python -m joblib.externals.loky.backend.popen_loky_posix --process-name ...
# Compiled when they are first needed: most programs have no such processes.
_CODE = (
    rb"\0-c\0from (?:[\w.]+\.)?(?:multiprocessing|multiprocess|billiard|loky\.backend)\."
    rb"(spawn|forkserver|resource_tracker|semaphore_tracker) import (?:spawn_main|main)\b"
)
_LOKY = rb"\0-m\0(?:[\w.]+\.)?loky\.backend\.popen_loky_\w+\0"
_FROZEN = b"\0--multiprocessing-fork\0"  # PyInstaller and others: the program itself, with this


def role_of(cmdline: bytes) -> Role | None:
    """What a process with this command line is in a pool, or None. A worker of a forkserver cannot
    be told from the server by that.
    """
    code = re.search(_CODE, cmdline)
    if code is not None:
        if code[1].endswith(b"tracker"):
            return "tracker"
        return "forkserver" if code[1] == b"forkserver" else "worker"
    if re.search(_LOKY, cmdline) or _FROZEN in cmdline:
        return "worker"
    return None
