"""Options that several commands share."""

from __future__ import annotations

import sys

import click

from kvtuner_search.profile.settings import parse_size


def size_callback(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


memory_option = click.option(
    "--memory", metavar="SIZE", callback=size_callback, help="Show how many tokens fit, e.g. 40GiB."
)
context_option = click.option(
    "--context",
    type=click.IntRange(1, 2**31),
    metavar="TOKENS",
    help="Show what a request of so many tokens takes; 4096 and 32768 where layers have windows.",
)
json_option = click.option("--json", "as_json", is_flag=True, envvar="KVTUNER_JSON", help="Print JSON.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(1),
    metavar="SECONDS",
    default=600.0,
    help="Limit for one request.",
)
api_key_option = click.option(
    "--api-key",
    metavar="KEY",
    envvar="KVTUNER_API_KEY",
    help="API key of the server, sent as bearer token. The variable keeps it out of the process list.",
)
start_timeout_option = click.option(
    "--start-timeout",
    type=click.FloatRange(1),
    metavar="SECONDS",
    default=900.0,
    help="Limit until a server is ready.",
)
server_python_option = click.option(
    "--server-python",
    default=sys.executable,
    metavar="PATH",
    show_default="this one",
    help="Python of the environment that has SGLang.",
)
server_arguments = click.argument("server_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- SGLANG OPTIONS]")
