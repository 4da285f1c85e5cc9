"""The ranks of a job start and end together: plain processes, started by this one as by a launcher.

Each script prints what happens to it with the time of the machine's monotonic clock, which all
processes share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from orchard_infra import following, managed_environment
from orchard_infra.launch import this_launch
from orchard_infra.locks import file as file_lock
from orchard_infra.locks.base import LockKey
from orchard_infra.locks.file import FileLock
from orchard_infra.runs.record import describe_this_run
from orchard_infra.runs.registry import RunRegistry
from support import (
    Script,
    is_running,
    run_command,
    run_python,
    wait_gone,
    wait_until,
    written,
)
from wrapping import Wrapper

# Seconds until a rank has seen what another one did. On an idle machine that is a fraction of one.
# The wait that it replaces takes 30 s or more.
SOON = 15.0

PRELUDE = """
import logging, os, subprocess, sys, time
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from orchard_infra import *
from orchard_infra import following

RANK = int(os.environ.get("RANK", 0))
following._SAY_AFTER = 0.2

def tell(*words):
    print(f"[{time.monotonic():.3f}]", *words, flush=True)

def wait():
    return sys.stdin.readline().strip()

def enter(project="digits", **options):
    tell("comes")
    return managed_environment(project, **options)
"""

RUN = (
    PRELUDE
    + """
timeout = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
try:
    with enter(timeout=timeout):
        tell("in")
        wait()
        tell("leaves")
    tell("out")
except EnvironmentLockedError as error:
    tell(f"refused by {error.holder.pid} at {error.lock_path}: {error}")
except InfrastructureError as error:
    tell(f"failed: {error}")
assert "torch" not in sys.modules
"""
)


@attrs.frozen
class Ranks:
    """Starts ranks of one job, and runs that belong to none."""

    tmp_path: Path

    def start(
        self, rank: int | None, source: str = RUN, *arguments: str, size: int = 4, **env: str
    ) -> Script:
        # One file for each source: ranks of one job run the same one.
        name = f"train{abs(hash(source)) % 10**6}.py"
        ranks = {} if rank is None else {"RANK": str(rank), "WORLD_SIZE": str(size)}
        return run_python(self.tmp_path, source, *arguments, env={**ranks, **env}, name=name)

    def hold(self) -> Script:
        """Another run of the project, which has the lock."""
        holder = self.start(None)
        holder.wait_for("in")
        return holder


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def at(script: Script, what: str) -> float:
    """When it happened."""
    match = re.match(r"\[([\d.]+)\]", script.wait_for(f"] {what}"))
    assert match, script.transcript()
    return float(match[1])


def end(*scripts: Script) -> None:
    for script in scripts:
        script.tell()
    for script in scripts:
        assert script.finish() == 0, script.transcript()


# The start.


def test_ranks_that_come_before_rank_0_go_on_once_it_has_the_lock(ranks: Ranks) -> None:
    early = [ranks.start(rank) for rank in (1, 2)]
    for rank in early:
        rank.wait_for("waits for rank 0")
        assert "] in" not in rank.output

    leader = ranks.start(0)

    for rank in early:
        assert 0 <= at(rank, "in") - at(leader, "comes") < SOON
    end(*early, leader)


@pytest.mark.slow
def test_all_ranks_are_refused_with_rank_0_and_its_error_also_one_that_comes_late(
    ranks: Ranks,
) -> None:
    holder = ranks.hold()

    job = [ranks.start(rank) for rank in (1, 0, 2)]
    assert [rank.finish() for rank in job] == [0, 0, 0]
    late = ranks.start(3)
    assert late.finish() == 0

    told = {rank.wait_for("] refused").partition("] ")[2] for rank in (*job, late)}
    assert len(told) == 1
    assert f"refused by {holder.pid} at " in told.pop()
    for rank in (*job, late):
        # One that came after rank 0 had been refused is told when it comes.
        assert at(rank, "refused") - max(at(job[1], "refused"), at(rank, "comes")) < SOON
    for rank in (*job, late):
        assert "ERROR the lock " in rank.output


def test_the_others_wait_as_long_as_rank_0_waits(ranks: Ranks) -> None:
    holder = ranks.hold()
    job = [ranks.start(rank, RUN, "600") for rank in (0, 1)]
    job[0].wait_for("waiting for the lock")
    job[1].wait_for("waits for rank 0")

    end(holder)

    assert abs(at(job[1], "in") - at(job[0], "in")) < SOON
    end(*job)


@pytest.mark.parametrize(
    ("signum", "why"),
    [
        (signal.SIGKILL, "ended before it had the lock"),
        (signal.SIGTERM, "did not get the lock: interrupted while it waited"),
    ],
)
def test_when_rank_0_ends_before_it_has_the_lock_the_others_end_and_say_so(
    ranks: Ranks, signum: signal.Signals, why: str
) -> None:
    holder = ranks.hold()
    job = [ranks.start(rank, RUN, "600") for rank in (0, 1)]
    job[0].wait_for("waiting for the lock")
    job[1].wait_for("waits for rank 0")

    job[0].send_signal(signum)
    job[0].wait()
    late = ranks.start(2)

    for rank in (job[1], late) if signum != signal.SIGKILL else (job[1],):
        assert rank.finish() == 0, rank.transcript()
        line = rank.wait_for("failed: rank 0 of this job")
        assert f"(pid {job[0].pid})" in line
        assert why in line
    end(holder)


FAILS_BEFORE = (
    PRELUDE
    + """
