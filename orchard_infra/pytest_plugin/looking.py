"""What this process has at one moment: children, open files, memory on devices. Only looks."""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
from typing import Any

import attrs

from orchard_infra.pytest_plugin.reach import storage_of
from orchard_infra.sanitizing.helpers import is_helper
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity

_DEVICES = re.compile(r"/dev/(?!shm/)\S+")
_OPEN_FILES = "/proc/self/fd"
# A program that led a run keeps the registry open until its end, see `orchard_infra.runs.registry`.
_REGISTRY = re.compile(r".*/runs(/\w+\.run)?( \(deleted\))?")
# Timers that pytest-timeout starts before the test begins; and the threads of this package that end
# soon after an environment: they start no process, and leave nothing.
_NO_MAKERS = ("pytest_timeout", "orchard-infra-background", "orchard-infra-lock")
_TORCH_MANAGER = "torch_shm_manager"[:15]  # as much of a name as the kernel keeps

_Storage = tuple[str, int]  # device and address


@attrs.frozen
class File:
    """An open file, told from the one that has its number later."""

    device: int
    inode: int
    name: str


@attrs.define
class Look:
    """What there is: processes below this one, and open files by their number."""

    children: set[ProcessIdentity] = attrs.field(factory=set)
    files: dict[int, File] = attrs.field(factory=dict)

    @classmethod
    def now(cls) -> Look:
        return cls(children_now(), files_now())

    def add(self, other: Look) -> None:
        self.children |= other.children
        self.files.update(other.files)

    def since(self, before: Look) -> Look:
        """What is here and was not there before."""
        return Look(
            self.children - before.children,
            {fd: file for fd, file in self.files.items() if before.files.get(fd) != file},
        )


@attrs.frozen
class Threads:
    """The threads that there are before a test: what they do is not the doing of the test.

    ``tasks`` are kernel ids, of threads that Python does not know as well.
    """

    me: int
    tasks: frozenset[int]
    idents: frozenset[int]
    python: frozenset[int]

    @classmethod
    def now(cls) -> Threads:
        me = threading.get_native_id()
        others = [
            thread
            for thread in threading.enumerate()
            if thread.native_id != me and not thread.name.startswith(_NO_MAKERS)
        ]
        try:
            tasks = {int(task) for task in os.listdir("/proc/self/task")}
        except OSError:
            tasks = set()
        return cls(
            me,
            frozenset(tasks - {me}),
            frozenset(t.ident for t in others if t.ident is not None),
            frozenset(t.native_id for t in others if t.native_id is not None),
        )

    def with_those_since(self, before: Threads) -> Threads:
        """These, and what was started since then."""
        now = Threads.now()
        return Threads(
            self.me,
            self.tasks | (now.tasks - before.tasks),
            self.idents | (now.idents - before.idents),
            self.python | (now.python - before.python),
        )

    def started(self) -> set[ProcessIdentity]:
        """The children that these threads have started; the kernel keeps a list for each."""
        found: set[int] = set()
        for task in self.tasks:
            try:
                with open(f"/proc/self/task/{task}/children", "rb") as children:
                    found.update(map(int, children.read().split()))
            except OSError:
                continue
        identities = (processes.identity_of(pid) for pid in found)
        return {identity for identity in identities if identity is not None}


def children_now() -> set[ProcessIdentity]:
    """The live processes below this one."""
    return set(processes.tree(os.getpid()).values()) if processes.has_children() else set()


def serves(pid: int) -> bool:
    """Whether a process only serves others: a resource tracker, a forkserver, torch's manager of
    shared memory. They end by themselves.
    """
    stat = processes.read_stat(pid)
    return stat is not None and (stat.name == _TORCH_MANAGER or is_helper(pid))


def files_now() -> dict[int, File]:
    """The open files of this process that may be leaks."""
    found = {}
    try:
        numbers = os.listdir(_OPEN_FILES)
    except OSError:
        return {}
    for number in numbers:
        try:
            name = os.readlink(f"{_OPEN_FILES}/{number}")
            status = os.stat(int(number))
        except OSError:
            continue  # the one that listed them
        # A driver keeps its device open, and an arena or a tensor its memory.
        is_kept = _DEVICES.fullmatch(name) or name.startswith("/dev/shm/")
        if not is_kept and not _REGISTRY.fullmatch(name):
            found[int(number)] = File(status.st_dev, status.st_ino, name)
    return found


def allocated() -> dict[str, int]:
    """The bytes that torch has given out on each device that this process uses."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    from orchard_infra.devices.torch_caches import _has_context, _initialised

    found = {}
    for name, backend in _initialised(torch, []):
        ask: Any = getattr(backend, "memory_allocated", None)
        reserved: Any = getattr(backend, "memory_reserved", None)
        if not callable(ask) or not callable(reserved):
            continue
        try:
            for index in range(backend.device_count()):
                if _has_context(torch, name, reserved, index):
                    found[f"{name}:{index}"] = int(ask(index))
        except Exception:  # a device that failed in the test
            continue
    return found


def tensors_now() -> dict[_Storage, int]:
    """The memory of every tensor on a device, in bytes. Looks at each object there is."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    if not isinstance(tensor, type):
        return {}
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), tensor):
            storage = storage_of(one)
            if storage is not None:
                found[storage[0]] = storage[1]
    return found
