"""lm-eval's tasks under several settings of the cache, item by item against the 16-bit cache."""

from __future__ import annotations

import hashlib
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import Centres
from kvtuner_search.errors import DataError, KVTunerError, UsageError
from kvtuner_search.evaluation.statistics import CONFIDENCE, paired_proportions, paired_ratio
from kvtuner_search.evaluation.stored import Setting
from kvtuner_search.models.load import LoadedModel
from kvtuner_search.models.runner import Runner
from kvtuner_search.progress import Reporter

INSTALL: Final = "pip install 'kvtuner-search[eval]'"


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks, and how much of them."""

    tasks: tuple[str, ...]  # lm-eval's names of tasks or groups
    fewshot: int | None = None  # examples before each question; None is the task's own number
    limit: int | None = None  # first items of each task; None is all
    folder: Path | None = None  # with additional task files (YAML); lm-eval runs the Python that these name
    batch_size: int = 8  # prompts of one pass


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task under one setting, against the 16-bit cache on the same items."""

    task: str
    metric: str  # lm-eval's name with its filter, e.g. exact_match,strict-match
    version: str  # of the task's definition
    fewshot: int  # examples before each question
    samples: int  # items
    digest: str  # sha256 over lm-eval's hashes of the items' prompts
    baseline: float  # 16-bit cache, as lm-eval aggregates it
    value: float  # this setting, likewise
    lost: (
        int | None
    )  # items that were right with 16 bits and are wrong now; None where an item is not just right or wrong
    gained: int | None  # the other way round
    ci_low: float | None  # interval of value - baseline; None where the metric is not the mean of its items
    ci_high: float | None
    confidence: float
    method: Literal["agresti-min", "bootstrap", "none"]  # paired proportions; paired means; not a mean, so no interval


class _Items(NamedTuple):
    """One metric of one task, item by item."""

    aggregate: float
    prompts: list[str]  # hash of each prompt
    values: list[Any]


_Key = tuple[str, str]  # task, metric with filter


@dataclass(frozen=True)
class _Result:
    items: dict[_Key, _Items]
    versions: Mapping[str, Any]
    fewshot: Mapping[str, int]
    higher_is_better: Mapping[str, Mapping[str, bool | None]]


def run_tasks(
    loaded: LoadedModel,
    settings: Sequence[tuple[str, Setting, dict[int, Centres]]],
    options: TaskOptions,
    reporter: Reporter,
) -> list[list[TaskScore]]:
    """Scores of every task for each (name, setting, centres).

    Raises:
        UsageError: if lm-eval is not installed, or the model has no tokenizer.
        DataError: if a task is unknown, cannot be loaded, or cannot be measured here.
    """
    check_installed()
    if loaded.tokenizer is None:
        raise UsageError(f"{loaded.info.id} has no tokenizer: tasks need text")
    manager = _manager(options)
    runner = Runner(loaded)
    raw: Setting = (LayerSpec(),) * loaded.info.num_layers
    baseline = _run(runner, "16-bit cache", raw, {}, manager, options, reporter)
    return [
        _compare(_run(runner, name, setting, centres, manager, options, reporter), baseline)
        for name, setting, centres in settings
    ]


def check_installed() -> None:
    """Raise UsageError where lm-eval is missing."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UsageError(f"tasks are run by lm-eval, which is not installed: {INSTALL}") from error


def _manager(options: TaskOptions) -> Any:
    from lm_eval.tasks import TaskManager

    if options.folder is not None and not options.folder.is_dir():
        raise DataError(f"task folder {options.folder} does not exist: name the folder of your task's YAML file")
    path = None if options.folder is None else str(options.folder)
    missing = list(options.tasks)
    for defaults in (False, True) if path is not None else (True,):  # lm-eval's own thousands take seconds to list
        with _quiet(None):
            try:
                manager = TaskManager(include_path=path, include_defaults=defaults)
            except Exception as error:  # of a task's file
                raise _refusal(error, options) from error
        missing = sorted(set(options.tasks) - set(manager.all_tasks))
        if not missing:
            return manager
    raise DataError(f"lm-eval has no task {missing[0]!r}: `lm-eval ls tasks` lists its own, --task-folder adds yours")


def _run(
    runner: Runner,
    name: str,
    setting: Setting,
    centres: dict[int, Centres],
    manager: Any,
    options: TaskOptions,
    reporter: Reporter,
) -> _Result:
    import lm_eval
    from datasets.utils.logging import disable_progress_bar  # type: ignore[import-untyped,unused-ignore]

    from kvtuner_search.evaluation.lm_eval_model import StoredLM

    disable_progress_bar()
    with reporter.stage(f"tasks, {name}") as advance, _quiet(reporter):
        model = StoredLM(runner, setting, centres, batch_size=options.batch_size, advance=advance)
        try:
            found = lm_eval.simple_evaluate(
                model,
                tasks=list(options.tasks),
                task_manager=manager,
                num_fewshot=options.fewshot,
                limit=options.limit,
                bootstrap_iters=0,  # its intervals are not paired
            )
        except Exception as error:  # tasks are others' code and data and may raise anything
            if _is_no_tasks(error):
                raise
            raise _refusal(error, options) from error
    return _Result(_items(found), found["versions"], found["n-shot"], found["higher_is_better"])


def _is_no_tasks(error: Exception) -> bool:
    """Whether the error comes from this program or the GPU rather than the task."""
    return isinstance(error, KVTunerError) or type(error).__name__ == "OutOfMemoryError"


def _refusal(error: Exception, options: TaskOptions) -> DataError:
    """A task's exception as one line with the task's name."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    reason = line if line and isinstance(error, OSError) else ": ".join(filter(None, (type(error).__name__, line)))
    remedy = "fix its file or its data, or leave it out (--debug shows where it failed)"
    if isinstance(error, (OSError, ImportError)):
        remedy = "offline, give a task whose data_files are local with --task-folder (docs/evaluate.md)"
    return DataError(f"lm-eval cannot run {_failing(error) or ', '.join(options.tasks)}: {reason[:500]}: {remedy}")


