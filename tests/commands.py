"""What the tests of `orchard-infra status`, `stop`, `clean` and `doctor` share: real runs, and the
real command.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from forking import ForkedScript, ForkServer
from support import (
    Script,
    _free_log,
    _started,
    environment,
    run_command,
    run_python,
    wait_until,
)
from wrapping import COMMAND

# For a command in a terminal: a test runner may have put a size of its own into the environment.
OWN_SIZE: dict[str, str | None] = {"COLUMNS": None, "LINES": None}

ROOT = Path(__file__).parent.parent

# A run of the project that the first argument names. It waits for its lock, says "ready", and goes
# on until its stdin ends, or it is asked to stop. What else it does is in the environment: children
# that it forks or starts, and memory that a child takes.
TRAIN = """
    import os, subprocess, sys, time
    from orchard_infra import FileLock, InfrastructureManager, managed_environment

    def fork(act):
        if os.fork() == 0:
            act()
            while True:
                time.sleep(60)

    def take_memory():
        kept = bytearray(int(os.environ["TAKE"]))
        kept[::4096] = b"x" * len(kept[::4096])
        globals()["kept"] = kept
        print("taken", flush=True)

    def work():
        while True:
            pass

    with managed_environment(
        sys.argv[1], manager=InfrastructureManager(locker=FileLock(timeout=None))
    ) as env:
        (env.tmp_dir / "scratch.bin").write_bytes(b"x" * 8192)
        for _ in range(int(os.environ.get("FORK", "0"))):
            fork(lambda: None)
        if os.environ.get("TAKE"):
            fork(take_memory)
        if os.environ.get("WORK"):
            fork(work)
        for _ in range(int(os.environ.get("EXEC", "0"))):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("ready", flush=True)
        try:
            sys.stdin.read()
        except BaseException as error:
            print("stopping", type(error).__name__, flush=True)
            time.sleep(float(os.environ.get("SAVE", "0")))
            print("saved", flush=True)
            raise
