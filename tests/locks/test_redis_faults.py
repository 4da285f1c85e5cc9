"""What breaks between a holder and its Redis server, on real servers.

Each holder writes its fence to one file, and asks before each write whether it still holds the
lock. A line with a smaller fence than one before it is an overlap: two that wrote at the same time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from forking import ForkedScript, ForkServer
from hosts import Network
from locking import exit_status, forked
from orchard_infra import InfrastructureManager, RedisLock, managed_environment
from orchard_infra.errors import LockLostError, LockSuspectError
from orchard_infra.locks import redis as redis_lock
from orchard_infra.locks.acquiring import acquire
from orchard_infra.locks.base import Held, LockKey
from orchard_infra.locks.keeper import Keeper
from orchard_infra.locks.redis import RedisLease
from orchard_infra.runs.record import describe_this_run
from redis_proxy import Proxy
from servers import RedisServer
from support import require_module, wait_until

require_module("redis")

# Holds the lock, and writes until it is told to stop or finds that the lock is lost. `pause` stops
# it between two writes, where a scheduler or a debugger would.
HOLDER = """
    import logging, os, signal, sys, threading, time
    from orchard_infra import LockLostError, InfrastructureManager, managed_environment, RedisLock

    url, project, path, ttl, renew, guard = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    lock = RedisLock(url, timeout=None, ttl=float(ttl), renew=float(renew), poll=0.1,
                     guard=guard == "guard")
    orders = []

    def listen():
        for line in sys.stdin:
            orders.append(line.strip())

    threading.Thread(target=listen, daemon=True).start()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    clock = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    manager = InfrastructureManager(locker=lock, sanitizer=None)
    with managed_environment(project, manager=manager) as env:
        print("held", clock(), env.fence, flush=True)
        try:
            while not env.lock_lost:
                order = orders.pop() if orders else None
                if order == "release":
                    break
                if order == "fork" and os.fork() == 0:
                    while True:
                        signal.pause()
                if order == "fork":
                    print("forked", flush=True)
                if order == "pause":
                    print("pausing", flush=True)
                    os.kill(os.getpid(), signal.SIGSTOP)
                    print("resumed", flush=True)
                env.ensure_held()
                os.write(file, b"%d\\n" % env.fence)
                time.sleep(0.02)
        except LockLostError as error:
            pass
        if env.lock_lost:
            print("lost", clock(), flush=True)
            while not orders:
                time.sleep(0.01)
    print("released", flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[ForkServer]:
    with ForkServer("orchard_infra", "redis") as server:
        yield server


@attrs.frozen
class Scene:
    """A project, the file that its holders write to, and how they are started."""

    server: RedisServer
    fork_server: ForkServer
    tmp_path: Path
    ttl: float = 30.0  # a lease that nobody renews outlasts a busy machine
    renew: float = 0.5
    project: str = attrs.field(factory=lambda: f"project-{uuid.uuid4().hex[:12]}")

    @property
    def key(self) -> LockKey:
        return LockKey(self.project, Path("unused"))

    @property
    def lock(self) -> RedisLock:
        return RedisLock(
            self.server.url, ttl=self.ttl, renew=self.renew, guard=False, poll=0.05, timeout=60
        )

    @property
    def path(self) -> Path:
        return self.tmp_path / "writes"

    def arguments(self, url: str) -> list[str]:
        return [url, self.project, str(self.path), str(self.ttl), str(self.renew), "no guard"]

    def holder(self) -> ForkedScript:
        return self.fork_server.run_python(
            self.tmp_path, HOLDER, *self.arguments(self.server.url), name="holder.py"
        )

    def take(self, **changes: object) -> RedisLease:
        lease = acquire(
            attrs.evolve(self.lock, **changes), self.key, describe_this_run(self.project)
        )
        assert isinstance(lease, RedisLease)
        return lease

    def write(self, lease: RedisLease) -> None:
        lease.verify()
        with open(self.path, "ab", buffering=0) as file:
            file.write(b"%d\n" % lease.fence)

    def fences(self) -> list[int]:
        return [int(line) for line in self.path.read_text().split()]

    def overlap(self) -> int:
        fences = self.fences()
        assert fences
        return sum(1 for fence, next_ in itertools.pairwise(fences) if next_ < fence)


@pytest.fixture
def scene(redis_server: RedisServer, fork_server: ForkServer, tmp_path: Path) -> Scene:
    return Scene(redis_server, fork_server, tmp_path)


@pytest.fixture(scope="module")
def own_server() -> Iterator[RedisServer]:
    """One that tests of this module may stop, pause and empty; it is as new for each of them."""
    reason = RedisServer.missing()
    if reason is not None:
        pytest.skip(reason)
    with RedisServer() as server:
        yield server


@contextlib.contextmanager
def kept(lease: RedisLease) -> Iterator[list[LockLostError]]:
    """The lease, renewed by a keeper as in a run; what the keeper said when it was lost."""
    lost: list[LockLostError] = []
    keeper = Keeper(lease, lost.append, logging.getLogger("Infrastructure"))
    keeper.start()
    try:
        yield lost
    finally:
        keeper.stop()


def words(line: str) -> list[str]:
    return line.split()


def test_a_killed_holder_frees_the_lock_within_the_ttl_also_when_a_worker_outlives_it(scene):
    holder = attrs.evolve(scene, ttl=3.0).holder()
    _, _, fence = words(holder.wait_for("held"))
    holder.tell("fork")
    holder.wait_for("forked")
    wait_until(lambda: scene.path.exists() and scene.fences())
    holder.kill()
    lease = scene.take()
    assert lease.fence > int(fence)
    scene.write(lease)
    assert scene.overlap() == 0


def test_a_holder_that_was_stopped_for_longer_than_the_ttl_writes_nothing_more(scene):
    holder = attrs.evolve(scene, ttl=3.0).holder()
    holder.wait_for("held")
    wait_until(lambda: scene.path.exists() and scene.fences())
    holder.tell("pause")
    holder.wait_for("pausing")
    lease = scene.take()
    scene.write(lease)
    holder.send_signal(signal.SIGCONT)
    holder.wait_for("lost")
    scene.write(lease)
    holder.tell()
    holder.wait_for("released")
    lease.verify()  # its release has left the lock of its successor alone
    assert scene.overlap() == 0
    assert scene.fences()[-2:] == [lease.fence] * 2
    assert "did not run meanwhile" in holder.error_output
    assert holder.error_output.count("is lost") <= 2  # once by itself, once as the reason to stop


def test_a_loss_by_the_clock_is_known_without_asking_the_server(own_server, scene, monkeypatch):
    scene = attrs.evolve(scene, server=own_server, ttl=30.0)
    leases = [scene.take(lock_key=f"{scene.project}-{n}") for n in range(4)]
    own_server.pause()
    try:
        now = redis_lock._now
        monkeypatch.setattr(redis_lock, "_now", lambda: now() + 27.1)
        # Each one is another lease, because the first question settles it.
        for lease, question in zip(
            leases, (lease_verify, lease_renew, lease_fence, lease_fence), strict=True
        ):
            began = time.monotonic()
            with pytest.raises(LockLostError, match="did not run meanwhile"):
                question(lease)
            assert time.monotonic() - began < lease._lock.patience
        monkeypatch.setattr(redis_lock, "_now", now)
        for lease in leases:
            with pytest.raises(LockLostError):
                lease.verify()  # for good
    finally:
        own_server.resume()


def lease_verify(lease: RedisLease) -> None:
    lease.verify()


def lease_renew(lease: RedisLease) -> None:
    lease.renew()


def lease_fence(lease: RedisLease) -> int:
    return lease.fence


def test_a_pause_that_the_ttl_outlasts_costs_nothing(scene, monkeypatch):
    scene = attrs.evolve(scene, ttl=30.0)
    lease, fence = scene.take(), 0
    now = redis_lock._now
    monkeypatch.setattr(redis_lock, "_now", lambda: now() + 25)
    fence = lease.fence  # more than ttl - 10 s: the server is asked, and confirms it
    assert lease._renewed > now() + 20
    lease.verify()
    assert fence == lease.fence
    lease.release()


def test_a_callback_that_takes_longer_than_the_ttl_does_not_expire_the_lock(redis_server):
    """What a user does in `on_stop` may take minutes: renewals have a thread of their own."""
    lock = RedisLock(redis_server.url, ttl=30, renew=0.1, guard=False)
    done, entered = threading.Event(), threading.Event()

    def save(request: object) -> None:
        entered.set()
        done.wait(60)

    project = f"slow-{uuid.uuid4().hex}"
    left = [math.inf]

    def was_renewed() -> bool:
        left.append(float(redis_server.execute("PTTL", f"orchard-infra:{{{project}}}:lock")))
        return left[-1] > left[-2]

    manager = InfrastructureManager(locker=lock, sanitizer=None)
    with managed_environment(project, manager=manager) as env:
        env.on_stop(save)
        env.request_stop("enough")
        assert entered.wait(60)
        for _ in range(3):
            wait_until(was_renewed)
        assert not done.is_set()
        assert not env.lock_lost
        done.set()


def test_a_jump_of_the_wall_clock_changes_nothing(scene, monkeypatch):
    lease = scene.take()
    wall = time.time
    for jump in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda jump=jump: wall() + jump)
        lease.verify()
        assert isinstance(scene.lock.try_acquire(scene.key, lease.record), Held)
    lease.release()


