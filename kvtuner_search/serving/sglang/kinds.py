"""Whether SGLang attends as the profile says, layer by layer: windows, soft caps and attention sinks.

SGLang's class of a model decides what a layer attends to, and some classes do not do what config.json says. The launcher knows those
by name (:func:`refuse_known`; no torch); each rank compares every layer of the model that it has loaded (:func:`check_layers`).

A window that is at least the server's context never acts: such a layer is full, on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from kvtuner_search.errors import ServingError, UsageError
from kvtuner_search.profile.kinds import FULL_KIND, LayerKind
from kvtuner_search.profile.schema import ModelInfo
from kvtuner_search.profile.text import ranges

_TO_ALL: Final = "attends to all tokens there"
_OTHERWISE: Final = {  # by class, what SGLang 0.5.14 does in layers to which config.json gives a window or chunks
    **dict.fromkeys(
        (
            "LlamaForCausalLM", "MinistralForCausalLM", "Mistral3ForConditionalGeneration", "MistralForCausalLM", "MixtralForCausalLM",
            "Phi3ForCausalLM", "PhimoeForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM",
            "Qwen3MoeForCausalLM", "Starcoder2ForCausalLM",
        ),
        _TO_ALL,
    ),
    "Cohere2ForCausalLM": "attends in windows that are one token longer",
    **dict.fromkeys(("Llama4ForCausalLM", "Llama4ForConditionalGeneration"), "attends in chunks with FlashAttention only, not over packed rows"),
}  # fmt: skip
_SINKS: Final = ("sinks", "attention_sink_bias")  # what SGLang's classes call them


_TWO_POOLS: Final = ("GptOssForCausalLM", "Llama4ForConditionalGeneration")
_ONE_POOL: Final = (
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
)
RATIO: Final = 0.8  # SGLang's default of --swa-full-tokens-ratio


def pool_ratio(model: ModelInfo, opted_in: bool, switched_off: bool, ratio: float | None) -> float | None:
    """Slots of layers with windows for each slot of the others, as SGLang 0.5.14 makes its pools; None: all layers share one pool.

    Args:
        model: what is served.
        opted_in: its config.json has ``is_hybrid_swa``.
        switched_off: ``--disable-hybrid-swa-memory``.
        ratio: ``--swa-full-tokens-ratio``, if given.
    """
    two = model.architecture in _TWO_POOLS or (opted_in and model.architecture not in _ONE_POOL)
    return None if switched_off or not two or model.layer_kinds is None else ratio or RATIO


def refuse_known(model: ModelInfo, context: int | None, model_path: str) -> None:
    """Refuse a model whose class in SGLang is known to attend otherwise than config.json says.

    Args:
        model: what is to be served.
        context: most tokens of a sequence (``--context-length``), if given.
        model_path: as the user calls it.

    Raises:
        UsageError: names the first such layer.
    """
    does = _OTHERWISE.get(model.architecture)
    if does is None:
        return
    for index, kind in enumerate(model.kinds):
        if kind.within(context).window:
            raise UsageError(
                f"{model_path}: layer {index} is {kind} by its config.json, but SGLang's {model.architecture} {does}:"
                f" {_remedy(kind)}"
            )


def check_layers(
    loaded: Any, kinds: Sequence[LayerKind], layers: range, context: int, soft_cap: float | None, sinks: bool
) -> None:
    """Compare every attention layer of a loaded model with the profile.

    Args:
        loaded: SGLang's model, a torch.nn.Module.
        kinds: of all layers of the model, as the profile says.
        layers: the global indices of this rank's.
        context: most tokens of a sequence.
        soft_cap: of the scores, by config.json; None or 0 is none.
        sinks: whether the model has attention sinks, by config.json.

    Raises:
        ServingError: names the first layer that SGLang attends otherwise, both sides and the remedy.
    """
    name = type(loaded).__name__
    seen = set()
    for layer, module in attention_layers(loaded):
        index, stated = layer.layer_id, kinds[layer.layer_id]
        seen.add(index)
        found = attended(layer)
        if found.within(context) != stated.within(context):
            raise ServingError(
                f"layer {index}: SGLang's {name} attends {_words(found)}, the profile says {stated}: {_remedy(stated)}"
            )
        if float(layer.logit_cap or 0) != float(soft_cap or 0):
            raise ServingError(
                f"layer {index}: SGLang's {name} caps its scores at {layer.logit_cap:g}, config.json at {soft_cap or 0:g} (0 is no cap):"
                " serve without a profile"
            )
        if sinks != has_sinks(module):
            raise ServingError(
                f"layer {index}: SGLang's {name} has {'no ' if sinks else ''}attention sinks, the profile's model has"
                f" {'some' if sinks else 'none'}: serve without a profile"
            )
    missing = sorted(set(layers) - seen)
    if missing and any(kind.window for kind in kinds):
        raise ServingError(
            f"layers {ranges(missing)} of SGLang's {name} are no modules of the model, so their windows cannot be compared with the"
            " profile's: serve without a profile"
        )


def check_pools(loaded: Any, windowed: dict[int, bool]) -> None:
    """Compare the layers of a model with the pools that SGLang gives them: one for full layers, one that forgets what left the window.

    Args:
        loaded: SGLang's model.
        windowed: by global layer, whether its pool forgets.

    Raises:
        ServingError: names the first layer whose pool does not fit.
    """
    for layer, _ in attention_layers(loaded):
        found, forgets = attended(layer), windowed[layer.layer_id]
        if bool(found.window) != forgets:
            raise ServingError(
                f"layer {layer.layer_id}: SGLang's {type(loaded).__name__} attends {_words(found)}, but its pool"
                f" {'forgets' if forgets else 'keeps'} what is older than the window: give --disable-hybrid-swa-memory"
            )


def attended(layer: Any) -> LayerKind:
    """What SGLang's attention layer attends to. SGLang counts the tokens before a query's own."""
    size = layer.sliding_window_size
    return FULL_KIND if size is None or size < 0 else LayerKind("sliding", size + 1)


def attention_layers(loaded: Any) -> Iterator[tuple[Any, Any]]:
    """Each attention layer of SGLang's in a model, and the module that holds it."""
    from sglang.srt.layers.radix_attention import RadixAttention

    for module in loaded.modules():
        for child in module.children():
            if isinstance(child, RadixAttention):
                yield child, module


def has_sinks(holder: Any) -> bool:
    """Whether the module that holds an attention layer has attention sinks for it."""
    return any(getattr(holder, name, None) is not None for name in _SINKS)


def _words(kind: LayerKind) -> str:
    return f"in a window of {kind.window} tokens" if kind.window else "to all tokens"


def _remedy(kind: LayerKind) -> str:
    if not kind.window:
        return "calibrate the model as it is served, or serve without a profile"
    return (
        f"give --context-length {kind.window} or less, with which the difference never acts, or serve without a profile"
    )
