"""The one loop in which all locks are waited for: threads, tasks, dead holders, signals."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import attrs
import psutil
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
from orchard_infra.locks.acquiring import Pause, acquire, acquiring
from orchard_infra.locks.base import Held, Lease, LockKey
from orchard_infra.locks.file import FileLease, FileLock
from orchard_infra.locks.keeper import Keeper
from orchard_infra.runs.record import RunRecord, Survivor, describe_this_run
from support import run_python, succeeds_in_a_fork, wait_until

LOG = logging.getLogger("Infrastructure")


def steps_for(
    path: Path, timeout: float | None = None, **options: Any
) -> Generator[Pause, None, Lease]:
    return acquiring(
        FileLock(),
        key_of(path),
        describe_this_run("digits"),
        timeout=timeout,
        clear_dead=lambda dead: (),
        logger=LOG,
        **options,
    )


async def take_async(path: Path, timeout: float | None = None) -> Lease:
    steps = steps_for(path, timeout)
    try:
        while True:
            try:
                pause = next(steps)
            except StopIteration as taken:
                lease: Lease = taken.value
                return lease
            await pause.wait_async()
    finally:
        steps.close()


def drive(steps: Generator[Pause, None, Lease]) -> Lease:
    while True:
        try:
            pause = next(steps)
        except StopIteration as taken:
            lease: Lease = taken.value
            return lease
        pause.wait()


def open_descriptors() -> list[str]:
    gc.collect()
    return [os.readlink(f"/proc/self/fd/{fd}") for fd in _listed("/proc/self/fd")]


def _listed(directory: str) -> list[str]:
    return [name for name in os.listdir(directory) if os.path.lexists(f"{directory}/{name}")]


def test_a_contender_is_told_who_holds_the_lock_and_so_is_the_log(tmp_path, caplog):
    path = tmp_path / "x.lock"
    holder = run_python(tmp_path, HOLDER, str(path), "0")
    holder.wait_for("held")
    with pytest.raises(EnvironmentLockedError) as caught:
        take(path)
    error = caught.value
    assert error.holder is not None
    assert error.holder.pid == holder.pid
    assert error.lock_path == str(path)
    for word in (str(holder.pid), socket.gethostname(), "script.py", str(tmp_path), "kill"):
        assert word in str(error)
    [logged] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert logged.getMessage() == str(error)


def test_a_waiter_keeps_its_timeout_while_it_leaves_the_lock_to_a_job_that_returns(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.lock"
    lease = take_elsewhere(path)
    steps = steps_for(path, timeout=0.3, will_return=lambda holder: True)
    next(steps)
    lease.release()

    with pytest.raises(EnvironmentLockedError, match="is being started again"):
        drive(steps)


def test_advice_names_only_what_exists(tmp_path):
    path = tmp_path / "x.lock"
    lease = take(path)
    with pytest.raises(EnvironmentLockedError) as caught:
        take_elsewhere(path)
    lease.release()
    assert not any(word in str(caught.value) for word in ("Postgres", "Redis", "AllOf"))


def test_an_error_of_the_lock_itself_is_logged_before_it_is_raised(tmp_path, caplog):
    (tmp_path / "seed.txt").write_text("42")
    with pytest.raises(InfrastructureError) as caught:
        take(tmp_path / "seed.txt")
    assert caplog.records[-1].getMessage() == str(caught.value)
    assert caplog.records[-1].levelno == logging.ERROR


def test_a_waiter_says_at_once_whom_it_waits_for_and_gets_the_lock_when_it_is_released(tmp_path):
    path = tmp_path / "x.lock"
    holder = run_python(tmp_path, HOLDER, str(path), "0")
    holder.wait_for("held")
    waiter = run_python(tmp_path, HOLDER, str(path), "None")
    wait_until(lambda: "waiting for the lock" in waiter.error_output)
    assert f"pid {holder.pid} on" in waiter.error_output
    holder.tell()
    waiter.wait_for("held")
    waiter.tell()
    assert waiter.finish() == 0
    assert waiter.error_output.count("waiting for the lock") == 1
    assert not path.exists()


def test_a_waiter_gives_up_after_its_timeout_and_names_the_holder(tmp_path):
    path = tmp_path / "x.lock"
    with forked(lambda: (take(path), signal.pause())) as holder:
        wait_until(lambda: holder_of(path))
        for timeout in (0.2, 1.0):  # beyond one look at the queue, too
            began = time.monotonic()
            with pytest.raises(EnvironmentLockedError, match=f"pid {holder}"):
                take(path, timeout)
            assert timeout <= time.monotonic() - began < timeout + 30.0
    assert tickets() == []


def test_a_waiter_can_be_interrupted(tmp_path):
    path = tmp_path / "x.lock"
    lease = take(path)
    waiter = run_python(tmp_path, HOLDER, str(path), "None")
    wait_until(lambda: len(tickets()) == 1)
    waiter.send_signal(signal.SIGINT)
    assert waiter.finish() != 0
    assert "KeyboardInterrupt" in waiter.error_output
    assert tickets() == []
    lease.verify()
    lease.release()


def test_a_waiter_costs_little_and_is_served_soon(tmp_path):
    """About 1 % of a core while waiting, as the kernel counts it, measured in benchmarks/. The
    bound is generous here, since this machine is shared: a look takes longer then.
    """
    path = tmp_path / "x.lock"
    lease = take(path)
    waiter = run_python(tmp_path, HOLDER, str(path), "None")
    wait_until(lambda: "waiting for the lock" in waiter.error_output)
    process = psutil.Process(waiter.pid)
    before, began = process.cpu_times(), time.monotonic()
    time.sleep(2.0)
    after, waited = process.cpu_times(), time.monotonic() - began
    used = after.user + after.system - before.user - before.system
    assert used / waited <= 0.05
    lease.release()
    waiter.wait_for("held")


# The owner is a thread, and a task where there is one.


@pytest.mark.parametrize("timeout", [0.0, 60.0, None])
def test_a_thread_that_holds_the_lock_is_refused_at_once_however_long_it_would_wait(
    tmp_path, timeout, caplog
):
    path = tmp_path / "x.lock"
    lease = take(path, timeout)
    with pytest.raises(EnvironmentLockedError, match=r"already holds .* would wait for itself"):
        take(path, timeout)
    assert "would wait for itself" in caplog.text
    lease.verify()
    lease.release()
    take(path, timeout).release()


def test_it_is_refused_also_when_others_wait_before_it(tmp_path):
    path = tmp_path / "x.lock"
    lease = take(path)
    with forked(lambda: take(path, None)) as waiter:
        wait_until(tickets)
        with pytest.raises(EnvironmentLockedError, match="would wait for itself"):
            take(path, None)
        lease.release()
        assert exit_status(waiter) == 0


def test_a_lease_that_nobody_knows_the_owner_of_is_not_waited_for_for_ever(tmp_path):
    path = tmp_path / "x.lock"
    lease = FileLock().try_acquire(key_of(path), describe_this_run("digits"))
    with pytest.raises(EnvironmentLockedError, match="would wait for itself"):
        take(path, None)
    assert isinstance(lease, FileLease)
    lease.release()


def test_another_thread_waits_like_anybody(tmp_path):
    path = tmp_path / "x.lock"
    lease = take(path)
    taken: list[FileLease] = []
    other = threading.Thread(target=lambda: taken.append(take(path, None)))
    other.start()
    wait_until(tickets)
    assert not taken
    lease.release()
    other.join(60)
    with pytest.raises(EnvironmentLockedError, match="is held by"):
        run_in_thread(lambda: take(path))
    taken[0].release()


def run_in_thread(work: Callable[[], object]) -> None:
    """What ``work`` raises in another thread is raised here."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    for error in errors:
        raise error


