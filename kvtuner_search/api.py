"""The Python API: what ``calibrate`` and ``evaluate`` do, as functions, and the types that they take and give.

Import these names from the package: ``from kvtuner_search import calibrate, evaluate, Profile, LayerSpec, KVTunerError``. They are kept
stable (docs/api.md). Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import PrivateAttr

from kvtuner_kernels.layout import BITS, GROUP_SIZES, LayerSpec, LayoutError
from kvtuner_search.calibration.samplers import DEFAULT, PATIENCE, SAMPLERS
from kvtuner_search.errors import KVTunerError, UsageError
from kvtuner_search.profile import canonical, schema
from kvtuner_search.profile.fields import Measure

if TYPE_CHECKING:
    from kvtuner_search.models.load import ModelOptions

__all__ = ["KVTunerError", "LayerSpec", "Measure", "Profile", "calibrate", "evaluate"]

_DTYPES: Final = ("auto", "bfloat16", "float16", "float32")
_GROUPING: Final = ("auto", "on", "off")


class Profile(schema.Profile):
    """A profile: how each layer of one model stores its KV cache, what that costs, and what was measured.

    Its fields are those of the file (docs/profile.md): ``layers``, ``storage`` (bytes a token, effective bits), ``quality`` (a list of
    :class:`Measure`), ``model``, ``provenance``, and more. It cannot be changed.

    Example:
        >>> from kvtuner_search import Profile
        >>> profile = Profile.load("profiles/qwen2.5-7b/qwen2.5-7b-kvtuner4-0.json")
        >>> profile.storage.bytes_per_token, round(profile.storage.effective_bits, 2)
        (15232, 4.25)
        >>> print(profile.layer_specs()[0])
        8-g128-asym/8-g128-asym
    """

    _path: Path | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path | None:
        """The file that it was read from; the transforms file lies in the same folder."""
        return self._path

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read and check a profile file, of this schema version or an older one.

        Raises:
            KVTunerError: if the file is missing, invalid, of a newer version, or its digest is wrong.

        Example:
            >>> from kvtuner_search import KVTunerError, Profile
            >>> try:
            ...     Profile.load("absent.json")
            ... except KVTunerError as error:
            ...     print(error)
            absent.json does not exist: give the path of a profile
        """
        found = canonical.load(Path(path))
        profile = cls.model_construct(found.model_fields_set, **found.__dict__)
        profile._path = Path(path)
        return profile


