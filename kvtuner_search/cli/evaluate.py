"""``kvtuner-search evaluate``: a profile's quality on a model, offline."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from kvtuner_search import threads
from kvtuner_search.cli.options import json_option, quiet_option
from kvtuner_search.cli.run_options import CONTEXT, data_options, label, loading, model_options


@click.command(
    "evaluate",
    context_settings=CONTEXT,
    epilog="Exit codes: 0 measured, 2 usage, 3 unreadable or invalid input, 4 a profile of another model, 130 interrupted.",
)
@model_options
@data_options(samples=40, length=512)
@click.option(
    "--profile",
    "profiles",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Profile to measure; repeatable.",
)
@click.option(
    "--uniform",
    "uniforms",
    multiple=True,
    metavar="KEY/VALUE",
    help="Also measure one spec in every layer, e.g. 4-g64-asym/4-g64-asym; repeatable.",
)
@click.option(
    "--tasks",
    multiple=True,
    metavar="TASK",
    help="Also run a task or group of lm-eval, e.g. gsm8k; repeatable, or with commas. Needs the extra `eval`.",
)
@click.option(
    "--fewshot",
    type=click.IntRange(0),
    help="Examples before each question of a task.",
    show_default="the task's own number",
)
@click.option("--limit", type=click.IntRange(1), help="First items of each task.", show_default="all")
@click.option(
    "--task-folder",
    type=click.Path(path_type=Path),
    help="Folder with additional task files (YAML). lm-eval runs the Python that they name.",
)
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Prompts of a task in one pass.")
@json_option
@quiet_option
def command(
    profiles: tuple[Path, ...],
    uniforms: tuple[str, ...],
    tasks: tuple[str, ...],
    fewshot: int | None,
    limit: int | None,
    task_folder: Path | None,
    batch_size: int,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure profiles against the 16-bit cache: KL divergence, likelihood and exact answers.

    Attention reads every key and value as stored. Built-in tasks use prompts that no calibration saw; of a text file the first SAMPLES windows of LENGTH
    tokens are scored. With --tasks, lm-eval's tasks too, answered by generation from the stored cache. Intervals are 95 %, paired over
    samples. docs/evaluate.md says more.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: lm-eval's own bars would break ours
    threads.limit_threads()  # before torch is imported
    from kvtuner_kernels.layout import LayerSpec, LayoutError
    from kvtuner_search.data import DEFAULT_SOURCES
    from kvtuner_search.errors import UsageError
    from kvtuner_search.evaluation.lm_eval_tasks import TaskOptions, check_installed, run_tasks
    from kvtuner_search.evaluation.offline import evaluate, open_profile, uniform
    from kvtuner_search.models.load import load_model
    from kvtuner_search.profile.checks import check_model
    from kvtuner_search.progress import Reporter

    if not profiles and not uniforms:
        raise UsageError("nothing to measure: give --profile or --uniform")
    names = tuple(name.strip() for text in tasks for name in text.split(",") if name.strip())
    if names:
        check_installed()
    elif fewshot is not None or limit is not None or task_folder is not None:
        raise UsageError("--fewshot, --limit and --task-folder apply to tasks: name one with --tasks")
    opened = [open_profile(path) for path in profiles]
    reporter = Reporter(quiet)
    loaded = load_model(loading(options), options["length"])
    for note in loaded.notes:
        reporter.say(note)
    settings = []
    for profile, centres in opened:
        check_model(profile, loaded.info, loaded.info.id)
        settings.append((profile.name, tuple(profile.layer_specs()), centres))
    for text in uniforms:
        try:
            spec = LayerSpec.parse(text)
            spec.row(loaded.info.num_kv_heads, loaded.info.head_dim)
        except LayoutError as error:
            raise UsageError(str(error)) from error
        settings.append((text, uniform(spec, loaded.info.num_layers), {}))
    options["sources"] = options["sources"] or DEFAULT_SOURCES
    found = evaluate(loaded, settings, reporter=reporter, **options)
    if names:
        chosen = TaskOptions(names, fewshot, limit, task_folder, batch_size)
        for row, scores in zip(found, run_tasks(loaded, settings, chosen, reporter), strict=True):
            row["tasks"] = [asdict(score) for score in scores]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print(found, loaded.info.id)
        if names:
            _print_tasks(found)


def _print(found: list[dict[str, Any]], model: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{label(model)}: stored cache against 16 bit (95 % intervals of the difference)")
    for name in ("setting", "bits", "data", "metric", "16 bit", "stored", "difference", "interval"):
        table.add_column(
            name, justify="left" if name in ("setting", "data", "metric") else "right", no_wrap=name != "setting"
        )
    for row in found:
        for index, m in enumerate(row["measures"]):
            first = (row["name"], f"{row['effective_bits']:.3f}") if index == 0 else ("", "")
            digits = 3 if m["metric"] == "accuracy" else 4
            table.add_row(
                *first,
                m["data"],
                m["metric"],
                f"{m['baseline']:.{digits}f}",
                f"{m['value']:.{digits}f}",
                f"{m['value'] - m['baseline']:+.{digits}f}",
                "one sample" if m["samples"] == 1 else f"\\[{m['ci_low']:+.{digits}f}, {m['ci_high']:+.{digits}f}]",
            )
        table.add_section()
    console = Console()
    (console if console.is_terminal else Console(width=110)).print(table)


def _print_tasks(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="lm-eval: stored cache against 16 bit on the same items (95 % intervals of the difference)")
    texts = ("setting", "task", "metric")
    for name in (*texts, "shots", "items", "16 bit", "stored", "lost", "gained", "difference", "interval"):
        table.add_column(name, justify="left" if name in texts else "right", no_wrap=name not in texts, overflow="fold")
    for row in found:
        for index, score in enumerate(row["tasks"]):
            low, high = score["ci_low"], score["ci_high"]
            table.add_row(
                row["name"] if index == 0 else "",
                score["task"],
                score["metric"].removesuffix(",none"),
                str(score["fewshot"]),
                str(score["samples"]),
                f"{score['baseline']:.4g}",
                f"{score['value']:.4g}",
                *("-" if score[name] is None else str(score[name]) for name in ("lost", "gained")),
                f"{score['value'] - score['baseline']:+.4g}",
                "no mean of items" if low is None else f"\\[{low:+.3f}, {high:+.3f}]",
            )
        table.add_section()
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
