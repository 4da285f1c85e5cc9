"""`--lock-url`: the lock on a server, for commands on several hosts."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest

from commands import assert_documented, orchard_infra, status_of, train
from orchard_infra.config import default_lock_path
from orchard_infra.locks.base import Held, LockKey
from orchard_infra.locks.urls import URL_VARIABLE, lock_from_url
from orchard_infra.runs.record import RunRecord, describe_this_run
from servers import PostgresServer, RedisServer
from support import Script, is_running, run_command, run_python, wait_gone, wait_until
from wrapping import COMMAND, Wrapper, child_of

PASSWORD = "pa%2Fss:w0rd"


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    return postgres.create_database()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Without the guard: the server has just been started, and nobody had a lock before."""
    redis_server.execute("FLUSHALL")
    return f"{redis_server.url}#ttl=6&renew=1&guard=no"


@pytest.fixture(params=["postgres", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    """A server that has no locks yet."""
    found = request.getfixturevalue(f"{request.param}_url")
    assert isinstance(found, str)
    return found


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable[..., Script]:
    """Starts a wrapper that shares nothing with the others but the server."""

    def start(url: str, *words: str, project: str = "digits") -> Script:
        directory = tmp_path / "another host"
        directory.mkdir(mode=0o700, exist_ok=True)
        return run_command(
            tmp_path,
            [COMMAND, "run", "-p", project, "--lock-url", url, *words],
            env={"ORCHARD_INFRA_DIR": str(directory)},
        )

    return start


def key(project: str = "digits") -> LockKey:
    return LockKey(project, default_lock_path(project))


def holder_now(url: str, project: str = "digits") -> RunRecord | None:
    return lock_from_url(url).holder_now(key(project))


WAITS = ("sh", "-c", "echo ready; read line")


# run


def test_two_hosts_exclude_each_other_and_are_told_who_has_it(
    url: str, wrapper: Wrapper, elsewhere: Callable[..., Script]
) -> None:
    holder = wrapper.start("--lock-url", url, "--report", "report.json", "--", *WAITS)
    holder.wait_for("ready")
    refused = elsewhere(url, "--", "true")
    assert refused.finish() == 75, refused.transcript()
    assert f"pid {holder.pid}" in refused.error_output
    assert "read line" in refused.error_output
    waiting = elsewhere(url, "--wait", "--", "echo", "has it")
    wait_until(lambda: "waiting for project digits" in waiting.error_output)
    holder.tell()
    assert holder.finish() == 0
    assert waiting.finish() == 0, waiting.transcript()
    assert "has it" in waiting.output
    report = wrapper.report()
    assert report["lock_server"].startswith("digits ")
    assert report["fence"] > 0
    assert holder_now(url) is None


def test_a_command_on_this_host_that_knows_of_no_server_is_refused_too(
    url: str, wrapper: Wrapper
) -> None:
    holder = wrapper.start("--lock-url", url, "--", *WAITS)
    holder.wait_for("ready")
    assert wrapper.run("true").returncode == 75
    assert wrapper.run("true", project="another").returncode == 0
    holder.tell()
    assert holder.finish() == 0
    assert wrapper.run("true").returncode == 0


def test_a_server_that_has_just_started_is_named_as_the_reason(
    redis_url: str, wrapper: Wrapper
) -> None:
    url = redis_url.replace("ttl=6", "ttl=86400").replace("guard=no", "guard=yes")
    script = wrapper.run("--lock-url", url, "--", "touch", "started")
    assert script.returncode == 75, script.transcript()
    assert "cannot be taken now" in script.error_output
    assert ": its server has just started" in script.error_output
    assert "Wait for it with --wait" in script.error_output
    assert "nobody knows" not in script.error_output
    assert not (wrapper.tmp_path / "started").exists()


def test_the_variable_is_the_default_and_an_empty_argument_switches_it_off(
    url: str, wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "url").write_text(url)
    monkeypatch.setenv(URL_VARIABLE, f"file:{tmp_path / 'url'}")
    for words, expected in (((), True), (("--lock-url", ""), False)):
        script = wrapper.start(*words, "--", *WAITS)
        script.wait_for("ready")
        assert (holder_now(url) is not None) is expected
        script.tell()
        assert script.finish() == 0


def test_a_managed_environment_in_the_command_joins(url: str, wrapper: Wrapper) -> None:
    program = wrapper.script(
        """
        from orchard_infra import managed_environment
        with managed_environment("digits") as env:
            print("joined", env.joined, env.fenced("model.pt").name)
        """
    )
    script = wrapper.run(
        "--lock-url", url, "--report", "report.json", "--", sys.executable, program
    )
    assert script.returncode == 0, script.transcript()
    assert f"joined True model.{wrapper.report()['fence']:016d}.pt" in script.output


SAVES = """
    import os, signal, subprocess, sys, time
    worker = subprocess.Popen(
        [sys.executable, "-c", "import time; print('worker ready', flush=True); time.sleep(600)"],
        start_new_session=True,
    )
    def save(signum, frame):
        while not os.path.exists("go on"):
            time.sleep(0.01)
        print("saved", flush=True)
        sys.exit()
    signal.signal(signal.SIGTERM, save)
    print("trainer", os.getpid(), worker.pid, flush=True)
    while True:
        time.sleep(0.1)
"""


def test_when_the_wrapper_is_killed_the_command_is_asked_to_stop_and_holds_the_lock_till_then(
    url: str, wrapper: Wrapper
) -> None:
    url = url.replace("#ttl=6&", "#ttl=60&")
    program = wrapper.script(SAVES)
    script = wrapper.start(*("--lock-url", url, "--grace", "60", "--", sys.executable, program))
    _, trainer, worker = script.wait_for("trainer").split()
    script.wait_for("worker ready")
    os.kill(script.pid, signal.SIGKILL)
    script.wait()
    # SIGTERM has come, and it saves: nobody may begin yet.
    wait_gone([int(worker)])
    assert is_running(int(trainer))
    assert holder_now(url) is not None
    (wrapper.tmp_path / "go on").touch()
    wait_until(lambda: "saved" in script.output, what=script.transcript)
    wait_gone([int(trainer)])
    wait_until(lambda: "is gone, and its lock" in script.error_output, what=script.transcript)
    if url.startswith("postgresql"):  # one on Redis frees itself when its time is over
        wait_until(lambda: holder_now(url) is None)
        assert wrapper.run("--lock-url", url, "--", "true").returncode == 0


def test_a_command_that_ignores_that_is_killed_after_the_grace(url: str, wrapper: Wrapper) -> None:
    ignores = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    script = wrapper.start("--lock-url", url, "--grace", "0.2", "--", "sh", "-c", ignores)
    script.wait_for("ready")
    command = child_of(script)
    os.kill(script.pid, signal.SIGKILL)
    wait_gone([command.pid])


def test_a_signal_to_the_whole_group_that_kills_it_leaves_nothing_below_it(
    postgres_url: str, wrapper: Wrapper
) -> None:
    program = wrapper.script(SAVES)
    script = wrapper.start(
        *("--lock-url", postgres_url, "--grace", "0.2", "--", sys.executable, program),
        start_new_session=True,
    )
    _, trainer, worker = script.wait_for("trainer").split()
    script.wait_for("worker ready")
    os.killpg(script.pid, signal.SIGKILL)
    wait_gone([int(trainer), int(worker)])


def test_without_a_server_a_command_outlives_its_wrapper_and_keeps_the_lock(
    wrapper: Wrapper,
) -> None:
    script = wrapper.start(*WAITS)
    script.wait_for("ready")
    command = child_of(script)
    os.kill(script.pid, signal.SIGKILL)
    script.wait()
    assert wrapper.run("true").returncode == 75
    assert is_running(command.pid)
    script.tell()
    wait_gone([command.pid])


# `orchard-infra run`, with a fault: what looks for the witness is what the wrapper does by itself.
FAILS_WHILE_THE_COMMAND_RUNS = """
    import errno, os, sys, time
    from orchard_infra.cli import main
    from orchard_infra.cli.run.supervisor import Supervisor
    def fail(self):
        while not os.path.exists("running"):
            time.sleep(0.005)
        raise OSError(errno.EMFILE, "too many open files")
    Supervisor._start_witness = fail
    sys.argv = ["orchard-infra", "run", "-p", "digits", *sys.argv[1:]]
    main()
"""
RUNS = ("sh", "-c", "echo ready $$; touch running; read line")


def test_a_wrapper_that_fails_leaves_the_command_to_its_guardian(url: str, tmp_path: Path) -> None:
    words = ("--lock-url", url, "--report", "report.json", "--", *RUNS)
    script = run_python(tmp_path, FAILS_WHILE_THE_COMMAND_RUNS, *words)
    command = int(script.wait_for("ready").split()[1])
    assert script.finish() == 125, script.transcript()
    wait_gone([command])
    wait_until(lambda: "is gone, and its lock" in script.error_output, what=script.transcript)
    assert "is stopped, for its lock ends with it: " in script.error_output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["outcome"] == "failed"
    assert report["exit_status"] == 125


def test_without_a_server_a_wrapper_that_fails_leaves_the_lock_to_the_command(
    wrapper: Wrapper, tmp_path: Path
) -> None:
    script = run_python(tmp_path, FAILS_WHILE_THE_COMMAND_RUNS, "--", *RUNS)
    command = int(script.wait_for("ready").split()[1])
    assert script.finish() == 125, script.transcript()
    assert "goes on without it: " in script.error_output
    assert wrapper.run("true").returncode == 75
    assert is_running(command)
    script.tell()
    wait_gone([command])
    assert wrapper.run("true").returncode == 0


def test_nothing_of_the_guard_is_left_at_the_end_and_background_work_may_go_on(
    postgres_url: str, wrapper: Wrapper
) -> None:
    options = ("--lock-url", postgres_url, "--keep-background", "--")
    script = wrapper.run(*options, "sh", "-c", "sleep 600 & echo left $!")
    assert script.returncode == 0, script.transcript()
    left = int(script.output.split()[1])
    assert is_running(left)
    parents = {child.ppid() for child in psutil.process_iter()}
    assert script.pid not in parents
    assert holder_now(postgres_url) is None


def test_a_lock_that_is_lost_asks_the_command_to_stop_once(
    redis_url: str, redis_server: RedisServer, wrapper: Wrapper
) -> None:
    program = wrapper.script(SAVES)
    (wrapper.tmp_path / "go on").touch()
    script = wrapper.start(
        *("--lock-url", redis_url, "--report", "report.json", "--", sys.executable, program)
    )
    script.wait_for("worker ready")
    redis_server.execute("SET", "orchard-infra:{digits}:lock", "somebody else")
    assert script.finish() == 0, script.transcript()
    assert script.output.count("saved") == 1
    assert "is lost: it was granted to another run" in script.error_output
    assert wrapper.report()["lock_lost"] is True
    assert redis_server.execute("GET", "orchard-infra:{digits}:lock") == "somebody else"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("mysql://db", "should begin with"),
        ("file:nowhere", "cannot read the lock's URL from nowhere"),
        ("postgresql://127.0.0.1:1/locks", "127.0.0.1"),
        ("redis://127.0.0.1:1/0", "127.0.0.1"),
        ("redis://127.0.0.1:1/0#ttl=0", "after the #"),
    ],
)
def test_a_server_that_cannot_be_used_starts_nothing(
    given: str, words: str, wrapper: Wrapper
) -> None:
    script = wrapper.run("--lock-url", given, "--wait", "--", "touch", "started")
    assert script.returncode == 125, script.transcript()
    assert words in script.error_output
    assert "Traceback" not in script.error_output
    assert not (wrapper.tmp_path / "started").exists()
    assert wrapper.run("true").returncode == 0, "the file was not given back"


