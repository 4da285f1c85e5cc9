"""One environment for every test: nothing of the machine's jobs, directories of its own for what
runs share and for temporary files, and nothing left running.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hosts import network as network
from servers import postgres as postgres
from servers import redis_server as redis_server
from support import TEST_MARK, stop_everything_started

# A rank, a scheduler or a live run around the test suite would change what the package does.
_FOREIGN = re.compile(
    r"(|LOCAL_|GROUP_|NODE_|ROLE_|CROSS_)(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|JOB_ID"
    r"|CUDA_VISIBLE_DEVICES"
    r"|(SLURM|SBATCH|PBS|LSB|LSF|SGE|_?CONDOR|FLUX|OAR|COBALT|MOAB|PJM|TRAINING_JOB|SM|CLOUD_ML"
    r"|AZUREML|AWS_BATCH|AZ_BATCH|RAY|NOMAD|KUBERNETES|HOROVOD|OMPI|MV2|PALS|PMI|PMIX|MPI|JSM"
    r"|ACCELERATE|TORCHELASTIC|PL|SUBMITIT|ORCHARD_INFRA)_.*"
)

# Skips that say what the machine is, not what somebody forgot to install: "needs a real GPU".
_ALLOWED_SKIPS = (
    "needs a real ",
    "needs another user",
    "needs permission",
    "needs Windows",
    "needs macOS",
    "got empty parameter set",
)

# Under nohup, or in the background of a script, these are ignored, and so they would be by
# everything that a test starts.
for _name, _default in (
    ("SIGINT", signal.default_int_handler),
    ("SIGHUP", signal.SIG_DFL),
    ("SIGQUIT", signal.SIG_DFL),
):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _default)


# The tests start thousands of Pythons. Each would compile the package anew, in 0.1 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No rank, scheduler or run in the environment; afterwards, no process of the test."""
    for name in list(os.environ):
        if _FOREIGN.fullmatch(name):
            monkeypatch.delenv(name)
    # Not below tmp_path: that is long, and two tests of one file would see each other's names.
    ours = Path(tempfile.mkdtemp(prefix="oi-"))
    mark = uuid.uuid4().hex
    for name, variable in (("run", "ORCHARD_INFRA_DIR"), ("tmp", "TMPDIR")):
        (ours / name).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(ours / name))
    monkeypatch.setenv(TEST_MARK, mark)
    before = set(psutil.pids())
    try:
        yield
    finally:
        stop_everything_started(mark, tmp_path, before)
        shutil.rmtree(ours, ignore_errors=True)


@pytest.fixture(autouse=True)
def one_of_a_group_at_a_time(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Tests of one ``xdist_group`` exclude each other, in whichever workers they are."""
    marker = request.node.get_closest_marker("xdist_group")
    if marker is None or sys.platform == "win32":
        yield
        return
    import fcntl

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each worker has a directory in there
    with open(shared / re.sub(r"\W", "-", str(marker.args[0])), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays in one worker, or else each worker would start the servers of each file; and so
    do the files of one group, or else a worker would wait for the other one.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_or_file(config.rootpath, nodeid.partition("::")[0])

    return ByFile(config, log)


@functools.cache
def _group_or_file(root: Path, file: str) -> str:
    mark = re.search(r"^pytestmark = .*xdist_group\((.+?)\)", (root / file).read_text(), re.M)
    return file if mark is None else mark[1]


@pytest.fixture
def runtime_directory() -> Path:
    """The per-user runtime directory as this test, and what it starts, sees it."""
    return Path(os.environ["ORCHARD_INFRA_DIR"])


@pytest.fixture
def require_tool() -> Callable[[str], str]:
    """The path of a program that a test needs; the test is skipped where there is none.

    With CI=true that skip is a failure, see scripts/install-test-servers.
    """

    def find(name: str) -> str:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"needs {name}: run scripts/install-test-servers")
        return found

    return find


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.CollectReport | pytest.TestReport) -> None:
    """Under CI=true a test that is skipped because something is missing has failed."""
    if not report.skipped or hasattr(report, "wasxfail") or not _under_ci():
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(words in reason for words in (*_ALLOWED_SKIPS, *_known_to_be_missing())):
        report.outcome = "failed"
        report.longrepr = f"{reason}\n(under CI=true a skip for something missing is a failure)"


def _under_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def _known_to_be_missing() -> list[str]:
    # Set by `make test-all-pythons`, which tests without torch on purpose.
    return os.environ.get("TESTS_WITHOUT", "").split()
