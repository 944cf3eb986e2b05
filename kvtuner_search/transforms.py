"""Centring vectors and bases: what a profile's transforms file holds, how it is checked, read and written.

Checking takes no torch, so that ``check`` stays light: safetensors' own reader is imported in a millisecond. What needs tensors imports
them inside.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtuner_search.errors import ProfileError, first_line
from kvtuner_search.profile.canonical import read_limited
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.text import shortened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvtuner_kernels.layout import LayerSpec, TensorSpec
    from kvtuner_kernels.reference import Centres

MAX_HEADER: Final = 2**20  # bytes; a 128-layer transforms file has a header of about 25 KB
MAX_PAYLOAD: Final = 2**30  # bytes; 80 layers of 8 heads of 128 channels, all of them banded, take 85 MB
EXTRA_ROWS: Final = 2  # of a basis tensor, below the matrix: the mean, and the mean of first tokens
MEAN_ROW: Final = -2  # of a basis tensor (kvtuner_kernels.bands.join_basis)
_FLOAT32: Final = 4  # bytes


def transform_shapes(profile: Profile) -> dict[str, list[int]]:
    """Name -> shape of every tensor that the transforms file of a profile has.

    Tensors are called ``layers.I.key`` and ``layers.I.value``: a centring vector [num_kv_heads, head_dim] for each centred one, a
    basis [num_kv_heads, head_dim + 2, head_dim] for each banded one.
    """
    heads, dim = profile.model.num_kv_heads, profile.model.head_dim
    return {
        f"layers.{index}.{part}": [heads, dim] if entry.bands is None else [heads, dim + EXTRA_ROWS, dim]
        for index, layer in enumerate(profile.layers)
        for part, entry in (("key", layer.key), ("value", layer.value))
        if entry.fitted
    }


def folder_of(path: Path, profile: Profile) -> Path:
    """The folder of a profile's transforms file: that of the file that ``path`` leads to, or else of the link itself."""
    target = Path(os.path.realpath(path)).parent
    named = profile.transforms
    if named is not None and not (target / named.file).exists() and (path.parent / named.file).exists():
        return path.parent
    return target


def check_transforms(profile: Profile, folder: Path) -> bytes | None:
    """Check the transforms file beside a profile (:func:`folder_of`): its digest, and that it has exactly the float32 tensors of :func:`transform_shapes`.

    Every number must be finite, and no matrix of a basis may have a row of zeros or the same row twice. Whether it can be inverted
    in all other ways takes torch: :func:`kvtuner_kernels.bands.basis` refuses it where the file is used.

    Returns:
        the file's bytes; None if the profile names none.

    Raises:
        ProfileError: if the file is missing or does not fit.
    """
    if profile.transforms is None:
        return None
    path = folder / profile.transforms.file
    shapes = transform_shapes(profile)
    payload = sum(map(math.prod, shapes.values())) * _FLOAT32
    if payload > MAX_PAYLOAD:
        raise ProfileError(
            f"the transforms of {profile.name} would take {payload} bytes, more than {MAX_PAYLOAD}, which no supported model needs:"
            " check the profile's layers, KV heads and head_dim"
        )
    data = read_limited(path, f"the transforms of {profile.name}", 8 + MAX_HEADER + payload)
    actual = "sha256:" + hashlib.sha256(data).hexdigest()
    if actual != profile.transforms.digest:
        raise ProfileError(
            f"{path} has digest {actual[:19]}…, {profile.name} names {profile.transforms.digest[:19]}…:"
            " restore the file that was written with the profile"
        )
    from safetensors import SafetensorError, deserialize

    try:
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ProfileError(f"{path} is not a safetensors file: {first_line(error)}; restore it") from error
    if sorted(tensors) != sorted(shapes):
        odd = sorted(set(tensors) ^ set(shapes))
        raise ProfileError(
            f"{path} and the centred or banded tensors of {profile.name} differ in {', '.join(map(shortened, odd[:3]))}"
            f"{' and more' if len(odd) > 3 else ''}: restore the file that was written with the profile"
        )
    for name, entry in tensors.items():
        shape = shapes[name]
        if (entry["dtype"], entry["shape"]) != ("F32", shape):
            raise ProfileError(
                f"{path}: {name} is {entry['dtype']} {shortened(entry['shape'])}, not F32 {shape}: restore the file"
            )
        _check_numbers(memoryview(entry["data"]), shape, f"{path}: {name}")
    return data


def read_transforms(path: Path, profile: Profile) -> dict[int, Centres]:
    """What the transforms file of the profile at ``path`` holds, by layer index; empty if the profile names none. Read and hashed once.

    Raises:
        ProfileError: as for :func:`check_transforms`.
    """
    data = check_transforms(profile, folder_of(path, profile))
    return {} if data is None else load_centres(data, profile.model.num_layers)


def transform_of(spec: TensorSpec, tensor: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    """The tensor that a side's spec needs from calibration: the basis, a centring vector, or nothing.

    Args:
        spec: of the side.
        tensor: fp32 [H, D + 2, D], a basis, whose mean is the centring vector; or fp32 [H, D], a centring vector alone.
        device: where it is needed. The same tensor comes back every time, because quantities derived from a basis are cached by tensor.
    """
    if not spec.fitted or tensor is None:
        return None
    if spec.banded or tensor.dim() == 2:
        return tensor if device is None or device == tensor.device else _on(tensor, device)
    mean = tensor[:, MEAN_ROW]
    return mean if device is None else mean.to(device)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    copies: dict[torch.device, Tensor] = _moved().setdefault(tensor, {})
    if device not in copies:
        copies[device] = tensor.to(device)
    return copies[device]


@cache
def _moved() -> Any:
    """Tensor -> device -> its copy there, for as long as the tensor lives."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def centres_file(setting: Sequence[LayerSpec], centres: Mapping[int, Centres]) -> bytes:
    """Bytes of the safetensors file with what the setting needs, named ``layers.{i}.key|value``: centring vectors fp32 [H, D] and bases
    fp32 [H, D + 2, D]."""
    from safetensors.torch import save

    from kvtuner_kernels.reference import NO_CENTRES

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

    from kvtuner_kernels.reference import Centres

    tensors = load(data)
    return {i: Centres(tensors.get(f"layers.{i}.key"), tensors.get(f"layers.{i}.value")) for i in range(layers)}


def _check_numbers(data: memoryview, shape: list[int], name: str) -> None:
    """Refuse numbers that are not finite, and bases that plainly cannot be inverted.

    Raises:
        ProfileError: with the tensor's name.
    """
    numbers = array("f")
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    # In a double, finite float32 numbers never add up to infinity, and NaN or infinity never cancel: 30 ms for 15 MB.
    if not math.isfinite(sum(numbers)):
        raise ProfileError(f"{name} has a number that is not finite: calibrate again")
    if len(shape) == 3:
        heads, rows, dim = shape
        width = dim * _FLOAT32
        for head in range(heads):
            at = head * rows * width
            found = {bytes(data[at + row * width : at + (row + 1) * width]) for row in range(dim)}
            if len(found) < dim or bytes(width) in found:
                raise ProfileError(
                    f"{name}: the basis of head {head} has a row of zeros, or the same row twice, and cannot be inverted:"
                    " calibrate again"
                )
