"""Compile every kernel for serving before the first request, on several threads, and compare each with the reference.

A profile of a dozen different layers is a hundred compilations of about a second. Triton compiles outside of Python's lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import triton
from torch import Tensor

from kvtuner_kernels.bands import join_basis
from kvtuner_kernels.decode import decode
from kvtuner_kernels.extend import extend
from kvtuner_kernels.gather import gather
from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_kernels.quantize import store
from kvtuner_kernels.reference import Centres, attend, rotate, unpack_rows

TOLERANCE: Final = 0.02  # several times the effect of rounding, far below that of a wrong order of tokens
PREFIX: Final = 96  # tokens, more than a chunk has
THREADS: Final = 16  # at most


class KernelError(RuntimeError):
    """A compiled kernel gives wrong results."""


@dataclass(frozen=True)
class Use:
    """How a server calls the kernels; other calls compile other variants."""

    heads: int  # local KV heads
    group: int  # query heads of a KV head
    head_dim: int
    dtype: torch.dtype  # bf16 or fp16
    batches: tuple[int, ...] = (1, 64)  # of decode: the merge of partial results differs
    as_stored: bool = False  # extend reads the chunk from the pool
    splits: int = 0  # of each request, if results must not depend on the batch; 0 if they may


class Layer(NamedTuple):
    """A layer's format, and what is done to its scores: each is a variant of the kernels."""

    spec: LayerSpec
    soft_cap: float = 0.0
    window: int = 0  # tokens, a query's own included; extend alone has to know, since decode gets the slots of a window
    sinks: bool = False


def warm_up(layers: Iterable[LayerSpec | Layer], use: Use, device: torch.device, threads: int = 0) -> int:
    """Run each kernel once for every distinct layer, on rows of this call's own. Returns the number of layers.

    All results are compared with the reference: decode relies on how this version of Triton distributes a tile over registers, which no
    interpreter shows. The rows are dense; a pool with another distance between rows compiles again. So does a mask of drafted tokens.

    Args:
        layers: those of the model, in any order; a spec alone has no cap, window or sinks.
        threads: number of compiling threads; 0 is the number of processors for each GPU.

    Raises:
        KernelError: if a kernel differs from the reference.
    """
    distinct = dict.fromkeys(layer if isinstance(layer, Layer) else Layer(layer) for layer in layers)
    if device.type != "cuda":
        threads = 1  # Triton's interpreter has global state
    elif threads == 0:
        threads = max(1, min(THREADS, len(os.sched_getaffinity(0)) // torch.cuda.device_count()))

    def run(layer: Layer) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # a thread starts on the first GPU
            _run(layer, use, device)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, distinct))
    return len(distinct)


def _run(layer: Layer, use: Use, device: torch.device) -> None:
    """Every kernel of one layer, compared."""
    spec, cap, window, _ = layer
    chunks = [1, -(-17 // use.group), -(-65 // use.group)]  # a tile holds 16, 64 or 128 query heads of one group
    tokens = max(PREFIX, *use.batches) + max(chunks)
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, tokens, use.heads, use.head_dim, generator=generator).to(device, use.dtype)
    query = torch.randn(tokens, use.heads * use.group, use.head_dim, generator=generator).to(device, use.dtype)
    slots = torch.arange(tokens, dtype=torch.int64, device=device)
    sinks = torch.linspace(-2, 2, use.heads * use.group, device=device) if layer.sinks else None
    centres = example_centres(spec, use.heads, use.head_dim, device)
    rows = torch.zeros(tokens, spec.bytes_per_token(use.heads, use.head_dim), dtype=torch.uint8, device=device)

    def compare(name: str, found: Tensor, expected: Tensor) -> None:
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        if not error < TOLERANCE:
            raise KernelError(
                f"{name} of {spec} with {use.heads} KV heads of {use.head_dim} is off by {error:.1e} from the reference on"
                f" {device} (triton {triton.__version__}): do not serve with this combination; report it with these versions"
            )

    banded = spec.key.banded or spec.value.banded

    def write(begin: int) -> None:
        """Store all tokens as a prompt whose first token is in row ``begin``."""
        store(key, value, rows, slots, spec, centres, slots - begin if banded else None)

    if banded:  # another variant: decode stores without positions
        store(key, value, rows, slots, spec, centres, None)
    write(0)
    stored = unpack_rows(rows, spec, use.heads, use.head_dim, centres, use.dtype)
    gathered = gather(rows, slots, spec, use.heads, use.head_dim, centres, use.dtype)
    for name, found, expected in zip(("keys", "values"), gathered, stored, strict=True):
        compare(f"gather of {name}", found, expected)
    for batch in use.batches:
        ends = torch.linspace(0, tokens, batch + 1, device=device).to(torch.int32)
        write(int(ends[-2]))  # the last request is compared
        counts = torch.ones(batch, dtype=torch.int32, device=device) if use.splits else None
        found = decode(
            query[:batch], rows, spec, use.heads, ends, slots, centres=centres, soft_cap=cap, sinks=sinks,
            num_kv_splits=counts, max_kv_splits=use.splits,
        )  # fmt: skip
        last = rows[int(ends[-2]) :]
        expected = attend(query[batch - 1 : batch], last, spec, use.heads, centres, soft_cap=cap, sinks=sinks)
        compare("decode", found[-1:], expected)
    write(0)
    start = torch.tensor([0, 1], device=device)
    for new in chunks:
        ends = start * new  # int64, as SGLang's; only the prefix's are int32, if it is read separately from the chunk
        if use.as_stored:
            found = extend(
                query[:new], None, None, rows, spec, use.heads, ends, start * PREFIX, slots, new,
                centres=centres, soft_cap=cap, window=window, sinks=sinks, batch_invariant=bool(use.splits),
            )  # fmt: skip
            seen = rows[:PREFIX]
        else:
            chunk_key, chunk_value = (side[:new].to(use.dtype) for side in stored)
            found = extend(
                query[:new], chunk_key, chunk_value, rows, spec, use.heads, ends, (start * PREFIX).int(), slots, new,
                centres=centres, soft_cap=cap, window=window, sinks=sinks,
            )  # fmt: skip
            seen = torch.cat([rows[:PREFIX], rows[:new]])
        expected = attend(query[:new], seen, spec, use.heads, centres, soft_cap=cap, window=window, sinks=sinks)
        compare(f"extend by {new}", found, expected)


def example_centres(spec: LayerSpec, heads: int, head_dim: int, device: torch.device) -> Centres:
    """Synthetic vectors and bases of the shapes that a layer needs, the same numbers each time.

    A basis rotates and scales the channels, and first tokens are far from all others, so that leaving out any part of it is noticed.
    """
    return Centres(*(_example(side, heads, head_dim, device) for side in (spec.key, spec.value)))


def _example(side: TensorSpec, heads: int, head_dim: int, device: torch.device) -> Tensor | None:
    if side.centred:
        return torch.zeros(heads, head_dim, device=device)
    if not side.banded:
        return None
    generator = torch.Generator().manual_seed(1)
    turn = rotate(torch.eye(head_dim))
    matrix = (turn * torch.linspace(0.5, 2, head_dim).unsqueeze(1)).flip(-1) @ turn.T
    mean, first = torch.randn(2, heads, head_dim, generator=generator)
    return join_basis(matrix.expand(heads, -1, -1), mean, 3 * first).to(device)
