"""Whether the batch script of this Slurm job lets a run stop in time, and go on later.

What is looked at is the script, as Slurm has kept it. What was said to sbatch on its command line
is not in there. docs/slurm.md has what each form was seen to do.
"""

from __future__ import annotations

import os.path
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping

import attrs

from orchard_infra.cli.doctor.base import Level, Setup, Verdict

_TIMEOUT = 10.0  # seconds for an answer of Slurm's controller

# Programs that train, or that start what trains.
_PROGRAM = re.compile(
    r"(python|pypy)\d*(\.\d+)*t?|torchrun|accelerate|deepspeed|lightning|orchard-infra"
)
# What starts the program that follows in the same command, and stays its parent or becomes it.
# fmt: off
_BEFORE = frozenset((
    "apptainer", "command", "conda", "env", "ionice", "micromamba", "mpiexec", "mpirun", "nice",
    "nohup", "numactl", "pixi", "poetry", "setsid", "singularity", "srun", "stdbuf", "taskset",
    "time", "timeout", "uv",
))
# fmt: on
_KEYWORDS = frozenset(("if", "then", "else", "elif", "do", "while", "until", "!", "{", "("))
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_OPERATOR = re.compile(r"[;&|()]+")
_DOES_NOTHING = (":", "", "-", "true")  # as the action of a trap


def check_slurm_job(setup: Setup) -> Verdict:
    """What Slurm's signals do to the program that the script of this job starts."""
    job = setup.environ.get("SLURM_JOB_ID")
    if not job:
        return Level.OK, "not in a Slurm job"
    if shutil.which("scontrol") is None:
        return Level.OK, f"in job {job}, and no scontrol here to look at its script with"
    facts = dict(re.findall(r"(\S+?)=(\S*)", _ask("show", "job", "--oneliner", job)))
    if facts.get("BatchFlag") == "0":
        return Level.OK, f"job {job} has no batch script"
    script = BatchScript.parse(
        _ask("write", "batch_script", job, "-"),
        setup.environ,
        requeues=facts.get("Requeue") == "1",
    )
    if not script.appends and re.search(r"JobFileAppend\s*=\s*1", _ask("show", "config")):
        script = attrs.evolve(script, appends=True)
    if script.command is None:
        return Level.OK, f"no training program was recognised in the script of job {job}"
    faults = list(script.faults())
    if faults:
        return (
            Level.WARNING,
            f"the script of job {job}: " + "; ".join(found for found, _ in faults),
            ". ".join(advice for _, advice in faults),
        )
    return Level.OK, f"the script of job {job} passes signals on to {script.command}"


@attrs.frozen
class Command:
    """A command of a script. ``how`` is "exec", "srun", "background" (with an ampersand) or
    "plain": the shell waits for it.
    """

    line: int
    text: str
    how: str

    def __str__(self) -> str:
        return f"line {self.line} ({self.text})"


