"""The front door: with-block, decorator, by hand; and what holds around the body."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import inspect
import logging
import os
import pickle
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from orchard_infra import (
    ConfigurationError,
    Environment,
    EnvironmentConfig,
    EnvironmentLockedError,
    FileLock,
    InfraManagerProtocol,
    InfrastructureError,
    InfrastructureManager,
    LockLostError,
    ReleaseError,
    RunRegistry,
    RunState,
    TemporaryArtifacts,
    current_environments,
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
    # A worker of pytest may have children, and then its run stays on record as ended.
    assert not any(run.is_live for run in RunRegistry().runs())


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


def test_what_the_decorator_cannot_protect_it_refuses(cfg):
    def logged(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    started: list[str] = []

    async def train() -> None:
        started.append("coroutine")

    def steps() -> Iterator[int]:
        started.append("generator")
        yield 1

    async def batches() -> Any:
        started.append("async generator")
        yield 1

    for function in (train, steps, batches):
        with pytest.raises(InfrastructureError, match="right above the function itself"):
            managed_environment(cfg)(logged(function))()
    assert started == []
    assert not held(cfg)


def test_an_object_with_an_async_call_is_protected_until_it_returns(cfg):
    class Train:
        async def __call__(self, epochs: int) -> int:
            await asyncio.sleep(0)
            assert held(cfg)
            return epochs

    train = Train()
    assert asyncio.run(managed_environment(cfg)(train)(3)) == 3
    assert asyncio.run(managed_environment(cfg)(functools.partial(train.__call__, 4))()) == 4
    assert not held(cfg)


def test_a_function_whose_result_is_a_generator_of_its_own_is_let_be(cfg):
    @managed_environment(cfg)
    def train() -> Any:
        return (epoch for epoch in range(3))

    assert list(train()) == [0, 1, 2]


def test_a_timeout_takes_the_place_of_the_locker_s(cfg):
    with managed_environment(cfg):
        waiting = threading.Thread(
            target=lambda: managed_environment(cfg, timeout=60).open().close()
        )
        waiting.start()
        wait_until(lambda: any(r.state is RunState.WAITING for r in RunRegistry().runs()))
    waiting.join()
    assert not held(cfg)


def test_a_timeout_without_a_locker_is_a_clear_error(cfg):
    block = managed_environment(cfg, manager=InfrastructureManager(locker=None), timeout=60)
    with pytest.raises(ConfigurationError, match=r"timeout=60.*no locker"):
        block.__enter__()
    for wrong in (-1, "60", True, float("nan")):
        with pytest.raises(ConfigurationError, match="timeout"):
            managed_environment(cfg, timeout=wrong).__enter__()


def test_an_async_block_waits_without_stopping_the_event_loop(cfg):
    async def main() -> tuple[int, bool]:
        ticks = 0
        holder = managed_environment(cfg).open()

        async def wait() -> bool:
            async with managed_environment(cfg, timeout=None):
                return held(cfg)

        waiting = asyncio.create_task(wait())
        while not any(r.state is RunState.WAITING for r in RunRegistry().runs()):
            await asyncio.sleep(0.001)
        for _ in range(20):
            await asyncio.sleep(0.001)
            ticks += 1
        assert not waiting.done()
        holder.close()
        return ticks, await waiting

    assert asyncio.run(main()) == (20, True)
    assert not held(cfg)


def test_a_task_that_is_cancelled_while_it_waits_never_gets_the_lock(cfg):
    async def main() -> None:
        async def wait() -> None:
            async with managed_environment(cfg, timeout=None):
                raise AssertionError("got it")

        with managed_environment(cfg):
            waiting = asyncio.create_task(wait())
            while not any(r.state is RunState.WAITING for r in RunRegistry().runs()):
                await asyncio.sleep(0.001)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert [r.state for r in RunRegistry().runs()] == [RunState.RUNNING]

    asyncio.run(main())
    assert not held(cfg)


def test_the_modules_are_there_after_an_import_of_the_package(tmp_path):
    run = run_python(
        tmp_path,
        """
        import orchard_infra
        print(orchard_infra.errors.ReleaseError.__name__)
        print(orchard_infra.config.HardwareConfig("x").allow_process_kill)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.split() == ["ReleaseError", "False"]


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


