"""A dead run never blocks a new one, and its processes are found by proof."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from support import PATIENCE, Script, is_running, run_python, wait_gone, wait_until

# A run with children of every kind, and a next run that tells what it found.
RUN = """
    import json, os, signal, subprocess, sys, time
    from orchard_infra import EnvironmentConfig, EnvironmentLockedError, FileLock, GhostSanitizer
    from orchard_infra import InfrastructureManager, managed_environment

    kinds = sys.argv[1].split(",") if len(sys.argv) > 1 else []
    cfg = EnvironmentConfig("digits", allow_process_kill=os.environ.get("KILL") == "yes")
    manager = InfrastructureManager(
        locker=FileLock(timeout=None if os.environ.get("WAIT") else 0.0),
        sanitizer=GhostSanitizer(
            grace=float(os.environ.get("GRACE", "5")),
            patience=float(os.environ.get("PATIENCE", "0.5")),
        ),
    )

    def stay():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pause()

    try:
        with managed_environment(cfg, manager=manager) as env:
            pids = {}
            for kind in kinds:
                read, write = os.pipe()
                if kind == "exec":
                    pids[kind] = subprocess.Popen(["sleep", "1000"]).pid
                elif kind == "exec-setsid":
                    pids[kind] = subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
                elif kind == "opted-out":
                    pids[kind] = subprocess.Popen(
                        ["sleep", "1000"], env={**os.environ, "ORCHARD_INFRA_RUN_ID": ""}
                    ).pid
                elif kind == "fork":
                    pids[kind] = os.fork()
                    if not pids[kind]:
                        stay()
                elif kind == "double-fork":
                    if not os.fork():
                        os.setsid()
                        child = os.fork()
                        if child:
                            os.write(write, str(child).encode())
                            os._exit(0)
                        stay()
                    pids[kind] = int(os.read(read, 20))
                elif kind == "stubborn":
                    pids[kind] = os.fork()
                    if not pids[kind]:
                        signal.signal(signal.SIGTERM, signal.SIG_IGN)
                        os.write(write, b"x")
                        while True:
                            signal.pause()
                    os.read(read, 1)
            report = env.report
            print("in", json.dumps({
                "pids": pids,
                "tmp": str(env.tmp_dir),
                "lock": str(env.lock_path),
                "run": env.run.run_id,
                "stopped": [f.pid for f in report.sanitized.stopped + report.sanitized.killed],
                "spared": {f.pid: f.reason for f in report.sanitized.spared},
            }), flush=True)
            sys.stdin.readline()
    except EnvironmentLockedError as error:
        print("locked", json.dumps({
            "holder": error.holder and error.holder.pid,
            "survivors": [s.pid for s in error.survivors],
            "message": str(error),
        }), flush=True)
        sys.exit(75)
"""


def start(tmp_path: Path, kinds: str = "", **environ: str) -> Script:
    return run_python(tmp_path, RUN, *([kinds] if kinds else []), name="run.py", env=environ)


def inside(run: Script) -> dict:
    return json.loads(run.wait_for("in {").removeprefix("in "))


def refused(run: Script) -> dict:
    return json.loads(run.wait_for("locked {").removeprefix("locked "))


def killed_run(tmp_path: Path, kinds: str) -> dict:
    """A run that was killed with -9; its children live on."""
    run = start(tmp_path, kinds)
    facts = inside(run)
    run.kill()
    run.finish()
    return facts


@pytest.mark.parametrize("kind", ["fork", "double-fork", "stubborn"])
def test_forked_survivors_hold_the_lock_and_are_stopped(tmp_path, kind):
    facts = killed_run(tmp_path, kind)
    survivor = facts["pids"][kind]
    assert is_running(survivor)
    after = start(tmp_path, KILL="yes", GRACE="0.3")
    inside(after)
    wait_gone([survivor])
    after.tell()
    assert after.finish() == 0


@pytest.mark.parametrize("kind", ["exec", "exec-setsid"])
def test_children_that_were_started_by_the_dead_run_are_stopped_under_a_free_lock(tmp_path, kind):
    survivor = killed_run(tmp_path, kind)["pids"][kind]
    after = start(tmp_path, KILL="yes")
    assert survivor in inside(after)["stopped"]
    assert not is_running(survivor)


def test_survivors_are_listed_with_the_command_that_clears_them_when_killing_is_off(tmp_path):
    facts = killed_run(tmp_path, "fork")
    survivor = facts["pids"]["fork"]
    said = refused(start(tmp_path))
    assert said["survivors"] == [survivor]
    assert f"kill {survivor}" in said["message"]
    assert "allow_process_kill=True" in said["message"]
    assert is_running(survivor)


def test_started_survivors_are_warned_about_and_do_not_block_when_killing_is_off(tmp_path):
    survivor = killed_run(tmp_path, "exec")["pids"]["exec"]
    after = start(tmp_path)
    assert str(survivor) in inside(after)["spared"]
    assert f"pid {survivor}" in after.error_output
    assert is_running(survivor)


def test_a_survivor_spared_once_can_still_be_stopped_later(tmp_path):
    """Its run's record, the evidence, stays until it has gone."""
    survivor = killed_run(tmp_path, "exec")["pids"]["exec"]
    first = start(tmp_path)
    inside(first)
    first.tell()
    assert first.finish() == 0
    assert survivor in inside(start(tmp_path, KILL="yes"))["stopped"]


