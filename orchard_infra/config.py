"""The configuration of a run: two attributes, read from any object.

The object has a ``hardware`` attribute, and that has ``allow_process_kill`` and
``lock_file_path``: an attrs class, a dataclass, a pydantic model, a `types.SimpleNamespace`, an
argparse namespace, an OmegaConf node. `EnvironmentConfig` is the package's own. A string is a
project name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import attrs

from orchard_infra.errors import ConfigurationError
from orchard_infra.system.files import runtime_dir
from orchard_infra.system.origin import from_origin

_LOCK_PATH = "cfg.hardware.lock_file_path"
_PATH = type(Path())


class _ByAttribute(type(Protocol)):  # type: ignore[misc]
    """Finds attributes by ``getattr``. From Python 3.12 on isinstance() does not, and finds none
    of OmegaConf's nodes, which make their attributes when they are read.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return bool(super().__instancecheck__(instance)) or hasattr(instance, "hardware")


@runtime_checkable
class HardwareAwareConfig(Protocol, metaclass=_ByAttribute):
    """Anything with a ``hardware`` attribute.

    ``hardware`` exposes ``allow_process_kill: bool`` and ``lock_file_path: str | PathLike``;
    a ``project_name: str`` is used where there is one.
    """

    @property
    def hardware(self) -> Any: ...


def _project_name(value: object) -> str:
    return check_project_name(value, "project_name")


def _allow_process_kill(value: object) -> bool:
    return check_bool(value, "allow_process_kill")


def _lock_file_path(value: object) -> Path:
    return check_lock_path(value, "lock_file_path")


@attrs.frozen
class HardwareConfig:
    """How a run may treat the machine.

    ``lock_file_path`` is derived from the project name unless given, so that two runs of a
    project meet at one lock.

    >>> HardwareConfig("digits").lock_file_path.name
    'digits.lock'
    """

    project_name: str = attrs.field(converter=_project_name)
    allow_process_kill: bool = attrs.field(
        default=False, kw_only=True, converter=_allow_process_kill
    )
    lock_file_path: Path = attrs.field(
        default=attrs.Factory(lambda self: default_lock_path(self.project_name), takes_self=True),
        kw_only=True,
        converter=_lock_file_path,
    )


@attrs.frozen(init=False)
class EnvironmentConfig:
    """A configuration that protects one project.

    Give the project's name, or a whole `HardwareConfig`.

    >>> EnvironmentConfig("digits").hardware.allow_process_kill
    False
    >>> EnvironmentConfig(hardware=HardwareConfig("digits")).project_name
    'digits'
    """

    hardware: HardwareConfig

    def __init__(
        self,
        project_name: str | None = None,
        *,
        allow_process_kill: bool = False,
        lock_file_path: str | os.PathLike[str] | None = None,
        hardware: HardwareConfig | None = None,
    ) -> None:
        if hardware is None:
            hardware = HardwareConfig(
                project_name,  # None is refused there, by name
                allow_process_kill=allow_process_kill,
                **({} if lock_file_path is None else {"lock_file_path": lock_file_path}),
            )
        elif project_name is not None or allow_process_kill or lock_file_path is not None:
            raise ConfigurationError("give either hardware=, or what it is made of; not both")
        self.__attrs_init__(hardware)

    @property
    def project_name(self) -> str:
        return self.hardware.project_name


class LockPath(NamedTuple):
    """The path of a lock: absolute, and as the configuration gives it.

    A release by hand compares both. The program may have changed its directory since it prepared
    the environment, and then the same relative path leads somewhere else.
    """

    path: Path
    given: str


@attrs.frozen(repr=False)
class Settings:
    """The checked contents of a configuration. ``lock_path`` is absolute; ``lock_path_given`` is
    the path before that, see `LockPath`.
    """

    project: str
    allow_process_kill: bool
    lock_path: Path
    lock_path_given: str = attrs.field(default="", eq=False)


def read_config(cfg: object) -> Settings:
    """Read any configuration, before anything is touched.

    Raises:
        ConfigurationError: An attribute is missing or of the wrong type.
    """
    if isinstance(cfg, str):
        cfg = EnvironmentConfig(check_project_name(cfg, "cfg"))
    hardware = _read(cfg, "hardware", "cfg.hardware")
    value = _read(hardware, "lock_file_path", _LOCK_PATH)
    given = _path_as_given(value, _LOCK_PATH)
    lock_path = _absolute(value, given, _LOCK_PATH)
    return Settings(
        project=_project_of(cfg, hardware, lock_path),
        allow_process_kill=check_bool(
            _read(hardware, "allow_process_kill", "cfg.hardware.allow_process_kill"),
            "cfg.hardware.allow_process_kill",
        ),
        lock_path=lock_path,
        lock_path_given=given,
    )


