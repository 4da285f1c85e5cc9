"""Each example runs, and the training example keeps what it promises."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest

from support import Script, require_module, run_python, wait_gone, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAIN_DIGITS = EXAMPLES / "train_digits.py"


def test_the_with_block_leaves_nothing_behind(tmp_path: Path, runtime_directory: Path) -> None:
    script = run_python(tmp_path, EXAMPLES / "with_block.py")

    assert script.finish() == 0, script.transcript()
    assert "of with-block holds" in script.output
    assert "lock left behind: False" in script.output
    assert "scratch file left behind: False" in script.output
    assert not list(runtime_directory.rglob("*with-block*.lock"))


def test_the_decorator_holds_the_project_for_as_long_as_the_body_runs(tmp_path: Path) -> None:
    script = run_python(tmp_path, EXAMPLES / "decorator.py")

    assert script.finish() == 0, script.transcript()
    assert script.output.splitlines() == [
        "loss 0.10",
        "checkpoint-0 (locked: True)",
        "checkpoint-1 (locked: True)",
        "train is still called train; left behind: False",
    ]


def test_a_strategy_of_ones_own_is_one_generator_function(tmp_path: Path) -> None:
    script = run_python(tmp_path, EXAMPLES / "own_strategy.py")

    assert script.finish() == 0, script.transcript()
    assert "features in memory: 20" in script.output
    assert "features in memory after the run: 0" in script.output


def test_a_pydantic_model_serves_as_configuration(tmp_path: Path) -> None:
    require_module("pydantic")
    script = run_python(tmp_path, EXAMPLES / "pydantic_config.py")

    assert script.finish() == 0, script.transcript()
    assert "2 epochs under demo.lock" in script.output
    assert "refused: " in script.output
    assert "hardware.allow_process_kill" in script.output
    assert "never reached" not in script.output


@attrs.frozen
class Digits:
    """Starts the training example with one output directory."""

    tmp_path: Path

    def start(self, *arguments: str, **popen: Any) -> Script:
        return run_python(self.tmp_path, TRAIN_DIGITS, "--output", "out", *arguments, **popen)

    @property
    def checkpoint(self) -> Path:
        return self.tmp_path / "out" / "checkpoint.pt"


@pytest.fixture
def digits(tmp_path: Path) -> Digits:
    for module in ("torch", "sklearn", "tqdm"):
        require_module(module)
    return Digits(tmp_path)


def accuracy(output: str) -> float:
    match = re.search(r"accuracy +([\d.]+)%", output)
    assert match, output
    return float(match[1])


def steps(line: str) -> int:
    match = re.search(r"(\d+) steps", line)
    assert match, line
    return int(match[1])


@pytest.mark.slow
def test_the_training_reaches_its_accuracy_and_reports(digits: Digits) -> None:
    script = digits.start()

    assert script.finish() == 0, script.transcript()
    assert accuracy(script.output) >= 95.0
    for line in ("prepared    in ", "released    in ", "flushed     memory: ", "checkpoint  out/"):
        assert line in script.output
    assert digits.checkpoint.exists()
    assert [path.name for path in digits.checkpoint.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.slow
def test_a_second_start_is_told_who_holds_the_project_while_another_project_trains_beside_it(
    digits: Digits,
) -> None:
    first = digits.start("--epochs", "1000")
    wait_until(digits.checkpoint.exists, what=first.transcript)

    second = digits.start("--epochs", "1")
    other = digits.start(
        *("--project", "other", "--epochs", "1", "--allow-process-kill", "--output", "other")
    )

    assert second.finish() == os.EX_TEMPFAIL, second.transcript()
    assert str(first.pid) in second.error_output
    assert "Traceback" not in second.error_output
    assert other.finish() == 0, other.transcript()
    assert first.poll() is None


def warnings(run: Script) -> list[str]:
    """What it wrote to stderr, without the lines on other tests' runs of the same script."""
    return [line for line in run.error_output.splitlines() if not line.startswith("spared process")]


@pytest.mark.slow
def test_a_training_that_is_killed_or_asked_to_stop_is_resumed_by_the_next_start(
    digits: Digits,
) -> None:
    killed = digits.start("--epochs", "1000")
    wait_until(digits.checkpoint.exists, what=killed.transcript)
    workers = psutil.Process(killed.pid).children(recursive=True)
    assert workers
    killed.kill()

    first = digits.start("--epochs", "1000", "--allow-process-kill")
    first.wait_for("resumed")
    assert not any(worker.is_running() for worker in workers)
    wait_until(psutil.Process(first.pid).children, what=first.transcript)
    workers = psutil.Process(first.pid).children(recursive=True)

    first.send_signal(signal.SIGTERM)

    assert first.finish() == 128 + signal.SIGTERM, first.transcript()
    assert "stopped by SIGTERM" in first.output
    wait_gone(worker.pid for worker in workers)

    second = digits.start("--epochs", "1000", start_new_session=True)
    resumed = steps(second.wait_for("resumed"))
    assert resumed == steps(first.wait_for("trained"))
    checkpoint = digits.checkpoint.stat().st_mtime_ns
    wait_until(lambda: digits.checkpoint.stat().st_mtime_ns != checkpoint, what=second.transcript)

    os.killpg(second.pid, signal.SIGINT)  # as a terminal does: to the workers, too

    assert second.finish() == 128 + signal.SIGINT, second.transcript()
    assert "stopped by SIGINT" in second.output
    assert steps(second.wait_for("trained")) > resumed
    assert warnings(first) == ["stop requested: SIGTERM"]
    assert warnings(second) == ["stop requested: SIGINT"]


@pytest.mark.slow
def test_a_resumed_training_ends_as_an_uninterrupted_one_does(digits: Digits) -> None:
    """All of them in one process: torch takes longer to load than they take to train."""
    script = run_python(
        digits.tmp_path,
        f"""
        import runpy, sys
        for epochs, output in [("2", "whole"), ("1", "parts"), ("2", "parts")]:
            sys.argv[1:] = ["--epochs", epochs, "--output", output]
            print("status", runpy.run_path({str(TRAIN_DIGITS)!r}, run_name="training")["main"]())
        """,
        name="three.py",
    )
    assert script.finish() == 0, script.transcript()
    whole, first, second = script.output.split("status 0\n")[:3]
    assert "resumed" not in first
    assert "resumed" in second
    assert accuracy(second) == accuracy(whole) != accuracy(first)