def test_environments_that_overlap_each_take_back_their_own(cfg, monkeypatch):
    monkeypatch.setenv("TMPDIR", os.environ["TMPDIR"])
    before = dict(os.environ)
    manager = InfrastructureManager(cleaner=TemporaryArtifacts(set_tmpdir=True))
    first = managed_environment("first", manager=manager).open()
    second = managed_environment("second", manager=manager).open()
    first.close()
    assert os.environ["ORCHARD_INFRA_RUN_ID"] == second.run.run_id
    assert os.environ["TMPDIR"] == str(second.tmp_dir)
    second.verify()
    second.close()
    assert dict(os.environ) == before


def test_overlapping_environments_of_one_manager_without_a_lock_end_by_themselves():
    manager = InfrastructureManager(locker=None)
    first = managed_environment("same", manager=manager)
    second = managed_environment("same", manager=manager)
    one, two = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert not one.tmp_dir.exists()
    assert two.tmp_dir.exists()
    second.__exit__(None, None, None)
    assert not two.tmp_dir.exists()


def test_a_copy_of_what_holds_the_lock_does_not_give_it_away(cfg):
    manager = InfrastructureManager()

    @dataclasses.dataclass
    class Orchestrator:
        manager: InfrastructureManager
        env: Environment

    with managed_environment(cfg, manager=manager) as env:
        for copied in (
            copy.copy(env),
            copy.deepcopy(env),
            dataclasses.asdict(Orchestrator(manager, env))["env"],
        ):
            assert copied is env
        del copied
        assert copy.deepcopy(manager) == manager == pickle.loads(pickle.dumps(manager))
        snapshot = pickle.loads(pickle.dumps(env))
        assert snapshot.run == env.run
        snapshot.close()
        del snapshot
        env.verify()
        with pytest.raises(EnvironmentLockedError):
            managed_environment(cfg).__enter__()
        assert held(cfg)


# --- over the cells of a notebook ---


def test_a_cell_that_is_run_twice_does_not_lose_the_handle(cfg):
    env = managed_environment(cfg).open()
    with pytest.raises(EnvironmentLockedError, match="current_environments"):
        managed_environment(cfg).open()
    assert current_environments() == (env,)
    current_environments()[0].close()
    assert current_environments() == ()
    assert not held(cfg)
    env.close()  # twice is once


def test_what_open_has_entered_close_releases(cfg):
    block = managed_environment(cfg)
    env = block.open()
    block.close()
    block.close()
    assert not held(cfg)
    with block:
        assert held(cfg)
    env.close()
    assert not held(cfg)


def test_what_its_own_close_has_ended_can_be_opened_again(cfg):
    handle = managed_environment(cfg)
    for _ in range(2):
        env = handle.open()
        assert held(cfg)
        env.close()
    assert not held(cfg)
    handle.close()


def test_reopening_closes_only_what_this_thread_has_opened(cfg):
    handle = managed_environment(cfg)
    with handle as block:
        with pytest.raises(InfrastructureError):
            handle.open(reopen=True)
        with pytest.raises(EnvironmentLockedError):
            managed_environment(cfg).open(reopen=True)
        assert current_environments() == (block,)
    opener = threading.Thread(target=handle.open)
    opener.start()
    opener.join()
    (other,) = current_environments()
    with pytest.raises(InfrastructureError):
        handle.open(reopen=True)
    assert current_environments() == (other,)
    other.close()
    env = handle.open()
    assert handle.open(reopen=True) is not env
    assert len(current_environments()) == 1
    handle.close()
    assert not held(cfg)


