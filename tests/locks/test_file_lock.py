"""The file lock, between real processes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import gc
import json
import os
import pickle
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from locking import (
    HOLDER,
    exit_status,
    forked,
    holder_of,
    is_held_by,
    key_of,
    take,
    take_elsewhere,
    tickets,
)
from orchard_infra.errors import EnvironmentLockedError, InfrastructureError, LockLostError
from orchard_infra.locks import file as file_lock
from orchard_infra.locks.base import Held
from orchard_infra.locks.file import FileLease, FileLock
from orchard_infra.runs.record import RunRecord, describe_this_run, to_json
from orchard_infra.system import files
from support import as_nobody, needs_another_user, run_python, wait_until


def test_the_file_holds_the_record_while_held_and_is_gone_after(tmp_path):
    path = tmp_path / "missing" / "parents" / "x.lock"
    lease = take(path)
    assert is_held_by(path, lease.record)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lease.release()
    assert not path.exists()
    lease.release()  # twice is once


def test_different_locks_nest(tmp_path):
    outer, inner = take(tmp_path / "a.lock"), take(tmp_path / "b.lock")
    inner.release()
    outer.verify()
    outer.release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_leaves_a_stale_file_that_is_no_obstacle(tmp_path):
    path = tmp_path / "x.lock"
    holder = run_python(tmp_path, HOLDER, str(path), "0")
    holder.wait_for("held")
    holder.kill()
    holder.finish()
    assert path.exists()
    lease = take(path)
    assert is_held_by(path, lease.record)
    lease.release()
    assert not path.exists()


def test_a_forked_child_releases_nothing(tmp_path):
    path = tmp_path / "x.lock"
    lease = take(path)
    with forked(lease.release) as child:
        assert exit_status(child) == 0
    lease.verify()
    with pytest.raises(EnvironmentLockedError):
        take_elsewhere(path)
    lease.release()


def test_a_lock_that_children_inherited_is_free_once_it_is_released(tmp_path, on_a_network):
    """The file stays there, and flock(2) belongs to the description, which the child has, too."""
    path = tmp_path / "x.lock"
    lease = take(path)
    with forked(signal.pause):
        lease.release()
        assert path.exists()
        take_elsewhere(path).release()


def test_a_file_that_stays_says_that_it_is_free_and_is_taken_again_under_any_name(
    tmp_path, on_a_network
):
    path = tmp_path / "project"
    for _ in range(2):
        lease = take(path)
        assert is_held_by(path, lease.record)
        lease.release()
        assert holder_of(path) is None
        assert b"free" in path.read_bytes()


@pytest.fixture
def on_a_network(monkeypatch):
    """A file system of many hosts, pretended: there is none on the machine."""
    monkeypatch.setattr(file_lock, "_stays", lambda device: True)


def in_line(path: Path, record: RunRecord) -> FileLease:
    return take(path, None, record)


def at_once(path: Path, record: RunRecord) -> FileLease:
    """Try without pause and without a queue."""
    while True:
        outcome = FileLock().try_acquire(key_of(path), record)
        if isinstance(outcome, FileLease):
            return outcome
        time.sleep(0.0001)


def without_inode_check(path: Path, record: RunRecord) -> FileLease:
    files.same_file = lambda fd, path: True
    return at_once(path, record)


def contend(
    tmp_path: Path, processes: int, cycles: int, how: Callable[[Path, RunRecord], FileLease]
) -> tuple[int, int]:
    """Forked processes that all want one lock; how many saw somebody else inside, and the value of
    a counter that each raises in every cycle, in a way that is not atomic.
    """
    counter, inside = tmp_path / "counter", tmp_path / "inside"
    counter.write_text("0")
    go, start = os.pipe()

    def work() -> None:
        os.close(start)
        os.read(go, 1)
        record, violations = describe_this_run("stress"), 0
        for _ in range(cycles):
            lease = how(tmp_path / "x.lock", record)
            try:
                inside.mkdir()
            except FileExistsError:
                violations += 1
            value = int(counter.read_text() or 0)
            counter.write_text(str(value + 1))
            try:
                inside.rmdir()
            except FileNotFoundError:
                violations += 1
            try:
                lease.release()
            except FileNotFoundError:
                violations += 1
        assert violations == 0

    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(forked(work)) for _ in range(processes)]
        os.close(go)
        os.close(start)
        violated = sum(exit_status(pid) != 0 for pid in pids)
    return violated, int(counter.read_text() or 0)


@pytest.mark.slow
def test_no_two_of_8_processes_hold_the_lock_in_200_cycles_each(tmp_path):
    """The file is removed on every release, and a non-atomic counter is exact all the same.

    With the inode check taken out this fails: the test after the next one takes it out.
    """
    assert contend(tmp_path, 8, 200, at_once) == (0, 1600)
    assert not (tmp_path / "x.lock").exists()


def test_no_two_of_8_processes_that_stand_in_line_hold_the_lock(tmp_path):
    assert contend(tmp_path, 8, 25, in_line) == (0, 200)
    assert not (tmp_path / "x.lock").exists()
    assert tickets() == []


def test_the_stress_test_fails_without_the_inode_check(tmp_path, capfd):
    violated, counted = contend(tmp_path, 8, 50, without_inode_check)
    assert violated > 0 or counted < 400


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda path: path.mkdir(), "a directory"),
        (lambda path: os.mkfifo(path), "a FIFO"),
        (lambda path: path.symlink_to("/nonexistent/target"), "a symbolic link"),
        (lambda path: path.symlink_to(path.parent / "victim"), "a symbolic link"),
        (bind_socket, "a socket"),
    ],
    ids=["directory", "FIFO", "dangling link", "link to a file", "socket"],
)
def test_what_is_no_regular_file_is_refused_and_untouched(plant, words, short_dir):
    (short_dir / "victim").write_text("three days of results")
    path = short_dir / "x.lock"
    plant(path)
    before = os.lstat(path)
    with pytest.raises(InfrastructureError, match=words):
        take(path)
    assert os.lstat(path).st_ino == before.st_ino
    assert (short_dir / "victim").read_text() == "three days of results"


@pytest.fixture
def short_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("s")


def test_a_device_is_refused():
    with pytest.raises(InfrastructureError, match="a character device"):
        take(Path("/dev/null"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.csv", b"epoch,loss\n1,0.5\n"),
        ("results.lock", b"epoch,loss\n1,0.5\n"),
        ("steps.lock", b"1000\n2000\n"),
        ("digits.lock", b"7" * 500),
        ("weights.lock", b"\0" * 5000 + b"\1\2\3"),  # float32, the first ones zero
        ("seed.txt", b"42"),
        ("step.txt", b"1000\n"),
        ("__init__.py", b""),
        ("weights", b"\0" * 4096),
        ("notes.txt", b'{"orch'),
        ("lock", b""),
        ("x.lock.bak", b""),
    ],
)
def test_a_file_that_may_be_somebody_s_is_never_taken_for_a_lock(tmp_path, name, content):
    """Only our record proves a lock; a broken one or a pid does together with a lock's name."""
    path = tmp_path / name
    path.write_bytes(content)
    os.utime(path, (1, 1))
    with pytest.raises(InfrastructureError, match="is no lock file"):
        take(path)
    assert path.read_bytes() == content
    assert path.stat().st_mtime == 1
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_lock_may_have_any_name_and_is_taken_over_when_its_holder_was_killed(tmp_path):
    path = tmp_path / "project"
    with forked(lambda: (take(path), signal.pause())) as holder:
        wait_until(lambda: holder_of(path))
        os.kill(holder, signal.SIGKILL)
        exit_status(holder)
    assert path.exists()
    take(path).release()
    assert not path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"4242\n",
        b"\0" * 4096,
        b'{"orchard_infra": 1, "run_id": "torn',
        b'{"orchard_infra": 1,' + b"[" * 60000,
        b'{"orchard_infra": 1, "pid": "\x1b[2J", "run_id": 7}',
        b'{"orch',
    ],
    ids=["empty", "pid file", "zeroed", "torn", "deeply nested", "wrong types", "very torn"],
)
@pytest.mark.parametrize("name", ["x.lock", "x.lck", "x.pid"])
def test_a_stale_file_with_a_broken_record_is_no_obstacle(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    lease = take(path)
    assert is_held_by(path, lease.record)
    lease.release()
    assert not path.exists()


def test_a_huge_sparse_file_is_refused_at_once(tmp_path):
    path = tmp_path / "x.lock"
    with open(path, "wb") as file:
        file.truncate(2 * 2**30)
    with pytest.raises(InfrastructureError, match="is no lock file"):
        take(path)
    assert path.stat().st_size == 2 * 2**30


def test_a_name_that_is_too_long_is_an_error_that_says_so(tmp_path):
    with pytest.raises(InfrastructureError, match="too long"):
        take(tmp_path / ("x" * 300))


def test_a_path_below_a_file_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InfrastructureError, match="cannot lock"):
        take(tmp_path / "file" / "x.lock")


