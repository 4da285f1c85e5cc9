"""wandb offline and TensorBoard: all records are in the files, however the program ends."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import psutil
import pytest

from endings import ENDINGS, STATUS, all_gone, end, is_released, runs_again, start
from support import run_python, wait_until

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "frameworks" / "trackers.py"
RECORDS = 3000


@pytest.fixture(autouse=True)
def trackers_are_installed(needs):
    needs("wandb", "tensorboard")


TRACKED = """
    import wandb
    from tensorboard.summary import Writer

    with protected() as env:
        print("spared", *[finding.pid for finding in env.report.sanitized.spared], flush=True)
        run = wandb.init(project="digits", settings=wandb.Settings(silent=True))
        writer = Writer("tensorboard")
        try:
            for step in range(int(sys.argv[1])):
                run.log({"loss": step})
                writer.add_scalar("loss", step, step)
            wait_for_the_end()
        finally:
            writer.add_scalar("last", 1, 0)
            writer.close()
    with protected("another"):
        run.log({"loss": -1})  # the service has outlived the first block
    print("went on")
"""


@pytest.mark.parametrize("ending", ENDINGS)
def test_however_the_program_ends_all_records_and_its_exit_are_in_the_file(
    tmp_path, runtime_directory, ending
):
    script = start(tmp_path, TRACKED, str(RECORDS))
    service = end(script, ending)
    assert script.returncode == STATUS[ending], script.transcript()
    assert ("went on" in script.output) == (ending == "normal end")
    assert is_released(script, runtime_directory, ending)
    assert all_gone(service)  # it writes for as long as it lives

    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file)
    kinds = [record.WhichOneof("record_type") for record in records]
    [scalars] = tmp_path.glob("tensorboard/*")
    steps = tensorboard_scalars(scalars)
    if ending == "kill -9":
        # Nobody could say how it ended. wandb's service wrote what it had got; TensorBoard's
        # thread died with the program, and what it had not flushed.
        assert "exit" not in kinds
        assert "last" not in steps
        assert runs_again(start(tmp_path, TRACKED, "1"), runtime_directory)
    else:
        assert kinds.count("history") == RECORDS + (ending == "normal end")
        assert kinds.count("exit") == 1
        assert steps["loss"] == RECORDS
        assert steps["last"] == 1


def test_the_service_of_a_killed_program_is_not_stopped_by_the_next_run(tmp_path):
    killed = start(tmp_path, TRACKED, str(RECORDS))
    killed.wait_for("ready")
    service = psutil.Process(killed.pid).children(recursive=True)
    for process in service:
        process.suspend()  # as if the upload took its time
    killed.kill()
    killed.finish()

    again = start(tmp_path, TRACKED, "1")  # it is allowed to kill
    again.wait_for("ready")
    assert all(process.is_running() for process in service), again.transcript()
    assert str(service[0].pid) in again.wait_for("spared").split()

    for process in service:
        process.resume()
    assert all_gone([process.pid for process in service])
    [file] = [
        file
        for file in tmp_path.glob("wandb/offline-run-*/*.wandb")
        if file.parent.name != (tmp_path / "wandb" / "latest-run").resolve().name
    ]
    kinds = [record.WhichOneof("record_type") for record in wandb_records(file)]
    assert kinds.count("history") > 0  # what it had got: the rest died with the program


def test_the_example_records_every_step(tmp_path):
    script = run_python(tmp_path, EXAMPLE, "--steps", "20")
    assert script.finish() == 0, script.transcript()
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    wait_until(
        lambda: [r for r in wandb_records(file) if r.HasField("exit")], what="the exit record"
    )
    kinds = [record.WhichOneof("record_type") for record in wandb_records(file)]
    assert kinds.count("history") == 20
    [scalars] = tmp_path.glob("tensorboard/*")
    assert tensorboard_scalars(scalars) == {"loss": 20, "steps": 1}


def wandb_records(path: Path) -> list[Any]:
    """The records of a transaction log. Its own reader is within wandb's service: this is LevelDB's
    log format, and wandb's own messages.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    block, header, data = 32768, 7, path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts, found = header, b"", []
    while position + header <= len(data):
        left = block - position % block
        if left < header:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if kind == 0:  # a last block that was not filled
            break
        parts += data[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def tensorboard_scalars(path: Path) -> dict[str, int]:
    """How many values each tag has, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    counts: dict[str, int] = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            counts[value.tag] = counts.get(value.tag, 0) + 1
    return counts
