"""However a run is asked to stop: real signals to real runs."""

from __future__ import annotations

import os
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from forking import ForkServer
from orchard_infra import InfrastructureManager, RunRegistry, managed_environment
from support import Script, is_running, require_module, run_python, wait_gone, wait_until

server: ForkServer


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    global server
    with ForkServer(
        *("asyncio", "multiprocessing", "portalocker", "psutil"),
        *("orchard_infra._public", "orchard_infra.locks.acquiring"),
    ) as server:
        yield


# A run that says where it is. What it does inside is up to each test.
RUN = """
    import logging, os, signal, sys, threading, time
    from orchard_infra import *

    logging.basicConfig(level=logging.INFO)
    options = eval(sys.argv[1])
    manager = InfrastructureManager(stopper=SignalStop(**options))
    before = {{s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}}
    try:
        with managed_environment("digits", manager=manager) as env:
            try:
{body}
            except Exception:
                print("swallowed", flush=True)
            finally:
                print("finally", flush=True)
    finally:
        print("restored", all(signal.getsignal(s) == h for s, h in before.items()), flush=True)
        print("left", env.lock_path.exists(), env.tmp_dir.exists(), flush=True)
"""

# Short naps: a signal that comes just before a long one is heeded only after it.
SLEEP = """
print("in", flush=True)
while True:
    time.sleep(0.02)
"""
BLOCK = SLEEP.replace("0.02", "1000")


def source(body: str) -> str:
    return textwrap.dedent(RUN).format(
        body=textwrap.indent(textwrap.dedent(body).strip(), " " * 16)
    )


def start(tmp_path: Path, body: str = SLEEP, stop: str = "{}") -> Script:
    run = server.run_python(tmp_path, source(body), stop)
    run.wait_for("in")
    return run


def ended_well(run: Script) -> bool:
    said = run.output.splitlines()
    return said[-3:] == ["finally", "restored True", "left False False"]


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -2)]
)
def test_a_signal_unwinds_the_run_and_the_exit_status_says_which(tmp_path, signum, status):
    run = start(tmp_path)
    run.send_signal(signum)
    assert run.finish() == status, run.transcript()
    assert ended_well(run), run.transcript()
    assert "swallowed" not in run.output


def test_a_scheduler_s_warning_is_heeded_when_asked_for(tmp_path):
    run = start(tmp_path, stop="{'signals': (signal.SIGUSR1,)}")
    run.send_signal(signal.SIGUSR1)
    assert run.finish() == 128 + signal.SIGUSR1
    assert ended_well(run)


def test_by_default_a_user_signal_is_nobody_s_business(tmp_path):
    run = start(tmp_path)
    run.send_signal(signal.SIGUSR1)
    assert run.finish() == -signal.SIGUSR1


FLAG = """
print("in", flush=True)
while not env.stop_requested:
    time.sleep(0.01)
request = env.stop_requested
recent = time.time() - request.at < 60
print("flag", request.reason, request.signal == signal.SIGTERM, recent, flush=True)
"""


def test_in_flag_mode_the_loop_ends_by_itself(tmp_path):
    run = start(tmp_path, FLAG, "{'mode': 'flag'}")
    run.send_signal(signal.SIGTERM)
    run.wait_for("flag SIGTERM True True")
    assert run.finish() == 0
    assert ended_well(run)


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)], ids=["SIGTERM", "Ctrl-C"]
)
def test_in_flag_mode_the_first_signal_ends_a_wait_for_the_lock(tmp_path, signum, status):
    """There is no loop yet that could see a flag, and nothing to save."""
    with managed_environment("digits", manager=InfrastructureManager(stopper=None)) as env:
        waiting = server.run_python(
            tmp_path,
            """
            import logging, os, sys
            os.environ.pop("ORCHARD_INFRA_RUN_ID")  # else it joins the run that started it
            from orchard_infra import InfrastructureManager, SignalStop, managed_environment

            logging.basicConfig(level="INFO", stream=sys.stdout)
            manager = InfrastructureManager(stopper=SignalStop(mode="flag"))
            with managed_environment("digits", manager=manager, timeout=None):
                print("entered", flush=True)
            """,
        )
        waiting.wait_for("waiting for the lock")
        waiting.send_signal(signum)
        assert waiting.finish() == status, waiting.transcript()
        assert "entered" not in waiting.output
        env.verify()
    assert [run for run in RunRegistry().runs() if run.record.pid == waiting.pid] == []


