"""Ranks on two hosts that share nothing but a server: the others find their rank 0 by its lock."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import attrs
import pytest

import hosts
from hosts import Host, HostScript, Network
from servers import PostgresServer, RedisServer
from support import wait_until

RANK = """
    import logging, sys
    from orchard_infra import *
    from orchard_infra import following
    from orchard_infra.locks.urls import lock_from_url

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    url, project, with_file = sys.argv[1:]
    following._ABSENT = 1.0  # as if a launcher took no longer to start a rank
    following._SAY_AFTER = 0.1
    lock = lock_from_url(url)
    manager = InfrastructureManager(
        locker=AllOf(FileLock(), lock) if with_file else lock, sanitizer=None, flusher=None
    )
    try:
        with managed_environment(project, manager=manager) as env:
            print("in", "joined" if env.joined else "entered", env.is_locked, flush=True)
            for line in sys.stdin:
                if line == "end\\n":
                    break
                print("fence", env.fence, env.fenced("model.pt").name, flush=True)
                env.ensure_held()
        print("out", flush=True)
    except EnvironmentLockedError as error:
        print("refused by", error.holder.pid, error.holder.host, flush=True)
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    reason = hosts.missing() or PostgresServer.missing() or RedisServer.missing()
    if reason is not None:
        pytest.skip(reason)
    with Network(tmp_path_factory.mktemp("hosts"), "server", "alpha", "beta") as network:
        yield network


@pytest.fixture(scope="module")
def databases(network: Network) -> Iterator[dict[str, str]]:
    server = network["server"]
    with PostgresServer(host=server) as postgres, RedisServer(host=server) as redis:
        yield {"postgres": postgres.url, "redis": f"{redis.url}#ttl=6&renew=1&guard=no"}


_numbers = itertools.count(1)


@attrs.frozen
class Job:
    """Starts processes of one project that may be ranks of one job."""

    network: Network
    url: str
    with_file: bool
    number: int = attrs.field(factory=lambda: next(_numbers))

    @property
    def project(self) -> str:
        return f"digits {self.number}"

    def run(self, host: str, **env: str) -> HostScript:
        """A run that is no part of the job."""
        words = (self.url, self.project, "x" if self.with_file else "")
        return self.network[host].run_python(RANK, *words, env=env, name="rank.py")

    def rank(self, number: int, *, job: int | None = None) -> HostScript:
        """Rank 0 on alpha, rank 1 on beta."""
        return self.run(
            ("alpha", "beta")[number],
            SLURM_JOB_ID=str(self.number if job is None else job),
            SLURM_STEP_ID="0",
            SLURM_PROCID=str(number),
            SLURM_NODEID=str(number),
            SLURM_LOCALID="0",
            SLURM_STEP_NUM_TASKS="2",
        )

    def is_held(self, host: Host) -> bool:
        """Whether somebody has the lock, seen from a host."""
        script = host.run_python(IS_HELD, self.url, self.project, name="is_held.py")
        assert script.finish() == 0, script.transcript()
        return script.output == "True\n"


IS_HELD = """
    import sys
    from pathlib import Path
    from orchard_infra.locks.base import LockKey
    from orchard_infra.locks.urls import lock_from_url
    print(lock_from_url(sys.argv[1]).holder_now(LockKey(sys.argv[2], Path("x"))) is not None)
"""


@pytest.fixture(params=["postgres", "redis", "file and postgres"])
def job(request: pytest.FixtureRequest, network: Network, databases: dict[str, str]) -> Job:
    with_file, _, kind = request.param.rpartition(" and ")
    return Job(network, databases[kind], bool(with_file))


def fence_of(script: HostScript) -> int:
    script.tell("fence")
    return int(script.wait_for("fence ").split()[1])


def end(*scripts: HostScript) -> None:
    for script in scripts:
        script.tell("end")
    for script in scripts:
        assert script.finish() == 0, script.transcript()
        script.wait_for("out")


def test_a_rank_enters_when_rank_0_on_another_host_has_the_lock_and_has_its_fence(job: Job) -> None:
    follower = job.rank(1)
    follower.wait_for("waits for rank 0")
    leader = job.rank(0)
    leader.wait_for("in entered True")
    follower.wait_for("in entered False")
    assert fence_of(follower) == fence_of(leader)
    end(follower, leader)
    again = job.run("beta")
    again.wait_for("in entered True")
    assert fence_of(again) > int(leader.wait_for("fence ").split()[1])
    end(again)


@pytest.mark.slow
def test_a_rank_is_refused_when_a_stranger_has_the_lock_as_its_rank_0_is(job: Job) -> None:
    stranger = job.run("alpha")
    stranger.wait_for("in entered True")
    ranks = [job.rank(number) for number in (0, 1)]
    for rank in ranks:
        words = rank.wait_for("refused by").split()
        assert words[-1] == "alpha"
        assert rank.finish() == 0
    assert "in entered" not in ranks[1].output
    end(stranger)


@pytest.mark.slow
def test_a_rank_does_not_enter_by_the_lock_of_another_job(job: Job) -> None:
    other = job.rank(0, job=10**6 + job.number)
    other.wait_for("in entered True")
    rank = job.rank(1)
    rank.wait_for("refused by")
    assert rank.finish() == 0
    assert "in entered" not in rank.output
    end(other)


@pytest.mark.slow
def test_what_a_rank_0_that_was_killed_has_left_lets_nobody_in(job: Job) -> None:
    killed = job.rank(0)
    killed.wait_for("in entered True")
    killed.send_signal(9)
    killed.wait()
    wait_until(lambda: not job.is_held(job.network["beta"]))
    follower = job.rank(1)
    follower.wait_for("waits for rank 0")
    assert "in entered" not in follower.output
    # Only when it is held again, by its own rank 0.
    leader = job.rank(0)
    leader.wait_for("in entered True")
    follower.wait_for("in entered False")
    end(follower, leader)
