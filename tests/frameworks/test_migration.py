"""The manager in the orchestrator of the re-imagined system, and what differs from its own one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from endings import ENDINGS, STATUS, end, runs_again, start
from support import is_running, run_python

EXAMPLE = Path(__file__).parents[2] / "examples" / "frameworks" / "orchard_ml.py"

ORCHESTRATED = f"""
    import runpy
    example = runpy.run_path({str(EXAMPLE)!r})
    manager = InfrastructureManager()
    orchestrator = example["Orchestrator"](example["Config"](), manager)
    with orchestrator:
        wait_for_the_end()
    print("went on")
"""
LOCK = "orchard-example.lock"


@pytest.mark.parametrize("ending", ENDINGS)
def test_however_an_orchestrated_run_ends_the_next_one_can_begin(
    tmp_path, runtime_directory, ending
):
    script = start(tmp_path, ORCHESTRATED)
    end(script, ending)
    assert script.returncode == STATUS[ending], script.transcript()
    assert ("went on" in script.output) == (ending == "normal end")
    assert (tmp_path / LOCK).exists() == (ending == "kill -9")
    if ending == "kill -9":
        assert runs_again(start(tmp_path, ORCHESTRATED), runtime_directory)
        assert not (tmp_path / LOCK).exists()


def test_a_second_run_is_refused_by_an_error_that_the_orchestrator_knows_and_not_killed(tmp_path):
    """The original terminates the live first run: it has the same script, and may kill."""
    first = start(tmp_path, ORCHESTRATED)
    first.wait_for("ready")
    second = start(tmp_path, ORCHESTRATED)
    assert second.finish() == 1
    assert "RuntimeError: cannot take the lock: " in second.error_output
    assert f"held by pid {first.pid}" in second.error_output
    assert is_running(first.pid)
    first.tell("end")
    assert first.finish() == 0, first.transcript()


def test_the_lock_excludes_a_run_that_still_uses_the_original_manager(tmp_path):
    """It opens the file for appending, and locks it with flock(2), without a record."""
    original = start(
        tmp_path,
        f"""
        import fcntl
        file = open({LOCK!r}, "a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        wait_for_the_end()
        """,
    )
    original.wait_for("ready")
    ours = run_python(tmp_path, EXAMPLE)
    assert ours.finish() == 1
    assert "cannot take the lock" in ours.error_output
    original.tell("end")
    assert original.finish() == 0
    # What it leaves is an empty file, which is no obstacle.
    assert run_python(tmp_path, EXAMPLE).finish() == 0


def test_the_orchestrator_of_orchard_ml_itself_takes_the_manager(tmp_path):
    """The real one, with stand-ins for what it imports and this environment does not have."""
    orchard_ml = Path(sys.prefix) / "orchard-ml"
    if not orchard_ml.is_dir():
        pytest.skip("needs orchard-ml, not installed: make test-frameworks")
    script = start(
        tmp_path,
        """
        import importlib.machinery, logging, sys
        sys.path.append(sys.argv[1])
        from unittest import mock
        while True:
            try:
                importlib.import_module("orchard.core.orchestrator")
                break
            except ModuleNotFoundError as error:
                spec = importlib.machinery.ModuleSpec(error.name, None)
                sys.modules[error.name] = mock.MagicMock(__path__=[], __spec__=spec)
        from pathlib import Path
        from unittest.mock import MagicMock
        from orchard.core.orchestrator import RootOrchestrator

        cfg = MagicMock()
        cfg.hardware.allow_process_kill = False
        cfg.hardware.project_name = "digits"
        cfg.hardware.lock_file_path = Path("digits.lock")
        parts = ("reporter", "time_tracker", "audit_saver", "seed_setter", "thread_applier",
                 "system_configurator", "static_dir_setup", "device_resolver")

        class Orchestrator(RootOrchestrator):
            def _phase_3_filesystem_provisioning(self):
                self.paths = MagicMock()  # the directories of a run need a whole configuration

        with Orchestrator(
            cfg,
            infra_manager=InfrastructureManager(),
            log_initializer=lambda *_, **__: logging.getLogger("orchard"),
            **{part: MagicMock() for part in parts},
        ):
            print("locked", current_environments()[-1].lock_path.exists(), flush=True)
        print("left", Path("digits.lock").exists(), current_environments())
        """,
        str(orchard_ml),
    )
    assert script.finish() == 0, script.transcript()
    assert script.output.splitlines() == ["locked True", "left False ()"]


def test_the_example_runs(tmp_path):
    script = run_python(tmp_path, EXAMPLE)
    assert script.finish() == 0, script.transcript()
    assert script.output.splitlines()[-1] == "left behind: False"
