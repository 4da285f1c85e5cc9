"""``--infra-leaks``: what each test, and each fixture of wider scope, leaves behind.

What is found is judged before anybody is blamed, because to stop or remove what belongs to
somebody else is worse than to miss a leak:

* What was there before the test is not of the test. What appears while a fixture of wider scope
  is set up is of that fixture, and is looked at when the fixture has been torn down.
* What a thread makes that was there before the test is not of the test, nor is what a process
  makes that was there.
* What the value of a wider fixture leads to, or a global of the test's module that is unchanged,
  is theirs: pools start workers when they are first used. What another module keeps in a global
  is meant for the program: to stop the service of a tracker loses somebody's records.
* Files are removed only if this very process has made them, see `makings`.
* Helpers that serve others (resource trackers, forkservers) are never blamed and never stopped.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import os
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import pytest

from orchard_infra.artifacts.removing import Removal, is_open, is_ours, opened_directory
from orchard_infra.devices.out_of_memory import clear_frames
from orchard_infra.devices.torch_caches import TorchCacheFlusher
from orchard_infra.pytest_plugin import InfraLeakWarning
from orchard_infra.pytest_plugin.looking import (
    Look,
    Threads,
    allocated,
    children_now,
    files_now,
    serves,
    tensors_now,
)
from orchard_infra.pytest_plugin.makings import SHARED_MEMORY, Made, Makings
from orchard_infra.pytest_plugin.reach import Reached, of_modules, reach
from orchard_infra.runs.membership import command_of
from orchard_infra.runs.membership import is_ours as is_our_process
from orchard_infra.system import processes
from orchard_infra.system.files import device_and_inode
from orchard_infra.system.killing import stop_processes
from orchard_infra.system.processes import ProcessIdentity
from orchard_infra.system.text import printable

VARIABLE = "ORCHARD_INFRA_TEST"  # what a test starts has it in its environment
_SETTLE = 0.5  # seconds for what is just ending
_GRACE = 1.0  # seconds between SIGTERM and SIGKILL
_POLL = 0.01
_COMMAND = 200  # characters of a command line
_MONOTONIC = (time.monotonic,)  # in a tuple, where freezegun does not replace it

_Fixture: TypeAlias = "pytest.FixtureDef[Any]"
_Tensors: TypeAlias = "dict[tuple[str, int], int]"


@attrs.frozen
class Leak:
    """One thing that was left, and what became of it."""

    what: str
    outcome: str

    def __str__(self) -> str:
        return printable(f"{self.what} ({self.outcome})")


@attrs.define
class Holdings:
    """What a test or a fixture has made, as far as it is there."""

    look: Look = attrs.field(factory=Look)
    made: list[Made] = attrs.field(factory=list)
    tensors: _Tensors = attrs.field(factory=dict)
    orphans: set[ProcessIdentity] = attrs.field(factory=set)

    def add(self, other: Holdings) -> None:
        self.look.add(other.look)
        self.made += other.made
        self.tensors.update(other.tensors)


@attrs.define
class _Test:
    """The test that runs now, and what there was when it began."""

    item: pytest.Item
    known: Look
    threads: Threads
    pids: frozenset[int]
    token: str
    last_error: object
    bytes_before: dict[str, int]
    globals_before: list[object]


class LeakWatch:
    """The part of the plugin that is registered unless ``--infra-leaks`` is off."""

    def __init__(self, config: pytest.Config, *, is_error: bool) -> None:
        self._config = config
        self._is_error = is_error
        self._ignored = config.getini("infra_leaks_ignore")
        self._makings = Makings()
        self._makings.listen()
        self._sees_files = bool(files_now())
        self._children: set[ProcessIdentity] = set()  # that were there before some test
        self.test_modules: frozenset[str] = frozenset()
        self._harmless_threads = Threads.now().python  # of xdist, and other plugins
        self._test: _Test | None = None
        self._active: dict[_Fixture, Holdings] = {}  # those of wider scope that are set up
        self._finished: list[tuple[str, Holdings]] = []
        self._tensors: _Tensors = {}
        self._bytes_of_tensors: dict[str, int] = {}

    def close(self) -> None:
        self._makings.close()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        modules = (getattr(item, "module", None) for item in session.items)
        self.test_modules = frozenset(module.__name__ for module in modules if module is not None)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        self._test = None
        with self._unless_blind():
            self._begin(item)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: _Fixture) -> Generator[None, object, object]:
        if fixturedef.scope == "function" or self._test is None:
            return (yield)
        test, before, threads = self._test, Look(), self._test.threads
        with self._unless_blind():
            before, threads = self._look(), Threads.now()
        mark = len(self._makings.entries)
        token = os.environ.pop(VARIABLE, None)
        try:
            return (yield)
        finally:
            if token is not None:
                os.environ[VARIABLE] = token
            made = Holdings(made=self._makings.take(mark))
            with self._unless_blind():
                if self._test is test:
                    made.look = self._look().since(before).since(test.known)
                    made.tensors = self._new_tensors()
                    self._tensors.update(made.tensors)
                    test.known.add(made.look)
                    test.threads = test.threads.with_those_since(threads)
            self._active.setdefault(fixturedef, Holdings()).add(made)

    def pytest_fixture_post_finalizer(self, fixturedef: _Fixture) -> None:
        holdings = self._active.pop(fixturedef, None)
        if holdings is not None:
            where = f" of {fixturedef.baseid}" if fixturedef.baseid else ""
            name = f"the {fixturedef.scope}-scoped fixture {fixturedef.argname}{where}"
            self._finished.append((name, holdings))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        try:
            result = yield
        except BaseException:
            text = self._end()
            if text:  # the error of the teardown comes first
                item.warn(InfraLeakWarning(text))
            raise
        text = self._end()
        if text and self._is_error:
            pytest.fail(text, pytrace=False)
        if text:
            item.warn(InfraLeakWarning(text))
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """After a Ctrl-C fixtures are torn down only now, by pytest's own hook."""
        text = self._end()
        if text:
            warnings.warn(InfraLeakWarning(text), stacklevel=1)

    @contextlib.contextmanager
    def _unless_blind(self) -> Iterator[None]:
        """Where there are no descriptors left, or something has replaced what is looked with (a
        fixture of pyfakefs), nothing fails, and nobody is judged until the next test.
        """
        try:
            yield
        except Exception:
            self._test = None

    def _look(self) -> Look:
        look = Look.now()
        if self._sees_files and not look.files:
            raise OSError("no open file is to be seen")
        return look

    def _begin(self, item: pytest.Item) -> None:
        self._makings.entries.clear()
        bytes_before = allocated()
        if bytes_before != self._bytes_of_tensors:
            self._tensors = tensors_now() if any(bytes_before.values()) else {}
            self._bytes_of_tensors = bytes_before
        known = self._look()
        # Those that were seen at any time are not of this test, whatever was seen meanwhile.
        self._children |= known.children
        known.children |= self._children
        self._test = _Test(
            item,
            known,
            Threads.now(),
            frozenset(processes.all_pids()),
            uuid.uuid4().hex,
            _last_error(),
            bytes_before,
            list(_globals_of(item)),
        )
        os.environ[VARIABLE] = self._test.token

    def _end(self) -> str:
        """Look, judge, and clear away; what there is to say, or nothing."""
        try:
            with _true_clock():
                return self._found()
        except Exception as error:
            return f"cannot look for what was left behind: {error}"

    def _found(self) -> str:
        test, finished = self._test, self._finished
        self._test, self._finished = None, []
        parts = []
        if test is not None:
            if os.environ.get(VARIABLE) == test.token:
                del os.environ[VARIABLE]
            error = _last_error()
            if isinstance(error, BaseException) and error is not test.last_error:
                # It holds every tensor that the test had in a variable, until the next test fails.
                clear_frames(error)
            del error
            made = Holdings(made=self._makings.take(0))
            if self._may_have_left(test, made):
                judge = _Judge(self, test)
                parts.append((test.item.nodeid, judge.of_test(made)))
            parts += self._of_fixtures(finished, test)
        else:
            parts += self._of_fixtures(finished, None)
        return "\n".join(
            f"{who} left behind:\n" + "\n".join(f"  {leak}" for leak in leaks)
            for who, leaks in parts
            if leaks
        )

    def _of_fixtures(
        self, finished: list[tuple[str, Holdings]], test: _Test | None
    ) -> Iterator[tuple[str, list[Leak]]]:
        now = None
        for name, holdings in finished:
            if now is None:
                now = Look.now()
            if _are_left(holdings, now):
                yield name, _Judge(self, test).of_fixture(holdings)

    def _may_have_left(self, test: _Test, made: Holdings) -> bool:
        """A cheap look: mostly there is nothing."""
        new = Look.now().since(test.known)
        return bool(
            new.children
            or new.files
            or made.made
            or _changed(test.bytes_before)
            or (not self._has_other_threads(test) and _orphans(test))
        )

    def _has_other_threads(self, test: _Test) -> bool:
        """Whether there are threads from before the test whose doing is not to be told from the
        test's: those that were there before the session are pytest's.
        """
        return bool(test.threads.python - self._harmless_threads)

    def _new_tensors(self) -> _Tensors:
        if not _changed(self._bytes_of_tensors):
            return {}
        return {key: size for key, size in tensors_now().items() if key not in self._tensors}

    def is_ignored(self, what: str) -> bool:
        return any(fnmatch.fnmatch(what, pattern) for pattern in self._ignored)

    def lasting_objects(self, test: _Test | None) -> Iterator[object]:
        """What goes on after the test, and may have been the reason to start something."""
        for fixturedef in self._active:
            if fixturedef.cached_result is not None:
                yield fixturedef.cached_result[0]
            # The generator of a fixture that yields, with its local variables.
            yield from getattr(fixturedef, "_finalizers", ())
        if test is not None:
            now = {id(one) for one in _globals_of(test.item)}
            yield from (one for one in test.globals_before if id(one) in now)


