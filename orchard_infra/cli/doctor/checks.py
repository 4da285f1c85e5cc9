"""The checks of `orchard-infra doctor`. Each one tries what a run would do, where it can be tried.

Nothing is changed: what a check makes it removes. No lock of a run is ever taken, because a run
that starts in that very instant would find it held.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fnmatch
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import attrs
import psutil

from orchard_infra.cli import output
from orchard_infra.config import default_lock_path
from orchard_infra.errors import InfrastructureError
from orchard_infra.launch import Launch
from orchard_infra.runs.membership import Membership, command_of, own_pids
from orchard_infra.runs.record import RunState, leader_is_dead, read_record
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.system import files, processes
from orchard_infra.system.flock import lock_descriptor, unlock_descriptor

_PATIENCE = 120.0  # seconds for a child process that imports torch from a slow disk
_DOCKER_SHM = 64 * 2**20  # bytes of /dev/shm in a container that nobody asked more for
_TORCHRUN_PORT = 29500  # the default of torchrun and of most launch scripts


class Level(str, enum.Enum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@attrs.frozen
class Check:
    """What one check found, and what to do about it."""

    name: str
    level: Level
    text: str
    advice: str | None = None


@attrs.frozen
class Patient:
    """What is examined: the place of the lock, and the environment a run would have."""

    lock_file: Path | None
    environ: Mapping[str, str]

    @property
    def lock_directory(self) -> Path:
        if self.lock_file is not None:
            return self.lock_file.parent
        return default_lock_path("doctor").parent


Finding = tuple[Level, str] | tuple[Level, str, str | None]


def examine(patient: Patient) -> Iterator[tuple[str, Callable[[], Check]]]:
    """The name of each check, and the check itself."""
    for name, check in _CHECKS:
        if name == "lock file" and patient.lock_file is None:
            continue

        def carry_out(name: str = name, check: Callable[[Patient], Finding] = check) -> Check:
            try:
                return Check(name, *check(patient))
            except (OSError, InfrastructureError, psutil.Error, ValueError) as error:
                return Check(name, Level.WARNING, f"could not be checked: {error}")

        yield name, carry_out


def _lock_directory(patient: Patient) -> Finding:
    directory = patient.lock_directory
    elsewhere = f"Set {files.RUNTIME_DIR_VARIABLE} to a directory of your own"
    with _made_for_now(directory):
        try:
            if patient.lock_file is None:
                files.private_directory(files.runtime_dir(patient.environ))
            directory.mkdir(parents=True, exist_ok=True)
            found = os.stat(directory)
        except InfrastructureError as error:
            return Level.PROBLEM, str(error), None
        except OSError as error:
            return Level.PROBLEM, f"cannot make {directory}: {error.strerror}", elsewhere
        if not os.access(directory, os.W_OK | os.X_OK):
            return Level.PROBLEM, f"you cannot write to {directory}", elsewhere
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o022 and not mode & stat.S_ISVTX:
            return (
                Level.WARNING,
                f"others may remove your locks from {directory} (mode {mode:04o})",
                f"chmod go-w {directory}",
            )
        if mode & 0o022:
            return Level.OK, f"{directory} is everybody's, but others cannot remove your locks"
        owner = files.owner_name(found.st_uid) if hasattr(os, "geteuid") else "you"
        mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
        return Level.OK, f"{directory} is {'yours' if mine else f'of {owner}'} (mode {mode:04o})"


def _flock(patient: Patient) -> Finding:
    directory = patient.lock_directory
    with _made_for_now(directory):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f".doctor-{os.urandom(6).hex()}"
        fd = files.create_exclusive(path, 0o600)
        try:
            file_system = file_system_at(directory, _mountinfo())
            try:
                lock_descriptor(fd)
            except OSError as error:
                return (
                    Level.PROBLEM,
                    f"{file_system.name} at {directory} has no working flock(2): {error.strerror}",
                    "Choose a lock_file_path on another file system",
                )
            excluded = _try_lock(path) == "refused"
            unlock_descriptor(fd)
            entered = _try_lock(path) == "taken"
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)
    if not excluded or not entered:
        fault = "does not exclude another process" if entered else "stays locked after a release"
        return (
            Level.PROBLEM,
            f"flock(2) on {file_system.name} at {directory} {fault}",
            "Choose a lock_file_path on another file system",
        )
    return file_system.judge()


def _lock_file(patient: Patient) -> Finding:
    path = patient.lock_file
    assert path is not None
    another = "Choose another lock_file_path"
    for run in RunRegistry().runs():
        if run.record.lock == str(path) and run.state is RunState.RUNNING:
            return Level.OK, f"held by {run.record.describe()}"
    try:
        fd = files.open_existing(path, os.O_RDONLY)
    except FileNotFoundError:
        return Level.OK, f"{path} is free"
    except InfrastructureError as error:
        return Level.PROBLEM, str(error), another
    except OSError as error:
        return Level.PROBLEM, f"{path} cannot be opened: {error.strerror}", another
    try:
        found = os.fstat(fd)
        record = read_record(fd)
        blank = not files.read_bounded(fd, 4096).strip(b"\0 \t\r\n0123456789")
    finally:
        os.close(fd)
    if record is not None:
        if leader_is_dead(record[0]):
            return (
                Level.WARNING,
                f"left by a run that is dead ({record[0].describe()})",
                "orchard-infra clean; the next run takes it over",
            )
        return Level.OK, f"held, or left, by {record[0].describe()}"
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        owner = files.owner_name(found.st_uid)
        return Level.PROBLEM, f"{path} belongs to {owner}", another
    if not blank:
        return (
            Level.PROBLEM,
            f"{path} is no lock file: it has {found.st_size} bytes of its own",
            (f"{another}, or remove it"),
        )
    return Level.OK, f"{path} is free"


def _tmp_cleaner(patient: Patient) -> Finding:
    directory = patient.lock_directory
    cleaner = cleaner_that_reaches(Path(os.path.realpath(directory)))
    if cleaner is None:
        return Level.OK, f"none reaches {directory}"
    if cleaner.systemd and not _tmpfiles_timer_runs():
        return Level.OK, f"{cleaner.describe()}, but no timer of systemd runs it here"
    keep = files.RUNTIME_DIR_VARIABLE
    advice = f"Set {keep} to a directory elsewhere"
    if cleaner.systemd:
        advice = f"Put 'x {directory}' into /etc/tmpfiles.d/orchard-infra.conf. Or: {advice}"
    return (
        Level.WARNING,
        f"{cleaner.describe()}. A live run keeps its files young; one that is stopped (Ctrl-Z) "
        "cannot",
        advice,
    )


def _runs(patient: Patient) -> Finding:
    runs = RunRegistry().runs()
    outlived = {
        run.record.run_id
        for run, _ in Membership(runs).survivors([run for run in runs if not run.is_live])
    }

    def state_of(run: RegisteredRun) -> RunState:
        return RunState.SURVIVORS if run.record.run_id in outlived else run.state

    states = [state_of(run) for run in runs]
    words = {RunState.SURVIVORS: "dead with live processes"}
    told = [
        f"{states.count(state)} {words.get(state, state.value)}"
        for state in RunState
        if state in states
    ]
    text = ", ".join(told) if told else "none on record"
    if RunState.SURVIVORS in states:
        return Level.WARNING, text, "orchard-infra clean"
    return Level.OK, text


def _launch(patient: Patient) -> Finding:
    launch = Launch.from_environ(patient.environ)
    why_not = launch.reason_not_to_kill()
    rank = "" if launch.rank is None else f", rank {launch.rank} of {launch.world_size or '?'}"
    if why_not is None:
        return Level.OK, "no scheduler, no launcher: ghosts are stopped where a run allows it"
    return Level.OK, f"{why_not}{rank}: no process is ever killed here, whatever a run allows"


def _container(patient: Patient) -> Finding:
    if sys.platform != "linux":
        return Level.OK, "no Linux: no pid namespaces"
    if processes.pid_namespace() == 0:
        return (
            Level.PROBLEM,
            "/proc shows the processes of another pid namespace: no run can tell who is who",
            "Mount /proc anew, as unshare --mount-proc and every container runtime do",
        )
    told = []
    kind = _container_kind(patient.environ)
    told.append(f"in a container ({kind})" if kind else "in no container that can be told")
    if processes.pid_namespace() != output.FIRST_PID_NAMESPACE:
        told.append("in a pid namespace of its own: runs outside are not seen, and not touched")
    else:
        told.append("in the first pid namespace")
    if os.getpid() == 1:
        return (
            Level.WARNING,
            f"this process is the first one (PID 1), {', '.join(told)}",
            "Start programs with orchard-infra run, or the container with --init: PID 1 must reap",
        )
    return Level.OK, ", ".join(told)


def _orphans(patient: Patient) -> Finding:
    """Make an orphan that ends, and look whether anybody reaps it."""
    if not hasattr(os, "fork"):
        return Level.OK, "not on this platform"
    pid, parent = map(int, _python(_ORPHAN).split())
    deadline = time.monotonic() + 5.0  # some look for them every other second only
    while (found := processes.read_stat(pid)) is not None and time.monotonic() < deadline:
        if found.ppid != parent and not processes.is_defunct(found):
            break  # somebody else has the pid by now
        time.sleep(0.01)
    adopter = processes.read_stat(parent)
    who = f"pid {parent} ({adopter.name if adopter else 'gone since'})"
    if found is not None and processes.is_defunct(found):
        return (
            Level.WARNING,
            f"{who} adopts orphans and does not reap them: they stay as defunct processes",
            "Start the container with --init, or the program with orchard-infra run",
        )
    return Level.OK, f"adopted and reaped by {who}"


def _shared_memory(patient: Patient) -> Finding:
    directory = Path("/dev/shm")
    if not directory.is_dir():
        return Level.OK, "there is no /dev/shm here"
    probe = directory / f"orchard-infra-doctor-{os.urandom(6).hex()}"
    try:
        os.close(files.create_exclusive(probe, 0o600))
        probe.unlink()
    except OSError as error:
        return (
            Level.PROBLEM,
            f"nothing can be made in /dev/shm: {error.strerror}",
            "DataLoader workers cannot hand over tensors. Mount it, or free it",
        )
    room = os.statvfs(directory)
    total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    text = f"{output.size(total - free)} of {output.size(total)} in use"
    holders = sorted(_shm_holders(), key=lambda holder: -holder[1])
    if holders:
        text += "; mapped by " + ", ".join(
            f"pid {pid} ({output.size(mapped)}, {_shown(pid, 40)})" for pid, mapped in holders[:3]
        )
        text += f" and {output.count(len(holders) - 3, 'other')}" * (len(holders) > 3)
    if 0 < total <= _DOCKER_SHM:
        return (
            Level.WARNING,
            f"{text}: DataLoader workers die of a bus error when it is full",
            "docker run --shm-size=8g, or --ipc=host",
        )
    if total and free < total / 10:
        return Level.WARNING, text, "orchard-infra clean removes what dead processes left there"
    return Level.OK, text


def _torch(patient: Patient) -> Finding:
    if find_spec("torch") is None:
        return Level.OK, f"not installed for {sys.executable}: no device cache to flush"
    try:
        found = json.loads(_python(_TORCH, env={"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}))
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or [f"exit {error.returncode}"]
        return Level.PROBLEM, f"cannot be imported: {last[0]}", "Install torch anew"
    except subprocess.TimeoutExpired:
        return Level.WARNING, f"not imported within {_PATIENCE:.0f} s", "Look at the disk"
    built = next((f"{name} {found[name]}" for name in ("CUDA", "ROCm") if found[name]), "")
    text = f"{found['version']}, " + (f"built for {built}" if built else "no CUDA or ROCm build")
    if found["accelerator"]:
        text += f", {output.count(found['devices'], found['accelerator'] + ' device')}"
    driver = os.path.exists("/proc/driver/nvidia/version")
    if driver and not found["CUDA"]:
        return Level.WARNING, f"{text}, though there is an NVIDIA driver", "Install a CUDA build"
    if found["CUDA"] and driver and not found["devices"]:
        visible = patient.environ.get("CUDA_VISIBLE_DEVICES")
        because = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        return (
            Level.WARNING,
            f"{text}: the driver is there, and no device can be used{because}",
            "Compare nvidia-smi: the driver may be older than the build",
        )
    return Level.OK, text


def _torch_extensions(patient: Patient) -> Finding:
    root = _torch_extensions_directory(patient.environ)
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
    # Who builds has the file open; see torch/utils/file_baton.py.
    built = {file: pid for pid in own_pids() if (file := processes.has_open(pid, frozenset(locks)))}
    stale = [path for file, path in locks.items() if file not in built and path.exists()]
    if not stale:
        pids = ", ".join(str(pid) for pid in built.values())
        return Level.OK, f"being built now by pid {pids}"
    listed = " ".join(str(path) for path in stale[:3])
    return (
        Level.PROBLEM,
        f"{output.count(len(stale), 'lock')} that no process of yours holds: whoever loads that "
        f"extension waits for ever ({listed})",
        f"If no other host builds it: rm {listed}",
    )


def _master_port(patient: Patient) -> Finding:
    given = patient.environ.get("MASTER_PORT")
    host = patient.environ.get("MASTER_ADDR", "")
    try:
        port = int(given) if given else _TORCHRUN_PORT
    except ValueError:
        port = -1
    if not 0 <= port < 65536:
        return Level.PROBLEM, f"MASTER_PORT={given!r} is no port", "Set a number below 65536"
    name = f"MASTER_PORT={port}" if given else f"MASTER_PORT is not set; torchrun's {port}"
    if given and not _is_here(host):
        return Level.OK, f"{name} is one of {host}"
    with socket.socket() as probe:
        # As torch's store does it: what only lingers of an old connection is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return Level.OK, f"{name} is free"
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return Level.WARNING, f"{name} cannot be used: {error.strerror}", "Set another one"
    owner = _listener(port)
    if owner is None:
        who = "a process that cannot be seen from here"
    else:
        who = f"pid {owner} ({_shown(owner, 60)})"
    return (
        Level.WARNING,
        f"{name} is taken by {who}",
        "Unless that is your own job: torchrun --standalone, or another MASTER_PORT",
    )


def _signals(patient: Patient) -> Finding:
    if sys.platform == "win32":
        return Level.OK, "Ctrl-C and Ctrl-Break only: Windows has no others"
    found = json.loads(_python(_SIGNALS))
    deaf = [name for name in ("SIGTERM", "SIGINT") if name in found["blocked"]]
    if deaf or found["SIGTERM"] == "ignored":
        how = f"{' and '.join(deaf)} blocked" if deaf else "SIGTERM ignored"
        return (
            Level.PROBLEM,
            f"programs start with {how} here: a run cannot be asked to stop",
            "Whatever started this shell passes that on; start a fresh one",
        )
    handled = [name for name in ("SIGTERM", "SIGHUP") if found[name] not in ("default", "ignored")]
    if handled:
        return (
            Level.WARNING,
            f"{handled[0]} already has a handler when Python starts ({found[handled[0]]}); "
            "a run leaves it alone and does not see that signal",
            "Look for a sitecustomize.py or a .pth file that installs it",
        )
    if not found["handled"]:
        return Level.PROBLEM, "a handler was installed and did not see its signal", None
    text = "a handler can be installed and sees SIGTERM"
    if found["SIGHUP"] == "ignored":
        text += "; SIGHUP is ignored (nohup), and stays so"
    if found["SIGINT"] == "ignored":
        text += "; SIGINT is ignored (started in the background), so Ctrl-C does nothing"
    return Level.OK, text


_CHECKS: tuple[tuple[str, Callable[[Patient], Finding]], ...] = (
    ("lock directory", _lock_directory),
    ("flock", _flock),
    ("lock file", _lock_file),
    ("tmp cleaner", _tmp_cleaner),
    ("runs", _runs),
    ("launch", _launch),
    ("container", _container),
    ("orphans", _orphans),
    ("shared memory", _shared_memory),
    ("torch", _torch),
    ("torch extensions", _torch_extensions),
    ("MASTER_PORT", _master_port),
    ("signals", _signals),
)


@attrs.frozen
class FileSystem:
    """The file system that a path is on, from proc_pid_mountinfo(5)."""

    type: str
    mount_point: str
    options: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.type or "an unknown file system"

    def judge(self) -> Finding:
        """What it means for a lock that flock(2) excludes here."""
        text = f"excludes between two processes on {self.name}, mounted at {self.mount_point}"
        if self.type in ("nfs", "nfs4"):
            # nfs(5): Linux sends flock(2) to the server as a lock of the whole file.
            shown = sorted(
                option
                for option in self.options
                if option.startswith(("vers=", "local_lock=")) or option in ("lock", "nolock")
            )
            text += f" ({', '.join(shown)})" * bool(shown)
            if self.options & {"nolock", "local_lock=all", "local_lock=flock"}:
                return self._this_host_only(text)
            return Level.OK, f"{text}; between hosts as well, if the server keeps locks"
        if self.type == "lustre":
            # mount.lustre(8): flock, localflock, noflock.
            if "localflock" in self.options:
                return self._this_host_only(f"{text} (localflock)")
            return Level.OK, f"{text}; between hosts as well"
        if self.type == "overlay":
            return Level.OK, f"{text}; other containers, and the host, do not see this file"
        if self.type.startswith("fuse.") or self.type in ("9p", "virtiofs", "cifs", "smb3"):
            return Level.OK, f"{text}; whether other hosts see the lock was not tried"
        return Level.OK, text

    def _this_host_only(self, text: str) -> Finding:
        return (
            Level.WARNING,
            f"{text}: a run on another host does not see the lock",
            "Run on one host only, or lock with FileLock on another file system, "
            "PostgresLock or RedisLock",
        )


def file_system_at(path: Path, mountinfo: str) -> FileSystem:
    """The file system of ``path``, by the mount point that is nearest above it.

    By the device number it could not be told for all of them: see `files.file_system_of`.
    """
    where = os.path.realpath(path)
    best = FileSystem("", "/")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        try:
            mount_point = _unescape(left.split(" ")[4])
            options = left.split(" ")[5].split(",")
            kind, _, super_options = right.split(" ", 2)
        except (IndexError, ValueError):
            continue
        above = mount_point.rstrip("/") + "/"
        # A later mount hides an earlier one at the same place.
        if (where + "/").startswith(above) and len(mount_point) >= len(best.mount_point):
            best = FileSystem(kind, mount_point, frozenset((*options, *super_options.split(","))))
    return best


@attrs.frozen
class TmpCleaner:
    """A program that removes old files, and where its configuration says so."""

    name: str
    below: str
    age: str
    configured_in: str
    systemd: bool = False

    def describe(self) -> str:
        return (
            f"{self.name} removes what is {self.age} old below {self.below} ({self.configured_in})"
        )


def cleaner_that_reaches(directory: Path, root: Path = Path("/")) -> TmpCleaner | None:
    """Who would remove old files from ``directory``; ``root`` is where /etc and /usr are."""
    return _tmpfiles_that_reach(directory, root) or _cron_job_that_reaches(directory, root)


def _tmpfiles_that_reach(directory: Path, root: Path) -> TmpCleaner | None:
    """By tmpfiles.d(5): the line for the nearest directory above decides, unless one excludes."""
    lines: list[tuple[Path, list[str]]] = []
    seen = set()
    for place in ("etc", "run", "usr/local/lib", "usr/lib"):
        for path in sorted((root / place / "tmpfiles.d").glob("*.conf")):
            if path.name not in seen:  # the first one of a name hides the others
                seen.add(path.name)
                text = path.read_text("utf-8", errors="replace")
                lines += [(path, line.split()) for line in text.splitlines()]
    above = [str(directory), *map(str, directory.parents)]
    nearest: tuple[int, TmpCleaner | None] = (-1, None)
    for path, words in lines:
        if len(words) < 2 or words[0].startswith("#"):
            continue
        kind, target = words[0][0], words[1].rstrip("/") or "/"
        matched = next((one for one in above if fnmatch.fnmatchcase(one, target)), None)
        if matched is None:
            continue
        if kind == "x":
            return None
        if kind in "dDevqQC" and len(matched) > nearest[0]:
            age = words[5] if len(words) > 5 else "-"
            shown = "/" + str(path.relative_to(root))
            cleaner = TmpCleaner("systemd-tmpfiles", matched, age, shown, systemd=True)
            nearest = (len(matched), None if age == "-" else cleaner)
    return nearest[1]


def _cron_job_that_reaches(directory: Path, root: Path) -> TmpCleaner | None:
    """tmpreaper of Debian and tmpwatch of Red Hat, which look at /tmp unless told otherwise."""
    for name, settings in (("tmpreaper", "etc/tmpreaper.conf"), ("tmpwatch", "")):
        job = root / "etc/cron.daily" / name
        if not job.exists():
            continue
        below = next((d for d in ("/tmp", "/var/tmp") if _is_below(directory, d)), None)
        configured = _shell_settings(root / settings) if settings else {}
        dirs = configured.get("TMPREAPER_DIRS", "")
        below = next(
            (d.rstrip("/.") for d in dirs.split() if _is_below(directory, d.rstrip("/.") or "/")),
            None if dirs else below,
        )
        if below is not None and configured.get("SHOWWARNING", "false") != "true":
            age = configured.get("TMPREAPER_TIME", "7d" if name == "tmpreaper" else "10d")
            return TmpCleaner(name, below, age, f"/etc/cron.daily/{name}")
    return None


def _shell_settings(path: Path) -> dict[str, str]:
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.strip().partition("=") for line in text.splitlines() if "=" in line)
    return {name: value.strip("'\" ") for name, _, value in pairs if name.isidentifier()}


def _is_below(directory: Path, above: str) -> bool:
    return directory == Path(above) or Path(above) in directory.parents


def _tmpfiles_timer_runs() -> bool:
    if not os.path.isdir("/run/systemd/system"):  # sd_booted(3)
        return False
    try:
        timer = ["systemctl", "is-active", "--quiet", "systemd-tmpfiles-clean.timer"]
        return subprocess.run(timer, timeout=10, check=False, capture_output=True).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return True


def _container_kind(environ: Mapping[str, str]) -> str | None:
    for variable, kind in (("APPTAINER_NAME", "Apptainer"), ("SINGULARITY_NAME", "Singularity")):
        if environ.get(variable):
            return kind
    if environ.get("KUBERNETES_SERVICE_HOST"):
        return "Kubernetes"
    if os.path.exists("/.dockerenv"):
        return "Docker"
    if os.path.exists("/run/.containerenv"):
        return "Podman"
    return (processes.read_environ(1) or {}).get("container") or environ.get("container") or None


def _shm_holders() -> Iterator[tuple[int, int]]:
    """The processes of this user that map files of /dev/shm, and how many bytes of them.

    Read off their maps, since torch unlinks such a file as soon as both sides have it.
    """
    for pid in own_pids():
        try:
            with open(f"/proc/{pid}/maps", "rb") as maps:
                lines = [line for line in maps if b" /dev/shm/" in line]
        except OSError:
            continue
        mapped = {}
        for line in lines:
            ends, _, offset, _, inode, *_ = line.split()
            start, end = (int(number, 16) for number in ends.split(b"-"))
            mapped[inode, offset] = end - start
        if mapped:
            yield pid, sum(mapped.values())


def _torch_extensions_directory(environ: Mapping[str, str]) -> Path:
    """Where torch.utils.cpp_extension builds: `_get_build_directory` there."""
    chosen = environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "torch_extensions"


def _is_here(host: str) -> bool:
    return host in ("", "localhost", "127.0.0.1", "::1", socket.gethostname())


def _listener(port: int) -> int | None:
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    for connection in connections:
        laddr = connection.laddr
        if connection.status == psutil.CONN_LISTEN and laddr and laddr.port == port:
            return connection.pid
    return None


@contextlib.contextmanager
def _made_for_now(directory: Path) -> Iterator[None]:
    """Remove, at the end, the directories that were made on the way down to this one."""
    missing = []
    for path in (directory, *directory.parents):
        if os.path.lexists(path):
            break
        missing.append(path)
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def _mountinfo() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text("utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _unescape(field: str) -> str:
    """A field of mountinfo, where spaces and the like are octal."""
    for octal, char in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        field = field.replace(octal, char)
    return field


def _shown(pid: int, width: int) -> str:
    """The command of a process, in at most so many columns."""
    return output.shorten(output.command(command_of(pid).split(" ")), width)


def _try_lock(path: Path) -> str:
    return _python(_LOCKER, str(path)).strip()


def _python(code: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """What a Python process of its own prints.

    Raises:
        subprocess.CalledProcessError, subprocess.TimeoutExpired
    """
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=_PATIENCE,
        env=None if env is None else {**os.environ, **env},
    ).stdout


_LOCKER = """
import os, sys
from orchard_infra.system.flock import lock_descriptor
print("taken" if lock_descriptor(os.open(sys.argv[1], os.O_RDWR)) else "refused")
"""

_ORPHAN = """
import os, time
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.001)
    print(os.getpid(), os.getppid(), flush=True)
os._exit(0)
"""

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

_SIGNALS = """
import json, os, signal
def disposition(signum):
    handler = signal.getsignal(signum)
    if handler in (signal.SIG_DFL, signal.default_int_handler):
        return "default"
    return "ignored" if handler == signal.SIG_IGN else repr(handler)
names = ("SIGINT", "SIGTERM", "SIGHUP")
found = {name: disposition(getattr(signal, name)) for name in names}
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
found["blocked"] = [name for name in names if getattr(signal, name) in blocked]
seen = []
signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
os.kill(os.getpid(), signal.SIGTERM)
found["handled"] = bool(seen)
print(json.dumps(found))
"""
