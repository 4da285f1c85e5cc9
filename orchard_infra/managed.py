"""`managed_environment`: the front door, a context manager and a decorator."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Any, TypeVar, cast

from orchard_infra.config import HardwareAwareConfig, read_config
from orchard_infra.environment import Environment
from orchard_infra.errors import InfrastructureError
from orchard_infra.manager import InfraManagerProtocol, InfrastructureManager
from orchard_infra.runs.record import describe_this_run

_Function = TypeVar("_Function", bound=Callable[..., Any])


class managed_environment:
    """A clean start and a graceful stop for one run.

    >>> with managed_environment("digits") as env:
    ...     env.run.project
    'digits'

    ``cfg`` is anything with ``.hardware.allow_process_kill`` and ``.hardware.lock_file_path``, or
    the name of a project. ``manager`` does the work (an `InfrastructureManager` with the
    defaults unless given); ``logger`` is told of it (the one named "Infrastructure").

    As a decorator it holds the environment while the body of the function runs, at every call
    anew: for coroutines until they return, for generators until they are exhausted or closed.

    >>> @managed_environment("digits")
    ... def train():
    ...     return "trained"
    >>> train()
    'trained'

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
    ) -> None:
        self._cfg = cfg
        self._manager = manager
        self._logger = logger
        self._entered: InfraManagerProtocol | None = None

    def __enter__(self) -> Environment:
        if self._entered is not None:
            raise InfrastructureError(
                "this managed_environment is entered already; make one for each with-block"
            )
        manager = InfrastructureManager() if self._manager is None else self._manager
        cfg = cast(HardwareAwareConfig, self._cfg)
        env = manager.prepare_environment(cfg, self._logger)
        self._entered = manager
        return _unmanaged(self._cfg) if env is None else cast(Environment, env)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        manager, self._entered = self._entered, None
        if manager is None:
            raise InfrastructureError("this managed_environment was not entered")
        cfg = cast(HardwareAwareConfig, self._cfg)
        try:
            manager.release_resources(cfg, self._logger)
        except Exception as failure:
            if error is None:
                raise
            # Another manager than ours may raise here; the body's own exception matters more.
            log = self._logger or logging.getLogger("Infrastructure")
            log.error("release of the environment: %s", failure)

    def __call__(self, function: _Function) -> _Function:
        """Decorate ``function``; its name, signature and kind stay."""
        wrapper: Callable[..., Any]
        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
                with self._again():
                    inner = function(*args, **kwargs)
                    try:
                        item = await inner.__anext__()
                        while True:
                            # Nothing but the yield is tried: what the caller throws goes in.
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

        elif inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self._again():
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
                    return function(*args, **kwargs)

        return cast(_Function, wrapper)

    def _again(self) -> managed_environment:
        """One for this call alone: calls may overlap, and may come from several threads."""
        return managed_environment(self._cfg, manager=self._manager, logger=self._logger)


def _unmanaged(cfg: object) -> Environment:
    """What a block gets from a manager that yields nothing, such as a test double."""
    settings = read_config(cfg)
    return Environment(run=describe_this_run(settings.project), lock_path=settings.lock_path)
