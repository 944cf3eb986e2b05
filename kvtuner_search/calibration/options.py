"""Everything that a calibration run is told."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Final

from kvtuner_search.data import DEFAULT_SOURCES
from kvtuner_search.models.load import ModelOptions

TIERS: Final = (1 / 6, 2 / 5, 1.0)  # fractions of each source's search samples that the rungs have seen


@dataclass(frozen=True)
class CalibrationOptions:
    """A calibration run; the defaults suit the embedded reference model on two CPU cores."""

    model: ModelOptions = field(default_factory=ModelOptions)
    sources: tuple[str, ...] = DEFAULT_SOURCES
    samples: int = 5  # sequences of each source in the search split; selection and test have as many each
    length: int = 448  # most tokens of a sequence
    seed: int = 0
    bits: tuple[int, ...] = (2, 4, 8, 16)
    group_sizes: tuple[int, ...] = (0,)  # channels; 0 is the whole head
    symmetric: bool = True  # whether classes without a stored minimum may be chosen
    bands: bool = True  # whether storage in a fitted basis, in bands, may be chosen
    target_bits: tuple[float, ...] = (4.0,)  # budgets in effective bits, one profile each
    max_loss: float | None = None  # instead of budgets: the cheapest setting whose loss is at most this
    trials: int = 32
    sampler: str = "tpe"  # tpe or nsga2
    stages: int = 1  # pipeline stages
    grouping: str = "auto"  # auto, on or off
    random_baseline: bool = True  # a random search of the same number of trials, for comparison
    batch_tokens: int = 4096  # padded tokens of one forward pass

    def fingerprint(self, model: dict[str, Any], digests: list[str]) -> str:
        """Digest of what a study's trials depend on; the number of trials is not part of it, so a study can be prolonged."""
        content = {
            "model": model,
            "dtype": self.model.dtype,
            "data": digests,
            "seed": self.seed,
            "space": [self.bits, self.group_sizes, self.symmetric, self.bands, self.grouping, self.stages],
            "search": [self.target_bits, self.max_loss, self.sampler],
        }
        return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
