"""Any bytes in the place of a run record, and any record as bytes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import attrs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchard_infra.runs.record import (
    RECORD_LIMIT,
    RECORD_START,
    RunRecord,
    RunState,
    clip,
    cut,
    describe_this_run,
    from_json,
    read_record,
    to_json,
)
from orchard_infra.runs.registry import RunRegistry
from orchard_infra.system.text import duration, printable

unhurried = settings(deadline=None)  # the machine may be busy with everybody else's tests

# Text as the operating system hands it out: bytes that are no UTF-8 become lone surrogates.
os_text = st.text(max_size=40) | st.binary(max_size=40).map(
    lambda raw: os.fsdecode(raw.replace(b"\0", b"0"))
)
whole = st.integers(0, 2**63 - 1)
seconds = st.floats(0, 1e12, exclude_max=True) | st.integers(0, 10**11)

records = st.builds(
    RunRecord,
    run_id=st.text("0123456789abcdefXYZ", min_size=1, max_size=64),
    project=os_text,
    pid=st.integers(1, 2**31 - 1),
    create_time=seconds,
    host=os_text,
    boot_id=os_text,
    pid_namespace=whole,
    user=os_text,
    uid=whole,
    argv=st.lists(os_text, max_size=8).map(tuple),
    cwd=os_text,
    started_at=seconds,
    lock=st.none() | os_text,
    tmp_dir=st.none() | os_text,
    rank=st.none() | whole,
    parent=st.none() | os_text,
    session=st.none() | whole,
    environment=st.none() | st.text("0123456789abcdef", min_size=32, max_size=32),
    job=st.none() | os_text,
    restart=st.none() | whole,
)
states = st.none() | st.sampled_from(RunState)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["running", "a" * 9000, 2**63, -1, 1e300, "\x1b[2J"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
names = st.sampled_from([field.name for field in attrs.fields(RunRecord)] + ["state"])


def reads_or_refuses(data: bytes) -> None:
    """Whatever it is: a whole record, or a ValueError and nothing else."""
    try:
        record, state = from_json(data)
    except ValueError:
        return
    assert state is None or isinstance(state, RunState)
    assert isinstance(record.argv, tuple)
    assert type(record.pid) is int
    assert record.pid > 0
    assert 0 <= record.started_at < 1e12  # no NaN, then
    assert 0 <= record.create_time < 1e12
    assert record.run_id.isalnum()
    assert record.describe().isprintable()
    assert not isinstance(record.rank, bool)
    hash(record)


@unhurried
@given(records, states)
def test_any_record_comes_back_as_it_was(record: RunRecord, state: RunState | None) -> None:
    data = to_json(record, state, with_environment=True)
    assert data.startswith(RECORD_START)
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert from_json(data) == (record, state)
    assert from_json(data + b"what a longer record left") == (record, state)
    for_all = to_json(record, state)
    assert from_json(for_all) == (attrs.evolve(record, environment=None), state)
    assert b"environment" not in for_all or "environment" in str(attrs.astuple(record))


@unhurried
@given(st.binary(max_size=300))
@example(b"")
@example(RECORD_START)
@example(RECORD_START + b"[" * 60_000)
@example(RECORD_START + b'"a":' + b"9" * 60_000 + b"}")
def test_any_bytes_are_a_record_or_a_value_error(data: bytes) -> None:
    reads_or_refuses(data)
    reads_or_refuses(RECORD_START + data)


@unhurried
@given(records, st.dictionaries(names, json_values, min_size=1))
def test_a_record_with_any_values_is_read_or_refused(
    record: RunRecord, changes: dict[str, object]
) -> None:
    reads_or_refuses(json.dumps({**json.loads(to_json(record)), **changes}).encode())


@unhurried
@given(records, states, st.data())
def test_a_record_with_any_bytes_changed_is_read_or_refused(
    record: RunRecord, state: RunState | None, data: st.DataObject
) -> None:
    raw = bytearray(to_json(record, state))
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(begin, min(len(raw), begin + 8)))
        raw[begin:end] = data.draw(st.binary(max_size=8))
    reads_or_refuses(bytes(raw))


@unhurried
@given(records, st.data())
def test_a_torn_record_is_refused(record: RunRecord, data: st.DataObject) -> None:
    raw = to_json(record)
    torn = raw[: data.draw(st.integers(0, len(raw) - 2))]
    try:
        from_json(torn)
    except ValueError:
        return
    raise AssertionError(f"read a record from {torn!r}")


@unhurried
@given(st.integers(2, 30_000), names)
def test_a_nested_record_is_refused(depth: int, name: str) -> None:
    fields = json.loads(to_json(describe_this_run("digits"), RunState.RUNNING))
    text = json.dumps({**fields, name: "HERE"})
    for nest in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        try:
            record, _ = from_json(text.replace('"HERE"', nest).encode())
        except ValueError:
            continue
        raise AssertionError(f"read {record}")


@unhurried
@given(st.binary(max_size=200) | st.builds(to_json, records, states), st.booleans())
def test_whatever_is_in_a_record_file_the_registry_lives_with_it(
    content: bytes, huge: bool
) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "abc.run"
        path.write_bytes(content)
        if huge:
            os.truncate(path, 2**31)
        registry = RunRegistry(place)
        assert len(registry.runs()) <= 1
        registry.lineage("abc")
        with open(path, "rb") as file:
            found = read_record(file.fileno())
        assert [run.record for run in registry.runs()] == ([found[0]] if found else [])


@unhurried
@given(st.lists(st.text(max_size=3000), max_size=30), st.text(max_size=5000))
def test_whatever_a_process_is_called_its_record_fits(words: list[str], cwd: str) -> None:
    record = attrs.evolve(describe_this_run("digits"), argv=clip(words), cwd=cut(cwd))
    assert len(to_json(record)) < RECORD_LIMIT // 4
    assert from_json(to_json(record))[0].pid == record.pid
    assert cwd.startswith(record.cwd)
    kept = len(record.argv)
    assert kept == len(words) or record.argv != ()
    assert all(word.startswith(shown) for word, shown in zip(words, record.argv, strict=False))
    assert list(record.argv[:-1]) == words[: max(0, kept - 1)]


@unhurried
@given(st.text(st.characters()) | os_text)
def test_any_text_is_printable_and_printable_text_stays(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert not text.isprintable() or shown == text


@unhurried
@given(st.floats(-1e15, 1e15))
def test_any_length_of_time_can_be_told(seconds: float) -> None:
    assert duration(seconds).isprintable()
