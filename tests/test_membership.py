"""Which process belongs to which run, with real families of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import attrs
import pytest

from orchard_infra.runs import membership
from orchard_infra.runs.membership import (
    Membership,
    command_of,
    is_ours,
    orphans_of,
    own_pids,
)
from orchard_infra.runs.record import (
    RUN_ID_VARIABLE,
    RunState,
    Survivor,
    describe_this_run,
    read_record,
)
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.system import processes
from support import (
    Script,
    environment,
    needs_another_user,
    needs_namespaces,
    require_module,
    run_command,
    run_python,
    wait_gone,
    wait_until,
)

# A run with children of the kinds that are asked for. Each says its pid once it is what it is
# to be, and waits for ever.
RUN = """
    import json, os, signal, subprocess, sys
    from orchard_infra.runs.record import RUN_ID_VARIABLE, RunState, describe_this_run
    from orchard_infra.runs.registry import RunRegistry

    def stay():
        signal.pause()

    def fork(become):
        read, write = os.pipe()
        if os.fork() == 0:
            become()
            os.write(write, str(os.getpid()).encode())
            stay()
        return int(os.read(read, 20))

    def double_fork():
        os.setsid()
        if os.fork():
            os._exit(0)

    def rewrite_environment():
        # As setproctitle does for a long title: what was there is overwritten.
        import ctypes
        begin, end = (int(open("/proc/self/stat").read().split()[i]) for i in (49, 50))
        ctypes.memset(begin, 0, end - begin)

    def execute(*words, **changes):
        environ = {k: v for k, v in {**os.environ, **changes}.items() if v is not None}
        return subprocess.Popen([*words, "sleep", "1000"], env=environ).pid

    record = describe_this_run("digits")
    os.environ[RUN_ID_VARIABLE] = record.run_id
    registration = RunRegistry().register(record)
    registration.update(record, RunState.RUNNING)
    pids = {"leader": os.getpid()}
    for kind in sys.argv[1:]:
        pids[kind] = {
            "forked": lambda: fork(lambda: None),
            "forked, setsid": lambda: fork(os.setsid),
            "forked twice": lambda: fork(double_fork),
            "forked, title rewritten": lambda: fork(rewrite_environment),
            "executed": lambda: execute(),
            "executed, setsid": lambda: execute("setsid"),
            "executed, clean": lambda: execute("env", "-i"),
            "executed, prefix": lambda: execute(**{RUN_ID_VARIABLE: record.run_id[:-1]}),
            "executed, suffix": lambda: execute(**{RUN_ID_VARIABLE: record.run_id + "0"}),
            "executed, other variable": lambda: execute(
                **{RUN_ID_VARIABLE: None, "MY_" + RUN_ID_VARIABLE: record.run_id}
            ),
            "executed, opted out": lambda: execute(**{RUN_ID_VARIABLE: ""}),
            "executed, other user": lambda: subprocess.Popen(["sleep", "1000"], user=65534).pid,
            "executed, other namespace": lambda: execute("unshare", "-fp", "--kill-child"),
        }[kind]()
    print("run", json.dumps([record.run_id, pids]), flush=True)
    for line in sys.stdin:
        match line.strip():
            case "close descriptors":
                os.closerange(3, 1000)
            case "note":
                registration.note_members()
            case "another run":
                other = RunRegistry().register(describe_this_run("letters"))
                other.note_members()
            case "end":
                registration.end()
        print("done", line, end="", flush=True)
"""

MEMBERS = {
    "forked": "forked by the run",
    "forked, setsid": "forked by the run",
    "forked twice": "forked by the run",
    "forked, title rewritten": "forked by the run",
    "executed": "started by the run",
    "executed, setsid": "started by the run",
}
STRANGERS = [
    "executed, clean",
    "executed, prefix",
    "executed, suffix",
    "executed, other variable",
    "executed, opted out",
]


@pytest.fixture
def registry() -> RunRegistry:
    return RunRegistry()


@attrs.define
class Run:
    script: Script
    run_id: str
    pids: dict[str, int]

    def do(self, order: str) -> None:
        self.script.tell(order)
        self.script.wait_for(f"done {order}")

    def kill_leader(self) -> None:
        self.script.kill()
        self.script.wait()


def start(tmp_path: Path, *kinds: str) -> Run:
    script = run_python(tmp_path, RUN, *kinds)
    run = Run(script, *json.loads(script.wait_for("run [").removeprefix("run ")))
    for kind, pid in run.pids.items():
        if kind.startswith("executed"):  # Popen returns before the last exec is done
            wait_until(lambda pid=pid: b"sleep\x001000\0" in processes.read_cmdline(pid))
    return run


LOOK = """
    import attrs, json
    from orchard_infra.runs.membership import Membership
    from orchard_infra.runs.registry import RunRegistry

    runs = RunRegistry().runs()
    dead = [run for run in runs if not run.is_live]
    found = [attrs.astuple(s) for _, s in Membership(runs).survivors(dead)]
    print("survivors", json.dumps(found), flush=True)
