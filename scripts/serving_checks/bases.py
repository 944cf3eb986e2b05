"""Profiles with layers in fitted bases, for checks of servers alone: they are quick to make, and their quality is no matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_kernels.places import BANDS
from kvtuner_search.profile.build import build, write
from kvtuner_search.profile.canonical import load
from kvtuner_search.profile.schema import ModelInfo, Provenance

# Bits by band that keys and values take in turn; of four layers one has both sides in a basis, two have one, and one has none.
KEYS: Final = ("b87655443", "b65444332")
VALUES: Final = ("b76655433", "b54443332")
SPEED: Final = {
    "B4": "b75544222/b65443333",
    "B3": "b54433221/b54432221",
}  # 4 and 3 words a channel of both sides
NAME: Final = "quick-pass"


def with_bases(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    """The layers of a profile, three of four with their keys, their values, or both in a fitted basis."""
    found = []
    for index, layer in enumerate(layers):
        key, value = TensorSpec.parse(KEYS[index // 4 % 2]), TensorSpec.parse(VALUES[index // 4 % 2])
        found.append(LayerSpec(key if index % 4 < 2 else layer.key, value if index % 4 in (0, 2) else layer.value))
    return found


def reference_profile(folder: Path, base: Path, prompts: Sequence[Sequence[int]]) -> Path:
    """A profile of the reference model with bases and with layers of ``base``, in ``folder``; one that is there already is used.

    Args:
        base: a profile of the reference model.
        prompts: token ids, on which bases are fitted.
    """
    from kvtuner_search.models.reference_model import reference_model_path
    from kvtuner_search.transforms import read_transforms

    path = folder / "reference-bases.json"
    if not path.exists():
        profile = load(base)
        known = read_transforms(base, profile)
        layers = with_bases(profile.layer_specs())
        fitted = fit(reference_model_path(), prompts)
        centres = {
            index: type(fitted[index])(
                *(
                    new if side.banded else old if side.centred else None
                    for side, new, old in zip((layer.key, layer.value), fitted[index], known[index], strict=True)
                )
            )
            for index, layer in enumerate(layers)
        }
        write_profile(path, profile.model, layers, centres)
    return path


def example_profile(path: Path, model: ModelInfo, layers: Sequence[LayerSpec]) -> Path:
    """A profile at ``path`` with these layers of a model, whose bases and centring vectors fit nothing; one that is there already is used."""
    import torch

    from kvtuner_kernels.warm_up import example_centres

    if not path.exists():
        each = [example_centres(spec, model.num_kv_heads, model.head_dim, torch.device("cpu")) for spec in layers]
        write_profile(path, model, layers, dict(enumerate(each)))
    return path


def write_profile(path: Path, model: ModelInfo, layers: Sequence[LayerSpec], centres: Mapping[int, Any]) -> None:
    """A profile, and its transforms file beside it."""
    from kvtuner_search.transforms import centres_file

    data = centres_file(tuple(layers), centres)
    provenance = Provenance(origin="uniform", tool="scripts/check_serving")
    write(build(path.stem, layers, model, provenance, transforms=data), path.parent, data)


def fit(model: Path, prompts: Sequence[Sequence[int]]) -> dict[int, Any]:
    """A basis for each side of each layer, from one pass over the prompts: principal components, nothing of what the model makes of them.

    Returns:
        by layer, ``kvtuner_kernels.reference.Centres`` with two basis tensors fp32 [H, D + 2, D].
    """
    import torch
    from torch import Tensor
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface

    from kvtuner_kernels.reference import Centres

    seen: dict[int, list[Tensor]] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        seen.setdefault(module.layer_idx, []).append(torch.stack([key[0], value[0]]).transpose(1, 2))  # [2, T, H, D]
        group = query.shape[1] // key.shape[1]
        key, value = (side.repeat_interleave(group, 1) for side in (key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=NAME)
    loaded.eval()
    with torch.inference_mode():
        for prompt in prompts:
            loaded(input_ids=torch.tensor([list(prompt)]), use_cache=False)
    found = {}
    for layer, parts in seen.items():
        first = torch.stack([part[:, 0] for part in parts], 1)  # [2, prompts, H, D]
        others = torch.cat([part[:, 1:] for part in parts], 1)  # [2, tokens, H, D]
        found[layer] = Centres(*(_basis(first[side], others[side]) for side in (0, 1)))
    return found


def _basis(first: Any, others: Any) -> Any:
    """Principal components of tokens [N, H, D], largest first, turned within each band, which has a mean square of 1."""
    import torch

    from kvtuner_kernels.bands import join_basis
    from kvtuner_kernels.reference import rotate

    head_dim = others.shape[-1]
    unit = head_dim // BANDS
    apart = others - others.mean(0)
    spread = torch.einsum("nhi,nhj->hij", apart, apart) / len(apart)
    spread += 1e-3 * torch.diag_embed(spread.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).expand(-1, head_dim))
    worth, vectors = torch.linalg.eigh(spread)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = vectors * largest.sign()  # which is up to the library
    scale = worth.flip(-1).view(-1, BANDS, unit).mean(-1).sqrt().repeat_interleave(unit, -1)
    turn = torch.nn.functional.normalize(rotate(torch.eye(unit)))
    matrix = torch.kron(torch.eye(BANDS), turn) @ vectors.flip(-1).mT / scale.unsqueeze(-1)
    return join_basis(matrix, others.mean(0), first.mean(0))
