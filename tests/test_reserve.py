"""A release finds a few file descriptors, however many the body has used up."""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchard_infra.system import reserve
from support import run_python, succeeds_in_a_fork

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a real limit on descriptors")

# For a process of its own, whose limit can be lowered.
PRELUDE = """
    import os, resource, threading
    from orchard_infra.system import reserve

    def number():
        return len(os.listdir("/dev/fd"))

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    def use_up():
        used = []
        try:
            while True:
                used.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            return used

    def free():
        used = use_up()
        for fd in used:
            os.close(fd)
        return len(used)
"""


def run(tmp_path: Path, source: str) -> list[str]:
    script = run_python(tmp_path, PRELUDE + source)
    assert script.finish() == 0, script.transcript()
    return script.output.split()


def descriptors() -> set[int]:
    listed = {int(name) for name in os.listdir("/dev/fd")}
    return {fd for fd in listed if os.path.lexists(f"/dev/fd/{fd}")}  # not that of the listing


@pytest.fixture
def held() -> Iterator[set[int]]:
    """What an environment keeps. It is left by the test, and its reserve given back afterwards."""
    reserve._rest()
    before = descriptors()
    reserve.hold()
    yield descriptors() - before
    reserve._rest()


def test_a_release_has_descriptors_when_the_body_has_used_up_all(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
    before = number()
    reserve.hold()
    used = use_up()
    print(free())
    reserve.let_go()
    print(free())
    for fd in used:
        os.close(fd)
    print(number() - before)
    """,
    )
    assert output == ["0", "6", "0"]


def test_the_reserve_stays_for_the_environments_that_are_still_open(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
    reserve.hold(); reserve.hold(); reserve.hold()
    reserve.let_go()        # others are open, and there is no lack: it stays
    used = use_up()
    print(free())
    reserve.let_go()        # now this one needs it
    print(free())
    for fd in used:
        os.close(fd)
    reserve.hold()          # and it is filled again
    used = use_up()
    reserve.let_go(); reserve.let_go()
    print(free())
    """,
    )
    assert output == ["0", "6", "6"]


def test_an_environment_can_begin_without_a_reserve(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
    used = use_up()
    os.close(used.pop())
    before = free()
    reserve.hold()
    print(free() - before)
    reserve.let_go()
    print(free() - before)
    """,
    )
    assert output == ["0", "0"]


def test_no_program_that_is_started_inherits_it(held: set[int]) -> None:
    assert len(held) == 6
    assert not any(os.get_inheritable(fd) for fd in held)
    reserve.let_go()


def test_it_is_kept_between_short_environments_and_given_back_soon_after_the_last(
    tmp_path: Path,
) -> None:
    output = run(
        tmp_path,
        """
    import time
    from orchard_infra import managed_environment

    def pipes():
        return {fd for fd in range(64) if os.path.exists(f"/dev/fd/{fd}")
                and os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")}

    before = pipes()
    with managed_environment("digits"):
        kept = pipes() - before
    with managed_environment("digits"):
        print(len(kept), pipes() - before == kept)
    deadline = time.monotonic() + 20
    while pipes() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    print(pipes() == before)
    with managed_environment("digits"):
        print(len(pipes() - before))
    """,
    )
    assert output == ["6", "True", "True", "6"]


def test_a_program_that_has_closed_every_descriptor_gets_a_new_one(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
    reserve.hold()
    reserve.let_go()
    os.closerange(3, 64)
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(6)]
    before = number()
    reserve.hold()
    print(number() - before, all(os.path.sameopenfile(fd, others[0]) for fd in others))
    """,
    )
    assert output == ["6", "True"]


def test_a_forked_child_has_none_and_keeps_its_own(held: set[int]) -> None:
    def in_the_child() -> bool:
        inherited = held & descriptors()
        before = descriptors()
        reserve.hold()
        own = len(descriptors() - before)
        reserve.let_go()
        return (inherited, own) == (set(), 6)

    assert succeeds_in_a_fork(in_the_child)
    assert held <= descriptors()
    reserve.let_go()


def test_a_file_that_got_one_of_its_numbers_meanwhile_is_not_closed(held: set[int]) -> None:
    """A program that closes all descriptors, as a daemon does, may open others in their place."""
    number = min(held)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, number)
    os.close(null)
    try:
        reserve.let_go()
        reserve._rest()
        assert stat.S_ISCHR(os.fstat(number).st_mode)
    finally:
        os.close(number)


def test_a_fork_while_another_thread_begins_and_ends_does_not_hang() -> None:
    stop = threading.Event()

    def begin_and_end_once() -> bool:
        reserve.hold()
        reserve.let_go()
        return True

    def begin_and_end() -> None:
        while not stop.is_set():
            begin_and_end_once()

    thread = threading.Thread(target=begin_and_end)
    thread.start()
    try:
        for _ in range(40):
            assert succeeds_in_a_fork(begin_and_end_once, timeout=20)
    finally:
        stop.set()
        thread.join()


BODY = """
    import os, resource, sys
    from orchard_infra import managed_environment

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
    hoard = []
    try:
        with managed_environment("digits") as env:
            path = env.tmp_dir / "a" / "b" / "c"
            path.mkdir(parents=True)
            (path / "file").write_text("x")
            if sys.argv[1] == "none":   # nor is there one when the reserve is let go
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
            while True:
                hoard.append(open("/dev/null"))
    except OSError as error:
        assert error.errno == 24, error
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    print(env.tmp_dir, env.tmp_dir.exists(), env.lock_path.exists())
    """


def test_a_body_that_dies_of_emfile_leaves_nothing_behind(
    tmp_path: Path, runtime_directory: Path
) -> None:
    script = run_python(tmp_path, BODY, "reserve")
    assert script.finish() == 0, script.transcript()
    assert script.output.split()[1:] == ["False", "False"]
    assert list((runtime_directory / "runs").glob("*.run")) == []


def test_what_a_release_without_any_descriptor_leaves_is_removed_by_the_next_run(
    tmp_path: Path,
) -> None:
    script = run_python(tmp_path, BODY, "none")
    assert script.finish() == 0, script.transcript()
    tmp_dir, there, _ = script.output.split()
    assert there == "True"
    assert "Too many open files" in script.error_output
    following = run_python(tmp_path, BODY, "reserve")
    assert following.finish() == 0, following.transcript()
    assert not Path(tmp_dir).exists()