def test_in_flag_mode_a_second_signal_raises(tmp_path):
    run = start(
        tmp_path,
        """
        print("in", flush=True)
        while not env.stop_requested:
            time.sleep(0.01)
        print("flagged", flush=True)
        while True:
            time.sleep(0.02)
        """,
        "{'mode': 'flag'}",
    )
    run.send_signal(signal.SIGTERM)
    run.wait_for("flagged")
    run.send_signal(signal.SIGTERM)
    assert run.finish() == 143
    assert ended_well(run)


def test_in_flag_mode_the_deadline_interrupts_a_blocking_call(tmp_path):
    run = start(tmp_path, BLOCK, "{'mode': 'flag', 'deadline': 0.1}")
    wait_until(lambda: psutil.Process(run.pid).status() == psutil.STATUS_SLEEPING)
    run.send_signal(signal.SIGTERM)
    assert run.finish() == 143
    assert ended_well(run), run.transcript()


def test_without_a_deadline_a_flag_raises_nothing_into_the_run(tmp_path):
    run = start(
        tmp_path,
        """
        print("in", flush=True)
        try:
            sys.stdin.readline()
        except BaseException as error:
            print("interrupted", type(error), flush=True)
        print("flagged", bool(env.stop_requested), flush=True)
        """,
        "{'mode': 'flag'}",
    )
    run.send_signal(signal.SIGTERM)
    run.tell()
    run.wait_for("flagged")
    assert "interrupted" not in run.output
    assert run.finish() == 0


def test_callbacks_run_outside_of_the_handler_before_anything_is_released(tmp_path):
    run = start(
        tmp_path,
        """
        def checkpoint(request):
            time.sleep(0.05)
            print("checkpoint", request.reason, env.tmp_dir.exists(), env.lock_path.exists(),
                  threading.current_thread() is threading.main_thread(), flush=True)
        env.on_stop(checkpoint)
        def broken(request):
            raise KeyError("broken callback")
        env.on_stop(broken)
        print("in", flush=True)
        while True:
            time.sleep(0.02)
        """,
    )
    run.send_signal(signal.SIGTERM)
    assert run.finish() == 143
    assert "checkpoint SIGTERM True True False" in run.output, run.transcript()
    assert "broken callback" in run.error_output
    assert "stop requested: SIGTERM" in run.error_output


def test_a_handler_of_somebody_else_is_left_alone(tmp_path):
    run = server.run_python(
        tmp_path,
        """
        import signal, sys
        from orchard_infra import managed_environment
        def theirs(signum, frame):
            print("theirs", flush=True)
        signal.signal(signal.SIGTERM, theirs)
        with managed_environment("digits") as env:
            print("in", flush=True)
            sys.stdin.readline()
            print("flag", env.stop_requested, flush=True)
        print("kept", signal.getsignal(signal.SIGTERM) is theirs, flush=True)
        """,
    )
    run.wait_for("in")
    run.send_signal(signal.SIGTERM)
    run.wait_for("theirs")
    run.tell()
    assert run.finish() == 0
    assert "flag None" in run.output
    assert "kept True" in run.output


def test_a_handler_that_is_installed_inside_the_block_stays(tmp_path):
    """Lightning's, submitit's: they may also have saved ours, and call it after we are gone."""
    run = server.run_python(
        tmp_path,
        """
        import os, signal
        from orchard_infra import managed_environment
        with managed_environment("digits"):
            saved = signal.getsignal(signal.SIGTERM)
            def theirs(signum, frame):
                saved(signum, frame)
            signal.signal(signal.SIGTERM, theirs)
        print("kept", signal.getsignal(signal.SIGTERM) is theirs, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print("unreachable", flush=True)
        """,
    )
    assert run.finish() == -signal.SIGTERM, run.transcript()
    assert run.output.splitlines() == ["kept True"]


