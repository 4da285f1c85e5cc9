"""What the documentation says is what happens.

* A ``python`` block is run, in a process and a directory of its own; by pytest if it defines tests.
* In a ``console`` block the lines after ``$`` are run by bash, together, in a directory where
  ``examples`` lies. Other lines are the expected output, if there are any: ``...`` stands for
  anything, and one number is as good as another.
* In ``sh`` blocks each ``make`` target and each file named must exist.
* ``<!-- not run: why -->`` above a block says that it cannot be run; ``<!-- before: ... -->`` is
  put before its code, for names that a reader need not see defined.
* The examples in docstrings are doctests.
* A link leads to a file, and where its text names a test, to that test.
* docs/design.md names every module, and its drawing of the floors is what the imports are.
"""

import ast
import doctest
import functools
import graphlib
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

import orchard_infra
from support import (
    Script,
    remove_shared_memory_of_the_dead,
    require_module,
    run_command,
    run_python,
)

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!--\s*(?P<directive>not run|before):(?P<directive_text>(?:(?!-->).)*)-->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\[(?P<text>[^]]*)\]\((?P<target>[^)\s]+)\)")


DESIGN = ROOT / "docs" / "design.md"
PACKAGE = Path(orchard_infra.__file__).parent

# From the ground up. An arrow leads down, or along its own floor.
FLOORS = (
    ("system", "errors"),
    ("runs", "config", "launch", "report"),
    ("locks",),
    ("environment",),
    ("sanitizing", "devices", "artifacts", "stopping"),
    ("manager", "session", "following", "exits", "telling"),
    ("managed",),
    ("cli", "inspect", "pytest_plugin", "testing", "integrations"),
)
STRATEGIES = FLOORS[4]  # each of these on a staircase of its own


@attrs.frozen
class Arrow:
    """One import within the package. Modules are named as paths without a suffix."""

    module: str
    target: str
    line: int
    is_for_types: bool
    is_at_import: bool  # neither for types nor within a function

    def __str__(self) -> str:
        return f"orchard_infra/{self.module}.py:{self.line} imports {self.target}"


@attrs.frozen
class Block:
    page: str
    line: int
    language: str
    body: str
    before: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for match in _BLOCK.finditer(text):
        if match["directive"] == "not run":
            continue
        yield Block(
            page=page.relative_to(ROOT).as_posix(),
            line=text.count("\n", 0, match.start("body")),
            language=match["language"],
            body=textwrap.dedent(match["body"]),
            before=textwrap.dedent(match["directive_text"] or ""),
        )


BLOCKS = [block for page in PAGES if page.exists() for block in _blocks(page)]


