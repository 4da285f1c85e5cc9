"""Run records, and the registry that tells live runs from dead ones, with real processes."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import sys
import textwrap
import time
from pathlib import Path

import attrs
import pytest

from orchard_infra.errors import InfrastructureError
from orchard_infra.runs import registry as runs
from orchard_infra.runs.environ import environment_digest
from orchard_infra.runs.record import (
    RECORD_LIMIT,
    RUN_ID_VARIABLE,
    RunRecord,
    RunState,
    Survivor,
    clip,
    cut,
    describe_this_run,
    from_json,
    leader_is_dead,
    read_record,
    to_json,
)
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.system import files, processes
from orchard_infra.system.flock import lock_descriptor
from orchard_infra.system.text import duration, printable
from support import (
    IN_TIME_NAMESPACE,
    Script,
    is_running,
    needs_another_user,
    needs_namespaces,
    needs_time_namespaces,
    run_command,
    run_python,
    wait_gone,
    wait_until,
    written,
)

# A run that does what it is told: run, fork, close every descriptor, leave.
RUN = """
    import os, signal, sys, time
    from orchard_infra.runs.registry import RunRegistry
    from orchard_infra.runs.record import RunState, describe_this_run

    record = describe_this_run("digits")
    registration = RunRegistry().register(record)
    print("registered", record.run_id, flush=True)
    for line in sys.stdin:
        answer = "yes"
        match line.strip():
            case "run":
                registration.update(record, RunState.RUNNING)
            case "fork":
                child = os.fork()
                if child == 0:
                    signal.pause()
                answer = child
            case "close descriptors":
                os.closerange(3, 1000)
            case "leave":
                registration.close()
        print("done:", answer, flush=True)
