"""Whether the kernel's out-of-memory killer has killed a process."""

from __future__ import annotations

from pathlib import Path

import attrs


@attrs.define(eq=False, repr=False)
class OomCounter:
    """Counts OOM kills in our memory cgroup, from now on.

    Version 2 has them in ``memory.events``, version 1 in ``memory.oom_control`` (see cgroup-v2 and
    cgroup-v1/memory in the kernel's admin guide). Where neither can be read, as outside of any
    cgroup, those of the whole machine serve (``/proc/vmstat``). ``root`` is the root directory.
    """

    root: Path = Path("/")
    _before: dict[str, int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._before = self._count()

    def struck(self) -> str | None:
        """Where there was one since; None where there was none, or nobody can tell."""
        for where, number in self._count().items():
            if number > self._before.get(where, number):
                return where
        return None

    def _count(self) -> dict[str, int]:
        for path, where in (
            *((path, "in this memory cgroup") for path in self._of_cgroup()),
            (self.root / "proc/vmstat", "on this machine"),
        ):
            try:
                text = path.read_text("ascii", "replace")
            except OSError:
                continue
            for line in text.splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill" and value.isdigit():
                    return {where: int(value)}
        return {}

    def _of_cgroup(self) -> list[Path]:
        try:
            lines = (self.root / "proc/self/cgroup").read_text().splitlines()
        except OSError:
            return []
        mount = self.root / "sys/fs/cgroup"
        found = []
        for line in lines:
            _, controllers, path = line.split(":", 2)
            # Within a container the path is that of the host, and the mount is the container's.
            inside = (path.strip("/"), "")
            if controllers == "":
                found += [mount / part / "memory.events" for part in inside]
            elif "memory" in controllers.split(","):
                found += [mount / "memory" / part / "memory.oom_control" for part in inside]
        return found
