"""Hosts for tests: namespaces of the kernel that look like machines with cables between them.

    with Network(tmp_path, "server", "alpha", "beta") as network:
        server, alpha, beta = network.hosts
        with PostgresServer(host=server) as database:
            holder = alpha.run_python(source, database.url)
            network.cut(alpha, server, "from")  # what the server sends is lost, silently
            network.heal()

Each host has a name, a network, a pid namespace and a boot id of its own, shared memory of its
own, and directories of its own for run records and temporary files; all other files are shared. It
lives as long as the first process in it, which ends with its owner, also when that is killed. With
it go all processes on the host, its interfaces and the other end of each cable: nothing has a
name that could be left behind. The fixture ``network`` is made of the three hosts above.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import psutil
import pytest

import slow_cable
from servers import PATH, call, program
from support import TEST_MARK, Script, _free_log, environment, wait_until, written

if TYPE_CHECKING:
    from typing_extensions import Self

Direction = Literal["to", "from", "both"]

_PROGRAMS = ("ip", "mount", "nft", "nsenter", "setsid", "unshare")
_NAMESPACES = "--net --uts --ipc --mount --pid"

# The first process of a host. Orphans become its children, and the kernel reaps them because it
# ignores SIGCHLD.
_INIT = """
import select, signal, socket, subprocess, sys

