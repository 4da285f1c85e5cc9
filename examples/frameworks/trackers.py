"""Experiment trackers, protected: every record is in the file, however the run ends.

    WANDB_MODE=offline python examples/frameworks/trackers.py

The environment unwinds the run by an exception when it is asked to stop, so that ``finally`` and
exit hooks are reached: TensorBoard's writer is closed, and wandb's service is told the end. The
service is another process. A release leaves it alone, and so does the next run.
"""

import argparse

import wandb
from tensorboard.summary import Writer

from orchard_infra import managed_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    with managed_environment("trackers"):
        run = wandb.init(project="digits", settings=wandb.Settings(silent=True))
        writer = Writer("tensorboard")
        try:
            for step in range(options.steps):
                loss = 1.0 / (step + 1)
                run.log({"loss": loss})
                writer.add_scalar("loss", loss, step)
        finally:
            writer.add_scalar("steps", options.steps, 0)
            writer.close()
    print(f"{options.steps} steps are recorded")  # wandb's exit record follows at the exit


if __name__ == "__main__":
    main()
