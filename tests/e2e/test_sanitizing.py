"""Ghosts, twins, relatives and bystanders: real processes, with killing allowed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchard_infra.system import processes
from support import (
    Script,
    is_running,
    needs_namespaces,
    run_command,
    run_python,
    wait_gone,
    wait_until,
    written,
)

# Sleeps as a ghost without ever entering, or enters and prints its report. Which of the two is
# said by a file: twins have the same arguments and the same environment.
TRAIN = """
    import json, os, signal, sys, time
    from pathlib import Path

    plan = json.loads(Path("plan.json").read_text())
    print("planned", flush=True)
    if "input" in plan:
        os.dup2(os.open(plan["input"], os.O_RDONLY | os.O_CREAT), 0)
    if plan.get("role") == "ghost":
        if plan.get("stubborn"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if plan.get("wipe"):  # as a program does that changes its title
            import ctypes
            start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47])
            ctypes.memset(start, 0, len(Path("/proc/self/environ").read_bytes()))
        if plan.get("tree"):
            import subprocess
            below = subprocess.Popen(["sleep", "1000"])
            detached = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            print("tree", below.pid, detached.pid, flush=True)
        print("ready", flush=True)
        while True:
            signal.pause()

    # It gets a thirtieth of a processor, as on a machine that is overloaded.
    until = time.monotonic() + plan.get("starved", 0)
    while time.monotonic() < until:
        burnt = time.process_time() + 0.005
        while time.process_time() < burnt:
            pass
        time.sleep(0.15)

    from orchard_infra import (
        EnvironmentConfig,
        EnvironmentLockedError,
        GhostSanitizer,
        InfrastructureManager,
        managed_environment,
    )

    cfg = EnvironmentConfig(
        plan.get("project", "digits"), allow_process_kill=plan.get("kill", True)
    )
    manager = InfrastructureManager(sanitizer=GhostSanitizer(**plan.get("sanitizer", {})))
    try:
        with managed_environment(cfg, manager=manager) as env:
            report = env.report.sanitized
            print("report", json.dumps({
                outcome: {f.pid: [f.evidence, f.reason] for f in getattr(report, outcome)}
                for outcome in ("stopped", "killed", "spared", "defunct", "denied")
            }), flush=True)
            if plan.get("stay"):
                sys.stdin.readline()
    except EnvironmentLockedError as error:
        print("locked", error.holder.pid, flush=True)
        sys.exit(75)
