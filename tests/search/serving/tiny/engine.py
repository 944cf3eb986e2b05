"""A small engine, to show what a second one needs: this folder beside ``serving/sglang``, and nothing else (test_second_engine.py puts it there).

It resembles SGLang in nothing: other options, endpoints, fields and metrics. ``server.py`` is the server; it computes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from kvtuner_search.addresses import check_key
from kvtuner_search.errors import ServingError, UsageError
from kvtuner_search.models.source import read_source
from kvtuner_search.profile.checks import check_model
from kvtuner_search.profile.model_config import model_info
from kvtuner_search.profile.schema import ModelInfo, Profile
from kvtuner_search.serving.configuration import load

if TYPE_CHECKING:
    from kvtuner_search.serving.tiny import engine

    from kvtuner_search.serving.engine import Engine

    _: Engine = engine

NAME: Final = "tiny"
TITLE: Final = "Tiny"
INSTALL: Final = "tiny"
PROFILE: Final = "--store"
AS_STORED: Final = "--read-stored"
EXAMPLES: Final = (("--weights PATH", "The model's folder."),)


@dataclass(frozen=True)
class Flag:
    name: str
    help: str
    choices: tuple[int, ...] | None = None
    metavar: str = ""
    bare: bool | None = None


FLAGS: Final = (Flag(PROFILE, "The profile.", metavar="FILE"), Flag(AS_STORED, "Read prompts as stored."))


@dataclass(frozen=True)
class Plan:
    model: str
    profile: Profile


def prepare(
    arguments: Sequence[str], profile: str | None, as_stored: bool, gpu_memory: int | None
) -> tuple[Plan, list[str]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights")
    given, _ = parser.parse_known_args(list(arguments))
    if profile is None or given.weights is None:
        raise UsageError("profile or weights are missing: give --profile and --weights")
    loaded, _ = load(Path(profile))
    check_model(loaded, served_model(given.weights), given.weights)
    flags = [PROFILE, profile, *([AS_STORED] if as_stored else [])]
    return Plan(given.weights, loaded), [*arguments, *flags]


def plan_json(plan: Plan) -> dict[str, Any]:
    return {"engine": NAME, "digest": plan.profile.digest}


def plan_text(plan: Plan) -> str:
    return f"{TITLE} serves {plan.model} with {plan.profile.name}\n"


def check_installation(plan: Plan) -> None:
    try:
        metadata.version(NAME)
    except metadata.PackageNotFoundError as error:
        raise ServingError(f"{TITLE} is not installed: pip install {INSTALL}") from error


def start(plan: Plan, arguments: Sequence[str]) -> NoReturn:
    sys.stderr.flush()
    os.execv(sys.executable, command(sys.executable, arguments))


def server_arguments(
    model_path: str, given: Sequence[str], *, profile: str | None, as_stored: bool = False, metrics: bool = False
) -> list[str]:
    stored = [] if profile is None else [PROFILE, profile]
    return ["--weights", model_path, *given, *stored, *([AS_STORED] if as_stored else [])]


def command(python: str, arguments: Sequence[str], port: int | None = None) -> list[str]:
    at = () if port is None else ("--at", str(port))
    return [python, "-m", "kvtuner_search.serving.tiny.server", *arguments, *at]


def variables(arguments: Sequence[str]) -> dict[str, str]:
    return {}


def api_key(given: str | None, arguments: Sequence[str]) -> str | None:
    return check_key(given)


def served_model(
    model_path: str, revision: str | None = None, overrides: str | None = None, context: int | None = None
) -> ModelInfo:
    return model_info(served_config(model_path, revision, overrides), model_path, model_path, revision)


def served_config(
    model_path: str, revision: str | None = None, overrides: str | None = None, *, fetch: bool = True
) -> dict[str, Any]:
    changes: dict[str, Any] = json.loads(overrides or "{}")
    return read_source(model_path, revision, fetch=fetch)[1] | changes


def stage_layers(
    layer_bytes: Sequence[int], stages: int, environment: Mapping[str, str] = os.environ
) -> tuple[int, ...]:
    if stages != 1:
        raise UsageError(f"{TITLE} has no pipeline stages: leave them out")
    return (len(layer_bytes),)