@needs_another_user
def test_somebody_else_s_stale_file_is_refused_and_named(tmp_path):
    path = tmp_path / "x.lock"
    path.write_bytes(b"")
    os.chown(path, 12345, 12345)
    with pytest.raises(InfrastructureError, match="uid 12345"):
        take(path)
    assert path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    """A mock: the machine has no such file system."""

    def refuse(fd: int, *, shared: bool = False) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_lock, "lock_descriptor", refuse)
    with pytest.raises(InfrastructureError, match="no working flock"):
        take(tmp_path / "x.lock")


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    """A mock: filling a disk of a shared machine would be no kindness."""

    def full(fd: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(InfrastructureError, match="free some space"):
        take(tmp_path / "x.lock")
    assert list(tmp_path.iterdir()) == []
    stale = tmp_path / "y.lock"
    stale.touch()
    with pytest.raises(InfrastructureError, match="free some space"):
        take(stale)


def test_a_removed_or_replaced_file_is_noticed_and_the_new_one_left_alone(tmp_path):
    path = tmp_path / "x.lock"
    lease = take(path)
    path.unlink()
    with pytest.raises(LockLostError, match="removed or replaced"):
        lease.verify()
    path.write_bytes(b"")  # somebody else's by now
    with pytest.raises(LockLostError):
        lease.renew()
    lease.release()
    assert path.exists()


def test_renewing_makes_the_file_young(tmp_path):
    path = tmp_path / "x.lock"
    lease = take(path)
    os.utime(path, (1, 1))
    lease.renew()
    assert time.time() - path.stat().st_mtime < 3600
    lease.release()


def test_a_waiter_is_not_fooled_by_a_removed_file(tmp_path):
    """It waits on the file that the path names, not on the one that it once opened."""
    path = tmp_path / "x.lock"
    first = run_python(tmp_path, HOLDER, str(path), "0")
    first.wait_for("held")
    waiter = run_python(tmp_path, HOLDER, str(path), "None")
    wait_until(lambda: "waiting for the lock" in waiter.error_output)
    path.unlink()
    waiter.wait_for("held")
    assert holder_of(path).pid == waiter.pid


def test_a_record_with_escapes_reaches_no_terminal(tmp_path):
    path = tmp_path / "x.lock"
    record = describe_this_run("digits")
    evil = RunRecord(
        **{
            **attrs.asdict(record, recurse=False),
            "pid": record.pid + 1,
            "argv": ("\x1b]0;owned\x07", "[red]x[/red]", "\u202egnp.exe"),
            "cwd": "/\r\n\x1b[2J",
            "user": "\x9b31m",
            "host": "else\x1bwhere",
            "boot_id": "another",
        }
    )
    lease = take(path)
    path.write_bytes(to_json(evil))
    with pytest.raises(EnvironmentLockedError) as caught:
        take_elsewhere(path)
    assert caught.value.holder.argv == evil.argv
    assert str(caught.value).isprintable()
    lease.release()


def test_a_program_that_closes_every_descriptor_loses_the_lock_and_no_file_of_its_own(tmp_path):
    """A daemon does. The number of the lock's descriptor is soon another file's."""
    lease = take(tmp_path / "x.lock")
    number = lease.fileno()
    os.close(number)
    with open(tmp_path / "results", "w") as results:
        assert results.fileno() == number
        with pytest.raises(LockLostError, match="closed by this program"):
            lease.verify()
        lease.release()
        results.write("three days")
    assert (tmp_path / "results").read_text() == "three days"


@pytest.mark.parametrize("timeout", [-1, float("nan"), "soon", True])
def test_a_timeout_that_is_none_is_refused(timeout):
    with pytest.raises(ValueError, match="timeout must be"):
        FileLock(timeout)


def test_the_file_s_mode_lets_others_read_who_holds_it(tmp_path):
    lease = take(tmp_path / "x.lock")
    assert stat.S_IMODE((tmp_path / "x.lock").stat().st_mode) & 0o444 == 0o444
    lease.release()


def test_copies_of_a_lease_are_the_lease_itself(tmp_path):
    """`copy.deepcopy` of an object that contains one, or `dataclasses.asdict`, gave the lock away
    as soon as the copy was dropped.
    """
    path = tmp_path / "x.lock"
    lease = take(path)

    @dataclasses.dataclass
    class Trainer:
        lease: FileLease

    trainer = Trainer(lease)
    copies = [
        copy.copy(lease),
        copy.deepcopy(lease),
        copy.deepcopy(trainer).lease,
        copy.deepcopy({"deep": [trainer]})["deep"][0].lease,
        dataclasses.asdict(trainer)["lease"],
        dataclasses.replace(trainer).lease,
    ]
    assert all(one is lease for one in copies)
    attrs.asdict(attrs.make_class("Holder", ["lease"])(lease))
    attrs.evolve(lease)
    del copies, trainer
    gc.collect()
    lease.verify()
    with pytest.raises(EnvironmentLockedError):
        take_elsewhere(path)
    lease.release()


def test_a_pickled_lease_holds_nothing_and_releases_nothing(tmp_path):
    path = tmp_path / "x.lock"
    lease = take(path)
    snapshot = pickle.loads(pickle.dumps(lease))
    assert snapshot.record == lease.record
    for powerless in (snapshot, copy.deepcopy(snapshot), attrs.evolve(lease)):
        for use in (powerless.verify, powerless.renew, powerless.fileno):
            with pytest.raises(LockLostError, match="only the process that took"):
                use()
        powerless.release()
    del snapshot, powerless, use
    gc.collect()
    lease.verify()
    lease.release()


def test_a_lease_that_is_dropped_releases_itself(tmp_path):
    path = tmp_path / "x.lock"
    take(path)
    gc.collect()
    assert not path.exists()


def test_an_attempt_that_a_signal_breaks_off_leaves_no_lock(tmp_path, monkeypatch):
    """Another thread may receive it: then the handler runs in the main one although that blocks
    signals, also between the making of the file and the assignment of its descriptor.
    """

    def interrupt(lease: FileLease, fd: int) -> None:
        os.close(fd)
        raise KeyboardInterrupt

    monkeypatch.setattr(FileLease, "_hold", interrupt)
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path / "x.lock")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_never_there_without_its_record(tmp_path):
    """It gets its name once it is locked and signed: a contender always learns who has it."""
    path = tmp_path / "x.lock"

    lock, record = FileLock(), describe_this_run("digits")

    def cycle() -> None:
        while True:
            outcome = lock.try_acquire(key_of(path), record)
            if isinstance(outcome, FileLease):
                outcome.release()

    seen = 0
    with forked(cycle):
        deadline = time.monotonic() + 30
        while seen < 200 and time.monotonic() < deadline:
            outcome = lock.try_acquire(key_of(path), record)
            if isinstance(outcome, Held):
                assert outcome.holder is not None
                seen += 1
            else:
                outcome.release()
    assert seen == 200


