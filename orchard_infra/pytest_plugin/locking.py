"""Locks for tests and sessions: one file for each name, in the runtime directory of the user.

The session's lock and those of its tests are two levels. While a session holds ``gpu0``, its own
tests that ask for ``gpu0`` exclude each other by a lock below it, so that no worker waits for its
own controller.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import weakref
from collections.abc import Iterable
from typing import Any, NoReturn

import attrs
import pytest

from orchard_infra.errors import EnvironmentLockedError, InfrastructureError
from orchard_infra.locks.acquiring import acquiring
from orchard_infra.locks.base import Held, Lease, LockKey
from orchard_infra.locks.file import FileLease, FileLock
from orchard_infra.runs.record import RunRecord, describe_this_run
from orchard_infra.system import files
from orchard_infra.system.text import printable

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_PATIENCE = 1.0  # seconds of waiting about which nobody is told
_TELL_AGAIN = 30.0  # seconds

_held: weakref.WeakSet[Lease] = weakref.WeakSet()


class InvalidMark(ValueError):
    """An `infra_lock` mark that says nothing sensible."""


@attrs.frozen
class _StampedLock(FileLock):
    """A file lock whose record says since when it is held, and not since when it was waited for."""

    def try_acquire(self, key: LockKey, record: RunRecord) -> FileLease | Held:
        return FileLock.try_acquire(self, key, attrs.evolve(record, started_at=time.time()))


@attrs.frozen
class Request:
    """One lock that a test or a session asks for."""

    name: str
    timeout: float | None


class Locks:
    """The locks that this process holds for its session and for the running test."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        # Now: a test may set ORCHARD_INFRA_DIR, and must meet the others all the same.
        self._directory = files.runtime_dir() / "pytest"
        self._of_session: list[Lease] = []
        self._of_test: list[Lease] = []
        workerinput: dict[str, Any] = getattr(config, "workerinput", {})
        self.of_session: dict[str, str] = dict(workerinput.get("infra_locks", {}))

    def hold_for_session(self, names: Iterable[str], timeout: float | None) -> None:
        """Take these for the whole session; end pytest where that does not work."""
        words = ("pytest", *self._config.invocation_params.args)
        for name in sorted(set(names)):
            if not _NAME.fullmatch(name):
                raise pytest.UsageError(f"--infra-lock: {_rule(name)}")
            try:
                lease, _ = self._take(Request(name, timeout), name, words, "this session")
            except InfrastructureError as error:
                self.release_all()
                pytest.exit(str(error), returncode=75)  # EX_TEMPFAIL, as `orchard-infra run`
            self._of_session.append(lease)
            self.of_session[name] = lease.record.run_id

    def hold_for_test(self, item: pytest.Item, timeout: float | None) -> None:
        """Take all locks that a test asks for, in the order of their names: two tests that want the
        same ones never wait for each other.

        Raises:
            InvalidMark: One of its marks is wrong.
            InfrastructureError: One of them cannot be had, or not in time.
        """
        words = ("pytest", item.nodeid)
        for request in requests_of(item, timeout):
            name = request.name
            if name in self.of_session:
                name = f"{name}@{self.of_session[name]}"  # '@' is in no name
            lease, waited = self._take(request, name, words, item.nodeid)
            self._of_test.append(lease)
            if waited:
                item.add_report_section("setup", "infra_lock", waited)

    def release_those_of_test(self) -> None:
        _release(self._of_test)

    def release_all(self) -> None:
        _release(self._of_test)
        _release(self._of_session)

    def _take(
        self, request: Request, file: str, words: tuple[str, ...], who: str
    ) -> tuple[Lease, str]:
        """The lock, and what there is to say of the time that it took."""
        _close_in_forks()
        path = files.private_directory(self._directory) / f"{file}.lock"
        lock = _StampedLock(timeout=request.timeout)
        record = describe_this_run(f"pytest: {request.name}", lock=str(path), argv=words)
        logger = _Listening()
        taken: list[Lease] = []
        began = time.monotonic()
        tell_at = began + _PATIENCE
        steps = acquiring(
            lock,
            LockKey(record.project, path),
            record,
            timeout=request.timeout,
            clear_dead=lambda dead: (),
            logger=logger,
            keep=taken.append,
        )
        try:
            with contextlib.closing(steps):
                for pause in steps:
                    pause.wait()
                    if time.monotonic() >= tell_at and logger.holder:
                        tell_at = time.monotonic() + _TELL_AGAIN
                        self._tell(f"{who} waits for the lock {request.name}: {logger.holder}")
        except EnvironmentLockedError as error:
            _refuse(error, request, who, time.monotonic() - began)
        except BaseException:
            _release(taken)
            raise
        _held.add(taken[0])
        waited = time.monotonic() - began
        if not logger.holder:
            return taken[0], ""
        return taken[0], f"waited {waited:.1f} s for {request.name}: {logger.holder}"

    def _tell(self, text: str) -> None:
        """Say something now, to the person in front of the terminal."""
        worker = getattr(self._config, "workerinput", {}).get("workerid")
        if worker is not None:
            # A worker has no terminal of its own; its stderr is that of the session.
            with contextlib.suppress(OSError):
                os.write(2, f"[{worker}] {text}\n".encode(errors="replace"))
            return
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(text)
            reporter.flush()


