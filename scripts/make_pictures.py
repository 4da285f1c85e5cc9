#!/usr/bin/env python3
"""Make the pictures in docs/images out of the real output of real runs.

    .venv/bin/python scripts/make_pictures.py

Runs, ghosts and a crash are made in a home directory that goes away again. Needs Linux and the
extra ``cli``; torch is shown where it is installed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parent.parent / "docs" / "images"
COMMAND = Path(sys.executable).with_name("orchard-infra")
HOME = Path("/tmp/me")  # short, since it is in the pictures
WIDTH = 100  # columns

TRAIN = """
    import multiprocessing, os, sys, time

    def load():
        kept = bytearray(120 * 2**20)
        kept[::4096] = b"x" * len(kept[::4096])
        while True:
            sum(range(2_000_000))
            time.sleep(0.01)

    if os.path.exists("is-a-ghost"):  # no variable: twins have the same environment
        print("ready", flush=True)
        time.sleep(600)

    from orchard_infra import managed_environment

    with managed_environment(os.path.basename(os.getcwd()), timeout=None) as env:
        (env.tmp_dir / "features.bin").write_bytes(b"x" * 3_000_000)
        for _ in range(2):
            multiprocessing.get_context("fork").Process(target=load, daemon=True).start()
        print("ready", flush=True)
        time.sleep(600)
"""


def main() -> None:
    HOME.mkdir()  # and not into somebody's
    try:
        with contextlib.ExitStack() as stage:
            IMAGES.mkdir(parents=True, exist_ok=True)
            stale = HOME / ".cache/torch_extensions/py311_cpu/fused/lock"
            stale.parent.mkdir(parents=True)
            stale.touch()
            take_picture("doctor", "doctor", prefix=in_namespace())
            set_up(stage)
            take_picture("status", "status")
            take_picture("clean", "clean", "--dry-run")
    finally:
        shutil.rmtree(HOME)


def set_up(stage: contextlib.ExitStack) -> None:
    """A run with a twin and relatives, one that waits for it, a wrapped one, one that died."""
    for project in ("digits", "letters"):
        (HOME / project).mkdir()
        (HOME / project / "train.py").write_text(textwrap.dedent(TRAIN))
    mark = HOME / "digits" / "is-a-ghost"
    mark.touch()
    stage.enter_context(started("digits", "--lr", "3e-4"))
    stage.enter_context(started("digits", "--lr", "1e-2"))
    mark.unlink()
    time.sleep(2.5)  # younger ones may still register
    dead = stage.enter_context(started("letters", "--epochs", "90"))
    clean = [COMMAND, "clean", "--yes", "--detached"]
    stage.callback(subprocess.run, clean, env=environment(), stdout=subprocess.DEVNULL)
    dead.kill()
    dead.wait()
    stage.enter_context(started("digits", "--lr", "3e-4"))
    stage.enter_context(started("digits", "--lr", "1e-3", ready=False))
    wrapper = ["orchard-infra", "run", "-p", "evaluation", "--", "sh", "-c", "sleep 600"]
    stage.enter_context(process(wrapper, HOME / "digits"))
    time.sleep(2.0)


@contextlib.contextmanager
def started(project: str, *arguments: str, ready: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    command = ["python", "train.py", *arguments]
    with process(command, HOME / project) as running:
        if ready:
            assert running.stdout is not None
            running.stdout.readline()
        yield running


@contextlib.contextmanager
def process(command: list[str], cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(PWD=str(cwd)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield running
    finally:
        running.terminate()
        running.wait()
        assert running.stdout is not None
        running.stdout.close()


def in_namespace() -> list[str]:
    """In a pid namespace of its own, where that may be made: this machine's PID 1 is of no interest
    to anybody.
    """
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [*unshare, "bash", "-c", '"$@"; exit $?', "bash"]


def take_picture(name: str, *words: str, prefix: list[str] | None = None) -> None:
    output = subprocess.run(
        [*(prefix or []), str(COMMAND), *words],
        env=environment(COLUMNS=str(WIDTH), FORCE_COLOR="1", TERM="xterm-256color"),
        cwd=HOME,
        stdout=subprocess.PIPE,
        check=False,
    ).stdout.decode()
    paper = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    title = " ".join(["orchard-infra", *words])
    paper.print(Text.from_ansi(output), soft_wrap=True)
    paper.save_svg(str(IMAGES / f"{name}.svg"), title=title, unique_id=f"orchard-{name}")
    print(f"{IMAGES.name}/{name}.svg")


def environment(**changes: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
    return {
        **kept,
        "HOME": str(HOME),
        "ORCHARD_INFRA_DIR": str(HOME / ".orchard-infra"),
        "PATH": f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}",
        **changes,
    }


if __name__ == "__main__":
    main()