@attrs.define
class _Judge:
    """Decides what of the holdings is left, and clears it away."""

    watch: LeakWatch
    test: _Test | None
    _reached: Reached | None = attrs.field(default=None, init=False)
    _modules: Reached | None = attrs.field(default=None, init=False)
    _targets: set[ProcessIdentity] = attrs.field(factory=set, init=False)

    def of_test(self, made: Holdings) -> list[Leak]:
        test = self.test
        assert test is not None
        suspects: Callable[[], Look] = lambda: Look.now().since(test.known)  # noqa: E731
        gc.collect()  # what is in a cycle goes with the test: iterators of DataLoaders, pools
        _settle(lambda: bool(suspects().children or suspects().files))
        found = suspects()
        started = test.threads.started()
        made.look.children = {
            identity
            for identity in found.children
            if identity not in started and not self._is_of_another(identity, started)
        }
        is_alone = not self.watch._has_other_threads(test)
        has_ended = test.threads.python - Threads.now().python - self.watch._harmless_threads
        if has_ended or not (is_alone or test.threads.tasks):
            # The kernel gives the children of a thread that ends to another one; and where it has
            # no list for each thread, nobody knows who has started what.
            made.look.children = set()
        if is_alone:
            made.orphans = _orphans(test)
        leaks = list(self._stop(made.look.children, made.orphans))
        if leaks:
            _reap()
        made.look.files = {
            fd: file
            for fd, file in suspects().files.items()
            # A thread from before the test may serve what the test has asked for.
            if is_alone or file.name.startswith("/")
        }
        made.made = [m for m in made.made if m.thread not in test.threads.idents]
        if _changed(test.bytes_before):
            made.tensors = self.watch._new_tensors()
        return leaks + list(self._others(made))

    def of_fixture(self, holdings: Holdings) -> list[Leak]:
        gc.collect()
        _settle(lambda: bool(_are_left(holdings, Look.now())))
        leaks = list(self._stop(holdings.look.children & children_now(), set()))
        if leaks:
            _reap()
        now = files_now()
        holdings.look.files = {
            fd: file for fd, file in holdings.look.files.items() if now.get(fd) == file
        }
        if holdings.tensors:
            present = tensors_now()
            holdings.tensors = {k: v for k, v in holdings.tensors.items() if k in present}
        return leaks + list(self._others(holdings))

    def _is_of_another(self, identity: ProcessIdentity, started: set[ProcessIdentity]) -> bool:
        """Whether a process that was there before, or one that another thread has started, has
        started this one. A forkserver starts workers for whoever asks.
        """
        assert self.test is not None
        me = os.getpid()
        for pid in processes.ancestors(identity.pid):
            if pid == me:
                return False
            above = processes.identity_of(pid)
            if above in started or (above in self.test.known.children and not serves(pid)):
                return True
        return True  # its parent has just ended; it is not ours any more

    def _stop(
        self, children: set[ProcessIdentity], orphans: set[ProcessIdentity]
    ) -> Iterator[Leak]:
        """Stop what is left running, with all below it; helpers are left to end by themselves."""
        commands = {
            identity: command_of(identity.pid)
            for identity in sorted(children | orphans)
            if processes.is_alive(identity) and not self._is_lasting(identity.pid)
        }
        commands = {i: c for i, c in commands.items() if not self.watch.is_ignored(c)}
        own_session = processes.session_of(os.getpid())
        # A daemon that has left our session and our tree is meant to go on. It is named only.
        detached = {
            i for i in commands if i in orphans and processes.session_of(i.pid) != own_session
        }
        if not self._reach().is_whole or (commands and not self._reach_of_modules().is_whole):
            detached = set(commands)  # whose they are could not be found out
        self._targets = set(commands) - detached
        outcome = stop_processes(self._targets, grace=_GRACE, spare=self._is_spared)
        became = {
            **dict.fromkeys(outcome.stopped, "stopped"),
            **dict.fromkeys(outcome.killed, "ignored SIGTERM, killed"),
            **dict.fromkeys(outcome.gone, ""),
        }
        for identity, command in commands.items():
            end = became.get(identity, "not stopped")
            if end:  # else it has ended by itself just now
                yield Leak(f"process {identity.pid}: {command[:_COMMAND]}", end)

    def _is_spared(self, pid: int) -> bool:
        identity = processes.identity_of(pid)
        if identity in self._targets:
            return False
        known = self.test.known.children if self.test is not None else set()
        return identity in known or self._is_lasting(pid)

    def _is_lasting(self, pid: int) -> bool:
        return (
            serves(pid) or pid in self._reach().numbers or pid in self._reach_of_modules().numbers
        )

    def _others(self, holdings: Holdings) -> Iterator[Leak]:
        yield from self._descriptors(holdings)
        yield from self._made(holdings.made)
        sizes: dict[str, int] = {}
        kept = self._reach().storages | self._reach_of_item().storages if holdings.tensors else ()
        for (device, address), size in holdings.tensors.items():
            if (device, address) not in kept and not self.watch.is_ignored(device):
                sizes[device] = sizes.get(device, 0) + size
        for device, size in sorted(sizes.items()):
            yield Leak(f"device memory: {size} bytes in tensors on {device}", "cache emptied")
        if holdings.tensors:
            TorchCacheFlusher().flush()

    def _descriptors(self, holdings: Holdings) -> Iterator[Leak]:
        """Only told: by the time that one is closed by its number, the number may be another's."""
        if not holdings.look.files:
            return
        kept = {
            *self._reach().descriptors,
            *self._reach_of_item().descriptors,
            *self._reach_of_modules().descriptors,
            *_descriptors_of_helpers(),
        }
        now = files_now()  # again: a thread may just have closed its own
        for fd, file in sorted(holdings.look.files.items()):
            if now.get(fd) == file and fd not in kept and not self.watch.is_ignored(file.name):
                yield Leak(f"file descriptor {fd}: {file.name}", "left open")

    def _made(self, made: Iterable[Made]) -> Iterator[Leak]:
        alive: set[str] | None = None
        for one in made:
            if not one.is_there() or self.watch.is_ignored(one.path):
                continue
            name = one.path.removeprefix(SHARED_MEMORY)
            names = {one.path, name, f"/{name}"}
            if names & self._reach().texts or names & self._reach_of_modules().texts:
                continue
            if one.memory is not None:
                yield Leak(f"shared memory {one.path}", _remove_shared_memory(one, name))
                continue
            if alive is None:
                alive = {
                    os.path.abspath(o.name)
                    for o in gc.get_objects()
                    if type(o) is tempfile.TemporaryDirectory
                }
            # The first go away with an object that somebody still has, the second at exit.
            is_kept = one.path in alive or os.path.basename(one.path).startswith("pymp-")
            if not is_kept and not self._is_below_basetemp(one.path):
                yield Leak(f"temporary directory {one.path}", _remove_directory(one.path))

    def _is_below_basetemp(self, path: str) -> bool:
        factory = getattr(self.watch._config, "_tmp_path_factory", None)
        base = getattr(factory, "_basetemp", None)
        return isinstance(base, Path) and Path(path).is_relative_to(base)

    def _reach(self) -> Reached:
        if self._reached is None:
            self._reached = reach(self.watch.lasting_objects(self.test))
        return self._reached

    def _reach_of_modules(self) -> Reached:
        if self._modules is None:
            self._modules = reach(of_modules(self.watch.test_modules), any_number=False)
        return self._modules

    def _reach_of_item(self) -> Reached:
        """What goes away by itself when pytest forgets the test, which it does right after."""
        if self.test is None:
            return Reached()
        item = self.test.item
        values = list((getattr(item, "funcargs", None) or {}).values())
        return reach([*values, getattr(item, "_instance", None)])


