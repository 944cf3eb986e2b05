"""A tap that replaces keys and values by what attention would read back from a quantized cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import NO_CENTRES, Centres, as_stored

Setting = tuple[LayerSpec, ...]  # one LayerSpec a layer


class StoredCache:
    """Tap: every key and value is quantized and read back as the setting says.

    Args:
        specs: LayerSpec by layer index; layers that are missing stay as they are.
        centres: centring vectors by layer index, for the layers whose specs are centred.
    """

    def __init__(self, specs: Mapping[int, LayerSpec], centres: Mapping[int, Centres]) -> None:
        self.specs, self.centres = specs, centres

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        spec = self.specs.get(layer)
        if spec is None:
            return key, value
        centres = self.centres.get(layer, NO_CENTRES)
        return (
            as_stored(key, spec.key, _on(centres.key, key) if spec.key.centred else None),
            as_stored(value, spec.value, _on(centres.value, value) if spec.value.centred else None),
        )


def _on(centre: Tensor | None, x: Tensor) -> Tensor | None:
    return None if centre is None else centre.to(x.device)


def stored_cache(setting: Sequence[LayerSpec], centres: Mapping[int, Centres]) -> StoredCache:
    """The tap for a whole setting."""
    return StoredCache(dict(enumerate(setting)), centres)


def centres_file(setting: Sequence[LayerSpec], centres: Mapping[int, Centres]) -> bytes:
    """Bytes of the safetensors file with the vectors that the setting needs, fp32 [H, D], named ``layers.{i}.key|value``."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for index, spec in enumerate(setting):
        for name, side, centre in (
            ("key", spec.key, centres.get(index, NO_CENTRES).key),
            ("value", spec.value, centres.get(index, NO_CENTRES).value),
        ):
            if side.centred:
                assert centre is not None, f"layer {index} has no centre for its {name}s"
                tensors[f"layers.{index}.{name}"] = centre.cpu().contiguous()
    return save(tensors, metadata={"format": "pt"})


def load_centres(data: bytes, layers: int) -> dict[int, Centres]:
    """The inverse of centres_file, by layer index."""
    from safetensors.torch import load

    tensors = load(data)
    return {i: Centres(tensors.get(f"layers.{i}.key"), tensors.get(f"layers.{i}.value")) for i in range(layers)}