"""


@pytest.fixture
def registry() -> RunRegistry:
    return RunRegistry()


@attrs.define
class Run:
    script: Script
    run_id: str

    def do(self, order: str) -> str:
        """Give an order, and return the answer that comes once it is carried out."""
        answered = len(self._answers())
        self.script.tell(order)
        return wait_until(lambda: self._answers()[answered:], what=order)[0]

    def fork(self) -> int:
        return int(self.do("fork"))

    def _answers(self) -> list[str]:
        return re.findall(r"^done: (.*)\n", self.script.output, re.MULTILINE)

    def kill(self) -> None:
        self.script.kill()
        self.script.wait()


def start(tmp_path: Path, *orders: str) -> Run:
    script = run_python(tmp_path, RUN)
    run = Run(script, script.wait_for("registered").split()[1])
    for order in orders:
        run.do(order)
    return run


def state_of(registry: RunRegistry, run_id: str) -> RunState | None:
    run = registry.find(run_id)
    assert run in (*registry.runs(), None)
    return run.state if run else None


def record_of(**changes: object) -> RunRecord:
    return attrs.evolve(describe_this_run("digits"), **changes)


def write(registry: RunRegistry, record: RunRecord, state: RunState = RunState.RUNNING) -> Path:
    """A record file as a process leaves it that is no more: not locked by anybody."""
    files.private_directory(registry.directory)
    path = registry.directory / f"{record.run_id}.run"
    path.write_bytes(to_json(record, state))
    return path


# The states


def test_a_run_waits_then_runs_then_leaves_nothing(tmp_path, registry):
    run = start(tmp_path)
    assert state_of(registry, run.run_id) is RunState.WAITING
    assert registry.find(run.run_id).is_live
    run.do("run")
    assert state_of(registry, run.run_id) is RunState.RUNNING
    assert registry.find(run.run_id).is_live
    run.do("leave")
    assert state_of(registry, run.run_id) is None
    assert list(registry.directory.iterdir()) == []


def test_the_record_says_who_the_run_is(tmp_path, registry):
    run = start(tmp_path)
    record = registry.find(run.run_id).record
    assert (record.project, record.pid) == ("digits", run.script.pid)
    assert record.leader == processes.identity_of(run.script.pid)
    assert record.host == socket.gethostname()
    assert record.boot_id == processes.boot_id() != ""
    assert record.pid_namespace == processes.pid_namespace()
    assert record.uid == os.geteuid()
    assert record.argv == (sys.executable, str(tmp_path / "script.py"))
    assert record.cwd == str(tmp_path)
    assert abs(record.started_at - time.time()) < 600
    assert record.is_local
    assert not leader_is_dead(record)


@pytest.mark.parametrize("orders", [(), ("run",)], ids=["waiting", "running"])
def test_a_killed_run_is_dead_and_can_be_removed(tmp_path, registry, orders):
    run = start(tmp_path, *orders)
    run.kill()
    dead = registry.find(run.run_id)
    assert dead.state is RunState.DEAD
    assert not dead.is_live
    assert leader_is_dead(dead.record)
    assert registry.remove(dead)
    assert not list(registry.directory.glob("*.run"))
    assert not registry.remove(dead)


def test_a_killed_run_that_is_not_reaped_is_dead_too(tmp_path, registry):
    run = start(tmp_path, "run")
    run.script.send_signal(9)
    wait_until(lambda: not is_running(run.script.pid))
    assert processes.read_stat(run.script.pid).state == "Z"
    assert state_of(registry, run.run_id) is RunState.DEAD


def test_forked_children_of_a_killed_run_are_survivors_until_the_last_has_gone(tmp_path, registry):
    run = start(tmp_path, "run")
    first, second = run.fork(), run.fork()
    assert state_of(registry, run.run_id) is RunState.RUNNING
    run.kill()
    found = registry.find(run.run_id)
    assert found.state is RunState.SURVIVORS
    assert not found.is_live
    assert not registry.remove(found)
    assert state_of(registry, run.run_id) is RunState.SURVIVORS
    os.kill(first, 9)
    wait_gone([first])
    assert state_of(registry, run.run_id) is RunState.SURVIVORS
    os.kill(second, 9)
    wait_gone([second])
    wait_until(lambda: registry.find(run.run_id).state is RunState.DEAD)


def test_a_live_run_is_never_removed(tmp_path, registry):
    for orders in ((), ("run",), ("run", "close descriptors")):
        run = start(tmp_path, *orders)
        assert not registry.remove(registry.find(run.run_id))
        assert registry.find(run.run_id).is_live


def test_a_run_that_closed_every_descriptor_and_lives_is_not_taken_for_dead(tmp_path, registry):
    run = start(tmp_path, "run", "close descriptors")
    assert state_of(registry, run.run_id) is RunState.RUNNING
    run.kill()
    assert state_of(registry, run.run_id) is RunState.DEAD


def test_a_run_that_closed_every_descriptor_leaves_all_the_same(tmp_path, registry):
    run = start(tmp_path, "run", "close descriptors", "leave")
    assert registry.find(run.run_id) is None
    assert run.script.poll() is None


def test_the_pid_of_a_dead_run_in_other_hands_brings_nobody_back(registry):
    mine = processes.identity_of(os.getpid())
    record = record_of(create_time=mine.create_time - 1)
    write(registry, record)
    assert state_of(registry, record.run_id) is RunState.DEAD


@pytest.mark.parametrize(
    ("changes", "dead", "held"),
    [
        ({}, False, RunState.RUNNING),
        ({"host": "elsewhere"}, False, RunState.RUNNING),
        ({"boot_id": "another"}, False, RunState.RUNNING),
        ({"boot_id": ""}, False, RunState.RUNNING),
        ({"pid_namespace": 1}, False, RunState.RUNNING),
        ({"pid_namespace": 0}, False, RunState.RUNNING),
        ({"pid": 2**31 - 1}, True, RunState.SURVIVORS),
        ({"pid": 2**31 - 1, "host": "elsewhere"}, True, RunState.SURVIVORS),
        ({"pid": 2**31 - 1, "boot_id": "another"}, False, RunState.RUNNING),
        ({"pid": 2**31 - 1, "pid_namespace": 1}, False, RunState.RUNNING),
    ],
)
def test_a_leader_is_dead_on_proof_alone(registry, changes, dead, held):
    """Of another container or boot, maybe on another host, a pid proves nothing; the kernel's lock
    does all the same. What the host is called proves nothing either.
    """
    record = record_of(**changes)
    assert leader_is_dead(record) is dead
    path = write(registry, record)
    with open(path, "r+b") as file:
        assert lock_descriptor(file.fileno())
        assert state_of(registry, record.run_id) is held
        assert not registry.remove(registry.find(record.run_id))
    # Not locked any more. The leader is this very process, where the record says so.
    lives = changes.keys() <= {"host"}
    expected = RunState.RUNNING if lives else RunState.DEAD
    assert state_of(registry, record.run_id) is expected
    assert registry.remove(registry.find(record.run_id)) is not lives


@needs_namespaces
def test_a_run_in_a_container_is_live_from_outside_until_it_dies(tmp_path, registry):
    (tmp_path / "script.py").write_text(textwrap.dedent(RUN))
    command = ["unshare", "-fp", "--mount-proc", "--kill-child", sys.executable]
    script = run_command(tmp_path, [*command, str(tmp_path / "script.py")])
    run = Run(script, script.wait_for("registered").split()[1])
    run.do("run")
    found = registry.find(run.run_id)
    assert found.state is RunState.RUNNING
    assert found.record.pid == 1  # which is somebody else out here
    assert not found.record.is_local
    assert not leader_is_dead(found.record)
    assert not registry.remove(found)
    run.kill()
    wait_until(lambda: registry.find(run.run_id).state is RunState.DEAD)
    assert registry.remove(registry.find(run.run_id))


@needs_namespaces
def test_a_run_that_cannot_trust_its_proc_is_live_while_it_holds_the_lock(tmp_path, registry):
    """/proc is that of another namespace: what it shows under our pid is somebody else."""
    (tmp_path / "script.py").write_text(textwrap.dedent(RUN))
    command = ["unshare", "-fp", "--kill-child", sys.executable, str(tmp_path / "script.py")]
    script = run_command(tmp_path, command)
    run = Run(script, script.wait_for("registered").split()[1])
    run.do("run")
    found = registry.find(run.run_id)
    assert found.state is RunState.RUNNING
    assert found.record.pid_namespace == 0
    run.kill()
    # It was pid 1 there, and here there will always be one.
    wait_until(lambda: registry.find(run.run_id).state is RunState.DEAD)


def test_nobody_s_namespace_is_known_to_be_ours_when_ours_is_unknown(monkeypatch):
    monkeypatch.setattr(processes, "own_pid_namespace", lambda: 0)
    record = describe_this_run("digits")
    assert record.pid_namespace == 0
    assert not record.is_local
    assert not leader_is_dead(attrs.evolve(record, pid=2**31 - 1))


@needs_namespaces
def test_a_host_name_that_changes_makes_nobody_a_stranger(tmp_path, registry):
    """DHCP and VPNs do that: a live run could no more be stopped, a dead one blocked the next."""
    source = textwrap.dedent(RUN).replace(
        'case "leave":',
        """case "rename":
            import socket
            socket.sethostname("renamed")
            answer = socket.gethostname(), record.host, RunRegistry().runs()[0].record.is_local
        case "leave":""",
    )
    (tmp_path / "script.py").write_text(source)
    command = ["unshare", "--uts", sys.executable, str(tmp_path / "script.py")]
    script = run_command(tmp_path, command)
    run = Run(script, script.wait_for("registered").split()[1])
    run.do("run")
    assert run.do("rename") == f"('renamed', '{socket.gethostname()}', True)"
    renamed = attrs.evolve(registry.find(run.run_id).record, host="renamed")
    assert renamed.is_local
    assert not leader_is_dead(renamed)
    run.kill()
    assert leader_is_dead(renamed)
    assert state_of(registry, run.run_id) is RunState.DEAD


@needs_time_namespaces
def test_a_run_on_the_clock_of_another_time_namespace_is_unknown_and_never_dead(tmp_path, registry):
    path = written(tmp_path / "inside.py", RUN)
    script = run_command(tmp_path, [*IN_TIME_NAMESPACE, sys.executable, str(path)])
    run = Run(script, script.wait_for("registered").split()[1])
    run.do("run")
    record = registry.find(run.run_id).record
    assert record.time_namespace == processes.time_namespace(record.pid)
    assert record.has_our_pids
    assert not record.is_local
    assert not leader_is_dead(record)
    assert state_of(registry, run.run_id) is RunState.RUNNING
    run.do("close descriptors")  # and so the lock of its record
    assert state_of(registry, run.run_id) is RunState.RUNNING
    os.kill(record.pid, signal.SIGKILL)
    script.wait()
    assert leader_is_dead(record)
    assert state_of(registry, run.run_id) is RunState.DEAD


@needs_time_namespaces
def test_a_leader_that_is_in_another_time_namespace_by_now_is_never_dead(tmp_path):
    """CRIU restores a process into a namespace of its own, where it has the clock of before."""
    path = written(tmp_path / "inside.py", RUN)
    script = run_command(tmp_path, [*IN_TIME_NAMESPACE, sys.executable, str(path)])
    script.wait_for("registered")
    (pid,) = processes.children_of(script.pid)
    record = record_of(pid=pid, create_time=1.0)
    assert record.is_local
    assert not leader_is_dead(record)
    assert leader_is_dead(attrs.evolve(record, pid=script.pid))  # that one is on our clock
    os.kill(pid, signal.SIGKILL)
    script.wait()
    assert leader_is_dead(record)


@needs_another_user
@needs_namespaces
def test_another_user_s_run_that_proc_hides_is_unknown_and_never_dead(tmp_path):
    source = """
        import ctypes, os, subprocess, sys
        from orchard_infra.runs.record import describe_this_run, leader_is_dead
        from orchard_infra.system import processes
        import attrs

        child = subprocess.Popen(["sleep", "1000"])
        identity = processes.identity_of(child.pid)
        record = attrs.evolve(
            describe_this_run("digits"), pid=child.pid, create_time=identity.create_time
        )
        subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"], check=True)
        read, write = os.pipe()
        looker = os.fork()
        if looker == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            shown = os.path.exists(f"/proc/{child.pid}/stat")
            print("alive:", shown, leader_is_dead(record), flush=True)
            os.read(read, 1)
            print("gone:", leader_is_dead(record), flush=True)
            os._exit(0)
        sys.stdin.readline()
        child.kill()
        child.wait()
        os.write(write, b".")
        os.waitpid(looker, 0)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(source))
    command = ["unshare", "-m", sys.executable, str(tmp_path / "script.py")]
    script = run_command(tmp_path, command)
    assert script.wait_for("alive:") == "alive: False False"
    script.tell()
    assert script.wait_for("gone:") == "gone: True"


