"""What becomes of a lock when something breaks: real servers, on hosts of network namespaces.

A holder on one host writes its fence to a file, and asks `env.ensure_held()` before each write; a
run on another host waits for the lock. Then one thing breaks. For each lock and fault: seconds
until the waiter has the lock, seconds until the holder knows that it has lost it, and how many
writes came after one of a later holder. At last two hosts contend while faults strike at random.
The table in docs/locks.md is from here.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
from _harness import Goal, Outcome, Row, main

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hosts import Host, HostScript, Network, missing
from servers import PostgresServer, RedisServer
from support import wait_until

Server = PostgresServer | RedisServer

WATCH = 75.0  # seconds after a fault that somebody may need: the ttl, or the server's keepalives
CALM = 15.0  # the same for a fault that should change nothing
STORM = 600.0  # seconds of random faults
PATIENCE = 120.0

LOCK = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from orchard_infra import AllOf, FileLock, InfrastructureManager, PostgresLock, RedisLock

def lock_of(kind, url, guard):
    if kind == "FileLock":
        return FileLock(timeout=None)
    if kind == "RedisLock":
        return RedisLock(url, timeout=None, guard=guard)
    if kind == "AllOf":
        return AllOf(FileLock(), PostgresLock(url), timeout=None)
    return PostgresLock(url, timeout=None)

kind, url, guard, path, lock_path = sys.argv[1:6]
manager = InfrastructureManager(locker=lock_of(kind, url, guard == "guard"), sanitizer=None)
file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
"""

HOLDER = (
    LOCK
    + """
import signal, threading, time
from types import SimpleNamespace
from orchard_infra import LockLostError, managed_environment

orders = []
def listen():
    for line in sys.stdin:
        orders.append(line.strip())
threading.Thread(target=listen, daemon=True).start()
def tell_loss(env):
    while not env.lock_lost:
        time.sleep(0.002)
    os.write(1, f"lost {time.monotonic()}\\n".encode())

hardware = SimpleNamespace(allow_process_kill=False, lock_file_path=lock_path)
with managed_environment(SimpleNamespace(hardware=hardware), manager=manager) as env:
    os.write(1, f"held {time.monotonic()} {env.fence}\\n".encode())
    threading.Thread(target=tell_loss, args=(env,), daemon=True).start()
    fence = env.fence
    while True:
        order = orders.pop() if orders else None
        if order == "release":
            break
        if order == "pause":  # between two writes: one that is under way cannot be recalled
            os.kill(os.getpid(), signal.SIGSTOP)
        if order == "fork" and os.fork() == 0:
            while True:
                signal.pause()
        try:
            env.ensure_held()
        except LockLostError:
            break
        os.write(file, f"{fence}\\n".encode())
        time.sleep(0.01)
"""
)

# Comes and goes for as long as the storm lasts.
CONTENDER = (
    LOCK
    + """
import random, time
from types import SimpleNamespace
from orchard_infra import InfrastructureError, LockLostError, managed_environment

hardware = SimpleNamespace(allow_process_kill=False, lock_file_path=lock_path)
cfg = SimpleNamespace(hardware=hardware)
until = time.monotonic() + float(sys.argv[6])
held = lost = 0
while time.monotonic() < until:
    try:
        with managed_environment(cfg, manager=manager, timeout=5) as env:
            held += 1
            leave = time.monotonic() + random.uniform(0.1, 2)
            while time.monotonic() < leave:
                env.ensure_held()
                os.write(file, f"{env.fence}\\n".encode())
                time.sleep(0.005)
    except LockLostError:
        lost += 1
    except InfrastructureError:
        time.sleep(0.2)  # held by the other one, or the server is away
print("done", held, lost, flush=True)
"""
)


@attrs.define
class Scene:
    """One trial: two hosts, a server, a holder, and a file that both write to."""

    kind: str
    directory: Path
    network: Network
    server: Server | None
    guard: bool = False
    holder: HostScript | None = None
    waiter: HostScript | None = None
    url: str = ""

    @property
    def writes(self) -> Path:
        return self.directory / "writes"

    def start(self, host: Host, source: str, *more: str) -> HostScript:
        guard = "guard" if self.guard else "no guard"
        # A file lock is on what hosts have in common: here it is one machine.
        lock = self.directory / (host.name if self.kind == "AllOf" else "shared") / "run.lock"
        arguments = (self.kind, self.url, guard, str(self.writes), str(lock), *more)
        return host.run_python(source, *arguments, name=f"{host.name}.py")

    def overlap(self) -> int:
        """How many writes came after one of a later holder."""
        latest = count = 0
        for line in self.writes.read_text().splitlines() if self.writes.exists() else ():
            fence = int(line)
            count += fence < latest
            latest = max(latest, fence)
        return count


