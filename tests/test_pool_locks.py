"""A pool whose workers were ended by a signal does not hang the program, whatever they did."""

from __future__ import annotations

import signal

import pytest

from support import run_python

PROGRAM = """
    import multiprocessing, os, signal, sys
    from orchard_infra import EnvironmentConfig, managed_environment

    method, how, allowed = sys.argv[1:]

    def start():
        pool = multiprocessing.get_context(method).Pool(2)
        assert pool.map(abs, [-1, 1]) == [1, 1]
        workers = [process.pid for process in pool._pool]
        while not waits_for_a_task(workers):
            pass
        for pid in workers:
            os.kill(pid, signal.SIGTERM)  # as a signal to the whole group does
        for pid in workers:
            while os.path.exists(f"/proc/{pid}") and state(pid) != "Z":
                pass
        return pool

    def waits_for_a_task(workers):
        return all(state(pid) == "S" for pid in workers)  # one with the lock, one for it

    def state(pid):
        try:
            return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
        except OSError:
            return "Z"

    if __name__ == "__main__":
        with managed_environment(EnvironmentConfig("x", allow_process_kill=allowed == "allowed")):
            if how == "with":
                with start():
                    signal.raise_signal(signal.SIGTERM)
            elif how == "interrupted":
                with start():
                    signal.raise_signal(signal.SIGINT)  # the handler is Python's own
            else:
                pool = start()
"""


@pytest.mark.parametrize(
    ("method", "how", "allowed", "status"),
    [
        ("fork", "with", "forbidden", 128 + signal.SIGTERM),
        ("spawn", "with", "allowed", 128 + signal.SIGTERM),
        ("fork", "interrupted", "forbidden", -signal.SIGINT),
        ("fork", "unclosed", "forbidden", 0),
        ("fork", "unclosed", "allowed", 0),
    ],
    ids=lambda value: str(value),
)
def test_a_pool_whose_lock_has_died_with_a_worker_does_not_hang_the_program(
    tmp_path, method, how, allowed, status
):
    script = run_python(tmp_path, PROGRAM, method, how, allowed)
    assert script.finish() == status, script.transcript()


def test_a_pool_that_may_replace_no_worker_during_the_exit_does_not_hang_the_program(tmp_path):
    script = run_python(
        tmp_path,
        """
        import atexit, multiprocessing, os, signal, sys
        from orchard_infra import managed_environment

        def refuse():
            raise RuntimeError("can't fork at interpreter shutdown")

        def end_the_workers():  # as a signal to the whole group does that comes late
            if sys.version_info[:2] != (3, 12):  # that one refuses by itself
                os.fork = refuse
            for worker in tuple(pool._pool):
                os.kill(worker.pid, signal.SIGKILL)
            pool._worker_handler.join()

        with managed_environment("x"):
            pool = multiprocessing.get_context("fork").Pool(2)
            pool.map(abs, [-1])
        atexit.register(end_the_workers)
        """,
    )
    assert script.finish() == 0, script.transcript()
    assert "can't fork at interpreter shutdown" in script.error_output


def test_an_idle_pool_that_still_has_its_lock_is_ended_by_python_alone(tmp_path):
    script = run_python(
        tmp_path,
        """
        import logging, multiprocessing, sys
        from orchard_infra import managed_environment
        logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
        with managed_environment("x"):
            pool = multiprocessing.get_context("fork").Pool(2)
            pool.map(abs, [-1])
        """,
    )
    assert script.finish() == 0, script.transcript()
    assert "has died" not in script.output
    assert script.error_output == ""


BUSY = """
    import fcntl, multiprocessing, os, signal, struct, sys, termios, threading
    from orchard_infra import managed_environment

    LARGE = b"x" * 2**27

    def give(count):
        return LARGE[:count]

    def with_a_large_task(pool):
        pool.apply_async(len, (LARGE,))
        while True:
            for worker in pool._pool:
                if received(worker.pid) > 2**20:
                    return worker.pid

    def received(pid):
        return int(open(f"/proc/{pid}/io").readline().split()[1])

    def with_a_large_result(pool):
        go_on = threading.Event()
        pool.apply_async(give, (1,), callback=lambda result: go_on.wait())  # nobody reads results
        pool.apply_async(give, (2**27,))
        while waiting(pool._outqueue._reader) < 2**15:
            pass
        return go_on

    def waiting(reader):
        return struct.unpack("i", fcntl.ioctl(reader.fileno(), termios.FIONREAD, b"    "))[0]

    def kill(pool):
        for worker in tuple(pool._pool):  # it makes new ones meanwhile
            os.kill(worker.pid, signal.SIGKILL)
"""


def test_workers_that_die_in_the_middle_of_a_task_do_not_hang_the_program(tmp_path):
    script = run_python(
        tmp_path,
        BUSY
        + """
    with managed_environment("x"), multiprocessing.Pool(2) as pool:
        os.kill(with_a_large_task(pool), signal.SIGSTOP)  # it stays in the middle of it
        kill(pool)
        signal.raise_signal(signal.SIGTERM)
    """,
    )
    assert script.finish() == 128 + signal.SIGTERM, script.transcript()


def test_workers_that_die_in_the_middle_of_a_result_do_not_hang_the_program(tmp_path):
    script = run_python(
        tmp_path,
        BUSY
        + """
    with managed_environment("x"), multiprocessing.Pool(2) as pool:
        go_on = with_a_large_result(pool)
        kill(pool)
        go_on.set()
        signal.raise_signal(signal.SIGTERM)
    """,
    )
    assert script.finish() == 128 + signal.SIGTERM, script.transcript()


def test_the_lock_of_a_worker_that_lives_is_not_taken_away_from_it(tmp_path):
    """With two readers in one queue each gets a part of a message."""
    script = run_python(
        tmp_path,
        BUSY
        + """
    def go_on_when_asked_to_end(pid):
        while not asked_to_end(pid):
            pass
        print(pool._inqueue._rlock.acquire(False))
        os.kill(pid, signal.SIGCONT)

    def asked_to_end(pid):
        lines = dict(line.split(":") for line in open(f"/proc/{pid}/status"))
        return int(lines["ShdPnd"], 16) >> signal.SIGTERM - 1 & 1

    with managed_environment("x"), multiprocessing.Pool(2) as pool:
        pid = with_a_large_task(pool)
        os.kill(pid, signal.SIGSTOP)  # it is slow
        threading.Thread(target=go_on_when_asked_to_end, args=(pid,)).start()
        signal.raise_signal(signal.SIGTERM)
    """,
    )
    assert script.finish() == 128 + signal.SIGTERM, script.transcript()
    assert script.output == "False\n"


def test_a_pool_of_threads_is_left_alone(tmp_path):
    script = run_python(
        tmp_path,
        """
        import threading
        from multiprocessing.pool import ThreadPool
        from orchard_infra import managed_environment
        from orchard_infra.system.pool_locks import StuckPool

        def look():
            looks = StuckPool()
            while not looks.look():
                pass
            print(looks.look())
            go_on.set()

        def wait(result):
            threading.Thread(target=look).start()
            is_there.set()
            go_on.wait()

        is_there, go_on = threading.Event(), threading.Event()
        with managed_environment("x"):
            pool = ThreadPool(1)
            pool.apply_async(int, callback=wait)
            is_there.wait()
            pool.terminate()
        """,
    )
    assert script.finish() == 0, script.transcript()
    assert script.output == "True\n"
    assert script.error_output == ""
