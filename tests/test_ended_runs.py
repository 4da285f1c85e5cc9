"""Runs that have ended while their program goes on, and the processes that a program has written
down.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import attrs
import pytest

from orchard_infra.runs import members
from orchard_infra.runs import registry as registry_module
from orchard_infra.runs.members import FoldedRun, MembersFile, read_members
from orchard_infra.runs.membership import Membership
from orchard_infra.runs.record import RunState, describe_this_run
from orchard_infra.runs.registry import Registration, RunRegistry
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity
from support import Script, is_running, needs_another_user, run_python, wait_gone, wait_until

# A program that does what it is told, a line at a time: "CODE" is executed, its value is printed.
PROGRAM = """
    import os, resource, signal, subprocess, sys, threading, time
    from orchard_infra.runs.record import RUN_ID_VARIABLE, RunState, describe_this_run
    from orchard_infra.runs.registry import RunRegistry

    def enter(name="digits", **fields):
        record = describe_this_run(name, **fields)
        registration = RunRegistry().register(record)
        os.environ[RUN_ID_VARIABLE] = record.run_id
        registration.update(record, RunState.RUNNING)
        return registration

    def sleeper(**options):
        children.append(subprocess.Popen(["sleep", "1000"], **options))
        return children[-1].pid

    def fork(act=signal.pause):
        pid = os.fork()
        if pid == 0:
            try:
                act()
            finally:
                os._exit(0)
        return pid

    def orphan():
        read, write = os.pipe()
        def act():
            fork(lambda: (os.write(write, str(os.getpid()).encode()), signal.pause()))
        os.waitpid(fork(act), 0)
        return int(os.read(read, 20))

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    children = []
    for line in sys.stdin:
        try:
            value = eval(line)
        except SyntaxError:
            value = exec(line)
        print("value:", value, flush=True)
    print("leaves", flush=True)
