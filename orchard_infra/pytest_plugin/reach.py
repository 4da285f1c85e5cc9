"""What objects that live longer than a test refer to.

A pool in a session's fixture starts its workers when a test first uses it. They are no leak of
that test: the value of the fixture leads to them. This is looked at only when something seems
to be left.
"""

from __future__ import annotations

import gc
import io
import os
import socket
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from types import ModuleType
from typing import Any

import attrs

_LIMIT = 1_000_000  # objects
_LARGE = 10_000  # members: data, in which any number may be found
_FOREIGN = frozenset(
    ("__main__", "_pytest", "pluggy", "xdist", "execnet")
)  # they lead to everything
_HOLDERS = (io.FileIO, socket.socket, subprocess.Popen)
_HOLDING = frozenset(("multiprocessing.connection", "selectors"))


@attrs.define
class Reached:
    """Numbers (of processes), texts (paths), descriptors and tensors that were found."""

    numbers: set[int] = attrs.field(factory=set)
    texts: set[str] = attrs.field(factory=set)
    descriptors: set[int] = attrs.field(factory=set)
    storages: set[tuple[str, int]] = attrs.field(factory=set)
    is_whole: bool = True  # False: there was too much to look at


def reach(roots: Iterable[object], *, any_number: bool = True) -> Reached:
    """Follow references from ``roots``, but not into modules, classes or pytest itself.

    Without ``any_number`` only objects that stand for a process tell its number: a library has
    tables of numbers, and in a container numbers of processes are small.
    """
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
            if any_number:
                found.numbers.add(one)  # type: ignore[arg-type]
        elif kind is str:
            found.texts.add(one)  # type: ignore[arg-type]
        elif id(one) not in seen and not _leads_too_far(one):
            seen.add(id(one))
            if isinstance(tensor, type) and issubclass(kind, tensor):
                storage = storage_of(one)
                if storage is not None:
                    found.storages.add(storage[0])
            if _holds(kind):
                found.descriptors.update(_descriptors_of(one))
                pid = getattr(one, "pid", None)
                if type(pid) is int:
                    found.numbers.add(pid)
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
    # The class and never `isinstance`: some objects of libraries answer with a warning.
    kind = type(one)
    if issubclass(kind, (ModuleType, type)):
        return True
    if kind is dict and ("__builtins__" in one or "__import__" in one):  # type: ignore[operator]
        return True  # the globals of a module
    if kind in (dict, list, tuple, set, frozenset) and len(one) > _LARGE:  # type: ignore[arg-type]
        return True
    module = _module_of(kind)
    return module.partition(".")[0] in _FOREIGN or module.startswith("orchard_infra.pytest_plugin")


def _module_of(kind: type) -> str:
    module = kind.__module__
    return module if type(module) is str else ""


def _holds(kind: type) -> bool:
    """Whether an object of this class holds descriptors, or stands for a process."""
    module = _module_of(kind)
    return issubclass(kind, _HOLDERS) or module in _HOLDING or ".popen_" in module


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


def of_modules(tests: Collection[str]) -> Iterator[object]:
    """The globals of every module but those of ``tests``. What a library, or the code under test,
    keeps there is meant for the whole program: the service of an experiment tracker, the pool of
    joblib, a server that a helper starts once for all tests.

    Not those of the standard library: multiprocessing and subprocess list there what they have
    started, and nobody waits for. But a path in the environment leads child processes there.
    """
    yield dict(os.environ)
    for name, module in list(sys.modules.items()):
        package = name.partition(".")[0]
        is_foreign = package in sys.stdlib_module_names or package in _FOREIGN
        if not is_foreign and name not in tests:
            yield from list(getattr(module, "__dict__", {}).values())
