"""The record of one calibration: what the report and the summary show. Neither torch nor Optuna is imported here.

Version 1 is what every release has written. A field that came later has a default, so that older records can be read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_search.errors import DataError
from kvtuner_search.profile.canonical import first_error, parse_json, read_limited, refuse_newer
from kvtuner_search.profile.fields import Count, DataInfo, Measure, Name, Number, Positive, Strict
from kvtuner_search.profile.schema import ModelInfo

VERSION: Final = 1
MAX_BYTES: Final = 2**28  # a record of 128 layers and 1,000 trials takes about 20 MB
Side = Literal["keys", "values"]
SIDES: Final[tuple[Side, ...]] = ("keys", "values")
Layers = Annotated[list[Annotated[str, Field(max_length=128)]], Field(min_length=1, max_length=4096)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Alone(NamedTuple):
    """A storage class of one side of one layer, measured alone."""

    spec: str
    """TensorSpec in short form."""
    loss: Number
    """KL in nats a token with everything else at 16 bits."""


class PairErrors(NamedTuple):
    """What one pair of variants does to one layer's attention; relative errors, see docs/calibration.md."""

    spec: str
    """LayerSpec in short form."""
    e_k: Number
    """Of the keys."""
    e_v: Number
    """Of the values."""
    e_a: Number
    """Of the attention probabilities."""
    e_o: Number
    """Of the attention output."""


class Sides(Strict):
    """By side: nats a token that each band would cost if it were stored in no bits, the worthiest band first."""

    keys: list[Number] | None = None
    """Of the keys; None if not recorded."""
    values: list[Number] | None = None
    """Of the values."""

    def side(self, side: Side) -> list[float] | None:
        """One of them."""
        return self.keys if side == "keys" else self.values


class HeadSides(Strict):
    """The same for each KV head."""

    keys: list[list[Number]] | None = None
    """Of the keys; None if not recorded."""
    values: list[list[Number]] | None = None
    """Of the values."""

    def side(self, side: Side) -> list[list[float]] | None:
        """One of them."""
        return self.keys if side == "keys" else self.values


