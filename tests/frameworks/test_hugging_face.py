"""The Trainer of Hugging Face, ended in every way: alone, in an environment, with our callback."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from endings import EXAMPLES, ended_on_each_side, example, pid_of, send_signal, stopped_after
from forking import ForkedScript, ForkServer
from support import run_command, wait_gone

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

server: ForkServer


@pytest.fixture(scope="module", autouse=True)
def fork_server(needs: Callable[..., None]) -> Iterator[None]:
    needs("torch", "transformers", "accelerate")
    global server
    trainer = ("transformers.trainer", "transformers.models.bert.modeling_bert")
    with ForkServer(*trainer, "orchard_infra._public") as server:
        yield


# ``side``: the Trainer alone, and with its own handler of SIGTERM; in an environment as it is; or
# with the callback, which needs a flag.
TRAIN = f"""
import contextlib, os, sys, warnings
os.setpgid(0, 0)
warnings.simplefilter("ignore")
sys.path.insert(0, {str(EXAMPLES)!r})
from hf_trainer import *

side, ending = sys.argv[1:]

class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if ending == "exception" and state.global_step == 3:
            raise ValueError("no luck")

manager = InfrastructureManager(stopper=SignalStop("flag" if side == "callback" else "raise"))
is_inside = side in ("environment", "callback")
environment = managed_environment("digits", manager=manager)
with environment if is_inside else contextlib.nullcontext() as env:
    arguments = TrainingArguments(
        "out", use_cpu=True, max_steps=5 if ending == "normal" else 10**8,
        dataloader_num_workers=2, dataloader_persistent_workers=True, save_strategy="no",
        report_to="none", disable_tqdm=True,
        enable_jit_checkpoint=side == "jit",
    )
    callbacks = [Fail(), Progress()] + ([StopCallback(env)] if side == "callback" else [])
    trainer = Trainer(tiny_model(), arguments, train_dataset=Sentences(), callbacks=callbacks)
    try:
        trainer.train()
    except BaseException as error:
        print("train raised", type(error).__name__, flush=True)
        raise
    print("train returned", flush=True)