def test_a_restart_with_its_data_leaves_the_lock_where_it_was(own_server, scene):
    scene = attrs.evolve(scene, server=own_server, ttl=30.0, renew=0.2)
    lease = scene.take()
    with kept(lease) as lost:
        scene.write(lease)
        fence = lease.fence
        own_server.restart()
        other = describe_this_run(scene.project)
        assert isinstance(scene.lock.try_acquire(scene.key, other), Held)
        wait_until(lambda: succeeds(lease.verify))
        assert lease.fence == fence
        scene.write(lease)
        assert lost == []
    lease.release()
    assert scene.overlap() == 0


def succeeds(question: Callable[[], object]) -> bool:
    try:
        question()
    except LockSuspectError:
        return False
    return True


def test_a_restart_without_data_grants_the_lock_to_nobody_else(own_server, scene, caplog):
    scene = attrs.evolve(scene, server=own_server, ttl=30.0)
    lease = scene.take()
    fence = lease.fence
    scene.write(lease)
    own_server.restart(keep_data=False)
    # The holder has not renewed it yet. Without the guard, anybody could have it now.
    guarded = attrs.evolve(scene.lock, guard=True)
    outcome = guarded.try_acquire(scene.key, describe_this_run(scene.project))
    assert isinstance(outcome, Held)
    assert outcome.holder is None
    assert "its server has just started" in outcome.reason
    lease.renew()
    assert "it was put back" in caplog.text
    assert lease.fence == fence
    scene.write(lease)
    outcome = scene.lock.try_acquire(scene.key, describe_this_run(scene.project))
    assert outcome.holder.run_id == lease.record.run_id
    lease.release()
    assert scene.overlap() == 0