def calibrate(
    model: str | Path = "reference",
    *,
    output: str | Path,
    target_bits: float | Sequence[float] | None = None,
    max_loss: float | None = None,
    data: Sequence[str] = (),
    samples: int = 5,
    length: int = 448,
    seed: int = 0,
    trials: int = 32,
    sampler: str = DEFAULT,
    patience: int = PATIENCE,
    robust: bool = True,
    bits: Sequence[int] = BITS,
    group_sizes: Sequence[int] = (0,),
    symmetric: bool = True,
    bands: bool = True,
    pipeline_stages: int = 1,
    grouping: str = "auto",
    random_baseline: bool = True,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    batch_tokens: int = 4096,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> list[Profile]:
    """Search how each layer should store its keys and values, and write a profile for each budget; ``calibrate`` as a function.

    Beside the profiles the folder gets ``record.json`` and the study, with which ``resume`` goes on. The report is the command's alone.

    Args:
        model: folder or hub id; ``reference`` is the embedded test instrument.
        output: folder for everything that is written.
        target_bits: one budget or several, in effective bits from 1 to 16; 4.0 unless ``max_loss`` is given.
        max_loss: instead of budgets, the most KL divergence from the 16-bit cache, in nats a token.
        data: sources of text and tasks, as ``--data`` takes them (docs/data.md); none: recall, arithmetic, list and text.
            A model with a chat template is calibrated on chat too.
        samples: sequences of each source in each split.
        length: most tokens of a sequence, at least 8.
        seed: of data, splits and search.
        trials: distinct settings to score.
        sampler: a name that ``--sampler`` takes.
        patience: trials in a row that gain less than the samples tell apart, after which the search ends; 0 never ends it.
        robust: choose another setting than the optimum that needs no trial only if it is better for certain, and worse on no source.
        bits: bit-widths to choose from.
        group_sizes: channels that share a scale; 0 is the whole head.
        symmetric: also allow storing no minimum.
        bands: also allow storing in a fitted basis, in bands.
        pipeline_stages: of the server; a budget counts each stage as the largest.
        grouping: ``auto``, ``on`` or ``off``: whether layers with similar sensitivity share a variable.
        random_baseline: also run a random search of as many proposals, to compare with.
        name: start of the profiles' names; the model's unless given.
        revision: commit, branch or tag on the hub.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        device_map: transformers' own, for a model larger than one GPU.
        trust_remote_code: run code that comes with the model.
        batch_tokens: tokens of one forward pass.
        resume: go on with the study in ``output``.
        overwrite: delete it and start again.
        quiet: no progress on stderr.

    Returns:
        the profiles that were written, one for each budget and in their order; each knows its ``path``.

    Raises:
        KVTunerError: if an argument, the model or the data cannot be used, or nothing that was tried fits a budget.

    Example:
        Far too few samples and trials to be of use, but quick:

        >>> from kvtuner_search import calibrate
        >>> profiles = calibrate("reference", output="quick", data=["list"], samples=1, length=192, trials=4, target_bits=6,
        ...                      bits=[8, 4], bands=False, random_baseline=False)
        >>> [profile.path.name for profile in profiles], profiles[0].storage.effective_bits <= 6
        (['reference-6.00bit.json'], True)
    """
    given = (target_bits,) if isinstance(target_bits, int | float) else tuple(target_bits or ())
    if max_loss is not None and given:
        raise UsageError("max_loss and target_bits exclude each other: give a bound on the loss, or budgets")
    if resume and overwrite:
        raise UsageError("resume and overwrite exclude each other: one keeps the study, the other deletes it")
    _at_least(1, samples=samples, trials=trials, batch_tokens=batch_tokens)
    _at_least(8, length=length)
    _at_least(0, seed=seed, patience=patience)
    for budget in given:
        if not isinstance(budget, int | float) or not 1 <= budget <= 16:
            raise UsageError(f"target_bits={budget!r} is not a budget: give effective bits from 1 to 16")
    _one_of("sampler", [sampler], SAMPLERS)
    _one_of("grouping", [grouping], _GROUPING)
    _one_of("bits", bits, BITS)
    _one_of("group_sizes", group_sizes, (0, *GROUP_SIZES))

    from kvtuner_search.calibration import session
    from kvtuner_search.calibration.options import CalibrationOptions

    options = CalibrationOptions(
        model=_model(model, revision, dtype, device, device_map, trust_remote_code),
        sources=_sources(data),
        samples=samples,
        length=length,
        seed=seed,
        bits=tuple(bits),
        group_sizes=tuple(group_sizes),
        symmetric=symmetric,
        bands=bands,
        target_bits=tuple(map(float, given)) or (() if max_loss is not None else (4.0,)),
        max_loss=max_loss,
        trials=trials,
        sampler=sampler,
        patience=patience,
        robust=robust,
        stages=pipeline_stages,
        grouping=grouping,
        random_baseline=random_baseline,
        batch_tokens=batch_tokens,
    )
    here = session.CalibrationSession(
        output=Path(output),
        name=name,
        resume=resume,
        overwrite=overwrite,
        storage=None,
        study_name="kvtuner",
        workers=1,
        join=False,
        quiet=quiet,
        arguments=(),
    )
    return [Profile.load(path) for path in session.calibrate(options, here, lambda record, folder: ())]


def evaluate(
    profile: Profile | LayerSpec | str | Path,
    model: str | Path = "reference",
    *,
    data: Sequence[str] = (),
    samples: int = 40,
    length: int = 512,
    seed: int = 0,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    batch_tokens: int = 4096,
    quiet: bool = True,
) -> list[Measure]:
    """Measure a profile against the 16-bit cache, without a server; ``evaluate`` as a function.

    Args:
        profile: a profile, the path of one, or a spec for all layers alike (not centred, not in bands).
        model: folder or hub id; ``reference`` is the embedded test instrument.
        data: sources of text and tasks, as ``--data`` takes them (docs/data.md); none: recall, arithmetic, list and text.
        samples: sequences of each source.
        length: most tokens of a sequence, at least 8.
        seed: of the data.
        revision, dtype, device, device_map, trust_remote_code, batch_tokens, quiet: as for :func:`calibrate`.

    Returns:
        for each source the KL divergence (``kl``, nats a token), the likelihood (``nll``, nats a token) and, for tasks, exact answers
        (``accuracy``), each with the 16-bit cache's value and the interval of the difference.

    Raises:
        KVTunerError: if an argument, the profile, the model or the data cannot be used, or the profile is another model's.

    Example:
        >>> from kvtuner_search import LayerSpec, evaluate
        >>> measures = evaluate(LayerSpec.parse("8-g64-asym/4-g64-asym"), "reference", data=["list"], samples=2, length=192)
        >>> [(measure.metric, measure.data, measure.samples) for measure in measures]
        [('kl', 'list', 2), ('nll', 'list', 2), ('accuracy', 'list', 2)]
    """
    _at_least(1, samples=samples, batch_tokens=batch_tokens)
    _at_least(8, length=length)
    _at_least(0, seed=seed)
    path = Path(profile) if isinstance(profile, str | Path) else getattr(profile, "path", None)
    if path is None and not isinstance(profile, LayerSpec):
        raise UsageError(
            f"the profile {getattr(profile, 'name', profile)} was not read from a file: read it with Profile.load"
        )

    from kvtuner_search.data import DEFAULT_SOURCES
    from kvtuner_search.evaluation import offline
    from kvtuner_search.models.load import load_model
    from kvtuner_search.profile.checks import check_model
    from kvtuner_search.progress import Reporter

    opened = offline.open_profile(path) if path is not None else None
    loaded = load_model(_model(model, revision, dtype, device, device_map, trust_remote_code), length)
    if opened is not None:
        check_model(opened[0], loaded.info, loaded.info.id)
        setting = (opened[0].name, tuple(opened[0].layer_specs()), opened[1])
    else:
        assert isinstance(profile, LayerSpec)
        try:
            profile.row(loaded.info.num_kv_heads, loaded.info.head_dim)
        except LayoutError as error:
            raise UsageError(str(error)) from error
        setting = (str(profile), offline.uniform(profile, loaded.info.num_layers), {})
    (row,) = offline.evaluate(
        loaded,
        [setting],
        _sources(data) or DEFAULT_SOURCES,
        samples=samples,
        length=length,
        seed=seed,
        batch_tokens=batch_tokens,
        reporter=Reporter(quiet),
    )
    return [Measure.model_validate(measure) for measure in row["measures"]]


def _model(
    source: str | Path, revision: str | None, dtype: str, device: str, device_map: str | None, trust: bool
) -> ModelOptions:
    from kvtuner_search.models.load import ModelOptions

    _one_of("dtype", [dtype], _DTYPES)
    return ModelOptions(str(source), revision, dtype, device, device_map, trust)


def _sources(data: Sequence[str]) -> tuple[str, ...]:
    if isinstance(data, str):
        raise UsageError(f"data={data!r} is one text: give a list of sources, e.g. [{data!r}]")
    return tuple(map(str, data))


def _at_least(least: int, **given: Any) -> None:
    for name, value in given.items():
        if type(value) is not int or value < least:
            raise UsageError(f"{name}={value!r} cannot be used: give a whole number of at least {least}")


def _one_of(name: str, given: Sequence[object], choices: Iterable[object]) -> None:
    known = tuple(choices)
    wrong = next((value for value in given if value not in known), None if given else "nothing")
    if wrong is not None:
        raise UsageError(f"{name}={wrong!r} cannot be used: choose from {', '.join(map(str, known))}")
