"""Ray: a local cluster that is started in one block and used in the next and after it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from endings import ENDINGS, STATUS, all_gone, end, is_released, runs_again, start
from support import run_python

EXAMPLE = Path(__file__).parents[2] / "examples" / "frameworks" / "ray_tasks.py"

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def ray_is_installed(needs, monkeypatch):
    needs("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Sockets have short names only, and a directory of the test is too deep.
    monkeypatch.delenv("TMPDIR")


RAY = """
    import ray

    def use():
        assert ray.get(square.remote(3)) == 9
        assert ray.get(counter.add.remote(1)) == next(counts)

    @ray.remote
    def square(number):
        return number * number

    @ray.remote(num_cpus=0)
    class Counter:
        count = 0
        def add(self, number):
            self.count += number
            return self.count

    if __name__ == "__main__":
        counts = iter(range(1, 10))
        with protected():
            ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
            counter = Counter.remote()
            use()
        with protected("another"):
            use()
            wait_for_the_end()
        use()
        print("went on")
"""

# Ray puts a handler of its own over ours. After a SIGTERM it may abort while Python exits, also
# without us; with its servers gone even before the release.
RAYS_OWN = {
    "Ctrl-C": {1, -signal.SIGINT},
    "SIGTERM": {int(signal.SIGTERM), -signal.SIGABRT},
    "SIGTERM to the group": {int(signal.SIGTERM), -signal.SIGABRT},
}


@pytest.mark.parametrize(
    ("kill", "ending"), [*(("yes", ending) for ending in ENDINGS), ("no", "normal end")]
)
def test_however_the_program_ends_its_cluster_ends_and_the_next_can_begin(
    tmp_path, runtime_directory, kill, ending
):
    script = start(tmp_path, RAY, KILL=kill)
    left = end(script, ending)
    assert script.returncode in RAYS_OWN.get(ending, {STATUS[ending]}), script.transcript()
    assert ("went on" in script.output) == (ending == "normal end")
    if ending == "normal end":
        assert "Traceback" not in script.error_output
    if ending != "SIGTERM to the group":
        assert is_released(script, runtime_directory, ending)
    if ending == "kill -9":
        assert runs_again(start(tmp_path, RAY), runtime_directory)
    assert all_gone(left)


TUNE = """
    import ray
    from ray import tune

    def train(config):
        own = EnvironmentConfig("digits", lock_file_path="locks/digits.lock")
        with managed_environment(own) as env:
            tune.report({"lock": str(env.lock_path), "directory": os.getcwd()})

    if __name__ == "__main__":
        ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
        run_config = tune.RunConfig(storage_path=os.getcwd() + "/r")
        results = tune.Tuner(train, run_config=run_config).fit()
        print("lock", results[0].metrics["lock"], "in", results[0].metrics["directory"])
"""


def test_a_relative_lock_path_of_a_trial_is_meant_from_where_the_program_was_started(tmp_path):
    script = start(tmp_path, TUNE)
    assert script.finish() == 0, script.transcript()
    _, lock, _, directory = script.wait_for("lock /").split()
    assert lock == str(tmp_path / "locks" / "digits.lock")
    assert directory != str(tmp_path)


def test_the_example_uses_tasks_and_an_actor_in_two_environments_and_after(tmp_path):
    script = run_python(tmp_path, EXAMPLE)
    assert script.finish() == 0, script.transcript()
    assert script.output.splitlines() == ["step 0: 4 1", "step 1: 9 2", "after it: 25 3"]
    assert "Traceback" not in script.error_output