@attrs.frozen
class Fault:
    """``strike`` breaks something; ``mend`` is called when the waiter has the lock, or nobody got
    it within ``watch`` seconds.
    """

    name: str
    strike: Callable[[Scene], object]
    mend: Callable[[Scene], object] = lambda scene: None
    watch: float = WATCH
    before: Callable[[Scene], object] = lambda scene: None
    guard: bool = False


@attrs.frozen
class Result:
    kind: str
    fault: str
    free: float | None  # seconds until the waiter has it
    known: float | None  # seconds until the holder knows
    overlap: int

    def row(self) -> str:
        free = "stays held" if self.free is None else f"{self.free:.2f}"
        return f"| {self.fault} | {free} | {_seconds(self.known)} | {self.overlap} |"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _order(scene: Scene, order: str) -> None:
    assert scene.holder is not None
    scene.holder.tell(order)


def _signal_holder(number: signal.Signals) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        assert scene.holder is not None
        scene.holder.send_signal(number)

    return strike


def _pause_holder(scene: Scene) -> None:
    _order(scene, "pause")
    holder = scene.holder
    assert holder is not None
    wait_until(lambda: _state(holder.inner_pid) == "T")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _cut(direction: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.network.cut(scene.network["alpha"], scene.network["server"], direction)

    return strike


def _power_off(scene: Scene) -> None:
    _cut("both")(scene)  # else its kernel would still close the connections
    scene.network["alpha"].power_off()


def _heal(scene: Scene) -> None:
    scene.network.heal()


def _server(act: Callable[[Server], object]) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        assert scene.server is not None
        act(scene.server)

    return strike


FAULTS = (
    Fault("holder killed", _signal_holder(signal.SIGKILL)),
    Fault("holder's host loses power", _power_off),
    Fault("holder stopped for 40 s", _pause_holder, _signal_holder(signal.SIGCONT), 40.0),
    Fault(
        "holder killed, a forked worker lives",
        _signal_holder(signal.SIGKILL),
        before=lambda scene: _order(scene, "fork"),
    ),
    Fault("connection closed by the server", _server(lambda s: s.disconnect_clients()), watch=CALM),
    Fault("server restarted with its data", _server(lambda s: s.restart()), watch=CALM, guard=True),
    Fault("server emptied", _server(lambda s: s.restart(keep_data=False)), guard=True),
    Fault(
        "server stands still for 8 s",
        _server(lambda s: s.pause()),
        _server(lambda s: s.resume()),
        watch=8.0,
    ),
    Fault("what the holder sends is dropped", _cut("to"), _heal),
    Fault("what is sent to the holder is dropped", _cut("from"), _heal),
    Fault("both are dropped", _cut("both"), _heal),
)
KINDS = ("PostgresLock", "RedisLock")


def measure(quick: bool, directory: Path) -> Outcome:
    outcome = Outcome()
    reasons = [missing(), PostgresServer.missing(), RedisServer.missing()]
    if any(reasons):
        outcome.notes.append(next(reason for reason in reasons if reason))
        return outcome
    faults = FAULTS[:1] if quick else FAULTS
    kinds = ("PostgresLock",) if quick else KINDS
    results: list[Result] = []
    with ThreadPoolExecutor() as threads:
        works = [threads.submit(_all, kind, faults, directory) for kind in kinds]
        if not quick:
            works += [
                threads.submit(_all, kind, FAULTS[:1], directory) for kind in ("AllOf", "FileLock")
            ]
        for work in works:
            results += work.result()
        storms = [
            threads.submit(_storm, kind, 5.0 if quick else STORM, directory, seed)
            for seed, kind in enumerate(kinds)
        ]
        for storm in storms:
            name, held, lost, overlap = storm.result()
            outcome.notes.append(
                f"{name}: {held} times held on two hosts among random faults, {lost} times lost, "
                f"{overlap} writes out of order"
            )
            outcome.goals.append(Goal(f"{name}, storm: writes out of order", overlap, 0, ""))
    for result in results:
        name = f"{result.kind}: {result.fault}"
        if result.free is not None:
            outcome.rows.append(Row(f"{name}: free", [result.free], "s"))
        if result.known is not None:
            outcome.rows.append(Row(f"{name}: known", [result.known], "s"))
        outcome.goals.append(Goal(f"{name}: writes out of order", result.overlap, 0, ""))
    for kind in (*KINDS, "AllOf", "FileLock"):
        outcome.notes += [result.row() for result in results if result.kind == kind]
    return outcome


def _all(kind: str, faults: tuple[Fault, ...], directory: Path) -> list[Result]:
    return [_try(kind, fault, directory / f"{kind}-{index}") for index, fault in enumerate(faults)]


@contextlib.contextmanager
def _scene(kind: str, directory: Path, *, guard: bool = False) -> Iterator[Scene]:
    directory.mkdir()
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(directory / "hosts", "server", "alpha", "beta"))
        server: Server | None = None
        if kind == "RedisLock":
            server = stack.enter_context(RedisServer(host=network["server"]))
        elif kind != "FileLock":
            server = stack.enter_context(PostgresServer(host=network["server"]))
        scene = Scene(kind, directory, network, server, guard)
        scene.url = "" if server is None else server.url
        yield scene


