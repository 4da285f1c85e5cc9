"""The queue of waiters: first come, first served, whatever becomes of those before."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from locking import Line, exit_status, forked, holder_of, line, take, tickets
from orchard_infra import managed_environment
from orchard_infra.errors import EnvironmentLockedError
from orchard_infra.locks import acquiring, queue
from orchard_infra.locks.base import LockKey
from orchard_infra.locks.file import FileLock
from support import wait_until


def all_served(waiting: Line, expected: list[int]) -> None:
    wait_until(lambda: len(waiting.served()) >= len(expected), what=lambda: str(waiting.served()))
    assert waiting.served() == expected


def test_the_lock_is_handed_over_in_the_order_of_arrival(tmp_path):
    with line(tmp_path, waiters=8, hold=0.01) as (waiting, lease):
        lease.release()
        all_served(waiting, list(range(8)))
        assert [exit_status(pid) for pid in waiting.pids] == [0] * 8
    assert list((tmp_path).glob("*.lock")) == []


def test_nothing_is_left_of_the_queue_after_the_last_waiter(tmp_path, runtime_directory):
    with line(tmp_path, waiters=3) as (waiting, lease):
        assert len(tickets()) == 3
        waiting.send(1, signal.SIGKILL)
        waiting.send(2, signal.SIGKILL)
        lease.release()
        all_served(waiting, [0])
        assert exit_status(waiting.pids[0]) == 0
        assert list((runtime_directory / "queues").iterdir()) == []


def test_who_is_killed_or_stopped_holds_nobody_up(tmp_path, monkeypatch):
    """The first in line, too: one that is stopped has its place again when it goes on."""
    monkeypatch.setattr(queue, "_SILENT", 3600.0)  # that they are silent is not what is seen here
    with line(tmp_path, waiters=9, hold=0.05) as (waiting, lease):
        for number in (0, 4):
            waiting.send(number, signal.SIGSTOP)
        for number in (1, 5):
            waiting.send(number, signal.SIGKILL)
        lease.release()
        all_served(waiting, [2, 3, 6, 7, 8])
        for number in (4, 0):
            waiting.send(number, signal.SIGCONT)
        wait_until(lambda: len(waiting.served()) == 7)
        assert sorted(waiting.served()[5:]) == [0, 4]


def test_who_was_stopped_keeps_its_place(tmp_path, monkeypatch):
    for module, name in ((queue, "_LOOK"), (acquiring, "_WAIT")):
        monkeypatch.setattr(module, name, (0.02, 0.02))  # many looks in each of these seconds
    with line(tmp_path, waiters=3, hold=0.05) as (waiting, lease):
        waiting.send(0, signal.SIGSTOP)
        time.sleep(1.0)  # the next one looks, and takes itself for the first
        waiting.send(0, signal.SIGCONT)
        time.sleep(1.0)
        lease.release()
        all_served(waiting, [0, 1, 2])


def test_who_gives_up_holds_nobody_up(tmp_path):
    path = tmp_path / "x.lock"
    lease = take(path)

    def give_up() -> None:
        with pytest.raises(EnvironmentLockedError):
            take(path, timeout=1.0)

    with forked(give_up) as impatient:
        wait_until(lambda: len(tickets()) == 1)
        waiting = Line(path, tmp_path / "served")
        try:
            waiting.join(1)
            assert exit_status(impatient) == 0
            assert len(tickets()) == 1
            lease.release()
            all_served(waiting, [0])
        finally:
            waiting.close()


def test_a_waiter_that_does_not_go_on_is_passed_over(tmp_path, monkeypatch):
    """Its process runs, but nobody drives its wait: a blocked event loop, say."""
    monkeypatch.setattr(queue, "_SILENT", 0.5)
    path = tmp_path / "x.lock"
    lease = take(path)
    with queue.Place(path) as blocked:
        assert blocked.is_first()
        assert blocked.is_first()
        assert len(tickets()) == 1
        waiting = Line(path, tmp_path / "served")
        try:
            waiting.join(1)
            lease.release()
            all_served(waiting, [0])
        finally:
            waiting.close()


@pytest.mark.parametrize("unwinds", [True, False])
def test_a_forked_child_of_a_waiter_does_not_hold_its_place(tmp_path, unwinds):
    """It has the ticket open as well. Neither when its parent gives up, nor when that is killed."""
    path = tmp_path / "x.lock"
    lease = take(path)

    def wait_and_fork() -> None:
        steps = queue.Place(path)
        with steps:
            steps.is_first()
            steps.is_first()
            with forked(lambda: unwind(steps)):
                signal.pause()

    def unwind(place: queue.Place) -> None:
        signal.alarm(60)  # nobody else ends it when its parent is killed
        if unwinds:
            place.__exit__()  # the ticket is its parent's
        (tmp_path / "child").write_text(str(os.getpid()))
        signal.pause()

    with forked(wait_and_fork) as parent:
        ours = wait_until(tickets)
        child = int(wait_until(lambda: (tmp_path / "child").exists() and read(tmp_path / "child")))
        assert tickets() == ours
        os.kill(parent, signal.SIGKILL)
        exit_status(parent)
        waiting = Line(path, tmp_path / "served")
        try:
            pid = os.fork()
            if pid == 0:
                waiting._wait(0)
            waiting.pids.append(pid)
            lease.release()
            all_served(waiting, [0])
        finally:
            waiting.close()
            os.kill(child, signal.SIGKILL)
    assert tickets() == []


def read(path: Path) -> str:
    return path.read_text()


def test_an_attempt_without_waiting_does_not_stand_in_line(tmp_path):
    """It takes what is free, also past others: an elastic restart must not wait behind them."""
    path = tmp_path / "x.lock"
    with queue.Place(path) as place:
        place.is_first()
        place.is_first()
        take(path, timeout=0.0).release()
        assert len(tickets()) == 1


def test_the_ticket_of_one_who_is_killed_is_removed_while_others_wait(tmp_path):
    with line(tmp_path, waiters=3) as (waiting, _):
        waiting.send(0, signal.SIGKILL)
        wait_until(lambda: len(tickets()) == 2)


def test_the_next_run_removes_the_tickets_of_waiters_that_were_killed(tmp_path, runtime_directory):
    """Although it does not wait itself, and nobody else does."""

    def wait() -> None:
        del os.environ["ORCHARD_INFRA_RUN_ID"]  # else it would join the run that has forked it
        managed_environment("digits", timeout=None).open()

    with managed_environment("digits"), forked(wait) as waiter:
        wait_until(lambda: len(tickets()) == 1)
        os.kill(waiter, signal.SIGKILL)
        exit_status(waiter)
    assert len(tickets()) == 1
    with managed_environment("digits"):
        assert list((runtime_directory / "queues").iterdir()) == []


def test_a_run_that_takes_the_lock_again_and_again_starves_nobody(tmp_path):
    """Where somebody waits, who has just released the lock stands in line as well."""
    with line(tmp_path, waiters=2) as (waiting, lease):
        lease.release()
        for _ in range(3):
            take(waiting.path, None).release()
        all_served(waiting, [0, 1])


@pytest.mark.parametrize("obstacle", ["a file in the way", "no descriptors"])
def test_where_there_is_no_queue_a_waiter_waits_all_the_same(
    tmp_path, runtime_directory, monkeypatch, obstacle
):
    if obstacle == "a file in the way":
        (runtime_directory / "queues").write_text("")
    else:

        def refuse(directory: str, came: int) -> None:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(queue._Ticket, "take", refuse)
    path = tmp_path / "x.lock"
    lease = take(path)
    with forked(lambda: take(path, None)) as waiter:
        time.sleep(0.3)
        lease.release()
        assert exit_status(waiter) == 0


def test_one_queue_serves_a_lock_whichever_way_its_path_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    places = [queue.Place(tmp_path / way / "x.lock") for way in ("real", "link")]
    with places[0] as one, places[1] as other:
        for place in (one, other):
            place.is_first()
        assert one.is_first()
        assert not other.is_first()


def test_the_tickets_of_a_dead_machine_are_removed(tmp_path, runtime_directory):
    """A power cut leaves tickets, whose clock was ahead of ours, of pids that are others' now."""
    path = tmp_path / "x.lock"
    with queue.Place(path) as place:
        place.is_first()
        place.is_first()
        directory = tickets()[0].parent
        namespace = tickets()[0].name.rpartition(".")[2]
        for name in (f"{10**18:020d}.1.{namespace}", f"{0:020d}.{os.getppid()}.{namespace}"):
            os.mkfifo(directory / name)
            os.utime(directory / name, (1, 1))
    assert list((runtime_directory / "queues").iterdir()) == []


