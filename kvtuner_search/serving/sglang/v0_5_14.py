"""Everything specific to SGLang 0.5.14: where its code is hooked, and the names that its objects use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sglang.srt.plugins.hook_registry import HookType

from kvtuner_search.serving.configuration import ServingConfiguration
from kvtuner_search.serving.sglang import hooks, launcher

_SIZES: Final = "sglang.srt.model_executor.pool_configurator"


def register_flags() -> None:
    """Let SGLang's command line know our flags."""
    hooks.register_flags(HOOK_POINTS)


def activate(configuration: ServingConfiguration) -> None:
    """Let this process serve a profile."""
    hooks.activate(HOOK_POINTS, configuration)


def _place(runner: Any) -> Any:
    """The model runner's place among the ranks."""
    from sglang.srt.layers.dp_attention import get_attention_tp_rank, get_attention_tp_size

    from kvtuner_search.serving.sglang.rank import RankPlace

    model, arguments = runner.model_config, runner.server_args
    return RankPlace(
        start_layer=runner.start_layer,
        end_layer=runner.end_layer,
        num_layers=model.num_hidden_layers,
        kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.head_dim,
        value_head_dim=model.v_head_dim,
        rank=get_attention_tp_rank(),
        ranks=get_attention_tp_size(),
        dtype=runner.dtype,
        cache_dtype=runner.kv_cache_dtype,
        device=runner.device,
        as_stored=arguments.attention_backend == "torch_native" or arguments.enable_deterministic_inference,
        windowed=tuple(model.swa_attention_layer_ids) if runner.is_hybrid_swa else None,
    )


def _measure_cell(original: Callable[..., None], configurator: Any, runner: Any) -> None:
    """Bytes of a token: ours for the model's own layers, SGLang's for a draft model's."""
    original(configurator, runner)
    if runner.is_draft_worker:
        return
    from kvtuner_search.serving.sglang import rank

    with launcher.refusing():
        place, which = _place(runner), rank.served_profile(hooks.active())
        packed = rank.rank_bytes_per_token(place, which)
        hooks.reserve(configurator, rank.rank_basis_bytes(place, which))
    configurator._cell_size += packed - configurator._compute_cell_size(runner, runner.num_effective_layers)


def _measure_windows(original: Callable[..., None], configurator: Any, runner: Any) -> None:
    """As :func:`_measure_cell`, where layers with windows have a pool of their own."""
    if not runner.is_draft_worker:
        model = runner.model_config
        # SGLang counts the next stage's first layer too.
        for name in ("full_attention_layer_ids", "swa_attention_layer_ids"):
            setattr(model, name, [index for index in getattr(model, name) or () if index < runner.end_layer])
    original(configurator, runner)
    if runner.is_draft_worker:
        return
    from kvtuner_search.serving.sglang import rank

    with launcher.refusing():
        place, which = _place(runner), rank.served_profile(hooks.active())
        rank.check_windows(place)
        windows = rank.rank_window_bytes(place, which)
        hooks.set_bytes(configurator, rank.rank_bytes_per_token(place, which) - windows, windows)
        hooks.reserve(configurator, rank.rank_basis_bytes(place, which))


def _init_pools(original: Callable[..., None], runner: Any) -> None:
    """Swap the class of SGLang's pool while a rank makes its pools; then compare reports with the other ranks."""
    if runner.is_draft_worker:
        original(runner)
        return
    from sglang.srt.distributed.parallel_state import get_world_group
    from sglang.srt.model_executor import model_runner_kv_cache_mixin as module

    from kvtuner_search.serving.sglang import rank

    with launcher.refusing():
        place, which, world = _place(runner), rank.served_profile(hooks.active()), get_world_group()
        model = runner.model_config
        rank.check_attention(runner.model, model.hf_text_config, model.context_len, place, which)
        own = module.MHATokenToKVPool, module.SWAKVPool
        module.MHATokenToKVPool = rank.pool_factory(place, which)
        module.SWAKVPool = rank.swa_pool_factory(which, place.heads)
        try:
            original(runner)
        finally:
            module.MHATokenToKVPool, module.SWAKVPool = own
        pool, tokens = runner.token_to_kv_pool, runner.max_total_num_tokens
        rank.check_ranks(pool, tokens, place, which, world.rank_in_group, world.world_size)


HOOK_POINTS: Final = hooks.HookPoints(
    version="0.5.14",
    arguments="sglang.srt.server_args.ServerArgs",
    ready="sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
    info="sglang.srt.managers.scheduler.Scheduler.get_init_info",
    pool=(
        (f"{_SIZES}.DefaultPoolConfigurator.__init__", _measure_cell, HookType.AROUND),
        (f"{_SIZES}.HybridSWAPoolConfigurator.__init__", _measure_windows, HookType.AROUND),
        *(
            (f"{_SIZES}.{name}.calculate_pool_sizes", hooks.leave_room, HookType.AROUND)
            for name in ("DefaultPoolConfigurator", "HybridSWAPoolConfigurator", "SWAChunkCapPoolConfigurator")
        ),
        (
            "sglang.srt.model_executor.model_runner_kv_cache_mixin.ModelRunnerKVCacheMixin._init_pools",
            _init_pools,
            HookType.AROUND,
        ),
    ),
)
