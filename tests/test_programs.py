"""What a command line runs. Where it can be asked, a real interpreter is the judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import orchard_infra.sanitizing.programs
from orchard_infra.sanitizing.programs import (
    Program,
    might_be_python,
    parse_command,
    parse_program,
    resolve,
)

# Says who it is, and what it was given.
WITNESS = """
import json, os, sys
print(json.dumps({
    "script": os.path.realpath(sys.argv[0]),
    "module": __spec__ and __spec__.name.removesuffix(".__main__"),
    "arguments": sys.argv[1:],
}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Scripts, modules, directories and links that all run the witness."""
    (tmp_path / "train.py").write_text(WITNESS)
    (tmp_path / "-odd.py").write_text(WITNESS)
    (tmp_path / "with space.py").write_text(WITNESS)
    (tmp_path / "latest.py").symlink_to("train.py")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(WITNESS)
    (package / "sub.py").write_text(WITNESS)
    (tmp_path / "linked").symlink_to("package")
    return tmp_path


RUNS_A_SCRIPT = [
    ["train.py"],
    ["./train.py", "--lr", "0.1"],
    ["package/../train.py"],
    ["latest.py", "a"],
    ["linked/sub.py"],
    ["package"],
    ["linked/", "a"],
    ["with space.py", ""],
    ["-u", "train.py", "-u"],
    ["-Bu", "train.py"],
    ["-uBOs", "train.py"],
    ["-OO", "train.py"],
    ["-bdqRSxv", "train.py"],
    ["-E", "-I", "train.py"],
    ["-W", "ignore", "train.py"],
    ["-Wignore", "train.py"],
    ["-BW", "ignore", "train.py"],
    ["-BWignore", "-X", "dev", "train.py"],
    ["-Xutf8", "train.py"],
    ["-X", "utf8", "train.py"],
    ["-X", "-m", "train.py"],
    ["-X", "--", "train.py"],
    ["-X", "-", "train.py"],
    ["-X", "", "train.py", "a"],
    *([["-uP", "train.py"]] if sys.version_info >= (3, 11) else []),
    ["--check-hash-based-pycs", "never", "train.py"],
    ["-B", "--check-hash-based-pycs", "always", "-u", "train.py"],
    ["--", "train.py"],
    ["--", "-odd.py"],
    ["-u", "--", "train.py", "--", "-c"],
    ["train.py", "--", "a"],
    ["train.py", "-m", "package"],
    ["train.py", "-c", "pass"],
    ["train.py", "-"],
    ["train.py", "--help"],
    ["train.py", "", "a b", "\n", "*", "ü", "\udcff\udc80"],
]

RUNS_A_MODULE = [
    ["-m", "package"],
    ["-m", "package.sub", "a"],
    ["-mpackage", "a"],
    ["-um", "package", "-u"],
    ["-umpackage.sub"],
    ["-BWignore", "-mpackage", "-m", "other"],
    ["-W", "-m", "-m", "package"],
    ["-m", "package", "--", "a"],
    ["-m", "package", "-c"],
    ["-m", "package", "train.py"],
]

RUNS_NO_PROGRAM = [
    [],
    ["-"],
    ["-", "train.py"],
    ["-u", "-", "train.py"],
    ["--", "-"],
    ["--"],
    ["-c", "pass", "train.py"],
    ["-cpass", "train.py"],
    ["-uc", "pass", "train.py"],
    ["-ucpass", "train.py"],
    ["-Ic", "pass", "-m", "package"],
    ["-c"],
    ["-m"],
    ["-um"],
    ["-W"],
    ["-X"],
    ["-V", "train.py"],
    ["-VV"],
    ["--version", "train.py"],
    ["-h", "train.py"],
    ["-?"],
    ["-uh", "train.py"],
    ["--help", "train.py"],
    ["-Vm", "package"],
    ["-J", "train.py"],
    ["-uJ", "train.py"],
    ["-Z", "train.py"],
    ["-uZ", "train.py"],
    ["--unknown", "train.py"],
    ["--check-hash-based-pycs=never", "train.py"],
    ["--check-hash-based-pycs"],
]


def run(project: Path, words: list[str]) -> list[dict[str, Any]]:
    """What the witness says when a real interpreter is started with these words."""
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=project,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    lines = ended.stdout.decode("utf-8", "replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"script"')]


@pytest.mark.parametrize("words", RUNS_A_SCRIPT, ids=ascii)
def test_a_script_is_found_where_the_interpreter_finds_it(project: Path, words: list[str]) -> None:
    if "-bdqRSxv" in words:  # -x skips the first line
        (project / "train.py").write_text("this line is skipped\n" + WITNESS)

    [seen] = run(project, words)

    assert parse_program([sys.executable, *words], str(project)) == Program(
        "script", seen["script"], tuple(seen["arguments"])
    )


@pytest.mark.parametrize("words", RUNS_A_MODULE, ids=ascii)
def test_a_module_is_found_where_the_interpreter_finds_it(project: Path, words: list[str]) -> None:
    [seen] = run(project, words)

    assert parse_program([sys.executable, *words], str(project)) == Program(
        "module", seen["module"], tuple(seen["arguments"])
    )


@pytest.mark.parametrize("words", RUNS_NO_PROGRAM, ids=ascii)
def test_what_runs_no_program_is_none(project: Path, words: list[str]) -> None:
    assert run(project, words) == []
    assert parse_program([sys.executable, *words], str(project)) is None


@pytest.mark.parametrize("words", [["-i", "train.py"], ["-ui", "train.py"], ["-im", "package"]])
def test_a_prompt_after_the_program_is_nobody_s_twin(project: Path, words: list[str]) -> None:
    """The script runs, but somebody sits at the prompt after it and looks at the results."""
    assert len(run(project, words)) == 1
    assert parse_program(["python", *words], str(project)) is None


@pytest.mark.parametrize(
    "interpreter",
    [
        "python",
        "python3",
        "python3.11",
        "/usr/bin/python3",
        "../.venv/bin/python",
        "python3.13t",
        "python3.13td",
        "python3-dbg",
        "python3.11-dbg",
        "pythonw",
        "python.exe",
        "pypy3",
        "pypy3.10",
        "/Library/Frameworks/Python.framework/Versions/3.12/Resources/Python.app/Contents/MacOS/Python",
    ],
)
def test_every_interpreter_is_recognised(interpreter: str, project: Path) -> None:
    expected = Program("script", str(project / "train.py"), ("a",))

    assert parse_program([interpreter, "train.py", "a"], str(project)) == expected
    assert might_be_python(os.fsencode(interpreter) + b"\0train.py\0")


@pytest.mark.parametrize(
    "argv",
    [
        ["vim", "train.py"],
        ["tail", "-f", "train.py"],
        ["torchrun", "train.py"],
        ["bash", "run.sh"],
        ["-bash"],
        ["ipython", "train.py"],
        ["pythonic", "train.py"],
        ["python3-config", "train.py"],
        ["/opt/python3/bin/node", "train.py"],
        ["python train.py"],
        ["python train.py", "", ""],
        ["python\ttrain.py", "train.py"],
        ["pt_data_worker"],
        ["ray::train"],
        ["sshd: user@pts/0"],
        [""],
        [],
    ],
    ids=ascii,
)
def test_other_programs_and_rewritten_titles_run_nothing(argv: list[str], project: Path) -> None:
    assert parse_program(argv, str(project)) is None
    assert not might_be_python(b"\0".join(map(os.fsencode, argv)) + b"\0")


@pytest.mark.parametrize("padding", [[""], ["", ""], ["", "x"]])
def test_a_title_that_still_looks_like_an_interpreter_runs_nothing(padding: list[str]) -> None:
    """A rewritten title is padded with NULs: what was the script is now empty."""
    assert parse_program(["python", *padding], "/work") is None
    assert parse_program(["train --resume /data/python3", *padding], "/work") is None


RUNNER_MODULES = """
pytest _pytest unittest unittest.main doctest nose2 coverage cProfile profile trace timeit
runpy pdb bdb ipdb debugpy debugpy.adapter pydevd scalene kernprof line_profiler.explicit
viztracer memray IPython ipykernel ipykernel_launcher jupyter jupyter_client.runapp jupyterlab
notebook code idlelib torch.distributed.run torch.distributed.launch torch.distributed.elastic
accelerate.commands.launch deepspeed.launcher.launch lightning.fabric.cli lightning_fabric
horovod.runner.launch mpi4py ray.scripts.scripts submitit.core._submit
joblib.externals.loky.backend.popen_loky_posix multiprocessing.resource_tracker
"""


@pytest.mark.parametrize("module", RUNNER_MODULES.split())
def test_a_module_that_runs_other_code_is_nobody_s_twin(module: str) -> None:
    assert parse_program(["python", "-m", module, "train.py"], "/work") is None


RUNNER_SCRIPTS = """
/venv/bin/pytest /venv/bin/py.test /usr/bin/pytest-3 /venv/bin/coverage /usr/bin/coverage-3.11
/venv/bin/ipython /usr/bin/ipython3 /venv/bin/jupyter /venv/bin/jupyter-lab /venv/bin/torchrun
/venv/bin/accelerate /venv/bin/accelerate-launch /venv/bin/deepspeed /venv/bin/lightning
/venv/bin/fabric /venv/bin/horovodrun /venv/bin/kernprof /venv/bin/scalene /usr/bin/pdb3.11
/venv/bin/celery /venv/bin/pytest-script.py
/usr/lib/python3.11/pdb.py /usr/lib/python3.11/cProfile.py /usr/lib/python3.13t/trace.py
/usr/lib/python3/dist-packages/IPython/__main__.py
/venv/lib/python3.11/site-packages/ipykernel_launcher.py
/venv/lib/python3.11/site-packages/torch/distributed/run.py
/venv/lib/python3.11/site-packages/torch/_inductor/compile_worker/__main__.py
/home/a/.vscode/extensions/ms-python.debugpy-2024.6/bundled/libs/debugpy/launcher
/opt/pycharm/plugins/python/helpers/pydev/pydevd.py
/opt/pycharm/plugins/python/helpers/pycharm/_jb_pytest_runner.py
"""


@pytest.mark.parametrize("script", RUNNER_SCRIPTS.split())
def test_a_script_that_runs_other_code_is_nobody_s_twin(script: str) -> None:
    assert parse_program(["/venv/bin/python", script, "train.py"], "/work") is None


PROGRAMS = """
/home/a/lightning/train.py /home/a/torch/train /home/a/pytest/train.py /home/a/trace.py
/home/a/profile.py /home/a/code/train.py /venv/bin/digits-train /home/a/train-2024
/venv/lib/python3.11/site-packages/digits/train.py /home/a/python3/trace.py /home/a/torch-train
"""


@pytest.mark.parametrize("script", PROGRAMS.split())
def test_a_program_that_only_sounds_like_a_tool_is_a_program(script: str) -> None:
    assert parse_program(["python", script], "/work") == Program("script", script, ())


def test_a_package_of_one_s_own_may_be_called_like_a_module_of_python() -> None:
    found = parse_program(["python", "-m", "code.train"], "/work")

    assert found == Program("module", "code.train", ())


def test_a_tool_behind_a_link_is_still_a_tool(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytest").touch()
    (tmp_path / "tests.py").symlink_to("bin/pytest")

    assert parse_program(["python", "tests.py"], str(tmp_path)) is None


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_helpers_of_multiprocessing_run_no_program(method: str, tmp_path: Path) -> None:
    """Their real command lines, as the kernel has them."""
    (tmp_path / "main.py").write_text(
        "import multiprocessing, os, sys\n"
        "def look(pid):\n"
        "    return open(f'/proc/{pid}/cmdline', 'rb').read().decode().split(chr(0))[:-1]\n"
        "if __name__ == '__main__':\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    with context.Pool(1) as pool:\n"
        "        worker = pool.apply(os.getpid)\n"
        "        children = open('/proc/self/task/%d/children' % os.getpid()).read().split()\n"
        "        print(__import__('json').dumps([look(pid) for pid in {str(worker), *children}]))\n"
    )
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("needs a real /proc")

    seen = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, check=True, stdout=subprocess.PIPE
    )

    commands = json.loads(seen.stdout)
    assert len(commands) >= 2
    assert all("main.py" not in command for command in commands)
    assert [parse_program(command, str(tmp_path)) for command in commands] == [None] * len(commands)


def test_a_script_run_by_its_first_line_is_found(project: Path) -> None:
    script = project / "run"
    script.write_text(f"#!{sys.executable}\nimport json, sys; print(json.dumps(sys.orig_argv))\n")
    script.chmod(0o755)

    seen = subprocess.run(["./run", "a"], cwd=project, check=True, stdout=subprocess.PIPE)

    found = parse_program(json.loads(seen.stdout), str(project))
    assert found == Program("script", str(script), ("a",))


def test_two_ways_to_one_script_are_one_program(project: Path) -> None:
    found = {
        parse_program(["python", operand], str(project))
        for operand in ("train.py", "latest.py", "./package/../train.py", str(project / "train.py"))
    }

    assert found == {Program("script", str(project / "train.py"), ())}


def test_the_same_words_in_two_directories_are_two_programs(tmp_path: Path) -> None:
    argv = ["python", "train.py"]

    assert parse_program(argv, str(tmp_path / "a")) != parse_program(argv, str(tmp_path / "b"))


@pytest.mark.parametrize("cwd", [None, "", "relative", "."])
def test_a_relative_script_without_a_directory_is_none(cwd: str | None, project: Path) -> None:
    assert parse_program(["python", "train.py"], cwd) is None
    assert parse_program(["python", str(project / "train.py")], cwd) is not None
    assert parse_program(["python", "-m", "package"], cwd) is not None


def test_a_script_that_is_gone_still_has_its_name(tmp_path: Path) -> None:
    found = parse_program(["python", "gone.py"], str(tmp_path))

    assert found == Program("script", str(tmp_path / "gone.py"), ())


def test_a_loop_of_links_is_survived(tmp_path: Path) -> None:
    (tmp_path / "a.py").symlink_to("b.py")
    (tmp_path / "b.py").symlink_to("a.py")

    found = parse_program(["python", "a.py"], str(tmp_path))

    assert found is None or found.kind == "script"


@pytest.mark.parametrize("operand", ["a\0b.py", "\ud800.py", "x" * 10_000, "a/" * 5_000])
def test_a_path_that_cannot_be_is_survived(operand: str, tmp_path: Path) -> None:
    found = parse_program(["python", operand], str(tmp_path))

    assert found is None or found.kind == "script"


def test_the_command_is_kept_as_typed_until_it_is_resolved(project: Path) -> None:
    command = parse_command(["python", "-u", "latest.py", "a"])

    assert command == Program("script", "latest.py", ("a",))
    assert resolve(command, str(project)) == Program("script", str(project / "train.py"), ("a",))


def test_the_parser_loads_nothing_heavy() -> None:
    """Its own imports: the package around it needs psutil, and old versions of attrs load
    subprocess as well."""
    package = Path(orchard_infra.sanitizing.programs.__file__).parents[1]
    source = (
        "import sys, types, attrs\n"
        "before = set(sys.modules)\n"
        "package = sys.modules['orchard_infra'] = types.ModuleType('orchard_infra')\n"
        f"package.__path__ = [{str(package)!r}]\n"
        "import orchard_infra.sanitizing.programs\n"
        "print(sorted({'subprocess', 'tempfile', 'multiprocessing', 'psutil', 'asyncio',"
        " 'importlib.metadata', 'torch'} & set(sys.modules) - before))"
    )

    seen = subprocess.run(
        [sys.executable, "-c", source], check=True, capture_output=True, text=True
    )

    assert seen.stdout == "[]\n"
