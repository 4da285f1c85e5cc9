"""Twins and relatives: what is compared when two processes may run the same thing.

Two processes are twins when everything that decides what they do is the same: the user, the
interpreter and its options, the program, its arguments, the working directory, the environment that
they were started with, and a file as the standard input. ``SEED=2 python sweep.py`` is no twin of
``SEED=1 python sweep.py``.
A process whose input another one may feed is nobody's twin. Whatever cannot be read makes no twin.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence

import attrs

from orchard_infra.runs.environ import comparable, environment_digest
from orchard_infra.runs.membership import is_ours
from orchard_infra.runs.record import RunRecord
from orchard_infra.sanitizing.inputs import Input, input_of, reason_for_work
from orchard_infra.sanitizing.programs import (
    Program,
    interpreter_at,
    might_be_python,
    parse_command,
    resolve,
)
from orchard_infra.system import processes
from orchard_infra.system.processes import ProcessIdentity

_NAMED = 3  # variables in a message
_IDLE = 1.0  # seconds without progress, from which on a process waits for something else


@attrs.frozen(eq=False, repr=False)
class Look:
    """One process, or a dead run on record, as it is compared with others.

    ``is_relative`` says that the script or the interpreter was named relative to some directory, as
    a module is.
    ``started_by`` is the command line without the program and its arguments: the interpreter, as
    it was typed, and its options. ``environ`` is the environment that the process was started with,
    None where it cannot be read. Of a dead run only a ``digest`` is known, keyed by its ``run_id``.
    ``unsure`` says why a dead run can have no twins.
    """

    pid: int
    create_time: float
    program: Program | None
    cwd: str | None
    is_relative: bool
    started_by: tuple[str, ...]
    environ: Mapping[str, str] | None = attrs.field(default=None, repr=False)
    input: Input | None = None
    digest: str | None = None
    run_id: str = ""  # the key of the digest
    unsure: str = ""

    @classmethod
    def at(cls, pid: int, argv: Sequence[str]) -> Look | None:
        """A live process; None where it runs no program that others may run, too."""
        found = processes.read_stat(pid)
        typed = parse_command(argv)
        if found is None or typed is None:
            return None
        cwd = processes.read_cwd(pid)
        return cls(
            pid=pid,
            create_time=found.create_time,
            program=resolve(typed, cwd),
            cwd=cwd,
            is_relative=_is_relative(argv[0], typed),
            started_by=_started_by(argv, typed),
            environ=processes.read_environ(pid) or None,  # zeros, after a change of the title
            input=input_of(pid),
        )

    @classmethod
    def at_myself(cls) -> Look | None:
        """What this process runs; None where that is nothing that others may run, too."""
        me = cls.at(os.getpid(), sys.orig_argv)
        if me is None or me.program is None:
            return None
        # After a chdir, a relative script resolves to another file. Only this process knows for
        # itself which one it runs.
        ran = getattr(sys.modules.get("__main__"), "__file__", None)
        is_script = me.is_relative and me.program.kind == "script"
        if is_script and ran is not None and os.path.realpath(ran) != me.program.target:
            return None
        return me

    @classmethod
    def at_run(cls, record: RunRecord) -> Look | None:
        """What a run on record executes, as far as that is certain."""
        typed = parse_command(record.argv)
        if typed is None or not record.is_local:
            return None
        if processes.is_alive(record.leader):
            look = cls.at(record.pid, record.argv)
            if look is None or look.create_time != record.create_time:
                return None
            return None if look.is_relative and not look.has_not_moved() else look
        is_relative = _is_relative(record.argv[0], typed)
        unsure = ""
        if is_relative:
            unsure = "nobody knows in which directory the dead run was started"
        elif record.environment is None:
            unsure = "the environment of the dead run is not on record"
        return cls(
            pid=record.pid,
            create_time=record.create_time,
            program=resolve(typed, record.cwd),
            cwd=record.cwd,
            is_relative=is_relative,
            started_by=_started_by(record.argv, typed),
            digest=record.environment,
            run_id=record.run_id,
            unsure=unsure,
        )

    def runs_what(self, other: Look) -> bool:
        """Whether both run the same program, whatever its arguments are."""
        if self.program is None or other.program is None:
            return False
        return (self.program.kind, self.program.target) == (
            other.program.kind,
            other.program.target,
        )

    def has_not_moved(self) -> bool:
        """Whether it still is in the directory that it was started in."""
        started_in = (self.environ or {}).get("PWD")
        return started_in is not None and os.path.realpath(started_in) == self.cwd

    def difference(self, me: Look) -> str:
        """Why this process is no twin of mine; empty when it is one."""
        if self.program is None or me.program is None or self.cwd is None:
            return "cannot be read whole"
        if self.program.arguments != me.program.arguments:
            return "other arguments"
        if self.started_by[1:] != me.started_by[1:]:  # python -O
            return "other options of Python"
        if self.cwd != me.cwd:
            return "other working directory"
        if _file_read(self) != _file_read(me):  # sweep.py < seed-1.yaml
            return "other standard input"
        # It may have changed its directory, too: then "train.py" was another file.
        same_start = (self.environ or {}).get("PWD") == (me.environ or {}).get("PWD")
        if self.is_relative and not self.has_not_moved() and not same_start:
            return "started in another directory"
        difference = self._difference_of_environments(me) or me.unsure
        if not difference and not self._has_interpreter_of(me):
            return "other interpreter"
        if difference or self.input == me.input:  # inherited, as in all steps of one CI job
            return difference
        return reason_for_work(self.pid, self.input)

    def _has_interpreter_of(self, me: Look) -> bool:
        """``python3.11 bench.py`` and ``other/.venv/bin/python bench.py`` are steps of a matrix."""
        if self.started_by[0] == me.started_by[0]:  # in the same directory, with the same PATH
            return True
        theirs, mine = (
            interpreter_at(look.started_by[0], look.cwd, (look.environ or {}).get("PATH", ""))
            for look in (self, me)
        )
        return theirs is not None and theirs == mine

    def _difference_of_environments(self, me: Look) -> str:
        if self.environ is None:
            return "its environment cannot be read"
        if me.environ is None:
            if me.digest is None:
                return me.unsure or "the environment of this process cannot be read"
            digest = environment_digest(self.environ, me.run_id)
            return "" if digest == me.digest else "other environment"
        theirs, mine = comparable(self.environ), comparable(me.environ)
        if theirs == mine:
            return ""
        names = sorted(name for name in {*theirs, *mine} if theirs.get(name) != mine.get(name))
        # Only names: values may be secret.
        more = ", ..." if len(names) > _NAMED else ""
        return f"other environment ({', '.join(names[:_NAMED])}{more})"


@attrs.define(eq=False, repr=False)
class Scan:
    """One look at all processes of the machine for those that run what ``me`` runs.

    Workers of one pool show the same command line, and so do the `sleep`s of a thousand shells:
    what a command line says is worked out once for all of them.
    """

    me: Look
    _typed: dict[bytes, Program | None] = attrs.field(factory=dict, init=False)
    _files: dict[str, tuple[int, int] | None] = attrs.field(factory=dict, init=False)

    def look(self) -> tuple[list[Look], list[int]]:
        """Our processes of the same program, and the pids of those without a command line (kernel
        threads, defunct processes). Nothing is compared yet.
        """
        alike, unnamed = [], []
        for pid in processes.all_pids():
            cmdline = processes.read_cmdline(pid)
            if not cmdline:
                unnamed.append(pid)
                continue
            if cmdline not in self._typed:
                self._typed[cmdline] = self._parse(cmdline)
            typed = self._typed[cmdline]
            if typed is None or pid == self.me.pid or not self._is_same(pid, typed):
                continue
            # A service with PrivateTmp has another registry, too: its run would be in none of ours.
            if not processes.sees_our_files(pid):
                continue
            look = Look.at(pid, processes.split_cmdline(cmdline))
            if look is not None and look.runs_what(self.me) and is_ours(pid):
                alike.append(look)
        return alike, unnamed

    def _parse(self, cmdline: bytes) -> Program | None:
        """What a command line runs, if that may be what we run."""
        if self.me.program is None or not might_be_python(cmdline):
            return None
        typed = parse_command(processes.split_cmdline(cmdline))
        return None if typed is None or typed.kind != self.me.program.kind else typed

    def _is_same(self, pid: int, typed: Program) -> bool:
        """A first look by one stat(2): the same module, or a path that leads to the same file."""
        mine = self.me.program
        if mine is None or typed.kind == "module":
            return mine is not None and typed.target == mine.target
        path = typed.target
        if not os.path.isabs(path):
            path = os.path.join(processes.read_cwd(pid) or "/nowhere", path)
        return self._file_at(path) == self._file_at(mine.target)

    def _file_at(self, path: str) -> tuple[int, int] | None:
        """The file to which a path leads, by device and inode; None for none."""
        if path not in self._files:
            try:
                found = os.stat(path)
                self._files[path] = found.st_dev, found.st_ino
            except (OSError, ValueError):
                self._files[path] = None
        return self._files[path]


@attrs.define(eq=False, repr=False)
class Progress:
    """Whether a young process may still be on its way to where it registers.

    Its age alone does not tell: on a busy machine one of two runs that started together may get
    little of the processor. ``needed`` is the processor time, in seconds, that is certainly enough
    to come there. A process that has had less, and that moves, may not be there yet.
    """

    needed: float
    _seen: dict[ProcessIdentity, tuple[float, float]] = attrs.field(factory=dict, init=False)

    def is_on_its_way(self, identity: ProcessIdentity) -> bool:
        used = _processor_time(identity.pid)
        if used is None or used >= self.needed:
            return False
        now = time.monotonic()
        before, moved_at = self._seen.get(identity, (-1.0, now))
        found = processes.read_stat(identity.pid)
        # R and D: it would go on if it had the processor, or the disk.
        if used > before or (found is not None and found.state in "RD"):
            moved_at = now
        self._seen[identity] = used, moved_at
        return now - moved_at < _IDLE


def _started_by(argv: Sequence[str], typed: Program) -> tuple[str, ...]:
    return tuple(argv[: len(argv) - len(typed.arguments) - 1])


def _is_relative(interpreter: str, typed: Program) -> bool:
    """Whether what runs depends on the directory in which it was started."""
    if os.path.dirname(interpreter) and not os.path.isabs(interpreter):
        return True
    return typed.kind == "module" or not os.path.isabs(typed.target)


def _file_read(look: Look) -> Input | None:
    """The regular file that a process reads as its input."""
    return look.input if look.input is not None and look.input.kind == "file" else None


def _processor_time(pid: int) -> float | None:
    """The processor time that a process has used, in seconds; None when it is gone."""
    import psutil

    try:
        times = psutil.Process(pid).cpu_times()
    except (psutil.Error, OSError):
        return None
    return float(times.user + times.system)
