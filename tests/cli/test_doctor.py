"""`orchard-infra doctor`, on this machine, and on machines with something wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

from commands import COMMAND, OWN_SIZE, assert_documented, killed, orchard_infra, plant, train
from orchard_infra.cli.doctor.checks import CHECKS, OF_A_SERVER
from support import as_nobody, needs_another_user, require_module, run_command, run_python

# Importing the real one takes seconds, and says nothing of any check but its own.
QUICK_TORCH = """
    from types import SimpleNamespace
    __version__ = "9.9.9"
    version = SimpleNamespace(cuda=None, hip=None)
    class accelerator:
        current_accelerator = staticmethod(lambda: None)
"""


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A directory of modules that are found before all others."""
    directory = tmp_path / "modules"
    directory.mkdir()
    (directory / "torch.py").write_text(textwrap.dedent(QUICK_TORCH))
    return directory


@pytest.fixture
def examine(tmp_path, modules):
    """Make the checks that are named, or all; each by its name."""

    def run(*words: str, prefix: tuple[str, ...] = (), **environ: str | None) -> dict[str, Any]:
        script = orchard_infra(
            tmp_path,
            *("doctor", "--json", *words),
            expect=None,
            prefix=prefix,
            env={"PYTHONPATH": str(modules), **environ},
        )
        assert script.output, script.transcript()
        found = json.loads(script.output)
        assert script.returncode == (1 if found["status"] == "problem" else 0)
        return {check["name"]: check for check in found["checks"]}

    return run


@pytest.fixture
def judge(examine):
    """Make one check, by its name."""

    def run(name: str, *words: str, **options: Any) -> dict[str, Any]:
        found = examine(name, *words, **options)
        assert list(found) == [name]
        return found[name]

    return run


@pytest.fixture
def unshare(tmp_path, require_tool):
    """What runs a shell script, and then a command, in namespaces of its own; needs root."""

    def prefix(*options: str, first: str = ":") -> tuple[str, ...]:
        words = (require_tool("unshare"), *options)
        probe = run_command(tmp_path, [*words, "true"])
        if probe.finish() != 0:
            pytest.skip("needs a real root")
        return (*words, "sh", "-c", f'{first} && exec "$@"', "sh")

    return prefix


def test_the_json_is_what_the_documentation_says(tmp_path, modules):
    script = orchard_infra(
        tmp_path, "doctor", "--json", env={"PYTHONPATH": str(modules)}, expect=None
    )
    found = json.loads(script.output)
    assert_documented(found, "### The JSON of doctor")
    for check in found["checks"]:
        assert_documented(check, "#### Each of checks")
        assert check["status"] in ("ok", "warning", "problem")


def test_each_check_is_a_line_that_fits(tmp_path, modules):
    env = {"PYTHONPATH": str(modules), "COLUMNS": "80"}
    script = orchard_infra(tmp_path, "doctor", env=env, expect=None)
    lines = script.output.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for name in CHECKS.keys() - OF_A_SERVER.keys() - {"lock file"}:
        (line,) = [line for line in lines if line[9:27].rstrip() == name]
        assert line.split()[0] in ("ok", "warning", "problem")
    assert "\x1b" not in script.transcript()
    assert "checking" not in script.transcript()


def test_a_problem_exits_with_1_and_a_warning_does_not(tmp_path, modules, runtime_directory):
    env = {"PYTHONPATH": str(modules), "MASTER_PORT": "nonsense"}
    script = orchard_infra(tmp_path, "doctor", "MASTER_PORT", env=env, expect=1)
    assert "1 problem" in script.output.splitlines()[-1]
    killed(tmp_path, "digits", FORK="1")
    script = orchard_infra(tmp_path, "doctor", "runs", env={"PYTHONPATH": str(modules)})
    assert script.output.splitlines()[-1] == "1 warning."


def test_only_the_checks_that_are_named_are_made(tmp_path, examine):
    assert list(examine("signals", "flock")) == ["flock", "signals"]
    script = orchard_infra(tmp_path, "doctor", "heart", expect=2)
    assert "'heart' is not one of" in script.error_output