owner, name, boot_id = sys.argv[1:]
socket.sethostname(name)
for command in (
    ["mount", "--bind", boot_id, "/proc/sys/kernel/random/boot_id"],
    ["mount", "-t", "tmpfs", "shm", "/dev/shm"],
    ["ip", "link", "set", "lo", "up"],
):
    subprocess.run(command, check=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("up", flush=True)
poll = select.poll()
poll.register(int(owner), select.POLLIN)
poll.poll()
"""


@functools.cache
def missing() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if not sys.platform.startswith("linux"):
        return "needs network namespaces: not on this system"
    absent = [name for name in _PROGRAMS if program(name) is None]
    if absent:
        return f"needs network namespaces ({', '.join(absent)}): run scripts/install-test-servers"
    try:
        call(f"unshare {_NAMESPACES} --fork ip link add v0 type veth")
    except AssertionError as error:
        return f"needs network namespaces, that is, root: {error}"
    return None


class HostScript(Script):
    """A process on a host. ``pid`` is of the one that stands for it outside, so send signals by
    the methods.
    """

    @property
    def inner_pid(self) -> int:
        """The pid of the process itself, as it is seen from outside of the host."""
        return self._find_inner().pid

    _inner: psutil.Process | None = None

    def _find_inner(self) -> psutil.Process:
        def look() -> psutil.Process | None:
            if self.poll() is not None:
                raise AssertionError(f"ended with {self.returncode}\n{self.transcript()}")
            children = psutil.Process(self.pid).children()
            return children[0] if children else None

        if self._inner is None:
            self._inner = wait_until(look, what=self.transcript)
        assert self._inner is not None
        return self._inner

    def send_signal(self, sig: int) -> None:
        if self.poll() is not None:
            return
        with contextlib.suppress(AssertionError, psutil.NoSuchProcess):
            self._find_inner().send_signal(sig)
        # nsenter(1) stops when its child is stopped, and would not see its end then.
        if sig in (signal.SIGCONT, signal.SIGKILL):
            super().send_signal(signal.SIGCONT)


class Host:
    """A machine. ``address`` is where the other hosts of its network find it."""

    def __init__(self, name: str, address: str, directory: Path) -> None:
        self.name = name
        self.address = address
        self.directory = directory
        self.registry = directory / "run"
        """Its ``ORCHARD_INFRA_DIR``."""
        for path in (self.registry, directory / "tmp"):
            path.mkdir(mode=0o700, parents=True)
        boot_id = directory / "boot_id"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        variables = {name: value for name, value in os.environ.items() if name != TEST_MARK}
        # Not a child of ours: the tests stop every child that a test leaves, and a host may be
        # shared by several. The shell says which process unshare(1) becomes.
        start = 'echo $$; exec unshare $0 --fork --mount-proc -- "$@"'
        owner = os.pidfd_open(os.getpid())
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, owner)
            self._process = subprocess.Popen(
                [
                    *("setsid", "--fork", "sh", "-c", start, _NAMESPACES),
                    *(sys.executable, "-I", "-S", "-c", _INIT, str(owner), name, str(boot_id)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context(self._log.open("wb")),
                env={**variables, "PATH": PATH},
                cwd="/",
                pass_fds=(owner,),
            )

    @property
    def _log(self) -> Path:
        return self.directory / "init.log"

    def _wait_up(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            outside = int(answers.readline())
            if answers.readline() != b"up\n":
                raise AssertionError(f"{self.name} did not come up: {self._log.read_text()}")
        self._process.wait()
        (init,) = psutil.Process(outside).children()
        self._init = init.pid
        self._pidfd = os.pidfd_open(init.pid)

    @property
    def enter_network(self) -> list[str]:
        """What to put before a command that shall use the network of this host, and no more."""
        return ["nsenter", f"--target={self._init}", "--net", "--"]

    @property
    def enter(self) -> list[str]:
        """What to put before a command that shall run on this host."""
        return [
            "nsenter",
            f"--target={self._init}",
            *["--net", "--uts", "--ipc", "--mount", "--pid", "--"],
        ]

    def run_python(
        self,
        source: str | Path,
        *arguments: str,
        env: Mapping[str, str | None] | None = None,
        name: str = "script.py",
        cwd: Path | None = None,
        options: Sequence[str] = (),
        **popen: Any,
    ) -> HostScript:
        """As `support.run_python`, on this host. The working directory is one of the host's."""
        path = source if isinstance(source, Path) else written(self.directory / name, source)
        command = [sys.executable, *options, str(path), *arguments]
        return self.run_command(command, env=env, cwd=cwd, **popen)

    def run_command(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        **popen: Any,
    ) -> HostScript:
        """As `support.run_command`, on this host."""
        cwd = self.directory if cwd is None else cwd
        ours = {"ORCHARD_INFRA_DIR": str(self.registry), "TMPDIR": str(self.directory / "tmp")}
        return HostScript(
            # The change of the mount namespace loses the working directory.
            [*self.enter, "env", "-C", str(cwd), *command],
            log=_free_log(self.directory),
            env=environment({**ours, **(env or {})}),
            cwd=cwd,
            **popen,
        )

    def power_off(self) -> None:
        """End it as a power failure does: its processes are gone, and tell nobody."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        select.select([self._pidfd], [], [])

    def _close(self) -> None:
        if hasattr(self, "_pidfd"):
            self.power_off()
            os.close(self._pidfd)

    def _batch(self, tool: str, *lines: str) -> None:
        command = {"ip": "ip -batch -", "nft": "nft -f -"}[tool]
        call(command, lead=self.enter_network, input="\n".join(lines) + "\n")


class Network:
    """Hosts with a cable from each to each."""

    def __init__(self, directory: Path, *names: str) -> None:
        self._names = names
        self._directory = directory
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        with self._stack:
            for number, name in enumerate(self._names, start=1):
                host = Host(name, f"10.77.0.{number}", self._directory / name)
                self._stack.callback(host._close)
                self.hosts.append(host)
            for host in self.hosts:  # they come up side by side
                host._wait_up()
            for one, other in itertools.combinations(self.hosts, 2):
                self._connect(one, other)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    def cut(self, one: Host, other: Host, direction: Direction = "both") -> None:
        """Lose packets silently: what ``one`` sends to ``other``, what comes from it, or both.

        They are dropped where they arrive. A sender that drops its own packets would notice.
        """
        if direction in ("to", "both"):
            _drop(other, one)
        if direction in ("from", "both"):
            _drop(one, other)

    def heal(self) -> None:
        """Let all packets through again."""
        for host in self.hosts:
            host._batch("nft", "add table inet cables", "delete table inet cables")

    def delay(self, one: Host, other: Host, seconds: float) -> contextlib.ExitStack:
        """Have every packet between two hosts take so many seconds longer, each way, until what is
        returned is closed.
        """
        names = [f"slow-{host.name}"[:15] for host in (other, one)]
        stack = contextlib.ExitStack()
        owner = os.pidfd_open(os.getpid())
        stack.callback(os.close, owner)
        cable = subprocess.Popen(
            [
                *(*one.enter_network, sys.executable, "-I", "-S", slow_cable.__file__),
                *(str(owner), str(seconds), *names, *other.enter_network),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=(owner,),
            env={**os.environ, "PATH": PATH},
        )
        stack.enter_context(cable)
        stack.callback(cable.kill)
        assert cable.stdout is not None
        assert cable.stdout.readline() == b"ready\n"
        for host, peer, name in ((one, other, names[0]), (other, one, names[1])):
            route = f"route replace {peer.address} src {host.address} dev"
            host._batch("ip", f"link set {name} up", f"{route} {name}")
            stack.callback(host._batch, "ip", f"{route} {_interface(peer)}")
        self._stack.callback(stack.close)
        return stack

    def _connect(self, one: Host, other: Host) -> None:
        # No switch is needed where each host has an interface for each other one.
        names = [_interface(host) for host in (other, one)]
        one._batch("ip", f"link add {names[0]} type veth peer name {names[1]} netns {other._init}")
        for host, peer, name in ((one, other, names[0]), (other, one, names[1])):
            host._batch(
                "ip",
                f"address add {host.address} peer {peer.address} dev {name}",
                f"link set {name} up",
            )


def _interface(peer: Host) -> str:
    """The name that the interface to this host has on another one; 15 characters at most."""
    return f"to-{peer.name}"[:15]


def _drop(at: Host, sender: Host) -> None:
    at._batch(
        "nft",
        "add table inet cables",
        "add chain inet cables arriving { type filter hook prerouting priority -300; }",
        f"add rule inet cables arriving ip saddr {sender.address} drop",
    )


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """Three hosts: "server", "alpha" and "beta"."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Network(tmp_path, "server", "alpha", "beta") as network:
        yield network