if RANK == 0:
    tell("fails soon")
    wait()
    enter(7).__enter__()
try:
    enter().__enter__()
except InfrastructureError as error:
    tell(f"failed: {error}")
"""
)


def test_when_rank_0_fails_before_it_comes_for_the_lock_the_others_end_and_say_so(
    ranks: Ranks,
) -> None:
    """A bad configuration, say: there is no record of it, only its process was there."""
    leader, other = (ranks.start(rank, FAILS_BEFORE) for rank in (0, 1))
    leader.wait_for("fails soon")
    other.wait_for("waits for rank 0")

    leader.tell()

    assert leader.finish() == 1
    assert "ConfigurationError" in leader.error_output
    assert other.finish() == 0, other.transcript()
    assert f"rank 0 of this job (pid {leader.pid}) ended before" in other.output


NO_LOCK = (
    PRELUDE
    + """
cfg = EnvironmentConfig("digits", lock_file_path=os.path.abspath("results.txt"))
try:
    enter(cfg).__enter__()
except EnvironmentLockedError:
    raise
except InfrastructureError as error:
    tell(f"failed: {error}")
"""
)


def test_when_rank_0_cannot_take_the_lock_the_others_end_with_what_it_said(ranks: Ranks) -> None:
    (ranks.tmp_path / "results.txt").write_text("accuracy 0.97\n")

    job = [ranks.start(rank, NO_LOCK) for rank in (1, 0)]

    for rank in job:
        assert rank.finish() == 0, rank.transcript()
        assert "results.txt exists and is no lock file" in rank.wait_for("failed: ")
    assert "rank 0 of this job" in job[0].wait_for("failed: ")


FAILS_SOON = """
import os, sys, time
while not os.path.exists("fail"): time.sleep(0.01)
sys.exit(3)
"""
ALONE = PRELUDE + "following._ABSENT = following._ELSEWHERE = 0.5\n" + RUN.removeprefix(PRELUDE)


def test_a_rank_whose_launcher_never_starts_rank_0_ends_and_says_so(ranks: Ranks) -> None:
    lonely = ranks.start(1, ALONE, LOCAL_RANK="1", TORCHELASTIC_RUN_ID="none")

    assert lonely.finish() == 0
    assert "failed: rank 0 of this job was not started within" in lonely.output


def test_a_rank_that_a_person_starts_goes_on_if_rank_0_is_not_below_the_same_shell(
    ranks: Ranks,
) -> None:
    """Each rank in a terminal of its own: nothing says that they belong together."""
    lonely = ranks.start(1, ALONE, LOCAL_RANK="1")

    lonely.wait_for("] in")
    assert "INFO rank 1 goes on without waiting for rank 0: nothing of it" in lonely.output
    end(lonely)


@pytest.mark.parametrize("where", ["in the same shell", "nowhere"])
def test_ranks_of_lightning_that_a_person_starts_have_no_rank_0_in_their_shell(
    ranks: Ranks, where: str
) -> None:
    """Where it starts them itself, their parent is rank 0. A shell lives on, and never comes."""
    (ranks.tmp_path / "train.py").write_text(ALONE)
    start = f"LOCAL_RANK=%s WORLD_SIZE=2 {sys.executable} train.py & "
    first = f"LOCAL_RANK=0 WORLD_SIZE=2 {sys.executable} -c '{FAILS_SOON}' & "
    shell = run_command(
        ranks.tmp_path,
        ["sh", "-c", (first if where == "in the same shell" else "") + start % 1 + "wait; read x"],
    )

    if where == "nowhere":
        told = "INFO rank 1 goes on without waiting for rank 0: nothing of it"
    else:
        shell.wait_for("waits for rank 0")
        (ranks.tmp_path / "fail").touch()
        told = "ended before it had the lock"
    shell.wait_for(told)


COMES_LATE = (
    PRELUDE
    + """