def read_lock_path(cfg: object) -> LockPath:
    """Read only what a release needs: a cfg with ``hardware.lock_file_path``, or a project name.

    A relative path stays relative where the working directory has been deleted: the environment
    can still be found by the path as given.

    Raises:
        ConfigurationError: The attribute is missing, or is not a path.
    """
    if isinstance(cfg, str):
        path = default_lock_path(check_project_name(cfg, "cfg"))
        return LockPath(path, str(path))
    value = _read(_read(cfg, "hardware", "cfg.hardware"), "lock_file_path", _LOCK_PATH)
    given = _path_as_given(value, _LOCK_PATH)
    try:
        return LockPath(check_lock_path(given, _LOCK_PATH), given)
    except ConfigurationError:
        return LockPath(Path(given), given)


def default_lock_path(project_name: str) -> Path:
    """Where the lock of a project is unless the configuration says otherwise.

    Names that are not safe as a file name are told apart by a digest.

    >>> default_lock_path("a/b").name
    'a-b-c14cddc0.lock'
    """
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", project_name)[:80].lstrip(".")
    # A name that ends like a digest would meet the file of the name that has that digest.
    if slug != project_name or re.search(r"-[0-9a-f]{8}$", slug):
        import hashlib  # loads OpenSSL

        slug += "-" + hashlib.sha256(os.fsencode(project_name)).hexdigest()[:8]
    return runtime_dir() / "locks" / f"{slug}.lock"


def check_project_name(value: object, name: str) -> str:
    """``value``, if it can name a project; `ConfigurationError` if not."""
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} must be a str, not {_found(value)}")
    if not value.strip() or not value.isprintable() or len(value) > 200:
        raise ConfigurationError(
            f"{name} must be 1 to 200 printable characters, not {_found(value)}"
        )
    return value


def check_lock_path(value: object, name: str) -> Path:
    """``value`` as an absolute path, links unresolved; `ConfigurationError` if it is none."""
    return _absolute(value, _path_as_given(value, name), name)


def check_bool(value: object, name: str) -> bool:
    """``value``, if it is a real bool; `ConfigurationError` if not. The string "false" is true:
    a run that must not kill would kill.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False, not {_found(value)}")
    return value


def _absolute(value: object, given: str, name: str) -> Path:
    try:
        # Made absolute now: the program may change its directory during the run.
        path = from_origin(given)
    except OSError as error:
        raise _no_path(value, name, error) from error
    return value if type(value) is _PATH and str(value) == path else Path(path)


def _path_as_given(value: object, name: str) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigurationError(f"{name} must be a str or os.PathLike, not {_found(value)}")
    try:
        text = os.fspath(value)
        if not isinstance(text, str) or not text.strip() or b"\0" in os.fsencode(text):
            raise ValueError("it is empty, not text, or contains a NUL")
        given = os.path.normpath(text)
        if os.path.basename(given) in ("", os.curdir, os.pardir):
            raise ValueError("it is a directory")
        return given
    except Exception as error:  # the value's own code runs here
        raise _no_path(value, name, error) from error


def _no_path(value: object, name: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"{name} must be the path of a file, not {_found(value)}: {str(error)[:200]}"
    )


def _project_of(cfg: object, hardware: object, lock_path: Path) -> str:
    for owner, path in ((hardware, "cfg.hardware.project_name"), (cfg, "cfg.project_name")):
        name = _read(owner, "project_name", path, None)
        if name is not None:
            return check_project_name(name, path)
    shown = "".join(c if c.isprintable() else "?" for c in lock_path.stem)
    return shown[:200].strip() or "?"


def _read(owner: object, attribute: str, path: str, *default: object) -> Any:
    try:
        return getattr(owner, attribute, *default)
    except AttributeError:
        raise ConfigurationError(
            f"{path} is missing: {_found(owner)} has no attribute {attribute!r}"
        ) from None
    except Exception as error:  # a property, or an interpolation, that fails
        raise ConfigurationError(
            f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]}"
        ) from error


def _found(value: object) -> str:
    try:
        text = repr(value)
    except Exception:
        text = "something that cannot be shown"
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"