def test_survivors_that_leave_by_themselves_are_waited_for(tmp_path):
    survivor = killed_run(tmp_path, "fork")["pids"]["fork"]
    after = start(tmp_path, PATIENCE=str(PATIENCE))
    wait_until(lambda: after.poll() is None and waits_for_survivors(after))
    os.kill(survivor, signal.SIGKILL)
    inside(after)


def waits_for_survivors(run: Script) -> bool:
    """It has registered, and neither entered nor failed."""
    registry = Path(os.environ["ORCHARD_INFRA_DIR"]) / "runs"
    return any(f'"pid": {run.pid},' in path.read_text() for path in registry.glob("*.run"))


def test_a_daemon_that_opted_out_is_no_survivor(tmp_path):
    daemon = killed_run(tmp_path, "opted-out")["pids"]["opted-out"]
    found = inside(start(tmp_path, KILL="yes"))
    assert daemon not in found["stopped"]
    assert str(daemon) not in found["spared"]
    assert is_running(daemon)


def test_a_healthy_waiter_is_never_taken_for_a_survivor(tmp_path):
    """It has the lock file open, too. A prototype that read membership off that shot it."""
    first = start(tmp_path, "stubborn")
    survivor = inside(first)["pids"]["stubborn"]
    waiters = [start(tmp_path, WAIT="yes", KILL="yes", GRACE="0.2") for _ in range(3)]
    for waiter in waiters:
        wait_until(lambda waiter=waiter: waits_for_survivors(waiter))
    first.kill()
    first.finish()
    entered = []
    while len(entered) < 3:
        entered.append(
            wait_until(
                lambda: next((w for w in waiters if w not in entered and "in {" in w.output), None)
            )
        )
        entered[-1].tell()
        assert entered[-1].finish() == 0, entered[-1].transcript()
    assert not is_running(survivor)


def test_nothing_of_a_dead_run_is_left_after_the_next_prepare(tmp_path, runtime_directory):
    facts = killed_run(tmp_path, "fork,exec,double-fork")
    Path(facts["tmp"], "half-written").write_bytes(b"x" * 1000)
    after = start(tmp_path, KILL="yes")
    now = inside(after)
    wait_gone(facts["pids"].values())
    assert not Path(facts["tmp"]).exists()
    assert [p.stem for p in (runtime_directory / "runs").iterdir()] == [now["run"]]
    after.tell()
    assert after.finish() == 0
    assert not Path(now["lock"]).exists()
    assert not Path(now["tmp"]).exists()
    assert list((runtime_directory / "runs").iterdir()) == []


def test_a_record_from_another_boot_is_no_obstacle(tmp_path, runtime_directory):
    """A power loss, simulated: the record says another boot, and its pid belongs to a bystander."""
    run = start(tmp_path)
    facts = inside(run)
    bystander = start(tmp_path, WAIT="yes")
    wait_until(lambda: waits_for_survivors(bystander))
    bystander.kill()
    bystander.finish()
    run.kill()
    run.finish()
    for path in [*(runtime_directory / "runs").glob("*.run"), Path(facts["lock"])]:
        record = json.loads(path.read_text())
        record.update(boot_id="00000000-0000-0000-0000-000000000000", pid=os.getpid())
        path.write_text(json.dumps(record) + "\n")
    after = start(tmp_path, KILL="yes")
    assert inside(after)["stopped"] == []
    assert len(list((runtime_directory / "runs").iterdir())) == 1