if RANK:
    tell("imports")
    wait()
with enter():
    tell("in")
    wait()
"""
)

FAILS_INSIDE = (
    PRELUDE
    + """
if RANK:
    tell("imports")
    wait()
try:
    with enter():
        raise MemoryError("no room for the model")
except InfrastructureError as error:
    tell(f"failed: {error}")
"""
)


@pytest.mark.slow
def test_a_rank_that_comes_when_rank_0_has_failed_ends_and_says_so(ranks: Ranks) -> None:
    """It would wait for rank 0 in `init_process_group`."""
    leader, late = (ranks.start(rank, FAILS_INSIDE) for rank in (0, 1))
    late.wait_for("imports")
    assert leader.finish() == 1

    late.tell()

    assert late.finish() == 0, late.transcript()
    assert "with MemoryError: no room for the model" in late.wait_for("failed: rank 0 of this job")


# Several environments of one job.

SWEEP = (
    PRELUDE
    + """
for trial in range(3):
    if RANK == 0 and trial == 1:
        wait()
    with enter():
        tell(f"in trial {trial}")
        if RANK == 1:
            open(f"in {trial}", "w").close()
        while not os.path.exists(f"in {trial}"):  # rank 1 may have been started long after rank 0
            time.sleep(0.01)
    tell(f"after trial {trial}")
"""
)


def test_ranks_go_through_the_environments_of_a_sweep_together(ranks: Ranks) -> None:
    """Rank 1 is the first at each: it must not slip into the one that rank 0 is about to leave,
    which would then wait for it.
    """
    job = [ranks.start(rank, SWEEP) for rank in (0, 1)]
    job[1].wait_for("waits for rank 0")  # before the second one
    assert "] in trial 1" not in job[1].output

    end(*job)

    for trial in (1, 2):
        assert at(job[1], f"in trial {trial}") > at(job[0], f"after trial {trial - 1}")
    for rank in job:
        assert "WARNING" not in rank.output


RETRY = (
    PRELUDE
    + """
attempts = 0
while True:
    attempts += 1
    try:
        with enter():
            tell(f"in after {attempts}")
            wait()
        break
    except EnvironmentLockedError:
        tell(f"refused {attempts}")
        if RANK == 0:
            time.sleep(0.5)