def _try(kind: str, fault: Fault, directory: Path) -> Result:
    with _scene(kind, directory, guard=fault.guard) as scene:
        scene.holder = holder = scene.start(scene.network["alpha"], HOLDER)
        wait_until(lambda: _told(holder, "held"), PATIENCE, what=holder.transcript)
        scene.waiter = waiter = scene.start(scene.network["beta"], HOLDER)
        waiter.wait_for("waiting for the lock", PATIENCE)
        fault.before(scene)
        time.sleep(1.0)  # the holder writes for a while
        struck = time.monotonic()
        fault.strike(scene)
        watch = struck + fault.watch
        wait_until(
            lambda: _told(waiter, "held") is not None or time.monotonic() > watch, fault.watch + 30
        )
        fault.mend(scene)
        # A holder that was only kept from its server shall see what it has missed.
        after = time.monotonic() + 8.0
        wait_until(lambda: _told(holder, "lost") is not None or time.monotonic() > after, 30)
        free, known = _told(waiter, "held"), _told(holder, "lost")
        return Result(
            kind,
            fault.name,
            None if free is None else free - struck,
            None if known is None else known - struck,
            scene.overlap(),
        )


def _told(script: HostScript, word: str) -> float | None:
    for line in script.output.splitlines():
        if line.startswith(f"{word} "):
            return float(line.split()[1])
    return None


def _storm(kind: str, seconds: float, directory: Path, seed: int) -> tuple[str, int, int, int]:
    """Two hosts contend while one fault after another strikes, and is mended."""
    rng = random.Random(seed)
    with _scene(kind, directory / f"storm-{kind}", guard=True) as scene:
        server, network = scene.server, scene.network
        assert server is not None
        hosts = [network["alpha"], network["beta"]]
        contenders = [scene.start(host, CONTENDER, str(seconds)) for host in hosts]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            _strike(rng, server, network, contenders, end)
            time.sleep(min(rng.uniform(0.5, 4), seconds / 4))
        network.heal()
        held = lost = 0
        for script in contenders:
            words = script.wait_for("done", PATIENCE).split()
            held, lost = held + int(words[1]), lost + int(words[2])
        return kind, held, lost, scene.overlap()


def _strike(
    rng: random.Random,
    server: Server,
    network: Network,
    contenders: list[HostScript],
    end: float,
) -> None:
    def last(longest: float) -> None:
        time.sleep(max(0.0, min(rng.uniform(0.5, longest), end - time.monotonic())))

    host = rng.choice([network["alpha"], network["beta"]])
    match rng.randrange(6):
        case 0:
            server.disconnect_clients()
        case 1:
            server.restart()
        case 2:
            server.pause()
            last(8)
            server.resume()
        case 3:
            network.cut(host, network["server"], rng.choice(["to", "from", "both"]))
            last(40)
            network.heal()
        case 4:
            script = rng.choice(contenders)
            script.send_signal(signal.SIGSTOP)
            last(40)
            script.send_signal(signal.SIGCONT)
        case _:
            server.kill()
            last(3)
            server.start()


if __name__ == "__main__":
    sys.exit(main("lock_faults.py", __doc__, measure))
