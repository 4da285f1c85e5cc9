"""env.fence: a number that grows with each run, and names of outputs that carry it."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from locking import exit_status, forked
from orchard_infra import (
    InfrastructureError,
    InfrastructureManager,
    LockLostError,
    LockSuspectError,
    managed_environment,
)
from orchard_infra.config import default_lock_path
from orchard_infra.locks import counter
from orchard_infra.locks.base import Lease, LockKey
from orchard_infra.runs.record import RunRecord
from support import as_nobody, needs_another_user, run_python

QUIET = InfrastructureManager(sanitizer=None, cleaner=None, flusher=None, stopper=None)


def counter_of(project: str = "digits") -> Path:
    return Path(f"{default_lock_path(project)}.fence")


def enter(project: str = "digits") -> managed_environment:
    return managed_environment(project, manager=QUIET)


def draw_once(project: str = "digits") -> int:
    with enter(project) as env:
        return env.fence


# It grows.


def test_it_grows_with_each_run_and_stays_within_one():
    fences = []
    for _ in range(20):
        with enter() as env:
            fences.append(env.fence)
            assert env.fence == fences[-1]
            assert env.run.fence == fences[-1]
    assert fences == sorted(set(fences))


def test_it_grows_over_a_run_that_was_killed(tmp_path):
    before = draw_once()
    killed = run_python(
        tmp_path,
        """
        from orchard_infra import managed_environment
        with managed_environment("digits") as env:
            print("fence", env.fence, flush=True)
            input()
        """,
    )
    theirs = int(killed.wait_for("fence").split()[1])
    killed.kill()
    killed.wait()
    assert before < theirs < draw_once()


@pytest.mark.parametrize("left", [None, b"", b"\n", b"\0" * 14, b"17", b"  1717171717171\n"])
def test_it_grows_over_a_counter_that_is_gone_or_torn(left):
    before = draw_once()
    if left is None:
        counter_of().unlink()
    else:
        counter_of().write_bytes(left)
    # No clock has gone by: it is the time of day in milliseconds, at least.
    assert draw_once() > before


def test_it_grows_when_the_clock_goes_back(monkeypatch):
    before = draw_once()
    monkeypatch.setattr(counter.time, "time_ns", lambda: 1)
    assert draw_once() == before + 1


def test_two_that_draw_at_the_same_time_never_get_the_same(tmp_path):
    """One that has just lost its lock may draw beside its successor."""
    path = str(tmp_path / "x.fence")

    def draw_many() -> None:
        mine = [counter.draw(path) for _ in range(200)]
        (tmp_path / str(os.getpid())).write_text(" ".join(map(str, mine)))

    with forked(draw_many) as one, forked(draw_many) as two:
        assert [exit_status(one), exit_status(two)] == [0, 0]
        drawn = [
            int(word) for pid in (one, two) for word in (tmp_path / str(pid)).read_text().split()
        ]
    assert len(set(drawn)) == 400


def test_threads_that_ask_at_the_same_time_get_the_same(monkeypatch):
    barrier = threading.Barrier(4)
    draw = counter.draw

    def draw_together(path: str) -> int:
        barrier.wait(10)
        return draw(path)

    monkeypatch.setattr(counter, "draw", draw_together)
    found: list[int] = []
    with enter() as env:
        threads = [threading.Thread(target=lambda: found.append(env.fence)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert set(found) == {env.fence}


# Counters that cannot be used.


def _link() -> None:
    counter_of().symlink_to(counter_of().with_name("other"))
    counter_of().with_name("other").write_text("1\n")


def _text() -> None:
    counter_of().write_text("my results\n")


def _long() -> None:
    counter_of().write_text("9" * 30)


def _huge() -> None:
    counter_of().write_text(f"{2**63 - 1}\n")


def _negative() -> None:
    counter_of().write_text("-5\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_link, "a symbolic link, not a regular file"),
        (lambda: os.mkfifo(counter_of()), "a FIFO, not a regular file"),
        (lambda: counter_of().mkdir(), "a directory, not a regular file"),
        (_text, "is no counter of runs: it holds b'my results"),
        (_long, "is no counter of runs"),
        (_huge, "is no counter of runs"),
        (_negative, "is no counter of runs"),
    ],
)
def test_something_else_in_its_place_is_refused_and_left_alone(spoil: Callable[[], object], words):
    draw_once()
    counter_of().unlink()
    spoil()
    before = counter_of().read_bytes() if counter_of().is_file() else None
    with enter() as env:
        with pytest.raises(InfrastructureError, match=words):
            env.fence
        with pytest.raises(InfrastructureError, match=words):
            env.fenced("model.pt")
        env.verify()  # the run goes on without a fence
    if before is not None:
        assert counter_of().read_bytes() == before


def test_a_counter_that_somebody_keeps_locked_hangs_nobody(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(counter, "_TRIES", 20)
    draw_once()
    with open(counter_of()) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with enter() as env, pytest.raises(InfrastructureError, match="keeps it locked"):
            env.fence
    draw_once()


@needs_another_user
def test_a_counter_that_may_not_be_written_says_what_is_needed(tmp_path):
    path = tmp_path / "x.fence"
    path.write_text("1\n")
    os.chmod(path, 0o644)
    for directory in (tmp_path, *tmp_path.parents):
        if directory != Path("/"):
            os.chmod(directory, os.stat(directory).st_mode | 0o055)

    def fails() -> str:
        try:
            return str(counter.draw(str(path)))
        except InfrastructureError as error:
            return str(error)

    message = as_nobody(fails)
    assert "Permission denied" in message
    assert "may write" in message
    assert path.read_text() == "1\n"


def test_a_counter_that_is_almost_full_is_used_up_to_the_last(tmp_path):
    path = tmp_path / "x.fence"
    path.write_text(f"{2**63 - 2}\n")
    assert counter.draw(str(path)) == 2**63 - 1
    with pytest.raises(InfrastructureError, match="no counter"):
        counter.draw(str(path))


# Who has one.


def test_after_a_loss_there_is_none():
    with enter() as env:
        name = env.fenced("model.pt")
        env.lock_path.unlink()
        with pytest.raises(LockLostError):
            env.ensure_held()
        for ask in (lambda: env.fence, lambda: env.fenced("model.pt"), env.ensure_held):
            with pytest.raises(LockLostError):
                ask()
        assert env.lock_lost
        assert env.stop_requested is not None
    assert draw_once() > int(name.name.split(".")[1])


def test_one_that_lost_the_lock_before_it_asked_draws_nothing():
    draw_once()
    with enter() as env:
        env.lock_path.unlink()
        before = counter_of().read_bytes()
        with pytest.raises(LockLostError):
            env.fence
        assert counter_of().read_bytes() == before


def test_without_a_locker_there_is_none():
    manager = attrs.evolve(QUIET, locker=None)
    with managed_environment("digits", manager=manager) as env:
        with pytest.raises(InfrastructureError, match="has no fence here"):
            env.fence
        env.ensure_held()
        env.verify()


def test_a_forked_child_has_that_of_its_parent_and_never_another_one():
    with enter() as env:

        def is_refused() -> None:
            with pytest.raises(InfrastructureError, match="before the process is forked"):
                env.fence

        with forked(is_refused) as pid:
            assert exit_status(pid) == 0
        mine = env.fence

        def has_it() -> None:
            assert env.fence == mine

        with forked(has_it) as pid:
            assert exit_status(pid) == 0
        assert counter_of().read_text() == f"{env.fence}\n"


def test_a_pickled_and_a_copied_environment_name_the_same_output():
    with enter() as env:
        name = env.fenced("model.pt")
        assert copy.deepcopy(env).fenced("model.pt") == name
        assert pickle.loads(pickle.dumps(env)).fenced("model.pt") == name


JOINING = """
    import sys
    from orchard_infra import InfrastructureError, managed_environment
    with managed_environment("digits") as env:
        print("joined", env.joined, env.is_leader, flush=True)
        for line in sys.stdin:
            try:
                print("fence", env.fence, env.fenced("model.pt").name, flush=True)
                env.ensure_held()
            except InfrastructureError as error:
                print("none:", error, flush=True)
