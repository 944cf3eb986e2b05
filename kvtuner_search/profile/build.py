"""The one way from a setting to a profile: what the layers add up to is worked out here, and nowhere else. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.files import write_atomic
from kvtuner_search.profile.canonical import save, seal
from kvtuner_search.profile.fields import Measure
from kvtuner_search.profile.schema import LayerEntry, ModelInfo, ParetoPoint, Profile, Provenance
from kvtuner_search.profile.storage import storage_of


def build(
    name: str,
    layers: Sequence[LayerSpec],
    model: ModelInfo,
    provenance: Provenance,
    *,
    quality: Sequence[Measure] = (),
    pareto: Sequence[ParetoPoint] = (),
    transforms: bytes | None = None,
) -> Profile:
    """A sealed profile.

    Args:
        name: of the profile; its transforms file is ``NAME.safetensors``.
        layers: one LayerSpec a layer, in order.
        model: what the profile belongs to.
        provenance: where it comes from.
        quality: what was measured.
        pareto: the front, cheapest first.
        transforms: bytes of the transforms file (``kvtuner_search.transforms.centres_file``), if a tensor is centred or in bands.

    Raises:
        LayoutError: if a layer cannot be stored.
        ProfileError: if the parts do not make a profile.

    Example:
        >>> from kvtuner_search.profile.canonical import load
        >>> model = load(Path("profiles/reference/reference-4.00bit.json")).model
        >>> provenance = Provenance(origin="uniform", tool="example")
        >>> profile = build("k8v4", [LayerSpec.parse("8-g64-asym/4-g64-asym")] * model.num_layers, model, provenance)
        >>> write(profile, Path("."))
        PosixPath('k8v4.json')
    """
    content = {
        "name": name,
        "model": model.model_dump(),
        "layers": [LayerEntry.of(layer).model_dump() for layer in layers],
        "storage": storage_of(list(layers), model.num_kv_heads, model.head_dim, model.kinds).model_dump(),
        "quality": [measure.model_dump() for measure in quality],
        "pareto": [point.model_dump() for point in pareto],
        "provenance": provenance.model_dump(),
    }
    if transforms is not None:
        content["transforms"] = {
            "file": f"{name}.safetensors",
            "digest": "sha256:" + hashlib.sha256(transforms).hexdigest(),
        }
    return seal(content)


def write(profile: Profile, folder: Path, transforms: bytes | None = None) -> Path:
    """Write ``NAME.json``, and before it the transforms file that it names; returns the profile's path.

    Raises:
        UsageError: if the folder cannot be written to.
    """
    if profile.transforms is not None and transforms is not None:
        write_atomic(folder / profile.transforms.file, transforms)
    path = folder / f"{profile.name}.json"
    save(profile, path)
    return path
