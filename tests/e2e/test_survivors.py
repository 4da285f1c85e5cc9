"""A dead run never blocks a new one, and its processes are found by proof."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from support import (
    IN_TIME_NAMESPACE,
    PATIENCE,
    Script,
    is_running,
    needs_time_namespaces,
    run_command,
    run_python,
    wait_gone,
    wait_until,
    written,
)

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


@needs_time_namespaces
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_live_run_on_the_clock_of_another_time_namespace_is_not_taken_for_dead(
    tmp_path, is_inside
):
    """The kernel shows other create times there: the leader looks like a stranger with its pid."""
    script = written(tmp_path / "run.py", RUN)

    def run(*kinds: str, inside: bool, **environ: str) -> Script:
        prefix = IN_TIME_NAMESPACE if inside else ()
        return run_command(tmp_path, [*prefix, sys.executable, str(script), *kinds], env=environ)

    there = run("fork,exec", inside=is_inside)
    children = inside(there)["pids"]
    here = run(inside=not is_inside, KILL="yes", GRACE="0.1", PATIENCE="0")
    told = refused(here)
    assert told["holder"] is not None
    assert told["survivors"] == []
    assert all(is_running(pid) for pid in children.values())
    there.tell()
    assert there.finish() == 0


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


def test_children_that_were_started_by_the_dead_run_are_stopped_under_a_free_lock(tmp_path):
    survivor = killed_run(tmp_path, "exec")["pids"]["exec"]
    after = start(tmp_path, KILL="yes")
    assert survivor in inside(after)["stopped"]
    assert not is_running(survivor)


def test_a_tracker_with_a_session_of_its_own_is_reported_and_goes_on(tmp_path):
    """An experiment tracker that still uploads after a crash is somebody's data."""
    facts = killed_run(tmp_path, "exec-setsid,exec")
    tracker, other = facts["pids"]["exec-setsid"], facts["pids"]["exec"]
    after = start(tmp_path, KILL="yes")
    found = inside(after)
    assert other in found["stopped"]
    assert "session of its own" in found["spared"][str(tracker)]
    after.tell()
    assert after.finish() == 0
    assert f"pid {tracker}" not in after.error_output  # no warning: it does as it should
    assert is_running(tracker)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real /proc")
def test_a_detached_process_that_holds_an_accelerator_is_stopped(tmp_path):
    """It has the memory that the next run needs. What it has open decides that, by the name: here
    a file takes the place of the device."""
    source = RUN.replace(
        "    try:",
        """    from orchard_infra.system import processes
    processes._COMPUTE_DEVICE = ".*/accelerator"
    open("accelerator", "w").close()

    try:""",
        1,
    )
    source = source.replace(
        'subprocess.Popen(["sleep", "1000"], start_new_session=True)',
        'subprocess.Popen(["sleep", "1000"], stdin=open("accelerator"), start_new_session=True)',
    )
    run = run_python(tmp_path, source, "exec-setsid", name="device.py")
    holder = inside(run)["pids"]["exec-setsid"]
    run.kill()
    run.finish()
    after = run_python(tmp_path, source, name="device.py", env={"KILL": "yes"})
    assert holder in inside(after)["stopped"]
    assert not is_running(holder)


def test_a_tmux_server_that_a_run_has_started_keeps_the_shells_below_it(tmp_path, require_tool):
    tmux = require_tool("tmux")
    source = """
        import os, subprocess, sys
        from orchard_infra import EnvironmentConfig, managed_environment
        with managed_environment(EnvironmentConfig("digits", allow_process_kill=True)) as env:
            if len(sys.argv) > 1:
                tmux = [sys.argv[1], "-S", "socket", "-f", "/dev/null"]
                subprocess.run([*tmux, "new-session", "-d", "sleep 1000"], check=True)
                shown = ["display-message", "-p", "#{pid} #{pane_pid}"]
                told = subprocess.run([*tmux, *shown], check=True, stdout=subprocess.PIPE)
                print("server", *told.stdout.decode().split(), flush=True)
                sys.stdin.readline()
            print("stopped", [f.pid for f in env.report.sanitized.stopped], flush=True)
        """
    run = run_python(tmp_path, source, tmux, env={"TMUX": None, "TERM": "xterm"})
    pids = [int(pid) for pid in run.wait_for("server").split()[1:]]
    run.kill()
    run.finish()
    after = run_python(tmp_path, tmp_path / "script.py", env={"TERM": "xterm"})
    assert after.wait_for("stopped") == "stopped []"
    assert after.finish() == 0
    assert all(is_running(pid) for pid in pids)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver", "forkserver from before"])
