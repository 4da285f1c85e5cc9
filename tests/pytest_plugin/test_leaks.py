"""``--infra-leaks``: the guilty are named, and nobody else is blamed, stopped or removed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from support import is_running, require_module, run_python, wait_gone, wait_until

XDIST = ("-p", "xdist", "-n", "2", "--dist=loadscope")

GUILTY = """
    import os, signal, socket, subprocess, sys, tempfile, time
    import multiprocessing
    from multiprocessing.shared_memory import SharedMemory
    import pytest

    def note(what):
        with open("left", "a") as file:
            print(what, file=file)

    def sleep(*words):
        process = subprocess.Popen([*words, "sleep", "600"])
        note(process.pid)
        return process

    @pytest.fixture(scope="module")
    def untidy():
        note(tempfile.mkdtemp(prefix="untidy-"))
        yield sleep()

    def test_descriptor(): os.open(__file__, os.O_RDONLY)
    def test_socket(): socket.socket().detach()
    def test_orphan():
        subprocess.run("sleep 600 & echo $! >> left", shell=True)
    def test_daemon():
        # It is named, and goes on: who leaves the session as well is meant to.
        subprocess.run("setsid -f sh -c 'echo $$ > daemon; exec sleep 600'", shell=True)
        while not os.path.exists("daemon") or not open("daemon").read():
            time.sleep(0.01)
    def test_process(): sleep()
    def test_stubborn():
        process = subprocess.Popen(
            ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"],
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        note(process.pid)
    def test_worker():
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        process.start()
        note(process.pid)
    def test_fork():
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        note(pid)
    def test_failure():
        process = sleep()
        note(tempfile.mkdtemp())
        assert not process
    def test_directory():
        directory = tempfile.mkdtemp()
        os.makedirs(os.path.join(directory, "a", "b"))
        note(directory)
    def test_shared_memory():
        memory = SharedMemory(create=True, size=1)
        memory.close()
        note("/dev/shm/" + memory.name)
    def test_innocent(untidy): pass
"""

EXPECTED = {
    "test_descriptor": r"file descriptor \d+: /.*test_guilty.py \(left open\)",
    "test_socket": r"file descriptor \d+: socket:\[\d+\] \(left open\)",
    "test_orphan": r"process \d+: sleep 600 \(stopped\)",
    "test_daemon": r"process \d+: sleep 600 \(not stopped\)",
    "test_process": r"process \d+: sleep 600 \(stopped\)",
    "test_stubborn": r"process \d+: sh -c .* \(ignored SIGTERM, killed\)",
    "test_worker": r"process \d+: .*spawn_main.* \(stopped\)",
    "test_fork": r"process \d+: .*pytest.* \(stopped\)",
    "test_failure": r"process \d+: sleep 600 \(stopped\)\n  temporary directory \S+ \(removed\)",
    "test_directory": r"temporary directory \S+ \(removed\)",
    "test_shared_memory": r"shared memory /dev/shm/\S+ \(removed\)",
}


@pytest.mark.slow
def test_what_a_test_leaves_is_reported_with_its_name_and_cleared_away(pytester, run):
    pytester.makepyfile(test_guilty=GUILTY)
    result = run("--infra-leaks=error")
    result.assert_outcomes(passed=11, failed=1, errors=12)
    output = result.stdout.str()
    for name, words in EXPECTED.items():
        assert re.search(rf"^test_guilty.py::{name} left behind:\n  {words}", output, re.M), output
    fixture = "the module-scoped fixture untidy of test_guilty.py left behind:"
    result.stdout.fnmatch_lines(
        [fixture, "  process *: sleep 600 (stopped)", "  temporary directory */untidy-* (removed)"]
    )
    left = Path("left").read_text().split()
    assert len(left) == 11
    wait_gone(int(one) for one in left if one.isdigit())
    assert not [one for one in left if os.path.exists(one)]
    assert is_running(int(Path("daemon").read_text()))
    # Neither the resource tracker nor anybody else complains at the exit.
    assert "leaked" not in result.stderr.str()
    assert "resource_tracker" not in result.stderr.str()


def test_a_warning_fails_nothing_and_off_is_the_default(pytester, run):
    pytester.makepyfile(
        test_it="""
        import tempfile
        def test_one():
            open("one", "w").write(tempfile.mkdtemp())
        def test_other():
            open("other", "w").write(tempfile.mkdtemp(prefix="known-"))
        """
    )
    pytester.makeini("[pytest]\ninfra_leaks = warn\ninfra_leaks_ignore =\n    */known-*\n")
    result = run(*XDIST)
    result.assert_outcomes(passed=2, warnings=1)
    result.stdout.fnmatch_lines(["*InfraLeakWarning: test_it.py::test_one left behind:"])
    assert not os.path.exists(Path("one").read_text())
    assert os.path.exists(Path("other").read_text())

    pytester.makeini("")
    result = run()
    result.assert_outcomes(passed=2)
    assert os.path.exists(Path("one").read_text())


INNOCENT_CONFTEST = """
    import multiprocessing, os, subprocess, tempfile, threading
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing.shared_memory import SharedMemory
    import pytest

    @pytest.fixture(scope="session")
    def executors():
        "Workers are started when work is submitted, in the test."
        contexts = map(multiprocessing.get_context, ["fork", "forkserver", "spawn"])
        executors = [ProcessPoolExecutor(1, mp_context=context) for context in contexts]
        yield [executor.map for executor in executors]
        for executor in executors:
            executor.shutdown()

    @pytest.fixture(scope="module")
    def server():
        process = subprocess.Popen(["sleep", "600"], stdout=subprocess.PIPE)
        directory = tempfile.mkdtemp()
        memory = SharedMemory(create=True, size=1)
        yield process, directory, memory
        memory.close(); memory.unlink()
        os.rmdir(directory)
        process.terminate(); process.wait(); process.stdout.close()

    @pytest.fixture(scope="class")
    def lazy():
        "Starts a process when it is first used, and makes a directory."
        class Lazy:
            process = None
            def use(self):
                self.process = subprocess.Popen(["sleep", "600"])
                self.directory = tempfile.mkdtemp()
        return Lazy()

    @pytest.fixture(scope="session")
    def thread():
        "A thread that works while tests run: what it makes is not theirs."
        work, done = threading.Event(), threading.Event()
        # In files, so that no object leads to them.
        def serve():
            work.wait()
            with open(os.environ["MADE"], "w") as file:
                print(subprocess.Popen(["sleep", "600"]).pid, tempfile.mkdtemp(), file=file)
            done.set()
            work.clear(); work.wait()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield work, done
        work.set(); thread.join()
        if done.is_set():
            pid, directory = open(os.environ["MADE"]).read().split()
            os.kill(int(pid), 15)
            assert os.waitpid(int(pid), 0)
            os.rmdir(directory)
"""

INNOCENT = """
    import os, subprocess, sys, tempfile, threading
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing.shared_memory import SharedMemory
    import under_test as library

    at_import = [open(__file__), tempfile.mkdtemp(), subprocess.Popen(["sleep", "600"])]
    lazily = ProcessPoolExecutor(1)
    of_another = []

    def teardown_module():
        lazily.shutdown()
        library.end()
        for path in of_another: os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
        file, directory, process = at_import
        assert process.poll() is None
        process.terminate(); process.wait()
        os.rmdir(directory)
        file.close()

    def test_pools(executors):
        for submit in executors: assert list(submit(abs, [-1, -2])) == [1, 2]
    def test_server(server): pass
    def test_pool_of_the_module(): assert lazily.submit(abs, -1).result() == 1
    class TestLazy:
        def test_that_uses(self, lazy): lazy.use()
        def test_that_comes_later(self, lazy): assert lazy.process.poll() is None
        def test_that_ends_it(self, lazy):
            assert lazy.process.poll() is None
            lazy.process.terminate(); lazy.process.wait()
            os.rmdir(lazy.directory)
    def test_server_again(server):
        process, directory, memory = server
        assert process.poll() is None and os.path.isdir(directory)
        assert os.path.exists("/dev/shm/" + memory.name)
    def test_pools_again(executors): test_pools(executors)
    def test_thread(thread):
        work, done = thread
        work.set()
        assert done.wait(60)
    def test_own_directory(tmp_path, capfd, caplog, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        tempfile.mkdtemp()
    def test_what_the_code_under_test_keeps(): library.serve()
    def test_what_the_code_under_test_keeps_again():
        library.serve()
        assert library.server.poll() is None and os.path.isdir(library.directory)
    def test_a_cache_in_the_environment():
        "As matplotlib makes one when there is no home."
        os.environ["CACHE_OF_LIBRARY"] = tempfile.mkdtemp()
        open(os.environ["CACHES"], "a").write(os.environ["CACHE_OF_LIBRARY"] + "\\n")
    def test_a_name_that_was_taken(monkeypatch):
        "Nothing was made of the first name, which another program has."
        taken = tempfile.gettempdir() + f"/orchard-test-{os.getpid()}"
        os.mkdir(taken)
        of_another.append(taken)
        names = iter([os.path.basename(taken), os.path.basename(taken) + "-free"])
        monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: names)
        os.rmdir(tempfile.mkdtemp(prefix=""))
    def test_memory_of_another_process_with_the_same_name():
        name = f"orchard-test-{os.getpid()}"
        memory = SharedMemory(name, create=True, size=1)
        memory.close(); memory.unlink()
        of_another.append(f"/dev/shm/{name}")
        subprocess.run(["touch", of_another[-1]])
    def test_that_is_tidy():
        with tempfile.TemporaryDirectory(), open(__file__), subprocess.Popen(["true"]): pass
    def test_that_has_just_asked(): subprocess.Popen(["sleep", "600"]).terminate()
    def test_import(tmp_path, monkeypatch):
        "A library that makes a cache for the process."
        (tmp_path / "library.py").write_text("import tempfile; CACHE = tempfile.mkdtemp()")
        monkeypatch.syspath_prepend(tmp_path)
        import library
        open(os.environ["CACHES"], "a").write(library.CACHE + "\\n")
    def test_environment(managed_env): pass
    def test_environment_again(managed_env): pass
"""

UNDER_TEST = """
    import os, subprocess, tempfile

    server = directory = None

    def serve():
        "Once for the program."
        global server, directory
        if server is None:
            server = subprocess.Popen(["sleep", "600"])
            directory = tempfile.mkdtemp()

    def end():
        if server is not None:
            server.terminate(); server.wait()
            os.rmdir(directory)
"""

JOBLIB = """
    import joblib
    def work(): return joblib.Parallel(2)(joblib.delayed(abs)(-i) for i in range(3))
    def test_joblib(): assert work() == [0, 1, 2]
    def test_joblib_again(): assert work() == [0, 1, 2]
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), XDIST], ids=["alone", "under xdist"])
def test_nobody_is_blamed_for_what_belongs_to_somebody_else(
    pytester, run, options, tmp_path, monkeypatch
):
    """And nothing of theirs is stopped or removed, nor of other programs on the machine."""
    monkeypatch.setenv("CACHES", str(tmp_path / "caches"))
    monkeypatch.setenv("MADE", str(tmp_path / "made"))
    neighbour = run_python(
        tmp_path,
        """
        import tempfile, time
        from multiprocessing.shared_memory import SharedMemory
        while True:
            memory = SharedMemory(create=True, size=1)
            memory.close()
            print(tempfile.mkdtemp(), "/dev/shm/" + memory.name, flush=True)
            time.sleep(0.1)
        """,
    )
    neighbour.wait_for("shm")
    pytester.makeconftest(INNOCENT_CONFTEST)
    pytester.makepyfile(test_innocent=INNOCENT, under_test=UNDER_TEST)
    if not options:
        require_module("joblib")
        pytester.makepyfile(test_joblib=JOBLIB)
    result = run("--infra-leaks=error", "-p", "pytest_timeout", "--timeout=100", *options)

    result.assert_outcomes(passed=20 + (0 if options else 2))
    theirs = neighbour.output.split()
    caches = (tmp_path / "caches").read_text().split()
    assert len(theirs) > 4
    assert [path for path in theirs + caches if not os.path.exists(path)] == []
    neighbour.stop()
    for path in theirs:
        if path.startswith("/dev/shm/"):
            Path(path).unlink(missing_ok=True)  # its resource tracker removes them, too


