"""A main thread that hangs in C hears no signal. It is ended by the signal all the same, and no
main thread is that does come back to Python, or is not deaf at all.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forking import ForkServer
from support import Script, needs_namespaces, run_command, wait_until
from wrapping import is_stopped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

LIMIT = 0.5  # seconds

PRELUDE = f"""
import ctypes, os, select, signal, socket, sys, threading, time
from orchard_infra import *

LIMIT = {LIMIT}
libc = ctypes.CDLL(None)       # lets other threads run meanwhile
with_gil = ctypes.PyDLL(None)  # does not
mutex = ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def in_c(seconds=600.0, library=libc):
    # In one call that no signal ends early. A mutex waits by the wall clock.
    until = time.time() + seconds
    at = (ctypes.c_long * 2)(int(until), int(until % 1 * 1e9))
    library.pthread_mutex_timedlock(mutex, at)

def once_in_c(act, *args):
    # Carry out ``act`` when the main thread waits for the mutex: what futex(2) is given first.
    def wait():
        while f"{{ctypes.addressof(mutex):#x}}" not in open("/proc/self/syscall").read().split():
            time.sleep(0.01)
        act(*args)
    threading.Thread(target=wait, daemon=True).start()

def kill(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)

def wakeup_fd():
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    return fd

def protected(mode="raise", limit=LIMIT, project="digits"):
    stopper = SignalStop(mode, blocked_limit=limit)
    return managed_environment(project, manager=InfrastructureManager(stopper=stopper))
"""

server: ForkServer


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    global server
    with ForkServer("asyncio", "ctypes", "orchard_infra._public") as server:
        yield


def start(tmp_path: Path, body: str, *arguments: str, name: str = "script.py") -> Script:
    return server.run_python(tmp_path, PRELUDE + body, *arguments, name=name)


@pytest.mark.parametrize("mode", ["raise", "flag"])
def test_a_main_thread_that_hangs_in_c_is_ended_and_the_next_run_clears_up(tmp_path, mode):
    run = start(
        tmp_path,
        f"""
with protected({mode!r}) as env:
    once_in_c(lambda: (say(env.tmp_dir, time.monotonic()), kill()))
    in_c()
""",
    )
    assert run.finish() == -signal.SIGTERM, run.transcript()
    tmp_dir, began = Path(run.output.split()[0]), float(run.output.split()[1])
    assert time.monotonic() - began >= LIMIT
    # Why, and where it hangs.
    assert "the main thread has not come back to Python" in run.error_output
    assert "it is in in_c (" in run.error_output
    assert tmp_dir.exists()
    after = start(tmp_path, "with protected() as env:\n    say('taken')\n", name="next.py")
    assert after.finish() == 0, after.transcript()
    assert not tmp_dir.exists()


def test_a_rank_that_hangs_is_ended_by_ctrl_c_as_well(tmp_path):
    run = start(
        tmp_path,
        """
os.environ.update(RANK="0", WORLD_SIZE="2")
with protected():
    once_in_c(kill, signal.SIGINT)
    in_c()
""",
    )
    assert run.finish() == -signal.SIGINT, run.transcript()


def test_a_call_that_comes_back_to_python_now_and_then_is_not_ended(tmp_path):
    """A checkpoint that is written for minutes, in pieces."""
    run = start(
        tmp_path,
        """
with protected("flag") as env:
    once_in_c(kill)
    for _ in range(10):
        in_c(LIMIT / 3)
    say("saved", env.stop_requested.reason)
""",
    )
    assert run.finish() == 0, run.transcript()
    assert run.output == "saved SIGTERM\n"


WAITS = {
    "sleep": "time.sleep(4 * LIMIT)",
    "lock": "threading.Event().wait(4 * LIMIT)",
    "join": "thread.join()",
    "select": "select.select([reader], [], [], 4 * LIMIT)",
    "read": "reader.recv(1)",
}


def test_a_main_thread_that_waits_in_python_is_not_ended(tmp_path):
    """It runs handlers in the middle of its call, and does not come back from it."""
    runs = [
        start(
            tmp_path,
            f"""
from orchard_infra.stopping import signals
signals._ONE_REQUEST = 0.0  # so that a signal to wake it would be a second one
reader, writer = socket.socketpair()
thread = threading.Timer(4 * LIMIT, writer.send, [b"x"])
with protected("flag", project={name!r}) as env:
    thread.start()
    threading.Timer(LIMIT / 2, kill).start()
    {wait}
    say("saved", env.stop_requested.reason)
""",
            name=f"{name}.py",
        )
        for name, wait in WAITS.items()
    ]
    for run in runs:
        assert run.finish() == 0, run.transcript()
        assert run.output == "saved SIGTERM\n"


def test_a_wait_in_python_whose_signal_went_to_another_thread_is_interrupted(tmp_path):
    """Only an interrupted call runs handlers: Python itself would sleep on."""
    run = start(
        tmp_path,
        """
with protected():
    threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)).start()
    time.sleep(1000)
""",
    )
    assert run.finish() == 143, run.transcript()


def test_nothing_is_done_to_a_main_thread_that_keeps_the_gil_and_comes_back(tmp_path):
    run = start(
        tmp_path,
        """
