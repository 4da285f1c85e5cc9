"""Flushing: memory goes back, nothing is initialised for it, and no step can spoil another.

No device is needed. Where a back end is used it is a stand-in, and the test says so; the real ones
are in tests/gpu. Tests of torch itself run it in a process of their own and are skipped without it.
"""

from __future__ import annotations

import asyncio
import builtins
import copy
import ctypes
import functools
import gc
import importlib.util
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from forking import ForkServer
from orchard_infra.devices.torch_caches import TorchCacheFlusher
from orchard_infra.environment import Environment
from orchard_infra.report import DeviceMemory
from orchard_infra.runs.record import describe_this_run
from support import run_python

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs torch, the CPU build will do"
)
needs_glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="needs a real glibc",
)

MIB = 1024 * 1024


def run(tmp_path: Path, source: str) -> str:
    """Run it in a Python of its own; what it printed."""
    script = run_python(tmp_path, source)
    assert script.finish() == 0, script.transcript()
    return script.output


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """Forks scripts that have imported torch: that takes two seconds each."""
    with ForkServer("torch", "orchard_infra.devices.torch_caches") as server:
        yield server


@pytest.fixture
def run_torch(tmp_path: Path, server: ForkServer) -> Callable[[str], str]:
    """Run it in a process of its own that has imported torch; what it printed."""

    def run(source: str) -> str:
        script = server.run_python(tmp_path, source)
        assert script.finish() == 0, script.transcript()
        return script.output

    return run


@pytest.fixture
def some_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a torch that has no devices."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())


# Nothing is initialised for it


