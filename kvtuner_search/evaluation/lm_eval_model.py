"""lm-eval's own Hugging Face model, with attention reading keys and values as a setting stores them. Needs the extra ``eval``.

Tokenization, few-shot prompts, batching, stop sequences and metrics are lm-eval's. Only its two calls of the model are
replaced: likelihood goes through the scorer's tap, generation through a packed cache that each step reads back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from kvtuner_kernels.reference import Centres
from kvtuner_search.errors import DataError
from kvtuner_search.evaluation.generation import greedy
from kvtuner_search.evaluation.stored import Setting, stored_cache
from kvtuner_search.models.attention import tapped
from kvtuner_search.models.runner import Runner


class StoredLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """An LM of lm-eval over a loaded model.

    Args:
        runner: the model.
        setting: how its cache is stored; 16 bits in every layer is the baseline.
        centres: centring vectors by layer.
        batch_size: sequences of one pass.
        advance: called with the number of sequences after each pass, or answer.
    """

    def __init__(
        self,
        runner: Runner,
        setting: Setting,
        centres: Mapping[int, Centres],
        *,
        batch_size: int,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__(
            pretrained=runner.loaded.model, tokenizer=runner.loaded.tokenizer, backend="causal", batch_size=batch_size
        )
        self.runner, self.setting, self.centres, self.advance = runner, setting, centres, advance

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    @torch.inference_mode()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocabulary] of right-padded token ids [B, T]; causality keeps the padding out."""
        self.runner.check_tokens((int(inps.min()), int(inps.max())), "a task")
        with tapped(stored_cache(self.setting, self.centres)):
            logits: Tensor = self.model(input_ids=inps, use_cache=False).logits
        self.advance(len(inps))
        return logits

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Token ids [B, T + N] of the left-padded prompts [B, T] and their answers, the shorter ones padded at their end.

        Raises:
            DataError: if the task samples, or uses beam search.
        """
        if options.get("do_sample") or options.get("num_beams", 1) != 1:
            raise DataError(
                f"the task generates with {', '.join(f'{k}={v}' for k, v in sorted(options.items()))}: only greedy decoding is"
                " measured here, so set do_sample to false in the task"
            )
        mask = torch.ones_like(context) if attention_mask is None else attention_mask
        prompts = [row[keep.bool()].tolist() for row, keep in zip(context, mask, strict=True)]

        def ended(_: int, tokens: Any) -> bool:
            return tokens[-1] == self.eot_token_id or any(text in self.tok_decode(tokens) for text in stop)

        answers = greedy(self.runner, self.setting, self.centres, prompts, max_length - context.shape[1], ended)
        self.advance(len(prompts))
        longest = max(len(answer) for answer in answers)
        padded = [answer + [self.eot_token_id] * (longest - len(answer)) for answer in answers]
        return torch.cat((context, torch.tensor(padded, device=context.device)), dim=1)

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: our own record describes the model, and lm-eval would query the hub."""
        return {}
