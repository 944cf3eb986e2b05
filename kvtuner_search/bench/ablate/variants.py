"""The rows of an ablation: every way of storing the cache that is compared, by name. No torch.

A row changes one thing against the anchor of its bits: asymmetric, one scale and minimum a token and head, every token stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from kvtuner_kernels.layout import CODE_BITS, GROUP_SIZES, UNIFORM_BITS, LayerSpec, LayoutError, TensorSpec
from kvtuner_search.errors import UsageError
from kvtuner_search.profile.presets import ModelShape, per_token, published

Family = Literal[
    "bits", "symmetric", "group size", "centring", "per-channel keys", "residual window", "published", "profile"
]
FAMILIES: Final[tuple[Family, ...]] = (
    "bits", "symmetric", "group size", "centring", "per-channel keys", "residual window", "published", "profile",
)  # fmt: skip
BASELINE: Final = "16 bit"
NARROW: Final = CODE_BITS[-2::-1]  # all but the widest, which loses too little to tell ways of storing apart
TOKEN_GROUP: Final = 32  # tokens that share a channel's scale, as in KIVI (Liu et al., ICML 2024)
WINDOWS: Final = (32, 128)  # newest tokens that are left in 16 bits
KIVI_WINDOW: Final = 128  # residual length of KIVI


@dataclass(frozen=True)
class Scheme:
    """A format that layout version 1 cannot store, the same in every layer: per-channel keys, and newest tokens left in 16 bits.

    With ``n`` tokens in the cache, the newest one included, the oldest ``quantized_keys(n)`` keys and ``quantized_values(n)`` values are
    quantized and the others are kept as computed.
    """

    key: TensorSpec  # per-token spec; with token_group only its bits count
    value: TensorSpec
    token_group: int = 0  # tokens of a channel that share scale and minimum; 0: keys are per token
    key_block: int = 1  # keys are quantized in blocks of this many tokens, a multiple of token_group
    window: int = 0  # newest tokens whose values, and per-token keys, stay in 16 bits

    def __post_init__(self) -> None:
        if self.token_group and (self.key_block % self.token_group or self.key.raw):
            raise LayoutError(f"blocks of {self.key_block} keys do not split into groups of {self.token_group} tokens")

    def quantized_keys(self, tokens: int) -> int:
        """Of ``tokens`` in the cache. A block of per-channel keys is quantized as soon as it is full."""
        kept = 0 if self.token_group else self.window
        return max(0, tokens - kept) // self.key_block * self.key_block

    def quantized_values(self, tokens: int) -> int:
        """Of ``tokens`` in the cache."""
        return max(0, tokens - self.window)

    def effective_bits(self, head_dim: int, context: int) -> float:
        """Stored bits per cached number, metadata and window counted: the mean over the ``key_block`` contexts up to ``context``.

        Alignment to rows is not counted: no row holds this.
        """
        shared = 2 * 16 / self.token_group if self.token_group else 0.0  # fp16 scale and minimum of a channel's group
        key = self.key.bits + shared if self.token_group else self.key.effective_bits(head_dim)
        value = self.value.effective_bits(head_dim)
        total = 0.0
        contexts = range(max(1, context - self.key_block + 1), context + 1)
        for tokens in contexts:
            keys, values = self.quantized_keys(tokens), self.quantized_values(tokens)
            total += (key * keys + value * values + 16 * (2 * tokens - keys - values)) / (2 * tokens)
        return total / len(contexts)

    def __str__(self) -> str:
        key = f"{self.key.bits}-per-channel-t{self.token_group}" if self.token_group else str(self.key)
        window = f", newest {self.window} in 16 bit" if self.window else ""
        block = f", keys in blocks of {self.key_block}" if self.key_block > max(1, self.token_group) else ""
        return f"{key}/{self.value}{window}{block}"


@dataclass(frozen=True)
class StorageVariant:
    """One row.

    Exactly one of ``setting`` and ``scheme`` is given, or neither with a ``reason``.
    """

    name: str
    family: Family
    setting: tuple[LayerSpec, ...] | None = None  # one LayerSpec a layer: packed rows hold it, so it can be served
    scheme: Scheme | None = None  # measured offline only
    reason: str = ""  # why there is nothing to measure
    profile: Path | None = None  # the file, for the user's own profiles

    @property
    def specs(self) -> str:
        """The stored format in short: the spec that all layers share, or that layers differ."""
        if self.setting is None:
            return str(self.scheme or "")
        return str(self.setting[0]) if len(set(self.setting)) == 1 else "by layer"

    @property
    def centred(self) -> bool:
        """Whether centring vectors are needed."""
        return self.setting is not None and any(
            side.centred for layer in self.setting for side in (layer.key, layer.value)
        )


def catalogue(model: ModelShape, families: Sequence[str] = FAMILIES) -> list[StorageVariant]:
    """The rows for a model, the 16-bit cache first; rows that its head_dim rules out are left out of their family.

    Raises:
        UsageError: for a family that does not exist.
    """
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is not a family of rows: choose from {', '.join(FAMILIES)}")
    rows = [StorageVariant(BASELINE, "bits", (LayerSpec(),) * model.num_layers)]
    rows += [row for row in _all(model) if row.family in families]
    return rows


def _all(model: ModelShape) -> list[StorageVariant]:
    layers, head = model.num_layers, model.head_dim

    def uniform(name: str, family: Family, key: TensorSpec, value: TensorSpec) -> StorageVariant:
        return StorageVariant(name, family, (LayerSpec(key, value),) * layers)

    rows = [
        StorageVariant(f"K{k}V{v}" if k != v else f"KV{k}", "bits", (per_token(k, v, head),) * layers)
        for k, v in UNIFORM_BITS
    ]
    for bits in CODE_BITS[::-1]:
        spec = TensorSpec(bits, head, symmetric=True)
        rows.append(uniform(f"KV{bits} symmetric", "symmetric", spec, spec))
    for bits in NARROW:
        for size in GROUP_SIZES:
            if size < head and head % size == 0:
                spec = TensorSpec(bits, size)
                rows.append(uniform(f"KV{bits} groups of {size}", "group size", spec, spec))
    for bits in NARROW:
        rows.append(
            uniform(f"KV{bits} centred keys", "centring", TensorSpec(bits, head, centred=True), TensorSpec(bits, head))
        )
    for bits in NARROW:
        spec = TensorSpec(bits, head)
        scheme = Scheme(spec, spec, token_group=TOKEN_GROUP, key_block=TOKEN_GROUP)
        rows.append(StorageVariant(f"KV{bits} per-channel keys", "per-channel keys", scheme=scheme))
    for bits in NARROW:
        spec = TensorSpec(bits, head)
        rows += [
            StorageVariant(f"KV{bits} window {window}", "residual window", scheme=Scheme(spec, spec, window=window))
            for window in WINDOWS
        ]
    for bits in NARROW:
        spec = TensorSpec(bits, 32 if head % 32 == 0 else head)
        scheme = Scheme(spec, spec, TOKEN_GROUP, KIVI_WINDOW, KIVI_WINDOW)
        rows.append(StorageVariant(f"KIVI-{bits}", "residual window", scheme=scheme))
    found = [StorageVariant(name, "published", tuple(setting)) for name, setting in published(model)]
    shape = f"{model.architecture}, {model.num_layers} layers, {model.num_kv_heads} KV heads of {head}"
    missing = StorageVariant("published presets", "published", reason=f"none is published for this model ({shape})")
    return rows + (found or [missing])
