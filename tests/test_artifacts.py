"""A run leaves nothing behind, a dead one neither, and nobody loses a file that is not its own."""

import contextlib
import copy
import logging
import os
import pickle
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import psutil
import pytest

from orchard_infra.artifacts import sweeping
from orchard_infra.artifacts.sweeping import collect, sweep, would_collect
from orchard_infra.artifacts.temporary import TemporaryArtifacts
from orchard_infra.environment import Environment
from orchard_infra.errors import InfrastructureError
from orchard_infra.report import CleanReport
from orchard_infra.runs.record import RunState, describe_this_run
from orchard_infra.runs.registry import RegisteredRun, RunRegistry
from orchard_infra.system.background import signal_mask
from orchard_infra.system.masking import uninterrupted
from orchard_infra.system.processes import read_stat
from support import (
    Script,
    as_nobody,
    needs_another_user,
    needs_namespaces,
    require_module,
    run_command,
    run_python,
    succeeds_in_a_fork,
    wait_gone,
    wait_until,
)

# /dev/shm is the whole machine's: what one test leaves there for a moment, another one would see.
pytestmark = pytest.mark.xdist_group("shared memory")


TORCH_MANAGER = sweeping._TORCH_MANAGER
RUN_ID = "0123456789abcdef"

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs a real /dev/shm")


@pytest.fixture(autouse=True)
def shm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm: other tests, and other people, use that one, and torch."""
    directory = tmp_path_factory.mktemp("shm")
    monkeypatch.setattr(sweeping, "_SHARED_MEMORY", str(directory))
    monkeypatch.setattr(sweeping, "_TORCH_MANAGER", f"manager{uuid.uuid4().hex[:8]}")
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Where the directories of runs are made."""
    directory = tmp_path / "base"
    directory.mkdir()
    return directory


def environment(run_id: str = RUN_ID, **options: Any) -> Environment:
    """An environment as a strategy is given it, of a run with this id."""
    record = attrs.evolve(describe_this_run("digits"), run_id=run_id)
    return Environment(record, Path("/x.lock"), **options)


@contextlib.contextmanager
def run_in(
    cleaner: TemporaryArtifacts,
    error: BaseException | None = None,
    env: Environment | None = None,
) -> Iterator[Any]:
    """A run that ends with this error: `run.tmp_dir` inside, `run.report` afterwards."""
    env = env or environment()
    around = cleaner.around(env)
    around.__enter__()
    run = SimpleNamespace(env=env, tmp_dir=env.tmp_dir, report=None)
    yield run
    leave(around, error)
    run.report = env.report.cleaned


def leave(around: AbstractContextManager[object], error: BaseException | None = None) -> None:
    assert not around.__exit__(type(error) if error else None, error, None)


