"""A tap that replaces keys and values by what attention would read back from a quantized cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_kernels.reference import NO_CENTRES, Centres, as_stored

Setting = tuple[LayerSpec, ...]  # one LayerSpec a layer

MEAN_ROW: Final = -2  # of a basis tensor (kvtuner_kernels.bands.join_basis)
_MOVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> device -> its copy there


def transform_of(spec: TensorSpec, tensor: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    """What a side's spec needs of what calibration holds for the side: the basis, a centring vector, or nothing.

    Args:
        spec: of the side.
        tensor: fp32 [H, D + 2, D], a basis, whose mean is the centring vector; or fp32 [H, D], a centring vector alone.
        device: where it is wanted. The same tensor comes back every time, since what follows from a basis is worked out once a tensor.
    """
    if not spec.fitted or tensor is None:
        return None
    if spec.banded or tensor.dim() == 2:
        return tensor if device is None or device == tensor.device else _on(tensor, device)
    mean = tensor[:, MEAN_ROW]
    return mean if device is None else mean.to(device)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    copies: dict[torch.device, Tensor] = _MOVED.setdefault(tensor, {})  # type: ignore[no-untyped-call]
    if device not in copies:
        copies[device] = tensor.to(device)
    return copies[device]


def first_tokens(key: Tensor) -> Tensor:
    """bool [B, T]: the first token of each sequence of keys [B, T, H, D] that begin at position 0."""
    return (torch.arange(key.shape[1], device=key.device) == 0).expand(key.shape[:2])


class StoredCache:
    """Tap: every key and value is quantized and read back as the setting says. Sequences begin at position 0.

    Args:
        specs: LayerSpec by layer index; layers that are missing stay as they are.
        centres: by layer index, what the sides that are centred or banded need (see transform_of).
    """

    def __init__(self, specs: Mapping[int, LayerSpec], centres: Mapping[int, Centres]) -> None:
        self.specs, self.centres = specs, centres

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        spec = self.specs.get(layer)
        if spec is None:
            return key, value
        centres, first = self.centres.get(layer, NO_CENTRES), first_tokens(key)
        return (
            as_stored(key, spec.key, transform_of(spec.key, centres.key, key.device), first=first),
            as_stored(value, spec.value, transform_of(spec.value, centres.value, value.device), first=first),
        )


def stored_cache(setting: Sequence[LayerSpec], centres: Mapping[int, Centres]) -> StoredCache:
    """The tap for a whole setting."""
    return StoredCache(dict(enumerate(setting)), centres)


def centres_file(setting: Sequence[LayerSpec], centres: Mapping[int, Centres]) -> bytes:
    """Bytes of the safetensors file with what the setting needs, named ``layers.{i}.key|value``: centring vectors fp32 [H, D] and bases
    fp32 [H, D + 2, D]."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for index, spec in enumerate(setting):
        for name, side, centre in (
            ("key", spec.key, centres.get(index, NO_CENTRES).key),
            ("value", spec.value, centres.get(index, NO_CENTRES).value),
        ):
            needed = transform_of(side, centre)
            if side.fitted:
                assert needed is not None, f"layer {index} has no transform for its {name}s"
                tensors[f"layers.{index}.{name}"] = needed.cpu().contiguous()
    return save(tensors, metadata={"format": "pt"})


def load_centres(data: bytes, layers: int) -> dict[int, Centres]:
    """The inverse of centres_file, by layer index."""
    from safetensors.torch import load

    tensors = load(data)
    return {i: Centres(tensors.get(f"layers.{i}.key"), tensors.get(f"layers.{i}.value")) for i in range(layers)}
