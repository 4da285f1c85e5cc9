"""The Trainer of Hugging Face, protected: one run at a time, and a checkpoint at a stop.

    python examples/frameworks/hf_trainer.py
    torchrun --nproc-per-node 2 examples/frameworks/hf_trainer.py

Ctrl-C, or `kill`: the step is finished, and the next start goes on there. The model is made here
from a configuration; nothing is downloaded.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from orchard_infra import (
    EnvironmentLockedError,
    InfrastructureManager,
    SignalStop,
    managed_environment,
)
from orchard_infra.integrations.transformers import StopCallback


class Sentences(Dataset[dict[str, Any]]):
    """Random words; the label is whether the first one is in the upper half of the vocabulary."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": words, "labels": int(words[0] >= 16)}


def tiny_model() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    )


class Progress(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first = state.global_step
        print(f"rank {args.process_index} goes on from step {self.first}", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.first + 4:
            print(f"rank {args.process_index} (pid {os.getpid()}) is in training", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader")
    options = parser.parse_args()
    output = Path("runs", "hugging-face")
    # A signal sets a flag. If no step has ended 60 s later, it is raised.
    manager = InfrastructureManager(stopper=SignalStop("flag", deadline=60.0))
    try:
        with managed_environment("hugging-face", manager=manager) as env:
            arguments = TrainingArguments(
                output_dir=str(output),
                use_cpu=True,
                max_steps=options.steps,
                dataloader_num_workers=options.workers,
                dataloader_persistent_workers=options.workers > 0,
                save_strategy="no",  # but for a stop
                report_to="none",
                disable_tqdm=True,
            )
            stop = StopCallback(env)
            trainer = Trainer(
                tiny_model(), arguments, train_dataset=Sentences(), callbacks=[stop, Progress()]
            )
            last = get_last_checkpoint(str(output)) if output.is_dir() else None
            trainer.train(resume_from_checkpoint=last)
            if trainer.is_world_process_zero():
                if not stop.stopped:
                    trainer.save_model(str(output / "model"))
                    for checkpoint in output.glob("checkpoint-*"):
                        shutil.rmtree(checkpoint)
                how = f"stopped ({env.stop_requested.reason})" if stop.stopped else "finished"
                print(f"{how} after {trainer.state.global_step} steps", flush=True)
    except EnvironmentLockedError as error:
        print(error, file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main())
