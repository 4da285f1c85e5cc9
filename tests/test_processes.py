"""What a process is, read off real ones."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity
from support import (
    Script,
    needs_another_user,
    needs_namespaces,
    run_command,
    run_python,
    wait_gone,
    wait_until,
)

ME = os.getpid()

WAITS = """
    import sys
    print("ready", flush=True)
    sys.stdin.readline()
"""


def waiting(tmp_path: Path, *arguments: str, **options: object) -> Script:
    script = run_python(tmp_path, WAITS, *arguments, **options)  # type: ignore[arg-type]
    script.wait_for("ready")
    return script


@contextmanager
def zombie() -> Iterator[int]:
    """A child that is dead and not reaped."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        yield pid
    finally:
        os.waitpid(pid, 0)


# Identity


def test_a_process_keeps_its_identity_and_no_other_has_it(tmp_path):
    script = waiting(tmp_path)
    identity = processes.identity_of(script.pid)
    assert identity is not None
    assert identity == processes.identity_of(script.pid)
    assert identity != processes.identity_of(ME)
    assert processes.is_alive(identity)
    script.kill()
    script.wait()
    assert not processes.is_alive(identity)
    assert processes.identity_of(script.pid) is None


def test_an_identity_with_another_create_time_is_another_process():
    mine = processes.identity_of(ME)
    assert not processes.is_alive(ProcessIdentity(ME, mine.create_time + 0.01))
    assert not processes.is_alive(ProcessIdentity(ME, 0.0))


@needs_namespaces
def test_a_pid_that_is_used_again_is_another_identity(tmp_path):
    """For real: in a pid namespace of its own a process may say which pid comes next."""
    source = """
        import os, time
        from orchard_infra.system import processes

        def child():
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(write)
                os.read(read, 1)
                os._exit(0)
            os.close(read)
            return pid, write

        pid, end = child()
        first = processes.identity_of(pid)
        os.close(end)
        os.waitpid(pid, 0)
        while processes.now() <= first.create_time:
            time.sleep(0.001)
        with open("/proc/sys/kernel/ns_last_pid", "w") as last:
            last.write(str(pid - 1))
        again, end = child()
        second = processes.identity_of(again)
        assert again == pid, (again, pid)
        print("alive:", processes.is_alive(first), processes.is_alive(second))
        os.close(end)
        os.waitpid(again, 0)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(source))
    command = ["unshare", "-fp", "--mount-proc", sys.executable, str(tmp_path / "script.py")]
    script = run_command(tmp_path, command)
    assert script.wait_for("alive:") == "alive: False True"


def test_a_zombie_has_an_identity_and_is_not_alive():
    with zombie() as pid:
        identity = processes.identity_of(pid)
        assert identity is not None
        stat = processes.read_stat(pid)
        assert stat.state == "Z"
        assert stat.ppid == ME
        assert processes.is_defunct(stat)
        assert not processes.is_alive(identity)
        assert processes.read_cmdline(pid) == b""


def test_a_process_whose_first_thread_has_ended_is_alive(tmp_path):
    source = """
        import ctypes, os, sys, threading

        def work():
            print("working", flush=True)
            sys.stdin.readline()
            os._exit(0)

        threading.Thread(target=work).start()
        ctypes.CDLL(None).syscall(%d, 0)  # exit(2) ends this thread alone
    """
    number = {"x86_64": 60, "aarch64": 93}.get(os.uname().machine)
    if number is None:
        pytest.skip("needs a real x86-64 or ARM64 Linux, for the number of a system call")
    script = run_python(tmp_path, source % number)
    script.wait_for("working")
    wait_until(lambda: processes.read_stat(script.pid).state == "Z")
    identity = processes.identity_of(script.pid)
    assert processes.is_alive(identity)
    assert script.pid in processes.descendants([ME])
    script.tell()
    script.finish()
    assert not processes.is_alive(identity)


@pytest.mark.parametrize(
    "name", ["a b", "x) Z 1 (", ")", "((", "Z) Z 1 1 1", "a\nb", "\xff\xfe", "\x1b[2J", ""]
)
def test_a_name_like_no_other_confuses_nothing(tmp_path, name):
    source = """
        import os, sys
        with open("/proc/self/comm", "wb") as comm:
            comm.write(os.fsencode(sys.argv[1]) or b"\\0")
        print("ready", flush=True)
        sys.stdin.readline()
    """
    script = run_python(tmp_path, source, name)
    script.wait_for("ready")
    stat = processes.read_stat(script.pid)
    assert (stat.ppid, stat.state) in ((ME, "S"), (ME, "R"))
    assert stat.threads == 1
    assert stat.create_time == processes.identity_of(script.pid).create_time > 1
    assert processes.is_alive(processes.identity_of(script.pid))
    if name.isascii() and name.isprintable():
        assert stat.name == name


def test_create_times_are_on_the_clock_of_now(tmp_path):
    before = processes.now()
    script = waiting(tmp_path)
    created = processes.identity_of(script.pid).create_time
    assert before <= created <= processes.now() < before + 60


def test_a_clock_that_is_set_moves_no_create_time():
    """The kernel's own field, and nothing that is derived from the time of day."""
    ticks = int(Path(f"/proc/{ME}/stat").read_text().rpartition(")")[2].split()[19])
    assert processes.identity_of(ME).create_time == ticks / os.sysconf("SC_CLK_TCK")


