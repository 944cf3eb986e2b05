"""``kvtuner-search completion``: the shell's completion script."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion", epilog='For bash: eval "$(kvtuner-search completion bash)" in ~/.bashrc.')
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands and options in SHELL."""
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    root = ctx.find_root()
    script = kind(root.command, {}, "kvtuner-search", "_KVTUNER_SEARCH_COMPLETE")
    click.echo(script.source())