def test_another_boot_proves_death_only_where_the_kernel_s_lock_is_free():
    record = record_of(boot_id="another")
    assert not leader_is_dead(record)
    assert leader_is_dead(record, lock_is_free=True)
    assert not leader_is_dead(record_of(boot_id=""), lock_is_free=True)
    assert not leader_is_dead(record_of(), lock_is_free=True)  # it is this very process


@pytest.mark.parametrize("stated", [RunState.WAITING, RunState.RUNNING, None])
@pytest.mark.parametrize("alive", [True, False], ids=["alive", "dead"])
def test_on_a_file_system_without_locks_the_process_tells(registry, monkeypatch, stated, alive):
    """A mock: the machine has no such file system."""

    def refuse(fd: int, *, shared: bool = False) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    record = record_of(**({} if alive else {"pid": 2**31 - 1}))
    files.private_directory(registry.directory)
    (registry.directory / f"{record.run_id}.run").write_bytes(to_json(record, stated))
    monkeypatch.setattr(runs, "lock_descriptor", refuse)
    expected = (stated or RunState.RUNNING) if alive else RunState.DEAD
    assert state_of(registry, record.run_id) is expected
    assert not registry.remove(registry.find(record.run_id))


# The environment that a run was started with


def digest_of_a_process(tmp_path: Path, *words: str, **environ: str | None) -> str | None:
    script = run_command(tmp_path, [*words, "sleep", "1000"], env=environ)
    wait_until(lambda: processes.read_cmdline(script.pid) == b"sleep\x001000\0")
    return environment_digest(script.pid, "ab12")


def test_environments_are_the_same_when_only_the_shell_differs(tmp_path):
    plain = digest_of_a_process(tmp_path, SEED="1")
    assert plain is not None
    shell = {
        "PWD": "/x",
        "OLDPWD": "/y",
        "SHLVL": "7",
        "_": "/bin/sleep",
        "TERM": "vt100",
        "TERM_PROGRAM": "a",
        "TMUX": "a",
        "TMUX_PANE": "%1",
        "SSH_TTY": "/dev/pts/9",
        "WINDOWID": "7",
        "XDG_SESSION_ID": "9",
        "INVOCATION_ID": "a",
        "VSCODE_PID": "1",
        RUN_ID_VARIABLE: "cd34",
    }
    assert digest_of_a_process(tmp_path, SEED="1", **shell) == plain
    for other in (
        {"SEED": "2"},
        {"SEED": "1", "CUDA_VISIBLE_DEVICES": "1"},
        {"SEED": "1", "XTERM": "vt100"},
        {"SEED": "1", "DISPLAY": ":0.1"},
        {"SEED": None},
    ):
        assert digest_of_a_process(tmp_path, **other) != plain, other