def test_whoever_waits_for_a_server_that_has_just_started_is_told_and_gets_the_lock(
    own_server, scene, caplog
):
    caplog.set_level(logging.INFO)
    scene = attrs.evolve(scene, server=own_server)
    own_server.restart(keep_data=False)
    with pytest.raises(Exception, match=r"cannot be taken now.*its server has just started.*in \d"):
        scene.take(guard=True, timeout=0.1)
    assert "waiting for the lock" in caplog.text
    lease = attrs.evolve(scene, ttl=2.0).take(guard=True)
    scene.write(lease)
    lease.release()


def test_an_emptied_server_that_grants_it_to_another_one_costs_the_holder_its_lock(scene):
    """No guard can see FLUSHALL, which is why the documentation speaks of it."""
    lease = scene.take()
    scene.write(lease)
    stem = f"orchard-infra:{{{scene.project}}}"
    scene.server.execute("DEL", *(f"{stem}:{part}" for part in ("lock", "holder", "fence")))
    other = scene.take()
    assert other.fence > lease.fence
    for question in (lease.verify, lease.renew, lambda: lease.fence):
        with pytest.raises(LockLostError, match="granted to another run, pid"):
            question()
    other.release()
    with pytest.raises(LockLostError):
        lease.verify()  # for good, although it is free again
    lease.release()
    assert isinstance(scene.take(), RedisLease)


def test_a_late_renewal_does_not_bring_back_a_lock_that_was_released(scene):
    lease = scene.take()
    late = lease._held
    assert late is not None
    server = lease._server
    assert server is not None
    with redis_server_like(server) as again:
        lease.release()
        assert not late.renew(again).is_ours
    assert scene.lock.holder(scene.key) is None


def redis_server_like(server: redis_lock.Server) -> redis_lock.Server:
    from orchard_infra.locks.redis_server import Server

    return Server(server.url, server.seconds)


def test_a_connection_that_the_server_kills_is_made_again(own_server, scene):
    scene = attrs.evolve(scene, server=own_server, ttl=30.0)
    lease = scene.take()
    fence = lease.fence
    assert own_server.disconnect_clients() >= 1
    lease.verify()
    assert lease.fence == fence
    lease.release()