"""


def found_by_another(tmp_path: Path) -> list[Survivor]:
    """What another process finds: what a test has started is no kin of that one."""
    looker = run_python(tmp_path, LOOK, name="looker.py")
    found = json.loads(looker.wait_for("survivors [").removeprefix("survivors "))
    return [Survivor(*fields) for fields in found]


def survivors(tmp_path: Path) -> dict[int, str]:
    return {one.pid: one.evidence for one in found_by_another(tmp_path)}


def kinds(tmp_path: Path) -> dict[int, str]:
    return {one.pid: one.kind for one in found_by_another(tmp_path)}


def live_run_of(registry: RunRegistry, pid: int) -> str | None:
    run = Membership(registry.runs()).live_run_of(pid)
    return run.record.run_id if run else None


# Survivors


def test_every_process_of_a_dead_run_is_found_with_the_proof_and_no_stranger(tmp_path):
    run = start(tmp_path, *MEMBERS, *STRANGERS)
    bystander = run_command(tmp_path, ["sleep", "1000"])
    assert survivors(tmp_path) == {}  # while the leader lives, nobody has survived it
    run.kill_leader()
    found = survivors(tmp_path)
    assert found == {run.pids[kind]: evidence for kind, evidence in MEMBERS.items()}
    assert bystander.poll() is None


def test_a_survivor_is_named_with_its_run_and_its_command(tmp_path, registry):
    run = start(tmp_path, "executed")
    run.kill_leader()
    runs = registry.runs()
    [(found, survivor)] = Membership(runs).survivors(runs)
    assert found.record.run_id == run.run_id
    assert survivor.identity == processes.identity_of(run.pids["executed"])
    assert survivor.command == "sleep 1000"


def test_executed_children_are_found_although_the_record_s_lock_is_free(tmp_path, registry):
    run = start(tmp_path, "executed")
    run.kill_leader()
    assert registry.find(run.run_id).state is RunState.DEAD
    assert list(survivors(tmp_path)) == [run.pids["executed"]]


def test_forked_children_are_found_although_the_record_s_name_is_gone(tmp_path, registry):
    run = start(tmp_path, "forked")
    run.kill_leader()
    found = registry.find(run.run_id)
    (registry.directory / f"{run.run_id}.run").unlink()
    assert [s.pid for _, s in Membership(()).survivors([found])] == [run.pids["forked"]]


def test_a_survivor_that_has_ended_is_none(tmp_path):
    run = start(tmp_path, "forked", "executed")
    run.kill_leader()
    for kind in ("forked", "executed"):
        os.kill(run.pids[kind], 9)
    wait_gone([run.pids["forked"], run.pids["executed"]])
    assert survivors(tmp_path) == {}


def test_a_process_whose_pid_is_another_s_by_now_is_no_survivor(tmp_path, registry, monkeypatch):
    """A mock: the process ends and another one gets its pid, after the scan of the machine."""
    run = start(tmp_path, "executed")
    run.kill_leader()
    really = processes.table

    def scan() -> dict[int, processes.Row]:
        former = {
            pid: row._replace(create_time=row.create_time + 0.01) for pid, row in really().items()
        }
        return {run.pids["executed"]: former[run.pids["executed"]]}

    runs = registry.runs()
    assert len(list(Membership(runs).survivors(runs))) == 1
    monkeypatch.setattr(processes, "table", scan)
    assert list(Membership(runs).survivors(runs)) == []


def test_nobody_s_files_are_looked_at_when_nobody_holds_the_record(tmp_path, registry, monkeypatch):
    run = start(tmp_path, "executed")
    run.kill_leader()
    monkeypatch.setattr(
        processes, "has_inherited", lambda pid, files: pytest.fail("looked at every open file")
    )
    runs = registry.runs()
    [(_, survivor)] = Membership(runs).survivors(runs)
    assert survivor.pid == run.pids["executed"]


HOLDS_OPEN = """
    import os, sys
    held = [os.open(path, os.O_RDWR) for path in sys.argv[1:]]
    print("opened", flush=True)
    sys.stdin.readline()