# Family

TREE = """
    import os, subprocess, sys
    level = int(sys.argv[1])
    print("level", level, os.getpid(), flush=True)
    if level:
        subprocess.run([sys.executable, __file__, str(level - 1)])
    sys.stdin.readline()
"""


def tree(tmp_path: Path) -> list[int]:
    script = run_python(tmp_path, TREE, "2")
    script.wait_for("level 0")
    return [int(script.wait_for(f"level {level}").split()[2]) for level in (2, 1, 0)]


def test_a_tree_is_seen_from_above_and_from_below(tmp_path):
    top, middle, leaf = tree(tmp_path)
    found = processes.descendants([top])
    assert set(found) == {middle, leaf}
    assert all(identity == processes.identity_of(pid) for pid, identity in found.items())
    assert processes.children_of(top) == {middle}
    assert processes.children_of(middle) == {leaf}
    assert processes.children_of(leaf) == set()
    assert list(processes.ancestors(leaf))[:3] == [middle, top, ME]
    assert list(processes.ancestors(leaf))[-1] == 1
    assert {middle, leaf} <= set(processes.descendants([ME]))
    assert processes.descendants([leaf]) == {}
    assert list(processes.ancestors(1)) == []


def test_an_orphan_leaves_the_family_and_keeps_its_own(tmp_path):
    top, middle, leaf = tree(tmp_path)
    os.kill(middle, 9)
    wait_gone([middle])
    assert leaf not in processes.descendants([top])
    assert top not in list(processes.ancestors(leaf))
    assert processes.read_stat(leaf).ppid not in (middle, top)
    assert processes.identity_of(leaf) in processes.descendants([1]).values()


def test_the_dead_are_no_descendants():
    with zombie() as pid:
        assert pid not in processes.descendants([ME])
        assert pid in processes.children_of(ME)


def test_a_child_that_a_thread_has_started_is_a_child(tmp_path):
    source = """
        import os, subprocess, sys, threading
        started = []
        stay = threading.Event()

        def start():
            started.append(subprocess.Popen(["sleep", "100"]))
            print("started", started[0].pid, flush=True)
            stay.wait()

        threading.Thread(target=start, daemon=True).start()
        sys.stdin.readline()
    """
    script = run_python(tmp_path, source)
    child = int(script.wait_for("started").split()[1])
    assert processes.children_of(script.pid) == {child}
    assert set(processes.descendants([script.pid])) == {child}


