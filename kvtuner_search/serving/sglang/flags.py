"""The options that name a server's storage: a profile, or the adapter's flags for one setting in all layers. No torch.

``kvtuner-search serve`` and the SGLang command line that the plugin extends share this one table. The adapter's flags become a
profile file of their own, so that everything behind them knows one way only.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvtuner_kernels.layout import BITS, GROUP_SIZES, LayerSpec, LayoutError, TensorSpec
from kvtuner_search import __version__
from kvtuner_search.errors import UsageError
from kvtuner_search.files import write_atomic
from kvtuner_search.profile.build import build
from kvtuner_search.profile.canonical import dumps, read_limited
from kvtuner_search.profile.checks import check_model
from kvtuner_search.profile.schema import ModelInfo, Profile, Provenance
from kvtuner_search.serving.configuration import ServingConfiguration, load

PROFILE: Final = "--kvtuner-profile"
AS_STORED: Final = "--kvtuner-as-stored"
ENABLE: Final = "--enable-kvtuner-quant"


def _boolean(text: str) -> bool:
    """``true`` or ``false``, as the adapter's own commands also wrote it."""
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


@dataclass(frozen=True)
class Flag:
    """One option. None in the namespace means that it was not given."""

    name: str
    help: str
    kind: Callable[[str], Any] | None = None  # None: a switch without a value
    choices: tuple[int, ...] | None = None
    bare: bool | None = None  # what the option means when it is given without its value
    metavar: str = ""

    @property
    def dest(self) -> str:
        """The name in an argparse namespace."""
        return self.name.lstrip("-").replace("-", "_")


