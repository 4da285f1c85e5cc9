"""A LocalCluster of dask, made in one block and used in the next and after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from endings import ENDINGS, STATUS, all_gone, end, is_released, runs_again, start
from support import run_python

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "frameworks" / "dask_cluster.py"


@pytest.fixture(autouse=True)
def dask_is_installed(needs):
    needs("distributed")


CLUSTER = """
    def square(number):
        return number * number

    if __name__ == "__main__":
        from distributed import Client, LocalCluster

        def use():
            assert client.gather(client.map(square, [1, next(numbers)]))[0] == 1

        numbers = iter(range(2, 10))
        with protected():
            cluster = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)
            client = Client(cluster)
            use()
        with protected("another"):
            use()
            wait_for_the_end()
        use()
        print("went on")
"""


@pytest.mark.parametrize(
    ("kill", "ending"), [*(("yes", ending) for ending in ENDINGS), ("no", "normal end")]
)
def test_however_the_program_ends_its_cluster_ends_with_it(
    tmp_path, runtime_directory, kill, ending
):
    script = start(tmp_path, CLUSTER, KILL=kill)
    left = end(script, ending)
    assert script.returncode == STATUS[ending], script.transcript()
    assert ("went on" in script.output) == (ending == "normal end")
    if ending == "normal end":
        # dask warns on its own account of results that it still had when its cluster was closed.
        assert "Traceback" not in script.error_output
    assert is_released(script, runtime_directory, ending)
    if ending == "kill -9":
        assert runs_again(start(tmp_path, CLUSTER), runtime_directory)
    assert all_gone(left)


def test_the_example_uses_its_cluster_in_two_environments_and_after(tmp_path):
    script = run_python(tmp_path, EXAMPLE)
    assert script.finish() == 0, script.transcript()
    assert script.output.splitlines() == [
        "step 0: [0, 1, 4, 9]",
        "step 1: [0, 1, 4, 9]",
        "after it: 25",
    ]
    # On a busy machine dask tells that its event loop was held up.
    told = [line for line in script.error_output.splitlines() if " - distributed." not in line]
    assert not told
