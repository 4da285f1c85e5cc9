"""A real Jupyter kernel: environments over several cells, and what a failed cell leaves."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchard_infra import RunRegistry
from support import wait_until

EXAMPLE = Path(__file__).parents[2] / "examples" / "notebooks" / "digits.ipynb"


class Kernel:
    """A kernel, and the cells that it has run."""

    def __init__(self, directory: Path) -> None:
        import nbformat
        from nbclient import NotebookClient

        self.directory = directory
        self.notebook = nbformat.v4.new_notebook()
        self.client = NotebookClient(
            self.notebook, timeout=120, kernel_name="python3", resources={"metadata": {}}
        )
        self.client.resources["metadata"]["path"] = str(directory)
        self._context = self.client.setup_kernel()
        self._context.__enter__()
        self.pid = int(self.run("import os; print(os.getpid())"))

    def run(self, source: str, *, fails: bool = False) -> str:
        """Run one cell; what it printed, or its error, or the text of its result."""
        import nbformat
        from nbclient.exceptions import CellExecutionError

        cell = nbformat.v4.new_code_cell(source)
        self.notebook.cells.append(cell)
        try:
            self.client.execute_cell(cell, len(self.notebook.cells) - 1)
            failed = False
        except CellExecutionError:
            failed = True
        text = "".join(_text(output) for output in cell.outputs)
        assert failed == fails, text
        self.html = "".join(
            output["data"].get("text/html", "") for output in cell.outputs if "data" in output
        )
        return text.strip()

    def restart(self, *, now: bool = False) -> None:
        from jupyter_core.utils import run_sync

        run_sync(self.client.km.restart_kernel)(now=now)
        run_sync(self.client.kc.wait_for_ready)(timeout=60)
        self.pid = int(self.run("import os; print(os.getpid())"))
        self.run("from orchard_infra import managed_environment, current_environments")

    def close(self) -> None:
        self._context.__exit__(None, None, None)


def _text(output) -> str:
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return re.sub(r"\x1b\[[0-9;]*m", "", f"{output.ename}: {output.evalue}")
    return output.data.get("text/plain", "")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    pytest.importorskip("nbclient", reason="needs nbclient, not installed: make test-frameworks")
    pytest.importorskip("ipykernel", reason="needs ipykernel, not installed: make test-frameworks")
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    yield kernel
    kernel.close()


@pytest.fixture
def kernel(shared: Kernel) -> Iterator[Kernel]:
    shared.run(
        "import gc, weakref, orchard_infra\n"
        "from orchard_infra import managed_environment, current_environments"
    )
    yield shared
    shared.run("for one in current_environments(): one.close()")


def test_an_environment_lasts_from_one_cell_to_another(kernel: Kernel) -> None:
    kernel.run("run = managed_environment('cells')\nenv = run.open()")
    kernel.run("name = env.tmp_dir / 'part'; name.write_text('x'); assert env.is_locked")
    assert kernel.run("env.verify(); print(env.lock_path.exists())") == "True"
    kernel.run("run.close(); run.close()")
    assert kernel.run("print(env.lock_path.exists(), env.tmp_dir.exists())") == "False False"


def test_a_cell_that_opens_is_run_twice(kernel: Kernel) -> None:
    cell = "env = managed_environment('twice').open()"
    kernel.run(cell)
    message = kernel.run(cell, fails=True)
    assert "already holds" in message
    assert "current_environments()" in message
    again = "env = managed_environment('twice').open(reopen=True)"
    for _ in range(2):
        kernel.run(again)
        assert kernel.run("print(len(current_environments()), env.is_locked)") == "1 True"


def test_reopening_leaves_other_projects_alone(kernel: Kernel) -> None:
    kernel.run("other = managed_environment('other').open()")
    kernel.run("env = managed_environment('mine').open(reopen=True)")
    cell = "with managed_environment('block'): managed_environment('mine').open(reopen=True)"
    kernel.run(cell)
    names = kernel.run("print(*sorted(one.run.project for one in current_environments()))")
    assert names == "mine other"
    assert kernel.run("other.verify(); print(other.is_locked)") == "True"


def test_a_block_is_never_reopened_from_within(kernel: Kernel) -> None:
    message = kernel.run(
        "with managed_environment('block'):\n    managed_environment('block').open(reopen=True)",
        fails=True,
    )
    assert "already holds" in message
    assert kernel.run("print(len(current_environments()))") == "0"


def test_interrupting_the_kernel_leaves_the_environment_open(kernel: Kernel) -> None:
    kernel.run("env = managed_environment('interrupted').open()")
    marker = kernel.directory / "looping"
    started = f"open({str(marker)!r}, 'w').close()"

    def interrupt() -> None:
        wait_until(marker.exists)
        os.kill(kernel.pid, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert "KeyboardInterrupt" in kernel.run(f"{started}\nwhile True: pass", fails=True)
    thread.join()
    assert kernel.run("env.verify(); print(env.is_locked, env.stop_requested)") == "True None"
    kernel.run("env.close()")
    assert kernel.run("print(env.lock_path.exists())") == "False"


def test_interrupting_a_block_releases_it(kernel: Kernel) -> None:
    marker = kernel.directory / "in-a-block"

    def interrupt() -> None:
        wait_until(marker.exists)
        os.kill(kernel.pid, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    cell = f"""