@pytest.mark.parametrize(
    "name",
    ["TERM_PENALTY", "TERMINAL_REWARD", "SSH_HOST", "SSH_ORIGINAL_COMMAND", "WINDOW", "LINES"],
)
def test_a_parameter_with_the_name_of_something_of_a_terminal_tells_two_environments_apart(name):
    digest = environment_digest({"SEED": "1", "TERM": "xterm", name: "5"}, "ab12")
    assert digest != environment_digest({"SEED": "1", "TERM": "vt100", name: "9"}, "ab12")
    assert digest != environment_digest({"SEED": "1"}, "ab12")


def test_the_order_of_variables_does_not_tell_two_environments_apart():
    one, other = b"B=2\0A=1\nPWD=/x\0", b"A=1\nPWD=/x\0PWD=/y\0B=2\0"
    digest = environment_digest(one, "ab12")
    assert digest == environment_digest(other, "ab12")
    assert digest == environment_digest({"A": "1\nPWD=/x", "B": "2"}, "ab12")
    assert digest != environment_digest(b"A=1\0B=2\0", "ab12")


@pytest.mark.parametrize("unreadable", [None, b"", b"\0" * 500, {}, 2**31 - 1])
def test_an_environment_that_cannot_be_read_has_no_digest(unreadable):
    assert environment_digest(unreadable, "ab12") is None


def test_the_same_environment_has_another_digest_in_another_run():
    digests = {environment_digest(b"A=1\0", run_id) for run_id in ("ab12", "ab13", "a" * 64)}
    assert len(digests) == 3


def test_the_digest_is_in_the_registry_alone_and_of_the_initial_environment(tmp_path, registry):
    run = start(tmp_path)
    record = registry.find(run.run_id).record
    assert record.environment == environment_digest(run.script.pid, run.run_id)
    assert record.environment.encode() in (registry.directory / f"{run.run_id}.run").read_bytes()
    assert record.environment.encode() not in to_json(record)
    assert record.environment not in repr(record)
    monkeyed = describe_this_run("digits", environ={"SEED": "7"})
    assert monkeyed.environment == environment_digest(os.getpid(), monkeyed.run_id)


def test_a_wrapped_command_is_on_record_in_the_wrapper_s_place():
    assert describe_this_run("digits", argv=["./train.sh", "-x"]).argv == ("./train.sh", "-x")
    assert describe_this_run("digits").session == os.getsid(0)


# Registering


