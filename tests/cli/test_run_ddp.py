"""torchrun under `orchard-infra run`: however it is stopped, no rank and no port is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from pathlib import Path

import attrs
import psutil
import pytest

from support import Script, is_running, require_module, wait_gone, wait_until
from wrapping import Wrapper, child_of

DDP = Path(__file__).parents[2] / "examples" / "ddp.py"

# A rank that does not load torch, which takes seconds: only its launcher does.
RANK = """
    import os, sys, time
    from orchard_infra import managed_environment
    with managed_environment(sys.argv[1]):
        os.write(1, f"rank {os.environ['RANK']} (pid {os.getpid()})\\n".encode())
        time.sleep(600)
"""

pytestmark = pytest.mark.slow


@attrs.frozen
class Job:
    script: Script
    port: int
    ranks: list[int]

    @property
    def launcher(self) -> psutil.Process:
        return child_of(self.script)

    def expect_nothing_left(self, processes: list[psutil.Process]) -> None:
        assert not any(is_running(process.pid) for process in processes)
        with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
            # What a restarted job does: connections in TIME_WAIT are no obstacle to that.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", self.port))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(wrapper: Wrapper, port: int, *words: str) -> Script:
    return wrapper.start(
        *("--grace", "0.5", "--"),  # each rank has a session of its own
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(port), *words),
        env={"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def job(request: pytest.FixtureRequest, wrapper: Wrapper, free_port: int) -> Job:
    """Two ranks that work."""
    require_module("torch")
    project = getattr(request, "param", "digits")
    script = torchrun(wrapper, free_port, wrapper.script(RANK), project)
    ranks = []
    for rank in range(2):
        match = re.search(rf"rank {rank} \(pid (\d+)\)", script.wait_for(f"rank {rank} (pid"))
        assert match is not None
        ranks.append(int(match[1]))
    return Job(script, free_port, ranks)


@pytest.mark.slow
def test_a_job_that_ends_by_itself_joins_the_run(wrapper: Wrapper, free_port: int) -> None:
    require_module("torch")
    script = torchrun(wrapper, free_port, str(DDP), "--project", "digits", "--steps", "200")

    assert script.finish(120) == 0, script.transcript()
    loss = float(script.wait_for("joined: True, loss").split()[-1])
    assert loss < 0.01
    assert "orchard-infra:" not in script.error_output
    Job(script, free_port, []).expect_nothing_left([])


@pytest.mark.parametrize("name", ["TERM", "HUP"])
def test_a_signal_to_the_wrapper_ends_every_rank(job: Job, name: str) -> None:
    processes = psutil.Process(job.script.pid).children(recursive=True)

    os.kill(job.script.pid, signal.Signals[f"SIG{name}"])

    assert job.script.finish(120) != 0
    job.expect_nothing_left(processes)


@pytest.mark.parametrize("job", ["digits", "a project of its own"], indirect=True)
def test_a_killed_launcher_leaves_no_rank(job: Job) -> None:
    processes = psutil.Process(job.script.pid).children(recursive=True)

    job.launcher.kill()

    assert job.script.finish(120) == 137
    job.expect_nothing_left(processes)


def test_a_killed_rank_ends_the_job(job: Job) -> None:
    processes = psutil.Process(job.script.pid).children(recursive=True)

    os.kill(job.ranks[1], signal.SIGKILL)

    assert job.script.finish(120) == 1
    job.expect_nothing_left(processes)


@pytest.mark.slow
def test_the_ranks_of_a_killed_wrapper_keep_the_lock_until_they_are_stopped(
    job: Job, wrapper: Wrapper
) -> None:
    processes = psutil.Process(job.script.pid).children(recursive=True)
    job.script.kill()
    job.script.wait()

    refused = wrapper.run("true")
    assert refused.returncode == os.EX_TEMPFAIL
    assert f"pid {job.ranks[0]}" in refused.error_output

    taken = wrapper.run("--allow-process-kill", "--", "echo", "mine")
    assert (taken.returncode, taken.output) == (0, "mine\n"), taken.transcript()
    wait_gone(job.ranks)
    wait_until(lambda: not any(is_running(process.pid) for process in processes))
    job.expect_nothing_left(processes)