"""


@attrs.define
class Program:
    script: Script

    def do(self, code: str) -> str:
        answered = len(self._answers())
        self.script.tell(code)

        def answer() -> list[str]:
            assert self.script.poll() is None, self.script.transcript()
            return self._answers()[answered:]

        return wait_until(answer, what=lambda: f"{code}\n{self.script.transcript()}")[0]

    def number(self, code: str) -> int:
        return int(self.do(code))

    def leave(self) -> None:
        assert self.script.stdin is not None
        self.script.stdin.close()
        assert self.script.finish() == 0, self.script.transcript()

    def kill(self) -> None:
        self.script.kill()
        self.script.wait()

    def _answers(self) -> list[str]:
        return re.findall(r"^value: (.*)\n", self.script.output, re.MULTILINE)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(run_python(tmp_path, PROGRAM))


@pytest.fixture
def registry() -> RunRegistry:
    return RunRegistry()


def names(registry: RunRegistry) -> list[str]:
    return sorted(os.listdir(registry.directory))


def live_run_of(registry: RunRegistry, pid: int) -> str | None:
    run = Membership(registry.runs()).live_run_of(pid)
    return run.record.run_id if run else None


# The end of a run


def test_a_run_is_on_record_as_ended_while_a_child_lives_and_no_longer(program, registry):
    program.do("run = enter()")
    child = program.number("sleeper()")
    program.do("run.end()")
    [run] = registry.runs()
    assert (run.state, run.is_live, run.is_over) == (RunState.ENDED, False, False)
    assert live_run_of(registry, child) == run.record.run_id
    assert not registry.remove(run)
    assert registry.dead_runs() == ()
    assert list(Membership(()).survivors([run])) == []
    program.do("children[0].kill(), children[0].wait()")
    program.leave()
    assert names(registry) == []


def test_a_run_without_children_leaves_nothing(program, registry):
    program.do("run = enter()")
    program.do("subprocess.run(['true'])")
    program.do("run.note_members()")
    program.do("run.end()")
    assert names(registry) == []
    assert program.number("descriptors()") == 4 + 1  # the registry's directory


def test_a_child_that_ended_and_is_not_reaped_is_none(program, registry):
    program.do("run = enter()")
    child = program.number("fork(lambda: None)")
    wait_until(lambda: not is_running(child))
    program.do("run.end()")
    assert names(registry) == []


def test_a_child_that_was_there_before_keeps_an_ended_run_too(program, registry):
    """A pool that was made before the first block is a part of the program."""
    child = program.number("sleeper()")
    program.do("run = enter()")
    program.do("run.end()")
    assert live_run_of(registry, child) == registry.runs()[0].record.run_id


def test_a_program_that_exits_before_its_children_leaves_the_record_to_the_next(program, registry):
    program.do("run = enter(lock='/x.lock')")
    child = program.number("sleeper(start_new_session=True)")
    program.do("run.end()")
    program.leave()
    [run] = registry.runs()
    assert (run.state, run.was_released) == (RunState.DEAD, True)
    assert registry.dead_runs() == ()  # its process lives
    [(_, survivor)] = Membership(registry.runs()).survivors([run])
    assert (survivor.pid, survivor.kind) == (child, "detached")
    os.kill(child, signal.SIGKILL)
    wait_gone([child])
    assert registry.dead_runs() == (run,)
    assert registry.remove(run)
    assert names(registry) == []


def test_an_orphan_that_was_forked_keeps_the_run_on_record(program, registry):
    """It is no child of anybody, and to a later run it would look like a twin."""
    program.do("run = enter()")
    orphan = program.number("orphan()")
    program.do("run.end()")
    assert registry.runs()[0].state is RunState.ENDED
    assert live_run_of(registry, orphan)
    before = program.number("descriptors()")
    program.do("again = enter()")
    program.do("again.end()")
    assert len(registry.runs()) == 1
    assert program.number("descriptors()") == before
    program.kill()
    [run] = registry.runs()
    assert (run.state, run.was_released) == (RunState.SURVIVORS, True)
    os.kill(orphan, signal.SIGKILL)


def test_what_an_ended_run_kept_on_purpose_is_not_what_a_dead_run_left(program, registry):
    program.do("run = enter()")
    program.do("from attrs import evolve")
    program.do("run.update(evolve(run.record, tmp_dir='/scratch/kept'), RunState.RUNNING)")
    program.number("sleeper()")
    program.do("run.end()")
    assert registry.runs()[0].record.tmp_dir is None


def test_a_thousand_ended_runs_of_one_program_share_one_record(program, registry):
    """200 here: trials of a sweep that each leave a worker to the program's pool."""
    program.do("first = enter('first', lock='/first.lock')")
    pool = program.number("sleeper()")
    program.do("first.end()")
    [before] = registry.runs()
    descriptors = program.number("descriptors()")
    program.do("for i in range(100): run = enter(f't{i}', lock=f'/{i}.lock'); sleeper(); run.end()")
    program.do("for i in range(100): run = enter('without'); run.note_members(); run.end()")
    started = program.do("' '.join(str(child.pid) for child in children)")
    assert names(registry) == sorted([before.file_name, f"{before.record.run_id}.members"])
    assert program.number("descriptors()") == descriptors
    [run] = registry.runs()
    assert run.state is RunState.ENDED
    assert len(run.run_ids) == 101
    assert set(run.locks) == {"/first.lock", *(f"/{i}.lock" for i in range(100))}
    pids = {int(word) for word in started.split()}
    assert {member.pid for member in run.members.processes} == pids >= {pool}
    program.kill()
    [run] = registry.runs()
    assert {one.pid for _, one in Membership((run,)).survivors([run])} == pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_runs_that_overlap_in_two_threads_lose_nobody_s_children(program, registry):
    program.do("a, b = enter('a'), enter('b')")
    forked = program.number("fork()")
    started = program.number("sleeper()")
    program.do("a.end()")
    assert {run.state for run in registry.runs()} == {RunState.ENDED, RunState.RUNNING}
    orphan = program.number("orphan()")
    program.do("b.end()")
    [ended] = [run for run in registry.runs() if run.record.project == "a"]
    for pid in (forked, started, orphan):
        assert live_run_of(registry, pid) is not None
    program.kill()
    runs = registry.runs()
    found = {one.pid for _, one in Membership(runs).survivors(runs)}
    assert found == {forked, started, orphan}
    assert ended.record.project == "a"


def test_what_was_started_between_two_runs_is_no_child_of_either(program, registry):
    program.do("a = enter('a')")
    in_first = program.number("sleeper()")
    program.do("a.end()")
    program.do("os.environ.pop(RUN_ID_VARIABLE)")
    between = program.number("sleeper()")
    program.do("b = enter('b')")
    in_second = program.number("sleeper()")
    program.do("b.end()")
    program.kill()
    runs = registry.runs()
    found = {one.pid for _, one in Membership(runs).survivors(runs)}
    assert found == {in_first, in_second}
    assert is_running(between)


def test_what_was_forked_in_a_run_that_overlapped_with_the_first_is_a_worker(program, registry):
    """It holds the record of its own run, which is gone, and none of the run that ended first."""
    program.do("b = enter('b')")
    forked = program.number("fork()")
    program.do("a = enter('a')")
    program.do("a.end()")
    program.do("b.end()")
    program.kill()
    runs = registry.runs()
    assert [(one.pid, one.kind) for _, one in Membership(runs).survivors(runs)] == [
        (forked, "worker")
    ]