"""


def test_a_new_file_with_the_inode_of_a_record_that_is_gone_is_no_membership(tmp_path, registry):
    """The number goes to the next file at once; found by chaos: an ancestor had just made one."""
    run = start(tmp_path)
    [found] = registry.runs()
    results = tmp_path / "results"
    results.touch()
    holder = run_python(tmp_path, HOLDS_OPEN, str(results), name="holder.py")
    holder.wait_for("opened")
    stat = results.stat()
    reused = attrs.evolve(found, file=(stat.st_dev, stat.st_ino))
    assert Membership((reused,)).live_run_of(holder.pid) is None
    assert run.run_id == found.record.run_id


def test_who_has_a_dead_run_s_files_open_is_no_survivor(tmp_path, registry):
    """A waiter has the lock file open; a reader of the registry has the record open."""
    lock = tmp_path / "digits.lock"
    lock.touch()
    run = start(tmp_path, "forked")
    record = registry.directory / f"{run.run_id}.run"
    waiter = run_python(tmp_path, HOLDS_OPEN, str(lock), name="waiter.py")
    reader = run_python(tmp_path, HOLDS_OPEN, str(record), name="reader.py")
    pager = run_command(tmp_path, ["tail", "-f", str(record), str(lock)])
    for script in (waiter, reader):
        script.wait_for("opened")
    stat = record.stat()
    wait_until(lambda: processes.has_open(pager.pid, frozenset([(stat.st_dev, stat.st_ino)])))
    run.kill_leader()
    assert survivors(tmp_path) == {run.pids["forked"]: "forked by the run"}


def test_a_reader_that_has_locked_a_dead_run_s_record_to_remove_it_is_no_survivor(
    tmp_path, registry
):
    run = start(tmp_path)
    run.kill_leader()
    source = """
        import os, sys
        from orchard_infra.system.flock import lock_descriptor
        fd = os.open(sys.argv[1], os.O_RDWR)
        lock_descriptor(fd)
        print("locked", flush=True)
        sys.stdin.readline()
    """
    collector = run_python(
        tmp_path, source, str(registry.directory / f"{run.run_id}.run"), name="collector.py"
    )
    collector.wait_for("locked")
    assert registry.find(run.run_id).state is RunState.SURVIVORS  # as far as one can see
    assert survivors(tmp_path) == {}


def test_a_live_run_below_a_dead_one_is_no_survivor_and_neither_are_its_children(tmp_path):
    outer = start(tmp_path)
    inner = run_python(tmp_path, RUN, "forked", "executed", env={RUN_ID_VARIABLE: outer.run_id})
    inner_id, pids = json.loads(inner.wait_for("run [").removeprefix("run "))
    wait_until(lambda: b"sleep" in processes.read_cmdline(pids["executed"]))
    outer.kill_leader()
    assert survivors(tmp_path) == {}
    inner.kill()
    inner.wait()
    # What is forked shows the environment that its parent was started with, by the outer run. It
    # is the inner one's all the same.
    assert survivors(tmp_path) == {
        pids["forked"]: "forked by the run",
        pids["executed"]: "started by the run",
    }
    assert inner_id != outer.run_id


def test_we_and_ours_are_never_survivors(tmp_path):
    """Somebody starts a new run from a shell that a dead run had started."""
    run = start(tmp_path)
    run.kill_leader()
    source = """
        import subprocess
        from orchard_infra.runs.membership import Membership
        from orchard_infra.runs.registry import RunRegistry
        child = subprocess.Popen(["sleep", "1000"])
        runs = RunRegistry().runs()
        print("survivors", [s.pid for _, s in Membership(runs).survivors(runs)], flush=True)
    """
    (tmp_path / "next.py").write_text(textwrap.dedent(source))
    shell = run_command(
        tmp_path,
        ["sh", "-c", f"sleep 1000 & {sys.executable} next.py; true"],
        env={RUN_ID_VARIABLE: run.run_id},
    )
    [sibling] = json.loads(shell.wait_for("survivors").removeprefix("survivors "))
    assert processes.split_cmdline(processes.read_cmdline(sibling)) == ("sleep", "1000")


@needs_another_user
def test_another_user_s_process_is_not_ours_although_the_run_started_it(tmp_path):
    run = start(tmp_path, "executed, other user")
    pid = run.pids["executed, other user"]
    assert not is_ours(pid)
    assert pid not in own_pids()
    run.kill_leader()
    assert processes.started_with(pid, RUN_ID_VARIABLE, {run.run_id}) == run.run_id
    assert survivors(tmp_path) == {}


@needs_another_user
@pytest.mark.parametrize("ids", ["os.setresuid(65534, 0, 0)", "os.setresuid(0, 65534, 0)"])
def test_a_process_with_one_id_of_another_user_is_not_ours(tmp_path, ids):
    source = f"import os, sys; {ids}; print('ready', flush=True); sys.stdin.readline()"
    script = run_python(tmp_path, source)
    script.wait_for("ready")
    assert not is_ours(script.pid)


@needs_namespaces
def test_a_process_in_a_container_is_not_ours(tmp_path):
    run = start(tmp_path, "executed, other namespace", "executed")
    unshare = run.pids["executed, other namespace"]
    [inner] = wait_until(lambda: processes.children_of(unshare))
    wait_until(lambda: processes.read_cmdline(inner) == b"sleep\x001000\0")
    assert not is_ours(inner)
    assert is_ours(unshare)
    assert is_ours(run.pids["executed"])


@needs_namespaces
def test_nothing_is_ours_where_proc_shows_somebody_else_s_pids(tmp_path):
    source = """
        import os
        from orchard_infra.runs import membership
        from orchard_infra.system import processes
        inside = [p for p in processes.all_pids() if membership.is_ours(p)]
        print("ours", inside, flush=True)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(source))
    script = run_command(tmp_path, ["unshare", "-fp", sys.executable, "script.py"])
    assert script.wait_for("ours") == "ours []"


def test_a_process_that_is_gone_is_not_ours():
    child = subprocess.Popen(["true"])
    child.wait()
    assert not is_ours(child.pid)


# What kind of survivor


KINDS = {
    "forked": "worker",
    "forked, title rewritten": "worker",
    "forked, setsid": "detached",
    "forked twice": "detached",
    "executed": "program",
    "executed, setsid": "detached",
}


