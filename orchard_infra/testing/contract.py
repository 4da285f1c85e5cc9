"""What every lock promises, as checks that any test runner can carry out.

    def test_my_lock():
        check_lock(MyLock)

    class TestMyLock(LockContract):  # the same for pytest, one test for each promise
        def make_lock(self):
            return MyLock()

The checks fork processes, kill some, and take each lock under a project name of its own. They need
no package beside this one, and a system with ``os.fork``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import itertools
import logging
import os
import pickle
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import attrs

from orchard_infra.errors import EnvironmentLockedError, LockLostError, LockSuspectError
from orchard_infra.locks.acquiring import acquiring
from orchard_infra.locks.base import Held, Lease, Lock, LockKey, connected
from orchard_infra.runs.record import RunRecord, describe_this_run
from orchard_infra.testing.children import Line, forked

_PATIENCE = 60.0  # seconds for another process to answer
_KNOWN_WITHIN = 60.0  # seconds until a holder knows that its lock was taken away
_REFUSED_WITHIN = 10.0  # seconds that a thread would wait for itself
_PROCESSES = 4  # that contend for one lock
_CYCLES = 25  # of each

# All that a project may be called, and nothing that a database, a server or a file should mind.
_HOSTILE = (
    *("a", "A", "a ", " a", "a.", "a/b", "a:b", "a\\b", "..", "/", "*", "?", "[a]", "{a}", "%s"),
    *("a'b", 'a"b', "a;--", "$1", "${a}", "a\u00e4", "aa\u0308", "\u540d\u524d", "\U0001f333"),
    *("x" * 199 + "1", "x" * 199 + "2"),
)

_Check = Callable[["_Case"], None]


def check_lock(
    make_lock: Callable[[], Lock],
    *,
    freed_within: float = 5.0,
    lose: Callable[[Lock, LockKey, Lease], object] | None = None,
    only: Collection[str] = (),
) -> tuple[str, ...]:
    """Hold a lock to its contract; the names of the checks that were made.

    ``freed_within`` is after how many seconds, at most, the lock of a killed process is free.
    ``lose(lock, key, lease)``, where it is given, takes a held lock away from its holder, as an
    administrator of the server could. ``only`` names the checks to make: none for all.

    Raises:
        AssertionError: The lock breaks a promise; the message says which.
    """
    unknown = set(only).difference(CHECKS)
    if unknown:
        raise ValueError(f"there are no such checks: {', '.join(sorted(unknown))}")
    made = []
    for name, check in CHECKS.items():
        if (only and name not in only) or (check is _is_known_to_be_lost and lose is None):
            continue
        _carry_out(check, make_lock, freed_within, lose)
        made.append(name)
    return tuple(made)


class LockContract:
    """To be inherited by a class of tests for pytest: one test for each promise of a lock.

    ``make_lock`` says how one is made. Override ``lose`` where a lock can be taken away from its
    holder, and ``freed_within`` where a killed process keeps it for more than five seconds.
    """

    freed_within = 5.0
    lose: Callable[[Lock, LockKey, Lease], object] | None = None

    def make_lock(self) -> Lock:
        raise NotImplementedError("make_lock says how the lock is made that is to be tested")


def _as_test(name: str, check: _Check) -> Callable[[LockContract], None]:
    def test(self: LockContract) -> None:
        if check is _is_known_to_be_lost and self.lose is None:
            return
        _carry_out(check, self.make_lock, self.freed_within, self.lose)

    test.__name__ = f"test_{name}"
    test.__doc__ = check.__doc__
    return test


def _carry_out(
    check: _Check,
    make_lock: Callable[[], Lock],
    freed_within: float,
    lose: Callable[[Lock, LockKey, Lease], object] | None,
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="orchard-infra-contract-"))
    try:
        check(_Case(make_lock, directory, freed_within, lose))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@attrs.frozen
class _Case:
    """One lock under one check."""

    make_lock: Callable[[], Lock]
    directory: Path
    freed_within: float
    lose: Callable[[Lock, LockKey, Lease], object] | None
    _project: str = attrs.field(factory=lambda: f"contract-{os.urandom(6).hex()}", init=False)

    def key(self, name: str = "") -> LockKey:
        """A key that nobody else has. Locks go by the project, by the path, or by both."""
        project = self._project + name
        digest = hashlib.sha256(name.encode()).hexdigest()
        return LockKey(project[-200:], self.directory / f"{digest[:16]}.lock")

    def record(self, key: LockKey) -> RunRecord:
        return describe_this_run(key.project, lock=str(key.path))

    def try_once(self, lock: Lock, key: LockKey) -> Lease | Held:
        return lock.try_acquire(key, self.record(key))

    def take(self, lock: Lock, key: LockKey, record: RunRecord | None = None) -> Lease:
        """Take a lock that is free, or is about to be."""
        record = record or self.record(key)
        deadline = time.monotonic() + self.freed_within
        while True:
            outcome = lock.try_acquire(key, record)
            if not isinstance(outcome, Held):
                return outcome
            _require(
                time.monotonic() < deadline,
                f"the lock should be free, and is held by {_who(outcome)} after "
                f"{self.freed_within:g} s",
            )
            time.sleep(0.02)

    def refuses(self, lock: Lock, key: LockKey) -> bool:
        """Whether a try finds it held; it is given back where it does not."""
        outcome = self.try_once(lock, key)
        if isinstance(outcome, Held):
            return True
        outcome.release()
        return False

    def refuses_others(self, key: LockKey) -> bool:
        """The same, tried by another process."""

        def work(line: Line) -> None:
            line.say(str(self.refuses(self.make_lock(), key)))

        with forked(work) as child:
            return child.line.hear(_PATIENCE) == "True"

    @contextlib.contextmanager
    def held_elsewhere(self, key: LockKey, lock: Lock | None = None) -> Iterator[_Holder]:
        """Another process that has the lock, until it is told to release it."""

        def work(line: Line) -> None:
            lease = self.take(lock or self.make_lock(), key)
            line.say(f"{lease.record.run_id} {lease.fence}")
            line.hear(_PATIENCE)
            lease.release()
            line.say("released")

        with forked(work) as child:
            run_id, fence = child.line.hear(_PATIENCE + self.freed_within).split()

            def release() -> None:
                child.line.say("release")
                child.line.hear(_PATIENCE)

            yield _Holder(run_id, int(fence), release, child.kill)


@attrs.frozen
class _Holder:
    """Another process that holds a lock."""

    run_id: str
    fence: int
    release: Callable[[], None]
    kill: Callable[[], None]


def _require(condition: object, sentence: str) -> None:
    """Not ``assert``: a caller may run with -O, where that does nothing."""
    if not condition:
        raise AssertionError(sentence)


def _who(held: Held) -> str:
    return "an unknown run" if held.holder is None else held.holder.describe()


def _is_lost(lease: Lease) -> bool:
    try:
        lease.verify()
    except LockLostError:
        return True
    except LockSuspectError:
        return False
    return False


def _seen_by_others(record: RunRecord) -> RunRecord:
    """The fields that a record has for everybody, and from the first moment."""
    return attrs.evolve(record, environment=None, fence=None)


# The promises.


def _one_thread_at_a_time(case: _Case) -> None:
    """While one thread has the lock, no other thread of the process gets it."""
    lock, key = case.make_lock(), case.key()
    lease = case.take(lock, key)
    refused: list[bool] = []
    thread = threading.Thread(target=lambda: refused.append(case.refuses(lock, key)))
    thread.start()
    thread.join(_PATIENCE)
    _require(refused == [True], "another thread got the lock while the first one held it")
    lease.release()


def _one_process_at_a_time(case: _Case) -> None:
    """While one process has the lock, no other one gets it; afterwards it does."""
    lock, key = case.make_lock(), case.key()
    lease = case.take(lock, key)
    _require(case.refuses_others(key), "another process got the lock while this one held it")
    lease.release()
    with case.held_elsewhere(key) as holder:
        _require(case.refuses(lock, key), "this process got the lock while another one held it")
        holder.release()
    case.take(lock, key).release()


def _one_of_many_that_contend(case: _Case) -> None:
    """Processes that contend for the lock have it one at a time, and with growing fences."""
    key, counter, log = case.key(), case.directory / "counter", case.directory / "log"
    counter.write_text("0")

    def work(line: Line) -> None:
        random.seed()
        lock = case.make_lock()
        for _ in range(_CYCLES):
            with connected(lock) as bound:
                while isinstance(lease := case.try_once(bound, key), Held):
                    time.sleep(random.uniform(0.001, 0.01))
            # Two at a time would lose some of these.
            number = int(counter.read_text() or "0")
            with open(log, "a") as file:
                file.write(f"{lease.fence}\n")
            counter.write_text(str(number + 1))
            lease.release()

    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(forked(work)) for _ in range(_PROCESSES)]
        for child in children:
            child.finish(_PATIENCE + case.freed_within)
    counted, total = int(counter.read_text() or "0"), _PROCESSES * _CYCLES
    _require(counted == total, f"two had the lock at a time: {counted} of {total} were counted")
    fences = [int(line) for line in log.read_text().split()]
    _require(
        all(one < next_ for one, next_ in itertools.pairwise(fences)),
        "a later holder of the lock had a fence that was not greater",
    )


def _says_who_has_it(case: _Case) -> None:
    """A try that fails tells whose record is in the lock."""
    lock, key = case.make_lock(), case.key()
    record = case.record(key)
    lease = case.take(lock, key, record)
    _require(lease.record.run_id == record.run_id, "the lease does not carry the record of the run")
    held = case.try_once(lock, key)
    _require(isinstance(held, Held), "the lock was given twice")
    assert isinstance(held, Held)
    _require(held.holder is not None, "who is refused is not told by whom the lock is held")
    assert held.holder is not None
    _require(
        _seen_by_others(held.holder) == _seen_by_others(record),
        f"the record of the holder was changed: {held.holder} instead of {record}",
    )
    lease.release()


def _holder_is_who_has_it(case: _Case) -> None:
    """`holder` is who has the lock; `holder_now` is nobody once it is free."""
    lock, key = case.make_lock(), case.key()
    _require(lock.holder(key) is None, "a lock that was never taken has a holder")
    now: Callable[[LockKey], RunRecord | None] | None = getattr(lock, "holder_now", None)
    with case.held_elsewhere(key) as holder:
        for look in (lock.holder, now or lock.holder):
            found = look(key)
            _require(
                found is not None and found.run_id == holder.run_id,
                "it has no holder, or another one",
            )
        holder.release()
    if now is not None:
        _require(now(key) is None, "a lock that was released has a holder now")


def _free_when_its_process_is_killed(case: _Case) -> None:
    """The lock of a process that was killed is free after the stated time."""
    lock, key = case.make_lock(), case.key()
    with case.held_elsewhere(key) as holder:
        _require(case.refuses(lock, key), "this process got the lock while another one held it")
        holder.kill()
        lease = case.take(lock, key)
        _require(lease.fence > holder.fence, "after a kill the fence did not grow")
        lease.release()


def _free_when_its_lease_is_dropped(case: _Case) -> None:
    """A lease that is dropped frees the lock: a Ctrl-C may come before it is assigned."""
    lock, key = case.make_lock(), case.key()
    lease = case.take(lock, key)
    del lease
    gc.collect()
    case.take(lock, key).release()


def _released_twice_is_once(case: _Case) -> None:
    """A second release of a lease does nothing, whoever has the lock by then."""
    lock, key = case.make_lock(), case.key()
    first = case.take(lock, key)
    first.release()
    first.release()
    second = case.take(lock, key)
    first.release()
    _require(not _is_lost(second), "the second release of a lease took the lock from the next run")
    _require(case.refuses_others(key), "the second release of a lease freed the next run's lock")
    second.release()


def _forked_child_never_releases(case: _Case) -> None:
    """A forked child cannot release the lock of its parent: neither by a call nor by its end."""
    lock, key = case.make_lock(), case.key()
    lease: Lease | None = case.take(lock, key)
    assert lease is not None

    def work(line: Line) -> None:
        nonlocal lease
        assert lease is not None
        lease.release()
        lease = None
        gc.collect()

    with forked(work) as child:
        child.finish(_PATIENCE)
    _require(not _is_lost(lease), "a forked child released the lock of its parent")
    _require(case.refuses_others(key), "a forked child released the lock of its parent")
    lease.release()
    case.take(lock, key).release()


def _fence_grows(case: _Case) -> None:
    """Each lease has a greater fence than all before it, in any process, and keeps it."""
    lock, key = case.make_lock(), case.key()
    last = -1
    for _ in range(2):
        lease = case.take(lock, key)
        fence = lease.fence
        _require(type(fence) is int and fence >= 0, f"a fence is an integer >= 0, not {fence!r}")
        _require(fence == lease.fence, "the fence of a lease changes")
        _require(fence > last, f"a fence did not grow: {fence} after {last}")
        lease.release()
        with case.held_elsewhere(key) as holder:
            _require(holder.fence > fence, f"a fence did not grow: {holder.fence} after {fence}")
            last = holder.fence
            holder.release()


def _verified_while_it_is_held(case: _Case) -> None:
    """`verify` and `renew` pass while the lock is held; after the release it is lost."""
    lock, key = case.make_lock(), case.key()
    lease = case.take(lock, key)
    lease.verify()
    lease.renew()
    _require(lease.interval > 0, "the interval is a number of seconds > 0")
    lease.release()
    _require(_is_lost(lease), "a lease that was released says that it holds the lock")


def _is_known_to_be_lost(case: _Case) -> None:
    """When the lock is taken away, `verify` says so, and a release leaves the next run's alone."""
    lock, key = case.make_lock(), case.key()
    lease = case.take(lock, key)
    assert case.lose is not None
    case.lose(lock, key, lease)
    deadline = time.monotonic() + _KNOWN_WITHIN
    while not _is_lost(lease):
        _require(time.monotonic() < deadline, "the lock was taken away, and verify does not say so")
        time.sleep(0.02)
    _require(_is_lost(lease), "a lock that was lost is held again")
    second = case.take(lock, key)
    lease.release()
    _require(not _is_lost(second), "the release of a lost lock took the next run's lock")
    _require(case.refuses_others(key), "the release of a lost lock freed the next run's lock")
    second.release()


