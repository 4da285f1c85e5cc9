"""One contract for every lock, and locks that break it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import attrs
import pytest

from orchard_infra.locks.all_of import AllOf
from orchard_infra.locks.base import Held, Lease, Lock, LockKey
from orchard_infra.locks.file import FileLease, FileLock
from orchard_infra.locks.postgres import PostgresLock
from orchard_infra.locks.redis import RedisLock
from orchard_infra.runs.record import RunRecord
from orchard_infra.testing import LockContract, check_lock
from orchard_infra.testing.contract import CHECKS
from servers import PostgresServer, RedisServer
from support import run_python


class TestFileLock(LockContract):
    def make_lock(self) -> Lock:
        return FileLock()

    def lose(self, lock: Lock, key: LockKey, lease: Lease) -> None:
        os.unlink(key.path)


class OnPostgres(LockContract):
    @pytest.fixture(autouse=True)
    def _server(self, postgres: PostgresServer) -> None:
        self.server = postgres

    def postgres_lock(self) -> PostgresLock:
        return PostgresLock(self.server.url)

    def cut_off(self, key: LockKey) -> None:
        """Somebody else has the lock before the holder knows that its session has ended."""
        name = key.project.replace("'", "''")
        self.server.execute(
            f"UPDATE orchard_infra_locks SET fence = fence + 1 WHERE project = '{name}'"
        )


class TestPostgresLock(OnPostgres):
    def make_lock(self) -> Lock:
        return self.postgres_lock()

    def lose(self, lock: Lock, key: LockKey, lease: Lease) -> None:
        self.cut_off(key)


class TestFileAndPostgres(OnPostgres):
    def make_lock(self) -> Lock:
        return AllOf(FileLock(), self.postgres_lock())

    def lose(self, lock: Lock, key: LockKey, lease: Lease) -> None:
        os.unlink(key.path)  # it would stay held until the release
        self.cut_off(key)


class TestRedisLock(LockContract):
    freed_within = 30.0

    @pytest.fixture(autouse=True)
    def _server(self, redis_server: RedisServer) -> None:
        self.server = redis_server

    def make_lock(self) -> Lock:
        # The server has just been started: with the guard, nobody would be granted anything yet.
        return RedisLock(self.server.url, ttl=4.0, renew=1.0, guard=False)

    def lose(self, lock: Lock, key: LockKey, lease: Lease) -> None:
        assert isinstance(lock, RedisLock)
        stem = f"orchard-infra:{{{key.project}}}"
        self.server.execute("SET", f"{stem}:lock", "somebody else", "PX", "500")


# Locks that break it: each in one way, and one check says so.


@attrs.define(eq=False)
class BrokenLease:
    """A lease of a `FileLock`, but for one fault."""

    inner: FileLease
    fault: str
    pid: int = attrs.field(factory=os.getpid)
    record: RunRecord = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.record = self.inner.record
        if self.fault == "dropped":
            kept.append(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __copy__(self) -> BrokenLease:
        if self.fault == "copied":
            return BrokenLease(self.inner, self.fault)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> BrokenLease:
        return copy.copy(self)

    @property
    def fence(self) -> int:
        fence = self.inner.fence
        return {"fence goes back": 2**62 - fence, "fence stays": 1}.get(self.fault, fence)

    def verify(self) -> None:
        if self.fault != "never lost":
            self.inner.verify()

    def release(self) -> None:
        if self.fault == "child releases" and os.getpid() != self.pid:
            os.unlink(self.inner.path)
        elif (
            self.fault == "twice is twice" and self.inner._fd < 0
        ) or self.fault == "frees a lost one":
            self.inner.path.unlink(missing_ok=True)
        self.inner.release()


kept: list[FileLease] = []


@attrs.frozen
class BrokenLock:
    """A `FileLock`, but for one fault."""

    fault: str
    timeout: float | None = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        if self.fault == "pickled":
            return BrokenLock, ("another file", self.timeout)
        return BrokenLock, (self.fault, self.timeout)

    def _key(self, key: LockKey) -> LockKey:
        names = {
            "another file": f"{key.path}.other",
            "one for each process": f"{key.path}.{os.getpid()}",
            "keys meet": str(key.path.parent / f"{''.join(filter(str.isalnum, key.project))}.lock"),
            "letters meet": str(key.path.parent / f"{key.project.casefold().encode().hex()[:200]}"),
        }
        if self.fault == "threads" and kept_by(key):
            return attrs.evolve(key, path=Path(f"{key.path}.again"))
        return attrs.evolve(key, path=Path(names.get(self.fault, key.path)))

    def try_acquire(self, key: LockKey, record: RunRecord) -> Lease | Held:
        key = self._key(key)
        outcome = FileLock().try_acquire(key, record)
        if isinstance(outcome, FileLease):
            return BrokenLease(outcome, self.fault)
        if self.fault == "grants twice":
            os.unlink(key.path)
            return self.try_acquire(key, record)
        if self.fault == "forgets the record":
            return Held()
        if self.fault == "changes the record" and outcome.holder is not None:
            return Held(attrs.evolve(outcome.holder, cwd="/elsewhere"))
        return outcome

    def holder(self, key: LockKey) -> RunRecord | None:
        if self.fault == "no holder":
            return None
        return FileLock().holder(self._key(key))

    def holder_now(self, key: LockKey) -> RunRecord | None:
        if self.fault == "holder for ever":
            found = FileLock().holder(self._key(key))
            if found is not None:
                remembered[key] = found
            return remembered.get(key)
        return FileLock().holder_now(self._key(key))


remembered: dict[LockKey, RunRecord] = {}


def kept_by(key: LockKey) -> bool:
    record = FileLock().holder(key)
    return record is not None and record.pid == os.getpid()


@attrs.frozen
class FileThatIsThere:
    """The lock of many a script: whoever makes the file has it. It stays after a kill."""

    timeout: float | None = 0.0

    def try_acquire(self, key: LockKey, record: RunRecord) -> Lease | Held:
        try:
            os.close(os.open(key.path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return Held()
        return FileThatIsThereLease(key.path, record)

    def holder(self, key: LockKey) -> RunRecord | None:
        return None


@attrs.define
class FileThatIsThereLease:
    path: Path
    record: RunRecord
    interval: float = 1.0
    fence: int = 1

    def verify(self) -> None: ...
    def renew(self) -> None: ...
    def release(self) -> None:
        self.path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("fault", "check", "sentence"),
    [
        ("threads", "one_thread_at_a_time", "another thread got the lock"),
        ("grants twice", "one_process_at_a_time", "another process got the lock"),
        (
            "one for each process",
            "one_of_many_that_contend",
            "two had the lock at a time|not greater",
        ),
        ("fence stays", "one_of_many_that_contend", "not greater"),
        ("forgets the record", "says_who_has_it", "not told by whom"),
        ("changes the record", "says_who_has_it", "was changed"),
        ("no holder", "holder_is_who_has_it", "has no holder"),
        ("holder for ever", "holder_is_who_has_it", "has a holder now"),
        ("dropped", "free_when_its_lease_is_dropped", "should be free"),
        ("twice is twice", "released_twice_is_once", "took the lock from the next"),
        ("child releases", "forked_child_never_releases", "forked child released"),
        ("fence goes back", "fence_grows", "did not grow"),
        ("never lost", "verified_while_it_is_held", "says that it holds the lock"),
        ("never lost", "is_known_to_be_lost", "verify does not say so"),
        ("frees a lost one", "is_known_to_be_lost", "took the next run's lock"),
        ("pickled", "pickled_lock_is_the_same_lock", "a pickled lock got the lock"),
        ("copied", "copied_lease_is_the_lease", "is another one"),
        ("keys meet", "two_keys_never_meet", "met another one"),
        ("letters meet", "two_keys_never_meet", "'.*A' met another one"),
        ("forgets the record", "never_waits_for_itself", "not told so"),
        ("forgets the record", "waits_as_long_as_it_is_told", "not told who has the lock"),
    ],
)
def test_a_lock_with_a_fault_does_not_pass(
    fault: str, check: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds in ("_KNOWN_WITHIN", "_REFUSED_WITHIN"):
        monkeypatch.setattr(f"orchard_infra.testing.contract.{seconds}", 0.5)
    with pytest.raises(AssertionError, match=sentence):
        check_lock(
            lambda: BrokenLock(fault),
            freed_within=0.2,
            lose=lambda lock, key, lease: os.unlink(key.path),
            only=[check],
        )
    while kept:
        kept.pop().release()


def test_the_same_lock_without_a_fault_passes() -> None:
    made = check_lock(lambda: BrokenLock("none"), lose=lambda lock, key, lease: os.unlink(key.path))
    assert made == tuple(CHECKS)


def test_a_file_that_is_merely_there_is_no_lock() -> None:
    with pytest.raises(AssertionError, match="should be free"):
        check_lock(FileThatIsThere, freed_within=0.2, only=["free_when_its_process_is_killed"])
    with pytest.raises(AssertionError, match=r"took the lock|freed"):
        check_lock(FileThatIsThere, freed_within=0.2, only=["released_twice_is_once"])


def test_every_check_is_shown_to_fail_and_is_a_test_of_the_class() -> None:
    (cases,) = (
        mark.args[1]
        for mark in test_a_lock_with_a_fault_does_not_pass.pytestmark  # type: ignore[attr-defined]
    )
    assert {check for _, check, _ in cases} | {"free_when_its_process_is_killed"} == set(CHECKS)
    assert {f"test_{name}" for name in CHECKS} <= set(dir(LockContract))


def test_a_check_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no such checks: breathes"):
        check_lock(FileLock, only=["breathes"])


def test_the_core_loads_no_test_runner(tmp_path: Path) -> None:
    script = run_python(
        tmp_path,
        """
        import sys
        from orchard_infra.testing import LockContract, check_lock
        from orchard_infra import FileLock
        print(check_lock(FileLock, only=["fence_grows"]))
        assert "pytest" not in sys.modules
        """,
    )
    assert script.finish() == 0, script.transcript()
    assert "fence_grows" in script.output
