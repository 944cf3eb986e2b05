"""The offline reference of a server: transformers' own model over packed rows, one request at a time, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from kvtuner_kernels.reference import NO_CENTRES, attend, pack_rows
from kvtuner_search.evaluation.offline import open_profile
from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.profile.kinds import FULL_KIND

NAME = "packed-rows"
COUNT = 16  # greedy tokens that tests compare


class Greedy(NamedTuple):
    """Greedy tokens, and how far each was ahead of the next best one, in logits."""

    tokens: list[int]
    margins: list[float]


class OfflinePacked:
    """A model, whose attention reads nothing but the rows of a profile; the reference model if none is given."""

    def __init__(self, profile: Path, dtype: torch.dtype, model: Path | None = None) -> None:
        loaded, self._centres = open_profile(profile)
        self._specs, self._kinds = loaded.layer_specs(), loaded.model.kinds
        self._rows: list[Tensor] = []
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model or reference_model_path(), dtype=dtype, attn_implementation=NAME
        ).eval()

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float,
        softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        layer = module.layer_idx
        spec, centres = self._specs[layer], self._centres.get(layer, NO_CENTRES)
        begins = layer == len(self._rows)  # the prompt; what follows is decoded
        first = (torch.arange(key.shape[2]) == 0) & begins
        new = pack_rows(key[0].transpose(0, 1), value[0].transpose(0, 1), spec, centres, first)
        if begins:
            self._rows.append(new)
        else:
            self._rows[layer] = torch.cat((self._rows[layer], new))
        out = attend(
            query[0].transpose(0, 1), self._rows[layer], spec, key.shape[1], centres, softmax_scale=scaling,
            soft_cap=softcap or 0.0, window=self._kinds[layer].window, sinks=s_aux, dtype=query.dtype,
        )  # fmt: skip
        return out.to(query.dtype).unsqueeze(0), None

    def forget_windows(self) -> None:
        """Attend to all rows in every layer from now on."""
        self._kinds = (FULL_KIND,) * len(self._kinds)

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> Greedy:
        """``count`` greedy tokens after ``prompt``, which is read in one piece."""
        self._rows = []
        found: Greedy = Greedy([], [])
        chunk, position = list(prompt), 0
        for _ in range(count):
            positions = torch.arange(position, position + len(chunk)).unsqueeze(0)
            logits = self._model(
                input_ids=torch.tensor([chunk]), position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits[0, -1]
            best = logits.float().topk(2)
            found.tokens.append(int(best.indices[0]))
            found.margins.append(float(best.values[0] - best.values[1]))
            position += len(chunk)
            chunk = found.tokens[-1:]
        return found