def _pickled_lock_is_the_same_lock(case: _Case) -> None:
    """A pickled lock locks the same; a pickled lease holds nothing."""
    lock, key = case.make_lock(), case.key()
    copied: Lock = pickle.loads(pickle.dumps(lock))
    _require(copied.timeout == lock.timeout, "a pickled lock has another timeout")
    lease = case.take(lock, key)
    _require(case.refuses(copied, key), "a pickled lock got the lock while it was held")
    with contextlib.suppress(pickle.PicklingError, TypeError, AttributeError):
        powerless: Any = pickle.loads(pickle.dumps(lease))
        _require(_is_lost(powerless), "a pickled lease says that it holds the lock")
        powerless.release()
        del powerless
        gc.collect()
    _require(not _is_lost(lease), "a pickled lease released the lock")
    _require(case.refuses_others(key), "a pickled lease released the lock")
    lease.release()
    case.take(copied, key).release()


def _copied_lease_is_the_lease(case: _Case) -> None:
    """A copy of a lease is the lease: one that is dropped must not give the lock away."""
    lock, key = case.make_lock(), case.key()
    lease = case.take(lock, key)
    for make in (copy.copy, copy.deepcopy):
        _require(make(lease) is lease, f"{make.__name__} of a lease is another one")
    gc.collect()
    _require(not _is_lost(lease), "a copy of a lease released the lock")
    lease.release()