def test_none_of_very_many_children_is_missed(tmp_path):
    """The kernel hands out such a list in pieces of less than a page each."""
    source = """
        import os, sys
        read, write = os.pipe()
        for _ in range(900):
            if os.fork() == 0:
                os.close(write)
                os.read(read, 1)  # until the parent ends
                os._exit(0)
        print("all there", flush=True)
        sys.stdin.readline()
    """
    script = run_python(tmp_path, source)
    script.wait_for("all there")
    assert len(processes.children_of(script.pid)) == 900
    assert len(processes.descendants([script.pid])) == 900


def test_children_are_found_without_the_kernel_s_list_too(tmp_path, monkeypatch):
    top, middle, _ = tree(tmp_path)
    really = processes._read
    monkeypatch.setattr(
        processes, "_read", lambda path: None if path.endswith("children") else really(path)
    )
    assert processes.children_of(top) == {middle}


def test_whether_this_process_has_children_is_known_without_a_look_at_proc(tmp_path):
    source = """
        import os, signal
        from orchard_infra.system import processes

        def look():
            return processes.has_children(), processes.has_live_child()

        print("none", *look())
        child = os.fork()
        if child == 0:
            signal.pause()
        print("live", *look())
        os.kill(child, 9)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        print("defunct", *look())
        os.waitpid(child, 0)
        print("reaped", *look())
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        if os.fork() == 0:
            signal.pause()
        print("ignored", *look(), flush=True)
        os.closerange(0, 3)
        os._exit(0 if look() == (True, True) else 1)
    """
    script = run_python(tmp_path, source)
    assert script.finish() == 0
    assert script.output.splitlines() == [
        "none False False",
        "live True True",
        "defunct True False",
        "reaped False False",
        "ignored True True",
    ]


def test_a_tree_is_also_seen_by_the_kernel_s_lists_of_children(tmp_path):
    top, middle, leaf = tree(tmp_path)
    assert processes.tree(top) == processes.descendants([top])
    assert set(processes.tree(top)) == {middle, leaf}
    assert processes.tree(leaf) == {}
    with zombie() as pid:
        assert pid not in processes.tree(ME)


def test_a_session_of_its_own_is_seen(tmp_path):
    own = waiting(tmp_path)
    other = waiting(tmp_path, start_new_session=True)
    assert processes.session_of(own.pid) == os.getsid(0)
    assert processes.session_of(other.pid) == other.pid
    table = processes.table()
    assert table[own.pid] == (ME, processes.identity_of(own.pid).create_time, os.getsid(0))
    assert table[other.pid].session == other.pid
    assert processes.session_of(2**31 - 1) is None


def test_a_forked_child_knows_who_it_is(tmp_path):
    """What a process knows of itself is looked up once, and a fork is another process."""
    source = """
        import os
        from orchard_infra.system import processes
        known = processes.own_identity(), processes.own_pid_namespace()
        if os.fork() == 0:
            assert processes.own_identity() == processes.identity_of(os.getpid()) != known[0]
            os._exit(0)
        _, status = os.wait()
        print("child", status, known[0] == processes.own_identity(), flush=True)
    """
    assert run_python(tmp_path, source).wait_for("child") == "child 0 True"


def test_a_process_is_gone_on_proof_alone(tmp_path):
    script = waiting(tmp_path)
    identity = processes.identity_of(script.pid)
    assert not processes.is_gone(identity)
    assert processes.is_gone(ProcessIdentity(script.pid, identity.create_time + 0.01))
    script.kill()
    wait_until(lambda: processes.is_gone(identity))  # not reaped yet
    script.wait()
    assert processes.is_gone(identity)


def test_without_a_free_descriptor_nobody_is_taken_for_gone(tmp_path):
    source = """
        import os, resource
        from orchard_infra.system import processes
        parent = processes.identity_of(os.getppid())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        seen = processes.is_alive(parent), processes.is_gone(parent)
        print("alive, gone:", *seen, flush=True)
    """
    assert run_python(tmp_path, source).wait_for("gone:") == "alive, gone: False False"


# What a process was started with


