"""In a job the same signal again is no second request: slurmstepd and the launcher both send it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import pytest

from forking import ForkServer
from support import Script, require_module, run_command, wait_until

# As what the process was started, the mode, and the two signals that the script sends itself.
PRELUDE = """
import os, signal, sys, time
kind, mode, first, second = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if kind in ("rank", "joined"):
    os.environ.update(RANK="0", WORLD_SIZE="2")
if kind == "batch":
    os.environ["SLURM_JOB_ID"] = "4711"
from orchard_infra import *

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def kill(signum):
    os.kill(os.getpid(), signum)

def protected(**options):
    stopper = SignalStop(mode, **options)
    return managed_environment("digits", manager=InfrastructureManager(stopper=stopper))
"""

server: ForkServer


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    global server
    with ForkServer("asyncio", "orchard_infra._public") as server:
        yield


def start(
    tmp_path: Path,
    body: str,
    kind: str = "rank",
    mode: str = "flag",
    first: int = SIGTERM,
    second: int | None = None,
) -> Script:
    signals = (str(int(first)), str(int(first if second is None else second)))
    return server.run_python(tmp_path, PRELUDE + body, kind, mode, *signals)


FLAGGED = """
with protected() as env:
    kill(first)
    say("asked", env.stop_requested.reason)
    try:
        kill(second)
        kill(second)
        say("saved")
    except BaseException as error:
        say(type(error).__name__)
"""


@pytest.mark.parametrize("signum", [SIGTERM, SIGHUP, SIGINT])
def test_a_rank_that_finishes_its_step_gets_the_signal_twice_and_saves(tmp_path, signum):
    run = start(tmp_path, FLAGGED, first=signum)
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == [f"asked {signum.name}", "saved"]


@pytest.mark.parametrize(
    ("kind", "first", "second", "end"),
    [
        ("rank", SIGTERM, SIGHUP, "RunStopped"),  # another signal is another request
        ("rank", SIGTERM, SIGINT, "KeyboardInterrupt"),
        ("alone", SIGTERM, SIGTERM, "RunStopped"),
        ("alone", SIGINT, SIGINT, "KeyboardInterrupt"),
        # A scheduler's job without ranks: slurmstepd and a trap of the batch script, or a person.
        ("batch", SIGTERM, SIGTERM, "saved"),
        ("batch", SIGINT, SIGINT, "KeyboardInterrupt"),
    ],
)
def test_what_is_a_request_of_its_own_raises(tmp_path, kind, first, second, end):
    run = start(tmp_path, FLAGGED, kind, "flag", first, second)
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == [f"asked {first.name}", end]


def test_a_rank_that_joined_a_run_is_a_rank(tmp_path):
    """Its run is that of `orchard-infra run`, which is no job: the launcher was started in it."""
    run = start(
        tmp_path,
        """
with protected() as env:
    import subprocess
    arguments = [sys.executable, "joined.py", "joined", "flag", sys.argv[3], sys.argv[4]]
    sys.exit(subprocess.run(arguments).returncode)
""",
        "alone",
    )
    (tmp_path / "joined.py").write_text(
        PRELUDE + FLAGGED.replace('say("asked"', 'say("joined", env.joined, env.run.job')
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["joined True None SIGTERM", "saved"]


@pytest.mark.parametrize(
    ("signum", "name"),
    [(SIGTERM, "RunStopped"), (SIGHUP, "RunStopped"), (SIGINT, "KeyboardInterrupt")],
)
def test_a_rank_that_raises_is_not_interrupted_by_the_same_signal_on_its_way_out(
    tmp_path, signum, name
):
    """Ctrl-C at a terminal reaches a rank directly, and may come once more from its launcher."""
    run = start(
        tmp_path,
        """
try:
    with protected() as env:
        try:
            kill(first)
            time.sleep(60)
        except BaseException as error:
            kill(first)
            say("saved after", type(error).__name__)
            raise
        finally:
            kill(first)
            say("finally")
except BaseException as error:
    say(type(error).__name__)
""",
        mode="raise",
        first=signum,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == [f"saved after {name}", "finally", name]


def test_a_rank_that_has_caught_its_stop_still_hears_the_next_one_later(tmp_path):
    run = start(
        tmp_path,
        """
from orchard_infra.stopping import signals
with protected() as env:
    for _ in range(2):
        try:
            kill(first)
        except RunStopped:
            say("caught")
    signals._ONE_REQUEST = 0.0  # as if they had passed
    kill(first)
""",
        mode="raise",
    )
    assert run.finish() == 143, run.transcript()
    assert run.output.splitlines() == ["caught"]


def test_a_rank_that_takes_its_time_is_interrupted_by_the_next_one_later(tmp_path):
    run = start(
        tmp_path,
        """
from orchard_infra.stopping import signals
with protected() as env:
    kill(first)
    kill(first)
    say("asked", env.stop_requested.reason)
    signals._ONE_REQUEST = 0.0  # as if they had passed
    kill(first)
    say("unreachable")
""",
    )
    assert run.finish() == 143, run.transcript()
    assert run.output.splitlines() == ["asked SIGTERM"]


def test_a_deadline_within_these_seconds_is_kept(tmp_path):
    run = start(
        tmp_path,
        """
from orchard_infra.stopping import signals
signals._ONE_REQUEST = 1000.0
with protected(deadline=0.2) as env:
    began = time.monotonic()
    kill(first)
    kill(first)
    try:
        time.sleep(1000)
    finally:
        say("late", time.monotonic() - began >= 0.2)
