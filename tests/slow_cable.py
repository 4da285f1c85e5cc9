"""A cable between two hosts that takes its time.

    python -I -S slow_cable.py OWNER SECONDS NAME OTHER_NAME ENTER_OTHER ...

Started on one host, it makes a TUN interface there, moves on to the other host by the command
ENTER_OTHER, makes one there as well, and carries the packets between the two, each SECONDS after
it was sent. ``tc qdisc add .. netem delay`` does the same, where the kernel has it; many have not.
It ends with the process that OWNER, a descriptor, stands for (pidfd_open(2)).
"""

from __future__ import annotations

import collections
import fcntl
import os
import select
import struct
import sys
import time

_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000


def _interface(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def _carry(owner: int, seconds: float, one: int, other: int) -> None:
    poll = select.poll()
    for fd in (owner, one, other):
        poll.register(fd, select.POLLIN)
    under_way: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        wait = max(under_way[0][0] - time.monotonic(), 0.0) * 1000 if under_way else None
        ready = [fd for fd, _ in poll.poll(wait)]
        if owner in ready:
            return
        for source, target in ((one, other), (other, one)):
            if source in ready:
                packet = os.read(source, 65536)
                under_way.append((time.monotonic() + seconds, target, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, target, packet = under_way.popleft()
            try:
                os.write(target, packet)
            except OSError:  # that interface is not up
                pass


def _main(owner: str, seconds: str, name: str, other_name: str, *enter_other: str) -> None:
    mine = _interface(name)
    if other_name:
        os.set_inheritable(mine, True)
        command = [*enter_other, sys.executable, "-I", "-S", __file__]
        os.execvp(command[0], [*command, owner, seconds, other_name, "", str(mine)])
    print("ready", flush=True)
    _carry(int(owner), float(seconds), int(enter_other[0]), mine)


if __name__ == "__main__":
    _main(*sys.argv[1:])
