# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Split-KV decode attention over packed rows: the launch, and the merge of the splits.

The kernel and its parts are in :mod:`kvtuner_kernels.decode_kernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels.bands import basis
from kvtuner_kernels.basis_kernel import Overlap, bases, transform_heads
from kvtuner_kernels.decode_kernel import decode_kernel
from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.merge import has_first, merge
from kvtuner_kernels.operands import ASSEMBLY
from kvtuner_kernels.reference import NO_CENTRES, Centres
from kvtuner_kernels.rotation import rotate_heads
from kvtuner_kernels.sides import check_centre, check_rows, sides, within_reach
from kvtuner_kernels.sinks import check_sinks
from kvtuner_kernels.tuning import DecodeLaunch, decode_launch, multiprocessors, overlaps, shared_memory


class Workspace(NamedTuple):
    """Partial results of one decode call; may be shared by all layers of a model and kept across CUDA-graph replays."""

    partial: Tensor  # fp32 [parts, runs, query heads, D]
    lse: Tensor  # fp32 [parts, runs, query heads], logarithms to base 2


class Workspaces:
    """The workspace of all decode calls of a model, which grows with the batches.

    An earlier workspace is freed when a larger one replaces it, unless a CUDA graph was captured with it: replays write there. At most
    half more is held than the largest batch took.

    Args:
        parts: maps a number of requests to the most partial results of any layer, runs included.
        query_heads: local ones.
        head_dim: channels of a head.
        device: where they are kept.

    Example::

        spaces = Workspaces(lambda requests: decode_parts(requests, splits, False) * launch.runs, 28, 128, rows.device)
        decode(query, rows, spec, 4, kv_indptr, kv_indices, workspace=spaces.of(len(query)))
    """

    def __init__(self, parts: Callable[[int], int], query_heads: int, head_dim: int, device: torch.device) -> None:
        self._parts, self._query_heads, self._head_dim, self._device = parts, query_heads, head_dim, device
        self._captured: list[Workspace] = []
        self._current: Workspace | None = None
        self._capacity = 0  # requests that fit into the current one

    def of(self, requests: int) -> Workspace:
        """Space for a batch of ``requests`` requests: two fp32 buffers, in one dimension."""
        capturing = is_capturing(self._device)
        if self._current is None or requests > self._capacity:
            self._let_go(capturing)
            self._capacity = max(requests, self._capacity + self._capacity // 2)
            numbers = self._parts(self._capacity) * self._query_heads
            self._current = Workspace(
                torch.empty(numbers * self._head_dim, dtype=torch.float32, device=self._device),
                torch.empty(numbers, dtype=torch.float32, device=self._device),
            )
        if capturing and not any(kept is self._current for kept in self._captured):
            self._captured.append(self._current)
        return self._current

    def _let_go(self, capturing: bool) -> None:
        """Give up the current workspace, before a larger one is allocated."""
        current, self._current = self._current, None
        if current is None or any(kept is current for kept in self._captured):
            return
        if capturing:  # frees and waits during a capture belong to its graph
            self._captured.append(current)
        elif self._device.type == "cuda":
            for buffer in current:  # its last call may still run, on another stream than it was allocated on
                buffer.record_stream(torch.cuda.current_stream(self._device))


def is_capturing(device: torch.device) -> bool:
    """Whether calls on ``device`` are now captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def decode_parts(batch: int, splits: int, per_request: bool) -> int:
    """Partial results that a decode call may write."""
    return batch * splits if per_request else batch + splits


def decode(
    query: Tensor,
    rows: Tensor,
    spec: LayerSpec,
    heads: int,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    out: Tensor | None = None,
    *,
    centres: Centres = NO_CENTRES,
    softmax_scale: float | None = None,
    soft_cap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    num_kv_splits: Tensor | None = None,
    max_kv_splits: int = 0,
    launch: DecodeLaunch | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Attention of one new token of each request over its packed rows.

    Safe under CUDA-graph capture: the grid depends on the batch size alone, and lengths are read on the device.

    Args:
        query: [B, Hq, D] bf16 or fp16, after rotary embedding, contiguous along D. Query head ``h`` reads KV head ``h // (Hq // H)``.
        rows: the pool, uint8 [R, row bytes].
        spec: how the layer is stored.
        heads: local KV heads H.
        kv_indptr: int32 [B + 1]; request ``b`` has the slots ``kv_indices[kv_indptr[b]:kv_indptr[b + 1]]``.
        kv_indices: int64, slots (rows) in the order of tokens; the query's own token is among them.
        out: [B, Hq, D], written; made if not given.
        centres: centring vectors, given exactly where the spec asks for them.
        softmax_scale: factor of the scores, above 0; ``D ** -0.5`` if not given.
        soft_cap: scores become ``cap * tanh(score / cap)``; 0 is off.
        window: number of latest tokens that are seen; 0 is all. Rows behind it are not read.
        sinks: attention sinks, [Hq] as in :func:`kvtuner_kernels.sinks.check_sinks`; None is none.
        num_kv_splits: int32 [B], splits of each request as SGLang counts them (multiples of 32 tokens); needs ``max_kv_splits``.
            If not given, all tokens of the batch are spread evenly over the chip.
        launch: launch parameters instead of the tuned ones.
        workspace: space for partial results, ``decode_workspace``; made if not given.

    Returns:
        ``out``. A request without tokens gives zeros.

    Raises:
        LayoutError: for shapes, dtypes or strides that the kernel does not cover, or 2**31 numbers in the query.

    Example::

        decode(query, rows, spec, 8, kv_indptr, kv_indices, window=128, sinks=layer.sinks)  # a sliding layer of gpt-oss
    """
    batch, query_heads, head_dim = query.shape
    check_rows(rows, spec, heads, head_dim)
    key_side, value_side = sides(spec, heads, head_dim)
    check_centre(key_side, centres.key, heads, head_dim)
    check_centre(value_side, centres.value, heads, head_dim)
    if query_heads % heads or query.stride(2) != 1:
        raise LayoutError(
            f"{query_heads} query heads, strides {query.stride()}: expected a dense multiple of {heads} heads"
        )
    if (num_kv_splits is not None) != bool(max_kv_splits):
        raise LayoutError(f"max_kv_splits={max_kv_splits}: give it exactly when num_kv_splits is given")
    if query.dtype == torch.float32 and ASSEMBLY:
        raise LayoutError("fp32 queries are for the interpreter only: convert to bf16 or fp16")
    sinks = check_sinks(sinks, query_heads)
    query = plain_query = within_reach(query, "queries")
    out = torch.empty_like(query) if out is None else out
    if batch == 0:
        return out
    group = query_heads // heads
    launch = launch or decode_launch(spec, heads, group, head_dim, shared_memory(rows.device))
    splits = max_kv_splits or multiprocessors(rows.device) * launch.programs
    workspace = workspace or decode_workspace(
        batch, splits, query_heads, head_dim, launch, rows.device, bool(max_kv_splits)
    )
    shift, model = None, query.dtype
    if centres.key is not None and soft_cap:
        mean = basis(centres.key).mean if key_side.bands else centres.key
        shift = (query.float() * mean.repeat_interleave(group, 0)).sum(-1)
    if key_side.rotated:
        query = rotate_heads(query, inverse=True, dtype=query.dtype)
    overlap = overlaps(rows.device)
    key_basis, _ = bases(spec, centres)
    if key_basis is not None:
        query = transform_heads(query, key_basis.dual, heads, overlap=Overlap(overlap, overlap))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    programs = batch * splits if max_kv_splits else splits
    blocks = triton.cdiv(heads, launch.batch // launch.runs), triton.cdiv(group, launch.columns)
    decode_kernel[(programs, *blocks)](
        query, shift, rows, kv_indptr, kv_indices, num_kv_splits, workspace.partial, workspace.lse, batch, splits,
        query.stride(0), query.stride(1), scale,
        **decode_constants(spec, heads, group, head_dim, model, rows.stride(0), launch, soft_cap, window, overlap),
        num_warps=launch.warps, **launch.options(), **({"launch_pdl": True} if overlap and key_basis is not None else {}),
    )  # fmt: skip
    merge(
        out, workspace.partial, workspace.lse, query, shift, rows, spec, heads, kv_indptr, kv_indices, num_kv_splits, splits,
        centres, launch, scale, soft_cap, window, model, sinks, plain_query,
    )  # fmt: skip
    return out


def decode_workspace(
    batch: int,
    splits: int,
    query_heads: int,
    head_dim: int,
    launch: DecodeLaunch,
    device: torch.device,
    per_request: bool = False,
) -> Workspace:
    """Space for the partial results of :func:`decode` with these parameters."""
    parts = decode_parts(batch, splits, per_request)
    shape = (parts, launch.runs, query_heads)
    return Workspace(
        torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )


def decode_constants(
    spec: LayerSpec,
    heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    row_stride: int,
    launch: DecodeLaunch,
    soft_cap: float = 0.0,
    window: int = 0,
    overlap: bool = False,
) -> dict[str, Any]:
    """Compile-time constants of :func:`decode_kernel`; ``dtype`` is the query's."""
    key_side, value_side = sides(spec, heads, head_dim)
    model = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    # fp16 has room for more planes without a shift, and for bytes; its subnormal numbers need no bias.
    key_dtype = tl.float16 if ASSEMBLY and key_side.bits < 16 else model
    value_dtype = tl.float16 if ASSEMBLY and value_side.bits < 16 else model
    return {
        "KEY": key_side, "VALUE": value_side, "ROW": row_stride, "HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim,
        "CAP": soft_cap, "WINDOW": window, "KEY_DTYPE": key_dtype, "VALUE_DTYPE": value_dtype, "BATCH": launch.batch,
        "RUNS": launch.runs, "TOKENS": launch.tokens, "COLUMNS": launch.columns, "STAGES": launch.stages,
        "OVERLAP": overlap, "FIRST": has_first(spec),
    }  # fmt: skip
