"""Options of the commands that load a model and data, and how they become option objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvtuner_kernels.layout import BITS, GROUP_SIZES

if TYPE_CHECKING:
    from kvtuner_search.models.load import ModelOptions

F = TypeVar("F", bound=Callable[..., Any])
REFERENCE = "reference"
CONTEXT = {"show_default": True, "max_content_width": 110}


def model_options(function: F) -> F:
    """``--model`` and how it is loaded."""
    for option in reversed(
        (
            click.option(
                "--model",
                default=REFERENCE,
                metavar="FOLDER|HUB-ID",
                help="Model; 'reference' is the embedded 13.9 M-parameter test instrument.",
            ),
            click.option("--revision", help="Commit, branch or tag on the hub."),
            click.option(
                "--dtype",
                type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
                default="auto",
                help="auto: bfloat16 on a GPU, float32 on the CPU.",
            ),
            click.option(
                "--device",
                default="auto",
                help="auto, cpu, cuda or cuda:N; auto is a GPU if there is one.",
            ),
            click.option(
                "--device-map",
                help="transformers' device_map, e.g. auto, for a model larger than one GPU.",
            ),
            click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
            click.option(
                "--random-weights",
                is_flag=True,
                help="Random weights from config.json, to see the time and memory that this takes: the results mean nothing.",
            ),
        )
    ):
        function = option(function)
    return function


def data_options(
    samples: int, length: int, *, per: str = "of each source", seeds: str = "the data"
) -> Callable[[F], F]:
    """``--data`` and how much of it.

    Args:
        samples, length: the defaults.
        per: what the help of ``--samples`` counts sequences of.
        seeds: what the help of ``--seed`` says that it decides.
    """

    def decorate(function: F) -> F:
        for option in reversed(
            (
                click.option(
                    "--data",
                    "sources",
                    multiple=True,
                    metavar="SOURCE",
                    help="Built-in task, .txt, .md, .jsonl or .parquet file, gsm8k, wikitext or hub:NAME; repeatable (docs/data.md). calibrate and sensitivity add chat by default if the model has a chat template.",
                    show_default="recall, arithmetic, list, text",
                ),
                click.option(
                    "--samples",
                    type=click.IntRange(1),
                    default=samples,
                    help=f"Sequences {per}.",
                ),
                click.option(
                    "--length",
                    type=click.IntRange(8),
                    default=length,
                    help="Most tokens of a sequence.",
                ),
                click.option(
                    "--seed",
                    type=click.IntRange(0, 2**31),
                    default=0,
                    help=f"Seed of {seeds}.",
                ),
                click.option(
                    "--batch-tokens",
                    type=click.IntRange(1),
                    default=4096,
                    help="Tokens of one forward pass: less needs less memory.",
                ),
            )
        ):
            function = option(function)
        return function

    return decorate


def space_options(function: F) -> F:
    """How a tensor may be stored."""
    for option in reversed(
        (
            click.option(
                "--bits",
                default=",".join(map(str, BITS)),
                callback=_numbers,
                help="Bit-widths to choose from, separated by commas.",
            ),
            click.option(
                "--group-size",
                "group_sizes",
                default="head",
                callback=_groups,
                help=f"Channels that share a scale: {_words(('head', *GROUP_SIZES), 'or')}, or several of them, separated by commas.",
            ),
            click.option(
                "--symmetric/--no-symmetric", default=True, help="Also allow formats without a stored minimum."
            ),
            click.option(
                "--bands/--no-bands",
                default=True,
                help="Also allow a fitted basis with separate bits for each band of channels.",
            ),
        )
    ):
        function = option(function)
    return function


def loading(options: dict[str, Any]) -> ModelOptions:
    """Take the model's options out of a command's."""
    from kvtuner_search.models.load import ModelOptions

    return ModelOptions(
        source=options.pop("model"),
        revision=options.pop("revision"),
        dtype=options.pop("dtype"),
        device=options.pop("device"),
        device_map=options.pop("device_map"),
        trust_remote_code=options.pop("trust_remote_code"),
        random_weights=options.pop("random_weights"),
    )


def label(model: str) -> str:
    """What tables call a model: the reference model is never mistaken for a real one."""
    return f"{model} (embedded test instrument)" if model == REFERENCE else model


def _words(choices: Sequence[object], last: str = "and") -> str:
    return f"{', '.join(map(str, choices[:-1]))} {last} {choices[-1]}"


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in value.split(",") if part.strip().isdecimal())
    if len(found) != len(value.split(",")) or not set(found) <= set(BITS):
        raise click.BadParameter(f"{value!r} is not a list of {_words(BITS)}, as in 2,4,8", ctx, param)
    return found


def _groups(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",")]
    if not all(part == "head" or part in map(str, GROUP_SIZES) for part in parts):
        raise click.BadParameter(
            f"{value!r} is not a list of {_words(('head', *GROUP_SIZES))}, as in head,32", ctx, param
        )
    return tuple(0 if part == "head" else int(part) for part in parts)
