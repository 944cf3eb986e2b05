"""A plugin of SGLang's for checks alone: it puts ranks on chosen GPUs, and writes what each rank has stored.

It is found through :func:`serving_checks.machine.write_check_plugin` and does nothing unless one of its variables is set.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from serving_checks import stored_rows

GPUS = "CHECK_GPUS"  # environment variable of a launcher: the GPU of each of its ranks, separated by commas


def register() -> None:
    """What SGLang calls in every process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if GPUS in os.environ:
        HookRegistry.register("sglang.srt.utils.common.maybe_reindex_device_id", _placed, HookType.AFTER)
    if stored_rows.FOLDER in os.environ:
        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_internal_state", _write, HookType.AFTER)


def _placed(_result: Any, gpu_id: int) -> AbstractContextManager[int]:
    """A launcher asks for the number of the GPU before it starts a rank, and would count from 0."""
    return nullcontext(int(os.environ[GPUS].split(",")[gpu_id]))


def _write(result: Any, scheduler: Any, *_: Any) -> Any:
    """Every rank is asked for its state when ``/server_info`` is."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    count = int(os.environ[stored_rows.TOKENS])
    rows = {
        f"{pool.start_layer + index}": layer.rows[1 : count + 1].cpu().numpy()
        for index, layer in enumerate(pool.layers)
    }
    stored_rows.write(Path(os.environ[stored_rows.FOLDER]), pool.start_layer, pool._heads, rows)
    return result
