"""The front door: with-block, decorator, by hand; and what holds around the body."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import signal
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchard_infra import (
    ConfigurationError,
    EnvironmentConfig,
    EnvironmentLockedError,
    FileLock,
    FlushReport,
    InfraManagerProtocol,
    InfrastructureError,
    InfrastructureManager,
    LockLostError,
    ReleaseError,
    RunRegistry,
    RunState,
    TemporaryArtifacts,
    managed_environment,
)
from support import run_python, wait_until


@pytest.fixture
def cfg() -> EnvironmentConfig:
    return EnvironmentConfig("digits")


def held(cfg: EnvironmentConfig) -> bool:
    """Whether the lock is held now, seen through the registry as another process would."""
    runs = RunRegistry().runs()
    running = [r for r in runs if r.state is RunState.RUNNING]
    assert cfg.hardware.lock_file_path.exists() == bool(running)
    return bool(running)


def test_a_block_sees_its_run_and_leaves_nothing(cfg, runtime_directory):
    with managed_environment(cfg) as env:
        assert env.run.pid == os.getpid()
        assert env.run.project == "digits"
        assert env.lock_path == cfg.hardware.lock_file_path
        assert env.lock_path.exists()
        assert env.tmp_dir.is_dir()
        assert env.tmp_dir.stat().st_mode & 0o777 == 0o700
        assert env.report.prepare_seconds > 0
        assert os.environ["ORCHARD_INFRA_RUN_ID"] == env.run.run_id
        assert not env.stop_requested
        assert held(cfg)
    assert env.report.flushed is not None
    assert not env.tmp_dir.exists()
    assert not env.lock_path.exists()
    assert "ORCHARD_INFRA_RUN_ID" not in os.environ
    assert not any((runtime_directory / "runs").iterdir())


def test_a_bare_project_name_is_a_configuration():
    with managed_environment("digits") as env:
        assert env.lock_path == EnvironmentConfig("digits").hardware.lock_file_path


def test_a_wrong_configuration_is_refused_before_anything_is_touched(runtime_directory):
    wrong = SimpleNamespace(
        hardware=SimpleNamespace(lock_file_path="x.lock", allow_process_kill="false")
    )
    with pytest.raises(ConfigurationError, match=r"cfg\.hardware\.allow_process_kill.*'false'"):
        managed_environment(wrong).__enter__()
    assert list(runtime_directory.iterdir()) == []


def test_the_default_logger_is_the_one_named_infrastructure(cfg, caplog):
    lease_lost = FileLock(interval=0.01)
    with managed_environment(cfg, manager=InfrastructureManager(locker=lease_lost)) as env:
        env.lock_path.unlink()
        wait_until(lambda: env.lock_lost)
    assert {record.name for record in caplog.records} == {"Infrastructure"}


def test_a_given_logger_is_told_instead(cfg, caplog):
    log = logging.getLogger("mine")
    with managed_environment(cfg, logger=log) as env:
        env.lock_path.unlink()
        with pytest.raises(LockLostError):
            env.verify()
    assert "mine" in {record.name for record in caplog.records}


# --- the decorator ---


def test_a_plain_function_is_protected_at_every_call(cfg):
    @managed_environment(cfg)
    def train(epochs: int, *, lr: float = 0.1) -> str:
        """Trains."""
        assert held(cfg)
        return f"{epochs} epochs at {lr}"

    assert train(3, lr=0.5) == "3 epochs at 0.5"
    assert train(4) == "4 epochs at 0.1"
    assert not held(cfg)
    assert train.__name__ == "train"
    assert train.__doc__ == "Trains."
    assert list(inspect.signature(train).parameters) == ["epochs", "lr"]


def test_a_coroutine_is_protected_until_it_returns(cfg):
    @managed_environment(cfg)
    async def train(epochs: int) -> int:
        await asyncio.sleep(0)
        assert held(cfg)
        return epochs

    assert inspect.iscoroutinefunction(train)
    assert asyncio.run(train(2)) == 2
    assert asyncio.run(train(3)) == 3
    assert not held(cfg)


def test_a_coroutine_that_was_not_awaited_holds_nothing(cfg):
    @managed_environment(cfg)
    async def train() -> None: ...

    coroutine = train()
    assert not held(cfg)
    coroutine.close()


def test_a_generator_is_protected_from_its_first_step_to_its_last(cfg):
    @managed_environment(cfg)
    def steps(count: int) -> Any:
        for number in range(count):
            received = yield number
            if received:
                yield received
        return "done"

    assert inspect.isgeneratorfunction(steps)
    generator = steps(2)
    assert not held(cfg)
    assert next(generator) == 0
    assert held(cfg)
    assert generator.send("hello") == "hello"
    assert next(generator) == 1
    with pytest.raises(StopIteration) as ended:
        next(generator)
    assert ended.value.value == "done"
    assert not held(cfg)


def test_a_generator_that_is_closed_early_gives_everything_back(cfg):
    cleaned = []

    @managed_environment(cfg)
    def steps() -> Any:
        try:
            yield 1
        finally:
            cleaned.append(held(cfg))

    generator = steps()
    next(generator)
    generator.close()
    assert cleaned == [True]
    assert not held(cfg)


def test_an_async_generator_is_protected_as_well(cfg):
    @managed_environment(cfg)
    async def steps(count: int) -> Any:
        for number in range(count):
            try:
                received = yield number
            except KeyError as error:
                received = error.args[0]
            if received:
                yield received

    async def use() -> list[Any]:
        generator = steps(3)
        seen: list[Any] = [await generator.__anext__(), held(cfg)]
        seen.append(await generator.asend("sent"))
        seen.append(await generator.__anext__())
        seen.append(await generator.athrow(KeyError("thrown")))
        await generator.aclose()
        seen.append(held(cfg))
        seen += [number async for number in steps(2)]
        seen.append(held(cfg))
        return seen

    assert inspect.isasyncgenfunction(steps)
    assert asyncio.run(use()) == [0, True, "sent", 1, "thrown", False, 0, 1, False]


def test_an_async_generator_that_is_closed_early_runs_its_own_clean_up_inside(cfg):
    cleaned = []

    @managed_environment(cfg)
    async def steps() -> Any:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            cleaned.append(held(cfg))

    async def use() -> None:
        generator = steps()
        await generator.__anext__()
        await generator.aclose()

    asyncio.run(use())
    assert cleaned == [True]
    assert not held(cfg)


def test_one_managed_environment_is_not_entered_twice(cfg):
    once = managed_environment(cfg)
    with once, pytest.raises(InfrastructureError, match="entered already"):
        once.__enter__()
    with once:  # but again after it ended
        assert held(cfg)
    with pytest.raises(InfrastructureError, match="was not entered"):
        once.__exit__(None, None, None)


# --- nesting, joining, forking ---


def test_the_same_project_twice_in_one_process_is_a_clear_error(cfg):
    with managed_environment(cfg):
        with pytest.raises(EnvironmentLockedError, match="already holds"):
            managed_environment(cfg).__enter__()
        assert held(cfg)


def test_different_projects_nest_and_each_gets_its_own_back(cfg):
    with managed_environment("outer") as outer:
        with managed_environment("inner") as inner:
            assert inner.run.parent == outer.run.run_id
            assert os.environ["ORCHARD_INFRA_RUN_ID"] == inner.run.run_id
        assert os.environ["ORCHARD_INFRA_RUN_ID"] == outer.run.run_id
        assert outer.lock_path.exists()
        assert not inner.lock_path.exists()


JOIN = """
    import subprocess, sys
    from orchard_infra import managed_environment
    if len(sys.argv) > 1:
        with managed_environment("digits") as env:
            print(env.joined, env.run.pid, env.tmp_dir.is_dir(), flush=True)
    else:
        with managed_environment("digits") as env, managed_environment("inner"):
            subprocess.run([sys.executable, __file__, "child"], check=True)
            print(env.run.pid, env.lock_path.exists(), env.tmp_dir.is_dir(), flush=True)
