"""Do two arrangements of ranks store the same bits? A plugin of SGLang's that writes what each rank has stored, and the comparison.

The plugin is for checks alone: it is found through :func:`write_entry_point` and does nothing unless FOLDER is set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtuner_kernels.layout import LayerSpec

FOLDER = "CHECK_STORED_ROWS"  # environment variable: where the ranks write
TOKENS = "CHECK_STORED_ROWS_TOKENS"  # environment variable: how many slots, from the first that is handed out
Stored = dict[tuple[int, int], NDArray[np.uint8]]  # (layer, KV head) of the whole model -> [tokens, bytes]


def register() -> None:
    """What SGLang calls in every process."""
    if FOLDER in os.environ:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_internal_state", _write, HookType.AFTER)


def _write(result: Any, scheduler: Any, *_: Any) -> Any:
    """Every rank is asked for its state when ``/server_info`` is."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    count = int(os.environ[TOKENS])
    rows = {
        f"{pool.start_layer + index}": layer.rows[1 : count + 1].cpu().numpy()
        for index, layer in enumerate(pool.layers)
    }
    first = pool.start_layer, pool._heads.start
    partial = Path(os.environ[FOLDER], f".{first[0]}-{first[1]}.npz")
    np.savez(partial, heads=np.array([pool._heads.start, pool._heads.stop]), **rows)
    partial.rename(partial.with_name(f"layer{first[0]}-head{first[1]}.npz"))
    return result


def wait(folder: Path, ranks: int, seconds: float = 30.0) -> None:
    """Until every rank has written; the first one answers before the others are done."""
    deadline = time.monotonic() + seconds
    while len(list(folder.glob("layer*.npz"))) < ranks and time.monotonic() < deadline:
        time.sleep(0.1)


def read(folder: Path, layers: Sequence[LayerSpec], head_dim: int) -> Stored:
    """What all ranks wrote; empty if none did."""
    found: Stored = {}
    for file in sorted(folder.glob("layer*.npz")):
        with np.load(file) as content:
            heads = range(*content["heads"])
            for name in set(content.files) - {"heads"}:
                for head, part in zip(
                    heads, _by_head(content[name], layers[int(name)], len(heads), head_dim), strict=True
                ):
                    found[int(name), head] = part
    return found


def _by_head(rows: NDArray[np.uint8], spec: LayerSpec, heads: int, head_dim: int) -> Iterator[NDArray[np.uint8]]:
    """A row has the keys' codes of all heads, the values', the keys' metadata, the values' (``kvtuner_kernels.layout``)."""
    sizes = [
        spec.key.code_bytes(head_dim), spec.value.code_bytes(head_dim),
        spec.key.metadata_bytes(head_dim), spec.value.metadata_bytes(head_dim),
    ]  # fmt: skip
    begins = np.cumsum([0, *(size * heads for size in sizes)])
    for head in range(heads):
        yield np.concatenate(
            [
                rows[:, begin + head * size : begin + (head + 1) * size]
                for begin, size in zip(begins, sizes, strict=False)
            ],
            axis=1,
        )


class Agreement(NamedTuple):
    """How two servers' rows compare."""

    complete: bool  # both have every layer and head of the model, and something in each
    equal: dict[int, float]  # layer -> fraction of its bytes that are equal

    @property
    def all_equal(self) -> bool:
        return self.complete and all(share == 1.0 for share in self.equal.values())

    @property
    def least(self) -> float:
        return min(self.equal.values(), default=0.0)


def compare(one: Stored, other: Stored, layers: int, heads: int) -> Agreement:
    """Byte by byte."""
    wanted = {(layer, head) for layer in range(layers) for head in range(heads)}
    complete = set(one) == wanted == set(other) and all(part.any() for part in one.values())
    same: dict[int, list[float]] = {}
    for layer, head in sorted(set(one) & set(other)):
        same.setdefault(layer, []).append(float((one[layer, head] == other[layer, head]).mean()))
    return Agreement(complete, {layer: float(np.mean(shares)) for layer, shares in same.items()})
