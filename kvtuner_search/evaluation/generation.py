"""Greedy generation over a cache stored as a profile says: every token's key and value goes through the packed bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kvtuner_kernels.bands import (
    BandCodes,
    basis,
    check_basis,
    dequantize_bands,
    from_basis,
    is_first,
    pack_bands,
    quantize_bands,
    to_basis,
    unpack_bands,
)
from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_kernels.reference import NO_CENTRES, Centres, dequantize, pack, quantize, unpack
from kvtuner_search.evaluation.stored import Setting
from kvtuner_search.models.runner import Runner
from kvtuner_search.transforms import transform_of

Stop = Callable[[int, Sequence[int]], bool]  # (prompt index, tokens generated so far) -> whether that prompt is done


def _grouped(x: Tensor, spec: TensorSpec, centre: Tensor | None) -> Tensor:
    """``x`` [B, T, H, D] through the packed bytes of a side without bands."""
    if spec.raw:
        return x
    segment = spec.segment(x.shape[-1])
    found = quantize(x, spec, centre)
    codes = unpack(pack(found.codes, spec.bits, segment), spec.bits, segment)
    return dequantize(found._replace(codes=codes), spec, centre).to(x.dtype)


def _banded(x: Tensor, spec: TensorSpec, joined: Tensor | None, first: Tensor) -> BandCodes:
    """Codes [N, H, D] and scales [N, H] of ``x`` [B, T, H, D], ``first`` [B, T]."""
    check_basis(joined, *x.shape[-2:])
    assert joined is not None  # as just checked
    marks = first.flatten()
    return quantize_bands(to_basis(x.flatten(0, 1), basis(joined), marks), spec.bands, marks)


def _read_back(key: Tensor, value: Tensor, spec: LayerSpec, centres: Centres, first: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, T, H, D] packed as a server packs them, and read back in their own dtype. 16 bits stay as they are, as in the
    scorer; ``first`` is bool [B, T]."""
    needed = transform_of(spec.key, centres.key, key.device), transform_of(spec.value, centres.value, value.device)
    sides = list(zip((key, value), (spec.key, spec.value), needed, strict=True))
    found = [_banded(x, side, each, first) if side.banded else None for x, side, each in sides]
    # Bands of keys and values that share words are packed together.
    groups = [found] if spec.shares_words else [[found[0], None], [None, found[1]]]
    head_dim = key.shape[-1]
    packed = [pack_bands(spec, head_dim, *g) if any(each is not None for each in g) else None for g in groups]
    out = []
    for at, (x, side, each) in enumerate(sides):
        held, packed_side = found[at], packed[min(at, len(packed) - 1)]
        if held is None or packed_side is None or each is None:
            out.append(_grouped(x, side, each))
            continue
        again = unpack_bands(packed_side, spec, at, head_dim)
        y = dequantize_bands(again, side.bands)
        out.append(from_basis(y, basis(each), is_first(again.scale)).view_as(x).to(x.dtype))
    return out[0], out[1]


class PackedCache:
    """Tap: packs the given keys and values, and returns those of all tokens so far as read back.

    Written bytes never change, so values that were read back once are kept instead of being unpacked again at every step.

    Args:
        setting: one LayerSpec a layer.
        centres: by layer, the tensors of centred or banded sides (see transform_of).
        capacity: tokens of each sequence.
    """

    def __init__(self, setting: Setting, centres: Mapping[int, Centres], capacity: int) -> None:
        self.setting, self.centres, self.capacity = setting, centres, capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [B, capacity, H, D] as read back
        self._at = torch.empty(0, dtype=torch.int64)

    def begin(self, at: Tensor) -> None:
        """Announce a pass over tokens at positions int64 [B, T]."""
        self._at = at

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        if layer not in self._layers:
            shape = (len(key), self.capacity, *key.shape[2:])
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        spec, centres, at = self.setting[layer], self.centres.get(layer, NO_CENTRES), self._at.to(key.device)
        row = torch.arange(len(key), device=key.device).unsqueeze(1)
        keys[row, at], values[row, at] = _read_back(key, value, spec, centres, at == 0)
        count = int(at.max()) + 1
        if count == at.shape[1]:
            return keys[:, :count], values[:, :count]  # whole prompts: plain causal attention
        # Slots after a query are not written yet, or are the padding of a prompt.
        visible = torch.arange(count, device=key.device) <= at.unsqueeze(-1)
        return keys[:, :count], values[:, :count], visible.unsqueeze(1)


@torch.inference_mode()
def greedy(
    runner: Runner,
    setting: Setting,
    centres: Mapping[int, Centres],
    prompts: Sequence[Sequence[int]],
    count: int,
    stop: Stop = lambda index, tokens: False,
) -> list[list[int]]:
    """Greedy continuations of the prompts, computed as one batch.

    A prompt's own tokens also read each other as stored, as everywhere in this package. A setting of 16 bits takes the same path, so two
    settings differ only in what is stored.

    Args:
        prompts: token ids, at least one each.
        count: most tokens of an answer.
        stop: ends an answer early; its last token is kept.
    """
    device = runner.loaded.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)  # padded on the right: slots that answers overwrite
    for index, prompt in enumerate(prompts):
        runner.check_tokens(prompt, "a prompt")
        tokens[index, : len(prompt)] = torch.tensor(list(prompt))
    cache = PackedCache(setting, centres, width + count)
    at = torch.arange(width, device=device).expand(len(prompts), width)
    cache.begin(at)
    hidden = runner.hidden(tokens, cache)[torch.arange(len(prompts)), lengths.cpu() - 1]
    answers: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for step in range(count):
        best = runner.log_probabilities(hidden).argmax(-1)
        for index, token in enumerate(best.tolist()):
            if index in going:
                answers[index].append(token)
                if stop(index, answers[index]):
                    going.discard(index)
        if not going or step == count - 1:
            break
        at = (lengths + step).unsqueeze(1)
        cache.begin(at)
        hidden = runner.hidden(best.unsqueeze(1), cache, positions=at)[:, 0]
    return answers
