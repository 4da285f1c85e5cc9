"""Files and directories in hostile places."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from orchard_infra.errors import InfrastructureError
from orchard_infra.system import files
from orchard_infra.system.files import (
    create_exclusive,
    open_existing,
    private_directory,
    read_bounded,
    runtime_dir,
    same_file,
    write_whole,
)
from orchard_infra.system.flock import lock_descriptor
from support import needs_another_user, run_python, wait_until

NOBODY = 65534


# The runtime directory


def test_the_runtime_directory_is_per_user_and_moves_with_no_other_variable():
    expected = Path(f"/tmp/orchard-infra-{os.geteuid()}")
    elsewhere = {"TMPDIR": "/scratch", "XDG_RUNTIME_DIR": "/run/user/0", "HOME": "/home/x"}
    assert runtime_dir({}) == expected
    assert runtime_dir(elsewhere) == expected
    assert runtime_dir({"ORCHARD_INFRA_DIR": ""}) == expected


def test_the_variable_names_another_runtime_directory_absolute_and_expanded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert runtime_dir({"ORCHARD_INFRA_DIR": "/scratch/x"}) == Path("/scratch/x")
    assert runtime_dir({"ORCHARD_INFRA_DIR": "runs/../x"}) == tmp_path / "x"
    assert runtime_dir({"ORCHARD_INFRA_DIR": "~/x"}) == tmp_path / "home" / "x"


def test_the_environment_is_read_when_asked_and_nothing_is_created(monkeypatch, tmp_path):
    monkeypatch.setenv("ORCHARD_INFRA_DIR", str(tmp_path / "later"))
    assert runtime_dir() == tmp_path / "later"
    assert not (tmp_path / "later").exists()


def test_two_jobs_with_a_tmpdir_each_meet_in_one_directory(tmp_path):
    source = "from orchard_infra.system.files import runtime_dir; print('at', runtime_dir())"
    said = set()
    for job in ("a", "b"):
        (tmp_path / job).mkdir()
        changes = {
            "TMPDIR": str(tmp_path / job),
            "XDG_RUNTIME_DIR": str(tmp_path / job),
            "ORCHARD_INFRA_DIR": None,
        }
        said.add(run_python(tmp_path, source, env=changes).wait_for("at"))
    assert said == {f"at /tmp/orchard-infra-{os.geteuid()}"}


# The private directory


def test_a_missing_directory_is_made_for_its_owner_alone(tmp_path):
    previous = os.umask(0)
    try:
        made = private_directory(tmp_path / "a" / "b")
    finally:
        os.umask(previous)
    assert made == tmp_path / "a" / "b"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert private_directory(made) == made


def plant_link_to_directory(path: Path) -> None:
    (path.parent / "target").mkdir(mode=0o700)
    path.symlink_to(path.parent / "target")


def plant_open_directory(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def plant_group_directory(path: Path) -> None:
    path.mkdir()
    path.chmod(0o720)


def plant_others_directory(path: Path) -> None:
    path.mkdir()
    path.chmod(0o702)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (plant_link_to_directory, "a symbolic link, not a directory"),
        (lambda path: path.symlink_to("/nonexistent/x"), "a symbolic link, not a directory"),
        (lambda path: path.symlink_to(path), "a symbolic link, not a directory"),
        (lambda path: path.write_text("mine"), "a regular file, not a directory"),
        (lambda path: os.mkfifo(path), "a FIFO, not a directory"),
        (plant_open_directory, "other users can write to .* chmod 700"),
        (plant_group_directory, r"mode 0720.* chmod 700"),
        (plant_others_directory, r"mode 0702.* chmod 700"),
    ],
    ids=["link", "dangling link", "loop", "file", "FIFO", "mode 0777", "mode 0720", "mode 0702"],
)
def test_a_planted_directory_is_refused_and_left_as_it_is(tmp_path, plant, words):
    path = tmp_path / "runtime"
    plant(path)
    before = os.lstat(path)
    with pytest.raises(InfrastructureError, match=words):
        private_directory(path)
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.parametrize(
    "plant",
    [
        lambda path: path.symlink_to("/nonexistent/x"),
        lambda path: path.symlink_to(path),
        lambda path: path.write_text("mine"),
    ],
    ids=["dangling link", "loop", "file"],
)
def test_a_trap_further_up_is_an_error_that_says_what_to_set(tmp_path, plant):
    plant(tmp_path / "parent")
    with pytest.raises(InfrastructureError, match="Set ORCHARD_INFRA_DIR"):
        private_directory(tmp_path / "parent" / "runtime")


@needs_another_user
def test_a_directory_of_another_user_is_refused_by_name_even_for_root(tmp_path):
    path = tmp_path / "runtime"
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)
    with pytest.raises(InfrastructureError, match="belongs to uid 12345, not to you"):
        private_directory(path)


@needs_another_user
def test_a_place_that_cannot_be_written_to_is_an_error_that_says_what_to_set(tmp_path):
    """As an ordinary user, in a process of its own: root may write anywhere."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    source = """
        import os, sys
        from pathlib import Path
        from orchard_infra.errors import InfrastructureError
        from orchard_infra.system.files import private_directory
        closed = os.open(sys.argv[1], os.O_PATH)
        os.setgid(65534), os.setuid(65534)
        try:
            private_directory(Path(f"/proc/self/fd/{closed}/runtime"))
        except InfrastructureError as error:
            print("refused:", error)
    """
    script = run_python(tmp_path, source, str(closed))
    said = script.wait_for("refused:")
    assert "Permission denied" in said
    assert "Set ORCHARD_INFRA_DIR" in said
    assert list(closed.iterdir()) == []


# Opening


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR], ids=["r", "w", "rw"])
@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda path: os.mkfifo(path), "is a FIFO"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.symlink_to(path.parent / "victim"), "is a symbolic link"),
        (lambda path: path.symlink_to("/nonexistent/x"), "is a symbolic link"),
        (lambda path: path.symlink_to("/dev/zero"), "is a symbolic link"),
        (bind_socket, "is a socket"),
    ],
    ids=["FIFO", "directory", "link", "dangling link", "link to a device", "socket"],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path_factory, plant, words, flags):
    path = tmp_path_factory.mktemp("s") / "x"
    (path.parent / "victim").write_text("results")
    plant(path)
    before = open_descriptors()
    with pytest.raises(InfrastructureError, match=words):
        open_existing(path, flags)
    assert open_descriptors() == before
    assert (path.parent / "victim").read_text() == "results"


def open_descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/tty", "/dev/ptmx"])
def test_a_device_is_refused(device):
    with pytest.raises(InfrastructureError, match="is a character device"):
        open_existing(device, os.O_RDWR)


def swap_after_the_look(
    monkeypatch: pytest.MonkeyPatch, path: Path, plant: Callable[[Path], object]
) -> None:
    """Have the file replaced right after it was looked at, as an attacker would try to."""
    really = os.lstat

    def look(name: Path) -> os.stat_result:
        found = really(name)
        if name == path:
            monkeypatch.setattr(os, "lstat", really)
            path.unlink()
            plant(path)
        return found

    monkeypatch.setattr(os, "lstat", look)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (os.mkfifo, "is a FIFO"),
        (lambda path: path.symlink_to("victim"), "is a symbolic link; it is not followed"),
    ],
    ids=["FIFO", "link"],
)
def test_a_file_that_is_swapped_between_look_and_open_is_refused_too(
    tmp_path, monkeypatch, plant, words
):
    path = tmp_path / "x"
    path.touch()
    (tmp_path / "victim").write_text("results")
    swap_after_the_look(monkeypatch, path, plant)
    before = open_descriptors()
    with pytest.raises(InfrastructureError, match=words):
        open_existing(path, os.O_RDONLY)
    assert open_descriptors() == before


def test_a_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_existing(tmp_path / "x", os.O_RDONLY)


def test_descriptors_are_not_inherited_by_what_is_executed(tmp_path):
    (tmp_path / "x").touch()
    for fd in (
        open_existing(tmp_path / "x", os.O_RDONLY),
        create_exclusive(tmp_path / "y", 0o600),
    ):
        assert not os.get_inheritable(fd)
        os.close(fd)


@pytest.mark.parametrize(
    "plant",
    [
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to("/nonexistent/x"),
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
    ],
    ids=["file", "dangling link", "FIFO", "directory"],
)
def test_a_new_file_takes_nobody_s_name(tmp_path, plant):
    plant(tmp_path / "x")
    with pytest.raises(FileExistsError):
        create_exclusive(tmp_path / "x", 0o600)


def test_a_new_file_has_the_mode_asked_for_and_can_be_written_and_read(tmp_path):
    fd = create_exclusive(tmp_path / "x", 0o600)
    write_whole(fd, b"hello")
    assert read_bounded(fd, 100) == b"hello"
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    os.close(fd)


# Reading and writing


def test_a_shorter_text_replaces_a_longer_one_wherever_the_offset_stands(tmp_path):
    fd = create_exclusive(tmp_path / "x", 0o600)
    write_whole(fd, b"a longer text")
    os.lseek(fd, 7, os.SEEK_SET)
    write_whole(fd, b"short")
    assert (tmp_path / "x").read_bytes() == b"short"
    os.close(fd)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    really = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: really(fd, data[:3]))
    fd = create_exclusive(tmp_path / "x", 0o600)
    write_whole(fd, b"in small pieces")
    assert (tmp_path / "x").read_bytes() == b"in small pieces"
    os.close(fd)


def test_a_huge_file_is_read_to_the_limit_alone(tmp_path):
    (tmp_path / "x").touch()
    os.truncate(tmp_path / "x", 2 * 2**30)
    fd = open_existing(tmp_path / "x", os.O_RDONLY)
    os.lseek(fd, 100, os.SEEK_SET)
    assert read_bounded(fd, 10) == b"\0" * 10
    assert os.lseek(fd, 0, os.SEEK_CUR) == 100
    os.close(fd)


def test_a_name_is_followed_to_the_file_that_has_it_now(tmp_path):
    path = tmp_path / "x"
    fd = create_exclusive(path, 0o600)
    assert same_file(fd, path)
    path.rename(tmp_path / "y")
    assert not same_file(fd, path)
    path.touch()
    assert not same_file(fd, path)
    path.unlink()
    path.symlink_to(tmp_path / "y")
    assert not same_file(fd, path)  # a link to the file is not the file
    assert same_file(fd, tmp_path / "y")
    os.close(fd)


def test_file_systems_are_told_by_their_device():
    assert files.file_system_of(os.stat("/proc").st_dev) == "proc"
    assert files.file_system_of(os.stat("/dev/shm").st_dev) == "tmpfs"
    assert files.file_system_of(os.makedev(4000, 4000)) == ""


@pytest.mark.parametrize(
    ("path", "words"),
    [("/dev/null", "a character device"), ("/", "a directory"), (__file__, "a regular file")],
)
def test_kinds_of_files_are_named_in_words(path, words):
    assert files.describe_kind(os.lstat(path).st_mode) == words


def test_owners_are_named_and_numbered():
    assert files.owner_name(0) == "root (uid 0)"
    assert files.owner_name(987654321) == "uid 987654321"


def test_many_can_make_the_directory_at_once(tmp_path):
    path = tmp_path / "a" / "b" / "c"
    outcomes: list[object] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        try:
            outcomes.append(private_directory(path))
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [path] * 8


def test_a_fifo_of_which_the_other_end_never_comes_hangs_nobody(tmp_path):
    """In a process of its own, so that a hang is seen as one."""
    os.mkfifo(tmp_path / "x")
    source = """
        import os
        from orchard_infra.system import files
        files._refuse_unless_regular = lambda path, mode: None  # the race is lost, say
        for flags in (os.O_RDONLY, os.O_RDWR):
            os.close(files.open_existing("x", flags))
        try:
            files.open_existing("x", os.O_WRONLY)
        except OSError as error:
            print("errno", error.errno)
    """
    script = run_python(tmp_path, source)
    wait_until(lambda: script.poll() is not None, 30)
    assert script.output == f"errno {errno.ENXIO}\n"


def test_a_lock_that_is_held_is_no_error_after_portalocker_was_loaded_anew(tmp_path, monkeypatch):
    """A test that runs pytest within its own process forgets what was imported there."""
    first, second = (os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        assert lock_descriptor(first)
        for name in [name for name in sys.modules if name.partition(".")[0] == "portalocker"]:
            monkeypatch.delitem(sys.modules, name)
        assert not lock_descriptor(second)
    finally:
        os.close(first)
        os.close(second)


@pytest.mark.parametrize("is_alone", [True, False], ids=["its module alone", "all of portalocker"])
def test_a_file_is_locked_without_what_portalocker_loads_for_redis(tmp_path, is_alone):
    """That takes longer than all the rest of an environment, where redis is installed."""
    source = f"""
        import os, sys
        from orchard_infra.system import flock
        if not {is_alone}:  # another version may have its modules elsewhere
            sys.modules[flock._ALONE + ".portalocker"] = None
        first, second = (os.open("x", os.O_RDWR | os.O_CREAT) for _ in range(2))
        assert flock.lock_descriptor(first) and not flock.lock_descriptor(second)
        flock.unlock_descriptor(first)
        assert flock.lock_descriptor(second)
        assert ("portalocker" in sys.modules) is not {is_alone}
        assert not {is_alone} or not {{"redis", "asyncio"}} & sys.modules.keys()
    """
    script = run_python(tmp_path, source)
    assert script.finish() == 0, script.transcript()
