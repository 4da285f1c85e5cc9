"""Programs that remove old files, and whether they reach the locks."""

from __future__ import annotations

import fnmatch
import os
import subprocess
from pathlib import Path

import attrs

from orchard_infra.cli.doctor.base import Level, Setup, Verdict
from orchard_infra.system import files


def check_tmp_cleaner(setup: Setup) -> Verdict:
    directory = setup.lock_directory
    cleaner = cleaner_that_reaches(Path(os.path.realpath(directory)))
    if cleaner is None:
        return Level.OK, f"none reaches {directory}"
    if cleaner.systemd and not _tmpfiles_timer_runs():
        return Level.OK, f"{cleaner.describe()}, but no timer of systemd runs it here"
    advice = f"Set {files.RUNTIME_DIR_VARIABLE} to a directory elsewhere"
    if cleaner.systemd:
        advice = f"Put 'x {directory}' into /etc/tmpfiles.d/orchard-infra.conf. Or: {advice}"
    return (
        Level.WARNING,
        f"{cleaner.describe()}. A live run touches its files now and then; a run that is stopped "
        "(Ctrl-Z) cannot",
        advice,
    )


@attrs.frozen
class TmpCleaner:
    """A program that removes old files, and the configuration that makes it do so."""

    name: str
    below: str
    age: str
    configured_in: str
    systemd: bool = False

    def describe(self) -> str:
        return (
            f"{self.name} removes what is {self.age} old below {self.below} ({self.configured_in})"
        )


def cleaner_that_reaches(directory: Path, root: Path = Path("/")) -> TmpCleaner | None:
    """The program that would remove old files from ``directory``; None for none.

    ``root`` is the directory that has /etc and /usr.
    """
    return _tmpfiles_that_reach(directory, root) or _cron_job_that_reaches(directory, root)


def _tmpfiles_that_reach(directory: Path, root: Path) -> TmpCleaner | None:
    """By tmpfiles.d(5): the line for the nearest directory above decides, unless one excludes."""
    lines: list[tuple[Path, list[str]]] = []
    seen = set()
    for place in ("etc", "run", "usr/local/lib", "usr/lib"):
        for path in sorted((root / place / "tmpfiles.d").glob("*.conf")):
            if path.name not in seen:  # the first file of a name hides the others
                seen.add(path.name)
                text = path.read_text("utf-8", errors="replace")
                lines += [(path, line.split()) for line in text.splitlines()]
    above = [str(directory), *map(str, directory.parents)]
    nearest: tuple[int, TmpCleaner | None] = (-1, None)
    for path, words in lines:
        if len(words) < 2 or words[0].startswith("#"):
            continue
        kind, target = words[0][0], words[1].rstrip("/") or "/"
        matched = next((one for one in above if fnmatch.fnmatchcase(one, target)), None)
        if matched is None:
            continue
        if kind == "x":
            return None
        if kind in "dDevqQC" and len(matched) > nearest[0]:
            age = words[5] if len(words) > 5 else "-"
            shown = "/" + str(path.relative_to(root))
            cleaner = TmpCleaner("systemd-tmpfiles", matched, age, shown, systemd=True)
            nearest = (len(matched), None if age == "-" else cleaner)
    return nearest[1]


def _cron_job_that_reaches(directory: Path, root: Path) -> TmpCleaner | None:
    """tmpreaper of Debian and tmpwatch of Red Hat, which clean /tmp unless configured otherwise."""
    for name, settings in (("tmpreaper", "etc/tmpreaper.conf"), ("tmpwatch", "")):
        job = root / "etc/cron.daily" / name
        if not job.exists():
            continue
        below = next((d for d in ("/tmp", "/var/tmp") if _is_below(directory, d)), None)
        configured = _shell_settings(root / settings) if settings else {}
        dirs = configured.get("TMPREAPER_DIRS", "")
        below = next(
            (d.rstrip("/.") for d in dirs.split() if _is_below(directory, d.rstrip("/.") or "/")),
            None if dirs else below,
        )
        if below is not None and configured.get("SHOWWARNING", "false") != "true":
            age = configured.get("TMPREAPER_TIME", "7d" if name == "tmpreaper" else "10d")
            return TmpCleaner(name, below, age, f"/etc/cron.daily/{name}")
    return None


def _shell_settings(path: Path) -> dict[str, str]:
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.strip().partition("=") for line in text.splitlines() if "=" in line)
    return {name: value.strip("'\" ") for name, _, value in pairs if name.isidentifier()}


def _is_below(directory: Path, above: str) -> bool:
    return directory == Path(above) or Path(above) in directory.parents


def _tmpfiles_timer_runs() -> bool:
    if not os.path.isdir("/run/systemd/system"):  # sd_booted(3)
        return False
    try:
        timer = ["systemctl", "is-active", "--quiet", "systemd-tmpfiles-clean.timer"]
        return subprocess.run(timer, timeout=10, check=False, capture_output=True).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return True
