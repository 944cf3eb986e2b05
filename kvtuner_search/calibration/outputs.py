"""The results of a calibration run: the profile's content, and the record that the report is made from."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import torch

from kvtuner_search import __version__
from kvtuner_search.calibration.candidates import pair_name
from kvtuner_search.calibration.choosing import TargetResult
from kvtuner_search.calibration.finals import row
from kvtuner_search.calibration.front import pareto_front
from kvtuner_search.calibration.objective import TrialOutcome
from kvtuner_search.calibration.pipeline import CalibrationRun
from kvtuner_search.calibration.plan import SearchPlan
from kvtuner_search.calibration.proxy import ProxyPoint, affordable_point
from kvtuner_search.calibration.record import (
    VERSION,
    CalibrationRecord,
    OptionsRecord,
    RunEnvironment,
    SearchSpace,
    TargetRecord,
    Trial,
    Variable,
)
from kvtuner_search.calibration.space import Space
from kvtuner_search.calibration.trials import FinishedTrial, hypervolume, rung_ratio
from kvtuner_search.data.types import Dataset, Split
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.evaluation.statistics import measures
from kvtuner_search.evaluation.stored import Setting
from kvtuner_search.profile.build import build
from kvtuner_search.profile.fields import DataInfo, Measure
from kvtuner_search.profile.schema import MAX_FRONT, MAX_POINTS, ModelInfo, ParetoPoint, Profile, Provenance, SearchInfo
from kvtuner_search.profile.text import shortened

LIBRARIES: Final = ("torch", "transformers", "optuna", "numpy")


def data_info(data: Dataset) -> list[DataInfo]:
    """Every source and split."""
    return [
        DataInfo(name=name, split=split.name, samples=len(part.samples), tokens=part.tokens, digest=part.digest)
        for split in data
        for name, part in split.by_source().items()
    ]


def without_interval(test: Split) -> str:
    """A note on sources with only one sample in the test split; empty if there are none."""
    names = [name for name, part in test.by_source().items() if len(part.samples) == 1]
    return (
        shortened(f"one sample gives no interval, so quality is unproven on {', '.join(names)}", 4000) if names else ""
    )


def thinned(front: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most as many points as a profile may have, evenly spread, both ends among them."""
    most = max(2, min(MAX_POINTS, MAX_FRONT // len(front[0]["layers"]))) if front else 0
    if len(front) <= most:
        return front
    return [front[round(index * (len(front) - 1) / (most - 1))] for index in range(most)]


def profile_content(
    run: CalibrationRun, space: Space, target: TargetResult, test: Scorer, found: Sequence[FinishedTrial]
) -> dict[str, Any]:
    """What all workers must write alike of a profile, as plain JSON; :func:`sealed` makes the profile of it."""
    complete = sorted((t for t in found if t.outcome.complete and not t.duplicate), key=lambda t: t.number)
    front = [
        {
            "bytes_per_token": space.nbytes(trial.choices),
            "loss": trial.outcome.loss,
            "origin": trial.origin,
            "layers": [str(layer) for layer in space.setting(trial.choices)],
        }
        for trial in pareto_front(complete, lambda t: space.nbytes(t.choices), lambda t: t.outcome.loss)
    ]
    info = SearchInfo(
        sampler=run.options.sampler,
        seed=run.options.seed,
        trials=len([t for t in found if not t.duplicate]),
        variables=len(space.variables),
        grouping_quality=space.grouping_quality,
        target_bits=target.bits,
        max_loss=run.options.max_loss,
        pipeline_stages=run.options.stages,
    )
    notes = [
        "quality was measured offline, with attention reading every key and value as stored; no server was measured"
    ]
    unproven = without_interval(run.data.test)
    if unproven:
        notes.append(f"{unproven}: calibrate with more --samples")
    if run.loaded.info.id == "reference":
        notes.insert(
            0,
            "made on the embedded reference model, a 13.9 M-parameter test instrument: it does not apply to any other model",
        )
    return {
        "model": run.loaded.info.model_dump(mode="json"),
        "quality": [m.model_dump() for m in measures(target.chosen.scores, test.baseline_all(), "test")],
        "pareto": thinned(front),
        "provenance": {
            "origin": "calibrated",
            "tool": f"kvtuner-search {__version__}",
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in LIBRARIES},
            },
            "device": torch.cuda.get_device_name(run.loaded.device) if run.loaded.device.type == "cuda" else "cpu",
            "dtype": str(run.loaded.dtype).removeprefix("torch."),
            "search": info.model_dump(),
            "data": [data.model_dump() for data in data_info(run.data)],
            "notes": notes,
        },
    }


