"""A process that starts servers for its owner, and removes everything when the owner is gone.

    python -I -S keeping.py OWNER_PID DIRECTORY

Each line on stdin is a command as a JSON list. It is started in DIRECTORY with its output in
DIRECTORY/log, and its pid is the answer. After the line "null", or when the owner ends, however
that comes about, every process that works in DIRECTORY is killed, and DIRECTORY is removed.

The servers are children of this process and not of the owner, because the tests stop every child
that a test leaves, and a server is shared by a whole session. Only the standard library is used,
and little of it, so that this starts fast.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys


def processes_in(directory: str) -> list[int]:
    """The processes whose working directory is ``directory`` or below it."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            cwd = os.readlink(f"/proc/{name}/cwd")
        except OSError:  # a zombie has none
            continue
        if cwd == directory or cwd.startswith(directory + "/"):
            found.append(int(name))
    return found


def kill_in(directory: str, patience: float = 10.0) -> None:
    """Kill what works in ``directory``, and wait for its end, ``patience`` seconds for each."""
    # More than once, because what is being killed may be forking.
    while pids := processes_in(directory):
        pidfds = []
        for pid in pids:
            try:
                pidfds.append(os.pidfd_open(pid))
                signal.pidfd_send_signal(pidfds[-1], signal.SIGKILL)
            except OSError:
                pass
        # One that is ending has no working directory any more, but may still have its socket.
        ended = [select.select([pidfd], [], [], patience)[0] for pidfd in pidfds]
        for pidfd in pidfds:
            os.close(pidfd)
        if not all(ended):
            return


def clean_up(directory: str) -> None:
    """Kill what works in ``directory``, and remove it with all that it stands for."""
    kill_in(directory)
    _remove_shared_memory(directory)
    shutil.rmtree(directory, ignore_errors=True)


def _remove_shared_memory(directory: str) -> None:
    # A killed PostgreSQL leaves the System V segment by which it notices that it still runs. Its
    # id is in postmaster.pid, see LOCK_FILE_LINE_SHMEM_KEY in PostgreSQL's pidfile.h.
    for root, _, files in os.walk(directory):
        if "postmaster.pid" in files:
            try:
                with open(os.path.join(root, "postmaster.pid")) as file:
                    _, shmid = file.read().splitlines()[6].split()
                subprocess.run(["ipcrm", "--shmem-id", shmid], stderr=subprocess.DEVNULL)
            except (OSError, IndexError, ValueError):
                pass


def _serve(owner: int, directory: str) -> None:
    try:
        pidfd = os.pidfd_open(owner)
    except ProcessLookupError:
        clean_up(directory)
        return
    print(os.getpid(), flush=True)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, select.POLLIN)
    children: list[subprocess.Popen[bytes]] = []
    while True:
        ready = [descriptor for descriptor, _ in poll.poll(1000)]
        children = [child for child in children if child.poll() is None]
        line = b""
        if 0 in ready:
            line = os.read(0, 65536)  # one command: the owner waits for each answer
            if not line:  # the owner is ending, or has closed it: its end is what counts
                poll.unregister(0)
        if pidfd in ready or line.strip() == b"null":
            # PostgreSQL leaves its directory for a moment when it starts.
            for child in children:
                child.kill()
                child.wait()
            clean_up(directory)
            if pidfd not in ready:
                print("gone", flush=True)
            return
        if line:
            with open(os.path.join(directory, "log"), "ab") as log:
                child = subprocess.Popen(
                    json.loads(line),
                    cwd=directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            children.append(child)
            print(child.pid, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