@pytest.mark.parametrize("how", ["end", "abandon", "close"])
def test_a_forked_child_never_alters_the_files_of_its_parent(program, registry, how):
    program.do("ended, run = enter('ended'), enter('running')")
    program.number("sleeper()")
    program.do("ended.end()")
    program.do("run.note_members()")

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in registry.directory.iterdir()}

    before = contents()
    code = f"(ended.{how}(), run.{how}(), run.note_members(), enter('child').end())"
    child = program.number(f"fork(lambda: {code})")
    program.do(f"os.waitpid({child}, 0)")
    assert contents() == before
    assert [run.state for run in registry.runs()] == [RunState.ENDED, RunState.RUNNING]


def test_a_child_that_exits_through_python_s_hooks_leaves_its_parent_s_record(tmp_path, registry):
    source = """
        import os, subprocess, sys
        from orchard_infra.runs.record import describe_this_run
        from orchard_infra.runs.registry import RunRegistry
        registration = RunRegistry().register(describe_this_run("digits"))
        child = subprocess.Popen(["sleep", "1000"])
        registration.end()
        if os.fork() == 0:
            sys.exit(0)
        os.wait()
        print("forked", flush=True)
        sys.stdin.readline()
    """
    script = run_python(tmp_path, source)
    script.wait_for("forked")
    assert [run.state for run in registry.runs()] == [RunState.ENDED]


def test_a_run_in_a_forked_child_is_on_record_for_itself(program, registry):
    """Its program is the child; what its parent has on record is the parent's."""
    program.do("first = enter('parent')")
    program.number("sleeper()")
    program.do("first.end()")
    child = program.number(
        "fork(lambda: (run := enter('child'), sleeper(), run.end(), signal.pause()))"
    )
    wait_until(lambda: len([r for r in registry.runs() if r.state is RunState.ENDED]) == 2)
    [own] = [run for run in registry.runs() if run.record.project == "child"]
    assert own.record.pid == child
    [parent] = [run for run in registry.runs() if run.record.project == "parent"]
    assert parent.members.folded == ()


# A release that failed


def test_an_abandoned_run_is_no_live_one_and_counts_as_crashed_once_its_program_is_gone(
    program, registry
):
    program.do("run = enter()")
    program.do("from attrs import evolve")
    program.do("run.update(evolve(run.record, tmp_dir='/scratch/left'), RunState.RUNNING)")
    before = program.number("descriptors()")
    child = program.number("sleeper()")
    program.do("run.abandon()")
    [run] = registry.runs()
    assert (run.state, run.was_released) == (RunState.ENDED, False)
    assert live_run_of(registry, child)
    assert program.number("descriptors()") <= before
    program.leave()
    [run] = registry.runs()
    assert (run.state, run.was_released) == (RunState.DEAD, False)
    assert run.record.tmp_dir == "/scratch/left"
    [(_, survivor)] = Membership((run,)).survivors([run])
    assert (survivor.pid, survivor.kind) == (child, "program")
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("was_noted", [True, False])
def test_without_a_free_descriptor_the_evidence_stays(program, registry, was_noted):
    program.do("run = enter()")
    early = program.number("sleeper()")
    if was_noted:
        program.do("run.note_members()")
    late = program.number("fork()")
    program.do("soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)")
    program.do("resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() - 1, hard))")
    program.do("run.end()")
    program.do("resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))")
    [run] = registry.runs()
    assert run.state is RunState.ENDED
    assert live_run_of(registry, early) == live_run_of(registry, late) == run.record.run_id
    program.kill()
    [run] = registry.runs()
    assert {one.pid for _, one in Membership((run,)).survivors([run])} == {early, late}


def test_a_program_that_has_closed_every_descriptor_ends_its_run(program, registry):
    program.do("run = enter()")
    program.do("os.closerange(3, 1000)")
    program.do("run.end()")
    assert names(registry) == []
    program.do("run = enter()")
    child = program.number("fork()")
    program.do("os.closerange(3, 1000)")
    program.do("run.end()")
    [run] = registry.runs()
    assert run.state is RunState.ENDED
    assert live_run_of(registry, child) == run.record.run_id


def test_a_record_that_somebody_removed_takes_no_further_runs(program, registry):
    program.do("first = enter('first')")
    program.number("sleeper()")
    program.do("first.end()")
    for path in registry.directory.iterdir():
        path.unlink()
    program.do("second = enter('second')")
    child = program.number("sleeper()")
    program.do("second.end()")
    [run] = registry.runs()
    assert run.record.project == "second"
    assert live_run_of(registry, child) == run.record.run_id