class LayerSensitivity(Strict):
    """What was measured of one layer before the search."""

    keys: dict[Name, Alone]
    """Storage class -> its best variant for the keys, and what that costs alone."""
    values: dict[Name, Alone]
    """The same for the values."""
    errors: list[PairErrors]
    """Of every pair of variants that was measured."""
    worth: Sides | None = None
    """Of bands; None where they were not allowed."""
    worth_by_head: HeadSides | None = None
    """The same by KV head."""

    @model_serializer(mode="wrap")
    def _without_unknown_worth(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A layer that nothing is known of says nothing, as in every record and plan so far."""
        content: dict[str, Any] = handler(self)
        return {key: value for key, value in content.items() if value is not None}

    def side(self, side: Side) -> dict[str, Alone]:
        """The storage classes of one side."""
        return self.keys if side == "keys" else self.values


class Variable(Strict):
    """One variable of the search."""

    name: Name
    """E.g. layer 3."""
    layers: list[Count]
    """Layers that share it."""
    pairs: Annotated[list[Name], Field(min_length=1)]
    """Key and value classes that it may take, cheapest first."""


class SearchSpace(Strict):
    """What the search chose from."""

    variables: Annotated[list[Variable], Field(min_length=1)]
    """After pruning and grouping."""
    grouping_quality: Number | None = None
    """Silhouette of the groups; None where layers are not grouped."""
    rejected_quality: Number | None = None
    """Silhouette of the best groups where they were too poor to be used; -1: too few layers to group."""


class Trial(Strict):
    """One scored setting."""

    number: Count
    """In its study."""
    origin: Name
    """What proposed it: a sampler, refined, fisher, proxy, uniform, preset or random."""
    cost: Count
    """Bytes per token that the budget is compared with; with pipeline stages, the heaviest one's times their number."""
    bytes_per_token: Count
    """Of all layers."""
    loss: Number
    """KL in nats a token on the search split, as far as it was run."""
    rungs: list[Number]
    """The loss after each rung that was run."""
    complete: bool
    """All rungs were run."""
    seconds: Amount
    """Wall-clock time."""
    duplicate: bool
    """A proposal that had been scored before."""
    layers: Layers
    """LayerSpec of every layer."""


class Difference(Strict):
    """A paired difference and its confidence interval."""

    estimate: Number
    """The difference, nats a token."""
    low: Number
    """Lower end."""
    high: Number
    """Upper end."""


class Compared(Strict):
    """A setting on the test split, against the 16-bit cache and the chosen setting."""

    name: Name
    """E.g. trial 31, or uniform 4s64/4s64."""
    origin: Name
    """As of a trial; plain: uniform as others store it."""
    bytes_per_token: Count
    """Of all layers."""
    effective_bits: Annotated[float, Field(gt=0, le=32)]
    """Stored bits of a cached number, everything counted."""
    layers: Layers
    """LayerSpec of every layer."""
    search_loss: Number | None = None
    """KL on the search split; None where it was not run to the end there."""
    loss: Number
    """KL in nats a token, the mean of the sources."""
    loss_low: Number | None = None
    """Lower end of its confidence interval; None in the first records."""
    loss_high: Number | None = None
    """Upper end."""
    measures: list[Measure]
    """By source."""
    chosen_minus_this: Difference
    """Loss of the chosen setting less this one's."""
    verdict: Literal["same", "better", "worse", "inconclusive"]
    """What the chosen setting is, against this one."""


class TargetRecord(Strict):
    """What was chosen for one target."""

    label: Name
    """E.g. 4 bits."""
    target_bits: Amount | None
    """Budget in effective bits; None where the loss was bounded."""
    chosen: Compared
    """The setting of the profile."""
    rivals: list[Compared]
    """What it is compared with."""
    resolution: Amount | None = None
    """Relative difference of losses that the selection split tells apart at 95 %; None if not recorded, or if there was nothing to tell apart."""


class ModelRecord(Strict):
    """How the model was loaded, as given."""

    source: Name
    """Folder, hub id, or reference."""
    revision: Name | None = None
    """Hub commit, branch or tag."""
    dtype: Name = "auto"
    """auto: bfloat16 on a GPU, float32 on the CPU."""
    device: Name = "auto"
    """auto: a GPU if there is one."""
    device_map: Name | None = None
    """transformers' device_map."""
    trust_remote_code: bool = False
    """Whether code that comes with the model was run."""
    random_weights: bool = False
    """Weights from the config's initializer."""


class OptionsRecord(Strict):
    """What the run was told; the fields of ``calibration.options.CalibrationOptions``."""

    model: ModelRecord
    """The model."""
    sources: list[Name]
    """Data."""
    samples: Positive
    """Sequences of each source in each split."""
    length: Positive
    """Most tokens of a sequence."""
    seed: int
    """Of sampler, data and splits."""
    bits: list[Positive]
    """Bit-widths that were allowed."""
    group_sizes: list[Count]
    """Channels; 0 is the whole head."""
    symmetric: bool
    """Whether classes without a stored minimum were allowed."""
    bands: bool = False
    """Whether bands were allowed; the first records know none."""
    target_bits: list[Amount]
    """Budgets in effective bits."""
    max_loss: Amount | None
    """Bound on the loss, instead of budgets."""
    trials: Positive
    """Distinct settings to score."""
    sampler: Name
    """What made proposals."""
    patience: Count = 0
    """Trials in a row without a gain that end a search; 0: never, as before there was such an end."""
    robust: bool = False
    """Whether a choice had to be better for certain, and worse on no source; the first records know no such rule."""
    stages: Positive = 1
    """Pipeline stages."""
    grouping: Name
    """auto, on or off."""
    random_baseline: bool
    """Whether a random search ran, too."""
    batch_tokens: Positive
    """Padded tokens of one forward pass."""


class RunEnvironment(Strict):
    """Hardware and versions, and the most memory that was in use."""

    device: Name
    """Name of the GPU, or cpu."""
    threads: Positive
    """torch's."""
    dtype: Name
    """The model's."""
    peak_memory_bytes: Count
    """Of the process."""
    peak_gpu_memory_bytes: Count | None
    """Of the GPU; None without one."""
    python: Name
    """Version."""
    torch: Name
    """Version."""
    transformers: Name
    """Version."""
    optuna: Name
    """Version."""
    numpy: Name
    """Version."""


class CalibrationRecord(Strict):
    """One run of ``calibrate``."""

    record_version: Literal[1] = VERSION
    """Of this schema."""
    tool: Name
    """Name and version of the writer."""
    model: ModelInfo
    """What was calibrated."""
    options: OptionsRecord
    """How."""
    data: list[DataInfo]
    """By source and split."""
    sensitivity: Annotated[list[LayerSensitivity], Field(min_length=1)]
    """By layer."""
    space: SearchSpace
    """What the search chose from."""
    trials: list[Trial]
    """Of the study."""
    random_trials: list[Trial]
    """Of the random search that it is compared with."""
    proxy_front: list[tuple[Count, Number]]
    """Bytes per token and predicted loss of every optimum of the proxy, cheapest first."""
    proxy_at_target: list[Number | None]
    """What the proxy predicts for each budget; None where nothing fits it."""
    targets: Annotated[list[TargetRecord], Field(min_length=1)]
    """What was chosen."""
    hypervolume: dict[Name, Number]
    """Of whom -> area that their front dominates, effective bits x decades of loss."""
    hypervolume_corner: tuple[Number, Number]
    """Effective bits and nats."""
    seconds: dict[Name, Amount]
    """Stage -> wall-clock time."""
    environment: RunEnvironment
    """Where it ran."""

    @model_validator(mode="after")
    def _of_one_model(self) -> Self:
        """Every setting has a spec that can be read for each of the model's layers, and so has the sensitivity."""
        layers = self.model.num_layers
        if len(self.sensitivity) != layers:
            raise ValueError(f"sensitivity of {len(self.sensitivity)} layers, the model has {layers}")
        settings = [(f"trial {t.number}", t.layers) for t in (*self.trials, *self.random_trials)]
        settings += [(row.name, row.layers) for target in self.targets for row in (target.chosen, *target.rivals)]
        for name, specs in settings:
            if len(specs) != layers:
                raise ValueError(f"{name} has {len(specs)} layers, the model has {layers}")
        kinds: dict[str, type[LayerSpec | TensorSpec]] = {text: LayerSpec for _, specs in settings for text in specs}
        for layer in self.sensitivity:
            kinds |= {row.spec: LayerSpec for row in layer.errors}
            kinds |= {alone.spec: TensorSpec for alone in (*layer.keys.values(), *layer.values.values())}
        for text, kind in kinds.items():
            kind.parse(text)  # LayoutError is a ValueError, which pydantic reports
        return self


def dumps(record: CalibrationRecord) -> str:
    """The text of the record's file: one line of JSON with sorted keys."""
    return json.dumps(record.model_dump(mode="json"), sort_keys=True, allow_nan=False) + "\n"


def read(path: Path) -> CalibrationRecord:
    """Read and check a ``record.json`` that ``calibrate`` wrote.

    Raises:
        DataError: if the file is missing, too large, not JSON, not a calibration record, of a newer version, or contradicts itself.

    Example::

        from kvtuner_search.report.calibration_html import render
        page = render(read(Path("kvtuner-output/record.json")))
    """
    data = read_limited(path, "a calibration's record", MAX_BYTES)
    content = parse_json(data, str(path), "calibration's record")
    version = content.get("record_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise DataError(
            f"{path} has no record_version: it is not a calibration record; `kvtuner-search calibrate` writes them"
        )
    refuse_newer(version, VERSION, str(path))
    try:
        return CalibrationRecord.model_validate_json(data)
    except ValidationError as error:
        found = first_error(error, "record")
        raise DataError(f"{path}: {found}: it was edited or damaged; restore it, or calibrate again") from error
