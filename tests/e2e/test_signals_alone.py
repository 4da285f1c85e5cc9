"""`SignalStop` by itself, in real processes that get real signals."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest

from forking import ForkServer
from support import Script, require_module, run_command, run_python, wait_gone, wait_until

PRELUDE = """
import logging, os, signal, sys, threading, time
from pathlib import Path
from orchard_infra.environment import Environment
from orchard_infra.runs.record import describe_this_run
from orchard_infra.stopping.signals import RunStopped, SignalStop
from orchard_infra.system.masking import uninterrupted

logging.basicConfig(level=logging.DEBUG)
log = logging.getLogger("run")
default = signal.getsignal(signal.SIGTERM)
record = describe_this_run("alone")

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def kill(signum):
    os.kill(os.getpid(), signum)

def wait():
    while True:  # a signal that comes right before a call blocks is seen after it
        time.sleep(0.01)

def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

class Armed:
    # An environment with a stopper and nothing else, entered and left as a session does it.

    def __init__(self, *args, **options):
        self.env = Environment(run=record, lock_path=Path("none"), logger=log)
        self.around = SignalStop(*args, **options).around(self.env)
        self.on_stop = self.env.on_stop
        self.request = self.env.request_stop

    @property
    def requested(self):
        return self.env.stop_requested

    def arm(self):
        try:
            with uninterrupted():
                self.env._begin()
                self.around.__enter__()
        except BaseException:
            self.disarm()
            raise
        return self

    def hold(self):
        for step in self.env._before_release:
            step()

    def disarm(self, error=None):
        try:
            self.around.__exit__(error and type(error), error, None)
        except BaseException as late:
            return late
        finally:
            self.env._end()

    def __enter__(self):
        return self.arm()

    def __exit__(self, kind, error, traceback):
        self.hold()
        late = self.disarm(error)
        say("exit", kind and kind.__name__, "late", type(late).__name__)
        if late is not None:
            raise late
"""


server: ForkServer


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    global server
    with ForkServer(
        *("asyncio", "random", "subprocess", "types", "weakref"),
        *("orchard_infra.stopping.signals", "orchard_infra.runs.record"),
    ) as server:
        yield


def source(body: str) -> str:
    return PRELUDE + textwrap.dedent(body)


def start(tmp_path: Path, body: str, *arguments: str) -> Script:
    return server.run_python(tmp_path, source(body), *arguments)


# Raising


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_unwinds_the_main_thread_and_the_shell_sees_which_it_was(tmp_path, signum, status):
    script = tmp_path / "script.py"
    script.write_text(
        source("""
        with Armed() as watch:
            try:
                say("pid", os.getpid())
                while True:
                    try:
                        time.sleep(0.01)
                    except Exception:
                        say("swallowed")
            finally:
                say("finally", watch.requested.signal.name, time.time() - watch.requested.at < 60)
        """)
    )
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}; echo status $?"
    shell = run_command(tmp_path, ["sh", "-c", command])
    os.kill(int(shell.wait_for("pid").split()[1]), signum)
    assert shell.finish() == 0
    assert shell.output.splitlines()[1:] == [
        f"finally {signum.name} True",
        "exit RunStopped late NoneType",
        f"status {status}",
    ]
    assert "Traceback" not in shell.error_output


def test_a_second_signal_does_not_break_a_finally_clause(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed():
            try:
                kill(signal.SIGTERM)
            finally:
                for _ in range(10):
                    kill(signal.SIGTERM)
                    kill(signal.SIGHUP)
                say("saved")
        """,
    )
    assert run.finish() == 143, run.transcript()
    assert run.output.splitlines() == ["saved", "exit RunStopped late NoneType"]


