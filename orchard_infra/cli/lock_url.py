"""The option ``--lock-url``: where it comes from, and that no password is in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


def lock_url_option(help_: str) -> Callable[[_Command], _Command]:
    """``--lock-url``; without it, what ORCHARD_INFRA_LOCK_URL says. None is no server."""
    return click.option("--lock-url", metavar="URL", callback=_checked, help=help_)


def _checked(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    from orchard_infra.locks.urls import URL_VARIABLE, has_password

    if value is None:
        return os.environ.get(URL_VARIABLE) or None
    if not value:  # an empty one is stronger than the variable
        return None
    if has_password(value):
        raise click.BadParameter(
            "it contains a password, which everybody on this machine can read there. Put the URL "
            f"into the variable {URL_VARIABLE}, or into a file of yours and give file:PATH. Or "
            "leave the password out: libpq has PGPASSFILE and services, redis has REDISCLI_AUTH"
        )
    return value
