"""The error tree: what it derives from, and what of it crosses a process boundary."""

from __future__ import annotations

import copy
import pickle

import pytest

import orchard_infra
from orchard_infra.errors import (
    ConfigurationError,
    EnvironmentLockedError,
    InfrastructureError,
    LockLostError,
    ReleaseError,
)
from orchard_infra.runs.record import RunRecord, Survivor, describe_this_run
from support import run_python

HOLDER: RunRecord = describe_this_run("digits", lock="/locks/digits.lock")
SURVIVOR = Survivor(4242, 17.25, "python train.py", "forked by the run")


def every_kind() -> list[InfrastructureError]:
    return [
        InfrastructureError("no place"),
        ConfigurationError("cfg.hardware is missing"),
        EnvironmentLockedError(
            "taken", holder=HOLDER, survivors=[SURVIVOR], lock_path="/locks/digits.lock"
        ),
        LockLostError("gone", lock_path="/locks/digits.lock"),
        ReleaseError("not all", failures=[OSError(28, "No space left"), ValueError("odd")]),
    ]


def name(error: object) -> str:
    return type(error).__name__


@pytest.mark.parametrize("error", every_kind(), ids=name)
def test_every_error_is_the_base_and_a_runtime_error_and_public(error):
    assert isinstance(error, InfrastructureError)
    assert isinstance(error, RuntimeError)
    assert getattr(orchard_infra, type(error).__name__) is type(error)


def test_a_release_error_alone_is_an_os_error_too():
    assert [type(error) for error in every_kind() if isinstance(error, OSError)] == [ReleaseError]


@pytest.mark.parametrize("error", every_kind(), ids=name)
@pytest.mark.parametrize(
    "travel",
    [
        *(
            lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
        ),
        copy.copy,
        copy.deepcopy,
    ],
)
def test_every_error_travels_with_its_data(error, travel):
    arrived = travel(error)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    for attribute in ("holder", "survivors", "lock_path"):
        assert getattr(arrived, attribute, "none") == getattr(error, attribute, "none")
    told = [(type(f), f.args) for f in getattr(arrived, "failures", ())]
    assert told == [(type(f), f.args) for f in getattr(error, "failures", ())]


def test_a_note_that_somebody_added_travels_too():
    for error in every_kind():
        error.__notes__ = ["in trial 7"]  # add_note, where Python has it
        assert pickle.loads(pickle.dumps(error)).__notes__ == ["in trial 7"]


def test_without_data_there_is_nothing_rather_than_an_attribute_error():
    locked = EnvironmentLockedError("taken")
    assert (locked.holder, locked.survivors, locked.lock_path) == (None, (), None)
    assert LockLostError("gone").lock_path is None
    assert ReleaseError("not all").failures == ()


def test_a_release_error_has_the_number_and_the_file_of_the_first_failure_that_has_one():
    full = OSError(28, "No space left on device", "/runs/a.run")
    failures = [ValueError("odd"), OSError("of no number"), full, PermissionError(13, "Denied")]
    error = ReleaseError("not all of it", failures=failures)

    for travel in (lambda error: error, lambda error: pickle.loads(pickle.dumps(error)), copy.copy):
        arrived = travel(error)
        assert (arrived.errno, arrived.strerror, arrived.filename) == (
            28,
            full.strerror,
            full.filename,
        )
        assert str(arrived) == "not all of it"
        assert arrived.args == ("not all of it",)
    with pytest.raises(OSError, match="not all of it") as caught:
        raise error
    assert caught.value.errno == 28


def test_a_release_error_without_such_a_failure_has_none():
    for failures in ((), [ValueError("odd")], [OSError("of no number")]):
        error = ReleaseError("not all of it", failures=failures)
        assert (error.errno, error.strerror, error.filename) == (None, None, None)
        assert str(error) == "not all of it"


def test_a_release_error_within_another_one_passes_its_number_on():
    inner = ReleaseError("inner", failures=[OSError(28, "No space left on device")])
    assert ReleaseError("outer", failures=[inner]).errno == 28


def test_survivors_and_failures_can_be_any_iterable():
    assert EnvironmentLockedError("taken", survivors=iter([SURVIVOR])).survivors == (SURVIVOR,)
    [failure] = ReleaseError("not all", failures=iter([ValueError("odd")])).failures
    assert failure.args == ("odd",)


def test_errors_cross_a_real_process_pool_whole(tmp_path):
    source = """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        from orchard_infra.errors import EnvironmentLockedError, LockLostError, ReleaseError
        from orchard_infra.runs.record import Survivor, describe_this_run

        def fail(kind):
            if kind == "locked":
                raise EnvironmentLockedError(
                    "taken",
                    holder=describe_this_run("digits"),
                    survivors=[Survivor(7, 1.5, "python", "forked by the run")],
                    lock_path="/x.lock",
                )
            if kind == "lost":
                raise LockLostError("gone", lock_path="/x.lock")
            raise ReleaseError("not all", failures=[OSError(28, "No space left")])

        def outcome(pool, kind):
            try:
                pool.submit(fail, kind).result()
            except (OSError, RuntimeError) as error:
                return error

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                locked = outcome(pool, "locked")
                assert type(locked) is EnvironmentLockedError and str(locked) == "taken"
                assert locked.holder.project == "digits"
                [worker] = pool._processes
                assert locked.holder.pid == worker
                assert locked.survivors == (Survivor(7, 1.5, "python", "forked by the run"),)
                assert locked.lock_path == "/x.lock"
                assert outcome(pool, "lost").lock_path == "/x.lock"
                released = outcome(pool, "released")
                assert type(released) is ReleaseError
                assert released.failures[0].errno == 28
            print("all crossed")
    """
    script = run_python(tmp_path, source)
    script.wait_for("all crossed")
    assert script.finish() == 0
