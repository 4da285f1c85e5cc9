"""`orchard-infra run`: a signal that asks to stop reaches whoever still works, once, and leaves it
as much time as the one who sent it gives.
"""

from __future__ import annotations

import os
import signal
import sys

import pytest

from commands import orchard_infra, wait_for_state
from support import Script, is_running, wait_gone, wait_until
from wrapping import Wrapper, child_of, send, wait_for_witness

# A trainer in flag mode: it finishes its step, and saves. A second signal would be the end of it.
TRAINER = """
    import os, sys, time
    from orchard_infra import InfrastructureManager, SignalStop, managed_environment

    manager = InfrastructureManager(stopper=SignalStop(mode="flag"))
    with managed_environment("digits", manager=manager) as env:
        print("training", os.getpid(), flush=True)
        while not env.stop_requested:
            time.sleep(0.01)
        time.sleep(float(sys.argv[1]))
        print("saved", flush=True)
"""

# Says which signals it gets, each one; a TERM or HUP ends it after its step.
STEPPER = """
    import os, signal, sys, time

    awaited = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    if "detached" in sys.argv:
        os.setsid()
    print("training", os.getpid(), flush=True)
    print("got", signal.Signals(signal.sigwait(awaited)).name, flush=True)
    until = sys.argv[1]  # seconds, or the name of a file that says when
    deadline = time.monotonic() + (60 if until == "told" else float(until))
    while (rest := deadline - time.monotonic()) > 0 and not os.path.exists("told"):
        info = signal.sigtimedwait(awaited, min(rest, 0.05))
        if info is not None:
            print("got", signal.Signals(info.si_signo).name, flush=True)
    print("saved", flush=True)
"""


def start_below_shell(
    wrapper: Wrapper, program: str, *words: str, options: tuple[str, ...]
) -> Script:
    """A program below a shell script, which ends at once from a signal."""
    line = " ".join((sys.executable, wrapper.script(program), *words))
    script = wrapper.start(*options, "--", "bash", "-c", f"{line}; true", start_new_session=True)
    script.wait_for("training")
    return script


def pid_of_trainer(script: Script) -> int:
    return int(script.wait_for("training").split()[1])


def heard(script: Script) -> list[str]:
    return [line.split()[1] for line in script.output.splitlines() if line.startswith("got ")]


# After a stop signal


def test_stop_gives_its_grace_to_a_trainer_below_a_shell_script(wrapper: Wrapper) -> None:
    # The wrapper's own grace is shorter than the step: it is not what counts here.
    script = start_below_shell(wrapper, TRAINER, "1.0", options=("--grace", "0.1"))

    stopped = orchard_infra(wrapper.tmp_path, "stop", "digits", "--grace", "50")

    assert script.finish() == 128 + signal.SIGTERM
    assert "saved" in script.output, script.transcript()
    assert "stopped after" in stopped.output
    assert wrapper.run("true").returncode == 0


def test_a_trainer_that_does_not_end_is_killed_when_the_grace_of_stop_is_over(
    wrapper: Wrapper,
) -> None:
    script = start_below_shell(wrapper, STEPPER, "1000", options=())

    stopped = orchard_infra(wrapper.tmp_path, "stop", "digits", "--grace", "1")

    assert script.finish() == -signal.SIGKILL
    wait_gone([pid_of_trainer(script)])
    assert "SIGTERM" in heard(script)
    assert "killed: it did not stop within 1 s" in stopped.output


@pytest.mark.parametrize("name", ["TERM", "HUP"])
@pytest.mark.parametrize("to", ["wrapper", "group", "command"])
def test_whoever_got_the_signal_the_trainer_is_asked_once(
    wrapper: Wrapper, name: str, to: str
) -> None:
    script = start_below_shell(wrapper, STEPPER, "0.6", options=("--grace", "0.1"))
    wait_for_witness(script.pid)

    signum = signal.Signals[f"SIG{name}"]
    if to == "wrapper":
        send(script, signum)
    elif to == "group":
        os.killpg(script.pid, signum)
    else:
        child_of(script).send_signal(signum)

    assert script.finish() == 128 + signum
    assert heard(script) == [f"SIG{name}" if to == "group" else "SIGTERM"]
    assert "saved" in script.output


def test_the_same_request_from_two_senders_is_one(wrapper: Wrapper) -> None:
    script = start_below_shell(wrapper, STEPPER, "1.0", options=("--grace", "0.1"))

    send(script, signal.SIGTERM)
    wait_until(lambda: heard(script), what=script.transcript)
    send(script, signal.SIGTERM, signal.SIGHUP)

    assert script.finish() == 128 + signal.SIGTERM
    assert heard(script) == ["SIGTERM"]
    assert "saved" in script.output


def test_sigquit_ends_the_wait_at_once(wrapper: Wrapper) -> None:
    script = start_below_shell(wrapper, STEPPER, "1000", options=())
    send(script, signal.SIGTERM)
    wait_until(lambda: heard(script), what=script.transcript)

    send(script, signal.SIGQUIT)

    assert script.finish() == 128 + signal.SIGTERM
    assert not is_running(pid_of_trainer(script))
    assert "SIGQUIT: not waiting any longer" in script.error_output


