"""A stop for jobs of submitit: the step is finished and saved, then submitit requeues the job."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import attrs
from submitit.core.job_environment import JobEnvironment, SignalHandler
from submitit.local.local import LocalJobEnvironment

from orchard_infra.environment import Environment
from orchard_infra.system.masking import is_in_main_thread


@contextlib.contextmanager
def stop_before_requeue(managed: AbstractContextManager[Environment]) -> Iterator[Environment]:
    """The environment ``managed``, in which submitit's signals ask the run to stop::

        class Training:
            def __call__(self, steps):
                with stop_before_requeue(managed_environment("digits")) as env:
                    step = load()
                    while step < steps and not env.stop_requested:
                        step = train(step)
                    save(step)

            def checkpoint(self, steps):
                return DelayedSubmission(self, steps)

    submitit has handlers of its own, which `SignalStop` leaves alone. That of its preemption
    signal (SIGUSR2, unless SUBMITIT_PREEMPT_SIGNAL says otherwise) calls ``checkpoint`` wherever
    the training is, in the middle of an optimizer's step too, requeues the job and raises
    `SystemExit` there. Here it only sets ``env.stop_requested``. Once the block has ended and the
    lock is free, submitit does the rest. It does so also if the signal came after the last step:
    so a training that finds itself finished has to return at once.

    Its handler of SIGTERM does nothing at all: ``scancel`` kills a job without a word. Here it
    sets ``env.stop_requested``, too, and the job is not requeued.

    An error of the block goes to submitit, as ever, and nothing is requeued. Outside of a job of
    submitit, and outside of the main thread, this is ``managed`` and nothing else.
    """
    handlers = _Handlers()
    try:
        with managed as env:
            handlers.take_over(env)
            yield env
    finally:
        handlers.give_back()
    handlers.requeue()


@attrs.define(eq=False)
class _Handlers:
    """Those of submitit, while ours are in their place."""

    _pid: int = attrs.field(factory=os.getpid)
    _env: Environment | None = None
    _theirs: dict[int, Any] = attrs.field(factory=dict)
    _preempted: int | None = None

    def take_over(self, env: Environment) -> None:
        self._env = env
        if not is_in_main_thread():
            return
        for signum in (JobEnvironment._usr_sig(), signal.SIGTERM):
            handler = signal.getsignal(signum)
            if isinstance(getattr(handler, "__self__", None), SignalHandler):
                self._theirs[signum] = handler
                signal.signal(signum, self._ask)
        # At a Ctrl-C the controller of a LocalExecutor interrupts its tasks, which have got it from
        # the terminal already: the second one was raised, in the middle of the last step.
        env._signals_come_twice = bool(self._theirs) and LocalJobEnvironment().activated()

    def give_back(self) -> None:
        for signum, handler in self._theirs.items():
            signal.signal(signum, handler)

    def requeue(self) -> None:
        if self._preempted is not None:
            self._theirs[self._preempted](self._preempted, None)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker has inherited it
            self._theirs[signum](signum, frame)
            return
        if signum == JobEnvironment._usr_sig():
            self._preempted = signum
        assert self._env is not None
        name = signal.Signals(signum).name
        self._env.request_stop(f"{name} of submitit", signal.Signals(signum))