def requests_of(item: pytest.Item, timeout: float | None) -> list[Request]:
    """What the marks of a test ask for, in the order of the names. The closest mark of a name
    counts: that of a function before that of its class.
    """
    found: dict[str, Request] = {}
    for mark in item.iter_markers("infra_lock"):
        unknown = sorted(set(mark.kwargs) - {"timeout"})
        if unknown:
            raise InvalidMark(f"infra_lock does not know {', '.join(unknown)}; only timeout")
        if len(mark.args) != 1:
            raise InvalidMark('infra_lock takes one name, as in infra_lock("gpu0", timeout=600)')
        name = mark.args[0]
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidMark(f"infra_lock: {_rule(name)}")
        own = mark.kwargs.get("timeout", timeout)
        is_number = isinstance(own, (int, float)) and not isinstance(own, bool)
        if own is not None and not (is_number and own >= 0):
            raise InvalidMark(f"infra_lock: timeout must be seconds >= 0, or None; not {own!r}")
        found.setdefault(name, Request(name, own))
    return [found[name] for name in sorted(found)]


def _rule(name: object) -> str:
    return (
        "a name is up to 64 letters, digits, dots, dashes and underscores, and begins with a "
        f"letter or digit; not {name!r:.80}"
    )


def _refuse(error: EnvironmentLockedError, request: Request, who: str, waited: float) -> NoReturn:
    holder = "somebody who left no record" if error.holder is None else error.holder.describe()
    own = error.holder is not None and error.holder.pid == os.getpid()
    advice = (
        "This very process holds it already" if own else "Wait longer (timeout=), or stop that one"
    )
    raise EnvironmentLockedError(
        printable(
            f"{who} did not get the lock {request.name} (waited {waited:.1f} s), held by "
            f"{holder}. {advice}."
        ),
        holder=error.holder,
        lock_path=error.lock_path,
    ) from None


def _release(leases: list[Lease]) -> None:
    while leases:
        with contextlib.suppress(OSError, InfrastructureError):
            leases.pop().release()


class _Listening(logging.Logger):
    """Notes who is waited for. Nothing reaches the log of the test: that is about the test."""

    def __init__(self) -> None:
        super().__init__("infra_lock", logging.INFO)
        self.holder = ""

    def handle(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            holder: RunRecord | None = getattr(record, "holder", None)
            self.holder = "held by an unknown process"
            if holder is not None:
                self.holder = f"held by {holder.describe()}"


_closing_in_forks = False


def _close_in_forks() -> None:
    """Close the lock in every child that is forked from now on: with a copy of the descriptor, a
    worker of a DataLoader would keep the lock of a test whose process was killed.
    """
    global _closing_in_forks
    if not _closing_in_forks and hasattr(os, "register_at_fork"):
        _closing_in_forks = True
        os.register_at_fork(after_in_child=_close_copies)


def _close_copies() -> None:
    for lease in tuple(_held):
        lease.release()  # in a child this closes, and does nothing else
    _held.clear()