# Whose process it is.


def test_a_holder_on_another_host_is_neither_judged_nor_killed(
    url: str, wrapper: Wrapper, tmp_path: Path
) -> None:
    """Its record names a pid that lives here, as another one's, and one that is dead here."""
    innocent = run_command(tmp_path, ["sleep", "600"])
    dead = run_command(tmp_path, ["true"])
    dead.finish()
    here = describe_this_run("digits")
    for pid in (innocent.pid, dead.pid):
        for change in ({"boot_id": "0" * 8 + here.boot_id[8:]}, {"pid_namespace": 1}):
            record = attrs.evolve(here, pid=pid, create_time=1.0, host="far-away", **change)
            lease = lock_from_url(url).try_acquire(key(), record)
            assert not isinstance(lease, Held)
            script = wrapper.run("--lock-url", url, "--allow-process-kill", "--", "true")
            assert script.returncode == 75, script.transcript()
            assert f"pid {pid} on far-away" in script.error_output
            assert f"orchard-infra stop {pid} on far-away" in script.error_output
            lease.release()
    assert is_running(innocent.pid)


# Passwords.


@pytest.mark.parametrize("command", ["run", "status", "doctor"])
@pytest.mark.parametrize(
    "given",
    [
        f"postgresql://ada:{PASSWORD}@127.0.0.1:1/locks",
        f"redis://:{PASSWORD}@127.0.0.1:1/0",
        f"host=127.0.0.1 port=1 password='{PASSWORD}'",
        f"postgresql://127.0.0.1:1/locks?password={PASSWORD}",
    ],
)
def test_a_password_in_an_argument_is_refused_and_the_ways_are_named(
    command: str, given: str, tmp_path: Path
) -> None:
    rest = ["-p", "digits", "--", "true"] if command == "run" else []
    script = run_command(tmp_path, [COMMAND, command, "--lock-url", given, *rest])
    assert script.finish() == 2, script.transcript()
    for way in (URL_VARIABLE, "file:PATH", "PGPASSFILE"):
        assert way in script.error_output.replace("\n", " ")
    assert PASSWORD not in script.transcript()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["postgres", "redis"])