FLAGS: Final = (
    Flag(PROFILE, "Profile that says how each layer's keys and values are stored.", str, metavar="FILE"),
    Flag(AS_STORED, "Read a prompt's own keys and values as stored too, as decode does; for measuring, slower."),
    Flag(ENABLE, "Store all layers alike, as the options below say, instead of a profile."),
    Flag("--kvtuner-nbits-key", "Bits of a key.  [default: 4]", int, BITS),
    Flag("--kvtuner-nbits-value", "Bits of a value.  [default: 4]", int, BITS),
    Flag("--kvtuner-asym", "Store scale and minimum of a group.  [default: the scale alone, symmetric]", _boolean,
         bare=True, metavar="true|false"),
    Flag("--kvtuner-q-group-size", "Channels that share one scale; -1 for all of a head.  [default: 64]", int, metavar="N"),
    Flag("--kvtuner-axis-key", "0: a scale per token. 1, per channel, is not served yet.  [default: 0]", int, (0, 1)),
    Flag("--kvtuner-axis-value", "0: a scale per token. 1, per channel, is not served yet.  [default: 0]", int, (0, 1)),
    Flag("--kvtuner-residual-length", "Newest tokens left unquantized; more than 0 is not served yet.  [default: 0]", int,
         metavar="N"),
)  # fmt: skip
_UNIFORM: Final = FLAGS[3:]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every flag to an argparse parser, each None unless it is given."""
    group = parser.add_argument_group("kvtuner-search")
    for flag in FLAGS:
        if flag.kind is None:
            group.add_argument(flag.name, action="store_const", const=True, help=flag.help)
        else:
            optional: dict[str, Any] = {} if flag.bare is None else {"nargs": "?", "const": flag.bare}
            metavar = flag.metavar or None
            group.add_argument(
                flag.name, type=flag.kind, choices=flag.choices, metavar=metavar, help=flag.help, **optional
            )


def requested(arguments: argparse.Namespace) -> bool:
    """Whether a profile, or the adapter's flags, were given.

    Raises:
        UsageError: if both were, or flags that have no effect without others.
    """
    given = [flag.name for flag in _UNIFORM if getattr(arguments, flag.dest) is not None]
    enabled = bool(arguments.enable_kvtuner_quant)
    if arguments.kvtuner_profile is not None and (enabled or given):
        raise UsageError(f"{PROFILE} and {ENABLE if enabled else given[0]} both say how layers are stored: give one")
    if given and not enabled:
        raise UsageError(f"{given[0]} is given without {ENABLE}: add it, or the cache would stay unquantized")
    if arguments.kvtuner_as_stored and not enabled and arguments.kvtuner_profile is None:
        raise UsageError(f"{AS_STORED} is given without a profile: add {PROFILE} or {ENABLE}")
    return enabled or arguments.kvtuner_profile is not None


def profile_of(arguments: argparse.Namespace, model: ModelInfo, source: str) -> tuple[Profile, Path]:
    """The profile that the flags request, and its present or future file. Nothing is written.

    Args:
        arguments: a namespace for which :func:`requested` is true.
        model: the model that is served.
        source: what error messages call that model.

    Raises:
        ProfileError: if the profile or its transforms file cannot be used.
        NotComparableError: if it belongs to another model.
        UsageError: if the flags request something that cannot be served.
    """
    if arguments.kvtuner_profile is None:
        profile = _uniform(arguments, model)
        return profile, _cache() / f"{profile.name}-{profile.digest[7:23]}.json"
    path = Path(arguments.kvtuner_profile)
    profile, _ = load(path)
    check_model(profile, model, source)
    return profile, path.absolute()


def resolve(arguments: argparse.Namespace, model: ModelInfo, source: str) -> ServingConfiguration | None:
    """The configuration for every process of the server, or None if the flags request nothing. Writes a uniform setting's profile.

    Raises:
        KVTunerError: as :func:`requested` and :func:`profile_of`, or if the uniform profile cannot be written.
    """
    if not requested(arguments):
        return None
    profile, path = profile_of(arguments, model, source)
    if arguments.kvtuner_profile is None:
        save_profile(profile, path)
    return ServingConfiguration(str(path), profile.digest, bool(arguments.kvtuner_as_stored))


def _uniform(arguments: argparse.Namespace, model: ModelInfo) -> Profile:
    """The adapter's flags as a profile. It has nothing of the machine in it, so that all nodes get the same digest."""
    for flag in _UNIFORM:
        value = getattr(arguments, flag.dest)
        if flag.name.startswith("--kvtuner-axis") and value == 1:
            raise UsageError(f"{flag.name} 1 (a scale per channel) is not served yet: use 0 (a scale per token)")
    if arguments.kvtuner_residual_length:
        raise UsageError(
            f"--kvtuner-residual-length {arguments.kvtuner_residual_length} (newest tokens left unquantized) is not served"
            " yet: use 0"
        )
    group = 64 if arguments.kvtuner_q_group_size is None else arguments.kvtuner_q_group_size
    if group == 0 or group < -1:
        raise UsageError(
            f"--kvtuner-q-group-size {group} is not a group size: use {', '.join(map(str, GROUP_SIZES))}, or -1 for all of a head"
        )
    symmetric = not arguments.kvtuner_asym
    key, value = (
        TensorSpec() if bits == 16 else TensorSpec(bits, model.head_dim if group == -1 else group, symmetric)
        for bits in (
            4 if given is None else given for given in (arguments.kvtuner_nbits_key, arguments.kvtuner_nbits_value)
        )
    )
    layers = [LayerSpec(key, value)] * model.num_layers
    nameless = model.model_copy(update={"id": model.architecture, "revision": None})
    provenance = Provenance(
        origin="uniform",
        tool=f"kvtuner-search {__version__}",
        notes=["Made from the options of a server. Nothing was measured."],
    )
    try:
        return build(f"uniform-k{key}-v{value}", layers, nameless, provenance)
    except LayoutError as error:
        raise UsageError(f"these flags cannot be stored: {error}") from error


def _cache() -> Path:
    """The folder for profiles made from flags."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache").absolute() / "kvtuner-search" / "profiles"
    except RuntimeError as error:
        raise UsageError("there is no home folder for a profile made from flags: set XDG_CACHE_HOME") from error


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile that was made from flags, unless its file exists and is valid.

    Raises:
        UsageError: if the folder cannot be written to.
    """
    text = dumps(profile)
    if not path.is_file() or read_limited(path) != text.encode():
        write_atomic(path, text)
