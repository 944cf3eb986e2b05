"""``kvtuner-search sensitivity``: the analysis that precedes a search, by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvtuner_search import threads
from kvtuner_search.cli.options import quiet_option
from kvtuner_search.cli.run_options import CONTEXT, data_options, label, loading, model_options, space_options


@click.command(
    "sensitivity",
    context_settings=CONTEXT,
    epilog="Exit codes: 0 measured, 2 usage, 3 unreadable or invalid input, 130 interrupted.",
)
@model_options
@data_options(samples=5, length=448)
@space_options
@click.option(
    "--pair-loss",
    is_flag=True,
    help="Measure the single-layer loss of every pair, not only of each side (takes several times as long).",
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write everything that was measured as JSON."
)
@quiet_option
def command(pair_loss: bool, output: Path | None, quiet: bool, **options: Any) -> None:
    """Measure each layer's loss with each storage class; nothing is searched or chosen.

    For every pair of specs: relative errors of keys (e_k), values (e_v) and attention output (e_o), and the total variation of the attention
    probabilities (e_a), with and without centring and rotation. For every class: the KL divergence of the model's output when only one side of one
    layer is stored in it.
    """
    threads.limit_threads()  # before torch is imported
    from kvtuner_search.calibration.alone import LayerAlone
    from kvtuner_search.calibration.candidates import pair_name
    from kvtuner_search.calibration.options import CalibrationOptions
    from kvtuner_search.calibration.pipeline import analyse, prepare
    from kvtuner_search.files import check_writable, write_atomic
    from kvtuner_search.progress import Reporter

    check_writable(output)
    reporter = Reporter(quiet)
    run = prepare(CalibrationOptions(model=loading(options), target_bits=(), **options), reporter)
    plan = analyse(run, None, least_error=0.0)
    layers = [layer.model_dump(mode="json") for layer in plan.sensitivity()]
    if pair_loss:
        alone = LayerAlone(run.scorer, 0, plan.centres)
        with reporter.stage("each pair alone", sum(len(layer.pair_error) for layer in plan.options)) as advance:
            for index, layer_options in enumerate(plan.options):
                losses = {}
                for pair in layer_options.pair_error:
                    losses[pair_name(pair)] = alone.loss(index, layer_options.spec(pair))
                    advance()
                layers[index]["pair_losses"] = losses
    _print(layers, run.loaded.info.id)  # first: it is left if the disk is full by now
    if output is not None:
        content = {"model": run.loaded.info.model_dump(mode="json"), "layers": layers}
        write_atomic(output, json.dumps(content, indent=1, sort_keys=True) + "\n")
        reporter.say(f"wrote {output}")


def _print(layers: list[dict[str, Any]], model: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for side, title in (("keys", "keys"), ("values", "values")):
        table = Table(title=f"{label(model)}: KL in nats a token with the {title} of one layer alone stored in a class")
        classes = [name for name in layers[0][side] if name != "16"]
        table.add_column("layer", justify="right")
        for name in classes:
            table.add_column("-\n".join(name.rsplit("-", 1)), justify="right")
        table.add_column("best 4-bit variant" if any(c.startswith("4-g") for c in classes) else "best variant")
        for index, layer in enumerate(layers):
            best = next((n for n in classes if n.startswith("4-g")), classes[-1]) if classes else "16"
            table.add_row(str(index), *(f"{layer[side][name][1]:.5f}" for name in classes), layer[side][best][0])
        console.print(table)
