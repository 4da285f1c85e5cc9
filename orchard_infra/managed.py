"""`managed_environment`: the front door, a context manager and a decorator."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Any, TypeGuard, TypeVar, cast

from orchard_infra.config import HardwareAwareConfig, Settings, read_config
from orchard_infra.environment import Environment
from orchard_infra.errors import InfrastructureError
from orchard_infra.manager import (
    LOCKERS_TIMEOUT,
    InfraManagerProtocol,
    InfrastructureManager,
    LockersTimeout,
)
from orchard_infra.runs.record import describe_this_run
from orchard_infra.session import Session, open_sessions

_Function = TypeVar("_Function", bound=Callable[..., Any])


class managed_environment:
    """A clean start and a graceful stop for one run.

    >>> with managed_environment("digits") as env:
    ...     env.run.project
    'digits'

    ``cfg`` is anything with ``.hardware.allow_process_kill`` and ``.hardware.lock_file_path``, or
    the name of a project. ``manager`` does the work (an `InfrastructureManager` with the
    defaults unless given); ``logger`` is told of it (the one named "Infrastructure").
    ``timeout`` is how long to wait for another run of the project, in seconds: 0 fails at once,
    None waits for ever, and without it the manager's locker decides.

    ``async with`` waits for the lock without blocking the event loop.

    As a decorator it makes a new environment for each call, and holds it while the body of the
    function runs: for coroutines until they return, for generators until they are exhausted or
    closed.

    >>> @managed_environment("digits")
    ... def train():
    ...     return "trained"
    >>> train()
    'trained'

    Over the cells of a notebook, `open` and `Environment.close` take the place of the block:

    >>> env = managed_environment("digits").open()
    >>> env.close()

    Raises on entry:
        ConfigurationError: ``cfg`` cannot be used; nothing was touched.
        EnvironmentLockedError: Another run holds the project.
        InfrastructureError: Something else is in the way; the message names it.

    Raises on exit:
        ReleaseError: Steps of the release failed, and the body did not.
    """

    def __init__(
        self,
        cfg: HardwareAwareConfig | str,
        *,
        manager: InfraManagerProtocol | None = None,
        logger: logging.Logger | None = None,
        timeout: float | LockersTimeout | None = LOCKERS_TIMEOUT,
    ) -> None:
        self._cfg = cfg
        self._manager = InfrastructureManager() if manager is None else manager
        self._logger = logger
        self._timeout = timeout
        self._session: Session | _ForeignSession | None = None

    def __enter__(self) -> Environment:
        session = self._new_session()
        try:
            return session.prepare()
        except BaseException as error:
            self._give_up(session, error)
            raise

    def _give_up(self, session: Session | _ForeignSession, error: BaseException) -> None:
        try:
            self._session = None
            session.close(error)  # a Ctrl-C may have come when all was prepared
        finally:
            if not session.is_closed:  # a second one came before the release could begin
                session.close(error)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        session, self._session = self._session, None
        if session is None:
            raise InfrastructureError("this managed_environment was not entered")
        try:
            session.close(error)
        except BaseException as interrupt:
            if not session.is_closed:  # a Ctrl-C came before the release could begin
                session.close(interrupt)
            raise

    async def __aenter__(self) -> Environment:
        session = self._new_session()
        try:
            return await session.prepare_async()
        except BaseException as error:
            self._give_up(session, error)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    def open(self, *, reopen: bool = False) -> Environment:
        """Enter the environment without a block. `close` releases it, or else the program's end.

        When the handle got lost, `orchard_infra.current_environments` has it.

        ``reopen`` is for the cell of a notebook, which is run again and again: an environment of
        this project that this thread has opened before is released first. Without it, that is
        an error.
        """
        if reopen:
            _close_opened(read_config(self._cfg))
            if isinstance(self._session, _ForeignSession) and self._session.is_opened:
                self.close()
        env = self.__enter__()
        if self._session is not None:
            self._session.is_opened = True
        return env

    def close(self) -> None:
        """Release what `open` has entered. A second call does nothing.

        Raises:
            ReleaseError: Steps failed.
        """
        if self._session is not None:
            self.__exit__(None, None, None)

    def __call__(self, function: _Function) -> _Function:
        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
                async with self._again():
                    inner = function(*args, **kwargs)
                    try:
                        item = await inner.__anext__()
                        while True:
                            # Only the yield: what the caller throws goes into the generator.
                            try:
                                sent = yield item
                            except GeneratorExit:
                                raise
                            except BaseException as error:
                                item = await inner.athrow(error)
                            else:
                                item = await inner.asend(sent)
                    except StopAsyncIteration:
                        return
                    finally:
                        await inner.aclose()

        elif _is_coroutine_function(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                async with self._again():
                    return await function(*args, **kwargs)

        elif inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
                with self._again():
                    return (yield from function(*args, **kwargs))

        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self._again():
                    result = function(*args, **kwargs)
                    _refuse_unprotected(function, result)
                    return result

        return cast(_Function, wrapper)

    def _again(self) -> managed_environment:
        """One for this call alone: calls may overlap, and may come from several threads."""
        return managed_environment(
            self._cfg, manager=self._manager, logger=self._logger, timeout=self._timeout
        )

    def _new_session(self) -> Session | _ForeignSession:
        """The session is kept before it is prepared: a Ctrl-C right after that must find it."""
        # One that is closed was closed by `Environment.close`, or to be opened again.
        is_over = isinstance(self._session, Session) and self._session.is_closed
        if self._session is not None and not is_over:
            raise InfrastructureError(
                "this managed_environment is entered already; make one for each with-block"
            )
        manager = self._manager
        if _is_ours(manager):
            self._session = manager.session(self._cfg, self._logger, timeout=self._timeout)
        elif isinstance(self._timeout, LockersTimeout):
            self._session = _ForeignSession(manager, self._cfg, self._logger)
        else:
            raise InfrastructureError(
                f"timeout={self._timeout!r} needs an InfrastructureManager; how long "
                f"{type(manager).__name__} waits is its own affair"
            )
        return self._session


def _close_opened(settings: Settings) -> None:
    """Release what this thread has opened for a project and has not closed."""
    for session in reversed(open_sessions()):
        is_same = session.settings.lock_path == settings.lock_path
        if session.is_opened and is_same and session.thread == threading.get_ident():
            session.close()


def _is_ours(manager: object) -> TypeGuard[InfrastructureManager]:
    """Whether it is our manager, and no subclass that prepares or releases in its own way."""
    if not isinstance(manager, InfrastructureManager):
        return False
    kind = type(manager)
    return (
        kind.prepare_environment is InfrastructureManager.prepare_environment
        and kind.release_resources is InfrastructureManager.release_resources
    )


class _ForeignSession:
    """Another manager than ours, driven by its protocol: it is released by its configuration."""

    def __init__(
        self, manager: InfraManagerProtocol, cfg: Any, logger: logging.Logger | None
    ) -> None:
        self._manager = manager
        self._cfg = cfg
        self._logger = logger
        self._is_prepared = False
        self.is_opened = False
        self.is_closed = True  # and not to be closed again

    def prepare(self) -> Environment:
        env = self._manager.prepare_environment(self._cfg, self._logger)
        self._is_prepared = True
        if env is not None:
            return cast(Environment, env)
        # What a block gets from a manager that yields nothing, such as a test double.
        settings = read_config(self._cfg)
        return Environment(run=describe_this_run(settings.project), lock_path=settings.lock_path)

    async def prepare_async(self) -> Environment:
        return self.prepare()

    def close(self, error: BaseException | None) -> None:
        if not self._is_prepared:
            return
        try:
            self._manager.release_resources(self._cfg, self._logger)
        except Exception as failure:
            if error is None:
                raise
            # The body's own exception matters more.
            log = self._logger or logging.getLogger("Infrastructure")
            log.error("release of the environment: %s", failure)


def _is_coroutine_function(function: object) -> bool:
    """Whether calling it makes a coroutine, also for an object with an async ``__call__``."""
    return inspect.iscoroutinefunction(function) or (
        not inspect.isroutine(function)
        and inspect.iscoroutinefunction(getattr(type(function), "__call__", None))  # noqa: B004
    )


def _refuse_unprotected(function: object, result: object) -> None:
    """Refuse what runs only after the environment is released: the coroutine or generator of a
    function that another decorator hides.

    Raises:
        InfrastructureError: ``result`` is one. It was not started, and is closed.
    """
    code = getattr(inspect.unwrap(cast(Any, function)), "__code__", None)
    if inspect.isawaitable(result):
        kind = "an awaitable"
    elif inspect.isgenerator(result) and result.gi_code is code:
        kind = "a generator"
    elif inspect.isasyncgen(result) and result.ag_code is code:
        kind = "an async generator"
    else:
        return
    if inspect.iscoroutine(result):
        result.close()  # else Python says that it was never awaited
    name = getattr(function, "__qualname__", repr(function))
    raise InfrastructureError(
        f"{name}() returned {kind}, which would run after the environment was released. Put "
        "@managed_environment right above the function itself, below its other decorators"
    )