"""


def test_a_process_started_by_the_run_joins_it_and_releases_nothing(tmp_path):
    run = run_python(tmp_path, JOIN)
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == [f"True {run.pid} True", f"{run.pid} True True"]


def test_a_forked_child_that_leaves_the_block_releases_nothing(tmp_path):
    run = run_python(
        tmp_path,
        """
        import os, sys
        from orchard_infra import managed_environment
        with managed_environment("digits") as env:
            child = os.fork()
            if child:
                os.waitpid(child, 0)
                env.verify()
                print("still ours", env.tmp_dir.is_dir(), flush=True)
        print("left", os.getpid() == env.run.pid, flush=True)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["left False", "still ours True", "left True"]


# --- by hand ---


def test_the_same_life_cycle_by_hand(cfg):
    manager = InfrastructureManager()
    env = manager.prepare_environment(cfg)
    assert held(cfg)
    manager.release_resources(cfg)
    assert not held(cfg)
    assert not env.tmp_dir.exists()
    manager.release_resources(cfg)  # twice is once


def test_a_release_without_a_prepare_touches_nobody_s_lock(cfg):
    with managed_environment(cfg) as env:
        InfrastructureManager().release_resources(cfg)
        env.verify()


def test_one_manager_serves_two_configurations(cfg):
    manager, other = InfrastructureManager(), EnvironmentConfig("letters")
    first = manager.prepare_environment(cfg)
    second = manager.prepare_environment(other)
    manager.release_resources(cfg)
    assert not first.lock_path.exists()
    second.verify()
    manager.release_resources(other)
    assert not second.lock_path.exists()


