"""Decode steps of one configuration over a cache that is already full, in one process: ``python -m serving_checks.decode_worker PLAN``

SGLang's model runner is set up as in its own bench_one_batch, with the plugins loaded first. No prompt is read: SGLang's allocator
hands out the slots, or (the worst case, after much use) they are drawn one by one from the whole pool; every row of the pool is a copy of one of a few thousand rows that SGLang's own call stored, and
decode steps run over them as the server runs them (through CUDA graphs, on a GPU). What a server adds is its scheduler.

PLAN is a JSON object: ``arguments`` of SGLang, ``packed`` (whether the pool must be ours), ``context`` and ``steps`` (tokens),
``batches`` (requests; 0 stands for as many as fit, at most ``max_batch``), ``out`` (file for the figures).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SAMPLE = 4096  # distinct rows
WARM_UP = 3  # steps
REPEATS = 3  # of all steps, for the median


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the GPU, read and written bytes counted."""
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times = []
    for _ in range(12):
        start.record()
        target.copy_(source)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    bandwidth: float = 2 * source.nbytes / statistics.median(times[2:])
    del source, target
    torch.cuda.empty_cache()  # the pool takes its share of what is free
    return bandwidth


def make_runner(arguments: list[str], batches: list[int], request: int, max_batch: int) -> tuple[Any, list[int]]:
    """SGLang's model runner with its pool, and graphs for the batch sizes that fit.

    Args:
        arguments: of SGLang's command line.
        batches: batch sizes; 0 is as many as fit.
        request: tokens of a request.
        max_batch: most requests.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import PortArgs, prepare_server_args

    server_args = prepare_server_args(arguments)
    server_args.check_server_args()
    _set_envs_and_config(server_args)
    initialize_moe_config(server_args)
    initialize_fp8_gemm_config(server_args)
    initialize_fp4_gemm_config(server_args)
    runner = ModelRunner(
        model_config=ModelConfig.from_server_args(server_args), mem_fraction_static=server_args.mem_fraction_static,
        gpu_id=0, tp_rank=0, tp_size=1, moe_ep_rank=0, moe_ep_size=1, pp_rank=0, pp_size=1,
        nccl_port=PortArgs.init_new(server_args).nccl_port, server_args=server_args,
    )  # fmt: skip
    runner.alloc_memory_pool()
    fit = min(runner.max_total_num_tokens // request, runner.req_to_token_pool.size, max_batch)
    sizes = sorted({min(batch or fit, fit) for batch in batches})
    if runner.device == "cuda":
        graphs = server_args.cuda_graph_config.decode
        graphs.bs, graphs.max_bs = sizes, max(sizes)
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner, sizes


def fill(runner: Any) -> None:
    """Write every slot of every layer: rows that SGLang's own call stored, copied through the whole pool."""
    pool, model = runner.token_to_kv_pool, runner.model_config
    count = min(SAMPLE, pool.size)
    slots = torch.arange(1, count + 1, device=runner.device)
    shape = (2, count, pool.head_num, model.head_dim)
    # Any row may come to lie anywhere in a context, so none is the first of its sequence.
    with pool.storing(None) if hasattr(pool, "storing") else nullcontext():
        for layer in range(runner.start_layer, runner.end_layer):
            key, value = torch.randn(shape, dtype=runner.dtype, device=runner.device)
            pool.set_kv_buffer(SimpleNamespace(layer_id=layer), slots, key, value)
    for rows in [*pool.k_buffer, *pool.v_buffer]:
        sample = rows[1 : count + 1].clone()
        for first in range(1, len(rows), count):
            part = rows[first : first + count]
            part.copy_(sample[: len(part)])


