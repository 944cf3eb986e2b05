"""Run a model batch by batch: hidden states, logits, and restarts from the middle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvtuner_search.errors import DataError, first_line
from kvtuner_search.models.attention import Tap, tapped
from kvtuner_search.models.load import LoadedModel
from kvtuner_search.models.support import CallRecorder, check_seen, owner_of_layers


class Runner:
    """Passes over a loaded model. All methods but :meth:`differentiate` run without gradients, and parameters never get any.

    ``can_resume`` tells whether a pass may start at a layer from that layer's input, which saves the layers before it. A trial
    pass decides it; if it does not work (embedding scales, per-layer inputs), passes start at the first layer. ``logits`` maps last hidden
    states to logits as the model does, with its scale or cap.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        base: Any = loaded.model.base_model
        self.base = (
            base.model if base is loaded.model and hasattr(base, "model") else base
        )  # Llama 4 names another prefix
        self._owner, self._list = owner_of_layers(self.base, loaded.info.num_layers, loaded.info.id)
        self.layers: nn.ModuleList = getattr(self._owner, self._list)
        self.head: nn.Linear = loaded.model.get_output_embeddings()
        self._scale, self._cap = _after_head(loaded.model.config)
        self.vocabulary = int(self.head.weight.shape[0])
        self.embedded = int(loaded.model.get_input_embeddings().weight.shape[0])
        self.can_resume = self._probe()

    def check_tokens(self, tokens: Iterable[int], what: str) -> None:
        """Refuse token ids that the model has no embedding for; ``what`` says where they come from.

        Raises:
            DataError: names the id and the number of embeddings.
        """
        for token in tokens:
            if not 0 <= token < self.embedded:
                raise DataError(
                    f"token id {token} of {what} is beyond the {self.embedded} embeddings of {self.loaded.info.id}: its tokenizer belongs"
                    " to another model, or has tokens that the model lacks; take both from the same model"
                )

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, tap: Tap | None = None, positions: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, E] of token ids [B, T] at positions int64 [B, T], or from position 0 on."""
        given = {} if positions is None else {"position_ids": positions.to(self.loaded.device)}
        with tapped(tap, positions):
            output: Tensor = self.base(
                input_ids=tokens.to(self.loaded.device), use_cache=False, **given
            ).last_hidden_state
        return output

    @torch.inference_mode()
    def hidden_from(self, layer: int, state: Tensor, tap: Tap | None = None) -> Tensor:
        """Last hidden states [B, T, E] from the input [B, T, E] of ``layer``; needs ``can_resume``."""
        with tapped(tap), self._from(layer):
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of last hidden states [..., E], in the model's dtype; gradients pass."""
        found: Tensor = self.head(hidden)
        if self._scale is not None:
            found = found * self._scale
        return found if self._cap is None else torch.tanh(found / self._cap) * self._cap

    @torch.inference_mode()
    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """fp32 log-probabilities [n, vocabulary] of hidden states [n, E]."""
        return self.logits(hidden).float().log_softmax(-1)

    def differentiate(self, tokens: Tensor, tap: Tap, start: Callable[[Tensor], Tensor]) -> None:
        """A forward and a backward pass over token ids [B, T].

        The backward pass recomputes every layer, so that memory holds only each layer's input and one layer's activations.

        Args:
            tokens: token ids.
            tap: sees the forward pass once; gradient hooks that it sets on keys and values run in the backward pass.
            start: maps the last hidden states [B, T, E] to their gradient.
        """
        with torch.inference_mode(False), torch.enable_grad(), _reproducible(), self._computed_again():
            embedding: nn.Module = self.loaded.model.get_input_embeddings()
            handle = embedding.register_forward_hook(lambda _module, _arguments, output: output.requires_grad_())
            try:
                with tapped(tap):  # but not in the backward pass, which would show the tap everything twice
                    hidden: Tensor = self.base(
                        input_ids=tokens.to(self.loaded.device), use_cache=False
                    ).last_hidden_state
                torch.autograd.backward(hidden, start(hidden.detach()))
            finally:
                handle.remove()

    @contextmanager
    def _computed_again(self) -> Iterator[None]:
        """Layers keep only their inputs for the backward pass."""

        def again(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

            return run

        own = [vars(layer).get("forward") for layer in self.layers]  # set by a device map, if any
        for layer in self.layers:
            layer.forward = again(layer.forward)
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    @contextmanager
    def _from(self, layer: int) -> Iterator[None]:
        """Passes inside the block begin at ``layer``."""
        rest = list(self.layers)[layer:]
        if self.loaded.info.layer_kinds is not None:  # the model looks up by index what each layer is
            rest = [*(_Passed(before) for before in list(self.layers)[:layer]), *rest]
        setattr(self._owner, self._list, nn.ModuleList(rest))
        try:
            yield
        finally:
            setattr(self._owner, self._list, self.layers)

    @torch.inference_mode()
    def _probe(self) -> bool:
        """Check what the other methods rely on, on a few tokens."""
        tokens = torch.arange(1, 9, device=self.loaded.device).remainder(self.embedded).unsqueeze(0)
        seen: set[int] = set()
        whole = CallRecorder(seen)
        try:
            hidden = self.hidden(tokens, whole)
            expected = self.loaded.model(input_ids=tokens, use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            first = first_line(error)
            raise DataError(
                f"{self.loaded.info.id} cannot be run: {first[:200].rstrip('.')}: its config.json does not fit its class"
            ) from error
        check_seen(seen, len(self.layers), self.loaded.info.id, self.loaded.model.config)
        if not bool(torch.isfinite(expected).all()):
            raise DataError(
                f"the logits of {self.loaded.info.id} are not finite in {str(self.loaded.dtype).removeprefix('torch.')}, though its"
                " weights are: give another --dtype, or restore the checkpoint"
            )
        if not torch.allclose(self.logits(hidden), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise DataError(
                f"{self.loaded.info.architecture} changes its logits after the output embedding: this architecture is not supported"
            )
        inputs = self.layer_inputs(tokens)
        middle, part = len(self.layers) // 2, CallRecorder(set())
        try:
            same = torch.equal(self.hidden_from(middle, inputs[middle], part), hidden)
        except (TypeError, ValueError, IndexError, KeyError, RuntimeError):
            return False  # the base model needs more than the hidden state
        except DataError:  # layers got another one's mask
            return False
        return same and all(whole.local[layer] == window for layer, window in part.local.items())


class _Passed(nn.Module):
    """In the place of a layer that a pass does not run: it returns its input, and looks like that layer to who asks what kind it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["_layer"][0], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def _after_head(config: Any) -> tuple[float | None, float | None]:
    """What a model multiplies its logits by, and the soft cap that follows; None is neither."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) if str(text.model_type).startswith("cohere") else None
    return scale, getattr(text, "final_logit_softcapping", None)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Attention's backward kernels on a GPU add up in a fixed order, as far as torch can, so that a seed gives the same basis."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*determinis", category=UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
