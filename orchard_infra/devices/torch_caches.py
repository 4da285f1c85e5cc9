"""Giving memory back when a run ends: device caches, pinned host memory, the heap of this process.

Only what this process has initialised is flushed. torch is looked up in `sys.modules` and never
imported, no device context is made, and nothing is called that could break a later fork
(``torch.cuda.is_available()`` can).
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import attrs

from orchard_infra.devices import heap
from orchard_infra.devices.out_of_memory import clear_frames, is_out_of_memory
from orchard_infra.environment import Environment
from orchard_infra.report import DeviceMemory, FlushReport


@attrs.frozen
class TorchCacheFlusher:
    """Collects garbage, then empties torch's device and pinned memory caches and trims the heap.

    A tensor that something still refers to stays. So do cuBLAS workspaces (some MiB for each
    stream): a captured CUDA graph holds their bare addresses, and its next replay would fault
    (https://github.com/pytorch/pytorch/issues/193402).

    In a process that has not loaded torch no garbage is collected: that takes longer than all the
    rest of a release, and frees no device.

    ``trim_heap``: give free pages of the glibc heap back to the system (malloc_trim(3)). With
    another C library, or off Linux, nothing is done.

    ``clear_frames``: after an out-of-memory error, clear the local variables of the functions
    that its traceback goes through; they keep their tensors alive for as long as the exception
    is kept. After any other error they stay, for debuggers and error reports.

    ``timeout``: seconds to wait for the devices. Freeing device memory waits for the kernels in
    flight, and a collective whose peer has died never ends: without a bound the crash of one rank
    would be a hang of the others, and the lock would never be released. After the timeout the
    flush goes on in the background, and the release counts as failed.
    """

    trim_heap: bool = True
    clear_frames: bool = True
    timeout: float = attrs.field(default=20.0, validator=attrs.validators.gt(0))

    def around(self, env: Environment) -> _FlushAtExit:
        """Flush when the run ends. What was done is in ``env.report.flushed``."""
        return _FlushAtExit(self, env)

    def flush(self, error: BaseException | None = None) -> FlushReport:
        """Give the memory back. ``error`` is the exception that ended the run, if there is one.

        A step that fails is in the report, and the others go on. Only what is not an `Exception`
        is raised, such as a Ctrl-C. ``error`` itself stays as it is, traceback included.
        """
        failures: list[str] = []
        rss_before = heap.resident_bytes()
        out_of_memory = False
        if error is not None:
            with _noting(failures, "frames of the traceback"):
                out_of_memory = is_out_of_memory(error)
                if out_of_memory and self.clear_frames:
                    clear_frames(error)
        torch = sys.modules.get("torch")
        devices: tuple[DeviceMemory, ...] = ()
        if torch is not None or out_of_memory:
            gc.collect()  # before the caches: a tensor in a cycle still owns its block
        if torch is not None:
            with _noting(failures, "devices"):
                devices = _flush_devices(torch, self.timeout, failures)
        # What fills the heap (numpy, torch) has loaded ctypes. Importing it takes 2 ms.
        if self.trim_heap and (out_of_memory or "ctypes" in sys.modules):
            with _noting(failures, "heap"):
                heap.trim()
        return FlushReport(devices, rss_before, heap.resident_bytes(), tuple(failures))


@attrs.frozen(eq=False, repr=False)
class _FlushAtExit:
    # No generator: its frame would be in the traceback, and would hold the error.
    flusher: TorchCacheFlusher
    env: Environment

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        report = self.flusher.flush(error)
        self.env.report.flushed = report
        for failure in report.failures:
            self.env.logger.warning("device caches: %s", failure)
        for memory in report.devices:
            self.env.logger.debug(
                "device caches: %d of %d bytes freed on %s",
                memory.freed,
                memory.before,
                memory.device,
            )


@contextlib.contextmanager
def _noting(failures: list[str], step: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A device error comes with a page of advice; one that cannot be printed must not matter.
        lines = "".join(traceback.format_exception_only(type(error), error)).splitlines()
        failures.append(f"{step}: {lines[0][:200]}")


def _flush_devices(torch: Any, timeout: float, failures: list[str]) -> tuple[DeviceMemory, ...]:
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
    thread = threading.Thread(target=flush, name="orchard-infra-flush", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        if threading.main_thread().is_alive():
            raise
        return ()  # at interpreter exit: the memory goes back with the process
    thread.join(timeout)
    if thread.is_alive():
        failures.append(f"devices: still busy after {timeout:g} s, left to go on by themselves")
    failures += list(found)
    return tuple(
        DeviceMemory(device, held, after.get(device, held)) for device, held in list(before.items())
    )


def _initialised(torch: Any, failures: list[str]) -> list[tuple[str, Any]]:
    """The back ends of torch that this process has used, by name. Asking initialises nothing.

    ``torch`` may be a module that is still being imported, or another one of that name.
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
