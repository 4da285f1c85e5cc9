"""The command line, `orchard-infra`: the extra ``cli``.

Importing this needs none of what the extra brings, so that without it there is one line that
says what to install.
"""

from __future__ import annotations

import gc
import sys

_EXTRA = ("click", "rich")


def main() -> int:
    """Run the command line; the exit status, where that is not raised as `SystemExit`."""
    # Loading modules makes no garbage, and looking for it meanwhile is a tenth of a short run.
    gc.disable()
    try:
        from orchard_infra.cli.group import commands

        commands(prog_name="orchard-infra")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print(
            "orchard-infra: the command line is an extra; install it with: "
            'pip install "orchard-infra[cli]"',
            file=sys.stderr,
        )
        return 2
    return 0
