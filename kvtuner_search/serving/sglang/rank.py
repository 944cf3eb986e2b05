"""A rank's part of the profile, for all versions of SGLang: its layers, heads, pool and report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch

from kvtuner_kernels.layout import LAYOUT_VERSION, LayerSpec, bytes_per_token
from kvtuner_kernels.reference import Centres
from kvtuner_search import __version__
from kvtuner_search.errors import NotComparableError, ServingError, UsageError
from kvtuner_search.profile.schema import Profile
from kvtuner_search.serving.capacity import basis_bytes
from kvtuner_search.serving.configuration import ServingConfiguration
from kvtuner_search.serving.sglang.agreement import RankReport, check, exchange
from kvtuner_search.serving.sglang.kinds import check_layers, check_pools
from kvtuner_search.serving.sglang.pool import PackedPool, local_heads
from kvtuner_search.transforms import load_centres


@dataclass(frozen=True)
class ServedProfile:
    """The profile that this process serves."""

    configuration: ServingConfiguration
    profile: Profile
    layers: list[LayerSpec]  # of the whole model
    centres: dict[int, Centres]  # vectors and bases, fp32 on the CPU, all KV heads, by global layer


@cache
def served_profile(configuration: ServingConfiguration) -> ServedProfile:
    """Read the profile; once a process.

    Raises:
        ProfileError: if it cannot be used, or is not the one that the server was started with.
    """
    profile, data = configuration.open()
    layers = profile.layer_specs()
    return ServedProfile(configuration, profile, layers, {} if data is None else load_centres(data, len(layers)))


@dataclass(frozen=True)
class RankPlace:
    """A rank's place, as SGLang's model runner knows it."""

    start_layer: int  # global index of the first local layer
    end_layer: int  # one past the last
    num_layers: int  # of the whole model
    kv_heads: int  # of the whole model
    head_dim: int
    value_head_dim: int
    rank: int  # among the ranks that share the KV heads
    ranks: int
    dtype: torch.dtype  # of the model
    cache_dtype: torch.dtype  # dtype that SGLang would store
    device: str  # cuda or cpu
    as_stored: bool  # the backend reads a prompt's own keys and values as stored, requested or not
    windowed: tuple[int, ...] | None = (
        None  # global layers whose pool keeps a window only; None: one pool for all layers
    )

    @property
    def heads(self) -> slice:
        """The KV heads of this rank."""
        return local_heads(self.kv_heads, self.rank, self.ranks)

    @property
    def local_heads(self) -> int:
        """Their number."""
        return self.heads.stop - self.heads.start


def check_place(place: RankPlace, which: ServedProfile) -> None:
    """Refuse a loaded model that the profile does not belong to.

    Raises:
        NotComparableError: if the shapes differ.
        UsageError: if the model's cache is not plain keys and values in 16 bits.
    """
    model = which.profile.model
    for name, stated, actual in (
        ("num_layers", model.num_layers, place.num_layers),
        ("num_kv_heads", model.num_kv_heads, place.kv_heads),
        ("head_dim", model.head_dim, place.head_dim),
        ("head_dim of values", model.head_dim, place.value_head_dim),
    ):
        if stated != actual:
            raise NotComparableError(
                f"profile {which.profile.name} is for {name}={stated}, the loaded model has {actual}: it belongs to another"
                " model; use that model, or calibrate this one"
            )
    if place.cache_dtype != place.dtype:
        raise UsageError(
            f"the model is {place.dtype} and SGLang would store {place.cache_dtype}: its checkpoint requests another cache format; serve"
            " it without a profile"
        )
    raw = any(side.raw for layer in which.layers for side in (layer.key, layer.value))
    if place.dtype.itemsize != 2 and (raw or place.device != "cpu"):
        raise UsageError(
            f"--dtype {place.dtype}: on a GPU, and if a side is stored raw, a profile needs a model of 16 bits; give --dtype"
            " bfloat16 or float16"
        )
    if place.kv_heads % place.ranks and place.ranks % place.kv_heads:
        raise UsageError(f"{place.kv_heads} KV heads do not divide among {place.ranks} ranks: choose another --tp-size")


def rank_bytes_per_token(place: RankPlace, which: ServedProfile) -> int:
    """Bytes that this rank stores for one token, including metadata and padding.

    Raises:
        NotComparableError, UsageError: as :func:`check_place`.
    """
    check_place(place, which)
    return bytes_per_token(which.layers[place.start_layer : place.end_layer], place.local_heads, place.head_dim)


def rank_window_bytes(place: RankPlace, which: ServedProfile) -> int:
    """The part of :func:`rank_bytes_per_token` that belongs to layers whose pool keeps a window only."""
    return bytes_per_token([which.layers[index] for index in place.windowed or ()], place.local_heads, place.head_dim)


def check_windows(place: RankPlace) -> None:
    """Refuse a rank that SGLang's two pools do not fit.

    Raises:
        UsageError: if one of them would have no layer.
    """
    if place.windowed is not None and not 0 < len(place.windowed) < place.end_layer - place.start_layer:
        raise UsageError(
            f"layers {place.start_layer} to {place.end_layer - 1} {'all' if place.windowed else 'do not'} have windows, so one of"
            " SGLang's two pools would be empty: choose another --pp-size, or give --disable-hybrid-swa-memory"
        )


def check_attention(loaded: Any, text_config: Any, context: int, place: RankPlace, which: ServedProfile) -> None:
    """Compare what the loaded model attends to with the profile.

    Args:
        loaded: SGLang's model.
        text_config: the decoder's config, as SGLang reads it.
        context: most tokens of a sequence.
        place: this rank's layers.
        which: the profile.

    Raises:
        ServingError: names the first layer that differs.
    """
    layers = range(place.start_layer, place.end_layer)
    cap = getattr(text_config, "attn_logit_softcapping", None)
    sinks = getattr(text_config, "model_type", None) == "gpt_oss"
    check_layers(loaded, which.profile.model.kinds, layers, context, cap, sinks)
    if place.windowed is not None:
        check_pools(loaded, {layer: layer in place.windowed for layer in layers})


def rank_basis_bytes(place: RankPlace, which: ServedProfile) -> int:
    """Bytes that this rank's bases will take on its device, beside the rows."""
    return basis_bytes(which.layers[place.start_layer : place.end_layer], place.local_heads, place.head_dim)


