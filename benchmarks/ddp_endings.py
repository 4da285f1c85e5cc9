"""How a job of torchrun ends: examples/ddp.py, refused, stopped, broken and restarted.

Four ranks (gloo) are started by torchrun, and something happens to them. What is measured is the
time from that until torchrun has ended, with every rank; for a job that is refused, from its start
until then, of which the import of torch is the most. Then the script looks for ranks, the port, the
lock, records and temporary directories that were left, and again after the next run of the project:
who is killed leaves files to that.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import psutil
from _harness import Goal, Outcome, main

EXAMPLE = Path(__file__).parents[1] / "examples" / "ddp.py"
ORCHARD_INFRA = Path(sys.executable).with_name("orchard-infra")
PATIENCE = 180.0  # seconds: a busy machine takes its time to import torch


@attrs.define
class Job:
    """A job of torchrun that runs for ever, with a directory of its own for all that it makes."""

    directory: Path
    ranks: int
    restarts: int = 0
    port: int = attrs.field(init=False)
    torchrun: subprocess.Popen[bytes] = attrs.field(init=False)

    def start(self) -> None:
        for name in ("infra", "tmp"):
            (self.directory / name).mkdir(exist_ok=True, mode=0o700)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{self.port}"),
            *("--nproc-per-node", str(self.ranks), "--max-restarts", str(self.restarts)),
            *(str(EXAMPLE), "--steps", "100000000"),
        ]
        with open(self.log, "wb") as log:
            self.torchrun = subprocess.Popen(
                command,
                cwd=self.directory,
                env=self.environ,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C goes to torchrun's group
            )

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def environ(self) -> dict[str, str]:
        return {
            **os.environ,
            "ORCHARD_INFRA_DIR": str(self.directory / "infra"),
            "TMPDIR": str(self.directory / "tmp"),
            "OMP_NUM_THREADS": "1",
            # Else gloo finds the addresses of before in a restarted job (torch 2.13).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }

    def wait_until_it_trains(self, restart: int = 0) -> dict[int, int]:
        """The pids of the ranks, which have taken their first step since a restart."""

        def steps() -> list[tuple[str, str]]:
            found = re.findall(r"rank (\d+) \(pid (\d+)\) has taken", self.log.read_text())
            return found[self.ranks * restart :]

        wait_until(lambda: len(steps()) == self.ranks, self)
        return {int(rank): int(pid) for rank, pid in steps()}

    def wait(self) -> float:
        """Until torchrun has ended; when that was."""
        wait_until(lambda: self.torchrun.poll() is not None, self)
        return time.perf_counter()

    def leftovers(self) -> list[str]:
        """What is there of it. A ``.notice`` is what rank 0 tells ranks that come late."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.directory):
                    found.append(f"process {process.pid}")
            except psutil.Error:
                continue
        with socket.socket() as probe:
            # What a job does that is started again: connections in TIME_WAIT are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError:
                found.append(f"port {self.port}")
        infra = (self.directory / "infra").rglob("*")
        found += [path.name for path in infra if path.is_file()]
        # torch and torchrun leave their own directories: torchinductor_USER, torchelastic_...
        temporary = (path.name for path in (self.directory / "tmp").iterdir())
        found += [name for name in temporary if not name.startswith("torch")]
        return found

    def start_the_next_run(self) -> None:
        subprocess.run(
            [ORCHARD_INFRA, "run", "-p", "ddp", "--", "true"],
            cwd=self.directory.parent,
            env=self.environ,
            check=True,
        )


def wait_until(answer: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + PATIENCE
    while not answer():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE:.0f} s\n{job.log.read_text()[-4000:]}")
        if job.torchrun.poll() is not None and not answer():
            raise RuntimeError(f"the job has ended\n{job.log.read_text()[-4000:]}")
        time.sleep(0.01)


# What happens to a job that trains. Each returns the moment from which its end is measured.


def _ctrl_c(job: Job, ranks: dict[int, int]) -> float:
    began = time.perf_counter()
    os.killpg(job.torchrun.pid, signal.SIGINT)
    return began


def _sigterm(job: Job, ranks: dict[int, int]) -> float:
    began = time.perf_counter()
    os.kill(ranks[job.ranks - 1], signal.SIGTERM)
    return began


def _kill(job: Job, ranks: dict[int, int]) -> float:
    began = time.perf_counter()
    os.kill(ranks[job.ranks - 1], signal.SIGKILL)
    return began


def _kill_rank_0(job: Job, ranks: dict[int, int]) -> float:
    began = time.perf_counter()
    os.kill(ranks[0], signal.SIGKILL)
    return began


def _restart(job: Job, ranks: dict[int, int]) -> float:
    """Rank 0 is killed, the job is started again by the agent, goes on and is stopped."""
    os.kill(ranks[0], signal.SIGKILL)
    ranks = job.wait_until_it_trains(restart=1)
    return _sigterm(job, ranks)


SIGTERM = "SIGTERM to one rank"
RESTART = "elastic restart, then SIGTERM to one rank"
REFUSED = "refused, from its start"
ENDINGS = {
    "Ctrl-C": _ctrl_c,
    SIGTERM: _sigterm,
    "kill -9 of one rank": _kill,
    "kill -9 of rank 0": _kill_rank_0,
    RESTART: _restart,
}


def _refused(job: Job) -> float:
    """It finds its project taken."""
    locks = job.directory / "infra"
    locks.mkdir(mode=0o700)
    holder = subprocess.Popen(
        [ORCHARD_INFRA, "run", "-p", "ddp", "--", "sleep", "600"],
        env=job.environ,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not list(locks.rglob("*.lock")):
            time.sleep(0.01)
        began = time.perf_counter()
        job.start()
        taken = job.wait() - began
    finally:
        holder.terminate()
        holder.wait()
    told = job.log.read_text()
    assert told.count("is held by") >= job.ranks, told
    return taken


def _ended(happens: Callable[[Job, dict[int, int]], float], job: Job) -> float:
    job.start()
    began = happens(job, job.wait_until_it_trains())
    return job.wait() - began


def _kind(found: str) -> str:
    return re.sub(r"[0-9a-f]{16,}|\d+", "...", found)


def measure(quick: bool, directory: Path) -> Outcome:
    if importlib.util.find_spec("torch") is None:
        return Outcome(notes=["not measured: there is no torch"])
    scenes: dict[str, Callable[[Job], float]] = {
        name: functools.partial(_ended, happens) for name, happens in ENDINGS.items()
    }
    scenes[REFUSED] = _refused
    if quick:
        scenes = {SIGTERM: scenes[SIGTERM]}
    ranks = 2 if quick else 4
    samples: dict[str, list[float]] = {name: [] for name in scenes}
    left: dict[str, None] = {}  # in order
    still_left: list[str] = []
    for _ in range(1 if quick else 3):
        for name, scene in scenes.items():
            place = directory / "job"
            place.mkdir()
            job = Job(place, ranks, restarts=int(name == RESTART))
            samples[name].append(scene(job))
            left.update(dict.fromkeys(f"{name}: {_kind(one)}" for one in job.leftovers()))
            job.start_the_next_run()
            still_left += job.leftovers()
            shutil.rmtree(place)
    outcome = Outcome()
    outcome.add(samples, "s")
    outcome.notes = [f"{ranks} ranks", *(f"left until the next run: {one}" for one in left)]
    slowest = max(max(taken) for name, taken in samples.items() if name != REFUSED)
    outcome.goals = [
        Goal("the end of a job that trains, at worst", slowest, 10, "s"),
        Goal("what is left after the next run", len(still_left), 0, "things"),
    ]
    return outcome


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, measure))