FAKE_TORCH = """
    import sys, types

    class Storage:
        def __init__(self, size): self.size = size
        def data_ptr(self): return id(self)
        def nbytes(self): return self.size

    class Tensor:
        living = {}
        def __init__(self, size):
            self.device = types.SimpleNamespace(type="cuda", __str__=lambda: "cuda:0")
            self.storage = Storage(size)
            self.living[id(self)] = size
        def __del__(self): del self.living[id(self)]
        def untyped_storage(self): return self.storage

    class Device:
        type = "cuda"
        def __str__(self): return "cuda:0"
    torch = types.ModuleType("torch")
    torch.Tensor = Tensor
    _init = Tensor.__init__
    def init(self, size):
        _init(self, size)
        self.device = Device()
    Tensor.__init__ = init
    torch.workspace = 0
    used = lambda index=0: sum(Tensor.living.values()) + torch.workspace
    torch.cuda = types.SimpleNamespace(
        is_initialized=lambda: True, empty_cache=lambda: None, device_count=lambda: 1,
        memory_allocated=used, memory_reserved=used,
    )
    sys.modules["torch"] = torch
"""

DEVICE = """
    import pytest, torch

    kept = []

    @pytest.fixture(scope="module")
    def model(): return {"weights": [torch.Tensor(5)], "cache": []}
    @pytest.fixture
    def batch(): return torch.Tensor(6)

    def test_wide(model): pass
    def test_cached(model): model["cache"].append(torch.Tensor(7))
    def test_tidy(batch): assert torch.Tensor(8)
    def test_workspace(): torch.workspace += 100
    def test_failure(batch):
        large = torch.Tensor(50)
        assert not large
    def test_after(): assert 50 not in torch.Tensor.living.values()
    def test_guilty():
        globals()["leaked"] = torch.Tensor(9)
"""


