"""A job of submitit, protected: a timeout saves a checkpoint, and the requeued job goes on there.

python examples/frameworks/submitit_train.py                    # here, in a process of its own
python examples/frameworks/submitit_train.py --cluster slurm --partition gpu
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import submitit
from submitit.helpers import DelayedSubmission

from orchard_infra import InfrastructureManager, SignalStop, managed_environment
from orchard_infra.integrations.submitit import stop_before_requeue


class Training:
    """Counts steps. submitit calls it in the job, and ``checkpoint`` before it requeues the job."""

    def __init__(self, checkpoint: Path, step_time: float) -> None:
        self.file = checkpoint.absolute()
        self.step_time = step_time

    def __call__(self, steps: int) -> str:
        manager = InfrastructureManager(stopper=SignalStop("flag"))  # for a Ctrl-C, too
        # A job that was requeued waits for the one before it, should that still end elsewhere.
        managed = managed_environment("submitit", manager=manager, timeout=60)
        with stop_before_requeue(managed) as env:
            first = step = self.load()
            print(f"pid {os.getpid()} goes on from step {step}", flush=True)
            while step < steps and not env.stop_requested:
                time.sleep(self.step_time)  # one step of the training
                step += 1
            self.save(step)
            print(f"saved after step {step}", flush=True)
        return f"steps {first} to {step}"

    def checkpoint(self, steps: int) -> DelayedSubmission:
        return DelayedSubmission(self, steps)

    def load(self) -> int:
        return int(json.loads(self.file.read_text())["step"]) if self.file.exists() else 0

    def save(self, step: int) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        half_written = self.file.with_suffix(".tmp")
        half_written.write_text(json.dumps({"step": step}))
        os.replace(half_written, self.file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", default="local", help="local or slurm")
    parser.add_argument("--partition", help="of Slurm")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--step-time", type=float, default=0.01, metavar="SECONDS")
    parser.add_argument("--timeout", type=int, default=60, metavar="MINUTES")
    parser.add_argument("--warning", type=int, default=120, metavar="SECONDS", help="before it")
    options = parser.parse_args()
    folder = Path("runs", "submitit", "%j")
    if options.cluster == "slurm":
        executor: submitit.Executor = submitit.SlurmExecutor(folder)
        executor.update_parameters(
            time=options.timeout, signal_delay_s=options.warning, partition=options.partition
        )
    else:
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=options.timeout, signal_delay_s=options.warning)
    training = Training(Path("runs", "submitit", "checkpoint.json"), options.step_time)
    job = executor.submit(training, options.steps)
    print(f"job {job.job_id}", flush=True)
    print(job.result())
    return 0


if __name__ == "__main__":
    sys.exit(main())
