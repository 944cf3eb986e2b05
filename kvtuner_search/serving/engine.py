"""The one door to an engine: what the rest of the program needs of ``serving/<engine>``, whichever engine that is.

Nothing outside an engine's folder imports from it (``tests/test_house.py``). A second engine is a folder beside ``serving/sglang`` whose module
``engine`` offers what :class:`Engine` lists, and whose module ``interface`` what ``servers.interface.Interface`` does. The folders are the
table of engines. Neither torch nor an engine is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol, cast

from kvtuner_search.errors import UsageError
from kvtuner_search.profile.schema import ModelInfo

DEFAULT: Final = "sglang"
VARIABLE: Final = "KVTUNER_ENGINE"  # names another engine, for all commands


class Option(Protocol):
    """An option of ``serve`` that is the engine's, as its help lists it."""

    @property
    def name(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def choices(self) -> tuple[int, ...] | None: ...
    @property
    def metavar(self) -> str: ...
    @property
    def bare(self) -> bool | None: ...


class Engine(Protocol):
    """What the module ``kvtuner_search.serving.<engine>.engine`` offers."""

    @property
    def NAME(self) -> str:
        """Of its package, by which versions are told, e.g. sglang; the folder has the same."""

    @property
    def TITLE(self) -> str:
        """As texts call it, e.g. SGLang."""

    @property
    def INSTALL(self) -> str:
        """What pip is asked for to get it, e.g. kvtuner-search[serve]."""

    @property
    def PROFILE(self) -> str:
        """Option that names the profile."""

    @property
    def AS_STORED(self) -> str:
        """Option by which a prompt's own keys and values are read as stored too."""

    @property
    def FLAGS(self) -> Sequence[Option]:
        """All options that say how the cache is stored, those two included."""

    @property
    def EXAMPLES(self) -> Sequence[tuple[str, str]]:
        """The engine's own options that users need most, each with its help."""

    def prepare(
        self, arguments: Sequence[str], profile: str | None, as_stored: bool, gpu_memory: int | None
    ) -> tuple[Any, list[str]]:
        """Check a command line and plan the server, before anything is started; returns the plan and the engine's whole argument list.

        Args:
            arguments: all that ``serve`` did not take for itself.
            profile: the profile's file, if one is given.
            as_stored: read a prompt's own keys and values as stored too.
            gpu_memory: bytes of one GPU's memory, if the user says so.

        Raises:
            KVTunerError: with the reason and the remedy.
        """

    def plan_json(self, plan: Any) -> dict[str, Any]:
        """The plan as plain JSON."""

    def plan_text(self, plan: Any) -> str:
        """The plan as lines for a terminal."""

    def check_installation(self, plan: Any) -> None:
        """Refuse an engine that is missing, or of a version that cannot serve a profile.

        Raises:
            ServingError: with what to install or unset.
        """

    def start(self, plan: Any, arguments: Sequence[str]) -> NoReturn:
        """Become the server.

        Raises:
            ServingError: if that fails.
        """

    def server_arguments(
        self,
        model_path: str,
        given: Sequence[str],
        *,
        profile: str | None,
        as_stored: bool = False,
        metrics: bool = False,
    ) -> list[str]:
        """The whole argument list of a server that ``bench`` or ``validate`` starts.

        Args:
            model_path: folder or hub id of the model.
            given: the user's own arguments.
            profile: the profile's file; None: a stock server.
            as_stored: read a prompt's own keys and values as stored too.
            metrics: with its metrics switched on.
        """

    def command(self, python: str, arguments: Sequence[str], port: int | None = None) -> list[str]:
        """The command that starts a server with these arguments in the environment of the interpreter ``python``.

        Args:
            python: the interpreter.
            arguments: of the server.
            port: of the loopback interface, where it is to listen; None: as the arguments say.
        """

    def variables(self, arguments: Sequence[str]) -> dict[str, str]:
        """The environment variables that a server with these arguments needs and the user has not set."""

    def api_key(self, given: str | None, arguments: Sequence[str]) -> str | None:
        """The key that a server wants: as given, or as one that is started with these arguments gets it.

        Raises:
            UsageError: if no HTTP header can carry it.
        """

    def served_model(
        self, model_path: str, revision: str | None = None, overrides: str | None = None, context: int | None = None
    ) -> ModelInfo:
        """The shape of the model that a server loads, from a folder or hub id and what its options change of config.json.

        Raises:
            DataError, UsageError: if its config.json cannot be read, or it cannot be served with a profile.
        """

    def served_config(
        self, model_path: str, revision: str | None = None, overrides: str | None = None, *, fetch: bool = True
    ) -> dict[str, Any]:
        """The content of config.json as a server reads it; ``fetch``: whether a hub id may be fetched.

        Raises:
            DataError, UsageError: if it cannot be read.
        """

    def stage_layers(
        self, layer_bytes: Sequence[int], stages: int, environment: Mapping[str, str] = os.environ
    ) -> tuple[int, ...]:
        """The number of layers that each pipeline stage gets.

        Args:
            layer_bytes: bytes a token of each layer, on one rank.
            stages: pipeline stages.
            environment: where the user's own choice is looked for.

        Raises:
            UsageError: if the layers cannot be divided so.
        """


@cache
def engines() -> tuple[str, ...]:
    """The engines' names: every folder beside this module that has a module ``engine``."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/engine.py")))


def chosen(name: str | None = None) -> str:
    """The engine of that name; None: the one that the environment variable VARIABLE names, otherwise DEFAULT.

    Raises:
        UsageError: if there is no such engine.
    """
    name = name or os.environ.get(VARIABLE) or DEFAULT
    if name not in engines():
        raise UsageError(f"there is no engine {name!r}: choose from {', '.join(engines())}")
    return name


def engine(name: str | None = None) -> Engine:
    """An engine, by the name of its folder; None: the one that is used.

    Raises:
        UsageError: if there is no such engine.

    Example:
        >>> engine().TITLE
        'SGLang'
    """
    return _engine(chosen(name))


@cache
def _engine(name: str) -> Engine:
    return cast(Engine, import_module(f"kvtuner_search.serving.{name}.engine"))


def engine_among(versions: Container[str]) -> str | None:
    """The engine whose package is among those that a record has versions of; None: it has none of any engine's."""
    return next((name for name in engines() if name in versions), None)