"""


# Forks commands that have loaded everything: the modules of the command line take longer to load
# than most commands run.
_server: list[ForkServer] = []
_MAIN = """
import os, sys
from orchard_infra.cli import main, status
status._SAMPLE = float(os.environ.get("SAMPLE", "0"))  # seconds to measure processor time
sys.exit(main())
"""


@contextlib.contextmanager
def command_server() -> Iterator[None]:
    """For as long as this lasts, `orchard_infra` forks its commands where that is the same."""
    modules = ("status", "history", "stop", "clean", "doctor.command")
    with ForkServer("rich.console", *(f"orchard_infra.cli.{name}" for name in modules)) as server:
        _server.append(server)
        try:
            yield
        finally:
            _server.remove(server)


def train(tmp_path: Path, project: str, *arguments: str, **environ: str) -> Script:
    """A run that has begun."""
    run = queue(tmp_path, project, *arguments, **environ)
    run.wait_for("ready")
    return run


def queue(tmp_path: Path, project: str, *arguments: str, **environ: str) -> Script:
    """A run that may have to wait for its lock."""
    return run_python(tmp_path, TRAIN, project, *arguments, name="train.py", env=environ)


def killed(tmp_path: Path, project: str, *arguments: str, **environ: str) -> Script:
    """A run that was killed, as by the OOM killer; its children live on."""
    run = train(tmp_path, project, *arguments, **environ)
    run.kill()
    run.wait()
    return run


def orchard_infra(
    tmp_path: Path,
    *words: str,
    env: Mapping[str, str | None] | None = None,
    expect: int | None = 0,
    answer: str = "",
    prefix: tuple[str, ...] = (),
) -> Script:
    """The command, when it has ended, with the exit status that is expected of it."""
    script: Script
    own_python = prefix or any(name.startswith("PYTHON") for name in env or {})
    if own_python or not _server or words[0] == "doctor":
        script = run_command(tmp_path, [*prefix, COMMAND, *words], env=env)
        assert script.stdin is not None
        if answer:
            script.tell(answer)
        script.stdin.close()
    else:
        script = _ForkedCommand(tmp_path, words, env, answer)
    status = script.finish()
    assert expect is None or status == expect, f"exit status {status}\n{script.transcript()}"
    return script


class _ForkedCommand(ForkedScript):
    """A command that is forked from the server, and reads a file."""

    def __init__(
        self,
        tmp_path: Path,
        words: tuple[str, ...],
        env: Mapping[str, str | None] | None,
        answer: str,
    ) -> None:
        log = _free_log(tmp_path)
        self._stdout_path, self._stderr_path = log.with_suffix(".out"), log.with_suffix(".err")
        log.with_suffix(".in").write_text(answer + "\n" * bool(answer))
        main = tmp_path / "orchard-infra"
        main.write_text(_MAIN)
        paths = (log.with_suffix(".in"), self._stdout_path, self._stderr_path)
        flags = (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_APPEND] * 2)
        self._stdout_path.touch()
        self._stderr_path.touch()
        self._child_created = False  # for the destructor of `Popen`: there is nothing to reap
        self.stdin = self.stdout = self.stderr = None
        self.args = [str(main), *words]
        self.returncode: int | None = None
        self._server = _server[-1]
        self.pid = self._server.fork(
            {
                "argv": self.args,
                "cwd": str(tmp_path),
                "environ": environment(env),
                "files": [(str(path), how) for path, how in zip(paths, flags, strict=True)],
            }
        )
        _started.append(self)


def status_of(tmp_path: Path, *words: str, **environ: str) -> list[dict[str, Any]]:
    """The runs that ``status --json`` knows."""
    script = orchard_infra(tmp_path, "status", "--json", *words, env=environ)
    found = json.loads(script.output)["runs"]
    assert isinstance(found, list)
    return found


def wait_for_state(tmp_path: Path, project: str, *states: str) -> None:
    wait_until(
        lambda: (
            sorted(run["state"] for run in status_of(tmp_path, "-p", project)) == sorted(states)
        ),
        what=f"{project} to be {states}",
    )


def plant(runtime_directory: Path, **fields: Any) -> Path:
    """Write the record of a run that never was, and nobody holds."""
    record: dict[str, Any] = {
        "run_id": os.urandom(8).hex(),
        "project": "planted",
        "pid": 2**22 + 1,  # beyond pid_max of proc_sys_kernel(5)
        "create_time": 1.0,
        "host": socket.gethostname(),
        "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid_namespace": os.stat("/proc/self/ns/pid").st_ino,
        "user": "somebody",
        "uid": os.getuid(),
        "argv": ["python", "train.py"],
        "cwd": "/nowhere",
        "started_at": time.time() - 60,
        **fields,
    }
    directory = runtime_directory / "runs"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / f"{record['run_id']}.run"
    path.write_text(json.dumps({"orchard_infra": 1, **record, "state": "running"}) + "\n")
    return path


def fields_in_docs(heading: str, page: str = "cli.md") -> dict[str, str]:
    """The table of JSON fields below a heading of a page: name and type of each."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    section = text.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, re.MULTILINE))


_CHECKS = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}


def assert_documented(found: Mapping[str, Any], heading: str, page: str = "cli.md") -> None:
    """Each field is in the docs, has a type that is there, and none is missing."""
    documented = fields_in_docs(heading, page)
    assert list(found) == list(documented)
    for name, value in found.items():
        kinds = documented[name].split(" or ")
        assert any(_fits(value, kind) for kind in kinds), f"{name} is {value!r}, not {kinds}"


def _fits(value: Any, kind: str) -> bool:
    if kind.startswith("array of "):
        inner = kind.removeprefix("array of ").removesuffix("s")
        return isinstance(value, list) and all(_fits(one, inner) for one in value)
    return _CHECKS[kind](value)


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def is_first_pid_namespace() -> bool:
    return os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC
