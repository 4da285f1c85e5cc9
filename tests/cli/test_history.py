"""`orchard-infra history`, with real runs."""

from __future__ import annotations

import html.parser
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import assert_documented, killed, orchard_infra, queue, train, without_colours
from orchard_infra.inspect import RunState
from orchard_infra.runs.history import NAME
from orchard_infra.runs.registry import RunRegistry
from support import wait_gone, wait_until
from wrapping import is_pending

HOSTILE = """evil\x1b[2J\u202e[red]</td></svg><script>alert('x')</script>"'&\r\nnext"""


def table(tmp_path: Path, columns: int | None, *words: str) -> list[str]:
    env = {"COLUMNS": None if columns is None else str(columns)}
    return orchard_infra(tmp_path, "history", *words, env=env).output.splitlines()


def history_of(tmp_path: Path, *words: str) -> dict[str, Any]:
    found = json.loads(orchard_infra(tmp_path, "history", "--json", *words).output)
    assert isinstance(found, dict)
    return found


def how_they_ended(tmp_path: Path, *words: str) -> list[tuple[str, str]]:
    return [(run["project"], run["how"]) for run in history_of(tmp_path, *words)["runs"]]


def ended(tmp_path: Path, project: str, *arguments: str, **environ: str) -> None:
    run = train(tmp_path, project, *arguments, **environ)
    assert run.stdin is not None
    run.stdin.close()
    assert run.finish() == 0, run.transcript()


def add(runtime_directory: Path, **fields: Any) -> None:
    """One more line, as the last one on file, with other ``fields``."""
    path = runtime_directory / "runs" / NAME
    last = json.loads(path.read_bytes().splitlines()[-1])
    with open(path, "ab") as file:
        file.write(b"\n" + json.dumps({**last, **fields}).encode() + b"\n")


def test_without_a_run_there_is_one_line(tmp_path):
    assert table(tmp_path, 80) == ["No run has ended yet."]
    assert history_of(tmp_path)["runs"] == []
    orchard_infra(tmp_path, "history", "--html", "runs.html")
    assert "No run has ended yet." in (tmp_path / "runs.html").read_text()


def test_runs_are_shown_with_how_they_ended_and_the_last_one_comes_last(tmp_path):
    ended(tmp_path, "digits", "--lr", "3", RANK="0", WORLD_SIZE="2")
    stopped = train(tmp_path, "letters")
    stopped.send_signal(signal.SIGTERM)
    stopped.finish()
    killed(tmp_path, "words")
    titles, *lines = table(tmp_path, 80)
    assert titles.split() == ["ENDED", "PROJECT", "HOW", "WAITED", "RAN", "PID", "RANK", "COMMAND"]
    runs = [line.split() for line in lines if "of temporary files removed" not in line]
    assert [run[1:3] for run in runs] == [
        ["digits", "normal"],
        ["letters", "SIGTERM"],
        ["words", "killed"],
    ]
    assert runs[0][6] == "0"  # its rank
    assert runs[2][4].startswith("~")
    assert all(len(line) <= 80 for line in (titles, *lines))
    assert "8.0 KiB of temporary files removed" in lines[1]
    assert how_they_ended(tmp_path, "-p", "letters") == [("letters", "signal")]
    assert how_they_ended(tmp_path, "-n", "2") == [("letters", "signal"), ("words", "killed")]
    assert "2 earlier runs are not shown: -n 3 shows all" in table(tmp_path, 80, "-n", "1")
    wide = table(tmp_path, None)
    assert len(wide) == 4
    assert "train.py digits --lr 3" in wide[1]
    assert "of temporary files removed" in wide[1]


def test_a_killed_run_is_listed_once_before_and_after_it_is_cleaned_up(tmp_path):
    run = killed(tmp_path, "digits", EXEC="1")
    (before,) = history_of(tmp_path)["runs"]
    orchard_infra(tmp_path, "clean", "--yes")
    (after,) = history_of(tmp_path)["runs"]
    same = ("run_id", "how", "running_at", "alive_at", "waited_seconds", "ran_seconds", "argv")
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    assert (after["how"], after["pid"]) == ("killed", run.pid)
    assert after["running_at"] <= after["alive_at"] <= before["ended_at"] <= after["ended_at"]


