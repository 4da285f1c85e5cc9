"""A clean start and a graceful stop for training runs.

    with managed_environment("digits") as env:
        train(env)

On the way in it stops the ghosts of earlier runs and takes the project's lock; on the way out,
however that comes, it stops leftover children, flushes device caches, removes temporary files and
releases the lock. `managed_environment` is the front door; behind it `InfrastructureManager`
composes one strategy for each job: `GhostSanitizer`, `FileLock`, `TorchCacheFlusher`,
`TemporaryArtifacts` and `SignalStop`. Bring your own for any of them, or None.
"""

from orchard_infra._version import __version__
from orchard_infra.artifacts import Cleaner, CleanReport, TemporaryArtifacts
from orchard_infra.config import EnvironmentConfig, HardwareAwareConfig, HardwareConfig
from orchard_infra.context import managed_environment
from orchard_infra.devices import DeviceMemory, Flusher, FlushReport, TorchCacheFlusher
from orchard_infra.environment import Environment, Report
from orchard_infra.errors import (
    ConfigurationError,
    EnvironmentLockedError,
    InfrastructureError,
    LockLostError,
    ReleaseError,
)
from orchard_infra.launch import Launch
from orchard_infra.locks.base import Lease, Locker
from orchard_infra.locks.file import FileLock
from orchard_infra.manager import InfraManagerProtocol, InfrastructureManager
from orchard_infra.runs import RegisteredRun, RunRecord, RunRegistry, RunState, Survivor
from orchard_infra.sanitizing import Finding, GhostSanitizer, Sanitizer, SanitizeReport, Scene
from orchard_infra.stopping import RunStopped, SignalStop, Stopper, StopRequest, StopWatch

__all__ = [
    "CleanReport",
    "Cleaner",
    "ConfigurationError",
    "DeviceMemory",
    "Environment",
    "EnvironmentConfig",
    "EnvironmentLockedError",
    "FileLock",
    "Finding",
    "FlushReport",
    "Flusher",
    "GhostSanitizer",
    "HardwareAwareConfig",
    "HardwareConfig",
    "InfraManagerProtocol",
    "InfrastructureError",
    "InfrastructureManager",
    "Launch",
    "Lease",
    "LockLostError",
    "Locker",
    "RegisteredRun",
    "ReleaseError",
    "Report",
    "RunRecord",
    "RunRegistry",
    "RunState",
    "RunStopped",
    "SanitizeReport",
    "Sanitizer",
    "Scene",
    "SignalStop",
    "StopRequest",
    "StopWatch",
    "Stopper",
    "Survivor",
    "TemporaryArtifacts",
    "TorchCacheFlusher",
    "__version__",
    "managed_environment",
]
