"""The pytest plugin: fixtures, `infra_lock`, and a look at what each test leaves behind.

pytest loads this in every project that has the package installed, so it imports nothing until a
fixture, a lock or ``--infra-leaks`` is used. Everything is safe under pytest-xdist.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from orchard_infra.config import EnvironmentConfig
    from orchard_infra.environment import Environment
    from orchard_infra.managed import managed_environment
    from orchard_infra.manager import InfrastructureManager
    from orchard_infra.pytest_plugin.locking import Locks

__all__ = [
    "InfraLeakWarning",
    "infra_config",
    "managed_env",
    "managed_environment_factory",
]

_MODES = ("off", "warn", "error")
_MARKER = (
    "infra_lock(name, timeout=None): run the test while it holds the lock of this name, which no "
    "other test of this user has meanwhile; wait at most `timeout` seconds for it, or for ever"
)
_locks = pytest.StashKey["Locks"]()
_refusal = pytest.StashKey[Exception]()


class InfraLeakWarning(pytest.PytestWarning):
    """A test, or a fixture of wider scope, left something behind (``--infra-leaks=warn``)."""


@pytest.fixture
def infra_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., EnvironmentConfig]:
    """A factory of configurations that meet no run outside of the test.

    ``infra_config(project_name="test")`` has its lock and its run record below ``tmp_path``, and
    does not allow killing. It takes the other arguments of `EnvironmentConfig` as well.
    """
    from orchard_infra.config import EnvironmentConfig

    monkeypatch.setenv("ORCHARD_INFRA_DIR", str(_directory(tmp_path)))

    def make(project_name: str = "test", **options: object) -> EnvironmentConfig:
        return EnvironmentConfig(project_name, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def managed_environment_factory(
    infra_config: Callable[..., EnvironmentConfig], tmp_path: Path
) -> Iterator[Callable[..., managed_environment]]:
    """A factory of isolated environments, for tests that need several, or open them themselves.

    ``managed_environment_factory("test")`` is a `managed_environment` whose files are all below
    ``tmp_path`` and which installs no signal handlers: use it with ``with``, ``async with``, as a
    decorator, or call ``.open()``. It takes ``timeout`` and ``manager``, and the other arguments of
    `EnvironmentConfig`. What is still open when the test ends is released then.
    """
    from orchard_infra.managed import managed_environment
    from orchard_infra.session import current_environments

    def make(
        project_name: str = "test",
        *,
        manager: InfrastructureManager | None = None,
        **options: Any,
    ) -> managed_environment:
        waits = {"timeout": options.pop("timeout")} if "timeout" in options else {}
        return managed_environment(
            infra_config(project_name, **options),
            manager=_manager(tmp_path) if manager is None else manager,
            **waits,
        )

    yield make
    for env in reversed(current_environments()):
        if tmp_path in env.lock_path.parents:  # else it is another thread's
            env.close()


@pytest.fixture
def managed_env(
    managed_environment_factory: Callable[..., managed_environment],
) -> Iterator[Environment]:
    """The environment around one test: prepared before it, released after it.

    It installs no signal handlers, and ``tmp_dir`` is below ``tmp_path``.
    """
    with managed_environment_factory() as env:
        yield env


def _manager(tmp_path: Path) -> InfrastructureManager:
    from orchard_infra.artifacts.temporary import TemporaryArtifacts
    from orchard_infra.manager import InfrastructureManager

    return InfrastructureManager(
        # A CI that cancels a job sends SIGTERM. As an exception it would fail the test that is just
        # running, and pytest would go on to the next one.
        stopper=None,
        # No later run looks for what a killed test left: the record of it is below tmp_path, too.
        cleaner=TemporaryArtifacts(base=_directory(tmp_path)),
    )


def _directory(tmp_path: Path) -> Path:
    directory = tmp_path / "orchard-infra"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("infra", "one device, and nothing left behind (orchard_infra)")
    group.addoption(
        "--infra-lock",
        action="append",
        metavar="NAME",
        help="hold the lock of this name for the whole session; may be given several times",
    )
    group.addoption(
        "--infra-lock-timeout",
        metavar="SECONDS",
        help="how long the session waits for its locks, and a test whose mark does not say; "
        "for ever unless given",
    )
    group.addoption(
        "--infra-leaks",
        choices=_MODES,
        help="what to do when a test leaves processes, shared memory, temporary directories, file "
        "descriptors or device memory behind: nothing (off), warn, or fail (error)",
    )
    parser.addini("infra_lock", "names of locks that the session holds", type="args", default=[])
    parser.addini("infra_lock_timeout", "as --infra-lock-timeout, in seconds", default="")
    parser.addini("infra_leaks", "as --infra-leaks: off, warn or error", default="off")
    parser.addini(
        "infra_leaks_ignore",
        "patterns (see fnmatch) of what is no leak: a command line, a path, pipe:*",
        type="linelist",
        default=[],
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)
    mode = config.getoption("infra_leaks") or config.getini("infra_leaks")
    if mode not in _MODES:
        raise pytest.UsageError(f"infra_leaks must be one of off, warn, error; not {mode!r}")
    _timeout(config)
    if mode != "off":
        from orchard_infra.pytest_plugin.leaks import LeakWatch

        watch = LeakWatch(config, is_error=mode == "error")
        config.pluginmanager.register(watch, "infra-leaks")
        config.add_cleanup(watch.close)


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    names = config.getoption("infra_lock") or config.getini("infra_lock")
    # The controller of xdist holds them. A worker that waited for one would wait for the
    # controller, which waits for it.
    if names and not hasattr(config, "workerinput") and not config.option.collectonly:
        _locks_of(config).hold_for_session(names, _timeout(config))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist: tell a worker which locks its session holds."""
    locks = node.config.stash.get(_locks, None)
    node.workerinput["infra_locks"] = {} if locks is None else locks.of_session


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hold the locks of a test from before its fixtures are set up until all is torn down.

    They are waited for out here, before pytest-timeout starts its clock, and while output is not
    captured: a person sees who is waited for.
    """
    if not any(item.iter_markers("infra_lock")) or item.config.option.setuponly:
        return (yield)
    locks = _locks_of(item.config)
    try:
        try:
            locks.hold_for_test(item, _timeout(item.config))
        except Exception as error:  # told when the test is set up: it is that test's error
            item.stash[_refusal] = error
        return (yield)
    finally:
        locks.release_those_of_test()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    refusal = item.stash.get(_refusal, None)
    if refusal is not None:
        del item.stash[_refusal]
        pytest.fail(str(refusal), pytrace=False)


def _locks_of(config: pytest.Config) -> Locks:
    if _locks not in config.stash:
        from orchard_infra.pytest_plugin.locking import Locks

        config.stash[_locks] = locks = Locks(config)
        config.add_cleanup(locks.release_all)
    return config.stash[_locks]


def _timeout(config: pytest.Config) -> float | None:
    given = config.getoption("infra_lock_timeout") or config.getini("infra_lock_timeout")
    if not given:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:  # also refuses NaN
        raise pytest.UsageError(f"infra_lock_timeout must be a number of seconds, not {given!r}")
    return seconds
