"""Compile kernels ahead of time, without a GPU, and read their resources.

Needs the ``cuobjdump`` in Triton's package.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvtuner_kernels.band_kernel import store_bands_constants, store_bands_kernel, store_bands_warps
from kvtuner_kernels.basis_kernel import (
    ALONE,
    TRANSFORM_WARPS,
    Overlap,
    first_rows_constants,
    first_rows_kernel,
    transform_constants,
    transform_kernel,
)
from kvtuner_kernels.decode import decode_constants
from kvtuner_kernels.decode_kernel import decode_kernel
from kvtuner_kernels.extend import extend_constants
from kvtuner_kernels.extend_kernel import extend_kernel
from kvtuner_kernels.gather import gather_constants, gather_kernel
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.merge import (
    BACK_WARPS,
    leaves_basis,
    merge_back_constants,
    merge_back_kernel,
    merge_constants,
    merge_kernel,
)
from kvtuner_kernels.quantize import STORE_WARPS, store_constants, store_kernel
from kvtuner_kernels.reference import rotation_block
from kvtuner_kernels.tuning import HOPPER_SHARED, DecodeLaunch, decode_launch, extend_launch

CAPABILITIES: Final = (80, 89, 90, 100)  # A100; RTX 4090 and L40S; H100 and H200; B200
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_POINTERS: Final = {
    "rows": "*u8", "slots": "*i64", "kv_indptr": "*i32", "kv_indices": "*i64", "qo_indptr": "*i32", "mask_indptr": "*i64",
    "custom_mask": "*i1", "mask_offsets": "*i64", "split_counts": "*i32", "positions": "*i64", "indptr": "*i32",
}  # fmt: skip
_FP32: Final = (
    "partial", "lse", "centre", "key_centre", "value_centre", "key_point", "value_point", "key_matrix", "key_mean",
    "value_matrix", "value_mean", "matrix", "mean", "before", "after", "query_shift", "first_key", "first_value",
    "sinks", "shares", "key_mean",
)  # fmt: skip


class Variant(NamedTuple):
    """One compilation of one kernel."""

    name: str
    kernel: Any  # a @triton.jit function
    constants: dict[str, Any]  # compile-time constants; pointers that are not given are None here
    options: dict[str, int]  # num_warps and the like
    fp32: tuple[str, ...] = ()  # pointers to fp32, where others have the model's type


class Features(NamedTuple):
    """What a layer's attention has beside the softmax of its scores; each compiles other variants."""

    soft_cap: float = 0.0
    window: int = 0
    sinks: bool = False
    masked: bool = False  # a mask of drafted tokens, of more tokens than have slots if there is a window
    as_stored: bool = False  # extend reads the chunk from the pool


class Resources(NamedTuple):
    """Resources of one thread and of one program."""

    registers: int  # a thread
    spilled: int  # bytes of stack a thread
    shared: int  # bytes of shared memory a program


def variants(
    spec: LayerSpec,
    heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    shared: int = HOPPER_SHARED,
    overlap: bool = True,
    features: Features = Features(),  # noqa: B008 - a tuple
) -> list[Variant]:
    """The kernels for serving one layer, with the launch parameters of :mod:`kvtuner_kernels.tuning`.

    ``shared`` is the shared memory that a program may use; ``overlap`` launches the merge early, which needs sm_90.

    Example::

        variants(spec, 8, 8, 64, features=Features(window=128, sinks=True))  # a sliding layer of gpt-oss
    """
    row = spec.bytes_per_token(heads, head_dim)
    launch = decode_launch(spec, heads, group, head_dim, shared)
    banded = spec.key.banded or spec.value.banded
    centres = {f"{name}_centre": None for name, side in (("key", spec.key), ("value", spec.value)) if not side.centred}
    result = []
    if not spec.shares_words:
        constants = {**store_constants(spec, heads, head_dim), **centres}
        result.append(Variant("store", store_kernel, constants, {"num_warps": STORE_WARPS}))
    if banded:
        result += _banded_variants(spec, heads, group, head_dim, dtype, overlap, features)
    result += _decode_variants(spec, heads, group, head_dim, dtype, row, launch, overlap, features)
    for rows in (16, 64, 4096):
        tile = extend_launch(spec, head_dim, rows, shared, features.masked)
        transformed = spec.value.fitted or spec.value.rotated
        constants = {
            **extend_constants(spec, heads, group, head_dim, dtype, row, tile),
            "CAP": features.soft_cap, "WINDOW": features.window, "CAUSAL": True, "AS_STORED": features.as_stored,
            "SKIP_PREFIX_MASK": not (features.masked or features.as_stored),
        }  # fmt: skip
        constants |= {} if features.masked else {"custom_mask": None, "mask_indptr": None}
        constants |= {} if features.masked and features.window else {"mask_offsets": None}
        constants |= {} if features.sinks else {"sinks": None}
        constants |= {} if features.sinks and transformed else {"shares": None}
        constants |= {} if spec.key.fitted else {"key_centre": None}
        constants |= {} if banded else {"first_key": None, "first_value": None}
        fp32 = [*(["prefix_query"] if spec.key.banded else []), *(["out"] if transformed else [])]
        result.append(Variant(f"extend {rows}", extend_kernel, constants, {"num_warps": tile.warps}, tuple(fp32)))
    return result


