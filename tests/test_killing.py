"""Processes are stopped whole, together, in bounded time, and only on proof of who they are."""

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchard_infra.system import killing, processes
from orchard_infra.system.killing import StopOutcome, stop_processes
from orchard_infra.system.processes import ProcessIdentity, identity_of
from support import Script, as_nobody, is_running, run_python, wait_gone, wait_until

LINUX = sys.platform == "linux"

# Forks what the test asks for; every process says its pid once it is as it should be.
FAMILY = """\
import os, signal, sys, time

def say(word):
    os.write(1, f"{word} {os.getpid()}\\n".encode())

def be(word, *below, stubborn=False):
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        for child in below:
            child()
        say(word)
        while True:
            signal.pause()

def rest():
    say("ready")
    while True:
        signal.pause()
"""


IGNORE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def family(tmp_path: Path, source: str) -> Script:
    script = run_python(tmp_path, FAMILY + textwrap.dedent(source))
    script.wait_for("ready")
    return script


def named(script: Script, word: str, count: int = 1) -> list[ProcessIdentity]:
    """The processes that have said this word."""

    def said() -> list[int]:
        lines = (line.split() for line in script.output.splitlines())
        pids = [int(line[1]) for line in lines if line[0] == word]
        return pids if len(pids) >= count else []

    return [identify(pid) for pid in wait_until(said, what=lambda: script.transcript())]


def identify(pid: int) -> ProcessIdentity:
    identity = identity_of(pid)
    assert identity is not None
    return identity


def nobody(pid: int) -> bool:
    return False


def stop(*targets: ProcessIdentity, grace: float = 30.0, kill_wait: float = 10.0) -> StopOutcome:
    return stop_processes(targets, grace=grace, spare=nobody, kill_wait=kill_wait)


def ended(outcome: StopOutcome) -> set[ProcessIdentity]:
    """On a busy machine one that would have ended by itself may need to be killed."""
    return {*outcome.stopped, *outcome.killed}


def state_of(pid: int) -> str:
    stat = processes.read_stat(pid)
    return "gone" if stat is None else stat.state


