"""A callback for Lightning: a stop becomes a checkpoint, and an early end of ``trainer.fit``.

It works with ``lightning`` and with ``pytorch_lightning``, whichever the program has imported.
"""

from __future__ import annotations

import importlib
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from orchard_infra.environment import Environment
from orchard_infra.stopping.takeover import takeover_of
from orchard_infra.system.masking import is_in_main_thread

_FRAMEWORKS = ("lightning.pytorch", "pytorch_lightning")


def _base() -> Any:
    """The class of callbacks of the Lightning that this program uses."""
    loaded = [name for name in _FRAMEWORKS if name in sys.modules]
    for name in (*loaded, *_FRAMEWORKS):
        try:
            return importlib.import_module(f"{name}.callbacks").Callback
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(
        "neither lightning nor pytorch_lightning is installed: pip install lightning",
        name="lightning",
    )


class StopCallback(_base()):  # type: ignore[misc]
    """Saves a checkpoint and ends ``trainer.fit`` once the run is asked to stop::

        manager = InfrastructureManager(stopper=SignalStop(mode="flag"))
        with managed_environment("digits", manager=manager) as env:
            stop = StopCallback(env, "runs/digits/stopped.ckpt")
            trainer = Trainer(callbacks=[stop])
            trainer.fit(model, ckpt_path=stop.resume_from)

    It looks once a step, after the optimizer's step. With several processes they ask each other,
    and all stop at the same step. ``checkpoint`` is replaced in one go: a process that is killed
    meanwhile leaves the one of before. (One that is a directory is moved aside first, to
    ``NAME.before``.) ``stopped`` says whether it was written by this run.

    `resume_from` is ``checkpoint`` where there is one. Remove it when the training is finished, or
    the next one goes on from there.

    What Lightning would do otherwise is put off, for this ``fit``:

    * its handler of SIGTERM. It raises at the end of the step, and, with several processes, waits
      for the others in the handler itself, wherever each of them is. Its handler for Slurm's
      requeue signal stays.
    * the validation that it makes before it stops: the grace period of a scheduler is short. One
      that runs already is finished; give `SignalStop` a ``deadline`` that ends it.
    * ``min_epochs`` and ``min_steps``, with which it would go on.
    """

    def __init__(self, env: Environment, checkpoint: str | Path = "stopped.ckpt") -> None:
        super().__init__()
        self.checkpoint = Path(checkpoint)
        self.stopped = False
        self._env = env
        self._before: tuple[Any, Any, Any] = (None, None, None)
        self._on_sigterm: Any = None

    @property
    def resume_from(self) -> str | None:
        """For ``trainer.fit(ckpt_path=)``."""
        return str(self.checkpoint) if self.checkpoint.exists() else None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.stopped = False
        self._before = (trainer.limit_val_batches, *_minima(trainer))
        # Lightning installs its own handler after this hook, and gives all back at the end.
        handler = signal.getsignal(signal.SIGTERM)
        self._on_sigterm = None if takeover_of(handler) is None else handler

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self._take_sigterm_back()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._take_sigterm_back()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Half of an accumulation is in no checkpoint: its gradients would be lost.
        if self.stopped or (
            (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        ):
            return
        many = trainer.world_size > 1
        if not (self._env.agree_to_stop() if many else self._env.stop_requested):
            return
        half_written = self.checkpoint.with_name(f"{self.checkpoint.name}.tmp")
        trainer.save_checkpoint(half_written)  # all ranks take part
        if trainer.is_global_zero:
            _put_in_place(half_written, self.checkpoint)
        self.stopped = True
        trainer.should_stop = True
        trainer.limit_val_batches = 0
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._restore(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._restore(trainer)

    def _restore(self, trainer: Any) -> None:
        if self.stopped:
            trainer.limit_val_batches, epochs, steps = self._before
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = epochs, steps

    def _take_sigterm_back(self) -> None:
        if self._on_sigterm is not None and is_in_main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)


def _minima(trainer: Any) -> tuple[Any, Any]:
    return trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps


def _put_in_place(half_written: Path, checkpoint: Path) -> None:
    """Where strategies write a directory (FSDP, DeepSpeed), the one of before is moved aside
    first: a directory does not replace one that has something in it.
    """
    if not checkpoint.is_dir():
        half_written.replace(checkpoint)
        return
    before = checkpoint.with_name(f"{checkpoint.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    checkpoint.rename(before)
    half_written.rename(checkpoint)
    shutil.rmtree(before, ignore_errors=True)
