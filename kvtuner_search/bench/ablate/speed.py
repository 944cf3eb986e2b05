"""The server half of an ablation: one benchmark run, correctness-gated, for each row that packed rows can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvtuner_kernels.reference import Centres
from kvtuner_search import __version__
from kvtuner_search.bench.ablate.rows import AblationSpeed, SpeedCell
from kvtuner_search.bench.ablate.variants import BASELINE, StorageVariant
from kvtuner_search.bench.options import BenchOptions
from kvtuner_search.bench.presets import CellPlan
from kvtuner_search.bench.record import Record, Shape
from kvtuner_search.bench.run import RECORD, BenchRun
from kvtuner_search.errors import ServingError
from kvtuner_search.profile.build import build, write
from kvtuner_search.profile.presets import SOURCE
from kvtuner_search.profile.schema import ModelInfo, Provenance
from kvtuner_search.progress import Reporter
from kvtuner_search.transforms import centres_file


def steps(prompt: int, output: int, concurrency: int, requests: int) -> list[CellPlan]:
    """Two cells: time to the first token of requests alone, and throughput of ``concurrency`` at a time."""
    alone = Shape(requests=requests, concurrency=1, input_tokens=prompt, output_tokens=8)
    many = Shape(
        requests=max(requests, 2 * concurrency), concurrency=concurrency, input_tokens=prompt, output_tokens=output
    )
    return [CellPlan("ttft", alone), CellPlan("throughput", many, warmup=concurrency)]


def write_profile(variant: StorageVariant, model: ModelInfo, centres: Mapping[int, Centres], folder: Path) -> Path:
    """The row as a profile, its centring vectors beside it; returns the profile's path. The user's own profiles are used as they are."""
    if variant.profile is not None:
        return variant.profile
    assert variant.setting is not None
    provenance = Provenance(
        origin="published" if variant.family == "published" else "uniform",
        source=SOURCE if variant.family == "published" else None,
        tool=f"kvtuner-search {__version__}",
        notes=["A row of an ablation."],
    )
    data = centres_file(variant.setting, centres) if variant.centred else None
    return write(build(slug(variant.name), variant.setting, model, provenance, transforms=data), folder, data)


def slug(name: str) -> str:
    """A row's name as a file's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower()


def measure(
    variant: StorageVariant,
    profile: Path | None,
    *,
    model: str,
    server_python: str,
    server_arguments: Sequence[str],
    cells: Sequence[CellPlan],
    folder: Path,
    overwrite: bool,
    seed: int,
    timeout: float,
    start_timeout: float,
    command: str,
    reporter: Reporter,
) -> AblationSpeed:
    """Serve one row and measure it. A server that does not start, or a run that is not a result, gives a row without speed and the reason.

    Args:
        profile: of the row; None for the 16-bit row, whose server is a stock one.
        folder: of the ablation; the run has its own below it and resumes what is there.

    Raises:
        UsageError: if the server cannot be started with these options.
    """
    own = folder / "speed" / slug(variant.name)
    options = BenchOptions(
        profile=None if variant.name == BASELINE else profile,
        model=model,
        url=None,
        server_arguments=tuple(server_arguments),
        server_python=server_python,
        preset="custom",
        steps=cells,
        objectives=(),
        hardware=None,
        seed=seed,
        timeout=timeout,
        stall=timeout,
        start_timeout=start_timeout,
        workers=None,
        cross_check=False,
        folder=own,
        resume=True,
        overwrite=overwrite,
        command=command,
    )
    reporter.say(f"server: {variant.name}")
    try:
        record = BenchRun(options, reporter).measure()
    except ServingError as error:
        return AblationSpeed(cells=[], token_capacity=0, record=None, reason=str(error)[:2000])
    return of_record(record, str((own / RECORD).relative_to(folder)))


def of_record(record: Record, path: str) -> AblationSpeed:
    """The figures of a benchmark record for a row: none if a check failed or a figure is impossible."""
    failed = [f"check {check.name} failed: {check.detail}" for check in record.correctness if not check.passed]
    failed += [f"{v.where}: {v.rule}: {v.figure}: {v.reason}" for v in record.violations]
    found = []
    for cell in record.cells:
        if cell.succeeded < cell.shape.requests:
            failed.append(f"{cell.title}: {cell.shape.requests - cell.succeeded} requests failed")
        if cell.speed is not None and cell.speed.ttft is not None and cell.section in ("ttft", "throughput"):
            found.append(
                SpeedCell(
                    section=cell.section,
                    input_tokens=cell.shape.input_tokens,
                    output_tokens=cell.shape.output_tokens,
                    concurrency=cell.shape.concurrency,
                    requests=cell.succeeded,
                    ttft_ms=cell.speed.ttft.p50,
                    tokens_per_second=cell.speed.output_tokens_per_second,
                )
            )
    return AblationSpeed(
        cells=[] if failed else found,
        token_capacity=record.served.token_capacity,
        record=path,
        reason="; ".join(failed)[:2000],
    )