"""
)


def test_ranks_that_try_again_after_a_refusal_do_so_together(ranks: Ranks) -> None:
    """What rank 0 was refused the last time says nothing of this time."""
    holder = ranks.hold()
    job = [ranks.start(rank, RETRY) for rank in (0, 1)]
    for rank in job:
        rank.wait_for("refused 2")

    end(holder)

    attempts = [rank.wait_for("in after").split()[-1] for rank in job]
    assert attempts[0] == attempts[1]
    end(*job)


SLOW_RANK_0 = (
    PRELUDE
    + """
if RANK == 0:
    wait()
"""
    + RUN.removeprefix(PRELUDE)
)


@pytest.mark.slow
@pytest.mark.parametrize("before", ["refused", "killed"])
def test_an_earlier_start_of_the_job_says_nothing_of_this_one(ranks: Ranks, before: str) -> None:
    """An elastic restart, or the same two commands once more in the same shell."""
    if before == "refused":
        holder = ranks.hold()
        first = ranks.start(0)
        first.wait_for("refused")
        end(holder)
    else:
        first = ranks.start(0)
        first.wait_for("in")
        first.kill()
    first.wait()

    # The process of rank 0 is there when rank 1 looks, or is started seconds later.
    leader = ranks.start(0, SLOW_RANK_0) if before == "refused" else None
    other = ranks.start(1, SLOW_RANK_0)
    other.wait_for("waits for rank 0")
    leader = leader or ranks.start(0, SLOW_RANK_0)
    leader.tell()

    for rank in (leader, other):
        rank.wait_for("] in")
    end(other, leader)


# The end.

SHORT = (
    PRELUDE
    + """
following._OTHERS_WITHIN = following._AFTER_AN_ERROR = 0.3
with enter():
    tell("in")
    wait()
    tell("leaves")
tell("out")
"""
)


def test_rank_0_gives_the_lock_back_last(ranks: Ranks) -> None:
    job = [ranks.start(rank) for rank in (0, 1)]
    for rank in job:
        rank.wait_for("] in")

    job[0].tell()
    job[0].wait_for("leaves")
    contender = ranks.start(None)
    contender.wait_for("refused")
    assert "] out" not in job[0].output
    job[1].tell()

    assert at(job[0], "out") >= at(job[1], "leaves")
    assert "WARNING" not in job[0].output


def test_a_rank_that_does_not_leave_keeps_rank_0_for_a_bounded_time_and_is_named(
    ranks: Ranks,
) -> None:
    job = [ranks.start(rank, SHORT) for rank in (0, 1)]
    for rank in job:
        rank.wait_for("] in")

    end(job[0])

    assert f"still run: rank 1 (pid {job[1].pid}); they were waited for" in job[0].output
    end(job[1])


GOES_ON = (
    PRELUDE
    + """
with enter():
    tell("in")
    if RANK:
        subprocess.Popen(["sleep", "600"])
    wait()
tell("out")
if RANK:
    wait()
