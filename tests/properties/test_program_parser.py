"""Any command line that a process can have, or write over its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from orchard_infra.sanitizing.programs import Program, might_be_python, parse_command, parse_program
from orchard_infra.system.processes import split_cmdline

# Words as the kernel has them: any bytes without a NUL.
raw_words = st.binary(max_size=12).map(lambda word: word.replace(b"\0", b"0"))
words = raw_words.map(os.fsdecode)
anything = st.text(st.characters(), max_size=12) | words
option_like = st.sampled_from(
    ["-", "--", "-c", "-m", "-W", "-X", "-u", "-i", "-V", "-h", "-B-", "-um", "--help"]
)
interpreters = st.sampled_from(["python", "/usr/bin/python3", "python3.13t", "pypy3"])

flags = st.text("bBdEIOPqRsStuvx", max_size=4)


@st.composite
def options(draw: st.DrawFn) -> list[str]:
    """Words that leave the interpreter looking for its program."""
    found: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        cluster = draw(flags)
        option = draw(st.sampled_from(["", "W", "X", "--check-hash-based-pycs"]))
        argument = draw(words | option_like)
        if option.startswith("--"):
            found += [option, argument]
        elif option and argument and draw(st.booleans()):
            found.append(f"-{cluster}{option}{argument}")
        elif option:
            found += [f"-{cluster}{option}", argument]
        elif cluster:
            found.append(f"-{cluster}")
    return found


arguments = st.lists(words | option_like, max_size=5)


@given(st.lists(anything | option_like, max_size=8), st.none() | anything)
@example(["python", "\ud800.py"], "/")
@example(["python", "a\0b"], "/")
@example(["python", "x"], "/\0")
@example(["python", "x" * 100_000], "/")
@example([""], "")
def test_no_command_line_raises(argv: list[str], cwd: str | None) -> None:
    for candidate in (argv, ["python", *argv]):
        found = parse_program(candidate, cwd)
        assert found is None or found.target


@given(interpreters, options(), words, st.booleans(), arguments)
def test_the_script_is_the_first_operand_and_all_after_it_are_its_arguments(
    interpreter: str, before: list[str], name: str, terminated: bool, after: list[str]
) -> None:
    script = "./scripts/" + name.replace("/", "-") + ".py"
    terminator = ["--"] if terminated else []

    found = parse_command([interpreter, *before, *terminator, script, *after])

    assert found == Program("script", script, tuple(after))


@given(interpreters, options(), flags, st.booleans(), words, arguments)
def test_the_module_is_the_argument_of_m_and_all_after_it_are_its_arguments(
    interpreter: str, before: list[str], cluster: str, attached: bool, name: str, after: list[str]
) -> None:
    module = "digits." + name
    chosen = [f"-{cluster}m{module}"] if attached else [f"-{cluster}m", module]

    found = parse_command([interpreter, *before, *chosen, *after])

    assert found == Program("module", module, tuple(after))


@given(
    interpreters,
    options(),
    flags,
    st.sampled_from([*"cihV?JZäé\udcff", "-"]),
    st.sampled_from(["", "u", "pass", "m"]),
    arguments,
)
def test_one_option_that_runs_no_program_is_enough(
    interpreter: str, before: list[str], cluster: str, option: str, rest: str, after: list[str]
) -> None:
    word = f"-{cluster}{option}{rest}"
    if word == "--":  # this one ends the options
        word = "--unknown"

    assert parse_command([interpreter, *before, word, "train.py", *after]) is None


@given(interpreters, st.lists(raw_words, max_size=6))
def test_arguments_are_kept_byte_for_byte(interpreter: str, after: list[bytes]) -> None:
    cmdline = b"\0".join([interpreter.encode(), b"-u", b"train.py", *after]) + b"\0"

    found = parse_program(split_cmdline(cmdline), "/work")

    assert found is not None
    assert [os.fsencode(argument) for argument in found.arguments] == after


@given(st.lists(words | option_like | interpreters, min_size=1, max_size=6))
def test_whatever_has_a_program_may_be_python(argv: list[str]) -> None:
    cmdline = b"\0".join(map(os.fsencode, argv)) + b"\0"

    assert might_be_python(cmdline) or parse_command(split_cmdline(cmdline)) is None


@given(st.binary(max_size=64))
def test_any_bytes_may_stand_where_a_command_line_is_read(cmdline: bytes) -> None:
    found = parse_command(split_cmdline(cmdline))

    assert found is None or might_be_python(cmdline)


@given(st.text("ab/.", min_size=1, max_size=8), st.sampled_from(["", "x", "x/y"]))
def test_a_script_is_resolved_like_the_kernel_resolves_it(operand: str, below: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        cwd = Path(root, below)
        cwd.mkdir(parents=True, exist_ok=True)

        found = parse_program(["python", operand], str(cwd))

        assert found == Program("script", os.path.realpath(cwd / operand), ())
