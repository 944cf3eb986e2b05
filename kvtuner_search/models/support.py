"""Whether calibration can see and replace the keys and values of a model's layers. :mod:`kvtuner_search.profile.model_support` checks
config.json before that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvtuner_search.errors import DataError
from kvtuner_search.models.attention import NAME, tapped


def check_hooked(config: Any, layers: int, source: str, trust_remote_code: bool = False) -> None:
    """Refuse a model whose attention does not go through our function; the model is built without weights, so nothing is read.

    Args:
        config: a transformers config.
        layers: number of the model's layers.
        source: what messages call the model.
        trust_remote_code: run code that comes with the model.

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
    owner_of_layers(model.base_model, layers, source)
    tokens = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    for mask in ({}, {"attention_mask": torch.ones_like(tokens)}):  # without one, most look into the positions
        seen: set[int] = set()
        try:
            with torch.device("meta"), tapped(CallRecorder(seen)), torch.inference_mode():
                model(input_ids=tokens, use_cache=False, **mask)
        except DataError:
            if not mask:
                raise
            return  # it may be about that mask, which no text gets
        except Exception:  # it does not run without weights
            continue
        check_seen(seen, layers, source, config)
        return


def check_seen(seen: set[int], layers: int, source: str, config: Any) -> None:
    """Refuse a model if layers outside ``seen`` did not show their keys and values.

    Raises:
        DataError: names the first layer that did not.
    """
    unseen = sorted(set(range(layers)) - seen)
    if unseen:
        raise DataError(f"{source}: {_unseen(config)}: layer {unseen[0]} computes attention in its own code")


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
    """A tap that notes which layers call it."""

    def __init__(self, seen: set[int]) -> None:
        self.seen = seen

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.add(layer)
        return key, value