def test_what_a_crashed_run_left_is_a_worker_a_program_or_detached(tmp_path):
    run = start(tmp_path, *KINDS, "executed, opted out")
    run.do("note")
    run.kill_leader()
    assert kinds(tmp_path) == {run.pids[kind]: expected for kind, expected in KINDS.items()}


def test_of_two_runs_of_one_program_the_one_counts_whose_id_a_process_carries(tmp_path):
    """Also if the other one, in another thread, began later and has written it down."""
    run = start(tmp_path, *KINDS)
    run.do("another run")
    run.kill_leader()
    assert kinds(tmp_path) == {run.pids[kind]: expected for kind, expected in KINDS.items()}


def test_of_a_released_run_only_workers_are_in_the_way(tmp_path, registry):
    """Its program has exited by now. What else it started may be meant to go on."""
    run = start(tmp_path, *KINDS)
    run.do("end")
    assert survivors(tmp_path) == {}  # the program lives
    assert registry.find(run.run_id).state is RunState.ENDED
    assert {live_run_of(registry, pid) for pid in run.pids.values()} == {run.run_id}
    run.kill_leader()
    expected = {**KINDS, "executed": "detached"}
    assert kinds(tmp_path) == {run.pids[kind]: what for kind, what in expected.items()}


def test_below_a_detached_process_everything_is_detached(tmp_path):
    """A tmux server that was started in a run: its shells carry the run's id."""
    source = """
        import os, subprocess, sys
        from orchard_infra.runs.record import RUN_ID_VARIABLE, describe_this_run
        from orchard_infra.runs.registry import RunRegistry
        record = describe_this_run("digits")
        registration = RunRegistry().register(record)
        environ = {**os.environ, RUN_ID_VARIABLE: record.run_id}
        script = "env -i sleep 1000 & clean=$!; sleep 1000 & echo started $$ $clean $!; wait"
        words = ["sh", "-c", script]
        subprocess.Popen(words, env=environ, start_new_session=True)
        sys.stdin.readline()
    """
    run = run_python(tmp_path, source)
    pids = [int(word) for word in run.wait_for("started").split()[1:]]
    run.kill()
    run.wait()
    assert kinds(tmp_path) == dict.fromkeys(pids, "detached")


def test_what_was_started_without_the_run_s_environment_is_reported_at_most(tmp_path):
    """It was written down, and not found by anything that it carries."""
    run = start(tmp_path, *STRANGERS)
    run.kill_leader()
    assert survivors(tmp_path) == {}
    run = start(tmp_path, *STRANGERS)
    run.do("note")
    run.kill_leader()
    found = found_by_another(tmp_path)
    assert {one.pid: (one.kind, one.evidence) for one in found} == {
        run.pids[kind]: ("detached", "written down by the run")
        for kind in STRANGERS
        if kind != "executed, opted out"
    }


# Pools of every kind, made before the block and in it.
POOLS = """
    import multiprocessing, os, signal, subprocess, sys, threading, time

    def work(number):
        time.sleep(1000)

    def start(method, count=1):
        context = multiprocessing.get_context(method)
        made = [context.Process(target=work, args=(i,)) for i in range(count)]
        for process in made:
            process.start()
        return [process.pid for process in made]

    def fork_a_copy():
        pid = os.fork()
        if pid == 0:
            signal.pause()
        return pid

    if __name__ == "__main__":
        import json
        from orchard_infra.runs.record import RUN_ID_VARIABLE, RunState, describe_this_run
        from orchard_infra.runs.registry import RunRegistry

        pids = {}
        if "before" in sys.argv:
            pids["server, before"] = []
            for method in ("fork", "spawn", "forkserver"):
                pids[f"{method}, before"] = start(method)
            pids["copy, before"] = [fork_a_copy()]
            pids["program, before"] = [subprocess.Popen(["sleep", "1000"]).pid]
        record = describe_this_run("digits")
        registration = RunRegistry().register(record)
        os.environ[RUN_ID_VARIABLE] = record.run_id
        registration.update(record, RunState.RUNNING)
        for method in ("fork", "spawn", "forkserver"):
            pids[method] = start(method)
        registration.note_members()
        # What nobody has written down: it is found below a server that was.
        pids["forkserver, later"] = start("forkserver", 3)
        from multiprocessing import forkserver, resource_tracker
        pids["server"] = [forkserver._forkserver._forkserver_pid]
        pids["tracker"] = [resource_tracker._resource_tracker._pid]
        print("pools", json.dumps(pids), flush=True)
        for line in sys.stdin:
            if line.strip() == "end":
                registration.end()
            print("done", line, end="", flush=True)
"""
HELPERS = ("server", "tracker")


