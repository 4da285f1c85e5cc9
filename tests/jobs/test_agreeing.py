"""A stop that reaches one rank reaches all of them, at the same step. With real gloo groups."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forking import ForkedScript, ForkServer
from orchard_infra import (
    InfrastructureError,
    InfrastructureManager,
    SignalStop,
    managed_environment,
)
from support import require_module, run_python

# "cuda:gloo" stands for a group of NCCL alone: it cannot reduce a tensor in main memory either.
GROUPS = ("gloo", "cuda:gloo")

PRELUDE = """
import os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from orchard_infra import *

rank, size, kind, seconds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def connect(name="store"):
    say("connecting")
    dist.init_process_group(
        kind, store=dist.FileStore(name, size), rank=rank, world_size=size,
        timeout=timedelta(seconds=seconds),
    )

def flagged():
    manager = InfrastructureManager(stopper=SignalStop("flag"))
    return managed_environment("digits", manager=manager)
"""

TRAIN = (
    PRELUDE
    + """
with flagged() as env:
    env.on_stop(lambda request: say("called"))
    connect()
    steps = 0
    try:
        while not env.agree_to_stop():
            steps += 1
            if steps == 3:
                say("working")
            time.sleep(0.001 * rank)
    except InfrastructureError as error:
        say(type(error.__cause__).__name__, "led to:", error)
        raise
    say("stopped after", steps, "because", env.stop_requested.reason)
    while not env.agree_to_stop():
        pass
    say("saved")
    dist.destroy_process_group()
"""
)

server: ForkServer


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    global server
    torch = ("torch", "torch.distributed") if importlib.util.find_spec("torch") else ()
    with ForkServer(*torch, "orchard_infra._public") as server:
        yield


def start(
    tmp_path: Path,
    ranks: Sequence[int],
    size: int,
    kind: str,
    source: str = TRAIN,
    seconds: int = 60,
) -> list[ForkedScript]:
    require_module("torch")
    return [
        server.run_python(tmp_path, source, str(rank), str(size), kind, str(seconds))
        for rank in ranks
    ]


def last_steps(ranks: Sequence[ForkedScript]) -> list[str]:
    return [rank.wait_for("stopped after").split()[2] for rank in ranks]


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)], ids=["rank 0", "rank 1", "both"])
def test_all_ranks_stop_at_the_same_step_whichever_was_asked(tmp_path, kind, asked):
    ranks = start(tmp_path, range(2), 2, kind)
    for rank in ranks:
        rank.wait_for("working")
    for index in asked:
        ranks[index].send_signal(signal.SIGTERM)
    for index, rank in enumerate(ranks):
        assert rank.finish() == 0, rank.transcript()
        # The callbacks of a rank that was not asked itself are called as well.
        assert {"saved", "called"} <= set(rank.output.splitlines())
        told = rank.wait_for("because").partition("because ")[2]
        if index in asked:
            assert told in ("SIGTERM", f"rank {1 - index} of this job was asked to stop")
        else:
            assert told == f"rank {asked[0]} of this job was asked to stop"
    assert len(set(last_steps(ranks))) == 1


def test_two_signals_are_one_stop(tmp_path):
    ranks = start(tmp_path, range(2), 2, "gloo")
    for rank in ranks:
        rank.wait_for("working")
    for _ in range(2):
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        ranks[1].wait_for("stopped after")
    for rank in ranks:
        assert rank.finish() == 0, rank.transcript()
        assert "saved" in rank.output
    assert len(set(last_steps(ranks))) == 1


@pytest.mark.parametrize("kind", GROUPS)
def test_a_stop_during_init_process_group_is_found_by_the_first_question(tmp_path, kind):
    [first] = start(tmp_path, [0], 2, kind)
    first.wait_for("connecting")
    first.send_signal(signal.SIGTERM)
    [second] = start(tmp_path, [1], 2, kind)
    assert (first.finish(), second.finish()) == (0, 0), first.transcript() + second.transcript()
    assert last_steps([first, second]) == ["0", "0"]


@pytest.mark.parametrize("kind", GROUPS)
def test_a_rank_that_is_killed_is_an_error_on_all_others_and_never_silence(tmp_path, kind):
    ranks = start(tmp_path, range(3), 3, kind)
    for rank in ranks:
        rank.wait_for("working")
    ranks[2].kill()
    for index, rank in enumerate(ranks[:2]):
        assert rank.finish() == 1, rank.transcript()
        assert f"led to: rank {index} of 3 got no answer" in rank.output
        assert "stopped after" not in rank.output


@pytest.mark.parametrize("kind", GROUPS)
def test_a_rank_that_hangs_is_an_error_within_the_timeout_of_the_group(tmp_path, kind):
    ranks = start(tmp_path, range(2), 2, kind, seconds=3)
    for rank in ranks:
        rank.wait_for("working")
    ranks[1].send_signal(signal.SIGSTOP)
    assert "Timed out waiting 3000ms" in ranks[0].wait_for("RuntimeError led to:", 30)
    ranks[1].kill()  # rank 0 would wait for it with the lock in its hands
    assert ranks[0].finish() == 1, ranks[0].transcript()


AGAIN = (
    PRELUDE
    + """
make = dist.new_group
def counted(*args, **options):
    say("a new group")
    return make(*args, **options)
dist.new_group = counted

with flagged() as env:
    for name in ("first", "second"):
        connect(name)
        say(*[env.agree_to_stop() for _ in range(3)])
        dist.destroy_process_group()
    connect("third")
    if rank == 1:
        env.request_stop("enough")
    say(env.agree_to_stop())
    dist.destroy_process_group()
    say("is asked alone", env.agree_to_stop())
"""
)


def test_a_group_of_nccl_alone_has_one_group_beside_it_for_as_long_as_it_lives(tmp_path):
    ranks = start(tmp_path, range(2), 2, "cuda:gloo", AGAIN)
    once = ["connecting", "a new group"]
    for rank in ranks:
        assert rank.finish() == 0, rank.transcript()
        assert rank.output.splitlines() == [
            *(2 * [*once, "False False False"]),
            *(*once, "True", "is asked alone True"),
        ]


@pytest.mark.parametrize("stopper", [SignalStop(), SignalStop("raise")])
def test_a_stopper_that_raises_is_refused_at_the_first_question(stopper):
    manager = InfrastructureManager(stopper=stopper)
    with (
        managed_environment("digits", manager=manager) as env,
        pytest.raises(InfrastructureError, match=r'SignalStop\(mode="flag"\)'),
    ):
        env.agree_to_stop()


def test_without_torch_it_is_the_flag_and_torch_is_not_imported(tmp_path):
    run = run_python(
        tmp_path,
        """
        import sys
        from orchard_infra import *
        manager = InfrastructureManager(stopper=SignalStop("flag"))
        with managed_environment("digits", manager=manager) as env:
            print(env.agree_to_stop())
            env.request_stop("enough")
            print(env.agree_to_stop(), env.stop_requested.reason, "torch" in sys.modules)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["False", "True enough False"]
