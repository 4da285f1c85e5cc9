"""accelerate, and torchrun, which it uses: what a launcher passes on, and what is saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from endings import EXAMPLES, pid_of, send_signal, stopped_after
from forking import ForkedScript, ForkServer
from orchard_infra import EnvironmentLockedError, managed_environment
from support import is_running, wait_gone

server: ForkServer


@pytest.fixture(scope="module", autouse=True)
def fork_server(needs: Callable[..., None]) -> Iterator[None]:
    needs("torch", "accelerate")
    global server
    # What the launcher imports. Each process that it starts takes as long as ever.
    with ForkServer("accelerate.commands.launch", "torch.distributed.run") as server:
        yield


ACCELERATE = """
import os, sys
os.setpgid(0, 0)
sys.argv[0] = "accelerate"
from accelerate.commands.launch import main
main()
"""


def launch(tmp_path: Path, processes: int, name: str) -> ForkedScript:
    how = ["--cpu"] if processes == 1 else ["--multi_gpu"]  # which starts torchrun's agent
    options = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    training = [str(EXAMPLES / "accelerate_train.py"), "--steps=100000000", "--workers=1"]
    arguments = [*how, f"--num_processes={processes}", *options, *training]
    return server.run_python(tmp_path, ACCELERATE, *arguments, name=name)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on_there_also_without_their_launcher(
    tmp_path: Path,
) -> None:
    first = launch(tmp_path, 2, "first.py")
    ranks = [pid_of(first, rank) for rank in (0, 1)]
    send_signal(first, "SIGTERM")  # torchrun's agent passes it on
    assert first.finish() != 0, first.transcript()  # and says that it was stopped
    wait_gone(ranks)

    second = launch(tmp_path, 2, "second.py")
    ranks = [pid_of(second, rank) for rank in (0, 1)]
    for rank in (0, 1):
        second.wait_for(f"rank {rank} goes on from step {stopped_after(first)}")
    send_signal(second, "kill -9")
    second.finish()
    # They train on, and nobody takes the lock from them.
    with pytest.raises(EnvironmentLockedError) as refusal, managed_environment("accelerate"):
        pass
    assert refusal.value.holder is not None
    assert refusal.value.holder.pid == ranks[0]
    # Each is the leader of a group, in which the workers of its DataLoader are.
    os.killpg(ranks[1], signal.SIGINT)
    wait_gone(ranks)
    assert stopped_after(second) > stopped_after(first)


@pytest.mark.slow
def test_the_launcher_of_one_process_does_not_pass_a_sigterm_on(tmp_path: Path) -> None:
    job = launch(tmp_path, 1, "job.py")
    rank = pid_of(job, 0)
    send_signal(job, "SIGTERM")
    assert job.finish() == -15
    assert is_running(rank)
    send_signal(job, "SIGTERM to the group")  # as a scheduler would have done
    wait_gone([rank])
    assert stopped_after(job)
