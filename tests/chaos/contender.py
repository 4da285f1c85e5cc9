"""One contender: a run for a lock, with children, that is hit at some instant.

    python contender.py PLAN.json

`arena` writes the plan and judges the journal. A contender judges what only it can see: whether
somebody else holds its lock, whether anything of the former holders is left once it has
entered, and whether it has got its own process back when it has left.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by exec
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos.boundaries import Boundaries
from chaos.observing import Identity, Journal, has_gone, identity, lives, read_bytes, read_journal
from orchard_infra import (
    EnvironmentConfig,
    EnvironmentLockedError,
    FileLock,
    GhostSanitizer,
    InfrastructureManager,
    LockLostError,
    RunRegistry,
    SignalStop,
    TemporaryArtifacts,
    managed_environment,
)
from orchard_infra.locks.file import FileLease
from orchard_infra.stopping.signals import SignalWatch

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

FINE, FAILED, EXITED, BROKEN, LOCKED = 0, 3, 4, 70, 75  # exit statuses


class BodyError(Exception):
    """What a body raises that was told to fail."""


def begin(plan: dict[str, Any]) -> int:
    """Be the contender of this plan; the exit status. Exit hooks have run by then."""
    contender = Contender(plan)
    try:
        # As from a shell: pytest may run under nohup, or with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        status = contender.run()
    except KeyboardInterrupt:
        status = 130
    except BodyError:
        status = FAILED
    try:
        atexit._run_exitfuncs()
    except KeyboardInterrupt:
        status = 130
    return status if os.getpid() == contender.pid else 0


class Contender:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.pid = os.getpid()
        self.me = identity(self.pid)
        self.directory = Path(plan["directory"])
        self.project: str = plan["project"]
        self.journal = Journal(self.directory / "journal", plan["name"])
        self.boundaries = Boundaries(self.journal, plan["boundary"], trace=plan["trace"])
        self.is_releasing: bool | None = None  # None: has not entered
        self.marker = self.directory / f"{self.project}.holder"
        self.former: list[dict[str, Any]] = []  # who held the lock before, and had gone by then
        random.seed(plan["name"])
        # Both survive what a killed parent cannot write down: the name in forked children, the
        # variable in those started by exec. Neither is what the package looks at.
        Path("/proc/self/comm").write_text(plan["mark"])
        os.environ["CHAOS_MARK"] = plan["mark"]

    def run(self) -> int:
        self.journal.write("start", pid=self.pid, started=self.me.started)
        self._watch_the_lock()
        self.boundaries.install()
        logger = logging.getLogger(f"chaos.{self.plan['name']}")
        logger.addHandler(logging.FileHandler(self.directory / f"{self.plan['name']}.log"))
        status = BROKEN
        try:
            status = self._enter(logger)
        except EnvironmentLockedError as error:
            self.journal.write("locked out", message=str(error))
            status = LOCKED
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else BROKEN
        except (KeyboardInterrupt, BodyError):
            raise
        except BaseException:
            self.journal.write("unexpected", traceback=traceback.format_exc())
        finally:
            # Python can be interrupted between the last line of a block and its `__exit__`. It is
            # the exit hook that releases the environment then.
            if os.getpid() == self.pid and self.is_releasing in (None, True):
                self._check_own_process()
        return status

    def _enter(self, logger: logging.Logger) -> int:
        plan = self.plan
        manager = InfrastructureManager(
            sanitizer=GhostSanitizer(grace=plan["grace"], patience=plan["patience"]),
            locker=FileLock(timeout=plan["timeout"], interval=plan["interval"]),
            cleaner=TemporaryArtifacts(base=self.directory, private_shm=True),
            stopper=SignalStop(mode=plan["mode"]),
        )
        cfg = EnvironmentConfig(self.project, allow_process_kill=True)
        with managed_environment(cfg, manager=manager, logger=logger) as env:
            self.is_releasing = False
            self.journal.write("in", run_id=env.run.run_id)
            self._check_former_holders()
            (env.tmp_dir / "half-written").write_bytes(b"x" * 100)
            # As a library names shared memory that goes with its process.
            _shared_memory(self.pid).write_bytes(b"x")
            for kind in plan["children"]:
                self._start(kind)
            self.journal.write("working")
            self._work(env)
            _shared_memory(self.pid).unlink()
            self.journal.write("leaving")
            if plan["ending"] == "exception":
                raise BodyError
            if plan["ending"] == "sys.exit":
                sys.exit(EXITED)
            if plan["ending"] == "_exit":
                os._exit(9)
        return FINE

    def _work(self, env: Any) -> None:
        deadline = time.monotonic() + self.plan["body"]
        if self.plan["loses_lock"]:
            deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            if env.stop_requested and not self.plan["loses_lock"]:
                return
            if self.plan["loses_lock"] and env.lock_lost and env.stop_requested:
                break
            time.sleep(0.005)
        if self.plan["loses_lock"]:
            self._check_loss(env)

    # The children of a run.

    def _start(self, kind: str) -> None:
        sleep = ["sleep", str(1000 + self.plan["body"])]
        commands = {
            "exec": sleep,
            "exec-setsid": sleep,
            "opted-out": sleep,
            "exec-tree": ["sh", "-c", "sleep 1000 & sleep 1000 & wait"],
            "exec-stubborn": ["sh", "-c", "trap '' TERM INT HUP; while :; do sleep 1; done"],
            "exec-spawner": ["sh", "-c", "while :; do setsid sleep 100 & sleep 0.04; done"],
        }
        if kind in commands:
            environ = dict(os.environ)
            if kind == "opted-out":
                environ["ORCHARD_INFRA_RUN_ID"] = ""
            process = subprocess.Popen(
                commands[kind], env=environ, start_new_session=kind == "exec-setsid"
            )
            self._note(process.pid, kind)
            return
        pid = os.fork()
        if pid:
            if kind != "setsid":  # that one only makes others, and ends
                self._note(pid, kind)
            return
        if kind == "unwinds":
            self._note(os.getpid(), kind)
            raise SystemExit(FINE)  # out of a block that is its parent's
        try:
            self._be(kind)
        finally:
            os._exit(0)

    def _be(self, kind: str) -> None:
        parent = os.getppid()
        if kind in ("setsid", "tree"):
            if kind == "setsid":
                os.setsid()
            for _ in range(2):
                if not os.fork():
                    self._be("busy")
            if kind == "setsid":
                os._exit(0)
        self._note(os.getpid(), kind)
        if kind == "stubborn":
            for signum in _STOPPING:
                signal.signal(signum, signal.SIG_IGN)
        if kind == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        while kind != "idle" or os.getppid() == parent:  # as a worker that has lost its loader
            time.sleep(0.02 if kind == "idle" else 1000)

    def _note(self, pid: int, kind: str) -> None:
        who = identity(pid)
        if who is not None:
            self.journal.write("child", pid=pid, started=who.started, kind=kind)

    # What a contender sees of the invariants.

    def _watch_the_lock(self) -> None:
        """Claim an exclusive marker from the end of `acquire` to the beginning of `release`."""
        acquire, release = FileLock.acquire, FileLease.release
        register, hold = RunRegistry.register, SignalWatch.hold

        @functools.wraps(acquire)
        def claiming(*args: Any, **kwargs: Any) -> Any:
            lease = acquire(*args, **kwargs)
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
            self._claim(lease.record)
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
            except BaseException:
                self._drop()
                del lease  # the traceback keeps this frame
                raise
            return lease

        @functools.wraps(release)
        def dropping(lease: FileLease) -> None:
            self._drop()
            release(lease)

        @functools.wraps(register)
        def noting(registry: RunRegistry, record: Any) -> Any:
            self.journal.write("registering", run_id=record.run_id, tmp_dir=record.tmp_dir)
            return register(registry, record)

        @functools.wraps(hold)
        def beginning(watch: SignalWatch) -> None:
            if self.is_releasing is False:
                self.is_releasing = True
            hold(watch)

        SignalWatch.hold = beginning  # type: ignore[method-assign]
        FileLock.acquire = claiming  # type: ignore[method-assign]
        FileLease.release = dropping  # type: ignore[method-assign]
        RunRegistry.register = noting  # type: ignore[method-assign]

    def _claim(self, record: Any) -> None:
        draft = self.marker.with_suffix(f".{self.pid}")
        draft.write_text(json.dumps(self.me))
        while True:
            try:
                os.link(draft, self.marker)
                break
            except FileExistsError:
                other = self._holder()
            if other is not None and lives(other) and not self.plan["exclusion_may_end"]:
                self._violation(f"two holders of {self.project}: {other} and {self.me}")
                break
            self.marker.unlink(missing_ok=True)  # of a run that was killed
        draft.unlink()
        holders = self.directory / f"{self.project}.holders"
        for holder in read_journal(holders)[0]:
            gone = has_gone(Identity(holder["pid"], holder["started"]))
            self.former.append({**holder, "gone": gone})
        Journal(holders, self.plan["name"]).write(
            "holder",
            pid=self.pid,
            started=self.me.started,
            run_id=record.run_id,
            tmp_dir=record.tmp_dir,
        )
        self.journal.write("holds")

    def _drop(self) -> None:
        if self._holder() == self.me:
            self.marker.unlink(missing_ok=True)

    def _holder(self) -> Identity | None:
        try:
            return Identity(*json.loads(self.marker.read_text()))
        except FileNotFoundError:
            return None

    def _check_former_holders(self) -> None:
        """Whoever held the lock before has left it, or has died: nothing of it may be left."""
        if self.plan["exclusion_may_end"]:
            return
        former = {holder["who"]: holder for holder in self.former}
        for line in read_journal(self.directory / "journal")[0]:
            if line["event"] != "child" or line["who"] not in former:
                continue
            child = Identity(line["pid"], line["started"])
            if line["kind"] != "opted-out" and lives(child):
                self._violation(f"a process ({line['kind']}) of {line['who']} is left: {child}")
        for name, holder in former.items():
            if not holder["gone"]:
                continue  # it gives the lock back before it leaves the registry
            left = [Path(os.environ["ORCHARD_INFRA_DIR"], "runs", f"{holder['run_id']}.run")]
            left.append(Path(holder["tmp_dir"]))
            if identity(holder["pid"]) is None:  # else somebody else has its pid now
                left.append(_shared_memory(holder["pid"]))
            for path in left:
                # The runs of other rounds collect, too: one of them may be about to remove it.
                deadline = time.monotonic() + 1.0
                while path.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                if path.exists():
                    self._violation(f"{path} of {name} is left")

    def _check_loss(self, env: Any) -> None:
        if not env.lock_lost:
            self._violation("the loss of the lock was not noticed")
        if not env.stop_requested:
            self._violation("a lock was lost and no stop was requested")
        try:
            env.verify()
        except LockLostError:
            self.journal.write("lost")
        else:
            self._violation("verify() saw nothing of the loss of the lock")

    def _check_own_process(self) -> None:
        """Nothing of the environment is left in a process that lives on."""
        left = [str(handler) for handler in map(signal.getsignal, (signal.SIGTERM, signal.SIGHUP))]
        left = [handler for handler in left if handler != str(signal.SIG_DFL)]
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            left.append("the handler of SIGINT")
        if "ORCHARD_INFRA_RUN_ID" in os.environ:
            left.append("the run's id in the environment")
        left += [t.name for t in threading.enumerate() if t.name.startswith("orchard-infra")]
        for descriptor in os.listdir("/proc/self/fd"):
            if b"lock:" in read_bytes(f"/proc/self/fdinfo/{descriptor}"):
                left.append("the lock on " + os.readlink(f"/proc/self/fd/{descriptor}"))
        if left:
            self._violation(f"left in the process: {', '.join(left)}")

    def _violation(self, text: str) -> None:
        self.journal.write("violation", text=text)


def _shared_memory(pid: int) -> Path:
    return Path(f"/dev/shm/pym-{pid}-chaos")


if __name__ == "__main__":
    if sys.argv[1] == "--wait":  # a relative of the others that is in no run
        signal.pause()
    sys.exit(begin(json.loads(Path(sys.argv[1]).read_text())))
