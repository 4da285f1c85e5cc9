"""A question to all ranks of a job that `torch.distributed` has connected.

torch is used where the program has loaded it, and never imported.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from datetime import timedelta
from typing import Any

from orchard_infra.errors import InfrastructureError

# For a group that cannot reduce a tensor in main memory, such as one of NCCL alone: another one,
# that can. It goes when the group goes.
_beside: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def any_rank(says_yes: bool) -> int | None:
    """The highest rank that says yes; None if none does. Every rank gets the same answer.

    Collective: every rank of the default group has to call it, as often as the others. Without an
    initialised group this process is asked alone, as rank 0.

    Raises:
        InfrastructureError: A rank has ended, or did not call it within the group's timeout.
    """
    torch, distributed = sys.modules.get("torch"), sys.modules.get("torch.distributed")
    # Another thread may be importing them, so that names are missing.
    is_initialized = getattr(distributed, "is_initialized", None)
    if torch is None or distributed is None or is_initialized is None or not is_initialized():
        return 0 if says_yes else None
    rank = distributed.get_rank()
    try:
        answer = torch.tensor([rank if says_yes else -1], dtype=torch.int32, device="cpu")
        group = _group_in_main_memory(torch, distributed)
        distributed.all_reduce(answer, distributed.ReduceOp.MAX, group)
        highest = int(answer)
    except RuntimeError as error:  # all that torch raises here are
        told = str(error).strip().partition("\n")[0]
        raise InfrastructureError(
            f"rank {rank} of {distributed.get_world_size()} got no answer from the other ranks: "
            "one of them has ended or hangs, or does not ask as often as this one. "
            f"torch.distributed says: {told}"
        ) from error
    return None if highest < 0 else highest


def _group_in_main_memory(torch: Any, distributed: Any) -> Any:
    """A group of all ranks that reduces without a device.

    On a device the answer would come when all work is done that was queued before: to wait for
    it stalls the device once a step.
    """
    world = distributed.group.WORLD
    config = str(distributed.get_backend_config(world))  # such as "cpu:gloo,cuda:nccl"
    if any(part.startswith("cpu:") for part in config.split(",")):
        return world
    group = _beside.get(world)
    if group is None:
        group = distributed.new_group(backend="gloo", timeout=_timeout_of(world))
        _beside[world] = group
    return group


def _timeout_of(group: Any) -> timedelta | None:
    """How long a group waits for a rank; None where this version of torch does not tell."""
    with contextlib.suppress(AttributeError, IndexError, RuntimeError):
        timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
        return timeout
    return None