def test_threads_of_one_process_exclude_each_other(tmp_path):
    path, inside, seen = tmp_path / "x.lock", threading.Lock(), []

    def work(number: int) -> None:
        for _ in range(5):
            lease = take(path, None)
            assert inside.acquire(blocking=False)
            seen.append(number)
            inside.release()
            lease.release()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 20
    assert tickets() == []


def test_another_task_waits_without_blocking_the_event_loop(tmp_path):
    path = tmp_path / "x.lock"

    async def longest_pause() -> float:
        """Of the event loop, within a second."""
        longest, began = 0.0, time.monotonic()
        while (before := time.monotonic()) < began + 1.0:
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)
        return longest

    async def main() -> None:
        lease = await take_async(path)
        first = asyncio.create_task(take_async(path))
        second = asyncio.create_task(take_async(path))
        while len(tickets()) < 2:
            await asyncio.sleep(0.001)
        # Each waiter looks at least once in a second. Those of a busy machine are not all alike.
        for _ in range(20):
            if await longest_pause() < 0.25:
                break
        else:
            raise AssertionError("the event loop was blocked in each second")
        assert not first.done()
        lease.release()
        (await asyncio.wait_for(first, 30)).release()
        (await asyncio.wait_for(second, 30)).release()

    asyncio.run(main())
    assert tickets() == []


