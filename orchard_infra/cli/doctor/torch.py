"""torch: its build and devices, and locks that a crashed build of an extension left."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from orchard_infra.cli import output
from orchard_infra.cli.doctor.base import CHILD_TIMEOUT, Level, Setup, Verdict, run_python
from orchard_infra.inspect import own_pids
from orchard_infra.system import processes


def check_torch(setup: Setup) -> Verdict:
    if find_spec("torch") is None:
        return Level.OK, f"not installed for {sys.executable}: no device cache to flush"
    try:
        # With this variable torch asks the management library, and creates no context.
        found = json.loads(run_python(_TORCH, env={"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}))
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or [f"exit {error.returncode}"]
        return Level.PROBLEM, f"cannot be imported: {last[0]}", "Install torch anew"
    except subprocess.TimeoutExpired:
        return Level.WARNING, f"not imported within {CHILD_TIMEOUT:.0f} s", "Look at the disk"
    built = next((f"{name} {found[name]}" for name in ("CUDA", "ROCm") if found[name]), "")
    text = f"{found['version']}, " + (f"built for {built}" if built else "no CUDA or ROCm build")
    if found["accelerator"]:
        text += f", {output.count(found['devices'], found['accelerator'] + ' device')}"
    driver = os.path.exists("/proc/driver/nvidia/version")
    if driver and not found["CUDA"]:
        return Level.WARNING, f"{text}, though there is an NVIDIA driver", "Install a CUDA build"
    if found["CUDA"] and driver and not found["devices"]:
        visible = setup.environ.get("CUDA_VISIBLE_DEVICES")
        because = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        return (
            Level.WARNING,
            f"{text}: there is a driver, and no device can be used{because}",
            "Compare nvidia-smi: the driver may be older than the build",
        )
    return Level.OK, text


def check_torch_extensions(setup: Setup) -> Verdict:
    root = _extensions_directory(setup.environ)
    locks = {}
    for directory, below, names in os.walk(root):
        if directory[len(str(root)) :].count(os.sep) >= 4:
            below.clear()
        if "lock" in names:
            path = Path(directory, "lock")
            with contextlib.suppress(OSError):
                found = os.lstat(path)
                if stat.S_ISREG(found.st_mode):
                    locks[found.st_dev, found.st_ino] = path
    if not locks:
        return Level.OK, f"no lock below {root}"
    # The process that builds has the file open; see torch/utils/file_baton.py.
    built = {file: pid for pid in own_pids() if (file := processes.has_open(pid, frozenset(locks)))}
    stale = [path for file, path in locks.items() if file not in built and path.exists()]
    if not stale:
        pids = ", ".join(str(pid) for pid in built.values())
        return Level.OK, f"being built now by pid {pids}"
    listed = " ".join(str(path) for path in stale[:3])
    return (
        Level.PROBLEM,
        f"{output.count(len(stale), 'lock')} that no process of yours holds: a program that loads "
        f"that extension waits for ever ({listed})",
        f"If no other host builds it: rm {listed}",
    )


def _extensions_directory(environ: Mapping[str, str]) -> Path:
    """Where torch.utils.cpp_extension builds: `_get_build_directory` there."""
    chosen = environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "torch_extensions"


_TORCH = """
import json, torch
def current():
    try:
        device = torch.accelerator.current_accelerator()
        return (None, 0) if device is None else (device.type, torch.accelerator.device_count())
    except (AttributeError, RuntimeError):
        return ("cuda", torch.cuda.device_count()) if torch.version.cuda else (None, 0)
kind, devices = current()
print(json.dumps({
    "version": torch.__version__, "CUDA": torch.version.cuda,
    "ROCm": getattr(torch.version, "hip", None), "accelerator": kind, "devices": devices,
}))
"""