# Who is written down


def member_lines(registration: Registration) -> list[str]:
    path = registration.path.with_suffix(".members")
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def registration(registry: RunRegistry):
    """A run of this very process, which has no children that the test did not start."""
    made = registry.register(describe_this_run("digits"))
    yield made
    made.close()


def test_who_is_below_the_program_is_written_down_once(registration, registry):
    known = len(member_lines(registration))
    child = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"])
    [grandchild] = wait_until(lambda: processes.children_of(child.pid))
    for _ in range(3):
        registration.note_members()
    expected = {processes.identity_of(child.pid), processes.identity_of(grandchild)}
    lines = member_lines(registration)
    assert len(lines) == known + 2
    assert {f"{one.pid} {one.create_time} inside" for one in expected} <= set(lines)
    [run] = registry.runs()
    assert expected <= run.members.processes
    assert not expected & run.members.before
    assert registration.path.with_suffix(".members").stat().st_mode & 0o777 == 0o600
    registration.close()
    registration.note_members([ProcessIdentity(7, 1.5)])  # of another thread, which comes late
    assert names(registry) == []
    os.kill(grandchild, signal.SIGKILL)
    child.wait()


def test_who_was_there_before_the_run_is_told_apart(registry):
    child = subprocess.Popen(["sleep", "1000"])
    registration = registry.register(describe_this_run("digits"))
    identity = processes.identity_of(child.pid)
    [run] = registry.runs()
    assert identity in run.members.before
    registration.close()
    child.kill()
    child.wait()


def test_a_list_that_has_grown_keeps_who_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "_GROWN", 50)
    path = str(tmp_path / "abc.members")
    file = MembersFile(path, compact_at=50)
    me = processes.own_identity()
    gone = [ProcessIdentity(2**22 + i, float(i)) for i in range(500)]
    file.add([me], before=True)
    for identity in gone:
        file.add([identity])
        assert me in read_members(path).processes
    lines = Path(path).read_text().splitlines()
    assert len(lines) < 110
    assert read_members(path).before == {me}


def test_a_list_that_has_grown_keeps_the_runs_whose_id_a_process_carries(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "_GROWN", 50)
    path = str(tmp_path / "abc.members")
    file = MembersFile(path, compact_at=50)
    environ = {**os.environ, "ORCHARD_INFRA_RUN_ID": "a7"}
    child = subprocess.Popen(["sleep", "1000"], env=environ)
    wait_until(lambda: processes.started_with(child.pid, "ORCHARD_INFRA_RUN_ID", {"a7"}))
    for number in range(200):
        file.fold(FoldedRun(f"a{number}", (1, number), "/x.lock"))
    folded = read_members(path).folded
    assert len(folded) < 110
    assert FoldedRun("a7", (1, 7), "/x.lock") in folded
    child.kill()
    child.wait()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 5000,
        b"\xff\xfe\n" * 100,
        b"1 2\n1 2 3\n-1 5 inside\n1 -5 inside\n1\n 1 2 inside\n1  2 inside\n"
        b"99999999999 1.0 inside\n1 nan inside\n1 inf inside\n1 1e5 inside\n",
        b"{}\n[]\n{\n" + b'{"run_id": ' * 5000 + b"\n",
        b'{"run_id": "../x", "file": [1, 2]}\n{"run_id": "a", "file": [1]}\n{"run_id": "a"}\n',
        b'{"run_id": "a", "file": ["x", true]}\n{"run_id": 7, "file": [1, 2]}\n',
    ],
    ids=range(7),
)
def test_a_list_with_anything_in_it_is_read_as_far_as_it_goes(tmp_path, content):
    path = tmp_path / "abc.members"
    good = b'7 1.5 inside\n8 2.0 before\n{"run_id": "ab", "file": [1, 2], "lock": "/x", "new": 1}\n'
    path.write_bytes(good + content + b"\n9 3.0 inside\n10 4.0 insi")
    found = read_members(str(path))
    assert found.processes == {ProcessIdentity(7, 1.5), ProcessIdentity(8, 2.0)} | (
        {ProcessIdentity(9, 3.0)}
    )
    assert found.before == {ProcessIdentity(8, 2.0)}
    assert found.folded == (FoldedRun("ab", (1, 2), "/x"),)