@contextlib.contextmanager
def _true_clock() -> Iterator[None]:
    """A fixture of wider scope may have stopped the clock, and then no wait would end."""
    stopped, time.monotonic = time.monotonic, _MONOTONIC[0]
    try:
        yield
    finally:
        time.monotonic = stopped


def _are_left(holdings: Holdings, now: Look) -> bool:
    look = holdings.look
    return bool(
        look.children & now.children
        or any(now.files.get(fd) == file for fd, file in look.files.items())
        or any(made.is_there() for made in holdings.made)
        or holdings.tensors
    )


def _settle(is_left: Callable[[], bool]) -> None:
    """Give what is just ending some time: a process that was asked to, a pool that is closed."""
    deadline = time.monotonic() + _SETTLE
    while is_left() and time.monotonic() < deadline:
        time.sleep(_POLL)


def _orphans(test: _Test) -> set[ProcessIdentity]:
    """Processes that the test has started, and whose parents are gone: they carry its token."""
    young = set(processes.all_pids()) - test.pids
    found = set()
    for pid in young:
        if processes.started_with(pid, VARIABLE, (test.token,)) and is_our_process(pid):
            identity = processes.identity_of(pid)
            is_below = os.getpid() in processes.ancestors(pid)
            if identity is not None and not is_below and not serves(pid):
                found.add(identity)
    return found


