"""What an interactive session keeps alive: the last traceback, and the outputs of its cells."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

from orchard_infra.devices.out_of_memory import clear_frames
from orchard_infra.devices.torch_caches import TorchCacheFlusher
from orchard_infra.report import FlushReport


def flush(*, outputs: bool = True) -> FlushReport:
    """Give back the memory that failed code still holds, in a notebook or at a prompt.

    A cell that fails leaves its traceback behind, for a debugger: in ``sys.last_exc`` and in
    IPython. It keeps the local variables of every function in it alive, and with them their
    tensors. They are cleared; the message of the error stays. Then torch's caches of the devices
    that this process has used are emptied, and the heap is trimmed.

    ``outputs``: forget the results of earlier cells too (IPython's ``Out``, ``_``, ``_7`` ...).
    Variables that you have named are never touched.

    The report, in bytes, shows itself as a small table. A program that is no interactive session
    may call this, too.

    >>> import orchard_infra
    >>> report = orchard_infra.flush()
    >>> report.failures
    ()
    """
    for error in _last_errors():
        clear_frames(error)
    if outputs:
        _forget_outputs()
    gc.collect()  # also without torch: a big array may be in a cycle with its exception
    return TorchCacheFlusher().flush()


def _shell() -> Any:
    """The IPython shell of this process, if there is one. IPython is not imported."""
    module = sys.modules.get("IPython")
    get_ipython = getattr(module, "get_ipython", None)
    return get_ipython() if callable(get_ipython) else None


def _last_errors() -> Iterator[BaseException]:
    shell = _shell()
    result = getattr(shell, "last_execution_result", None)
    kept = [
        getattr(sys, "last_exc", None),
        getattr(sys, "last_value", None),
        getattr(result, "error_in_exec", None),
        getattr(result, "error_before_exec", None),
    ]
    for error in kept:
        if isinstance(error, BaseException):
            yield error
    # Of these only the traceback is kept; an exception of our own carries it.
    for holder, name in ((sys, "last_traceback"), (getattr(shell, "InteractiveTB", None), "tb")):
        traceback = getattr(holder, name, None)
        if traceback is not None:
            yield Exception().with_traceback(traceback)


def _forget_outputs() -> None:
    shell = _shell()
    names = getattr(shell, "user_ns", None)
    cache = names.get("_oh") if isinstance(names, dict) else None
    if not isinstance(names, dict) or not isinstance(cache, dict):
        return
    hidden = getattr(shell, "user_ns_hidden", None)  # a second copy of the names that IPython sets
    spaces = [space for space in (names, hidden) if isinstance(space, dict)]
    outputs = {id(value) for value in cache.values()}
    for space in spaces:
        for name in ("_", "__", "___", *(f"_{number}" for number in cache)):
            # Only what IPython has put there: `_` may be a name of the user's own by now.
            if name in space and id(space[name]) in outputs:
                space[name] = ""
    displayhook = getattr(shell, "displayhook", None)
    for name in ("_", "__", "___"):
        if hasattr(displayhook, name):
            setattr(displayhook, name, "")
    cache.clear()
    result: Any = getattr(shell, "last_execution_result", None)
    if getattr(result, "result", None) is not None:
        result.result = None