@pytest.mark.parametrize("ways", [1, 2], ids=["in place", "by way of a hidden name"])
def test_it_works_where_a_file_cannot_be_without_a_name(tmp_path, monkeypatch, ways):
    """Older overlayfs has no O_TMPFILE, vfat has no links."""
    monkeypatch.setattr(file_lock, "_WAYS", file_lock._WAYS[-ways:])
    path = tmp_path / "x.lock"
    lease = take(path)
    assert is_held_by(path, lease.record)
    with pytest.raises(EnvironmentLockedError):
        take_elsewhere(path)
    assert list(tmp_path.iterdir()) == [path]
    lease.release()
    assert list(tmp_path.iterdir()) == []


@needs_another_user
def test_another_user_s_lock_is_waited_for_like_any_other(tmp_path_factory):
    """It can only be read. As long as it is locked it is held, and its holder is known."""
    directory = Path(tempfile.mkdtemp())
    os.chmod(directory, 0o1777)
    lease = take(directory / "x.lock")

    def attempt() -> object:
        return FileLock().try_acquire(key_of(directory / "x.lock"), lease.record)

    outcome = as_nobody(attempt)
    assert isinstance(outcome, Held)
    assert outcome.holder is not None
    assert outcome.holder.run_id == lease.record.run_id
    lease.release()
    shutil.rmtree(directory)


def test_no_descriptor_is_left_of_a_lock_or_of_a_try(tmp_path):
    path = tmp_path / "x.lock"
    take(path).release()
    before = os.listdir("/proc/self/fd")
    lease = take(path)
    for _ in range(3):
        with pytest.raises(EnvironmentLockedError):
            take_elsewhere(path)
    lease.release()
    (tmp_path / "seed.txt").write_text("42")
    with pytest.raises(InfrastructureError):
        take(tmp_path / "seed.txt")
    assert os.listdir("/proc/self/fd") == before