"""


def train(
    tmp_path: Path,
    *arguments: str,
    environ: dict[str, str] | None = None,
    stdin: int | None = None,
    **plan: Any,
) -> Script:
    if stdin is None:  # with a pipe as its input it would be at work for the test: nobody's twin
        stdin = subprocess.PIPE if plan.get("stay") else subprocess.DEVNULL
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    process = run_python(tmp_path, TRAIN, *arguments, name="train.py", env=environ, stdin=stdin)
    process.wait_for("planned")  # the next one may have another plan
    return process


def ghost(tmp_path: Path, *arguments: str, **options: Any) -> Script:
    process = train(tmp_path, *arguments, role="ghost", **options)
    process.wait_for("ready")
    return process


def report_of(run: Script) -> dict[str, dict[str, Any]]:
    return json.loads(run.wait_for("report ").removeprefix("report "))


def test_a_twin_is_stopped(tmp_path):
    twin = ghost(tmp_path, "--lr", "3")
    report = report_of(train(tmp_path, "--lr", "3"))
    assert str(twin.pid) in report["stopped"]
    assert twin.finish() == -signal.SIGTERM


def test_a_twin_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    twin = ghost(tmp_path, stubborn=True)
    report = report_of(train(tmp_path, sanitizer={"grace": 0.2}))
    assert str(twin.pid) in report["killed"]
    assert twin.finish() == -signal.SIGKILL


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_gives_a_ghost_its_grace_period(tmp_path, signum):
    """Entering an environment holds signals back for an instant, and not for a grace period."""
    twin = ghost(tmp_path, stubborn=True)
    run = train(tmp_path, sanitizer={"grace": 300})
    wait_until(lambda: has_the_lock(run))
    time.sleep(2.5)  # a young twin is given two seconds to register first
    run.send_signal(signum)
    run.finish()
    assert "report" not in run.output
    assert is_running(twin.pid)
    after = train(tmp_path, sanitizer={"grace": 0.2})
    assert str(twin.pid) in report_of(after)["killed"]


def test_a_twin_that_ends_while_it_is_given_time_to_register_was_not_spared(tmp_path):
    twin = ghost(tmp_path)
    run = train(tmp_path)
    wait_until(lambda: has_the_lock(run))
    time.sleep(0.5)  # it has looked by then, and waits for two seconds
    twin.kill()
    twin.wait()
    assert str(twin.pid) not in report_of(run)["spared"]
    run.finish()
    assert "spared" not in run.error_output


def has_the_lock(run: Script) -> bool:
    """Whether it has the lock, and so looks for ghosts."""
    return any(
        f'"pid": {run.pid},' in path.read_text()
        for path in Path(os.environ["ORCHARD_INFRA_DIR"]).glob("locks/*.lock")
    )


def test_a_twin_is_reported_and_spared_unless_killing_is_allowed(tmp_path):
    twin = ghost(tmp_path)
    run = train(tmp_path, kill=False)
    evidence, reason = report_of(run)["spared"][str(twin.pid)]
    assert evidence == "twin"
    assert "allow_process_kill" in reason
    run.finish()
    assert f"pid {twin.pid}" in run.error_output  # the user is warned
    assert is_running(twin.pid)


def test_a_dry_run_sends_no_signal(tmp_path):
    twin = ghost(tmp_path)
    report = report_of(train(tmp_path, sanitizer={"dry_run": True}))
    assert report["spared"][str(twin.pid)] == ["twin", "not stopped: dry run"]
    assert is_running(twin.pid)


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_JOB_ID": "7"},
        {"PBS_JOBID": "7"},
        {"LSB_JOBID": "7"},
        {"KUBERNETES_SERVICE_HOST": "x"},
    ],
    ids=lambda environ: next(iter(environ)),
)
def test_a_twin_is_spared_on_shared_compute(tmp_path, environ):
    twin = ghost(tmp_path, environ=environ)
    report = report_of(train(tmp_path, environ=environ))
    evidence, reason = report["spared"][str(twin.pid)]
    assert evidence == "twin"
    assert next(iter(environ)) in reason
    assert is_running(twin.pid)


@pytest.mark.parametrize("other", ["another element", "the same element"])
def test_another_element_of_the_same_array_of_jobs_is_no_relative(tmp_path, other):
    def element(job: str, task: str) -> dict[str, str]:
        return {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": task}

    beside = ghost(tmp_path, environ=element("8", "2" if other == "another element" else "1"))
    run = train(tmp_path, environ=element("7", "1"))
    evidence, reason = report_of(run)["spared"][str(beside.pid)]
    if other == "another element":
        assert (evidence, reason) == ("look-alike", "another element of the same array of jobs")
    else:  # of a job that was requeued, say
        assert evidence == "relative"
    run.finish()
    assert (f"pid {beside.pid}" in run.error_output) == (evidence == "relative")


def test_what_the_launcher_of_a_rank_has_started_is_neither_stopped_nor_named(tmp_path):
    """It may be another rank that has not come to its block yet."""
    rank = {"RANK": "0", "WORLD_SIZE": "2"}
    twin = ghost(tmp_path, environ=rank)
    report = report_of(train(tmp_path, environ=rank))
    assert all(str(twin.pid) not in findings for findings in report.values())
    assert is_running(twin.pid)


def test_a_relative_with_other_arguments_is_spared_with_a_warning(tmp_path):
    relative = ghost(tmp_path, "--lr", "1")
    run = train(tmp_path, "--lr", "2")
    assert report_of(run)["spared"][str(relative.pid)] == ["relative", "other arguments"]
    run.finish()
    assert f"pid {relative.pid}" in run.error_output
    assert is_running(relative.pid)


def test_match_script_stops_relatives_too(tmp_path):
    relative = ghost(tmp_path, "--lr", "1", environ={"SEED": "1"})
    report = report_of(train(tmp_path, "--lr", "2", sanitizer={"match": "script"}))
    assert str(relative.pid) in report["stopped"]
    relative.finish()


@pytest.mark.parametrize("variable", ["SEED", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED"])
def test_a_step_of_a_sweep_by_environment_that_is_slow_to_register_is_no_twin(tmp_path, variable):
    """``SEED=2 python sweep.py`` killed a slow ``SEED=1 python sweep.py``."""
    other = ghost(tmp_path, environ={variable: "1"})
    report = report_of(train(tmp_path, environ={variable: "2"}))
    assert report["spared"][str(other.pid)] == ["relative", f"other environment ({variable})"]
    assert is_running(other.pid)


@pytest.mark.parametrize("one", ["theirs", "mine"])
def test_a_variable_that_only_one_of_them_has_is_enough_to_be_no_twin(tmp_path, one):
    other = ghost(tmp_path, environ={"SEED": "1"} if one == "theirs" else None)
    report = report_of(train(tmp_path, environ={"SEED": "1"} if one == "mine" else None))
    assert report["spared"][str(other.pid)][0] == "relative"
    assert is_running(other.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real /proc")
@pytest.mark.parametrize("mine", ["2.yaml", None])
def test_a_process_that_reads_another_file_as_its_input_is_no_twin(tmp_path, mine):
    """``python sweep.py < 1.yaml`` is its own step of a sweep, too."""
    other = ghost(tmp_path, input="1.yaml")
    report = report_of(train(tmp_path, **({"input": mine} if mine else {})))
    assert report["spared"][str(other.pid)] == ["relative", "other standard input"]
    assert is_running(other.pid)
    assert str(other.pid) in report_of(train(tmp_path, input="1.yaml"))["stopped"]
    other.finish()


# Starts a ghost that reads a pipe, or a socket as with ssh and node, and ends as soon as it is
# there. The argument says what else is to be.
DISPATCHER = """
    import os, socket, subprocess, sys

    how = sys.argv[1].split()
    if "socket" in how:
        source, feeder = (end.detach() for end in socket.socketpair())
    else:
        source, feeder = os.pipe()
    if "unread" in how:
        os.write(feeder, b"lr: 1")
    worker = [sys.executable, os.path.abspath("train.py")]
    with subprocess.Popen(
        ["sh", "-c", '"$@"; true', "sh", *worker] if "shell" in how else worker,
        stdin=source,
        stdout=subprocess.PIPE,
        start_new_session="session" in how,
        pass_fds=[feeder] if "held" in how else [],
    ) as started:
        while started.stdout.readline() != b"ready\\n":
            pass
        os._exit(0)