def test_another_manager_is_reopened_as_well_but_not_within_its_block(cfg):
    calls = []

    class Manager:
        def prepare_environment(self, cfg, logger=None):
            calls.append("prepare")

        def release_resources(self, cfg, logger=None):
            calls.append("release")

    handle = managed_environment(cfg, manager=Manager())
    with handle, pytest.raises(InfrastructureError):
        handle.open(reopen=True)
    assert calls == ["prepare", "release"]
    handle.open(reopen=True)
    handle.open(reopen=True)
    assert calls[2:] == ["prepare", "release", "prepare"]
    handle.close()


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


def test_any_manager_releases_what_another_one_prepared(cfg):
    env = InfrastructureManager().prepare_environment(cfg)
    InfrastructureManager(stopper=None).release_resources(cfg)
    assert not env.lock_path.exists()


def test_a_release_needs_the_path_of_the_lock_only(cfg):
    env = InfrastructureManager().prepare_environment(cfg)
    bare = SimpleNamespace(hardware=SimpleNamespace(lock_file_path=str(env.lock_path)))
    try:
        raise KeyError("body")
    except KeyError:
        InfrastructureManager().release_resources(bare)
    assert not env.lock_path.exists()


def test_an_equal_cfg_with_a_relative_path_releases_after_a_chdir(tmp_path, monkeypatch):
    def cfg() -> SimpleNamespace:
        return SimpleNamespace(
            hardware=SimpleNamespace(allow_process_kill=False, lock_file_path="locks/x.lock")
        )

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    env = InfrastructureManager().prepare_environment(cfg())
    monkeypatch.chdir(tmp_path / "elsewhere")
    InfrastructureManager().release_resources(cfg())
    assert env.lock_path == tmp_path / "locks" / "x.lock"
    assert not env.lock_path.exists()


def test_a_path_by_way_of_a_link_releases_what_the_real_one_prepared(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to("disk")

    def cfg(directory: str) -> EnvironmentConfig:
        return EnvironmentConfig("digits", lock_file_path=tmp_path / directory / "x.lock")

    env = InfrastructureManager().prepare_environment(cfg("home"))
    InfrastructureManager().release_resources(cfg("disk"))
    assert not env.lock_path.exists()
    env = InfrastructureManager().prepare_environment(cfg("disk"))
    InfrastructureManager().release_resources(cfg("home"))
    assert not env.lock_path.exists()


def test_of_several_the_newest_of_this_thread_is_released():
    manager = InfrastructureManager(locker=None, stopper=None)
    mine = [manager.prepare_environment("same") for _ in range(2)]
    others: list[Environment] = []
    thread = threading.Thread(target=lambda: others.append(manager.prepare_environment("same")))
    thread.start()
    thread.join()
    manager.release_resources("same")
    assert current_environments() == (mine[0], others[0])
    manager.release_resources("same")
    assert current_environments() == (others[0],)
    manager.release_resources("same")
    assert current_environments() == ()


def test_what_a_block_holds_is_not_released_by_hand(cfg):
    with managed_environment(cfg) as env:
        InfrastructureManager().release_resources(cfg)
        env.verify()


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
    assert [p.name for p in runtime_directory.rglob("*") if p.is_file()] == ["history.jsonl"]


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


def test_a_failing_flush_never_keeps_the_lock(cfg):
    @attrs.frozen
    class DeviceAssert:
        @contextmanager
        def around(self, env: Environment) -> Iterator[None]:
            yield
            raise RuntimeError("CUDA error: device-side assert triggered")

    manager = InfrastructureManager(flusher=DeviceAssert())
    block = managed_environment(cfg, manager=manager)
    with pytest.raises(ReleaseError, match="device-side assert"), block:
        pass
    assert not held(cfg)


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
        kept = [env.lock_path, env.tmp_dir, *(runtime_directory / "runs").glob("*.run")]
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
    assert [p.name for p in runtime_directory.rglob("*") if p.is_file()] == ["history.jsonl"]
