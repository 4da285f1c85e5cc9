"""A callback for the Trainer of Hugging Face: a stop becomes a checkpoint, and an early end."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from orchard_infra.environment import Environment
from orchard_infra.stopping.shielding import shield_worker


class StopCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Saves a checkpoint and ends ``trainer.train`` once the run is asked to stop::

        manager = InfrastructureManager(stopper=SignalStop(mode="flag"))
        with managed_environment("digits", manager=manager) as env:
            trainer = Trainer(model, arguments, ..., callbacks=[StopCallback(env)])
            trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))

    It looks once a step, after the optimizer's step. With several processes they ask each other,
    and all stop at the same step. ``stopped`` says whether this training was ended early.

    The checkpoint is one of the Trainer's own, ``checkpoint-<step>``, whatever ``save_strategy``
    says. The Trainer's evaluation is left out then: the grace period of a scheduler is short. With
    ``save_total_limit=1`` and ``load_best_model_at_end`` the Trainer would delete the checkpoint
    at once, as it is not the best one; the limit is raised to 2.

    ``shield_workers`` keeps a Ctrl-C from the workers of the training's DataLoader, see
    `shield_worker`. Those of an evaluation are the caller's: a callback sees them too late.
    """

    def __init__(self, env: Environment, *, shield_workers: bool = True) -> None:
        self.stopped = False
        self._env = env
        self._shield_workers = shield_workers
        self._limit_before: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = False
        self._limit_before = args.save_total_limit
        if self._shield_workers and args.dataloader_num_workers > 0:
            loader = kwargs["train_dataloader"]
            # accelerate wraps the one that starts the workers.
            loader = getattr(loader, "base_dataloader", loader)
            loader.worker_init_fn = shield_worker(loader.worker_init_fn or _nothing)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        many = args.world_size > 1
        if not (self._env.agree_to_stop() if many else self._env.stop_requested):
            return
        if state.global_step >= state.max_steps:  # it ends anyway
            return
        self.stopped = True
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False
        if args.save_total_limit == 1:
            args.save_total_limit = 2

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:  # saved already, at the end of the step
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            args.save_total_limit = self._limit_before


def _nothing(worker: int) -> None:
    """Initialises a worker that nobody else does."""