def test_without_torch_it_stays_unimported(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
        import sys
        from orchard_infra.devices.torch_caches import TorchCacheFlusher
        report = TorchCacheFlusher().flush()
        # Nothing that takes long is done, either.
        print("ctypes" in sys.modules)
        report = TorchCacheFlusher().flush(MemoryError())
        print(report.devices, report.failures, report.rss_before > 0, report.rss_after > 0)
        print([name for name in sys.modules if name.partition(".")[0] == "torch"])
        """,
    )
    assert output.splitlines() == ["False", "() () True True", "[]"]


@needs_torch
def test_a_cuda_that_is_not_in_use_is_not_asked_anything(run_torch: Callable[[str], str]) -> None:
    output = run_torch(
        """
        import torch
        from orchard_infra.devices.torch_caches import TorchCacheFlusher

        called = []
        def recording(name):
            def recorded(*args, **kwargs):
                called.append(name)
                return 1
            return recorded

        # All that may look at a device, make one, or poison a later fork.
        for module in (torch.cuda, torch.xpu, torch.mps, torch.mtia, torch.accelerator):
            for name, value in list(vars(module).items()):
                is_function = callable(value) and not isinstance(value, type)
                if is_function and name not in ("is_initialized", "_is_in_bad_fork"):
                    setattr(module, name, recording(f"{module.__name__}.{name}"))
        for name in dir(torch._C):
            if name.startswith(("_cuda_", "_xpu_", "_mps_", "_accelerator_")):
                setattr(torch._C, name, recording(name))
        for name in (
            "_cuda_init", "_cuda_getDeviceCount", "_cuda_emptyCache", "_cuda_hasPrimaryContext",
            "_host_emptyCache",
        ):
            setattr(torch._C, name, recording(name))
        torch.backends.mps.is_available = recording("torch.backends.mps.is_available")

        report = TorchCacheFlusher().flush(RuntimeError("CUDA out of memory"))
        print(called, torch.cuda.is_initialized(), report.devices, report.failures)
        """,
    )
    assert output == "[] False () ()\n"


@needs_torch
def test_the_cpu_build_is_a_silent_no_op_where_torch_accelerator_raises(
    run_torch: Callable[[str], str],
) -> None:
    output = run_torch(
        """
        import torch
        from orchard_infra.devices.torch_caches import TorchCacheFlusher
        assert torch.zeros(3).sum() == 0
        if torch.accelerator.current_accelerator() is None:
            for empty_cache in (torch.accelerator.empty_cache, torch.mps.empty_cache):
                try:
                    empty_cache()
                except RuntimeError:
                    pass
                else:
                    raise SystemExit("it does not raise any more")
        report = TorchCacheFlusher().flush()
        print(report.devices, report.failures)
        """,
    )
    assert output == "() ()\n"


@pytest.mark.parametrize(
    "torch",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(cuda=None, _C=None, backends=None),
        SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True)),
        SimpleNamespace(cuda=SimpleNamespace(empty_cache=lambda: 1 / 0)),
        mock.MagicMock(),
    ],
    ids=["blocked", "empty", "half imported", "no empty_cache", "no is_initialized", "a mock"],
)
def test_a_torch_that_is_not_quite_torch_is_left_alone(
    torch: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    report = TorchCacheFlusher().flush()
    assert (report.devices, report.failures) == ((), ())
    if isinstance(torch, mock.MagicMock):
        assert not torch.cuda.empty_cache.called
        assert not torch.mps.empty_cache.called


# The memory of this process


@needs_glibc
@needs_torch
def test_the_memory_of_many_freed_small_tensors_goes_back(run_torch: Callable[[str], str]) -> None:
    output = run_torch(
        """
        import torch
        from orchard_infra.devices.torch_caches import TorchCacheFlusher

        flush = TorchCacheFlusher(trim_heap=False).flush
        tensors = [torch.ones(4096) for _ in range(20_000)]    # 16 KiB each, 312 MiB
        last = torch.ones(4096)         # above them all on the heap, as something always is
        del tensors
        kept = flush()
        report = TorchCacheFlusher().flush()
        print(kept.rss_freed, report.rss_freed, report.rss_before - report.rss_after)
        print(report.failures, report.devices)
        """,
    )
    numbers, rest = output.splitlines()
    untrimmed, trimmed, difference = map(int, numbers.split())
    assert rest == "() ()"
    assert untrimmed < 60 * MIB  # collecting garbage does not do it
    assert trimmed == difference
    assert trimmed > 250 * MIB


@pytest.mark.parametrize("library", ["musl", "broken"])
def test_without_malloc_trim_nothing_is_trimmed(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str | None) -> object:
        if library == "broken":
            raise OSError("no such library")
        return object()  # what has no malloc_trim

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", load)
    expected = ("heap: OSError: no such library",) if library == "broken" else ()
    assert TorchCacheFlusher().flush().failures == expected
    assert TorchCacheFlusher(trim_heap=False).flush().failures == ()


def test_another_system_is_not_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: 1 / 0)
    assert TorchCacheFlusher().flush().failures == ()


def garbage() -> weakref.ref[Held]:
    """What only the garbage collector can free."""
    held = Held()
    held.itself = held  # type: ignore[attr-defined]
    return weakref.ref(held)


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.usefixtures("no_collection", "some_torch")
def test_garbage_in_cycles_is_collected() -> None:
    alive = garbage()
    assert alive() is not None
    TorchCacheFlusher().flush()
    assert alive() is None


@pytest.mark.usefixtures("no_collection")
def test_without_torch_garbage_is_collected_only_after_an_out_of_memory_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes longer than the rest of a release."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    alive = garbage()
    TorchCacheFlusher().flush()
    TorchCacheFlusher().flush(ValueError())
    assert alive() is not None
    TorchCacheFlusher(clear_frames=False).flush(MemoryError())
    assert alive() is None


# After an out-of-memory error


class Held:
    """What a local variable keeps alive, such as a tensor."""


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def training(alive: list[weakref.ref[Held]], error: BaseException) -> None:
    batch = Held()
    alive.append(weakref.ref(batch))
    raise error


def caught(function: Callable[..., object], *arguments: object) -> BaseException:
    try:
        function(*arguments)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("2 GiB"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
    ids=str,
)
def test_what_only_the_traceback_of_an_out_of_memory_error_holds_dies(
    error: BaseException,
) -> None:
    alive: list[weakref.ref[Held]] = []
    kept = caught(training, alive, error)
    assert alive[0]() is not None
    assert TorchCacheFlusher().flush(kept).failures == ()
    assert alive[0]() is None


@pytest.mark.parametrize(
    "error",
    [ValueError("out of memory"), RuntimeError("mat1 and mat2 shapes"), KeyboardInterrupt()],
    ids=repr,
)
def test_after_any_other_error_the_variables_stay_for_the_debugger(error: BaseException) -> None:
    alive: list[weakref.ref[Held]] = []
    kept = caught(training, alive, error)
    TorchCacheFlusher().flush(kept)
    assert alive[0]() is not None


def test_a_copy_of_the_local_variables_that_a_debugger_has_made_is_cleared_as_well() -> None:
    def fail() -> None:
        tensor = Tensor()
        nonlocal alive
        alive = weakref.ref(tensor)
        raise MemoryError

    class Tensor:
        pass

    alive: weakref.ref[Tensor] | None = None
    try:
        fail()
    except MemoryError as error:
        kept = error
    assert kept.__traceback__ is not None
    inner = kept.__traceback__.tb_next
    assert inner is not None
    assert "tensor" in inner.tb_frame.f_locals  # what IPython and pytest do
    TorchCacheFlusher().flush(kept)
    gc.collect()
    assert alive is not None
    assert alive() is None


def test_clearing_frames_can_be_switched_off() -> None:
    alive: list[weakref.ref[Held]] = []
    kept = caught(training, alive, MemoryError())
    TorchCacheFlusher(clear_frames=False).flush(kept)
    assert alive[0]() is not None


def test_the_error_itself_stays_as_it_is() -> None:
    error = MemoryError("all of it", 42)
    error.__notes__ = ["in epoch 3"]  # type: ignore[attr-defined]
    error.payload = payload = Held()  # type: ignore[attr-defined]
    cause = ValueError()

    def run() -> None:
        batch = Held()
        raise error from cause if batch else None

    assert caught(run) is error
    lines, step = [], error.__traceback__
    while step is not None:
        lines.append((step.tb_frame.f_code.co_name, step.tb_lineno))
        step = step.tb_next
    traceback = error.__traceback__

    TorchCacheFlusher().flush(error)

    assert type(error) is MemoryError
    assert error.args == ("all of it", 42)
    assert error.__notes__ == ["in epoch 3"]  # type: ignore[attr-defined]
    assert error.payload is payload  # type: ignore[attr-defined]
    assert error.__cause__ is cause
    assert error.__traceback__ is traceback
    after, step = [], error.__traceback__
    while step is not None:
        after.append((step.tb_frame.f_code.co_name, step.tb_lineno))
        step = step.tb_next
    assert after == lines
    assert [name for name, _ in lines] == ["caught", "run"]


def raised_from(alive: list[weakref.ref[Held]]) -> None:
    raise ValueError("step 7 failed") from caught(training, alive, MemoryError())


def raised_while_handling(alive: list[weakref.ref[Held]]) -> None:
    try:
        training(alive, MemoryError())
    except MemoryError:
        training(alive, KeyError())


def raised_instead(alive: list[weakref.ref[Held]]) -> None:
    try:
        training(alive, MemoryError())
    except MemoryError:
        raise ValueError("too big") from None


def raised_in_a_circle(alive: list[weakref.ref[Held]]) -> None:
    first = caught(training, alive, MemoryError())
    second = caught(training, alive, ValueError())
    first.__cause__, second.__cause__ = second, first
    raise second


def raised_together(alive: list[weakref.ref[Held]]) -> None:
    errors = [caught(training, alive, ValueError()), caught(training, alive, MemoryError())]
    make = getattr(builtins, "ExceptionGroup", None)  # since Python 3.11
    if make is not None:
        raise make("ranks", [make("workers", errors)])
    group = ValueError("as a backport of exception groups does it")
    group.exceptions = tuple(errors)  # type: ignore[attr-defined]
    raise group


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (raised_from, 1),
        (raised_while_handling, 2),
        (raised_instead, 1),
        (raised_in_a_circle, 2),
        (raised_together, 2),
    ],
)
def test_an_out_of_memory_error_is_found_wherever_it_hides(
    function: Callable[..., object], count: int
) -> None:
    alive: list[weakref.ref[Held]] = []
    kept = caught(function, alive)
    assert len(alive) == count
    assert all(reference() is not None for reference in alive)
    assert TorchCacheFlusher().flush(kept).failures == ()
    assert [reference() for reference in alive] == [None] * count


def test_a_function_that_is_still_executing_keeps_its_variables() -> None:
    mine = Held()
    alive: list[weakref.ref[Held]] = []
    kept = None
    try:
        training(alive, MemoryError())
    except MemoryError as error:
        kept = error
        report = TorchCacheFlusher().flush(error)
    assert kept is not None
    assert report.failures == ()
    assert alive[0]() is None
    assert isinstance(mine, Held)


def test_a_generator_that_caught_the_error_and_goes_on_is_not_closed() -> None:
    ended: list[str] = []
    alive: list[weakref.ref[Held]] = []

    def steps() -> Iterator[object]:
        try:
            yield caught(training, alive, MemoryError())
            try:
                training(alive, MemoryError())
            except MemoryError as error:
                kept = error
            yield kept
            yield "smaller batches"
        finally:
            ended.append("closed")

    going_on = steps()
    next(going_on)
    error = next(going_on)
    assert isinstance(error, MemoryError)
    TorchCacheFlusher().flush(error)
    assert ended == []
    assert next(going_on) == "smaller batches"
    assert alive[1]() is None


def test_a_coroutine_that_caught_the_error_and_goes_on_is_not_closed() -> None:
    alive: list[weakref.ref[Held]] = []

    async def train(errors: asyncio.Queue[BaseException], go_on: asyncio.Event) -> str:
        try:
            training(alive, MemoryError())
        except MemoryError as error:
            errors.put_nowait(error)
        await go_on.wait()
        return "smaller batches"

    async def main() -> str:
        errors: asyncio.Queue[BaseException] = asyncio.Queue()
        go_on = asyncio.Event()
        task = asyncio.ensure_future(train(errors, go_on))
        TorchCacheFlusher().flush(await errors.get())
        go_on.set()
        return await task

    assert asyncio.run(main()) == "smaller batches"
    assert alive[0]() is None


def test_a_generator_that_the_error_ended_is_cleared() -> None:
    alive: list[weakref.ref[Held]] = []

    def batches() -> Iterator[int]:
        batch = Held()
        alive.append(weakref.ref(batch))
        yield 1
        raise MemoryError

    generator = batches()
    kept = caught(list, generator)
    assert alive[0]() is not None
    TorchCacheFlusher().flush(kept)
    assert alive[0]() is None


@needs_torch
def test_a_real_tensor_is_freed_after_a_real_out_of_memory_error(
    run_torch: Callable[[str], str],
) -> None:
    output = run_torch(
        """
        import weakref
        import torch
        from orchard_infra.devices.torch_caches import TorchCacheFlusher

        def train(refused):
            batch = torch.ones(1000)
            alive.append(weakref.ref(batch))
            if refused:
                raise torch.OutOfMemoryError("CUDA: 2 GiB")
            torch.empty(2**55, dtype=torch.uint8)         # more than there are addresses

        for refused in (True, False):
            alive = []
            try:
                train(refused)
            except RuntimeError as error:
                kept = error
            assert alive[0]() is not None
            report = TorchCacheFlusher().flush(kept)
            print(type(kept).__name__, alive[0](), report.failures)
        """,
    )
    assert output.splitlines() == ["OutOfMemoryError None ()", "RuntimeError None ()"]


# Devices, with stand-ins for the back ends of torch


class StandIn:
    """A back end of torch with some devices, made up: what is called, and where, is recorded."""

    def __init__(self, name: str, held: dict[int, int], devices: int | None = None) -> None:
        self.name = name
        self.held = held
        self.devices = max(held) + 1 if devices is None else devices
        self.initialised = True
        self.current = 0
        self.contexts = set(held)
        self.emptied_on: list[int] = []
        self.pinned = 64

    def is_initialized(self) -> bool:
        return self.initialised

    def device_count(self) -> int:
        return self.devices

    def memory_reserved(self, index: int) -> int:
        return self.held.get(index, 0)

    def device(self, index: int) -> Any:
        outer = self

        class Selected:
            def __enter__(self) -> None:
                self.before, outer.current = outer.current, index

            def __exit__(self, *exc_info: object) -> None:
                outer.current = self.before

        return Selected()

    def empty_cache(self) -> None:
        self.emptied_on.append(self.current)
        self.contexts.add(self.current)  # as the driver does
        self.held = dict.fromkeys(self.held, 1)

    def empty_pinned(self) -> None:
        self.contexts.add(self.current)
        self.pinned = 0


def fake_torch(*backends: StandIn, **more: object) -> Any:
    torch = SimpleNamespace(_C=SimpleNamespace(), **more)
    for backend in backends:
        setattr(torch, backend.name, backend)
        if backend.name == "cuda":
            torch._C._host_emptyCache = backend.empty_pinned
            torch._C._cuda_hasPrimaryContext = lambda index: index in cuda_contexts(torch)
    return torch


def cuda_contexts(torch: Any) -> set[int]:
    contexts: set[int] = torch.cuda.contexts
    return contexts


def test_every_device_in_use_is_emptied_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for cuda and xpu."""
    cuda, xpu = StandIn("cuda", {0: 500, 1: 700}), StandIn("xpu", {0: 90})
    torch = fake_torch(cuda, xpu, accelerator=SimpleNamespace(empty_host_cache=xpu.empty_pinned))
    monkeypatch.setitem(sys.modules, "torch", torch)
    report = TorchCacheFlusher().flush()
    assert report.devices == (
        DeviceMemory("cuda:0", before=500, after=1),
        DeviceMemory("cuda:1", before=700, after=1),
        DeviceMemory("xpu:0", before=90, after=1),
    )
    assert report.devices[1].freed == 699
    assert report.failures == ()
    assert (cuda.pinned, xpu.pinned) == (0, 0)


def test_no_context_is_made_on_a_device_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for cuda that makes a context wherever it is called, as the driver does."""
    cuda = StandIn("cuda", {2: 700}, devices=4)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda))
    report = TorchCacheFlusher().flush()
    assert report.devices == (DeviceMemory("cuda:2", before=700, after=1),)
    assert cuda.emptied_on == [2]
    assert cuda.contexts == {2}
    assert cuda.current == 0


def test_without_any_context_there_is_nothing_to_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a cuda that is initialised, and on which nothing was ever put."""
    cuda = StandIn("cuda", {}, devices=2)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda))
    report = TorchCacheFlusher().flush()
    assert (report.devices, report.failures) == ((), ())
    assert cuda.contexts == set()