@pytest.mark.parametrize("ending", ["crashed", "released"])
@pytest.mark.parametrize("server", ["before", "inside"])
def test_every_worker_of_a_dead_program_is_found_whatever_started_it(tmp_path, server, ending):
    """Workers of a forkserver carry no run id if it was started before the run; nor is what nobody
    has written down missed, if it is below that server.
    """
    script = run_python(tmp_path, POOLS, server, name="pools.py")
    pids = json.loads(script.wait_for("pools {").removeprefix("pools "))
    if ending == "released":
        script.tell("end")
        script.wait_for("done end")
        assert survivors(tmp_path) == {}
    script.kill()
    script.wait()
    found = {one.pid: one for one in found_by_another(tmp_path)}
    pids.pop("server, before", None)
    program = pids.pop("program, before", [])
    expected = {pid for some in pids.values() for pid in some}
    assert found.keys() == expected
    assert {one.kind for one in found.values()} == {"worker"}
    helpers = {pid for kind in HELPERS for pid in pids[kind]}
    assert {pid for pid, one in found.items() if one.is_helper} == helpers
    assert list(found)[-len(helpers) :] == sorted(helpers)  # they are stopped last
    assert all(processes.is_running(pid) for pid in program)


SERVER = """
    import multiprocessing, signal
    if __name__ == "__main__":
        workers = [
            multiprocessing.get_context(method).Process(target=signal.pause)
            for method in ("fork", "spawn", "forkserver")
        ]
        for worker in workers:
            worker.start()
        print("serving", flush=True)
        signal.pause()
"""


def test_a_server_that_the_program_had_before_the_run_goes_on_with_its_workers(tmp_path):
    """It is no part of the run, in whatever session it is, although it was written down."""
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))
    source = """
        import subprocess, sys
        from orchard_infra.runs.record import describe_this_run
        from orchard_infra.runs.registry import RunRegistry
        words = [sys.executable, "server.py"]
        for options in ({}, {"start_new_session": True}):
            server = subprocess.Popen(words, stdout=subprocess.PIPE, **options)
            server.stdout.readline()
        registration = RunRegistry().register(describe_this_run("digits"))
        registration.note_members()
        print("registered", flush=True)
        sys.stdin.readline()
    """
    run = run_python(tmp_path, source)
    run.wait_for("registered")
    assert len(processes.descendants([run.pid])) >= 2 * 5
    run.kill()
    run.wait()
    assert survivors(tmp_path) == {}


def test_a_server_that_a_released_run_started_is_reported_with_its_workers(tmp_path):
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))
    source = """
        import os, subprocess, sys
        from orchard_infra.runs.record import RUN_ID_VARIABLE, describe_this_run
        from orchard_infra.runs.registry import RunRegistry
        registration = RunRegistry().register(describe_this_run("digits"))
        os.environ[RUN_ID_VARIABLE] = registration.record.run_id
        server = subprocess.Popen([sys.executable, "server.py"], stdout=subprocess.PIPE)
        server.stdout.readline()
        registration.end()
        print("ended", flush=True)
        sys.stdin.readline()
    """
    run = run_python(tmp_path, source)
    run.wait_for("ended")
    started = set(processes.descendants([run.pid]))
    assert len(started) >= 6
    run.kill()
    run.wait()
    assert kinds(tmp_path) == dict.fromkeys(started, "detached")


def test_loky_s_workers_are_workers_and_its_tracker_is_a_helper(tmp_path):
    require_module("joblib")
    source = """
        import os, sys, time
        from joblib.externals.loky import get_reusable_executor
        from orchard_infra.runs.record import RUN_ID_VARIABLE, describe_this_run
        from orchard_infra.runs.registry import RunRegistry
        if __name__ == "__main__":
            if sys.argv[1] == "before":
                pids = {get_reusable_executor(max_workers=2).submit(os.getpid).result()}
            record = describe_this_run("digits")
            os.environ[RUN_ID_VARIABLE] = record.run_id
            registration = RunRegistry().register(record)
            executor = get_reusable_executor(max_workers=2)
            executor.submit(os.getpid).result()
            registration.note_members()
            print("workers", *executor._processes, flush=True)
            sys.stdin.readline()
    """
    for when in ("before", "inside"):
        script = run_python(tmp_path, source, when)
        workers = {int(word) for word in script.wait_for("workers").split()[1:]}
        script.kill()
        script.wait()
        found = found_by_another(tmp_path)
        assert {one.kind for one in found} == {"worker"}
        assert workers == {one.pid for one in found if not one.is_helper}
        assert any(one.is_helper for one in found)  # multiprocessing has one as well
        for one in found:
            os.kill(one.pid, 9)
        wait_gone(one.pid for one in found)


def test_a_process_that_led_a_run_of_its_own_well_is_no_survivor(tmp_path):
    """A trial that was forked by a sweep: it writes its results when the sweep is killed, and so
    does what it has started for that.
    """
    source = """
        import os, signal, subprocess, sys
        from orchard_infra.runs.record import RUN_ID_VARIABLE, describe_this_run
        from orchard_infra.runs.registry import RunRegistry
        former = RunRegistry().register(describe_this_run("former"))
        former.close()
        registration = RunRegistry().register(describe_this_run("sweep"))
        os.environ[RUN_ID_VARIABLE] = registration.record.run_id
        pids = []
        for is_trial in (True, False):
            read, write = os.pipe()
            pids.append(os.fork())
            if pids[-1] == 0:
                if is_trial:
                    RunRegistry().register(describe_this_run("trial")).end()
                    writer = subprocess.Popen(["sleep", "1000"])
                os.write(write, b".")
                signal.pause()
            os.read(read, 1)
        print("forked", *pids, flush=True)
        sys.stdin.readline()
    """
    sweep = run_python(tmp_path, source)
    trial, idle = map(int, sweep.wait_for("forked").split()[1:])
    [writer] = processes.children_of(trial)
    assert processes.is_running(writer)
    sweep.kill()
    sweep.wait()
    assert survivors(tmp_path) == {idle: "forked by the run"}


