"""Optuna: studies around an environment and inside of one, threads, and several processes."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from endings import ENDINGS, STATUS, end, is_released, runs_again, start
from support import run_python

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "frameworks" / "optuna_study.py"


@pytest.fixture(autouse=True)
def optuna_is_installed(needs):
    needs("optuna")


STUDY = """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend("study.journal")),
        study_name="digits",
        load_if_exists=True,
    )
    begun = len(study.trials)
    print("found", *[trial.state.name for trial in study.trials], flush=True)

    def objective(trial):
        if trial.number - begun == 1:
            wait_for_the_end()
        return trial.suggest_float("lr", 0, 1)

    if sys.argv[1] == "trial":
        study.optimize(protected()(objective), n_trials=2)
    else:
        with protected():
            study.optimize(objective, n_trials=2)
    print("went on")
"""

# What the journal says of the trial that was under way.
LEFT = {
    "normal end": "COMPLETE",
    "exception": "FAIL",
    "Ctrl-C": "FAIL",
    "SIGTERM": "RUNNING",
    "SIGTERM to the group": "RUNNING",
    "kill -9": "RUNNING",
}


@pytest.mark.parametrize(
    ("around", "ending"),
    [
        *(("trial", ending) for ending in ENDINGS),
        ("study", "exception"),
        ("study", "SIGTERM"),
        ("study", "kill -9"),
    ],
)
def test_however_a_study_ends_the_next_start_goes_on_with_it(
    tmp_path, runtime_directory, around, ending
):
    script = start(tmp_path, STUDY, around)
    end(script, ending)
    assert script.returncode == STATUS[ending], script.transcript()
    assert ("went on" in script.output) == (ending == "normal end")
    assert is_released(script, runtime_directory, ending)

    again = start(tmp_path, STUDY, around)
    assert again.wait_for("found") == f"found COMPLETE {LEFT[ending]}"
    assert runs_again(again, runtime_directory)


IN_THREADS = """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()

    @managed_environment("digits-trial", timeout=None)
    def objective(trial):
        if trial.number == 3:
            print("ready", flush=True)
        time.sleep(0.01)
        return trial.suggest_float("lr", 0, 1)

    def stop(study, trial):
        if env.stop_requested:
            study.stop()

    if sys.argv[1] == "trial":
        study.optimize(objective, n_trials=10**6, n_jobs=2)
    with managed_environment(
        "digits", manager=InfrastructureManager(stopper=SignalStop("flag"))
    ) as env:
        study.optimize(objective, n_trials=10**6, n_jobs=2, callbacks=[stop])
    print(*{trial.state.name for trial in study.trials})
"""


@pytest.mark.parametrize(("around", "status"), [("study", 0), ("trial", -signal.SIGTERM)])
def test_a_sigterm_lets_threads_finish_their_trials_if_the_study_has_an_environment(
    tmp_path, runtime_directory, around, status
):
    script = start(tmp_path, IN_THREADS, around)
    end(script, "SIGTERM")
    assert script.returncode == status, script.transcript()
    if around == "study":
        script.wait_for("COMPLETE")
        assert is_released(script, runtime_directory, "SIGTERM")


THREADS = """
    import threading
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    inside, both = set(), threading.Barrier(2)

    def objective(trial):
        if trial.number < 2:
            both.wait()  # both threads have come, and one will have to wait
        return train(trial)

    @managed_environment("digits", timeout=float(sys.argv[1]) if sys.argv[1] != "None" else None)
    def train(trial):
        inside.add(trial.number)
        most.append(len(inside))
        if refused.wait(0.05 if sys.argv[1] != "0" else 30):
            pass
        inside.remove(trial.number)
        return trial.suggest_float("lr", 0, 1)

    most, refused = [], threading.Event()
    study = optuna.create_study()

    def note(objective):
        def noted(trial):
            try:
                return objective(trial)
            except RuntimeError as error:
                print(type(error).__name__, flush=True)
                refused.set()
                raise
        return noted

    with contextlib.suppress(RuntimeError):
        study.optimize(note(objective), n_trials=6, n_jobs=2)
    print("at most", max(most), sorted(trial.state.name for trial in study.trials))
"""


def test_the_second_thread_waits_for_the_first_with_a_timeout(tmp_path):
    script = start(tmp_path, THREADS, "None")
    assert script.finish() == 0, script.transcript()
    assert script.output.strip() == f"at most 1 {['COMPLETE'] * 6}"


def test_the_second_thread_is_refused_without_a_timeout(tmp_path):
    script = start(tmp_path, THREADS, "0")
    assert script.finish() == 0, script.transcript()
    assert "EnvironmentLockedError" in script.output
    assert "'FAIL'" in script.wait_for("at most 1")


MEMORY = """
    import gc, weakref
    import optuna
    import torch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kept = []

    @protected()
    def train(kind):
        model = torch.zeros(1000)
        kept.append(weakref.ref(model))
        if kind == "torch":
            raise torch.cuda.OutOfMemoryError("simulated")
        if kind == "python":
            raise MemoryError("simulated")
        assert [ref() for ref in kept[:-1]] == [None] * (len(kept) - 1), "an old one is alive"
        return 0.0

    def objective(trial):
        gc.disable()  # the memory must be back at once
        try:
            return train(("torch", "python", "fits")[trial.number])
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            caught.append(error)  # whoever keeps it, as a logger may, keeps no tensor
            raise optuna.TrialPruned() from error

    caught = []
    study = optuna.create_study()
    study.optimize(objective, n_trials=3)
    print(*[trial.state.name for trial in study.trials])
"""


def test_a_trial_without_memory_is_pruned_and_the_next_one_has_the_memory(tmp_path, needs):
    """The errors are raised by hand: the machine of the tests has memory to spare."""
    needs("torch")
    script = start(tmp_path, MEMORY)
    assert script.finish() == 0, script.transcript()
    assert script.output.split() == ["PRUNED", "PRUNED", "COMPLETE"]


def test_several_processes_of_the_example_work_at_one_study(tmp_path):
    scripts = [run_python(tmp_path, EXAMPLE, "--trials", "6", "--threads", "2") for _ in range(2)]
    for script in scripts:
        assert script.finish() == 0, script.transcript()
    last = max(int(re.findall(r"pruned of (\d+)", script.output)[0]) for script in scripts)
    assert last == 12