def test_a_back_end_that_is_not_initialised_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for cuda, as it is in a forked child: built, and not to be touched."""
    cuda = StandIn("cuda", {0: 500})
    cuda.initialised = False
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda))
    assert TorchCacheFlusher().flush().devices == ()
    assert cuda.emptied_on == []
    assert cuda.pinned == 64


def test_pinned_memory_is_emptied_by_the_public_name_where_the_private_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for cuda in a later torch; and for one before 2.6, which has neither name."""
    cuda = StandIn("cuda", {0: 500})
    torch = fake_torch(cuda, accelerator=SimpleNamespace(empty_host_cache=cuda.empty_pinned))
    del torch._C._host_emptyCache
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert TorchCacheFlusher().flush().failures == ()
    assert cuda.pinned == 0
    del torch.accelerator, torch._C._cuda_hasPrimaryContext
    cuda.held = {0: 500}
    report = TorchCacheFlusher().flush()
    assert report.failures == ()
    assert report.devices == (DeviceMemory("cuda:0", before=500, after=1),)


def test_no_pinned_memory_is_emptied_for_a_back_end_that_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for mtia: torch.accelerator.empty_host_cache() would crash the process."""
    mtia = StandIn("mtia", {0: 500})
    torch = fake_torch(mtia, accelerator=SimpleNamespace(empty_host_cache=lambda: 1 / 0))
    monkeypatch.setitem(sys.modules, "torch", torch)
    report = TorchCacheFlusher().flush()
    assert report.failures == ()
    assert report.devices == (DeviceMemory("mtia:0", before=500, after=1),)


@pytest.mark.parametrize("asked", [True, False])
def test_mps_is_emptied_only_where_somebody_asked_for_it(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for Apple's back end, which cannot say whether it is initialised."""
    touched: list[str] = []
    held = [300]

    @functools.lru_cache
    def is_available() -> bool:
        touched.append("device made")
        return True

    def empty_cache() -> None:
        held[0] = 20

    mps = SimpleNamespace(empty_cache=empty_cache, driver_allocated_memory=lambda: held[0])
    backends = SimpleNamespace(mps=SimpleNamespace(is_available=is_available))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(mps=mps, backends=backends))
    if asked:
        is_available()
    report = TorchCacheFlusher().flush()
    assert report.failures == ()
    assert report.devices == ((DeviceMemory("mps", before=300, after=20),) if asked else ())
    assert len(touched) == int(asked)


