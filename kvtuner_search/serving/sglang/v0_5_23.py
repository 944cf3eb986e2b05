"""Everything specific to SGLang 0.5.23: where its code is hooked, and the names that its objects use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sglang.srt.plugins.hook_registry import HookType

from kvtuner_search.errors import UsageError
from kvtuner_search.serving.configuration import ServingConfiguration
from kvtuner_search.serving.sglang import hooks, launcher

_CONFIGURATOR: Final = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"


def register_flags() -> None:
    """Let SGLang's command line know our flags."""
    hooks.register_flags(HOOK_POINTS)


def activate(configuration: ServingConfiguration) -> None:
    """Let this process serve a profile."""
    hooks.activate(HOOK_POINTS, configuration)


def _place(configurator: Any) -> Any:
    """A cache configurator's place among the ranks."""
    from sglang.srt.runtime_context import get_exec, get_parallel

    from kvtuner_search.serving.sglang.rank import RankPlace

    model, layers, parallel, chosen = configurator.model_config, configurator.layer_info, get_parallel(), get_exec()
    return RankPlace(
        start_layer=layers.start_layer,
        end_layer=layers.end_layer,
        num_layers=model.num_hidden_layers,
        kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.head_dim,
        value_head_dim=model.v_head_dim,
        rank=parallel.attn_tp_rank,
        ranks=parallel.attn_tp_size,
        dtype=configurator.model_dtype,
        cache_dtype=configurator.kv_cache_dtype,
        device=configurator.device,
        as_stored=chosen.kernel.attention_backend == "torch_native"
        or chosen.deterministic.enable_deterministic_inference,
    )


def _measure_cell(original: Callable[..., None], sizes: Any, configurator: Any) -> None:
    """Bytes of a token: ours for the model's own layers, SGLang's for a draft model's."""
    original(sizes, configurator)
    if configurator.is_draft_worker:
        return
    from kvtuner_search.serving.sglang import rank

    with launcher.refusing():
        place, which = _place(configurator), rank.served_profile(hooks.active())
        packed = rank.rank_bytes_per_token(place, which)
        hooks.reserve(sizes, rank.rank_basis_bytes(place, which))
    sizes._cell_size += packed - sizes._compute_cell_size(configurator, configurator.layer_info.num_effective_layers)


def _pool_class(original: Callable[..., Any], configurator: Any, *, kind: str, default: type) -> Any:
    """The class of the pool that a rank makes for plain keys and values."""
    if kind != "mha" or configurator.is_draft_worker:
        return original(configurator, kind=kind, default=default)
    from kvtuner_search.serving.sglang import rank

    with launcher.refusing():
        return rank.pool_factory(_place(configurator), rank.served_profile(hooks.active()))


def _configure(original: Callable[..., Any], configurator: Any, **named: Any) -> Any:
    """Make the pools before graphs are captured, not after; then compare reports with the other ranks."""
    if configurator.is_draft_worker:
        return original(configurator, **named)
    from sglang.srt.distributed.parallel_state import get_world_group

    from kvtuner_search.serving.sglang import rank

    configurator.post_capture_kv_active = False
    with launcher.refusing():  # the pool itself may find that a basis cannot be used
        place, which, world = _place(configurator), rank.served_profile(hooks.active()), get_world_group()
        if configurator.is_hybrid_swa:
            raise UsageError(
                "SGLang 0.5.23 would keep layers with windows in a pool of their own, which a profile does not serve there yet: give"
                " --disable-hybrid-swa-memory, or use SGLang 0.5.14"
            )
        model = configurator.model_config
        rank.check_attention(configurator.model, model.hf_text_config, model.context_len, place, which)
        result = original(configurator, **named)
        pool, tokens = result.token_to_kv_pool, result.max_total_num_tokens
        rank.check_ranks(pool, tokens, place, which, world.rank_in_group, world.world_size)
    return result


def _resolved(arguments: Any) -> Any:
    """Server arguments with SGLang's own choices, which it keeps separate from the given values."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    return resolved_view(arguments)


HOOK_POINTS: Final = hooks.HookPoints(
    version="0.5.23",
    arguments="sglang.srt.server_args.ServerArgs",
    ready="sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
    info="sglang.srt.managers.scheduler.Scheduler.get_init_info",
    pool=(
        (
            "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator.__init__",
            _measure_cell,
            HookType.AROUND,
        ),
        (
            "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator.calculate_pool_sizes",
            hooks.leave_room,
            HookType.AROUND,
        ),
        (f"{_CONFIGURATOR}._resolve_kv_pool_class", _pool_class, HookType.AROUND),
        (f"{_CONFIGURATOR}.configure", _configure, HookType.AROUND),
    ),
    resolved=_resolved,
)