with managed_environment('block') as env:
    open({str(marker)!r}, 'w').close()
    while True: pass
"""
    assert "KeyboardInterrupt" in kernel.run(cell, fails=True)
    thread.join()
    assert kernel.run("print(env.lock_path.exists(), env.tmp_dir.exists())") == "False False"


def test_a_cell_may_await_an_environment(kernel: Kernel) -> None:
    cell = """
import asyncio
async with managed_environment('awaited') as env:
    await asyncio.sleep(0)
    print(env.is_locked)
"""
    assert kernel.run(cell) == "True"
    assert kernel.run("print(env.lock_path.exists())") == "False"


def test_another_cell_s_environment_is_waited_for_in_a_task(kernel: Kernel) -> None:
    """The event loop of the kernel goes on, so a task that waits gets the lock in the end."""
    kernel.run("held = managed_environment('tasks').open()")
    cell = """
async def second():
    async with managed_environment('tasks', timeout=60) as env:
        return env.is_locked
task = asyncio.ensure_future(second())
await asyncio.sleep(0)
held.close()
print(await task)
"""
    assert kernel.run("import asyncio" + cell) == "True"


class Big:
    """In a cell: something that a failed function or an output keeps alive."""

    SOURCE = """
class Big:
    def __init__(self): self.data = bytearray(1 << 20)
def fail():
    big = Big()
    global alive
    alive = weakref.ref(big)
    raise ValueError('the model is bad')
"""


def test_flush_frees_what_a_failed_cell_holds(kernel: Kernel) -> None:
    kernel.run(Big.SOURCE)
    assert "the model is bad" in kernel.run("fail()", fails=True)
    assert kernel.run("gc.collect(); print(alive() is None)") == "False"  # that is the trouble
    kernel.run("report = orchard_infra.flush()")
    assert kernel.run("print(alive() is None, report.failures)") == "True ()"


def test_flush_frees_what_a_cause_of_the_failure_holds(kernel: Kernel) -> None:
    kernel.run(Big.SOURCE)
    cell = """
try:
    fail()
except ValueError as error:
    raise RuntimeError('wrapped') from error
"""
    assert "wrapped" in kernel.run(cell, fails=True)
    assert kernel.run("gc.collect(); print(alive() is None)") == "False"
    assert kernel.run("report = orchard_infra.flush(); print(alive() is None)") == "True"


def test_flush_forgets_the_outputs_of_cells_and_no_variable(kernel: Kernel) -> None:
    kernel.run(Big.SOURCE)
    kernel.run("big = Big(); out = weakref.ref(big); big", fails=False)
    kernel.run("Big()")
    kernel.run("kept = Big(); kept_too = weakref.ref(_); del big; None")
    assert kernel.run("gc.collect(); print(out() is None, kept_too() is None)") == "False False"
    kernel.run("report = orchard_infra.flush(outputs=False)")
    assert kernel.run("print(out() is None, kept_too() is None)") == "False False"
    kernel.run("report = orchard_infra.flush()")
    assert kernel.run("print(out() is None, kept_too() is None)") == "True True"
    assert kernel.run("print(len(kept.data))") == str(1 << 20)


def test_flush_leaves_a_name_that_the_user_gave_an_underscore(kernel: Kernel) -> None:
    kernel.run("_ = 'translate'")
    kernel.run("report = orchard_infra.flush()")
    assert kernel.run("print(_)") == "translate"
    kernel.run("del _")


def test_the_report_shows_itself_as_a_table(kernel: Kernel) -> None:
    shown = kernel.run("orchard_infra.flush()")
    assert re.search(r"MiB +before +after +freed\nthis process +[\d.,]+ +[\d.,]+ +-?[\d.,]+", shown)
    assert kernel.html.startswith("<table>")
    assert "this process" in kernel.html


def test_a_restarted_kernel_takes_the_lock_again(kernel: Kernel) -> None:
    """The shutdown of the kernel releases; the next kernel is another process."""
    restarted = Kernel(kernel.directory)
    restarted.run("from orchard_infra import managed_environment")
    lock = restarted.run(
        "env = managed_environment('restarted').open()\nprint(env.lock_path, end='')"
    )
    assert os.path.exists(lock)
    before = restarted.pid
    restarted.restart()
    assert restarted.pid != before
    assert not os.path.exists(lock)
    assert restarted.run("print(managed_environment('restarted').open().is_locked)") == "True"
    restarted.close()


def test_a_killed_kernel_does_not_block_the_next(kernel: Kernel) -> None:
    killed = Kernel(kernel.directory)
    killed.run("from orchard_infra import managed_environment")
    killed.run("env = managed_environment('killed').open()")
    os.kill(killed.pid, signal.SIGKILL)
    assert kernel.run("print(managed_environment('killed', timeout=60).open().is_locked)") == "True"
    killed.close()


def test_the_example_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="not installed: make test-frameworks")
    nbclient = pytest.importorskip("nbclient", reason="not installed: make test-frameworks")
    notebook = nbformat.read(str(EXAMPLE), as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3")
    client.resources = {"metadata": {"path": str(tmp_path)}}
    client.execute()
    shown = "".join(_text(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "this process" in shown
    assert not [run for run in RunRegistry().runs() if run.record.project == "digits-notebook"]
