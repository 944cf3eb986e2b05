"""``kvtuner-search validate``: a profile on a real server, against a stock one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from kvtuner_search.cli.interrupts import kill_as_interrupt
from kvtuner_search.cli.options import (
    api_key_option,
    json_option,
    quiet_option,
    server_arguments,
    server_python_option,
    start_timeout_option,
    timeout_option,
)
from kvtuner_search.cli.run_options import CONTEXT

F = TypeVar("F", bound=Callable[..., Any])


class Limit(click.ParamType[float | str | None]):
    """A number that is not negative, ``none``, or, if allowed, ``auto``."""

    def __init__(self, auto: bool) -> None:
        self.auto, self.name = auto, "auto|number|none" if auto else "number|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str | None:
        if value == "none":
            return None
        if value == "auto" and self.auto:
            return "auto"
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number < 2**31:
            words = "auto nor none" if self.auto else "none"
            self.fail(f"{value!r} is neither a number from 0 on nor {words}", param, ctx)
        return number


def _limit(name: str, default: str, text: str, auto: bool = False) -> Callable[[F], F]:
    return click.option(name, type=Limit(auto), default=default, help=text)


@click.command(
    "validate",
    context_settings=CONTEXT,
    epilog="Exit codes: 0 every threshold holds, 1 one does not, 2 usage, 3 unreadable or invalid input, 4 a profile of another model or a"
    " server with another profile, 5 a server could not be started or gave unusable answers (valid answers are kept: --resume),"
    " 130 interrupted.",
)
@click.option("--profile", type=click.Path(path_type=Path), required=True, help="Profile to validate.")
@click.option(
    "--model-path",
    "model",
    default="reference",
    metavar="FOLDER|HUB-ID",
    help="Model; 'reference' is the embedded 13.9 M-parameter test instrument.",
)
@click.option("--url", help="Running server with the profile, http://host:port, instead of starting one.")
@click.option("--baseline-url", help="Running stock server, instead of starting one.")
@click.option(
    "--baseline-from",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of a run with the same options for another profile, whose stock server's answers are reused.",
)
@server_python_option
@click.option(
    "--data",
    "sources",
    multiple=True,
    metavar="SOURCE",
    help="Held-out text or task to score; repeatable (docs/data.md).",
    show_default="recall, arithmetic, list, text",
)
@click.option("--samples", type=click.IntRange(2), default=40, help="Sequences of each source.")
@click.option("--length", type=click.IntRange(8), default=512, help="Most tokens of a sequence.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK",
    default=("recall",),
    help="Task to answer by generation: recall, arithmetic, list, rows#exact=FIELD, gsm8k:FOLDER with #items=N, #shots=N, #tokens=N,"
    " #chat, #answer=last; repeatable (docs/validate.md).",
)
@click.option("--task-prompts", type=click.IntRange(1), default=100, help="Prompts of each task.")
@click.option("--greedy-prompts", type=click.IntRange(2), default=32, help="Prompts to continue.")
@click.option("--greedy-tokens", type=click.IntRange(1), default=64, help="Tokens of each continuation.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Seed of generated prompts.")
@_limit("--max-nll-increase", "0.05", "Limit for each source, nats a token, on the upper end of the interval.")
@_limit("--max-accuracy-drop", "0.05", "Limit for each task, as a fraction, on the lower end of the interval.")
@_limit("--min-capacity", "0.99", "Token capacity over the stock server's, as a fraction of the predicted ratio.")
@_limit(
    "--min-agreement",
    "none",
    "Limit on the mean fraction of greedy tokens before the first difference, on the lower end of its interval.",
)
@_limit(
    "--max-path-difference",
    "auto",
    "Decode against extend on the same tokens, nats a token; auto: what rounding explains; a number: beyond the stock server's.",
    auto=True,
)
@_limit(
    "--max-offline-difference",
    "auto",
    "Server against offline evaluation, nats a token; auto: what rounding explains, of means and token by token; a number: means alone.",
    auto=True,
)
@_limit(
    "--min-offline-tokens",
    "auto",
    "Fraction of greedy tokens that the offline evaluation ranks first too; auto: what rounding explains.",
    auto=True,
)
@_limit(
    "--min-offline-effect",
    "0.5",
    "Limit on the share of the profile's effect, token by token, that the server shows, on the lower end of its interval.",
)
@click.option("--offline/--no-offline", default=True, help="Compare with the offline evaluation of the same profile.")
@click.option("--device", default="auto", help="Device of the offline evaluation: auto, cpu, cuda, cuda:N.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    default=4096,
    help="Tokens in one pass of the offline evaluation.",
)
@click.option("--concurrency", type=click.IntRange(1, 1024), default=8, help="Requests in flight.")
@api_key_option
@timeout_option
@start_timeout_option
@click.option("--hardware", help="Hardware of servers given by --url, for the record.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    show_default="kvtuner-validation/NAME",
    help="Folder for responses, logs and the block.",
)
@click.option("--resume", is_flag=True, help="Continue the run in the folder.")
@click.option("--overwrite", is_flag=True, help="Delete the run in the folder and start again.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the block to this file.",
)
@click.option("--write", is_flag=True, help="Add the block to the profile, which gets a new digest.")
@json_option
@quiet_option
@server_arguments
def command(**options: Any) -> int:
    """Measure a profile on an SGLang server against a stock server, with the same prompts.

    Measures held-out likelihood, task accuracy by generation, greedy agreement, token capacity, and agreement with the offline evaluation. Starts
    two servers one after the other, with the same options after --, or uses running ones. docs/validate.md says how and why.
    """  # fmt: skip
    from kvtuner_search.data import DEFAULT_SOURCES
    from kvtuner_search.errors import ExitCode, UsageError
    from kvtuner_search.files import check_writable, write_atomic
    from kvtuner_search.profile.canonical import canonical_json
    from kvtuner_search.progress import Reporter
    from kvtuner_search.servers.host import public_command
    from kvtuner_search.validate.options import Limits, ValidationOptions
    from kvtuner_search.validate.run import ValidationRun, write_block

    output, write, as_json = options.pop("output"), options.pop("write"), options.pop("as_json")
    reporter = Reporter(options.pop("quiet"))
    if options["resume"] and options["overwrite"]:
        raise UsageError("--resume and --overwrite exclude each other: one keeps the run, the other deletes it")
    options["sources"] = options["sources"] or DEFAULT_SOURCES
    options["folder"] = options["folder"] or Path("kvtuner-validation") / options["profile"].stem
    limits = Limits(**{name: options.pop(name) for name in Limits.__dataclass_fields__})
    check_writable(output, options["profile"] if write else None)
    with kill_as_interrupt():
        run = ValidationRun(ValidationOptions(limits=limits, command=public_command(sys.argv[1:]), **options), reporter)
        block = run.validate()
    text = canonical_json(block.model_dump(mode="json"))
    if output is not None:
        write_atomic(output, text)
        reporter.say(f"wrote {output}")
    if write:
        write_block(run.profile, block, options["profile"])
        reporter.say(f"wrote the block into {options['profile']}")
    if as_json:
        click.echo(text, nl=False)
    else:
        from kvtuner_search.profile.terminal import console, print_validation

        print_validation(console(), block, block.verdict)
    return ExitCode.OK if block.verdict == "pass" else ExitCode.GATE_FAILED