def _failing(error: Exception) -> str | None:
    """The task that lm-eval was running, read from the innermost frame that has one."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            if type(value).__module__.startswith("lm_eval."):
                name = getattr(getattr(value, "config", None), "task", None) or getattr(value, "task_name", None)
                found = name if isinstance(name, str) else found
            elif isinstance(value, dict) and {"task", "output_type"} <= value.keys() and isinstance(value["task"], str):
                found = value["task"]
    return found


def _items(found: Mapping[str, Any]) -> dict[_Key, _Items]:
    """Every metric of every task; groups only repeat their members."""
    items: dict[_Key, _Items] = {}
    for task, samples in found["samples"].items():
        for name, aggregate in found["results"][task].items():
            metric, comma, chosen = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(aggregate, (int, float)):
                continue
            rows = sorted(
                (s for s in samples if s["filter"] == chosen and metric in s["metrics"]), key=lambda s: s["doc_id"]
            )
            items[task, name] = _Items(float(aggregate), [s["prompt_hash"] for s in rows], [s[metric] for s in rows])
    return items


def _compare(ours: _Result, baseline: _Result) -> list[TaskScore]:
    return [
        _score(
            key,
            items,
            baseline.items[key],
            version=str(ours.versions.get(key[0])),
            fewshot=int(ours.fewshot.get(key[0]) or 0),
            higher=ours.higher_is_better.get(key[0], {}).get(key[1].partition(",")[0]) is not False,
        )
        for key, items in ours.items.items()
    ]


def _score(key: _Key, ours: _Items, base: _Items, *, version: str, fewshot: int, higher: bool) -> TaskScore:
    assert ours.prompts == base.prompts, f"{key}: the two runs saw other prompts"
    lost = gained = None
    low = high = None
    method: Literal["agresti-min", "bootstrap", "none"] = "none"
    if _is_mean(ours) and _is_mean(base):
        a, b = (np.array(items.values, dtype=np.float64) for items in (ours, base))
        if set(a) | set(b) <= {0.0, 1.0}:
            up, down = int((a > b).sum()), int((a < b).sum())
            interval, method = paired_proportions(down, up, len(a)), "agresti-min"
            lost, gained = (down, up) if higher else (up, down)
        else:
            interval, method = paired_ratio(a - b, np.ones(len(a))), "bootstrap"
        low, high = interval.low, interval.high
    return TaskScore(
        task=key[0],
        metric=key[1],
        version=version,
        fewshot=fewshot,
        samples=len(ours.values),
        digest="sha256:" + hashlib.sha256("\n".join(ours.prompts).encode()).hexdigest(),
        baseline=base.aggregate,
        value=ours.aggregate,
        lost=lost,
        gained=gained,
        ci_low=low,
        ci_high=high,
        confidence=CONFIDENCE,
        method=method,
    )


def _is_mean(items: _Items) -> bool:
    """Whether lm-eval's aggregate is the mean of the items; a perplexity, an F1 over all items or a corpus BLEU is not."""
    if not items.values or not all(isinstance(value, (bool, int, float, np.number)) for value in items.values):
        return False
    return bool(np.isclose(np.mean([float(value) for value in items.values]), items.aggregate, rtol=1e-9, atol=1e-12))


class _Truncations(logging.Handler):
    """Passes on warnings about truncated prompts, which change results, and drops lm-eval's messages about its own options."""

    def __init__(self, reporter: Reporter | None) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if self.reporter is not None and ("runcat" in message or record.levelno >= logging.ERROR):
            self.reporter.say(f"lm-eval: {message}")


@contextmanager
def _quiet(reporter: Reporter | None) -> Iterator[None]:
    logger, handler = logging.getLogger("lm_eval"), _Truncations(reporter)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
