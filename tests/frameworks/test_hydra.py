"""Hydra: the decorator on both sides of `@hydra.main`, sweeps, and jobs with a directory each."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from endings import ENDINGS, STATUS, all_gone, end, is_released, runs_again, start
from support import run_python

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "frameworks" / "hydra_train.py"
WITH_JOBLIB = ("-m", "+a=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@pytest.fixture(autouse=True)
def hydra_is_installed(needs):
    needs("hydra")


# "beneath": each job has an environment; "above": the program, all its jobs together, has one.
TRAIN = """
    import hydra

    def train(cfg):
        print("directory", os.getcwd(), flush=True)
        print("locked:", current_environments()[-1].lock_path, flush=True)
        if "quick" not in cfg:
            wait_for_the_end()

    main = hydra.main(version_base="1.3", config_path=None)
    if os.environ["SIDE"] == "beneath":
        train = main(protected()(train))
    else:
        train = protected()(main(train))
    if __name__ == "__main__":
        train()
        print("went on")
"""


@pytest.mark.parametrize(
    ("side", "ending"),
    [
        *(("beneath", ending) for ending in ENDINGS),
        *(("above", ending) for ending in ("normal end", "exception", "Ctrl-C", "SIGTERM")),
    ],
)
def test_however_a_job_ends_the_next_one_can_begin(tmp_path, runtime_directory, side, ending):
    script = start(tmp_path, TRAIN, SIDE=side)
    assert all_gone(end(script, ending))
    assert script.returncode == STATUS[ending], script.transcript()
    assert ("went on" in script.output) == (ending == "normal end")
    assert is_released(script, runtime_directory, ending)
    if ending in ("exception", "kill -9"):
        assert runs_again(start(tmp_path, TRAIN, SIDE=side), runtime_directory)


@pytest.mark.parametrize("ending", ["Ctrl-C", "SIGTERM"])
def test_a_stop_ends_the_sweep_and_not_only_its_job(tmp_path, ending):
    script = start(tmp_path, TRAIN, "-m", "+a=1,2", SIDE="beneath")
    end(script, ending)
    assert script.returncode == STATUS[ending], script.transcript()
    assert script.output.count("directory") == 1


RELATIVE = """
    import hydra

    def cfg():
        hardware = SimpleNamespace(allow_process_kill=False, lock_file_path="locks/digits.lock")
        return SimpleNamespace(hardware=hardware)

    @hydra.main(version_base="1.3", config_path=None)
    def train(job):
        own = EnvironmentConfig("digits", lock_file_path="locks/digits.lock")
        print("lock of the package's own", own.hardware.lock_file_path, flush=True)
        with managed_environment(cfg()) as env:
            print("lock", env.lock_path, "in", os.getcwd(), flush=True)
            if "wait" in job:
                input()
        InfrastructureManager().prepare_environment(cfg())
        InfrastructureManager().release_resources(cfg())
        print("released by hand", not env.lock_path.exists())

    train()
"""


def test_a_relative_lock_path_is_one_file_for_all_jobs_of_the_project(tmp_path):
    """Each job has a directory of its own, and a lock in there kept nobody out."""
    lock = tmp_path / "locks" / "digits.lock"
    first = start(tmp_path, RELATIVE, "hydra.job.chdir=True", "+wait=1")
    line = first.wait_for("in /")
    assert line.startswith(f"lock {lock} in {tmp_path}/outputs/")
    first.wait_for(f"lock of the package's own {lock}")

    second = start(tmp_path, RELATIVE, "hydra.job.chdir=True")
    assert second.finish() == 1
    assert f"held by pid {first.pid}" in second.error_output

    first.tell()
    assert first.finish() == 0, first.transcript()
    assert "released by hand True" in first.output


def test_a_relative_runtime_directory_is_one_as_well(tmp_path):
    script = start(
        tmp_path, TRAIN, "hydra.job.chdir=True", SIDE="beneath", ORCHARD_INFRA_DIR="runtime"
    )
    assert script.wait_for("locked:") == f"locked: {tmp_path}/runtime/locks/digits.lock"


def test_jobs_of_the_joblib_launcher_run_side_by_side_in_the_environment_of_the_sweep(
    tmp_path, needs
):
    needs("hydra_plugins.hydra_joblib_launcher")
    script = run_python(tmp_path, EXAMPLE, *WITH_JOBLIB[:1], "lr=0.1,0.2", *WITH_JOBLIB[2:])
    assert script.finish() == 0, script.transcript()
    jobs = re.findall(r"job (\d) .* lock (\S+)", script.output)
    assert sorted(jobs) == [
        ("0", str(tmp_path / "locks" / "job-0.lock")),
        ("1", str(tmp_path / "locks" / "job-1.lock")),
    ]


JOBLIB = """
    import hydra

    @hydra.main(version_base="1.3", config_path=None)
    def train(cfg):
        with protected(f"job-{cfg.a}"):
            print("ready", flush=True)
            while True:
                time.sleep(0.05)

    if os.environ["SIDE"] == "both":
        train = protected("sweep")(train)
    if __name__ == "__main__":
        train()
"""


@pytest.mark.parametrize(
    ("side", "ending", "status"),
    [
        ("both", "Ctrl-C", -signal.SIGINT),
        ("both", "SIGTERM", 128 + signal.SIGTERM),
        ("both", "SIGTERM to the group", 128 + signal.SIGTERM),
        # Hydra's own process has no handler: it dies, and its workers are left.
        ("beneath", "SIGTERM", -signal.SIGTERM),
        ("both", "kill -9", -signal.SIGKILL),
    ],
)
def test_a_stop_of_a_sweep_by_joblib_reaches_its_workers_if_the_program_has_an_environment(
    tmp_path, runtime_directory, needs, side, ending, status
):
    needs("hydra_plugins.hydra_joblib_launcher")
    script = start(tmp_path, JOBLIB, *WITH_JOBLIB, SIDE=side)
    workers = end(script, ending)
    assert script.returncode == status, script.transcript()
    if side == "both" and ending != "kill -9":
        assert all_gone(workers)
        locks = {path.stem for path in runtime_directory.glob("locks/*.lock")}
        assert "sweep" not in locks
        # Only the program got it, and joblib kills the workers with SIGKILL.
        assert locks or ending != "SIGTERM", "the jobs were released: say so on the page"
    else:
        assert workers, "they ended with the program: say so on the page"


def test_the_example_trains_and_a_second_start_is_refused(tmp_path):
    first = run_python(tmp_path, EXAMPLE, "steps=100000", "hydra.job.chdir=True")
    first.wait_for("job 0")
    second = run_python(tmp_path, EXAMPLE, "steps=1")
    assert second.finish() == 1
    assert f"held by pid {first.pid}" in second.error_output
    first.terminate()
    assert first.finish() == 128 + signal.SIGTERM, first.transcript()
    assert "saved" in first.output