def test_an_ignored_sighup_stays_ignored(tmp_path):
    body = """
        print("in", flush=True)
        sys.stdin.readline()
        print("flag", env.stop_requested, flush=True)
        """
    run = run_python(
        tmp_path,
        source(body),
        "{}",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    run.wait_for("in")
    run.send_signal(signal.SIGHUP)
    run.tell()
    run.wait_for("flag None")
    assert run.finish() == 0
    assert ended_well(run)


def test_outside_of_the_main_thread_there_are_no_handlers_and_one_debug_line(tmp_path):
    run = server.run_python(
        tmp_path,
        """
        import logging, signal, threading
        from orchard_infra import managed_environment
        logging.basicConfig(level=logging.DEBUG)
        def work():
            with managed_environment("digits") as env:
                print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
                env.lock_path.unlink()
                try:
                    env.verify()
                except Exception:
                    print("asked", bool(env.stop_requested), flush=True)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        """,
    )
    assert run.finish() == 0
    assert run.output.splitlines() == ["True", "asked True"]
    assert run.error_output.count("signals are not watched") == 1


def test_a_forked_worker_behaves_as_if_it_had_no_handler(tmp_path):
    run = start(
        tmp_path,
        """
        read, write = os.pipe()
        worker = os.fork()
        if not worker:
            try:
                os.write(write, b"x")
                time.sleep(1000)
            finally:
                print("worker unwound", flush=True)
        os.read(read, 1)
        os.kill(worker, signal.SIGTERM)
        print("in", os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)
        """,
    )
    run.wait_for(f"in {-signal.SIGTERM}")
    assert run.finish() == 0
    assert "worker unwound" not in run.output


def test_nested_environments_both_hear_and_give_their_handlers_back_in_order(tmp_path):
    run = server.run_python(
        tmp_path,
        """
        import os, signal, time
        from orchard_infra import InfrastructureManager, SignalStop, managed_environment
        flag = InfrastructureManager(stopper=SignalStop(mode="flag"))
        with managed_environment("outer", manager=flag) as outer:
            outside = signal.getsignal(signal.SIGTERM)
            with managed_environment("inner", manager=flag) as inner:
                os.kill(os.getpid(), signal.SIGTERM)
                while not inner.stop_requested:
                    time.sleep(0.01)
                print("both", bool(outer.stop_requested), flush=True)
            print("outer again", signal.getsignal(signal.SIGTERM) == outside, flush=True)
        print("default", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["both True", "outer again True", "default True"]


def test_environments_that_end_in_the_wrong_order_leave_the_default_handler(tmp_path):
    run = server.run_python(
        tmp_path,
        """
        import os, signal
        from orchard_infra import InfrastructureManager
        manager = InfrastructureManager()
        manager.prepare_environment("first")
        manager.prepare_environment("second")
        manager.release_resources("first")
        second = signal.getsignal(signal.SIGTERM)
        print("still the second's", second is not signal.SIG_DFL, flush=True)
        manager.release_resources("second")
        print("default", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["still the second's True", "default True"]


RELEASING = """
    import os, signal, sys, time
    from contextlib import contextmanager
    from orchard_infra import *
    class Slow:
        @contextmanager
        def around(self, env):
            yield
            print("releasing", flush=True)
            sys.stdin.readline()
            print("flushed", flush=True)
    manager = InfrastructureManager(
        flusher=Slow(), stopper=SignalStop(hold_limit=float(sys.argv[1]))
    )
    try:
        with managed_environment("digits", manager=manager) as env:
            pass
    finally:
        print("left", env.lock_path.exists(), env.tmp_dir.exists(), flush=True)
    print("after", flush=True)
"""


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_signals_during_the_release_are_held_until_it_is_finished(tmp_path, signum, status):
    run = server.run_python(tmp_path, RELEASING, "60")
    run.wait_for("releasing")
    for _ in range(3):
        run.send_signal(signum)
    run.tell()
    assert run.finish() == status, run.transcript()
    assert run.output.splitlines() == ["releasing", "flushed", "left False False"]


def test_a_release_that_hangs_can_be_ended_and_the_rest_of_it_is_done(tmp_path):
    run = server.run_python(tmp_path, RELEASING, "0.1")
    run.wait_for("releasing")
    run.send_signal(signal.SIGTERM)
    assert run.finish() == 143, run.transcript()
    assert run.output.splitlines() == ["releasing", "left False False"]


def test_a_second_ctrl_c_during_the_release_does_not_break_it(tmp_path):
    run = server.run_python(
        tmp_path,
        """
        import os, signal, sys, time
        from contextlib import contextmanager
        from orchard_infra import *
        class Slow:
            @contextmanager
            def around(self, env):
                try:
                    yield
                finally:
                    print("releasing", flush=True)
                    sys.stdin.readline()
        with managed_environment("digits", manager=InfrastructureManager(flusher=Slow())) as env:
            print("in", env.lock_path, flush=True)
            while True:
                time.sleep(0.02)
        """,
    )
    lock = Path(run.wait_for("in").split()[1])
    run.send_signal(signal.SIGINT)
    run.wait_for("releasing")
    run.send_signal(signal.SIGINT)
    run.tell()
    assert run.finish() == -signal.SIGINT
    assert not lock.exists()
    assert run.error_output.count("Traceback") == 1


@pytest.mark.parametrize("when", ["hold", "take_over"])
def test_a_ctrl_c_as_the_release_begins_leaves_it_whole_and_so_does_the_next(tmp_path, when):
    """The first one comes as signals are about to be held; found by chaos, and made to happen."""
    run = server.run_python(
        tmp_path,
        """
        import os, signal, sys
        from contextlib import contextmanager
        from orchard_infra import *
        from orchard_infra.stopping.signals import SignalWatch

        def press():
            os.kill(os.getpid(), signal.SIGINT)

        code = getattr(SignalWatch, sys.argv[1]).__code__

        def trace(frame, event, argument):
            if frame.f_code is code:
                sys.setprofile(None)
                press()

        class Flusher:
            @contextmanager
            def around(self, env):
                yield
                press()
                print("flushed", flush=True)

        manager = InfrastructureManager(flusher=Flusher())
        with managed_environment("digits", manager=manager) as env:
            print("lock", env.lock_path, flush=True)
            sys.setprofile(trace)
        """,
        when,
    )
    lock = Path(run.wait_for("lock").split()[1])
    assert run.finish() == -signal.SIGINT
    assert "flushed" in run.output
    assert "device caches" not in run.error_output
    assert not lock.exists()


SWEEP = """
    import asyncio, os, signal, sys
    from contextlib import contextmanager
    from orchard_infra import *

    class Signalled:
        @contextmanager
        def around(self, env):
            try:
                yield
            finally:
                os.kill(os.getpid(), int(sys.argv[1]))

    manager = InfrastructureManager(extras=(Signalled(),))

    def in_a_block():
        with managed_environment("digits", manager=manager):
            raise ValueError("the trial failed")

    @managed_environment("digits", manager=manager)
    def decorated():
        raise ValueError("the trial failed")

    def in_a_task():
        async def trial():
            async with managed_environment("digits", manager=manager):
                raise ValueError("the trial failed")
        asyncio.run(trial())

    def by_hand():
        manager.prepare_environment("digits")
        try:
            raise ValueError("the trial failed")
        finally:
            manager.release_resources("digits")

    # In a task a Ctrl-C is asyncio's own affair.
    ways = (in_a_block, decorated, by_hand, *[in_a_task] * (int(sys.argv[1]) == signal.SIGTERM))
    for way in ways:
        try:
            for trial in range(3):
                print(way.__name__, flush=True)
                try:
                    way()
                except ValueError:
                    print("the next trial", flush=True)
        except (RunStopped, KeyboardInterrupt) as stopped:
            print(type(stopped).__name__, repr(stopped.__context__), flush=True)
        with managed_environment("digits"):
            pass  # the lock is free
"""


@pytest.mark.parametrize(
    ("signum", "name"), [(signal.SIGTERM, "RunStopped"), (signal.SIGINT, "KeyboardInterrupt")]
)
def test_a_stop_during_the_release_of_a_failed_trial_ends_the_sweep(tmp_path, signum, name):
    """The trial's error, which the sweep catches, does not hide it."""
    run = server.run_python(tmp_path, SWEEP, str(int(signum)))
    assert run.finish() == 0, run.transcript()
    stopped = f"{name} ValueError('the trial failed')"
    ways = ["in_a_block", "decorated", "by_hand", *["in_a_task"] * (signum == signal.SIGTERM)]
    assert run.output.splitlines() == [line for way in ways for line in (way, stopped)]


def test_a_sigterm_during_the_release_after_a_ctrl_c_is_a_stop_of_its_own(tmp_path):
    run = server.run_python(
        tmp_path,
        """
        import os, signal
        from contextlib import contextmanager
        from orchard_infra import *
        class Signalled:
            @contextmanager
            def around(self, env):
                try:
                    yield
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)
        try:
            with managed_environment("digits", manager=InfrastructureManager(extras=[Signalled()])):
                os.kill(os.getpid(), signal.SIGINT)
                while True:
                    pass
        except KeyboardInterrupt:
            print("the notebook goes on", flush=True)
        """,
    )
    assert run.finish() == 143, run.transcript()
    assert run.output == ""


OPEN_AT_EXIT = """
    import atexit, os, signal, sys, time
    from contextlib import contextmanager
    from orchard_infra import *

    class Hangs:
        @contextmanager
        def around(self, env):
            yield
            print("releasing", flush=True)
            time.sleep(1000 if sys.argv[1] == "release" else 0)

    stopper = SignalStop("flag", deadline=0.1, hold_limit=0.1)
    manager = InfrastructureManager(stopper=stopper, extras=[Hangs()])
    env = manager.prepare_environment(sys.argv[1])

    @atexit.register
    def hook():  # before the environment's own
        env.on_stop(lambda request: print("called", flush=True))
        if sys.argv[1] == "hook":
            print("hook", flush=True)
            try:
                time.sleep(1000)
            except RunStopped as stopped:
                print(stopped, flush=True)
"""


def test_an_environment_that_is_open_at_exit_has_its_deadline_and_its_limit(tmp_path):
    """From Python 3.12 on no thread can be started then: the background thread is there before."""
    in_release = server.run_python(tmp_path, OPEN_AT_EXIT, "release")
    in_hook = server.run_python(tmp_path, OPEN_AT_EXIT, "hook")
    in_hook.wait_for("hook")
    in_hook.send_signal(signal.SIGTERM)
    in_release.wait_for("releasing")
    in_release.send_signal(signal.SIGTERM)
    in_hook.finish()
    assert in_hook.output.splitlines()[-2:] == ["stopped by SIGTERM", "releasing"]
    assert in_release.finish() == 143
    assert "atexit" not in in_release.error_output
    assert not list((Path(os.environ["ORCHARD_INFRA_DIR"]) / "locks").glob("*.lock"))


STOPPED_AT_EXIT = """
    import atexit, signal
    from contextlib import contextmanager
    from orchard_infra import InfrastructureManager

    class Interrupted:
        @contextmanager
        def around(self, env):
            yield
            signal.raise_signal({signum})
            print("released", flush=True)

    atexit.register(print, "the program's first hook", flush=True)
    InfrastructureManager(extras=[Interrupted()]).prepare_environment("{signum}")
"""


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)],
)
def test_a_stop_during_the_release_in_an_exit_hook_is_in_the_exit_status(tmp_path, signum, status):
    """Python prints what such a hook raises, and exits with 0. The hooks that follow are called."""
    run = server.run_python(tmp_path, STOPPED_AT_EXIT.format(signum=int(signum)))
    assert run.finish() == status
    assert run.output.splitlines() == ["released", "the program's first hook"]
    assert "atexit" not in run.error_output


