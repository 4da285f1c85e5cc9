#!/usr/bin/env python3
"""Make docs/images/history.png: the timeline of a morning that is made up, as a browser draws it.

    .venv/bin/python scripts/make_history_picture.py [--dark] [--width 390] [FILE]

Needs the extra ``cli`` and Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent.parent / "docs" / "images"
COMMAND = Path(sys.executable).with_name("orchard-infra")
MINUTE = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=IMAGES / "history.png")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=560)
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if browser is None:
        sys.exit("make_history_picture: there is no chromium; apt-get install chromium")
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory, "history.html")
        write_history(Path(directory, "orchard"))
        environ = {**os.environ, "ORCHARD_INFRA_DIR": f"{directory}/orchard"}
        subprocess.run([COMMAND, "history", "--html", page], env=environ, check=True)
        # A window of the browser is never as narrow as a phone, but a frame may be.
        frame = Path(directory, "frame.html")
        size = f"width:{options.width}px;height:{options.height}px;border:0"
        frame.write_text(
            f'<body style="margin:0"><iframe src="history.html" style="{size}"></iframe>'
        )
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--disable-sync", "--hide-scrollbars", f"--user-data-dir={directory}/profile"),
                f"--blink-settings=preferredColorScheme={0 if options.dark else 1}",
                f"--window-size={options.width},{options.height}",
                f"--screenshot={options.file.absolute()}",
                frame.as_uri(),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )


def write_history(directory: Path) -> None:
    (directory / "runs").mkdir(mode=0o700, parents=True)
    directory.chmod(0o700)
    path = directory / "runs" / "history.jsonl"
    path.write_text("\n".join(map(json.dumps, morning())))
    path.chmod(0o600)


def morning() -> Iterator[dict[str, Any]]:
    """People who queue for one project, four ranks, a sweep, and some accidents."""
    chance = random.Random(4)
    nine = time.mktime((2026, 10, 5, 9, 2, 0, 0, 0, -1))
    endings: tuple[dict[str, Any], ...] = (
        {"how": "normal", "device_bytes": 3 * 2**30},
        {"how": "exception", "error": "OutOfMemoryError"},
        {"how": "normal"},
        {"how": "signal", "signal": "SIGTERM", "temporary_bytes": 2**24},
        {"how": "normal", "ghosts_stopped": 2},
        {"how": "exit", "exit_status": 3},
        {"how": "normal"},
    )
    free = nine
    for number, ending in enumerate(endings):
        start = nine + number * 6 * MINUTE + chance.random() * 200
        begin, ran = max(start, free), chance.uniform(14, 38) * MINUTE
        yield run("digits", number, start, begin, ran, **ending)
        free = begin + ran
    for rank in range(4):
        start = nine + 20 * MINUTE
        yield run("imagenet", 10 + rank, start, start + 0.1, 165 * MINUTE, how="normal", rank=rank)
    start, begin = nine + 60 * MINUTE, nine + 185 * MINUTE + 2
    end = begin + 40 * MINUTE
    yield run("imagenet", 20, start, begin, 62 * MINUTE, how="killed", alive_at=end)
    start = nine + 250 * MINUTE
    yield run("imagenet", 21, start, start, 18 * MINUTE, how="lost lock")
    start = nine + 30 * MINUTE
    for number in range(22):
        ran = chance.uniform(2, 9) * MINUTE
        how = "exception" if number == 9 else "normal"
        yield run("sweep", 30 + number, start, start, ran, how=how, error="ValueError")
        start += ran + chance.uniform(5, 60)
    yield run("evaluation", 60, nine + 100 * MINUTE, nine + 100 * MINUTE, 33 * MINUTE, how="normal")


def run(
    project: str, number: int, start: float, begin: float, ran: float, **fields: Any
) -> dict[str, Any]:
    return {
        "orchard_infra": 1,
        "run_id": f"{number:016x}",
        "project": project,
        "pid": 3000 + 7 * number,
        "create_time": 1.0,
        "host": "workstation",
        "boot_id": "",
        "pid_namespace": 1,
        "user": ("mara", "jo")[number % 2],
        "uid": 0,
        "argv": ["python", "train.py", "--seed", str(number)],
        "cwd": f"/home/mara/{project}",
        "started_at": start,
        "running_at": begin,
        "ended_at": begin + ran,
        **fields,
    }


if __name__ == "__main__":
    main()
