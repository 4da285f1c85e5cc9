"""The one thread for what happens later, and the callbacks that it hands on."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchard_infra.system import background
from orchard_infra.system.background import Callbacks, Task
from support import run_python, wait_until

LOGGER = logging.getLogger("background")


@pytest.fixture(autouse=True)
def no_thread() -> Iterator[None]:
    """Neither one that serves an earlier test, nor one that is left to the next."""
    background._background.end()
    yield
    assert background._background.tasks == []
    background._background.end()


def threads(name: str = "orchard-infra-background") -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def now() -> float:
    return time.monotonic()


def test_a_task_runs_once_when_it_is_due_and_again_when_it_says_so():
    ran: list[float] = []
    task = Task(lambda: None)

    def run() -> None:
        ran.append(now())
        if len(ran) < 3:
            task.due = now() + 0.02

    task.run = run
    began = now()
    task.due = began + 0.05
    background.add(task)
    wait_until(lambda: len(ran) == 3)
    assert ran[0] - began >= 0.05
    assert ran[2] - ran[0] >= 0.04
    time.sleep(0.05)
    background.remove(task)
    assert len(ran) == 3


def test_a_task_that_is_due_earlier_than_all_others_does_not_wait_for_them():
    ran = threading.Event()
    late, soon = Task(lambda: None, now() + 1000), Task(ran.set, now() + 0.02)
    background.add(late)
    time.sleep(0.02)  # it sleeps until the late one
    background.add(soon)
    assert ran.wait(30)
    background.remove(late)
    background.remove(soon)


def test_whoever_sets_a_time_and_wakes_it_is_served_at_once():
    ran = threading.Event()
    task = Task(ran.set)
    background.add(task)
    time.sleep(0.02)
    task.due = 0.0
    background.wake()
    assert ran.wait(30)
    background.remove(task)


def test_all_environments_share_one_thread_which_ends_soon_after_the_last(monkeypatch):
    monkeypatch.setattr(background, "_LINGERS", 0.1)
    tasks = [Task(lambda: None, now() + 1000) for _ in range(20)]
    for task in tasks:
        background.add(task)
    (thread,) = threads()
    for task in tasks:
        background.remove(task)
    ended = now()
    assert threads() == [thread]  # for the next one, so that a sweep does not start one each time
    background.add(tasks[0])
    background.remove(tasks[0])
    assert threads() == [thread]
    wait_until(lambda: not threads())
    assert now() - ended >= 0.1
    background.add(tasks[0])
    assert len(threads()) == 1
    background.remove(tasks[0])


def test_no_signal_is_taken_away_from_the_main_thread():
    """A signal that another thread took would not interrupt a call in which the main one waits."""
    task = Task(lambda: None)
    background.add(task)
    (thread,) = threads()

    def blocked() -> int:
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        return int(status.partition("SigBlk:")[2].split()[0], 16)

    handled = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    wait_until(lambda: all(blocked() >> (signum - 1) & 1 for signum in handled))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    background.remove(task)


def test_a_removed_task_has_run_to_its_end_and_does_not_run_again():
    began, may_end, done = threading.Event(), threading.Event(), []

    def run() -> None:
        began.set()
        may_end.wait(30)
        time.sleep(0.02)
        done.append(True)

    task = Task(run, 0.0)
    background.add(task)
    assert began.wait(30)
    may_end.set()
    background.remove(task)
    assert done == [True]


def test_a_task_may_remove_itself():
    ended = threading.Event()
    task = Task(lambda: (background.remove(task), ended.set()), 0.0)
    background.add(task)
    assert ended.wait(30)
    background.remove(task)


def test_a_task_that_fails_is_told_and_disturbs_no_other(caplog):
    ran = threading.Event()
    bad, good = Task(lambda: 1 // 0, 0.0), Task(ran.set, now() + 0.02)
    background.add(bad)
    background.add(good)
    assert ran.wait(30)
    background.remove(bad)
    background.remove(good)
    assert "a task in the background failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_what_is_due_can_be_finished_by_whoever_waits_for_it():
    ran: list[str] = []
    blocker_runs, go_on = threading.Event(), threading.Event()
    blocker = Task(lambda: (blocker_runs.set(), go_on.wait(30)), 0.0)
    task = Task(lambda: ran.append(threading.current_thread().name))
    background.add(task)
    background.add(blocker)
    assert blocker_runs.wait(30)
    background.finish(task)
    assert ran == []  # it is not due
    task.due = 0.0
    background.finish(task)
    assert ran == [threading.current_thread().name]
    go_on.set()
    background.finish(blocker)
    background.remove(task)
    background.remove(blocker)
    assert len(ran) == 1


def test_where_no_thread_can_be_started_it_says_so_and_tries_again_later(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    ran = threading.Event()
    task, other = Task(ran.set, 0.0), Task(lambda: None)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert not background.add(task)
    assert caplog.messages == ["no background thread: can't start new thread"]
    assert background.add(other)
    assert ran.wait(30)
    background.remove(task)
    background.remove(other)


def test_a_start_that_is_broken_off_leaves_no_two_threads(monkeypatch):
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    ran: list[object] = []
    first, second = Task(lambda: None), Task(lambda: ran.append(1), 0.0)
    with pytest.raises(KeyboardInterrupt):
        background.add(first)
    background.add(second)
    wait_until(lambda: ran)
    assert len(threads()) == 1
    background.remove(first)
    background.remove(second)


def test_a_forked_child_has_a_thread_of_its_own_and_not_its_parent_s_tasks(tmp_path):
    script = run_python(
        tmp_path,
        """
        import os, threading, time
        from orchard_infra.system import background
        from orchard_infra.system.background import Task
        said = threading.Event()
        def say():
            os.write(1, b"task of %d\\n" % os.getpid())
            said.set()
        task = Task(say, time.monotonic() + 1000)
        background.add(task)
        pid = os.fork()
        if not pid:
            ran = threading.Event()
            background.remove(Task(print))
            background.add(Task(ran.set, 0.0))
            os._exit(not ran.wait(30) or len(background._background.tasks) != 1)
        print("child", os.waitpid(pid, 0)[1], flush=True)
        task.due = 0.0
        background.wake()
        said.wait(60)
        """,
    )
    assert script.finish() == 0, script.transcript()
    assert script.output.splitlines() == ["child 0", f"task of {script.pid}"]


def test_a_signal_handler_that_raises_at_any_instant_leaves_the_thread_at_work(tmp_path):
    """And so do many threads that add and remove tasks meanwhile."""
    script = run_python(
        tmp_path,
        """
        import logging, random, signal, sys, threading, time
        sys.setswitchinterval(1e-5)
        from orchard_infra.system import background
        from orchard_infra.system.background import Callbacks, Task
        class Interrupted(Exception):
            pass
        armed = False
        def handler(signum, frame):
            if armed:
                raise Interrupted
        signal.signal(signal.SIGALRM, handler)
        ended = threading.Event()
        def others():
            while not ended.is_set():
                task = Task(lambda: None, 0.0)
                background.add(task)
                background.remove(task)
                time.sleep(1e-4)
        thread = threading.Thread(target=others, daemon=True)
        thread.start()
        callbacks, called = Callbacks(logging.getLogger()), []
        hits = trials = 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end or hits <= 50 or len(called) <= 50:
            trials += 1
            task = Task(lambda: None)  # not an Event: its lock might be left locked
            try:
                try:
                    armed = True
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, 2e-4))
                    background.add(task)
                    task.due = 0.0
                    background.wake()
                    background.finish(task)
                    background.remove(task)
                    callbacks.add(called.append)
                    callbacks.call("stop")
                finally:
                    armed = False
            except (Interrupted, KeyError):  # `Thread.start` makes a KeyError of it
                armed = False
                hits += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            if signal.pthread_sigmask(signal.SIG_BLOCK, ()):
                print("blocked", flush=True)
            background.remove(task)
        ended.set()
        thread.join()
        ran = []
        background.add(Task(lambda: ran.append(1), 0.0))
        deadline = time.monotonic() + 10
        while not ran and time.monotonic() < deadline:
            time.sleep(0.01)
        print(bool(ran), len(background._background.tasks), flush=True)
        print(sum("background" in thread.name for thread in threading.enumerate()), flush=True)
        last = []
        callbacks.add(last.append)
        callbacks.call("stop")
        print(callbacks.wait(10), last, flush=True)
        """,
    )
    assert script.finish() == 0, script.transcript()
    assert script.output.splitlines() == [
        *("True 1", "1", "True ['stop']"),
    ], script.transcript()


def test_at_interpreter_exit_what_was_added_before_is_still_done(tmp_path):
    """From Python 3.12 on no thread can be started then: who tries is told quietly."""
    script = run_python(
        tmp_path,
        """
        import atexit, sys, threading, time
        from orchard_infra.system import background
        from orchard_infra.system.background import Task
        ran = threading.Event()
        task = Task(ran.set)
        if sys.argv[1] == "before":
            background.add(task)
        @atexit.register
        def at_exit():
            task.due = 0.0
            started = background.add(task)
            background.wake()
            print(started, ran.wait(10 if started else 0.0), flush=True)
            background.finish(task)
            print(ran.is_set(), flush=True)
        """,
        "before",
    )
    late = run_python(tmp_path, tmp_path / "script.py", "only then")
    assert script.finish() == 0
    assert script.output.splitlines() == ["True True", "True"]
    assert script.error_output == ""
    assert late.finish() == 0
    assert late.output.splitlines() in (["True True", "True"], ["False False", "True"])
    assert late.error_output == ""


# Callbacks


def test_callbacks_are_called_once_in_their_order_and_not_in_the_background_thread():
    callbacks: Callbacks[str] = Callbacks(LOGGER)
    called: list[tuple[str, str]] = []
    for name in ("first", "second"):
        callbacks.add(lambda why, name=name: called.append((name, why)))
    callbacks.call("stop")
    callbacks.call("again")
    assert callbacks.wait(30)
    assert called == [("first", "stop"), ("second", "stop")]
    callbacks.add(lambda why: called.append(("third", why)))
    callbacks.call("stop")
    assert callbacks.wait(30)
    assert called[2:] == [("third", "stop")]


def test_a_callback_that_takes_long_delays_no_task():
    callbacks: Callbacks[str] = Callbacks(LOGGER)
    go_on, ran = threading.Event(), threading.Event()
    callbacks.add(lambda why: go_on.wait(30))
    task = Task(lambda: callbacks.call("stop"), 0.0)
    other = Task(ran.set, now() + 0.02)
    background.add(task)
    background.add(other)
    assert ran.wait(30)
    assert not callbacks.wait(0.0)
    go_on.set()
    assert callbacks.wait(30)
    background.remove(task)
    background.remove(other)


@pytest.mark.parametrize("error", [KeyError("broken"), SystemExit("broken")])
def test_what_a_callback_raises_is_told_and_the_others_are_called(caplog, error):
    callbacks: Callbacks[str] = Callbacks(LOGGER)
    called: list[str] = []

    def broken(why: str) -> None:
        raise error

    callbacks.add(broken)
    callbacks.add(called.append)
    callbacks.call("stop")
    assert callbacks.wait(30)
    assert called == ["stop"]
    assert "broken" in caplog.text


def test_a_callback_may_add_another_one_and_wait_for_all():
    callbacks: Callbacks[str] = Callbacks(LOGGER)
    called: list[Any] = []

    def callback(why: str) -> None:
        callbacks.add(called.append)
        called.append(callbacks.wait(30))

    callbacks.add(callback)
    callbacks.call("stop")
    wait_until(lambda: called == [True, "stop"])


def test_callbacks_of_many_threads_are_each_called_once():
    callbacks: Callbacks[int] = Callbacks(LOGGER)
    called: list[int] = []

    def work(start: int) -> None:
        for number in range(start, start + 200):
            callbacks.add(lambda why, number=number: called.append(number))
            callbacks.call(0)

    workers = [threading.Thread(target=work, args=(1000 * k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wait_until(lambda: len(called) == 800)
    assert len(set(called)) == 800