def test_the_directory_is_made_private_and_the_record_is_the_owner_s(registry):
    registration = registry.register(describe_this_run("digits"))
    assert stat.S_IMODE(registry.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(registration.path.stat().st_mode) == 0o600
    assert list(registry.directory.glob("*.run")) == [registration.path]
    registration.close()


def test_leaving_twice_is_once(registry):
    registration = registry.register(describe_this_run("digits"))
    registration.close()
    with open(os.devnull) as other:  # has the number that the record's descriptor had
        registration.close()
        assert os.fstat(other.fileno())


def test_who_has_left_takes_nobody_s_record_along(registry):
    """Not even one that got the very same name and inode. A mock: inodes come as they please."""
    record = describe_this_run("digits")
    former = registry.register(record)
    former.close()
    registration = registry.register(record)
    former._file = registration._file
    former.close()
    assert registry.find(record.run_id).is_live
    registration.close()


def test_a_forked_child_that_leaves_takes_nothing_with_it(registry):
    registration = registry.register(describe_this_run("digits"))
    child = os.fork()
    if child == 0:
        registration.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert state_of(registry, registration.record.run_id) is RunState.WAITING
    with open(registration.path, "r+b") as file:
        assert not lock_descriptor(file.fileno())
    registration.close()
    assert registry.runs() == ()


def test_a_child_that_is_executed_holds_nothing_of_a_dead_run(tmp_path, registry):
    source = """
        import subprocess, sys
        from orchard_infra.runs.registry import RunRegistry
        from orchard_infra.runs.record import describe_this_run
        record = describe_this_run("digits")
        registration = RunRegistry().register(record)
        child = subprocess.Popen(["sleep", "1000"], close_fds=False)
        print("started", record.run_id, child.pid, flush=True)
        sys.stdin.readline()
    """
    script = run_python(tmp_path, source)
    _, run_id, child = script.wait_for("started").split()
    script.kill()
    script.wait()
    assert is_running(int(child))
    assert state_of(registry, run_id) is RunState.DEAD


def test_a_record_that_was_removed_and_replaced_is_left_alone(registry):
    registration = registry.register(describe_this_run("digits"))
    registration.path.unlink()
    registration.path.write_text("somebody else's by now")
    registration.close()
    assert registration.path.read_text() == "somebody else's by now"


def test_a_descriptor_that_is_somebody_else_s_by_now_is_not_written_to(tmp_path, registry):
    registration = registry.register(describe_this_run("digits"))
    stolen = tmp_path / "checkpoint"
    stolen.write_text("three days of results")
    os.utime(stolen, (1, 1))
    with open(stolen, "r+") as file:
        os.dup2(file.fileno(), registration._fd)
        with pytest.raises(InfrastructureError, match="was closed"):
            registration.update(registration.record, RunState.RUNNING)
        with pytest.raises(InfrastructureError, match="was closed"):
            registration.touch()
        number = registration._fd
        registration.close()
        assert os.fstat(number).st_ino == stolen.stat().st_ino  # still open
        os.close(number)
    assert stolen.read_text() == "three days of results"
    assert stolen.stat().st_mtime == 1
    assert registry.runs() == ()


def test_a_live_record_can_be_made_young(registry):
    registration = registry.register(describe_this_run("digits"))
    os.utime(registration.path, (1, 1))
    registration.touch()
    assert time.time() - registration.path.stat().st_mtime < 3600
    registration.close()


def test_an_update_changes_the_record(registry):
    registration = registry.register(describe_this_run("digits"))
    changed = attrs.evolve(registration.record, tmp_dir="/scratch/x")
    registration.update(changed, RunState.RUNNING)
    assert registration.record == changed
    assert registry.find(changed.run_id).record == changed
    registration.close()


def test_two_runs_of_one_process_are_two_runs(registry):
    outer, inner = (registry.register(describe_this_run(name)) for name in ("outer", "inner"))
    assert [run.record.project for run in registry.runs()] == ["outer", "inner"]
    inner.close()
    assert [run.record.project for run in registry.runs()] == ["outer"]
    outer.close()


def test_a_record_that_a_collector_has_locked_is_made_anew(registry, monkeypatch):
    """It opens the file before it has its name, and would remove it; the run must be locked."""
    really = runs.lock_descriptor
    answers = iter([False])

    def late(fd: int, *, shared: bool = False) -> bool:
        return next(answers, None) is None and really(fd, shared=shared)

    monkeypatch.setattr(runs, "lock_descriptor", late)
    registration = registry.register(describe_this_run("digits"))
    with open(registration.path, "r+b") as file:
        assert not really(file.fileno())
    registration.close()


def test_a_record_that_is_collected_before_it_has_its_name_is_made_anew(registry, monkeypatch):
    really = os.rename
    collected = []

    def late(path: str, target: str) -> None:
        if not collected:
            collected.append(path)
            os.unlink(path)
        really(path, target)

    monkeypatch.setattr(os, "rename", late)
    registration = registry.register(describe_this_run("digits"))
    assert collected
    assert registry.find(registration.record.run_id).is_live
    registration.close()


def test_a_full_disk_is_an_error_and_leaves_no_file(registry, monkeypatch):
    """A mock: filling a disk of a shared machine would be no kindness."""

    def full(fd: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(InfrastructureError, match="cannot write the run's record"):
        registry.register(describe_this_run("digits"))
    assert list(registry.directory.iterdir()) == []


@pytest.mark.parametrize("step", ["write_whole", "rename"])
def test_an_interrupt_half_way_leaves_no_file_and_no_descriptor(registry, monkeypatch, step):
    place = files if step == "write_whole" else os
    really = getattr(place, step)

    def interrupted(*arguments: object) -> None:
        really(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(place, step, interrupted)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(KeyboardInterrupt):
        registry.register(describe_this_run("digits"))
    assert os.listdir("/proc/self/fd") == before
    assert list(registry.directory.iterdir()) == []


def test_a_file_system_without_locks_is_an_error(registry, monkeypatch):
    def refuse(fd: int, *, shared: bool = False) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(runs, "lock_descriptor", refuse)
    with pytest.raises(InfrastructureError, match="No locks available"):
        registry.register(describe_this_run("digits"))
    assert list(registry.directory.iterdir()) == []


@pytest.mark.parametrize("below", ["", "runs"])
def test_a_planted_directory_is_refused(tmp_path, monkeypatch, below):
    monkeypatch.setenv("ORCHARD_INFRA_DIR", str(tmp_path / "infra"))
    (tmp_path / "victim").mkdir()
    if below:
        (tmp_path / "infra").mkdir(mode=0o700)
    (tmp_path / "infra" / below).symlink_to(tmp_path / "victim")
    with pytest.raises(InfrastructureError, match="a symbolic link"):
        RunRegistry().register(describe_this_run("digits"))
    assert list((tmp_path / "victim").iterdir()) == []


def test_without_a_directory_there_are_no_runs_and_none_is_made(registry):
    assert registry.runs() == ()
    assert registry.find("abc") is None
    registry.collect_unnamed()
    assert not registry.directory.exists()


def test_a_directory_that_is_none_is_a_clear_error(registry):
    registry.directory.write_text("a file")
    with pytest.raises(InfrastructureError, match="Set ORCHARD_INFRA_DIR"):
        registry.runs()


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "../../x"},
        {"run_id": ""},
        {"run_id": "a" * 65},
        {"project": 7},
        {"lock": "x" * 10_000},
        {"lock": Path("/x")},
        {"started_at": float("nan")},
        {"argv": "python train.py"},
        {"session": -1},
    ],
)
def test_a_record_that_nobody_could_read_cannot_be_made(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} must be "):
        record_of(**changes)


@pytest.mark.parametrize("arguments", [{"project": "x" * 10_000}, {"lock": "x" * 10_000}])
def test_a_run_that_cannot_be_recorded_is_a_clear_error(arguments):
    with pytest.raises(InfrastructureError, match=r"cannot be recorded: (project|lock) "):
        describe_this_run(**{"project": "digits", **arguments})


@pytest.mark.parametrize(
    "changes",
    [
        {"argv": ("x" * 8000,) * 9},
        {"parent": "\ud800" * 8192, "lock": "\ud800" * 8192},
    ],
)
def test_a_record_that_is_too_long_to_be_read_is_refused_rather_than_hidden(registry, changes):
    with pytest.raises(InfrastructureError, match="the run cannot be recorded"):
        registry.register(record_of(**changes))
    registration = registry.register(record_of())
    with pytest.raises(InfrastructureError, match="the run cannot be recorded"):
        registration.update(record_of(**changes), RunState.RUNNING)
    assert registry.find(registration.record.run_id).record == registration.record
    registration.close()