class Decoding:
    """A batch of requests with a context each, whose tokens and slots are there before the first step."""

    def __init__(self, runner: Any, batch: int, context: int, steps: int, shuffled: bool) -> None:
        self.runner, self.batch, self.context = runner, batch, context
        device, table = runner.device, runner.req_to_token_pool.req_to_token
        length = context + steps
        if shuffled:
            order = torch.randperm(runner.token_to_kv_pool.size, device=device)[: batch * length] + 1
            self.slots = order.view(batch, length)
        else:
            allocator = runner.token_to_kv_pool_allocator
            allocator.clear()
            self.slots = torch.stack([allocator.alloc(length) for _ in range(batch)])
        table[1 : batch + 1, :length] = self.slots.to(table.dtype)
        self.requests = torch.arange(1, batch + 1, dtype=torch.int64, device=device)
        self.tokens = torch.randint(10, 1000, (batch,), device=device)
        self.graph = True  # whether every step so far ran as a graph

    def step(self, index: int) -> None:
        """One token more for each request: the ``index``-th after its context."""
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        length = self.context + index + 1  # the new token counted
        lengths = torch.full((self.batch,), length, dtype=torch.int64, device=self.runner.device)
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE, batch_size=self.batch, input_ids=self.tokens,
            req_pool_indices=self.requests, seq_lens=lengths, out_cache_loc=self.slots[:, length - 1].contiguous(),
            seq_lens_sum=self.batch * length, orig_seq_lens=lengths,
            seq_lens_cpu=torch.full((self.batch,), length, dtype=torch.int64), positions=lengths - 1,
            spec_algorithm=SpeculativeAlgorithm.NONE, capture_hidden_mode=CaptureHiddenMode.NULL,
            num_token_non_padded_cpu=self.batch, global_forward_mode=ForwardMode.DECODE,
        )  # fmt: skip
        output = self.runner.forward(batch)
        self.graph = self.graph and bool(output.can_run_graph)
        self.tokens = output.logits_output.next_token_logits.argmax(-1)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def measure(runner: Any, batch: int, context: int, steps: int, shuffled: bool) -> dict[str, Any]:
    """Seconds of a step: the median over repeats of all steps, which run without a stop in between."""
    decoding = Decoding(runner, batch, context, steps, shuffled)
    for index in range(min(WARM_UP, steps)):
        decoding.step(index)
    times = []
    for _ in range(REPEATS):
        synchronize(runner.device)
        begin = time.perf_counter()
        for index in range(steps):
            decoding.step(index)
        synchronize(runner.device)
        times.append((time.perf_counter() - begin) / steps)
    seconds = statistics.median(times)
    return {
        "batch": batch, "context": context, "seconds": seconds, "spread": max(times) / min(times),
        "tokens_per_second": batch / seconds, "graph": decoding.graph,
    }  # fmt: skip


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that a decode step reads: all but an embedding of which a few rows are looked up."""
    tensors = {tensor.data_ptr(): (name, tensor) for name, tensor in model.named_parameters()}
    total = sum(tensor.nbytes for _, tensor in tensors.values())
    names = [name for name, _ in model.named_parameters()]
    embedding = next((tensor.nbytes for name, tensor in tensors.values() if "embed_tokens" in name), 0)
    return total - (embedding if any("lm_head" in name for name in names) else 0)


def main() -> None:
    plan = json.loads(sys.argv[1])
    torch.manual_seed(0)
    began = time.monotonic()
    context, steps = plan["context"], plan["steps"]
    found: dict[str, Any] = {"copy_bytes_per_second": copy_bandwidth() if torch.cuda.is_available() else None}
    runner, sizes = make_runner(plan["arguments"], plan["batches"], context + steps, plan["max_batch"])
    pool = runner.token_to_kv_pool
    if (type(pool).__name__ == "PackedPool") != plan["packed"]:
        sys.exit(f"the pool is a {type(pool).__name__}")
    fill(runner)
    found |= {
        "capacity": runner.max_total_num_tokens,
        "bytes_per_token": sum(rows.nbytes // len(rows) for rows in [*pool.k_buffer, *pool.v_buffer]),
        "weight_bytes": weight_bytes(runner.model),
        "setup_seconds": time.monotonic() - began,
        "batches": [],
        "shuffled": [],
    }
    for kind in ("batches", "shuffled"):
        for size in sizes:
            found[kind].append(measure(runner, size, context, steps, kind == "shuffled"))
            Path(plan["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
