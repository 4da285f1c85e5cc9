"""A real Slurm on loopback, without systemd and without an installation of its own.

    with SlurmServer.start(nodes=2) as slurm:
        job = slurm.submit(tmp_path, "train.sbatch")

Controller, authentication and one daemon for each virtual node are children of this process, on
free ports, with all their files in a directory of their own: several of them can run side by side.
``proctrack`` decides which processes of a job are signalled and found: "cgroup" is what production
uses, and needs root and a freezer of cgroup v1; "linuxproc" signals the whole tree of a job's
processes, and loses orphans.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

from support import wait_until

EXAMPLES = Path(__file__).parents[1] / "examples" / "slurm"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue", "srun")
KILL_WAIT = 30  # seconds between SIGTERM and SIGKILL, as by default
GRACE = 20  # seconds that the partition "patient" gives a job that is preempted

_FREEZER = Path("/sys/fs/cgroup/freezer")
_ISOLATED = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
_PATIENCE = 120.0  # seconds for a daemon to answer, or to end
# See "JOB STATE CODES" in squeue(1).
_OVER = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "TIMEOUT",
)  # fmt: skip
_REVOKED = 1.1  # seconds: the credentials of a job that has ended are void up to the whole second
_LOOK = 0.1  # seconds between two looks that start a process each
# The jobs' python is the one that runs the tests.
_PATH = os.pathsep.join(
    (os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")
)

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again.
AuthInfo=socket={directory}/munge.sock,cred_expire=120
{communication}
SlurmctldPort={port}
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmdLogFile={directory}/slurmd.%n.log
SlurmdSpoolDir={directory}/spool.%n
StateSaveLocation={directory}/state
ProctrackType=proctrack/{proctrack}
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait}
# As strict as a site may be: a step ends when one of its tasks has failed.
KillOnBadExit=1
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=1
PartitionName=patient Nodes=ALL DefaultTime=10 PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=ALL DefaultTime=10 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"needs Slurm ({', '.join(absent)}): run scripts/install-test-servers"
    return None


def best_proctrack() -> str:
    """How processes of a job can be tracked here: "cgroup" as in production, or "linuxproc"."""
    usable = os.geteuid() == 0 and os.access(_FREEZER / "cgroup.procs", os.W_OK)
    return "cgroup" if usable else "linuxproc"


def can_isolate() -> bool:
    """Whether each node can have a pid namespace of its own, as a host has."""
    return os.geteuid() == 0 and shutil.which("unshare") is not None


@attrs.define
class Job:
    """A job that was submitted."""

    server: SlurmServer
    id: str
    output_file: Path

    @property
    def output(self) -> str:
        try:
            return self.output_file.read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    @property
    def facts(self) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        shown = self.server.run("scontrol", "--oneliner", "show", "job", self.id)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    def cancel(self, *options: str) -> None:
        self.server.run("scancel", *options, self.id)

    def requeue(self) -> None:
        """Stop it, if it runs, and put it back into the queue; see `start_again`."""
        if self.is_over():
            time.sleep(_REVOKED)
        self.server.run("scontrol", "requeue", self.id)

    def start_again(self) -> None:
        """Wait until a requeued job is in the queue again, and have it start at once.

        Slurm itself lets it wait for a while; see cred_expire in slurm.conf(5).
        """
        wait_until(lambda: self.state == "PENDING", 30.0, what=self.transcript, interval=_LOOK / 2)
        self.server.run("scontrol", "update", f"JobId={self.id}", "StartTime=now+1")

    def element(self, number: int) -> Job:
        """An element of a job array."""
        name = f"{self.id}_{number}"
        return Job(self.server, name, self.output_file.with_name(f"slurm-{name}.out"))

    def wait_for(self, text: str, count: int = 1, timeout: float = 60.0) -> None:
        """Wait until the output has ``text`` so many times.

        Raises:
            AssertionError: It has not after ``timeout`` seconds, or the job is over without it.
        """
        deadline = time.monotonic() + timeout
        look_at_state = time.monotonic() + 1.0
        while self.output.count(text) < count:
            now = time.monotonic()
            ended = False
            if now > look_at_state:
                look_at_state = now + 1.0
                ended = self.is_over() and self.output.count(text) < count
            if ended or now > deadline:
                raise AssertionError(f"{text!r} is not there\n{self.transcript()}")
            time.sleep(0.01)

    def wait(self, timeout: float = 90.0) -> str:
        """Wait for its end; the state that it ended in."""
        wait_until(self.is_over, timeout, what=self.transcript, interval=_LOOK)
        return self.state

    def is_over(self) -> bool:
        # Not "none of the others": it is SIGNALING for an instant, for example.
        return self.state in _OVER

    def transcript(self) -> str:
        shown = self.server.run("scontrol", "show", "job", self.id)
        return f"{shown}\noutput:\n{self.output}"


@attrs.define(eq=False)
class SlurmServer:
    """The daemons, and the commands that talk to them. `start` starts one."""

    directory: Path
    nodes: tuple[str, ...]
    proctrack: str
    is_isolated: bool
    _daemons: dict[str, subprocess.Popen[bytes]] = attrs.field(factory=dict, init=False)

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        *,
        nodes: int = 1,
        proctrack: str | None = None,
        kill_wait: int = KILL_WAIT,
        grace: int = GRACE,
    ) -> Iterator[SlurmServer]:
        """Start one, and stop it, its jobs and all that belongs to it at the end.

        Raises:
            RuntimeError: A daemon did not start; its log is in the message.
        """
        # A short path: the name of a socket has at most 107 characters.
        directory = Path(tempfile.mkdtemp(prefix="oi-slurm-", dir="/tmp"))
        # A node's name is also that of its control group, which all servers share.
        word = f"n{os.getpid()}x{secrets.token_hex(2)}"
        names = tuple(f"{word}n{number}" for number in range(1, nodes + 1))
        server = cls(directory, names, proctrack or best_proctrack(), can_isolate())
        try:
            for is_last in (False, False, True):
                try:
                    server._configure(kill_wait, grace)
                    server._start_daemons()
                    break
                except RuntimeError:  # somebody else took a port meanwhile
                    if is_last:
                        raise
                    server._stop()
            yield server
        finally:
            server._stop()
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def environ(self) -> dict[str, str]:
        """What a command needs in its environment to find this server."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": _PATH}

    def run(self, *command: str, env: Mapping[str, str] | None = None, cwd: object = None) -> str:
        """Run a command of Slurm; its output.

        Raises:
            RuntimeError: It failed.
        """
        done = subprocess.run(
            command,
            env={**os.environ, **(env or {}), **self.environ},
            cwd=str(cwd or self.directory),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def submit(
        self,
        directory: Path,
        script: Path | str,
        *options: str,
        env: Mapping[str, str] | None = None,
    ) -> Job:
        """Submit a batch script: a file, or a text. It runs in ``directory``, where its output
        goes. Options go before those that the script has.
        """
        if not isinstance(script, Path):
            text, script = script, directory / f"{len(list(directory.glob('*.sbatch')))}.sbatch"
            script.write_text(text, "utf-8")
        is_array = "--array" in script.read_text("utf-8")
        job_id = self.run(
            "sbatch",
            "--parsable",
            "--output=slurm-%A_%a.out" if is_array else "--output=slurm-%j.out",
            *options,
            str(script),
            env={**(env or {}), "PYTHONUNBUFFERED": "1"},
            cwd=directory,
        )
        job_id = job_id.strip().partition(";")[0]
        return Job(self, job_id, directory / f"slurm-{job_id}.out")

    def cancel_all(self) -> None:
        """End every job at once, and wait until the nodes are free again."""
        jobs = self.run("squeue", "--noheader", "--format=%A").split()
        if jobs:
            for options in (("--signal=KILL", "--full"), ()):
                with contextlib.suppress(RuntimeError):  # it ended meanwhile
                    self.run("scancel", *options, *sorted(set(jobs)))
        wait_until(
            lambda: not self.run("squeue", "--noheader", "--format=%A"),
            what=self._told,
            interval=_LOOK,
        )

    def _configure(self, kill_wait: int, grace: int) -> None:
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (self.directory / name).mkdir(exist_ok=True)
        ports = _free_ports(1 + len(self.nodes))
        conf = _CONF.format(
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            directory=self.directory,
            port=ports[0],
            communication=_communication(),
            proctrack=self.proctrack,
            kill_wait=kill_wait,
            grace=grace,
            names=",".join(self.nodes),
            node_ports=",".join(map(str, ports[1:])),
        )
        (self.directory / "slurm.conf").write_text(conf)
        if self.proctrack == "cgroup":
            (self.directory / "cgroup.conf").write_text(
                "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
            )
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _start_daemons(self) -> None:
        conf = str(self.directory / "slurm.conf")
        munge = {
            name: f"--{name}={self.directory}/munge.{name.partition('-')[0]}"
            for name in ("key-file", "pid-file", "log-file", "seed-file")
        }
        self._start(
            *("munged", "--foreground", "--force", f"--socket={self.directory}/munge.sock"),
            *munge.values(),
        )
        wait_until((self.directory / "munge.sock").exists, what=self._told, interval=_LOOK)
        self._start("slurmctld", "-D", "-c", "-f", conf)
        wait_until(
            lambda: "is UP" in self._quietly("scontrol", "ping"), what=self._told, interval=_LOOK
        )
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node, "-f", conf)
        idle = ["idle"] * len(self.nodes)
        show = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
        wait_until(lambda: self._quietly(*show).split() == idle, what=self._told, interval=_LOOK)

    def _start(self, program: str, *arguments: str) -> None:
        name, command = program, [program, *arguments]
        if program == "slurmd":
            name = f"slurmd of {arguments[2]}"
            if self.is_isolated:
                # A shell is the first process: it reaps orphans, as init does.
                command = [*_ISOLATED, "bash", "-c", '"$@" & wait; wait', "init", *command]
        # Killed by the kernel when this process is: nothing else would.
        death = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
        with open(self.directory / f"{program}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                [*death, *command],
                env=self.environ,  # and nothing of a test: jobs would inherit it
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a Ctrl-C is for the tests
            )

    def _quietly(self, *command: str) -> str:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise RuntimeError(f"{name} ended with {daemon.returncode}\n{self._told()}")
        try:
            return self.run(*command)
        except RuntimeError:
            return ""

    def _stop(self) -> None:
        # slurmstepd outlives slurmd, so the jobs end first.
        if len(self._daemons) == 2 + len(self.nodes):
            with contextlib.suppress(RuntimeError, AssertionError):
                self.cancel_all()
        for name, daemon in reversed(self._daemons.items()):
            if self.is_isolated and name.startswith("slurmd"):
                daemon.kill()  # and with it everything in its pid namespace
            else:
                daemon.terminate()
            try:
                daemon.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        if self.proctrack == "cgroup":
            for node in self.nodes:
                for path, _, _ in os.walk(_FREEZER / f"slurm_{node}", topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(path)

    def _told(self) -> str:
        """The ends of the daemons' logs."""
        told = []
        for path in sorted((*self.directory.glob("*.log"), *self.directory.glob("*.out"))):
            lines = path.read_text("utf-8", errors="replace").splitlines()[-10:]
            told.append("\n".join((f"{path.name}:", *lines)))
        return "\n".join(told)


def _communication() -> str:
    """Listen where the host name points to, if that is loopback, and not to the whole network."""
    try:
        local = socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        local = False
    return "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if local else ""


def _free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
