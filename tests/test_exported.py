"""An environment variable is put back, in whatever order the environments of a process end."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import pytest

from orchard_infra.system.exported import export, look_up
from support import succeeds_in_a_fork

NAME = "ORCHARD_TEST_EXPORTED"


@pytest.fixture(autouse=True, params=[None, "outer"])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The variable's value before any environment: each test runs without one, and with one."""
    if request.param is None:
        monkeypatch.delenv(NAME, raising=False)
    else:
        monkeypatch.setenv(NAME, request.param)
    value: str | None = request.param
    return value


def current() -> str | None:
    return os.environ.get(NAME)


def test_children_see_the_value_and_the_one_of_before_comes_back(before: str | None) -> None:
    withdraw = export(NAME, "a")
    ask = [sys.executable, "-S", "-c", f"import os; print(os.environ[{NAME!r}])"]
    assert subprocess.check_output(ask, text=True).strip() == "a"
    withdraw()
    assert current() == before


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_environments_that_end_in_any_order_leave_the_value_of_before(
    before: str | None, order: tuple[str, ...]
) -> None:
    withdraw = {value: export(NAME, value) for value in "abc"}
    for value in order:
        withdraw.pop(value)()
        # The latest one that still stands.
        assert current() == max(withdraw, default=before)


def test_environments_that_set_the_same_value_may_end_in_any_order(before: str | None) -> None:
    first, second = export(NAME, "same"), export(NAME, "same")
    first()
    assert current() == "same"
    second()
    assert current() == before


def test_a_change_by_somebody_else_is_left_alone() -> None:
    withdraw = export(NAME, "a")
    os.environ[NAME] = "theirs"
    withdraw()
    assert current() == "theirs"


def test_a_deletion_by_somebody_else_is_left_alone() -> None:
    withdraw = export(NAME, "a")
    del os.environ[NAME]
    withdraw()
    assert current() is None


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_change_by_somebody_else_between_two_environments_comes_back(outer_first: bool) -> None:
    outer = export(NAME, "a")
    os.environ[NAME] = "theirs"
    inner = export(NAME, "b")
    for withdraw in (outer, inner) if outer_first else (inner, outer):
        withdraw()
    assert current() == "theirs"


def test_a_withdrawal_happens_once(before: str | None) -> None:
    first = export(NAME, "a")
    first()
    again = export(NAME, "a")
    first()
    assert current() == "a"
    again()
    assert current() == before


def test_a_value_that_cannot_be_set_changes_nothing(before: str | None) -> None:
    with pytest.raises(ValueError, match="null"):
        export(NAME, "a\0b")
    assert current() == before
    withdraw = export(NAME, "a")
    withdraw()
    assert current() == before


def test_a_forked_child_keeps_the_value_and_can_set_its_own() -> None:
    withdraw = export(NAME, "a")

    def in_the_child() -> bool:
        withdraw()  # as the child does when it unwinds through its parent's block
        kept = current()
        own = export(NAME, "child")
        set_to = current()
        own()
        return (kept, set_to, current()) == ("a", "child", "a")

    assert succeeds_in_a_fork(in_the_child)
    withdraw()


def test_a_fork_while_another_thread_sets_the_variable_does_not_hang(before: str | None) -> None:
    stop = threading.Event()

    def set_all_the_time() -> None:
        while not stop.is_set():
            export(NAME, "a")()

    thread = threading.Thread(target=set_all_the_time)
    thread.start()
    try:
        for _ in range(40):
            assert succeeds_in_a_fork(lambda: export(NAME, "child"), timeout=20)
    finally:
        stop.set()
        thread.join()
    assert current() == before


def test_threads_that_overlap_leave_the_value_of_before(before: str | None) -> None:
    started = threading.Barrier(8)

    def overlap(number: int) -> None:
        started.wait()
        for _ in range(300):
            export(NAME, str(number))()

    threads = [threading.Thread(target=overlap, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert current() == before


def test_a_variable_is_looked_up_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCHARD_TEST", raising=False)
    assert look_up("ORCHARD_TEST") is None
    for value in ("", "a=b", "gr\u00fcn"):
        os.environ["ORCHARD_TEST"] = value
        assert look_up("ORCHARD_TEST") == value
    del os.environ["ORCHARD_TEST"]
    assert look_up("ORCHARD_TEST") is None
