"""Options that several commands share."""

from __future__ import annotations

import click

from kvtuner_search.profile.settings import parse_size


def size_callback(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


memory_option = click.option(
    "--memory", metavar="SIZE", callback=size_callback, show_envvar=True, help="Show how many tokens fit, e.g. 40GiB."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, envvar="KVTUNER_JSON", show_envvar=True, help="Print JSON."
)