with protected():
    sender = os.fork()  # threads cannot run meanwhile
    if not sender:
        time.sleep(LIMIT)
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    in_c(4 * LIMIT, with_gil)
    time.sleep(60)
""",
    )
    assert run.finish() == 143, run.transcript()


def test_a_child_s_signal_is_not_taken_for_one_of_its_parent(tmp_path):
    run = start(
        tmp_path,
        """
ready, tell_ready = os.pipe()
with protected():
    child = os.fork()
    if not child:
        say("child", wakeup_fd())
        signal.signal(signal.SIGTERM, lambda *args: os._exit(7))
        os.write(tell_ready, b"x")
        while True:
            time.sleep(0.01)
    os.read(ready, 1)
    once_in_c(os.kill, child, signal.SIGTERM)
    in_c(4 * LIMIT)
    say("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["child -1", "status 7"]


def test_a_signal_for_the_handler_of_somebody_else_is_their_affair(tmp_path):
    run = start(
        tmp_path,
        """
with protected():
    ours = signal.signal(signal.SIGTERM, lambda *args: say("theirs"))
    once_in_c(kill)
    in_c(4 * LIMIT)
    signal.signal(signal.SIGTERM, ours)
    time.sleep(2 * LIMIT)
    say("goes on")
""",
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["theirs", "goes on"]


def test_a_process_that_was_suspended_was_not_deaf_meanwhile(tmp_path):
    run = start(
        tmp_path,
        """
from orchard_infra.stopping import blocked, signals
signals._LOOK = 0.1
unanswered, seen = blocked.unanswered, []
def look(at_most):
    found = unanswered(at_most)
    seen.extend(found)
    return found
blocked.unanswered = look
def wait_until_seen(times):
    while len(seen) < times:
        time.sleep(0.01)
def suspend():
    kill()
    wait_until_seen(1)
    kill(signal.SIGSTOP)
    wait_until_seen(len(seen) + 3)
    libc.pthread_mutex_unlock(mutex)
with protected("flag", limit=1.5) as env:
    once_in_c(suspend)
    in_c()
    say("saved", env.stop_requested.reason)
""",
    )
    wait_until(lambda: is_stopped(run.pid), what=run.transcript)
    time.sleep(2.0)  # longer than the limit
    run.send_signal(signal.SIGCONT)
    assert run.finish() == 0, run.transcript()
    assert run.output == "saved SIGTERM\n"


def test_by_default_only_ranks_that_raise_are_watched_and_nothing_is_left(tmp_path):
    run = start(
        tmp_path,
        """
def watched(mode="raise", limit=None):
    with protected(mode, limit):
        return wakeup_fd() != -1
say("alone", watched(), watched("flag"), watched(limit=60.0))
fds = len(os.listdir("/proc/self/fd"))
os.environ.update(RANK="0", WORLD_SIZE="2")
say("rank", watched(), watched("flag"), watched(limit=float("inf")))
say("left", wakeup_fd(), len(os.listdir("/proc/self/fd")) - fds)
""",
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == [
        "alone False False True",
        "rank True False False",
        "left -1 0",
    ]


def test_environments_end_in_any_order_and_the_last_one_gives_the_wakeup_fd_back(tmp_path):
    run = start(
        tmp_path,
        """
manager = InfrastructureManager(stopper=SignalStop(blocked_limit=LIMIT))
first, second = map(manager.prepare_environment, ("first", "second"))
first.close()
say("still there", wakeup_fd() != -1)
thread = threading.Thread(target=second.close)  # where the wakeup fd cannot be set
thread.start()
thread.join()
with protected():
    once_in_c(kill)
    in_c()
""",
    )
    assert run.finish() == -signal.SIGTERM, run.transcript()
    assert run.output == "still there True\n"


def test_an_event_loop_keeps_its_wakeup_fd(tmp_path):
    run = start(
        tmp_path,
        """
import asyncio
async def before():
    heard = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.set)
    theirs = wakeup_fd()
    with protected():
        say("before", wakeup_fd() == theirs != -1)
        kill(signal.SIGUSR1)
        await heard.wait()
    say("after", wakeup_fd() == theirs)
asyncio.run(before())

async def within():
    heard = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.set)
    kill(signal.SIGUSR1)
    await heard.wait()
    say("heard")
with protected():
    asyncio.run(within())
say("left", wakeup_fd())
""",
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["before True", "after True", "heard", "left -1"]


@needs_namespaces
def test_the_first_process_of_a_container_is_ended_as_well(tmp_path):
    """The kernel drops signals for it that have their default action."""
    (tmp_path / "script.py").write_text(
        PRELUDE + "with protected():\n    once_in_c(kill)\n    in_c()\n"
    )
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "script.py"]
    run = run_command(tmp_path, unshare)
    assert run.finish() == 143, run.transcript()


def test_a_log_handler_that_hangs_as_well_is_no_obstacle(tmp_path):
    run = start(
        tmp_path,
        """
import logging
class Hangs(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.ERROR:
            time.sleep(600)
logging.getLogger("Infrastructure").addHandler(Hangs())
with protected():
    once_in_c(kill)
    in_c()
""",
    )
    assert run.finish() == -signal.SIGTERM, run.transcript()
