"""Workers and signals to the whole process group: real pools, real DataLoaders, real signals."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pexpect
import psutil
import pytest

from orchard_infra.stopping.shielding import shield_worker
from support import Script, is_running, require_module, run_python, wait_gone, wait_until

METHODS = ["fork", "spawn", "forkserver"]
TO_THE_GROUP = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]

# A run that only takes a note of signals, and does what it is told by stdin. It leads a group.
RUN = """
import concurrent.futures, json, multiprocessing, os, select, signal, sys, threading, time
from orchard_infra.stopping.shielding import shield_worker

def pid(_=None):
    time.sleep(0.01)  # so that one worker does not do all of the work
    return os.getpid()

def say(*words):
    print(json.dumps(words), flush=True)

def take_notes():
    # After the workers are there: forked ones inherit handlers, and this one does not end them.
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, lambda signum, frame: say("noted", signum))

def orders():
    while True:
        # Short naps: a signal that comes just before a long one is heeded only after it.
        if select.select([sys.stdin], [], [], 0.02)[0]:
            yield sys.stdin.readline().strip()
"""

POOLS = (
    RUN
    + """
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    def pool():
        return context.Pool(2, initializer=shield_worker)
    def executor():
        return concurrent.futures.ProcessPoolExecutor(2, context, initializer=shield_worker)
    pools, executors = [pool(), pool()], [executor(), executor()]
    def workers():
        found = [set(pool.map(pid, range(10), 1)) for pool in pools]
        return set.union(*found, *(set(executor.map(pid, range(10))) for executor in executors))
    found = set.union(workers(), workers())
    take_notes()
    say("workers", *found)
    for order in orders():
        if order == "work":
            say("worked", *workers())
        if order == "end":
            pools.pop().terminate()
            executors.pop().shutdown()
            say("left", *workers())
"""
)

LOADERS = (
    RUN
    + """
import torch
from torch.utils.data import DataLoader

