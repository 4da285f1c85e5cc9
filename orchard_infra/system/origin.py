"""The directory that a relative path is meant from."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping


def from_origin(path: str, environ: Mapping[str, str] = os.environ) -> str:
    """``path`` as an absolute one, with ``~`` expanded. Links are not resolved.

    A relative path is meant from the working directory. Within a job of Hydra or a trial of Ray
    Tune it is meant from the directory in which the program was started: the framework has changed
    to a directory of that one job, and a lock in there would keep nobody out.

    Raises:
        OSError: The path is relative, and the working directory was removed.
    """
    path = os.path.expanduser(path)
    if not os.path.isabs(path):
        path = os.path.join(_of_hydra() or _of_ray_tune(environ) or os.getcwd(), path)
    return os.path.normpath(path)


def _of_hydra() -> str | None:
    """What `hydra.utils.get_original_cwd` says, while a job runs."""
    module = sys.modules.get("hydra.core.hydra_config")
    try:
        config = module.HydraConfig  # type: ignore[union-attr]
        found = config.get().runtime.cwd if config.initialized() else None
    except Exception:  # it is still being imported, or another version has other names
        return None
    return found if isinstance(found, str) and os.path.isabs(found) else None


def _of_ray_tune(environ: Mapping[str, str]) -> str | None:
    # Set in the process of a trial, before it changes its directory.
    found = environ.get("TUNE_ORIG_WORKING_DIR", "") if "ray" in sys.modules else ""
    return found if os.path.isabs(found) else None