"""

_MAY_BE_FED = "somebody may feed its standard input"
_MAY_BE_AWAITED = "the program that gave it its standard input may still run"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real /proc")
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_a_living_program_feeds_is_no_twin(tmp_path, kind):
    """The idle workers of one dispatcher look alike. And ``cat 1.yaml | python sweep.py`` has read
    all that there is, while the shell waits for it.
    """
    if kind == "pipe":
        source, feeder = os.pipe()
    else:
        source, feeder = (end.detach() for end in socket.socketpair())
    other = ghost(tmp_path, stdin=source)
    os.close(source)
    assert report_of(train(tmp_path))["spared"][str(other.pid)] == ["relative", _MAY_BE_FED]
    os.close(feeder)
    assert report_of(train(tmp_path))["spared"][str(other.pid)] == ["relative", _MAY_BE_AWAITED]
    assert is_running(other.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real /proc")
def test_a_process_whose_dispatcher_is_gone_is_a_twin_once_it_has_read_all(tmp_path):
    """A ghost is what an ssh without a terminal has left when it broke off."""
    ghosts = orphans(tmp_path, "pipe", "socket", "pipe shell")
    others = orphans(tmp_path, "pipe unread", "socket unread", "pipe held")
    report = report_of(train(tmp_path, sanitizer={"grace": 60}))
    assert set(report["stopped"]) >= ghosts
    for pid in others:
        assert report["spared"][pid] == ["relative", _MAY_BE_FED]
    assert all(is_running(int(pid)) for pid in others)


def orphans(tmp_path: Path, *kinds: str) -> set[str]:
    """The pids of ghosts whose dispatchers are gone."""
    before = _running(tmp_path)
    ghost(tmp_path).stop()  # writes train.py, and the plan
    # In sessions of their own, so that whoever adopts the ghosts is in another one.
    dispatchers = [
        run_python(tmp_path, DISPATCHER, how, name="dispatcher.py", start_new_session=True)
        for how in kinds
    ]
    for dispatcher in dispatchers:
        assert dispatcher.finish() == 0
    return _running(tmp_path) - before


def _running(tmp_path: Path) -> set[str]:
    """The pids of all processes that run train.py."""
    command = os.fsencode(sys.executable) + b"\0" + os.fsencode(tmp_path / "train.py") + b"\0"
    return {
        pid
        for pid in filter(str.isdigit, os.listdir("/proc"))
        if processes.read_cmdline(int(pid)) == command
    }


@needs_namespaces
@pytest.mark.parametrize("first", ["sh", "python"])
def test_only_an_init_is_known_to_adopt_the_command_of_an_ssh(tmp_path, first):
    """Such a command leads a session. Where the first process of a container is a program, it may
    have started that command itself.
    """
    ghost(tmp_path).stop()
    written(tmp_path / "dispatcher.py", DISPATCHER)
    (tmp_path / "looks.json").write_text('{"kill": false}')
    commands = '"$0" dispatcher.py session; mv looks.json plan.json; "$0" "$PWD/train.py"; true'
    init = ["sh", "-c", commands, sys.executable]
    if first == "python":
        init = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *init]
    namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    report = report_of(run_command(tmp_path, [*namespace, *init]))
    [(evidence, reason)] = report["spared"].values()
    if first == "sh":
        assert evidence == "twin"
    else:
        assert (evidence, reason) == ("relative", _MAY_BE_AWAITED)


def test_a_process_that_has_inherited_the_same_pipe_is_a_twin(tmp_path):
    """The steps of one CI job have one pipe as their input, and nobody reads it."""
    source, feeder = os.pipe()
    other = ghost(tmp_path, stdin=source)
    evidence, _ = report_of(train(tmp_path, stdin=source, kill=False))["spared"][str(other.pid)]
    os.close(source)
    os.close(feeder)
    assert evidence == "twin"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real /proc")
def test_a_process_that_reads_a_named_pipe_is_no_twin(tmp_path):
    """Nothing tells whether that has a writer, and another one may open it at any time."""
    os.mkfifo(tmp_path / "jobs")
    source = os.open(tmp_path / "jobs", os.O_RDONLY | os.O_NONBLOCK)
    other = ghost(tmp_path, stdin=source)
    os.close(source)
    assert report_of(train(tmp_path))["spared"][str(other.pid)] == ["relative", _MAY_BE_FED]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real /proc")
def test_a_step_of_a_matrix_of_interpreters_is_no_twin(tmp_path):
    """Two versions of Python or of a library are compared so, each in a virtual environment."""
    for name in ("old", "new"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
        for python in ("python", "python3"):
            (tmp_path / name / "bin" / python).symlink_to(sys.executable)
    ghost(tmp_path).stop()  # writes train.py, and the plan
    others = {
        words: run_command(tmp_path, [*words, str(tmp_path / "train.py")], stdin=subprocess.DEVNULL)
        for words in (
            (str(tmp_path / "old" / "bin" / "python"),),
            ("new/bin/python3",),
            (sys.executable, "-O"),
            (sys.executable,),
        )
    }
    for other in others.values():
        other.wait_for("ready")
    old, new, optimised, same = others.values()
    spared = report_of(train(tmp_path, kill=False))["spared"]
    assert spared[str(old.pid)] == ["relative", "other interpreter"]
    assert spared[str(new.pid)] == ["relative", "other interpreter"]
    assert spared[str(optimised.pid)] == ["relative", "other options of Python"]
    assert spared[str(same.pid)][0] == "twin"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real /proc")
def test_the_same_module_in_another_checkout_is_no_twin(tmp_path):
    """A program may have left the directory in which Python has found its module."""
    ghost(tmp_path).stop()  # writes train.py, and the plan

    def start(checkout: str) -> Script:
        source = "import os, runpy; os.chdir('..'); runpy.run_path('train.py', None, '__main__')"
        written(tmp_path / checkout / "sweep.py", source)
        return run_command(
            tmp_path,
            [sys.executable, "-m", "sweep"],
            env={"PWD": str(tmp_path / checkout)},
            cwd=tmp_path / checkout,
            stdin=subprocess.DEVNULL,
        )

    other, same = start("one"), start("two")
    other.wait_for("ready")
    same.wait_for("ready")
    (tmp_path / "plan.json").write_text('{"kill": false}')
    spared = report_of(start("two"))["spared"]
    assert spared[str(other.pid)] == ["relative", "started in another directory"]
    assert spared[str(same.pid)][0] == "twin"


def test_a_twin_whose_interpreter_was_typed_otherwise_is_a_twin(tmp_path):
    """As ``python train.py`` and ``/usr/bin/python3 train.py`` are."""
    ghost(tmp_path).stop()  # writes train.py, and the plan
    bin_directory, name = os.path.split(sys.executable)
    path = {"PATH": f"{bin_directory}:{os.environ['PATH']}"}
    other = run_command(
        tmp_path, [name, str(tmp_path / "train.py")], env=path, stdin=subprocess.DEVNULL
    )
    other.wait_for("ready")
    report = report_of(train(tmp_path, environ=path, kill=False))
    assert report["spared"][str(other.pid)][0] == "twin"


def test_a_twin_from_another_terminal_is_a_twin(tmp_path):
    here = {"SHLVL": "1", "TERM": "xterm", "SSH_TTY": "/dev/pts/1", "TMUX_PANE": "%1", "_": "/x"}
    there = {"SHLVL": "3", "TERM": "dumb", "WINDOWID": "7", "OLDPWD": "/"}
    twin = ghost(tmp_path, environ=here)
    report = report_of(train(tmp_path, environ=there))
    assert str(twin.pid) in report["stopped"]
    twin.finish()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real /proc")
def test_a_process_that_has_wiped_its_environment_is_no_twin(tmp_path):
    """What cannot be compared may be anything: a title that was changed, a process of a sweep."""
    other = ghost(tmp_path, wipe=True)
    report = report_of(train(tmp_path))
    assert report["spared"][str(other.pid)] == ["relative", "its environment cannot be read"]
    assert is_running(other.pid)


def test_an_unrelated_project_s_train_py_is_left_alone(tmp_path):
    """The re-imagined system resolves its relative name against its own directory, and kills."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "train.py").write_text(
        "print('ready', flush=True)\nimport signal\nsignal.pause()\n"
    )
    stranger = run_command(tmp_path, [sys.executable, "train.py"], cwd=elsewhere)
    stranger.wait_for("ready")
    ghost(tmp_path).stop()  # writes tmp_path/train.py
    (tmp_path / "plan.json").write_text("{}")
    run = run_command(tmp_path, [sys.executable, "train.py"], cwd=tmp_path)
    report = report_of(run)
    run.finish()
    assert all(str(stranger.pid) not in outcome for outcome in report.values())
    assert is_running(stranger.pid)