"""


@pytest.mark.slow
def test_a_process_that_joins_the_run_has_that_of_the_run_once_it_is_drawn(tmp_path):
    with enter() as env:
        joined = run_python(tmp_path, JOINING)
        joined.wait_for("joined True")
        joined.tell()
        joined.wait_for("none: project digits has no fence here")
        fence = env.fence
        joined.tell()
        joined.wait_for(f"fence {fence} model.{fence:016d}.pt")
        joined.stdin.close()  # type: ignore[union-attr]
        assert joined.finish() == 0, joined.transcript()


def test_a_rank_has_that_of_rank_0_once_it_is_drawn(tmp_path):
    ranks = [
        run_python(tmp_path, JOINING, env={"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)
    ]
    ranks[1].wait_for("joined False False")
    ranks[1].tell()
    ranks[1].wait_for("none: project digits has no fence here")
    ranks[0].tell()
    fence = ranks[0].wait_for("fence").split()[1]
    ranks[1].tell()
    ranks[1].wait_for(f"fence {fence}")
    for rank in ranks:
        rank.stdin.close()  # type: ignore[union-attr]
    assert [rank.finish() for rank in ranks] == [0, 0], ranks[0].transcript()


# Names.


def test_names_sort_in_the_order_of_the_runs_and_never_meet(tmp_path):
    names = []
    for _ in range(5):
        with enter() as env:
            names.append(env.fenced(tmp_path / "model.pt"))
    assert names == sorted(set(names))
    assert {name.parent for name in names} == {tmp_path}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.pt", "model.*.pt"),
        ("runs/a.b/model.pt", "runs/a.b/model.*.pt"),
        ("dir/", "dir.*"),
        ("model", "model.*"),
        (".hidden", ".hidden.*"),
        ("a.tar.gz", "a.tar.*.gz"),
        ("epoch=3-loss=0.5.ckpt", "epoch=3-loss=0.5.*.ckpt"),
        ("/abs/x.pt", "/abs/x.*.pt"),
        ("../x.pt", "../x.*.pt"),
        ("~/x.pt", "~/x.*.pt"),
        ("m\u00f6del %s.pt", "m\u00f6del %s.*.pt"),
    ],
)
def test_the_fence_stands_before_the_suffix(path, expected):
    with enter() as env:
        for given in (path, Path(path)):
            assert env.fenced(given).as_posix() == expected.replace("*", f"{env.fence:016d}")


@pytest.mark.parametrize("path", ["", ".", "/", "..", "a/..", "./"])
def test_what_names_no_file_gets_none(path):
    with enter() as env, pytest.raises(InfrastructureError, match="names no file"):
        env.fenced(path)


# A server that does not answer.


@attrs.define
class Suspect:
    """A lease that cannot be asked for a while, and then is held or lost."""

    record: RunRecord
    answers: Iterator[Exception | None]
    interval: float = 60.0
    fence: int = 3

    def verify(self) -> None:
        error = next(self.answers)
        if error is not None:
            raise error

    def renew(self) -> None: ...
    def release(self) -> None: ...


@attrs.frozen
class SuspectLock:
    answers: Iterator[Exception | None]
    timeout: float | None = 0.0

    def try_acquire(self, key: LockKey, record: RunRecord) -> Lease:
        return Suspect(record, self.answers)

    def holder(self, key: LockKey) -> RunRecord | None:
        return None


def suspect(*answers: Exception | None) -> managed_environment:
    manager = attrs.evolve(QUIET, locker=SuspectLock(iter(answers)))
    return managed_environment("digits", manager=manager)


def test_one_that_is_suspect_is_waited_for(monkeypatch):
    monkeypatch.setattr("orchard_infra.environment._CONFIRM", 0.001)
    error = LockSuspectError("no answer")
    with suspect(error, error, error, None) as env:
        with pytest.raises(LockSuspectError):
            env.verify()
        env.ensure_held()
        assert not env.lock_lost


def test_one_that_is_suspect_and_then_lost_is_lost(monkeypatch):
    monkeypatch.setattr("orchard_infra.environment._CONFIRM", 0.001)
    with suspect(LockSuspectError("no answer"), LockLostError("gone")) as env:
        with pytest.raises(LockLostError, match="gone"):
            env.ensure_held()
        with pytest.raises(LockLostError, match="gone"):
            env.ensure_held()
        with pytest.raises(LockLostError, match="gone"):
            env.fence


def test_a_ctrl_c_ends_the_wait_for_one_that_is_suspect(tmp_path):
    script = run_python(
        tmp_path,
        """
        import itertools, sys
        sys.path[:0] = sys.argv[1:]
        from test_fences import suspect
        from orchard_infra import LockSuspectError
        with suspect(*itertools.repeat(LockSuspectError("no answer"), 10**4)) as env:
            print("waits", flush=True)
            env.ensure_held()
        """,
        str(Path(__file__).parent),
        *sys.path,
    )
    script.wait_for("waits")
    script.send_signal(2)
    assert script.finish() == -2, script.transcript()
