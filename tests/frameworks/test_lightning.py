"""Lightning's Trainer, ended in every way: alone, in an environment, and with our callback."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from endings import EXAMPLES, ended_on_each_side, example, pid_of, send_signal, stopped_after
from forking import ForkedScript, ForkServer
from support import wait_gone

pytestmark = pytest.mark.slow

server: ForkServer


@pytest.fixture(scope="module", autouse=True)
def fork_server(needs: Callable[..., None]) -> Iterator[None]:
    needs("torch", "lightning")
    global server
    with ForkServer("lightning.pytorch", "orchard_infra._public") as server:
        yield


# ``side``: Lightning alone; in an environment as it is; or with the callback, which needs a flag.
TRAIN = f"""
import contextlib, os, sys, warnings
os.setpgid(0, 0)
warnings.simplefilter("ignore")
sys.path.insert(0, {str(EXAMPLES)!r})
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning_train import Line, points
from orchard_infra import *
from orchard_infra.integrations.lightning import StopCallback

side, ending = sys.argv[1:]

class Fail(Callback):
    def on_train_batch_end(self, trainer, *_):
        if ending == "exception" and trainer.global_step == 3:
            raise ValueError("no luck")

manager = InfrastructureManager(stopper=SignalStop("flag" if side == "callback" else "raise"))
environment = managed_environment("digits", manager=manager)
with environment if side != "alone" else contextlib.nullcontext() as env:
    saver = StopCallback(env) if side == "callback" else OnExceptionCheckpoint(".")
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, max_steps=5 if ending == "normal" else -1, logger=False,
        callbacks=[Fail(), saver], enable_checkpointing=side != "callback",
        enable_progress_bar=False, enable_model_summary=False,
    )
    try:
        trainer.fit(Line(), points(2))
    except BaseException as error:
        print("fit raised", type(error).__name__, flush=True)
        raise
    print("fit returned", flush=True)
"""

SIDES = ("alone", "environment", "callback")
OLD, NEW, LUCK = "on_exception.ckpt", "stopped.ckpt", "it depends"
# What `fit` did, the exit status, and the checkpoint that was left, for each side. Where workers of
# the DataLoader get the signal as well, it may be their end that is seen first.
ENDINGS = {
    "normal": [("returned", 0, None), ("returned", 0, None), ("returned", 0, None)],
    "exception": [
        ("raised ValueError", 1, OLD),
        ("raised ValueError", 1, OLD),
        ("raised ValueError", 1, None),
    ],
    "Ctrl-C": [
        (r"raised (SystemExit|\w+Error)", 1, LUCK),
        (r"raised (SystemExit|\w+Error)", 1, LUCK),
        ("returned", 0, NEW),
    ],
    "SIGTERM": [
        ("raised SIGTERMException", 0, OLD),
        ("raised RunStopped", 143, OLD),
        ("returned", 0, NEW),
    ],
    "SIGTERM to the group": [
        (r"raised (SIGTERMException|\w+Error)", LUCK, LUCK),
        (r"raised (RunStopped|\w+Error)", LUCK, LUCK),
        ("returned", 0, NEW),
    ],
    "kill -9": [("nothing", -9, None), ("nothing", -9, None), ("nothing", -9, None)],
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_lightning_does_at_an_end_and_what_the_environment_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    scripts, workers = ended_on_each_side(server, tmp_path, monkeypatch, TRAIN, SIDES, ending)
    for (side, script), expected in zip(scripts.items(), ENDINGS[ending], strict=True):
        script.finish()
        what, *rest = _seen(script, tmp_path / side)
        assert re.fullmatch(expected[0], what), script.transcript()
        for seen, wanted in zip(rest, expected[1:], strict=True):
            assert seen == wanted or wanted is LUCK, f"{side}: {rest}\n{script.transcript()}"
        is_locked = (tmp_path / side / "run" / "locks" / "digits.lock").exists()
        assert is_locked == (ending == "kill -9" and side != "alone"), script.transcript()
    # Those that are shielded end with their parent all the same, however that has ended.
    wait_gone(workers.get("callback", ()))


def _seen(script: ForkedScript, directory: Path) -> tuple[str, int | None, str | None]:
    what = re.search(r"^fit (.*)$", script.output, re.MULTILINE)
    checkpoints = [path.name for path in directory.glob("*.ckpt")]
    return what[1] if what else "nothing", script.returncode, "".join(checkpoints) or None


def test_the_next_start_goes_on_where_the_callback_has_stopped_the_last_one(
    tmp_path: Path,
) -> None:
    checkpoint = tmp_path / "runs" / "lightning" / "stopped.ckpt"

    first = train(tmp_path, "--steps", "100000000", "--workers", "2")
    first.wait_for("is in training")
    second = train(tmp_path)
    assert second.finish() == os.EX_TEMPFAIL, second.transcript()
    assert f"pid {first.pid}" in second.error_output
    send_signal(first, "Ctrl-C")
    assert first.finish() == 0, first.transcript()
    steps = stopped_after(first)
    assert checkpoint.exists()

    third = train(tmp_path, "--steps", str(steps + 3))
    assert third.finish() == 0, third.transcript()
    third.wait_for(f"goes on from step {steps}")
    third.wait_for(f"finished after {steps + 3} steps")
    assert not checkpoint.exists()


def train(tmp_path: Path, *arguments: str) -> ForkedScript:
    return example(server, tmp_path, "lightning_train.py", *arguments)


def test_all_ranks_of_ddp_stop_at_the_same_step_and_the_next_start_goes_on(tmp_path: Path) -> None:
    endless = ("--devices", "2", "--steps", "100000000", "--workers", "1")
    killed = train(tmp_path, *endless)
    assert pid_of(killed, 0) == killed.pid
    other = pid_of(killed, 1)
    send_signal(killed, "kill -9")
    wait_gone([other])  # nobody answers it any more

    interrupted = train(tmp_path, *endless)
    for rank in (0, 1):
        pid_of(interrupted, rank)
    send_signal(interrupted, "Ctrl-C")
    assert interrupted.finish() == 0, interrupted.transcript()
    steps = stopped_after(interrupted)

    terminated = train(tmp_path, *endless)
    rank_1 = pid_of(terminated, 1)
    for rank in (0, 1):
        terminated.wait_for(f"rank {rank} goes on from step {steps}")
    os.kill(rank_1, signal.SIGTERM)
    assert terminated.finish() == 0, terminated.transcript()
    terminated.wait_for("stopped (rank 1 of this job was asked to stop) after")


# A training in which a stop could be missed: it accumulates gradients, has to reach its least
# number of steps, and would validate for ever.
IMPATIENT = f"""
import itertools, os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(EXAMPLES)!r})
if sys.argv[1] == "lightning":
    from lightning.pytorch import Trainer
