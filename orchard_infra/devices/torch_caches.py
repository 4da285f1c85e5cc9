"""Giving memory back when a run ends: device caches, pinned host memory, the heap of this process.

Only what this process has initialised is flushed. torch is looked up in `sys.modules` and never
imported, no CUDA context is made, and nothing is called that could poison a later fork
(``torch.cuda.is_available()`` can).
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any, Protocol

import attrs
import psutil


class Flusher(Protocol):
    """What gives memory back at the end of a run, before the lock is released."""

    def flush(self, error: BaseException | None = None) -> FlushReport:
        """Give back what can be given back. ``error`` is the exception that ended the run, if any.

        A step that fails belongs into the report: what is raised here is taken for a failed
        release.
        """
        ...


@attrs.frozen
class DeviceMemory:
    """What torch's caching allocator held on one device, in bytes.

    ``device`` is a name as torch spells it, such as ``cuda:0``. Tensors that are still alive
    count too, before and after; the context of the process does not.
    """

    device: str
    before: int
    after: int

    @property
    def freed(self) -> int:
        return self.before - self.after


@attrs.frozen
class FlushReport:
    """What a flush did.

    ``devices`` has those that this process had initialised. ``rss_before`` and ``rss_after`` are
    the resident memory of this process in bytes, None where the system does not say.
    ``failures`` has one line for each step that failed; the other steps were done all the same.
    """

    devices: tuple[DeviceMemory, ...] = ()
    rss_before: int | None = None
    rss_after: int | None = None
    failures: tuple[str, ...] = ()

    @property
    def rss_freed(self) -> int | None:
        if self.rss_before is None or self.rss_after is None:
            return None
        return self.rss_before - self.rss_after


@attrs.frozen
class TorchCacheFlusher:
    """Collects garbage, then empties torch's device and pinned memory caches and trims the heap.

    A tensor that something still refers to stays. So do cuBLAS workspaces (some MiB for each
    stream): a captured CUDA graph holds their bare addresses, and its next replay would fault
    (https://github.com/pytorch/pytorch/issues/193402).

    ``trim_heap``: give free pages of the glibc heap back to the system (malloc_trim(3)). With
    another C library, or off Linux, nothing is done.

    ``clear_frames``: after an out-of-memory error, clear the local variables of the functions
    that its traceback went through; they keep their tensors alive for as long as the exception
    is kept. After any other error they stay, for debuggers and error reports.

    ``timeout``: seconds to wait for the devices. Freeing device memory waits for the kernels in
    flight, and a collective whose peer has died never ends: without a bound the crash of one rank
    would be a hang of the others, and the lock would stay. After it the flush goes on in the
    background while the run is released.
    """

    trim_heap: bool = True
    clear_frames: bool = True
    timeout: float = attrs.field(default=20.0, validator=attrs.validators.gt(0))

    def flush(self, error: BaseException | None = None) -> FlushReport:
        """Give the memory back; a step that fails is in the report, and the others go on.

        Only what is no `Exception` comes through, such as a Ctrl-C. ``error`` itself stays as it
        is, traceback included.
        """
        failures: list[str] = []
        rss_before = _resident_bytes()
        if error is not None and self.clear_frames:
            with _noting(failures, "frames of the traceback"):
                _clear_frames_after_out_of_memory(error)
        # Before the caches: a tensor in a cycle still owns its block.
        gc.collect()
        devices: tuple[DeviceMemory, ...] = ()
        with _noting(failures, "devices"):
            devices = _flush_devices(self.timeout, failures)
        if self.trim_heap:
            with _noting(failures, "heap"):
                _trim_heap()
        return FlushReport(devices, rss_before, _resident_bytes(), tuple(failures))


@contextlib.contextmanager
def _noting(failures: list[str], step: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A device error comes with a page of advice; one that cannot be printed must not matter.
        lines = "".join(traceback.format_exception_only(type(error), error)).splitlines()
        failures.append(f"{step}: {lines[0][:200]}")


# "can't allocate", "not enough memory": what torch's CPU allocator says on Linux and on Windows.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def _clear_frames_after_out_of_memory(error: BaseException) -> None:
    errors = list(_with_causes(error))
    if not any(_is_out_of_memory(one) for one in errors):
        return
    frames = [frame for one in errors for frame in _frames(one)]
    suspended = _suspended(frames)
    for frame in frames:
        if frame not in suspended:
            try:
                frame.clear()
            except RuntimeError:
                pass  # still executing: a function that is around the run, or another thread


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from, while handling, or together with; each one once."""
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


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    # By name, so that a torch that is not there need not be asked; CuPy's is called so, too.
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

    One that caught the error and went on is in its traceback, and before Python 3.13
    ``frame.clear()`` closes it: the caller's generator would end early, its ``finally`` run now.
    """
    owners = (GeneratorType, CoroutineType, AsyncGeneratorType)
    # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR, from the documentation of `inspect`.
    candidates = [frame for frame in frames if frame.f_code.co_flags & (0x20 | 0x80 | 0x200)]
    if not candidates:
        return set()
    # Nothing leads from a frame to its generator before Python 3.14.
    found = set()
    for owner in gc.get_referrers(*candidates):
        if isinstance(owner, owners):
            for name in ("gi_frame", "cr_frame", "ag_frame"):
                found.add(getattr(owner, name, None))
    return {frame for frame in candidates if frame in found}


def _flush_devices(timeout: float, failures: list[str]) -> tuple[DeviceMemory, ...]:
    torch = sys.modules.get("torch")
    backends = _initialised(torch, failures)
    if not backends:
        return ()
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    found: list[str] = []

    def flush() -> None:
        for name, backend in backends:
            with _noting(found, name):
                _flush_backend(torch, name, backend, before, after, found)

    # A thread can be waited for with a bound, and Ctrl-C ends the wait; a call into a driver
    # that does not return can neither be left nor interrupted.
    thread = threading.Thread(target=flush, name="orchard_infra flush", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        failures.append(f"devices: still busy after {timeout:g} s, left to go on by themselves")
    failures += list(found)
    return tuple(
        DeviceMemory(device, held, after.get(device, held)) for device, held in list(before.items())
    )


def _initialised(torch: Any, failures: list[str]) -> list[tuple[str, Any]]:
    """The back ends of torch that this process has used, by name. Asking initialises nothing.

    ``torch`` may be None, a module that is still being imported, or one that is only called so.
    """
    names = ["cuda", "xpu", "mtia"]  # ROCm is under cuda
    plugin = _look_up(torch, "_C._get_privateuse1_backend_name")
    if callable(plugin):
        with _noting(failures, "plug-in device"):
            names.append(plugin())
    backends = []
    for name in names:
        with _noting(failures, name):
            backend = _look_up(torch, name)
            is_initialized = _look_up(backend, "is_initialized")
            if not callable(is_initialized) or not callable(_look_up(backend, "empty_cache")):
                continue
            # False in a forked child, too: what is there belongs to the parent. True itself,
            # because a mock of torch says yes to everything.
            if is_initialized() is True:
                backends.append((name, backend))
    with _noting(failures, "mps"):
        if _mps_was_asked_for(torch):
            backends.append(("mps", torch.mps))
    return backends


def _mps_was_asked_for(torch: Any) -> bool:
    """Whether this process has asked for Metal and got it.

    torch.mps has no is_initialized, and its other functions make the device that they ask about.
    ``torch.backends.mps.is_available()`` remembers its answer: where it has one, asking again
    touches nothing. A process that used "mps" without ever asking is left alone.
    """
    is_available = _look_up(torch, "backends.mps.is_available")
    cache_info = _look_up(is_available, "cache_info")
    if not callable(cache_info) or cache_info().currsize != 1 or is_available() is not True:
        return False
    in_bad_fork = _look_up(torch, "mps._is_in_bad_fork")
    return not (callable(in_bad_fork) and in_bad_fork())


def _flush_backend(
    torch: Any,
    name: str,
    backend: Any,
    before: dict[str, int],
    after: dict[str, int],
    failures: list[str],
) -> None:
    if name == "mps":
        before[name] = int(backend.driver_allocated_memory())
        backend.empty_cache()
        after[name] = int(backend.driver_allocated_memory())
        return
    reserved = _look_up(backend, "memory_reserved")
    if not callable(reserved):
        backend.empty_cache()
        return
    used = []
    for index in range(backend.device_count()):
        with _noting(failures, f"{name}:{index}"):
            if _has_context(torch, name, reserved, index):
                used.append(index)
                before[f"{name}:{index}"] = int(reserved(index))
    if not used:
        return
    # The caches of all devices are emptied, but the call is made on the current one. On a device
    # that has no context yet it makes one, of some hundred MB
    # (https://github.com/pytorch/pytorch/issues/25752).
    select = _look_up(backend, "device")
    with select(used[0]) if callable(select) else contextlib.nullcontext():
        with _noting(failures, f"{name} cache"):
            backend.empty_cache()
        empty_pinned = _empty_pinned_cache(torch, name)
        if empty_pinned is not None:
            with _noting(failures, f"{name} pinned memory"):
                empty_pinned()
    for index in used:
        with _noting(failures, f"{name}:{index}"):
            after[f"{name}:{index}"] = int(reserved(index))


def _has_context(torch: Any, name: str, reserved: Callable[[int], int], index: int) -> bool:
    # Asks the driver, and makes none. Without it a device is in use if its allocator holds memory.
    probe = _look_up(torch, f"_C._{name}_hasPrimaryContext")
    return bool(probe(index)) if callable(probe) else reserved(index) > 0


def _empty_pinned_cache(torch: Any, name: str) -> Callable[[], None] | None:
    if name == "cuda":
        private = _look_up(torch, "_C._host_emptyCache")
        if callable(private):
            return private  # type: ignore[no-any-return]
    # The public name, since torch 2.12. No other back end caches pinned memory, and with one that
    # does not the call is a segmentation fault (https://github.com/pytorch/pytorch/issues/197561).
    public = _look_up(torch, "accelerator.empty_host_cache")
    return public if name in ("cuda", "xpu") and callable(public) else None


def _look_up(start: Any, path: str) -> Any:
    """The attribute at a dotted path, None where it stops."""
    for name in path.split("."):
        start = getattr(start, name, None)
    return start


def _trim_heap() -> None:
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    # musl has no malloc_trim. ctypes releases the GIL around the call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _resident_bytes() -> int | None:
    try:
        return int(psutil.Process().memory_info().rss)
    except (psutil.Error, OSError):
        return None