@pytest.fixture(params=["with pidfds", "without pidfds", "out of descriptors"])
def each_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever there is to hold a process by."""
    if request.param != "without pidfds" and not hasattr(os, "pidfd_open"):
        pytest.skip("needs a real pidfd_open")
    # A patch of its own: it must be gone when the processes of the test are stopped.
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "without pidfds":
            patch.delattr(os, "pidfd_open", raising=False)
        elif request.param == "out of descriptors":
            real, calls = os.pidfd_open, itertools.count()

            def every_second(pid: int, flags: int = 0) -> int:
                if next(calls) % 2:
                    return real(pid, flags)
                raise OSError(errno.EMFILE, "Too many open files")

            patch.setattr(os, "pidfd_open", every_second)
        yield


@pytest.mark.usefixtures("each_way")
class TestATree:
    def test_is_stopped_down_to_the_grandchildren(self, tmp_path: Path) -> None:
        script = family(tmp_path, 'be("child", lambda: be("grandchild"))\nrest()')
        tree = named(script, "ready") + named(script, "child") + named(script, "grandchild")

        outcome = stop(tree[0])

        assert set(outcome.stopped) == set(tree)
        assert script.finish() == -signal.SIGTERM
        assert not any(is_running(identity.pid) for identity in tree)

    def test_that_ignores_sigterm_is_killed_after_the_grace(self, tmp_path: Path) -> None:
        script = family(tmp_path, 'be("child", stubborn=True)\nrest()')
        [root], [child] = named(script, "ready"), named(script, "child")

        outcome = stop(root, grace=0.1)

        assert child in outcome.killed
        assert ended(outcome) == {root, child}
        assert not is_running(child.pid)

    def test_is_not_waited_for_longer_than_it_lives(self, tmp_path: Path) -> None:
        script = family(tmp_path, 'be("child")\nrest()')
        before = time.monotonic()

        stop(*named(script, "ready"), grace=200.0)

        assert time.monotonic() - before < 100.0

    def test_loses_the_children_that_it_forks_while_it_is_asked_to_end(
        self, tmp_path: Path
    ) -> None:
        script = family(
            tmp_path,
            """
            signal.signal(signal.SIGTERM, lambda *_: be("late", stubborn=True))
            rest()
            """,
        )

        outcome = stop(*named(script, "ready"), grace=0.3)

        assert script.finish() == -signal.SIGKILL
        assert "late" in script.output
        assert len(outcome.killed) > 1
        assert running_in(tmp_path) == []

    def test_asks_those_late_children_before_it_kills_them(self, tmp_path: Path) -> None:
        script = family(
            tmp_path,
            """
            def save(*_):
                # Blocked until it is as it should be: Python forgets what comes before that.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
                be("late")
                os.wait()
                os._exit(0)

            signal.signal(signal.SIGTERM, save)
            rest()
            """,
        )

        outcome = stop(*named(script, "ready"), grace=20.0)

        assert script.finish() == 0
        assert (len(outcome.stopped) > 1, outcome.killed) == (True, ())

    def test_that_forks_in_a_loop_is_stopped_whole(self, tmp_path: Path) -> None:
        script = family(
            tmp_path,
            """
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            say("ready")
            for _ in range(2000):
                if os.fork() == 0:
                    time.sleep(30)
                    os._exit(0)
                time.sleep(0.0005)
            rest()
            """,
        )

        outcome = stop(*named(script, "ready"), grace=0.05)

        assert script.finish() == -signal.SIGKILL
        assert not outcome.stuck
        assert running_in(tmp_path) == []

    def test_keeps_what_is_spared_and_all_that_is_below_it(self, tmp_path: Path) -> None:
        script = family(
            tmp_path,
            """
            be("spared", lambda: be("below", lambda: be("deeper")))
            be("child")
            rest()
            """,
        )
        [root], [child] = named(script, "ready"), named(script, "child")
        [spared], [below] = named(script, "spared"), named(script, "below")
        [deeper] = named(script, "deeper")

        # One that is below a spared one stays, though it is asked for by name.
        outcome = stop_processes([root, below], grace=30.0, spare=lambda pid: pid == spared.pid)

        assert set(outcome.stopped) == {root, child}
        assert all(is_running(identity.pid) for identity in (spared, below, deeper))

    def test_is_left_alone_when_its_pid_has_a_new_owner(self, tmp_path: Path) -> None:
        script = family(tmp_path, "rest()")
        former = ProcessIdentity(script.pid, identify(script.pid).create_time - 1.0)

        assert stop(former) == StopOutcome(gone=(former,))
        assert script.poll() is None

    def test_is_left_alone_when_its_pid_gets_a_new_owner_at_the_last_moment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = family(tmp_path, "rest()")
        former = ProcessIdentity(script.pid, identify(script.pid).create_time - 1.0)
        # It was there when we looked for it, and is another one when it is to be signalled.
        looks = iter([True])
        real = processes.is_alive
        monkeypatch.setattr(processes, "is_alive", lambda identity: next(looks, real(identity)))

        assert stop(former) == StopOutcome(gone=(former,))
        assert script.poll() is None

    def test_gets_its_sigterm_also_when_it_is_stopped(self, tmp_path: Path) -> None:
        script = family(
            tmp_path,
            """
            def save(*_):
                say("saved")
                os._exit(3)

            signal.signal(signal.SIGTERM, save)
            rest()
            """,
        )
        os.kill(script.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(script.pid) == "T")

        outcome = stop(identify(script.pid))

        assert len(outcome.stopped) == 1
        assert (script.finish(), "saved" in script.output) == (3, True)

    def test_that_is_our_own_leaves_its_status_to_whoever_started_it(self, tmp_path: Path) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)

        outcome = stop(identify(child.pid), identify(pid))

        assert len(outcome.stopped) == 2
        assert child.wait(10) == -signal.SIGTERM
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM

    def test_that_is_defunct_counts_as_gone(self) -> None:
        child = subprocess.Popen([sys.executable, "-c", ""])
        identity = identify(child.pid)
        wait_until(lambda: state_of(child.pid) == "Z")

        assert stop(identity) == StopOutcome(gone=(identity,))
        assert child.wait(10) == 0

    def test_of_another_user_is_denied(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs another user: only root can become one")
        script = family(tmp_path, "rest()")
        identity = identify(script.pid)

        outcome = as_nobody(lambda: stop(identity, grace=0.0, kill_wait=0.0))

        assert outcome == StopOutcome(denied=(identity,))
        assert script.poll() is None

    def test_leaves_no_descriptor_open(self, tmp_path: Path) -> None:
        script = family(tmp_path, 'be("child", stubborn=True)\nrest()')
        before = psutil.Process().num_fds()

        stop(*named(script, "ready"), grace=0.05)

        assert psutil.Process().num_fds() == before


def test_sixty_four_stubborn_processes_cost_one_grace_period(tmp_path: Path) -> None:
    script = family(tmp_path, 'for _ in range(64):\n    be("stubborn", stubborn=True)\nrest()')
    stubborn = named(script, "stubborn", count=64)
    before = time.monotonic()

    outcome = stop_processes(stubborn, grace=0.5, spare=nobody)

    assert time.monotonic() - before < 16.0  # one after the other takes 32 s
    assert set(outcome.killed) == set(stubborn)
    assert not any(is_running(identity.pid) for identity in stubborn)


def test_nothing_is_signalled_that_must_never_be(tmp_path: Path) -> None:
    script = run_python(
        tmp_path,
        """
        import os, subprocess, sys
        from pathlib import Path

        if len(sys.argv) == 1:
            os.setpgid(0, 0)
            child = subprocess.run([sys.executable, __file__, "asks"])
            print("alive", child.returncode)
        else:
            from orchard_infra.system.processes import ProcessIdentity, identity_of
            from orchard_infra.system.killing import stop_processes

            group = identity_of(os.getppid())
            asked = [
                identity_of(os.getpid()),
                identity_of(os.getppid()),
                ProcessIdentity(0, group.create_time),
                ProcessIdentity(-group.pid, group.create_time),
            ]
            outcome = stop_processes(asked, grace=0.0, spare=lambda pid: False, kill_wait=0.0)
            print("denied", outcome.denied == tuple(asked), flush=True)
        """,
    )

    assert script.finish() == 0
    assert script.output.split("\n")[:2] == ["denied True", "alive 0"]


def test_a_helper_is_asked_when_all_that_it_serves_have_ended(tmp_path: Path) -> None:
    """A resource tracker that is stopped first cannot remove what the workers still use."""
    script = family(
        tmp_path,
        """
        def note(word, end):
            def handler(*_):
                say(word)
                if end:
                    os._exit(0)
            return handler

        helper = os.fork()
        if helper == 0:
            signal.signal(signal.SIGTERM, note("helper-asked", True))
            say("helper")
            while True:
                signal.pause()
        if os.fork() == 0:
            # It ignores SIGTERM for the whole grace period, and is killed after it.
            signal.signal(signal.SIGTERM, note("worker-asked", False))
            say("worker")
            while True:
                signal.pause()
        rest()
        """,
    )
    [root], [helper], [worker] = (named(script, word) for word in ("ready", "helper", "worker"))

    outcome = stop_processes([root], grace=0.3, spare=nobody, last=lambda pid: pid == helper.pid)

    asked = [line.split()[0] for line in script.output.splitlines() if "asked" in line]
    assert asked == ["worker-asked", "helper-asked"]
    assert worker in outcome.killed
    assert helper in outcome.stopped


def test_children_that_a_helper_starts_while_it_waits_for_its_turn_go_with_the_others(
    tmp_path: Path,
) -> None:
    """A forkserver whose clients are dying may just be forking another worker for one of them."""
    script = family(
        tmp_path,
        """
        def wait_for(name):
            while not os.path.exists(name):
                time.sleep(0.01)

        signal.signal(signal.SIGTERM, lambda *_: open("told", "w").close())
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            say("helper")
            wait_for("told")  # from now on it is waited for the root
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, lambda *_: (open("asked", "w").close(), os._exit(0)))
                say("late")
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            while True:
                signal.pause()
        say("ready")
        wait_for("asked")
        """,
    )
    [root], [helper] = named(script, "ready"), named(script, "helper")

    outcome = stop_processes([root], grace=60.0, spare=nobody, last=lambda pid: pid == helper.pid)

    [late] = named(script, "late")
    assert ({root, helper, late}, outcome.killed) == (set(outcome.stopped), ())
    assert not any(is_running(identity.pid) for identity in (root, helper, late))


def test_a_helper_that_ignores_sigterm_is_killed_as_well(tmp_path: Path) -> None:
    script = family(tmp_path, 'be("helper", stubborn=True)\nrest()')
    [root], [helper] = named(script, "ready"), named(script, "helper")

    outcome = stop_processes([root], grace=5.0, spare=nobody, last=lambda pid: pid == helper.pid)

    assert outcome.killed == (helper,)
    assert not is_running(helper.pid)


@pytest.mark.skipif(not LINUX, reason="needs a real /proc")
@pytest.mark.parametrize("left", [1, 3, 12])
def test_a_process_that_is_out_of_descriptors_stops_its_children_all_the_same(
    tmp_path: Path, left: int
) -> None:
    script = run_python(
        tmp_path,
        FAMILY
        + textwrap.dedent(
            """
            import resource
            from orchard_infra.system.processes import children_of, identity_of, is_running
            from orchard_infra.system.killing import stop_processes

            for _ in range(10):
                be("child", stubborn=True)
            while len(children_of(os.getpid())) < 10:
                time.sleep(0.005)
            children = [identity_of(pid) for pid in children_of(os.getpid())]
            stop_processes([], grace=0.0, spare=lambda pid: False)
            left = int(sys.argv[1])
            opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(left)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (opened[-1] + 1,) * 2)
            for fd in opened:
                os.close(fd)
            outcome = stop_processes(children, grace=0.1, spare=lambda pid: False)
            print("ended", len(outcome.stopped) + len(outcome.killed), len(outcome.gone))
            """
        ),
        str(left),
    )

    assert script.finish() == 0, script.transcript()
    assert "ended 10 0" in script.output


def test_the_first_process_is_denied() -> None:
    first = identify(1)

    outcome = stop_processes([first], grace=0.0, spare=lambda pid: True, kill_wait=0.0)

    assert outcome == StopOutcome(denied=(first,))


@pytest.mark.skipif(not LINUX, reason="needs a real /proc")
def test_a_thread_is_no_process(tmp_path: Path) -> None:
    script = run_python(
        tmp_path,
        """
        import threading
        thread = threading.Thread(target=threading.Event().wait, args=[60])
        thread.start()
        print("thread", thread.native_id)
        """,
    )
    thread = identify(int(script.wait_for("thread").split()[1]))

    assert stop(thread) == StopOutcome(gone=(thread,))
    assert script.poll() is None


def test_one_in_uninterruptible_sleep_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    script = family(tmp_path, 'be("child")\nrest()')
    [root], [child] = named(script, "ready"), named(script, "child")

    with frozen_by_the_kernel(child.pid):
        outcome = stop(root, grace=0.1, kill_wait=0.1)

        assert (ended(outcome), outcome.stuck) == ({root}, (child,))
    wait_gone([child.pid])


def test_one_that_does_not_even_end_when_killed_is_reported_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = family(tmp_path, 'be("child", stubborn=True)\nrest()')
    [root], [child] = named(script, "ready"), named(script, "child")
    monkeypatch.setattr(killing, "_SIGKILL", signal.SIGTERM)
    before = time.monotonic()

    outcome = stop(root, grace=0.1, kill_wait=0.1)

    assert time.monotonic() - before < 30.0
    assert (ended(outcome), outcome.stuck) == ({root}, (child,))


def test_nobody_is_left_frozen_when_an_exception_comes_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = family(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nrest()")
    identity = identify(script.pid)
    real = processes.all_pids

    def interrupted() -> list[int]:
        if state_of(script.pid) == "T":
            raise KeyboardInterrupt
        return real()

    monkeypatch.setattr(processes, "all_pids", interrupted)

    with pytest.raises(KeyboardInterrupt):
        stop(identity, grace=0.0)

    wait_until(lambda: state_of(script.pid) == "S")
    assert script.poll() is None


def test_a_handler_for_ended_children_does_not_interrupt_it() -> None:
    # As torch's DataLoader has one, which raises when one of its workers is killed.
    def complain(*_: object) -> None:
        raise RuntimeError("a worker was killed")

    children = [
        subprocess.Popen(
            [sys.executable, "-c", f"{IGNORE}; print(flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    before = signal.signal(signal.SIGCHLD, complain)
    try:
        outcome = stop(*(identify(child.pid) for child in children), grace=0.1)
        handler = signal.getsignal(signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)

    assert [child.wait(10) for child in children] == [-signal.SIGKILL] * 3
    assert len(outcome.killed) == 3
    assert handler is complain
    for child in children:
        child.communicate()


@pytest.mark.skipif(not LINUX, reason="needs a real subreaper")
def test_what_becomes_our_child_by_losing_its_parent_does_not_stay_defunct(tmp_path: Path) -> None:
    script = run_python(
        tmp_path,
        FAMILY
        + textwrap.dedent(
            """
            import ctypes
            from orchard_infra.system.processes import children_of, descendants, identity_of
            from orchard_infra.system.killing import stop_processes

            PR_SET_CHILD_SUBREAPER = 36  # as the first process of a container is
            assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
            be("child", lambda: be("grandchild", stubborn=True))
            while len(descendants([os.getpid()])) < 2:
                time.sleep(0.005)
            [child] = children_of(os.getpid())
            outcome = stop_processes([identity_of(child)], grace=0.1, spare=lambda pid: False)
            os.waitpid(child, 0)
            try:
                print("left", os.waitpid(-1, os.WNOHANG))
            except ChildProcessError:
                print("nothing left of", len(outcome.stopped + outcome.killed))
            """
        ),
    )

    assert script.finish() == 0, script.transcript()
    assert "nothing left of 2" in script.output


def running_in(directory: Path) -> list[int]:
    """The processes whose script is in this directory."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(str(directory) in word for word in process.info["cmdline"] or ())
        and is_running(process.pid)
    ]