def _decode_variants(
    spec: LayerSpec,
    heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    row: int,
    launch: DecodeLaunch,
    overlap: bool,
    features: Features,
) -> list[Variant]:
    """Decode, and the merges of its partial results."""
    banded, cap, window = spec.key.banded or spec.value.banded, features.soft_cap, features.window
    # Where the key is banded, queries come in its basis, as fp32.
    turned = ("query",) if spec.key.banded else ()
    plain: dict[str, Any] = {"split_counts": None}
    if not (cap and spec.key.fitted):
        plain["query_shift"] = None
    decode = decode_constants(spec, heads, group, head_dim, dtype, row, launch, cap, window, overlap)
    options = {"num_warps": launch.warps, **launch.options()}
    result = [Variant("decode", decode_kernel, decode | plain, options, turned)]
    if not banded:
        plain["query_shift"] = None
    if not features.sinks:
        plain |= dict.fromkeys(("sinks", "shares"))
    if not (features.sinks and spec.key.fitted and not cap):
        plain |= dict.fromkeys(("sink_query", "key_mean", "sink_token_stride", "sink_head_stride"))
    points = {f"{name}_point": None for name, side in (("key", spec.key), ("value", spec.value)) if not side.banded}
    if leaves_basis(spec, 64, 264, head_dim, launch):
        constants = (
            merge_back_constants(spec, heads, group, head_dim, dtype, launch, window, overlap, cap) | plain | points
        )
        constants.pop("shares", None)
        result.append(
            Variant("merge and leave the basis", merge_back_kernel, constants, {"num_warps": BACK_WARPS}, turned)
        )
    rotated_later = spec.value.rotated and rotation_block(head_dim) < head_dim
    later = ("out",) if spec.value.banded or rotated_later else ()
    for batch, splits in ((64, 264), (1, 264)):
        constants = merge_constants(spec, batch, splits, heads, group, head_dim, dtype, launch, window, overlap, cap)
        constants |= plain | points | ({} if constants["CENTRED"] else {"centre": None})
        constants |= {} if banded else dict.fromkeys(("query", "rows", "kv_indices"))
        constants |= {} if later else {"shares": None}
        warps = {"num_warps": 1 if constants["WIDTH"] >= head_dim else 4}
        result.append(Variant(f"merge {batch}", merge_kernel, constants, warps, turned + later))
    return result


def _banded_variants(
    spec: LayerSpec, heads: int, group: int, head_dim: int, dtype: torch.dtype, overlap: bool, features: Features
) -> list[Variant]:
    """The additional kernels for a layer with a banded side."""
    result = []
    none = {
        f"{name}_{part}": None
        for name, side in (("key", spec.key), ("value", spec.value))
        if not side.banded
        for part in ("matrix", "mean", "point")
    }
    for tokens in (64, 8192):
        constants = {**store_bands_constants(spec, heads, head_dim, tokens), **none}
        name, warps = f"store bands of {tokens}", {"num_warps": store_bands_warps(head_dim)}
        result.append(Variant(name, store_bands_kernel, constants, warps))
    constants = first_rows_constants(spec, heads, head_dim, dtype)
    constants |= {name: None for name in ("key_point", "value_point") if name in none}
    result.append(Variant("first rows", first_rows_kernel, constants, {}, ("key", "value")))
    gathered = tuple(name for name, side in (("key", spec.key), ("value", spec.value)) if side.banded)
    unfitted = {f"{n}_centre": None for n, side in (("key", spec.key), ("value", spec.value)) if not side.fitted}
    result.append(
        Variant("gather", gather_kernel, {**gather_constants(spec, heads, head_dim), **unfitted}, {}, gathered)
    )
    warps = {"num_warps": TRANSFORM_WARPS}
    for pairs in (64, 65536):
        query, chunk, back = (
            {
                **transform_constants(pairs, heads, group, head_dim, how),
                **dict.fromkeys(absent),
                "matrix_column_stride": 1,
            }
            for how, absent in (
                (Overlap(overlap, overlap), ("before", "after", "indptr", "shares")),
                (ALONE, ("after", "indptr", "shares")),
                (Overlap(follows=overlap), ("before", "indptr" if features.sinks else "shares")),
            )
        )
        result += [
            Variant(f"query of {pairs}", transform_kernel, query, warps, ("out",)),
            Variant(f"chunk of {pairs}", transform_kernel, chunk, warps),
            Variant(f"result of {pairs}", transform_kernel, back, warps, ("x",)),
        ]
    return result


def compile_variant(variant: Variant, capability: int, dtype: torch.dtype = torch.bfloat16) -> Resources:
    """Compile for an NVIDIA GPU of ``capability`` (90 is sm_90); no GPU is used. Pointers are assumed to be 16-byte aligned."""
    compiled = _compiled(variant, capability, dtype)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, _RESOURCES.search(text).groups())  # type: ignore[union-attr]
    return Resources(registers, stack, compiled.metadata.shared)


def layouts(variant: Variant, capability: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """Triton's intermediate text of a variant, in which each tensor has its layout over a program's threads."""
    return str(_compiled(variant, capability, dtype).asm["ttgir"])


def _compiled(variant: Variant, capability: int, dtype: torch.dtype) -> Any:
    model = "*bf16" if dtype == torch.bfloat16 else "*fp16"
    signature = {}
    for name in variant.kernel.arg_names:
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name in (*variant.fp32, *_FP32):
            signature[name] = "*fp32"
        elif name in ("query", "prefix_query", "sink_query", "key", "value", "out", "x"):
            signature[name] = model
        else:
            signature[name] = _POINTERS.get(name, "fp32" if name == "softmax_scale" else "i32")
    aligned = [
        i
        for i, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or (kind == "i32" and name.endswith("stride"))
    ]
    source = ASTSource(variant.kernel, signature, variant.constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