class Pids(torch.utils.data.Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        return os.getpid()

if __name__ == "__main__":
    def batches():
        return iter(DataLoader(Pids(), num_workers=1, worker_init_fn=shield_worker,
                               multiprocessing_context=sys.argv[1]))
    loaders = [batches(), batches(), batches()]
    def workers():
        return [int(next(loader)) for loader in loaders]
    found = workers()
    take_notes()
    say("workers", *found)
    for order in orders():
        if order == "work":
            say("worked", *workers())
        if order == "end":
            loaders.pop()
            last = loaders.pop()
            [process.terminate() for process in last._workers]
            say("left", *workers())
"""
)


def start(tmp_path: Path, source: str, *arguments: str) -> Script:
    return run_python(tmp_path, source, *arguments, start_new_session=True)


def told(run: Script, word: str, number: int = 0) -> list[int]:
    """The numbers that the run has said after ``word``, when it did so for the nth time."""

    def lines() -> list[list[int]]:
        said = [json.loads(line) for line in run.output.splitlines() if line.endswith("]")]
        return [numbers for said_word, *numbers in said if said_word == word]

    assert wait_until(
        lambda: len(lines()) > number or run.poll() is not None, what=lambda: run.transcript()
    )
    assert len(lines()) > number, run.transcript()
    return lines()[number]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["pools", "loaders"])
def test_shielded_workers_outlive_a_signal_to_the_group_and_nothing_else(
    tmp_path: Path, kind: str, method: str
) -> None:
    if kind == "loaders":
        require_module("torch")
    run = start(tmp_path, POOLS if kind == "pools" else LOADERS, method)
    workers = told(run, "workers")

    for number, signum in enumerate(TO_THE_GROUP):
        os.killpg(run.pid, signum)
        assert told(run, "noted", number) == [signum]
        run.tell("work")
        assert set(told(run, "worked", number)) <= set(workers)
    assert all(map(is_running, workers))

    # The DataLoader's shutdown, terminate() and the end of a pool do what they always did.
    run.tell("end")
    left = told(run, "left")
    wait_gone(set(workers) - set(left))
    still_there = set(filter(is_running, workers))
    assert still_there
    assert still_there >= set(left)
    assert run.poll() is None

    run.kill()
    wait_gone(workers)


# Holds the GIL for ever, as a deadlock in a library does.
STUCK = (
    RUN
    + """
import ctypes
def stick(started):
    shield_worker()
    started.set()
    ctypes.PyDLL(None).pause()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    starteds = [context.Event() for _ in range(2)]
    processes = [context.Process(target=stick, args=(started,)) for started in starteds]
    [process.start() for process in processes]
    [started.wait() for started in starteds]
    say("workers", *(process.pid for process in processes))
    for order in orders():
        processes[0].terminate()
        processes[0].join()
        say("ended", processes[0].exitcode)
"""
)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_that_never_comes_back_to_python_ends_like_any_other(
    tmp_path: Path, method: str
) -> None:
    run = start(tmp_path, STUCK, method)
    workers = told(run, "workers")

    run.tell("terminate")
    assert told(run, "ended") == [-signal.SIGTERM]
    assert is_running(workers[1])

    run.kill_group()
    wait_gone(workers)


STARTED_BY_A_THREAD = (
    RUN
    + """
def work(connection):
    shield_worker()
    connection.send(os.getpid())
    while True:
        connection.send(connection.recv())

if "without pidfd" in sys.argv:
    del os.pidfd_open

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context(sys.argv[1])
    process = context.Process(target=work, args=(theirs,))
    def start_and_wait():
        process.start()
        say("workers", ours.recv())
    thread = threading.Thread(target=start_and_wait)
    thread.start()
    thread.join()
    # Holds the write end of the worker's sentinel, and everything else, for ever.
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
    for order in orders():
        ours.send(order)
        say("worked", ours.recv() == order)
"""
)


@pytest.mark.parametrize("kernel", ["", "without pidfd"])
@pytest.mark.parametrize("method", METHODS)
def test_a_worker_lives_on_when_the_thread_that_started_it_ends_and_not_after_the_process(
    tmp_path: Path, method: str, kernel: str
) -> None:
    """A pool replaces its workers from a thread, and for prctl(2) that thread is the parent."""
    run = start(tmp_path, STARTED_BY_A_THREAD, method, kernel)
    workers = told(run, "workers")

    for number in range(2):
        run.tell("work")
        assert told(run, "worked", number) == [True]

    run.kill()
    wait_gone(workers)


TERMINAL = (
    RUN
    + """
import subprocess
def init(*arguments):
    print("init", *arguments, flush=True)

def use_terminal(_):
    print("written", flush=True)
    with open("/dev/tty") as terminal:
        done = subprocess.run(["head", "-c1"], stdin=terminal, stderr=subprocess.DEVNULL)
    return bool(done.returncode)

if __name__ == "__main__":
    subprocess.run(["stty", "tostop", "-echo"], check=True)
    with multiprocessing.Pool(1, shield_worker(init), ("a", 1)) as pool:
        pool.apply(os.getpid)  # the initializer has been called
        take_notes()
        say("ready")
        next(orders())
        say("refused", pool.map(use_terminal, [0]))
"""
)


def test_a_worker_is_not_stopped_for_using_the_terminal(tmp_path: Path) -> None:
    """It is in the background there. ``stty tostop`` stops who writes, and a read stops anyway."""
    (tmp_path / "run.py").write_text(TERMINAL)
    terminal = pexpect.spawn(
        sys.executable, [str(tmp_path / "run.py")], cwd=str(tmp_path), timeout=30, encoding="utf-8"
    )
    try:
        terminal.expect_exact("init a 1")
        terminal.expect_exact('["ready"]')
        terminal.sendintr()
        terminal.expect_exact('["noted", 2]')
        terminal.sendline("go on")
        terminal.expect_exact("written")
        terminal.expect_exact('["refused", [true]]')
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close(force=True)


FORK_SERVER = (
    RUN
    + """
def place():
    return os.getpid(), os.getppid(), os.getpgrp()

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    pools = {
        "shielded": lambda: context.Pool(1, initializer=shield_worker),
        "plain": lambda: context.Pool(1),
    }
    running = []
    for kind in sys.argv[1:]:
        running.append(pools[kind]())
        say(kind, *running[-1].apply(place))
    for order in orders():
        pass
"""
)


def test_the_fork_server_is_shielded_and_its_other_workers_are_not(tmp_path: Path) -> None:
    run = start(tmp_path, FORK_SERVER, "shielded", "plain")
    worker, server, group = told(run, "shielded")
    plain, its_server, its_group = told(run, "plain")

    assert its_server == server
    assert os.getpgid(server) == server
    assert (group, its_group) == (worker, run.pid)
    assert "fork server" not in run.error_output

    run.kill_group()
    wait_gone([server, worker, plain])


def test_a_fork_server_that_is_too_old_to_be_shielded_is_told_of(tmp_path: Path) -> None:
    run = start(tmp_path, FORK_SERVER, "plain", "shielded", "shielded")

    told(run, "shielded", 1)
    assert run.error_output.count("fork server was started before the first shielded worker") == 1


def test_outside_of_a_worker_process_nothing_happens() -> None:
    """A pool of threads calls its initializer too, and so may a DataLoader of threads."""
    group, children = os.getpgrp(), psutil.Process().children()

    shield_worker(0)
    with ThreadPool(1, shield_worker) as pool:
        assert pool.apply(os.getpgrp) == group

    assert psutil.Process().children() == children
    assert signal.getsignal(signal.SIGTTOU) == signal.SIG_DFL


def note(notes: list[object], *more: object) -> None:
    notes.extend(more)


def test_a_function_of_ones_own_is_called_with_what_the_worker_is_given() -> None:
    notes: list[object] = []

    shield_worker(note)(notes, 1, 2)

    assert notes == [1, 2]


def test_it_pickles() -> None:
    assert pickle.loads(pickle.dumps(shield_worker)) is shield_worker
    assert repr(pickle.loads(pickle.dumps(shield_worker(len)))) == repr(shield_worker(len))


def test_a_worker_without_a_free_descriptor_does_not_take_its_parent_for_dead(
    tmp_path: Path,
) -> None:
    program = run_python(
        tmp_path,
        """
        import os, resource, signal, threading, time
        from orchard_infra.stopping import shielding
        from orchard_infra.system import processes

        worker = os.fork()
        if worker == 0:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
            parent = os.getppid()
            threading.Thread(target=shielding._end_with, args=(parent, parent), daemon=True).start()
            time.sleep(1.5)  # three looks
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
        """,
    )
    assert program.wait() == 0, program.transcript()
    assert program.output.split() == ["7"]