@pytest.mark.parametrize(
    "command",
    [
        ["tail", "-f", "train.py"],
        [
            "python",
            "-c",
            "import signal, sys; print('ready', flush=True); signal.pause()",
            "train.py",
        ],
        ["python", "other.py", "train.py"],
        ["python", "-i", "train.py"],
        ["python", "-m", "pdb", "train.py"],
    ],
    ids=lambda command: " ".join(command)[:20],
)
def test_who_only_mentions_the_script_is_nobody_s_twin(tmp_path, command):
    (tmp_path / "other.py").write_text(
        "import signal\nprint('ready', flush=True)\nsignal.pause()\n"
    )
    ghost(tmp_path).stop()  # writes train.py
    command = [sys.executable if word == "python" else word for word in command]
    bystander = run_command(tmp_path, command)
    if "-f" not in command and "pdb" not in command:
        bystander.wait_for("ready")  # as the plan of the ghost before says
    report = report_of(train(tmp_path))
    assert all(str(bystander.pid) not in outcome for outcome in report.values())
    assert is_running(bystander.pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_root_touches_no_other_user(tmp_path):
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(0o755)
    ghost(tmp_path).stop()
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")  # one he may run, too
    if python is None:
        pytest.skip("needs another user who can run Python: no python3 outside of our home")
    script = str(tmp_path / "train.py")
    other = run_command(tmp_path, [python, script], user=65534)
    other.wait_for("ready")
    report = report_of(train(tmp_path))
    assert all(str(other.pid) not in outcome for outcome in report.values())
    assert is_running(other.pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to unshare(1) mounts")
def test_what_sees_other_files_is_no_twin(tmp_path):
    """A service with PrivateTmp=yes has a registry of its own, so its live run is in none of ours.
    And the same path may lead to another script.
    """
    ghost(tmp_path).stop()
    argv = [sys.executable, str(tmp_path / "train.py")]
    service = run_command(tmp_path, ["unshare", "--mount", *argv])
    service.wait_for("ready")
    report = report_of(train(tmp_path))
    assert all(str(service.pid) not in outcome for outcome in report.values())
    assert is_running(service.pid)


def test_a_live_run_of_another_project_is_sacred_although_it_is_a_twin(tmp_path):
    first = train(tmp_path, project="one", stay=True)
    report_of(first)
    report = report_of(train(tmp_path, project="two"))
    evidence, reason = report["spared"][str(first.pid)]
    assert evidence == "look-alike"
    assert "running run of project one" in reason
    assert is_running(first.pid)


def test_a_live_run_whose_registry_was_removed_is_no_twin(tmp_path, runtime_directory):
    first = train(tmp_path, project="one", stay=True)
    report_of(first)
    shutil.rmtree(runtime_directory)
    runtime_directory.mkdir(mode=0o700)
    report = report_of(train(tmp_path, project="two"))
    evidence, reason = report["spared"][str(first.pid)]
    assert (evidence, reason) == ("look-alike", "belongs to a run that is not in this registry")
    assert is_running(first.pid)


AFTERWARDS = """
    import sys
    from pathlib import Path
    from orchard_infra import EnvironmentConfig, FileLock, InfrastructureManager
    from orchard_infra import managed_environment

    manager = InfrastructureManager(locker=FileLock(timeout=None))
    with managed_environment(EnvironmentConfig("digits", allow_process_kill=True), manager=manager):
        print("in", flush=True)
        sys.stdin.readline()
    print("after", flush=True)
    sys.stdin.readline()
    print("results written", flush=True)
"""


@pytest.mark.parametrize("waits", [True, False], ids=["waiting meanwhile", "started later"])
def test_a_run_that_has_left_its_block_and_goes_on_is_no_ghost(tmp_path, runtime_directory, waits):
    """It still writes its results: same command line, older, and in no live run any more."""
    keyboard, terminal = os.openpty()  # with a pipe as its input it would be nobody's twin
    first = run_python(tmp_path, AFTERWARDS, name="after.py", stdin=terminal)
    os.close(terminal)
    first.wait_for("in")
    if waits:
        second = run_python(tmp_path, AFTERWARDS, name="after.py")
        wait_until(lambda: len(list((runtime_directory / "runs").glob("*.run"))) == 2)
    os.write(keyboard, b"\n")
    first.wait_for("after")
    if not waits:
        second = run_python(tmp_path, AFTERWARDS, name="after.py")
    second.wait_for("in")
    assert is_running(first.pid)
    os.write(keyboard, b"\n")
    assert first.finish() == 0, first.transcript()
    os.close(keyboard)
    assert "results written" in first.output


@pytest.mark.slow
def test_a_run_that_starts_slowly_on_a_busy_machine_is_not_stopped_by_one_that_started_with_it(
    tmp_path,
):
    slow = train(tmp_path, starved=5.0)
    fast = train(tmp_path, stay=True)
    report_of(fast)
    wait_until(lambda: said_how_it_went(slow) or slow.poll() is not None)
    assert slow.finish() == 75, f"{slow.returncode}: {slow.transcript()}"  # it found the lock taken
    assert is_running(fast.pid)


def said_how_it_went(run: Script) -> bool:
    return "report" in run.output or "locked" in run.output


@pytest.mark.slow
def test_two_runs_that_start_together_do_not_shoot_each_other(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"stay": True}))
    source, feeder = os.pipe()  # the same for all: with one each they would be no twins
    for _ in range(3):
        runs = [run_python(tmp_path, TRAIN, name="train.py", stdin=source) for _ in range(3)]
        for run in runs:
            # Also when it was stopped by another one: then it ended without a word.
            wait_until(lambda run=run: said_how_it_went(run) or run.poll() is not None)
            assert said_how_it_went(run), f"{run.returncode}: {run.transcript()}"
        holders = [run for run in runs if "report" in run.output]
        assert len(holders) == 1
        for run in runs:
            if run is holders[0]:
                os.write(feeder, b"\n")
                assert run.finish() == 0
            else:
                assert run.finish() == 75, run.transcript()
    os.close(source)
    os.close(feeder)