def write(path: Path, text: str = "content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def dead_run(tmp_dir: Path | str | None, run_id: str = RUN_ID) -> SimpleNamespace:
    return SimpleNamespace(run_id=run_id, tmp_dir=None if tmp_dir is None else str(tmp_dir))


def run_in_a_container(tmp_path: Path, source: str) -> Script:
    """Run it in a pid namespace of its own, with /proc to match."""
    path = write(tmp_path / "inside.py", textwrap.dedent(source))
    namespace = ["unshare", "--pid", "--fork", "--mount-proc"]
    return run_command(tmp_path, [*namespace, sys.executable, str(path)])


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A directory of another user, which that one can reach."""
    directory = Path(tempfile.mkdtemp(prefix="oi-nobody-", dir="/tmp"))
    os.chown(directory, 65534, 65534)
    yield directory
    shutil.rmtree(directory)


class TestTheDirectoryOfARun:
    def test_is_put_on_record_before_it_is_made(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever is killed in between leaves the next run a record of it."""
        registry = RunRegistry()
        record = describe_this_run("digits")
        registration = registry.register(record)
        env = Environment(record, Path("/x.lock"), registry=registry, registration=registration)
        on_record = []
        real = os.mkdir

        def looking(*args: Any) -> None:
            found = registry.find(record.run_id)
            on_record.append((found and found.record.tmp_dir, os.path.lexists(args[0])))
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", looking)
            around = TemporaryArtifacts(base=base).around(env)
            around.__enter__()
        tmp_dir = base / f"orchard-infra-{record.run_id}"
        assert on_record == [(str(tmp_dir), False)]
        assert env.tmp_dir == tmp_dir
        leave(around)
        registration.close()

    def test_is_below_the_systems_own_unless_a_base_is_given(self) -> None:
        with run_in(TemporaryArtifacts()) as run:
            assert run.tmp_dir == Path(tempfile.gettempdir(), f"orchard-infra-{RUN_ID}")

    def test_is_named_in_full_also_when_the_base_is_relative(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(base.parent)

        with run_in(TemporaryArtifacts(base=Path("base"))) as run:
            assert run.tmp_dir.parent == base
            monkeypatch.chdir("/")

        assert list(base.iterdir()) == []

    def test_is_for_no_other_user(self, base: Path) -> None:
        with run_in(TemporaryArtifacts(base=base)) as run:
            assert stat.S_IMODE(run.tmp_dir.stat().st_mode) == 0o700

    @pytest.mark.parametrize("error", [None, ValueError(), KeyboardInterrupt()], ids=repr)
    def test_is_removed_with_all_that_is_in_it(
        self, base: Path, error: BaseException | None
    ) -> None:
        with run_in(TemporaryArtifacts(base=base), error) as run:
            write(run.tmp_dir / "below" / "deeper" / "file", "x" * 100_000)
            os.mkfifo(run.tmp_dir / "fifo")

        assert list(base.iterdir()) == []
        assert (run.report.removed, run.report.failures) == ((run.tmp_dir,), ())
        assert 100_000 <= run.report.bytes_freed < 200_000

    @pytest.mark.parametrize(
        "error", [ValueError(), KeyboardInterrupt(), SystemExit(3), SystemExit("no data")], ids=repr
    )
    def test_is_kept_when_the_run_failed_and_that_was_asked_for(
        self, base: Path, error: BaseException
    ) -> None:
        with run_in(TemporaryArtifacts(base=base, keep_on_error=True), error) as run:
            write(run.tmp_dir / "evidence")

        assert (run.tmp_dir / "evidence").exists()
        assert run.report == CleanReport(kept=(run.tmp_dir,))
        # Else the next run would remove it, if another step of the release failed.
        assert run.env.run.tmp_dir is None

    @pytest.mark.parametrize(
        "error", [None, GeneratorExit(), SystemExit(0), SystemExit(None)], ids=repr
    )
    def test_is_not_kept_when_the_run_went_well(
        self, base: Path, error: BaseException | None
    ) -> None:
        with run_in(TemporaryArtifacts(base=base, keep_on_error=True), error):
            pass

        assert list(base.iterdir()) == []

    def test_is_not_kept_for_an_error_that_was_handled_around_the_run(self, base: Path) -> None:
        try:
            raise ValueError
        except ValueError:
            with run_in(TemporaryArtifacts(base=base, keep_on_error=True)):
                pass

        assert list(base.iterdir()) == []

    @pytest.mark.parametrize("what", ["file", "directory", "link", "dangling link"])
    def test_is_never_something_that_was_there_before(self, base: Path, what: str) -> None:
        tmp_dir = base / f"orchard-infra-{RUN_ID}"
        other = base / "other"
        if what == "file":
            write(tmp_dir)
        elif what == "directory":
            write(tmp_dir / "theirs")
        else:
            tmp_dir.symlink_to(other)
        if what == "link":
            other.mkdir()
        before = sorted(base.rglob("*"))
        env = environment()

        with (
            pytest.raises(InfrastructureError, match="stays untouched"),
            TemporaryArtifacts(base=base).around(env),
        ):
            raise AssertionError("it was entered")

        assert sorted(base.rglob("*")) == before
        assert (env.report.cleaned, env.tmp_dir) == (None, None)

    def test_that_cannot_be_made_is_a_clear_error(self, base: Path) -> None:
        around = TemporaryArtifacts(base=base / "missing").around(environment())

        with pytest.raises(InfrastructureError, match=r"No such file or directory.*base="), around:
            pass

    def test_without_any_place_for_it_is_a_clear_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def nowhere() -> str:
            raise FileNotFoundError("No usable temporary directory found")

        monkeypatch.setattr(tempfile, "gettempdir", nowhere)
        around = TemporaryArtifacts().around(environment())

        with pytest.raises(InfrastructureError, match="TMPDIR or base="), around:
            pass

    def test_is_removed_when_a_signal_came_while_it_was_made(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        env = environment()
        real = os.mkdir

        def interrupted(*args: Any) -> None:
            real(*args)
            assert len(list(base.iterdir())) == 1
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", interrupted)
            around = TemporaryArtifacts(base=base, keep_on_error=True).around(env)
            with pytest.raises(KeyboardInterrupt):
                around.__enter__()

        assert list(base.iterdir()) == []

    def test_is_removed_when_nobody_leaves_the_environment(self, base: Path) -> None:
        around = TemporaryArtifacts(base=base).around(environment())
        around.__enter__()
        assert len(list(base.iterdir())) == 1
        del around

        assert list(base.iterdir()) == []

    def test_is_no_business_of_a_forked_child(self, base: Path) -> None:
        env = environment()
        around = TemporaryArtifacts(base=base, set_tmpdir=True, patterns="*.tmp").around(env)
        around.__enter__()
        assert env.tmp_dir is not None

        def unwind() -> bool:
            leave(around)
            return (env.report.cleaned, os.environ["TMPDIR"]) == (None, str(env.tmp_dir))

        assert succeeds_in_a_fork(unwind)
        assert env.tmp_dir.exists()
        leave(around)
        assert env.report.cleaned == CleanReport(removed=(env.tmp_dir,))

    def test_may_be_gone_already(self, base: Path) -> None:
        with run_in(TemporaryArtifacts(base=base)) as run:
            run.tmp_dir.rmdir()

        assert run.report == CleanReport()

    @pytest.mark.parametrize("run_id", ["", "..", "a/b", "a b", "1000", "\xe9" * 16])
    def test_is_named_only_after_what_can_be_a_run(self, run_id: str) -> None:
        with pytest.raises(ValueError, match="not the id of a run"):
            sweeping.directory_name(run_id)

    def test_of_several_runs_at_once_may_go_in_any_order(self, base: Path) -> None:
        cleaner = TemporaryArtifacts(base=base, set_tmpdir=True)
        first, second = environment("a" * 16), environment("b" * 16)
        outer, inner = cleaner.around(first), cleaner.around(second)
        outer.__enter__()
        inner.__enter__()
        leave(outer)

        assert list(base.iterdir()) == [second.tmp_dir]
        leave(inner)
        assert list(base.iterdir()) == []

    def test_a_cleaner_holds_nothing_of_a_run(self, base: Path) -> None:
        cleaner = TemporaryArtifacts(base=base, patterns=["*.tmp"])

        with run_in(cleaner):
            assert pickle.loads(pickle.dumps(cleaner)) == copy.deepcopy(cleaner) == cleaner
            hash(cleaner)

    def test_what_cannot_be_removed_is_a_warning_and_no_error(
        self, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with run_in(TemporaryArtifacts(base=base)) as run:
            run.tmp_dir.rmdir()
            run.tmp_dir.symlink_to(tmp_path)

        [record] = caplog.records
        assert (record.levelname, record.getMessage()) == (
            "WARNING",
            f"temporary artifacts: {run.report.failures[0]}",
        )

    def test_what_was_removed_is_told_to_who_debugs(
        self, base: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.DEBUG), run_in(TemporaryArtifacts(base=base)) as run:
            pass

        assert [record.getMessage() for record in caplog.records] == [
            f"temporary artifacts: removed {run.tmp_dir}"
        ]


class TestTmpdir:
    ASK = "import tempfile; print(tempfile.gettempdir())"

    def of_a_child(self) -> Path:
        output = subprocess.run([sys.executable, "-c", self.ASK], capture_output=True, text=True)
        return Path(output.stdout.strip())

    def test_is_the_runs_directory_for_children_when_that_is_asked_for(self, base: Path) -> None:
        own = tempfile.gettempdir()

        with run_in(TemporaryArtifacts(base=base, set_tmpdir=True)) as run:
            assert self.of_a_child() == run.tmp_dir
            assert tempfile.gettempdir() == own

        assert self.of_a_child() != run.tmp_dir

    def test_stays_what_it_is_otherwise(self, base: Path) -> None:
        before = os.environ.get("TMPDIR")

        with run_in(TemporaryArtifacts(base=base)):
            assert os.environ.get("TMPDIR") == before

    def test_never_becomes_that_of_this_process(self, base: Path, tmp_path: Path) -> None:
        script = run_python(
            tmp_path,
            f"""
            import os, sys
            from pathlib import Path
            from orchard_infra.artifacts.temporary import TemporaryArtifacts
            from orchard_infra.environment import Environment
            from orchard_infra.runs.record import describe_this_run

            env = Environment(describe_this_run("digits"), Path("/x.lock"))
            assert "tempfile" not in sys.modules
            with TemporaryArtifacts(base={str(base)!r}, set_tmpdir=True).around(env):
                import tempfile
                tmp_dir = str(env.tmp_dir)
                print(tempfile.gettempdir() != tmp_dir, os.environ["TMPDIR"] == tmp_dir)
            tempfile.TemporaryFile().close()
            """,
        )

        assert script.finish() == 0, script.transcript()
        assert script.output.split() == ["True", "True"]

    @pytest.mark.parametrize("outer", [None, "/outer"])
    def test_is_put_back(
        self, base: Path, monkeypatch: pytest.MonkeyPatch, outer: str | None
    ) -> None:
        if outer is None:
            monkeypatch.delenv("TMPDIR", raising=False)
        else:
            monkeypatch.setenv("TMPDIR", outer)

        with run_in(TemporaryArtifacts(base=base, set_tmpdir=True)) as run:
            assert os.environ["TMPDIR"] == str(run.tmp_dir)

        assert os.environ.get("TMPDIR") == outer

    def test_is_not_put_back_over_somebody_elses(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TMPDIR", "/outer")

        with run_in(TemporaryArtifacts(base=base, set_tmpdir=True)):
            os.environ["TMPDIR"] = "/theirs"

        assert os.environ["TMPDIR"] == "/theirs"

    def test_of_environments_that_end_in_any_order_is_put_back(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TMPDIR", "/outer")
        cleaner = TemporaryArtifacts(base=base, set_tmpdir=True)
        first, second = environment("a" * 16), environment("b" * 16)
        outer, inner = cleaner.around(first), cleaner.around(second)
        outer.__enter__()
        inner.__enter__()
        leave(outer)
        assert os.environ["TMPDIR"] == str(second.tmp_dir)
        leave(inner)
        assert os.environ["TMPDIR"] == "/outer"


class TestRemovingADirectory:
    def test_follows_no_link(self, base: Path, tmp_path: Path) -> None:
        outside = write(tmp_path / "outside" / "file")
        with run_in(TemporaryArtifacts(base=base)) as run:
            (run.tmp_dir / "to a directory").symlink_to(outside.parent)
            (run.tmp_dir / "to a file").symlink_to(outside)
            (run.tmp_dir / "to nothing").symlink_to("missing")

        assert not run.tmp_dir.exists()
        assert outside.read_text() == "content"

    def test_does_not_follow_a_link_that_is_put_in_its_place(
        self, base: Path, tmp_path: Path
    ) -> None:
        outside = write(tmp_path / "outside" / "file")
        with run_in(TemporaryArtifacts(base=base)) as run:
            run.tmp_dir.rmdir()
            run.tmp_dir.symlink_to(outside.parent)

        assert outside.exists()
        assert run.report.removed == ()
        assert "a symbolic link is there" in run.report.failures[0]

    def test_does_not_follow_a_link_that_somebody_puts_there_at_the_last_moment(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outside = write(tmp_path / "outside" / "file")
        real = os.open

        def swapping(path: str, flags: int, *args: int, dir_fd: int | None = None) -> int:
            if path == "trap" and (run.tmp_dir / "trap").is_dir():
                (run.tmp_dir / "trap").rename(tmp_path / "moved away")
                (run.tmp_dir / "trap").symlink_to(outside.parent)
            return real(path, flags, *args, dir_fd=dir_fd)

        with monkeypatch.context() as patch, run_in(TemporaryArtifacts(base=base)) as run:
            (run.tmp_dir / "trap").mkdir()
            patch.setattr(os, "open", swapping)

        assert (run.tmp_dir / "trap").is_symlink()
        assert outside.exists()

    @needs_another_user
    def test_opens_what_its_own_owner_has_closed(self, nobodys: Path) -> None:
        env = environment(
            is_leader=False
        )  # else it would look into a registry that is not nobody's

        def with_closed_directories() -> Any:
            with run_in(TemporaryArtifacts(base=nobodys), env=env) as run:
                write(run.tmp_dir / "closed" / "below" / "file")
                write(run.tmp_dir / "read-only" / "file")
                (run.tmp_dir / "closed" / "below").chmod(0o000)
                (run.tmp_dir / "closed").chmod(0o000)
                (run.tmp_dir / "read-only").chmod(0o500)
                run.tmp_dir.chmod(0o000)
            return run.report

        report = as_nobody(with_closed_directories)

        assert report.failures == ()
        assert list(nobodys.iterdir()) == []

    @needs_another_user
    def test_goes_on_past_what_cannot_be_removed(self, nobodys: Path) -> None:
        tmp_dir = nobodys / f"orchard-infra-{RUN_ID}"
        tmp_dir.mkdir()
        os.chown(tmp_dir, 65534, 65534)
        for number in range(30):
            write(tmp_dir / f"roots \x1b[2J{number}" / "file")
            os.chown(write(tmp_dir / f"own {number}"), 65534, 65534)

        report = as_nobody(lambda: collect([dead_run(tmp_dir)]))

        assert len(list(tmp_dir.glob("roots*"))) == 30
        assert list(tmp_dir.glob("own*")) == []
        assert report.removed == ()
        # As many failures as a person reads, and none that acts on a terminal.
        assert len(report.failures) == 21
        assert re.search(r"roots \\x1b\[2J\d+/file: Permission denied", report.failures[0])

    @needs_another_user
    def test_leaves_a_directory_of_another_user(self, base: Path) -> None:
        with run_in(TemporaryArtifacts(base=base)) as run:
            write(run.tmp_dir / "file")
            os.chown(run.tmp_dir, 65534, 65534)

        assert (run.tmp_dir / "file").exists()
        assert "not to you" in run.report.failures[0]

    @needs_namespaces
    @pytest.mark.parametrize("where", ["", "below"])
    def test_leaves_what_is_mounted_there(self, base: Path, tmp_path: Path, where: str) -> None:
        # From the same file system, so that the device number does not give it away.
        outside = write(tmp_path / "outside" / "file")
        source = f"""
            import subprocess
            from pathlib import Path
            from orchard_infra.artifacts.temporary import TemporaryArtifacts
            from orchard_infra.environment import Environment
            from orchard_infra.runs.record import describe_this_run

            env = Environment(describe_this_run("digits"), Path("/x.lock"))
            with TemporaryArtifacts(base={str(base)!r}).around(env):
                (env.tmp_dir / {where!r}).mkdir(exist_ok=True)
                place = env.tmp_dir / {where!r}
                subprocess.run(["mount", "--bind", {str(outside.parent)!r}, place], check=True)
            print(env.report.cleaned.failures)
        """
        path = write(tmp_path / "mounting.py", textwrap.dedent(source))
        script = run_command(tmp_path, ["unshare", "--mount", sys.executable, str(path)])

        assert script.finish() == 0, script.transcript()
        assert "something is mounted here" in script.output
        assert outside.exists()

    def test_removes_a_tree_deeper_than_there_are_descriptors(self, base: Path) -> None:
        with run_in(TemporaryArtifacts(base=base)) as run:
            directory = os.open(run.tmp_dir, os.O_RDONLY)
            for _ in range(1500):
                os.mkdir("below", dir_fd=directory)
                below = os.open("below", os.O_RDONLY, dir_fd=directory)
                os.close(directory)
                directory = below
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
            os.close(directory)
            descriptors = psutil.Process().num_fds()

        assert run.report == CleanReport(removed=(run.tmp_dir,))
        assert list(base.iterdir()) == []
        assert psutil.Process().num_fds() == descriptors

    def test_goes_on_with_a_handful_of_descriptors_and_fails_without_any(
        self, base: Path, tmp_path: Path
    ) -> None:
        """What a body that died of EMFILE leaves: the reserve of the package has six."""
        script = run_python(
            tmp_path,
            f"""
            import os, resource
            from pathlib import Path
            from orchard_infra.artifacts.temporary import TemporaryArtifacts
            from orchard_infra.environment import Environment
            from orchard_infra.runs.record import describe_this_run

            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            cleaner = TemporaryArtifacts(base={str(base)!r}, patterns="out/**/*.part")
            for number in range(7):
                env = Environment(describe_this_run("digits"), Path("/x.lock"))
                with cleaner.around(env):
                    for name in ("a/b/c/d/e/f/file", "a/g/file", "h/i/file", "file"):
                        path = env.tmp_dir / name
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text("x")
                    Path("out").mkdir(exist_ok=True)
                    Path("out/x.part").write_text("x")
                    used = []
                    try:
                        while True:
                            used.append(os.open("/dev/null", os.O_RDONLY))
                    except OSError:
                        for _ in range(number):
                            os.close(used.pop())
                for fd in used:
                    os.close(fd)
                left = env.tmp_dir.exists(), os.path.exists("out/x.part")
                failures = env.report.cleaned.failures
                assert bool(failures) == any(left), failures
                assert all("Too many open files" in failure for failure in failures), failures
                print(number, *left)
            """,
        )

        assert script.finish() == 0, script.transcript()
        assert script.output.splitlines()[0] == "0 True True"
        assert script.output.splitlines()[-1] == "6 False False"

    def test_gives_up_on_one_that_somebody_keeps_writing_into(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.rmdir

        def too_late(path: str, *, dir_fd: int | None = None) -> None:
            write(run.tmp_dir / "one more")
            real(path, dir_fd=dir_fd)

        with monkeypatch.context() as patch, run_in(TemporaryArtifacts(base=base)) as run:
            patch.setattr(os, "rmdir", too_late)

        assert "keeps writing" in run.report.failures[0]

    def test_counts_no_space_that_another_name_still_holds(
        self, base: Path, tmp_path: Path
    ) -> None:
        with run_in(TemporaryArtifacts(base=base)) as run:
            os.link(write(tmp_path / "kept", "x" * 100_000), run.tmp_dir / "link")

        assert run.report.bytes_freed == 0


class TestADeadRun:
    def test_loses_its_directory(self, base: Path) -> None:
        tmp_dir = base / f"orchard-infra-{RUN_ID}"
        write(tmp_dir / "below" / "file")
        dead = [dead_run(None), dead_run(tmp_dir), dead_run(tmp_dir)]

        assert would_collect(dead).removed == (tmp_dir, tmp_dir)
        assert tmp_dir.exists()
        report = collect(dead)

        assert list(base.iterdir()) == []
        assert (report.removed, report.failures) == ((tmp_dir,), ())

    @pytest.mark.parametrize("is_leader", [True, False])
    def test_loses_it_to_the_next_run_of_whoever_leads(self, base: Path, is_leader: bool) -> None:
        record = attrs.evolve(
            describe_this_run("digits"),
            tmp_dir=str(base / f"orchard-infra-{RUN_ID}"),
            run_id=RUN_ID,
        )
        left = write(Path(record.tmp_dir or "") / "file")
        env = environment("f" * 16, is_leader=is_leader)
        env._dead = [RegisteredRun(record, RunState.DEAD)]
        before = set(base.iterdir())

        with TemporaryArtifacts(base=base).around(env):
            assert left.exists() is not is_leader
            assert len(set(base.iterdir()) - before) == 1

        if is_leader:
            assert env.report.collected is not None
            assert env.report.collected.removed == (left.parent,)
        else:
            assert env.report.collected is None

    def test_leaves_a_warning_where_something_stays(
        self, base: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        link = base / f"orchard-infra-{RUN_ID}"
        link.symlink_to(base)
        record = attrs.evolve(describe_this_run("digits"), tmp_dir=str(link), run_id=RUN_ID)
        env = environment("f" * 16)
        env._dead = [RegisteredRun(record, RunState.DEAD)]

        sweep(env)

        [warning] = caplog.records
        assert warning.getMessage().startswith(f"what dead runs left: {link}: a symbolic link")

    def test_of_many_files_does_not_hold_up_a_signal(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The environment is entered with signals held back, and this part may take long."""
        masks = []
        monkeypatch.setattr(
            sweeping, "collect", lambda *_, **__: masks.append(signal_mask()) or CleanReport()
        )
        outside = signal_mask()
        with uninterrupted():
            sweep(environment())
            assert signal_mask() != outside

        assert masks == [outside]

    def test_is_whatever_the_registry_has_of_it(self, base: Path) -> None:
        assert collect([describe_this_run("project")]) == CleanReport()

    @pytest.mark.parametrize(
        "name", ["orchard-infra-fedcba9876543210", "precious", f"orchard-infra-{RUN_ID}-2"]
    )
    def test_loses_nothing_of_another_name(self, base: Path, name: str) -> None:
        precious = write(base / name / "file")

        report = collect([dead_run(precious.parent)])

        assert precious.exists()
        assert report == CleanReport()

    def test_never_takes_the_runtime_directory_of_a_user_with_it(self, base: Path) -> None:
        precious = write(base / "orchard-infra-1000" / "runs" / "file")

        collect([dead_run(precious.parent.parent, run_id="1000")])

        assert precious.exists()

    def test_loses_nothing_where_a_link_leads(self, base: Path, tmp_path: Path) -> None:
        precious = write(tmp_path / "precious" / "file")
        link = base / f"orchard-infra-{RUN_ID}"
        link.symlink_to(precious.parent)

        report = collect([dead_run(link)])

        assert precious.exists()
        assert link.is_symlink()
        assert len(report.failures) == 1

    def test_is_not_looked_for_in_the_working_directory(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(base)
        precious = write(base / f"orchard-infra-{RUN_ID}" / "file")

        collect([dead_run(precious.parent.name)])

        assert precious.exists()

    @pytest.mark.parametrize("odd", ["\0", "\ud800", "x" * 5000])
    def test_with_a_path_that_cannot_be_is_a_failure_and_no_more(self, odd: str) -> None:
        report = collect([dead_run(f"/tmp/{odd}/orchard-infra-{RUN_ID}")])

        assert report.removed == ()
        assert len(report.failures) == 1


@needs_linux
class TestSharedMemory:
    """Of the kind that says in its name which process made it."""

    def leave(self, shm: Path, name: str = "pym-{}-ab1_x9z2", pid: int | None = None) -> Path:
        # Above the highest pid that Linux can give.
        return write(shm / name.format(2**22 + 7 if pid is None else pid))

    @pytest.mark.parametrize(
        "name", ["torch_{}_2871_0", "torch_{}_2871", "__KMP_REGISTERED_LIB_{}_0", "pym-{}-ab1_x9z2"]
    )
    def test_of_a_dead_process_is_removed(self, shm: Path, name: str) -> None:
        left = self.leave(shm, name)

        report = collect([])

        assert not left.exists()
        assert (report.removed, report.kept, report.failures) == ((left,), (), ())
        assert report.bytes_freed > 0

    @pytest.mark.parametrize("name", ["torch_{}_1_0", "__KMP_REGISTERED_LIB_{}_0"])
    def test_of_a_live_process_stays(self, shm: Path, name: str) -> None:
        left = self.leave(shm, name, pid=os.getpid())

        assert collect([]) == CleanReport()
        assert left.exists()

    @pytest.mark.parametrize(
        "name",
        [
            "psm_0a1b2c3d",
            "sem.mp-abc",
            "nccl-XyZ123",
            "torch_",
            "torch_x_1_0",
            "mine",
            "xtorch_{}_1_0",
            "torch_{}_1_0.bak",
            "torch_{}",
        ],
    )
    def test_that_does_not_say_whose_it_is_stays(self, shm: Path, name: str) -> None:
        left = self.leave(shm, name)

        assert collect([]) == CleanReport()
        assert left.exists()

    @pytest.mark.parametrize("kind", ["directory", "link", "FIFO", "socket"])
    def test_that_is_no_regular_file_stays(
        self, shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        left = shm / f"pym-{2**22 + 7}-ab1_x9z2"
        target = write(tmp_path / "target")
        listener = socket.socket(socket.AF_UNIX)
        if kind == "directory":
            left.mkdir()
        elif kind == "link":
            left.symlink_to(target)
        elif kind == "FIFO":
            os.mkfifo(left)
        else:
            monkeypatch.chdir(shm)  # the path of a socket has to be short
            listener.bind(left.name)
        listener.close()

        assert collect([]) == CleanReport()
        assert os.path.lexists(left)
        assert target.exists()

    @needs_another_user
    def test_of_another_user_stays(self, shm: Path) -> None:
        left = self.leave(shm)
        os.chown(left, 65534, 65534)

        assert collect([]) == CleanReport()
        assert left.exists()

    @pytest.mark.parametrize("access", ["ACCESS_READ", "ACCESS_WRITE"])
    def test_that_is_mapped_stays(self, shm: Path, tmp_path: Path, access: str) -> None:
        left = self.leave(shm)
        mapper = run_python(
            tmp_path,
            """
            import mmap, os, sys
            name, access = sys.argv[1:]
            fd = os.open(name, os.O_RDWR if access == "ACCESS_WRITE" else os.O_RDONLY)
            mapping = mmap.mmap(fd, 0, access=getattr(mmap, access))
            os.close(fd)
            print("mapped")
            input()
            """,
            str(left),
            access,
        )
        mapper.wait_for("mapped")

        assert collect([]) == CleanReport(kept=(left,))
        assert left.exists()

        mapper.tell()
        mapper.finish()
        assert collect([]).removed == (left,)

    def test_stays_where_the_kernel_cannot_say_whether_it_is_mapped(
        self, shm: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import fcntl

        left = self.leave(shm)
        monkeypatch.delattr(fcntl, "F_SETLEASE")

        assert collect([]) == CleanReport(kept=(left,))

    def test_may_be_opened_at_the_very_moment_that_we_ask(self, shm: Path, tmp_path: Path) -> None:
        left = self.leave(shm)
        script = run_python(
            tmp_path,
            f"""
            import fcntl, os
            from orchard_infra.artifacts import sweeping

            real = fcntl.fcntl
            def opened_meanwhile(fd, command, value):
                real(fd, command, value)
                if command == fcntl.F_SETLEASE:
                    try:
                        os.open({str(left)!r}, os.O_RDWR | os.O_NONBLOCK)
                    except BlockingIOError:
                        print("asked for", flush=True)

            fcntl.fcntl = opened_meanwhile
            sweeping._SHARED_MEMORY = {str(shm)!r}
            sweeping.collect([])
            """,
        )

        assert script.finish() == 0, script.transcript()
        assert "asked for" in script.output

    def test_of_torch_stays_while_a_manager_of_torch_may_keep_it_for_a_receiver(
        self, shm: Path, tmp_path: Path
    ) -> None:
        torchs, others = self.leave(shm, "torch_{}_1_0"), self.leave(shm)
        command = tmp_path / sweeping._TORCH_MANAGER
        command.symlink_to(sys.executable)
        manager = run_command(tmp_path, [str(command), "-c", "print('ready'); input()"])
        manager.wait_for("ready")

        report = collect([])

        assert (report.removed, report.kept) == ((others,), (torchs,))

    @needs_namespaces
    def test_stays_in_a_container_unless_it_is_said_to_be_that_containers_own(
        self, shm: Path, tmp_path: Path
    ) -> None:
        left = self.leave(shm)
        source = f"""
            from orchard_infra.artifacts import sweeping

            sweeping._SHARED_MEMORY = {str(shm)!r}
            print(len(sweeping.collect([]).kept))
            print(len(sweeping.collect([], private_shm=True).removed))
        """
        script = run_in_a_container(tmp_path, source)

        assert script.finish() == 0, script.transcript()
        assert script.output.split() == ["1", "1"]
        assert not left.exists()

    @needs_namespaces
    def test_of_a_process_that_lives_inside_a_container_stays(
        self, shm: Path, tmp_path: Path
    ) -> None:
        free = sorted(set(range(2, 5000)) - set(psutil.pids()))[:200]
        source = f"""
            import os, time
            while True:
                pid = os.fork()
                if pid == 0:
                    if os.getpid() in {free}:
                        print("inside", os.getpid(), flush=True)
                        time.sleep(60)
                    os._exit(0)
                elif pid in {free}:
                    os.waitpid(pid, 0)
                    break
                os.waitpid(pid, 0)
        """
        container = run_in_a_container(tmp_path, source)
        pid = int(container.wait_for("inside").split()[1])
        assert not psutil.pid_exists(pid)
        left = self.leave(shm, pid=pid)

        assert collect([]) == CleanReport()
        assert left.exists()

    @pytest.mark.parametrize("there", [False, True])
    def test_that_cannot_be_looked_at_is_in_nobodys_way(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
    ) -> None:
        path = tmp_path / "place"
        if there:
            write(path)
        monkeypatch.setattr(sweeping, "_SHARED_MEMORY", str(path))

        assert collect([]) == CleanReport()

    def test_of_a_whole_tree_that_was_killed_is_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        require_module("torch")
        monkeypatch.setattr(sweeping, "_SHARED_MEMORY", "/dev/shm")
        monkeypatch.setattr(sweeping, "_TORCH_MANAGER", TORCH_MANAGER)
        trainer = run_python(
            tmp_path,
            """
            import torch
            from torch.utils.data import DataLoader, TensorDataset

            def share(worker):
                torch.multiprocessing.set_sharing_strategy("file_system")

            share(None)
            loader = DataLoader(
                TensorDataset(torch.rand(1000, 100)), num_workers=2, worker_init_fn=share
            )
            batches = iter(loader)
            next(batches), next(batches)
            print("ready", flush=True)
            input()
            """,
        )
        trainer.wait_for("ready")
        tree = [psutil.Process(trainer.pid), *psutil.Process(trainer.pid).children(recursive=True)]
        workers = {process.pid for process in tree}
        titles = {stat.name for pid in workers if (stat := read_stat(pid))}
        for process in tree:
            process.suspend()  # or the manager would clean up before it is killed itself
        names = [
            name
            for name in os.listdir("/dev/shm")
            if (match := re.match(r"torch_(\d+)_", name)) and int(match[1]) in workers
        ]
        for process in tree:
            process.kill()
        wait_gone(workers)
        trainer.finish()

        def collected() -> bool:
            # Not at once: threads outlive the first one by a moment, and while somebody else's
            # torch runs, its manager may be the one that keeps these.
            collect([])
            return not set(names) & set(os.listdir("/dev/shm"))

        assert names
        assert TORCH_MANAGER in titles
        wait_until(collected, what="the removal of what the dead have shared")


class TestHalfWrittenOutputs:
    @pytest.fixture(autouse=True)
    def cwd(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        directory = tmp_path / "train"
        directory.mkdir()
        monkeypatch.chdir(directory)
        return directory

    def clean(
        self, base: Path, *patterns: str, error: BaseException | None = None
    ) -> AbstractContextManager[Any]:
        return run_in(TemporaryArtifacts(base=base, patterns=patterns), error)

    @pytest.mark.parametrize("error", [None, ValueError()], ids=repr)
    def test_are_removed(self, base: Path, cwd: Path, error: BaseException | None) -> None:
        with self.clean(base, "*.tmp", error=error) as run:
            half, whole = write(cwd / "model.tmp"), write(cwd / "model.pt")

        assert not half.exists()
        assert whole.exists()
        assert half in run.report.removed

    @pytest.mark.parametrize(
        ("pattern", "matches"),
        [
            ("model.tmp", ["model.tmp"]),
            ("out/*.tmp", ["out/a.tmp"]),
            ("*/*.tmp", ["out/a.tmp"]),
            ("**/*.tmp", ["model.tmp", "out/a.tmp", "out/deep/b.tmp"]),
            ("out/**/b.tmp", ["out/deep/b.tmp"]),
            ("out/**/**/b.tmp", ["out/deep/b.tmp"]),
            ("**/deep/*.t[m]p", ["out/deep/b.tmp"]),
            (".*.tmp", [".hidden.tmp"]),
            (".cache/*.tmp", [".cache/c.tmp"]),
            ("./model.tm?", ["model.tmp"]),
            ("../train/model.tmp", ["model.tmp"]),
            ("missing/*.tmp", []),
            ("model.tmp/*.tmp", []),
        ],
    )
    def test_are_what_the_pattern_says(
        self, base: Path, cwd: Path, pattern: str, matches: list[str]
    ) -> None:
        names = [
            "model.tmp", "out/a.tmp", "out/deep/b.tmp", ".hidden.tmp", ".cache/c.tmp",
            "model.pt", "out/a.pt",
        ]  # fmt: skip
        with self.clean(base, pattern) as run:
            for name in names:
                write(cwd / name)

        assert sorted(set(names) - set(matches)) == sorted(
            str(path.relative_to(cwd)) for path in cwd.rglob("*") if path.is_file()
        )
        assert run.report.failures == ()

    def test_are_looked_for_where_the_run_began(
        self, base: Path, cwd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with self.clean(base, "*.tmp"):
            here, elsewhere = write(cwd / "a.tmp"), write(tmp_path / "elsewhere" / "a.tmp")
            monkeypatch.chdir(elsewhere.parent)

        assert (here.exists(), elsewhere.exists()) == (False, True)

    def test_may_be_named_by_an_absolute_pattern(self, base: Path, tmp_path: Path) -> None:
        with self.clean(base, f"{tmp_path}/elsewhere/*.tmp"):
            half = write(tmp_path / "elsewhere" / "a.tmp")

        assert not half.exists()

    def test_of_an_earlier_run_stay(self, base: Path, cwd: Path) -> None:
        earlier = write(cwd / "earlier.tmp")
        os.utime(earlier, (time.time() - 60, time.time() - 60))

        with self.clean(base, "*.tmp"):
            pass

        assert earlier.exists()

    @needs_another_user
    def test_of_another_user_stay(self, base: Path, cwd: Path) -> None:
        with self.clean(base, "*.tmp"):
            theirs = write(cwd / "theirs.tmp")
            os.chown(theirs, 65534, 65534)

        assert theirs.exists()

    def test_are_never_links_directories_or_the_like(
        self, base: Path, cwd: Path, tmp_path: Path
    ) -> None:
        with self.clean(base, "*.tmp") as run:
            target = write(tmp_path / "target")
            (cwd / "link.tmp").symlink_to(target)
            (cwd / "directory.tmp").mkdir()
            os.mkfifo(cwd / "fifo.tmp")

        assert target.exists()
        assert len(list(cwd.iterdir())) == 3
        assert run.report.failures == ()

    @pytest.mark.parametrize("pattern", ["*/*.tmp", "**/*.tmp", "*/below/*.tmp"])
    def test_are_not_looked_for_behind_a_link(
        self, base: Path, cwd: Path, tmp_path: Path, pattern: str
    ) -> None:
        with self.clean(base, pattern) as run:
            outside = write(tmp_path / "outside" / "a.tmp")
            below = write(tmp_path / "outside" / "below" / "a.tmp")
            (cwd / "link").symlink_to(outside.parent)

        assert run.report.failures == ()
        assert outside.exists()
        assert below.exists()

    def test_are_not_looked_for_behind_a_link_that_is_put_there_meanwhile(
        self, base: Path, cwd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outside = write(tmp_path / "outside" / "a.tmp")
        real = os.open

        def swapping(path: str, flags: int, *args: int, dir_fd: int | None = None) -> int:
            if path == "trap" and (cwd / "trap").is_dir():
                (cwd / "trap").rename(tmp_path / "moved away")
                (cwd / "trap").symlink_to(outside.parent)
            return real(path, flags, *args, dir_fd=dir_fd)

        with monkeypatch.context() as patch, self.clean(base, "*/*.tmp") as run:
            (cwd / "trap").mkdir()
            outside.touch()
            patch.setattr(os, "open", swapping)

        assert outside.exists()
        assert len(run.report.failures) == 1

    def test_are_looked_for_where_the_pattern_itself_names_a_link(
        self, base: Path, cwd: Path, tmp_path: Path
    ) -> None:
        with self.clean(base, "link/*.tmp"):
            outside = write(tmp_path / "outside" / "a.tmp")
            (cwd / "link").symlink_to(outside.parent)

        assert not outside.exists()

    @needs_linux
    def test_stay_while_another_process_writes_them(
        self, base: Path, cwd: Path, tmp_path: Path
    ) -> None:
        with self.clean(base, "*.tmp") as run:
            writer = run_python(tmp_path, "f = open('train/a.tmp', 'w'); print('open'); input()")
            writer.wait_for("open")

        assert (cwd / "a.tmp").exists()
        assert run.report.kept == (cwd / "a.tmp",)

    def test_are_removed_though_a_frame_of_the_failure_holds_them_open(
        self, base: Path, cwd: Path
    ) -> None:
        with open(cwd / "a.tmp", "w") as stream, self.clean(base, "*.tmp", error=ValueError()):
            stream.write("half")
            stream.flush()

        assert not (cwd / "a.tmp").exists()

    def test_are_searched_to_a_depth_that_has_an_end(self, base: Path, cwd: Path) -> None:
        with self.clean(base, "**/*.tmp") as run:
            directory = os.open(cwd, os.O_RDONLY)
            for _ in range(200):
                os.mkdir("below", dir_fd=directory)
                below = os.open("below", os.O_RDONLY, dir_fd=directory)
                os.close(directory)
                directory = below
            os.close(directory)

        assert ["too deep" in failure for failure in run.report.failures] == [True]

    def test_of_a_run_that_began_nowhere_are_a_failure_and_no_more(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()
        try:
            with self.clean(base, "*.tmp") as run:
                pass
        finally:
            os.chdir(tmp_path)  # monkeypatch asks where it is

        assert len(run.report.failures) == 1

    @pytest.mark.parametrize(
        "pattern", ["", "*", "?", "**", "out/**", "*.*", "[ab]*", "out/", "*/../x.tmp", "\0.tmp"]
    )
    def test_need_a_pattern_that_says_which_they_are(self, pattern: str) -> None:
        with pytest.raises(ValueError, match="does not say which files"):
            TemporaryArtifacts(patterns=[pattern])

    def test_may_be_named_by_a_single_pattern(self) -> None:
        assert TemporaryArtifacts(patterns="*.tmp").patterns == ("*.tmp",)


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    script = run_python(
        tmp_path,
        """
        import sys
        import orchard_infra.artifacts.temporary
        print([name for name in ("tempfile", "shutil") if name in sys.modules])
        """,
    )

    assert script.finish() == 0, script.transcript()
    assert script.output.strip() == "[]"
