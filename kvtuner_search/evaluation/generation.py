"""Greedy generation over a cache that is stored as a profile says: every token's key and value goes through the packed bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kvtuner_kernels.layout import TensorSpec
from kvtuner_kernels.reference import NO_CENTRES, Centres, dequantize, pack, quantize, unpack
from kvtuner_search.evaluation.stored import Setting
from kvtuner_search.models.runner import Runner

Stop = Callable[[int, Sequence[int]], bool]  # (prompt index, tokens generated so far) -> whether that prompt is done


def _through_bytes(x: Tensor, spec: TensorSpec, centre: Tensor | None) -> Tensor:
    """``x`` [B, T, H, D] packed as a server packs it, and read back in its own dtype. 16 bits stay as they are, as in the scorer."""
    if spec.raw:
        return x
    centre = centre.to(x.device) if centre is not None and spec.centred else None
    segment = spec.segment(x.shape[-1])
    found = quantize(x, spec, centre)
    codes = unpack(pack(found.codes, spec.bits, segment), spec.bits, segment)
    return dequantize(found._replace(codes=codes), spec, centre).to(x.dtype)


class PackedCache:
    """Tap: packs the keys and values that it is given, and returns those of every token up to them as they are read back.

    Bytes that were written never change, so what was read back once is kept instead of being unpacked again at every step.

    Args:
        setting: one LayerSpec a layer.
        centres: centring vectors by layer, for the layers whose specs are centred.
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
        keys[row, at] = _through_bytes(key, spec.key, centres.key)
        values[row, at] = _through_bytes(value, spec.value, centres.value)
        count = int(at.max()) + 1
        if count == at.shape[1]:
            return keys[:, :count], values[:, :count]  # whole prompts: plain causal attention
        # What lies after a query is not written yet, or is the padding of a prompt.
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
    """The most likely token after each prompt, again and again, the prompts as one batch.

    A prompt's own tokens read each other as stored too, as everywhere in this package. A setting of 16 bits goes the same way, so that two
    settings differ by what is stored alone.

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