def test_a_password_is_nowhere_to_be_seen(
    kind: str, wrapper: Wrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "Sesam-öffne/dich"
    kinds: dict[str, Any] = {"postgres": PostgresServer, "redis": RedisServer}
    server = kinds[kind](password=secret)
    if server.missing():
        pytest.skip(server.missing())
    hidden = [secret, "Sesam"]
    with server:
        monkeypatch.setenv(URL_VARIABLE, server.url + ("#guard=no" if kind == "redis" else ""))
        holder = wrapper.start("--report", "report.json", "--", *WAITS)
        holder.wait_for("ready")
        shown = [wrapper.run("true")]
        assert shown[-1].returncode == 75
        for words in (["status"], ["status", "--json"], ["doctor"], ["doctor", "--json"]):
            names = [] if words[0] == "status" else ["lock server"]
            shown.append(run_command(tmp_path, [COMMAND, *words, *names]))
            shown[-1].finish()
        for process in psutil.process_iter(["cmdline"]):
            assert not any(text in " ".join(process.info["cmdline"] or ()) for text in hidden)
        records = lock_from_url().runs()
        assert len(records) == 1
        server.stop()
        shown.append(wrapper.run("--report", "failed.json", "--", "true", project="another"))
        assert shown[-1].returncode == 125
        holder.tell()
        holder.finish()
    texts = [script.transcript() for script in (holder, *shown)]
    texts += [str(records)]
    for path in (*tmp_path.glob("*.json"), *Path(os.environ["ORCHARD_INFRA_DIR"]).rglob("*")):
        if path.is_file():
            texts.append(path.read_text(errors="replace"))
    for text in texts:
        assert not any(word in text for word in hidden), text


# status


def test_status_shows_the_runs_of_all_hosts_each_once(
    url: str, wrapper: Wrapper, elsewhere: Callable[..., Script], tmp_path: Path
) -> None:
    here = wrapper.start("--lock-url", url, "--", *WAITS, project="here")
    there = elsewhere(url, "--", *WAITS, project="there")
    train(tmp_path, "a file alone")
    for script in (here, there):
        script.wait_for("ready")
    rows = {run["project"]: run for run in status_of(tmp_path, "--lock-url", url)}
    assert set(rows) == {"here", "there", "a file alone"}
    assert len(status_of(tmp_path, "--lock-url", url)) == 3
    assert rows["there"]["state"] == "running"
    assert rows["there"]["pid"] == there.pid
    assert rows["there"]["memory_bytes"] is None
    assert rows["here"]["memory_bytes"] > 0
    assert [run["project"] for run in status_of(tmp_path, "--lock-url", url, "-p", "there")] == [
        "there"
    ]
    assert {run["project"] for run in status_of(tmp_path)} == {"here", "a file alone"}
    table = orchard_infra(tmp_path, "status", "--lock-url", url, env={"COLUMNS": "200"}).output
    assert all(f"{project} " in table for project in rows)


def test_status_says_so_when_the_server_cannot_be_asked(tmp_path: Path) -> None:
    train(tmp_path, "here")
    url = "redis://127.0.0.1:1/0"
    script = orchard_infra(tmp_path, "status", "--lock-url", url, expect=1)
    assert "here" in script.output
    assert "Runs on other hosts are unknown: " in script.output
    found = json.loads(
        orchard_infra(tmp_path, "status", "--json", "--lock-url", url, expect=1).output
    )
    assert_documented(found, "### The JSON of status")
    assert_documented(found["lock_server"], "#### lock_server")
    assert found["lock_server"]["address"] == url
    assert len(found["runs"]) == 1


# doctor

OF_A_SERVER = ("lock server", "server latency", "server settings", "server clock", "server lock")


def doctor(tmp_path: Path, url: str, *names: str) -> dict[str, Any]:
    words = ("doctor", "--json", "--lock-url", url, *(names or OF_A_SERVER))
    found = json.loads(orchard_infra(tmp_path, *words, expect=None).output)
    return {check["name"]: check for check in found["checks"]}


def test_doctor_finds_nothing_wrong_with_a_server_that_can_carry_locks(
    url: str, tmp_path: Path
) -> None:
    checks = doctor(tmp_path, url)
    assert list(checks) == list(OF_A_SERVER)
    assert {check["status"] for check in checks.values()} == {"ok"}, checks
    assert url.split("//")[1].split("@")[-1].split("#")[0] in checks["lock server"]["text"]
    assert "ms for a round trip" in checks["server latency"]["text"]
    assert lock_from_url(url).runs() == []


def test_doctor_tells_what_the_server_ends_and_keeps(
    postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    found = doctor(tmp_path, postgres_url, "server settings")["server settings"]["text"]
    assert "no pooler" in found
    assert "tcp_user_timeout" in found
    found = doctor(tmp_path, redis_url, "server settings")["server settings"]["text"]
    assert "maxmemory-policy noeviction" in found
    assert "append-only" in found


def test_doctor_warns_of_a_server_that_forgets(
    redis_url: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    redis_server.execute("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        check = doctor(tmp_path, redis_url, "server settings")["server settings"]
    finally:
        redis_server.execute("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert check["status"] == "warning"
    assert "evicted" in check["text"]


def test_doctor_names_the_missing_privilege(postgres: PostgresServer, tmp_path: Path) -> None:
    database = postgres.create_database("doctor_without_rights").rpartition("/")[2]
    url = postgres.create_role("doctor_reader", database=database)
    checks = doctor(tmp_path, url)
    assert checks["lock server"]["status"] == "ok"
    assert checks["server lock"]["status"] == "problem"
    assert "doctor_reader" in checks["server lock"]["text"]
    assert "CREATE TABLE" in checks["server lock"]["text"]


def test_doctor_needs_no_server_and_says_when_there_is_none(tmp_path: Path) -> None:
    words = ("doctor", "--json", "lock server", "lock directory")
    found = json.loads(orchard_infra(tmp_path, *words).output)
    assert [check["name"] for check in found["checks"]] == ["lock directory"]
    checks = doctor(tmp_path, "postgresql://127.0.0.1:1/locks")
    assert {check["status"] for check in checks.values()} == {"problem"}
    assert "127.0.0.1" in checks["server lock"]["text"]
