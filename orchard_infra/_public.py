"""Every public name. `orchard_infra` loads this module when the first of them is used."""

from importlib import import_module
from typing import TYPE_CHECKING

from orchard_infra.artifacts.temporary import TemporaryArtifacts
from orchard_infra.config import EnvironmentConfig, HardwareAwareConfig, HardwareConfig
from orchard_infra.devices.torch_caches import TorchCacheFlusher
from orchard_infra.environment import Environment, StopRequest, Strategy
from orchard_infra.errors import (
    ConfigurationError,
    EnvironmentLockedError,
    InfrastructureError,
    LockLostError,
    LockSuspectError,
    ReleaseError,
)
from orchard_infra.launch import Launch
from orchard_infra.locks.base import Held, Lease, Lock, LockKey
from orchard_infra.locks.file import FileLock
from orchard_infra.managed import managed_environment
from orchard_infra.manager import InfraManagerProtocol, InfrastructureManager
from orchard_infra.report import (
    CleanReport,
    DeviceMemory,
    Finding,
    FlushReport,
    Report,
    SanitizeReport,
)
from orchard_infra.runs.record import RunRecord, RunState, Survivor
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.sanitizing.ghosts import GhostSanitizer
from orchard_infra.session import current_environments
from orchard_infra.stopping.signals import RunStopped, SignalStop

if TYPE_CHECKING:
    from orchard_infra.devices.interactive import flush
    from orchard_infra.locks.all_of import AllOf
    from orchard_infra.locks.postgres import PostgresLock
    from orchard_infra.locks.redis import RedisLock
    from orchard_infra.stopping.shielding import shield_worker

# What a run with the defaults never uses is loaded when it is asked for: a fifth of all.
_ON_DEMAND = {
    "AllOf": "locks.all_of",
    "PostgresLock": "locks.postgres",
    "RedisLock": "locks.redis",
    "flush": "devices.interactive",
    "shield_worker": "stopping.shielding",
}

__all__ = [
    "AllOf",
    "CleanReport",
    "ConfigurationError",
    "DeviceMemory",
    "Environment",
    "EnvironmentConfig",
    "EnvironmentLockedError",
    "FileLock",
    "Finding",
    "FlushReport",
    "GhostSanitizer",
    "HardwareAwareConfig",
    "HardwareConfig",
    "Held",
    "InfraManagerProtocol",
    "InfrastructureError",
    "InfrastructureManager",
    "Launch",
    "Lease",
    "Lock",
    "LockKey",
    "LockLostError",
    "LockSuspectError",
    "PostgresLock",
    "RedisLock",
    "RegisteredRun",
    "ReleaseError",
    "Report",
    "RunRecord",
    "RunRegistry",
    "RunState",
    "RunStopped",
    "SanitizeReport",
    "SignalStop",
    "StopRequest",
    "Strategy",
    "Survivor",
    "TemporaryArtifacts",
    "TorchCacheFlusher",
    "current_environments",
    "flush",
    "managed_environment",
    "shield_worker",
]


def __getattr__(name: str) -> object:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"orchard_infra.{_ON_DEMAND[name]}"), name)