def _two_keys_never_meet(case: _Case) -> None:
    """Two projects have two locks, whatever characters are in their names."""
    lock = case.make_lock()
    keys = [case.key(name) for name in _HOSTILE]
    leases: list[Lease] = []
    for key in keys:
        outcome = case.try_once(lock, key)
        if isinstance(outcome, Held) and not leases:
            outcome = case.take(lock, key)  # a server may refuse for a while after its start
        _require(not isinstance(outcome, Held), f"project {key.project!r} met another one")
        assert not isinstance(outcome, Held)
        leases.append(outcome)
    for key, lease in zip(keys, leases, strict=True):
        found = lock.holder(key)
        _require(
            found is not None and found.run_id == lease.record.run_id,
            f"the lock of project {key.project!r} has another holder",
        )
    for number, lease in enumerate(leases):
        lease.release()
        _require(
            not any(_is_lost(other) for other in leases[number + 1 :][:3]),
            f"the release of project {keys[number].project!r} freed another one",
        )


def _never_waits_for_itself(case: _Case) -> None:
    """A thread that has the lock and wants it again is refused at once."""
    lock, key = case.make_lock(), case.key()
    lease = _acquire(lock, key, case.record(key), timeout=_PATIENCE)
    began = time.monotonic()
    try:
        _acquire(lock, key, case.record(key), timeout=_REFUSED_WITHIN).release()
    except EnvironmentLockedError as error:
        _require(
            error.holder is not None and error.holder.run_id == lease.record.run_id,
            "who is refused because of itself is not told so",
        )
        waited = time.monotonic() - began
        _require(waited < _REFUSED_WITHIN, "a thread waited for a lock that it has itself")
    else:
        raise AssertionError("one thread got the lock twice")
    lease.release()