def test_a_daemon_that_opted_out_is_spared_below_a_survivor_that_is_stopped(tmp_path):
    source = """
        import os, subprocess, sys
        from orchard_infra import EnvironmentConfig, managed_environment
        NEST = (
            "import os, subprocess, time;"
            "os.environ['ORCHARD_INFRA_RUN_ID'] = '';"
            "daemon = subprocess.Popen(['sleep', '1000']);"
            "print('daemon', daemon.pid, flush=True); time.sleep(1000)"
        )
        with managed_environment(EnvironmentConfig("digits", allow_process_kill=True)):
            print("in", flush=True)
            if len(sys.argv) > 1:
                child = subprocess.Popen([sys.executable, "-c", NEST])
                print("child", child.pid, flush=True)
                sys.stdin.readline()
        """
    run = run_python(tmp_path, source, "nest", name="nest.py")
    child = int(run.wait_for("child").split()[1])
    daemon = int(run.wait_for("daemon").split()[1])
    run.kill()
    run.finish()
    after = run_python(tmp_path, tmp_path / "nest.py")
    after.wait_for("in")
    wait_gone([child])
    assert is_running(daemon)


LEFT = {"fork", "exec", "exec-setsid", "double-fork"}


def test_leftover_children_are_stopped_at_the_end_of_the_block(tmp_path):
    run = start(tmp_path, ",".join(sorted(LEFT)), KILL="yes")
    pids = inside(run)["pids"]
    run.tell()
    assert run.finish() == 0, run.transcript()
    assert [kind for kind, pid in pids.items() if is_running(pid)] == []


@pytest.mark.parametrize("seen", ["alive", "defunct"])
def test_a_double_fork_that_happens_during_the_look_is_found(tmp_path, seen):
    """It was forked after the list of processes was made, and its parent has ended by the time
    that it is looked at: found by chaos, and made to happen here."""
    source = """
        import os, sys, time
        from orchard_infra import EnvironmentConfig, managed_environment
        from orchard_infra.system import processes

        def stale_list():
            processes.parents = parents
            found = parents()
            os.write(go[1], b"!")
            os.waitid(os.P_PID, between, os.WEXITED | os.WNOWAIT)
            if sys.argv[1] == "defunct":
                del found[between]
            return found

        go = os.pipe()
        parents = processes.parents
        with managed_environment(EnvironmentConfig("digits", allow_process_kill=True)):
            between = os.fork()
            if not between:
                os.read(go[0], 1)
                pid = os.fork()
                if pid:
                    print("daemon", pid, flush=True)
                    os._exit(0)
                while True:
                    time.sleep(1000)
            processes.parents = stale_list
        """
    run = run_python(tmp_path, source, seen)
    assert run.finish() == 0, run.transcript()
    assert not is_running(int(run.wait_for("daemon").split()[1]))


def test_leftover_children_are_named_and_left_when_killing_is_off(tmp_path):
    run = start(tmp_path, ",".join(sorted(LEFT)))
    pids = inside(run)["pids"]
    run.tell()
    run.finish()
    for kind, pid in pids.items():
        assert is_running(pid), kind
        assert f"pid {pid} (leftover" in run.error_output, kind


def test_leftover_children_are_stopped_on_shared_compute_as_well(tmp_path):
    run = start(tmp_path, "exec", KILL="yes", SLURM_JOB_ID="7")
    pid = inside(run)["pids"]["exec"]
    run.tell()
    assert run.finish() == 0
    assert not is_running(pid)


def test_a_daemon_that_opted_out_is_no_leftover(tmp_path):
    run = start(tmp_path, "opted-out", KILL="yes")
    pid = inside(run)["pids"]["opted-out"]
    run.tell()
    assert run.finish() == 0
    assert is_running(pid)