def test_in_a_terminal_there_is_colour_and_progress(modules, in_terminal):
    words = (COMMAND, "doctor", "lock directory", "flock")
    terminal = in_terminal(*words, env={"PYTHONPATH": str(modules), **OWN_SIZE})
    terminal.expect_exact("checking lock directory")
    terminal.expect_exact("\x1b[32mok")
    terminal.expect_exact("flock")
    assert terminal.wait() in (0, 1)


def test_nothing_is_left_behind(tmp_path, examine):
    directory = tmp_path / "not" / "yet"
    before = set(os.listdir("/dev/shm"))
    checks = examine("lock directory", "flock", ORCHARD_INFRA_DIR=str(directory))
    assert checks["lock directory"]["status"] == "ok"
    assert checks["flock"]["status"] == "ok"
    assert not (tmp_path / "not").exists()
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "doctor" in name]


def test_no_lock_of_a_run_is_taken(tmp_path, runtime_directory, examine):
    run = train(tmp_path, "digits")
    path = runtime_directory / "locks" / "digits.lock"
    before = path.stat(), path.read_bytes()
    checks = examine("flock", "lock file", "runs", "--lock-file", str(path))
    assert f"held by pid {run.pid}" in checks["lock file"]["text"]
    assert checks["lock file"]["status"] == "ok"
    assert checks["runs"]["text"] == "1 running"
    assert (path.stat().st_ino, path.read_bytes()) == (before[0].st_ino, before[1])


def test_flock_is_tried_between_two_processes_and_the_file_system_named(judge):
    text = judge("flock", "--lock-file", "/dev/shm/x.lock")["text"]
    assert text == "excludes between two processes on tmpfs, mounted at /dev/shm"


def test_an_overlay_is_named_as_such(tmp_path, unshare, judge):
    for name in ("lower", "merged"):
        (tmp_path / name).mkdir()
    mount = (
        f"mount -t tmpfs tmpfs {tmp_path}/lower && cd {tmp_path}/lower && mkdir a b w && "
        f"mount -t overlay -o lowerdir=a,upperdir=b,workdir=w overlay {tmp_path}/merged"
    )
    probe = run_command(tmp_path, [*unshare("--mount", first=mount), "true"])
    if probe.finish() != 0:
        pytest.skip("needs a real root")
    check = judge(
        "flock",
        *("--lock-file", f"{tmp_path}/merged/x.lock"),
        prefix=unshare("--mount", first=mount),
    )
    assert "on overlay, mounted at" in check["text"]


@pytest.mark.parametrize(
    ("flock", "said"),
    [
        ("return None", "does not exclude another process"),
        ("raise OSError(errno.ENOLCK, 'No locks available')", "has no working flock(2)"),
    ],
)
def test_a_file_system_without_real_locks_is_a_problem(modules, flock, said, judge):
    (modules / "sitecustomize.py").write_text(
        "import errno, fcntl, functools\n"
        f"def flock(fd, how):\n    {flock}\n"
        "fcntl.flock = functools.partial(flock)  # no method of the class that holds it\n"
    )
    check = judge("flock")
    assert check["status"] == "problem"
    assert said in check["text"]
    assert "another file system" in check["advice"]


MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:41 / /home rw,relatime - nfs4 srv:/home rw,vers=4.2,hard,local_lock=none
23 21 0:42 / /old rw,relatime - nfs srv:/old rw,vers=3,nolock,local_lock=all
24 21 0:43 / /scratch rw,relatime - lustre mds@tcp:/fs rw,flock
25 21 0:44 / /fast rw,relatime - lustre mds@tcp:/fs rw,localflock
26 21 0:45 / /my\\040data rw - fuse.sshfs me@there:/ rw
27 21 0:46 / /home/me/tmp rw - tmpfs tmpfs rw
torn line
"""


@pytest.mark.parametrize(
    ("path", "level", "words"),
    [
        ("/srv/x", "ok", "on ext4, mounted at /"),
        ("/home/me", "ok", "on nfs4, mounted at /home (local_lock=none, vers=4.2); between hosts"),
        ("/home/me/tmp", "ok", "on tmpfs, mounted at /home/me/tmp"),
        ("/homestead", "ok", "on ext4, mounted at /"),
        ("/old/x", "warning", "a run on another host does not see the lock"),
        ("/scratch/x", "ok", "on lustre, mounted at /scratch; between hosts as well"),
        ("/fast/x", "warning", "(localflock): a run on another host does not see the lock"),
        ("/my data/x", "ok", "on fuse.sshfs, mounted at /my data; whether other hosts see"),
    ],
)
def test_what_a_file_system_means_for_a_lock_is_told(path, level, words, judge):
    from orchard_infra.cli.doctor.file_systems import file_system_at

    found = file_system_at(Path(path), MOUNTS).judge()
    assert found[0].value == level
    assert words in found[1]


def test_a_directory_that_others_can_write_to_is_a_problem(tmp_path, judge):
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o777)
    check = judge("lock directory", ORCHARD_INFRA_DIR=str(directory))
    assert check["status"] == "problem"
    assert "chmod 700" in check["text"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o777


def test_a_lock_in_a_directory_that_others_can_write_to_is_a_warning(tmp_path, judge):
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o777)
    check = judge("lock directory", "--lock-file", str(directory / "x.lock"))
    assert check["status"] == "warning"
    assert check["advice"] == f"chmod go-w {directory}"
    directory.chmod(0o1777)
    check = judge("lock directory", "--lock-file", str(directory / "x.lock"))
    assert check["status"] == "ok"


def test_a_directory_that_is_a_file_is_a_problem(tmp_path, judge):
    (tmp_path / "file").write_text("")
    check = judge("lock directory", "--lock-file", str(tmp_path / "file" / "x.lock"))
    assert check["status"] == "problem"


LOCK_CHECKS = ("lock directory", "flock", "lock file")


def assert_no_lock_can_be_made(checks: dict[str, Any], reason: str) -> None:
    for name in LOCK_CHECKS:
        assert checks[name]["status"] == "problem", checks
        assert reason in checks[name]["text"], checks
        assert "another lock_file_path" in checks["lock file"]["advice"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real Linux")
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/proc/x.lock", "No such file or directory"),
        ("/proc/not/yet/x.lock", "No such file or directory"),
        ("/dev/full/x.lock", ""),
    ],
)
def test_where_the_system_makes_no_files_no_lock_can_be_made(examine, path, reason):
    assert_no_lock_can_be_made(examine(*LOCK_CHECKS, "--lock-file", path), reason)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a real Linux")
@pytest.mark.parametrize("path", ["/sys/x.lock", "/sys/kernel/x.lock"])
def test_where_the_kernel_refuses_files_no_lock_can_be_made(examine, path):
    checks = examine(*LOCK_CHECKS, "--lock-file", path)
    assert {checks[name]["status"] for name in LOCK_CHECKS} == {"problem"}
    assert "no lock can be made" in checks["lock file"]["text"]


@pytest.mark.parametrize(
    ("options", "fill", "reason"),
    [
        ("ro", ":", "Read-only file system"),
        # Files can be made there, and nothing can be written into them.
        ("size=64k", "head -c 1M /dev/zero > {0}/full 2> /dev/null; :", "No space left on device"),
        ("nr_inodes=1", ":", "No space left on device"),
    ],
)
def test_on_a_read_only_or_full_file_system_no_lock_can_be_made(
    tmp_path, examine, unshare, options, fill, reason
):
    mount = tmp_path / "mount"
    mount.mkdir()
    first = f"mount -t tmpfs -o {options} tmpfs {mount} && {{ {fill.format(mount)}; }}"
    checks = examine(
        *LOCK_CHECKS,
        *("--lock-file", str(mount / "x.lock")),
        prefix=unshare("--mount", first=first),
    )
    assert_no_lock_can_be_made(checks, reason)


@needs_another_user
def test_without_permission_no_lock_can_be_made(monkeypatch):
    # Not as a process of its own: another user may not be able to start this Python.
    from orchard_infra.cli.doctor.base import Setup
    from orchard_infra.cli.doctor.checks import examine

    directory = Path(tempfile.mkdtemp(prefix="oi-", dir="/tmp"))
    monkeypatch.setenv("ORCHARD_INFRA_DIR", str(directory / "runs"))
    try:
        directory.chmod(0o755)
        setup = Setup(directory / "x.lock", environ={})
        checks = as_nobody(lambda: [check() for _, check in examine(setup, LOCK_CHECKS)])
        assert [check.level.value for check in checks] == ["problem"] * 3, checks
        assert all("Permission denied" in check.text for check in checks)
        assert list(directory.iterdir()) == []
    finally:
        directory.rmdir()


def test_a_place_where_a_lock_can_be_made_is_left_as_it_was(tmp_path, examine):
    directory = tmp_path / "not" / "yet"
    checks = examine(*LOCK_CHECKS, "--lock-file", str(directory / "x.lock"))
    assert {checks[name]["status"] for name in LOCK_CHECKS} == {"ok"}
    assert "is free" in checks["lock file"]["text"]
    assert not (tmp_path / "not").exists()


def test_a_lock_file_that_cannot_be_opened_for_writing_is_a_problem(tmp_path, judge, unshare):
    mount = tmp_path / "mount"
    mount.mkdir()
    first = (
        f"mount -t tmpfs tmpfs {mount} && : > {mount}/x.lock && mount -o remount,ro tmpfs {mount}"
    )
    check = judge(
        "lock file",
        *("--lock-file", str(mount / "x.lock")),
        prefix=unshare("--mount", first=first),
    )
    assert check["status"] == "problem"
    assert "Read-only file system" in check["text"]


@pytest.mark.parametrize(
    "kind",
    ["a FIFO", "a symbolic link", "a directory", "no lock file", "its name does not end in .lock"],
)
def test_what_cannot_be_a_lock_file_is_a_problem_and_stays(tmp_path, kind, judge):
    path = tmp_path / ("seed.txt" if "name" in kind else "x.lock")
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a symbolic link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "a directory":
        path.mkdir()
    else:
        path.write_text("42" if "name" in kind else "epoch,loss\n1,0.5\n")
    check = judge("lock file", "--lock-file", str(path))
    assert check["status"] == "problem"
    assert kind in check["text"]
    assert path.exists() or path.is_symlink()


def test_a_lock_that_a_dead_run_left_is_a_warning(tmp_path, runtime_directory, judge):
    killed(tmp_path, "digits")
    check = judge("lock file", "--lock-file", str(runtime_directory / "locks" / "digits.lock"))
    assert check["status"] == "warning"
    assert "left by a run that is dead" in check["text"]


def test_a_wrong_lock_path_is_an_error_in_one_line(tmp_path):
    script = orchard_infra(tmp_path, "doctor", "--lock-file", "", expect=1)
    assert script.error_output.startswith("Error: --lock-file")
    assert len(script.error_output.splitlines()) == 1


@pytest.mark.parametrize(
    ("texts", "directory", "found"),
    [
        ({}, "/tmp/oi", None),
        ({"usr/lib/tmpfiles.d/tmp.conf": "q /tmp 1777 root root 10d"}, "/tmp/oi", ("/tmp", "10d")),
        ({"usr/lib/tmpfiles.d/tmp.conf": "D! /tmp 1777 root root -"}, "/tmp/oi", None),
        ({"usr/lib/tmpfiles.d/tmp.conf": "q /tmp 1777 root root 10d"}, "/home/me", None),
        ({"usr/lib/tmpfiles.d/tmp.conf": "# q /tmp 1777 root root 10d"}, "/tmp/oi", None),
        (
            {
                "usr/lib/tmpfiles.d/tmp.conf": "q /tmp 1777 root root 10d",
                "etc/tmpfiles.d/oi.conf": "x /tmp/oi*",
            },
            "/tmp/oi",
            None,
        ),
        (
            {
                "usr/lib/tmpfiles.d/tmp.conf": "q /tmp 1777 root root 10d",
                "etc/tmpfiles.d/tmp.conf": "q /tmp 1777 root root 3d",
            },
            "/tmp/oi",
            ("/tmp", "3d"),
        ),
        (
            {
                "usr/lib/tmpfiles.d/tmp.conf": "q /tmp 1777 root root 10d",
                "etc/tmpfiles.d/oi.conf": "d /tmp/oi 0700 me me -",
            },
            "/tmp/oi/locks",
            None,
        ),
        ({"etc/cron.daily/tmpreaper": ""}, "/tmp/oi", ("/tmp", "7d")),
        ({"etc/cron.daily/tmpwatch": ""}, "/var/tmp/oi", ("/var/tmp", "10d")),
        (
            {
                "etc/cron.daily/tmpreaper": "",
                "etc/tmpreaper.conf": "TMPREAPER_TIME=2d\nTMPREAPER_DIRS='/tmp/. /scratch/.'",
            },
            "/scratch/me",
            ("/scratch", "2d"),
        ),
        (
            {"etc/cron.daily/tmpreaper": "", "etc/tmpreaper.conf": "SHOWWARNING=true"},
            "/tmp/oi",
            None,
        ),
    ],
)
def test_a_cleaner_of_old_files_is_found_by_its_configuration(tmp_path, texts, directory, found):
    from orchard_infra.cli.doctor.tmp_cleaners import cleaner_that_reaches

    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    cleaner = cleaner_that_reaches(Path(directory), root=tmp_path)
    assert (cleaner and (cleaner.below, cleaner.age)) == found


def test_survivors_are_a_warning(tmp_path, judge):
    killed(tmp_path, "digits", FORK="1")
    check = judge("runs")
    assert check["status"] == "warning"
    assert check["text"] == "1 dead with live processes"
    assert check["advice"] == "orchard-infra clean"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "ghosts are stopped where a run allows it"),
        ({"SLURM_JOB_ID": "7"}, "this is a Slurm job (SLURM_JOB_ID=7): no process is ever killed"),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"},
            "rank 1 of a distributed job started by torchrun (RANK=1), rank 1 of 4: no process",
        ),
    ],
)
def test_whether_killing_is_off_is_told_with_the_reason(environ, said, judge):
    check = judge("launch", **environ)
    assert check["status"] == "ok"
    assert said in check["text"]


def test_a_rank_that_is_none_is_a_problem(judge):
    check = judge("launch", RANK="first", WORLD_SIZE="2")
    assert check["status"] == "problem"
    assert "RANK" in check["text"]


def test_as_the_first_process_of_a_container_it_says_that_nobody_reaps(examine, unshare):
    prefix = unshare("--pid", "--fork", "--mount-proc", "--kill-child")
    checks = examine("container", "orphans", prefix=prefix)
    assert checks["container"]["status"] == "warning"
    assert "PID 1" in checks["container"]["text"]
    assert "a pid namespace of its own" in checks["container"]["text"]
    # It adopts the orphan itself, and waits for no stranger.
    assert checks["orphans"]["status"] == "warning"
    assert "pid 1 (orchard-infra)" in checks["orphans"]["text"]
    assert "--init" in checks["orphans"]["advice"]


def test_under_a_shell_as_first_process_orphans_are_reaped(tmp_path, examine, unshare):
    prefix = unshare("--pid", "--fork", "--mount-proc", "--kill-child")
    # bash reaps whoever is given to it. The command must not be its last, which it would become.
    prefix = (*prefix[:-4], "bash", "-c", '"$@"; exit $?', "bash")
    checks = examine("container", "orphans", prefix=prefix)
    assert "a pid namespace of its own" in checks["container"]["text"]
    assert checks["container"]["status"] == "ok"
    assert checks["orphans"]["status"] == "ok"
    assert "adopted and reaped by pid 1 (bash)" in checks["orphans"]["text"]


def test_a_proc_of_another_namespace_is_a_problem(unshare, judge):
    check = judge("container", prefix=unshare("--pid", "--fork", "--kill-child"))
    assert check["status"] == "problem"
    assert "--mount-proc" in check["advice"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a real /dev/shm")
def test_who_maps_shared_memory_is_named(tmp_path, judge):
    holder = run_python(
        tmp_path,
        """
        import mmap, os, sys
        fd = os.open("/dev/shm/" + sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink("/dev/shm/" + sys.argv[1])
        os.ftruncate(fd, 300 * 2**20)
        kept = mmap.mmap(fd, 300 * 2**20)
        print("ready", flush=True)
        sys.stdin.read()
        """,
        f"orchard-infra-test-{os.urandom(6).hex()}",
        name="holder.py",
    )
    holder.wait_for("ready")
    assert f"pid {holder.pid} (300 MiB" in judge("shared memory")["text"]


def test_small_shared_memory_is_a_warning(unshare, judge):
    prefix = unshare("--mount", first="mount -t tmpfs -o size=64m tmpfs /dev/shm")
    check = judge("shared memory", prefix=prefix)
    assert check["status"] == "warning"
    assert "of 64.0 MiB in use" in check["text"]
    assert "--shm-size" in check["advice"]


def test_full_shared_memory_is_a_warning(unshare, judge):
    prefix = unshare(
        "--mount",
        first="mount -t tmpfs -o size=100m tmpfs /dev/shm && "
        "head -c 95M /dev/zero > /dev/shm/results",
    )
    check = judge("shared memory", prefix=prefix)
    assert check["status"] == "warning"
    assert "95.0 MiB of 100 MiB" in check["text"]


def test_shared_memory_that_cannot_be_written_to_is_a_problem(unshare, judge):
    prefix = unshare("--mount", first="mount -t tmpfs -o ro tmpfs /dev/shm")
    assert judge("shared memory", prefix=prefix)["status"] == "problem"


def test_the_real_torch_is_told_by_its_build(judge):
    require_module("torch")
    text = judge("torch", PYTHONPATH=None)["text"]
    version = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(m.version('torch'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert text.startswith(version)


def test_no_context_is_created_to_count_devices(modules, judge):
    (modules / "torch.py").write_text(
        textwrap.dedent(
            """
            from types import SimpleNamespace
            import os
            __version__ = "2.9.0"
            version = SimpleNamespace(cuda="12.8", hip=None)
            # With this torch asks the management library, and creates nothing.
            assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
            def forbidden(*arguments):
                raise SystemExit("this creates a context")
            cuda = SimpleNamespace(init=forbidden, current_device=forbidden, synchronize=forbidden,
                                   mem_get_info=forbidden, get_device_properties=forbidden)
            class accelerator:
                current_accelerator = staticmethod(lambda: SimpleNamespace(type="cuda"))
                device_count = staticmethod(lambda: 2)
            """
        )
    )
    assert judge("torch")["text"] == "2.9.0, built for CUDA 12.8, 2 cuda devices"


def test_a_torch_that_cannot_be_imported_is_a_problem(modules, judge):
    (modules / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    check = judge("torch")
    assert check["status"] == "problem"
    assert "libcudart.so.12: cannot open" in check["text"]


def test_a_lock_of_a_torch_extension_that_nobody_holds_is_a_problem(tmp_path, judge):
    lock = tmp_path / "extensions" / "py311_cu128" / "fused" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    check = judge("torch extensions", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert check["status"] == "problem"
    assert check["advice"].endswith(f"rm {lock}")
    assert lock.exists()


def test_an_extension_that_is_being_built_is_left_in_peace(tmp_path, judge):
    builder = run_python(
        tmp_path,
        """
        import os, sys
        os.makedirs("extensions/fused")
        os.open("extensions/fused/lock", os.O_CREAT | os.O_EXCL)  # as torch's FileBaton does
        print("ready", flush=True)
        sys.stdin.read()
        """,
    )
    builder.wait_for("ready")
    check = judge("torch extensions", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert check["status"] == "ok"
    assert f"pid {builder.pid}" in check["text"]


def test_who_has_the_master_port_is_named(tmp_path, judge):
    listener = run_python(
        tmp_path,
        """
        import socket, sys
        with socket.create_server(("", 0)) as server:
            print("port", server.getsockname()[1], flush=True)
            sys.stdin.read()
        """,
        name="listener.py",
    )
    port = listener.wait_for("port").split()[1]
    check = judge("MASTER_PORT", MASTER_PORT=port)
    assert check["status"] == "warning"
    assert f"MASTER_PORT={port} is taken by pid {listener.pid} (python" in check["text"]
    assert judge("MASTER_PORT", MASTER_PORT=port, MASTER_ADDR="elsewhere")["status"] == "ok"


def test_a_free_master_port_is_said_to_be_free(judge):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    assert judge("MASTER_PORT", MASTER_PORT=str(port))["text"] == f"MASTER_PORT={port} is free"


@pytest.mark.parametrize("port", ["nonsense", "70000", "-1"])
def test_a_master_port_that_is_none_is_a_problem(port, judge):
    check = judge("MASTER_PORT", MASTER_PORT=port)
    assert check["status"] == "problem"
    assert port in check["text"]


def behind(*statements: str) -> tuple[str, ...]:
    """What starts a command with signals as some parent left them."""
    code = f"import os, signal, sys; {'; '.join(statements)}; os.execvp(sys.argv[1], sys.argv[1:])"
    return (sys.executable, "-c", code)


def test_a_handler_can_be_installed(judge):
    check = judge("signals")
    assert check["status"] == "ok"
    assert check["text"] == "a handler can be installed and sees SIGTERM"


def test_signals_that_are_ignored_or_blocked_from_the_start_are_a_problem(judge):
    ignored = judge("signals", prefix=behind("signal.signal(signal.SIGTERM, signal.SIG_IGN)"))
    assert ignored["status"] == "problem"
    assert "SIGTERM ignored" in ignored["text"]
    blocked = judge(
        "signals", prefix=behind("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])")
    )
    assert blocked["status"] == "problem"
    assert "SIGTERM blocked" in blocked["text"]


def test_what_nohup_and_the_background_ignore_is_only_told(judge):
    check = judge(
        "signals",
        prefix=behind(
            "signal.signal(signal.SIGHUP, signal.SIG_IGN)",
            "signal.signal(signal.SIGINT, signal.SIG_IGN)",
        ),
    )
    assert check["status"] == "ok"
    assert "SIGHUP is ignored (nohup)" in check["text"]
    assert "SIGINT is ignored" in check["text"]


def test_a_handler_that_is_there_from_the_start_is_a_warning(modules, judge):
    (modules / "sitecustomize.py").write_text(
        "import signal\ndef monitor(*_): pass\nsignal.signal(signal.SIGTERM, monitor)\n"
    )
    check = judge("signals")
    assert check["status"] == "warning"
    assert "monitor" in check["text"]


def test_a_hostile_record_or_path_cannot_act_on_the_terminal(tmp_path, modules, runtime_directory):
    evil = "evil\x1b[2J\x07[red]"
    directory = tmp_path / evil
    directory.mkdir()
    plant(runtime_directory, project=evil)
    script = orchard_infra(
        tmp_path,
        *("doctor", "runs", "lock directory", "--lock-file", str(directory / "x.lock")),
        env={"PYTHONPATH": str(modules)},
        expect=None,
    )
    assert "\x1b" not in script.transcript()
    assert "\x07" not in script.transcript()
    assert r"evil\x1b[2J" in script.output


def test_ctrl_c_ends_it(tmp_path, modules):
    (modules / "torch.py").write_text("import time\nprint('x', flush=True)\ntime.sleep(600)\n")
    script = run_command(
        tmp_path, [COMMAND, "doctor", "launch", "torch"], env={"PYTHONPATH": str(modules)}
    )
    script.wait_for("launch")
    script.send_signal(signal.SIGINT)
    assert script.finish() == 1
    assert "Traceback" not in script.error_output