def test_workers_of_every_start_method_are_stopped_and_their_helpers_end(tmp_path, method):
    """A worker of a forkserver shows the server's command line, and carries no id of the run if
    the server was started before."""
    source = """
        import multiprocessing, os, sys, time
        from orchard_infra import EnvironmentConfig, managed_environment
        from orchard_infra.system.processes import descendants

        def work(event):
            event.set()
            time.sleep(1000)

        def start(context):
            event = context.Event()
            context.Process(target=work, args=[event], daemon=True).start()
            event.wait()

        if __name__ == "__main__":
            if len(sys.argv) > 1:
                context = multiprocessing.get_context(sys.argv[1])
                if sys.argv[2:]:
                    start(context)
            with managed_environment(EnvironmentConfig("x", allow_process_kill=True)) as env:
                print("in", flush=True)
                if len(sys.argv) > 1:
                    start(context)
                    start(context)
                    print("below", *descendants([os.getpid()]), flush=True)
                    sys.stdin.readline()
                found = env.report.sanitized
                print("stopped", *(f.pid for f in found.stopped + found.killed), flush=True)
        """
    run = run_python(tmp_path, source, *method.split(" ", 1))
    below = [int(pid) for pid in run.wait_for("below").split()[1:]]
    run.kill()
    run.finish()
    after = run_python(tmp_path, tmp_path / "script.py")
    after.wait_for("in")
    wait_gone(below)
    assert after.finish() == 0, after.transcript()
    assert len(after.wait_for("stopped").split()) > 2
    assert not list((Path(os.environ["ORCHARD_INFRA_DIR"]) / "runs").glob("*.run"))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a real /dev/shm")
def test_shared_memory_of_stopped_workers_is_removed_by_their_tracker(tmp_path):
    """It would stay for ever if the tracker was stopped with them, or before."""
    source = """
        import multiprocessing, os, signal, sys, time
        from multiprocessing import shared_memory
        from orchard_infra import EnvironmentConfig, GhostSanitizer, InfrastructureManager
        from orchard_infra import managed_environment

        def work(event, name):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            memory = shared_memory.SharedMemory(name)
            event.set()
            time.sleep(1000)

        if __name__ == "__main__":
            manager = InfrastructureManager(sanitizer=GhostSanitizer(grace=0.3))
            cfg = EnvironmentConfig("x", allow_process_kill=True)
            with managed_environment(cfg, manager=manager):
                print("in", flush=True)
                if len(sys.argv) > 1:
                    context = multiprocessing.get_context("spawn")
                    event = context.Event()
                    memory = shared_memory.SharedMemory(create=True, size=1000)
                    context.Process(target=work, args=[event, memory.name]).start()
                    event.wait()
                    print("memory", memory.name, flush=True)
                    sys.stdin.readline()
        """
    run = run_python(tmp_path, source, "fill")
    memory = Path("/dev/shm", run.wait_for("memory").split()[1])
    assert memory.exists()
    run.kill()
    run.finish()
    run_python(tmp_path, tmp_path / "script.py").wait_for("in")
    wait_until(lambda: not memory.exists())


@pytest.mark.parametrize("kind", ["fork", "exec"])
def test_on_shared_compute_survivors_of_our_own_job_are_stopped(tmp_path, kind):
    """Else a batch script that starts a run again would be refused until its job ends."""
    run = start(tmp_path, kind, SLURM_JOB_ID="7")
    survivor = inside(run)["pids"][kind]
    run.kill()
    run.finish()
    after = start(tmp_path, KILL="yes", SLURM_JOB_ID="7")
    assert survivor in inside(after)["stopped"]
    assert not is_running(survivor)


@pytest.mark.parametrize("job", ["8", None])
def test_on_shared_compute_survivors_of_another_job_are_left(tmp_path, job):
    run = start(tmp_path, "exec", **({"SLURM_JOB_ID": job} if job else {}))
    survivor = inside(run)["pids"]["exec"]
    run.kill()
    run.finish()
    after = start(tmp_path, KILL="yes", SLURM_JOB_ID="7")
    assert "SLURM_JOB_ID" in inside(after)["spared"][str(survivor)]
    assert is_running(survivor)


def test_survivors_of_another_project_without_a_lock_are_left_alone(tmp_path):
    """Runs that take no lock are told apart by their project."""
    source = """
        import subprocess, sys
        from orchard_infra import EnvironmentConfig, InfrastructureManager, managed_environment
        manager = InfrastructureManager(locker=None)
        cfg = EnvironmentConfig(sys.argv[1], allow_process_kill=True)
        with managed_environment(cfg, manager=manager) as env:
            print("stopped", [f.pid for f in env.report.sanitized.stopped], flush=True)
            if len(sys.argv) > 2:
                print("child", subprocess.Popen(["sleep", "1000"]).pid, flush=True)
                sys.stdin.readline()
        """
    run = run_python(tmp_path, source, "one", "stay")
    child = int(run.wait_for("child").split()[1])
    run.kill()
    run.finish()
    other = run_python(tmp_path, tmp_path / "script.py", "two")
    assert other.wait_for("stopped") == "stopped []"
    assert is_running(child)
    same = run_python(tmp_path, tmp_path / "script.py", "one")
    assert same.wait_for("stopped") == f"stopped [{child}]"