def test_what_is_below_a_daemon_that_opted_out_is_no_survivor(tmp_path):
    source = """
        import os, subprocess, sys
        from orchard_infra.runs.record import RUN_ID_VARIABLE, describe_this_run
        from orchard_infra.runs.registry import RunRegistry
        registration = RunRegistry().register(describe_this_run("digits"))
        script = f"{RUN_ID_VARIABLE}={registration.record.run_id} sleep 1000 & wait"
        words = ["sh", "-c", script]
        daemon = subprocess.Popen(words, env={**os.environ, RUN_ID_VARIABLE: ""})
        print("started", daemon.pid, flush=True)
        sys.stdin.readline()
    """
    run = run_python(tmp_path, source)
    daemon = int(run.wait_for("started").split()[1])
    wait_until(lambda: processes.children_of(daemon))
    run.kill()
    run.wait()
    assert survivors(tmp_path) == {}


def test_of_another_boot_nothing_has_survived_and_nobody_looks(registry, monkeypatch):
    monkeypatch.setattr(processes, "table", lambda: pytest.fail("looked at every process"))
    dead = attrs.evolve(describe_this_run("digits"), boot_id="another")
    assert list(Membership(()).survivors([RegisteredRun(dead, RunState.DEAD)])) == []


def test_survivors_of_a_record_of_the_version_before_are_classified_too(tmp_path, registry):
    """It does not say in which session the program was."""
    run = start(tmp_path, *KINDS)
    run.kill_leader()
    [found] = registry.runs()
    former = attrs.evolve(found, record=attrs.evolve(found.record, session=None, environment=None))
    # In a process of its own, which is no relative of what is to be found.
    path = registry.directory / found.file_name
    fields = json.loads(path.read_bytes().partition(b"\n")[0])
    for name in ("session", "environment"):
        fields.pop(name, None)
    with open(path, "r+b") as file:
        file.write(json.dumps(fields).encode() + b"\n")
        file.truncate()
    assert registry.runs() == (former,)
    expected = {**KINDS, "forked, setsid": "detached", "forked twice": "detached"}
    assert kinds(tmp_path) == {run.pids[kind]: what for kind, what in expected.items()}


# What a run leaves to its program


def test_the_children_that_a_run_leaves_are_listed_and_those_from_before_are_not(
    tmp_path, registry
):
    source = """
        import json, os, signal, subprocess, sys
        from orchard_infra.runs.record import RUN_ID_VARIABLE, describe_this_run
        from orchard_infra.runs.registry import RunRegistry

        def orphan():
            read, write = os.pipe()
            if os.fork() == 0:
                if os.fork() == 0:
                    os.write(write, str(os.getpid()).encode())
                    signal.pause()
                os._exit(0)
            os.wait()
            return int(os.read(read, 20))

        before = subprocess.Popen(["sleep", "1000"])
        record = describe_this_run("digits")
        registration = RunRegistry().register(record)
        os.environ[RUN_ID_VARIABLE] = record.run_id
        known = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        nobody = registration.children_left(known)
        started = [
            subprocess.Popen(["sleep", "1000"]).pid,
            orphan(),
            int(subprocess.check_output(["sh", "-c", "sleep 1000 >&2 & echo $!"])),
        ]
        done = subprocess.Popen(["true"])
        done.wait()
        left = [identity.pid for identity in registration.children_left(known)]
        print("left", json.dumps([len(nobody), started, left]), flush=True)
        registration.end()
        print("ended", record.run_id, flush=True)
        sys.stdin.readline()
    """
    script = run_python(tmp_path, source)
    nobody, started, left = json.loads(script.wait_for("left [").removeprefix("left "))
    assert nobody == 0
    assert left == sorted(started)
    run_id = script.wait_for("ended").split()[1]
    assert {live_run_of(registry, pid) for pid in started} == {run_id}
    script.kill()
    script.wait()
    assert set(survivors(tmp_path)) == set(started)


def test_a_process_below_an_ended_run_s_living_program_is_never_touched(tmp_path, registry):
    run = start(tmp_path, "forked", "executed, clean")
    run.do("note")
    run.do("end")
    for pid in run.pids.values():
        assert live_run_of(registry, pid) == run.run_id
    [found] = registry.runs()
    assert not found.is_live
    assert not found.is_over


# Members of live runs


@pytest.mark.parametrize("state", ["running", "waiting", "all descriptors closed"])
def test_everything_that_a_live_run_started_belongs_to_it(tmp_path, registry, state):
    kinds = [*MEMBERS, *STRANGERS]
    run = start(tmp_path, *kinds)
    if state == "waiting":
        path = registry.directory / f"{run.run_id}.run"
        path.write_bytes(path.read_bytes().replace(b'"running"', b'"waiting"'))
        assert registry.find(run.run_id).state is RunState.WAITING
    if state == "all descriptors closed":
        run.script.tell("close descriptors")
        run.script.wait_for("done")
    assert {kind: live_run_of(registry, pid) for kind, pid in run.pids.items()} == dict.fromkeys(
        run.pids, run.run_id
    )