def test_the_same_task_is_refused_and_so_is_one_that_would_block_its_event_loop(tmp_path, caplog):
    path = tmp_path / "x.lock"

    async def main() -> None:
        lease = await take_async(path)
        with pytest.raises(EnvironmentLockedError, match="would wait for itself"):
            await take_async(path)

        async def block() -> None:
            with pytest.raises(EnvironmentLockedError, match="Use `async with`"):
                take(path, None)

        await asyncio.wait_for(asyncio.create_task(block()), 30)
        assert "Use `async with`" in caplog.text
        lease.release()

    asyncio.run(main())


def test_a_task_is_refused_what_the_code_around_its_event_loop_holds(tmp_path):
    path = tmp_path / "x.lock"
    lease = take(path)
    with pytest.raises(EnvironmentLockedError, match="would wait for itself"):
        asyncio.run(take_async(path))
    lease.release()


def test_a_cancelled_task_never_gets_the_lock_later(tmp_path):
    path = tmp_path / "x.lock"
    holder = take_elsewhere(path)

    async def main() -> None:
        before = open_descriptors()
        for waited in (0.0, 0.05, 0.2):
            task = asyncio.create_task(take_async(path))
            other = asyncio.create_task(take_async(path))  # behind it, at a descriptor
            await asyncio.sleep(waited)
            for cancelled in (task, other):
                cancelled.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await cancelled
            assert tickets() == []
            assert open_descriptors() == before
        holder.release()
        await asyncio.sleep(0.2)
        assert not path.exists()
        (await take_async(path)).release()

    asyncio.run(main())


# What leaves nothing behind.


def test_nothing_is_left_of_a_wait_that_is_closed_or_broken_off(tmp_path):
    path = tmp_path / "x.lock"
    lease = take_elsewhere(path)
    before, threads = open_descriptors(), threading.active_count()

    def some_steps() -> Generator[Pause, None, Lease]:
        first, second = steps_for(path), steps_for(path)
        for _ in range(3):
            next(first)
            next(second)
        assert len(tickets()) == 2
        first.close()
        return second

    some_steps().close()
    with pytest.raises(ZeroDivisionError):
        some_steps().throw(ZeroDivisionError())
    assert tickets() == []
    assert open_descriptors() == before
    assert threading.active_count() == threads
    lease.release()
    take(path).release()


def test_a_ctrl_c_at_any_instant_leaves_neither_lock_nor_place_nor_descriptor(tmp_path):
    """In a process of one thread: a worker of pytest-xdist has another, which takes signals too."""

    def play() -> bool:
        try:
            interrupt_at_any_instant(tmp_path)
        except AssertionError:
            traceback.print_exc()
            return False
        return True

    assert succeeds_in_a_fork(play)


