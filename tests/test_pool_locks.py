"""A pool whose idle worker was ended by a signal does not hang the program."""

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
    assert script.finish(30) == status, script.transcript()


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
