"""One contender: a program with some runs and their children, that is hit at some instant.

    python contender.py PLAN.json

`arena` writes the plan and judges the journal. A contender judges what only it can see: whether
somebody else holds its lock, whether anything of the former holders is left once it has
entered, whether its own children live for as long as it does, and whether it has got its own
process back when it has left.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import functools
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by exec
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos.boundaries import Boundaries
from chaos.children import RUN_ID, Children
from chaos.ledger import Ledger, Program, Run
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
from orchard_infra.artifacts.sweeping import directory_name
from orchard_infra.locks.file import FileLease
from orchard_infra.locks.queue import Place, _Ticket
from orchard_infra.runs.registry import Registration
from orchard_infra.session import Session, open_sessions

FINE, FAILED, EXITED, BROKEN, LOCKED = 0, 3, 4, 70, 75  # exit statuses
_LINGERS = 120.0  # seconds, at most: somebody may have given up on this round


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
        if os.getpid() == contender.pid:
            contender.check_all_is_released()
    except KeyboardInterrupt:
        status = 130
    return status if os.getpid() == contender.pid else 0


class Contender:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.pid = os.getpid()
        self.me = identity(self.pid)
        self.directory = Path(plan["directory"])
        self.journal = Journal(self.directory / "journal", plan["name"])
        self.children = Children(self.journal)
        self.boundaries = Boundaries(self.journal, plan["boundary"], trace=plan["trace"])
        self.logger = logging.getLogger(f"chaos.{plan['name']}")
        self.stopping = threading.Event()  # for the run beside the others
        # Not Thread.is_alive: until Python 3.13 a join that a Ctrl-C interrupts says that the
        # thread has ended.
        self.beside_has_ended = threading.Event()
        self.beside_has_ended.set()
        self.descriptors = set(_descriptors())
        self.left_at = time.monotonic()  # the latest environment
        self.is_in_block = False
        self.is_beside_left = False  # the thread of the run beside still runs when the program ends
        self.was_disturbed = False  # by an exception anywhere
        # Who held a lock before us, by our run, and whether it had gone by the time we got it.
        self.former: dict[str, list[dict[str, Any]]] = {}
        self.blocks: dict[int, dict[str, Any]] = {}  # that each thread is in
        random.seed(plan["name"])
        # Both survive what a killed parent cannot write down: the name in forked children, the
        # variable in those started by exec. Neither is what the package looks at.
        Path("/proc/self/comm").write_text(plan["mark"])
        os.environ["CHAOS_MARK"] = plan["mark"]

    def run(self) -> int:
        self.journal.write("start", pid=self.pid, started=self.me.started)
        faulthandler.register(signal.SIGQUIT)
        self._watch()
        self.boundaries.install()
        self.logger.addHandler(
            logging.FileHandler(self.directory / f"{self.plan['name']}.log", delay=True)
        )
        status = BROKEN
        try:
            if self.plan["beside"] is not None:
                beside = threading.Thread(target=self._run_beside, daemon=True)
                self.beside_has_ended.clear()
                beside.start()
            status = self._play()
        except EnvironmentLockedError as error:
            self.journal.write("locked out", message=str(error))
            status = LOCKED
        except SystemExit as error:
            self.was_disturbed = True
            status = error.code if isinstance(error.code, int) else BROKEN
        except (KeyboardInterrupt, BodyError):
            self.was_disturbed = True
            raise
        except BaseException:
            self.was_disturbed = True
            self.journal.write("unexpected", traceback=traceback.format_exc())
        finally:
            if os.getpid() == self.pid:
                self._finish()
        return status

    def _play(self) -> int:
        """One run after the other, as a sweep does that catches what its trials raise."""
        *others, last = self.plan["blocks"]
        if self.plan["raises_on_child"]:
            signal.signal(signal.SIGCHLD, self._raise_on_child)
        for block in others:
            try:
                self._enter(block)
            except BodyError:
                self.was_disturbed = True
        try:
            self._enter(last)
        finally:
            if os.getpid() == self.pid and isinstance(sys.exc_info()[1], (BodyError, type(None))):
                self._go_on()
        return FINE

    def _raise_on_child(self, signum: int, frame: object) -> None:
        """Raise wherever the main thread is, once for each child that was killed."""
        if os.getpid() == self.pid and self.is_in_block and self.children.was_killed():
            raise BodyError

    def _enter(self, block: dict[str, Any]) -> None:
        self.is_in_block = True
        try:
            self._enter_block(block)
        finally:
            self.is_in_block = False

    def _enter_block(self, block: dict[str, Any]) -> None:
        self.blocks[threading.get_ident()] = block
        manager = InfrastructureManager(
            sanitizer=GhostSanitizer(
                grace=self.plan["grace"],
                patience=self.plan["patience"],
                leftovers=block["leftovers"],
            ),
            locker=FileLock(timeout=block["timeout"], interval=self.plan["interval"]),
            cleaner=TemporaryArtifacts(base=self.directory, private_shm=True),
            stopper=SignalStop(mode=self.plan["mode"]),
        )
        cfg = EnvironmentConfig(block["project"], allow_process_kill=True)
        managed = managed_environment(cfg, manager=manager, logger=self.logger)
        if block["style"] == "async":
            asyncio.run(self._enter_async(managed, block))
        elif block["style"] == "hand":
            env = manager.prepare_environment(cfg, self.logger)
            try:
                for seconds in self._body(env, block):
                    time.sleep(seconds)
            finally:
                InfrastructureManager().release_resources(cfg, self.logger)
        else:
            with managed as env:
                for seconds in self._body(env, block):
                    time.sleep(seconds)

    async def _enter_async(self, managed: managed_environment, block: dict[str, Any]) -> None:
        async with managed as env:
            for seconds in self._body(env, block):
                await asyncio.sleep(seconds)

    def _body(self, env: Any, block: dict[str, Any]) -> Iterator[float]:
        """What a run does, with the pauses that it makes."""
        run_id, project = env.run.run_id, block["project"]
        self.journal.write("in", run_id=run_id, project=project)
        self._check_former_holders(run_id)
        self._check_lock(env)
        self.children.use()
        (env.tmp_dir / "half-written").write_bytes(b"x" * 100)
        # As a library names shared memory that goes with its process.
        _shared_memory(self.pid).write_bytes(b"x")
        for kind in block["children"]:
            self.children.start(kind, run_id)
        self.journal.write("working", run_id=run_id)
        yield from self._work(env, block)
        self._check_lock(env)
        if self._is_main():
            self.children.use()
            _shared_memory(self.pid).unlink(missing_ok=True)
        self.journal.write("leaving", run_id=run_id, ending=block["ending"])
        if block["leftovers"] == "stop":
            self.children.forget(run_id)
        if block["ending"] == "exception":
            raise BodyError
        if block["ending"] == "sys.exit":
            sys.exit(EXITED)
        if block["ending"] == "_exit":
            os._exit(9)

    def _work(self, env: Any, block: dict[str, Any]) -> Iterator[float]:
        loses_lock = self.plan["loses_lock"]
        deadline = time.monotonic() + (20.0 if loses_lock else block["body"])
        while time.monotonic() < deadline:
            if env.stop_requested and not loses_lock:
                return
            if loses_lock and env.lock_lost and env.stop_requested:
                break
            if not self._is_main() and self.stopping.is_set():
                return
            yield 0.005 if block["body"] < 60 else 0.1
        if loses_lock:
            self._check_loss(env)

    def _run_beside(self) -> None:
        """In a thread: another run of this process, of another project."""
        self.stopping.wait(self.plan["beside"]["after"])
        try:
            self._enter(self.plan["beside"])
        except EnvironmentLockedError as error:
            self.journal.write("locked out", message=str(error))
        except BodyError:
            pass
        except BaseException:
            if os.getpid() == self.pid:
                self.journal.write("unexpected", traceback=traceback.format_exc())
        finally:
            if os.getpid() != self.pid:
                os._exit(0)  # a fork that has left the block of its parent
            self.beside_has_ended.set()

    def _go_on(self) -> None:
        """The program goes on after its last block, with the children that it still needs."""
        deadline = time.monotonic() + self.plan["goes_on"]
        if self.plan["goes_on"]:
            self.journal.write("goes on")
            for kind in self.plan["later"]:
                self.children.start(kind, None)
        while time.monotonic() < deadline:
            self.children.use()
            time.sleep(0.05)
        if self.plan["lingers"]:
            self.journal.write("lingers")
            end, deadline = self.directory / "end", time.monotonic() + _LINGERS
            while not end.exists() and time.monotonic() < deadline:
                self.children.use()
                time.sleep(0.02)

    def _finish(self) -> None:
        interrupt = self._wait_for_beside()
        # Python can be interrupted between the last line of a block and its `__exit__`. It is
        # the exit hook that releases the environment then.
        if not open_sessions():
            self.children.use()
            self._check_own_process()
        if self.plan["tidies"]:
            self.children.tidy()
        self.children.leave()
        self.journal.write("finishes")
        if interrupt is not None:
            raise interrupt

    def _wait_for_beside(self) -> BaseException | None:
        """Wait for the run in the other thread, whatever comes meanwhile; that is raised later."""
        self.stopping.set()
        interrupt = None
        deadline = time.monotonic() + 60.0
        while not self.beside_has_ended.is_set() and time.monotonic() < deadline:
            try:
                # It may wait for what the exit hook releases.
                if any(session.thread == threading.get_ident() for session in open_sessions()):
                    break
                self.beside_has_ended.wait(0.2)
            except KeyboardInterrupt as error:
                interrupt = error
        self.is_beside_left = not self.beside_has_ended.is_set()
        return interrupt

    def _is_main(self) -> bool:
        return threading.current_thread() is threading.main_thread()

    # What a contender sees of the invariants.

    def _watch(self) -> None:
        """Write the journal, and claim an exclusive marker for as long as a lock is held."""
        try_acquire, release = FileLock.try_acquire, FileLease.release
        register, close_session, leave = RunRegistry.register, Session.close, Session._leave
        arrive, take = Place.__enter__, _Ticket.__dict__["take"].__func__

        @functools.wraps(try_acquire)
        def claiming(lock: FileLock, key: Any, record: Any) -> Any:
            outcome = try_acquire(lock, key, record)
            if isinstance(outcome, FileLease):
                self._claim(record)  # signals are blocked
            return outcome

        @functools.wraps(release)
        def dropping(lease: FileLease) -> None:
            is_held = lease._fd >= 0 and os.getpid() == self.pid
            if is_held:
                self._drop(lease.record)
                self.journal.write("drops", run_id=lease.record.run_id)
            release(lease)
            if is_held:
                self.journal.write("dropped", run_id=lease.record.run_id)

        @functools.wraps(register)
        def noting(registry: RunRegistry, record: Any) -> Any:
            run_id, project = record.run_id, record.project
            self.journal.write(
                "registering",
                run_id=run_id,
                project=project,
                tmp_dir=str(self.directory / directory_name(run_id)),
                stops_leftovers=self.blocks[threading.get_ident()]["leftovers"] == "stop",
            )
            return register(registry, record)

        @functools.wraps(close_session)
        def closing(session: Session, error: BaseException | None = None) -> None:
            if os.getpid() == self.pid and not session.is_closed:
                self.journal.write("releasing", run_id=session.env.run.run_id)
            close_session(session, error)

        @functools.wraps(leave)
        def leaving(session: Session, error: BaseException | None) -> Any:
            try:
                return leave(session, error)
            finally:
                self.left_at = time.monotonic()

        @functools.wraps(arrive)
        def arriving(place: Place) -> Place:
            self.journal.write("arrives")
            return arrive(place)

        @functools.wraps(take)
        def taking(cls: type[_Ticket], directory: str, came: int) -> _Ticket:
            ticket = take(cls, directory, came)
            self.journal.write("waits")
            return ticket

        FileLock.try_acquire = claiming  # type: ignore[method-assign]
        FileLease.release = dropping  # type: ignore[method-assign]
        RunRegistry.register = noting  # type: ignore[method-assign]
        Session.close = closing  # type: ignore[method-assign]
        Session._leave = leaving  # type: ignore[method-assign]
        Place.__enter__ = arriving  # type: ignore[method-assign]
        _Ticket.take = classmethod(taking)  # type: ignore[method-assign, assignment]
        for name, first, last in (
            ("end", "ending", "ended"),
            ("abandon", "abandoning", "abandoned"),
            ("close", "closing", "closed"),
        ):
            self._watch_the_end(name, first, last)

    def _watch_the_end(self, name: str, first: str, last: str) -> None:
        end = getattr(Registration, name)

        @functools.wraps(end)
        def ending(registration: Registration, *arguments: Any) -> None:
            is_open = registration._fd >= 0 and os.getpid() == self.pid
            if is_open:
                self.journal.write(first, run_id=registration.record.run_id)
            end(registration, *arguments)
            if is_open:
                self.journal.write(last, run_id=registration.record.run_id)

        setattr(Registration, name, ending)

    def _marker(self, project: str) -> Path:
        return self.directory / f"{project}.holder"

    def _claim(self, record: Any) -> None:
        marker = self._marker(record.project)
        mine = [*self.me, record.run_id]
        draft = marker.with_suffix(f".{record.run_id}")
        draft.write_text(json.dumps(mine))
        while True:
            try:
                os.link(draft, marker)
                break
            except FileExistsError:
                other = _read_marker(marker)
            if other is not None and lives(Identity(*other[:2])):
                if not self.plan["exclusion_may_end"]:
                    self._violation(f"two holders of {record.project}: {other} and {mine}")
                break
            marker.unlink(missing_ok=True)  # of a run that was killed
        draft.unlink()
        holders = self.directory / f"{record.project}.holders"
        self.former[record.run_id] = former = []
        for holder in read_journal(holders)[0]:
            gone = has_gone(Identity(holder["pid"], holder["started"]))
            former.append({**holder, "gone": gone})
        Journal(holders, self.plan["name"]).write(
            "holder", pid=self.pid, started=self.me.started, run_id=record.run_id
        )
        self.journal.write("holds", run_id=record.run_id)

    def _drop(self, record: Any) -> None:
        marker = self._marker(record.project)
        if _read_marker(marker) == [*self.me, record.run_id]:
            marker.unlink(missing_ok=True)

    def _check_former_holders(self, run_id: str) -> None:
        """Whoever held the lock before has left it, or has died. What must be gone of it is, and
        what must live does.
        """
        if self.plan["exclusion_may_end"]:
            return
        ledger = Ledger()
        for line in read_journal(self.directory / "journal")[0]:
            ledger.enter(line)
        for holder in self.former[run_id]:
            program = ledger.programs[holder["who"]]
            run = program.runs[holder["run_id"]]
            if program.who != self.me:
                self._check_children(program, run, had_gone=holder["gone"])
                self._check_files(program, run, had_gone=holder["gone"])

    def _check_children(self, program: Program, run: Run, *, had_gone: bool) -> None:
        for child in program.children.values():
            if run.run_id not in (child.run, child.carries):
                continue
            if child.carries not in (None, run.run_id) and had_gone:
                continue  # a run of the project of that one sees to it
            if not had_gone:  # it may end in this moment, and its children be gone in the next
                alive = lives(child.who)
                if not alive and not program.has_gone:
                    self._check(program, child, alive, has_gone=False)
                continue
            self._check(program, child, lives(child.who), has_gone=True)

    def _check(self, program: Program, child: Any, alive: bool, *, has_gone: bool) -> None:
        verdict = program.verdict(child, has_gone=has_gone)
        if verdict == ("gone" if alive else "lives"):
            # It may have been hit since the journal was read.
            ledger = Ledger()
            for line in read_journal(self.directory / "journal")[0]:
                ledger.enter(line)
            child = ledger.child(child.who)
            if ledger.programs[program.name].verdict(child, has_gone=has_gone) != verdict:
                return
            what = "is left" if alive else "is gone"
            of = "has ended" if has_gone else "lives"
            self._violation(f"{child.kind} {child.who} of {program.name}, which {of}, {what}")

    def _check_files(self, program: Program, run: Run, *, had_gone: bool) -> None:
        if not had_gone:
            return  # it gives the lock back before it leaves the registry
        record = Path(os.environ["ORCHARD_INFRA_DIR"], "runs", f"{run.run_id}.run")
        for path in (record, Path(run.tmp_dir)):
            if path.exists() and not program.is_outlived(self.plan["mark"]):
                self._check_goes(path, program)
        if program.who is not None and identity(program.who.pid) is None:  # else its pid is taken
            self._check_goes(_shared_memory(program.who.pid), program)

    def _check_goes(self, path: Path, program: Program) -> None:
        # The runs of other rounds collect, too: one of them may be about to remove it.
        deadline = time.monotonic() + 1.0
        while path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if path.exists():
            self._violation(f"{path} of {program.name} is left")

    def _check_lock(self, env: Any) -> None:
        if self.plan["exclusion_may_end"]:
            return
        try:
            env.verify()
        except LockLostError as error:
            self._violation(f"lost a lock that nobody took: {error}")

    def _check_loss(self, env: Any) -> None:
        if not env.lock_lost:
            self._violation("the loss of the lock was not noticed")
        if not env.stop_requested:
            self._violation("a lock was lost and no stop was requested")
        try:
            env.verify()
        except LockLostError:
            self.journal.write("lost lock")
        else:
            self._violation("verify() saw nothing of the loss of the lock")

    def _check_own_process(self) -> None:
        """Nothing of the environments is left in a process that lives on."""
        left = [str(handler) for handler in map(signal.getsignal, (signal.SIGTERM, signal.SIGHUP))]
        left = [handler for handler in left if handler != str(signal.SIG_DFL)]
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            left.append("the handler of SIGINT")
        if signal.pthread_sigmask(signal.SIG_BLOCK, ()):
            left.append("blocked signals")
        if RUN_ID in os.environ:
            left.append("the run's id in the environment")
        threads = {thread.name for thread in threading.enumerate()}
        left += [name for name in threads if name.startswith("orchard-infra")]
        # It ends a second after the last environment, or with the last daemonic child, which it
        # watches while the program exits.
        may_last = time.monotonic() < self.left_at + 5.0 or self.children.has("served")
        if may_last and "orchard-infra-background" in left:
            left.remove("orchard-infra-background")
        if not self.was_disturbed:
            new = set(_descriptors()) - self.descriptors
            left += [target for _, target in new if target.endswith("(deleted)")]
        left += self._locks_held()
        if left:
            self._violation(f"left in the process: {', '.join(left)}")

    def check_all_is_released(self) -> None:
        """After the exit hooks."""
        if self.is_beside_left:
            return
        left = [f"the environment of {s.settings.project}" for s in open_sessions()]
        left += self._locks_held()
        if left:
            self._violation(f"left after the exit hooks: {', '.join(left)}")

    def _locks_held(self) -> list[str]:
        """Locks and tickets. Records of ended runs stay locked while their program lives."""
        runs = os.path.join(os.environ["ORCHARD_INFRA_DIR"], "runs")
        queues = os.path.join(os.environ["ORCHARD_INFRA_DIR"], "queues")
        left = []
        for descriptor, target in _descriptors():
            if target.endswith("(deleted)") and self.plan["beside"] and self.was_disturbed:
                # A Ctrl-C that another thread receives is held off by no mask, and a descriptor can
                # get lost. One without a name is in nobody's way.
                continue
            is_locked = b"lock:" in read_bytes(f"/proc/self/fdinfo/{descriptor}")
            if (is_locked and not target.startswith(runs)) or target.startswith(queues):
                left.append(f"the lock on {target}")
        return left

    def _violation(self, text: str) -> None:
        self.journal.write("violation", text=text)


def _descriptors() -> Iterator[tuple[str, str]]:
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            yield descriptor, os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue


def _read_marker(marker: Path) -> list[Any] | None:
    try:
        found: list[Any] = json.loads(marker.read_text())
        return found
    except FileNotFoundError:
        return None


def _shared_memory(pid: int) -> Path:
    return Path(f"/dev/shm/pym-{pid}-chaos")


if __name__ == "__main__":
    if sys.argv[1] == "--wait":  # a relative of the others that is in no run
        signal.pause()
    sys.exit(begin(json.loads(Path(sys.argv[1]).read_text())))
