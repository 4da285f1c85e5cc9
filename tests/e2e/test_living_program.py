"""The end of a block is not the end of the program: a release stops nothing that still works."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest

from support import (
    Script,
    is_running,
    require_module,
    run_python,
    wait_gone,
)

BEGIN = """
import atexit, json, logging, multiprocessing, os, signal, socket, subprocess, sys, textwrap
import threading, time
from orchard_infra import EnvironmentConfig, GhostSanitizer, InfrastructureManager
from orchard_infra import managed_environment

options = json.loads(os.environ.get("SANITIZER", "{}"))
manager = InfrastructureManager(sanitizer=GhostSanitizer(**options))

def protected(name="digits"):
    allowed = os.environ.get("KILL") != "no"
    return managed_environment(EnvironmentConfig(name, allow_process_kill=allowed), manager=manager)

"""


def program(tmp_path: Path, source: str, *arguments: str, **environ: str) -> Script:
    return run_python(tmp_path, BEGIN + textwrap.dedent(source), *arguments, env=environ)


def ended_well(script: Script, timeout: float = 60.0) -> bool:
    """It did, and printed nothing that looks like trouble."""
    status = script.finish(timeout)
    assert (status, script.error_output) == (0, ""), script.transcript()
    return True


def pids_of(script: Script, word: str) -> list[int]:
    return [int(pid) for pid in script.wait_for(word).split()[1:]]


def test_a_helper_that_is_told_to_finish_in_an_exit_hook_loses_nothing(tmp_path):
    """As experiment trackers do: they get records over a socket, and upload the last at exit."""
    script = program(
        tmp_path,
        '''
        HELPER = """
        import socket, sys
        server = socket.socket(fileno=int(sys.argv[1]))
        with server.makefile("r") as records, open("uploaded", "w") as uploaded:
            for record in records:
                uploaded.write(record)
        """
        ours, theirs = socket.socketpair()
        with protected():
            helper = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(HELPER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            ours.sendall(b"first\\n")
            def finish():
                ours.sendall(b"last\\n")
                ours.close()
                print("helper ended with", helper.wait(), flush=True)
            atexit.register(finish)
        ''',
    )
    assert ended_well(script)
    assert "helper ended with 0" in script.output
    assert (tmp_path / "uploaded").read_text() == "first\nlast\n"


def test_another_rank_that_has_left_its_own_block_writes_its_predictions(tmp_path):
    script = program(
        tmp_path,
        """
        if os.environ.get("LOCAL_RANK") == "1":
            with protected():
                pass
            print("rank 1 left", flush=True)
            sys.stdin.readline()
            print("predictions of rank 1", flush=True)
        else:
            with protected():
                rank_1 = subprocess.Popen(
                    [sys.executable, __file__],
                    env={**os.environ, "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
                    stdin=subprocess.PIPE,
                )
                sys.stdin.readline()
            rank_1.communicate(b"go on")
            print("rank 1 ended with", rank_1.returncode, flush=True)
        """,
    )
    script.wait_for("rank 1 left")
    script.tell()
    assert ended_well(script)
    assert "predictions of rank 1" in script.output
    assert "rank 1 ended with 0" in script.output


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_pool_that_nobody_closes_does_not_hang_the_exit(tmp_path, method):
    script = program(
        tmp_path,
        """
        if __name__ == "__main__":
            with protected():
                pool = multiprocessing.get_context(sys.argv[1]).Pool(2)
                pool.map(abs, [-1, 1])
            print("after", pool.map(abs, [-2]), flush=True)
        """,
        method,
    )
    assert script.finish() == 0, script.transcript()
    assert "after [2]" in script.output
    assert "Traceback" not in script.error_output


WORKERS = """
    import time
    from concurrent.futures import ProcessPoolExecutor

    def who(_):
        time.sleep(0.05)
        return os.getpid()

    class Executor:
        def __init__(self):
            context = multiprocessing.get_context(sys.argv[2])
            self.executor = ProcessPoolExecutor(2, mp_context=context)
        def pids(self):
            return set(self.executor.map(who, range(6)))

    class Loky:
        def pids(self):
            from joblib import Parallel, delayed
            return set(Parallel(n_jobs=2)(delayed(who)(n) for n in range(6)))

    class Loader:
        def __init__(self):
            import torch
            class Data(torch.utils.data.Dataset):
                def __len__(self): return 8
                def __getitem__(self, index): return os.getpid()
            self.loader = torch.utils.data.DataLoader(
                Data(), num_workers=2, persistent_workers=True
            )
        def pids(self):
            return {int(pid) for batch in self.loader for pid in batch}

    if __name__ == "__main__":
        def children():
            from orchard_infra.system.processes import descendants
            return set(descendants([os.getpid()]))

        def both():
            found = set()
            while len(found) < 2:  # one may have done all the work before the other was up
                found |= workers.pids()
            return found

        with protected():
            workers = globals()[sys.argv[1]]()
            before = both()
            started = children()
        assert started <= children(), "the release stopped some"
        with protected():
            assert both() == before, "the second block has other workers"
        with protected("other"):
            pass
        assert both() == before, "they are others after the blocks"
        assert started <= children(), "a release stopped some"
        print("all the same", flush=True)
"""


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("Executor fork", ""),
        ("Executor spawn", ""),
        ("Executor forkserver", ""),
        ("Loky loky", "joblib"),
        ("Loader fork", "torch"),
    ],
    ids=lambda value: value,
)
def test_workers_are_the_same_in_one_block_in_the_next_and_after(tmp_path, kind, module):
    """A pool broke with a hundred lines of traceback when a release had stopped its workers."""
    if module:
        require_module(module)
    script = program(tmp_path, WORKERS, *kind.split(), PYTHONWARNINGS="ignore")
    assert ended_well(script)
    assert "all the same" in script.output


def test_an_environment_of_one_thread_leaves_the_workers_of_another_alone(tmp_path):
    script = program(
        tmp_path,
        """
        first_entered, both_entered, worker_started, second_ended = (
            threading.Event() for _ in range(4)
        )

        def first():
            with protected("one"):
                first_entered.set()
                both_entered.wait()
                worker = subprocess.Popen(["sleep", "1000"])  # carries the id of "two"
                worker_started.set()
                second_ended.wait()
                print("still runs:", worker.poll() is None, flush=True)
                worker.kill()
                worker.wait()

        thread = threading.Thread(target=first)
        thread.start()
        first_entered.wait()
        with protected("two"):
            both_entered.set()
            worker_started.wait()
        second_ended.set()
        thread.join()
        """,
    )
    assert ended_well(script)
    assert "still runs: True" in script.output


@pytest.mark.parametrize("kill", ["yes", "no"])
def test_children_that_go_on_are_reported_and_no_warning(tmp_path, kill):
    script = program(
        tmp_path,
        """
        logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
        before = subprocess.Popen(["sleep", "1000"])
        with protected() as env:
            inside = subprocess.Popen(["sleep", "1000"])
        left = env.report.leftovers
        print("spared", [f.pid for f in left.spared] == [inside.pid], flush=True)
        print("stopped", left.stopped + left.killed + left.denied, flush=True)
        print("children", before.pid, inside.pid, flush=True)
        """,
        KILL=kill,
    )
    pids = pids_of(script, "children")
    assert ended_well(script)
    assert "spared True" in script.output
    assert "stopped ()" in script.output
    assert all(is_running(pid) for pid in pids)
    told = [line for line in script.output.splitlines() if "(leftover" in line]
    levels = {line.split(":")[0] for line in told}
    assert levels == {"DEBUG"}
    assert "WARNING" not in script.output


STUBBORN = """
    def deaf(ready):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ready.set()
        while True:
            time.sleep(1000)

    def writes_first(ready):
        def write(*_):
            time.sleep(0.5)
            open("written", "w").write("whole")
            os._exit(0)
        signal.signal(signal.SIGTERM, write)
        ready.set()
        while True:
            time.sleep(1000)

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[2])
        ready = context.Event()
        with protected():
            child = context.Process(target=globals()[sys.argv[1]], args=[ready], daemon=True)
            child.start()
            ready.wait()
            print("child", child.pid, flush=True)
        time.sleep(float(sys.argv[3]))
        print("lives", child.is_alive(), flush=True)
