"""The group of all commands. Each one is loaded when it is used, because `run` must start fast."""

from __future__ import annotations

import gc
from importlib import import_module

import click

from orchard_infra._version import __version__

_COMMANDS = ("run", "status", "history", "stop", "clean", "doctor")
_FOLDERS = ("run", "doctor")

_EXAMPLES = """\b
Examples:
  orchard-infra run -p digits -- python train.py
  orchard-infra run -p digits --wait -- torchrun --nproc-per-node 2 train.py
  orchard-infra status --watch
  orchard-infra clean --dry-run

\b
Completion, in ~/.bashrc (zsh: zsh_source, in ~/.zshrc; fish: fish_source):
  eval "$(_ORCHARD_INFRA_COMPLETE=bash_source orchard-infra)"
"""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = f"{cmd_name}.command" if cmd_name in _FOLDERS else cmd_name
        command = getattr(import_module(f"orchard_infra.cli.{module}"), cmd_name)
        assert isinstance(command, click.Command)
        if cmd_name != "run":  # which has more to load, and does so itself once that is done
            gc.enable()
        return command


@click.group(cls=_Commands, epilog=_EXAMPLES, context_settings={"max_content_width": 100})
@click.version_option(__version__, message="orchard-infra %(version)s")
def commands() -> None:
    """A clean start and a graceful stop for training runs, from the command line."""
