"""Groups of commands that are imported only when they are called, so that help stays quick."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem


def name_variables(command: click.Command, prefix: str) -> None:
    """Name each option's environment variable by the option's spelling, and show it in the help.

    click itself would use the name of the function's argument (``sources`` for ``--data``); that one keeps working, unshown.
    Options with a variable of their own (``--json``, ``--api-key``) keep it, and those that no variable may set get none.
    """
    for option in command.params:
        if isinstance(option, click.Option) and (option.envvar or option.allow_from_autoenv):
            spelling = next(name for name in option.opts if name.startswith("--"))
            option.envvar = option.envvar or f"{prefix}_{spelling[2:].replace('-', '_').upper()}"
            option.show_envvar = True


class LazyGroup(click.Group):
    """A group whose commands are imported on first use; the list of commands needs no import.

    Args:
        modules: name -> (module with a click command named ``command``, one line of help).
        context_settings: with ``auto_envvar_prefix``, by which the commands' variables are named.
    """

    def __init__(self, *arguments: Any, modules: Mapping[str, tuple[str, str]], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of ``modules``."""
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported; None for an unknown name."""
        if cmd_name not in self.modules:
            return None
        command = importlib.import_module(self.modules[cmd_name][0]).command
        assert isinstance(command, click.Command)
        own = f"{self.context_settings['auto_envvar_prefix']}_{cmd_name.upper()}"
        name_variables(command, command.context_settings.get("auto_envvar_prefix", own))
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names with their help, then options."""
        options = click.Command.shell_complete(self, ctx, incomplete)
        names = [
            CompletionItem(name, help=text) for name, (_, text) in self.modules.items() if name.startswith(incomplete)
        ]
        return [*names, *options]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of commands in the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.modules.items()])
