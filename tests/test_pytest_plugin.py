"""The fixtures, in a pytest of their own."""

from __future__ import annotations

import signal

import pytest

pytest_plugins = ["pytester"]

TESTS = """
    import os
    from pathlib import Path

    from orchard_infra import EnvironmentConfig, RunRegistry, managed_environment

    def test_the_factory_makes_isolated_configurations(infra_config, tmp_path):
        cfg = infra_config()
        assert isinstance(cfg, EnvironmentConfig)
        assert cfg.hardware.allow_process_kill is False
        assert tmp_path in cfg.hardware.lock_file_path.parents
        assert infra_config("other", allow_process_kill=True).project_name == "other"
        with managed_environment(cfg) as env:
            assert env.lock_path.exists()

    def test_the_environment_is_around_the_test(managed_env, tmp_path):
        assert managed_env.lock_path.exists()
        assert managed_env.run.pid == os.getpid()
        assert tmp_path in managed_env.lock_path.parents
        assert tmp_path in managed_env.tmp_dir.parents
        assert len(RunRegistry().runs()) == 1
        Path(os.environ["SEEN"], managed_env.run.run_id).write_text(str(managed_env.lock_path))

    def test_a_second_one_meets_nothing_of_the_first(managed_env):
        assert len(RunRegistry().runs()) == 1

    def test_a_failing_test_gives_everything_back_as_well(managed_env):
        Path(os.environ["SEEN"], managed_env.run.run_id).write_text(str(managed_env.lock_path))
        assert False
"""


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["alone", "under xdist"])
def test_the_fixtures_isolate_each_test(pytester, monkeypatch, options):
    seen = pytester.mkdir("seen")
    monkeypatch.setenv("SEEN", str(seen))
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess(*options)
    result.assert_outcomes(passed=3, failed=1)
    locks = [path.read_text() for path in seen.iterdir()]
    assert len(set(locks)) == 2
    assert not any(pytester.path.joinpath(lock).exists() for lock in locks)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_pytest_and_does_not_fail_one_test_of_many(pytester, name):
    """As a CI sends it that cancels a job."""
    pytester.makepyfile(
        f"""
        import os, signal
        def test_that_is_running(managed_env):
            os.kill(os.getpid(), signal.{name})
        def test_that_would_be_next():
            open("next", "w").close()
        """
    )
    result = pytester.runpytest_subprocess()
    assert result.ret == -getattr(signal, name)
    assert not pytester.path.joinpath("next").exists()


def test_loading_the_plugin_imports_no_part_of_the_package_that_costs(pytester):
    pytester.makepyfile(
        """
        import sys
        def test_nothing_is_loaded():
            costly = {"torch", "psutil", "portalocker", "attrs", "orchard_infra.manager"}
            assert not costly & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_the_fixtures_say_what_they_are(pytester):
    result = pytester.runpytest_subprocess("--fixtures", "-q")
    result.stdout.fnmatch_lines(["*infra_config*", "*managed_env*"])
