"""Train a small network on real images, protected from start to end.

    python examples/train_digits.py

A convolutional network learns the 1,797 handwritten digits that come with scikit-learn. Start it
a second time meanwhile: the second one says who holds the project and exits with 75. Stop it
(Ctrl-C, `kill PID`): it finishes its step, writes a checkpoint, and the next start resumes there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from orchard_infra import (
    Environment,
    EnvironmentConfig,
    EnvironmentLockedError,
    InfrastructureManager,
    SignalStop,
    managed_environment,
    shield_worker,
)

if TYPE_CHECKING:
    import torch

# torch takes seconds to load. It is imported inside the environment, so that a second start is
# refused at once.

SEED = 20
BATCH = 64


def main() -> int:
    options = parse_arguments()
    config = EnvironmentConfig(
        options.project,
        allow_process_kill=options.allow_process_kill,
        lock_file_path=options.lock_file,
    )
    manager = InfrastructureManager(
        # A request to stop sets env.stop_requested. A second one, or a loop that does not look at
        # it for a minute, ends the run with an exception.
        stopper=SignalStop(
            mode="flag", deadline=60.0, signals=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ),
    )
    output = options.output or Path("runs") / options.project
    try:
        with managed_environment(config, manager=manager, timeout=options.wait) as env:
            training = Training(output, options.epochs, options.workers)
            training.run(env)
    except EnvironmentLockedError:  # the log has said who holds it, and what can be done
        return os.EX_TEMPFAIL

    print(f"checkpoint  {training.checkpoint}")
    print_report(env)
    stop = env.stop_requested
    if stop:
        print(f"stopped by {stop.reason}: start again to go on")
        return 128 + stop.signal if stop.signal else 1
    return 0


class Training:
    """The training itself. All that it knows of the environment is ``env.stop_requested``."""

    def __init__(self, output: Path, epochs: int, workers: int) -> None:
        import torch
        from sklearn.datasets import load_digits

        torch.set_num_threads(1)  # more would spend their time waiting, for so small a network
        torch.manual_seed(SEED)
        self.device = torch.device("cpu")
        if torch.accelerator.is_available():
            self.device = torch.accelerator.current_accelerator() or self.device
        images, labels = load_digits(return_X_y=True)
        data = torch.utils.data.TensorDataset(
            torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0,
            torch.tensor(labels),
        )
        order = torch.Generator().manual_seed(SEED)
        self.train_set, self.test_set = torch.utils.data.random_split(data, [0.8, 0.2], order)
        self.shuffle = torch.Generator()
        self.loader = torch.utils.data.DataLoader(
            self.train_set,
            batch_size=BATCH,
            sampler=torch.utils.data.RandomSampler(self.train_set, generator=self.shuffle),
            num_workers=workers,
            persistent_workers=workers > 0,
            # A terminal sends Ctrl-C to the workers as well. Without them there would be no step to
            # finish.
            worker_init_fn=shield_worker,
        )
        self.model = build_network().to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-3)
        self.checkpoint = output / "checkpoint.pt"
        self.epochs = epochs
        self.done = 0  # steps; an epoch is len(self.loader) of them

    def run(self, env: Environment) -> None:
        self.resume()
        total = self.epochs * len(self.loader)
        for _ in progress(self.steps(), self.done, total):
            if env.stop_requested:
                break
            if self.done % len(self.loader) == 0:
                self.save()
        self.save()
        print(f"trained     {self.done} steps, {self.done / len(self.loader):.1f} epochs")
        print(f"accuracy    {self.accuracy():.1%} of {len(self.test_set)} held-out images")

    def steps(self) -> Iterator[float]:
        """Train step by step, and yield each loss. An epoch has the same order in every run."""
        import torch

        while self.done < self.epochs * len(self.loader):
            epoch, skip = divmod(self.done, len(self.loader))
            self.shuffle.manual_seed(SEED + epoch)
            self.model.train()
            for number, (images, labels) in enumerate(self.loader):
                if number < skip:
                    continue  # done before the stop that this run resumes from
                logits = self.model(images.to(self.device))
                loss = torch.nn.functional.cross_entropy(logits, labels.to(self.device))
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.done += 1
                yield loss.item()

    def accuracy(self) -> float:
        import torch

        images, labels = next(iter(torch.utils.data.DataLoader(self.test_set, len(self.test_set))))
        self.model.eval()
        with torch.inference_mode():
            guesses = self.model(images.to(self.device)).argmax(1).cpu()
        return float((guesses == labels).float().mean())

    def resume(self) -> None:
        """Resume an unfinished run where it was stopped. After a finished one, start anew."""
        import torch

        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["done"] >= self.epochs * len(self.loader):
            print(f"{self.checkpoint} belongs to a finished run: starting anew")
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]
        print(f"resumed     after {self.done} steps")

    def save(self) -> None:
        """Replace the checkpoint in one step: after a power failure there still is a whole one."""
        import torch

        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        half_written = self.checkpoint.with_suffix(".tmp")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
        }
        with open(half_written, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half_written, self.checkpoint)


def build_network() -> torch.nn.Module:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def progress(losses: Iterator[float], done: int, total: int) -> Iterator[float]:
    """A progress bar on a terminal; elsewhere nothing."""
    from tqdm import tqdm

    with tqdm(desc="training", initial=done, total=total, unit="step", disable=None) as bar:
        for loss in losses:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            yield loss


def print_report(env: Environment) -> None:
    report, flushed = env.report, env.report.flushed
    stopped = len(report.sanitized.stopped) + len(report.sanitized.killed)
    print(f"prepared    in {report.prepare_seconds * 1000:.0f} ms, {stopped} processes stopped")
    print(f"released    in {report.release_seconds * 1000:.0f} ms")
    if flushed is not None:
        for memory in flushed.devices:
            print(f"flushed     {memory.device}: {megabytes(memory.before, memory.after)}")
        if flushed.rss_before is not None and flushed.rss_after is not None:
            print(f"flushed     memory: {megabytes(flushed.rss_before, flushed.rss_after)}")


def megabytes(before: int, after: int) -> str:
    return f"{before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small network on scikit-learn's digits, one run at a time.",
        epilog="Exit status: 0 done, 75 another run holds the project, 128 + n stopped by signal n",
    )
    parser.add_argument("--project", default="digits", help="one run of it at a time (%(default)s)")
    parser.add_argument("--lock-file", type=Path, help="instead of the project's own")
    parser.add_argument(
        "--allow-process-kill", action="store_true", help="stop what dead runs left, and duplicates"
    )
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="for a run that holds it"
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2, help="that load data (%(default)s)")
    parser.add_argument("--output", type=Path, help="for the checkpoint (runs/PROJECT)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