""",
    )
    assert run.finish() == 143, run.transcript()
    assert run.output.splitlines() == ["late True"]


@pytest.mark.parametrize(
    ("mode", "status", "lines"),
    [("flag", 0, ["asked", "workers joined", "saved"]), ("raise", 143, ["workers joined"])],
)
def test_a_signal_that_was_put_off_is_not_taken_for_a_repetition(tmp_path, mode, status, lines):
    run = start(
        tmp_path,
        """
class Loader:
    def __del__(self):  # where nothing can be raised
        kill(first)
        say("workers joined")
with protected() as env:
    if mode == "flag":
        kill(first)
        say("asked")
    loader = Loader()
    del loader
    if mode == "raise":
        time.sleep(60)
    time.sleep(0.3)  # it would come again now
    say("saved")
""",
        mode=mode,
    )
    assert run.finish() == status, run.transcript()
    assert run.output.splitlines() == lines


def test_a_signal_that_interrupts_the_handler_of_the_first_one_does_not_come_again(tmp_path):
    run = start(
        tmp_path,
        """
from orchard_infra.stopping import signals
acted = 0
def act(self, signum, frame, act=signals.SignalWatch.act):
    global acted
    acted += 1
    if acted == 1:
        kill(first)
    act(self, signum, frame)
signals.SignalWatch.act = act
with protected() as env:
    kill(first)
    say("asked", env.stop_requested.reason)
    while acted < 2:  # it was put off
        time.sleep(0.01)
    signals._ONE_REQUEST = 0.0  # if it came once more, it would be another request
    time.sleep(0.3)
    say("saved")
""",
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["asked SIGTERM", "saved"]


def test_what_comes_again_during_the_release_does_not_end_a_program_that_ends_well(tmp_path):
    run = start(
        tmp_path,
        """
from contextlib import contextmanager
class Slow:
    @contextmanager
    def around(self, env):
        yield
        kill(first)
        say("released")
manager = InfrastructureManager(stopper=SignalStop(mode), extras=[Slow()])
with managed_environment("digits", manager=manager) as env:
    kill(first)
say("all said")
""",
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["released", "all said"]


FAILS = """
import logging
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
with protected() as env:
    env.before_release(lambda: kill(first))
    raise RuntimeError("no luck")
"""


@pytest.mark.parametrize("mode", ["raise", "flag"])
def test_what_a_rank_failed_of_is_told_also_when_its_launcher_stops_it_meanwhile(tmp_path, mode):
    """One rank is killed, the collective of the other one raises, and torchrun sends it SIGTERM."""
    rank = start(tmp_path, FAILS, mode=mode)

    assert rank.finish() == 143
    assert "RuntimeError: no luck" in rank.output
    assert "steps failed" not in rank.output


def test_of_two_environments_the_outer_one_has_heard_the_signal_as_well(tmp_path):
    run = start(
        tmp_path,
        """
stopper = InfrastructureManager(stopper=SignalStop(mode))
with managed_environment("digits", manager=stopper) as outer:
    with managed_environment("letters", manager=stopper) as inner:
        kill(first)
        say(inner.stop_requested.reason)
    kill(first)
    say(outer.stop_requested.reason)
""",
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["SIGTERM", "SIGTERM"]


def test_ctrl_c_is_given_back_to_python(tmp_path):
    run = start(
        tmp_path,
        """
with protected() as env:
    say(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
say(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
""",
        mode="raise",
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["False", "True"]


# A rank does not load torch, which takes seconds: only its launcher does.
UNDER_TORCHRUN = """
import os, sys, time
from orchard_infra import InfrastructureManager, SignalStop, managed_environment

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

manager = InfrastructureManager(stopper=SignalStop(sys.argv[1]))
with managed_environment("digits", manager=manager) as env:
    say("working", os.environ["RANK"], os.getpid())
    try:
        while not env.stop_requested:
            time.sleep(0.01)
    finally:
        say("stopping", os.environ["RANK"])
        while not os.path.exists("passed on"):
            time.sleep(0.01)
        say("saved", os.environ["RANK"])
"""


@pytest.mark.slow
def test_a_signal_to_each_process_of_torchrun_costs_no_checkpoint(tmp_path):
    """As slurmstepd sends it. torchrun passes on its own one, and kills after 30 s."""
    require_module("torch")
    (tmp_path / "rank.py").write_text(UNDER_TORCHRUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    jobs = [
        run_command(
            tmp_path,
            [*torchrun, "--nproc-per-node", "2", "rank.py", mode],
            env={"OMP_NUM_THREADS": "1", "ORCHARD_INFRA_DIR": str(tmp_path / mode)},
        )
        for mode in ("flag", "raise")
    ]
    for job in jobs:
        ranks = [int(job.wait_for(f"working {rank}").split()[2]) for rank in range(2)]
        for rank, pid in enumerate(ranks):
            os.kill(pid, SIGTERM)
            job.wait_for(f"stopping {rank}")
        job.send_signal(SIGTERM)
        wait_until(lambda job=job: job.error_output.count("closing signal SIGTERM") == 2)
    (tmp_path / "passed on").touch()
    for job in jobs:
        job.finish()
        assert {"saved 0", "saved 1"} <= set(job.output.splitlines()), job.transcript()
