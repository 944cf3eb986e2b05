"""The ``kvtuner-search`` command. Subcommands are imported only when they are called, so that help stays quick."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

import click

from kvtuner_search import __version__
from kvtuner_search.cli.lazy import LazyGroup
from kvtuner_search.errors import ExitCode, KVTunerError, first_line
from kvtuner_search.output import OutputError, guard, guarded, open_closed_streams
from kvtuner_search.profile.text import one_line
from kvtuner_search.secrets import mask, remember_all

# name -> (module with a click command named `command`, one line of help)
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "calibrate": ("kvtuner_search.cli.calibrate", "Search per-layer bit-widths of a model and write a profile."),
    "sensitivity": (
        "kvtuner_search.cli.sensitivity",
        "Measure each layer's loss with each storage class, without a search.",
    ),
    "evaluate": ("kvtuner_search.cli.evaluate", "Measure a profile's quality against the 16-bit cache, offline."),
    "serve": ("kvtuner_search.cli.serve", "Serve a model with SGLang and a KV cache packed by a profile."),
    "validate": ("kvtuner_search.cli.validate", "Measure a profile on an SGLang server against a stock one."),
    "bench": ("kvtuner_search.cli.bench", "Measure a server's speed and capacity, checked against hardware limits."),
    "show": ("kvtuner_search.cli.show", "Show a profile in the terminal or as HTML."),
    "check": ("kvtuner_search.cli.check", "Check a profile's schema, digest and consistency."),
    "diff": ("kvtuner_search.cli.diff", "Compare two profiles as a review gate."),
    "import": ("kvtuner_search.cli.import_", "Make a profile from another format."),
    "export": ("kvtuner_search.cli.export", "Write a profile in another format."),
    "completion": ("kvtuner_search.cli.completion", "Print the shell's completion script."),
}


MEMORY_HELP: Final = (
    "lower --batch-tokens or --length, spread the model with --device-map auto, or use --dtype bfloat16"
)


@click.group(
    cls=LazyGroup,
    modules=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "KVTUNER", "show_default": True},
    epilog="Exit codes: 0 pass, 1 gate failed, 2 usage, 3 unreadable or invalid input, 4 not comparable, 5 a server failed, 130 interrupted, 141 the reader of the output is gone.",
)
@click.version_option(__version__, prog_name="kvtuner-search")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Search per-layer key and value bit-widths for the KV cache, and keep the result as a reviewed profile."""
    ctx.ensure_object(dict)["debug"] = debug


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with one of ExitCode."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end the command
    guard()  # for good: a traceback has text from files too
    sys.excepthook = _traceback
    _mask_libraries()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code; errors become one line on stderr."""
    with guarded():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    state = {"debug": False}
    remember_all(arguments, os.environ)
    try:
        result: Any = cli.main(arguments, prog_name="kvtuner-search", standalone_mode=False, obj=state)
        sys.stdout.flush()
        return int(result) if isinstance(result, int) else ExitCode.OK
    except OutputError as error:
        if error.gone:
            return ExitCode.UNREAD  # nobody is left to read a message
        return _fail(f"cannot write standard output: {error}: make room, or write to another place", ExitCode.USAGE)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail(
            "interrupted: finished work is kept; calibrate, validate and bench continue with --resume",
            ExitCode.INTERRUPTED,
        )
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(f"Try '{error.ctx.command_path} --help' for help.", err=True)
        return _fail(error.format_message(), ExitCode.USAGE)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except KVTunerError as error:
        if state["debug"]:
            raise
        return _fail(str(error), error.exit_code)
    except RuntimeError as error:
        # torch.OutOfMemoryError, told by its name because torch is not imported here
        if state["debug"] or type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail(f"the GPU ran out of memory ({first_line(error)}): {MEMORY_HELP}", ExitCode.DATA)


def _fail(message: str, code: ExitCode) -> int:
    click.echo(f"kvtuner-search: {one_line(mask(message))}", err=True)
    return code


def _mask_libraries() -> None:
    """Mask passwords and keys in what libraries log and warn of: database drivers quote the address that they were given."""
    record_of, format_of = logging.getLogRecordFactory(), warnings.formatwarning

    def masked_record(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = record_of(*arguments, **named)
        with suppress(Exception):  # a message that does not fit its arguments is logging's to report
            text = record.getMessage()
            if (masked := mask(text)) != text:
                record.msg, record.args = masked, None
        return record

    def masked_warning(message: Any, *arguments: Any, **named: Any) -> str:
        return mask(format_of(message, *arguments, **named))

    logging.setLogRecordFactory(masked_record)
    warnings.formatwarning = masked_warning


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of --debug, or of an unforeseen error, without passwords and keys."""
    for line in traceback.format_exception(kind, error, trace):
        sys.stderr.write(mask(line))


if __name__ == "__main__":
    main()