def test_once_the_exception_was_caught_the_next_signal_raises_again(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed():
            for _ in range(3):
                try:
                    kill(signal.SIGTERM)
                except RunStopped as stopped:
                    say(stopped, stopped.code)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["stopped by SIGTERM 143"] * 3 + ["exit None late NoneType"]


def test_a_signal_raises_again_when_the_first_one_is_long_on_its_way(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed(hold_limit=0.05):
            try:
                kill(signal.SIGTERM)
            finally:
                try:
                    time.sleep(0.06)
                    kill(signal.SIGHUP)
                except RunStopped as stopped:
                    say(stopped)
        """,
    )
    assert run.finish() == 143
    assert "stopped by SIGHUP" in run.output


def test_a_signal_within_a_destructor_is_not_swallowed_with_it(tmp_path):
    run = start(
        tmp_path,
        """
        class Loader:
            def __del__(self):
                kill(signal.SIGTERM)
                say("workers joined")
        with Armed():
            loader = Loader()
            del loader
            time.sleep(1000)
        """,
    )
    assert run.finish() == 143
    assert "workers joined" in run.output
    assert "Exception ignored" not in run.error_output


def test_a_signal_within_the_callback_of_a_weak_reference_is_not_swallowed_with_it(tmp_path):
    run = start(
        tmp_path,
        """
        import types, weakref
        class Worker:
            pass
        workers, worker = weakref.WeakSet(), Worker()
        workers.add(worker)
        references = workers.data
        workers.data = types.SimpleNamespace(discard=lambda item: kill(signal.SIGTERM))
        with Armed():
            del worker
            say("forgotten")
            time.sleep(1000)
        """,
    )
    assert run.finish() == 143
    assert "forgotten" in run.output
    assert "Exception ignored" not in run.error_output


def test_a_signal_while_a_lock_changes_hands_waits_until_it_has(tmp_path):
    """Else a log handler stays locked, or a Condition fails with "release unlocked lock"."""
    run = start(
        tmp_path,
        """
        import functools, types
        handler = logging.Handler()
        signal_myself = functools.partial(signal.raise_signal, signal.SIGTERM)
        handler.lock = types.SimpleNamespace(acquire=signal_myself, release=lambda: None)
        with Armed():
            try:
                handler.acquire()
                say("locked, and known to be")
                time.sleep(1000)
            finally:
                handler.createLock()
        """,
    )
    assert run.finish() == 143
    assert run.output.startswith("locked, and known to be\n")


def test_a_signal_around_a_fork_is_not_swallowed_with_it(tmp_path):
    hooks = """
        import os, signal, sys, time
        mode, when, signum = sys.argv[1:]
        # Those of Python itself, which go before ours, are no better: logging locks in one.
        def hook():
            os.kill(os.getpid(), int(signum))
            time.sleep(0.1)  # it comes again meanwhile
        os.register_at_fork(**{when: hook})
    """
    body = """
        with Armed(mode, deadline=0.1 if mode == "flag" else None):
            try:
                pid = os.fork()
                if not pid:
                    os._exit(0)
                os.waitpid(pid, 0)
                time.sleep(1000)
            finally:
                say("forked", signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """
    # A real start: the hook has to be there before ours are.
    runs = {
        case: run_python(tmp_path, textwrap.dedent(hooks) + source(body), *map(str, case))
        for case in itertools.product(
            ("raise", "flag"), ("before", "after_in_parent"), map(int, (SIGTERM, SIGINT))
        )
    }
    for case, run in runs.items():
        assert run.finish() == (143 if case[-1] == SIGTERM else -SIGINT), (case, run.transcript())
        assert "forked set()" in run.output
        assert "Exception ignored" not in run.error_output


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs a real warning of Python 3.12")
def test_a_signal_while_python_warns_of_a_fork_with_threads_is_not_dropped_with_it(tmp_path):
    run = start(
        tmp_path,
        """
        import warnings
        def showwarning(*args):
            say("warned")
            kill(signal.SIGTERM)
            time.sleep(0.1)  # it comes again meanwhile
        warnings.showwarning = showwarning
        warnings.simplefilter("always")
        with Armed():
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
            time.sleep(1000)
        """,
    )
    assert run.finish() == 143, run.transcript()
    assert run.output.startswith("warned\n")


def test_one_signal_ends_a_program_that_forks_all_the_time(tmp_path):
    runs = [
        start(
            tmp_path,
            """
            with Armed():
                say("in")
                while True:
                    pid = os.fork()
                    if not pid:
                        os._exit(0)
                    os.waitpid(pid, 0)
            """,
        )
        for _ in range(4)
    ]
    for run in runs:
        run.wait_for("in")
        run.send_signal(signal.SIGTERM)
        assert run.finish() == 143, run.transcript()
        assert "Exception ignored" not in run.error_output


def test_a_signal_while_ctrl_c_is_given_back_after_a_fork_is_not_swallowed(tmp_path):
    run = start(
        tmp_path,
        """
        from orchard_infra.stopping import takeover as handlers
        is_in_main_thread = handlers.is_in_main_thread
        def with_a_signal():
            kill(signal.SIGTERM)
            return is_in_main_thread()
        with Armed():
            handlers.is_in_main_thread = with_a_signal
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
            say(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
            time.sleep(1000)
        """,
    )
    assert run.finish() == 143, run.transcript()
    assert run.output.startswith("True\n")
    assert "Exception ignored" not in run.error_output


def test_asyncio_lets_it_through(tmp_path):
    run = start(
        tmp_path,
        """
        import asyncio
        async def main():
            try:
                say("in")
                while True:
                    await asyncio.sleep(0.01)
            finally:
                say("cancelled")
        with Armed():
            asyncio.run(main())
        """,
    )
    run.wait_for("in")
    run.send_signal(signal.SIGTERM)
    assert run.finish() == 143
    assert run.output.splitlines() == ["in", "cancelled", "exit RunStopped late NoneType"]
    assert "Traceback" not in run.error_output


def test_the_handlers_of_an_event_loop_still_wake_it_after_the_end(tmp_path):
    run = start(
        tmp_path,
        """
        import asyncio
        async def main():
            heard = asyncio.Event()
            with Armed():
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, heard.set)
            threading.Timer(0.05, kill, [signal.SIGTERM]).start()
            await heard.wait()
            say("heard")
        asyncio.run(main())
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert "heard" in run.output


def test_a_scheduler_s_warning_is_opt_in(tmp_path):
    body = """
        with Armed(signals=(signal.SIGUSR1, signal.SIGUSR2) if sys.argv[1] == "in" else ()):
            kill(signal.SIGUSR2)
    """
    assert start(tmp_path, body, "in").finish() == 128 + signal.SIGUSR2
    assert start(tmp_path, body, "out").finish() == -signal.SIGUSR2


# A flag


def test_the_first_signal_sets_a_flag_and_the_loop_ends_by_itself(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed("flag") as watch:
            say("in")
            while watch.requested is None:
                time.sleep(0.001)
            say(watch.requested.reason, watch.requested.signal is signal.SIGHUP)
        """,
    )
    run.wait_for("in")
    run.send_signal(signal.SIGHUP)
    assert run.finish() == 0
    assert run.output.splitlines() == ["in", "SIGHUP True", "exit None late NoneType"]


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGTERM, signal.SIGHUP, 129),
        (signal.SIGINT, signal.SIGTERM, 143),
        (signal.SIGTERM, signal.SIGINT, -2),
        (signal.SIGINT, signal.SIGINT, -2),
    ],
)
def test_the_second_signal_raises(tmp_path, first, second, status):
    run = start(
        tmp_path,
        f"""
        with Armed("flag") as watch:
            kill({int(first)})
            say("flagged", watch.requested.reason)
            kill({int(second)})
            say("unreachable")
        """,
    )
    assert run.finish() == status, run.transcript()
    assert f"flagged {first.name}\nexit" in run.output


def test_the_deadline_interrupts_a_call_that_blocks(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed("flag", deadline=0.05) as watch:
            kill(signal.SIGHUP)
            say("flagged")
            try:
                threading.Lock().__enter__(), threading.Event().wait()
            finally:
                say("late", time.time() - watch.requested.at >= 0.05)
        """,
    )
    assert run.finish() == 129
    assert run.output.splitlines() == ["flagged", "late True", "exit RunStopped late NoneType"]


def test_a_deadline_is_kept_also_if_its_signal_comes_right_before_a_call_blocks(tmp_path):
    """Python looks for signals between two calls; one that comes later waits with the call."""
    run = start(
        tmp_path,
        """
        send = signal.pthread_kill
        def missed(*args):
            signal.pthread_kill = send
            say("missed")
        signal.pthread_kill = missed
        with Armed("flag", deadline=0.01):
            kill(signal.SIGTERM)
            time.sleep(1000)
        """,
    )
    assert run.finish() == 143
    assert run.output.startswith("missed\n")


def test_a_deadline_kills_nobody_who_has_put_the_default_handler_back(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed("flag", deadline=0.5) as watch:
            kill(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(0.8)
            say("alive")
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.startswith("alive\n")


def test_a_deadline_that_has_begun_to_signal_is_waited_for(tmp_path):
    run = start(
        tmp_path,
        """
        send, sending, ending = signal.pthread_kill, threading.Event(), threading.Event()
        def slowly(*args):
            sending.set()
            ending.wait()
            time.sleep(0.1)
            send(*args)
        signal.pthread_kill = slowly
        watch = Armed("flag", deadline=0.0, hold_limit=0.0).arm()
        kill(signal.SIGTERM)
        sending.wait()
        ending.set()
        say(watch.disarm())
        time.sleep(0.2)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output == "stopped by SIGTERM\n"


def test_without_a_signal_there_is_no_deadline(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed("flag", deadline=0.0) as watch:
            watch.request("the lock is lost")
            time.sleep(0.05)
            say(watch.requested.reason, watch.requested.signal)
            kill(signal.SIGTERM)
            time.sleep(1000)
        """,
    )
    assert run.finish() == 143
    assert run.output.splitlines()[0] == "the lock is lost None"


def test_a_deadline_that_passes_while_the_watch_ends_kills_nobody(tmp_path):
    run = start(
        tmp_path,
        """
        log.setLevel(logging.ERROR)
        for number in range(300):
            watch = Armed("flag", deadline=number % 30 * 1e-5).arm()
            try:
                kill(signal.SIGTERM)
                if number % 2:
                    watch.hold()
            except RunStopped:
                pass
            finally:
                try:
                    watch.disarm()
                except RunStopped:
                    say("raised by disarm")
        say("alive", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output == "alive True\n"


def test_ctrl_c_stays_with_python_unless_it_is_to_set_the_flag(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed():
            say("raise", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        with Armed("flag"):
            say("flag", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        say("after", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        with Armed(signals=(signal.SIGINT,)) as watch:
            try:
                kill(signal.SIGINT)
            finally:
                say(watch.requested.reason)
        """,
    )
    assert run.finish() == -signal.SIGINT
    said = [line for line in run.output.splitlines() if not line.startswith("exit")]
    assert said == ["raise True", "flag False", "after True", "SIGINT"]


# Callbacks and log lines


def test_callbacks_run_in_their_order_outside_of_the_handler_and_before_the_release(tmp_path):
    run = start(
        tmp_path,
        """
        main = threading.main_thread()
        def slow(request):
            time.sleep(0.05)
            say("slow", request.reason, threading.current_thread() is main)
        def broken(request):
            raise SystemExit("broken callback")
        with Armed() as watch:
            for callback in (slow, broken, lambda request: say("third")):
                watch.on_stop(callback)
            try:
                kill(signal.SIGTERM)
            finally:
                watch.hold()
                say("released")
                called = threading.Event()
                watch.on_stop(lambda request: (say("late, called at once"), called.set()))
                called.wait(30)
        """,
    )
    assert run.finish() == 143
    assert run.output.splitlines() == [
        "slow SIGTERM False",
        "third",
        "released",
        "late, called at once",
        "exit RunStopped late NoneType",
    ]
    assert "a callback of on_stop failed" in run.error_output
    assert "broken callback" in run.error_output


def test_a_callback_that_hangs_keeps_the_release_waiting_for_a_bounded_time(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed(hold_limit=0.05) as watch:
            watch.on_stop(lambda request: time.sleep(1000))
            kill(signal.SIGTERM)
        """,
    )
    assert run.finish() == 143
    assert "a callback of on_stop still runs" in run.error_output


def test_the_children_of_a_callback_have_the_signal_mask_of_the_one_who_gave_it(tmp_path):
    run = start(
        tmp_path,
        """
        import subprocess
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        watch = Armed("flag").arm()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ask = "import signal; print(*map(int, signal.pthread_sigmask(0, ())))"
        upload = lambda request: subprocess.run([sys.executable, "-c", ask], check=True)
        watch.on_stop(upload)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        watch.on_stop(upload)
        kill(signal.SIGTERM)
        watch.hold()
        watch.disarm()
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["", str(int(signal.SIGUSR1))]


def test_a_callback_may_end_the_watch(tmp_path):
    run = start(
        tmp_path,
        """
        ended = threading.Event()
        with Armed("flag") as watch:
            watch.on_stop(lambda request: (watch.hold(), watch.disarm(), ended.set()))
            kill(signal.SIGTERM)
            say("ended", ended.wait(30))
        kill(signal.SIGTERM)
        """,
    )
    assert run.finish() == -signal.SIGTERM
    assert run.output.splitlines() == ["ended True", "exit None late NoneType"]


def test_a_handler_logs_nothing_and_the_background_thread_once(tmp_path):
    run = start(
        tmp_path,
        """
        logged = threading.Event()
        class Where(logging.Handler):
            def emit(self, record):
                if record.levelno == logging.WARNING:
                    say(record.threadName, record.getMessage())
                    logged.set()
        log.addHandler(Where())
        with Armed("flag"):
            kill(signal.SIGTERM)
            logged.wait(30)
            try:
                kill(signal.SIGTERM)
            except RunStopped:
                pass
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines()[0] == "orchard-infra-background stop requested: SIGTERM"
    assert run.output.count("stop requested") == 1


@pytest.mark.parametrize("mode", ["raise", "flag"])
def test_a_storm_of_signals_into_buffered_logging_is_one_clean_stop(tmp_path, mode):
    run = start(
        tmp_path,
        f"""
        logging.basicConfig(stream=open("log.txt", "w"), level=logging.INFO, force=True)
        with Armed({mode!r}) as watch:
            watch.on_stop(lambda request: log.info("asked"))
            try:
                say("in")
                while True:
                    log.info("step %s", "x" * 500)
            finally:
                say("finally")
                for _ in range(50):
                    log.info("saving %s", "x" * 500)
                    time.sleep(0.001)
                say("saved")
                sys.stdin.readline()  # the storm is over
        """,
    )
    run.wait_for("in")
    sent = 0

    def is_enough() -> bool:
        nonlocal sent
        run.send_signal((signal.SIGTERM, signal.SIGHUP)[sent % 2])
        sent += 1
        told = run.output
        return "saved" in told or run.poll() is not None or (sent >= 1000 and "finally" in told)

    # A thousand, and as many more as it takes: those that come together count as one.
    wait_until(is_enough, what=run.transcript, interval=0.0)
    run.tell()
    assert run.finish() in (143, 129), run.transcript()
    said = run.output.splitlines()
    assert said[:3] == ["in", "finally", "saved"]
    assert len(said) == 4
    assert said[3].startswith("exit RunStopped")
    assert run.error_output == ""
    assert "reentrant" not in (tmp_path / "log.txt").read_text()


# Handlers of others


def test_nohup_keeps_its_meaning(tmp_path):
    run = run_python(
        tmp_path,
        PRELUDE
        + """
with Armed() as watch:
    say("in", signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
    sys.stdin.readline()
    say(watch.requested)
""",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    run.wait_for("in True")
    run.send_signal(signal.SIGHUP)
    run.tell()
    assert run.finish() == 0
    assert run.output.splitlines()[1:] == ["None", "exit None late NoneType"]
    assert "SIGHUP has another handler, which stays" in run.error_output


def test_the_handler_of_somebody_else_is_neither_replaced_nor_lost(tmp_path):
    run = start(
        tmp_path,
        """
        def theirs(signum, frame):
            say("theirs")
        def within(signum, frame):
            say("within")
        signal.signal(signal.SIGTERM, theirs)
        with Armed() as watch:
            kill(signal.SIGTERM)
            watch.hold()
            kill(signal.SIGTERM)
            signal.signal(signal.SIGHUP, within)
        say(signal.getsignal(signal.SIGTERM) is theirs, signal.getsignal(signal.SIGHUP) is within)
        """,
    )
    assert run.finish() == 0
    assert run.output.splitlines() == ["theirs"] * 2 + ["exit None late NoneType", "True True"]


def test_a_handler_that_python_does_not_know_of_stays_as_well(tmp_path):
    run = start(
        tmp_path,
        """
        import faulthandler
        faulthandler.register(signal.SIGUSR1)
        with Armed(signals=(signal.SIGUSR1,)):
            kill(signal.SIGUSR1)
        kill(signal.SIGUSR1)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.error_output.count("Current thread") == 2


def test_whoever_put_a_handler_over_ours_and_calls_it_later_finds_the_default(tmp_path):
    body = """
        with Armed():
            saved = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *args: (say("theirs"), saved(*args)))
        if sys.argv[1] == "put back":
            signal.signal(signal.SIGTERM, saved)
        say("armed again", Armed().arm().disarm())
        kill(signal.SIGTERM)
        say("unreachable")
    """
    chained, put_back = (start(tmp_path, body, case) for case in ("chained", "put back"))
    assert chained.finish() == -signal.SIGTERM, chained.transcript()
    assert chained.output.splitlines()[1:] == ["armed again None", "theirs"]
    assert put_back.finish() == -signal.SIGTERM
    assert put_back.output.splitlines()[1:] == ["armed again None"]


def test_whoever_put_a_handler_over_ours_and_calls_it_meanwhile_is_heard(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed() as watch:
            saved = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *args: (say("theirs"), saved(*args)))
            kill(signal.SIGTERM)
        """,
    )
    assert run.finish() == 143
    assert run.output.splitlines() == ["theirs", "exit RunStopped late NoneType"]


def test_outside_of_the_main_thread_there_is_one_debug_line_and_the_flag_still_works(tmp_path):
    run = start(
        tmp_path,
        """
        def work():
            watch = Armed("flag").arm()
            heard = threading.Event()
            watch.on_stop(lambda request: heard.set())
            watch.request("the lock is lost")
            say(heard.wait(30), watch.requested.reason)
            say(signal.getsignal(signal.SIGTERM) == default)
            watch.hold()
            say(watch.disarm())
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["True the lock is lost", "True", "None"]
    assert run.error_output.count("signals are not watched") == 1


def test_in_a_subinterpreter_there_is_one_debug_line_and_the_flag_still_works(tmp_path):
    (tmp_path / "inner.py").write_text(
        source("""
        with Armed("flag") as watch:
            watch.request("the lock is lost")
            say(watch.requested.reason, signal.getsignal(signal.SIGTERM) == default)
        """)
    )
    run = run_python(
        tmp_path,
        """
        import time
        try:
            import _interpreters as interpreters
            interpreter = interpreters.create("legacy")  # psutil refuses to load in the others
        except ImportError:
            import sys, _xxsubinterpreters as interpreters
            interpreter = interpreters.create(isolated=sys.version_info < (3, 12))
        print(interpreters.run_string(interpreter, open("inner.py").read()), flush=True)
        for attempt in range(100):
            try:
                interpreters.destroy(interpreter)
                break
            except RuntimeError:  # its background thread ends within a second
                time.sleep(0.1)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == [
        "the lock is lost True",
        "exit None late NoneType",
        "None",
    ], run.transcript()
    assert run.error_output.count("signals are not watched") == 1


# Children


@pytest.mark.parametrize("forked_in", ["the main thread", "another thread"])
@pytest.mark.parametrize("mode", ["raise", "flag"])
def test_a_forked_child_has_the_handlers_of_before(tmp_path, mode, forked_in):
    run = start(
        tmp_path,
        f"""
        def fork():
            # Python 3.13.0 has no Ctrl-C in a child that another thread forked.
            ctrl_c = [signal.SIGINT] * ({forked_in!r} == "the main thread")
            for signum in (signal.SIGTERM, signal.SIGHUP, *ctrl_c):
                ready, tell = os.pipe()
                pid = os.fork()
                if not pid:
                    try:
                        os.write(tell, b"x")
                        wait()
                    except KeyboardInterrupt:
                        os._exit(130)
                    finally:
                        os._exit(1)
                os.read(ready, 1)
                os.kill(pid, signum)
                say(signal.Signals(signum).name, status_of(pid))
        with Armed({mode!r}) as watch:
            if {forked_in!r} == "the main thread":
                fork()
            else:
                thread = threading.Thread(target=fork)
                thread.start()
                thread.join()
            say(watch.requested)
        """,
    )
    assert run.finish() == 0, run.transcript()
    ctrl_c = ["SIGINT 130"] * (forked_in == "the main thread")
    assert run.output.splitlines()[:-1] == ["SIGTERM -15", "SIGHUP -1", *ctrl_c, "None"]


def test_children_that_are_terminated_as_soon_as_they_are_started_do_end(tmp_path):
    run = start(
        tmp_path,
        """
        import multiprocessing
        context = multiprocessing.get_context("fork")
        with Armed():
            for _ in range(20):
                child = context.Process(target=time.sleep, args=(1000,))
                child.start()
                child.terminate()
                child.join()
                assert child.exitcode == -signal.SIGTERM, child.exitcode
            say("blocked", signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.startswith("blocked set()\n")


def test_a_child_of_a_fork_that_python_did_not_see_has_the_handlers_of_before(tmp_path):
    run = start(
        tmp_path,
        """
        import ctypes
        with Armed():
            ready, tell = os.pipe()
            pid = ctypes.PyDLL(None).fork()
            if not pid:
                try:
                    os.write(tell, b"x")
                    wait()
                finally:
                    os._exit(1)
            os.read(ready, 1)
            os.kill(pid, signal.SIGTERM)
            say(status_of(pid))
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines()[0] == "-15"


def test_a_signal_mask_of_one_s_own_survives_a_fork(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed():
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
            pid = os.fork()
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            if not pid:
                os._exit(len(mask))
            say(sorted(s.name for s in mask), status_of(pid))
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines()[0] == "['SIGHUP'] 1"


def test_a_child_that_unwinds_out_of_the_block_leaves_its_parent_s_watch_alone(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed("flag") as watch:
            pid = os.fork()
            if not pid:
                watch.request("in the child")
                watch.hold()
                os._exit(watch.disarm() is not None)
            say("child", status_of(pid), watch.requested)
            kill(signal.SIGTERM)
            say(watch.requested.reason)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines()[:2] == ["child 0 None", "SIGTERM"]


def test_the_workers_of_a_data_loader_end_by_the_signal_they_get(tmp_path):
    require_module("torch")
    run = start(
        tmp_path,
        """
        import torch
        class Slow(torch.utils.data.Dataset):
            def __len__(self):
                return 1000
            def __getitem__(self, index):
                if index > 4:
                    time.sleep(1000)
                return index
        with Armed():
            loader = torch.utils.data.DataLoader(
                Slow(), num_workers=2, multiprocessing_context="fork", batch_size=2
            )
            batches = iter(loader)
            next(batches)
            say("in", *(worker.pid for worker in batches._workers))
            for batch in batches:
                pass
        """,
    )
    workers = [int(pid) for pid in run.wait_for("in").split()[1:]]
    os.kill(workers[0], signal.SIGTERM)
    assert run.finish() == 1
    assert "killed by signal: Terminated" in run.error_output
    wait_gone(workers)


# Environments within environments


def test_nested_watches_all_hear_and_the_innermost_decides(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed("flag") as outer:
            outside = signal.getsignal(signal.SIGTERM)
            with Armed("flag") as inner:
                kill(signal.SIGTERM)
                say("both", outer.requested.reason, inner.requested.reason)
            say("outer again", signal.getsignal(signal.SIGTERM) == outside)
        say("default", signal.getsignal(signal.SIGTERM) == default)
        """,
    )
    assert run.finish() == 0, run.transcript()
    said = [line for line in run.output.splitlines() if not line.startswith("exit")]
    assert said == ["both SIGTERM SIGTERM", "outer again True", "default True"]


def test_what_was_a_mere_flag_within_is_an_exception_around_it(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed():
            with Armed("flag") as inner:
                kill(signal.SIGTERM)
                say("saved")
            say("unreachable")
        """,
    )
    assert run.finish() == 143
    assert run.output.splitlines() == [
        "saved",
        "exit None late RunStopped",
        "exit RunStopped late NoneType",
    ]


def test_what_was_raised_and_caught_within_is_done_with(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed() as outer:
            with Armed():
                with Armed():
                    try:
                        kill(signal.SIGTERM)
                    except RunStopped:
                        say("caught")
        """,
    )
    assert run.finish() == 0
    assert run.output.splitlines() == ["caught"] + ["exit None late NoneType"] * 3


def test_the_deadline_of_an_outer_watch_holds_within(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed("flag", deadline=0.05):
            with Armed("flag"):
                kill(signal.SIGTERM)
                time.sleep(1000)
        """,
    )
    assert run.finish() == 143
    assert run.output.splitlines() == ["exit RunStopped late NoneType"] * 2


def test_what_is_held_within_is_a_flag_around_it(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed("flag") as outer:
            with Armed() as inner:
                inner.hold()
                kill(signal.SIGTERM)
                say("held", outer.requested)
            say("flagged", outer.requested.reason)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines()[:3] == [
        "held None",
        "exit None late NoneType",
        "flagged SIGTERM",
    ]


def test_watches_that_end_in_the_wrong_order_still_hold_and_leave_the_default(tmp_path):
    run = start(
        tmp_path,
        """
        first = Armed().arm()
        second = Armed("flag").arm()
        first.hold()
        kill(signal.SIGTERM)
        say("held by the first", second.requested)
        say(first.disarm())
        say("still watched", signal.getsignal(signal.SIGTERM) != default)
        kill(signal.SIGTERM)
        say(second.requested.reason, second.disarm())
        say(signal.getsignal(signal.SIGTERM) == default)
        say(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == [
        "held by the first None",
        "stopped by SIGTERM",
        "still watched True",
        "SIGTERM None",
        "True",
        "True",
    ]


def test_of_three_watches_the_innermost_may_be_the_last(tmp_path):
    run = start(
        tmp_path,
        """
        watches = [Armed().arm() for _ in range(3)]
        for watch in watches:
            watch.disarm()
        say(signal.getsignal(signal.SIGTERM) == default)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output == "True\n"


# During the release


@pytest.mark.parametrize("mode", ["raise", "flag"])
def test_on_the_threshold_of_the_release_signals_wait_for_its_end(tmp_path, mode):
    run = start(
        tmp_path,
        f"""
        from orchard_infra.stopping.signals import SignalWatch
        with Armed({mode!r}) as watch:
            def trace(frame, event, argument):
                if frame.f_code is SignalWatch.hold.__code__:
                    sys.setprofile(None)
                    for _ in range(3):
                        kill(signal.SIGTERM)
            sys.setprofile(trace)
        """,
    )
    assert run.finish() == 143, run.transcript()
    assert run.output.splitlines() == ["exit None late RunStopped"]


@pytest.mark.parametrize("mode", ["raise", "flag"])
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_what_comes_during_the_release_waits_for_its_end(tmp_path, mode, signum, status):
    run = start(
        tmp_path,
        f"""
        with Armed({mode!r}) as watch:
            watch.on_stop(lambda request: say("too late for a checkpoint"))
            watch.hold()
            for _ in range(3):
                kill({int(signum)})
            say("released", watch.requested)
        say("unreachable")
        """,
    )
    assert run.finish() == status, run.transcript()
    late = "RunStopped" if signum == signal.SIGTERM else "KeyboardInterrupt"
    assert run.output.splitlines() == ["released None", f"exit None late {late}"]
    assert f"held until the end of the release: {signum.name}" in run.error_output


def test_a_default_that_the_block_put_back_is_covered_as_well(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed() as watch:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            watch.hold()
            kill(signal.SIGTERM)
            say("released")
        """,
    )
    assert run.finish() == 143
    assert run.output.startswith("released\n")


def test_a_release_that_hangs_is_interrupted_by_what_it_holds(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed(hold_limit=0.1) as watch:
            began = time.monotonic()
            watch.hold()
            try:
                kill(signal.SIGTERM)
                say("held")
                time.sleep(1000)
            except RunStopped as stopped:
                say(stopped, time.monotonic() - began >= 0.1)
            try:
                kill(signal.SIGINT)
            except KeyboardInterrupt:
                say("at once")
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == [
        "held",
        "stopped by SIGTERM True",
        "at once",
        "exit None late NoneType",
    ]


def test_the_limit_counts_from_the_beginning_of_the_release(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed(hold_limit=0.1) as watch:
            watch.hold()
            kill(signal.SIGTERM)
            while True:
                time.sleep(0.001)
                watch.hold()
        """,
    )
    assert run.finish() == 143, run.transcript()


def test_what_was_held_is_returned_once(tmp_path):
    run = start(
        tmp_path,
        """
        watch = Armed().arm()
        watch.hold()
        kill(signal.SIGHUP)
        kill(signal.SIGTERM)
        say(watch.disarm())
        say(watch.disarm())
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["stopped by SIGHUP", "None"]


def test_what_is_held_while_callbacks_run_interrupts_a_release_that_hangs_as_well(tmp_path):
    run = start(
        tmp_path,
        """
        with Armed("flag", hold_limit=0.1) as watch:
            def checkpoint(request):
                for _ in range(20):
                    kill(signal.SIGTERM)
                    time.sleep(0.001)
                say("saved")
            watch.on_stop(checkpoint)
            watch.request("the lock is lost")
            watch.hold()
            say("releasing")
            time.sleep(1000)
        """,
    )
    assert run.finish() == 143, run.transcript()
    assert run.output.splitlines() == ["saved", "releasing", "exit RunStopped late NoneType"]


def test_a_signal_at_any_instant_is_heard_and_ends_nobody(tmp_path):
    """Hundreds of environments with a signal each: before, on the way in, meanwhile, at the end."""
    run = start(
        tmp_path,
        """
        import random
        from orchard_infra import InfrastructureManager, managed_environment
        log.setLevel(logging.ERROR)
        me = os.getpid()
        asked, ask = os.pipe()
        answered, answer = os.pipe()
        sender = os.fork()
        if not sender:
            os.close(ask)
            while os.read(asked, 1):
                until = time.perf_counter() + random.random() * 3e-3
                while time.perf_counter() < until:
                    pass
                os.kill(me, signal.SIGTERM)
                os.write(answer, b"x")
            os._exit(0)
        sys.unraisablehook = lambda info: say("swallowed", info.exc_value, info.object)
        nothing = dict(sanitizer=None, locker=None, flusher=None, cleaner=None)
        manager = InfrastructureManager(**nothing)
        raised = 0
        for _ in range(400):
            around = Armed("flag").arm()
            os.write(ask, b"x")
            try:
                with managed_environment("alone", manager=manager, logger=log):
                    for _ in range(2000):
                        pass
            except RunStopped:
                raised += 1
            os.read(answered, 1)
            around.hold()
            around.disarm()
            if around.requested is None:
                say("lost")
            threads = [t.name for t in threading.enumerate() if "background" not in t.name]
            if len(threads) != 1 or signal.getsignal(signal.SIGTERM) != default:
                say("left behind")
        os.close(ask)
        say("raised", 0 < raised, "sender", status_of(sender))
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output == "raised True sender 0\n", run.transcript()