def pool_factory(place: RankPlace, which: ServedProfile) -> Callable[..., PackedPool]:
    """A function that makes this rank's pool; it stands in for SGLang's pool class and is called with its arguments."""

    def make(size: int, **named: Any) -> PackedPool:
        layers = which.layers[place.start_layer : place.end_layer]
        return PackedPool(size, layers=layers, centres=which.centres, heads=place.heads, **named)

    return make


def swa_pool_factory(which: ServedProfile, heads: slice) -> Callable[..., Any]:
    """As :func:`pool_factory`, for SGLang's two pools of layers that keep all tokens and of layers that keep a window."""
    from kvtuner_search.serving.sglang.swa_pool import PackedSWAPool

    def make(**named: Any) -> PackedSWAPool:
        return PackedSWAPool(layers=which.layers, centres=which.centres, heads=heads, **named)

    return make


_reports: list[RankReport] = []  # this rank's, once its pool is there


def reported() -> RankReport:
    """What this rank serves."""
    return _reports[0]


def check_own(pool: Any, backend: Any = None) -> None:
    """Check that this rank's pool and, if it exists, attention backend are ours.

    Raises:
        ServingError: if one is not.
    """
    from kvtuner_search.serving.sglang.attention import PackedTorchBackend, PackedTritonBackend
    from kvtuner_search.serving.sglang.swa_pool import PackedSWAPool

    for what, found, ours in (
        ("cache", pool, (PackedPool, PackedSWAPool)),
        ("attention", backend, (PackedTorchBackend, PackedTritonBackend)),
    ):
        if found is not None and not isinstance(found, ours):
            raise ServingError(
                f"a rank has SGLang's {type(found).__name__} for its {what}, not one that serves the profile: another"
                " plugin, or an option, chose it; remove it, or serve without a profile"
            )


def check_ranks(pool: Any, tokens: int, place: RankPlace, which: ServedProfile, rank: int, world: int) -> None:
    """Check this rank's pool, and compare it with all others'.

    Args:
        pool: what SGLang made.
        tokens: the capacity that SGLang reports.
        place: the rank's layers and heads.
        which: the profile that it serves.
        rank: among all ``world`` ranks.

    Raises:
        ServingError: if the pool is not ours, has other bytes or tokens than the profile gives, or another rank differs.
    """
    check_own(pool)
    nbytes = pool.row_bytes()
    if pool.size != tokens or nbytes != pool.predicted_bytes():
        raise ServingError(
            f"rank {rank} has {nbytes} bytes for {pool.size} tokens, but the profile predicts {pool.predicted_bytes()} bytes for"
            f" {tokens}: report this"
        )
    mine = RankReport(
        rank=rank,
        profile_digest=which.profile.digest,
        layout_version=LAYOUT_VERSION,
        as_stored=which.configuration.as_stored or place.as_stored,
        tool=f"kvtuner-search {__version__}",
        sglang=metadata.version("sglang"),
        layers=(place.start_layer, place.end_layer),
        heads=(place.heads.start, place.heads.stop),
        bytes_per_token=rank_bytes_per_token(place, which),
        tokens=tokens,
        pool_bytes=nbytes,
        window_tokens=None if place.windowed is None else pool.size_swa,
        window_bytes_per_token=rank_window_bytes(place, which),
    )
    model = which.profile.model
    check(exchange(mine, world), model.num_layers, model.num_kv_heads)
    _reports[:] = [mine]
