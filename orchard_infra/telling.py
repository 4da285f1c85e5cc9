"""What a person is told of an environment: one line when it is prepared, one when it is released.

Details are told at DEBUG by whoever has them, a refusal at ERROR before it is raised.
"""

from __future__ import annotations

import logging

from orchard_infra.environment import Environment
from orchard_infra.locks.base import Lease, not_free_yet

_MIB = 2**20  # bytes


def tell_prepared(env: Environment) -> None:
    """Say that the run may begin: under which lock, and what was done and left out."""
    if not env.logger.isEnabledFor(logging.INFO) or env.joined:
        return
    report = env.report
    parts = []
    if env.is_locked:
        waited = f" after {report.waited_seconds:.1f} s" if report.waited_seconds > 1 else ""
        parts.append(f"lock {env.lock_name} acquired{waited}")
    stopped = len(report.sanitized.stopped) + len(report.sanitized.killed)
    if stopped:
        parts.append(f"{stopped} processes of earlier runs stopped")
    if report.collected is not None and report.collected.removed:
        parts.append(f"{len(report.collected.removed)} leftovers of dead runs removed")
    parts += report.skipped
    env.logger.info(
        "prepared project %s in %.3f s: %s",
        env.run.project,
        report.prepare_seconds,
        "; ".join(parts),
        extra={"run": env.run, "lock_path": str(env.lock_path)},
    )


def tell_released(env: Environment) -> None:
    """Say that the run is over: what came free, what goes on, and what failed."""
    if not env.logger.isEnabledFor(logging.INFO) or env.joined:
        return
    report = env.report
    parts = [] if env._lease is None else [_tell_lock(env, env._lease)]
    if report.flushed is not None and report.flushed.devices:
        freed = sum(device.freed for device in report.flushed.devices)
        parts.append(f"{freed / _MIB:.0f} MiB of device caches freed")
    if report.cleaned is not None and report.cleaned.bytes_freed:
        parts.append(f"{report.cleaned.bytes_freed / _MIB:.0f} MiB of temporary files removed")
    children = len(report.leftovers.spared)
    if children:
        parts.append(f"{children} child processes go on")
    failed = [one for one in report.failures if isinstance(one, Exception)]  # no signal that came
    if failed:
        parts.append(f"{len(failed)} steps failed")
    env.logger.info(
        "released project %s in %.3f s: %s",
        env.run.project,
        report.release_seconds,
        "; ".join(parts) or "nothing was held",
        extra={"run": env.run, "lock_path": str(env.lock_path)},
    )


def _tell_lock(env: Environment, lease: Lease) -> str:
    if env.lock_lost:
        return f"lock {env.lock_name} was lost before"
    reasons = not_free_yet(lease)
    if reasons:
        return f"lock {env.lock_name} not free yet: {', '.join(reasons)}"
    return f"lock {env.lock_name} released"