def test_a_limit_for_what_is_left_after_a_stop_signal(wrapper: Wrapper) -> None:
    options = ("--stop-grace", "0.5", "--report", "report.json")
    script = start_below_shell(wrapper, STEPPER, "1000", options=options)

    send(script, signal.SIGTERM)

    assert script.finish() == 128 + signal.SIGTERM
    assert not is_running(pid_of_trainer(script))
    [leftover] = wrapper.report()["leftovers"]
    assert leftover["fate"] == "killed"


def test_a_trainer_with_a_session_of_its_own_is_asked_after_the_grace(wrapper: Wrapper) -> None:
    script = start_below_shell(wrapper, STEPPER, "0.3", "detached", options=("--grace", "0.3"))

    os.killpg(script.pid, signal.SIGTERM)

    assert script.finish() == 128 + signal.SIGTERM
    assert heard(script) == ["SIGTERM"]
    assert "saved" in script.output


def test_a_helper_that_a_trainer_starts_to_save_is_its_own_affair(wrapper: Wrapper) -> None:
    program = """
        import signal, subprocess, sys
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        print("training", flush=True)
        signal.sigwait({signal.SIGTERM})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        copy = [sys.executable, "-c", "import time; time.sleep(0.6); print('copied', flush=True)"]
        sys.exit(subprocess.run(copy).returncode)
    """
    script = start_below_shell(wrapper, program, options=("--grace", "0.1"))

    send(script, signal.SIGTERM)

    assert script.finish() == 128 + signal.SIGTERM
    assert "copied" in script.output, script.transcript()


def test_what_ignores_ctrl_c_is_asked_in_another_way(wrapper: Wrapper) -> None:
    # What a script starts in the background ignores SIGINT, as sh(1) says.
    script = wrapper.start(
        *("--report", "report.json", "--", "sh", "-c", "sleep 1000 & echo ready; wait"),
        start_new_session=True,
    )
    script.wait_for("ready")
    wait_for_witness(script.pid)

    os.killpg(script.pid, signal.SIGINT)

    assert script.finish() == 128 + signal.SIGINT
    [leftover] = wrapper.report()["leftovers"]
    assert (leftover["command"], leftover["fate"]) == ("sleep 1000", "stopped")


def test_the_lock_is_held_until_the_trainer_has_saved(wrapper: Wrapper) -> None:
    script = start_below_shell(wrapper, STEPPER, "told", options=())
    send(script, signal.SIGTERM)
    wait_until(lambda: heard(script), what=script.transcript)

    assert wrapper.run("true").returncode == os.EX_TEMPFAIL
    wait_for_state(wrapper.tmp_path, "digits", "running")
    (wrapper.tmp_path / "told").touch()
    assert script.finish() == 128 + signal.SIGTERM
    assert wrapper.run("true").returncode == 0


# At the normal end

UPLOADER = """
    import os, signal, sys, time
    command = os.getpid()
    if os.fork():
        os._exit(0)
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
    print("uploader", os.getpid(), flush=True)
    if sys.argv[1] == "told":
        while not os.path.exists("told"):
            time.sleep(0.01)
    else:
        while os.path.exists(f"/proc/{command}"):  # whoever waits for it has not seen its end
            time.sleep(0.01)
        deadline = time.monotonic() + float(sys.argv[1])
        while time.monotonic() < deadline:
            time.sleep(0.01)
    print("uploaded", flush=True)
"""


def test_who_has_a_session_of_its_own_may_leave_by_itself(wrapper: Wrapper) -> None:
    script = wrapper.run(
        *("--grace", "50", "--report", "report.json"),
        *("--", sys.executable, wrapper.script(UPLOADER), "2"),
    )

    assert script.returncode == 0
    assert "uploaded" in script.output
    assert "asked" not in script.output
    [leftover] = wrapper.report()["leftovers"]
    assert leftover["fate"] == "ended"


def test_who_has_a_session_of_its_own_is_stopped_after_the_grace(wrapper: Wrapper) -> None:
    script = wrapper.run(
        *("--grace", "0.3", "--report", "report.json"),
        *("--", sys.executable, wrapper.script(UPLOADER), "1000"),
    )

    assert script.returncode == 0
    assert "asked" in script.output
    [leftover] = wrapper.report()["leftovers"]
    assert leftover["fate"] == "killed"
    assert not is_running(leftover["pid"])


def test_a_pool_that_is_left_does_not_wait_for_an_uploader(wrapper: Wrapper) -> None:
    line = f"{sys.executable} {wrapper.script(UPLOADER)} told & sleep 1000 & wait $!"
    script = wrapper.start("--grace", "50", "--", "bash", "-c", line)
    script.wait_for("uploader")
    [sleeper] = [c for c in child_of(script).children() if c.name() == "sleep"]
    child_of(script).kill()

    wait_gone([sleeper.pid])

    assert "uploaded" not in script.output
    (wrapper.tmp_path / "told").touch()
    assert script.finish() == 137
    assert "uploaded" in script.output
