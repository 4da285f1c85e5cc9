"""A clean start and a graceful stop for training runs.

    with managed_environment("digits") as env:
        train(env)

On the way in it stops the ghosts of earlier runs and takes the project's lock; on the way out,
however that comes, it stops leftover children, flushes device caches, removes temporary files and
releases the lock. `managed_environment` is the front door; behind it `InfrastructureManager`
composes one strategy for each job: `GhostSanitizer`, `FileLock`, `TorchCacheFlusher`,
`TemporaryArtifacts` and `SignalStop`. Bring your own for any of them, or None.
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
    # `from orchard_infra import files` asks here for a module that is not loaded yet. Loading all
    # of the package for that made a circle of imports.
    if name[:1].isupper() or name in ("managed_environment", "__all__"):
        public = import_module("orchard_infra._public")
        if name == "__all__" or name in public.__all__:
            return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *import_module("orchard_infra._public").__all__])