def test_what_a_program_leaves_whose_run_had_ended_is_reported_and_workers_are_stopped(tmp_path):
    """The run was released, the program went on, and then it was killed."""
    source = """
        import os, signal, subprocess, sys
        from orchard_infra import EnvironmentConfig, managed_environment
        with managed_environment(EnvironmentConfig("digits", allow_process_kill=True)) as env:
            if len(sys.argv) > 1:
                server = subprocess.Popen(["sleep", "1000"])
                worker = os.fork()
                if not worker:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    signal.pause()
            else:
                found = env.report.sanitized
                print("stopped", *(f.pid for f in found.stopped), flush=True)
                survivors = (f.pid for f in found.spared if f.evidence == "survivor")
                print("spared", *survivors, flush=True)
        if len(sys.argv) > 1:
            print("after", server.pid, worker, flush=True)
            sys.stdin.readline()
        """
    run = run_python(tmp_path, source, "stay")
    server, worker = (int(pid) for pid in run.wait_for("after").split()[1:])
    # While the program lives, nothing of it is touched.
    first = run_python(tmp_path, tmp_path / "script.py")
    assert first.wait_for("stopped") == "stopped"
    assert first.wait_for("spared") == "spared"
    run.kill()
    run.finish()
    second = run_python(tmp_path, tmp_path / "script.py")
    assert second.wait_for("stopped") == f"stopped {worker}"
    assert second.wait_for("spared") == f"spared {server}"
    wait_gone([worker])
    assert is_running(server)


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
    assert [p.stem for p in (runtime_directory / "runs").glob("*.run")] == [now["run"]]
    after.tell()
    assert after.finish() == 0
    assert not Path(now["lock"]).exists()
    assert not Path(now["tmp"]).exists()
    assert [path.name for path in (runtime_directory / "runs").iterdir()] == ["history.jsonl"]


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
    assert len(list((runtime_directory / "runs").glob("*.run"))) == 1


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


def test_a_program_that_led_a_run_which_ended_well_is_no_part_of_a_stopped_tree(tmp_path):
    """A trial below a killed sweep, past its own block: it may be writing its results."""
    source = """
        import subprocess, sys, time
        from orchard_infra import EnvironmentConfig, managed_environment

        if sys.argv[1:] == ["trial"]:
            with managed_environment("trial"):
                pass
            print("trial", __import__("os").getpid(), flush=True)
            time.sleep(1000)
        with managed_environment(EnvironmentConfig("sweep", allow_process_kill=True)) as env:
            if sys.argv[1:] == ["sweep"]:
                command = f"{sys.executable} {__file__} trial; true"
                shell = subprocess.Popen(["bash", "-c", command])
                print("shell", shell.pid, flush=True)
                time.sleep(1000)
            print("next", flush=True)
        """
    sweep = run_python(tmp_path, source, "sweep")
    shell = int(sweep.wait_for("shell").split()[1])
    trial = int(sweep.wait_for("trial").split()[1])
    sweep.kill()
    sweep.finish()
    after = run_python(tmp_path, tmp_path / "script.py")
    after.wait_for("next")
    assert after.finish() == 0
    wait_gone([shell])
    assert is_running(trial)


@pytest.mark.parametrize("below", ["the dead run", "a shell of the dead run"])
def test_a_live_run_of_another_registry_is_no_survivor_and_no_part_of_a_stopped_tree(
    tmp_path, below
):
    (tmp_path / "other").mkdir(mode=0o700)
    source = """
        import os, subprocess, sys, time
        from orchard_infra import EnvironmentConfig, managed_environment

        if sys.argv[1:] == ["trial"]:
            with managed_environment("trial"):
                print("trial", os.getpid(), flush=True)
                time.sleep(1000)
        may_kill = bool(os.environ.get("KILL"))
        with managed_environment(EnvironmentConfig("sweep", allow_process_kill=may_kill)):
            if sys.argv[1:]:
                command = f"{sys.executable} {__file__} trial"
                command += "; true" if "shell" in sys.argv[1] else ""  # else it execs
                elsewhere = {**os.environ, "ORCHARD_INFRA_DIR": os.path.abspath("other")}
                child = subprocess.Popen(["bash", "-c", command], env=elsewhere)
                print("child", child.pid, flush=True)
                time.sleep(1000)
        """
    sweep = run_python(tmp_path, source, below)
    child = int(sweep.wait_for("child").split()[1])
    trial = int(sweep.wait_for("trial").split()[1])
    sweep.kill()
    sweep.finish()
    for kill in ("", "yes"):
        after = run_python(tmp_path, tmp_path / "script.py", env={"KILL": kill})
        assert after.finish() == 0, after.transcript()
        assert f"pid {trial} " not in after.error_output
        assert is_running(trial)
    if child != trial:
        wait_gone([child])


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


@pytest.mark.slow
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
