"""/dev/shm: whether tensors can be handed over there, how full it is, and who uses it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from orchard_infra.cli import output
from orchard_infra.cli.doctor.base import Level, Setup, Verdict, short_command
from orchard_infra.inspect import own_pids
from orchard_infra.system import files

_DOCKER_SHM = 64 * 2**20  # bytes of /dev/shm in a container, by default


def check_shared_memory(setup: Setup) -> Verdict:
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
            f"no file can be made in /dev/shm: {error.strerror}",
            "DataLoader workers cannot hand over tensors. Mount it, or free it",
        )
    room = os.statvfs(directory)
    total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    text = f"{output.size(total - free)} of {output.size(total)} in use"
    holders = sorted(_holders(), key=lambda holder: -holder[1])
    if holders:
        text += "; mapped by " + ", ".join(
            f"pid {pid} ({output.size(mapped)}, {short_command(pid, 40)})"
            for pid, mapped in holders[:3]
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


def _holders() -> Iterator[tuple[int, int]]:
    """The processes of this user that map files of /dev/shm, and how many bytes of them.

    Read from their maps, since torch unlinks such a file as soon as both sides have it.
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