@needs_torch
def test_a_plug_in_device_is_emptied(run_torch: Callable[[str], str]) -> None:
    """The device is made up, and registered with the real torch as vendors do it."""
    output = run_torch(
        """
        import types
        import torch
        from orchard_infra.devices.torch_caches import TorchCacheFlusher

        module = types.ModuleType("orchard")
        held = {"orchard": 800}
        module.is_initialized = lambda: started
        module.device_count = lambda: 1
        module.memory_reserved = lambda index: held["orchard"]
        module.empty_cache = lambda: held.update(orchard=5)
        module._is_in_bad_fork = lambda: False
        torch.utils.rename_privateuse1_backend("orchard")
        torch._register_device_module("orchard", module)
        for started in (False, True):
            print(TorchCacheFlusher().flush().devices)
        """,
    )
    assert output.splitlines() == [
        "()",
        "(DeviceMemory(device='orchard:0', before=800, after=5),)",
    ]


# Failures


def test_a_device_assert_is_a_line_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a cuda whose context is dead; the other back end is emptied all the same."""

    def dead() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be")

    cuda, xpu = StandIn("cuda", {0: 500}), StandIn("xpu", {0: 90})
    monkeypatch.setattr(cuda, "empty_cache", dead)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda, xpu))
    report = TorchCacheFlusher().flush(MemoryError())
    assert report.failures == (
        "cuda cache: RuntimeError: CUDA error: device-side assert triggered",
    )
    assert report.devices == (
        DeviceMemory("cuda:0", before=500, after=500),
        DeviceMemory("xpu:0", before=90, after=1),
    )
    assert cuda.pinned == 0
    assert report.rss_after is not None


@pytest.mark.parametrize(
    "name", ["is_initialized", "device_count", "memory_reserved", "device", "empty_cache"]
)
def test_whatever_raises_it_is_reported_and_not_raised(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins: one back end of which a single function fails, and a healthy one."""

    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ValueError

    def fail(*args: object) -> None:
        raise Unprintable

    cuda, xpu = StandIn("cuda", {0: 500}), StandIn("xpu", {0: 90})
    monkeypatch.setattr(cuda, name, fail)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda, xpu))
    report = TorchCacheFlusher().flush()
    assert report.failures
    assert all("Unprintable" in failure for failure in report.failures)
    assert DeviceMemory("xpu:0", before=90, after=1) in report.devices