def test_a_large_command_line_is_read_whole(tmp_path):
    words = ["x" * 100_000, "", "y" * 5000, "\udcff\udcfe", "naïve", "\x1b[2J\n", *["z"] * 2000, ""]
    script = waiting(tmp_path, *words)
    raw = processes.read_cmdline(script.pid)
    assert len(raw) > 100_000
    assert list(processes.split_cmdline(raw)[2:]) == words


@pytest.mark.parametrize("size", [2000, 2048, 4095, 4096, 4097, 65535, 65536, 65537, 120_000])
def test_a_command_line_of_any_length_is_read_whole(tmp_path, size):
    script = run_command(tmp_path, ["sleep", "1000", "0" * size])
    wait_until(lambda: processes.read_cmdline(script.pid).startswith(b"sleep"))
    assert processes.read_cmdline(script.pid) == b"sleep\x001000\0" + b"0" * size + b"\0"


def test_an_empty_command_line_has_no_words_and_empty_words_count():
    assert processes.split_cmdline(b"") == ()
    assert processes.split_cmdline(b"a\0\0b\0\0") == ("a", "", "b", "")
    assert processes.split_cmdline(b"a") == ("a",)


def test_a_large_environment_is_read_whole(tmp_path):
    values = {
        "BIG": "x" * 100_000,
        "EQUALS": "a=b=c",
        "EMPTY": "",
        "RAW": "\udcff",
        "LINES": "a\nBIG=no",
        **{f"V{i}": "y" * 100 for i in range(500)},
    }
    script = waiting(tmp_path, env=values)
    environ = processes.read_environ(script.pid)
    assert {name: environ[name] for name in values} == values
    assert processes.started_with(script.pid, "V499", {"y" * 100}) == "y" * 100


@pytest.mark.parametrize(
    ("value", "found"),
    [("abc", "abc"), ("abcd", None), ("ab", None), ("xabc", None), ("", None), (None, None)],
)
def test_a_process_was_started_with_exactly_this_value_or_not(tmp_path, value, found):
    neighbours = {"RUN_ID_OLD": "abc", "XRUN_ID": "abc", "OTHER": "RUN_ID=abc"}
    script = waiting(tmp_path, env={"RUN_ID": value, **neighbours})
    assert processes.started_with(script.pid, "RUN_ID", {"abc", "other"}) == found
    assert processes.started_with(script.pid, "RUN_ID", {"abc": 1}) == found
    assert processes.started_with(script.pid, "RUN_ID", ()) is None


def test_what_a_process_puts_into_its_environment_later_shows_in_what_it_executes(tmp_path):
    source = """
        import os, subprocess, sys
        os.environ["RUN_ID"] = "abc"
        forked = os.fork()
        if forked == 0:
            sys.stdin.readline()
            os._exit(0)
        executed = subprocess.Popen(["sleep", "1000"])
        print("started", forked, executed.pid, flush=True)
        sys.stdin.readline()
    """
    script = run_python(tmp_path, source)
    forked, executed = map(int, script.wait_for("started").split()[1:])
    found = {
        pid: processes.started_with(pid, "RUN_ID", {"abc"})
        for pid in (script.pid, forked, executed)
    }
    assert found == {script.pid: None, forked: None, executed: "abc"}


