"""multiprocessing.Pool, ProcessPoolExecutor and loky, in one block, the next one and after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from endings import ENDINGS, STATUS, all_gone, end, is_released, runs_again, start
from support import run_python

EXAMPLE = Path(__file__).parents[2] / "examples" / "frameworks" / "pools.py"


@pytest.fixture(autouse=True)
def joblib_is_installed(needs):
    needs("joblib")


# Nobody closes them: the end of the program is theirs, too.
POOLS = """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from joblib import Parallel, delayed

    def square(number):
        return number * number

    def use():
        assert pool.map(square, [1, 2]) == [1, 4]
        assert list(executor.map(square, [1, 2])) == [1, 4]
        assert Parallel(n_jobs=2)(delayed(square)(n) for n in [1, 2]) == [1, 4]

    if __name__ == "__main__":
        with protected():
            pool, executor = multiprocessing.Pool(2), ProcessPoolExecutor(2)
            use()
        with protected("another"):
            use()
            wait_for_the_end()
        use()
        print("went on")
"""


@pytest.mark.parametrize(
    ("kill", "ending"),
    [
        *(("yes", ending) for ending in ENDINGS),
        ("no", "normal end"),
        ("no", "SIGTERM to the group"),
    ],
)
def test_however_the_program_ends_no_pool_hangs_it(tmp_path, runtime_directory, kill, ending):
    script = start(tmp_path, POOLS, KILL=kill)
    left = end(script, ending)
    assert script.returncode == STATUS[ending], script.transcript()
    assert ("went on" in script.output) == (ending == "normal end")
    if ending == "normal end":
        assert script.error_output == ""
    elif not ending.startswith("Ctrl-C"):  # interrupted workers print tracebacks of their own
        # A pool tries to replace its workers during the exit, too, and Python 3.12 refuses that.
        refused = script.error_output.count("can't fork at interpreter shutdown")
        assert script.error_output.count("Traceback") == (ending == "exception") + refused
    assert is_released(script, runtime_directory, ending)
    if ending == "kill -9":
        # The forked ones hold the lock. The next start of the program stops them.
        assert left
        assert runs_again(start(tmp_path, POOLS), runtime_directory)
    assert all_gone(left)


SHIELDED = """
    import multiprocessing
    from orchard_infra import shield_worker

    if __name__ == "__main__":
        with managed_environment("x", manager=InfrastructureManager(stopper=SignalStop("flag"))):
            env = current_environments()[-1]
            with multiprocessing.Pool(2, initializer=shield_worker) as pool:
                workers = [process.pid for process in pool._pool]
                pool.map(abs, [-1])
                print("ready", flush=True)
                while not env.stop_requested:
                    time.sleep(0.01)
                assert pool.map(abs, [-1, 2]) == [1, 2]
                assert [process.pid for process in pool._pool] == workers
        print("saved")
"""


def test_a_shielded_pool_finishes_the_step_after_a_signal_to_the_group(tmp_path):
    script = start(tmp_path, SHIELDED)
    assert all_gone(end(script, "SIGTERM to the group"))
    assert script.returncode == 0, script.transcript()
    assert script.output.split() == ["ready", "saved"]


def test_the_example_uses_its_pools_in_both_blocks_and_after(tmp_path):
    script = run_python(tmp_path, EXAMPLE)
    assert script.finish() == 0, script.transcript()
    assert script.output.count("[0, 1, 4, 9]") == 7
    assert script.error_output == ""
