"""Run a model batch by batch: hidden states, logits, and restarts from the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvtuner_search.errors import DataError
from kvtuner_search.models.attention import Tap, tapped
from kvtuner_search.models.load import LoadedModel


class Runner:
    """Forward passes over a loaded model. All methods run without gradients.

    ``can_resume`` tells whether a pass may start at a layer from that layer's input, which saves the layers before it; it is found
    out by trying, and where it does not hold (embedding scales, per-layer inputs) passes start at the first layer.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.base: Any = loaded.model.base_model
        self.layers: nn.ModuleList = self.base.layers
        self.head: nn.Linear = loaded.model.get_output_embeddings()
        self.vocabulary = int(self.head.weight.shape[0])
        self.can_resume = self._probe()

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, tap: Tap | None = None, positions: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, E] of token ids [B, T] at positions int64 [B, T], or from position 0 on."""
        given = {} if positions is None else {"position_ids": positions.to(self.loaded.device)}
        with tapped(tap):
            output: Tensor = self.base(
                input_ids=tokens.to(self.loaded.device), use_cache=False, **given
            ).last_hidden_state
        return output

    @torch.inference_mode()
    def hidden_from(self, layer: int, state: Tensor, tap: Tap | None = None) -> Tensor:
        """Last hidden states [B, T, E] from the input [B, T, E] of ``layer``; needs ``can_resume``."""
        with tapped(tap), self._only(range(layer, len(self.layers))):
            output: Tensor = self.base(inputs_embeds=state, use_cache=False).last_hidden_state
        return output

    @torch.inference_mode()
    def layer_inputs(self, tokens: Tensor) -> list[Tensor]:
        """The input [B, T, E] of every layer, unquantized."""
        inputs: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs.append(arguments[0] if arguments else named["hidden_states"])

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        try:
            self.hidden(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return inputs

    @torch.inference_mode()
    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """fp32 log-probabilities [n, vocabulary] of hidden states [n, E]."""
        logits: Tensor = self.head(hidden)
        return logits.float().log_softmax(-1)

    @contextmanager
    def _only(self, which: range) -> Iterator[None]:
        kept = self.base.layers
        self.base.layers = nn.ModuleList([kept[index] for index in which])
        try:
            yield
        finally:
            self.base.layers = kept

    @torch.inference_mode()
    def _probe(self) -> bool:
        """Check what the other methods rely on, on a few tokens."""
        tokens = torch.arange(1, 9, device=self.loaded.device).unsqueeze(0)
        hidden = self.hidden(tokens)
        expected = self.loaded.model(input_ids=tokens, use_cache=False).logits
        if not torch.allclose(self.head(hidden), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise DataError(
                f"{self.loaded.info.architecture} changes its logits after the output embedding: this architecture is not supported"
            )
        inputs = self.layer_inputs(tokens)
        middle = len(self.layers) // 2
        try:
            return torch.equal(self.hidden_from(middle, inputs[middle]), hidden)
        except (TypeError, ValueError, IndexError, KeyError, RuntimeError):
            return False  # the base model wants more than the hidden state
