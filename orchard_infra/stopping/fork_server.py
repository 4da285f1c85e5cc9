"""For multiprocessing's fork server, which imports this when it starts: nobody else should.

The server leaves its process group, see `orchard_infra.stopping.shielding`. The processes that it
forks go back: whether a worker is shielded is the worker's own affair.
"""

import os
import sys

from orchard_infra.stopping.shielding import die_with, leave_group


def _leave() -> None:
    server, group = os.getpid(), os.getpgrp()

    def go_back() -> None:
        if os.getppid() == server:  # not what a worker forks
            try:
                os.setpgid(0, group)
            except OSError:  # that group is no more
                pass

    leave_group()
    die_with(os.getppid())  # a SIGKILL to the group reaches the server no more
    os.register_at_fork(after_in_child=go_back)


if sys.platform != "win32":
    _leave()