@attrs.frozen
class BatchScript:
    """What a batch script says, as far as that can be read without running it.

    ``command`` is the last one that starts a program which trains; what comes before it is taken
    for preparation. ``signal`` is the argument of ``--signal``, [{R|B}:]SIGNAL[@SECONDS]. ``traps``
    are the signals that the shell handles, with what it does.
    """

    command: Command | None = None
    signal: str | None = None
    traps: Mapping[str, str] = attrs.field(factory=dict)
    requeues: bool = False
    appends: bool = False
    requeues_itself: bool = False
    looks_at_its_state: bool = False

    @classmethod
    def parse(
        cls,
        text: str,
        environ: Mapping[str, str],
        *,
        requeues: bool = False,
    ) -> BatchScript:
        """Read it. Variables of sbatch count before what the script says; see sbatch(1)."""
        options = dict(_options(text))
        command: Command | None = None
        traps: dict[str, str] = {}
        code: list[str] = []
        for number, line in _logical_lines(text):
            code.append(line)
            for words, operator in _simple_commands(line):
                if words[:1] == ["trap"] and len(words) > 2:
                    traps.update((_signal_name(name), words[1]) for name in words[2:])
                how = _how(words, operator)
                if how is not None:
                    shown = " ".join(words)
                    shown = shown if len(shown) <= 40 else shown[:37] + "..."
                    command = Command(number, shown, how)
        mode = environ.get("SBATCH_OPEN_MODE") or options.get("open-mode", "")
        body = "\n".join(code)
        return cls(
            command=command,
            signal=environ.get("SBATCH_SIGNAL") or options.get("signal"),
            traps=traps,
            requeues=requeues,
            appends=mode.startswith("a"),
            requeues_itself="scontrol requeue" in body,
            looks_at_its_state="JobState" in body or "squeue" in body,
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What is wrong, and what to do about each."""
        if self.command is not None:
            yield from self._faults_of(self.command)
        if self.requeues and not self.appends:
            yield (
                "its output is emptied when the job is requeued",
                "Add #SBATCH --open-mode=append",
            )
        if self.requeues_itself and not self.looks_at_its_state:
            yield (
                "it requeues itself whatever happened, so a job that is cancelled comes back",
                "Requeue only while scontrol show job says JobState=RUNNING",
            )

    def _faults_of(self, command: Command) -> Iterator[tuple[str, str]]:
        passes_on = self.traps.get("TERM", "") not in _DOES_NOTHING
        if command.how == "plain" or (command.how == "background" and not passes_on):
            yield (
                f"{command} gets no signal: its shell does, and both are killed at once",
                "Start it with exec or with srun",
            )
        if self.signal is None:
            yield (
                "without --signal a run has only KillWait, 30 s by default, to end in when its "
                "time is over",
                f"Add #SBATCH --signal={'' if command.how == 'srun' else 'B:'}TERM@120",
            )
            return
        target, _, rest = self.signal.rpartition(":")
        to_shell = "B" in target.upper()
        name = _signal_name(rest.partition("@")[0])
        if command.how == "srun" and to_shell and self.traps.get(name, "") in _DOES_NOTHING:
            yield (
                f"--signal={self.signal} is for the shell alone, and {command} has only KillWait",
                f"Say --signal={rest}, without B:",
            )
        elif command.how == "exec" and not to_shell:
            yield (
                f"--signal={self.signal} is for what srun starts, and {command} does not get it",
                f"Say --signal=B:{rest}",
            )
        elif name in ("USR1", "USR2") and command.how == ("exec" if to_shell else "srun"):
            yield (
                f"--signal={self.signal} kills a program that does not expect it",
                f"Use TERM, or give SIG{name} to SignalStop(signals=...)",
            )


def _ask(*words: str) -> str:
    """What scontrol answers.

    Raises:
        subprocess.SubprocessError: It failed, or did not answer.
    """
    return subprocess.run(
        ["scontrol", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=_TIMEOUT,
    ).stdout


def _options(text: str) -> Iterator[tuple[str, str]]:
    """The long options of the lines ``#SBATCH``, which end at the first command; see sbatch(1)."""
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            words = _tokens(line.removeprefix("#SBATCH"))
            for word, following in zip(words, [*words[1:], ""], strict=True):
                if word.startswith("--"):
                    name, equals, value = word[2:].partition("=")
                    yield name, value if equals else following
        elif line.strip() and not line.lstrip().startswith("#"):
            return


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a script that are no comments, with their numbers; those that end with a
    backslash are joined.
    """
    first, joined = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if joined or (line.strip() and not line.lstrip().startswith("#")):
            first, joined = first if joined else number, joined + line
            if joined.endswith("\\"):
                joined = joined[:-1] + " "
            else:
                yield first, joined
                joined = ""
    if joined:
        yield first, joined


def _simple_commands(line: str) -> Iterator[tuple[list[str], str]]:
    """The commands of a line, each with the operator that ends it."""
    words: list[str] = []
    for token in (*_tokens(line), ";"):
        if _OPERATOR.fullmatch(token):
            if words:
                yield words, token
            words = []
        elif words or token not in _KEYWORDS:
            words.append(token)


def _tokens(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()")
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # a quotation that goes on in the next line
        return line.split()


def _how(words: list[str], operator: str) -> str | None:
    """How a command starts a program that trains; None if it does not."""
    words = list(words)
    replaces = False
    while words and (words[0] == "exec" or _ASSIGNMENT.fullmatch(words[0])):
        replaces = words.pop(0) == "exec" or replaces
    names = [os.path.basename(word) for word in words]
    if not names or not (names[0] in _BEFORE or _PROGRAM.fullmatch(names[0])):
        return None
    position = next((i for i, name in enumerate(names) if _PROGRAM.fullmatch(name)), None)
    if position is None or not _trains(names[position], words[position + 1 :]):
        return None
    if "srun" in names[:position]:
        return "srun"
    if operator == "&":
        return "background"
    # In a pipeline exec replaces a copy of the shell only.
    return "exec" if replaces and not operator.startswith("|") else "plain"


def _trains(program: str, arguments: list[str]) -> bool:
    """Whether this may take long: no question for a version, no installation, not this command."""
    if program == "orchard-infra":
        return arguments[:1] == ["run"]
    return not (
        not arguments
        or arguments[0] in ("-c", "-V", "--version", "-")
        or arguments[:2] in (["-m", "pip"], ["-m", "venv"])
    )


def _signal_name(word: str) -> str:
    """``SIGTERM``, ``term`` and ``15`` are all TERM."""
    numbers = {"10": "USR1", "12": "USR2", "15": "TERM"}
    return numbers.get(word, word.upper().removeprefix("SIG"))
