"""Every public name, gathered for `orchard_infra` to hand out when one is first asked for."""

from orchard_infra.artifacts.temporary import Cleaner, CleanReport, TemporaryArtifacts
from orchard_infra.config import EnvironmentConfig, HardwareAwareConfig, HardwareConfig
from orchard_infra.devices.torch_caches import DeviceMemory, Flusher, FlushReport, TorchCacheFlusher
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
from orchard_infra.managed import managed_environment
from orchard_infra.manager import InfraManagerProtocol, InfrastructureManager
from orchard_infra.runs.record import RunRecord, RunState, Survivor
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.sanitizing.ghosts import (
    Finding,
    GhostSanitizer,
    Sanitizer,
    SanitizeReport,
    Scene,
)
from orchard_infra.stopping.signals import RunStopped, SignalStop, Stopper, StopRequest, StopWatch

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
    "managed_environment",
]
