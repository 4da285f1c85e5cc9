"""A question to all ranks of a job that `torch.distributed` has connected.

torch is used where the program has loaded it, and never imported.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from array import array
from datetime import timedelta
from typing import Any

import attrs

from orchard_infra.errors import InfrastructureError


@attrs.frozen(eq=False)
class _Ballot:
    """What one group of ranks votes with. It is kept from one question to the next: a tensor that
    is made anew each time costs as much as half of the reduction.
    """

    number: array[int]
    tensor: Any  # of the same memory
    group: Any  # None for the default group
    rank: int


# By default group, and for as long as that lives.
_ballots: weakref.WeakKeyDictionary[Any, _Ballot] = weakref.WeakKeyDictionary()


def any_rank(says_yes: bool) -> int | None:
    """The highest rank that says yes; None if none does. Every rank gets the same answer.

    Collective: every rank of the default group has to call it, as often as the others. Without an
    initialised group this process is asked alone, as rank 0.

    Raises:
        InfrastructureError: A rank has ended, or did not call it within the group's timeout.
    """
    distributed = sys.modules.get("torch.distributed")
    # Another thread may be importing it, so that names are missing.
    is_initialized = getattr(distributed, "is_initialized", None)
    if distributed is None or is_initialized is None or not is_initialized():
        return 0 if says_yes else None
    try:
        world = distributed.group.WORLD
        ballot = _ballots.get(world)
        if ballot is None:
            ballot = _ballots[world] = _make_ballot(distributed)
        ballot.number[0] = ballot.rank if says_yes else -1
        distributed.all_reduce(ballot.tensor, distributed.ReduceOp.MAX, ballot.group)
    except RuntimeError as error:  # all that torch raises here are
        told = str(error).strip().partition("\n")[0]
        raise InfrastructureError(
            f"rank {distributed.get_rank()} of {distributed.get_world_size()} got no answer from "
            "the other ranks: one of them has ended or hangs, or does not ask as often as this "
            f"one. torch.distributed says: {told}"
        ) from error
    highest = ballot.number[0]
    return None if highest < 0 else highest


def _make_ballot(distributed: Any) -> _Ballot:
    torch = sys.modules["torch"]
    number = array("i", [-1])
    return _Ballot(
        number=number,
        tensor=torch.frombuffer(number, dtype=torch.int32),
        group=_group_in_main_memory(distributed),
        rank=distributed.get_rank(),
    )


def _group_in_main_memory(distributed: Any) -> Any:
    """A group of all ranks that reduces without a device; None for the default one.

    On a device the answer would come when all work is done that was queued before: to wait for
    it stalls the device once a step. A group of NCCL alone gets one of gloo beside it.
    """
    config = str(distributed.get_backend_config())  # such as "cpu:gloo,cuda:nccl"
    if any(part.startswith("cpu:") for part in config.split(",")):
        return None
    timeout = _timeout_of(distributed.group.WORLD)
    return distributed.new_group(backend="gloo", timeout=timeout)


def _timeout_of(group: Any) -> timedelta | None:
    """How long a group waits for a rank; None where this version of torch does not tell."""
    with contextlib.suppress(AttributeError, IndexError, RuntimeError):
        timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
        return timeout
    return None
