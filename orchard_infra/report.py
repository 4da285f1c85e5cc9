"""What was done for a run: plain facts, which the strategies write and a run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from orchard_infra.system.processes import ProcessIdentity
from orchard_infra.system.text import printable


@attrs.frozen
class Finding:
    """One process: which evidence there is against it, and why it was or was not stopped.

    ``parent`` is the pid of the process that should reap a defunct one.
    """

    pid: int
    create_time: float
    command: str
    evidence: str
    reason: str = ""
    parent: int | None = None

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.create_time)

    def describe(self) -> str:
        """One line, safe for a terminal."""
        reason = f", {self.reason}" if self.reason else ""
        return printable(f"pid {self.pid} ({self.evidence}{reason}): {self.command}")


@attrs.frozen
class SanitizeReport:
    """What became of the processes that were looked at.

    ``stopped`` ended after SIGTERM, ``killed`` after SIGKILL. ``spared`` were left alone, each with
    the reason. ``defunct`` are dead, and wait to be reaped. ``denied`` could not be signalled, or
    did not even end after SIGKILL (uninterruptible sleep).
    """

    stopped: tuple[Finding, ...] = ()
    killed: tuple[Finding, ...] = ()
    spared: tuple[Finding, ...] = ()
    defunct: tuple[Finding, ...] = ()
    denied: tuple[Finding, ...] = ()

    def __add__(self, other: SanitizeReport) -> SanitizeReport:
        return SanitizeReport(
            *(getattr(self, name) + getattr(other, name) for name in attrs.fields_dict(type(self)))
        )


@attrs.frozen
class DeviceMemory:
    """What torch's caching allocator held on one device, in bytes.

    ``device`` is a name as torch spells it, such as ``cuda:0``. Tensors that are still alive
    count too, before and after; the context of the process does not.
    """

    device: str
    before: int
    after: int

    @property
    def freed(self) -> int:
        return self.before - self.after


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


@attrs.frozen
class FlushReport:
    """What a flush did.

    ``devices`` has those that this process had initialised. ``rss_before`` and ``rss_after`` are
    the resident memory of this process in bytes, None where the system does not say.
    ``failures`` has one line for each step that failed; the other steps were done all the same.
    """

    devices: tuple[DeviceMemory, ...] = ()
    rss_before: int | None = None
    rss_after: int | None = None
    failures: tuple[str, ...] = ()

    @property
    def rss_freed(self) -> int | None:
        if self.rss_before is None or self.rss_after is None:
            return None
        return self.rss_before - self.rss_after

    def __str__(self) -> str:
        """A small table for people, in MiB, and the failures."""
        rows = (("MiB", "before", "after", "freed"), *self._rows())
        lines = (
            f"{where:<12}" + "".join(f"{number:>11}" for number in rest) for where, *rest in rows
        )
        return "\n".join((*lines, *self.failures))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # what IPython shows in a terminal

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        import html  # not for a program that shows no tables

        right = 'style="text-align: right"'
        head = "".join(f"<th {right}>{name}</th>" for name in ("before", "after", "freed"))
        rows = "".join(
            f"<tr><th>{html.escape(where)}</th>"
            + "".join(f"<td {right}>{number}</td>" for number in numbers)
            + "</tr>"
            for where, *numbers in self._rows()
        )
        failed = "".join(f"<p>{html.escape(failure)}</p>" for failure in self.failures)
        return f"<table><tr><th>MiB</th>{head}</tr>{rows}</table>{failed}"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        sizes = [(memory.device, memory.before, memory.after) for memory in self.devices]
        if self.rss_before is not None and self.rss_after is not None:
            sizes.append(("this process", self.rss_before, self.rss_after))
        return [
            (where, _mib(before), _mib(after), _mib(before - after))
            for where, before, after in sizes
        ]


@attrs.frozen
class CleanReport:
    """What was removed (directories count as one), what was left on purpose, the disk space or
    memory that came free in bytes, and what could not be removed, in words.
    """

    removed: tuple[Path, ...] = ()
    kept: tuple[Path, ...] = ()
    bytes_freed: int = 0
    failures: tuple[str, ...] = ()


@attrs.define
class Report:
    """What was done for a run; complete once the block has ended.

    Times are in seconds; ``waited_seconds`` is the part of ``prepare_seconds`` that went into
    waiting for the lock. ``sanitized`` is about processes of earlier runs, ``leftovers`` about
    those that were started inside the block and outlive it. ``collected`` is what dead runs had
    left, ``cleaned`` what this one left; both are None where no cleaner was asked. ``skipped`` says
    which steps were left out, and why. ``failures`` are those of the release.
    """

    prepare_seconds: float = 0.0
    waited_seconds: float = 0.0
    release_seconds: float = 0.0
    sanitized: SanitizeReport = SanitizeReport()
    leftovers: SanitizeReport = SanitizeReport()
    flushed: FlushReport | None = None
    collected: CleanReport | None = None
    cleaned: CleanReport | None = None
    skipped: tuple[str, ...] = ()
    failures: tuple[BaseException, ...] = ()
