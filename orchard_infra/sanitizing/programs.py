"""Which program a Python process runs, read off its command line alone.

Two processes are only ever compared by what their interpreters were told to run: the script
operand or the ``-m`` module, and the arguments after it. Who mentions a script without running
it (an editor, ``tail -f``, a launcher, a debugger), or runs many different ones (a test runner, a
notebook kernel, a shell), has no program: such a process is nobody's twin.

Nothing in a command line can be trusted: it is written by its process, and may be rewritten at
any time. Nothing here raises for one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Literal

import attrs

# python, python3.12, python3.13t, pythonw.exe, python3-dbg, pypy3; Python is what a framework
# build on macOS calls itself.
_INTERPRETER = re.compile(
    r"(?:[Pp]ythonw?|pypy)(?:\d+(?:\.\d+)*)?[dmtu]{0,3}(?:-dbg|-intel64)?(?:\.exe)?"
)

# The same at the start of a raw command line.
_RAW_INTERPRETER = re.compile(rb"(?:[^\0]*[/\\])?" + _INTERPRETER.pattern.encode() + rb"(?:\0|\Z)")

_VERSION = r"-?\d[\d.]*\Z"

# Short options without an argument that leave a program to run; the union over 3.10 to 3.14, see
# Python/getopt.c and "Command line and environment" of the Python manual. Missing on purpose: c
# (code), h ? V (print and exit), J (refused), i (a prompt that outlives the script).
_FLAGS = frozenset("bBdEIOPqRsStuvx")
_WITH_ARGUMENT = frozenset("WX")
_LONG_WITH_ARGUMENT = "--check-hash-based-pycs"

# What runs somebody else's code: packages, which have nothing else to run, ...
# fmt: off
_RUNNER_PACKAGES = frozenset((
    # tests
    "_pytest", "nose", "nose2", "nox", "pytest", "tox", "trial", "unittest", "xdist",
    # notebooks and shells
    "IPython", "bpython", "colab_kernel_launcher", "idlelib", "ipykernel", "ipykernel_launcher",
    "marimo", "nbclient", "nbconvert", "notebook", "papermill", "ptpython", "spyder_kernels",
    # debuggers and profilers
    "coverage", "debugpy", "ipdb", "kernprof", "line_profiler", "memory_profiler", "memray",
    "ptvsd", "pudb", "py_spy", "pydevd", "pyinstrument", "scalene", "viztracer",
    # launchers and process pools
    "accelerate", "deepspeed", "fabric", "horovod", "joblib", "lightning", "lightning_fabric",
    "loky", "mpi4py", "multiprocessing", "pytorch_lightning", "ray", "submitit", "torch", "torchx",
    # servers, queues and workflows: many workers with one command line
    "airflow", "celery", "dagster", "dask", "distributed", "dramatiq", "gunicorn", "hypercorn",
    "luigi", "mlflow", "prefect", "rq", "snakemake", "streamlit", "uvicorn", "wandb",
))
# ... modules of the standard library, whose names people give to packages of their own, ...
_RUNNER_MODULES = frozenset((
    "bdb", "cProfile", "code", "doctest", "pdb", "profile", "runpy", "timeit", "trace",
))
# ... console scripts that are not called like their package, ...
_RUNNER_SCRIPTS = frozenset((
    "accelerate-launch", "dask-worker", "ds", "horovodrun", "ipython", "mprof", "py-spy",
    "py.test", "torchrun",
))
# ... and what editors bring along, outside of any site-packages: directories and scripts.
_BUNDLED = frozenset((
    "_jb_pytest_runner.py", "_jb_unittest_runner.py", "debugpy", "ipykernel_launcher.py", "pydev",
    "unittestadapter", "vscode_pytest",
))
# fmt: on

# What is left of the path of an installed file: its package, and so on.
_INSTALLED = r"(?s).*/(?:site-packages|dist-packages|lib(?:64)?/python\d\.\d+t?)/([^/]+).*"


@attrs.frozen(repr=False)
class Program:
    """What an interpreter runs. Equal programs are run by processes that may be twins.

    ``target`` is the script's absolute path with symlinks followed, or the module's name.
    ``arguments`` are those after it; bytes that are no UTF-8 are kept as surrogates.
    """

    kind: Literal["script", "module"]
    target: str
    arguments: tuple[str, ...]


def might_be_python(cmdline: bytes) -> bool:
    """Whether a raw ``/proc/PID/cmdline`` may be an interpreter's: a cheap first look at all.

    There is no such first look for a certain script. Its name need not occur in the command line
    of who runs it, since the operand may be a symlink, or a directory.
    """
    return _RAW_INTERPRETER.match(cmdline) is not None


def parse_program(argv: Sequence[str], cwd: str | None) -> Program | None:
    """The program that a command line runs; None where there is none to speak of.

    ``cwd`` is the directory in which the process was started; without it, a relative script is
    None: resolved against any other directory it names an unrelated file.
    """
    program = parse_command(argv)
    return None if program is None else resolve(program, cwd)


def parse_command(argv: Sequence[str]) -> Program | None:
    """Like `parse_program`, but a script is left as it was typed: no file system is asked."""
    if not argv or not _is_interpreter(argv[0]):
        return None
    found = _skip_options(argv)
    if found is None:
        return None
    kind, target, position = found
    # An empty operand is no script: it is what is left of a title that was rewritten.
    if not target or _runs_other_code(kind, target):
        return None
    return Program(kind, target, tuple(argv[position:]))


def resolve(program: Program, cwd: str | None) -> Program | None:
    """The program of `parse_command` with its script's real path, which costs some lstat(2).

    None for a relative script without an absolute ``cwd``, and for one that turns out to be a
    test runner, a launcher or the like under another name.
    """
    if program.kind == "module":
        return program
    path = program.target
    if not os.path.isabs(path):
        if cwd is None or not os.path.isabs(cwd):
            return None
        path = os.path.join(cwd, path)
    try:
        path = os.path.realpath(path)
    except (OSError, ValueError, RecursionError):  # NUL, lone surrogates, a maze of symlinks
        return None
    if _runs_other_code("script", path):
        return None
    return attrs.evolve(program, target=path)


def interpreter_at(word: str, cwd: str | None, search_path: str) -> str | None:
    """What an interpreter is that was typed so: its virtual environment, if it has one, else its
    file. None where it is not found.

    >>> interpreter_at("python", None, "/nowhere")
    """
    import shutil

    try:
        if os.path.dirname(word):
            found: str | None = os.path.join(cwd or "/nowhere", word)
        else:
            found = shutil.which(word, path=search_path)
        if found is None or not os.path.isfile(found):
            return None
        for prefix in (os.path.dirname(found), os.path.dirname(os.path.dirname(found))):
            if os.path.exists(os.path.join(prefix, "pyvenv.cfg")):
                return os.path.realpath(prefix)
        return os.path.realpath(found)  # python, python3 and python3.12 are one file
    except (OSError, ValueError, RecursionError):
        return None


def _is_interpreter(word: str) -> bool:
    return _INTERPRETER.fullmatch(os.path.basename(word)) is not None


def _skip_options(
    argv: Sequence[str],
) -> tuple[Literal["script", "module"], str, int] | None:
    """Kind, target, and where its arguments begin, by CPython's own rules (Python/getopt.c).

    None for code, a prompt, standard input, options that only print, and unknown ones.
    """
    position = 1
    while position < len(argv):
        word = argv[position]
        if word == "--":
            position += 1
            break
        if not word.startswith("-") or word == "-":
            break
        position += 1
        if word == _LONG_WITH_ARGUMENT:
            position += 1
            continue
        for offset, option in enumerate(word[1:], start=2):
            attached = word[offset:]
            if option == "m":
                if attached:
                    return "module", attached, position
                if position == len(argv):
                    return None
                return "module", argv[position], position + 1
            if option in _WITH_ARGUMENT:
                # The argument is the rest of this word or, whatever it looks like, the next one.
                position += not attached
                break
            if option not in _FLAGS:
                return None
    # A lone dash is standard input, also after "--".
    if position >= len(argv) or argv[position] == "-":
        return None
    return "script", argv[position], position + 1


def _runs_other_code(kind: Literal["script", "module"], target: str) -> bool:
    if kind == "module":
        package = target.partition(".")[0]
        return (
            package in _RUNNER_PACKAGES
            or target in _RUNNER_MODULES
            or package.startswith("jupyter")
        )
    path = target.replace(os.sep, "/")
    if not _BUNDLED.isdisjoint(path.split("/")):
        return True
    installed = re.fullmatch(_INSTALLED, path)
    if installed is not None and _runs_other_code("module", installed[1].removesuffix(".py")):
        return True
    name = path.rpartition("/")[2].removesuffix(".exe").removesuffix("-script.py")
    if name.endswith(".py"):
        return False  # somebody's own trace.py is a program
    name = re.sub(_VERSION, "", name)  # ipython3, pytest-3, coverage-3.11
    return name in _RUNNER_SCRIPTS or _runs_other_code("module", name)