def test_a_list_of_any_size_costs_neither_time_nor_memory(tmp_path):
    path = tmp_path / "abc.members"
    path.write_bytes(b"7 1.5 inside\n")
    os.truncate(path, 2 * 2**30)
    began = time.process_time()
    assert read_members(str(path)).processes == {ProcessIdentity(7, 1.5)}
    assert time.process_time() - began < 5


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_list_that_is_no_regular_file_is_passed_over(tmp_path, plant):
    path = str(tmp_path / "abc.members")
    plant(path)
    assert read_members(path) == members.NOBODY


@needs_another_user
def test_somebody_else_s_list_is_passed_over(tmp_path):
    path = tmp_path / "abc.members"
    path.write_bytes(b"7 1.5 inside\n")
    os.chown(path, 12345, 12345)
    assert read_members(str(path)) == members.NOBODY


def test_after_a_write_that_failed_half_way_the_next_lines_are_whole(tmp_path, monkeypatch):
    """A mock of a full disk."""
    path = str(tmp_path / "abc.members")
    file = MembersFile(path)
    first, second, third = (ProcessIdentity(number, 1.5) for number in (7, 8, 9))
    file.add([first])
    really = os.write

    def full(fd: int, data: bytes) -> int:
        really(fd, bytes(data)[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        file.add([second])
    monkeypatch.setattr(os, "write", really)
    file.add([second, third])
    assert read_members(path).processes == {first, second, third}


def test_a_list_without_a_record_is_collected_and_no_other(registration, registry):
    registration.note_members([ProcessIdentity(7, 1.5)])
    stray = registry.directory / "abc.members"
    stray.write_bytes(b"7 1.5 inside\n")
    registry.collect_unnamed()
    assert names(registry) == [
        f"{registration.record.run_id}.members",
        f"{registration.record.run_id}.run",
    ]


def test_a_list_goes_with_its_record(registry):
    registration = registry.register(describe_this_run("digits"))
    registration.note_members([ProcessIdentity(7, 1.5)])
    assert len(names(registry)) == 2
    registration.close()
    assert names(registry) == []
    dead = attrs.evolve(describe_this_run("digits"), pid=2**31 - 1)
    registry.register(dead).close_descriptor()
    (registry.directory / f"{dead.run_id}.members").write_bytes(b"7 1.5 inside\n")
    assert registry.remove(registry.find(dead.run_id))
    assert names(registry) == []


def test_a_list_is_kept_young_with_its_record(registration, registry):
    registration.note_members([ProcessIdentity(7, 1.5)])
    for path in registry.directory.iterdir():
        os.utime(path, (1, 1))
    registration.touch()
    for path in registry.directory.iterdir():
        assert time.time() - path.stat().st_mtime < 3600


def test_the_record_of_ended_runs_is_kept_young_by_a_later_run(program, registry):
    program.do("first = enter('first')")
    program.number("sleeper()")
    program.do("first.end()")
    for path in registry.directory.iterdir():
        os.utime(path, (1, 1))
    program.do("second = enter('second')")
    program.do("second.touch()")
    for path in registry.directory.iterdir():
        assert time.time() - path.stat().st_mtime < 3600


def test_many_threads_write_down_everybody_once(registration):
    known = len(member_lines(registration))
    identities = [ProcessIdentity(2**22 + i, 1.5) for i in range(200)]
    begin = threading.Barrier(4)

    def note() -> None:
        begin.wait()
        for identity in identities:
            registration.note_members([identity])

    threads = [threading.Thread(target=note) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(member_lines(registration)) == known + 200


# Records of other versions


def test_a_record_of_the_version_before_is_read_and_one_of_a_later_one_too(registry):
    registration = registry.register(describe_this_run("digits"))
    path = registration.path
    fields = json.loads(path.read_bytes())
    assert {"session", "environment"} <= fields.keys()
    former = {name: fields[name] for name in fields if name not in ("session", "environment")}
    later = {**fields, "of_a_later_version": {"id": 7}}
    for written in (former, later):
        (registry.directory / "other.run").write_text(json.dumps({**written, "run_id": "other"}))
        found = registry.find("other")
        assert found is not None
        assert found.record.leader == registration.record.leader
        assert found.record.session == written.get("session")
        assert found.record.environment == written.get("environment")
    registration.close()
    (registry.directory / "other.run").unlink()


def test_a_program_that_led_a_run_is_known_until_its_very_end(tmp_path, monkeypatch):
    """The interpreter takes its modules apart before the process ends; that may take seconds."""
    known = registry_module._OpenDirectory(str(tmp_path))
    fd = known._fd
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    del known
    gc.collect()
    assert os.path.samestat(os.fstat(fd), os.stat(tmp_path))
    os.close(fd)