@contextlib.contextmanager
def frozen_by_the_kernel(pid: int) -> Iterator[None]:
    """Uninterruptible sleep that SIGKILL does not end: the freezer of cgroup v1."""
    group = Path("/sys/fs/cgroup/freezer") / f"orchard-test-{pid}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("needs a real cgroup v1 freezer, and to be root")
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        wait_until(lambda: state_of(pid) == "D")
        yield
    finally:
        (group / "freezer.state").write_text("THAWED")
        wait_until(lambda: not (group / "cgroup.procs").read_text() or state_of(pid) != "D")
        (Path("/sys/fs/cgroup/freezer/cgroup.procs")).write_text(str(pid))
        group.rmdir()


def test_the_children_of_a_process_that_got_the_pid_of_a_target_are_not_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A target that ends right after it was looked at may have lost its pid to a stranger."""
    source = "import subprocess; subprocess.run(['sh', '-c', 'echo $$; exec sleep 60'])"
    scan = processes.parents
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        child = identify(int(stranger.stdout.readline()))
        target = identify(stranger.pid)

        def a_moment_later() -> dict[int, tuple[int, float]]:
            rows = scan()
            return {**rows, target.pid: (os.getpid(), target.create_time + 1.0)}

        monkeypatch.setattr(processes, "parents", a_moment_later)
        try:
            stop_processes([target], grace=0.5, spare=lambda pid: False)
            assert processes.is_alive(child)
        finally:
            os.kill(child.pid, signal.SIGKILL)