def sealed(name: str, setting: Setting, content: Mapping[str, Any], transforms: bytes | None) -> Profile:
    """The profile of a content that the workers agreed on (:func:`profile_content`)."""
    return build(
        name,
        setting,
        ModelInfo.model_validate(content["model"]),
        Provenance.model_validate(content["provenance"]),
        quality=[Measure.model_validate(measure) for measure in content["quality"]],
        pareto=[ParetoPoint.model_validate(point) for point in content["pareto"]],
        transforms=transforms,
    )


def record(
    run: CalibrationRun,
    plan: SearchPlan,
    space: Space,
    front: Sequence[ProxyPoint],
    found: Sequence[FinishedTrial],
    random: Sequence[FinishedTrial],
    targets: Sequence[TargetResult],
    test: Scorer,
) -> CalibrationRecord:
    """Everything that the report shows."""
    heads, head_dim = run.shape
    reference_loss = max((t.outcome.loss for t in [*found, *random] if t.outcome.complete), default=1.0)
    corner = (16.0, reference_loss)
    scale, per_bit = rung_ratio(found), run.total_bytes(1.0)
    groups: dict[str, list[TrialOutcome]] = {
        "searched": [t.outcome for t in found],
        "random": [t.outcome for t in random],
    }
    groups["uniform"] = [t.outcome for t in found if space.uniform_pair(t.choices)]
    for origin in ("fisher", "proxy", "preset"):
        groups[origin] = [t.outcome for t in found if t.origin == origin]
    at_targets = [affordable_point(space, front, run.total_bytes(t.bits)) for t in targets if t.bits is not None]
    return CalibrationRecord(
        record_version=VERSION,
        tool=f"kvtuner-search {__version__}",
        model=run.loaded.info,
        options=OptionsRecord.model_validate_json(json.dumps(asdict(run.options))),
        data=data_info(run.data),
        sensitivity=plan.sensitivity(),
        space=SearchSpace(
            variables=[
                Variable(name=v.name, layers=list(v.layers), pairs=[pair_name(p) for p in v.pairs])
                for v in space.variables
            ],
            grouping_quality=space.grouping_quality,
            rejected_quality=space.rejected_quality,
        ),
        trials=[_trial(t, space) for t in found],
        random_trials=[_trial(t, space) for t in random],
        proxy_front=[(p.nbytes, p.loss) for p in front],
        proxy_at_target=[point.loss if point else None for point in at_targets],
        targets=[
            TargetRecord(
                label=t.label,
                target_bits=t.bits,
                chosen=row(t.chosen, t.chosen, test.baseline_all(), heads, head_dim),
                rivals=[row(r, t.chosen, test.baseline_all(), heads, head_dim) for r in t.rivals],
                resolution=t.resolution,
            )
            for t in targets
        ],
        hypervolume={
            name: hypervolume(outcomes, scale, (corner[0] * per_bit, corner[1])) / per_bit
            for name, outcomes in groups.items()
        },
        hypervolume_corner=corner,
        seconds=run.reporter.seconds,
        environment=environment(run),
    )


def environment(run: CalibrationRun) -> RunEnvironment:
    """Hardware, versions and peak memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cuda = run.loaded.device.type == "cuda"
    return RunEnvironment(
        device=torch.cuda.get_device_name(run.loaded.device) if cuda else "cpu",
        threads=torch.get_num_threads(),
        dtype=str(run.loaded.dtype).removeprefix("torch."),
        peak_memory_bytes=peak,
        peak_gpu_memory_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        python=platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    )


def _trial(trial: FinishedTrial, space: Space) -> Trial:
    return Trial(
        number=trial.number,
        origin=trial.origin,
        cost=trial.outcome.cost,
        bytes_per_token=space.nbytes(trial.choices),
        loss=trial.outcome.loss,
        rungs=list(trial.outcome.rungs),
        complete=trial.outcome.complete,
        seconds=trial.seconds,
        duplicate=trial.duplicate,
        layers=[str(layer) for layer in space.setting(trial.choices)],
    )