def test_children_from_before_the_block_and_excluded_ones_are_left(tmp_path):
    run = run_python(
        tmp_path,
        """
        import os, subprocess, sys
        from orchard_infra import (
            EnvironmentConfig,
            GhostSanitizer,
            InfrastructureManager,
            managed_environment,
        )
        before = subprocess.Popen(["sleep", "1000"])
        excluded = []
        manager = InfrastructureManager(sanitizer=GhostSanitizer(spare=lambda p: p in excluded))
        with managed_environment(EnvironmentConfig("x", allow_process_kill=True), manager=manager):
            inside = subprocess.Popen(["sleep", "1000"])
            excluded.append(subprocess.Popen(["sleep", "1000"]).pid)
        print("done", before.pid, inside.pid, excluded[0], flush=True)
        """,
    )
    before, within, excluded = map(int, run.wait_for("done").split()[1:])
    run.finish()
    assert is_running(before)
    assert is_running(excluded)
    assert not is_running(within)


def test_a_run_that_ends_by_os_exit_leaves_nothing_to_the_next_but_its_files(tmp_path):
    run = run_python(
        tmp_path,
        """
        import os, subprocess, sys
        from orchard_infra import EnvironmentConfig, managed_environment
        with managed_environment(EnvironmentConfig("digits", allow_process_kill=True)) as env:
            if len(sys.argv) > 1:
                child = subprocess.Popen(["sleep", "1000"])
                print("in", child.pid, env.tmp_dir, env.run.run_id, flush=True)
                os._exit(7)
            print("next", flush=True)
        """,
        "exit",
    )
    _, child, tmp_dir, run_id = run.wait_for("in").split()
    assert run.finish() == 7
    assert is_running(int(child))
    after = run_python(tmp_path, tmp_path / "script.py")
    after.wait_for("next")
    assert after.finish() == 0
    assert not is_running(int(child))
    assert not Path(tmp_dir).exists()
    assert not Path(os.environ["ORCHARD_INFRA_DIR"], "runs", f"{run_id}.run").exists()


def test_a_worker_that_is_killed_is_the_program_s_own_business(tmp_path):
    run = run_python(
        tmp_path,
        """
        import os, signal, subprocess
        from orchard_infra import managed_environment
        with managed_environment("digits") as env:
            worker = subprocess.Popen(["sleep", "1000"])
            worker.kill()
            print("worker", worker.wait(), flush=True)
            env.verify()
        print("left", env.lock_path.exists(), env.tmp_dir.exists(), flush=True)
        """,
    )
    assert run.finish() == 0, run.transcript()
    assert run.output.splitlines() == ["worker -9", "left False False"]


def test_two_environments_of_one_process_leave_each_other_s_children_alone(tmp_path):
    run = run_python(
        tmp_path,
        """
        import os, signal, subprocess
        from orchard_infra import EnvironmentConfig, InfrastructureManager

        one, two = (EnvironmentConfig(name, allow_process_kill=True) for name in ("one", "two"))
        manager = InfrastructureManager()
        manager.prepare_environment(one)
        manager.prepare_environment(two)
        forked = os.fork()
        if not forked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pause()
        started = subprocess.Popen(["sleep", "1000"]).pid  # carries the id of "two"
        manager.release_resources(one)
        print("first", forked, started, flush=True)
        input()
        manager.release_resources(two)
        print("second", flush=True)
        """,
    )
    forked, started = map(int, run.wait_for("first").split()[1:])
    assert is_running(forked)
    assert is_running(started)
    run.tell()
    run.wait_for("second")
    wait_gone([forked, started])
    assert run.finish() == 0


def test_a_killed_run_with_real_data_loader_workers_does_not_block_the_next(tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    source = """
        import os, sys, time
        import torch
        from orchard_infra import EnvironmentConfig, managed_environment

        class Slow(torch.utils.data.Dataset):
            def __len__(self): return 1000
            def __getitem__(self, i):
                if i > 2: time.sleep(1000)   # a worker stuck in I/O
                return i

        with managed_environment(EnvironmentConfig("loader", allow_process_kill=True)):
            print("in", flush=True)
            if len(sys.argv) > 1:
                loader = torch.utils.data.DataLoader(Slow(), num_workers=2)
                iterator = iter(loader)
                next(iterator)
                print("workers", *(w.pid for w in iterator._workers), flush=True)
                sys.stdin.readline()
        """
    run = run_python(tmp_path, source, "load", name="loader.py")
    workers = [int(pid) for pid in run.wait_for("workers").split()[1:]]
    run.kill()
    run.finish()
    after = run_python(tmp_path, tmp_path / "loader.py")
    after.wait_for("in")
    wait_gone(workers)
    assert after.finish() == 0
