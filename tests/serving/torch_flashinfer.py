"""FlashInfer's class for ragged prompts in plain torch, and a plugin of SGLang's that lets a server on the CPU take it for the real one.

The plugin does nothing unless FOLDER is set. While the file ``off`` is there, the server's own kernels attend to every prompt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import NO_CENTRES, attend, pack_rows

FOLDER = "CHECK_TORCH_FLASHINFER"  # environment variable: where `off` is looked for and `batches` is written


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the last tokens [T, Hq, D] over [S, H, D], by the reference over 16-bit rows."""
    rows = pack_rows(key.half(), value.half(), LayerSpec(), NO_CENTRES)
    return attend(query, rows, LayerSpec(), key.shape[1]).to(query.dtype)


class Wrapper:
    """``BatchPrefillWithRaggedKVCacheWrapper`` as far as it is used."""

    wrong = False
    broken = ""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")

    def plan(self, queries: Tensor, keys: Tensor, heads: int, kv_heads: int, head_dim: int, **named: Any) -> None:
        if self.broken:
            raise RuntimeError(self.broken)
        types = {"q_data_type": torch.float16, "kv_data_type": torch.float16}
        assert named == {"causal": True, "sm_scale": head_dim**-0.5, **types}
        assert queries.dtype == keys.dtype == torch.int32
        self.shape = heads, kv_heads, head_dim
        self.queries, self.keys = queries.tolist(), keys.tolist()

    def run(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        heads, kv_heads, head_dim = self.shape
        assert query.shape == out.shape == (self.queries[-1], heads, head_dim)
        assert key.shape == value.shape == (self.keys[-1], kv_heads, head_dim)
        for request in range(len(self.queries) - 1):
            new = slice(*self.queries[request : request + 2])
            seen = slice(*self.keys[request : request + 2])
            out[new] = plain(query[new], key[seen], value[seen]).flip(-1 if self.wrong else ())


def stand_in() -> ModuleType:
    """A module ``flashinfer`` with a class of its own, which may be changed."""
    module = ModuleType("flashinfer")
    module.BatchPrefillWithRaggedKVCacheWrapper = type("Fresh", (Wrapper,), {})  # type: ignore[attr-defined]
    return module


def write_plugin(folder: Path) -> Path:
    """Metadata by which SGLang finds :func:`register`; ``folder`` is to be put on PYTHONPATH, and this file's."""
    target = folder / "torch_flashinfer-0.dist-info"
    target.mkdir(parents=True)
    (target / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-flashinfer\nVersion: 0\n")
    (target / "entry_points.txt").write_text("[sglang.srt.plugins]\ntorch_flashinfer = torch_flashinfer:register\n")
    return folder


def register() -> None:
    """What SGLang calls in every process."""
    if FOLDER in os.environ:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        target = "kvtuner_search.serving.sglang.attention.PackedTritonBackend._prefill_attention"
        HookRegistry.register(target, _prefill_attention, HookType.AROUND)


def _prefill_attention(_: Any, backend: Any) -> Any:
    from kvtuner_search.serving.sglang.prefill import CAPABILITY, PrefillAttention, prefill_attention

    folder, pool = Path(os.environ[FOLDER]), backend.token_to_kv_pool
    torch.cuda.is_current_stream_capturing = lambda: False  # a build for the CPU has none
    with mock.patch.dict(sys.modules, flashinfer=stand_in()):
        made = prefill_attention(
            backend.num_head, backend.num_kv_head, pool.head_dim, pool.model_dtype, torch.device("cpu"), CAPABILITY
        )
    assert made is not None

    class Watched(PrefillAttention):
        def plan(self, lengths: Any, prefixes: Any) -> bool:
            if (folder / "off").exists() or not super().plan(lengths, prefixes):
                return False
            with (folder / "batches").open("a") as file:
                file.write(f"{lengths} over {prefixes}\n")
            return True

    made.__class__ = Watched
    return made
