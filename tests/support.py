"""What the tests share: real processes that say when they are ready, and waits with a bound.

    from support import run_python, wait_until

    def test_a_run_holds_its_lock(tmp_path):
        holder = run_python(tmp_path, '''
            from orchard_infra import managed_environment
            with managed_environment("digits"):
                print("ready")
                input()                      # until the test says so, or ends
        ''')
        holder.wait_for("ready")
        ...
        holder.tell("go on")
        assert holder.finish() == 0

Output goes to files, not to pipes: a forked child that outlives its parent keeps a pipe open, and
a test that reads until the end of it would hang on the very thing it wants to show.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

T = TypeVar("T")

needs_another_user = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs another user"
)
needs_namespaces = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs a real pid namespace and mounts",
)
needs_time_namespaces = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not os.path.exists("/proc/self/ns/time"),
    reason="needs a real time namespace",
)
# What is started so is on a clock of its own: with --fork, since exec(2) alone changes the time
# namespace from Linux 6.3 on only.
IN_TIME_NAMESPACE = ("unshare", "--time", "--boottime", "1000", "--fork", "--kill-child")
# As after a DHCP lease or a VPN has renamed the machine.
UNDER_ANOTHER_HOST_NAME = (
    *("unshare", "--uts", sys.executable, "-c"),
    "import os, socket, sys; socket.sethostname('renamed'); os.execvp(sys.argv[1], sys.argv[1:])",
)

# Generous: the machine may be busy with everybody else's tests.
PATIENCE = 120.0

# Set for each test by the conftest and inherited by whatever is started, so that a process whose
# parents are gone can still be told to be ours.
TEST_MARK = "INFRA_TEST_MARK"

_started: list[Script] = []
_left_behind: set[str] = set()  # shared memory of scripts that were killed


class Script(subprocess.Popen[bytes]):
    """A process whose output can be read at any time. `run_python` and `run_command` make them."""

    def __init__(self, arguments: Sequence[str], *, log: Path, **options: Any) -> None:
        self._stdout_path = log.with_suffix(".out")
        self._stderr_path = log.with_suffix(".err")
        with open(self._stdout_path, "wb") as out, open(self._stderr_path, "wb") as err:
            options.setdefault("stdin", subprocess.PIPE)
            super().__init__(arguments, stdout=out, stderr=err, **options)
        _started.append(self)

    @property
    def output(self) -> str:
        """What it, and what it started, has written to stdout so far."""
        return self._stdout_path.read_text("utf-8", errors="replace")

    @property
    def error_output(self) -> str:
        """What it, and what it started, has written to stderr so far."""
        return self._stderr_path.read_text("utf-8", errors="replace")

    def wait_for(self, text: str, timeout: float = PATIENCE) -> str:
        """The first whole line of stdout that contains ``text``, as soon as it is there.

        Raises:
            AssertionError: The process ended without it, or it took more than ``timeout`` seconds.
        """

        def line() -> str | None:
            ended = self.poll() is not None  # asked before reading, so that nothing is missed
            for candidate in self.output.splitlines(keepends=True):
                if text in candidate and (ended or candidate.endswith("\n")):
                    return candidate.rstrip("\n")
            if ended:
                raise AssertionError(
                    f"ended with {self.returncode} before it printed {text!r}\n{self.transcript()}"
                )
            return None

        found = wait_until(line, timeout, what=lambda: f"{text!r}\n{self.transcript()}")
        assert found is not None
        return found

    def tell(self, line: str = "") -> None:
        """Write a line to its stdin."""
        assert self.stdin is not None
        self.stdin.write(line.encode() + b"\n")
        self.stdin.flush()

    def send_signal(self, sig: int) -> None:
        """As `subprocess.Popen.send_signal`, also when the process is killed: see `kill_group`."""
        if sig == signal.SIGKILL:
            _left_behind.update(_shared_memory_of([self.pid]))
        super().send_signal(sig)

    def kill_group(self) -> None:
        """Kill its process group. Its semaphores are removed when the test ends: the tracker that
        would do so may be in that group, or have been killed before.
        """
        _left_behind.update(_shared_memory_of([self.pid]))
        os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """As `subprocess.Popen.wait`, which looks 20 times a second, but at once."""
        if timeout is None or self.returncode is not None or not hasattr(os, "pidfd_open"):
            return super().wait(timeout)
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            return super().wait(timeout)
        try:
            ended, _, _ = select.select([pidfd], [], [], timeout)
        finally:
            os.close(pidfd)
        return super().wait(None if ended else 0.0)

    def finish(self, timeout: float = PATIENCE) -> int:
        """Wait for its end; the exit status, negative for a signal.

        Raises:
            AssertionError: It is still there after ``timeout`` seconds.
        """
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s\n{self.transcript()}") from None

    def transcript(self) -> str:
        return f"stdout:\n{self.output}\nstderr:\n{self.error_output}"

    def stop(self) -> None:
        """Kill it, wait for it and close its stdin. Done for every script when its test ends."""
        if self.poll() is None:
            self.kill()
            self.wait()
        if self.stdin is not None:
            try:
                self.stdin.close()
            except BrokenPipeError:
                pass


def run_python(
    tmp_path: Path,
    source: str | Path,
    *arguments: str,
    env: Mapping[str, str | None] | None = None,
    name: str = "script.py",
    cwd: Path | None = None,
    options: Sequence[str] = (),
    **popen: Any,
) -> Script:
    """Start a real Python with ``source``: text, written to ``tmp_path / name``, or a file's path.

    The same text and name give the same file, so two calls give twins. ``env`` is laid over the
    test's environment, None removes a variable. ``options`` go to the interpreter, ``popen`` to
    `subprocess.Popen`. The working directory is ``tmp_path`` unless ``cwd`` is given.
    """
    path = source if isinstance(source, Path) else written(tmp_path / name, source)
    return run_command(
        tmp_path, [sys.executable, *options, str(path), *arguments], env=env, cwd=cwd, **popen
    )


def written(path: Path, source: str) -> Path:
    """The file at ``path`` with this text; the same text may be given again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = textwrap.dedent(source)
    if not path.exists():  # writing it again would empty it under a process that starts
        path.write_text(text, "utf-8")
    elif path.read_text("utf-8") != text:
        raise AssertionError(f"{path.name} already holds another text: give this one its own name=")
    return path