def test_a_server_that_does_not_answer_is_suspected_first_and_believed_again(own_server, scene):
    scene = attrs.evolve(scene, server=own_server, ttl=12.0)
    lease = scene.take()
    own_server.pause()
    try:
        with pytest.raises(LockSuspectError, match=r"lost in .*does not answer") as caught:
            lease.verify()
        assert caught.value.lock_path == lease.name
        assert lease.interval <= 1
    finally:
        own_server.resume()
    lease.verify()
    assert lease.interval == scene.renew
    lease.release()


def test_a_server_that_does_not_answer_in_time_has_lost_the_lock_for_good(
    own_server, scene, caplog
):
    scene = attrs.evolve(scene, server=own_server, ttl=6.0)
    lease = scene.take()
    with kept(lease) as lost:
        own_server.pause()
        try:
            wait_until(lambda: lost)
            left = lease._renewed + scene.ttl - redis_lock._now()
            assert left > 0, "it was told after the server would have freed the lock"
            # Not because of the time alone: some is left for a graceful stop.
            assert "could not be renewed" in str(lost[0])
            with pytest.raises(LockLostError):
                lease.verify()
            began = time.monotonic()
            lease.release()
            assert time.monotonic() - began < 5
            assert "frees itself within 6 s" in caplog.text
        finally:
            own_server.resume()
    with pytest.raises(LockLostError):
        lease.verify()


def test_a_replica_that_has_taken_over_keeps_the_lock_it_knows_of(own_server, scene):
    with own_server.replica() as replica, Proxy(own_server.port) as address:
        own_server.execute("CONFIG", "SET", "min-replicas-to-write", "0")
        lock = attrs.evolve(scene.lock, url=address.url, ttl=30.0)
        lease = acquire(lock, scene.key, describe_this_run(scene.project))
        fence = lease.fence
        stem = f"orchard-infra:{{{scene.project}}}"
        wait_until(lambda: replica.execute("EXISTS", f"{stem}:lock", f"{stem}:fence") == "2")
        replica.promote()
        address.switch(replica.port)
        assert isinstance(lock.try_acquire(scene.key, describe_this_run(scene.project)), Held)
        lease.verify()
        assert lease.fence == fence
        lease.release()


def test_a_replica_that_lags_gives_the_lock_away_with_a_greater_fence(own_server, scene):
    """Nothing on the server can prevent it. The holder notices at its next renewal."""
    with own_server.replica() as replica, Proxy(own_server.port) as address:
        replica.fall_behind()
        lock = attrs.evolve(scene.lock, url=address.url, ttl=30.0)
        lease = acquire(lock, scene.key, describe_this_run(scene.project))
        replica.promote()
        address.switch(replica.port)
        other = acquire(lock, scene.key, describe_this_run(scene.project))
        assert other.fence > lease._held.fence
        with pytest.raises(LockLostError, match="granted to another run"):
            lease.renew()
        other.release()


@pytest.mark.parametrize("direction", ["to", "from"])
def test_a_holder_that_is_cut_off_knows_it_before_anybody_else_has_the_lock(
    network: Network, scene, direction
):
    scene = attrs.evolve(scene, ttl=6.0)
    server, alpha, beta = network.hosts
    with RedisServer(host=server) as redis:
        holder = alpha.run_python(HOLDER, *scene.arguments(redis.url))
        holder.wait_for("held")
        waiter = beta.run_python(HOLDER, *scene.arguments(redis.url))
        wait_until(lambda: "waiting for the lock" in waiter.error_output, what=waiter.transcript)
        network.cut(alpha, server, direction)
        lost = float(words(holder.wait_for("lost"))[1])
        held = float(words(waiter.wait_for("held"))[1])
        assert lost < held
        wait_until(lambda: len(set(scene.fences())) == 2)
        waiter.tell("release")
        waiter.wait_for("released")
        assert scene.overlap() == 0


def test_eight_clients_that_contend_have_it_one_at_a_time(scene):
    counter = scene.tmp_path / "counter"
    counter.write_text("0 0")

    def cycles() -> None:
        record = describe_this_run(scene.project)
        with scene.lock.connect() as connection:
            for _ in range(10):
                while isinstance(lease := connection.try_acquire(scene.key, record), Held):
                    time.sleep(0.005)
                count, fence = map(int, counter.read_text().split())
                assert lease.fence > fence
                time.sleep(0.001)
                counter.write_text(f"{count + 1} {lease.fence}")
                lease.verify()
                lease.release()

    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(forked(cycles)) for _ in range(8)]
        assert [exit_status(pid) for pid in pids] == [0] * 8
    assert counter.read_text().split()[0] == "80"