def test_every_field_of_the_json_is_documented(tmp_path, wrapper):
    ended(tmp_path, "digits")
    wrapper.run("sh", "-c", "exit 3")
    found = history_of(tmp_path)
    assert_documented(found, "## The JSON of history", "history.md")
    for run in found["runs"]:
        assert_documented(run, "### Each run", "history.md")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", {"how": "normal", "exit_status": None, "signal": None}),
        ("exit 3", {"how": "exit", "exit_status": 3, "signal": None}),
        ("kill -KILL $$", {"how": "signal", "exit_status": None, "signal": "SIGKILL"}),
    ],
)
def test_the_end_of_a_wrapped_command_is_told(tmp_path, wrapper, script, expected):
    wrapper.run("sh", "-c", script)
    (run,) = history_of(tmp_path)["runs"]
    assert {name: run[name] for name in expected} == expected
    assert run["argv"] == ["sh", "-c", script]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("exit 143", {"how": "signal", "exit_status": None, "signal": "SIGTERM"}),
        ("exit 0", {"how": "signal", "exit_status": None, "signal": "SIGTERM"}),
        ("exit 3", {"how": "exit", "exit_status": 3, "signal": None}),
        ("", {"how": "normal", "exit_status": None, "signal": None}),
    ],
    ids=["its status", "saved and ended well", "failed meanwhile", "ignored"],
)
def test_a_wrapped_command_that_handles_a_stop_itself_was_stopped_by_that_signal(
    tmp_path, wrapper, answer, expected
):
    script = f"trap '{answer}' TERM; trap 'exit 0' USR1; echo ready; while :; do sleep 0.02; done"
    run = wrapper.start("sh", "-c", script)
    run.wait_for("ready")
    run.send_signal(signal.SIGTERM)
    if not answer:
        wait_until(lambda: not is_pending(run.pid, signal.SIGTERM))
        run.send_signal(signal.SIGUSR1)  # is taken after that
    run.finish()
    (found,) = history_of(tmp_path)["runs"]
    assert {name: found[name] for name in expected} == expected


def test_a_command_that_is_not_there_has_exit_status_127(tmp_path, wrapper):
    wrapper.run("./not-there")
    (run,) = history_of(tmp_path)["runs"]
    assert (run["how"], run["exit_status"]) == ("exit", 127)


def test_what_the_wrapper_stopped_behind_its_command_is_counted(tmp_path, wrapper):
    wrapper.run("sh", "-c", "sleep 600 & echo $! > pid")
    (run,) = history_of(tmp_path)["runs"]
    assert (run["how"], run["leftovers_stopped"]) == ("normal", 1)
    wait_gone([int((tmp_path / "pid").read_text())])


def test_a_run_inside_the_wrapped_command_is_a_part_of_that_run(tmp_path, wrapper):
    train_py = wrapper.script(
        """
        from orchard_infra import managed_environment
        with managed_environment("digits") as env:
            print("joined", env.joined)
        """
    )
    assert "joined True" in wrapper.run(sys.executable, train_py).output
    assert how_they_ended(tmp_path) == [("digits", "normal")]


def test_the_timeline_has_who_holds_the_project_now_and_who_waits_for_it(tmp_path):
    ended(tmp_path, "digits")
    holder = train(tmp_path, "digits")
    waiter = queue(tmp_path, "digits")
    train(tmp_path, "letters")
    wait_until(lambda: [run for run in RunRegistry().runs() if run.state is RunState.WAITING])
    page = page_of(tmp_path, "-p", "digits", "-n", "1")
    assert len([value for value in page.attributes("href") if value.startswith("#run-")]) == 3
    kinds = [kind for value in page.attributes("class") for kind in value.split()]
    assert {"running", "running-how", "wait", "wait-how", "normal"} <= set(kinds)
    for word in ("running now", "digits: is running", f"pid {holder.pid}", f"pid {waiter.pid}"):
        assert word in page.text
    assert "letters" not in page.text
    assert how_they_ended(tmp_path) == [("digits", "normal")]  # a history has what has ended