def interrupt_at_any_instant(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    chance, armed, record = random.Random(7), [], describe_this_run("digits")
    held = take_elsewhere(path)
    before = open_descriptors()
    # A Ctrl-C inside of logging may leave its lock locked, for the rest of this process. That is
    # what the stopper is for, and another test.
    quiet = logging.Logger("quiet")
    quiet.disabled = True

    def interrupt(*_: object) -> None:
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    hits, left = 0, []
    try:
        for number in range(600):
            if number == 300:  # until then somebody has it, and we come into the queue
                held.release()
            lease = None
            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(5e-6, 1.2e-3))
                lease = acquire(FileLock(None), key_of(path), record, logger=quiet)
                armed.clear()
            except KeyboardInterrupt:
                # Asked here, while the traceback keeps every frame alive that it came through.
                hits += 1
                if lease is None and (tickets() or (number >= 300 and path.exists())):
                    left.append(traceback.format_exc())
            finally:
                armed.clear()
            if lease is not None:
                lease.release()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert left == []
    assert hits > 300
    assert open_descriptors() == [fd for fd in before if str(tmp_path) not in fd]
    take(path).release()


def test_the_one_who_keeps_the_lease_has_it_before_a_signal_can_come(tmp_path):
    kept: list[Lease] = []

    def keep(lease: Lease) -> None:
        kept.append(lease)
        signal.raise_signal(signal.SIGINT)

    steps = acquiring(
        FileLock(),
        key_of(tmp_path / "x.lock"),
        describe_this_run("digits"),
        timeout=0.0,
        clear_dead=lambda dead: (),
        logger=LOG,
        keep=keep,
    )
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert len(kept) == 1
    kept[0].release()
    assert list(tmp_path.iterdir()) == []


# Dead holders.


@attrs.define
class Scene:
    """A lock whose holder is dead while a forked child of it lives on, with the lock."""

    path: Path
    survivor: int

    def clear_dead(self, dead: RunRecord) -> list[Survivor]:
        """As a sanitizer does that may not kill."""
        process = psutil.Process(self.survivor)
        return [Survivor(process.pid, process.create_time(), "python", "forked by the run")]


@pytest.fixture
def scene(tmp_path: Path):
    path, told = tmp_path / "x.lock", tmp_path / "survivor"

    def run() -> None:
        lease = take(path)
        if os.fork() == 0:
            signal.alarm(60)
            told.write_text(str(os.getpid()))
            signal.pause()
        signal.pause()
        lease.release()

    with forked(run) as leader:
        wait_until(lambda: told.exists() and told.read_text())
        os.kill(leader, signal.SIGKILL)
        exit_status(leader)
    survivor = int(told.read_text())
    yield Scene(path, survivor)
    try:
        os.kill(survivor, signal.SIGKILL)
    except ProcessLookupError:
        pass


def test_survivors_of_a_dead_holder_are_named(scene):
    with pytest.raises(EnvironmentLockedError, match=f"kill {scene.survivor}") as caught:
        take(scene.path, clear_dead=scene.clear_dead)
    assert [survivor.pid for survivor in caught.value.survivors] == [scene.survivor]
    with pytest.raises(EnvironmentLockedError, match=f"kill {scene.survivor}"):
        take(scene.path, 0.3, clear_dead=scene.clear_dead)


def test_without_a_timeout_survivors_of_a_dead_holder_are_waited_for(scene, caplog):
    """It gave up after 6 s."""
    caplog.set_level(logging.INFO)
    asked: list[RunRecord] = []

    def clear_dead(dead: RunRecord) -> list[Survivor]:
        asked.append(dead)
        return scene.clear_dead(dead)

    steps = acquiring(
        FileLock(),
        key_of(scene.path),
        describe_this_run("digits"),
        timeout=None,
        clear_dead=clear_dead,
        logger=LOG,
    )
    for _ in range(40):
        next(steps).wait()
    assert len(asked) == 1  # a look at all processes, not one for each try
    assert f"pid {scene.survivor}" in caplog.text
    os.kill(scene.survivor, signal.SIGKILL)
    drive(steps).release()