def test_device_memory_is_of_the_test_that_keeps_it_and_no_traceback_keeps_any(pytester, run):
    """With a stand-in for torch, which counts tensors as torch's allocator counts bytes."""
    pytester.makeconftest(FAKE_TORCH)
    pytester.makepyfile(test_device=DEVICE)
    result = run("--infra-leaks=error")
    result.assert_outcomes(passed=6, failed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "test_device.py::test_guilty left behind:",
            "  device memory: 9 bytes in tensors on cuda:0 (cache emptied)",
        ]
    )


@pytest.mark.gpu
def test_device_memory_of_a_real_gpu(pytester, run):
    pytester.makepyfile(
        test_device="""
        import torch
        def test_workspace():  # it stays, and is nobody's leak
            one = torch.ones(64, 64, device="cuda")
            (one @ one).sum().item()
        def test_failure():
            large = torch.ones(1000, 1000, device="cuda")
            assert not large.numel()
        def test_after(): assert torch.cuda.memory_allocated() < 30_000_000
        def test_guilty(): globals()["leaked"] = torch.ones(1000, device="cuda")
        """
    )
    result = run("--infra-leaks=error")
    result.assert_outcomes(passed=3, failed=1, errors=1)
    result.stdout.fnmatch_lines(["  device memory: 4000 bytes in tensors on cuda:0 *"])


