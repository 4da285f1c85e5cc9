"""What objects that live longer than a test refer to.

A pool in a session's fixture starts its workers when a test first uses it. They are no leak of
that test: the value of the fixture leads to them. This is looked at only when something seems
to be left.
"""

from __future__ import annotations

import gc
import io
import socket
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import attrs

_LIMIT = 1_000_000  # objects
_LARGE = 10_000  # members: data, in which any number may be found
_FOREIGN = frozenset(("_pytest", "pluggy", "xdist", "execnet"))  # they lead to everything


@attrs.define
class Reached:
    """Numbers (of processes), texts (paths), descriptors and tensors that were found."""

    numbers: set[int] = attrs.field(factory=set)
    texts: set[str] = attrs.field(factory=set)
    descriptors: set[int] = attrs.field(factory=set)
    storages: set[tuple[str, int]] = attrs.field(factory=set)
    is_whole: bool = True  # False: there was too much to look at


def reach(roots: Iterable[object]) -> Reached:
    """Follow references from ``roots``, but not into modules, classes or pytest itself."""
    found = Reached()
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    pending = list(roots)
    seen: set[int] = set()
    while pending:
        if len(seen) > _LIMIT:
            found.is_whole = False
            break
        one = pending.pop()
        kind = type(one)
        if kind is int:
            found.numbers.add(one)  # type: ignore[arg-type]
        elif kind is str:
            found.texts.add(one)  # type: ignore[arg-type]
        elif id(one) not in seen and not _leads_too_far(one):
            seen.add(id(one))
            if isinstance(tensor, type) and isinstance(one, tensor):
                storage = storage_of(one)
                if storage is not None:
                    found.storages.add(storage[0])
            found.descriptors.update(_descriptors_of(one))
            pending += gc.get_referents(one)
    return found


def storage_of(tensor: Any) -> tuple[tuple[str, int], int] | None:
    """The device and address of a tensor's memory, and its size; None where it is on no device."""
    try:
        if tensor.device.type in ("cpu", "meta"):
            return None
        storage = tensor.untyped_storage()
        return (str(tensor.device), int(storage.data_ptr())), int(storage.nbytes())
    except Exception:  # a fake, a sparse one, a subclass that does as it likes
        return None


def _leads_too_far(one: object) -> bool:
    kind = type(one)
    if isinstance(one, (ModuleType, type)):
        return True
    if kind is dict and ("__builtins__" in one or "__import__" in one):  # type: ignore[operator]
        return True  # the globals of a module
    if kind in (dict, list, tuple, set, frozenset) and len(one) > _LARGE:  # type: ignore[arg-type]
        return True
    module = getattr(kind, "__module__", None)
    if not isinstance(module, str):
        return False
    return module.partition(".")[0] in _FOREIGN or module.startswith("orchard_infra.pytest_plugin")


def _descriptors_of(one: object) -> Iterable[int]:
    """The descriptors that an object of the standard library holds open."""
    try:
        if isinstance(one, (io.FileIO, socket.socket)):
            return (one.fileno(),)
        module = type(one).__module__
        if module in ("multiprocessing.connection", "selectors") and hasattr(one, "fileno"):
            return (one.fileno(),)
        if ".popen_" in module:  # of multiprocessing, and of loky
            closes = getattr(vars(one).get("finalizer"), "_args", ())
            return [fd for fd in (vars(one)["sentinel"], *closes) if type(fd) is int]
    except (OSError, ValueError, KeyError, TypeError):  # closed, or not begun
        pass
    return ()