"""


@pytest.mark.parametrize("first", ["ours", "multiprocessing"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_daemonic_child_that_ignores_sigterm_does_not_hang_the_exit(tmp_path, method, first):
    """Whichever was imported first has its exit hook called last."""
    begin = "import multiprocessing.util\n" if first == "multiprocessing" else ""
    script = run_python(
        tmp_path,
        begin + BEGIN + textwrap.dedent(STUBBORN),
        *("deaf", method, "0"),
        env={"SANITIZER": '{"grace": 0.3}'},
    )
    [child] = pids_of(script, "child")
    assert script.finish() == 0, script.transcript()
    wait_gone([child])


def test_nor_does_it_hang_the_exit_of_a_program_that_has_not_left_its_block(tmp_path):
    """The exit hook of multiprocessing, which waits for the child, is called before ours."""
    script = program(
        tmp_path,
        """
        def deaf():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("child", os.getpid(), flush=True)
            time.sleep(1000)

        from orchard_infra import FileLock
        env = managed_environment(
            EnvironmentConfig("digits", allow_process_kill=True),
            manager=InfrastructureManager(GhostSanitizer(grace=0.3), FileLock(interval=0.2)),
        ).open()
        multiprocessing.get_context("fork").Process(target=deaf, daemon=True).start()
        sys.stdin.readline()
        """,
    )
    [child] = pids_of(script, "child")
    script.tell()
    assert script.finish() == 0, script.transcript()
    wait_gone([child])


def test_a_pool_of_which_a_worker_ignores_sigterm_does_not_hang_the_exit(tmp_path):
    script = program(
        tmp_path,
        """
        def deaf(_):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("deaf", flush=True)
            time.sleep(1000)

        with protected():
            pool = multiprocessing.get_context("fork").Pool(1)
            pool.map_async(deaf, [1])
            sys.stdin.readline()
        """,
        SANITIZER='{"grace": 0.3}',
    )
    script.wait_for("deaf")
    script.tell()
    assert script.finish() == 0, script.transcript()


def test_a_child_is_killed_at_the_exit_only(tmp_path):
    """While the program lives it may use its workers, for longer than any grace period."""
    script = program(tmp_path, STUBBORN, "deaf", "fork", "1.5", SANITIZER='{"grace": 0.1}')
    assert script.finish() == 0, script.transcript()
    assert "lives True" in script.output


def test_a_daemonic_child_that_finishes_at_sigterm_has_the_time_for_it(tmp_path):
    script = program(tmp_path, STUBBORN, "writes_first", "fork", "0")
    assert script.finish() == 0, script.transcript()
    assert (tmp_path / "written").read_text() == "whole"


def test_without_permission_a_child_that_ignores_sigterm_is_left_to_python(tmp_path):
    script = program(tmp_path, STUBBORN, "deaf", "fork", "0", SANITIZER='{"grace": 0.1}', KILL="no")
    [child] = pids_of(script, "child")
    script.wait_for("lives True")
    time.sleep(1.0)
    assert script.poll() is None  # Python waits for it: nobody has allowed to kill it
    assert is_running(child)


# The sharp version.

STOP = '{"leftovers": "stop", "grace": 2.0}'


def test_on_request_all_that_the_block_started_is_stopped(tmp_path):
    script = program(
        tmp_path,
        """
        before = subprocess.Popen(["sleep", "1000"])
        with protected() as env:
            started = subprocess.Popen(["sleep", "1000"])
            session = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            opted_out = subprocess.Popen(
                ["sleep", "1000"], env={**os.environ, "ORCHARD_INFRA_RUN_ID": ""}
            )
            read, write = os.pipe()
            if not os.fork():
                os.setsid()
                daemon = os.fork()
                if not daemon:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    signal.pause()
                os.write(write, str(daemon).encode())
                os._exit(0)
            daemon = int(os.read(read, 20))
            forked = os.fork()
            if not forked:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.pause()
        stopped = {f.pid for f in env.report.leftovers.stopped}
        print("missed", {started.pid, session.pid, daemon, forked} - stopped, flush=True)
        print("stays", before.pid, opted_out.pid, flush=True)
        print("goes", started.pid, session.pid, daemon, forked, flush=True)
        """,
        SANITIZER=STOP,
        SLURM_JOB_ID="7",  # what is our own goes on shared compute as well
    )
    stays, goes = pids_of(script, "stays"), pids_of(script, "goes")
    assert script.finish() == 0, script.transcript()
    assert "missed set()" in script.output
    assert [pid for pid in goes if is_running(pid)] == []
    assert all(is_running(pid) for pid in stays)


def test_on_request_what_an_older_process_started_during_the_block_is_left_to_it(tmp_path):
    """The worker of an earlier pool that runs a program for its task, say."""
    script = program(
        tmp_path,
        """
        worker = subprocess.Popen(
            ["sh", "-c", "read task; sleep 1000 & echo $!; wait"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with protected() as env:
            started = subprocess.Popen(["sleep", "1000"])
            print("task", file=worker.stdin, flush=True)
            below = int(worker.stdout.readline())
        reasons = {f.pid: f.reason for f in env.report.leftovers.spared}
        print("needed", f"pid {worker.pid}, " in reasons.get(below, ""), flush=True)
        print("stays", worker.pid, below, flush=True)
        print("goes", started.pid, flush=True)
        """,
        SANITIZER=STOP,
    )
    stays, goes = pids_of(script, "stays"), pids_of(script, "goes")
    assert script.finish() == 0, script.transcript()
    assert "needed True" in script.output
    assert [pid for pid in goes if is_running(pid)] == []
    assert all(is_running(pid) for pid in stays)


@pytest.mark.parametrize("then", ["pool.terminate()", "pool.close()"])
def test_a_pool_that_was_stopped_on_request_can_be_ended_and_is_not_made_anew(tmp_path, then):
    """The lock of its queue died with a worker, and `terminate` and `join` waited for ever."""
    script = program(
        tmp_path,
        """
        import psutil
        with protected() as env:
            pool = multiprocessing.get_context("fork").Pool(2)
            pool.map(abs, [-1, 1])
            while any(psutil.Process(p.pid).status() != "sleeping" for p in pool._pool):
                pass  # one has the lock while it waits for a task
            workers = {process.pid for process in pool._pool}
        print(workers == {f.pid for f in env.report.leftovers.stopped}, flush=True)
        try:
            pool.apply(abs, (1,))
        except ValueError as error:
            print(error, flush=True)
        exec(sys.argv[1])
        pool.join()
        """,
        then,
        SANITIZER=STOP,
    )
    assert script.finish() == 0, script.transcript()
    assert script.output.splitlines()[-2:] == ["True", "Pool not running"]


def test_on_request_nothing_is_stopped_if_the_configuration_does_not_allow_it(tmp_path):
    script = program(
        tmp_path,
        """
        with protected() as env:
            started = subprocess.Popen(["sleep", "1000"])
        print("reasons", {f.reason for f in env.report.leftovers.spared}, flush=True)
        print("started", started.pid, flush=True)
        """,
        SANITIZER=STOP,
        KILL="no",
    )
    [started] = pids_of(script, "started")
    script.finish()
    assert "allow_process_kill is False" in script.wait_for("reasons")
    assert is_running(started)


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["server from before", "from inside"])
def test_on_request_workers_of_a_forkserver_are_stopped_and_the_helpers_are_not(tmp_path, before):
    """They show the server's command line. Without its helpers multiprocessing is broken."""
    script = program(
        tmp_path,
        """
        def work(event):
            if event:
                event.set()
                time.sleep(1000)

        if __name__ == "__main__":
            context = multiprocessing.get_context("forkserver")
            def helpers():
                from multiprocessing import forkserver as server, resource_tracker as tracker
                return server._forkserver._forkserver_pid, tracker._resource_tracker._pid
            if sys.argv[1] == "True":
                first = context.Process(target=work, args=[None])
                first.start()
                first.join()
            with protected() as env:
                event = context.Event()
                worker = context.Process(target=work, args=[event])
                worker.start()
                event.wait()
                had = helpers()
            worker.join(30)  # the server has to tell us of its end
            print("worker", worker.pid, worker.is_alive(), flush=True)
            again = context.Process(target=work, args=[None])
            again.start()
            again.join()
            print("helpers", had == helpers(), again.exitcode, flush=True)
        """,
        str(before),
        SANITIZER=STOP,
    )
    assert ended_well(script)
    assert script.wait_for("worker").endswith("False")
    assert script.wait_for("helpers") == "helpers True 0"


def test_on_request_a_child_that_led_a_run_of_its_own_is_left(tmp_path):
    script = program(
        tmp_path,
        """
        if len(sys.argv) > 1:
            with protected("inner"):
                pass
            print("inner left", flush=True)
            time.sleep(1000)
        with protected() as env:
            child = subprocess.Popen([sys.executable, __file__, "inner"])
            sys.stdin.readline()
        print("child", child.pid, flush=True)
        """,
        SANITIZER=STOP,
    )
    script.wait_for("inner left")
    script.tell()
    [child] = pids_of(script, "child")
    script.finish()
    assert is_running(child)


def test_on_request_two_environments_of_one_process_leave_each_other_s_children_alone(tmp_path):
    script = program(
        tmp_path,
        """
        one, two = (EnvironmentConfig(name, allow_process_kill=True) for name in ("one", "two"))
        manager.prepare_environment(one)
        manager.prepare_environment(two)
        forked = os.fork()
        if not forked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pause()
        started = subprocess.Popen(["sleep", "1000"]).pid  # carries the id of "two"
        manager.release_resources(one)
        print("first", forked, started, flush=True)
        input()
        manager.release_resources(two)
        print("second", flush=True)
        """,
        SANITIZER=STOP,
    )
    pids = pids_of(script, "first")
    assert all(is_running(pid) for pid in pids)
    script.tell()
    script.wait_for("second")
    wait_gone(pids)
    assert script.finish() == 0


def test_on_request_a_child_is_stopped_that_is_being_written_down_during_the_look(tmp_path):
    """The background thread may do that between two looks at the registry. Then the run seemed to
    be another one, whose child a fork might be: found by chaos, and made to happen here.
    """
    script = program(
        tmp_path,
        """
        from orchard_infra import RunRegistry

        def runs(registry):
            env._registration.note_members()
            return read_runs(registry)

        with protected() as env:
            read_runs, RunRegistry.runs = RunRegistry.runs, runs
            forked = os.fork()
            if not forked:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.pause()
        print("forked", forked, flush=True)
        """,
        SANITIZER=STOP,
    )
    assert script.finish() == 0, script.transcript()
    assert not is_running(pids_of(script, "forked")[0])


@pytest.mark.parametrize("seen", ["alive", "defunct"])
def test_on_request_a_double_fork_that_happens_during_the_look_is_found(tmp_path, seen):
    """It was forked after the list of processes was made, and its parent has ended by the time
    that it is looked at: found by chaos, and made to happen here."""
    script = program(
        tmp_path,
        """
        from orchard_infra.system import processes

        def stale_list():
            processes.parents = parents
            found = parents()
            os.write(go[1], b"!")
            os.waitid(os.P_PID, between, os.WEXITED | os.WNOWAIT)
            if sys.argv[1] == "defunct":
                del found[between]
            return found

        go = os.pipe()
        parents = processes.parents
        with protected():
            between = os.fork()
            if not between:
                os.read(go[0], 1)
                pid = os.fork()
                if pid:
                    print("daemon", pid, flush=True)
                    os._exit(0)
                while True:
                    time.sleep(1000)
            processes.parents = stale_list
        """,
        seen,
        SANITIZER=STOP,
    )
    assert script.finish() == 0, script.transcript()
    assert not is_running(pids_of(script, "daemon")[0])