def test_a_clock_that_a_fixture_has_stopped_hangs_nothing(pytester, run):
    pytester.makepyfile(
        """
        import os, subprocess, sys, time, pytest
        @pytest.fixture(scope="module", autouse=True)
        def stopped():
            clock, time.monotonic = time.monotonic, lambda: 5.0
            yield
            time.monotonic = clock
        def test_descriptor(): os.open(__file__, os.O_RDONLY)
        def test_stubborn():
            code = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); input()"
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            subprocess.Popen([sys.executable, "-c", code], **pipes).stdout.read(1)
        """
    )
    result = run("--infra-leaks=error")
    result.assert_outcomes(passed=2, errors=2)
    result.stdout.fnmatch_lines(["*left open*", "*ignored SIGTERM, killed*"])


def test_a_leak_is_found_also_right_after_an_environment(pytester, run):
    """Whose background thread is about to end: it was not that one that started the process."""
    pytester.makepyfile(
        """
        import subprocess, threading
        def test_environment(managed_env): pass
        def test_leak():
            for thread in threading.enumerate():
                if thread.name.startswith("orchard-infra"):
                    process = subprocess.Popen(["sleep", "600"])
                    thread.join()
        """
    )
    result = run("--infra-leaks=error")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*test_leak left behind:", "  process *: sleep 600 (stopped)"])


@pytest.mark.parametrize("error", ["OSError", "RuntimeError"])
def test_where_nothing_can_be_seen_nobody_is_judged(pytester, run, error):
    """A fixture that replaces the file system, for several tests, hides what was there before."""
    pytester.makepyfile(
        """
        import os, subprocess, pytest
        # Not as it is: nothing leads to the process.
        number = subprocess.Popen(["sleep", "600"], start_new_session=True).pid + 2**40
        pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
        class TestBlind:
            @pytest.fixture(scope="class", autouse=True)
            def blind(self):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(os, "listdir", self.fail)
                    patch.setattr(os, "readlink", self.fail)
                    yield
            def fail(self, *arguments): raise ERROR
            def test_one(self): os.open(__file__, os.O_RDONLY)
            def test_two(self): pass
        def test_that_sees():
            os.kill(number - 2**40, 0)
            os.open(__file__, os.O_RDONLY)
        def teardown_module(): os.kill(number - 2**40, 9)
        """.replace("ERROR", error)
    )
    result = run("--infra-leaks=error")
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_that_sees*", "*left open*"])


def test_ctrl_c_ends_pytest_and_what_the_test_had_started(start, tmp_path):
    script = start(
        "interrupted",
        """
        import os, signal, subprocess
        def test_that_is_running():
            open("pid", "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
            signal.raise_signal(signal.SIGINT)
        """,
        "--infra-leaks=warn",
    )
    assert script.finish() == pytest.ExitCode.INTERRUPTED, script.transcript()
    pid = int((tmp_path / "interrupted" / "pid").read_text())
    wait_until(lambda: not is_running(pid))
    assert "test_that_is_running left behind:" in script.output