"""
)


def test_a_rank_that_has_left_and_goes_on_does_not_keep_rank_0(
    ranks: Ranks, runtime_directory: Path
) -> None:
    """It is on record, as ended, because a process that it started goes on."""
    job = [ranks.start(rank, GOES_ON) for rank in (0, 1)]
    for rank in job:
        rank.wait_for("] in")
    job[1].tell()
    job[1].wait_for("out")
    assert '"state": "ended"' in "".join(
        path.read_text() for path in runtime_directory.rglob("*.run")
    )

    job[0].tell()

    job[0].wait_for("] out")
    assert "WARNING" not in job[0].output
    assert job[0].finish() == 0
    end(job[1])


# Around the job, and beside it.

LAUNCHER = """
    import os, subprocess, sys
    ranks = [
        subprocess.Popen([sys.executable, "train.py"], stdin=0,
                         env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in (1, 0)
    ]
    sys.exit(max(rank.wait() for rank in ranks))
"""


def test_ranks_below_a_run_that_has_the_lock_join_it(tmp_path: Path) -> None:
    """`orchard-infra run -- torchrun train.py`: the lock is the wrapper's."""
    wrapper = Wrapper(tmp_path)
    wrapper.script(RUN)
    script = wrapper.start(sys.executable, wrapper.script(LAUNCHER, "launcher.py"))

    wait_until(lambda: script.output.count("] in") == 2, what=script.transcript)
    assert "waits for rank 0" not in script.output
    script.tell()  # to the one that reads it: they share their stdin
    script.wait_for("] out")
    end(script)
    assert script.output.count("] out") == 2


STARTS_OTHERS = (
    PRELUDE
    + """
with enter():
    tell("in", RANK)
    if RANK == 0:  # as Lightning does, in the middle of the run
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", NODE_RANK="0",
                          LOCAL_RANK="0", WORLD_SIZE="2")
        others = {**os.environ, "LOCAL_RANK": "1", "RANK": "1"}
        reader, writer = os.pipe()
        subprocess.Popen([sys.executable, *sys.argv, str(writer)], env=others, pass_fds=[writer])
        os.read(reader, 1)
    else:
        os.write(int(sys.argv[1]), b"!")
        wait()
        time.sleep(0.3)
    tell("leaves", RANK)
tell("out", RANK)
"""
)


def test_ranks_that_rank_0_starts_within_its_run_go_on_and_are_waited_for(ranks: Ranks) -> None:
    leader = ranks.start(None, STARTS_OTHERS)
    leader.wait_for("leaves 0")
    assert "] in 1" in leader.output

    leader.tell()
    assert leader.finish() == 0, leader.transcript()

    assert at(leader, "out 0") >= at(leader, "leaves 1")
    assert "waits for rank 0" not in leader.output
    assert "WARNING" not in leader.output


LAUNCHES = (
    PRELUDE
    + """
following._ABSENT = 0.5
if "other" not in sys.argv:  # as Lightning does, before any of them is in an environment
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", NODE_RANK="0",
                      LOCAL_RANK="0", WORLD_SIZE="2")
    others = {**os.environ, "LOCAL_RANK": "1"}
    subprocess.Popen([sys.executable, *sys.argv, "other"], env=others, stdin=subprocess.DEVNULL)
    if wait() == "fail":
        sys.exit(3)
try:
    with enter():
        tell("in", *sys.argv[1:])
except InfrastructureError as error:
    tell(f"failed: {error}")
"""
)


@pytest.mark.parametrize("what", ["go on", "fail"])
def test_ranks_that_rank_0_has_started_itself_wait_for_it_while_it_lives(
    ranks: Ranks, what: str
) -> None:
    leader = ranks.start(None, LAUNCHES)
    leader.wait_for("waits for rank 0")  # which it says when it has waited for longer than _ABSENT

    leader.tell(what)

    told = "in other" if what == "go on" else "failed: rank 0 of this job"
    wait_until(lambda: told in leader.output, what=leader.transcript)
    if what == "fail":
        assert f"(pid {leader.pid}) ended before it had the lock" in leader.output
    assert leader.finish() == (3 if what == "fail" else 0)


ELSEWHERE = (
    PRELUDE
    + """
following._ELSEWHERE = 0.5
with enter(f"trial-{RANK}"):
    tell("in")
    wait()
"""
)


def test_a_rank_in_a_project_that_rank_0_is_not_in_goes_on_alone_and_says_so(
    ranks: Ranks,
) -> None:
    """Each rank has a project of its own: independent trials, started by one mpirun."""
    job = [ranks.start(rank, ELSEWHERE) for rank in (0, 1)]

    job[1].wait_for(
        "INFO rank 1 goes on without waiting for rank 0: that one is in project trial-0"
    )
    job[1].wait_for("] in")
    end(*job)
    assert "WARNING" not in job[0].output  # nor did rank 0 wait for rank 1


NESTED = (
    PRELUDE
    + """
with enter():
    tell("in")
    wait()
    if RANK:
        with enter():
            tell("in again")
    wait()
"""
)


def test_a_rank_that_enters_again_what_it_is_in_needs_no_other_leader(ranks: Ranks) -> None:
    job = [ranks.start(rank, NESTED) for rank in (0, 1)]
    for rank in job:
        rank.wait_for("] in")
        rank.tell()

    job[1].wait_for("in again")
    end(*job)
    assert "WARNING" not in job[0].output + job[1].output


def test_a_rank_that_comes_when_rank_0_has_left_goes_on_unless_another_run_has_the_lock(
    ranks: Ranks,
) -> None:
    """Ranks that have nothing to do with each other: mpirun is used to start a sweep."""
    late = [ranks.start(rank, COMES_LATE) for rank in (1, 2)]
    for rank in late:
        rank.wait_for("imports")
    leader = ranks.start(0)
    leader.wait_for("] in")
    end(leader)

    late[0].tell()
    assert "INFO" not in late[0].wait_for("came late: rank 0 has left its environment")
    late[0].wait_for("] in")
    end(late[0])
    holder = ranks.hold()
    late[1].tell()

    assert late[1].finish() == 1
    assert f"is held by pid {holder.pid} " in late[1].error_output


# The lock between two starts of a job.

WAITS = (
    PRELUDE
    + """
from orchard_infra.locks import acquiring
acquiring._RETURNS_WITHIN = float(sys.argv[1])
with enter(timeout=None):
    tell("in")
"""
)


def elastic(restart: int) -> dict[str, str]:
    """As torchrun --max-restarts=1 starts a rank."""
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_MAX_RESTARTS": "1",
        "TORCHELASTIC_RESTART_COUNT": str(restart),
    }