def test_a_child_with_a_cleaned_environment_belongs_through_whoever_is_above_it(tmp_path, registry):
    """Its parent is an orphan that the run started; above that one there is nobody."""
    source = """
        import os, subprocess, sys
        from orchard_infra.runs.record import RUN_ID_VARIABLE, describe_this_run
        from orchard_infra.runs.registry import RunRegistry
        record = describe_this_run("digits")
        registration = RunRegistry().register(record)
        os.environ[RUN_ID_VARIABLE] = record.run_id
        script = "env -i sleep 1000 & echo started $! $$; wait"
        if os.fork() == 0:
            subprocess.Popen(["sh", "-c", script])
            os._exit(0)
        os.wait()
        sys.stdout.write(f"registered {record.run_id}\\n")  # in one go: the shell writes as well
        sys.stdout.flush()
        sys.stdin.readline()
    """
    run = run_python(tmp_path, source)
    run_id = run.wait_for("registered").split()[1]
    child, shell = map(int, run.wait_for("started").split()[1:])
    wait_until(lambda: processes.read_environ(child) == {})
    assert run.pid not in list(processes.ancestors(child))
    assert live_run_of(registry, shell) == run_id
    assert live_run_of(registry, child) == run_id


def test_what_was_written_down_belongs_although_it_is_an_orphan_with_a_cleaned_environment(
    tmp_path, registry
):
    source = """
        import subprocess, sys
        from orchard_infra.runs.record import describe_this_run
        from orchard_infra.runs.registry import RunRegistry
        registration = RunRegistry().register(describe_this_run("digits"))
        words = ["sh", "-c", "env -i sleep 1000 & echo started $!; read line"]
        shell = subprocess.Popen(words, stdin=subprocess.PIPE)
        sys.stdin.readline()
        registration.note_members()
        shell.communicate(b".\\n")
        print("registered", registration.record.run_id, flush=True)
        sys.stdin.readline()
    """
    run = run_python(tmp_path, source)
    orphan = int(run.wait_for("started").split()[1])
    run.tell()
    run_id = run.wait_for("registered").split()[1]
    assert run.pid not in list(processes.ancestors(orphan))
    wait_until(lambda: processes.read_environ(orphan) == {})
    assert live_run_of(registry, orphan) == run_id


def test_a_stranger_belongs_to_no_run_and_a_dead_run_protects_nobody(tmp_path, registry):
    run = start(tmp_path, "forked", "executed")
    bystander = run_command(tmp_path, ["sleep", "1000"])
    assert live_run_of(registry, bystander.pid) is None
    assert live_run_of(registry, os.getpid()) is None
    run.kill_leader()
    for kind in ("forked", "executed"):
        assert live_run_of(registry, run.pids[kind]) is None


def test_a_fork_is_no_member_of_a_run_whose_record_another_thread_is_reading(
    tmp_path, registry, monkeypatch
):
    """It would be spared for as long as that run lives: found by chaos, and made to happen here."""
    run = start(tmp_path)
    is_reading, may_go_on = threading.Event(), threading.Event()

    def read_slowly(fd: int) -> object:
        is_reading.set()
        assert may_go_on.wait(30)
        return read_record(fd)

    monkeypatch.setattr("orchard_infra.runs.registry.read_record", read_slowly)
    reader = threading.Thread(target=registry.runs)
    reader.start()
    assert is_reading.wait(30)
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        os.write(tell, b".")
        signal.pause()
        os._exit(0)
    try:
        os.read(ready, 1)  # what is done in a child after a fork, it has done by then
        may_go_on.set()
        reader.join()
        monkeypatch.undo()
        assert live_run_of(registry, run.script.pid) == run.run_id
        assert live_run_of(registry, child) is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)


def test_of_nested_runs_the_inner_one_is_named(tmp_path, registry):
    outer = registry.register(describe_this_run("outer"))
    run = start(tmp_path, "executed")
    assert live_run_of(registry, run.pids["executed"]) == run.run_id
    assert live_run_of(registry, run.script.pid) == run.run_id
    assert live_run_of(registry, os.getpid()) == outer.record.run_id
    outer.close()


def test_the_same_pid_since_another_boot_is_no_leader(registry):
    """That boot may be the one of another host, which shares the file system."""
    registration = registry.register(attrs.evolve(describe_this_run("digits"), boot_id="another"))
    [found] = registry.runs()
    assert found.is_live
    child = subprocess.Popen(["sleep", "1000"], close_fds=True)
    # We hold its record, which is proof; by the pid alone there would be none.
    assert live_run_of(registry, os.getpid()) == found.record.run_id
    assert Membership((attrs.evolve(found, file=(0, 0)),)).live_run_of(child.pid) is None
    local = attrs.evolve(found, file=(0, 0), record=describe_this_run("digits"))
    assert Membership((local,)).live_run_of(child.pid) == local
    child.kill()
    child.wait()
    registration.close()


