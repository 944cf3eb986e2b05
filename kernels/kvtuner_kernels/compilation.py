"""Compile kernels ahead of time, without a GPU, and read what they take.

Needs the ``cuobjdump`` that Triton's package carries.
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

from kvtuner_kernels.decode import decode_constants, merge_constants, merge_kernel
from kvtuner_kernels.decode_kernel import decode_kernel
from kvtuner_kernels.extend import extend_constants, extend_kernel
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.quantize import STORE_WARPS, store_constants, store_kernel
from kvtuner_kernels.tuning import HOPPER_SHARED, decode_launch, extend_launch

CAPABILITIES: Final = (80, 89, 90, 100)  # A100; RTX 4090 and L40S; H100 and H200; B200
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_POINTERS: Final = {
    "rows": "*u8", "slots": "*i64", "kv_indptr": "*i32", "kv_indices": "*i64", "qo_indptr": "*i32", "mask_indptr": "*i64",
    "custom_mask": "*i1", "partial": "*fp32", "lse": "*fp32", "key_centre": "*fp32", "value_centre": "*fp32", "centre": "*fp32",
    "split_counts": "*i32",
}  # fmt: skip


class Variant(NamedTuple):
    """One compilation of one kernel."""

    name: str
    kernel: Any  # a @triton.jit function
    constants: dict[str, Any]  # compile-time constants; pointers that are not given are None here
    options: dict[str, int]  # num_warps and the like


class Resources(NamedTuple):
    """What one thread, and one program, takes."""

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
) -> list[Variant]:
    """The kernels that serving one layer takes, with the launch parameters of :mod:`kvtuner_kernels.tuning`.

    ``shared`` is the shared memory that a program may take; ``overlap`` lets the merge be launched early, which takes sm_90.
    """
    row = spec.bytes_per_token(heads, head_dim)
    launch = decode_launch(spec, heads, group, head_dim, shared)
    centres = {f"{name}_centre": None for name, side in (("key", spec.key), ("value", spec.value)) if not side.centred}
    result = [
        Variant(
            "store", store_kernel, {**store_constants(spec, heads, head_dim), **centres}, {"num_warps": STORE_WARPS}
        ),
        Variant(
            "decode",
            decode_kernel,
            {
                **decode_constants(spec, heads, group, head_dim, dtype, row, launch, overlap=overlap),
                "split_counts": None,
                "query_shift": None,
            },
            {"num_warps": launch.warps, **launch.options()},
        ),
    ]
    for batch, splits in ((64, 264), (1, 264)):
        constants = merge_constants(spec, batch, splits, group, head_dim, launch, overlap=overlap)
        none = {"split_counts": None} | ({} if spec.value.centred else {"centre": None})
        result.append(
            Variant(f"merge {batch}", merge_kernel, {**constants, **none}, {"num_warps": 4 if batch == 1 else 1})
        )
    for rows in (16, 64, 4096):
        tile = extend_launch(spec, head_dim, rows, shared)
        constants = {
            **extend_constants(spec, heads, group, head_dim, dtype, row, tile),
            "CAP": 0.0, "WINDOW": 0, "CAUSAL": True, "AS_STORED": False, "SKIP_PREFIX_MASK": True,
            "custom_mask": None, "mask_indptr": None,
        } | ({} if spec.key.centred else {"key_centre": None})  # fmt: skip
        result.append(Variant(f"extend {rows}", extend_kernel, constants, {"num_warps": tile.warps}))
    return result


def compile_variant(variant: Variant, capability: int, dtype: torch.dtype = torch.bfloat16) -> Resources:
    """Compile for an NVIDIA GPU of ``capability`` (90 is sm_90); no GPU is used. Pointers are taken as 16-byte aligned."""
    model = "*bf16" if dtype == torch.bfloat16 else "*fp16"
    signature = {}
    for name in variant.kernel.arg_names:
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name in ("query", "prefix_query", "key", "value", "out"):
            signature[name] = model
        else:
            signature[name] = _POINTERS.get(name, "fp32" if name == "softmax_scale" else "i32")
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name.endswith("stride")]
    source = ASTSource(variant.kernel, signature, variant.constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, _RESOURCES.search(text).groups())  # type: ignore[union-attr]
    return Resources(registers, stack, compiled.metadata.shared)
