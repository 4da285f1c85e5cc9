"""Whether somebody feeds the standard input of a process.

``cat 1.yaml | python sweep.py`` and ``cat 2.yaml | python sweep.py`` show the same command line,
and so do the idle workers of one dispatcher. What such a process reads is the work of a program
that lives. Only a pipe whose writer is gone, such as that of an ssh that broke off, tells nothing.

Everything here only looks: no byte is taken from a pipe. What cannot be known counts as fed.
"""

from __future__ import annotations

import os
import select
import stat
import struct
from typing import Literal, NamedTuple

from orchard_infra.sanitizing.programs import might_be_python
from orchard_infra.system import processes

# See sock_diag(7) and linux/unix_diag.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_SHOW_QUEUES = 0x10
_QUEUES, _SHUTDOWN = 4, 6  # attributes of an answer
_NO_MORE_TO_READ = 1  # RCV_SHUTDOWN: the other end was closed, or shut down for writing


class Input(NamedTuple):
    """A standard input that may decide what a process does, by device and inode."""

    kind: Literal["file", "pipe", "socket"]
    file: tuple[int, int]


def input_of(pid: int) -> Input | None:
    """The standard input of a process; None for a terminal or a device, which tell nothing."""
    try:
        found = os.stat(f"/proc/{pid}/fd/0")
    except OSError:
        return None
    file = found.st_dev, found.st_ino
    if stat.S_ISREG(found.st_mode):
        return Input("file", file)
    if stat.S_ISFIFO(found.st_mode):
        return Input("pipe", file)
    return Input("socket", file) if stat.S_ISSOCK(found.st_mode) else None


def reason_for_work(pid: int, source: Input | None) -> str:
    """Why a process with this input may be at work for a program that lives; empty if it is not."""
    if source is None or source.kind == "file":
        return ""
    is_over = _is_pipe_over(pid, source) if source.kind == "pipe" else _is_socket_over(source)
    if not is_over:
        return "somebody may feed its standard input"
    if not _has_lost_its_starter(pid, source):  # cat has ended, and the shell waits for the result
        return "the program that gave it its standard input may still run"
    return ""


def _is_pipe_over(pid: int, pipe: Input) -> bool:
    """Whether a pipe has no writer and nothing in it. Looks through a description of our own, so
    that O_NONBLOCK does not reach the process. A named pipe never is over: to a new reader poll(2)
    does not tell that it has no writer, and there may be one at any time.
    """
    try:
        fd = os.open(f"/proc/{pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        # With POLLIN as well, there is something that the process has not read yet.
        is_over = [events for _, events in poll.poll(0)] == [select.POLLHUP]
        return is_over and (found.st_dev, found.st_ino) == pipe.file
    except OSError:
        return False
    finally:
        os.close(fd)


def _is_socket_over(source: Input) -> bool:
    """Whether the other end of a Unix socket is closed, and nothing is left to read. Asks the
    kernel: a socket cannot be opened under /proc.
    """
    import socket

    _, inode = source.file
    try:
        question = struct.pack(
            "=BBHIIIII", socket.AF_UNIX, 0, 0, 2**32 - 1, inode, _SHOW_QUEUES, 2**32 - 1, 2**32 - 1
        )
        header = struct.pack("=IHHII", 16 + len(question), _SOCK_DIAG_BY_FAMILY, 1, 1, 0)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(1.0)
            kernel.send(header + question)
            answer = kernel.recv(65536)
        length, kind = struct.unpack_from("=IH", answer)
        (found,) = struct.unpack_from("=I", answer, 20)
        if kind != _SOCK_DIAG_BY_FAMILY or found != inode:  # it is of another kind or namespace
            return False
        values: dict[int, int] = {}
        at = 32
        while at < length:
            size, attribute = struct.unpack_from("=HH", answer, at)
            if attribute == _QUEUES:
                (values[attribute],) = struct.unpack_from("=I", answer, at + 4)
            elif attribute == _SHUTDOWN:
                values[attribute] = answer[at + 4]
            at += max(4, (size + 3) & ~3)
    except (OSError, struct.error, IndexError):
        return False
    return bool(values.get(_SHUTDOWN, 0) & _NO_MORE_TO_READ) and values.get(_QUEUES) == 0


def _has_lost_its_starter(pid: int, source: Input) -> bool:
    """Whether the process that made this input has certainly ended. Between it and ``pid`` may be
    others that have inherited the input, such as the shell of an ssh.
    """
    for above in processes.ancestors(pid):
        if input_of(above) != source:
            break
        pid = above
    found = processes.read_stat(pid)
    parent = None if found is None else processes.read_stat(found.ppid)
    if found is None or parent is None:
        return False
    if found.session != pid:  # a child is in the session of its parent, unless it starts its own
        return found.session != parent.session
    # A program that is the first process of a container may have started it, too.
    return found.ppid == 1 and not might_be_python(processes.read_cmdline(1))