def test_a_failure_is_one_short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a cuda that has a lot to say."""

    def fail() -> None:
        raise RuntimeError("z" * 10_000 + "\nmore")

    cuda = StandIn("cuda", {0: 500})
    monkeypatch.setattr(cuda, "empty_cache", fail)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda))
    (failure,) = TorchCacheFlusher().flush().failures
    assert failure.startswith("cuda cache: RuntimeError: zzz")
    assert len(failure) < 250


def test_an_error_that_cannot_be_walked_is_reported_and_not_raised() -> None:
    class Awkward(MemoryError):
        @property
        def exceptions(self) -> object:
            raise ValueError("no")

    report = TorchCacheFlusher().flush(Awkward())
    assert report.failures == ("frames of the traceback: ValueError: no",)
    assert report.rss_after is not None


def test_a_device_that_never_answers_is_waited_for_only_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for a cuda that waits for a collective whose peer is dead."""
    answer = threading.Event()
    cuda = StandIn("cuda", {0: 500})
    monkeypatch.setattr(cuda, "empty_cache", lambda: answer.wait(60) or 1 / 0)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda))
    try:
        report = TorchCacheFlusher(timeout=0.02).flush()
        waiting = [thread for thread in threading.enumerate() if "flush" in thread.name]
        assert report.failures == ("devices: still busy after 0.02 s, left to go on by themselves",)
        assert report.devices == (DeviceMemory("cuda:0", before=500, after=500),)
        assert [thread.daemon for thread in waiting] == [True]  # does not keep the process alive
    finally:
        answer.set()
    for thread in waiting:
        thread.join(10)