"""

SIDES = ("alone", "jit", "environment", "callback")
LUCK = "it depends"
# What `train` did, the exit status, and whether a checkpoint was left, for each side. Where workers
# of the DataLoader get the signal as well, it may be their end that is seen first.
ENDINGS = {
    "normal": [("returned", 0, False)] * 4,
    "exception": [("raised ValueError", 1, False)] * 4,
    "Ctrl-C": [
        (r"raised (KeyboardInterrupt|\w+Error)", LUCK, False),
        (r"raised (KeyboardInterrupt|\w+Error)", LUCK, False),
        (r"raised (KeyboardInterrupt|\w+Error)", LUCK, False),
        ("returned", 0, True),
    ],
    "SIGTERM": [
        ("nothing", -15, False),
        ("returned", 0, True),
        ("raised RunStopped", 143, False),
        ("returned", 0, True),
    ],
    "SIGTERM to the group": [
        ("nothing", -15, False),
        (r"raised \w+Error", 1, False),
        (r"raised (RunStopped|\w+Error)", LUCK, False),
        ("returned", 0, True),
    ],
    "kill -9": [("nothing", -9, False)] * 4,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_the_trainer_does_at_an_end_and_what_the_environment_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    scripts, workers = ended_on_each_side(server, tmp_path, monkeypatch, TRAIN, SIDES, ending)
    for (side, script), expected in zip(scripts.items(), ENDINGS[ending], strict=True):
        script.finish()
        what, *rest = _seen(script, tmp_path / side)
        assert re.fullmatch(expected[0], what), f"{side}\n{script.transcript()}"
        for seen, wanted in zip(rest, expected[1:], strict=True):
            assert seen == wanted or wanted is LUCK, f"{side}: {rest}\n{script.transcript()}"
        is_locked = (tmp_path / side / "run" / "locks" / "digits.lock").exists()
        assert is_locked == (ending == "kill -9" and side in ("environment", "callback"))
    # Those that are shielded end with their parent all the same, however that has ended.
    wait_gone(workers.get("callback", ()))


def _seen(script: ForkedScript, directory: Path) -> tuple[str, int | None, bool]:
    what = re.search(r"^train (.*)$", script.output, re.MULTILINE)
    saved = bool(list(directory.glob("out/checkpoint-*/model.safetensors")))
    return what[1] if what else "nothing", script.returncode, saved


def test_the_next_start_goes_on_where_the_callback_has_stopped_the_last_one(
    tmp_path: Path,
) -> None:
    output = tmp_path / "runs" / "hugging-face"

    first = train(tmp_path, "--steps", "100000000", "--workers", "2")
    first.wait_for("is in training")
    second = train(tmp_path)
    assert second.finish() == os.EX_TEMPFAIL, second.transcript()
    assert f"pid {first.pid}" in second.error_output
    send_signal(first, "Ctrl-C")
    assert first.finish() == 0, first.transcript()
    steps = stopped_after(first)
    assert [path.name for path in output.iterdir()] == [f"checkpoint-{steps}"]

    third = train(tmp_path, "--steps", str(steps + 3), "--workers", "2")
    assert third.finish() == 0, third.transcript()
    third.wait_for(f"goes on from step {steps}")
    third.wait_for(f"finished after {steps + 3} steps")
    assert [path.name for path in output.iterdir()] == ["model"]


def train(tmp_path: Path, *arguments: str) -> ForkedScript:
    return example(server, tmp_path, "hf_trainer.py", *arguments)


def test_all_ranks_of_torchrun_stop_at_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    command = [*TORCHRUN, str(EXAMPLES / "hf_trainer.py"), "--steps", "100000000"]
    job = run_command(tmp_path, command, start_new_session=True)
    pids = [pid_of(job, rank) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGTERM)
    assert job.finish() == 0, job.transcript()
    job.wait_for("stopped (rank 1 of this job was asked to stop) after")
    name = f"checkpoint-{stopped_after(job)}"
    assert (tmp_path / "runs" / "hugging-face" / name).is_dir()


# The Trainer's own rules would evaluate for ever, and delete the checkpoint, which is not the best.
STRICT = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(EXAMPLES)!r})
from hf_trainer import *

class Ask(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 12:
            os.kill(os.getpid(), 15)
    def on_evaluate(self, args, state, control, metrics, **_):
        print("evaluated after", state.global_step, flush=True)
        metrics["eval_luck"] = -state.global_step  # the first one stays the best

arguments = TrainingArguments(
    "out", use_cpu=True, max_steps=int(sys.argv[1]), report_to="none", disable_tqdm=True,
    eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
    save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="luck",
    greater_is_better=True,
)
manager = InfrastructureManager(stopper=SignalStop("flag"))
with managed_environment("digits", manager=manager) as env:
    stop = StopCallback(env)
    trainer = Trainer(
        tiny_model(), arguments, train_dataset=Sentences(), eval_dataset=Sentences(),
        callbacks=[Ask(), stop],
    )
    trainer.train()
    print(stop.stopped, *sorted(os.listdir("out")), flush=True)
    print("limit", arguments.save_total_limit)
"""


def test_no_rule_of_the_trainer_evaluates_first_or_deletes_the_checkpoint_of_a_stop(
    tmp_path: Path,
) -> None:
    script = server.run_python(tmp_path, STRICT, "1000")
    assert script.finish() == 0, script.transcript()
    assert "True checkpoint-12 checkpoint-4" in script.output
    assert "limit 1" in script.output
    assert "evaluated after 8" in script.output
    assert "evaluated after 12" not in script.output


def test_a_stop_at_the_last_step_is_an_ordinary_end(tmp_path: Path) -> None:
    script = server.run_python(tmp_path, STRICT, "12")
    assert script.finish() == 0, script.transcript()
    assert "False checkpoint-4" in script.output
