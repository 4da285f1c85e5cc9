"""Real device memory, before and after, as a second process sees it.

For a machine with an NVIDIA or AMD GPU: ``make test-gpu``. The second process has a context of
its own and asks the driver how much is free. Each test moves a gigabyte or more and allows for
half of it, because others may use the device meanwhile.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from support import run_python

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch"),
]

GIB = 1024**3


@pytest.fixture
def free(tmp_path: Path) -> Callable[[], list[int]]:
    """How many bytes are free on each device just now, asked from another process.

    The test process itself never touches a device: its context would be in the way.
    """
    observer = run_python(
        tmp_path,
        """
        import torch
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        print("devices", count)
        for number in range(1_000_000):
            input()
            print("free", number, [torch.cuda.mem_get_info(i)[0] for i in range(count)])
        """,
        name="observer.py",
    )
    if observer.wait_for("devices") == "devices 0":
        pytest.skip("needs a real GPU")
    asked = iter(range(1_000_000))

    def ask() -> list[int]:
        number = next(asked)
        observer.tell()
        numbers = ast.literal_eval(observer.wait_for(f"free {number} ").split(" ", 2)[2])
        return [int(one) for one in numbers]

    ask()  # its contexts are made by the first answer
    return ask


def test_a_finished_run_has_given_its_memory_back_when_the_next_one_gets_the_lock(
    tmp_path: Path, free: Callable[[], list[int]]
) -> None:
    first = run_python(
        tmp_path,
        """
        import torch
        from orchard_infra import managed_environment

        def train():
            return torch.ones(2 * 1024**3, dtype=torch.uint8, device="cuda").max().item()

        with managed_environment("vram"):
            train()
            print("cached", torch.cuda.memory_reserved())
            input()
        input()     # the process lives on, and with it its context
        """,
        name="first.py",
    )
    first.wait_for("cached")
    second = run_python(
        tmp_path,
        """
        import torch
        from orchard_infra import FileLock, InfrastructureManager, managed_environment

        torch.cuda.mem_get_info(0)      # the context, before it counts
        manager = InfrastructureManager(locker=FileLock(timeout=None))
        print("waiting")
        with managed_environment("vram", manager=manager):
            print("free", torch.cuda.mem_get_info(0)[0])
        """,
        name="second.py",
    )
    second.wait_for("waiting")
    held = free()[0]
    first.tell()
    given = int(second.wait_for("free").split()[1])
    assert given - held > GIB
    assert first.poll() is None
    assert second.finish() == 0
    first.tell()
    assert first.finish() == 0


def test_a_flush_after_an_out_of_memory_error_frees_the_device(
    tmp_path: Path, free: Callable[[], list[int]]
) -> None:
    script = run_python(
        tmp_path,
        """
        import torch
        from orchard_infra import TorchCacheFlusher

        def train():
            hoard = []
            while True:
                hoard.append(torch.ones(512 * 1024**2, dtype=torch.uint8, device="cuda"))

        # A limit of this process, so that nobody else on the device runs out of memory.
        total = torch.cuda.mem_get_info(0)[1]
        torch.cuda.set_per_process_memory_fraction(3 * 1024**3 / total)
        try:
            train()
        except torch.OutOfMemoryError as error:
            kept = error
        print("kept", torch.cuda.memory_allocated())
        input()
        report = TorchCacheFlusher().flush(kept)
        print("flushed", report.devices[0].before, report.devices[0].after, *report.failures)
        assert kept.__traceback__.tb_next.tb_frame.f_code.co_name == "train"
        input()
        """,
    )
    script.wait_for("kept")
    held = free()[0]
    script.tell()
    before, after, *failures = script.wait_for("flushed").split()[1:]
    assert failures == []
    assert int(before) > 2 * GIB
    assert int(after) < GIB // 8
    assert free()[0] - held > GIB
    script.tell()
    assert script.finish() == 0


def test_every_device_that_was_used_is_emptied(
    tmp_path: Path, free: Callable[[], list[int]]
) -> None:
    script = run_python(
        tmp_path,
        """
        import torch
        from orchard_infra import TorchCacheFlusher

        for index in range(torch.cuda.device_count()):
            torch.ones(1024**3, dtype=torch.uint8, device=f"cuda:{index}")
        print("cached")
        input()
        report = TorchCacheFlusher().flush()
        print("flushed", [(one.device, one.freed) for one in report.devices])
        input()
        """,
    )
    script.wait_for("cached")
    held = free()
    script.tell()
    freed = ast.literal_eval(script.wait_for("flushed").split(" ", 1)[1])
    given = free()
    assert [device for device, _ in freed] == [f"cuda:{index}" for index in range(len(held))]
    assert all(size >= GIB for _, size in freed)
    assert all(after - before > GIB // 2 for before, after in zip(held, given, strict=True))
    script.tell()
    assert script.finish() == 0


def test_no_context_is_made_on_the_first_device_for_a_run_on_the_last(
    tmp_path: Path, free: Callable[[], list[int]]
) -> None:
    """`torch.cuda.empty_cache()` by itself makes one there, of some hundred MB."""
    last = len(free()) - 1
    if last == 0:
        pytest.skip("needs a real second GPU")
    script = run_python(
        tmp_path,
        f"""
        import torch
        from orchard_infra import TorchCacheFlusher

        torch.ones(1024**2, device="cuda:{last}")
        report = TorchCacheFlusher().flush()
        print([one.device for one in report.devices], torch._C._cuda_hasPrimaryContext(0))
        """,
    )
    assert script.finish() == 0, script.transcript()
    assert script.output == f"['cuda:{last}'] False\n"


def test_a_cuda_that_is_not_in_use_stays_so_and_a_later_fork_may_use_it(
    tmp_path: Path, free: Callable[[], list[int]]
) -> None:
    script = run_python(
        tmp_path,
        """
        import os
        import torch
        from orchard_infra import TorchCacheFlusher

        report = TorchCacheFlusher().flush(MemoryError())
        print(report.devices, report.failures, torch.cuda.is_initialized(), flush=True)
        child = os.fork()
        if child == 0:
            print(torch.ones(3, device="cuda").sum().item(), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """,
    )
    assert script.finish() == 0, script.transcript()
    assert script.output.splitlines() == ["() () False", "3.0"]


def test_pinned_memory_goes_back(tmp_path: Path, free: Callable[[], list[int]]) -> None:
    script = run_python(
        tmp_path,
        """
        import torch
        from orchard_infra import TorchCacheFlusher

        pinned = torch.ones(256 * 1024**2, dtype=torch.uint8).pin_memory()
        pinned.to("cuda")
        del pinned
        before = torch.cuda.host_memory_stats()["num_host_free"]
        report = TorchCacheFlusher().flush()
        print(torch.cuda.host_memory_stats()["num_host_free"] - before, report.failures)
        """,
    )
    assert script.finish() == 0, script.transcript()
    assert script.output == "1 ()\n"


def test_a_device_assert_hides_no_error_and_keeps_no_lock(
    tmp_path: Path, free: Callable[[], list[int]]
) -> None:
    script = run_python(
        tmp_path,
        """
        import torch
        from orchard_infra import managed_environment

        try:
            with managed_environment("vram") as env:
                values = torch.zeros(1024**2, device="cuda")
                values[torch.tensor([2**30], device="cuda")].cpu()
        except RuntimeError as error:
            print("device-side assert" in str(error), env.lock_path.exists(), flush=True)
        """,
    )
    assert script.finish() == 0, script.transcript()
    assert script.output == "True False\n"