def test_ctrl_c_comes_through_even_while_a_device_does_not_answer(tmp_path: Path) -> None:
    """A stand-in for cuda that asks for the signal itself, when the flush waits for it."""
    output = run(
        tmp_path,
        """
        import os, signal, sys, threading, time
        from types import SimpleNamespace
        from orchard_infra.devices.torch_caches import TorchCacheFlusher

        def empty_cache():
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(60)

        sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(
            is_initialized=lambda: True, device_count=lambda: 1,
            memory_reserved=lambda index: 500, empty_cache=empty_cache,
        ))
        started = time.monotonic()
        try:
            TorchCacheFlusher(timeout=50).flush()
        except KeyboardInterrupt:
            print("stopped", time.monotonic() - started < 30)
        """,
    )
    assert output == "stopped True\n"


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_timeout_is_a_positive_number(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        TorchCacheFlusher(timeout=timeout)


# Around a run


@pytest.fixture
def env() -> Environment:
    return Environment(describe_this_run("digits"), Path("/x.lock"))


def test_the_flush_comes_when_the_run_ends(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for cuda."""
    cuda = StandIn("cuda", {0: 500})
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda))
    with TorchCacheFlusher().around(env):
        assert cuda.emptied_on == []
        assert env.report.flushed is None
    assert env.report.flushed is not None
    assert env.report.flushed.devices == (DeviceMemory("cuda:0", before=500, after=1),)


def test_the_flush_is_told_of_the_error_that_ended_the_run(env: Environment) -> None:
    alive: list[weakref.ref[Held]] = []
    with pytest.raises(MemoryError) as caught, TorchCacheFlusher().around(env):
        training(alive, MemoryError())
    assert alive[0]() is None
    assert caught.value.__traceback__ is not None


def test_a_run_that_went_well_while_another_error_was_handled_is_not_taken_for_a_failed_one(
    env: Environment,
) -> None:
    alive: list[weakref.ref[Held]] = []
    kept = caught(training, alive, MemoryError())
    try:
        raise kept
    except MemoryError:
        with TorchCacheFlusher().around(env):
            pass
    assert alive[0]() is not None


def test_a_failure_is_a_warning_and_in_the_report(
    env: Environment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stand-in for a cuda whose context is dead."""
    cuda = StandIn("cuda", {0: 500})
    monkeypatch.setattr(cuda, "empty_cache", lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(cuda))
    with TorchCacheFlusher().around(env):
        pass
    words = "cuda cache: ZeroDivisionError: division by zero"
    assert env.report.flushed is not None
    assert env.report.flushed.failures == (words,)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"device caches: {words}")
    ]


def test_a_flusher_holds_nothing_of_a_run_and_serves_several_at_once(env: Environment) -> None:
    flusher = TorchCacheFlusher(timeout=7.0)
    other = Environment(describe_this_run("other"), Path("/y.lock"))
    with flusher.around(env):
        with flusher.around(other):
            assert pickle.loads(pickle.dumps(flusher)) == copy.deepcopy(flusher) == flusher
        assert env.report.flushed is None
    assert env.report.flushed is not None
    assert other.report.flushed is not None


def test_at_interpreter_exit_a_device_is_no_failure(tmp_path: Path) -> None:
    """A stand-in for cuda. From Python 3.12 on no thread can be started then."""
    output = run(
        tmp_path,
        """
        import atexit, sys
        from types import SimpleNamespace
        from orchard_infra.devices.torch_caches import TorchCacheFlusher

        sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(
            is_initialized=lambda: True, device_count=lambda: 1,
            memory_reserved=lambda index: 500, empty_cache=lambda: None,
        ))
        atexit.register(lambda: print(TorchCacheFlusher().flush().failures))
        """,
    )
    assert output == "()\n"
