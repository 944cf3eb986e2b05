"""Whether calibration can see and replace the keys and values of a model's layers. :mod:`kvtuner_search.profile.model_support` checks
config.json before that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvtuner_search.errors import DataError
from kvtuner_search.models.attention import NAME, attends, mark_layers, tapped
from kvtuner_search.profile.kinds import FULL_KIND, LayerKind


def check_hooked(
    config: Any,
    layers: int,
    source: str,
    trust_remote_code: bool = False,
    kinds: Sequence[LayerKind] = (),
    reach: int | None = None,
) -> None:
    """Refuse a model whose attention does not go through our function, or whose layers transformers gives other windows than config.json says; the
    model is built without weights, so nothing is read.

    Args:
        config: a transformers config.
        layers: number of the model's layers.
        source: what messages call the model.
        trust_remote_code: run code that comes with the model.
        kinds: what each layer is by config.json; empty if all are full.
        reach: most positions, if known; a window at least that long is full attention.

    Raises:
        DataError: with the reason.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch.bfloat16, attn_implementation=NAME, trust_remote_code=trust_remote_code
            )  # experts are multiplied in bfloat16 only, where there are no numbers
    except Exception as error:
        if NAME in str(error) or "attn_implementation" in str(error):  # it looks for an attention class of that name
            raise DataError(f"{source}: {_unseen(config)}: transformers cannot replace its attention") from error
        return  # not every model can be built without its weights; the loaded one is checked
    model.eval()
    mark_layers(model, kinds)
    owner_of_layers(model.base_model, layers, source)
    tokens = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    for mask in ({}, {"attention_mask": torch.ones_like(tokens)}):  # without one, most look into the positions
        seen: set[int] = set()
        recorder = CallRecorder(seen)
        try:
            with torch.device("meta"), tapped(recorder), torch.inference_mode():
                model(input_ids=tokens, use_cache=False, **mask)
        except DataError:
            if not mask:
                raise
            return  # it may be about that mask, which no text gets
        except Exception:  # it does not run without weights
            continue
        check_seen(seen, layers, source, config)
        _check_windows(recorder.local, kinds, reach, source)
        return


def check_seen(seen: set[int], layers: int, source: str, config: Any) -> None:
    """Refuse a model if layers outside ``seen`` did not show their keys and values.

    Raises:
        DataError: names the first layer that did not.
    """
    unseen = sorted(set(range(layers)) - seen)
    if unseen:
        raise DataError(f"{source}: {_unseen(config)}: layer {unseen[0]} computes attention in its own code")


def _check_windows(local: dict[int, int | None], kinds: Sequence[LayerKind], reach: int | None, source: str) -> None:
    """Refuse a full layer that transformers gives a window; attention itself refuses the other differences."""
    for layer, window in sorted(local.items()):
        kind = kinds[layer] if layer < len(kinds) else FULL_KIND
        if not kind.window and window is not None and (reach is None or window < reach):
            raise DataError(
                f"{source}: layer {layer} attends in a window or chunk of {window} tokens in transformers, by config.json it is {kind}: this"
                " architecture is not supported"
            )


def owner_of_layers(base: nn.Module, count: int, source: str) -> tuple[Any, str]:
    """The module that holds the decoder's layers, and the name of its list of them.

    Raises:
        DataError: if there is no list of ``count`` layers.
    """
    for module in base.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count and _attends(child[0]):
                return module, name
    raise DataError(f"{source}: {type(base).__name__} has no list of {count} layers that attend: it is not supported")


def _attends(layer: nn.Module) -> bool:
    return any(isinstance(getattr(part, "layer_idx", None), int) for part in layer.modules())


def _unseen(config: Any) -> str:
    return f"the keys and values of model type {getattr(config, 'model_type', 'unknown')!r} cannot be seen or replaced"


class CallRecorder:
    """A tap that notes which layers call it, and in which window or chunk transformers lets each attend (None: in none)."""

    def __init__(self, seen: set[int]) -> None:
        self.seen = seen
        self.local: dict[int, int | None] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.add(layer)
        how = attends()
        self.local[layer] = None if how is None else how.local
        return key, value
