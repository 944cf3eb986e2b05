"""All options of a calibration run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kvtuner_kernels.layout import BITS, LAYOUT_VERSION
from kvtuner_search import __version__
from kvtuner_search.calibration.candidates import StorageClass
from kvtuner_search.calibration.samplers import DEFAULT, PATIENCE
from kvtuner_search.data.types import Split
from kvtuner_search.models.load import ModelOptions

TIERS: Final = (1 / 6, 2 / 5, 1.0)  # fractions of each source's search samples that the rungs have seen


@dataclass(frozen=True)
class CalibrationOptions:
    """A calibration run; the defaults suit the embedded reference model on two CPU cores."""

    model: ModelOptions = field(default_factory=ModelOptions)
    sources: tuple[str, ...] = ()  # none: default_sources
    samples: int = 5  # sequences of each source in the search split; selection and test have as many each
    length: int = 448  # most tokens of a sequence
    seed: int = 0
    bits: tuple[int, ...] = BITS
    group_sizes: tuple[int, ...] = (0,)  # channels; 0 is the whole head
    symmetric: bool = True  # whether classes without a stored minimum may be chosen
    bands: bool = True  # whether storage in a fitted basis, in bands, may be chosen
    target_bits: tuple[float, ...] = (4.0,)  # budgets in effective bits, one profile each
    max_loss: float | None = None  # instead of budgets: the cheapest setting whose loss is at most this
    trials: int = 32
    sampler: str = DEFAULT  # a key of SAMPLERS
    patience: int = PATIENCE  # proposals in a row that gain less than the samples tell apart end a search; 0: never
    robust: bool = True  # beyond the optimum without a trial, only what is better for certain and worse on no source
    stages: int = 1  # pipeline stages
    grouping: str = "auto"  # auto, on or off
    random_baseline: bool = True  # a random search of as many proposals, for comparison
    batch_tokens: int = 4096  # padded tokens of one forward pass

    def facts(self, model: dict[str, Any], dtype: str, device: str, splits: Iterable[Split]) -> dict[str, Any]:
        """Everything that a study's trials depend on, as plain JSON; without the number of trials, so that a study can be extended.

        Args:
            model: of the future profile.
            dtype: in which the model runs, e.g. bfloat16; never auto.
            device: kind of device that it runs on, e.g. cuda.
            splits: search, selection and test.
        """
        return {
            "model": model,
            "random weights": self.model.random_weights,
            "dtype": dtype,
            "device": device,
            "data": {
                # A digest covers tokens and scored spans, but not whether a span is an exact answer.
                split.name: [split.digest, {name: part.samples[0].is_task for name, part in split.by_source().items()}]
                for split in splits
            },
            "seed": self.seed,
            "space": {
                "bits": list(self.bits),
                "group sizes": list(self.group_sizes),
                "symmetric": self.symmetric,
                "bands": self.bands,
                "grouping": self.grouping,
                "stages": self.stages,
            },
            "target bits": list(self.target_bits),
            "max loss": self.max_loss,
            "sampler": self.sampler,
            # Values of the study's parameters, which cannot change: earlier versions wrote 4a64, and their studies are refused.
            "names of storage classes": str(StorageClass(4, group_size=64)),
            "version": __version__,
            "layout": LAYOUT_VERSION,
        }


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Digest of :meth:`CalibrationOptions.facts`."""
    return "sha256:" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
