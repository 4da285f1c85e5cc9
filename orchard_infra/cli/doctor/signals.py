"""Whether a signal reaches a run that is started here."""

from __future__ import annotations

import json
import sys

from orchard_infra.cli.doctor.base import Level, Setup, Verdict, run_python


def check_signals(setup: Setup) -> Verdict:
    if sys.platform == "win32":
        return Level.OK, "Ctrl-C and Ctrl-Break only: Windows has no others"
    found = json.loads(run_python(_SIGNALS))
    blocked = [name for name in ("SIGTERM", "SIGINT") if name in found["blocked"]]
    if blocked or found["SIGTERM"] == "ignored":
        how = f"{' and '.join(blocked)} blocked" if blocked else "SIGTERM ignored"
        return (
            Level.PROBLEM,
            f"programs start with {how} here: a run cannot be asked to stop",
            "This shell inherited that from the program that started it; start a fresh shell",
        )
    handled = [name for name in ("SIGTERM", "SIGHUP") if found[name] not in ("default", "ignored")]
    if handled:
        return (
            Level.WARNING,
            f"{handled[0]} already has a handler when Python starts ({found[handled[0]]}); "
            "a run leaves it alone and does not see that signal",
            "Look for a sitecustomize.py or a .pth file that installs it",
        )
    if not found["handled"]:
        return Level.PROBLEM, "a handler was installed and did not see its signal", None
    text = "a handler can be installed and sees SIGTERM"
    if found["SIGHUP"] == "ignored":
        text += "; SIGHUP is ignored (nohup), and stays so"
    if found["SIGINT"] == "ignored":
        text += "; SIGINT is ignored (started in the background), so Ctrl-C does nothing"
    return Level.OK, text


_SIGNALS = """
import json, os, signal
def disposition(signum):
    handler = signal.getsignal(signum)
    if handler in (signal.SIG_DFL, signal.default_int_handler):
        return "default"
    return "ignored" if handler == signal.SIG_IGN else repr(handler)
names = ("SIGINT", "SIGTERM", "SIGHUP")
found = {name: disposition(getattr(signal, name)) for name in names}
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
found["blocked"] = [name for name in names if getattr(signal, name) in blocked]
seen = []
signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
os.kill(os.getpid(), signal.SIGTERM)
found["handled"] = bool(seen)
print(json.dumps(found))
"""