def _in(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def _modules_with_examples() -> list[str]:
    package = Path(orchard_infra.__file__).parent
    return [
        ".".join(("orchard_infra", *path.relative_to(package).with_suffix("").parts))
        for path in sorted(package.rglob("*.py"))
        if ">>> " in path.read_text("utf-8")
    ]


def test_the_readme_shows_python_that_can_be_run() -> None:
    assert (ROOT / "README.md").exists(), "README.md is missing"
    assert [block for block in _in("python") if block.page == "README.md"]


def _slow_where_a_framework_is_loaded(block: Block) -> Any:
    is_slow = block.page.startswith("docs/frameworks/")
    return pytest.param(block, marks=pytest.mark.slow if is_slow else (), id=str(block))


@pytest.mark.parametrize("block", [*map(_slow_where_a_framework_is_loaded, _in("python"))])
def test_a_python_block_runs(block: Block, tmp_path: Path) -> None:
    # Another suite may run on this machine, and would hold the same lock.
    body = block.body.replace('"/tmp/', f'"{tmp_path}/')
    source = f"{block.before}\n{body}"
    _skip_unless_importable(source)
    if re.search(r"^(async )?def test_", source, re.MULTILINE):
        (tmp_path / "test_block.py").write_text(source, "utf-8")
        script = run_command(
            tmp_path,
            [sys.executable, "-m", "pytest", "-q", "test_block.py"],
            env={"PYTHONPATH": str(ROOT / "tests")},
        )
    else:
        script = run_python(tmp_path, source, name="block.py")
    _expect_success(script)


def test_a_strategy_of_ones_own_is_short_and_the_one_of_the_example() -> None:
    source = (ROOT / "examples" / "own_strategy.py").read_text("utf-8")
    [strategy] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    text = "\n".join(source.splitlines()[strategy.lineno - 2 : strategy.end_lineno])
    assert text.startswith("@attrs.frozen\n")
    assert len(text.splitlines()) < 15
    assert text in (ROOT / "README.md").read_text("utf-8")


TUTORIAL = [block for block in _in("console") if block.page == "docs/tutorial.md"]


@pytest.mark.parametrize("block", [b for b in _in("console") if b not in TUTORIAL], ids=str)
def test_a_console_block_does_what_it_shows(block: Block, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    _run_in_terminal(block, tmp_path)


def test_the_tutorial_can_be_followed_from_its_top_to_its_end(tmp_path: Path) -> None:
    """In one directory: what a step leaves is there in the next one."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    anew = "begins at step 0\n"
    for block in TUTORIAL:
        found = _run_in_terminal(block, tmp_path)
        assert found.count(anew) == block.body.count(anew), f"{block}\n{found}"


def _run_in_terminal(block: Block, tmp_path: Path) -> str:
    """Run a console block, and compare. What it printed."""
    commands, expected = _session(block.body)
    for file in re.findall(r"\bexamples/\w+\.py\b", commands):
        _skip_unless_importable((ROOT / file).read_text("utf-8"))
    binaries = Path(sys.executable).parent
    remove_shared_memory_of_the_dead()  # `orchard-infra clean` would show it
    script = run_command(
        tmp_path,
        ["bash", "-euo", "pipefail", "-c", f"exec 2>&1\n{block.before}\n{commands}"],
        env={"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80"},
    )
    _expect_success(script)
    # Another test may run the same example at the same time: that is spared, and told.
    found = re.sub(r"^spared process: .*\n", "", script.output, flags=re.MULTILINE)
    if expected.strip():
        assert _matches(expected, found), f"{block} expected:\n{expected}\ngot:\n{found}"
    return found


@pytest.mark.parametrize("block", _in("sh", "bash", "shell"), ids=str)
def test_a_shell_block_names_what_exists(block: Block) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE)
    for line in block.body.splitlines():
        command = line.split("#")[0]
        if match := re.match(r"\s*make\b(?P<words>.*)", command):
            named = [word for word in match["words"].split() if "=" not in word]
            assert set(named) <= set(targets), line
        for path in re.findall(
            r"(?<![\w/])(?:examples|scripts|tests|benchmarks)/[\w./-]+", command
        ):
            assert (ROOT / path).exists(), line


def test_the_examples_in_the_docstrings_are_right(tmp_path: Path) -> None:
    names = _modules_with_examples()
    script = run_python(
        tmp_path,
        """
        import doctest, importlib, sys
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        for name in sys.argv[1:]:
            failed, tried = doctest.testmod(importlib.import_module(name), optionflags=flags)
            print(name, "was tried" if tried and not failed else "failed")
        """,
        *names,
    )
    _expect_success(script)
    assert script.output.splitlines() == [f"{name} was tried" for name in names], script.output


@pytest.mark.parametrize("name", sorted(orchard_infra.__all__))
def test_a_public_name_is_documented(name: str) -> None:
    thing = getattr(orchard_infra, name)
    assert thing is not None
    if isinstance(thing, type) or callable(thing):
        # attrs and dataclasses make a docstring that only repeats the signature.
        assert thing.__doc__, name
        assert not thing.__doc__.startswith((f"{name}(", "Method generated by attrs")), name


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.exists()], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for match in _LINK.finditer(text):
        target, _, _ = match["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target
        assert path.exists(), match[0]
        if path.suffix == ".py":
            code = path.read_text("utf-8")
            for test in re.findall(r"\btest_\w+\b(?!\.py)", match["text"]):
                assert re.search(rf"^\s*(async )?def {test}\(", code, re.MULTILINE), match[0]
    assert text.strip()


def test_the_design_page_names_every_module_and_no_other() -> None:
    linked = {match["target"] for match in _LINK.finditer(DESIGN.read_text("utf-8"))}
    named = {target for target in linked if target.startswith("../orchard_infra/")}
    assert named == {f"../orchard_infra/{path}" for path in _modules_with_code()}


def test_the_floors_are_drawn_as_they_are() -> None:
    drawing = re.search(
        r"^```text\n(.*?)^```$", DESIGN.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert drawing
    lines = re.findall(r"\|(.*)\|$", drawing[1], re.MULTILINE)
    assert [tuple(re.findall(r"\w+", line)) for line in reversed(lines)] == list(FLOORS)


def test_no_module_uses_a_floor_above_its_own() -> None:
    floor_of = {part: number for number, floor in enumerate(FLOORS) for part in floor}
    # The public names are there for guests; the version is a fact.
    floor_of.update({"__init__": len(FLOORS) - 1, "_public": len(FLOORS) - 1, "_version": 0})
    homeless = {_part(path.removesuffix(".py")) for path in _modules_with_code()} - floor_of.keys()
    assert not homeless, f"these are on no floor: {homeless}"
    wrong = [
        f"{arrow}, on a floor above"
        for arrow in _arrows()
        if floor_of[_part(arrow.target)] > floor_of[_part(arrow.module)]
        and not (arrow.is_for_types and arrow.module == "errors")  # they carry facts from above
    ]
    assert not wrong, "\n".join(wrong)


def test_no_strategy_uses_another_one() -> None:
    wrong = [
        str(arrow)
        for arrow in _arrows()
        if {_part(arrow.module), _part(arrow.target)} <= set(STRATEGIES)
        and _part(arrow.module) != _part(arrow.target)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_go_in_a_circle() -> None:
    needs: dict[str, set[str]] = {}
    for arrow in _arrows():
        if arrow.is_at_import:
            needs.setdefault(arrow.module, set()).add(arrow.target)
    graphlib.TopologicalSorter(needs).prepare()  # CycleError names the circle


def test_expected_output_is_compared_with_numbers_and_ellipses_in_mind() -> None:
    assert _matches("held by pid 12 since ...\n", "held by pid 4711 since 10:30\n")
    assert not _matches("held by pid 12\n", "held by nobody\n")
    assert _session("$ a\n> b\nout\n$ c\n") == ("a\nb\nc", "out\n")


def _modules_with_code() -> Iterator[str]:
    """The paths of all modules below the package, without those that only have a docstring."""
    for path in PACKAGE.rglob("*.py"):
        body = ast.parse(path.read_text("utf-8")).body
        if len(body) > 1 or not isinstance(body[0], ast.Expr):
            yield path.relative_to(PACKAGE).as_posix()


def _part(module: str) -> str:
    return module.split("/")[0]


@functools.cache
def _arrows() -> tuple[Arrow, ...]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        for node, is_for_types, is_at_import in _imports(ast.parse(path.read_text("utf-8"))):
            for target in _imported(node):
                found.append(Arrow(module, target, node.lineno, is_for_types, is_at_import))
    return tuple(found)


def _imports(
    node: ast.AST, is_for_types: bool = False, is_at_import: bool = True
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node, is_for_types, is_at_import and not is_for_types
    elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        for child in node.body:
            yield from _imports(child, True, is_at_import)
    else:
        is_at_import &= not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, is_for_types, is_at_import)


def _imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The modules of the package that an import loads."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        assert not node.level, "relative imports hide where an arrow leads"
        # What is imported may be a module, or a name in one.
        names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        if _path_of(names[0]) is not None:
            names.pop()
    return {path for name in names if (path := _path_of(name)) is not None}


def _path_of(name: str) -> str | None:
    """The module of the package that has this dotted name."""
    top, *parts = name.split(".")
    if top != "orchard_infra":
        return None
    module = PACKAGE.joinpath(*parts)
    for path in (module.with_suffix(".py"), module / "__init__.py"):
        if path.is_file():
            return path.relative_to(PACKAGE).with_suffix("").as_posix()
    return None


def _session(body: str) -> tuple[str, str]:
    """The commands of a console block, and the output that it shows."""
    commands: list[str] = []
    expected: list[str] = []
    for line in body.splitlines():
        if line.startswith(("$ ", "> ")):
            commands.append(line[2:])
        else:
            expected.append(line + "\n")
    return "\n".join(commands), "".join(expected)


def _matches(expected: str, found: str) -> bool:
    def plain(text: str) -> str:
        return re.sub(r"\d+(\.\d+)*", "0", text)

    return doctest.OutputChecker().check_output(
        plain(expected), plain(found), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )


def _skip_unless_importable(source: str) -> None:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        for name in {name.split(".")[0] for name in names} - {"orchard_infra", "support"}:
            require_module(name)


def _expect_success(script: Script) -> None:
    assert script.stdin is not None
    script.stdin.close()
    assert script.finish(timeout=120) == 0, script.transcript()
