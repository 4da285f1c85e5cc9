"""The fixtures, in a pytest of their own."""

from __future__ import annotations

import signal

import pytest

from orchard_infra import FileLock, Held, LockKey
from orchard_infra.runs.record import describe_this_run

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

    def test_environments_of_the_factory_are_together(managed_environment_factory, tmp_path):
        with managed_environment_factory("a") as one, managed_environment_factory("b") as other:
            assert {tmp_path} < set(one.tmp_dir.parents) & set(other.tmp_dir.parents)
            assert len(RunRegistry().runs()) == 2

    def test_what_is_left_open_of_the_factory(managed_environment_factory):
        env = managed_environment_factory("a", timeout=1).open()
        Path(os.environ["SEEN"], env.run.run_id).write_text(str(env.lock_path))
"""


@pytest.mark.parametrize("options", [[], ["-p", "xdist", "-n", "2"]], ids=["alone", "under xdist"])
def test_the_fixtures_isolate_each_test(pytester, run, monkeypatch, options):
    seen = pytester.mkdir("seen")
    monkeypatch.setenv("SEEN", str(seen))
    pytester.makepyfile(TESTS)
    run(*options).assert_outcomes(passed=5, failed=1)
    locks = [path.read_text() for path in seen.iterdir()]
    assert len(set(locks)) == 3
    assert not any(pytester.path.joinpath(lock).exists() for lock in locks)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_pytest_and_gives_the_environment_back(pytester, run, name):
    """As a CI sends it that cancels a job: it does not fail one test of many."""
    pytester.makepyfile(
        f"""
        import signal
        def test_that_is_running(managed_env):
            open("lock", "w").write(str(managed_env.lock_path))
            signal.raise_signal(signal.{name})
        def test_that_would_be_next():
            open("next", "w").close()
        """
    )
    result = run()
    # Ctrl-C is for pytest, and the others do what they do without us.
    expected = pytest.ExitCode.INTERRUPTED if name == "SIGINT" else -getattr(signal, name)
    assert result.ret == expected
    assert not pytester.path.joinpath("next").exists()
    lock = pytester.path.joinpath(pytester.path.joinpath("lock").read_text())
    assert lock.exists() is (name != "SIGINT")  # who is killed leaves the file, but not locked
    lease = FileLock().try_acquire(LockKey("test", lock), describe_this_run("test"))
    assert not isinstance(lease, Held)
    lease.release()


def test_loading_the_plugin_imports_no_part_of_the_package_that_costs(pytester, run):
    pytester.makepyfile(
        """
        import sys
        def test_nothing_is_loaded():
            costly = {"torch", "psutil", "portalocker", "attrs", "orchard_infra.manager"}
            assert not costly & set(sys.modules)
            ours = {name for name in sys.modules if name.startswith("orchard_infra.")}
            assert ours == {"orchard_infra._version", "orchard_infra.pytest_plugin"}
        """
    )
    run().assert_outcomes(passed=1)


def test_the_plugin_is_loaded_by_itself_and_says_what_it_has(pytester):
    result = pytester.runpytest_subprocess("--fixtures", "-q", "-p", "no:hydra_pytest")
    result.stdout.fnmatch_lines_random(
        ["*infra_config*", "*managed_env *", "*managed_environment_factory*"]
    )


@pytest.mark.parametrize(
    ("arguments", "ini", "message"),
    [
        (["--infra-leaks=maybe"], "", "*--infra-leaks: invalid choice: 'maybe'*"),
        ([], "infra_leaks = maybe", "*infra_leaks must be one of off, warn, error; not 'maybe'*"),
        (["--infra-lock=a/b"], "", "*--infra-lock: a name is up to 64 letters*not 'a/b'*"),
        (["--infra-lock-timeout=soon"], "", "*must be a number of seconds, not 'soon'*"),
    ],
)
def test_a_bad_value_is_a_clear_usage_error(pytester, run, arguments, ini, message):
    pytester.makeini(f"[pytest]\n{ini}\n")
    pytester.makepyfile("def test_it(): pass")
    result = run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
    result.stderr.no_fnmatch_line("*Traceback*")
