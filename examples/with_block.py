"""The smallest protected program: one run of the project at a time, and it leaves nothing behind.

Start it twice at once: the second one says who holds the project.
"""

import os
import sys

from orchard_infra import EnvironmentLockedError, managed_environment


def main() -> int:
    try:
        with managed_environment("with-block") as env:
            scratch = env.tmp_dir / "features.bin"
            scratch.write_bytes(bytes(1_000_000))
            print(f"run {env.run.run_id} of {env.run.project} holds {env.lock_path}")
            print(f"scratch file of {scratch.stat().st_size:,} bytes")
    except EnvironmentLockedError:  # the log has said who holds it, and what can be done
        return os.EX_TEMPFAIL
    print("lock left behind:", env.lock_path.exists())
    print("scratch file left behind:", scratch.exists())
    return 0


if __name__ == "__main__":
    sys.exit(main())