# Many at once


def test_no_live_record_is_removed_however_many_collect(tmp_path, registry):
    """Registrars verify that each of their records is there, is theirs and is locked."""
    registrar = """
        import os, sys
        from orchard_infra.runs.registry import RunRegistry
        from orchard_infra.runs.record import describe_this_run
        from orchard_infra.system.flock import lock_descriptor
        registry, failures = RunRegistry(), []
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(150):
            registration = registry.register(describe_this_run("stress"))
            for _ in range(3):
                try:
                    fd = os.open(registration.path, os.O_RDWR)
                except FileNotFoundError:
                    failures.append("removed")
                    break
                if not os.path.sameopenfile(fd, registration._fd):
                    failures.append("replaced")
                # A reader's lock is shared and short: ours is there if we never get past it.
                if lock_descriptor(fd):
                    failures.append("not locked")
                os.close(fd)
                if not registry.find(registration.record.run_id).is_live:
                    failures.append("not live")
            registration.close()
        print("failures", failures, flush=True)
    """
    collector = """
        import sys, threading
        from orchard_infra.runs.registry import RunRegistry
        registry, removed, ended = RunRegistry(), 0, threading.Event()
        threading.Thread(target=lambda: (sys.stdin.readline(), ended.set())).start()
        print("ready", flush=True)
        while not ended.is_set():
            registry.collect_unnamed()
            for run in registry.runs():
                removed += registry.remove(run)
        print("removed", removed, flush=True)
    """
    registrars = [run_python(tmp_path, registrar, name="registrar.py") for _ in range(4)]
    collectors = [run_python(tmp_path, collector, name="collector.py") for _ in range(4)]
    for script in (*registrars, *collectors):
        script.wait_for("ready")
    for script in registrars:
        script.tell()
    said = [script.wait_for("failures", 120) for script in registrars]
    for script in collectors:
        script.tell()
    removed = [script.wait_for("removed") for script in collectors]
    assert said == ["failures []"] * 4
    assert removed == ["removed 0"] * 4
    assert list(registry.directory.iterdir()) == []


@pytest.mark.slow
def test_readers_at_the_same_time_take_nobody_for_what_it_is_not(tmp_path, registry):
    live = [start(tmp_path, "run"), start(tmp_path), start(tmp_path, "run", "close descriptors")]
    dead = [start(tmp_path, "run") for _ in range(3)]
    orphaned = start(tmp_path, "run")
    child = orphaned.fork()
    for run in (*dead, orphaned):
        run.kill()
    reader = """
        import sys, time
        from orchard_infra.runs.registry import RunRegistry
        live, dead = sys.argv[1].split(","), sys.argv[2].split(",")
        registry, wrong, looks = RunRegistry(), set(), 0
        print("ready", flush=True)
        sys.stdin.readline()
        end = time.monotonic() + 1.0
        while time.monotonic() < end or looks < 100:
            found = {run.record.run_id: run for run in registry.runs()}
            wrong.update(i for i in live if not found[i].is_live)
            wrong.update(i for i in dead if found[i].state.value != "dead")
            looks += 1
        print("wrong", sorted(wrong), flush=True)
    """
    arguments = [",".join(run.run_id for run in some) for some in (live, dead)]
    readers = [run_python(tmp_path, reader, *arguments, name="reader.py") for _ in range(5)]
    for script in readers:
        script.wait_for("ready")
    for script in readers:
        script.tell()
    assert [script.wait_for("wrong") for script in readers] == ["wrong []"] * 5
    assert is_running(child)
    assert state_of(registry, orphaned.run_id) is RunState.SURVIVORS


def test_a_fork_in_the_middle_of_a_look_keeps_no_lock(tmp_path, registry, monkeypatch):
    """Of another thread, say: the child has the descriptor as well, for as long as it lives."""
    run = start(tmp_path)
    run.kill()
    really = runs.leader_lives
    children = []

    def fork_and_look(record: RunRecord) -> bool:
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
        return really(record)

    monkeypatch.setattr(runs, "leader_lives", fork_and_look)
    found = registry.find(run.run_id)
    monkeypatch.setattr(runs, "leader_lives", really)
    assert children
    assert found.state is RunState.DEAD
    assert state_of(registry, run.run_id) is RunState.DEAD
    assert registry.remove(found)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_what_a_crash_inside_register_left_is_collected_and_nothing_else(tmp_path, registry):
    run = start(tmp_path, "run")
    left = registry.directory / ".abc.12345678"
    left.write_bytes(b"")
    torn = registry.directory / ".abc.87654321"
    torn.write_bytes(to_json(record_of())[:50])
    held = registry.directory / ".abc.11111111"
    live = registry.directory / ".abc.22222222"
    live.write_bytes(to_json(record_of()))  # this very process is in the middle of it
    with open(held, "wb") as file:
        lock_descriptor(file.fileno())
        registry.collect_unnamed()
    assert {path.name for path in registry.directory.iterdir()} == {
        f"{run.run_id}.run",
        held.name,
        live.name,
    }


# Hostile files

EVIL = record_of(
    argv=("\x1b]0;owned\x07", "\x1b[2J", "[red]x[/red]"),
    cwd="/\r\n\x9b31m",
    project="\u202ecilbup",
    host="\x1b[1m",
)


def changed(**values: object) -> bytes:
    return json.dumps({**json.loads(to_json(record_of())), **values}).encode()


def nested(depth: int, field: str) -> bytes:
    text = changed(**{field: "HERE"}).decode()
    return text.replace('"HERE"', "[" * depth + "]" * depth).encode()


