"""Layer-alone loss: KL of the model's output with one side of one layer stored in a class and everything else in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from torch import Tensor

from kvtuner_kernels.layout import RAW, LayerSpec, TensorSpec
from kvtuner_kernels.reference import Centres
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.evaluation.stored import StoredCache

LEAST: Final = 1e-12  # of an error


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
    keys: Sequence[Sequence[tuple[TensorSpec, float]]],
    values: Sequence[Sequence[tuple[TensorSpec, float]]],
    least_error: float = 0.0,
    advance: Callable[[], None] = lambda: None,
    *,
    one_a_width: bool = False,
) -> tuple[list[list[float]], list[list[float]]]:
    """Losses of every layer's key specs, with values at 16 bits, and the other way round; same shapes as given.

    Args:
        alone: measures one loss.
        keys, values: by layer, each spec with its e_o.
        least_error: a spec with a smaller e_o is not run: to second order the loss is quadratic in the error, so it is
            extrapolated from the measured spec with the nearest e_o.
        advance: called after each spec.
        one_a_width: of the specs with the same bits only the one with the smallest e_o is run; the others are extrapolated.
    """
    found: tuple[list[list[float]], list[list[float]]] = ([], [])
    for layer, sides in enumerate(zip(keys, values, strict=True)):
        for side, specs in enumerate(sides):
            run = [(spec, error) for spec, error in specs if error >= least_error and not spec.raw]
            run = run or [(spec, error) for spec, error in specs if not spec.raw]
            if one_a_width:
                finest = {spec.bits: (spec, error) for spec, error in sorted(run, key=lambda pair: -pair[1])}
                run = list(finest.values())
            losses: dict[TensorSpec, float] = {TensorSpec(): 0.0}
            for spec, _ in run:
                losses[spec] = alone.loss(layer, LayerSpec(spec, RAW) if side == 0 else LayerSpec(RAW, spec))
            for spec, error in specs:
                if spec not in losses:
                    nearest, known = min(run, key=lambda pair: abs(math.log(max(error, LEAST) / max(pair[1], LEAST))))
                    losses[spec] = losses[nearest] * (error / max(known, LEAST)) ** 2
                advance()
            found[side].append([losses[spec] for spec, _ in specs])
    return found
