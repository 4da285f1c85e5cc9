"""Several locks that are held together."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from locking import exit_status, forked, key_of
from orchard_infra import InfrastructureManager, managed_environment
from orchard_infra.environment import StopRequest
from orchard_infra.errors import (
    ConfigurationError,
    EnvironmentLockedError,
    InfrastructureError,
    LockLostError,
    LockSuspectError,
)
from orchard_infra.locks import all_of
from orchard_infra.locks.acquiring import acquire
from orchard_infra.locks.all_of import AllOf, AllOfLease
from orchard_infra.locks.base import Held, Lease, Lock, LockKey, SharedLock
from orchard_infra.locks.file import FileLease, FileLock
from orchard_infra.runs.record import RunRecord, describe_this_run
from support import wait_until


@attrs.frozen
class In:
    """A file lock in another directory, which every host sees or none."""

    directory: Path
    timeout: float | None = 0.0
    poll: float = 0.02
    seen_by_others: bool = False

    def _key(self, key: LockKey) -> LockKey:
        return attrs.evolve(key, path=self.directory / key.path.name)

    def try_acquire(self, key: LockKey, record: RunRecord) -> FileLease | Held:
        return FileLock().try_acquire(self._key(key), record)

    def holder(self, key: LockKey) -> RunRecord | None:
        return FileLock().holder(self._key(key))

    def holder_now(self, key: LockKey) -> RunRecord | None:
        return FileLock().holder_now(self._key(key))

    def is_shared(self, key: LockKey) -> bool:
        return self.seen_by_others

    def describe(self, key: LockKey) -> str:
        return f"the server {self.directory.name}"

    def runs(self) -> list[RunRecord]:
        return [record for path in self.directory.iterdir() if (record := _held_at(path))]


def _held_at(path: Path) -> RunRecord | None:
    return FileLock().holder_now(key_of(path))


@attrs.frozen
class Scripted:
    """A lock whose tries have the outcomes that are given, one after the other."""

    outcomes: Iterator[Any]
    timeout: float | None = 0.0

    def try_acquire(self, key: LockKey, record: RunRecord) -> Lease | Held:
        outcome = next(self.outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome  # type: ignore[no-any-return]

    def holder(self, key: LockKey) -> RunRecord | None:
        return None


class ScriptedLease:
    """A lease of which each call is written down, and may raise."""

    def __init__(self, name: str, calls: list[str], interval: float = 1.0, **errors: Exception):
        self.record = describe_this_run("digits")
        self.name, self.calls, self.interval, self.errors = name, calls, interval, errors
        self.fence = 7

    def _call(self, what: str) -> None:
        self.calls.append(f"{what} {self.name}")
        if what in self.errors:
            raise self.errors[what]

    def verify(self) -> None:
        self._call("verify")

    def renew(self) -> None:
        self._call("renew")

    def release(self) -> None:
        self._call("release")


@pytest.fixture
def key(tmp_path: Path) -> LockKey:
    return key_of(tmp_path / "here" / "x.lock")


@pytest.fixture
def servers(tmp_path: Path) -> tuple[In, In]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return In(tmp_path / "one"), In(tmp_path / "two")


def take(lock: Lock, key: LockKey) -> Lease:
    outcome = lock.try_acquire(key, describe_this_run("digits"))
    assert not isinstance(outcome, Held)
    return outcome


def is_free(lock: Lock, key: LockKey) -> bool:
    outcome = lock.try_acquire(key, describe_this_run("digits"))
    if isinstance(outcome, Held):
        return False
    outcome.release()
    return True


def scripted(*leases: ScriptedLease) -> Lease:
    return take(AllOf(*(Scripted(iter([lease])) for lease in leases)), key_of(Path("x.lock")))


# Taking and giving back.


def test_it_is_held_when_each_of_them_is_and_free_when_each_of_them_is(key, servers):
    both = AllOf(FileLock(), servers[0])
    lease = take(both, key)
    assert not is_free(FileLock(), key)
    assert not is_free(servers[0], key)
    assert not is_free(both, key)
    lease.verify()
    lease.renew()
    lease.release()
    lease.release()
    assert is_free(FileLock(), key)
    assert is_free(servers[0], key)
    with pytest.raises(LockLostError):
        lease.verify()


def test_of_what_was_taken_nothing_is_kept_when_a_later_one_is_held(key, servers):
    first, second = servers
    holder = take(second, key)
    outcome = AllOf(FileLock(), first, second).try_acquire(key, describe_this_run("digits"))
    assert isinstance(outcome, Held)
    assert outcome.holder == attrs.evolve(holder.record, environment=None)
    assert is_free(FileLock(), key)
    assert is_free(first, key)


def test_of_what_was_taken_nothing_is_kept_when_a_later_one_fails(key, servers):
    broken = Scripted(iter([InfrastructureError("the server is on fire")]))
    with pytest.raises(InfrastructureError, match="on fire") as caught:
        AllOf(FileLock(), servers[0], broken).try_acquire(key, describe_this_run("digits"))
    # Also while the traceback, and with it the frame of the attempt, is kept.
    assert caught.tb is not None
    assert is_free(FileLock(), key)
    assert is_free(servers[0], key)


@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_nothing_taken(key, servers):
    """No mask holds off a signal that another thread receives: its handler runs here."""
    both = AllOf(FileLock(), *servers)
    record = describe_this_run("digits")
    for number in itertools.count():
        countdown = number

        def trace(frame: types.FrameType, event: str, argument: object) -> Any:
            nonlocal countdown
            if frame.f_code.co_filename != all_of.__file__ or frame.f_code.co_name == "__del__":
                return None
            if event == "line":
                countdown -= 1
                if countdown < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        interrupted = False
        lease = None
        sys.settrace(trace)
        try:
            lease = both.try_acquire(key, record)
        except KeyboardInterrupt as error:
            interrupted = error.__traceback__ is not None
        finally:
            sys.settrace(None)
        if not interrupted:
            assert isinstance(lease, AllOfLease)
            lease.release()
            break
        gc.collect()
        for lock in (FileLock(), *servers):
            assert is_free(lock, key), f"line {number}: {lock} is still held"
    assert number > 10


def test_a_second_ctrl_c_while_they_are_given_back_leaves_nothing_taken(key):
    """An impatient user presses it twice while a server does not answer."""
    calls: list[str] = []

    class BrokenOff(ScriptedLease):
        def release(self) -> None:
            super().release()
            if len(calls) <= 2:
                raise KeyboardInterrupt

    locks = [Scripted(iter([BrokenOff(name, calls)])) for name in ("second", "third")]
    with pytest.raises(KeyboardInterrupt) as caught:
        AllOf(FileLock(), *locks, Scripted(iter([KeyboardInterrupt()]))).try_acquire(
            key, describe_this_run("digits")
        )
    # Also while the traceback, and with it the frame of the attempt, is kept: a notebook does so.
    assert caught.tb is not None
    assert calls[-1] == "release second"
    assert is_free(FileLock(), key)


def test_they_are_released_in_reverse_and_each_whatever_becomes_of_the_others():
    calls: list[str] = []
    lease = scripted(
        ScriptedLease("one", calls, release=OSError("one")),
        ScriptedLease("two", calls, release=OSError("two")),
        ScriptedLease("three", calls),
    )
    with pytest.raises(OSError, match="one"):
        lease.release()
    assert calls == ["release three", "release two", "release one"]


def test_a_lease_that_is_dropped_frees_all_of_them(key, servers):
    lease = take(AllOf(FileLock(), servers[0]), key)
    del lease
    gc.collect()
    assert is_free(FileLock(), key)
    assert is_free(servers[0], key)


def test_a_forked_child_releases_none_of_them(key, servers):
    lease = take(AllOf(FileLock(), servers[0]), key)
    with forked(lease.release) as pid:
        assert exit_status(pid) == 0
    lease.verify()
    lease.release()


# A held one.


def test_one_that_is_lost_counts_for_more_than_one_that_cannot_be_asked():
    calls: list[str] = []
    suspect = LockSuspectError("no answer")
    lease = scripted(
        ScriptedLease("one", calls, verify=suspect),
        ScriptedLease("two", calls, verify=LockLostError("gone"), renew=suspect),
        ScriptedLease("three", calls),
    )
    with pytest.raises(LockLostError, match="gone"):
        lease.verify()
    calls.clear()
    with pytest.raises(LockSuspectError, match="no answer"):
        lease.renew()
    assert calls == ["renew one", "renew two", "renew three"]


def test_the_fence_is_that_of_the_last_one_and_the_interval_the_shortest(key, servers):
    calls: list[str] = []
    last = ScriptedLease("last", calls, interval=2.0)
    last.fence = 42
    lease = scripted(ScriptedLease("first", calls, interval=3.0), last)
    assert lease.fence == 42
    assert lease.interval == 2.0
    real = take(AllOf(FileLock(), servers[0]), key)
    assert isinstance(real, AllOfLease)
    assert real.fence == real.parts[-1].fence
    real.release()
    # A fence of a later run is greater, whichever of the two it is drawn from.
    with contextlib.closing(_Closing(take(AllOf(FileLock(), servers[0]), key))) as later:
        assert later.lease.fence > real.fence


@attrs.frozen
class _Closing:
    lease: Lease

    def close(self) -> None:
        self.lease.release()


def test_a_pickled_lease_holds_nothing_and_frees_nothing(key, servers):
    lease = take(AllOf(FileLock(), servers[0]), key)
    copied = pickle.loads(pickle.dumps(lease))
    with pytest.raises(LockLostError):
        copied.verify()
    copied.release()
    del copied
    gc.collect()
    lease.verify()
    lease.release()


@pytest.mark.parametrize("which", [0, 1])
def test_the_loss_of_any_of_them_is_the_loss_of_the_lock(tmp_path, servers, which):
    (tmp_path / "two").rmdir()
    manager = InfrastructureManager(locker=AllOf(FileLock(interval=0.01), servers[0]))
    with managed_environment("digits", manager=manager) as env:
        lease = env._lease
        assert isinstance(lease, AllOfLease)
        part = lease.parts[which]
        assert isinstance(part, FileLease)
        os.unlink(part.path)
        with pytest.raises(LockLostError):
            env.ensure_held()
        assert env.lock_lost
        assert env.stop_requested is not None


def test_two_that_are_lost_at_once_are_one_loss(caplog):
    calls: list[str] = []
    stops: list[StopRequest] = []
    parts = [
        ScriptedLease(name, calls, interval=0.01, renew=LockLostError(f"{name} is gone"))
        for name in ("one", "two")
    ]
    lock = AllOf(FileLock(), *(Scripted(iter([part])) for part in parts))
    with managed_environment("digits", manager=InfrastructureManager(locker=lock)) as env:
        env.on_stop(stops.append)
        wait_until(lambda: {"renew one", "renew two"} <= set(calls))
        wait_until(lambda: stops)
        with pytest.raises(LockLostError, match="is gone"):
            env.verify()
    assert len(stops) == 1
    assert [r.levelno for r in caplog.records].count(logging.ERROR) == 1
    assert calls.count("release one") == calls.count("release two") == 1
    assert not env.lock_path.exists()


def test_each_part_is_looked_after_in_the_background(tmp_path, caplog):
    calls: list[str] = []
    parts = [ScriptedLease(name, calls, interval=0.01) for name in ("one", "two")]
    lock = AllOf(*(Scripted(iter([part])) for part in parts))
    with managed_environment("digits", manager=InfrastructureManager(locker=lock)):
        wait_until(lambda: {"renew one", "renew two"} <= set(calls))


# Who has it.


def test_who_has_the_last_one_is_the_holder(key, servers):
    server = servers[0]
    both = AllOf(FileLock(), server)
    assert both.holder(key) is None
    assert both.holder_now(key) is None
    elsewhere = take(server, key)  # a run on another host, say
    waiting = take(FileLock(), key)  # one that has got as far as the file
    for found in (both.holder(key), both.holder_now(key)):
        assert found is not None
        assert found.run_id == elsewhere.record.run_id
    elsewhere.release()
    assert both.holder_now(key) is None, "who has but the first one was taken for the holder"
    found = both.holder(key)
    assert found is not None, "nobody is told who stands in the way"
    assert found.run_id == waiting.record.run_id
    waiting.release()


def test_ranks_elsewhere_ask_the_last_one_that_they_see(key, servers):
    unseen, seen = servers[0], attrs.evolve(servers[1], seen_by_others=True)
    assert not AllOf(FileLock(), unseen).is_shared(key)
    both = AllOf(seen, unseen)
    assert both.is_shared(key)
    lease = take(both, key)
    theirs = AllOf(seen, In(key.path.parent))  # an unseen lock is another one on each host
    found = theirs.holder_now(key)
    assert found is not None
    assert found.run_id == lease.record.run_id
    lease.release()


def test_the_runs_of_all_servers_are_listed_once(key, servers):
    both = AllOf(FileLock(), *servers)
    assert both.runs() == ()
    lease = take(both, key)
    assert [record.run_id for record in both.runs()] == [lease.record.run_id]
    lease.release()


def test_it_is_described_by_all_of_them(key, servers):
    both = AllOf(FileLock(), servers[0])
    assert both.describe(key) == f"{key.path} and the server one"
    lease = take(servers[0], key)
    with pytest.raises(EnvironmentLockedError, match="and the server one is held by"):
        acquire(both, key, other_run(), logger=logging.Logger("quiet"))
    lease.release()


def other_run() -> RunRecord:
    """A run that cannot be taken for the one of this very process and thread."""
    return attrs.evolve(describe_this_run("digits"), create_time=1.0)


# How it is waited for.


def test_its_timeout_is_that_of_the_first_or_its_own(servers):
    assert AllOf(FileLock(timeout=3), FileLock()).timeout == 3
    assert AllOf(FileLock(timeout=None)).timeout is None
    assert AllOf(FileLock(timeout=3), timeout=None).timeout is None
    assert AllOf(FileLock(), timeout=60).timeout == 60
    for wrong in (-1, True, "1"):
        with pytest.raises(ValueError, match="timeout"):
            AllOf(FileLock(), timeout=wrong)  # type: ignore[arg-type]


def test_its_queue_is_that_of_the_first_lock_that_has_one(key, servers):
    key.path.parent.mkdir()
    with AllOf(servers[0], FileLock()).queue(key) as place:
        assert place.is_first()
    with pytest.raises(InfrastructureError), AllOf(*servers).queue(key):
        pass


def test_without_a_queue_it_is_waited_for_all_the_same(key, servers):
    both = AllOf(*servers, timeout=None)
    assert both.poll == 0.02
    assert AllOf(FileLock()).poll is None
    first = take(both, key)
    said: list[str] = []
    logger = logging.Logger("said")
    handler = logging.Handler()

    def emit(record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            said.append(record.getMessage())
            first.release()  # as soon as it is waited for

    handler.emit = emit  # type: ignore[method-assign]
    logger.addHandler(handler)
    second = acquire(both, key, other_run(), logger=logger)
    assert "waiting for the lock the server one and the server two" in said[0]
    second.release()


def test_all_connections_of_a_waiter_are_made_and_closed_together(key, servers):
    events: list[str] = []

    @attrs.frozen
    class Server:
        inner: In
        timeout: float | None = 0.0

        @contextlib.contextmanager
        def connect(self) -> Iterator[SharedLock]:
            events.append(f"connect {self.inner.directory.name}")
            yield self.inner
            events.append(f"close {self.inner.directory.name}")

        def try_acquire(self, key: LockKey, record: RunRecord) -> Lease | Held:
            raise AssertionError("tried beside its connection")

        def holder(self, key: LockKey) -> RunRecord | None:
            raise AssertionError("asked beside its connection")

    both = AllOf(FileLock(), *(Server(one) for one in servers), timeout=4)
    acquire(both, key, describe_this_run("digits")).release()
    assert events == ["connect one", "connect two", "close two", "close one"]
    with both.connect() as bound:
        assert bound.timeout == 4


# What it refuses.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AllOf(), "at least one"),
        (lambda: AllOf(FileLock(), AllOf(FileLock())), "inner AllOf"),
        (lambda: AllOf("postgresql://db"), "takes locks"),  # type: ignore[arg-type]
        (lambda: AllOf(FileLock), "takes locks"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_lock_is_refused(make: Callable[[], AllOf], words: str):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_one_lock_under_two_names_is_refused_at_once(key, servers):
    server = servers[0]
    for twice in (AllOf(FileLock(), FileLock(timeout=3)), AllOf(server, attrs.evolve(server))):
        with pytest.raises(ConfigurationError, match="one and the same"):
            acquire(twice, key, describe_this_run("digits"), logger=logging.Logger("quiet"))
        assert is_free(FileLock(), key)
        assert is_free(server, key)
    assert AllOf(FileLock(), server) == AllOf(FileLock(), attrs.evolve(server))
    assert pickle.loads(pickle.dumps(AllOf(FileLock()))) == AllOf(FileLock())