NO_RECORDS = [
    b"",
    b"\n",
    b"\0" * 70_000,
    bytes(range(256)) * 20,
    b"{}",
    b"[]",
    b"null",
    b'{"orchard_infra": 1,',
    b'{"orchard_infra": 1,}',
    b'{"orchard_infra": 1, "pid": 1}',
    to_json(record_of())[:-10],
    to_json(record_of()).replace(b" 1,", b" 2,", 1),
    b'{"orchard_infra": 1, "x": "\xff\xfe"}',
    b"\xef\xbb\xbf" + to_json(record_of()),
    to_json(record_of()).decode().encode("utf-16"),
    changed(argv="python train.py"),
    changed(argv=[1, 2]),
    changed(argv=[["x"]]),
    changed(argv=None),
    changed(argv={"0": "x"}),
    changed(pid=True),
    changed(pid=0),
    changed(pid=-1),
    changed(pid=2**31),
    changed(pid=1.0),
    changed(pid="1"),
    changed(uid=False),
    changed(rank=True),
    changed(rank=-1),
    changed(create_time=float("nan")),
    changed(create_time=float("inf")),
    changed(create_time=-1.0),
    changed(create_time=True),
    changed(started_at=float("-inf")),
    changed(started_at=1e300),
    changed(started_at="now"),
    changed(pid_namespace=2**64),
    changed(run_id="../../etc/passwd"),
    changed(run_id=""),
    changed(run_id="é"),
    changed(run_id="a" * 300),
    changed(run_id=None),
    changed(project=None),
    changed(host=["x"]),
    changed(cwd="x" * 9000),
    changed(lock=7),
    changed(tmp_dir=["/"]),
    changed(parent=1),
    changed(state="alive"),
    changed(state=["running"]),
    changed(state={}),
    changed(state=7),
    changed(pid="HERE").replace(b'"HERE"', b"9" * 60_000),
    changed(pid="HERE").replace(b'"HERE"', b"1e99999"),
    b'{"orchard_infra": 1,' + b"[" * 65_000,
    b'{"orchard_infra": 1,' + b'{"a":' * 13_000,
    b'{"orchard_infra": 1, "a": ' + b"[" * 32_000 + b"]" * 32_000 + b"}",
    *(
        nested(depth, field)
        for depth in (100, 500, 900, 960, 980, 990, 1500, 20_000)
        for field in ("pid", "rank", "argv", "state", "lock")
    ),
    to_json(record_of()).rstrip(b"\n") + b" " * RECORD_LIMIT,
]


@pytest.mark.parametrize("content", NO_RECORDS, ids=range(len(NO_RECORDS)))
def test_a_file_that_is_no_record_is_passed_over(registry, content):
    good = registry.register(describe_this_run("digits"))
    path = registry.directory / "abc.run"
    path.write_bytes(content)
    began = time.process_time()
    assert [run.record for run in registry.runs()] == [good.record]
    assert registry.find("abc") is None
    with pytest.raises(ValueError, match=r"."):
        from_json(content)
    with open(path, "rb") as file:
        assert read_record(file.fileno()) is None
    assert time.process_time() - began < 5
    assert path.read_bytes() == content
    good.close()


