"""Temporary artifacts of a run: a directory of its own, and its half-written outputs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

from orchard_infra.artifacts.outputs import check_patterns, patterns, remove_outputs
from orchard_infra.artifacts.removing import Removal
from orchard_infra.artifacts.sweeping import directory_name, sweep, tell
from orchard_infra.environment import Environment
from orchard_infra.errors import InfrastructureError
from orchard_infra.system import files
from orchard_infra.system.exported import export


@attrs.frozen
class TemporaryArtifacts:
    """One directory for each run, ``env.tmp_dir``, which is removed however the run ends. Before
    that, what dead runs left is removed.

    ``keep_on_error`` keeps the directory when the run failed. This is for a run that saw its own
    end: what a killed one left is removed by the next prepare.

    ``set_tmpdir`` makes it the TMPDIR of the processes that the run starts by exec. Off by
    default: caches move, and a path of that length breaks AF_UNIX sockets. This process and its
    forks keep the temporary directory that they have.

    ``patterns`` are globs of half-written outputs, relative to the working directory in which the
    run began: ``*.tmp``, ``checkpoints/**/*.part``. When the run ends, well or not (what is
    complete has its final name by then), matches are removed that are regular files of our own,
    were modified since the run began, and are open in no other process. Names that begin
    with a dot match only a pattern that does, too. Links are followed up to the first
    wildcard, not after it.

    ``base`` is where the directory is made. The default is that of `tempfile`.

    ``private_shm`` says that this container shares ``/dev/shm`` with no other one. A pid that is
    not visible inside a container may belong to a live process outside of it. Therefore shared
    memory of dead processes is removed in a container only if this is set.
    """

    keep_on_error: bool = False
    set_tmpdir: bool = False
    patterns: tuple[str, ...] = attrs.field(
        default=(), converter=patterns, validator=check_patterns
    )
    base: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    private_shm: bool = attrs.field(default=False, kw_only=True)

    @contextlib.contextmanager
    def around(self, env: Environment) -> Iterator[None]:
        """Make the directory, and remove it at the end: see ``env.report.cleaned``. No other user
        can look into it. What could not be removed is logged, and raises nothing.

        Raises:
            InfrastructureError: It cannot be made, or something is there already.
        """
        sweep(env, private_shm=self.private_shm)
        tmp_dir = Path(os.path.abspath(self.base or _system_tmp())) / directory_name(env.run.run_id)
        process, began, cwd = os.getpid(), time.time(), files.working_directory()
        made, failed = True, False
        withdraw = None
        # Put on record first: if this process is killed, the next run must know what to remove.
        env.put_on_record(tmp_dir=str(tmp_dir))
        try:
            try:
                os.mkdir(tmp_dir, 0o700)
            except OSError as error:
                made = False
                raise _cannot_make(tmp_dir, error) from error
            env.tmp_dir = tmp_dir
            if self.set_tmpdir:
                _system_tmp()  # tempfile remembers it, which keeps this process out of tmp_dir
                withdraw = export("TMPDIR", str(tmp_dir))
            try:
                yield
            except BaseException as error:
                failed = _is_failure(error)
                raise
        finally:
            # A forked child that unwinds removes nothing: the directory is its parent's.
            if made and process == os.getpid():
                if withdraw is not None:
                    withdraw()
                self._clean(env, tmp_dir, keep=failed and self.keep_on_error, cwd=cwd, since=began)

    def _clean(
        self, env: Environment, tmp_dir: Path, *, keep: bool, cwd: str | None, since: float
    ) -> None:
        removal = Removal()
        if not keep:
            removal.remove_directory(tmp_dir)
        elif tmp_dir.is_dir():
            removal.kept.append(tmp_dir)
        for pattern in self.patterns:
            remove_outputs(removal, cwd, pattern, since)
        report = removal.report()
        env.report.cleaned = report
        tell(env.logger, "temporary artifacts", report)
        if keep:
            # Or the next run would remove it, if another step of the release fails.
            env.put_on_record(tmp_dir=None)


def _is_failure(error: BaseException) -> bool:
    """A generator that is closed early did not fail, nor did an exit with status 0."""
    if isinstance(error, SystemExit):
        return error.code not in (None, 0)
    return not isinstance(error, GeneratorExit)


def _cannot_make(tmp_dir: Path, error: OSError) -> InfrastructureError:
    if isinstance(error, FileExistsError):
        reason = "something has that name already; it stays untouched"
    else:
        reason = f"{error.strerror}. Set TMPDIR or base= to a directory of your own"
    return InfrastructureError(
        f"cannot make the directory for temporary artifacts, {tmp_dir}: {reason}"
    )


def _system_tmp() -> str:
    import tempfile  # 10 ms

    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise InfrastructureError(
            "there is no directory for temporary files that can be written to: "
            "set TMPDIR or base= to one"
        ) from error