def run_command(
    tmp_path: Path,
    command: Sequence[str],
    *,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    **popen: Any,
) -> Script:
    """Start any command, as `run_python` does."""
    return Script(
        list(command),
        log=_free_log(tmp_path),
        env=environment(env),
        cwd=tmp_path if cwd is None else cwd,
        **popen,
    )


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """A child's environment: the test's own, with ``changes``; None removes a variable."""
    merged: dict[str, str | None] = {**os.environ, "PYTHONUNBUFFERED": "1", **(changes or {})}
    return {name: value for name, value in merged.items() if value is not None}


def wait_until(
    predicate: Callable[[], T],
    timeout: float = PATIENCE,
    *,
    what: str | Callable[[], str] = "it",
    interval: float = 0.005,
) -> T:
    """Ask until the answer is true, and return it.

    Raises:
        AssertionError: It was not within ``timeout`` seconds; ``what`` says what was waited for.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() > deadline:
            words = what if isinstance(what, str) else what()
            raise AssertionError(f"waited {timeout} s for {words}")
        time.sleep(interval)


def require_module(name: str) -> None:
    """Skip the test where a module is not installed, without importing it: torch takes seconds."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the module {name}")


def is_running(pid: int) -> bool:
    """Whether there is such a process and it is more than a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_gone(pids: Iterable[int], timeout: float = PATIENCE) -> None:
    """Wait until none of these processes runs any more."""
    pids = list(pids)
    wait_until(
        lambda: not any(is_running(pid) for pid in pids),
        timeout,
        what=lambda: f"the end of {[pid for pid in pids if is_running(pid)]}",
    )


def stop_everything_started(mark: str, tmp_path: Path, before: Collection[int] = ()) -> None:
    """Stop what a test started and left: its scripts and our descendants, and whatever carries
    its mark or works in its directory.

    The mark and the directory find processes whose parents are gone; the directory also those
    that have emptied their environment. Nothing else makes a process ours. ``before``: the pids
    that were there before the test, such as that of a server that a whole session shares; these
    processes stay.

    Trackers of shared memory and semaphores are given the time to remove what the others left, and
    end then. What a test kills together with its tracker is removed if one of these processes has
    it mapped: nothing else tells whose a ``/dev/shm/sem.mp-*`` is.
    """
    began = time.monotonic()
    # More than once, because what is being stopped may be forking.
    while found := _ours(mark, tmp_path, before):
        ours = [process for process in found if is_running(process.pid)]
        if not ours or time.monotonic() > began + 10.0:
            break
        _left_behind.update(_shared_memory_of(process.pid for process in ours))
        others = [process for process in ours if not _is_tracker(process.pid)]
        if not others and time.monotonic() < began + 5.0:
            time.sleep(0.005)
            continue
        for process in others or ours:
            try:
                process.kill()  # psutil compares create times first
            except psutil.Error:
                pass
        for script in _started:
            script.poll()  # before psutil reaps it: the status belongs to the Popen object
        wait_gone(process.pid for process in others or ours)
    while _started:
        _started.pop().stop()
    while _left_behind:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_left_behind.pop())
    # What a test forked by itself is not left as a zombie.
    psutil.wait_procs([process for process in found if _is_our_child(process)], timeout=0)


def _ours(mark: str, tmp_path: Path, before: Collection[int]) -> list[psutil.Process]:
    """What a test has started, zombies included. Done after every test, so it asks the new
    processes alone, and each of them by as few files as possible.
    """
    not_ours = {os.getpid(), *before, *_helpers_of_multiprocessing()}
    parents: dict[int, int] = {}
    found = []
    for pid in psutil.pids():
        if pid not in not_ours and (
            _carries(pid, mark) or _works_in(pid, tmp_path) or _descends_from_us(pid, parents)
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
    return found


def _descends_from_us(pid: int, parents: dict[int, int]) -> bool:
    """``parents`` keeps what was found: new processes have most of their ancestors in common."""
    while pid > 1:
        if pid not in parents:
            parents[pid] = _parent_of(pid)
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


def _parent_of(pid: int) -> int:
    try:
        if not os.path.exists("/proc/self/stat"):
            return psutil.Process(pid).ppid()
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:
            return int(stat.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, psutil.Error):
        return 0


def _is_our_child(process: psutil.Process) -> bool:
    try:
        return process.ppid() == os.getpid()
    except psutil.NoSuchProcess:
        return False


def _carries(pid: int, mark: str) -> bool:
    # Not by psutil, which takes five times as long.
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as environ:
            return f"{TEST_MARK}={mark}".encode() in environ.read()
    except OSError:
        return False


def _is_tracker(pid: int) -> bool:
    """Whether it is a resource tracker of multiprocessing or loky, or torch's manager of shared
    memory: it ends by itself when its clients have.
    """
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"resource_tracker import main" in command or b"torch_shm_manager" in command


def remove_shared_memory_of_the_dead() -> None:
    """What somebody's killed programs have left on this machine. The next run would remove it, and
    `orchard-infra clean` would show it.
    """
    from orchard_infra.artifacts.sweeping import collect

    collect([])


def _shared_memory_of(pids: Iterable[int]) -> set[str]:
    """The semaphores and blocks of multiprocessing and loky that these processes have mapped."""
    inodes: set[int] = set()
    for pid in pids:
        # By the number of the file: sem_open(3) gives it its name only after it has mapped it.
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            inodes.update(map(int, re.findall(r" (\d+) +/dev/shm/", maps)))
    if not inodes:
        return set()
    with os.scandir("/dev/shm") as files:
        return {
            file.path
            for file in files
            if re.match(r"sem\.(mp|loky)-|psm_", file.name) and file.inode() in inodes
        }


def _works_in(pid: int, directory: Path) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")).is_relative_to(directory)
    except OSError:
        return False


def _helpers_of_multiprocessing() -> list[int]:
    # multiprocessing starts these once for the life of a process and complains when they are gone.
    pids = []
    for module, holder, name in (
        ("multiprocessing.resource_tracker", "_resource_tracker", "_pid"),
        ("multiprocessing.forkserver", "_forkserver", "_forkserver_pid"),
    ):
        pid = getattr(getattr(sys.modules.get(module), holder, None), name, None)
        if isinstance(pid, int):
            pids.append(pid)
    return pids


def _free_log(tmp_path: Path) -> Path:
    """A name for the output of a script that no other one has."""
    for number in itertools.count():
        log = tmp_path / f"log-{number}"
        if not log.with_suffix(".out").exists():
            return log
    raise AssertionError("unreachable")


def as_nobody(call: Callable[[], T]) -> T:
    """What it returns in a process of another user."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            writer.send(call())
        finally:
            os._exit(0)
    writer.close()
    try:
        answer: T = reader.recv()
        return answer
    finally:
        reader.close()
        os.waitpid(pid, 0)


def succeeds_in_a_fork(call: Callable[[], object], timeout: float = PATIENCE) -> bool:
    """Whether ``call()`` returns a true value in a forked child, in time. One that hangs is killed,
    also where it has blocked every signal.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if call() else 1
        finally:
            os._exit(status)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False