def test_a_pid_that_a_leader_had_before_protects_nobody():
    record = describe_this_run("digits")
    former = attrs.evolve(record, create_time=record.create_time - 1)
    assert Membership((RegisteredRun(former, RunState.RUNNING),)).live_run_of(os.getpid()) is None
    assert Membership((RegisteredRun(record, RunState.RUNNING),)).live_run_of(os.getpid())


# Orphans of a live run


def test_what_a_live_run_started_is_found_wherever_it_went(tmp_path, registry):
    source = """
        import json
        from orchard_infra.runs.membership import orphans_of
        from orchard_infra.runs.registry import RunRegistry
        {run}
            if line.strip() == "orphans":
                found = orphans_of(RunRegistry().find(record.run_id), record.run_id)
                print("orphans", json.dumps([identity.pid for identity in found]), flush=True)
    """
    text = textwrap.dedent(source).replace("{run}\n", textwrap.dedent(RUN))
    (tmp_path / "orphans.py").write_text(text)
    kinds = [*MEMBERS, *STRANGERS]
    run = run_python(tmp_path, tmp_path / "orphans.py", *kinds)
    run_id, pids = json.loads(run.wait_for("run [").removeprefix("run "))
    record = registry.directory / f"{run_id}.run"
    reader = run_python(tmp_path, HOLDS_OPEN, str(record), name="reader.py")
    reader.wait_for("opened")
    for kind in kinds:
        if kind.startswith("executed"):
            wait_until(lambda kind=kind: b"sleep" in processes.read_cmdline(pids[kind]))
    run.tell("orphans")
    found = json.loads(run.wait_for("orphans [").removeprefix("orphans "))
    assert set(found) - {run.pid} == {pids[kind] for kind in MEMBERS}


def test_without_a_record_only_what_was_executed_is_found():
    child = subprocess.Popen(["sleep", "1000"], env=environment({RUN_ID_VARIABLE: "abc"}))
    wait_until(lambda: b"sleep" in processes.read_cmdline(child.pid))
    assert [identity.pid for identity in orphans_of(None, "abc")] == [child.pid]
    assert list(orphans_of(None, "ab")) == []
    assert list(orphans_of(None, "abcd")) == []
    child.kill()
    child.wait()
    assert list(orphans_of(None, "abc")) == []


# Kin


def test_kin_are_ancestors_descendants_and_the_other_workers_of_a_fork_pool(tmp_path):
    source = """
        import multiprocessing, os, subprocess, sys
        from orchard_infra.runs.membership import kin

        def look(barrier):
            barrier.wait()
            return os.getpid(), sorted(kin())

        def initialize(b):
            global barrier
            barrier = b

        def work(_):
            return look(barrier)

        context = multiprocessing.get_context("fork")
        child = subprocess.Popen(["sleep", "1000"])
        with context.Pool(3, initialize, [context.Barrier(3)]) as pool:
            for pid, found in pool.map(work, range(3), chunksize=1):
                print("kin", pid, *found, flush=True)
            print("pool", os.getpid(), child.pid, flush=True)
    """
    script = run_python(tmp_path, source)
    bystander = run_python(tmp_path, "input()", name="bystander.py")
    parent, child = map(int, script.wait_for("pool").split()[1:])
    seen = [list(map(int, line.split()[1:])) for line in script.output.splitlines()[:3]]
    workers = {worker for worker, *_ in seen}
    assert len(workers) == 3
    for _, *found in seen:
        assert workers | {parent, child, os.getpid(), 1} <= set(found)
        assert bystander.pid not in found


def test_a_twin_of_the_parent_is_no_kin(tmp_path):
    """Same command line, and both started by us: what makes kin is descent."""
    source = """
        import sys
        from orchard_infra.runs.membership import kin
        print("ready", flush=True)
        sys.stdin.readline()
        print("kin", *kin(), flush=True)
    """
    first, second = run_python(tmp_path, source), run_python(tmp_path, source)
    first.wait_for("ready")
    second.wait_for("ready")
    first.tell()
    found = first.wait_for("kin").split()[1:]
    assert str(first.pid) in found
    assert str(os.getpid()) in found
    assert str(second.pid) not in found


# For a person


def test_a_command_is_shown_or_the_name_of_what_has_none():
    child = subprocess.Popen(["sleep", "1000", "0" * 1000])
    wait_until(lambda: b"sleep" in processes.read_cmdline(child.pid))
    assert command_of(child.pid) == ("sleep 1000 " + "0" * 1000)[:400]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert command_of(child.pid) == "[sleep]"
    child.wait()
    assert command_of(child.pid) == "(gone)"


def test_looking_costs_nothing_where_there_is_nothing_to_look_for(monkeypatch):
    monkeypatch.setattr(processes, "all_pids", lambda: pytest.fail("looked at every process"))
    monkeypatch.setattr(processes, "read_stat", lambda pid: pytest.fail("looked at a process"))
    assert list(Membership(()).survivors([])) == []
    assert Membership(()).live_run_of(os.getpid()) is None
    assert membership.RUN_ID_VARIABLE == "ORCHARD_INFRA_RUN_ID"