def _changed(before: dict[str, int]) -> bool:
    """Whether it is worth while to look at tensors. What grew may be a workspace, and what shrank
    may hide a leak, when the model of a fixture was freed.
    """
    return allocated() != before


def _reap() -> None:
    """Let those who have started what was stopped take notice, and close their pipes."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:
        multiprocessing.active_children()
    cleanup = getattr(sys.modules.get("subprocess"), "_cleanup", None)
    if callable(cleanup):
        cleanup()
    gc.collect()


def _remove_directory(path: str) -> str:
    removal = Removal()
    removal.remove_directory(Path(path))
    return "removed" if not removal.failures else f"not removed: {removal.failures[0]}"


def _remove_shared_memory(made: Made, name: str) -> str:
    try:
        with opened_directory(SHARED_MEMORY) as directory:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if device_and_inode(status) != made.memory:
                return "not removed: it is another one by now"
            if not is_ours(status, True) or is_open(directory, name) is not False:
                return "not removed: somebody has it open"
            os.unlink(name, dir_fd=directory)
    except OSError as error:
        return f"not removed: {error.strerror}"
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    if made.is_tracked and tracker is not None and tracker._resource_tracker._fd is not None:
        # Else it would complain at exit that there is nothing left for it to remove.
        tracker.unregister(f"/{name}", "shared_memory")
    return "removed"


def _descriptors_of_helpers() -> set[int]:
    """Descriptors that serve the program until its end: those of trackers and forkservers, and the
    reserve of this package.
    """
    found: set[object] = set()
    for name, module in list(sys.modules.items()):
        if name.endswith("resource_tracker"):
            found.add(getattr(getattr(module, "_resource_tracker", None), "_fd", None))
        elif name.endswith(".forkserver"):
            server = getattr(module, "_forkserver", None)
            found.add(getattr(server, "_forkserver_alive_fd", None))
    found.update(getattr(sys.modules.get("orchard_infra.system.reserve"), "_descriptors", ()))
    return {fd for fd in found if type(fd) is int}


def _last_error() -> object:
    """The exception of the test that failed last, which pytest keeps for debuggers."""
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)


def _globals_of(item: pytest.Item) -> Iterator[object]:
    for owner in (getattr(item, "module", None), getattr(item, "cls", None)):
        yield from list(getattr(owner, "__dict__", {}).values())