def waiter_of(ranks: Ranks, holder: Script, *, patience: float = 1e9) -> Script:
    """A run of no job that waits for the lock; it has seen who has that."""
    holder.wait_for("] in")
    waiter = ranks.start(None, WAITS, str(patience))
    waiter.wait_for("waiting for the lock")
    return waiter


FLAGGED = (
    PRELUDE
    + """
manager = InfrastructureManager(stopper=SignalStop(mode="flag"))
with enter(manager=manager) as env:
    tell("in")
    while not env.stop_requested:
        time.sleep(0.01)
"""
)


@pytest.mark.parametrize(
    ("source", "ends_by"), [(RUN, "SIGKILL"), (RUN, "SIGTERM"), (FLAGGED, "SIGTERM")]
)
def test_a_run_that_waits_leaves_the_lock_to_a_job_that_is_started_again(
    ranks: Ranks, source: str, ends_by: str
) -> None:
    """SIGTERM is what torchrun sends to rank 0 when another rank has failed; with a flag rank 0
    ends well all the same. The second rank 0 waits for locks itself, and is not behind the other
    run in the queue.
    """
    first = ranks.start(0, source, **elastic(0))
    waiter = waiter_of(ranks, first)
    first.send_signal(signal.Signals[ends_by])
    waiter.wait_for(f"the job of its last holder (pid {first.pid}) is being started again")
    first.wait()

    second = ranks.start(0, RUN, "600", **elastic(1))

    second.wait_for("] in")
    assert "] in" not in waiter.output
    end(second)
    assert waiter.finish() == 0  # although the launcher of the job, this process, lives


def test_a_job_that_ends_well_has_its_lock_go_free_at_once_with_restarts_left(
    ranks: Ranks,
) -> None:
    job = ranks.start(0, **elastic(0))
    waiter = waiter_of(ranks, job)

    end(job)

    assert waiter.finish() == 0, waiter.transcript()
    assert "started again" not in waiter.output


def test_a_job_without_restarts_left_has_its_lock_go_free_when_it_is_killed(ranks: Ranks) -> None:
    job = ranks.start(0, **elastic(1))
    waiter = waiter_of(ranks, job)

    job.kill()

    assert waiter.finish() == 0, waiter.transcript()
    assert "started again" not in waiter.output


