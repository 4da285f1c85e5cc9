"""Optuna, protected: each trial has the device to itself, and gives its memory back.

    python examples/frameworks/optuna_study.py --trials 20 --threads 2

Start it in several terminals: they work at one study, in ``study.journal``, and their trials wait
for each other. A trial that runs out of memory is pruned, and the next one has the memory again.
"""

import argparse

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from orchard_infra import managed_environment


@managed_environment("optuna-trial", timeout=None)  # a second thread or process waits its turn
def train(width: int) -> float:
    weights = bytearray(width << 10)
    # Simulated: where memory really ends, torch raises torch.cuda.OutOfMemoryError.
    if width > 48:
        raise MemoryError(f"simulated: no memory for a width of {width}")
    return abs(len(weights) / 1024 - 32)


def objective(trial: optuna.Trial) -> float:
    width = trial.suggest_int("width", 1, 64)
    try:
        return train(width)
    except MemoryError as error:
        # Outside of the environment: the memory is back already.
        raise optuna.TrialPruned(str(error)) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend("study.journal")),
        study_name="width",
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    study.optimize(objective, n_trials=options.trials, n_jobs=options.threads)
    states = [trial.state.name for trial in study.trials]
    print(f"{states.count('COMPLETE')} complete, {states.count('PRUNED')} pruned of {len(states)}")
    print("best width:", study.best_params["width"])


if __name__ == "__main__":
    main()
