"""A clean start and a graceful stop for training runs.

    with managed_environment("digits") as env:
        train(env)

Before the block it takes the project's lock, and stops ghosts of earlier runs where you allow it.
However the block ends, it flushes device caches, removes temporary files and releases the lock.
`managed_environment` is the front door. Behind it `InfrastructureManager` has one strategy for each
job: `GhostSanitizer`, `FileLock`, `TorchCacheFlusher`, `TemporaryArtifacts` and `SignalStop`. Put
your own or None in the place of any of them, and add others as ``extras``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from orchard_infra._version import __version__ as __version__

if TYPE_CHECKING:
    from orchard_infra._public import *  # noqa: F403


def __getattr__(name: str) -> object:
    """Load the package when the first of its names is used (PEP 562).

    pytest loads our plugin, and with it this module, in every project on the machine: that must
    not cost them attrs, psutil and all the rest.
    """
    from importlib.util import find_spec

    missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("_") and name != "__all__":
        raise missing
    # A module comes first, and is loaded alone. `from orchard_infra import errors` comes here, too:
    # to load the whole package for that was a circle of imports.
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    public = import_module("orchard_infra._public")
    if name not in ("__all__", *public.__all__):
        raise missing
    value: object = getattr(public, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *import_module("orchard_infra._public").__all__])