def test_a_run_that_waits_takes_the_lock_of_a_job_that_does_not_come_back_in_time(
    ranks: Ranks,
) -> None:
    job = ranks.start(0, **elastic(0))
    waiter = waiter_of(ranks, job, patience=0.2)

    job.kill()

    assert waiter.finish() == 0, waiter.transcript()


ELASTIC_LAUNCHER = """
    import os, subprocess, sys
    rank = subprocess.Popen([sys.executable, sys.argv[1]], env={**os.environ, "RANK": "0"})
    sys.stdin.readline()
    rank.kill()
    rank.wait()
    sys.stdin.readline()
"""


def test_the_lock_of_a_job_whose_launcher_has_died_goes_free(ranks: Ranks) -> None:
    launcher = run_python(
        ranks.tmp_path,
        ELASTIC_LAUNCHER,
        str(written(ranks.tmp_path / "rank_0.py", RUN)),
        env={**elastic(0), "WORLD_SIZE": "4"},
    )
    waiter = waiter_of(ranks, launcher)
    launcher.tell()
    waiter.wait_for("started again")
    assert "] in" not in waiter.output

    launcher.kill()

    assert waiter.finish() == 0, waiter.transcript()


# On another host.


@pytest.fixture
def on_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two hosts, to which srun gave a rank each."""
    for name, value in {
        "SLURM_JOB_ID": "42",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def on_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of many hosts, pretended: there is none on the machine."""
    monkeypatch.setattr(file_lock, "_stays", lambda device: True)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_rank_on_another_host_that_does_not_see_the_lock_goes_on_at_once_and_says_so(
    launcher: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    if launcher == "srun":
        request.getfixturevalue("on_another_host")
    else:
        monkeypatch = request.getfixturevalue("monkeypatch")
        for name, value in {
            "RANK": "2",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "4",
            "GROUP_RANK": "1",
            "TORCHELASTIC_RUN_ID": "none",
        }.items():
            monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO)

    with managed_environment("digits") as env:
        told = next(record for record in caplog.records if "goes on without" in record.message)

    assert told.levelno == logging.INFO
    assert f"on another host, which does not see {env.lock_path}" in told.message


def test_a_rank_on_another_host_whose_job_has_no_id_goes_on_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on_a_network: None
) -> None:
    """Nothing in the lock could tell it that it is its own rank 0 which has that."""
    for name, value in {
        "RANK": "2",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "TORCHELASTIC_RUN_ID": "none",
    }.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO)

    with managed_environment("digits"):
        assert "the job has no id that both hosts know" in caplog.text


def test_a_rank_of_which_nobody_says_on_which_host_it_is_goes_on_where_no_rank_0_is_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(following, "_ELSEWHERE", 0.2)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    caplog.set_level(logging.INFO)

    with managed_environment("digits"):
        assert "nothing of it is to be seen on this host" in caplog.text


@attrs.frozen
class SharedDirectory:
    """A lock on a network, as rank 0 on the first host and a follower on this one see it."""

    key: LockKey

    def take(self, job: str = "SLURM_JOB_ID=42.0", **changes: Any) -> Any:
        record = attrs.evolve(
            describe_this_run("digits", lock=str(self.key.path), rank=0, job=f"there:1:7@8 {job}"),
            **{"boot_id": "there", "host": "there", "pid": 7, **changes},
        )
        lease = FileLock().try_acquire(self.key, record)
        assert isinstance(lease, file_lock.FileLease)
        return lease

    @contextlib.contextmanager
    def follow(self, timeout: float | None = 0.0) -> Iterator[Any]:
        launch = this_launch()
        record = describe_this_run("digits", rank=1, job=launch.job)
        registry = RunRegistry()
        with contextlib.closing(registry.register(record)):
            job = following.Job(
                launch, record, self.key, str(self.key.path), registry, logging.getLogger("x")
            )
            yield job.follow(FileLock(), timeout)


