"""Layer-alone loss: KL of the model's output when one side of one layer is stored in a class and everything else is 16-bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from kvtuner_kernels.layout import RAW, LayerSpec, TensorSpec
from kvtuner_kernels.reference import Centres
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.evaluation.stored import StoredCache


class LayerAlone:
    """Scores one layer's spec at a time on one tier of a scorer, starting at that layer where the model allows it."""

    def __init__(self, scorer: Scorer, tier: int, centres: Mapping[int, Centres]) -> None:
        self.scorer, self.tier, self.centres = scorer, tier, centres
        runner = scorer.runner
        self._inputs = (
            [runner.layer_inputs(tokens) for tokens in scorer.token_batches(tier)] if runner.can_resume else None
        )

    def loss(self, layer: int, spec: LayerSpec) -> float:
        """Loss (see Scores.loss) with ``layer`` stored as ``spec``."""
        if spec == LayerSpec():
            return 0.0
        tap = StoredCache({layer: spec}, self.centres)
        runner, inputs = self.scorer.runner, self._inputs

        def states(batch: int, tokens: Tensor) -> Tensor:
            if inputs is None:
                return runner.hidden(tokens, tap)
            return runner.hidden_from(layer, inputs[batch][layer], tap)

        return self.scorer.score_hidden(self.tier, states).loss


def side_losses(
    alone: LayerAlone,
    keys: Sequence[Sequence[TensorSpec]],
    values: Sequence[Sequence[TensorSpec]],
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[list[float]], list[list[float]]]:
    """Losses of every layer's key specs, with values at 16 bits, and the other way round; same shapes as given."""
    found: tuple[list[list[float]], list[list[float]]] = ([], [])
    for layer, sides in enumerate(zip(keys, values, strict=True)):
        for side, specs in enumerate(sides):
            losses = []
            for spec in specs:
                losses.append(alone.loss(layer, LayerSpec(spec, RAW) if side == 0 else LayerSpec(RAW, spec)))
                advance()
            found[side].append(losses)
    return found