class _Page(html.parser.HTMLParser):
    """What a browser would make of the page: elements, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, all_ in self.elements if (value := all_.get(name)) is not None]


def page_of(tmp_path: Path, *words: str) -> _Page:
    orchard_infra(tmp_path, "history", "--html", "runs.html", *words)
    return _Page((tmp_path / "runs.html").read_text("utf-8"))


def test_the_timeline_has_a_bar_and_a_row_for_each_run_and_loads_nothing(
    tmp_path, runtime_directory
):
    ended(tmp_path, "digits")
    now = 1_800_000_000.0
    for number, how in enumerate(("exception", "signal", "killed", "lost lock", "stopped", "exit")):
        add(
            runtime_directory,
            run_id=f"run{number}",
            how=how,
            error="ValueError" if how == "exception" else None,
            signal="SIGTERM" if how == "signal" else None,
            exit_status=3 if how == "exit" else None,
            started_at=now + 600 * number,
            running_at=now + 600 * number + 300,
            ended_at=now + 600 * number + 900,
            alive_at=now + 600 * number + 800 if how == "killed" else None,
        )
    page = page_of(tmp_path, "-n", "6")
    rows = [value for value in page.attributes("id") if value.startswith("run-")]
    bars = [value for value in page.attributes("href") if value.startswith("#run-")]
    assert sorted(rows) == sorted(value[1:] for value in bars) == [f"run-run{n}" for n in range(6)]
    kinds = {kind for value in page.attributes("class") for kind in value.split()}
    assert {"wait", "failed", "asked", "killed", "unknown", "lost"} <= kinds
    for words in ("ended with ValueError", "ended by SIGTERM", "waited 5m00s for the lock"):
        assert words in page.text
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe"})
    assert all(value.startswith("#") for value in page.attributes("href"))
    text = (tmp_path / "runs.html").read_text()
    assert not re.search(r"https?:|@import|url\((?!#)", text)


def test_a_hostile_record_is_only_text(tmp_path, runtime_directory):
    ended(tmp_path, "digits")
    plain = page_of(tmp_path)
    add(
        runtime_directory,
        run_id="abc",
        how="exception",
        **dict.fromkeys(("project", "error", "host", "user", "cwd"), HOSTILE),
        argv=["python", HOSTILE],
    )
    page = page_of(tmp_path)
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert not any(name.startswith("on") for _, all_ in page.elements for name in all_)
    assert "<script>alert('x')</script>" in page.text
    assert not set("\x1b\u202e\r") & set((tmp_path / "runs.html").read_text("utf-8"))
    for columns in (80, 200):
        lines = table(tmp_path, columns)
        assert all(len(line) <= columns for line in lines)
        assert all(line.isprintable() for line in lines)


def test_a_timeline_of_years_and_one_of_no_time_at_all_are_drawn(tmp_path, runtime_directory):
    ended(tmp_path, "digits")
    at = {"started_at": 5e8, "running_at": 5e8, "ended_at": 5e8}
    add(runtime_directory, run_id="old", **at)
    add(runtime_directory, run_id="overlaps", **{**at, "ended_at": 6e8})
    assert len(page_of(tmp_path).attributes("href")) == 3
    (runtime_directory / "runs" / NAME).write_bytes(
        (runtime_directory / "runs" / NAME).read_bytes().split(b"\n\n")[1] + b"\n"
    )
    assert page_of(tmp_path).attributes("href") == ["#run-old"]


def test_the_picture_replaces_a_file_whole_or_not_at_all(tmp_path):
    ended(tmp_path, "digits")
    (tmp_path / "old.html").write_text("old")
    (tmp_path / "runs.html").symlink_to("old.html")
    told = orchard_infra(tmp_path, "history", "--html", "runs.html").output
    assert told == "wrote 1 run to runs.html\n"
    assert (tmp_path / "runs.html").is_symlink()
    assert "digits" in (tmp_path / "old.html").read_text()
    refused = orchard_infra(tmp_path, "history", "--html", "no/such/place.html", expect=1)
    assert "cannot write no/such/place.html" in without_colours(refused.error_output)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    orchard_infra(tmp_path, "history", "--html", "runs.html", "--json", expect=2)
