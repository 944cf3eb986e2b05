"""The launcher's work before SGLang starts other processes: flags to a configuration, refusals, one line and an exit code.

Neither torch nor SGLang is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from kvtuner_search.errors import ExitCode, KVTunerError, ServingError
from kvtuner_search.profile.checks import check_model
from kvtuner_search.profile.schema import ModelInfo
from kvtuner_search.profile.text import one_line
from kvtuner_search.serving.configuration import ServingConfiguration
from kvtuner_search.serving.sglang import flags, partition
from kvtuner_search.serving.sglang.model import served_model
from kvtuner_search.serving.sglang.refusals import Refusal, attention_backend, check_arguments

EXIT_CODES = frozenset(int(code) for code in (ExitCode.USAGE, ExitCode.DATA, ExitCode.NOT_COMPARABLE, ExitCode.SERVER))


def refuse(error: KVTunerError) -> NoReturn:
    """Print why no server starts, and end this process. SGLang catches exceptions of plugins, but not this."""
    print(f"kvtuner-search: {one_line(error)}", file=sys.stderr, flush=True)
    raise SystemExit(int(error.exit_code))


@contextmanager
def refusing() -> Iterator[None]:
    """Errors that the caller can fix end the process with one line and their exit code."""
    try:
        yield
    except KVTunerError as error:
        refuse(error)


def asked(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process's command line or environment names one of our options."""
    named = any(argument.startswith(("--kvtuner", "--enable-kvtuner")) for argument in arguments)
    return named or ServingConfiguration.from_environment(environment) is not None


def configure(arguments: argparse.Namespace, device: str) -> ServingConfiguration | None:
    """Turn a parsed command line into the environment that all processes of the server inherit.

    Args:
        arguments: SGLang's namespace, with our flags. ``attention_backend`` is filled in where it was not given.
        device: what SGLang will run on.

    Returns:
        the configuration; None if no profile is requested.

    Raises:
        KVTunerError: with the reason and the remedy.
    """
    found = ServingConfiguration.from_environment()
    if flags.requested(arguments):
        model = _model(arguments)
        found = flags.resolve(arguments, model, arguments.model_path)
    if found is None:
        return None
    if arguments.attention_backend is None:
        arguments.attention_backend = attention_backend(device)
    profile, _ = found.open()
    os.environ.update(found.to_environment())
    os.environ.update(partition.of_profile(profile, arguments.tp_size, arguments.pp_size).to_environment())
    return found


def _model(arguments: Any) -> ModelInfo:
    return served_model(
        arguments.model_path, arguments.revision, arguments.json_model_override_args, arguments.context_length
    )


def check_server(arguments: Any, configuration: ServingConfiguration, refusals: Iterable[Refusal]) -> None:
    """Everything that can be checked before a process starts.

    Args:
        arguments: SGLang's ServerArgs, resolved.
        configuration: the requested configuration.
        refusals: of this SGLang version's arguments.

    Raises:
        KVTunerError: with the reason and the remedy.
    """
    profile, _ = configuration.open()
    model = _model(arguments)
    check_model(profile, model, arguments.model_path)
    check_arguments(arguments, refusals)


def check_ready(infos: Sequence[Mapping[str, Any]], configuration: ServingConfiguration) -> None:
    """Compare the reports of the ranks that this launcher started with the requested configuration.

    Raises:
        ServingError: if a rank reports nothing, or something else.
    """
    for rank, info in enumerate(infos):
        report = info.get("kvtuner")
        if not isinstance(report, Mapping):
            raise ServingError(
                f"scheduler {rank} came up without the plugin, and would serve an unquantized cache: install kvtuner-search in"
                " its environment, and allow it in SGLANG_PLUGINS"
            )
        if report.get("profile_digest") != configuration.digest or report.get("tokens") != info["max_total_num_tokens"]:
            raise ServingError(
                f"scheduler {rank} serves {str(report.get('profile_digest'))[:19]}… with {report.get('tokens')} tokens, not"
                f" {configuration.digest[:19]}… with {info['max_total_num_tokens']}: start the server again"
            )


def check_exits(codes: Sequence[int | None]) -> None:
    """Pass on the exit code of a child that refused to serve; it has printed the reason.

    Raises:
        SystemExit: with that code.
    """
    for code in codes:
        if code in EXIT_CODES:
            print("kvtuner-search: a rank refused to serve; see its reason above", file=sys.stderr, flush=True)
            raise SystemExit(code)
