"""The attention function that lets calibration see, and replace, the keys and values of every layer.

It is registered with transformers' ``AttentionInterface`` under the name ``kvtuner``. Queries, keys and values arrive after the
rotary embedding, which is where a server stores them. The whole sequence is computed at once and attention reads every key and value as
the tap returns, the current token's included: the same as decoding token by token from a cache that holds those values.

transformers expresses windows and chunks through masks. Ours is no tensor: it is the window's size, and attention builds what it needs of the
mask from the layer's kind (:func:`mark_layers`), which must agree with that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvtuner_search.errors import DataError
from kvtuner_search.profile.kinds import FULL_KIND, LayerKind

NAME: Final = "kvtuner"
_HARMLESS: Final = ("cache_position", "position_ids", "position_embeddings")  # tensors with the tokens' positions
_KIND: Final = "kvtuner_kind"  # attribute of an attention module
_NUMBERS: Final = 2**25  # scores that are held at a time where they are computed here (128 MiB in fp32)
_ROWS: Final = (128, 1024)  # fewest and most queries that read their window's keys together


class Tap(Protocol):
    """Called once a layer and forward pass; :func:`attends` says meanwhile how the layer attends.

    ``query`` is [B, T, Hq, D], ``key`` and ``value`` are [B, T, H, D], all in the model's dtype. The result takes the place
    of key and value. Without a third tensor there are T of them and attention is causal from position 0; a third one, bool
    [B or 1, 1, T, S], says which of the S that are returned each query sees, as decoding from a cache needs it. They are those
    of positions 0 to S - 1, or of the positions in a fourth tensor, int64 [S]. What a layer's window or chunk hides stays hidden.
    """

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]: ...


class Observer(Tap, Protocol):
    """A tap that returns keys and values unchanged; ``begin`` says before each pass which tokens [B, T] are not padding."""

    def begin(self, valid: Tensor) -> None: ...


@dataclass(frozen=True)
class Attends:
    """How a layer attends: all but its queries, keys and values.

    Example:
        ``Attends(0.125).weights(scores, visible)`` is a plain softmax over what is visible.
    """

    scaling: float  # of the products of queries and keys
    kind: LayerKind = FULL_KIND
    softcap: float | None = None  # scores s become cap * tanh(s / cap)
    sinks: Tensor | None = None  # [Hq], a logit in the softmax's denominator that has no value
    local: int | None = None  # tokens of the window or chunk as transformers says; None is full attention

    @property
    def plain(self) -> bool:
        """Whether the weights are a plain softmax."""
        return self.softcap is None and self.sinks is None

    def visible(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Bool [..., T, S]: which tokens at positions int64 ``columns`` [..., S] the queries at ``rows`` [..., T] see."""
        return (columns[..., None, :] <= rows[..., None]) & self.reached(rows, columns)

    def reached(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The same without causality: which tokens the window or chunk of each query reaches."""
        rows, columns = rows[..., None], columns[..., None, :]
        if self.kind.kind == "sliding":
            return columns > rows - self.kind.window
        if self.kind.kind == "chunked":
            return columns // self.kind.window == rows // self.kind.window
        return torch.ones_like(columns <= rows)

    def first(self, row: int) -> int:
        """The first position that the query at position ``row``, and none after it, sees."""
        if self.kind.kind == "sliding":
            return max(0, row - self.kind.window + 1)
        return row // self.kind.window * self.kind.window if self.kind.kind == "chunked" else 0

    def weights(self, scores: Tensor, visible: Tensor) -> Tensor:
        """Attention weights of scaled scores fp32 [..., H, Hq/H, T, S], of which each query sees those that are ``visible`` [..., T, S]; they add
        up to less than one where a sink takes the rest."""
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(~visible, -torch.inf)
        if self.sinks is None:
            return scores.softmax(-1)
        heads, group = scores.shape[-4:-2]
        sinks = self.sinks.to(scores).view(heads, group, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]


_TAP: ContextVar[Tap | None] = ContextVar("kvtuner_tap", default=None)
_POSITIONS: ContextVar[Tensor | None] = ContextVar("kvtuner_positions", default=None)
_ATTENDS: ContextVar[Attends | None] = ContextVar("kvtuner_attends", default=None)


@contextmanager
def tapped(tap: Tap | None, positions: Tensor | None = None) -> Iterator[None]:
    """Send forward passes inside the block through ``tap``; ``positions`` int64 [B, T] are the tokens', if they are not 0 to T - 1."""
    tokens = _TAP.set(tap), _POSITIONS.set(positions)
    try:
        yield
    finally:
        _TAP.reset(tokens[0])
        _POSITIONS.reset(tokens[1])


def attends() -> Attends | None:
    """How the layer attends whose tap is being called; None outside of a tap."""
    return _ATTENDS.get()


def mark_layers(model: nn.Module, kinds: Sequence[LayerKind]) -> None:
    """Tell each attention module of a model its layer's kind; a module that was not told attends to all tokens."""
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and 0 <= layer < len(kinds):
            setattr(module, _KIND, kinds[layer])


class _Local(int):
    """What stands for a mask that hides more than later tokens: how many tokens a query sees at most."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _Local | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention from position 0; [B, H, T, D] in, [B, T, Hq, D] out. Padding on the right needs no mask."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise DataError(
            f"attention module {type(module).__name__} has no layer_idx: this architecture is not supported"
        )
    local = int(attention_mask) if isinstance(attention_mask, _Local) else sliding_window
    if query.shape[2] != key.shape[2] or isinstance(attention_mask, Tensor):
        raise DataError(
            f"layer {layer} attends with a cache or a mask: run the model without use_cache and padding on the left"
        )
    unknown = sorted(name for name, value in more.items() if isinstance(value, Tensor) and name not in _HARMLESS)
    if unknown or is_causal is False:
        what = f"with {', '.join(unknown)}" if unknown else "in both directions"
        raise DataError(f"layer {layer} attends {what}: only standard causal attention is supported")
    kind: LayerKind = getattr(module, _KIND, FULL_KIND)
    how = Attends(query.shape[-1] ** -0.5 if scaling is None else scaling, kind, softcap or None, s_aux, local)
    tap, positions = _TAP.get(), _POSITIONS.get()
    if positions is not None:
        positions = positions.to(query.device)
        query = _tempered(module, query, positions)
    visible = columns = None
    if tap is not None:
        token = _ATTENDS.set(how)
        try:
            found = tap(layer, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        finally:
            _ATTENDS.reset(token)
        key, value = found[0].transpose(1, 2), found[1].transpose(1, 2)
        visible = found[2] if len(found) > 2 else None
        columns = found[3] if len(found) > 3 else None
    length = key.shape[2]
    tokens = length if columns is None else int(columns.max()) + 1
    if local != kind.window if kind.window else (local or tokens) < tokens:
        raise DataError(
            f"layer {layer} attends {f'in a window or chunk of {local} tokens' if local else 'to all tokens'} in transformers, by"
            f" config.json it is {kind}: this architecture is not supported"
        )
    if visible is not None or (kind.window and positions is not None):
        visible = _combined(how, query.shape[2], length, positions, columns, visible, query.device)
        output = _read(how, query, key, value, visible)
    elif kind.window and kind.window < length:
        output = _windowed(how, query, key, value)
    else:
        output = _read(how, query, key, value, None)
    return output.transpose(1, 2).contiguous(), None


def _combined(
    how: Attends,
    count: int,
    length: int,
    positions: Tensor | None,
    columns: Tensor | None,
    visible: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Bool [B or 1, 1, T, S]: what a tap shows of its S keys, as far as the layer's window or chunk reaches; without a tap's word, what is causal."""
    if visible is not None and not how.kind.window:
        return visible
    rows = torch.arange(count, device=device)[None] if positions is None else positions
    if visible is None:  # keys are the queries' own
        at = torch.arange(count, device=device)
        return ((at <= at[:, None]) & how.reached(rows, rows)).unsqueeze(1)
    if columns is None:
        columns = torch.arange(length, device=device)
    return visible & how.reached(rows, columns.to(device)[None]).unsqueeze(1)


def _windowed(how: Attends, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention from position 0 that reads each block of queries' window and no other keys."""
    parts, length = [], key.shape[2]
    step = min(max(how.kind.window, _ROWS[0]), _ROWS[1])
    at = torch.arange(length, device=query.device)
    for start in range(0, length, step):
        end, first = min(start + step, length), how.first(start)
        visible = how.visible(at[start:end], at[first:end])[None, None]
        parts.append(_read(how, query[:, :, start:end], key[:, :, first:end], value[:, :, first:end], visible))
    return torch.cat(parts, 2)


def _read(how: Attends, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Attention [B, Hq, T, D] over what is ``visible`` bool [B or 1, 1, T, S]; None is causal from position 0."""
    if how.plain:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            is_causal=visible is None,
            scale=how.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    batch, heads, count, width = query.shape
    length = key.shape[2]
    grouped = query.float().reshape(batch, key.shape[1], -1, count, width)  # [B, H, Hq/H, T, D]
    k, v = key.float().unsqueeze(2), value.float().unsqueeze(2)
    at, parts = torch.arange(length, device=query.device), []
    step = max(1, _NUMBERS // (batch * heads * length))
    for start in range(0, count, step):
        end = min(start + step, count)
        upto = end if visible is None else length
        mask = at[:upto] <= at[start:end, None] if visible is None else visible[:, :, start:end].unsqueeze(1)
        scores = grouped[:, :, :, start:end] @ k[:, :, :, :upto].mT * how.scaling
        parts.append(how.weights(scores, mask) @ v[:, :, :, :upto])
    return torch.cat(parts, 3).flatten(1, 2).to(query.dtype)


def _tempered(module: nn.Module, query: Tensor, positions: Tensor) -> Tensor:
    """Llama 4 scales the queries of layers without rotary embedding by their position, which it takes for 0 to T - 1 whatever it is told."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    floor, factor = float(module.floor_scale), float(module.attn_scale)  # type: ignore[arg-type]

    def scales(at: Tensor) -> Tensor:
        return torch.log1p(torch.floor((at.float() + 1) / floor)) * factor + 1

    ratio = scales(positions) / scales(torch.arange(query.shape[2], device=query.device))
    return (query * ratio[:, None, :, None]).to(query.dtype)


def _mask(*_: Any, local_size: int | None = None, **__: Any) -> _Local | None:
    """No tensor: causality is built in, and so are windows."""
    return None if local_size is None else _Local(local_size)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
