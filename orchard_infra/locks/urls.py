"""The address of a server that carries locks: where it is found, and how it is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import attrs

from orchard_infra.errors import ConfigurationError
from orchard_infra.runs.record import RunRecord, to_json

if TYPE_CHECKING:
    from orchard_infra.locks.base import ServerLock

URL_VARIABLE = "ORCHARD_INFRA_LOCK_URL"
POSTGRES_SCHEMES = ("postgresql", "postgres")
REDIS_SCHEMES = ("redis", "rediss", "unix")

# A name, a colon and a password before the host. "@", "/" and "?" should be escaped in a password.
# Where they are not, an error quotes it, so everything up to the last "@" is taken for it.
# A port is none: what follows it has no "@", but for that of a query.
_IN_ADDRESS = re.compile(r"(?<=://)([^/\s@:]*):(?!\d+(?:[,\s]|/[^@\s?]*(?:[?\s]|$)|$))\S*@")
# As libpq and redis-py have it, in the query of an address or in a list, with quotes or without.
_SETTING = re.compile(
    r"(\b\w*(?:password|passwd|secret|token)\s*=\s*)('(?:\\.|[^'\\])*(?:'|$)|(?:\\.|[^\s&])+)",
    re.DOTALL | re.IGNORECASE,
)

_SETTINGS = re.compile(r"\s*\w+\s*=")  # of libpq: host=db dbname=locks, service=locks ...

_OPTIONS = re.compile(r"#(\w+=[^@#/]*)$")


class Secret(str):
    """A text that holds a password. Its repr does not: tools that print or send a traceback with
    its local variables, such as pytest and Sentry, use that.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def find_url(url: str | None = None, *, environ: Mapping[str, str] = os.environ) -> Secret:
    """``url`` itself, or what ORCHARD_INFRA_LOCK_URL says; ``file:PATH``, in either, is the first
    line of that file, so that a password is in no argument and in no variable.

    Raises:
        ConfigurationError: There is none, or its file cannot be read.
    """
    found = Secret(url or environ.get(URL_VARIABLE, ""))
    if found.startswith("file:"):
        path = os.path.expanduser(found[len("file:") :].removeprefix("//"))
        try:
            with open(path, encoding="utf-8") as file:
                found = Secret(file.readline().strip())
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ConfigurationError(f"cannot read the lock's URL from {path}: {reason}") from None
        if not found:
            raise ConfigurationError(
                f"the first line of {path} should be the lock's URL, and is empty"
            )
    if not found:
        raise ConfigurationError(
            "the lock has no URL: give one, such as postgresql://host/database, or set "
            f"{URL_VARIABLE}"
        )
    return found


def lock_from_url(url: str | None = None, *, timeout: float | None = 0.0) -> ServerLock:
    """The lock on the server at ``url``; `find_url` says what else it may be.

    What stands after a ``#`` is for the lock itself: ``redis://cache/0#ttl=60&renew=10``.

    Raises:
        ConfigurationError: No lock speaks to such a server, or what it needs is not installed.
    """
    found, options = _without_options(find_url(url))
    scheme = found.partition(":")[0].lower()
    make: Callable[..., ServerLock] | None = None
    if scheme in POSTGRES_SCHEMES or _SETTINGS.match(found):
        from orchard_infra.locks.postgres import PostgresLock as make
    elif scheme in REDIS_SCHEMES:
        from orchard_infra.locks.redis import RedisLock as make
    if make is not None:
        try:
            return make(found, timeout=timeout, **options)
        except (TypeError, ValueError) as error:
            if not options:
                raise
            raise ConfigurationError(
                f"the settings after the # of the lock's URL cannot be used: {error}"
            ) from None
    # A text without a scheme is not quoted: it may be a password that went astray.
    given = f", and not with {scheme[:20]}://" if "://" in found else ""
    raise ConfigurationError(
        f"the lock's URL should begin with postgresql://, redis:// or rediss://{given}"
    )


def _without_options(url: str) -> tuple[str, dict[str, Any]]:
    """An address, and what its fragment says of the lock. A "#" in a password is none."""
    found = _OPTIONS.search(url)
    if found is None:
        return url, {}
    options: dict[str, Any] = {}
    for name, value in parse_qsl(found[1], keep_blank_values=True):
        try:
            options[name] = float(value)
        except ValueError:
            options[name] = {"yes": True, "no": False}.get(value, value)
    return Secret(url[: found.start()]), options


def redacted(text: str) -> str:
    """An address, or an error message that quotes one, without its password.

    >>> redacted("postgresql://ada:secret@db/locks?sslpassword=s&sslmode=require")
    'postgresql://ada:***@db/locks?sslpassword=***&sslmode=require'
    >>> redacted("host=db user=ada password='my secret'")
    'host=db user=ada password=***'
    """
    return _SETTING.sub(r"\1***", _IN_ADDRESS.sub(r"\1:***@", text))


def record_for_others(record: RunRecord) -> str:
    """A record as it is put on a server, where others read it: without the password of a URL in
    the run's command.
    """
    argv = tuple(map(redacted, record.argv))
    return to_json(record if argv == record.argv else attrs.evolve(record, argv=argv)).decode()


def shown(url: str) -> str:
    """Which server and database an address names: without user, password and options.

    >>> shown("rediss://ada:secret@cache.example:6380/1?ssl_ca_certs=/etc/ca.pem")
    'rediss://cache.example:6380/1'
    """
    if "://" not in url:  # settings of libpq
        return redacted(url)
    try:
        parts = urlsplit(redacted(_without_blanks(url)))
    except ValueError:
        return "a server whose URL cannot be read"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def has_password(url: str) -> bool:
    """Whether an address carries a password, which has no place in an argument."""
    url = _without_blanks(url)
    return redacted(url) != url


def _without_blanks(url: str) -> str:
    """An address without the blanks that would end it within a text."""
    return re.sub(r"\s", "_", url) if "://" in url else url
