"""Out-of-memory errors: telling one from other errors, and freeing what its traceback holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType

# "can't allocate", "not enough memory": what torch's CPU allocator says on Linux and on Windows.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error, or one that led to it, says that there is no memory left."""
    return any(_says_so(one) for one in _with_causes(error))


def clear_frames(error: BaseException) -> None:
    """Clear the local variables of the functions that the traceback goes through, and of those
    below the causes. They keep their tensors alive for as long as the exception is kept.

    Functions that still run keep theirs. The error itself stays as it is, traceback included.
    """
    frames = [frame for one in _with_causes(error) for frame in _frames(one)]
    suspended = _suspended(frames)
    for frame in frames:
        if frame not in suspended:
            try:
                frame.clear()
            except RuntimeError:
                continue  # still executing: a function that is around the run, or another thread
            # Before Python 3.13 who has looked at them (IPython, a debugger, pytest) has left a
            # copy in the frame. To look again brings it up to date: it is empty then.
            _ = frame.f_locals


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """``error``, its causes and contexts, and the members of groups; each one once."""
    seen: set[int] = set()
    pending: list[object] = [error]
    while pending:
        one = pending.pop()
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        pending += (one.__cause__, one.__context__)
        members = getattr(one, "exceptions", ())  # an exception group, a backport's too
        if isinstance(members, (tuple, list)):
            pending += members


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    # By name, so that torch need not be imported. The error of CuPy has the same name.
    if any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error).lower()
    return any(words in message for words in _OUT_OF_MEMORY)


def _frames(error: BaseException) -> Iterator[FrameType]:
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame
        step = step.tb_next


def _suspended(frames: list[FrameType]) -> set[FrameType]:
    """The frames of generators and coroutines that somebody may still resume.

    A generator that caught the error and went on is in its traceback. Before Python 3.13
    ``frame.clear()`` closes it: the generator would end early, and run its ``finally`` now.
    """
    owners = (GeneratorType, CoroutineType, AsyncGeneratorType)
    # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR, from the documentation of `inspect`.
    candidates = [frame for frame in frames if frame.f_code.co_flags & (0x20 | 0x80 | 0x200)]
    if not candidates:
        return set()
    # Before Python 3.14 a frame has no reference to its generator.
    found = set()
    for owner in gc.get_referrers(*candidates):
        if isinstance(owner, owners):
            for name in ("gi_frame", "cr_frame", "ag_frame"):
                found.add(getattr(owner, name, None))
    return {frame for frame in candidates if frame in found}