def test_a_huge_file_costs_neither_time_nor_memory(registry):
    good = registry.register(describe_this_run("digits"))
    for name, start_of_file in (("a.run", b""), ("b.run", to_json(record_of()))):
        path = registry.directory / name
        path.write_bytes(start_of_file)
        os.truncate(path, 2 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    assert [run.record for run in registry.runs()] == [good.record]
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    good.close()


@pytest.mark.parametrize(
    "plant",
    [
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/nonexistent/x"),
        lambda path: path.symlink_to(next(path.parent.glob("*.run"))),
    ],
    ids=["FIFO", "directory", "link to a device", "dangling link", "link to a record"],
)
@pytest.mark.parametrize("name", ["abc.run", ".abc.1234"])
def test_what_is_no_regular_file_is_passed_over_and_stays(registry, plant, name):
    good = registry.register(describe_this_run("digits"))
    plant(registry.directory / name)
    assert [run.record for run in registry.runs()] == [good.record]
    assert registry.find("abc") is None
    registry.collect_unnamed()
    assert os.path.lexists(registry.directory / name)
    good.close()


@needs_another_user
def test_somebody_else_s_record_is_passed_over(registry):
    path = write(registry, record_of())
    assert len(registry.runs()) == 1
    os.chown(path, 12345, 12345)
    assert registry.runs() == ()


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", "a\0b", "é", "\ud800", "a" * 5000, "*", "."])
def test_an_id_that_is_none_finds_nothing(registry, run_id):
    assert registry.find(run_id) is None
    assert registry.lineage(run_id) == ((run_id,) if run_id else ())


# Lineage


def test_the_lineage_of_nested_runs_leads_outwards(registry):
    outer = record_of()
    middle = record_of(parent=outer.run_id)
    inner = record_of(parent=middle.run_id)
    for record in (outer, middle, inner):
        write(registry, record)
    assert registry.lineage(inner.run_id) == (inner.run_id, middle.run_id, outer.run_id)
    assert registry.lineage(outer.run_id) == (outer.run_id,)
    assert registry.lineage(None) == ()
    (registry.directory / f"{middle.run_id}.run").unlink()
    assert registry.lineage(inner.run_id) == (inner.run_id, middle.run_id)


def test_a_lineage_that_bites_its_tail_ends(registry):
    first = record_of(parent="b1")
    write(registry, attrs.evolve(first, run_id="a1"))
    write(registry, attrs.evolve(first, run_id="b1", parent="a1"))
    write(registry, attrs.evolve(first, run_id="c1", parent="c1"))
    assert registry.lineage("a1") == ("a1", "b1")
    assert registry.lineage("c1") == ("c1",)


def test_a_run_knows_the_run_inside_which_it_was_started():
    assert describe_this_run("x", environ={RUN_ID_VARIABLE: "abc123"}).parent == "abc123"
    assert describe_this_run("x", environ={RUN_ID_VARIABLE: ""}).parent is None
    assert describe_this_run("x", environ={}).parent is None


@pytest.mark.parametrize("value", ["../x", "a" * 100_000, "\udcff", "🌳" * 8000, "a b"])
def test_an_environment_that_lies_hides_no_run(registry, value):
    record = describe_this_run("x", environ={RUN_ID_VARIABLE: value})
    assert record.parent is None
    registration = registry.register(record)
    assert registry.find(record.run_id).is_live
    registration.close()


# Records of any size


@pytest.mark.parametrize(
    "words",
    [
        ["x" * 120_000] * 8,
        ["a"] * 100_000,
        [""] * 100_000,
        ["\udcff" * 60_000],
        ["🌳" * 30_000],
        ["\x01" * 120_000],
        ['"\\' * 60_000],
        ["a b", "", "\udcff\udcfe", "naïve", "\x1b[2J\n", "-x"],
    ],
    ids=["1 MB", "many", "many empty", "no text", "trees", "controls", "quotes", "odd"],
)
def test_any_command_line_makes_a_record_that_can_be_read(tmp_path, registry, words):
    script = run_python(tmp_path, RUN, *words)
    run_id = script.wait_for("registered").split()[1]
    found = registry.find(run_id)
    assert found is not None, "the run cannot be seen"
    assert found.state is RunState.WAITING
    assert (registry.directory / f"{run_id}.run").stat().st_size < RECORD_LIMIT // 4
    _, *kept = found.record.argv[1:]
    assert kept
    assert kept[:-1] == words[: len(kept) - 1]
    assert words[len(kept) - 1].startswith(kept[-1])
    if len(words) == 6:
        assert kept == words


def test_a_working_directory_of_any_length_makes_a_record_that_can_be_read(tmp_path, registry):
    source = """
        import os, sys
        from orchard_infra.runs.registry import RunRegistry
        from orchard_infra.runs.record import describe_this_run
        for _ in range(60):
            os.mkdir(sys.argv[1])
            os.chdir(sys.argv[1])
        record = describe_this_run("digits")
        registration = RunRegistry().register(record)
        print("registered", record.run_id, len(os.getcwd()), flush=True)
        sys.stdin.readline()
    """
    for name, length in (("d" * 200, 12_000), ("\x01\udcff" * 100, 12_000)):
        place = tmp_path / str(len(name.encode(errors="replace"))) / repr(name[:1]).strip("'\\")
        place.mkdir(parents=True)
        script = run_python(tmp_path, source, name, cwd=place)
        _, run_id, deep = script.wait_for("registered").split()
        assert int(deep) > length
        found = registry.find(run_id)
        assert found.is_live
        assert found.record.cwd.startswith(str(place) + "/" + name)
        script.kill()
        script.wait()
        shutil.rmtree(place)  # now: some of what pytest does later takes no such paths


def test_a_working_directory_that_is_gone_is_unknown(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert describe_this_run("digits").cwd == ""
    monkeypatch.chdir(tmp_path)  # pytest looks where it is


def test_the_longest_paths_there_can_be_fit_a_record(registry):
    """PATH_MAX bytes, each of them escaped, in every field that holds a path."""
    path = "/" + "\x01" * 4095
    evil = record_of(
        argv=clip(["\x01" * 100_000]),
        cwd=cut(path),
        lock=path,
        tmp_dir=path,
        project="\U0001f333" * 200,
        parent="a" * 64,
    )
    registration = registry.register(evil)
    assert registry.find(evil.run_id).record == evil
    registration.close()


# For a person


def test_a_run_is_described_in_one_line_that_is_safe_for_a_terminal():
    record = record_of(started_at=1000.0, argv=("python", "train.py"), cwd="/w", host="h", user="u")
    assert record.describe(1000 + 7509) == (
        f"pid {os.getpid()} on h (user u), started 2 h 5 min ago: python train.py in /w"
    )
    assert record.describe(0).count("started 0 s ago") == 1  # the clock was set back
    assert "started" in record.describe()
    assert EVIL.describe().isprintable()
    assert attrs.evolve(record, cwd="").describe(1000).endswith(": python train.py")
    survivor = Survivor(7, 1.0, "python \x1b[2J", "forked by the run")
    assert survivor.describe() == r"pid 7 (forked by the run): python \x1b[2J"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, naïve, 模型, 🌳", "plain text, naïve, 模型, 🌳"),
        ("", ""),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\nb\r\tc\0", r"a\nb\r\tc\x00"),
        ("\u202egnp.exe\u202c", r"\u202egnp.exe\u202c"),
        ("\u2066x\u2069\u200b\ufeff", r"\u2066x\u2069\u200b\ufeff"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ('it\'s "quoted" \\', 'it\'s "quoted" \\'),
    ],
)
def test_what_is_shown_acts_on_no_terminal(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h 0 min"),
        (86399, "23 h 59 min"),
        (86400, "1 d 0 h"),
        (1_000_000, "11 d 13 h"),
    ],
)
def test_lengths_of_time_are_for_a_person(seconds, words):
    assert duration(seconds) == words


def test_runs_come_oldest_first(registry):
    for run_id, started_at in (("b", 2.0), ("c", 3.0), ("a", 1.0)):
        write(registry, record_of(run_id=run_id, started_at=started_at))
    assert [run.record.run_id for run in registry.runs()] == ["a", "b", "c"]
    assert all(isinstance(run, RegisteredRun) for run in registry.runs())