def _waits_as_long_as_it_is_told(case: _Case) -> None:
    """A timeout of 0 fails at once, a number waits so long, and None waits until it is free."""
    lock, key = case.make_lock(), case.key()
    with case.held_elsewhere(key) as holder:
        for timeout in (0.0, 0.3):
            began = time.monotonic()
            try:
                _acquire(lock, key, case.record(key), timeout=timeout).release()
            except EnvironmentLockedError as error:
                waited = time.monotonic() - began
                _require(waited >= timeout, f"it waited {waited:g} s in place of {timeout:g} s")
                _require(
                    error.holder is not None and error.holder.run_id == holder.run_id,
                    "who gives up is not told who has the lock",
                )
            else:
                raise AssertionError("the lock was given twice")

        def work(line: Line) -> None:
            line.say("waits")
            lease = _acquire(case.make_lock(), key, case.record(key), timeout=None)
            line.say("has it")
            line.hear(_PATIENCE)
            lease.release()

        with forked(work) as waiter:
            waiter.line.hear(_PATIENCE)
            holder.release()
            waiter.line.hear(_PATIENCE)
            _require(case.refuses(lock, key), "who has waited for the lock does not have it")
            waiter.line.say("go on")
            waiter.finish(_PATIENCE)


def _acquire(lock: Lock, key: LockKey, record: RunRecord, *, timeout: float | None) -> Lease:
    """As a run does."""
    logger = logging.Logger("contract")
    steps = acquiring(lock, key, record, timeout=timeout, clear_dead=lambda dead: (), logger=logger)
    with contextlib.closing(steps):
        while True:
            try:
                next(steps).wait()
            except StopIteration as end:
                lease: Lease = end.value
                return lease


CHECKS: dict[str, _Check] = {
    check.__name__.lstrip("_"): check
    for check in (
        _one_thread_at_a_time,
        _one_process_at_a_time,
        _one_of_many_that_contend,
        _says_who_has_it,
        _holder_is_who_has_it,
        _free_when_its_process_is_killed,
        _free_when_its_lease_is_dropped,
        _released_twice_is_once,
        _forked_child_never_releases,
        _fence_grows,
        _verified_while_it_is_held,
        _is_known_to_be_lost,
        _pickled_lock_is_the_same_lock,
        _copied_lease_is_the_lease,
        _two_keys_never_meet,
        _never_waits_for_itself,
        _waits_as_long_as_it_is_told,
    )
}
"""The checks by name, in the order in which `check_lock` makes them."""

for _name, _check in CHECKS.items():
    setattr(LockContract, f"test_{_name}", _as_test(_name, _check))
