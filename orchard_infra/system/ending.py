"""The end of this process by a signal that came while its exit hooks ran.

Python prints what an exit hook raises, `SystemExit` included, and exits with 0: whoever sent a
SIGTERM is told that all went well. The status is Python's until it has finished, so it is changed
after that, in a handler of atexit(3). All other hooks, those of C as well, are called as ever.
"""

from __future__ import annotations

import signal


def end_by(signum: int) -> bool:
    """Have this process end as one that the signal has stopped, once everything else is done: by
    SIGINT itself, as Python does after a Ctrl-C, or with 128 + ``signum``. Call it in an exit hook.

    Returns whether that is possible: with the C libraries of Linux it is.
    """
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        # A handler may call exit(3) once more on Linux: the remaining ones follow, see atexit(3).
        name, argument = ("raise", signum) if signum == signal.SIGINT else ("exit", 128 + signum)
        function = ctypes.cast(getattr(libc, name), ctypes.c_void_p)
        refused: int = libc.__cxa_atexit(function, ctypes.c_void_p(argument), None)
    except (AttributeError, OSError, TypeError):
        return False
    return refused == 0