def test_the_working_directory_is_known_until_it_is_removed(tmp_path):
    (tmp_path / "here").mkdir()
    script = waiting(tmp_path, cwd=tmp_path / "here")
    assert processes.read_cwd(script.pid) == str(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert processes.read_cwd(script.pid) is None


# Whose it is, and where


def test_our_own_processes_are_ours():
    assert processes.owner_of(ME) == os.geteuid()
    assert processes.read_uids(ME) == (os.getuid(), os.geteuid())
    assert ME in processes.all_pids()


@needs_another_user
def test_a_process_of_another_user_is_his_even_if_root_looks():
    child = subprocess.Popen(["sleep", "1000"], user=65534)
    assert processes.owner_of(child.pid) == 65534
    assert processes.read_uids(child.pid) == (65534, 65534)
    child.kill()
    child.wait()


@needs_another_user
def test_real_and_effective_user_are_told_apart(tmp_path):
    source = """
        import os, sys
        os.setresuid(65534, 0, 0)
        print("ready", flush=True)
        sys.stdin.readline()
    """
    script = run_python(tmp_path, source)
    script.wait_for("ready")
    assert processes.read_uids(script.pid) == (65534, 0)


@needs_namespaces
def test_a_pid_namespace_of_its_own_is_told_from_ours(tmp_path):
    source = """
        import os
        from orchard_infra.system import processes
        print("inside", os.getpid(), processes.pid_namespace(), processes.all_pids(), flush=True)
        input()
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(source))
    command = ["unshare", "-fp", "--mount-proc", sys.executable, str(tmp_path / "script.py")]
    script = run_command(tmp_path, command)
    _, pid, namespace, *seen = script.wait_for("inside").split()
    assert (pid, seen) == ("1", ["[1]"])
    assert int(namespace) not in (0, processes.pid_namespace())
    [inner] = processes.children_of(script.pid)
    assert processes.pid_namespace(inner) == int(namespace)
    assert processes.pid_namespace(ME) == processes.pid_namespace() != 0


@needs_namespaces
def test_our_own_pid_namespace_is_unknown_when_proc_shows_another_one(tmp_path):
    """There /proc/1 is somebody else, and a signal to a number from /proc hits a stranger."""
    source = (
        "import os; from orchard_infra.system import processes as p\n"
        "print(os.getpid(), p.pid_namespace(), p.own_pid_namespace())"
    )
    (tmp_path / "script.py").write_text(source)
    script = run_command(tmp_path, ["unshare", "-fp", sys.executable, str(tmp_path / "script.py")])
    script.finish()
    assert script.output == "1 0 0\n"


def test_an_unknown_pid_namespace_is_not_ours(monkeypatch):
    ours = processes.pid_namespace()
    assert processes.is_own_pid_namespace(ours)
    assert not processes.is_own_pid_namespace(ours + 1)
    assert not processes.is_own_pid_namespace(0)
    monkeypatch.setattr(processes, "own_pid_namespace", lambda: 0)
    assert not processes.is_own_pid_namespace(0)
    monkeypatch.setattr(processes, "_LINUX", False)  # there all of them are 0
    assert processes.is_own_pid_namespace(0)


def test_the_boot_has_a_name():
    assert processes.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


# Open files


def identity(fd: int) -> tuple[int, int]:
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


def test_an_open_file_is_found_also_when_its_name_is_gone(tmp_path):
    (tmp_path / "x").touch()
    (tmp_path / "y").touch()
    source = """
        import sys
        file = open("x")
        print("opened", flush=True)
        sys.stdin.readline()
    """
    with open(tmp_path / "x") as x, open(tmp_path / "y") as y:
        script = run_python(tmp_path, source)
        script.wait_for("opened")
        opened, other = identity(x.fileno()), identity(y.fileno())
        (tmp_path / "x").unlink()
        assert processes.has_open(script.pid, frozenset([opened, other])) == opened
        assert processes.has_open(script.pid, frozenset([other])) is None
        assert processes.has_open(script.pid, frozenset()) is None
        assert processes.has_open(ME, frozenset([other])) == other


def test_a_descriptor_that_is_closed_meanwhile_hides_no_other(tmp_path, monkeypatch):
    really = os.stat

    def look(path: str) -> os.stat_result:
        return really("/nonexistent" if path.endswith("fd/0") else path)

    with open(tmp_path / "x", "w") as x:
        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", look)
            found = processes.has_open(ME, frozenset([identity(x.fileno())]))
        assert found == identity(x.fileno())


LOCKS_AND_FORKS = """
    import fcntl, os, sys
    file = open("x", "r+")
    fcntl.flock(file, fcntl.LOCK_EX)
    child = os.fork()
    if child == 0:
        sys.stdin.readline()
        os._exit(0)
    print("forked", child, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("leader_is", ["alive", "dead"])
@pytest.mark.parametrize("name_is", ["there", "gone"])
def test_a_forked_child_has_inherited_what_its_parent_locked_and_a_reader_has_not(
    tmp_path, leader_is, name_is
):
    (tmp_path / "x").touch()
    script = run_python(tmp_path, LOCKS_AND_FORKS)
    child = int(script.wait_for("forked").split()[1])
    with open(tmp_path / "x", "r+") as x:
        reader = run_command(tmp_path, ["tail", "-f", "x"])
        files = {identity(x.fileno()): script.pid}
        wait_until(lambda: processes.has_open(reader.pid, frozenset(files)))
        if leader_is == "dead":
            script.kill()
            script.wait()
        if name_is == "gone":
            (tmp_path / "x").unlink()
        assert processes.has_inherited(child, files) == identity(x.fileno())
        assert processes.has_inherited(reader.pid, files) is None
        assert processes.has_inherited(ME, files) is None
        assert processes.has_inherited(child, {}) is None
        assert processes.has_inherited(child, dict.fromkeys(files, ME)) is None


def test_a_lock_that_somebody_else_has_taken_or_that_is_shared_is_not_inherited(tmp_path):
    (tmp_path / "x").touch()
    with open(tmp_path / "x", "r+") as x:
        files = {identity(x.fileno()): 1}
        fcntl.flock(x, fcntl.LOCK_EX)
        assert processes.has_inherited(ME, files) is None
        assert processes.has_inherited(ME, dict.fromkeys(files, ME)) is not None
        fcntl.flock(x, fcntl.LOCK_SH)
        assert processes.has_inherited(ME, dict.fromkeys(files, ME)) is None


def test_who_locked_a_file_is_told_from_whom_it_forked(tmp_path):
    (tmp_path / "x").touch()
    source = LOCKS_AND_FORKS.replace("LOCK_EX", "LOCK_SH")
    script = run_python(tmp_path, source)
    child = int(script.wait_for("forked").split()[1])
    with open(tmp_path / "x", "r+") as x:
        fcntl.flock(x, fcntl.LOCK_SH)
        file = identity(x.fileno())
        assert processes.has_locked(script.pid, file)
        assert processes.has_locked(ME, file)
        assert not processes.has_locked(child, file)
        assert not processes.has_locked(script.pid, (0, 0))


def test_an_inherited_file_must_have_its_name_where_that_is_known(tmp_path):
    """The number of an inode goes to a new file as soon as the old one is removed."""
    (tmp_path / "x").touch()
    with open(tmp_path / "x", "r+") as x:
        fcntl.flock(x, fcntl.LOCK_EX)
        file = identity(x.fileno())
        (tmp_path / "x").unlink()
        assert processes.has_inherited(ME, {file: ME}, names={file: "x"}) == file
        assert processes.has_inherited(ME, {file: ME}, names={file: "y"}) is None


@needs_namespaces
def test_who_has_a_compute_device_open_holds_an_accelerator_and_a_monitor_does_not(tmp_path):
    """On a /dev of its own, with plain files of these names."""
    source = """
        import os, subprocess
        from orchard_infra.system import processes
        subprocess.run(["mount", "-t", "tmpfs", "none", "/dev"], check=True)
        for directory in ("accel", "dri"):
            os.mkdir(f"/dev/{directory}")
        for name in (
            "nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "kfd",
            "accel/accel0", "accel/accel_controlD0", "accel1", "davinci0", "davinci_manager",
            "dri/renderD128", "dri/card0",
        ):
            with open(f"/dev/{name}", "w"):
                print(name, processes.holds_accelerator(os.getpid()), flush=True)
        print("end", processes.holds_accelerator(os.getpid()), flush=True)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(source))
    command = ["unshare", "-m", sys.executable, str(tmp_path / "script.py")]
    script = run_command(tmp_path, command)
    script.wait_for("end")
    found = dict(line.rsplit(" ", 1) for line in script.output.splitlines())
    assert [name for name, held in found.items() if held == "True"] == [
        *("nvidia-uvm", "kfd", "accel/accel0", "accel1", "davinci0")
    ]
    assert not processes.holds_accelerator(2**31 - 1)


# Nobody


@pytest.mark.parametrize("pid", [None, 0, 2**31 - 1, 2**62])
def test_of_a_process_that_is_gone_nothing_is_known_and_nothing_raised(pid):
    if pid is None:
        with zombie() as pid:
            pass
    assert processes.read_stat(pid) is None
    assert processes.identity_of(pid) is None
    assert not processes.is_alive(ProcessIdentity(pid, 1.0))
    assert processes.read_cmdline(pid) == b""
    assert processes.read_environ(pid) is None
    assert processes.raw_environ(pid) is None
    assert processes.started_with(pid, "X", {"x"}) is None
    assert processes.read_cwd(pid) is None
    assert processes.owner_of(pid) is None
    assert processes.read_uids(pid) is None
    assert processes.pid_namespace(pid) == 0
    assert list(processes.ancestors(pid)) == []
    assert processes.children_of(pid) == set() or pid == 0
    assert processes.has_open(pid, frozenset([(0, 0)])) is None
    assert processes.has_inherited(pid, {(0, 0): 1}) is None
    assert processes.descendants([pid]) == {} or pid == 0


def test_processes_that_come_and_go_meanwhile_disturb_nobody(tmp_path):
    source = """
        import os
        print("churning", flush=True)
        while True:
            children = []
            for _ in range(8):
                pid = os.fork()
                if pid == 0:
                    os._exit(0)  # at once: its own children would be orphans, reaped by nobody
                children.append(pid)
            for child in children:
                os.waitpid(child, 0)
    """
    script = run_python(tmp_path, source)
    script.wait_for("churning")
    deadline = time.monotonic() + 1.0
    looks = 0
    while time.monotonic() < deadline:
        for pid in processes.all_pids():
            processes.read_cmdline(pid)
            processes.read_environ(pid)
            processes.read_cwd(pid)
            processes.has_inherited(pid, {(0, 0): 1})
            list(processes.ancestors(pid))
        processes.children_of(script.pid)
        processes.descendants([ME])
        looks += 1
    assert looks
    assert script.poll() is None


# Every other platform


@pytest.fixture
def elsewhere(monkeypatch):
    """psutil alone, as on a platform without /proc."""
    monkeypatch.setattr(processes, "_LINUX", False)


def test_psutil_tells_the_same_of_a_process(tmp_path, monkeypatch):
    script = waiting(tmp_path, "--an", "argument", env={"RUN_ID": "abc"})

    def looks() -> list[object]:
        stat = processes.read_stat(script.pid)
        return [
            stat.ppid,
            stat.name,
            stat.threads,
            processes.is_defunct(stat),
            processes.is_alive(processes.identity_of(script.pid)),
            processes.split_cmdline(processes.read_cmdline(script.pid)),
            processes.read_environ(script.pid),
            processes.started_with(script.pid, "RUN_ID", {"abc"}),
            processes.read_cwd(script.pid),
            processes.owner_of(script.pid),
            list(processes.ancestors(script.pid)),
            processes.children_of(ME) >= {script.pid},
            set(processes.descendants([ME])) >= {script.pid},
        ]

    here = looks()
    monkeypatch.setattr(processes, "_LINUX", False)
    assert looks() == here


def test_psutil_knows_the_dead_and_the_gone_too(elsewhere):
    with zombie() as pid:
        assert processes.is_defunct(processes.read_stat(pid))
        assert not processes.is_alive(processes.identity_of(pid))
    for nobody in (pid, 2**31 - 1):
        assert processes.read_stat(nobody) is None
        assert processes.read_cmdline(nobody) == b""
        assert processes.read_environ(nobody) is None
        assert processes.read_cwd(nobody) is None
        assert processes.owner_of(nobody) is None
        assert processes.children_of(nobody) == set()


def test_psutil_s_clock_is_that_of_now(tmp_path, elsewhere):
    before = processes.now()
    script = waiting(tmp_path)
    created = processes.identity_of(script.pid).create_time
    assert created == psutil.Process(script.pid).create_time()
    assert abs(created - before) < 60