else:
    from orchard_infra.integrations.lightning import StopCallback  # before the framework
    from pytorch_lightning import LightningModule, Trainer
    import lightning.pytorch
    lightning.pytorch.LightningModule = LightningModule
    lightning.pytorch.Trainer = Trainer
from lightning_train import Line, points
from orchard_infra import *
from orchard_infra.integrations.lightning import StopCallback
from orchard_infra.integrations.lightning import _put_in_place as put_in_place
from pathlib import Path

class Slow(Line):
    def training_step(self, batch, index):
        if self.global_step == 2 and index % 4 == 1:
            os.kill(os.getpid(), 15)
        return super().training_step(batch, index)
    def validation_step(self, batch, index):
        print("validates", flush=True)
    def val_dataloader(self):
        return points(0)

manager = InfrastructureManager(stopper=SignalStop("flag"))
with managed_environment("digits", manager=manager) as env:
    stop = StopCallback(env, "here/stopped.ckpt")
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, min_epochs=10**8, max_steps=10**8, min_steps=10**8,
        accumulate_grad_batches=4, num_sanity_val_steps=0, check_val_every_n_epoch=3,
        callbacks=[stop], enable_checkpointing=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Slow(), points(0))
    print(trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
    print(stop.stopped, stop.resume_from, trainer.limit_val_batches)
    print(trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps)
    # A strategy that shards the model writes a directory, which may be there from the last stop.
    for part in ("old", "new"):
        os.makedirs("sharded.tmp")
        Path("sharded.tmp", part).touch()
        put_in_place(Path("sharded.tmp"), Path("sharded"))
        print(*os.listdir("sharded"), os.path.exists("sharded.before"))
"""


@pytest.mark.parametrize("framework", ["lightning", "pytorch_lightning"])
def test_neither_a_validation_nor_a_minimum_of_steps_keeps_the_callback_from_stopping(
    tmp_path: Path, needs: Callable[..., None], framework: str
) -> None:
    needs(framework)
    script = server.run_python(tmp_path, IMPATIENT, framework)
    assert script.finish() == 0, script.transcript()
    assert script.output.splitlines()[-5:] == [
        "3 4",
        "True here/stopped.ckpt 1.0",
        "100000000 100000000",
        "old False",
        "new False",
    ]
    assert "validates" not in script.output


# What Slurm sets for a step of one task, as far as Lightning and we look at it.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "localhost",
}


def test_lightnings_requeue_under_slurm_is_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a Slurm: its variables, and a scontrol that says what it was told."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "scontrol $@"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    job = train(tmp_path, "--steps", "100000000")
    job.wait_for("is in training")

    job.send_signal(signal.SIGUSR1)  # #SBATCH --signal=SIGUSR1@90
    job.wait_for("scontrol requeue 4711")
    job.send_signal(signal.SIGTERM)  # so ends Slurm a job that is requeued

    assert job.finish() == 0, job.transcript()
    job.wait_for("stopped (SIGTERM) after")
    assert list(tmp_path.glob("hpc_ckpt_*.ckpt"))  # Lightning's, of the first signal
    assert (tmp_path / "runs" / "lightning" / "stopped.ckpt").exists()
