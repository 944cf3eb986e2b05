"""The parts that a profile and its validation block share. Neither torch nor transformers is imported here."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=512)]
ConfigText = Annotated[str, Field(min_length=1, max_length=160)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**31)]
# Adding zero turns -0.0 into 0.0: equal numbers have one spelling, and so one digest.
_PLUS_ZERO: Final = AfterValidator(lambda value: value + 0.0)
Number = Annotated[float, Field(allow_inf_nan=False), _PLUS_ZERO]
MAX_FIGURE: Final = 1e100  # nats or a fraction; differences, squares and axes of larger ones would be no numbers
Figure = Annotated[float, Field(ge=-MAX_FIGURE, le=MAX_FIGURE, allow_inf_nan=False), _PLUS_ZERO]
Text = Annotated[str, Field(max_length=4096)]  # what a reader must know, in a sentence or a few
Versions = Annotated[
    dict[Annotated[str, Field(max_length=128)], Annotated[str, Field(max_length=256)]], Field(max_length=64)
]
MAX_MEASURES: Final = 1024  # of one kind: sources times measures times splits
MAX_NOTES: Final = 64


class Strict(BaseModel):
    """Base of all parts: unknown fields, NaN and silent conversions are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Measure(Strict):
    """One quality figure, against the 16-bit cache on the same tokens."""

    metric: Literal["kl", "nll", "accuracy"]
    """kl: mean KL divergence in nats from the 16-bit model's next-token distribution. nll: mean negative log-likelihood in nats a token. accuracy: fraction of prompts with every answer token right."""
    data: Name
    """Name of the data source, e.g. recall, wikitext2."""
    split: Literal["search", "selection", "test"]
    """search: seen by every trial. selection: used to choose among finalists. test: used once, after the choice."""
    samples: Positive
    """Sequences (nll, kl) or prompts (accuracy) that were measured."""
    tokens: Positive
    """Tokens that were scored."""
    baseline: Figure
    """The 16-bit cache's value (0 for kl)."""
    value: Figure
    """This profile's value."""
    ci_low: Figure
    """Lower end of the confidence interval of value - baseline, paired over samples."""
    ci_high: Figure
    """Upper end of the same interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Confidence level of the interval."""

    @property
    def has_interval(self) -> bool:
        """Whether the interval says anything: resampling one sample gives no width."""
        return self.samples > 1

    @property
    def delta(self) -> float:
        """``value - baseline``."""
        return self.value - self.baseline

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.ci_low > self.ci_high:
            raise ValueError(f"ci_low={self.ci_low} is above ci_high={self.ci_high}")
        return self


class DataInfo(Strict):
    """One source of calibration text."""

    name: Name
    """Name of the source."""
    split: Literal["search", "selection", "test"]
    """Which split this is."""
    samples: Positive
    """Sequences."""
    tokens: Positive
    """Tokens, scored or not."""
    digest: Digest
    """Digest of the token ids."""