@pytest.fixture
def shared(tmp_path: Path, on_another_host: None, on_a_network: None) -> SharedDirectory:
    return SharedDirectory(LockKey("digits", tmp_path / "digits.lock"))


def goes_on(steps: Any) -> bool:
    return next(steps, None) is None


def test_a_rank_on_another_host_follows_a_lock_that_it_sees_only_while_that_is_held(
    shared: SharedDirectory,
) -> None:
    with shared.follow() as steps:
        assert not goes_on(steps)
        other = shared.take(job="SLURM_JOB_ID=41.0")
        assert not goes_on(steps)
        other.release()
        lease = shared.take()
        # Killed: its record stays, and the kernel's lock is free.
        os.close(lease._fd)
        lease._fd = -1
        assert not goes_on(steps)
        lease = shared.take()
        assert goes_on(steps)
        lease.release()


def test_a_rank_on_another_host_is_told_who_has_the_lock_instead_of_its_rank_0(
    shared: SharedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_ABSENT", 0.0)
    holder = shared.take(job="SLURM_JOB_ID=41.0")

    with shared.follow() as refused, shared.follow(timeout=None) as waiting:
        with pytest.raises(following.EnvironmentLockedError, match="pid 7 on there") as caught:
            list(zip(refused, range(50), strict=False))
        assert caught.value.holder is not None
        assert caught.value.holder.run_id == holder.record.run_id
        assert not any(goes_on(waiting) for _ in range(50))
    holder.release()


# Processes of the job.

LEAVES_A_FORK = (
    PRELUDE
    + """
cfg = EnvironmentConfig("digits", allow_process_kill=True)
manager = InfrastructureManager(sanitizer=GhostSanitizer(patience=1.0))
try:
    with enter(cfg, manager=manager) as env:
        if len(sys.argv) > 1:
            pid = os.fork()
            if not pid:
                time.sleep(600)
            tell("forked", pid)
        tell("in")
        wait()
except EnvironmentLockedError as error:
    tell(f"refused: {error}")
"""
)


@pytest.mark.slow
def test_what_an_earlier_start_of_the_job_left_is_stopped_and_its_lock_taken_at_once(
    ranks: Ranks,
) -> None:
    """Of rank 0, which had the lock, and of rank 1, which had a record only."""
    first = [ranks.start(rank, LEAVES_A_FORK, "fork") for rank in (0, 1)]
    left = [int(rank.wait_for("forked").split()[-1]) for rank in first]
    for rank in first:
        rank.wait_for("] in")
        rank.kill()
        rank.wait()
    assert all(map(is_running, left))

    second = [ranks.start(rank, LEAVES_A_FORK) for rank in (0, 1)]

    wait_gone(left)
    for rank in second:
        rank.wait_for("] in")
    end(*reversed(second))


def test_what_another_job_left_is_not_stopped_but_named(ranks: Ranks) -> None:
    first = ranks.start(0, LEAVES_A_FORK, "fork", TORCHELASTIC_RUN_ID="one")
    left = int(first.wait_for("forked").split()[-1])
    first.wait_for("] in")
    first.kill()
    first.wait()

    second = ranks.start(0, LEAVES_A_FORK, TORCHELASTIC_RUN_ID="two")

    assert f"pid {left}" in second.wait_for("refused:")
    assert is_running(left)


@pytest.mark.slow
def test_a_rank_that_has_not_come_yet_is_not_reported_as_a_relative_of_rank_0(
    ranks: Ranks,
) -> None:
    """It runs the same script with other variables, and has no record."""
    late = ranks.start(1, COMES_LATE)
    late.wait_for("imports")

    leader = ranks.start(0, COMES_LATE)
    leader.wait_for("] in")
    late.tell()
    late.wait_for("] in")

    assert "spared process" not in leader.output
    end(late, leader)
