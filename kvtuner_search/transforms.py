"""Centring vectors and bases: what a profile's transforms file holds, how it is checked, read and written.

Checking takes no torch, so that ``check`` stays light. What needs tensors imports them inside.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from kvtuner_search.errors import ProfileError
from kvtuner_search.profile.canonical import open_limited, parse_json, refuse_pointer
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
_MOST_DIMENSIONS: Final = 8  # the product of a million of them takes seconds
_POINTER: Final = 1024  # bytes, more than a Git LFS pointer or a link that was checked out as text has
# Bytes of a number, for the dtypes that a file may have; one of these alone is accepted, and the others are named.
_SIZES: Final = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


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
    with _opened(profile, folder) as (path, stream):
        if stream is None:
            return None
        data = stream.read()
        _check_file(BytesIO(data), path, profile)
        return data


def verify_transforms(profile: Profile, folder: Path) -> None:
    """The same without the bytes: only one head's matrix is in memory at a time, however large the file is.

    Raises:
        ProfileError: if the file is missing or does not fit.
    """
    with _opened(profile, folder) as (path, stream):
        if stream is not None:
            _check_file(stream, path, profile)


@contextmanager
def _opened(profile: Profile, folder: Path) -> Iterator[tuple[Path, BufferedReader | None]]:
    """The transforms file, which is not too large; no stream if the profile names none."""
    if profile.transforms is None:
        yield folder, None
        return
    path = folder / profile.transforms.file
    payload = sum(map(math.prod, transform_shapes(profile).values())) * _FLOAT32
    if payload > MAX_PAYLOAD:
        raise ProfileError(
            f"the transforms of {profile.name} would take {payload} bytes, more than {MAX_PAYLOAD}, which no supported model needs:"
            " check the profile's layers, KV heads and head_dim"
        )
    with open_limited(path, f"the transforms of {profile.name}", 8 + MAX_HEADER + payload) as stream:
        refuse_pointer(stream.read(_POINTER), path)
        stream.seek(0)
        yield path, stream


def _check_file(stream: BufferedReader | BytesIO, path: Path, profile: Profile) -> None:
    named = profile.transforms
    assert named is not None
    actual = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != named.digest:
        raise ProfileError(
            f"{path} has digest {actual[:19]}…, {profile.name} names {named.digest[:19]}…:"
            " restore the file that was written with the profile"
        )
    shapes = transform_shapes(profile)
    try:
        tensors = read_header(stream)
    except ValueError as error:
        raise ProfileError(f"{path} is not a safetensors file: {error}; restore it") from error
    if sorted(tensors) != sorted(shapes):
        odd = sorted(set(tensors) ^ set(shapes))
        raise ProfileError(
            f"{path} and the centred or banded tensors of {profile.name} differ in {', '.join(map(shortened, odd[:3]))}"
            f"{' and more' if len(odd) > 3 else ''}: restore the file that was written with the profile"
        )
    for name, (dtype, found) in tensors.items():  # in the order of the file
        shape = shapes[name]
        if (dtype, found) != ("F32", shape):
            raise ProfileError(
                f"{path}: {name} is {shortened(dtype)} {shortened(found)}, not F32 {shape}: restore the file"
            )
        _check_numbers(stream, shape, f"{path}: {name}")


def read_header(stream: BinaryIO) -> dict[str, tuple[str, list[int]]]:
    """The tensors of a safetensors file, name -> (dtype, shape), in the order of their numbers, which begin where this leaves the stream.

    The library's own reader wants all bytes at once, and copies them. What this accepts, the library does: tensors lie one behind the
    other without gaps, as the format demands, and the last one ends with the file.

    Raises:
        ValueError: if it is no such file.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise ValueError("it ends within its header, or its header is too long")
    text = stream.read(length)
    try:
        header = parse_json(text, "its header", "header") if text.startswith(b"{") else None
    except ProfileError as error:
        raise ValueError(str(error).rpartition(": ")[0]) from error
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    found = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda tensor: tensor[1])
    at = 0
    for name, (start, end), dtype, shape in found:
        if start != at or end - start != math.prod(shape) * _SIZES.get(dtype, math.nan):
            raise ValueError(f"the numbers of {shortened(name)} do not lie where its shape says")
        at = end
    if at != size - 8 - length:
        raise ValueError("its tensors do not end with the file")
    return {name: (dtype, shape) for name, _, dtype, shape in found}


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, int], str, list[int]]:
    """A tensor's name, offsets, dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shortened(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = (
        isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= _MOST_DIMENSIONS and len(offsets) == 2
    )
    if (
        not numbers
        or not isinstance(dtype, str)
        or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets))
    ):
        raise ValueError(f"{shortened(name)} has a dtype, shape or data_offsets of another type")
    return name, (offsets[0], offsets[1]), dtype, shape


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


def _check_numbers(stream: BinaryIO, shape: list[int], name: str) -> None:
    """Refuse numbers that are not finite, and bases that plainly cannot be inverted; reads one tensor, head by head.

    Raises:
        ProfileError: with the tensor's name.
    """
    heads, *matrix = shape
    parts = heads if len(matrix) == 2 else 1
    for head in range(parts):
        data = stream.read(math.prod(shape) // parts * _FLOAT32)
        numbers = array("f")
        numbers.frombytes(data)
        if sys.byteorder == "big":
            numbers.byteswap()
        # In a double, finite float32 numbers never add up to infinity, and NaN or infinity never cancel: 30 ms for 15 MB.
        if not math.isfinite(sum(numbers)):
            raise ProfileError(f"{name} has a number that is not finite: calibrate again")
        if len(matrix) == 2:
            dim = matrix[1]
            width = dim * _FLOAT32
            found = {data[row * width : (row + 1) * width] for row in range(dim)}
            if len(found) < dim or bytes(width) in found:
                raise ProfileError(
                    f"{name}: the basis of head {head} has a row of zeros, or the same row twice, and cannot be inverted:"
                    " calibrate again"
                )