CHILD_DIES = """
    import os, signal, sys, time
    from contextlib import contextmanager
    from orchard_infra import *

    class WorkerDies:
        @contextmanager
        def around(self, env):
            try:
                yield
            finally:
                os.kill(worker, signal.SIGKILL)
                time.sleep(0.1)
                print("all of this step", flush=True)
    manager = InfrastructureManager(extras=[WorkerDies()])
    try:
        with managed_environment(sys.argv[1], manager=manager) as env:
            {worker}
            if sys.argv[1] == "fails":
                raise KeyError("the body")
    except Exception as error:
        print(type(error).__name__, flush=True)
    print("left", env.lock_path.exists(), env.tmp_dir.exists(), flush=True)
    print("handler", signal.getsignal(signal.SIGCHLD) is theirs, flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("kind", ["a handler of one's own", "torch's"])
def test_a_worker_that_dies_during_the_release_breaks_off_no_step_of_it(tmp_path, kind):
    if kind == "torch's":
        require_module("torch")
        worker = """
            import torch
            loader = torch.utils.data.DataLoader(range(99), num_workers=1, persistent_workers=True,
                                                 multiprocessing_context="fork")
            next(batches := iter(loader))
            worker, theirs = batches._workers[0].pid, signal.getsignal(signal.SIGCHLD)
        """
    else:
        worker = """
            def theirs(signum, frame):
                raise RuntimeError("a worker was killed")
            signal.signal(signal.SIGCHLD, theirs)
            if not (worker := os.fork()):
                time.sleep(1000)
        """
    body = textwrap.dedent(CHILD_DIES).replace(
        "        {worker}\n", textwrap.indent(textwrap.dedent(worker), " " * 8)
    )
    runs = {
        case: server.run_python(tmp_path, body, case)
        for case in (("ends", "fails") if kind != "torch's" else ("ends",))
    }
    for case, run in runs.items():
        assert run.finish() == 0, run.transcript()
        assert run.output.splitlines() == [
            "all of this step",
            {"ends": "RuntimeError", "fails": "KeyError"}[case],
            "left False False",
            "handler True",
        ], run.transcript()


def test_a_storm_of_signals_into_logging_never_reenters_a_writer(tmp_path):
    """Logging in a handler re-entered a buffered writer and made a cancelled job exit 0."""
    run = server.run_python(
        tmp_path,
        """
        import logging
        from orchard_infra import InfrastructureManager, SignalStop, managed_environment
        writer = open("/dev/null", "w")  # buffered, as a log file is
        logging.basicConfig(stream=writer, level=logging.INFO)
        log = logging.getLogger("train")
        manager = InfrastructureManager(stopper=SignalStop(mode="flag"))
        calls = 0
        with managed_environment("digits", manager=manager) as env:
            env.on_stop(lambda request: log.info("asked"))
            print("in", flush=True)
            while True:
                log.info("step %s", "x" * 500)
        """,
    )
    run.wait_for("in")

    def storm() -> bool:  # signals that wait for a busy process count as one, so until it ends
        run.send_signal(signal.SIGTERM)
        return run.poll() is not None

    wait_until(storm, interval=0.0005)
    # The storm goes on after the environment has ended, when signals do what they always did.
    assert run.finish() in (143, -signal.SIGTERM), run.error_output[-2000:]
    assert "reentrant" not in run.error_output
    assert run.error_output == ""


def test_a_coroutine_s_run_is_stopped_as_well(tmp_path):
    run = start(
        tmp_path,
        """
        import asyncio
        async def main():
            print("in", flush=True)
            await asyncio.sleep(1000)
        asyncio.run(main())
        """,
    )
    run.send_signal(signal.SIGTERM)
    assert run.finish() == 143
    assert ended_well(run), run.transcript()


def test_workers_of_a_stopped_run_go_with_it(tmp_path):
    run = server.run_python(
        tmp_path,
        """
        import multiprocessing, time
        from orchard_infra import *
        if __name__ == "__main__":
            batch = InfrastructureManager(sanitizer=GhostSanitizer(leftovers="stop"))
            cfg = EnvironmentConfig("digits", allow_process_kill=True)
            with managed_environment(cfg, manager=batch):
                context = multiprocessing.get_context("fork")
                workers = [context.Process(target=time.sleep, args=(1000,)) for _ in range(3)]
                for worker in workers:
                    worker.start()
                print("in", *(w.pid for w in workers), flush=True)
                while True:
                    time.sleep(0.02)
        """,
    )
    workers = [int(pid) for pid in run.wait_for("in").split()[1:]]
    assert all(is_running(pid) for pid in workers)
    run.send_signal(signal.SIGTERM)
    assert run.finish() == 143, run.transcript()
    wait_gone(workers)


def test_a_signal_while_waiting_for_the_lock_ends_the_waiter_and_leaves_no_record(
    tmp_path, runtime_directory
):
    holder = start(tmp_path)
    waiter = server.run_python(
        tmp_path,
        """
        import logging
        from orchard_infra import FileLock, InfrastructureManager, managed_environment
        logging.basicConfig(level=logging.INFO)
        manager = InfrastructureManager(locker=FileLock(timeout=None))
        with managed_environment("digits", manager=manager):
            pass
        """,
        name="waiter.py",
    )
    wait_until(lambda: "waiting for the lock" in waiter.error_output)
    waiter.send_signal(signal.SIGTERM)
    assert waiter.finish() == 143
    assert len(list((runtime_directory / "runs").iterdir())) == 1
    assert is_running(holder.pid)
    assert os.path.exists(next((runtime_directory / "locks").iterdir()))