def test_waiters_are_woken_when_it_is_their_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "_LOOK", (60.0, 60.0))  # then they would look by themselves
    with line(tmp_path, waiters=12, hold=0.0) as (waiting, lease):
        lease.release()
        all_served(waiting, list(range(12)))


def test_waiters_cost_little(tmp_path):
    """The goal is 5 % of a core for 64, see benchmarks/waiters.py. The bound is generous here,
    since this machine is shared: 12 that poll would take ten times as much.
    """
    with line(tmp_path, waiters=12, hold=0.0) as (waiting, lease):
        waiters = [psutil.Process(pid) for pid in waiting.pids]

        def used() -> float:
            return sum(sum(waiter.cpu_times()[:2]) for waiter in waiters)

        before, began = used(), time.monotonic()
        time.sleep(2.0)
        share = (used() - before) / (time.monotonic() - began)
        assert share <= 0.06
        lease.release()


def test_a_waiter_that_finds_nobody_before_it_leaves_no_trace_when_the_lock_is_free(
    tmp_path, runtime_directory
):
    path = tmp_path / "x.lock"
    take(path, timeout=60).release()
    assert not (runtime_directory / "queues").exists()
    assert holder_of(path) is None
    assert isinstance(FileLock().queue(LockKey("digits", path)), queue.Place)
