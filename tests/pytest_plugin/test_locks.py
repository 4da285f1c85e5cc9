"""`infra_lock` and ``--infra-lock``, between real workers and sessions of pytest."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from support import PATIENCE, wait_until

XDIST = ("-p", "xdist", "-n", "2")

EXCLUDED = """
    import os, time
    import pytest

    def alone(name):
        path = os.path.join(os.environ["SHARED"], name)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # fails if another one is here
        time.sleep(0.1)
        os.unlink(path)

    @pytest.fixture
    def device():
        alone("gpu0")
        yield
        alone("gpu0")

    @pytest.mark.infra_lock("gpu1")
    @pytest.mark.infra_lock("gpu0")
    @pytest.mark.parametrize("number", range(3))
    def test_with_both(number):
        alone("gpu0"); alone("gpu1")

    @pytest.mark.infra_lock("gpu0")
    @pytest.mark.infra_lock("gpu1")
    @pytest.mark.parametrize("number", range(3))
    def test_with_both_in_another_order(number):
        alone("gpu1"); alone("gpu0")

    @pytest.mark.infra_lock("gpu0")
    @pytest.mark.parametrize("number", range(2))
    def test_from_set_up_to_tear_down(number, device):
        alone("gpu0")
"""

HOLDER = """
    import os, time
    import pytest

    @pytest.mark.infra_lock("gpu0")
    def test_that_holds():
        if os.fork() == 0:  # like a worker of a DataLoader
            open("child", "w").close()
            time.sleep(600)
        while not os.path.exists("child"):
            time.sleep(0.01)
        open("holds", "w").write(str(os.getpid()))
        time.sleep(600)
"""

WAITER = """
    import pytest

    @pytest.mark.infra_lock("gpu0")
    def test_that_waits():
        pass
"""


@pytest.fixture
def holder(start, tmp_path):
    """A session whose test holds gpu0. The pid of that test's process is in the file ``holds``."""
    script = start("holder", HOLDER)
    wait_until((tmp_path / "holder" / "holds").exists, what=script.transcript)
    return script


@pytest.mark.slow
def test_one_test_at_a_time_has_a_lock(start, monkeypatch, tmp_path):
    """In four workers of two sessions. Two locks are taken in whatever order a test names them."""
    monkeypatch.setenv("SHARED", str(tmp_path))
    sessions = [start(name, EXCLUDED, *XDIST) for name in ("one", "two")]
    for session in sessions:
        assert session.finish() == 0, session.transcript()
        assert "8 passed" in session.output


@pytest.mark.slow
def test_who_waits_says_for_whom_and_goes_on_when_that_one_is_killed(start, holder, tmp_path):
    """Its children do not keep the lock. What was waited does not count for pytest-timeout."""
    pid = (tmp_path / "holder" / "holds").read_text()
    timed = ("-p", "pytest_timeout", "--timeout=2.5")
    waiter = start("waiter", WAITER, *timed)
    worker = start("worker", WAITER, "-p", "xdist", "-n", "1")
    who = f"waits for the lock gpu0: held by pid {pid} on "
    line = waiter.wait_for(who)
    assert line.startswith("test_waiter.py::test_that_waits")
    assert "test_holder.py::test_that_holds in " in line
    assert str(tmp_path / "holder") in line
    wait_until(lambda: who in worker.error_output, what=worker.transcript)
    assert "[gw0] test_worker.py" in worker.error_output

    impatient = start("impatient", WAITER.replace('"gpu0"', '"gpu0", timeout=0'))
    assert impatient.finish() == 1
    assert "1 error" in impatient.output
    assert "test_that_waits did not get the lock gpu0 (waited " in impatient.output
    assert f"held by pid {pid} on " in impatient.output
    assert "test_holder.py::test_that_holds in " in impatient.output

    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 2)  # longer than pytest-timeout allows
    os.kill(int(pid), signal.SIGKILL)
    for script in (waiter, worker):
        assert script.finish() == 0, script.transcript()
        assert "1 passed" in script.output
    assert "infra_lock" in waiter.output
    assert "s for gpu0: held by pid" in waiter.output


def test_a_wrong_mark_is_a_clear_error_of_its_test(pytester, run):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.infra_lock
        def test_1(): pass
        @pytest.mark.infra_lock("a/b")
        def test_2(): pass
        @pytest.mark.infra_lock("a", tmeout=3)
        def test_3(): pass
        @pytest.mark.infra_lock("a", timeout="3")
        def test_4(): pass
        @pytest.mark.infra_lock(7)
        def test_5(): pass
        @pytest.mark.infra_lock("a", timeout=None)
        @pytest.mark.infra_lock("b", timeout=1.5)
        def test_6(): pass
        """
    )
    result = run("-v", "--strict-markers")
    result.assert_outcomes(errors=5, passed=1)
    result.stdout.fnmatch_lines(
        [
            "infra_lock takes one name, as in infra_lock(*",
            "infra_lock: a name is up to 64 letters, * not 'a/b'",
            "infra_lock does not know tmeout; only timeout",
            "infra_lock: timeout must be seconds >= 0, or None; not '3'",
            "infra_lock: a name is up to 64 letters, * not 7",
        ]
    )


SESSION = """
    import os, time
    import pytest

    @pytest.mark.infra_lock("gpu0")
    @pytest.mark.parametrize("number", range(4))
    def test_it(number):
        os.close(os.open("one", os.O_CREAT | os.O_EXCL))
        time.sleep(0.05)
        os.unlink("one")
        open("running", "w").close()
        while not os.path.exists("go"):
            time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_session_holds_its_lock_and_its_tests_exclude_each_other(start, tmp_path):
    """The controller has it, so that its workers do not wait for it."""
    first = start("first", SESSION, "--infra-lock=gpu0", *XDIST)
    wait_until((tmp_path / "first" / "running").exists, what=first.transcript)

    second = start("second", WAITER, "--infra-lock=gpu0", "--infra-lock-timeout=0")
    collecting = start("collecting", WAITER, "--infra-lock=gpu0", "--co")
    (tmp_path / "ini").mkdir()
    (tmp_path / "ini" / "pytest.ini").write_text("[pytest]\ninfra_lock = gpu0\n")
    third = start("ini", WAITER)
    assert second.finish() == 75
    assert f"held by pid {first.pid} on " in second.transcript()
    assert collecting.finish() == 0
    line = third.wait_for("waits for the lock gpu0")
    assert line.startswith(f"this session waits for the lock gpu0: held by pid {first.pid}")

    (tmp_path / "first" / "go").touch()
    assert first.finish() == 0, first.transcript()
    assert third.finish(PATIENCE) == 0, third.transcript()
    assert not list(Path(os.environ["ORCHARD_INFRA_DIR"], "pytest").glob("*.lock"))