def test_a_defunct_process_is_named_with_the_parent_that_should_reap_it(tmp_path):
    parent = run_python(
        tmp_path,
        """
        import os, signal, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "pass"])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        print("defunct", child.pid, flush=True)
        signal.pause()
        """,
        name="parent.py",
    )
    pid = parent.wait_for("defunct").split()[1]
    evidence, reason = report_of(train(tmp_path))["defunct"][pid]
    assert evidence == "defunct"
    assert str(parent.pid) in reason


def test_workers_of_one_pool_are_no_twins_of_each_other(tmp_path):
    pool = run_python(
        tmp_path,
        """
        import multiprocessing, os, time
        from orchard_infra import EnvironmentConfig, managed_environment

        def work(number, others):
            if number == 0:
                others.wait()
                with managed_environment(EnvironmentConfig("pool", allow_process_kill=True)) as env:
                    return len(env.report.sanitized.stopped)
            others.wait()
            time.sleep(0.3)
            return os.getpid()

        if __name__ == "__main__":
            context = multiprocessing.get_context("fork")
            with context.Manager() as manager, context.Pool(3) as workers:
                barrier = manager.Barrier(3)
                print("done", workers.starmap(work, [(n, barrier) for n in range(3)], chunksize=1))
        """,
        name="pool.py",
    )
    pool.wait_for("done [0, ")
    assert pool.finish() == 0


def test_a_ghost_s_tree_goes_with_it_except_what_has_a_session_of_its_own(tmp_path):
    twin = ghost(tmp_path, tree=True)
    below, detached = map(int, twin.wait_for("tree").split()[1:])
    report_of(train(tmp_path))
    wait_gone([twin.pid, below])
    assert is_running(detached)