def test_an_equal_configuration_releases_what_another_one_prepared(cfg):
    manager = InfrastructureManager()
    env = manager.prepare_environment(cfg)
    manager.release_resources(EnvironmentConfig("digits"))
    assert not env.lock_path.exists()


def test_a_program_that_ends_without_a_release_leaves_nothing(tmp_path, runtime_directory):
    run = run_python(
        tmp_path,
        """
        from orchard_infra import InfrastructureManager
        env = InfrastructureManager().prepare_environment("digits")
        print(env.tmp_dir, flush=True)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert not Path(run.output.strip()).exists()
    assert [p for p in runtime_directory.rglob("*") if p.is_file()] == []


# --- any manager, any strategy ---


class Double:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def prepare_environment(self, cfg: object, logger: logging.Logger | None = None) -> None:
        self.calls.append("prepare")

    def release_resources(self, cfg: object, logger: logging.Logger | None = None) -> None:
        self.calls.append("release")
        if "fail" in self.calls:
            raise OSError("cannot release")


def test_any_object_with_the_two_methods_is_a_manager(cfg):
    double = Double()
    assert isinstance(double, InfraManagerProtocol)
    assert isinstance(InfrastructureManager(), InfraManagerProtocol)
    with managed_environment(cfg, manager=double) as env:
        assert env.run.project == "digits"
        assert not env.lock_path.exists()
    assert double.calls == ["prepare", "release"]


def test_a_failing_release_of_another_manager_does_not_hide_the_body_s_error(cfg):
    double = Double()
    double.calls.append("fail")
    with pytest.raises(KeyError), managed_environment(cfg, manager=double):
        raise KeyError("body")
    with pytest.raises(OSError, match="cannot release"), managed_environment(cfg, manager=double):
        pass


class Recorder:
    """Strategies that note the order in which they are called, and fail when told to."""

    def __init__(self, fail: tuple[str, ...] = ()) -> None:
        self.order: list[str] = []
        self.fail = fail

    def note(self, name: str) -> None:
        self.order.append(name)
        if name in self.fail:
            raise OSError(f"{name} failed")

    # a sanitizer
    def sanitize(self, scene: Any) -> Any:
        self.note("sanitize")
        from orchard_infra import SanitizeReport

        return SanitizeReport()

    def stop_survivors(self, dead: Any, scene: Any) -> tuple[()]:
        return ()

    def stop_leftovers(self, scene: Any) -> Any:
        self.note("leftover children")
        from orchard_infra import SanitizeReport

        return SanitizeReport()

    # a locker and its lease
    interval = 60.0

    def acquire(self, path: Any, record: Any, *, clear_dead: Any, logger: Any) -> Any:
        self.note("acquire")
        return self

    def holder(self, path: Any) -> None:
        return None

    def verify(self) -> None: ...

    def renew(self) -> None: ...

    def release(self) -> None:
        self.note("lock")

    # a flusher
    def flush(self, error: BaseException | None = None) -> FlushReport:
        self.note("device caches")
        return FlushReport()


class Artifacts:
    def __init__(self, recorder: Recorder, base: Path) -> None:
        self.recorder = recorder
        self.real = TemporaryArtifacts(base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def open(self, tmp_dir: Path) -> None:
        self.recorder.note("tmp dir")
        self.real.open(tmp_dir)

    def close(self, tmp_dir: Path, *, failed: bool, since: float) -> Any:
        self.recorder.note("failed" if failed else "temporary artifacts")
        return self.real.close(tmp_dir, failed=failed, since=since)


def recording(tmp_path: Path, *fail: str) -> tuple[Recorder, InfrastructureManager]:
    recorder = Recorder(fail)
    return recorder, InfrastructureManager(
        sanitizer=recorder,
        locker=recorder,
        flusher=recorder,
        cleaner=Artifacts(recorder, tmp_path),
    )


ORDER = ["leftover children", "device caches", "temporary artifacts", "lock"]


def test_the_release_goes_in_its_order(cfg, tmp_path):
    recorder, manager = recording(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with managed_environment(cfg, manager=manager):
        assert recorder.order == ["acquire", "sanitize", "tmp dir"]
    assert recorder.order[3:] == ORDER
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_step_runs_although_others_fail_and_all_failures_are_told(cfg, tmp_path, caplog):
    recorder, manager = recording(tmp_path, *ORDER)
    with pytest.raises(ReleaseError) as caught, managed_environment(cfg, manager=manager) as env:
        pass
    assert recorder.order[3:] == ORDER
    assert [str(failure) for failure in caught.value.failures] == [f"{n} failed" for n in ORDER]
    assert isinstance(caught.value, OSError)
    assert env.report.failures == caught.value.failures
    assert "ORCHARD_INFRA_RUN_ID" not in os.environ


def test_the_body_s_exception_is_never_masked(cfg, tmp_path, caplog):
    recorder, manager = recording(tmp_path, "device caches", "lock")
    with pytest.raises(KeyError, match="body"), managed_environment(cfg, manager=manager):
        raise KeyError("body")
    assert recorder.order[-1] == "lock"
    assert "device caches failed" in caplog.text  # but not lost either


def test_a_failing_flush_never_keeps_the_lock(cfg):
    class DeviceAssert:
        def flush(self, error: BaseException | None = None) -> FlushReport:
            raise RuntimeError("CUDA error: device-side assert triggered")

    manager = InfrastructureManager(flusher=DeviceAssert())
    block = managed_environment(cfg, manager=manager)
    with pytest.raises(ReleaseError, match="device-side assert"), block:
        pass
    assert not held(cfg)


def test_what_was_taken_is_given_back_when_a_later_step_of_prepare_fails(cfg, tmp_path):
    recorder, manager = recording(tmp_path, "tmp dir")
    with pytest.raises(OSError, match="tmp dir failed"):
        managed_environment(cfg, manager=manager).__enter__()
    assert recorder.order == ["acquire", "sanitize", "tmp dir", "lock"]
    assert RunRegistry().runs() == ()
    assert "ORCHARD_INFRA_RUN_ID" not in os.environ


def test_a_job_that_is_none_is_switched_off(cfg):
    nothing = InfrastructureManager(
        sanitizer=None, locker=None, flusher=None, cleaner=None, stopper=None
    )
    before = signal.getsignal(signal.SIGTERM)
    with managed_environment(cfg, manager=nothing) as env:
        assert not env.lock_path.exists()
        assert env.tmp_dir is None
        assert signal.getsignal(signal.SIGTERM) is before
        env.verify()
        assert env.stop_requested is None
    assert env.report.flushed is None


def test_only_a_body_that_failed_keeps_its_tmp_dir_when_asked(cfg, tmp_path):
    manager = InfrastructureManager(cleaner=TemporaryArtifacts(keep_on_error=True, base=tmp_path))
    with pytest.raises(KeyError), managed_environment(cfg, manager=manager) as failed:
        raise KeyError
    assert failed.tmp_dir.is_dir()
    with pytest.raises(SystemExit), managed_environment(cfg, manager=manager) as ended:
        sys.exit(0)
    assert not ended.tmp_dir.exists()


def test_an_exception_that_was_there_before_the_block_is_not_the_body_s(cfg, tmp_path):
    manager = InfrastructureManager(cleaner=TemporaryArtifacts(keep_on_error=True, base=tmp_path))
    try:
        raise KeyError("from before")
    except KeyError:
        with managed_environment(cfg, manager=manager) as env:
            pass
    assert not env.tmp_dir.exists()


def test_a_tensor_that_only_an_out_of_memory_traceback_holds_dies(cfg):
    """A stand-in for a tensor and for torch's error: what counts is the frame's local."""

    class Tensor: ...

    watched: list[weakref.ref[Tensor]] = []

    def step() -> None:
        activations = Tensor()
        watched.append(weakref.ref(activations))
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError) as caught, managed_environment(cfg):
        step()
    assert watched[0]() is None
    assert caught.value.__traceback__ is not None


# --- ranks ---


def test_a_follower_neither_locks_nor_unlocks_nor_deletes_but_flushes(cfg, monkeypatch):
    """In the re-imagined system a RANK=1 process deletes rank 0's lock file."""
    with managed_environment(cfg) as leader:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with managed_environment(cfg) as follower:
            assert follower.run.rank == 1
            assert follower.run.lock is None
            assert follower.tmp_dir.is_dir()
        assert follower.report.flushed is not None
        assert leader.lock_path.exists()
        leader.verify()


def test_rank_0_locks(cfg, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with managed_environment(cfg) as env:
        assert env.run.rank == 0
        assert held(cfg)


# --- a lost lock ---


def test_a_lost_lock_is_noticed_within_the_interval_and_the_run_is_asked_to_stop(cfg, caplog):
    manager = InfrastructureManager(locker=FileLock(interval=0.02))
    with managed_environment(cfg, manager=manager) as env:
        assert not env.lock_lost
        env.lock_path.unlink()
        wait_until(lambda: env.lock_lost)
        assert "removed or replaced" in env.stop_requested.reason
        with pytest.raises(LockLostError):
            env.verify()
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1  # once, and not at every interval


def test_a_lost_lock_is_noticed_at_once_when_asked(cfg):
    with managed_environment(cfg) as env:
        env.lock_path.unlink()
        with pytest.raises(LockLostError) as caught:
            env.verify()
        assert caught.value.lock_path == str(env.lock_path)
        assert env.lock_lost


def test_the_keeper_keeps_lock_record_and_tmp_dir_young(cfg, runtime_directory):
    manager = InfrastructureManager(locker=FileLock(interval=0.02))
    with managed_environment(cfg, manager=manager) as env:
        kept = [env.lock_path, env.tmp_dir, *(runtime_directory / "runs").iterdir()]
        for path in kept:
            os.utime(path, (1, 1))
        wait_until(lambda: all(time.time() - p.stat().st_mtime < 3600 for p in kept))
        assert len(kept) == 3


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("pass", 0),
        ("raise KeyError('body')", 1),
        ("sys.exit(3)", 3),
        ("raise KeyboardInterrupt", -signal.SIGINT),
    ],
)
def test_however_the_body_ends_nothing_is_left(tmp_path, runtime_directory, body, status):
    run = run_python(
        tmp_path,
        f"""
        import sys
        from orchard_infra import managed_environment
        with managed_environment("digits") as env:
            print(env.tmp_dir, flush=True)
            {body}
        """,
    )
    assert run.finish() == status
    assert not Path(run.output.strip()).exists()
    assert [p for p in runtime_directory.rglob("*") if p.is_file()] == []