def test_a_dead_holder_whose_processes_were_stopped_is_no_obstacle(scene):
    def clear_dead(dead: RunRecord) -> tuple[()]:
        os.kill(scene.survivor, signal.SIGKILL)
        return ()

    take(scene.path, clear_dead=clear_dead).release()


def test_who_may_stop_what_a_dead_holder_left_does_so_also_behind_one_who_may_not(scene):
    first = acquiring(
        FileLock(),
        key_of(scene.path),
        describe_this_run("digits"),
        timeout=None,
        clear_dead=scene.clear_dead,
        logger=LOG,
    )
    for _ in range(3):
        next(first).wait()

    def clear_dead(dead: RunRecord) -> tuple[()]:
        os.kill(scene.survivor, signal.SIGKILL)
        return ()

    with forked(lambda: take(scene.path, None, clear_dead=clear_dead)) as second:
        drive(first).release()
        assert exit_status(second) == 0


def test_what_has_to_be_left_of_a_dead_holder_is_no_obstacle_if_it_does_not_hold_the_lock(scene):
    """A tracker in a session of its own, say: it goes on, and the lock is free."""
    left = scene.clear_dead

    def clear_dead(dead: RunRecord) -> list[Survivor]:
        found = left(dead)
        os.kill(scene.survivor, signal.SIGKILL)
        return found

    take(scene.path, clear_dead=clear_dead).release()


def test_a_lock_of_another_boot_that_is_held_is_not_called_dead(tmp_path):
    """On a file system of several hosts it may be another one's, which lives."""
    path = tmp_path / "x.lock"
    this = describe_this_run("digits")
    lease = take(path, record=attrs.evolve(this, boot_id="another"))

    def clear_dead(dead: RunRecord) -> tuple[()]:
        raise AssertionError("nobody is dead")

    with pytest.raises(EnvironmentLockedError, match="over there"):
        take(path, 0.3, this, clear_dead=clear_dead)
    lease.release()


def test_the_loop_serves_a_lock_of_one_s_own(tmp_path):
    """Any object with the three members will do; it needs no queue."""

    class Own:
        timeout = 5.0

        def __init__(self) -> None:
            self.answers = [Held(), Held()]

        def try_acquire(self, key: LockKey, record: RunRecord) -> object:
            return self.answers.pop() if self.answers else take(tmp_path / "x.lock")

        def holder(self, key: LockKey) -> None:
            return None

    lease = acquire(Own(), key_of(tmp_path / "own"), describe_this_run("digits"))
    assert is_held_by(tmp_path / "x.lock", lease.record)
    lease.release()


# Looking after a lease.


def test_a_lease_is_renewed_in_the_background_and_its_loss_is_told_once(tmp_path):
    path = tmp_path / "x.lock"
    lease = FileLock(interval=0.02).try_acquire(key_of(path), describe_this_run("digits"))
    assert isinstance(lease, FileLease)
    lost: list[LockLostError] = []
    keeper = Keeper(lease, lost.append, LOG)
    keeper.start()
    os.utime(path, (1, 1))
    wait_until(lambda: path.stat().st_mtime > 1)
    assert not lost
    path.unlink()
    wait_until(lambda: lost)
    time.sleep(0.1)
    assert len(lost) == 1
    keeper.stop()
    lease.release()


def test_a_renewal_that_fails_for_a_while_is_tried_again_and_told_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    class Flaky:
        record, interval, renewals = describe_this_run("digits"), 0.01, 0

        def renew(self) -> None:
            self.renewals += 1
            if self.renewals <= 3:
                raise OSError("stale handle")

    lease = Flaky()
    keeper = Keeper(lease, lambda error: None, LOG)
    keeper.start()
    wait_until(lambda: lease.renewals > 4)
    keeper.stop()
    seen = lease.renewals
    time.sleep(0.05)
    assert lease.renewals == seen
    assert caplog.text.count("could not be renewed") == 1
    assert caplog.text.count("the lock is confirmed") == 1
