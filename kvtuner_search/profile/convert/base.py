"""Shared by all formats: parsing, rounding to storable settings, and lists of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvtuner_kernels.layout import BITS, GROUP_SIZES, LayerSpec, LayoutError, TensorSpec
from kvtuner_search.errors import DataError, ExitCode, KVTunerError
from kvtuner_search.profile.canonical import MAX_DEPTH, parse_json
from kvtuner_search.profile.capacity import kinds_line
from kvtuner_search.profile.schema import ModelInfo, Profile
from kvtuner_search.profile.text import ranges, runs

MAX_SOURCE: Final = 2**20  # bytes; a preset of 128 layers has about 6 KB


class LossyError(KVTunerError):
    """A conversion would lose something, and that was not allowed."""

    exit_code = ExitCode.GATE_FAILED


@dataclass(frozen=True)
class Source:
    """A file to import."""

    name: str  # file name without folders
    content: Any  # parsed
    model: ModelInfo
    scheme: str | None  # --scheme


@dataclass
class Imported:
    """The layers that a file describes, as closely as a profile can."""

    layers: list[LayerSpec]
    lost: list[str] = field(default_factory=list)  # what a profile cannot express
    notes: list[str] = field(default_factory=list)  # what a reader should know, though nothing is lost


@dataclass
class Exported:
    """The file that describes a profile, as closely as the format can."""

    text: str
    lost: list[str] = field(default_factory=list)  # what the format cannot express
    notes: list[str] = field(default_factory=list)


def kinds_notes(profile: Profile) -> list[str]:
    """What a reader of an exported file should know if the model has layers with windows or chunks: no format names them."""
    if profile.model.layer_kinds is None:
        return []
    return [f"{kinds_line(profile)}: the format does not say so, an engine takes it from the model's config.json"]


def parse(data: bytes, source: str) -> Any:
    """JSON if it starts with a brace, else YAML without aliases or duplicate keys.

    Raises:
        DataError: if it is neither.
    """
    if data.lstrip()[:1] == b"{":
        return parse_json(data, source)
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses YAML features that a settings file does not need and that can make a small file huge."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases are not read")
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise yaml.YAMLError(f"it nests deeper than {MAX_DEPTH} levels")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            mapping = super().construct_mapping(node, deep=deep)
            if len(mapping) != len(node.value):
                raise yaml.YAMLError(f"a key is given twice in the mapping at line {node.start_mark.line + 1}")
            return mapping

    try:
        return yaml.load(data.decode("utf-8"), Loader)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source} is not valid YAML: {reason[:300]}: restore the file") from error


def mapping(content: Any, what: str, source: str) -> dict[Any, Any]:
    """``content`` if it is a mapping.

    Raises:
        DataError: if not.
    """
    if not isinstance(content, dict):
        raise DataError(f"{source}: {what} is a {type(content).__name__}, not a mapping: check the file and --from")
    return content


def integer(value: Any, what: str, source: str, low: int, high: int) -> int:
    """``value`` if it is an integer in the range.

    Raises:
        DataError: if not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise DataError(
            f"{source}: {what}={str(value)[:40]!r} is not an integer from {low} to {high}: restore the file"
        )
    return value


def round_bits(bits: int) -> int:
    """The fewest bits that can be stored and are not fewer than ``bits``."""
    return next(width for width in BITS if width >= bits)


def nearest_group(group_size: int, head_dim: int) -> int:
    """The largest storable group that is no larger, or else the smallest storable one."""
    storable = [size for size in {*GROUP_SIZES, head_dim} if head_dim % size == 0]
    return max((size for size in storable if size <= group_size), default=min(storable))


def tensor(bits: int, group_size: int, head_dim: int, source: str, *, symmetric: bool = False) -> TensorSpec:
    """A spec that fits the head.

    Raises:
        DataError: if the head cannot be stored that way.
    """
    spec = TensorSpec() if bits == 16 else TensorSpec(bits, group_size, symmetric)
    try:
        spec.check(head_dim)
    except LayoutError as error:
        raise DataError(f"{source}: {error}") from error
    return spec


def changes(profile: Profile, layers: Sequence[LayerSpec]) -> list[str]:
    """How a profile's tensors change, one line for each kind of change, unchanged ones left out; features that no other format has come first."""
    lines = []
    banded = sum(layer.key.banded or layer.value.banded for layer in profile.layer_specs())
    if banded:
        lines.append(
            f"fitted basis and bands of {banded} layer{'s' if banded > 1 else ''}, and the points that their first tokens are stored relative to"
        )
    for part in ("key", "value"):
        before: list[TensorSpec] = [getattr(layer, part) for layer in profile.layer_specs()]
        after: list[TensorSpec] = [getattr(layer, part) for layer in layers]
        for indices, (old, new) in runs(list(zip(before, after, strict=True))):
            if old != new:
                lines.append(f"{part}s of layers {ranges(indices)}: {old} becomes {new}")
    return lines


def widest(spec: TensorSpec) -> int:
    """The fewest bits that can be stored without a basis and give no channel fewer."""
    return round_bits(max(spec.bands, default=spec.bits))


def one_for_all(profile: Profile, make: Callable[[int, int], TensorSpec]) -> TensorSpec:
    """One spec for all tensors of a profile: the widest bits below 16 and the finest groups in use.

    Widening costs memory, narrowing would cost quality; 16 bits are narrowed only because the format has no room for them. A
    banded tensor counts as one of its widest band's bits, with one group of all channels.
    """
    specs = [spec for layer in profile.layer_specs() for spec in (layer.key, layer.value)]
    quantized = [spec for spec in specs if not spec.raw]
    if not quantized:
        return TensorSpec()
    groups = [profile.model.head_dim if spec.banded else spec.group_size for spec in quantized]
    return make(max(map(widest, quantized)), min(groups))
